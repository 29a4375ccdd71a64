"""
From a data set to a batch, and from a text back to an answer. As a command it prepares a folder; as
a module it turns a row of that folder into model inputs.

    python prepare.py                                              A-OKVQA from the hub
    python prepare.py --dataset=mine_train.jsonl --data_dir=data/mine            rows of one's own
    python prepare.py --dataset=FOLDER --data_dir=data/mine                      parquet files
    python prepare.py config/toy.py                                the built-in data set, drawn here

A prepared folder holds {split}.jsonl, images/{split}/, cache/tiles/{split}/ and, with
init_from='scratch', tokenizer/. A row always has question and question_id; where they are given
steps and answer (Coconut's fields), image, choices, correct_choice_idx, results, edges; and, made
here, explanation, image_size, image_hash. What is left unused or dropped is printed. Sources:
Coconut's public data code, A-OKVQA's, InternVL's dynamic tiling as transformers'
GotOcr2ImageProcessorPil does it, VQA's normalisation of answers.
"""
import ast
import contextlib
import errno
import glob
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import string
import unicodedata
from collections import Counter, defaultdict

import numpy as np
import torch
import transformers
from PIL import Image, PngImagePlugin
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from configurator import configure
from model import END_IMG, END_LATENT, IMG, IMG_CONTEXT, LATENT, SPECIAL_TOKENS, START_LATENT, fetch

# rows are encoded one by one; without this the library warns in each forked worker
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

# --- knobs of the command -------------------------------------------------------------------------
dataset = 'HuggingFaceM4/A-OKVQA'  # hub id, folder of parquet, .parquet, .jsonl, .json, or
# drawn: 'toy', 'words' (its chain in words), 'prosqa' (graphs), 'prosqa_full' (published size)
data_dir = 'data/aokvqa'           # the prepared folder
init_from = 'OpenGVLab/InternVL3-1B-Pretrained'  # or a .pt; or 'scratch': a tokenizer is trained
steps_from = 'first'               # 'first': cut that rationale into steps; 'all': each is a step
max_latent_stage = 4               # one sentence alone is cut into so many spans of words
image_size = 448                   # side of a tile in pixels
max_tiles = 8                      # without the thumbnail
cache_tiles = True                 # tiles as uint8 on disk; False cuts them while training
train_rows = 8192                  # from here on where dataset is drawn: rows of each split
val_rows = 500
test_rows = 500
hops = 4                           # doors to follow in 'toy' and 'words'
nodes = 23                         # of a graph in 'prosqa'
seed = 1337
# --- how a row becomes text, as in train.py; here used only to train a tokenizer from scratch
PROMPT = ('<image>\nQuestion: {question}\n\nChoices:\n{choices}\n\n'
          'Let me think step by step:\n')
ANSWER = 'The answer is {letter}. {choice}'  # also {answer}, {explanation} (1st sentence)
prompt = PROMPT
answer = ANSWER

# --- text -----------------------------------------------------------------------------------------
LETTERS = 'ABCDEFGH'
MODES = ('coconut', 'cot', 'no_cot', 'pause', 'no_thoughts')
# InternVL's own system prompt
SYSTEM = ('你是书生·万象，英文名是InternVL，是由上海人工智能实验室、'
          '清华大学及多家合作单位联合开发的多模态大语言模型。')
# words by which a step speaks of seeing
SEEING = re.compile(
    r'\b(see|sees|seen|look|looks|looking|visible|image|picture|photo|shown|shows)\b', re.I)


def fill(template, row):
    """A prompt or answer template with the row's fields. Without choices, a paragraph of a prompt
    that holds {choices} is left out (only that line where the paragraph holds {question} too), and
    an answer template that asks for {letter} or {choice} becomes '{answer}'. Without an image,
    <image> is left out."""
    choices = [choice.strip() for choice in row.get('choices') or []]
    if not choices:
        parts = [part for part in template.split('\n\n')
                 if '{choices}' not in part or '{question}' in part]
        lines = [line for line in '\n\n'.join(parts).split('\n') if '{choices}' not in line]
        template = '\n'.join(lines)
        if '{letter}' in template or '{choice}' in template:
            template = '{answer}'
    fields = dict(question=row['question'], answer=row.get('answer', ''),
                  explanation=row.get('explanation', ''),
                  choices='\n'.join(f'{letter}. {c}' for letter, c in zip(LETTERS, choices)))
    if choices and row.get('correct_choice_idx') is not None:
        right = row['correct_choice_idx']
        fields.update(letter=LETTERS[right], choice=choices[right])
    try:
        text = template.format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        known = ', '.join('{' + field + '}' for field in fields)
        raise ValueError(f'the template {template!r} cannot be filled ({type(error).__name__} '
                         f'{error}): it may use {known}') from None
    return text if row.get('image') else text.replace('<image>\n', '').replace('<image>', '')


def build_text(row, stage, mode='coconut', c_thought=2, max_latent_stage=4, pad_latent_to_max=True,
               prompt=PROMPT, answer=ANSWER, template='plain', visual_bridge=False):
    """One row at one stage: (prompt, number of thoughts, target). Training, evaluation and
    sample.py all come through here.

        mode          steps hidden            thoughts
        coconut       the first `stage`       c_thought * stage
        pause         the first `stage`       c_thought * stage, but nothing is fed back
        no_thoughts   the first `stage`       0
        cot           none                    0
        no_cot        all                     0

    A stage beyond max_latent_stage hides all steps behind the thoughts of max_latent_stage. Without
    pad_latent_to_max a row has no more thoughts than its steps ask for; a row that has no steps has
    the stage's full number, like a question whose steps nobody knows. Stage 0 has no thoughts.
    visual_bridge says in words that the image is looked at: in stage 0 before the first step, later
    before the thoughts and, unless it speaks of seeing, before the first written step."""
    # template: the turns around the prompt, 'plain', 'chatml', or what frame_of has made of 'chat'
    if mode not in MODES or (template not in ('plain', 'chatml') and '{prompt}' not in template):
        raise ValueError(f'mode={mode!r}, template={template!r}: expected one of '
                         f'{", ".join(MODES)}; plain, chatml or a text with {{prompt}}')
    steps = list(row.get('steps') or ())
    if mode == 'cot':
        stage = 0
    thought_steps = min(stage, max_latent_stage)  # steps that thoughts stand for
    if steps and not pad_latent_to_max:
        thought_steps = min(thought_steps, len(steps))
    hide_all = mode == 'no_cot' or stage > max_latent_stage
    lines = [] if hide_all else steps[stage:]
    thoughts = 0 if mode in ('cot', 'no_cot', 'no_thoughts') else thought_steps * c_thought
    bridge = ''
    if visual_bridge and row.get('image'):
        seeing = 'From what I can see, ' if stage else 'Looking at the image, '
        if stage:
            bridge = 'Analyzing the visual information:\n'
        if lines and not (stage and SEEING.search(lines[0])):
            lines[0] = seeing + lines[0]
    text = fill(prompt, row)
    if template == 'chatml':
        text = (f'<|im_start|>system\n{SYSTEM}<|im_end|>\n'
                f'<|im_start|>user\n{text.rstrip()}<|im_end|>\n<|im_start|>assistant\n')
    elif template != 'plain':
        text = template.replace('{prompt}', text.rstrip())
    # rows of a test split may have no answer
    target = '\n'.join([*lines, fill(answer, row)]) if 'answer' in row else None
    return text + bridge, thoughts, target


def frame_of(template, tokenizer):
    """The knob `template` as `build_text` takes it: 'chat' becomes the tokenizer's own chat turns,
    a text with {prompt} in it."""
    if template != 'chat':
        return template
    if not tokenizer.chat_template:
        raise ValueError("template='chat', but this tokenizer has no chat template: use plain")
    turns = [dict(role='user', content='{prompt}')]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def begin_of(prompt, tokenizer):
    """The ids that a tokenizer puts before every text, as Llama 3's does; [] where the prompt
    starts with them already."""
    ids = tokenizer.encode('')
    return [] if not ids or prompt.startswith(tokenizer.decode(ids)) else ids


def thought_targets(row, tokenizer, thoughts, c_thought=2):
    """For each thought the token that begins the result of the step it stands for, if it is the
    first of that step's thoughts; else -100. The result is the row's own where it has one for each
    step, else, as in Coconut's format, the step's last word."""
    targets = [-100] * thoughts
    steps, results = row.get('steps') or (), row.get('results') or ()
    if len(results) != len(steps):
        results = [(re.findall(r'\w+', step) or [''])[-1] for step in steps]
    for k, step, result in zip(range(0, thoughts, c_thought), steps, results):
        if not result:
            continue
        # as it stands in the step, with the space that belongs to the token
        written = result if step.rfind(result) == 0 else f' {result}'
        ids = tokenizer.encode(written, add_special_tokens=False)
        says = [i for i in ids if tokenizer.decode([i]).strip()]  # Qwen's ' 4' is a space and a 4
        targets[k] = (says or ids)[0]
    return targets


