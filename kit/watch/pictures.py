"""
Every picture that the scripts draw. matplotlib is imported when one is drawn.

Each writes itself to a path, or without one is returned as uint8 (height, width, 3). With show=True it can be looked
at in a window too, once show_windows() is called. x is what the panels run over: steps, tokens or time.
"""

import io
import math
import warnings
from contextlib import contextmanager

import numpy as np

from kit.base import files
from kit.watch import curves
from kit.watch.curves import ABSENT, ACCURACY, LOSS, NORM, PANELS, RATE, SPEED

# Okabe and Ito's colours, which colour-blind eyes tell apart; markers tell apart the runs that share a colour
COLORS = ['#0072B2', '#D55E00', '#009E73', '#E69F00', '#CC79A7', '#56B4E9', '#000000']
MARKERS = 'o^sDvPX'
TRAIN, VAL, *_ = COLORS
FAINT, DARK, BAD, ZERO = '0.80', '0.25', '#C00000', '#000000'
STYLE = {
    'figure.dpi': 150, 'savefig.dpi': 150, 'font.size': 9, 'axes.titlesize': 10, 'axes.titlelocation': 'left',
    'axes.spines.top': False, 'axes.spines.right': False, 'axes.edgecolor': '0.3', 'axes.grid': True,
    'axes.axisbelow': True, 'grid.color': '0.93', 'xtick.labelsize': 8, 'ytick.labelsize': 8,
    'xtick.color': '0.3', 'ytick.color': '0.3', 'xtick.labelcolor': 'black', 'ytick.labelcolor': 'black',
    'legend.fontsize': 8, 'legend.frameon': False, 'lines.linewidth': 1.3, 'lines.markersize': 3.5,
    'text.parse_math': False, 'text.usetex': False,  # a name is no formula
}
DASHES = ['solid', (0, (4, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)), (0, (10, 2)), (0, (3, 1, 1, 1, 1, 1))]


def loss_curve(history, name, path=None, x='steps', show=False):
    """One run: the loss of its steps, its evaluations with the best one marked, and below what else it logged."""
    with style():
        fig, panels, own, across = figure_of_panels([history], x, show)
        fig.suptitle(shortened(name, 80), x=0.01, ha='left', fontsize=10)
        for label in [RATE, NORM, SPEED]:
            if label in panels:
                draw_steps(panels[label], history, *PANELS[label], across)
        if ACCURACY in panels:
            draw(panels[ACCURACY], history, 'train/accuracy', across, color=TRAIN, marker='o')
            draw(panels[ACCURACY], history, 'val/accuracy', across, color=VAL, marker='o')
        ax = panels[LOSS]
        draw_steps(ax, history, 'loss', across)
        draw(ax, history, 'train/loss', across, color=TRAIN, marker='o', label='train')
        draw(ax, history, 'val/loss', across, color=VAL, marker='o', label='val')
        limit_loss(ax, [history], across, [DARK])
        label_best(ax, history, across)
        ax.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=6, borderaxespad=0.1, borderpad=0.2,
                  handlelength=1.6, columnspacing=1.1)
        limit_others(panels, [history])
        draw_own(own, [history], across, [{}])
        mark_change(ax, fig.axes, history, across)
        return finish(fig, path, show)


