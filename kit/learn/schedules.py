"""
Learning-rate schedules as plain functions of the step: a resume needs no history, and a picture drawn before the run
shows the rates that it will have. torch.optim.lr_scheduler has most of them as classes. train.py has the warmup and the
cosine once more, where they can be read.

lr_schedule is a name, and behind colons its numbers, each with a default. None goes below min_lr, which the first three
and wsd reach at lr_decay_iters, or max_iters; steps count from the end of the warmup, where it is not said otherwise:

    cosine              half a cosine (Loshchilov and Hutter 2016, arXiv:1608.03983)
    linear              a straight line
    exponential         the same share of the rate is lost at each step
    step:1000:0.1       every 1,000 steps the rate is cut to a tenth
    multistep:2000,3000:0.1    the same at these steps of the run
    restarts:1000:1     cosines one after the other, each so many times as long as the one before (SGDR, the same paper)
    inverse_sqrt        falls with the root of the step of the run (Vaswani et al. 2017, arXiv:1706.03762), without end
    wsd:0.2             warmup, stable, decay: constant, and a straight line down in the last fifth (arXiv:2404.06395)
    plateau:3:0.1       a cut to a tenth after each 3 evaluations in a row without progress (min_delta)
    constant            as decay_lr = False
"""

import math
from functools import cache

from kit.base.errors import fail, shown
from kit.base.overrides import check as check_rules
from kit.base.overrides import given, nearest
from kit.watch.diagnosis import without_progress

SPIKE = 2.0           # times the usual gradient norm from which on it counts as a spike,
CALMING = 0.9         # which counts a tenth less with each step that has passed since
ABOVE_LIMIT = 5.0     # times grad_clip that the usual norm may have before the rate gives way
LOWEST_FACTOR = 0.1   # of the rate
FEWEST_NORMS = 10     # that tell what is usual


