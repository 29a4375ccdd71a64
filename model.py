"""
MultiCoCo's model: InternVL3 that reasons in continuous thoughts. One image, one question, one
forward:

    uint8 tiles -> InternViT (timm) -> pixel shuffle -> projector --.
    token ids -> embedding ----------------------------------------- fuse -> think -> head

`think` is Coconut's latent loop: a thought's input embedding is the hidden state just before it, by
way of `feed`. Sources: Coconut (arXiv 2412.06769), InternVL3 (arXiv 2504.10479), Qwen2 (arXiv
2407.10671). Unlike Coconut's public code, each row is cut at its own thoughts (n thoughts cost n
further passes for the whole batch, wherever they stand), and generation is batched and cached.

Notation: B rows, T tokens a row, L tokens of one pass, S slots (see `Layout`), D width, K
key/value heads, V vocabulary, n thoughts, P tiles, N visual tokens a tile.
"""
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
from einops import rearrange
from huggingface_hub import snapshot_download
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer
from torch import nn

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
IMG, END_IMG, IMG_CONTEXT = '<img>', '</img>', '<IMG_CONTEXT>'
START_LATENT, LATENT, END_LATENT = '<|start-latent|>', '<|latent|>', '<|end-latent|>'
SPECIAL_TOKENS = (IMG, END_IMG, IMG_CONTEXT, START_LATENT, LATENT, END_LATENT)


