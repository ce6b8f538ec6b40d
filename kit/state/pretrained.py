"""
OpenAI's GPT-2 weights, as Hugging Face publishes them: from a local folder, its cache, or downloaded; and any other
folder of a GPT-2, if it is one that model.py computes to the last detail. Nothing in it is passed over: what is neither
honoured nor known to have no say in the arithmetic is refused by name.
"""

import os
import zipfile
from pathlib import Path

import torch

from kit.base import ranks
from kit.base.errors import ROOT, explained, fail, reason, shown
from kit.base.overrides import require
from kit.data import downloads, tokens
from kit.data.huggingface import check_values, read_json, read_tokenizer
from kit.learn.model_state import is_finite
from kit.state import checkpoints

NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
# of these the first that is there: an index, which says what is in which file, or the one file
WEIGHTS = 'model.safetensors.index.json', 'model.safetensors', 'pytorch_model.bin.index.json', 'pytorch_model.bin'

# config.json: the keys that are taken over, and what transformers takes where they are not there
SIZES = {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'n_positions': 1024, 'vocab_size': 50257}
GELU = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}  # their names -> torch's `approximate`
# other names of theirs for the same
ALIASES = {'n_ctx': 'n_positions', 'max_position_embeddings': 'n_positions', 'hidden_size': 'n_embd',
           'num_hidden_layers': 'n_layer', 'num_attention_heads': 'n_head'}
# the keys for which model.py has one answer, and the values that mean it; where they are not there they mean it too
FIXED = {'layer_norm_epsilon': [1e-5], 'tie_word_embeddings': [True], 'scale_attn_weights': [True],
         'scale_attn_by_inverse_layer_idx': [False], 'reorder_and_upcast_attn': [False], 'add_cross_attention': [False],
         'cross_attention_hidden_size': [None], 'is_encoder_decoder': [False], 'pruned_heads': [{}, None],
         'quantization_config': [None], 'architectures': [['GPT2LMHeadModel'], ['GPT2Model'], None]}
# the keys with no say in the arithmetic: how it was trained (dropout is a setting here), is drawn from, and is called
HARMLESS = set('''
    model_type is_decoder use_cache resid_pdrop embd_pdrop attn_pdrop classifier_dropout initializer_range bos_token_id
    eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id summary_type
    summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout _name_or_path name_or_path
    transformers_version torch_dtype dtype use_bfloat16 torchscript xla_device tokenizer_class _attn_implementation
    attn_implementation _attn_implementation_autoset gradient_checkpointing chunk_size_feed_forward id2label label2id
    num_labels _num_labels problem_type finetuning_task task_specific_params prefix n_special predict_special_tokens
    output_past output_attentions output_hidden_states output_scores return_dict return_dict_in_generate tf_legacy_loss
    tie_encoder_decoder do_sample early_stopping max_length min_length num_beams num_beam_groups num_return_sequences
    diversity_penalty repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens temperature top_k top_p
    typical_p'''.split())

# the tensors, by their names, without the prefix "transformer."; those of a block in multiples of n_embd, (in, out)
BLOCK = {'ln_1.weight': (1,), 'ln_1.bias': (1,), 'attn.c_attn.weight': (1, 3), 'attn.c_attn.bias': (3,),
         'attn.c_proj.weight': (1, 1), 'attn.c_proj.bias': (1,), 'ln_2.weight': (1,), 'ln_2.bias': (1,),
         'mlp.c_fc.weight': (1, 4), 'mlp.c_fc.bias': (4,), 'mlp.c_proj.weight': (4, 1), 'mlp.c_proj.bias': (1,)}
FLOATS = torch.float32, torch.float16, torch.bfloat16, torch.float64


