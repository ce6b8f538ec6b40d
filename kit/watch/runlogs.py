"""Reads the figures of a run back: from metrics.jsonl, from training.log, or from the console output of nanoGPT."""

import json
import math
import re
from contextlib import suppress
from pathlib import Path

import numpy as np

from kit.base.errors import fail
from kit.watch.diagnosis import History

NUMBER = r'([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf))'
LINE = re.compile(r'(step|iter) (\d+): ')
# what a line may say behind that: its name here, how it is written, and what one unit of it is. A number counts only
# if something stands behind it, be it the end of the line: the last one of a torn line has lost digits
ON_A_STEP_LINE = [(name, re.compile(pattern), unit) for name, pattern, unit in [
    ('train/loss', rf'train loss {NUMBER}[,\s]', 1), ('val/loss', rf': train.*?, val loss {NUMBER}[,\s]', 1),
    ('val/accuracy', rf'val accuracy {NUMBER}%', 0.01), ('raw/val/loss', rf'raw val loss {NUMBER}[,\s(]', 1)]]
ON_AN_ITER_LINE = [(name, re.compile(pattern), unit) for name, pattern, unit in [
    ('loss', rf': loss {NUMBER}[,\s]', 1), ('time_ms', rf', time {NUMBER}ms', 1),
    ('mfu', rf', mfu {NUMBER}%', 0.01), ('lr', rf', lr {NUMBER}[,\s]', 1), ('grad_norm', rf', norm {NUMBER}[,\s]', 1),
    ('tokens_per_second', rf', {NUMBER} tok/s', 1), ('tokens_per_second', rf', {NUMBER}k tok/s', 1e3),
    ('tokens_per_second', rf', {NUMBER}M tok/s', 1e6), ('epoch', rf', epoch {NUMBER}[,\s]', 1)]]
TOKENS_PER_STEP = re.compile(r'(?:tokens per iteration will be:|micro-steps x [\d,]+ tokens =) (\d[\d,]*)\s')


def read(path):
    """
    The History of a run. path: its folder, or a log: training.log, nanoGPT's console output, or some *.jsonl.

    `time` in it is in seconds since the run began. A log has no clock: there it is the steps' own time, estimated.
    Lines that say nothing of a run are passed over, torn ones too; where all are, the script ends with one line.
    """
    path = Path(path)
    history = History()
    if not path.is_dir():
        logs = [path]
    else:
        logs = [path / name for name in ('metrics.jsonl', 'training.log') if (path / name).is_file()]
        history.facts = read_facts(path)
        if not logs:
            fail(f'{path} is no folder of a run: it holds neither metrics.jsonl nor training.log')
    for log in logs:
        try:
            if log.exists() and not log.is_file():
                fail(f'{log} is neither the folder of a run nor a log')
            with open(log, encoding='utf-8', errors='replace') as lines:
                (read_metrics if log.suffix == '.jsonl' else read_console)(lines, history)
        except OSError as error:
            fail(f'{log} cannot be read: {error.strerror}')
        if history.series.keys() & {'loss', 'train/loss', 'val/loss'}:
            return history
    if not any(log.stat().st_size for log in logs):
        fail(f'{logs[-1]} is empty, there is no line of a run in it')
    what = 'record of a run ({"step": N, "loss": ...})' if logs[-1].suffix == '.jsonl' else (
        'line of a run (step N: train loss ..., or iter N: loss ...)')
    fail(f'{logs[-1]} has no {what}')


def read_config(folder):
    """config.json of a run: {'settings': {...}, 'facts': {...}, 'launches': [...]}, empty where it cannot be read."""
    try:
        found = json.loads((Path(folder) / 'config.json').read_text(encoding='utf-8', errors='replace'))
        return {name: kind(found.get(name) or ()) for name, kind in (('settings', dict), ('facts', dict),
                                                                     ('launches', list))}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {'settings': {}, 'facts': {}, 'launches': []}


def read_facts(folder):
    """What is known of a run: its settings, and what came of them."""
    config = read_config(folder)
    numbers = 'tokens_per_step', 'vocab_size', 'unigram_entropy', 'grad_clip', 'warmup_iters', 'learning_rate'
    facts = {name: value for name, value in (config['settings'] | config['facts']).items()
             if name not in numbers or type(value) in (int, float)}
    sizes = [facts.get(name) for name in ('batch_size', 'gradient_accumulation_steps', 'block_size')]
    if all(type(size) is int for size in sizes):
        facts.setdefault('tokens_per_step', math.prod(sizes))
    return facts


def read_records(folder, history):
    """Add the records of a run in a folder to a history; nothing where there are none."""
    with suppress(OSError), open(Path(folder) / 'metrics.jsonl', encoding='utf-8', errors='replace') as lines:
        read_metrics(lines, history)


def read_metrics(lines, history):
    """Add the records of metrics.jsonl to a history."""
    earlier = 0.0  # seconds of the launches before this one, in files whose clock begins anew with each
    for line in lines:
        try:
            record = json.loads(line)
            step = record.pop('step')
            figures = {name: value if value is None else float(value) for name, value in record.items()
                       if value is None or type(value) in (float, int)}
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError):
            continue  # torn, or none of ours
        if type(step) is not int or not 0 <= step < 2**63 or not figures.keys() - {'time'}:
            continue
        forget_dead_branch(step, figures, history)
        if figures.get('time') is not None:
            steps, times = history.series.get('time', ((), ()))
            if times and steps[-1] <= step and figures['time'] + earlier < times[-1]:
                earlier = times[-1] - figures['time']
            figures['time'] += earlier
        history.add(step, figures)


def read_console(lines, history):
    """Add the lines of a log to a history."""
    for line in lines:
        if match := TOKENS_PER_STEP.search(line):
            history.facts.setdefault('tokens_per_step', int(match[1].replace(',', '')))
        if not (match := LINE.search(line)) or len(match[2]) > 18:
            continue
        figures = {}
        for name, pattern, unit in ON_A_STEP_LINE if match[1] == 'step' else ON_AN_ITER_LINE:
            if found := pattern.search(line, match.end() - 2):
                figures[name] = float(found[1]) * unit
        if figures.get('mfu', 0) < 0:  # nanoGPT's -100% stands for not known yet
            del figures['mfu']
        if figures:
            forget_dead_branch(int(match[2]), figures, history)
            history.add(int(match[2]), figures)
    milliseconds = history.get('time_ms')[1]
    if len(milliseconds):
        seconds = np.median(milliseconds) / 1000  # the middle one, since nanoGPT counts an evaluation into its step
        for step in sorted({step for steps, _ in history.series.values() for step in steps}):
            history.add(step, {'time': step * seconds})


def forget_dead_branch(step, figures, history):
    """
    After a resume the figures that come again replace those from before it (History.add sees to that); here go the
    others of later steps, such as an evaluation that the new branch has not reached. The one of this step holds.
    """
    losses = history.series.get('loss')
    if 'loss' in figures and losses and losses[0][-1] > step:
        history.cut(step)
