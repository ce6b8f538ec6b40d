"""Measures: one number for the same weights in each script, on a CPU in float32, in batches of a size of their own."""

import json
import re
import weakref

import numpy as np
import pytest
import torch
from conftest import hooked_script, records
from torch._dynamo.testing import CompileCounter

from kit.base import devices, ranks
from kit.data import readers
from kit.watch import evaluation
from model import GPT, GPTConfig

CPU, CUDA = torch.device('cpu'), torch.device('cuda', 0)
# 20 rows side by side, so that the last batch of each split has another size; and what is measured, with all its digits
TELL = '''
from kit.watch import evaluation
sound, evaluation.AT_ONCE_ON_A_CPU = evaluation.measure, 320
def measure(*args):
    found = sound(*args)
    print('measured', found)
    return found
evaluation.measure = measure
'''


def measured(result):
    """The losses that TELL has printed."""
    assert result.status == 0, result.err
    return [float(loss) for loss in re.findall(r'(?m)^measured \((.*),', result.out)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=27, dropout=0.3, bias=False))


@pytest.fixture
def rows():
    data = np.random.default_rng(0).integers(27, size=16 * 50 + 5).astype(np.uint16)
    return readers.Rows(['x'], [readers.Windows(data, 16)], [1.0])


def test_one_measure_for_all_scripts(hooked, run, tiny):
    """To the last digit, and in the lines: after a training in bfloat16, and with other batch sizes."""
    folder = tiny / 'data/tiny'
    (folder / 'test.bin').unlink()  # so that --test takes val
    meta = json.loads((folder / 'meta.json').read_text())
    del meta['files']['test']
    (folder / 'meta.json').write_text(json.dumps(meta))
    trained = hooked(TELL, '--dtype=bfloat16', '--eval_iters=0', '--eval_interval=0', '--max_iters=6')
    args = '--out_dir=checkpoints', '--checkpoint=checkpoints/ckpt.pt', '--batch_size=3'
    tested = hooked(TELL, '--test', *args)
    averaged = run(hooked_script(tiny, TELL, 'checkpoint_averaging.py'), '--num_checkpoints=1', '--device=cpu')
    again = hooked(TELL, '--eval_only', '--init_from=resume', '--eval_iters=0', '--batch_size=5')
    loss = measured(trained)[-1]
    assert measured(tested) == [loss] and set(measured(averaged)) == {loss} and measured(again)[-1] == loss
    assert loss == records(tiny / 'checkpoints')[-1]['val/loss']
    assert f'val loss {loss:.4f}, val accuracy' in trained.out and f'val loss {loss:.4f}, perplexity' in tested.out
    assert f'val loss {loss:.4f}: best.pt (the newest)' in averaged.out
    for result in tested, averaged, again:
        assert 'dtype: float32 (in which all is measured on a CPU)\n' in result.out
    assert '\ndtype: bfloat16 (as asked' in trained.out
    gone = run('checkpoint_averaging.py', '--batch_size=4')
    assert gone.status == 2 and '--batch_size: there is no such setting' in gone.err


@pytest.mark.parametrize('ranks_here', [1, 3])
def test_all_batches_count_once(model, rows, monkeypatch, ranks_here):
    """50 rows, 7 at once, and what stands behind the last of them: against the mean over all targets at once."""
    monkeypatch.setattr(evaluation, 'rows_at_once', lambda model, device: 7)
    found, totals = [], []
    monkeypatch.setattr(ranks, 'world_size', ranks_here)
    monkeypatch.setattr(ranks, 'total', lambda sums: totals.append(sums.clone()) or sum(totals))
    for rank in range(ranks_here):
        monkeypatch.setattr(ranks, 'rank', rank)
        found.append(evaluation.measure(model, rows, 0, CPU, 'bfloat16'))
    data = torch.from_numpy(rows.readers[0].data.astype(np.int64))
    with torch.no_grad():
        losses = evaluation.token_losses(model, *rows.fetch(np.arange(len(data) - 16)), CPU, 'float32')
        places = np.arange(len(data) - 1)
        begin = np.minimum(places // 16 * 16, len(data) - 17)  # the window that a target is measured in
        expected = losses[begin, places - begin].mean()
    assert model.training and totals[-1].dtype == torch.float64
    assert found[-1][0] == pytest.approx(expected, rel=1e-6) and sum(totals)[2] == len(places)


def test_no_logits_outlive_their_batch(model, rows, monkeypatch):
    monkeypatch.setattr(evaluation, 'rows_at_once', lambda model, device: 7)
    seen, forward = [], model.forward

    def watched(*args):
        assert all(logits() is None for logits in seen)
        logits, loss = forward(*args)
        seen.append(weakref.ref(logits))
        return logits, loss
    model.forward = watched
    evaluation.measure(model, rows, 0, CPU, 'float32')
    assert len(seen) == 8


def test_a_compiled_model_makes_one_graph_for_measures(model, rows, monkeypatch):
    """It is made by warm_up, of rows of a training; shares of a mixture and a replay add none."""
    monkeypatch.setattr(evaluation, 'rows_at_once', lambda model, device: 7)
    eager = evaluation.measure(model, rows, 0, CPU, 'float32'), evaluation.measure(model, rows, 5, CPU, 'float32')
    torch.compiler.reset()
    graphs = CompileCounter()
    model.compile(backend=graphs)
    batch = [torch.from_numpy(a.astype(np.int64)) for a in rows.fetch(np.arange(3))[:2]]
    evaluation.warm_up(model, *batch, None, CPU, 'bfloat16')
    compiled = evaluation.measure(model, rows, 0, CPU, 'bfloat16'), evaluation.measure(model, rows, 5, CPU, 'bfloat16')
    assert len(evaluation.token_losses(model, *rows.fetch(np.arange(9)), CPU, 'bfloat16')) == 9
    torch.compiler.reset()
    assert graphs.frame_count == 1
    for found, expected in zip(compiled, eager):
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('device, gib, vocab_size, expected', [
    (CPU, 24, 97, 4096 // 64), (CPU, 24, 50304, 3201 // 64), (CPU, 0.01, 50304, 1), (CUDA, 80, 97, 2**15 // 64),
    (CUDA, 80, 50304, 10673 // 64)])
def test_rows_at_once_go_by_vocabulary_and_memory(monkeypatch, device, gib, vocab_size, expected):
    """By all that there is, not by what is free: that is another number in another script."""
    monkeypatch.setattr(devices, 'total_memory', lambda device: gib * 2**30)
    model = torch.nn.Module()
    model.config = GPTConfig(block_size=64, vocab_size=vocab_size)
    assert evaluation.rows_at_once(model, device) == expected
    monkeypatch.undo()
    assert 2**30 < devices.total_memory(CPU) < 2**50
