"""
MultiCoCo's model: InternVL3 that reasons in continuous thoughts. One image, one question, one
forward:

    uint8 tiles -> InternViT (timm) -> pixel shuffle -> projector --.
    token ids -> embedding ----------------------------------------- fuse -> think -> head

`think` is Coconut's latent loop: the embedding of a thought is the hidden state just before it.

Sources: Coconut (arXiv 2412.06769), InternVL3 (arXiv 2504.10479), Qwen2 (arXiv 2407.10671).
Notation: B rows, T tokens a row, L tokens of one pass, S slots (see `lay_out`), D width, K
key/value heads, V vocabulary, n thoughts, P tiles, N visual tokens a tile. State-dict names are
OpenGVLab's, and timm's inside the vision tower.

Differences from the sources, and why:
- Coconut pads the batch until all thoughts stand in one column; here each row is cut at its own
  thoughts (see `lay_out`), so any number of thoughts may stand anywhere, and n thoughts cost n
  further passes for the whole batch.
- The image is encoded once. It stays in the keys and values, so nothing is fused again for a
  thought.
- Thoughts are never detached: the gradient of the answer reaches thought 1.
- A count of <IMG_CONTEXT> that does not fit the tiles is an error; OpenGVLab truncates the features
  and zeroes the loss.
- RoPE is plain: InternVL3's 'dynamic' scaling equals it up to max_position_embeddings; longer
  inputs are refused.
"""
import json
import math
import os
import pickle
import re
import shutil
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Optional

import timm
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers
from einops import rearrange
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import nn

# ImageNet's, as InternVL has them
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# --- tokens ---------------------------------------------------------------------------------------
IMG, END_IMG, IMG_CONTEXT = '<img>', '</img>', '<IMG_CONTEXT>'
START_LATENT, LATENT, END_LATENT = '<|start-latent|>', '<|latent|>', '<|end-latent|>'
SPECIAL_TOKENS = (IMG, END_IMG, IMG_CONTEXT, START_LATENT, LATENT, END_LATENT)


def load_tokenizer(name_or_path):
    """The tokenizer of a folder or hub id with each of SPECIAL_TOKENS present, added only if it is
    not there."""
    return add_special_tokens(read_tokenizer(fetch(name_or_path)))


def tokenizer_class(folder):
    """transformers' class for a folder's tokenizer, by which files are there: tokenizer.json, or
    Qwen2's vocab.json and merges.txt. OSError where neither is."""
    files = os.listdir(folder)
    if 'tokenizer.json' in files:
        return transformers.PreTrainedTokenizerFast
    if 'vocab.json' in files and 'merges.txt' in files:
        return transformers.Qwen2TokenizerFast
    raise OSError(f'no tokenizer could be loaded from {folder}: it holds neither tokenizer.json '
                  'nor vocab.json and merges.txt')


def read_tokenizer(folder):
    """The class is chosen here: transformers' Auto classes go by config.json, which may name code
    of the folder, and ask to run that. tokenizer_config.json gives the end token and the chat
    template."""
    kind = tokenizer_class(folder)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # else a warning that the config names another class
    try:
        return kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # its readers raise many kinds; each means that a file is damaged
        reason = f'{type(error).__name__}: {error}'.splitlines()[0][:200]
        raise OSError(f'no tokenizer could be loaded from {folder} ({reason}): download it '
                      'again') from None
    finally:
        transformers.logging.set_verbosity(verbosity)


def add_special_tokens(tokenizer):
    known = tokenizer.get_vocab()
    new = [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS if t not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    for token in SPECIAL_TOKENS:
        token_id = tokenizer.convert_tokens_to_ids(token)
        ids = tokenizer.encode(f'a{token}b', add_special_tokens=False)  # also inside other text
        assert ids.count(token_id) == 1, f'{token} is not a token of its own: it became {ids}'
        assert token_id != tokenizer.unk_token_id, f'{token} is the unknown token'
    return tokenizer


# --- decoder: Qwen2 (q, k, v with bias) or Qwen3 (RMS norm on each head's queries and keys) -------

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
    attention_bias: bool = True           # on q, k, v: Qwen2 True, Qwen3 False
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
    ps_version: str = 'v2'                # 'v1' has the two axes of the shuffled grid exchanged
    # token ids
    image_token_id: int = 151667          # <IMG_CONTEXT>
    latent_token_id: int = 151675         # <|latent|>
    eos_token_ids: tuple = (151645, 151643)
    pad_token_id: int = 151643

    @property
    def num_image_tokens(self):
        """N, visual tokens a tile."""
        return int(self.image_size // self.patch_size * self.downsample_ratio) ** 2


def rotary(position, head_dim, theta):
    """RoPE's cos and sin, float32 [B, 1, L, head_dim], of positions [B, L]. The first half of sin
    is negated, which is all that `rotate` needs besides a roll."""
    channel = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32)
    frequency = theta ** -(channel / head_dim)
    angle = position[:, None, :, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x, cos, sin):
    """(a, b) to (a cos - b sin, b cos + a sin): roll exchanges the halves, the minus is in
    `rotary`'s sin."""
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, -1), sin.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, self.qk_norm = c.head_dim, c.qk_norm
        query_size = c.num_attention_heads * c.head_dim
        key_size = c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, query_size, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, key_size, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, key_size, bias=c.attention_bias)
        self.o_proj = nn.Linear(query_size, c.hidden_size, bias=False)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, cos, sin, mask, past, write_at=None):
        """x [B, L, D]. past: this layer's earlier keys and values, in one of two forms. In `think`
        (no write_at) two tuples with one tensor an earlier pass: autograd needs them as they are,
        so they are concatenated. In `generate` two tensors [B, K, S + max_new_tokens, head_dim],
        written in place at the slot write_at, int64 [1]. Gives y [B, L, D] and this pass's keys
        and values [B, K, L, head_dim]."""
        q = rearrange(self.q_proj(x), 'b l (h d) -> b h l d', d=self.head_dim)
        k = rearrange(self.k_proj(x), 'b l (h d) -> b h l d', d=self.head_dim)
        v = rearrange(self.v_proj(x), 'b l (h d) -> b h l d', d=self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, cos, sin).to(v.dtype)  # under autocast the norms give float32
        k = rotate(k, cos, sin).to(v.dtype)
        past_keys, past_values = past
        if write_at is None:
            keys, values = torch.cat((*past_keys, k), 2), torch.cat((*past_values, v), 2)
        else:
            keys = past_keys.index_copy_(2, write_at, k)
            values = past_values.index_copy_(2, write_at, v)
        if mask is None:  # the first pass: no past, so plain causal attention
            y = F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
        else:
            # fused kernels take a mask or grouped queries, not both: the G query heads of each key
            # head are laid out as G * L queries of one head
            G = q.shape[1] // k.shape[1]
            q = rearrange(q, 'b (k g) l d -> b k (g l) d', g=G)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask.repeat(1, 1, G, 1))
            y = rearrange(y, 'b k (g l) d -> b (k g) l d', g=G)
        return self.o_proj(rearrange(y, 'b h l d -> b l (h d)')), k, v


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

    def forward(self, x, cos, sin, mask, past, real_slots=None, write_at=None):
        """As Attention's. real_slots: flat indices of the B * L places that hold a token (see
        `Layout`), which alone go through the MLP; None for all."""
        y, k, v = self.self_attn(self.input_layernorm(x), cos, sin, mask, past, write_at)
        x = x + y
        h = self.post_attention_layernorm(x)
        if real_slots is None:
            return x + self.mlp(h), k, v
        # [real slots, D]; index_add needs one dtype, autocast gives another
        y = self.mlp(h.flatten(0, 1)[real_slots]).to(x.dtype)
        return x.flatten(0, 1).index_add(0, real_slots, y).view_as(x), k, v


