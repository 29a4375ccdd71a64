"""
From a data set to a batch. As a command it prepares a folder; as a module it turns a row of that
folder into model inputs.

    python prepare.py                                  A-OKVQA from the hub
    python prepare.py --dataset=FOLDER                 its parquet files: train*, validation*, test*
    python prepare.py --train_file=my_train.jsonl --val_file=my_val.jsonl --data_dir=data/mine
    python prepare.py config/toy.py                    the built-in data set, drawn here

Rows of one's own stand in .jsonl, .json or .parquet files and have the columns of SCHEMA below;
Coconut's own files are such rows. Rows without a question, an answer or, where there is a column of
images, an image are dropped and counted. A prepared folder holds {split}.jsonl, images/{split}/,
cache/ and, with init_from='scratch', tokenizer/.
"""
import glob
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import struct
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from configurator import configure
from model import END_IMG, END_LATENT, IMG, IMG_CONTEXT, LATENT, SPECIAL_TOKENS, START_LATENT, fetch

os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')  # else it warns in each forked worker

# --- knobs of the command -------------------------------------------------------------------------
# dataset: a hub id, a folder of parquet files, or what experiments/toy.py draws: 'toy', 'words'
# (its chain in words), 'prosqa' (graphs), 'prosqa_full' (of the published size)
dataset = 'HuggingFaceM4/A-OKVQA'
train_file = ''                    # rows of one's own, instead of dataset
val_file = ''
test_file = ''
data_dir = 'data/aokvqa'           # the prepared folder
init_from = 'OpenGVLab/InternVL3-1B-Pretrained'  # or a .pt; or 'scratch': a tokenizer is trained
steps_from = 'first'               # 'first' rationale, cut into steps; 'all': each is a step
max_latent_stage = 4               # one sentence alone is cut into so many spans of words
image_size = 448                   # side of a tile in pixels
max_tiles = 8                      # without the thumbnail
cache_tiles = True                 # tiles as uint8 on disk; False cuts them while training
train_rows = 8192                  # rows of each split; these and the rest: of what is drawn
val_rows = 500
test_rows = 500
hops = 4                           # doors to follow in 'toy' and 'words'
nodes = 23                         # of a graph in 'prosqa'
seed = 1337
# --- how a row becomes text, as in train.py; here used only to train a tokenizer from scratch
PROMPT = ('<image>\nQuestion: {question}\n\nChoices:\n{choices}\n\n'
          'Let me think step by step:\n')
ANSWER = 'The answer is {letter}. {choice}'  # also {answer}
prompt = PROMPT
answer = ANSWER

# --- text -----------------------------------------------------------------------------------------
LETTERS = 'ABCDEFGH'
# InternVL's own system prompt
SYSTEM = ('你是书生·万象，英文名是InternVL，是由上海人工智能实验室、'
          '清华大学及多家合作单位联合开发的多模态大语言模型。')
SEEING = re.compile(r'\b(see[ns]?|looks?|looking|visible|image|picture|photo|show[ns])\b', re.I)


def fill(template, row):
    """A prompt or answer template with the row's fields. Without choices, the line {choices} and a
    heading 'Choices:' are left out, and an answer template that asks for {letter} or {choice}
    becomes '{answer}'. Without an image, <image> is left out."""
    choices, right = row.get('choices') or [], row.get('correct_choice_idx')
    assert len(choices) <= len(LETTERS), f'{len(choices)} choices, at most {len(LETTERS)} are asked'
    fields = dict(question=row['question'], answer=row.get('answer', ''),
                  choices='\n'.join(f'{a}. {c.strip()}' for a, c in zip(LETTERS, choices)))
    if choices and right is not None:
        fields.update(letter=LETTERS[right], choice=choices[right].strip())
    if not choices:
        asks_for_one = '{letter}' in template or '{choice}' in template
        template = '{answer}' if asks_for_one else re.sub(
            r'(Choices:\n)?\{choices\}\n*', '', template)
    if not row.get('image'):
        template = re.sub(r'<image>\n?', '', template)
    return template.format(**fields)


