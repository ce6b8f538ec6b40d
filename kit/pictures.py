"""Every picture of the house. matplotlib is imported when one is drawn."""


def figure():
    """An empty figure and its axes, in the style of the house; draws to files, needs no screen."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 4.5), dpi=150, layout='constrained')
    ax.spines[['top', 'right']].set_visible(False)
    ax.grid(color='0.92')
    ax.set_axisbelow(True)
    ax.set_xlabel('step')
    ax.set_ylabel('loss (nats a token)')
    return fig, ax


def loss_curve(curves, title, path):
    """One run: the loss of single steps behind, the evaluations of both splits in front, the best one marked."""
    fig, ax = figure()
    ax.plot(curves['loss'].keys(), curves['loss'].values(), color='0.8', linewidth=1, label='single steps')
    for split, color in ('train', 'C0'), ('val', 'C1'):
        ax.plot(curves[split].keys(), curves[split].values(), color=color, marker='o', markersize=3, label=split)
    if curves['val']:
        best = min(curves['val'], key=curves['val'].get)
        ax.annotate(f'{curves["val"][best]:.4f} at step {best}', (best, curves['val'][best]), xytext=(0, 10),
                    textcoords='offset points', ha='right', color='C1')
    ax.set_title(title, loc='left')
    ax.legend(frameon=False)
    fig.savefig(path)


def comparison(runs, path):
    """Several runs {name: curves}: their validation losses in one picture."""
    fig, ax = figure()
    for name, curves in runs.items():
        ax.plot(curves['val'].keys(), curves['val'].values(), marker='o', markersize=3, label=name)
    ax.set_ylabel('validation loss (nats a token)')
    ax.legend(frameon=False)
    fig.savefig(path)
