"""
How a model is asked and scored: free-running answers, their metrics, and what they owe to the thoughts.

    python train.py config/toy.py --out_dir=out-eval --eval_only=True --init_from=out-toy/best.pt

train.py comes here at the end of each epoch (`Evaluation.ask`) and of the run (`report`), sample.py for `respond`.
"""
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Callable, Optional

import numpy as np
import torch
import torch.distributed as dist

import probe
from prepare import Rows, batches, digest, extract_choice, fitting_rows, free_answer_is, split_file, supervised


# --- answers and their metrics ----------------------------------------------------------------------------------------

def respond(model, tokenizer, batch, rows, answer, **generation):
    """
    Free-running answers to a batch: for each row a dict of text, tokens, thoughts, ended (whether it came to its end
    token) and option, that is the text, or the option that it says as the row spells it; parsed, whether it said one.
    With choices also choice, its number, 0 where none was said; with a known answer also right, and without choices
    exact, whether it is the answer letter by letter.
    """
    new, said = model.generate(**batch, **generation), []
    config = model.config
    tokens = (new != config.pad_token_id).sum(1).tolist()
    ended = torch.isin(new, torch.tensor(config.eos_token_ids, device=new.device)).any(1).tolist()
    thoughts = (batch['input_ids'] == config.latent_token_id).sum(1).tolist()
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    for row, text, n, k, whole in zip(rows, texts, tokens, thoughts, ended):
        one = dict(question_id=row.get('question_id'), text=text, tokens=n, thoughts=k, ended=whole, parsed=True,
                   option=text)
        choices = row.get('choices')
        if choices:
            one['choice'], one['parsed'] = extract_choice(text, choices, answer, whole)
            one['option'] = choices[one['choice']]
        if 'answer' in row and choices:  # of two options that are spelt the same either is right
            same = one['option'].strip() == choices[row['correct_choice_idx']].strip()
            one['right'], one['default_a'] = same and one['parsed'], same
        elif 'answer' in row:
            one['right'], one['exact'] = free_answer_is(text, row, answer)
        said.append(one)
    return said


def summarize(answers, seconds):
    """
    Metrics of what `respond` gave. Where the answers are known: accuracy, in which an answer that says no option is
    wrong, with Wilson's 95 % interval; for options also accuracy_default_a, in which it counts as A; for free answers
    also accuracy_exact, letter by letter.
    """
    total, n, z = lambda key: sum(one.get(key, 0) for one in answers), len(answers), 1.96
    metrics = dict(tokens_per_answer=total('tokens') / n, thoughts_per_answer=total('thoughts') / n,
                   unparsed=n - total('parsed'), cut=n - total('ended'), examples=n, seconds_per_answer=seconds / n)
    if all('right' in one for one in answers):
        p = total('right') / n
        centre = (p + z * z / 2 / n) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n)
        metrics.update(accuracy=p, interval=[centre - half, centre + half])
        for key, name in (('default_a', 'accuracy_default_a'), ('exact', 'accuracy_exact')):
            having = [one[key] for one in answers if key in one]
            if having:
                metrics[name] = sum(having) / len(having)
    return metrics


def describe(metrics):
    low, high = metrics.get('interval', (0, 0))
    known = 'no labels'
    if 'accuracy' in metrics:
        known = f'accuracy {100 * metrics["accuracy"]:5.1f} % ({100 * low:.1f} to {100 * high:.1f})'
    loss = f', loss {metrics["loss"]:.4f}' if 'loss' in metrics else ''
    unread = f'{metrics["unparsed"]} unparsed'
    if metrics['unparsed'] and 'accuracy_default_a' in metrics:
        unread += f' (were they A: {100 * metrics["accuracy_default_a"]:.1f} %)'
    if metrics['cut']:
        unread += f', {metrics["cut"]} cut off by max_new_tokens'
    if 'accuracy_exact' in metrics:
        unread += f', exactly right {100 * metrics["accuracy_exact"]:.1f} %'
    return (f'{known} of {metrics["examples"]}, {metrics["tokens_per_answer"]:.1f} tokens and '
            f'{metrics["thoughts_per_answer"]:.1f} thoughts and {metrics["seconds_per_answer"]:.3f} s an answer, '
            f'{unread}{loss}')


