"""
Answers questions about images with continuous thoughts; as a module, how a model is asked in
batches and how its answers are scored, in training as here.

    python sample.py --ckpt out/best.pt --image cat.jpg
    python sample.py --ckpt out/best.pt --export FOLDER      for transformers, with a model card
    python sample.py --ckpt out-toy/best.pt --image data/toy/images/test/00000.png \\
                     --question "Four doors from red?" --choices "blue|green|pink|white" \\
                     --show_thoughts 5

--image takes one file, several separated by commas, or a folder; all are answered in one batch.
"""
import json
import math
import os
import sys
import time

import torch
from PIL import Image

from configurator import configure
from model import END_LATENT, EXPORTED, LATENT, START_LATENT, load_checkpoint
from prepare import (LETTERS, batches, collate, encode, extract_choice, frame_of, free_answer_is,
                     load_image, tile_image)

# --- knobs ----------------------------------------------------------------------------------------
ckpt = 'out/best.pt'                      # a .pt of train.py, or a model's folder or hub id
export = ''                               # a new folder: write the model there, ask nothing
image = ''                                # file, files separated by commas, or folder; '' for none
question = 'Describe the image.'
choices = ''                              # options separated by |, for a multiple-choice question
num_thoughts = -1                         # -1 for as many as in the checkpoint's stage
max_new_tokens = 128
temperature = 0.0                         # 0 for greedy
top_p = 1.0
show_thoughts = 0                         # how many top tokens to print for each thought
device = 'auto'                           # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'                            # of the weights: 'float32', 'bfloat16'; see `pick_dtype`
compile = False                           # compile the decoding step: a minute, then faster answers
seed = 1337

# how a checkpoint that was not trained here is asked: in InternVL's own words and chat turns
UNTRAINED = dict(mode='coconut', c_thought=1, max_latent_stage=0, pad_latent_to_max=True,
                 max_tiles=12, answer='{letter}', template='chatml', visual_bridge=False)
INTERNVL_PROMPT = '<image>\n{question}'
INTERNVL_CHOICES = "\n{choices}\nAnswer with the option's letter from the given choices directly."


# --- device ---------------------------------------------------------------------------------------
def pick_device(device):
    """'auto' is the GPU where there is one; 'mps', Apple's, has to be asked for: it was never
    tried."""
    if device not in ('auto', 'cpu', 'cuda', 'mps'):
        raise ValueError(f'device={device!r}: expected auto, cpu, cuda or mps; '
                         'CUDA_VISIBLE_DEVICES chooses a GPU')
    if device == 'cuda' and not torch.cuda.is_available():
        raise ValueError('device=cuda, but torch sees no GPU here: use --device=cpu, or install a '
                         'torch with CUDA')
    if device == 'mps' and not torch.backends.mps.is_available():
        raise ValueError('device=mps, but torch sees no such GPU here: use --device=cpu')
    if device == 'mps':
        print('device=mps: this code was never run on one; compare a short run with --device=cpu '
              'first')
    if device == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    return device


def pick_dtype(dtype, device, on_cpu=False):
    """'auto' is bfloat16 on a GPU that computes in it, and, if on_cpu is True, on a CPU that
    multiplies it natively; float32 elsewhere."""
    if dtype == 'float16':
        raise ValueError('dtype=float16: its range is too small for the gradients without a loss '
                         'scaler, and for some of the activations; use float32, or bfloat16 on a '
                         'GPU that has it')
    if dtype not in ('auto', 'float32', 'bfloat16'):
        raise ValueError(f'dtype={dtype!r}: expected auto, float32 or bfloat16')
    if dtype == 'auto':
        native = False
        if device == 'cuda':
            native = torch.cuda.get_device_capability()[0] >= 8  # not V100 or T4
        elif device == 'cpu' and on_cpu:
            # torch has no public name for it
            check = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', None)
            native = bool(check and check())
        return 'bfloat16' if native else 'float32'
    return dtype


