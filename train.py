"""
Trains MultiCoCo through its curriculum: stage 0 writes every step of the reasoning, stage k hides
the first k behind thoughts.

    python train.py config/toy.py                            the built-in data set, minutes on a CPU
    python train.py config/toy.py --dry_run=True             what that will do, a row of each stage
    python train.py config/toy.py --init_from=resume         goes on where it was stopped or killed
    python train.py config/aokvqa.py --max_latent_stage=4    InternVL3-1B on A-OKVQA
    torchrun --standalone --nproc_per_node=8 train.py config/aokvqa.py    the same on 8 GPUs

Leaves in out_dir: last.pt (to resume from), epoch_{k}.pt and best.pt (weights; best validation
accuracy within the furthest stage), run.json (how it was started), metrics.jsonl,
metrics_epoch_{k}.json, curves.png, answers_{split}.json, predictions_{split}.json. There is no
lock: do not start two runs in one out_dir. `python -m experiments.probe` examines what the thoughts
do.

To change X, edit here: what a stage hides, prepare.py's `build_text`; the schedule, "schedule"
below, where stage numbers have to rise (best.pt goes by them, and the optimizer starts anew where
they change); what is fed back, model.py's `think` and, for thoughts that the model writes itself,
`generate`.
"""
import glob
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which its default arguments would keep alive
from torch.nn.parallel import DistributedDataParallel

from configurator import configure
from model import END_LATENT, IMG_CONTEXT, LATENT, START_LATENT, Config, MultiCoCo
from model import load_checkpoint, load_tokenizer, read_checkpoint
from prepare import ANSWER, PROMPT, Rows, batches, build_text, check_round_trip, digest
from prepare import fitting_rows, frame_of, micro_batches, read_split, replacing, split_file
from prepare import count_supervised
from sample import ask, describe, peak_memory, pick_device, pick_dtype, summarize

# --- knobs: data ----------------------------------------------------------------------------------
data_dir = 'data/aokvqa'        # what prepare.py made
max_tiles = 8                   # an image; if not prepare.py's number, tiles are cut again
image_size = 448                # side of a tile in pixels, for init_from='scratch'
cache_tiles = True
max_length = 2560               # tokens; rows that need more are dropped and counted
num_workers = 1                 # processes that load data beside the training
# text
prompt = PROMPT
answer = ANSWER
template = 'plain'              # 'plain', 'chatml' (InternVL's chat turns) or 'chat' (the model's)
visual_bridge = False           # words that lead from the image to the steps
# curriculum
mode = 'coconut'                # also cot, no_cot, pause, no_thoughts: see prepare.py's build_text
c_thought = 2                   # thoughts a hidden step
max_latent_stage = 4            # the last stage that hides one more step and adds thoughts
epochs_stage0 = 8               # epochs with every step written
epochs_per_stage = 3
epochs_last_stage = 0           # epochs of an optional last stage that hides all remaining steps
start_stage = 0                 # begin here, from a checkpoint that has learnt the stages before
pad_latent_to_max = True        # the same number of thoughts in rows with fewer steps
uniform_prob = 0.0              # chance that a row is trained at a random earlier stage
teach_thoughts = 0.0            # weight of a loss: a thought, through the head, says its result
reset_optimizer = True          # a fresh optimizer, warm-up and cosine in every stage
# model
init_from = 'OpenGVLab/InternVL3-1B-Pretrained'  # hub id, folder, .pt, 'scratch' or 'resume'
freeze_vision = False
activation_checkpointing = False
hidden_size = 896               # from here on for init_from='scratch': see model.py's Config
intermediate_size = 4864
num_hidden_layers = 24
num_attention_heads = 14
num_key_value_heads = 2
head_dim = 64
rope_theta = 1e6
tie_word_embeddings = False
vision_hidden_size = 1024
vision_intermediate_size = 4096
vision_num_layers = 24
vision_num_heads = 16
# optimization
batch_size = 32                 # rows an optimizer step, over all micro-batches and ranks
micro_batch_size = 0            # rows a forward pass, at most; 0 for all that a rank has
learning_rate = 5e-5            # peak, after stage 0
learning_rate_stage0 = 0.0      # peak in stage 0; 0 for the same
min_lr_ratio = 0.05             # where the cosine ends
warmup_steps = 50
beta1 = 0.9
beta2 = 0.95
adam_eps = 1e-8
weight_decay = 0.01
grad_clip = 1.0                 # 0 for none
# run
out_dir = 'out'
device = 'auto'                 # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'                  # 'auto', 'float32', 'bfloat16' (autocast, weights stay float32)
threads = 0                     # CPU threads; 0 for torch's choice
seed = 1337
max_steps = 0                   # end after so many optimizer steps; 0 for the whole schedule
save_every = 500                # steps between writes of last.pt inside an epoch; 0 for none
keep_epochs = 1                 # so many epoch_{k}.pt stay; those that end a stage always do
overwrite = False               # let go of the run that out_dir holds
dry_run = False                 # print schedule, rows and prompts, and stop
eval_only = False               # evaluate init_from at its stage and stop
eval_batch_size = 32
max_new_tokens = 128
log_interval = 50               # steps between log lines
wandb = False                   # log to Weights & Biases as well
wandb_project = 'multicoco'
wandb_run_name = ''             # '' for the last part of out_dir
# --------------------------------------------------------------------------------------------------
# a resumed run may change these; any other knob would make it another run
CHANGEABLE = ('data_dir', 'out_dir', 'init_from', 'device', 'threads', 'num_workers',
              'micro_batch_size', 'activation_checkpointing', 'cache_tiles', 'max_steps',
              'save_every', 'keep_epochs', 'overwrite', 'dry_run', 'eval_only', 'eval_batch_size',
              'log_interval', 'wandb', 'wandb_project', 'wandb_run_name')


