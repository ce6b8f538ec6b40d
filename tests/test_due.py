"""What is due at a step and why a run ends, the state that a checkpoint keeps, and bad steps: all without a model."""

import math
from dataclasses import dataclass, fields

import pytest
import torch
from conftest import ROOT

from kit.base import overrides
from kit.learn import gradients
from kit.run.due import BAD_STEPS, LAST_STEP, Due
from kit.run.run_state import KEPT, RunState

TEN = ['--max_iters=10', '--eval_interval=4', '--save_interval=3', '--log_interval=5']


def settings(*args):
    return overrides.settings_of(ROOT / 'train.py', [*TEN, *args])


def run(*args, state=None, losses=None, signals=None, up_at=None, failing=(), bad=()):
    """
    The training loop without a model: [(step, what was due there)], and the Due. losses: {step: val loss}; signals:
    {step: name}; up_at: the step at which the time is up; failing: steps whose save fails; bad: steps that are bad.
    """
    state, seen, begun = state or RunState(), [], []  # begun: the step of a save of which it is not known how it went
    due = Due(settings(*args), state, warmup_steps=0)
    wait = lambda: due.saved(begun.pop() not in failing if begun else None)
    for _ in range(1000):
        at = state.step
        if due.going_back:
            wait()
            seen.append((at, 'back'))
            state.rewinds, state.bad_steps, bad = 1, torch.tensor([0, 0]), [step for step in bad if step > 100]
        due.look(at == up_at)
        if due.evaluation:
            seen.append((at, 'evaluation'))
            wait()
            due.evaluated((losses or {}).get(at, 5 - at / 100))
        due.hear((signals or {}).get(at, ''))
        if due.save:
            seen.append((at, ' '.join(due.names)))
            wait()
            due.saving()
            begun.append(at)
        if due.end:
            wait()
            return seen, due
        if due.line:
            seen.append((at, 'line'))
        state.bad_steps = torch.tensor([(int(state.bad_steps[0]) + 1) * (at in bad), 0])
        state.step += 1


def of(seen, *what):
    return [step for step, found in seen if any(word in found for word in what)]


def test_a_whole_run():
    seen, due = run()
    assert seen == [
        (0, 'evaluation'), (0, 'line'), (3, 'step_0000003.pt ckpt.pt'), (4, 'evaluation'), (4, 'best.pt ckpt.pt'),
        (5, 'line'), (6, 'step_0000006.pt ckpt.pt'), (8, 'evaluation'), (8, 'best.pt ckpt.pt'),
        (9, 'step_0000009.pt ckpt.pt'), (9, 'line'), (10, 'evaluation'), (10, 'best.pt ckpt.pt')]
    assert due.end == LAST_STEP and due.is_saved and due.why == ''
    assert due.state.best_val_loss == 4.9 and due.state.val_losses == [5.0, 4.96, 4.92]  # at intervals, not the last


def test_intervals_of_zero():
    seen, _ = run('--eval_interval=0', '--save_interval=0', '--log_interval=0')
    assert seen == [(10, 'evaluation'), (10, 'best.pt ckpt.pt')]


@pytest.mark.parametrize('at', [3, 4, 5, 8])
def test_what_was_loaded_is_not_made_again(at):
    """A run that goes on from a step does what the whole one does behind it."""
    whole, _ = run()
    state = RunState()
    state.take({'iter_num': at, 'best_val_loss': 4.92 if at == 8 else 4.96 if at >= 4 else 5.0})
    rest, _ = run(state=state)
    at_once = [(at, 'line')] if at == 5 else []
    assert rest == at_once + [(step, what) for step, what in whole if step > at]


def test_a_finished_run_is_evaluated_and_not_saved_again():
    state = RunState()
    state.take({'iter_num': 10, 'best_val_loss': 1.0})
    seen, due = run(state=state)
    assert seen == [(10, 'evaluation')] and due.end == LAST_STEP


def test_an_evaluation_without_progress():
    losses = {4: 6.0, 8: 4.0, 10: 7.0}
    assert of(run(losses=losses)[0], 'best') == [8]
    assert of(run('--save_interval=0', losses=losses)[0], 'ckpt') == [4, 8, 10]
    seen, due = run('--save_interval=0', '--always_save_checkpoint=False', losses=losses)
    assert of(seen, 'ckpt') == [8, 10] and due.state.best_val_loss == 4.0


def test_a_nan_is_no_best():
    seen, due = run(losses={step: math.nan for step in range(11)})
    assert not of(seen, 'best') and due.state.best_val_loss == math.inf