def peak_memory(device):
    """The most bytes this process has held: on the GPU, or all of its memory; 0 where none can
    tell."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    unit = 1 if sys.platform == 'darwin' else 1024  # macOS counts bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- asking, and scores ---------------------------------------------------------------------------
def respond(model, tokenizer, batch, rows, answer, **generation):
    """Free-running answers to a batch, a dict a row:

        question_id, text, tokens, thoughts
        ended        whether it came to its end token
        option       the text; with choices the option that it says, as the row spells it
        parsed       whether it says one; True without choices
        choice       with choices: the option's number, 0 where it says none
        right        with a known answer
        default_a    with both: whether it is right if an answer that says none counts as the first
        exact        without choices: whether it is the answer letter by letter
    """
    new = model.generate(**batch, **generation)
    config = model.config
    is_end = torch.isin(new, torch.tensor(config.eos_token_ids, device=new.device))
    before_end = is_end.cumsum(1) - is_end.long() == 0  # no end token before this one
    tokens = before_end.sum(1).tolist()
    ended = is_end.any(1).tolist()
    thoughts = (batch['input_ids'] == config.latent_token_id).sum(1).tolist()
    answers = []
    for b, text in enumerate(tokenizer.batch_decode(new, skip_special_tokens=True)):
        row, options = rows[b], rows[b].get('choices')
        found = dict(question_id=row.get('question_id'), text=text, tokens=tokens[b],
                     thoughts=thoughts[b], ended=ended[b], parsed=True, option=text)
        if options:
            found['choice'], found['parsed'] = extract_choice(text, options, answer, ended[b])
            found['option'] = options[found['choice']]
        if 'answer' in row and options:  # of two options that are spelt the same either is right
            same = found['option'].strip() == options[row['correct_choice_idx']].strip()
            found['right'] = same and found['parsed']
            found['default_a'] = same
        elif 'answer' in row:
            found['right'], found['exact'] = free_answer_is(text, row, answer)
        answers.append(found)
    return answers


def ask(model, tokenizer, rows, groups, answer, autocast, loading=None, edit_for=None,
        **generation):
    """Asks groups of row numbers of `rows`, a prepare.Rows without targets: yields (group, answers,
    seconds without the loading). edit_for, where given, makes an edit_thought for each group."""
    for group, batch in zip(groups, batches(rows, groups, **loading or {})):
        began = time.time()
        if edit_for:
            generation['edit_thought'] = edit_for(group)
        with autocast:
            answers = respond(model, tokenizer, batch, [rows.rows[i] for i in group], answer,
                              **generation)
        yield group, answers, time.time() - began


def wilson(p, n, z=1.96):
    """Wilson's interval, by default of 95 %, of a share p of n."""
    centre = (p + z * z / 2 / n) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n)
    return [centre - half, centre + half]


def summarize(answers, seconds):
    """Metrics of what `respond` gave. Where the answers are known: accuracy, in which an answer
    that says no option is wrong, with Wilson's 95 % interval; for options also accuracy_default_a,
    in which it counts as A; for free answers also accuracy_exact, letter by letter."""
    n = len(answers)

    def total(key):
        return sum(found[key] for found in answers)

    metrics = dict(tokens_per_answer=total('tokens') / n, thoughts_per_answer=total('thoughts') / n,
                   unparsed=n - total('parsed'), cut=n - total('ended'), examples=n,
                   seconds_per_answer=seconds / n)
    if all('right' in found for found in answers):
        p = total('right') / n
        metrics.update(accuracy=p, interval=wilson(p, n))
        for key, name in (('default_a', 'accuracy_default_a'), ('exact', 'accuracy_exact')):
            having = [found[key] for found in answers if key in found]
            if having:
                metrics[name] = sum(having) / len(having)
    return metrics


def describe(metrics):
    known = 'no labels'
    if 'accuracy' in metrics:
        low, high = metrics['interval']
        known = f'accuracy {100 * metrics["accuracy"]:5.1f} % ({100 * low:.1f} to {100 * high:.1f})'
    unread = f'{metrics["unparsed"]} unparsed'
    if metrics['unparsed'] and 'accuracy_default_a' in metrics:
        unread += f' (were they A: {100 * metrics["accuracy_default_a"]:.1f} %)'
    if metrics['cut']:
        unread += f', {metrics["cut"]} cut off by max_new_tokens'
    if 'accuracy_exact' in metrics:
        unread += f', exactly right {100 * metrics["accuracy_exact"]:.1f} %'
    loss = f', loss {metrics["loss"]:.4f}' if 'loss' in metrics else ''
    return (f'{known} of {metrics["examples"]}, {metrics["tokens_per_answer"]:.1f} tokens and '
            f'{metrics["thoughts_per_answer"]:.1f} thoughts and '
            f'{metrics["seconds_per_answer"]:.3f} s an answer, {unread}{loss}')