def encode(row, tokenizer, stage, tiles=None, supervised=True, max_length=2560,
           num_image_tokens=256, teach=False, **text):
    """One row's model inputs: {input_ids: list, labels: list or None, pixel_values: uint8 [P, 3, S,
    S] or None}.

    tiles             uint8 [P, 3, S, S], the row's image as `tile_image` gives it, or None
    supervised        False leaves out steps and answer, for generation: labels is None
    num_image_tokens  N, visual tokens a tile
    teach             with `thought_labels` as well, see `thought_targets`
    text              knobs of `build_text`
    Raises ValueError where the row does not fit max_length, its visual tokens are not N a tile, its
    text holds <|latent|>, or its answer is missing.
    """
    prompt, thoughts, target = build_text(row, stage, **text)
    name = row.get('question_id', '?')
    visual = 0 if tiles is None else len(tiles) * num_image_tokens
    prompt = prompt.replace('<image>', IMG + IMG_CONTEXT * visual + END_IMG)
    ids = begin_of(prompt, tokenizer) + tokenizer.encode(prompt, add_special_tokens=False)
    image_token, latent = tokenizer.convert_tokens_to_ids([IMG_CONTEXT, LATENT])
    if ids.count(image_token) != visual:
        raise ValueError(f'row {name} holds {ids.count(image_token)} {IMG_CONTEXT} tokens, but its '
                         f'{visual // num_image_tokens} tiles give {visual}: the prompt needs one '
                         '<image> an image')
    if ids.count(latent):
        raise ValueError(f'row {name} holds {LATENT} in its own text: remove it from the question '
                         'and choices')
    if thoughts:
        start, end = tokenizer.convert_tokens_to_ids([START_LATENT, END_LATENT])
        ids = [*ids, start, *[latent] * thoughts, end]
    labels = None
    if supervised:
        if target is None:
            raise ValueError(f'row {name} has no answer: it can be asked, not trained on')
        goal = tokenizer.encode(target, add_special_tokens=False) + [tokenizer.eos_token_id]
        labels = [-100] * len(ids) + goal
        ids = ids + goal
    if len(ids) > max_length:
        raise ValueError(f'row {name} needs {len(ids)} tokens ({visual} visual, {thoughts} '
                         f'thoughts), max_length is {max_length}')
    inputs = dict(input_ids=ids, labels=labels, pixel_values=tiles)
    if teach:
        inputs['thought_labels'] = thought_targets(row, tokenizer, thoughts,
                                                   text.get('c_thought', 2))
    return inputs


def collate(rows):
    """What `encode` gave, as the keyword arguments of the model's forward; padded on the right."""
    lengths = torch.tensor([len(row['input_ids']) for row in rows])
    T = int(lengths.max())

    def pad(key, filler):
        values = [torch.tensor(row[key], dtype=torch.long) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filler)

    tiles = [row['pixel_values'] for row in rows]
    of_images = [t for t in tiles if t is not None]
    batch = dict(input_ids=pad('input_ids', 0),
                 pixel_values=torch.cat(of_images) if of_images else None,
                 attention_mask=(torch.arange(T) < lengths[:, None]).long(),
                 num_tiles=torch.tensor([0 if t is None else len(t) for t in tiles]))
    if rows[0]['labels'] is not None:
        batch['labels'] = pad('labels', -100)
    if 'thought_labels' in rows[0]:
        batch['thought_labels'] = pad('thought_labels', -100)
    return batch


def count_supervised(batch):
    """The number of tokens that a batch's loss is the mean over."""
    return int((batch['labels'][:, 1:] != -100).sum())  # nothing predicts the first


def micro_batches(batch, size):
    """A batch cut into parts of `size` rows, each with its own tiles."""
    if len(batch['input_ids']) <= size:
        return [batch]
    pixels = batch['pixel_values']
    cut = {key: value.split(size) for key, value in batch.items() if key != 'pixel_values'}
    parts = [dict(zip(cut, values)) for values in zip(*cut.values())]
    tiles = [None] * len(parts)
    if pixels is not None:
        tiles = pixels.split([int(part['num_tiles'].sum()) for part in parts])
    return [dict(part, pixel_values=t) for part, t in zip(parts, tiles)]


def batches(dataset, groups, num_workers=0, pin_memory=False):
    """Batches of a data set, in host memory; `groups` is a list of lists of row numbers. The number
    of workers changes nothing but speed."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=groups, collate_fn=collate, num_workers=num_workers,
        # the workers' seed is drawn from this: the global one stays as it is, workers or not
        pin_memory=pin_memory, generator=torch.Generator(),
        worker_init_fn=leave_signals_to_the_parent)
    try:
        yield from loader
    except (ValueError, OSError) as error:
        # A worker's error arrives as one text that ends in its traceback: File "...", the line, and
        # "ValueError: message". Where that line is a raise, the message is meant for the user.
        lines = [line.strip() for line in str(error).strip().splitlines()]
        places = [i for i, line in enumerate(lines) if line.startswith('File "')]
        if places and lines[places[-1] + 1].startswith('raise '):
            raise ValueError(lines[-1].partition(': ')[2] or lines[-1]) from None
        raise


def leave_signals_to_the_parent(worker):
    """Ctrl-C, or a cluster, signals every process; the parent needs its workers until it has
    saved."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


# --- reading answers back -------------------------------------------------------------------------
# words before an answer, in the languages that models were seen to answer in
ANSWER_IS = (r'(?:\b(?:answers?|antwort|réponse|respuesta|risposta|resposta|ответ)\b'
             r'|الإجابة|الجواب|答案|答え|回答|正解|정답)')
CHOOSING = (r'(?:\b(?:option|choice|it is|it\'s|(?:would|must|should) '
            r'be|say|choose|pick|select|guess'
            r'|go with)\b|选[择项]?|選)')
# between 'answer' and the option: ' is: ('
LINK = (r'(?:[\s:=–—"\'(\[{<]+|-(?!\d)|\b(?:is|are|would|should|must|be|option|choice|letter'
        r'|clearly|probably|likely|most|therefore|thus|the|ist|die|est|la|le|es|è|é'
        r'|correct[ae]?|right|best|final)\b|是|为|為|は|은|는|应该|选项)*')
# behind an option: ') is the correct answer'
RIGHT_AFTER = re.compile(r'[)\]"\'>]*\s+(?:is|was|would be|must be|seems)\s+'
                         r'(?:(?:the|most|probably|clearly)\s+)*'
                         r'(?:correct|right|best|answer|likely)\b', re.I)
# behind an option: ' is not', ' isn't'
WRONG_AFTER = re.compile(r'\W*(?:is|was|are|seems)'
                         r'(?:\s+(?:\w+\s+)?(?:not|wrong|incorrect|false)\b|n\'t)', re.I)
# a text that ends in a negation, up to 24 characters back
NEGATED_BEFORE = re.compile(r'(?:\b(?:not|no|never|neither|nor|none|without|nicht|kein\w*|pas)'
                            r'\b|n\'t\b|不是?|没|沒|非)'
                            r'(?:(?!\bbut\b|是)[^.,;:!?\n。，]){0,24}$', re.I)
# between two options: ' or ', ', '
JOINED = re.compile(r'[\s)\]"\'>(]*(?:[,;/&|、或和]|\b(?:or|and|also|possibly|perhaps|as well as'
                    r'|und|oder|et|ou)\b)[\s,(]*(?:(?:or|and|also|maybe|possibly|perhaps'
                    r'|as well as|the|an)\s+)*[("\'\[]*|\s+(?=[A-H][.):])', re.I)
ARTICLE = re.compile(r'(?:an?|the)\s+', re.I)
UNSPACED = re.compile('[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]')  # Thai, kana, Han: no word ends
# a letter that is no part of a word or name: 'C', 'C은', not 'Cat', 'C++', 'C-3'
LETTER = re.compile(r"([A-Ha-h])(?:(?=[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af])"
                    r"|(?![\w+#]|[&'.-]\w))")
# a letter that labels a line: 'C.', 'C because'
LETTERED = re.compile(r'[A-H](?:[).:,\]|"\'>]|\s*$|\s+-\s|\s+(?:because|since|as)\b)'
                      r'|[a-h](?:[).:](?=\s|$)|\s*$)', re.M)
# what may stand before it: '- ', '"(', '3. ' of a numbered list
BULLET = re.compile(r'[\s"\'(\[{<>#„•]*(?:\d+[.)]\s+(?=[A-H]\b))?(?:-(?!\d)\s*)?')
# before an answer that is denied or only supposed in the same clause: 'doubt that', 'if it were'
SUPPOSED_BEFORE = re.compile(r'(?:\b(?:not|no way|impossible|doubt|wrong|incorrect|might|never'
                             r'|ruled? out|eliminated?|excluded?)\b|n\'t\b|不)'
                             r'(?:(?!\b(?:so|therefore|thus|hence|but)\b)[^.!?,;\n])*$'
                             r'|\bwere\b[^.!?\n]*$', re.I)
