"""What people bring from nanoGPT, and what they take back. Layouts are built by hand here."""

import pickle
import re

import numpy as np
import pytest
import torch
from conftest import TINY, losses

from kit.data import tokens
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
    result = train('--max_iters=1', '--architecture=gpt2', '--optimizer=adamw')
    assert 'nanoGPT cannot read' not in result.out
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


WORDS = ['the', 'cat', 'sat', 'on', 'a', 'mat', '.', '\n']


@pytest.mark.parametrize('meta, start, expected', [
    ({'vocab_size': 8}, '1 7', r'1 7( [0-7])+'),
    ({'vocab_size': np.int64(8), 'itos': {np.int64(i): np.str_(c) for i, c in enumerate('abcdefgh')}}, 'ab', '[a-h]+'),
    ({'vocab_size': 8, 'itos': dict(enumerate(WORDS))}, 'the cat\nsat', r'.*'),
    ({'vocab_size': 8, 'itos': {i: c for i, c in enumerate('abcdefgh') if i != 5}}, 'ab', '[abcdegh]+'),
], ids=['ids', 'numpy', 'words', 'gap'])
def test_a_meta_pkl_as_people_make_them(run, tmp_path, meta, start, expected):
    folder = tmp_path / 'data/own'
    folder.mkdir(parents=True)
    for split, n in ('train', 3000), ('val', 500):
        np.random.default_rng(n).integers(8, size=n).astype(np.uint16).tofile(folder / f'{split}.bin')
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    trained = run('train.py', '--dataset=own', *TINY)
    assert trained.status == 0 and 'a sample of its own:' in trained.out, trained.err
    sampled = run('sample.py', f'--start={start}', '--max_new_tokens=200', '--temperature=2', '--device=cpu')
    assert sampled.status == 0, sampled.err
    assert re.fullmatch(expected, sampled.out.split('steps\n')[1].rstrip('\n'), flags=re.S)
    if 'itos' in meta and WORDS[0] in str(meta):
        assert set(sampled.out.split('sat ')[1].split()) <= set(WORDS)
        assert run('sample.py', '--start=dog', '--device=cpu').err.count("'dog' begins with none") == 1
    assert run('sample.py', '--max_new_tokens=5', '--device=cpu').status == 0
    tested = run('train.py', '--test', '--device=cpu')
    assert tested.status == 0 and ('bits per byte unknown' in tested.out) == (len(meta) == 1 and 'vocab_size' in meta)


def test_a_meta_pkl_says_the_same_in_many_ways(tmp_path):
    itos, stoi = dict(enumerate('abcdefgh')), {c: i for i, c in enumerate('abcdefgh')}
    for meta in ({'vocab_size': 8, 'itos': itos, 'stoi': stoi}, {'vocab_size': 8, 'itos': [*'abcdefgh']},
                 {'vocab_size': 8, 'stoi': stoi}, {'stoi': stoi}):
        (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
        assert tokens.read_meta(tmp_path) == {'vocab_size': 8, 'tokenizer': {'kind': 'char', 'chars': [*'abcdefgh']}}


@pytest.mark.parametrize('meta', [
    {'vocab_size': 8.5}, {'vocab_size': 0}, {'vocab_size': '8'}, {'itos': {'a': 0}},
    {'vocab_size': 8, 'itos': {i: i for i in range(8)}}, {'vocab_size': 8, 'itos': 5}, {}, [], 5,
    {'vocab_size': 1, 'itos': {'0': 'a'}},
    {'vocab_size': 10**12, 'itos': 'ab'}, {'vocab_size': 10**12},
    {'vocab_size': 8, 'itos': np.array([*'abcdefgh'])}, {'vocab_size': np.array(8, object)}, {'vocab_size': Exception},
], ids=str)
def test_a_meta_pkl_that_will_not_do(tmp_path, capsys, meta):
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    with pytest.raises(SystemExit):
        tokens.read_meta(tmp_path)
    err = capsys.readouterr().err
    assert 'meta.pkl is damaged or foreign' in err and err.count('\n') == 1


@pytest.mark.parametrize('options, words', [
    (['--architecture=modern'], 'architecture = modern, optimizer = muon'),
    (['--architecture=gpt2'], 'optimizer = muon'),
    (['--optimizer=adamw', '--architecture=gpt2,qk_norm=True'], 'architecture = gpt2,qk_norm=True')])
def test_runs_that_nanogpt_cannot_read_say_so(train, options, words):
    line, = [line for line in train('--max_iters=1', *options).out.splitlines() if 'nanoGPT' in line]
    assert line.startswith(f'nanoGPT cannot read the checkpoints of this run: {words}')
