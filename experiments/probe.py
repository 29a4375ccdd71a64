"""
Do the thoughts of a checkpoint carry the answer, and what do they say? Data, texts and stage are
the checkpoint's.

    python -m experiments.probe --ckpt=out-toy/best.pt --intervene=all,patch,rewrite
    python -m experiments.probe --ckpt=out-pause/best.pt --compare=out-toy

--intervene names changes, separated by commas; a name without its K stands for every K:

    zero           every thought is 0
    noise          every thought is a random direction of its own norm
    mean           thought k is the mean thought k of the split
    swap           all thoughts of the next row, as that has them when left alone
    image          the next row's image, with the row's own question: do the answers need the image?
    drop_last_K    the last K thoughts are 0
    early_K        K thoughts: a model that still knows earlier stages writes the missing steps
    all            all of these
    patch_K        thought K of the nearest row below whose step there arrives elsewhere; for rows
                   with a map (`edges`, one way out of each place), on which the chain goes on
    same_K         the control: of the nearest row below whose step there arrives at the same place
    rewrite_K      patch_K without a donor's thought: the own one, plus the mean over the validation
                   rows that arrive where the donor does, minus that of those that arrive where the
                   own chain does. Beside it rewrite_half_K and rewrite_twice_K of this difference,
                   rewrite_random_K, a direction of its length, rewrite_mean_K, the first mean alone
    transplant     the next row's image, with the row's own thoughts
    blind          nothing behind the last thought sees the image: only thoughts and text are left
    twins          the options in another order: accuracy, and by which share of their length the
                   thoughts `moved`; twins_thoughts is the own order with all thoughts of the other:
                   of letters, predicted is the one written there, old the one written here

A thought that can be replaced without loss carries nothing. Where a change predicts an answer
(swap: the donor's; image: where that leads; patch, rewrite: where the own map leads from the new
place; transplant, same: the own one), `predicted`, `old` and `neither` are the shares of rows that
write it, the right one, another, and `before` of those that wrote it when left alone; p is
McNemar's, exact. --compare names out_dirs of other runs.

Writes beside the checkpoint probe_{split}.json, one record a change, thoughts_{split}.json and
.png, what the thoughts say, and patch_{K}_{split}.png, the first row's chains for each patch.
"""
import json
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from configurator import configure
from experiments.curves import plt
from model import MultiCoCo, load_checkpoint
from prepare import LETTERS, Rows, digest, fitting_rows, load_image, read_split, row_knobs_of
from prepare import write_file
from sample import ask, describe, pick_device, pick_dtype, summarize

# --- knobs ----------------------------------------------------------------------------------------
ckpt = 'out/best.pt'
intervene = 'swap'              # changes, see above; '' for none
compare = ''                    # out_dirs of other runs, separated by commas
split = ''                      # '' for test, or for validation where test has no answers
data_dir = ''                   # '' for the checkpoint's
eval_batch_size = 0             # 0 for the checkpoint's, and so below
max_new_tokens = 0
num_workers = 0
device = 'auto'                 # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'                  # 'auto', 'float32', 'bfloat16' (autocast)
threads = 0                     # CPU threads; 0 for the checkpoint's

ONCE = ('zero', 'noise', 'mean', 'swap', 'image', 'transplant', 'blind', 'twins')
FOR_EACH = ('drop_last', 'early', 'patch', 'same', 'rewrite')
COLUMNS = ('accuracy', 'tokens_per_answer', 'only_clean', 'only_changed', 'p', 'predicted',
           'before', 'old', 'neither', 'rows_predicted')
ALL = 'zero,noise,mean,swap,image,drop_last,early'


# --- changes --------------------------------------------------------------------------------------
class Probed(MultiCoCo):
    """Keeps what the loop held, and may be blind: nothing behind a row's last thought then sees the
    image, so that what is written has the thoughts and the text alone to go by."""
    blind = False
    last_places = 0             # of a prompt without thoughts: how many last states stand for them

    def think(self, x, layout, edit_thought=None):
        is_thought = layout.ids == self.config.latent_token_id
        self.last_thought = torch.where(is_thought, layout.position, -1).amax(1)    # [B]
        self.is_image = layout.ids == self.config.image_token_id                    # [B, S]
        hidden, thoughts, cache = super().think(x, layout, edit_thought)
        place = layout.length.cumsum(1)[:, :-1] - 1     # [B, n], the positions before each thought
        if self.last_places:
            place = torch.arange(-self.last_places, 0, device=x.device)
            place = place + layout.length.sum(1, keepdim=True)
        rows = torch.arange(len(x), device=x.device)[:, None]
        states = hidden[rows, layout.slot.gather(1, place)]
        self.kept = thoughts.float().cpu(), states.float().cpu()  # [B, n, D]: fed back; before feed
        return hidden, thoughts, cache

    def decode(self, x, position, mask=None, cache=None):
        if self.blind and mask is not None:  # there is none before the first thought
            image = F.pad(self.is_image, (0, mask.shape[-1] - self.is_image.shape[1]))
            behind = position > self.last_thought[:, None]                          # [B, L]
            mask = mask & ~(behind[:, None, :, None] & image[:, None, None])
        return super().decode(x, position, mask, cache)


