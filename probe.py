"""
Do the thoughts carry the answer, and what do they say? train.py calls this when it evaluates.

    python train.py config/toy.py --out_dir=out-probe --eval_only=True --init_from=out-toy/best.pt --intervene=all
    python train.py config/toy.py --out_dir=out-pause --mode=pause --compare=out-toy

--intervene names changes, separated by commas; each is applied to every row of the split, its accuracy printed beside
the clean one's:

    zero           every thought is 0
    noise          every thought is a random direction of its own norm
    mean           thought k is the mean thought k of the split
    swap           thought k is thought k of the next row, as that has it when left alone; its own where that has fewer
    image          the next row's image, with the row's own question: do the answers need the image?
    drop_last_K    the last K thoughts are 0; drop_last_k for every K
    early_K        every row is given K thoughts, early for every K below n: a model that still knows earlier stages
                   then writes the steps that are missing, so read the tokens beside the accuracy
    all            all of these

A thought that can be replaced without loss carries nothing. --compare names the out_dirs of other runs over the same
rows, separated by commas: McNemar's exact test asks whether the rows that only one of two runs has right fall to
either side as a fair coin does.
"""
import json
import math
import re

import torch
import torch.nn.functional as F

from prepare import replacing

FORM = re.compile(r'zero|noise|mean|swap|image|(drop_last|early)_(\d+)')


# --- interventions ----------------------------------------------------------------------------------------------------

def expand(intervene, n=0):
    """The changes that --intervene names, for answers with n thoughts. ValueError where it names none of the above."""
    names = [name.strip() for name in intervene.split(',') if name.strip()]
    every = dict(all=['zero', 'noise', 'mean', 'swap', 'image', 'drop_last_k', 'early'])
    names = [one for name in names for one in every.get(name, [name])]
    every = dict(drop_last_k=[f'drop_last_{k}' for k in range(1, n + 1)], early=[f'early_{k}' for k in range(n)])
    for name in names:
        if name not in every and not FORM.fullmatch(name):
            raise ValueError(f'intervene={name!r}: expected zero, noise, mean, swap, image, drop_last_3, drop_last_k, '
                             'early_3, early or all')
    return [one for name in names for one in every.get(name, [name])]


def record(thoughts):
    """
    A change that changes nothing, but writes every thought into float32 [R, n, D], R the rows of the split. What it
    writes where a row has fewer than n thoughts means nothing.
    """
    def change(places):
        def edit(k, thought):
            if k <= thoughts.shape[1]:
                thoughts[places, k - 1] = thought.float().cpu()
            return thought
        return edit
    return change


def replace(name, thoughts):
    """
    The change `name` as a function: places of a batch's rows in the split -> an `edit_thought`. `thoughts` [R, n, D]
    are those of all rows when left alone, 0 where a row has fewer than n.
    """
    R, n, _ = thoughts.shape
    there = thoughts.any(-1)                                                              # [R, n]
    count = there.sum(1)                                                                  # [R]
    mean = thoughts.sum(0) / there.sum(0).clamp(min=1)[:, None]                           # [n, D]
    last = int(name.removeprefix('drop_last_')) if name.startswith('drop_last_') else n if name == 'zero' else 0

    def other(k, thought, places):
        if name == 'noise':
            own = [torch.Generator().manual_seed(int(place) * n + k) for place in places]  # whatever the batch
            noise = torch.stack([torch.randn(thought.shape[1], generator=g) for g in own]).to(thought)
            return noise * thought.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        if name in ('mean', 'swap'):
            found = mean[k - 1].expand(len(places), -1) if name == 'mean' else thoughts[(places + 1) % R, k - 1]
            found = found.to(thought)
            return torch.where(found.any(-1, keepdim=True), found, thought)  # the other row may have fewer thoughts
        return torch.where((k > count[places] - last)[:, None].to(thought.device), 0, thought)

    def change(places):
        places = torch.tensor(places)

        def edit(k, thought):
            own = (k <= count[places])[:, None].to(thought.device)  # beyond these are those that the model wrote itself
            return torch.where(own, other(k, thought, places), thought) if k <= n else thought
        return edit
    return change


