"""Saves beside the training: the file holds the state as it was, and what became of a save is said by who waits."""

import copy
import math
import subprocess
import sys
import threading
import zipfile

import pytest
import torch
from conftest import ROOT, TINY, hooked_script
from test_checkpoints import PLACES, flip, state, steps, with_moments

from kit.learn import optimizers
from kit.state import checkpoints
from kit.state.writer import Copies, Writer
from model import GPT, GPTConfig


@pytest.fixture
def gate(monkeypatch):
    """An Event: no checkpoint is written before it is set."""
    event, sound = threading.Event(), torch.save

    def save(*args):
        assert event.wait(60)
        sound(*args)
    monkeypatch.setattr(torch, 'save', save)
    yield event
    event.set()


def test_what_is_written_is_the_state_of_the_call(tmp_path, gate):
    """The training goes on: weights and moments move, settings change."""
    saved = with_moments(5) | {'config': {'max_iters': 10}, 'val_losses': [3.0, 2.0]}
    before = copy.deepcopy(saved)
    writer = Writer(tmp_path, 0)
    writer.write(saved, ['ckpt.pt'])
    saved['model']['transformer.wpe.weight'].fill_(-1)
    saved['ema']['transformer.wpe.weight'].mul_(-1)
    saved['optimizer']['state'][0]['exp_avg'].add_(1)
    saved['optimizer']['param_groups'][0]['lr'] = 9
    saved['config']['max_iters'] = 99
    saved['val_losses'].append(1.0)
    saved['iter_num'] = 6
    assert not (tmp_path / 'ckpt.pt').exists()  # it was not waited for
    gate.set()
    assert writer.wait()
    found = checkpoints.read(tmp_path / 'ckpt.pt', resume=True)
    assert not differences(found, before | {'parameters': ['transformer.wpe.weight']})


def differences(a, b, place=''):
    """Where two checkpoints differ, in values, types, layouts or attributes such as _metadata."""
    if type(a) is not type(b) or getattr(a, '_metadata', 0) != getattr(b, '_metadata', 0):
        return [place]
    if isinstance(a, torch.Tensor):
        is_same = (a.dtype, a.shape, a.layout) == (b.dtype, b.shape, b.layout) and (
            a.layout != torch.strided or (a.stride(), a.storage_offset()) == (b.stride(), b.storage_offset()))
        return [] if is_same and torch.equal(a.to_dense(), b.to_dense()) else [place]
    if isinstance(a, dict):
        return [place] if [*a] != [*b] else [
            found for key in a for found in differences(a[key], b[key], f'{place}/{key}')]
    if isinstance(a, list | tuple):
        return [place] if len(a) != len(b) else [
            found for i, pair in enumerate(zip(a, b)) for found in differences(*pair, f'{place}/{i}')]
    return [] if a == b else [place]


