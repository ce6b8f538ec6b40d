"""
Beside nanoGPT on this machine: seconds from the start of the process to the end of the first training step, and
milliseconds a step after that.

$ python bench/beside_nanogpt.py --nanogpt=FOLDER     a checkout of nanoGPT; its data/shakespeare_char is filled

Both train the model of config/train_shakespeare_char_cpu.py, evaluate it first (20 batches of each split), log every
step, and take turns: A B A B. Needs data/shakespeare_char (python prepare.py shakespeare_char).
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
from kit.data import tokens

nanogpt = ''                # not empty: the folder of a nanoGPT checkout, --nanogpt=FOLDER
runs = 7                    # >= 1: of each
steps = 150                 # > 20: in each run; the first 20 are not counted
overrides.apply(globals())

FLAGS = ['config/train_shakespeare_char.py', '--device=cpu', '--compile=False', '--eval_iters=20', '--log_interval=1',
         '--block_size=64', '--batch_size=12', '--n_layer=4', '--n_head=4', '--n_embd=128', '--max_iters=2000',
         '--lr_decay_iters=2000', '--dropout=0.0']


def measure(folder, out_dir):
    """(seconds to the first step, median milliseconds of the later ones) of one run, which is then stopped."""
    start, times = time.perf_counter(), []
    process = subprocess.Popen([sys.executable, '-u', 'train.py', *FLAGS, f'--out_dir={out_dir}'], cwd=folder,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for line in process.stdout:
        if line.startswith('iter 0:'):
            first = time.perf_counter() - start
        if line.startswith('iter '):
            times.append(float(line.split()[5].removesuffix('ms,')))
        if len(times) == steps:
            process.kill()
            process.communicate()
            return first, statistics.median(times[20:])
    sys.exit(f'{folder}: it ended before step {steps}; run its train.py by hand to see why')


os.environ.pop('PYTHONDONTWRITEBYTECODE', None)  # no launch but the first compiles what it imports
sides = {'flatGPT': ROOT, 'nanoGPT': Path(nanogpt)}
for name in 'train.bin', 'val.bin', 'meta.pkl':
    shutil.copy(tokens.dataset_folder('shakespeare_char') / name, Path(nanogpt) / 'data/shakespeare_char')
found = {name: [] for name in sides}
with tempfile.TemporaryDirectory() as out_dir:
    for _ in range(runs):
        for name, folder in sides.items():
            found[name].append(measure(folder, Path(out_dir) / name))
for name, pairs in found.items():
    firsts, means = zip(*pairs)
    print(f'{name}: first step after {statistics.median(firsts):.2f} s ({min(firsts):.2f} to {max(firsts):.2f}), '
          f'then {statistics.median(means):.2f} ms a step ({min(means):.2f} to {max(means):.2f}); {runs} runs')
