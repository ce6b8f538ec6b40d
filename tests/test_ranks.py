"""Several processes as one run, each with the whole model (DDP) or a part of it (FSDP): the same run as that of one."""

import re
import shutil

import numpy as np
import pytest
import torch
from conftest import GPT2, hooked_script, records, small_run

from kit.base import ranks
from kit.learn import building
from model import GPT, GPTConfig

ALIKE = ['--dtype=float32', '--sampling=random', '--grad_clip=0.5']
FSDP = '--parallel=fsdp'


def weights(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)


def figures(folder):
    """{step: loss}, with all digits."""
    return {record['step']: record['loss'] for record in records(folder) if 'loss' in record}


def furthest(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def moments(checkpoint):
    return {(i, name): value for i, of in checkpoint['optimizer']['state'].items() for name, value in of.items()}


# ---------------------------------------------------------------------------------------------------------------------
# rows


@pytest.mark.parametrize('n_rows, batch_size, world', [(12, 12, 1), (12, 12, 6), (12, 5, 2), (14, 3, 2), (480, 12, 16)])
def test_each_row_of_a_step_is_read_once(monkeypatch, n_rows, batch_size, world):
    monkeypatch.setattr(ranks, 'world_size', world)
    micro_steps, seen = ranks.share(n_rows, batch_size), []
    for micro_step in range(micro_steps):
        sizes = []
        for rank in range(world):
            monkeypatch.setattr(ranks, 'rank', rank)
            rows = np.arange(n_rows)[ranks.rows_of(n_rows, micro_steps, micro_step)]
            seen.extend(rows)
            sizes.append(len(rows))
        assert len(set(sizes)) == 1 and 1 <= sizes[0] <= batch_size
    assert sorted(seen) == list(range(n_rows)) and micro_steps == -(-n_rows // world // batch_size)


@pytest.mark.parametrize('n_rows, world, words', [
    (12, 5, '4 or 6 can share them, or 10 rows are shared by these'), (12, 16, '12 can share them, or 16 rows'),
    (7, 3, '1 or 7 can share them, or 6 rows')])
def test_rows_that_cannot_be_shared_out(monkeypatch, capsys, n_rows, world, words):
    monkeypatch.setattr(ranks, 'world_size', world)
    with pytest.raises(SystemExit):
        ranks.share(n_rows, 4)
    assert words in capsys.readouterr().err


def test_as_many_processes_as_divide_the_rows(train, pair, tiny):
    """50 steps of 12 rows: 1 process against 2, 3 and 4, in both ways."""
    args = [*ALIKE, '--batch_size=12', '--max_iters=50', '--eval_interval=25', '--save_interval=0', '--n_embd=36']
    assert train(*args, '--out_dir=one').status == 0
    one, runs = weights(tiny / 'one'), [(2, []), (2, [FSDP]), (3, []), (4, [FSDP])]
    for n, more in runs:
        folder = f'{n}{"fsdp" if more else "ddp"}'
        result = pair(*args, *more, f'--out_dir={folder}', n=n)
        assert result.status == 0 and f'parallel: {"fsdp" if more else "ddp"} (' in result.out, result.err
        found, other = weights(tiny / folder), figures(tiny / folder)
        assert other == pytest.approx(figures(tiny / 'one'), abs=1e-4) and len(other) == 50
        assert furthest(one['model'], found['model']) < 1e-4
        assert found['best_val_loss'] == pytest.approx(one['best_val_loss'], abs=1e-5)
    assert figures(tiny / '2fsdp') == pytest.approx(figures(tiny / '2ddp'), abs=1e-5)
    assert furthest(weights(tiny / '2fsdp')['model'], weights(tiny / '2ddp')['model']) < 1e-5
    last = [{name: value for name, value in records(tiny / folder)[-2].items() if 'ratio/' in name or 'norm/' in name}
            for folder in ('one', '4fsdp')]
    assert last[0] and last[1] == pytest.approx(last[0], rel=1e-2)  # layers, estimated from other samples


# ---------------------------------------------------------------------------------------------------------------------
# a model in parts


@pytest.mark.parametrize('args', [
    [*GPT2, '--bias=True', '--ema_decay=0.9', '--grad_clip_value=0.01'],
    ['--batch_size=2', '--gradient_accumulation_steps=2', '--swa_start=3', '--activation_checkpointing'],
    ['--dtype=float16', '--eval_iters=0', '--optimizer=muon:0.02'],
], ids=['gpt2 with an ema', 'micro-steps with swa', 'float16'])
def test_in_parts_as_whole(train, pair, tiny, args):
    """Three processes, so that the 32 rows of most matrices leave one with less; and what few have leaves one empty."""
    args = ['--dtype=float32', *args, '--batch_size=6', '--lr_schedule=cosine', '--max_iters=8', '--n_embd=34',
            '--architecture=gpt2']
    one, parts = train(*args, '--out_dir=one'), pair(*args, FSDP, '--out_dir=parts', n=3)
    assert one.status == parts.status == 0, parts.err
    whole, found = weights(tiny / 'one'), weights(tiny / 'parts')
    most = 1e-3 if '--dtype=float16' in args else 1e-5
    assert figures(tiny / 'parts') == pytest.approx(figures(tiny / 'one'), abs=most)
    for key in {'model', 'ema', 'swa'} & whole.keys():
        assert list(found[key]) == list(whole[key]) and furthest(whole[key], found[key]) < most
    assert moments(found).keys() == moments(whole).keys() and furthest(moments(whole), moments(found)) < most
    assert found['optimizer']['param_groups'] == whole['optimizer']['param_groups']
    assert found['model_args'] == whole['model_args'] and found['scaler'] == whole['scaler']
    assert found['model']['lm_head.weight'].data_ptr() == found['model']['transformer.wte.weight'].data_ptr()
    assert 'a sample of its own' in one.out and 'a model in parts is not shown from inside' in parts.out


LOOK = '''
import torch
import torch.distributed as dist
from kit.base import ranks
from kit.run import starts
calls = {'reduced': 0, 'steps': 0}
real = dist.reduce_scatter_single  # what FSDP2 calls
def counted(*args, **kwargs):
    calls['reduced'] += 1
    return real(*args, **kwargs)
dist.reduce_scatter_single = counted
from kit.learn import optimizers
step = optimizers.step
def watched(optimizer, is_good):
    calls['steps'] += 1
    step(optimizer, is_good)
    held = total = 0
    for group in optimizer.param_groups:
        for p in group['params']:
            for tensor in (p, p.grad, *optimizer.state[p].values()):
                held += ranks.local(tensor).numel()
                total += tensor.numel()
    print(f'AT REST {held / total:.3f}')
    shares = ranks.from_all(held / total)
    print(f'MOST {max(shares):.3f}')
optimizers.step = watched
end = ranks.leave
def told(status=0):
    print('CALLS', calls['reduced'], calls['steps'])
    end(status)
ranks.leave = told
from model import GPT
made = GPT.__init__
def watched_init(self, config):
    print('MADE ON', torch.empty(0).device.type)
    made(self, config)
GPT.__init__ = watched_init
'''


def test_what_a_part_holds_and_how_often_gradients_are_exchanged(pair, tiny):
    result = pair('--batch_size=4', '--gradient_accumulation_steps=3', '--max_iters=3', FSDP, '--log_interval=0',
                  '--eval_interval=0', script=hooked_script(tiny, LOOK), n=4)
    assert result.status == 0, result.err
    assert set(re.findall('^MADE ON (.*)$', result.out, re.M)) == {'meta'}, 'no process ever makes a whole one'
    assert all(float(share) <= 0.4 for share in re.findall('^MOST (.*)$', result.out, re.M)) and 'MOST' in result.out
    reduced, steps = map(int, re.search(r'^CALLS (\d+) (\d+)$', result.out, re.M).groups())
    # a group for each of two blocks, and one for the rest; the first look makes three passes more
    assert steps == 3 and reduced == 3 * (steps + 3), result.out


EXCHANGES = '''
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from kit.base import ranks
calls, made = [], DDP.__init__
def hooked(state, bucket):
    calls.append(1)
    return allreduce_hook(state, bucket)
def watched(self, *args, **kwargs):
    made(self, *args, **kwargs)
    self.register_comm_hook(None, hooked)
DDP.__init__ = watched
from kit.learn import optimizers
step = optimizers.step
def counted(optimizer, is_good):
    print('EXCHANGED', len(calls))
    calls.clear()
    step(optimizer, is_good)
optimizers.step = counted
'''


def test_ddp_exchanges_gradients_once_a_step(pair, tiny):
    result = pair('--batch_size=2', '--gradient_accumulation_steps=6', '--max_iters=4', script=hooked_script(
        tiny, EXCHANGES))
    counts = [int(n) for n in re.findall(r'^EXCHANGED (\d+)$', result.out, re.M)]
    assert result.status == 0 and len(counts) == 4 and set(counts[2:]) == {1}, result.out  # one bucket holds them all


def test_the_first_weights_are_those_of_a_whole_model(monkeypatch):
    for preset in GPTConfig.PRESETS.values():
        config = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=65, block_size=16, **preset)
        torch.manual_seed(5)
        whole = GPT(config)
        torch.manual_seed(5)
        with torch.device('meta'):
            plain = GPT(config)
        model = GPT(config)
        torch.manual_seed(5)
        building.fill(model, plain)
        for name, value in whole.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name


def test_a_changed_model_that_cannot_be_made_in_parts(pair, tiny, capsys):
    """A parameter without a dimension; a bare one and a buffer, whose numbers nobody could know."""
    code = ('import torch\nimport model\nmade = model.MLP.__init__\ndef changed(self, config):\n'
            '    made(self, config)\n    self.scale = torch.nn.Parameter(torch.tensor(1.0))\n'
            'model.MLP.__init__ = changed')
    result = pair(FSDP, script=hooked_script(tiny, code))
    assert result.status and 'transformer.h.0.mlp.scale has none' in result.err, result.err
    assert 'Traceback' not in result.err and '--parallel=ddp' in result.err
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=65, block_size=16)
    for add, words in (lambda module: module.register_parameter('scale', torch.nn.Parameter(torch.ones(4))),
                       'nothing says how transformer.ln_f.own.scale begins; give its module a method'), (
            lambda module: module.register_buffer('table', torch.ones(4)), 'the buffer transformer.ln_f.own.table'):
        models = [GPT(config) for _ in range(2)]
        for model in models:
            model.transformer.ln_f.own = torch.nn.Module()
            add(model.transformer.ln_f.own)
        with pytest.raises(SystemExit):
            building.fill(*models)
        assert words in capsys.readouterr().err


