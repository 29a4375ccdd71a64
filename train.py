"""
Trains MultiCoCo through its curriculum: stage 0 writes every step, stage k hides the first k behind thoughts.

    python train.py config/toy.py                            the built-in data set, minutes on a CPU
    python train.py config/toy.py --dry_run=True             what that will do: schedule, a row and a prompt a stage
    python train.py config/toy.py --init_from=resume         goes on where the run was stopped or killed
    python train.py config/aokvqa.py --max_latent_stage=4    InternVL3-1B on A-OKVQA
    torchrun --standalone --nproc_per_node=8 train.py config/aokvqa.py    the same on 8 GPUs

Leaves in out_dir: last.pt (to resume from), epoch_{k}.pt, best.pt (best validation accuracy within the furthest stage),
run.json (how it was started), metrics.jsonl, metrics_epoch_{k}.json, answers_{split}.json, predictions_{split}.json,
curves.png, and where there are thoughts thoughts_{split}.json and .png (see probe.py).
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
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: DDP imports it, and its default arguments would keep the group
from torch.nn.parallel import DistributedDataParallel

import probe
from configurator import configure
from evaluate import Evaluation, all_ranks, describe
from model import END_LATENT, IMG_CONTEXT, LATENT, START_LATENT
from model import Config, MultiCoCo, load_checkpoint, load_tokenizer, read_checkpoint
from prepare import ANSWER, PROMPT, Rows, batches, build_text, micro_batches, supervised
from prepare import check_round_trip, digest, fitting_rows, read_split, replacing, split_file
from sample import peak_memory, pick_device, pick_dtype

# --- knobs: data ------------------------------------------------------------------------------------------------------
data_dir = 'data/aokvqa'        # what prepare.py made
max_tiles = 8                   # as prepared, or the cache is not used
image_size = 448                # side of a tile in pixels, for init_from='scratch'
cache_tiles = True
max_length = 2560               # tokens; rows that need more are dropped and counted
num_workers = 1                 # processes that load data beside the training
# text
prompt = PROMPT
answer = ANSWER
template = 'plain'              # 'plain' or 'chatml', InternVL's chat turns
visual_bridge = False           # words that lead from the image to the steps
# curriculum
mode = 'coconut'                # also 'cot', 'no_cot', 'pause' (nothing fed back), 'no_thoughts' (curriculum without)
c_thought = 2                   # thoughts a hidden step
max_latent_stage = 4            # the last stage that hides one more step
epochs_stage0 = 8               # epochs with every step written
epochs_per_stage = 3
epochs_last_stage = 0           # epochs of an optional last stage that hides all remaining steps
start_stage = 0                 # begin here, from a checkpoint that has learnt the stages before
pad_latent_to_max = True        # the same number of thoughts in rows with fewer steps
uniform_prob = 0.0              # chance that a row is trained at a random earlier stage
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
micro_batch_size = 0            # rows a forward pass; 0 for all that a rank has
learning_rate = 5e-5            # peak, after stage 0
learning_rate_stage0 = 0.0      # peak in stage 0; 0 for the same
min_lr_ratio = 0.05             # where the cosine ends
warmup_steps = 50
beta1 = 0.9
beta2 = 0.95
adam_eps = 1e-8
weight_decay = 0.01
grad_clip = 1.0
# run
out_dir = 'out'
device = 'auto'                 # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'                  # 'auto', 'float32', 'bfloat16' (autocast, weights stay float32)
threads = 0                     # CPU threads; 0 for torch's choice
seed = 1337
max_steps = 0                   # optimizer steps in all; 0 for all
save_every = 500                # steps between writes of last.pt inside an epoch; 0 for none
overwrite = False               # let go of the run that out_dir holds
dry_run = False                 # print schedule, rows and prompts, and stop
eval_only = False               # evaluate init_from at its stage and stop
eval_batch_size = 32
max_new_tokens = 128
intervene = 'swap'              # what is done to the thoughts in the end, a list: see probe.py; '' for nothing
compare = ''                    # out_dirs of runs over the same questions, for paired tests with this one
log_interval = 50               # steps between log lines
wandb = False                   # log to Weights & Biases as well
# ----------------------------------------------------------------------------------------------------------------------
# a resumed run may change these; any other knob would make it another run
FREE = ('data_dir', 'out_dir', 'init_from', 'device', 'threads', 'num_workers', 'micro_batch_size',
        'activation_checkpointing', 'cache_tiles', 'max_steps', 'save_every', 'overwrite', 'dry_run', 'eval_only',
        'eval_batch_size', 'intervene', 'compare', 'log_interval', 'wandb')
STATE = ('epoch', 'place', 'step', 'stage', 'accuracy', 'best')  # what the loop counts, all of it saved
SIGNALS = []                                                     # those that asked this process to stop


class Stage(NamedTuple):  # a part of the schedule; `now` is one of these
    stage: int
    epochs: int
    rows: list        # training rows that fit max_length at this stage
    validation: list
    steps: int        # optimizer steps an epoch
    first: int        # steps of the run before this stage
    peak: float       # learning rate


# --- schedule ---------------------------------------------------------------------------------------------------------

def make_schedule():
    """The stages of the run, in order."""
    wanted = [(0, epochs_stage0)] + [(k, epochs_per_stage) for k in range(1, max_latent_stage + 1)]
    wanted += [(max_latent_stage + 1, epochs_last_stage)] if epochs_last_stage else []
    if mode in ('cot', 'no_cot'):  # no curriculum: one stage of the same length
        wanted = [(0, sum(epochs for _, epochs in wanted))]
    if not 0 <= start_stage <= wanted[-1][0]:
        raise ValueError(f'start_stage={start_stage}: expected 0 to {wanted[-1][0]}, the last stage of mode={mode}')
    stages, first = [], 0
    for stage, epochs in wanted:
        if stage >= start_stage and epochs:
            rows = fitting_rows('train', stage, uniform_prob=uniform_prob, **row_knobs)
            validation, steps = fitting_rows('validation', stage, **row_knobs), math.ceil(len(rows) / batch_size)
            peak = learning_rate if stage else learning_rate_stage0 or learning_rate
            stages.append(Stage(stage, epochs, rows, validation, steps, first, peak))
            first += steps * epochs
    if not stages:
        raise ValueError('the schedule has no epoch: set epochs_stage0 or epochs_per_stage')
    if os.path.isfile(split_file(data_dir, 'test')):
        fitting_rows('test', stages[-1].stage, **row_knobs)  # what cannot be asked in the end is said now
    return stages


def learning_rate_at(step, now):
    """Linear warm-up, then a cosine to min_lr_ratio of the peak, over a stage; over the run if nothing is reset."""
    done, total = (step - now.first, now.steps * now.epochs) if reset_optimizer else (step, total_steps)
    if done < warmup_steps:
        return now.peak * (done + 1) / warmup_steps
    cosine = (1 + math.cos(math.pi * (done - warmup_steps) / max(1, total - warmup_steps))) / 2
    return now.peak * (min_lr_ratio + (1 - min_lr_ratio) * cosine)


def preview(now):
    """One stage as it will be trained and asked."""
    texts = [build_text(row, now.stage, **text_knobs) for row in now.rows]
    span = lambda numbers: f'{min(numbers)}' if len(numbers) == 1 else f'{min(numbers)} to {max(numbers)}'
    thoughts, words = {n for _, n, _ in texts}, {target.count('\n') - answer.count('\n') for *_, target in texts}
    rates = [learning_rate_at(s, now) for s in range(now.first, now.first + now.steps * now.epochs)]
    mixed = f', each row with chance {uniform_prob:g} at an earlier stage' if uniform_prob and now.stage else ''
    row = Rows(now.rows, 'train', now.stage, **row_knobs)[0]
    asked = Rows(now.validation, 'validation', now.stage, supervised=False, **row_knobs)[0]['input_ids']
    repeated = re.compile(r'(<[^<>\s]+>)\1+')
    text = lambda ids: repeated.sub(lambda m: f'{m[1]}*{len(m[0]) // len(m[1])}', tokenizer.decode(ids))
    ids, start = row['input_ids'], row['labels'].count(-100)
    print(f'\nstage {now.stage}: {now.epochs} epochs of {now.steps} steps, {len(now.rows)} rows, {span(thoughts)} '
          f'thoughts, {span(words)} steps in words, learning rate '
          f'{rates[0]:.1e} to {max(rates):.1e} to {rates[-1]:.1e}{mixed}\n'
          f'--- training row {now.rows[0]["question_id"]}, {len(ids)} tokens; supervised is what stands in [[ ]]\n'
          f'{text(ids[:start])}[[{text(ids[start:])}]]\n'
          f'--- prompt of validation row {now.validation[0]["question_id"]}, {len(asked)} tokens\n{text(asked)}')


# --- optimization, and how a run ends ---------------------------------------------------------------------------------

def new_optimizer():
    """AdamW; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    return torch.optim.AdamW([dict(params=matrices), dict(params=others, weight_decay=0.0)], lr=learning_rate,
                             betas=(beta1, beta2), eps=adam_eps, weight_decay=weight_decay, fused=device != 'mps')


