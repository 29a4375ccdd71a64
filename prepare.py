"""
From a data set to a batch. As a command it prepares a folder; as a module it turns a row of that folder into model
inputs.

    python prepare.py                                                  A-OKVQA from the hub
    python prepare.py --dataset=FOLDER --data_dir=data/mine            parquet files in A-OKVQA's schema
    python prepare.py config/toy.py                                    the built-in data set, drawn here
    python prepare.py --dataset=prosqa_train.json --data_dir=data/prosqa --init_from=scratch     Coconut's own files

A prepared folder holds {split}.jsonl, images/{split}/, cache/tiles/{split}/ and, with init_from='scratch',
tokenizer/. A row has the fields of Coconut's files, question, steps, answer, and where there are, image, choices,
correct_choice_idx, question_id. Sources: Coconut's public data code, A-OKVQA's, InternVL's dynamic tiling as
transformers' GotOcr2ImageProcessorPil does it.
"""
import glob
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
from collections import Counter, defaultdict

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from checkpoint import END_IMG, END_LATENT, IMG, IMG_CONTEXT, LATENT, START_LATENT, fetch, replacing, train_tokenizer
from configurator import configure

# --- knobs of the command ---------------------------------------------------------------------------------------------
dataset = 'HuggingFaceM4/A-OKVQA'  # hub id, folder of parquet files, Coconut's JSON file, 'toy' or 'prosqa' to draw one
data_dir = 'data/aokvqa'           # the prepared folder
init_from = 'OpenGVLab/InternVL3-1B-Pretrained'  # the checkpoint to train; 'scratch' trains a tokenizer on the data
steps_from = 'first'               # 'first': the first rationale, cut into steps; 'all': each rationale is a step
max_latent_stage = 4               # a rationale of one sentence is cut into so many spans of words
image_size = 448                   # side of a tile in pixels
max_tiles = 8                      # without the thumbnail
cache_tiles = True                 # tiles as uint8 on disk; False cuts them while training
train_rows = 8192                  # rows of each split, where the data set is drawn
val_rows = 500
test_rows = 500
hops = 4                           # doors to follow in 'toy'
nodes = 23                         # of a graph in 'prosqa'
seed = 1337
# --- how a row becomes text: train.py has the same knobs, here they only show the tokenizer what it will see
PROMPT = '<image>\nQuestion: {question}\n\nChoices:\n{choices}\n\nLet me think step by step:\n'
ANSWER = 'The answer is {letter}. {choice}'  # also: {explanation}, the first sentence of the rationale
prompt = PROMPT
answer = ANSWER

# --- text -------------------------------------------------------------------------------------------------------------
LETTERS = 'ABCDEFGH'
MODES = ('coconut', 'cot', 'no_cot', 'pause', 'no_thoughts')
SYSTEM = '你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。'
SEEING = re.compile(r'\b(see|sees|seen|look|looks|looking|visible|image|picture|photo|shown|shows)\b', re.I)


def fill(template, row):
    """
    A prompt or answer template with the row's fields. Without an image or choices, what speaks of them is left out: of
    a prompt the paragraph with {choices}, or the line where {question} is in that too; of an answer all but {answer}.
    """
    choices = row.get('choices') or []
    if not choices:
        parts = [part for part in template.split('\n\n') if '{choices}' not in part or '{question}' in part]
        template = '\n'.join(line for line in '\n\n'.join(parts).split('\n') if '{choices}' not in line)
        template = '{answer}' if '{letter}' in template or '{choice}' in template else template
    fields = dict(question=row['question'], answer=row.get('answer', ''), explanation=row.get('explanation', ''),
                  choices='\n'.join(f'{letter}. {choice}' for letter, choice in zip(LETTERS, choices)))
    if choices and row.get('correct_choice_idx') is not None:
        right = row['correct_choice_idx']
        fields.update(letter=LETTERS[right], choice=choices[right])
    try:
        text = template.format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f'the template {template!r} cannot be filled ({type(error).__name__} {error}): it may use '
                         f'{", ".join("{" + f + "}" for f in fields)}') from None
    return text if row.get('image') else text.replace('<image>\n', '').replace('<image>', '')


