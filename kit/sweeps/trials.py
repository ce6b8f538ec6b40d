"""
Many runs of train.py as one sweep: a file says which, each is a process of its own. What came of them is in tables.py.

All that a sweep must know is in its folder: sweep.json, what it is; a folder for each run, with result.json once the
run has ended; study.db, what Optuna knows. So a sweep can be killed at any moment and goes on.
"""

import difflib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kit.base import files, overrides
from kit.base.errors import explained, reason, shown
from kit.learn import schedules
from kit.state import folders
from kit.watch import curves, runlogs
from kit.watch.diagnosis import History

OWN = {'config': '', 'variants': {}, 'method': 'grid', 'seeds': 1, 'max_runs': 0, 'minimise': 'val/loss',
       'maximise': ''}
METHODS = 'grid', 'random', 'bayes'
LOSSES = 'val/loss', 'train/loss'  # of an evaluation
RESERVED = {'out_dir': 'the runs get folders in that of the sweep, which is --out_dir of sweep.py',
            'seed': 'a sweep has seeds = 3, or seeds = [1, 2]'}
TRAINS_NOT = 'dry_run', 'eval_only', 'test', 'checkpoint', 'inspect_step', 'find_lr'  # launches that do not train
SEED = 1337  # of what random and bayes draw
MOST = 100_000  # runs of a sweep, or corners of one
FIGURE = int | float | None
RESULT = {'number': int, 'point': dict, 'seed': int, 'status': str, 'best': FIGURE, 'at_step': FIGURE,
          'val/loss': FIGURE, 'train/loss': FIGURE, 'seconds': FIGURE, 'memory_gib': FIGURE, 'steps': int,
          'parameters': FIGURE, 'tokens_per_second': FIGURE, 'sample': str, 'error': str}  # what result.json holds
# run by the child before train.py: the system tells it to stop when the sweep's process is gone, however that ended
TIED = ('import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n'
        'if os.getppid() == int(sys.argv[1]): os.execv(sys.executable, [sys.executable, *sys.argv[2:]])')


# ---------------------------------------------------------------------------------------------------------------------
# the file: which runs


@dataclass(frozen=True)
class Range:
    """All numbers from low to high, both included; whole ones where both are whole."""
    low: float
    high: float
    is_log: bool

    def at(self, share):
        """The number below which a share, 0 <= share < 1, of those that are drawn would lie."""
        if self.is_log:
            low, high = math.log(self.low), math.log(self.high + (type(self.high) is int))
            value = math.exp(low + share * (high - low))
        else:
            value = self.low + share * (self.high + (type(self.high) is int) - self.low)
        return min(int(value), self.high) if type(self.low) is int else self.rounded(value)

    def rounded(self, value):
        """To four digits, which a table can show and a person can type."""
        return value if type(value) is int else min(max(float(f'{value:.4g}'), self.low), self.high)


def uniform(low, high):
    """Numbers between low and high, each as likely as any other: uniform(0.0, 0.3), uniform(2, 8)."""
    return Range(low, high, is_log=False)


def log_uniform(low, high):
    """The same for their logarithms: log_uniform(1e-4, 1e-1) draws as much from each decade."""
    return Range(low, high, is_log=True)


def at(values, share):
    """The same for a list, or a Range."""
    return values.at(share) if isinstance(values, Range) else values[int(share * len(values))]


@dataclass
class Sweep:
    """What a sweep file says. A point is one set-up: {name: value} for what is swept, and 'variant' where there are."""
    words: list          # config files and arguments that all runs share
    fixed: dict          # settings that all share
    space: dict          # name: list of values, or Range
    variants: dict       # name: settings
    method: str
    seeds: list
    max_runs: int        # set-ups; 0 = all of a grid
    minimise: str        # a figure of the records; '' where one is maximised
    maximise: str
    description: str
    base: dict           # all settings of train.py, as words and fixed have them
    changed: dict        # those of them that are not the defaults of train.py

    @property
    def metric(self):
        """The figure that the runs are judged by: of a run its best value counts."""
        return self.maximise or self.minimise

    @property
    def extreme(self):
        return 'highest' if self.maximise else 'lowest'

    def settings(self, point):
        """The settings that a point stands for."""
        return self.variants.get(point.get('variant'), {}) | {k: v for k, v in point.items() if k != 'variant'}

    def columns(self):
        """The settings that differ between the runs."""
        return list(dict.fromkeys([*(name for some in self.variants.values() for name in some), *self.space]))

    def axes(self):
        return ({'variant': list(self.variants)} if self.variants else {}) | self.space

    def identity(self):
        """What another sweep would not share. More seeds or set-ups are the same sweep."""
        return {'method': self.method, 'minimise': self.minimise, 'settings': self.changed,  # in another order of
                'variants': [[name, settings] for name, settings in self.variants.items()],  # these the set-ups have
                'space': [[name, str(values)] for name, values in self.space.items()],       # other numbers
                'maximise': self.maximise}