# what a run writes into its folder, and what alone is removed there; REPORTS has probe.py's too
CHECKPOINTS = ('last.pt', 'best.pt', 'epoch_[0-9]*.pt')
REPORTS = ('run.json', 'metrics.jsonl', 'metrics_epoch_[0-9]*.json', 'predictions_*.json',
           'answers_*.json', 'thoughts_*.json', 'thoughts_*.png', 'probe_*.json', 'patch_*.png',
           'curves.png')


class Stage(NamedTuple):
    stage: int
    epochs: int
    rows: list            # training rows that fit max_length at this stage
    validation: list
    steps: int            # optimizer steps an epoch
    first_step: int       # steps of the run before this stage
    peak: float           # learning rate


def preview(s, row_knobs, text_knobs, rates, uniform_prob):
    """Prints a Stage s as it will be trained and asked; rates: the learning rate of each step."""
    tokenizer = row_knobs['tokenizer']

    def text(ids):
        repeated = re.compile(r'(<[^<>\s]+>)\1+')
        # <x><x><x> becomes <x>*3
        return repeated.sub(lambda m: f'{m[1]}*{len(m[0]) // len(m[1])}', tokenizer.decode(ids))

    def span(numbers):
        low, high = min(numbers), max(numbers)
        return f'{low}' if low == high else f'{low} to {high}'

    # (prompt, number of thoughts, target) of each row
    texts = [build_text(row, s.stage, **text_knobs) for row in s.rows]
    answer_line_ends = text_knobs['answer'].count('\n')
    thoughts = span([count for _, count, _ in texts])
    # each step ends in a line end, the answer comes last
    written = span([target.count('\n') - answer_line_ends for _, _, target in texts])
    mixed = ''
    if uniform_prob and s.stage:
        mixed = f', each row with chance {uniform_prob:g} at an earlier stage'
    row = Rows(s.rows, 'train', s.stage, **row_knobs)[0]
    asked = Rows(s.validation, 'validation', s.stage, supervised=False,
                 **row_knobs)[0]['input_ids']
    ids, start = row['input_ids'], row['labels'].count(-100)  # -100 stands on the prompt, in front
    print(f'\nstage {s.stage}: {s.epochs} epochs of {s.steps} steps, {len(s.rows)} rows, '
          f'{thoughts} thoughts, {written} steps in words, learning rate {rates[0]:.1e} to '
          f'{max(rates):.1e} to {rates[-1]:.1e}{mixed}\n'
          f'--- training row {s.rows[0]["question_id"]}, {len(ids)} tokens; supervised is what '
          f'stands in [[ ]]\n{text(ids[:start])}[[{text(ids[start:])}]]\n'
          f'--- prompt of validation row {s.validation[0]["question_id"]}, {len(asked)} tokens\n'
          f'{text(asked)}')


def files_of_runs(out_dir, *patterns):
    """Paths in out_dir, whatever its name holds, by patterns of their names."""
    folder = glob.escape(out_dir)
    return [path for pattern in patterns for path in glob.glob(os.path.join(folder, pattern))]


def newest_whole_epoch(out_dir):
    """Names the newest epoch_{k}.pt that can be read, for an error about last.pt; '' if none."""
    paths = files_of_runs(out_dir, 'epoch_*.pt')
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        try:
            saved = read_checkpoint(path)
        except ValueError:
            continue
        return (f'; the newest whole one is {path}, the weights after step {saved["step"]}: start '
                f'a stage from it, with --init_from={path} --start_stage={saved["stage"]} and '
                'another --out_dir')
    return ''


def git_commit():
    """The commit of this code, and whether files differ from it; '' without git."""
    if not shutil.which('git'):
        return ''

    def git(*args):
        done = subprocess.run(['git', '-C', os.path.dirname(os.path.abspath(__file__)), *args],
                              capture_output=True, text=True)
        return done.stdout.strip()

    changed = ' with changes' if git('status', '--porcelain', '-uno') else ''
    return git('rev-parse', 'HEAD') + changed


