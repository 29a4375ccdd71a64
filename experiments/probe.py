"""
Do the thoughts of a checkpoint carry the answer, and what do they say? Data, texts and stage are
the checkpoint's.

    python -m experiments.probe --ckpt=out-toy/best.pt --intervene=all,patch
    python -m experiments.probe --ckpt=out-pause/best.pt --compare=out-toy

--intervene names changes, separated by commas; each is applied to every row of the split, its
accuracy printed beside the clean one's:

    zero           every thought is 0
    noise          every thought is a random direction of its own norm
    mean           thought k is the mean thought k of the split
    swap           thought k is thought k of the next row, as that has it when left alone; its own
                   where that has fewer
    image          the next row's image, with the row's own question: do the answers need the image?
    drop_last_K    the last K thoughts are 0; drop_last_k for every K
    early_K        every row is given K thoughts, early for every K below n: a model that still
                   knows earlier stages then writes the steps that are missing, so read the tokens.
                   `arrives`: shares of the rows whose answer names where step 1, 2, ... leads
    all            all of these
    patch_K        thought K is thought K of the nearest row below whose step there arrives
                   elsewhere; patch for every K. Only for rows with a map (`edges`, one way out of
                   each place): it predicts the answer, the chain continued on the row's own map
    same_K         the control: thought K of the nearest row below whose step there arrives at the
                   same place; same for every K. It predicts the row's own answer
    transplant     the next row's image, with the row's own thoughts
    blind          nothing behind the last thought sees the image: only thoughts and text are left

A thought that can be replaced without loss carries nothing. Where a change predicts an answer
(swap: the donor's; image: where that leads; transplant: the row's own; patch_K and same_K: see
there) the record also has `predicted`, `old` and `neither`: shares of the rows that write the
predicted answer, the right one, another.
--compare names the out_dirs of other runs over the same rows, separated by commas: McNemar's exact
test asks whether the rows that only one of two runs has right fall to either side as a fair coin
does.

Writes beside the checkpoint probe_{split}.json, one record a change (name, accuracy, clean, rows,
p, ...), thoughts_{split}.json and .png, what the thoughts say, and for each patch a picture of the
first row's two chains, patch_{K}_{split}.png.
"""
import json
import math
import os
import re
from collections import Counter
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F

from configurator import configure
from model import load_checkpoint
from prepare import LETTERS, Rows, digest, fitting_rows, frame_of, load_image, read_split
from prepare import replacing, split_file
from sample import ask, describe, pick_device, pick_dtype, summarize

# --- knobs ----------------------------------------------------------------------------------------
ckpt = 'out/best.pt'
intervene = 'swap'              # changes, see above; '' for none
compare = ''                    # out_dirs of runs over the same questions, for paired tests
split = ''                      # '' for test, or for validation where test has no labels
data_dir = ''                   # '' for the checkpoint's
eval_batch_size = 0             # 0 for the checkpoint's, and so below
max_new_tokens = 0
num_workers = 0
device = 'auto'                 # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'                  # 'auto', 'float32', 'bfloat16' (autocast)
threads = 0                     # CPU threads; 0 for the checkpoint's

FORM = re.compile(r'zero|noise|mean|swap|image|transplant|blind|(drop_last|early|patch|same)_(\d+)')


# --- interventions --------------------------------------------------------------------------------

def expand(intervene, n=0):
    """The changes that --intervene names, for answers with n thoughts. ValueError where it names
    none of the above."""
    names = [name.strip() for name in intervene.split(',') if name.strip()]
    every = dict(all=['zero', 'noise', 'mean', 'swap', 'image', 'drop_last_k', 'early'])
    names = [one for name in names for one in every.get(name, [name])]
    every = dict(drop_last_k=[f'drop_last_{k}' for k in range(1, n + 1)],
                 early=[f'early_{k}' for k in range(n)],
                 patch=[f'patch_{k}' for k in range(1, n + 1)],
                 same=[f'same_{k}' for k in range(1, n + 1)])
    for name in names:
        if name not in every and not FORM.fullmatch(name):
            raise ValueError(f'intervene={name!r}: expected zero, noise, mean, swap, image, '
                             'drop_last_3, drop_last_k, early_3, early, patch_3, patch, '
                             'same_3, same, transplant, blind or all')
    return [one for name in names for one in every.get(name, [name])]


def number_of(name, kind):
    """3 of 'drop_last_3' for kind 'drop_last'; 0 for another kind."""
    return int(name.removeprefix(f'{kind}_')) if name.startswith(f'{kind}_') else 0


