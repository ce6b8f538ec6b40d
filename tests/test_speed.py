"""What makes a step fast, and what chooses it: attention written out, dropout, threads, compiling; and what is told."""

import math
import os
import platform
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, losses
from torch.nn import functional as F

import attention as kernels
from attention import attend, attention_weights, drop
from kit.base import devices, overrides, ranks
from kit.run import first_look
from kit.run.clock import Clock
from kit.watch import inside
from model import GPT, GPTConfig

CPU, CUDA = torch.device('cpu'), torch.device('cuda', 0)


# ---------------------------------------------------------------------------------------------------------------------
# attention, written out


def some(B=2, H=3, T=7, S=7, D=5, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(B, H, n, D, dtype=dtype, requires_grad=True) for n in (T, S, S)]


def documents(T):
    numbers = torch.tensor([[0] * 3 + [1] * (T - 3), [0] * T])
    return kernels.inside_documents(numbers, True, False)  # (B, 1, T, T)


@pytest.mark.parametrize('T, S, mask, is_causal', [
    (7, 7, None, True), (7, 7, None, False), (7, 7, documents(7), False), (1, 9, None, False), (1, 1, None, True),
    (64, 64, None, True),
])
def test_written_out_it_is_torchs_own(T, S, mask, is_causal):
    """Forward and backward, in float64, where nothing but the formula can differ."""
    q, k, v = some(T=T, S=S, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    weights = attention_weights(q, k, mask, is_causal)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, T, dtype=torch.float64))
    torch.testing.assert_close(weights @ v, expected)
    down = torch.randn_like(expected)
    for mine, theirs in zip(torch.autograd.grad(weights @ v, (q, k, v), down),
                            torch.autograd.grad(expected, (q, k, v), down)):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize('dtype, T, dropout, is_written_out', [
    (torch.bfloat16, 256, 0.0, True), (torch.bfloat16, 257, 0.0, False), (torch.float32, 8, 0.0, False),
    (torch.float32, 8, 0.1, True), (torch.bfloat16, 300, 0.1, True),
])
def test_where_it_is_written_out(monkeypatch, dtype, T, dropout, is_written_out):
    took = []
    monkeypatch.setattr(kernels, 'attention_weights', lambda *args: took.append(1) or attention_weights(*args))
    q, k, v = some(B=1, H=1, T=T, S=T, D=2, dtype=dtype)
    y = attend(q, k, v, None, True, dropout)
    assert y.dtype == dtype and y.shape == q.shape and bool(took) == is_written_out


