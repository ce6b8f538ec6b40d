"""
find_lr: the learning-rate range test (Smith 2015, arXiv:1506.01186), a rate that climbs from step to step, and the loss
that it meets. What train.py does between the rate and the loss is what it does in training.

The rules that were made for convolutional networks and SGD suggest a tenth of what a transformer with AdamW likes:
their steepest fall is the time when it learns which tokens are frequent. What was measured to be right (docs/log.md) is
the lowest point of the smoothed loss; and since that can lie anywhere on a floor that is flat over two decades, no more
than three times the rate at which the floor begins.
"""

import csv
import io
import math
from pathlib import Path

import numpy as np

from kit.base import files, ranks
from kit.base.errors import fail, reason

STEPS = 200  # from start to end; with 100 and 400 the suggested rates differ by less than a third
LOWEST, HIGHEST = 1e-20, 1e20  # rates that are tried, whatever is asked for
WIDTH = 0.05  # of all steps: the standard deviation of the smoothing, wide since the floor is flat
DIVERGED = 0.5  # nats a token above the lowest, of the losses smoothed as they come
MEMORY = 0.9  # of that smoothing
FEWEST = 20  # steps that a suggestion needs
FLAT = 0.05  # of its fall is left when the loss is called flat
BEYOND = 3.0  # times the rate where that begins: no suggestion is higher
STANDARD_ERRORS = 5  # by which the smoothed loss must fall, and rise again; noise alone did in 0 of 400 tests
LIMITS = (
    'limits: for these settings, with warmup and a decay to a tenth. On five models of 0.15 to 3.2 million parameters\n'
    'and runs of 300 to 1,000 steps it came within 2% of the lowest loss over a grid of rates; larger models and\n'
    'longer runs were not tried, and longer runs often like a lower rate')


class RangeTest:
    """The rates of a test, and the losses that came of them: rate() is that of the next step, take() gets its loss."""

    def __init__(self, start, end):
        self.start, self.end, self.steps = start, end, STEPS
        self.rates, self.losses = [], []
        self.mean, self.lowest = 0.0, math.inf

    def rate(self):
        return self.start * (self.end / self.start) ** (len(self.rates) / (self.steps - 1))

    def take(self, loss):
        """Note the loss of the step that was made with rate(). Returns whether the test is over."""
        self.rates.append(self.rate())
        self.losses.append(loss)
        self.mean = MEMORY * self.mean + (1 - MEMORY) * loss
        mean = self.mean / (1 - MEMORY ** len(self.losses))  # it began at 0
        self.lowest = min(self.lowest, mean)
        return len(self.losses) == self.steps or not mean <= self.lowest + DIVERGED  # a NaN is no number below


def run(update, step, bad_steps, start, end, out_dir, muon):
    """
    Make steps with rates from start to end, or to where the loss diverges, and report. update: of train.py; step: the
    first; bad_steps: a gradients.BadSteps, whose loss counts as none; muon: how many times the rate that of Muon's
    matrices is, which climbs beside it, or None.
    """
    if not LOWEST <= start < end <= HIGHEST:
        fail(f'find_lr_start = {start:g}, find_lr_end = {end:g}: nothing is learned at such rates; {LOWEST:g} to '
             f'{HIGHEST:g} can be tried')
    test, is_over = RangeTest(start, end), False
    while not is_over:
        figures, _ = update(step, test.rate())
        is_over = test.take(math.nan if bad_steps.is_bad else figures['loss'].item())
        step += 1
    ranks.from_main(lambda: report(test, out_dir, muon))


def smoothed(losses, width):
    """The losses under a Gaussian of such a standard deviation, in steps; those that are not finite are left out."""
    losses, steps = np.asarray(losses, dtype=np.float64), np.arange(len(losses))
    good = np.isfinite(losses)
    if not good.any():
        return np.full(len(losses), math.nan)
    weights = np.exp(-0.5 * ((steps[:, None] - steps[good]) / width) ** 2)  # (n, good ones)
    return weights @ losses[good] / weights.sum(axis=1)


def suggestion(test):
    """(rate, words): what a test suggests, and what it saw; None where it shows no rate, and the words say why."""
    losses = np.array(test.losses)
    losses = losses[:-1] if not math.isfinite(losses[-1]) else losses
    last = f'{test.rates[-1]:.1e}'
    if len(losses) < FEWEST:
        return None, (f'the loss diverged after {len(test.losses)} steps, at a rate of {last}: too soon to say '
                      'anything; begin lower with --find_lr_start')
    width = WIDTH * test.steps
    curve = smoothed(losses, width)
    # from one step to the next it is noise that moves the loss; the median, since the last steps may do so by diverging
    noise = np.median(np.abs(np.diff(losses))) / 0.6745 / math.sqrt(2)
    error = noise / math.sqrt(2 * math.sqrt(math.pi) * width)  # of a point of the curve
    least = STANDARD_ERRORS * error
    low = int(curve.argmin())
    above = np.nonzero(curve[low:] > curve[low] + least)[0]  # where it has risen
    fall = curve[0] - curve[low]
    if fall <= least:
        return None, (f'the loss fell by {fall:.3f} nats, no more than noise (the curve is good to {least:.3f})'
                      + (f', and had risen by {test.rates[low + above[0]]:.1e}; stay well below that' if len(above) else
                         '; a larger batch shows more'))
    if not len(above) and len(test.losses) == test.steps:
        return None, f'up to {last} the loss does not rise: the best rate may be higher; go on with --find_lr_end'
    flat = int(np.argmax(curve <= curve[low] + FLAT * fall))
    return min(test.rates[low], BEYOND * test.rates[flat]), (
        f'the smoothed loss falls from {curve[0]:.3f} to {curve[low]:.3f} at {test.rates[low]:.1e} and is flat from '
        f'{test.rates[flat]:.1e} on' + (f'; it diverges at {last}' if len(test.losses) < test.steps else ''))


def report(test, out_dir, muon=None):
    """
    Print what the test says, and write lr_finder.csv and lr_finder.png into out_dir. muon: its rate in learning rates,
    or None.
    """
    from kit.watch import pictures
    rate, words = suggestion(test)
    curve = smoothed(test.losses, WIDTH * test.steps)
    print(f'{len(test.losses)} steps, rates from {test.rates[0]:.1e} to {test.rates[-1]:.1e}: {words}')
    words = f' --optimizer=muon:{muon * rate:.1e}' if rate and muon else ''
    print(f'suggested: {rate:.1e} (--learning_rate={rate:.1e} --min_lr={rate / 10:.1e}{words})' if rate else
          'no suggestion')
    if rate:
        print(LIMITS)
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(['step', 'learning_rate', 'loss', 'smoothed_loss'])
    table.writerows(zip(range(len(curve)), test.rates, test.losses, curve))
    path, picture = (Path(out_dir) / f'lr_finder.{end}' for end in ('csv', 'png'))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, text.getvalue())
        pictures.lr_finder(test.rates, test.losses, curve, rate, picture)
    except OSError as error:
        fail(f'{path}, {picture}: the curve cannot be written ({reason(error)}); --out_dir=FOLDER takes another')
    print(f'the curve: {path}, {picture}')
