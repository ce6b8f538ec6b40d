"""plot_loss.py: logs as they come (ours, nanoGPT's, resumed, torn, with NaN), and what is drawn of them."""

import gzip
import json
import math
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from kit.watch import curves, diagnosis, pictures, runlogs
from kit.watch.diagnosis import History

NANOGPT = """tokens per iteration will be: 16,384
number of parameters: 10.65M
step 0: train loss 4.2874, val loss 4.2823
iter 0: loss 4.2649, time 31527.02ms, mfu -100.00%
iter 10: loss 3.1, time 30.50ms, mfu 12.10%
step 20: train loss 2.5, val loss 2.6
saving checkpoint to out
step 20: train loss 2.4, val loss 2.55
iter 20: loss nan, time 30.50ms, mfu 12.10%
iter 30: loss 2.9, time 30.50ms, mfu 12.10%
iter 40: loss 2."""

OURS = """a step: 12 rows x 1 micro-steps x 64 tokens = 768 tokens
step 0: train loss 2.4411, val loss 2.4346, val accuracy 31.25%, raw val loss 2.5 (the others are of the EMA)
iter 0: loss 2.4502, time 51.30ms, mfu 4.12%, lr 1.0e-03, norm 0.84, 15.0k tok/s, eta 1m32s, epoch 0.25
iter 1: loss 2.4502, time 51.30ms, mfu 4.12%, lr 1.0e-03, norm inf, 950 tok/s, eta 1m32s, epoch 0.25
"""


def series(history):
    return {name: dict(zip(steps, values)) for name, (steps, values) in history.series.items()}


def write_run(folder, records, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    if settings:
        (folder / 'config.json').write_text(json.dumps({'settings': settings, 'launches': []}))
    return folder


def a_run(n=60, spike=None, bad=(), layers=('wte', 'h.0', 'h.1', 'ln_f'), seed=0):
    """Records as train.py writes them: each update, more of it every 10, an evaluation every 20."""
    rng = random.Random(seed)
    for step in range(n):
        loss = 2 + 2 * math.exp(-step / 10) + rng.gauss(0, 0.05) + (50 if step == spike else 0)
        if step % 20 == 0:
            yield {'step': step, 'time': step / 4, 'train/loss': loss, 'train/accuracy': 0.4,
                   'val/loss': 2 + abs(step - 20.5 + seed / 99) / 40, 'val/accuracy': 0.3}
        record = {'step': step, 'time': step / 4, 'loss': None if step in bad else loss,
                  'grad_norm': None if step in bad else rng.uniform(0.5, 1.5), 'lr': 1e-3}
        if step % 10 == 0:
            record |= {'tokens_per_second': 15e3} | {f'grad_norm/{name}': rng.uniform(0, 1) for name in layers}
        yield record


def history_of(records, **facts):
    history = History(facts)
    for record in records:
        history.add(record['step'], {name: value for name, value in record.items() if name != 'step'})
    return history


# ---------------------------------------------------------------------------------------------------------------------
# reading


def test_nanogpts_log_is_read(tmp_path):
    (tmp_path / 'log').write_text(NANOGPT)
    history = runlogs.read(tmp_path / 'log')
    figures = series(history)
    assert figures['train/loss'] == {0: 4.2874, 20: 2.4} and figures['val/loss'] == {0: 4.2823, 20: 2.55}
    assert list(figures['loss']) == [0, 10, 20, 30], 'the last line is torn: of its 2. the digits are missing'
    assert figures['loss'][10] == 3.1 and math.isnan(figures['loss'][20])
    assert list(figures['mfu']) == [10, 20, 30] and figures['mfu'][10] == pytest.approx(0.121)
    assert figures['time'][20] == pytest.approx(20 * 0.0305), 'the step that holds an evaluation does not count'
    assert history.facts == {'tokens_per_step': 16384}
    (tmp_path / 'log').write_text('step 20: train loss 2.5, val loss 2.6\nstep 40: train loss 2.4, val loss 2.')
    assert list(series(runlogs.read(tmp_path / 'log'))['val/loss']) == [20]


def test_our_log_is_read(tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/training.log').write_text(OURS)
    for path in tmp_path / 'run', tmp_path / 'run/training.log':
        history = runlogs.read(path)
        first = {name: values[0] for name, values in series(history).items()}
        assert first == pytest.approx({
            'train/loss': 2.4411, 'val/loss': 2.4346, 'val/accuracy': 0.3125, 'raw/val/loss': 2.5, 'loss': 2.4502,
            'time_ms': 51.3, 'mfu': 0.0412, 'lr': 1e-3, 'grad_norm': 0.84, 'tokens_per_second': 15e3, 'epoch': 0.25,
            'time': 0})
        assert history.get('grad_norm')[1][1] == math.inf and history.get('tokens_per_second')[1][1] == 950
        assert history.facts['tokens_per_step'] == 768


def test_records_are_read_as_brute_force_reads_them(tmp_path):
    rng = random.Random(1)
    step, lines, expected = 0, [], {}
    for _ in range(400):
        if rng.random() < 0.03:  # a resume: what was later is another branch
            step = rng.randrange(step + 1)
            for name in expected:
                expected[name] = {s: v for s, v in expected[name].items() if s < step or s == step and name != 'loss'}
        record = {'step': step, 'loss': rng.choice([rng.random(), None])}
        if rng.random() < 0.2:
            record |= {'val/loss': rng.random(), 'x': rng.randrange(9)}
        lines.append(json.dumps(record | {'words': 'passed over', 'list': [1]}))
        lines += rng.choices(['', '{"step": 3, "lo', '[1]', '7', '{"loss": 1}', '{"step": "a"}', '\x00\xff'], k=1)
        for name in record.keys() - {'step'}:
            expected.setdefault(name, {})[step] = math.nan if record[name] is None else float(record[name])
        step += 1
    (tmp_path / 'a.jsonl').write_bytes('\n'.join(lines).encode('latin-1') + b'\n{"step": 99999, "loss": 1')
    found = series(runlogs.read(tmp_path / 'a.jsonl'))
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], nan_ok=True) and list(found[name]) == sorted(found[name])


