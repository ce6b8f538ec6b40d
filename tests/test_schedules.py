"""The rates of a run: against torch's own schedulers, as train.py has them, as a resume has them, as a picture."""

import math
import random

import pytest
import torch
from conftest import records
from torch.optim import lr_scheduler

from kit.learn import schedules

N, HIGH, LOW = 1000, 1e-3, 1e-5
SETTINGS = {'learning_rate': HIGH, 'min_lr': LOW, 'warmup_iters': 0, 'warmup_share': 0.0, 'warmup_start_lr': 0.0,
            'max_iters': N, 'lr_decay_iters': 0, 'decay_lr': True, 'min_delta': 1e-4}


def of_torch(make, n=N, metrics=None, high=HIGH):
    """The rates of a scheduler of torch's over n steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=high)
    scheduler, rates = make(optimizer), []
    for step in range(n):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step(*([metrics[step]] if metrics else []))
    return rates


def ours(schedule, n=N, **settings):
    s = SETTINGS | {'lr_schedule': schedule} | settings
    return [schedules.rate(step, s) for step in range(n)]


def wsd(optimizer):
    return lr_scheduler.SequentialLR(optimizer, [
        lr_scheduler.ConstantLR(optimizer, 1.0), lr_scheduler.LinearLR(optimizer, 1.0, LOW / HIGH, 200)], [800])


@pytest.mark.parametrize('schedule, make', [
    ('cosine', lambda o: lr_scheduler.CosineAnnealingLR(o, N, LOW)),
    ('linear', lambda o: lr_scheduler.LinearLR(o, 1.0, LOW / HIGH, N)),
    ('exponential', lambda o: lr_scheduler.ExponentialLR(o, (LOW / HIGH) ** (1 / N))),
    ('step:100:0.7', lambda o: lr_scheduler.StepLR(o, 100, 0.7)),
    ('step:300', lambda o: lr_scheduler.StepLR(o, 300, 0.1)),
    ('multistep:200,500,501:0.5', lambda o: lr_scheduler.MultiStepLR(o, [200, 500, 501], 0.5)),
    ('restarts:100', lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 100, 1, LOW)),
    ('restarts:70:2', lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 70, 2, LOW)),
    ('inverse_sqrt', lambda o: lr_scheduler.LambdaLR(o, lambda step: max(1, step) ** -0.5)),
    ('wsd', wsd),
    ('constant', lambda o: lr_scheduler.ConstantLR(o, 1.0)),
], ids=lambda value: value if isinstance(value, str) else '')
def test_against_torch(schedule, make):
    low = 0.0 if schedule.startswith(('step', 'multi')) else LOW
    assert ours(schedule, min_lr=low) == pytest.approx(of_torch(make), abs=1e-12, rel=0)


@pytest.mark.parametrize('patience, gamma', [(1, 0.5), (3, 0.5), (5, 0.9)])
def test_plateau_against_torch(patience, gamma):
    """torch acts at one evaluation more than its patience, we at that one; both compare with the lowest so far."""
    rng = random.Random(patience)
    losses = [4 - 3 * (1 - math.exp(-i / 200)) + rng.gauss(0, 0.03) for i in range(N)]
    theirs = of_torch(lambda o: lr_scheduler.ReduceLROnPlateau(
        o, factor=gamma, patience=patience - 1, threshold=1e-2, threshold_mode='abs', eps=0, min_lr=1e-7), N, losses)
    s = SETTINGS | {'lr_schedule': f'plateau:{patience}:{gamma}', 'min_delta': 1e-2, 'min_lr': 1e-7}
    assert [schedules.rate(i, s, losses[:i]) for i in range(N)] == pytest.approx(theirs, abs=1e-12, rel=0)
    assert theirs[-1] < theirs[0] / 2


@pytest.mark.parametrize('start', [0.0, 1e-4])
@pytest.mark.parametrize('schedule, make', [
    ('cosine', lambda o: lr_scheduler.CosineAnnealingLR(o, 900, LOW)),
    ('step:300', lambda o: lr_scheduler.StepLR(o, 300, 0.1)),
    ('multistep:250,600', lambda o: lr_scheduler.MultiStepLR(o, [150, 500], 0.1)),  # ours are steps of the run
    ('constant', lambda o: lr_scheduler.ConstantLR(o, 1.0)),
], ids=lambda value: value if isinstance(value, str) else '')
def test_warmup_goes_before_any_of_them(schedule, make, start):
    first = start or HIGH / 101  # nanoGPT's
    warmup = of_torch(lambda o: lr_scheduler.LinearLR(o, first / HIGH, 1.0, 100), 100)
    expected = warmup + of_torch(make, 900)
    low = 0.0 if schedule.startswith(('step', 'multi')) else LOW
    assert ours(schedule, warmup_iters=100, warmup_start_lr=start, min_lr=low) == pytest.approx(expected, abs=1e-12,
                                                                                                rel=0)
    assert ours(schedule, warmup_iters=7, warmup_share=0.1, warmup_start_lr=start, min_lr=low) == pytest.approx(
        expected, abs=1e-12, rel=0)


@pytest.mark.parametrize('schedule', ['cosine', 'linear', 'exponential', 'wsd'])
def test_past_its_end_the_rate_stays_low(schedule):
    """Where a cosine of torch's would climb again."""
    assert ours(schedule, 1500, lr_decay_iters=800)[800:] == pytest.approx([LOW] * 700)


