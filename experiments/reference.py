"""
The slow, plain paths that bench.py and the tests compare with: transformers' InternVL with our
weights, one pass over it, and Coconut's published loops (arXiv 2412.06769) written over it.

    floor_loss           one plain pass, head at supervised positions only: no thought can cost less
    published_loss       one pass a thought over aligned rows, cache reused, head everywhere
    plain_generate       transformers' generate, without thoughts
    published_generate   one row at a time; every new token recomputes the row from its start

Batches are those of model.py's forward, on the model's device.
"""

import torch
import torch.nn.functional as F
from transformers import DynamicCache, Qwen2Config
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

from model import IMAGE_MEAN, IMAGE_STD, MultiCoCo, fill_with, to_our_names


def models(c, seed=0):
    """Ours, of a Config with a Qwen2 decoder, and transformers' InternVL with the same random
    weights."""
    text = Qwen2Config(vocab_size=c.vocab_size, hidden_size=c.hidden_size,
                       intermediate_size=c.intermediate_size, head_dim=c.head_dim,
                       num_hidden_layers=c.num_hidden_layers,
                       num_attention_heads=c.num_attention_heads,
                       num_key_value_heads=c.num_key_value_heads,
                       max_position_embeddings=c.max_position_embeddings,
                       rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=False,
                       rope_parameters={'rope_type': 'default', 'rope_theta': c.rope_theta})
    vision = InternVLVisionConfig(hidden_size=c.vision_hidden_size,
                                  intermediate_size=c.vision_intermediate_size, attention_bias=True,
                                  num_hidden_layers=c.vision_num_layers,
                                  num_attention_heads=c.vision_num_heads,
                                  image_size=[c.image_size] * 2, patch_size=[c.patch_size] * 2)
    torch.manual_seed(seed)
    ours = MultiCoCo(c)
    theirs = InternVLForConditionalGeneration(
        InternVLConfig(vision_config=vision, text_config=text, image_token_id=c.image_token_id,
                       tie_word_embeddings=False))
    fill_with(ours, to_our_names(theirs.state_dict().items(), 'transformers'), 'transformers')
    return ours, theirs.eval()


def normalised(tiles):
    mean, std = (torch.tensor(v, device=tiles.device)[:, None, None]
                 for v in (IMAGE_MEAN, IMAGE_STD))
    return (tiles.float() / 255 - mean) / std


def embed(theirs, batch):
    """transformers' fused embeddings [B, T, D], the ViT run once."""
    visual = theirs.model.get_image_features(normalised(batch['pixel_values']))
    visual = getattr(visual, 'pooler_output', visual)  # transformers 4 gives the tensor itself
    x = theirs.get_input_embeddings()(batch['input_ids'])
    here = batch['input_ids'] == theirs.config.image_token_id
    return x.masked_scatter(here[..., None], visual.to(x.dtype))


def floor_loss(theirs, batch):
    """Right padding under causal attention needs no mask."""
    hidden = theirs.model.language_model(inputs_embeds=embed(theirs, batch),
                                         use_cache=False).last_hidden_state
    row, at = (batch['labels'][:, 1:] != -100).nonzero(as_tuple=True)
    return F.cross_entropy(theirs.lm_head(hidden[row, at]).float(), batch['labels'][row, at + 1])


def published_loss(theirs, batch, latent):
    """Thoughts, the tokens `latent`, aligned by left padding, put into nested lists of tensors:
    loss and logits."""
    ids, mask, labels = batch['input_ids'], batch['attention_mask'], batch['labels']
    x = embed(theirs, batch)
    first = [(row == latent).nonzero()[:, 0] for row in ids]
    shift = max(int(at[0]) for at in first)
    left = [shift - int(at[0]) for at in first]
    T = max(n + int(m.sum()) for n, m in zip(left, mask))

    def pad(v, fill):
        sides = lambda row, n: (0, 0) * (row.dim() - 1) + (n, max(0, T - n - len(row)))
        return torch.stack(
            [F.pad(row[:T - n], sides(row, n), value=fill) for n, row in zip(left, v)])

    x, mask, labels = pad(x, 0.0), pad(mask, 0), pad(labels, -100)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    n, cache, logits, start, stop = len(first[0]), DynamicCache(), [], 0, shift
    for k in range(n + 1):
        out = theirs.model.language_model(inputs_embeds=x[:, start:stop],
                                          attention_mask=mask[:, :stop],
                                          position_ids=position[:, start:stop],
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


def plain_generate(theirs, batch, new_tokens):
    """Padded on the left, as transformers wants it."""
    shifts = [-int(m.sum()) for m in batch['attention_mask']]
    turned = {
        key: torch.stack([row.roll(n)
                          for row, n in zip(batch[key], shifts)])
        for key in ('input_ids', 'attention_mask')
    }
    return theirs.generate(**turned, pixel_values=normalised(batch['pixel_values']),
                           max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
                           pad_token_id=0)[:, batch['input_ids'].shape[1]:]


def published_generate(theirs, batch, latent, new_tokens):
    answers = []
    for b, tiles in enumerate(batch['pixel_values'].split(batch['num_tiles'].tolist())):
        ids = batch['input_ids'][b:b + 1, :int(batch['attention_mask'][b].sum())]
        x = embed(theirs, dict(input_ids=ids, pixel_values=tiles))
        thoughts, cache, start = (ids[0] == latent).nonzero()[:, 0].tolist(), DynamicCache(), 0
        for stop in [*thoughts, x.shape[1]]:
            out = theirs.model.language_model(inputs_embeds=x[:, start:stop], past_key_values=cache,
                                              use_cache=True)
            theirs.lm_head(out.last_hidden_state)
            if stop < x.shape[1]:
                x = torch.cat((x[:, :stop], out.last_hidden_state[:, -1:], x[:, stop + 1:]), 1)
            start = stop
        new, hidden = [], out.last_hidden_state
        for i in range(new_tokens):
            new.append(theirs.lm_head(hidden)[0, -1].argmax())
            if i + 1 < new_tokens:
                x = torch.cat((x, theirs.get_input_embeddings()(new[-1])[None, None]), 1)
                hidden = theirs.model.language_model(inputs_embeds=x,
                                                     use_cache=False).last_hidden_state
        answers.append(torch.stack(new))
    return torch.stack(answers)