@dataclass
class Config:
    # language model: Qwen2.5-0.5B
    vocab_size: int = 151677              # InternVL3's 151674 and the three latent tokens
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    head_dim: int = 64
    attention_bias: bool = True           # on q, k, v: Qwen2 True, Qwen3 and Llama False
    qk_norm: bool = False                 # Qwen3 True
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    # vision tower: InternViT-300M; with 0 layers there is none, and the model takes text alone
    vision_hidden_size: int = 1024
    vision_intermediate_size: int = 4096
    vision_num_layers: int = 24
    vision_num_heads: int = 16
    vision_layer_norm_eps: float = 1e-6
    patch_size: int = 14
    image_size: int = 448                 # side of a tile in pixels
    downsample_ratio: float = 0.5         # pixel shuffle: 1024 patches -> 256 visual tokens a tile
    image_token_id: int = 151667          # <IMG_CONTEXT>
    latent_token_id: int = 151675         # <|latent|>
    eos_token_ids: tuple = (151645, 151643)
    pad_token_id: int = 151643
    thought: str = 'hidden'               # what is fed back: see `feed`, and `from_pretrained`

    def __post_init__(self):
        assert self.thought in ('hidden', 'scaled', 'soft', 'pause'), f'thought={self.thought!r}'

    @property
    def num_image_tokens(self):
        """N, visual tokens a tile."""
        return int(self.image_size // self.patch_size * self.downsample_ratio) ** 2


# --- decoder: Qwen2 (q, k, v with bias), Llama (without) or Qwen3 (RMS norm on queries and keys) --
def rotary(position, head_dim, theta):
    """RoPE's cos and sin, float32 [B, 1, L, head_dim], of positions [B, L]. The first half of sin
    is negated, which is all that `rotate` needs besides a roll."""
    channel = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32)
    angle = position[:, None, :, None].float() * theta ** -(channel / head_dim)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """(a, b) to (a cos - b sin, b cos + a sin): roll exchanges the halves."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, -1), sin.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        query_size = c.num_attention_heads * c.head_dim
        key_size = c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, query_size, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, key_size, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, key_size, bias=c.attention_bias)
        self.o_proj = nn.Linear(query_size, c.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask, past):
        """x [B, L, D]. past: keys and values [B, K, R, head_dim] of the R slots before, and mask
        bool [B, 1, L, R + L]; both None in the first pass, where attention is causal and no more.
        Gives y [B, L, D] and (keys, values) [B, K, R + L, head_dim], these behind the past ones."""
        q = rearrange(self.q_proj(x), 'b l (h d) -> b h l d', d=self.head_dim)
        k = rearrange(self.k_proj(x), 'b l (h d) -> b h l d', d=self.head_dim)
        v = rearrange(self.v_proj(x), 'b l (h d) -> b h l d', d=self.head_dim)
        q = rotate(self.q_norm(q), cos, sin).to(v.dtype)  # under autocast the norms give float32
        k = rotate(self.k_norm(k), cos, sin).to(v.dtype)
        if past is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
            # fused kernels take a mask or grouped queries, not both: the G query heads of each key
            # head are laid out as G * L queries of one head
            G = q.shape[1] // k.shape[1]
            q = rearrange(q, 'b (k g) l d -> b k (g l) d', g=G)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, G, 1))
            y = rearrange(y, 'b k (g l) d -> b (k g) l d', g=G)
        return self.o_proj(rearrange(y, 'b h l d -> b l (h d)')), (k, v)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, mask, past):
        y, past = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), past


# --- where a token stands: the bookkeeping of the latent loop -------------------------------------
# Every row is cut at its own thoughts into chunks. Chunk 0 is a row up to its first thought, chunk
# k runs from thought k to just before thought k + 1; all rows' chunk k is one pass of the decoder:
#
#     row 0:  p p p p p p | t1 | t2 a a a              p prompt or visual token
#     row 1:  p p p       | t1 | t2       | t3 a a     t thought    a a token behind the thoughts
#     chunk:  0             1    2          3
#     slots:  0 1 2 3 4 5   6    7 8 9 10   11 12 13
#
# A chunk is as wide as its longest row needs: row 1 leaves slots 3 4 5 and 8 9 10 empty, row 0
# leaves 11 12 13. A token's slot is where it stands here; its position is its column in input_ids,
# by which RoPE turns it: row 1's t2 has slot 7 and position 4. Positions alone say who sees whom: a
# query sees the keys of its row at positions up to its own; an empty slot's is greater than any.
EMPTY = 2**30


class Layout(NamedTuple):
    slot: torch.Tensor         # int64 [B, T]: the slot of each token, 0 for padding
    ids: torch.Tensor          # int64 [B, S]: the token in each slot
    position: torch.Tensor     # int64 [B, S]: its position in its row, EMPTY in an empty slot
    length: torch.Tensor       # int64 [B, n + 1]: tokens of each row in each chunk, 0 for none
    widths: list               # n + 1 ints: slots of each chunk, the greatest length in it
    image_slots: torch.Tensor  # int64 [P * N]: which of B * S slots hold <IMG_CONTEXT>, row by row
    image_tokens: list         # B ints: <IMG_CONTEXT> tokens of each row
    targets: tuple             # of each supervised token, int64: row, slot that predicts it, token


def lay_out(input_ids, attention_mask, config, labels=None, device=None, more=0):
    """forward's inputs as a Layout on `device`; more: tokens that will be written. Runs on the CPU:
    every size that depends on values is found here, once, so that `forward` never waits for the
    GPU. Leave its inputs on the CPU."""
    device = device or input_ids.device
    ids = input_ids.cpu()
    B, T = ids.shape
    real = torch.ones_like(ids).bool() if attention_mask is None else attention_mask.cpu().bool()
    longest, limit = int(real.sum(1).max()) + more, config.max_position_embeddings
    assert longest <= limit, f'a row has {longest} tokens, the model takes {limit} at most'
    assert real[:, 0].all() and (real[:, 1:] <= real[:, :-1]).all(), 'rows are padded on the right'
    assert (ids[:, 0] != config.latent_token_id).all(), 'a thought needs a token before it'
    chunk_of = ((ids == config.latent_token_id) & real).cumsum(1)               # [B, T]
    length = torch.zeros(B, int(chunk_of.max()) + 1, dtype=torch.long)
    length.scatter_add_(1, chunk_of, real.long())                               # [B, n + 1]
    widths = length.max(0).values                                               # [n + 1]
    first_slot = widths.cumsum(0) - widths              # [n + 1], of each chunk
    first_column = length.cumsum(1) - length            # [B, n + 1], of each row's chunks
    # how far a token is from where its row's chunk begins, so far it is from the chunk's first slot
    slot = first_slot[chunk_of] + torch.arange(T) - first_column.gather(1, chunk_of)
    slot = torch.where(real, slot, 0)  # [B, T]; padding counted with the last chunk, has none
    row, column = real.nonzero(as_tuple=True)
    slot_ids = torch.full((B, int(widths.sum())), config.pad_token_id)          # [B, S]
    slot_ids[row, slot[row, column]] = ids[row, column]
    position = torch.full_like(slot_ids, EMPTY)
    position[row, slot[row, column]] = column
    is_image = slot_ids == config.image_token_id
    targets = ()
    if labels is not None:
        labels = labels.cpu()
        # the hidden state in column `before` predicts the token in the next one
        row, before = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        targets = (row, slot[row, before], labels[row, before + 1])
    on_device = partial(torch.Tensor.to, device=device, non_blocking=True)
    return Layout(on_device(slot), on_device(slot_ids), on_device(position), on_device(length),
                  widths.tolist(), on_device(is_image.flatten().nonzero()[:, 0]),
                  is_image.sum(1).tolist(), tuple(on_device(x) for x in targets))


# --- the whole model ------------------------------------------------------------------------------
class Output(NamedTuple):
    loss: torch.Tensor | None    # float32, mean over supervised tokens; None without labels
    logits: torch.Tensor | None  # [B, T, V]; None with labels
    thoughts: torch.Tensor       # [B, n, D], the vectors fed back, 0 where a row has fewer


class MultiCoCo(nn.Module):
    """Two places change what a thought is: `feed`, for a method that is trained, and the hook of
    forward and generate, for interventions from outside. `edit_thought(k, thought [B, D]) -> [B,
    D]` is called just before thought k = 1, 2, ... is fed back, for all rows; what it gives is fed
    back instead, in the rows that have a thought k."""

    def __init__(self, config, device=None):
        """device='meta': no initial values, a checkpoint has them. Add new modules after the `with`
        (or in a subclass), so that they have theirs though the checkpoint lacks them."""
        super().__init__()
        c = self.config = config
        self.activation_checkpointing = False
        with torch.device(device or torch.get_default_device()):
            if c.vision_num_layers:
                self.vision_model = timm.models.VisionTransformer(
                    img_size=c.image_size, patch_size=c.patch_size, embed_dim=c.vision_hidden_size,
                    depth=c.vision_num_layers, num_heads=c.vision_num_heads,
                    mlp_ratio=c.vision_intermediate_size / c.vision_hidden_size, init_values=1.0,
                    norm_layer=partial(nn.LayerNorm, eps=c.vision_layer_norm_eps),
                    final_norm=False, num_classes=0, weight_init='skip')
                for parameter in (self.vision_model.cls_token, self.vision_model.pos_embed):
                    nn.init.zeros_(parameter)  # skipped, they hold whatever is in memory
                shuffled = int(c.vision_hidden_size / c.downsample_ratio ** 2)
                self.mlp1 = nn.Sequential(
                    nn.LayerNorm(shuffled), nn.Linear(shuffled, c.hidden_size), nn.GELU(),
                    nn.Linear(c.hidden_size, c.hidden_size))
            self.language_model = nn.Module()  # with OpenGVLab's names
            self.language_model.model = nn.Module()
            self.language_model.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
            self.language_model.model.layers = nn.ModuleList(
                Block(c) for _ in range(c.num_hidden_layers))
            self.language_model.model.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
            self.language_model.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.language_model.lm_head.weight = self.language_model.model.embed_tokens.weight

    def set_activation_checkpointing(self, on=True):
        self.activation_checkpointing = on
        if self.config.vision_num_layers:
            self.vision_model.set_grad_checkpointing(on)

    def embed_image(self, pixel_values):
        """Tiles [P, 3, side, side] on any device, uint8 or normalised float, to visual tokens [P,
        N, D]."""
        c, weight = self.config, self.vision_model.pos_embed
        pixel_values = pixel_values.to(weight.device, non_blocking=True)
        if pixel_values.dtype == torch.uint8:
            mean, std = torch.tensor((IMAGE_MEAN, IMAGE_STD)).to(weight.device, non_blocking=True)
            pixel_values = pixel_values.float().div_(255).sub_(mean[:, None, None])
            pixel_values.div_(std[:, None, None])
        # [P, 1 + patches, vision width]
        x = self.vision_model.forward_features(pixel_values.to(weight.dtype))
        p = round(1 / c.downsample_ratio)                       # below: [P, N, p * q * width]
        x = rearrange(x[:, 1:], 'b (h p w q) c -> b (h w) (p q c)', p=p, q=p,
                      h=c.image_size // c.patch_size // p)
        return self.mlp1(x)                                     # [P, N, D]

    def fuse(self, layout, pixel_values=None, num_tiles=None, image_flags=None):
        """Tokens in slots to embeddings [B, S, D]: visual tokens stand where <IMG_CONTEXT> did, in
        row order. An error names the counts of each row where tokens and tiles do not fit."""
        x, N = self.language_model.model.embed_tokens(layout.ids), self.config.num_image_tokens
        if image_flags is not None:
            pixel_values = pixel_values[image_flags.flatten().to(pixel_values.device).bool()]
        P = 0 if pixel_values is None else len(pixel_values)
        counts = layout.image_tokens
        tiles = [count // N for count in counts] if num_tiles is None else num_tiles.tolist()
        for row, (count, own) in enumerate(zip(counts, tiles)):
            assert count == own * N, f'row {row}: {count} {IMG_CONTEXT}, but {own} tiles of {N}'
        assert sum(tiles) == P, f'rows hold tokens of {tiles} tiles, the batch has {P}'
        if P:
            visual = self.embed_image(pixel_values).flatten(0, 1).to(x.dtype)   # [P * N, D]
            x = x.flatten(0, 1).index_copy(0, layout.image_slots, visual).view_as(x)
        return x

    def decode(self, x, position, mask=None, cache=None):
        """One pass through the decoder: x [B, L, D] at position [B, L] to hidden states after the
        final norm [B, L, D] and the cache, a list of (keys, values) of each layer. mask and cache:
        see Attention; None in the first pass."""
        cos, sin = rotary(position, self.config.head_dim, self.config.rope_theta)
        cache = cache or [None] * self.config.num_hidden_layers
        grown = []
        for layer, past in zip(self.language_model.model.layers, cache):
            if self.activation_checkpointing and torch.is_grad_enabled():
                layer = partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False,
                                preserve_rng_state=False)
            x, past = layer(x, cos, sin, mask, past)
            grown.append(past)
        return self.language_model.model.norm(x), grown

    def feed(self, hidden):
        """The one place where a hidden state becomes the input of a latent position: [B, D] to [B,
        D], by Config.thought."""
        kind, embeddings = self.config.thought, self.language_model.model.embed_tokens.weight
        if kind == 'hidden':  # Coconut: the state itself
            return hidden
        if kind == 'scaled':  # at the mean length of an embedding; pretrained states are far longer
            length = embeddings.detach().float().norm(dim=-1).mean()
            return hidden * (length / hidden.detach().norm(dim=-1, keepdim=True))
        if kind == 'soft':  # the mean embedding under what the head would say
            chance = self.language_model.lm_head(hidden).float().softmax(-1)    # [B, V]
            return chance.to(embeddings.dtype) @ embeddings
        # 'pause', the control: the embedding of <|latent|>, nothing is fed back
        return embeddings[self.config.latent_token_id].expand_as(hidden)

    def think(self, x, layout, edit_thought=None):
        """The latent loop over fused embeddings x [B, S, D]: n + 1 passes, one a chunk (see
        `Layout`). Gives hidden states [B, S, D], thoughts [B, n, D] and the cache of `decode`."""
        rows = torch.arange(len(x), device=x.device)
        hidden, thoughts, start, cache = [], [], 0, None
        for k, width in enumerate(layout.widths):
            stop = start + width
            position, chunk, mask = layout.position[:, start:stop], x[:, start:stop], None
            if k > 0:
                last = (layout.length[:, k - 1] - 1).clamp(min=0)               # [B]
                thought = self.feed(hidden[-1][rows, last])                     # [B, D]
                if edit_thought is not None:
                    thought = edit_thought(k, thought)
                has_thought = layout.length[:, k, None] > 0
                thought = torch.where(has_thought, thought, 0).to(x.dtype)
                thoughts.append(thought)
                chunk = torch.cat((thought[:, None], chunk[:, 1:]), 1)
                # a query sees the keys whose position is not greater than its own
                mask = layout.position[:, None, None, :stop] <= position[:, None, :, None]
            states, cache = self.decode(chunk, position, mask, cache)
            hidden.append(states)
            start = stop
        thoughts = torch.stack(thoughts, 1) if thoughts else x[:, :0]
        return torch.cat(hidden, 1), thoughts, cache

    def forward(self, input_ids, pixel_values=None, attention_mask=None, labels=None,
                num_tiles=None, image_flags=None, edit_thought=None):
        """
        input_ids       int64 [B, T], right-padded; a <|latent|> anywhere but first is a thought.
                        Inputs are best left on the CPU: forward moves what the GPU needs
        pixel_values    uint8 or normalised float [P, 3, side, side]: all rows' tiles in row order
        attention_mask  [B, T], 1 for a token; None for no padding
        labels          int64 [B, T], -100 where unsupervised; only the others go through the head
        num_tiles       int64 [B], tiles of each row that stay, to be held against its tokens
        image_flags     [P], as InternVL's data code gives them: tiles flagged 0 are left out
        """
        head = self.language_model.lm_head
        layout = lay_out(input_ids, attention_mask, self.config, labels, head.weight.device)
        x = self.fuse(layout, pixel_values, num_tiles, image_flags)
        hidden, thoughts, _ = self.think(x, layout, edit_thought)
        if labels is None:
            rows = torch.arange(len(x), device=x.device)[:, None]
            return Output(None, head(hidden[rows, layout.slot]), thoughts)
        row, slot, target = layout.targets
        logits = head(hidden[row, slot])                                        # [supervised, V]
        return Output(F.cross_entropy(logits.float(), target), None, thoughts)

    @torch.no_grad()
    def generate(self, input_ids, pixel_values=None, attention_mask=None, max_new_tokens=64,
                 temperature=0.0, top_p=1.0, num_tiles=None, image_flags=None, edit_thought=None):
        """New tokens int64 [B, <= max_new_tokens], each row up to and with its end token, then
        padding. Greedy at temperature 0. Thoughts of the prompt run through `think`, as in
        training. Where rows write <|latent|> themselves, these are fed a thought too, and
        edit_thought is called with k = n + 1, n + 2, ..."""
        c, lm = self.config, self.language_model
        device = lm.lm_head.weight.device
        layout = lay_out(input_ids, attention_mask, c, None, device, max_new_tokens)
        x = self.fuse(layout, pixel_values, num_tiles, image_flags)
        hidden, thoughts, cache = self.think(x, layout, edit_thought)
        n, (B, S) = thoughts.shape[1], layout.ids.shape
        position = layout.length.sum(1)         # [B], of the token to come
        last = hidden[torch.arange(B), layout.slot[torch.arange(B), position - 1]]  # [B, D]
        # room for the new tokens, up to a multiple of 64, so that a compiled step is seldom anew
        room = -(S + max_new_tokens) % 64 + max_new_tokens
        cache = [(F.pad(keys, (0, 0, 0, room)), F.pad(values, (0, 0, 0, room)))
                 for keys, values in cache]
        past_position = F.pad(layout.position, (0, room), value=EMPTY)          # [B, S + room]
        new, done = [], torch.zeros(B, dtype=torch.bool, device=device)
        eos = torch.tensor(c.eos_token_ids, device=device)
        for slot in range(S, S + max_new_tokens):
            token = sample(lm.lm_head(last).float(), temperature, top_p)        # [B]
            token = torch.where(done, c.pad_token_id, token)
            new.append(token)
            done = done | torch.isin(token, eos)
            if done.all() or len(new) == max_new_tokens:
                break
            x, is_thought = lm.model.embed_tokens(token), token == c.latent_token_id
            if is_thought.any():
                n, thought = n + 1, self.feed(last)
                if edit_thought is not None:
                    thought = edit_thought(n, thought)
                x = torch.where(is_thought[:, None], thought.to(x.dtype), x)
            last, written = self.step(x, position, past_position, cache)
            for (keys, values), (key, value) in zip(cache, written):  # to the slot kept for them
                keys[:, :, slot] = key
                values[:, :, slot] = value
            past_position[:, slot] = position
            position = position + 1
        return torch.stack(new, 1)

    def step(self, x, position, past_position, cache):
        """One token a row: x [B, D] at position [B] to its hidden state [B, D] and (key, value) [B,
        K, head_dim] of each layer. Shapes stay the same from token to token: after `model.step =
        torch.compile(model.step, dynamic=False)` generate uses it compiled."""
        keys_at = torch.cat((past_position, position[:, None]), 1)              # [B, slots + 1]
        mask = (keys_at <= position[:, None])[:, None, None]                    # [B, 1, 1, slots+1]
        hidden, grown = self.decode(x[:, None], position[:, None], mask, cache)
        return hidden[:, 0], [(keys[:, :, -1], values[:, :, -1]) for keys, values in grown]

    @classmethod
    def from_pretrained(cls, name_or_path, dtype=torch.float32, **overrides):
        """InternVL, OpenGVLab's layout or the -hf one, or a plain Qwen2, Qwen3 or Llama, of a hub
        id or a folder: safetensors, whole or sharded. dtype: of the weights, 'auto' for that of the
        files; overrides: fields of Config. Memory peaks near the size of the weights."""
        folder = fetch(name_or_path)
        old, tokenizer = len(load_tokenizer(folder, add=())), load_tokenizer(folder)
        weights = read_weights(folder, dtype, old, len(tokenizer))
        config = read_config(folder, tokenizer, len(weights[EMBEDDING]), overrides)
        if config.tie_word_embeddings:  # but where the file has another head, that is used
            head = weights.setdefault(HEAD, weights[EMBEDDING])
            config.tie_word_embeddings = torch.equal(head, weights[EMBEDDING])
        return cls.of_weights(config, weights)

    @classmethod
    def of_weights(cls, config, weights):
        """A model of these weights (name -> tensor), not copied. Modules that a subclass adds may
        be missing among them, and keep their initial values."""
        model = cls(config, device='meta')
        dtype = weights[EMBEDDING].dtype
        added = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()
                 if not tensor.is_meta and name not in weights}
        if added:
            print(f'not in the files, as initialised: {", ".join(added)}')
        model.load_state_dict({**weights, **added}, assign=True)
        model.tie()  # assigned, embedding and head are two parameters over one memory
        return model.eval()


def sample(logits, temperature, top_p):
    """float32 [B, V] to int64 [B]: the likeliest token, or with a temperature one of the top_p."""
    if temperature < 1e-6:  # so near 0 the division would overflow
        return logits.argmax(-1)
    p, token = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0  # likelier tokens have top_p already
    return token.gather(-1, torch.multinomial(p, 1))[:, 0]


# --- files: InternVL's, and those of plain text decoders ------------------------------------------
EMBEDDING, HEAD = 'language_model.model.embed_tokens.weight', 'language_model.lm_head.weight'
# what stands in a file's names -> in ours, in this order; ^ and $ are a name's ends
NAMES = {
    # beginnings: transformers' own in memory, -hf files', plain decoders'; OpenGVLab's are ours
    '^model.language_model.': '^language_model.model.', '^model.vision_tower.': '^vision_model.',
    '^model.multi_modal_projector.': '^mlp1.', '^vision_tower.': '^vision_model.',
    '^multi_modal_projector.': '^mlp1.', '^model.': '^language_model.model.',
    '^lm_head.': '^language_model.lm_head.',
    # projector and vision tower in -hf files
    '^mlp1.layer_norm.': '^mlp1.0.', '^mlp1.linear_1.': '^mlp1.1.', '^mlp1.linear_2.': '^mlp1.3.',
    'embeddings.cls_token': 'cls_token', 'embeddings.position_embeddings': 'pos_embed',
    'embeddings.patch_embeddings.projection.': 'patch_embed.proj.', 'encoder.layer.': 'blocks.',
    'layernorm_before': 'norm1', 'layernorm_after': 'norm2', '.lambda_1$': '.ls1.gamma$',
    '.lambda_2$': '.ls2.gamma$', 'attention.projection_layer': 'attn.proj',
    'attention.q_proj': 'attn.q', 'attention.k_proj': 'attn.k', 'attention.v_proj': 'attn.v',
    # vision tower in OpenGVLab's files
    'embeddings.class_embedding': 'cls_token', 'embeddings.position_embedding': 'pos_embed',
    'embeddings.patch_embedding.': 'patch_embed.proj.', 'encoder.layers.': 'blocks.',
    '.ls1$': '.ls1.gamma$', '.ls2$': '.ls2.gamma$'}


def our_name(name):
    name = f'^{name}$'
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name.strip('^$')


def fetch(name_or_path):
    """A local folder as it is; a hub id's files from the hub or its cache."""
    if os.path.isdir(name_or_path):
        return name_or_path
    return snapshot_download(name_or_path, allow_patterns=['*.json', '*.safe*', '*.txt', '*.jinja'])