def test_an_evaluation_of_the_branch_that_died_goes(tmp_path):
    write_run(tmp_path, [{'step': 5, 'val/loss': 3.0}, {'step': 5, 'loss': 3.0}, {'step': 10, 'val/loss': 2.0},
                         {'step': 10, 'loss': 2.0}, {'step': 5, 'loss': 3.5}, {'step': 6, 'loss': 3.0}])
    assert series(runlogs.read(tmp_path)) == {'val/loss': {5: 3.0}, 'loss': {5: 3.5, 6: 3.0}}


def test_the_clock_goes_on_over_launches_that_began_it_anew(tmp_path):
    write_run(tmp_path, [{'step': s, 'time': t, 'loss': 1.0} for s, t in [(0, 1), (1, 2), (2, 3), (2, 1), (3, 4)]])
    assert series(runlogs.read(tmp_path))['time'] == {0: 1, 1: 2, 2: 3, 3: 6}


def test_an_evaluation_may_stand_before_the_updates_that_led_to_it(tmp_path):
    write_run(tmp_path, [{'step': 0, 'time': 1, 'loss': 4.0}, {'step': 2, 'time': 9, 'val/loss': 3.0},
                         {'step': 1, 'time': 2, 'loss': 4.0}, {'step': 2, 'time': 10, 'loss': 3.0}])
    figures = series(runlogs.read(tmp_path))
    assert figures['time'] == {0: 1, 1: 2, 2: 10} and figures['val/loss'] == {2: 3.0}


def test_facts_come_from_config(tmp_path):
    write_run(tmp_path, [{'step': 0, 'loss': 1}], batch_size=3, gradient_accumulation_steps=2, block_size=5)
    assert runlogs.read(tmp_path).facts['tokens_per_step'] == 30
    (tmp_path / 'config.json').write_text(json.dumps({'settings': {'seed': 1}, 'facts': {'tokens_per_step': 7}}))
    assert runlogs.read(tmp_path).facts == {'seed': 1, 'tokens_per_step': 7}
    (tmp_path / 'config.json').write_text('{"settings": [')
    assert runlogs.read(tmp_path).facts == {}


def test_a_folder_whose_records_hold_nothing_gives_its_log(tmp_path):
    write_run(tmp_path, [])
    (tmp_path / 'training.log').write_text(OURS)
    assert series(runlogs.read(tmp_path))['val/loss'] == {0: 2.4346}


def coloured(text):
    """As a terminal gets it: a title, a progress bar that is drawn over, colours around words and numbers."""
    for word, colours in ('loss ', '\x1b[1;32mloss\x1b[0m \x1b[38;5;9m'), (', ', '\x1b[m, '), ('iter', '\x1b[Kiter'):
        text = text.replace(word, colours)
    return '\x1b]0;a title\x07' + text.replace('\n', '\n 10%|\u2588   |\r 20%|\u2588\u2588  |\r')


@pytest.mark.parametrize('written', [
    lambda text: text.encode('utf-16'), lambda text: b'\xfe\xff' + text.encode('utf-16-be'),
    lambda text: text.replace('\n', '\r\n').encode('utf-16-le'), lambda text: text.encode('utf-8-sig'),
    lambda text: text[:300].encode() + text[300:].encode('utf-16-le'),  # >> of PowerShell behind another shell's
    lambda text: coloured(text).encode(), lambda text: coloured(text).encode('utf-16'),
    lambda text: text.encode() + bytes(10_000), lambda text: ('\xe9 ' + text).encode('latin-1'),
    lambda text: b'x' * 10**7 + (b'\nstep 5: train' + b': train' * 10**6) * 2 + b'\n' + text.encode(),
    lambda text: text.encode() + b'tokens per iteration will be: ' + b'9' * 5000 + b' \n'
    + b'iter ' + b'9' * 5000 + b': loss 1.0\n'])
