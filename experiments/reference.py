"""
The slow, plain paths that bench.py and the tests compare with: transformers' InternVL with our
weights, one pass over it, and Coconut's published loop (arXiv 2412.06769) written over it.

    floor_loss       one plain pass, head at supervised positions only: no thought can cost less
    published_loss   one pass a thought over aligned rows, cache reused, head everywhere
    plain_generate   transformers' generate, without thoughts

Batches are those of model.py's forward, on the model's device.
"""
import torch
import torch.nn.functional as F
from transformers import DynamicCache, InternVLForConditionalGeneration

from experiments.export import to_transformers
from model import IMAGE_MEAN, IMAGE_STD, MultiCoCo, our_name


def models(c, seed=0):
    """Ours, of a Config, and transformers' InternVL: both over the same random weights, one copy
    of them."""
    torch.manual_seed(seed)
    theirs = InternVLForConditionalGeneration(to_transformers(c)).eval()
    weights = {our_name(name): tensor for name, tensor in theirs.state_dict().items()}
    for name in [name for name in weights if '.attn.q.' in name]:  # we have them in one
        parts = [weights.pop(name.replace('.q.', f'.{part}.')) for part in 'qkv']
        weights[name.replace('.q.', '.qkv.')] = torch.cat(parts)
    return MultiCoCo.of_weights(c, weights), theirs


def normalised(tiles):
    mean, std = torch.tensor((IMAGE_MEAN, IMAGE_STD), device=tiles.device)[..., None, None]
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
    thoughts_at = [(row == latent).nonzero()[:, 0] for row in ids]
    n, first = len(thoughts_at[0]), max(int(at[0]) for at in thoughts_at)
    left = [first - int(at[0]) for at in thoughts_at]
    T = max(shift + int(m.sum()) for shift, m in zip(left, mask))

    def align(values, fill):
        """Rows [B, T, ...], each moved right by its `left`."""
        moved = values.new_full((len(values), T, *values.shape[2:]), fill)
        for b, shift in enumerate(left):
            length = min(values.shape[1], T - shift)
            moved[b, shift:shift + length] = values[b, :length]
        return moved

    x, mask, labels = align(x, 0), align(mask, 0), align(labels, -100)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    cache, logits, start, stop = DynamicCache(), [], 0, first
    for k in range(n + 1):
        out = theirs.model.language_model(
            inputs_embeds=x[:, start:stop], attention_mask=mask[:, :stop],
            position_ids=position[:, start:stop], past_key_values=cache, use_cache=True)
        logits.append(theirs.lm_head(out.last_hidden_state))
        if k < n:
            cells = [[x[b, t] for t in range(T)] for b in range(len(x))]
            for b in range(len(x)):
                cells[b][stop] = out.last_hidden_state[b, -1]
            x = torch.stack([torch.stack(row) for row in cells])
        start, stop = stop, stop + 1 if k + 1 < n else T
    logits = torch.cat(logits, 1)  # the published code gives them to the caller, so they live on
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()), logits


def plain_generate(theirs, batch, new_tokens):
    """Padded on the left, as transformers wants it."""
    turned = {key: torch.stack([row.roll(-int(m.sum()))
                                for row, m in zip(batch[key], batch['attention_mask'])])
              for key in ('input_ids', 'attention_mask')}
    return theirs.generate(**turned, pixel_values=normalised(batch['pixel_values']),
                           max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
                           pad_token_id=0)[:, batch['input_ids'].shape[1]:]