def load(name, needs_tokenizer=False):
    """
    A dict like a checkpoint's (model, model_args, meta) of 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' or of a
    Hugging Face folder with config.json and model.safetensors (or pytorch_model.bin). The package transformers is not
    needed. A folder without a tokenizer gives no meta, and says so; with needs_tokenizer it is refused.
    """
    if name not in NAMES and not os.path.isfile(os.path.join(name, 'config.json')):
        fail(f'init_from = {name!r}: neither scratch, resume, auto, a checkpoint FILE.pt, one of {", ".join(NAMES)}, '
             'nor a Hugging Face folder with config.json')
    folder = find(name) if name in NAMES else Path(name)
    model_args = read_config(folder)
    meta = tokens.GPT2 if name in NAMES else read_tokenizer(folder, model_args['vocab_size'])
    if not meta and needs_tokenizer:
        fail(f'{folder} holds no tokenizer; copy its own there: tokenizer.json, or vocab.json and merges.txt')
    path, state = read_weights(folder, model_args)
    print(f'weights: {path}')
    if not meta:
        print(f'{folder} holds no tokenizer: its ids are taken to be those of the dataset')
    return {'model': state, 'model_args': model_args} | ({'meta': meta} if meta else {})


def read_config(folder):
    """model_args out of config.json. Each of its keys is honoured, or has no say in the arithmetic, or is refused."""
    path = folder / 'config.json'
    config = read_json(path)
    if 'model_type' not in config and any(folder.glob('*.pt')):
        fail(f'init_from = {str(folder)!r}: this is the folder of a run; name a file in it, such as {folder}/best.pt, '
             f'or go on with it: --init_from=resume --out_dir={folder}')
    if config.get('model_type') != 'gpt2':
        fail(f'{path}: model_type = {shown(config.get("model_type"))}, and only gpt2 can be read')
    sizes = {name: config.get(name, default) for name, default in SIZES.items()}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            fail(f'{path}: {name} = {shown(value)}, and it should be a whole number, 1 or more')
    if sizes['n_embd'] % sizes['n_head']:
        fail(f'{path}: n_embd = {sizes["n_embd"]} is no multiple of n_head = {sizes["n_head"]}')
    gelu = config.get('activation_function', 'gelu_new')
    allowed = FIXED | {'n_inner': [4 * sizes['n_embd'], None], 'activation_function': list(GELU)}
    allowed |= {alias: [sizes[name]] for alias, name in ALIASES.items()}
    if unknown := config.keys() - sizes.keys() - allowed.keys() - HARMLESS:
        key = min(unknown)
        fail(f'{path}: {key} = {shown(config[key])} is not known here, and may change the arithmetic; remove it '
             'if it does not')
    check_values(path, config, {key: allowed[key] for key in allowed if key in config})
    return {'n_layer': sizes['n_layer'], 'n_head': sizes['n_head'], 'n_embd': sizes['n_embd'],
            'block_size': sizes['n_positions'], 'bias': True, 'vocab_size': sizes['vocab_size'],
            'gelu_approximate': GELU[gelu]}


def read_weights(folder, model_args):
    """(path, {our name: tensor}) of a folder, which must be those that its config.json speaks of, and nothing else."""
    path, theirs = read_tensors(folder)
    n_embd, n_layer = model_args['n_embd'], min(model_args['n_layer'], len(theirs))
    shapes = {'wte.weight': (model_args['vocab_size'], n_embd), 'wpe.weight': (model_args['block_size'], n_embd),
              'ln_f.weight': (n_embd,), 'ln_f.bias': (n_embd,)}
    shapes |= {f'h.{i}.{name}': tuple(n_embd * n for n in shape) for i in range(n_layer)
               for name, shape in BLOCK.items()}
    state = {}
    for full_name, value in theirs.items():
        name = full_name.removeprefix('transformer.')
        shape = shapes['wte.weight'] if name == 'lm_head.weight' else shapes.get(name)
        if name.endswith(('.attn.bias', '.attn.masked_bias')) and is_causal_mask(value):
            continue
        if shape is None or name in state:
            fail(f'{path}: {full_name}: model.py has no such tensor in a GPT of n_layer = {model_args["n_layer"]}')
        if tuple(value.shape) != shape:
            fail(f'{path}: {full_name} has the shape {tuple(value.shape)}, and by config.json it is {shape}')
        if value.dtype not in FLOATS:
            fail(f'{path}: {full_name} holds {value.dtype}; only floating-point numbers are read')
        state[name] = (value.t() if name.startswith('h.') else value).float()  # their matrices are (in, out)
        if not is_finite(state[name]):
            fail(f'{path}: {full_name} holds numbers that are not finite')
    if missing := [name for name in shapes if name not in state]:
        fail(f'{path}: {missing[0]} is missing, which config.json speaks of')
    if not torch.equal(state.pop('lm_head.weight', state['wte.weight']), state['wte.weight']):
        fail(f'{path}: lm_head.weight is not wte.weight; such an output layer of its own (tie_word_embeddings = False) '
             'is not read here, where the embeddings are the output layer')
    if others := sorted({str(value.dtype) for value in theirs.values() if value.dtype in FLOATS[1:]}):
        print(f'{path}: {", ".join(others)} is taken over as float32')
    state = {f'transformer.{name}': value for name, value in state.items()}
    return path, state | {'lm_head.weight': state['transformer.wte.weight']}


