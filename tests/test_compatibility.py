"""What people bring from nanoGPT and Hugging Face, and what they take back. Layouts are built by hand here."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import TINY, losses

from model import GPT, GPTConfig

ARGS = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False, vocab_size=27, dropout=0.0)


def nanogpt_checkpoint(folder, prefix=''):
    """ckpt.pt as nanoGPT's train.py writes it after 3 steps, here with a made-up model."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(**ARGS))
    groups = [{'params': [p for p in model.parameters() if p.dim() >= 2], 'weight_decay': 0.1},
              {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    for _ in range(3):
        idx = torch.randint(27, (4, 16))
        model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    folder.mkdir()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    state[prefix + 'transformer.h.0.attn.bias'] = torch.ones(16, 16).tril().view(1, 1, 16, 16)  # an old mask
    torch.save({'model': state, 'optimizer': optimizer.state_dict(), 'model_args': ARGS, 'iter_num': 3,
                'best_val_loss': torch.tensor(2.5), 'config': {'dataset': 'tiny', 'batch_size': 4, 'device': 'cuda',
                                                               'init_from': 'scratch', 'compile': True}},
               folder / 'ckpt.pt')
    return model


@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_nanogpt_checkpoints_resume_and_sample(train, run, tiny, prefix):
    nanogpt_checkpoint(tiny / 'out', prefix)
    sampled = run('sample.py', '--out_dir=out', '--start=a', '--device=cpu', '--max_new_tokens=20')
    assert sampled.status == 0, sampled.err
    resumed = run('train.py', '--init_from=resume', '--out_dir=out', '--device=cpu', '--tensorboard=False',
                  '--max_iters=6', '--log_interval=1', '--eval_iters=2')
    assert resumed.status == 0, resumed.err
    assert list(losses(resumed)) == [3, 4, 5] and 'after 3 steps' in resumed.out
    saved = torch.load(tiny / 'out/ckpt.pt', weights_only=True)
    assert saved['optimizer']['state'][0]['step'] == 6  # its moments went on


def test_the_same_weights_have_the_same_loss(tiny, run):
    model = nanogpt_checkpoint(tiny / 'out')
    result = run('train.py', '--test', '--out_dir=out', '--device=cpu', '--batch_size=3')
    assert result.status == 0, result.err
    data = torch.from_numpy(np.fromfile(tiny / 'data/tiny/test.bin', dtype=np.uint16).astype(np.int64))
    total = 0
    for t in range(0, 999, 16):
        start = min(t, 999 - 16)
        logits = model(data[None, start:start + 16], data[None, start:start + 16])[0][0, t - start:]
        total += torch.nn.functional.cross_entropy(logits, data[t + 1:t + 1 + len(logits)], reduction='sum').item()
    assert f'test loss {total / 999:.4f}' in result.out


def test_our_checkpoints_are_laid_out_as_nanogpts(train, tiny):
    """Its GPTConfig(**model_args) takes seven keys, its state dict has these names, its sample.py reads config."""
    train('--max_iters=1')
    saved = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)
    assert set(saved['model_args']) == {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
    block = ['ln_1.weight', 'attn.c_attn.weight', 'attn.c_proj.weight',
             'ln_2.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight']
    assert list(saved['model']) == ['transformer.wte.weight', 'transformer.wpe.weight',
                                    *(f'transformer.h.{i}.{name}' for i in range(2) for name in block),
                                    'transformer.ln_f.weight', 'lm_head.weight']
    assert saved['config']['dataset'] == 'tiny' and isinstance(saved['iter_num'], int)
    groups = saved['optimizer']['param_groups']
    assert [len(g['params']) for g in groups] == [10, 5] and groups[1]['weight_decay'] == 0


def test_our_dataset_is_read_as_nanogpts(tiny):
    folder = tiny / 'data/tiny'
    with open(folder / 'meta.pkl', 'rb') as file:
        meta = pickle.load(file)
    train = np.memmap(folder / 'train.bin', dtype=np.uint16, mode='r')
    assert ''.join(meta['itos'][i] for i in train) == (tiny / 'text.txt').read_text()[:18_000]


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face

@pytest.fixture(scope='module')
def hugging(tmp_path_factory):
    """A small random GPT-2 as transformers saves it, with weights large enough to tell tanh-GELU from the exact one."""
    transformers = pytest.importorskip('transformers')
    folder = tmp_path_factory.mktemp('hf')
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=50257,
                                     initializer_range=0.3)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return folder, model


def test_logits_are_those_of_transformers(hugging):
    from kit.state import pretrained
    folder, theirs = hugging
    loaded = pretrained.load(str(folder))
    ours = GPT(GPTConfig(**loaded['model_args'])).eval()
    ours.load_state_dict(loaded['model'])
    idx = torch.randint(50257, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, rtol=1e-4, atol=1e-4)


def test_old_folders_with_pickled_weights(hugging, tmp_path):
    """pytorch_model.bin, names without the prefix, with masks, as the first GPT-2 files had them."""
    from kit.state import pretrained
    folder, theirs = hugging
    state = {name.removeprefix('transformer.'): value for name, value in theirs.state_dict().items()}
    del state['lm_head.weight']
    state['h.0.attn.bias'] = torch.ones(1, 1, 24, 24)
    torch.save(state, tmp_path / 'pytorch_model.bin')
    (tmp_path / 'config.json').write_text((folder / 'config.json').read_text())
    new, old = pretrained.load(str(folder)), pretrained.load(str(tmp_path))
    assert new['model_args'] == old['model_args'] and new['model'].keys() == old['model'].keys()
    assert all(torch.equal(new['model'][name], old['model'][name]) for name in new['model'])


def test_finetuning_in_a_smaller_window(hugging, run, tmp_path):
    folder, _ = hugging
    (tmp_path / 'data/bpe').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in 'train', 'val':  # a nanoGPT folder: ids of GPT-2, no meta
        rng.integers(50257, size=2000).astype(np.uint16).tofile(tmp_path / f'data/bpe/{split}.bin')
    tiny = [arg for arg in TINY if not arg.startswith('--n_')]
    result = run('train.py', *tiny, '--dataset=bpe', f'--init_from={folder}', '--learning_rate=1e-4', '--min_lr=1e-5',
                 '--max_iters=3', env={'TIKTOKEN_CACHE_DIR': '', 'https_proxy': 'http://127.0.0.1:9'})
    assert result.status == 0, result.err
    assert list(losses(result)) == [0, 1, 2] and 'From the checkpoint: n_embd = 32' in result.out
    saved = torch.load(tmp_path / 'checkpoints/ckpt.pt', weights_only=True)
    assert saved['model']['transformer.wpe.weight'].shape == (16, 32)
    assert saved['model_args']['vocab_size'] == 50257 and saved['model_args']['gelu_approximate'] == 'tanh'


@pytest.mark.parametrize('spoil, named', [
    (lambda f: (f / 'config.json').write_text('{'), 'no whole Hugging Face folder'),
    (lambda f: (f / 'model.safetensors').write_bytes(b'123'), 'no whole Hugging Face folder'),
    (lambda f: (f / 'model.safetensors').unlink(), 'no whole Hugging Face folder'),
    (lambda f: (f / 'config.json').write_text(json.dumps({'model_type': 'llama'})), "'llama'"),
    (lambda f: (f / 'config.json').unlink(), 'config.json'),
])
def test_folders_that_will_not_do(hugging, train, tmp_path, spoil, named):
    import shutil
    shutil.copytree(hugging[0], tmp_path / 'model')
    spoil(tmp_path / 'model')
    result = train(f'--init_from={tmp_path}/model')
    assert result.status == 2 and result.err.count('\n') == 1 and named in result.err
    assert not os.path.exists(tmp_path / 'checkpoints')


def test_characters_do_not_fit_gpt2(hugging, run, tiny):
    result = run('train.py', '--dataset=tiny', f'--init_from={hugging[0]}', '--block_size=16')
    assert result.status == 2 and 'tokenizer' in result.err and result.err.count('\n') == 1