def test_logs_as_shells_and_terminals_leave_them(tmp_path, written):
    text = NANOGPT.rpartition('\n')[0] + '\n'
    (tmp_path / 'plain').write_text(text)
    (tmp_path / 'log').write_bytes(written(text))
    found, expected = runlogs.read(tmp_path / 'log'), runlogs.read(tmp_path / 'plain')
    assert found.facts == expected.facts == {'tokens_per_step': 16384}
    assert str(series(found)) == str(series(expected)) and len(expected.series['loss'][0]) == 4
    records = ''.join(json.dumps(record) + '\n' for record in a_run())
    (tmp_path / 'plain.jsonl').write_text(records)
    (tmp_path / 'metrics.jsonl').write_bytes(written(records))
    found, expected = runlogs.read(tmp_path / 'metrics.jsonl'), runlogs.read(tmp_path / 'plain.jsonl')
    assert str(series(found)) == str(series(expected)) and len(expected.series['loss'][0]) == 60


def test_records_of_other_types_and_beyond_all_bounds(tmp_path):
    steps = [-1, 1.0, 2**53, 10**400, None, True, '3', [4]]
    many = '9' * 400
    lines = [json.dumps({'step': step, 'loss': 1.0}) for step in steps]
    lines += ['[' * 10**5, '{"step": 1, "loss": ' + '9' * 5000 + '}', '{"step": 8, "time": null, "loss": 2}']
    lines.insert(-1, '{"step": 7, "time": 1e300, "loss": 1e308, "a": -1e400, "b": NaN, "c": ' + many + ', "d": true, '
                 '"e": {"f": 1}, "g": null, "h": 1e-320, "i": -' + many + '}')
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines) + '\n')
    history = runlogs.read(tmp_path / 'a.jsonl')
    found = {name: history.get(name)[1].tolist() for name in history.series}
    assert str(found) == str({'loss': [math.inf, 2.0], 'a': [-math.inf], 'b': [math.nan], 'c': [math.inf],
                              'g': [math.nan], 'h': [0.0], 'i': [-math.inf]})
    assert history.get('loss')[0].tolist() == [7, 8]


@pytest.mark.parametrize('config, damage', [
    ([], 'list'), (5, 'int'), ('"x"', 'str'), (None, 'NoneType'), ('{', 'JSON'), ('[' * 10**5, 'RecursionError'),
    ({'settings': 5, 'launches': [5, None]}, '(settings, launches)'),
    ({'facts': [1], 'launches': {}}, '(facts, launches)'),
    ({'settings': {'n_layer': [1], 'dropout': 'x', 'grad_clip': True, 'warmup_iters': -5, 'out_dir': {},
                   'batch_size': 2, 'block_size': '3', 'learning_rate': math.inf, 'n_embd': 10**400},
      'facts': {'vocab_size': 0, 'tokens_per_step': math.nan, 'other_text_since': 'a'}}, '')])
def test_a_config_of_other_types_is_no_hindrance(tmp_path, capsys, config, damage):
    write_run(tmp_path, a_run(n=300, spike=200))
    (tmp_path / 'config.json').write_text(config if isinstance(config, str) else json.dumps(config))
    for _ in range(2):
        history = runlogs.read(tmp_path)
    assert not history.facts.keys() & set(runlogs.NUMBERS) and len(history.get('loss')[0]) == 300
    assert any(line.startswith('loss spike') for line in diagnosis.verdict(history))
    found = runlogs.read_config(tmp_path)
    assert type(found['settings']) is type(found['facts']) is dict and found['launches'] == []
    told = capsys.readouterr().out
    assert told.count('config.json is damaged') == told.count('\n') == (damage != '') and damage in told


# ---------------------------------------------------------------------------------------------------------------------
# drawing


@pytest.fixture
def figures(monkeypatch):
    """The pictures come back as matplotlib's figures, drawn, not as arrays."""
    finish = pictures.finish
    monkeypatch.setattr(pictures, 'finish', lambda fig, path, show=False: (finish(fig, path, show), fig)[1])


def line(ax, label):
    return next(line for line in ax.lines if str(line.get_label()).startswith(label))


def test_the_panels_of_a_run(figures):
    history = history_of(a_run(spike=33, bad=(40, 41)), grad_clip=1.25)
    loss, accuracy, rate, norm, speed = pictures.loss_curve(history, 'a').axes
    assert list(line(loss, 'val').get_ydata()) == list(history.get('val/loss')[1])
    assert list(line(loss, 'train').get_xdata()) == [0, 20, 40]
    assert line(loss, 'not finite: 2').get_xdata() == pytest.approx([40, 41], abs=0.1)
    assert line(loss, 'cut: up to 52').get_xdata() == pytest.approx([33], abs=0.5)
    assert loss.get_ylim()[1] < 6, 'the spike does not squash the rest'
    assert loss.texts[0].get_text() == f'best val {history.get("val/loss")[1].min():.4f} at step 20'
    assert norm.get_yscale() == 'log' and 1.25 in [y for line in norm.lines for y in line.get_ydata()]
    norms = [record['grad_norm'] for record in a_run(spike=33, bad=(40, 41)) if record.get('grad_norm')]
    assert f'{np.mean(np.array(norms) > 1.25):.1%}' in norm.get_title('right')
    assert list(rate.lines[0].get_ydata()) == [1e-3] * 60 and len(speed.lines) == 1 and len(accuracy.lines) == 2


