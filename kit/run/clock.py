"""
What the parts of a run take: the pace of its steps, which the iter lines show, and with max_minutes how many steps fit
and when the last evaluation and save must begin.
"""

import math
import time
from functools import wraps

from kit.base import devices, ranks
from kit.watch.journal import duration

FIRST_STEPS = 5    # of a launch: they compile and warm up, and are no measure
SPARE = 0.03       # of the time that is left, for steps that come to take longer
LATEST = 1.5       # times what an evaluation and a save have taken so far may the last of them take
COPY = 0.1         # of a save at most stops the steps of a GPU, see kit/state/writer.py; those of a CPU share its cores


class Clock:
    """minutes of wall time for this process, counted from its start; 0 = as many as it takes."""

    def __init__(self, minutes, device):
        self.minutes, self.device, self.end = minutes, device, math.inf
        if minutes:
            import psutil
            self.end = psutil.Process().create_time() + 60 * minutes
        self.steps = 0  # of this launch
        self.total = {'step': 0.0, 'evaluation': 0.0, 'save': 0.0}  # seconds of this launch that went into each
        self.spent = {kind: [] for kind in ('step', 'evaluation', 'save')}  # seconds of each that was measured
        self.start(is_fitted=not minutes)

    # -----------------------------------------------------------------------------------------------------------------
    # the pace

    def start(self, is_fitted, is_compiled=False):
        """
        Measure from here on. is_fitted: how many steps the run has is known, as it is without minutes. is_compiled: the
        first evaluation may be held up by the compiler.
        """
        self.is_fitted, self.is_compiled = is_fitted, is_compiled
        self.last = self.since = time.perf_counter()
        self.recent_steps, self.data_seconds = 0, 0.0

    def took(self, kind, n=1):
        """
        The time since the last call went into n of a kind: step, evaluation or save. The pace is that of training
        alone: what else was done is left out, or begins it anew where it held steps that were still to be made.
        """
        is_step = kind == 'step' and n > 0
        self.steps += is_step
        self.recent_steps += is_step
        # once it is known how many steps fit, a thread writes the saves, and what is seen of one here is a copy
        is_measured = self.minutes and (kind == 'evaluation' or not self.is_fitted)
        if is_measured:
            devices.synchronize(self.device)  # seldom: it waits for the device
        now = time.perf_counter()
        spent, seconds, self.last = self.spent[kind], now - self.last, now
        self.total[kind] += seconds
        if is_measured and n and (kind != 'step' or self.steps > FIRST_STEPS):
            spent.append(seconds)
        elif is_measured and spent:
            spent[-1] += seconds
        if not is_step and self.device.type == 'cpu':
            self.since += seconds
        elif not is_step:
            self.since, self.recent_steps, self.data_seconds = now, 0, 0.0

    def data(self, fetch):
        """A function that fetches batches, its time counted."""
        @wraps(fetch)
        def timed(*args):
            begin = time.perf_counter()
            batch = fetch(*args)
            self.data_seconds += time.perf_counter() - begin
            return batch
        return timed

    def pace(self):
        """
        (seconds of a step, those of them for its batches), means over the steps since the last call or anything else.
        """
        now, n, data_seconds = time.perf_counter(), max(1, self.recent_steps), self.data_seconds
        self.total['step'] += now - self.last
        seconds, self.since, self.last = now - self.since, now, now
        self.recent_steps, self.data_seconds = 0, 0.0
        return seconds / n, data_seconds / n

    def in_words(self):
        """What the parts of this launch took, but for saves that went on beside its steps."""
        steps, evaluations, saves = self.total.values()
        share = 100 / max(1e-9, steps + evaluations + saves)
        return (f'the steps took {duration(steps)}, evaluations {duration(evaluations)} ({share * evaluations:.1f}% of '
                f'the time), saves {duration(saves)} ({share * saves:.1f}%)')

    # -----------------------------------------------------------------------------------------------------------------
    # max_minutes

    def each(self, kind):
        """
        Seconds that one of a kind takes: the mean step, the shortest evaluation and save. The first evaluation of a
        launch warms up, and counts while there is no other, unless a compiler may have held it up and the next is sure
        to come, at the end of the measurement. A save, before there was one, takes as long as an evaluation.
        """
        seconds = self.spent[kind]
        if kind == 'step':
            return sum(seconds) / max(1, len(seconds))
        if kind == 'evaluation':
            counts = self.is_fitted or not self.is_compiled
            seconds = seconds[1:] or seconds[:counts]
        return min(seconds, default=self.each('evaluation') if kind == 'save' else 0.0)

    def reserve(self):
        return LATEST * (self.each('evaluation') + self.each('save')) + self.each('step')

    def left(self):
        """Seconds."""
        return max(0.0, self.end - time.time())

    def is_up(self, writer):
        """
        Whether it is time for the last evaluation and save, if one step was made; the same on all ranks. writer: that
        of the run; a save that it is still writing the last one waits for, and one that it has written is a measure.
        """
        if writer.seconds and not self.spent['save']:
            self.spent['save'].append(writer.seconds)
        needed = self.reserve() + self.each('save') * writer.is_writing
        return self.minutes > 0 and ranks.highest(int(self.steps > 0 and self.left() < needed)) > 0

    def fit(self, step, eval_interval, save_interval):
        """How many steps the run can have, the `step` that are made among them, at least one more. Rank 0 counts."""
        step_seconds, evaluation, save = map(self.each, self.spent)
        saving = save / save_interval if save_interval else 0
        stops = 1 if self.device.type == 'cpu' else COPY  # the share of it that stops the steps
        seconds = max(step_seconds, (1 - stops) * saving) + stops * saving + (
            evaluation / eval_interval if eval_interval else 0)
        n = ranks.from_main(lambda: step + max(1, int((self.left() * (1 - SPARE) - self.reserve()) / seconds)))
        self.is_fitted = True
        print(f'max_minutes = {self.minutes:g}: a step takes {1000 * step_seconds:.1f}ms, an evaluation '
              f'{evaluation:.1f}s, a save {save:.1f}s; so {n:,} steps fit: from here on max_iters = {n}')
        return n