def build_text(row, stage, mode='coconut', c_thought=2, max_latent_stage=4, pad_latent_to_max=True,
               prompt=PROMPT, answer=ANSWER, template='plain', visual_bridge=False,
               num_thoughts=None):
    """One row at one stage: (prompt, number of thoughts, target or None without an answer). All of
    training, evaluation and sample.py comes through here.

        mode          steps hidden            thoughts
        coconut       the first `stage`       c_thought * stage
        pause         the first `stage`       c_thought * stage, but nothing is fed back
        no_thoughts   the first `stage`       0
        cot           none                    0
        no_cot        all                     0

    A stage beyond max_latent_stage hides all steps behind the thoughts of max_latent_stage. Without
    pad_latent_to_max a row with fewer steps has c_thought thoughts a step, in evaluation too, as in
    Coconut. num_thoughts, if given, is the number of thoughts. template: the turns around the
    prompt, 'plain', 'chatml', or what frame_of made of 'chat'. visual_bridge says in words that the
    image is looked at: in stage 0 before the first step, later before the thoughts and, unless it
    speaks of seeing, before the first written step."""
    assert mode in ('coconut', 'cot', 'no_cot', 'pause', 'no_thoughts'), mode
    assert template in ('plain', 'chatml') or '{prompt}' in template, template
    steps = list(row.get('steps') or ())
    stage = 0 if mode == 'cot' else stage
    thought_steps = min(stage, max_latent_stage)  # steps that thoughts stand for
    if steps and not pad_latent_to_max:
        thought_steps = min(thought_steps, len(steps))
    lines = [] if mode == 'no_cot' or stage > max_latent_stage else steps[stage:]
    thoughts = thought_steps * c_thought if mode in ('coconut', 'pause') else 0
    text = fill(prompt, row)
    if template == 'chatml':
        text = (f'<|im_start|>system\n{SYSTEM}<|im_end|>\n'
                f'<|im_start|>user\n{text.rstrip()}<|im_end|>\n<|im_start|>assistant\n')
    elif template != 'plain':
        text = template.replace('{prompt}', text.rstrip())
    if visual_bridge and row.get('image'):
        text += 'Analyzing the visual information:\n' if stage else ''
        if lines and not (stage and SEEING.search(lines[0])):
            lines[0] = ('From what I can see, ' if stage else 'Looking at the image, ') + lines[0]
    target = '\n'.join([*lines, fill(answer, row)]) if 'answer' in row else None
    return text, thoughts if num_thoughts is None else num_thoughts, target


def frame_of(template, tokenizer):
    """`template` for `build_text`: 'chat' becomes the tokenizer's own turns around {prompt}."""
    if template != 'chat':
        return template
    turns = [dict(role='user', content='{prompt}')]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def encode(row, tokenizer, stage, tiles=None, supervised=True, max_length=2560,
           num_image_tokens=256, **text):
    """One row's model inputs: {input_ids: list, labels: list or None, pixel_values: tiles}.

    tiles             uint8 [P, 3, S, S], the row's image as `tile_image` gives it, or None
    supervised        False leaves out steps and answer, for generation: labels is None
    num_image_tokens  N, visual tokens a tile
    text              knobs of `build_text`"""
    prompt, thoughts, target = build_text(row, stage, **text)
    name, visual = row.get('question_id'), 0 if tiles is None else len(tiles) * num_image_tokens
    img, context, end_img, start, latent, end = tokenizer.convert_tokens_to_ids(
        [IMG, IMG_CONTEXT, END_IMG, START_LATENT, LATENT, END_LATENT])
    ids = tokenizer.encode('')  # a begin token, with a tokenizer that has one before every text
    ids = [] if prompt.startswith(tokenizer.decode(ids)) else ids  # chat turns may hold it already
    parts = [tokenizer.encode(part, add_special_tokens=False) for part in prompt.split('<image>')]
    assert len(parts) == 1 + (tiles is not None), f'row {name}: expected one <image> in its prompt'
    ids = ids + parts[0]
    if tiles is not None:
        ids = [*ids, img, *[context] * visual, end_img, *parts[1]]
    assert ids.count(context) == visual and latent not in ids, f'row {name} holds {LATENT} or such'
    labels = None
    if thoughts:
        ids = [*ids, start, *[latent] * thoughts, end]
    if supervised:
        goal = tokenizer.encode(target, add_special_tokens=False) + [tokenizer.eos_token_id]
        labels = [-100] * len(ids) + goal
        ids = ids + goal
    assert len(ids) <= max_length, f'row {name} needs {len(ids)} tokens, max_length is {max_length}'
    return dict(input_ids=ids, labels=labels, pixel_values=tiles)