# takes back what was said before it
CORRECTED = re.compile(r'(?:^|[.!?,;\n])\s*(?:no,\s+)?(?:wait|actually|on second thought'
                       r'|correction|hmm|sorry|i was wrong|let me re\w*)\b', re.I)
# behind an option: ': false'
DENIED_AFTER = re.compile(r'[\s:.,()\]-]*(?:no|false|wrong|incorrect)\b', re.I)
# options that sentences hold without meaning them
COMMON_WORDS = {'yes', 'no', 'none', 'both', 'all', 'neither', 'either', 'not', 'true', 'false'}


def compatible(text):
    """One form of each character (NFKC); a raised number stays one, 10² is not 102."""
    return unicodedata.normalize('NFKC', re.sub('([⁰¹²³⁴⁵⁶⁷⁸⁹]+)', r'^\1', text))


def cleaned(text):
    """Text as answers are compared: one form of each character, no markup, quotes straight."""
    text = compatible(re.sub('[‘’´]', "'", text))
    text = re.sub('[“”]', '"', text)
    text = re.sub(r'[−–](?=\s?\d)', '-', text)
    text = re.sub(r'<think>.*</think>', ' ', text, flags=re.S)
    text = re.sub(r'\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}', r'\1', text)
    text = re.sub(r'\\boxed\{([^{}]*)\}', r' answer: \1 ', text)
    text = re.sub(r'<answer>|#{4}', ' answer: ', text, flags=re.I)
    text = re.sub(r'<\|[^|<>]*\|>|</?[a-zA-Z]\w+>', ' ', text)  # special tokens and tags
    text = re.sub(r'\*+|`+|\\[()]', '', text)
    return re.sub(r'\$([^$\s]+)\$', r'\1', text)


def name_pattern(name):
    """A regular expression that finds an option's text, as `cleaned` gives it, in a longer text."""
    words = re.split(r'\s+|(?<=\w)-(?=\w)', name)  # t-shirt, t shirt
    pattern = r'(?:\s+|-)'.join(re.escape(word) for word in words)
    first, last = name[0], name[-1]
    if first.isdigit():
        pattern = r'(?<![\w-])(?<!\d[.,])' + pattern
    elif first.isalpha() and not UNSPACED.match(first):
        pattern = r'(?<!\w)' + pattern
    if last.isdigit():
        pattern += r'(?![.,]?\w)(?!\s*[+*/^=×÷:%-])'  # not a part of a sum, a time, a share
    elif name.lower() in COMMON_WORDS:
        alone = r'(?!\s*(?![A-H]\b)[\w+#])'  # 'no', 'no B', but not 'no doubt'
        pattern = f'{pattern}(?:{alone}|(?=\\s*\\n))'
    elif last.isalpha() and not UNSPACED.match(last):
        pattern += r'(?:e?s)?(?![\w+#]|\'s\b)' if len(name) > 2 else r'(?![\w+#]|[&-]\w)'
    return re.compile(pattern, re.I)


class AnswerReader:
    """An answer's text, as `cleaned` gives it, and where it says options by letter or by name."""

    def __init__(self, text, choices):
        self.text = text
        stripped = [cleaned(choice).strip() for choice in choices]
        self.names = [name.rstrip('.,;:!?"\' ') or name for name in stripped]
        self.patterns = [name_pattern(name) if name else None for name in self.names]

    def differ(self, i, j):
        return self.names[i] != self.names[j]

    def letter_at(self, place, only_capital=False):
        """(option, end) of a letter that stands alone here; None where there is none."""
        match = LETTER.match(self.text, place)
        if not match or match[1].upper() not in LETTERS[:len(self.names)]:
            return None
        rest = self.text[match.end():]
        verb = r'\s+(?:because|since|as|is|was|for|which|and|or|but)\b'
        if match[1] in 'aA' and re.match(r'\s+\w', rest) and not re.match(verb, rest):
            return None  # the article
        closed = re.match(r'\s*(?:$|[).:,;!?\]"\'>}])', rest)
        if match[1].islower() and (only_capital or not closed):
            return None
        return LETTERS.index(match[1].upper()), match.end()

    def name_at(self, place):
        """(option, end) of the longest option that is named here; None where there is none."""
        found = []
        for i, pattern in enumerate(self.patterns):
            match = pattern and pattern.match(self.text, place)
            if not match:
                continue
            spaces = re.compile(r'\s+(?=\w)').match(self.text, match.end())
            if match[0] in 'aA' and spaces and not self.letter_at(spaces.end(), only_capital=True):
                continue  # the article
            exact = self.text.startswith(self.names[i], place)
            found.append((-len(self.names[i]), not exact, i, match.end()))
        # the longest, of these one in the same case, of these the first
        return min(found)[2:] if found else None

    def said_at(self, place):
        """(option, end, whether by letter) of what is said here: 'C', '(C) dog', 'a dog', 'dog C';
        option is -1 where more than one is. None where none is said, or that it is wrong."""
        place = re.compile(r'["\'„(\[{<\s]*').match(self.text, place).end()
        letter, name = self.letter_at(place), self.name_at(place)
        if not name and (article := ARTICLE.match(self.text, place)):
            name = self.name_at(article.end())
        if letter and name and len(self.names[name[0]]) == 1 and self.text[place].isupper():
            name = None  # of an option whose text is one letter, a capital means the letter
        said, by_letter = name or letter, not name
        if not said or WRONG_AFTER.match(self.text, said[1]):
            return None
        if re.compile(r'[\s)\]"\']*\?').match(self.text, said[1]) and self.text.strip()[-1:] != '?':
            return None  # 'C? No' asks; a text that itself ends so says it, only unsurely
        option, end = said
        # the other form may follow, 'C) dog' or 'dog (C)', but not as a name of one letter
        rest = re.compile(r'[\s().:\[\]{}"\'<>|,–-]*').match(self.text, end).end()
        second = self.letter_at(rest, only_capital=True) if name else self.name_at(rest)
        if not second and DENIED_AFTER.match(self.text, end):
            return None
        if second and (name or len(self.names[second[0]]) > 1):  # letter and name say it twice
            option = -1 if self.differ(option, second[0]) else option
            end = second[1]
            if WRONG_AFTER.match(self.text, end):
                return None
        if joined := JOINED.match(self.text, end):
            other = self.letter_at(joined.end(), only_capital=True) or self.name_at(joined.end())
            denied = other and WRONG_AFTER.match(self.text, other[1])
            if other and not denied and self.differ(option, other[0]):
                option, end = -1, other[1]
        return option, end, by_letter

    def said_after(self, words):
        """What is said behind each place where these words stand: (place, option)."""
        for match in re.finditer(words + LINK, self.text, re.I):
            said = self.said_at(match.end())
            if said and not SUPPOSED_BEFORE.search(self.text[:match.start()]):
                yield match.start(), said[0]

    def said_right(self):
        """What is said to be right, as in 'C is correct': (place, option)."""
        for match in RIGHT_AFTER.finditer(self.text):
            before = self.text[:match.start()]
            if SUPPOSED_BEFORE.search(before) or self.text[match.end():].lstrip()[:1] == '?':
                continue
            line = self.text.rfind('\n', 0, match.start()) + 1
            for word in re.finditer(r'(?<!\w)\w', self.text[line:match.start()]):
                said = self.said_at(line + word.start())
                if said and said[1] == match.start():  # it ends where ' is correct' begins
                    yield match.start(), said[0]
                    break

    def said_by_line(self):
        """The options that lines begin with by letter, and those that whole lines name, each with
        the place behind its line."""
        lettered, named, place = [], [], 0
        for line in self.text.split('\n'):
            start = place + BULLET.match(line).end()
            place += len(line) + 1
            said = self.said_at(start)
            if not said:
                continue
            option, end, by_letter = said
            if by_letter and LETTERED.match(self.text, start):
                lettered.append(option)
            elif not re.search(r'\w', self.text[end:place]):
                named.append((place, option))
        return lettered, named

    def only_name(self):
        """The one option that is named, negations left out; None for none or several."""
        spans = []
        for i, (name, pattern) in enumerate(zip(self.names, self.patterns)):
            if name and (len(name) > 1 or name.isdigit() or UNSPACED.match(name)):
                spans += [(*match.span(), i) for match in pattern.finditer(self.text)]
        found = set()
        for start, end, i in spans:
            before = self.text[:start]
            inside = any(a <= start and end <= b and b - a > end - start for a, b, _ in spans)
            loose = self.names[i].lower() in COMMON_WORDS and before.strip()
            denied = NEGATED_BEFORE.search(before) or WRONG_AFTER.match(self.text, end)
            if not (inside or loose or denied):
                found.add(i)
        return min(found) if len({self.names[i] for i in found}) == 1 else None

    def read(self, ended):
        """The option that the answer says, None for none, -1 for several."""
        whole = self.text.strip().strip('.!')
        for i, name in enumerate(self.names):
            if ended and len(name) > 1 and whole == name.strip('.!'):
                return i
        corrections = list(CORRECTED.finditer(self.text)) if ended else []
        if corrections:  # what was said before is taken back, if anything is said then
            rest = self.text[corrections[-1].end():].lstrip(' ,.:;!-\n')
            said = AnswerReader(rest, self.names).read(ended)
            if said is not None or re.search(r'\w', rest):
                return said
        said = [*self.said_after(ANSWER_IS), *self.said_right()]
        if said or not ended:
            return max(said)[1] if said else None  # the last; text that was cut off says no more
        lettered, named = self.said_by_line()
        if lettered:
            return lettered[0] if len(set(lettered)) == 1 else -1
        last_line_names_it = named and named[-1][0] > len(self.text.rstrip())
        if last_line_names_it or len({option for _, option in named}) == 1:
            return named[-1][1]
        chosen = {option for _, option in self.said_after(CHOOSING)}
        if chosen:
            return chosen.pop() if len(chosen) == 1 else -1
        ends = [match.end() for match in re.finditer(ANSWER_IS, self.text, re.I)]
        lines = self.text[max(ends, default=0):].strip().split('\n')
        return AnswerReader(lines[-1], self.names).only_name()


