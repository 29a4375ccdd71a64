"""
Speed, memory and FLOPs beside transformers, in one run, on the same random weights and the same batch.

    python bench.py                                small decoder and vision tower, real vocabulary and tile size, CPU
    python bench.py --size=1b --device=cuda        InternVL3-1B's shapes; training, thoughts and decoding on one GPU
    python bench.py --size=1b --device=cpu         the peak memory of 1B training, simulated with fake tensors

Beside ours stand
    (a) floor       transformers' InternVL in one plain pass over the same tokens, head at supervised positions only
    (b) published   Coconut's training loop over transformers: aligned thoughts, keys and values reused, head at all positions
    (c) plain       transformers' generate, without thoughts
    (d) published   Coconut's generation: one row at a time, no cache
Seconds are CPU seconds of all threads, or those of CUDA events; medians of interleaved repeats. Memory is the peak above the weights.

Tried, on the CPU, after a look at the profile:
    query heads of one key head as queries (no mask path that repeats keys)   kept: 0.3 ms against 0.6 (enable_gqa) and 3.5 (repeated), 4 rows
    head as weight @ x.T in decoding                                          kept: 1.4 times faster at 16 rows, 2 at 4
    all that depends on values asked once, on the host                        kept: one wait for the device less in fuse and in the loss
    preallocated keys and values in training                                  not done: the concatenation is 0.3 % of a step
    head and cross entropy in slices                                          not done: 8 rows with 24 supervised tokens are 0.1 GB of logits
    the MLP on tokens alone, not on padding                                   kept: rows with 1 and 2 tiles are 22 % padding
    all linear layers on packed rows                                          not done: the MLP is 3/4 of them, and this costs 3 lines
"""
import gc
import json as json_format
import statistics
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

import model
from configurator import configure
from model import Config, IMAGE_MEAN, IMAGE_STD, Layout, MultiCoCo, load_weights, pick_device, rename
from prepare import collate

# --- knobs ------------------------------------------------------------------------------------------------------------
size = 'small'       # 'small' or '1b'
device = 'auto'      # 'auto', 'cpu', 'cuda'
repeats = 3
json = False         # print one JSON object instead of the tables
seed = 1337

NO_END = dict(eos_token_ids=(-1,))  # every row writes all its tokens
CONFIGS = {'small': Config(num_hidden_layers=2, vision_hidden_size=384, vision_intermediate_size=1536, vision_num_layers=2, vision_num_heads=6, **NO_END),
           '1b': Config(**NO_END)}
LATENT_ID = Config().latent_token_id
QUESTION, THOUGHTS, ANSWER = 40, 8, 24  # text tokens of a row's prompt, its thoughts, supervised tokens
ROWS, NEW = 16, 32                      # of a generation: rows, and tokens that each writes


def models(c):
    """transformers' InternVL with random weights, and ours with the same."""
    text = Qwen2Config(vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, head_dim=c.head_dim,
                       num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
                       max_position_embeddings=c.max_position_embeddings, rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=False,
                       rope_parameters={'rope_type': 'default', 'rope_theta': c.rope_theta})
    vision = InternVLVisionConfig(hidden_size=c.vision_hidden_size, intermediate_size=c.vision_intermediate_size, attention_bias=True,
                                  num_hidden_layers=c.vision_num_layers, num_attention_heads=c.vision_num_heads,
                                  image_size=[c.image_size] * 2, patch_size=[c.patch_size] * 2)
    torch.manual_seed(seed)
    ours = MultiCoCo(c)
    theirs = InternVLForConditionalGeneration(InternVLConfig(vision_config=vision, text_config=text, image_token_id=c.image_token_id, tie_word_embeddings=False))
    weights, thirds = {}, {}
    for name, tensor in theirs.state_dict().items():
        name = name.removeprefix('model.').replace('language_model.', 'language_model.model.').replace('lm_head', 'language_model.lm_head')
        name, third = rename(name)
        (weights if third is None else thirds.setdefault(name, {}))[name if third is None else third] = tensor
    load_weights(ours, {**weights, **{name: torch.cat([parts[x] for x in 'qkv']) for name, parts in thirds.items()}}, 'transformers')
    return ours.to(device), theirs.to(device).eval()


def make_batch(c, B, thoughts, tiles=(1, 2), supervised=True):
    """forward's arguments: row b has tiles[b % len(tiles)] tiles, its own length, and thoughts behind the prompt."""
    g, made = torch.Generator().manual_seed(seed), []
    for b in range(B):
        P = tiles[b % len(tiles)]
        text = torch.randint(100, 100000, (QUESTION + ANSWER + b % 5,), generator=g).tolist()
        ids = text[:10] + [c.image_token_id] * P * c.num_image_tokens + text[10:-ANSWER] + [c.latent_token_id] * thoughts
        labels = [-100] * len(ids) + text[-ANSWER:]
        made.append(dict(input_ids=ids + text[-ANSWER:] if supervised else ids, labels=labels if supervised else None,
                         pixel_values=torch.randint(0, 256, (P, 3, c.image_size, c.image_size), generator=g, dtype=torch.uint8)))
    return {k: v.to(device) for k, v in collate(made).items()}


