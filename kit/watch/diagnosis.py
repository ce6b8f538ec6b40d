"""
What the figures of a run say: what was seen, what it means, and the command that fixes it. Floats in, words out; no
torch. The thresholds stand on top, each with its reason; docs/watching.md has the runs that they were tried on.
"""

import math
import re
import shlex
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from contextlib import contextmanager

import numpy as np

from kit.watch.curves import in_words

FIRST_LOSS_OFF = 0.5   # nats: GPT-2's initialisation starts within 0.1 of a fair guess, a broken one far from it
WINDOW = 100           # updates that a reading of the present takes in
NORM_HIGH = 10.0       # healthy norms are 0.1 to 10 once the warmup is over; the highest of the healthy runs was 6.7
NORM_HOPELESS = 100.0  # tiny batches have norms above 10 all the time: only four times the usual is too much, or this
EXPLODED = 0.1         # of the last updates with such norms end a run that is to end by them
NORM_LOW = 0.01        # below it, the gradient of a model that has not learned its text by heart has died
NORM_SWING = 10.0      # 95th over 5th percentile; 2 to 4 in healthy runs
CLIPPED_TIMES = 5.0    # times grad_clip: AdamW does not mind a norm of 2 clipped to 1 at every update, as in small runs
CLIPPED_SHARE = 0.9    # but a limit that far below the norm, at nearly all updates, is a mistake
LAYER_LOW = 1e-3       # of the median layer's norm; LayerNorm's, the smallest of the healthy ones, is 0.02
RATIO_HIGH = 0.03      # update / weights in the blocks: 0.001 to 0.014 while a healthy rate is high,
MUON_RATIO_HIGH = 0.12  # where Muon moves them: up to 0.09 at ten times a good rate, 0.16 and more at a hundred times
GAIN_RATIO_HIGH = 0.006  # and in the last norm layer, whose gains are 1: up to 0.002, and from 0.01 in sick runs
RATE_HOPELESS = 0.03   # no run was healthy with a rate above it
RATIO_LOW = 8e-4       # in the blocks at best: a 30th of a good rate has 0.0007, a 100th 0.0003
SPIKE_SPREADS = 8.0    # median deviations above the median, 5.4 standard deviations of a normal distribution,
SPIKE_SHARE = 0.1      # and this much above it: none in the 30 runs that were meant to be healthy
FEWEST = 20            # updates before it that tell what is usual
RISE = 0.05            # of the loss, back up from its lowest
OVERFIT_RISE = 0.02    # of the val loss, up from its lowest, while the train loss falls; evaluation's noise is below 1%
OVERFIT_GAP = 0.15     # of the val loss, between the two, where the last three evaluations brought nothing better
SETTLED = 200          # updates after the warmup by which every healthy run knew how frequent its tokens are
NO_CONTEXT = 0.02      # of the unigram entropy: who comes no further than this has not used the context
FLAT = 0.003           # of the loss, in half a third of the run, while the rate is high
SMALL_GAP = 0.03       # of the loss, between train and val: the text is not learned by heart
NOTHING_LEFT = 0.05    # nats: no text is that easy
STALL = 0.5            # of a step's time spent on fetching its batch
COLLAPSE = 0.5         # of the usual tokens/s,
COLLAPSE_SECONDS = 10  # for as long as this: other work on the machine may take a moment
LOOKS_TO_END = 10      # a finding is over when it was not there so many times
MOST_OFTEN = 3         # times that a verdict tells the same in full
RISEN = 20             # updates whose median is the loss of the moment
ASTRAY = 5             # updates in a row with a loss that a guess would beat: the run has diverged
BEYOND = 1e100         # a figure above it is as good as infinite, one below its inverse as good as 0: no float32 is


