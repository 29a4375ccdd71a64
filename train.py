"""
Trains MultiCoCo through its curriculum: stage 0 writes every step, stage k hides the first k behind thoughts.

    python train.py config/toy.py                            the built-in data set, minutes on a CPU
    python train.py config/aokvqa.py --max_latent_stage=4    InternVL3-1B on A-OKVQA
    python train.py config/toy.py --init_from=resume         goes on after the last whole epoch

Leaves in out_dir: best.pt (best validation accuracy within the furthest stage), epoch_{k}.pt, last.pt, metrics.jsonl,
metrics_epoch_{k}.json, predictions_{split}.json, curves.png.
"""
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, fields

import numpy as np
import torch
from torch.utils.data import DataLoader

from configurator import configure
from model import Config, END_LATENT, IMG_CONTEXT, LATENT, MultiCoCo, START_LATENT, load_checkpoint, load_tokenizer, pick_device, read_checkpoint
from prepare import ANSWER, PROMPT, Rows, collate, extract_choice, read_split, replacing

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
mode = 'coconut'                # 'coconut', 'cot', 'no_cot', 'pause' (nothing fed back), 'no_thoughts' (curriculum without)
c_thought = 2                   # thoughts a hidden step
max_latent_stage = 4            # the last stage that hides one more step
epochs_stage0 = 8               # epochs with every step written
epochs_per_stage = 3
epochs_last_stage = 0           # epochs of an optional last stage that hides all remaining steps
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
batch_size = 32                 # rows an optimizer step, over all micro-batches
micro_batch_size = 0            # rows a forward pass; 0 for batch_size
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
device = 'auto'                 # 'auto', 'cpu', 'cuda'
dtype = 'auto'                  # 'auto', 'float32', 'bfloat16' (autocast, weights stay float32)
threads = 0                     # CPU threads; 0 for torch's choice
seed = 1337
max_steps = 0                   # optimizer steps in all; 0 for all
eval_only = False               # evaluate init_from at the furthest stage and stop
eval_batch_size = 32
max_new_tokens = 128
log_interval = 50               # steps between log lines
# ----------------------------------------------------------------------------------------------------------------------


def batches(rows, groups):
    """Batches on the device; `groups` is a list of lists of row numbers."""
    loader = DataLoader(rows, batch_sampler=groups, collate_fn=collate, num_workers=num_workers, pin_memory=device == 'cuda')
    for batch in loader:
        yield {k: v if v is None else v.to(device, non_blocking=True) for k, v in batch.items()}


def in_groups(n, size):
    """range(n) in lists of nearly equal length, at most `size`."""
    return [group.tolist() for group in np.array_split(np.arange(n), math.ceil(n / size))]


def micro_batches(batch, rows):
    """A batch cut into parts of so many rows, each with its own tiles."""
    if len(batch['input_ids']) <= rows:
        return [batch]
    pixels = batch.pop('pixel_values')
    parts = [dict(zip(batch, values)) for values in zip(*(v.split(rows) for v in batch.values()))]
    tiles = [None] * len(parts) if pixels is None else pixels.split([int(part['num_tiles'].sum()) for part in parts])
    return [dict(part, pixel_values=t) for part, t in zip(parts, tiles)]


def learning_rate_at(done, total, peak):
    """Linear warm-up, then a cosine to min_lr_ratio of the peak; `done` of `total` steps."""
    if done < warmup_steps:
        return peak * (done + 1) / warmup_steps
    cosine = (1 + math.cos(math.pi * (done - warmup_steps) / max(1, total - warmup_steps))) / 2
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * cosine)


def new_optimizer():
    """AdamW; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if p.dim() >= 2]), dict(params=[p for p in trained if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=adam_eps, weight_decay=weight_decay, fused=True)


def interval(right, n, z=1.96):
    """Wilson's 95 % interval of a share."""
    centre, half = (right + z * z / 2) / (n + z * z), z * math.sqrt(right * (n - right) / n + z * z / 4) / (n + z * z)
    return [centre - half, centre + half]


