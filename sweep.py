"""
Run train.py many times: a grid, random draws or a Bayesian search over its settings, several seeds of each.

$ python sweep.py config/sweeps/rate_grid.py                        twelve learning rates, tabled and drawn
$ python sweep.py config/sweeps/rate_grid.py --seeds=3 --jobs=2     three seeds of each, two runs at a time
$ python sweep.py config/sweeps/rate_bayes.py                       Optuna looks for the rate (pip install optuna)
$ python sweep.py config/sweeps/rate_bayes.py --wandb               the same by a sweep of Weights & Biases

A sweep file is Python. Any setting of train.py can be a value that all runs share, a list of values, or, for random
and bayes, a range: uniform(0.0, 0.3), log_uniform(1e-4, 1e-1), of whole numbers log_uniform(32, 512). Beside them:

    config = 'config/train_gpt2.py --max_iters=500'     what all runs are given first; '' = the defaults of train.py
    variants = {'baseline': {}, 'large rate': {'learning_rate': 5e-3}}  set-ups with a name, crossed with the lists
    method = 'grid'                                     grid, random or bayes
    seeds = 3                                           so many from the seed of train.py on, or a list of them
    max_runs = 20                                       set-ups that are tried; 0 = all of a grid
    minimise = 'val/loss'                               any figure of metrics.jsonl; of a run its lowest counts
    maximise = 'val/accuracy'                           or this in its place; of a run its highest counts

Started again after an interruption, it goes on: what is finished stays, a half-made run goes on from its checkpoint,
a crashed one is tried again (but by bayes, which has gone on to another).
"""

import shlex
import sys
import time
from pathlib import Path

from tqdm import tqdm

from kit.base import overrides, ranks, signals
from kit.run import starts
from kit.sweeps import searches, tables, trials
from kit.watch.journal import duration
from model import GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# settings; the bare word is the sweep file

out_dir = ''                # '' = sweeps/<name of the file>
jobs = 0                    # >= 0: runs at a time; 0 = one a GPU, or one on a CPU
method = ''                 # grid, random, bayes; '' = what the file says
seeds = 0                   # >= 0: seeds of each set-up; 0 = what the file says
max_runs = -1               # >= -1: set-ups that are tried; -1 = what the file says, 0 = all of a grid
wandb = False               # let Weights & Biases choose the set-ups and show the runs (pip install wandb)

words = []
overrides.apply(globals(), ['not (wandb and jobs)  # its agent makes one run at a time; leave --jobs out'], words)
if len(words) != 1:
    overrides.fail(f'one sweep file is needed, such as config/sweeps/rate_grid.py, and not {len(words)}')
over_file = {name: value for name, value, unset in
             [('method', method, ''), ('seeds', seeds, 0), ('max_runs', max_runs, -1)] if value != unset}
script = overrides.ROOT / 'train.py'
sweep = trials.read(words[0], over_file, script, lambda settings: starts.check(settings, GPTConfig))
name = Path(words[0]).stem
folder = Path(out_dir or f'sweeps/{name}')
if wandb:
    raise SystemExit(searches.run_on_wandb(sweep, name, folder, script))

# ---------------------------------------------------------------------------------------------------------------------
# the machine: a run sees one GPU, or its share of the CPU

