"""What a step takes by plan beside what was measured, what is said where memory ends, and batch_size = 0."""

import functools
import json

import pytest
import torch
from conftest import hooked_script, losses, records

from kit.run import fitting, memory
from model import GPT, GPTConfig

# bytes at the peak of a step on one H200 (torch 2.11, bfloat16, rows of 1,024 tokens), in GiB
ON_AN_H200 = [
    ('124M', 12, '', 11.308), ('124M', 12, 'checkpointing', 7.759), ('124M', 12, 'compiled', 6.826),
    ('124M', 12, 'compiled checkpointing', 3.194), ('350M', 6, '', 12.676), ('350M', 6, 'checkpointing', 7.610),
    ('350M', 6, 'compiled', 10.563), ('774M', 3, '', 16.557), ('774M', 3, 'checkpointing', 12.064),
    ('774M', 3, 'compiled', 15.648), ('modern', 12, '', 13.739)]
SHAPES = {'124M': (12, 12, 768), '350M': (24, 16, 1024), '774M': (36, 20, 1280), '1.5B': (48, 25, 1600),
          'modern': (12, 12, 768)}

# passes over more rows than MOST find no memory, as a GPU says it, or a CPU; the first FIRST passes do
SHORT = '''
import torch, model
passes, sound = [], model.GPT.forward
def forward(self, idx, *args, **kwargs):
    if torch.is_grad_enabled():
        passes.append(len(idx))
        if len(idx) > {most} and len(passes) > {first}:
            raise {error}
    return sound(self, idx, *args, **kwargs)
model.GPT.forward = forward
'''
OF_A_GPU = "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9.00 GiB.')"
OF_A_CPU = "RuntimeError(\"DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\\nframe #0: x\")"


@functools.cache
def sizes(name):
    n_layer, n_head, n_embd = SHAPES[name]
    preset = GPTConfig.PRESETS['modern' if name == 'modern' else 'gpt2']
    with torch.device('meta'):
        return memory.sizes(GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=False, **preset)))


@pytest.mark.parametrize('name, rows, how, gib', ON_AN_H200)
def test_the_plan_is_what_a_gpu_measured(name, rows, how, gib):
    setup = memory.Setup(rows * 1024, optimizer='muon:0.02' if name == 'modern' else 'adamw',
                         **dict.fromkeys(how.split(), True))
    assert memory.total(sizes(name), setup) / 2**30 == pytest.approx(gib, rel=0.05)  # 0.15 is what was promised


@pytest.mark.parametrize('args', [[], ['--architecture=modern', '--optimizer=muon', '--dtype=float32']])
def test_the_plan_is_what_a_cpu_takes(run, args):
    result = run('bench/plan.py', '--measure', '--device=cpu', *args)
    assert result.status == 0, result.out + result.err
    rows = [line.split('|')[4:7] for line in result.out.splitlines() if line.startswith(('| 4 x', '| 2 x'))]
    assert len(rows) == 4
    for planned, measured, _ in rows:
        assert 0.01 < float(measured) and float(planned) == pytest.approx(float(measured), rel=0.1)


def test_the_table_of_sizes_and_gpus(run):
    result = run('bench/plan.py', '--gpu=A100', '--gpu_gib=39.5', '--bandwidth=10')
    assert result.status == 0, result.err
    rows = [[word.strip() for word in line.split('|')[1:-1]] for line in result.out.splitlines() if '| 64 |' in line
            or line.startswith(('| 124M', '| 350M', '| 774M', '| 1.5B'))]
    assert len(rows) == 28 and '312 TFLOP/s' in result.out
    first, last = (next(row for row in rows if row[:2] == ['1.5B', n]) for n in ('1', '64'))
    assert first[2] == '12,288' and last[2] == '786,432'
    assert first[3].endswith('!') and first[4] == '-' and last[3].endswith('!')  # 16 bytes a parameter, and activations
    assert float(last[5]) < float(first[5]) / 2  # shards
    assert float(last[6]) > float(first[6])  # a slow network: some of the exchange is waited for
    result = run('bench/plan.py', '--gpu=H1000')
    assert result.status == 2 and result.err.count('\n') == 1 and 'did you mean H100?' in result.err


def test_what_is_sharded_and_what_is_not():
    """The static part, by ZeRO's arithmetic; whole gradients stay where several micro-steps add up."""
    what, one = sizes('350M'), memory.Setup(1024)
    p = what.parameters
    here = memory.of_step(what, memory.Setup(1024, parallel='fsdp', world_size=8))
    assert here['parameters'] == p / 2 and here['optimizer'] == p
    assert memory.of_step(what, memory.Setup(1024, parallel='fsdp', world_size=8, micro_steps=2))['gradients'] >= 4 * p
    assert memory.of_step(what, memory.Setup(1024, world_size=8))['gradients'] >= 4 * p
    offloaded = memory.of_step(what, memory.Setup(1024, parallel='fsdp', world_size=8, offload=True))
    assert offloaded['parameters'] == offloaded['optimizer'] == 0
    assert memory.of_step(what, memory.Setup(1024, is_averaged=True))['optimizer'] == 12 * p
    assert memory.total(what, memory.Setup(1024, parallel='fsdp', world_size=1)) == memory.total(what, one)


