"""The real train.py on a tiny dataset: what a run says, writes and promises."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GPT2, ROOT, losses, records

from kit.data import batches


def evaluations(result):
    """{step: (train loss, val loss)} of the step lines."""
    words = [line.split() for line in result.out.splitlines() if line.startswith('step ')]
    return {int(w[1][:-1]): (float(w[4][:-1]), float(w[7][:-1])) for w in words}


def test_a_run(train, tiny):
    result = train()
    assert result.status == 0, result.err
    # max_iters updates, numbered from 0; evaluated before the first, at the interval, and after the last
    assert list(losses(result)) == list(range(10))
    assert list(evaluations(result)) == [0, 5, 10]
    first, last = losses(result)[0], losses(result)[9]
    assert last < first and abs(first - math.log(27)) < 0.7
    files = {path.name for path in (tiny / 'checkpoints').iterdir()}
    assert files == {'ckpt.pt', 'best.pt', 'step_0000005.pt', 'step_0000010.pt', 'training.log', 'metrics.jsonl',
                     'config.json', 'source.zip', '.lock'}
    assert os.path.samefile(tiny / 'checkpoints/ckpt.pt', tiny / 'checkpoints/step_0000010.pt')
    assert 'a sample of its own' in result.out and 'python sample.py' in result.out
    assert (tiny / 'checkpoints/training.log').read_text() == result.out
    assert result.err == ''


def test_the_lines_are_those_of_the_contract(train):
    result = train('--max_iters=3')
    number = r'[0-9.]+'
    assert re.search(rf'^step 0: train loss {number}, val loss {number}, val accuracy {number}%$', result.out, re.M)
    assert re.search(rf'^iter 2: loss {number}, time {number}ms, mfu {number}%, lr \d\.\de-\d\d, norm {number}, '
                     rf'{number}k? tok/s, eta 0s, epoch {number}$', result.out, re.M)
    assert re.search(r'^saving checkpoint to checkpoints', result.out, re.M)


def test_records(train, tiny):
    result = train()
    found = records(tiny / 'checkpoints')
    steps = [r for r in found if 'loss' in r]
    assert {r['step']: round(r['loss'], 4) for r in steps} == losses(result)
    assert {'lr', 'grad_norm', 'time_ms', 'tokens_per_second', 'mfu', 'epoch', 'time'} <= steps[0].keys()
    evaluated = {r['step']: r for r in found if 'val/loss' in r}
    assert list(evaluated) == [0, 5, 10] and 0 <= evaluated[5]['val/accuracy'] <= 1


def test_tensorboard(train, tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train('--tensorboard=True', '--max_iters=4')
    folder, = (tiny / 'runs').iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert {'Loss/train', 'Loss/val', 'Accuracy/val', 'Training/Loss', 'Learning_rate',
            'Training/GradNorm'} <= set(events.Tags()['scalars'])
    assert [e.step for e in events.Scalars('Training/Loss')] == [0, 1, 2, 3]
    assert [e.step for e in events.Scalars('Loss/val')] == [0, 4]


def test_the_rate(train, tiny):
    rates = lambda: [r['lr'] for r in records(tiny / 'checkpoints') if 'loss' in r]
    train('--learning_rate=1e-2', '--min_lr=1e-3', '--warmup_iters=3', '--lr_decay_iters=8')
    cosine = [1e-3 + 9e-3 * 0.5 * (1 + math.cos(math.pi * (s - 3) / 5)) for s in range(3, 8)]
    assert rates() == pytest.approx([1e-2 / 4, 2e-2 / 4, 3e-2 / 4, *cosine, 1e-3, 1e-3])
    train('--learning_rate=1e-2', '--warmup_iters=3', '--decay_lr=False')  # nanoGPT drops the warmup here
    assert rates() == pytest.approx([1e-2 / 4, 2e-2 / 4, 3e-2 / 4] + [1e-2] * 7)
    train('--learning_rate=1e-2', '--warmup_iters=0')  # the decay follows max_iters
    assert rates()[0] == pytest.approx(1e-2) and rates()[9] < 6e-4


def test_the_step_against_plain_torch(train, tiny):
    """Weights after three steps of two micro-steps = a plain loop over the whole batch."""
    from model import GPT, GPTConfig
    settings = ['--max_iters=3', '--batch_size=3', '--gradient_accumulation_steps=2', '--grad_clip=0.5',
                '--warmup_iters=0', '--decay_lr=False', '--learning_rate=0.01', '--weight_decay=0.3', '--beta2=0.9']
    result = train(*GPT2, *settings, '--sampling=random')
    ours = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**ours['model_args']))
    optimizer = torch.optim.AdamW([
        {'params': [p for p in model.parameters() if p.dim() > 1], 'weight_decay': 0.3},
        {'params': [p for p in model.parameters() if p.dim() == 1], 'weight_decay': 0.0}], lr=0.01, betas=(0.9, 0.9))
    data = np.fromfile(tiny / 'data/tiny/train.bin', dtype=np.uint16).astype(np.int64)
    for step in range(3):
        starts = np.random.default_rng((1337, step)).integers(len(data) - 16, size=6)
        x = torch.from_numpy(np.stack([data[i:i + 16] for i in starts]))
        y = torch.from_numpy(np.stack([data[i + 1:i + 17] for i in starts]))
        loss = model(x, y)[1]
        assert losses(result)[step] == pytest.approx(loss.item(), abs=1e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours['model'][name], value, rtol=1e-4, atol=1e-5)


def test_the_same_step_however_it_is_cut(train, pair):
    whole = train('--batch_size=16')
    cut = train('--batch_size=4', '--gradient_accumulation_steps=4')
    two = pair('--batch_size=4', '--gradient_accumulation_steps=4')
    assert two.status == 0, two.err
    assert list(losses(two)) == list(range(10)) and two.out.count('saving checkpoint') == 2
    assert list(losses(cut).values()) == pytest.approx(list(losses(whole).values()), abs=1e-4)
    assert list(losses(two).values()) == pytest.approx(list(losses(whole).values()), abs=1e-4)


def test_two_processes_evaluate_as_one(train, pair, trained):
    """eval_only as two processes: the same windows, the same sums."""
    one = train('--init_from=resume', '--eval_only', '--eval_iters=0')
    two = pair('--gradient_accumulation_steps=2', '--init_from=resume', '--eval_only', '--eval_iters=0')
    assert two.status == 0, two.err
    assert evaluations(one)[10] == pytest.approx(evaluations(two)[10], abs=1e-4)
    assert two.out.count('step 10') == 1


def test_evaluation_disturbs_nothing(train):
    """Dropout is on: evaluating and saving at other steps changes no draw of the training."""
    often = losses(train('--dropout=0.3', '--eval_interval=1', '--save_interval=1'))
    never = losses(train('--dropout=0.3', '--eval_interval=0', '--save_interval=0'))
    assert often == never


def test_evaluation_is_the_mean_over_the_whole_split(train, tiny):
    from model import GPT, GPTConfig
    result = train('--eval_iters=0')
    saved = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)
    model = GPT(GPTConfig(**saved['model_args']))
    model.load_state_dict(saved['model'])
    data = torch.from_numpy(np.fromfile(tiny / 'data/tiny/val.bin', dtype=np.uint16).astype(np.int64))
    total = right = 0
    for t in range(0, len(data) - 1, 16):
        end = min(t + 16, len(data) - 1)
        start = end - 16  # the last window has the text before it as context
        logits, _ = model(data[None, start:end], data[None, start + 1:end + 1])
        logits, y = logits[0, t - start:], data[t + 1:end + 1]
        total += torch.nn.functional.cross_entropy(logits, y, reduction='sum').item()
        right += (logits.argmax(-1) == y).sum().item()
    assert evaluations(result)[10][1] == pytest.approx(total / (len(data) - 1), abs=1e-4)
    assert f'val accuracy {right / (len(data) - 1):.2%}' in result.out


def test_resume_takes_its_settings_from_the_checkpoint(run, train, tiny):
    train('--learning_rate=0.004', '--weight_decay=0.2')
    resumed = run('train.py', '--init_from=resume', '--max_iters=12', '--weight_decay=0.5', '--device=cpu')
    assert resumed.status == 0, resumed.err
    assert 'From the checkpoint: learning_rate = 0.004' in resumed.out
    assert 'Not from the checkpoint: max_iters = 12 (it has 10)' in resumed.out
    assert list(losses(resumed)) == [10, 11]
    saved = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)
    assert saved['iter_num'] == 12 and saved['config']['learning_rate'] == 0.004 and saved['config']['n_embd'] == 32
    assert saved['optimizer']['param_groups'][0]['weight_decay'] == 0.5


def test_checkpoints_hold_what_is_promised(train, tiny):
    train(*GPT2)
    saved = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= saved.keys()
    assert saved['model_args'] == dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False, vocab_size=27,
                                       dropout=0.0)
    assert saved['iter_num'] == 10 and saved['meta']['tokenizer']['kind'] == 'char'
    best = torch.load(tiny / 'checkpoints/best.pt', weights_only=True)
    evaluated = {r['step']: r['val/loss'] for r in records(tiny / 'checkpoints') if 'val/loss' in r}
    assert best['best_val_loss'] == evaluated[best['iter_num']] == min(evaluated.values())


def test_the_last_checkpoints_are_kept(train, tiny):
    train('--save_interval=2', '--keep_last=3')
    assert sorted(p.name for p in (tiny / 'checkpoints').glob('step_*')) == [
        f'step_{step:07d}.pt' for step in (6, 8, 10)]


def test_always_save_checkpoint(train, tiny):
    """A rate of 10 makes every evaluation worse than the first: only the end is saved, or every evaluation."""
    for always, expected in (False, 1), (True, 2):
        result = train('--learning_rate=10', '--min_lr=1', '--save_interval=0', f'--always_save_checkpoint={always}')
        assert result.out.count('saving checkpoint') == expected
        assert not (tiny / 'checkpoints/best.pt').exists()


def test_an_earlier_run_is_moved_aside(train, tiny):
    for number in 0, 1, 2:
        result = train(f'--seed={number}')
    assert 'moved to checkpoints.2' in result.out
    for number, name in enumerate(('checkpoints.1', 'checkpoints.2', 'checkpoints')):
        assert torch.load(tiny / name / 'ckpt.pt', weights_only=True)['config']['seed'] == number


FULL_DISK = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))'


def test_a_full_disk_stops_no_training(hooked, tiny):
    """Files may grow to 30 kB: no checkpoint fits. The script runs on, says so, and leaves no half-written file."""
    pytest.importorskip('resource')
    result = hooked(FULL_DISK)
    assert result.status == 1 and result.err == ''  # the last state is lost, and a script can see that
    assert list(losses(result)) == list(range(10)) and result.out.count('WARNING: no checkpoint was saved') == 2
    assert not [p.name for p in (tiny / 'checkpoints').iterdir() if '.pt' in p.name]


@pytest.mark.parametrize('setting', ['--dry_run', '--eval_only'])
def test_a_launch_that_does_not_train_writes_nothing(train, tiny, setting):
    before = sorted(tiny.rglob('*'))
    result = train(setting)
    assert result.status == 0, result.err
    assert sorted(tiny.rglob('*')) == before


def test_a_look_before_training(train):
    result = train('--dry_run', '--gradient_accumulation_steps=3', '--max_iters=100')
    for said in ('x (4, 16), y (4, 16)', f'{math.log(27):.4f}', '1.07 epochs', 'of memory',
                 '4 rows x 3 micro-steps x 16 tokens = 192 tokens', 'in 2 layers of 2 heads', 'of 18,000 tokens',
                 'memory of a step, by plan: ', 'optimizer ', 'activations ', '; cpu has ', 'time of a step: about ',
                 'with --activation_checkpointing: '):
        assert said in result.out, said
    assert 'WARNING' not in result.out and not losses(result)
    x, y = (eval(line.split('... = ')[1][:-3]) for line in result.out.splitlines() if line.startswith('  '))
    assert len(x) > 9 and y.startswith(x[1:])  # the pieces are text, one token apart


def test_heads_are_derived(train, tiny):
    for width, heads in (512, 8), (384, 6), (32, 1), (200, 2):
        train('--n_head=0', f'--n_embd={width}', '--max_iters=1', '--n_layer=1', '--eval_iters=1')
        saved = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)
        assert saved['model_args']['n_head'] == heads and saved['config']['n_head'] == 0


def test_the_test_split(train, trained):
    result = train('--test')
    assert result.status == 0 and 'checkpoints/best.pt' in result.out
    words = next(line for line in result.out.splitlines() if line.startswith('test loss')).split()
    loss, perplexity = float(words[2][:-1]), float(words[4][:-1])
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3) and '(999 tokens)' in result.out
    named = train('--test', '--checkpoint=./checkpoints/step_0000005.pt')
    assert 'step_0000005.pt, after 5 steps' in named.out


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_mixed_precision_learns(train, dtype):
    found = losses(train(f'--dtype={dtype}', '--max_iters=20'))
    plain = losses(train('--max_iters=20'))
    assert found != plain and max(abs(found[s] - plain[s]) for s in plain) < 0.05


def test_epochs_are_shown(train, tiny):
    """An epoch of shuffle is 19 blocks here: as many as it visits, not the 20 that the text would fill."""
    result = train('--sampling=shuffle', '--block_size=900', '--batch_size=2', '--log_interval=9')
    assert batches.blocks_per_epoch(18_000, 900) == 19
    assert re.search(rf'^iter 9: .*, epoch {20 / 19:.2f}$', result.out, re.M)


def test_another_precision_on_resume(train, trained):
    """A run in float32 has no state of a loss scaler; it goes on in float16 all the same."""
    result = train('--init_from=resume', '--dtype=float16', '--max_iters=12')
    assert result.status == 0 and list(losses(result)) == [10, 11], result.err


def test_rows_that_cannot_be_shared_out(pair, tiny):
    result = pair('--batch_size=3')
    assert result.status != 0 and not (tiny / 'checkpoints').exists()
    assert result.err.count('train.py: the 3 rows of a step (batch_size x gradient_accumulation_steps) cannot be '
                            'shared out evenly over 2 processes; 1 or 3 can share them, or 4 rows') == 1


def test_a_run_is_reproducible(train):
    args = '--dropout=0.1', '--max_iters=4'
    assert losses(train(*args)) == losses(train(*args)) != losses(train(*args, '--seed=1'))


def test_it_runs_from_anywhere(run, tmp_path):
    """A config file of the repository, from a folder that has none; its data is looked for here first."""
    (tmp_path / 'data').mkdir()
    result = run('train.py', 'config/train_shakespeare_char.py', '--dataset=nothing_like_it')
    assert result.status == 2 and 'nothing_like_it' in result.err


def test_tensorboard_and_matplotlib_wait(tmp_path):
    """A script that stops at its settings has imported neither."""
    code = (f'import sys, runpy; sys.path[0] = {str(ROOT)!r}; sys.argv = ["train.py", "--batch_size=-1"]\n'
            'try: runpy.run_path(sys.path[0] + "/train.py")\n'
            'except SystemExit: pass\n'
            'late = "tensorboard", "matplotlib", "transformers", "wandb"\n'
            'print([name for name in sys.modules if name.split(".")[0] in late])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == '[]', done.stderr


def test_records_are_strict_json(train, tiny):
    """A rate of 1e30 makes NaN at once; JSON has none."""
    result = train('--max_iters=3', '--learning_rate=1e30', '--decay_lr=False', '--warmup_iters=0')
    assert 'loss nan' in result.out
    for line in (tiny / 'checkpoints/metrics.jsonl').read_text().splitlines():
        assert json.loads(line, parse_constant=pytest.fail)['step'] in (0, 1, 2, 3)