def collate(rows):
    """What `encode` gave, as the keyword arguments of the model's forward; padded on the right."""
    def pad(lists, filler):
        values = [torch.tensor(one, dtype=torch.long) for one in lists]
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filler)

    counts = [0 if row['pixel_values'] is None else len(row['pixel_values']) for row in rows]
    tiles = [row['pixel_values'] for row in rows if row['pixel_values'] is not None]
    batch = dict(num_tiles=torch.tensor(counts), pixel_values=torch.cat(tiles) if tiles else None)
    batch['attention_mask'] = pad([[1] * len(row['input_ids']) for row in rows], 0)
    for key, filler in (('input_ids', 0), ('labels', -100)):
        if rows[0][key] is not None:
            batch[key] = pad([row[key] for row in rows], filler)
    return batch


def count_supervised(batch):
    """The number of tokens that a batch's loss is the mean over."""
    return int((batch['labels'][:, 1:] != -100).sum())  # nothing predicts the first


def micro_batches(batch, size):
    """A batch cut into parts of `size` rows, each with its own tiles."""
    cut = {key: value.split(size) for key, value in batch.items() if key != 'pixel_values'}
    tiles = [None] * len(cut['num_tiles'])
    if batch['pixel_values'] is not None:
        tiles = batch['pixel_values'].split([int(one.sum()) for one in cut['num_tiles']])
    return [dict(zip((*cut, 'pixel_values'), part)) for part in zip(*cut.values(), tiles)]


def batches(dataset, groups, num_workers=0, pin_memory=False):
    """Batches of a data set, in host memory, of each list of row numbers in `groups`."""
    # forked: train.py, a plain script, would run again in a process that imports it
    num_workers = num_workers if sys.platform == 'linux' else 0
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=groups, collate_fn=collate, num_workers=num_workers,
        multiprocessing_context='fork' if num_workers else None, pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_parent,
        generator=torch.Generator())  # the global one stays as it is, workers or not


def leave_signals_to_the_parent(worker):
    """Ctrl-C, or a cluster, signals every process; the parent needs its workers until it saved."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def end_workers():
    for worker in torch.multiprocessing.active_children():
        worker.kill()


# --- files and images -----------------------------------------------------------------------------
def write_file(path, content):
    """Writes bytes under a temporary name, which then becomes path: it is never half there."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f'{path}.{os.getpid()}.part'  # of each worker its own
    Path(part).write_bytes(content)
    os.replace(part, path)


def load_image(file):
    """RGB image from a path or bytes, as a viewer shows it: upright, the first of several frames,
    what is transparent over white. Greys of more than 8 bits, which Pillow would clip, raise."""
    image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in 'IF':
        raise ValueError(f'pixels of mode {image.mode}: expected 8 bits')
    if image.has_transparency_data:
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image.convert('RGBA'))
    return image.convert('RGB')