@pytest.mark.parametrize('schedule', ['step:10', 'multistep:10,20,30', 'inverse_sqrt', 'plateau:1'])
def test_none_goes_below_min_lr(schedule):
    s = SETTINGS | {'lr_schedule': schedule, 'min_lr': 5e-4}
    assert min(schedules.rate(step, s, [1.0] * 20) for step in range(100)) == 5e-4


def test_without_decay_the_warmup_stays():
    """nanoGPT drops it."""
    assert ours('cosine', 8, decay_lr=False, warmup_iters=3) == pytest.approx(
        [HIGH / 4, HIGH / 2, 3 * HIGH / 4] + [HIGH] * 5)


@pytest.mark.parametrize('args', [
    ['--lr_schedule=cosine'], ['--lr_schedule=cosine', '--lr_decay_iters=6', '--warmup_start_lr=1e-3'],
    ['--lr_schedule=linear', '--warmup_share=0.3'], ['--lr_schedule=exponential'], ['--lr_schedule=step:3:0.5'],
    ['--lr_schedule=multistep:4,7'], ['--lr_schedule=restarts:2:2'], ['--lr_schedule=inverse_sqrt'],
    ['--lr_schedule=wsd:0.5'], ['--lr_schedule=constant'], ['--decay_lr=False'],
    ['--lr_schedule=constant', '--decay_lr=0'],
], ids=' '.join)
def test_train_has_these_rates(train, tiny, args):
    """train.py has warmup and cosine once more, inline; they are the same, and the others are what it takes."""
    assert train('--eval_interval=0', *args).status == 0
    saved = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)
    rates = [record['lr'] for record in records(tiny / 'checkpoints') if 'lr' in record]
    assert rates == [schedules.rate(step, saved['config']) for step in range(10)]
    assert len(set(rates)) > 2


