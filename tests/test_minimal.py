"""minimal.py, launched with other settings in a folder of its own: the same numbers as train.py, on one short page."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, losses, records

from model import GPTConfig

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / 'minimal.py').read_text(encoding='utf-8')

# lines of minimal.py, and what stands there in a run that takes a second
CHANGES = {
    "dataset = 'python_docs'": "dataset = 'tiny'",
    'batch_size, block_size = 12, 64': 'batch_size, block_size = 3, 16',
    'gradient_accumulation_steps = 1': 'gradient_accumulation_steps = 3',
    'n_layer, n_head, n_embd = 2, 2, 128': 'n_layer, n_head, n_embd = 2, 2, 32',
    'max_iters, warmup_iters = 4000, 100': 'max_iters, warmup_iters = 50, 7',
    'learning_rate, min_lr = 4e-3, 1e-4': 'learning_rate, min_lr = 2e-2, 3e-4',
    'beta1, beta2 = 0.9, 0.99': 'beta1, beta2 = 0.8, 0.95',
    'weight_decay, grad_clip = 1e-1, 1.0': 'weight_decay, grad_clip = 0.3, 0.7',
    'eval_interval, eval_iters = 400, 40': 'eval_interval, eval_iters = 20, 2',
    'log_interval, seed = 50, 1337': 'log_interval, seed = 1, 7',
    "device = 'cuda' if torch.cuda.is_available() else 'cpu'": "device = 'cpu'",
}
# and the same for train.py
FLAGS = [*TINY, '--batch_size=3', '--gradient_accumulation_steps=3', '--max_iters=50', '--warmup_iters=7',
         '--learning_rate=2e-2', '--min_lr=3e-4', '--beta1=0.8', '--beta2=0.95', '--weight_decay=0.3',
         '--grad_clip=0.7', '--eval_interval=20', '--seed=7', '--save_interval=0', '--dtype=float32', '--compile=False',
         '--architecture=gpt2', '--optimizer=adamw', '--sampling=random']


@pytest.fixture
def minimal(run, tiny):
    """minimal(more) -> Result: minimal.py with CHANGES and more of them. It prints losses with all their digits."""
    def launch(more=None):
        changes = CHANGES | (more or {})
        lines = [changes.get(line.split('  #')[0].rstrip(), line) for line in PAGE.split('\n')]
        found = [line for line in lines if line in changes.values()]
        assert sorted(found) == sorted(changes.values())  # each of them, once
        assert PAGE.count(':.4f}') == 3
        folder = tiny / 'alone'  # there is no kit beside it
        folder.mkdir(exist_ok=True)
        for file in 'model.py', 'attention.py':
            shutil.copy(REPOSITORY / file, folder)
        (folder / 'minimal.py').write_text('\n'.join(lines).replace(':.4f}', '}'), encoding='utf-8')
        return run(folder / 'minimal.py')
    return launch


def evaluations(result):
    """{step: (train loss, val loss)} of the step lines."""
    words = [line.split() for line in result.out.splitlines() if line.startswith('step ')]
    return {int(w[1][:-1]): (float(w[4][:-1]), float(w[7])) for w in words}


def states(path):
    """The weights in a checkpoint and what the optimizer remembers of each, one after the other."""
    saved = torch.load(path, weights_only=True)
    moments = saved['optimizer']['state']
    return saved['model'] | {(i, name): value for i, state in moments.items() for name, value in state.items()}


@pytest.mark.parametrize('dataset', ['tiny', 'large'])
def test_the_numbers_are_those_of_train_py(run, minimal, tiny, dataset):
    """50 steps of three micro-steps: losses, evaluations, weights and moments, bit for bit."""
    if dataset == 'large':  # a vocabulary that is rounded up to a multiple of 64
        (tiny / 'large.txt').write_text(''.join(chr(0x4e00 + i * 7 % 1103) for i in range(30_000)), encoding='utf-8')
        assert run('prepare.py', '--input=large.txt', '--dataset=large').status == 0
    theirs = run('train.py', f'--dataset={dataset}', *FLAGS)
    assert theirs.status == 0, theirs.err
    ours = minimal({"dataset = 'python_docs'": f"dataset = '{dataset}'"})
    assert ours.status == 0 and ours.err == '', ours.err

    found = records(tiny / 'checkpoints')
    steps = {r['step']: r['loss'] for r in found if 'loss' in r}
    assert losses(ours) == steps and list(steps) == list(range(50))
    evaluated = {r['step']: (r['train/loss'], r['val/loss']) for r in found if 'val/loss' in r}
    assert evaluations(ours) == evaluated and list(evaluated) == [0, 20, 40, 50]
    if dataset == 'tiny':  # so that clipping could not be left out
        norms = [r['grad_norm'] for r in found if 'loss' in r]
        assert min(norms) < 0.7 < max(norms)

    mine, its = states(tiny / 'minimal.pt'), states(tiny / 'checkpoints/ckpt.pt')
    assert mine.keys() == its.keys() and len(mine) > 40
    assert all(torch.equal(mine[name], its[name]) for name in its)
    saved, other = (torch.load(tiny / name, weights_only=True) for name in ('minimal.pt', 'checkpoints/ckpt.pt'))
    assert saved['model_args'] | {'dropout': 0.0} == other['model_args']
    assert saved['optimizer']['param_groups'] == other['optimizer']['param_groups']
    assert saved['meta'] | {'text': other['meta']['text']} == other['meta']
    assert saved['iter_num'] == other['iter_num'] == 50


def test_the_other_scripts_read_its_checkpoint(run, minimal, tiny):
    result = minimal({'max_iters, warmup_iters = 4000, 100': 'max_iters, warmup_iters = 9, 7'})
    assert result.status == 0, result.err
    assert sorted(path.name for path in tiny.glob('minimal*')) == ['minimal.pt']
    assert len(result.out.split('val loss ')[-1].split('\n', 1)[1]) > 400  # its sample is text
    sampled = run('sample.py', '--checkpoint=minimal.pt', '--max_new_tokens=20', '--device=cpu')
    assert sampled.status == 0 and 'minimal.pt, after 9 steps' in sampled.out, sampled.err
    tested = run('train.py', '--test', '--checkpoint=minimal.pt', '--device=cpu')
    assert tested.status == 0 and 'test loss' in tested.out, tested.err
    going_on = run('train.py', '--init_from=minimal.pt', '--dataset=tiny', *TINY, '--max_iters=1')
    assert going_on.status == 0 and list(losses(going_on)) == [0], going_on.err


def test_ids_where_it_cannot_decode_and_data_beside_the_script(run, minimal, tiny):
    assert run('prepare.py', '--input=text.txt', '--dataset=bytes', '--tokenizer=byte').status == 0
    (tiny / 'alone').mkdir()
    shutil.move(tiny / 'data', tiny / 'alone')
    result = minimal({"dataset = 'python_docs'": "dataset = 'bytes'",
                      'max_iters, warmup_iters = 4000, 100': 'max_iters, warmup_iters = 2, 1'})
    assert result.status == 0, result.err
    ids = ast.literal_eval(result.out.splitlines()[-1])
    assert len(ids) == 401 and ids[0] == 0 and max(ids) < 257


def test_a_missing_dataset_is_one_line(tmp_path):
    for name in 'minimal.py', 'model.py', 'attention.py':  # a copy, since a checkout may hold data/python_docs
        shutil.copy(REPOSITORY / name, tmp_path)
    done = subprocess.run([sys.executable, tmp_path / 'minimal.py'], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 1 and done.stdout == ''
    assert done.stderr.count('\n') == 1 and 'python prepare.py python_docs' in done.stderr


def constants(page):
    """{name: value} of what a script sets to a constant, alone or several in a line, outside its functions."""
    found = {}
    for node in ast.parse(page).body:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            are_many = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            for name, one in zip(target.elts, value.elts) if are_many else [(target, value)]:
                if isinstance(name, ast.Name) and isinstance(one, ast.Constant):
                    found[name.id] = one.value
    return found


def test_its_settings_are_those_of_a_recipe_of_train_py():
    mine = constants(PAGE)
    its = constants((REPOSITORY / 'train.py').read_text(encoding='utf-8'))
    its |= constants((REPOSITORY / 'config/train_python_docs_gpt2.py').read_text(encoding='utf-8'))
    assert its['n_head'] == 0
    its['n_head'] = GPTConfig(n_head=0, n_embd=its['n_embd']).n_head  # what the 0 stands for
    assert set(mine) <= set(its) and len(mine) == 19
    assert mine == {name: its[name] for name in mine}


def test_one_short_page():
    """At most 110 lines, of torch, numpy, the standard library and model.py; no classes, no command line."""
    lines = PAGE.splitlines()
    assert len(lines) <= 110 and max(map(len, lines)) <= 120
    nodes = list(ast.walk(ast.parse(PAGE)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split('.')[0] for name in imported} - sys.stdlib_module_names == {'torch', 'numpy', 'model'}
    assert not imported & {'argparse', 'sys'} and not any(isinstance(node, ast.ClassDef) for node in nodes)
    statements = [node.lineno for node in nodes if isinstance(node, ast.stmt)]
    assert len(statements) == len(set(statements))  # one a line