def comparison(runs, path=None, x='steps', show=False, metric='val/loss', is_max=False):
    """
    Several runs {name: History} in the same panels, a colour each; beyond seven the markers count too. metric: the
    figure whose lowest, or with is_max its highest, is starred and named for each run.
    """
    from matplotlib.lines import Line2D
    with style():
        histories = list(runs.values())
        entries = [shortened(name, 50) + best_in_words(history, metric, is_max) for name, history in runs.items()]
        columns = min(len(runs), max(1, 105 // (max(map(len, entries)) + 6)))  # as many as fit below 8 inches
        fig, panels, own, across = figure_of_panels(histories, x, show, math.ceil(len(runs) / columns), metric)
        starred = next((ax for names, ax in [*((PANELS[label], ax) for label, ax in panels.items()), *own.values()]
                        if metric in names), None)
        colors = [COLORS[i % len(COLORS)] for i in range(len(runs))]
        markers = [MARKERS[i // len(COLORS) % len(MARKERS)] for i in range(len(runs))]
        ax = panels[LOSS]
        for i, (history, color, marker) in enumerate(zip(histories, colors, markers)):
            draw(ax, history, 'loss' if history.get('loss')[0].size else 'train/loss', across, curves.smoothed,
                 color=color, linewidth=0.7, dashes=(4, 2))
            draw(ax, history, 'val/loss', across, color=color, marker=marker)
            mark_bad(ax, history, 'loss', across, color)
            step, value = curves.best(history, metric, is_max)
            if starred:
                starred.plot(across(history, step), value, '*', color=color, markersize=10, markeredgecolor='white',
                             markeredgewidth=0.5, zorder=4)
            if ACCURACY in panels:
                draw(panels[ACCURACY], history, 'val/accuracy', across, color=color, marker=marker)
            for label in [RATE, NORM, SPEED]:
                if label in panels:
                    draw(panels[label], history, *PANELS[label], across,
                         curves.thinned if label == RATE else curves.smoothed, marks=8, shift=i / len(runs),
                         linewidth=1, color=color, marker=marker if len(runs) > len(COLORS) else None)
        draw_own(own, histories, across, [{'color': color, 'marker': marker if len(runs) > len(COLORS) else None}
                                          for color, marker in zip(colors, markers)])
        limit_loss(ax, histories, across, colors)
        extreme = 'highest' if is_max else 'lowest'
        words = ['solid: val' + f', its {extreme} starred' * (metric == 'val/loss'),
                 'dashed: loss of the steps, running median']
        words += [f'star: {extreme} {shortened(metric, 30)}'] * (starred is not None and metric != 'val/loss')
        marks = ' '.join(ax.get_legend_handles_labels()[1])
        words += ['triangles: cut'] * ('cut:' in marks) + ['ticks below: not finite'] * ('not finite:' in marks)
        ax.set_title('; '.join(words), fontsize=9)
        limit_others(panels, histories)
        handles = [Line2D([], [], color=color, marker=marker) for color, marker in zip(colors, markers)]
        fig.legend(handles, entries, loc='outside lower center', ncols=columns)
        return finish(fig, path, show)


def layers(runs, path=None, x='steps', show=False):
    """One run or several {name: History}: the gradient norm by layer, from the input down, as a heat map."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, to_rgb
    from matplotlib.patches import Patch
    with style():
        tables = [curves.layer_table(history) for history in runs.values()]
        norms = np.concatenate([norms.ravel() for _, _, norms in tables])
        good = norms[np.isfinite(norms) & (norms > 0)]
        low, high = np.quantile(good, [0.001, 0.999]) if good.size else (1, 1)
        colors = ScalarMappable(LogNorm(low / 1.05, high * 1.05), 'viridis')
        heights = [min(6, max(1.2, 0.17 * len(names))) for names, _, _ in tables]
        fig = new_figure((8, sum(heights) + 0.4 * len(runs) + 0.6), show)
        axes = fig.subplots(len(runs), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        across = place(list(runs.values()), x, axes[-1])
        for ax, height, (name, history), (names, steps, norms) in zip(axes, heights, runs.items(), tables):
            cells = colors.to_rgba(np.where(np.isfinite(norms) & (norms > 0), norms, 1))  # (layers, steps, 4)
            for where, color in (norms == 0, ZERO), (norms == ABSENT, (1, 1, 1)), (~np.isfinite(norms), BAD):
                cells[where, :3] = to_rgb(color)
            edges, cells = curves.cell_columns(across(history, steps), cells)
            ax.pcolormesh(edges, np.arange(len(names) + 1), cells, rasterized=True)
            every = math.ceil(0.13 * len(names) / height)  # inches a label needs
            ax.set_yticks(np.arange(len(names))[::every] + 0.5, [shortened(name, 30) for name in names[::every]])
            ax.set(title=shortened(name, 80), ylim=(len(names), 0))
            ax.grid(False)
        fig.colorbar(colors, ax=axes, label=NORM, extend='both', extendfrac=0.02, pad=0.01, aspect=30, format=plain,
                     ticks=log_ticks(*colors.get_clim())).minorticks_off()
        special = [Patch(color=color, label=label) for color, label, is_there in
                   [(ZERO, 'zero: no gradient arrives', (norms == 0).any()),
                    (BAD, 'not finite', not np.isfinite(norms).all())] if is_there]
        if special:
            fig.legend(handles=special, loc='outside lower right', ncols=2)
        return finish(fig, path, show)


def schedule(rates, name, path=None, show=False):
    """The learning rates of all steps of a run, before it is made; its last one is that of step len(rates) - 1."""
    with style():
        fig = new_figure((8, 2.6), show)
        ax = fig.subplots()
        ax.plot(np.arange(len(rates)), rates, color=TRAIN)
        ax.set_xlim(-0.02 * len(rates), 1.02 * len(rates))
        ax.set_ylim(0, 1.06 * max(rates))
        ax.set(title=shortened(name, 100), xlabel='steps', ylabel=RATE)
        ax.xaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
        ax.yaxis.set_major_formatter(plain)
        return finish(fig, path, show)


def attention(maps, labels, path=None):
    """
    Who looks where: a heat map for each layer (rows) and head (columns). maps: (L, H, T, T) of weights, a query's
    along the last axis; labels: T short texts. No more than 8 layers, 8 heads and 64 positions are drawn.
    """
    from matplotlib.colors import PowerNorm
    full = np.shape(maps)
    maps = np.asarray(maps, dtype=np.float64)[:8, :8, :64, :64]
    n_layers, n_heads, n_tokens, _ = maps.shape
    labels = [str(label).replace('\n', '\\n') for label in labels[:n_tokens]]
    side = max(1.0, min(4.0, 8 / n_heads, 10 / n_layers))  # inches of a map
    every = math.ceil(n_tokens * 0.1 / side)  # a label needs a tenth of an inch
    ticks = np.arange(0, n_tokens, every)
    left_out = [f'the first {shown} of {n} {what}' for shown, n, what in
                zip(maps.shape, full, ('layers', 'heads', 'positions')) if shown < n]
    with style():
        fig = new_figure((side * n_heads + 1.4, side * n_layers + 1.0), show=False)
        axes = fig.subplots(n_layers, n_heads, sharex=True, sharey=True, squeeze=False)
        for (layer, head), ax in np.ndenumerate(axes):
            # the root of the weights, since most of them are small
            image = ax.imshow(maps[layer, head], cmap='Blues', norm=PowerNorm(0.5, 0, 1), interpolation='nearest')
            ax.set_xticks(ticks, labels[::every], rotation=90 if max(map(len, labels)) > 2 else 0, fontsize=6)
            ax.set_yticks(ticks, labels[::every], fontsize=6)
            ax.tick_params(length=1.5, pad=1)
            ax.label_outer()
            ax.grid(False)
            if layer == 0:
                ax.set_title(f'head {head}', fontsize=8, loc='center')
            if head == 0:
                ax.set_ylabel(f'layer {layer}', fontsize=8)
        fig.colorbar(image, ax=axes, label='attention weight', shrink=min(1, 3 / (side * n_layers)), pad=0.01)
        fig.suptitle(', '.join(left_out) or 'attention: each row is a position, and where it looks', fontsize=9)
        return finish(fig, path)


def lr_finder(rates, losses, curve, suggested, path=None):
    """
    A range test: the losses over the rates they were met at, the curve through them, and the rate that is suggested,
    None where it shows none.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator
    rates, losses, curve = (np.asarray(values, dtype=np.float64) for values in (rates, losses, curve))
    good = np.isfinite(losses)
    with style():
        fig = new_figure((8, 4.2), show=False)
        ax = fig.subplots()
        ax.plot(rates[good], losses[good], color=FAINT, linewidth=0.6, label='single steps')
        ax.plot(rates, curve, color=DARK, label='smoothed')
        ax.set_xscale('log')
        ax.xaxis.set_major_locator(LogLocator(numticks=12))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f'{rate:.0e}'))
        ax.set(xlabel=RATE, ylabel=LOSS, xlim=(rates[0] / 1.3, rates[-1] * 1.3))
        if good.any():
            low, start = curve.min(), max(curve[0], losses[good][0])
            top = start + 0.15 * max(start - low, 0.1)  # what diverges goes out of the picture
            ax.set_ylim(min(low, losses[good].min()) - 0.08 * (top - low), top)
        if not good.all():
            ax.plot(rates[~good], np.zeros((~good).sum()), '|', markersize=9, color=BAD, clip_on=False,
                    transform=ax.get_xaxis_transform(), label='not finite')
        if suggested:
            at = curve[np.abs(np.log(rates / suggested)).argmin()]
            ax.axvline(suggested, color=VAL, linewidth=0.9, linestyle='--')
            ax.plot(suggested, at, 'o', markersize=9, markerfacecolor='none', markeredgecolor=VAL)
            ax.annotate(f'suggested: {suggested:.1e}', (suggested, 1), xycoords=ax.get_xaxis_transform(), color=VAL,
                        xytext=(5, -12), textcoords='offset points')
        ax.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.1, handlelength=1.6)
        return finish(fig, path)


# ---------------------------------------------------------------------------------------------------------------------
# figures as such


@contextmanager
def style():
    """The look that all pictures share, while one is drawn."""
    try:
        import matplotlib
    except ValueError as error:  # such as MPLBACKEND=x
        raise OSError(f'matplotlib cannot be imported: {error}') from None
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph')  # a character that the font lacks is drawn as a box
        yield


def new_figure(size, show):
    """An empty figure of some inches. Only one to be shown needs a screen."""
    if show:
        import matplotlib.pyplot as plt
        return plt.figure(figsize=size, layout='constrained')
    from matplotlib.figure import Figure
    return Figure(figsize=size, layout='constrained')


def finish(fig, path, show=False):
    """Write the picture, a PNG whatever it is called, or return it as uint8 (height, width, 3). Raises OSError."""
    if path is not None:
        picture = io.BytesIO()
        fig.savefig(picture, format='png')
        return files.write_whole(path, picture.getvalue())
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def has_screen():
    """Whether matplotlib can open a window here."""
    import matplotlib.pyplot as plt
    try:
        fig = plt.figure()
    except (ImportError, RuntimeError):  # MPLBACKEND names a kind of window that lacks a package
        return False
    plt.close(fig)
    return fig.canvas.required_interactive_framework is not None


def show_windows():
    """Show what was drawn with show=True, until its windows are closed."""
    import matplotlib.pyplot as plt
    plt.show()


def figure_of_panels(histories, x, show, legend_rows=0, metric=''):
    """
    A figure with a panel for whatever one of the runs has logged: fig, {label: ax}, {title: (figures, ax)} of
    own_panels(), across of place().
    """
    from matplotlib.ticker import MaxNLocator
    labels = [label for label in PANELS
              if label == LOSS or any(len(curves.finite(history, label)) for history in histories)]
    groups, _ = curves.own_panels(histories, metric)
    heights = [3.6 if label == LOSS else 1.15 for label in labels]
    heights += [1.3 if len(names) <= 3 else 1.5 for names in groups.values()]  # a legend of two lines
    fig = new_figure((8, sum(heights) + 0.5 + 0.18 * legend_rows), show)
    axes = fig.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    panels = dict(zip(labels, axes))
    own = {title: (names, ax) for (title, names), ax in zip(groups.items(), axes[len(labels):])}
    across = place(histories, x, axes[-1])
    for label, ax in panels.items():
        ax.set_ylabel(label)
        ax.tick_params(length=2.5)
        if label == LOSS:
            ax.ticklabel_format(axis='y', useOffset=False, scilimits=(-9, 12))  # nothing of its own above the axis
        else:
            ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            ax.yaxis.set_major_formatter({ACCURACY: percent, SPEED: count}.get(label, plain))
    for _, ax in own.values():
        ax.tick_params(length=2.5)
        ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    drawn = [name for names in [*(PANELS[label] for label in labels), *groups.values()] for name in names]
    ends = [across(history, steps[[0, -1]]) for history in histories for name in drawn
            if len(steps := history.get(name)[0])]
    left, right = np.min(ends), np.max(ends)
    margin = 0.02 * (right - left) or 1
    ax.set_xlim(left - margin, right + margin)
    fig.align_ylabels()
    return fig, panels, own, across


def place(histories, x, ax):
    """Label the axis that x names. Returns across(history, steps) -> where steps stand on it."""
    from matplotlib.ticker import MaxNLocator
    label, ticks, across = x, count, lambda history, steps: steps * float(history.facts['tokens_per_step'])
    if x == 'steps':
        ticks, across = lambda value, _: f'{value:,.0f}', lambda history, steps: steps
    elif x == 'time':
        longest = max(history.get('time')[1].max() for history in histories)
        units = [('days', 86400), ('hours', 3600), ('minutes', 60), ('seconds', 1)]
        unit, seconds = next((u for u in units if longest >= 3 * u[1]), units[-1])
        label, ticks = f'time ({unit})', plain
        across = lambda history, steps: np.interp(steps, *history.get('time')) / seconds
    ax.set_xlabel(label)
    ax.xaxis.set_major_formatter(ticks)
    ax.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 2.5, 5, 10], integer=x != 'time'))
    return across