def record(thoughts):
    """A change that changes nothing, but writes every thought into float32 [R, n, D], R the rows of
    the split. What it writes where a row has fewer than n thoughts means nothing."""
    def change(places):
        def edit(k, thought):
            if k <= thoughts.shape[1]:
                thoughts[places, k - 1] = thought.float().cpu()
            return thought
        return edit
    return change


def replace(name, thoughts, donors=None):
    """The change `name` as a function: places of a batch's rows in the split -> an `edit_thought`.
    `thoughts` [R, n, D] are those of all rows when left alone, 0 where a row has fewer than n.
    donors: int64 [R], the row that each takes thoughts from; by default the next one."""
    R, n, _ = thoughts.shape
    has_thought = thoughts.any(-1)                                              # [R, n]
    count = has_thought.sum(1)                                                  # [R]
    mean = thoughts.sum(0) / has_thought.sum(0).clamp(min=1)[:, None]           # [n, D]
    dropped = n if name == 'zero' else number_of(name, 'drop_last')
    # the one thought that is replaced; 0 for every one
    only = number_of(name, 'patch') or number_of(name, 'same')
    donors = (torch.arange(R) + 1) % max(R, 1) if donors is None else donors

    def noise_like(k, thought, places):
        generators = [torch.Generator().manual_seed(int(p) * n + k) for p in places]
        noise = torch.stack([torch.randn(thought.shape[1], generator=g) for g in generators])
        noise = noise.to(thought)  # the same whatever the batch
        return noise * thought.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)

    def changed(k, thought, places):
        if name == 'noise':
            return noise_like(k, thought, places)
        if name == 'mean':
            return mean[k - 1].expand(len(places), -1).to(thought)
        if name in ('swap', 'transplant') or only:
            given = thoughts[donors[places], k - 1].to(thought)
            return torch.where(given.any(-1, keepdim=True), given, thought)
        return torch.where((k > count[places] - dropped)[:, None].to(thought.device), 0, thought)

    def change(places):
        places = torch.tensor(places)

        def edit(k, thought):
            if k > n or only and k != only:
                return thought
            own = (k <= count[places])[:, None].to(thought.device)
            # beyond these are those that the model wrote itself
            return torch.where(own, changed(k, thought, places), thought)
        return edit
    return change


def with_other_images(rows):
    """Each row with the image of the next one that has an image of its own; rows without an image
    are left out."""
    rows = [row for row in rows if row.get('image')]
    keys = ('image', 'image_size', 'image_hash', 'edges')
    return [{**row, **{key: other[key] for key in keys if key in other}}
            for row, other in zip(rows, rows[1:] + rows[:1])]


@contextmanager
def hidden_image(model):
    """Within this, nothing behind a row's last thought sees the image: what is written has the
    thoughts and the text alone to go by. The model's masks are narrowed on the way in. Rows have
    thoughts, and all stay in the batch (as generate keeps them where there is a hook)."""
    think, decode, state = model.think, model.decode, {}

    def note_places(x, layout, edit_thought=None):
        state['image'] = layout.ids == model.config.image_token_id              # [B, S]
        is_thought = layout.ids == model.config.latent_token_id
        state['last'] = torch.where(is_thought, layout.position, -1).amax(1)    # [B]
        return think(x, layout, edit_thought)

    def narrowed(x, position, mask, *rest, **more):
        if mask is not None:
            image = state['image'][:, :mask.shape[-1]]
            image = F.pad(image, (0, mask.shape[-1] - image.shape[1]))          # [B, slots]
            behind = position > state['last'][:, None]                          # [B, L]
            mask = mask & ~(behind[:, None, :, None] & image[:, None, None])
        return decode(x, position, mask, *rest, **more)

    model.think, model.decode = note_places, narrowed
    try:
        yield
    finally:
        del model.think, model.decode


# --- predicted answers ----------------------------------------------------------------------------

def places_of(row):
    """The places that a row's chain arrives at, one a step: its `results`, or in Coconut's format
    the last words of its steps."""
    if row.get('results') or row.get('choices'):
        return row.get('results') or []
    return [
        re.findall(r'\w+', step)[-1] for step in row.get('steps') or () if re.search(r'\w', step)
    ]


def followed(row, place, steps):
    """The places that so many steps from `place` arrive at on the row's own map; None where it has
    no single way on."""
    ways, places = {}, []
    for source, target in row.get('edges', ()):
        ways.setdefault(source, []).append(target)
    for _ in range(steps):
        if len(ways.get(place, ())) != 1:
            return None
        place = ways[place][0]
        places.append(place)
    return places