def stop(signum, frame):
    """SIGTERM and Ctrl-C: the loop saves after the step in hand and ends. The same again ends at once."""
    SIGNALS.append(signum)
    signal.signal(signum, signal.SIG_DFL)


def leave():
    by = SIGNALS[0] if SIGNALS else signal.SIGTERM  # none where another rank was asked
    print(f'train.py: stopped by {signal.Signals(by).name} after step {step}, all is saved: go on with '
          '--init_from=resume', file=sys.stderr)
    end(128 + by)


def end(code=0):
    """Ends the script, and first the group of ranks: its threads may not outlive the interpreter."""
    global network
    network = None  # the threads end with the last reference to the group
    if world > 1:
        dist.destroy_process_group()
    raise SystemExit(code)


# --- the run's folder: written by rank 0 alone ------------------------------------------------------------------------

def elapsed():
    """Seconds of this run, those before a resume included."""
    return before + time.time() - started


def log(event, **values):
    if rank:
        return
    with open(os.path.join(out_dir, 'metrics.jsonl'), 'a') as f:
        line = dict(event=event, step=step, stage=stage, epoch=epoch, time=round(elapsed(), 2), **values)
        f.write(json.dumps(line) + '\n')
    if wandb_run:
        numbers = {k: v for k, v in dict(values, stage=stage, step=step).items() if isinstance(v, (int, float))}
        wandb_run.log({f'{event}/{k}': v for k, v in numbers.items()})


