"""What came of the runs of a sweep: the tables, a row a run and a row a set-up, and the picture of the best of them."""

import csv
import io
import math

import numpy as np

from kit.base.files import write_whole
from kit.sweeps.trials import label, new_run
from kit.watch import curves, pictures, runlogs
from kit.watch.diagnosis import History

CURVES = 12  # that one picture can show


def table(sweep, results):
    """A row a set-up, the best first: those that diverged with some seed come after all that did not."""
    rows = []
    for number in sorted({number for number, _ in results}):
        mine = [result for (n, _), result in sorted(results.items()) if n == number]
        count = {kind: sum(result['status'] == kind for result in mine)
                 for kind in ('finished', 'pruned', 'diverged', 'crashed')}
        counted = [r for r in mine if r['status'] == ('finished' if count['finished'] else 'pruned')]
        best = [result['best'] for result in counted if result['best'] is not None]
        seconds, memory = ([result[name] for result in mine if result[name] is not None] or [math.nan]
                           for name in ('seconds', 'memory_gib'))
        place = 2 if count['diverged'] else 0 if count['finished'] else 1 if count['pruned'] else 3
        rows.append({'number': number, 'point': mine[0]['point'], 'place': place, 'count': count, 'n': len(best),
                     'mean': np.mean(best or math.nan), 'seconds': np.mean(seconds), 'memory_gib': np.mean(memory),
                     'std': np.std(best, ddof=1) if len(best) > 1 else math.nan})
    sign = -1 if sweep.maximise else 1
    return sorted(rows, key=lambda row: (row['place'], math.isnan(row['mean']), sign * row['mean']))


def markdown(sweep, results):
    """The table as text: results.md, and what sweep.py prints."""
    shown = lambda value, digits: '' if math.isnan(value) else f'{value:.{digits}f}'
    figure = lambda value: '' if math.isnan(value) else curves.in_words(value)
    head = ['', 'set-up', f'{sweep.extreme} {sweep.metric}', 'std', 'n', 'pruned', 'diverged', 'crashed', 'seconds',
            'GiB']
    rows = [[str(place), label(row['point']).replace('|', r'\|'), figure(row['mean']), figure(row['std']),
             str(row['n']), *(str(row['count'][kind] or '') for kind in ('pruned', 'diverged', 'crashed')),
             shown(row['seconds'], 1), shown(row['memory_gib'], 2)]
            for place, row in enumerate(table(sweep, results), 1)]
    told = [i for i in range(len(head)) if not rows or any(row[i] for row in rows)]  # no blank columns
    head, rows = [head[i] for i in told], [[row[i] for i in told] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    line = lambda cells: '| ' + ' | '.join(cell.ljust(w) if i == 1 else cell.rjust(w)
                                           for i, (cell, w) in enumerate(zip(cells, widths))) + ' |\n'
    rule = '|' + '|'.join('-' * (w + 1) + ('-' if i == 1 else ':') for i, w in enumerate(widths)) + '|\n'
    return line(head) + rule + ''.join(map(line, rows))


def write_tables(sweep, folder, results):
    """results.csv, a row a run, and results.md, a row a set-up."""
    swept = (['variant'] if sweep.variants else []) + sweep.columns()
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(['run', 'status', *swept, 'seed', f'{sweep.extreme} {sweep.metric}', 'at step', 'last val/loss',
                   'last train/loss', 'seconds', 'peak memory (GiB)', 'parameters', 'steps', 'tokens/s', 'sample',
                   'error'])
    for (number, seed), result in sorted(results.items()):
        settings = sweep.base | result['point'] | sweep.settings(result['point'])
        rows.writerow([new_run(folder, number, result['point'], seed).folder.name, result['status'],
                       *(settings[name] for name in swept), seed,
                       *(result[name] for name in ('best', 'at_step', 'val/loss', 'train/loss', 'seconds',
                                                   'memory_gib', 'parameters', 'steps', 'tokens_per_second', 'sample',
                                                   'error'))])
    write(folder / 'results.csv', text.getvalue())
    counts = ', '.join(f'{n} {kind}' for kind in ('finished', 'pruned', 'diverged', 'crashed')
                       if (n := sum(result['status'] == kind for result in results.values())))
    steps = sum(result['steps'] for result in results.values())
    write(folder / 'results.md', f'# {folder.name}\n\n{sweep.description}\n\n'
          f'Method {sweep.method}; {counts}; {steps:,} steps in all. A figure is the {sweep.extreme} {sweep.metric} of '
          f'a run, its mean over n seeds and their standard deviation; pruned set-ups come behind those that were '
          f'finished, and those that diverged with some seed behind these.\n\n{markdown(sweep, results)}')


def write(path, text):
    write_whole(path, text.encode('utf-8', 'backslashreplace'))  # names of folders need not be UTF-8


def draw(sweep, folder, results):
    """comparison.png: the curves of the best set-ups, each the mean over its seeds."""
    lines = {}
    for row in table(sweep, results)[:CURVES]:
        runs = [new_run(folder, row['number'], row['point'], seed) for number, seed in sorted(results)
                if number == row['number']]
        histories = [History(runlogs.read_facts(run.folder)) for run in runs]
        for run, history in zip(runs, histories):
            runlogs.read_records(run.folder, history)
        histories = [history for history in histories if len(history.get('loss')[0]) or len(history.get('val/loss')[0])]
        if histories:
            name = label(row['point']) + (f' (mean of {len(histories)})' if len(histories) > 1 else '')
            lines[name] = mean_history(histories)
    if lines:
        pictures.comparison(lines, folder / 'comparison.png', metric=sweep.metric, is_max=bool(sweep.maximise))
    return len(lines)


def mean_history(histories):
    """The mean of several runs, at the steps that all of them have recorded."""
    if len(histories) == 1:
        return histories[0]
    mean = History(histories[0].facts)
    for name in histories[0].series:
        series = [dict(zip(*map(np.ndarray.tolist, history.get(name)))) for history in histories]
        for step in sorted(set.intersection(*map(set, series))):
            mean.add(step, {name: sum(values[step] for values in series) / len(series)})
    return mean
