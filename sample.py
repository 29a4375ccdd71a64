"""
Answers questions about images with continuous thoughts; as a module, how a model is asked in
batches and how its answers are read and scored, in training as here.

    python sample.py --ckpt out/best.pt --image cat.jpg
    python sample.py --ckpt out/best.pt --image=FOLDER --question="What flies?" --choices="cat|kite"
"""
import math
import os
import re
import time
from contextlib import nullcontext

import torch
from PIL import Image

from configurator import configure
from model import load_checkpoint
from prepare import LETTERS, Rows, batches, build_text, fill, frame_of

# --- knobs ----------------------------------------------------------------------------------------
ckpt = 'out/best.pt'                      # a .pt of train.py, or a model's folder or hub id
image = ''                                # file, files separated by commas, or folder; '' for none
question = 'Describe the image.'
choices = ''                              # options separated by |, for a multiple-choice question
num_thoughts = -1                         # -1 for as many as in the checkpoint's stage
max_new_tokens = 128
temperature = 0.0                         # 0 for greedy
top_p = 1.0
show_thoughts = 0                         # how many top tokens to print for each thought
eval_batch_size = 32                      # images asked about at a time
device = 'auto'                           # 'auto', 'cpu', 'cuda', 'mps' (never tried)
dtype = 'auto'                            # of the weights: 'float32', 'bfloat16'; see `pick_dtype`
compile = False                           # compile the decoding step: a minute, then faster answers
seed = 1337

# how a checkpoint that was not trained here is asked: in InternVL's own words and chat turns
UNTRAINED = dict(mode='coconut', max_tiles=12, answer='{letter}', template='chatml')
INTERNVL_PROMPT = '<image>\n{question}'
INTERNVL_CHOICES = "\n{choices}\nAnswer with the option's letter from the given choices directly."


def pick_device(device):
    """'auto' is the GPU where there is one."""
    return device if device != 'auto' else 'cuda' if torch.cuda.is_available() else 'cpu'


def pick_dtype(dtype, device, on_cpu=False):
    """'auto' is bfloat16 where the device computes in it, on a CPU only if on_cpu; else float32."""
    assert dtype in ('auto', 'float32', 'bfloat16'), dtype  # float16 would need a loss scaler
    native = device.startswith('cuda') and torch.cuda.get_device_capability() >= (8, 0)
    if device == 'cpu' and on_cpu:
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if dtype != 'auto' else 'bfloat16' if native else 'float32'


# --- reading answers back -------------------------------------------------------------------------
def normalised(text):
    """A text without case, brackets, quotes, emphasis and the punctuation that ends a word: '**B.
    Kite**' is 'b kite'. Signs that carry meaning stay: -5, 3/4, C++."""
    return ' '.join(re.sub(r'[*"“”`()\[\]]|[.,:;!](?=\s|$)', ' ', text.lower()).split())


def read_choice(text, row, template, ended=True):
    """The number of the choice that an answer says; None where it says none, or perhaps two. First
    the last line, if the recipe's template writes it for one choice alone; else what stands behind
    the last 'answer is' or 'answer:', or else all of the text, if it is a letter, a choice or both.
    Of a text that was cut off (not ended) only what stands behind 'answer is' counts."""
    text = text.strip() if ended else text.rpartition('\n')[0]
    behind = re.findall(r'\banswer(?: is|:)\s*(.*)', text, re.I)
    raw = behind[-1] if behind else text if ended else ''
    last_line = normalised(text.rpartition('\n')[2]) if ended else ''
    said, by_template, by_words = normalised(raw), set(), set()
    without_article = normalised(re.sub(r'^(an?|the)\s+', '', raw, flags=re.I))  # not of 'A. kite'
    for i, (letter, choice) in enumerate(zip(LETTERS, row['choices'])):
        gold = fill(template, dict(row, correct_choice_idx=i, answer=choice)).rpartition('\n')[2]
        forms = [letter, f'option {letter}', f'{letter} {choice}', f'{choice} {letter}', choice]
        if last_line and last_line == normalised(gold):
            by_template.add(i)
        if said and (said in map(normalised, forms) or without_article == normalised(choice)):
            by_words.add(i)
    meant = by_template if len(by_template) == 1 else by_words
    return meant.pop() if len(meant) == 1 else None