def tile_grid(width, height, size=448, max_tiles=8):
    """(columns, rows) of tiles: the nearest aspect ratio; on a tie the larger, if filled half."""
    sides = range(1, max_tiles + 1)
    grids = sorted(((i, j) for i in sides for j in sides if i * j <= max_tiles), key=math.prod)
    best, least = (1, 1), float('inf')
    for i, j in grids:
        difference = abs(width / height - i / j)
        filled = width * height > 0.5 * size * size * i * j
        if difference < least or (difference == least and filled):
            best, least = (i, j), difference
    return best


def count_tiles(width, height, size=448, max_tiles=8):
    """P, the number of tiles that `tile_image` cuts."""
    count = math.prod(tile_grid(width, height, size, max_tiles))
    return count + (count > 1)


def tile_image(image, size=448, max_tiles=8):
    """RGB image to uint8 [P, 3, size, size]: the grid's tiles row by row and, if there are several,
    a thumbnail last."""
    i, j = tile_grid(*image.size, size, max_tiles)
    whole = image.resize((size * i, size * j), Image.Resampling.BICUBIC)
    tiles = [whole.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
             for y in range(j) for x in range(i)]
    if len(tiles) > 1:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    pixels = np.stack([np.asarray(tile) for tile in tiles])                     # [P, size, size, 3]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def load_tiles(row, folder, split, size=448, max_tiles=8, cache=True):
    """A row's tiles uint8 [P, 3, size, size], from the cache, else cut and then cached; None
    without an image. Remove cache/ where tile_image or load_image are changed."""
    if not row.get('image'):
        return None
    picture = os.path.join(folder, row['image'])
    if not cache:
        return tile_image(load_image(picture), size, max_tiles)
    path = f'{folder}/cache/tiles/{split}/{row["image_hash"]}_{size}_{max_tiles}.npy'
    if not os.path.isfile(path):
        content = io.BytesIO()
        np.save(content, tile_image(load_image(picture), size, max_tiles).numpy())
        write_file(path, content.getvalue())
    return torch.from_numpy(np.load(path))


# --- rows of a prepared data set ------------------------------------------------------------------
class Rows(torch.utils.data.Dataset):
    """A prepared split at one stage, encoded row by row; with probability uniform_prob a row is at
    an earlier one, each as likely. That depends on seed, epoch and row alone."""

    def __init__(self, rows, split, stage, tokenizer, data_dir='.', image_size=448, max_tiles=8,
                 cache_tiles=True, max_length=2560, num_image_tokens=256, supervised=True,
                 uniform_prob=0.0, seed=0, epoch=0, **text):
        self.rows, self.stage, self.tokenizer, self.text_knobs = rows, stage, tokenizer, text
        self.tile_knobs = dict(folder=data_dir, split=split, size=image_size, max_tiles=max_tiles,
                               cache=cache_tiles)
        self.encode_knobs = dict(max_length=max_length, num_image_tokens=num_image_tokens,
                                 supervised=supervised)
        self.uniform_prob, self.seed, self.epoch = uniform_prob, seed, epoch

    def __len__(self):
        return len(self.rows)

    def stage_of(self, i):
        rng = random.Random(f'{self.seed} {self.epoch} {self.rows[i].get("question_id", i)}')
        mixed = self.stage > 0 and rng.random() < self.uniform_prob  # 0 has no earlier one
        return rng.randrange(self.stage) if mixed else self.stage

    def __getitem__(self, i):
        tiles = load_tiles(self.rows[i], **self.tile_knobs)
        return encode(self.rows[i], self.tokenizer, self.stage_of(i), tiles, **self.encode_knobs,
                      **self.text_knobs)

    def length(self, i, stage):
        """Tokens of row i at a stage, with its answer, without a look at its image."""
        row, tiles = self.rows[i], None
        if row.get('image'):
            width, height = row['image_size']
            tiles = range(count_tiles(width, height, self.tile_knobs['size'],
                                      self.tile_knobs['max_tiles']))  # only their number counts
        knobs = dict(self.encode_knobs, max_length=math.inf, supervised='answer' in row)
        encoded = encode(row, self.tokenizer, stage, tiles, **knobs, **self.text_knobs)
        return len(encoded['input_ids'])