class History:
    """
    The figures of a run by step, under the names of metrics.jsonl: loss, grad_norm, lr, val/loss, ...

    facts: what else is known of the run, {} where nothing is: its settings, and vocab_size, unigram_entropy (nats),
    tokens_per_step, other_text_since (the step at which it went on with another text; 0: it never did).
    """

    def __init__(self, facts=None):
        self.facts = facts or {}
        self.series = {}  # name: (steps, values); arrays, since a long run has a million of them
        self.after, self.until = -1, math.inf  # what readers see: the steps after the one, up to the other
        self.findings = []  # [name, first step, last step or None, looks without it, words], the oldest first
        self.looked = -1  # the newest step that news() has seen

    def add(self, step, figures):
        """A figure of a step that was there before, as after a resume, takes the place of all from there on."""
        for name, value in figures.items():
            steps, values = self.series.setdefault(name, (array('q'), array('d')))
            if steps and steps[-1] >= step:
                there = bisect_left(steps, step)
                del steps[there:], values[there:]
            steps.append(step)
            values.append(bounded(value))

    def cut(self, step):
        """Forget what came after a step."""
        for steps, values in self.series.values():
            there = bisect_right(steps, step)
            del steps[there:], values[there:]
        self.looked = min(self.looked, step)

    def get(self, name, n=None):
        """(steps, values) of a figure, its newest n, as NumPy arrays, empty where it has none; NaN and inf are bad."""
        steps, values = self.series.get(name, ((), ()))
        begin, end = bisect_right(steps, self.after), bisect_right(steps, self.until)
        begin = begin if n is None else max(begin, end - n)
        return np.array(steps[begin:end], dtype=np.int64), np.array(values[begin:end], dtype=np.float64)

    @contextmanager
    def of_this_text(self):
        """
        Readers see what came behind the last change of the text: losses on another one say nothing of this. The record
        of that step is an evaluation on the other.
        """
        self.after = self.facts.get('other_text_since') or -1
        try:
            yield
        finally:
            self.after = -1

    def last(self, name, n):
        """The newest n values of a figure, less those that are not finite."""
        values = self.get(name, n)[1]
        return values[np.isfinite(values)]

    def since(self, name, step, more):
        """(steps, values) of a figure after a step, and so many before them."""
        steps = self.series.get(name, ((), ()))[0]
        return self.get(name, max(0, bisect_right(steps, self.until) - bisect_right(steps, step)) + more)

    def at(self, name, step, otherwise=0):
        """The newest value of a figure up to a step."""
        steps, values = self.series.get(name, ((), ()))
        there = bisect_right(steps, step)
        return values[there - 1] if there else otherwise

    def exactly(self, name, step, otherwise):
        """The value of a figure at a step, not before it."""
        steps, values = self.series.get(name, ((), ()))
        there = bisect_left(steps, step)
        return values[there] if there < len(steps) and steps[there] == step else otherwise

    def clip_limits(self, steps):
        """The norm that the gradients of these steps were clipped to, inf where they were not."""
        limits = np.full(len(steps), self.facts.get('grad_clip') or math.inf)
        known, found = self.get('clip_limit')
        limits[np.isin(steps, known)] = np.where(np.isnan(found), math.inf, found)[np.isin(known, steps)]  # no JSON
        return limits

    def step(self):
        """The newest step of any loss; -1 where there is none."""
        return max((int(steps[-1]) for steps in (self.get(name, 1)[0] for name in ('loss', 'val/loss')) if len(steps)),
                   default=-1)

    def settled(self, name, n):
        """The newest n values of a figure from after the warmup that are finite, [] where few are."""
        steps, values = self.get(name, n)
        warmed_up = len(steps) == n and steps[0] >= self.facts.get('warmup_iters', 0)
        values = values[np.isfinite(values)]
        return values if warmed_up and len(values) > n // 2 else np.array([])

    def layers(self, figure, n=5):
        """{layer: median of its newest n values} of grad_norm or update_ratio."""
        found = {name.removeprefix(f'{figure}/'): self.last(name, n) for name in self.series
                 if name.startswith(f'{figure}/')}
        return {name: float(np.median(values)) for name, values in found.items() if len(values) == n}

    def news(self):
        """Look at what has come since the last time: a line for each finding that begins, and for each that is over."""
        lines, step = [], self.step()
        for check in CHECKS:
            name = check.__name__.replace('_', ' ')
            with self.of_this_text(), np.errstate(all='ignore'):  # figures may be inf, or 0 where none should be
                words = check(self)
            open_one = next((finding for finding in self.findings if finding[0] == name and finding[2] is None), None)
            if words and open_one:
                open_one[3] = 0
            elif words:
                self.findings.append([name, step, step if check in EVENTS else None, 0, words])
                lines.append(f'WARNING: {name} at step {step}: {words}')
            elif open_one:
                open_one[3] += 1
                if open_one[3] == LOOKS_TO_END:
                    open_one[2] = step
                    lines.append(f'over at step {step}: {name}')
        self.looked = step
        return lines

    def replay(self, looks=200):
        """Find what news() would have found on the way here, on this text."""
        end = max(self.step(), 0)
        begin = min(self.facts.get('other_text_since', 0), end)
        self.looked = begin or -1
        for step in np.unique(np.linspace(begin, end, looks).astype(int)):
            self.until = int(step)
            self.news()
        self.until = math.inf


