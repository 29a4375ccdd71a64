"""
Tests of whole runs and of the experiments: kill, resume, ranks, the commands as a user runs them.
Run with the others by python -m pytest -q (CPU, no network).
"""
import contextlib
import importlib.machinery
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForCausalLM, InternVLForConditionalGeneration

import prepare
import sample
import train
from experiments import bench, probe, reference, shortcuts, toy
from model import Config, SPECIAL_TOKENS
from model import lay_out, load_checkpoint, load_tokenizer
from test_model import gpu, loaded  # noqa: F401, fixtures
from test_model import HERE, RAW, build_row, make_batch, one_row, parquet, relative, save_text
from test_model import save_tiny, script, start, text_tokenizer, tiny_model, without_labels

# --------------------------------------------------------------------------------------------------
# what the thoughts are worth

def test_interventions_change_what_they_say():
    """Rows of a split with 3, 1, 3, 2 thoughts, met in another order and in two batches."""
    model = tiny_model()
    batch = without_labels(make_batch(model.config, [1, 0, 2, 1], [(3,), (1,), (2, 1), (1, 1)]))
    with torch.no_grad():
        own = torch.zeros(4, 3, model.config.hidden_size)
        clean = model(**batch, edit_thought=probe.record(own)([0, 1, 2, 3])).thoughts
        here = clean.any(-1)
        assert here.sum(1).tolist() == [3, 1, 3, 2]
        assert torch.equal(own[here], clean[here])
        run = lambda name, b=batch, at=(0, 1, 2, 3): model(
            **b, edit_thought=probe.replace(name, clean)(list(at))).thoughts
        assert not run('zero').any()
        noise = run('noise')
        torch.testing.assert_close(noise[:, 0].norm(dim=-1), clean[:, 0].norm(dim=-1))
        assert F.cosine_similarity(noise[:, 0], clean[:, 0]).abs().max() < 0.6
        assert torch.equal(noise, run('noise'))
        assert torch.equal(noise.any(-1), here)
        mean = torch.stack([clean[here[:, k], k].mean(0) for k in range(3)])
        torch.testing.assert_close(run('mean'), mean.expand(4, 3, -1) * here[..., None])
        swapped = run('swap')
        for a, b in ((0, 1), (1, 2), (2, 3), (3, 0)):
            both = here[a] & here[b]
            assert both.any()
            assert torch.equal(swapped[a, both], clean[b, both])
        assert swapped[0, 1].any()  # row 1 has but one thought: row 0 keeps its own second
        # the same, row by row: a donor is the next row of the split, not of the batch
        for b in range(4):
            alone = without_labels(one_row(dict(batch, labels=batch['input_ids']), b))
            for name, whole in (('swap', swapped), ('noise', noise)):
                torch.testing.assert_close(run(name, alone, [b])[0], whole[b, :int(here[b].sum())],
                                           atol=1e-4, rtol=1e-3)
        dropped = run('drop_last_2')
        assert dropped.any(-1).sum(1).tolist() == [1, 0, 1, 0]
        assert torch.equal(dropped[[0, 2], 0], clean[[0, 2], 0])
        # a second thought of row 1: the model wrote its <|latent|>
        written = torch.ones(1, model.config.hidden_size)
        for name in ('zero', 'noise', 'mean', 'swap', 'drop_last_1'):
            assert torch.equal(probe.replace(name, clean)([1])(2, written), written)
            assert not torch.equal(probe.replace(name, clean)([1])(1, written), written)


def test_interventions_are_named():
    assert probe.expand('') == []
    assert probe.expand(' zero, early_12') == ['zero', 'early_12']
    assert probe.expand('drop_last_k,early',
                        2) == ['drop_last_1', 'drop_last_2', 'early_0', 'early_1']
    assert probe.expand('all',
                        1) == ['zero', 'noise', 'mean', 'swap', 'image', 'drop_last_1', 'early_0']
    for wrong in ('zeros', 'early_', 'drop_last_x', 'zero;mean'):
        with pytest.raises(ValueError, match='expected zero, noise'):
            probe.expand(wrong)


def test_the_other_image_is_the_next_rows(run):
    top, _ = run
    rows = prepare.read_split(str(top / 'data'), 'test')
    encoded = lambda rows: prepare.Rows(rows, 'test', 1, tokenizer=load_tokenizer(
        str(top / 'data' / 'tokenizer')), data_dir=str(top / 'data'), image_size=84, max_tiles=1,
                                        num_image_tokens=9)
    changed, clean = encoded(probe.with_other_images([*rows,
                                                      dict(question='no image')])), encoded(rows)
    assert len(changed) == len(clean)
    for i in (0, 5, 16):
        assert changed[i]['input_ids'] == clean[i]['input_ids']
        assert torch.equal(changed[i]['pixel_values'], clean[(i + 1) % 17]['pixel_values'])


def test_mcnemar_is_exact():
    """Against the enumeration of all outcomes of n fair coins."""
    for b, c in ((0, 0), (1, 0), (5, 5), (10, 2), (0, 9), (3, 7)):
        n = b + c
        heads = [bin(outcome).count('1') for outcome in range(2 ** n)]
        extreme = sum(abs(h - n / 2) >= abs(b - n / 2) for h in heads) / 2 ** n
        assert probe.mcnemar(b, c) == pytest.approx(extreme)
    assert probe.mcnemar(0, 400) < 1e-100
    assert probe.pair({'a': True, 'b': False, 'c': True},
                      {'a': False, 'b': False, 'c': True, 'd': True}) == (1, 0, 1.0)


def test_what_thoughts_say(run):
    """Thoughts made of the head's own rows say these tokens, and the table finds them in the
    steps."""
    top, _ = run
    model, tokenizer, _ = load_checkpoint(str(top / 'out' / 'best.pt'))
    head = model.language_model.lm_head.weight.detach()
    ids = [tokenizer.encode(word)[0] for word in ('blue', 'green', 'red')]
    say = lambda token: 50 * head[token] / head[token].norm()
    rows = [dict(steps=['blue', 'it is green.']), dict(steps=['blue']),
            dict(steps=['blue', 'x'], results=['blue', 'red'])]
    thoughts = torch.stack([
        torch.stack([say(ids[0]), say(ids[1])]),
        torch.stack([say(ids[2]), torch.zeros(64)]),
        torch.stack([say(ids[0]), say(ids[2])])
    ])
    first, second = probe.read(model, tokenizer, thoughts, rows)
    assert first['says'] == 'blue'
    assert first['share'] == pytest.approx(2 / 3)
    # row 2 has no second thought
    assert first['names_step'] == pytest.approx([2 / 3, 0])
    assert second['names_step'] == pytest.approx([0, 1])
    long = probe.read(model, tokenizer, thoughts[:, :1],
                      [*rows[:2], dict(steps=['x', 'y', 'blue'])])[0]
    # the share of the rows that have such a step
    assert long['names_step'] == pytest.approx([1 / 3, 0, 1])
    p = (thoughts[:, 0] @ head.T).softmax(-1)
    assert first['entropy_bits'] == pytest.approx(-(p * p.log2()).nan_to_num().sum(1).mean().item(),
                                                  abs=1e-4)
    assert first['mass_on_step'][0] == pytest.approx(
        p[:, [ids[0], tokenizer.encode(' blue')[0]]].sum(1).mean().item(), abs=1e-4)
    assert first['norm'] == pytest.approx(50)
    assert first['cosine_before'] is None
    assert second['cosine_before'] == pytest.approx(
        F.cosine_similarity(thoughts[[0, 2], 0], thoughts[[0, 2], 1]).mean().item(), abs=1e-5)
    assert len(list(probe.describe_thoughts([first, second]))) == 3
    # also rows without steps and with prices
    for path, rows in ((top / 'one.png', rows), (top / 'two.png', [{}] * 3)):
        rows = [dict(row, question='More than $5 or than $6^?') for row in rows]
        probe.draw_thoughts(str(path), model, tokenizer, thoughts.roll(1, 0), rows,
                            probe.read(model, tokenizer, thoughts, rows))
        assert Image.open(path).size[0] > 500


# --------------------------------------------------------------------------------------------------
# work: floating-point operations, which no busy machine changes

TINY = Config(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, head_dim=8, vision_hidden_size=24, vision_intermediate_size=40,
              vision_num_layers=2, vision_num_heads=3, image_size=56, eos_token_ids=(-1, ))


@pytest.fixture(scope='module')
def pair():
    """bench.py's two models, tiny but for the vocabulary."""
    bench.device, bench.autocast = 'cpu', contextlib.nullcontext()
    return reference.models(TINY, bench.seed)


def test_what_is_benchmarked_computes_the_same(pair):
    """The floor is what pause tokens compute, the published loop and generation what ours
    compute."""
    ours, theirs = pair
    batch = bench.make_batch(TINY, 4, 3)
    assert reference.floor_loss(theirs, batch).item() == pytest.approx(
        ours(**batch, edit_thought=ours.as_pause).loss.item(), rel=1e-5)
    assert reference.published_loss(theirs, batch, TINY.latent_token_id)[0].item() == pytest.approx(
        ours(**batch).loss.item(), rel=1e-5)
    asked, plain = (bench.make_batch(TINY, 4, n, supervised=False) for n in (3, 0))
    with torch.no_grad():
        assert (reference.published_generate(theirs, asked, TINY.latent_token_id, 6).tolist()
                == ours.generate(**asked, max_new_tokens=6).tolist())
        assert reference.plain_generate(theirs, plain,
                                        6).tolist() == ours.generate(**plain,
                                                                     max_new_tokens=6).tolist()


@pytest.mark.parametrize('n', (0, 1, 8))
def test_training_costs_the_flops_of_one_plain_pass(pair, n):
    """Within 1 % of transformers' plain pass over the same tokens, so nothing (head, ViT, prompt)
    is computed twice. Less where rows differ in length, since padding skips the MLP."""
    ours, theirs = pair
    ratios = []
    for tiles in ((1,), (1, 12)):
        batch = bench.make_batch(TINY, 4, n, tiles)
        floor, loop = (bench.cost(bench.step_of(model, loss))['flops']
                       for model, loss in ((theirs, lambda: reference.floor_loss(theirs, batch)),
                                           (ours, lambda: ours(**batch).loss)))
        ratios.append(loop / floor)
    assert abs(ratios[0] - 1) < 0.01
    assert ratios[1] < ratios[0] - 0.002


def test_a_generated_token_costs_the_flops_of_one_token(pair):
    """Exactly its matrix products and its attention to the slots; and the first token what a pass
    over the prompt costs."""
    ours, theirs = pair
    batch, B, N = bench.make_batch(TINY, 4, 8, supervised=False), 4, 9
    one, many = (bench.cost(lambda: ours.generate(**batch, max_new_tokens=n))['flops']
                 for n in (1, N))
    lm, c = ours.language_model, TINY
    matrices = (
        sum(p.numel() for layer in lm.model.layers for p in layer.parameters() if p.dim() == 2) +
        lm.lm_head.weight.numel())
    slots = sum(lay_out(batch['input_ids'], batch['attention_mask'], c).widths) + N
    assert many - one == (N - 1) * B * (
        2 * matrices + 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * slots)
    with torch.no_grad():
        prompt = bench.cost(lambda: theirs.model.language_model(
            inputs_embeds=reference.embed(theirs, batch), use_cache=False))['flops']
    assert one == pytest.approx(prompt + 2 * B * lm.lm_head.weight.numel(), rel=0.02)


def test_the_other_sizes_are_measured(monkeypatch, capsys):
    monkeypatch.setattr(bench, 'repeats', 1)
    monkeypatch.setattr(bench, 'tiles', (2,), raising=False)
    monkeypatch.setattr(bench, 'config', TINY, raising=False)
    assert bench.answer_in_bfloat16().keys() == {'transformers', 'ours', 'ours, 8 thoughts'}
    text = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=8)
    monkeypatch.setattr(bench, 'config', replace(bench.CONFIGS['smollm2'], **text))
    took = bench.wide_and_short()
    assert all(t.keys() == {0, 2, 4, 8, 16} for t in took.values())
    said = capsys.readouterr().out
    assert 'an answer of 16 tokens, 2 tiles, bfloat16: transformers' in said
    assert '8 rows of 64 to 68 tokens, a step by thoughts, matrices frozen' in said


# --------------------------------------------------------------------------------------------------
# data sets

def test_colour_chain_is_what_it_says():
    """The picture alone gives the answer, and the map cannot be inverted."""
    invertible = 0
    for seed in range(50):
        image, row = toy.draw_chain(np.random.default_rng(seed))
        by_rgb = {rgb: name for name, rgb in toy.COLOURS.items()}
        cells = image.reshape(3, 28, 3, 28, 3).swapaxes(1, 2).reshape(9, 28, 28, 3)
        leads_to = {
            by_rgb[tuple(c[3, 3])]: by_rgb[tuple(c[14, 14])]
            for c in cells
            if tuple(c[3, 3]) in by_rgb
        }
        here = start = row['question'].split(' from ')[1].rstrip('?')
        assert len(leads_to) == 8
        for step in row['rationales']:
            here = leads_to[here]
            assert step.split()[0] == here
        assert here == row['choices'][row['correct_choice_idx']]
        assert len({start, *(s.split()[0] for s in row['rationales'])}) == 5
        assert start not in row['choices']
        assert len(set(row['choices'])) == 4
        invertible += len(set(leads_to.values())) == 8
    assert invertible == 0
    assert len(toy.draw_chain(np.random.default_rng(0), 6)[1]['rationales']) == 6


