"""
The tests: python -m pytest -q test_model.py (CPU, no network). Oracles: transformers' InternVL on tiny random
weights, and the obvious path, which recomputes the whole unpadded row from scratch for each thought.
"""
import ast
import contextlib
import io
import json
import os
import re
import runpy
import shutil
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, PreTrainedTokenizerFast
from transformers import Qwen2Config, Qwen3Config

try:  # transformers 5
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
except ImportError:
    from transformers import GotOcr2ImageProcessor as GotOcr2ImageProcessorPil

import bench
import configurator
import evaluate
import prepare
import probe
import reference
import sample as sample_script
import toy
import train
from model import Config, IMAGE_MEAN, IMAGE_STD, MultiCoCo, SPECIAL_TOKENS
from model import add_special_tokens, lay_out, load_checkpoint, load_tokenizer, sample

torch.set_num_threads(1)
HERE = os.path.dirname(os.path.abspath(__file__))
IMG, LATENT, EOS, PAD = 90, 91, 95, 0  # token ids of the tiny models
N = 4                                  # visual tokens of a 56-pixel tile
FIVE = int(transformers.__version__.split('.')[0]) >= 5


def tiny_config(**changes):
    return Config(**{**dict(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vision_hidden_size=24, vision_intermediate_size=40, vision_num_layers=2,
        vision_num_heads=3, image_size=56, image_token_id=IMG, latent_token_id=LATENT, eos_token_ids=(EOS,),
        pad_token_id=PAD), **changes})


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    return MultiCoCo(tiny_config(**changes)).eval()


# ----------------------------------------------------------------------------------------------------------------------
# stand-ins: a tokenizer of single bytes, a tiny InternVL of transformers, its files in both layouts

def tiny_tokenizer(extra=()):
    """Bytes and InternVL's special tokens, without the three that load_tokenizer adds."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<img>', '</img>', '<IMG_CONTEXT>',
                                  *extra])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='<|im_end|>', pad_token='<|endoftext|>')


def rope(theta):
    """As transformers 5 writes it, and 4."""
    return dict(rope_parameters=dict(rope_type='default', rope_theta=theta)) if FIVE else dict(rope_theta=theta)


def tiny_oracle(llm='qwen2', spare=0, seed=0, tokenizer=None):
    """transformers' InternVL with random weights of real scale."""
    tokenizer = tokenizer or tiny_tokenizer()
    text = dict(vocab_size=262 + spare, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16 if llm == 'qwen3' else 8,
                max_position_embeddings=512, rms_norm_eps=1e-6,
                tie_word_embeddings=False, **rope(1e6))
    vision = InternVLVisionConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
                                  attention_bias=True, image_size=[56, 56], patch_size=[14, 14])
    config = InternVLConfig(vision_config=vision, text_config={'qwen2': Qwen2Config, 'qwen3': Qwen3Config}[llm](**text),
                            image_token_id=tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>'), tie_word_embeddings=False)
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
             ('vision_tower.embeddings.position_embeddings', 'vision_model.embeddings.position_embedding'),
             ('vision_tower.embeddings.patch_embeddings.projection', 'vision_model.embeddings.patch_embedding'),
             ('vision_tower.encoder.layer.', 'vision_model.encoder.layers.'), ('lambda_', 'ls'),
             ('layernorm_before', 'norm1'), ('layernorm_after', 'norm2'), ('attention.projection_layer', 'attn.proj'),
             ('multi_modal_projector.layer_norm', 'mlp1.0'), ('multi_modal_projector.linear_1', 'mlp1.1'),
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
    llm = dict(c['text_config'], rope_theta=1e6, rope_scaling={'rope_type': 'dynamic', 'factor': 2.0})
    llm.pop('rope_parameters', None)
    v = c['vision_config']
    vision = dict(hidden_size=v['hidden_size'], intermediate_size=v['intermediate_size'],
                  num_hidden_layers=v['num_hidden_layers'], num_attention_heads=v['num_attention_heads'],
                  patch_size=14, image_size=56, qkv_bias=True, qk_normalization=False)
    json.dump(dict(model_type='internvl_chat', downsample_ratio=0.5, ps_version='v2', select_layer=-1,
                   force_image_size=56, llm_config=llm, vision_config=vision), open(f'{folder}/config.json', 'w'))


def save_tiny(folder, llm='qwen2', layout='hf', spare=0, extra=(), shard_size='5GB', dtype=torch.float32):
    """A tiny checkpoint folder; gives the oracle."""
    tokenizer = tiny_tokenizer(extra)
    tiny_oracle(llm, spare, tokenizer=tokenizer).to(dtype).save_pretrained(folder, max_shard_size=shard_size)
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
    """
    A padded batch: row b has tiles[b] tiles and, for each run in thoughts[b], that many thoughts and then two tokens.
    Gives forward's arguments with labels behind the prompt.
    """
    g = torch.Generator().manual_seed(seed)
    thoughts = thoughts or [()] * len(tiles)
    rows, per_tile = [], config.num_image_tokens
    for b, (P, runs) in enumerate(zip(tiles, thoughts)):
        text = torch.randint(start, 80, (length + 2 * b,), generator=g).tolist()
        ids = text[:3] + [config.image_token_id] * (P * per_tile) + text[3:]
        prompt = len(ids)
        for run in runs:
            ids += [config.latent_token_id] * run + torch.randint(start, 80, (2,), generator=g).tolist()
        ids += torch.randint(start, 80, (4,), generator=g).tolist()
        labels = [-100] * prompt + [-100 if i == config.latent_token_id else i for i in ids[prompt:]]
        rows.append(dict(input_ids=ids, labels=labels, pixel_values=torch.randint(
            0, 256, (P, 3, config.image_size, config.image_size), dtype=torch.uint8, generator=g) if P else None))
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
    """
    Logits [1, T, V] and thoughts of one unpadded row: for each thought in order, the whole row so far from scratch.
    `run` gives hidden states [1, t, D] of embeddings [1, t, D]; by default one pass of our decoder over a row without
    chunks.
    """
    def ours(x):
        return model.decode(x, torch.arange(x.shape[1])[None], None, [((), ())] * model.config.num_hidden_layers)
    run, ids = run or ours, row['input_ids']
    x = model.embed_text(ids)
    if row['pixel_values'] is not None:
        visual = model.embed_image(row['pixel_values']).flatten(0, 1)
        parts = iter(visual)
        x = torch.stack([next(parts) if i == model.config.image_token_id else e for i, e in zip(ids[0], x[0])])[None]
    thoughts = []
    for p in (ids[0] == model.config.latent_token_id).nonzero()[:, 0].tolist():
        thoughts.append(run(x[:, :p])[:, -1:])
        x = torch.cat((x[:, :p], thoughts[-1], x[:, p + 1:]), 1)
    return model.language_model.lm_head(run(x)), thoughts


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


THOUGHTS = [(), (1,), (3,), (2, 1, 2)]  # none, one, three in a row, separated runs
TILES = [0, 1, 3, 1]


# ----------------------------------------------------------------------------------------------------------------------
# parity with transformers

@pytest.mark.parametrize('llm', ('qwen2', 'qwen3'))
@pytest.mark.parametrize('layout', ('hf', 'opengvlab'))
def test_logits_equal_transformers(tmp_path, llm, layout):
    oracle = save_tiny(tmp_path, llm, layout, dtype=torch.bfloat16)  # bf16 files, compared in float32
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
        pixels = {} if row['pixel_values'] is None else dict(pixel_values=normalised(row['pixel_values']))
        theirs = oracle.generate(
            input_ids=row['input_ids'], attention_mask=torch.ones_like(row['input_ids']), **pixels, max_new_tokens=16,
            do_sample=False, eos_token_id=list(model.config.eos_token_ids), pad_token_id=model.config.pad_token_id)
        theirs = theirs[:, row['input_ids'].shape[1]:]
        ours = model.generate(**without_labels(batch), max_new_tokens=16)[b:b + 1, :theirs.shape[1]]
        assert ours.tolist() == theirs.tolist(), f'row {b}'


@pytest.mark.parametrize('llm', ('qwen2', 'qwen3'))
@pytest.mark.parametrize('layout', ('hf', 'opengvlab'))
def test_thoughts_equal_the_obvious_path_over_transformers(tmp_path, llm, layout):
    """
    The strongest oracle: our latent loop against transformers' decoder, called anew on the whole row for every
    thought.
    """
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


# ----------------------------------------------------------------------------------------------------------------------
# the latent loop against the obvious path

def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(a, b, tolerance=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        assert b[name].norm() > 0 or name.endswith('k_proj.bias') or 'blocks' in name, f'{name} has no gradient'
        assert (a[name] - b[name]).norm() <= tolerance * b[name].norm() + 1e-7, f'{name} {relative(a[name], b[name])}'


@pytest.mark.parametrize('thoughts', (THOUGHTS, [(8,)] * 4, [()] * 4), ids=('mixed', 'aligned', 'none'))
def test_loop_equals_obvious_path(thoughts):
    """Logits, loss and every parameter's gradient; rows with other numbers of tiles and thoughts in one batch."""
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
    """Public implementations detach thoughts and do not notice. It must equal the obvious path's, too."""
    model = tiny_model()
    row = one_row(make_batch(model.config, [1], [(4,)]), 0)
    seen = {}
    loss = model(**row, edit_thought=lambda k, t: seen.setdefault(k, t)).loss
    assert sorted(seen) == [1, 2, 3, 4]
    fast = torch.autograd.grad(loss, seen[1])[0]
    logits, thoughts = obvious(model, row)
    slow = torch.autograd.grad(F.cross_entropy(logits[0, :-1], row['labels'][0, 1:]), thoughts[0])[0]
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
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_micro_batches_give_the_gradient_of_the_batch():
    """Weighted by supervised tokens; rows differ in tiles, thoughts and targets, and some parts hold no image."""
    model = tiny_model()
    batch = make_batch(model.config, TILES + [0], THOUGHTS + [(1,)])
    batch['labels'][1, -6:] = -100  # unequal numbers of targets
    whole = gradients(model, model(**batch).loss)
    count = lambda b: (b['labels'][:, 1:] != -100).sum()
    for rows in (1, 2, 3):
        parts = train.micro_batches(dict(batch), rows)
        assert len(parts) == -(-5 // rows) and len(parts[-1]['pixel_values']) == (rows == 3)
        assert_same_gradients(gradients(model, sum(model(**p).loss * count(p) / count(batch) for p in parts)),
                              whole, 1e-5)


def test_edit_thought_is_what_is_fed_back():
    model = tiny_model()
    batch = without_labels(make_batch(model.config, TILES, THOUGHTS))
    clean, zeroed = model(**batch), model(**batch, edit_thought=lambda k, t: t * 0)
    assert not zeroed.thoughts.any() and clean.thoughts.any()
    assert relative(clean.logits[0], zeroed.logits[0]) == 0     # row 0 has no thoughts
    assert relative(clean.logits[2], zeroed.logits[2]) > 1e-3
    pause = model(**batch, edit_thought=model.as_pause)
    x = dict(batch, input_ids=torch.where(batch['input_ids'] == LATENT, 99, batch['input_ids']))
    with torch.no_grad():  # a plain token with the same embedding
        model.language_model.model.embed_tokens.weight[99] = model.language_model.model.embed_tokens.weight[LATENT]
    plain = model(**x)
    assert plain.thoughts.shape[1] == 0
    real = batch['attention_mask'].bool()
    assert relative(pause.logits[real], plain.logits[real]) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# what the thoughts are worth

def test_interventions_change_what_they_say():
    """Rows of a split with 3, 1, 3, 2 thoughts, met in another order and in two batches."""
    model = tiny_model()
    batch = without_labels(make_batch(model.config, [1, 0, 2, 1], [(3,), (1,), (2, 1), (1, 1)]))
    with torch.no_grad():
        own = torch.zeros(4, 3, model.config.hidden_size)
        clean = model(**batch, edit_thought=probe.record(own)([0, 1, 2, 3])).thoughts
        here = clean.any(-1)
        assert here.sum(1).tolist() == [3, 1, 3, 2] and torch.equal(own[here], clean[here])
        run = lambda name, b=batch, at=(0, 1, 2, 3): model(
            **b, edit_thought=probe.replace(name, clean)(list(at))).thoughts
        assert not run('zero').any()
        noise = run('noise')
        torch.testing.assert_close(noise[:, 0].norm(dim=-1), clean[:, 0].norm(dim=-1))
        assert (F.cosine_similarity(noise[:, 0], clean[:, 0]).abs().max() < 0.6
                and torch.equal(noise, run('noise')) and torch.equal(noise.any(-1), here))
        mean = torch.stack([clean[here[:, k], k].mean(0) for k in range(3)])
        torch.testing.assert_close(run('mean'), mean.expand(4, 3, -1) * here[..., None])
        swapped = run('swap')
        for a, b in ((0, 1), (1, 2), (2, 3), (3, 0)):
            both = here[a] & here[b]
            assert both.any() and torch.equal(swapped[a, both], clean[b, both])
        assert swapped[0, 1].any()  # row 1 has but one thought: row 0 keeps its own second
        for b in range(4):  # the same, row by row: a donor is the next row of the split, not of the batch
            alone = {k: v for k, v in one_row(dict(batch, labels=batch['input_ids']), b).items() if k != 'labels'}
            for name, whole in (('swap', swapped), ('noise', noise)):
                torch.testing.assert_close(run(name, alone, [b])[0], whole[b, :int(here[b].sum())],
                                           atol=1e-4, rtol=1e-3)
        dropped = run('drop_last_2')
        assert dropped.any(-1).sum(1).tolist() == [1, 0, 1, 0] and torch.equal(dropped[[0, 2], 0], clean[[0, 2], 0])
        written = torch.ones(1, model.config.hidden_size)  # a second thought of row 1: the model wrote its <|latent|>
        for name in ('zero', 'noise', 'mean', 'swap', 'drop_last_1'):
            assert torch.equal(probe.replace(name, clean)([1])(2, written), written)
            assert not torch.equal(probe.replace(name, clean)([1])(1, written), written)


def test_interventions_are_named():
    assert probe.expand('') == [] and probe.expand(' zero, early_12') == ['zero', 'early_12']
    assert probe.expand('drop_last_k,early', 2) == ['drop_last_1', 'drop_last_2', 'early_0', 'early_1']
    assert probe.expand('all', 1) == ['zero', 'noise', 'mean', 'swap', 'image', 'drop_last_1', 'early_0']
    for wrong in ('zeros', 'early_', 'drop_last_x', 'zero;mean'):
        with pytest.raises(ValueError, match='expected zero, noise'):
            probe.expand(wrong)


def test_the_other_image_is_the_next_rows(run):
    top, _ = run
    rows = prepare.read_split(str(top / 'data'), 'test')
    encoded = lambda rows: prepare.Rows(
        rows, 'test', 1, tokenizer=load_tokenizer(str(top / 'data' / 'tokenizer')), data_dir=str(top / 'data'),
        image_size=84, max_tiles=1, num_image_tokens=9)
    changed, clean = encoded(probe.with_other_images([*rows, dict(question='no image')])), encoded(rows)
    assert len(changed) == len(clean)
    for i in (0, 5, 16):
        assert changed[i]['input_ids'] == clean[i]['input_ids']
        assert torch.equal(changed[i]['pixel_values'], clean[(i + 1) % 17]['pixel_values'])


def test_mcnemar_is_exact():
    """Against the enumeration of all outcomes of n fair coins."""
    for b, c in ((0, 0), (1, 0), (5, 5), (10, 2), (0, 9), (3, 7)):
        n = b + c
        heads = [bin(outcome).count('1') for outcome in range(2 ** n)]
        extreme = sum(abs(h - n / 2) >= abs(b - n / 2) for h in heads) / 2 ** n
        assert probe.mcnemar(b, c) == pytest.approx(extreme)
    assert probe.mcnemar(0, 400) < 1e-100
    assert probe.pair({'a': True, 'b': False, 'c': True}, {'a': False, 'b': False, 'c': True, 'd': True}) == (1, 0, 1.0)


def test_what_thoughts_say(run):
    """Thoughts made of the head's own rows say these tokens, and the table finds them in the steps."""
    top, _ = run
    model, tokenizer, _ = load_checkpoint(str(top / 'out' / 'best.pt'))
    head = model.language_model.lm_head.weight.detach()
    ids = [tokenizer.encode(word)[0] for word in ('blue', 'green', 'red')]
    say = lambda token: 50 * head[token] / head[token].norm()
    rows = [dict(steps=['blue', 'it is green.']), dict(steps=['blue']),
            dict(steps=['blue', 'x'], results=['blue', 'red'])]
    thoughts = torch.stack([torch.stack([say(ids[0]), say(ids[1])]), torch.stack([say(ids[2]), torch.zeros(64)]),
                            torch.stack([say(ids[0]), say(ids[2])])])
    first, second = probe.read(model, tokenizer, thoughts, rows)
    assert first['says'] == 'blue' and first['share'] == pytest.approx(2 / 3)
    # row 2 has no second thought
    assert first['names_step'] == pytest.approx([2 / 3, 0]) and second['names_step'] == pytest.approx([0, 1])
    long = probe.read(model, tokenizer, thoughts[:, :1], [*rows[:2], dict(steps=['x', 'y', 'blue'])])[0]
    assert long['names_step'] == pytest.approx([1 / 3, 0, 1])  # the share of the rows that have such a step
    p = (thoughts[:, 0] @ head.T).softmax(-1)
    assert first['entropy_bits'] == pytest.approx(-(p * p.log2()).nan_to_num().sum(1).mean().item(), abs=1e-4)
    assert first['mass_on_step'][0] == pytest.approx(
        p[:, [ids[0], tokenizer.encode(' blue')[0]]].sum(1).mean().item(), abs=1e-4)
    assert first['norm'] == pytest.approx(50) and first['cosine_before'] is None
    assert second['cosine_before'] == pytest.approx(
        F.cosine_similarity(thoughts[[0, 2], 0], thoughts[[0, 2], 1]).mean().item(), abs=1e-5)
    assert len(list(probe.describe_thoughts([first, second]))) == 3
    for path, rows in ((top / 'one.png', rows), (top / 'two.png', [{}] * 3)):  # also rows without steps and with prices
        rows = [dict(row, question='More than $5 or than $6^?') for row in rows]
        probe.draw_thoughts(str(path), model, tokenizer, thoughts.roll(1, 0), rows,
                            probe.read(model, tokenizer, thoughts, rows))
        assert Image.open(path).size[0] > 500


# ----------------------------------------------------------------------------------------------------------------------
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
        for b, ids in enumerate(model.generate(**without_labels(batch), max_new_tokens=16).tolist()):
            slow = slow_generate(model, one_row(batch, b), 16)
            assert ids[:len(slow)] == slow and set(ids[len(slow):]) <= {PAD}
            ended, latents = ended + (slow[-1] == EOS), latents + slow.count(LATENT)
    assert boost != LATENT or latents > 5
    assert boost != EOS or 0 < ended < 12


def test_rows_that_ended_leave_the_batch():
    """Half of the rows ended: the others go on alone, with the same ids. A hook is promised all rows and keeps them."""
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
    assert len({B for B, width in shrunk}) > 1 and {B for B, width in sizes[len(shrunk):]} == {8}
    assert left.shape[1] == max((row != PAD).sum() for row in left)  # no column of padding alone


def test_what_generate_promises():
    """Thoughts are numbered on through the answer, each end token ends a row, and no position is beyond the model's."""
    model = tiny_model(eos_token_ids=(EOS, 7), max_position_embeddings=64)
    with torch.no_grad():
        model.language_model.lm_head.weight[IMG] = 0
    batch, asked = without_labels(make_batch(model.config, TILES, THOUGHTS)), []
    model.generate(**batch, max_new_tokens=4, edit_thought=lambda k, thought: asked.append(k) or thought)
    assert asked == [1, 2, 3, 4, 5, 6, 7, 8]  # five in the prompt, then one before each further token
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
    with pytest.raises(ValueError, match=f'{longest} prompt tokens and {65 - longest} new ones exceed'):
        model.generate(**batch, max_new_tokens=65 - longest)


def test_a_compiled_step_gives_the_same_ids():
    model = tiny_model()
    batch = without_labels(make_batch(model.config, TILES, THOUGHTS))
    plain = model.generate(**batch, max_new_tokens=9)
    model.step = torch.compile(model.step, backend='aot_eager', fullgraph=True, dynamic=False)  # one graph, fixed shape
    with torch.compiler.set_stance('default'):
        assert torch.equal(model.generate(**batch, max_new_tokens=9), plain)


# ----------------------------------------------------------------------------------------------------------------------
# work: floating-point operations, which no busy machine changes

TINY = Config(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
              head_dim=8, vision_hidden_size=24, vision_intermediate_size=40, vision_num_layers=2, vision_num_heads=3,
              image_size=56, eos_token_ids=(-1,))


@pytest.fixture(scope='module')
def pair():
    """bench.py's two models, tiny but for the vocabulary."""
    bench.device, bench.autocast = 'cpu', contextlib.nullcontext()
    return reference.models(TINY, bench.seed)


def test_what_is_benchmarked_computes_the_same(pair):
    """The floor is what pause tokens compute, the published loop and generation what ours compute."""
    ours, theirs = pair
    batch = bench.make_batch(TINY, 4, 3)
    assert reference.floor_loss(theirs, batch).item() == pytest.approx(
        ours(**batch, edit_thought=ours.as_pause).loss.item(), rel=1e-5)
    assert reference.published_loss(theirs, batch, TINY.latent_token_id)[0].item() == pytest.approx(
        ours(**batch).loss.item(), rel=1e-5)
    asked, plain = (bench.make_batch(TINY, 4, n, supervised=False) for n in (3, 0))
    with torch.no_grad():
        assert (reference.published_generate(theirs, asked, TINY.latent_token_id, 6).tolist()
                == ours.generate(**asked, max_new_tokens=6).tolist())
        assert reference.plain_generate(theirs, plain, 6).tolist() == ours.generate(**plain, max_new_tokens=6).tolist()


@pytest.mark.parametrize('n', (0, 1, 8))
def test_training_costs_the_flops_of_one_plain_pass(pair, n):
    """
    Within 1 % of transformers' plain pass over the same tokens, so nothing (head, ViT, prompt) is computed twice.
    Less where rows differ in length, since padding skips the MLP.
    """
    ours, theirs = pair
    ratios = []
    for tiles in ((1,), (1, 12)):
        batch = bench.make_batch(TINY, 4, n, tiles)
        floor, loop = (bench.cost(bench.step_of(model, loss))['flops'] for model, loss in (
            (theirs, lambda: reference.floor_loss(theirs, batch)), (ours, lambda: ours(**batch).loss)))
        ratios.append(loop / floor)
    assert abs(ratios[0] - 1) < 0.01 and ratios[1] < ratios[0] - 0.002


def test_a_generated_token_costs_the_flops_of_one_token(pair):
    """
    Exactly its matrix products and its attention to the slots; and the first token what a pass over the prompt costs.
    """
    ours, theirs = pair
    batch, B, N = bench.make_batch(TINY, 4, 8, supervised=False), 4, 9
    one, many = (bench.cost(lambda: ours.generate(**batch, max_new_tokens=n))['flops'] for n in (1, N))
    lm, c = ours.language_model, TINY
    matrices = (sum(p.numel() for layer in lm.model.layers for p in layer.parameters() if p.dim() == 2)
                + lm.lm_head.weight.numel())
    slots = sum(lay_out(batch['input_ids'], batch['attention_mask'], c).widths) + N
    assert many - one == (N - 1) * B * (
        2 * matrices + 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * slots)
    with torch.no_grad():
        prompt = bench.cost(lambda: theirs.model.language_model(
            inputs_embeds=reference.embed(theirs, batch), use_cache=False))['flops']
    assert one == pytest.approx(prompt + 2 * B * lm.lm_head.weight.numel(), rel=0.02)


def test_sampling():
    model = tiny_model()
    batch = without_labels(make_batch(model.config, TILES))
    draw = lambda seed, **k: model.generate(
        **batch, max_new_tokens=8, generator=torch.Generator().manual_seed(seed), **k).tolist()
    greedy = model.generate(**batch, max_new_tokens=8).tolist()
    assert draw(0, temperature=1.0) == draw(0, temperature=1.0) != draw(1, temperature=1.0)
    assert draw(0, temperature=1.0, top_p=1e-6) == greedy
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20000, 4)
    share = lambda *how: sample(logits, *how, torch.Generator().manual_seed(0)).bincount(minlength=4) / 20000
    assert share(1.0, 1.0).tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    assert share(0.5, 1.0).tolist() == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.015)  # squares
    assert share(1.0, 0.6).tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)  # the fewest that hold 0.6
    for bad in (dict(temperature=-1), dict(top_p=0), dict(max_new_tokens=0)):
        with pytest.raises(ValueError, match='expected temperature'):
            model.generate(**batch, **bad)