def report_step(seconds):
    """A line for the console and one for metrics.jsonl; `seconds` is the time since the last."""
    usual = model.language_model.model.embed_tokens.weight.norm(dim=-1).mean()
    fed = out.thoughts.detach().norm(dim=-1)                                                  # [B, n]
    v = dict(loss=loss, token_accuracy=hits, lr=lr, grad_norm=norm, memory_gb=peak_memory(device) / 1e9,
             tokens_per_s=meter['tokens'] / seconds, images_per_s=meter['images'] / seconds,
             wait=meter['wait'] / seconds, thought_ratio=(fed[fed > 0].mean() / usual).item() if fed.any() else 0.0)
    eta = int((last_step - step) * elapsed() / step)
    print(f'step {step:6d}/{last_step} | stage {stage} | loss {loss:7.4f} | acc {100 * hits:5.1f} % | lr {lr:.1e} | '
          f'grad {norm:6.2f} | thought {v["thought_ratio"]:4.2f} | {v["tokens_per_s"]:6.0f} tok/s | '
          f'{v["images_per_s"]:6.1f} img/s | wait {100 * v["wait"]:3.0f} % | {v["memory_gb"]:5.2f} GB | '
          f'ETA {eta // 60:3d}m{eta % 60:02d}s', flush=True)
    log('train', **v)