def fits_template(text, template, letter, choice):
    """Whether a text ends as the answer template does for this option."""
    fields = dict(letter=letter, choice=choice, answer=choice)
    pattern, used = '', set()
    for literal, field, *_ in string.Formatter().parse(template.strip()):
        pattern += re.escape(literal)
        if field is not None:
            pattern += re.escape(fields[field]) if field in fields else '.*'
            used.add(field)
    return used & fields.keys() and re.search(rf'(?:^|\n){pattern}\s*$', text, re.S)


def extract_choice(text, choices, template='', ended=True):
    """(number of the option that an answer says, True), or (0, False) where none can be read.

    template  the recipe's answer template: a text that ends as it does says its option
    ended     False for a text that ran out of max_new_tokens: it counts only if it had said
              'the answer is ...' before its last word
    """
    text = re.sub(r'<\|[^|<>]*\|>', '', text).strip()
    options = [choice.strip() for choice in choices]
    if template and ended:
        fitting = [i for i, (letter, choice) in enumerate(zip(LETTERS, options))
                   if fits_template(text, template, letter, choice)]
        if len({options[i] for i in fitting}) == 1:
            return fitting[0], True
    if not ended:
        text = re.sub(r'\S+\s*$', '', text)
    option = AnswerReader(cleaned(text), options).read(ended)
    return (0, False) if option in (None, -1) else (option, True)


# --- free answers ---------------------------------------------------------------------------------
NUMBERS = 'zero one two three four five six seven eight nine ten'.split()


def normalised(text):
    """A free answer as VQA's evaluation compares them: case, articles, punctuation and number words
    do not count. Unlike there a minus before a digit stays, and 'none' is no number."""
    text = compatible(text).lower().replace('’', "'")
    text = text.lstrip('# ')                                     # GSM8K writes #### 18
    text = re.sub(r'(?<!\w)[-−–]\s?(?=\d)', '-', text)
    text = re.sub(r'(?<=\d)\.0+(?!\d)', '', text)                # 18.0
    text = re.sub(r'(?<!\d)\.(?=\d)', '0.', text)                # .5
    text = re.sub(r'(?<=\d),(?=\d{3})', '', text)                # 1,000
    text = re.sub(r'\s+(?=%)', '', text)                         # 5 %
    text = re.sub(r'\b(?:a|an|the)\s+(?=\S)', '', text)          # but vitamin a, and 'a, b'
    text = re.sub(r'(?<=\w)-(?=\w)|(?<!\d)/|/(?!\d)|[;\[\]"{}()\\_@`?!,:*。、]', ' ', text)
    text = re.sub(r'\.(?!\d)', '', text)                         # but 1.5
    words = text.split()
    words = [str(NUMBERS.index(word)) if word in NUMBERS else word for word in words]
    return ' '.join(words)


def free_answer_is(text, row, template):
    """Whether a text's last line is a row's answer: (as VQA compares, with or without the template;
    character by character, with the template)."""
    def last_line(text):
        return text.strip().split('\n')[-1].strip()

    said, known = last_line(text), last_line(fill(template, row))
    wanted = {normalised(known), normalised(last_line(row['answer']))}
    same = normalised(said) in wanted if normalised(said) else said == known
    return same, said == known


def check_round_trip(rows, template):
    """Raises ValueError where the recipe's own text for an answer would not be read back as it."""
    for row in rows:
        if row.get('choices') and row.get('correct_choice_idx') is not None:
            text, choices = fill(template, row), row['choices']
            option, parsed = extract_choice('\n'.join([*(row.get('steps') or ()), text]), choices,
                                            template)
            if not parsed or choices[option].strip() != choices[row['correct_choice_idx']].strip():
                read = f'as {LETTERS[option]}' if parsed else 'as no option'
                raise ValueError(
                    f'answer={template!r} makes {text!r} of row {row.get("question_id")}, which is '
                    f'read back {read}, not as {LETTERS[row["correct_choice_idx"]]}: use '
                    '{letter} or {choice} in it')


# --- files and images -----------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path):
    """Gives a temporary name to write to; renames it to path when all is written, removes it if
    not."""
    folder = os.path.dirname(path) or '.'
    part = f'{path}.{os.getpid()}.part'
    try:
        os.makedirs(folder, exist_ok=True)
        yield part
        os.replace(part, path)
    # torch and numpy raise errors without errno: whether the disk is full is looked up
    except (OSError, RuntimeError) as error:
        full = os.path.isdir(folder) and shutil.disk_usage(folder).free < 2**20  # 1 MiB
        if getattr(error, 'errno', None) == errno.ENOSPC or full:
            raise OSError(f'the disk is full: {path} was not written, what was there before is '
                          'untouched; free some space') from None
        if isinstance(error, OSError):
            raise OSError(f'{path} cannot be written ({error.strerror or error}): give another '
                          'folder, or make this one writable') from None
        raise
    finally:
        if os.path.exists(part):
            os.remove(part)


# part of the cache's hash: count it up when tile_image or load_image give other pixels
TILING_VERSION = 2
PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26  # image generators write more text than Pillow allows
# EXIF's orientation; ImageOps.exif_transpose fails where it writes damaged EXIF data back
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


def orientation(image):
    """EXIF's 1 to 8; 1 where it cannot be read."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # Pillow raises many kinds on damaged EXIF data; viewers show such a picture
        return 1


def grey_to_8_bits(image):
    """Greys of more than 8 bits. Black and white are 0 and 1 for fractions, else 0 and the least
    full scale of 8, 10, 12, 14 or 16 bits that holds the brightest; for others the picture's own
    least and greatest value."""
    grey = np.asarray(image).astype(np.float64)
    finite = np.isfinite(grey)
    low, high = (grey[finite].min(), grey[finite].max()) if finite.any() else (0, 0)
    grey = np.where(finite, grey, low)
    scales = [2 ** bits - 1 for bits in (8, 10, 12, 14, 16) if 2 ** bits - 1 >= high]
    black, white = low, high
    if image.mode == 'F' and low >= -0.5 and high <= 1.5:  # fractions, after a sharp resize
        black, white = 0, 1
    elif low >= 0 and scales:
        black, white = 0, scales[0]
    grey = (grey - black) / max(white - black, 1e-12) * 255
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


@contextlib.contextmanager
def decoding(name):
    """Around Pillow's own calls and nothing else: its decoders raise any kind on damaged files,
    which becomes one ValueError, without the address of a buffer."""
    try:
        yield
    except Exception as error:
        reason = str(error).split(' <_io')[0] or type(error).__name__
        raise ValueError(f'{name} cannot be read as an image: {reason}') from None


def load_image(file):
    """RGB image from a path or bytes, as a viewer shows it: upright, the first of several frames,
    what is transparent over white. ValueError in one sentence where it is none, FileNotFoundError
    where nothing is there."""
    name = file if isinstance(file, str) else 'image'
    if isinstance(file, str) and not os.path.isfile(file):
        raise FileNotFoundError(f'no image file {file[:200]}')
    with decoding(name):
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        image.load()
    turn = TURNS.get(orientation(image))
    if image.format == 'TIFF':
        turn = None  # Pillow turned it when it was loaded
    if image.mode.startswith('I') or image.mode == 'F':
        image = grey_to_8_bits(image)
    elif image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    image = image.convert('RGB')
    return image if turn is None else image.transpose(turn)


def image_header(data):
    """(file ending, (width, height) as it is shown) of an image's bytes; only a TIFF is decoded."""
    with decoding('it'):
        image = Image.open(io.BytesIO(data))
        size = image.size
        if image.format == 'TIFF':  # which Pillow turns itself when it is loaded
            image.load()
            size = image.size
    if image.format != 'TIFF' and orientation(image) in (5, 6, 7, 8):
        size = size[::-1]
    return image.format.lower(), size


