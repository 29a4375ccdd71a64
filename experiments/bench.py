"""
Speed, memory and FLOPs beside transformers, in one run, on the same random weights and the same
batch.

    python -m experiments.bench                           small towers, real vocabulary and tiles
    python -m experiments.bench --size=1b --device=cuda   InternVL3-1B's shapes on one GPU
    python -m experiments.bench --size=1b --device=cpu    an answer in bfloat16, and the peak memory
                                                          of training it, simulated
    python -m experiments.bench --size=smollm2            a wide text decoder on short rows

Beside ours stand the paths of reference.py: in training (a) the floor and (b) Coconut's published
loop, in generation (c) transformers' generate without thoughts and (d) Coconut's published
generation. Seconds are CPU seconds of all threads, or those of CUDA events; medians of interleaved
repeats. Memory is the peak above the weights. FLOPs are those of plain products, whatever kernel
computes them: torch's own counter does not know each, nor each one's grouped queries.

Tried, on the CPU, after a look at the profile. Kept:
    query heads of one key head as queries    0.3 ms; enable_gqa 0.6, repeated keys 3.5
    head as weight @ x.T in decoding                1.4 times faster at 16 rows, 2 at 4
    what depends on values asked once         one wait for the device less in fuse and loss
    the MLP on tokens alone, not on padding         rows with 1 and 2 tiles are 22 % padding
    a tensor of keys or values a layer        compiled, views of one are copied: 246 ms, so 7
Not done:
    preallocated keys and values in training        the concatenation is 0.3 % of a step
    head and cross entropy in slices          8 rows with 24 targets: 0.1 GB of logits
    all linear layers on packed rows                the MLP is 3/4 of them, and costs 3 lines
"""

import gc
import json as json_format
import statistics
import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import model
from configurator import configure
from model import Config, Layout, MultiCoCo
from sample import pick_device
from prepare import collate
from experiments.reference import (embed, floor_loss, models, plain_generate, published_generate,
                                   published_loss)

# --- knobs ----------------------------------------------------------------------------------------
size = 'small'  # 'small', '1b' or 'smollm2'
device = 'auto'  # 'auto', 'cpu', 'cuda'
repeats = 3
json = False  # print one JSON object as well, last
seed = 1337

NO_END = dict(eos_token_ids=(-1, ))  # every row writes all its tokens
CONFIGS = {
    '1b': Config(**NO_END),
    'small': Config(num_hidden_layers=2, vision_num_layers=2, vision_hidden_size=384,
                    vision_num_heads=6, vision_intermediate_size=1536, **NO_END),
    'smollm2': Config(vocab_size=49158, hidden_size=576, intermediate_size=1536,
                      num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                      attention_bias=False, tie_word_embeddings=True, vision_num_layers=0,
                      image_token_id=49154, latent_token_id=49156, pad_token_id=0, **NO_END)
}
QUESTION, THOUGHTS, ANSWER = (40, 8, 24
                              )  # text tokens of a row's prompt, its thoughts, supervised tokens
ROWS, NEW = 16, 32  # of a generation: rows, and tokens that each writes


def make_batch(c, B, thoughts, tiles=(1, 2), supervised=True):
    """forward's arguments: row b has tiles[b % len(tiles)] tiles, its own length, and thoughts
    behind the prompt."""
    g, made = torch.Generator().manual_seed(seed), []
    for b in range(B):
        P, side = tiles[b % len(tiles)], c.image_size
        text = torch.randint(100, 40000, (QUESTION + ANSWER + b%5, ), generator=g).tolist()
        visual, latent = [c.image_token_id] * P * c.num_image_tokens, [c.latent_token_id] * thoughts
        ids = text[:10] + visual + text[10:-ANSWER] + latent
        labels = [-100] * len(ids) + text[-ANSWER:]
        pixels = torch.randint(0, 256, (P, 3, side, side), generator=g, dtype=torch.uint8)
        made.append(
            dict(input_ids=ids + text[-ANSWER:] if supervised else ids,
                 labels=labels if supervised else None, pixel_values=pixels if P else None))
    return {k: v.to(device) for k, v in collate(made).items() if v is not None}