def read(word, given, script, judge):
    """
    The Sweep in a file. given: settings that the command line has put over it. script: train.py, whose settings it may
    name. judge: ends the script where the settings of a run will not do for a model or an optimizer. Whatever is wrong
    with the file ends the script; nothing is written here.
    """
    if not word.endswith('.py'):
        overrides.fail(f'{shown(word)}: a sweep file is Python and ends in .py, such as config/sweeps/rate_grid.py')
    train = overrides.read_script(script)
    defaults = train.settings
    helpers = {'uniform': uniform, 'log_uniform': log_uniform}
    namespace, assigned = overrides.execute(word, OWN | helpers, 'sweep')
    overrides.check_names(word, namespace, assigned, [*defaults, *OWN])
    own = {name: namespace[name] for name in OWN} | given
    for name, value in own.items():
        if not isinstance(value, (int, list) if name == 'seeds' else type(OWN[name])) or isinstance(value, bool):
            overrides.fail(f'{word}: {name} = {shown(value)} does not fit, {name} = {OWN[name]!r} would')
        if isinstance(value, int | str):
            overrides.check_type(name, value, value, f'{word}: {name}')  # which has its bounds
    with explained(f'{word}: config = {shown(own["config"])} is no command line', 'close its quotes'):
        # the folders of many runs stay small, where the file does not say otherwise
        words = ['--tensorboard=False', '--save_interval=0', *shlex.split(own['config'])]
    base = overrides.settings_of(script, words)
    named = {name: value for name, value in namespace.items() if name in defaults}
    for name in [*named, *(name for some in own['variants'].values() if isinstance(some, dict) for name in some),
                 *(word[2:].partition('=')[0] for word in words if word.startswith('--')),
                 *(name for name in TRAINS_NOT if base.get(name) != defaults.get(name))]:  # by a config file
        if name in RESERVED or name in TRAINS_NOT:
            overrides.fail(f'{word}: {name}: {RESERVED.get(name, "a sweep trains, and with this train.py does not")}')
    fixed, space, variants = {}, {}, {}
    for name, value in named.items():
        if isinstance(value, list):
            if not value:
                overrides.fail(f'{word}: {name} = []: it needs at least one value')
            space[name] = list(dict.fromkeys(
                overrides.check_type(name, v, defaults[name], f'{word}: {name}') for v in value))
        elif isinstance(value, Range):
            space[name] = check_range(name, value, defaults[name], f'{word}: {name}')
        else:
            fixed[name] = overrides.check_type(name, value, defaults[name], f'{word}: {name}')
    for variant, some in own['variants'].items():
        if not isinstance(some, dict):
            overrides.fail(f'{word}: variants: {shown(variant)} needs settings: {{"large": {{"learning_rate": 5e-3}}}}')
        if not isinstance(variant, str) or not overrides.is_word(variant):
            overrides.fail(f'{word}: variants: {shown(variant)} is no name; a name is a text, such as "large"')
        for name in some:
            if name not in defaults:
                overrides.fail(f'{word}: variants, {variant!r}: {shown(name)}: train.py has no such setting'
                               f'{overrides.nearest(name, defaults)}')
            if name in space:
                overrides.fail(f'{word}: {name} has values of its own, and the variant {variant!r} has another')
        variants[variant] = {name: overrides.check_type(name, value, defaults[name], f'{word}: {name}')
                             for name, value in some.items()}
    first, seeds = base['seed'], own['seeds']
    if not isinstance(seeds, list) and 1 <= seeds <= MOST:
        seeds = list(range(first, first + seeds))
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        overrides.fail(f'{word}: seeds = {shown(seeds)}: a number from 1 on, at most {MOST:,}, or a list of whole '
                       'numbers')
    if own['maximise'] and 'minimise' not in assigned:
        own['minimise'] = ''
    if bool(own['minimise']) == bool(own['maximise']):
        overrides.fail(f'{word}: minimise = {shown(own["minimise"])} and maximise = {shown(own["maximise"])}: one of '
                       'them names a figure, the other is left out')
    sweep = Sweep(words, fixed, space, variants, own['method'], list(dict.fromkeys(seeds)), own['max_runs'],
                  own['minimise'], own['maximise'], str(namespace.get('__doc__') or '').strip(), base | fixed,
                  {name: value for name, value in (base | fixed).items() if value != defaults[name]})
    check(sweep, word, train, judge)
    return sweep