def find_images(image):
    """The files that --image names, in order."""
    if os.path.isdir(image):
        names = [name for name in sorted(os.listdir(image)) if not name.startswith('.')]
        endings = tuple(Image.registered_extensions())
        found = [name for name in names if name.lower().endswith(endings)]
        if not found:
            raise ValueError(f'the folder {image} holds no image: give a file, or a folder of png, '
                             'jpg, webp, tif or other image files')
        if len(found) < len(names):
            print(f'{image}: {len(names) - len(found)} files are left out, their endings are not '
                  'those of images')
        return [os.path.join(image, name) for name in found]
    if os.path.isfile(image):
        return [image]  # a comma may be part of its name
    return [name.strip() for name in image.split(',') if name.strip()] or [None]


def model_card(title, model, saved, source):
    """README.md of an exported folder: what the model is, its recipe, its measured accuracy, and
    how thoughts are asked for. Says what is not known."""
    c, knobs = model.config, saved.get('knobs', {})
    kind = 'a vision-language model of the InternVL3 family'
    loader = 'InternVLForConditionalGeneration'
    if not c.vision_num_layers:
        kind, loader = 'a text decoder', 'AutoModelForCausalLM'
    lines = ['---', 'library_name: transformers', '---', f'# {title}', '',
             f'This is {kind}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, '
             f'written by MultiCoCo from {source}. transformers loads it without further code '
             f'(`{loader}.from_pretrained`).', '']
    if 'stage' in saved:
        lines += [f'It was trained to reason in continuous thoughts (Coconut, arXiv 2412.06769), '
                  f'mode {knobs["mode"]}, up to stage {saved["stage"]} of the curriculum, epoch '
                  f'{saved["epoch"]}, step {saved["step"]}, from {knobs["init_from"]} on '
                  f'{knobs["data_dir"]}.', '',
                  f'Accuracy on that data\'s validation rows in its latest evaluation: '
                  f'{100 * saved["accuracy"]:.1f} %, by greedy answers written freely; an answer '
                  'that says no option counts as wrong.' if saved['epoch'] or saved['accuracy'] else
                  'Its accuracy was not measured yet.']
    else:
        lines += ['It was not trained by MultiCoCo. Its accuracy was not measured.']
    lines += ['', '## Thoughts', '',
              f'Behind the prompt stand `{START_LATENT}`, n times `{LATENT}`, `{END_LATENT}`; the '
              f'input embedding of each `{LATENT}` is the last hidden state, after the final norm, '
              'at the position before it. transformers\' own `generate` does not do this: there '
              f'`{LATENT}` is an ordinary token. With MultiCoCo:', '',
              '    python sample.py --ckpt FOLDER --image cat.jpg --question "..."'
              if c.vision_num_layers else
              '    python sample.py --ckpt FOLDER --question "..."', '',
              '## Recipe', '', *(f'    {key} = {value!r}' for key, value in knobs.items())]
    return '\n'.join(lines).rstrip() + '\n'


