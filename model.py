"""
MultiCoCo's model: InternVL3 that reasons in continuous thoughts. One image, one question, one forward:

    uint8 tiles -> InternViT (timm) -> pixel shuffle -> projector \\
                                                                   fuse -> chunk 0 -> thought 1 -> chunk 1 -> ... answer
    token ids   -> embedding ------------------------------------ /

Sources: Coconut (arXiv 2412.06769), InternVL3 (arXiv 2504.10479), Qwen2 (arXiv 2407.10671).
Notation: B rows, T tokens a row, D width, H heads, K key/value heads, P tiles, N visual tokens a tile, V vocabulary,
n thoughts, S slots (see `lay_out`). State-dict names are OpenGVLab's, and timm's inside the vision tower.

Where we leave the sources, and why:
- Coconut pads the batch until all thoughts stand in one column; we cut each row at its own thoughts instead, so any
  number of thoughts may stand anywhere, and one thought costs one token's pass for the whole batch.
- The image is encoded once. It stays in the keys and values, so nothing is fused again when a thought is fed back.
- Thoughts are never detached: the gradient of the answer reaches thought 1.
- A count of <IMG_CONTEXT> that does not fit the tiles is an error; OpenGVLab truncates the features and zeroes the
  loss.
- RoPE is plain: InternVL3's 'dynamic' scaling equals it up to max_position_embeddings; longer inputs are refused.
"""
import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Optional

import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from checkpoint import IMG_CONTEXT, LATENT
from checkpoint import load_tokenizer, load_weights, read_checkpoint, read_pretrained, tokenizer_from

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as InternVL was trained
PADDING = 2**30  # the position of padding: greater than any query's, so that no query sees it as a key


# --- decoder: Qwen2 (q/k/v with bias) or Qwen3 (RMS norm on each head's queries and keys) -----------------------------

