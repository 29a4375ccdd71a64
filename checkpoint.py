"""
Checkpoints: InternVL's files and tokenizer, in OpenGVLab's layout and transformers' (-hf), and the .pt that train.py
writes.

Nothing here knows the model: read_pretrained gives the fields of its Config and weights under our names, load_weights
fills a module with them. Import is total both ways: a tensor that no row of KEYS names, or a parameter that none
fills, is an error. Hub code is never run, and no pickle is unpacked (`weights_only=True`).
"""
import contextlib
import errno
import json
import os
import pickle
import re
import shutil

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

IMG, END_IMG, IMG_CONTEXT = '<img>', '</img>', '<IMG_CONTEXT>'
START_LATENT, LATENT, END_LATENT = '<|start-latent|>', '<|latent|>', '<|end-latent|>'
SPECIAL_TOKENS = (IMG, END_IMG, IMG_CONTEXT, START_LATENT, LATENT, END_LATENT)
EMBEDDING, HEAD = 'language_model.model.embed_tokens.weight', 'language_model.lm_head.weight'


# --- tokenizer --------------------------------------------------------------------------------------------------------

def load_tokenizer(name_or_path):
    """The checkpoint's tokenizer with every token of SPECIAL_TOKENS present, each added only if it is not there yet."""
    return add_special_tokens(read_tokenizer(fetch(name_or_path)))


def read_tokenizer(folder):
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of internvl_chat, whose config it need not know
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise OSError(f'no tokenizer could be loaded from {folder}: {str(error).splitlines()[0]}') from None
    finally:
        transformers.logging.set_verbosity(verbosity)


def add_special_tokens(tokenizer):
    known = tokenizer.get_vocab()
    new = [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS if t not in known]
    tokenizer.add_special_tokens({'additional_special_tokens': new}, replace_extra_special_tokens=False)
    for token in SPECIAL_TOKENS:
        ids, own = tokenizer.encode(f'a{token}b', add_special_tokens=False), tokenizer.convert_tokens_to_ids(token)
        assert ids.count(own) == 1, f'{token} is not a token of its own: it became {ids}'
        assert own != tokenizer.unk_token_id, f'{token} is the unknown token'
    return tokenizer


