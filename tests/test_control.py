"""When a run ends before max_iters, and what becomes of its gradients: early stop, a budget in minutes, clipping."""

import math
import re
import types

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, losses, records
from test_resume import SEND

import kit.run.clock
from kit.base import overrides
from kit.learn import gradients, schedules
from kit.run.clock import Clock
from kit.run.due import Due
from kit.run.run_state import RunState
from kit.watch import diagnosis

STILL = '--learning_rate=1e-9', '--min_lr=0', '--eval_interval=1', '--max_iters=99'  # nothing moves


# ---------------------------------------------------------------------------------------------------------------------
# early stop


@pytest.mark.parametrize('val_losses, patience, min_delta, stops', [
    ([], 1, 0, False), ([3.0], 1, 0, False), ([3.0, 2.9, 2.8], 1, 0, False), ([3.0, 2.9, 2.9], 1, 0, True),
    ([3.0, 2.9, 3.1, 3.2], 3, 0, False), ([3.0, 2.9, 3.1, 3.2, 2.95], 3, 0, True),
    ([3.0, 2.9, 3.1, 3.2, 2.8], 3, 0, False),
    ([3.0, 2.96, 2.92, 2.88], 2, 0.05, False), ([3.0, 2.97, 2.96], 2, 0.05, True), ([3.0] * 50, 0, 0, False),
    ([math.nan, 3.0, math.nan], 2, 0, False), ([3.0, math.nan, math.inf], 2, 0, True), ([math.nan] * 3, 3, 0, True),
])
def test_when_to_stop(val_losses, patience, min_delta, stops):
    assert bool(diagnosis.early_stop(val_losses, patience, min_delta)) == stops


@pytest.mark.parametrize('norms, words', [
    ([1.0] * 100, ''), ([math.inf] * 50 + [0.001] * 50, ''), ([0.001] * 100, 'has died'),
    ([0.001] * 40 + [1.0] * 60, ''),
    ([1.0] * 95 + [50.0] * 5, ''), ([1.0] * 85 + [50.0] * 15, 'has exploded'), ([12.0] * 100, ''),
    ([500.0] * 100, 'has exploded'), ([], ''),
])
def test_stopped_by_the_gradient(norms, words):
    found = diagnosis.early_stop([3.0, 2.0], 0, 0, norms)
    assert words in found and bool(words) == bool(found)


STUCK = ('from kit.watch import evaluation\nsound = evaluation.measure\n'
         'evaluation.measure = lambda *args: (3.0, sound(*args)[1])\n')


def test_early_stop(train, hooked, tiny):
    """Best kept and restored; the state on the disk is that of the stop, and the run can go on from it exactly."""
    args = '--eval_interval=1', '--max_iters=12', '--dropout=0.1'
    whole = hooked(STUCK, *args, '--out_dir=whole')
    stopped = hooked(STUCK, *args, '--early_stop=5')
    assert stopped.status == 0, stopped.err
    assert list(losses(stopped)) == [0, 1, 2, 3, 4] and 'early_stop: 5 evaluations in a row' in stopped.out
    assert 'none was kept as best.pt' in stopped.out
    assert torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)['iter_num'] == 5
    again = hooked(STUCK, *args, '--init_from=resume', '--early_stop=5')
    assert not losses(again) and 'early_stop: 5 evaluations' in again.out and again.status == 0
    on = hooked(STUCK, *args, '--init_from=resume', '--early_stop=0')
    assert losses(stopped) | losses(on) == losses(whole) and len(losses(on)) == 7


def test_no_early_stop_at_the_end(hooked):
    result = hooked(STUCK, '--eval_interval=1', '--max_iters=5', '--early_stop=5')
    assert len(losses(result)) == 5 and 'early_stop:' not in result.out


