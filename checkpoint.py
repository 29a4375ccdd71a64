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
    """
    From the tokenizer's own files alone, tokenizer.json or Qwen2's vocab.json and merges.txt. config.json and
    tokenizer_config.json may name code of the folder: transformers' Auto classes would ask to run it.
    """
    def has(*names):
        return all(os.path.isfile(os.path.join(folder, name)) for name in names)

    if has('tokenizer.json'):
        kind = transformers.PreTrainedTokenizerFast
    elif has('vocab.json', 'merges.txt'):
        kind = transformers.Qwen2TokenizerFast
    else:
        raise OSError(f'no tokenizer could be loaded from {folder}: it holds neither tokenizer.json nor vocab.json '
                      'and merges.txt')
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of another class's name in tokenizer_config.json
    try:
        return kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the file readers raise many kinds; each means that a file is damaged
        raise OSError(f'no tokenizer could be loaded from {folder} ({type(error).__name__}: '
                      f'{str(error).splitlines()[0][:200]}): download it again') from None
    finally:
        transformers.logging.set_verbosity(verbosity)


def add_special_tokens(tokenizer):
    known = tokenizer.get_vocab()
    new = [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS if t not in known]
    tokenizer.add_tokens(new, special_tokens=True)
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


def read_json(path):
    """A checkpoint's JSON file. ValueError where it is damaged."""
    try:
        with open(path, encoding='utf-8-sig') as f:
            return json.load(f)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is not a whole JSON file ({error}): download it again') from None


def weight_files(folder):
    """Tensor name -> its safetensors file, and tensor name -> shape, of a checkpoint folder."""
    def at(name):
        return os.path.join(folder, name)

    if not os.path.isfile(at('config.json')) and os.path.isfile(at('adapter_config.json')):
        raise FileNotFoundError(f'{folder} holds a LoRA adapter alone (adapter_config.json): merge it into its base '
                                'model and give the folder of the result')
    if not os.path.isfile(at('config.json')):
        raise FileNotFoundError(f'{folder} holds no config.json: give the folder of a whole InternVL checkpoint')
    if os.path.isfile(at('model.safetensors')):  # an index beside it is left from before, as in transformers
        paths = [at('model.safetensors')]
    elif os.path.isfile(at('model.safetensors.index.json')):
        index = read_json(at('model.safetensors.index.json'))
        if not isinstance(index, dict) or not isinstance(index.get('weight_map'), dict):
            raise ValueError(f'{at("model.safetensors.index.json")} holds no weight_map: download it again')
        paths = [at(name) for name in sorted(set(index['weight_map'].values()))]
    else:
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
            with open(path, 'rb') as f:
                pointer = f.read(40).startswith(b'version https://git-lfs')
            found = "is only git-lfs's pointer to the file: run git lfs pull" if pointer else (
                f'is damaged ({error}): download it again')
            raise ValueError(f'{path} {found}') from None
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


# what some scripts save and no model needs: they are computed
BUFFERS = re.compile(r'.+\.rotary_emb\.inv_freq|.+\.position_ids')


def rename(name):
    """A file's tensor name -> (our name, 'q', 'k' or 'v' if it is a third of our fused qkv)."""
    # as transformers holds them in memory, and Trainer, FSDP and DeepSpeed scripts write them
    name = re.sub(r'^model\.language_model\.', 'language_model.model.', name)
    name = re.sub(r'^model\.(?=vision_tower\.|multi_modal_projector\.)', '', name)
    name = re.sub(r'^lm_head\.', 'language_model.lm_head.', name)
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


def with_mean_rows(matrix, known, added, rows):
    """
    Embedding or head [V, D] with `rows` rows: those of the ids `added`, and all beyond V, are the mean of those of
    the ids `known`. Spare rows that no token uses stay as they are.
    """
    had = torch.zeros(len(matrix), dtype=torch.bool)
    had[[i for i in known if i < len(matrix)]] = True
    parts = zip(matrix.split(8192), had.split(8192))  # float32 copies of a few rows at a time
    mean = sum(part[here].float().sum(0) for part, here in parts) / had.sum()
    grown = matrix.new_empty(rows, matrix.shape[1])
    grown[:len(matrix)] = matrix
    grown[len(matrix):] = mean.to(matrix.dtype)
    grown[list(added)] = mean.to(matrix.dtype)
    return grown


SUPPORTED = 'InternVL2.5 1B and 4B, InternVL3 1B, 2B, 8B and 14B, and InternVL3.5 with Qwen3 are'