def build_text(row, stage, mode='coconut', c_thought=2, max_latent_stage=4, pad_latent_to_max=True, prompt=PROMPT,
               answer=ANSWER, template='plain', visual_bridge=False):
    """
    One row at one stage: (prompt, number of thoughts, target). Stage k hides the first k steps behind k * c_thought
    thoughts (fewer where a row has fewer steps, unless pad_latent_to_max); a stage beyond max_latent_stage hides all
    steps. Stage 0 has no thoughts and no markers. Training, evaluation and sample.py all come through here.
    """
    if mode not in MODES or template not in ('plain', 'chatml'):
        raise ValueError(f'mode={mode!r}, template={template!r}: expected one of {", ".join(MODES)}; plain or chatml')
    stage, steps = 0 if mode == 'cot' else stage, row.get('steps')
    hidden = len(steps or ()) if mode == 'no_cot' or stage > max_latent_stage else stage
    thoughts = 0 if mode in ('no_cot', 'no_thoughts') else min(stage, max_latent_stage)
    if not pad_latent_to_max and steps is not None:
        thoughts = min(thoughts, len(steps))
    lines = list((steps or ())[hidden:])
    bridge = ''
    if visual_bridge and row.get('image'):
        bridge = 'Analyzing the visual information:\n' if stage else ''
        if lines and not stage:
            lines[0] = 'Looking at the image, ' + lines[0]
        elif lines and not SEEING.search(lines[0]):
            lines[0] = 'From what I can see, ' + lines[0]
    text = fill(prompt, row)
    if template == 'chatml':
        turns = f'<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{text.rstrip()}<|im_end|>\n'
        text = turns + '<|im_start|>assistant\n'
    target = '\n'.join([*lines, fill(answer, row)]) if 'answer' in row else None
    return text + bridge, thoughts * c_thought, target


def encode(row, tokenizer, stage, tiles=None, supervised=True, max_length=2560, num_image_tokens=256, **text):
    """
    One row's model inputs: {input_ids: list, labels: list or None, pixel_values: uint8 [P, 3, S, S] or None}.

    tiles             uint8 [P, 3, S, S], the row's image as `tile_image` gives it; None for a row without an image
    supervised        False leaves out steps and answer, for generation: labels is None
    num_image_tokens  N, visual tokens a tile
    text              knobs of `build_text`
    Raises ValueError where the row does not fit max_length or its visual tokens are not N a tile.
    """
    prompt, thoughts, target = build_text(row, stage, **text)
    name, visual = row.get('question_id', '?'), 0 if tiles is None else len(tiles) * num_image_tokens
    prompt = prompt.replace('<image>', IMG + IMG_CONTEXT * visual + END_IMG)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    image_token, latent = tokenizer.convert_tokens_to_ids([IMG_CONTEXT, LATENT])
    if ids.count(image_token) != visual:
        raise ValueError(f'row {name} holds {ids.count(image_token)} {IMG_CONTEXT} tokens, but its '
                         f'{visual // num_image_tokens} tiles give {visual}: the prompt needs one <image> an image')
    if ids.count(latent):
        raise ValueError(f'row {name} holds {LATENT} in its own text: remove it from the question and choices')
    if thoughts:
        start, end = tokenizer.convert_tokens_to_ids([START_LATENT, END_LATENT])
        ids = [*ids, start, *[latent] * thoughts, end]
    labels = None
    if supervised:
        if target is None:
            raise ValueError(f'row {name} has no answer: it can be asked, not trained on')
        goal = [*tokenizer.encode(target, add_special_tokens=False), tokenizer.eos_token_id]
        ids, labels = ids + goal, [-100] * len(ids) + goal
    if len(ids) > max_length:
        raise ValueError(f'row {name} needs {len(ids)} tokens ({visual} visual, {thoughts} thoughts), max_length is '
                         f'{max_length}')
    return dict(input_ids=ids, labels=labels, pixel_values=tiles)


def collate(rows):
    """What `encode` gave, as the keyword arguments of the model's forward; padded on the right."""
    lengths = torch.tensor([len(r['input_ids']) for r in rows])
    T = int(lengths.max())
    pad = lambda key, value: torch.tensor([r[key] + [value] * (T - len(r[key])) for r in rows])
    tiles = [r['pixel_values'] for r in rows if r['pixel_values'] is not None]
    batch = dict(input_ids=pad('input_ids', 0), pixel_values=torch.cat(tiles) if tiles else None,
                 attention_mask=(torch.arange(T) < lengths[:, None]).long(),
                 num_tiles=torch.tensor([0 if r['pixel_values'] is None else len(r['pixel_values']) for r in rows]))
    if rows[0]['labels'] is not None:
        batch['labels'] = pad('labels', -100)
    return batch


def supervised(batch):
    """The number of tokens that a batch's loss is the mean over."""
    return int((batch['labels'][:, 1:] != -100).sum())