# ----------------------------------------------------------------------------------------------------------------------
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
    assert torch.equal(model(**dict(padded, num_tiles=torch.tensor([1, 1, 3]))).logits, expected)  # the dummy counted
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
    assert not real.all() and torch.equal(model(**filled).logits[real], model(**batch).logits[real])


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


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints and tokens

def test_tokens_are_added_once(tmp_path):
    save_tiny(tmp_path, extra=['<video>'])  # as the -hf tokenizers: a token without a row in the embedding
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
    assert again.encode(text) == tokenizer.encode(text) and len(again.encode(text)) == 3 + len(SPECIAL_TOKENS)
    assert again.decode(again.encode(text), skip_special_tokens=True) == 'a b'


@pytest.mark.parametrize('spare', (0, 10))
def test_new_rows_are_the_mean(tmp_path, spare):
    """
    Whether the matrices have to grow or already hold spare rows, as InternVL3.5's do; embedding and head are untied.
    """
    oracle = save_tiny(tmp_path, spare=spare)
    model, tokenizer = MultiCoCo.from_pretrained(str(tmp_path)), load_tokenizer(str(tmp_path))
    new = tokenizer.convert_tokens_to_ids(['<|start-latent|>', '<|latent|>', '<|end-latent|>'])
    assert new == [262, 263, 264] and model.config.vocab_size == max(262 + spare, 265)
    for ours, theirs in ((model.language_model.model.embed_tokens, oracle.model.language_model.embed_tokens),
                         (model.language_model.lm_head, oracle.lm_head)):
        assert torch.equal(ours.weight[:262], theirs.weight[:262])
        assert torch.allclose(ours.weight[new], theirs.weight[:262].mean(0), atol=1e-6)
        assert torch.equal(ours.weight[265:262 + spare], theirs.weight[265:])  # no token's: they stay as they are


def test_sharded_bfloat16(tmp_path):
    save_tiny(tmp_path / 'one', dtype=torch.bfloat16)
    save_tiny(tmp_path / 'many', dtype=torch.bfloat16, shard_size='20KB')
    assert len([f for f in os.listdir(tmp_path / 'many') if f.endswith('.safetensors')]) > 2
    one, many = (MultiCoCo.from_pretrained(str(tmp_path / n), dtype=torch.bfloat16).state_dict()
                 for n in ('one', 'many'))
    assert (all(torch.equal(one[k], many[k]) and one[k].dtype == torch.bfloat16 for k in one)
            and one.keys() == many.keys())


def edit_files(folder, weights=None, config=None):
    from safetensors.torch import load_file, save_file
    if weights:
        tensors = {name: tensor.clone() for name, tensor in load_file(f'{folder}/model.safetensors').items()}
        weights(tensors)
        save_file(tensors, f'{folder}/model.safetensors', metadata={'format': 'pt'})
    if config:
        c = json.load(open(f'{folder}/config.json'))
        config(c)
        json.dump(c, open(f'{folder}/config.json', 'w'))


@pytest.mark.parametrize('message, weights, config', (
    ('language_model.model.norm.weight is missing', lambda w: w.pop('language_model.model.norm.weight'), None),
    ('extra.weight is not known', lambda w: w.update({'extra.weight': torch.zeros(1)}), None),
    (r'mlp1.1.bias is \[31\], expected \[32\]',
     lambda w: w.update({'multi_modal_projector.linear_1.bias': torch.zeros(31)}), None),
    ('only q, v is there', lambda w: w.pop('vision_tower.encoder.layer.1.attention.k_proj.weight'), None),
    (r'embed_tokens is \[262, 32\], but config.json describes \[\[300, 32\]\]', None,
     lambda c: c['text_config'].update(vocab_size=300)),
    ('its text model_type is internlm2, not qwen2 or qwen3', None, lambda c: c['text_config'].update(model_type='internlm2')),
    ('its vision use_qk_norm is True, not False', None, lambda c: c['vision_config'].update(use_qk_norm=True))))
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
    weights = {name: tensor.clone() for name, tensor in load_file(tmp_path / 'model.safetensors').items()}
    headless = {name: tensor for name, tensor in weights.items() if 'lm_head' not in name}
    save_file(headless, tmp_path / 'model.safetensors')
    config = json.load(open(tmp_path / 'config.json'))
    json.dump(dict(config, tie_word_embeddings=True), open(tmp_path / 'config.json', 'w'))
    model = MultiCoCo.from_pretrained(str(tmp_path))
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight
    assert torch.equal(model.language_model.lm_head.weight[:262], weights['language_model.model.embed_tokens.weight'])


def test_the_first_pixel_shuffle_has_its_axes_turned():
    """OpenGVLab's 'v1' leaves out the last transposition, so rows and columns of visual tokens change places."""
    tiles = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    v1, v2 = (tiny_model(image_size=112, ps_version=version).embed_image(tiles) for version in ('v1', 'v2'))
    grid = lambda x: x.unflatten(1, (4, 4))
    torch.testing.assert_close(grid(v1), grid(v2).transpose(1, 2))
    assert not torch.allclose(v1, v2)