# --- what is compared -------------------------------------------------------------------------------------------------

def normalised(tiles):
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (IMAGE_MEAN, IMAGE_STD))
    return (tiles.float() / 255 - mean) / std


def embed(theirs, batch):
    """transformers' fused embeddings [B, T, D], the ViT run once."""
    visual = theirs.model.get_image_features(normalised(batch['pixel_values'])).pooler_output
    x = theirs.get_input_embeddings()(batch['input_ids'])
    here = batch['input_ids'] == theirs.config.image_token_id
    return x.masked_scatter(here[..., None], visual.to(x.dtype))


def floor_loss(theirs, batch):
    """(a): right padding under causal attention needs no mask."""
    hidden = theirs.model.language_model(inputs_embeds=embed(theirs, batch), use_cache=False).last_hidden_state
    row, at = (batch['labels'][:, 1:] != -100).nonzero(as_tuple=True)
    return F.cross_entropy(theirs.lm_head(hidden[row, at]).float(), batch['labels'][row, at + 1])


def published_loss(theirs, batch):
    """(b): one pass a thought, nested lists of tensors to put thoughts in, head on every position; thoughts aligned by left padding."""
    ids, mask, labels = batch['input_ids'], batch['attention_mask'], batch['labels']
    x = embed(theirs, batch)
    first = [(row == LATENT_ID).nonzero()[:, 0] for row in ids]
    shift = max(int(at[0]) for at in first)
    left = [shift - int(at[0]) for at in first]
    T = max(n + int(m.sum()) for n, m in zip(left, mask))
    pad = lambda v, fill: torch.stack([F.pad(row[:T - n], (0, 0) * (row.dim() - 1) + (n, max(0, T - n - len(row))), value=fill) for n, row in zip(left, v)])
    x, mask, labels = pad(x, 0.0), pad(mask, 0), pad(labels, -100)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    n, cache, logits, start, stop = len(first[0]), DynamicCache(), [], 0, shift
    for k in range(n + 1):
        out = theirs.model.language_model(inputs_embeds=x[:, start:stop], attention_mask=mask[:, :stop], position_ids=position[:, start:stop],
                                          past_key_values=cache, use_cache=True)
        logits.append(theirs.lm_head(out.last_hidden_state))
        if k < n:
            cells = [[x[b, t] for t in range(T)] for b in range(len(x))]
            for b in range(len(x)):
                cells[b][stop] = out.last_hidden_state[b, -1]
            x = torch.stack([torch.stack(cells[b]) for b in range(len(x))])
        start, stop = stop, stop + 1 if k + 1 < n else T
    logits = torch.cat(logits, 1)  # the published code gives them to the caller, so they live on
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()), logits


def published_generate(theirs, batch, new_tokens):
    """(d): one row at a time; every new token recomputes the row from its start."""
    answers = []
    for b, tiles in enumerate(batch['pixel_values'].split(batch['num_tiles'].tolist())):
        ids = batch['input_ids'][b:b + 1, :int(batch['attention_mask'][b].sum())]
        x = embed(theirs, dict(input_ids=ids, pixel_values=tiles))
        thoughts, cache, start = (ids[0] == LATENT_ID).nonzero()[:, 0].tolist(), DynamicCache(), 0
        for stop in [*thoughts, x.shape[1]]:
            out = theirs.model.language_model(inputs_embeds=x[:, start:stop], past_key_values=cache, use_cache=True)
            theirs.lm_head(out.last_hidden_state)
            if stop < x.shape[1]:
                x = torch.cat((x[:, :stop], out.last_hidden_state[:, -1:], x[:, stop + 1:]), 1)
            start = stop
        new, hidden = [], out.last_hidden_state
        for _ in range(new_tokens):
            new.append(theirs.lm_head(hidden)[0, -1].argmax())
            x = torch.cat((x, theirs.get_input_embeddings()(new[-1])[None, None]), 1)
            hidden = theirs.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state if len(new) < new_tokens else None
        answers.append(torch.stack(new))
    return torch.stack(answers)


def plain_generate(theirs, batch, new_tokens):
    """(c): padded on the left, as transformers wants it."""
    turned = {k: torch.stack([row.roll(-int(m.sum())) for row, m in zip(batch[k], batch['attention_mask'])]) for k in ('input_ids', 'attention_mask')}
    return theirs.generate(**turned, pixel_values=normalised(batch['pixel_values']), max_new_tokens=new_tokens,
                           min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)[:, batch['input_ids'].shape[1]:]