if __name__ == '__main__':
    globals().update(configure(globals()))
    device = pick_device(device)
    model, tokenizer, saved = load_checkpoint(ckpt, 'auto')
    stored = model.language_model.lm_head.weight.dtype
    if export:
        if dtype != 'auto':
            model.to(getattr(torch, pick_dtype(dtype, device)))
        keep = ('knobs', 'stage', 'epoch', 'step', 'accuracy')
        known = {key: saved[key] for key in keep if key in saved}
        title = os.path.basename(os.path.abspath(export))
        texts = {'README.md': model_card(title, model, saved, ckpt)}
        if known:
            texts[EXPORTED] = json.dumps(known, indent=1)
        model.save_pretrained(export, tokenizer, texts)
        print(f'wrote {export}, for transformers and for --ckpt {export}')
        raise SystemExit(0)
    dtype = pick_dtype(dtype, device, on_cpu=stored == torch.bfloat16)
    model.to(device, getattr(torch, dtype))
    if compile:
        how = 'reduce-overhead' if device == 'cuda' else 'default'
        model.step = torch.compile(model.step, mode=how, dynamic=False)
    config, knobs, stage = model.config, saved.get('knobs', UNTRAINED), saved.get('stage', 0)
    if not (saved or config.vision_num_layers):
        knobs = {**knobs, 'template': 'chat' if tokenizer.chat_template else 'plain'}
    torch.manual_seed(seed)

    # --- rows -------------------------------------------------------------------------------------
    options = [option.strip() for option in choices.split('|')] if choices else []
    if options and (not 2 <= len(options) <= len(LETTERS) or not all(options)):
        raise ValueError(f'--choices={choices!r} gives {len(options)} options: expected 2 to '
                         f'{len(LETTERS)}, none of them empty, as in "cat|dog|bird"')
    text_knobs = {'prompt': INTERNVL_PROMPT + INTERNVL_CHOICES if options else INTERNVL_PROMPT}
    for key in ('mode', 'c_thought', 'max_latent_stage', 'pad_latent_to_max', 'prompt', 'answer',
                'template', 'visual_bridge'):
        if key in knobs:
            text_knobs[key] = knobs[key]
    text_knobs['template'] = frame_of(text_knobs['template'], tokenizer)
    if num_thoughts > 0 and text_knobs['mode'] not in ('coconut', 'pause'):
        raise ValueError(f'--num_thoughts={num_thoughts}, but {ckpt} was trained with mode='
                         f'{text_knobs["mode"]}, which has no thoughts')
    if num_thoughts >= 0:
        text_knobs.update(c_thought=1, max_latent_stage=num_thoughts)
        stage = num_thoughts
    files, tiles, rows = find_images(image), [], []
    for file in files:
        row = dict(question=question, choices=options, image=file, question_id=file or 'question')
        tiles.append(None)
        if file:
            tiles[-1] = tile_image(load_image(file), config.image_size, 1, knobs['max_tiles'])
        rows.append(encode(row, tokenizer, stage, tiles[-1], supervised=False,
                           max_length=config.max_position_embeddings,
                           num_image_tokens=config.num_image_tokens, **text_knobs))

    # --- answers ----------------------------------------------------------------------------------
    thoughts = []

    def record_thought(k, thought):
        thought = model.as_pause(k, thought) if text_knobs['mode'] == 'pause' else thought
        thoughts.append(thought)
        return thought

    began = time.time()
    hooked = show_thoughts > 0 or text_knobs['mode'] == 'pause'
    answers = respond(model, tokenizer, collate(rows), [dict(choices=options)] * len(files),
                      knobs['answer'], max_new_tokens=max_new_tokens, temperature=temperature,
                      top_p=top_p, edit_thought=record_thought if hooked else None)
    seconds = time.time() - began
    all_ids = torch.arange(config.vocab_size, device=device)
    embedding_norm = model.embed_text(all_ids).norm(dim=-1).mean()
    for b, found in enumerate(answers):
        P = 0 if tiles[b] is None else len(tiles[b])
        print(f'\n{files[b] or "no image"}: {P} tiles, {P * config.num_image_tokens} visual '
              f'tokens, {found["thoughts"]} thoughts, {found["tokens"]} tokens written')
        for k in range(found['thoughts'] if show_thoughts > 0 else 0):
            p = model.language_model.lm_head(thoughts[k][b]).float().softmax(-1)
            p, top = p.topk(min(show_thoughts, config.vocab_size))
            says = [f'{tokenizer.decode([t])!r} {q:.2f}' for q, t in zip(p.tolist(), top.tolist())]
            print(f'  thought {k + 1}: {"  ".join(says)}  (norm {thoughts[k][b].norm():.2f}, an '
                  f'embedding has {embedding_norm:.2f})')
        print(f'{question} {" | ".join(options)}'.rstrip() + f'\n{found["text"]}')
        if options and found['parsed']:
            print(f'-> {LETTERS[found["choice"]]}. {options[found["choice"]]}')
        elif options:
            print('-> no option could be read from this answer')
    print(f'\n{len(files)} answers in {seconds:.1f} s on {device} in {dtype}, peak memory '
          f'{peak_memory(device) / 1e9:.2f} GB')
