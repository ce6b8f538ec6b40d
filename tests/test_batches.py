"""Which tokens a step sees: promise 1, against brute force."""

import numpy as np
import pytest
import torch
from conftest import fetch
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.data import batches, readers

sizes = given(n_tokens=st.integers(2, 400), block_size=st.integers(1, 40), rows=st.integers(1, 30),
              seed=st.integers(0, 5), step=st.integers(0, 50))


@sizes
@settings(deadline=None)
def test_windows_lie_inside(n_tokens, block_size, rows, seed, step):
    if n_tokens < block_size + 1:
        return
    for sampling in 'random', 'shuffle', 'sequential':
        starts = batches.window_starts(n_tokens, block_size, rows, seed, step, sampling)
        assert starts.shape == (rows,) and starts.min() >= 0 and starts.max() + block_size + 1 <= n_tokens


def test_unigram_entropy():
    ids = np.repeat(np.arange(4), [500, 250, 125, 125])
    assert batches.unigram_entropy(ids) == pytest.approx(1.75 * np.log(2))  # bits of this distribution
    assert batches.unigram_entropy(np.zeros(100, np.uint16)) == 0


def test_windows_are_nanogpts():
    data = np.random.default_rng(0).integers(65, size=1000).astype(np.uint16)
    starts = np.array([0, 5, 991, 5])
    mine = [torch.from_numpy(a.astype(np.int64)) for a in fetch(readers.Windows(data, 8), starts)[:2]]
    x = torch.stack([torch.from_numpy(data[i:i + 8].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(data[i + 1:i + 9].astype(np.int64)) for i in starts])
    assert torch.equal(mine[0], x) and torch.equal(mine[1], y)


def test_random_is_uniform_and_differs_between_steps_and_seeds():
    draw = lambda seed, step: batches.window_starts(108, 8, 20_000, seed, step, 'random')
    counts = np.bincount(draw(0, 0), minlength=100)
    assert len(counts) == 100 and counts.min() > 120 and counts.max() < 280  # 200 each, 5 sigma
    assert np.array_equal(draw(0, 1), draw(0, 1))
    assert not np.array_equal(draw(0, 0), draw(0, 1)) and not np.array_equal(draw(0, 0), draw(1, 0))


@pytest.mark.parametrize('n_tokens, block_size, rows', [(1000, 8, 7), (103, 10, 4), (11, 10, 3), (64, 8, 64)])
def test_shuffle_visits_every_block_once_an_epoch(n_tokens, block_size, rows):
    blocks = batches.blocks_per_epoch(n_tokens, block_size)
    steps = -(-3 * blocks // rows)
    starts = np.concatenate([batches.window_starts(n_tokens, block_size, rows, 0, s, 'shuffle') for s in range(steps)])
    offsets = []
    for epoch in range(3):
        mine = np.sort(starts[epoch * blocks:(epoch + 1) * blocks])
        assert np.array_equal(np.diff(mine), np.full(blocks - 1, block_size))  # each once, none twice
        offsets.append(mine[0])
    if n_tokens == 1000:
        assert len(set(offsets)) > 1  # shifted
        assert not np.array_equal(starts[:blocks] - offsets[0], starts[blocks:2 * blocks] - offsets[1])  # a new order


def test_sequential_reads_on():
    starts = [batches.window_starts(50, 7, 4, 0, step, 'sequential').tolist() for step in range(2)]
    assert starts == [[0, 7, 14, 21], [28, 35, 42, 0]]  # 49 targets are 7 blocks, the eighth row begins again


@sizes
@settings(deadline=None)
def test_evaluation_counts_every_target_once(n_tokens, block_size, rows, seed, step):
    if n_tokens < block_size + 1:
        return
    starts, skip = batches.evaluation_windows(n_tokens, block_size, 0)
    targets = [t for start, s in zip(starts, skip) for t in range(start + 1 + s, start + 1 + block_size)]
    assert sorted(targets) == list(range(1, n_tokens))


@sizes
@settings(deadline=None)
def test_evaluation_windows_are_spread_evenly(n_tokens, block_size, rows, seed, step):
    whole = (n_tokens - 1) // block_size
    if not rows < whole:
        return
    starts, skip = batches.evaluation_windows(n_tokens, block_size, rows)
    gaps = np.diff(np.append(starts, starts[0] + whole * block_size)) // block_size
    assert len(starts) == rows and not skip.any()
    assert gaps.min() >= whole // rows and gaps.max() <= -(-whole // rows)
    assert not (starts % block_size).any() and starts[-1] + block_size + 1 <= n_tokens


def test_seeds_differ_by_step_and_rank():
    seeds = {batches.torch_seed(seed, step, rank) for seed in range(5) for step in range(20) for rank in range(4)}
    assert len(seeds) == 400 and all(0 <= s < 2**63 for s in seeds)