# --- measuring --------------------------------------------------------------------------------------------------------

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
    """name -> median seconds; the works, run before, take turns, so that a busy machine is busy for all."""
    times = [{name: seconds(work) for name, work in works.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in works}


def cost(work):
    """Peak bytes above what is held before, and FLOPs; also warms up."""
    gc.collect()
    status = lambda key: next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(key))
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    else:
        with open('/proc/self/clear_refs', 'w') as f:
            f.write('5')  # VmHWM, the peak, starts anew (Linux)
    before = torch.cuda.memory_allocated() if device == 'cuda' else status('VmRSS')
    with FlopCounterMode(display=False) as counter:
        work()
    return dict(peak=(torch.cuda.max_memory_allocated() if device == 'cuda' else status('VmHWM')) - before, flops=counter.get_total_flops())


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
        print(f'{name:30}{v["seconds"]:10.2f}{v["seconds"] / lines[floor]["seconds"]:9.3f}{more}', flush=True)


def training():
    batch = make_batch(config, batch_size, THOUGHTS, tiles)
    works = {'floor': step_of(theirs, lambda: floor_loss(theirs, batch)), 'ours': step_of(ours, lambda: ours(**batch).loss),
             'published': step_of(theirs, lambda: published_loss(theirs, batch))}
    costs = {name: cost(work) for name, work in works.items()}
    took = interleaved({name: works[name] for name in ('floor', 'ours')}, repeats)
    both = interleaved({name: works[name] for name in ('ours', 'published')}, 1)
    took['published'] = took['ours'] * both['published'] / both['ours']  # by the ratio in the round that they shared
    lines = {name: dict(costs[name], seconds=took[name]) for name in works}
    table(f'training step, {batch_size} rows, {THOUGHTS} thoughts', lines, 'floor')
    return lines


def thoughts():
    """Seconds of a training step by thoughts, and what one more token a row costs in a pass of its own."""
    counts, prompt = (0, 2, 4, 8, 16, 32), make_batch(config, batch_size, 0, tiles)

    def passes(tokens):  # of transformers: the prompt, then so many tokens a row, one by one
        cache, x, total = DynamicCache(), embed(theirs, prompt), 0
        for _ in range(1 + tokens):
            x = theirs.model.language_model(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
            total = total + x.sum()
        return total

    works = {n: step_of(ours, lambda batch=make_batch(config, batch_size, n, tiles): ours(**batch).loss) for n in counts}
    took = interleaved({**works, 'prompt': step_of(theirs, lambda: passes(0)), 'tokens': step_of(theirs, lambda: passes(8))}, repeats)
    token = (took['tokens'] - took['prompt']) / 8
    print('\ntraining step by thoughts: ' + ', '.join(f'{n}: {took[n]:.2f} s' for n in counts))
    print(f'a further thought: {(took[32] - took[0]) / 32:.3f} s (from 0 to 32); a token in a pass of its own over transformers: {token:.3f} s')
    return dict(seconds={n: took[n] for n in counts}, token=token)


def products():
    """The matrix products of the decoding steps, nothing else."""
    linears = [module for module in ours.language_model.modules() if isinstance(module, torch.nn.Linear)]
    inputs = {n: torch.randn(ROWS, 1, n, device=device) for n in {linear.in_features for linear in linears}}
    for _ in range(NEW - 1):
        for linear in linears:
            linear(inputs[linear.in_features])


@torch.no_grad()
def generation():
    ask = lambda B, n: make_batch(config, B, n, tiles, supervised=False)
    batch, plain, two = ask(ROWS, THOUGHTS), ask(ROWS, 0), ask(2, THOUGHTS)
    works = {'plain, no thoughts': lambda: plain_generate(theirs, plain, NEW), 'ours': lambda: ours.generate(**batch, max_new_tokens=NEW),
             'ours, one token': lambda: ours.generate(**batch, max_new_tokens=1), 'products': products}
    with autocast:
        costs = {name: cost(work) for name, work in works.items()}
        took = interleaved(works, repeats)
        took['published, no cache'] = seconds(lambda: published_generate(theirs, two, NEW)) * ROWS / 2  # row by row: of two rows
    lines = {name: dict(costs.get(name, {}), seconds=took[name]) for name in ('plain, no thoughts', 'ours', 'published, no cache')}
    table(f'{ROWS} answers of {NEW} tokens, {THOUGHTS} thoughts', lines, 'plain, no thoughts')
    step, bare = (took['ours'] - took['ours, one token']) / (NEW - 1), took['products'] / (NEW - 1)
    print(f'a decoding step: {step:.3f} s, its matrix products alone: {bare:.3f} s, ratio {step / bare:.2f}')
    return dict(lines, step=step, products=bare)


def on_gpu(trained):
    """Against what this GPU can do: its own bf16 matrix rate and copy bandwidth."""
    a, big = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16), torch.empty(2 ** 31, device=device, dtype=torch.uint8)
    for _ in range(3):
        rate, bandwidth = 2 * 8192 ** 3 / seconds(lambda: a @ a), 2 * len(big) / seconds(big.clone)
    print(f'\nbf16 products {rate / 1e12:.0f} TFLOP/s, copies {bandwidth / 1e9:.0f} GB/s; training: '
          f'{trained["ours"]["flops"] / trained["ours"]["seconds"] / rate:.1%} of the products, {trained["ours"]["seconds"] / trained["floor"]["seconds"]:.3f} of the floor')
    model, out = ours.bfloat16(), dict(rate=rate, bandwidth=bandwidth)
    lm = model.language_model
    weights = 2 * sum(p.numel() for part in (lm.model.layers, lm.lm_head) for p in part.parameters())
    for B in (1, 32):
        batch = make_batch(config, B, THOUGHTS, tiles, supervised=False)
        read = weights + 4 * B * batch['input_ids'].shape[1] * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        for name, step in (('eager', None), ('compiled', torch.compile(model.step, mode='reduce-overhead', dynamic=False))):
            if step is not None:
                model.step = step
            took = {n: min(seconds(lambda: model.generate(**batch, max_new_tokens=n)) for _ in range(4)) for n in (1, 129)}
            model.__dict__.pop('step', None)
            each = (took[129] - took[1]) / 128
            out[f'{name} {B}'] = dict(tokens_per_s=B / each, of_bandwidth=read / each / bandwidth)
            print(f'decoding, {B} rows, {name}: {B / each:.0f} tokens/s, {read / each / bandwidth:.1%} of the bandwidth floor')
    return out