LOADED = '''
import torch
from kit.base import ranks
from kit.run import starts
restore = starts.restore
def told(saved, is_resume, config, meta, model, optimizer, *others):
    state = restore(saved, is_resume, config, meta, model, optimizer, *others)
    found = {'model': {name: ranks.whole(value) for name, value in model.state_dict().items()},
             'optimizer': {'state': {i: {name: ranks.whole(value) for name, value in of.items()}
                                     for i, of in optimizer.state_dict()['state'].items()}}}
    if ranks.is_main:
        torch.save(found, f'{ranks.world_size}.pt')
    return state
starts.restore = told
'''


def test_saved_by_two_and_loaded_by_others(run, pair, tiny):
    args = '--batch_size=12', FSDP
    assert pair(*args, '--ema_decay=0.9').status == 0
    saved, script = weights(tiny / 'checkpoints'), hooked_script(tiny, LOADED)
    again = '--init_from=resume', '--batch_size=12', '--max_iters=12'
    for n, more in (1, []), (3, [FSDP]), (4, [FSDP]), (4, ['--parallel=ddp']):
        args = [*again, *more, '--eval_only']
        result = pair(*args, script=script, n=n) if n > 1 else run(script, *small_run(*args), cwd=tiny)
        assert result.status == 0, result.err
        found = torch.load(tiny / f'{n}.pt', weights_only=True)
        assert all(torch.equal(value, found['model'][name]) for name, value in saved['model'].items())
        assert all(torch.equal(value, moments(found)[key]) for key, value in moments(saved).items())
        (tiny / f'{n}.pt').unlink()


