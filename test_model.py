"""
Tests of model, loading, text and tiles: python -m pytest -q (CPU, no network), which also runs
experiments/test_runs.py. Oracles: transformers' InternVL on tiny random
weights, and the obvious path, which recomputes the whole unpadded row from scratch for each
thought.
"""
import ast
import contextlib
import io
import json
import os
import re
import runpy
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers import Qwen3Config, Qwen3ForCausalLM

try:  # transformers 5
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
except ImportError:
    from transformers import GotOcr2ImageProcessor as GotOcr2ImageProcessorPil

import configurator
import prepare
import sample as sample_script
from model import Config, IMAGE_MEAN, IMAGE_STD, MultiCoCo, SPECIAL_TOKENS
from model import add_special_tokens, load_checkpoint, load_tokenizer, longest_of, sample

torch.set_num_threads(1)
# The same results on every machine: neither a test nor a script that it runs sees a GPU, unless the
# test asks for the fixture `gpu`
find_gpu = torch.cuda.is_available
has_gpu = find_gpu()
torch.cuda.is_available = lambda: False
os.environ['CUDA_VISIBLE_DEVICES'] = ''
HERE = os.path.dirname(os.path.abspath(__file__))
IMG, LATENT, EOS, PAD = 90, 91, 95, 0  # token ids of the tiny models
N = 4                                  # visual tokens of a 56-pixel tile
FIVE = int(transformers.__version__.split('.')[0]) >= 5


def tiny_config(**changes):
    fields = dict(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=8, vision_hidden_size=24,
                  vision_intermediate_size=40, vision_num_layers=2, vision_num_heads=3,
                  image_size=56, image_token_id=IMG, latent_token_id=LATENT, eos_token_ids=(EOS,),
                  pad_token_id=PAD)
    return Config(**{**fields, **changes})


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    return MultiCoCo(tiny_config(**changes)).eval()


# --------------------------------------------------------------------------------------------------
# stand-ins: a tokenizer of single bytes, a tiny InternVL of transformers, its files in both layouts

def tiny_tokenizer(extra=()):
    """Bytes and InternVL's special tokens, without the three that load_tokenizer adds."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(
        add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(
        ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<img>', '</img>', '<IMG_CONTEXT>', *extra])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<|im_end|>',
                                   pad_token='<|endoftext|>')


def rope(theta):
    """As transformers 5 writes it, and 4."""
    return dict(rope_parameters=dict(rope_type='default', rope_theta=theta)) if FIVE else dict(
        rope_theta=theta)


def tiny_oracle(llm='qwen2', spare=0, seed=0, tokenizer=None):
    """transformers' InternVL with random weights of real scale."""
    tokenizer = tokenizer or tiny_tokenizer()
    text = dict(vocab_size=262 + spare, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16 if llm == 'qwen3' else 8,
                max_position_embeddings=512, rms_norm_eps=1e-6,
                tie_word_embeddings=False, **rope(1e6))
    vision = InternVLVisionConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                                  num_attention_heads=3, attention_bias=True, image_size=[56, 56],
                                  patch_size=[14, 14])
    config = InternVLConfig(vision_config=vision,
                            text_config={'qwen2': Qwen2Config, 'qwen3': Qwen3Config}[llm](**text),
                            image_token_id=tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>'),
                            tie_word_embeddings=False)
    torch.manual_seed(seed)
    oracle = InternVLForConditionalGeneration(config).eval()
    for p in oracle.parameters():
        torch.nn.init.normal_(p, std=0.2 if p.dim() > 1 else 0.3)
    return oracle


def to_opengvlab(folder):
    """Rewrites a saved -hf folder in OpenGVLab's layout: names, fused qkv, config."""
    from safetensors.torch import load_file, save_file
    weights, out = load_file(f'{folder}/model.safetensors'), {}
    pairs = [('vision_tower.embeddings.cls_token', 'vision_model.embeddings.class_embedding'),
             ('vision_tower.embeddings.position_embeddings',
              'vision_model.embeddings.position_embedding'),
             ('vision_tower.embeddings.patch_embeddings.projection',
              'vision_model.embeddings.patch_embedding'),
             ('vision_tower.encoder.layer.', 'vision_model.encoder.layers.'), ('lambda_', 'ls'),
             ('layernorm_before', 'norm1'), ('layernorm_after', 'norm2'),
             ('attention.projection_layer', 'attn.proj'),
             ('multi_modal_projector.layer_norm', 'mlp1.0'),
             ('multi_modal_projector.linear_1', 'mlp1.1'),
             ('multi_modal_projector.linear_2', 'mlp1.3')]
    for name, tensor in weights.items():
        for a, b in pairs:
            name = name.replace(a, b)
        if 'attention.k_proj' in name or 'attention.v_proj' in name:
            continue
        if 'attention.q_proj' in name:
            hf = name.replace('vision_model.encoder.layers.', 'vision_tower.encoder.layer.')
            tensor = torch.cat([weights[hf.replace('q_proj', f'{x}_proj')] for x in 'qkv'])
            name = name.replace('attention.q_proj', 'attn.qkv')
        out[name] = tensor.contiguous()
    save_file(out, f'{folder}/model.safetensors', metadata={'format': 'pt'})
    c = json.load(open(f'{folder}/config.json'))
    llm = dict(c['text_config'], rope_theta=1e6,
               rope_scaling={'rope_type': 'dynamic', 'factor': 2.0})
    llm.pop('rope_parameters', None)
    v = c['vision_config']
    vision = dict(hidden_size=v['hidden_size'], intermediate_size=v['intermediate_size'],
                  num_hidden_layers=v['num_hidden_layers'],
                  num_attention_heads=v['num_attention_heads'], patch_size=14, image_size=56,
                  qkv_bias=True, qk_normalization=False, norm_type='layer_norm')
    json.dump(
        dict(model_type='internvl_chat', downsample_ratio=0.5, ps_version='v2', select_layer=-1,
             force_image_size=56, llm_config=llm, vision_config=vision),
        open(f'{folder}/config.json', 'w'))


def save_tiny(folder, llm='qwen2', layout='hf', spare=0, extra=(), shard_size='5GB',
              dtype=torch.float32):
    """A tiny checkpoint folder; gives the oracle."""
    tokenizer = tiny_tokenizer(extra)
    tiny_oracle(llm, spare,
                tokenizer=tokenizer).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    oracle = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer.save_pretrained(folder)
    if layout == 'opengvlab':
        to_opengvlab(folder)
    return oracle


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
    """(transformers' model, ours from its files, our tokenizer)."""
    folder = str(tmp_path_factory.mktemp('tiny'))
    oracle = save_tiny(folder)
    return oracle, MultiCoCo.from_pretrained(folder), load_tokenizer(folder)


def make_batch(config, tiles, thoughts=None, seed=0, length=12, start=5):
    """A padded batch: row b has tiles[b] tiles and, for each run in thoughts[b], that many thoughts
    and then two tokens. Gives forward's arguments with labels behind the prompt."""
    g = torch.Generator().manual_seed(seed)
    thoughts = thoughts or [()] * len(tiles)
    rows, per_tile = [], config.num_image_tokens
    for b, (P, runs) in enumerate(zip(tiles, thoughts)):
        text = torch.randint(start, 80, (length + 2 * b,), generator=g).tolist()
        ids = text[:3] + [config.image_token_id] * (P * per_tile) + text[3:]
        prompt = len(ids)
        for run in runs:
            ids += [config.latent_token_id] * run + torch.randint(start, 80,
                                                                  (2, ), generator=g).tolist()
        ids += torch.randint(start, 80, (4,), generator=g).tolist()
        labels = [-100] * prompt + [
            -100 if i == config.latent_token_id else i for i in ids[prompt:]
        ]
        rows.append(
            dict(
                input_ids=ids, labels=labels,
                pixel_values=torch.randint(0, 256, (P, 3, config.image_size, config.image_size),
                                           dtype=torch.uint8, generator=g) if P else None))
    return prepare.collate(rows)


def one_row(batch, b):
    """Row b of a batch without its padding."""
    n, ends = int(batch['attention_mask'][b].sum()), batch['num_tiles'].cumsum(0).tolist()
    tiles = batch['pixel_values'][ends[b] - int(batch['num_tiles'][b]):ends[b]]
    return dict(input_ids=batch['input_ids'][b:b + 1, :n], labels=batch['labels'][b:b + 1, :n],
                pixel_values=tiles if len(tiles) else None, num_tiles=batch['num_tiles'][b:b + 1])


def without_labels(batch):
    return {k: v for k, v in batch.items() if k != 'labels'}


def normalised(tiles):
    from torchvision.transforms.functional import normalize
    return normalize(tiles.float() / 255, IMAGE_MEAN, IMAGE_STD)


def obvious(model, row, run=None):
    """Logits [1, T, V] and thoughts of one unpadded row: for each thought in order, the whole row
    so far from scratch. `run` gives hidden states [1, t, D] of embeddings [1, t, D]; by default one
    pass of our decoder over a row without chunks."""
    def ours(x):
        return model.decode(x,
                            torch.arange(x.shape[1])[None], None,
                            [((), ())] * model.config.num_hidden_layers)
    run, ids = run or ours, row['input_ids']
    x = model.embed_text(ids)
    if row['pixel_values'] is not None:
        visual = model.embed_image(row['pixel_values']).flatten(0, 1)
        parts = iter(visual)
        x = torch.stack([
            next(parts) if i == model.config.image_token_id else e for i, e in zip(ids[0], x[0])
        ])[None]
    thoughts = []
    for p in (ids[0] == model.config.latent_token_id).nonzero()[:, 0].tolist():
        thoughts.append(run(x[:, :p])[:, -1:])
        x = torch.cat((x[:, :p], thoughts[-1], x[:, p + 1:]), 1)
    return model.language_model.lm_head(run(x)), thoughts


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


THOUGHTS = [(), (1,), (3,), (2, 1, 2)]  # none, one, three in a row, separated runs
TILES = [0, 1, 3, 1]


@pytest.fixture
def gpu(monkeypatch):
    if not has_gpu:
        pytest.skip('no GPU here')
    monkeypatch.setattr(torch.cuda, 'is_available', find_gpu)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    # torch's default is TF32 for convolutions, the patch embedding among them: 1e-3 away
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


# --------------------------------------------------------------------------------------------------
# parity with transformers

@pytest.mark.parametrize('llm', ('qwen2', 'qwen3'))
@pytest.mark.parametrize('layout', ('hf', 'opengvlab'))
def test_logits_equal_transformers(tmp_path, llm, layout):
    oracle = save_tiny(tmp_path, llm, layout,
                       dtype=torch.bfloat16)  # bf16 files, compared in float32
    model = MultiCoCo.from_pretrained(str(tmp_path))
    batch = make_batch(model.config, TILES)
    ours = model(**without_labels(batch)).logits
    theirs = oracle(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'],
                    pixel_values=normalised(batch['pixel_values'])).logits
    real = batch['attention_mask'].bool()
    assert relative(ours[real][:, :262], theirs[real]) < 1e-5
    assert (ours[real][:, :262] - theirs[real]).abs().max() < 1e-4 * theirs[real].abs().max()


def test_greedy_ids_equal_transformers(loaded):
    oracle, model, _ = loaded
    batch = make_batch(model.config, TILES, seed=3)
    with torch.no_grad():  # keep the tokens transformers does not know from winning
        model.language_model.lm_head.weight[262:] = 0
    for b in range(len(TILES)):
        row = one_row(batch, b)
        pixels = {} if row['pixel_values'] is None else dict(
            pixel_values=normalised(row['pixel_values']))
        theirs = oracle.generate(input_ids=row['input_ids'],
                                 attention_mask=torch.ones_like(row['input_ids']), **pixels,
                                 max_new_tokens=16, do_sample=False,
                                 eos_token_id=list(model.config.eos_token_ids),
                                 pad_token_id=model.config.pad_token_id)
        theirs = theirs[:, row['input_ids'].shape[1]:]
        ours = model.generate(**without_labels(batch), max_new_tokens=16)[b:b + 1, :theirs.shape[1]]
        assert ours.tolist() == theirs.tolist(), f'row {b}'


@pytest.mark.parametrize('llm', ('qwen2', 'qwen3'))
@pytest.mark.parametrize('layout', ('hf', 'opengvlab'))
def test_thoughts_equal_the_obvious_path_over_transformers(tmp_path, llm, layout):
    """The strongest oracle: our latent loop against transformers' decoder, called anew on the whole
    row for every thought."""
    oracle = save_tiny(tmp_path, llm, layout, dtype=torch.bfloat16)
    model = MultiCoCo.from_pretrained(str(tmp_path))
    batch = make_batch(model.config, TILES, THOUGHTS)
    out = model(**without_labels(batch))
    run = lambda x: oracle.model.language_model(inputs_embeds=x).last_hidden_state
    for b in range(len(TILES)):
        logits, thoughts = obvious(model, one_row(batch, b), run)
        assert relative(out.logits[b, :logits.shape[1]], logits[0]) < 1e-5
        for k, thought in enumerate(thoughts):
            assert relative(out.thoughts[b, k], thought[0, 0]) < 1e-5
        assert not out.thoughts[b, len(thoughts):].any()


# --------------------------------------------------------------------------------------------------
# the latent loop against the obvious path

def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(a, b, tolerance=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        assert b[name].norm() > 0 or name.endswith(
            'k_proj.bias') or 'blocks' in name, f'{name} has no gradient'
        assert (a[name] - b[name]).norm(
        ) <= tolerance * b[name].norm() + 1e-7, f'{name} {relative(a[name], b[name])}'


@pytest.mark.parametrize('thoughts', (THOUGHTS, [(8, )] * 4, [()] * 4),
                         ids=('mixed', 'aligned', 'none'))
def test_loop_equals_obvious_path(thoughts):
    """Logits, loss and every parameter's gradient; rows with other numbers of tiles and thoughts in
    one batch."""
    model = tiny_model()
    batch = make_batch(model.config, TILES, thoughts)
    logits = model(**without_labels(batch)).logits
    total = count = 0
    for b in range(len(TILES)):
        row = one_row(batch, b)
        slow, _ = obvious(model, row)
        assert relative(logits[b, :slow.shape[1]], slow[0]) < 1e-5
        total = total + F.cross_entropy(slow[0, :-1], row['labels'][0, 1:], reduction='sum')
        count += int((row['labels'][0, 1:] != -100).sum())
    loss = model(**batch).loss
    assert abs(loss - total / count) < 1e-5
    assert_same_gradients(gradients(model, loss), gradients(model, total / count))


def test_a_row_alone_equals_the_row_in_a_batch():
    model = tiny_model()
    batch = make_batch(model.config, TILES, THOUGHTS)
    together = model(**without_labels(batch)).logits
    for b in range(len(TILES)):
        alone = model(**without_labels(one_row(batch, b))).logits
        assert relative(together[b, :alone.shape[1]], alone[0]) < 1e-6


def test_gradient_reaches_the_first_thought():
    """Public implementations detach thoughts and do not notice. It must equal the obvious path's,
    too."""
    model = tiny_model()
    row = one_row(make_batch(model.config, [1], [(4,)]), 0)
    seen = {}
    loss = model(**row, edit_thought=lambda k, t: seen.setdefault(k, t)).loss
    assert sorted(seen) == [1, 2, 3, 4]
    fast = torch.autograd.grad(loss, seen[1])[0]
    logits, thoughts = obvious(model, row)
    slow = torch.autograd.grad(F.cross_entropy(logits[0, :-1], row['labels'][0, 1:]),
                               thoughts[0])[0]
    assert fast.norm() > 1e-4
    assert relative(fast, slow[0]) < 1e-4


def test_activation_checkpointing_changes_no_gradient():
    model = tiny_model()
    batch = make_batch(model.config, TILES, THOUGHTS)
    plain = gradients(model, model(**batch).loss)
    model.set_activation_checkpointing()
    assert_same_gradients(gradients(model, model(**batch).loss), plain, 1e-6)


@pytest.mark.parametrize('qwen3', (False, True))
def test_bfloat16_autocast_is_near_float32(qwen3):
    """Also where norms on heads give float32 and where padding skips the MLP."""
    model = tiny_model(qk_norm=qwen3, attention_bias=not qwen3)
    batch = make_batch(model.config, TILES, THOUGHTS)
    exact = model(**batch).loss
    model.set_activation_checkpointing()
    with torch.autocast('cpu', torch.bfloat16):
        rough = model(**batch).loss
    rough.backward()
    assert exact.item() != rough.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32
               for p in model.parameters())


