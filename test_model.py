"""
Tests of model, loading, text, tiles and answers: python -m pytest -q test_model.py; whole runs are
in experiments/test_runs.py. The oracle is transformers on tiny random weights: one plain pass, or
the obvious path, which recomputes the whole unpadded row from scratch for each thought in order.
"""
import io
import json
import os
import pickle
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import prepare
import sample as asking
from experiments import toy
from model import IMAGE_MEAN, IMAGE_STD, MultiCoCo, SPECIAL_TOKENS
from model import load_checkpoint, load_tokenizer, our_name, sample

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
N = 4  # visual tokens of a tile of 56 pixels
PAD, EOS, IMAGE, LATENT, VOCABULARY = 0, 2, 5, 7, 265  # of `save_tokenizer`; bytes are 9 to 264


# --- tiny checkpoints -----------------------------------------------------------------------------
def save_tokenizer(folder, special=SPECIAL_TOKENS):
    """Single bytes behind <|endoftext|>, <|im_start|>, <|im_end|> and these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, 'SPECIAL_TOKENS', special)
        toy.train_tokenizer(['a'], str(folder), vocab_size=259 + len(special))
    return load_tokenizer(str(folder), add=())


with tempfile.TemporaryDirectory() as temporary:
    TOKENIZER = save_tokenizer(temporary)
SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8)


def tiny_model(**fields):
    torch.manual_seed(0)
    vision = dict(vision_hidden_size=24, vision_intermediate_size=40, vision_num_layers=2,
                  vision_num_heads=3, image_size=56)
    return toy.new_model(TOKENIZER, **{**SHAPE, **vision, **fields}).eval()


def save(folder, kind='hf qwen2', special=SPECIAL_TOKENS, spare=0, dtype=torch.float32,
         shard='5GB', **changes):
    """A checkpoint folder with random weights: InternVL in the hf or the opengvlab layout, or a
    plain decoder. Gives transformers' model of it, in float32."""
    tokenizer = save_tokenizer(folder, special)
    layout, _, llm = kind.rpartition(' ')
    fields = dict(SHAPE, vocab_size=len(tokenizer) + spare, head_dim=16 if llm == 'qwen3' else 8,
                  max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=1e5, eos_token_id=EOS,
                  bos_token_id=None, pad_token_id=None, tie_word_embeddings=llm == 'llama')
    config = transformers.AutoConfig.for_model(llm, **{**fields, **changes})
    auto = transformers.AutoModelForCausalLM
    if layout:
        vision = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                      num_attention_heads=3, attention_bias=True, image_size=[56, 56],
                      patch_size=[14, 14], layer_norm_eps=1e-3)
        config = transformers.InternVLConfig(vision_config=vision, text_config=config.to_dict(),
                                             tie_word_embeddings=False, image_token_id=IMAGE)
        auto = transformers.AutoModelForImageTextToText
    torch.manual_seed(0)
    oracle = auto.from_config(config).eval()
    for p in oracle.parameters():
        torch.nn.init.normal_(p, std=0.2 if p.dim() > 1 else 0.3)
    with torch.no_grad():
        oracle.get_output_embeddings().weight[LATENT] = 0  # it is not written by itself
    oracle.to(dtype).save_pretrained(folder, max_shard_size=shard)
    if layout == 'opengvlab':
        to_opengvlab(folder)
    return oracle.float()


OPENGVLAB = {'blocks.': 'encoder.layers.', '.gamma': '', 'cls_token': 'embeddings.class_embedding',
             'pos_embed': 'embeddings.position_embedding',
             'patch_embed.proj': 'embeddings.patch_embedding'}  # from timm's names


def to_opengvlab(folder):
    """A saved -hf folder in OpenGVLab's layout."""
    weights = {}
    for name, tensor in MultiCoCo.from_pretrained(str(folder)).state_dict().items():
        for ours, theirs in OPENGVLAB.items():
            name = name.replace(ours, theirs)
        weights[name] = tensor
    save_file(weights, f'{folder}/model.safetensors')
    config = json.loads(Path(folder, 'config.json').read_text())
    llm, vision = config['text_config'], config['vision_config']
    llm.pop('rope_parameters', None)
    llm.update(rope_theta=1e5, rope_scaling=dict(rope_type='dynamic', factor=2.0))
    vision.update(patch_size=14, qkv_bias=True, qk_normalization=False)
    config = dict(model_type='internvl_chat', downsample_ratio=0.5, ps_version='v2',
                  select_layer=-1, force_image_size=56, llm_config=llm, vision_config=vision)
    Path(folder, 'config.json').write_text(json.dumps(config))


def change_weights(folder, change):
    weights = load_file(f'{folder}/model.safetensors')
    change(weights)
    save_file(weights, f'{folder}/model.safetensors')


def change_json(path, **changes):
    """part__key=value; None for no such key."""
    content = json.loads(Path(path).read_text())
    for name, value in changes.items():
        part, _, key = name.rpartition('__')
        place = content[part] if part else content
        place[key] = value
        if value is None:
            del place[key]
    Path(path).write_text(json.dumps(content))


@pytest.fixture(scope='module', params=('hf qwen2', 'hf qwen3', 'opengvlab qwen2',
                                        'opengvlab qwen3', 'qwen2', 'qwen3', 'llama'))
def pair(request, tmp_path_factory):
    """transformers' model and ours from the same files, and `batch_of` for them."""
    folder = str(tmp_path_factory.mktemp('pair'))
    oracle, model = save(folder, request.param), MultiCoCo.from_pretrained(folder)
    return oracle, model, partial(batch_of, tile='I' if ' ' in request.param else 'p')


# --- batches and oracles --------------------------------------------------------------------------
# rows as letters: p a token of the prompt, I a tile, t a thought, a a token of the answer
ROWS = ('pppaaaa', 'pIpptaa', 'ppIIIpptttpaaaaa', 'ptIppttaaIptpa')