@torch.no_grad()
def evaluate(rows, split, stage, swap=False):
    """
    Free-running greedy answers. Gives metrics, and text and chosen option of each row. With `swap`, each row is answered with the
    thoughts that the row before it in the batch has when left alone.
    """
    model.eval()
    groups, answers, right, unparsed, tokens, thoughts, began = in_groups(len(rows), eval_batch_size), [], 0, 0, 0, 0, time.time()
    for group, batch in zip(groups, batches(Rows(rows, split, stage, supervised=False, **row_knobs), groups)):
        clean, hook = {}, edit
        with autocast:
            if swap:
                model.generate(**batch, max_new_tokens=1, edit_thought=lambda k, t: clean.setdefault(k, t))
                hook = lambda k, t: clean[k].roll(1, 0) if k in clean else t
            new = model.generate(**batch, max_new_tokens=max_new_tokens, edit_thought=hook)
        tokens += int((new != config.pad_token_id).sum())
        thoughts += int((batch['input_ids'] == config.latent_token_id).sum())
        for i, text in zip(group, tokenizer.batch_decode(new, skip_special_tokens=True)):
            row, said = rows[i], dict(question_id=rows[i]['question_id'], text=text)
            if row.get('choices'):
                choice, parsed = extract_choice(text, row['choices'])
                right, unparsed = right + (choice == row.get('correct_choice_idx')), unparsed + (not parsed)
                said['choice'] = row['choices'][choice]
            else:
                right += text.strip().split('\n')[-1] == row['answer']
            answers.append(said)
    n = len(rows)
    metrics = dict(tokens_per_answer=tokens / n, thoughts_per_answer=thoughts / n, unparsed=unparsed, examples=n,
                   seconds_per_answer=(time.time() - began) / n)
    return (dict(metrics, accuracy=right / n, interval=interval(right, n)) if 'answer' in rows[0] else metrics), answers


@torch.no_grad()
def validation_loss(rows, split, stage):
    """Mean cross entropy over the supervised tokens."""
    model.eval()
    total = count = 0
    for batch in batches(Rows(rows, split, stage, **row_knobs), in_groups(len(rows), eval_batch_size)):
        with autocast:
            loss = model(**batch, edit_thought=edit).loss
        here = int((batch['labels'] != -100).sum())
        total, count = total + loss.item() * here, count + here
    return total / count


def log(event, **values):
    with open(os.path.join(out_dir, 'metrics.jsonl'), 'a') as f:
        f.write(json.dumps(dict(event=event, step=step, stage=stage, epoch=epoch, time=round(elapsed(), 2), **values)) + '\n')


def elapsed():
    """Seconds of this run, those before a resume included."""
    return before + time.time() - started


def save(name, resumable=True):
    """A checkpoint of plain types and tensors, under a temporary name, then renamed."""
    state = dict(model=model.state_dict(), config=asdict(config), tokenizer=tokenizer.backend_tokenizer.to_str(), knobs=knobs,
                 stage=stage, epoch=epoch, step=step, accuracy=accuracy)
    if resumable:
        state.update(optimizer=optimizer.state_dict(), stage_step=stage_step, place=place, best=best, elapsed=elapsed(),
                     rng=torch.get_rng_state())
    with replacing(os.path.join(out_dir, name)) as part:
        torch.save(state, part)


def describe(metrics):
    low, high = metrics.get('interval', (0, 0))
    accuracy = f'accuracy {100 * metrics["accuracy"]:5.1f} % ({100 * low:.1f} to {100 * high:.1f})' if high else 'no labels'
    return (f'{accuracy} of {metrics["examples"]}, {metrics["tokens_per_answer"]:.1f} tokens and {metrics["thoughts_per_answer"]:.1f} '
            f'thoughts and {metrics["seconds_per_answer"]:.3f} s an answer, {metrics["unparsed"]} unparsed')


