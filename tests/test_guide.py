"""
The commands of the guide's five experiments, verbatim; only what makes them end soon is added behind, and another text
stands in for Shakespeare's. The first command of all, python train.py, is run whole by pytest -m long.
"""

import math
import shutil

import pytest
import torch
from conftest import ROOT, losses

CHAR = 'config/train_shakespeare_char.py'
COMMANDS = f"""
{CHAR} --max_iters=1000 --out_dir=exp1_baseline
{CHAR} --max_iters=1000 --learning_rate=5e-3 --out_dir=exp1_large_lr
{CHAR} --max_iters=1000 --learning_rate=1e-4 --out_dir=exp1_small_lr
{CHAR} --max_iters=1000 --batch_size=16 --out_dir=exp1_small_batch
{CHAR} --max_iters=1000 --n_layer=8 --n_embd=512 --out_dir=exp1_large_model
{CHAR} --batch_size=64 --gradient_accumulation_steps=1 --max_iters=500 --out_dir=exp2_large_batch
{CHAR} --batch_size=16 --gradient_accumulation_steps=4 --max_iters=500 --out_dir=exp2_grad_accum
{CHAR} --max_iters=5000 --dropout=0.0 --weight_decay=0.0 --out_dir=exp3_overfit
{CHAR} --max_iters=5000 --dropout=0.2 --weight_decay=0.0 --out_dir=exp3_dropout
{CHAR} --max_iters=5000 --dropout=0.0 --weight_decay=0.1 --out_dir=exp3_weight_decay
{CHAR} --max_iters=5000 --dropout=0.2 --weight_decay=0.1 --out_dir=exp3_both
{CHAR} --max_iters=2000 --warmup_iters=0 --decay_lr=False --out_dir=exp4_no_schedule
{CHAR} --max_iters=2000 --warmup_iters=100 --decay_lr=False --out_dir=exp4_warmup_only
{CHAR} --max_iters=2000 --warmup_iters=0 --decay_lr=True --lr_decay_iters=2000 --out_dir=exp4_decay_only
{CHAR} --max_iters=2000 --warmup_iters=100 --decay_lr=True --lr_decay_iters=2000 --out_dir=exp4_full_schedule
{CHAR} --n_layer=2 --n_head=2 --n_embd=128 --max_iters=3000 --out_dir=exp5_tiny
{CHAR} --n_layer=4 --n_head=4 --n_embd=256 --max_iters=3000 --out_dir=exp5_small
{CHAR} --n_layer=6 --n_head=6 --n_embd=384 --max_iters=3000 --out_dir=exp5_medium
{CHAR} --n_layer=8 --n_head=8 --n_embd=512 --max_iters=3000 --out_dir=exp5_large
""".strip().splitlines()


@pytest.fixture
def shakespeare(tiny):
    (tiny / 'data/tiny').rename(tiny / 'data/shakespeare_char')
    return tiny


@pytest.mark.parametrize('command', COMMANDS)
def test_experiments_start(run, shakespeare, command):
    """Every command as it stands: the model is built, a batch is drawn, a pass is made (of 1 row, to be quick)."""
    result = run('train.py', *command.split(), '--dry_run', '--batch_size=1', '--compile=False', '--device=cpu')
    assert result.status == 0, result.err
    assert f'a fair guess among 27 ids would have {math.log(27):.4f}' in result.out and 'WARNING' not in result.out
    if 'exp1_large_model' in command:
        assert 'in 8 layers of 8 heads and 512 channels' in result.out


def test_accumulation_equals_the_large_batch(run, shakespeare):
    """Experiment 2 with a model that is quick, 50 steps, dropout 0: the curves are one."""
    small = ['--n_layer=2', '--n_embd=64', '--block_size=32', '--dropout=0.0', '--max_iters=50', '--log_interval=1',
             '--eval_iters=1', '--device=cpu', '--tensorboard=False']
    large = losses(run('train.py', CHAR, '--batch_size=64', '--gradient_accumulation_steps=1', *small))
    accum = losses(run('train.py', CHAR, '--batch_size=16', '--gradient_accumulation_steps=4', *small))
    assert list(large) == list(range(50))
    assert list(accum.values()) == pytest.approx(list(large.values()), abs=1.01e-4)


@pytest.mark.long
def test_the_first_command(run, tmp_path):
    """python train.py in a fresh clone: ten checkpoints, each whole, and text of its own."""
    clone = tmp_path / 'clone'
    shutil.copytree(ROOT / 'kit', clone / 'kit')
    for script in 'train.py', 'model.py', 'sample.py', 'plot_loss.py':
        shutil.copy(ROOT / script, clone)
    result = run(clone / 'train.py', cwd=clone)
    assert result.status == 0 and 'a sample of its own' in result.out, result.err
    kept = sorted((clone / 'checkpoints').glob('step_*.pt'))
    assert len(kept) == 10
    for path in kept:
        assert torch.load(path, weights_only=True)['iter_num'] == int(path.stem[5:])
    assert run(clone / 'plot_loss.py', cwd=clone).status == 0
    assert (clone / 'checkpoints/loss_curve.png').stat().st_size > 10_000


@pytest.mark.long
def test_compiled_losses_are_the_eager(train):
    """torch.compile on the CPU takes a C++ compiler and a minute."""
    eager, compiled = losses(train()), losses(train('--compile'))
    assert list(compiled.values()) == pytest.approx(list(eager.values()), abs=1e-4)