def rate(step, s, val_losses=()):
    """
    The learning rate of a step. s: the settings of train.py as a dict; val_losses: those of the evaluations so far, of
    which only plateau takes notice.
    """
    warmup, high, low = warmup_steps(s), s['learning_rate'], s['min_lr']
    if step < warmup:
        offset = 0 if s['warmup_start_lr'] else 1  # nanoGPT's step 0 is one stride above a rate of 0
        return s['warmup_start_lr'] + (high - s['warmup_start_lr']) * (step + offset) / (warmup + offset)
    t, n = step - warmup, max(1, (s['lr_decay_iters'] or s['max_iters']) - warmup)  # n steps lead from high to low
    name, numbers = parse(s['lr_schedule'])
    match name if s['decay_lr'] else 'constant':
        case 'cosine':
            return cosine(t / n, high, low)
        case 'linear':
            return linear(t / n, high, low)
        case 'exponential':
            return high * (low / high) ** min(1, t / n)
        case 'step':
            period, gamma = numbers
            return max(low, high * gamma ** (t // period))
        case 'multistep':
            milestones, gamma = numbers
            return max(low, high * gamma ** sum(step >= milestone for milestone in milestones))
        case 'restarts':
            period, factor = numbers
            t = t % period if factor == 1 else t
            while t >= period:
                t, period = t - period, period * factor
            return cosine(t / period, high, low)
        case 'inverse_sqrt':
            return max(low, high * math.sqrt(max(1, warmup) / max(1, step)))
        case 'wsd':
            falling = max(1, round(numbers[0] * n))
            return linear((t - (n - falling)) / falling, high, low)
        case 'plateau':
            patience, gamma = numbers
            return max(low, high * gamma ** n_plateaus(val_losses, patience, s['min_delta']))
        case 'constant':
            return high


def cosine(progress, high, low):
    return low + 0.5 * (1 + math.cos(math.pi * min(1, progress))) * (high - low)


def linear(progress, high, low):
    return high + (low - high) * min(1, max(0, progress))


def warmup_steps(s):
    """How many steps the warmup has: warmup_iters, or warmup_share of the run."""
    return round(s['warmup_share'] * s['max_iters']) if s['warmup_share'] else s['warmup_iters']


def n_plateaus(losses, patience, min_delta):
    """How many cuts these losses have earned: one for each `patience` in a row without progress."""
    return sum(waited > 0 and waited % patience == 0 for waited in without_progress(losses, min_delta))


# ---------------------------------------------------------------------------------------------------------------------
# what a user has written

NUMBERS = {  # what stands behind the name where nothing is given
    'cosine': (), 'linear': (), 'exponential': (), 'step': (1000, 0.1), 'multistep': ((), 0.1), 'restarts': (1000, 1),
    'inverse_sqrt': (), 'wsd': (0.2,), 'plateau': (3, 0.1), 'constant': (),
}


RULES = [
    'not decay_lr or min_lr <= learning_rate  # the rate must decay downwards; lower min_lr, or --decay_lr=False',
    'not decay_lr or not lr_decay_iters or warmup_iters < lr_decay_iters  # warmup must end before the decay does',
    'not warmup_start_lr or warmup_start_lr <= learning_rate  # the warmup must climb',
    'decay_lr or lr_schedule in ("cosine", "constant")  # without decay there is no schedule; --lr_schedule=constant',
    'lr_schedule != "exponential" or min_lr > 0  # it never comes down to 0; --min_lr=1e-5',
    'lr_schedule != "plateau" or eval_interval > 0  # it goes by the evaluations; --eval_interval=250',
]


@cache
def parse(text):
    """'multistep:2000,3000:0.5' -> ('multistep', ((2000, 3000), 0.5)); one line where it is no schedule."""
    name, *words = text.split(':')
    if name not in NUMBERS:
        fail(f'lr_schedule = {shown(text)}: there is no such schedule{nearest(name, NUMBERS)}; there are '
             f'{", ".join(NUMBERS)}')
    if len(words) > len(NUMBERS[name]):
        fail(f'lr_schedule = {shown(text)}: {name} takes {len(NUMBERS[name]) or "no"} numbers, as in '
             f'--lr_schedule={name}' + ''.join(f':{number or 2000}' for number in NUMBERS[name]))
    return name, tuple(parse_number(text, words[i], default) if i < len(words) else default
                       for i, default in enumerate(NUMBERS[name]))


def parse_number(text, word, default):
    """A word as the kind of number that the default is."""
    if isinstance(default, tuple):
        kind, needed = int, 'steps, each higher than the one before, as in multistep:2000,3000'
    else:
        kind = type(default)
        needed = 'a whole number of 1 or more' if kind is int else 'a number above 0, up to 1'
    try:
        numbers = [kind(part) for part in word.split(',')]
    except ValueError:
        numbers = []
    is_one = isinstance(default, tuple) or len(numbers) == 1
    if not numbers or not is_one or sorted(set(numbers)) != numbers or numbers[0] <= 0 or kind is float and (
            not numbers[0] <= 1):
        fail(f'lr_schedule = {shown(text)}: {shown(word)} is not what it takes there: {needed}')
    return tuple(numbers) if isinstance(default, tuple) else numbers[0]


def check(s):
    """The steps of the warmup; one line where the settings of the rate do not fit together."""
    warmup, (name, numbers) = warmup_steps(s), parse(s['lr_schedule'])
    check_rules(RULES, s | {'warmup_iters': warmup, 'lr_schedule': name})
    if name == 'multistep' and not numbers[0]:
        fail('lr_schedule = multistep: it needs the steps of its cuts, as in --lr_schedule=multistep:2000,3000')
    if name == 'multistep' and numbers[0][0] < warmup:
        fail(f'lr_schedule = {shown(s["lr_schedule"])}: its first cut is at step {numbers[0][0]}, before the warmup of '
             f'{warmup} steps is over')
    return warmup


def steps(s, steps_per_epoch, is_run=True):
    """The max_iters that max_epochs stand for, printed; without a run that of the settings."""
    if {'max_iters', 'max_epochs'} <= given:
        fail('max_iters, max_epochs: one of them says when to end; --max_epochs=0 leaves it to max_iters')
    if not is_run:
        return s['max_iters']
    epochs = s['max_epochs']
    if not epochs * steps_per_epoch < 2**63:
        fail(f'max_epochs = {epochs}: no run makes so many steps; take fewer, such as --max_epochs=1')
    n = max(1, math.ceil(epochs * steps_per_epoch))
    print(f'max_iters: {n} ({epochs:g} epochs)')
    if s['swa_start'] >= n:
        fail(f'swa_start = {s["swa_start"]}: the run has {n} steps, and the average would never begin')
    return n


# ---------------------------------------------------------------------------------------------------------------------
# by the gradient


def damping(norms, limit):
    """
    A factor of the rate, from LOWEST_FACTOR to 1, by the newest gradient norms (the newest last; inf where there was
    none yet): below 1 while a spike stands out from their median, or while that is far above the limit to which they
    are clipped. It recovers as the spike recedes. A function of the norms alone, so a resume needs no more than those.
    """
    known = [norm for norm in norms if math.isfinite(norm)]
    if len(known) < FEWEST_NORMS:
        return 1.0
    usual = sorted(known)[len(known) // 2]
    spike = max(norm * CALMING**age for age, norm in enumerate(reversed(known)))
    factor = min(1.0, SPIKE * usual / max(spike, 1e-30), ABOVE_LIMIT * limit / max(usual, 1e-30))
    return max(LOWEST_FACTOR, factor)