def tile_grid(width, height, size=448, min_tiles=1, max_tiles=8):
    """(columns, rows) of tiles for an image: the grid of the nearest aspect ratio; on a tie the
    larger one, if it is filled half."""
    sides = range(1, max_tiles + 1)
    grids = [(i, j) for i in sides for j in sides if min_tiles <= i * j <= max_tiles]
    grids.sort(key=lambda grid: grid[0] * grid[1])
    best, least = (1, 1), float('inf')
    for i, j in grids:
        difference = abs(width / height - i / j)
        filled = width * height > 0.5 * size * size * i * j
        if difference < least or (difference == least and filled):
            best, least = (i, j), difference
    return best


def count_tiles(width, height, size=448, min_tiles=1, max_tiles=8, thumbnail=True):
    i, j = tile_grid(width, height, size, min_tiles, max_tiles)
    return i * j + (thumbnail and i * j > 1)


def tile_image(image, size=448, min_tiles=1, max_tiles=8, thumbnail=True):
    """PIL image to uint8 [P, 3, size, size]: the grid's tiles row by row and, if there are several,
    a thumbnail last."""
    i, j = tile_grid(*image.size, size, min_tiles, max_tiles)
    image = image.convert('RGB')
    whole = image.resize((size * i, size * j), Image.Resampling.BICUBIC)
    tiles = [whole.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
             for y in range(j) for x in range(i)]
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    pixels = np.stack([np.asarray(tile) for tile in tiles])                     # [P, size, size, 3]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def tiles_path(row, folder, split, size, max_tiles):
    """Where a row's tiles are cached: the name holds the picture, how it is cut, and by what."""
    min_tiles, thumbnail = 1, True
    key = repr((size, min_tiles, max_tiles, thumbnail, TILING_VERSION, row['image_hash']))
    stem = os.path.splitext(os.path.basename(row['image']))[0]
    name = f'{stem}_{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy'
    return os.path.join(folder, 'cache', 'tiles', split, name)


def load_tiles(row, folder, split, size=448, max_tiles=8, cache=True):
    """A prepared row's tiles, from the cache, else cut from its image and then cached; None without
    an image."""
    if not row.get('image'):
        return None
    path = tiles_path(row, folder, split, size, max_tiles)
    if cache and os.path.isfile(path):
        try:
            return torch.from_numpy(np.load(path))
        except (ValueError, EOFError):
            print(f'{path} is damaged and made anew')
    tiles = tile_image(load_image(os.path.join(folder, row['image'])), size, 1, max_tiles)
    if cache:
        with replacing(path) as part, open(part, 'wb') as f:
            np.save(f, tiles.numpy())  # to a path it would add .npy
    return tiles


# --- rows of a prepared data set ------------------------------------------------------------------
class Rows(torch.utils.data.Dataset):
    """A prepared split at one stage, encoded row by row. With probability uniform_prob a row is
    drawn to an earlier stage, each as likely; which depends on seed, epoch and row alone, not on
    workers or order."""

    def __init__(self, rows, split, stage, tokenizer, data_dir='.', image_size=448, max_tiles=8,
                 cache_tiles=True, max_length=2560, num_image_tokens=256, supervised=True,
                 teach=False, uniform_prob=0.0, seed=0, epoch=0, **text):
        self.rows, self.stage, self.tokenizer, self.text_knobs = rows, stage, tokenizer, text
        self.tile_knobs = dict(folder=data_dir, split=split, size=image_size, max_tiles=max_tiles,
                          cache=cache_tiles)
        self.encode_knobs = dict(max_length=max_length, num_image_tokens=num_image_tokens,
                          supervised=supervised, teach=teach)
        self.uniform_prob, self.seed, self.epoch = uniform_prob, seed, epoch

    def __len__(self):
        return len(self.rows)

    def stage_of(self, i):
        rng = random.Random(f'{self.seed} {self.epoch} {self.rows[i].get("question_id", i)}')
        # stage 0 has no earlier one
        mixed = self.stage > 0 and rng.random() < self.uniform_prob
        return rng.randrange(self.stage) if mixed else self.stage

    def __getitem__(self, i):
        tiles = load_tiles(self.rows[i], **self.tile_knobs)
        return encode(self.rows[i], self.tokenizer, self.stage_of(i), tiles, **self.encode_knobs,
                      **self.text_knobs)

    def length(self, i, stage=None, count=None):
        """Tokens of row i at a stage, with its answer, without a look at its image; `count` counts
        those of a text."""
        if count is None:
            def count(text):
                return len(self.tokenizer.encode(text, add_special_tokens=False))
        row = self.rows[i]
        stage = self.stage if stage is None else stage
        prompt, thoughts, target = build_text(row, stage, **self.text_knobs)
        visual = 0
        if row.get('image'):
            tiles = count_tiles(*row['image_size'], self.tile_knobs['size'],
                                max_tiles=self.tile_knobs['max_tiles'])
            visual = tiles * self.encode_knobs['num_image_tokens'] + 2          # <img> and </img>
        markers, end = 2 * bool(thoughts), 1
        texts = sum(count(part) for part in prompt.split('<image>')) + count(target or '')
        return len(begin_of(prompt, self.tokenizer)) + visual + texts + thoughts + markers + end

    def fits(self, i):
        """Whether row i fits max_length at each stage it may be drawn to. A text has no more tokens
        than bytes: only a row with too many bytes is tokenized."""
        most = self.encode_knobs['max_length']
        stages = range(self.stage + 1) if self.uniform_prob else [self.stage]
        return all(self.length(i, stage, lambda text: len(text.encode())) <= most
                   or self.length(i, stage) <= most for stage in stages)


def split_file(folder, split):
    return os.path.join(folder, f'{split}.jsonl')


def read_split(folder, split):
    """The rows of a prepared split."""
    path = split_file(folder, split)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no prepared data at {path}: run prepare.py with the same config '
                                'first')
    with open(path, encoding='utf-8') as f:
        rows = [json.loads(line) for line in f]
    if not rows:
        raise ValueError(f'{path} holds no rows: prepare another data set')
    return rows


def fitting_rows(split, stage, rows=None, **knobs):
    """The rows of a split, or these, that fit max_length at this stage; the others are counted."""
    rows = read_split(knobs['data_dir'], split) if rows is None else rows
    asked = Rows(rows, split, stage, **knobs)
    kept = [row for i, row in enumerate(asked.rows) if asked.fits(i)]
    limit = f'max_length={knobs["max_length"]}'
    if len(kept) < len(asked):
        print(f'stage {stage}: {len(asked) - len(kept)} of {len(asked)} {split} rows need more '
              f'than {limit}: dropped')
    if not kept:
        raise ValueError(f'no {split} row fits {limit} at stage {stage}: raise it, or lower '
                         'max_tiles')
    return kept


def digest(folder, *splits):
    """A hash by which two runs can tell whether they saw the same rows."""
    content = b''.join(open(split_file(folder, split), 'rb').read() for split in splits)
    return hashlib.sha256(content).hexdigest()


# --- from anybody's row to a prepared one ---------------------------------------------------------
# the fields that are read; any other column is named once
FIELDS = ('question', 'image', 'image_path', 'choices', 'correct_choice_idx', 'answer', 'steps',
          'results', 'edges', 'idx_to_symbol',
          'rationales', 'question_id', 'idx', 'id')
RESERVED = ('<image>', *SPECIAL_TOKENS, '<|im_start|>', '<|im_end|>', '<|endoftext|>')
ABBREVIATION = re.compile(r'(?:\b(?:St|Dr|Mr|Mrs|Ms|Jr|Sr|Prof|Mt|vs|etc|approx|ca|[A-Z])'
                          r'|\b[ap]\.m|\b(?:[A-Za-z]\.)+[A-Za-z])\.$')


NOT_THERE = 'whose image file is not there'


class Dropped(Exception):
    """The reason why a row cannot be used, worded to follow 'dropped 3 rows'."""


def is_missing(value):
    return (value is None or isinstance(value, float) and math.isnan(value)
            or isinstance(value, str) and not value.strip())


def as_text(value, field):
    """A field's value as text; numbers are written out."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise Dropped(f'whose {field} is {type(value).__name__}, not text')
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).replace('\r\n', '\n').strip()


def as_items(value, field):
    """A list, or a list written as text, as a list; None for any other text."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return list(value)
    if isinstance(value, str):
        if not re.fullmatch(r'\s*\[.*\]\s*', value, re.S):
            return None
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass  # a Python list, as A-OKVQA's, or no list
        if re.search(r'''['"]\s+['"]''', value):  # without commas Python would glue the items
            raise Dropped(f'whose {field} is a list without commas, written as text')
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            return None
    raise Dropped(f'whose {field} is {type(value).__name__}, not a list')