@pytest.mark.parametrize('name, ends', [('SIGTERM', True), ('SIGINT', True), ('SIGHUP', True), ('SIGUSR1', False)])
def test_signals(name, ends):
    seen, due = run(signals={5: name})
    assert (5, 'ckpt.pt') in seen and due.end == (name if ends else LAST_STEP)
    assert (seen[-1] == (5, 'ckpt.pt')) == ends
    seen, due = run(signals={4: name})
    assert of(seen, 'evaluation')[:2] == [0, 4], 'one that is due is made first'
    seen, due = run(signals={0: name})
    assert not of(seen, 'ckpt')[:1] == [0], 'of the first step nothing is worth saving'
    assert run(signals={10: name})[1].end == (name if ends else LAST_STEP), 'also at the last step'


def test_time_that_is_up():
    seen, due = run(up_at=5)
    assert seen[-2:] == [(5, 'evaluation'), (5, 'best.pt ckpt.pt')] and due.end == LAST_STEP and due.max_iters == 10


def test_what_could_not_be_saved():
    """The best loss is that of what lies on the disk; the status of the run is that of its last save."""
    losses = {0: 9.0, 4: 3.0, 8: 4.0, 10: 5.0}
    seen, due = run('--save_interval=0', losses=losses, failing=[4])
    assert of(seen, 'best') == [4, 8] and due.state.best_val_loss == 4.0 and due.is_saved
    assert not run(failing=[10])[1].is_saved
    seen, due = run('--save_interval=1', losses={0: 9.0, 4: 3.0, 8: 4.0, 10: 5.0}, failing=[4, 5])
    assert of(seen, 'best') == [4, 8], 'also where the next one fails before it is known that this one did'
    seen, due = run(failing=[3])
    assert due.state.best_val_loss == 4.9, 'a save that fails without an evaluation takes no best away'


def test_early_stop_and_what_allows_for_more():
    worse = {step: 5 + step for step in range(100)}
    args = '--max_iters=40', '--early_stop=2'
    seen, due = run(*args, losses=worse)
    assert seen[-1] == (8, 'ckpt.pt') and due.end == LAST_STEP and 'early_stop: 2 evaluations' in due.why
    stopped = due.state.keys()
    again = RunState()
    again.take(stopped)
    seen, due = run(*args, state=again, losses=worse)
    assert seen == [] and due.end == LAST_STEP and due.why
    longer = RunState()
    longer.take(stopped)
    assert run('--max_iters=40', '--early_stop=0', state=longer, losses=worse)[1].state.step == 40


def test_early_stop_by_the_norms():
    state = RunState(recent_norms=torch.full((gradients.RECENT,), 1e-6))
    assert 'the gradient has died' in run('--early_stop_norm', state=state)[1].why
    assert run('--early_stop_norm')[1].why == '', 'nothing is known yet'


def test_back_once_then_the_end():
    args = '--max_iters=60', '--max_bad_steps=4', '--eval_interval=0', '--save_interval=12'
    seen, due = run(*args, bad=range(6, 60))
    assert of(seen, 'back') == [12] and due.end == LAST_STEP and due.state.step == 60
    seen, due = run(*args, bad=range(6, 60), state=RunState(rewinds=1))
    assert not of(seen, 'back', 'evaluation', 'ckpt') and due.end == BAD_STEPS and due.state.step == 12
    assert run('--max_bad_steps=0', bad=range(60))[1].end == LAST_STEP


MINUTES = ['--max_minutes=30', '--warmup_iters=25']


def test_minutes_that_another_launch_was_fitted_to():
    """The same minutes keep their steps, others measure anew, and without any max_iters counts."""
    assert run(state=RunState(fitted_minutes=30.0))[1].state.step == 10
    same = Due(settings(*MINUTES), RunState(fitted_minutes=30.0), 25)
    other = Due(settings(*MINUTES), RunState(fitted_minutes=20.0), 25)
    assert same.is_fitted and not other.is_fitted and other.state.fitted_minutes == 0.0


def test_what_max_minutes_measures():
    """An evaluation at the begin of a launch and where its steps are counted, a save there, and one with the count."""
    state, seen = RunState(), []
    state.take({'iter_num': 101})
    state.val_losses = [5.0]
    due = Due(settings(*MINUTES, '--eval_interval=63', '--save_interval=0', '--max_iters=1000'), state, 25)

    class Clock:
        def fit(self, step, eval_interval, save_interval):
            return 200

    while not due.look(False) and not due.end:
        if due.evaluation:
            due.evaluated(9.0)
        seen += [(state.step, due.evaluation, due.save)] * (due.evaluation or due.save)
        due.fit(Clock())
        state.step += 1
    assert seen == [(101, True, False), (126, True, True), (127, False, True), (189, True, True)]
    assert due.max_iters == 200 and state.fitted_minutes == 30.0 and due.end == LAST_STEP and state.step == 200
    assert state.val_losses == [5.0, 9.0, 9.0], 'those at 126 and 189 are at intervals, that at 101 is not'


# ---------------------------------------------------------------------------------------------------------------------
# the state