def rope_of(t):
    """A text config's (theta, kind, longest input for which plain RoPE is what it asks for)."""
    rope = t.get('rope_parameters') or {}
    scaling = t.get('rope_scaling') or rope
    if any(isinstance(value, dict) for value in rope.values()):
        return 0.0, 'another one in each kind of layer', 0
    theta = float(rope.get('rope_theta') or t.get('rope_theta') or 1e4)
    kind = scaling.get('rope_type') or scaling.get('type') or 'default'
    longest = t['max_position_embeddings']
    if kind == 'dynamic':
        longest = min(longest, scaling.get('original_max_position_embeddings') or longest)
    return theta, kind, longest


def slides(t):
    """Whether a text config has layers that see only a window shorter than its inputs may be."""
    window, layers = t.get('sliding_window'), t['num_hidden_layers']
    if not t.get('use_sliding_window') or not window or window >= t['max_position_embeddings']:
        return False
    if t.get('layer_types'):
        return 'sliding_attention' in t['layer_types']
    return layers > t.get('max_window_layers', 28)


def foreign(c, t):
    """Why these are not the weights of a Qwen2 or Qwen3 decoder as it is, in words; '' where they are."""
    kind = t.get('model_type')
    for wrong, reason in (
            (kind not in ('qwen2', 'qwen3'), f'its decoder is {kind}, not qwen2 or qwen3'),
            (c.get('quantization_config'), 'it is quantized (quantization_config)'),
            (c.get('use_llm_lora') or c.get('use_backbone_lora'),
             'it holds LoRA weights that are not merged (use_llm_lora, use_backbone_lora)')):
        if wrong:
            return reason
    return ''


def unsupported(c, t, v):
    """The first value of config.json that this code would compute otherwise, in words; '' for none."""
    kind, (_, rope, _) = t.get('model_type'), rope_of(t)
    partial = (t.get('rope_parameters') or {}).get('partial_rotary_factor', t.get('partial_rotary_factor', 1.0))
    patch, size = v.get('patch_size', 14), v.get('image_size', 448)
    for wrong, reason in (
            (v.get('qk_normalization') or v.get('use_qk_norm') or v.get('norm_type') == 'rms_norm',
             'its vision tower is InternViT-6B with query/key norm, which timm cannot express'),
            (not v.get('qkv_bias', v.get('attention_bias')), 'its vision tower has no bias on q, k, v'),
            (v.get('hidden_act', 'gelu') != 'gelu', f'its vision hidden_act is {v.get("hidden_act")}, not gelu'),
            (v.get('num_channels', 3) != 3, f'its vision num_channels is {v.get("num_channels")}, not 3'),
            (v.get('norm_type', 'layer_norm') != 'layer_norm', f'its vision norm_type is {v.get("norm_type")}'),
            (not v.get('use_absolute_position_embeddings', True), 'its vision tower has no position embeddings'),
            (not v.get('use_mean_pooling', True), 'its vision tower has a final norm (use_mean_pooling is false)'),
            (any(isinstance(x, list) and len(set(x)) > 1 for x in (patch, size)),
             f'its tiles or patches are not square ({size}, {patch})'),
            (c.get('projector_hidden_act', 'gelu') != 'gelu',
             f'its projector_hidden_act is {c.get("projector_hidden_act")}, not gelu'),
            (c.get('select_layer', c.get('vision_feature_layer', -1)) != -1,
             'it reads an inner layer of the vision tower (select_layer, vision_feature_layer)'),
            (c.get('vision_feature_select_strategy', 'default') != 'default',
             f'its vision_feature_select_strategy is {c.get("vision_feature_select_strategy")}'),
            (c.get('ps_version', 'v2') not in ('v1', 'v2'), f'its ps_version is {c.get("ps_version")}'),
            (t.get('hidden_act', 'silu') != 'silu', f'its decoder\'s hidden_act is {t.get("hidden_act")}, not silu'),
            (kind == 'qwen3' and t.get('attention_bias'), 'its decoder has attention_bias'),
            (rope not in ('default', 'dynamic'), f'its rope is {rope}'),
            (partial != 1.0, f'its partial_rotary_factor is {partial}'),
            (slides(t), f'its decoder sees a sliding_window of {t.get("sliding_window")} tokens')):
        if wrong:
            return reason
    return ''