def expand(intervene, n=0):
    """[(kind, K), ...] that --intervene names, for answers with n thoughts; K is 0 for no K."""
    found = []
    for name in re.findall(r'[^\s,]+', re.sub(r'\ball\b', ALL, intervene)):
        kind, number = re.fullmatch(r'(.+?)_?(\d*)', name).groups()
        if name not in ONCE and kind not in FOR_EACH:
            raise SystemExit(f'--intervene={name}: there is no such change, see --help')
        numbers = range(n) if kind == 'early' else range(1, n + 1)
        if name in ONCE or number:
            numbers = [int(number or 0)]
        found += [(kind, k) for k in numbers]
    return found


def replace(kind, number, thoughts, given=None):
    """A change as a function: places of a batch's rows in the split -> an `edit_thought`. thoughts
    float32 [R, n, D]: those of all rows when left alone; given: what is fed back instead, where the
    kind alone does not say it. A row keeps its own where either is 0, as where it has fewer."""
    R, n, D = thoughts.shape
    where, k = thoughts.any(-1), torch.arange(n)                                # [R, n], [n]
    if kind == 'noise':
        given = torch.randn(R, n, D, generator=torch.Generator().manual_seed(1))
        given = F.normalize(given, dim=-1) * thoughts.norm(dim=-1, keepdim=True)
    elif kind == 'mean':
        given = (thoughts.sum(0) / where.sum(0)[:, None].clamp(min=1)).expand(R, -1, -1)
    elif kind in ('zero', 'drop_last'):
        given = torch.zeros_like(thoughts)
        where = where & (k >= where.sum(1, keepdim=True) - (number or n))
    else:
        where = where & given.any(-1) & (k == number - 1 if number else k >= 0)

    def change(places):
        new, chosen = given[places], where[places]

        def edit(k, thought):
            if k > n:
                return thought  # the model wrote this <|latent|> itself
            here = chosen[:, k - 1, None].to(thought.device)
            return torch.where(here, new[:, k - 1].to(thought), thought)
        return edit
    return change


def rewrites(number, step, thoughts, rows, donors, predicted, known, known_rows):
    """Name -> thoughts [R, n, D] by which the step of each row would arrive where its donor's does.
    The means are taken of the thoughts `known` of known_rows; where these lack one of the two
    places, the thoughts are 0, and what is `predicted` becomes None."""
    found, own = {}, thoughts[:, number - 1]
    for thought, row in zip(known[:, number - 1], known_rows):
        found.setdefault(places_of(row)[step - 1:step], []).append(thought)
    means = {place: torch.stack(held).mean(0) for place, held in found.items()}
    mean, difference = torch.zeros_like(own), torch.zeros_like(own)             # [R, D]
    for i, donor in enumerate(donors.tolist()):
        here, there = (places_of(row)[step - 1:step] for row in (rows[i], rows[donor]))
        if here in means and there in means:
            mean[i], difference[i] = means[there], means[there] - means[here]
        else:
            predicted[i] = None
    random = torch.randn(own.shape, generator=torch.Generator().manual_seed(number))
    random = F.normalize(random, dim=-1) * difference.norm(dim=-1, keepdim=True)
    new = dict(rewrite=own + difference, rewrite_half=own + difference / 2,
               rewrite_twice=own + 2 * difference, rewrite_random=own + random, rewrite_mean=mean)
    return {f'{name}_{number}': (thought * mean.any(-1, keepdim=True))[:, None].expand_as(thoughts)
            for name, thought in new.items()}