def draw_curves(path, metrics):
    """Accuracy and loss over steps, stages marked, from a metrics.jsonl."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    with open(metrics) as f:
        events = [json.loads(line) for line in f]
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
    with replacing(path) as part:
        figure.savefig(part, dpi=120, format='png')
    plt.close(figure)


if __name__ == '__main__':  # data workers import this file again where processes are not forked
    # --- setup: ranks, knobs, device --------------------------------------------------------------
    rank = int(os.environ.get('RANK', 0))  # these three are torchrun's
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    if rank:
        sys.stdout = open(os.devnull, 'w')
    knobs = configure(globals())  # its names are those that this file's top level assigns
    globals().update(knobs)
    at_least_1 = ('batch_size', 'eval_batch_size', 'log_interval', 'max_new_tokens', 'max_tiles',
                  'image_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads',
                  'num_key_value_heads', 'head_dim', 'vision_num_heads')
    for key, value in knobs.items():
        least = 1 if key in at_least_1 else 0
        if isinstance(value, (int, float)) and value < least:
            raise ValueError(f'{key}={value}: expected {least} or more')
    torch.set_num_threads(threads or torch.get_num_threads())
    device = pick_device(device)
    if device == 'cuda':
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f'rank {local_rank} has no GPU, this machine has '
                             f'{torch.cuda.device_count()}: lower --nproc_per_node')
        torch.cuda.set_device(local_rank)
    loading = dict(num_workers=num_workers, pin_memory=device == 'cuda')
    micro = min(micro_batch_size or batch_size, batch_size // world)
    if micro < 1 or batch_size % (micro * world):
        raise ValueError(f'batch_size={batch_size} is not a multiple of {micro * world}: {world} '
                         f'rank(s) with micro-batches of {micro}; change one of them')
    for key in ('beta1', 'beta2'):
        if knobs[key] >= 1:
            raise ValueError(f'{key}={knobs[key]:g}: expected less than 1')
    if teach_thoughts and (mode != 'coconut' or not c_thought):
        raise ValueError(f'teach_thoughts={teach_thoughts:g} with mode={mode!r}, c_thought='
                         f"{c_thought}: only the thoughts of 'coconut' can be taught")
    text_knobs = dict(mode=mode, c_thought=c_thought, max_latent_stage=max_latent_stage,
                      prompt=prompt, answer=answer, pad_latent_to_max=pad_latent_to_max,
                      # 'chat' needs the tokenizer: 'plain' holds its place until that is loaded
                      template='plain' if template == 'chat' else template,
                      visual_bridge=visual_bridge)
    splits = ['validation']
    if os.path.isfile(split_file(data_dir, 'test')):
        splits.append('test')
    # called for its checks, before a model is loaded
    build_text(read_split(data_dir, 'validation')[0], 0, **text_knobs)
    for split in (splits if eval_only else ['train', *splits]):
        check_round_trip(read_split(data_dir, split), answer)
    held = files_of_runs(out_dir, *CHECKPOINTS)
    if held and init_from != 'resume' and not (overwrite or dry_run):
        raise ValueError(f'{out_dir} holds another run ({os.path.basename(held[0])}): go on with '
                         'it by --init_from=resume, choose another --out_dir, or let go of it by '
                         '--overwrite=True')
    if wandb and not importlib.util.find_spec('wandb'):
        raise ValueError('wandb=True, but wandb is not installed: pip install wandb')
    if world > 1:
        dist.init_process_group('cpu:gloo,cuda:nccl' if device == 'cuda' else 'gloo')
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

    def all_ranks(value):
        """What each rank gave, in a list. It goes from CPU to CPU: no GPU is waited for."""
        values = [value] * world
        if world > 1:
            dist.all_gather_object(values, value)
        return values

    def end(code=0):
        """Ends the script, and first the group of ranks, whose threads may not outlive Python."""
        global network
        network = None  # the DDP wrapper made below: no reference to the group may stay
        if world > 1:
            dist.destroy_process_group()
        raise SystemExit(code)

    # --- model ------------------------------------------------------------------------------------
    last_path = os.path.join(out_dir, 'last.pt')
    if init_from == 'scratch':
        if not os.path.isdir(os.path.join(data_dir, 'tokenizer')):
            raise ValueError(f'{data_dir} holds no tokenizer: run prepare.py with the same config, '
                             'or with --init_from=scratch')
        tokenizer, saved = load_tokenizer(os.path.join(data_dir, 'tokenizer')), {}
        shape = {field.name: knobs[field.name] for field in fields(Config) if field.name in knobs}
        config = Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
                        image_token_id=tokenizer.convert_tokens_to_ids(IMG_CONTEXT),
                        latent_token_id=tokenizer.convert_tokens_to_ids(LATENT),
                        eos_token_ids=(tokenizer.eos_token_id,), **shape)
        model = MultiCoCo(config)
        # both markers start as copies of the line end, which stage 0 trains: a marker ends the
        # question as a line end ends a step
        line_end = tokenizer.encode('\n', add_special_tokens=False)[-1]
        embeddings = model.language_model.model.embed_tokens.weight.data
        for marker in tokenizer.convert_tokens_to_ids([START_LATENT, END_LATENT]):
            embeddings[marker] = embeddings[line_end]
    elif init_from == 'resume':
        try:
            model, tokenizer, saved = load_checkpoint(last_path)
        except (ValueError, FileNotFoundError) as error:
            raise OSError(f'{error}{newest_whole_epoch(out_dir)}') from None
        if 'optimizer' not in saved:  # a copy of best.pt, say
            raise ValueError(f'{last_path} holds no optimizer state: start a stage from it, with '
                             f'--init_from={last_path} --start_stage={saved["stage"]} and another '
                             '--out_dir')
    else:
        model, tokenizer, saved = load_checkpoint(init_from)
    config = model.config
    text_knobs['template'] = frame_of(template, tokenizer)
    # 'auto' on a CPU: bfloat16 for checkpoints trained in it and (saved is {}) for others' models
    in_bfloat16 = saved['knobs']['dtype'] == 'bfloat16' if saved else init_from != 'scratch'
    dtype = knobs['dtype'] = pick_dtype(dtype, device, on_cpu=in_bfloat16)
    autocast = torch.autocast(device, torch.bfloat16) if dtype == 'bfloat16' else nullcontext()
    model.to(device).set_activation_checkpointing(activation_checkpointing)
    # what replaces each thought before it is fed back
    edit_thought = model.as_pause if mode == 'pause' else None
    modules = dict(language=model.language_model)
    if config.vision_num_layers:
        model.vision_model.requires_grad_(not freeze_vision)
        modules = dict(vision=model.vision_model, projector=model.mlp1, **modules)
    else:
        for split in (splits if eval_only else ['train', *splits]):
            pictured = [row for row in read_split(data_dir, split) if row.get('image')]
            if pictured:
                raise ValueError(f'{len(pictured)} {split} rows have an image (the first is '
                                 f'{pictured[0]["question_id"]}), but {init_from} is a text '
                                 'decoder: give an InternVL checkpoint, or text-only data')
    for name, module in modules.items():
        size = sum(p.numel() for p in module.parameters()) / 1e6
        frozen = '' if any(p.requires_grad for p in module.parameters()) else ', frozen'
        print(f'{name:>10}: {size:8.3f}M parameters{frozen}')

    # --- provenance -------------------------------------------------------------------------------
    provenance = dict(
        command=shlex.join(sys.argv), time=time.strftime('%Y-%m-%d %H:%M:%S'), commit=git_commit(),
        knobs=dict(knobs), host=platform.node(), ranks=world, threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name() if device == 'cuda' else platform.machine(),
        versions={'python': platform.python_version(),
                  **{p: importlib.metadata.version(p)
                     for p in ('torch', 'transformers', 'tokenizers', 'timm', 'numpy')}})
    run_path, starts = os.path.join(out_dir, 'run.json'), []  # the provenance of earlier starts
    if os.path.isfile(run_path) and (eval_only or init_from == 'resume'):
        with open(run_path) as f:
            starts = json.load(f)

    # --- state: all that a resume needs, besides model and optimizer ------------------------------
    epoch = place = step = 0     # whole epochs done, batches of the next one, optimizer steps
    stage = start_stage          # of the epoch in hand, a number; a Stage is called current
    accuracy, best = 0.0, None   # latest validation accuracy; [stage, accuracy, -loss] of best.pt
    sums = Counter()             # over this epoch's steps: loss, gradient norm, tokens, ...
    seconds_before = 0.0         # of this run, before it was resumed
    wandb_id = os.urandom(4).hex()
    started = time.time()

    def elapsed():
        return seconds_before + time.time() - started

    # --- files and logs: written by rank 0 alone --------------------------------------------------
    wandb_run = None

    def write(name, content):
        """bytes as they are, anything else as JSON; `replacing` makes the folder."""
        if not rank:
            if not isinstance(content, bytes):
                content = json.dumps(content, indent=1).encode()
            with replacing(os.path.join(out_dir, name)) as part, open(part, 'wb') as f:
                f.write(content)

    def log(event, **values):
        """One line of metrics.jsonl, and the same numbers to wandb with the step as their axis (the
        final report is of best.pt's step, and wandb's may not go back)."""
        if rank:
            return
        line = dict(event=event, step=step, stage=stage, epoch=epoch, time=round(elapsed(), 2),
                    **values)
        with open(os.path.join(out_dir, 'metrics.jsonl'), 'a') as f:
            f.write(json.dumps(line) + '\n')
        if wandb_run:
            numbers = {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != 'step'}
            name = f'{event}/{values["split"]}' if 'split' in values else event
            wandb_run.log({f'{name}/{k}': v for k, v in numbers.items()},
                          step=max(step, wandb_run.step))

    # --- evaluation -------------------------------------------------------------------------------
    # an answer has to fit behind the longest prompt
    most = min(max_length, config.max_position_embeddings - max_new_tokens)
    if most < max_length:
        print(f'max_length is {most} here: the model takes {config.max_position_embeddings} '
              f'tokens, and max_new_tokens={max_new_tokens}')
    row_knobs = dict(tokenizer=tokenizer, data_dir=data_dir, image_size=config.image_size,
                     max_tiles=max_tiles, cache_tiles=cache_tiles, max_length=most,
                     num_image_tokens=config.num_image_tokens, seed=seed, **text_knobs)
    signals = []  # those that asked this process to stop
    steps_done = 0  # of the run, once `step` is best.pt's in the final report

    def leave():
        by = signals[0] if signals else signal.SIGTERM  # where another rank alone got the signal
        print(f'train.py: stopped by {signal.Signals(by).name} after step {max(step, steps_done)}, '
              'all is saved: go on with --init_from=resume', file=sys.stderr)
        end(128 + by)

    @torch.no_grad()
    def evaluate(rows, split):
        """Free-running greedy answers to rows, shared by the ranks: metrics, and the answers in
        order."""
        model.eval()
        cuts = math.ceil(len(rows) / eval_batch_size)
        groups = [g.tolist() for g in np.array_split(np.arange(len(rows)), cuts)[rank::world]]
        answers, losses, seconds = [], [], 0.0
        asked = Rows(rows, split, stage, supervised=False, **row_knobs)
        for group, found, took in ask(model, tokenizer, asked, groups, answer, autocast, loading,
                                      edit_thought=edit_thought, max_new_tokens=max_new_tokens):
            if signals and world == 1:
                leave()  # last.pt was written before the evaluation began
            answers += zip(group, found)
            seconds += took
        if all('answer' in row for row in rows):
            with_answers = Rows(rows, split, stage, **row_knobs)
            for group, batch in zip(groups, batches(with_answers, groups, **loading)):
                n = count_supervised(batch)
                with autocast:
                    loss = model(**batch, edit_thought=edit_thought).loss.item()
                losses.append((group[0], loss * n, n))
        if any(all_ranks(len(signals))):  # together: a rank that left alone would hang the others
            leave()
        answers = sorted(sum(all_ranks(answers), []), key=lambda pair: pair[0])
        losses = sorted(sum(all_ranks(losses), []))  # added up in one order, whatever the ranks
        metrics = summarize([found for _, found in answers], sum(all_ranks(seconds)))
        if losses:  # mean cross entropy over the supervised tokens
            metrics['loss'] = sum(loss for _, loss, _ in losses) / sum(n for _, _, n in losses)
        return metrics, [found for _, found in answers]

    def report():
        """Evaluates validation, and test where there is one; writes the answers and A-OKVQA's
        prediction files."""
        for split in splits:
            rows = fitting_rows(split, stage, **row_knobs)
            metrics, answers = evaluate(rows, split)
            print(f'{split}: {describe(metrics)}', flush=True)
            log('final', split=split, **metrics)
            write(f'answers_{split}.json', dict(data=digest(data_dir, split), answers=answers))
            if any(row.get('choices') for row in rows):
                # the official format cannot say that nothing was read: the first option stands
                write(f'predictions_{split}.json', {found['question_id']: {
                    'multiple_choice': found['option']} for found in answers})
                if metrics['unparsed']:
                    print(f'{split}: in predictions_{split}.json {metrics["unparsed"]} answers '
                          'that say no option stand as the first one')

    if eval_only and not dry_run:
        write('run.json', [*starts, provenance])
        # others' models are asked as in stage 0, for every step
        stage, epoch, step = (saved.get(key, 0) for key in ('stage', 'epoch', 'step'))
        trained = saved.get('knobs', {})
        for key in text_knobs:
            if trained.get(key, knobs[key]) != knobs[key]:
                print(f'{key} is {knobs[key]!r} here, the checkpoint was trained with '
                      f'{trained[key]!r}')
        report()
        end()

    # --- schedule ---------------------------------------------------------------------------------
    wanted = [(0, epochs_stage0)] + [(k, epochs_per_stage) for k in range(1, max_latent_stage + 1)]
    if epochs_last_stage:
        wanted.append((max_latent_stage + 1, epochs_last_stage))
    if mode in ('cot', 'no_cot'):  # no curriculum: one stage of the same length
        wanted = [(0, sum(count for _, count in wanted))]
    if not 0 <= start_stage <= wanted[-1][0]:
        raise ValueError(f'start_stage={start_stage}: expected 0 to {wanted[-1][0]}, the last '
                         f'stage of mode={mode}')
    stages, total_steps = [], 0
    for k, count in wanted:
        if k < start_stage or not count:
            continue
        rows = fitting_rows('train', k, uniform_prob=uniform_prob, **row_knobs)
        stages.append(Stage(stage=k, epochs=count, rows=rows, first_step=total_steps,
                            validation=fitting_rows('validation', k, **row_knobs),
                            steps=math.ceil(len(rows) / batch_size),
                            peak=learning_rate if k else learning_rate_stage0 or learning_rate))
        total_steps += stages[-1].steps * count
    if not stages:
        raise ValueError('the schedule has no epoch: set epochs_stage0 or epochs_per_stage')
    if 'test' in splits:
        # called for its checks: a split without a row that fits is refused now, not in the end
        fitting_rows('test', stages[-1].stage, **row_knobs)
    stage_of_epoch = [one for one in stages for _ in range(one.epochs)]
    stage = stages[0].stage
    last_step = min(total_steps, max_steps or total_steps)

    def learning_rate_at(step, current):
        """Linear warm-up, then a cosine to min_lr_ratio of the peak, over a stage or the run."""
        done, total = step, total_steps
        if reset_optimizer:
            done, total = step - current.first_step, current.steps * current.epochs
        if done < warmup_steps:
            return current.peak * (done + 1) / warmup_steps
        progress = (done - warmup_steps) / max(1, total - warmup_steps)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return current.peak * (min_lr_ratio + (1 - min_lr_ratio) * cosine)

    def new_optimizer():
        """AdamW; weight decay on all but biases, norms and scales."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [dict(params=[p for p in trained if p.dim() >= 2]),
                  dict(params=[p for p in trained if p.dim() < 2], weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=adam_eps,
                                 weight_decay=weight_decay, fused=device != 'mps')

    optimizer = new_optimizer()
    sample_rows = Rows(stages[0].rows[:64], 'train', stage, **row_knobs)  # enough for an estimate
    scale = batch_size / len(sample_rows)
    tokens = sum(sample_rows.length(i) for i in range(len(sample_rows))) * scale
    images = sum(bool(row.get('image')) for row in sample_rows.rows) * scale
    print(f'{batch_size} rows a step: {world} rank(s), {batch_size // world // micro} '
          f'micro-batch(es) of {micro}; about {tokens:.0f} tokens and {images:.0f} '
          f'images\n{len(stage_of_epoch)} epochs, {total_steps} steps; {dtype} on '
          f'{provenance["device"]}', flush=True)
    if dry_run:
        for current in stages:
            steps = range(current.first_step, current.first_step + current.steps * current.epochs)
            rates = [learning_rate_at(s, current) for s in steps]
            preview(current, row_knobs, text_knobs, rates, uniform_prob)
        end()

    # --- resume, or a fresh folder ----------------------------------------------------------------
    data, lines = digest(data_dir, 'train', 'validation'), b''
    if init_from == 'resume':
        changed = [f'{k}={knobs[k]!r} (was {v!r})' for k, v in saved['knobs'].items()
                   if k not in CHANGEABLE and knobs.get(k, v) != v]
        if saved['data'] != data:
            changed.append(f'data_dir={data_dir!r} (its rows are not those the run began with)')
        if changed:
            raise ValueError(f'the run in {out_dir} began with other knobs: {", ".join(changed)}; '
                             'set them back, or choose another --out_dir')
        epoch, place, step, stage = (saved[k] for k in ('epoch', 'place', 'step', 'stage'))
        accuracy, best, sums = saved['accuracy'], saved['best'], Counter(saved['sums'])
        seconds_before, wandb_id = saved['elapsed'], saved['wandb_id']
        optimizer.load_state_dict(saved['optimizer'])
        random.setstate(saved['random'][0])
        np.random.set_state(saved['random'][1])
        torch.set_rng_state(saved['random'][2])
        knobs['init_from'] = saved['knobs']['init_from']  # where the run came from, not 'resume'
        with open(os.path.join(out_dir, 'metrics.jsonl'), 'rb') as f:
            lines = f.read()[:saved['log_size']]  # what came after will be logged again
        print(f'resumed in stage {stage} after {epoch} epochs, {step} steps')
    saved = None  # frees its copy of weights and optimizer
    all_ranks('loaded')  # init_from may be one of the files that are removed here
    if not rank:
        written = [*CHECKPOINTS, *REPORTS]
        patterns = [f'{name}.*.part' for name in written]  # what a killed process was writing
        if init_from != 'resume':  # with overwrite: the earlier run
            patterns += written
        for path in files_of_runs(out_dir, *patterns):
            os.remove(path)
    write('metrics.jsonl', lines)
    write('run.json', [*starts, provenance])
    if wandb and not rank:
        wandb_run = importlib.import_module('wandb').init(  # by name, as the knob has the name too
            project=wandb_project, id=wandb_id, resume='allow',
            name=wandb_run_name or os.path.basename(os.path.abspath(out_dir)),
            dir=out_dir, config=knobs)

    def save(name, resumable=False):
        """Weights and what an evaluation needs and, for a resume, the optimizer and all state."""
        if rank:
            return
        content = dict(model=model.state_dict(), config=asdict(config), knobs=knobs,
                       tokenizer=tokenizer.backend_tokenizer.to_str(), provenance=provenance,
                       chat_template=tokenizer.chat_template,
                       stage=stage, epoch=epoch, step=step, accuracy=accuracy)
        # the workers have no random state: a row's draw depends on seed, epoch and row
        if resumable:
            kind, keys, *rest = np.random.get_state()  # keys: as a list, no array is read back
            content.update(
                optimizer=optimizer.state_dict(), place=place, best=best, sums=dict(sums),
                data=data, elapsed=elapsed(), wandb_id=wandb_id,
                log_size=os.path.getsize(os.path.join(out_dir, 'metrics.jsonl')),
                random=[random.getstate(), (kind, keys.tolist(), *rest), torch.get_rng_state()])
        with replacing(os.path.join(out_dir, name)) as part, open(part, 'wb') as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())

    def stop(signum, frame):
        """SIGTERM, Ctrl-C: the loop saves after the step in hand and ends; again: ends at once."""
        signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    # without an image in a batch the vision tower has no gradient
    images_everywhere = all(row.get('image') for one in stages for row in one.rows)
    find_unused = config.vision_num_layers > 0 and not images_everywhere
    network = model
    if world > 1:
        network = DistributedDataParallel(model, find_unused_parameters=find_unused)
    if not step:
        save('last.pt', resumable=True)  # from here on the run can be killed at any moment

    # --- the loop ---------------------------------------------------------------------------------
    # place > 0: last.pt is from before an evaluation, or from inside an epoch that max_steps ended.
    # Where no batch is left then, the epoch is only evaluated
    while epoch < len(stage_of_epoch) and (step < last_step or place):
        current = stage_of_epoch[epoch]
        if current.stage != stage and reset_optimizer:
            optimizer = new_optimizer()
        stage = current.stage
        order = np.random.default_rng((seed, epoch)).permutation(len(current.rows)).tolist()
        groups = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        # a rank without rows takes a row of weight 0, so that DDP stays in step
        own = [group[rank::world] or group[:1] for group in groups]
        training = Rows(current.rows, 'train', stage, uniform_prob=uniform_prob, epoch=epoch,
                        teach=teach_thoughts > 0, **row_knobs)
        model.train()
        meter, since = Counter(), time.time()
        step_began = since
        for batch in batches(training, own[place:place + max(0, last_step - step)], **loading):
            meter['wait'] += time.time() - step_began
            has_rows = rank < len(groups[place])
            is_taught = batch.get('thought_labels', torch.empty(0)) >= 0
            counts = np.array([count_supervised(batch), int(batch['attention_mask'].sum()),
                               int((batch['num_tiles'] > 0).sum()),
                               int(is_taught.sum())]) * has_rows
            gathered = all_ranks((counts, len(signals)))
            total, tokens, images, taught = sum(count for count, _ in gathered).tolist()
            if any(count for _, count in gathered):
                save('last.pt', resumable=True)
                leave()
            lr = learning_rate_at(step, current)
            for group in optimizer.param_groups:
                group['lr'] = lr
            loss = correct = 0.0
            parts = micro_batches(batch, micro)
            for part in parts:
                # each supervised token counts the same
                weight = has_rows * count_supervised(part) / total
                # [B, n]: the result of the step that thought k stands for, or -100
                targets = part.pop('thought_labels', None)
                hold = network is not model and part is not parts[-1]
                with network.no_sync() if hold else nullcontext():
                    with autocast:
                        out = network(**part, edit_thought=edit_thought)
                    objective = out.loss * weight
                    if taught:  # the head reads the vector that is fed back as thought k
                        with autocast:
                            says = model.language_model.lm_head(out.thoughts)   # [B, n, V]
                        teaching = torch.nn.functional.cross_entropy(
                            says.float().flatten(0, 1),
                            targets[:, :says.shape[1]].flatten().to(device),
                            ignore_index=-100, reduction='sum')
                        objective = objective + teach_thoughts * has_rows * teaching / taught
                    (objective * world).backward()  # DDP takes the ranks' mean, this is their sum
                loss = loss + out.loss.detach() * weight
                correct = correct + model.num_correct * has_rows / total
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
            # here the host waits for the device
            loss, correct, norm = torch.stack((loss, correct, norm)).tolist()
            loss, correct = np.sum(all_ranks((loss, correct)), axis=0).tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                names = ', '.join(str(current.rows[i]['question_id']) for i in groups[place])
                raise ValueError(f'the loss is {loss} and the gradient norm {norm} in step '
                                 f'{step + 1} (stage {stage}, epoch {epoch + 1}), rows {names}: '
                                 f'{last_path} is from before; lower the learning rate, or look at '
                                 'these rows')
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, place = step + 1, place + 1
            meter.update(tokens=tokens, images=images)  # a Counter's update adds
            sums.update(steps=1, loss=loss, grad_norm=norm, tokens=tokens, images=images)
            if step % log_interval == 0 or step == last_step:
                seconds = time.time() - since
                embeddings = model.language_model.model.embed_tokens.weight.norm(dim=-1).mean()
                # size of a fed-back thought over that of an embedding, in the last micro-batch
                fed = out.thoughts.detach().norm(dim=-1)                        # [B, n]
                ratio = (fed[fed > 0].mean() / embeddings).item() if fed.any() else 0.0
                v = dict(loss=loss, token_accuracy=correct, lr=lr, grad_norm=norm,
                         memory_gb=peak_memory(device) / 1e9,
                         tokens_per_s=meter['tokens'] / seconds,
                         images_per_s=meter['images'] / seconds, wait=meter['wait'] / seconds,
                         thought_ratio=ratio)
                eta = int((last_step - step) * elapsed() / step)
                print(f'step {step:6d}/{last_step} | stage {stage} | loss {loss:7.4f} | '
                      f'acc {100 * correct:5.1f} % | lr {lr:.1e} | grad {norm:6.2f} | '
                      f'thought {ratio:4.2f} | {v["tokens_per_s"]:6.0f} tok/s | '
                      f'{v["images_per_s"]:6.1f} img/s | wait {100 * v["wait"]:3.0f} % | '
                      f'{v["memory_gb"]:5.2f} GB | ETA {eta // 60:3d}m{eta % 60:02d}s', flush=True)
                log('train', **v)
                meter, since = Counter(), time.time()
            sums['seconds'] += time.time() - step_began  # saves and evaluations do not count
            if save_every and step % save_every == 0 and place < len(groups):
                save('last.pt', resumable=True)  # at the epoch's end it is saved anyway
            step_began = time.time()
        save('last.pt', resumable=True)  # a kill in the evaluation costs only the evaluation
        metrics, answers = evaluate(current.validation, 'validation')
        whole, accuracy = place == len(groups), metrics['accuracy']
        if whole:
            epoch, place = epoch + 1, 0
        print(f'epoch {epoch + (not whole):3d} | stage {stage} | {describe(metrics)}', flush=True)
        for row, found in zip(current.validation[:2], answers):
            print(f'  asked {row["question"][-100:]!r}, written {found["text"][-160:]!r}, right is '
                  f'{row["answer"]!r}', flush=True)
        log('eval', **metrics)
        key = [stage, accuracy, -metrics['loss']]
        # only whole epochs compete; a part of one counts where there is no best.pt yet, for the
        # report (last.pt, saved above, does not know of it: the next whole epoch replaces it)
        if best is None or (whole and key >= best):
            best = key
            save('best.pt')
        if whole:
            n, seconds = sums['steps'], sums['seconds']
            write(f'metrics_epoch_{epoch}.json', dict(
                metrics, stage=stage, epoch=epoch, step=step,
                lr=learning_rate_at(step - 1, current),
                train_loss=sums['loss'] / n, grad_norm=sums['grad_norm'] / n,
                tokens_per_s=sums['tokens'] / seconds, images_per_s=sums['images'] / seconds))
            sums = Counter()
            save(f'epoch_{epoch}.pt')
            # epoch k is stage_of_epoch[k - 1]; it stays where the next is of another stage, and the
            # last of all (hence the min)
            for k in range(1, min(epoch - keep_epochs + 1, len(stage_of_epoch))):
                path = os.path.join(out_dir, f'epoch_{k}.pt')
                if stage_of_epoch[k - 1] is stage_of_epoch[k] and os.path.isfile(path) and not rank:
                    os.remove(path)
            save('last.pt', resumable=True)
        if not rank and (step >= last_step or stage_of_epoch[epoch].stage != stage):
            draw_curves(os.path.join(out_dir, 'curves.png'), os.path.join(out_dir, 'metrics.jsonl'))
        if step >= last_step:
            break  # place may still be > 0

    # --- what came out ----------------------------------------------------------------------------
    all_ranks('here')  # none goes on before best.pt is whole
    saved = read_checkpoint(os.path.join(out_dir, 'best.pt'))
    model.load_state_dict(saved['model'])
    steps_done = step
    stage, epoch, step = saved['stage'], saved['epoch'], saved['step']
    print(f'best.pt: stage {stage}, epoch {epoch}')
    report()
    print(f'{elapsed() / 60:.1f} minutes')
    end()
