"""
How fast a model writes: the time to the first token behind a prompt, then tokens a second, beside what memory allows.

$ python bench/sampling.py                                      10.7M parameters, as config/train_shakespeare_char.py
$ python bench/sampling.py --n_layer=12 --n_embd=768 --block_size=1024 --vocab_size=50304                       124M
$ python bench/sampling.py --compile                            the step of a token compiled, on a GPU a CUDA graph

A token takes at least as long as the weights and what is in the caches take to be read once, by the speed of a copy.
"""

import statistics
import sys
import time
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from kit.base import devices, overrides
from model import GPT, GPTConfig

runs = 5            # >= 1: turns
prompt = 128        # >= 1: tokens in it
n_tokens = 100      # >= 2: that are written
n_layer = 6         # >= 1: of the model
n_embd = 384        # >= 1: its channels
block_size = 256    # >= 1: its longest row
vocab_size = 65     # >= 1: its ids
device = 'auto'     # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'      # auto, float32, bfloat16 or float16
compile = False     # the step of a token by torch.compile
overrides.apply(globals(), ['prompt + n_tokens <= block_size  # a window that is full is read anew'])

device = devices.choose_device(device)
dtype = devices.choose_dtype(dtype, device)
model = GPT(GPTConfig(n_layer=n_layer, n_head=0, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size,
                      bias=False)).eval().to(device)
if compile:
    model.decode = torch.compile(model.decode, mode='reduce-overhead')


def bandwidth():
    """Bytes/s, read and written, of a copy of 256 MiB, the best of ten."""
    a, seconds = torch.ones(2**26, device=device), []
    b = a.clone()
    for _ in range(10):
        devices.synchronize(device)
        begin = time.perf_counter()
        b.copy_(a)
        devices.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * a.nbytes / min(seconds)


speed, size = bandwidth(), getattr(torch, dtype).itemsize
print(f'{model.count_params() / 1e6:.1f}M parameters in {dtype}, {n_tokens} tokens behind {prompt}; medians of {runs} '
      f'turns, behind one that warms up; a copy moves {speed / 1e9:.1f} GB/s')
for n in 1, 10:
    first, step = [], []
    for _ in range(runs + 1):
        idx = torch.zeros(n, prompt, dtype=torch.int64, device=device)
        ids = devices.fetched(islice(model.stream(idx, 0.8, 200, is_static=compile), n_tokens))
        with torch.inference_mode(), devices.autocast(device, dtype):
            begin = time.perf_counter()
            next(ids)
            first.append(time.perf_counter() - begin)
            list(ids)
            step.append((time.perf_counter() - begin - first[-1]) / (n_tokens - 1))
    first, step = statistics.median(first[1:]), statistics.median(step[1:])
    n_bytes = size * (model.count_params() + 2 * n_layer * n_embd * n * (prompt + n_tokens / 2))  # keys and values
    print(f'{n} side by side: the first token after {1000 * first:.1f} ms, then {n / step:,.0f} tokens/s; a step takes '
          f'{1000 * step:.2f} ms, to read {n_bytes / 1e6:.0f} MB {1000 * n_bytes / speed:.2f}')