@pytest.mark.parametrize('records, panels', [
    ([{'step': 0, 'loss': 3.0}], ['loss']), ([{'step': 4, 'val/loss': None}], ['loss']),
    ([{'step': s, 'loss': None, 'grad_norm': 0.0} for s in range(9)], ['loss', 'gradient']),
    ([{'step': s, 'loss': 1.0, 'lr': 0.0, 'tokens_per_second': 0.0} for s in range(99)],
     ['loss', 'learning', 'tokens/s']),
    ([{'step': s, 'loss': 10.0**s, 'grad_norm': 10.0**(4 * s)} for s in range(50)], ['loss', 'gradient']),
    ([{'step': s, 'val/loss': 3.0, 'val/accuracy': 0.5} for s in range(3)], ['loss', 'accuracy'])])
@pytest.mark.filterwarnings('error')
def test_only_panels_with_something_in_them(figures, records, panels):
    history = history_of(records, grad_clip=1.0)
    for fig in pictures.loss_curve(history, '_$x$'), pictures.comparison({'_$x$': history, 'b' * 99: history}):
        assert [ax.get_ylabel().split()[0] for ax in fig.axes] == panels


@pytest.mark.filterwarnings('error')
def test_twenty_runs_are_told_apart(figures):
    runs = {f'run{i}': history_of(a_run(seed=i), grad_clip=1.0) for i in range(20)}
    fig = pictures.comparison(runs)
    legend = fig.legends[0]
    assert len({(line.get_color(), line.get_marker()) for line in legend.legend_handles}) == 20
    assert legend.get_texts()[7].get_text() == f'run7: val {runs["run7"].get("val/loss")[1].min():.4f} at step 20'
    width, height = fig.canvas.get_width_height()
    box = legend.get_window_extent()
    assert fig.axes[0].bbox.height > 450, 'however long the legend'
    assert 0 <= box.x0 and box.x1 <= width and box.y1 < fig.axes[-1].get_tightbbox().y0, 'the legend stands free'


def test_a_bad_run_does_not_squash_the_others(figures):
    good = {f'run{i}': history_of(a_run(seed=i)) for i in range(3)}
    bad = history_of([{'step': s, 'loss': 900.0} for s in range(60)])
    loss = pictures.comparison(good | {'bad': bad}).axes[0]
    assert loss.get_ylim()[1] < 6 and 'triangles' in loss.get_title('left')
    assert line(loss, 'cut: up to 900').get_color() == pictures.COLORS[3]
    assert pictures.comparison({'good': good['run0'], 'bad': bad}).axes[0].get_ylim()[1] < 6


@pytest.mark.parametrize('x, last, label', [('steps', 59, 'steps'), ('tokens', 5900, 'tokens'),
                                            ('time', 14.75, 'time (seconds)')])
def test_what_the_curves_run_over(figures, x, last, label):
    ax = pictures.loss_curve(history_of(a_run(), tokens_per_step=100), 'a', x=x).axes
    assert ax[-1].get_xlabel() == label and line(ax[0], 'single').get_xdata()[-1] == last


def test_a_picture_comes_as_an_array_or_a_file(tmp_path):
    history = history_of(a_run())
    image = pictures.loss_curve(history, 'a')
    assert image.dtype == np.uint8 and image.shape[1:] == (1200, 3) and image.std() > 10
    assert pictures.loss_curve(history, 'a', tmp_path / 'a.png') is None
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_the_median_and_the_thinning():
    rng = np.random.default_rng(0)
    steps, values = np.arange(100_007), rng.normal(size=100_007)
    values[[77, 50_000]] = math.nan, 99
    at, thin = curves.thinned(steps, values)
    assert len(at) < 20_000 and (np.diff(at) > 0).all() and (values[at] == thin).all()
    assert {np.nanargmin(values), 50_000} <= set(at)
    steps, values = steps[:400], values[:400]
    good = np.delete(values, 77)
    at, middle = curves.smoothed(steps, values)
    assert list(at) == list(np.delete(steps, 77)), 'there is a place for all'
    for i in 0, 3, 12, 200, 398:
        reach = min(12, i)
        assert middle[i] == np.median(good[i - reach:i + reach + 1])
    assert list(curves.smoothed(steps[:20], values[:20])[1]) == list(values[:20]), 'too few to smooth'


def test_layers(figures):
    names = ['wte', 'blocks.0', 'blocks.2', 'blocks.10', '$head$']
    records = [{'step': step} | {f'grad_norm/{name}': 1.0 + i + step for i, name in enumerate(names)}
               for step in range(0, 90, 10)]
    records[4]['grad_norm/blocks.2'], records[5]['grad_norm/blocks.0'] = 0.0, None
    history = history_of(records)
    rows, steps, norms = curves.layer_table(history)
    assert rows == names and list(steps) == list(range(0, 90, 10)), 'in the order of the log, which is the model\'s'
    assert list(norms[0]) == [1.0 + s for s in steps] and norms[2, 4] == 0 and math.isnan(norms[1, 5])
    fig = pictures.layers({'a': history, 'b': history})
    assert [ax.get_title('left') for ax in fig.axes[:2]] == ['a', 'b'] and fig.axes[2].get_ylabel() == 'gradient norm'
    cells = fig.axes[0].collections[0].get_facecolor().reshape(5, 9, 4)
    assert list(cells[2, 4, :3]) == [0, 0, 0] and cells[1, 5, 0] > 0.7 and cells[1, 5, 1] == 0
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ['zero: no gradient arrives', 'not finite']
    long = history_of({'step': s, 'grad_norm/wte': 100.0 if s == 1234 else 1.0} for s in range(5000))
    assert curves.layer_table(long)[2].shape[1] <= 1200 and curves.layer_table(long)[2].max() == 100