def rotary(position, head_dim, theta):
    """RoPE's cos and sin, float32 [B, 1, T, head_dim], of positions [B, T]; sin is negative in the first half."""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim)
    angle = position[:, None, :, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """(a, b) to (a cos - b sin, b cos + a sin) over the two halves of the last dimension."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, -1), sin.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, self.qk_norm = c.head_dim, c.qk_norm
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, cos, sin, mask, extend):
        q, k, v = (rearrange(proj(x), 'b t (h d) -> b h t d', d=self.head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)  # under autocast the norms give float32
        keys, values = extend(k, v)  # [B, K, all so far, head_dim]
        if mask is None:
            y = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
        else:  # the G query heads of a key head as G queries: fused kernels take a mask or grouped queries, not both
            G = q.shape[1] // k.shape[1]
            q = rearrange(q, 'b (k g) t d -> b k (g t) d', g=G)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask.repeat(1, 1, G, 1))
            y = rearrange(y, 'b k (g t) d -> b (k g) t d', g=G)
        return self.o_proj(rearrange(y, 'b h t d -> b t (h d)')), k, v


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

    def forward(self, x, cos, sin, mask, extend, filled=None):
        """
        x [B, L, D]; extend: this pass's keys and values -> all so far; filled: see `decode`. Gives x and this pass's
        keys and values.
        """
        y, k, v = self.self_attn(self.input_layernorm(x), cos, sin, mask, extend)
        x = x + y
        h = self.post_attention_layernorm(x)
        if filled is None:
            return x + self.mlp(h), k, v
        y = self.mlp(h.flatten(0, 1)[filled]).to(x.dtype)                            # [M, D], padding left out
        return x.flatten(0, 1).index_add(0, filled, y).view_as(x), k, v


class GrowingCache:
    """Keys and values by concatenation: every tensor stays as autograd saved it, so the loop can be differentiated."""

    def __init__(self, num_layers):
        self.past = [((), ()) for _ in range(num_layers)]

    def extend(self, layer):
        return partial(self.concatenate, *self.past[layer])  # bound now: a recomputation must see the same past

    @staticmethod
    def concatenate(past_k, past_v, k, v):
        return torch.cat((*past_k, k), 2), torch.cat((*past_v, v), 2)

    def append(self, layer, k, v):
        past_k, past_v = self.past[layer]
        self.past[layer] = (*past_k, k), (*past_v, v)


class StaticCache:
    """What a GrowingCache holds, with room for `more` slots that are written in place: decoding without gradients."""

    def __init__(self, grown, more):
        padded = lambda parts: F.pad(torch.cat(parts, 2), (0, 0, 0, more))
        self.kv = [[padded(parts) for parts in layer] for layer in grown.past]  # views of one tensor compile to copies
        slots, device = self.kv[0][0].shape[-2], self.kv[0][0].device
        self.at = torch.tensor([slots - more], device=device)                   # the slot that the next pass writes

    def extend(self, layer):
        return partial(self.write, *self.kv[layer])

    def write(self, keys, values, k, v):
        return keys.index_copy_(2, self.at, k), values.index_copy_(2, self.at, v)

    def append(self, layer, k, v):
        pass  # write did it

    def keep(self, rows):
        self.kv = [[part[rows] for part in layer] for layer in self.kv]


# --- where a token stands: the only bookkeeping of the latent loop ----------------------------------------------------

class Layout(NamedTuple):
    slot: torch.Tensor      # int64 [B, T]: the slot of each token (0 for padding)
    ids: torch.Tensor       # int64 [B, S]: token ids in slots
    position: torch.Tensor  # int64 [B, S]: the token's position in its row, PADDING where a slot is empty
    length: torch.Tensor    # int64 [B, n + 1]: tokens of each row in each chunk, 0 where the row has no such thought
    widths: list            # n + 1 ints: slots of each chunk, that is its longest row
    filled: list            # n + 1: which of a chunk's B * width slots hold tokens, int64 [M]; None where nearly all do
    image: torch.Tensor     # int64 [M]: which of the B * S slots hold <IMG_CONTEXT>, in row order
    targets: tuple          # three int64 [M]: row and slot before each supervised token, and the token
    visual: list            # B ints: <IMG_CONTEXT> tokens of each row


def lay_out(input_ids, attention_mask, config, labels=None, device=None):
    """
    Cuts every row at its own thoughts and gives each token a slot, chunk behind chunk, so that chunk k of all rows is
    one range of columns. Chunk 0 is a row up to its first thought, chunk k runs from thought k to just before thought
    k + 1:

        row 0:  p p p p p p | t1 | t2 a a a            p prompt or visual token
        row 1:  p p p       | t1 | t2 | t3 a a         t thought    a answer token
        chunk:  0             1    2    3
        slots:  0 1 2 3 4 5   6    7 8 9 10  11 12 13  (row 1: 6 7 8 are empty behind its p's 0 1 2 ...)

    Done on the host, where the lengths are needed anyway: all that depends on values is asked here, once. Inputs that
    are still on the host spare the wait for the device.
    """
    there = lambda x: x.to(device or input_ids.device, non_blocking=True)
    ids = input_ids.cpu()
    B, T = ids.shape
    real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    check_rows(ids, real, config)
    latent = (ids == config.latent_token_id) & real
    chunk = latent.cumsum(1)                                                                  # [B, T]
    length = torch.zeros(B, int(chunk.max()) + 1, dtype=torch.long).scatter_add_(1, chunk, real.long())
    start, widths = length.cumsum(1) - length, length.max(0).values                           # [B, n + 1], [n + 1]
    position = torch.arange(T).expand(B, T)
    slot = (widths.cumsum(0) - widths)[chunk] + position - start.gather(1, chunk)
    S = int(widths.sum())
    into = torch.where(real, slot, S)                                    # padding goes to column S, which is cut off
    slot = torch.where(real, slot, 0)
    table = lambda fill, x: torch.full((B, S + 1), fill).scatter_(1, into, x)[:, :S]
    tokens = table(config.pad_token_id, ids)
    targets = ()
    if labels is not None:
        labels = labels.cpu()
        row, before = (labels[:, 1:] != -100).nonzero(as_tuple=True)     # the token at `before` predicts the next one
        targets = row, slot[row, before], labels[row, before + 1]
    holds = [torch.arange(w) < length[:, k, None] for k, w in enumerate(widths.tolist())]     # n + 1 times [B, width]
    filled = [None if h.float().mean() > 0.9 else there(h.flatten().nonzero()[:, 0])  # a gather costs something too
              for h in holds]
    image = tokens == config.image_token_id                                                   # [B, S]
    return Layout(there(slot), there(tokens), there(table(PADDING, position)), there(length), widths.tolist(), filled,
                  there(image.flatten().nonzero()[:, 0]), tuple(map(there, targets)), image.sum(1).tolist())


def check_rows(ids, real, config):
    """Raises ValueError for rows that cannot be laid out."""
    if real.shape != ids.shape:
        raise ValueError(f'attention_mask is {list(real.shape)} where input_ids is {list(ids.shape)}: they must agree')
    for b in ((real[:, 1:] > real[:, :-1]).any(1) | ~real[:, 0]).nonzero():
        raise ValueError(f'row {b.item()} of attention_mask is not 1s followed by 0s: pad on the right')
    for b in (ids[:, 0] == config.latent_token_id).nonzero():
        raise ValueError(f'row {b.item()} starts with {LATENT}: a thought needs a token before it')
    longest = int(real.sum(1).max())
    if longest > config.max_position_embeddings:
        raise ValueError(f'a row has {longest} tokens, the model takes {config.max_position_embeddings} at most: '
                         'shorten it')


# --- the whole model --------------------------------------------------------------------------------------------------

@dataclass
class Config:
    # language model: Qwen2.5-0.5B
    vocab_size: int = 151677              # rows of embedding and head: InternVL3's 151674 and the three latent tokens
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    head_dim: int = 64
    attention_bias: bool = True           # on q, k, v: Qwen2 True, Qwen3 False
    qk_norm: bool = False                 # RMS norm on each head's q and k: Qwen3
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    # vision tower: InternViT-300M
    vision_hidden_size: int = 1024
    vision_intermediate_size: int = 4096
    vision_num_layers: int = 24
    vision_num_heads: int = 16
    vision_layer_norm_eps: float = 1e-6
    patch_size: int = 14
    image_size: int = 448                 # side of a tile in pixels
    downsample_ratio: float = 0.5         # pixel shuffle: 1024 patches -> 256 visual tokens a tile
    ps_version: str = 'v2'
    # token ids
    image_token_id: int = 151667          # <IMG_CONTEXT>
    latent_token_id: int = 151675         # <|latent|>
    eos_token_ids: tuple = (151645, 151643)
    pad_token_id: int = 151643

    @property
    def num_image_tokens(self):
        """N, visual tokens a tile."""
        return int(self.image_size // self.patch_size * self.downsample_ratio) ** 2


class LanguageModel(nn.Module):
    """Only what the state dict needs: the passes through it are MultiCoCo's `decode`."""

    def __init__(self, c):
        super().__init__()
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(c.vocab_size, c.hidden_size),
            layers=nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers)),
            norm=nn.RMSNorm(c.hidden_size, c.rms_norm_eps)))
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