BAD = '''
import torch
from kit.base import ranks
from kit.learn import gradients
real, steps = gradients.norms, []
def norms(parameters):
    steps.append(1)
    if len(steps) in {at} and ranks.rank == 1:
        ranks.local(parameters[0].grad).view(-1)[0] = float('nan')
    return real(parameters)
gradients.norms = norms
'''


def test_a_bad_number_of_one_part_moves_none(pair, tiny):
    """One bad step; and bad ones without end: back to the checkpoint before them, once, then the run ends."""
    result = pair(FSDP, '--ema_decay=0.9', '--batch_size=8', script=hooked_script(tiny, BAD.format(at=[4])))
    assert result.status == 0 and '1 of the steps up to 3 was not finite' in result.out, result.err
    saved = weights(tiny / 'checkpoints')
    assert {int(value) for (_, name), value in moments(saved).items() if name == 'step'} == {9}
    assert saved['n_averaged'] == 9
    result = pair(FSDP, '--max_bad_steps=2', '--batch_size=8', '--max_iters=30', script=hooked_script(
        tiny, BAD.format(at='range(8, 99)')))
    assert result.status == 1 and 'back to checkpoints/ckpt.pt' in result.out, result.out + result.err
    assert 'for the second time' in result.out and 'Traceback' not in result.err