def bounded(value):
    """A figure that can be counted with: no float32 is beyond BEYOND, but what a log says may be."""
    value = math.nan if value is None else value
    if abs(value) > BEYOND:
        return math.copysign(math.inf, value)
    return value if abs(value) >= 1 / BEYOND or math.isnan(value) else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# the checks: each takes a history, and says in words what is wrong at its end, or None


def first_loss(h):
    loss, vocab_size = h.at('loss', 0, None), h.facts.get('vocab_size')
    if h.looked < 0 and loss is not None and vocab_size and h.facts.get('init_from') == 'scratch':
        guess = math.log(vocab_size)
        if not abs(loss - guess) <= FIRST_LOSS_OFF:
            return (f'the first loss is {in_words(loss)}, where a fair guess among {vocab_size} ids has {guess:.4f}. '
                    'The initialisation is far off, or the ids are not those that the model counts on: look at the '
                    'weights that model.py draws (0.02) and at the dataset')


def loss_spike(h):
    steps, losses = h.since('loss', h.looked, WINDOW)  # those that are new, and the window before them
    known = np.isfinite(losses)
    if known.sum() <= FEWEST:
        return None
    filled = np.where(known, losses, np.median(losses[known]))
    first = max(FEWEST, np.searchsorted(steps, h.looked, 'right'))
    windows = [filled[None, :i] for i in range(first, min(WINDOW, len(filled)))]  # at first there is less before
    if len(filled) > max(first, WINDOW):
        windows.append(np.lib.stride_tricks.sliding_window_view(filled[:-1], WINDOW)[max(0, first - WINDOW):])
    if not windows:
        return None
    middle = np.concatenate([np.median(window, axis=1) for window in windows])
    spread = np.concatenate([np.median(abs(window - np.median(window, axis=1, keepdims=True)), axis=1)
                             for window in windows])
    steps, losses = steps[first:], losses[first:]
    found = np.flatnonzero(losses > middle + np.maximum(SPIKE_SPREADS * spread, SPIKE_SHARE * middle))
    if len(found):
        worst = found[(losses[found] / middle[found]).argmax()]
        return (f'the loss of step {steps[worst]} is {in_words(losses[worst])}, the updates before it had about '
                f'{in_words(middle[worst])}' + (f' (the highest of {len(found)})' if len(found) > 1 else '')
                + '. Odd text, or an update too many; this shows the text: python train.py '
                f'--inspect_step={steps[worst]}{out_dir(h)}')


def numbers_not_finite(h):
    at_lines, single = h.since('bad_steps', h.looked, 4)[1], h.since('loss', h.looked, 4)[1]
    n = int(max(at_lines[np.isfinite(at_lines)].sum(), (~np.isfinite(single)).sum()))
    if n:
        return (f'the loss or the gradient of {n} updates around step {h.step()} was not finite. Mostly a rate too '
                + ('large, or float16: --dtype=bfloat16' if h.facts.get('dtype') == 'float16' else 'large')
                + f': {lower_rate(h)}; --debug_nan finds the operation')


def explosion(h):
    norms = h.settled('grad_norm', WINDOW)
    usual = np.median(h.last('grad_norm', 10 * WINDOW)) if len(norms) else 0
    n_high = (norms > max(NORM_HIGH, min(4 * usual, NORM_HOPELESS))).sum()
    if n_high >= 3:
        layers = h.layers('grad_norm', 1)
        worst = f', most of it in {max(layers, key=layers.get)}' if layers else ''
        return (f'the gradient norm was above {NORM_HIGH:g} in {n_high} of the last {WINDOW} updates, '
                f'{norms.max():.3g} at most{worst}. The updates go astray: {lower_rate(h)}, {longer_warmup(h)}'
                + ('' if h.facts.get('grad_clip', 1) else ', --grad_clip=1.0'))