def batch_of(rows, labels=True, tile='I'):
    """Rows as letters as forward's arguments; tile='p' for a model that takes no image."""
    rng, encoded = torch.Generator().manual_seed(0), []
    for row in rows:
        row = row.replace('I', tile)
        ids, targets, P = [], [], row.count('I')
        for letter in row:
            token = torch.randint(9, VOCABULARY, (), generator=rng).item()
            token = {'I': IMAGE, 't': LATENT}.get(letter, token)
            ids += [token] * (N if letter == 'I' else 1)
            targets += [token if letter == 'a' else -100] * (N if letter == 'I' else 1)
        tiles = torch.randint(0, 256, (P, 3, 56, 56), dtype=torch.uint8, generator=rng)
        encoded.append(dict(input_ids=ids, labels=targets if labels else None,
                            pixel_values=tiles if P else None))
    return prepare.collate(encoded)


def one_row(batch, b):
    """Ids and tiles of row b without padding."""
    length, tiles = batch['attention_mask'][b].sum(), batch['num_tiles']
    first, last = tiles[:b].sum(), tiles[:b + 1].sum()
    pixels = batch['pixel_values'][first:last] if last > first else None
    return batch['input_ids'][b:b + 1, :length], pixels


def normalised(tiles):
    mean, std = torch.tensor((IMAGE_MEAN, IMAGE_STD))
    return (tiles.float() / 255 - mean[:, None, None]) / std[:, None, None]


def embed(oracle, ids, tiles):
    """transformers' embeddings [B, T, D] with visual tokens."""
    x = oracle.get_input_embeddings()(ids)
    if tiles is not None:
        visual = oracle.model.get_image_features(normalised(tiles))
        visual = getattr(visual, 'pooler_output', visual)  # transformers 4 gives the tensor
        x = x.masked_scatter((ids == IMAGE)[..., None], visual)
    return x


def obvious(oracle, ids, tiles):
    """Logits [T, V] and thoughts, a list of [D], of one unpadded row."""
    x, thoughts = embed(oracle, ids, tiles), []
    decoder = getattr(oracle.model, 'language_model', oracle.model)
    for p in (ids[0] == LATENT).nonzero()[:, 0].tolist():
        thoughts.append(decoder(inputs_embeds=x[:, :p], use_cache=False).last_hidden_state[0, -1])
        x = torch.cat((x[:, :p], thoughts[-1][None, None], x[:, p + 1:]), 1)
    return oracle.lm_head(decoder(inputs_embeds=x, use_cache=False).last_hidden_state)[0], thoughts


def gradients(model, loss):
    """Name -> gradient; transformers' under our names."""
    model.zero_grad()
    loss.backward()
    found = {our_name(n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for name in [name for name in found if '.attn.q.' in name]:
        parts = [found.pop(name.replace('.q.', f'.{letter}.')) for letter in 'qkv']
        found[name.replace('.q.', '.qkv.')] = torch.cat(parts)
    return found


def assert_same(found, wanted, tolerance=1e-4):
    """Tensors, or dicts of them."""
    if not isinstance(found, dict):
        found, wanted = dict(it=found), dict(it=wanted)
    assert found.keys() == wanted.keys()
    for name in found:
        apart = (found[name] - wanted[name]).norm()
        assert apart <= tolerance * wanted[name].norm() + 1e-7, f'{name}: {apart}'


# --- equal to transformers ------------------------------------------------------------------------
def test_without_thoughts_logits_gradients_and_greedy_ids_are_transformers_own(pair):
    oracle, model, batch_of = pair
    for row in ('ppppp', 'pIppp', 'ppIIIppIp'):
        ids, tiles = one_row(batch_of([row]), 0)
        asked = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        if tiles is not None:
            asked['pixel_values'] = normalised(tiles)
        ours, theirs = model(**asked).logits, oracle(**asked).logits
        assert_same(ours, theirs, 1e-5)
        weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0))
        wanted = gradients(oracle, (theirs * weight).sum())
        assert_same(gradients(model, (ours * weight).sum()), wanted)
        ends = dict(eos_token_id=list(model.config.eos_token_ids), pad_token_id=PAD)
        wrote = oracle.generate(**asked, **ends, max_new_tokens=12, do_sample=False)
        assert model.generate(ids, tiles, max_new_tokens=12).equal(wrote[:, ids.shape[1]:])


def test_thoughts_loss_and_gradients_are_those_of_the_obvious_path(pair):
    """In a batch of rows of other lengths with 0 to 4 thoughts, in runs and alone, before and
    behind images, whatever stands in padding; the obvious path has one row, without padding.
    Thought 1, which public code detaches, has a gradient."""
    oracle, model, batch_of = pair
    batch, total, first, seen = batch_of(ROWS), 0, [], {}
    batch['input_ids'][batch['attention_mask'] == 0] = IMAGE
    batch['input_ids'][0, -1] = LATENT
    out = model(**{**batch, 'labels': None})
    for b in range(len(ROWS)):
        logits, thoughts = obvious(oracle, *one_row(batch, b))
        assert_same(out.logits[b, :len(logits)], logits, 1e-5)
        for k, thought in enumerate(thoughts):
            assert_same(out.thoughts[b, k], thought, 1e-5)
        assert not out.thoughts[b, len(thoughts):].any()
        labels = batch['labels'][b, 1:len(logits)]
        total = total + F.cross_entropy(logits[:-1], labels, reduction='sum')
        first += thoughts[:1]
    loss = model(**batch, edit_thought=seen.setdefault).loss
    wanted = total / prepare.count_supervised(batch)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    ours = torch.autograd.grad(loss, seen[1], retain_graph=True)[0][1:]  # row 0 has none
    assert ours.norm() > 1e-4
    assert_same(ours, torch.stack(torch.autograd.grad(wanted, first, retain_graph=True)))
    assert_same(gradients(model, loss), gradients(oracle, wanted))


# --- the latent loop ------------------------------------------------------------------------------
def test_activation_checkpointing_changes_only_what_is_kept():
    model, batch, kept = tiny_model(), batch_of(ROWS), []
    plain = model(**batch).loss
    wanted = gradients(model, plain)
    model.set_activation_checkpointing()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = model(**batch).loss
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert_same(gradients(model, loss), wanted, 1e-5)
    assert not any(x.shape[-1:] == (model.config.intermediate_size,) for x in kept)