def plain(value, _=None):
    """A number on an axis: 0.0005, 20."""
    return f'{value:.6g}'


def percent(value, _):
    return f'{100 * value:.4g}%'


def count(value, _):
    """A count on an axis: 950, 15k, 1.2M, 300B."""
    unit, letter = next(((u, x) for u, x in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')) if abs(value) >= u), (1, ''))
    return f'{value / unit:.6g}{letter}'


def log_ticks(low, high):
    """Where the ticks stand on a logarithmic axis of such limits: some, whether it spans a tenth or ten decades."""
    from matplotlib.ticker import LogLocator, MaxNLocator
    return MaxNLocator(4) if high < 5 * low else LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=6)


def shortened(name, length):
    """The end of a long name, on one line, with nothing in it that cannot be drawn."""
    name = ''.join(c if c.isprintable() else '?' for c in ' '.join(name.split()))
    return name if len(name) <= length else '...' + name[3 - length:]


def best_in_words(history, name, is_max):
    step, value = curves.best(history, name, is_max)
    short = {'val/loss': 'val', 'train/loss': 'train'}.get(name, shortened(name, 30))
    since = history.facts.get('other_text_since')
    return (f': {short} {curves.in_words(value)} at step {step:,}' if math.isfinite(value) else '') + (
        f', other text since step {since:,}' if since else '')


# ---------------------------------------------------------------------------------------------------------------------
# what is drawn into a panel


def draw(ax, history, name, across, shape=lambda steps, values: (steps, values), marks=50, shift=0.0, **look):
    """
    A figure as a line, thinned or smoothed, and where there is only one value as a point. With a marker, so many
    points have one, set back by a share of their distance.
    """
    steps, values = shape(*history.get(name))
    every = math.ceil(len(steps) / marks)
    if len(steps) == 1:
        look['marker'] = 'o'
    if len(steps):
        ax.plot(across(history, steps), values, **{'markevery': (int(shift * every), every)} | look)


def draw_steps(ax, history, name, across):
    """Single steps in grey and a line through them; where they are few, or smooth as a rate is, a line alone."""
    steps, values = history.get(name)
    width = curves.window(values[np.isfinite(values)])
    if width == 1 or name == 'lr':
        draw(ax, history, name, across, curves.thinned, color=DARK, linewidth=1, label='single steps',
             marker='.' if width == 1 else None)
    else:
        draw(ax, history, name, across, curves.thinned, color=FAINT, linewidth=0.6, label='single steps')
        width *= (steps[-1] - steps[0]) / (len(steps) - 1)
        draw(ax, history, name, across, curves.smoothed, color=DARK, linewidth=1.1,
             label=f'running median of {width:,.0f} steps')
    mark_bad(ax, history, name, across, BAD)


def draw_own(own, histories, across, looks):
    """
    What own_panels() has found, in its panels. looks: colour and marker of each of several runs, whose figures differ
    in their dashes; those of one run have the colours.
    """
    from matplotlib.lines import Line2D
    for title, (names, ax) in own.items():
        is_alone = len(histories) == 1
        by_figure = [{'color': color} if is_alone else {'linestyle': dashes} for color, dashes in zip(COLORS, DASHES)]
        for i, history in enumerate(histories):
            if is_alone and len(names) == 1:
                draw_steps(ax, history, names[0], across)
                continue
            for name, look in zip(names, by_figure):
                look = looks[i] | look
                if is_alone and curves.window(history.get(name)[1]) == 1:
                    look |= {'marker': '.'}
                draw(ax, history, name, across, curves.smoothed, 50 if is_alone else 8, i / len(histories), linewidth=1,
                     **look)
                mark_bad(ax, history, name, across, look['color'])
        values = np.concatenate([history.get(name)[1] for history in histories for name in names])
        limit_own(ax, values[np.isfinite(values)])
        ax.set_title(shortened(title, 25) if len(names) > 1 else shortened(names[0], 80), fontsize=9)
        if len(names) > 1:
            columns = len(names) if len(names) <= 3 else math.ceil(len(names) / 2)
            length = (95 - min(25, len(title))) // columns - 7  # characters beside the title, and 7 for a line
            labels = [shortened(name.removeprefix(f'{title}/').removesuffix(f'/{title}'), length) for name in names]
            ax.legend([Line2D([], [], **{'color': DARK} | look) for look in by_figure[:len(names)]], labels,
                      loc='lower right', bbox_to_anchor=(1, 1), ncols=columns, borderaxespad=0.1, borderpad=0.2,
                      handlelength=2.2, columnspacing=1.1)


def mark_bad(ax, history, name, across, color):
    """Ticks at the bottom where a figure was not finite."""
    steps, values = history.get(name)
    bad = steps[~np.isfinite(values)]
    if len(bad):
        mark(ax, across(history, bad), 0, 600, marker='|', markersize=9, color=color,
             label=f'not finite: {len(bad):,}')


def mark(ax, places, height, n, **look):
    """Marks at a height between 0 and 1 of a panel, no more than n, so that many stand side by side."""
    left, right = ax.get_xlim()
    places = left + np.unique((n * (places - left) / (right - left)).round()) * (right - left) / n
    ax.plot(places, np.full(len(places), height), **look, linestyle='', clip_on=False, zorder=5,
            transform=ax.get_xaxis_transform())


def label_best(ax, history, across):
    """A ring around the lowest val loss, and what it is."""
    step, value = curves.best(history)
    if not math.isfinite(value):
        return
    x, (left, right), (low, high) = across(history, step), ax.get_xlim(), ax.get_ylim()
    at, is_high = (x - left) / (right - left), value > low + 0.75 * (high - low)
    ax.plot(x, value, 'o', markersize=9, markerfacecolor='none', markeredgecolor=VAL)
    ax.annotate(f'best val {curves.in_words(value)} at step {step:,}', (x, value), color=VAL,
                xytext=(0, -30 if is_high else 30), textcoords='offset points', ha='left' if at < 0.72 else 'right',
                arrowprops={'arrowstyle': '-', 'color': VAL, 'linewidth': 0.7, 'shrinkB': 5},
                bbox={'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.8, 'pad': 1})


def mark_change(ax, axes, history, across):
    """A dotted line through all panels where a run went on with another text, and in ax what it is."""
    step, (left, right) = history.facts.get('other_text_since'), ax.get_xlim()
    x = across(history, step) if step else math.nan
    if left < x < right:
        for each in axes:
            each.axvline(x, color=DARK, linewidth=0.9, linestyle=':')
        is_left = x < left + 0.72 * (right - left)
        ax.annotate(f'other text since step {step:,}', (x, 1), xycoords=ax.get_xaxis_transform(), color=DARK,
                    fontsize=8, xytext=(4 if is_left else -4, -10), textcoords='offset points',
                    ha='left' if is_left else 'right')


def limit_loss(ax, histories, across, colors):
    """Let no spike and no first steps squash the rest of a panel: what is cut off gets triangles at its upper edge."""
    limits = [loss_limits(history) for history in histories if len(curves.finite(history, LOSS))] or [(0, 1)]
    low, highs = min(low for low, _ in limits), sorted(high for _, high in limits)
    usual = highs[(len(highs) - 1) // 2] - low
    high = max(high for high in highs if high - low <= 3 * usual)  # nor may a run that went wrong squash the others,
    lowest = [values.min() for values in (curves.finite(h, LOSS) for h in histories) if len(values)]  # all are seen
    high = max([high, *(value + 0.1 * (high - low) for value in lowest if value < 3 * min(lowest))])
    bottom = ax.dataLim.y0 if math.isfinite(ax.dataLim.y0) else low
    ax.set_ylim(bottom - margin(bottom, high), high)
    if max(abs(bottom), abs(high)) > 1e5:
        tell_apart(ax)
    for history, color in zip(histories, colors):
        figures = [history.get(name) for name in PANELS[LOSS]]
        steps, values = (np.concatenate(parts) for parts in zip(*figures))
        is_cut = np.isfinite(values) & (values > high)
        if is_cut.any():
            mark(ax, across(history, steps[is_cut]), 0.99, 80, marker='^', color=color,
                 label=f'cut: up to {values[is_cut].max():.4g}')


def loss_limits(history):
    """(lowest, highest) loss that a panel should show of a run."""
    low, most, top = np.quantile(curves.finite(history, LOSS), [0, 0.98, 1])
    spread = 1.15 * (most - low)
    return low, top + margin(low, top) if top - low <= 1.5 * spread else low + spread


def margin(low, high):
    """The space beside losses from low to high, some also where all are alike, or so large that digits are lost."""
    return max(0.05 * (high - low), 0.02, 1e-3 * abs(high))


def limit_others(panels, histories):
    """Speed from 0 on, whatever the first step took to compile; norms by decades, with the line they are clipped at."""
    if ax := panels.get(SPEED):
        speeds = [curves.finite(history, SPEED) for history in histories]
        ax.set_ylim(0, 1.2 * max(np.quantile(values, 0.98) for values in speeds if len(values)) or 1)
    if ax := panels.get(RATE):
        tops = [max(curves.finite(history, RATE), default=0) for history in histories]
        lowest = min((top for top in tops if top > 0), default=1)
        if max(tops) > 8 * lowest:  # else the lower rates would lie on the axis
            set_log(ax, lowest / 50)
    if (ax := panels.get(NORM)) and any((curves.finite(history, NORM) > 0).any() for history in histories):
        clips = sorted({history.facts.get('grad_clip') or 0 for history in histories} - {0})
        words = f'dashed: grad_clip = {", ".join(map(plain, clips[:4]))}' if clips else ''
        for clip in clips:
            ax.axhline(clip, color='0.4', linewidth=0.9, linestyle='--', zorder=3)
        if clips and len(histories) == 1:
            words += f', {np.mean(curves.finite(histories[0], NORM) > clips[0]):.1%} of the steps clipped'
        ax.set_title(words, loc='right', fontsize=8)
        set_log(ax)


def limit_own(ax, values):
    """Decades where positive values span more than three of them, and numbers at the axis that can be told apart."""
    if values.min() > 0 and values.max() > 1000 * values.min():
        return set_log(ax)
    tell_apart(ax)


def tell_apart(ax):
    """As many digits at the axis as its numbers need to differ, and no power of ten above it."""
    ticks = ax.get_yticks()
    digits = max(6, math.ceil(math.log10(max(abs(ticks)) / min(np.diff(ticks)))) + 1)
    ax.yaxis.set_major_formatter(lambda value, _: f'{value:.{digits}g}')


def set_log(ax, bottom=None):
    """A logarithmic axis with plain numbers at it."""
    ax.set_yscale('log', nonpositive='mask')
    ax.set_ylim(bottom=bottom)
    low, high = ax.get_ylim()
    if high < 1.01 * low:  # all alike: some space, in which numbers can be told apart
        ax.set_ylim(low / 1.05, 1.05 * high)
    ax.yaxis.set_major_locator(log_ticks(*ax.get_ylim()))
    ax.yaxis.set_major_formatter(plain)
    ax.minorticks_off()