gpus = trials.visible_gpus() if sweep.base['device'] in ('auto', 'cuda') else []
jobs = jobs or len(gpus) or 1
threads = None if gpus else max(1, ranks.cores() // jobs)  # the same for all, so that they compare

# ---------------------------------------------------------------------------------------------------------------------
# the folder: new, or that of this sweep; from here on something is written

found = trials.claim(sweep, folder)
points = trials.points(sweep) if sweep.method != 'bayes' else [None] * sweep.max_runs
# all set-ups with the first seed, then all with the second: an interrupted sweep has seen something of each
plan = [(number, seed) for seed in sweep.seeds for number in range(1, len(points) + 1)]
results, study, total = {key: found[key] for key in plan if key in found}, None, len(plan)
others = len(found) - len(results)
if sweep.method == 'bayes':
    study = searches.Study(sweep, folder, found)
    waiting = study.undone(results)
else:
    results = {key: result for key, result in results.items() if result['status'] != 'crashed'}  # those come again
    waiting = [trials.new_run(folder, n, points[n - 1], seed) for n, seed in plan if (n, seed) not in results]
print(f'sweep: {total} runs in {folder}, {jobs} at a time' + (f'; {len(results)} were made before' if results else '')
      + (f'; {others} more, of other seeds or set-ups, do not count here' if others else ''))

# ---------------------------------------------------------------------------------------------------------------------
# the runs: where one ends the next is started at once, and the tables are written while it trains

signals.listen()
running, stopped, mistakes, seconds, picture_due = [], '', {}, [], time.time() + 30
bar = tqdm(total=total, initial=len(results), unit='run', disable=None, leave=False)  # on a terminal alone
while True:
    asked = signals.take()
    ended = [run for run in running if run.process.poll() is not None]
    mistakes |= {run.folder.name: words for run in ended if (words := trials.mistake(sweep, run, results))}
    if (asked in signals.STOP or mistakes) and not stopped:
        stopped = asked or 'mistake'
        for run in running:
            run.process.terminate()  # it finishes its step and saves
    for run in ended:
        running.remove(run)
        if run.folder.name in mistakes or stopped and run.process.returncode and not run.is_pruned:
            continue  # half-made, it goes on with the sweep
        result = results[run.number, run.seed] = trials.finish(sweep, run)
        waiting += study.next_of(run.number, results) if study else []
        seconds.append(time.time() - run.began)
        left = duration(trials.seconds_left(seconds, total - len(results), jobs))
        bar.update()
        bar.write(f'{len(results)} of {total}: {run}: {trials.outcome(sweep, result)}; about {left} left')

    while not stopped and len(running) < jobs:
        waiting += study.ask() if study and not waiting else []
        if not (run := trials.first_free(waiting)):
            break
        waiting.remove(run)
        run.slot = min(set(range(len(running) + 1)) - {other.slot for other in running})
        trials.start(sweep, run, script, gpus[run.slot % len(gpus)] if gpus else None, threads)
        running.append(run)
        bar.write(f'run {run.folder.name} begins')

    if ended:
        trials.spare(tables.write_tables, sweep, folder, results)
        if time.time() > picture_due:  # with no more than a twentieth of the time
            begin = time.time()
            trials.spare(tables.draw, sweep, folder, results)
            picture_due = time.time() + 20 * (time.time() - begin)
    if not running and (stopped or not waiting):
        break
    for run in running:
        trials.follow(sweep, run)
        if study and not run.is_pruned and study.is_hopeless(run):
            run.is_pruned = True
            run.process.terminate()
    bar.set_postfix_str(', '.join(f'{run.folder.name}: step {max(0, run.history.step())}' for run in running))
    time.sleep(0.1)
bar.close()
signals.obey()

# ---------------------------------------------------------------------------------------------------------------------
# what came of it

trials.spare(tables.write_tables, sweep, folder, results)
n_curves = trials.spare(tables.draw, sweep, folder, results)
print('\n' + tables.markdown(sweep, results))
print(f'{folder}: results.md, results.csv (a row a run)'
      + (f', comparison.png (the best {n_curves} of its set-ups)' if n_curves else ''))
if mistakes:
    overrides.fail('run {}: {}'.format(*next(iter(mistakes.items()))))
if stopped:
    print(f'{stopped}: stopped with {len(results)} of {total} runs made; this goes on:\n'
          f'  python {shlex.join(sys.argv)}')
    raise SystemExit(signals.status(stopped))
raise SystemExit(not any(result['status'] == 'finished' for result in results.values()))