def load_tokenizer(name_or_path, add=SPECIAL_TOKENS):
    """The tokenizer of a folder or hub id in which each of SPECIAL_TOKENS is one token, added where
    it is not there. Its class goes by the files: the Auto ones may ask to run the folder's code."""
    folder, kind = fetch(name_or_path), transformers.PreTrainedTokenizerFast
    if 'tokenizer.json' not in os.listdir(folder):
        assert 'vocab.json' in os.listdir(folder), f'{folder} holds no tokenizer'
        kind = transformers.Qwen2TokenizerFast
    tokenizer = kind.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in add],
                         special_tokens=True)
    return tokenizer


def read_weights(folder, dtype, old, new):
    """Our name -> tensor. In embedding and head the rows of new tokens, from `old` to `new`, are
    the mean of those before, whether the file has such rows or not; rows behind them stay."""
    path, weights = Path(folder, 'model.safetensors'), {}
    paths = [path] if path.exists() else sorted(Path(folder).glob('model-*-of-*.safetensors'))
    for path in paths:
        with safe_open(path, 'pt') as f:
            names = list(f.keys())
        for name in names:
            with safe_open(path, 'pt') as f:  # anew for each: closing frees what was read
                tensor = f.get_tensor(name)
                if our_name(name) in (EMBEDDING, HEAD):
                    mean = tensor[:old].float().mean(0).to(tensor.dtype)
                    tensor = torch.cat((tensor, mean.expand(max(0, new - len(tensor)), -1)))
                    tensor[old:new] = mean
                tensor = tensor.to(tensor.dtype if dtype == 'auto' else dtype, copy=True)
            assert our_name(name) not in weights, f'{our_name(name)} is there twice, also as {name}'
            weights[our_name(name)] = tensor
    for name in [name for name in weights if '.attn.q.' in name]:  # -hf files have them apart
        parts = [weights.pop(name.replace('.q.', f'.{part}.')) for part in 'qkv']
        weights[name.replace('.q.', '.qkv.')] = torch.cat(parts)
    return weights