def test_a_column_of_layers_is_as_wide_as_its_step_took(figures):
    """The first one reaches no further than the others where the run was starting up behind it."""
    records = [{'step': step, 'time': 0.5 + step + 20 * (step > 0), 'loss': 3.0, 'grad_norm/wte': 1.0 + step}
               for step in range(5)]
    mesh = pictures.layers({'a': history_of(records)}, x='time').axes[0].collections[0]
    assert list(mesh.get_coordinates()[0, :, 0]) == [0.5, 1.5, 21.5, 22.5, 23.5, 24.5, 25.5]
    cells = mesh.get_facecolor().reshape(6, 4)
    assert list(cells[1]) == [1, 1, 1, 1] and len({tuple(cell) for cell in cells}) == 6, 'white in between'
    for n in 1, 2:
        fig = pictures.layers({'a': history_of(records[:n])}, x='time')
        assert len(fig.axes[0].collections[0].get_facecolor()) == n


# ---------------------------------------------------------------------------------------------------------------------
# figures of a researcher's own


def with_own(seed=0, **own):
    """Records of a run with figures of its own, each a function of the step; those of train/ and val/ are evaluated."""
    own = {name.replace('__', '/'): f for name, f in own.items()}
    for record in a_run(seed=seed):
        is_evaluation = 'val/loss' in record
        yield record | {name: f(record['step']) for name, f in own.items()
                        if name.startswith(('train/', 'val/')) == is_evaluation}


def titles(fig):
    return [ax.get_title('left') for ax in fig.axes]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def stand_free(fig):
    """Whether no title, legend or axis lies on another."""
    boxes = [box for ax in fig.axes for box in [ax.get_window_extent(), ax.title.get_window_extent(),
             ax._left_title.get_window_extent(), *([ax.get_legend().get_window_extent()] if ax.get_legend() else [])]
             if box.width > 1]
    width, height = fig.canvas.get_width_height()
    return all(0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height for box in boxes) and not any(
        a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1
        for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.filterwarnings('error')
def test_figures_of_ones_own_have_panels(figures):
    """One alone, those that share a prefix together, an evaluation's train and val together, behind the known ones."""
    first = history_of(with_own(z_loss=lambda s: s / 60, attention__entropy=lambda s: 2.0, attention__max=lambda s: s,
                                train__f1=lambda s: s / 99, val__f1=lambda s: s / 100))
    fig = pictures.loss_curve(first, 'a')
    assert titles(fig)[5:] == ['f1', 'z_loss', 'attention'] and stand_free(fig)
    f1, z_loss, attention = fig.axes[5:]
    assert legend(f1) == ['train', 'val'] and list(f1.lines[1].get_ydata()) == [0, 0.2, 0.4]
    assert list(z_loss.lines[0].get_ydata()) == [s / 60 for s in range(60)] and z_loss.get_legend() is None
    assert legend(attention) == ['entropy', 'max'] and fig.axes[-1].get_xlabel() == 'steps'
    assert set(attention.lines[0].get_ydata()) == {2.0}
    second = history_of(with_own(1, z_loss=lambda s: 1.0))
    fig = pictures.comparison({'a': first, 'b': second})
    assert titles(fig)[5:] == ['f1', 'z_loss', 'attention'] and stand_free(fig)
    f1, z_loss, attention = fig.axes[5:]
    assert [line.get_color() for line in z_loss.lines] == pictures.COLORS[:2]
    assert [line.get_color() for line in attention.lines] == pictures.COLORS[:1] * 2, 'the other run has none of it'
    assert len({line.get_linestyle() for line in attention.lines}) == 2 and legend(attention) == ['entropy', 'max']


def test_known_figures_have_no_panel_of_their_own():
    from kit.watch.journal import PREFIXES, TAGS
    names = [*TAGS, 'time', *(f'{prefix}some.0' for prefix in PREFIXES)]
    assert curves.own_panels([history_of([{'step': 3} | dict.fromkeys(names, 1.0)])]) == ({}, [])


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name, f, label', [
    ('$x_$y', lambda s: s, '$x_$y'), ('_hidden', lambda s: s, '_hidden'), ('long_' * 50, lambda s: s, '...'),
    ('constant', lambda s: -7.25, 'constant'), ('nothing', lambda s: 0.0, 'nothing'), ('once', lambda s: 1.0, 'once'),
    ('holes', lambda s: math.nan if s % 7 < 3 else s, 'holes'), ('endless', lambda s: math.inf if s else 1, 'endless'),
    ('steep', lambda s: 10.0**-s, 'steep'), ('close', lambda s: 1e6 + s / 1e4, 'close'), ('a/', lambda s: s, 'a/'),
    ('/', lambda s: s, '/'), ('val/', lambda s: s, 'val/'), ('two\nlines', lambda s: s, 'two lines'),
    ('$\\frac{1}{$', lambda s: s, '$\\frac{1}{$'), ('a\x1b[1m\ud800\0', lambda s: s, 'a?[1m??'),
    ('\xfc\xdf%s{}', lambda s: s, '\xfc\xdf%s{}'),
    ('huge', lambda s: 1e308 if s else 1, 'huge'), ('high', lambda s: 1e99 + s * 1e97, 'high'),
    ('low', lambda s: s * 1e-320, 'low'), ('low', lambda s: -1e99 * s, 'low')])