@pytest.mark.parametrize('nodes', (10, 23, 'published'))
def test_graphs_are_what_they_say(nodes):
    """Read from the question alone: one of the two kinds can be reached, the steps are a shortest
    way to it, and the other is as far from another person: once it was nearer, and who looked for
    the nearest person was right in 87 % of the graphs."""
    lengths, first, clues = [], 0, np.zeros(4)
    if nodes == 'published':
        rows = toy.draw_published(dict(test=200), 0)['test']
    else:
        rows = [toy.draw_graph(np.random.default_rng(seed), nodes, 1 + seed % 3)
                for seed in range(200)]
    for seed, row in enumerate(rows):
        asked = 3 if nodes == 'published' else 1 + seed % 3
        *facts, question = re.findall(r'[^.?]+[.?]', row['question'])
        edges = [
            re.fullmatch(r'(?:Every )?(\w+) is a (\w+)\.', fact.strip()).groups() for fact in facts
        ]
        who, one, other = re.fullmatch(r'Is (\w+) a (\w+) or (?:a )?(\w+)\?',
                                       question.strip()).groups()
        assert len(set(edges)) == len(edges)
        assert all(fact.strip().startswith('Every') == a.endswith('pus')
                   for fact, (a, b) in zip(facts, edges))
        reached, away, far = {who: 0}, {who}, 0
        while away:
            away, far = {b for a, b in edges if a in away} - reached.keys(), far + 1
            reached.update(dict.fromkeys(away, far))
        right = row['results'][-1]
        assert {one, other} & reached.keys() == {right}
        assert row['answer'] == f'{who} is a {right}.'
        assert right in (one, other)
        assert len(row['steps']) == len(row['results']) == reached[right] >= asked
        here = who
        for step, result in zip(row['steps'], row['results']):
            assert (here, result) in edges
            assert step == f'{"" if here == who else "Every "}{here} is a {result}.'
            here = result
        lengths.append(len(row['steps']))
        first += right == one
        above = lambda kind: {a for a, b in edges if b == kind}
        grand = lambda kind: set().union(*map(above, above(kind)))
        looks = (lambda kind: any(not a.endswith('pus') for a in above(kind)),
                 lambda kind: any(not a.endswith('pus') for a in grand(kind)),
                 lambda kind: len(above(kind)), lambda kind: sum(kind in edge for edge in edges))
        wrong = other if right == one else one
        clues += [0.5 + 0.5 * np.sign(int(look(right)) - int(look(wrong))) for look in looks]
    assert ({3, 4, 5} if nodes == 'published' else {1, 2, 3}) <= set(lengths)
    assert 75 <= first <= 125
    # about half of 200: none gives the answer away
    assert all(80 <= clue <= 120 for clue in clues), clues


def test_graphs_of_the_published_size():
    """As measured on the published 500 test rows: 22.8 nodes, 35.8 edges, 3 to 6 steps (3.78)."""
    rows = toy.draw_published(dict(test=300), 1)['test']
    nodes = [{name for edge in row['edges'] for name in edge} for row in rows]
    assert np.mean([len(names) for names in nodes]) == pytest.approx(22.8, abs=0.7)
    assert np.mean([len(row['edges']) for row in rows]) == pytest.approx(35.8, abs=1.5)
    assert np.mean([len(row['steps']) for row in rows]) == pytest.approx(3.8, abs=0.25)
    assert len(set().union(*nodes)) == 38 + 17  # kinds and people
    assert '\n' not in rows[0]['question']
    for k in (1, 2, 3):  # the published set's rules of so many edges: 59.7, 83.4, 90.6 %
        assert np.mean([shortcuts.score(row, k) for row in rows]) == pytest.approx(0.5, abs=0.04)