def sentences(text):
    """A text cut at line ends and sentence ends, without the numbers or dashes of a list."""
    found = []
    for line in text.split('\n'):
        line = re.sub(r'^\s*(?:(?:step\s+)?\d+[.):]|[-*•])\s+', '', line, flags=re.I)
        parts = re.split(r'(?<=[.!?])\s+|(?<=[。！？])', line)
        begun = ''
        for part in parts:
            begun = f'{begun} {part}'.strip()
            if begun and not ABBREVIATION.search(begun):
                found.append(begun)
                begun = ''
        if begun:
            found.append(begun)
    return found


def cut_steps(text, spans):
    """A text as steps: its sentences; a single sentence as up to `spans` nearly equal spans of
    words."""
    found = sentences(text)
    if len(found) != 1:
        return found
    words = found[0].split()
    return [' '.join(part) for part in np.array_split(words, min(spans, len(words)))]


def texts_of(raw, field):
    """The texts of a field that is a list or a single text, empty ones left out; [] without it."""
    if is_missing(raw.get(field)):
        return []
    items = as_items(raw[field], field)
    items = [raw[field]] if items is None else items
    return [as_text(item, field) for item in items if not is_missing(item)]


def without_letters(choices):
    """Options without the letters that each begins with, as in 'A. cat', 'B. dog'."""
    found = [re.fullmatch(rf'\s*\(?{letter}[.):]\s*(\S.*)', choice, re.S)
             for letter, choice in zip(LETTERS, choices)]
    return [match[1] for match in found] if all(found) else choices


def find_choice(value, choices):
    """The option that an answer means: its text, its letter, or both, as in 'B. dog'."""
    text = as_text(value, 'answer')
    for label, choice in zip(LETTERS, choices):
        if re.fullmatch(rf'\(?{label}[.):]\s*{re.escape(choice.strip())}', text):
            text = choice.strip()
    # the exact text wins; else letter and text in any case have to mean the same option
    exact = {choice.strip() for choice in choices if choice.strip() == text}
    letter = re.fullmatch(r'\(?([A-Ha-h])[.)]?', text)
    meant = exact or {c.strip() for c in choices if c.strip().casefold() == text.casefold()}
    if letter and not exact and letter[1].upper() in LETTERS[:len(choices)]:
        meant = meant | {choices[LETTERS.index(letter[1].upper())].strip()}
    if len(meant) != 1:
        reason = 'several' if meant else 'none'
        raise Dropped(f'whose answer is {reason} of its options')
    return [choice.strip() for choice in choices].index(meant.pop())


def right_choice(raw, choices):
    """The number of the right option, from correct_choice_idx or answer; None where neither is
    known."""
    index, known = raw.get('correct_choice_idx'), None
    if isinstance(index, str) and index.strip().upper() in tuple(LETTERS):
        index = LETTERS.index(index.strip().upper())
    if not is_missing(index) and index != -1:  # which some test sets have for 'not known'
        try:
            known = int(float(index)) if float(index).is_integer() else None
        except (TypeError, ValueError, OverflowError):
            known = None
        if isinstance(index, bool) or known is None or not 0 <= known < len(choices):
            raise Dropped('without a valid correct_choice_idx')
    if not is_missing(raw.get('answer')):
        answered = find_choice(raw['answer'], choices)
        if known is not None and choices[known].strip() != choices[answered].strip():
            raise Dropped('whose answer and correct_choice_idx disagree')
        known = answered if known is None else known
    return known


def name_of(raw):
    """A raw row's id as text, what is not valid Unicode escaped; '' without one."""
    for field in ('question_id', 'idx', 'id'):
        if not is_missing(raw.get(field)):
            return as_text(raw[field], field).encode(errors='backslashreplace').decode()
    return ''


def read_row(raw, split, steps_from='first', max_latent_stage=4):
    """A raw row's fields as a prepared row has them, id and image left out. Raises Dropped."""
    if is_missing(raw.get('question')):
        raise Dropped('without a question')
    row = dict(question=as_text(raw['question'], 'question'))
    choices = raw.get('choices')
    empty = isinstance(choices, (list, str)) and choices in ([], '[]')
    if not is_missing(choices) and not empty:
        choices = as_items(choices, 'choices')
        if choices is None or not 2 <= len(choices) <= len(LETTERS):
            raise Dropped(f'without 2 to {len(LETTERS)} options')
        if any(is_missing(choice) for choice in choices):
            raise Dropped('with an empty option')
        # spaces around an option stay: scorers compare the text as the data set has it
        choices = [c if isinstance(c, str) else as_text(c, 'choices') for c in choices]
        row['choices'] = without_letters(choices)
        right = right_choice(raw, row['choices'])
        if right is not None:
            row['correct_choice_idx'] = right
            row['answer'] = row['choices'][right].strip()
    elif not is_missing(raw.get('answer')):
        row['answer'] = as_text(raw['answer'], 'answer')
    if 'answer' not in row:
        if split != 'test':
            raise Dropped('without a valid correct_choice_idx' if 'choices' in row
                          else 'without an answer')
    else:
        rationales = texts_of(raw, 'rationales')
        if not is_missing(raw.get('steps')):
            one_text = as_items(raw['steps'], 'steps') is None
            steps = texts_of(raw, 'steps')
            steps = cut_steps(steps[0], max_latent_stage) if one_text else steps
        elif steps_from == 'all':
            steps = rationales
        else:
            steps = cut_steps(rationales[0], max_latent_stage) if rationales else []
        row['steps'] = [' '.join(step.split()) for step in steps]  # a step is a line
        source = (rationales or row['steps'] or [''])[0]
        row['explanation'] = next(iter(sentences(source)), '')
        if not is_missing(raw.get('results')):
            row['results'] = texts_of(raw, 'results')
        row.update(edges_of(raw))
    check_text(row)
    return row


def edges_of(raw):
    """{'edges': pairs of names}, the map that a row's steps follow, for experiments/probe.py; given
    as numbers into `idx_to_symbol` in ProsQA's files. {} without one."""
    names, edges = raw.get('idx_to_symbol'), raw.get('edges')
    try:
        pairs = [[names[a], names[b]] if names else [a, b] for a, b in edges]
    except (TypeError, ValueError, LookupError):
        return {}
    return {'edges': pairs} if all(isinstance(n, str) for pair in pairs for n in pair) else {}


def check_text(row):
    """Raises Dropped for what would be taken for one of the prompt's own tokens, or is no text."""
    texts = [row['question'], row.get('answer', ''), *row.get('choices', ()), *row.get('steps', ()),
             row.get('explanation', ''), *row.get('results', ()), *sum(row.get('edges', ()), [])]
    for text in texts:
        for token in RESERVED:
            if token in text:
                raise Dropped(f'whose own text holds {token}')
    try:
        ''.join(texts).encode()
    except UnicodeEncodeError:
        raise Dropped('whose text is not valid Unicode') from None


def read_picture(raw, folders):
    """The bytes of a raw row's image; None without one. image may be bytes, a path, parquet's
    {bytes, path}, or a list of one of these; where it is empty, image_path counts. Raises
    Dropped."""
    value = raw.get('image')
    if isinstance(value, dict):  # a parquet file's struct
        if not {'bytes', 'path'} & value.keys():
            raise Dropped('whose image has neither bytes nor path')
        value = value.get('bytes') or value.get('path')
    if isinstance(value, list):
        value = [one for one in value if not is_missing(one)]
    if is_missing(value) or isinstance(value, (bytes, list)) and not len(value):
        value = raw.get('image_path')
    if isinstance(value, (list, tuple)):
        if len(value) > 1:
            raise Dropped(f'with {len(value)} images, where one is used')
        return read_picture(dict(image=value[0] if value else None), folders)
    if is_missing(value):
        return None
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise Dropped(f'whose image is {type(value).__name__}, not a path or bytes')
    for folder in folders:
        path = os.path.join(folder, value)
        if os.path.isfile(path):
            try:
                with open(path, 'rb') as f:
                    return f.read()
            except OSError as error:
                raise Dropped(f'whose image file cannot be read ({error.strerror})') from None
    raise Dropped(NOT_THERE)


# --- where rows come from -------------------------------------------------------------------------
ENDINGS = ('.json', '.jsonl', '.parquet')
SPLITS = ('train', 'validation', 'test')
SPLIT_WORDS = dict(train='train', validation='validation', valid='validation', val='validation',
                   dev='validation', test='test')


def words_of(path):
    """The words of a file's name, without shard numbers."""
    name = os.path.splitext(os.path.basename(path))[0].lower()
    return re.findall(r'[^\W\d_]+|\d+', re.sub(r'\d+-of-\d+', '', name))


