"""
Do the thoughts of a checkpoint carry the answer, and what do they say? Data, texts and stage are
the checkpoint's.

    python -m experiments.probe --ckpt=out-toy/best.pt --intervene=all
    python -m experiments.probe --ckpt=out-pause/best.pt --compare=out-toy

--intervene names changes, separated by commas; each is applied to every row of the split, its
accuracy printed beside the clean one's:

    zero           every thought is 0
    noise          every thought is a random direction of its own norm
    mean           thought k is the mean thought k of the split
    swap           thought k is thought k of the next row, as that has it when left alone; its own where
                   that has fewer
    image          the next row's image, with the row's own question: do the answers need the image?
    drop_last_K    the last K thoughts are 0; drop_last_k for every K
    early_K        every row is given K thoughts, early for every K below n: a model that still knows
                   earlier stages then writes the steps that are missing, so read the tokens as well
    all            all of these

A thought that can be replaced without loss carries nothing. --compare names the out_dirs of other
runs over the same rows, separated by commas: McNemar's exact test asks whether the rows that only
one of two runs has right fall to either side as a fair coin does.

Writes beside the checkpoint probe_{split}.json, one record a change (name, accuracy, clean, rows,
p, ...), and thoughts_{split}.json and .png, what the thoughts say.
"""

import json
import math
import os
import re
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F

from configurator import configure
from model import load_checkpoint
from prepare import Rows, digest, fitting_rows, read_split, replacing, split_file
from sample import ask, describe, pick_device, pick_dtype, summarize

# --- knobs ----------------------------------------------------------------------------------------
ckpt = 'out/best.pt'
intervene = 'swap'  # changes, see above; '' for none
compare = ''  # out_dirs of runs over the same questions, for paired tests
split = ''  # '' for test, or for validation where test has no labels
data_dir = ''  # '' for the checkpoint's
eval_batch_size = 0  # 0 for the checkpoint's, and so below
max_new_tokens = 0
num_workers = 0
device = 'auto'  # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'  # 'auto', 'float32', 'bfloat16' (autocast)
threads = 0  # CPU threads; 0 for torch's choice

FORM = re.compile(r'zero|noise|mean|swap|image|(drop_last|early)_(\d+)')


# --- interventions --------------------------------------------------------------------------------


def expand(intervene, n=0):
    """
    The changes that --intervene names, for answers with n thoughts. ValueError where it names none
    of the above.
    """
    names = [name.strip() for name in intervene.split(',') if name.strip()]
    every = dict(all=['zero', 'noise', 'mean', 'swap', 'image', 'drop_last_k', 'early'])
    names = [one for name in names for one in every.get(name, [name])]
    every = dict(
        drop_last_k=[f'drop_last_{k}' for k in range(1, n + 1)],
        early=[f'early_{k}' for k in range(n)],
    )
    for name in names:
        if name not in every and not FORM.fullmatch(name):
            raise ValueError(
                f'intervene={name!r}: expected zero, noise, mean, swap, image, drop_last_3, '
                'drop_last_k, early_3, early or all'
            )
    return [one for name in names for one in every.get(name, [name])]


def record(thoughts):
    """
    A change that changes nothing, but writes every thought into float32 [R, n, D], R the rows of
    the split. What it writes where a row has fewer than n thoughts means nothing.
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
    The change `name` as a function: places of a batch's rows in the split -> an `edit_thought`.
    `thoughts` [R, n, D] are those of all rows when left alone, 0 where a row has fewer than n.
    """
    R, n, _ = thoughts.shape
    there = thoughts.any(-1)  # [R, n]
    count = there.sum(1)  # [R]
    mean = thoughts.sum(0) / there.sum(0).clamp(min=1)[:, None]  # [n, D]
    last = (
        int(name.removeprefix('drop_last_'))
        if name.startswith('drop_last_')
        else n if name == 'zero' else 0
    )

    def other(k, thought, places):
        if name == 'noise':
            own = [
                torch.Generator().manual_seed(int(place) * n + k) for place in places
            ]  # whatever the batch
            noise = torch.stack([torch.randn(thought.shape[1], generator=g) for g in own]).to(
                thought
            )
            return noise * thought.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        if name in ('mean', 'swap'):
            found = (
                mean[k - 1].expand(len(places), -1)
                if name == 'mean'
                else thoughts[(places + 1) % R, k - 1]
            )
            found = found.to(thought)
            return torch.where(
                found.any(-1, keepdim=True), found, thought
            )  # the other row may have fewer thoughts
        return torch.where((k > count[places] - last)[:, None].to(thought.device), 0, thought)

    def change(places):
        places = torch.tensor(places)

        def edit(k, thought):
            own = (k <= count[places])[:, None].to(
                thought.device
            )  # beyond these are those that the model wrote itself
            return torch.where(own, other(k, thought, places), thought) if k <= n else thought

        return edit

    return change