def test_incomplete_checkpoints(tmp_path, monkeypatch):
    for name in ('a', 'b', 'c'):
        save_tiny(tmp_path / name, shard_size='20KB' if name == 'c' else '5GB')
    os.remove(tmp_path / 'a' / 'config.json')
    os.rename(tmp_path / 'b' / 'model.safetensors', tmp_path / 'b' / 'pytorch_model.bin')
    os.remove(sorted((tmp_path / 'c').glob('*.safetensors'))[1])
    for name, message in (('a', 'no config.json'), ('b', 'only safetensors'), ('c', 'lacks model-00002'),
                          ('d', 'neither a folder nor a hub id')):
        with pytest.raises(OSError, match=message):
            MultiCoCo.from_pretrained(str(tmp_path / name))
    damaged = tmp_path / 'b' / 'model.safetensors'
    damaged.write_bytes((tmp_path / 'b' / 'pytorch_model.bin').read_bytes()[:1000])
    with pytest.raises(ValueError, match='is damaged .* download it again'):
        MultiCoCo.from_pretrained(str(tmp_path / 'b'))
    monkeypatch.setattr('model.snapshot_download', lambda *a, **k: (_ for _ in ()).throw(OSError('no route')))
    with pytest.raises(OSError, match='could not be reached .* local folder .* config/toy.py'):
        MultiCoCo.from_pretrained('some/model')


# ----------------------------------------------------------------------------------------------------------------------
# text

ROW = dict(question_id='q1', question='What flies?', choices=['cat', 'kite', 'dog', 'car'], correct_choice_idx=1,
           answer='kite', steps=['It is windy.', 'I see a string.', 'It is in the sky.'],
           explanation='It is windy.', image='x.png')


def test_text_of_each_stage():
    prompt = ('<image>\nQuestion: What flies?\n\nChoices:\nA. cat\nB. kite\nC. dog\nD. car\n\n'
              'Let me think step by step:\n')
    end = 'The answer is B. kite'
    assert prepare.build_text(ROW, 0) == (prompt, 0, 'It is windy.\nI see a string.\nIt is in the sky.\n' + end)
    assert prepare.build_text(ROW, 2) == (prompt, 4, 'It is in the sky.\n' + end)
    assert prepare.build_text(ROW, 4) == (prompt, 8, end)
    assert prepare.build_text(ROW, 4, pad_latent_to_max=False) == (prompt, 6, end)
    assert prepare.build_text(ROW, 3, max_latent_stage=2, c_thought=1) == (prompt, 2, end)  # which drops the rest
    assert prepare.build_text(ROW, 2, mode='cot') == prepare.build_text(ROW, 0)
    assert prepare.build_text(ROW, 2, mode='no_cot') == (prompt, 0, end)
    assert prepare.build_text(ROW, 2, mode='no_thoughts') == (prompt, 0, 'It is in the sky.\n' + end)
    assert prepare.build_text(ROW, 2, mode='pause') == prepare.build_text(ROW, 2)
    assert prepare.build_text(ROW, 0, answer='{choice} {letter}: {explanation}')[2].endswith('kite B: It is windy.')
    with pytest.raises(ValueError, match='{lettre}.*it may use'):
        prepare.build_text(ROW, 0, answer='{lettre}')
    with pytest.raises(ValueError, match="mode='coco'"):
        prepare.build_text(ROW, 0, mode='coco')


def test_text_only_rows():
    row = dict(question='Is Tom a dog?', steps=['Tom is a cat.'], answer='No.')
    assert prepare.build_text(row, 0) == (
        'Question: Is Tom a dog?\n\nLet me think step by step:\n', 0, 'Tom is a cat.\nNo.')
    assert prepare.build_text(row, 1, prompt='{question}\n', answer='### {answer}', c_thought=1) == (
        'Is Tom a dog?\n', 1, '### No.')


def test_a_prompt_without_choices_keeps_its_question():
    """Where the choices stand in the question's own paragraph only their line goes."""
    row = dict(question='Is Tom a dog?', image='x.png')
    assert prepare.fill('<image>{question}\n{choices}\n', row) == '<image>Is Tom a dog?\n'
    assert prepare.fill(prepare.PROMPT, row) == '<image>\nQuestion: Is Tom a dog?\n\nLet me think step by step:\n'
    assert prepare.fill('{question}\n\nChoices:\n{choices}\n\nA:', row) == 'Is Tom a dog?\n\nA:'
    for wrong in ('{question.x}', '{question[x]}', '{other}', '{', '{0}'):
        with pytest.raises(ValueError, match='cannot be filled'):
            prepare.fill(wrong, row)


def test_visual_bridge():
    bridge = lambda stage: prepare.build_text(ROW, stage, visual_bridge=True)
    assert bridge(0)[2].startswith('Looking at the image, It is windy.') and 'Analyzing' not in bridge(0)[0]
    assert (bridge(1)[0].endswith(':\nAnalyzing the visual information:\n')
            and bridge(1)[2].startswith('I see a string.'))
    assert bridge(2)[2].startswith('From what I can see, It is in the sky.')
    assert bridge(3)[2] == 'The answer is B. kite'


def test_chatml():
    prompt, _, target = prepare.build_text(ROW, 0, template='chatml')
    assert (prompt.startswith('<|im_start|>system\n你是')
            and prompt.endswith('step by step:<|im_end|>\n<|im_start|>assistant\n'))
    assert '<|im_start|>user\n<image>\nQuestion' in prompt and target.endswith('B. kite')
    system, user, turn = prompt.split('<|im_end|>\n')
    assert system.endswith('联合开发的多模态大语言模型。') and user.startswith('<|im_start|>user\n')
    assert turn == '<|im_start|>assistant\n'


def test_encode_supervises_only_what_follows(loaded):
    _, model, tokenizer = loaded
    tiles, N = torch.zeros(2, 3, 56, 56, dtype=torch.uint8), 4
    encode = lambda stage, **k: prepare.encode(ROW, tokenizer, stage, tiles, num_image_tokens=N, **k)
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS}
    for stage in range(4):
        row = encode(stage)
        first = next(i for i, label in enumerate(row['labels']) if label != -100)
        assert row['labels'][first:] == row['input_ids'][first:] and row['labels'][-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row['labels'][first:-1]) == prepare.build_text(ROW, stage)[2]
        before = encode(stage, supervised=False)
        assert before['input_ids'] == row['input_ids'][:first] and before['labels'] is None  # evaluation sends the same
        assert before['input_ids'].count(ids['<IMG_CONTEXT>']) == 2 * N
        markers = [ids['<|start-latent|>'], *[ids['<|latent|>']] * 2 * stage, ids['<|end-latent|>']]
        assert before['input_ids'][-len(markers):] == markers if stage else not set(markers) & set(row['input_ids'])
    with pytest.raises(ValueError, match=r'row q1 needs \d+ tokens \(8 visual, 2 thoughts\), max_length is 20'):
        encode(1, max_length=20)
    with pytest.raises(ValueError, match='row q1 holds 9 <IMG_CONTEXT> tokens, but its 2 tiles give 8'):
        prepare.encode(dict(ROW, question='<IMG_CONTEXT>?'), tokenizer, 0, tiles, num_image_tokens=N)
    with pytest.raises(ValueError, match='row q1 holds 0 <IMG_CONTEXT> tokens, but its 2 tiles give 8'):
        prepare.encode(ROW, tokenizer, 0, tiles, num_image_tokens=N, prompt='{question}')
    with pytest.raises(ValueError, match='row q1 has no answer'):
        prepare.encode({k: v for k, v in ROW.items() if k != 'answer'}, tokenizer, 0, tiles, num_image_tokens=N)


def test_stage_0_holds_no_thought_and_mixing_depends_on_the_row_alone(loaded):
    tokenizer = loaded[2]
    rows = [dict(ROW, image=None, question_id=str(i)) for i in range(200)]
    latent = tokenizer.convert_tokens_to_ids('<|latent|>')
    for uniform_prob in (0.0, 0.5, 1.0):
        assert all(latent not in r['input_ids']
                   for r in prepare.Rows(rows, 'train', 0, tokenizer, uniform_prob=uniform_prob))
    split = prepare.Rows(rows, 'train', 3, tokenizer, uniform_prob=0.4, seed=1, epoch=2)
    stages = [split.stage_of(i) for i in range(200)]
    assert 100 < stages.count(3) < 140 and set(stages) == {0, 1, 2, 3}
    assert prepare.Rows(rows[::-1], 'train', 3, tokenizer, uniform_prob=0.4, seed=1, epoch=2).stage_of(0) == stages[-1]
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
            rows = prepare.Rows([row], 'train', stage, tokenizer, image_size=56, max_length=most, num_image_tokens=4)
            assert rows.fits(0) is fits and rows.length(0) == need
            mixed = prepare.Rows([row], 'train', stage, tokenizer, image_size=56, max_length=most, num_image_tokens=4,
                                 uniform_prob=0.1)
            assert mixed.fits(0) is (fits and stage == 0)  # drawn to stage 0, all steps in words, the row is longer


@pytest.mark.parametrize('text, expected', (
    ('It is windy.\nThe answer is B. kite', (1, True)), ('Answer: (C)', (2, True)), ('**Answer:** D', (3, True)),
    ('blue\nkite B', (1, True)), ('B', (1, True)), ('(C).', (2, True)), ('a Kite, surely', (1, True)),
    ('not a dog but a kite', (1, True)), ('The answer is kite', (1, True)),
    ('The answer is A. cat\nNo, the answer is D. car', (3, True)), ('A person walks', (0, False)),
    ('carpet', (0, False)), ('', (0, False))))
def test_choice_extraction(text, expected):
    assert prepare.extract_choice(text, ROW['choices']) == expected
    assert prepare.extract_choice('a black cat', ['cat', 'black cat', 'dog', 'car']) == (1, True)  # the longer of two


