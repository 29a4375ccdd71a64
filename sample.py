"""
Answers questions about images with continuous thoughts.

    python sample.py --ckpt out/best.pt --image cat.jpg
    python sample.py --ckpt out-toy/best.pt --image data/toy/images/test/00000.png --question "Four doors from red?" \\
                     --choices "blue|green|pink|white" --show_thoughts 5

--image takes one file, several separated by commas, or a folder; all are answered in one batch.
"""
import os
import sys
import time

import torch
from PIL import Image

from configurator import configure
from evaluate import respond
from model import load_checkpoint
from prepare import LETTERS, collate, encode, load_image, tile_image

# --- knobs ------------------------------------------------------------------------------------------------------------
ckpt = 'out/best.pt'                      # a .pt of train.py, or a folder or hub id of InternVL
image = ''                                # file, files separated by commas, or folder; '' for no image
question = 'Describe the image.'
choices = ''                              # options separated by |, for a multiple-choice question
num_thoughts = -1                         # -1 for as many as in the checkpoint's stage
max_new_tokens = 128
temperature = 0.0                         # 0 for greedy
top_p = 1.0
show_thoughts = 0                         # how many top tokens to print for each thought
device = 'auto'                           # 'auto', 'cpu', 'cuda', 'mps'
dtype = 'auto'                            # of the weights: 'float32', 'bfloat16'; 'auto' is bfloat16 on a GPU
compile = False                           # compile the decoding step: a minute once, then faster long answers
seed = 1337

UNTRAINED = dict(mode='coconut', c_thought=1, max_latent_stage=0, max_tiles=12, answer='{letter}', template='chatml',
                 visual_bridge=False, pad_latent_to_max=True)  # how a checkpoint that was not trained here is asked
ASKED = '<image>\n{question}'
DIRECTLY = "\n{choices}\nAnswer with the option's letter from the given choices directly."  # InternVL's own words


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


def find_images(image):
    """The files that --image names, in order."""
    if os.path.isdir(image):
        names = [name for name in sorted(os.listdir(image)) if not name.startswith('.')]
        kinds = tuple(Image.registered_extensions())
        found = [name for name in names if name.lower().endswith(kinds)]
        if not found:
            raise ValueError(f'the folder {image} holds no image: give a file, or a folder of png, jpg, webp, tif or '
                             'other image files')
        if len(found) < len(names):
            print(f'{image}: {len(names) - len(found)} files are left out, their endings are not those of images')
        return [os.path.join(image, name) for name in found]
    if os.path.isfile(image):
        return [image]  # a comma may be part of its name
    return [name.strip() for name in image.split(',') if name.strip()] or [None]


if __name__ == '__main__':
    globals().update(configure(globals()))
    device = pick_device(device)
    model, tokenizer, saved = load_checkpoint(ckpt)
    model.to(device, getattr(torch, pick_dtype(dtype, device)))
    if compile:
        model.step = torch.compile(model.step, mode='reduce-overhead' if device == 'cuda' else 'default', dynamic=False)
    config, knobs, stage = model.config, saved.get('knobs', UNTRAINED), saved.get('stage', 0)
    torch.manual_seed(seed)

    # --- rows ---------------------------------------------------------------------------------------------------------
    options = [c.strip() for c in choices.split('|')] if choices else []
    if options and (not 2 <= len(options) <= len(LETTERS) or not all(options)):
        raise ValueError(f'--choices={choices!r} gives {len(options)} options: expected 2 to {len(LETTERS)}, none of '
                         'them empty, as in "cat|dog|bird"')
    of_text = ('mode', 'c_thought', 'max_latent_stage', 'prompt', 'answer', 'template', 'visual_bridge',
               'pad_latent_to_max')
    text = {k: knobs[k] for k in of_text if k in knobs}
    if 'prompt' not in knobs:
        text['prompt'] = ASKED + DIRECTLY if options else ASKED
    if num_thoughts >= 0:
        text.update(c_thought=1, max_latent_stage=num_thoughts)
        stage = num_thoughts
    files = find_images(image)
    tiles = [tile_image(load_image(f), config.image_size, max_tiles=knobs['max_tiles']) if f else None for f in files]
    rows = [encode(dict(question=question, choices=options, image=f, question_id=f or 'question'), tokenizer, stage, t,
                   supervised=False, max_length=config.max_position_embeddings,
                   num_image_tokens=config.num_image_tokens, **text) for f, t in zip(files, tiles)]

    # --- answers ------------------------------------------------------------------------------------------------------
    thoughts = []

    def keep(k, thought):
        thought = model.as_pause(k, thought) if text['mode'] == 'pause' else thought
        thoughts.append(thought)
        return thought

    began = time.time()
    said = respond(model, tokenizer, collate(rows), [dict(choices=options)] * len(files), knobs['answer'],
                   max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                   edit_thought=keep if show_thoughts > 0 or text['mode'] == 'pause' else None)
    seconds = time.time() - began
    usual = model.embed_text(torch.arange(config.vocab_size, device=device)).norm(dim=-1).mean()
    for b, (file, one) in enumerate(zip(files, said)):
        P = 0 if tiles[b] is None else len(tiles[b])
        print(f'\n{file or "no image"}: {P} tiles, {P * config.num_image_tokens} visual tokens, {one["thoughts"]} '
              f'thoughts, {one["tokens"]} tokens written')
        for k in range(one['thoughts'] if show_thoughts > 0 else 0):
            p = model.language_model.lm_head(thoughts[k][b]).float().softmax(-1)
            p, top = p.topk(min(show_thoughts, config.vocab_size))
            says = '  '.join(f'{tokenizer.decode([t])!r} {q:.2f}' for q, t in zip(p.tolist(), top.tolist()))
            print(f'  thought {k + 1}: {says}  (norm {thoughts[k][b].norm():.2f}, an embedding has {usual:.2f})')
        print(f'{question} {" | ".join(options)}'.rstrip() + f'\n{one["text"]}')
        if options:
            chosen = f'-> {LETTERS[one["choice"]]}. {options[one["choice"]]}'
            print(chosen if one['parsed'] else '-> no option could be read from this answer')
    print(f'\n{len(files)} answers in {seconds:.1f} s on {device}, peak memory {peak_memory(device) / 1e9:.2f} GB')