class LanguageModel(nn.Module):
    """Holds the weights under OpenGVLab's names; the passes through them are MultiCoCo's
    `decode`."""

    def __init__(self, c):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.model.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


# --- where a token stands: the bookkeeping of the latent loop -------------------------------------
# the position of an empty slot: greater than that of any token, so that none sees it
PADDING = 2**30


class Layout(NamedTuple):
    slot: torch.Tensor         # int64 [B, T]: the slot of each token, 0 for padding
    ids: torch.Tensor          # int64 [B, S]: the token in each slot
    position: torch.Tensor     # int64 [B, S]: its position in its row, PADDING in an empty slot
    length: torch.Tensor       # int64 [B, n + 1]: tokens of each row in each chunk, 0 for none
    widths: list               # n + 1 ints: slots of a chunk, the most tokens a row has in it
    real_slots: list           # n + 1: which of B * width slots hold tokens; None if over 90 % do
    image_slots: torch.Tensor  # int64 [P * N]: which of B * S slots hold <IMG_CONTEXT>, row by row
    image_tokens: list         # B ints: <IMG_CONTEXT> tokens of each row
    targets: tuple             # int64 [supervised] three times: row, slot before the token, token


def lay_out(input_ids, attention_mask, config, labels=None, device=None):
    """Cuts every row at its own thoughts and gives each token a slot, chunk behind chunk, so that
    chunk k of all rows is one range of slots. Chunk 0 is a row up to its first thought, chunk k
    runs from thought k to just before thought k + 1. <|start-latent|> is the last p, <|end-latent|>
    the first a:

        row 0:  p p p p p p | t1 | t2 a a a              p prompt or visual token
        row 1:  p p p       | t1 | t2       | t3 a a     t thought    a marker or answer token
        chunk:  0             1    2          3
        slots:  0 1 2 3 4 5   6    7 8 9 10   11 12 13

    Row 1 leaves slots 3 4 5 and 8 9 10 empty, row 0 leaves 11 12 13.

    "Column" is a place in input_ids, and a token's position: row 1's t2 is in column 4, its chunk
    begins there, in slot 7.

    Runs on the CPU: every size that depends on values is found here, once, so that `forward` never
    waits for the GPU. Inputs on a GPU are copied first, the one wait there is: leave them on the
    CPU."""
    device = device or input_ids.device
    ids = input_ids.cpu()
    B, T = ids.shape
    real = torch.ones_like(ids).bool() if attention_mask is None else attention_mask.cpu().bool()
    check_rows(ids, real, config)
    chunk_of = ((ids == config.latent_token_id) & real).cumsum(1)               # [B, T]
    length = torch.zeros(B, int(chunk_of.max()) + 1, dtype=torch.long)
    length.scatter_add_(1, chunk_of, real.long())                               # [B, n + 1]
    widths = length.max(0).values                                               # [n + 1]
    first_slot = widths.cumsum(0) - widths          # [n + 1], of each chunk
    first_column = length.cumsum(1) - length        # [B, n + 1]
    # a token's slot: its chunk's first one, and its distance from where its chunk begins
    slot = first_slot[chunk_of] + torch.arange(T) - first_column.gather(1, chunk_of)
    slot = torch.where(real, slot, 0)                                           # [B, T]
    row, column = real.nonzero(as_tuple=True)
    S = int(widths.sum())
    slot_ids = torch.full((B, S), config.pad_token_id)
    slot_ids[row, slot[row, column]] = ids[row, column]
    position = torch.full((B, S), PADDING)
    position[row, slot[row, column]] = column
    is_image = slot_ids == config.image_token_id

    def on_device(x):
        return x.to(device, non_blocking=True)

    real_slots = []
    for k, width in enumerate(widths.tolist()):
        is_real = torch.arange(width) < length[:, k, None]                      # [B, width]
        # above 90 %, as measured on a CPU, leaving the others out costs more than it saves
        mostly = is_real.float().mean() > 0.9
        real_slots.append(None if mostly else on_device(is_real.flatten().nonzero()[:, 0]))
    targets = ()
    if labels is not None:
        labels = labels.cpu()
        # before: the column whose hidden state predicts the next one
        row, before = (labels[:, 1:] != -100).nonzero(as_tuple=True)
        targets = (row, slot[row, before], labels[row, before + 1])
    return Layout(on_device(slot), on_device(slot_ids), on_device(position), on_device(length),
                  widths.tolist(), real_slots, on_device(is_image.flatten().nonzero()[:, 0]),
                  is_image.sum(1).tolist(), tuple(on_device(x) for x in targets))


def check_rows(ids, real, config):
    """Raises ValueError for rows that cannot be laid out."""
    if real.shape != ids.shape:
        raise ValueError(f'attention_mask is {list(real.shape)} where input_ids is '
                         f'{list(ids.shape)}: they must agree')
    ragged = (real[:, 1:] > real[:, :-1]).any(1) | ~real[:, 0]
    for b in ragged.nonzero():  # the first such row, if any
        raise ValueError(f'row {b.item()} of attention_mask is not 1s followed by 0s: pad on the '
                         'right')
    for b in (ids[:, 0] == config.latent_token_id).nonzero():
        raise ValueError(f'row {b.item()} starts with {LATENT}: a thought needs a token before it')
    longest = int(real.sum(1).max())
    if longest > config.max_position_embeddings:
        raise ValueError(f'a row has {longest} tokens, the model takes '
                         f'{config.max_position_embeddings} at most: shorten it')


# --- the whole model ------------------------------------------------------------------------------

def check_shape(c):
    """Raises ValueError for sizes of a Config that no model can have."""
    if c.num_attention_heads % c.num_key_value_heads or c.head_dim % 2:
        raise ValueError(f'num_attention_heads={c.num_attention_heads}, num_key_value_heads='
                         f'{c.num_key_value_heads}, head_dim={c.head_dim}: expected a multiple of '
                         'the key heads, and an even head_dim')
    step = round(c.patch_size / c.downsample_ratio)  # patches are joined two by two
    if c.vision_num_layers and (c.image_size % step or c.vision_hidden_size % c.vision_num_heads):
        raise ValueError(f'image_size={c.image_size}, vision_hidden_size={c.vision_hidden_size}, '
                         f'vision_num_heads={c.vision_num_heads}: expected a multiple of {step}, '
                         'two patches, and a width that the heads divide')


class Output(NamedTuple):
    loss: Optional[torch.Tensor]    # float32, mean over supervised tokens; None without labels
    logits: Optional[torch.Tensor]  # [B, T, V]; None with labels
    thoughts: torch.Tensor          # [B, n, D], the vectors fed back, 0 where a row has fewer