def split_word(path):
    """A file name's last word that says a split, and its words with a gap in that place: of
    own_val_train.jsonl ('train', ['own', 'val', ''])."""
    words = words_of(path)
    places = [i for i, word in enumerate(words) if word in SPLIT_WORDS]
    if not places:
        return '', words
    return words[places[-1]], words[:places[-1]] + [''] + words[places[-1] + 1:]


def only_split_word(name):
    """The word for the only split that a file's or folder's name says; '' for none or several."""
    found = {SPLIT_WORDS[word]: word for word in words_of(name) if word in SPLIT_WORDS}
    return list(found.values())[0] if len(found) == 1 else ''


def find_files(dataset):
    """The files of a local data set: split -> paths. A folder's parquet files, by a whole word of
    the name or of the folder they are in; a single file's companions, which differ from it in that
    word alone. Where val and dev lie side by side only one of the two is used: so files are kept by
    their word, not by their split."""
    # (word, path) of each file; the word of the one that was given
    used, own = [], ''
    if os.path.isdir(dataset):
        pattern = os.path.join(glob.escape(dataset), '**', '*.parquet')
        beside = sorted(glob.glob(pattern, recursive=True))
        for path in beside:
            parent = os.path.relpath(os.path.dirname(path), dataset)
            word = only_split_word(path) or only_split_word(parent)
            if word:
                used.append((word, path))
    else:
        pattern = os.path.join(glob.escape(os.path.dirname(dataset)), '*')
        beside = sorted(path for ending in ENDINGS for path in glob.glob(pattern + ending))
        own, stem = split_word(dataset)
        used = [(split_word(path)[0], path) for path in beside
                if own and split_word(path)[0] and split_word(path)[1] == stem
                and path.endswith(os.path.splitext(dataset)[1])]
        used = used or [('train', dataset)]
    files = {}
    for split in SPLITS:
        words = [w for w in SPLIT_WORDS if SPLIT_WORDS[w] == split and w in dict(used)]
        if words:  # of val and dev the one that was given, else the first
            word = own if own in words else words[0]
            files[split] = [path for w, path in used if w == word]
    chosen = {path for paths in files.values() for path in paths}
    left = [os.path.relpath(path, os.path.dirname(dataset) or '.') for path in beside
            if path not in chosen]
    if left:
        more = ', ...' if len(left) > 3 else ''
        print(f'not used, {len(left)} more files there: {", ".join(left[:3])}{more}')
    return files


def read_json_rows(path):
    """The rows of a .json file, a list, or of a .jsonl file, one a line; either name for either."""
    try:
        with open(path, encoding='utf-8-sig') as f:
            text = f.read()
    except UnicodeDecodeError:
        raise ValueError(f'{path} is not UTF-8 text: save it as UTF-8') from None
    try:
        rows = json.loads(text)
        rows = [rows] if isinstance(rows, dict) and 'question' in rows else rows
    except (ValueError, RecursionError) as whole_file:  # also a number of thousands of digits
        rows = []
        for number, line in enumerate(text.split('\n'), 1):
            try:
                if line.strip():
                    rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                # without one good line it was meant as one JSON text
                reason = f'line {number}: {error}' if rows else str(whole_file)
                raise ValueError(f'{path} is neither a JSON list nor a JSON row a line ({reason})'
                                 ) from None
    is_list = isinstance(rows, list)
    wrong = [i for i, row in enumerate(rows, 1) if not isinstance(row, dict)] if is_list else []
    if wrong or not is_list:
        which = f'row {wrong[0]} is no object' if is_list else f'it is one {type(rows).__name__}'
        raise ValueError(f'{path} is not a list of rows ({which}): expected [{{"question": ..., '
                         '"steps": [...], "answer": ...}, ...] or such a row a line')
    return rows