def test_a_recipe_that_cannot_be_read_back_is_refused(run, tmp_path):
    said = script('train.py', *TOY, f'--data_dir={run[0]}/data', f'--out_dir={tmp_path}/out',
                  '--answer=It is said', fails=True)
    assert "'It is said' makes 'It is said' of row 00000, which is read back as no option" in said
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('workers', (0, 1))
def test_a_slip_in_changed_code_keeps_its_traceback(run, tmp_path, workers):
    """An unpacking error in `think`, or in `encode`, is not for the user; what is raised for the
    user is a sentence."""
    for name in ('model.py', 'prepare.py'):
        for file in ('configurator.py', 'model.py', 'prepare.py', 'sample.py', 'train.py',
                     'experiments'):
            source = os.path.join(HERE, file)
            if os.path.isdir(source):
                shutil.copytree(source, tmp_path / file, dirs_exist_ok=True)
            else:
                shutil.copy(source, tmp_path)
        text = (tmp_path / name).read_text()
        head = '    def think(' if name == 'model.py' else 'def encode('
        place = text.index('"""\n', text.index('"""', text.index(head)) + 3) + 4
        indent = '        ' if name == 'model.py' else '    '
        (tmp_path / name).write_text(f'{text[:place]}{indent}a, b = 1, 2, 3\n{text[place:]}')
        done = subprocess.run([
            sys.executable, 'train.py',
            os.path.join(HERE,
                         'config/toy.py'), f'--data_dir={run[0]}/data', f'--out_dir={tmp_path}/out',
            '--overwrite=True', '--max_steps=1', f'--num_workers={workers}'
        ], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1
        assert 'Traceback' in done.stderr
        assert 'a, b = 1, 2, 3' in done.stderr
        assert 'too many values to unpack' in done.stderr


def test_numbers_on_a_pictures_axes(tmp_path):
    """A question may hold dollar signs, and a logarithmic axis has powers in its labels: neither is
    shown as source."""
    import matplotlib.text
    shown = []
    draw = matplotlib.text.Text.draw

    def record(self, renderer):
        shown.append((self.get_text(), self.get_parse_math()))
        return draw(self, renderer)

    matplotlib.text.Text.draw = record
    try:
        with open(tmp_path / 'metrics.jsonl', 'w') as f:
            for step in (1, 2):
                f.write(
                    json.dumps(dict(event='train', step=step, stage=0, loss=10.0 ** -step)) + '\n')
                f.write(
                    json.dumps(dict(event='eval', step=step, stage=0, loss=0.1, accuracy=0.5)) +
                    '\n')
        train.draw_curves(str(tmp_path / 'curves.png'), str(tmp_path / 'metrics.jsonl'))
    finally:
        matplotlib.text.Text.draw = draw
    powers = [parsed for text, parsed in shown if 'mathdefault' in text]
    assert powers
    assert all(powers)
    assert probe.literal('$5 or $6') == r'\$5 or \$6'


def test_the_result_of_a_step_in_coconuts_format_is_its_last_word(loaded):
    tokenizer = loaded[2]
    row = dict(steps=['Every wumpus is a lompus.', '<<48/2=24>>'])
    first = [{tokenizer.decode([token]).strip()
              for token in tokens}
             for tokens in probe.results_of(row, tokenizer)]
    assert first == [{'l', ''} - {''}, {'2'}]


# --------------------------------------------------------------------------------------------------
# the commands, as a user runs them

TOY = [
    'config/toy.py', '--log_interval=1', '--num_workers=0', '--batch_size=16',
    '--eval_batch_size=16', '--epochs_stage0=1', '--epochs_per_stage=1', '--max_latent_stage=1',
    '--warmup_steps=2'
]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A prepared toy data set and one short run over two stages."""
    top = tmp_path_factory.mktemp('run')
    script('prepare.py', 'config/toy.py', f'--data_dir={top}/data',
           '--train_rows=48', '--val_rows=17', '--test_rows=17')
    said = script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={top}/out')
    return top, said


def weights_of(path):
    return torch.load(path, weights_only=True)['model']


def test_a_run_leaves_what_it_promises(run):
    top, said = run
    assert said.count("  asked 'Four doors from ") == 4  # two rows in words after each epoch
    assert re.search(r'in predictions_test.json \d+ answers that say no option stand as', said)
    out = top / 'out'
    assert {
        'best.pt', 'last.pt', 'epoch_1.pt', 'epoch_2.pt', 'metrics.jsonl', 'metrics_epoch_2.json',
        'curves.png', 'predictions_test.json', 'answers_test.json'
    } <= set(os.listdir(out))
    events = [json.loads(line) for line in open(out / 'metrics.jsonl')]
    assert ([e['event'] for e in events]
            == (['train'] * 3 + ['eval']) * 2 + ['final', 'final'])
    of_epoch = json.load(open(out / 'metrics_epoch_1.json'))
    assert {'accuracy', 'loss', 'train_loss', 'lr', 'grad_norm', 'tokens_per_s',
            'images_per_s'} <= of_epoch.keys()
    assert of_epoch['train_loss'] == pytest.approx(np.mean([e['loss'] for e in events[:3]]))
    assert of_epoch['grad_norm'] == pytest.approx(np.mean([e['grad_norm'] for e in events[:3]]))
    assert of_epoch['lr'] == events[2]['lr']
    assert [e['step'] for e in events if e['event'] == 'train'] == [1, 2, 3, 4, 5, 6]
    for e in events:
        assert {'event', 'step', 'stage', 'epoch', 'time'} <= e.keys()
        if e['event'] == 'eval':
            assert {
                'accuracy', 'loss', 'tokens_per_answer', 'thoughts_per_answer', 'unparsed',
                'examples'
            } <= e.keys()
            assert e['thoughts_per_answer'] == 2 * e['stage']
            assert e['examples'] == 17
    predictions, rows = json.load(open(out / 'predictions_test.json')), prepare.read_split(
        str(top / 'data'), 'test')
    assert all(predictions[r['question_id']]['multiple_choice'] in r['choices'] for r in rows)
    assert len(predictions) == len(rows)
    # the official metric
    right = sum(
        predictions[r['question_id']]['multiple_choice'] == r['choices'][r['correct_choice_idx']]
        for r in rows)
    assert right / len(rows) == events[-1]['accuracy_default_a'] >= events[-1]['accuracy']
    best = torch.load(out / 'best.pt', weights_only=True)
    assert {'model', 'config', 'tokenizer', 'knobs', 'stage', 'epoch', 'step',
            'accuracy'} <= best.keys()
    for name in ('best.pt', 'epoch_1.pt', 'epoch_2.pt'):
        # last.pt alone holds it
        assert 'optimizer' not in torch.load(out / name, weights_only=True)
    assert best['stage'] == 1  # the furthest stage, whatever stage 0 scored


def test_a_checkpoint_reloads_bit_for_bit(run):
    top, _ = run
    model, tokenizer, _ = load_checkpoint(str(top / 'out' / 'last.pt'))
    saved = weights_of(top / 'out' / 'last.pt')
    assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items())
    assert all(tokenizer.convert_tokens_to_ids(t) < model.config.vocab_size for t in SPECIAL_TOKENS)
    assert tokenizer.encode('Four doors') == load_tokenizer(str(top / 'data' /
                                                                'tokenizer')).encode('Four doors')


def test_eval_only_measures_any_checkpoint(run, tmp_path):
    """Also a folder that train.py never saw, and a test split without labels."""
    top, _ = run
    (tmp_path / 'data').mkdir()
    for split in ('validation', 'test'):
        rows = prepare.read_split(str(top / 'data'), split)
        if split == 'test':
            for row in rows:
                for label in ('answer', 'steps', 'correct_choice_idx'):
                    del row[label]
        (tmp_path / 'data' / f'{split}.jsonl').write_text(''.join(
            json.dumps(row) + '\n' for row in rows))
    os.symlink(top / 'data' / 'images', tmp_path / 'data' / 'images')
    save_tiny(tmp_path / 'model')
    for number, source in enumerate((top / 'out' / 'best.pt', tmp_path / 'model')):
        said = script('train.py', *TOY, f'--data_dir={tmp_path}/data',
                      f'--out_dir={tmp_path}/{number}', '--eval_only=True', f'--init_from={source}',
                      '--max_length=512')
        assert 'validation: accuracy' in said
        assert 'test: no labels' in said
        final = events(tmp_path / str(number), 'final')
        assert [(e['step'], e['epoch']) for e in final] == [(0, 0) if number else (6, 2)] * 2
        assert len(json.load(open(tmp_path / str(number) / 'predictions_test.json'))) == 17
    assert (tmp_path / '0' /
            'predictions_test.json').read_text() == (top / 'out' /
                                                     'predictions_test.json').read_text()


def events(folder, kind, drop=('time', 'seconds_per_answer', 'tokens_per_s', 'images_per_s', 'wait',
                               'memory_gb')):
    """Logged lines without what a clock or the machine decides."""
    lines = map(json.loads, open(folder / 'metrics.jsonl'))
    return [{k: v for k, v in line.items() if k not in drop}
            for line in lines if line['event'] == kind]


def assert_same_run(a, b):
    """Weights, optimizer, random states and metrics of two finished runs, bit for bit."""
    for name in ('best.pt', 'last.pt', 'epoch_1.pt', 'epoch_2.pt'):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (a, b))
        assert all(torch.equal(two['model'][k], v) for k, v in one['model'].items()), name
        assert all(one[k] == two[k] for k in ('stage', 'epoch', 'step', 'accuracy')), name
    assert one.keys() == two.keys()
    one, two = (torch.load(folder / 'last.pt', weights_only=True) for folder in (a, b))
    assert one['best'] == two['best']
    states = [saved['optimizer']['state'] for saved in (one, two)]
    for p, state in states[0].items():
        assert all(torch.equal(states[1][p][k], v) for k, v in state.items()), p
    assert one['random'][:2] == two['random'][:2]
    assert torch.equal(one['random'][2], two['random'][2])
    for k in (1, 2):
        one, two = (json.load(open(folder / f'metrics_epoch_{k}.json')) for folder in (a, b))
        for clock in ('seconds_per_answer', 'tokens_per_s', 'images_per_s'):
            del one[clock], two[clock]
        assert one == two
    for kind in ('train', 'eval', 'final'):
        assert events(a, kind) == events(b, kind), kind
    assert (a / 'predictions_test.json').read_text() == (b / 'predictions_test.json').read_text()


def test_micro_batches_and_stopping_inside_an_epoch(run):
    """Micro-batches give the same losses to rounding; a run stopped by max_steps and resumed is the
    run left alone."""
    top, _ = run
    args = [*TOY, f'--data_dir={top}/data']
    script('train.py', *args, f'--out_dir={top}/micro', '--micro_batch_size=4')
    assert '1 rank(s), 1 micro-batch(es) of 16' in script(
        'train.py', *args, f'--out_dir={top}/m', '--micro_batch_size=64', '--dry_run=True')
    losses = lambda name: [e['loss'] for e in events(top / name, 'train')]
    assert losses('micro') == pytest.approx(losses('out'), rel=1e-3)
    assert len(losses('out')) == 6
    right = lambda name: [e['token_accuracy'] for e in events(top / name, 'train')]
    assert right('micro') == pytest.approx(right('out'), abs=0.02)
    assert max(right('out')) > 0.1
    script('train.py', *args, f'--out_dir={top}/resumed', '--max_steps=2')
    assert torch.load(top / 'resumed' / 'last.pt', weights_only=True)['epoch'] == 0
    script('train.py', *args, f'--out_dir={top}/resumed', '--max_steps=4', '--init_from=resume')
    # more workers change no row and no order
    script('train.py', *args, f'--out_dir={top}/resumed', '--init_from=resume', '--num_workers=2')
    assert_same_run(top / 'out', top / 'resumed')
    starts = lambda: [start['command'] for start in json.load(open(top / 'resumed' / 'run.json'))]
    before = starts()
    assert len(before) == 3
    script('train.py', *args, f'--out_dir={top}/resumed', '--init_from=resume', '--eval_only=True')
    # an evaluation in the run's folder lets none of its starts go
    assert len(starts()) == 4
    assert starts()[:3] == before
    assert torch.load(top / 'resumed' / 'last.pt',
                      weights_only=True)['knobs']['init_from'] == 'scratch'
    assert 'batch_size=16 is not a multiple of 5: 1 rank(s)' in script(
        'train.py', *args, f'--out_dir={top}/m', '--micro_batch_size=5', fails=True)


def wait_for(process, there):
    """Until there() holds, while the process runs."""
    while not there():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


DYING = """
import os, runpy, signal, sys, torch
whole, count = torch.save, [0]
def save(state, file):
    count[0] += 1
    if count[0] == 5:
        file.write(b'half of a checkpoint')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    whole(state, file)
torch.save = save
sys.argv = ['train.py', *sys.argv[1:]]
runpy.run_path('train.py', run_name='__main__')
"""


DYING_IN_EVALUATION = """
import os, runpy, sample, signal, sys
sample.ask = lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = ['train.py', *sys.argv[1:]]
runpy.run_path('train.py', run_name='__main__')
"""


def test_killed_at_any_moment(run, tmp_path):
    """SIGTERM inside an epoch, SIGKILL while a checkpoint is being written, behind the stage
    switch, and in the last evaluation: resumed each time, the run ends as one left alone, with
    activation checkpointing and workers."""
    top, _ = run
    args = [
        *TOY, f'--data_dir={top}/data', '--activation_checkpointing=True', '--save_every=1',
        '--batch_size=4', '--num_workers=1'
    ]
    script('train.py', *args, f'--out_dir={tmp_path}/alone')
    out = tmp_path / 'killed'
    args += [f'--out_dir={out}']
    logged = lambda: len(
        (out / 'metrics.jsonl').read_text().splitlines()) if (out / 'metrics.jsonl').exists() else 0
    process = start('train.py', *args)
    wait_for(process, lambda: logged() >= 3)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert (process.returncode == 143
            and error.startswith('train.py: stopped by SIGTERM after step ')
            and error.count('\n') == 1), error
    before = torch.load(out / 'last.pt', weights_only=True)
    assert before['step'] == int(error.split('after step ')[1].split(',')[0]) >= 3
    process = start('-c', DYING, *args, '--init_from=resume')
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert list(out.glob('*.part'))
    assert torch.load(out / 'last.pt', weights_only=True)['step'] > before['step']
    process = start('train.py', *args, '--init_from=resume')
    wait_for(process, lambda: '"stage": 1' in (out / 'metrics.jsonl').read_text())
    process.kill()
    process.communicate()
    process = start('-c', DYING_IN_EVALUATION, *args, '--init_from=resume')
    process.communicate(timeout=60)
    last = torch.load(out / 'last.pt', weights_only=True)
    assert process.returncode == -signal.SIGKILL
    assert last['step'] == 24
    assert last['epoch'] == 1
    script('train.py', *args, '--init_from=resume')
    assert not list(out.glob('*.part'))
    assert_same_run(tmp_path / 'alone', out)


def test_ctrl_c_ends_evaluation_too(run, tmp_path):
    """last.pt is written before the evaluation, so the answer to Ctrl-C need not wait for its
    end."""
    top, _ = run
    process = start('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}',
                    '--eval_batch_size=1', '--epochs_stage0=1000')
    wait_for(process, lambda: (tmp_path / 'epoch_1.pt').exists())
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'stopped by SIGINT after step' in error
    assert 'Traceback' not in error
    for file in tmp_path.glob('*.pt'):
        torch.load(file, weights_only=True)
    assert not list(tmp_path.glob('*.part'))


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
    """Prepared rows with one to four tiles or no image, and one to three steps."""
    top, rng = tmp_path_factory.mktemp('mixed'), np.random.default_rng(0)
    rows = []
    for i in range(9):
        png = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (28, (28, 60, 90)[i % 3], 3),
                                     dtype=np.uint8)).save(png, 'PNG')
        rows.append(dict(RAW, question_id=f'row{i}', question=f'What is {i}?',
                         rationales=['One.', 'Two two.', 'Three.'][:1 + i % 3],
                         image=dict(bytes=png.getvalue(), path=None)))
    for split in ('train', 'validation'):
        parquet(top / 'in', split, rows)
    script('prepare.py', '--dataset', top / 'in', '--data_dir', top / 'data', '--image_size=28',
           '--max_tiles=4', '--init_from=scratch', '--steps_from=all')
    for split in ('train', 'validation'):
        rows = prepare.read_split(f'{top}/data', split)
        for row in rows[::4]:
            del row['image']
        (top / 'data' / f'{split}.jsonl').write_text(''.join(
            json.dumps(row) + '\n' for row in rows))
    return [
        *TOY, '--prompt=<image>{question}\n{choices}\n', f'--data_dir={top}/data',
        '--image_size=28', '--max_tiles=4', '--max_length=256', '--max_latent_stage=2',
        '--start_stage=2', '--pad_latent_to_max=False', '--batch_size=8', '--eval_batch_size=4'
    ]


def test_two_ranks_are_one_process(mixed, tmp_path):
    """Rows with other tiles, thoughts and without an image; the last batch has one row for two
    ranks; thoughts are taught. Gradients are read from the optimizer's first moment. One process,
    micro-batches and two gloo ranks agree to rounding, and count each validation row once."""
    mixed = [*mixed, '--teach_thoughts=1']
    script('train.py', *mixed, f'--out_dir={tmp_path}/one')
    script('train.py', *mixed, f'--out_dir={tmp_path}/micro', '--micro_batch_size=2')
    process = start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py',
                    *mixed, f'--out_dir={tmp_path}/ranks', '--micro_batch_size=2')
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert out.count('step      1/2') == 1
    assert '2 rank(s), 2 micro-batch(es) of 2' in out
    one, *others = (torch.load(tmp_path / name / 'last.pt', weights_only=True)
                    for name in ('one', 'micro', 'ranks'))
    assert one['step'] == 2
    assert one['stage'] == 2
    for other in others:
        states = one['optimizer']['state'], other['optimizer']['state']
        assert states[0].keys() == states[1].keys()
        assert len(states[0]) > 40
        assert all(
            relative(states[1][p]['exp_avg'], state['exp_avg']) < 1e-4
            for p, state in states[0].items())
    for name in ('micro', 'ranks'):
        for kind, keys in (('train', ('step', 'loss', 'token_accuracy', 'lr', 'grad_norm')),
                           ('eval', ('loss', 'accuracy', 'tokens_per_answer', 'thoughts_per_answer',
                                     'examples'))):
            for a, b in zip(events(tmp_path / 'one', kind), events(tmp_path / name, kind),
                            strict=True):
                assert [a[k] for k in keys] == pytest.approx([b[k] for k in keys],
                                                             rel=1e-4), (name, kind)
    assert ((tmp_path / 'one' / 'predictions_validation.json').read_text()
            == (tmp_path / 'ranks' / 'predictions_validation.json').read_text())
    assert not list((tmp_path / 'ranks').glob('*.part'))


def test_a_signal_that_one_of_two_ranks_gets_ends_both(mixed, tmp_path):
    """In the middle of an evaluation, where the ranks ask rows of their own."""
    out = tmp_path / 'out'
    process = start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py',
                    *mixed, f'--out_dir={out}', '--eval_batch_size=1', '--max_new_tokens=200',
                    '--log_interval=1')
    wait_for(process, lambda: (out / 'metrics.jsonl').exists()
             and '"step": 2,' in (out / 'metrics.jsonl').read_text())
    time.sleep(0.2)
    children = open(f'/proc/{process.pid}/task/{process.pid}/children').read().split()
    os.kill(int(children[-1]), signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode
    assert error.count('train.py: stopped by SIGTERM after step ') == 2
    assert 'train.py", line' not in error  # torchrun's traceback alone
    assert torch.load(out / 'last.pt', weights_only=True)['step'] > 0


def test_the_schedule_is_shown_before_it_is_run(run, mixed, tmp_path):
    top, _ = run
    toy = [
        *TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}/none', '--dry_run=True',
        '--max_latent_stage=2'
    ]
    said = script('train.py', *toy, '--uniform_prob=0.5', '--epochs_last_stage=2', '--c_thought=3')
    for line in ('stage 0: 1 epochs of 3 steps, 48 rows, 0 thoughts, 4 steps in words',
                 'stage 1: 1 epochs of 3 steps, 48 rows, 3 thoughts, 3 steps in words',
                 'stage 2: 1 epochs of 3 steps, 48 rows, 6 thoughts, 2 steps in words',
                 'stage 3: 2 epochs of 3 steps, 48 rows, 6 thoughts, 0 steps in words'):
        assert line in said
    assert said.count('each row with chance 0.5 at an earlier stage') == 3
    assert '5 epochs, 15 steps' in said
    assert '<img><IMG_CONTEXT>*9</img>Four doors from' in said
    assert '<|start-latent|><|latent|>*6<|end-latent|>[[' in said
    assert '<|im_end|>]]' in said
    assert not (tmp_path / 'none').exists()
    said = script('train.py', *toy, '--start_stage=2')
    assert 'stage 1:' not in said
    assert '1 epochs, 3 steps' in said
    rates = lambda said: [line.split('learning rate ')[1].split(',')[0]
                          for line in said.splitlines() if line.startswith('stage')]
    flags = '--learning_rate=1e-3', '--learning_rate_stage0=0', '--min_lr_ratio=0.1'
    assert rates(script('train.py', *toy, *flags)) == ['5.0e-04 to 1.0e-03 to 1.0e-03'] * 3
    assert rates(script('train.py', *toy, *flags, '--reset_optimizer=False')) == [
        '5.0e-04 to 1.0e-03 to 1.0e-03', '9.6e-04 to 9.6e-04 to 6.5e-04',
        '4.5e-04 to 4.5e-04 to 1.4e-04'
    ]
    assert '0 thoughts, 0 steps in words' in script('train.py', *toy, '--mode=no_cot')
    assert '3 epochs of 3 steps, 48 rows, 0 thoughts, 4 steps in words' in script(
        'train.py', *toy, '--mode=cot')
    assert '2 to 4 thoughts, 0 to 1 steps in words' in script(
        'train.py', *mixed, f'--out_dir={tmp_path}/none', '--dry_run=True')
    assert '4 thoughts, 0 to 1 steps in words' in script(
        'train.py', *mixed, '--pad_latent_to_max=True', '--dry_run=True')
    assert 'start_stage=3: expected 0 to 2' in script('train.py', *toy, '--start_stage=3',
                                                      fails=True)


def test_the_optimizer_is_reset_or_kept(run):
    """Kept, its step count runs through both stages."""
    top, _ = run
    steps = lambda name: {
        int(s['step'])
        for s in torch.load(top / name / 'last.pt', weights_only=True)['optimizer']['state'].values(
        )
    }
    script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={top}/kept',
           '--reset_optimizer=False')
    assert steps('kept') == {6}
    assert steps('out') == {3}


def test_a_run_starts_at_a_stage_from_a_checkpoint(run):
    """From the end of stage 0 with a fresh optimizer, stage 1 is what it is in a run through
    both."""
    top, _ = run
    script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={top}/later',
           f'--init_from={top}/out/epoch_1.pt', '--start_stage=1', '--max_steps=1')
    first, = events(top / 'later', 'train')
    fourth = events(top / 'out', 'train')[3]
    # another epoch, so other rows
    assert (first['stage'], first['lr']) == (1, fourth['lr'])
    assert first['epoch'] == 0


@pytest.mark.parametrize('mode', ('cot', 'no_cot', 'pause', 'no_thoughts'))
def test_modes_run(run, mode):
    top, _ = run
    script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={top}/{mode}', f'--mode={mode}')
    assert events(top / mode, 'final')[-1]['split'] == 'test'
    said = script('experiments/probe.py', f'--ckpt={top}/{mode}/best.pt')
    swap = [
        record for record in json.load(open(top / mode / 'probe_test.json'))
        if record['name'] == 'swap'
    ]
    if mode == 'pause':
        # every row's pause is the same
        assert swap[0]['only_clean'] == swap[0]['only_changed'] == 0
    else:
        assert 'swap left out, these answers have no thoughts' in said
        assert not swap


def test_pause_feeds_nothing_back(run):
    """In training, evaluation, its loss and sample.py: the learned embedding of <|latent|> stands
    for every thought."""
    top, _ = run
    # a learning rate of 0: the weights that the log speaks of are those on the disk
    out = top / 'still'
    args = [*TOY, f'--data_dir={top}/data', '--max_length=128', '--mode=pause']
    script('train.py', *args, f'--out_dir={out}', '--learning_rate=0', '--learning_rate_stage0=0')
    model, tokenizer, _ = load_checkpoint(str(out / 'best.pt'))
    table, ids = model.embed_text(torch.arange(
        model.config.vocab_size)).detach(), tokenizer.convert_tokens_to_ids
    pause, usual = table[model.config.latent_token_id].norm().item(), table.norm(
        dim=-1).mean().item()
    assert events(out, 'train')[-1]['thought_ratio'] == pytest.approx(pause / usual, rel=1e-5)
    # probe.py reads what the places hold, not what they are fed
    script('experiments/probe.py', f'--ckpt={out}/best.pt', '--intervene=')
    for thought in json.load(open(out / 'thoughts_test.json')):
        assert thought['norm'] != pytest.approx(pause, rel=1e-3)
    c = model.config
    rows = prepare.Rows(prepare.read_split(str(top / 'data'),
                                           'validation'), 'validation', 1, tokenizer,
                        str(top / 'data'), c.image_size, max_tiles=1,
                        num_image_tokens=c.num_image_tokens, mode='pause', c_thought=2,
                        prompt='<image>{question}\n{choices}\n', answer='{choice} {letter}')
    batch = prepare.collate([rows[i] for i in range(17)])
    logged = events(out, 'final')[0]['loss']
    assert logged == pytest.approx(
        model(**batch, edit_thought=model.as_pause).loss.item(), rel=1e-4)
    assert logged != pytest.approx(model(**batch).loss.item(), rel=1e-4)
    said = script('sample.py', '--ckpt', out / 'best.pt', '--image',
                  top / 'data' / 'images' / 'test' / '00000.png', '--choices=red|blue',
                  '--show_thoughts=1')
    assert said.count(f'(norm {pause:.2f},') == 2
    # as train.py starts them
    assert torch.equal(table[ids('<|start-latent|>')], table[ids('<|end-latent|>')])
    assert torch.equal(table[ids('<|start-latent|>')], table[tokenizer.encode('\n')[-1]])


def test_what_the_recipe_for_the_real_model_asks(run):
    """bfloat16 autocast, frozen vision, activation checkpointing; AdamW's knobs, decay on matrices
    alone, clipping."""
    top, _ = run
    args = [
        *TOY, f'--data_dir={top}/data', f'--init_from={top}/out/epoch_1.pt', '--start_stage=1',
        '--max_steps=1', '--grad_clip=0.01', '--weight_decay=0.5'
    ]
    script('train.py', *args, f'--out_dir={top}/float32')
    script('train.py', *args, f'--out_dir={top}/bfloat16', '--dtype=bfloat16',
           '--freeze_vision=True', '--activation_checkpointing=True')
    exact, rough = (events(top / name, 'train')[0]['loss'] for name in ('float32', 'bfloat16'))
    assert exact != rough == pytest.approx(exact, rel=0.02)
    before = weights_of(top / 'out' / 'epoch_1.pt')
    moved = {name: {key for key, value in weights_of(top / name / 'last.pt').items()
                    if not torch.equal(value, before[key])} for name in ('float32', 'bfloat16')}
    assert any(key.startswith('vision_model') for key in moved['float32'])
    assert moved['bfloat16']
    assert not any(key.startswith('vision_model') for key in moved['bfloat16'])
    optimizer = torch.load(top / 'float32' / 'last.pt', weights_only=True)['optimizer']
    decayed, others = optimizer['param_groups']
    assert (decayed['weight_decay'], others['weight_decay']) == (0.5, 0)
    assert all(
        (group['eps'], tuple(group['betas'])) == (1e-5, (0.9, 0.98)) for group in (decayed, others))
    first = lambda group: [optimizer['state'][p]['exp_avg'] for p in group['params']]
    assert {m.dim() > 1 for m in first(decayed)} == {True}
    assert {m.dim() > 1 for m in first(others)} == {False}
    # (1 - beta1) of the clipped gradient
    norm = torch.stack([m.norm() for m in first(decayed) + first(others)]).norm()
    assert norm.item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_the_best_checkpoint_is_of_the_furthest_stage(run):
    """Even where that is worse than an earlier one; and within a stage the best of its epochs, not
    the first."""
    top, _ = run
    args = [*TOY, f'--data_dir={top}/data', '--epochs_stage0=3']
    script('train.py', *args, f'--out_dir={top}/worse', '--learning_rate=1', '--epochs_per_stage=2')
    best_of = lambda evals: max(evals, key=lambda e: (e['accuracy'], -e['loss']))
    saved = lambda name: {
        key: torch.load(top / name / 'best.pt', weights_only=True)[key]
        for key in ('stage', 'step')
    }
    evals = events(top / 'worse', 'eval')
    assert best_of(evals)['stage'] == 0
    assert saved('worse').items() <= best_of([e for e in evals if e['stage'] == 1]).items()
    script('train.py', *args, f'--out_dir={top}/falling', '--epochs_per_stage=0')
    best = best_of(events(top / 'falling', 'eval'))
    assert saved('falling').items() <= best.items()
    assert best['step'] > 3


def test_sample_answers_a_batch(run):
    top, _ = run
    images = sorted(str(p) for p in (top / 'data' / 'images' / 'test').glob('*'))[:2]
    args = ['sample.py', '--ckpt', top / 'out' / 'best.pt', '--question', 'Four doors from red?',
            '--choices', 'blue|green|pink|white']
    said = script(*args, '--image', ','.join(images), '--show_thoughts=5')
    assert said.count('1 tiles, 9 visual tokens, 2 thoughts') == 2
    assert said.count('thought 2: ') == 2
    alone = script(*args, '--image', images[1])
    assert alone.split('\n->')[1].split('\n')[0] == said.split('\n->')[2].split('\n')[0]
    assert '3 thoughts' in script(*args, '--image', images[0], '--num_thoughts=3')
    answers = lambda said: re.findall('-> .*', said)
    assert (answers(script(*args, '--image', images[0], '--dtype=bfloat16'))
            == answers(script(*args, '--image', images[0])))
    assert script(*args, '--image', top / 'data' / 'images' / 'test').count('visual tokens') == 17


def test_evidence_on_a_checkpoint(run, tmp_path):
    """Interventions and paired tests by the command. After six steps of training no answer would
    change: weights three times as large react to all."""
    top, _ = run
    loud = torch.load(top / 'out' / 'best.pt', weights_only=True)
    for name, weight in loud['model'].items():
        if weight.dim() == 2 and 'layers' in name:
            weight *= 3
    torch.save(loud, tmp_path / 'loud.pt')
    def evaluate(out, *more):
        return script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}/{out}',
                      '--eval_only=True', f'--init_from={tmp_path}/loud.pt', *more)

    evaluate('clean')
    clean = json.load(open(tmp_path / 'clean' / 'answers_test.json'))
    right = sum(one['right'] for one in clean['answers'])
    other = json.loads(json.dumps(clean))
    for one in other['answers'][:5]:
        one['right'] = not one['right']
    for folder, content in (('other', other), ('elsewhere', dict(other, data='of other rows'))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'answers_test.json').write_text(json.dumps(content))
    said = script('experiments/probe.py', f'--ckpt={tmp_path}/loud.pt', '--intervene=all,early_3',
                  f'--compare={tmp_path}/other,{tmp_path}/elsewhere')
    here = 5 - sum(one['right'] for one in other['answers'][:5])
    assert f'of 17 rows {here} are right here alone, {5 - here} in {tmp_path}/other alone' in said
    assert f'{tmp_path}/elsewhere left out, it holds no answers to these rows' in said
    assert 'ms an answer in batches of 16' in said
    found = {record['name']: record for record in json.load(open(tmp_path / 'probe_test.json'))}
    assert list(found) == [
        'clean', f'compare {tmp_path}/other', 'zero', 'noise', 'mean', 'swap', 'image',
        'drop_last_1', 'drop_last_2', 'early_0', 'early_1', 'early_3'
    ]
    assert all({'name', 'accuracy', 'clean', 'rows', 'p'} <= record.keys()
               for record in found.values())
    assert [found[f'early_{k}']['thoughts_per_answer'] for k in (0, 1, 3)] == [0, 1, 3]
    assert found['zero']['thoughts_per_answer'] == 2
    tokens = sum(one['tokens'] for one in clean['answers']) / 17
    assert found['clean']['accuracy'] == right / 17
    for name in list(found)[2:]:
        e = found[name]
        assert right - e['only_clean'] + e['only_changed'] == round(17 * e['accuracy'])
        assert e['clean'] == right / 17
        assert (e['only_clean'], e['only_changed'],
                e['tokens_per_answer']) != (0, 0, tokens), f'{name} changed nothing'
    for e in (found['drop_last_2'], found['zero']):
        del e['name'], e['seconds_per_answer']
    assert found['drop_last_2'] == found['zero']
    said = evaluate('pause', '--mode=pause')
    assert "mode is 'pause' here, the checkpoint was trained with 'coconut'" in said
    script('experiments/probe.py', f'--ckpt={tmp_path}/loud.pt', '--intervene=swap',
           '--eval_batch_size=5')
    again = {record['name']: record for record in json.load(open(tmp_path / 'probe_test.json'))}
    assert again['swap']['accuracy'] == found['swap']['accuracy']  # whatever the batches
    assert "intervene='zeroes': expected zero, noise" in script(
        'experiments/probe.py', f'--ckpt={tmp_path}/loud.pt', '--intervene=zeroes', fails=True)
    assert 'compare=nowhere: no answers_*.json there' in script(
        'experiments/probe.py', f'--ckpt={tmp_path}/loud.pt', '--compare=nowhere', fails=True)


def test_bad_input_gets_one_sentence(run, tmp_path):
    top, _ = run
    image, best = next((top / 'data' / 'images' / 'test').glob('*')), top / 'out' / 'best.pt'
    sample = lambda **k: script(
        'sample.py', *(f'--{a}={b}'
                       for a, b in {**dict(ckpt=best, image=image), **k}.items()), fails=True)
    assert 'no image file none.png' in sample(image='none.png')
    (tmp_path / 'bad.png').write_bytes(b'\x89PNG\r\n\x1a\nrubbish')
    assert 'bad.png cannot be read as an image' in sample(image=tmp_path / 'bad.png')
    assert 'holds no image' in sample(image=HERE + '/config')
    assert 'gives 1 options: expected 2 to 8' in sample(choices='one')
    assert 'unknown knob imgae, did you mean image?' in sample(imgae='x')
    assert 'expected int' in sample(max_new_tokens='many')
    assert 'no checkpoint at none.pt' in sample(ckpt='none.pt')
    process = subprocess.run([sys.executable, 'sample.py', '--image=none.png', f'--ckpt={best}'],
                             cwd=HERE, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (1, 'sample.py: no image file none.png\n')
    data = best.read_bytes()
    (tmp_path / 'cut.pt').write_bytes(data[:len(data) // 2])
    assert 'cut.pt is not a whole checkpoint' in sample(ckpt=tmp_path / 'cut.pt')
    torch.save(dict(a=1), tmp_path / 'other.pt')
    assert 'is no checkpoint of train.py' in sample(ckpt=tmp_path / 'other.pt')
    other = torch.load(best, weights_only=True)
    other['config']['hidden_size'] = 32
    torch.save(other, tmp_path / 'shape.pt')
    assert 'expected [' in sample(ckpt=tmp_path / 'shape.pt')
    train = lambda *args: script(
        'train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}/out', *args, fails=True)
    assert 'no train row fits max_length=20 at stage 0' in train('--max_length=20')
    assert 'run prepare.py with the same config first' in train('--data_dir=nowhere',
                                                                f'--init_from={best}')
    assert "mode='coco'" in train('--mode=coco')
    assert 'eval_batch_size=0: expected 1 or more' in train('--eval_batch_size=0')
    assert 'c_thought=-1: expected 0 or more' in train('--c_thought=-1')
    assert 'batch_size=0: expected 1 or more' in train('--batch_size=0')
    assert 'threads=-1: expected 0 or more' in train('--threads=-1')
    assert 'cannot be filled' in train('--answer={othr}')
    assert not (tmp_path / 'out').exists()
    assert 'run prepare.py with the same config first' in train('--data_dir=nowhere')
    (tmp_path / 'file').write_text('not a folder')
    assert 'cannot be written (' in train(f'--out_dir={tmp_path}/file/out')
    (tmp_path / 'text.pt').write_text('no checkpoint')
    assert 'text.pt is not a whole checkpoint' in train(f'--init_from={tmp_path}/text.pt')
    assert 'expected True or False' in train('--reset_optimizer=1')
    assert 'no checkpoint at' in train('--init_from=resume')
    assert not list((tmp_path / 'out').glob('*.part'))


def test_a_run_is_not_mixed_with_another(run, tmp_path):
    top, _ = run
    args = [*TOY, f'--data_dir={top}/data', '--max_steps=2', '--save_every=1']
    script('train.py', *args, f'--out_dir={tmp_path}/out')
    train = lambda *more: script('train.py', *args, f'--out_dir={tmp_path}/out', *more, fails=True)
    assert 'holds another run (' in train()
    assert '--overwrite=True' in train('--eval_only=True', f'--init_from={top}/out/best.pt')
    said = train('--init_from=resume', '--mode=pause', '--learning_rate=1', '--dtype=bfloat16',
                 '--freeze_vision=True')
    assert all(f'{key}=' in said for key in ('mode', 'learning_rate', 'dtype', 'freeze_vision'))
    assert said.count('(was') == 4
    said = train('--init_from=resume', '--seed=7', '--c_thought=1', '--batch_size=8')
    assert 'c_thought=1 (was 2)' in said
    assert 'batch_size=8 (was 16)' in said
    assert 'seed=7 (was 0)' in said
    (tmp_path / 'data').mkdir()
    for split in ('train', 'validation'):
        (tmp_path / 'data' / f'{split}.jsonl').write_text(
            (top / 'data' / f'{split}.jsonl').read_text())
    for part in ('images', 'tokenizer'):
        os.symlink(top / 'data' / part, tmp_path / 'data' / part)
    # moved, but the same
    script('train.py', *args, f'--out_dir={tmp_path}/out', f'--data_dir={tmp_path}/data',
           '--init_from=resume')
    for split in ('train', 'validation'):
        with open(tmp_path / 'data' / f'{split}.jsonl', 'a') as f:
            f.write((top / 'data' / 'test.jsonl').read_text().splitlines()[0] + '\n')
        assert 'its rows are not those the run began with' in train('--init_from=resume',
                                                                    f'--data_dir={tmp_path}/data')
        (tmp_path / 'data' / f'{split}.jsonl').write_text(
            (top / 'data' / f'{split}.jsonl').read_text())
    os.remove(tmp_path / 'out' / 'last.pt')
    assert 'no checkpoint at' in train('--init_from=resume')
    shutil.copy(tmp_path / 'out' / 'best.pt', tmp_path / 'out' / 'last.pt')
    assert 'holds no optimizer state' in train('--init_from=resume')
    script('train.py', *args, f'--out_dir={tmp_path}/out', '--overwrite=True', '--max_steps=1')
    assert [e['step'] for e in events(tmp_path / 'out', 'train')] == [1]
    assert not list((tmp_path / 'out').glob('epoch_*'))


def test_a_lost_last_checkpoint_is_said_and_nothing_chosen(run, tmp_path):
    """The newest whole file holds weights alone: a stage can be started from it, the run cannot go
    on."""
    top, _ = run
    shutil.copytree(top / 'out', tmp_path / 'out')
    args = [*TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}/out', '--init_from=resume']
    for name, newest, stage in (('last.pt', 'epoch_2.pt', 1), ('epoch_2.pt', 'epoch_1.pt', 0)):
        data = (tmp_path / 'out' / name).read_bytes()
        (tmp_path / 'out' / name).write_bytes(data[:len(data) // 2])
        said = script('train.py', *args, fails=True)
        assert 'last.pt is not a whole checkpoint' in said
        assert f'the newest whole one is {tmp_path}/out/{newest}, the weights after step ' in said
        start = f'--init_from={tmp_path}/out/{newest} --start_stage={stage}'
        assert f'{start} and another --out_dir' in said
    os.remove(tmp_path / 'out' / 'last.pt')
    assert 'no checkpoint at' in script('train.py', *args, fails=True)
    shutil.copy(tmp_path / 'out' / 'epoch_1.pt', tmp_path / 'out' / 'last.pt')
    assert 'last.pt holds no optimizer state: start a stage from it' in script(
        'train.py', *args, fails=True)


def test_epoch_files_that_stay(run, tmp_path):
    """The newest, and those that end a stage."""
    args = [
        *TOY, f'--data_dir={run[0]}/data', f'--out_dir={tmp_path}/out', '--epochs_stage0=3',
        '--epochs_per_stage=3', '--batch_size=48'
    ]
    script('train.py', *args, '--max_steps=2')
    assert sorted(path.name for path in (tmp_path / 'out').glob('epoch_*.pt')) == ['epoch_2.pt']
    script('train.py', *args, '--init_from=resume')
    assert sorted(path.name for path in (tmp_path / 'out').glob('epoch_*.pt')) == [
        'epoch_3.pt', 'epoch_6.pt'
    ]
    script('train.py', *args, f'--out_dir={tmp_path}/none', '--keep_epochs=0')
    assert sorted(path.name for path in (tmp_path / 'none').glob('epoch_*.pt')) == [
        'epoch_3.pt', 'epoch_6.pt'
    ]


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    top, _ = run
    bad = torch.load(top / 'out' / 'epoch_1.pt', weights_only=True)
    bad['model']['language_model.model.norm.weight'].fill_(float('nan'))
    torch.save(bad, tmp_path / 'bad.pt')
    said = script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}/out',
                  f'--init_from={tmp_path}/bad.pt', fails=True)
    assert 'the loss is nan' in said
    assert 'in step 1 (stage 0, epoch 1), rows ' in said
    assert len(re.findall(r'\b\d{5}\b', said)) == 16
    out = tmp_path / 'huge'
    said = script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={out}',
                  '--learning_rate_stage0=1e30', '--save_every=1', fails=True)
    assert 'in step 2' in said or 'in step 3' in said
    last = torch.load(out / 'last.pt', weights_only=True)
    assert all(v.isfinite().all() for v in last['model'].values())
    assert f'in step {last["step"] + 1} ' in said


def test_ranks_must_divide_the_batch(run, tmp_path, monkeypatch):
    top, _ = run
    monkeypatch.setenv('WORLD_SIZE', '3')
    for micro in (0, 16):  # a micro-batch is never more than a rank's share
        said = script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}/out',
                      f'--micro_batch_size={micro}', fails=True)
        assert 'batch_size=16 is not a multiple of 15: 3 rank(s) with micro-batches of 5' in said


def test_coconuts_own_files_train_as_they_are(tmp_path):
    rows = [dict(question=f'Every {a} is a {b}. Tom is a {a}. Is Tom a {b} or a {c}?',
                 steps=[f'Tom is a {a}.', f'Every {a} is a {b}.'], answer=f'Tom is a {b}.')
            for a in 'pqrst' for b in 'uvw' for c in 'xyz']
    (tmp_path / 'logic_train.json').write_text(json.dumps(rows))
    (tmp_path / 'logic_valid.json').write_text(json.dumps(rows[:5]))
    script('prepare.py', '--dataset', tmp_path / 'logic_train.json', '--data_dir',
           tmp_path / 'data', '--init_from=scratch')
    said = script('train.py', *TOY, f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/out',
                  '--prompt={question}\n', '--answer=### {answer}')
    assert 'test' not in said.split('best.pt')[1]
    assert 'validation' in said.split('best.pt')[1]
    script('prepare.py', 'config/prosqa.py', f'--data_dir={tmp_path}/drawn',
           '--train_rows=32', '--val_rows=8', '--test_rows=8')
    script('train.py', 'config/prosqa.py', f'--data_dir={tmp_path}/drawn',
           f'--out_dir={tmp_path}/graphs', '--max_steps=2', '--batch_size=16', '--epochs_stage0=0',
           '--num_workers=0')
    said = script('experiments/probe.py', f'--ckpt={tmp_path}/graphs/best.pt',
                  '--intervene=swap,image')
    assert re.search('test: swap +accuracy', said)
    assert 'test: image left out, these answers have no image' in said
    (tmp_path / 'broken.json').write_text('[{"question": 1}, 2]')
    assert 'is not a list of rows (row 2 is no object)' in script('prepare.py', '--dataset',
                                                                  tmp_path / 'broken.json',
                                                                  '--data_dir', tmp_path / 'd',
                                                                  '--init_from=scratch', fails=True)


def test_own_rows_from_a_file_to_transformers(tmp_path):
    """Rows with 2, 3, 5 and 8 options and free answers, pictures beside the file: prepared, trained
    by the real recipe's flags on InternVL's layout, asked, exported, and read without our code."""
    save_tiny(tmp_path / 'internvl', layout='opengvlab')
    animals = 'cat dog horse cow bird fish sheep goat'.split()
    (tmp_path / 'mine').mkdir()
    for split, count in (('train', 10), ('val', 5)):
        rows = []
        for i in range(count):
            Image.new('RGB', (60 + 10 * i, 56), (20 * i, 90, 9)).save(
                tmp_path / 'mine' / f'{split}{i}.jpg')
            row = dict(image_path=f'{split}{i}.jpg', question=f'What is {i}?', answer='cat',
                       steps=['It has fur.', 'It meows.'] if i % 2 else 'It has fur. It meows.')
            if i % 5:
                row['choices'] = animals[:(2, 3, 5, 8)[i % 5 - 1]]
            rows.append(row)
        text = ''.join(json.dumps(row) + '\n' for row in rows)
        (tmp_path / 'mine' / f'mine_{split}.jsonl').write_text(text)
    shared = [f'--init_from={tmp_path}/internvl', f'--data_dir={tmp_path}/data', '--max_tiles=2']
    said = script('prepare.py', f'--dataset={tmp_path}/mine/mine_train.jsonl', *shared)
    assert 'train: 10 rows of 10' in said
    assert 'validation: 5 rows of 5' in said
    script('train.py', 'config/aokvqa.py', *shared, f'--out_dir={tmp_path}/out',
           '--max_latent_stage=2', '--epochs_stage0=1', '--epochs_per_stage=1', '--batch_size=4',
           '--micro_batch_size=2', '--max_new_tokens=8', '--max_length=450', '--num_workers=0')
    answers = json.loads((tmp_path / 'out' / 'answers_validation.json').read_text())['answers']
    assert ['exact' in found for found in answers] == [True, False, False, False, False]
    asked = ('--image', f'{tmp_path}/mine/val1.jpg', '--choices', 'cat|dog', '--max_new_tokens=8')
    before = script('sample.py', '--ckpt', f'{tmp_path}/out/best.pt', *asked)
    assert '4 thoughts' in before
    export = f'{tmp_path}/exported'
    script('sample.py', '--ckpt', f'{tmp_path}/out/best.pt', '--export', export)
    answer = re.search(r'4 thoughts.*?\n->', before, re.S)[0]
    assert answer in script('sample.py', '--ckpt', export, *asked)
    card = (tmp_path / 'exported' / 'README.md').read_text()
    model, _, saved = load_checkpoint(f'{tmp_path}/out/best.pt')
    assert f'in its latest evaluation: {100 * saved["accuracy"]:.1f} %' in card
    fresh = dict(saved, epoch=0, step=2, accuracy=0.0)  # last.pt before the first evaluation
    assert 'Its accuracy was not measured yet.' in sample.model_card('it', model, fresh, 'last.pt')
    assert "mode = 'coconut'" in card
    assert 'holds something already' in script(
        'sample.py', '--ckpt', f'{tmp_path}/out/best.pt', '--export', export, fails=True)
    oracle = InternVLForConditionalGeneration.from_pretrained(export).eval()
    model, _, _ = load_checkpoint(f'{tmp_path}/out/best.pt')
    ids = torch.tensor([[7, *[model.config.image_token_id] * 4, 9, 12]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(ids, pixels).logits
        theirs = oracle(input_ids=ids, pixel_values=pixels).logits
    assert relative(theirs, ours) < 1e-5


def test_a_text_decoder_trains_is_resumed_and_exported(tmp_path):
    """The recipe for text, on a tiny Llama whose tokenizer has an end token of its own."""
    save_text(tmp_path / 'llama')
    shared = [f'--init_from={tmp_path}/llama', f'--data_dir={tmp_path}/data']
    script('prepare.py', 'config/smollm2.py', *shared, '--train_rows=32', '--val_rows=4',
           '--test_rows=4')
    knobs = ['config/smollm2.py', f'--data_dir={tmp_path}/data', '--max_latent_stage=1',
             '--epochs_stage0=1', '--batch_size=8', '--learning_rate=3e-3', '--warmup_steps=1',
             '--max_new_tokens=4', '--log_interval=1', '--num_workers=0']
    whole, cut = f'{tmp_path}/whole', f'{tmp_path}/cut'
    said = script('train.py', *knobs, f'--init_from={tmp_path}/llama', f'--out_dir={whole}')
    assert 'max_length is 508 here: the model takes 512 tokens, and max_new_tokens=4' in said
    script('train.py', *knobs, f'--init_from={tmp_path}/llama', f'--out_dir={cut}', '--max_steps=5')
    script('train.py', *knobs, '--init_from=resume', f'--out_dir={cut}')
    losses = []
    for folder in (whole, cut):
        with open(f'{folder}/metrics.jsonl') as f:
            events = [json.loads(line) for line in f]
        losses.append([event['loss'] for event in events if event['event'] == 'train'])
    assert losses[0] == losses[1]
    assert losses[0][3] < losses[0][0]
    script('sample.py', '--ckpt', f'{whole}/best.pt', '--export', f'{tmp_path}/exported')
    oracle = AutoModelForCausalLM.from_pretrained(f'{tmp_path}/exported').eval()
    model, tokenizer, _ = load_checkpoint(f'{whole}/best.pt')
    assert tokenizer.eos_token == '</s>'
    ids = torch.randint(0, 250, (1, 20))
    with torch.no_grad():
        assert relative(oracle(input_ids=ids).logits, model(ids).logits) < 1e-5


def test_pictures_for_a_text_decoder_are_refused(run, tmp_path):
    top, _ = run
    save_text(tmp_path / 'llama')
    said = script('train.py', f'--init_from={tmp_path}/llama', f'--data_dir={top}/data',
                  f'--out_dir={tmp_path}/out', fails=True)
    assert 'train rows have an image (the first is 00000)' in said
    assert 'is a text decoder' in said
    assert not (tmp_path / 'out').exists()


# --------------------------------------------------------------------------------------------------
# predicted answers

MAP = [['red', 'blue'], ['blue', 'pink'], ['pink', 'black'], ['black', 'red'], ['white', 'black']]


def test_the_chain_is_continued_on_the_rows_own_map():
    """Red, blue, pink, black; put in white after the first step it goes on to black and red."""
    row = dict(edges=MAP, results=['blue', 'pink', 'black'])
    assert probe.continued(row, 1, 'white') == 'red'
    assert probe.continued(row, 2, 'white') == 'black'
    assert probe.continued(row, 3, 'white') == 'white'
    assert probe.continued(row, 1, 'green') is None
    assert probe.continued(dict(row, edges=[*MAP, ['white', 'red']]), 1, 'white') is None


def test_a_donor_is_elsewhere_and_predicts_another_answer():
    row = dict(edges=MAP, results=['blue', 'pink', 'black'])
    same, elsewhere = dict(row), dict(row, results=['white', 'black', 'red'])
    donors, predicted = probe.patches([row, same, elsewhere], 1)
    assert donors.tolist() == [2, 2, 0]
    assert predicted == ['red', 'red', 'black']
    donors, predicted = probe.patches([row, same], 1)
    assert predicted == [None, None]
    # at the second step white's chain is in black, which leads to red: the other way round pink
    # leads to black
    assert probe.patches([row, elsewhere], 2)[1] == ['red', 'black']
    assert probe.patches([row, dict(steps=['It is.'], choices=['a', 'b'])], 1)[1] == [None, None]


def test_a_patch_changes_one_thought_of_the_donors_choice():
    thoughts = torch.arange(24.).view(3, 2, 4) + 1
    edit = probe.replace('patch_2', thoughts, torch.tensor([2, 0, 1]))([0, 1])
    own = -torch.ones(2, 4)
    assert torch.equal(edit(1, own), own)
    assert torch.equal(edit(2, own), thoughts[[2, 0], 1])


def test_outcomes_are_shares_of_the_rows_that_predict():
    texts = ['red A', 'It goes.\nblue B', 'pink', 'black']
    said = probe.outcomes([dict(text=text) for text in texts], ['red', 'red', 'red', None],
                          ['blue', 'blue', 'blue', 'black'])
    assert said == dict(predicted=1 / 3, old=1 / 3, neither=pytest.approx(1 / 3), rows_predicted=3)
    assert probe.outcomes([dict(text='red')], [None], ['red']) == {}
    assert not probe.says(dict(text='redder'), 'red')


@pytest.mark.parametrize('text, hidden, kind', (
    ('Tom is a wu.\nEvery wu is a lo.\nTom is a lo.', 0, 'right way'),
    ('Every wu is a lo.\nTom is a lo.', 1, 'right way'),
    ('Tom is a wu.\nEvery wu is a ya.\nEvery ya is a lo.\nTom is a lo.', 0, 'longer way'),
    ('Tom is a lo.\nTom is a lo.', 0, 'made-up edge'),
    ('Tom is a wu.\nEvery ya is a lo.\nTom is a lo.', 0, 'made-up edge'),
    ('Tom is a wu.\nTom is a ya.', 0, 'wrong target'), ('Tom is a lo.', 2, 'no step written')))
def test_ways_that_are_written(text, hidden, kind):
    row = dict(edges=[['Tom', 'wu'], ['wu', 'lo'], ['wu', 'ya'], ['ya', 'lo']],
               steps=['Tom is a wu.', 'Every wu is a lo.'], answer='Tom is a lo.')
    assert probe.path_kind(row, text, hidden) == kind


def test_probability_by_distance_from_the_one_asked_about(loaded):
    _, _, tokenizer = loaded
    row = dict(question='Every b is a c.\nIs A a c or a d?', results=['b', 'c'],
               edges=[['A', 'b'], ['b', 'c'], ['c', 'e'], ['e', 'f'], ['Z', 'd']])
    p = torch.zeros(len(tokenizer))
    for name, share in zip('bcefdx', (0.3, 0.2, 0.1, 0.1, 0.2, 0.1)):
        p[tokenizer.convert_tokens_to_ids(name)] = share
    sides = probe.mass_by_side(row, p, tokenizer)
    assert sides == pytest.approx({'1': 0.3, '2': 0.2, '3': 0.1, 'further': 0.1, 'others': 0.2,
                                   'gold': 0.5, 'elsewhere': 0.1})
    assert probe.mass_by_side(dict(question='Four doors from red?', edges=MAP), p, tokenizer) == {}


def test_a_hidden_image_is_seen_by_thoughts_and_by_nothing_behind_them():
    """Up to the last thought all is as before, behind it not; generation from keys and values
    agrees with passes over the whole row; the model is left as it was."""
    model = tiny_model()
    batch = without_labels(make_batch(model.config, [1, 2], [(3,), (2, 1)]))
    with torch.no_grad():
        c = model.config  # neither token is ever the likeliest
        model.language_model.lm_head.weight[[c.image_token_id, c.latent_token_id]] = 0
        seen = model(**batch)
        with probe.hidden_image(model):
            hidden = model(**batch)
            new = model.generate(**batch, max_new_tokens=4, edit_thought=lambda k, thought: thought)
            for b in range(2):
                row = one_row(dict(batch, labels=batch['input_ids']), b)
                del row['labels']
                for token in new[b].tolist():
                    assert model(**row).logits[0, -1].argmax() == token
                    longer = torch.cat((row['input_ids'], torch.tensor([[token]])), 1)
                    row['input_ids'] = longer
        assert torch.equal(model(**batch).logits, seen.logits)
    assert torch.allclose(hidden.thoughts, seen.thoughts, atol=1e-5)
    for b in range(2):
        last = int((batch['input_ids'][b] == model.config.latent_token_id).nonzero()[-1])
        end = int(batch['attention_mask'][b].sum())
        assert torch.allclose(hidden.logits[b, :last + 1], seen.logits[b, :last + 1], atol=1e-4)
        changed = (hidden.logits - seen.logits)[b, last + 1:end].abs().amax(-1)
        assert (changed > 1e-3).all()


def test_rows_of_the_chain_carry_their_map():
    rows = toy.draw(dict(train=3), 0)['train']
    for row in rows:
        assert len(row['edges']) == 8
        place = re.search('from (.*)\\?', row['question'])[1]
        assert probe.continued(dict(row, results=[place, *row['results']]), 1, place) == \
            row['results'][-1]
        prepared, _ = build_row(dict(row, image=None), 'train', 'all')
        assert prepared['edges'] == row['edges']


def test_edges_of_published_files_are_numbers():
    raw = dict(question='Is Bob a x or y?', answer='Bob is a x.', steps=['Bob is a x.'],
               edges=[[0, 1]], idx_to_symbol=['Bob', 'x'])
    assert build_row(raw, 'train')[0]['edges'] == [['Bob', 'x']]
    assert 'edges' not in build_row(dict(raw, edges=[[0, 7]]), 'train')[0]
    assert 'edges' not in build_row(dict(raw, idx_to_symbol={'0': 'Bob'}), 'train')[0]
    _, reason = build_row(dict(raw, edges=[['Bob', '\ud83d']], idx_to_symbol=None), 'train')
    assert reason == 'whose text is not valid Unicode'


# Tom - a - b - c and Zoe - d: one edge back d's person is in sight
GRAPH = 'Tom is a aa. Every aa is a bb. Every bb is a cc. Zoe is a dd. '


@pytest.mark.parametrize('question, answer, scores', (
    ('Is Tom a cc or dd?', 'Tom is a cc.', (1, 1, 1)),
    ('Is Tom a dd or a cc?', 'Tom is a cc.', (1, 1, 1)),
    ('Is Zoe a dd or a cc?', 'Zoe is a dd.', (0, 0, 0)),
    ('Is Tom a bb or a cc?', 'Tom is a cc.', (0.5, 1, 1)),
    ('Who is Tom?', 'A aa.', (None,) * 3)))
def test_rules_that_never_look_at_who_is_asked(question, answer, scores):
    row = dict(question=GRAPH + question, answer=answer)
    assert tuple(shortcuts.score(row, k) for k in (1, 2, 3)) == scores


def test_our_graphs_have_no_such_shortcut(tmp_path):
    rows = toy.draw_graphs(dict(test=300), 5, 15)['test']
    (tmp_path / 'rows.json').write_text(json.dumps(rows))
    said = script('experiments/shortcuts.py', f'{tmp_path}/rows.json')
    shares = [float(share) for share in re.findall(r'back: ([\d.]+) %', said)]
    assert len(shares) == 3
    assert all(44 < share < 56 for share in shares)
    (tmp_path / 'mine.jsonl').write_text(''.join(
        json.dumps(dict(question=GRAPH + question, answer=answer, question_id=name)) + '\n'
        for name, question, answer in (('a', 'Is Tom a cc or dd?', 'Tom is a cc.'),
                                       ('b', 'Is Zoe a dd or cc?', 'Zoe is a dd.'),
                                       ('c', 'Is Tom a dd or cc?', 'Tom is a cc.'))))
    (tmp_path / 'answers.json').write_text(json.dumps(dict(
        data=prepare.digest(str(tmp_path), 'mine'), answers=[
            dict(question_id='a', right=True), dict(question_id='b', right=False),
            dict(question_id='c', right=False)])))
    said = script('experiments/shortcuts.py', f'{tmp_path}/mine.jsonl', f'{tmp_path}/answers.json')
    assert 'the answers where it is right: 50.0 % of 2' in said
    assert 'the answers where it is wrong: 0.0 % of 1' in said
    with open(tmp_path / 'mine.jsonl', 'a') as f:  # the same ids, other rows
        f.write('\n')
    said = script('experiments/shortcuts.py', f'{tmp_path}/mine.jsonl', f'{tmp_path}/answers.json',
                  fails=True)
    assert 'holds no answers to the rows of' in said
    assert 'give one file' in script('experiments/shortcuts.py', fails=True)


def test_a_patched_chain_is_drawn(tmp_path):
    row = dict(question='Three doors from red?', edges=MAP, results=['blue', 'pink', 'black'])
    path = tmp_path / 'patch.png'
    for image in (None, Image.new('RGB', (84, 84))):
        probe.draw_patch(str(path), row, 3, 1, 'white', 'black A', '$red$ B', image)
        assert Image.open(path).size[0] > 800


def test_the_chain_in_words_says_its_map():
    for row in toy.draw_words(dict(train=5), 0, hops=3)['train']:
        facts = dict(re.findall(r'(\w+) leads to (\w+)\.', row['question']))
        place = re.search(r'Three doors from (\w+)\?', row['question'])[1]
        for step in row['steps']:
            assert step == f'{place} leads to {facts[place]}.'
            place = facts[place]
        assert row['answer'] == place


# --------------------------------------------------------------------------------------------------
# teaching a thought its step

def test_what_a_thought_is_taught(loaded):
    """The first of a step's thoughts, the result's first token as the step writes it."""
    _, _, tokenizer = loaded
    token = tokenizer.convert_tokens_to_ids
    row = dict(steps=['b', 'it is d'], results=['b', 'd'])
    assert prepare.thought_targets(row, tokenizer, 4, 2) == [token('b'), -100, token('d'), -100]
    assert prepare.thought_targets(row, tokenizer, 1, 1) == [token('b')]
    assert prepare.thought_targets(dict(steps=['x.']), tokenizer, 3, 1) == [token('x'), -100, -100]
    assert prepare.thought_targets({}, tokenizer, 2, 1) == [-100, -100]
    # ' b' is a space and a b here: the first b is another word's
    row = dict(steps=['abc becomes b'], results=['b'])
    assert prepare.thought_targets(row, tokenizer, 1, 1) == [token('b')]
    # a result of nothing, or too few of them: the steps' last words
    row = dict(steps=['a is c', 'b is d'], results=['x'])
    assert prepare.thought_targets(row, tokenizer, 2, 1) == [token('c'), token('d')]
    assert prepare.thought_targets(row, tokenizer, 0, 2) == []


def test_only_thoughts_that_are_fed_back_are_taught(run, tmp_path):
    top, _ = run
    said = script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}/out',
                  '--teach_thoughts=1', '--mode=pause', fails=True)
    assert "teach_thoughts=1 with mode='pause', c_thought=2: only the thoughts of 'coconut'" in said


def test_taught_thoughts_get_a_gradient_of_their_own(run):
    """Another run than without, the same to rounding in micro-batches; the logged loss stays that
    of the words."""
    top, _ = run
    args = [*TOY, f'--data_dir={top}/data', '--teach_thoughts=10', '--uniform_prob=0.5']
    norms = {}
    for name, more in (('taught', []), ('taught_micro', ['--micro_batch_size=4']),
                       ('untaught', ['--teach_thoughts=0'])):
        script('train.py', *args, *more, f'--out_dir={top}/{name}')
        logged = events(top / name, 'train')
        norms[name] = [(event['loss'], event['grad_norm']) for event in logged]
    whole, micro, without = (np.array(norms[name]) for name in norms)
    assert np.allclose(whole, micro, rtol=2e-3)
    assert (whole[:3] == without[:3]).all()  # stage 0 has no thoughts
    assert (whole[3:, 1] > 1.2 * without[3:, 1]).all()
    assert np.allclose(whole[3, 0], without[3, 0], rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# what the evidence rests on

def map_shown(png):
    """Room -> room, read from the pixels of a drawn image alone."""
    pixels = np.array(Image.open(io.BytesIO(png)).convert('RGB'))
    names = {rgb: name for name, rgb in toy.COLOURS.items()}
    shown = {}
    for top in range(0, 84, toy.CELL):
        for left in range(0, 84, toy.CELL):
            outer = tuple(pixels[top + 4, left + 4].tolist())
            inner = tuple(pixels[top + 14, left + 14].tolist())
            if outer in names:
                shown[names[outer]] = names[inner]
    return shown


@pytest.mark.parametrize('hops', (4, 6))
def test_a_rows_edges_are_what_its_image_shows(hops):
    for row in toy.draw(dict(test=20), 3, hops)['test']:
        assert map_shown(row['image']) == dict(row['edges'])


def test_a_predicted_answer_is_where_the_image_leads():
    """The donor is the nearest row below that is elsewhere and ends elsewhere; from its room the
    row's own image, read from its pixels, is followed for the doors that are left."""
    rows = toy.draw(dict(test=60), 5)['test']
    for step in (1, 2, 3, 4):
        donors, predicted = probe.patches(rows, step)
        for i, (row, donor, end) in enumerate(zip(rows, donors.tolist(), predicted)):
            shown = map_shown(row['image'])
            for j in range(i + 1, i + len(rows)):
                room = rows[j % len(rows)]['results'][step - 1]
                last = room
                for _ in range(toy.HOPS - step):
                    last = shown[last]
                if room != row['results'][step - 1] and last != row['results'][-1]:
                    break
            assert (donor, end) == (j % len(rows), last)


def test_the_control_of_a_patch_is_at_the_same_place():
    """Another row's thought at the row's own room: nothing but that room is in common, and the own
    answer is predicted."""
    rows = toy.draw(dict(test=60), 5)['test']
    for step in (1, 4):
        donors, predicted = probe.patches(rows, step, same=True)
        for i, (row, donor, end) in enumerate(zip(rows, donors.tolist(), predicted)):
            below = [(i + j) % len(rows) for j in range(1, len(rows))]
            room = row['results'][step - 1]
            assert donor == next(j for j in below if rows[j]['results'][step - 1] == room)
            assert end == row['results'][-1]


def test_the_control_is_named():
    assert probe.expand('same,patch_2', 2) == ['same_1', 'same_2', 'patch_2']
    with pytest.raises(ValueError, match='same_3, same'):
        probe.expand('same_')


def test_another_image_comes_with_its_map():
    rows = toy.draw(dict(test=5), 5)['test']
    rows = [dict(row, image_size=[84, 84], image_hash='') for row in rows]
    for row, other, asked in zip(rows, rows[1:] + rows[:1], probe.with_other_images(rows)):
        assert asked['question'] == row['question']
        assert dict(asked['edges']) == map_shown(asked['image']) == dict(other['edges'])


def test_where_a_chain_was_left():
    """Shares are of all rows, also where a row has no such step."""
    rows = [dict(results=['red', 'blue', 'pink']), dict(results=['black', 'white'])]
    answers = [dict(text='steps\nblue C'), dict(text='black A')]
    assert probe.arrivals(answers, rows) == [0.5, 0.5, 0]
    assert probe.arrivals([dict(text='pink A'), dict(text='green B')], rows) == [0, 0, 0.5]


def images_changed(batch, rows):
    """The batch with other pixels for these rows, one tile a row."""
    other = dict(batch, pixel_values=batch['pixel_values'].clone())
    other['pixel_values'][rows] = 255 - other['pixel_values'][rows]
    return other


def kept_thoughts(model, batch):
    """float32 [B, n, D]: a batch's thoughts when left alone, by the change that records."""
    with torch.no_grad():
        n = model(**batch).thoughts.shape[1]
        thoughts = torch.zeros(len(batch['input_ids']), n, model.config.hidden_size)
        model(**batch, edit_thought=probe.record(thoughts)(list(range(len(thoughts)))))
    return thoughts


def test_transplanted_thoughts_are_the_rows_own_under_another_image():
    """Another image gives other thoughts; transplanted, the own ones are fed back to the last bit,
    and what stands before them still sees the other image."""
    model = tiny_model()
    batch = without_labels(make_batch(model.config, [1, 1], [(2,), (2,)]))
    own = kept_thoughts(model, batch)
    other = images_changed(batch, [0, 1])
    edit = probe.replace('transplant', own, torch.arange(2))([0, 1])
    with torch.no_grad():
        left_alone, changed = model(**other), model(**other, edit_thought=edit)
    assert (left_alone.thoughts - own).abs().amax() > 1e-3
    assert torch.equal(changed.thoughts, own)


def test_swapped_thoughts_leave_a_row_with_its_own_image():
    """All thoughts are the donor's to the last bit, and the answer still sees the own image."""
    model = tiny_model()
    batch = without_labels(make_batch(model.config, [1, 1], [(2,), (2,)]))
    own = kept_thoughts(model, batch)
    edit = probe.replace('swap', own)([0, 1])
    with torch.no_grad():
        changed = model(**batch, edit_thought=edit)
        again = model(**images_changed(batch, [0]), edit_thought=edit)
    assert torch.equal(changed.thoughts, own.roll(1, 0))
    end = int(batch['attention_mask'][0].sum()) - 1
    assert (changed.logits[0, end] - again.logits[0, end]).abs().amax() > 1e-4
    assert torch.allclose(changed.logits[1], again.logits[1], atol=1e-5)


def test_a_blind_answer_has_the_thoughts_and_no_image():
    """Where no text has seen the image, since it stands right before the thoughts, own thoughts
    under another image give the same answer if blind, and another if not. In one layer: in the
    upper layers the thoughts' own places look at the image themselves."""
    model = tiny_model(num_hidden_layers=1)
    batch = without_labels(make_batch(model.config, [1], [(2,)]))
    ids = batch['input_ids'][0]
    is_image, is_thought = ids == model.config.image_token_id, ids == model.config.latent_token_id
    before = torch.arange(len(ids)) < is_thought.nonzero()[0]
    text_first = [ids[before & ~is_image], ids[is_image], ids[~before]]
    batch['input_ids'] = torch.cat(text_first)[None]
    edit = probe.replace('transplant', kept_thoughts(model, batch), torch.arange(1))([0])
    other = images_changed(batch, [0])
    written = slice(int(is_thought.nonzero()[-1]) + 1, None)
    with torch.no_grad():
        seen = [model(**one, edit_thought=edit).logits[0, written] for one in (batch, other)]
        with probe.hidden_image(model):
            blind = [model(**one, edit_thought=edit).logits[0, written] for one in (batch, other)]
    assert (seen[0] - seen[1]).abs().amax() > 1e-3
    assert torch.equal(blind[0], blind[1])


def test_of_pause_tokens_the_places_are_read_and_what_they_are_fed_is_exchanged(tmp_path):
    """Every row is fed the same pause, so that another row's changes no answer, also where weights
    are large and any change of a thought would; what the places hold differs from row to row."""
    knobs = ['config/toy.py', f'--data_dir={tmp_path}/data']
    script('prepare.py', *knobs, '--train_rows=16', '--val_rows=17', '--test_rows=17')
    script('train.py', *knobs, f'--out_dir={tmp_path}/out', '--mode=pause', '--batch_size=16',
           '--max_latent_stage=1', '--epochs_stage0=1', '--epochs_per_stage=1', '--num_workers=0')
    saved = torch.load(tmp_path / 'out' / 'best.pt', weights_only=True)
    for name, weight in saved['model'].items():
        if weight.dim() == 2 and 'layers' in name:
            weight *= 3
    torch.save(saved, tmp_path / 'loud.pt')
    script('experiments/probe.py', f'--ckpt={tmp_path}/loud.pt', '--intervene=swap,zero')
    records = json.loads((tmp_path / 'probe_test.json').read_text())
    found = {one['name']: one for one in records}
    assert found['swap']['only_clean'] == found['swap']['only_changed'] == 0
    assert found['swap']['tokens_per_answer'] == found['clean']['tokens_per_answer']
    assert found['zero']['tokens_per_answer'] != found['clean']['tokens_per_answer']
    for thought in json.loads((tmp_path / 'thoughts_test.json').read_text()):
        assert thought['cosine_rows'] < 0.999


# --------------------------------------------------------------------------------------------------
# what a reviewer broke without any test noticing

@pytest.fixture
def wandb_ids(monkeypatch):
    """Of the runs that a stand-in for wandb was asked for; it insists that steps do not go back."""
    ids, module = [], types.ModuleType('wandb')

    class Logged:
        step = 0

        def log(self, numbers, step):
            assert step >= self.step
            self.step = step

    module.init = lambda **more: ids.append(more['id']) or Logged()
    module.__spec__ = importlib.machinery.ModuleSpec('wandb', None)
    monkeypatch.setitem(sys.modules, 'wandb', module)
    return ids


def test_the_best_survives_a_resume_and_is_what_is_reported(run, tmp_path, wandb_ids):
    """Epoch 1 is made the best by hand. A part of an epoch does not compete. One wandb run."""
    top, _ = run
    args = [*TOY, f'--data_dir={top}/data', '--epochs_stage0=2', '--epochs_per_stage=0',
            '--wandb=True', f'--out_dir={tmp_path}']
    script('train.py', *args, '--max_steps=4')
    best = torch.load(tmp_path / 'best.pt', weights_only=True)
    assert (best['epoch'], best['step']) == (1, 3)
    last = torch.load(tmp_path / 'last.pt', weights_only=True)
    last['best'], last['elapsed'] = [0, 1.0, 0.0], 1000.0
    torch.save(last, tmp_path / 'last.pt')
    script('train.py', *args, '--init_from=resume')
    assert torch.load(tmp_path / 'best.pt', weights_only=True)['epoch'] == 1
    first, second = events(tmp_path, 'eval')
    for final in events(tmp_path, 'final')[:1]:
        assert final['loss'] == first['loss'] != second['loss']
        assert final['step'] == 3
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert json.loads(lines[-1])['time'] > 1000  # of the whole run
    assert len(wandb_ids) == 2
    assert wandb_ids[0] == wandb_ids[1]


def test_epochs_differ_in_order_and_in_drawn_stages(run, tmp_path, monkeypatch):
    top, _ = run
    seen, orders = [], {}

    class Seen(prepare.Rows):
        def __getitem__(self, i):
            if self.tile_knobs['split'] == 'train' and self.encode_knobs['supervised']:
                seen.append((i, self.stage_of(i)))
            return super().__getitem__(i)

    monkeypatch.setattr(prepare, 'Rows', Seen)
    args = [*TOY, f'--data_dir={top}/data', '--epochs_stage0=0', '--epochs_per_stage=2',
            '--uniform_prob=0.5', '--keep_epochs=2', '--overwrite=True', f'--out_dir={tmp_path}']
    for seed in (0, 1):
        seen.clear()
        script('train.py', *args, f'--seed={seed}')
        orders[seed] = seen[-96:-48], seen[-48:]
    one, two = orders[0]
    for epoch in (one, two):
        assert sorted(i for i, _ in epoch) == list(range(48))
        assert {stage for _, stage in epoch} == {0, 1}
    assert [i for i, _ in one] != [i for i, _ in two]
    assert dict(one) != dict(two)
    assert [i for i, _ in orders[1][0]] != [i for i, _ in one]
    assert (tmp_path / 'epoch_1.pt').exists()


def test_what_is_overwritten_is_the_run_and_nothing_else(run, tmp_path):
    """Also in a folder whose name is a pattern: it once hid the run that it held."""
    top, _ = run
    out = tmp_path / 'out[1]'
    args = [*TOY, f'--data_dir={top}/data', f'--out_dir={out}', '--max_steps=1']
    script('train.py', *args)
    assert 'holds another run' in script('train.py', *args, '--seed=5', fails=True)
    (out / 'probe_test.json').write_text('[]')
    (out / 'last.pt.7.part').write_bytes(b'')
    mine = ('precious.pt', 'answers_exam.txt', 'movie.part', 'epoch_of_plato.txt')
    for name in mine:
        (out / name).write_bytes(b'mine')
    os.rename(top / 'data' / 'test.jsonl', tmp_path / 'test.jsonl')
    try:
        script('train.py', *args, '--overwrite=True')
    finally:
        os.rename(tmp_path / 'test.jsonl', top / 'data' / 'test.jsonl')
    left = os.listdir(out)
    assert not [name for name in left if '_test' in name or '.pt.' in name]
    assert set(mine) <= set(left)


def test_zero_is_none_and_run_json_says_how(run, tmp_path):
    """save_every and grad_clip, and what freeze_vision freezes."""
    top, _ = run
    args = [*TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}', '--max_steps=2',
            '--save_every=0', '--grad_clip=0', '--freeze_vision=True', '--threads=2']
    said = script('train.py', *args)
    torch.set_num_threads(1)
    assert re.search('vision: .*, frozen', said)
    assert not re.search('projector: .*, frozen', said)
    with open(tmp_path / 'run.json') as f:
        first = json.load(f)[0]
    assert first['knobs']['seed'] == 0
    assert first['threads'] == 2
    assert 'commit' in first
    assert {'torch', 'transformers'} <= first['versions'].keys()
    state = torch.load(tmp_path / 'last.pt', weights_only=True)['optimizer']['state']
    assert any(moments['exp_avg'].any() for moments in state.values())


