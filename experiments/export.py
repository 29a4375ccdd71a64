"""
Writes a checkpoint as a folder that transformers (4.56 or later) loads without this code, and that
is one for --ckpt and --init_from too:

    python -m experiments.export --ckpt=out/best.pt --folder=FOLDER
"""
import json
from pathlib import Path

import transformers

from configurator import configure
from model import END_IMG, IMAGE_MEAN, IMAGE_STD, IMG, IMG_CONTEXT, TEXT, VISION
from model import load_checkpoint, our_name

ckpt = 'out/best.pt'  # a .pt of train.py, or a model's folder or hub id
folder = ''           # a new folder

CARD = """# {name}
Written by MultiCoCo from {ckpt}. `transformers.{kind}.from_pretrained` loads it.

Training: {training}.

Its thoughts (`{thought}`): behind the prompt stand `<|start-latent|>`, n times `<|latent|>`,
`<|end-latent|>`, and each `<|latent|>` is fed what the hidden state before it becomes.
transformers' `generate` does not do this; MultiCoCo's `python sample.py --ckpt FOLDER` does.
"""


def to_transformers(c):
    """A Config as transformers' own."""
    text = {key: getattr(c, key) for key in TEXT}
    text.update(head_dim=c.head_dim, rope_theta=c.rope_theta, rope_scaling=None, bos_token_id=None,
                model_type='qwen3' if c.qk_norm else 'qwen2' if c.attention_bias else 'llama',
                eos_token_id=list(c.eos_token_ids), pad_token_id=c.pad_token_id,
                tie_word_embeddings=c.tie_word_embeddings)
    if not c.vision_num_layers:
        return transformers.AutoConfig.for_model(**text)
    vision = {key: getattr(c, ours) for key, ours in VISION.items()}
    vision.update(attention_bias=True, image_size=[c.image_size] * 2, patch_size=[c.patch_size] * 2)
    return transformers.InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=c.image_token_id,
        image_seq_length=c.num_image_tokens, downsample_ratio=c.downsample_ratio,
        tie_word_embeddings=c.tie_word_embeddings)


def to_their_model(model):
    """transformers' model with a copy of our weights, in evaluation mode."""
    kind, ours = transformers.AutoModelForCausalLM, model.state_dict()
    if model.config.vision_num_layers:
        kind = transformers.AutoModelForImageTextToText
    dtype = model.language_model.lm_head.weight.dtype
    theirs = kind.from_config(to_transformers(model.config), dtype=dtype)
    for name in [name for name in ours if '.attn.qkv.' in name]:  # theirs are three
        for letter, part in zip('qkv', ours[name].chunk(3)):
            ours[name.replace('.qkv.', f'.{letter}.')] = part
    weights = {name: ours[our_name(name)] for name in theirs.state_dict()}
    theirs.load_state_dict(weights)
    # version 4 does not read what 5 writes as rope_parameters, and would take another theta
    theirs.config.get_text_config().rope_theta = model.config.rope_theta
    return theirs.eval()


if __name__ == '__main__':
    configure(globals())
    assert folder and not Path(folder).exists(), f'give a new --folder, not {folder!r}'
    model, tokenizer, saved = load_checkpoint(ckpt, 'auto')
    theirs, c = to_their_model(model), model.config
    keys = ('knobs', 'stage', 'epoch', 'step', 'accuracy', 'examples')
    noted = {key: saved[key] for key in keys if key in saved}
    theirs.config.multicoco = dict(noted, thought=c.thought)
    theirs.generation_config = transformers.GenerationConfig(
        eos_token_id=list(c.eos_token_ids), pad_token_id=c.pad_token_id)
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # as version 4 writes it, for 5 reads that too; for AutoProcessor as well where there are images
    path = Path(folder, 'tokenizer_config.json')
    written = json.loads(path.read_text('utf-8'))
    written.update(tokenizer_class='PreTrainedTokenizerFast',
                   model_input_names=['input_ids', 'attention_mask'])
    if c.vision_num_layers:
        written['extra_special_tokens'] = dict(
            start_image_token=IMG, end_image_token=END_IMG, context_image_token=IMG_CONTEXT,
            video_token=tokenizer.pad_token)  # it wants one: a token that no prompt holds
        processor = dict(processor_class='InternVLProcessor', image_seq_length=c.num_image_tokens)
        Path(folder, 'processor_config.json').write_text(json.dumps(processor), 'utf-8')
        transformers.GotOcr2ImageProcessor(
            size=dict(height=c.image_size, width=c.image_size), image_mean=list(IMAGE_MEAN),
            image_std=list(IMAGE_STD), max_patches=noted.get('knobs', {}).get('max_tiles', 12),
            crop_to_patches=True).save_pretrained(folder)
        transformers.InternVLVideoProcessor().save_pretrained(folder)
    path.write_text(json.dumps(written, indent=2), 'utf-8')
    training = [f'{key} {noted[key]}' for key in ('stage', 'epoch', 'step') if key in noted]
    if 'accuracy' in noted:
        training.append('accuracy {accuracy:.1%} of {examples} validation rows'.format(**noted))
    card = CARD.format(name=Path(folder).resolve().name, ckpt=ckpt, kind=type(theirs).__name__,
                       training=', '.join(training) or 'none by MultiCoCo', thought=c.thought)
    Path(folder, 'README.md').write_text(card, 'utf-8')
    print(f'wrote {folder}, for transformers and for --ckpt={folder}')