def with_other_images(rows):
    """Each row with the image of the next one that has an image of its own; rows without an image are left out."""
    rows = [row for row in rows if row.get('image')]
    of_image = lambda row: {key: row[key] for key in ('image', 'image_size', 'image_hash')}
    return [{**row, **of_image(other)} for row, other in zip(rows, rows[1:] + rows[:1])]


# --- paired tests -----------------------------------------------------------------------------------------------------

def mcnemar(only_one, only_other):
    """Two-sided exact p of McNemar's test, from the number of rows that only one run and only the other has right."""
    n = only_one + only_other
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_one, only_other) + 1)) / 2 ** n)


def pair(right, other):
    """
    Of two dicts, question -> whether it is right: how many of the questions they share only one has right, how many
    only the other, and p.
    """
    shared = right.keys() & other.keys()
    one, two = (sum(a[q] and not b[q] for q in shared) for a, b in ((right, other), (other, right)))
    return one, two, mcnemar(one, two)


# --- what thoughts say ------------------------------------------------------------------------------------------------

def results_of(row, tokenizer):
    """
    For each step the tokens that would name its result, with a space before it and without: the first token of the
    row's `results`; without these, of the last word of a step in Coconut's format ("Every wumpus is a lompus."), and
    of a step itself where there are options (the colours of the chain).
    """
    steps = row.get('steps') or ()
    results = row.get('results')
    if not results:
        results = steps if row.get('choices') else [(re.findall(r'\w+', step) or [step])[-1] for step in steps]
    found = []
    for result in results:
        first = [tokenizer.encode(text, add_special_tokens=False)[:1] for text in (f'{result}', f' {result}')]
        found.append({token for ids in first for token in ids if tokenizer.decode([token]).strip()})
    return found


@torch.no_grad()
def say(model, thoughts):
    """Thoughts [M, D] through the head, a few at a time: yields probabilities float32 [m, V]."""
    weight = model.language_model.lm_head.weight
    for part in thoughts.split(64):
        yield F.linear(part.to(weight), weight).float().softmax(-1).cpu()


def read(model, tokenizer, thoughts, rows):
    """
    One dict for each of the n thoughts [R, n, D] of the rows of a split: what it says through the head most often,
    and in which share of the rows; its mean entropy; its norm, and beside that of an embedding; its mean cosine with
    the thought before, and with the same thought of the previous row; for each step, the share of the rows with that
    step where its likeliest token names the step's result, and the mean probability of that result. Thoughts are 0
    where a row has fewer than n.
    """
    results = [results_of(row, tokenizer) for row in rows]
    steps, table = max(map(len, results)), []
    usual = model.language_model.model.embed_tokens.weight.detach().float().norm(dim=-1).mean().item()
    for k in range(thoughts.shape[1]):
        here = thoughts[:, k].any(-1).nonzero()[:, 0].tolist()
        own, tops, entropy, named, mass = thoughts[here, k], [], 0.0, [0] * steps, [0.0] * steps
        for p in say(model, own):
            entropy += torch.special.entr(p).sum().item() / math.log(2) / len(here)
            for q in p:
                tops.append(int(q.argmax()))
                for j, tokens in enumerate(results[here[len(tops) - 1]]):
                    named[j] += tops[-1] in tokens
                    mass[j] += q[list(tokens)].sum().item()
        having = [max(1, sum(len(results[i]) > j for i in here)) for j in range(steps)]
        common, norm = max(set(tops), key=tops.count), own.norm(dim=-1).mean().item()
        table.append(dict(
            thought=k + 1, says=tokenizer.decode([common]), share=tops.count(common) / len(tops), entropy_bits=entropy,
            norm=norm, norm_ratio=norm / usual,
            cosine_before=F.cosine_similarity(own, thoughts[here, k - 1]).mean().item() if k else None,
            cosine_rows=F.cosine_similarity(own, own.roll(1, 0)).mean().item(),
            names_step=[count / have for count, have in zip(named, having)],
            mass_on_step=[total / have for total, have in zip(mass, having)]))
    return table