def write(name, content, mode='w'):
    if not rank:
        with replacing(os.path.join(out_dir, name)) as part, open(part, mode) as f:
            f.write(content if mode == 'wb' else json.dumps(content, indent=1))


def save(name, resumable=True):
    """A checkpoint; with all that a resume needs, or only what an evaluation does."""
    if rank:
        return
    state = dict(model=model.state_dict(), config=asdict(config), tokenizer=tokenizer.backend_tokenizer.to_str(),
                 knobs=knobs, provenance=provenance, **{k: globals()[k] for k in STATE})
    if resumable:  # the workers have no random state: a row's draw depends on seed, epoch and row
        kind, keys, *rest = np.random.get_state()
        state.update(optimizer=optimizer.state_dict(), elapsed=elapsed(), data=data,
                     log_size=os.path.getsize(os.path.join(out_dir, 'metrics.jsonl')),
                     random=[random.getstate(), (kind, keys.tolist(), *rest), torch.get_rng_state()])
    with replacing(os.path.join(out_dir, name)) as part, open(part, 'wb') as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())


def load_last():
    """Model and tokenizer of last.pt. Where that is not whole, the error names what is; nothing is chosen silently."""
    path = os.path.join(out_dir, 'last.pt')
    try:
        return load_checkpoint(path)
    except (ValueError, FileNotFoundError) as error:
        for other in sorted(glob.glob(os.path.join(out_dir, 'epoch_*.pt')), key=os.path.getmtime, reverse=True):
            with suppress(ValueError):
                reached = read_checkpoint(other)['step']
                raise OSError(f'{error}; the newest whole one is {other}, after step {reached}: copy it to {path} and '
                              'resume') from None
        raise


def refuse_changes(saved):
    """Raises ValueError where going on from `saved` would not be the run that it began as."""
    if 'optimizer' not in saved:
        raise ValueError(f'{out_dir}/last.pt holds no optimizer state: put a last.pt or an epoch_k.pt in its place')
    changed = [f'{k}={knobs[k]!r} (was {v!r})' for k, v in saved['knobs'].items()
               if k not in FREE and knobs.get(k, v) != v]
    changed += [f'data_dir={data_dir!r} (its rows are not those the run began with)'] if saved['data'] != data else []
    if changed:
        raise ValueError(f'the run in {out_dir} began with other knobs: {", ".join(changed)}; set them back, or choose '
                         'another --out_dir')