def rows_for(split, stage):
    """The rows of a split that fit max_length at this stage; the others are counted."""
    rows = read_split(data_dir, split)
    encoded = Rows(rows, split, stage, **row_knobs)
    kept = [row for i, row in enumerate(rows) if encoded.fits(i)]
    if len(kept) < len(rows):
        print(f'stage {stage}: {len(rows) - len(kept)} of {len(rows)} {split} rows need more than max_length={max_length}: dropped')
    if not kept:
        raise ValueError(f'no {split} row fits max_length={max_length} at stage {stage}: raise it, or lower max_tiles')
    return kept


def report(stage):
    """Evaluates validation and test, writes A-OKVQA's prediction files; gives (split, rows, metrics) of the last with labels."""
    labelled = None
    for split in ('validation', 'test'):
        if not os.path.isfile(os.path.join(data_dir, f'{split}.jsonl')):
            continue
        rows = rows_for(split, stage)
        metrics, answers = evaluate(rows, split, stage)
        print(f'{split}: {describe(metrics)}', flush=True)
        log('final', split=split, **metrics)
        name = os.path.join(out_dir, f'predictions_{split}.json')
        with replacing(name) as part, open(part, 'w') as f:
            json.dump({a['question_id']: {'multiple_choice': a.get('choice', a['text'])} for a in answers}, f, indent=1)
        if 'accuracy' in metrics:
            labelled = split, rows, metrics
    return labelled


