"""
Speed, memory and FLOPs beside transformers, in one run, on the same random weights and batch.

    python -m experiments.bench                           small towers, real vocabulary and tiles
    python -m experiments.bench --compile=True            compiled blocks beside eager ones
    python -m experiments.bench --size=1b --device=cuda   InternVL3-1B's shapes on one GPU

Seconds are CPU seconds of all threads, or those of CUDA events; medians of interleaved repeats.
Memory is the peak above the weights.
"""
import math
import statistics
import time
from pathlib import Path

import torch
import torch._dynamo
from torch.utils.flop_counter import FlopCounterMode

from configurator import configure
from experiments.reference import floor_loss, models, plain_generate, published_loss
from model import Config, MultiCoCo
from prepare import collate
from sample import pick_device

# --- knobs ----------------------------------------------------------------------------------------
size = 'small'    # 'small' or '1b'
device = 'auto'   # 'auto', 'cpu' or 'cuda'
compile = False   # the training step with each block compiled
repeats = 3
seed = 1337

NO_END = dict(eos_token_ids=(-1,))  # every row writes all its tokens
CONFIGS = {
    '1b': Config(**NO_END),
    'small': Config(num_hidden_layers=2, vision_num_layers=2, vision_hidden_size=384,
                    vision_num_heads=6, vision_intermediate_size=1536, **NO_END)}
QUESTION, THOUGHTS, ANSWER = 40, 8, 24  # tokens of a row: its prompt's text, thoughts, supervised
ROWS, NEW = 16, 32                      # of a generation: rows, and tokens that each writes


def make_batch(c, B, thoughts, tiles=(1, 2), supervised=True, more=0):
    """forward's arguments: row b has tiles[b % len(tiles)] tiles, its own length, and thoughts
    behind the prompt; more: further tokens of text."""
    g, rows = torch.Generator().manual_seed(seed), []
    for b in range(B):
        P = tiles[b % len(tiles)]
        text = torch.randint(100, 40000, (QUESTION + ANSWER + b % 5 + more,), generator=g).tolist()
        prompt, written = text[:-ANSWER], text[-ANSWER:] if supervised else []
        ids = prompt[:10] + [c.image_token_id] * P * c.num_image_tokens + prompt[10:]
        ids += [c.latent_token_id] * thoughts
        pixels = torch.randint(0, 256, (P, 3, c.image_size, c.image_size), generator=g,
                               dtype=torch.uint8)
        rows.append(dict(input_ids=ids + written, pixel_values=pixels if P else None,
                         labels=[-100] * len(ids) + written if supervised else None))
    return {k: v.to(device) for k, v in collate(rows).items() if v is not None}


# --- measuring ------------------------------------------------------------------------------------
def attention_flops(query, key, *_, **__):
    """Of shapes [B, H, L, head_dim]; torch's own counter knows no grouped queries and no CPUs."""
    return 4 * math.prod(query) * key[2]


FORMULAS = {}
for kernel in ('flash_attention', 'flash_attention_for_cpu', 'efficient_attention',
               'cudnn_attention'):
    name = f'_scaled_dot_product_{kernel}'
    FORMULAS[getattr(torch.ops.aten, name)] = attention_flops
    FORMULAS[getattr(torch.ops.aten, f'{name}_backward')] = (
        lambda grad, query, key, *_, **__: 2 * attention_flops(query, key))


def seconds(work):
    """CPU seconds of all threads, or the GPU's."""
    if device == 'cpu':
        began = time.process_time()
        work()
        return time.process_time() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(works, rounds):
    """name -> median seconds, after one run to warm up; the works take turns, so that a busy
    machine is busy for all."""
    times = [{name: seconds(work) for name, work in works.items()} for _ in range(1 + rounds)]
    return {name: statistics.median(one[name] for one in times[1:]) for name in works}


def cost(work):
    """Peak memory above what was there, and FLOPs, of a work that ran before."""
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        peak = torch.cuda.max_memory_allocated()
    else:  # Linux
        Path('/proc/self/clear_refs').write_text('5')  # VmHWM, the peak, starts anew
        before = resident('VmRSS')
        work()
        peak = resident('VmHWM')
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        work()
    return dict(peak=peak - before, flops=counter.get_total_flops())


def resident(key):
    """Bytes of this process (Linux)."""
    status = Path('/proc/self/status').read_text()
    return 1024 * int(status.partition(f'{key}:')[2].split()[0])


def step_of(model, loss):
    """Forward and backward pass; the optimizer's part is the same for all."""
    def work():
        with autocast:
            out = loss()
        (out[0] if isinstance(out, tuple) else out).backward()
        model.zero_grad(set_to_none=True)

    return work