# --- a run's evaluations ----------------------------------------------------------------------------------------------

def this_rank():
    """Its number, and that of all ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_ranks(value):
    """What each rank gave, in a list. Numbers of the host stay there: no GPU is waited for."""
    values = [value] * this_rank()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


@dataclass
class Evaluation:
    """
    Asks a model the rows of prepared splits. What stays the same from one question to the next is given once, here.
    """
    model: torch.nn.Module
    tokenizer: object
    row_knobs: dict                        # of prepare.Rows
    edit: Optional[Callable] = None        # the mode's edit_thought
    batch_size: int = 32
    max_new_tokens: int = 128
    autocast: object = nullcontext()
    loading: dict = field(default_factory=dict)  # of prepare.batches
    check: Callable = lambda: None         # called before each batch; may end the run
    # for `report`
    out_dir: str = ''
    log: Callable = print                  # (event, **values)
    write: Callable = print                # (name, content)
    intervene: str = ''                    # changes, and runs to compare with: see probe.py
    compare: str = ''

    @torch.no_grad()
    def ask(self, rows, split, stage, change=None, batch_size=0, max_new_tokens=0, with_loss=False, **text):
        """
        Free-running greedy answers: metrics, and what was said to each row. The ranks share the batches.

        change     places of rows in `rows` -> an edit_thought for them (see probe.py)
        with_loss  measure the loss too
        text       knobs of the text that differ from this run's
        """
        self.model.eval()
        cuts = math.ceil(len(rows) / (batch_size or self.batch_size))
        rank, world = this_rank()
        groups = [group.tolist() for group in np.array_split(np.arange(len(rows)), cuts)][rank::world]
        load = lambda **more: zip(groups, batches(Rows(rows, split, stage, **{**self.row_knobs, **text, **more}),
                                                  groups, **self.loading))
        in_order = lambda found: [value for _, value in sorted(sum(all_ranks(found), []), key=lambda pair: pair[0])]
        said, losses, seconds = [], [], 0.0
        for group, batch in load(supervised=False):
            self.check()
            began = time.time()
            with self.autocast:
                answers = respond(
                    self.model, self.tokenizer, batch, [rows[i] for i in group], self.row_knobs['answer'],
                    max_new_tokens=max_new_tokens or self.max_new_tokens,
                    edit_thought=self.edit if change is None else self.then(change(group)))
            seconds += time.time() - began  # without the loading of rows
            said += zip(group, answers)
        said = in_order(said)
        metrics = summarize(said, sum(all_ranks(seconds)))
        if with_loss and 'accuracy' in metrics:
            for group, batch in load():
                n = supervised(batch)
                with self.autocast:
                    losses.append((group[0], (self.model(**batch, edit_thought=self.edit).loss.item() * n, n)))
            total, count = map(sum, zip(*in_order(losses)))
            metrics['loss'] = total / count  # mean cross entropy over the supervised tokens
        return metrics, said

    def then(self, changed):
        """An edit_thought: the mode's own, then `changed`."""
        return lambda k, thought: changed(k, thought if self.edit is None else self.edit(k, thought))

    def report(self, stage):
        """
        Asks validation and test, writes the answers and A-OKVQA's prediction files; then examines the last of them that
        has labels.
        """
        labelled, folder = None, self.row_knobs['data_dir']
        for split in ('validation', 'test') if os.path.isfile(split_file(folder, 'test')) else ('validation',):
            rows = fitting_rows(split, stage, **self.row_knobs)
            metrics, said = self.ask(rows, split, stage, with_loss=True)
            print(f'{split}: {describe(metrics)}', flush=True)
            self.log('final', split=split, **metrics)
            self.write(f'answers_{split}.json', dict(data=digest(folder, split), answers=said))
            # A-OKVQA's official format, which has no way to say that nothing was read: A stands for it
            self.write(f'predictions_{split}.json',
                       {one['question_id']: {'multiple_choice': one['option']} for one in said})
            if metrics['unparsed']:
                print(f'{split}: in predictions_{split}.json {metrics["unparsed"]} answers that say no option stand '
                      'as the first one')
            if 'accuracy' in metrics:
                labelled = split, rows, said
        if labelled:
            self.examine(*labelled, stage)

    def examine(self, split, rows, said, stage):
        """What the answers to a split owe to the thoughts."""
        right = {one['question_id']: one['right'] for one in said}
        self.measure_speed(split, rows[:64], stage)
        for folder in filter(None, self.compare.split(',')):
            self.compare_with(folder, split, right)
        thoughts = self.read_thoughts(split, rows, said, stage)
        for name in probe.expand(self.intervene, thoughts.shape[1]):
            self.change_thoughts(name, split, rows, right, stage, thoughts)

    def measure_speed(self, split, rows, stage):
        for size in (1, min(32, self.batch_size)):
            seconds = self.ask(rows, split, stage, batch_size=size)[0]['seconds_per_answer']
            print(f'{split}: {1000 * seconds:.2f} ms an answer in batches of {size}')
            self.log('speed', split=split, batch_size=size, seconds_per_answer=seconds)

    def compare_with(self, folder, split, right):
        """A paired test with another run's answers to the same rows."""
        path, theirs = os.path.join(folder, f'answers_{split}.json'), {}
        if os.path.isfile(path):
            with open(path) as f:
                theirs = json.load(f)
        if theirs.get('data') != digest(self.row_knobs['data_dir'], split):
            print(f'{split}: {folder} left out, it holds no answers to these rows')
            return
        here, there, p = probe.pair(right, {one['question_id']: one['right'] for one in theirs['answers']})
        print(f'{split}: of {len(right)} rows {here} are right here alone, {there} in {folder} alone, '
              f'McNemar p = {p:.2g}')
        self.log('compare', split=split, other=folder, here=here, there=there, p=p)

    def read_thoughts(self, split, rows, said, stage):
        """Float32 [R, n, D]: the thoughts of all rows, 0 where a row has fewer than n; says what they say."""
        counts = torch.tensor([one['thoughts'] for one in said])
        n = int(counts.max())
        thoughts = torch.zeros(len(rows), n, self.model.config.hidden_size)
        if n:
            self.ask(rows, split, stage, probe.record(thoughts), max_new_tokens=1)
            # each rank filled in its own rows
            thoughts = sum(all_ranks(thoughts)) * (torch.arange(n) < counts[:, None])[..., None]
            table = probe.read(self.model, self.tokenizer, thoughts, rows)
            print(*probe.describe_thoughts(table), sep='\n', flush=True)
            self.write(f'thoughts_{split}.json', table)
            if this_rank()[0] == 0:
                path = os.path.join(self.out_dir, f'thoughts_{split}.png')
                probe.draw_thoughts(path, self.model, self.tokenizer, thoughts, rows, table)
        return thoughts

    def change_thoughts(self, name, split, rows, right, stage, thoughts):
        """One intervention: the accuracy with it beside that without, on the same rows."""
        change, text, possible = None, {}, thoughts.shape[1]
        if name == 'image':
            rows = possible = probe.with_other_images(rows)
            rows = rows and fitting_rows(split, stage, rows, **self.row_knobs)
        elif name.startswith('early_'):  # stage k asks for min(k, 1) * c_thought thoughts
            text = dict(c_thought=int(name.removeprefix('early_')), max_latent_stage=1)
        else:
            change = probe.replace(name, thoughts)
        if not possible:
            print(f'{split}: {name} left out, these answers have no {"image" if name == "image" else "thoughts"}')
            return
        metrics, changed = self.ask(rows, split, stage, change, **text)
        now = {one['question_id']: one['right'] for one in changed}
        clean = sum(right[question] for question in now) / len(now)
        lost, won, p = probe.pair(right, now)
        print(f'{split}: {name:<12} accuracy {100 * metrics["accuracy"]:5.1f} %, clean {100 * clean:5.1f} %, '
              f'{metrics["tokens_per_answer"]:4.1f} tokens; of {len(now)} rows {lost} are right only when clean, '
              f'{won} only when changed, McNemar p = {p:.2g}', flush=True)
        self.log('intervention', split=split, name=name, clean=clean, only_clean=lost, only_changed=won, p=p, **metrics)