def vanishing(h):
    norms = h.settled('grad_norm', WINDOW)
    if len(norms) and np.median(norms) < NORM_LOW and not nothing_to_learn(h):
        return (f'the gradient norm was about {np.median(norms):.2g} in the last {WINDOW} updates, below {NORM_LOW:g}. '
                f'Hardly anything comes back through the layers: fewer of them, another initialisation'
                + (', --dtype=bfloat16' if h.facts.get('dtype') == 'float16' else f', {higher_rate(h)}'))


def layers_without_gradient(h):
    layers = h.layers('grad_norm')
    usual = np.median(list(layers.values())) if layers else 0
    low = [name for name, norm in layers.items() if norm < LAYER_LOW * max(usual, np.max(list(layers.values())) / 10)]
    if low and h.step() > 0 and not nothing_to_learn(h):
        return (f'{", ".join(low)}: a gradient norm of {max(layers[name] for name in low):.2g}, where the largest has '
                f'{max(layers.values()):.2g}. Nothing reaches these layers: '
                + ('float16 rounds gradients this small to 0, the loss must be scaled up; --dtype=bfloat16 need not'
                   if h.facts.get('dtype') == 'float16' else
                   'they are frozen (requires_grad), cut off (detach), or drowned by the initialisation'))


def swings(h):
    norms = h.settled('grad_norm', WINDOW)
    if len(norms) and not nothing_to_learn(h):
        low, high = np.percentile(norms, (5, 95))
        if high > NORM_SWING * low and high > NORM_LOW:
            return (f"the gradient norm went from {low:.2g} to {high:.2g} within {WINDOW} updates (5th and 95th "
                    f"percentile). Each update undoes another: {lower_rate(h)}, {longer_warmup(h)}, more rows a step")


def clipped_always(h):
    norms, limit = h.settled('grad_norm', WINDOW), h.facts.get('grad_clip', 0)
    is_fixed = limit and not h.facts.get('grad_clip_quantile')
    if is_fixed and len(norms) and np.mean(norms > limit) >= CLIPPED_SHARE and np.median(norms) > CLIPPED_TIMES * limit:
        return (f'{np.mean(norms > limit):.0%} of the last {WINDOW} updates were clipped, from a norm of about '
                f'{np.median(norms):.3g} to {limit:g} (healthy: below 10%, or not far above the limit). The limit is '
                f'below what is usual here, or the gradients are too large: --grad_clip={nice(2 * np.median(norms))}')


def overfitting(h):
    steps, val = h.get('val/loss')
    train = dict(zip(*h.get('train/loss')))
    if len(val) < 3 or not np.isfinite(val).all():
        return None
    best = int(val.argmin())
    now, then = train.get(steps[-1], math.nan), train.get(steps[best], math.nan)
    is_apart = now < val[-1] * (1 - OVERFIT_GAP) and best <= len(val) - 4
    if now < then and (val[-1] > val[best] * (1 + OVERFIT_RISE) or is_apart):
        return (f'val loss is {val[-1]:.4f}, it was {val[best]:.4f} at step {steps[best]}, while train loss fell from '
                f'{then:.4f} to {now:.4f}. The model learns its text by heart: '
                f'--dropout={min(0.5, max(0.2, h.facts.get("dropout", 0) + 0.1)):.1f}, a smaller model or more text; '
                'best.pt keeps the best')


def rate_too_large(h):
    ratios = h.layers('update_ratio') if h.step() >= h.facts.get('warmup_iters', 0) else {}
    blocks, gains = ([ratio for name, ratio in ratios.items() if kind(name)] for kind in (is_block, is_norm))
    high, healthy = (MUON_RATIO_HIGH, '0.2% to 8%') if muon(h, 1) else (RATIO_HIGH, '0.1% to 1.4%')
    if blocks and np.median(blocks) > high or gains and gains[-1] > GAIN_RATIO_HIGH:
        moved = [f'the blocks by {np.median(blocks):.1%} of their weights ({healthy} is healthy)'] if blocks else []
        moved += [f'the gains of the last LayerNorm by {gains[-1]:.1%} (up to 0.2%)'] if gains else []
        return (f'an update moves {" and ".join(moved)}. Little can be learned in leaps like these: '
                f'{lower_rate(h)}')
    losses = h.last('loss', 50 * RISEN)
    losses = losses[len(losses) % RISEN:]
    if len(losses) >= 2 * RISEN:
        medians = np.median(losses.reshape(-1, RISEN), axis=1)
        noise = np.median(abs(losses[-10 * RISEN:] - np.median(losses[-10 * RISEN:])))
        if medians[-1] > medians.min() * (1 + RISE) + 0.1 + 2.5 * noise and not overfitting(h):
            return (f'the loss went back up, from {in_words(medians.min())} to {in_words(medians[-1])} (medians of '
                    f'{RISEN}). '
                    f'The updates overshoot: {lower_rate(h)}, {longer_warmup(h)}')