def test_a_gradient_that_is_not_finite_stops_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', lambda *more: torch.tensor(math.inf))
    said = script('train.py', *TOY, f'--data_dir={run[0]}/data', f'--out_dir={tmp_path}/out',
                  fails=True)
    assert 'the gradient norm inf in step 1 ' in said
    assert torch.load(tmp_path / 'out' / 'last.pt', weights_only=True)['step'] == 0


ENDLESS = """
import runpy, sys, time, torch
def step(optimizer):
    open('THERE', 'w').close()
    while True:
        time.sleep(0.1)
torch.optim.AdamW.step = step
sys.argv = ['train.py', *sys.argv[1:]]
runpy.run_path('train.py', run_name='__main__')
"""


def test_a_second_signal_ends_at_once(run, tmp_path):
    process = start('-c', ENDLESS.replace('THERE', str(tmp_path / 'there')), *TOY,
                    f'--data_dir={run[0]}/data', f'--out_dir={tmp_path}/out')
    wait_for(process, lambda: (tmp_path / 'there').exists())
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None  # it waits for its step
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGTERM


def test_changed_code_is_named_beside_its_commit(monkeypatch):
    said = {'rev-parse': 'abc', 'status': ' M model.py'}
    monkeypatch.setattr(train.shutil, 'which', lambda name: name)
    monkeypatch.setattr(train.subprocess, 'run', lambda command, **more: types.SimpleNamespace(
        stdout=said[command[3]] + '\n'))
    assert train.git_commit() == 'abc with changes'
    said['status'] = ''
    assert train.git_commit() == 'abc'