def with_other_images(rows):
    """Each row with the image of the next one, and the map that it shows."""
    keys = ('image', 'image_size', 'image_hash', 'edges')
    return [dict(row, **{key: other.get(key) for key in keys})
            for row, other in zip(rows, rows[1:] + rows[:1])]


# --- predicted answers ----------------------------------------------------------------------------
def places_of(row):
    """The places that a row's chain arrives at, one a step: its `results`, or in Coconut's format
    the last words of its steps."""
    if row.get('results') or row.get('choices'):
        return tuple(row.get('results') or ())
    words = [re.findall(r'\w+', step) for step in row.get('steps') or ()]
    return tuple(found[-1] for found in words if found)


def way(row, place, steps):
    """[place, where a step leads from there on the row's own map, ...]; None for no single one."""
    places = [place]
    for _ in range(steps):
        ahead = [target for source, target in row.get('edges') or () if source == places[-1]]
        places.append(ahead[0] if len(ahead) == 1 else None)
    return places


def patches(rows, step, same=False):
    """For each row a donor, the nearest row below whose chain is elsewhere after this step, or if
    same at the same place, and the answer that this predicts: (int64 [R], R answers). None where a
    row has no donor or no map, or where the chain from elsewhere ends at the same place."""
    donors, predicted = torch.arange(len(rows)), [None] * len(rows)
    for i, row in enumerate(rows):
        own = places_of(row)
        for j in range(i + 1, i + len(rows)):
            other = places_of(rows[j % len(rows)])
            if min(len(own), len(other)) < step or (other[step - 1] == own[step - 1]) != same:
                continue
            end = way(row, other[step - 1], len(own) - step)[-1]
            if end and (end == own[-1]) == same:
                donors[i], predicted[i] = j % len(rows), end
                break
    return donors, predicted


def says(found, name):
    """Whether a name is a word of an answer's last line."""
    return name in re.findall(r'\w+', found['text'].strip().rpartition('\n')[2])


def outcomes(answers, clean, predicted, own):
    """Shares of answers that say the predicted name, their own one, another, of rows that have both
    (not None); p, beside the clean answers, which say what is predicted where that is right."""
    rows = [i for i, names in enumerate(zip(predicted, own)) if all(names)]
    if not rows:
        return {}
    new, before = ([says(told[i], predicted[i]) for i in rows] for told in (answers, clean))
    old = [says(answers[i], own[i]) and own[i] != predicted[i] for i in rows]
    shares = [sum(told) / len(rows) for told in (new, old)]
    return dict(predicted=shares[0], before=sum(before) / len(rows), old=shares[1],
                neither=1 - sum(shares), rows_predicted=len(rows),
                p_predicted=pair(new, before)[2])


def pair(right, other):
    """Of two lists of whether a row is right: how many rows only one has right, how many only the
    other, and McNemar's two-sided exact p."""
    one = sum(a > b for a, b in zip(right, other))
    two = sum(a < b for a, b in zip(right, other))
    tail = sum(math.comb(one + two, i) for i in range(min(one, two) + 1))
    return one, two, min(1.0, 2 * tail / 2 ** (one + two))


def columns(values):  # a line of a table
    texts = [f'{one:.4g}' if isinstance(one, float) else str(one) for one in values]
    return ' '.join(f'{text:>12.12}' for text in texts).replace('\n', '.')


# --- what thoughts say ----------------------------------------------------------------------------
@torch.no_grad()
def say(model, states):
    """States [M, D] through the head, a few at a time: yields M probabilities float32 [V]."""
    weight = model.language_model.lm_head.weight
    for part in states.split(64):
        yield from F.linear(part.to(weight), weight).float().softmax(-1).cpu()