# --- config.json ----------------------------------------------------------------------------------
BIAS_AND_QK_NORM = dict(qwen2=(True, False), qwen3=(False, True), llama=(False, False))
# what is read of transformers' configs: Config's names are the same, and of vision these
TEXT = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers',
        'num_attention_heads', 'num_key_value_heads', 'rms_norm_eps', 'max_position_embeddings')
VISION = dict(hidden_size='vision_hidden_size', intermediate_size='vision_intermediate_size',
              num_hidden_layers='vision_num_layers', num_attention_heads='vision_num_heads',
              layer_norm_eps='vision_layer_norm_eps')
MUST_BE_ABSENT = {'is_causal', 'partial_rotary_factor', 'quantization_config'}
ANY_VALUE = {  # keys that change nothing at inference, or are read elsewhere
    'initializer_range', 'layer_scale_init_value', 'attention_dropout', 'hidden_dropout_prob',
    'projection_dropout', 'use_cache', 'pretraining_tp', 'use_mask_token', 'max_window_layers',
    'head_dim', 'tie_word_embeddings', 'image_token_id', 'image_seq_length', 'bos_token_id',
    'eos_token_id', 'pad_token_id', 'text_config', 'vision_config',
    *transformers.PretrainedConfig().to_dict()}


def refuse_others(theirs, **read):
    """Raises ValueError unless each key of `theirs`, a transformers config, has its class's
    default, which is what is computed here, or is in `read`, what is supported, or in ANY_VALUE."""
    theirs, ours = theirs.to_dict(), type(theirs)(**read).to_dict()
    for key in (ours.keys() - ANY_VALUE) | MUST_BE_ABSENT:
        if theirs.get(key) != ours.get(key):
            raise ValueError(f'not supported: {theirs["model_type"]} with {key} '
                             f'{theirs.get(key)!r}, here it is {ours.get(key)!r}')