def test_the_same_file_as_without_a_thread(tmp_path):
    """All kinds of tensors, views and empty ones; tied weights are stored once; modules keep their versions."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=16))
    optimizer = optimizers.adamw(model, 0.1, 1e-3, (0.9, 0.99))
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    whole = torch.arange(12.0).reshape(3, 4)
    kinds = torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.complex64, torch.int64, torch.bool
    saved = state(1) | {
        'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'random_states': checkpoints.random_states(),
        'views': [whole, whole.T, whole[1:, 2], whole[:0], torch.zeros(1).expand(5)],
        'kinds': [torch.ones(3, dtype=kind) for kind in kinds],
        'odd': [torch.zeros(0), torch.zeros(2, 0), torch.tensor(3), torch.eye(3).to_sparse(), (1, 'a', None)]}
    assert checkpoints.save(saved, tmp_path / 'a', ['ckpt.pt'])
    writer = Writer(tmp_path / 'b', 0)
    writer.write(saved, ['ckpt.pt'])
    assert writer.wait()
    files = [tmp_path / folder / 'ckpt.pt' for folder in 'ab']
    a, b = (torch.load(file, weights_only=True) for file in files)
    assert not differences(a, b), differences(a, b)
    assert a['model']._metadata
    sizes = [sorted(info.file_size for info in zipfile.ZipFile(file).infolist() if '/data/' in info.filename)
             for file in files]
    assert sizes[0] == sizes[1]  # what is shared is stored once
    tied = [b['model'][name].data_ptr() for name in ('transformer.wte.weight', 'lm_head.weight')]
    assert tied[0] == tied[1]


def test_copies_share_what_the_tensors_share_and_nothing_else(tmp_path):
    a, b = torch.arange(4.0), torch.arange(4.0)
    copies = Copies()
    row, column, other, turned = copies.take([a, a[2:], b, torch.tensor([1 + 2j]).conj()])
    a[3] = 9
    assert row.tolist() == [0, 1, 2, 3] and column.tolist() == [2, 3] and turned.tolist() == [1 - 2j]
    row[2] = 7
    assert column.tolist() == [7, 3] and other.tolist() == b.tolist()
    places = [tensor.data_ptr() for tensor in (row, other)]
    for few in [b, a], [b]:
        again = copies.take(few)
        assert [tensor.tolist() for tensor in again] == [tensor.tolist() for tensor in few]
        assert [tensor.data_ptr() for tensor in again] == places[:len(few)]  # the memory of the copy before
    assert copies.take([torch.ones(9), a])[0].tolist() == [1] * 9 and row.tolist() == [0, 1, 2, 3]  # of another size


def test_the_next_write_waits_for_the_one_before(tmp_path, monkeypatch):
    """Each is whole when the next begins, in the order of the calls; first() comes before each."""
    order, sound = [], checkpoints.write

    def write(checkpoint, *args, **options):
        order.append(f'begin {checkpoint["iter_num"]}')
        failure = sound(checkpoint, *args, **options)
        order.append(f'end {checkpoint["iter_num"]}')
        return failure
    monkeypatch.setattr(checkpoints, 'write', write)
    writer = Writer(tmp_path, 2)
    for step in 1, 2, 3:
        writer.write(state(step), [f'step_{step:07d}.pt', 'ckpt.pt'], first=lambda step=step: order.append(step))
    assert writer.wait()
    assert order == [word for step in (1, 2, 3) for word in (step, f'begin {step}', f'end {step}')]
    assert steps(tmp_path) == {'ckpt.pt': 3, 'step_0000002.pt': 2, 'step_0000003.pt': 3}  # the others are deleted
    assert writer.wait() is None, 'nothing was written since'


@pytest.mark.parametrize('name', PLACES)
def test_a_write_that_fails_is_said_once_by_who_waits(tmp_path, capsys, name):
    writer = Writer(tmp_path, 0)
    writer.write(state(1), ['ckpt.pt'])
    spoilt = with_moments(2)
    PLACES[name](spoilt)[3, 4] = math.nan
    writer.write(spoilt, ['step_0000002.pt', 'ckpt.pt'])
    writer.thread.join()
    assert not any(capsys.readouterr())  # the order of lines in the log does not depend on the time that a write takes
    assert not writer.wait()
    told = capsys.readouterr()
    assert told.out == (f'WARNING: no checkpoint was saved to {tmp_path} ({name} holds numbers that are not finite); '
                        'the older ones are untouched and training goes on\n')
    assert not told.err and writer.wait() is None and not any(capsys.readouterr())
    assert steps(tmp_path) == {'ckpt.pt': 1}
    writer.write(spoilt, ['ckpt.pt'])
    writer.write(state(3), ['ckpt.pt'])  # prints the line, and wait() knows of it
    assert capsys.readouterr().out.count('WARNING') == 1
    assert writer.wait() is False and writer.wait() is None and steps(tmp_path) == {'ckpt.pt': 3}


@pytest.mark.parametrize('n_processes', [1, 2])
def test_a_run_that_ends_in_the_middle_of_a_write_waits_for_it(run, pair, tiny, n_processes):
    """Here by --debug_nan, which leaves at once: the checkpoint is there, and the log has what was to be said of it."""
    code = ('''
import time, torch, model
from kit.data import batches
from kit.state import checkpoints
sound_write, sound_forward = checkpoints.write, model.GPT.forward
def write(*args, **kwargs):
    time.sleep(0.5)
    args[4]('a line of the write')
    return sound_write(*args, **kwargs)
def forward(self, *args, **kwargs):
    logits, loss = sound_forward(self, *args, **kwargs)
    return logits, loss * float('nan') if torch.initial_seed() == batches.torch_seed(1337, 6, 0) else loss
checkpoints.write, model.GPT.forward = write, forward
''')
    script = hooked_script(tiny, code)
    args = '--debug_nan', '--gradient_accumulation_steps=2'
    result = pair(*args, script=script) if n_processes == 2 else run(script, '--dataset=tiny', *TINY, *args)
    assert result.status == 1 and 'debug_nan: step 6' in result.out, result.out + result.err
    assert steps(tiny / 'checkpoints')['ckpt.pt'] == 5
    assert 'a line of the write' in (tiny / 'checkpoints/training.log').read_text()


def test_who_does_not_block_goes_on(tmp_path, monkeypatch):
    may_go_on = threading.Event()
    writer = Writer(tmp_path, 0)
    writer.write(state(1), ['ckpt.pt'], first=may_go_on.wait)
    writer.wait(block=False)
    assert writer.is_writing and not (tmp_path / 'ckpt.pt').exists()
    may_go_on.set()
    writer.thread.join()
    writer.wait(block=False)
    assert writer.thread is None and steps(tmp_path) == {'ckpt.pt': 1}
    assert writer.wait() is True and writer.wait() is None, 'how it went is for who blocks'


@pytest.mark.parametrize('where', ['copy', 'thread', 'first', 'prune'])
def test_no_failure_goes_unsaid_or_ends_the_run(tmp_path, monkeypatch, capsys, where):
    checkpoints.save(state(1), tmp_path, ['ckpt.pt'])

    def fail(*args, **kwargs):
        raise MemoryError('no memory')
    if where == 'copy':
        monkeypatch.setattr(torch.UntypedStorage, 'copy_', fail)
    elif where == 'thread':
        monkeypatch.setattr(threading.Thread, 'start', fail)
    elif where == 'prune':
        monkeypatch.setattr(checkpoints, 'interval_checkpoints', fail)
    writer = Writer(tmp_path, 1)
    writer.write(state(2), ['ckpt.pt'], first=fail if where == 'first' else None)
    assert not writer.wait()
    out = capsys.readouterr().out
    assert out.startswith('WARNING: ') and out.count('\n') == 1 and 'no memory' in out
    assert steps(tmp_path) == {'ckpt.pt': 2 if where == 'prune' else 1}


def test_stop_on_error_ends_the_script_at_the_wait(tmp_path, capsys):
    writer = Writer(tmp_path, 0, stop_on_error=True)
    writer.write(state(1), ['ckpt.pt'])
    assert writer.wait()
    writer.write(state(math.nan), ['ckpt.pt'])
    with pytest.raises(SystemExit) as end:
        writer.wait()
    told = capsys.readouterr()
    assert end.value.code == 1 and not told.out and told.err.startswith('no checkpoint was saved')
    assert told.err.count('\n') == 1 and writer.wait() is False
    assert writer.wait() is None and not any(capsys.readouterr()), 'said once'


def test_best_is_guarded_by_the_loss_on_the_disk(tmp_path, capsys):
    writer = Writer(tmp_path, 0)
    for step, loss in (1, 2.0), (2, 3.0):
        writer.write(state(step, loss), ['best.pt', 'ckpt.pt'])
    assert writer.wait() and steps(tmp_path) == {'best.pt': 1, 'ckpt.pt': 2}
    assert capsys.readouterr().out == f'{tmp_path / "best.pt"} stays: it is better, or cannot be read\n'
    flip(tmp_path / 'best.pt')
    writer.write(state(3, 3.0), ['best.pt', 'ckpt.pt'])
    assert writer.wait() and steps(tmp_path) == {'best.pt': 3, 'ckpt.pt': 3}


SCRIPT = '''
import sys, threading, time
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from test_checkpoints import state
from kit.state.writer import Writer
sound = torch.save
def save(*args):
    time.sleep(0.5)
    sound(*args)
torch.save = save
writer = Writer('run', 0)
saved = state(7)
if {spoil}:
    saved['model']['transformer.wpe.weight'][0] = float('nan')
writer.write(saved, ['ckpt.pt'])
raise ValueError('of the training')
'''


@pytest.mark.parametrize('spoil', [False, True])
def test_an_exception_elsewhere_lets_the_write_end(tmp_path, spoil):
    """And what there was to say of it is said."""
    script = SCRIPT.format(root=str(ROOT), tests=str(ROOT / 'tests'), spoil=spoil)
    done = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('Traceback') == 1 and 'of the training' in done.stderr
    assert ('WARNING: no checkpoint was saved' in done.stdout) == spoil
    assert [path.name for path in (tmp_path / 'run').glob('*')] == ([] if spoil else ['ckpt.pt'])


def test_what_lies_on_a_gpu_comes_to_the_host_once(monkeypatch):
    fetched, sound = [], torch.UntypedStorage.copy_

    def fetch(here, there):
        fetched.append(there)
        return sound(here, there)
    weights = torch.arange(4.0)
    monkeypatch.setattr(torch.UntypedStorage, 'device', property(lambda storage: torch.device('cuda', 0)))
    monkeypatch.setattr(torch.UntypedStorage, 'copy_', fetch)
    one, other = Copies().take({'model': {'a': weights, 'b': weights.view(2, 2)}})['model'].values()
    assert one.tolist() == [0, 1, 2, 3] and other.tolist() == [[0, 1], [2, 3]] and len(fetched) == 1