def check_range(name, value, default, where):
    """A Range that draws what a setting takes, or the end of the script."""
    kind = 'log_uniform' if value.is_log else 'uniform'
    example = f'{kind}({"1e-4, 1e-1" if isinstance(default, float) else "32, 512"})'
    if type(default) not in (int, float):
        overrides.fail(f'{where} takes no numbers: name its values as a list, [..., ...]')
    low, high = (overrides.check_type(name, v, default, f'{where} = {kind}({shown(value.low)}, {shown(value.high)})')
                 for v in (value.low, value.high))
    if not low < high or value.is_log and low <= 0:
        overrides.fail(f'{where} = {kind}({low}, {high}): it needs two numbers, the smaller first'
                       f'{" and above 0" if value.is_log else ""}: {example}')
    return Range(low, high, value.is_log)


def check(sweep, word, train, judge):
    """What must hold of a sweep and of every set-up that is known before it runs. train: the Script of train.py."""
    if sweep.method not in METHODS:
        overrides.fail(f'{word}: method = {shown(sweep.method)}{overrides.nearest(sweep.method, METHODS)}; it is one '
                       f'of {", ".join(METHODS)}')
    if sweep.method == 'bayes':
        overrides.require('optuna', 'method = bayes')
        if not sweep.axes():
            overrides.fail(f'{word}: method = bayes: no setting has a list of values or a range to search in')
    ranges = [name for name, values in sweep.space.items() if isinstance(values, Range)]
    if sweep.method == 'grid' and ranges:
        overrides.fail(f'{word}: {ranges[0]} is a range, and method = grid takes lists of values; method = random or '
                       'bayes draws from it')
    if sweep.max_runs < 0 or sweep.method != 'grid' and sweep.max_runs == 0:
        overrides.fail(f'{word}: max_runs = {shown(sweep.max_runs)}: method = {sweep.method} needs to know how many '
                       'set-ups it may try, such as --max_runs=20')
    corners = [[values.low, values.high] if isinstance(values, Range) else values for values in sweep.axes().values()]
    n_corners = math.prod(map(len, corners))
    n_runs = (min(sweep.max_runs or n_corners, n_corners) if sweep.method == 'grid' else sweep.max_runs) * len(
        sweep.seeds)
    if n_runs > MOST or sweep.method == 'bayes' and n_corners > MOST:
        overrides.fail(f'{word}: {shown(max(n_runs, n_corners))} runs, or corners of what is searched, are more than '
                       f'the {MOST:,} that a sweep may have; name fewer values, or a smaller max_runs')
    for point in points(sweep) if sweep.method != 'bayes' else [
            dict(zip(sweep.axes(), corner)) for corner in itertools.product(*corners)]:
        settings = sweep.base | sweep.settings(point)
        if settings['init_from'] in ('resume', 'auto'):
            overrides.fail(f'{word}: init_from = {settings["init_from"]}: the runs of a sweep are new ones, which '
                           'begin from scratch or from the weights of another; a half-made one goes on by itself')
        overrides.check_settings(train, settings)
        schedules.check(settings)
        judge(settings)
    for seed in sweep.seeds:
        overrides.check_settings(train, sweep.base | {'seed': seed})