def continued(row, step, place):
    """Where a row's chain ends if its step (1 for the first) arrives at `place`: the row's own map
    is followed for the steps that are left. None where the map has no single way on."""
    places = followed(row, place, len(places_of(row)) - step)
    return None if places is None else [place, *places][-1]


def patches(rows, step, same=False):
    """For each row a donor, the nearest row below whose chain is elsewhere after this step, or if
    same at the same place, and the answer that this predicts: (int64 [R], R answers). None where a
    row has no donor or no map, or where the chain from elsewhere ends at the same place."""
    donors, predicted = [], []
    for i, row in enumerate(rows):
        donor, answer = i, None
        for j in range(1, len(rows)):
            own, other = places_of(row), places_of(rows[(i + j) % len(rows)])
            if min(len(own), len(other)) < step:
                continue
            end = continued(row, step, other[step - 1])
            elsewhere = other[step - 1] != own[step - 1] and end != own[-1]
            at_own = other[step - 1] == own[step - 1] and end == own[-1]
            if end is not None and (at_own if same else elsewhere):
                donor, answer = (i + j) % len(rows), end
                break
        donors.append(donor)
        predicted.append(answer)
    return torch.tensor(donors), predicted


def predict(name, own, asked):
    """What each row writes if a change does what its name says, one a row, None where nothing is
    predicted. own: where each row's chain ends; asked: the rows as they are asked."""
    if name == 'swap':
        return own[1:] + own[:1]
    if name == 'transplant':
        return own
    if name == 'image':
        places = [re.findall(r'\w+', row['question'])[-1:] or [''] for row in asked]
        return [continued(row, 0, place) for row, (place,) in zip(asked, places)]
    return None


def says(found, name):
    """Whether the last line of an answer begins with a name, or ends with it."""
    words = re.findall(r'\w+', found['text'].strip().split('\n')[-1])
    return bool(words) and name in (words[0], words[-1])


def outcomes(answers, predicted, own):
    """Shares of answers that say the predicted name, their own one, another; rows without a
    prediction left out."""
    kinds = Counter()
    for found, wanted, old in zip(answers, predicted, own):
        if wanted is not None:
            kinds['rows_predicted'] += 1
            kinds['predicted'] += says(found, wanted)
            kinds['old'] += says(found, old) and wanted != old
    if not kinds['rows_predicted']:
        return {}
    shares = {kind: kinds[kind] / kinds['rows_predicted'] for kind in ('predicted', 'old')}
    shares['neither'] = 1 - shares['predicted'] - shares['old']
    return dict(shares, rows_predicted=kinds['rows_predicted'])


def arrivals(answers, rows):
    """For step 1, 2, ... of the longest row the share of answers that name the place where it
    arrives: how far a chain was followed, whatever was asked."""
    chains = [places_of(row) for row in rows]
    counts = [0] * max(map(len, chains))
    for found, chain in zip(answers, chains):
        for j, place in enumerate(chain):
            counts[j] += says(found, place)
    return [count / len(rows) for count in counts]


def path_kind(row, text, hidden):
    """What an answer to a graph's question that writes its last steps is, in the paper's
    categories: 'made-up edge', 'wrong target', 'right way', 'longer way', or 'no step written'.
    hidden: steps that thoughts stood for."""
    *steps, answer = [re.findall(r'\w+', line) for line in text.strip().split('\n')]
    written = [(words[words[0] == 'Every'], words[-1]) for words in steps if len(words) > 1]
    edges = {tuple(edge) for edge in row['edges']}
    joined = all(one[1] == two[0] for one, two in zip(written, written[1:]))
    if not written:
        return 'no step written'
    if not joined or not set(written) <= edges:
        return 'made-up edge'
    if not answer or answer[-1] != places_of(row)[-1]:
        return 'wrong target'
    return 'right way' if hidden + len(written) <= len(places_of(row)) else 'longer way'


# --- paired tests ---------------------------------------------------------------------------------

def mcnemar(only_one, only_other):
    """Two-sided exact p of McNemar's test, from the number of rows that only one run and only the
    other has right."""
    n = only_one + only_other
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_one, only_other) + 1)) / 2**n)


def pair(right, other):
    """Of two dicts, question -> whether it is right: how many of the questions they share only one
    has right, how many only the other, and p."""
    shared = right.keys() & other.keys()
    one = sum(right[q] and not other[q] for q in shared)
    two = sum(other[q] and not right[q] for q in shared)
    return one, two, mcnemar(one, two)