class Output(NamedTuple):
    loss: Optional[torch.Tensor]    # float32 scalar, mean over supervised tokens; None without labels
    logits: Optional[torch.Tensor]  # [B, T, V]; None with labels
    thoughts: torch.Tensor          # [B, n, D], the vectors fed back, 0 where a row has fewer than n


class MultiCoCo(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.activation_checkpointing = False
        self.checkpoint = {}  # what else the .pt held that the weights came from
        self.hits = None      # for the log: supervised tokens of the latest labelled batch that it would have written
        self.vision_model = timm.models.VisionTransformer(
            img_size=c.image_size, patch_size=c.patch_size, embed_dim=c.vision_hidden_size, depth=c.vision_num_layers,
            num_heads=c.vision_num_heads, mlp_ratio=c.vision_intermediate_size / c.vision_hidden_size, init_values=1.0,
            norm_layer=partial(nn.LayerNorm, eps=c.vision_layer_norm_eps), final_norm=False, num_classes=0,
            weight_init='skip')
        shuffled = int(c.vision_hidden_size / c.downsample_ratio ** 2)
        self.mlp1 = nn.Sequential(nn.LayerNorm(shuffled), nn.Linear(shuffled, c.hidden_size), nn.GELU(),
                                  nn.Linear(c.hidden_size, c.hidden_size))
        self.language_model = LanguageModel(c)
        self.init_weights()

    @classmethod
    def from_pretrained(cls, name_or_path, dtype=torch.float32):
        """
        InternVL from a hub id or a local folder: OpenGVLab's layout or the -hf one, one file or sharded, safetensors
        only. The rows of tokens that `load_tokenizer` adds are the mean of the rows that were there. Raises OSError
        or ValueError in one sentence.
        """
        fields, weights, found = read_pretrained(name_or_path, dtype)
        with torch.device('meta'):
            model = cls(Config(**fields))
        load_weights(model, weights, name_or_path, assign=True)
        if model.config.tie_word_embeddings:  # what was tied on the meta device is not after assigning
            model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
        print(f'{name_or_path}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters from {found}')
        return model.eval()

    @torch.no_grad()
    def init_weights(self):
        """For training from scratch: logits start near scale 1 and a thought has the scale of a token embedding."""
        c = self.config
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                std = module.weight[0].numel() ** -0.5
                if name.endswith(('o_proj', 'down_proj')):      # the ends of the residual branches
                    std /= math.sqrt(2 * c.num_hidden_layers)
                elif name.endswith(('attn.proj', 'fc2')):
                    std /= math.sqrt(2 * c.vision_num_layers)
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        lm, vision = self.language_model.model, self.vision_model
        for table in (lm.embed_tokens.weight, vision.cls_token, vision.pos_embed):
            nn.init.normal_(table, std=0.35)
        lm.norm.weight.fill_(0.35)

    def set_activation_checkpointing(self, on=True):
        """Recompute activations in the backward pass: nothing changes but memory and time."""
        self.activation_checkpointing = on
        self.vision_model.set_grad_checkpointing(on)

    def embed_image(self, pixel_values):
        """Tiles [P, 3, S, S] on any device, uint8 or normalised float, to visual tokens [P, N, D]."""
        c, side, weight = self.config, self.config.image_size, self.vision_model.pos_embed
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(f'tiles are {list(pixel_values.shape[1:])}, this model takes [3, {side}, {side}]: '
                             f'prepare them with image_size={side}')
        pixel_values = pixel_values.to(weight.device, non_blocking=True)
        if pixel_values.dtype == torch.uint8:
            mean, std = (torch.tensor(v)[:, None, None].to(weight.device, non_blocking=True)
                         for v in (IMAGE_MEAN, IMAGE_STD))
            pixel_values = pixel_values.float().div_(255).sub_(mean).div_(std)
        x = self.vision_model.forward_features(pixel_values.to(weight.dtype))              # [P, 1 + h*p*w*q, C]
        p = round(1 / c.downsample_ratio)
        shuffled = 'b (h w) (p q c)' if c.ps_version == 'v2' else 'b (w h) (p q c)'
        x = rearrange(x[:, 1:], f'b (h p w q) c -> {shuffled}', h=side // c.patch_size // p, p=p, q=p)  # [P, N, C*p*q]
        return self.mlp1(x)

    def embed_text(self, ids):
        return self.language_model.model.embed_tokens(ids)

    def as_pause(self, k, thought):
        """An `edit_thought`: the learned embedding of <|latent|> instead of a thought, so that nothing is fed back."""
        ids = torch.full(thought.shape[:1], self.config.latent_token_id, device=thought.device)
        return self.embed_text(ids).to(thought.dtype)

    def fuse(self, layout, pixel_values=None, num_tiles=None, image_flags=None):
        """Tokens in slots to embeddings [B, S, D]: visual tokens stand where <IMG_CONTEXT> did, in row order."""
        x, counts, N = self.embed_text(layout.ids), layout.visual, self.config.num_image_tokens
        P = 0 if pixel_values is None else len(pixel_values)
        if image_flags is not None and P:
            keep = image_flags.flatten().to(pixel_values.device).bool()
            if len(keep) != P:
                raise ValueError(f'image_flags has {len(keep)} entries for {P} tiles: give one a tile')
            if num_tiles is not None and int(num_tiles.sum()) == P:  # counted before the flagged tiles are dropped
                num_tiles = torch.stack([part.sum() for part in keep.split(num_tiles.tolist())])
            pixel_values, P = pixel_values[keep], int(keep.sum())
        tiles = [count // N for count in counts] if num_tiles is None else num_tiles.tolist()
        for b, (count, have) in enumerate(zip(counts, tiles)):
            if count != have * N:
                raise ValueError(f'row {b} holds {count} {IMG_CONTEXT} tokens, but its {have} tiles give {have * N} '
                                 f'visual tokens ({N} a tile): encode text and tiles together')
        if sum(tiles) != P:
            b = next((b for b in range(len(tiles)) if sum(tiles[:b + 1]) > P), len(tiles) - 1)
            raise ValueError(f'row {b} ends {sum(tiles[:b + 1])} tiles into the batch by its {counts[b]} {IMG_CONTEXT} '
                             f'tokens, but pixel_values holds {P} tiles: encode text and tiles together')
        if P:
            visual = self.embed_image(pixel_values).flatten(0, 1).to(x.dtype)                # [P * N, D]
            x = x.flatten(0, 1).index_copy(0, layout.image, visual).view_as(x)
        return x

    def decode(self, x, position, mask, cache, filled=None):
        """
        One pass through the decoder: x [B, L, D] at position [B, L] to hidden states after the final norm [B, L, D].
        filled: the slots of B * L that hold tokens, where many do not; the others skip the MLP, most of the work.
        """
        cos, sin = rotary(position, self.config.head_dim, self.config.rope_theta)
        for i, layer in enumerate(self.language_model.model.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, k, v = recompute(layer, x, cos, sin, mask, cache.extend(i), filled,
                                    use_reentrant=False, preserve_rng_state=False)
            else:
                x, k, v = layer(x, cos, sin, mask, cache.extend(i), filled)
            cache.append(i, k, v)
        return self.language_model.model.norm(x)

    def think(self, x, layout, cache, edit_thought=None):
        """
        The latent loop over fused embeddings x [B, S, D]: n + 1 passes, one a chunk (see `lay_out`). The embedding of
        thought k is the row's hidden state just before it. A query sees the keys whose position is not greater than its
        own. Gives hidden states [B, S, D] and thoughts [B, n, D].
        """
        rows = torch.arange(len(x), device=x.device)
        hidden, thoughts, start = [], [], 0
        for k, width in enumerate(layout.widths):
            stop = start + width
            position, h, mask = layout.position[:, start:stop], x[:, start:stop], None
            if k:  # chunk 0 needs no mask: with padding on the right, causal is enough
                before = layout.length[:, k - 1].clamp(min=1) - 1  # 0 where the row has no thought k: zeroed below
                thought = hidden[-1][rows, before]                                           # [B, D]
                if edit_thought is not None:
                    thought = edit_thought(k, thought)
                thought = torch.where(layout.length[:, k, None] > 0, thought, 0).to(x.dtype)
                thoughts.append(thought)
                h = torch.cat((thought[:, None], h[:, 1:]), 1)
                mask = layout.position[:, None, None, :stop] <= position[:, None, :, None]   # [B, 1, L, stop]
            hidden.append(self.decode(h, position, mask, cache, layout.filled[k]))
            start = stop
        return torch.cat(hidden, 1), torch.stack(thoughts, 1) if thoughts else x[:, :0]

    def forward(self, input_ids, pixel_values=None, attention_mask=None, labels=None, num_tiles=None, image_flags=None,
                edit_thought=None):
        """
        input_ids       int64 [B, T], right-padded; a <|latent|> anywhere but first is a thought. Best left on the host,
                        as are all others: what is needed on the device goes there
        pixel_values    uint8 or normalised float [P, 3, S, S]: the tiles of all rows in row order; None without images
        attention_mask  [B, T], 1 for a token; None for no padding
        labels          int64 [B, T], -100 where unsupervised; only supervised positions go through the head
        num_tiles       int64 [B], tiles of each row, for the check per row
        image_flags     [P], tiles flagged 0 are dropped before the ViT
        edit_thought    (k, thought [B, D]) -> [B, D], called before thought k = 1, 2, ... n is fed back
        Gives an Output. Raises ValueError where the batch does not hold together.
        """
        layout = lay_out(input_ids, attention_mask, self.config, labels, self.language_model.lm_head.weight.device)
        x = self.fuse(layout, pixel_values, num_tiles, image_flags)
        hidden, thoughts = self.think(x, layout, GrowingCache(self.config.num_hidden_layers), edit_thought)
        if labels is None:
            rows = torch.arange(len(x), device=x.device)[:, None]
            return Output(None, self.language_model.lm_head(hidden[rows, layout.slot]), thoughts)
        row, slot, target = layout.targets
        if not len(row):
            raise ValueError('labels supervise no token of this batch: every row needs a target behind its prompt')
        logits = self.language_model.lm_head(hidden[row, slot])
        self.hits = (logits.detach().argmax(-1) == target).sum()
        return Output(F.cross_entropy(logits.float(), target), None, thoughts)

    @torch.no_grad()
    def generate(self, input_ids, pixel_values=None, attention_mask=None, max_new_tokens=64, temperature=0.0, top_p=1.0,
                 num_tiles=None, image_flags=None, edit_thought=None, generator=None):
        """
        New tokens int64 [B, <= max_new_tokens], each row up to and with its end token, then padding. Greedy at
        temperature 0. Thoughts of the prompt run through the same loop as in training. A <|latent|> that the model
        writes itself is fed the last hidden state too (edit_thought then gets k = n + its place among the new tokens,
        from 1).
        """
        if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
            raise ValueError(f'temperature={temperature}, top_p={top_p}, max_new_tokens={max_new_tokens}: '
                             'expected temperature >= 0, 0 < top_p <= 1 and max_new_tokens >= 1')
        c, head = self.config, self.language_model.lm_head.weight
        layout = lay_out(input_ids, attention_mask, c, None, head.device)
        length, (B, S) = layout.length.sum(1), layout.ids.shape
        if int(length.max()) + max_new_tokens > c.max_position_embeddings:
            raise ValueError(f'{int(length.max())} prompt tokens and {max_new_tokens} new ones exceed the model\'s '
                             f'{c.max_position_embeddings}: lower max_new_tokens or shorten the prompt')
        x = self.fuse(layout, pixel_values, num_tiles, image_flags)
        cache = GrowingCache(c.num_hidden_layers)
        hidden, thoughts = self.think(x, layout, cache, edit_thought)
        cache = StaticCache(cache, max_new_tokens)
        rows, eos = torch.arange(B, device=x.device), torch.tensor(c.eos_token_ids, device=x.device)
        last = hidden[rows, layout.slot[rows, length - 1]]                                   # [B, D]
        here = length                                                                        # [B]: the next position
        key_position = F.pad(layout.position, (0, max_new_tokens), value=PADDING)            # [B, S + max_new_tokens]
        new = torch.full((B, max_new_tokens), c.pad_token_id, device=x.device)
        wrote, done = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
        compiled = 'step' in self.__dict__  # it was replaced, see `step`
        for part in sum(cache.kv, []) if compiled else ():
            torch._dynamo.mark_static_address(part, guard=False)  # a CUDA graph may write to it
        for i in range(max_new_tokens):
            logits = (head @ last.T).T  # for few rows faster on CPUs than the other way round
            token = torch.where(done, c.pad_token_id, sample(logits.float(), temperature, top_p, generator))
            new[rows, i] = token
            wrote[rows] += ~done
            done = done | torch.isin(token, eos)
            if i + 1 == max_new_tokens:
                break
            if i % 4 == 3:  # not in each step, since to ask is to wait for the device
                running = (~done).nonzero()[:, 0]
                if not len(running):
                    break
                if 2 * len(running) <= len(done) and edit_thought is None and not compiled:
                    rows, token, last, here, key_position, done = (
                        t[running] for t in (rows, token, last, here, key_position, done))
                    cache.keep(running)  # rows that ended cost nothing from here on
            thought = last if edit_thought is None else edit_thought(thoughts.shape[1] + i + 1, last)
            x = torch.where((token == c.latent_token_id)[:, None], thought.to(x.dtype), self.embed_text(token))
            key_position[:, S + i] = here
            last = self.step(x, here, (key_position <= here[:, None])[:, None, None], cache)
            here, cache.at = here + 1, cache.at + 1
        return new[:, :int(wrote.max())]

    def step(self, x, here, mask, cache):
        """
        One token a row, x [B, D] at position here [B] to its hidden state [B, D]. Shapes stay the same from token to
        token: `model.step = torch.compile(model.step, dynamic=False)` makes generate use it compiled.
        """
        return self.decode(x[:, None], here[:, None], mask, cache)[:, 0]


def pick_device(device):
    """'auto' is the GPU where there is one; 'mps', Apple's, has to be asked for, since it was never tried."""
    if device not in ('auto', 'cpu', 'cuda', 'mps'):
        raise ValueError(f'device={device!r}: expected auto, cpu, cuda or mps; CUDA_VISIBLE_DEVICES chooses a GPU')
    if device == 'cuda' and not torch.cuda.is_available():
        raise ValueError('device=cuda, but torch sees no GPU here: use --device=cpu, or install a torch with CUDA')
    if device == 'mps':
        if not torch.backends.mps.is_available():
            raise ValueError('device=mps, but torch sees no such GPU here: use --device=cpu')
        print('device=mps: this code was never run on one; compare a short run with --device=cpu first')
    return ('cuda' if torch.cuda.is_available() else 'cpu') if device == 'auto' else device


def peak_memory(device):
    """The most bytes that this process has held: on the GPU, or all of its memory; 0 where it cannot be told."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    unit = 1 if sys.platform == 'darwin' else 1024  # macOS counts bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def pick_dtype(dtype, device):
    """'auto' is bfloat16 on a GPU that computes in it, float32 elsewhere."""
    if dtype == 'float16':
        raise ValueError('dtype=float16: its range is too small for the gradients without a loss scaler, and for some '
                         "of InternVL's activations; use float32, or bfloat16 on a GPU that has it")
    if dtype not in ('auto', 'float32', 'bfloat16'):
        raise ValueError(f'dtype={dtype!r}: expected auto, float32 or bfloat16')
    if dtype == 'auto':
        native = device == 'cuda' and torch.cuda.get_device_capability()[0] >= 8  # not on V100 or T4
        return 'bfloat16' if native else 'float32'
    return dtype


def sample(logits, temperature, top_p, generator=None):
    """float32 [B, V] to int64 [B]: the likeliest token at temperature 0, else one drawn from the top_p mass."""
    if temperature == 0:
        return logits.argmax(-1)
    p, token = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    return token.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


def load_checkpoint(path):
    """
    Model (float32, evaluation mode) and tokenizer: from a .pt of train.py, whose other entries are then at
    `model.checkpoint`, or from a checkpoint folder or hub id, where `model.checkpoint` is {}.
    """
    if not path.endswith('.pt'):
        return MultiCoCo.from_pretrained(path), load_tokenizer(path)
    saved = read_checkpoint(path)
    config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved['config'].items()})
    model = MultiCoCo(config)
    load_weights(model, saved.pop('model'), path)
    model.checkpoint = saved
    return model.eval(), tokenizer_from(saved['tokenizer'], config.eos_token_ids[0], config.pad_token_id)