def points(sweep):
    """The set-ups of a grid, the last setting varying fastest, or those that random draws, each once."""
    axes = sweep.axes()
    if sweep.method == 'grid':
        grid = (dict(zip(axes, values)) for values in itertools.product(*axes.values()))
        return list(itertools.islice(grid, sweep.max_runs or None))
    rng, found, in_vain = random.Random(SEED), {}, 0
    while len(found) < sweep.max_runs and in_vain < 1000:  # then there are hardly any others
        point = {name: at(v, rng.random()) for name, v in axes.items()}
        in_vain = in_vain + 1 if json.dumps(point) in found else 0
        found[json.dumps(point)] = point
    return list(found.values())


def label(point):
    """A set-up in words: 'large rate, batch_size=8'."""
    words = ', '.join(v if k == 'variant' else f'{k}={v}' for k, v in point.items())
    return ' '.join(words.split()) or 'as it is'


# ---------------------------------------------------------------------------------------------------------------------
# a run: a process and a folder


@dataclass
class Run:
    number: int          # of its set-up, from 1 on
    point: dict
    seed: int
    folder: Path
    process: subprocess.Popen | None = None
    slot: int = 0        # its place among those that run at the same time
    began: float = 0.0   # time.time()
    is_pruned: bool = False
    judged_at: int = 0   # the newest step whose loss the pruner has seen
    history: History = field(default_factory=History)  # what follow() has read
    read_up_to: int = 0  # bytes of metrics.jsonl

    def __str__(self):
        return f'{label(self.point)}, seed {self.seed}'


def new_run(folder, number, point, seed):
    slug = re.sub(r'[^\w.=+-]+', '_', label(point))[:60]
    return Run(number, point, seed, Path(folder) / f'{number:03d}-{slug}-{seed}')


def command(sweep, run, script):
    """train.py with the settings of a run, which goes on where it was interrupted."""
    settings = sweep.fixed | sweep.settings(run.point)
    begin = (sweep.base | settings)['init_from']
    settings |= {'seed': run.seed, 'out_dir': str(run.folder),
                 'init_from': 'resume' if any(run.folder.glob('*.pt')) else 'auto' if begin == 'scratch' else begin}
    return [sys.executable, str(script), *sweep.words, *(f'--{name}={value}' for name, value in settings.items())]


def start(sweep, run, script, gpu=None, threads=None):
    """Start the process of a run. gpu: the one that it sees. threads: of the CPU that it may use."""
    run.folder.mkdir(parents=True, exist_ok=True)
    words = command(sweep, run, script)
    if sys.platform == 'linux':
        words = [sys.executable, '-c', TIED, str(os.getpid()), *words[1:]]
    env = dict(os.environ) | ({'CUDA_VISIBLE_DEVICES': gpu} if gpu is not None else {})
    if threads:
        env.setdefault('OMP_NUM_THREADS', str(threads))
    run.began = time.time()
    with files.open_own(run.folder / 'console.log', 'wb') as log:
        # a session of its own: Ctrl-C is for the sweep, which passes it on
        run.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                                       start_new_session=True)


def is_locked(folder):
    """Whether a process of an earlier launch of the sweep still writes there."""
    with suppress(ImportError, OSError):
        import fcntl
        with files.open_own(folder / '.lock', 'r') as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def first_free(waiting):
    """The first of the runs whose folder is not locked; None where there is none, and that is told once."""
    for run in waiting:
        if not is_locked(run.folder):
            return run
    for run in waiting[:1]:
        if run.folder not in told:
            told.add(run.folder)
            tqdm.write(f'waits for {run.folder.name}: another process writes there')


def follow(sweep, run):
    """Read what a run has recorded since the last call into its history; tell once that the metric is missing."""
    with suppress(OSError), open(run.folder / 'metrics.jsonl', 'rb') as file:
        file.seek(run.read_up_to)
        text = file.read()
        whole = text[:text.rfind(b'\n') + 1]  # a line may be half written
        run.read_up_to += len(whole)
        runlogs.read_metrics(io.StringIO(whole.decode('utf-8', 'replace')), run.history)
    evaluated = run.history.get('val/loss', 1)[0]
    if len(evaluated) and evaluated[0] > 0 and sweep.metric not in {*run.history.series, *told}:
        told.add(sweep.metric)
        tqdm.write(f'run {run.folder.name}: up to step {evaluated[0]} {without_metric(sweep, run.history)}; the sweep '
                   'ends with this run where none comes')