# --- what thoughts say ----------------------------------------------------------------------------

def first_tokens(name, tokenizer):
    """The tokens that would begin a name, with a space before it and without."""
    ids = [tokenizer.encode(text, add_special_tokens=False)[:1] for text in (name, f' {name}')]
    return {token for one in ids for token in one if tokenizer.decode([token]).strip()}


def results_of(row, tokenizer):
    """For each step the tokens that would name its result: the first token of the row's `results`;
    without these, of the last word of a step in Coconut's format ("Every wumpus is a lompus."), and
    of a step itself where there are options (the colours of the chain)."""
    steps = row.get('steps') or ()
    results = row.get('results')
    if not results and row.get('choices'):
        results = steps
    elif not results:
        results = [(re.findall(r'\w+', step) or [step])[-1] for step in steps]
    return [first_tokens(f'{result}', tokenizer) for result in results]


@torch.no_grad()
def say(model, thoughts):
    """Thoughts [M, D] through the head, a few at a time: yields probabilities float32 [m, V]."""
    weight = model.language_model.lm_head.weight
    for part in thoughts.split(64):
        yield F.linear(part.to(weight), weight).float().softmax(-1).cpu()


def read(model, tokenizer, thoughts, rows):
    """One dict for each of the n thoughts [R, n, D] of the rows of a split: what it says through
    the head most often, and in which share of the rows; its mean entropy; its norm, and beside that
    of an embedding; its mean cosine with the thought before, and with the same thought of the
    previous row; for each step, the share of the rows with that step where its likeliest token
    names the step's result, and the mean probability of that result; of graphs see `mass_by_side`.
    Thoughts are 0 where a row has fewer than n."""
    results = [results_of(row, tokenizer) for row in rows]
    steps, table = max(map(len, results)), []
    embeddings = model.language_model.model.embed_tokens.weight.detach().float()
    norm_of_embeddings = embeddings.norm(dim=-1).mean().item()
    for k in range(thoughts.shape[1]):
        having = thoughts[:, k].any(-1).nonzero()[:, 0].tolist()  # rows with such a thought
        own, tops, entropy, sides = thoughts[having, k], [], 0.0, Counter()
        named, mass = [0] * steps, [0.0] * steps
        for p in say(model, own):
            entropy += torch.special.entr(p).sum().item() / math.log(2) / len(having)
            for q in p:
                row = having[len(tops)]
                tops.append(int(q.argmax()))
                for j, tokens in enumerate(results[row]):
                    named[j] += tops[-1] in tokens
                    mass[j] += q[list(tokens)].sum().item()
                sides.update(mass_by_side(rows[row], q, tokenizer))
        counts = [max(1, sum(len(results[i]) > j for i in having)) for j in range(steps)]
        common, norm = max(set(tops), key=tops.count), own.norm(dim=-1).mean().item()
        before = F.cosine_similarity(own, thoughts[having, k - 1]).mean().item() if k else None
        table.append(dict(
            thought=k + 1, says=tokenizer.decode([common]), share=tops.count(common) / len(tops),
            entropy_bits=entropy, norm=norm, norm_ratio=norm / norm_of_embeddings,
            cosine_before=before, names_step=[hits / count for hits, count in zip(named, counts)],
            cosine_rows=F.cosine_similarity(own, own.roll(1, 0)).mean().item(),
            mass_on_step=[total / count for total, count in zip(mass, counts)]))
        if sides:
            table[-1]['sides'] = {side: total / len(having) for side, total in sides.items()}
    return table


def mass_by_side(row, p, tokenizer):
    """Of a graph's question, "Is Tom a ...?", the probability [V] on nodes 1, 2, 3 and more edges
    from Tom, on those that only others lead to, and on anything else; {} for other rows. Breadth
    first would spread over all that is near, not over the gold way alone."""
    asked = re.match(r'Is (\w+) an? ', row.get('question', '').split('\n')[-1])
    if not asked or not row.get('edges'):
        return {}
    distance, edge_of_search, depth = {asked[1]: 0}, {asked[1]}, 0
    while edge_of_search:
        depth += 1
        edge_of_search = {b for a, b in row['edges'] if a in edge_of_search and b not in distance}
        distance.update(dict.fromkeys(edge_of_search, depth))
    sides = dict.fromkeys(('1', '2', '3', 'further', 'others', 'gold'), 0.0)
    for name in {b for _, b in row['edges']}:
        on_name = p[list(first_tokens(name, tokenizer))].sum().item()
        far = distance.get(name)
        side = 'others' if far is None else str(far) if far <= 3 else 'further'
        sides[side] += on_name
        sides['gold'] += on_name * (name in places_of(row))
    sides['elsewhere'] = 1 - sum(sides[side] for side in ('1', '2', '3', 'further', 'others'))
    return sides


