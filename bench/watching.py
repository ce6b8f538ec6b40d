"""
What it costs to watch a run: the same training with all its watching and with none, in turns.

$ python bench/watching.py                                      the CPU recipe on data/shakespeare_char
$ python bench/watching.py --runs=9 --args=--batch_size=64      more turns, other settings

A figure is the wall time from the first evaluation to the last step, evaluations and what they show included; then
that of the process in CPU seconds, which other work on the machine disturbs less.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kit.base import overrides

runs = 5            # >= 1: turns
config = 'config/train_shakespeare_char_cpu.py'
args = ''           # more settings for all, separated by spaces
max_iters = 600     # >= 10: steps of a turn
overrides.apply(globals())

VARIANTS = {
    'nothing': ['--tensorboard=False', '--log_interval=0'],
    'files alone': ['--tensorboard=False'],
    'the defaults': [],
    'each step logged': ['--log_interval=1'],  # layers' norms and update ratios at every step
}


def turn(settings):
    """(wall seconds of the training, CPU seconds of the process)."""
    folder = tempfile.mkdtemp()
    command = [sys.executable, str(ROOT / 'train.py'), config, f'--max_iters={max_iters}', '--save_interval=0',
               *args.split(), *settings]
    before = os.times()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, bufsize=1)
    start = end = 0
    for line in process.stdout:
        if line.startswith('step 0:'):
            start = time.perf_counter()
        if line.startswith(f'step {max_iters}:'):
            end = time.perf_counter()
    process.wait()
    after = os.times()
    shutil.rmtree(folder)
    return end - start, after.children_user + after.children_system - before.children_user - before.children_system


os.environ.setdefault('FLATGPT_MIRROR', str(ROOT / 'data'))
figures = {name: [] for name in VARIANTS}
for i in range(runs):
    for name in list(VARIANTS)[::1 if i % 2 else -1]:
        figures[name].append(turn(VARIANTS[name]))
        print(f'turn {i + 1}, {name}: {figures[name][-1][0]:.2f} s, {figures[name][-1][1]:.2f} CPU s', flush=True)

base = [statistics.median(column) for column in zip(*figures['nothing'])]
print(f'\nmedians of {runs} turns of {max_iters} steps:')
for name, rows in figures.items():
    wall, cpu = (statistics.median(column) for column in zip(*rows))
    print(f'{name:18} {wall:7.2f} s ({wall / base[0] - 1:+.1%})   {cpu:7.2f} CPU s ({cpu - base[1]:+.2f} s)   '
          f'best {min(wall for wall, _ in rows):.2f} s')