def train_tokenizer(texts, folder, vocab_size=512):
    """A byte-level BPE tokenizer with InternVL's and Coconut's special tokens, saved in transformers' format."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>', *SPECIAL_TOKENS]))
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token='<|im_end|>', pad_token='<|endoftext|>')
    wrapped.save_pretrained(folder)


# --- InternVL's files -------------------------------------------------------------------------------------------------

def fetch(name_or_path):
    """A local folder as it is; a hub id's files from the hub's cache, or from the hub if they are not all there."""
    if os.path.isdir(name_or_path):
        return name_or_path
    if os.path.exists(name_or_path) or not re.fullmatch(r'[\w.-]+/[\w.-]+', name_or_path):
        raise FileNotFoundError(f'{name_or_path} is neither a folder nor a hub id like '
                                'OpenGVLab/InternVL3-1B-Pretrained')
    wanted = dict(allow_patterns=['*.json', '*.safetensors', '*.txt'])
    try:
        folder = snapshot_download(name_or_path, local_files_only=True, **wanted)
        weight_files(folder)
        return folder
    except (OSError, ValueError):
        pass  # not in the cache, or not whole there: ask the hub
    try:
        return snapshot_download(name_or_path, **wanted)
    except (OSError, ValueError, RuntimeError) as error:  # offline, no such repository, no access
        raise OSError(f'{name_or_path} is not in the local cache and the hub could not be reached '
                      f'({type(error).__name__}): give a local folder of the checkpoint, or train the built-in data '
                      'set with config/toy.py') from None


def weight_files(folder):
    """Tensor name -> its safetensors file, and tensor name -> shape, of a checkpoint folder."""
    index, single = (os.path.join(folder, name) for name in ('model.safetensors.index.json', 'model.safetensors'))
    if not os.path.isfile(os.path.join(folder, 'config.json')):
        raise FileNotFoundError(f'{folder} holds no config.json: give the folder of a whole InternVL checkpoint')
    paths = [single]
    if os.path.isfile(index):
        with open(index, encoding='utf-8') as f:
            paths = [os.path.join(folder, name) for name in sorted(set(json.load(f)['weight_map'].values()))]
    elif not os.path.isfile(single):
        raise FileNotFoundError(f'{folder} holds no model.safetensors and no model.safetensors.index.json: only '
                                'safetensors are read, so convert .bin files first')
    files, shapes = {}, {}
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f'{folder} lacks {os.path.basename(path)}, which its index names: '
                                    'download it again')
        try:
            with safe_open(path, 'pt') as file:
                files.update((name, path) for name in file.keys())
                shapes.update((name, file.get_slice(name).get_shape()) for name in file.keys())
        except SafetensorError as error:
            raise ValueError(f'{path} is damaged ({error}): download it again') from None
    return files, shapes


# file name -> our name, None where they are the same; a name that fits no row is an error
BLOCK = r'vision_tower\.encoder\.layer\.(\d+)\.'
KEYS = {re.compile(pattern): ours for pattern, ours in {
    r'language_model\..+|mlp1\.[013]\.(?:weight|bias)': None,
    # OpenGVLab
    r'vision_model\.embeddings\.class_embedding': 'vision_model.cls_token',
    r'vision_model\.embeddings\.position_embedding': 'vision_model.pos_embed',
    r'vision_model\.embeddings\.patch_embedding\.(.+)': r'vision_model.patch_embed.proj.\1',
    r'vision_model\.encoder\.layers\.(\d+)\.(ls[12])': r'vision_model.blocks.\1.\2.gamma',
    r'vision_model\.encoder\.layers\.(\d+)\.((?:norm[12]|attn|mlp)\..+)': r'vision_model.blocks.\1.\2',
    # -hf
    r'vision_tower\.embeddings\.cls_token': 'vision_model.cls_token',
    r'vision_tower\.embeddings\.position_embeddings': 'vision_model.pos_embed',
    r'vision_tower\.embeddings\.patch_embeddings\.projection\.(.+)': r'vision_model.patch_embed.proj.\1',
    BLOCK + r'lambda_([12])': r'vision_model.blocks.\1.ls\2.gamma',
    BLOCK + r'layernorm_before\.(.+)': r'vision_model.blocks.\1.norm1.\2',
    BLOCK + r'layernorm_after\.(.+)': r'vision_model.blocks.\1.norm2.\2',
    BLOCK + r'attention\.(?P<third>[qkv])_proj\.(.+)': r'vision_model.blocks.\1.attn.qkv.\3',
    BLOCK + r'attention\.projection_layer\.(.+)': r'vision_model.blocks.\1.attn.proj.\2',
    BLOCK + r'(mlp\..+)': r'vision_model.blocks.\1.\2',
    r'multi_modal_projector\.layer_norm\.(.+)': r'mlp1.0.\1',
    r'multi_modal_projector\.linear_1\.(.+)': r'mlp1.1.\1',
    r'multi_modal_projector\.linear_2\.(.+)': r'mlp1.3.\1'}.items()}


def rename(name):
    """A file's tensor name -> (our name, 'q', 'k' or 'v' if it is a third of our fused qkv)."""
    for pattern, ours in KEYS.items():
        if match := pattern.fullmatch(name):
            return (name if ours is None else match.expand(ours)), match.groupdict().get('third')
    return name, None  # load_weights reports it as not known


def to_our_names(tensors, source):
    """Pairs of a file's tensor name and tensor -> {our name: tensor}, the thirds of qkv joined."""
    weights, thirds = {}, {}
    for name, tensor in tensors:
        ours, third = rename(name)
        if third is None:
            weights[ours] = tensor
        else:
            thirds.setdefault(ours, {})[third] = tensor
    for ours, parts in thirds.items():
        if len(parts) < 3:
            raise ValueError(f'{source}: of {ours} only {", ".join(sorted(parts))} is there, expected q, k and v')
        weights[ours] = torch.cat([parts[third] for third in 'qkv'])
    return weights