def read_raw(dataset, data_dir):
    """(split -> sequence of raw rows, folders that their image paths start from) of a JSON or
    parquet file, a folder of parquet files, or a hub id."""
    if dataset.endswith(ENDINGS) and not os.path.isdir(dataset):
        if not os.path.isfile(dataset):
            raise FileNotFoundError(f'no data file {dataset}')
    elif os.path.isfile(dataset):  # of another kind
        raise ValueError(f'{dataset} is not a .jsonl, .json or .parquet file: convert it to one')
    local = os.path.exists(dataset)
    if not local and not re.fullmatch(r'[\w.-]+(?:/[\w.-]+)?', dataset):
        raise FileNotFoundError(f'{dataset} is neither a folder, nor a file, nor a hub id like '
                                'HuggingFaceM4/A-OKVQA')
    files = find_files(dataset) if local else {}
    if local and not files:
        raise ValueError(f'{dataset} holds no train*.parquet, validation*.parquet or test*.parquet '
                         'file: give such a folder, or a .jsonl or .json file')
    folders = [os.path.abspath(dataset), *(os.path.dirname(path) for paths in files.values()
                                           for path in paths)]
    if dataset.endswith(('.json', '.jsonl')) and os.path.isfile(dataset):
        rows = {split: [row for path in paths for row in read_json_rows(path)]
                for split, paths in files.items()}
    else:
        rows = read_arrow(dataset, files, data_dir)
    if 'train' in rows and 'validation' not in rows:
        train = rows['train']
        held = max(1, len(train) // 20)  # 5 %
        if len(train) < 2:
            raise ValueError(f'{dataset} holds {len(train)} row(s) and no validation file stands '
                             'beside it: give two rows or more')
        print(f'no validation rows beside {dataset}: its last {held} rows are held out')
        first_held = len(train) - held
        if isinstance(train, list):
            kept, taken = train[:first_held], train[first_held:]
        else:
            kept = train.select(range(first_held))
            taken = train.select(range(first_held, len(train)))
        rows = {**rows, 'train': kept, 'validation': taken}
    return rows, list(dict.fromkeys(folders))


def read_arrow(dataset, files, data_dir):
    """split -> rows of parquet files, or of a data set of the hub. Images stay bytes."""
    import datasets
    datasets.disable_progress_bars()
    # datasets reads a path as a pattern
    files = {split: [glob.escape(path) for path in paths] for split, paths in files.items()}
    try:
        if files:
            cache = os.path.join(data_dir, 'cache', 'arrow')
            found = {split: datasets.load_dataset('parquet', data_files={split: paths}, split=split,
                                                  cache_dir=cache)
                     for split, paths in files.items()}
        else:
            found = datasets.load_dataset(dataset)
    except Exception as error:  # hub and file readers raise many kinds: the data cannot be had
        raise OSError(f'the data set {dataset} could not be had ({type(error).__name__}): give a '
                      'local folder of its whole parquet files with --dataset=FOLDER, or draw the '
                      'built-in one with config/toy.py') from None
    loaded = {}
    for name, rows in found.items():
        split = SPLIT_WORDS.get(name)
        if split is None or split in loaded:
            print(f'not used, the split {name} of {dataset}')
            continue
        for column, feature in rows.features.items():
            item = getattr(feature, 'feature', None)
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
            elif isinstance(item, datasets.Image):
                rows = rows.cast_column(column, type(feature)(datasets.Image(decode=False)))
            elif isinstance(feature, datasets.ClassLabel) and column in FIELDS:
                names = [None if i is None or i < 0 else feature.names[i] for i in rows[column]]
                rows = rows.remove_columns(column).add_column(column, names)
        loaded[split] = rows
    return loaded


def keep_known_columns(raw, dataset):
    """Says once which columns are not read. Raises ValueError where the rows have no question."""
    columns = {}
    for rows in raw.values():
        names = getattr(rows, 'column_names', None)
        for row in [names] if names else rows:
            columns.update(dict.fromkeys(row))
    unused = [str(column) for column in columns if column not in FIELDS]
    if columns and 'question' not in columns:
        raise ValueError(f'{dataset} has no column question but {", ".join(unused)[:200]}: rows '
                         f'are read by the names {", ".join(FIELDS)}; rename, or convert each '
                         'conversation to such a row')
    if unused:
        print(f'columns not used: {", ".join(unused)}')
    for split, rows in raw.items():
        if hasattr(rows, 'select_columns'):  # what is not read is not decoded either
            raw[split] = rows.select_columns([c for c in rows.column_names if c in FIELDS])


# --- preparing ------------------------------------------------------------------------------------
class Split:
    """The rows of one split on their way: read, checked, and what was dropped with its reason."""

    def __init__(self, raw, split, folders, steps_from, max_latent_stage):
        self.raw, self.split, self.folders = raw, split, folders
        self.rows = []                    # (place in raw, prepared row)
        self.dropped = defaultdict(list)  # reason -> rows
        for i, raw_row in enumerate(tqdm(raw, desc=f'{split}: reading', disable=None)):
            row = dict(question_id=str(i))
            try:
                row['question_id'] = name_of(raw_row) or row['question_id']
                row.update(read_row(raw_row, split, steps_from, max_latent_stage))
                data = read_picture(raw_row, folders)
                if data is not None:
                    kind, size = image_header(data)
                    row.update(ending=kind, image_size=size, bytes=len(data),
                               image_hash=hashlib.sha256(data).hexdigest()[:16])
            except Dropped as error:
                self.drop(str(error), row, raw_row)
            except ValueError as error:
                self.drop('with an unreadable image', row, raw_row, f' ({error})')
            else:
                self.rows.append((i, row))

    def drop(self, reason, row, raw_row=None, more=''):
        path = (raw_row or {}).get('image') or (raw_row or {}).get('image_path')
        path = path.get('path') if isinstance(path, dict) else path
        where = f' ({path[:60]})' if reason == NOT_THERE and isinstance(path, str) else ''
        self.dropped[reason].append(row['question_id'][:40] + where + more)

    def drop_unless(self, condition, reason):
        for _, row in self.rows:
            if not condition(row):
                self.drop(reason, row)
        self.rows = [pair for pair in self.rows if condition(pair[1])]

    def check(self, any_image, any_steps):
        """What can be told only when all rows are known."""
        if any_image:
            self.drop_unless(lambda row: 'ending' in row, 'without the image that other rows have')
        bare = sum(not row['steps'] for _, row in self.rows if 'steps' in row)
        if any_steps and self.split == 'train':
            self.drop_unless(lambda row: row['steps'], 'without steps (nor a rationale), so that '
                             'thoughts have nothing to stand for')
        elif bare:
            print(f'{self.split}: {bare} of {len(self.rows)} rows have no steps: they get the full '
                  'number of thoughts of each stage')
        names = Counter(row['question_id'] for _, row in self.rows)
        name, count = names.most_common(1)[0] if names else ('', 0)
        if count > 1:
            raise ValueError(f'{self.split} holds {count} rows with question_id {name}: every row '
                             'needs one of its own')

    def name_files(self):
        """A file name for each image, short, portable, and of one row alone."""
        taken = set()
        for _, row in self.rows:
            if 'ending' not in row:
                continue
            stem = re.sub(r'\W', '_', row['question_id'], flags=re.ASCII)[:80]
            if stem.lower() in taken:  # another id that differs in case or signs alone
                stem += '-' + hashlib.sha256(row['question_id'].encode()).hexdigest()[:12]
            taken.add(stem.lower())
            row['image'] = f'images/{self.split}/{stem}.{row.pop("ending")}'

    def need(self, folder, image_size, max_tiles, cache_tiles):
        """Bytes that the images and tiles take which are not there from an earlier preparation."""
        total = 0
        for _, row in self.rows:
            if 'image' not in row:
                continue
            if not os.path.isfile(os.path.join(folder, row['image'])):
                total += row['bytes']
            cached = tiles_path(row, folder, self.split, image_size, max_tiles)
            if cache_tiles and not os.path.isfile(cached):
                tiles = count_tiles(*row['image_size'], image_size, max_tiles=max_tiles)
                total += 128 + 3 * image_size ** 2 * tiles  # 128: the header of a .npy file
        return total

    def write_images(self, folder, image_size, max_tiles, cache_tiles):
        kept = []
        for i, row in tqdm(self.rows, desc=f'{self.split}: images and tiles', disable=None):
            row.pop('bytes', None)
            if 'image' in row:
                path = os.path.join(folder, row['image'])
                try:
                    data = read_picture(self.raw[i], self.folders)  # again: memory may not hold all
                    if not holds(path, data):
                        with replacing(path) as part, open(part, 'wb') as f:
                            f.write(data)
                    if cache_tiles:
                        load_tiles(row, folder, self.split, image_size, max_tiles)
                    else:
                        load_image(data)
                except (ValueError, Dropped) as error:
                    if os.path.isfile(path):  # nothing stays of what cannot be read
                        os.remove(path)
                    self.drop('with an unreadable image', row, more=f' ({error})')
                    continue
            kept.append((i, row))
        self.rows = kept

    def report(self):
        for reason, names in self.dropped.items():
            more = ', ...' if len(names) > 3 else ''
            print(f'{self.split}: dropped {len(names)} rows {reason}: {", ".join(names[:3])}{more}')
        if not self.rows:
            raise ValueError(f'{self.split} holds no usable row of {len(self.raw)}: see the '
                             'reasons above, and give another --dataset')
        print(f'{self.split}: {len(self.rows)} rows of {len(self.raw)}')


def holds(path, data):
    """Whether a file has this content."""
    if not os.path.isfile(path) or os.path.getsize(path) != len(data):
        return False
    with open(path, 'rb') as f:
        return f.read() == data


def prepare(raw, folders, data_dir, steps_from, max_latent_stage, image_size, max_tiles,
            cache_tiles):
    """split -> prepared rows: checks all, then writes images and tiles. Says what it dropped and
    why."""
    splits = [Split(rows, split, folders, steps_from, max_latent_stage)
              for split, rows in raw.items()]
    every = [row for split in splits for _, row in split.rows]
    any_image = any('ending' in row for row in every)
    any_steps = any(row.get('steps') for row in every)
    for split in splits:
        split.check(any_image, any_steps)
        split.name_files()
        if not split.rows:
            split.report()  # raises, before anything is written
    need = sum(split.need(data_dir, image_size, max_tiles, cache_tiles) for split in splits)
    free = shutil.disk_usage(data_dir).free
    if need:
        print(f'images and tiles take up to {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free')
    if need > free:
        raise OSError(f'{data_dir} needs {need / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free: '
                      'choose another --data_dir, or --cache_tiles=False, which tiles while '
                      'training')
    for split in splits:
        split.write_images(data_dir, image_size, max_tiles, cache_tiles)
        split.report()
    return {one.split: [row for _, row in one.rows] for one in splits}


def train_tokenizer(texts, folder, vocab_size=512):  # 256 bytes, special tokens, some merges
    """A byte-level BPE tokenizer with InternVL's and Coconut's special tokens, in transformers'
    format."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>', *SPECIAL_TOKENS]))
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token='<|im_end|>', pad_token='<|endoftext|>')
    wrapped.save_pretrained(folder)


def write_splits(prepared, data_dir):
    """Writes the {split}.jsonl files, and removes those that an earlier preparation had left."""
    for split in SPLITS:
        path = split_file(data_dir, split)
        if split in prepared:
            with replacing(path) as part, open(part, 'w', encoding='utf-8') as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in prepared[split])
        elif os.path.isfile(path):
            os.remove(path)
            print(f'removed {path}, which an earlier preparation had left')


if __name__ == '__main__':
    globals().update(configure(globals()))
    if steps_from not in ('first', 'all') or min(image_size, max_tiles, max_latent_stage) < 1:
        raise ValueError(f'steps_from={steps_from!r}, image_size={image_size}, '
                         f'max_tiles={max_tiles}, max_latent_stage={max_latent_stage}: expected '
                         'first or all, and numbers of 1 or more')
    example = dict(question='?', choices=['a', 'b'], correct_choice_idx=0, answer='a')
    for template in (prompt, answer):
        fill(template, example)  # raises where it cannot be filled
    if init_from != 'scratch' and not init_from.endswith('.pt'):
        fetch(init_from)  # into the hub's cache now, so that training needs no network
    try:
        os.makedirs(data_dir, exist_ok=True)
    except OSError as error:
        raise OSError(f'data_dir={data_dir!r} cannot be a folder ({error.strerror}): give '
                      'another') from None
    if dataset in ('toy', 'words', 'prosqa', 'prosqa_full'):
        from experiments import toy
        counts = dict(train=train_rows, validation=val_rows, test=test_rows)
        folders = []
        if dataset == 'toy':
            raw = toy.draw(counts, seed, hops)
        elif dataset == 'words':
            raw = toy.draw_words(counts, seed, hops)
        elif dataset == 'prosqa':
            raw = toy.draw_graphs(counts, seed, nodes)
        else:
            raw = toy.draw_published(counts, seed)
    else:
        source = dataset if os.path.isdir(dataset) else os.path.dirname(os.path.abspath(dataset))
        if os.path.exists(dataset) and os.path.realpath(source) == os.path.realpath(data_dir):
            raise ValueError(f'data_dir={data_dir} is the folder of the data set itself, whose '
                             'files would be overwritten: choose another')
        raw, folders = read_raw(dataset, data_dir)
        keep_known_columns(raw, dataset)
    prepared = prepare(raw, folders, data_dir, steps_from, max_latent_stage, image_size, max_tiles,
                       cache_tiles)
    if init_from == 'scratch':
        if 'train' not in prepared:
            raise ValueError(f'{dataset} has no training rows, and init_from=scratch trains a '
                             'tokenizer on them: give a file or folder with some')
        texts = (text for row in prepared['train']
                 for text in (fill(prompt, row), '\n'.join(row['steps']), fill(answer, row)))
        train_tokenizer(texts, os.path.join(data_dir, 'tokenizer'))
    write_splits(prepared, data_dir)
    print(f'prepared {data_dir}')
