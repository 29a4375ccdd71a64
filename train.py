"""
Trains MultiCoCo through its curriculum: stage 0 writes every step of the reasoning, stage k hides
the first k behind thoughts.

    python train.py config/toy.py                      the built-in data set, minutes on a CPU
    python train.py config/toy.py --max_steps=0        prints the schedule and a row of each stage
    python train.py config/toy.py --init_from=resume   goes on where it was stopped or killed
    torchrun --standalone --nproc_per_node=8 train.py config/aokvqa.py

Leaves in out_dir: last.pt (to resume from), best.pt (best validation accuracy within the furthest
stage), epoch_{k}.pt (the end of each stage), and the files of `files` below.

To change X, edit here: what a stage hides, prepare.py's `build_text`; what is fed back, model.py's
`feed`; a further loss, model.py's `forward`, its data by prepare.py's `encode` and `collate`.
"""
import atexit
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist

from configurator import FIELDS, configure
from experiments.curves import open_folder, provenance, report_epoch, start_wandb
from experiments.toy import new_model
from model import load_checkpoint, load_tokenizer
from prepare import ANSWER, PROMPT, Rows, batches, count_supervised, digest, end_workers
from prepare import fitting_rows, micro_batches, read_split, row_knobs_of, write_file
from sample import ask, check_round_trip, describe, pick_device, pick_dtype, summarize

# --- knobs: data and text -------------------------------------------------------------------------
data_dir = 'data/aokvqa'        # what prepare.py made
max_tiles = 8                   # an image; if not prepare.py's number, tiles are cut again
cache_tiles = True
max_length = 2560               # tokens; rows that need more are dropped and counted
num_workers = 1                 # processes that load data beside the training (on Linux)
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
reset_optimizer = True          # a fresh optimizer, warm-up and cosine in every stage
# model
init_from = 'OpenGVLab/InternVL3-1B-Pretrained'  # hub id, folder, .pt, 'scratch' or 'resume'
freeze_vision = False
activation_checkpointing = False
compile = False                 # the decoder's blocks, by torch.compile
# and every field of model.py's Config: hidden_size, ... for init_from='scratch'; thought for all
# optimization
batch_size = 32                 # rows an optimizer step, over all micro-batches and ranks
micro_batch_size = 0            # rows a forward pass, at most; 0 for all that a rank has
learning_rate = 5e-5            # peak, after stage 0
learning_rate_stage0 = 0.0      # peak in stage 0; 0 for the same
min_lr_ratio = 0.05             # where the cosine ends
warmup_steps = 50               # but at most a fifth of a stage
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
max_steps = -1                  # end after so many optimizer steps; -1 for the whole schedule
save_every = 500                # steps between writes of last.pt inside an epoch; 0 for none
overwrite = False               # replace the run that out_dir holds
eval_only = False               # evaluate init_from at its stage and stop
eval_batch_size = 32
max_new_tokens = 128            # of an answer in an evaluation
log_interval = 50               # steps between printed lines; metrics.jsonl has each step
wandb = False                   # log to Weights & Biases as well
wandb_project = 'multicoco'
wandb_run_name = ''             # '' for the last part of out_dir

# --- setup ----------------------------------------------------------------------------------------
RANK, WORLD = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))  # by torchrun
sys.stdout = open(os.devnull, 'w') if RANK else sys.stdout
knobs = configure(globals(), FIELDS)  # the names above, as files and flags have them, and FIELDS
# a resumed run may change these; any other knob, or a field of Config newly set, is another run
CHANGEABLE = ('data_dir', 'out_dir', 'init_from', 'device', 'threads', 'num_workers', 'cache_tiles',
              'micro_batch_size', 'activation_checkpointing', 'compile', 'max_steps', 'save_every',
              'overwrite', 'eval_batch_size', 'log_interval', 'wandb', 'wandb_project',
              'wandb_run_name')
assert batch_size % WORLD == 0, f'batch_size={batch_size} is not a multiple of the {WORLD} ranks'
device = pick_device(device)
if device == 'cuda':
    torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