def micro_batches(batch, rows):
    """A batch cut into parts of so many rows, each with its own tiles."""
    if len(batch['input_ids']) <= rows:
        return [batch]
    batch, pixels = dict(batch), batch['pixel_values']
    del batch['pixel_values']
    parts = [dict(zip(batch, values)) for values in zip(*(v.split(rows) for v in batch.values()))]
    tiles = [None] * len(parts) if pixels is None else pixels.split([int(part['num_tiles'].sum()) for part in parts])
    return [dict(part, pixel_values=t) for part, t in zip(parts, tiles)]


def batches(rows, groups, num_workers=0, pin_memory=False):
    """
    Batches of `rows`, a data set, in host memory; `groups` is a list of lists of row numbers: workers decide nothing
    but time.
    """
    loader = torch.utils.data.DataLoader(
        rows, batch_sampler=groups, collate_fn=collate, num_workers=num_workers, pin_memory=pin_memory,
        generator=torch.Generator(), worker_init_fn=leave_signals_to_the_parent)
    try:
        yield from loader
    except (ValueError, OSError) as error:  # a worker's error holds its traceback: the last line says it
        raise ValueError(str(error).strip().splitlines()[-1]) from None


def leave_signals_to_the_parent(worker):
    """Ctrl-C, or a cluster, signals every process; the parent needs its workers until it has saved."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def extract_choice(text, choices):
    """
    (index of the chosen option, whether it could be read): the letter after 'answer is' or 'Answer:', else a letter
    that ends the text, else the option named last, else (0, False).
    """
    letters = LETTERS[:len(choices)]
    for pattern in (rf'(?i:answer is|answer:)\W*([{letters}])\b', rf'(?:^|\s)\(?([{letters}])[).]*\s*$'):
        if found := re.findall(pattern, text):
            return letters.index(found[-1]), True
    ends = lambda c: (m.end() for m in re.finditer(rf'(?<!\w){re.escape(c)}(?!\w)', text, re.I))
    last = [max(ends(c), default=-1) for c in choices]
    best = max(range(len(choices)), key=lambda i: (last[i], len(choices[i])))
    return (best, True) if last[best] >= 0 else (0, False)


class Rows(torch.utils.data.Dataset):
    """
    A prepared split at one stage, encoded row by row. Which row is drawn to which earlier stage depends on seed,
    epoch and row alone, not on workers or order.
    """

    def __init__(self, rows, split, stage, tokenizer, data_dir='.', image_size=448, max_tiles=8, cache_tiles=True,
                 max_length=2560, num_image_tokens=256, supervised=True, uniform_prob=0.0, seed=0, epoch=0, **text):
        self.rows, self.stage, self.tokenizer, self.text = rows, stage, tokenizer, text
        self.tiles = dict(folder=data_dir, split=split, size=image_size, max_tiles=max_tiles, cache=cache_tiles)
        self.shape = dict(max_length=max_length, num_image_tokens=num_image_tokens, supervised=supervised)
        self.uniform_prob, self.seed, self.epoch = uniform_prob, seed, epoch

    def __len__(self):
        return len(self.rows)

    def stage_of(self, i):
        draw = random.Random(f'{self.seed} {self.epoch} {self.rows[i].get("question_id", i)}')
        mixed = self.stage > 0 and draw.random() < self.uniform_prob  # stage 0 never holds a thought
        return draw.randrange(self.stage) if mixed else self.stage

    def __getitem__(self, i):
        tiles = load_tiles(self.rows[i], **self.tiles)
        return encode(self.rows[i], self.tokenizer, self.stage_of(i), tiles, **self.shape, **self.text)

    def length(self, i, stage=None, count=None):
        """Tokens of row i at a stage, without a look at its image; `count` counts those of a text."""
        row, count = self.rows[i], count or (lambda text: len(self.tokenizer.encode(text, add_special_tokens=False)))
        prompt, thoughts, target = build_text(row, self.stage if stage is None else stage, **self.text)
        visual = 0
        if row.get('image'):
            tiles = count_tiles(*row['image_size'], self.tiles['size'], max_tiles=self.tiles['max_tiles'])
            visual = tiles * self.shape['num_image_tokens'] + 2
        markers, end = 2 * bool(thoughts), 1
        return visual + count(prompt.replace('<image>', '')) + thoughts + markers + count(target or '') + end

    def fits(self, i):
        """
        Whether row i fits max_length at each stage it may be drawn to. A token has a byte at least, so few rows are
        tokenized.
        """
        most, stages = self.shape['max_length'], range(self.stage + 1) if self.uniform_prob else [self.stage]
        in_bytes = lambda text: len(text.encode())
        return all(self.length(i, s, in_bytes) <= most or self.length(i, s) <= most for s in stages)


# --- images -----------------------------------------------------------------------------------------------------------
TILING_VERSION = 1  # part of the cache's hash: raise it when tile_image gives other pixels


def load_image(file):
    """
    RGB image from a path or bytes, upright, 16-bit greys scaled to 8. ValueError in one sentence where it is none.
    """
    name = file if isinstance(file, str) else 'image'
    if isinstance(file, str) and not os.path.isfile(file):
        raise FileNotFoundError(f'no image file {file}')
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith('I') or image.mode == 'F':  # convert('RGB') would clip these at 255
            grey = np.asarray(image, dtype=np.float64)
            white = max(grey.max(), 255 if image.mode == 'F' else 65535)
            image = Image.fromarray((grey / white * 255).clip(0, 255).astype(np.uint8))
        return image.convert('RGB')
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, on broken files
        raise ValueError(f'{name} cannot be read as an image: {str(error).split(" <_io")[0]}') from None


def tile_grid(width, height, size=448, min_tiles=1, max_tiles=8):
    """
    (columns, rows) of tiles for an image: the grid of the nearest aspect ratio; on a tie the larger one, if it is
    filled half.
    """
    sides = range(1, max_tiles + 1)
    grids = [(i, j) for i in sides for j in sides if min_tiles <= i * j <= max_tiles]
    grids.sort(key=lambda g: g[0] * g[1])
    best, least = (1, 1), float('inf')
    for i, j in grids:
        difference = abs(width / height - i / j)
        if difference < least or (difference == least and width * height > 0.5 * size * size * i * j):
            best, least = (i, j), difference
    return best


def count_tiles(width, height, size=448, min_tiles=1, max_tiles=8, thumbnail=True):
    i, j = tile_grid(width, height, size, min_tiles, max_tiles)
    return i * j + (thumbnail and i * j > 1)


def tile_image(image, size=448, min_tiles=1, max_tiles=8, thumbnail=True):
    """
    PIL image to uint8 [P, 3, size, size]: the grid's tiles row by row and, if there are several, a thumbnail last.
    """
    i, j = tile_grid(*image.size, size, min_tiles, max_tiles)
    image = image.convert('RGB')
    whole = image.resize((size * i, size * j), Image.Resampling.BICUBIC)
    tiles = [whole.crop((x * size, y * size, (x + 1) * size, (y + 1) * size)) for y in range(j) for x in range(i)]
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2).contiguous()


def load_tiles(row, folder, split, size=448, max_tiles=8, cache=True):
    """A prepared row's tiles, from the cache, else from its image and into the cache; None without an image."""
    if not row.get('image'):
        return None
    key = repr((size, 1, max_tiles, True, TILING_VERSION, row['image_hash']))
    stem = os.path.splitext(os.path.basename(row['image']))[0]
    path = os.path.join(folder, 'cache', 'tiles', split, f'{stem}_{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy')
    if cache and os.path.isfile(path):
        return torch.from_numpy(np.load(path))
    tiles = tile_image(load_image(os.path.join(folder, row['image'])), size, 1, max_tiles)
    if cache:
        with replacing(path) as part, open(part, 'wb') as f:
            np.save(f, tiles.numpy())
    return tiles


