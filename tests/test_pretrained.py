"""Hugging Face folders: what they say is honoured or refused by name; weights, their files, and the tokenizer."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import MIRROR, TINY, losses, needs_mirror, some_text

from kit.data import tokens
from kit.state import pretrained
from model import GPT, GPTConfig

safetensors = pytest.importorskip('safetensors.torch')

SIZES = dict(n_layer=2, n_head=2, n_embd=32, n_positions=24)
CONFIG = dict(model_type='gpt2', vocab_size=320, **SIZES)
MERGES = ['t h', 'th e', 'Ġ the', 'i n', 'e r', 'Ġ t']
OFFLINE = {'TIKTOKEN_CACHE_DIR': '', 'https_proxy': 'http://127.0.0.1:9'}
OPENAI = json.loads('''{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
    "n_positions": 1024, "n_special": 0, "output_past": true, "predict_special_tokens": true, "resid_pdrop": 0.1,
    "summary_activation": null, "summary_first_dropout": 0.1, "summary_proj_to_labels": true,
    "summary_type": "cls_index", "summary_use_proj": true, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}}''')


def tensors(vocab_size=320):
    """The weights of a small GPT-2 under OpenAI's names, large enough to tell tanh-GELU from the exact one."""
    torch.manual_seed(0)
    shapes = {'wte.weight': (vocab_size, 32), 'wpe.weight': (24, 32), 'ln_f.weight': (32,), 'ln_f.bias': (32,)}
    for i in range(2):
        shapes |= {f'h.{i}.{name}.{kind}': (32,) for name in ('ln_1', 'ln_2') for kind in ('weight', 'bias')}
        for name, n_in, n_out in (('attn.c_attn', 32, 96), ('attn.c_proj', 32, 32), ('mlp.c_fc', 32, 128),
                                  ('mlp.c_proj', 128, 32)):
            shapes |= {f'h.{i}.{name}.weight': (n_in, n_out), f'h.{i}.{name}.bias': (n_out,)}
    return {f'transformer.{name}': 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def vocabulary(merges=MERGES):
    """{token: id} as GPT-2 has it: the bytes, what the merges make, the end of text."""
    parts = [*tokens.byte_level_characters(), *(merge.replace(' ', '') for merge in merges), tokens.END]
    return {token: i for i, token in enumerate(parts)}


def write_tokenizer(folder, vocab=None, merges=MERGES):
    (folder / 'vocab.json').write_text(json.dumps(vocab or vocabulary(merges)))
    (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges, '']), encoding='utf-8')


