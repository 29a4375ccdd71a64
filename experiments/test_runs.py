"""
Tests of whole runs: the commands as a user starts them, killed, stopped, resumed, on ranks. Tiny
data, tiny models, CPU, no network.

Every run is a process of its own with its own exit code, signals and files, but not a cold start:
a server imports the packages once (no module of this project) and forks for each run.
"""
import functools
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))
from prepare import read_split  # noqa: E402

# --- starting a process ---------------------------------------------------------------------------
SERVER = '''
import atexit, gc, itertools, json, os, runpy, signal, sys
import datasets, einops, matplotlib.pyplot, timm, torch, torch._dynamo, transformers
transformers.AutoConfig, transformers.PreTrainedTokenizerFast, transformers.Qwen2TokenizerFast
gc.freeze()
for line in sys.stdin:
    order = json.loads(line)
    if 'poll' in order:
        pid, status = os.waitpid(order['poll'], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if not pid:
        break
    print(pid, flush=True)
else:
    sys.exit()
os.setsid()
os.chdir(order['folder'])
os.environ.update(order['env'])
for number, name in ((0, os.devnull), (1, order['out']), (2, order['err'])):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
sys.argv, sys.path[0], code = order['args'], order['here'], 0

def around(owner, name, before=lambda *call: None, after=lambda number, result: result):
    """For tests: before(number of the call, its arguments), after(number, result) -> result."""
    real, numbers = getattr(owner, name), itertools.count(1)
    def both(*args, **more):
        number = next(numbers)
        before(number, *args)
        return after(number, real(*args, **more))
    setattr(owner, name, both)

try:
    exec(order['before'])
    runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
except SystemExit as end:
    code = end.code or 0
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
except BaseException:
    sys.excepthook(*sys.exc_info())
    code = 1
# as the interpreter ends, but for tearing down the packages, which takes longer than most runs
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
'''
# of the environment only this, so that no setting of the machine reaches a run
ENV = {name: os.environ.get(name, '') for name in ('PATH', 'HOME', 'LD_LIBRARY_PATH')}
ENV.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', HF_HUB_OFFLINE='1')
SCRATCH = tempfile.TemporaryDirectory()


@functools.cache
def server():
    return subprocess.Popen([sys.executable, '-c', SERVER], env=ENV, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def order(**what):
    server().stdin.write(json.dumps(what) + '\n')
    server().stdin.flush()
    return json.loads(server().stdout.readline())


class Run:
    """A started command. before: Python that runs in its process first; env: is added to the
    environment; folder: where it is started, else a new and empty one."""

    def __init__(self, *args, before='', env={}, folder=None):
        said = tempfile.mkdtemp(dir=SCRATCH.name)
        self.out_path, self.err_path = Path(said, 'out'), Path(said, 'err')
        self.pid = order(args=[*map(str, args)], before=before, env=env, here=str(HERE),
                         folder=str(folder or tempfile.mkdtemp(dir=SCRATCH.name)),
                         out=str(self.out_path), err=str(self.err_path))

    def wait(self):
        end = time.time() + 60
        while (code := order(poll=self.pid)) is None:
            if time.time() > end:
                os.killpg(self.pid, 9)
                raise TimeoutError(self.out_path.read_text() + self.err_path.read_text())
            time.sleep(0.02)
        self.code, self.out, self.err = code, self.out_path.read_text(), self.err_path.read_text()
        return self


def call(*args, fails=False, **more):
    """Runs a command to its end; gives what it printed, or if it has to fail, its stderr."""
    run = Run(*args, **more).wait()
    assert run.code >= 0 and fails == (run.code > 0), f'{run.out[-2000:]}{run.err[-4000:]}'
    return run.err if fails else run.out


fail, load = functools.partial(call, fails=True), functools.partial(torch.load, weights_only=True)


# --- data, a recipe, and one run that many tests look at ------------------------------------------
# over config/toy.py, whose model and texts these are
RECIPE = '''
image_size = 28
max_tiles = 4
max_length = 200
max_new_tokens = 4
max_latent_stage = 1
epochs_stage0 = 1
epochs_per_stage = 2
batch_size = 4
eval_batch_size = 3
uniform_prob = 0.0
num_workers = 0
num_hidden_layers = 2
'''
ANIMALS = ['cat', 'dog', 'cow', 'hen', 'pig']
CLOCK = {'time', 'seconds_per_answer', 'tokens_per_s', 'images_per_s', 'wait'}


def make_rows(folder, split, count):
    """Rows with 1 to 4 tiles, 1 to 3 steps, 2 to 5 choices; of train two without choices, of test
    all without the answer."""
    rows = []
    for i in range(count):
        row = dict(question_id=f'{split}{i}', question=f'What is {i}?', choices=ANIMALS[:2 + i % 4],
                   image_path=f'{split}{i}.png')
        if split != 'test':
            row.update(steps=['It has fur.', 'It is big.', 'It runs.'][:1 + i % 3],
                       correct_choice_idx=i % 2)
        if split == 'train' and i % 5 == 3:
            row.update(choices=None, correct_choice_idx=None, answer='a cat')
        pixels = np.random.default_rng(i).integers(0, 255, (28, 28 * (1 + i % 4), 3), np.uint8)
        Image.fromarray(pixels).save(folder / row['image_path'])
        rows.append(row)
    return rows


def write_rows(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture(scope='session')
def top(tmp_path_factory):
    """A folder with recipe.py, own rows in source/, and these prepared in data/, of train every
    fourth without its image."""
    top = tmp_path_factory.mktemp('runs')
    (top / 'recipe.py').write_text(RECIPE)
    (top / 'source').mkdir()
    for split, count in (('train', 9), ('validation', 5), ('test', 3)):
        write_rows(top / 'source' / f'{split}.jsonl', make_rows(top / 'source', split, count))
    call(*prepare(top, top / 'source', top / 'data'), f'--test_file={top}/source/test.jsonl')
    rows = read_split(top / 'data', 'train')
    for row in rows[::4]:
        del row['image']
    write_rows(top / 'data' / 'train.jsonl', rows)
    return top


def other_data(top, folder, **splits):
    """A copy of the prepared data with other rows in these splits."""
    shutil.copytree(top / 'data', folder)
    for split, rows in splits.items():
        write_rows(folder / f'{split}.jsonl', rows)
    return f'--data_dir={folder}'


def prepare(top, source, data, validation='validation.jsonl'):
    return ['prepare', HERE / 'config/toy.py', top / 'recipe.py', f'--data_dir={data}',
            f'--train_file={source}/train.jsonl', f'--val_file={source}/{validation}']


def train(top, out, *more):
    return ['train', HERE / 'config/toy.py', top / 'recipe.py', f'--data_dir={top}/data',
            f'--out_dir={out}', *more]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='session')
def whole(top):
    """The folder of a run left alone, of 3 steps an epoch."""
    said = call(*train(top, top / 'whole', '--uniform_prob=0.5'))
    (top / 'said').write_text(said)
    return top / 'whole'


def events(folder, kind=None):
    lines = read_lines(folder / 'metrics.jsonl')
    return [line for line in lines if line['event'] == kind or not kind]


def untimed(line):
    return {key: value for key, value in line.items() if key not in CLOCK}


def read_json(path):
    return json.loads(path.read_text())


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*')
            if path.is_file()}