def without_metric(sweep, history):
    """Words for a history in which the metric of a sweep is missing."""
    near = difflib.get_close_matches(sweep.metric, history.series, 3, 0.0)
    return (f'there is no figure {sweep.metric}, which the sweep goes by; the nearest in metrics.jsonl: '
            f'{", ".join(near)}')


def mistake(sweep, run, results):
    """
    Words for a mistake of the user's that a run has met when it ended, '' for none: a setting, or a metric that neither
    its records nor any result has.
    """
    if run.process.returncode == 2:
        return last_words(run.folder, 2)
    history = History()
    runlogs.read_records(run.folder, history)
    if (run.process.returncode or not history.series or sweep.metric in history.series
            or any(result['best'] is not None for result in results.values())):
        return ''
    return without_metric(sweep, history)


def finish(sweep, run):
    """The result of a run whose process has ended, also written into its folder."""
    status, history = run.process.returncode, History()
    runlogs.read_records(run.folder, history)
    last = {name: values[-1] if len(values) else math.nan
            for name in LOSSES for values in [history.get(name)[1]]}
    judged = sweep.metric if sweep.metric in LOSSES else LOSSES[0]  # whether it has diverged
    losses = history.get(judged)[1]
    at_step, best = curves.best(history, sweep.metric, bool(sweep.maximise))
    words, facts = last_words(run.folder, status), runlogs.read_facts(run.folder)
    guess = math.log(facts.get('vocab_size', math.inf))
    is_astray = len(losses) and not losses[-1] <= max(guess, losses[0])  # a new model begins a little above a guess
    if run.is_pruned and status:
        kind = 'pruned'
    elif status == 1 and words.startswith('stopped at step'):
        kind = 'diverged'
    elif is_astray and status in (0, 1):  # 1: its weights were none to be saved
        kind, words = 'diverged', f'{judged} is {losses[-1]:.4f} at the end, and a fair guess has {guess:.4f}'
    elif status or not len(losses):
        kind = 'crashed'
    elif sweep.metric not in history.series:
        kind, words = 'crashed', without_metric(sweep, history)
    else:
        kind = 'finished'
    made, evaluated = history.get('loss', 1)[0], history.get('val/loss', 1)[0]
    memory = history.get('system/gpu_peak_gib')[1] if 'system/gpu_peak_gib' in history.series else \
        history.get('system/cpu_memory_gib')[1]
    number = lambda value: float(value) if math.isfinite(value) else None
    result = {
        'number': run.number, 'point': run.point, 'seed': run.seed, 'status': kind,
        'best': number(best), 'at_step': at_step if math.isfinite(best) else None,
        'val/loss': number(last['val/loss']), 'train/loss': number(last['train/loss']),
        'seconds': number(max(history.last('time', 10**9), default=math.nan)),
        'memory_gib': number(max(memory, default=math.nan)),
        'steps': int(max([*made + 1, *evaluated], default=0)),
        'parameters': facts.get('parameters'),
        'tokens_per_second': number(np.median(rates)) if len(rates := history.last('tokens_per_second', 10**9)) else
        None, 'sample': sample(run.folder), 'error': words if kind in ('crashed', 'diverged') else ''}
    spare(files.write_whole, run.folder / 'result.json', json.dumps(result, indent=1) + '\n')  # else it is made again
    return result


def seconds_left(seconds, n_left, jobs):
    """What so many runs will take, after those that took these seconds; the last may be fewer than there are jobs."""
    return sum(seconds) / len(seconds) * n_left / max(1, min(jobs, n_left))


def outcome(sweep, result):
    """A result in words."""
    if result['status'] in ('crashed', 'diverged'):
        return f'{result["status"]}: {result["error"]}'
    words = f'no finite {sweep.metric}' if result['best'] is None else (
        f'{sweep.extreme} {sweep.metric} {curves.in_words(result["best"])} at step {result["at_step"]}')
    words += f', {result["seconds"]:.0f}s'
    return f'pruned after {result["steps"]} steps, {words}' if result['status'] == 'pruned' else words