def describe_thoughts(table):
    """What `read` gave, as lines."""
    yield (' thought | says most often      | entropy  | norm (of embeddings\') | cosine: thought before, other row | '
           'names the result of step 1, 2, ...')
    for t in table:
        before = '    ' if t['cosine_before'] is None else f'{t["cosine_before"]:4.2f}'
        says = f'{t["says"]!r} {100 * t["share"]:.0f} %'
        names = ' '.join(f'{100 * share:5.1f}' for share in t['names_step'])
        yield (f'{t["thought"]:8d} | {says:20} | {t["entropy_bits"]:4.2f} bit | {t["norm"]:7.2f} '
               f'({t["norm_ratio"]:4.2f})       | {before:>14} {t["cosine_rows"]:18.2f} | {names} %')


# --- pictures ---------------------------------------------------------------------------------------------------------

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
    """Thought by candidate: probabilities in one row, and over all rows the mean probability of each step's result."""
    row = int(thoughts.any(-1).sum(1).argmax())  # one with as many thoughts as there are
    p, mass = torch.cat([*say(model, thoughts[row])]), torch.tensor([t['mass_on_step'] for t in table])
    tokens = p.max(0).values.topk(min(10, p.shape[1])).indices
    names = [literal(ascii(tokenizer.decode([t])).strip("'").replace(' ', '·')) for t in tokens]
    panels = [(p[:, tokens], names, f'"{literal(rows[row]["question"][-60:])}": probability of a token')]
    if mass.numel():
        steps = [f'step {j + 1}' for j in range(mass.shape[1])]
        panels.append((mass, steps, f'{len(rows)} rows: of the step\'s result'))
    widths = [max(4, len(names)) for _, names, _ in panels]
    figure, axes = pyplot().subplots(1, len(panels), figsize=(9, 3.6), width_ratios=widths, layout='constrained',
                                     squeeze=False)
    for axis, (values, names, title) in zip(axes[0], panels):
        axis.imshow(values.numpy(), cmap='Blues', vmin=0, vmax=1, aspect='auto')
        axis.set_xticks(range(len(names)), names, rotation=45, ha='right')
        axis.set_yticks(range(len(values)), [f'thought {k + 1}' for k in range(len(values))])
        axis.set_title(title, fontsize=9)
        for k, j in (values >= 0.005).nonzero().tolist():
            colour = 'white' if values[k, j] > 0.5 else 'black'
            axis.text(j, k, f'{values[k, j]:.2f}', ha='center', va='center', fontsize=7, color=colour)
    save(figure, path)


def draw_curves(path, metrics):
    """Accuracy and loss over steps, stages marked, from a metrics.jsonl."""
    with open(metrics) as f:
        events = [json.loads(line) for line in f]
    trained, evaluated = ([e for e in events if e['event'] == kind] for kind in ('train', 'eval'))
    figure, axes = pyplot().subplots(2, 1, sharex=True, figsize=(7, 4.5), height_ratios=(2, 1), layout='tight')
    axes[0].plot([e['step'] for e in evaluated], [100 * e['accuracy'] for e in evaluated], 'o-', ms=3)
    axes[0].set(ylabel='validation accuracy, %', ylim=(0, 102))
    axes[1].semilogy([e['step'] for e in trained], [e['loss'] for e in trained], lw=0.8, label='training')
    axes[1].semilogy([e['step'] for e in evaluated], [e['loss'] for e in evaluated], 'o', ms=3, label='validation')
    axes[1].set(ylabel='loss', xlabel='optimizer steps')
    axes[1].legend(fontsize=7)
    for s, end in {e['stage']: e['step'] for e in evaluated}.items():
        axes[0].text(end, 4, f'stage {s} ', ha='right', fontsize=7)
        for axis in axes:
            axis.axvline(end, color='grey', lw=0.5)
    save(figure, path)