def assert_same_run(one, two):
    """Bit for bit, but for the clock and the start."""
    for path in one.glob('*.pt'):
        a, b = load(path), load(two / path.name)
        assert all(torch.equal(b['model'][name], p) for name, p in a['model'].items()), path.name
        for key in ('stage', 'epoch', 'step', 'accuracy', 'config', 'tokenizer', 'best', 'data'):
            assert a.get(key) == b.get(key), (path.name, key)
    states = [load(folder / 'last.pt')['optimizer']['state'] for folder in (one, two)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert all(torch.equal(states[1][number][key], value) for key, value in state.items())
    assert list(map(untimed, events(one))) == list(map(untimed, events(two)))
    for path in one.glob('*.json'):
        if path.name.startswith('metrics'):
            assert untimed(read_json(path)) == untimed(read_json(two / path.name))
        elif path.name != 'run.json':
            assert path.read_text() == (two / path.name).read_text()


# --- what a run leaves ----------------------------------------------------------------------------
def test_files_and_words_of_a_run(top, whole):
    assert content(whole).keys() == {
        'run.json', 'metrics.jsonl', 'curves.png', 'last.pt', 'best.pt', 'epoch_1.pt', 'epoch_3.pt',
        *(f'metrics_epoch_{k}.json' for k in (1, 2, 3)), 'answers_validation.json',
        'predictions_validation.json', 'answers_test.json', 'predictions_test.json'}
    for name, stage, epoch, step in (('last.pt', 1, 3, 9), ('epoch_1.pt', 0, 1, 3),
                                     ('epoch_3.pt', 1, 3, 9)):
        saved = load(whole / name)
        assert (saved['stage'], saved['epoch'], saved['step']) == (stage, epoch, step)
        assert {'model', 'config', 'tokenizer', 'knobs'} <= saved.keys()
        assert ('optimizer' in saved) == (name == 'last.pt')
    start, = read_json(whole / 'run.json')
    assert f'--data_dir={top}/data' in start['command']
    assert start['commit'] and start['versions']['torch'] and start['knobs']['seed'] == 0
    said = (top / 'said').read_text()  # the end of each epoch, and two rows in words behind it
    assert re.findall('^step ([0-9]+)/9', said, re.M) == ['3', '6', '9']
    assert len(re.findall('^ +validation[0-9]', said, re.M)) == 6


def test_metrics(whole):
    logged = events(whole)
    assert [event['event'] for event in logged] == [*['train'] * 3, 'eval'] * 3 + ['final'] * 2
    assert [event['epoch'] for event in logged[:12]] == [1] * 4 + [2] * 4 + [3] * 4
    assert [event['stage'] for event in logged[:12]] == [0] * 4 + [1] * 8
    assert [event['step'] for event in events(whole, 'train')] == list(range(1, 10))
    for event in events(whole, 'eval'):
        assert {'time', 'accuracy', 'loss', 'tokens_per_answer', 'unparsed'} <= event.keys()
        assert event['thoughts_per_answer'] == 2 * event['stage']
        assert (event['examples'], event['step']) == (5, 3 * event['epoch'])
        of_epoch = read_json(whole / f'metrics_epoch_{event["epoch"]}.json')
        steps = [e for e in events(whole, 'train') if e['epoch'] == event['epoch']]
        assert event.items() <= of_epoch.items()
        assert of_epoch['lr'] == steps[-1]['lr']
        for name in ('loss', 'grad_norm', 'tokens_per_s', 'images_per_s'):
            mean = pytest.approx(np.mean([step[name] for step in steps]))
            assert of_epoch[name.replace('loss', 'train_loss')] == mean
    best = load(whole / 'best.pt')
    for event in events(whole, 'final'):
        assert (event['step'], event['epoch']) == (best['step'], best['epoch'])
        assert ('accuracy' in event) == ('loss' in event) == (event['split'] == 'validation')


def test_answers_and_predictions(top, whole):
    """A-OKVQA's format and its official metric."""
    for final in events(whole, 'final'):
        rows = read_split(top / 'data', final['split'])
        answers = read_json(whole / f'answers_{final["split"]}.json')['answers']
        predictions = read_json(whole / f'predictions_{final["split"]}.json')
        names = [row['question_id'] for row in rows]
        assert [found['question_id'] for found in answers] == list(predictions) == names
        said = [prediction['multiple_choice'] for prediction in predictions.values()]
        for row, found, option in zip(rows, answers, said):
            assert option == row['choices'][found['choice'] if found['parsed'] else 0]
        assert final['unparsed'] == sum(not found['parsed'] for found in answers)
        if final['split'] == 'validation':
            official = np.mean([option == row['answer'] for option, row in zip(said, rows)])
            assert final['accuracy_default_a'] == official
            assert final['accuracy'] == np.mean([found['right'] for found in answers])


# --- stopped and resumed --------------------------------------------------------------------------
# dies at the AT-th of: a file half written, renamed or shortened, a line logged, a step, an answer
KILL = '''
import model
left = [AT]
def tick(*call):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
def half(number, state, file):
    open(file, 'wb').write(b'half of a checkpoint')
    tick()
around(torch, 'save', half)
for owner, name in ((os, 'replace'), (os, 'truncate'), (json, 'dumps'), (torch.optim.AdamW, 'step'),
                    (model.MultiCoCo, 'generate')):
    around(owner, name, tick)
'''


@pytest.mark.parametrize('steps, moments', (
    (0, [1, 3, *(random.randint(4, 20) for _ in range(6))]),  # 1, 3: before anything is saved
    (3, [*range(2, 22, 2)])))                                 # all of an epoch's end
def test_killed_at_any_moment(top, whole, tmp_path, steps, moments):
    """Resumed, or where there is nothing yet to resume begun again, the run is the one that was
    left alone."""
    out = tmp_path / 'out'
    args = train(top, out, '--uniform_prob=0.5', '--save_every=2')
    if steps:
        call(*args, f'--max_steps={steps}')
    for moment in moments:
        is_saved = (out / 'last.pt').exists()
        how = '--init_from=resume' if is_saved else '--overwrite=True'
        if not is_saved:
            fail(*args, '--init_from=resume')
        run = Run(*args, how, before=KILL.replace('AT', str(moment), 1)).wait()
        assert run.code in (-9, 0), (moments, run.err)
    call(*args, '--init_from=resume')
    assert_same_run(whole, out)
    assert not list(out.glob('*.pt.part'))


def test_stopped_by_max_steps_and_what_a_resume_may_change(top, whole, tmp_path):
    """Inside the first epoch and inside the second; moved data, and knobs that change no number."""
    out = tmp_path / 'out'
    call(*train(top, out, '--uniform_prob=0.5', '--max_steps=2'))
    assert load(out / 'last.pt')['step'] == load(out / 'best.pt')['step'] == 2
    more = ['--init_from=resume', '--uniform_prob=0.5', '--num_workers=2', '--log_interval=1',
            '--save_every=1', '--activation_checkpointing=True', '--cache_tiles=False',
            '--device=cpu', '--wandb_project=other']
    call(*train(top, out, *more, '--max_steps=5'))
    assert load(out / 'last.pt')['step'] == 5
    moved = other_data(top, tmp_path / 'data')
    call(*train(top, out, *more, moved))
    assert_same_run(whole, out)
    assert content(out).keys() == content(whole).keys()
    assert len(read_json(out / 'run.json')) == 3
    assert load(out / 'last.pt')['knobs']['init_from'] == 'scratch'


IN_A_STEP, IN_AN_EVALUATION = ('torch.nn.utils', 'clip_grad_norm_'), ('MultiCoCo', 'generate')


def signalled(name, number, where):
    """Signals the process and its workers, as a terminal does, in the number-th call of a function,
    behind which there may be no other."""
    return (f'from model import MultiCoCo\naround({where[0]}, {where[1]!r}, lambda call, *args: '
            f'call == {number} and os.killpg(os.getpgrp(), signal.{name}) or call > {number} '
            f'and os._exit(99))\n')


@pytest.mark.parametrize('name, code, number, where, step', (
    ('SIGTERM', 143, 2, IN_A_STEP, 2), ('SIGINT', 130, 5, IN_A_STEP, 5),
    ('SIGTERM', 143, 1, IN_AN_EVALUATION, 3), ('SIGINT', 130, 3, IN_AN_EVALUATION, 6)))
def test_signals(top, whole, tmp_path, name, code, number, where, step):
    """What is done is saved, and resumed it is the run that was left alone."""
    out = tmp_path / 'out'
    args = train(top, out, '--uniform_prob=0.5', '--num_workers=1')
    run = Run(*args, before=signalled(name, number, where)).wait()
    assert run.code == code, run.err
    assert 'Traceback' not in run.err
    assert load(out / 'last.pt')['step'] == step
    call(*args, '--init_from=resume')
    assert_same_run(whole, out)
    assert content(out).keys() == content(whole).keys()


# --- ranks and micro-batches ----------------------------------------------------------------------
def start_ranks(*args, before=('', '')):
    """Two processes as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    return [Run(*args, before=text, env=dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1', MASTER_PORT=port)) for rank, text in enumerate(before)]


# rows with 2 or 4 thoughts, 1 to 4 tiles or no image, in one stage; Adam without steps of full size
# where gradients are next to nothing
MIXED = ['--max_latent_stage=2', '--start_stage=2', '--pad_latent_to_max=False', '--adam_eps=1e-3']


@pytest.fixture(scope='session')
def alone(top):
    call(*train(top, top / 'alone', *MIXED))
    return top / 'alone'


def assert_same_to_rounding(one, two):
    """Losses, gradients (of each parameter, by Adam's first moments), metrics and answers."""
    for kind, keys in (('train', ('step', 'epoch', 'loss', 'lr', 'grad_norm')),
                       ('eval', ('step', 'loss', 'accuracy', 'thoughts_per_answer', 'examples'))):
        logged = [[[event[key] for key in keys] for event in events(folder, kind)]
                  for folder in (one, two)]
        assert np.allclose(*logged, rtol=1e-4), kind
    states = [load(folder / 'last.pt')['optimizer']['state'] for folder in (one, two)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        difference = (state['exp_avg'] - states[1][number]['exp_avg']).norm()
        assert difference <= 1e-3 * state['exp_avg'].norm(), number
    for name in ('answers_validation.json', 'answers_test.json'):
        assert read_json(one / name) == read_json(two / name)


def test_two_ranks_are_one_process(top, alone, tmp_path):
    """The last batch has one row for two ranks, and 5 rows are asked in 2 groups."""
    call(*train(top, tmp_path / 'micro', *MIXED, '--micro_batch_size=3'))
    assert_same_to_rounding(alone, tmp_path / 'micro')
    out = tmp_path / 'out'
    one, two = (run.wait() for run in start_ranks(*train(top, out, *MIXED, '--micro_batch_size=1')))
    assert one.code == two.code == 0 and 'loss' not in two.out, one.err + two.err
    assert_same_to_rounding(alone, out)
    assert content(out).keys() == content(alone).keys()


@pytest.mark.parametrize('where', (IN_A_STEP, IN_AN_EVALUATION))
def test_a_signal_to_one_of_two_ranks_ends_both(top, alone, tmp_path, where):
    out = tmp_path / 'out'
    ranks = start_ranks(*train(top, out, *MIXED), before=('', signalled('SIGTERM', 1, where)))
    one, two = (run.wait() for run in ranks)
    assert one.code == two.code == 143, one.err + two.err
    assert load(out / 'last.pt')['step'] > 0
    call(*train(top, out, *MIXED, '--init_from=resume'))  # by one process
    assert_same_to_rounding(alone, out)


# --- what a folder holds is not lost --------------------------------------------------------------
def test_a_resume_of_another_run_is_refused(top, tmp_path):
    out = tmp_path / 'out'
    call(*train(top, out, '--max_steps=1'))
    before = content(out)
    changed = dict(seed=7, learning_rate=1.0, c_thought=1, batch_size=2, freeze_vision=True,
                   epochs_per_stage=1, warmup_steps=3, dtype='bfloat16', answer='{letter}',
                   thought='scaled', max_tiles=2, reset_optimizer=False, max_new_tokens=5)
    said = fail(*train(top, out, '--init_from=resume',
                       *(f'--{key}={value}' for key, value in changed.items())))
    assert all(f"'{key}'" in said for key in changed)
    for split in ('train', 'validation'):
        rows = read_split(top / 'data', split)
        rows[0]['question'] = 'Who is it?'
        other = other_data(top, tmp_path / split, **{split: rows})
        fail(*train(top, out, '--init_from=resume', other))
    assert content(out) == before


def test_a_run_is_not_overwritten_and_what_is_not_its_own_stays(top, whole, tmp_path):
    """Also in a folder whose name is a pattern."""
    out = tmp_path / 'out[1]'
    shutil.copytree(whole, out)
    mine = dict.fromkeys(('picture.png', 'thoughts_x.png', 'notes.txt', 'epoch_99.pt', 'last.txt',
                          'answers_exam.json', 'eval/best.pt', 'half.part'), b'mine')
    (out / 'eval').mkdir()
    for name, data in mine.items():
        (out / name).write_bytes(data)
    before = content(out)
    fail(*train(top, out, '--max_steps=1'))
    assert content(out) == before
    call(*train(top, out, '--max_steps=1', '--overwrite=True'))
    after = content(out)
    assert mine.items() <= after.items()
    assert after.keys() - mine.keys() == {
        'run.json', 'metrics.jsonl', 'last.pt', 'best.pt', 'answers_validation.json',
        'predictions_validation.json', 'answers_test.json', 'predictions_test.json'}


def test_a_run_in_somebodys_folder(top, tmp_path):
    """--out_dir=. beside other files, and where one of them has the name of one of ours."""
    mine = ('cat.png', 'train.py', 'model.pt', 'metrics_epoch_9.json', 'eval.json')
    for name in mine:
        (tmp_path / name).write_bytes(b'mine')
    for more in ('--seed=1', '--overwrite=True'):
        call(*train(top, '.', '--max_steps=1', more), folder=tmp_path)
        assert load(tmp_path / 'last.pt')['step'] == 1
        assert all((tmp_path / name).read_bytes() == b'mine' for name in mine)
    for name in ('best.pt', 'curves.png', 'answers_test.json', 'epoch_3.pt'):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        (folder / name).write_bytes(b'mine')
        fail(*train(top, '.', '--max_steps=1'), folder=folder)
        assert content(folder) == {name: b'mine'}


# --- asking a checkpoint again --------------------------------------------------------------------
def test_eval_only_in_a_runs_own_folder(top, whole, tmp_path):
    """Nothing is deleted or changed, and the scores are those of the run; twice."""
    out = tmp_path / 'out'
    shutil.copytree(whole, out)
    before = content(out)
    args = train(top, out, '--uniform_prob=0.5', '--eval_only=True')
    for again in (0, 2):
        said = call(*args, f'--init_from={out}/best.pt')
        assert 'the checkpoint was trained with' not in said
        found = events(out / 'eval')[again:]
        assert list(map(untimed, found)) == list(map(untimed, events(out, 'final')))
    for path in out.glob('*_validation.json'):
        assert path.read_text() == (out / 'eval' / path.name).read_text()
    call(*args, '--init_from=resume')
    assert events(out / 'eval')[-1]['step'] == 9  # last.pt's
    after = content(out)
    assert before.items() <= after.items()
    assert all(name.startswith('eval/') for name in after.keys() - before.keys())


def test_eval_only_in_a_folder_of_evaluations(top, whole, tmp_path):
    """Evaluations stand there one after the other; training there is refused."""
    out = tmp_path / 'out'
    for epoch in (1, 3):
        call(*train(top, out, '--eval_only=True', f'--init_from={whole}/epoch_{epoch}.pt'))
    assert [event['step'] for event in events(out)] == [3, 3, 9, 9]
    before = content(out)
    fail(*train(top, out))
    assert content(out) == before
    call(*train(top, out, '--overwrite=True', '--max_steps=1'))
    assert events(out)[0]['step'] == 1


@pytest.mark.parametrize('more', (['--eval_only=True'], ['--start_stage=1', '--max_steps=0']))
def test_what_differs_from_the_checkpoint_is_told(top, whole, tmp_path, more):
    """In an evaluation, and in a stage that is started from a checkpoint."""
    changed = dict(prompt='<image>Look: {question}\n{choices}\n', answer='{letter}. {choice}',
                   template='chatml', visual_bridge=True, max_tiles=2, dtype='bfloat16',
                   c_thought=1, pad_latent_to_max=False, max_latent_stage=2)
    said = call(*train(top, tmp_path / 'out', f'--init_from={whole}/epoch_1.pt', *more,
                       '--max_length=300', *(f'--{key}={value}' for key, value in changed.items())))
    for key, value in changed.items():
        was = load(whole / 'epoch_1.pt')['knobs'][key]
        assert f'{key} is {value!r}, the checkpoint was trained with {was!r}' in said
    assert said.count('the checkpoint was trained with') == len(changed)


# --- the schedule ---------------------------------------------------------------------------------
def test_learning_rates(top, tmp_path):
    """A warm-up takes at most a fifth of a stage, whatever warmup_steps says, and ends at the rate
    that is set; each stage has its own. Without reset_optimizer one curve spans the run."""
    rows = [dict(row, question_id=f'{row["question_id"]}-{k}')
            for row in read_split(top / 'data', 'train')[:8] for k in range(5)]
    args = [other_data(top, tmp_path / 'data', train=rows), '--epochs_per_stage=1',
            '--min_lr_ratio=0.1']
    cosine = lambda n: [0.1 + 0.45 * (1 + math.cos(math.pi * k / n)) for k in range(n)]
    call(*train(top, tmp_path / 'out', *args))
    for stage, peak in ((0, 3e-3), (1, 5e-4)):
        rates = [e['lr'] for e in events(tmp_path / 'out', 'train') if e['stage'] == stage]
        assert rates == pytest.approx([peak * share for share in (0.5, 1, *cosine(8))])
    call(*train(top, tmp_path / 'kept', *args, '--reset_optimizer=False', '--warmup_steps=3',
                '--learning_rate_stage0=0'))
    rates = [event['lr'] for event in events(tmp_path / 'kept', 'train')]
    assert rates == pytest.approx([5e-4 * share for share in (1 / 3, 2 / 3, 1, *cosine(17))])
    for name, steps in (('out', 10), ('kept', 20)):
        states = load(tmp_path / name / 'last.pt')['optimizer']['state'].values()
        assert max(int(state['step']) for state in states) == steps


def test_the_best_is_of_the_furthest_stage_and_survives_a_resume(top, tmp_path):
    """By scores that are set: the best of all is in stage 0, the best of stage 1 is not its last.
    What the run reports in the end is of that checkpoint."""
    def scored(*scores):
        return f'import sample\naround(sample, "summarize", after=lambda number, found: ' \
               f'dict(found, accuracy={scores}[min(number, {len(scores)}) - 1]))'

    out = tmp_path / 'out'
    args = train(top, out, '--epochs_per_stage=3', '--batch_size=9')
    call(*args, '--max_steps=3', before=scored(0.9, 0.5, 0.1))
    assert load(out / 'best.pt')['epoch'] == 2
    call(*args, '--init_from=resume', before=scored(0.1, 0.3))  # epoch 3 is evaluated again
    best = load(out / 'best.pt')
    assert (best['epoch'], best['stage'], best['accuracy'], best['step']) == (2, 1, 0.5, 2)
    final = events(out, 'final')[0]
    assert (final['step'], final['loss']) == (2, events(out, 'eval')[1]['loss'])


def test_the_schedule_alone(top, tmp_path):
    """One row of each stage with all it holds, and nothing is written."""
    said = call(*train(top, tmp_path / 'out', '--max_steps=0', '--max_latent_stage=2',
                       '--epochs_last_stage=1', '--c_thought=3'))
    for thoughts, text in ((0, 'It has fur.\ncat A'), (3, 'cat A'), (6, 'cat A')):
        marked = f'<|start-latent|><|latent|>*{thoughts}<|end-latent|>' * bool(thoughts)
        assert f'{marked}{text}<|im_end|>' in said
    assert said.count('<|im_end|>') == 4
    assert not (tmp_path / 'out').exists()


def test_what_is_refused_before_the_first_step(top, tmp_path):
    """Rows none of which fit, also of the split that is asked last; an answer that would not be
    read back; a batch that the ranks cannot share."""
    out = tmp_path / 'out'
    rows = read_split(top / 'data', 'test')
    fail(*train(top, out, other_data(top, tmp_path / 'data', test=[
        dict(row, question='Why? ' * 99) for row in rows])))
    fail(*train(top, out, '--max_length=20'))
    fail(*train(top, out, '--answer=It is said'))
    fail(*train(top, out, '--batch_size=5'), env=dict(WORLD_SIZE='2', RANK='0'))
    assert not out.exists()


# --- the loss, the modes, the optimizer -----------------------------------------------------------
@pytest.mark.parametrize('poison', (  # the fourth batch: one was trained, two validated
    "around(MultiCoCo, 'forward', after=lambda number, out: "
    "out._replace(loss=out.loss * float('nan')) if number == 4 else out)",
    "around(torch.nn.utils, 'clip_grad_norm_', after=lambda number, norm: "
    "norm * float('inf') if number == 2 else norm)"))
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_names_rows(top, tmp_path, poison):
    said = fail(*train(top, tmp_path, '--batch_size=9', '--save_every=1'),
                before=f'from model import MultiCoCo\n{poison}')
    assert set(re.findall("'(train[0-9])'", said)) == {f'train{i}' for i in range(9)}
    last = load(tmp_path / 'last.pt')
    assert last['step'] == 1
    assert all(p.isfinite().all() for p in last['model'].values())


@pytest.fixture(scope='session')
def loud(top, whole):
    """The run's checkpoint with larger matrices and states, so that answers differ and a thought is
    not as long as an embedding."""
    saved = load(whole / 'best.pt')
    for name, weight in saved['model'].items():
        if weight.dim() == 2 and 'layers' in name:
            weight *= 3
    saved['model']['language_model.model.norm.weight'] *= 4
    torch.save(saved, top / 'loud.pt')
    return top / 'loud.pt'


def answers_of(said):
    """[image, thoughts, tokens, what is written below] of each answer that sample.py printed."""
    return re.findall(r'^([^\n]*): (\d+) thoughts, (\d+) tokens written\n(.*?)\n(?=\n)', said,
                      re.M | re.S)


@pytest.mark.parametrize('thought', ('pause', 'scaled', 'soft'))
def test_what_is_fed_back_is_the_checkpoints(top, loud, tmp_path, thought):
    """In training, evaluation and sample.py, there without a flag."""
    out = tmp_path / 'out'
    flag = '--mode=pause' if thought == 'pause' else f'--thought={thought}'
    call(*train(top, out, flag, f'--init_from={loud}', '--start_stage=1', '--epochs_per_stage=1',
                '--learning_rate=0'))
    saved = load(out / 'best.pt')
    assert saved['config']['thought'] == thought
    norms = saved['model']['language_model.model.embed_tokens.weight'].norm(dim=-1)
    norm = dict(pause=norms[saved['config']['latent_token_id']], scaled=norms.mean()).get(thought)
    if norm is not None:
        assert events(out, 'train')[-1]['thought_norm'] == pytest.approx(norm.item(), rel=1e-4)
    saved['config']['thought'] = 'hidden'
    torch.save(saved, tmp_path / 'hidden.pt')
    said, hidden = (answers_of(call('sample', f'--ckpt={path}', '--show_thoughts=1',
                                    f'--image={top}/source/test1.png', '--max_new_tokens=4'))
                    for path in (out / 'best.pt', tmp_path / 'hidden.pt'))
    assert len(said) == len(hidden) == 1
    assert said != hidden


@pytest.mark.parametrize('mode, stages', (
    ('cot', {0}), ('no_cot', {0}), ('no_thoughts', {0, 1}), ('pause', {0, 1})))
def test_modes(top, tmp_path, mode, stages):
    """Without a curriculum there is one stage, as long as all."""
    call(*train(top, tmp_path, f'--mode={mode}', '--epochs_per_stage=1'))
    assert {event['stage'] for event in events(tmp_path)} == stages
    assert len(events(tmp_path, 'eval')) == 2
    assert events(tmp_path, 'final')[0]['thoughts_per_answer'] == 2 * (mode == 'pause')


def test_what_decays_and_what_is_frozen(top, whole, tmp_path):
    """Where the gradient is 0 only decay moves a parameter: matrices, but not the position and
    class embeddings, biases, norms and scales."""
    still = ("from model import MultiCoCo\naround(MultiCoCo, 'forward', "
             "after=lambda number, out: out._replace(loss=out.loss * 0))")
    old = load(whole / 'epoch_1.pt')['model']
    spared = {'vision_model.pos_embed', 'vision_model.cls_token'}
    assert spared <= old.keys()
    matrices = {key for key, p in old.items() if p.dim() > 1} - spared
    for freeze in (False, True):
        out = tmp_path / str(freeze)
        call(*train(top, out, f'--init_from={whole}/epoch_1.pt', '--weight_decay=0.5',
                    '--max_steps=3', f'--freeze_vision={freeze}'), before=still)
        new = load(out / 'last.pt')['model']
        moved = {key for key, p in old.items() if not torch.equal(p, new[key])}
        assert moved == {key for key in matrices if not (freeze and 'vision_model' in key)}


def test_compiled_blocks_compute_the_same(top, tmp_path):
    """Traced as for torch's compiler, but run by torch itself: the compiler takes a minute. One
    block, one step, and no evaluation."""
    args = ['--num_hidden_layers=1', '--start_stage=1', '--c_thought=1']
    stop = signalled('SIGTERM', 1, IN_A_STEP)
    traced = ("calls = []\ncompiled = torch.nn.Module.compile\n"
              "torch.nn.Module.compile = lambda block: compiled(block, backend=run)\n"
              "def run(graph, inputs):\n    open('traced', 'w')\n    return graph\n")
    for name, more in (('eager', []), ('compiled', ['--compile=True'])):
        run = Run(*train(top, tmp_path / name, *args, *more), before=stop + traced, folder=tmp_path)
        assert run.wait().code == 143
        assert (tmp_path / 'traced').exists() == (name == 'compiled')
    eager, compiled = (events(tmp_path / name, 'train')[0] for name in ('eager', 'compiled'))
    assert compiled['loss'] == pytest.approx(eager['loss'], rel=1e-5)
    assert compiled['grad_norm'] == pytest.approx(eager['grad_norm'], rel=1e-4)


def test_wandb_steps_never_go_back_and_a_resumed_run_is_the_same(top, tmp_path):
    """Also after a kill, behind which steps are logged again."""
    (tmp_path / 'wandb.py').write_text('''
import json
class Run:
    step = 0
    def log(self, values, step):
        assert step >= self.step, (step, self.step)
        self.step = step
        with open('calls', 'a') as f:
            f.write(json.dumps(dict(values, step=step)) + '\\n')
def init(id, name, **how):
    run = Run()
    with open('calls', 'a+') as f:
        f.seek(0)
        for line in f:
            run.step = json.loads(line).get('step', 0)
        f.write(json.dumps(dict(id=id, name=name, step=run.step)) + '\\n')
    return run
''')
    here = f'sys.path.insert(1, {str(tmp_path)!r})\n'
    args = train(top, 'out', '--wandb=True', '--wandb_run_name=mine', '--save_every=0',
                 '--epochs_stage0=2', '--epochs_per_stage=0')
    killed = Run(*args, before=here + signalled('SIGKILL', 6, IN_A_STEP), folder=tmp_path).wait()
    assert killed.code == -9
    call(*args, '--init_from=resume', before=here, folder=tmp_path)
    calls = read_lines(tmp_path / 'calls')
    one, two = (found for found in calls if 'id' in found)
    assert one['id'] == two['id'] and one['name'] == 'mine'
    assert (one['step'], two['step'], calls[-1]['step']) == (0, 5, 6)
    assert {'train/loss', 'train/lr'} <= calls[1].keys()
    assert any('eval/accuracy' in found for found in calls)


# --- sample.py ------------------------------------------------------------------------------------
def sample(ckpt, *more):
    return call('sample', '--ckpt', ckpt, '--question=What is it?', '--max_new_tokens=12', *more)


def test_sample_asks_one_several_and_a_folder(top, loud, tmp_path):
    """An image has the same answer alone and among others with other numbers of tiles."""
    names = ['a.png', 'b,c.png', 'd.png', 'e.png', 'f.png']
    for name, source in zip(names, (0, 3, 1, 4, 2)):
        shutil.copy(top / 'source' / f'validation{source}.png', tmp_path / name)
    (tmp_path / 'notes.txt').write_text('no image')
    options = '--choices=cat|dog|cow'
    said = sample(loud, '--image', tmp_path, '--eval_batch_size=2', options)
    assert len(re.findall('^-> ', said, re.M)) == 5
    folder = answers_of(said)
    assert [Path(found[0]).name for found in folder] == names
    assert {found[1] for found in folder} == {'2'}
    assert len({found[3] for found in folder}) > 2
    assert answers_of(sample(loud, '--image', tmp_path / 'b,c.png', options)) == folder[1:2]
    listed = f'{tmp_path}/f.png,{tmp_path}/a.png'
    assert answers_of(sample(loud, '--image', listed, options)) == [folder[4], folder[0]]


def test_thoughts_are_shown_and_an_exported_folder_answers_the_same(top, loud, tmp_path):
    """The token after the thoughts, and by them many before: a folder has a further end token."""
    call('experiments.export', f'--ckpt={loud}', f'--folder={tmp_path}/exported')
    for count in (0, 3):
        flags = [f'--image={top}/source', f'--num_thoughts={count}', '--show_thoughts=2',
                 '--max_new_tokens=1']
        said, exported = (sample(ckpt, *flags) for ckpt in (loud, tmp_path / 'exported'))
        assert len(re.findall(r'^ +thought \d: .*norm', said, re.M)) == 17 * count
        assert {found[1] for found in answers_of(said)} == {str(count)}
        wanted = [(name, below) for name, _, _, below in answers_of(said)]
        assert [(name, below) for name, _, _, below in answers_of(exported)] == wanted


def test_text_alone(top, tmp_path):
    """Coconut's own files: prepared, trained without a vision tower, asked without an image."""
    rows = [dict(question=f'Every {a} is a u. Tom is a {a}. Is Tom a u or a v?',
                 steps=[f'Tom is a {a}.', f'Every {a} is a u.'], answer='Tom is a u.')
            for a in 'pqrstxyz']
    write_rows(tmp_path / 'train.jsonl', rows)
    (tmp_path / 'valid.json').write_text(json.dumps(rows[:3]))
    out = tmp_path / 'out'
    call(*prepare(top, tmp_path, tmp_path / 'data', 'valid.json'))
    call(*train(top, out, f'--data_dir={tmp_path}/data', '--vision_num_layers=0',
                '--prompt={question}\\n', '--answer=### {answer}', '--epochs_per_stage=1'))
    assert 'accuracy_exact' in events(out, 'final')[0]
    assert not list(out.glob('predictions_*'))
    assert [found[1] for found in answers_of(sample(out / 'best.pt'))] == ['2']


# --- prepare.py -----------------------------------------------------------------------------------
def test_a_row_without_the_image_that_others_have_is_dropped(top, tmp_path):
    rows = make_rows(tmp_path, 'train', 5)
    del rows[1]['image_path']
    rows[2]['image_path'] = None
    rows[3]['image_path'] = 'nowhere.png'
    write_rows(tmp_path / 'train.jsonl', rows)
    call(*prepare(top, tmp_path, tmp_path / 'data', 'train.jsonl'))
    found = read_split(tmp_path / 'data', 'train')
    assert [row['question_id'] for row in found if row['image']] == ['train0', 'train4']


def test_parquet_files_as_those_of_aokvqa(top, tmp_path):
    """A rationale of one sentence is cut, and a training row without rationales dropped."""
    picture = (top / 'source' / 'validation1.png').read_bytes()
    rows = [dict(image=dict(bytes=picture, path=None), question_id=f'id{i}', question='Which?',
                 choices=['a cat', 'a dog', 'a cow', 'a hen'], correct_choice_idx=i,
                 direct_answers="['cat', 'cat']", difficult_direct_answer=False,
                 rationales=['It is furry and small and it sits there', 'Another.'][:2 * (i < 3)])
            for i in range(4)]
    (tmp_path / 'hub').mkdir()
    for split in ('train', 'validation'):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows),
                                    tmp_path / 'hub' / f'{split}-00000-of-00001.parquet')
    call(*prepare(top, '', tmp_path / 'data')[:4], f'--dataset={tmp_path}/hub',
         '--max_latent_stage=3', '--steps_from=first')
    found, asked = (read_split(tmp_path / 'data', split) for split in ('train', 'validation'))
    assert [row['answer'] for row in found] == ['a cat', 'a dog', 'a cow']
    assert [row['answer'] for row in asked] == rows[0]['choices']
    assert found[0]['steps'] == ['It is furry', 'and small and', 'it sits there']
    assert (tmp_path / 'data' / found[0]['image']).read_bytes() == picture


def test_what_prepare_refuses_is_left_alone(top, tmp_path):
    """Without validation rows, and a folder into itself."""
    data = tmp_path / 'data'
    shutil.copytree(top / 'source', data)
    before = content(data)
    fail(*prepare(top, data, tmp_path / 'new'), '--val_file=')
    fail(*prepare(top, top / 'source', data), '--val_file=')
    fail(*prepare(top, data, data))
    fail(*prepare(top, '', 'data')[:4], f'--dataset={data}', folder=tmp_path)
    after = content(data)
    assert before == {name: value for name, value in after.items() if 'cache/arrow' not in name}


# --- probe.py -------------------------------------------------------------------------------------
def test_probe_measures_each_change_against_the_answers_left_alone(top, loud, tmp_path):
    """On rows without a map; a run compared with itself differs in none."""
    ckpt = shutil.copy(loud, tmp_path)
    call(*train(top, tmp_path / 'run', '--eval_only=True', f'--init_from={ckpt}'))
    call('experiments.probe', f'--ckpt={ckpt}', '--intervene=all,blind,twins',
         f'--compare={tmp_path}/run', '--eval_batch_size=2')
    found = {record['name']: record for record in read_json(tmp_path / 'probe_validation.json')}
    names = ('zero', 'noise', 'mean', 'swap', 'image', 'drop_last_1', 'drop_last_2', 'early_0',
             'early_1', 'blind', 'twins', f'compare {tmp_path}/run')
    assert found.keys() >= {'clean', *names}
    accuracy = events(tmp_path / 'run', 'final')[0]['accuracy']
    for record in found.values():
        assert record.keys() >= {'accuracy', 'p'}
        assert (record['clean'], record['rows']) == (accuracy, 5)
    assert found['clean']['p'] == found[names[-1]]['p'] == 1
    assert [found[name]['thoughts_per_answer'] for name in names[7:10]] == [0, 1, 2]
    assert (tmp_path / 'thoughts_validation.png').exists()


@pytest.mark.parametrize('name', ('prepare', 'train', 'sample'))
def test_a_mistyped_flag_is_one_sentence(name, tmp_path):
    for flag in ('--max_new_token=3', '--seed=many', '--seed', 'nothing.py'):
        said = fail(name, flag, folder=tmp_path)
        assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_slip_in_changed_code_ends_a_run_and_keeps_its_traceback(top, tmp_path):
    """In a worker, whose parent once waited for it forever."""
    slip = 'import prepare\ndef slip(*call):\n    a, b = call[:1]\naround(prepare, "collate", slip)'
    said = fail(*train(top, tmp_path / 'out', '--num_workers=1'), before=slip)
    assert 'train.py", line' in said and 'not enough values to unpack' in said
