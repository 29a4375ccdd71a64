"""
Answers questions about images with continuous thoughts.

    python sample.py --ckpt out/best.pt --image cat.jpg
    python sample.py --ckpt out-toy/best.pt --image data/toy/images/test/00000.png --question "Four doors from red?" \\
                     --choices "blue|green|pink|white" --show_thoughts 5

--image takes one file, several separated by commas, or a folder; all are answered in one batch.
"""
import math
import os
import resource
import time

import torch

from configurator import configure
from model import load_checkpoint, pick_device, pick_dtype
from prepare import LETTERS, collate, encode, extract_choice, fill, load_image, tile_image

# --- knobs ------------------------------------------------------------------------------------------------------------
ckpt = 'out/best.pt'                      # a .pt of train.py, or a folder or hub id of InternVL
image = ''                                # file, files separated by commas, or folder; empty for a question without an image
question = 'Describe the image.'
choices = ''                              # options separated by |, for a multiple-choice question
num_thoughts = -1                         # -1 for as many as in the checkpoint's stage
max_new_tokens = 128
temperature = 0.0                         # 0 for greedy
top_p = 1.0
show_thoughts = 0                         # how many top tokens to print for each thought
device = 'auto'                           # 'auto', 'cpu', 'cuda'
dtype = 'auto'                            # of the weights: 'float32', 'bfloat16'; 'auto' is bfloat16 on a GPU
compile = False                           # compile the decoding step: a minute once, then faster long answers
seed = 1337

UNTRAINED = dict(mode='coconut', c_thought=1, max_latent_stage=0, max_tiles=12, answer='',
                 prompt="<image>\n{question}\n\n{choices}\nAnswer with the option's letter.",
                 template='chatml', visual_bridge=False)  # how a checkpoint that was not trained here is asked


def find_images(image):
    """The files that --image names, in order."""
    if os.path.isdir(image):
        names = sorted(n for n in os.listdir(image) if n.lower().endswith(('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif')))
        if not names:
            raise ValueError(f'the folder {image} holds no image: give a file, or a folder of png, jpg, webp, bmp or gif files')
        return [os.path.join(image, n) for n in names]
    return [name.strip() for name in image.split(',')] if image else [None]


def respond(model, tokenizer, batch, rows, answer, **generation):
    """
    Free-running answers to a batch: for each row a dict of text, tokens, thoughts and option, that is the text or the option that it names; with
    choices also choice, its number, and parsed, whether it could be read; with a known answer also right.
    """
    new, said = model.generate(**batch, **generation), []
    tokens = (new != model.config.pad_token_id).sum(1).tolist()
    thoughts = (batch['input_ids'] == model.config.latent_token_id).sum(1).tolist()
    for row, text, n, k in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), tokens, thoughts):
        one = dict(question_id=row.get('question_id'), text=text, tokens=n, thoughts=k, parsed=True, option=text)
        if row.get('choices'):
            one['choice'], one['parsed'] = extract_choice(text, row['choices'])
            one['option'] = row['choices'][one['choice']]
        if 'answer' in row:
            one['right'] = one['choice'] == row['correct_choice_idx'] if row.get('choices') else \
                text.strip().split('\n')[-1] == fill(answer, row).split('\n')[-1]
        said.append(one)
    return said


def summarize(answers, seconds):
    """Metrics of what `respond` gave; accuracy, with Wilson's 95 % interval, where the answers are known."""
    total, n, z = lambda key: sum(one[key] for one in answers), len(answers), 1.96
    metrics = dict(tokens_per_answer=total('tokens') / n, thoughts_per_answer=total('thoughts') / n, unparsed=n - total('parsed'),
                   examples=n, seconds_per_answer=seconds / n)
    if all('right' in one for one in answers):
        p = total('right') / n
        centre, half = (p + z * z / 2 / n) / (1 + z * z / n), z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n)
        metrics.update(accuracy=p, interval=[centre - half, centre + half])
    return metrics