def describe_thoughts(table):
    """What `read` gave, as lines."""
    yield (' thought | says most often      | entropy  | norm (of embeddings\') | cosine: thought '
           'before, other row | names the result of step 1, 2, ...')
    for t in table:
        before = '    ' if t['cosine_before'] is None else f'{t["cosine_before"]:4.2f}'
        most = f'{t["says"]!r} {100 * t["share"]:.0f} %'
        names = ' '.join(f'{100 * share:5.1f}' for share in t['names_step'])
        yield (
            f'{t["thought"]:8d} | {most:20} | {t["entropy_bits"]:4.2f} bit | {t["norm"]:7.2f} '
            f'({t["norm_ratio"]:4.2f})       | {before:>14} {t["cosine_rows"]:18.2f} | {names} %')
    for t in table:
        if 'sides' in t:
            parts = [f'{side} {100 * mass:.1f}' for side, mass in t['sides'].items()]
            yield f'{t["thought"]:8d} | probability by edges from the one asked about: ' + \
                  ', '.join(parts) + ' %'


# --- pictures -------------------------------------------------------------------------------------

def pyplot():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot
    return matplotlib.pyplot


def literal(text):
    """Text as it is, for matplotlib, which takes what stands between two $ for mathematics."""
    return text.replace('$', r'\$')


def save(figure, path):
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format='png')
    pyplot().close(figure)


def draw_thoughts(path, model, tokenizer, thoughts, rows, table):
    """Thought by candidate: probabilities in one row, and over all rows the mean probability of
    each step's result."""
    row = int(thoughts.any(-1).sum(1).argmax())  # one with as many thoughts as there are
    p = torch.cat([*say(model, thoughts[row])])                                 # [n, V]
    mass = torch.tensor([t['mass_on_step'] for t in table])                     # [n, steps]
    tokens = p.max(0).values.topk(min(10, p.shape[1])).indices
    names = [literal(ascii(tokenizer.decode([t])).strip("'").replace(' ', '·')) for t in tokens]
    question = literal(rows[row]['question'][-60:])
    panels = [(p[:, tokens], names, f'"{question}": probability of a token')]
    if mass.numel():
        steps = [f'step {j + 1}' for j in range(mass.shape[1])]
        panels.append((mass, steps, f'{len(rows)} rows: of the step\'s result'))
    widths = [max(4, len(names)) for _, names, _ in panels]
    figure, axes = pyplot().subplots(1, len(panels), figsize=(9, 3.6), width_ratios=widths,
                                     layout='constrained', squeeze=False)
    for axis, (values, names, title) in zip(axes[0], panels):
        axis.imshow(values.numpy(), cmap='Blues', vmin=0, vmax=1, aspect='auto')
        axis.set_xticks(range(len(names)), names, rotation=45, ha='right')
        axis.set_yticks(range(len(values)), [f'thought {k + 1}' for k in range(len(values))])
        axis.set_title(title, fontsize=9)
        for k, j in (values >= 0.005).nonzero().tolist():
            colour = 'white' if values[k, j] > 0.5 else 'black'
            axis.text(j, k, f'{values[k, j]:.2f}', ha='center', va='center', fontsize=7,
                      color=colour)
    save(figure, path)