def test_a_state_goes_onto_the_disk_and_back(tmp_path):
    state = RunState(7, 1.5, [3.0, 2.0], torch.rand(gradients.RECENT), torch.tensor([2, 1]), 1, 30.0)
    torch.save(state.keys(), tmp_path / 'keys.pt')
    keys = torch.load(tmp_path / 'keys.pt', weights_only=True)
    assert keys.keys() == {'iter_num', 'best_val_loss', 'val_losses', 'recent_norms', 'bad_steps', 'rewinds',
                           'fitted_minutes', 'other_text_since'}
    other = RunState()
    other.take(keys)
    assert other.keys() == state.keys() and other.loaded_at == 7
    assert torch.equal(other.recent_norms, state.recent_norms) and other.bad_steps.dtype == torch.int64


def test_a_state_of_nanogpt_lacks_most():
    state = RunState()
    state.take({'iter_num': 5, 'best_val_loss': 2.5, 'model': {}})
    assert (state.step, state.best_val_loss, state.rewinds) == (5, 2.5, 0) and type(state.best_val_loss) is float


def test_a_run_that_goes_back_keeps_some_fields():
    """And takes back all others, also those that somebody adds."""
    state = RunState(step=9, best_val_loss=1.0, rewinds=1)
    state.take({'iter_num': 3, 'best_val_loss': 2.0, 'rewinds': 0, 'val_losses': [4.0]}, but=KEPT)
    assert (state.step, state.best_val_loss, state.rewinds, state.val_losses) == (3, 1.0, 1, [4.0])
    assert set(KEPT) < {f.name for f in fields(RunState)}


def test_a_state_stays_on_its_device():
    state = RunState().to('meta')
    state.take({'recent_norms': [1.0] * gradients.RECENT, 'bad_steps': [1, 2]})
    assert state.recent_norms.device.type == state.bad_steps.device.type == 'meta'


@pytest.mark.parametrize('key, value', [('fitted_minutes', None), ('rewinds', 'x'), ('recent_norms', ['a']),
                                        ('val_losses', 3.0), ('bad_steps', None)])
def test_a_state_that_is_none_is_one_line(capsys, key, value):
    with pytest.raises(SystemExit) as end:
        RunState().take({key: value})
    assert end.value.code == 2 and f'the checkpoint has {key} = {value!r}' in capsys.readouterr().err


def test_a_field_more_is_one_line():
    @dataclass
    class More(RunState):
        tokens_seen: int = 0

    state = More(tokens_seen=5)
    other = More()
    other.take(state.keys())
    assert state.keys()['tokens_seen'] == other.tokens_seen == 5


# ---------------------------------------------------------------------------------------------------------------------
# bad steps


class Scaler:
    """What a GradScaler is asked; scale: 1.0 where there is none."""

    def __init__(self, scale):
        self.scale, self.told = scale, []

    def is_enabled(self):
        return self.scale > 1

    def get_scale(self):
        return self.scale

    def update(self, scale=None):
        self.told.append(scale)


@pytest.mark.parametrize('scale', [1.0, 64.0])
def test_bad_steps_are_counted_and_told(capsys, scale):
    """(loss, norms) of six steps. With float16's scale above 1 an overflow in the norms only lowers the scale."""
    steps = [(1.0, [1, 1]), (math.nan, [1, 1]), (1.0, [1, math.inf]), (math.inf, [math.nan, 2]), (1.0, [1, 2]),
             (1.0, [math.nan, 1]), (1.0, [1, 1])]
    expected = {1.0: [0, 1, 2, 3, 0, 1, 0], 64.0: [0, 1, 0, 1, 0, 0, 0]}[scale]
    state, model = RunState(), torch.nn.Linear(2, 2)
    bad_steps = gradients.BadSteps(state, model, Scaler(scale))
    found = []
    for loss, norms in steps:
        loss, norms = torch.tensor(loss), torch.tensor(norms, dtype=torch.float32)
        bad_steps.note(loss, norms, torch.isfinite(loss) & torch.isfinite(norms).all())
        found.append(int(state.bad_steps[0]))
        assert bool(bad_steps.is_bad) == (found[-1] > 0)
    assert found == expected and int(state.bad_steps[1]) == sum(n > 0 for n in expected)
    assert bad_steps.scaler.told == [scale if scale > 1 and n else None for n in expected]
    bad_steps.warn(5, *bad_steps.take())
    told = capsys.readouterr().out
    assert told.startswith(f'WARNING: bad numbers: the loss or the gradient of {sum(n > 0 for n in expected)} of the')
    assert 'the gradient of weight, of 2 parameters' in told, 'the norms are those of the last bad one'
    bad_steps.warn(6, *bad_steps.take())
    assert not capsys.readouterr().out and int(state.bad_steps[1]) == 0