def test_answers_are_scored(loaded):
    """Without choices by the last line; the interval is Wilson's, as tables of it have it."""
    _, model, tokenizer = loaded
    texts, row = ('Tom is a cat.\n### Yes.', '### No.', 'Yes.', ''), dict(answer='Yes.', question='?')

    class Says:
        config = model.config

        def generate(self, **asked):
            ids = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts]
            return torch.tensor([i + [model.config.pad_token_id] * (40 - len(i)) for i in ids])

    batch = dict(input_ids=torch.tensor([[7, model.config.latent_token_id]] * 4))
    said = evaluate.respond(Says(), tokenizer, batch, [row] * 4, '### {answer}')
    assert [one['right'] for one in said] == [True, False, True, False]
    assert [one['exact'] for one in said] == [True, False, False, False]
    assert [one['text'] for one in said] == list(texts)
    assert [one['tokens'] for one in said] == [len(text) + 1 for text in texts] and said[0]['thoughts'] == 1
    assert all(one['parsed'] for one in said)
    one = dict(tokens=1, thoughts=0, parsed=True, ended=True)
    interval = lambda right, n: evaluate.summarize([dict(one, right=i < right) for i in range(n)], 1.0)['interval']
    assert interval(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert interval(500, 500) == pytest.approx([0.9924, 1], abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# images

@pytest.mark.parametrize('max_tiles', (1, 8, 12))
def test_tiles_equal_transformers(max_tiles):
    """Bit for bit against the PIL processor, over sizes of photographs and of no photograph."""
    processor = GotOcr2ImageProcessorPil(size=dict(height=56, width=56), crop_to_patches=True,
                                         min_patches=1, max_patches=max_tiles)
    rng = np.random.default_rng(0)
    sizes = [(640, 480), (480, 640), (500, 375), (640, 427), (612, 612), (640, 360), (640, 512), (1, 1), (1, 5000),
             (5000, 7), (56, 56), (79, 80)]
    for w, h in sizes + [tuple(rng.integers(1, 400, 2).tolist()) for _ in range(20)]:
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        theirs = processor(image, return_tensors='np', do_rescale=False, do_normalize=False,
                           input_data_format='channels_last')['pixel_values']
        ours = prepare.tile_image(image, 56, 1, max_tiles)
        assert ours.shape == theirs.shape and (ours.numpy() == theirs).all(), (w, h)
        assert len(ours) == prepare.count_tiles(w, h, 56, max_tiles=max_tiles)


def test_tile_counts_of_internvl():
    for (w, h), at_8, at_12 in (((640, 480), 7, 13), ((640, 427), 7, 7), ((612, 612), 1, 1), ((640, 640), 5, 5),
                                ((640, 512), 1, 13)):
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
        assert image.mode == 'RGB' and prepare.tile_image(image, 56).shape[1:] == (3, 56, 56)
    assert np.abs(np.asarray(prepare.load_image(str(tmp_path / 'deep.png')))[..., 0] - grey).max() <= 1  # not clipped
    turned = Image.new('RGB', (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / 'turned.jpg', exif=exif)
    assert prepare.load_image(str(tmp_path / 'turned.jpg')).size == (4, 8)
    rgb.save(tmp_path / 'cut.png')
    data = (tmp_path / 'cut.png').read_bytes()
    (tmp_path / 'cut.png').write_bytes(data[:len(data) // 2])
    (tmp_path / 'text.png').write_text('no image')
    for name, message in (('cut.png', 'cannot be read as an image'), ('text.png', 'cannot be read as an image')):
        with pytest.raises(ValueError, match=message):
            prepare.load_image(str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match='no image file'):
        prepare.load_image(str(tmp_path / 'none.png'))


def test_the_tile_cache(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / 'a.png')
    row = dict(image='a.png', image_hash='0')
    load = lambda **k: prepare.load_tiles(row, str(tmp_path), 'train', **{**dict(size=28), **k})
    cached = lambda: sorted((tmp_path / 'cache' / 'tiles' / 'train').glob('*')) if (tmp_path / 'cache').exists() else []
    plain = load(cache=False)
    assert not cached()
    assert torch.equal(load(), plain) and len(cached()) == 1
    monkeypatch.setattr(prepare, 'tile_image', lambda *a: pytest.fail('tiled again'))
    assert torch.equal(load(), plain)
    monkeypatch.undo()
    assert len(load(max_tiles=1)) == 1 and len(cached()) == 2       # other parameters, another file
    row['image_hash'] = '1'
    load()                                                          # another picture under the same name
    assert len(cached()) == 3 and not [f for f in cached() if f.suffix != '.npy']


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = str(tmp_path / 'file')
    with prepare.replacing(path) as part, open(part, 'w') as f:
        f.write('old')
    for error, message in ((OSError(28, 'No space left on device'), 'disk is full'), (KeyboardInterrupt(), None)):
        with pytest.raises(type(error), match=message):
            with prepare.replacing(path) as part, open(part, 'w') as f:
                f.write('half')
                raise error
        assert open(path).read() == 'old' and os.listdir(tmp_path) == ['file']
    with pytest.raises(RuntimeError, match='a bug'):  # not every error is a full disk
        with prepare.replacing(path):
            raise RuntimeError('a bug')
    monkeypatch.setattr(prepare.shutil, 'disk_usage', lambda folder: type('Usage', (), dict(free=0)))
    with pytest.raises(OSError, match='disk is full'):  # as torch.save says it
        with prepare.replacing(path):
            raise RuntimeError('PytorchStreamWriter failed writing file')


# ----------------------------------------------------------------------------------------------------------------------
# data sets

def test_colour_chain_is_what_it_says():
    """The picture alone gives the answer, and the map cannot be inverted."""
    invertible = 0
    for seed in range(50):
        image, row = toy.draw_chain(np.random.default_rng(seed))
        by_rgb = {rgb: name for name, rgb in toy.COLOURS.items()}
        cells = image.reshape(3, 28, 3, 28, 3).swapaxes(1, 2).reshape(9, 28, 28, 3)
        leads_to = {by_rgb[tuple(c[3, 3])]: by_rgb[tuple(c[14, 14])] for c in cells if tuple(c[3, 3]) in by_rgb}
        here = start = row['question'].split(' from ')[1].rstrip('?')
        assert len(leads_to) == 8
        for step in row['rationales']:
            here = leads_to[here]
            assert step.split()[0] == here
        assert here == row['choices'][row['correct_choice_idx']]
        assert (len({start, *(s.split()[0] for s in row['rationales'])}) == 5
                and start not in row['choices'] and len(set(row['choices'])) == 4)
        invertible += len(set(leads_to.values())) == 8
    assert invertible == 0
    assert len(toy.draw_chain(np.random.default_rng(0), 6)[1]['rationales']) == 6


@pytest.mark.parametrize('nodes', (10, 23))
def test_graphs_are_what_they_say(nodes):
    """
    Read from the question alone: one of the two kinds can be reached, the steps are a shortest way to it, and the
    other is as far from another person: once it was nearer, and who looked for the nearest person was right in 87 %
    of the graphs.
    """
    lengths, first, clues = [], 0, np.zeros(4)
    for seed in range(200):
        asked = 1 + seed % 3
        row = toy.draw_graph(np.random.default_rng(seed), nodes, asked)
        *facts, question = re.findall(r'[^.?]+[.?]', row['question'])
        edges = [re.fullmatch(r'(?:Every )?(\w+) is a (\w+)\.', fact.strip()).groups() for fact in facts]
        who, one, other = re.fullmatch(r'Is (\w+) a (\w+) or a (\w+)\?', question.strip()).groups()
        assert (len(set(edges)) == len(edges)
                and all(fact.strip().startswith('Every') == a.endswith('mpus') for fact, (a, b) in zip(facts, edges)))
        reached, away, far = {who: 0}, {who}, 0
        while away:
            away, far = {b for a, b in edges if a in away} - reached.keys(), far + 1
            reached.update(dict.fromkeys(away, far))
        right = row['results'][-1]
        assert ({one, other} & reached.keys() == {right} and row['answer'] == f'{who} is a {right}.'
                and right in (one, other))
        assert len(row['steps']) == len(row['results']) == reached[right] >= asked
        here = who
        for step, result in zip(row['steps'], row['results']):
            assert (here, result) in edges and step == f'{"" if here == who else "Every "}{here} is a {result}.'
            here = result
        lengths.append(len(row['steps']))
        first += right == one
        above = lambda kind: {a for a, b in edges if b == kind}
        grand = lambda kind: set().union(*map(above, above(kind)))
        looks = (lambda kind: any(not a.endswith('mpus') for a in above(kind)),
                 lambda kind: any(not a.endswith('mpus') for a in grand(kind)),
                 lambda kind: len(above(kind)), lambda kind: sum(kind in edge for edge in edges))
        wrong = other if right == one else one
        clues += [0.5 + 0.5 * np.sign(int(look(right)) - int(look(wrong))) for look in looks]
    assert {1, 2, 3} <= set(lengths) and 75 <= first <= 125
    assert all(80 <= clue <= 120 for clue in clues), clues  # about half of 200: none gives the answer away


RAW = dict(question_id='a', question='Q? ', choices=list('wxyz'), correct_choice_idx=2,
           rationales=['One two. Three!', 'b'])


def test_rows_of_aokvqa():
    build = lambda split='train', steps_from='first', **k: prepare.build_row(dict(RAW, **k), split, steps_from, 4)
    row, _ = build()
    assert (row['question'], row['steps'], row['answer'], row['explanation']) == (
        'Q?', ['One two.', 'Three!'], 'y', 'One two.')
    assert build(steps_from='all')[0]['steps'] == ['One two. Three!', 'b']
    assert build(rationales=['one two three four five six'])[0]['steps'] == ['one two', 'three four', 'five', 'six']
    assert build(rationales=['one two'])[0]['steps'] == ['one', 'two']
    assert build(choices=list('vwxyz'))[0]['answer'] == 'x'
    assert build(choices=['w'])[1] == build(choices=list('rstuvwxyz'))[1] == 'without 2 to 8 options'
    assert build(correct_choice_idx=4)[1] == build(correct_choice_idx=None)[1] == 'without a valid correct_choice_idx'
    assert build(rationales=[])[0]['steps'] == build('validation', rationales=[])[0]['steps'] == []
    test_row, _ = build('test', correct_choice_idx=None, rationales=None)
    assert 'answer' not in test_row and 'steps' not in test_row


def parquet(folder, split, rows):
    from datasets import Dataset, Features, Image as ImageFeature, Sequence, Value
    os.makedirs(folder, exist_ok=True)
    features = Features(
        image=ImageFeature(), question_id=Value('string'), question=Value('string'), choices=Sequence(Value('string')),
        correct_choice_idx=Value('int8'), rationales=Sequence(Value('string')))
    Dataset.from_list(rows, features=features).to_parquet(f'{folder}/{split}-00000-of-00001.parquet')


def script(*args, fails=False):
    """Runs one of the scripts as a user would, but in this process, which saves the imports; gives what it printed."""
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
    split = lambda *raw: prepare.prepare(dict(validation=raw), [], str(tmp_path), 'first', 4, 448, 8, True)['validation']
    assert ([row['question_id'] for row in split({**RAW, 'question_id': ''}, RAW, {**RAW, 'question_id': ''})]
            == ['0', 'a', '2'])
    with pytest.raises(ValueError, match='2 rows with question_id a: every row needs one of its own'):
        split(RAW, RAW)


def test_prepare_drops_counts_and_names(tmp_path):
    png = io.BytesIO()
    Image.new('RGB', (80, 60), 'red').save(png, 'PNG')
    good, cut = (dict(bytes=b, path=None) for b in (png.getvalue(), png.getvalue()[:len(png.getvalue()) // 2 + 20]))
    rows = [dict(RAW, question_id=f'good{i}', image=good) for i in range(4)]
    rows += [dict(RAW, question_id='one', image=good, choices=['w']), dict(RAW, question_id='cut', image=cut),
             dict(RAW, question_id='range', image=good, correct_choice_idx=7),
             dict(RAW, question_id='text', image=dict(bytes=b'no', path=None))]
    parquet(tmp_path / 'in', 'train', rows)
    parquet(tmp_path / 'in', 'validation', rows[:2])
    args = ['prepare.py', '--dataset', tmp_path / 'in', '--data_dir', tmp_path / 'out', '--image_size=28',
            '--max_tiles=4', '--init_from=scratch']
    said = script(*args)
    assert ('dropped 1 rows without 2 to 8 options: one' in said
            and 'dropped 1 rows without a valid correct_choice_idx: range' in said)
    assert 'dropped 2 rows with an unreadable image: text' in said and 'cut (' in said and 'train: 4 rows of 8' in said
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
        'prepare.py', '--dataset', tmp_path / 'other', '--data_dir', tmp_path / 'o2', '--init_from=scratch', fails=True)
    parquet(tmp_path / 'empty', 'train', rows[4:])
    assert 'train holds no usable row of ' in script(
        'prepare.py', '--dataset', tmp_path / 'empty', '--data_dir', tmp_path / 'o2', '--init_from=scratch', fails=True)
    assert 'holds no train' in script(
        'prepare.py', '--dataset', tmp_path / 'out', '--data_dir', tmp_path / 'o2', '--init_from=scratch', fails=True)


# ----------------------------------------------------------------------------------------------------------------------
# what people bring

def test_code_of_a_checkpoint_folder_is_never_run(tmp_path, monkeypatch):
    """OpenGVLab's folders name code of their own, and transformers' Auto classes ask to run it; here nothing asks."""
    save_tiny(tmp_path, layout='opengvlab')
    code = f"open({str(tmp_path / 'RAN')!r}, 'w')\n"
    for module in ('configuration_x', 'modeling_x', 'tokenization_x'):
        (tmp_path / f'{module}.py').write_text(code)
    edit_files(tmp_path, config=lambda c: c.update(
        auto_map=dict(AutoConfig='configuration_x.C', AutoModel='modeling_x.M', AutoTokenizer='tokenization_x.T')))
    path = tmp_path / 'tokenizer_config.json'
    for named in (dict(auto_map=dict(AutoTokenizer=['tokenization_x.T', None])), dict(tokenizer_class='T')):
        path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
        monkeypatch.setattr('builtins.input', lambda *a: pytest.fail('asked'))
        began = time.time()
        MultiCoCo.from_pretrained(str(tmp_path))
        assert len(load_tokenizer(str(tmp_path))) == 265
        assert time.time() - began < 10  # transformers waits 15 s for an answer
        assert not (tmp_path / 'RAN').exists()


@pytest.mark.parametrize('changes, field, expected', (
    (dict(rationales='It is windy. A string goes up.'), 'steps', ['It is windy.', 'A string goes up.']),
    (dict(rationales="['One two. Three!', 'b']"), 'steps', ['One two.', 'Three!']),
    (dict(rationales=['1. One.\n2. Two.']), 'steps', ['One.', 'Two.']),
    (dict(rationales=['Dr. Smith came at 5 p.m. to St. Louis. He left.']), 'steps',
     ['Dr. Smith came at 5 p.m. to St. Louis.', 'He left.']),
    (dict(rationales=['天上有风。线往上走。']), 'steps', ['天上有风。', '线往上走。']),
    (dict(rationales=None, steps='One.\nTwo two. Three.'), 'steps', ['One.', 'Two two.', 'Three.']),
    (dict(steps=[1, 2.0, 2.5]), 'steps', ['1', '2', '2.5']),
    (dict(steps=['One\ntwo.\n', '', None, ' Three. ']), 'steps', ['One two.', 'Three.']),
    (dict(correct_choice_idx='1'), 'correct_choice_idx', 1), (dict(correct_choice_idx=1.0), 'correct_choice_idx', 1),
    (dict(correct_choice_idx='B'), 'correct_choice_idx', 1), (dict(correct_choice_idx='1.0'), 'correct_choice_idx', 1),
    (dict(correct_choice_idx=None, answer='x'), 'correct_choice_idx', 1),
    (dict(correct_choice_idx=float('nan'), answer='(B)'), 'correct_choice_idx', 1),
    (dict(correct_choice_idx=None, answer='X '), 'correct_choice_idx', 1),
    (dict(correct_choice_idx=None, answer='b', choices=list('cabd')), 'correct_choice_idx', 2),
    (dict(correct_choice_idx=1, answer='x'), 'answer', 'x'),
    (dict(choices="['w', 'x', 'y']"), 'choices', ['w', 'x', 'y']), (dict(choices=[3, 4.0, 5]), 'choices', ['3', '4', '5']),
    (dict(choices=[' w', 'x ', 'y']), 'choices', [' w', 'x ', 'y']), (dict(choices=[' w', 'x ', ' y']), 'answer', 'y'),
    (dict(choices=None, answer=18), 'answer', '18'), (dict(choices=[], answer=18.0), 'answer', '18'),
    (dict(question_id=None, idx=7), 'question_id', '7'), (dict(question_id=3.0), 'question_id', '3')))
def test_obvious_conversions(changes, field, expected):
    row, reason = prepare.build_row(dict(RAW, **changes), 'train')
    assert reason is None
    assert row[field] == expected


@pytest.mark.parametrize('changes, reason', (
    (dict(question=None), 'without a question'), (dict(question=' '), 'without a question'),
    (dict(question=['a', 'b']), 'whose question is list, not text'),
    (dict(choices='w or x'), 'without 2 to 8 options'), (dict(choices=dict(A='w', B='x')), 'whose choices is dict'),
    (dict(choices=['w', '', 'y']), 'with an empty option'), (dict(choices=['w', None, 'y']), 'with an empty option'),
    (dict(choices="['w' 'x' 'y']"), 'whose choices is a list without commas'),
    (dict(correct_choice_idx=-2), 'without a valid correct_choice_idx'),
    (dict(correct_choice_idx=0.5), 'without a valid correct_choice_idx'),
    (dict(correct_choice_idx=True), 'without a valid correct_choice_idx'),
    (dict(correct_choice_idx=float('inf')), 'without a valid correct_choice_idx'),
    (dict(correct_choice_idx=None, answer='q'), 'whose answer is none of its options'),
    (dict(correct_choice_idx=None, answer='A', choices=list('cabd')), 'whose answer is several of its options'),
    (dict(correct_choice_idx=0, answer='x'), 'whose answer and correct_choice_idx disagree'),
    (dict(choices=None, answer=None), 'without an answer'), (dict(choices=None, answer=True), 'whose answer is bool'),
    (dict(steps=[dict(text='a')]), 'whose steps is dict, not text'), (dict(rationales=7), 'whose rationales is int'),
    (dict(question='<image>\nWhat?'), 'whose own text holds <image>'),
    (dict(steps=['so <|latent|>']), r'whose own text holds <\|latent\|>'),
    (dict(choices=['w', 'x<|im_end|>', 'y']), r'whose own text holds <\|im_end\|>'),
    (dict(question='a \ud83d?'), 'whose text is not valid Unicode')))
def test_rows_that_cannot_be_used_are_dropped_with_the_reason(changes, reason):
    row, said = prepare.build_row(dict(RAW, **changes), 'train')
    assert row is None
    assert re.match(reason, said)


def test_rows_without_steps_have_every_thought():
    """Nobody knows how many their steps would ask for; a question of sample.py's is like that too."""
    for row in (dict(ROW, steps=[]), {key: value for key, value in ROW.items() if key != 'steps'}):
        for stage in range(3):
            assert prepare.build_text(row, stage, pad_latent_to_max=False)[1] == 2 * stage


def prepared(folder, dataset, *more, fails=False):
    return script('prepare.py', '--dataset', dataset, '--data_dir', folder, '--init_from=scratch', '--image_size=28',
                  '--max_tiles=4', *more, fails=fails)


def own_rows(folder, name, count=4, **more):
    """A .jsonl of rows with pictures beside it."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        Image.new('RGB', (40, 30), (20 * i, 90, 90)).save(folder / f'{i}.png')
        rows.append({**dict(question=f'What is {i}?', answer='a cat', steps=['It has fur.'], image_path=f'{i}.png'),
                     **{key: value(i) if callable(value) else value for key, value in more.items()}})
    (folder / name).write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return folder / name


@pytest.mark.parametrize('train, validation', (
    ('mine_train', 'mine_val'), ('mine-train', 'mine-dev'), ('train', 'valid'), ('own_val_train', 'own_val_val'),
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


def test_parquet_files_by_a_word_of_their_name_or_folder(tmp_path):
    png = io.BytesIO()
    Image.new('RGB', (40, 30)).save(png, 'PNG')
    rows = [dict(RAW, question_id=str(i), image=dict(bytes=png.getvalue(), path=None)) for i in range(4)]
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
    assert 'no validation file beside' in said
    (tmp_path / 'in' / 'chat.jsonl').write_text('{"image": "0.png", "conversations": [{"from": "human"}]}\n' * 3)
    said = prepared(tmp_path / 'out2', tmp_path / 'in' / 'chat.jsonl', fails=True)
    assert 'has no column question but conversations: rows are read by the names question, image' in said


def test_rows_without_the_picture_that_others_have(tmp_path):
    paths = ['0.png', None, 'none.png', ['0.png', '1.png'], 'notes.txt', '', ['3.png'], '3.png']
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'notes.txt').write_text('no picture')
    dataset = own_rows(tmp_path / 'in', 'mine_train.jsonl', 8, image_path=lambda i: paths[i])
    own_rows(tmp_path / 'in', 'mine_val.jsonl', 2)
    said = prepared(tmp_path / 'out', dataset)
    assert 'dropped 2 rows without the image that other rows have: 1, 5' in said
    assert 'dropped 1 rows whose image file is not there: 2 (none.png)' in said
    assert 'dropped 1 rows with 2 images, where one is used: 3' in said
    assert 'dropped 1 rows with an unreadable image: 4 (cannot be read as an image' in said
    assert 'train: 3 rows of 8' in said


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
    assert before == {path: path.read_text() for path in (tmp_path / 'out').glob('*.jsonl')}  # nothing half-written
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
        assert (tmp_path / 'out' / row['image']).read_bytes() == (tmp_path / 'in' / f'{i}.png').read_bytes()


@pytest.mark.parametrize('name, content, message', (
    ('a.json', '[{"question": "é"}]'.encode('latin-1'), 'is not UTF-8 text'),
    ('a.jsonl', b'{"question": "a"}\n{"question": \n', r'neither a JSON list nor a JSON row a line \(line 2'),
    ('a.json', b'{"data": []}', 'is not a list of rows'), ('a.csv', b'question\n', 'is not a .jsonl, .json or .parquet'),
    ('a.jsonl', b'{"question": "a", "answer": "b"}', 'holds 1 row'), ('a.json', b'[]', 'holds 0 row')))
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
    0: ['A', 'a', '(a)', 'A cat', 'I am a cat', 'The answer is A because B is wrong', 'A. cat', 'cat', 'Cats.'],
    1: ['B.', 'answer: b', 'B, because A is wrong', 'The answer is A. Wait, the answer is B.', 'Final answer: A kite',
        'There is a dog. The answer is B. kite', 'Step 1: a dog is seen.\nStep 2: the car is red.\nB. kite',
        'A. cat\nB. kite\nC. dog\nD. car\n\nThe answer is B', 'blue\nkite B', 'not a dog but a kite',
        'The answer is not the dog, it is B', 'Answer: B (not A)'],
    2: ['**C**', '\\boxed{C}', '$\\boxed{\\text{C}}$', '<answer>C</answer>', '<think>A or B?</think>C', '答案是C', '选C', 'Ｃ',
        'Option C.', 'C is correct. The kite is not.', 'La réponse est C', 'Ответ: C', 'dog (C)', 'It is a dog',
        'C. dog\n\nThe car is only in the background.', 'The answer is (C) dog, not car', '- C', '[[C]]', '"c"'],
    3: ['D', '#### D', '### D', 'Therefore, the answer is: **(D) car**', 'Answer\nD', "I'd go with D", 'D – car', 'D, car',
        'It is not C, it is D.', 'Option A is wrong. Option D is right.', 'Answer: the car', 'D.\n\nBecause of the wheels.'],
    None: ['', '.', 'The', 'Z', 'E', 'The answer is E. bird', 'A kite flies.\nThe answer is E. bird', 'I do not know',
           'A or B', 'A/B', 'A, B', '(A) or (C)', 'AB', 'A B C D', 'A. cat B. kite C. dog D. car', 'cat or dog', 'B. dog',
           'dog A', 'not A', 'Neither A nor B', 'The dog sits in the car.', 'It has a lot of vitamin C', 'carpet', 'hotdog',
           'He is in Plan B', 'None of the above', "The answer isn't A", 'A+', 'C#', 'B-52', 'D.C.', 'A.M.', 'It is not a car.']}


@pytest.mark.parametrize('option', SAID)
def test_answers_are_read_only_where_they_say_an_option(option):
    expected = (0, False) if option is None else (option, True)
    wrong = {text: found for text in SAID[option] if (found := prepare.extract_choice(text, K)) != expected}
    assert not wrong


@pytest.mark.parametrize('text, choices, expected', (
    ('vitamin C', ['vitamin B', 'vitamin C', 'vitamin D', 'vitamin A'], 1), ('C++', ['Java', 'C++', 'C', 'Go'], 1),
    ('The answer is A-frame', ['tent', 'A-frame', 'igloo', 'yurt'], 1), ('a kite', ['a', 'kite', 'b', 'c'], 1),
    ('The answer is A', ['B', 'A', 'D', 'C'], 0), ('The answer is a', ['c', 'a', 'd', 'b'], 1),
    ('12', ['1', '2', '12', '21'], 2), ('1.5', ['1', '1.5', '5', '15'], 1), ('-5', ['5', '-5', '15', '25'], 1),
    ('3.', ['1', '2', '3', '4'], 2), ('$50', ['$5', '5', '$50', '50'], 2), ('not sure', ['no', 'not sure', 'yes'], 1),
    ('No, there is none', ['yes', 'no'], 1), ('There is no dog', ['yes', 'no'], None),
    ('red, white and blue', ['red', 'white', 'red, white and blue', 'blue'], 2), ('E', list('vwxyz'), 4),
    ('a black cat', ['cat', 'black cat', 'dog', 'car'], 1), ('t-shirt', ['t shirt', 'shirt', 'hat', 'shoe'], 0),
    ('不是狗', ['猫', '风筝', '狗', '车'], None), ('图中有一只狗。', ['猫', '风筝', '狗', '车'], 2),
    ('cafe\u0301', ['caf\u00e9', 'bar', 'inn', 'pub'], 0), ('ﬁsh', ['fish', 'dog', 'cat', 'car'], 0)))
def test_letters_and_names_inside_options(text, choices, expected):
    assert prepare.extract_choice(text, choices) == ((0, False) if expected is None else (expected, True))


def test_text_that_ran_out_is_no_answer_unless_it_said_one():
    for text, expected in (('The answer is B', None), ('B. ki', None), ('Option A is a cat, which', None),
                           ('The answer is B. kite\n\nA kite is a toy that', 1), ('Answer: C\nbecause', 2)):
        found = prepare.extract_choice(text, K, '{letter}', ended=False)
        assert found == ((0, False) if expected is None else (expected, True)), text


@pytest.mark.parametrize('template', (
    prepare.ANSWER, '{choice} {letter}', '{letter}', '{choice}', '<answer>{letter}</answer>', '\\boxed{{{letter}}}',
    '{letter}, because {explanation}', '{letter}. {choice}\n{explanation}', '答案是{letter}', '{explanation} So {letter}'))
def test_the_recipes_own_text_is_read_back(template):
    """Whatever the options are, also where a letter or a name alone would be taken for another option."""
    for choices in (K, list('cadb'), ['vitamin B', 'vitamin C', 'vitamin D', 'vitamin A'], ['C', 'C++', 'C#', 'D'],
                    ['yes', 'no', 'A and B', 'B only'], ['The answer is A', 'B is it', 'Both A and B', 'None of A, B']):
        for right in range(4):
            row = dict(ROW, choices=choices, correct_choice_idx=right, answer=choices[right])
            prepare.check_round_trip([row], template)


def test_a_recipe_that_cannot_be_read_back_is_refused(run, tmp_path):
    said = script('train.py', *TOY, f'--data_dir={run[0]}/data', f'--out_dir={tmp_path}/out', '--answer=It is said',
                  fails=True)
    assert "answer='It is said' makes 'It is said' of row 00000, which is read back as no option" in said
    assert not (tmp_path / 'out').exists()


def test_unread_is_wrong_and_equal_options_are_both_right(loaded):
    """The file for the official scorer holds options as the data set spells them, and A where none was read."""
    _, model, tokenizer = loaded
    texts = ['D', 'no idea', 'C', 'A']
    row = dict(question='?', choices=[' cat', 'kite', 'cat', 'car '], correct_choice_idx=0, answer='cat')

    class Says:
        config = model.config

        def generate(self, **asked):
            ids = [tokenizer.encode(text) + [tokenizer.eos_token_id] for text in texts]
            return torch.tensor([i + [model.config.pad_token_id] * (20 - len(i)) for i in ids])

    batch = dict(input_ids=torch.tensor([[7]] * 4))
    said = evaluate.respond(Says(), tokenizer, batch, [row] * 4, '{letter}')
    assert [one['parsed'] for one in said] == [True, False, True, True]
    assert [one['right'] for one in said] == [False, False, True, True]
    assert [one['option'] for one in said] == ['car ', ' cat', 'cat', ' cat']
    metrics = evaluate.summarize(said, 1.0)
    assert (metrics['accuracy'], metrics['accuracy_default_a'], metrics['unparsed']) == (0.5, 0.75, 1)


@pytest.mark.parametrize('said, known, right', (
    ('1,000', '1000', True), ('18.', '18', True), ('No', 'No.', True), ('the cat', 'a cat', True), ('two', '2', True),
    ('T-shirt', 't shirt', True), ('Tom is a lempus. ', 'Tom is a lempus.', True), ('18 apples', '18', False),
    ('-5', '5', False), ('1.5', '15', False), ('not a cat', 'a cat', False), ('', 'a', False), ('#### 18', '18', True)))
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


@pytest.mark.parametrize('message, changes', (
    ('its rope is yarn', dict(text_config__rope_parameters=None, text_config__rope_scaling=dict(type='yarn', factor=4.0))),
    ('its rope is linear', dict(text_config__rope_parameters=dict(rope_type='linear', factor=2.0, rope_theta=1e4))),
    ('its rope is another one in each kind of layer',
     dict(text_config__rope_parameters=dict(full_attention=dict(rope_type='default', rope_theta=1e4)))),
    ('partial_rotary_factor is 0.5', dict(text_config__partial_rotary_factor=0.5)),
    ('text hidden_act is gelu, not silu', dict(text_config__hidden_act='gelu')),
    ('sliding_window of 64', dict(text_config__use_sliding_window=True, text_config__sliding_window=64,
                                  text_config__layer_types=None, text_config__max_window_layers=0)),
    ('projector_hidden_act is silu', dict(projector_hidden_act='silu')),
    ('vision hidden_act is quick_gelu', dict(vision_config__hidden_act='quick_gelu')),
    ('vision_feature_layer is -2, not -1', dict(vision_feature_layer=-2)), ('select_strategy is full', dict(vision_feature_select_strategy='full')),
    ('has no bias', dict(vision_config__attention_bias=False)),
    ('use_mean_pooling is False', dict(vision_config__use_mean_pooling=False)),
    ('use_absolute_position_embeddings is False', dict(vision_config__use_absolute_position_embeddings=False)),
    ('quantization_config is ', dict(quantization_config=dict(quant_method='awq'))), ('use_llm_lora is 16, not 0', dict(use_llm_lora=16)),
    ('lacks vision hidden_size, ', dict(vision_config=None)),
    ('lacks text num_key_value_heads:', dict(text_config__num_key_value_heads=None))))
def test_config_values_that_change_the_result_are_refused_by_name(tmp_path, message, changes):
    save_tiny(tmp_path)
    edit_files(tmp_path, config=change_config(**changes))
    with pytest.raises(ValueError, match=message):
        MultiCoCo.from_pretrained(str(tmp_path))


def tensors(change):
    return lambda w: w.update(change(w))


def with_prefix(weights):
    """Names as transformers holds them in memory."""
    for name in list(weights):
        ours = name.replace('language_model.model.', 'language_model.').replace('language_model.lm_head', 'lm_head')
        weights[ours if ours.startswith('lm_head') else f'model.{ours}'] = weights.pop(name)


def with_buffers(weights):
    weights['language_model.model.rotary_emb.inv_freq'] = torch.ones(4)
    weights['vision_tower.embeddings.position_ids'] = torch.arange(17)[None]


def without_head(weights):
    del weights['language_model.lm_head.weight']


@pytest.mark.parametrize('weights, changes', (
    (None, dict(vision_config__layer_norm_eps=1e-2)), (None, dict(text_config__rms_norm_eps=1e-2)),
    (None, {f'text_config__{key}': value for key, value in rope(100.0).items()}),
    (None, dict(downsample_ratio=None, projector_hidden_act=None)), (with_prefix, {}), (with_buffers, {}),
    (without_head, dict(tie_word_embeddings=None, text_config__tie_word_embeddings=True)),
    pytest.param(without_head, dict(tie_word_embeddings=True, text_config__tie_word_embeddings=False),
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
        ours, theirs = model(ids, pixels).logits[..., :262], oracle(input_ids=ids, pixel_values=pixels).logits
    assert relative(ours, theirs) < 1e-5


def test_a_head_that_is_not_there_and_not_tied_is_missed(tmp_path):
    save_tiny(tmp_path)
    edit_files(tmp_path, without_head, change_config(tie_word_embeddings=False, text_config__tie_word_embeddings=True))
    with pytest.raises(ValueError, match='lm_head.weight is missing'):
        MultiCoCo.from_pretrained(str(tmp_path))


def test_a_silent_config_means_what_its_class_does(tmp_path):
    """OpenGVLab's has the first pixel shuffle where ps_version is not given."""
    save_tiny(tmp_path, layout='opengvlab')
    edit_files(tmp_path, config=change_config(ps_version=None))
    assert MultiCoCo.from_pretrained(str(tmp_path)).config.ps_version == 'v1'


def test_files_beside_the_weights(tmp_path):
    """A single file goes before an index that was left; a pointer, an adapter and a cut config are named."""
    save_tiny(tmp_path)
    (tmp_path / 'model.safetensors.index.json').write_text('{"weight_map": {"a": "gone.safetensors"}}')
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
    (tmp_path / 'model.safetensors').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
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


@pytest.mark.parametrize('mode, kind', (('RGBA', 'PNG'), ('LA', 'PNG'), ('P', 'PNG'), ('RGBA', 'WEBP'), ('RGBA', 'GIF')))
def test_what_is_transparent_is_shown_over_white(mode, kind):
    """A black drawing on transparent black ground would be black on black."""
    image = Image.new('LA' if mode == 'LA' else 'RGBA', (40, 30), (0, 0) if mode == 'LA' else (0, 0, 0, 0))
    image.paste((0, 255) if mode == 'LA' else (0, 0, 0, 255), (10, 10, 30, 20))
    image = image.quantize(4) if mode == 'P' else image
    shown = prepare.load_image(in_memory(image, kind, **(dict(lossless=True, exact=True) if kind == 'WEBP' else {})))
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


def test_a_turned_photograph_is_measured_as_it_is_shown(tmp_path):
    """640x512 is one tile, 512x640 are several; and damaged EXIF data does not hide the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = in_memory(Image.new('RGB', (640, 512)), 'JPEG', exif=exif.tobytes())
    assert prepare.load_image(photo).size == (512, 640)
    assert prepare.image_header(photo) == ('jpeg', (512, 640))
    entries = struct.pack('<H', 2) + struct.pack('<HHIHH', 0x0112, 3, 1, 6, 0)
    broken = (b'Exif\0\0II*\0' + struct.pack('<I', 8) + entries + struct.pack('<HHII', 0x011A, 10, 1, 38)
              + struct.pack('<Iii', 0, -1, 0))  # a resolution of -1 / 0
    photo = in_memory(Image.new('RGB', (640, 512)), 'JPEG', exif=broken)
    assert prepare.load_image(photo).size == prepare.image_header(photo)[1] == (512, 640)


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


def test_files_of_a_folder_of_images(tmp_path, capsys):
    for name in ('b.png', '._b.png', 'a.TIF', 'c,d.png', '.hidden.jpg', 'notes.txt'):
        (tmp_path / name).write_bytes(b'')
    names = runpy.run_path(os.path.join(HERE, 'sample.py'))['find_images']
    assert [os.path.basename(path) for path in names(str(tmp_path))] == ['a.TIF', 'b.png', 'c,d.png']
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
    assert sample_script.pick_dtype('auto', 'cuda') == 'float32'  # a T4 computes bfloat16 by emulation
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
    values, _ = configurator.parse(dict(prompt='', out_dir=''), [r'--prompt={question}\nA: ', r'--out_dir=C:\new'])
    assert values == dict(prompt='{question}\nA: ', out_dir=r'C:\new')


@pytest.mark.parametrize('workers', (0, 1))
def test_a_slip_in_changed_code_keeps_its_traceback(run, tmp_path, workers):
    """An unpacking error in `think`, or in `encode`, is not for the user; what is raised for the user is a sentence."""
    for name in ('model.py', 'prepare.py'):
        for file in os.listdir(HERE):
            if file.endswith('.py'):
                shutil.copy(os.path.join(HERE, file), tmp_path)
        text = (tmp_path / name).read_text()
        head = '    def think(' if name == 'model.py' else 'def encode('
        place = text.index('"""\n', text.index('"""', text.index(head)) + 3) + 4
        indent = '        ' if name == 'model.py' else '    '
        (tmp_path / name).write_text(f'{text[:place]}{indent}a, b = 1, 2, 3\n{text[place:]}')
        done = subprocess.run(
            [sys.executable, 'train.py', os.path.join(HERE, 'config/toy.py'), f'--data_dir={run[0]}/data',
             f'--out_dir={tmp_path}/out', '--overwrite=True', '--max_steps=1', f'--num_workers={workers}'],
            cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1
        assert 'Traceback' in done.stderr
        assert 'a, b = 1, 2, 3' in done.stderr
        assert 'too many values to unpack' in done.stderr


def test_numbers_on_a_pictures_axes(tmp_path):
    """A question may hold dollar signs, and a logarithmic axis has powers in its labels: neither is shown as source."""
    import matplotlib.text
    shown = []
    draw = matplotlib.text.Text.draw

    def record(self, renderer):
        shown.append((self.get_text(), self.get_parse_math()))
        return draw(self, renderer)

    matplotlib.text.Text.draw = record
    try:
        with open(tmp_path / 'metrics.jsonl', 'w') as f:
            for step in (1, 2):
                f.write(json.dumps(dict(event='train', step=step, stage=0, loss=10.0 ** -step)) + '\n')
                f.write(json.dumps(dict(event='eval', step=step, stage=0, loss=0.1, accuracy=0.5)) + '\n')
        probe.draw_curves(str(tmp_path / 'curves.png'), str(tmp_path / 'metrics.jsonl'))
    finally:
        matplotlib.text.Text.draw = draw
    powers = [parsed for text, parsed in shown if 'mathdefault' in text]
    assert powers
    assert all(powers)
    assert probe.literal('$5 or $6') == r'\$5 or \$6'


def test_the_result_of_a_step_in_coconuts_format_is_its_last_word(loaded):
    tokenizer = loaded[2]
    row = dict(steps=['Every wumpus is a lompus.', '<<48/2=24>>'])
    first = [{tokenizer.decode([token]).strip() for token in tokens} for tokens in probe.results_of(row, tokenizer)]
    assert first == [{'l', ''} - {''}, {'2'}]


# ----------------------------------------------------------------------------------------------------------------------
# configurator

def test_configurator(tmp_path):
    defaults = dict(n=1, rate=0.5, name='x', on=False)
    config = tmp_path / 'c.py'
    config.write_text('import os\n_hidden = 1\nn = 2\nrate = 1\nother = 3\n')
    parse = lambda *argv: configurator.parse(defaults, argv, elsewhere={'other'})[0]
    assert parse('--n=3', str(config), '--name', 'a=b', '--on=True') == dict(n=3, rate=1.0, name='a=b', on=True)
    assert (parse('--rate', '-2') == dict(defaults, rate=-2.0) and parse('--name=123')['name'] == '123'
            and defaults['n'] == 1)
    for argv, message in ((['--m=1'], 'unknown knob m'), (['--nam=1'], 'did you mean name'),
                          (['--n=1.5'], 'expected int, as in --n=1'), (['--on=yes'], 'expected True or False'),
                          (['--n'], 'write --n=VALUE'), (['--name', '--n=1'], 'write --name=VALUE'),
                          (['none.py'], 'no config file none.py'), (['--other=1'], 'belongs to another script')):
        with pytest.raises(ValueError, match=message):
            parse(*argv)
    for text, message in (('m = 1', 'c.py: unknown knob m'), ('n = "1"', "n = '1' is str, expected int"),
                          ('n = True', 'is bool'), ('n = ', 'SyntaxError')):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse(str(config))


def test_a_knob_means_the_same_in_every_script():
    seen = {}
    for name in ('prepare.py', 'train.py', 'sample.py', 'bench.py'):
        tree = ast.parse(open(os.path.join(HERE, name)).read())
        knobs = set(configurator.knob_names(os.path.join(HERE, name)))
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) in knobs:
                seen.setdefault(node.targets[0].id, set()).add(ast.unparse(node.value))
    differ = {k: v for k, v in seen.items() if len(v) > 1 and k not in ('seed',)}
    assert not differ, differ
    known = set(seen)
    for file in os.listdir(os.path.join(HERE, 'config')):
        if file.endswith('.py'):
            names = set(configurator.knob_names(os.path.join(HERE, 'config', file)))
            assert names <= known, f'config/{file}: {names - known}'


# ----------------------------------------------------------------------------------------------------------------------
# the commands, as a user runs them

TOY = ['config/toy.py', '--log_interval=1', '--num_workers=0', '--batch_size=16', '--eval_batch_size=16',
       '--epochs_stage0=1', '--epochs_per_stage=1', '--max_latent_stage=1', '--warmup_steps=2']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A prepared toy data set and one short run over two stages."""
    top = tmp_path_factory.mktemp('run')
    script('prepare.py', 'config/toy.py', f'--data_dir={top}/data',
           '--train_rows=48', '--val_rows=17', '--test_rows=17')
    said = script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={top}/out')
    return top, said


def weights_of(path):
    return torch.load(path, weights_only=True)['model']


def test_a_run_leaves_what_it_promises(run):
    top, said = run
    assert (re.search(r'test: swap +accuracy +[\d.]+ %, clean +[\d.]+ %', said)
            and 'ms an answer in batches of 16' in said and '\n       2 | ' in said)
    out = top / 'out'
    assert {'best.pt', 'last.pt', 'epoch_1.pt', 'epoch_2.pt', 'metrics.jsonl', 'metrics_epoch_2.json', 'curves.png',
            'predictions_test.json', 'answers_test.json', 'thoughts_test.json',
            'thoughts_test.png'} <= set(os.listdir(out))
    events = [json.loads(line) for line in open(out / 'metrics.jsonl')]
    assert ([e['event'] for e in events]
            == (['train'] * 3 + ['eval']) * 2 + ['final', 'final', 'speed', 'speed', 'intervention'])
    assert [e['step'] for e in events if e['event'] == 'train'] == [1, 2, 3, 4, 5, 6]
    for e in events:
        assert {'event', 'step', 'stage', 'epoch', 'time'} <= e.keys()
        if e['event'] == 'eval':
            assert {'accuracy', 'loss', 'tokens_per_answer', 'thoughts_per_answer', 'unparsed', 'examples'} <= e.keys()
            assert e['thoughts_per_answer'] == 2 * e['stage'] and e['examples'] == 17
    predictions, rows = json.load(open(out / 'predictions_test.json')), prepare.read_split(str(top / 'data'), 'test')
    assert (all(predictions[r['question_id']]['multiple_choice'] in r['choices'] for r in rows)
            and len(predictions) == len(rows))
    # the official metric
    right = sum(predictions[r['question_id']]['multiple_choice'] == r['choices'][r['correct_choice_idx']] for r in rows)
    assert right / len(rows) == events[-4]['accuracy_default_a'] >= events[-4]['accuracy']
    best = torch.load(out / 'best.pt', weights_only=True)
    assert {'model', 'config', 'tokenizer', 'knobs', 'stage', 'epoch', 'step', 'accuracy'} <= best.keys()
    assert best['stage'] == 1  # the furthest stage, whatever stage 0 scored


def test_a_checkpoint_reloads_bit_for_bit(run):
    top, _ = run
    model, tokenizer, _ = load_checkpoint(str(top / 'out' / 'last.pt'))
    saved = weights_of(top / 'out' / 'last.pt')
    assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items())
    assert all(tokenizer.convert_tokens_to_ids(t) < model.config.vocab_size for t in SPECIAL_TOKENS)
    assert tokenizer.encode('Four doors') == load_tokenizer(str(top / 'data' / 'tokenizer')).encode('Four doors')


def test_eval_only_measures_any_checkpoint(run, tmp_path):
    """Also a folder that train.py never saw, and a test split without labels."""
    top, _ = run
    (tmp_path / 'data').mkdir()
    for split in ('validation', 'test'):
        rows = prepare.read_split(str(top / 'data'), split)
        rows = [{k: v for k, v in r.items() if split != 'test' or k not in ('answer', 'steps', 'correct_choice_idx')}
                for r in rows]
        (tmp_path / 'data' / f'{split}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    os.symlink(top / 'data' / 'images', tmp_path / 'data' / 'images')
    save_tiny(tmp_path / 'model')
    for number, source in enumerate((top / 'out' / 'best.pt', tmp_path / 'model')):
        said = script('train.py', *TOY, f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/{number}',
                      '--eval_only=True', f'--init_from={source}', '--max_length=512')
        assert 'validation: accuracy' in said and 'test: no labels' in said
        assert len(json.load(open(tmp_path / str(number) / 'predictions_test.json'))) == 17
    assert (tmp_path / '0' / 'predictions_test.json').read_text() == (top / 'out' / 'predictions_test.json').read_text()


def events(folder, kind, drop=('time', 'seconds_per_answer', 'tokens_per_s', 'images_per_s', 'wait', 'memory_gb')):
    """Logged lines without what a clock or the machine decides."""
    lines = map(json.loads, open(folder / 'metrics.jsonl'))
    return [{k: v for k, v in line.items() if k not in drop} for line in lines if line['event'] == kind]


def assert_same_run(a, b):
    """Weights, optimizer, random states and metrics of two finished runs, bit for bit."""
    for name in ('best.pt', 'last.pt', 'epoch_1.pt', 'epoch_2.pt'):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (a, b))
        assert all(torch.equal(two['model'][k], v) for k, v in one['model'].items()), name
        assert all(one[k] == two[k] for k in ('stage', 'epoch', 'step', 'accuracy', 'best')), name
        if name != 'best.pt':
            states = [c['optimizer']['state'] for c in (one, two)]
            assert all(torch.equal(states[1][p][k], v)
                       for p, state in states[0].items() for k, v in state.items()), name
            assert one['random'][:2] == two['random'][:2] and torch.equal(one['random'][2], two['random'][2]), name
    for kind in ('train', 'eval', 'final', 'intervention'):
        assert events(a, kind) == events(b, kind), kind
    assert (a / 'predictions_test.json').read_text() == (b / 'predictions_test.json').read_text()


def test_micro_batches_and_stopping_inside_an_epoch(run):
    """Micro-batches give the same losses to rounding; a run stopped by max_steps and resumed is the run left alone."""
    top, _ = run
    args = [*TOY, f'--data_dir={top}/data']
    script('train.py', *args, f'--out_dir={top}/micro', '--micro_batch_size=4')
    losses = lambda name: [e['loss'] for e in events(top / name, 'train')]
    assert losses('micro') == pytest.approx(losses('out'), rel=1e-3) and len(losses('out')) == 6
    right = lambda name: [e['token_accuracy'] for e in events(top / name, 'train')]
    assert right('micro') == pytest.approx(right('out'), abs=0.02) and max(right('out')) > 0.1
    script('train.py', *args, f'--out_dir={top}/resumed', '--max_steps=2')
    assert torch.load(top / 'resumed' / 'last.pt', weights_only=True)['epoch'] == 0
    script('train.py', *args, f'--out_dir={top}/resumed', '--max_steps=4', '--init_from=resume')
    # more workers change no row and no order
    script('train.py', *args, f'--out_dir={top}/resumed', '--init_from=resume', '--num_workers=2')
    assert_same_run(top / 'out', top / 'resumed')
    starts = lambda: [start['command'] for start in json.load(open(top / 'resumed' / 'run.json'))]
    before = starts()
    assert len(before) == 3
    script('train.py', *args, f'--out_dir={top}/resumed', '--init_from=resume', '--eval_only=True')
    assert len(starts()) == 4 and starts()[:3] == before  # an evaluation in the run's folder lets none of its starts go
    assert torch.load(top / 'resumed' / 'last.pt', weights_only=True)['knobs']['init_from'] == 'scratch'
    assert 'batch_size=16 is not a multiple of 5: 1 rank(s)' in script(
        'train.py', *args, f'--out_dir={top}/m', '--micro_batch_size=5', fails=True)


def start(*args, **more):
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=HERE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **more)


def wait_for(process, there):
    """Until there() holds, while the process runs."""
    while not there():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


DYING = """
import os, runpy, signal, sys, torch
whole, count = torch.save, [0]
def save(state, file):
    count[0] += 1
    if count[0] == 5:
        file.write(b'half of a checkpoint')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    whole(state, file)
torch.save = save
sys.argv = ['train.py', *sys.argv[1:]]
runpy.run_path('train.py', run_name='__main__')
"""


DYING_IN_EVALUATION = """
import evaluate, os, runpy, signal, sys
evaluate.Evaluation.ask = lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL)
sys.argv = ['train.py', *sys.argv[1:]]
runpy.run_path('train.py', run_name='__main__')
"""


def test_killed_at_any_moment(run, tmp_path):
    """
    SIGTERM inside an epoch, SIGKILL while a checkpoint is being written, behind the stage switch, and in the last
    evaluation: resumed each time, the run ends as one left alone, with activation checkpointing and workers.
    """
    top, _ = run
    args = [*TOY, f'--data_dir={top}/data', '--activation_checkpointing=True', '--save_every=1', '--batch_size=4',
            '--num_workers=1']
    script('train.py', *args, f'--out_dir={tmp_path}/alone')
    out = tmp_path / 'killed'
    args += [f'--out_dir={out}']
    logged = lambda: len((out / 'metrics.jsonl').read_text().splitlines()) if (out / 'metrics.jsonl').exists() else 0
    process = start('train.py', *args)
    wait_for(process, lambda: logged() >= 3)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert (process.returncode == 143 and error.startswith('train.py: stopped by SIGTERM after step ')
            and error.count('\n') == 1), error
    before = torch.load(out / 'last.pt', weights_only=True)
    assert before['step'] == int(error.split('after step ')[1].split(',')[0]) >= 3
    process = start('-c', DYING, *args, '--init_from=resume')
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and list(out.glob('*.part'))
    assert torch.load(out / 'last.pt', weights_only=True)['step'] > before['step']
    process = start('train.py', *args, '--init_from=resume')
    wait_for(process, lambda: '"stage": 1' in (out / 'metrics.jsonl').read_text())
    process.kill()
    process.communicate()
    process = start('-c', DYING_IN_EVALUATION, *args, '--init_from=resume')
    process.communicate(timeout=60)
    last = torch.load(out / 'last.pt', weights_only=True)
    assert process.returncode == -signal.SIGKILL and last['step'] == 24 and last['epoch'] == 1
    script('train.py', *args, '--init_from=resume')
    assert not list(out.glob('*.part'))
    assert_same_run(tmp_path / 'alone', out)


def test_ctrl_c_ends_evaluation_too(run, tmp_path):
    """last.pt is written before the evaluation, so the answer to Ctrl-C need not wait for its end."""
    top, _ = run
    process = start('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}', '--eval_batch_size=1',
                    '--epochs_stage0=1000')
    wait_for(process, lambda: (tmp_path / 'epoch_1.pt').exists())
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and 'stopped by SIGINT after step' in error and 'Traceback' not in error
    for file in tmp_path.glob('*.pt'):
        torch.load(file, weights_only=True)
    assert not list(tmp_path.glob('*.part'))


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
    """Prepared rows with one to four tiles or no image, and one to three steps."""
    top, rng = tmp_path_factory.mktemp('mixed'), np.random.default_rng(0)
    rows = []
    for i in range(9):
        png = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (28, (28, 60, 90)[i % 3], 3), dtype=np.uint8)).save(png, 'PNG')
        rows.append(dict(RAW, question_id=f'row{i}', question=f'What is {i}?',
                         rationales=['One.', 'Two two.', 'Three.'][:1 + i % 3],
                         image=dict(bytes=png.getvalue(), path=None)))
    for split in ('train', 'validation'):
        parquet(top / 'in', split, rows)
    script('prepare.py', '--dataset', top / 'in', '--data_dir', top / 'data', '--image_size=28', '--max_tiles=4',
           '--init_from=scratch', '--steps_from=all')
    for split in ('train', 'validation'):
        rows = prepare.read_split(f'{top}/data', split)
        for row in rows[::4]:
            del row['image']
        (top / 'data' / f'{split}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return [*TOY, '--prompt=<image>{question}\n{choices}\n', f'--data_dir={top}/data', '--image_size=28',
            '--max_tiles=4', '--max_length=256', '--max_latent_stage=2', '--start_stage=2',
            '--pad_latent_to_max=False', '--batch_size=8', '--eval_batch_size=4']


def test_two_ranks_are_one_process(mixed, tmp_path):
    """
    Rows with other tiles, thoughts and without an image; the last batch has one row for two ranks. Gradients are read
    from the optimizer's first moment. One process, micro-batches and two gloo ranks agree to rounding, and count each
    validation row once.
    """
    script('train.py', *mixed, f'--out_dir={tmp_path}/one', '--intervene=all')
    script('train.py', *mixed, f'--out_dir={tmp_path}/micro', '--micro_batch_size=2')
    process = start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py', *mixed,
                    f'--out_dir={tmp_path}/ranks', '--micro_batch_size=2', '--intervene=all')
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert out.count('step      1/2') == 1 and '2 rank(s), 2 micro-batch(es) of 2' in out
    one, *others = (torch.load(tmp_path / name / 'last.pt', weights_only=True) for name in ('one', 'micro', 'ranks'))
    assert one['step'] == 2 and one['stage'] == 2
    for other in others:
        states = one['optimizer']['state'], other['optimizer']['state']
        assert states[0].keys() == states[1].keys() and len(states[0]) > 40
        assert all(relative(states[1][p]['exp_avg'], state['exp_avg']) < 1e-4 for p, state in states[0].items())
    for name in ('micro', 'ranks'):
        for kind, keys in (('train', ('step', 'loss', 'token_accuracy', 'lr', 'grad_norm')),
                           ('eval', ('loss', 'accuracy', 'tokens_per_answer', 'thoughts_per_answer', 'examples'))):
            for a, b in zip(events(tmp_path / 'one', kind), events(tmp_path / name, kind), strict=True):
                assert [a[k] for k in keys] == pytest.approx([b[k] for k in keys], rel=1e-4), (name, kind)
    assert len(events(tmp_path / 'one', 'intervention')) > 10
    for a, b in zip(events(tmp_path / 'one', 'intervention'), events(tmp_path / 'ranks', 'intervention'), strict=True):
        assert ([a[k] for k in ('name', 'examples', 'accuracy', 'thoughts_per_answer')]
                == [b[k] for k in ('name', 'examples', 'accuracy', 'thoughts_per_answer')])
    assert ((tmp_path / 'one' / 'predictions_validation.json').read_text()
            == (tmp_path / 'ranks' / 'predictions_validation.json').read_text())
    assert not list((tmp_path / 'ranks').glob('*.part'))


def test_the_schedule_is_shown_before_it_is_run(run, mixed, tmp_path):
    top, _ = run
    toy = [*TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}/none', '--dry_run=True', '--max_latent_stage=2']
    said = script('train.py', *toy, '--uniform_prob=0.5', '--epochs_last_stage=2', '--c_thought=3')
    for line in ('stage 0: 1 epochs of 3 steps, 48 rows, 0 thoughts, 4 steps in words',
                 'stage 1: 1 epochs of 3 steps, 48 rows, 3 thoughts, 3 steps in words',
                 'stage 2: 1 epochs of 3 steps, 48 rows, 6 thoughts, 2 steps in words',
                 'stage 3: 2 epochs of 3 steps, 48 rows, 6 thoughts, 0 steps in words'):
        assert line in said
    assert said.count('each row with chance 0.5 at an earlier stage') == 3 and '5 epochs, 15 steps' in said
    assert ('<img><IMG_CONTEXT>*9</img>Four doors from' in said
            and '<|start-latent|><|latent|>*6<|end-latent|>[[' in said)
    assert '<|im_end|>]]' in said and not (tmp_path / 'none').exists()
    said = script('train.py', *toy, '--start_stage=2')
    assert 'stage 1:' not in said and '1 epochs, 3 steps' in said
    rates = lambda said: [line.split('learning rate ')[1].split(',')[0]
                          for line in said.splitlines() if line.startswith('stage')]
    flags = '--learning_rate=1e-3', '--learning_rate_stage0=0', '--min_lr_ratio=0.1'
    assert rates(script('train.py', *toy, *flags)) == ['5.0e-04 to 1.0e-03 to 1.0e-03'] * 3
    assert rates(script('train.py', *toy, *flags, '--reset_optimizer=False')) == [
        '5.0e-04 to 1.0e-03 to 1.0e-03', '9.6e-04 to 9.6e-04 to 6.5e-04', '4.5e-04 to 4.5e-04 to 1.4e-04']
    assert '0 thoughts, 0 steps in words' in script('train.py', *toy, '--mode=no_cot')
    assert '3 epochs of 3 steps, 48 rows, 0 thoughts, 4 steps in words' in script('train.py', *toy, '--mode=cot')
    assert '2 to 4 thoughts, 0 to 1 steps in words' in script(
        'train.py', *mixed, f'--out_dir={tmp_path}/none', '--dry_run=True')
    assert '4 thoughts, 0 to 1 steps in words' in script(
        'train.py', *mixed, '--pad_latent_to_max=True', '--dry_run=True')
    assert 'start_stage=3: expected 0 to 2' in script('train.py', *toy, '--start_stage=3', fails=True)


def test_the_optimizer_is_reset_or_kept(run):
    """Kept, its step count runs through both stages."""
    top, _ = run
    steps = lambda name: {int(s['step'])
                          for s in torch.load(top / name / 'last.pt', weights_only=True)['optimizer']['state'].values()}
    script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={top}/kept', '--reset_optimizer=False')
    assert steps('kept') == {6} and steps('out') == {3}


def test_a_run_starts_at_a_stage_from_a_checkpoint(run):
    """From the end of stage 0 with a fresh optimizer, stage 1 is what it is in a run through both."""
    top, _ = run
    script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={top}/later', f'--init_from={top}/out/epoch_1.pt',
           '--start_stage=1', '--max_steps=1')
    first, = events(top / 'later', 'train')
    fourth = events(top / 'out', 'train')[3]
    assert (first['stage'], first['lr']) == (1, fourth['lr']) and first['epoch'] == 0  # another epoch, so other rows


@pytest.mark.parametrize('mode', ('cot', 'no_cot', 'pause', 'no_thoughts'))
def test_modes_run(run, mode):
    top, _ = run
    said = script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={top}/{mode}', f'--mode={mode}',
                  '--max_steps=4')
    final = [json.loads(line) for line in open(top / mode / 'metrics.jsonl')][-1]
    assert final['event'] == ('intervention' if mode == 'pause' else 'speed')
    if mode == 'pause':
        assert final['only_clean'] == final['only_changed'] == 0  # every row's pause is the same: swaps change nothing
    else:
        assert 'swap left out, these answers have no thoughts' in said