def test_edit_thought_replaces_thought_k_in_the_rows_that_have_one():
    model, batch = tiny_model(), batch_of(ROWS, labels=False)
    edited = model(**batch, edit_thought=lambda k, thought: torch.full_like(thought, k))
    plain = model(**batch)
    for b, count in enumerate((0, 1, 3, 4)):
        wanted = [k if k <= count else 0 for k in (1, 2, 3, 4)]
        assert edited.thoughts[b].tolist() == [[k] * 32 for k in wanted]
        assert torch.equal(edited.logits[b], plain.logits[b]) == (count == 0)


def flops(work):
    """Of matrix products, those of attention among them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_a_step_with_8_thoughts_costs_at_most_1_1_plain_passes(tmp_path):
    """The plain pass is transformers' over the same tokens, its head where it is supervised."""
    oracle, row = save(tmp_path), 'p' * 60 + 'II' + 'p' * 20 + 't' * 8 + 'a' * 12
    model, batch = MultiCoCo.from_pretrained(str(tmp_path)), batch_of([row] * 2)

    def plain():
        x = embed(oracle, batch['input_ids'], batch['pixel_values'])
        hidden = oracle.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state
        target = batch['labels'][:, 1:]
        logits = oracle.lm_head(hidden[:, :-1][target != -100])
        F.cross_entropy(logits, target[target != -100]).backward()

    assert flops(lambda: model(**batch).loss.backward()) < 1.1 * flops(plain)


def test_a_generated_token_costs_the_flops_of_one_token():
    """Its matrix products, and attention to one slot a token, up to a multiple of 64."""
    model, batch = tiny_model(), batch_of(ROWS, labels=False)
    c, lm = model.config, model.language_model
    c.eos_token_ids = ()
    one, many = (flops(lambda: model.generate(**batch, max_new_tokens=n)) for n in (1, 9))
    matrices = sum(p.numel() for p in lm.model.layers.parameters() if p.dim() == 2)
    attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * 65
    assert many - one <= 8 * len(ROWS) * 2 * (matrices + lm.lm_head.weight.numel() + attention)


@pytest.mark.parametrize('kind', ('hidden', 'pause', 'scaled', 'soft'))
def test_what_is_fed_is_what_is_documented(kind):
    """For a prompt's <|latent|>, and in generation for one that the model writes itself."""
    model, (ids, tiles), seen = tiny_model(), one_row(batch_of(['pIpppt']), 0), {}
    with torch.no_grad():
        state = model(ids, tiles).thoughts[:, 0]  # 'hidden': the state itself
        head = model.language_model.lm_head
        embeddings = model.language_model.model.embed_tokens.weight
        head.weight[LATENT] = state[0] * 10  # so that it is written
        documented = dict(hidden=state, pause=embeddings[LATENT][None],
                          scaled=F.normalize(state, dim=-1) * embeddings.norm(dim=-1).mean(),
                          soft=head(state).softmax(-1) @ embeddings)
        model.config.thought = kind
        out = model(ids, tiles)
        assert_same(out.thoughts[:, 0], documented[kind], 1e-5)
        new = model.generate(ids[:, :-1], tiles, max_new_tokens=2, edit_thought=seen.setdefault)[0]
        assert new[0] == LATENT
        assert_same(seen[1], documented[kind], 1e-5)
        assert new[1] == out.logits[0, -1].argmax()


def test_pause_trains_the_embedding_of_latent():
    model, batch = tiny_model(thought='pause'), batch_of(['pIppttaa'])
    found = gradients(model, model(**batch).loss)['language_model.model.embed_tokens.weight']
    assert found[LATENT].norm() > 1e-4


# --- generation -----------------------------------------------------------------------------------
def step_by_step(model, ids, tiles, steps):
    """Greedy ids by `forward` on the whole row for each token."""
    start = ids.shape[1]
    while ids.shape[1] < start + steps and ids[0, -1] not in model.config.eos_token_ids:
        token = model(ids, tiles).logits[:, -1].argmax(-1)
        ids = torch.cat((ids, token[:, None]), 1)
    return ids[0, start:].tolist()


@pytest.mark.parametrize('boosted', (None, LATENT, EOS))
def test_greedy_ids_are_those_of_forward_step_by_step(boosted):
    """In a batch as alone, where rows end at different lengths (they are padded), and where the
    model writes <|latent|>; edit_thought is asked only there, with k counted on."""
    model, batch, lengths, asked = tiny_model(), batch_of(ROWS, labels=False), [], []
    with torch.no_grad():
        model.language_model.lm_head.weight[IMAGE] = 0  # forward would ask for its tile
        if boosted is not None:
            model.language_model.lm_head.weight[boosted] *= -6
    model.config.eos_token_ids = (11, EOS)
    written = model.generate(**batch, max_new_tokens=14, edit_thought=(
        lambda k, thought: asked.append(k) or thought))
    for b, ids in enumerate(written.tolist()):
        wanted = step_by_step(model, *one_row(batch, b), 14)
        assert ids == wanted + [PAD] * (len(ids) - len(wanted))
        lengths.append(len(wanted))
    assert written.shape[1] == max(lengths)
    assert boosted != EOS or min(lengths) < max(lengths)
    latents = (written == LATENT).any(0)  # nothing follows the last one
    assert boosted != LATENT or latents[:-1].sum() > 3
    assert latents[:-1].sum() <= len(asked) - 4 <= latents.sum() < 14
    assert asked == [*range(1, len(asked) + 1)]


def test_a_compiled_step_writes_the_same_and_is_compiled_once():
    """For prompts that differ by a few tokens too; one graph, without a break."""
    model, compiled = tiny_model(), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    asked = [batch_of([row + more for row in ROWS], labels=False) for more in ('', 'pp', 'ppptp')]
    plain = [model.generate(**batch, max_new_tokens=9) for batch in asked]
    model.step = torch.compile(model.step, backend=backend, dynamic=False, fullgraph=True)
    for batch, wanted in zip(asked, plain):
        assert torch.equal(model.generate(**batch, max_new_tokens=9), wanted)
    assert len(compiled) == 1


@pytest.mark.parametrize('temperature, top_p, shares', (
    (0, 1.0, [0, 1, 0, 0]), (1.0, 1.0, [0.15, 0.5, 0.05, 0.3]), (1.0, 1e-6, [0, 1, 0, 0]),
    (0.5, 1.0, [0.062, 0.685, 0.007, 0.247]), (1.0, 0.6, [0, 0.625, 0, 0.375])))
