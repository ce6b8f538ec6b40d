"""
What a batch costs: get_batch in each batch_mode, 64 rows of 256 tokens (padded: of 8 to 256), warm, on one CPU; beside
nanoGPT's where a checkout of it is given. And whether memory grows over 2,000 batches of each.

$ python bench/batches.py
$ python bench/batches.py --nanogpt=FOLDER

All read the same file of 50 million tokens, in turns; a figure is the median over all batches of all turns. nanoGPT's
get_batch is taken out of its train.py as it stands there.
"""

import ast
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kit.base import devices, overrides
from kit.data import readers

nanogpt = ''                # the folder of a nanoGPT checkout
turns = 5                   # >= 1: of each
batches = 400               # >= 10: in a turn; a tenth more come before it, uncounted
n_tokens = 50_000_000       # >= 100_000: in the file, 100 MB

DEVICE, ROWS, BLOCK, END, SEED = torch.device('cpu'), 64, 256, 0, 1337


def write_documents(folder):
    """train.bin: documents of 2 to some thousand tokens, 400 in the middle; and the places of pairs of 8 to 256."""
    rng = np.random.default_rng(1)
    ids = rng.integers(1, 50257, n_tokens, dtype=np.uint16)
    lengths = np.clip(rng.lognormal(np.log(400), 1, n_tokens // 400).astype(np.int64), 2, 20_000)
    ends = np.cumsum(lengths)
    ids[ends[ends <= n_tokens] - 1] = END
    ids[-1] = END
    ids.tofile(folder / 'train.bin')
    stops = np.cumsum(rng.integers(8, BLOCK, n_tokens // BLOCK))
    begins = np.concatenate([[0], stops[:-1]])
    return np.stack([begins, (begins + stops) // 2, stops], axis=1)


def ours(reader, sampling='random', mask_prob=0.0):
    """The arithmetic of train.py's get_batch, for one micro-step in one process."""
    data = readers.Rows(['one'], [reader], [1.0], mask_prob, 50257)

    def get_batch(step):
        rows, noise, n_targets = data.of_step(ROWS, SEED, step, sampling)
        mine = rows[:ROWS], noise if noise is None else noise[:ROWS]
        parts = n_targets / data.count(*mine)
        return *(devices.send(a, DEVICE) for a in data.fetch(*mine)), parts
    return get_batch


def theirs(folder):
    """nanoGPT's get_batch, reading the same file."""
    tree = ast.parse((Path(nanogpt) / 'train.py').read_text(encoding='utf-8'))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == 'get_batch')
    names = {'np': np, 'torch': torch, 'os': __import__('os'), 'data_dir': str(folder), 'block_size': BLOCK,
             'batch_size': ROWS, 'device': 'cpu', 'device_type': 'cpu'}
    exec(compile(ast.Module([function], []), 'nanoGPT/train.py', 'exec'), names)
    return lambda step: names['get_batch']('train')


def anonymous_memory():
    """KiB of this process that no file backs, on Linux; 0 elsewhere."""
    status = Path('/proc/self/status')
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith('RssAnon')), 0)


def microseconds(get_batch, first):
    found = []
    for step in range(first, first + batches + batches // 10):
        start = time.perf_counter()
        get_batch(step)
        found.append((time.perf_counter() - start) * 1e6)
    return found[batches // 10:]


overrides.apply(globals())
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as temporary:
    places = write_documents(Path(temporary))
    ids = np.memmap(Path(temporary) / 'train.bin', dtype='<u2', mode='r')
    windows, packed = readers.Windows(ids, BLOCK), readers.Packed(ids, BLOCK, END, True)
    sides = {'windows': ours(windows), 'windows, shuffle': ours(windows, 'shuffle'),
             'windows, mask_prob=0.15': ours(windows, mask_prob=0.15),
             'packed': ours(packed), 'packed, shuffle': ours(packed, 'shuffle'),
             'padded': ours(readers.Padded(ids, BLOCK, places, END, 'cut'))}
    if nanogpt:
        sides = {'nanoGPT': theirs(Path(temporary))} | sides
    found = {name: [] for name in sides}
    for turn in range(turns):
        for name, get_batch in sides.items():
            found[name] += microseconds(get_batch, turn * 2 * batches)
    middle = {name: statistics.median(times) for name, times in found.items()}
    for name, get_batch in sides.items():
        for step in range(1000):
            get_batch(step)
        before = anonymous_memory()
        for step in range(1000, 3000):
            get_batch(step)
        beside = f', 1/{middle["nanoGPT"] / middle[name]:.1f} of nanoGPT' if nanogpt and name != 'nanoGPT' else ''
        print(f'{name + ":":<24} {middle[name]:7.1f} us a batch, {middle[name] / middle["windows"]:5.2f} x windows'
              f'{beside}; RssAnon {anonymous_memory() - before:+,} KiB over 2,000 batches')