def is_causal_mask(value):
    """Whether it is what old files kept beside the weights: who may look where, or what stands for minus infinity."""
    if value.dim() == 0:
        return True
    n = value.shape[-1]
    return value.shape == (1, 1, n, n) and torch.equal(value[0, 0].bool(), torch.ones(n, n, dtype=torch.bool).tril())


def read_tensors(folder):
    """(path, {their name: tensor}), by the index if there is one. Other files of weights in the folder are named."""
    path = next((folder / name for name in WEIGHTS if os.path.isfile(folder / name)), None)
    if path is None:
        fail(f'{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index of their parts')
    weight_map, files = None, [path.name]
    if path.suffix == '.json':
        weight_map = read_json(path).get('weight_map')
        if not isinstance(weight_map, dict) or not weight_map:
            fail(f'{path}: it has no weight_map, which says in which file a tensor is')
        files = sorted({str(file) for file in weight_map.values()})
        whole = path.name.removesuffix('.index.json')
        if whole not in files and os.path.isfile(folder / whole):
            fail(f'{folder}: {whole} and {path.name} are two sets of weights; remove the one that is not meant')
    tensors = {}
    for file in files:
        if Path(file).name != file or '\\' in file:
            fail(f'{path}: it names {shown(file)}, which is no file of this folder')
        with explained(f'{folder / file} cannot be read', 'copy it again'):
            part = read_file(folder / file)
        listed = part.keys() if weight_map is None else {name for name in weight_map if weight_map[name] == file}
        if odd := listed ^ part.keys():
            fail(f'{path}: {min(odd)} is in the list of {file} or in the file, and not in both')
        tensors |= part
    others = {file.name for end in ('*.safetensors', '*model*.bin') for file in folder.glob(end)} - {*files}
    if others:
        print(f'{folder}: not read: {", ".join(sorted(others))}')
    return path, tensors


def read_file(path):
    """All tensors of a file, under their names. Raises whatever its library raises; code in a pickle is not run."""
    if path.suffix == '.safetensors':
        require('safetensors', str(path))
        from safetensors.torch import load_file
        return load_file(path)
    if zipfile.is_zipfile(path):
        checkpoints.verify(path)
    found = torch.load(path, map_location='cpu', weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(name, str) and is_plain(found[name]) for name in found):
        raise TypeError('it holds other things than plain tensors and their names')
    return found


def is_plain(value):
    """Whether it is a tensor that has all its numbers, as they are."""
    is_whole = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return is_whole and not value.is_quantized and not value.is_meta


def find(name):
    """The folder of a GPT-2: in the Hugging Face cache, or in data/, or downloaded to there."""
    hub = Path(os.environ.get('HF_HOME', Path.home() / '.cache' / 'huggingface')) / 'hub'
    for owner in (f'openai-community--{name}', name):
        for config in sorted((hub / f'models--{owner}' / 'snapshots').glob('*/config.json')):
            if any(os.path.isfile(config.parent / file) for file in WEIGHTS):
                return config.parent
    folder = ROOT / 'data' / name
    require('safetensors', f'init_from = {name!r}')
    for file in ('model.safetensors', 'config.json'):  # config.json last: with it the folder is whole
        if ranks.is_main and not (folder / file).is_file():
            url = f'https://huggingface.co/openai-community/{name}/resolve/main/{file}'
            try:
                downloads.fetch(url, folder / file)
            except OSError as error:
                fail(f'init_from = {name!r}: {url} could not be downloaded ({reason(error)}); fetch config.json and '
                     'model.safetensors by hand and give their folder: --init_from=FOLDER')
    ranks.wait()
    return folder