class MultiCoCo(nn.Module):
    """`edit_thought(k, thought [B, D]) -> [B, D]` is the loop's one hook: it is called just before
    thought k = 1, 2, ... is fed back, and what it gives is fed back instead."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        check_shape(c)
        self.activation_checkpointing = False
        # of the latest labelled batch: how many targets were the likeliest token, set by forward
        self.num_correct = None
        if c.vision_num_layers:
            self.vision_model = timm.models.VisionTransformer(
                img_size=c.image_size, patch_size=c.patch_size, embed_dim=c.vision_hidden_size,
                depth=c.vision_num_layers, num_heads=c.vision_num_heads,
                mlp_ratio=c.vision_intermediate_size / c.vision_hidden_size, init_values=1.0,
                norm_layer=partial(nn.LayerNorm, eps=c.vision_layer_norm_eps), final_norm=False,
                num_classes=0, weight_init='skip')
            shuffled = int(c.vision_hidden_size / c.downsample_ratio ** 2)
            self.mlp1 = nn.Sequential(
                nn.LayerNorm(shuffled), nn.Linear(shuffled, c.hidden_size), nn.GELU(),
                nn.Linear(c.hidden_size, c.hidden_size))
        self.language_model = LanguageModel(c)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """From scratch. Embeddings and the final norm have scale 0.35, so that a thought has the
        scale of an embedding; where the head is tied to embeddings of width 64, as in
        config/toy.py, logits start near scale 1 (0.35 * 0.35 * sqrt(64))."""
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
        nn.init.normal_(self.language_model.model.embed_tokens.weight, std=0.35)
        self.language_model.model.norm.weight.fill_(0.35)
        if c.vision_num_layers:
            nn.init.normal_(self.vision_model.cls_token, std=0.35)
            nn.init.normal_(self.vision_model.pos_embed, std=0.35)

    def set_activation_checkpointing(self, on=True):
        """Recompute activations in the backward pass: nothing changes but memory and time."""
        self.activation_checkpointing = on
        if self.config.vision_num_layers:
            self.vision_model.set_grad_checkpointing(on)

    def embed_image(self, pixel_values):
        """Tiles [P, 3, side, side] on any device, uint8 or normalised float, to visual tokens [P,
        N, D]."""
        c, side = self.config, self.config.image_size
        if not c.vision_num_layers:
            raise ValueError('this model is a text decoder without a vision tower: it takes no '
                             'image; leave images out, or use an InternVL checkpoint')
        weight = self.vision_model.pos_embed
        if pixel_values.shape[1:] != (3, side, side):
            raise ValueError(f'tiles are {list(pixel_values.shape[1:])}, this model takes [3, '
                             f'{side}, {side}]: prepare them with image_size={side}')
        pixel_values = pixel_values.to(weight.device, non_blocking=True)
        if pixel_values.dtype == torch.uint8:
            mean = torch.tensor(IMAGE_MEAN)[:, None, None].to(weight.device, non_blocking=True)
            std = torch.tensor(IMAGE_STD)[:, None, None].to(weight.device, non_blocking=True)
            pixel_values = pixel_values.float().div_(255).sub_(mean).div_(std)
        # [P, 1 + patches, vision width]
        x = self.vision_model.forward_features(pixel_values.to(weight.dtype))
        p = round(1 / c.downsample_ratio)
        grid = '(h w)' if c.ps_version == 'v2' else '(w h)'
        x = rearrange(x[:, 1:], f'b (h p w q) c -> b {grid} (p q c)', h=side // c.patch_size // p,
                      p=p, q=p)                                 # [P, N, p * q * vision width]
        return self.mlp1(x)                                     # [P, N, D]

    def embed_text(self, ids):
        return self.language_model.model.embed_tokens(ids)

    def as_pause(self, k, thought):
        """An `edit_thought`: the learned embedding of <|latent|> instead, so that nothing is fed
        back."""
        ids = torch.full(thought.shape[:1], self.config.latent_token_id, device=thought.device)
        return self.embed_text(ids).to(thought.dtype)

    def fuse(self, layout, pixel_values=None, num_tiles=None, image_flags=None):
        """Tokens in slots to embeddings [B, S, D]: visual tokens stand where <IMG_CONTEXT> did, in
        row order."""
        x, N = self.embed_text(layout.ids), self.config.num_image_tokens
        P = 0 if pixel_values is None else len(pixel_values)
        if image_flags is not None and P:
            keep = image_flags.flatten().to(pixel_values.device).bool()
            if len(keep) != P:
                raise ValueError(f'image_flags has {len(keep)} entries for {P} tiles: give one a '
                                 'tile')
            # num_tiles may count all tiles or only those that are kept: a sum of P means all
            if num_tiles is not None and int(num_tiles.sum()) == P:
                num_tiles = torch.stack([part.sum() for part in keep.split(num_tiles.tolist())])
            pixel_values, P = pixel_values[keep], int(keep.sum())
        tiles = [count // N for count in layout.image_tokens]
        if num_tiles is not None:
            tiles = num_tiles.tolist()
        if len(tiles) != len(layout.image_tokens):
            raise ValueError(f'num_tiles has {len(tiles)} entries for {len(layout.image_tokens)} '
                             'rows: give one a row')
        used = 0  # tiles up to this row: they have to end at exactly P
        for b, (count, row_tiles) in enumerate(zip(layout.image_tokens, tiles)):
            used += row_tiles
            if count != row_tiles * N:
                raise ValueError(f'row {b} holds {count} {IMG_CONTEXT} tokens, but its {row_tiles} '
                                 f'tiles give {row_tiles * N} visual tokens ({N} a tile): encode '
                                 'text and tiles together')
            is_last = b == len(tiles) - 1
            if used > P or is_last and used < P:
                raise ValueError(f'row {b} ends {used} tiles into the batch by its {count} '
                                 f'{IMG_CONTEXT} tokens, but pixel_values holds {P} tiles: encode '
                                 'text and tiles together')
        if P:
            visual = self.embed_image(pixel_values).flatten(0, 1).to(x.dtype)   # [P * N, D]
            x = x.flatten(0, 1).index_copy(0, layout.image_slots, visual).view_as(x)
        return x

    def decode(self, x, position, mask, cache, real_slots=None, write_at=None):
        """One pass through the decoder: x [B, L, D] at position [B, L] to hidden states after the
        final norm [B, L, D]. cache: (keys, values) of each layer as Attention takes them; this
        pass's are added to it."""
        cos, sin = rotary(position, self.config.head_dim, self.config.rope_theta)
        for i, layer in enumerate(self.language_model.model.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():  # not in `generate`
                x, k, v = torch.utils.checkpoint.checkpoint(
                    layer, x, cos, sin, mask, cache[i], real_slots, use_reentrant=False,
                    preserve_rng_state=False)
            else:
                x, k, v = layer(x, cos, sin, mask, cache[i], real_slots, write_at)
            if write_at is None:
                keys, values = cache[i]
                cache[i] = (*keys, k), (*values, v)
        return self.language_model.model.norm(x)

    def think(self, x, layout, edit_thought=None):
        """The latent loop over fused embeddings x [B, S, D]: n + 1 passes, one a chunk (see
        `lay_out`). Gives hidden states [B, S, D], thoughts [B, n, D], and the cache: tuples of keys
        and values of each layer."""
        rows = torch.arange(len(x), device=x.device)
        cache = [((), ()) for _ in self.language_model.model.layers]
        hidden, thoughts, start = [], [], 0
        for k, width in enumerate(layout.widths):
            stop = start + width
            position, chunk, mask = layout.position[:, start:stop], x[:, start:stop], None
            if k > 0:
                last_index = (layout.length[:, k - 1] - 1).clamp(min=0)
                thought = hidden[-1][rows, last_index]                          # [B, D]
                if edit_thought is not None:
                    thought = edit_thought(k, thought)
                has_thought = layout.length[:, k, None] > 0
                thought = torch.where(has_thought, thought, 0).to(x.dtype)
                thoughts.append(thought)
                chunk = torch.cat((thought[:, None], chunk[:, 1:]), 1)
                # a query sees the keys whose position is not greater than its own
                mask = layout.position[:, None, None, :stop] <= position[:, None, :, None]
            hidden.append(self.decode(chunk, position, mask, cache, layout.real_slots[k]))
            start = stop
        thoughts = torch.stack(thoughts, 1) if thoughts else x[:, :0]
        return torch.cat(hidden, 1), thoughts, cache

    def forward(self, input_ids, pixel_values=None, attention_mask=None, labels=None,
                num_tiles=None, image_flags=None, edit_thought=None):
        """
        input_ids       int64 [B, T], right-padded; a <|latent|> anywhere but first is a thought.
                        All inputs are best left on the CPU: forward moves what the GPU needs
        pixel_values    uint8 or normalised float [P, 3, side, side]: all rows' tiles in row order
        attention_mask  [B, T], 1 for a token; None for no padding
        labels          int64 [B, T], -100 where unsupervised; only the others go through the head
        num_tiles       int64 [B], tiles of each row, for the check per row
        image_flags     [P], tiles flagged 0 are dropped before the ViT
        edit_thought    see the class
        Gives an Output. Raises ValueError where text, tiles and masks do not fit.
        """
        head = self.language_model.lm_head
        layout = lay_out(input_ids, attention_mask, self.config, labels, head.weight.device)
        x = self.fuse(layout, pixel_values, num_tiles, image_flags)
        hidden, thoughts, _ = self.think(x, layout, edit_thought)
        if labels is None:
            rows = torch.arange(len(x), device=x.device)[:, None]
            return Output(None, head(hidden[rows, layout.slot]), thoughts)
        row, slot, target = layout.targets
        if not len(row):
            raise ValueError('labels supervise no token of this batch: rows need a target behind '
                             'their prompt')
        logits = head(hidden[row, slot])                                        # [supervised, V]
        self.num_correct = (logits.detach().argmax(-1) == target).sum()
        return Output(F.cross_entropy(logits.float(), target), None, thoughts)

    @torch.no_grad()
    def generate(self, input_ids, pixel_values=None, attention_mask=None, max_new_tokens=64,
                 temperature=0.0, top_p=1.0, num_tiles=None, image_flags=None, edit_thought=None,
                 generator=None):
        """New tokens int64 [B, <= max_new_tokens], each row up to and with its end token, then
        padding. Greedy at temperature 0. Thoughts of the prompt run through the same loop as in
        training. A <|latent|> that the model writes itself is fed the last hidden state too:
        edit_thought is then called for all rows after each new token but the last, with k = n + 1,
        n + 2, ..., and rows that did not write <|latent|> ignore what it gives."""
        if not 0 <= temperature < math.inf or not 0 < top_p <= 1 or max_new_tokens < 1:
            raise ValueError(f'temperature={temperature}, top_p={top_p}, '
                             f'max_new_tokens={max_new_tokens}: expected temperature >= 0, 0 < '
                             'top_p <= 1 and max_new_tokens >= 1')
        c, head_weight = self.config, self.language_model.lm_head.weight
        layout = lay_out(input_ids, attention_mask, c, None, head_weight.device)
        prompt_length, (B, S) = layout.length.sum(1), layout.ids.shape
        if int(prompt_length.max()) + max_new_tokens > c.max_position_embeddings:
            raise ValueError(f'{int(prompt_length.max())} prompt tokens and {max_new_tokens} new '
                             f'ones exceed the model\'s {c.max_position_embeddings}: lower '
                             'max_new_tokens or shorten the prompt')
        x = self.fuse(layout, pixel_values, num_tiles, image_flags)
        hidden, thoughts, cache = self.think(x, layout, edit_thought)
        n = thoughts.shape[1]
        for i, (keys, values) in enumerate(cache):  # with room for the new tokens, written in place
            cache[i] = (F.pad(torch.cat(keys, 2), (0, 0, 0, max_new_tokens)),
                        F.pad(torch.cat(values, 2), (0, 0, 0, max_new_tokens)))
        key_position = F.pad(layout.position, (0, max_new_tokens), value=PADDING)
        rows, eos = torch.arange(B, device=x.device), torch.tensor(c.eos_token_ids, device=x.device)
        last = hidden[rows, layout.slot[rows, prompt_length - 1]]               # [B, D]
        position, write_at = prompt_length, torch.tensor([S], device=x.device)
        new = torch.full((B, max_new_tokens), c.pad_token_id, device=x.device)
        written, done = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
        # whether the caller has put a compiled step there, see `step`: then rows are never dropped
        compiled = 'step' in vars(self)
        if compiled:
            for keys, values in cache:  # CUDA graphs want fixed buffers
                torch._dynamo.mark_static_address(keys, guard=False)
                torch._dynamo.mark_static_address(values, guard=False)
        for i in range(max_new_tokens):
            logits = (head_weight @ last.T).T  # for few rows faster on CPUs than x @ W.T
            token = sample(logits.float(), temperature, top_p, generator)
            token = torch.where(done, c.pad_token_id, token)
            new[rows, i] = token
            written[rows] += ~done
            done = done | torch.isin(token, eos)
            if i + 1 == max_new_tokens:
                break
            if i % 4 == 3:  # not in each step, since to ask is to wait for the device
                running = (~done).nonzero()[:, 0]
                if not len(running):
                    break
                # half are done: now it pays to copy the cache. A hook is promised all rows
                if 2 * len(running) <= len(done) and edit_thought is None and not compiled:
                    rows, token, last = rows[running], token[running], last[running]
                    position, key_position = position[running], key_position[running]
                    done = done[running]
                    cache = [(keys[running], values[running]) for keys, values in cache]
            thought = last if edit_thought is None else edit_thought(n + i + 1, last)
            is_thought = (token == c.latent_token_id)[:, None]
            x = torch.where(is_thought, thought.to(head_weight.dtype), self.embed_text(token))
            key_position.index_copy_(1, write_at, position[:, None])
            mask = (key_position <= position[:, None])[:, None, None]           # [B, 1, 1, slots]
            last = self.step(x, position, mask, cache, write_at)
            position, write_at = position + 1, write_at + 1
        return new[:, :int(written.max())]

    def step(self, x, position, mask, cache, write_at):
        """One token a row, x [B, D] at position [B] to its hidden state [B, D]. Shapes stay the
        same from token to token: `model.step = torch.compile(model.step, dynamic=False)` makes
        generate use it compiled."""
        return self.decode(x[:, None], position[:, None], mask, cache, write_at=write_at)[:, 0]

    @classmethod
    def from_pretrained(cls, name_or_path, dtype=torch.float32):
        """InternVL, OpenGVLab's layout or the -hf one, or a plain Qwen2, Qwen3 or Llama, from a hub
        id or a local folder; one file or sharded, safetensors only. The rows of tokens that
        `load_tokenizer` adds are the mean of the rows that were there. Memory peaks near the size
        of the weights. dtype: of the weights, 'auto' for bfloat16 where the files are. Raises
        OSError or ValueError in one sentence."""
        config, weights, found = read_pretrained(name_or_path, dtype)
        with torch.device('meta'):
            model = cls(config)
        fill_with(model, weights, name_or_path, assign=True)
        if config.tie_word_embeddings:  # what was tied on the meta device is not after assigning
            model.language_model.lm_head.weight = model.language_model.model.embed_tokens.weight
        size = sum(p.numel() for p in model.parameters()) / 1e6
        print(f'{name_or_path}: {size:.1f}M parameters from {found}')
        return model.eval()

    def save_pretrained(self, folder, tokenizer, texts=None):
        """Writes what `from_pretrained` reads, and transformers without this code: config.json,
        generation_config.json, model.safetensors in the model's dtype, the tokenizer's files, in
        the -hf layout or that of a plain decoder. texts: further files, name -> content. Raises
        ValueError where folder holds something or transformers has no such model."""
        write_pretrained(self, folder, tokenizer, texts or {})


def sample(logits, temperature, top_p, generator=None):
    """float32 [B, V] to int64 [B]: the likeliest token at temperature 0 (and so near it that the
    division overflows), else one of the top_p mass."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    p, token = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0  # what comes before this token is enough
    return token.gather(-1, torch.multinomial(p, 1, generator=generator))[:, 0]


# --- files: InternVL's, and those of plain text decoders ------------------------------------------
EMBEDDING, HEAD = 'language_model.model.embed_tokens.weight', 'language_model.lm_head.weight'
EXPORTED = 'multicoco.json'  # knobs and stage beside exported weights
SUPPORTED = ('supported are InternVL2.5 1B and 4B, InternVL3 1B, 2B, 8B and 14B, InternVL3.5 with '
             'Qwen3, and text decoders of the types qwen2, qwen3 and llama')
# (part of our name, part of a file's): OpenGVLab's are read, those of -hf files read and written
OPENGVLAB_NAMES = (
    ('vision_model.cls_token', 'vision_model.embeddings.class_embedding'),
    ('vision_model.pos_embed', 'vision_model.embeddings.position_embedding'),
    ('vision_model.patch_embed.proj.', 'vision_model.embeddings.patch_embedding.'),
    ('vision_model.blocks.', 'vision_model.encoder.layers.'),
    ('.ls1.gamma', '.ls1'), ('.ls2.gamma', '.ls2'))
HF_NAMES = (
    ('vision_model.cls_token', 'vision_tower.embeddings.cls_token'),
    ('vision_model.pos_embed', 'vision_tower.embeddings.position_embeddings'),
    ('vision_model.patch_embed.proj.', 'vision_tower.embeddings.patch_embeddings.projection.'),
    ('vision_model.blocks.', 'vision_tower.encoder.layer.'),
    ('.ls1.gamma', '.lambda_1'), ('.ls2.gamma', '.lambda_2'),
    ('.norm1.', '.layernorm_before.'), ('.norm2.', '.layernorm_after.'),
    ('.attn.proj.', '.attention.projection_layer.'), ('.attn.q.', '.attention.q_proj.'),
    ('.attn.k.', '.attention.k_proj.'), ('.attn.v.', '.attention.v_proj.'),
    ('mlp1.0.', 'multi_modal_projector.layer_norm.'),
    ('mlp1.1.', 'multi_modal_projector.linear_1.'),
    ('mlp1.3.', 'multi_modal_projector.linear_2.'))
# what some files hold and nothing needs: buffers, and the token of a training with masked patches
UNUSED = re.compile(r'.+\.rotary_emb\.inv_freq|.+\.position_ids|.+\.embeddings\.mask_token')
TYPES = ('qwen2', 'qwen3', 'llama')
EXPECTED = (  # values of config.json that this code computes with; () where any is refused
    ('text', 'model_type', TYPES), ('text', 'hidden_act', ('silu', 'swish')),
    ('text', 'is_causal', (True,)), ('text', 'partial_rotary_factor', (1.0,)),
    ('text', 'mlp_bias', (False,)), ('', 'quantization_config', ()),
    ('', 'use_llm_lora', (0,)), ('', 'use_backbone_lora', (0,)),
    ('', 'projector_hidden_act', ('gelu',)), ('', 'select_layer', (-1,)),
    ('', 'vision_feature_layer', (-1,)), ('', 'vision_feature_select_strategy', ('default',)),
    ('', 'ps_version', ('v1', 'v2')),
    ('vision', 'qk_normalization', (False,)), ('vision', 'use_qk_norm', (False,)),  # InternViT-6B's
    ('vision', 'norm_type', ('layer_norm',)), ('vision', 'hidden_act', ('gelu',)),
    ('vision', 'num_channels', (3,)), ('vision', 'use_mean_pooling', (True,)),
    ('vision', 'use_absolute_position_embeddings', (True,)))
NEEDED = ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
NUMBERS = (('', ('downsample_ratio', 'force_image_size')), ('vision', (*NEEDED, 'layer_norm_eps')),
           ('text', (*NEEDED, 'num_key_value_heads', 'head_dim', 'rms_norm_eps', 'rope_theta',
                     'max_position_embeddings', 'sliding_window')))


def fetch(name_or_path):
    """A local folder as it is; a hub id's files from the hub's cache, or from the hub if not all
    are there."""
    if os.path.isdir(name_or_path):
        return name_or_path
    if os.path.exists(name_or_path) or not re.fullmatch(r'[\w.-]+/[\w.-]+', name_or_path):
        raise FileNotFoundError(f'{name_or_path} is neither a folder nor a .pt file nor a hub id '
                                'like OpenGVLab/InternVL3-1B-Pretrained')
    wanted = dict(allow_patterns=['*.json', '*.safetensors', '*.txt', '*.jinja'])
    try:
        folder = snapshot_download(name_or_path, local_files_only=True, **wanted)
        weight_files(folder)     # these two raise where files are missing
        tokenizer_class(folder)
        return folder
    except (OSError, ValueError):
        pass  # not in the cache, or not whole there: ask the hub
    try:
        return snapshot_download(name_or_path, **wanted)
    except (OSError, ValueError, RuntimeError) as error:  # offline, no such repository, no access
        raise OSError(f'{name_or_path} is no folder here, not in the local cache, and could not be '
                      f'had from the hub ({type(error).__name__}): give a local folder of the '
                      'checkpoint, or train the built-in data set with config/toy.py') from None


def read_json(path, default=None):
    if default is not None and not os.path.isfile(path):
        return default
    try:
        with open(path, encoding='utf-8-sig') as f:
            content = json.load(f)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is not a whole JSON file ({error}): download it again') from None
    if not isinstance(content, dict):
        raise ValueError(f'{path} holds a {type(content).__name__}, expected an object: download '
                         'it again')
    return content


def weight_files(folder):
    """A checkpoint folder's tensors: name -> (safetensors file, shape, type as in 'BF16')."""
    files = os.listdir(folder)
    if 'config.json' not in files and 'adapter_config.json' in files:
        raise FileNotFoundError(f'{folder} holds a LoRA adapter alone (adapter_config.json): merge '
                                'it into its base model and give the folder of the result')
    if 'config.json' not in files and 'best.pt' in files:
        raise FileNotFoundError(f'{folder} is the folder of a run: give {folder}/best.pt')
    if 'config.json' not in files:
        raise FileNotFoundError(f'{folder} holds no config.json: give the folder of a whole '
                                'checkpoint')
    if 'model.safetensors' in files:  # preferred to an index beside it, as in transformers
        names = ['model.safetensors']
    elif 'model.safetensors.index.json' in files:
        index = read_json(os.path.join(folder, 'model.safetensors.index.json'))
        if not isinstance(index.get('weight_map'), dict):
            raise ValueError(f'{folder}: model.safetensors.index.json has no weight_map: download '
                             'it again')
        names = sorted(set(index['weight_map'].values()))
    else:
        raise FileNotFoundError(f'{folder} holds no model.safetensors and no '
                                'model.safetensors.index.json: only safetensors are read, so '
                                'convert .bin files first')
    found = {}
    for name in names:
        path = os.path.join(folder, name)
        if name not in files:
            raise FileNotFoundError(f'{folder} lacks {name}, which its index names: download it '
                                    'again')
        try:
            with safe_open(path, 'pt') as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    found[key] = (path, part.get_shape(), part.get_dtype())
        except SafetensorError as error:
            with open(path, 'rb') as f:
                if f.read(40).startswith(b'version https://git-lfs'):
                    raise ValueError(f"{path} is only git-lfs's pointer to the file: run git lfs "
                                     'pull') from None
            raise ValueError(f'{path} is damaged ({error}): download it again') from None
    return found


def our_name(name):
    """Ours for a tensor's name in any of the layouts, transformers' names in memory as well."""
    # model.language_model.norm.weight -> language_model.model.norm.weight   (-hf, in memory)
    name = name.replace('model.language_model.', 'language_model.model.')
    # model.vision_tower.x -> vision_tower.x                                 (-hf, in memory)
    name = re.sub(r'^model\.(?=vision_tower\.|multi_modal_projector\.)', '', name)
    # model.norm.weight, lm_head.weight -> language_model. and the same      (a plain decoder)
    name = re.sub(r'^(?=model\.(?:embed_tokens|layers|norm)\.|lm_head\.)', 'language_model.', name)
    for ours, theirs in (*OPENGVLAB_NAMES, *HF_NAMES):
        name = name.replace(theirs, ours)
    return name


def to_our_names(tensors, source):
    """Pairs of a file's tensor name and tensor -> {our name: tensor}, q, k and v of the vision
    tower joined."""
    weights, parts = {}, {}
    for name, tensor in tensors:
        ours = our_name(name)
        third = re.fullmatch(r'(vision_model\.blocks\.\d+\.attn)\.([qkv])\.(weight|bias)', ours)
        if third:
            parts.setdefault(f'{third[1]}.qkv.{third[3]}', {})[third[2]] = tensor
        elif ours in weights:
            raise ValueError(f'{source} holds {ours} under two names, the second is {name}')
        else:
            weights[ours] = tensor
    for name, found in parts.items():
        if len(found) < 3:
            raise ValueError(f'{source}: of {name} only {", ".join(sorted(found))} is there, '
                             'expected q, k and v')
        weights[name] = torch.cat((found['q'], found['k'], found['v']))
    return weights


def refuse(raw, text, vision, source):
    """Raises ValueError for the first value of config.json that this code would compute otherwise.
    vision is None for a text decoder."""
    parts, reasons = {'': raw, 'text': text, 'vision': vision or {}}, []
    for part, key, allowed in EXPECTED:
        value = parts[part].get(key)
        if value is not None and value not in allowed:
            computed = f', not {" or ".join(map(str, allowed))}' if allowed else ''
            given = 'set' if isinstance(value, dict) else value
            reasons.append(f'its {part} {key} is {given}{computed}'.replace('  ', ' '))
    lacking = [f'text {key}' for key in NEEDED if not text.get(key)]
    if text['model_type'] != 'llama' and not text.get('num_key_value_heads'):
        lacking.append('text num_key_value_heads')
    if vision is not None:
        lacking += [f'vision {key}' for key in NEEDED if not vision.get(key)]
    if lacking and not reasons:
        raise ValueError(f'{source}: config.json lacks {", ".join(lacking)}: download it again')
    for part, keys in NUMBERS:
        for key in keys:
            value = parts[part].get(key) or 0
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f'{source}: config.json gives {part} {key} as {value!r}, expected '
                                 'a number')
    rope = rope_of(text)
    kind = rope.get('rope_type') or rope.get('type') or 'default'
    if any(isinstance(value, dict) for value in rope.values()):
        kind = 'another one in each kind of layer'
    if kind not in ('default', 'dynamic'):
        reasons.append(f'its rope is {kind}')
    if rope.get('partial_rotary_factor', 1.0) != 1.0:
        reasons.append(f'its partial_rotary_factor is {rope["partial_rotary_factor"]}')
    # without a reason nothing is lacking either, so that the sizes below are there
    if not reasons and text.get('use_sliding_window') and text.get('sliding_window'):
        layers = text.get('layer_types') or []
        if not layers and text['num_hidden_layers'] > text.get('max_window_layers', 28):  # Qwen2's
            layers = ['sliding_attention']  # older configs: those from max_window_layers on
        if 'sliding_attention' in layers and text['sliding_window'] < longest_of(text):
            reasons.append(f'its decoder sees a sliding_window of {text["sliding_window"]} tokens')
    if text['model_type'] != 'qwen2' and text.get('attention_bias'):
        reasons.append('its decoder has attention_bias')
    if vision is not None and not vision.get('qkv_bias', vision.get('attention_bias')):
        reasons.append('its vision tower has no bias on q, k, v')
    for key in ('patch_size', 'image_size'):
        side = parts['vision'].get(key)
        if isinstance(side, list) and len(set(side)) > 1:
            reasons.append(f'its vision {key} is {side}, not square')
    if reasons:
        raise ValueError(f'{source} is not supported: {reasons[0]}; {SUPPORTED}')