def test_a_resume_stops_where_the_whole_run_would(hooked, train):
    """The norms are looked at with the evaluations alone: a resume from between them is no evaluation."""
    code = ('from kit.learn import gradients\nimport torch\ngradients.RECENT = 4\ntrue_norms, n = gradients.norms, []\n'
            'def norms(parameters):\n    found = true_norms(parameters)\n    n.append(1)\n'
            '    return found * (1e4 if len(n) + PART == 6 else 1)\n'
            'gradients.norms = norms\n')
    args = '--early_stop_norm', '--eval_interval=5', '--save_interval=1', '--max_iters=15'
    assert len(losses(hooked(code.replace('PART', '0'), *args, '--out_dir=whole'))) == 15
    assert len(losses(hooked(code.replace('PART', '0') + SEND.format(step=7, name='SIGTERM'), *args))) == 8
    assert list(losses(hooked(code.replace('PART', '8'), *args, '--init_from=resume'))) == list(range(8, 15))


def test_the_best_is_what_the_sample_is_of(hooked, tiny):
    """The last evaluations are made worse; at the end the model has the weights of best.pt."""
    code = ('from kit.watch import evaluation, samples\nsound, n = evaluation.measure, []\n'
            'def measure(*args):\n    n.append(1)\n    loss, accuracy = sound(*args)\n'
            '    return loss + len(n) * (len(n) > 6), accuracy\n'
            'evaluation.measure = measure\n'
            'def show_sample(model, *rest):\n    import torch\n'
            '    best = torch.load("checkpoints/best.pt", weights_only=True)\n'
            '    print("best:", best["iter_num"], all(torch.equal(v, best["model"][k]) for k, v in '
            'model.state_dict().items()))\n'
            'samples.show = show_sample\n')
    result = hooked(code, '--early_stop=2', '--eval_interval=1')
    assert result.status == 0 and 'best: 2 True' in result.out, result.out + result.err


def test_early_stop_by_the_norm_in_a_run(hooked):
    code = 'from kit.learn import gradients\nfrom kit.watch import diagnosis\n' \
           'gradients.RECENT, diagnosis.NORM_LOW = 4, 1e9\n'
    result = hooked(code, '--early_stop_norm')
    assert list(losses(result)) == [0, 1, 2, 3, 4] and 'early_stop_norm: the gradient has died' in result.out


# ---------------------------------------------------------------------------------------------------------------------
# a budget in minutes