def test_a_models_turns_are_in_its_checkpoints(tmp_path):
    tokenizer = text_tokenizer(template='[{{ messages[0].content }}]')
    save_text(tmp_path / 'm', 'llama', tokenizer=tokenizer)
    row = dict(question='Q?', answer='a', steps=['b'], question_id='0')
    (tmp_path / 'd').mkdir()
    for split in ('train', 'validation'):
        (tmp_path / 'd' / f'{split}.jsonl').write_text(json.dumps(row) + '\n')
    args = ['train.py', f'--data_dir={tmp_path}/d', f'--out_dir={tmp_path}/o', '--template=chat',
            '--max_length=400', '--max_new_tokens=2', '--num_workers=0', '--epochs_stage0=2',
            '--epochs_per_stage=0', '--batch_size=1', '--prompt={question}', '--answer={answer}']
    script(*args, f'--init_from={tmp_path}/m', '--max_steps=1')
    script(*args, '--init_from=resume')
    best = load_checkpoint(f'{tmp_path}/o/best.pt')[1]
    assert best.chat_template == tokenizer.chat_template


def test_drawn_splits_share_no_row():
    drawn = toy.draw(dict(train=20, validation=20, test=20), 0)
    images = [row['image'] for rows in drawn.values() for row in rows]
    assert len(set(images)) == 60
    others = toy.draw(dict(train=20), 1)['train']
    assert not {row['image'] for row in others} & set(images)


