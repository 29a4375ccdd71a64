"""
About a run: how it was started, and what is summed up and drawn from its log alone. As a command:
accuracy and losses over the steps, stages marked.

    python -m experiments.curves out-toy        reads metrics.jsonl, writes curves.png
"""
import io
import json
import os
import shlex
import subprocess
import sys
import time
from importlib.metadata import version

import matplotlib
import torch

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402, the backend first

from prepare import write_file  # noqa: E402


def provenance():
    """How a run is started: command, time, commit, device, versions."""
    here = os.path.dirname(os.path.realpath(__file__))
    git = ['git', '-C', here, 'describe', '--always', '--exclude=*', '--abbrev=40', '--dirty']
    return dict(
        id=os.urandom(4).hex(), command=sys.argv, time=time.ctime(),
        commit=subprocess.getoutput(shlex.join(git)),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu',
        versions={name: version(name) for name in ('torch', 'transformers', 'tokenizers', 'timm')})


def open_folder(folder, start, overwrite, goes_on):
    """Makes a run's folder, notes its start in run.json and gives it with the first's id. start:
    what `provenance` gives, and the names of all files that the run may write. Unless it goes on
    with what is there, none of these may be there, or with overwrite those go that are noted as
    earlier runs'."""
    path, starts = os.path.join(folder, 'run.json'), []
    held = [name for name in start['files'] if os.path.exists(os.path.join(folder, name))]
    assert goes_on or overwrite or not held, (
        f'{folder} holds {held}: --init_from=resume, --overwrite=True or another --out_dir')
    if os.path.exists(path):
        with open(path) as f:
            starts = json.load(f)
    for name in [name for one in starts for name in one['files'] if not goes_on]:
        if os.path.exists(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
    starts = [*starts * goes_on, start]
    write_file(path, json.dumps(starts, indent=1).encode())
    with open(os.path.join(folder, 'metrics.jsonl'), 'a'):
        return dict(start, id=starts[0]['id'])


def start_wandb(project, name, start):
    """A run of Weights & Biases; a resumed run is the same one there."""
    import wandb
    folder = start['knobs']['out_dir']
    return wandb.init(project=project, id=start['id'], resume='allow', dir=folder,
                      name=name or os.path.basename(os.path.abspath(folder)), config=start['knobs'])


def read_log(folder):
    with open(os.path.join(folder, 'metrics.jsonl')) as f:
        return [json.loads(line) for line in f]


def report_epoch(folder, epoch):
    """metrics_epoch_{epoch}.json, its evaluation and the means over its training steps; the curves
    so far."""
    events = read_log(folder)
    result = [e for e in events if e['event'] == 'eval' and e['epoch'] == epoch][-1]
    steps = [e for e in events if e['event'] == 'train' and e['epoch'] == epoch]
    for name, key in (('train_loss', 'loss'), ('grad_norm', 'grad_norm'),
                      ('tokens_per_s', 'tokens_per_s'), ('images_per_s', 'images_per_s')):
        result[name] = sum(e[key] for e in steps) / len(steps)
    result['lr'] = steps[-1]['lr']
    write_file(os.path.join(folder, f'metrics_epoch_{epoch}.json'),
               json.dumps(result, indent=1).encode())
    draw_curves(folder)


def draw_curves(folder):
    events = read_log(folder)
    trained = [event for event in events if event['event'] == 'train']
    evaluated = [event for event in events if event['event'] == 'eval']
    steps = [event['step'] for event in evaluated]
    figure, (top, low) = plt.subplots(2, 1, sharex=True, figsize=(7, 4.5), height_ratios=(2, 1),
                                      layout='tight')
    top.plot(steps, [100 * event['accuracy'] for event in evaluated], 'o-', ms=3)
    top.set(ylabel='validation accuracy, %', ylim=(0, 102))
    low.semilogy([event['step'] for event in trained], [event['loss'] for event in trained], lw=0.8,
                 label='training')
    low.semilogy(steps, [event['loss'] for event in evaluated], 'o', ms=3, label='validation')
    low.set(ylabel='loss', xlabel='optimizer steps')
    low.legend(fontsize=7)
    stage_ends = {event['stage']: event['step'] for event in evaluated}
    for stage, x in stage_ends.items():
        top.text(x, 4, f'stage {stage} ', ha='right', fontsize=7)
        top.axvline(x, color='grey', lw=0.5)
        low.axvline(x, color='grey', lw=0.5)
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    plt.close(figure)
    write_file(os.path.join(folder, 'curves.png'), content.getvalue())


if __name__ == '__main__':
    draw_curves(sys.argv[1])