def test_sampling_follows_the_temperature_within_the_top_p_mass(temperature, top_p, shares):
    torch.manual_seed(0)
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(20000, 4)
    drawn = sample(logits, temperature, top_p).bincount(minlength=4) / 20000
    assert drawn.tolist() == pytest.approx(shares, abs=0.02)
    assert [share > 0 for share in shares] == (drawn > 0).tolist()


def test_tiles_flagged_0_are_left_out():
    model, batch = tiny_model(), batch_of(['ppp', 'pIp', 'pIIp'], labels=False)
    wanted, tiles = model(**batch).logits, batch['pixel_values']
    batch['pixel_values'] = torch.stack([tiles[2], tiles[0], tiles[0], tiles[1], tiles[2]])
    assert_same(model(**batch, image_flags=torch.tensor([0, 1, 0, 1, 1])).logits, wanted, 1e-5)


@pytest.mark.parametrize('counted', (True, False))
def test_tokens_and_tiles_that_do_not_fit_are_an_error(counted):
    model, batch = tiny_model(), batch_of(['pIp', 'pIIp', 'pIp'], labels=False)
    ids, tiles = batch['input_ids'], batch['pixel_values']
    for wrong in (tiles[:3], torch.cat((tiles, tiles)), None):
        with pytest.raises(AssertionError):
            model(**{**batch, 'pixel_values': wrong})
    with pytest.raises(AssertionError):  # of another row
        model(**{**batch, 'num_tiles': torch.tensor([2, 1, 1])})
    batch['num_tiles'] = batch['num_tiles'] if counted else None
    ids[1, 1] = 9
    with pytest.raises(AssertionError, match=r'\b1\b.*\b7\b.*\b[12]\b'):  # row and both counts
        model(**batch)


def test_rows_that_would_be_computed_wrongly_are_refused():
    """Too long, with the new tokens too; padded on the left; a thought with nothing before it."""
    model, ids = tiny_model(max_position_embeddings=6), torch.arange(9, 16)[None]
    model(ids[:, :6])
    model.generate(ids[:, :4], max_new_tokens=2)
    for wrong in (partial(model, ids), partial(model.generate, ids[:, :4], max_new_tokens=3),
                  partial(model, ids[:, :2], attention_mask=torch.tensor([[0, 1]])),
                  partial(model, torch.tensor([[LATENT, 9]]))):
        with pytest.raises(AssertionError):
            wrong()


