"""
Which figures a picture shows in which panel, and the points of its curves and the cells of its heat maps. NumPy alone.
"""

import math

import numpy as np

# the panels and the figures they show; the first is tall, and of the others one without figures is left out
LOSS, ACCURACY, RATE, NORM, SPEED = 'loss (nats a token)', 'accuracy', 'learning rate', 'gradient norm', 'tokens/s'
PANELS = {LOSS: ['loss', 'train/loss', 'val/loss'], ACCURACY: ['train/accuracy', 'val/accuracy'], RATE: ['lr'],
          NORM: ['grad_norm'], SPEED: ['tokens_per_second']}
# and what gets none: figures of the machine and of the loop, by layer, by dataset; any other has a panel of its own
NOT_DRAWN = ['time', 'time_ms', 'data_ms', 'mfu', 'epoch', 'bad_steps', 'rewinds', 'clip_rate', 'clip_limit',
             'lr_factor', 'raw/val/loss']
NOT_DRAWN_PREFIXES = 'system/', 'grad_norm/', 'update_ratio/', 'train/loss/', 'val/loss/'
MOST_OWN_PANELS, MOST_CURVES = 8, 6  # panels of their own, and figures in one of them
ABSENT = -1.0  # in a table of norms: none of this layer at this step


def own_panels(histories, metric=''):
    """
    The figures that have no panel in PANELS and get one of their own: {title: figures}, those that share what stands
    before '/' in one, as do train/a and val/a; and the figures that are left out. That of the metric comes first.
    """
    shown = {name for names in PANELS.values() for name in names}
    known = {*NOT_DRAWN, *shown}
    names = dict.fromkeys(name for history in histories for name in history.series
                          if (name == metric and name not in shown
                              or name not in known and not name.startswith(NOT_DRAWN_PREFIXES))
                          and np.isfinite(history.get(name)[1]).any())
    groups = {}
    for name in sorted(names, key=lambda name: name != metric):
        head, _, rest = name.partition('/')
        groups.setdefault(rest if rest and head in ('train', 'val') else head or name, []).append(name)
    drawn = {title: some[:MOST_CURVES] for title, some in list(groups.items())[:MOST_OWN_PANELS]}
    return drawn, [name for name in names if not any(name in some for some in drawn.values())]


# ---------------------------------------------------------------------------------------------------------------------
# from figures to points


def thinned(steps, values, n=2000):
    """Of a long series the lowest and the highest of each of n stretches: on paper the same picture."""
    if len(steps) <= 10 * n:
        return steps, values
    kept = len(steps) // n * n  # the few that are left over at the end are kept too
    rows = values[:kept].reshape(n, -1)
    first = np.arange(n) * rows.shape[1]
    lowest = first + np.where(np.isfinite(rows), rows, np.inf).argmin(axis=1)
    highest = first + np.where(np.isfinite(rows), rows, -np.inf).argmax(axis=1)
    chosen = np.unique(np.concatenate([lowest, highest, np.arange(kept, len(steps))]))
    return steps[chosen], values[chosen]


def smoothed(steps, values, n=500):
    """The running median at n places, over window() values; nearer the start, over fewer."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    half = window(values) // 2
    centres = np.unique(np.linspace(0, max(0, len(values) - 1), n).round().astype(int))[:len(values)]
    reaches = np.minimum(half, centres)  # as far back as ahead, since the first losses fall fast
    medians = [np.median(values[c - reach:c + reach + 1]) for c, reach in zip(centres, reaches)]
    return steps[centres], np.array(medians)


def window(values):
    """How many values a running median takes: 2% of them, of few more; 1 where there are too few to smooth."""
    return max(len(values) // 50, min(25, len(values) // 7)) // 2 * 2 + 1 if len(values) >= 30 else 1


def finite(history, panel):
    """The numbers that a panel shows of a run, without those that are none."""
    values = np.concatenate([history.get(name)[1] for name in PANELS[panel]])
    return values[np.isfinite(values)]


def best(history, name='val/loss', is_max=False):
    """
    (step, value) of the lowest val loss, or of the lowest or highest of another figure, on the text that a run has now;
    NaN where there is none.
    """
    with history.of_this_text():
        steps, values = history.get(name)
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):
        return 0, math.nan
    at = values.argmax() if is_max else values.argmin()
    return int(steps[at]), float(values[at])


def in_words(value):
    """A figure as text: 2.4411, or 1.2e-05 where four places say too little."""
    return f'{value:.4f}' if value == 0 or 0.01 <= abs(value) < 1e5 else f'{value:.4g}'


def layer_table(history):
    """The names of the layers in the order of the log, the steps, and the norms (layers, steps), ABSENT where none."""
    names = [name.removeprefix('grad_norm/') for name, (steps, _) in history.series.items()
             if name.startswith('grad_norm/') and len(steps)]
    series = [history.get(f'grad_norm/{name}') for name in names]
    steps = np.unique(np.concatenate([steps for steps, _ in series]))
    norms = np.full((len(names), len(steps)), ABSENT)
    for row, (at, values) in zip(norms, series):
        row[np.searchsorted(steps, at)] = values
    first = np.arange(0, len(steps), math.ceil(len(steps) / 1200))  # more columns than pixels: the highest stands
    return names, steps[first], np.maximum.reduceat(norms, first, axis=1)


def cell_columns(places, cells):
    """
    The edges and colours of a heat map's columns, (rows, n, 4), that begin at these places. Each reaches up to the next
    one; but where that is more than twice as far as from its neighbours, as while a run was starting up, it is as wide
    as these, and the rest stays white.
    """
    if len(places) < 3:
        return np.append(places, places[-1] + (places[-1] - places[0] or 1)), cells
    widths = np.diff(places)
    widths = np.append(widths, widths[-1])
    usual = np.maximum(np.append(0, widths[:-1]), np.append(widths[1:-1], [0, 0]))  # the wider neighbour
    ends = places + np.where(widths > 2 * usual, usual, widths)
    gaps = np.flatnonzero(widths[:-1] > 2 * usual[:-1]) + 1
    return np.insert(np.append(places, ends[-1]), gaps, ends[gaps - 1]), np.insert(cells, gaps, 1.0, axis=1)