# --- rows of a data set -----------------------------------------------------------------------------------------------
def split_file(folder, split):
    return os.path.join(folder, f'{split}.jsonl')


def read_split(folder, split):
    """The rows of a prepared split."""
    path = split_file(folder, split)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no prepared data at {path}: run prepare.py with the same config first')
    with open(path, encoding='utf-8') as f:
        rows = [json.loads(line) for line in f]
    if not rows:
        raise ValueError(f'{path} holds no rows: prepare another data set')
    return rows


def fitting_rows(split, stage, rows=None, **knobs):
    """The rows of a split, or these, that fit max_length at this stage; the others are counted. knobs: of Rows."""
    asked = Rows(read_split(knobs['data_dir'], split) if rows is None else rows, split, stage, **knobs)
    kept, limit = [row for i, row in enumerate(asked.rows) if asked.fits(i)], f'max_length={knobs["max_length"]}'
    if len(kept) < len(asked):
        print(f'stage {stage}: {len(asked) - len(kept)} of {len(asked)} {split} rows need more than {limit}: dropped')
    if not kept:
        raise ValueError(f'no {split} row fits {limit} at stage {stage}: raise it, or lower max_tiles')
    return kept


def digest(folder, *splits):
    """Tells whether two runs saw the same rows."""
    return hashlib.sha256(b''.join(open(split_file(folder, split), 'rb').read() for split in splits)).hexdigest()