# --- checkpoints ----------------------------------------------------------------------------------
@pytest.mark.parametrize('spare', (0, 2, 10))
@pytest.mark.parametrize('tied', (False, True))
def test_new_rows_are_the_mean_of_the_old_ones(tmp_path, spare, tied):
    """Whether the matrices grow or have spare rows, as InternVL3.5's, which stay."""
    oracle = save(tmp_path, 'llama', SPECIAL_TOKENS[:3], spare, tie_word_embeddings=tied)
    model, tokenizer = MultiCoCo.from_pretrained(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert (model.config.vocab_size, len(tokenizer)) == (max(262 + spare, 265), 265)
    assert len(tokenizer.encode('a'.join(SPECIAL_TOKENS))) == 11
    lm = model.language_model
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == tied
    for ours, theirs in ((lm.model.embed_tokens, oracle.get_input_embeddings()),
                         (lm.lm_head, oracle.lm_head)):
        assert torch.equal(ours.weight[:262], theirs.weight[:262])
        assert_same(ours.weight[262:265], theirs.weight[:262].mean(0).expand(3, -1), 1e-6)
        assert torch.equal(ours.weight[265:], theirs.weight[265:])


@pytest.mark.parametrize('change', (
    lambda w: w.pop('language_model.model.norm.weight'),
    lambda w: w.pop('language_model.lm_head.weight'),
    lambda w: w.pop('vision_tower.encoder.layer.1.attention.k_proj.weight'),
    lambda w: w.update({'extra.weight': torch.zeros(1)}),
    lambda w: w.update({'multi_modal_projector.linear_1.bias': torch.zeros(31)}),
    lambda w: w.update({'lm_head.weight': torch.zeros(265, 32)})))
def test_weights_are_read_whole_or_not_at_all(tmp_path, change):
    """One is missing, is not known, has another shape, is there under two names."""
    save(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises((RuntimeError, KeyError, AssertionError)):
        MultiCoCo.from_pretrained(str(tmp_path))


def test_shards_and_the_files_own_type(tmp_path):
    save(tmp_path, dtype=torch.bfloat16)
    one = MultiCoCo.from_pretrained(str(tmp_path), 'auto').state_dict()
    save(tmp_path / 'many', dtype=torch.bfloat16, shard='20KB')
    assert not (tmp_path / 'many' / 'model.safetensors').exists()
    many = MultiCoCo.from_pretrained(str(tmp_path / 'many'), 'auto').state_dict()
    assert {tensor.dtype for tensor in one.values()} == {torch.bfloat16}
    assert_same(many, one, 0)


class Projecting(MultiCoCo):
    def __init__(self, config, device=None):
        super().__init__(config, device)
        self.project = torch.nn.Linear(32, 32)
        torch.nn.init.constant_(self.project.weight, 0.5)

    def feed(self, hidden):
        return self.project(hidden)


def test_a_subclass_may_add_a_module(tmp_path, capsys):
    """Of which the files know nothing: it keeps its initial values, is named, and is trained."""
    save(tmp_path)
    model = Projecting.from_pretrained(str(tmp_path), rms_norm_eps=0.5)
    assert model.language_model.model.norm.eps == 0.5  # a field of Config
    assert 'project.weight' in capsys.readouterr().out
    assert (model.project.weight == 0.5).all() and model.project.bias.isfinite().all()
    assert gradients(model, model(**batch_of(['pIpttaa'])).loss)['project.weight'].norm() > 0
    change_weights(tmp_path, lambda w: w.pop('language_model.model.norm.weight'))
    with pytest.raises(RuntimeError):  # but nothing else may be missing
        Projecting.from_pretrained(str(tmp_path))


def test_all_end_tokens_that_the_files_name_end_an_answer(tmp_path):
    save(tmp_path, 'llama')
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [2, 11]}')
    change_json(tmp_path / 'config.json', eos_token_id=12)
    assert {*MultiCoCo.from_pretrained(str(tmp_path)).config.eos_token_ids} == {2, 0, 12, 11}


def test_code_of_a_checkpoints_folder_is_never_run(tmp_path, monkeypatch):
    """OpenGVLab's folders name code of their own, and transformers' Auto classes ask to run it."""
    save(tmp_path, 'opengvlab qwen2')
    monkeypatch.setattr('builtins.input', lambda *question: 'y')
    for name in ('configuration_x', 'modeling_x', 'tokenization_x'):
        (tmp_path / f'{name}.py').write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\n")
    code = dict(AutoConfig='configuration_x.C', AutoModel='modeling_x.M',
                AutoTokenizer=['tokenization_x.T', None])
    change_json(tmp_path / 'config.json', auto_map=code)
    change_json(tmp_path / 'tokenizer_config.json', tokenizer_class='T', auto_map=code)
    load_checkpoint(str(tmp_path))
    assert not (tmp_path / 'RAN').exists()


HF, LLAMA, OPEN = 'hf qwen2', 'llama', 'opengvlab qwen2'


@pytest.mark.parametrize('kind, key, changes', (
    (HF, 'hidden_act', dict(text_config__hidden_act='gelu')),
    (HF, 'rope', dict(text_config__rope_scaling=dict(rope_type='yarn', factor=4.0))),
    (HF, 'sliding', dict(text_config__use_sliding_window=True, text_config__layer_types=None,
                         text_config__sliding_window=64, text_config__max_window_layers=0)),
    (HF, 'is_causal', dict(text_config__is_causal=False)),
    ('hf qwen3', 'attention_bias', dict(text_config__attention_bias=True)),
    (HF, 'projector_hidden_act', dict(projector_hidden_act='silu')),
    (HF, 'attention_bias', dict(vision_config__attention_bias=False)),
    (HF, 'image_size', dict(vision_config__image_size=[56, 112])),
    (HF, 'quantization_config', dict(quantization_config=dict(quant_method='awq'))),
    (OPEN, 'rope', dict(llm_config__rope_scaling=dict(type='linear', factor=2.0))),
    (OPEN, 'use_qk_norm', dict(vision_config__qk_normalization=None)),
    (OPEN, 'norm_type', dict(vision_config__norm_type=None)),
    (OPEN, 'vision_feature_layer', dict(select_layer=-2)), (OPEN, 'v1', dict(ps_version='v1')),
    (LLAMA, 'mlp_bias', dict(mlp_bias=True)), (LLAMA, 'attention_bias', dict(attention_bias=True)),
    (LLAMA, 'rope', dict(rope_scaling=dict(
        rope_type='llama3', factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64)))))
def test_a_config_that_is_not_computed_here_is_refused_by_name(tmp_path, kind, key, changes):
    save(tmp_path, kind)
    change_json(tmp_path / 'config.json', **changes)
    with pytest.raises((ValueError, AssertionError), match=key):
        MultiCoCo.from_pretrained(str(tmp_path))


def save_trained(path, model):
    """A .pt as train.py writes it."""
    torch.save(dict(model=model.state_dict(), config=asdict(model.config), stage=3,
                    knobs=dict(seed=1), tokenizer=TOKENIZER.backend_tokenizer.to_str(),
                    chat_template='{{ messages }}'), path)


def test_a_trained_checkpoint_is_read_back(tmp_path):
    model, path, batch = tiny_model(thought='scaled'), str(tmp_path / 'best.pt'), batch_of(ROWS)
    save_trained(path, model)
    again, read, saved = load_checkpoint(path)
    assert again.config == model.config
    assert torch.equal(again(**batch).loss, model(**batch).loss)
    text = f'a b{"".join(SPECIAL_TOKENS)}<|im_end|>'
    assert read.encode(text) == TOKENIZER.encode(text)
    assert (read.eos_token, read.pad_token) == ('<|im_end|>', '<|endoftext|>')
    assert read.chat_template == '{{ messages }}'
    assert (saved['stage'], saved['knobs']) == (3, dict(seed=1))
    assert load_checkpoint(path, thought='soft')[0].config.thought == 'soft'


def test_a_checkpoint_with_code_is_not_read(tmp_path):
    torch.save(dict(model={}, more=tiny_model), tmp_path / 'a.pt')
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(str(tmp_path / 'a.pt'))


# --- text -----------------------------------------------------------------------------------------
ROW = dict(question_id='q1', question='What flies?', choices=['cat', 'kite', 'dog', 'car'],
           correct_choice_idx=1, answer='kite', image='x.png', image_size=(56, 56),
           steps=['It is windy.', 'I see a string.', 'It is in the sky.'])
PROMPT = ('<image>\nQuestion: What flies?\n\nChoices:\nA. cat\nB. kite\nC. dog\nD. car\n\n'
          'Let me think step by step:\n')
END = 'The answer is B. kite'
LAST = 'It is in the sky.\n' + END
WHOLE = 'It is windy.\nI see a string.\n' + LAST


@pytest.mark.parametrize('stage, knobs, thoughts, target', (
    (0, {}, 0, WHOLE), (2, {}, 4, LAST), (4, {}, 8, END), (2, dict(c_thought=1), 2, LAST),
    (4, dict(pad_latent_to_max=False), 6, END), (2, dict(max_latent_stage=1), 2, END),
    (2, dict(num_thoughts=5), 5, LAST), (2, dict(mode='pause'), 4, LAST),
    (2, dict(mode='no_thoughts'), 0, LAST), (2, dict(mode='cot'), 0, WHOLE),
    (0, dict(mode='no_cot'), 0, END)))
def test_text_of_each_mode_and_stage(stage, knobs, thoughts, target):
    assert prepare.build_text(ROW, stage, **knobs) == (PROMPT, thoughts, target)


def test_rows_without_image_choices_answer_or_steps():
    row = dict(question='Is Tom a dog?', steps=['Tom is a cat.'], answer='No.')
    asked = 'Question: Is Tom a dog?\n\nLet me think step by step:\n'
    assert prepare.build_text(row, 0, visual_bridge=True) == (asked, 0, 'Tom is a cat.\nNo.')
    assert prepare.build_text(row, 1, answer='### {answer}')[2] == '### No.'
    assert prepare.fill('<image>{question}\n{choices}\n', row) == 'Is Tom a dog?\n'
    del row['answer'], row['steps']  # how many thoughts its steps would need nobody knows
    assert prepare.build_text(row, 2, pad_latent_to_max=False) == (asked, 4, None)


def test_the_visual_bridge():
    texts = [prepare.build_text(ROW, stage, visual_bridge=True) for stage in range(4)]
    assert texts[0][0] == PROMPT
    assert {text[0] for text in texts[1:]} == {PROMPT + 'Analyzing the visual information:\n'}
    assert [text[2].split('\n')[0] for text in texts] == [
        'Looking at the image, It is windy.', 'I see a string.',  # which speaks of seeing
        'From what I can see, It is in the sky.', END]


def test_chatml_has_internvls_turns():
    turns = (f'<|im_start|>system\n{prepare.SYSTEM}<|im_end|>\n<|im_start|>user\n'
             f'{PROMPT.strip()}<|im_end|>\n<|im_start|>assistant\n')
    assert prepare.build_text(ROW, 0, template='chatml') == (turns, 0, WHOLE)


def encode(row=ROW, stage=1, tiles=2, **knobs):
    tiles = torch.zeros(tiles, 3, 56, 56, dtype=torch.uint8) if tiles else None
    return prepare.encode(row, TOKENIZER, stage, tiles, num_image_tokens=N, **knobs)


@pytest.mark.parametrize('stage', (0, 1, 4))
def test_encoded_rows_supervise_what_follows_the_thoughts(stage):
    row, asked = encode(stage=stage), encode(stage=stage, supervised=False)
    ids, first = row['input_ids'], len(asked['input_ids'])
    text = PROMPT.replace('<image>', '<img>' + '<IMG_CONTEXT>' * 2 * N + '</img>')
    if stage:
        text += '<|start-latent|>' + '<|latent|>' * 2 * stage + '<|end-latent|>'
    assert TOKENIZER.decode(ids[:first]) == text
    assert asked['input_ids'] == ids[:first] and asked['labels'] is None
    assert row['labels'] == [-100] * first + ids[first:]
    assert TOKENIZER.decode(ids[first:]) == prepare.build_text(ROW, stage)[2] + '<|im_end|>'


def test_rows_that_do_not_fit_or_would_be_wrong_are_refused():
    """Our tokens in their own text; an image without a place, and the reverse."""
    needed = len(encode()['input_ids'])
    encode(max_length=needed)
    wrong_rows = [dict(row=dict(ROW, question=f'What is {token}?'))
                  for token in ('<IMG_CONTEXT>', '<|latent|>', '<image>')]
    for wrong in (*wrong_rows, dict(prompt='{question}'), dict(tiles=0), dict(max_length=needed-1)):
        with pytest.raises(AssertionError):
            encode(**wrong)


def test_earlier_stages_are_drawn_by_seed_epoch_and_row_alone():
    rows = [dict(ROW, image=None, question_id=str(i)) for i in range(200)]

    def stages(rows=rows, stage=3, uniform_prob=0.4, seed=1, epoch=2):
        split = prepare.Rows(rows, 'train', stage, TOKENIZER, uniform_prob=uniform_prob, seed=seed,
                             epoch=epoch)
        return [split.stage_of(i) for i in range(len(rows))]

    drawn = stages()
    assert 100 < drawn.count(3) < 140
    assert all(15 < drawn.count(stage) < 45 for stage in (0, 1, 2))
    assert stages(rows[::-1]) == drawn[::-1]
    assert drawn not in (stages(seed=2), stages(epoch=1))
    assert {*stages(stage=0, uniform_prob=1)} == {0}


# --- images ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('width, height, at_8, at_12', (
    (640, 480, 7, 13), (480, 640, 7, 13), (500, 375, 7, 13), (640, 427, 7, 7), (612, 612, 1, 1),
    (448, 448, 1, 1), (640, 640, 5, 5), (640, 360, 3, 3), (640, 512, 1, 13), (90, 10, 9, 10)))