def test_what_else_a_model_in_parts_does(pair, tiny):
    """An early stop takes best.pt's weights again; a step is replayed; the test split and an evaluation."""
    args = FSDP, '--batch_size=8'
    stopped = pair(*args, '--early_stop=1', '--min_delta=100', '--max_iters=30', '--compile=False')
    assert stopped.status == 0 and 'the weights are those of checkpoints/best.pt again' in stopped.out, stopped.err
    replayed = pair(*args, '--inspect_step=3', '--max_iters=30')
    assert 'bit for bit: this is what happened' in replayed.out, replayed.out + replayed.err
    measured = pair(*args, '--init_from=resume', '--eval_only')
    assert measured.status == 0 and 'val loss' in measured.out, measured.err


@pytest.mark.parametrize('args, words', [
    ([FSDP], "parallel = 'fsdp': it shares a model out over several processes, and this is one alone"),
    (['--cpu_offload'], 'cpu_offload = True: it takes parts of a model from GPUs to their host')])
def test_one_process_has_no_parts(train, tiny, args, words):
    result = train(*args)
    assert result.status == 2 and words in result.err and result.err.count('\n') == 1
    assert not (tiny / 'checkpoints').exists()


def test_bad_input_of_several(pair, tiny):
    for args, words in ([FSDP, '--debug_nan'], '--parallel=ddp, or one process'), (
            [FSDP, '--cpu_offload'], 'cpu_offload = True'):
        result = pair(*args)
        assert result.status and words in result.err and 'Traceback' not in result.err, result.err


def test_what_has_another_shape_is_not_cut_to_fit(monkeypatch):
    """It comes back as it is, for load_state_dict to name it on all processes."""
    monkeypatch.setattr(ranks, 'is_part', lambda tensor: True)
    for shape in (128, 1), (64, 32), (127, 32):
        value = torch.zeros(shape)
        assert ranks.like(value, torch.zeros(128, 32)) is value


FAILS = '''
from kit.base import ranks
from kit.state import writer
sound = writer.Copies.storage
def storage(self, storage):
    if self.n == 5 and ranks.is_main:
        raise MemoryError('no memory for the copy')
    return sound(self, storage)
writer.Copies.storage = storage
'''


def test_rank_0_without_memory_for_a_copy_leaves_nobody_waiting(pair, tiny):
    result = pair(FSDP, '--max_iters=6', script=hooked_script(tiny, FAILS))
    assert result.status == 1 and 'no memory for the copy' in result.out, result.err
    assert 'step 6: train loss' in result.out and not list((tiny / 'checkpoints').glob('*.pt'))


# ---------------------------------------------------------------------------------------------------------------------
# activation checkpointing


