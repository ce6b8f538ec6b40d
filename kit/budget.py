"""A run that ends in time: how many steps fit into some minutes, and when the last evaluation and save must begin."""

import math
import time

import psutil

from kit import devices, ranks

FIRST_STEPS = 5    # of a launch: they compile and warm up, and are no measure
FEWEST_STEPS = 20  # that are; a rule of train.py has as many in the warmup
SPARE = 0.03       # of the time that is left, for steps that come to take longer
LATEST = 1.5       # times what an evaluation and a save have taken so far may the last of them take


class Budget:
    """
    minutes of wall time for this process, counted from its start; 0 = as many as it takes. If the rate of a step
    followed a clock, no run could be made again: so the speed is measured once, on the steps up to the end of the
    warmup, and from there on the run has a number of steps as any other (is_fitted), which its checkpoints keep.
    """

    def __init__(self, minutes, step, warmup, device, is_fitted):
        self.minutes, self.device, self.first = minutes, device, step
        self.is_fitted = is_fitted or not minutes
        self.end = psutil.Process().create_time() + 60 * minutes if minutes else math.inf
        self.begin = step + FIRST_STEPS
        self.fit_at = -2 if self.is_fitted else max(warmup, self.begin + FEWEST_STEPS)
        self.last = time.perf_counter()
        self.spent = {kind: [0.0, 0] for kind in ('step', 'evaluation', 'save')}  # seconds, and of how many

    def evaluates_at(self, step):
        """Whether an evaluation must be made to know what it takes: first of all, and where the steps are counted."""
        return self.minutes > 0 and step in (self.first, self.fit_at)

    def saves_at(self, step):
        """The same of a save; and the one behind it holds the number of steps."""
        return step in (self.fit_at, self.fit_at + 1)

    def took(self, kind, step, n=1):
        """The time since the last call went into n of a kind: step, evaluation or save."""
        if self.minutes and step <= max(self.fit_at, self.begin):
            devices.synchronize(self.device)
            now = time.perf_counter()
            if kind != 'step' or step > self.begin:
                self.spent[kind][0] += now - self.last
                self.spent[kind][1] += n
            self.last = now

    def each(self, kind):
        """Seconds that one of a kind takes; a save, before there was one, as long as an evaluation."""
        seconds, n = self.spent[kind]
        return seconds / n if n else self.each('evaluation') if kind == 'save' else 0.0

    def reserve(self):
        return LATEST * (self.each('evaluation') + self.each('save')) + self.each('step')

    def left(self):
        """Seconds."""
        return max(0.0, self.end - time.time())

    def is_over(self, step):
        """Whether it is time for the last evaluation and save, if one step was made; the same on all ranks."""
        return self.minutes > 0 and ranks.highest(int(step > self.first and self.left() < self.reserve())) > 0

    def fit(self, step, eval_interval, save_interval):
        """How many steps the run can have, those up to now among them. Rank 0's clock counts."""
        step_seconds, evaluation, save = map(self.each, self.spent)
        seconds = step_seconds + (evaluation / eval_interval if eval_interval else 0) + (
            save / save_interval if save_interval else 0)
        n = ranks.from_main(lambda: step + max(1, int((self.left() * (1 - SPARE) - self.reserve()) / seconds)))
        self.is_fitted = True
        print(f'max_minutes = {self.minutes:g}: a step takes {1000 * step_seconds:.1f}ms, an evaluation '
              f'{evaluation:.1f}s, a save {save:.1f}s; so {n:,} steps fit: from here on max_iters = {n}')
        return n