def with_mean_rows(matrix, known, rows):
    """Embedding or head [V, D] with `rows` rows; those of ids that no token had are the mean of those that one had."""
    had = torch.zeros(rows, dtype=torch.bool)
    had[[i for i in known if i < len(matrix)]] = True
    parts = zip(matrix.split(8192), had[:len(matrix)].split(8192))  # float32 copies of a few rows at a time
    mean = sum(part[here].float().sum(0) for part, here in parts) / had.sum()
    grown = matrix.new_empty(rows, matrix.shape[1])
    grown[:len(matrix)] = matrix
    grown[~had] = mean.to(matrix.dtype)
    return grown


def config_fields(c, shapes, tokenizer, source):
    """
    A checkpoint's config.json as the fields of our Config. Some copies carry a wrong llm_config beside a right
    text_config.
    """
    embedding = shapes.get(EMBEDDING, 'missing')
    candidates = [c[key] for key in ('llm_config', 'text_config') if c.get(key)]
    fit = [t for t in candidates if [t.get('vocab_size'), t.get('hidden_size')] == embedding]
    if not fit:
        described = [[t.get('vocab_size'), t.get('hidden_size')] for t in candidates]
        raise ValueError(f'{source}: embed_tokens is {embedding}, but config.json describes {described} '
                         '[vocab_size, hidden_size]')
    t, v = fit[0], c['vision_config']
    rope, kind = t.get('rope_parameters') or t, t.get('model_type')
    scaling = (t.get('rope_scaling') or t.get('rope_parameters') or {}).get('rope_type', 'default')
    pair = lambda x: x[0] if isinstance(x, (list, tuple)) else x
    for reason, holds in {
            f'its decoder is {kind}, not qwen2 or qwen3': kind not in ('qwen2', 'qwen3'),
            'its vision tower is InternViT-6B with query/key norm, which timm cannot express':
                v.get('qk_normalization') or v.get('use_qk_norm') or v.get('norm_type') == 'rms_norm',
            'its vision tower has no bias on q, k, v': not v.get('qkv_bias', v.get('attention_bias')),
            f'its rope is {scaling}': scaling not in ('default', 'dynamic'),
            'it reads an inner layer of the vision tower':
                c.get('select_layer', c.get('vision_feature_layer', -1)) != -1}.items():
        if holds:
            raise ValueError(f'{source} is not supported: {reason}; InternVL2.5/3 1B, 2B, 8B, 14B and InternVL3.5 with '
                             'Qwen are')
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL_TOKENS, '<|im_end|>', '<|endoftext|>')}
    return dict(
        vocab_size=max(embedding[0], len(tokenizer)), hidden_size=t['hidden_size'],
        intermediate_size=t['intermediate_size'], num_hidden_layers=t['num_hidden_layers'],
        num_attention_heads=t['num_attention_heads'], num_key_value_heads=t['num_key_value_heads'],
        head_dim=t.get('head_dim') or t['hidden_size'] // t['num_attention_heads'],
        attention_bias=kind == 'qwen2', qk_norm=kind == 'qwen3', rms_norm_eps=t['rms_norm_eps'],
        rope_theta=float(rope.get('rope_theta', 1e4)), max_position_embeddings=t['max_position_embeddings'],
        tie_word_embeddings=bool(c.get('tie_word_embeddings', False)),
        vision_hidden_size=v['hidden_size'], vision_intermediate_size=v['intermediate_size'],
        vision_num_layers=v['num_hidden_layers'], vision_num_heads=v['num_attention_heads'],
        patch_size=pair(v['patch_size']), image_size=c.get('force_image_size') or pair(v['image_size']),
        downsample_ratio=c.get('downsample_ratio', 0.5), ps_version=c.get('ps_version', 'v2'),
        image_token_id=ids[IMG_CONTEXT], latent_token_id=ids[LATENT],
        eos_token_ids=(ids['<|im_end|>'], ids['<|endoftext|>']), pad_token_id=ids['<|endoftext|>'])