def simulated_memory():
    """Peak memory of a 1B training step by category, on fake tensors: 8 rows of 7 tiles, stage 4, bf16 autocast, AdamW, checkpointing."""
    batch, peaks, lay_out = make_batch(config, 8, 8, tiles), {}, model.lay_out
    for frozen in (True, False):
        with torch.device('meta'):
            ours = MultiCoCo(config)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            ours = ours.to_empty(device='cpu')
            ours.set_activation_checkpointing()
            for module in ours.vision_model.modules() if frozen else ():  # as buffers, since the tracker wants a gradient of each parameter
                for name, p in list(module.named_parameters(recurse=False)):
                    delattr(module, name)
                    module.register_buffer(name, p.detach())
            optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], foreach=False)

            def on_real_ids(*args):  # where a token stands is known, the rest is shapes
                with unset_fake_temporarily():
                    layout = lay_out(*args)
                return Layout(*map(fake.from_tensor, layout[:4]), *layout[4:7], tuple(map(fake.from_tensor, layout.targets)))

            model.lay_out, pixels = on_real_ids, fake.from_tensor(batch['pixel_values'])
            for p in ours.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()  # its state is there from the first step on
            optimizer.zero_grad(set_to_none=True)
            tracker = MemTracker()
            tracker.track_external(ours, optimizer)
            with tracker:
                with torch.autocast('cpu', torch.bfloat16):
                    loss = ours(batch['input_ids'], pixels, batch['attention_mask'], batch['labels']).loss
                loss.backward()
                optimizer.step()
            model.lay_out = lay_out
        peaks['vision frozen' if frozen else 'vision trained'] = {str(k): v for k, v in next(iter(tracker.get_tracker_snapshot('peak').values())).items()}
    for name, peak in peaks.items():
        print(f'{name}: ' + ', '.join(f'{k.split(".")[-1]} {v / 2**30:.2f} GiB' for k, v in peak.items() if v))
    return peaks


if __name__ == '__main__':
    globals().update(configure(globals()))
    if size not in CONFIGS:
        raise ValueError(f'size={size!r}: expected {" or ".join(CONFIGS)}')
    device, config = pick_device(device), CONFIGS[size]
    batch_size, tiles = (4, (1, 2)) if size == 'small' else (8, (7,))
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == 'cuda')
    if size == '1b' and device == 'cpu':
        print('no GPU: the peak memory of a training step, simulated')
        out = dict(simulated_memory=simulated_memory())
    else:
        ours, theirs = models(config)
        for tower in (ours.vision_model, theirs.model.vision_tower) if size == '1b' else ():
            tower.requires_grad_(False)  # as config/aokvqa.py has it
        out = dict(training=training(), thoughts=thoughts(), generation=generation())
        if device == 'cuda':
            out['gpu'] = on_gpu(out['training'])
    if json:
        print(json_format.dumps(out))