def free_answer_is(text, row, template):
    """Whether a text's last line is a row's answer: (as VQA compares, with or without the template;
    character by character, with the template)."""
    said, known, bare = (t.strip().split('\n')[-1].strip()
                         for t in (text, fill(template, row), row['answer']))
    exact = said == known
    return exact or normalised(said) in {normalised(known), normalised(bare)} - {''}, exact


def check_round_trip(rows, template):
    """Raises where the recipe's own text for an answer would not be read back as it."""
    for row in rows:
        if 'correct_choice_idx' in row:
            text = '\n'.join([*row['steps'], fill(template, row)])
            read = read_choice(text, row, template)
            right = read is not None and row['choices'][read].strip() == row['answer']
            assert right, f'answer={template!r} writes {text!r}, which is read back as {read}'


def respond(model, tokenizer, batch, rows, answer_template, **generation):
    """Free-running answers to a batch, a dict a row: question_id, text, tokens, thoughts, ended (it
    came to its end token); with choices parsed (whether it says one), choice (its number, else 0)
    and option (its text as the row spells it); with a known answer right (never where none is
    said) and, without choices, exact, letter by letter."""
    new = model.generate(**batch, **generation)
    is_end = torch.isin(new, torch.tensor(model.config.eos_token_ids, device=new.device))
    tokens = (is_end.cumsum(1) - is_end.long() == 0).sum(1).tolist()  # no end token before these
    thoughts = (batch['input_ids'] == model.config.latent_token_id).sum(1).tolist()
    answers = []
    for b, text in enumerate(tokenizer.batch_decode(new, skip_special_tokens=True)):
        row, ended = rows[b], bool(is_end[b].any())
        found = dict(question_id=row.get('question_id'), text=text, tokens=tokens[b],
                     thoughts=thoughts[b], ended=ended, parsed=True, option=text)
        if row.get('choices'):
            read = read_choice(text, row, answer_template, ended)
            found.update(parsed=read is not None, choice=read or 0)
            found['option'] = row['choices'][found['choice']]
            if 'answer' in row:  # of two options that are spelt the same either is right
                found['right_as_a'] = found['option'].strip() == row['answer']
                found['right'] = found['parsed'] and found['right_as_a']
        elif 'answer' in row:
            right, exact = free_answer_is(text, row, answer_template)
            found.update(right=ended and right, exact=ended and exact)
        answers.append(found)
    return answers


def ask(model, tokenizer, rows, groups, answer_template, autocast, loading={}, edit_for=None,
        **generation):
    """Asks groups of row numbers of `rows`, a prepare.Rows without targets: yields (group, answers,
    seconds without the loading). edit_for makes an edit_thought (see MultiCoCo) for a group."""
    for group, batch in zip(groups, batches(rows, groups, **loading)):
        began = time.time()
        if edit_for:
            generation['edit_thought'] = edit_for(group)
        with autocast:
            answers = respond(model, tokenizer, batch, [rows.rows[i] for i in group],
                              answer_template, **generation)
        yield group, answers, time.time() - began


def wilson(p, n, z=1.96):
    """Wilson's interval, by default of 95 %, of a share p of n."""
    centre, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    return [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]


def summarize(answers, seconds):
    """Metrics of what `respond` gave. Where all is known: accuracy, its 95 % interval, and accuracy
    with unread answers as A (accuracy_default_a) or, of free answers, letter by letter."""
    n, mean = len(answers), lambda key: sum(found[key] for found in answers) / len(answers)
    metrics = dict(examples=n, tokens_per_answer=mean('tokens'),
                   thoughts_per_answer=mean('thoughts'), seconds_per_answer=seconds / n,
                   unparsed=sum(not found['parsed'] for found in answers),
                   cut=sum(not found['ended'] for found in answers))
    if all('right' in found for found in answers):
        interval = [round(x, 3) for x in wilson(mean('right'), n)]
        metrics.update(accuracy=mean('right'), interval=interval)
    if all('right_as_a' in found for found in answers):
        metrics['accuracy_default_a'] = mean('right_as_a')
    if all('exact' in found for found in answers):
        metrics['accuracy_exact'] = mean('exact')
    return metrics