def describe(metrics):
    low, high = metrics.get('interval', (0, 0))
    known = f'accuracy {100 * metrics["accuracy"]:5.1f} % ({100 * low:.1f} to {100 * high:.1f})' if high else 'no labels'
    loss = f', loss {metrics["loss"]:.4f}' if 'loss' in metrics else ''
    return (f'{known} of {metrics["examples"]}, {metrics["tokens_per_answer"]:.1f} tokens and {metrics["thoughts_per_answer"]:.1f} '
            f'thoughts and {metrics["seconds_per_answer"]:.3f} s an answer, {metrics["unparsed"]} unparsed{loss}')


if __name__ == '__main__':
    globals().update(configure(globals()))
    device = pick_device(device)
    model, tokenizer = load_checkpoint(ckpt)
    model.to(device, getattr(torch, pick_dtype(dtype, device)))
    if compile:
        model.step = torch.compile(model.step, mode='reduce-overhead' if device == 'cuda' else 'default', dynamic=False)
    config, knobs, stage = model.config, model.checkpoint.get('knobs', UNTRAINED), model.checkpoint.get('stage', 0)
    torch.manual_seed(seed)

    # --- rows ---------------------------------------------------------------------------------------------------------
    options = [c.strip() for c in choices.split('|')] if choices else []
    if options and (not 2 <= len(options) <= len(LETTERS) or not all(options)):
        raise ValueError(f'--choices={choices!r} gives {len(options)} options: expected 2 to {len(LETTERS)}, as in "cat|dog|bird"')
    text = {k: knobs[k] for k in ('mode', 'c_thought', 'max_latent_stage', 'prompt', 'answer', 'template', 'visual_bridge')}
    if num_thoughts >= 0:
        text.update(c_thought=1, max_latent_stage=num_thoughts)
        stage = num_thoughts
    files = find_images(image)
    tiles = [tile_image(load_image(f), config.image_size, max_tiles=knobs['max_tiles']) if f else None for f in files]
    rows = [encode(dict(question=question, choices=options, image=f, question_id=f or 'question'), tokenizer, stage, t,
                   supervised=False, max_length=config.max_position_embeddings, num_image_tokens=config.num_image_tokens, **text)
            for f, t in zip(files, tiles)]
    batch = {k: v if v is None else v.to(device) for k, v in collate(rows).items()}

    # --- answers ------------------------------------------------------------------------------------------------------
    thoughts = []

    def keep(k, thought):
        thought = model.as_pause(k, thought) if text['mode'] == 'pause' else thought
        thoughts.append(thought)
        return thought

    began = time.time()
    said = respond(model, tokenizer, batch, [dict(choices=options)] * len(files), knobs['answer'], max_new_tokens=max_new_tokens,
                   temperature=temperature, top_p=top_p, edit_thought=keep)
    seconds = time.time() - began
    usual = model.embed_text(torch.arange(config.vocab_size, device=device)).norm(dim=-1).mean()
    for b, (file, one) in enumerate(zip(files, said)):
        P = 0 if tiles[b] is None else len(tiles[b])
        print(f'\n{file or "no image"}: {P} tiles, {P * config.num_image_tokens} visual tokens, {one["thoughts"]} thoughts, '
              f'{one["tokens"]} tokens written')
        for k in range(one['thoughts'] if show_thoughts > 0 else 0):
            p, top = model.language_model.lm_head(thoughts[k][b]).float().softmax(-1).topk(min(show_thoughts, config.vocab_size))
            says = '  '.join(f'{tokenizer.decode([t])!r} {q:.2f}' for q, t in zip(p.tolist(), top.tolist()))
            print(f'  thought {k + 1}: {says}  (norm {thoughts[k][b].norm():.2f}, an embedding has {usual:.2f})')
        print(f'{question} {" | ".join(options)}'.rstrip() + f'\n{one["text"]}')
        if options:
            chosen = f'-> {LETTERS[one["choice"]]}. {options[one["choice"]]}'
            print(chosen if one['parsed'] else '-> no option could be read from this answer')
    peak = torch.cuda.max_memory_allocated() if device == 'cuda' else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f'\n{len(files)} answers in {seconds:.1f} s on {device}, peak memory {peak / 1e9:.2f} GB')