def test_tiles_are_transformers_own_bit_for_bit(width, height, at_8, at_12):
    from transformers.models import got_ocr2
    name = 'GotOcr2ImageProcessor' + 'Pil' * (transformers.__version__ >= '5')
    kind = getattr(got_ocr2, name, None) or pytest.skip(f'no {name} in this version')
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for most, count in ((1, 1), (8, at_8), (12, at_12)):
        processor = kind(size=dict(height=448, width=448), crop_to_patches=True, min_patches=1,
                         max_patches=most)
        theirs = processor(Image.fromarray(pixels), return_tensors='np', do_rescale=False,
                           do_normalize=False)['pixel_values']
        ours = prepare.tile_image(Image.fromarray(pixels), 448, most)
        assert len(ours) == count and np.array_equal(ours.numpy(), theirs)


def in_memory(image, kind='PNG', **how):
    data = io.BytesIO()
    image.save(data, kind, **how)
    return data.getvalue()


def test_a_picture_is_read_as_a_viewer_shows_it():
    """Upright, also a TIFF, which Pillow turns itself; over white what is transparent, since black
    on transparent black would be black on black; palettes in colour."""
    image, turn = Image.new('RGBA', (40, 20)), Image.Exif()
    image.paste((255, 0, 0, 255), (0, 0, 20, 20))
    turn[0x0112] = 6
    plain = image.convert('RGB')
    for kind, picture, white in (('PNG', image, 255), ('TIFF', plain, 0), ('WEBP', plain, 0),
                                 ('PNG', image.quantize(4), 255), ('PNG', plain.quantize(4), 0)):
        shown = np.asarray(prepare.load_image(in_memory(picture, kind, exif=turn.tobytes())))
        assert shown.shape == (40, 20, 3)
        assert np.abs(shown[5, 5] - np.array((255, 0, 0))).max() < 9
        assert np.abs(shown[35, 5] - np.array((white,) * 3)).max() < 9