# --- measuring ------------------------------------------------------------------------------------


def products_of_attention(query, key, *_, **__):
    """Queries by keys, and their weights by values; of shapes [B, H, L, D]."""
    B, H, L, D = query
    return 4 * B * H * L * key[2] * D


def products_of_its_gradients(grad, query, key, *_, **__):
    return 2 * products_of_attention(query, key)


KERNELS = ('_flash_attention', '_flash_attention_for_cpu', '_efficient_attention',
           '_cudnn_attention')
FORMULAS = {}
for kernel in KERNELS:
    forward = getattr(torch.ops.aten, f'_scaled_dot_product{kernel}')
    backward = getattr(torch.ops.aten, f'_scaled_dot_product{kernel}_backward')
    FORMULAS.update({forward: products_of_attention, backward: products_of_its_gradients})


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
    """name -> median seconds; the works, run before, take turns, so that a busy machine is busy for
    all."""
    times = [{name: seconds(work) for name, work in works.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in works}


def cost(work):
    """Peak bytes above what is held before, and FLOPs; also warms up."""
    gc.collect()
    status = lambda key: next(
        int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(key))
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    else:
        with open('/proc/self/clear_refs', 'w') as f:
            f.write('5')  # VmHWM, the peak, starts anew (Linux)
    before = torch.cuda.memory_allocated() if device == 'cuda' else status('VmRSS')
    work()
    peak = torch.cuda.max_memory_allocated() if device == 'cuda' else status('VmHWM')
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        work()
    return dict(peak=peak - before, flops=counter.get_total_flops())


def step_of(model, loss):
    """Forward and backward pass; the optimizer's part is the same for all."""
    def work():
        with autocast:
            out = loss()
        (out[0] if isinstance(out, tuple) else out).backward()
        model.zero_grad(set_to_none=True)

    return work


def table(title, lines, floor):
    print(f'\n{title:30}   seconds  of {floor:18}  GFLOP  peak GB')
    for name, v in lines.items():
        more = f'{v["flops"] / 1e9:28.1f}{v["peak"] / 1e9:9.2f}' if 'flops' in v else ''
        print(f'{name:30}{v["seconds"]:10.2f}{v["seconds"] / lines[floor]["seconds"]:9.3f}{more}',
              flush=True)


def training():
    batch = make_batch(config, batch_size, THOUGHTS, tiles)
    works = {
        'floor': step_of(theirs, lambda: floor_loss(theirs, batch)),
        'ours': step_of(ours, lambda: ours(**batch).loss),
        'published': step_of(theirs, lambda: published_loss(theirs, batch, config.latent_token_id))
    }
    costs = {name: cost(work) for name, work in works.items()}
    took = interleaved({name: works[name] for name in ('floor', 'ours')}, repeats)
    both = interleaved({name: works[name] for name in ('ours', 'published')}, 1)
    took['published'] = (took['ours'] * both['published'] / both['ours']
                         )  # by the ratio in the round that they shared
    lines = {name: dict(costs[name], seconds=took[name]) for name in works}
    table(f'training step, {batch_size} rows, {THOUGHTS} thoughts', lines, 'floor')
    return lines


def thoughts():
    """Seconds of a training step by thoughts, and what one more token a row costs in a pass of its
    own."""
    counts, prompt = (0, 2, 4, 8, 16, 32), make_batch(config, batch_size, 0, tiles)

    def passes(tokens):  # of transformers: the prompt, then so many tokens a row, one by one
        cache, x, total = DynamicCache(), embed(theirs, prompt), 0
        for _ in range(1 + tokens):
            out = theirs.model.language_model(inputs_embeds=x, past_key_values=cache,
                                              use_cache=True)
            x = out.last_hidden_state[:, -1:]
            total = total + x.sum()
        return total

    made = {n: make_batch(config, batch_size, n, tiles) for n in counts}
    works = {n: step_of(ours, lambda n=n: ours(**made[n]).loss) for n in counts}
    works.update(prompt=step_of(theirs, lambda: passes(0)),
                 tokens=step_of(theirs, lambda: passes(8)))
    took = interleaved(works, repeats)
    token = (took['tokens'] - took['prompt']) / 8
    print('\ntraining step by thoughts: ' + ', '.join(f'{n}: {took[n]:.2f} s' for n in counts))
    print(f'a further thought: {(took[32] - took[0]) / 32:.3f} s (from 0 to 32); a token in a pass '
          f'of its own over transformers: {token:.3f} s')
    return dict(seconds={n: took[n] for n in counts}, token=token)


def products():
    """The matrix products of the decoding steps, nothing else."""
    linears = [
        module for module in ours.language_model.modules() if isinstance(module, torch.nn.Linear)
    ]
    inputs = {
        n: torch.randn(ROWS, 1, n, device=device)
        for n in {linear.in_features
                  for linear in linears}
    }
    for _ in range(NEW - 1):
        for linear in linears:
            linear(inputs[linear.in_features])


def wide_and_short():
    """Where a thought's seconds go on short rows: a step, and one without weight gradients."""
    ours, out = MultiCoCo(config).to(device), {}
    matrices = [p for p in ours.language_model.model.layers.parameters() if p.dim() == 2]
    made = {n: make_batch(config, 8, n, (0, )) for n in (0, 2, 4, 8, 16)}
    works = {n: step_of(ours, lambda n=n: ours(**made[n]).loss) for n in made}
    for name, trained in (('all trained', True), ('matrices frozen', False)):
        for p in matrices:
            p.requires_grad_(trained)
        interleaved(works, 1)  # warms up
        out[name] = interleaved(works, repeats)
        print(f'8 rows of {QUESTION + ANSWER} to {QUESTION + ANSWER + 4} tokens, a step by '
              f'thoughts, {name}: ' + ', '.join(f'{n}: {t:.2f} s' for n, t in out[name].items()),
              flush=True)
    return out


@torch.no_grad()
def answer_in_bfloat16():
    """One row and 16 new tokens, without thoughts, which transformers does not have, and with
    them."""
    ours, theirs = (m.bfloat16() for m in models(config, seed))
    plain, ask = (make_batch(config, 1, n, tiles, supervised=False) for n in (0, THOUGHTS))
    works = {
        'transformers': lambda: plain_generate(theirs, plain, 16),
        'ours': lambda: ours.generate(**plain, max_new_tokens=16),
        f'ours, {THOUGHTS} thoughts': lambda: ours.generate(**ask, max_new_tokens=16)
    }
    interleaved(works, 1)  # warms up
    took = interleaved(works, repeats)
    print(f'an answer of 16 tokens, {tiles[0]} tiles, bfloat16: ' +
          ', '.join(f'{name} {t:.1f} s' for name, t in took.items()), flush=True)
    return took


@torch.no_grad()
def generation():
    ask = lambda B, n: make_batch(config, B, n, tiles, supervised=False)
    batch, plain, two = ask(ROWS, THOUGHTS), ask(ROWS, 0), ask(2, THOUGHTS)
    works = {
        'plain, no thoughts': lambda: plain_generate(theirs, plain, NEW),
        'ours': lambda: ours.generate(**batch, max_new_tokens=NEW),
        'ours, one token': lambda: ours.generate(**batch, max_new_tokens=1), 'products': products
    }
    with autocast:
        costs = {name: cost(work) for name, work in works.items()}
        took = interleaved(works, repeats)
        pair = seconds(lambda: published_generate(theirs, two, config.latent_token_id, NEW))
    took['published, no cache'] = pair * ROWS / 2  # row by row, so two rows tell
    lines = {
        name: dict(costs.get(name, {}), seconds=took[name])
        for name in ('plain, no thoughts', 'ours', 'published, no cache')
    }
    table(f'{ROWS} answers of {NEW} tokens, {THOUGHTS} thoughts', lines, 'plain, no thoughts')
    step, bare = (took['ours'] - took['ours, one token']) / (NEW-1), took['products'] / (NEW-1)
    print(f'a decoding step: {step:.3f} s, its matrix products alone: {bare:.3f} s, ratio '
          f'{step / bare:.2f}')
    return dict(lines, step=step, products=bare)


def on_gpu(trained):
    """Against what this GPU can do: its own bf16 matrix rate and copy bandwidth."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    big = torch.empty(2 ** 31, device=device, dtype=torch.uint8)
    for _ in range(3):
        rate, bandwidth = 2 * 8192 ** 3 / seconds(lambda: a @ a), 2 * len(big) / seconds(big.clone)
    print(
        f'\nbf16 products {rate / 1e12:.0f} TFLOP/s, copies {bandwidth / 1e9:.0f} GB/s; training: '
        f'{trained["ours"]["flops"] / trained["ours"]["seconds"] / rate:.1%} of the products, '
        f'{trained["ours"]["seconds"] / trained["floor"]["seconds"]:.3f} of the floor')
    model, out = ours.bfloat16(), dict(rate=rate, bandwidth=bandwidth)
    lm = model.language_model
    weights = 2 * sum(p.numel()
                      for part in (lm.model.layers, lm.lm_head)
                      for p in part.parameters())
    for B in (1, 32):
        without, batch, more = (make_batch(config, B, n, tiles, supervised=False)
                                for n in (0, THOUGHTS, 32))
        took = interleaved({
            n: lambda made=made: model.generate(**made, max_new_tokens=1)
            for n, made in ((0, without), (32, more))
        }, 5)
        out[f'thought {B}'] = (took[32] - took[0]) / 32
        print(f'a thought in generation, {B} rows, eager: {1e3 * out[f"thought {B}"]:.2f} ms')
        kv = (2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
              )  # numbers a token
        read = weights + 2 * kv * batch['input_ids'].numel()
        for name in ('eager', 'compiled'):
            step, ends = model.step, []
            if name == 'compiled':
                step = torch.compile(step, mode='reduce-overhead', dynamic=False)

            def timed(*args):
                last = step(*args)
                ends.append(torch.cuda.Event(enable_timing=True))
                ends[-1].record()
                return last

            model.step = timed
            for _ in range(4):  # the first ones compile and record
                ends.clear()
                answer = seconds(lambda: model.generate(**batch, max_new_tokens=129))
            del model.step
            # the recording of a CUDA graph is in the first gaps
            each = statistics.median(a.elapsed_time(b) for a, b in zip(ends, ends[1:])) / 1e3
            out[f'{name} {B}'] = dict(step=each, answer=answer, of_bandwidth=read/each/bandwidth)
            print(f'decoding, {B} rows, {name}: {1e3 * each:.2f} ms a token, {B / each:.0f} '
                  f'tokens/s, {read / each / bandwidth:.1%} of the bandwidth floor; 129 tokens '
                  f'in {answer:.2f} s', flush=True)
    return out


def recipe():
    """A training step of the model on this GPU, random weights and InternVL3-1B's recipe; what
    simulated_memory foretells."""
    batch, out = make_batch(config, 8, THOUGHTS, tiles), {}
    for frozen in (True, False):
        with torch.device(device):
            ours = MultiCoCo(config)
        ours.set_activation_checkpointing()
        ours.vision_model.requires_grad_(not frozen)
        optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad],
                                      fused=True)

        def work():
            with autocast:
                loss = ours(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        work()
        torch.cuda.reset_peak_memory_stats()
        name = 'vision frozen' if frozen else 'vision trained'
        took = interleaved({name: work}, 5)[name]
        peak, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        out[name] = dict(seconds=took, peak=peak, reserved=held)
        tokens = int(batch['attention_mask'].sum())
        print(f'{name}, 8 rows, activation checkpointing: {took:.3f} s, {tokens / took:.0f} '
              f'tokens/s, peak {peak / 2**30:.2f} GiB, {held / 2**30:.2f} held by torch',
              flush=True)
        ours = optimizer = None  # frees them, before the next model is made
        torch.cuda.empty_cache()
    return out


def simulated_memory():
    """Peak memory of a 1B training step by category, on fake tensors: 8 rows of 7 tiles, stage 4,
    bf16 autocast, AdamW, activation checkpointing."""
    batch, peaks, lay_out = make_batch(config, 8, THOUGHTS, tiles), {}, model.lay_out
    for frozen in (True, False):
        with torch.device('meta'):
            ours = MultiCoCo(config)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            ours = ours.to_empty(device='cpu')
            ours.set_activation_checkpointing()
            for module in (ours.vision_model.modules() if frozen else
                           ()):  # the tracker wants gradients of parameters
                for name, p in list(module.named_parameters(recurse=False)):
                    delattr(module, name)
                    module.register_buffer(name, p.detach())
            optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad],
                                          foreach=False)

            def on_real_ids(*args):  # where a token stands is known, the rest is shapes
                with unset_fake_temporarily():
                    layout = lay_out(*args)
                fakes = lambda tensors: tuple(map(fake.from_tensor, tensors))
                return Layout(*fakes(layout[:4]), layout.widths, layout.real_slots,
                              *fakes([layout.image_slots]), layout.image_tokens,
                              fakes(layout.targets))

            model.lay_out, pixels = on_real_ids, fake.from_tensor(batch['pixel_values'])
            for p in ours.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()  # its state is there from the first step on
            optimizer.zero_grad(set_to_none=True)
            tracker = MemTracker()
            tracker.track_external(ours, optimizer)
            with tracker:
                with torch.autocast('cpu', torch.bfloat16):
                    loss = ours(batch['input_ids'], pixels, batch['attention_mask'],
                                batch['labels']).loss
                loss.backward()
                optimizer.step()
            model.lay_out = lay_out
        peak = next(iter(tracker.get_tracker_snapshot('peak').values()))
        peaks['vision frozen' if frozen else 'vision trained'] = {
            str(kind): size
            for kind, size in peak.items()
        }
    for name, peak in peaks.items():
        print(f'{name}: ' +
              ', '.join(f'{k.split(".")[-1]} {v / 2**30:.2f} GiB' for k, v in peak.items() if v))
    return peaks


if __name__ == '__main__':
    globals().update(configure(globals()))
    if size not in CONFIGS:
        raise ValueError(f'size={size!r}: expected {" or ".join(CONFIGS)}')
    device, config = pick_device(device), CONFIGS[size]
    batch_size, tiles = 4, (1, 2) if size == 'small' else (7, )
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == 'cuda')
    if size == 'smollm2':
        out = dict(wide_and_short=wide_and_short())
    elif size == '1b' and device == 'cpu':
        print('no GPU: an answer, and the peak memory of a training step, simulated')
        out = dict(answer=answer_in_bfloat16(), simulated_memory=simulated_memory())
    else:
        print(
            'transformers\' model and ours are made and warmed up; about 20 minutes in all on one '
            'core', flush=True)
        out = dict(recipe=recipe()) if size == '1b' else {}
        ours, theirs = (m.to(device) for m in models(config, seed))
        for tower in (ours.vision_model, theirs.model.vision_tower) if size == '1b' else ():
            tower.requires_grad_(False)  # as config/aokvqa.py has it
        out.update(training=training(), thoughts=thoughts(), generation=generation())
        if device == 'cuda':
            out['gpu'] = on_gpu(out['training'])
    if json:
        print(json_format.dumps(out))