def test_what_attention_may_use_is_the_same_when_made_again(monkeypatch):
    """cuDNN's attention is for a plain causal pass alone, forward and once more in the backward pass."""
    import attention
    sound, allowed = torch.nn.functional.scaled_dot_product_attention, []

    def watched(*args, **kwargs):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return sound(*args, **kwargs)
    monkeypatch.setattr(attention.F, 'scaled_dot_product_attention', watched)
    for causal in True, False:
        config = GPTConfig(n_layer=1, n_head=1, n_embd=16, vocab_size=65, block_size=16, causal=causal)
        model = building.build(GPT, config, 'auto', True, False, torch.device('cpu'), 'float32')
        idx = torch.zeros(2, 16, dtype=torch.int64)
        model(idx, idx)[1].backward()
        assert allowed == [causal, causal]
        allowed.clear()


def test_activations_made_again_are_the_same(train, tiny):
    """With dropout; and fewer of them are kept."""
    args = '--dropout=0.2', '--max_iters=6'
    for folder, more in ('kept', []), ('again', ['--activation_checkpointing']):
        assert train(*args, *more, f'--out_dir={folder}').status == 0
    kept, again = weights(tiny / 'kept'), weights(tiny / 'again')
    assert all(torch.equal(value, again['model'][name]) for name, value in kept['model'].items())
    assert figures(tiny / 'kept') == figures(tiny / 'again') and again['config']['activation_checkpointing'] is True
    sizes = []
    for checkpointing in False, True:
        model = building.build(GPT, GPTConfig(n_layer=4, n_head=2, n_embd=32, vocab_size=65, block_size=64), 'auto',
                               checkpointing, False, torch.device('cpu'), 'float32')
        found, idx = [], torch.zeros(2, 64, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, found=found: found.append(x.numel()) or x, lambda x: x):
            model(idx, idx)
        sizes.append(sum(found))
    assert sizes[1] < 0.5 * sizes[0]


def test_shards_of_a_model_in_parts(run, pair, tiny):
    """Saved in shards by two, gone on with by two, bit for bit, by three and by one; and the file that they make."""
    args = ['--batch_size=6', '--ema_decay=0.9', FSDP, '--sharded', '--dtype=float32', '--dropout=0.1']
    assert pair(*args, '--out_dir=whole').status == 0
    assert pair(*args, '--out_dir=cut', '--max_iters=5', '--lr_decay_iters=10').status == 0
    for name in 'three', 'one':
        shutil.copytree(tiny / 'cut', tiny / name)
    again = pair(*args, '--out_dir=cut', '--init_from=resume', script=hooked_script(tiny, NONE_WHOLE))
    assert again.status == 0, again.err
    assert pair(*args, '--out_dir=three', '--init_from=resume', n=3).status == 0
    assert run('train.py', *small_run('--batch_size=6', '--init_from=resume', '--out_dir=one', '--dataset=tiny'),
               cwd=tiny).status == 0
    for name in 'whole', 'cut', 'three':
        assert run('export.py', f'--checkpoint={name}/ckpt.pt', f'--output={name}.pt', cwd=tiny).status == 0
    whole, cut, three = (torch.load(tiny / f'{name}.pt', weights_only=True) for name in ('whole', 'cut', 'three'))
    for key in 'model', 'ema':
        assert all(torch.equal(value, cut[key][name]) for name, value in whole[key].items())
    assert all(torch.equal(value, moments(cut)[key]) for key, value in moments(whole).items())
    for other in three, weights(tiny / 'one'):  # each process draws a dropout of its own
        assert furthest(whole['model'], other['model']) < 0.1 and other['iter_num'] == 10
    assert figures(tiny / 'one') == pytest.approx(figures(tiny / 'whole'), abs=0.1)


NONE_WHOLE = '''
import torch
from kit.state import shards
read = shards.Part.read
def watched(self, names, like=None):
    found = read(self, names, like)
    for name, tensor in found.items():
        assert like is not None and tensor.to_local().numel() <= -(-tensor.shape[0] // 2) * tensor[0].numel()
    return found
shards.Part.read = watched
'''