def as_tokenizer_json():
    """What tokenizers saves of the same."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    whole = Tokenizer(models.BPE(vocab=vocabulary(), merges=[tuple(merge.split()) for merge in MERGES]))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens([AddedToken(tokens.END, normalized=False), AddedToken('[PAD]', normalized=False)])
    return whole, json.loads(whole.to_str())


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def bare(tmp_path):
    """A folder of config.json and model.safetensors."""
    folder = tmp_path / 'hf'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(CONFIG))
    safetensors.save_file(tensors(), folder / 'model.safetensors')
    return folder


@pytest.fixture
def folder(bare):
    """And its tokenizer."""
    write_tokenizer(bare)
    return bare


@pytest.fixture
def refused(capsys):
    """refused(folder, 'words', ...): it is, in one line that has them."""
    def check(folder, *words, needs_tokenizer=True):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            pretrained.load(str(folder), needs_tokenizer)
        err = capsys.readouterr().err
        assert end.value.code == 2 and err.count('\n') == 1
        assert all(word in err for word in words), err
        return err
    return check


def logits(loaded, idx):
    model = GPT(GPTConfig(**loaded['model_args'])).eval()
    model.load_state_dict(loaded['model'])
    with torch.no_grad():
        return model(idx, idx)[0]


# ---------------------------------------------------------------------------------------------------------------------
# beside transformers


@pytest.fixture(scope='module')
def hugging(tmp_path_factory):
    """A small random GPT-2 as transformers saves it."""
    transformers = pytest.importorskip('transformers')
    folder = tmp_path_factory.mktemp('hf')
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, initializer_range=0.3)).eval()
    model.save_pretrained(folder)
    return folder, model


def test_logits_are_those_of_transformers(hugging):
    folder, theirs = hugging
    idx = torch.randint(50257, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(logits(pretrained.load(str(folder)), idx), theirs(idx).logits, rtol=1e-4, atol=1e-4)


OTHER_VALUES = {int: [3], float: [0.25], bool: [True, False], str: ['gelu', 'gelu_pytorch_tanh', 'relu'],
                type(None): [3, True], list: [['X']]}


def test_no_key_of_theirs_changes_the_arithmetic_unnoticed(bare, refused):
    """Each key of a GPT2Config with other values: with all that are taken, at once, the logits are transformers'."""
    transformers = pytest.importorskip('transformers')
    theirs = transformers.GPT2Config(**CONFIG).to_dict()
    others = [(key, other) for key, value in theirs.items() for other in OTHER_VALUES.get(type(value), [None])]
    taken, left = {}, set()
    for key, value in others:
        try:
            transformers.GPT2Config(**theirs | {key: value})
        except Exception:
            continue  # a value that is none for them
        (bare / 'config.json').write_text(json.dumps(theirs | {key: value}))
        try:
            pretrained.load(str(bare))
            taken[key] = value
        except SystemExit:
            refused(bare, 'config.json' if key in CONFIG else f'{key} = ', needs_tokenizer=False)
            left.add(key)
    assert {'activation_function', 'use_cache', 'id2label', 'attn_pdrop', 'summary_type'} <= taken.keys()
    assert {'layer_norm_epsilon', 'tie_word_embeddings', 'scale_attn_weights', 'n_layer', 'n_inner'} <= left
    taken = theirs | taken | {'return_dict': True}  # without it their own model falls
    (bare / 'config.json').write_text(json.dumps(taken))
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**taken)).eval()
    model.load_state_dict(tensors(), strict=False)
    idx = torch.randint(320, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(logits(pretrained.load(str(bare)), idx), model(idx).logits, rtol=1e-4, atol=1e-4)


def test_old_folders_with_pickled_weights(folder, tmp_path):
    """pytorch_model.bin, names without the prefix, with masks, as the first GPT-2 files had them."""
    old = tmp_path / 'old'
    shutil.copytree(folder, old)
    (old / 'model.safetensors').unlink()
    state = {name.removeprefix('transformer.'): value for name, value in tensors().items()}
    state |= {'h.0.attn.bias': torch.ones(1, 1, 24, 24).tril(), 'h.0.attn.masked_bias': torch.tensor(-1e4)}
    torch.save(state, old / 'pytorch_model.bin')
    one, other = pretrained.load(str(folder)), pretrained.load(str(old))
    assert one['model_args'] == other['model_args'] and one['model'].keys() == other['model'].keys()
    assert all(torch.equal(one['model'][name], other['model'][name]) for name in one['model'])


# ---------------------------------------------------------------------------------------------------------------------
# config.json


@pytest.mark.parametrize('key, value', [
    ('layer_norm_epsilon', 1e-6), ('layer_norm_epsilon', None), ('tie_word_embeddings', False),
    ('scale_attn_weights', False), ('scale_attn_by_inverse_layer_idx', True), ('reorder_and_upcast_attn', True),
    ('add_cross_attention', True), ('is_encoder_decoder', True), ('n_inner', 64), ('activation_function', 'relu'),
    ('activation_function', ['gelu']), ('pruned_heads', {'0': [1]}), ('quantization_config', {'bits': 4}),
    ('architectures', ['GPT2ForSequenceClassification']), ('architectures', ['GPT2DoubleHeadsModel']),
    ('num_hidden_layers', 3), ('n_ctx', 12), ('rope_theta', 10000.0), ('attention_window', 8), ('auto_map', {'a': 'b'}),
    ('n_layer', 2.0), ('n_layer', True), ('n_layer', '2'), ('n_layer', -1), ('n_embd', 0), ('n_head', 3),
    ('vocab_size', None), ('model_type', 'llama'), ('model_type', None),
])
def test_what_changes_the_arithmetic_is_refused_by_name(folder, refused, key, value):
    """Before the tokenizer and the weights are read."""
    (folder / 'model.safetensors').write_bytes(b'')
    (folder / 'vocab.json').write_text('[')
    change(folder / 'config.json', **{key: value})
    refused(folder, 'config.json', f'{key} = ')


@pytest.mark.parametrize('text', ['', '{', '[]', '5', '[' * 100_000, '\0', '{"n_layer": 1e999999}', 'null'])
def test_a_config_that_is_none(folder, refused, text):
    (folder / 'config.json').write_text(text)
    refused(folder, 'config.json')


def test_what_is_not_there_has_their_defaults(folder):
    """And the keys of OpenAI's own files are all known."""
    (folder / 'config.json').write_text('\ufeff' + json.dumps({'model_type': 'gpt2'}), encoding='utf-8')
    sizes = {'n_layer': 12, 'n_head': 12, 'n_embd': 768, 'block_size': 1024, 'vocab_size': 50257}
    assert pretrained.read_config(folder) == sizes | {'bias': True, 'gelu_approximate': 'tanh'}
    (folder / 'config.json').write_text(json.dumps(OPENAI))
    assert pretrained.read_config(folder) == sizes | {'bias': True, 'gelu_approximate': 'tanh'}


def test_the_folder_of_a_run_is_told_from_one_with_their_optimizer(trained, folder, train):
    result = train(f'--init_from={trained}')
    assert result.status == 2 and result.err.count('\n') == 1 and 'folder of a run' in result.err
    (folder / 'optimizer.pt').write_bytes(b'theirs')
    assert pretrained.load(str(folder))['meta']


# ---------------------------------------------------------------------------------------------------------------------
# weights


HEAD = 'lm_head.weight'
WPE = 'transformer.wpe.weight'


@pytest.mark.parametrize('spoil, word', [
    (lambda s: s | {HEAD: torch.randn(320, 32)}, HEAD),
    (lambda s: s | {HEAD: torch.randn(300, 32)}, HEAD),
    (lambda s: s | {'score.weight': torch.ones(2, 32)}, 'score.weight'),
    (lambda s: s | {'transformer.h.2.ln_1.bias': torch.ones(32)}, 'h.2.ln_1.bias'),
    (lambda s: s | {'transformer.h.0.crossattention.c_attn.bias': torch.ones(64)}, 'crossattention'),
    (lambda s: s | {'transformer.h.0.attn.bias': torch.ones(1, 1, 24, 24)}, 'h.0.attn.bias'),
    (lambda s: s | {'transformer.h.0.attn.bias': torch.ones(10**7)}, 'h.0.attn.bias'),
    (lambda s: s | {'wpe.weight': torch.ones(24, 32)}, 'wpe.weight'),
    (lambda s: s | {WPE: torch.ones(23, 32)}, WPE),
    (lambda s: s | {WPE: torch.ones(24, 32, dtype=torch.int8)}, 'int8'),
    (lambda s: s | {WPE: s[WPE].clone().fill_(torch.nan)}, 'not finite'),
    (lambda s: s | {WPE: s[WPE].double().fill_(1e300)}, 'not finite'),
    (lambda s: {name: value for name, value in s.items() if name != WPE}, 'wpe.weight is missing'),
    (lambda s: {'model.' + name: value for name, value in s.items()}, 'model.transformer'),
])
@pytest.mark.parametrize('is_pickled', [False, True])
def test_tensors_that_do_not_belong_there_are_named(folder, refused, spoil, word, is_pickled):
    state = spoil(tensors())
    if is_pickled:
        (folder / 'model.safetensors').unlink()
        torch.save(state, folder / 'pytorch_model.bin')
    else:
        safetensors.save_file(state, folder / 'model.safetensors')
    refused(folder, word, 'pytorch_model.bin' if is_pickled else 'model.safetensors')


@pytest.mark.parametrize('key, value, word', [
    ('n_layer', 1, 'h.1.'), ('n_layer', 3, 'h.2.'), ('n_layer', 10**12, 'h.2.'), ('n_positions', 23, WPE),
    ('n_embd', 16, 'by config.json'), ('vocab_size', 10**400, 'wte.weight'), ('vocab_size', 321, '(321, 32)')])
def test_the_sizes_are_those_of_config_json(folder, refused, key, value, word):
    change(folder / 'config.json', **{key: value})
    refused(folder, word)


def test_an_output_layer_that_is_the_embeddings_is_taken(folder):
    state = tensors()
    safetensors.save_file(state | {HEAD: state['transformer.wte.weight'].clone()}, folder / 'model.safetensors')
    assert torch.equal(pretrained.load(str(folder))['model'][HEAD], state['transformer.wte.weight'])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_taken_and_said(folder, capsys, dtype):
    state = {name: value.to(dtype) for name, value in tensors().items()}
    safetensors.save_file(state, folder / 'model.safetensors')
    loaded = pretrained.load(str(folder))['model']
    assert f'{dtype} is taken over as float32' in capsys.readouterr().out
    assert torch.equal(loaded[WPE], state[WPE].float())
    assert {value.dtype for value in loaded.values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------------------------------
# their files


def in_parts(folder, name='model.safetensors', save=safetensors.save_file):
    """The weights of a folder in two files with an index, as transformers writes large ones. Returns their names."""
    state = tensors()
    (folder / 'model.safetensors').unlink()
    stem, end = name.split('.')
    parts = [f'{stem}-0000{i}-of-00002.{end}' for i in (1, 2)]
    weight_map = {key: parts[i % 2] for i, key in enumerate(state)}
    for part in parts:
        save({key: state[key] for key in state if weight_map[key] == part}, folder / part)
    (folder / f'{name}.index.json').write_text(json.dumps({'metadata': {'total_size': 1}, 'weight_map': weight_map}))
    return parts


@pytest.mark.parametrize('name, save', [('model.safetensors', safetensors.save_file),
                                        ('pytorch_model.bin', torch.save)])
def test_parts_are_read_by_their_index_and_nothing_else(folder, capsys, name, save):
    whole = pretrained.load(str(folder))['model']
    in_parts(folder, name, save)
    for stray in 'adapter_model.safetensors', 'model.fp16.safetensors':
        safetensors.save_file({WPE: torch.zeros(24, 32), 'lora_A.weight': torch.ones(2, 2)}, folder / stray)
    loaded = pretrained.load(str(folder))['model']
    assert loaded.keys() == whole.keys() and all(torch.equal(loaded[key], whole[key]) for key in whole)
    assert 'not read: adapter_model.safetensors, model.fp16.safetensors\n' in capsys.readouterr().out


def test_a_stray_file_beside_a_whole_one(folder, capsys):
    safetensors.save_file({WPE: torch.zeros(24, 32)}, folder / 'adapter_model.safetensors')
    assert torch.equal(pretrained.load(str(folder))['model'][WPE], tensors()[WPE])
    assert 'not read: adapter_model.safetensors\n' in capsys.readouterr().out


def index_of(folder, **values):
    change(folder / 'model.safetensors.index.json', **values)


@pytest.mark.parametrize('spoil, word', [
    (lambda f, parts: (f / parts[1]).unlink(), 'No such file'),
    (lambda f, parts: (f / parts[1]).write_bytes((f / parts[1]).read_bytes()[:-9]), '00002-of-00002.safetensors'),
    (lambda f, parts: index_of(f, weight_map={'a': '../x.safetensors'}), "'../x.safetensors'"),
    (lambda f, parts: index_of(f, weight_map={'a': str(f / parts[0])}), 'no file of this folder'),
    (lambda f, parts: index_of(f, weight_map={'a': '..'}), 'hf/.. cannot be read'),
    (lambda f, parts: index_of(f, weight_map={'a': 5}), 'hf/5'),
    (lambda f, parts: index_of(f, weight_map={'a': parts[0]}), 'a is in the list of'),
    (lambda f, parts: index_of(f, weight_map=[]), 'weight_map'),
    (lambda f, parts: (f / 'model.safetensors.index.json').write_text('{'), 'index.json cannot be read'),
    (lambda f, parts: (f / 'model.safetensors.index.json').unlink(), 'holds no weights'),
    (lambda f, parts: safetensors.save_file(tensors(), f / 'model.safetensors'), 'two sets of weights'),
])
def test_parts_that_are_not_whole(folder, refused, spoil, word):
    spoil(folder, in_parts(folder))
    refused(folder, word)


class Code:
    def __reduce__(self):
        return print, ('this ran',)


@pytest.mark.parametrize('name', ['model.safetensors', 'pytorch_model.bin'])
@pytest.mark.parametrize('garble', [
    lambda data: b'', lambda data: b'123', lambda data: data[:len(data) // 2], lambda data: data[:-1],
    lambda data: b'\xff' * 100, lambda data: data[::-1], lambda data: b'version https://git-lfs.github.com/spec/v1\n'])
def test_files_that_are_damaged_are_named(folder, refused, name, garble):
    (folder / 'model.safetensors').unlink()
    (safetensors.save_file if name.endswith('s') else torch.save)(tensors(), folder / name)
    (folder / name).write_bytes(garble((folder / name).read_bytes()))
    refused(folder, f'{name} cannot be read')


def test_a_changed_byte_of_a_pickle_is_seen(folder, refused):
    (folder / 'model.safetensors').unlink()
    path = folder / 'pytorch_model.bin'
    torch.save(tensors(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(folder, 'pytorch_model.bin cannot be read')


@pytest.mark.parametrize('found', [Code(), {'a': Code()}, {'a': 5}, [torch.ones(2)], {'a': None},
                                   {5: torch.ones(2), 'a': torch.ones(2)}, {'a': torch.eye(2).to_sparse()},
                                   {'h.0.attn.bias': torch.ones(2, device='meta')}])
def test_code_and_other_objects_are_refused(folder, refused, capsys, found):
    (folder / 'model.safetensors').unlink()
    torch.save(found, folder / 'pytorch_model.bin')
    refused(folder, 'pytorch_model.bin cannot be read')
    assert 'this ran' not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer


TEXTS = ['the other thing, in there', ' the  the\n\n the ', "it's THE\t12\r\n", 'na\xefve \u65e5\u672c \U0001f600', '']


@pytest.mark.parametrize('is_one_file', [True, False])
def test_the_ids_are_those_of_the_folders_tokenizer(bare, is_one_file):
    pytest.importorskip('tokenizers')
    theirs, found = as_tokenizer_json()
    if is_one_file:
        (bare / 'tokenizer.json').write_text(json.dumps(found))
    else:
        write_tokenizer(bare)
        (bare / 'added_tokens.json').write_text('{"[PAD]": 263}')
        (bare / 'special_tokens_map.json').write_text('{"pad_token": "[PAD]", "eos_token": {"content": "<|x|>"}}')
    meta = pretrained.load(str(bare))['meta']
    ours = tokens.tokenizer(meta['tokenizer'])
    assert meta['vocab_size'] == theirs.get_vocab_size() == ours.size == 264 and meta['end_of_text'] == 262
    assert meta['tokenizer']['special'] == {tokens.END: 262, '[PAD]': 263}
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        assert tokens.decode(ours, ours.encode(text)) == text


def test_a_tokenizer_of_theirs_with_special_tokens_first(bare):
    """As tokenizers learns one: ids of the special ones, of the bytes in another order, of the merges."""
    package = pytest.importorskip('tokenizers')
    theirs = package.ByteLevelBPETokenizer()
    theirs.train_from_iterator([some_text()], vocab_size=320, special_tokens=['<s>', tokens.END], show_progress=False)
    theirs.save_model(str(bare))
    description = pretrained.load(str(bare))['meta']['tokenizer']
    assert description['special'] == {'<s>': 0, tokens.END: 1} and description['name'] == 'bpe'
    ours = tokens.tokenizer(description)
    for text in [some_text(2000, seed=1), *TEXTS]:
        assert ours.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize('key, value, word', [
    ('normalizer', {'type': 'Lowercase'}, 'normalizer'),
    ('pre_tokenizer', {'type': 'Whitespace'}, 'pre_tokenizer.type'),
    ('pre_tokenizer', None, 'pre_tokenizer.type'),
    ('pre_tokenizer', {'type': 'ByteLevel', 'add_prefix_space': True}, 'add_prefix_space'),
    ('pre_tokenizer', {'type': 'ByteLevel', 'add_prefix_space': False, 'use_regex': False}, 'use_regex'),
    ('post_processor', {'type': 'TemplateProcessing', 'special_tokens': {'<s>': {}}}, 'post_processor.special_tokens'),
    ('post_processor', {'type': 'BertProcessing'}, 'post_processor.type'),
    ('model', {'type': 'WordPiece', 'vocab': {}}, 'model.type'),
    ('model', {'type': 'BPE', 'vocab': {}, 'merges': []}, 'lacks the token'),
    ('model', {'type': 'BPE', 'vocab': {}, 'merges': [], 'ignore_merges': True}, 'ignore_merges'),
    ('model', {'type': 'BPE', 'vocab': {}}, 'merges'),
    ('model', 5, 'tokenizer.json'),
    ('added_tokens', [{'content': 'word', 'id': 300, 'special': False}], "'word'"),
    ('added_tokens', [{'content': '<x>', 'id': 320, 'special': True}], "'<x>' has the id 320"),
    ('added_tokens', [{'content': '<x>', 'id': 5, 'special': True}], 'one id'),
    ('added_tokens', [{'content': 'the', 'id': 257, 'special': True}], "'the'"),
    ('added_tokens', [5], 'tokenizer.json'),
    ('added_tokens', [{'content': word, 'id': 5, 'special': False} for word in (5, 'x')], 'the added token 5'),
])
def test_tokenizers_of_other_kinds_are_refused_by_name(bare, refused, key, value, word):
    """For training too."""
    pytest.importorskip('tokenizers')
    _, found = as_tokenizer_json()
    write_tokenizer(bare)  # which is not taken instead
    (bare / 'tokenizer.json').write_text(json.dumps(found | {key: value}))
    refused(bare, 'tokenizer.json', word, needs_tokenizer=False)


def swapped(merges):
    return [*merges[:-2], merges[-1], merges[-2]]


@pytest.mark.parametrize('spoil, word', [
    (lambda f: (f / 'merges.txt').unlink(), 'merges.txt cannot be read'),
    (lambda f: (f / 'vocab.json').unlink(), 'vocab.json cannot be read'),
    (lambda f: (f / 'merges.txt').write_bytes(b'\xff\xfe'), 'merges.txt cannot be read'),
    (lambda f: (f / 'merges.txt').write_text('a b c\n'), 'vocab.json'),
    (lambda f: (f / 'vocab.json').write_text('[' * 100_000), 'vocab.json cannot be read'),
    (lambda f: write_tokenizer(f, vocabulary(), swapped(MERGES)), 'order of its ids'),
    (lambda f: write_tokenizer(f, merges=['a b', 'b c', 'a bc']), "at 'a bc'"),  # theirs never makes this token
    (lambda f: write_tokenizer(f, vocabulary(MERGES[:-1]), MERGES), "'Ġt'"),
    (lambda f: write_tokenizer(f, vocabulary(), MERGES[:-1]), "no merge makes 'Ġt'"),  # as where merges.txt is cut off
    (lambda f: write_tokenizer(f, vocabulary() | {'the': 5}), 'one id'),
    (lambda f: write_tokenizer(f, vocabulary() | {'the': 1.5}), "'the'"),
    (lambda f: write_tokenizer(f, {t: i for t, i in vocabulary().items() if t != 'a'}), "lacks the token 'a'"),
    (lambda f: (f / 'added_tokens.json').write_text('{"word": 300}'), "'word'"),
    (lambda f: (f / 'tokenizer_config.json').write_text('{"add_prefix_space": true}'), 'add_prefix_space'),
    (lambda f: (f / 'tokenizer_config.json').write_text('{"tokenizer_class": "BertTokenizer"}'), 'tokenizer_class'),
    (lambda f: change(f / 'config.json', vocab_size=262), 'vocab_size in config.json is 262'),
])
def test_vocabularies_that_will_not_do(folder, refused, spoil, word):
    spoil(folder)
    refused(folder, word)


def test_files_of_another_tokenizer_are_named(bare, refused):
    (bare / 'spiece.model').write_bytes(b'')
    refused(bare, 'spiece.model', needs_tokenizer=False)


# ---------------------------------------------------------------------------------------------------------------------
# through the scripts


def test_sampling_takes_the_folders_tokenizer(folder, run):
    result = run('sample.py', '--init_from=hf', '--start=the', '--device=cpu', '--max_new_tokens=20', env=OFFLINE)
    assert result.status == 0, result.err
    assert 'tokenizer: hf/vocab.json, 263 ids' in result.out and 'weights: hf/model.safetensors' in result.out


def test_sampling_without_a_tokenizer_is_refused(bare, run):
    result = run('sample.py', '--init_from=hf', '--start=the', '--device=cpu')
    assert result.status == 2 and result.err.count('\n') == 1 and not result.out.endswith('the')
    assert 'hf holds no tokenizer' in result.err and 'vocab.json and merges.txt' in result.err


def test_characters_do_not_fit_a_bpe(folder, train):
    result = train('--init_from=hf')
    assert result.status == 2 and 'tokenizer' in result.err and result.err.count('\n') == 1
    assert not (folder.parent / 'checkpoints').exists()


def finetune(run, dataset, *args, **kwargs):
    tiny = [arg for arg in TINY if not arg.startswith('--n_')]
    return run('train.py', *tiny, f'--dataset={dataset}', '--learning_rate=1e-4', '--min_lr=1e-5', '--max_iters=3',
               *args, **kwargs)


def test_training_without_a_tokenizer_takes_that_of_the_dataset(bare, run, tiny):
    result = finetune(run, 'tiny', '--init_from=hf')
    assert result.status == 0, result.err
    assert 'hf holds no tokenizer: its ids are taken to be those of the dataset' in result.out
    sampled = run('sample.py', '--device=cpu', '--max_new_tokens=5')
    assert sampled.status == 0, sampled.err


def test_finetuning_in_a_smaller_window(hugging, run, tmp_path):
    folder, _ = hugging
    (tmp_path / 'data/bpe').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in 'train', 'val':  # a nanoGPT folder: ids of GPT-2, no meta
        rng.integers(50257, size=2000).astype(np.uint16).tofile(tmp_path / f'data/bpe/{split}.bin')
    result = finetune(run, 'bpe', f'--init_from={folder}', env=OFFLINE)
    assert result.status == 0, result.err
    assert list(losses(result)) == [0, 1, 2] and 'From the checkpoint: n_embd = 32' in result.out
    saved = torch.load(tmp_path / 'checkpoints/ckpt.pt', weights_only=True)
    assert saved['model']['transformer.wpe.weight'].shape == (16, 32)
    assert saved['model_args']['vocab_size'] == 50257 and saved['model_args']['gelu_approximate'] == 'tanh'


@needs_mirror
def test_finetuning_with_gpt2s_own_tokenizer(run, tmp_path):
    """OpenAI's encoder.json and vocab.bpe are Hugging Face's vocab.json and merges.txt, byte for byte."""
    folder = tmp_path / 'hf'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(CONFIG | {'vocab_size': 50304}))  # padded
    safetensors.save_file(tensors(50304), folder / 'model.safetensors')
    files = sorted((MIRROR / 'tiktoken').iterdir(), key=lambda path: path.stat().st_size)
    for source, name in zip(files, ('merges.txt', 'vocab.json')):
        shutil.copy(source, folder / name)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'text.txt').write_text(some_text(4000))
    prepared = run('prepare.py', '--input=text.txt', '--dataset=bpe', '--tokenizer=gpt2',
                   env={'FLATGPT_MIRROR': str(MIRROR)})
    assert prepared.status == 0, prepared.err
    of_dataset = json.loads((tmp_path / 'data/bpe/meta.json').read_text())['tokenizer']
    assert pretrained.load(str(folder))['meta']['tokenizer'] == of_dataset
    result = finetune(run, 'bpe', '--init_from=hf', env=OFFLINE)
    assert result.status == 0 and list(losses(result)) == [0, 1, 2], result.err
    sampled = run('sample.py', '--init_from=hf', '--start=To be', '--device=cpu', '--max_new_tokens=5', env=OFFLINE)
    assert sampled.status == 0, sampled.err