@pytest.fixture(scope='module')
def loud(run, tmp_path_factory):
    """The run's checkpoint with matrices three times as large, so that its answers differ."""
    top, folder = run[0], tmp_path_factory.mktemp('loud')
    saved = torch.load(top / 'out' / 'best.pt', weights_only=True)
    for name, weight in saved['model'].items():
        if weight.dim() == 2 and 'layers' in name:
            weight *= 3
    torch.save(saved, folder / 'loud.pt')
    return folder / 'loud.pt', saved


def test_predicted_answers_of_the_probe_command(run, loud):
    top, (path, _) = run[0], loud
    rows = prepare.read_split(str(top / 'data'), 'test')
    own = [row['results'][-1] for row in rows]
    others = probe.with_other_images(rows)
    assert probe.predict('swap', own, rows) == own[1:] + own[:1]
    assert probe.predict('transplant', own, others) == own
    for asked, place in zip(others, probe.predict('image', own, others)):
        here = asked['question'].split()[-1].rstrip('?')
        for _ in range(4):
            here = dict(asked['edges'])[here]
        assert place == here
    script('experiments/probe.py', f'--ckpt={path}',
           '--intervene=swap,image,patch,same,transplant,blind')
    with open(path.parent / 'probe_test.json') as f:
        found = {record['name']: record for record in json.load(f)}
    for k in (1, 2):  # both stand for the first step
        for kind in ('patch', 'same'):
            _, predicted = probe.patches(rows, 1, kind == 'same')
            count = sum(place is not None for place in predicted)
            assert found[f'{kind}_{k}']['rows_predicted'] == count
    for name in ('swap', 'image', 'transplant'):
        assert found[name]['rows_predicted'] == 17
    for name in ('blind', 'transplant'):  # the one hides the image, the other exchanges it
        assert found[name]['tokens_per_answer'] != found['clean']['tokens_per_answer']
    assert (path.parent / 'patch_2_test.png').exists()


