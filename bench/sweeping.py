"""
What a sweep adds to its runs: eight tiny runs of train.py by sweep.py, and the same commands by hand, in turns.

$ python bench/sweeping.py
$ python bench/sweeping.py --turns=5 --max_iters=200

A figure is the wall time of all eight, one after the other; by sweep.py with its start, its tables and its picture.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kit.base import overrides

turns = 2           # >= 1: of each, in the order A B A B
runs = 8            # >= 1: in a turn
max_iters = 20      # >= 10: steps of a run
overrides.apply(globals())

CONFIG = f'config/train_shakespeare_char_cpu.py --max_iters={max_iters} --warmup_iters=2 --eval_iters=2'
os.environ.setdefault('FLATGPT_MIRROR', str(ROOT / 'data'))


def by_hand(folder):
    for seed in range(1337, 1337 + runs):
        subprocess.run([sys.executable, str(ROOT / 'train.py'), *CONFIG.split(), '--tensorboard=False',
                        '--save_interval=0', f'--seed={seed}', f'--out_dir={seed}'], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL)


def by_sweep(folder):
    (Path(folder) / 'bench.py').write_text(f'config = {CONFIG!r}\nseeds = {runs}\n')
    subprocess.run([sys.executable, str(ROOT / 'sweep.py'), 'bench.py', '--jobs=1'], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL)


seconds = {by_hand: [], by_sweep: []}
for turn in range(turns):
    for way, figures in seconds.items():
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            way(folder)
            figures.append(time.perf_counter() - start)
        print(f'turn {turn + 1}, {way.__name__}: {figures[-1]:.2f} s', flush=True)
hand, sweep = (statistics.median(figures) for figures in seconds.values())
print(f'\nmedians of {turns} turns of {runs} runs: by hand {hand:.2f} s, by sweep.py {sweep:.2f} s: '
      f'{(sweep - hand) / runs:+.2f} s a run')
