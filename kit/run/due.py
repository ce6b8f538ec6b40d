"""
What is due at a step, and why a run ends: intervals, minutes, early stop, signals, bad steps. Decided from the
settings, the state of the run and what the training loop hands in; it knows no model, no file and no other process.
"""

import math

from kit.base import signals
from kit.run.clock import FIRST_STEPS
from kit.watch import diagnosis

FEWEST_STEPS = 20  # whose speed max_minutes goes by; a rule of train.py has as many in the warmup
BAD_STEPS, LAST_STEP = 'bad steps', 'last step'  # why a run ends; or the name of a signal


class Due:
    """
    In each step look(...), evaluated(...) if there was an evaluation, hear(...), and saving() if there is a save; how
    that went, saved(...), is told before the next evaluation is judged, the next save, or the end. In between these say
    what is due: going_back, evaluation, save, names (of the checkpoint), line (of the log), and end: '' while the run
    goes on. Of the run: max_iters, why (an early stop ended it), is_saved (its last state is on the disk).

    s: the settings of train.py; state: the RunState, whose losses are kept here; warmup_steps: of the schedule.

    With max_minutes: if the rate of a step followed a clock, no run could be made again. So the speed is measured once,
    up to the end of the warmup, and from there on the run has a number of steps as any other, which its checkpoints
    keep with the minutes that it was fitted to.
    """

    def __init__(self, s, state, warmup_steps):
        self.s, self.state, self.first, self.max_iters = s, state, state.step, s['max_iters']
        if not self.is_fitted:
            state.fitted_minutes = 0.0  # other minutes measure anew
        self.fit_at = math.inf if self.is_fitted else max(warmup_steps, self.first + FIRST_STEPS + FEWEST_STEPS)
        self.why, self.is_saved, self.best_kept = '', True, math.inf

    @property
    def is_fitted(self):
        """Whether it is known how many steps the run has."""
        return self.state.fitted_minutes == self.s['max_minutes']

    @property
    def is_stuck(self):
        """Whether bad steps do not end. Looked at seldom, since it waits for the device."""
        most = self.s['max_bad_steps']
        return most > 0 and self.state.step % most == 0 and int(self.state.bad_steps[0]) >= most

    @property
    def going_back(self):
        """Whether the run goes back to before its bad steps, as it does once; the second time ends it."""
        return self.is_stuck and not self.state.rewinds

    def look(self, is_time_up):
        """What is due before the next update. is_time_up: whether max_minutes are over; the same on all ranks."""
        s, step = self.s, self.state.step
        self.signal, self.is_given_up = '', self.is_stuck
        self.best_before, self.is_best = self.state.best_val_loss, False
        self.is_new = step > self.state.loaded_at
        self.is_eval_step = s['eval_interval'] > 0 and step % s['eval_interval'] == 0
        self.is_save_step = s['save_interval'] > 0 and step % s['save_interval'] == 0
        self.is_last = is_time_up or self.is_fitted and step >= self.max_iters
        is_measured = s['max_minutes'] > 0 and step in (self.first, self.fit_at)  # what an evaluation takes
        self.evaluation = not self.is_given_up and (
            self.is_last or self.is_new and self.is_eval_step or is_measured)
        if not self.evaluation:
            self.stop_early()

    def evaluated(self, val_loss):
        """What comes of an evaluation. Those at intervals alone count, so that a longer run has the same ones."""
        self.best_before = self.state.best_val_loss  # which a save that failed has put back
        self.is_best = val_loss < self.best_before
        self.state.best_val_loss = min(self.best_before, val_loss)
        if self.is_new and self.is_eval_step:
            self.state.val_losses.append(val_loss)
        self.stop_early()

    def stop_early(self):
        """Where a run has stopped early before, a resume stops again, unless it allows for more."""
        if self.is_eval_step and not self.is_last:
            self.why = diagnosis.early_stop(
                self.state.val_losses, self.s['early_stop'], self.s['min_delta'],
                self.state.recent_norms.tolist() if self.s['early_stop_norm'] else [])
            self.is_last = self.why != ''

    def hear(self, signal):
        """A signal that has come, one of signals.WORDS, the same on all ranks; also during the evaluation."""
        self.signal = signal

    @property
    def save(self):
        """Whether to save what is new: best, due, last, or asked for by a signal; with max_minutes what a save takes,
        and behind it the number of steps."""
        is_worth_it = self.evaluation and (self.is_best or self.s['always_save_checkpoint']) or (
            self.state.step in (self.fit_at, self.fit_at + 1))
        return self.is_new and self.state.step > 0 and not self.is_given_up and (
            self.is_last or self.is_save_step or self.signal != '' or is_worth_it)

    @property
    def names(self):
        """Of the checkpoint; what a resume takes comes last."""
        return ([f'step_{self.state.step:07d}.pt'] if self.is_save_step else []) + (
            ['best.pt'] if self.is_best else []) + ['ckpt.pt']

    @property
    def line(self):
        """Whether the update has an iter line."""
        step, interval = self.state.step, self.s['log_interval']
        return interval > 0 and (step % interval == 0 or step + 1 == self.max_iters)

    def saving(self):
        """A save begins; whether it went well is known later, that of the one before is known by now."""
        self.best_kept = self.best_before if self.is_best else self.state.best_val_loss

    def saved(self, went_well):
        """How the last save went, None where it is not known. What could not be kept may be beaten by less."""
        if went_well is not None:
            self.is_saved = went_well
        if went_well is False:
            self.state.best_val_loss = self.best_kept

    @property
    def end(self):
        """Why the run ends here: BAD_STEPS, the name of a signal, LAST_STEP; '' while it goes on."""
        if self.is_given_up:
            return BAD_STEPS
        if self.signal in signals.STOP:
            return self.signal
        return LAST_STEP if self.is_last else ''

    def fit(self, clock):
        """The steps that the run has: those that fit into its minutes, from the end of the measurement on."""
        if self.state.step == self.fit_at and not self.is_fitted:
            self.max_iters = clock.fit(self.state.step, self.s['eval_interval'], self.s['save_interval'])
            self.state.fitted_minutes = self.s['max_minutes']
        return self.max_iters