def test_pause_feeds_nothing_back(run):
    """In training, evaluation, its loss and sample.py: the learned embedding of <|latent|> stands for every thought."""
    top, _ = run
    out = top / 'still'  # a learning rate of 0: the weights that the log speaks of are those on the disk
    args = [*TOY, f'--data_dir={top}/data', '--max_length=128', '--mode=pause']
    script('train.py', *args, f'--out_dir={out}', '--learning_rate=0', '--learning_rate_stage0=0', '--max_steps=4')
    model, tokenizer, _ = load_checkpoint(str(out / 'best.pt'))
    table, ids = model.embed_text(torch.arange(model.config.vocab_size)).detach(), tokenizer.convert_tokens_to_ids
    pause, usual = table[model.config.latent_token_id].norm().item(), table.norm(dim=-1).mean().item()
    assert events(out, 'train')[-1]['thought_ratio'] == pytest.approx(pause / usual, rel=1e-5)
    for thought in json.load(open(out / 'thoughts_test.json')):
        assert thought['norm'] == pytest.approx(pause, rel=1e-5)
        assert thought['norm_ratio'] == pytest.approx(pause / usual, rel=1e-5)
    c = model.config
    rows = prepare.Rows(
        prepare.read_split(str(top / 'data'), 'validation'), 'validation', 1, tokenizer, str(top / 'data'),
        c.image_size, max_tiles=1, num_image_tokens=c.num_image_tokens, mode='pause', c_thought=2,
        prompt='<image>{question}\n{choices}\n', answer='{choice} {letter}')
    batch = prepare.collate([rows[i] for i in range(17)])
    logged = events(out, 'final')[0]['loss']
    assert logged == pytest.approx(model(**batch, edit_thought=model.as_pause).loss.item(), rel=1e-4)
    assert logged != pytest.approx(model(**batch).loss.item(), rel=1e-4)
    said = script('sample.py', '--ckpt', out / 'best.pt', '--image', top / 'data' / 'images' / 'test' / '00000.png',
                  '--choices=red|blue', '--show_thoughts=1')
    assert said.count(f'(norm {pause:.2f},') == 2
    assert torch.equal(table[ids('<|start-latent|>')], table[ids('<|end-latent|>')])  # as train.py starts them
    assert torch.equal(table[ids('<|start-latent|>')], table[tokenizer.encode('\n')[-1]])