def cut_steps(rationale, spans):
    """A rationale as steps: its sentences; a single sentence as up to `spans` nearly equal spans of words."""
    sentences = [s.strip() for s in re.split(r'(?<=[.!?])\s+', rationale.strip()) if s.strip()]
    if len(sentences) != 1:
        return sentences
    words = sentences[0].split()
    return [' '.join(part) for part in np.array_split(words, min(spans, len(words)))]


def build_row(raw, split, steps_from='first', max_latent_stage=4):
    """A raw row to (prepared row, None), or to (None, the reason it is dropped)."""
    if not isinstance(raw['question'], str):
        return None, 'without a question'
    row = dict(question_id=str(raw.get('question_id', raw.get('idx', ''))), question=raw['question'].strip())
    if 'choices' not in raw:  # Coconut's format
        row.update({key: list(raw[key]) for key in ('steps', 'results') if key in raw}, answer=raw['answer'].strip())
        return row, None
    row['choices'], right = [str(c).strip() for c in raw['choices']], raw['correct_choice_idx']
    if len(row['choices']) != 4:
        return None, 'without exactly four options'
    if right is None and split == 'test':
        return row, None
    if right is None or not 0 <= right < 4:
        return None, 'without a valid correct_choice_idx'
    rationales = [r.strip() for r in raw['rationales'] or () if r and r.strip()]
    if not rationales and split == 'train':
        return None, 'without a rationale'
    steps = rationales if steps_from == 'all' else cut_steps(rationales[0], max_latent_stage) if rationales else []
    explanation = re.split(r'(?<=[.!?])\s+', rationales[0])[0] if rationales else ''
    return dict(row, correct_choice_idx=right, steps=steps, answer=row['choices'][right], explanation=explanation), None


