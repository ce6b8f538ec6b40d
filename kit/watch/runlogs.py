"""Reads the figures of a run back: from metrics.jsonl, from training.log, or from the console output of nanoGPT."""

import json
import math
import os
import re
from contextlib import suppress
from pathlib import Path

import numpy as np

from kit.base.errors import fail, reason
from kit.watch.diagnosis import BEYOND, History

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
TOKENS_PER_STEP = re.compile(r'(?:tokens per iteration will be:|micro-steps x [\d,]+ tokens =) (\d[\d,]{0,15})\s')
OTHER_TEXT = re.compile(r'^dataset: .* is another text than that of the steps up to (\d[\d,]{0,15});')
LONGEST = 1000  # characters of a line that are looked at from there on
MOST_STEPS = 2**53  # beyond it they cannot be told apart in a float, nor in a picture
MOST_SECONDS = 1e12
# what a terminal does not show: colours, moves of the cursor, titles and links
ESCAPES = re.compile(r'\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?)')
# the facts that are counted with
NUMBERS = ('tokens_per_step', 'vocab_size', 'unigram_entropy', 'other_text_since', 'grad_clip', 'grad_clip_quantile',
           'warmup_iters', 'learning_rate', 'dropout', 'n_layer', 'n_embd')

told = set()  # files that could not be read


def read(path):
    """
    The History of a run. path: its folder, or a log: training.log, nanoGPT's console output, or some *.jsonl.

    `time` in it is in seconds since the run began. A log has no clock: there it is the steps' own time, estimated.
    Lines that say nothing of a run are passed over, torn ones too; where all are, the script ends with one line.
    """
    path = Path(path)
    history = History()
    if not os.path.isdir(path):
        logs = [path]
    else:
        logs = [path / name for name in ('metrics.jsonl', 'training.log') if (path / name).is_file()]
        history.facts = read_facts(path)
        if not logs:
            fail(f'{path} is no folder of a run: it holds neither metrics.jsonl nor training.log')
    for log in logs:
        try:
            if os.path.exists(log) and not os.path.isfile(log):
                fail(f'{log} is neither the folder of a run nor a log')
            with open(log, encoding='utf-8', errors='replace') as lines:
                (read_metrics if log.suffix == '.jsonl' else read_console)(lines, history)
        except OSError as error:
            fail(f'{log} cannot be read: {reason(error)}')
        if history.series.keys() & {'loss', 'train/loss', 'val/loss'}:
            return history
    if not any(log.stat().st_size for log in logs):
        fail(f'{logs[-1]} is empty, there is no line of a run in it')
    what = 'record of a run ({"step": N, "loss": ...})' if logs[-1].suffix == '.jsonl' else (
        'line of a run (step N: train loss ..., or iter N: loss ...)')
    is_packed = logs[-1].suffix in ('.gz', '.bz2', '.xz', '.zst', '.zip')
    fail(f'{logs[-1]} has no {what}' + ('; unpack it first' if is_packed else ''))


def read_config(folder):
    """
    config.json of a run: {'settings': {...}, 'facts': {...}, 'launches': [{...}, ...]}, empty where there is none. What
    is damaged in it is left out, and that is said, once for a folder.
    """
    path, found, damage = Path(folder) / 'config.json', {}, ''
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError('it is no file')
        found = {**json.loads(path.read_text(encoding='utf-8-sig', errors='replace'))}
    except FileNotFoundError:
        pass
    except Exception as error:  # of the disk, of JSON, of its depth
        damage = reason(error)
    settings, facts, launches = (found.get(name) for name in ('settings', 'facts', 'launches'))
    config = {'settings': settings if isinstance(settings, dict) else {},
              'facts': facts if isinstance(facts, dict) else {},
              'launches': [launch for launch in launches if isinstance(launch, dict)]
              if isinstance(launches, list) else []}
    left_out = [name for name, value in config.items() if found.get(name, value) != value]
    if (damage or left_out) and path not in told:
        told.add(path)
        print(f'WARNING: {path} is damaged ({damage or ", ".join(left_out)}); what it says there of the run is left '
              'out')
    return config


def read_facts(folder):
    """What is known of a run: its settings, and what came of them."""
    config = read_config(folder)
    facts = {name: value for name, value in (config['settings'] | config['facts']).items()
             if name not in NUMBERS or is_number(value) and (value or name != 'vocab_size')}
    sizes = [facts.get(name) for name in ('batch_size', 'gradient_accumulation_steps', 'block_size')]
    if all(type(size) is int for size in sizes) and is_number(math.prod(sizes)):
        facts.setdefault('tokens_per_step', math.prod(sizes))
    return facts


def is_number(value):
    """Whether a fact is one that can be counted with. None of them is negative."""
    return type(value) in (int, float) and 0 <= value < BEYOND


def plain(lines):
    """Lines as they were meant: without colours, and the zeros of UTF-16, in which PowerShell's > writes."""
    return (ESCAPES.sub('', line.replace('\0', '')) for line in lines)


def read_records(folder, history):
    """Add the records of a run in a folder to a history; nothing where there are none."""
    with suppress(OSError), open(Path(folder) / 'metrics.jsonl', encoding='utf-8', errors='replace') as lines:
        read_metrics(lines, history)


def read_metrics(lines, history):
    """Add the records of metrics.jsonl to a history."""
    earlier = 0.0  # seconds of the launches before this one, in files whose clock begins anew with each
    for line in plain(lines):
        try:
            record = json.loads(line[line.index('{'):])  # behind a byte order mark
            step = record.pop('step')
            figures = {name: value if value is None or type(value) is float else from_int(value)
                       for name, value in record.items() if value is None or type(value) in (float, int)}
        except (ValueError, KeyError, RecursionError):
            continue  # torn, or none of ours
        seconds = figures.pop('time', None)
        if type(step) is not int or not 0 <= step < MOST_STEPS or not figures:
            continue
        forget_dead_branch(step, figures, history)
        if seconds is not None and 0 <= seconds < MOST_SECONDS:
            steps, times = history.series.get('time', ((), ()))
            if times and steps[-1] <= step and seconds + earlier < times[-1]:
                earlier = times[-1] - seconds
            figures['time'] = seconds + earlier
        history.add(step, figures)


def from_int(number):
    """A float, inf where it has too many digits."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def read_console(lines, history):
    """Add the lines of a log to a history."""
    for line in plain(lines):
        if match := TOKENS_PER_STEP.search(line):
            history.facts.setdefault('tokens_per_step', int(match[1].replace(',', '')))
        if match := OTHER_TEXT.search(line):
            history.facts['other_text_since'] = int(match[1].replace(',', ''))
        if not (match := LINE.search(line)) or len(match[2]) > 15:
            continue
        figures, end = {}, match.end() + LONGEST
        for name, pattern, unit in ON_A_STEP_LINE if match[1] == 'step' else ON_AN_ITER_LINE:
            if found := pattern.search(line, match.end() - 2, end):
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