def test_what_the_recipe_for_the_real_model_asks(run):
    """bfloat16 autocast, frozen vision, activation checkpointing; AdamW's knobs, decay on matrices alone, clipping."""
    top, _ = run
    args = [*TOY, f'--data_dir={top}/data', f'--init_from={top}/out/epoch_1.pt', '--start_stage=1', '--max_steps=1',
            '--grad_clip=0.01', '--weight_decay=0.5']
    script('train.py', *args, f'--out_dir={top}/float32')
    script('train.py', *args, f'--out_dir={top}/bfloat16', '--dtype=bfloat16', '--freeze_vision=True',
           '--activation_checkpointing=True')
    exact, rough = (events(top / name, 'train')[0]['loss'] for name in ('float32', 'bfloat16'))
    assert exact != rough == pytest.approx(exact, rel=0.02)
    before = weights_of(top / 'out' / 'epoch_1.pt')
    moved = {name: {key for key, value in weights_of(top / name / 'last.pt').items()
                    if not torch.equal(value, before[key])} for name in ('float32', 'bfloat16')}
    assert any(key.startswith('vision_model') for key in moved['float32'])
    assert moved['bfloat16'] and not any(key.startswith('vision_model') for key in moved['bfloat16'])
    optimizer = torch.load(top / 'float32' / 'last.pt', weights_only=True)['optimizer']
    decayed, others = optimizer['param_groups']
    assert (decayed['weight_decay'], others['weight_decay']) == (0.5, 0)
    assert all((group['eps'], tuple(group['betas'])) == (1e-5, (0.9, 0.98)) for group in (decayed, others))
    first = lambda group: [optimizer['state'][p]['exp_avg'] for p in group['params']]
    assert {m.dim() > 1 for m in first(decayed)} == {True} and {m.dim() > 1 for m in first(others)} == {False}
    norm = torch.stack([m.norm() for m in first(decayed) + first(others)]).norm()  # (1 - beta1) of the clipped gradient
    assert norm.item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_the_best_checkpoint_is_of_the_furthest_stage(run):
    """Even where that is worse than an earlier one; and within a stage the best of its epochs, not the first."""
    top, _ = run
    args = [*TOY, f'--data_dir={top}/data', '--epochs_stage0=3']
    script('train.py', *args, f'--out_dir={top}/worse', '--learning_rate=1', '--epochs_per_stage=2')
    best_of = lambda evals: max(evals, key=lambda e: (e['accuracy'], -e['loss']))
    saved = lambda name: {key: torch.load(top / name / 'best.pt', weights_only=True)[key] for key in ('stage', 'step')}
    evals = events(top / 'worse', 'eval')
    assert best_of(evals)['stage'] == 0
    assert saved('worse').items() <= best_of([e for e in evals if e['stage'] == 1]).items()
    script('train.py', *args, f'--out_dir={top}/falling', '--epochs_per_stage=0')
    best = best_of(events(top / 'falling', 'eval'))
    assert saved('falling').items() <= best.items() and best['step'] > 3