def test_a_test_split_that_does_not_fit_is_refused_before_the_first_step(run, tmp_path):
    shutil.copytree(run[0] / 'data', tmp_path / 'data')
    path = tmp_path / 'data' / 'test.jsonl'
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(''.join(json.dumps(dict(row, question='Why? ' * 200)) + '\n' for row in rows))
    said = script('train.py', *TOY, f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/out',
                  fails=True)
    assert 'test' in said
    assert 'max_length=128' in said
    assert not (tmp_path / 'out').exists()


def test_the_probe_takes_the_test_split_only_with_its_answers(run, tmp_path):
    top, _ = run
    shutil.copytree(top / 'data', tmp_path / 'data')
    shutil.copy(top / 'out' / 'best.pt', tmp_path)
    args = ['experiments/probe.py', f'--ckpt={tmp_path}/best.pt', f'--data_dir={tmp_path}/data']
    assert '\ntest: accuracy' in script(*args)
    path = tmp_path / 'data' / 'test.jsonl'
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row['answer'], row['correct_choice_idx']
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    assert '\nvalidation: accuracy' in script(*args)


def test_rows_without_a_chain_have_accuracies_alone(mixed, tmp_path):
    """Once an empty list of rooms was printed, and 0 % for every answer of two words."""
    script('train.py', *mixed, f'--out_dir={tmp_path}')
    said = script('experiments/probe.py', f'--ckpt={tmp_path}/best.pt', '--split=validation',
                  '--intervene=swap,early_2')
    assert 'validation: swap ' in said
    assert 'validation: early_2 ' in said
    assert 'predicted' not in said
    assert 'names where' not in said