def read_split(folder, split):
    with open(f'{folder}/{split}.jsonl', encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def fitting_rows(split, stage, rows=None, **knobs):
    """The rows of a split, or these, that fit max_length at this stage, and with uniform_prob at
    those before; the others are counted."""
    rows = read_split(knobs['data_dir'], split) if rows is None else rows
    asked = Rows(rows, split, stage, **knobs)
    stages, most = range(stage if not asked.uniform_prob else 0, stage + 1), knobs['max_length']
    kept = [row for i, row in enumerate(asked.rows)
            if all(asked.length(i, one) <= most for one in stages)]
    if len(kept) < len(asked):
        print(f'stage {stage}: {len(kept)} of {len(asked)} {split} rows fit max_length={most}')
    assert kept, f'no {split} row fits max_length={most} at stage {stage}'
    return kept


def row_knobs_of(knobs, tokenizer, config):
    """What `Rows` needs of a script's or a checkpoint's knobs."""
    names = ('data_dir', 'max_tiles', 'cache_tiles', 'max_length', 'seed', 'mode', 'c_thought',
             'max_latent_stage', 'pad_latent_to_max', 'prompt', 'answer', 'visual_bridge')
    return dict({name: knobs[name] for name in names}, tokenizer=tokenizer,
                template=frame_of(knobs['template'], tokenizer), image_size=config.image_size,
                num_image_tokens=config.num_image_tokens)


def digest(folder, *splits):
    """A hash by which two runs can tell whether they saw the same rows."""
    content = [Path(f'{folder}/{split}.jsonl').read_bytes() for split in splits]
    return hashlib.sha256(b''.join(content)).hexdigest()


# --- from a data set's rows to prepared ones ------------------------------------------------------
SPLITS = ('train', 'validation', 'test')
SCHEMA = dict(                           # column -> its arrow type; all but question are optional
    question='string',
    choices='list<item: string>',        # 2 to 8, for a multiple-choice question
    correct_choice_idx='int',            # of the right choice, from 0
    answer='string',                     # or the right choice's text; without choices free text
    steps='list<item: string>',          # the reasoning
    rationales='list<item: string>',     # or A-OKVQA's, of which steps_from makes steps
    image_path='string',                 # from the folder that the data file is in
    image='struct<bytes: binary, path: string>',  # or the file itself, as datasets' Image holds it
    question_id='string')                # without it the row's number
RESERVED = ('<image>', *SPECIAL_TOKENS, '<|im_start|>', '<|im_end|>', '<|endoftext|>')
# not behind St. Dr. U.S. or the 1. of a list
SENTENCE_END = re.compile(r'\n+|(?<=[.!?])(?<!\b[A-Z][a-z]\.)(?<!\b[A-Z0-9]\.)\s+')


class Dropped(Exception):
    pass  # for the reason that it names, worded to follow 'dropped 3 rows'


def load_rows(dataset, files, cache_dir):
    """split -> (rows with the columns of SCHEMA, folder that image_path starts from) of `files`
    (split -> path) alone if any is given, else of the parquet files of the folder `dataset`, else
    of the hub id. Raises ValueError where a column is of another type."""
    import datasets
    paths = {split: [path] for split, path in files.items() if path}
    if os.path.isdir(dataset) and not paths:
        every = sorted(glob.glob(f'{glob.escape(dataset)}/**/*.parquet', recursive=True))
        for split in SPLITS:
            paths[split] = [p for p in every if os.path.basename(p).startswith(split)]
        print('files not used:', sorted(set(every).difference(*paths.values())) or 'none')
    found = {split: datasets.load_dataset(
        'parquet' if names[0].endswith('.parquet') else 'json', split='train', cache_dir=cache_dir,
        data_files=[*map(glob.escape, names)]) for split, names in paths.items() if names}
    found = found if paths else dict(datasets.load_dataset(dataset))  # else from the hub
    for split, rows in found.items():
        types = {field.name: re.sub(r'large_|(?<=int)\d+', '', str(field.type))
                 for field in rows.features.arrow_schema}
        used = [column for column in SCHEMA if types.get(column, 'null') != 'null']
        for column in used:
            got, wanted = types[column], SCHEMA[column]
            if got not in (wanted, wanted.replace('string', 'null')):  # null: empty in every row
                raise ValueError(f'{split}: column {column} is {got}, expected {wanted}')
        for pair in ({'image', 'image_path'}, {'steps', 'rationales'}):
            assert not pair <= set(used), f'{split} has both of {pair}'
        print(f'{split}: columns {", ".join(used)}; not used: '
              f'{", ".join(types.keys() - used) or "none"}')
        rows = rows.select_columns(used)
        if 'image' in used:
            rows = rows.cast_column('image', datasets.Image(decode=False))
        found[split] = rows, os.path.dirname(paths[split][0]) if paths else ''
    return found


def cut_steps(text, spans):
    """A text as steps: its sentences; a single sentence as up to `spans` nearly equal spans of
    words."""
    found = [part for part in SENTENCE_END.split(text.strip()) if part]
    if len(found) != 1:
        return found
    words = text.split()
    return [' '.join(part) for part in np.array_split(words, min(spans, len(words)))]


def read_row(raw, split, steps_from='first', max_latent_stage=4):
    """A raw row's text as a prepared row has it. Raises Dropped."""
    answer, right = (raw.get('answer') or '').strip(), raw.get('correct_choice_idx')
    row = dict(question=(raw['question'] or '').strip())
    if raw.get('choices') is not None:
        row['choices'] = raw['choices']  # spaces stay: scorers compare the data set's own text
        texts = [(choice or '').strip() for choice in raw['choices']]
        if not 2 <= len(texts) <= len(LETTERS) or not all(texts):
            raise Dropped(f'without 2 to {len(LETTERS)} choices, none of them empty')
        if right is None and answer:
            right = texts.index(answer) if answer in texts else -1
        if right is not None:
            if not 0 <= right < len(texts) or answer not in ('', texts[right]):
                raise Dropped('whose answer is none of the choices, or not the right one')
            row['correct_choice_idx'], answer = right, texts[right]
    if not row['question'] or not answer and split != 'test':
        raise Dropped('without a question or an answer')
    if answer:
        rationales = [text for text in raw.get('rationales') or [] if text and text.strip()]
        steps = raw.get('steps') or ()
        if rationales:
            cut = cut_steps(rationales[0], max_latent_stage)
            steps = dict(first=cut, all=rationales)[steps_from]
        row['answer'] = answer
        # a step is a line; a row without an answer needs none
        row['steps'] = [' '.join(step.split()) for step in steps if step and step.strip()]
        row.update({key: raw[key] for key in ('results', 'edges') if key in raw})  # of drawn rows
        if split == 'train' and not row['steps'] and ('steps' in raw or 'rationales' in raw):
            raise Dropped('without steps, so that thoughts have nothing to stand for')
    if any(token in json.dumps(row, ensure_ascii=False) for token in RESERVED):
        raise Dropped('whose own text holds one of ' + ' '.join(RESERVED))
    return row


def prepare_split(raw, folder, split, data_dir, steps_from='first', max_latent_stage=4,
                  image_size=448, max_tiles=8, cache_tiles=True):
    """Prepared rows of raw ones, whose image paths start from `folder`; writes images and tiles."""
    rows, dropped, names = [], defaultdict(list), set()
    for i, raw_row in enumerate(tqdm(raw, desc=split, disable=None)):
        row = dict(question_id=raw_row.get('question_id') or str(i))
        assert row['question_id'] not in names, f'{split} has two rows {row["question_id"]}'
        names.add(row['question_id'])
        try:
            row.update(read_row(raw_row, split, steps_from, max_latent_stage))
            if 'image' in raw_row or 'image_path' in raw_row:  # there is such a column
                row.update(copy_image(raw_row, folder, f'images/{split}/{i:05d}', data_dir))
                if cache_tiles:
                    load_tiles(row, data_dir, split, image_size, max_tiles)
            rows.append(row)
        except Dropped as reason:
            dropped[str(reason)].append(row['question_id'])
    for reason, ids in dropped.items():
        print(f'{split}: dropped {len(ids)} rows {reason}: {", ".join(ids[:3])[:200]} ...')
    images, steps = (sum(bool(row.get(key)) for row in rows) for key in ('image', 'steps'))
    print(f'{split}: {len(rows)} of {len(raw)} rows, {images} with an image, {steps} with steps')
    assert rows or split == 'test', f'{split} holds no usable row'
    return rows


def copy_image(raw, folder, name, data_dir):
    """Copies a raw row's image file into data_dir: its fields of a prepared row. Raises Dropped."""
    try:
        data = (raw.get('image') or {}).get('bytes') or b''
        if raw.get('image_path'):
            with open(os.path.join(folder, raw['image_path']), 'rb') as f:
                data = f.read()
        size = load_image(data).size                        # as it is shown: turned by EXIF
        name += '.' + Image.open(io.BytesIO(data)).format.lower()
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise Dropped(f'without a readable image ({type(error).__name__})') from None
    write_file(os.path.join(data_dir, name), data)
    return dict(image=name, image_size=size, image_hash=hashlib.sha256(data).hexdigest()[:16])


if __name__ == '__main__':
    from experiments import toy
    configure(globals())
    if init_from != 'scratch' and not init_from.endswith('.pt'):
        fetch(init_from)  # into the hub's cache now, so that training needs no network
    files = dict(train=train_file, validation=val_file, test=test_file)
    sources = [dataset, *(os.path.dirname(path) for path in files.values() if path)]
    assert os.path.realpath(data_dir) not in map(os.path.realpath, sources), 'data_dir is a source'
    if dataset in toy.DRAWN and not any(files.values()):
        counts = dict(train=train_rows, validation=val_rows, test=test_rows)
        raw = {split: (rows, '')
               for split, rows in toy.draw(dataset, counts, seed, hops, nodes).items()}
    else:
        raw = load_rows(dataset, files, os.path.join(data_dir, 'cache', 'arrow'))
    assert 'validation' in raw, f'no validation rows, which train.py needs, only {[*raw]}'
    os.makedirs(data_dir, exist_ok=True)
    images = sum(len(rows) for rows, _ in raw.values() if {'image', 'image_path'} & set(rows[0]))
    if images and cache_tiles:
        most = images * (max_tiles + (max_tiles > 1)) * 3 * image_size ** 2
        print(f'tiles take at most {most / 1e9:.1f} GB in {data_dir}')
    for split in SPLITS:  # first: no split of an earlier preparation may stand beside other images
        Path(f'{data_dir}/{split}.jsonl').unlink(missing_ok=True)
    prepared = {split: prepare_split(rows, folder, split, data_dir, steps_from, max_latent_stage,
                                     image_size, max_tiles, cache_tiles)
                for split, (rows, folder) in raw.items()}
    if init_from == 'scratch':
        toy.train_tokenizer((text for row in prepared['train'] for text in (
            fill(prompt, row), '\n'.join(row['steps']), fill(answer, row))),
            os.path.join(data_dir, 'tokenizer'))
    for split, rows in prepared.items():
        lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
        write_file(f'{data_dir}/{split}.jsonl', ''.join(lines).encode())