def draw_patch(path, row, number, step, place, before, after, image=None, c_thought=1):
    """A row's chain of places, each with the first of the thoughts that stand for it, and below it
    the one that begins where thought `number` was exchanged: its step then arrives at `place`, and
    the row's own map leads on. before, after: the answers written. image: the row's, or None."""
    start = re.findall(r'\w+', row['question'].split('\n')[-1])[-1]
    start = start if any(source == start for source, _ in row['edges']) else ''
    chain = [start, *places_of(row)]
    turned = [place, *followed(row, place, len(places_of(row)) - step)]
    figure, axes = pyplot().subplots(1, 2 if image else 1, figsize=(9, 2.7), squeeze=False,
                                     layout='constrained', width_ratios=[1, 3] if image else [1])
    if image:
        axes[0, 0].imshow(image, interpolation='nearest')
        axes[0, 0].axis('off')
    axis = axes[0, -1]
    for y, names, first in ((1, chain, 0), (0, turned, step)):
        for x, name in enumerate(names, first):
            known = pyplot().matplotlib.colors.is_color_like(name)
            axis.scatter(x, y, s=900, color=name if known else 'lightgrey', edgecolors='black')
            axis.text(x, y - 0.42, literal(name), ha='center', fontsize=9)
            if y and x:
                axis.text(x, y + 0.3, f'thought {1 + (x - 1) * c_thought}', ha='center', fontsize=8,
                          color='grey')
            if x > first:
                axis.annotate('', (x - 0.2, y), (x - 0.8, y), arrowprops=dict(arrowstyle='->'))
    axis.annotate('', (step, 0.27), (step, 0.5),
                  arrowprops=dict(arrowstyle='->', lw=2, color='tab:red'))
    end = len(chain) - 0.6
    axis.text(end, 1, f'written: {literal(before)!r}', va='center', fontsize=9)
    axis.text(end, 0, f'written: {literal(after)!r}', va='center', fontsize=9, color='tab:red')
    other = 'image' if image else 'row'
    axis.text(step - 0.25, 0, f'thought {number}\nof another\n{other}', va='center', ha='right',
              fontsize=9, color='tab:red')
    options = [f'{letter} {option}' for letter, option in zip(LETTERS, row.get('choices') or ())]
    title = '     '.join([row['question'][-60:], *options])
    axis.set(xlim=(-0.5, len(chain) + 1), ylim=(-0.7, 1.55))
    axis.set_title(literal(title), fontsize=10)
    axis.axis('off')
    save(figure, path)


