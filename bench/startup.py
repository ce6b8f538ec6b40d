"""
Seconds from the start of the process to the end of the first training step, beside nanoGPT.

$ python bench/startup.py --nanogpt=FOLDER     a checkout of nanoGPT; its data/shakespeare_char is filled with ours

Both train the model of config/train_shakespeare_char_cpu.py, evaluate it first (20 batches of each split), and take
turns: A B A B. Needs data/shakespeare_char (python prepare.py shakespeare_char).
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))
from kit import overrides, tokens  # noqa: E402

nanogpt = ''                # the folder of a nanoGPT checkout; '' = only ours
runs = 7                    # of each
overrides.apply(globals(), ['runs >= 1'])

FLAGS = ['config/train_shakespeare_char.py', '--device=cpu', '--compile=False', '--eval_iters=20', '--log_interval=1',
         '--block_size=64', '--batch_size=12', '--n_layer=4', '--n_head=4', '--n_embd=128', '--max_iters=2000',
         '--lr_decay_iters=2000', '--dropout=0.0']


def seconds_to_first_step(folder, out_dir):
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, '-u', 'train.py', *FLAGS, f'--out_dir={out_dir}'], cwd=folder,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for line in process.stdout:
        if line.startswith('iter 0:'):
            seconds = time.perf_counter() - start
            process.kill()
            process.communicate()
            return seconds
    sys.exit(f'{folder}: it ended without a step; run its train.py by hand to see why')


sides = {'flatGPT': HOUSE}
if nanogpt:
    sides['nanoGPT'] = Path(nanogpt)
    for name in 'train.bin', 'val.bin', 'meta.pkl':
        shutil.copy(tokens.dataset_folder('shakespeare_char') / name, Path(nanogpt) / 'data/shakespeare_char')
found = {name: [] for name in sides}
with tempfile.TemporaryDirectory() as out_dir:
    for _ in range(runs):
        for name, folder in sides.items():
            found[name].append(seconds_to_first_step(folder, Path(out_dir) / name))
for name, seconds in found.items():
    print(f'{name}: median {statistics.median(seconds):.2f} s, '
          f'from {min(seconds):.2f} to {max(seconds):.2f} s ({runs} runs)')