def read_config(folder, tokenizer, vocab_size, overrides):
    """config.json as a Config, by way of transformers' own config classes."""
    raw = json.loads(Path(folder, 'config.json').read_text('utf-8'))
    if 'llm_config' in raw and 'text_config' not in raw:
        raw = from_opengvlab(raw)
    # transformers 5's rope_parameters (rope_theta, rope_type, ...) become 4's rope_theta and
    # rope_scaling, which both read. InternVL3's 'dynamic' scaling is the same as none up to
    # max_position_embeddings, where `lay_out` stops
    raw_text = raw.get('text_config', raw)
    rope = {**raw_text.pop('rope_parameters', {}), **(raw_text.get('rope_scaling') or {})}
    raw_text['rope_theta'] = rope.pop('rope_theta', None) or raw_text.get('rope_theta', 1e4)
    kind = rope.get('rope_type', rope.get('type', 'default'))
    plain = kind in ('default', 'dynamic') and rope.keys() <= {'rope_type', 'type', 'factor'}
    raw_text['rope_scaling'] = None if plain else rope
    theirs = transformers.AutoConfig.for_model(**raw)
    text, vision = getattr(theirs, 'text_config', theirs), getattr(theirs, 'vision_config', None)
    theta = (getattr(text, 'rope_parameters', None) or vars(text))['rope_theta']
    found = {key: getattr(text, key) for key in TEXT}
    refuse_others(text, rope_theta=theta, rope_scaling=None, **found)
    found['vision_num_layers'] = 0
    if vision:
        side, patch = vision.image_size[0], vision.patch_size[0]
        of_vision = {key: getattr(vision, key) for key in VISION}
        refuse_others(vision, attention_bias=True, image_size=[side] * 2, patch_size=[patch] * 2,
                      **of_vision)
        refuse_others(theirs, downsample_ratio=theirs.downsample_ratio)
        found.update({VISION[key]: value for key, value in of_vision.items()}, image_size=side,
                     patch_size=patch, downsample_ratio=theirs.downsample_ratio)
    bias, qk_norm = BIAS_AND_QK_NORM[text.model_type]
    ids = tokenizer.get_vocab()
    # a text ends with any of these, as in transformers
    ends = [ids.get(token) for token in (tokenizer.eos_token, '<|im_end|>', '<|endoftext|>')]
    more = Path(folder, 'generation_config.json')
    more = json.loads(more.read_text()) if more.exists() else {}
    for end in (raw_text.get('eos_token_id'), more.get('eos_token_id')):
        ends += end if isinstance(end, list) else [end]
    ends = tuple(dict.fromkeys(end for end in ends if end is not None))
    found.update(
        vocab_size=vocab_size, rope_theta=theta, attention_bias=bias, qk_norm=qk_norm,
        head_dim=getattr(text, 'head_dim', None) or text.hidden_size // text.num_attention_heads,
        tie_word_embeddings=theirs.tie_word_embeddings, image_token_id=ids[IMG_CONTEXT],
        latent_token_id=ids[LATENT], eos_token_ids=ends,
        pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    return Config(**{**found, **overrides})


def from_opengvlab(raw):
    """OpenGVLab's config.json as that of the -hf layout, with OpenGVLab's defaults."""
    assert raw.get('ps_version') == 'v2', f'ps_version {raw.get("ps_version")}: only v2 is computed'
    llm = {'model_type': 'qwen2', **raw['llm_config']}
    vision = {'qkv_bias': False, 'qk_normalization': True, 'norm_type': 'rms_norm',
              **raw['vision_config'], 'model_type': 'internvl_vision'}
    side = raw.get('force_image_size') or vision['image_size']
    vision.update(attention_bias=vision['qkv_bias'], use_qk_norm=vision['qk_normalization'],
                  image_size=[side] * 2, patch_size=[vision['patch_size']] * 2)
    return dict(
        model_type='internvl', text_config=llm, vision_config=vision,
        downsample_ratio=raw['downsample_ratio'], vision_feature_layer=raw['select_layer'],
        tie_word_embeddings=raw.get('tie_word_embeddings', llm.get('tie_word_embeddings', False)))


def load_checkpoint(path, dtype=torch.float32, kind=MultiCoCo, **overrides):
    """(model in evaluation mode, tokenizer, dict) of a .pt of train.py, always in float32, or of a
    folder or hub id; dict: the rest of the .pt, or what experiments/export.py noted. kind:
    MultiCoCo or a subclass; overrides: see `from_pretrained`."""
    if not path.endswith('.pt'):
        folder = fetch(path)
        noted = json.loads(Path(folder, 'config.json').read_text('utf-8')).get('multicoco', {})
        thought = overrides.pop('thought', noted.get('thought', 'hidden'))
        model = kind.from_pretrained(folder, dtype, thought=thought, **overrides)
        return model, load_tokenizer(folder), noted
    saved = torch.load(path, map_location='cpu', weights_only=True)
    model = kind.of_weights(Config(**{**saved['config'], **overrides}), saved.pop('model'))
    tokens = Tokenizer.from_str(saved['tokenizer'])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token=tokens.id_to_token(model.config.eos_token_ids[0]),
        pad_token=tokens.id_to_token(model.config.pad_token_id),
        chat_template=saved.get('chat_template'))
    return model, tokenizer, saved