def test_any_figure_is_drawn(figures, name, f, label):
    records = [{'step': s, 'loss': 3.0, name: f(s)} for s in range(60) if name != 'once' or s == 7]
    other = [{'step': s, 'loss': 3.0, 'group/' + name: f(s), 'group/b': 1.0} for s in range(60)]
    a, b = history_of(records), history_of(other)
    for fig in pictures.loss_curve(a, 'a'), pictures.comparison({'a': a, 'b': b}):
        assert stand_free(fig) and titles(fig)[1].startswith(label)
        ticks = [text.get_text() for text in fig.axes[1].get_yticklabels()]
        assert len(set(ticks)) == len(ticks), ticks


@pytest.mark.filterwarnings('error')
def test_a_panel_of_six_with_long_names(figures):
    own = {f'a_group_with_a_name_that_goes_on_and_on/so_does_that_of_figure_{i}': i for i in range(6)}
    own |= {f'b/figure_{i}_of_the_other_group_of_figures': i for i in range(3)}
    history = history_of({'step': s, 'loss': 3.0} | own for s in range(9))
    for fig in pictures.loss_curve(history, 'a'), pictures.comparison({'a': history, 'b': history}):
        assert titles(fig)[1:] == ['...me_that_goes_on_and_on', 'b'] and stand_free(fig)
        last = legend(fig.axes[1])[5]
        assert last.startswith('...') and last.endswith('_of_figure_5') and fig.axes[1].bbox.height > 120


def test_of_many_figures_some_are_left_out(run, figures, tmp_path):
    names = [*(f'own{i}' for i in range(9)), *(f'own0/{i}' for i in range(7))]
    write_run(tmp_path / 'a', [{'step': s, 'loss': 3.0} | dict.fromkeys(names, float(s)) for s in range(30)])
    history = runlogs.read(tmp_path / 'a')
    fig = pictures.loss_curve(history, 'a')
    assert titles(fig)[1:] == [f'own{i}' for i in range(8)] and stand_free(fig)
    assert legend(fig.axes[1]) == ['own0', '0', '1', '2', '3', '4']
    result = run('plot_loss.py', 'a')
    assert result.status == 0 and 'not drawn: own8, own0/5, own0/6; of other figures 8 panels' in result.out
    fig = pictures.comparison({'a': history, 'b': history}, metric='own0/6', is_max=True)
    assert legend(fig.axes[1])[0] == '6' and 'star: highest own0/6' in fig.axes[0].get_title('left')
    assert [star.get_ydata()[0] for star in fig.axes[1].lines if star.get_marker() == '*'] == [29.0] * 2
    assert fig.legends[0].get_texts()[0].get_text() == 'a: own0/6 29.0000 at step 29'


def test_attention(figures):
    maps = np.tril(np.ones((9, 2, 70, 70))) / np.arange(1, 71)[:, None]
    fig = pictures.attention(maps, ['$a\n'] * 70)
    assert len(fig.axes) == 8 * 2 + 1
    assert fig.get_suptitle() == 'the first 8 of 9 layers, the first 64 of 70 positions'
    assert fig.axes[0].images[0].get_array().shape == (64, 64)
    assert len(pictures.attention(maps[:1, :1, :5, :5], list('abcde')).axes) == 2


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('loss', [
    lambda s: 1e308 if s else 2.0, lambda s: -1e308, lambda s: 1e-320, lambda s: 1e30, lambda s: math.nan,
    lambda s: 10.0**s, lambda s: (-1e99, 1e99)[s % 2], lambda s: 2.0 if s < 9 else math.inf, lambda s: 0.0])
@pytest.mark.parametrize('n', [1, 2, 60])
def test_any_losses_are_drawn_and_judged(figures, loss, n):
    names = ('loss', 'val/loss', 'grad_norm', 'lr', 'mfu', 'tokens_per_second', 'bad_steps', 'grad_norm/h.0',
             'update_ratio/h.0', 'data_ms', 'time_ms')
    records = [{'step': s, 'time': s} | {name: loss(s) for name in names} for s in range(n)]
    one, other = history_of(records, vocab_size=65, grad_clip=1.0), history_of(a_run())
    assert len(diagnosis.verdict(one)) >= 2
    for fig in pictures.loss_curve(one, 'a'), pictures.comparison({'a': one, 'b': other}), pictures.layers({'a': one}):
        for ax in fig.axes:
            labels = [label.get_text() for label in ax.get_yticklabels()]
            assert ax.yaxis.get_offset_text().get_text() == '' and len(set(labels)) == len(labels), labels


