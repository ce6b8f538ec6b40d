"""
What the parts of a run take: the pace of its steps, which the iter lines show, and with max_minutes how many steps fit
and when the last evaluation and save must begin.
"""

import math
import time
from functools import wraps

from kit.base import devices, ranks

FIRST_STEPS = 5    # of a launch: they compile and warm up, and are no measure
SPARE = 0.03       # of the time that is left, for steps that come to take longer
LATEST = 1.5       # times what an evaluation and a save have taken so far may the last of them take


class Clock:
    """minutes of wall time for this process, counted from its start; 0 = as many as it takes."""

    def __init__(self, minutes, device):
        self.minutes, self.device, self.end = minutes, device, math.inf
        if minutes:
            import psutil
            self.end = psutil.Process().create_time() + 60 * minutes
        self.steps = 0  # of this launch
        self.spent = {kind: [0.0, 0] for kind in ('step', 'evaluation', 'save')}  # seconds, and of how many
        self.start(is_fitted=not minutes)

    # -----------------------------------------------------------------------------------------------------------------
    # the pace

    def start(self, is_fitted):
        """Measure from here on. is_fitted: how many steps the run has is known, as it is without minutes."""
        self.is_fitted = is_fitted
        self.last = self.since = time.perf_counter()
        self.recent_steps, self.data_seconds = 0, 0.0

    def took(self, kind, n=1):
        """
        The time since the last call went into n of a kind: step, evaluation or save. Whatever is not a step begins the
        pace anew, so that it is that of training alone.
        """
        is_step = kind == 'step' and n > 0
        self.steps += is_step
        self.recent_steps += is_step
        if self.minutes and (self.steps <= FIRST_STEPS or not self.is_fitted):
            devices.synchronize(self.device)  # seldom: it waits for the device
            now = time.perf_counter()
            if kind != 'step' or self.steps > FIRST_STEPS:
                self.spent[kind][0] += now - self.last
                self.spent[kind][1] += n
            self.last = now
        if not is_step:
            self.since, self.recent_steps, self.data_seconds = time.perf_counter(), 0, 0.0

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
        """(seconds of a step, those of them for its batches), means over the steps since anything else was done."""
        return (time.perf_counter() - self.since) / self.recent_steps, self.data_seconds / self.recent_steps

    # -----------------------------------------------------------------------------------------------------------------
    # max_minutes

    def each(self, kind):
        """Seconds that one of a kind takes; a save, before there was one, as long as an evaluation."""
        seconds, n = self.spent[kind]
        return seconds / n if n else self.each('evaluation') if kind == 'save' else 0.0

    def reserve(self):
        return LATEST * (self.each('evaluation') + self.each('save')) + self.each('step')

    def left(self):
        """Seconds."""
        return max(0.0, self.end - time.time())

    def is_up(self):
        """Whether it is time for the last evaluation and save, if one step was made; the same on all ranks."""
        return self.minutes > 0 and ranks.highest(int(self.steps > 0 and self.left() < self.reserve())) > 0

    def fit(self, step, eval_interval, save_interval):
        """How many steps the run can have, the `step` that are made among them, at least one more. Rank 0 counts."""
        step_seconds, evaluation, save = map(self.each, self.spent)
        seconds = step_seconds + (evaluation / eval_interval if eval_interval else 0) + (
            save / save_interval if save_interval else 0)
        n = ranks.from_main(lambda: step + max(1, int((self.left() * (1 - SPARE) - self.reserve()) / seconds)))
        self.is_fitted = True
        print(f'max_minutes = {self.minutes:g}: a step takes {1000 * step_seconds:.1f}ms, an evaluation '
              f'{evaluation:.1f}s, a save {save:.1f}s; so {n:,} steps fit: from here on max_iters = {n}')
        return n