def test_sample_answers_a_batch(run):
    top, _ = run
    images = sorted(str(p) for p in (top / 'data' / 'images' / 'test').glob('*'))[:2]
    args = ['sample.py', '--ckpt', top / 'out' / 'best.pt', '--question', 'Four doors from red?',
            '--choices', 'blue|green|pink|white']
    said = script(*args, '--image', ','.join(images), '--show_thoughts=5')
    assert said.count('1 tiles, 9 visual tokens, 2 thoughts') == 2 and said.count('thought 2: ') == 2
    alone = script(*args, '--image', images[1])
    assert alone.split('\n->')[1].split('\n')[0] == said.split('\n->')[2].split('\n')[0]
    assert '3 thoughts' in script(*args, '--image', images[0], '--num_thoughts=3')
    answers = lambda said: re.findall('-> .*', said)
    assert (answers(script(*args, '--image', images[0], '--dtype=bfloat16'))
            == answers(script(*args, '--image', images[0])))
    assert script(*args, '--image', top / 'data' / 'images' / 'test').count('visual tokens') == 17


def test_evidence_on_a_checkpoint(run, tmp_path):
    """
    Interventions and paired tests by the command. After six steps of training no answer would change: weights three
    times as large react to all.
    """
    top, _ = run
    loud = torch.load(top / 'out' / 'best.pt', weights_only=True)
    for name, weight in loud['model'].items():
        if weight.dim() == 2 and 'layers' in name:
            weight *= 3
    torch.save(loud, tmp_path / 'loud.pt')
    answers = lambda out: json.load(open(tmp_path / out / 'answers_test.json'))
    evaluate = lambda out, *more: script(
        'train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}/{out}', '--eval_only=True',
        f'--init_from={tmp_path}/loud.pt', *more)
    said = evaluate('clean', '--intervene=')
    assert 'only when clean' not in said
    other = answers('clean')
    for one in other['answers'][:5]:
        one['right'] = not one['right']
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'answers_test.json').write_text(json.dumps(other))
    shutil.copytree(tmp_path / 'other', tmp_path / 'elsewhere')
    (tmp_path / 'elsewhere' / 'answers_test.json').write_text(json.dumps(dict(other, data='of other rows')))
    said = evaluate('changed', '--intervene=all,early_3', f'--compare={tmp_path}/other,{tmp_path}/elsewhere')
    assert answers('changed') == answers('clean')
    here = 5 - sum(one['right'] for one in other['answers'][:5])
    assert f'of 17 rows {here} are right here alone, {5 - here} in {tmp_path}/other alone, McNemar p = ' in said
    assert f'{tmp_path}/elsewhere left out, it holds no answers to these rows' in said
    found = {e['name']: e for e in events(tmp_path / 'changed', 'intervention')}
    assert list(found) == ['zero', 'noise', 'mean', 'swap', 'image', 'drop_last_1', 'drop_last_2',
                           'early_0', 'early_1', 'early_3']
    assert ([found[f'early_{k}']['thoughts_per_answer'] for k in (0, 1, 3)] == [0, 1, 3]
            and found['zero']['thoughts_per_answer'] == 2)
    tokens = sum(one['tokens'] for one in answers('clean')['answers']) / 17
    right = sum(one['right'] for one in answers('clean')['answers'])
    for name, e in found.items():
        assert right - e['only_clean'] + e['only_changed'] == round(17 * e['accuracy']) and e['clean'] == right / 17
        assert (e['only_clean'], e['only_changed'], e['tokens_per_answer']) != (0, 0, tokens), f'{name} changed nothing'
    assert {**found['drop_last_2'], 'name': ''} == {**found['zero'], 'name': ''}
    said = evaluate('pause', '--mode=pause', '--intervene=')
    assert "mode is 'pause' here, the checkpoint was trained with 'coconut'" in said
    script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}/5', '--eval_only=True',
           f'--init_from={top}/out/best.pt', '--eval_batch_size=5')
    # whatever the batches
    assert events(tmp_path / '5', 'intervention')[0]['accuracy'] == events(top / 'out', 'intervention')[0]['accuracy']