def test_flags_of_sample(run, loud, tmp_path):
    top, (_, saved) = run[0], loud
    saved = {**saved, 'knobs': {**saved['knobs'], 'mode': 'pause'}}

    def ask(*more):
        torch.save(saved, tmp_path / 'pause.pt')
        said = script('sample.py', '--ckpt', tmp_path / 'pause.pt', '--choices=red | blue',
                      '--image', top / 'data' / 'images' / 'test', *more)
        return [line for line in said.split('tiles,', 1)[1].splitlines()
                if not line.startswith('  thought') and 'peak memory' not in line]

    plain = ask()
    assert plain == ask('--show_thoughts=1')  # pause tokens, looked at or not
    assert ' 0 thoughts' in ask('--num_thoughts=0')[0]
    hot = ask('--temperature=1.5')
    assert hot == ask('--temperature=1.5')
    assert hot != ask('--temperature=1.5', '--seed=2')
    assert plain == ask('--temperature=1.5', '--top_p=1e-6')
    saved['knobs']['mode'] = 'no_cot'
    saved['model'] = {**saved['model'], 'language_model.model.norm.weight': torch.zeros(64)}
    assert '-> no option could be read from this answer' in ask()
    assert 'trained with mode=no_cot, which has no thoughts' in script(
        'sample.py', '--ckpt', tmp_path / 'pause.pt', '--image=x.png', '--num_thoughts=3',
        fails=True)


@pytest.mark.parametrize('flag, message', (
    ('--beta1=1', 'beta1=1: expected less than 1'),
    ('--num_key_value_heads=0', 'num_key_value_heads=0: expected 1 or more'),
    ('--num_key_value_heads=3', 'num_key_value_heads=3, head_dim=16: expected a multiple'),
    ('--image_size=70', 'image_size=70.*: expected a multiple of 28'),
    ('--vision_num_heads=3', 'a width that the heads divide'),
    ('--teach_thoughts=1 --c_thought=0', 'c_thought=0: only the thoughts of .coconut. can')))
def test_values_that_no_model_can_have(run, tmp_path, flag, message):
    said = script('train.py', *TOY, f'--data_dir={run[0]}/data', f'--out_dir={tmp_path}/out',
                  *flag.split(), fails=True)
    assert re.search(message, said)
    assert not (tmp_path / 'out').exists()


def test_scratch_on_data_without_a_tokenizer(run, tmp_path):
    for split in ('train', 'validation'):
        shutil.copy(run[0] / 'data' / f'{split}.jsonl', tmp_path)
    said = script('train.py', *TOY, f'--data_dir={tmp_path}', fails=True)
    assert 'holds no tokenizer: run prepare.py with the same config' in said


# --------------------------------------------------------------------------------------------------
# on a GPU, where there is one

def test_gpu_run(gpu, run, tmp_path):  # noqa: F811
    """In float32 the losses and answers of the CPU's run, also stopped and resumed, with the
    teaching loss and micro-batches; then bfloat16, the default there."""
    top, _ = run
    args = [*TOY, f'--data_dir={top}/data', '--teach_thoughts=0.5', '--micro_batch_size=8']
    script('train.py', *args, '--device=cpu', f'--out_dir={tmp_path}/cpu')
    args += ['--device=cuda', '--num_workers=1']
    exact = [*args, '--dtype=float32']
    said = script('train.py', *exact, f'--out_dir={tmp_path}/gpu')
    assert f'float32 on {torch.cuda.get_device_name()}' in said
    script('train.py', *exact, f'--out_dir={tmp_path}/stopped', '--max_steps=4')
    script('train.py', *exact, f'--out_dir={tmp_path}/stopped', '--init_from=resume')
    for name in ('gpu', 'stopped'):
        for kind, keys in (('train', ('step', 'loss', 'lr', 'grad_norm')),
                           ('eval', ('loss', 'tokens_per_answer', 'thoughts_per_answer'))):
            wanted = [[e[k] for k in keys] for e in events(tmp_path / 'cpu', kind)]
            found = [[e[k] for k in keys] for e in events(tmp_path / name, kind)]
            assert np.allclose(found, wanted, rtol=1e-3), (name, kind)
    said = script('train.py', *args, f'--out_dir={tmp_path}/rough')
    assert f'bfloat16 on {torch.cuda.get_device_name()}' in said
    rough, exact = (events(tmp_path / name, 'train')[-1] for name in ('rough', 'gpu'))
    assert rough['loss'] == pytest.approx(exact['loss'], rel=0.05)
    ask = ['sample.py', '--ckpt', tmp_path / 'gpu' / 'best.pt', '--dtype=float32', '--image',
           top / 'data' / 'images' / 'test', '--question=Four doors from brown?',
           '--choices=yellow|white|black|blue', '--show_thoughts=1']

    def answers(*more):
        said = script(*ask, *more)
        assert said.count('  thought 2: ') == 17
        return re.findall('.* tokens written|-> .*', said)

    wanted = answers('--device=cpu')
    assert len(wanted) == 34
    assert answers('--device=cuda') == wanted
    assert answers('--device=cuda', '--compile=True') == wanted