def describe(metrics):
    """`summarize`'s numbers, and what the caller added to them, in a line."""
    return ', '.join(f'{key} {value:.4g}' if isinstance(value, float) else f'{key} {value}'
                     for key, value in metrics.items())


if __name__ == '__main__':
    configure(globals())
    torch.manual_seed(seed)
    device = pick_device(device)
    model, tokenizer, saved = load_checkpoint(ckpt, 'auto')
    stored = model.language_model.lm_head.weight.dtype
    dtype = pick_dtype(dtype, device, on_cpu=stored == torch.bfloat16)
    model.to(device, getattr(torch, dtype))
    if compile:
        model.step = torch.compile(model.step, dynamic=False, mode=(
            'reduce-overhead' if device == 'cuda' else 'default'))
    config, knobs, stage = model.config, saved.get('knobs', UNTRAINED), saved.get('stage', 0)
    options = choices.split('|') if choices else []
    text = {'prompt': INTERNVL_PROMPT + INTERNVL_CHOICES if options else INTERNVL_PROMPT}
    text.update({key: value for key, value in knobs.items() if key in (
        'mode', 'c_thought', 'max_latent_stage', 'pad_latent_to_max', 'prompt', 'answer',
        'template', 'visual_bridge')})
    if not (saved or config.vision_num_layers):  # a text decoder not trained here
        text['template'] = 'chat' if tokenizer.chat_template else 'plain'
    text['template'] = frame_of(text['template'], tokenizer)
    files = [image] if os.path.isfile(image) else image.split(',')
    if os.path.isdir(image):
        names, endings = sorted(os.listdir(image)), tuple(Image.registered_extensions())
        files = [os.path.join(image, name) for name in names
                 if name.lower().endswith(endings) and not name.startswith('.')]
        print(f'{image}: {len(files)} of {len(names)} files have the ending of an image')
    rows = [dict(question=question, choices=options, image=f, question_id=f) for f in files]
    trained_with = build_text(rows[0], stage, **text)[1]
    if num_thoughts > trained_with:
        print(f'{num_thoughts} thoughts, but {ckpt} was trained with {trained_with}')
    asked = Rows(rows, '', stage, tokenizer, '', config.image_size, knobs['max_tiles'],
                 cache_tiles=False, supervised=False,
                 max_length=config.max_position_embeddings - max_new_tokens,
                 num_image_tokens=config.num_image_tokens,
                 num_thoughts=None if num_thoughts < 0 else num_thoughts, **text)
    thoughts = []  # of the batch in hand, [B, D] each

    def record_thought(k, thought):
        thoughts.append(thought)
        return thought

    if show_thoughts > 0:
        norms = model.language_model.model.embed_tokens.weight.norm(dim=-1)
        print(f'the mean norm of an embedding is {norms.mean():.2f}')
    groups, total = torch.arange(len(rows)).split(eval_batch_size), 0.0
    for group, answers, seconds in ask(model, tokenizer, asked, groups, text['answer'],
                                       nullcontext(), edit_thought=record_thought,
                                       temperature=temperature, top_p=top_p,
                                       max_new_tokens=max_new_tokens):
        total += seconds
        for b, found in enumerate(answers):
            print(f'\n{found["question_id"] or "no image"}: {found["thoughts"]} thoughts, '
                  f'{found["tokens"]} tokens written')
            for k, thought in enumerate(thoughts[:found['thoughts'] if show_thoughts > 0 else 0]):
                p, top = model.language_model.lm_head(thought[b]).float().softmax(-1).topk(
                    show_thoughts)
                says = [f'{tokenizer.decode([t])!r} {q:.2f}' for q, t in zip(p, top)]
                print(f'  thought {k + 1}: {"  ".join(says)}  (norm {thought[b].norm():.2f})')
            print(f'{question} {" | ".join(options)}'.rstrip() + f'\n{found["text"]}')
            if options:
                read = f'{LETTERS[found["choice"]]}. {found["option"]}'
                print('->', read if found['parsed'] else 'no option can be read')
        thoughts.clear()
    print(f'\n{len(rows)} answers in {total:.1f} s on {device} in {dtype}')