def test_tiles_are_cached_by_picture_and_parameters(tmp_path):
    Image.new('RGB', (64, 48), 'red').save(tmp_path / 'a.png')
    load = partial(prepare.load_tiles, folder=str(tmp_path), split='train')
    row, other = (dict(image='a.png', image_hash=name) for name in 'ab')
    plain = load(row, size=28, cache=False)
    assert not (tmp_path / 'cache').exists()
    assert torch.equal(load(row, size=28), plain)
    Image.new('RGB', (64, 48)).save(tmp_path / 'a.png')
    assert torch.equal(load(row, size=28), plain)
    assert load(row, size=14).shape[-1] == 14
    assert not any(tiles.any() for tiles in (load(row, size=28, max_tiles=1), load(other, size=28)))


# --- rows -----------------------------------------------------------------------------------------
RAW = dict(question_id='a', question='Q? ', choices=list('wxyz'), correct_choice_idx=2,
           rationales=['One two. Three!', 'b'])


@pytest.mark.parametrize('changes, wanted', (
    ({}, dict(question='Q?', answer='y', correct_choice_idx=2, steps=['One two.', 'Three!'])),
    (dict(steps_from='all'), dict(steps=['One two. Three!', 'b'])),
    (dict(rationales=['a b c d e f']), dict(steps=['a b', 'c d', 'e', 'f'])),
    (dict(rationales=['Dr. A came to St. Gallen. Go!']),
     dict(steps=['Dr. A came to St. Gallen.', 'Go!'])),
    (dict(rationales=None, steps=['One\ntwo.', ' ', ' 3. ']), dict(steps=['One two.', '3.'])),
    (dict(correct_choice_idx=None, answer='x'), dict(answer='x', correct_choice_idx=1)),
    (dict(choices=[' w', 'x ', ' y']), dict(choices=[' w', 'x ', ' y'], answer='y')),
    (dict(choices=None, correct_choice_idx=None, answer=' 18 '), dict(answer='18'))))
def test_raw_rows_become_prepared_ones(changes, wanted):
    row = prepare.read_row({**RAW, **changes}, 'train', changes.get('steps_from', 'first'))
    assert {key: row[key] for key in wanted} == wanted


@pytest.mark.parametrize('changes', (
    dict(question=None), dict(question=' '), dict(choices=['w']), dict(choices=list('rstuvwxyz')),
    dict(choices=['w', '', 'y']), dict(choices=['w', None, 'y']), dict(correct_choice_idx=4),
    dict(correct_choice_idx=-2), dict(correct_choice_idx=None), dict(answer='q'), dict(answer='x'),
    dict(correct_choice_idx=None, answer='q'), dict(choices=None, correct_choice_idx=None),
    dict(rationales=None), dict(question='<image>\nWhat?'), dict(rationales=['so <|latent|>'])))
def test_rows_that_cannot_be_used_are_dropped(changes):
    with pytest.raises(prepare.Dropped):
        prepare.read_row(dict(RAW, **changes), 'train')


def load_rows(folder, rows):
    """Of a train.json and, where image_path names them, a picture each."""
    for row in rows:
        Image.new('RGB', (40, 30)).save(folder / row.get('image_path', 'none.png'))
    (folder / 'train.json').write_text(json.dumps(rows))
    files = dict(train=str(folder / 'train.json'))
    return prepare.load_rows('', files, str(folder / 'arrow'))['train']


def test_coconuts_own_files_are_such_rows(tmp_path):
    rows = [dict(question='Is Tom a dog?', steps=['Tom is a cat.'], answer='No.')] * 2
    prepared = prepare.prepare_split(*load_rows(tmp_path, rows), 'train', str(tmp_path))
    assert prepared == [dict(rows[0], question_id=str(i)) for i in range(2)]


def test_two_rows_of_one_id_are_an_error(tmp_path):
    with pytest.raises(AssertionError, match='the same'):
        prepare.prepare_split([dict(RAW, question_id='the same')] * 2, '', 'train', str(tmp_path))


def test_a_okvqas_parquet_files_are_such_rows_and_their_splits_are_their_names(tmp_path):
    image = dict(bytes=in_memory(Image.new('RGB', (40, 30))), path=None)
    row, source = dict(RAW, image=image, direct_answers="['y']"), tmp_path / 'in[1]'  # a pattern
    source.mkdir()
    for split, more in (('train', {}), ('validation', {}), ('other', {}),
                        ('test', dict(correct_choice_idx=None, rationales=None))):
        datasets.Dataset.from_list([{**row, **more}]).to_parquet(source / f'{split}-0.parquet')
    raw = prepare.load_rows(str(source), {}, str(tmp_path / 'arrow'))
    assert {*raw} == {'train', 'validation', 'test'}
    train, test = (prepare.prepare_split(*raw[split], split, str(tmp_path), image_size=28)
                   for split in ('train', 'test'))
    assert (train[0]['answer'], train[0]['steps']) == ('y', ['One two.', 'Three!'])
    assert train[0]['image_size'] == (40, 30) and 'answer' not in test[0]


@pytest.mark.parametrize('column, value', (
    ('question', ['a', 'b']), ('question', 7), ('choices', 'a|b'), ('choices', [1, 2]),
    ('correct_choice_idx', '1'), ('correct_choice_idx', 0.5), ('answer', 18), ('steps', 'One.'),
    ('rationales', [['a']]), ('image', '0.png'), ('question_id', 3)))
def test_a_column_of_another_type_is_refused_by_name(tmp_path, column, value):
    with pytest.raises(ValueError, match=rf'\b{column}\b'):
        load_rows(tmp_path, [{'question': '?', 'answer': 'a', column: value}])


def test_bad_pictures_drop_their_rows_and_leave_no_file(tmp_path, capsys):
    names = ('text', 'cut', 'bomb', 'deep', 'gone', 'good')
    raw, folder = load_rows(tmp_path, [dict(question='?', answer='a', image_path=f'{name}.png',
                                            question_id=name) for name in names])
    (tmp_path / 'text.png').write_text('no picture')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'good.png').read_bytes()[:-30])
    Image.new('1', (14000, 14000)).save(tmp_path / 'bomb.png')
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(tmp_path / 'deep.png')
    os.remove(tmp_path / 'gone.png')
    out = tmp_path / 'out'
    rows = prepare.prepare_split(raw, folder, 'train', str(out), image_size=28)
    assert [row['question_id'] for row in rows] == ['good']
    assert [*(out / 'images').rglob('*.*')] == [out / rows[0]['image']]
    assert (out / rows[0]['image']).read_bytes() == (tmp_path / 'good.png').read_bytes()
    assert '1 of 6' in capsys.readouterr().out