if __name__ == '__main__':
    globals().update(configure(globals()))
    expand(intervene)
    device = pick_device(device)
    model, tokenizer, saved = load_checkpoint(ckpt)
    if 'knobs' not in saved:
        raise ValueError(f'{ckpt} was not trained here: give a .pt of train.py, which knows its '
                         'data')
    knobs, stage = saved['knobs'], saved['stage']
    torch.set_num_threads(threads or knobs['threads'] or torch.get_num_threads())
    dtype = pick_dtype(dtype, device, on_cpu=knobs['dtype'] == 'bfloat16')
    autocast = torch.autocast(device, torch.bfloat16) if dtype == 'bfloat16' else nullcontext()
    data_dir = data_dir or knobs['data_dir']
    eval_batch_size = eval_batch_size or knobs['eval_batch_size']
    max_new_tokens = max_new_tokens or knobs['max_new_tokens']
    others = [folder for folder in compare.split(',') if folder]
    for folder in others:
        listed = os.listdir(folder) if os.path.isdir(folder) else []
        if not any(name.startswith('answers_') for name in listed):
            raise ValueError(f'compare={folder}: no answers_*.json there; give the out_dir of a '
                             'run that has ended')
    if not split:
        has_test = os.path.isfile(split_file(data_dir, 'test'))
        labelled = has_test and 'answer' in read_split(data_dir, 'test')[0]
        split = 'test' if labelled else 'validation'
    model.to(device)
    out_dir = os.path.dirname(os.path.abspath(ckpt))
    own_edit = model.as_pause if knobs['mode'] == 'pause' else None
    row_knobs = dict(tokenizer=tokenizer, data_dir=data_dir, image_size=model.config.image_size,
                     num_image_tokens=model.config.num_image_tokens)
    for key in ('max_tiles', 'cache_tiles', 'max_length', 'seed', 'mode', 'c_thought',
                'max_latent_stage', 'pad_latent_to_max', 'prompt', 'answer', 'visual_bridge'):
        row_knobs[key] = knobs[key]
    row_knobs['template'] = frame_of(knobs['template'], tokenizer)

    def answers_to(rows, change=None, batch_size=0, new_tokens=0, raw=False, **text):
        """Metrics and answers of rows. change: places of rows -> an edit_thought, behind the mode's
        own, or before it if raw: what a pause token's place holds, which is not fed back. text:
        knobs of the text that differ from the checkpoint's."""
        def edit_for(places):
            edits = [own_edit, change and change(places)]
            edits = [edit for edit in (reversed(edits) if raw else edits) if edit]

            def edit_in_turn(k, thought):
                for edit in edits:
                    thought = edit(k, thought)
                return thought
            return edit_in_turn if edits else None

        cuts = math.ceil(len(rows) / (batch_size or eval_batch_size))
        groups = [group.tolist() for group in np.array_split(np.arange(len(rows)), cuts)]
        asked = Rows(rows, split, stage, supervised=False, **{**row_knobs, **text})
        loading = dict(num_workers=num_workers, pin_memory=device == 'cuda')
        answers, seconds = [], 0.0
        for _, found, took in ask(model, tokenizer, asked, groups, knobs['answer'], autocast,
                                  loading, edit_for, max_new_tokens=new_tokens or max_new_tokens):
            answers += found
            seconds += took
        return summarize(answers, seconds), answers

    def last_places(rows, n):
        """float32 [R, n, D]: the hidden states of the last n places of each prompt, for a mode
        without thoughts."""
        kept, think = [], model.think

        def keep(x, layout, edit_thought=None):
            hidden, *more = think(x, layout, edit_thought)
            last = layout.length.sum(1)[:, None] - n + torch.arange(n, device=x.device)
            slot = layout.slot.gather(1, last)                                  # [B, n]
            kept.append(hidden[torch.arange(len(x), device=x.device)[:, None], slot].float().cpu())
            return hidden, *more

        model.think = keep
        answers_to(rows, new_tokens=1)
        del model.think
        return torch.cat(kept)

    def right_of(answers):
        return {found['question_id']: found['right'] for found in answers}

    # --- left alone -------------------------------------------------------------------------------
    rows = fitting_rows(split, stage, **row_knobs)
    metrics, clean_answers = answers_to(rows)
    if 'accuracy' not in metrics:
        raise ValueError(f'{split} of {data_dir} has no answers: give another --split')
    right = right_of(clean_answers)
    print(f'{split}: {describe(metrics)}', flush=True)
    records = [dict(name='clean', clean=metrics['accuracy'], rows=len(rows), p=1.0, **metrics)]
    for size in (1, min(32, eval_batch_size)):
        seconds = answers_to(rows[:64], batch_size=size)[0]['seconds_per_answer']
        print(f'{split}: {1000 * seconds:.2f} ms an answer in batches of {size}')
        records[0][f'seconds_per_answer_batch_{size}'] = seconds

    # --- beside other runs ------------------------------------------------------------------------
    for folder in others:
        path, theirs = os.path.join(folder, f'answers_{split}.json'), {}
        if os.path.isfile(path):
            with open(path) as f:
                theirs = json.load(f)
        if theirs.get('data') != digest(data_dir, split):
            print(f'{split}: {folder} left out, it holds no answers to these rows')
            continue
        here, there, p = pair(right, right_of(theirs['answers']))
        print(f'{split}: of {len(right)} rows {here} are right here alone, {there} in {folder} '
              f'alone, McNemar p = {p:.2g}')
        clean = sum(right_of(theirs['answers']).values()) / len(theirs['answers'])
        records.append(dict(name=f'compare {folder}', accuracy=metrics['accuracy'], clean=clean,
                            rows=len(right), p=p, only_here=here, only_there=there))

    # --- what the thoughts say --------------------------------------------------------------------
    counts = torch.tensor([found['thoughts'] for found in clean_answers])
    n = int(counts.max())
    thoughts = torch.zeros(len(rows), n, model.config.hidden_size)
    if n:
        answers_to(rows, record(thoughts), new_tokens=1)
        there = (torch.arange(n) < counts[:, None])[..., None]                  # [R, n, 1]
        thoughts *= there
        read_out = thoughts
        if own_edit:  # what pause tokens' places hold is read, what they are fed is exchanged
            read_out = torch.zeros_like(thoughts)
            answers_to(rows, record(read_out), new_tokens=1, raw=True)
            read_out *= there
    elif knobs['mode'] == 'no_thoughts' and stage:
        places = min(stage, knobs['max_latent_stage']) * knobs['c_thought']
        read_out = last_places(rows, places)
        print(f'{split}: no thoughts; the last {places} places of each prompt, read in the same '
              'way:')
    else:
        read_out = thoughts
    if read_out.numel():
        table = read(model, tokenizer, read_out, rows)
        print(*describe_thoughts(table), sep='\n', flush=True)
        path = os.path.join(out_dir, f'thoughts_{split}.json')
        with replacing(path) as part, open(part, 'w') as f:
            json.dump(table, f, indent=1)
        draw_thoughts(os.path.join(out_dir, f'thoughts_{split}.png'), model, tokenizer, read_out,
                      rows, table)

    # --- what changing them does ------------------------------------------------------------------
    # where each chain ends; rows without a chain have accuracies alone
    own = [(places_of(row) or [None])[-1] for row in rows]
    for name in expand(intervene, n):
        asked, change, text, predicted, context = rows, None, {}, None, nullcontext()
        lacking = '' if n or name == 'image' or name.startswith('early_') else 'thoughts'
        if name in ('image', 'transplant'):
            asked = with_other_images(rows)
            asked = asked and fitting_rows(split, stage, asked, **row_knobs)
            if not asked or (name == 'transplant' and len(asked) < len(rows)):
                lacking = 'image'
        if asked and len(asked) == len(rows):
            predicted = predict(name, own, asked)
        if name.startswith(('patch_', 'same_')) and n:
            kind, number = name.split('_')
            step = math.ceil(int(number) / knobs['c_thought'])
            donors, predicted = patches(rows, step, kind == 'same')
            change = replace(name, thoughts, donors)
            if not any(predicted):
                lacking = 'map (edges and results) that leads on from another place'
        elif name.startswith('early_'):  # stage k asks for min(k, 1) * c_thought thoughts
            text = dict(c_thought=number_of(name, 'early'), max_latent_stage=1)
        elif name == 'transplant':
            change = replace(name, thoughts, torch.arange(len(rows)))
        elif name == 'blind':
            # a hook that records nothing: with one all rows stay in the batch
            change, context = record(thoughts[:, :0]), hidden_image(model)
        elif name != 'image':
            change = replace(name, thoughts)
        if lacking:
            print(f'{split}: {name} left out, these answers have no {lacking}')
            continue
        with context:
            metrics, answers = answers_to(asked, change, **text)
        now = right_of(answers)
        clean = sum(right[question] for question in now) / len(now)
        lost, won, p = pair(right, now)
        print(f'{split}: {name:<12} accuracy {100 * metrics["accuracy"]:5.1f} %, clean '
              f'{100 * clean:5.1f} %, {metrics["tokens_per_answer"]:4.1f} tokens; of {len(now)} '
              f'rows {lost} are right only when clean, {won} only when changed, McNemar p = '
              f'{p:.2g}', flush=True)
        more = {}
        if name.startswith('early_') and all(own):
            more['arrives'] = arrivals(answers, asked)
            shares = ' '.join(f'{100 * share:.1f}' for share in more['arrives'])
            print(f'{"":>{len(split)}}  {name:<12} names where step 1, 2, ... leads in {shares} %',
                  flush=True)
        if predicted and all(own):
            more = outcomes(answers, predicted, own)
            if more:
                # the clean answers say what is predicted where that is right anyway
                wanted = {i: place for i, place in enumerate(predicted) if place is not None}
                before = {i: says(clean_answers[i], place) for i, place in wanted.items()}
                after = {i: says(answers[i], place) for i, place in wanted.items()}
                more['p_predicted'] = pair(after, before)[2]
                shares = [f'{100 * more["predicted"]:.1f} % write what is predicted']
                if predicted != own:
                    shares.append(f'{100 * more["old"]:.1f} % the right answer')
                shares.append(f'{100 * more["neither"]:.1f} % another')
                print(f'{"":>{len(split)}}  {name:<12} of {more["rows_predicted"]} rows '
                      f'{", ".join(shares)}; McNemar against the clean answers p = '
                      f'{more["p_predicted"]:.2g}', flush=True)
        if name.startswith('early_') and all('edges' in row and not row.get('choices')
                                             for row in asked):
            hidden = number_of(name, 'early') // knobs['c_thought']
            kinds = Counter(path_kind(row, found['text'], hidden)
                            for row, found in zip(asked, answers))
            more['ways'] = dict(kinds)
            parts = [f'{kind} {count}' for kind, count in kinds.most_common()]
            print(f'{"":>{len(split)}}  {name:<12} {", ".join(parts)}')
        if name.startswith('patch_'):
            i = next(i for i, wanted in enumerate(predicted) if wanted is not None)
            image = rows[i].get('image') and load_image(os.path.join(data_dir, rows[i]['image']))
            place = places_of(rows[int(donors[i])])[step - 1]
            draw_patch(os.path.join(out_dir, f'{name}_{split}.png'), rows[i],
                       number_of(name, 'patch'), step, place, clean_answers[i]['text'],
                       answers[i]['text'], image, knobs['c_thought'])
        records.append(dict(name=name, clean=clean, rows=len(now), p=p, only_clean=lost,
                            only_changed=won, **more, **metrics))
    with replacing(os.path.join(out_dir, f'probe_{split}.json')) as part, open(part, 'w') as f:
        json.dump(records, f, indent=1)
