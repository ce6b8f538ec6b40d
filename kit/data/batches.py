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
    """A 63-bit seed for torch's generators from a key of non-negative ints."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_all(seed):
    """Seed every global generator: torch's own, and those that code added to a script may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def apportion(n, weights):
    """
    How many of the first n rows each of several datasets has, less than one away from its share of them where they are
    two, and no more than some where they are many. Functions of n that never fall, so what a step has of each is known
    without its past.
    """
    counts, rest, left = [], n, sum(weights)
    for weight in weights[:-1]:
        counts.append(int(rest * (weight / left)))
        rest, left = rest - counts[-1], left - weight
    return [*counts, rest]


# ---------------------------------------------------------------------------------------------------------------------
# windows


def window_starts(n_tokens, block_size, rows, seed, step, sampling, rewinds=0, first=None, number=0):
    """
    Where the `rows` windows of a step begin, (rows,) int64. A window holds block_size inputs and one more target.
    rewinds: how often the run went back to a checkpoint over bad numbers; each time other text comes.
    first: how many rows the steps before it took, if not step * rows. number: of the dataset in a mixture.

    random:     anywhere, with replacement, as in nanoGPT
    shuffle:    every block of block_size tokens once an epoch, in a new order and shifted by a new offset each time
    sequential: one block after the other through the text, and again
    """
    if sampling == 'random':
        return generator(seed, step, rewinds, number).integers(n_tokens - block_size, size=rows)
    first = step * rows if first is None else first
    places = np.arange(first, first + rows)
    if sampling == 'sequential':
        blocks = rows_per_epoch(n_tokens, block_size, sampling)
        return (places + rewinds * (blocks // 2)) % blocks * block_size
    blocks = blocks_per_epoch(n_tokens, block_size)
    starts = np.empty(rows, dtype=np.int64)
    for epoch in np.unique(places // blocks):
        here = places // blocks == epoch
        offset, order = shuffled_blocks(n_tokens, block_size, seed, int(epoch), rewinds, number)
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


@lru_cache(maxsize=8)  # a step can straddle two epochs, of each dataset of a mixture
def shuffled_blocks(n_tokens, block_size, seed, epoch, rewinds=0, number=0):
    """(offset, order) of an epoch of sampling = shuffle."""
    blocks = blocks_per_epoch(n_tokens, block_size)
    draw = generator(seed, epoch, 1, rewinds, number)  # the 1 keeps these draws apart from a step's
    offset = draw.integers(min(block_size, n_tokens - blocks * block_size))
    return int(offset), draw.permutation(blocks)


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


# ---------------------------------------------------------------------------------------------------------------------
# packed documents

PACKED_TOGETHER = 1 << 20  # tokens: documents this near to each other can share a row


def document_ends(data, end_of_text, chunk=1 << 24):
    """Where the documents of a token array end, behind their end_of_text; the last may lack its own."""
    ends = [i + 1 + np.flatnonzero(data[i:i + chunk] == end_of_text) for i in range(0, len(data), chunk)]
    ends = np.concatenate(ends)
    return ends if len(ends) and ends[-1] == len(data) else np.append(ends, len(data))


def pack(ends, block_size):
    """
    Pack documents into rows of block_size tokens, whole where they fit: each gap takes the longest piece that fits it
    (best fit, Ding et al. 2024, arXiv:2404.10830); where none does, the shortest of the longer ones is cut, so that no
    row but the last has a gap and every token stands in one row.

    ends: where each document ends. Returns (starts, lengths, ends_of_rows): the pieces, row by row, and for each row
    how many pieces there are up to its end. All int64.
    """
    starts, lengths = np.concatenate([[0], ends[:-1]]), np.diff(ends, prepend=0)
    bounds = np.searchsorted(ends, np.arange(PACKED_TOGETHER, ends[-1] + PACKED_TOGETHER, PACKED_TOGETHER)) + 1
    rows, total = [], 0  # [(start, length), ...] a row; the tokens that wait for one
    waiting, sizes = [[] for _ in range(block_size + 1)], 0  # starts by length, and a bit for each length that waits

    def wait(start, length):
        nonlocal sizes
        waiting[length].append(start)
        sizes |= 1 << length

    def take(length):
        nonlocal sizes
        start = waiting[length].pop()
        if not waiting[length]:
            sizes ^= 1 << length
        return start

    for first, last in zip([0, *bounds], bounds):
        rows_here = []
        for start, length in zip(starts[first:last].tolist(), lengths[first:last].tolist()):
            n_whole, rest = divmod(length, block_size)
            rows_here += [[(start + i * block_size, block_size)] for i in range(n_whole)]
            if rest:
                wait(start + length - rest, rest)
                total += rest
        while total >= block_size or total and last >= len(ends):
            row, space = [], min(block_size, total)
            total -= space
            while space:
                if fitting := sizes & ((2 << space) - 1):
                    length = fitting.bit_length() - 1
                    row.append((take(length), length))
                else:
                    longer = sizes >> space
                    length = space + (longer & -longer).bit_length() - 1
                    start = take(length)
                    row.append((start, space))
                    wait(start + space, length - space)
                    length = space
                space -= length
            rows_here.append(row)
        rows_here.sort(key=lambda row: (sum(length for _, length in row) < block_size, row[0]))  # the short one last
        rows += rows_here
    pieces = np.array([piece for row in rows for piece in row], dtype=np.int64)
    return pieces[:, 0], pieces[:, 1], np.cumsum([len(row) for row in rows])


# ---------------------------------------------------------------------------------------------------------------------
# pairs

SORTED_TOGETHER = 50  # steps: over so many, rows of about the same length are brought together


def by_length(order, lengths, rows, first, draw):
    """
    The rows of an epoch, reordered so that those of a step have about the same length, and their padding is small.
    order: (n,) row numbers; rows: in a step; first: the place of order[0] among the rows of all epochs, which may lie
    within a step; draw: the generator that puts the steps into a random order again.
    """
    head = -first % rows
    pieces = [order[:head]]
    for start in range(head, len(order), rows * SORTED_TOGETHER):
        piece = order[start:start + rows * SORTED_TOGETHER]
        piece = piece[np.argsort(lengths[piece], kind='stable')]
        n_steps = len(piece) // rows
        steps = piece[:n_steps * rows].reshape(n_steps, rows)[draw.permutation(n_steps)]
        pieces += [steps.ravel(), piece[n_steps * rows:]]
    return np.concatenate(pieces)


# ---------------------------------------------------------------------------------------------------------------------
# masks


def noise(rows, block_size, *key):
    """What decides which tokens of a step are corrupted: (rows, block_size) numbers in [0, 1), all of a step's rows."""
    return generator(*key, 0, 0, 1).random((rows, block_size))  # a key longer than those that draw rows


def is_corrupted(noise, lengths, share):
    """
    Which places of rows, (n, T) bool: each with the probability share, and in each row at least one, so that a row is
    never without a target. lengths: (n,), what lies beyond is no token.
    """
    noise = np.where(np.arange(noise.shape[1]) < lengths[:, None], noise, 1.0)
    return (noise < share) | (noise == noise.min(axis=1, keepdims=True)) & (noise < 1)


def corrupt(x, noise, chosen, share, n_ids, mask):
    """
    Tokens (n, T) with the chosen ones corrupted: 80% become mask, 10% any of n_ids, 10% stay as they are (Devlin et al.
    2018, arXiv:1810.04805). The same number that chose a token says what becomes of it.
    """
    kind = np.where(noise < share, noise / share, 0.0)  # of the chosen ones uniform in [0, 1)
    other = np.clip((kind - 0.8) / 0.1 * n_ids, 0, n_ids - 1).astype(np.int64)
    return np.where(chosen & (kind < 0.8), mask, np.where(chosen & (kind < 0.9), other, x))


# ---------------------------------------------------------------------------------------------------------------------
# figures


def unigram_entropy(ids):
    """Nats a token, of at most a million of ids: the loss of who knows how frequent each token is, and nothing else."""
    pieces = [ids[i:i + 4096] for i in range(0, len(ids), max(1, len(ids) // 2**20) * 4096)]
    counts = np.bincount(np.concatenate(pieces))
    shares = counts[counts > 0] / sum(map(len, pieces))
    return float(-(shares * np.log(shares)).sum())