def other_text(since, n=600, every=50):
    """Records of a run that went on with a harder text at a step, where the evaluation is still one on the old."""
    for s in range(n):
        old, new = 1.2 + 2 * math.exp(-s / 60), 1.8 + 1.2 * math.exp(-max(0, s - since) / 60)
        if s % every == 0:
            loss = old if s <= since else new
            yield {'step': s, 'time': s / 4, 'train/loss': loss, 'val/loss': loss + 0.05}
        loss = (old if s < since else new) + 0.03 * math.sin(s)
        yield {'step': s, 'time': s / 4, 'loss': loss, 'grad_norm': 0.9, 'lr': 1e-3}


def test_a_text_that_was_changed_begins_anew(figures, tmp_path):
    write_run(tmp_path, other_text(300))
    before = diagnosis.verdict(runlogs.read(tmp_path))
    assert 'at step 300' in before[0] and any(line.startswith('loss spike') for line in before)
    (tmp_path / 'config.json').write_text(json.dumps({'facts': {'other_text_since': 300}}))
    history = runlogs.read(tmp_path)
    words = diagnosis.verdict(history)
    assert words[0] == 'other text since step 300: what follows is about that alone'
    assert words[1].startswith('best val loss 1.8686 at step 550') and words[-1] == 'nothing to complain about', words
    assert curves.best(history) == (550, pytest.approx(1.8686, abs=1e-4)) and len(history.get('val/loss')[0]) == 12
    fig = pictures.loss_curve(history, 'a')
    told = [text.get_text() for text in fig.axes[0].texts]
    assert told == ['best val 1.8686 at step 550', 'other text since step 300'] and stand_free(fig)
    for ax in fig.axes:
        assert any(line.get_linestyle() == ':' and line.get_xdata()[0] == 300 for line in ax.lines)
    fig = pictures.comparison({'a': history, 'b': history_of(a_run())})
    entries = [text.get_text() for text in fig.legends[0].get_texts()]
    assert entries[0] == 'a: val 1.8686 at step 550, other text since step 300' and 'other text' not in entries[1]


@pytest.mark.parametrize('since, n', [(300, 301), (10**15, 60), (59, 60)])
def test_a_text_of_which_nothing_is_known_yet(since, n):
    history = history_of(other_text(since, n), other_text_since=since)
    words = diagnosis.verdict(history)
    assert words[0].startswith(f'other text since step {since}') and 'best val' not in ' '.join(words)
    assert pictures.loss_curve(history, 'a').ndim == 3 and math.isnan(curves.best(history)[1])


# ---------------------------------------------------------------------------------------------------------------------
# the script


@pytest.mark.parametrize('changed', ['name', 'content'])
def test_a_run_that_goes_on_with_another_text(train, run, tiny, changed):
    """The best of the old text is no mark any more, for the run, its verdict and plot_loss.py."""
    (tiny / 'other.txt').write_text(''.join(random.Random(1).choices((tiny / 'text.txt').read_text(), k=20_000)))
    assert train().status == 0
    assert run('prepare.py', '--input=other.txt', '--dataset=other').status == 0  # of the same characters
    if changed == 'content':
        shutil.rmtree(tiny / 'data/tiny')
        (tiny / 'data/other').rename(tiny / 'data/tiny')
    name = {'name': 'other', 'content': 'tiny'}[changed]
    went_on = train('--init_from=resume', f'--dataset={name}', '--max_iters=20')
    assert went_on.status == 0, went_on.err
    again = train('--init_from=resume', f'--dataset={name}', '--max_iters=25')  # nothing new, and yet not forgotten
    drawn = run('plot_loss.py')
    for result in went_on, again, drawn:
        assert 'other text since step 10: ' in result.out, result.out + result.err
        best, = [line for line in result.out.splitlines() if 'best val loss' in line and ' at step ' in line]
        assert int(best.split(' at step ')[1].split()[0]) > 10


@pytest.mark.skipif(not hasattr(os, 'symlink'), reason='no links here')
def test_no_picture_is_written_through_a_link(run, tmp_path):
    (tmp_path / 'mine').write_text('precious')
    for name in 'a', 'b':
        write_run(tmp_path / name, a_run())
        for link in 'loss_curve.png', 'layers.png':
            (tmp_path / name / link).symlink_to(tmp_path / 'mine')
    (tmp_path / 'comparison.png').symlink_to('mine')
    for args in ['a', '--layers'], ['a', 'b'], ["--schedule=--max_iters=9"]:
        result = run('plot_loss.py', *args)
        assert result.status == 0 and result.err == '', result.err
    assert (tmp_path / 'mine').read_text() == 'precious'
    for picture in 'a/loss_curve.png', 'a/layers.png', 'comparison.png', 'schedule.png':
        assert not (tmp_path / picture).is_symlink() and (tmp_path / picture).read_bytes()[:4] == b'\x89PNG'
    assert not list(tmp_path.rglob('*.part'))