def read_raw(dataset, data_dir):
    """split -> sequence of raw rows, of a JSON file, a folder of parquet files or a hub id. Images stay bytes."""
    if dataset.endswith('.json'):
        splits = {'train': dataset}
        for split, word in (('validation', 'valid'), ('test', 'test')):
            folder, name = os.path.split(dataset)
            other = os.path.join(folder, name.replace('train', word))
            if other != dataset and os.path.isfile(other):
                splits[split] = other
        rows = {split: read_coconut(path) for split, path in splits.items()}
        if 'validation' not in rows:
            held = max(1, len(rows['train']) // 20)
            print(f'no validation file beside {dataset}: the last {held} rows are held out')
            rows['train'], rows['validation'] = rows['train'][:-held], rows['train'][-held:]
        return rows
    import datasets
    datasets.disable_progress_bars()
    where = dict(path=dataset)
    if os.path.isdir(dataset):
        found = sorted(glob.glob(os.path.join(glob.escape(dataset), '**', '*.parquet'), recursive=True))
        files = {s: [f for f in found if s in os.path.basename(f)] for s in ('train', 'validation', 'test')}
        files = {s: f for s, f in files.items() if f}
        if not files:
            raise ValueError(f'{dataset} holds no train*.parquet, validation*.parquet or test*.parquet file')
        where = dict(path='parquet', data_files=files, cache_dir=os.path.join(data_dir, 'cache', 'arrow'))
    try:
        loaded = datasets.load_dataset(**where)
    except Exception as error:  # hub and file readers raise many kinds; each means the data set cannot be had
        raise OSError(f'the data set {dataset} could not be had ({type(error).__name__}): give a local folder of its '
                      'whole parquet files with --dataset=FOLDER, or draw the built-in one with config/toy.py'
                      ) from None
    columns = next(iter(loaded.values())).column_names
    lacking = {'image', 'question', 'choices', 'correct_choice_idx', 'rationales'} - set(columns)
    if lacking:
        raise ValueError(f'{dataset} lacks the columns {", ".join(sorted(lacking))} of A-OKVQA\'s schema')
    return {split: loaded[split].cast_column('image', datasets.Image(decode=False)) for split in loaded}


def read_coconut(path):
    try:
        with open(path, encoding='utf-8') as f:
            rows = json.load(f)
        assert isinstance(rows, list) and all({'question', 'steps', 'answer'} <= row.keys() for row in rows)
    except FileNotFoundError:
        raise FileNotFoundError(f'no data file {path}') from None
    except (AssertionError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f'{path} is not a JSON list of rows with question, steps and answer {error}'.strip()) from None
    return [dict(row, question_id=str(i)) for i, row in enumerate(rows)]


def prepare_split(raw, split, folder, steps_from, max_latent_stage, image_size, max_tiles, cache_tiles):
    """Filters, writes images, tiles and {split}.jsonl; gives the rows. Says what it dropped and why."""
    rows, dropped, need = [], defaultdict(list), 0
    for i, fields in enumerate(tqdm(raw, desc=f'{split}: reading', disable=None)):
        row, reason = build_row(fields, split, steps_from, max_latent_stage)
        if row is None:
            dropped[reason].append(str(fields.get('question_id', i)))
            continue
        row['question_id'] = row['question_id'] or str(i)
        if fields.get('image'):
            data = fields['image']['bytes']
            try:
                with Image.open(io.BytesIO(data)) as image:
                    kind, size = image.format.lower(), image.size
            except (OSError, ValueError) as error:
                dropped['with an unreadable image'].append(f'{row["question_id"]} ({error})')
                continue
            stem = re.sub(r'\W', '_', row['question_id']) or str(i)
            row.update(image=f'images/{split}/{stem}.{kind}', image_size=size,
                       image_hash=hashlib.sha256(data).hexdigest()[:16])
            tiles = count_tiles(*size, image_size, max_tiles=max_tiles)
            need += len(data) + cache_tiles * (128 + 3 * image_size ** 2 * tiles)
        rows.append((i, row))
    name, count = Counter(row['question_id'] for _, row in rows).most_common(1)[0] if rows else ('', 0)
    if count > 1:
        raise ValueError(f'{split} holds {count} rows with question_id {name}: every row needs one of its own')
    free = shutil.disk_usage(folder).free
    if need:
        print(f'{split}: images and tiles take up to {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free')
    if need > free:
        raise OSError(f'{split} needs {need / 1e9:.2f} GB in {folder}, {free / 1e9:.2f} GB are free: choose another '
                      '--data_dir, or --cache_tiles=False, which tiles while training')
    kept = []
    for i, row in tqdm(rows, desc=f'{split}: images and tiles', disable=None):
        if row.get('image'):
            path, data = os.path.join(folder, row['image']), raw[i]['image']['bytes']
            try:
                load_image(data) if not cache_tiles else None
                if not os.path.isfile(path) or os.path.getsize(path) != len(data) or open(path, 'rb').read() != data:
                    with replacing(path) as part, open(part, 'wb') as f:
                        f.write(data)
                load_tiles(row, folder, split, image_size, max_tiles, cache_tiles)
            except ValueError as error:
                dropped['with an unreadable image'].append(f'{row["question_id"]} ({error})')
                continue
        kept.append(row)
    for reason, names in dropped.items():
        print(f'{split}: dropped {len(names)} rows {reason}: {", ".join(names[:3])}{", ..." if len(names) > 3 else ""}')
    if not kept:
        raise ValueError(f'{split} holds no usable row of {len(raw)}: see the reasons above, and give another '
                         '--dataset')
    with replacing(split_file(folder, split)) as part, open(part, 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in kept)
    print(f'{split}: {len(kept)} rows of {len(raw)}')
    return kept


if __name__ == '__main__':
    globals().update(configure(globals()))
    if init_from != 'scratch' and not init_from.endswith('.pt'):
        fetch(init_from)  # into the hub's cache now, so that training needs no network
    os.makedirs(data_dir, exist_ok=True)
    source = dataset
    if dataset in ('toy', 'prosqa'):
        import toy
        source, counts = os.path.join(data_dir, 'drawn'), dict(train=train_rows, validation=val_rows, test=test_rows)
        if dataset == 'toy':
            toy.draw(source, counts, seed, hops)
        else:
            source = toy.draw_graphs(source, counts, seed, nodes)
    how = data_dir, steps_from, max_latent_stage, image_size, max_tiles, cache_tiles
    prepared = {split: prepare_split(raw, split, *how) for split, raw in read_raw(source, data_dir).items()}
    if init_from == 'scratch':
        texts = ((fill(prompt, row), '\n'.join(row['steps']), fill(answer, row)) for row in prepared['train'])
        train_tokenizer((text for row in texts for text in row), os.path.join(data_dir, 'tokenizer'))
    print(f'prepared {data_dir}')