def test_seconds_of_a_step():
    what, peak = sizes('124M'), 1e15
    alone, waiting = memory.seconds(what, memory.Setup(8192, micro_steps=2), peak, 0.5, 1e9)
    assert alone == pytest.approx(what.flops_per_token * 2 * 8192 / 5e14) and waiting == 0
    again, _ = memory.seconds(what, memory.Setup(8192, micro_steps=2, checkpointing=True), peak, 0.5, 1e9)
    assert 1.2 < again / alone < 4 / 3
    _, ddp = memory.seconds(what, memory.Setup(8192, world_size=4), peak, 0.5, 1e9)
    assert ddp == pytest.approx(1.5 * 4 * what.parameters / 1e9 - alone / 3)
    _, fsdp = memory.seconds(what, memory.Setup(8192, world_size=4, parallel='fsdp'), peak, 0.5, 1e9)
    assert fsdp == pytest.approx(0.75 * 8 * what.parameters / 1e9 - alone / 2)


@pytest.mark.parametrize('name, rows, gib', [('350M', 24, 20), ('1.5B', 12, 24), ('1.5B', 12, 12), ('124M', 12, 4)])
def test_what_is_offered_fits(name, rows, gib):
    """Each of the ways, read as a user reads it."""
    how = memory.Setup(rows * 1024)
    assert memory.total(sizes(name), how) > gib * 2**30
    ways = fitting.alternatives(sizes(name), how, rows, gib * 2**30)
    assert ways and any('--parallel=fsdp' in way for way in ways)
    for way in ways:
        given = dict(word.partition('=')[::2] for word in way.split() if word.startswith('--'))
        n = int(way.split(' on ')[1].split()[0]) if '--parallel' in given else 1
        batch = int(given.get('--batch_size', rows // n))
        if '--batch_size' in given:
            assert batch * int(given['--gradient_accumulation_steps']) == rows
        setup = memory.Setup(batch * 1024, micro_steps=rows // n // batch, world_size=n,
                             parallel=given.get('--parallel', 'ddp'),
                             checkpointing='--activation_checkpointing' in given)
        assert memory.total(sizes(name), setup) <= gib * 2**30


@pytest.mark.parametrize('error, first', [(OF_A_GPU, 0), (OF_A_CPU, 6)])
def test_no_memory_is_explained(hooked, tiny, error, first):
    """In the first pass, and in a step, when the run has its folder."""
    result = hooked(SHORT.format(most=2, first=first, error=error))
    assert result.status == 1 and result.err.count('\n') == 1, result.err
    for said in ('llocate 9', 'a step takes about ', ' by plan', 'free as the run began',
                 '--batch_size=2 --gradient_accumulation_steps=2', '--activation_checkpointing'):
        assert said in result.err, result.err
    assert bool(losses(result)) == bool(first)


def test_batch_size_0_keeps_the_rows_of_a_step(hooked, tiny):
    """The recipe's steps, cut otherwise; a resume goes on with what was found."""
    recipe = ['--gradient_accumulation_steps=3', '--eval_iters=3', '--architecture=modern,ngram_embeddings=64']
    (tiny / 'recipe.py').write_text('batch_size = 4')
    plain = hooked('', *recipe)
    whole = hooked('', *recipe, 'recipe.py', '--batch_size=0', '--out_dir=whole')
    assert 'batch_size: 12, gradient_accumulation_steps: 1, eval_iters: 1 ' in whole.out, whole.err
    short = hooked(SHORT.format(most=4, first=0, error=OF_A_GPU), *recipe, '--batch_size=0', '--out_dir=short')
    assert 'batch_size: 12 rows find no memory\nbatch_size: 6 rows find no memory\n' in short.out, short.err
    assert 'batch_size: 4, gradient_accumulation_steps: 3, eval_iters: 3 ' in short.out and short.status == 0
    assert losses(short) == losses(plain)
    assert losses(whole) == pytest.approx(losses(plain), abs=2e-4)
    evaluated = [[record['val/loss'] for record in records(tiny / folder) if 'val/loss' in record]
                 for folder in ('checkpoints', 'whole')]
    assert evaluated[1] == pytest.approx(evaluated[0], abs=2e-4)

    on = hooked('', '--init_from=resume', '--out_dir=whole', '--max_iters=12', '--gradient_accumulation_steps=3',
                '--batch_size=0')
    assert on.status == 0 and '12 rows' in on.out, on.err
    settings = json.loads((tiny / 'whole/config.json').read_text())['settings']
    assert settings['batch_size'] == 12 and settings['gradient_accumulation_steps'] == 1
    result = hooked('', '--init_from=resume', '--out_dir=whole', '--max_iters=13', '--batch_size=12')
    assert '12 rows x 1 micro-steps' in result.out and 'batch_size = 0' not in result.out, result.err


@pytest.mark.parametrize('limit', ['fitting.CPU_TOKENS = 64', 'devices.free_memory = lambda device: 1.4 * 2**20'])
def test_batch_size_0_on_a_cpu(hooked, limit):
    """No more rows than its caches gain by, and than there is memory for by plan: there no pass would fail."""
    result = hooked(f'from kit.run import fitting\nfrom kit.base import devices\n{limit}', '--batch_size=0',
                    '--gradient_accumulation_steps=8', '--max_iters=1')
    assert 'batch_size: 4, gradient_accumulation_steps: 8, ' in result.out, result.out + result.err


def test_batch_size_0_without_memory_for_one_row(hooked, tiny):
    result = hooked(SHORT.format(most=0, first=0, error=OF_A_CPU), '--batch_size=0')
    assert result.status == 1 and result.err.count('\n') == 1 and 'by plan' in result.err
    assert not (tiny / 'checkpoints').exists()


def test_two_processes_find_what_fits_both(pair, tiny):
    short = 'import os\nif os.environ["RANK"] == "1":' + SHORT.format(most=2, first=0, error=OF_A_GPU).replace(
        '\n', '\n    ')
    result = pair('--gradient_accumulation_steps=2', '--batch_size=0', script=hooked_script(tiny, short))
    assert 'batch_size: 2, gradient_accumulation_steps: 4, ' in result.out, result.err
    assert len(losses(result)) == 10