def read(model, tokenizer, states, rows):
    """One dict for each of the n thoughts, from the states [R, n, D] that they are made of, 0 where
    a row has fewer: what it says through the head most often, and in which share of rows; entropy;
    norm, and beside that of an embedding; cosine with the thought before, and with the same one of
    the previous row; for each step, in which share of rows it names the place that is reached, and
    with which probability. Means over the rows that have it."""
    chains, first, table = [places_of(row) for row in rows], {}, []
    for name in {name for chain in chains for name in chain}:
        ids = {tokenizer.encode(text, add_special_tokens=False)[0] for text in (name, f' {name}')}
        first[name] = [token for token in ids if tokenizer.decode([token]).strip()]
    usual = model.language_model.model.embed_tokens.weight.detach().float().norm(dim=-1).mean()
    for k in range(states.shape[1]):
        having = states[:, k].any(-1).nonzero()[:, 0].tolist()  # rows with such a thought
        own, tops, entropy = states[having, k], [], 0.0
        hits, mass, counts = np.zeros((3, max(map(len, chains))))  # of each step
        for i, p in zip(having, say(model, own)):
            entropy += torch.special.entr(p).sum().item() / math.log(2) / len(having)
            tops.append(int(p.argmax()))
            for j, name in enumerate(chains[i]):
                counts[j] += 1
                hits[j] += tops[-1] in first[name]
                mass[j] += p[first[name]].sum().item()
        common, norm = max(set(tops), key=tops.count), own.norm(dim=-1).mean().item()
        before = F.cosine_similarity(own, states[having, k - 1]).mean().item() if k else None
        table.append(dict(
            thought=k + 1, says=tokenizer.decode([common]), share=tops.count(common) / len(tops),
            entropy_bits=entropy, norm=norm, norm_ratio=norm / usual.item(), cosine_before=before,
            cosine_rows=F.cosine_similarity(own, own.roll(1, 0)).mean().item(),
            names_step=(hits / counts.clip(1)).tolist(),
            mass_on_step=(mass / counts.clip(1)).tolist()))
    return table


# --- pictures -------------------------------------------------------------------------------------
plt.rcParams['text.parse_math'] = False  # $ is a dollar