def config_fields(c, shapes, tokenizer, source):
    """
    A checkpoint's config.json as the fields of our Config: every value that changes the result is honoured here, or
    refused by name. Some copies carry a wrong llm_config beside a right text_config.
    """
    embedding = shapes.get(EMBEDDING, 'missing')
    candidates = [c[key] for key in ('llm_config', 'text_config') if c.get(key)]
    fit = [t for t in candidates if [t.get('vocab_size'), t.get('hidden_size')] == embedding]
    for t in fit[:1] or candidates:
        if reason := foreign(c, t):
            raise ValueError(f'{source} is not supported: {reason}; {SUPPORTED}')
    if not fit:
        described = [[t.get('vocab_size'), t.get('hidden_size')] for t in candidates]
        raise ValueError(f'{source}: embed_tokens is {embedding}, but config.json describes {described} '
                         '[vocab_size, hidden_size]')
    t, v = fit[0], c.get('vision_config') or {}
    needed = ('intermediate_size', 'num_hidden_layers', 'num_attention_heads')
    lacking = [f'{part}.{key}' for part, found, keys in (
        ('text', t, (*needed, 'num_key_value_heads', 'max_position_embeddings')),
        ('vision_config', v, ('hidden_size', *needed))) for key in keys if key not in found]
    if lacking:
        raise ValueError(f'{source}: config.json lacks {", ".join(lacking)}: download it again')
    if reason := unsupported(c, t, v):
        raise ValueError(f'{source} is not supported: {reason}; {SUPPORTED}')
    pair = lambda x: x[0] if isinstance(x, (list, tuple)) else x
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*SPECIAL_TOKENS, '<|im_end|>', '<|endoftext|>')}
    theta, _, longest = rope_of(t)
    openGVLab = 'llm_config' in c  # whose class has 'v1' where config.json is silent; transformers' knows 'v2' alone
    return dict(
        vocab_size=max(embedding[0], len(tokenizer)), hidden_size=t['hidden_size'],
        intermediate_size=t['intermediate_size'], num_hidden_layers=t['num_hidden_layers'],
        num_attention_heads=t['num_attention_heads'], num_key_value_heads=t['num_key_value_heads'],
        head_dim=t.get('head_dim') or (128 if t['model_type'] == 'qwen3' else
                                       t['hidden_size'] // t['num_attention_heads']),
        attention_bias=t['model_type'] == 'qwen2', qk_norm=t['model_type'] == 'qwen3',
        rms_norm_eps=t.get('rms_norm_eps', 1e-6), rope_theta=theta, max_position_embeddings=longest,
        vision_hidden_size=v['hidden_size'], vision_intermediate_size=v['intermediate_size'],
        vision_num_layers=v['num_hidden_layers'], vision_num_heads=v['num_attention_heads'],
        vision_layer_norm_eps=v.get('layer_norm_eps', 1e-6), patch_size=pair(v.get('patch_size', 14)),
        image_size=c.get('force_image_size') or pair(v.get('image_size', 448)),
        downsample_ratio=c.get('downsample_ratio', 0.5),
        ps_version=c.get('ps_version', 'v1') if openGVLab else 'v2',
        image_token_id=ids[IMG_CONTEXT], latent_token_id=ids[LATENT],
        eos_token_ids=(ids['<|im_end|>'], ids['<|endoftext|>']), pad_token_id=ids['<|endoftext|>'])


def wants_tied_head(c):
    """Whether transformers 5 ties the head where the files hold none: the top level decides, else the text config."""
    text = c.get('text_config') or c.get('llm_config') or {}
    top = c.get('tie_word_embeddings')
    return bool(top if top is not None else text.get('tie_word_embeddings', 'llm_config' not in c))


def read_pretrained(name_or_path, dtype):
    """
    InternVL from a hub id or a local folder: (fields of Config, weights under our names, how many tensors in how many
    files). The rows of tokens that `load_tokenizer` adds are the mean of the rows that were there. Memory peaks near
    the size of the weights.
    """
    folder = fetch(name_or_path)
    files, shapes = weight_files(folder)
    buffers = [name for name in files if BUFFERS.fullmatch(name)]
    for name in buffers:
        del files[name]
    c = read_json(os.path.join(folder, 'config.json'))
    tokenizer = read_tokenizer(folder)
    known = set(tokenizer.get_vocab().values())  # before ours join them
    add_special_tokens(tokenizer)
    added = set(tokenizer.get_vocab().values()) - known
    ours = {rename(name)[0]: shape for name, shape in shapes.items()}
    fields = config_fields(c, ours, tokenizer, name_or_path)

    def tensors():
        for name, path in files.items():
            with safe_open(path, 'pt') as file:  # opened for each tensor: closing lets go of the pages that were read
                tensor = file.get_tensor(name)
                if rename(name)[0] in (EMBEDDING, HEAD):
                    tensor = with_mean_rows(tensor, known, added, fields['vocab_size'])
                yield name, tensor.to(dtype, copy=True)

    weights = to_our_names(tensors(), name_or_path)
    tied = wants_tied_head(c)
    if HEAD in weights:  # a head of its own is used, whatever the config says, as in transformers 5
        tied = tied and torch.equal(weights[HEAD], weights[EMBEDDING])
    elif tied:
        weights[HEAD] = weights[EMBEDDING]
    fields['tie_word_embeddings'] = tied
    left_out = f', {len(buffers)} computed buffers left out' if buffers else ''
    return fields, weights, (f'{len(files)} tensors in {len(set(files.values()))} file(s), all used, none missing'
                             f'{left_out}; {fields["vocab_size"] - ours[EMBEDDING][0]} rows added')


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
