"""OpenAI's GPT-2 weights, as Hugging Face publishes them: from a local folder, its cache, or downloaded."""

import json
import os
from pathlib import Path

import torch

from kit.base import ranks
from kit.base.errors import ROOT, fail
from kit.base.overrides import require
from kit.data import downloads
from kit.data.tokens import GPT2

NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
GELU = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'none'}  # their names -> torch's `approximate`
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')


def load(name):
    """
    A dict like a checkpoint's (model, model_args, meta) of 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' or of a
    Hugging Face folder with config.json and model.safetensors (or pytorch_model.bin). The package transformers is
    not needed.
    """
    if name not in NAMES and not (Path(name) / 'config.json').is_file():
        fail(f'init_from = {name!r}: neither scratch, resume, auto, a checkpoint FILE.pt, one of {", ".join(NAMES)}, '
             'nor a Hugging Face folder with config.json')
    if list(Path(name).glob('*.pt')):
        fail(f'init_from = {name!r}: this is the folder of a run; name a file in it, such as {name}/best.pt, or '
             f'go on with it: --init_from=resume --out_dir={name}')
    folder = find(name) if name in NAMES else Path(name)
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        kind, gelu = config.get('model_type'), config.get('activation_function', 'gelu_new')
        if kind != 'gpt2' or gelu not in GELU:
            fail(f'init_from = {name!r}: {folder} holds a model of type {kind!r} ({gelu}); only GPT-2 can be read')
        model_args = {'n_layer': config['n_layer'], 'n_head': config['n_head'], 'n_embd': config['n_embd'],
                      'block_size': config['n_positions'], 'bias': True, 'vocab_size': config['vocab_size'],
                      'gelu_approximate': GELU[gelu]}
        if config.get('n_inner') not in (None, 4 * config['n_embd']) or config.get('scale_attn_by_inverse_layer_idx'):
            fail(f'init_from = {name!r}: {folder} is a variant of GPT-2 (n_inner or scaled attention) that is not read')
        theirs = read_weights(folder)
        state = {}
        for key, value in theirs.items():
            key = key if key.startswith(('transformer.', 'lm_head.')) else f'transformer.{key}'
            if not key.endswith(('.attn.bias', '.attn.masked_bias')):  # masks, no parameters
                state[key] = (value.t() if key.endswith(TRANSPOSED) else value).float()  # their matrices are (in, out)
        state['lm_head.weight'] = state['transformer.wte.weight']  # tied; a file may leave it out
    except Exception as error:  # each kind means that this folder will not do
        fail(f'init_from = {name!r}: {folder} is no whole Hugging Face folder ({type(error).__name__}: {error})')
    print(f'weights: {name} ({folder})')
    return {'model': state, 'model_args': model_args, 'meta': GPT2}


def read_weights(folder):
    """All tensors of a Hugging Face folder, under their names."""
    if files := sorted(folder.glob('*.safetensors')):
        require('safetensors', str(files[0]))
        from safetensors.torch import load_file
        return {key: value for file in files for key, value in load_file(file).items()}
    return torch.load(folder / 'pytorch_model.bin', map_location='cpu', weights_only=True)


def find(name):
    """The folder of a GPT-2: in the Hugging Face cache, or in data/, or downloaded to there."""
    hub = Path(os.environ.get('HF_HOME', Path.home() / '.cache' / 'huggingface')) / 'hub'
    for owner in (f'openai-community--{name}', name):
        for config in sorted((hub / f'models--{owner}' / 'snapshots').glob('*/config.json')):
            if list(config.parent.glob('*.safetensors')) or (config.parent / 'pytorch_model.bin').exists():
                return config.parent
    folder = ROOT / 'data' / name
    require('safetensors', f'init_from = {name!r}')
    for file in ('model.safetensors', 'config.json'):  # config.json last: with it the folder is whole
        if ranks.is_main and not (folder / file).is_file():
            url = f'https://huggingface.co/openai-community/{name}/resolve/main/{file}'
            try:
                downloads.fetch(url, folder / file)
            except OSError as error:
                fail(f'init_from = {name!r}: {url} could not be downloaded ({error}); fetch config.json and '
                     'model.safetensors by hand and give their folder: --init_from=FOLDER')
    ranks.wait()
    return folder