def draw_thoughts(path, model, tokenizer, states, rows, table):
    """Probabilities by thought: of tokens in one row, and of the steps' results over all rows."""
    row = int(states.any(-1).sum(1).argmax())  # one with as many thoughts as there are
    p = torch.stack([*say(model, states[row])])                                 # [n, V]
    tokens = p.max(0).values.topk(10).indices
    names = [ascii(tokenizer.decode([token])).strip("'").replace(' ', '·') for token in tokens]
    mass = torch.tensor([t['mass_on_step'] for t in table])                     # [n, steps]
    names += [f'step {j + 1}' for j in range(mass.shape[1])]
    values = torch.cat((p[:, tokens], mass), 1)
    figure, axis = plt.subplots(figsize=(9, 3.6), layout='constrained')
    axis.imshow(values, cmap='Blues', vmin=0, vmax=1, aspect='auto')
    axis.axvline(len(tokens) - 0.5, color='black')
    axis.set_xticks(range(len(names)), names, rotation=45, ha='right')
    axis.set_yticks(range(len(values)), [f'thought {k + 1}' for k in range(len(values))])
    axis.set_title(f'Tokens: {rows[row]["question"][-60:]!r}  Steps: means of all rows', fontsize=9)
    for k, j in (values >= 0.005).nonzero().tolist():
        axis.text(j, k, f'{values[k, j]:.2f}', ha='center', va='center', fontsize=7,
                  color='white' if values[k, j] > 0.5 else 'black')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_patch(path, row, number, step, place, texts, image=None, c_thought=1):
    """A row's chain, with the first thought of each place, and how it goes on where the thought
    `number` was exchanged, so that its step arrives at `place`. texts: the two answers."""
    start, places = re.findall(r'\w+', row['question'])[-1], places_of(row)
    chain = [start if way(row, start, 1)[-1] == places[0] else '', *places]
    figure, (left, axis) = plt.subplots(
        1, 2, figsize=(9, 2.7), width_ratios=[1, 3], layout='constrained',
        subplot_kw=dict(frame_on=False, xticks=[], yticks=[]))
    if image:
        left.imshow(image, interpolation='nearest')
    turned = way(row, place, len(chain) - 1 - step)
    for y, places, first, ink in ((1, chain, 0, 'black'), (0, turned, step, 'tab:red')):
        for x, name in enumerate(places, first):
            known = plt.matplotlib.colors.is_color_like(name)
            axis.scatter(x, y, s=900, color=name if known else 'lightgrey', edgecolors='black')
            label = name
            if x > first:
                label += f'\nthought {1 + (x - 1) * c_thought}' if y else '\nexpected'
                axis.annotate('', (x - 0.2, y), (x - 0.8, y), arrowprops=dict(arrowstyle='->'))
            axis.text(x, y - 0.27, label, ha='center', va='top', fontsize=9)
        axis.text(len(chain) - 0.6, y, f'written: {texts[1 - y][-20:]!r}', va='center', color=ink)
    source = 'another image' if image else 'another row'
    axis.annotate(f'thought {number} of\n{source}', (step - 0.2, 0), (step - 0.9, 0), ha='right',
                  va='center', color='tab:red', arrowprops=dict(arrowstyle='->', color='tab:red'))
    options = [f'{letter} {option}' for letter, option in zip(LETTERS, row.get('choices') or ())]
    axis.set_title('     '.join([row['question'][-60:], *options]), fontsize=10)
    axis.set(xlim=(-0.5, len(chain) + 1), ylim=(-0.7, 1.35))
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == '__main__':
    configure(globals())
    expand(intervene)
    model, tokenizer, saved = load_checkpoint(ckpt, kind=Probed)
    assert 'knobs' in saved, f'{ckpt} is no .pt of train.py, which knows its data'
    knobs, stage, out_dir = saved['knobs'], saved['stage'], Path(ckpt).parent
    torch.set_num_threads(threads or knobs['threads'] or torch.get_num_threads())
    device = pick_device(device)
    model.to(device)
    dtype = pick_dtype(dtype, device, on_cpu=knobs['dtype'] == 'bfloat16')
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16')
    data_dir = data_dir or knobs['data_dir']
    eval_batch_size = eval_batch_size or knobs['eval_batch_size']
    max_new_tokens = max_new_tokens or knobs['max_new_tokens']
    labelled = Path(data_dir, 'test.jsonl').exists() and 'answer' in read_split(data_dir, 'test')[0]
    split = split or ('test' if labelled else 'validation')
    row_knobs = row_knobs_of(dict(knobs, data_dir=data_dir), tokenizer, model.config)
    limit = model.config.max_position_embeddings - max_new_tokens
    row_knobs['max_length'] = min(row_knobs['max_length'], limit)

    def answers_to(rows, change=None, batch_size=eval_batch_size, **text):
        """Metrics and answers of rows, their thoughts as fed back and the states that these are
        made of [R, n, D]. change: see `replace`; text: knobs of Rows unlike the checkpoint's."""
        groups = np.array_split(range(len(rows)), math.ceil(len(rows) / batch_size))
        asked = Rows(rows, stage=stage, supervised=False,
                     **{**row_knobs, 'split': split, 'max_length': limit, **text})
        loading = dict(num_workers=num_workers, pin_memory=device == 'cuda')
        answers, thoughts, states, seconds = [], [], [], 0.0
        for _, found, took in ask(model, tokenizer, asked, groups, knobs['answer'], autocast,
                                  loading, change, max_new_tokens=max_new_tokens):
            answers += found
            seconds += took
            thoughts += model.kept[0]
            states += model.kept[1]
        return (summarize(answers, seconds), answers, pad_sequence(thoughts, batch_first=True),
                pad_sequence(states, batch_first=True))

    def try_out(name, asked, change=None, predicted=None, old=None, **text):
        """Asks rows with a change, prints a line of the table and keeps the record."""
        metrics, answers, fed_back, _ = answers_to(asked, change, **text)
        lost, won, p = pair(right, [found['right'] for found in answers])
        record = dict(name=name, clean=records[0]['accuracy'], rows=len(rows), p=p,
                      only_clean=lost, only_changed=won, **metrics)
        record.update(outcomes(answers, clean_answers, predicted or [], old or own))
        print(f'{name:17}', columns(record.get(key, '') for key in COLUMNS), flush=True)
        records.append(record)
        return record, answers, fed_back

    # --- left alone -------------------------------------------------------------------------------
    rows = fitting_rows(split, stage, **row_knobs)
    own = [(places_of(row) or (None,))[-1] for row in rows]  # where each chain ends
    if knobs['mode'] == 'no_thoughts':
        model.last_places = min(stage, knobs['max_latent_stage']) * knobs['c_thought']
    metrics, clean_answers, thoughts, states = answers_to(rows)
    assert 'accuracy' in metrics, f'{split} of {data_dir} has no answers: give another --split'
    n, right = thoughts.shape[1], [found['right'] for found in clean_answers]
    states[:, :n] *= thoughts.any(-1, keepdim=True)  # 0 where a row has fewer
    for size in (1, min(32, eval_batch_size)):
        seconds = answers_to(rows[:64], batch_size=size)[0]['seconds_per_answer']
        metrics[f'seconds_per_answer_batch_{size}'] = seconds
    print(f'{split}: {describe(metrics)}', flush=True)
    records = [dict(name='clean', clean=metrics['accuracy'], rows=len(rows), p=1.0, **metrics)]
    for folder in filter(None, compare.split(',')):
        theirs = json.loads(Path(folder, f'answers_{split}.json').read_text())
        assert theirs['data'] == digest(data_dir, split), f'{folder} was asked other rows'
        theirs = {found['question_id']: found['right'] for found in theirs['answers']}
        here, there, p = pair(right, [theirs[found['question_id']] for found in clean_answers])
        print(f'{here} rows are right here alone, {there} in {folder} alone, McNemar p = {p:.2g}')
        records.append(dict(name=f'compare {folder}', accuracy=metrics['accuracy'],
                            clean=sum(theirs.values()) / len(theirs), rows=len(rows), p=p,
                            only_here=here, only_there=there))

    # --- what the thoughts say --------------------------------------------------------------------
    if states.numel():
        table = read(model, tokenizer, states, rows)
        print(columns([*table[0]][:-2]), '  names step 1, 2, ...')
        for thought in table:
            *values, names, _ = thought.values()
            print(columns(values), columns(names))
        write_file(out_dir / f'thoughts_{split}.json', json.dumps(table, indent=1).encode())
        draw_thoughts(out_dir / f'thoughts_{split}.png', model, tokenizer, states, rows, table)

    # --- what changing them does ------------------------------------------------------------------
    print(f'{"change":17}', columns(COLUMNS))
    known_rows = []             # of rewrite's means
    for kind, number in expand(intervene, n):
        name = f'{kind}_{number}' if kind in FOR_EACH else kind
        asked, given, predicted = rows, thoughts, None
        text = dict(num_thoughts=number) if kind == 'early' else {}
        model.blind = kind == 'blind'
        needs = dict(image='image', transplant='image', twins='choices').get(kind, 'question')
        possible = all(row.get(needs) for row in rows) and (
            kind in ('image', 'early') or n >= max(1, number))
        if kind in ('image', 'transplant') and possible:
            asked, predicted = with_other_images(rows), own
        if kind == 'image' and possible:
            predicted = [way(row, re.findall(r'\w+', row['question'])[-1], len(places_of(row)))[-1]
                         for row in asked]
        elif kind == 'swap':
            given, predicted = thoughts.roll(-1, 0), own[1:] + own[:1]
        elif kind in ('patch', 'same', 'rewrite') and possible:
            step = math.ceil(number / knobs['c_thought'])
            donors, predicted = patches(rows, step, kind == 'same')
            possible, given = any(predicted), thoughts[donors]
        elif kind == 'twins' and possible:
            asked = [dict(row, choices=row['choices'][1:] + row['choices'][:1],
                          correct_choice_idx=(row['correct_choice_idx'] - 1) % len(row['choices']))
                     for row in rows]
        if not possible:
            print(f'{name} left out: these rows lack what it needs (thoughts, images, a map)')
            continue
        changed = {name: given}
        if kind == 'rewrite':
            if not known_rows:
                known_rows = fitting_rows('validation', stage, **row_knobs)
                known = answers_to(known_rows, split='validation')[2]
            changed = rewrites(number, step, thoughts, rows, donors, predicted, known, known_rows)
        for name, given in changed.items():
            plain = kind in ('image', 'early', 'blind', 'twins')
            change = None if plain else replace(kind, number, thoughts, given)
            record, answers, fed_back = try_out(name, asked, change, predicted, **text)
        if kind == 'patch':
            i = min(i for i, place in enumerate(predicted) if place is not None)
            image = rows[i].get('image') and load_image(f'{data_dir}/{rows[i]["image"]}')
            texts = clean_answers[i]['text'], answers[i]['text']
            draw_patch(out_dir / f'{name}_{split}.png', rows[i], number, step,
                       places_of(rows[donors[i]])[step - 1], texts, image, knobs['c_thought'])
        if kind == 'twins':
            moved = (fed_back - thoughts).norm(dim=-1) / thoughts.norm(dim=-1)      # [R, n]
            record['moved'] = moved.nanmean(0).tolist()
            print('  its thoughts move by', columns(record['moved']), 'of their length')
            letters = [[found['parsed'] and LETTERS[found['choice']] for found in told]
                       for told in (clean_answers, answers)]
            differ = [other != one and other for one, other in zip(*letters)]
            change = replace(kind, 0, thoughts, fed_back)
            try_out('twins_thoughts', rows, change, differ, letters[0])
    write_file(out_dir / f'probe_{split}.json', json.dumps(records, indent=1).encode())