def rate_too_small(h):
    losses, known, ratio = h.settled('loss', SETTLED), h.facts.get('unigram_entropy'), highest_ratio(h)
    loss = np.median(losses[-50:]) if len(losses) else 0
    if known and ratio < RATIO_LOW and loss > known * (1 - NO_CONTEXT):
        return (f'the loss is {loss:.4f} after {h.step()} updates, and the frequencies of the tokens alone would give '
                f'{known:.4f}; an update moves the blocks by {ratio:.3%} of their weights at best (0.1% and more is '
                f'healthy): {higher_rate(h)}')


def no_use_of_the_context(h):
    losses, known = h.settled('loss', SETTLED), h.facts.get('unigram_entropy', 0)
    if not known or not len(losses) or nothing_to_learn(h):
        return None
    first, second = np.median(losses[:SETTLED // 2]), np.median(losses[SETTLED // 2:])
    is_flat = abs(first - second) < NO_CONTEXT / 2 * known
    if (is_flat and abs(second - known) < NO_CONTEXT * known and highest_ratio(h) >= RATIO_LOW
            and not was_found(h, 'rate too large')):
        return (f'the loss has stayed at {second:.4f} for {SETTLED} updates, what the frequencies of the tokens alone '
                f'give ({known:.4f}). What came before a token says nothing of it: do x and y belong together (y is x '
                'moved on by one)? Is the text shuffled? Look at --dry_run')


def nothing_to_learn(h):
    losses, val = h.last('loss', RISEN), h.last('val/loss', 1)
    if len(losses) == RISEN and np.median(losses) < NOTHING_LEFT and not (len(val) and val[0] > NOTHING_LEFT):
        return (f'the loss is {np.median(losses):.4f}, and no text is that easy. The data is one token again and '
                'again, or y gives x away: look at --dry_run, and at the dataset')


def plateau(h):
    steps, losses = h.get('loss')
    n = max(3 * WINDOW, len(losses) // 3)
    if (len(h.settled('loss', n)) < n or not rate_is_high(h, n) or nothing_to_learn(h) or no_use_of_the_context(h)
            or was_found(h, 'rate too large') or was_found(h, 'rate too small')):
        return None
    parts = losses[-n:-(n // 2)], losses[-(n // 2):]
    parts = [part[np.isfinite(part)] for part in parts]
    first, second = (part.mean() for part in parts)
    error = math.sqrt(sum(part.var() / len(part) for part in parts))  # of their difference
    if abs(first - second) > FLAT * first or error > FLAT * first:  # or too noisy to tell
        return None
    train, val = h.last('train/loss', 1), h.last('val/loss', 1)
    words = f'the loss has stayed at {second:.4f} for {n} updates, at a high rate. '
    if len(train) and len(val) and val[0] - train[0] < SMALL_GAP * train[0]:
        larger = [f'--n_layer={h.facts["n_layer"] + 2}'] if 'n_layer' in h.facts else []
        larger += [f'--n_embd={2 * h.facts["n_embd"]}'] if 'n_embd' in h.facts else []
        return words + (f'Train and val are alike ({train[0]:.4f} and {val[0]:.4f}): the model underfits, it is too '
                        f'small for this text: {", ".join(larger) or "a larger one"}')
    return words + ('It has converged as far as this rate allows; a lower one brings the rest'
                    + ('' if h.facts.get('decay_lr') else ': --decay_lr'))


def data_stall(h):
    spent, took = h.get('data_ms', 5)[1], h.get('time_ms', 5)[1]
    if len(spent) == len(took) == 5 and np.median(spent / took) > STALL:
        return (f'{np.median(spent / took):.0%} of the time goes into fetching batches ({np.median(spent):.1f} ms a '
                'step). The device waits for the data: copy the dataset to a local disk, stop other work here')


def throughput_collapse(h):
    steps, speed = h.get('tokens_per_second')
    if len(speed) < 15:
        return None
    usual, now = np.median(speed[:-5]), speed[-5:]
    since = h.at('time', steps[-1]) - h.at('time', steps[-5])
    if (now < COLLAPSE * usual).all() and since > COLLAPSE_SECONDS:
        return (f'{np.median(now):,.0f} tokens/s, where {usual:,.0f} were usual. Other work on this machine, a hot or '
                'throttled GPU, or memory that is swapped: look at system/* in the metrics, and at nvidia-smi')


CHECKS = [first_loss, loss_spike, numbers_not_finite, explosion, vanishing, layers_without_gradient, swings,
          clipped_always, overfitting, rate_too_large, rate_too_small, no_use_of_the_context, nothing_to_learn, plateau,
          data_stall, throughput_collapse]
EVENTS = [first_loss, loss_spike]  # they happen, and do not last


def rate_is_high(h, n=1):
    """Whether the rate was at least half of its highest in the newest n updates."""
    rates = h.get('lr')[1]
    return not len(rates) or rates[-n:].min() >= 0.5 * rates.max()


def highest_ratio(h):
    """The median block's update / weights, at the times when it was high; inf where it is not known."""
    rows = [h.get(name)[1] for name in h.series
            if name.startswith('update_ratio/') and is_block(name.removeprefix('update_ratio/'))]
    shortest = min(map(len, rows), default=0)
    medians = np.median([row[-shortest:] for row in rows], axis=0) if shortest else np.array([])
    return np.percentile(medians[np.isfinite(medians)], 90) if np.isfinite(medians).any() else math.inf


def is_block(layer):
    """Whether a layer is one of a series, which ends in its number: see gradients.layers."""
    return layer.rpartition('.')[2].isdigit()


def is_norm(layer):
    """Whether a layer outside the blocks is a LayerNorm or the like, by the words that modules are named with."""
    return not is_block(layer) and re.search(r'norm|(?<![a-z])ln(?![a-z])', layer.lower()) is not None


def was_found(h, name):
    return any(finding[0] == name for finding in h.findings)


def lower_rate(h):
    rate = h.facts.get('learning_rate')
    return f'--learning_rate={nice(min(rate / 10, RATE_HOPELESS))}{muon(h, 0.1)}' if rate else 'a lower rate'


def higher_rate(h):
    rate = h.facts.get('learning_rate')
    return f'--learning_rate={nice(rate * 10)}{muon(h, 10)}' if rate else 'a higher rate'


def muon(h, factor):
    """Muon's rate times a factor, as a setting; '' where the optimizer is another."""
    rate = re.fullmatch(r'muon(?::(\d+\.?\d*(?:e[-+]?\d+)?))?', str(h.facts.get('optimizer')))
    return f' --optimizer=muon:{nice(float(rate[1] or 0.02) * factor)}' if rate else ''


def longer_warmup(h):
    return f'--warmup_iters={max(100, 2 * h.facts.get("warmup_iters", 0))}'


def nice(number):
    return f'{number:.2g}'.replace('e-0', 'e-').replace('e+0', 'e')


def out_dir(h):
    folder = h.facts.get('out_dir', 'checkpoints')
    return '' if folder == 'checkpoints' else f' --out_dir={shlex.quote(str(folder))}'


# ---------------------------------------------------------------------------------------------------------------------
# the whole run


def verdict(h):
    """Lines that sum a run up: its best, its gradient norm, its speed, and what was found on the way."""
    if h.looked < 0:
        h.replay()
    h.news()
    with h.of_this_text():
        lines = figures_in_words(h)
        astray = diverged(h)
    lines += [f'diverged: {astray}'] if astray else []
    told = Counter()
    for name, begin, end, _, words in h.findings:
        told[name] += 1
        lasted = f'at step {begin}' if begin == end else f'from step {begin} ' + (f'to {end}' if end else 'to the end')
        lines += [f'{name}, {lasted}: {words}'] if told[name] <= MOST_OFTEN else []
    lines += [f'{name}: {n - MOST_OFTEN} more times' for name, n in told.items() if n > MOST_OFTEN]
    if not h.findings and not astray and lines:
        lines.append('nothing to complain about')
    if since := h.facts.get('other_text_since'):
        lines.insert(0, f'other text since step {since}: what follows is about that alone')
    return lines


def figures_in_words(h):
    """The lines of a verdict that say how it went, without judging."""
    lines = []
    (steps, val), loss = h.get('val/loss'), h.get('loss', 1)[1]
    fine = np.isfinite(val)
    if fine.any():
        best = int(np.where(fine, val, math.inf).argmin())
        train = dict(zip(*h.get('train/loss'))).get(steps[best])
        lines.append(f'best val loss {in_words(val[best])} at step {steps[best]}'
                     + (f' (train {in_words(train)})' if train is not None else ''))
    elif len(val) or len(loss):
        lines.append(f'loss {in_words(loss[0] if len(loss) else math.nan)} at the end, '
                     + ('no evaluation was finite' if len(val) else 'not evaluated'))
    steps, norms = h.get('grad_norm')
    fine = np.isfinite(norms)
    if fine.any():
        low, middle, high = np.percentile(norms[fine], (5, 50, 95))
        limits = h.clip_limits(steps[fine])
        clipped, limit = np.mean(norms[fine] > limits), np.median(limits)
        lines.append(f'gradient norm {middle:.3g} ({low:.3g} to {high:.3g} in 9 of 10 updates, {norms[fine].max():.3g} '
                     f'at most, at step {steps[fine][norms[fine].argmax()]})'
                     + (f'; {clipped:.1%} of the updates clipped to {limit:.3g}' if limit < math.inf else ''))
    speed = h.last('tokens_per_second', 10**6)
    if len(speed):
        mfu = h.last('mfu', 10**6)
        lines.append(f'{np.median(speed):,.0f} tokens/s' + (f', mfu {np.median(mfu):.1%}' if len(mfu) else ''))
    return lines


def diverged(h):
    """What became of a run that ends with losses which a fair guess would beat, and what helps; '' for any other."""
    (at, val), (steps, losses) = h.get('val/loss'), h.get('loss')
    first = [value for values in (val, losses) for value in values[np.isfinite(values)][:1]]
    guess = [math.log(h.facts['vocab_size'])] if h.facts.get('vocab_size') else []
    bound = max([*first, *guess], default=0) + FIRST_LOSS_OFF
    if len(val) and at[-1] >= max([*steps[-1:], 1]) and not val[-1] <= bound:
        words = f'the val loss is {in_words(val[-1])} at the end'
    elif len(losses) >= ASTRAY and not (losses[-ASTRAY:] <= bound).any():
        words = f'the loss is {in_words(losses[-1])} at the end, and was like that for {ASTRAY} updates'
    else:
        return ''
    return (words + (f', where a fair guess among {h.facts["vocab_size"]} ids has {guess[0]:.4f}' if guess else '')
            + f'. The updates go astray: {lower_rate(h)}, {longer_warmup(h)}'
            + ('' if h.facts.get('grad_clip', 1) else ', --grad_clip=1.0') + '; --find_lr looks for a rate that works')


def without_progress(losses, min_delta):
    """For each loss how many, itself the last, have come since one was lower than all before it by min_delta."""
    best, waited, counts = math.inf, 0, []
    for loss in losses:
        best, waited = (loss, 0) if loss < best - min_delta else (best, waited + 1)
        counts.append(waited)
    return counts


def early_stop(val_losses, patience, min_delta, norms=()):
    """
    Why a run should end, '' where it need not: the last `patience` evaluations (0 = any number) were without progress;
    or its newest gradient norms (inf where there was no step yet) say that it has died or exploded.
    """
    norms = np.array(norms)
    if patience and val_losses and (waited := without_progress(val_losses, min_delta)[-1]) >= patience:
        best = min((loss for loss in val_losses if math.isfinite(loss)), default=math.nan)
        return (f'early_stop: {waited} evaluations in a row were without progress, the lowest val loss is {best:.4f}; '
                '--init_from=resume --early_stop=0 goes on')
    if len(norms) and np.isfinite(norms).all():
        n_high = int((norms > max(NORM_HIGH, min(4 * np.median(norms), NORM_HOPELESS))).sum())
        if np.median(norms) < NORM_LOW:
            return (f'early_stop_norm: the gradient has died, its norm was about {np.median(norms):.2g} in the last '
                    f'{len(norms)} updates; --init_from=resume --early_stop_norm=False goes on')
        if n_high >= EXPLODED * len(norms):
            return (f'early_stop_norm: the gradient has exploded, its norm was up to {norms.max():.3g} in {n_high} of '
                    f'the last {len(norms)} updates; --init_from=resume --early_stop_norm=False goes on, a lower '
                    'learning_rate is better')
    return ''