def rope_of(text):
    """A text config's rope as a dict: transformers 4 calls it rope_scaling, 5 rope_parameters."""
    rope = text.get('rope_scaling') or text.get('rope_parameters') or {}
    return rope if isinstance(rope, dict) else dict(type=str(rope))


def longest_of(text):
    """Tokens that a text config allows a row: those before any scaling of the rope."""
    by_class = 2048 if text['model_type'] == 'llama' else 32768  # transformers' defaults
    longest = text.get('max_position_embeddings') or by_class
    return min(longest, rope_of(text).get('original_max_position_embeddings') or longest)


def read_config(raw, embedding, tokenizer, source, ends):
    """config.json's dict as a Config: every value that changes the result is honoured here, or
    refused by name. embedding: shape of the embedding. Some copies carry a wrong llm_config beside
    a right text_config. ends: further ids that end an answer."""
    texts = [raw[key] for key in ('text_config', 'llm_config') if raw.get(key)]
    plain = not texts and 'vision_config' not in raw  # a text decoder
    texts = [{'model_type': 'qwen2', **t} for t in (texts or [raw])]
    fit = [t for t in texts if [t.get('vocab_size'), t.get('hidden_size')] == embedding]
    text = (fit or texts)[0]
    vision = None if plain else raw.get('vision_config') or {}
    opengvlab = not plain and 'text_config' not in raw
    if opengvlab:  # OpenGVLab's defaults of absent keys; files of the -hf layout are always v2
        raw = {**raw, 'ps_version': raw.get('ps_version') or 'v1'}
        vision = {'qk_normalization': True, 'norm_type': 'rms_norm', 'qkv_bias': False, **vision}
    # where shapes differ, another kind of decoder or LoRA is the likelier cause, and named first
    if fit or text['model_type'] not in TYPES or raw.get('use_llm_lora'):
        refuse(raw, text, vision, source)
    if not fit:
        described = [[t.get('vocab_size'), t.get('hidden_size')] for t in texts]
        raise ValueError(f'{source}: embed_tokens is {embedding or "missing"}, but config.json '
                         f'describes {described} [vocab_size, hidden_size]')

    def side(key, default):
        value = vision.get(key) or default
        return value[0] if isinstance(value, list) else value

    kind, width, heads = text['model_type'], text['hidden_size'], text['num_attention_heads']
    rope = {**rope_of(text), **(text.get('rope_parameters') or {})}
    # the first becomes the tokenizer's eos_token; InternVL's are the end of a turn and of the text
    names = [tokenizer.eos_token] if plain else ['<|im_end|>', '<|endoftext|>']
    known = tokenizer.get_vocab()
    ends = dict.fromkeys([*(known[name] for name in names if name in known), *ends])
    if not ends or tokenizer.eos_token is None:
        raise ValueError(f'{source}: its tokenizer names no end token (eos_token), so that no '
                         'answer would end')
    pad = tokenizer.pad_token or tokenizer.eos_token
    if not plain and '<|endoftext|>' in known:
        pad = '<|endoftext|>'
    config = Config(
        vocab_size=max(embedding[0], len(tokenizer)), hidden_size=width,
        intermediate_size=text['intermediate_size'], num_hidden_layers=text['num_hidden_layers'],
        num_attention_heads=heads, num_key_value_heads=text.get('num_key_value_heads') or heads,
        head_dim=text.get('head_dim') or (128 if kind == 'qwen3' else width // heads),
        attention_bias=kind == 'qwen2', qk_norm=kind == 'qwen3',
        rms_norm_eps=text.get('rms_norm_eps') or 1e-6, max_position_embeddings=longest_of(text),
        rope_theta=float(rope.get('rope_theta') or text.get('rope_theta') or 1e4),
        vision_num_layers=0, image_token_id=known[IMG_CONTEXT], latent_token_id=known[LATENT],
        eos_token_ids=tuple(ends), pad_token_id=known[pad])
    if plain:
        return config
    return replace(
        config, vision_hidden_size=vision['hidden_size'],
        vision_intermediate_size=vision['intermediate_size'],
        vision_num_layers=vision['num_hidden_layers'],
        vision_num_heads=vision['num_attention_heads'],
        vision_layer_norm_eps=vision.get('layer_norm_eps') or 1e-6,
        patch_size=side('patch_size', 14),
        image_size=raw.get('force_image_size') or side('image_size', 448),
        downsample_ratio=raw.get('downsample_ratio') or 0.5,
        ps_version=raw['ps_version'] if opengvlab else 'v2')


def read_pretrained(name_or_path, dtype):
    """A hub id's or folder's (Config, weights under our names, how many tensors in how many
    files). dtype: 'auto' for the files' own where that is bfloat16, else float32."""
    folder = fetch(name_or_path)
    files = weight_files(folder)
    stored = [name for name in files if not UNUSED.fullmatch(name)]
    raw = read_json(os.path.join(folder, 'config.json'))
    tokenizer = read_tokenizer(folder)
    old_ids = set(tokenizer.get_vocab().values())
    add_special_tokens(tokenizer)  # in place
    new_ids = set(tokenizer.get_vocab().values()) - old_ids
    found = {our_name(name): (shape, kind) for name, (_, shape, kind) in files.items()}
    embedding, kind = found.get(EMBEDDING, (None, ''))
    if dtype == 'auto':
        dtype = torch.bfloat16 if kind == 'BF16' else torch.float32
    ends = []
    for where in (raw, read_json(os.path.join(folder, 'generation_config.json'), {})):
        eos = where.get('eos_token_id')
        ends += [eos] if isinstance(eos, int) else eos or []
    config = read_config(raw, embedding, tokenizer, name_or_path, ends)

    def tensors():
        for name in stored:
            # opened anew for each tensor: closing frees what was read
            with safe_open(files[name][0], 'pt') as file:
                tensor = file.get_tensor(name)
                if our_name(name) in (EMBEDDING, HEAD):
                    tensor = with_new_rows(tensor, old_ids, new_ids, config.vocab_size)
                yield name, tensor.to(dtype, copy=True)

    weights = to_our_names(tensors(), name_or_path)
    # as in transformers 5: a head of its own is used, whatever the config says; where the files
    # hold none the top level says whether it is tied, else the text config, else InternVLConfig,
    # which ties (-hf), where OpenGVLab's, Qwen's and Llama's do not
    text = raw.get('text_config') or raw.get('llm_config') or raw
    tied = raw.get('tie_word_embeddings')
    if tied is None:
        tied = text.get('tie_word_embeddings', 'text_config' in raw)
    if HEAD in weights:
        tied = tied and torch.equal(weights[HEAD], weights[EMBEDDING])
    elif tied:
        weights[HEAD] = weights[EMBEDDING]
    config.tie_word_embeddings = bool(tied)
    left_out = len(files) - len(stored)
    return config, weights, (
        f'{len(stored)} tensors in {len({path for path, *_ in files.values()})} file(s), all used, '
        'none missing' + (f', {left_out} that nothing needs left out' if left_out else '')
        + f'; {config.vocab_size - embedding[0]} rows added')


def with_new_rows(matrix, old_ids, new_ids, rows):
    """Embedding or head [V, D] with `rows` rows: those of new_ids, and all beyond V, are the mean
    of those of old_ids. Spare rows that no token uses stay as they are."""
    is_old = torch.zeros(len(matrix), dtype=torch.bool)
    is_old[[i for i in old_ids if i < len(matrix)]] = True
    total = 0
    # float32 copies of a few rows at a time
    for part, old in zip(matrix.split(8192), is_old.split(8192)):
        total = total + part[old].float().sum(0)
    mean = (total / is_old.sum()).to(matrix.dtype)
    grown = matrix.new_empty(rows, matrix.shape[1])
    grown[:len(matrix)] = matrix
    grown[len(matrix):] = mean
    grown[list(new_ids)] = mean
    return grown


def fill_with(model, weights, source, assign=False):
    """Loads weights. Raises ValueError unless every parameter is filled, every tensor is used and
    all shapes agree."""
    wanted = model.state_dict()
    wrong = [f'{name} is missing' for name in wanted if name not in weights]
    wrong += [f'{name} is not known here' for name in weights if name not in wanted]
    for name in wanted.keys() & weights.keys():
        if weights[name].shape != wanted[name].shape:
            wrong.append(f'{name} is {list(weights[name].shape)}, expected '
                         f'{list(wanted[name].shape)}')
    if wrong:
        raise ValueError(f'{source} does not fit this model, {len(wrong)} tensors differ: '
                         f'{"; ".join(wrong[:3])}')
    model.load_state_dict(weights, assign=assign)


def transformers_config(c, dtype):
    """A Config as transformers' config.json: InternVL's -hf one, or that of a plain decoder. Both
    ways of giving the rope are there, transformers 4's and 5's. ValueError where none computes
    what this model does."""
    kind = 'qwen3' if c.qk_norm else 'qwen2' if c.attention_bias else 'llama'
    if (c.qk_norm and c.attention_bias) or (c.vision_num_layers and c.ps_version != 'v2'):
        raise ValueError('transformers has no such model (qk_norm with attention_bias, or '
                         f'ps_version={c.ps_version}): it cannot be exported')
    dtype = str(dtype).removeprefix('torch.')
    text = dict(
        architectures=[f'{kind.capitalize()}ForCausalLM'], model_type=kind, vocab_size=c.vocab_size,
        hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, hidden_act='silu',
        rms_norm_eps=c.rms_norm_eps, max_position_embeddings=c.max_position_embeddings,
        rope_theta=c.rope_theta, rope_parameters=dict(rope_type='default', rope_theta=c.rope_theta),
        tie_word_embeddings=c.tie_word_embeddings, bos_token_id=None,
        eos_token_id=list(c.eos_token_ids), pad_token_id=c.pad_token_id, dtype=dtype,
        torch_dtype=dtype)
    if not c.vision_num_layers:
        return text
    vision = dict(
        model_type='internvl_vision', hidden_size=c.vision_hidden_size,
        intermediate_size=c.vision_intermediate_size, num_hidden_layers=c.vision_num_layers,
        num_attention_heads=c.vision_num_heads, layer_norm_eps=c.vision_layer_norm_eps,
        image_size=[c.image_size] * 2, patch_size=[c.patch_size] * 2, num_channels=3,
        attention_bias=True, use_qk_norm=False, norm_type='layer_norm', hidden_act='gelu',
        use_mean_pooling=True, use_absolute_position_embeddings=True)
    return dict(
        architectures=['InternVLForConditionalGeneration'], model_type='internvl',
        text_config=text, vision_config=vision, image_token_id=c.image_token_id,
        image_seq_length=c.num_image_tokens, downsample_ratio=c.downsample_ratio,
        projector_hidden_act='gelu', vision_feature_layer=-1,
        vision_feature_select_strategy='default', tie_word_embeddings=c.tie_word_embeddings,
        dtype=dtype, torch_dtype=dtype)


def their_weights(model):
    """A model's weights under transformers' names: of an -hf file, or of a plain decoder's."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == HEAD and model.config.tie_word_embeddings:
            continue
        if not model.config.vision_num_layers:
            weights[name.removeprefix('language_model.')] = tensor.contiguous()
            continue
        parts = {name: tensor}
        if '.attn.qkv.' in name:
            parts = {name.replace('.qkv.', f'.{third}.'): part
                     for third, part in zip('qkv', tensor.chunk(3))}
        for theirs, part in parts.items():
            for of_ours, of_theirs in HF_NAMES:
                theirs = theirs.replace(of_ours, of_theirs)
            weights[theirs] = part.clone()  # q, k and v are views of one tensor
    return weights


def write_pretrained(model, folder, tokenizer, texts):
    """`MultiCoCo.save_pretrained`: all files are written to a folder beside it, which then gets the
    name, so that nothing is ever half there."""
    if os.path.isfile(folder) or os.path.isdir(folder) and os.listdir(folder):
        raise ValueError(f'{folder} holds something already: give a new or an empty folder')
    c = model.config
    config = transformers_config(c, model.language_model.lm_head.weight.dtype)
    known = dict(tokenizer_class='PreTrainedTokenizerFast', eos_token=tokenizer.eos_token,
                 pad_token=tokenizer.convert_ids_to_tokens(c.pad_token_id),
                 bos_token=tokenizer.bos_token, unk_token=tokenizer.unk_token,
                 chat_template=tokenizer.chat_template, clean_up_tokenization_spaces=False)
    generation = dict(eos_token_id=list(c.eos_token_ids), pad_token_id=c.pad_token_id)
    jsons = {'config.json': config, 'generation_config.json': generation, 'tokenizer_config.json':
             {key: value for key, value in known.items() if value is not None}}
    texts = {**texts, 'tokenizer.json': tokenizer.backend_tokenizer.to_str(),
             **{name: json.dumps(content, indent=1) for name, content in jsons.items()}}
    part = f'{os.path.abspath(folder)}.{os.getpid()}.part'
    try:
        os.makedirs(part)
        for name, text in texts.items():
            with open(os.path.join(part, name), 'w', encoding='utf-8') as f:
                f.write(text)
        save_file(their_weights(model), os.path.join(part, 'model.safetensors'), {'format': 'pt'})
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.rename(part, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(f'{folder} was not written ({error}): free some space, or give another '
                      'folder') from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def load_checkpoint(path, dtype=torch.float32):
    """(model in evaluation mode, tokenizer, dict). Of a .pt of train.py: weights float32 whatever
    dtype says, and the rest of the file (knobs, stage, ...). Of a folder or hub id: read in `dtype`
    (see `from_pretrained`), and what sample.py's --export wrote beside the weights, else {}."""
    if not path.endswith('.pt'):
        model, tokenizer = MultiCoCo.from_pretrained(path, dtype), load_tokenizer(path)
        return model, tokenizer, read_json(os.path.join(fetch(path), EXPORTED), {})
    saved = read_checkpoint(path)
    fields = saved['config']
    config = Config(**{**fields, 'eos_token_ids': tuple(fields['eos_token_ids'])})
    model = MultiCoCo(config)
    fill_with(model, saved.pop('model'), path)
    tokenizer = Tokenizer.from_str(saved['tokenizer'])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=tokenizer.id_to_token(config.eos_token_ids[0]),
        pad_token=tokenizer.id_to_token(config.pad_token_id),
        chat_template=saved.get('chat_template'))
    return model.eval(), tokenizer, saved


def read_checkpoint(path):
    """The dict that train.py wrote to a .pt; no pickled code is run."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no checkpoint at {path}: train one first, or give the path of a '
                                '.pt file')
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f'{path} is not a whole checkpoint ({type(error).__name__}): it is cut '
                         'off, or no checkpoint at all; use another one') from None
    if not isinstance(saved, dict) or not {'model', 'config', 'tokenizer', 'knobs'} <= saved.keys():
        raise ValueError(f'{path} is no checkpoint of train.py: it lacks model, config, tokenizer '
                         'or knobs')
    return saved