def test_micro_batches_give_the_gradient_of_the_batch():
    """Weighted by supervised tokens; rows differ in tiles, thoughts and targets, and some parts
    hold no image."""
    model = tiny_model()
    batch = make_batch(model.config, TILES + [0], THOUGHTS + [(1,)])
    batch['labels'][1, -6:] = -100  # unequal numbers of targets
    whole = gradients(model, model(**batch).loss)
    count = lambda b: (b['labels'][:, 1:] != -100).sum()
    for rows in (1, 2, 3):
        parts = prepare.micro_batches(dict(batch), rows)
        assert len(parts) == -(-5 // rows)
        assert len(parts[-1]['pixel_values']) == (rows == 3)
        assert_same_gradients(
            gradients(model, sum(model(**p).loss * count(p) / count(batch) for p in parts)), whole,
            1e-5)


def test_edit_thought_is_what_is_fed_back():
    model = tiny_model()
    batch = without_labels(make_batch(model.config, TILES, THOUGHTS))
    clean, zeroed = model(**batch), model(**batch, edit_thought=lambda k, t: t * 0)
    assert not zeroed.thoughts.any()
    assert clean.thoughts.any()
    assert relative(clean.logits[0], zeroed.logits[0]) == 0     # row 0 has no thoughts
    assert relative(clean.logits[2], zeroed.logits[2]) > 1e-3
    pause = model(**batch, edit_thought=model.as_pause)
    x = dict(batch, input_ids=torch.where(batch['input_ids'] == LATENT, 99, batch['input_ids']))
    with torch.no_grad():  # a plain token with the same embedding
        model.language_model.model.embed_tokens.weight[
            99] = model.language_model.model.embed_tokens.weight[LATENT]
    plain = model(**x)
    assert plain.thoughts.shape[1] == 0
    real = batch['attention_mask'].bool()
    assert relative(pause.logits[real], plain.logits[real]) < 1e-5


# --------------------------------------------------------------------------------------------------
# generation

def slow_generate(model, row, steps):
    """Greedy ids without a cache: forward on the whole row for every token."""
    ids = row['input_ids']
    for _ in range(steps):
        new = model(ids, row['pixel_values']).logits[:, -1].argmax(-1)
        ids = torch.cat((ids, new[:, None]), 1)
        if new.item() in model.config.eos_token_ids:
            break
    return ids[0, row['input_ids'].shape[1]:].tolist()


@pytest.mark.parametrize('boost', (None, LATENT, EOS))
def test_cached_generation_equals_uncached(boost):
    """Also when rows end at different lengths and when the model writes <|latent|> itself."""
    ended = latents = 0
    for seed in range(3):
        model = tiny_model(seed)
        with torch.no_grad():
            model.language_model.lm_head.weight[IMG] = 0  # forward would ask for its tile
            if boost is not None:
                model.language_model.lm_head.weight[boost] *= 3
        batch = make_batch(model.config, TILES, THOUGHTS, seed=seed)
        written = model.generate(**without_labels(batch), max_new_tokens=16).tolist()
        for b, ids in enumerate(written):
            slow = slow_generate(model, one_row(batch, b), 16)
            assert ids[:len(slow)] == slow
            assert set(ids[len(slow):]) <= {PAD}
            ended, latents = ended + (slow[-1] == EOS), latents + slow.count(LATENT)
    assert boost != LATENT or latents > 5
    assert boost != EOS or 0 < ended < 12


def test_rows_that_ended_leave_the_batch():
    """Half of the rows ended: the others go on alone, with the same ids. A hook is promised all
    rows and keeps them."""
    model = tiny_model()
    with torch.no_grad():
        model.language_model.lm_head.weight[IMG] = 0
        model.language_model.lm_head.weight[EOS] *= 2.5
    batch = without_labels(make_batch(model.config, TILES * 2, THOUGHTS * 2, seed=1))
    sizes, step = [], model.decode
    model.decode = lambda x, *more, **k: sizes.append(tuple(x.shape[:2])) or step(x, *more, **k)
    left = model.generate(**batch, max_new_tokens=40)
    shrunk = sizes[:]
    kept = model.generate(**batch, max_new_tokens=40, edit_thought=lambda k, t: t)
    assert torch.equal(left, kept)
    assert len({B for B, width in shrunk}) > 1
    assert {B for B, width in sizes[len(shrunk):]} == {8}
    assert left.shape[1] == max((row != PAD).sum() for row in left)  # no column of padding alone


def test_what_generate_promises():
    """Thoughts are numbered on through the answer, each end token ends a row, and no position is
    beyond the model's."""
    model = tiny_model(eos_token_ids=(EOS, 7), max_position_embeddings=64)
    with torch.no_grad():
        model.language_model.lm_head.weight[IMG] = 0
    batch, asked = without_labels(make_batch(model.config, TILES, THOUGHTS)), []
    model.generate(**batch, max_new_tokens=4,
                   edit_thought=lambda k, thought: asked.append(k) or thought)
    assert asked == [1, 2, 3, 4, 5, 6, 7,
                     8]  # five in the prompt, then one before each further token
    with torch.no_grad():
        model.language_model.lm_head.weight.zero_()
        model.language_model.lm_head.weight[7] = 1e3 * model.language_model.model.norm.weight.sign()
        model.language_model.lm_head.weight[EOS] = -model.language_model.lm_head.weight[7]
    ends = model.generate(**batch, max_new_tokens=4)
    model.language_model.lm_head.weight.data.neg_()  # now each row ends with the other one
    others = model.generate(**batch, max_new_tokens=4)
    assert ends.shape[1] == others.shape[1] == 1
    assert set(ends.flatten().tolist()) | set(others.flatten().tolist()) == {7, EOS}
    longest = int(batch['attention_mask'].sum(1).max())
    model.generate(**batch, max_new_tokens=64 - longest)
    with pytest.raises(ValueError,
                       match=f'{longest} prompt tokens and {65 - longest} new ones exceed'):
        model.generate(**batch, max_new_tokens=65 - longest)


def test_a_compiled_step_gives_the_same_ids():
    model = tiny_model()
    batch = without_labels(make_batch(model.config, TILES, THOUGHTS))
    plain = model.generate(**batch, max_new_tokens=9)
    model.step = torch.compile(model.step, backend='aot_eager', fullgraph=True,
                               dynamic=False)  # one graph, fixed shape
    with torch.compiler.set_stance('default'):
        assert torch.equal(model.generate(**batch, max_new_tokens=9), plain)


def test_sampling():
    model = tiny_model()
    batch = without_labels(make_batch(model.config, TILES))
    draw = lambda seed, **k: model.generate(
        **batch, max_new_tokens=8, generator=torch.Generator().manual_seed(seed), **k).tolist()
    greedy = model.generate(**batch, max_new_tokens=8).tolist()
    assert draw(0, temperature=1.0) == draw(0, temperature=1.0) != draw(1, temperature=1.0)
    assert draw(0, temperature=1.0, top_p=1e-6) == greedy
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20000, 4)
    share = lambda *how: sample(logits, *how,
                                torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
    assert share(1.0, 1.0).tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    assert share(0.5, 1.0).tolist() == pytest.approx([0.685, 0.247, 0.062, 0.007],
                                                     abs=0.015)  # squares
    assert share(1.0, 0.6).tolist() == pytest.approx([0.625, 0.375, 0, 0],
                                                     abs=0.015)  # the fewest that hold 0.6
    for bad in (dict(temperature=-1), dict(top_p=0), dict(max_new_tokens=0)):
        with pytest.raises(ValueError, match='expected temperature'):
            model.generate(**batch, **bad)


# --------------------------------------------------------------------------------------------------
# fusion

def test_uint8_tiles_equal_float_tiles():
    model = tiny_model()
    batch = without_labels(make_batch(model.config, TILES, THOUGHTS))
    floats = dict(batch, pixel_values=normalised(batch['pixel_values']))
    real = batch['attention_mask'].bool()
    assert relative(model(**batch).logits[real], model(**floats).logits[real]) < 1e-6


def test_flagged_tiles_are_dropped():
    model = tiny_model()
    batch = without_labels(make_batch(model.config, [0, 1, 3]))
    expected = model(**batch).logits
    dummy = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8)
    padded = dict(batch, pixel_values=torch.cat((dummy, batch['pixel_values'])),
                  image_flags=torch.tensor([0, 1, 1, 1, 1]))
    assert torch.equal(model(**padded).logits, expected)
    assert torch.equal(model(**dict(padded, num_tiles=torch.tensor([1, 1, 3]))).logits,
                       expected)  # the dummy counted
    with pytest.raises(ValueError, match='image_flags has 2 entries for 5 tiles'):
        model(**dict(padded, image_flags=torch.tensor([0, 1])))


@pytest.mark.parametrize('with_counts', (True, False))
def test_a_mismatch_names_the_row_and_both_numbers(with_counts):
    model = tiny_model()
    batch = without_labels(make_batch(model.config, [1, 2, 1]))
    if not with_counts:
        batch['num_tiles'] = None
    short = dict(batch, input_ids=batch['input_ids'].clone())
    short['input_ids'][1, 3] = 7  # one visual token less in row 1
    with pytest.raises(ValueError, match=r'row 1 holds 7 <IMG_CONTEXT>.* (8|4) visual'):
        model(**short)
    with pytest.raises(ValueError, match=r'row 2 ends 4 tiles .* holds 3 tiles'):
        model(**dict(batch, pixel_values=batch['pixel_values'][:3]))
    with pytest.raises(ValueError, match=r'row 2 ends 4 tiles .* holds 8 tiles'):
        model(**dict(batch, pixel_values=batch['pixel_values'].repeat(2, 1, 1, 1)))
    with pytest.raises(ValueError, match=r'row 0 ends 1 tiles .* holds 0 tiles'):
        model(**dict(batch, pixel_values=None))


def test_what_stands_in_padding_counts_nothing():
    """Neither an <IMG_CONTEXT> nor any other token behind the mask."""
    model = tiny_model()
    batch = without_labels(make_batch(model.config, TILES, THOUGHTS))
    real = batch['attention_mask'].bool()
    filled = dict(batch, input_ids=torch.where(real, batch['input_ids'], IMG))
    assert not real.all()
    assert torch.equal(model(**filled).logits[real], model(**batch).logits[real])


def test_forward_refuses_what_does_not_hold_together():
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    with pytest.raises(ValueError, match='row 1 .* pad on the right'):
        model(ids, attention_mask=torch.tensor([[1, 1, 0], [0, 1, 1]]))
    with pytest.raises(ValueError, match='row 1 starts with'):
        model(torch.tensor([[5, 6], [LATENT, 6]]))
    with pytest.raises(ValueError, match='takes \\[3, 56, 56\\]'):
        model(torch.tensor([[5, IMG, IMG, IMG, IMG, 7]]), torch.zeros(1, 3, 28, 28))
    with pytest.raises(ValueError, match='supervise no token'):
        model(ids, labels=torch.full_like(ids, -100))
    with pytest.raises(ValueError, match='4 tokens, the model takes 3'):
        tiny_model(max_position_embeddings=3)(torch.tensor([[5, 6, 7, 8]]))


# --------------------------------------------------------------------------------------------------
# checkpoints and tokens

def test_tokens_are_added_once(tmp_path):
    save_tiny(tmp_path,
              extra=['<video>'])  # as the -hf tokenizers: a token without a row in the embedding
    tokenizer = load_tokenizer(str(tmp_path))
    size = len(tokenizer)
    assert size == 262 + 1 + 3
    assert len(add_special_tokens(tokenizer)) == size
    tokenizer.save_pretrained(tmp_path / 'again')
    again = load_tokenizer(str(tmp_path / 'again'))
    assert len(again) == size
    for token in SPECIAL_TOKENS:
        assert again.convert_tokens_to_ids(token) == tokenizer.convert_tokens_to_ids(token) < size
    text = f'a{"".join(SPECIAL_TOKENS)} b'
    assert again.encode(text) == tokenizer.encode(text)
    assert len(again.encode(text)) == 3 + len(SPECIAL_TOKENS)
    assert again.decode(again.encode(text), skip_special_tokens=True) == 'a b'


@pytest.mark.parametrize('spare', (0, 10))
def test_new_rows_are_the_mean(tmp_path, spare):
    """Whether the matrices have to grow or already hold spare rows, as InternVL3.5's do; embedding
    and head are untied."""
    oracle = save_tiny(tmp_path, spare=spare)
    model, tokenizer = MultiCoCo.from_pretrained(str(tmp_path)), load_tokenizer(str(tmp_path))
    new = tokenizer.convert_tokens_to_ids(['<|start-latent|>', '<|latent|>', '<|end-latent|>'])
    assert new == [262, 263, 264]
    assert model.config.vocab_size == max(262 + spare, 265)
    for ours, theirs in ((model.language_model.model.embed_tokens,
                          oracle.model.language_model.embed_tokens), (model.language_model.lm_head,
                                                                      oracle.lm_head)):
        assert torch.equal(ours.weight[:262], theirs.weight[:262])
        assert torch.allclose(ours.weight[new], theirs.weight[:262].mean(0), atol=1e-6)
        assert torch.equal(ours.weight[265:262 + spare],
                           theirs.weight[265:])  # no token's: they stay as they are


def test_sharded_bfloat16(tmp_path):
    save_tiny(tmp_path / 'one', dtype=torch.bfloat16)
    save_tiny(tmp_path / 'many', dtype=torch.bfloat16, shard_size='20KB')
    assert len([f for f in os.listdir(tmp_path / 'many') if f.endswith('.safetensors')]) > 2
    one, many = (MultiCoCo.from_pretrained(str(tmp_path / n), dtype=torch.bfloat16).state_dict()
                 for n in ('one', 'many'))
    assert all(torch.equal(one[k], many[k]) and one[k].dtype == torch.bfloat16 for k in one)
    assert one.keys() == many.keys()


def edit_files(folder, weights=None, config=None):
    from safetensors.torch import load_file, save_file
    if weights:
        tensors = {
            name: tensor.clone()
            for name, tensor in load_file(f'{folder}/model.safetensors').items()
        }
        weights(tensors)
        save_file(tensors, f'{folder}/model.safetensors', metadata={'format': 'pt'})
    if config:
        c = json.load(open(f'{folder}/config.json'))
        config(c)
        json.dump(c, open(f'{folder}/config.json', 'w'))


@pytest.mark.parametrize(
    'message, weights, config',
    (('language_model.model.norm.weight is missing',
      lambda w: w.pop('language_model.model.norm.weight'), None),
     ('extra.weight is not known', lambda w: w.update({'extra.weight': torch.zeros(1)}), None),
     (r'mlp1.1.bias is \[31\], expected \[32\]',
      lambda w: w.update({'multi_modal_projector.linear_1.bias': torch.zeros(31)}), None),
     ('only q, v is there', lambda w: w.pop('vision_tower.encoder.layer.1.attention.k_proj.weight'),
      None), (r'embed_tokens is \[262, 32\], but config.json describes \[\[300, 32\]\]', None,
              lambda c: c['text_config'].update(vocab_size=300)),
     ('its text model_type is internlm2, not qwen2 or qwen3', None,
      lambda c: c['text_config'].update(model_type='internlm2')),
     ('its vision use_qk_norm is True, not False', None,
      lambda c: c['vision_config'].update(use_qk_norm=True))))
def test_import_is_total(tmp_path, message, weights, config):
    save_tiny(tmp_path)
    edit_files(tmp_path, weights, config)
    with pytest.raises(ValueError, match=message):
        MultiCoCo.from_pretrained(str(tmp_path))


def test_a_wrong_llm_config_beside_a_right_text_config(tmp_path):
    save_tiny(tmp_path)
    edit_files(tmp_path, config=lambda c: c.update(llm_config=dict(c['text_config'], vocab_size=7)))
    assert MultiCoCo.from_pretrained(str(tmp_path)).config.vocab_size == 265