def last_words(folder, status):
    """Why a run has ended: the error of its traceback, or its last line, and what that does not say."""
    said, shown = ([line for line in text(folder / name).splitlines() if line.strip()] or ['']
                   for name in ('training.log', 'console.log'))
    words = (said[-1] or shown[-1]).strip()  # behind its own last line the console may have some of wandb's
    if status < 0:
        return f'{signal.Signals(-status).name} after: {words}'
    if status == 0 or words.startswith('stopped at step'):
        return words
    traces = [i for i, line in enumerate(shown) if line.startswith('Traceback (')]
    errors = [line for line in shown[traces[-1] + 1:] if not line[0].isspace()] if traces else []
    return errors[0] if errors else f'status {status} after: {shown[-1].strip()}'


def text(path):
    """What is in a file of a run, '' where there is none."""
    with suppress(OSError):
        return path.read_text(encoding='utf-8', errors='replace')
    return ''


def sample(folder):
    """The text that train.py prints at the end of a run, which ends before what the figures say; '' where none is."""
    _, mark, rest = text(folder / 'training.log').rpartition('\na sample of its own:\n')
    return rest[:rest.rfind('\n\n')] if mark else ''


def spare(work, *args):
    """What some work returns. Where the disk, or a library, does not do it that is told, once; the sweep goes on."""
    try:
        return work(*args)
    except Exception as error:
        if str(error) not in told:
            told.add(str(error))
            print(f'WARNING: {getattr(error, "filename", None) or work.__name__}: {reason(error)}; the sweep goes on',
                  file=sys.stderr)


told = set()  # what has been said and need not be said again


# ---------------------------------------------------------------------------------------------------------------------
# the folder of a sweep


def claim(sweep, folder):
    """
    Make a folder that of this sweep alone while this process lives; it must be new, empty or have been that before.
    Returns the results in it, {(number, seed): result}.
    """
    global lock
    path, here = folder / 'sweep.json', sweep.identity()
    try:
        if path.is_file():
            try:
                there = {'maximise': ''} | json.loads(path.read_text(encoding='utf-8'))  # older ones lack it
                other = [name for name in here if there[name] != here[name]]
                is_turned = bool(there['maximise']) != bool(here['maximise']) and (folder / 'study.db').exists()
                if not is_turned and not any(folder.glob('*/result.json')):  # the metric may be corrected
                    other = [name for name in other if name not in ('minimise', 'maximise')]
            except Exception as error:
                overrides.fail(f'{path} cannot be read ({reason(error)}); --out_dir=FOLDER takes another place')
            if other:
                overrides.fail(f'{folder} holds another sweep: {other[0]} there is {there[other[0]]!r}, here '
                               f'{here[other[0]]!r}; --out_dir=FOLDER takes another place')
        elif folder.exists() and (not folder.is_dir() or {inner.name for inner in folder.iterdir()} - {
                '.lock', '.sweep.json.part'}):
            overrides.fail(f'{folder} holds something that is no sweep; --out_dir=FOLDER takes another place')
        folder.mkdir(parents=True, exist_ok=True)
        lock = folders.take_lock(folder)
        files.write_whole(path, json.dumps(here, indent=1) + '\n')
    except OSError as error:
        overrides.fail(f'{folder}: nothing can be written there ({reason(error)}); --out_dir=FOLDER takes another '
                       'place')
    results = {}
    for found in filter(os.path.isfile, folder.glob('*/result.json')):
        with suppress(Exception):  # damaged: the run goes on from its checkpoint
            result = json.loads(found.read_text(encoding='utf-8'))
            if 'lowest' in result:  # as it was called before a figure could be maximised
                result['best'] = result.pop('lowest')
            if label(result['point']) and all(isinstance(result[name], kind) for name, kind in RESULT.items()):
                results[result['number'], result['seed']] = result
    return results


lock = None  # an open file; the system gives the lock back when the process ends, however it ends


def visible_gpus():
    """The names by which CUDA_VISIBLE_DEVICES knows the GPUs that this process may use."""
    import torch
    names = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
    names = list(itertools.takewhile(lambda name: name.strip() not in ('', '-1'), names))  # as CUDA reads it
    return names or [str(i) for i in range(torch.cuda.device_count())]
