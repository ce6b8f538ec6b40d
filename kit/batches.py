"""
Which tokens a step sees, and how they are fetched. Arrays in, arrays out.

The rows of a step are a function of (seed, step) alone (promise 1): they are all drawn here, for every micro-step and
every rank, and the caller takes its slice of them.
"""

import random
from functools import lru_cache

import numpy as np
import torch


def generator(*key):
    """NumPy's generator for a key of non-negative ints: the same key, the same numbers. Zeros at its end count not."""
    return np.random.default_rng(key)


def torch_seed(*key):
    """A 63-bit seed for torch.manual_seed from a key of non-negative ints."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_all(seed):
    """Seed every global generator: torch's own, and those that code added to a script may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def window_starts(n_tokens, block_size, rows, seed, step, sampling, rewinds=0):
    """
    Where the `rows` windows of a step begin, (rows,) int64. A window holds block_size inputs and one more target.
    rewinds: how often the run went back to a checkpoint over bad numbers; each time other text comes.

    random:     anywhere, with replacement, as in nanoGPT
    shuffle:    every block of block_size tokens once an epoch, in a new order and shifted by a new offset each time
    sequential: one block after the other through the text, and again
    """
    if sampling == 'random':
        return generator(seed, step, rewinds).integers(n_tokens - block_size, size=rows)
    places = np.arange(step * rows, (step + 1) * rows)
    if sampling == 'sequential':
        blocks = rows_per_epoch(n_tokens, block_size, sampling)
        return (places + rewinds * (blocks // 2)) % blocks * block_size
    blocks = blocks_per_epoch(n_tokens, block_size)
    starts = np.empty(rows, dtype=np.int64)
    for epoch in np.unique(places // blocks):
        here = places // blocks == epoch
        offset, order = shuffled_blocks(n_tokens, block_size, seed, int(epoch), rewinds)
        starts[here] = offset + order[places[here] % blocks] * block_size
    return starts


def rows_per_epoch(n_tokens, block_size, sampling):
    """How many rows make an epoch; of random windows, as many as have the tokens of the text."""
    if sampling == 'random':
        return n_tokens / block_size
    return blocks_per_epoch(n_tokens, block_size) if sampling == 'shuffle' else (n_tokens - 1) // block_size


def blocks_per_epoch(n_tokens, block_size):
    """Of sampling = shuffle: one less than fit, so that the offset of an epoch can be anything below block_size."""
    return max(1, n_tokens // block_size - 1)


@lru_cache(maxsize=2)  # a step can straddle two epochs
def shuffled_blocks(n_tokens, block_size, seed, epoch, rewinds=0):
    """(offset, order) of an epoch of sampling = shuffle."""
    blocks = blocks_per_epoch(n_tokens, block_size)
    draw = generator(seed, epoch, 1, rewinds)  # the 1 keeps these draws apart from a step's
    offset = draw.integers(min(block_size, n_tokens - blocks * block_size))
    return int(offset), draw.permutation(blocks)


def windows(data, starts, block_size):
    """The windows of a token array that begin at starts: (rows, block_size + 1), copied in one strided gather."""
    return np.lib.stride_tricks.sliding_window_view(data, block_size + 1)[starts]


def evaluation_windows(n_tokens, block_size, rows):
    """
    Non-overlapping windows, evenly spaced and the same each time: (starts, skip), both (n,) int64.

    rows: how many; 0, or more than there are, takes every target of the text once. Its last, incomplete window then
    begins earlier and skips as many targets as were counted before (skip is 0 elsewhere).
    """
    whole = (n_tokens - 1) // block_size
    if 0 < rows < whole:
        starts = np.arange(rows) * whole // rows * block_size
        return starts, np.zeros(rows, dtype=np.int64)
    starts = np.arange(whole) * block_size
    skip = np.zeros(whole, dtype=np.int64)
    rest = n_tokens - 1 - whole * block_size
    if rest:
        starts, skip = np.append(starts, n_tokens - 1 - block_size), np.append(skip, block_size - rest)
    return starts, skip