def read_pretrained(name_or_path, dtype):
    """
    InternVL from a hub id or a local folder: (fields of Config, weights under our names, how many tensors in how many
    files). The rows of tokens that `load_tokenizer` adds are the mean of the rows that were there. Memory peaks near
    the size of the weights.
    """
    folder = fetch(name_or_path)
    files, shapes = weight_files(folder)
    tokenizer = read_tokenizer(folder)
    known = set(tokenizer.get_vocab().values())  # before ours join them
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
        fields = config_fields(json.load(f), shapes, add_special_tokens(tokenizer), name_or_path)

    def tensors():
        for name, path in files.items():
            with safe_open(path, 'pt') as file:  # opened for each tensor: closing lets go of the pages that were read
                tensor = file.get_tensor(name)
                if rename(name)[0] in (EMBEDDING, HEAD):
                    tensor = with_mean_rows(tensor, known, fields['vocab_size'])
                yield name, tensor.to(dtype, copy=True)

    weights = to_our_names(tensors(), name_or_path)
    if fields['tie_word_embeddings']:
        weights[HEAD] = weights[EMBEDDING]
    return fields, weights, (f'{len(shapes)} tensors in {len(set(files.values()))} file(s), all used, none missing; '
                             f'{fields["vocab_size"] - shapes[EMBEDDING][0]} rows added')


def load_weights(model, weights, source, assign=False):
    """Total both ways: every parameter is filled, every tensor is used, shapes agree."""
    want = model.state_dict()
    wrong = [f'{name} is missing' for name in want if name not in weights]
    wrong += [f'{name} is not known here' for name in weights if name not in want]
    wrong += [f'{name} is {list(weights[name].shape)}, expected {list(want[name].shape)}'
              for name in want if name in weights and weights[name].shape != want[name].shape]
    if wrong:
        raise ValueError(f'{source} does not fit this model, {len(wrong)} tensors differ: {"; ".join(wrong[:3])}')
    model.load_state_dict(weights, assign=assign)


# --- train.py's own file ----------------------------------------------------------------------------------------------

def read_checkpoint(path):
    """The dict that train.py wrote."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f'no checkpoint at {path}: train one first, or give the path of a .pt file')
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(f'{path} is not a whole checkpoint ({type(error).__name__}): it is cut off, or no checkpoint '
                         'at all; use another one') from None
    if not isinstance(checkpoint, dict) or not {'model', 'config', 'tokenizer', 'knobs'} <= checkpoint.keys():
        raise ValueError(f'{path} is no checkpoint of train.py: it lacks model, config, tokenizer or knobs')
    return checkpoint


def write_checkpoint(path, state):
    """A dict of plain types and tensors, on the disk under a temporary name before it takes its own."""
    with replacing(path) as part:
        with open(part, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())


def tokenizer_from(text, eos, pad):
    """The tokenizer of a checkpoint's JSON text; eos and pad are ids."""
    tokenizer = Tokenizer.from_str(text)
    eos, pad = map(tokenizer.id_to_token, (eos, pad))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad)


@contextlib.contextmanager
def replacing(path):
    """Gives a temporary name to write to; renames it to path when all is written, removes it when not."""
    part = f'{path}.{os.getpid()}.part'
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch and numpy do not pass the system's reason on: look for it
        folder = os.path.dirname(path) or '.'
        full = os.path.isdir(folder) and shutil.disk_usage(folder).free < 2**20
        if getattr(error, 'errno', None) == errno.ENOSPC or full:
            raise OSError(f'the disk is full: {path} was not written, what was there before is untouched; free some '
                          'space') from None
        if isinstance(error, OSError):
            raise OSError(f'{path} cannot be written ({error.strerror or error}): give another folder, or make this '
                          'one writable') from None
        raise
    finally:
        if os.path.exists(part):
            os.remove(part)