def test_pictures(train, run, tiny):
    train('--out_dir=a')
    train()
    (tiny / 'b.log').write_text(NANOGPT)
    for args, picture in [([], 'checkpoints/loss_curve.png'), (['a', 'b.log'], 'comparison.png'),
                          (['a/', '--x=time'], 'a/loss_curve.png'), (['b.log'], 'loss_curve.png'),
                          (['a/training.log', '--x=tokens'], 'a/loss_curve.png')]:
        result = run('plot_loss.py', *args)
        assert result.status == 0, result.err
        assert f'wrote {picture}\n' in result.out
        assert [path.relative_to(tiny).as_posix() for path in tiny.rglob('*.png')] == [picture]
        assert (tiny / picture).read_bytes().startswith(b'\x89PNG') and (tiny / picture).stat().st_size > 10_000
        for path in [arg for arg in args if not arg.startswith('--')] or ['checkpoints']:
            name = path.strip('/').removesuffix('.log').removeprefix('a/')
            words = diagnosis.verdict(runlogs.read(tiny / path))
            assert '\n'.join(['', name, *(f'  {word}' for word in words), '']) in result.out
        (tiny / picture).unlink()


def test_layers_of_runs(run, tmp_path):
    for name in 'a', 'b':
        write_run(tmp_path / name, a_run())
    assert 'wrote a/layers.png' in run('plot_loss.py', 'a', '--layers').out and (tmp_path / 'a/layers.png').exists()
    assert 'wrote layers.png' in run('plot_loss.py', 'a', 'b', '--layers').out and (tmp_path / 'layers.png').exists()
    assert 'wrote loss_curve.png' in run('plot_loss.py', cwd=tmp_path / 'a').out, 'the folder we are in may be the run'


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere there is always a screen')
@pytest.mark.parametrize('backend', [None, 'TkAgg', 'webagg'])
def test_where_no_screen_is_the_file_is_written(run, tmp_path, monkeypatch, backend):
    write_run(tmp_path / 'a', a_run())
    for name in 'DISPLAY', 'WAYLAND_DISPLAY', 'MPLBACKEND':
        monkeypatch.delenv(name, raising=False)
    result = run('plot_loss.py', 'a', '--show', env={'MPLBACKEND': backend} if backend else {})
    assert result.status == 0 and result.err == '' and 'no window' in result.out
    assert (tmp_path / 'a/loss_curve.png').exists()


@pytest.mark.parametrize('args, words', [
    ([], 'no folder here holds a run'), (['nowhere'], 'nowhere'), (['nothing'], 'nothing is no folder of a run'),
    (['empty'], 'empty/training.log is empty'), (['empty.log'], 'is empty'), (['noise'], 'noise has no line of a run'),
    (['noise.jsonl'], 'no record of a run'), (['words.log'], 'no line of a run'), (['run', 'noise'], 'noise'),
    (['plain.log', '--x=tokens'], 'x = tokens'), (['still.jsonl', '--x=time'], 'x = time'), (['--x=day', 'run'], 'x'),
    (['plain.log', '--layers'], 'by layer'), (['run', '--show=maybe'], 'show'), (['full'], 'full/loss_curve.png'),
    (['log.gz'], 'unpack it first'), (['x' * 300], 'File name too long'), (['x' * 300, 'run'], 'File name too long'),
    (['run/metrics.jsonl/x'], 'Not a directory'), (['--schedule=--max_iters=99999999999'], 'no more than 10,000,000'),
    (['--schedule=--learning_rate=1e308'], 'beyond all that can be drawn'), (['--schedule="'], 'No closing quotation')])
def test_bad_input_is_one_line(run, tmp_path, args, words):
    cwd = tmp_path / ('elsewhere' if not args else '.')
    for name in 'nothing', 'empty', 'full/loss_curve.png', 'elsewhere/nothing':
        (tmp_path / name).mkdir(parents=True)
    write_run(tmp_path / 'run', a_run())
    write_run(tmp_path / 'full', a_run())
    noise = random.Random(0).randbytes(200_000)
    (tmp_path / 'log.gz').write_bytes(gzip.compress(NANOGPT.encode()))
    for name, data in {'empty/training.log': b'', 'empty.log': b'', 'noise': noise, 'noise.jsonl': noise,
                       'words.log': b'To be, or not to be\n', 'still.jsonl': b'{"step": 1, "loss": 2}\n',
                       'plain.log': b'iter 1: loss 2.0, time 3.00ms, mfu 1.00%\n'}.items():
        (tmp_path / name).write_bytes(data)
    before = sorted(tmp_path.rglob('*'))
    result = run('plot_loss.py', *args, cwd=cwd)
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    assert result.err.startswith('plot_loss.py: ') and words in result.err
    assert sorted(tmp_path.rglob('*')) == before


def test_a_reader_that_has_read_enough(trained, tiny):
    """python plot_loss.py | head -1: no traceback, whoever is faster."""
    for _ in range(2):
        done = subprocess.run(f'{sys.executable} {ROOT / "plot_loss.py"} | head -1', shell=True, cwd=tiny,
                              capture_output=True, text=True)
        assert done.stdout == 'wrote checkpoints/loss_curve.png\n' and done.stderr == ''