# --- answers --------------------------------------------------------------------------------------
SAID = {  # choice of cat, kite, dog, car -> texts that say it; None: none, or several
    0: ('A', 'a', '(a)', 'A. cat', 'cat', 'The cat.', '**A**', 'option A'),
    1: ('B.', 'kite B', '(B) kite', 'It flies.\nThe answer is B. kite', 'the answer is KITE!',
        'There is a dog.\nanswer: "kite"', 'The answer is A. cat\nThe answer is B'),
    2: ('C. dog', 'Final answer: (C).', 'The answer is option C', 'The answer is a dog.'),
    None: ('', '.', 'E', 'A or B', 'A, B', 'A/B', 'not A', 'A. kite', 'dog A', 'It is a kite.',
           'A kite flies.', 'carpet', 'The answer is A or B', 'A. cat B. kite C. dog D. car',
           'The answer is not A', 'The answer is E. bird', 'cats', 'A+', 'A.M.')}


@pytest.mark.parametrize('choice', SAID)
def test_an_answer_is_read_where_it_is_one_choice_and_nothing_else(choice):
    read = {text: asking.read_choice(text, ROW, prepare.ANSWER) for text in SAID[choice]}
    assert read == dict.fromkeys(SAID[choice], choice)


@pytest.mark.parametrize('text, choices, ended, read', (
    ('B. No', ('Yes', 'No'), True, 1), ('The answer is No', ('Yes', 'No'), True, 1),
    ('C. ruler', ('pen', 'cup', 'ruler', 'map'), True, 2), ('C++', ('C', 'C++'), True, 1),
    ('not sure', ('no', 'not sure'), True, 1), ('-5', ('5', '-5'), True, 1),
    ('A', ('B', 'A'), True, None), ('cat', ('cat', 'cat'), True, None),
    ('B. cat', ('cat', 'cat'), True, 1), ('B', 'vw', False, None), ('B\nbut', 'vw', False, None),
    ('The answer is B. w', 'vw', False, None), ('The answer is B. w\nsince', 'vw', False, 1)))
def test_choices_of_odd_words_and_texts_that_were_cut_off(text, choices, ended, read):
    """Signs and words of doubt in a choice are its own; of two that a text may mean none is read;
    what was cut off counts only where it had said its answer."""
    row = dict(ROW, choices=choices)
    assert asking.read_choice(text, row, prepare.ANSWER, ended) == read


@pytest.mark.parametrize('template', (prepare.ANSWER, '{choice} {letter}', '{letter}', '{choice}',
                                      '<answer>{letter}</answer>', 'So\n{letter}) {choice}'))
def test_the_recipes_own_text_is_read_back_or_refused(template):
    for choices in (['cat', 'kite', 'dog', 'car'], ['yes', 'no', 'both', 'not sure'],
                    ['1', '-1', '1.5', '10'], ['C++', 'C#', 'C', 'D+']):
        asking.check_round_trip([dict(ROW, choices=choices, correct_choice_idx=right, answer=answer)
                                 for right, answer in enumerate(choices)], template)
    with pytest.raises(AssertionError):
        asking.check_round_trip([ROW], 'It may fly.')


@pytest.mark.parametrize('said, known, right, exact', (
    ('Tom is a cat.\n### No.', 'No.', True, True), ('### no', 'No.', True, False),
    ('(no)', 'No.', True, False), ('No.\n### Yes.', 'No.', False, False), ('', 'a', False, False),
    ('not no', 'No.', False, False), ('-5', '5', False, False), ('1.5', '15', False, False),
    ('C++', 'C', False, False), ('3 4', '3/4', False, False), ('18 apples', '18', False, False)))
def test_free_answers_are_their_last_line(said, known, right, exact):
    row = dict(question='?', answer=known)
    assert asking.free_answer_is(said, row, '### {answer}') == (right, exact)


def scores(texts, row):
    """What `respond` and `summarize` make of a model that answers with these texts."""
    model, batch = tiny_model(), dict(input_ids=torch.tensor([[9, LATENT]] * len(texts)))
    ids = [TOKENIZER.encode(text) + [EOS] + [PAD] * 24 for text in texts]
    model.generate = lambda input_ids: torch.tensor([one[:24] for one in ids])
    said = asking.respond(model, TOKENIZER, batch, [row] * len(texts), '{letter}')
    return said, asking.summarize(said, 10.0)


def test_unread_is_wrong_and_of_two_equal_options_either_is_right():
    """What goes to the official scorer is the option as the data set spells it, A where none was
    read."""
    said, metrics = scores(['D', 'no idea', 'C', 'A', 'A' * 30], dict(
        question='?', choices=[' cat', 'kite', 'cat', 'car '], correct_choice_idx=0, answer='cat'))
    assert [one['right'] for one in said] == [False, False, True, True, False]
    assert [one['option'] for one in said] == ['car ', ' cat', 'cat', ' cat', ' cat']
    wanted = dict(examples=5, accuracy=0.4, accuracy_default_a=0.8, unparsed=2, cut=1,
                  tokens_per_answer=7.6, thoughts_per_answer=1, seconds_per_answer=2)
    assert {key: metrics[key] for key in wanted} == pytest.approx(wanted)


def test_free_answers_have_a_second_figure_and_intervals_are_wilsons():
    metrics = scores(['no', 'No.'], dict(question='?', answer='No.'))[1]
    assert (metrics['accuracy'], metrics['accuracy_exact']) == (1, 0.5)
    assert asking.wilson(0.8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)  # as in tables


@pytest.mark.parametrize('folder', ('.', 'config', 'experiments'))
def test_no_line_is_wider_than_100_columns(folder):
    for path in (HERE / folder).glob('*.py'):
        wide = [line for line in path.read_text('utf-8').splitlines() if len(line) > 100]
        assert not wide, f'{path.name}: {wide[0]}'