def with_other_images(rows):
    """
    Each row with the image of the next one that has an image of its own; rows without an image are
    left out.
    """
    rows = [row for row in rows if row.get('image')]
    of_image = lambda row: {key: row[key] for key in ('image', 'image_size', 'image_hash')}
    return [{**row, **of_image(other)} for row, other in zip(rows, rows[1:] + rows[:1])]


# --- paired tests ---------------------------------------------------------------------------------


def mcnemar(only_one, only_other):
    """
    Two-sided exact p of McNemar's test, from the number of rows that only one run and only the
    other has right.
    """
    n = only_one + only_other
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_one, only_other) + 1)) / 2**n)


def pair(right, other):
    """
    Of two dicts, question -> whether it is right: how many of the questions they share only one has
    right, how many only the other, and p.
    """
    shared = right.keys() & other.keys()
    one, two = (sum(a[q] and not b[q] for q in shared) for a, b in ((right, other), (other, right)))
    return one, two, mcnemar(one, two)


# --- what thoughts say ----------------------------------------------------------------------------


def results_of(row, tokenizer):
    """
    For each step the tokens that would name its result, with a space before it and without: the
    first token of the row's `results`; without these, of the last word of a step in Coconut's
    format ("Every wumpus is a lompus."), and of a step itself where there are options (the colours
    of the chain).
    """
    steps = row.get('steps') or ()
    results = row.get('results')
    if not results:
        results = (
            steps
            if row.get('choices')
            else [(re.findall(r'\w+', step) or [step])[-1] for step in steps]
        )
    found = []
    for result in results:
        first = [
            tokenizer.encode(text, add_special_tokens=False)[:1]
            for text in (f'{result}', f' {result}')
        ]
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
    One dict for each of the n thoughts [R, n, D] of the rows of a split: what it says through the
    head most often, and in which share of the rows; its mean entropy; its norm, and beside that of
    an embedding; its mean cosine with the thought before, and with the same thought of the previous
    row; for each step, the share of the rows with that step where its likeliest token names the
    step's result, and the mean probability of that result. Thoughts are 0 where a row has fewer
    than n.
    """
    results = [results_of(row, tokenizer) for row in rows]
    steps, table = max(map(len, results)), []
    usual = (
        model.language_model.model.embed_tokens.weight.detach().float().norm(dim=-1).mean().item()
    )
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
        table.append(
            dict(
                thought=k + 1,
                says=tokenizer.decode([common]),
                share=tops.count(common) / len(tops),
                entropy_bits=entropy,
                norm=norm,
                norm_ratio=norm / usual,
                cosine_before=(
                    F.cosine_similarity(own, thoughts[here, k - 1]).mean().item() if k else None
                ),
                cosine_rows=F.cosine_similarity(own, own.roll(1, 0)).mean().item(),
                names_step=[count / have for count, have in zip(named, having)],
                mass_on_step=[total / have for total, have in zip(mass, having)],
            )
        )
    return table


def describe_thoughts(table):
    """What `read` gave, as lines."""
    yield (
        ' thought | says most often      | entropy  | norm (of embeddings\') | cosine: thought '
        'before, other row | names the result of step 1, 2, ...'
    )
    for t in table:
        before = '    ' if t['cosine_before'] is None else f'{t["cosine_before"]:4.2f}'
        says = f'{t["says"]!r} {100 * t["share"]:.0f} %'
        names = ' '.join(f'{100 * share:5.1f}' for share in t['names_step'])
        yield (
            f'{t["thought"]:8d} | {says:20} | {t["entropy_bits"]:4.2f} bit | {t["norm"]:7.2f} '
            f'({t["norm_ratio"]:4.2f})       | {before:>14} {t["cosine_rows"]:18.2f} | {names} %'
        )


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
    """
    Thought by candidate: probabilities in one row, and over all rows the mean probability of each
    step's result.
    """
    row = int(thoughts.any(-1).sum(1).argmax())  # one with as many thoughts as there are
    p, mass = torch.cat([*say(model, thoughts[row])]), torch.tensor(
        [t['mass_on_step'] for t in table]
    )
    tokens = p.max(0).values.topk(min(10, p.shape[1])).indices
    names = [literal(ascii(tokenizer.decode([t])).strip("'").replace(' ', '·')) for t in tokens]
    panels = [
        (p[:, tokens], names, f'"{literal(rows[row]["question"][-60:])}": probability of a token')
    ]
    if mass.numel():
        steps = [f'step {j + 1}' for j in range(mass.shape[1])]
        panels.append((mass, steps, f'{len(rows)} rows: of the step\'s result'))
    widths = [max(4, len(names)) for _, names, _ in panels]
    figure, axes = pyplot().subplots(
        1, len(panels), figsize=(9, 3.6), width_ratios=widths, layout='constrained', squeeze=False
    )
    for axis, (values, names, title) in zip(axes[0], panels):
        axis.imshow(values.numpy(), cmap='Blues', vmin=0, vmax=1, aspect='auto')
        axis.set_xticks(range(len(names)), names, rotation=45, ha='right')
        axis.set_yticks(range(len(values)), [f'thought {k + 1}' for k in range(len(values))])
        axis.set_title(title, fontsize=9)
        for k, j in (values >= 0.005).nonzero().tolist():
            colour = 'white' if values[k, j] > 0.5 else 'black'
            axis.text(
                j, k, f'{values[k, j]:.2f}', ha='center', va='center', fontsize=7, color=colour
            )
    save(figure, path)


if __name__ == '__main__':
    globals().update(configure(globals()))
    expand(intervene)
    torch.set_num_threads(threads or torch.get_num_threads())
    device = pick_device(device)
    autocast = nullcontext()
    if pick_dtype(dtype, device) == 'bfloat16':
        autocast = torch.autocast(device, torch.bfloat16)
    model, tokenizer, saved = load_checkpoint(ckpt)
    if not saved:
        raise ValueError(
            f'{ckpt} was not trained here: give a .pt of train.py, which knows its data'
        )
    knobs, stage = saved['knobs'], saved['stage']
    data_dir = data_dir or knobs['data_dir']
    eval_batch_size = eval_batch_size or knobs['eval_batch_size']
    max_new_tokens = max_new_tokens or knobs['max_new_tokens']
    others = [folder for folder in compare.split(',') if folder]
    for folder in others:
        listed = os.listdir(folder) if os.path.isdir(folder) else []
        if not any(name.startswith('answers_') for name in listed):
            raise ValueError(
                f'compare={folder}: no answers_*.json there; give the out_dir of a run that '
                'has ended'
            )
    if not split:
        split = 'validation'
        if (
            os.path.isfile(split_file(data_dir, 'test'))
            and 'answer' in read_split(data_dir, 'test')[0]
        ):
            split = 'test'
    model.to(device)
    out_dir = os.path.dirname(os.path.abspath(ckpt))
    own_edit = model.as_pause if knobs['mode'] == 'pause' else None
    row_knobs = dict(
        tokenizer=tokenizer,
        data_dir=data_dir,
        image_size=model.config.image_size,
        num_image_tokens=model.config.num_image_tokens,
    )
    for key in (
        'max_tiles',
        'cache_tiles',
        'max_length',
        'seed',
        'mode',
        'c_thought',
        'max_latent_stage',
        'pad_latent_to_max',
        'prompt',
        'answer',
        'template',
        'visual_bridge',
    ):
        row_knobs[key] = knobs[key]

    def answers_to(rows, change=None, batch_size=0, new_tokens=0, **text):
        """
        Metrics and answers of rows. change: places of rows -> an edit_thought, behind the mode's
        own; text: knobs of the text that differ from the checkpoint's.
        """

        def edit_for(places):
            if change is None:
                return own_edit
            changed = change(places)
            return lambda k, thought: changed(k, own_edit(k, thought) if own_edit else thought)

        cuts = math.ceil(len(rows) / (batch_size or eval_batch_size))
        groups = [group.tolist() for group in np.array_split(np.arange(len(rows)), cuts)]
        asked = Rows(rows, split, stage, supervised=False, **{**row_knobs, **text})
        answers, seconds = [], 0.0
        for _, found, took in ask(
            model,
            tokenizer,
            asked,
            groups,
            knobs['answer'],
            autocast,
            dict(num_workers=num_workers, pin_memory=device == 'cuda'),
            edit_for,
            max_new_tokens=new_tokens or max_new_tokens,
        ):
            answers += found
            seconds += took
        return summarize(answers, seconds), answers

    def right_of(answers):
        return {found['question_id']: found['right'] for found in answers}

    # --- left alone -------------------------------------------------------------------------------
    rows = fitting_rows(split, stage, **row_knobs)
    metrics, answers = answers_to(rows)
    if 'accuracy' not in metrics:
        raise ValueError(f'{split} of {data_dir} has no answers: give another --split')
    right = right_of(answers)
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
        print(
            f'{split}: of {len(right)} rows {here} are right here alone, {there} in {folder} '
            f'alone, McNemar p = {p:.2g}'
        )
        records.append(
            dict(
                name=f'compare {folder}',
                accuracy=metrics['accuracy'],
                clean=sum(right_of(theirs['answers']).values()) / len(theirs['answers']),
                rows=len(right),
                p=p,
                only_here=here,
                only_there=there,
            )
        )

    # --- what the thoughts say --------------------------------------------------------------------
    counts = torch.tensor([found['thoughts'] for found in answers])
    n = int(counts.max())
    thoughts = torch.zeros(len(rows), n, model.config.hidden_size)
    if n:
        answers_to(rows, record(thoughts), new_tokens=1)
        thoughts *= (torch.arange(n) < counts[:, None])[..., None]
        table = read(model, tokenizer, thoughts, rows)
        print(*describe_thoughts(table), sep='\n', flush=True)
        with replacing(os.path.join(out_dir, f'thoughts_{split}.json')) as part, open(
            part, 'w'
        ) as f:
            json.dump(table, f, indent=1)
        draw_thoughts(
            os.path.join(out_dir, f'thoughts_{split}.png'), model, tokenizer, thoughts, rows, table
        )

    # --- what changing them does ------------------------------------------------------------------
    for name in expand(intervene, n):
        asked, change, text = rows, None, {}
        if name == 'image':
            asked = with_other_images(rows)
            asked = asked and fitting_rows(split, stage, asked, **row_knobs)
        elif name.startswith('early_'):  # stage k asks for min(k, 1) * c_thought thoughts
            text = dict(c_thought=int(name.removeprefix('early_')), max_latent_stage=1)
        else:
            change = replace(name, thoughts)
        if not asked or (name != 'image' and not n):
            lacking = 'image' if name == 'image' else 'thoughts'
            print(f'{split}: {name} left out, these answers have no {lacking}')
            continue
        metrics, changed = answers_to(asked, change, **text)
        now = right_of(changed)
        clean = sum(right[question] for question in now) / len(now)
        lost, won, p = pair(right, now)
        print(
            f'{split}: {name:<12} accuracy {100 * metrics["accuracy"]:5.1f} %, clean '
            f'{100 * clean:5.1f} %, {metrics["tokens_per_answer"]:4.1f} tokens; of {len(now)} rows '
            f'{lost} are right only when clean, {won} only when changed, McNemar p = {p:.2g}',
            flush=True,
        )
        records.append(
            dict(
                name=name,
                clean=clean,
                rows=len(now),
                p=p,
                only_clean=lost,
                only_changed=won,
                **metrics,
            )
        )
    with replacing(os.path.join(out_dir, f'probe_{split}.json')) as part, open(part, 'w') as f:
        json.dump(records, f, indent=1)