def test_bad_input_gets_one_sentence(run, tmp_path):
    top, _ = run
    image, best = next((top / 'data' / 'images' / 'test').glob('*')), top / 'out' / 'best.pt'
    sample = lambda **k: script(
        'sample.py', *(f'--{a}={b}' for a, b in {**dict(ckpt=best, image=image), **k}.items()), fails=True)
    assert 'no image file none.png' in sample(image='none.png')
    (tmp_path / 'bad.png').write_bytes(b'\x89PNG\r\n\x1a\nrubbish')
    assert 'bad.png cannot be read as an image' in sample(image=tmp_path / 'bad.png')
    assert 'holds no image' in sample(image=HERE + '/config')
    assert 'gives 1 options: expected 2 to 8' in sample(choices='one')
    assert 'unknown knob imgae, did you mean image?' in sample(imgae='x')
    assert 'expected int' in sample(max_new_tokens='many')
    assert 'no checkpoint at none.pt' in sample(ckpt='none.pt')
    process = subprocess.run([sys.executable, 'sample.py', '--image=none.png', f'--ckpt={best}'], cwd=HERE,
                             capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (1, 'sample.py: no image file none.png\n')
    data = best.read_bytes()
    (tmp_path / 'cut.pt').write_bytes(data[:len(data) // 2])
    assert 'cut.pt is not a whole checkpoint' in sample(ckpt=tmp_path / 'cut.pt')
    torch.save(dict(a=1), tmp_path / 'other.pt')
    assert 'is no checkpoint of train.py' in sample(ckpt=tmp_path / 'other.pt')
    other = torch.load(best, weights_only=True)
    other['config']['hidden_size'] = 32
    torch.save(other, tmp_path / 'shape.pt')
    assert 'expected [' in sample(ckpt=tmp_path / 'shape.pt')
    train = lambda *args: script(
        'train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}/out', *args, fails=True)
    assert 'no train row fits max_length=20 at stage 0' in train('--max_length=20')
    assert 'run prepare.py with the same config first' in train('--data_dir=nowhere', f'--init_from={best}')
    assert "mode='coco'" in train('--mode=coco')
    assert 'eval_batch_size=0: expected 1 or more' in train('--eval_batch_size=0')
    assert 'c_thought=-1: expected 0 or more' in train('--c_thought=-1')
    assert 'batch_size=0: expected 1 or more' in train('--batch_size=0')
    assert 'threads=-1: expected 0 or more' in train('--threads=-1')
    assert 'cannot be filled' in train('--answer={othr}') and not (tmp_path / 'out').exists()
    assert 'run prepare.py with the same config first' in train('--data_dir=nowhere')
    (tmp_path / 'file').write_text('not a folder')
    assert 'cannot be written (' in train(f'--out_dir={tmp_path}/file/out')
    (tmp_path / 'text.pt').write_text('no checkpoint')
    assert 'text.pt is not a whole checkpoint' in train(f'--init_from={tmp_path}/text.pt')
    assert 'expected True or False' in train('--reset_optimizer=1')
    assert "intervene='zeroes': expected zero, noise" in train('--intervene=zeroes')
    assert 'compare=nowhere: no answers_*.json there' in train('--compare=nowhere')
    assert 'no checkpoint at' in train('--init_from=resume')
    assert not list((tmp_path / 'out').glob('*.part'))


def test_a_run_is_not_mixed_with_another(run, tmp_path):
    top, _ = run
    args = [*TOY, f'--data_dir={top}/data', '--max_steps=2', '--save_every=1']
    script('train.py', *args, f'--out_dir={tmp_path}/out')
    train = lambda *more: script('train.py', *args, f'--out_dir={tmp_path}/out', *more, fails=True)
    assert ('holds another run (' in train()
            and '--overwrite=True' in train('--eval_only=True', f'--init_from={top}/out/best.pt'))
    said = train('--init_from=resume', '--mode=pause', '--learning_rate=1', '--dtype=bfloat16', '--freeze_vision=True')
    assert all(f'{key}=' in said for key in ('mode', 'learning_rate', 'dtype', 'freeze_vision'))
    assert said.count('(was') == 4
    said = train('--init_from=resume', '--seed=7', '--c_thought=1', '--batch_size=8')
    assert 'c_thought=1 (was 2)' in said and 'batch_size=8 (was 16)' in said and 'seed=7 (was 0)' in said
    (tmp_path / 'data').mkdir()
    for split in ('train', 'validation'):
        (tmp_path / 'data' / f'{split}.jsonl').write_text((top / 'data' / f'{split}.jsonl').read_text())
    for part in ('images', 'tokenizer'):
        os.symlink(top / 'data' / part, tmp_path / 'data' / part)
    # moved, but the same
    script('train.py', *args, f'--out_dir={tmp_path}/out', f'--data_dir={tmp_path}/data', '--init_from=resume')
    for split in ('train', 'validation'):
        with open(tmp_path / 'data' / f'{split}.jsonl', 'a') as f:
            f.write((top / 'data' / 'test.jsonl').read_text().splitlines()[0] + '\n')
        assert 'its rows are not those the run began with' in train('--init_from=resume', f'--data_dir={tmp_path}/data')
        (tmp_path / 'data' / f'{split}.jsonl').write_text((top / 'data' / f'{split}.jsonl').read_text())
    os.remove(tmp_path / 'out' / 'last.pt')
    assert 'no checkpoint at' in train('--init_from=resume')
    shutil.copy(tmp_path / 'out' / 'best.pt', tmp_path / 'out' / 'last.pt')
    assert 'holds no optimizer state' in train('--init_from=resume')
    script('train.py', *args, f'--out_dir={tmp_path}/out', '--overwrite=True', '--max_steps=1')
    assert ([e['step'] for e in events(tmp_path / 'out', 'train')] == [1]
            and not list((tmp_path / 'out').glob('epoch_*')))


def test_a_cut_last_checkpoint_is_said_and_nothing_chosen(run, tmp_path):
    top, _ = run
    shutil.copytree(top / 'out', tmp_path / 'out')
    args = [*TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}/out', '--init_from=resume']
    for name in ('last.pt', 'epoch_2.pt'):
        data = (tmp_path / 'out' / name).read_bytes()
        (tmp_path / 'out' / name).write_bytes(data[:len(data) // 2])
        if name == 'last.pt':
            assert 'epoch_2.pt, after step 6: copy it to' in script('train.py', *args, fails=True)
    said = script('train.py', *args, fails=True)
    assert ('last.pt is not a whole checkpoint' in said and 'the newest whole one is' in said
            and 'epoch_1.pt, after step 3: copy it to' in said)
    os.remove(tmp_path / 'out' / 'last.pt')
    assert 'epoch_1.pt, after step 3: copy it to' in script('train.py', *args, fails=True)
    shutil.copy(tmp_path / 'out' / 'epoch_1.pt', tmp_path / 'out' / 'last.pt')
    script('train.py', *args)
    assert_same_run(top / 'out', tmp_path / 'out')


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    top, _ = run
    bad = torch.load(top / 'out' / 'epoch_1.pt', weights_only=True)
    bad['model']['language_model.model.norm.weight'].fill_(float('nan'))
    torch.save(bad, tmp_path / 'bad.pt')
    said = script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}/out',
                  f'--init_from={tmp_path}/bad.pt', fails=True)
    assert ('the loss is nan' in said and 'in step 1 (stage 0, epoch 1), rows ' in said
            and len(re.findall(r'\b\d{5}\b', said)) == 16)
    out = tmp_path / 'huge'
    said = script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={out}', '--learning_rate_stage0=1e30',
                  '--save_every=1', fails=True)
    assert 'in step 2' in said or 'in step 3' in said
    last = torch.load(out / 'last.pt', weights_only=True)
    assert all(v.isfinite().all() for v in last['model'].values()) and f'in step {last["step"] + 1} ' in said


def test_ranks_must_divide_the_batch(run, tmp_path, monkeypatch):
    top, _ = run
    monkeypatch.setenv('WORLD_SIZE', '3')
    said = script('train.py', *TOY, f'--data_dir={top}/data', f'--out_dir={tmp_path}/out', fails=True)
    assert 'batch_size=16 is not a multiple of 15: 3 rank(s) with micro-batches of 5' in said


def test_coconuts_own_files_train_as_they_are(tmp_path):
    rows = [dict(question=f'Every {a} is a {b}. Tom is a {a}. Is Tom a {b} or a {c}?',
                 steps=[f'Tom is a {a}.', f'Every {a} is a {b}.'], answer=f'Tom is a {b}.')
            for a in 'pqrst' for b in 'uvw' for c in 'xyz']
    (tmp_path / 'logic_train.json').write_text(json.dumps(rows))
    (tmp_path / 'logic_valid.json').write_text(json.dumps(rows[:5]))
    script('prepare.py', '--dataset', tmp_path / 'logic_train.json', '--data_dir', tmp_path / 'data',
           '--init_from=scratch')
    said = script('train.py', *TOY, f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/out',
                  '--prompt={question}\n', '--answer=### {answer}')
    assert 'test' not in said.split('best.pt')[1] and 'validation' in said.split('best.pt')[1]
    script('prepare.py', 'config/prosqa.py', f'--data_dir={tmp_path}/drawn',
           '--train_rows=32', '--val_rows=8', '--test_rows=8')
    said = script('train.py', 'config/prosqa.py', f'--data_dir={tmp_path}/drawn', f'--out_dir={tmp_path}/graphs',
                  '--max_steps=2', '--batch_size=16', '--epochs_stage0=0', '--num_workers=0', '--intervene=swap,image')
    assert re.search('test: swap +accuracy', said) and 'test: image left out, these answers have no image' in said
    (tmp_path / 'broken.json').write_text('[{"question": 1}, 2]')
    assert 'is not a list of rows: expected' in script(
        'prepare.py', '--dataset', tmp_path / 'broken.json', '--data_dir', tmp_path / 'd', '--init_from=scratch',
        fails=True)