torch.set_num_threads(threads or torch.get_num_threads())
torch.manual_seed(seed)
loading = dict(num_workers=num_workers, pin_memory=device == 'cuda')
if WORLD > 1:
    dist.init_process_group('cpu:gloo,cuda:nccl' if device == 'cuda' else 'gloo')
    atexit.register(dist.destroy_process_group)
atexit.register(end_workers)  # which ignore signals: after an error Python would wait for them


def all_ranks(value):
    """What each rank gave, in a list. It goes from CPU to CPU: no GPU is waited for."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


# --- model ----------------------------------------------------------------------------------------
resuming = init_from == 'resume' and not eval_only
overrides = {key: knobs[key] for key in FIELDS if key in knobs}  # of the model's Config
if mode == 'pause':
    overrides['thought'] = 'pause'
if init_from == 'scratch':
    tokenizer, saved = load_tokenizer(f'{data_dir}/tokenizer'), {}
    model = new_model(tokenizer, **overrides)
else:
    path = f'{out_dir}/last.pt' if init_from == 'resume' else init_from
    model, tokenizer, saved = load_checkpoint(path, **overrides)
config, optimizer_state = model.config, saved.pop('optimizer', None)
knobs['thought'] = config.thought  # the checkpoint's, unless it was set
assert eval_only or (mode == 'pause') == (config.thought == 'pause'), (mode, config.thought)
dtype = saved['knobs']['dtype'] if resuming and dtype == 'auto' else dtype
dtype = knobs['dtype'] = pick_dtype(dtype, device)
autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16')
model.to(device).set_activation_checkpointing(activation_checkpointing)
if config.vision_num_layers:
    model.vision_model.requires_grad_(not freeze_vision)
for block in model.language_model.model.layers if compile else ():
    torch._dynamo.config.recompile_limit = 64  # passes differ in length, mask and gradients
    block.compile()
matrices, others = [], []  # the others have no decay: biases, norms, position embeddings, ...
for name, p in model.named_parameters():
    if p.requires_grad:
        is_matrix = p.dim() > 1 and not re.search('pos_embed|cls_token', name)
        (matrices if is_matrix else others).append(p)
optimizer = torch.optim.AdamW([dict(params=matrices), dict(params=others, weight_decay=0.0)],
                              lr=learning_rate, betas=(beta1, beta2), eps=adam_eps,
                              weight_decay=weight_decay, fused=True)
print(f'{sum(p.numel() for p in matrices + others):,} parameters are trained, {dtype} on {device}')

# --- data and schedule ----------------------------------------------------------------------------
row_knobs = row_knobs_of(knobs, tokenizer, config)
row_knobs['max_length'] = min(max_length, config.max_position_embeddings - max_new_tokens)
for key in ('mode', 'thought', 'c_thought', 'max_latent_stage', 'pad_latent_to_max', 'prompt',
            'answer', 'template', 'visual_bridge', 'max_tiles', 'dtype'):
    trained_with = saved.get('knobs', {}).get(key, knobs[key])
    if trained_with != knobs[key]:
        print(f'{key} is {knobs[key]!r}, the checkpoint was trained with {trained_with!r}')
splits = ['validation'] + ['test'] * os.path.exists(f'{data_dir}/test.jsonl')
for split in splits + ['train'] * (not eval_only):
    check_round_trip(read_split(data_dir, split), answer)
wanted = [(0, epochs_stage0)] + [(k, epochs_per_stage) for k in range(1, max_latent_stage + 1)]
wanted.append((max_latent_stage + 1, epochs_last_stage))
if mode in ('cot', 'no_cot'):  # no curriculum: one stage of the same length
    wanted = [(0, sum(epochs for _, epochs in wanted))]
schedule, total_steps = [], 0           # of each epoch (stage, its first step, where it ends)
train_rows, begins, ends = {}, {}, {}   # of each stage: rows that fit, first step, where it ends
for stage, epochs in wanted if not eval_only else ():
    if stage < start_stage or not epochs:
        continue
    rows = train_rows[stage] = fitting_rows('train', stage, uniform_prob=uniform_prob, **row_knobs)
    for split in splits:
        fitting_rows(split, stage, **row_knobs)  # stops here, not in the end, where none fits
    steps = math.ceil(len(rows) / batch_size)
    begins[stage], ends[stage] = total_steps, total_steps + epochs * steps
    schedule += [(stage, first, first + steps) for first in range(total_steps, ends[stage], steps)]
    total_steps = ends[stage]
    # the first row as the model sees it, <x><x><x> as <x>*3
    text = tokenizer.decode(Rows(rows, 'train', stage, **row_knobs)[0]['input_ids'])
    text = re.sub(r'(<[^<>\s]+>)\1+', lambda m: f'{m[1]}*{len(m[0]) // len(m[1])}', text)
    print(f'\nstage {stage}: {epochs} epochs of {steps} steps, {len(rows)} rows, first:\n{text}')
assert schedule or eval_only, f'there is no epoch in {wanted} from {start_stage=} on'
last_step = total_steps if max_steps < 0 else min(total_steps, max_steps)
if max_steps == 0 and schedule:
    sys.exit()


def get_lr(step, stage):
    """Linear warm-up, then a cosine: over each stage, or over the run without reset_optimizer."""
    peak = learning_rate_stage0 if stage == 0 and learning_rate_stage0 else learning_rate
    begin, end = (begins[stage], ends[stage]) if reset_optimizer else (0, total_steps)
    warmup = min(warmup_steps, (end - begin) // 5)
    if step - begin < warmup:
        return peak * (step - begin + 1) / warmup
    cosine = math.cos(math.pi * (step - begin - warmup) / max(1, end - begin - warmup))
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * ((1 + cosine) / 2))


# --- evaluation -----------------------------------------------------------------------------------
stopped_by = []               # signals: Ctrl-C, SIGTERM; a second one ends at once


def note_signal(signum, frame):
    stopped_by.append(signum)
    signal.signal(signum, signal.SIG_DFL)


def leave():
    print('stopped, all is saved: go on with --init_from=resume', flush=True)
    sys.exit(128 + (stopped_by or [signal.SIGTERM])[0])


@torch.no_grad()
def evaluate(split, stage):
    """Free-running greedy answers, the rows shared by the ranks: metrics, and answers in order."""
    model.eval()
    rows = fitting_rows(split, stage, **row_knobs)
    groups = np.array_split(range(len(rows)), math.ceil(len(rows) / eval_batch_size))[RANK::WORLD]
    asked = Rows(rows, split, stage, supervised=False, **row_knobs)
    found = []                # of each group (its row numbers, its answers, seconds)
    for part in ask(model, tokenizer, asked, groups, answer, autocast, loading,
                    max_new_tokens=max_new_tokens):
        found.append(part)
        if stopped_by and WORLD == 1:
            leave()           # last.pt was written after the last step
    found = sorted(sum(all_ranks(found), []), key=lambda part: part[0][0])  # by their first rows
    answers = [said for _, part, _ in found for said in part]
    metrics = summarize(answers, sum(seconds for _, _, seconds in found))
    if all('answer' in row for row in rows):  # else there is no loss
        losses = []
        for batch in batches(Rows(rows, split, stage, **row_knobs), groups, **loading):
            count = count_supervised(batch)
            with autocast:
                losses.append((model(**batch).loss.item() * count, count))
        loss, count = np.sum(sum(all_ranks(losses), []), axis=0).tolist()
        metrics['loss'] = loss / count
    if any(all_ranks(len(stopped_by))):
        leave()
    print(f'{split}, stage {stage}: {describe(metrics)}', flush=True)
    return metrics, answers


# --- resume, or a fresh folder --------------------------------------------------------------------
step, best = 0, None          # optimizer steps done; [stage, accuracy, -loss] of best.pt
data_digest = digest(data_dir, 'validation', *['train'] * (not eval_only))
if resuming:
    then = saved['knobs']
    changed = {key: (then.get(key), knobs.get(key)) for key in then.keys() | (knobs.keys() & FIELDS)
               if key not in CHANGEABLE and then.get(key) != knobs.get(key)}
    assert not changed, f'the run in {out_dir} began with other knobs, (then, now): {changed}'
    assert data_digest == saved['data'], f'the rows in {data_dir} are not those the run began with'
    step, best, knobs['init_from'] = saved['step'], saved['best'], then['init_from']
    optimizer.load_state_dict(optimizer_state)
    last_step = max(step, last_step)
if eval_only and os.path.exists(f'{out_dir}/last.pt'):
    out_dir = f'{out_dir}/eval'  # beside a run's own answers, not over them
files = ['run.json', 'metrics.jsonl', 'last.pt', 'best.pt', 'curves.png']  # overwrite removes them
files += [f'{kind}_{split}.json' for split in splits for kind in ('answers', 'predictions')]
for k in range(1, len(schedule) + 1):
    files += [f'epoch_{k}.pt', f'metrics_epoch_{k}.json']
if WORLD > 1:
    dist.barrier()            # all have read: init_from may be one of the files that are removed
record = dict(provenance(), knobs=knobs, ranks=WORLD, files=files)  # of this start
log_path = os.devnull if RANK else f'{out_dir}/metrics.jsonl'
if not RANK:
    record = open_folder(out_dir, record, overwrite, goes_on=resuming or eval_only)
    if resuming:
        os.truncate(log_path, saved['log_size'])  # what came after will be logged again
wandb_run = wandb and not RANK and start_wandb(wandb_project, wandb_run_name, record)


def save(name, **state):
    """Weights and all that asking them needs, and more. A kill leaves the file that was there."""
    if not RANK:
        torch.save(dict(model=model.state_dict(), config=asdict(config), knobs=knobs, run=record,
                        tokenizer=tokenizer.backend_tokenizer.to_str(),
                        chat_template=tokenizer.chat_template, **state), f'{out_dir}/{name}.part')
        os.replace(f'{out_dir}/{name}.part', f'{out_dir}/{name}')


def save_last(stage, epoch):
    """All that a resume needs. The epoch follows from the step, a row's place and draw from seed
    and epoch, and there is no dropout: no random state is needed."""
    save('last.pt', stage=stage, epoch=epoch, step=step, best=best, data=data_digest,
         optimizer=optimizer.state_dict(), log_size=os.path.getsize(log_path))


def log(event, step, **values):
    """A line of metrics.jsonl, and the same to wandb, whose steps may not go back."""
    with open(log_path, 'a') as f:
        f.write(json.dumps(dict(event=event, step=step, time=time.time(), **values)) + '\n')
    if wandb_run:
        wandb_run.log({f'{event}/{key}': value for key, value in values.items()},
                      step=max(step, wandb_run.step))


if not resuming and not eval_only:
    save_last(schedule[0][0], 0)  # from here on the run can be killed at any moment
for signum in (signal.SIGINT, signal.SIGTERM) if schedule else ():
    signal.signal(signum, note_signal)
network = model
if WORLD > 1:  # a batch without an image, say, leaves parameters without a gradient
    network = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)

# --- the loop -------------------------------------------------------------------------------------
for epoch, (stage, begin, end) in enumerate(schedule, 1):
    if step > end:
        continue  # done before the resume; at step == end the evaluation is left
    if step == begins[stage] and reset_optimizer:
        optimizer.state.clear()  # AdamW makes it anew
    rows = train_rows[stage]
    order = np.random.default_rng((seed, epoch - 1)).permutation(len(rows)).tolist()
    groups = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    own = [group[RANK::WORLD] or group[:1] for group in groups]  # if none, one of weight 0 for DDP
    training = Rows(rows, 'train', stage, uniform_prob=uniform_prob, epoch=epoch - 1, **row_knobs)
    model.train()
    began = time.time()
    for batch in batches(training, own[step - begin:last_step - begin], **loading):
        wait = time.time() - began
        group = groups[step - begin]
        has_rows = int(RANK < len(group))
        counts = np.array([count_supervised(batch), batch['attention_mask'].sum(),
                           (batch['num_tiles'] > 0).sum()])
        supervised, tokens, images = np.sum(all_ranks(has_rows * counts), axis=0).tolist()
        lr = get_lr(step, stage)
        for param_group in optimizer.param_groups:
            param_group['lr'] = lr
        loss = 0.0
        parts = micro_batches(batch, micro_batch_size or batch_size)
        for part in parts:
            network.require_backward_grad_sync = part is parts[-1]  # DDP's, once a step
            weight = has_rows * count_supervised(part) / supervised  # each token counts the same
            with autocast:
                out = network(**part)
            (out.loss * weight * WORLD).backward()  # DDP takes the ranks' mean, this is their sum
            loss += out.loss.detach() * weight
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        fed = out.thoughts.detach().norm(dim=-1)  # [B, n], of the last micro-batch
        thought_norm = fed.sum() / (fed > 0).sum().clamp(min=1)
        loss, norm, thought_norm = torch.stack((loss, norm, thought_norm)).tolist()
        loss, stopping = np.sum(all_ranks((loss, len(stopped_by))), axis=0).tolist()
        assert math.isfinite(loss) and math.isfinite(norm), (
            f'{loss=}, gradient {norm=} in step {step + 1}, {stage=}, rows '
            f'{[rows[i]["question_id"] for i in group]}; last.pt is from before')
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds = time.time() - began
        values = dict(stage=stage, epoch=epoch, loss=loss, lr=lr, grad_norm=norm,
                      thought_norm=thought_norm, tokens_per_s=tokens / seconds,
                      images_per_s=images / seconds, wait=wait / seconds)
        log('train', step, **values)
        if step % log_interval == 0 or step in (end, last_step):
            print(f'step {step}/{last_step}', *(f'{k} {v:.4g}' for k, v in values.items()),
                  sep=' | ', flush=True)
        if step in (end, last_step) or stopping or save_every and step % save_every == 0:
            save_last(stage, epoch)
        if stopping:
            leave()
        began = time.time()
    if step < end:
        break  # max_steps ended the epoch
    metrics, answers = evaluate('validation', stage)
    log('eval', step, stage=stage, epoch=epoch, **metrics)
    for found in answers[:2]:
        print(f'  {found["question_id"]}, right {found["right"]}: {found["text"][-200:]!r}')
    state = dict(stage=stage, epoch=epoch, step=step, accuracy=metrics['accuracy'],
                 examples=metrics['examples'])
    if best is None or [stage, metrics['accuracy'], -metrics['loss']] >= best:
        best = [stage, metrics['accuracy'], -metrics['loss']]
        save('best.pt', **state)
    if step == ends[stage]:
        save(f'epoch_{epoch}.pt', **state)
    if not RANK:
        report_epoch(out_dir, epoch)

# --- what came out: of best.pt, or with eval_only of init_from ------------------------------------
if not eval_only:
    if best is None:  # never evaluated: it stays None, so that a resumed run replaces this file
        save('best.pt', stage=stage, epoch=epoch, step=step)
    if WORLD > 1:
        dist.barrier()        # RANK 0 has written
    saved = torch.load(f'{out_dir}/best.pt', map_location='cpu', weights_only=True)
    model.load_state_dict(saved['model'])
stage, epoch, step = (saved.get(key, 0) for key in ('stage', 'epoch', 'step'))
for split in splits:
    metrics, answers = evaluate(split, stage)
    log('final', step, stage=stage, epoch=epoch, split=split, **metrics)
    content = {f'answers_{split}.json': dict(data=digest(data_dir, split), answers=answers)}
    if any('choice' in found for found in answers):  # A-OKVQA's format; the first where unread
        content[f'predictions_{split}.json'] = {
            found['question_id']: {'multiple_choice': found['option']} for found in answers}
    for name in content if not RANK else ():
        write_file(f'{out_dir}/{name}', json.dumps(content[name], indent=1).encode())