def test_plateau_in_a_run(train, tiny):
    """A rate that moves nothing: the first evaluation is the best, and each later one brings a cut."""
    result = train('--lr_schedule=plateau:1:0.5', '--learning_rate=1e-12', '--min_lr=0', '--warmup_iters=0',
                   '--eval_interval=2')
    rates = [record['lr'] for record in records(tiny / 'checkpoints') if 'lr' in record]
    assert rates == pytest.approx([1e-12 * 0.5 ** (step // 2) for step in range(10)]), result.err


def test_damping():
    calm = [1.0, 1.1, 0.9] * 33
    assert schedules.damping(calm, 1.0) == 1.0
    assert schedules.damping([math.inf] * 95 + [1.0, 1.0, 50.0, 1.0, 1.0], 1.0) == 1.0  # too few to tell
    factors = [schedules.damping(calm[n:] + [8.0] + [1.0] * n, 1.0) for n in range(20)]
    assert factors[0] == pytest.approx(2 / 8) and factors == sorted(factors) and factors[-1] == 1.0  # it recovers
    assert schedules.damping(calm + [1e9], 1.0) == schedules.LOWEST_FACTOR
    assert schedules.damping([10.0] * 100, 1.0) == 0.5 and schedules.damping([10.0] * 100, math.inf) == 1.0


@pytest.mark.parametrize('schedule, words', [
    ('cosin', "no such schedule; did you mean cosine?"), ('step:0', "'0' is not what it takes there: a whole number"),
    ('step:ten', "'ten'"), ('step:10:2', 'up to 1'), ('cosine:5', 'cosine takes no numbers'),
    ('multistep', 'multistep:2000,3000'), ('multistep:20,10', 'each higher than the one before'),
    ('multistep:10,10', 'each higher'), ('multistep:1,5', 'first cut is at step 1, before the warmup of 2'),
    ('plateau:3:0.1:7', 'as in --lr_schedule=plateau:3:0.1'), ('wsd:1,2', "'1,2'"), ('', 'no such schedule'),
])
def test_what_is_no_schedule(train, tiny, schedule, words):
    before = sorted(tiny.rglob('*'))
    result = train(f'--lr_schedule={schedule}')
    assert result.status == 2 and result.err.count('\n') == 1 and words in result.err
    assert sorted(tiny.rglob('*')) == before


# ---------------------------------------------------------------------------------------------------------------------
# the picture of a run that is still to be made


def test_the_rate_of_a_run_as_a_picture(run, tmp_path):
    result = run('plot_loss.py', '--schedule', 'config/train_shakespeare_char_cpu.py', cwd=tmp_path)
    assert result.status == 0, result.err
    assert (tmp_path / 'schedule.png').stat().st_size > 10_000 and not (tmp_path / 'loss_curve.png').exists()
    assert '2,000 steps: 100 of warmup, 1.0e-03 at the highest, 1.0e-04 in the last' in result.out


@pytest.mark.parametrize('args, words', [
    (['--schedule=--max_iters=50 --lr_schedule=wsd --warmup_iters=5 --learning_rate=0.02'], '50 steps: 5 of warmup'),
    (['--schedule=--lr_schedule=plateau:2'], 'plateau: the rate will be cut'),
    (['--schedule=--max_minutes=3'], 'max_minutes: the number of steps is not known'),
])
def test_what_the_picture_cannot_know(run, tmp_path, args, words):
    result = run('plot_loss.py', *args, cwd=tmp_path)
    assert result.status == 0 and words in result.out, result.err


@pytest.mark.parametrize('args, words', [
    (['--schedule=config/train_gpt3.py'], 'did you mean config/train_gpt2.py?'),
    (['--schedule=--lr_schedule=wds'], 'did you mean wsd?'), (['--schedule=--max_iters=0'], 'max_iters = 0'),
    (['--schedule=--lr_shedule=wsd'], 'did you mean lr_schedule?'),
    (['--schedule=config/train_gpt2.py', 'config/train_gpt2.py'], 'not drawn with others'),
])
def test_of_what_there_is_no_picture(run, tmp_path, args, words):
    result = run('plot_loss.py', *args, cwd=tmp_path)
    assert result.status == 2 and result.err.count('\n') == 1 and words in result.err
    assert not list(tmp_path.glob('*.png'))


@pytest.mark.parametrize('epochs, per_epoch', [(1e308, 10.0), (1e300, 1e300), (1e19, 1.0)])
def test_epochs_beyond_all_bounds(epochs, per_epoch, capsys):
    with pytest.raises(SystemExit):
        schedules.steps({'max_epochs': epochs, 'max_iters': 1, 'swa_start': 0}, per_epoch)
    assert 'max_epochs' in capsys.readouterr().err


@pytest.mark.parametrize('schedule', ['step:' + '9' * 400, 'restarts:1:' + '9' * 400, 'restarts:' + '9' * 400,
                                      'multistep:' + '9' * 400, 'plateau:' + '9' * 400, 'wsd:5e-324', 'step:1:5e-324'])
@pytest.mark.parametrize('high', [1e308, 1e-3])
def test_numbers_of_a_schedule_beyond_all_bounds(schedule, high):
    s = SETTINGS | {'lr_schedule': schedule, 'learning_rate': high, 'min_lr': 0.0}
    assert all(0 <= schedules.rate(step, s, [1.0] * 9) <= high for step in (0, 1, 999, 2**62))