def start_of_run():
    """How this process was started, and on what."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = lambda *args: subprocess.run(['git', '-C', here, *args], capture_output=True, text=True).stdout.strip()
    changed = shutil.which('git') and git('status', '--porcelain', '-uno')
    commit = git('rev-parse', 'HEAD') + (' with changes' if changed else '') if shutil.which('git') else ''
    packages = ('torch', 'transformers', 'tokenizers', 'timm', 'numpy')
    return dict(command=shlex.join(sys.argv), time=time.strftime('%Y-%m-%d %H:%M:%S'), commit=commit, knobs=knobs,
                host=platform.node(), ranks=world, threads=torch.get_num_threads(),
                device=torch.cuda.get_device_name() if device == 'cuda' else platform.machine(),
                versions={'python': platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}})


if __name__ == '__main__':
    # --- setup --------------------------------------------------------------------------------------------------------
    torchrun = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1)  # what it sets
    rank, local_rank, world = (int(os.environ.get(key, alone)) for key, alone in torchrun.items())
    if rank:
        sys.stdout = open(os.devnull, 'w')
    knobs = configure(globals())
    globals().update(knobs)
    for key, value in knobs.items():
        least = int(key in ('batch_size', 'eval_batch_size', 'log_interval', 'max_new_tokens', 'max_tiles'))
        if isinstance(value, (int, float)) and value < least:
            raise ValueError(f'{key}={value}: expected {least} or more')
    torch.set_num_threads(threads or torch.get_num_threads())
    device = pick_device(device)
    if device == 'cuda':
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f'rank {local_rank} has no GPU, this machine has {torch.cuda.device_count()}: '
                             'lower --nproc_per_node')
        torch.cuda.set_device(local_rank)
    dtype = knobs['dtype'] = pick_dtype(dtype, device)
    autocast = torch.autocast(device, torch.bfloat16) if dtype == 'bfloat16' else nullcontext()
    loading = dict(num_workers=num_workers, pin_memory=device == 'cuda')
    micro = micro_batch_size or batch_size // world
    if micro < 1 or batch_size % (micro * world):
        raise ValueError(f'batch_size={batch_size} is not a multiple of {micro * world}: {world} rank(s) with '
                         f'micro-batches of {micro}; change one of them')
    text_knobs = dict(mode=mode, c_thought=c_thought, max_latent_stage=max_latent_stage, prompt=prompt, answer=answer,
                      pad_latent_to_max=pad_latent_to_max, template=template, visual_bridge=visual_bridge)
    build_text(read_split(data_dir, 'validation')[0], 0, **text_knobs)  # what it refuses, before a model is loaded
    for split in ('train', 'validation', 'test'):
        if os.path.isfile(split_file(data_dir, split)):
            check_round_trip(read_split(data_dir, split), answer)
    probe.expand(intervene)
    for folder in filter(None, compare.split(',')):
        if not glob.glob(os.path.join(folder, 'answers_*.json')):
            raise ValueError(f'compare={folder}: no answers_*.json there; give the out_dir of a run that has ended')
    held = glob.glob(os.path.join(out_dir, '*.pt'))
    if held and init_from != 'resume' and not (overwrite or dry_run):
        raise ValueError(f'{out_dir} holds another run ({os.path.basename(held[0])}): go on with it by '
                         '--init_from=resume, choose another --out_dir, or let go of it by --overwrite=True')
    if wandb and not importlib.util.find_spec('wandb'):
        raise ValueError('wandb=True, but wandb is not installed: pip install wandb, or leave it out')
    if world > 1:
        dist.init_process_group('cpu:gloo,cuda:nccl' if device == 'cuda' else 'gloo')
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(seed)

    # --- model --------------------------------------------------------------------------------------------------------
    if init_from == 'scratch':
        tokenizer = load_tokenizer(os.path.join(data_dir, 'tokenizer'))
        config = Config(vocab_size=len(tokenizer), image_token_id=tokenizer.convert_tokens_to_ids(IMG_CONTEXT),
                        latent_token_id=tokenizer.convert_tokens_to_ids(LATENT), pad_token_id=tokenizer.pad_token_id,
                        eos_token_ids=(tokenizer.eos_token_id,),
                        **{f.name: knobs[f.name] for f in fields(Config) if f.name in knobs})
        model, saved = MultiCoCo(config), {}
        markers = tokenizer.convert_tokens_to_ids([START_LATENT, END_LATENT])
        with torch.no_grad():  # they start as the line's end, which the model will know when thoughts come in
            table = model.language_model.model.embed_tokens.weight
            table[markers] = table[tokenizer.encode('\n', add_special_tokens=False)[-1]].clone()
    else:
        model, tokenizer, saved = load_last() if init_from == 'resume' else load_checkpoint(init_from)
        config = model.config
    model.to(device).set_activation_checkpointing(activation_checkpointing)
    model.vision_model.requires_grad_(not freeze_vision)
    edit = model.as_pause if mode == 'pause' else None
    for name, part in dict(vision=model.vision_model, projector=model.mlp1, language=model.language_model).items():
        frozen = '' if any(p.requires_grad for p in part.parameters()) else ', frozen'
        print(f'{name:>10}: {sum(p.numel() for p in part.parameters()) / 1e6:8.3f}M parameters{frozen}')

    # --- state: all that a resume needs, besides the model ------------------------------------------------------------
    epoch = place = step = 0     # whole epochs done, batches of the next one, optimizer steps
    accuracy, best = 0.0, None   # latest validation accuracy; [stage, accuracy, -loss] of best.pt
    before, started, optimizer = 0.0, time.time(), new_optimizer()
    meter, provenance, lines, wandb_run = Counter(), start_of_run(), b'', None
    runs = os.path.join(out_dir, 'run.json')
    starts = json.load(open(runs)) if (eval_only or init_from == 'resume') and os.path.isfile(runs) else []

    # --- data and schedule --------------------------------------------------------------------------------------------
    row_knobs = dict(tokenizer=tokenizer, data_dir=data_dir, image_size=config.image_size, max_tiles=max_tiles,
                     cache_tiles=cache_tiles, max_length=max_length, num_image_tokens=config.num_image_tokens,
                     seed=seed, **text_knobs)
    evaluation = Evaluation(model, tokenizer, row_knobs, edit, eval_batch_size, max_new_tokens, autocast, loading,
                            check=lambda: SIGNALS and leave(),  # last.pt was written before the evaluation began
                            out_dir=out_dir, log=log, write=write, intervene=intervene, compare=compare)
    if eval_only:
        write('run.json', [*starts, provenance])
        stage = saved.get('stage', 0)  # a checkpoint that is not ours writes its steps
        for key, value in text_knobs.items():
            if saved.get('knobs', {}).get(key, value) != value:
                print(f'{key} is {value!r} here, the checkpoint was trained with {saved["knobs"][key]!r}')
        evaluation.report(stage)
        end()
    stages = make_schedule()
    stage, epochs = stages[0].stage, [s for s in stages for _ in range(s.epochs)]
    total_steps = sum(s.steps for s in epochs)
    last_step = min(total_steps, max_steps or total_steps)
    some = Rows(stages[0].rows[:64], 'train', stage, **row_knobs)
    print(f'{batch_size} rows a step: {world} rank(s), {batch_size // world // micro} micro-batch(es) of {micro}; '
          f'about {sum(map(some.length, range(len(some)))) / len(some) * batch_size:.0f} tokens and '
          f'{sum("image" in row for row in some.rows) / len(some) * batch_size:.0f} images\n'
          f'{len(epochs)} epochs, {total_steps} steps; {dtype} on {provenance["device"]}', flush=True)
    if dry_run:
        for now in stages:
            preview(now)
        end()
    data = digest(data_dir, 'train', 'validation')
    if init_from == 'resume':
        refuse_changes(saved)
        globals().update({k: saved[k] for k in STATE}, before=saved['elapsed'])
        optimizer.load_state_dict(saved['optimizer'])
        for restore, state in zip((random.setstate, np.random.set_state, torch.set_rng_state), saved['random']):
            restore(state)
        knobs['init_from'] = saved['knobs']['init_from']
        with open(os.path.join(out_dir, 'metrics.jsonl'), 'rb') as f:
            lines = f.read()[:saved['log_size']]  # what came after will be logged again
        print(f'resumed in stage {stage} after {epoch} epochs, {step} steps')
    saved = None
    earlier = ['*.pt', 'metrics_epoch_*', 'predictions_*', 'answers_*', 'thoughts_*', 'curves.png']
    for kind in ['*.part'] + (earlier if init_from != 'resume' else []):
        for path in glob.glob(os.path.join(out_dir, kind)) if not rank else ():
            os.remove(path)  # what a killed process was writing; with overwrite, the earlier run
    write('metrics.jsonl', lines, 'wb')
    write('run.json', [*starts, provenance])
    if wandb and not rank:
        wandb_run = importlib.import_module('wandb').init(project='multicoco', dir=out_dir, config=knobs,
                                                          group=out_dir.replace('/', '-'))
    text_only = not all(row.get('image') for now in stages for row in now.rows)  # then the vision tower has no gradient
    network = model if world == 1 else DistributedDataParallel(model, find_unused_parameters=text_only)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    if not step:
        save('last.pt')  # from here on the run can be killed at any moment

    # --- the loop -----------------------------------------------------------------------------------------------------
    while epoch < len(epochs) and (step < last_step or place):  # place: one was trained in, but not evaluated yet
        now = epochs[epoch]
        if now.stage != stage:
            stage = now.stage
            if reset_optimizer:
                optimizer = new_optimizer()
        order = np.random.default_rng((seed, epoch)).permutation(len(now.rows)).tolist()
        groups = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        mine = [group[rank::world] or group[:1] for group in groups]  # a rank without a row takes one that counts 0
        training = Rows(now.rows, 'train', stage, uniform_prob=uniform_prob, epoch=epoch, **row_knobs)
        model.train()
        meter.clear()
        since = waiting = time.time()
        for batch in batches(training, mine[place:place + max(0, last_step - step)], **loading):
            meter['wait'] += time.time() - waiting
            parts, busy = micro_batches(batch, micro), rank < len(groups[place])
            counts = supervised(batch), int(batch['attention_mask'].sum()), int((batch['num_tiles'] > 0).sum())
            shared = all_ranks((*(busy * n for n in counts), len(SIGNALS)))
            total, tokens, images, signals = map(sum, zip(*shared))
            if signals:
                save('last.pt')
                leave()
            lr = learning_rate_at(step, now)
            for group in optimizer.param_groups:
                group['lr'] = lr
            loss = hits = 0.0
            for part in parts:
                share = busy * supervised(part) / total  # each supervised token of the global batch counts the same
                with nullcontext() if network is model or part is parts[-1] else network.no_sync():
                    with autocast:
                        out = network(**part, edit_thought=edit)
                    (out.loss * share * world).backward()  # the wrapper takes the mean over the ranks
                loss, hits = loss + out.loss.detach() * share, hits + model.num_correct * busy / total
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
            loss, hits, norm = torch.stack((loss, hits, norm)).tolist()  # the only wait for the device
            loss, hits = map(sum, zip(*all_ranks([loss, hits])))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                names = ', '.join(str(now.rows[i]['question_id']) for i in groups[place])
                raise ValueError(f'the loss is {loss} and the gradient norm {norm} in step {step + 1} (stage {stage}, '
                                 f'epoch {epoch + 1}), rows {names}: {out_dir}/last.pt is from before; lower the '
                                 'learning rate, or look at these rows')
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, place = step + 1, place + 1
            meter.update(tokens=tokens, images=images)
            if step % log_interval == 0 or step == last_step:
                report_step(time.time() - since)
                meter.clear()
                since = time.time()
            if save_every and step % save_every == 0 and place < len(groups):  # at the epoch's end it is saved anyway
                save('last.pt')
            waiting = time.time()
        save('last.pt')  # before the evaluation, so that a kill there costs nothing but it
        metrics, _ = evaluation.ask(now.validation, 'validation', stage, with_loss=True)
        whole, accuracy = place == len(groups), metrics['accuracy']
        if whole:
            epoch, place = epoch + 1, 0
        print(f'epoch {epoch:3d} | stage {stage} | {describe(metrics)}', flush=True)
        log('eval', **metrics)
        write(f'metrics_epoch_{epoch}.json', dict(metrics, stage=stage, epoch=epoch, step=step))
        key = [stage, accuracy, -metrics['loss']]
        if best is None or key >= best:
            best = key
            save('best.pt', resumable=False)
        if whole:  # else max_steps ended the run inside an epoch: resumed from last.pt, it is as if that had not been
            save(f'epoch_{epoch}.pt')
            save('last.pt')
        if not rank and (step >= last_step or epochs[epoch].stage != stage):
            probe.draw_curves(os.path.join(out_dir, 'curves.png'), os.path.join(out_dir, 'metrics.jsonl'))
        if step >= last_step:
            break

    # --- what came out ------------------------------------------------------------------------------------------------
    all_ranks(None)  # here none is before best.pt is whole
    saved = read_checkpoint(os.path.join(out_dir, 'best.pt'))
    model.load_state_dict(saved['model'])
    stage, epoch, step = saved['stage'], saved['epoch'], saved['step']
    print(f'best.pt: stage {stage}, epoch {epoch}')
    evaluation.report(stage)
    print(f'{elapsed() / 60:.1f} minutes')
    end()
