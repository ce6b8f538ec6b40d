"""
What a save costs the thread that trains: written at once, and by a thread from a copy, in turns.

$ python bench/saving.py                                        10.7M parameters, as config/train_shakespeare_char.py
$ python bench/saving.py --n_layer=12 --n_embd=768 --vocab_size=50304 --runs=4      124M
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from kit.base import overrides
from kit.learn import optimizers
from kit.state import checkpoints
from kit.state.writer import Writer
from model import GPT, GPTConfig

runs = 9            # >= 1: turns
n_layer = 6         # >= 1: of the model
n_embd = 384        # >= 1: its channels
vocab_size = 65     # >= 1: its ids
overrides.apply(globals())

model = GPT(GPTConfig(n_layer=n_layer, n_head=0, n_embd=n_embd, block_size=256, vocab_size=vocab_size, bias=False))
optimizer = optimizers.adamw(model, 0.1, 1e-3, (0.9, 0.99))
idx = torch.zeros(1, 8, dtype=torch.int64)
model(idx, idx)[1].backward()
optimizer.step()  # makes its moments
parameters = [name for name, _ in model.named_parameters()]
print(f'{model.count_params() / 1e6:.1f}M parameters, medians of {runs} turns, behind one that warms up')


def state():
    return {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'model_args': model.config.args(),
            'best_val_loss': 1.0, 'iter_num': 1, 'random_states': checkpoints.random_states()}


def seconds(act, *args):
    begin = time.perf_counter()
    act(*args)
    return time.perf_counter() - begin


with tempfile.TemporaryDirectory() as folder:
    writer = Writer(folder, keep_last=0)
    for names in ['ckpt.pt'], ['best.pt', 'ckpt.pt']:
        at_once, by_a_thread, its_write = [], [], []
        for _ in range(runs + 1):
            at_once.append(seconds(checkpoints.save, state(), folder, names, True, parameters))
            by_a_thread.append(seconds(writer.write, state(), names, parameters))
            its_write.append(seconds(writer.wait))
        before, now, beside = (1000 * statistics.median(times[1:]) for times in (at_once, by_a_thread, its_write))
        print(f'{" and ".join(names)}: at once {before:.0f} ms, by a thread {now:.1f} ms ({now / before:.1%}), and '
              f'{beside:.0f} ms beside the training')