def table(title, works):
    """One line a work; the first one is what the others are held against."""
    took = interleaved(works, repeats)
    print(f'\n{title:42}  seconds  ratio    GFLOP  peak GB')
    for name, work in works.items():
        found, ratio = cost(work), took[name] / next(iter(took.values()))
        print(f'  {name:40}{took[name]:9.2f}{ratio:7.2f}{found["flops"] / 1e9:9.1f}'
              f'{found["peak"] / 1e9:9.2f}', flush=True)


# --- what is measured -----------------------------------------------------------------------------
def training():
    batch = make_batch(config, batch_size, THOUGHTS, tiles)
    works = {'floor': step_of(theirs, lambda: floor_loss(theirs, batch)),
             'ours': step_of(ours, lambda: ours(**batch).loss),
             'published loop': step_of(
                 theirs, lambda: published_loss(theirs, batch, config.latent_token_id))}
    table(f'training step, {batch_size} rows, {THOUGHTS} thoughts', works)


def thoughts():
    """A training step by thoughts."""
    made = {n: make_batch(config, batch_size, n, tiles) for n in (0, 2, 4, 8, 16, 32)}
    table('training step', {f'{n} thoughts': step_of(ours, lambda n=n: ours(**made[n]).loss)
                            for n in made})


def compiled():
    """Training steps with each block compiled beside eager ones, over the same weights, on batches
    of three lengths."""
    ours, _ = models(config, seed)
    twin = MultiCoCo.of_weights(config, ours.to(device).state_dict())
    for block in [*twin.language_model.model.layers, *twin.vision_model.blocks]:
        block.compile()
    batches = [make_batch(config, batch_size, THOUGHTS, tiles, more=more) for more in (0, 3, 8)]
    works = {name: step_of(model, lambda model=model: sum(model(**one).loss for one in batches))
             for name, model in (('eager', ours), ('compiled', twin))}
    began = time.time()
    works['compiled']()
    print(f'compiling took {time.time() - began:.0f} s by the clock, losses:',
          *(model(**batches[0]).loss.item() for model in (ours, twin)), flush=True)
    table(f'three training steps, {batch_size} rows, {THOUGHTS} thoughts', works)


@torch.no_grad()
def generation():
    batch, plain = (make_batch(config, ROWS, n, tiles, supervised=False) for n in (THOUGHTS, 0))
    works = {'plain, no thoughts': lambda: plain_generate(theirs, plain, NEW),
             'ours': lambda: ours.generate(**batch, max_new_tokens=NEW)}
    with autocast:
        table(f'{ROWS} answers of {NEW} tokens, {THOUGHTS} thoughts', works)


# --- on a GPU -------------------------------------------------------------------------------------
def recipe(frozen, B):
    """A training step of InternVL3-1B's recipe."""
    batch = make_batch(config, B, THOUGHTS, tiles)
    with torch.device(device):
        ours = MultiCoCo(config)
    ours.set_activation_checkpointing()
    ours.vision_model.requires_grad_(not frozen)
    for block in ours.language_model.model.layers if compile else ():
        block.compile()
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], fused=True)

    def work():
        with autocast:
            loss = ours(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    took = interleaved({'': work}, 5)['']
    print(f'{B} rows, {frozen=}, {compile=}: {took:.3f} s, peak '
          f'{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB', flush=True)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.empty_cache()


def decoding():
    """A written token in bfloat16, eager and captured in a CUDA graph."""
    eager = ours.bfloat16().step
    for B in (1, 32):
        batch = make_batch(config, B, THOUGHTS, tiles, supervised=False)
        works = {n: lambda n=n: ours.generate(**batch, max_new_tokens=n) for n in (65, 129)}
        for name in ('eager', 'compiled'):
            ours.step = eager
            if name == 'compiled':
                ours.step = torch.compile(eager, mode='reduce-overhead', dynamic=False)
            interleaved(works, 3)  # compiles and records
            took = interleaved(works, 5)
            print(f'{B} rows, {name}: {1e3 * (took[129] - took[65]) / 64:.2f} ms a token')


if __name__ == '__main__':
    configure(globals())
    device, config = pick_device(device), CONFIGS[size]
    batch_size, tiles = 4, (1, 2) if size == 'small' else (7,)
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == 'cuda')
    torch._dynamo.config.recompile_limit = 64  # a graph for each kind of pass, not for each shape
    if size == '1b' and device == 'cuda':
        for frozen, B in ((True, 8), (True, 16), (False, 8), (False, 16)):
            recipe(frozen, B)
    if compile:
        compiled()
    else:
        ours, theirs = (model.to(device) for model in models(config, seed))
        for tower in (ours.vision_model, theirs.model.vision_tower) if size == '1b' else ():
            tower.requires_grad_(False)  # as config/aokvqa.py has it
        training()
        thoughts()
        generation()
        if device == 'cuda':
            decoding()