@pytest.mark.parametrize('args', [{}, {'causal': False}, {'dropout': 0.3}])
def test_a_model_in_bfloat16_has_the_loss_of_float32(args):
    """With documents and without: each path, to the rounding of bfloat16; so do its pictures of who looks where."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32, **args))
    x = torch.randint(50, (3, 16))
    for D in None, torch.tensor([[0] * 5 + [1] * 11] * 3):
        found = []
        for dtype in 'float32', 'bfloat16':
            torch.manual_seed(1)
            with devices.autocast(CPU, dtype):
                _, loss = model(x, x.roll(-1, 1), D)
            model.zero_grad()
            loss.backward()
            found.append((loss.item(), model.transformer.wte.weight.grad.norm().item()))
        assert found[0] == pytest.approx(found[1], rel=0.02)
    maps = torch.from_numpy(inside.attention(model, x[0]))  # (L, H, T, T)
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
    assert args.get('causal', True) == (maps.triu(1).abs().sum() == 0).item()


# ---------------------------------------------------------------------------------------------------------------------
# dropout


@pytest.mark.parametrize('p', [0.1, 0.5, 0.9])
def test_dropout_drops_the_share_and_keeps_the_mean(p):
    torch.manual_seed(3)
    x = torch.ones(333, 1001, requires_grad=True)  # no multiple of four
    y = drop(x, p)
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=5 * math.sqrt(p * (1 - p) / x.numel()))
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=1e-4, atol=0)
    assert y.double().mean().item() == pytest.approx(1, abs=0.02)
    slope, = torch.autograd.grad(y.sum(), x)
    assert torch.equal(slope, y)  # what was dropped learns nothing
    flat = kept.flatten()[:x.numel() // 4 * 4].view(-1, 4).double()
    together = (flat.T @ flat / len(flat)).fill_diagonal_((1 - p)**2)  # of those that share one random number
    torch.testing.assert_close(together, torch.full((4, 4), (1 - p)**2, dtype=torch.float64), atol=0.01, rtol=0)


def test_dropout_goes_by_torchs_generator_and_by_the_mode():
    layer, x = kernels.Dropout(0.5), torch.randn(20, 30)
    found = []
    for seed in 0, 1, 0:
        torch.manual_seed(seed)
        found.append(layer(x))
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    assert torch.equal(layer.eval()(x), x) and torch.equal(drop(x, 0.0), x)
    assert (drop(x, 1 - 1e-9) == 0).float().mean() > 0.99 and drop(x.bfloat16(), 0.3).dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# threads


@pytest.fixture
def passes(monkeypatch, capsys):
    """passes(one, all) -> (threads chosen of 8, how many passes were made): ms that a pass takes with so many."""
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)

    def choose(one, several, threads=0, flops=1e9):
        now, timed = [8], []
        monkeypatch.setattr(torch, 'get_num_threads', lambda: now[0])
        monkeypatch.setattr(torch, 'set_num_threads', lambda n: now.__setitem__(0, n))

        def one_pass():
            timed.append(now[0])
            slow = 9 if len(timed) == 1 else 1  # the first one warms up, which must not speak against one thread
            return slow * (one if now[0] == 1 else several) / 1000, 0.0
        s = {'threads': threads}
        first_look.choose_threads(s, one_pass, flops)
        assert s['threads'] == now[0]
        return now[0], len(timed), capsys.readouterr().out
    return choose


@pytest.mark.parametrize('one, several, n, n_passes', [
    (50, 10, 8, 3), (10, 90, 1, 3), (10, 12, 1, 9), (10, 10.5, 8, 9), (11, 10, 8, 9),
])
def test_threads_are_those_that_are_faster(passes, one, several, n, n_passes):
    chosen, timed, out = passes(one, several)
    assert (chosen, timed) == (n, n_passes)
    assert out == f'threads: {n} (a pass takes {several:.1f}ms with 8, {one:.1f}ms with one)\n'


def test_threads_that_are_given_stay(passes, monkeypatch):
    assert passes(1, 99, threads=8) == (8, 0, 'threads: 8 (as the run began)\n')
    monkeypatch.setattr(overrides, 'given', {'threads'})
    assert passes(1, 99, threads=8) == (8, 0, 'threads: 8 (as asked)\n')
    assert passes(1, 99, flops=1e12) == (8, 0, 'threads: 8 (all there are)\n')
    monkeypatch.setenv('OMP_NUM_THREADS', '8')
    assert passes(1, 99) == (8, 0, 'threads: 8 (OMP_NUM_THREADS)\n')


def test_more_threads_than_cores(monkeypatch, capsys):
    took = []
    monkeypatch.setattr(torch, 'set_num_threads', took.append)
    monkeypatch.setattr(ranks, 'cores', lambda: 4)
    for n in 0, 3, 4:
        devices.set_threads(n)
    assert took == [3, 4] and not capsys.readouterr().out
    devices.set_threads(6)  # of a checkpoint
    assert took == [3, 4, 4]
    assert capsys.readouterr().out.startswith('threads: 4, since here are no more cores; the run had 6')


def test_threads_on_the_command_line(train, run):
    result = train('--threads=4096')
    assert result.status == 2 and result.err.count('\n') == 1
    assert 'threads = 4096: this process may use ' in result.err and '--threads=0' in result.err
    result = train('--threads=1', '--max_iters=2')
    assert 'threads: 1 (as asked)\n' in result.out
    result = run('train.py', '--init_from=resume', '--max_iters=3', '--device=cpu')
    assert 'From the checkpoint: threads = 1\n' in result.out and 'threads: 1 (as the run began)\n' in result.out


# ---------------------------------------------------------------------------------------------------------------------
# compiling


@pytest.mark.parametrize('wanted, device, seconds, chosen, why', [
    (True, CPU, 1, True, 'as asked'), (False, CUDA, 1e9, False, 'as asked'),
    (None, CPU, 299, False, 'a run of 5.0 minutes is over too soon; --compile turns it on'),
    (None, CPU, 301, True, 'a run of 5 minutes without; --compile=False turns it off'),
    (None, torch.device('mps'), 1e9, False, 'on mps'),
])
def test_compiling_goes_by_the_time_of_the_run(monkeypatch, wanted, device, seconds, chosen, why):
    monkeypatch.setattr(overrides, 'given', {'compile'})
    monkeypatch.setattr(devices.shutil, 'which', lambda name: name)
    found, reason = devices.choose_compile(wanted, device, seconds)
    assert found is chosen and why in reason


@pytest.mark.parametrize('wanted', [True, None])
def test_without_a_compiler_nothing_is_compiled_on_a_cpu(monkeypatch, wanted):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    found, reason = devices.choose_compile(wanted, CPU, 1e9)
    assert not found and 'no-such-compiler' in reason


COMPILED = '''
import torch
from kit.base import devices
from kit.run import first_look
devices.COMPILE_FROM_SECONDS, devices.shutil.which = 0, lambda name: name
calls = []
def compiled(self, mode):
    {fails}
    self._compiled_call_impl = lambda *args, **kwargs: calls.append(1) or self._call_impl(*args, **kwargs)
torch.nn.Module.compile = compiled
ms = iter({ms})
first_look.seconds_of = lambda timed: next(ms)
from kit.watch import journal
sound = journal.Journal.close
journal.Journal.close = lambda self: (print('compiled calls:', len(calls)), sound(self))
'''


@pytest.mark.parametrize('fails, args, ms, line, is_kept', [
    ('', [], [0.010, 0.008], 'compile: True (a run of 0 minutes without; --compile=False turns it off; a pass takes '
     '8.0ms, 10.0ms without)', True),
    ('', [], [0.010, 0.0099], 'compile: False (a run of 0 minutes without; --compile=False turns it off; a pass takes '
     '9.9ms, 10.0ms without)', False),
    ('', ['--compile'], [0.010, 0.020], 'compile: True (as asked; a pass takes 20.0ms, 10.0ms without)', True),
    ('raise RuntimeError("no compiler")', ['--compile'], [0.010], 'compile: False (that failed: RuntimeError: no '
     'compiler)', False),
    ('', ['--compile=False'], [0.010], 'compile: False (as asked)', False),
])
def test_what_is_compiled_is_kept_where_it_is_faster(hooked, tiny, fails, args, ms, line, is_kept):
    result = hooked(COMPILED.format(fails=fails or 'pass', ms=ms), '--max_iters=20', '--eval_interval=0', *args)
    assert result.status == 0 and line + '\n' in result.out, result.out + result.err
    n = int(re.search(r'compiled calls: (\d+)', result.out)[1])
    assert (n >= 20) == is_kept and (is_kept or n <= 3), 'a try makes two passes and an evaluation'
    saved = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)
    assert saved['config']['compile'] is is_kept, 'a resume computes as the run did'


# ---------------------------------------------------------------------------------------------------------------------
# what is told


SLOW = '''
from kit.run import first_look, iter_line
iter_line.UPDATE = 0
sound = first_look.choose
first_look.choose = lambda *args: (sound(*args), {planned})[1]
'''


def test_a_run_that_is_much_slower_than_its_plan_says_so_once(hooked):
    result = hooked(SLOW.format(planned=1e-9), '--max_iters=12', '--log_interval=1')
    assert result.status == 0 and result.out.count(' times as long as planned') == 1, result.out + result.err
    warning = next(line for line in result.out.splitlines() if 'as long as planned' in line)
    assert re.match(r'WARNING: a step takes [\d.]+ms, \d+\.\d times as long as planned, [\d.]+ms of that', warning)
    assert len(losses(result)) == 12
    result = hooked(SLOW.format(planned=1e9), '--max_iters=12', '--log_interval=1')
    assert 'as long as planned' not in result.out


def test_what_a_run_took_is_told_at_its_end(train):
    result = train('--max_iters=5')
    told = re.search(r'^the steps took \d+s, evaluations \d+s \((\d+\.\d)% of the time\), saves \d+s \((\d+\.\d)%\)$',
                     result.out, re.MULTILINE)
    assert told and 0 < float(told[1]) < 100 and 0 < float(told[2]) < 100


def test_the_clock_sums_up_all_of_its_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr('kit.run.clock.time.perf_counter', lambda: now[0])
    clock = Clock(0, CPU)

    def spend(seconds, kind, n=1):
        now[0] += seconds
        clock.took(kind, n)
    spend(2, 'evaluation')
    spend(1, 'save')
    spend(4, 'step')
    now[0] += 1  # up to a line, whose own time is the step's too
    clock.pace()
    spend(1, 'step', n=0)
    spend(1, 'evaluation', n=0)
    assert clock.in_words() == 'the steps took 6s, evaluations 3s (30.0% of the time), saves 1s (10.0%)'
    assert sum(clock.total.values()) == now[0]


# ---------------------------------------------------------------------------------------------------------------------
# memory that tensors free

FAULTS = '''
import ctypes, resource, torch
from kit.base import devices
{before}
devices.choose_device('cpu')
def pass_():
    kept = [torch.ones(5 * 2**20) for _ in range(5)]  # 20 MB each, freed together
for _ in range(3):
    pass_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    pass_()
print('faults', (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
'''


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='other C libraries keep what is freed as they please')
@pytest.mark.parametrize('before, variables, many', [
    ('ctypes.CDLL(None).mallopt(-3, 131072)', {}, False), ('', {'MALLOC_MMAP_THRESHOLD_': '131072'}, True)])
def test_freed_memory_is_there_for_the_next_step(before, variables, many):
    """Given back to the system, 100 MB come again in 25,600 page faults; what the environment sets is left alone."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(('MALLOC_', 'GLIBC_TUNABLES'))}
    done = subprocess.run([sys.executable, '-c', FAULTS.format(before=before)], cwd=ROOT, env=bare | variables,
                          capture_output=True, text=True, check=True)
    faults = int(done.stdout.rpartition('faults ')[2])
    assert faults > 1000 if many else faults < 100, faults


def test_a_step_seeds_the_generator_as_torch_does():
    torch.manual_seed(7)
    expected = torch.rand(5)
    devices.seed(torch.device('cpu'), 7)
    assert torch.equal(torch.rand(5), expected) and torch.initial_seed() == 7