def plot():
    """curves.png: loss and accuracy over steps, stages marked."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    with open(os.path.join(out_dir, 'metrics.jsonl')) as f:
        events = [json.loads(line) for line in f]
    trained, evaluated = ([e for e in events if e['event'] == kind] for kind in ('train', 'eval'))
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 4.5), height_ratios=(2, 1))
    top.plot([e['step'] for e in evaluated], [100 * e['accuracy'] for e in evaluated], 'o-', ms=3, label='validation accuracy')
    top.set_ylabel('accuracy, %')
    top.set_ylim(0, 102)
    bottom.semilogy([e['step'] for e in trained], [e['loss'] for e in trained], lw=0.8, label='training')
    bottom.semilogy([e['step'] for e in evaluated], [e['loss'] for e in evaluated], 'o', ms=3, label='validation')
    bottom.set_ylabel('loss')
    bottom.set_xlabel('optimizer steps')
    bottom.legend(fontsize=7)
    ends = {e['stage']: e['step'] for e in evaluated}
    for s, end in ends.items():
        for axis in (top, bottom):
            axis.axvline(end, color='grey', lw=0.5)
        top.text(end, 4, f'stage {s} ', ha='right', fontsize=7)
    figure.tight_layout()
    with replacing(os.path.join(out_dir, 'curves.png')) as part:
        figure.savefig(part, dpi=120, format='png')
    plt.close(figure)


if __name__ == '__main__':
    # --- setup --------------------------------------------------------------------------------------------------------
    knobs = configure(globals())
    globals().update(knobs)
    if threads:
        torch.set_num_threads(threads)
    device = pick_device(device)
    dtype = ('bfloat16' if device == 'cuda' else 'float32') if dtype == 'auto' else dtype
    autocast = torch.autocast(device, torch.bfloat16) if dtype == 'bfloat16' else nullcontext()
    micro = micro_batch_size or batch_size
    if batch_size % micro:
        raise ValueError(f'batch_size={batch_size} is not a multiple of micro_batch_size={micro}: make it one')
    torch.manual_seed(seed)
    os.makedirs(out_dir, exist_ok=True)

    # --- model --------------------------------------------------------------------------------------------------------
    if init_from == 'scratch':
        tokenizer = load_tokenizer(os.path.join(data_dir, 'tokenizer'))
        config = Config(vocab_size=len(tokenizer), image_token_id=tokenizer.convert_tokens_to_ids(IMG_CONTEXT),
                        latent_token_id=tokenizer.convert_tokens_to_ids(LATENT), pad_token_id=tokenizer.pad_token_id,
                        eos_token_ids=(tokenizer.eos_token_id,),
                        **{f.name: knobs[f.name] for f in fields(Config) if f.name in knobs})
        model = MultiCoCo(config)
        markers = tokenizer.convert_tokens_to_ids([START_LATENT, END_LATENT])
        with torch.no_grad():  # they start as the line's end, which the model will know when thoughts come in
            table = model.language_model.model.embed_tokens.weight
            table[markers] = table[tokenizer.encode('\n', add_special_tokens=False)[-1]].clone()
    else:
        path = os.path.join(out_dir, 'last.pt') if init_from == 'resume' else init_from
        model, tokenizer = load_checkpoint(path)
        config = model.config
    model.to(device).set_activation_checkpointing(activation_checkpointing)
    model.vision_model.requires_grad_(not freeze_vision)
    edit = model.as_pause if mode == 'pause' else None
    parts = dict(vision=model.vision_model, projector=model.mlp1, language=model.language_model)
    print('parameters: ' + ', '.join(f'{name} {sum(p.numel() for p in part.parameters()) / 1e6:.3f}M' for name, part in parts.items())
          + (' (vision frozen)' if freeze_vision else '') + f'; {dtype} on {device}')

    # --- data and schedule --------------------------------------------------------------------------------------------
    row_knobs = dict(tokenizer=tokenizer, data_dir=data_dir, image_size=config.image_size, max_tiles=max_tiles, cache_tiles=cache_tiles,
                     max_length=max_length, num_image_tokens=config.num_image_tokens, seed=seed,
                     mode=mode, c_thought=c_thought, max_latent_stage=max_latent_stage, pad_latent_to_max=pad_latent_to_max,
                     prompt=prompt, answer=answer, template=template, visual_bridge=visual_bridge)
    schedule = [(0, epochs_stage0)] + [(k, epochs_per_stage) for k in range(1, max_latent_stage + 1)]
    schedule += [(max_latent_stage + 1, epochs_last_stage)] if epochs_last_stage else []
    if mode in ('cot', 'no_cot'):  # no curriculum: one stage of the same length
        schedule = [(0, sum(epochs for _, epochs in schedule))]
    total_epochs = sum(epochs for _, epochs in schedule)

    # --- state: all that a resume needs, besides the model ------------------------------------------------------------
    epoch = place = step = stage_step = stage = 0  # whole epochs done, batches of the next one, steps in all and in this stage
    accuracy, best = 0.0, None                   # latest validation accuracy; [stage, accuracy, -loss] of best.pt
    optimizer, before, started = new_optimizer(), 0.0, time.time()
    if init_from == 'resume':
        saved = model.checkpoint
        epoch, place, step, stage_step, stage = (saved[k] for k in ('epoch', 'place', 'step', 'stage_step', 'stage'))
        accuracy, best, before = saved['accuracy'], saved['best'], saved['elapsed']
        optimizer.load_state_dict(saved['optimizer'])
        torch.set_rng_state(saved['rng'])
        print(f'resumed in stage {stage} after {epoch} epochs, {step} steps')
    if eval_only:
        stage = model.checkpoint.get('stage', 0)  # a checkpoint that is not ours writes its steps
        report(stage)
        raise SystemExit(0)
    path = os.path.join(out_dir, 'metrics.jsonl')  # lines of a run that got further than its last checkpoint, or of another run, go
    kept = [line for line in open(path) if json.loads(line)['step'] <= step] if init_from == 'resume' else []
    with replacing(path) as part, open(part, 'w') as f:
        f.writelines(kept)

    # --- the loop -----------------------------------------------------------------------------------------------------
    stage_of_epoch = [k for k, epochs in schedule for _ in range(epochs)]
    rows = None
    while epoch < total_epochs and not 0 < max_steps <= step:
        if rows is None or stage_of_epoch[epoch] != stage:
            if stage_of_epoch[epoch] != stage:
                stage, stage_step = stage_of_epoch[epoch], 0
                if reset_optimizer:
                    optimizer = new_optimizer()
            rows, validation = rows_for('train', stage), rows_for('validation', stage)
            steps_per_epoch = math.ceil(len(rows) / batch_size)
            peak = learning_rate_stage0 if stage == 0 and learning_rate_stage0 else learning_rate
            stage_steps = steps_per_epoch * stage_of_epoch.count(stage)
        order = np.random.default_rng((seed, epoch)).permutation(len(rows)).tolist()
        groups = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
        training = Rows(rows, 'train', stage, uniform_prob=uniform_prob, epoch=epoch, **row_knobs)
        model.train()
        for batch in batches(training, groups[place:]):
            lr = (learning_rate_at(stage_step, stage_steps, peak) if reset_optimizer else
                  learning_rate_at(step, steps_per_epoch * total_epochs, peak))
            for group in optimizer.param_groups:
                group['lr'] = lr
            supervised, loss = int((batch['labels'][:, 1:] != -100).sum()), 0.0
            for part in micro_batches(batch, micro):
                share = int((part['labels'][:, 1:] != -100).sum()) / supervised  # so that every supervised token counts the same
                with autocast:
                    part_loss = model(**part, edit_thought=edit).loss * share
                part_loss.backward()
                loss += part_loss.detach()
            loss = loss.item()
            if not math.isfinite(loss):
                raise ValueError(f'the loss is {loss} at step {step} (stage {stage}, epoch {epoch}): the last checkpoint is kept, '
                                 'lower the learning rate')
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, stage_step, place = step + 1, stage_step + 1, place + 1
            if step % log_interval == 0 or step == max_steps:
                eta = ((total_epochs - epoch) * steps_per_epoch - place) * elapsed() / step
                print(f'step {step:6d} | stage {stage} | epoch {epoch + 1:3d}/{total_epochs} | loss {loss:7.4f} | lr {lr:.1e} | '
                      f'grad {norm:6.2f} | {1e3 * elapsed() / step:6.0f} ms/step | ETA {int(eta) // 60:3d}m{int(eta) % 60:02d}s', flush=True)
                log('train', loss=loss, lr=lr, grad_norm=norm)
            if step == max_steps:
                break
        if whole := place == len(groups):
            epoch, place = epoch + 1, 0
        metrics, answers = evaluate(validation, 'validation', stage)
        metrics['loss'] = validation_loss(validation, 'validation', stage)
        accuracy = metrics['accuracy']
        print(f'epoch {epoch:3d} | stage {stage} | {describe(metrics)}, loss {metrics["loss"]:.4f}', flush=True)
        log('eval', **metrics)
        with replacing(os.path.join(out_dir, f'metrics_epoch_{epoch}.json')) as part, open(part, 'w') as f:
            json.dump(dict(metrics, stage=stage, epoch=epoch, step=step), f, indent=1)
        key = [stage, accuracy, -metrics['loss']]
        if best is None or key >= best:
            best = key
            save('best.pt', resumable=False)
        if whole:
            save(f'epoch_{epoch}.pt')
        save('last.pt')
        if epoch == total_epochs or stage_of_epoch[epoch] != stage or step == max_steps:
            plot()

    # --- what came out ------------------------------------------------------------------------------------------------
    saved = read_checkpoint(os.path.join(out_dir, 'best.pt'))
    model.load_state_dict(saved['model'])
    stage, epoch, step = saved['stage'], saved['epoch'], saved['step']
    print(f'best.pt: stage {stage}, epoch {epoch}')
    split, rows, metrics = report(stage)
    if metrics['thoughts_per_answer'] and mode == 'coconut' and len(rows) > 1:
        swapped, _ = evaluate(rows, split, stage, swap=True)
        log('swapped', split=split, **swapped)
        print(f'{split} clean {100 * metrics["accuracy"]:.1f} %, with the thoughts of another image {100 * swapped["accuracy"]:.1f} %')
    print(f'{elapsed() / 60:.1f} minutes')
