"""What a GPU gains where the host runs ahead of it, as far as a CPU shows it: no waits, later lines, few graphs."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, hooked_script, losses, records
from no_wait import NoWait, Waits

from kit.learn import optimizers
from model import GPT, GPTConfig

# said where the run closes its log
AT_THE_END = '''
from kit.watch import journal
close = journal.Journal.close
def say_and_close(self):
    print({})
    close(self)
journal.Journal.close = say_and_close
'''
# what a step of the training is made of raises where the host would wait; from step 4 on, behind the first look
NO_WAIT = f'''
import sys
sys.path.insert(1, {str(ROOT / "tests")!r})
from no_wait import NoWait
from kit.learn import gradients
from kit.watch import journal
mode, seen, begin, noted = NoWait(), [], gradients.BadSteps.begin, journal.Journal.update
def begin_within(self):
    begin(self)
    if self.state.step > 3:
        mode.__enter__()
def update(self, step, figures):
    noted(self, step, figures)
    if step > 3:
        seen.append(step)
        mode.__exit__()
gradients.BadSteps.begin, journal.Journal.update = begin_within, update
''' + AT_THE_END.format("'without a wait:', len(seen)")


@pytest.mark.parametrize('value', [
    lambda x: bool(x), lambda x: float(x), lambda x: f'{x:.1f}', lambda x: x.item(), lambda x: torch.ones(2)[x > 0],
    lambda x: torch._foreach_lerp_([torch.ones(1)], [torch.ones(1)], x), lambda x: x.numpy(), lambda x: x.tolist()])
def test_the_mode_sees_a_wait(value):
    with pytest.raises(Waits), NoWait():
        value(torch.tensor(1.0))
    assert float(torch.tensor(1.0)) == 1.0


@pytest.mark.parametrize('args', [
    '', '--ema_decay=0.9', '--swa_start=2 --gradient_accumulation_steps=2 --dropout=0.1',
    '--dtype=bfloat16 --grad_clip_value=0.1', '--mask_prob=0.2 --grad_clip=0'])
def test_an_ordinary_step_waits_for_nothing(hooked, args):
    result = hooked(NO_WAIT, '--log_interval=1000', '--max_iters=15', '--max_bad_steps=0', *args.split())
    assert result.status == 0 and 'without a wait: 11' in result.out, result.out + result.err


def test_a_wait_would_be_seen(hooked):
    """The same with a setting that reads the norms in each step."""
    result = hooked(NO_WAIT, '--log_interval=1000', '--lr_by_norm')
    assert result.status == 1 and 'Waits: the host would wait: tolist' in result.err


# ---------------------------------------------------------------------------------------------------------------------
# the line of a step is shown when the next one was launched

AHEAD = '''
from kit.base import devices
from kit.data import batches
from kit.run import clock as clocks
from kit.run.iter_line import IterLine
launched, order, sound_seed, show = [0], [], batches.torch_seed, IterLine.show
def torch_seed(seed, step, rank):
    launched[0] = step
    return sound_seed(seed, step, rank)
def shown(self, step, *args):
    order.append(launched[0] - step)
    show(self, step, *args)
def fetch(tensor):
    copy = tensor.detach().clone()  # what becomes of the tensor later is not in it
    return lambda: copy
sound_start = clocks.Clock.start
def start(self, *args, **kwargs):  # whose pace begins anew behind what is no step
    self.device = torch.device('cuda')
    sound_start(self, *args, **kwargs)
batches.torch_seed, IterLine.show, clocks.Clock.start = torch_seed, shown, start
devices.runs_ahead, devices.fetch = lambda device: True, fetch
''' + AT_THE_END.format("'steps behind:', order")
NAN_IN_SEVEN = '''
import model, torch
old, nan_at = model.GPT.forward, {batches.torch_seed(1337, step, 0) for step in (7, 8, 9, 10)}
def forward(self, *args, **kwargs):
    logits, loss = old(self, *args, **kwargs)
    return logits, loss * float('nan') if torch.initial_seed() in nan_at else loss
model.GPT.forward = forward
'''
CLOCK_LINES = r', time [\d.]+ms, mfu [\d.]+%|, \S+ tok/s, eta \S+(?=,)|^mfu: .*\n|[\d.,]+k? tokens/s, mfu.*'


def told(result):
    """All lines, without what a clock says, and without that of AHEAD."""
    lines = re.sub(CLOCK_LINES, '', re.sub(r'steps behind: .*\n', '', result.out), flags=re.M).splitlines()
    return [line for line in lines if not line.startswith((
        'Overriding: out_dir', 'saving checkpoint', 'next:', '  ', 'the steps took', 'WARNING: a step takes'))]


@pytest.mark.parametrize('args, hook', [
    ('--log_interval=1', ''), ('--log_interval=3 --ema_decay=0.9', ''),
    ('--log_interval=2 --max_bad_steps=3', NAN_IN_SEVEN), ('--log_interval=2 --save_interval=3', NAN_IN_SEVEN),
    ('--log_interval=1 --eval_interval=0 --save_interval=0', '')])
def test_lines_that_come_later_are_the_same(hooked, tiny, args, hook):
    """In the same order too, and so are all records: evaluations, saves, warnings and rewinds come behind the line."""
    need = 'import torch\nfrom kit.data import batches\n'
    args = ['--max_iters=20', *args.split()]
    plain = hooked(need + hook, *args, '--out_dir=run_a')
    ahead = hooked(need + hook + AHEAD, *args, '--out_dir=run_b')
    assert ahead.status == plain.status == 0, ahead.err
    assert told(ahead) == [line.replace('run_a', 'run_b') for line in told(plain)]
    behind = eval(re.search(r'steps behind: (.*)', ahead.out)[1])
    assert behind.count(1) > len(behind) // 3 and set(behind) <= {0, 1}, 'most are shown when the next step is launched'
    clock = {'time', 'time_ms', 'data_ms', 'tokens_per_second', 'mfu'}
    for a, b in zip(records(tiny / 'run_a'), records(tiny / 'run_b'), strict=True):
        assert a.keys() == b.keys()
        kept = [name for name in a if name not in clock and not name.startswith('system/')]
        assert {name: a[name] for name in kept} == {name: b[name] for name in kept}


def test_lines_that_come_later_in_two_processes(pair, tiny):
    """Also where a signal comes right behind the step of a line."""
    stop = ('import os, signal\nold_seed = batches.torch_seed\n'
            'def seed_or_stop(seed, step, rank):\n    step == 12 and rank and os.kill(os.getpid(), signal.SIGTERM)\n'
            '    return old_seed(seed, step, rank)\nbatches.torch_seed = seed_or_stop\n')
    script = hooked_script(tiny, 'import torch\nfrom kit.data import batches\n' + AHEAD + stop)
    result = pair('--gradient_accumulation_steps=2', '--save_interval=3', '--max_iters=20', '--log_interval=2',
                  script=script)
    assert result.status == 143 and list(losses(result)) == [0, 2, 4, 6, 8, 10, 12], result.out + result.err


def test_a_line_that_was_to_come_is_not_lost(tiny):
    """Where the next step raises an error."""
    fault = ('old_seed = batches.torch_seed\ndef seed_or_raise(seed, step, rank):\n    assert step < 7, "a fault"\n'
             '    return old_seed(seed, step, rank)\nbatches.torch_seed = seed_or_raise\n')
    script = hooked_script(tiny, 'import torch\nfrom kit.data import batches\n' + AHEAD + fault)
    done = subprocess.run([sys.executable, script, '--dataset=tiny', *TINY, '--max_iters=20'], cwd=tiny, text=True,
                          capture_output=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 1 and 'a fault' in done.stderr
    assert [record['step'] for record in records(tiny / 'checkpoints') if 'loss' in record] == list(range(7))


# ---------------------------------------------------------------------------------------------------------------------
# graphs

COUNT = '''
import torch
from torch._dynamo.testing import CompileCounter
counter, sound = CompileCounter(), torch.nn.Module.compile
torch.nn.Module.compile = lambda self, mode: sound(self, backend=counter)
''' + AT_THE_END.format("'graphs:', counter.frame_count")


@pytest.mark.parametrize('args, graphs', [('--ema_decay=0.9', 2), ('--gradient_accumulation_steps=2', 2)])
def test_a_run_compiles_two_graphs(hooked, args, graphs):
    """One for the steps, one for the evaluations; an average has none of its own."""
    result = hooked(COUNT, '--compile', *args.split())
    assert result.status == 0 and f'graphs: {graphs}\n' in result.out, result.out + result.err


def test_no_logits_come_out_of_training():
    """As large as they are, a compiled backward pass would write and read zeros for their gradient."""
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=1, n_embd=16))
    outputs = []

    def backend(graph, inputs):
        output, = graph.graph.find_nodes(op='output')
        outputs.append([node.meta['example_value'].shape for node in output.args[0]])
        return graph.forward
    model.compile(backend=backend)
    x = torch.arange(16).view(2, 8)
    logits, loss = model(x, x)
    none, alone = model(x, x, loss_alone=True)
    assert none is None and torch.equal(loss, alone) and logits.shape == (2, 8, 50)
    assert [len(shapes) for shapes in outputs] == [2, 1] and outputs[1] == [torch.Size([])]


# ---------------------------------------------------------------------------------------------------------------------
# clipping

def test_what_a_fused_optimizer_scales_is_what_is_clipped():
    """Its grad_scale divides as it reads: to rounding the same weights, and it leaves the gradients scaled behind."""
    torch.manual_seed(0)
    a, b = (torch.nn.Linear(30, 20) for _ in range(2))
    b.load_state_dict(a.state_dict())
    by_hand, by_itself = (optimizers.adamw(model, 0.1, 1e-2, (0.9, 0.95)) for model in (a, b))
    for factor in 0.01, 5.0, 0.3, 7.0:
        for p, q in zip(a.parameters(), b.parameters()):
            p.grad = torch.randn_like(p) * factor
            q.grad = p.grad.clone()
        norm = torch.nn.utils.get_total_norm([p.grad for p in a.parameters()])
        optimizers.clip(by_hand, a.parameters(), norm, 1.0, 0.0)
        assert not hasattr(by_hand, 'grad_scale'), 'on a CPU it is clip_grads_with_norm_, bit for bit'
        by_itself.grad_scale = optimizers.clip_scale(norm, 1.0)
        for optimizer in by_hand, by_itself:
            optimizers.step(optimizer, torch.tensor(True))
        for p, q in zip(a.parameters(), b.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize('limit', [float('inf'), 1.0])
def test_without_a_limit_nothing_is_scaled(limit):
    assert optimizers.clip_scale(torch.tensor(0.5), limit) == 1.0
    assert (optimizers.clip_scale(torch.tensor(4.0), limit) == 1.0) == (limit > 1)