def test_a_tied_head_stays_tied(tmp_path):
    """The file holds no head; ours is the embedding, also after a step of training."""
    from safetensors.torch import load_file, save_file
    save_tiny(tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    headless = {name: tensor for name, tensor in weights.items() if 'lm_head' not in name}
    save_file(headless, tmp_path / 'model.safetensors')
    config = json.load(open(tmp_path / 'config.json'))
    json.dump(dict(config, tie_word_embeddings=True), open(tmp_path / 'config.json', 'w'))
    model = MultiCoCo.from_pretrained(str(tmp_path))
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight
    assert torch.equal(model.language_model.lm_head.weight[:262],
                       weights['language_model.model.embed_tokens.weight'])


def test_the_first_pixel_shuffle_has_its_axes_turned():
    """OpenGVLab's 'v1' leaves out the last transposition, so rows and columns of visual tokens
    change places."""
    tiles = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    v1, v2 = (tiny_model(image_size=112, ps_version=version).embed_image(tiles)
              for version in ('v1', 'v2'))
    grid = lambda x: x.unflatten(1, (4, 4))
    torch.testing.assert_close(grid(v1), grid(v2).transpose(1, 2))
    assert not torch.allclose(v1, v2)


def test_incomplete_checkpoints(tmp_path, monkeypatch):
    for name in ('a', 'b', 'c'):
        save_tiny(tmp_path / name, shard_size='20KB' if name == 'c' else '5GB')
    os.remove(tmp_path / 'a' / 'config.json')
    os.rename(tmp_path / 'b' / 'model.safetensors', tmp_path / 'b' / 'pytorch_model.bin')
    os.remove(sorted((tmp_path / 'c').glob('*.safetensors'))[1])
    for name, message in (('a', 'no config.json'), ('b', 'only safetensors'),
                          ('c', 'lacks model-00002'),
                          ('d', 'neither a folder nor a .pt file nor a hub id')):
        with pytest.raises(OSError, match=message):
            MultiCoCo.from_pretrained(str(tmp_path / name))
    damaged = tmp_path / 'b' / 'model.safetensors'
    damaged.write_bytes((tmp_path / 'b' / 'pytorch_model.bin').read_bytes()[:1000])
    with pytest.raises(ValueError, match='is damaged .* download it again'):
        MultiCoCo.from_pretrained(str(tmp_path / 'b'))
    monkeypatch.setattr('model.snapshot_download', lambda *a, **k:
                        (_ for _ in ()).throw(OSError('no route')))
    with pytest.raises(OSError, match='no folder here, .* hub .* local folder .* config/toy.py'):
        MultiCoCo.from_pretrained('some/model')


@pytest.mark.parametrize('name, content, message', (
    ('model.safetensors.index.json', '{}', 'has no weight_map'),
    ('model.safetensors.index.json', '[]', 'holds a list, expected an object'),
    ('config.json', '[]', 'holds a list, expected an object')))
def test_json_files_of_another_form(tmp_path, name, content, message):
    save_tiny(tmp_path, shard_size='20KB')
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        MultiCoCo.from_pretrained(str(tmp_path))


def test_a_tokenizer_without_endoftext_pads_with_its_own_token(tmp_path):
    """Padding is never read; only its id has to be one."""
    save_tiny(tmp_path)
    for file in ('tokenizer.json', 'tokenizer_config.json'):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text.replace('<|endoftext|>', '<|other|>'))
    model, tokenizer = MultiCoCo.from_pretrained(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert '<|endoftext|>' not in tokenizer.get_vocab()
    assert model.config.pad_token_id == tokenizer.pad_token_id


# --------------------------------------------------------------------------------------------------
# text

ROW = dict(question_id='q1', question='What flies?', choices=['cat', 'kite', 'dog',
                                                              'car'], correct_choice_idx=1,
           answer='kite', steps=['It is windy.', 'I see a string.',
                                 'It is in the sky.'], explanation='It is windy.', image='x.png')


def test_text_of_each_stage():
    prompt = ('<image>\nQuestion: What flies?\n\nChoices:\nA. cat\nB. kite\nC. dog\nD. car\n\n'
              'Let me think step by step:\n')
    end = 'The answer is B. kite'
    assert prepare.build_text(ROW,
                              0) == (prompt, 0,
                                     'It is windy.\nI see a string.\nIt is in the sky.\n' + end)
    assert prepare.build_text(ROW, 2) == (prompt, 4, 'It is in the sky.\n' + end)
    assert prepare.build_text(ROW, 4) == (prompt, 8, end)
    assert prepare.build_text(ROW, 4, pad_latent_to_max=False) == (prompt, 6, end)
    assert prepare.build_text(ROW, 3, max_latent_stage=2,
                              c_thought=1) == (prompt, 2, end)  # which drops the rest
    assert prepare.build_text(ROW, 2, mode='cot') == prepare.build_text(ROW, 0)
    assert prepare.build_text(ROW, 2, mode='no_cot') == (prompt, 0, end)
    assert prepare.build_text(ROW, 2,
                              mode='no_thoughts') == (prompt, 0, 'It is in the sky.\n' + end)
    assert prepare.build_text(ROW, 2, mode='pause') == prepare.build_text(ROW, 2)
    assert prepare.build_text(
        ROW, 0, answer='{choice} {letter}: {explanation}')[2].endswith('kite B: It is windy.')
    with pytest.raises(ValueError, match='{lettre}.*it may use'):
        prepare.build_text(ROW, 0, answer='{lettre}')
    with pytest.raises(ValueError, match="mode='coco'"):
        prepare.build_text(ROW, 0, mode='coco')


def test_text_only_rows():
    row = dict(question='Is Tom a dog?', steps=['Tom is a cat.'], answer='No.')
    assert prepare.build_text(row, 0) == (
        'Question: Is Tom a dog?\n\nLet me think step by step:\n', 0, 'Tom is a cat.\nNo.')
    assert prepare.build_text(row, 1, prompt='{question}\n', answer='### {answer}',
                              c_thought=1) == ('Is Tom a dog?\n', 1, '### No.')


def test_a_prompt_without_choices_keeps_its_question():
    """Where the choices stand in the question's own paragraph only their line goes."""
    row = dict(question='Is Tom a dog?', image='x.png')
    assert prepare.fill('<image>{question}\n{choices}\n', row) == '<image>Is Tom a dog?\n'
    assert prepare.fill(prepare.PROMPT,
                        row) == '<image>\nQuestion: Is Tom a dog?\n\nLet me think step by step:\n'
    assert prepare.fill('{question}\n\nChoices:\n{choices}\n\nA:', row) == 'Is Tom a dog?\n\nA:'
    for wrong in ('{question.x}', '{question[x]}', '{other}', '{', '{0}'):
        with pytest.raises(ValueError, match='cannot be filled'):
            prepare.fill(wrong, row)


def test_visual_bridge():
    bridge = lambda stage: prepare.build_text(ROW, stage, visual_bridge=True)
    assert bridge(0)[2].startswith('Looking at the image, It is windy.')
    assert 'Analyzing' not in bridge(0)[0]
    assert bridge(1)[0].endswith(':\nAnalyzing the visual information:\n')
    assert bridge(1)[2].startswith('I see a string.')
    assert bridge(2)[2].startswith('From what I can see, It is in the sky.')
    assert bridge(3)[2] == 'The answer is B. kite'


def test_chatml():
    prompt, _, target = prepare.build_text(ROW, 0, template='chatml')
    assert prompt.startswith('<|im_start|>system\n你是')
    assert prompt.endswith('step by step:<|im_end|>\n<|im_start|>assistant\n')
    assert '<|im_start|>user\n<image>\nQuestion' in prompt
    assert target.endswith('B. kite')
    system, user, turn = prompt.split('<|im_end|>\n')
    assert system.endswith('联合开发的多模态大语言模型。')
    assert user.startswith('<|im_start|>user\n')
    assert turn == '<|im_start|>assistant\n'


def test_encode_supervises_only_what_follows(loaded):
    _, model, tokenizer = loaded
    tiles, N = torch.zeros(2, 3, 56, 56, dtype=torch.uint8), 4
    encode = lambda stage, **k: prepare.encode(ROW, tokenizer, stage, tiles, num_image_tokens=N, **k
                                               )
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    for stage in range(4):
        row = encode(stage)
        first = next(i for i, label in enumerate(row['labels']) if label != -100)
        assert row['labels'][first:] == row['input_ids'][first:]
        assert row['labels'][-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row['labels'][first:-1]) == prepare.build_text(ROW, stage)[2]
        before = encode(stage, supervised=False)
        assert before['input_ids'] == row['input_ids'][:first]
        assert before['labels'] is None  # evaluation sends the same
        assert before['input_ids'].count(ids['<IMG_CONTEXT>']) == 2 * N
        markers = [ids['<|start-latent|>'], *[ids['<|latent|>']] * 2 * stage, ids['<|end-latent|>']]
        assert before['input_ids'][-len(markers):] == markers if stage else not set(markers) & set(
            row['input_ids'])
    with pytest.raises(ValueError,
                       match=r'row q1 needs \d+ tokens \(8 visual, 2 thoughts\), max_length is 20'):
        encode(1, max_length=20)
    with pytest.raises(ValueError,
                       match='row q1 holds 9 <IMG_CONTEXT> tokens, but its 2 tiles give 8'):
        prepare.encode(dict(ROW, question='<IMG_CONTEXT>?'), tokenizer, 0, tiles,
                       num_image_tokens=N)
    with pytest.raises(ValueError,
                       match='row q1 holds 0 <IMG_CONTEXT> tokens, but its 2 tiles give 8'):
        prepare.encode(ROW, tokenizer, 0, tiles, num_image_tokens=N, prompt='{question}')
    with pytest.raises(ValueError, match='row q1 has no answer'):
        prepare.encode({k: v
                        for k, v in ROW.items()
                        if k != 'answer'}, tokenizer, 0, tiles, num_image_tokens=N)


def test_stage_0_holds_no_thought_and_mixing_depends_on_the_row_alone(loaded):
    tokenizer = loaded[2]
    rows = [dict(ROW, image=None, question_id=str(i)) for i in range(200)]
    latent = tokenizer.convert_tokens_to_ids('<|latent|>')
    for uniform_prob in (0.0, 0.5, 1.0):
        assert all(latent not in r['input_ids']
                   for r in prepare.Rows(rows, 'train', 0, tokenizer, uniform_prob=uniform_prob))
    split = prepare.Rows(rows, 'train', 3, tokenizer, uniform_prob=0.4, seed=1, epoch=2)
    stages = [split.stage_of(i) for i in range(200)]
    assert 100 < stages.count(3) < 140
    assert set(stages) == {0, 1, 2, 3}
    assert prepare.Rows(rows[::-1], 'train', 3, tokenizer, uniform_prob=0.4, seed=1,
                        epoch=2).stage_of(0) == stages[-1]
    for other in (dict(seed=2, epoch=2), dict(seed=1, epoch=1)):
        again = prepare.Rows(rows, 'train', 3, tokenizer, uniform_prob=0.4, **other)
        assert [again.stage_of(i) for i in range(200)] != stages
    assert [r['input_ids'].count(latent) for r in split] == [2 * s for s in stages]


def test_rows_that_cannot_fit_are_known_without_their_tiles(loaded):
    tokenizer = loaded[2]
    tiles = torch.zeros(7, 3, 56, 56, dtype=torch.uint8)
    row = dict(ROW, image_size=(640, 480))
    for stage in (0, 2):
        need = len(prepare.encode(row, tokenizer, stage, tiles, num_image_tokens=4)['input_ids'])
        for most, fits in ((need, True), (need - 1, False)):
            rows = prepare.Rows([row], 'train', stage, tokenizer, image_size=56, max_length=most,
                                num_image_tokens=4)
            assert rows.fits(0) is fits
            assert rows.length(0) == need
            mixed = prepare.Rows([row], 'train', stage, tokenizer, image_size=56, max_length=most,
                                 num_image_tokens=4, uniform_prob=0.1)
            assert mixed.fits(0) is (fits and stage == 0
                                     )  # drawn to stage 0, all steps in words, the row is longer


@pytest.mark.parametrize('text, expected',
                         (('It is windy.\nThe answer is B. kite',
                           (1, True)), ('Answer: (C)', (2, True)), ('**Answer:** D', (3, True)),
                          ('blue\nkite B', (1, True)), ('B', (1, True)), ('(C).', (2, True)),
                          ('a Kite, surely', (1, True)), ('not a dog but a kite', (1, True)),
                          ('The answer is kite', (1, True)),
                          ('The answer is A. cat\nNo, the answer is D. car', (3, True)),
                          ('A person walks', (0, False)), ('carpet', (0, False)), ('', (0, False))))
def test_choice_extraction(text, expected):
    assert prepare.extract_choice(text, ROW['choices']) == expected
    assert prepare.extract_choice('a black cat',
                                  ['cat', 'black cat', 'dog', 'car']) == (1, True
                                                                          )  # the longer of two


def test_answers_are_scored(loaded):
    """Without choices by the last line; the interval is Wilson's, as tables of it have it."""
    _, model, tokenizer = loaded
    texts, row = ('Tom is a cat.\n### Yes.', '### No.', 'Yes.',
                  ''), dict(answer='Yes.', question='?')

    class Says:
        config = model.config

        def generate(self, **asked):
            ids = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts]
            return torch.tensor([i + [model.config.pad_token_id] * (40 - len(i)) for i in ids])

    batch = dict(input_ids=torch.tensor([[7, model.config.latent_token_id]] * 4))
    said = sample_script.respond(Says(), tokenizer, batch, [row] * 4, '### {answer}')
    assert [one['right'] for one in said] == [True, False, True, False]
    assert [one['exact'] for one in said] == [True, False, False, False]
    assert [one['text'] for one in said] == list(texts)
    assert [one['tokens'] for one in said] == [len(text) + 1 for text in texts]
    assert said[0]['thoughts'] == 1
    assert all(one['parsed'] for one in said)
    one = dict(tokens=1, thoughts=0, parsed=True, ended=True)
    interval = lambda right, n: sample_script.summarize(
        [dict(one, right=i < right) for i in range(n)], 1.0)['interval']
    assert interval(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert interval(500, 500) == pytest.approx([0.9924, 1], abs=1e-4)


# --------------------------------------------------------------------------------------------------
# images

@pytest.mark.parametrize('max_tiles', (1, 8, 12))
def test_tiles_equal_transformers(max_tiles):
    """Bit for bit against the PIL processor, over sizes of photographs and of no photograph."""
    processor = GotOcr2ImageProcessorPil(size=dict(height=56, width=56), crop_to_patches=True,
                                         min_patches=1, max_patches=max_tiles)
    rng = np.random.default_rng(0)
    sizes = [(640, 480), (480, 640), (500, 375), (640, 427), (612, 612), (640, 360), (640, 512),
             (1, 1), (1, 5000), (5000, 7), (56, 56), (79, 80)]
    for w, h in sizes + [tuple(rng.integers(1, 400, 2).tolist()) for _ in range(20)]:
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        theirs = processor(image, return_tensors='np', do_rescale=False, do_normalize=False,
                           input_data_format='channels_last')['pixel_values']
        ours = prepare.tile_image(image, 56, 1, max_tiles)
        assert ours.shape == theirs.shape and (ours.numpy() == theirs).all(), (w, h)
        assert len(ours) == prepare.count_tiles(w, h, 56, max_tiles=max_tiles)


def test_tile_counts_of_internvl():
    for (w, h), at_8, at_12 in (((640, 480), 7, 13), ((640, 427), 7, 7), ((612, 612), 1, 1),
                                ((640, 640), 5, 5), ((640, 512), 1, 13)):
        assert (prepare.count_tiles(w, h), prepare.count_tiles(w, h, max_tiles=12)) == (at_8, at_12)


def test_images_of_all_kinds(tmp_path):
    rng = np.random.default_rng(0)
    grey = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    rgb = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    Image.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / 'deep.png')  # 16 bits
    rgb.quantize(16).save(tmp_path / 'palette.png')
    rgb.convert('CMYK').save(tmp_path / 'cmyk.jpg')
    rgb.resize((1, 1)).save(tmp_path / 'dot.png')
    rgb.resize((1, 5000)).save(tmp_path / 'line.png')
    for name in ('deep.png', 'palette.png', 'cmyk.jpg', 'dot.png', 'line.png'):
        image = prepare.load_image(str(tmp_path / name))
        assert image.mode == 'RGB'
        assert prepare.tile_image(image, 56).shape[1:] == (3, 56, 56)
    assert np.abs(np.asarray(prepare.load_image(str(tmp_path / 'deep.png')))[..., 0] -
                  grey).max() <= 1  # not clipped
    turned = Image.new('RGB', (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / 'turned.jpg', exif=exif)
    assert prepare.load_image(str(tmp_path / 'turned.jpg')).size == (4, 8)
    rgb.save(tmp_path / 'cut.png')
    data = (tmp_path / 'cut.png').read_bytes()
    (tmp_path / 'cut.png').write_bytes(data[:len(data) // 2])
    (tmp_path / 'text.png').write_text('no image')
    for name, message in (('cut.png', 'cannot be read as an image'),
                          ('text.png', 'cannot be read as an image')):
        with pytest.raises(ValueError, match=message):
            prepare.load_image(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match='no image file'):
        prepare.load_image(str(tmp_path / 'none.png'))


def test_lengths_are_those_of_the_tokens_whatever_stands_around_the_image(tmp_path):
    """A tokenizer that merges line ends: those before and behind the image must not be counted as
    one."""
    prepare.train_tokenizer(['a\n\nb\n\nc\n\n'] * 20, str(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer.encode('\n\n')) == 1
    row = dict(ROW, image_size=(56, 56))
    text = dict(template='chatml', prompt='\n<image>\n{question}')
    tiles = torch.zeros(1, 3, 56, 56, dtype=torch.uint8)
    ids = prepare.encode(row, tokenizer, 1, tiles, num_image_tokens=4, **text)['input_ids']
    rows = prepare.Rows([row], 'train', 1, tokenizer, image_size=56, num_image_tokens=4, **text)
    assert rows.length(0) == len(ids)


def test_the_tile_cache(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3),
                                                      dtype=np.uint8)).save(tmp_path / 'a.png')
    row = dict(image='a.png', image_hash='0')
    load = lambda **k: prepare.load_tiles(row, str(tmp_path), 'train', **{**dict(size=28), **k})
    cached = lambda: sorted(
        (tmp_path / 'cache' / 'tiles' / 'train').glob('*')) if (tmp_path / 'cache').exists() else [
        ]
    plain = load(cache=False)
    assert not cached()
    assert torch.equal(load(), plain)
    assert len(cached()) == 1
    monkeypatch.setattr(prepare, 'tile_image', lambda *a: pytest.fail('tiled again'))
    assert torch.equal(load(), plain)
    monkeypatch.undo()
    assert len(load(max_tiles=1)) == 1
    assert len(cached()) == 2       # other parameters, another file
    row['image_hash'] = '1'
    load()  # another picture under the same name
    assert len(cached()) == 3
    assert not [f for f in cached() if f.suffix != '.npy']


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = str(tmp_path / 'file')
    with prepare.replacing(path) as part, open(part, 'w') as f:
        f.write('old')
    for error, message in ((OSError(28, 'No space left on device'), 'disk is full'),
                           (KeyboardInterrupt(), None)):
        with pytest.raises(type(error), match=message):
            with prepare.replacing(path) as part, open(part, 'w') as f:
                f.write('half')
                raise error
        assert open(path).read() == 'old'
        assert os.listdir(tmp_path) == ['file']
    with pytest.raises(RuntimeError, match='a bug'):  # not every error is a full disk
        with prepare.replacing(path):
            raise RuntimeError('a bug')
    monkeypatch.setattr(prepare.shutil, 'disk_usage',
                        lambda folder: type('Usage', (), dict(free=0)))
    with pytest.raises(OSError, match='disk is full'):  # as torch.save says it
        with prepare.replacing(path):
            raise RuntimeError('PytorchStreamWriter failed writing file')


RAW = dict(question_id='a', question='Q? ', choices=list('wxyz'), correct_choice_idx=2,
           rationales=['One two. Three!', 'b'])


def build_row(raw, split='train', steps_from='first', max_latent_stage=4):
    """(prepared row, None), or (None, the reason why it is dropped)."""
    try:
        row = prepare.read_row(raw, split, steps_from, max_latent_stage)
        return dict(row, question_id=prepare.name_of(raw)), None
    except prepare.Dropped as reason:
        return None, str(reason)


def test_rows_of_aokvqa():
    build = lambda split='train', steps_from='first', **k: build_row(
        dict(RAW, **k), split, steps_from, 4)
    row, _ = build()
    assert (row['question'], row['steps'], row['answer'], row['explanation']) == (
        'Q?', ['One two.', 'Three!'], 'y', 'One two.')
    assert build(steps_from='all')[0]['steps'] == ['One two. Three!', 'b']
    assert build(rationales=['one two three four five six'])[0]['steps'] == [
        'one two', 'three four', 'five', 'six'
    ]
    assert build(rationales=['one two'])[0]['steps'] == ['one', 'two']
    assert build(choices=list('vwxyz'))[0]['answer'] == 'x'
    assert build(choices=['w'])[1] == build(
        choices=list('rstuvwxyz'))[1] == 'without 2 to 8 options'
    assert build(correct_choice_idx=4)[1] == build(
        correct_choice_idx=None)[1] == 'without a valid correct_choice_idx'
    assert build(rationales=[])[0]['steps'] == build('validation', rationales=[])[0]['steps'] == []
    test_row, _ = build('test', correct_choice_idx=None, rationales=None)
    assert 'answer' not in test_row
    assert 'steps' not in test_row


def parquet(folder, split, rows):
    from datasets import Dataset, Features, Image as ImageFeature, Sequence, Value
    os.makedirs(folder, exist_ok=True)
    features = Features(image=ImageFeature(), question_id=Value('string'), question=Value('string'),
                        choices=Sequence(Value('string')), correct_choice_idx=Value('int8'),
                        rationales=Sequence(Value('string')))
    Dataset.from_list(rows,
                      features=features).to_parquet(f'{folder}/{split}-00000-of-00001.parquet')


def script(*args, fails=False):
    """Runs one of the scripts as a user would, but in this process, which saves the imports; gives
    what it printed."""
    out, err, code, argv, hook = io.StringIO(), io.StringIO(), 0, sys.argv, sys.excepthook
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = list(map(str, args))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(os.path.join(HERE, args[0]), run_name='__main__')
            except SystemExit as end:
                code = end.code
            except Exception as error:
                code = 1
                sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.argv, sys.excepthook = argv, hook
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert bool(code) == fails, out.getvalue()[-2000:] + err.getvalue()[-3000:]
    if fails:
        assert code == 1 and 'Traceback' not in err.getvalue(), err.getvalue()
        return err.getvalue().strip().splitlines()[-1]
    return out.getvalue()


def test_every_row_has_an_id_of_its_own(tmp_path):
    split = lambda *raw: prepare.prepare(dict(validation=raw), [], str(tmp_path), 'first', 4, 448,
                                         8, True)['validation']
    assert ([
        row['question_id']
        for row in split({**RAW, 'question_id': ''}, RAW, {**RAW, 'question_id': ''})
    ] == ['0', 'a', '2'])
    with pytest.raises(ValueError,
                       match='2 rows with question_id a: every row needs one of its own'):
        split(RAW, RAW)


def test_prepare_drops_counts_and_names(tmp_path):
    png = io.BytesIO()
    Image.new('RGB', (80, 60), 'red').save(png, 'PNG')
    good, cut = (dict(bytes=b, path=None)
                 for b in (png.getvalue(), png.getvalue()[:len(png.getvalue()) // 2 + 20]))
    rows = [dict(RAW, question_id=f'good{i}', image=good) for i in range(4)]
    rows += [
        dict(RAW, question_id='one', image=good, choices=['w']),
        dict(RAW, question_id='cut', image=cut),
        dict(RAW, question_id='range', image=good, correct_choice_idx=7),
        dict(RAW, question_id='text', image=dict(bytes=b'no', path=None))
    ]
    parquet(tmp_path / 'in', 'train', rows)
    parquet(tmp_path / 'in', 'validation', rows[:2])
    args = [
        'prepare.py', '--dataset', tmp_path / 'in', '--data_dir', tmp_path / 'out',
        '--image_size=28', '--max_tiles=4', '--init_from=scratch'
    ]
    said = script(*args)
    assert 'dropped 1 rows without 2 to 8 options: one' in said
    assert 'dropped 1 rows without a valid correct_choice_idx: range' in said
    assert 'dropped 2 rows with an unreadable image: text' in said
    assert 'cut (' in said
    assert 'train: 4 rows of 8' in said
    kept = prepare.read_split(str(tmp_path / 'out'), 'train')
    assert [r['question_id'] for r in kept] == [f'good{i}' for i in range(4)]
    files = {f: f.stat().st_mtime_ns for f in (tmp_path / 'out').rglob('*.npy')}
    assert len(files) == 6
    script(*args)  # again: nothing is tiled anew
    assert files == {f: f.stat().st_mtime_ns for f in (tmp_path / 'out').rglob('*.npy')}
    from datasets import Dataset
    (tmp_path / 'other').mkdir()
    Dataset.from_list([dict(a=1)] * 2).to_parquet(f'{tmp_path}/other/train.parquet')
    assert 'has no column question but a: rows are read by the names question, image, ' in script(
        'prepare.py', '--dataset', tmp_path / 'other', '--data_dir', tmp_path / 'o2',
        '--init_from=scratch', fails=True)
    parquet(tmp_path / 'empty', 'train', rows[4:])
    assert ' holds no usable row of ' in script('prepare.py', '--dataset', tmp_path / 'empty',
                                                     '--data_dir', tmp_path / 'o2',
                                                     '--init_from=scratch', fails=True)
    assert 'holds no train' in script('prepare.py', '--dataset', tmp_path / 'out', '--data_dir',
                                      tmp_path / 'o2', '--init_from=scratch', fails=True)


# --------------------------------------------------------------------------------------------------
# what people bring

def test_code_of_a_checkpoint_folder_is_never_run(tmp_path, monkeypatch):
    """OpenGVLab's folders name code of their own, and transformers' Auto classes ask to run it;
    here nothing asks."""
    save_tiny(tmp_path, layout='opengvlab')
    code = f"open({str(tmp_path / 'RAN')!r}, 'w')\n"
    for module in ('configuration_x', 'modeling_x', 'tokenization_x'):
        (tmp_path / f'{module}.py').write_text(code)
    edit_files(
        tmp_path,
        config=lambda c: c.update(auto_map=dict(AutoConfig='configuration_x.C', AutoModel=
                                                'modeling_x.M', AutoTokenizer='tokenization_x.T')))
    path = tmp_path / 'tokenizer_config.json'
    for named in (dict(auto_map=dict(AutoTokenizer=['tokenization_x.T', None])),
                  dict(tokenizer_class='T')):
        path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
        monkeypatch.setattr('builtins.input', lambda *a: pytest.fail('asked'))
        began = time.time()
        MultiCoCo.from_pretrained(str(tmp_path))
        assert len(load_tokenizer(str(tmp_path))) == 265
        assert time.time() - began < 10  # transformers waits 15 s for an answer
        assert not (tmp_path / 'RAN').exists()


@pytest.mark.parametrize(
    'changes, field, expected',
    ((dict(rationales='It is windy. A string goes up.'), 'steps',
      ['It is windy.', 'A string goes up.']),
     (dict(rationales="['One two. Three!', 'b']"), 'steps', ['One two.', 'Three!']),
     (dict(rationales=['1. One.\n2. Two.']), 'steps', ['One.', 'Two.']),
     (dict(rationales=['Dr. Smith came at 5 p.m. to St. Louis. He left.']), 'steps',
      ['Dr. Smith came at 5 p.m. to St. Louis.', 'He left.']),
     (dict(rationales=['天上有风。线往上走。']), 'steps',
      ['天上有风。', '线往上走。']),
     (dict(rationales=None, steps='One.\nTwo two. Three.'), 'steps',
      ['One.', 'Two two.', 'Three.']),
     (dict(steps=[1, 2.0, 2.5]), 'steps', ['1', '2', '2.5']),
     (dict(steps=['One\ntwo.\n', '', None, ' Three. ']), 'steps', ['One two.', 'Three.']),
     (dict(correct_choice_idx='1'), 'correct_choice_idx', 1),
     (dict(correct_choice_idx=1.0), 'correct_choice_idx', 1),
     (dict(correct_choice_idx='B'), 'correct_choice_idx', 1),
     (dict(correct_choice_idx='1.0'), 'correct_choice_idx', 1),
     (dict(correct_choice_idx=None, answer='x'), 'correct_choice_idx', 1),
     (dict(correct_choice_idx=float('nan'), answer='(B)'), 'correct_choice_idx', 1),
     (dict(correct_choice_idx=None, answer='X '), 'correct_choice_idx', 1),
     (dict(correct_choice_idx=None, answer='b', choices=list('cabd')), 'correct_choice_idx', 2),
     (dict(correct_choice_idx=1, answer='x'), 'answer', 'x'),
     (dict(choices="['w', 'x', 'y']"), 'choices', ['w', 'x', 'y']),
     (dict(choices=[3, 4.0, 5]), 'choices', ['3', '4', '5']),
     (dict(choices=[' w', 'x ', 'y']), 'choices', [' w', 'x ', 'y']),
     (dict(choices=[' w', 'x ', ' y']), 'answer', 'y'),
     (dict(choices=None, answer=18), 'answer', '18'),
     (dict(choices=[], answer=18.0), 'answer', '18'),
     (dict(question='a\r\nb'), 'question', 'a\nb'),
     (dict(question_id=None, idx=7), 'question_id', '7'),
     (dict(question_id=3.0), 'question_id', '3')))
def test_obvious_conversions(changes, field, expected):
    row, reason = build_row(dict(RAW, **changes), 'train')
    assert reason is None
    assert row[field] == expected


@pytest.mark.parametrize(
    'changes, reason',
    ((dict(question=None), 'without a question'), (dict(question=' '), 'without a question'),
     (dict(question=['a', 'b']), 'whose question is list, not text'),
     (dict(choices='w or x'), 'without 2 to 8 options'),
     (dict(choices=dict(A='w', B='x')), 'whose choices is dict'),
     (dict(choices=['w', '', 'y']), 'with an empty option'),
     (dict(choices=['w', None, 'y']), 'with an empty option'),
     (dict(choices="['w' 'x' 'y']"), 'whose choices is a list without commas'),
     (dict(correct_choice_idx=-2), 'without a valid correct_choice_idx'),
     (dict(correct_choice_idx=0.5), 'without a valid correct_choice_idx'),
     (dict(correct_choice_idx=True), 'without a valid correct_choice_idx'),
     (dict(correct_choice_idx=float('inf')), 'without a valid correct_choice_idx'),
     (dict(correct_choice_idx=None, answer='q'), 'whose answer is none of its options'),
     (dict(correct_choice_idx=None, answer='A', choices=list('cabd')),
      'whose answer is several of its options'),
     (dict(correct_choice_idx=0, answer='x'), 'whose answer and correct_choice_idx disagree'),
     (dict(choices=None, answer=None), 'without an answer'),
     (dict(choices=None, answer=True), 'whose answer is bool'),
     (dict(steps=[dict(text='a')]), 'whose steps is dict, not text'),
     (dict(rationales=7), 'whose rationales is int'),
     (dict(question='<image>\nWhat?'), 'whose own text holds <image>'),
     (dict(steps=['so <|latent|>']), r'whose own text holds <\|latent\|>'),
     (dict(choices=['w', 'x<|im_end|>', 'y']), r'whose own text holds <\|im_end\|>'),
     (dict(question='a \ud83d?'), 'whose text is not valid Unicode')))
def test_rows_that_cannot_be_used_are_dropped_with_the_reason(changes, reason):
    row, said = build_row(dict(RAW, **changes), 'train')
    assert row is None
    assert re.match(reason, said)


def test_rows_without_steps_have_every_thought():
    """Nobody knows how many their steps would ask for; a question of sample.py's is like that
    too."""
    for row in (dict(ROW, steps=[]), {key: value for key, value in ROW.items() if key != 'steps'}):
        for stage in range(3):
            assert prepare.build_text(row, stage, pad_latent_to_max=False)[1] == 2 * stage


def prepared(folder, dataset, *more, fails=False):
    return script('prepare.py', '--dataset', dataset, '--data_dir', folder, '--init_from=scratch',
                  '--image_size=28', '--max_tiles=4', *more, fails=fails)


def own_rows(folder, name, count=4, **more):
    """A .jsonl of rows with pictures beside it."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        Image.new('RGB', (40, 30), (20 * i, 90, 90)).save(folder / f'{i}.png')
        rows.append({
            **dict(question=f'What is {i}?', answer='a cat', steps=['It has fur.']),
            'image_path': f'{i}.png',
            **{key: value(i) if callable(value) else value for key, value in more.items()}
        })
    (folder / name).write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folder / name


@pytest.mark.parametrize('train, validation',
                         (('mine_train', 'mine_val'), ('mine-train', 'mine-dev'),
                          ('train', 'valid'), ('own_val_train', 'own_val_val'),
                          ('mine.train.v2', 'mine.validation.v2')))
def test_a_files_companions_are_its_other_splits(tmp_path, train, validation):
    dataset = own_rows(tmp_path / 'in', f'{train}.jsonl')
    own_rows(tmp_path / 'in', f'{validation}.jsonl', 2)
    own_rows(tmp_path / 'in', 'another_test.jsonl', 2)
    said = prepared(tmp_path / 'out', dataset)
    assert 'train: 4 rows of 4' in said
    assert 'validation: 2 rows of 2' in said
    assert 'not used, 1 more files there: another_test.jsonl' in said
    assert all('image' in row for row in prepare.read_split(str(tmp_path / 'out'), 'train'))


@pytest.mark.parametrize('other', ('犬_test.jsonl', 'test_猫.jsonl'))
def test_files_of_another_name_are_no_companions(tmp_path, other):
    dataset = own_rows(tmp_path / 'in', '猫_train.jsonl')
    own_rows(tmp_path / 'in', other, 2)
    assert f'not used, 1 more files there: {other}' in prepared(tmp_path / 'out', dataset)


def test_validation_rows_are_held_out_beside_a_test_file_too(tmp_path):
    dataset = own_rows(tmp_path / 'in', 'mine_train.jsonl')
    own_rows(tmp_path / 'in', 'mine_test.jsonl', 2)
    said = prepared(tmp_path / 'out', dataset)
    assert 'its last 1 rows are held out' in said
    for split, count in (('train', 3), ('validation', 1), ('test', 2)):
        assert len(prepare.read_split(str(tmp_path / 'out'), split)) == count


def test_parquet_files_by_a_word_of_their_name_or_folder(tmp_path):
    png = io.BytesIO()
    Image.new('RGB', (40, 30)).save(png, 'PNG')
    rows = [
        dict(RAW, question_id=str(i), image=dict(bytes=png.getvalue(), path=None)) for i in range(4)
    ]
    parquet(tmp_path / 'in' / 'train', '0000', rows)
    parquet(tmp_path / 'in', 'dev', rows[:2])
    parquet(tmp_path / 'in', 'train_dev', rows)     # which of the two cannot be told
    parquet(tmp_path / 'in', 'latest', rows)        # no word of it is a split
    said = prepared(tmp_path / 'out', tmp_path / 'in')
    assert 'train: 4 rows of 4' in said
    assert 'validation: 2 rows of 2' in said
    assert re.search(r'not used, 2 more files there: .*latest-.*train_dev-', said)


def test_what_is_not_used_is_named(tmp_path):
    dataset = own_rows(tmp_path / 'in', 'mine.jsonl', 4, picture='x.png', image_2='1.png')
    said = prepared(tmp_path / 'out', dataset)
    assert 'columns not used: picture, image_2' in said
    assert 'no validation rows beside' in said
    (tmp_path / 'in' / 'chat.jsonl').write_text(
        '{"image": "0.png", "conversations": [{"from": "human"}]}\n' * 3)
    said = prepared(tmp_path / 'out2', tmp_path / 'in' / 'chat.jsonl', fails=True)
    assert 'has no column question but conversations: rows are read by the names ' in said


def test_rows_without_the_picture_that_others_have(tmp_path):
    paths = [
        '0.png', None, 'none.png', ['0.png', '1.png'], 'notes.txt', '', ['3.png'],
        dict(url='3.png')
    ]
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'notes.txt').write_text('no picture')
    dataset = own_rows(tmp_path / 'in', 'mine_train.jsonl', 8, image=lambda i: paths[i],
                       image_path=None)
    own_rows(tmp_path / 'in', 'mine_val.jsonl', 2)
    said = prepared(tmp_path / 'out', dataset)
    assert 'dropped 2 rows without the image that other rows have: 1, 5' in said
    assert 'dropped 1 rows whose image file is not there: 2 (none.png)' in said
    assert 'dropped 1 rows with 2 images, where one is used: 3' in said
    assert 'dropped 1 rows whose image has neither bytes nor path: 7' in said
    assert 'dropped 1 rows with an unreadable image: 4 (it cannot be read as an image' in said
    assert 'train: 2 rows of 8' in said


def test_an_earlier_preparation_leaves_nothing(tmp_path):
    """A test split that the new data set has not would be reported as its own."""
    one = own_rows(tmp_path / 'one', 'mine_train.jsonl')
    own_rows(tmp_path / 'one', 'mine_test.jsonl')
    prepared(tmp_path / 'out', one)
    assert (tmp_path / 'out' / 'test.jsonl').exists()
    before = {path: path.read_text() for path in (tmp_path / 'out').glob('*.jsonl')}
    bad = own_rows(tmp_path / 'bad', 'mine_train.jsonl')
    own_rows(tmp_path / 'bad', 'mine_val.jsonl', question=None)
    assert 'validation holds no usable row of 4' in prepared(tmp_path / 'out', bad, fails=True)
    assert before == {path: path.read_text()
                      for path in (tmp_path / 'out').glob('*.jsonl')}  # nothing half-written
    said = prepared(tmp_path / 'out', own_rows(tmp_path / 'two', 'mine_train.jsonl'))
    assert 'test.jsonl, which an earlier preparation had left' in said
    assert not (tmp_path / 'out' / 'test.jsonl').exists()


def test_two_rows_never_share_a_file(tmp_path):
    """Ids that differ in signs, in case, or beyond what a file system takes."""
    ids = ['a/b', 'a_b', 'A_B', 'é', 'ü', 'x' * 300 + '1', 'x' * 300 + '2', '../up']
    dataset = own_rows(tmp_path / 'in', 'mine_train.jsonl', 8, question_id=lambda i: ids[i])
    own_rows(tmp_path / 'in', 'mine_val.jsonl', 2)
    prepared(tmp_path / 'out', dataset)
    rows = prepare.read_split(str(tmp_path / 'out'), 'train')
    assert [row['question_id'] for row in rows] == ids
    assert len({row['image'].lower() for row in rows}) == 8
    for i, row in enumerate(rows):
        assert (tmp_path / 'out' / row['image']).read_bytes() == (tmp_path / 'in' /
                                                                  f'{i}.png').read_bytes()


@pytest.mark.parametrize('name, content, message',
                         (('a.json', '[{"question": "é"}]'.encode('latin-1'), 'is not UTF-8 text'),
                          ('a.jsonl', b'{"question": "a"}\n{"question": \n',
                           r'neither a JSON list nor a JSON row a line \(line 2'),
                          ('a.json', b'{"data": []}', r'is not a list of rows \(it is one dict'),
                          ('a.jsonl', b'{"question": 1}\n[1]\n', 'row 2 is no'),
                          ('a.csv', b'question\n', 'is not a .jsonl, .json or .parquet'),
                          ('a.jsonl', b'{"question": "a", "answer": "b"}', 'holds 1 row'),
                          ('a.json', b'[]', 'holds 0 row')))
def test_files_that_hold_no_rows(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert re.search(message, prepared(tmp_path / 'out', tmp_path / name, fails=True))
    assert not list((tmp_path / 'out').glob('*.jsonl'))


def test_a_byte_order_mark_and_lines_under_either_name(tmp_path):
    lines = own_rows(tmp_path / 'in', 'mine.jsonl').read_text()
    (tmp_path / 'in' / 'lines.json').write_text('\ufeff' + lines, encoding='utf-8')
    assert 'train: 3 rows of 3' in prepared(tmp_path / 'out', tmp_path / 'in' / 'lines.json')


K = ['cat', 'kite', 'dog', 'car']
SAID = {  # option -> texts that say it; None: texts that say none, or several
    0: [
        'A', 'a', '(a)', 'A cat', 'I am a cat', 'The answer is A because B is wrong', 'A. cat',
        'cat', 'Cats.'
    ], 1: [
        'B.', 'answer: b', 'B, because A is wrong', 'The answer is A. Wait, the answer is B.',
        'Final answer: A kite', 'There is a dog. The answer is B. kite',
        'Step 1: a dog is seen.\nStep 2: the car is red.\nB. kite',
        'A. cat\nB. kite\nC. dog\nD. car\n\nThe answer is B', 'blue\nkite B',
        'not a dog but a kite', 'The answer is not the dog, it is B', 'Answer: B (not A)',
        'I do not see a dog so the answer is B', 'A. cat is wrong.\nB. kite.'
    ], 2: [
        'The answer is A. Wait, no. It is C.', 'Is the answer A? No, it is C.',
        'The answer is C; D is wrong', '**C**', '\\boxed{C}', '$\\boxed{\\text{C}}$',
        '<answer>C</answer>', '<think>A or B?</think>C', '答案是C', '选C', 'Ｃ', 'Option C.',
        'C is correct. The kite is not.', 'La réponse est C', 'Ответ: C',
        'dog (C)', 'It is a dog',
        'C. dog\n\nThe car is only in the background.', 'The answer is (C) dog, not car', '- C',
        '[[C]]', '"c"'
    ], 3: [
        'D', '#### D', '### D', 'Therefore, the answer is: **(D) car**', 'Answer\nD',
        "I'd go with D", 'D – car', 'D, car', 'It is not C, it is D.',
        'Option A is wrong. Option D is right.', 'Answer: the car', 'D.\n\nBecause of the wheels.'
    ], None: [
        '', "I don't think the answer is A.", 'The wrong answer is A.',
        'The answer is A, possibly C.', 'The answer is A (or maybe C).',
        'Is the answer A?  I do not know.', 'You might think the answer is A.', '.', 'The', 'Z',
        'E', 'The answer is E. bird', 'A kite flies.\nThe answer is E. bird', 'I do not know',
        'A or B', 'A/B', 'A, B', '(A) or (C)', 'AB', 'A B C D', 'A. cat B. kite C. dog D. car',
        'cat or dog', 'B. dog', 'dog A', 'not A', 'Neither A nor B', 'The dog sits in the car.',
        'It has a lot of vitamin C', 'carpet', 'hotdog', 'He is in Plan B', 'None of the above',
        "The answer isn't A", 'The answer A. cat is wrong', 'I don´t think the answer is A.',
        'A+', 'C#', 'B-52', 'D.C.', 'A.M.', 'It is not a car.'
    ]
}


@pytest.mark.parametrize('option', SAID)
def test_answers_are_read_only_where_they_say_an_option(option):
    expected = (0, False) if option is None else (option, True)
    read = {text: prepare.extract_choice(text, K) for text in SAID[option]}
    assert read == dict.fromkeys(read, expected)


@pytest.mark.parametrize(
    'text, choices, expected',
    (('vitamin C', ['vitamin B', 'vitamin C', 'vitamin D', 'vitamin A'], 1),
     ('C++', ['Java', 'C++', 'C', 'Go'], 1),
     ('The answer is A-frame', ['tent', 'A-frame', 'igloo', 'yurt'], 1),
     ('a kite', ['a', 'kite', 'b', 'c'], 1), ('The answer is A', ['B', 'A', 'D', 'C'], 0),
     ('The answer is a', ['c', 'a', 'd', 'b'], 1), ('12', ['1', '2', '12', '21'], 2),
     ('1.5', ['1', '1.5', '5', '15'], 1), ('-5', ['5', '-5', '15', '25'], 1),
     ('3.', ['1', '2', '3', '4'], 2), ('$50', ['$5', '5', '$50', '50'], 2),
     ('not sure', ['no', 'not sure', 'yes'], 1), ('No, there is none', ['yes', 'no'], 1),
     ('No doubt: yes', ['yes', 'no'], None), ('no B', ['yes', 'no'], 1),
     ('The answer is 2 + 2 = 4.', ['1', '2', '3', '4'], 3),
     ('The answer is 5%', ['5', '6', '7', '8'], None),
     ('The answer is −3', ['3', '-3', '4', '-4'], 1), ('There is no dog', ['yes', 'no'], None),
     ('red, white and blue', ['red', 'white', 'red, white and blue', 'blue'], 2),
     ('E', list('vwxyz'), 4), ('a black cat', ['cat', 'black cat', 'dog', 'car'], 1),
     ('t-shirt', ['t shirt', 'shirt', 'hat', 'shoe'], 0),
     ('不是狗', ['猫', '风筝', '狗', '车'], None),
     ('图中有一只狗。', ['猫', '风筝', '狗', '车'], 2),
     ('cafe\u0301', ['caf\u00e9', 'bar', 'inn', 'pub'], 0),
     ('ﬁsh', ['fish', 'dog', 'cat', 'car'], 0),
     ('The answer is 10².', ['102', '10²', '1', '2'], 1)))
def test_letters_and_names_inside_options(text, choices, expected):
    assert prepare.extract_choice(text, choices) == ((0, False) if expected is None else
                                                     (expected, True))


def test_text_that_ran_out_is_no_answer_unless_it_said_one():
    for text, expected in (('The answer is B', None), ('B. ki', None), ('Option A is a cat, which',
                                                                        None),
                           ('The answer is B. kite\n\nA kite is a toy that',
                            1), ('Answer: C\nbecause', 2)):
        found = prepare.extract_choice(text, K, '{letter}', ended=False)
        assert found == ((0, False) if expected is None else (expected, True)), text


@pytest.mark.parametrize(
    'template',
    (prepare.ANSWER, '{choice} {letter}', '{letter}', '{choice}', '<answer>{letter}</answer>',
     '\\boxed{{{letter}}}', '{letter}, because {explanation}', '{letter}. {choice}\n{explanation}',
     '答案是{letter}', '{explanation} So {letter}', 'It is {choice}\n'))
def test_the_recipes_own_text_is_read_back(template):
    """Whatever the options are, also where a letter or a name alone would be taken for another
    option."""
    for choices in (K, list('cadb'), ['vitamin B', 'vitamin C', 'vitamin D',
                                      'vitamin A'], ['C', 'C++', 'C#',
                                                     'D'], ['yes', 'no', 'A and B', 'B only'],
                    ['The answer is A', 'B is it', 'Both A and B', 'None of A, B']):
        for right in range(4):
            row = dict(ROW, choices=choices, correct_choice_idx=right, answer=choices[right])
            prepare.check_round_trip([row], template)


def test_unread_is_wrong_and_equal_options_are_both_right(loaded):
    """The file for the official scorer holds options as the data set spells them, and A where none
    was read."""
    _, model, tokenizer = loaded
    texts = ['D', 'no idea', 'C', 'A']
    row = dict(question='?', choices=[' cat', 'kite', 'cat', 'car '], correct_choice_idx=0,
               answer='cat')

    class Says:
        config = model.config

        def generate(self, **asked):
            ids = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts]
            return torch.tensor([i + [model.config.pad_token_id] * (20 - len(i)) for i in ids])

    batch = dict(input_ids=torch.tensor([[7]] * 4))
    said = sample_script.respond(Says(), tokenizer, batch, [row] * 4, '{letter}')
    assert [one['parsed'] for one in said] == [True, False, True, True]
    assert [one['right'] for one in said] == [False, False, True, True]
    assert [one['option'] for one in said] == ['car ', ' cat', 'cat', ' cat']
    metrics = sample_script.summarize(said, 1.0)
    assert (metrics['accuracy'], metrics['accuracy_default_a'], metrics['unparsed']) == (0.5, 0.75,
                                                                                         1)


@pytest.mark.parametrize(
    'said, known, right',
    (('1,000', '1000', True), ('18.', '18', True), ('No', 'No.', True), ('the cat', 'a cat', True),
     ('two', '2', True), ('T-shirt', 't shirt', True),
     ('Tom is a lempus. ', 'Tom is a lempus.', True), ('18 apples', '18', False),
     ('-5', '5', False), ('1.5', '15', False), ('18.0', '18', True), ('−5', '-5', True),
     ('C++', 'C', False), ('vitamin A', 'vitamin', False), ('not a cat', 'a cat', False),
     ('', 'a', False), ('#### 18', '18', True)))
def test_free_answers_are_compared_as_in_vqa(said, known, right):
    assert prepare.free_answer_is(said, dict(question='?', answer=known), '{answer}')[0] is right


def change_config(**changes):
    """A change of config.json: part__key=value, None for no such key."""
    def change(c):
        for name, value in changes.items():
            part, _, key = name.rpartition('__')
            found = c[part] if part else c
            found.pop(key, None)
            if value is not None:
                found[key] = value
    return change


def assert_config_is_refused(folder, message, changes):
    edit_files(folder, config=change_config(**changes))
    with pytest.raises(ValueError, match=message):
        MultiCoCo.from_pretrained(str(folder))


@pytest.mark.parametrize(
    'message, changes',
    (('its rope is yarn',
      dict(text_config__rope_parameters=None, text_config__rope_scaling=dict(
          type='yarn', factor=4.0))),
     ('its rope is linear',
      dict(text_config__rope_parameters=dict(rope_type='linear', factor=2.0, rope_theta=1e4))),
     ('its rope is another one in each kind of layer',
      dict(text_config__rope_parameters=dict(
          full_attention=dict(rope_type='default', rope_theta=1e4)))),
     ('partial_rotary_factor is 0.5', dict(text_config__partial_rotary_factor=0.5)),
     ('text hidden_act is gelu, not silu', dict(text_config__hidden_act='gelu')),
     ('sliding_window of 64',
      dict(text_config__use_sliding_window=True, text_config__sliding_window=64,
           text_config__layer_types=None, text_config__max_window_layers=0)),
     ('projector_hidden_act is silu', dict(projector_hidden_act='silu')),
     ('vision hidden_act is quick_gelu', dict(vision_config__hidden_act='quick_gelu')),
     ('vision_feature_layer is -2, not -1', dict(vision_feature_layer=-2)),
     ('select_strategy is full', dict(vision_feature_select_strategy='full')),
     ('has no bias', dict(vision_config__attention_bias=False)),
     ('text is_causal is False', dict(text_config__is_causal=False)),
     ('use_mean_pooling is False', dict(vision_config__use_mean_pooling=False)),
     ('use_absolute_position_embeddings is False',
      dict(vision_config__use_absolute_position_embeddings=False)),
     ('quantization_config is ', dict(quantization_config=dict(quant_method='awq'))),
     ('use_llm_lora is 16, not 0', dict(use_llm_lora=16)), ('lacks vision hidden_size, ',
                                                            dict(vision_config=None)),
     ('lacks text num_key_value_heads:', dict(text_config__num_key_value_heads=None))))
def test_config_values_that_change_the_result_are_refused_by_name(tmp_path, message, changes):
    save_tiny(tmp_path)
    assert_config_is_refused(tmp_path, message, changes)


def with_prefix(weights):
    """Names as transformers holds them in memory."""
    for name in list(weights):
        ours = name.replace('language_model.model.',
                            'language_model.').replace('language_model.lm_head', 'lm_head')
        weights[ours if ours.startswith('lm_head') else f'model.{ours}'] = weights.pop(name)


def with_buffers(weights):
    weights['language_model.model.rotary_emb.inv_freq'] = torch.ones(4)
    weights['vision_tower.embeddings.position_ids'] = torch.arange(17)[None]


def without_head(weights):
    del weights['language_model.lm_head.weight']


@pytest.mark.parametrize(
    'weights, changes',
    ((None, dict(vision_config__layer_norm_eps=1e-2)), (None, dict(text_config__rms_norm_eps=1e-2)),
     (None, {f'text_config__{key}': value
             for key, value in rope(100.0).items()}),
     (None, dict(downsample_ratio=None, projector_hidden_act=None)), (with_prefix, {}),
     (with_buffers, {}),
     (without_head, dict(tie_word_embeddings=None, text_config__tie_word_embeddings=True)),
     pytest.param(
         without_head, dict(tie_word_embeddings=True, text_config__tie_word_embeddings=False),
         marks=pytest.mark.skipif(not FIVE, reason='transformers 4 goes by the text config')),
     (None, dict(tie_word_embeddings=None, text_config__tie_word_embeddings=None))))
def test_what_transformers_loads_gives_the_same_logits(tmp_path, weights, changes):
    oracle = save_tiny(tmp_path)
    edit_files(tmp_path, weights, change_config(**changes))
    oracle = InternVLForConditionalGeneration.from_pretrained(str(tmp_path)).eval()
    model = MultiCoCo.from_pretrained(str(tmp_path))
    ids = torch.randint(0, 250, (1, 20), generator=torch.Generator().manual_seed(0))
    ids[0, 3:7] = model.config.image_token_id
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = model(ids, pixels).logits[..., :262], oracle(input_ids=ids,
                                                                    pixel_values=pixels).logits
    assert relative(ours, theirs) < 1e-5


def test_a_head_that_is_not_there_and_not_tied_is_missed(tmp_path):
    save_tiny(tmp_path)
    edit_files(tmp_path, without_head,
               change_config(tie_word_embeddings=False, text_config__tie_word_embeddings=True))
    with pytest.raises(ValueError, match='lm_head.weight is missing'):
        MultiCoCo.from_pretrained(str(tmp_path))


def test_a_silent_config_means_what_its_class_does(tmp_path):
    """OpenGVLab's has the first pixel shuffle where ps_version is not given."""
    save_tiny(tmp_path, layout='opengvlab')
    edit_files(tmp_path, config=change_config(ps_version=None))
    assert MultiCoCo.from_pretrained(str(tmp_path)).config.ps_version == 'v1'
    edit_files(tmp_path, config=change_config(vision_config__norm_type=None))
    with pytest.raises(ValueError, match='its vision norm_type is rms_norm, not layer_norm'):
        MultiCoCo.from_pretrained(str(tmp_path))


def test_files_beside_the_weights(tmp_path):
    """A single file goes before an index that was left; a pointer, an adapter and a cut config are
    named."""
    save_tiny(tmp_path)
    (tmp_path /
     'model.safetensors.index.json').write_text('{"weight_map": {"a": "gone.safetensors"}}')
    MultiCoCo.from_pretrained(str(tmp_path))
    config = (tmp_path / 'config.json').read_text()
    (tmp_path / 'config.json').write_text(config[:100])
    with pytest.raises(ValueError, match='config.json is not a whole JSON file'):
        MultiCoCo.from_pretrained(str(tmp_path))
    os.remove(tmp_path / 'config.json')
    (tmp_path / 'adapter_config.json').write_text('{}')
    with pytest.raises(OSError, match='LoRA adapter alone'):
        MultiCoCo.from_pretrained(str(tmp_path))
    (tmp_path / 'config.json').write_text(config)
    (tmp_path / 'model.safetensors'
     ).write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
    with pytest.raises(ValueError, match='git lfs pull'):
        MultiCoCo.from_pretrained(str(tmp_path))
    for name in ('tokenizer.json', 'vocab.json'):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(OSError, match='neither tokenizer.json nor vocab.json'):
        load_tokenizer(str(tmp_path))


def in_memory(image, kind='PNG', **how):
    data = io.BytesIO()
    image.save(data, kind, **how)
    return data.getvalue()


@pytest.mark.parametrize('mode, kind', (('RGBA', 'PNG'), ('LA', 'PNG'), ('P', 'PNG'),
                                        ('RGBA', 'WEBP'), ('RGBA', 'GIF')))
def test_what_is_transparent_is_shown_over_white(mode, kind):
    """A black drawing on transparent black ground would be black on black."""
    image = Image.new('LA' if mode == 'LA' else 'RGBA', (40, 30), (0, 0) if mode == 'LA' else
                      (0, 0, 0, 0))
    image.paste((0, 255) if mode == 'LA' else (0, 0, 0, 255), (10, 10, 30, 20))
    image = image.quantize(4) if mode == 'P' else image
    shown = prepare.load_image(
        in_memory(image, kind, **(dict(lossless=True, exact=True) if kind == 'WEBP' else {})))
    assert shown.getpixel((2, 2)) == (255, 255, 255)
    assert shown.getpixel((20, 15)) == (0, 0, 0)


@pytest.mark.parametrize('values, expected', (
    (np.float32([0, 0.5, 1]), [0, 128, 255]), (np.uint16([0, 2048, 4095]), [0, 128, 255]),
    (np.uint16([0, 32768, 65535]), [0, 128, 255]), (np.uint16([0, 512, 1023]), [0, 128, 255]),
    (np.float32([-1000, 0, 1000]), [0, 128, 255]), (np.int32([0, 20475, 40950]), [0, 80, 159]),
    (np.float32([np.nan, 0.5, 1]), [0, 0, 255]), (np.float32([0, 100, 200]), [0, 100, 200])))
def test_deep_greys_are_seen(values, expected):
    image = Image.fromarray(np.repeat(values[None], 2, 0))
    shown = np.asarray(prepare.load_image(in_memory(image, 'TIFF')))[0, :, 0]
    if np.isnan(values[0]):  # the range of the others
        assert shown[2] == 255
    else:
        assert shown.tolist() == pytest.approx(expected, abs=1)


def test_a_slip_in_our_own_code_is_no_bad_picture(monkeypatch):
    """It keeps its traceback: only Pillow's own calls may call a picture unreadable."""
    monkeypatch.setattr(prepare, 'grey_to_8_bits', lambda image: image.no_such_thing)
    with pytest.raises(AttributeError, match='no_such_thing'):
        prepare.load_image(in_memory(Image.new('I;16', (20, 20))))


def test_a_turned_photograph_is_measured_as_it_is_shown(tmp_path):
    """640x512 is one tile, 512x640 are several; and damaged EXIF data does not hide the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = in_memory(Image.new('RGB', (640, 512)), 'JPEG', exif=exif.tobytes())
    assert prepare.load_image(photo).size == (512, 640)
    assert prepare.image_header(photo) == ('jpeg', (512, 640))
    entries = struct.pack('<H', 2) + struct.pack('<HHIHH', 0x0112, 3, 1, 6, 0)
    broken = (b'Exif\0\0II*\0' + struct.pack('<I', 8) + entries +
              struct.pack('<HHII', 0x011A, 10, 1, 38) + struct.pack('<Iii', 0, -1, 0)
              )  # a resolution of -1 / 0
    photo = in_memory(Image.new('RGB', (640, 512)), 'JPEG', exif=broken)
    assert prepare.load_image(photo).size == prepare.image_header(photo)[1] == (512, 640)


@pytest.mark.parametrize('orientation, size, corner',
                         ((1, (40, 20), (0, 0)), (2, (40, 20), (39, 0)), (3, (40, 20), (39, 19)),
                          (4, (40, 20), (0, 19)), (5, (20, 40), (0, 0)), (6, (20, 40), (19, 0)),
                          (7, (20, 40), (19, 39)), (8, (20, 40), (0, 39))))
@pytest.mark.parametrize('kind', ('TIFF', 'PNG'))
def test_a_picture_is_turned_once(orientation, size, corner, kind):
    """Pillow turns TIFFs itself."""
    image, exif = Image.new('RGB', (40, 20)), Image.Exif()
    image.putpixel((0, 0), (255, 0, 0))
    exif[0x0112] = orientation
    data = in_memory(image, kind, exif=exif.tobytes())
    shown = prepare.load_image(data)
    assert shown.size == prepare.image_header(data)[1] == size
    assert shown.getpixel(corner) == (255, 0, 0)


def test_the_data_sets_own_files_are_not_overwritten(tmp_path):
    for name in ('train.jsonl', 'mine.jsonl', 'test.jsonl'):
        own_rows(tmp_path, name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for dataset in ('train.jsonl', 'mine.jsonl'):
        assert 'is the folder of the data set itself' in prepared(tmp_path, tmp_path / dataset,
                                                                  fails=True)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_one_bad_picture_drops_one_row(tmp_path):
    whole = in_memory(Image.new('RGB', (400, 300), 'red'), 'JPEG')
    bomb = in_memory(Image.new('1', (14000, 14000)))
    dataset = own_rows(tmp_path / 'in', 'mine_train.jsonl')
    own_rows(tmp_path / 'in', 'mine_val.jsonl', 1)
    (tmp_path / 'in' / '1.png').write_bytes(bomb)
    (tmp_path / 'in' / '2.png').write_bytes(whole[:len(whole) * 9 // 10])
    (tmp_path / 'in' / '3.png').write_bytes(b'')
    for cached in (True, False):
        said = prepared(tmp_path / f'out{cached}', dataset, f'--cache_tiles={cached}')
        assert 'dropped 3 rows with an unreadable image' in said
        assert 'train: 1 rows of 4' in said
        images = os.listdir(tmp_path / f'out{cached}' / 'images' / 'train')
        assert len(images) == 1  # nothing stays of what cannot be read


def test_files_of_a_folder_of_images(tmp_path, capsys):
    for name in ('b.png', '._b.png', 'a.TIF', 'c,d.png', '.hidden.jpg', 'notes.txt'):
        (tmp_path / name).write_bytes(b'')
    names = runpy.run_path(os.path.join(HERE, 'sample.py'))['find_images']
    assert [os.path.basename(path)
            for path in names(str(tmp_path))] == ['a.TIF', 'b.png', 'c,d.png']
    assert '1 files are left out' in capsys.readouterr().out
    assert names(str(tmp_path / 'c,d.png')) == [str(tmp_path / 'c,d.png')]
    assert names('a.png, b.png') == ['a.png', 'b.png']


def test_devices_and_number_types_say_what_they_are(monkeypatch, capsys):
    with pytest.raises(ValueError, match='float16: its range is too small'):
        sample_script.pick_dtype('float16', 'cuda')
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match='device=mps, but torch sees no such GPU'):
            sample_script.pick_device('mps')
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert sample_script.pick_device('mps') == 'mps'
    assert 'never run on one' in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *a: (7, 5))
    assert sample_script.pick_dtype('auto',
                                    'cuda') == 'float32'  # a T4 computes bfloat16 by emulation
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *a: (8, 0))
    assert sample_script.pick_dtype('auto', 'cuda') == 'bfloat16'


def test_memory_is_counted_where_it_can_be(monkeypatch):
    """Linux counts KiB, macOS bytes, and Windows has no such module."""
    here = sample_script.peak_memory('cpu')
    assert 2**26 < here < 2**36
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert here / 2048 < sample_script.peak_memory('cpu') < here / 512
    monkeypatch.setitem(sys.modules, 'resource', None)
    assert sample_script.peak_memory('cpu') == 0


def test_line_ends_in_a_flag():
    values, _ = configurator.parse(dict(prompt='', out_dir=''),
                                   [r'--prompt={question}\nA: ', r'--out_dir=C:\new'])
    assert values == dict(prompt='{question}\nA: ', out_dir=r'C:\new')


# --------------------------------------------------------------------------------------------------
# configurator

def test_configurator(tmp_path):
    defaults = dict(n=1, rate=0.5, name='x', on=False)
    config = tmp_path / 'c.py'
    config.write_text('import os\n_hidden = 1\nn = 2\nrate = 1\nother = 3\n')
    parse = lambda *argv: configurator.parse(defaults, argv, elsewhere={'other'})[0]
    assert parse('--n=3', str(config), '--name', 'a=b',
                 '--on=True') == dict(n=3, rate=1.0, name='a=b', on=True)
    assert parse('--rate', '-2') == dict(defaults, rate=-2.0)
    assert parse('--name=123')['name'] == '123'
    assert defaults['n'] == 1
    for argv, message in ((['--m=1'], 'unknown knob m'), (['--nam=1'], 'did you mean name'),
                          (['--n=1.5'], 'expected int, as in --n=1'), (['--on=yes'],
                                                                       'expected True or False'),
                          (['--n'], 'write --n=VALUE'), (['--name', '--n=1'], 'write --name=VALUE'),
                          (['none.py'], 'no config file none.py'), (['--other=1'],
                                                                    'belongs to another script')):
        with pytest.raises(ValueError, match=message):
            parse(*argv)
    for text, message in (('m = 1', 'c.py: unknown knob m'), ('n = "1"',
                                                              "n = '1' is str, expected int"),
                          ('n = True', 'is bool'), ('n = ', 'SyntaxError')):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse(str(config))


def test_a_knob_means_the_same_in_every_script():
    seen = {}
    for name in ('prepare.py', 'train.py', 'sample.py', 'experiments/bench.py',
                 'experiments/probe.py'):
        tree = ast.parse(open(os.path.join(HERE, name)).read())
        knobs = set(configurator.knob_names(os.path.join(HERE, name)))
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) in knobs:
                seen.setdefault(node.targets[0].id, set()).add(ast.unparse(node.value))
    # the probe's are '' or 0 where the checkpoint's are taken
    differ = {k: v - {"''", '0'} for k, v in seen.items() if k not in ('seed', 'num_workers')}
    differ = {k: v for k, v in differ.items() if len(v) > 1}
    assert not differ, differ
    known = set(seen)
    for file in os.listdir(os.path.join(HERE, 'config')):
        if file.endswith('.py'):
            names = set(configurator.knob_names(os.path.join(HERE, 'config', file)))
            assert names <= known, f'config/{file}: {names - known}'


def start(*args, **more):
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=HERE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **more)


# --------------------------------------------------------------------------------------------------
# plain text decoders, and the way out

def text_tokenizer(end='</s>', begin='', template=None):
    """Bytes with an end token of their own, without <|im_end|>; `begin` before every text."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([end] + [begin] * bool(begin))
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f'{begin} $A', special_tokens=[(begin, tokenizer.token_to_id(begin))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end,
                                   chat_template=template)


def save_text(folder, kind='llama', tokenizer=None, **changes):
    """A tiny text decoder's folder as transformers writes it; gives the oracle."""
    tokenizer = tokenizer or text_tokenizer()
    classes = dict(llama=(LlamaConfig, LlamaForCausalLM), qwen2=(Qwen2Config, Qwen2ForCausalLM),
                   qwen3=(Qwen3Config, Qwen3ForCausalLM))[kind]
    fields = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48,
                  num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                  head_dim=16 if kind == 'qwen3' else 8, max_position_embeddings=512,
                  rms_norm_eps=1e-5, tie_word_embeddings=kind == 'llama',
                  bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
                  **rope(1e5))
    torch.manual_seed(0)
    oracle = classes[1](classes[0](**{**fields, **changes})).eval()
    for p in oracle.parameters():
        torch.nn.init.normal_(p, std=0.2 if p.dim() > 1 else 0.3)
    oracle.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return oracle


@pytest.mark.parametrize('kind', ('llama', 'qwen2', 'qwen3'))
def test_text_decoders_equal_transformers(tmp_path, kind):
    """Logits, greedy ids alone and in a batch, and thoughts against the obvious path."""
    oracle = save_text(tmp_path, kind)
    model = MultiCoCo.from_pretrained(str(tmp_path))
    assert model.config.eos_token_ids == (load_tokenizer(str(tmp_path)).eos_token_id,)
    assert not hasattr(model, 'vision_model')
    batch = without_labels(make_batch(model.config, [0, 0, 0]))
    real, known = batch['attention_mask'].bool(), oracle.config.vocab_size
    ours = model(**batch).logits[real][:, :known]
    theirs = oracle(input_ids=batch['input_ids'], attention_mask=batch['attention_mask']).logits
    assert relative(ours, theirs[real]) < 1e-5
    with torch.no_grad():
        if kind != 'llama':  # whose head is tied
            model.language_model.lm_head.weight[known:] = 0
    together = model.generate(**batch, max_new_tokens=12)
    for b in range(3):
        row = batch['input_ids'][b:b + 1, :int(real[b].sum())]
        alone = model.generate(row, max_new_tokens=12)
        theirs = oracle.generate(input_ids=row, attention_mask=torch.ones_like(row),
                                 max_new_tokens=12, do_sample=False, pad_token_id=0)
        theirs = theirs[:, row.shape[1]:]
        assert alone.tolist() == theirs.tolist()
        assert together[b:b + 1, :alone.shape[1]].tolist() == theirs.tolist()
    batch = make_batch(model.config, [0, 0], [(3,), (2, 1)])
    out = model(**without_labels(batch))
    run = lambda x: oracle.model(inputs_embeds=x).last_hidden_state
    for b in range(2):
        n = int(batch['attention_mask'][b].sum())
        row = dict(input_ids=batch['input_ids'][b:b + 1, :n], pixel_values=None)
        logits, thoughts = obvious(model, row, run)
        assert relative(out.logits[b, :n], logits[0]) < 1e-5
        assert relative(out.thoughts[b], torch.cat(thoughts, 1)[0]) < 1e-5


def test_a_text_decoder_takes_no_image(tmp_path):
    save_text(tmp_path)
    model = MultiCoCo.from_pretrained(str(tmp_path))
    ids = torch.tensor([[7, model.config.image_token_id, 8]])
    with pytest.raises(ValueError, match='row 0 holds 1 <IMG_CONTEXT>'):
        model(ids)
    tile = torch.zeros(1, 3, 448, 448, dtype=torch.uint8)
    ids = torch.tensor([[7] + [model.config.image_token_id] * 256])
    with pytest.raises(ValueError, match='text decoder without a vision tower: it takes no image'):
        model(ids, tile)


@pytest.mark.parametrize('message, changes', (
    ('its text model_type is gpt2, not qwen2 or qwen3 or llama', dict(model_type='gpt2')),
    ('its rope is llama3', dict(rope_parameters=None,
                                rope_scaling=dict(rope_type='llama3', factor=32.0))),
    ('its text mlp_bias is True, not False', dict(mlp_bias=True)),
    ('its decoder has attention_bias', dict(attention_bias=True)),
    ("text rms_norm_eps as '1e-6', expected a number", dict(rms_norm_eps='1e-6')),
    ('lacks text intermediate_size', dict(intermediate_size=None))))
def test_text_decoders_that_are_not_supported(tmp_path, message, changes):
    save_text(tmp_path)
    assert_config_is_refused(tmp_path, message, changes)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    save_text(tmp_path)
    path = tmp_path / 'tokenizer_config.json'
    known = json.loads(path.read_text())
    del known['eos_token']
    path.write_text(json.dumps(known))
    (tmp_path / 'special_tokens_map.json').unlink(missing_ok=True)
    with pytest.raises(ValueError, match='its tokenizer names no end token'):
        MultiCoCo.from_pretrained(str(tmp_path))


def test_all_of_a_decoders_end_tokens_end_an_answer(tmp_path):
    save_text(tmp_path)
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [256, 9]}')
    assert MultiCoCo.from_pretrained(str(tmp_path)).config.eos_token_ids == (256, 9)


def test_the_same_tensor_under_two_names_is_refused(tmp_path):
    save_tiny(tmp_path)
    edit_files(tmp_path, lambda w: w.update({'lm_head.weight': torch.zeros(262, 32)}))
    with pytest.raises(ValueError, match='holds language_model.lm_head.weight under two names'):
        MultiCoCo.from_pretrained(str(tmp_path))


def test_a_tokenizers_own_beginning_and_turns():
    """What Llama 3 puts before every text stands there once; 'chat' is the tokenizer's template."""
    turns = ("{{ '<s>' }}{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
             "{% if add_generation_prompt %}->{% endif %}")
    tokenizer = add_special_tokens(text_tokenizer(begin='<s>', template=turns))
    frame = prepare.frame_of('chat', tokenizer)
    assert frame == '<s>[{prompt}]->'
    row = dict(question='Who?', answer='Tom', steps=['One.', 'Two.'])
    for template in ('plain', frame):
        knobs = dict(prompt='{question}\n', answer='{answer}', template=template)
        ids = prepare.encode(row, tokenizer, 1, **knobs)['input_ids']
        assert ids.count(tokenizer.convert_tokens_to_ids('<s>')) == 1
        assert ids[0] == tokenizer.convert_tokens_to_ids('<s>')
        assert prepare.Rows([row], 'train', 1, tokenizer, **knobs).length(0) == len(ids)
    assert '[Who?]-><|start-latent|>' in tokenizer.decode(ids)
    assert prepare.frame_of('plain', text_tokenizer()) == 'plain'
    with pytest.raises(ValueError, match='has no chat template'):
        prepare.frame_of('chat', text_tokenizer())


def test_bfloat16_on_a_cpu_is_for_models_that_come_in_it(monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: native)
        assert sample_script.pick_dtype('auto', 'cpu') == 'float32'
        expected = 'bfloat16' if native else 'float32'
        assert sample_script.pick_dtype('auto', 'cpu', on_cpu=True) == expected
        assert sample_script.pick_dtype('float32', 'cpu', on_cpu=True) == 'float32'


def test_auto_is_the_files_own_type(tmp_path):
    for name, dtype in (('a', torch.bfloat16), ('b', torch.float32), ('c', torch.float16)):
        save_tiny(tmp_path / name, dtype=dtype)
        expected = torch.bfloat16 if name == 'a' else torch.float32
        model = MultiCoCo.from_pretrained(str(tmp_path / name), dtype='auto')
        assert {p.dtype for p in model.parameters()} == {expected}


@pytest.mark.parametrize('kind', ('internvl qwen2', 'internvl qwen3', 'llama', 'qwen2', 'qwen3'))
def test_what_is_written_is_what_transformers_reads(tmp_path, kind):
    """Without our code and with it, from weights that no file held before: equal logits."""
    if kind.startswith('internvl'):
        save_tiny(tmp_path / 'in', kind.split()[1])
        loader = InternVLForConditionalGeneration
    else:
        save_text(tmp_path / 'in', kind)
        loader = AutoModelForCausalLM
    model, tokenizer, _ = load_checkpoint(str(tmp_path / 'in'))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(str(tmp_path / 'out'), tokenizer)
    again, read, _ = load_checkpoint(str(tmp_path / 'out'))
    oracle, report = loader.from_pretrained(tmp_path / 'out', output_loading_info=True)
    assert not report['missing_keys']
    assert not report['unexpected_keys']
    assert again.config == model.config
    text = 'a <|start-latent|><|latent|> b'
    assert AutoTokenizer.from_pretrained(tmp_path / 'out').encode(text) == tokenizer.encode(text)
    assert read.encode(text) == tokenizer.encode(text)
    assert read.eos_token == tokenizer.eos_token
    ids = torch.randint(0, 250, (1, 20), generator=torch.Generator().manual_seed(0))
    pixels = {}
    if kind.startswith('internvl'):
        ids[0, 3:7] = model.config.image_token_id
        pixels['pixel_values'] = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        ours = model(ids, **pixels).logits
        assert torch.equal(again(ids, **pixels).logits, ours)
        theirs = oracle.float().eval()(input_ids=ids, **pixels).logits
    assert relative(theirs, ours) < 1e-5


def test_an_export_is_whole_or_not_there(tmp_path, monkeypatch):
    save_tiny(tmp_path / 'in')
    model, tokenizer, _ = load_checkpoint(str(tmp_path / 'in'))
    full, empty = tmp_path / 'full', tmp_path / 'empty'
    full.mkdir()
    empty.mkdir()
    (full / 'mine.txt').write_text('mine')
    with pytest.raises(ValueError, match='full holds something already'):
        model.save_pretrained(str(full), tokenizer)
    assert os.listdir(full) == ['mine.txt']
    model.save_pretrained(str(empty), tokenizer)
    assert 'model.safetensors' in os.listdir(empty)

    def no_space(*args):
        raise OSError('No space left on device')

    monkeypatch.setattr('model.save_file', no_space)
    with pytest.raises(OSError, match='new was not written .No space left on device'):
        model.save_pretrained(str(tmp_path / 'new'), tokenizer)
    assert sorted(os.listdir(tmp_path)) == ['empty', 'full', 'in']
    with pytest.raises(ValueError, match='ps_version=v1'):
        tiny_model(ps_version='v1').save_pretrained(str(tmp_path / 'new'), tokenizer)


# --------------------------------------------------------------------------------------------------
# what people bring

@pytest.mark.parametrize('text, expected', (
    ('I rule out option A. The answer is B', 1), ('Eliminate option A.', None), ('不选A', None),
    ('I would exclude option B and option C', None), ('정답은 C입니다', 2),
    ('答えはCです', 2),
    ('La respuesta correcta es la C', 2), ('La bonne réponse est C', 2), ('Düsseldorf', None)))
def test_answers_in_further_words(text, expected):
    option, parsed = prepare.extract_choice(text, ['cat', 'kite', 'dog', 'car'])
    assert (option if parsed else None) == expected


@pytest.mark.parametrize('said, known, right', (
    ('3 4', '3/4', False), ('3/4', '3/4', True), ('102', '10²', False), ('10²', '10²', True),
    ('5%', '5 %', True), ('狗。', '狗', True), ('cat/dog', 'cat dog', True),
    ('A, B', 'B', False), ('the (big) cat', 'big cat', True)))
def test_signs_in_free_answers(said, known, right):
    row = dict(question='?', answer=known)
    assert prepare.free_answer_is(said, row, '{answer}')[0] is right


@pytest.mark.parametrize('answer', ('B', 'b', 'B. dog', 'dog'))
def test_options_that_begin_with_their_letters(answer):
    row, reason = build_row(dict(question='?', choices=['A. cat', 'B. dog'], answer=answer),
                                    'validation')
    assert reason is None
    assert row['choices'] == ['cat', 'dog']
    assert row['answer'] == 'dog'


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """What an earlier preparation has left there needs no more space."""
    own_rows(tmp_path, 'mine_train.jsonl')
    own_rows(tmp_path, 'mine_val.jsonl', 1)
    raw, folders = prepare.read_raw(str(tmp_path / 'mine_train.jsonl'), str(tmp_path))
    out = tmp_path / 'out'
    out.mkdir()
    knobs = dict(data_dir=str(out), steps_from='first', max_latent_stage=4, image_size=28,
                 max_tiles=4, cache_tiles=True)
    usage = prepare.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(prepare.shutil, 'disk_usage', lambda path: usage._replace(free=100))
        with pytest.raises(OSError, match='needs 0.00 GB more, 0.00 GB are free: choose another'):
            prepare.prepare(raw, folders, **knobs)
        assert not list(out.iterdir())
    prepare.prepare(raw, folders, **knobs)
    assert len(list((out / 'cache' / 'tiles').rglob('*.npy'))) == 5
    monkeypatch.setattr(prepare.shutil, 'disk_usage', lambda path: usage._replace(free=100))
    assert len(prepare.prepare(raw, folders, **knobs)['train']) == 4


def test_a_split_without_a_usable_row_is_said_before_anything_is_written(tmp_path):
    dataset = own_rows(tmp_path / 'in', 'mine_train.jsonl')
    own_rows(tmp_path / 'in', 'mine_val.jsonl', 2, question='')
    said = prepared(tmp_path / 'out', dataset, fails=True)
    assert 'validation holds no usable row of 2: see the reasons above' in said
    assert not list((tmp_path / 'out').rglob('*.png'))
    said = prepared(tmp_path / 'out', dataset, '--answer={lettre}', fails=True)
    assert "the template '{lettre}' cannot be filled" in said


@pytest.mark.parametrize('text', ('[{[]}]', '[' * 10**5 + ']' * 10**5))
def test_text_that_only_looks_like_a_list(text):
    assert build_row(dict(question='?', answer='a', steps=text))[0]['steps']
    assert build_row(dict(question='?', answer='a', choices=text))[1].startswith('without 2 to 8')


def test_dropped_rows_are_named_by_their_own_ids(tmp_path):
    dataset = own_rows(tmp_path / 'in', 'mine.jsonl', 5, id=lambda i: f'row {i}',
                       question=lambda i: '' if i == 2 else [] if i == 3 else 'What?')
    said = prepared(tmp_path / 'out', dataset)
    assert 'train: dropped 1 rows without a question: row 2' in said
    assert 'train: dropped 1 rows whose question is list, not text: row 3' in said


def test_lists_written_as_json_text():
    raw = dict(question='?', answer='a', steps='["the \'a\' \'b\' test", null, "y"]')
    row, _ = build_row(raw, 'train')
    assert row['steps'] == ["the 'a' 'b' test", 'y']


def test_parquet_columns_of_other_kinds(tmp_path):
    """Classes are their names, lists of one image are images, what nobody reads is not decoded."""
    import datasets
    png = io.BytesIO()
    Image.new('RGB', (40, 40), 'red').save(png, 'PNG')
    rows = dict(question=['Who?', 'What?'], answer=[1, 0], steps=[['It is.'], ['It was.']],
                image=[[dict(bytes=png.getvalue(), path=None)]] * 2,
                spare=[dict(bytes=b'no image', path=None)] * 2)
    features = datasets.Features(
        question=datasets.Value('string'), answer=datasets.ClassLabel(names=['cat', 'dog']),
        steps=datasets.Sequence(datasets.Value('string')),
        image=datasets.Sequence(datasets.Image()), spare=datasets.Image())
    (tmp_path / 'in').mkdir()
    for split in ('train', 'test'):
        path = str(tmp_path / 'in' / f'{split}.parquet')
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    said = script('prepare.py', f'--dataset={tmp_path}/in', f'--data_dir={tmp_path}/data',
                  '--init_from=scratch', '--image_size=28')
    assert 'columns not used: spare' in said
    train = prepare.read_split(str(tmp_path / 'data'), 'test')
    assert [row['answer'] for row in train] == ['dog', 'cat']
    assert all(row['image'].endswith('.png') for row in train)


@pytest.mark.parametrize('text', ('[' * 100000, '{"question": ' + '9' * 5000 + '}'))
def test_json_that_python_cannot_hold(tmp_path, text):
    (tmp_path / 'mine.json').write_text(text)
    with pytest.raises(ValueError, match='is neither a JSON list nor a JSON row a line'):
        prepare.read_json_rows(str(tmp_path / 'mine.json'))


def test_a_data_dir_that_cannot_be_a_folder(tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'mine.jsonl').write_text('{"question": "?", "answer": "a"}\n' * 2)
    said = script('prepare.py', f'--dataset={tmp_path}/mine.jsonl', f'--data_dir={tmp_path}/file',
                  '--init_from=scratch', fails=True)
    assert 'cannot be a folder' in said


# --------------------------------------------------------------------------------------------------
# what a reviewer broke without any test noticing

def test_pickled_code_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return open, (str(tmp_path / 'RAN'), 'w')

    torch.save(dict(model={}, config={}, tokenizer='', knobs={}, more=Harmful()), tmp_path / 'a.pt')
    with pytest.raises(ValueError, match='not a whole checkpoint'):
        load_checkpoint(str(tmp_path / 'a.pt'))
    assert not (tmp_path / 'RAN').exists()


def test_activation_checkpointing_keeps_less():
    """In the decoder and in the vision tower, whose blocks run twice."""
    model, calls, kept = tiny_model(), [], {}
    batch = make_batch(model.config, TILES, THOUGHTS)
    model.vision_model.blocks[0].register_forward_pre_hook(lambda *inputs: calls.append(1))
    for on in (False, True):
        model.set_activation_checkpointing(on)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = model(**batch).loss
        kept[on] = sum(sizes)
        loss.backward()
    assert kept[True] < kept[False] / 2
    assert len(calls) == 3


def test_the_hub_is_asked_for_what_the_cache_lacks(tmp_path, monkeypatch):
    save_tiny(tmp_path / 'whole')
    save_tiny(tmp_path / 'half')
    os.remove(tmp_path / 'half' / 'model.safetensors')
    asked = []

    def download(name, local_files_only=False, **more):
        asked.append((name, local_files_only))
        return str(tmp_path / ('half' if local_files_only and name == 'a/half' else 'whole'))

    monkeypatch.setattr('model.snapshot_download', download)
    MultiCoCo.from_pretrained('a/whole')
    assert set(asked) == {('a/whole', True)}
    asked.clear()
    MultiCoCo.from_pretrained('a/half')
    assert ('a/half', False) in asked


def test_a_checkpoint_is_read_into_a_model_without_weights(tmp_path, monkeypatch):
    """Else memory would peak at twice its size."""
    save_tiny(tmp_path)
    places, init_weights = [], MultiCoCo.init_weights

    def seen(model):
        places.extend(p.device.type for p in model.parameters())
        init_weights(model)

    monkeypatch.setattr(MultiCoCo, 'init_weights', seen)
    model = MultiCoCo.from_pretrained(str(tmp_path))
    assert set(places) == {'meta'}
    assert {p.device.type for p in model.parameters()} == {'cpu'}


def test_a_compiled_step_keeps_all_rows():
    """Its buffers are fixed: rows that ended do not leave the batch."""
    model = tiny_model()
    with torch.no_grad():
        model.language_model.lm_head.weight[IMG] = 0
        model.language_model.lm_head.weight[EOS] *= 2.5
    batch = without_labels(make_batch(model.config, TILES * 2, THOUGHTS * 2, seed=1))
    step, sizes = model.step, []
    model.step = lambda x, *more: sizes.append(len(x)) or step(x, *more)
    kept = model.generate(**batch, max_new_tokens=40)
    del model.step
    assert set(sizes) == {8}
    assert torch.equal(model.generate(**batch, max_new_tokens=40), kept)


def test_positions_are_those_before_the_rope_was_stretched():
    text = dict(model_type='qwen2', max_position_embeddings=100,
                rope_scaling=dict(original_max_position_embeddings=32))
    assert longest_of(text) == 32
    assert longest_of(dict(text, rope_scaling=None)) == 100


def test_the_longest_row_and_the_coldest_temperature():
    tiny_model(max_position_embeddings=4)(torch.tensor([[5, 6, 7, 8]]))
    assert sample(torch.tensor([[0.0, 3.0, 1.0]]), 1e-40, 1.0).tolist() == [1]
    with pytest.raises(ValueError, match='expected temperature'):
        tiny_model().generate(torch.tensor([[5]]), temperature=float('inf'))


def test_an_export_has_all_end_tokens_and_the_turns(tmp_path):
    tokenizer = text_tokenizer(template='[{{ messages[0].content }}]')
    save_text(tmp_path / 'in', 'qwen2', tokenizer=tokenizer)
    (tmp_path / 'in' / 'generation_config.json').write_text('{"eos_token_id": [256, 9]}')
    model, ours, _ = load_checkpoint(str(tmp_path / 'in'))
    model.save_pretrained(str(tmp_path / 'out'), ours)
    with open(tmp_path / 'out' / 'generation_config.json') as f:
        assert json.load(f)['eos_token_id'] == [256, 9]
    assert load_tokenizer(str(tmp_path / 'out')).chat_template == tokenizer.chat_template


@pytest.mark.parametrize('message, changes', (
    ('use_backbone_lora', dict(use_backbone_lora=16)),
    ('select_layer', dict(select_layer=-2)),
    ('num_key_value_heads=3, head_dim=8: expected a multiple',
     dict(text_config__num_key_value_heads=3)),
    ('not square', dict(vision_config__image_size=[56, 112]))))
def test_further_config_values_are_refused(tmp_path, message, changes):
    save_tiny(tmp_path)
    assert_config_is_refused(tmp_path, message, changes)


@pytest.mark.parametrize('kind', ('jsonl', 'parquet'))
def test_held_out_rows_are_the_last_and_are_not_trained(tmp_path, kind):
    dataset = tmp_path / 'in'
    if kind == 'jsonl':
        dataset = own_rows(tmp_path / 'in', 'mine.jsonl', 40)
    else:
        image = dict(bytes=in_memory(Image.new('RGB', (40, 30))), path=None)
        parquet(dataset, 'train', [dict(RAW, question=f'What is {i}?', question_id=str(i),
                                        image=image) for i in range(40)])
    prepared(tmp_path / 'out', dataset)
    asked = {split: [row['question'] for row in prepare.read_split(str(tmp_path / 'out'), split)]
             for split in ('train', 'validation')}
    assert asked['validation'] == ['What is 38?', 'What is 39?']
    assert asked['train'] == [f'What is {i}?' for i in range(38)]


def test_a_changed_picture_is_cut_anew_and_a_damaged_tile_too(tmp_path, capsys, monkeypatch):
    """A cut cache file once counted as an unreadable picture, and the row was lost."""
    dataset = own_rows(tmp_path / 'in', 'mine_train.jsonl', 2)
    own_rows(tmp_path / 'in', 'mine_val.jsonl', 2)
    prepared(tmp_path / 'out', dataset)
    Image.new('RGB', (40, 30), 'white').save(tmp_path / 'in' / '0.png')
    prepared(tmp_path / 'out', dataset)
    row = prepare.read_split(str(tmp_path / 'out'), 'train')[0]
    kept = tmp_path / 'out' / row['image']
    assert kept.read_bytes() == (tmp_path / 'in' / '0.png').read_bytes()
    path = prepare.tiles_path(row, str(tmp_path / 'out'), 'train', 28, 4)
    white = prepare.load_tiles(row, str(tmp_path / 'out'), 'train', 28, 4)
    assert white.min() == 255
    for size in (0, 140):
        os.truncate(path, size)
        again = prepare.load_tiles(row, str(tmp_path / 'out'), 'train', 28, 4)
        assert torch.equal(again, white)
        assert f'{path} is damaged and made anew' in capsys.readouterr().out
        assert np.load(path).shape == white.shape
    # cut otherwise or by other code, the tiles are other files
    assert prepare.tiles_path(row, str(tmp_path / 'out'), 'train', 56, 4) != path
    monkeypatch.setattr(prepare, 'TILING_VERSION', prepare.TILING_VERSION + 1)
    assert prepare.tiles_path(row, str(tmp_path / 'out'), 'train', 28, 4) != path


def test_workers_leave_signals_to_the_parent():
    class Ignoring(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            ignored = [signal.getsignal(s) == signal.SIG_IGN
                       for s in (signal.SIGINT, signal.SIGTERM)]
            return dict(input_ids=list(map(int, ignored)), labels=None, pixel_values=None)

    batch, = prepare.batches(Ignoring(), [[0]], num_workers=1)
    assert batch['input_ids'].tolist() == [[1, 1]]


def test_rows_without_image_or_steps_among_others(tmp_path):
    text = prepare.build_text(dict(question='?', answer='a', steps=['x']), 0, visual_bridge=True)
    assert text[2] == 'x\na'  # no bridge where there is nothing to see
    dataset = own_rows(tmp_path / 'in', 'mine_train.jsonl', 4,
                       steps=lambda i: ['s'] if i else None)
    own_rows(tmp_path / 'in', 'mine_val.jsonl', 2, steps=None)
    said = prepared(tmp_path / 'out', dataset)
    assert 'dropped 1 rows without steps' in said
    assert 'train: 3 rows of 4' in said
    assert 'validation: 2 of 2 rows have no steps' in said


def test_parquet_folders_may_have_brackets_in_their_names(tmp_path):
    image = dict(bytes=in_memory(Image.new('RGB', (40, 30))), path=None)
    for split in ('train', 'validation'):
        parquet(tmp_path / 'in[1]', split, [dict(RAW, image=image)])
    assert 'train: 1 rows of 1' in prepared(tmp_path / 'out', tmp_path / 'in[1]')


def test_cut_answers_are_counted():
    answer = dict(tokens=1, thoughts=0, parsed=True)
    metrics = sample_script.summarize([dict(answer, ended=True), dict(answer, ended=False)], 1.0)
    assert metrics['cut'] == 1
    assert '1 cut off by max_new_tokens' in sample_script.describe(metrics)


def test_checkpoints_of_another_kind_are_named(tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'best.pt').write_bytes(b'')
    with pytest.raises(OSError, match='is the folder of a run: give .*out/best.pt'):
        load_checkpoint(str(tmp_path / 'out'))
    (tmp_path / 'best.ckpt').write_bytes(b'')
    with pytest.raises(OSError, match='neither a folder nor a .pt file nor a hub id'):
        load_checkpoint(str(tmp_path / 'best.ckpt'))
    save_tiny(tmp_path / 'whole')  # a checkpoint may have such a file beside it
    (tmp_path / 'whole' / 'best.pt').write_bytes(b'')
    load_checkpoint(str(tmp_path / 'whole'))


def test_models_that_were_not_trained_are_asked_in_their_own_words(tmp_path, monkeypatch):
    """InternVL's evaluation prompt in chat turns and twelve tiles; a text decoder the question."""
    save_tiny(tmp_path / 'm')
    Image.new('RGB', (640, 480)).save(tmp_path / 'a.png')
    asked, generate = [], MultiCoCo.generate
    monkeypatch.setattr(MultiCoCo, 'generate', lambda self, **batch: asked.append(
        batch['input_ids'][0]) or generate(self, **batch))
    said = script('sample.py', '--ckpt', tmp_path / 'm', '--image', tmp_path / 'a.png',
                  '--question=Q?', '--choices=x | y', '--max_new_tokens=1')
    assert '13 tiles' in said
    assert load_tokenizer(str(tmp_path / 'm')).decode(asked[0]).endswith(
        "\nQ?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."
        '<|im_end|>\n<|im_start|>assistant\n')
    save_text(tmp_path / 't')
    script('sample.py', '--ckpt', tmp_path / 't', '--question=Q?', '--max_new_tokens=1')
    assert load_tokenizer(str(tmp_path / 't')).decode(asked[1]) == 'Q?'
    script('sample.py', '--ckpt', tmp_path / 'm', '--export', tmp_path / 'e', '--dtype=bfloat16')
    exported = MultiCoCo.from_pretrained(str(tmp_path / 'e'), 'auto')
    assert next(exported.parameters()).dtype == torch.bfloat16


def test_ctrl_c_is_one_sentence(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, '_exit', codes.append)
    monkeypatch.setattr(sys, '__excepthook__', lambda *error: None)
    error = KeyboardInterrupt()
    try:
        raise error
    except KeyboardInterrupt:
        configurator.one_sentence(KeyboardInterrupt, error, error.__traceback__)
    assert codes == [130]
    assert 'stopped by Ctrl-C; what was saved is whole' in capsys.readouterr().err


def test_help_and_terminals_of_few_letters():
    done = subprocess.run([sys.executable, 'sample.py', '--help', '--question=\xe9?'], cwd=HERE,
                          capture_output=True, text=True,
                          env=dict(os.environ, PYTHONIOENCODING='ascii'))
    assert done.returncode == 0, done.stderr
    assert 'num_thoughts = -1' in done.stdout
    assert '\\xe9?' in done.stdout


# --------------------------------------------------------------------------------------------------
# on a GPU, where there is one: what the CPU computes

def on_gpu(batch):
    return {key: value.cuda() for key, value in batch.items()}


def test_gpu_loss_and_gradients(gpu):
    """float32; batches of either side, with and without activation checkpointing."""
    model = tiny_model()
    batch = make_batch(model.config, TILES, THOUGHTS)
    exact = model(**batch).loss
    wanted = gradients(model, exact)
    model.cuda()
    for inputs in (batch, on_gpu(batch)):
        for checkpointing in (False, True):
            model.set_activation_checkpointing(checkpointing)
            loss = model(**inputs).loss
            assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
            found = {name: grad.cpu() for name, grad in gradients(model, loss).items()}
            assert_same_gradients(found, wanted)


def test_gpu_bfloat16(gpu):
    """Near the CPU's float32, with the gradient of thought 1."""
    model = tiny_model()
    batch, seen = make_batch(model.config, [1] * 4, [(4,)] * 4), {}

    def keep(k, thought):
        return seen.setdefault(k, thought)

    exact = model(**batch, edit_thought=keep).loss
    wanted = torch.autograd.grad(exact, seen.pop(1))[0]
    seen.clear()
    model.cuda()
    with torch.autocast('cuda', torch.bfloat16):
        rough = model(**batch, edit_thought=keep).loss
    found = torch.autograd.grad(rough, seen[1])[0].float().cpu()
    assert exact.item() != rough.item() == pytest.approx(exact.item(), rel=0.02)
    assert F.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.97


def test_gpu_forward_never_waits(gpu):
    """torch raises at each wait for the device, of which `lay_out` says there is none."""
    model = tiny_model().cuda()
    batch = make_batch(model.config, TILES, THOUGHTS)
    model(**batch).loss.backward()  # the libraries' own set-up may wait
    torch.cuda.set_sync_debug_mode('error')
    try:
        with torch.autocast('cuda', torch.bfloat16):
            loss = model(**batch).loss
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert loss.isfinite()


@pytest.mark.parametrize('boost', (None, LATENT, EOS))
def test_gpu_generation(gpu, boost):
    """The CPU's ids, also when rows end or think in between; and compiled into CUDA graphs."""
    model = tiny_model()
    with torch.no_grad():
        model.language_model.lm_head.weight[IMG] = 0
        if boost is not None:
            model.language_model.lm_head.weight[boost] *= 3
    batch = without_labels(make_batch(model.config, TILES, THOUGHTS))
    wanted = model.generate(**batch, max_new_tokens=24)
    model.cuda()
    assert torch.equal(model.generate(**batch, max_new_tokens=24).cpu(), wanted)
    model.step = torch.compile(model.step, mode='reduce-overhead', fullgraph=True, dynamic=False)
    for _ in range(3):  # run, recorded, replayed
        assert torch.equal(model.generate(**batch, max_new_tokens=24).cpu(), wanted)