class Time:
    """It passes when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        return self.now

    perf_counter = time


def run_with(now, minutes, step_seconds, evaluation=7.0, save=2.0, slower=1.0, first=20, eval_interval=100,
             save_interval=50, max_iters=1_000_000, stall=0.0, device='cpu', fitted=0.0):
    """
    train.py's loop in time alone: (steps made, steps that were to be made, seconds taken, steps saved). stall: seconds
    for which a compiler holds the first evaluation up; fitted: the minutes that a run which goes on was fitted to.
    """
    settings = overrides.settings_of(ROOT / 'train.py', [
        f'--max_minutes={minutes}', '--always_save_checkpoint=False', f'--max_iters={max_iters}',
        f'--eval_interval={eval_interval}', f'--save_interval={save_interval}'])
    state, clock, start, saved = RunState(fitted_minutes=fitted), Clock(minutes, torch.device(device)), now.now, []
    due = Due(settings, state, warmup_steps=30)
    clock.start(due.is_fitted, is_compiled=stall > 0)
    writer, written = types.SimpleNamespace(is_writing=False, seconds=0.0), 0.0  # on a GPU; written: when
    while True:
        due.look(clock.is_up(writer))
        if due.evaluation:
            now.now += evaluation + (stall if state.step == 0 else 0)
            due.saved(True)
            due.evaluated(1.0)
            clock.took('evaluation')
        if due.save:
            due.saving()
            now.now = max(now.now, written)  # one at a time
            written, writer.seconds = now.now + save, save
            if device == 'cpu' or not due.is_fitted or due.end:
                now.now = written
            saved.append(state.step)
            clock.took('save')
        if due.end:
            return state.step, due.max_iters if due.is_fitted else math.inf, now.now - start, saved
        due.fit(clock)
        writer.is_writing = now.now < written
        # the first steps compile
        now.now += step_seconds * (first if state.step < 3 else slower if due.is_fitted else 1)
        clock.took('step')
        state.step += 1


@pytest.fixture
def clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr(kit.run.clock, 'time', clock)
    monkeypatch.setattr(psutil.Process, 'create_time', lambda self: clock.now)
    return clock


def test_the_steps_fill_the_time(clock):
    made, planned, seconds, _ = run_with(clock, minutes=30, step_seconds=0.5)
    assert made == planned and 0.94 * 1800 < seconds <= 1800


@pytest.mark.parametrize('minutes, stall', [(1.5, 12), (4, 90), (30, 300), (30, 0)])
def test_what_a_compiler_takes_is_no_evaluation(clock, minutes, stall):
    """A budget that has time for a measurement behind it is used, and kept."""
    made, planned, seconds, _ = run_with(clock, minutes, step_seconds=0.1, evaluation=3.0, first=1, stall=stall,
                                         eval_interval=2000)
    assert made == planned > 100 and 0.8 * 60 * minutes < seconds <= 60 * minutes


@pytest.mark.parametrize('save_interval, evaluation, save', [(0, 7.0, 5.0), (100, 1.0, 20.0)])
def test_a_launch_that_goes_on_keeps_its_minutes(clock, save_interval, evaluation, save):
    """It has one evaluation to go by, and the saves that it makes; where there is none that is taken to be as long."""
    made, planned, seconds, _ = run_with(clock, minutes=3, step_seconds=0.1, fitted=3.0, eval_interval=0,
                                         save_interval=save_interval, evaluation=evaluation, save=save)
    assert 100 < made < planned and 120 < seconds <= 180


@pytest.mark.parametrize('step_seconds, save', [(0.01, 5.0), (0.1, 5.0), (0.001, 2.0)])
def test_saves_beside_the_steps_of_a_gpu(clock, monkeypatch, step_seconds, save):
    """What a budget on a GPU holds: a thread writes the checkpoints while it computes, one at a time."""
    monkeypatch.setattr('kit.base.devices.synchronize', lambda device: None)
    args = dict(minutes=10, step_seconds=step_seconds, evaluation=1.0, save=save, eval_interval=10_000,
                save_interval=100)
    made, planned, seconds, _ = run_with(clock, device='cuda', **args)
    assert made == planned and 0.8 * 600 < seconds <= 600
    assert made >= run_with(clock, **args)[0]


@pytest.mark.parametrize('slower', [1.02, 1.5, 10.0])
def test_a_machine_that_becomes_slow_is_no_excuse(clock, slower):
    made, planned, seconds, _ = run_with(clock, minutes=30, step_seconds=0.5, slower=slower)
    assert seconds <= 1800 + 0.5 * slower and (made < planned) == (slower > 1.1)


def test_less_time_than_the_warmup_takes(clock):
    made, planned, seconds, _ = run_with(clock, minutes=1, step_seconds=3.0, first=1)
    assert seconds <= 60 and 0 < made < 30 and planned == math.inf


def test_without_a_budget_nothing_ends(clock):
    made, planned, seconds, saved = run_with(clock, minutes=0, step_seconds=1e6, eval_interval=0, save_interval=0,
                                             max_iters=1000)
    assert made == planned == 1000 and seconds > 1e9 and saved == [1000]


def test_a_budget_is_a_number_of_steps(train, tiny):
    """What is trained is, bit for bit, the run with that many steps: no rate depends on a clock."""
    args = '--warmup_iters=25', '--eval_interval=50', '--save_interval=0', '--dropout=0.1'
    timed = train(*args, '--max_minutes=0.08')
    assert timed.status == 0, timed.err
    n = int(re.search(r'from here on max_iters = (\d+)', timed.out)[1])
    saved = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)
    assert saved['config']['max_iters'] == n and saved['fitted_minutes'] == 0.08
    assert records(tiny / 'checkpoints')[-1]['step'] == saved['iter_num'] <= n  # ends with an evaluation
    plain = train(*args, f'--max_iters={n}', '--out_dir=plain')
    rest = {}
    if saved['iter_num'] < n:  # a busy machine has cut it; the rest is made by the same command
        assert 'the time is up' in timed.out
        rest = losses(train(*args, '--max_minutes=0.08', '--init_from=resume'))
    assert losses(timed) | rest == losses(plain) and len(losses(plain)) == n > 26
    names = [line.split('(')[1] for line in timed.out.splitlines() if line.startswith('saving checkpoint')]
    assert names[:2] == ['best.pt, ckpt.pt)', 'ckpt.pt)'], 'at the measure and, with its result, a step later'


def test_the_same_command_again_keeps_the_steps(train, hooked, tiny):
    """As a job script gives it, with max_iters and auto, stopped after the measure; at its end it stays there."""
    args = '--warmup_iters=25', '--eval_interval=0', '--max_minutes=0.08', '--init_from=auto'
    first = hooked(SEND.format(step=30, name='SIGTERM'), *args)
    n = int(re.search(r'from here on max_iters = (\d+)', first.out)[1])
    assert first.status == 143 and n > 30
    for _ in range(9):  # each gets the minutes, and a busy machine may need several
        again = train(*args)
        assert again.status == 0 and 'from here on' not in again.out, again.err
        if torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)['iter_num'] == n:
            break
    assert not losses(train(*args))
    plain = train('--warmup_iters=25', f'--max_iters={n}', '--eval_interval=0', '--out_dir=plain')
    rates = [{r['step']: r['lr'] for r in records(tiny / run) if 'lr' in r} for run in ('checkpoints', 'plain')]
    assert rates[0] == rates[1] and plain.status == 0


def test_before_the_measure_the_rate_is_held(train, hooked, tiny):
    """A run that is stopped in its warmup measures anew when it goes on, at the rate to which the warmup has led."""
    args = '--warmup_iters=25', '--eval_interval=0', '--max_minutes=0.08'
    assert hooked(SEND.format(step=20, name='SIGTERM'), *args).status == 143
    result = train(*args, '--init_from=resume')
    rates = {r['step']: r['lr'] for r in records(tiny / 'checkpoints') if 'lr' in r}
    assert result.status == 0 and all(rates[step] == rates[25] == max(rates.values()) for step in range(25, 46))


def test_time_that_is_up_before_the_first_step(train, tiny):
    result = train('--warmup_iters=25', '--max_minutes=0.0001')
    assert result.status == 0 and list(losses(result)) == [0] and 'before the speed was measured' in result.out
    assert torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)['iter_num'] == 1


def test_two_processes_end_together(pair, tiny):
    args = '--gradient_accumulation_steps=2', '--warmup_iters=25', '--max_minutes=0.1', '--eval_interval=50'
    result = pair(*args, '--lr_by_norm', '--grad_clip_quantile=0.5')
    assert result.status == 0 and 'steps fit' in result.out, result.err
    stopped = pair('--gradient_accumulation_steps=2', *STILL, '--early_stop=3', '--early_stop_norm')
    assert stopped.status == 0 and 'early_stop: 3 evaluations' in stopped.out, stopped.err


# ---------------------------------------------------------------------------------------------------------------------
# clipping


def test_adaptive_limit_is_the_quantile():
    recent = torch.full((gradients.RECENT,), math.inf)
    assert gradients.clip_limit(recent, 1.0, 0.1) == 1.0 and gradients.clip_limit(recent, 0.0, 0.1) == math.inf
    recent[-30:] = torch.rand(30, generator=torch.Generator().manual_seed(1))
    assert gradients.clip_limit(recent, 1.0, 0.25) == pytest.approx(np.quantile(recent[-30:].numpy(), 0.25), abs=1e-7)
    assert gradients.clip_limit(recent, 1.5, 0.0) == 1.5 and gradients.clip_limit(recent, 0.0, 0.0) == math.inf


SEEN = ('from kit.learn import optimizers\nimport torch\nsound = optimizers.step\n'
        'def step(optimizer, is_good):\n    grads = [p.grad for g in optimizer.param_groups for p in g["params"]]\n'
        '    print("seen", torch.nn.utils.get_total_norm(grads).item(), max(g.abs().max().item() for g in grads))\n'
        '    return sound(optimizer, is_good)\n'
        'optimizers.step = step\n')


def seen(result):
    return np.array([[float(word) for word in line.split()[1:]] for line in result.out.splitlines()
                     if line.startswith('seen ')])


def test_clip_by_value_and_by_norm(hooked):
    free = seen(hooked(SEEN, '--grad_clip=0'))
    assert free[:, 0].max() > 0.5 and free[:, 1].max() > 0.02
    assert seen(hooked(SEEN, '--grad_clip=0.5'))[:, 0].max() == pytest.approx(0.5, rel=1e-5)
    by_value = seen(hooked(SEEN, '--grad_clip=0', '--grad_clip_value=0.02'))
    assert by_value[:, 1].max() == pytest.approx(0.02) and by_value[:, 0].max() > 0.1
    both = seen(hooked(SEEN, '--grad_clip=0.5', '--grad_clip_value=0.02'))
    assert both[:, 0].max() <= 0.5001 and both[:, 1].max() == pytest.approx(0.02)


def test_clip_by_quantile_in_a_run(hooked, tiny):
    clipped = seen(hooked(SEEN, '--grad_clip=0', '--grad_clip_quantile=0.3', '--max_iters=30'))
    made = [record for record in records(tiny / 'checkpoints') if 'grad_norm' in record]
    norms = [record['grad_norm'] for record in made]
    for i, (record, (norm, _)) in enumerate(zip(made, clipped)):
        limit = np.quantile(norms[:i + 1], 0.3) if i >= 9 else math.inf
        assert norm == pytest.approx(min(limit, norms[i]), rel=1e-4)
        assert (record['clip_limit'] or math.inf) == pytest.approx(limit, rel=1e-5)
        assert record['clip_rate'] == (norms[i] > limit)


def test_rate_by_norm_in_a_run(train, tiny):
    assert train('--lr_by_norm', '--grad_clip=0.01', '--max_iters=20').status == 0
    made = [record for record in records(tiny / 'checkpoints') if 'lr_factor' in record]
    factors = [record['lr_factor'] for record in made]
    assert factors[:9] == [1.0] * 9 and set(factors[9:]) == {0.1}  # the norm is far above 5 times that limit
    train('--max_iters=20', '--out_dir=plain')
    plain = [record['lr'] for record in records(tiny / 'plain') if 'lr' in record]
    assert [record['lr'] for record in made] == pytest.approx([f * lr for f, lr in zip(factors, plain)])


def test_a_replay_has_the_rates_of_the_log(hooked):
    """Of a run whose rate was cut at each evaluation, of which the replay makes none."""
    hooked(STUCK, '--lr_schedule=plateau:1:0.5', '--lr_by_norm', '--eval_interval=1', '--save_interval=4',
           '--max_iters=20', '--learning_rate=0.1', '--min_lr=0')
    result = hooked(STUCK, '--inspect_step=19', '--max_iters=20')
    assert 'bit for bit' in result.out, result.out + result.err
    lr, = [line.split() for line in result.out.splitlines() if line.startswith('  lr ')]
    assert lr[1] == lr[2] and float(lr[1]) < 0.1 * 0.5**18


def test_a_replay_of_a_step_without_a_log(train, tiny):
    """Its rate is that of the schedule, not the last one that was logged."""
    train()
    train('--init_from=resume', '--max_iters=30', '--log_interval=0')
    result = train('--inspect_step=25', '--max_iters=30')
    lr, = [line.split() for line in result.out.splitlines() if line.startswith('  lr ')]
    saved = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)
    assert float(lr[1]) == pytest.approx(schedules.rate(25, saved['config']), rel=1e-3), result.out
    assert 'step 25, replayed' in train('--inspect_step=25', '--max_iters=10').out, 'it is no training to step 10'
    assert torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)['iter_num'] == 30


def test_scaling_can_be_left_out(train, tiny):
    assert train('--dtype=float16', '--scale_loss=False', '--max_iters=3').status == 0
    assert torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)['scaler'] == {}
