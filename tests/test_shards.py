"""Sharded checkpoints: what is promised of one file holds for a small file with its folder of shards, on any ranks."""

import copy
import itertools
import os
import pickle
import random
import re
import shutil
import threading
import time
import zlib

import pytest
import torch
from conftest import OF_THE_MACHINE, ROOT, TINY, copy_folder, hooked_script, killed_at, losses, records
from conftest import run as run_of_conftest
from test_checkpoints import flip, steps
from test_damage import equal

from kit.base import ranks
from kit.state import averaging, checkpoints, dcp, forms, shards
from kit.state.writer import Writer
from model import GPT, GPTConfig

ARGS = [*TINY, '--dataset=tiny', '--architecture=gpt2', '--optimizer=adamw', '--ema_decay=0.9']


@pytest.fixture(scope='module')
def made(zygote, templates, tmp_path_factory):
    """A folder with the same run twice: whole/ in files, parts/ in shards."""
    folder = tmp_path_factory.mktemp('shards')
    copy_folder(templates['tiny'], folder)
    for args in ['--out_dir=whole'], ['--out_dir=parts', '--sharded']:
        result = run_of_conftest.__wrapped__(zygote, folder)('train.py', *ARGS, *args)
        assert result.status == 0, result.err
    return folder


@pytest.fixture
def both(made, tmp_path):
    copy_folder(made, tmp_path)
    return tmp_path


@pytest.fixture
def parts(both):
    return both / 'parts'


def state(step, loss=2.0):
    """A checkpoint as that of a run, with two names of one tensor, a scalar, and another kind of number."""
    weight = torch.full((8, 6), float(step))
    args = dict(n_layer=1, n_head=1, n_embd=64, block_size=64, vocab_size=4)
    moments = {0: {'step': torch.tensor(1.0), 'exp_avg': torch.full((8, 6), step + 0.5)},
               1: {'exp_avg': torch.ones(3, dtype=torch.bfloat16)}}
    model = {'a.weight': weight, 'b.weight': torch.arange(6.0).reshape(2, 3).t(), 'c.weight': weight.view(8, 6),
             'n': torch.tensor(step)}
    return {'model': model, 'optimizer': {'state': moments, 'param_groups': [{'lr': 0.1}]}, 'iter_num': step,
            'model_args': args, 'best_val_loss': loss}


def save(folder, step, names=('ckpt.pt',), loss=2.0):
    """What a run's thread does. Returns why it did not go well."""
    try:
        small = shards.write(state(step, loss), folder)
    except Exception as error:
        return checkpoints.failure(error, folder)
    failure = checkpoints.write(small, folder, list(names))
    if not failure:
        checkpoints.prune(folder, 2)
    return failure


def read(path):
    return checkpoints.read(path, resume=True)


def folders(folder):
    return sorted(path.name for path in folder.glob('shards_*'))


def resign(path, name):
    """Put the present size and checksum of a shard into its small file, as who makes a hostile one does."""
    small = torch.load(path, weights_only=True)
    data = (path.parent / small['shards']['folder'] / name).read_bytes()
    small['shards']['files'][name] = [len(data), zlib.crc32(data)]
    path.unlink()
    torch.save(small, path)


# ---------------------------------------------------------------------------------------------------------------------
# the same runs


def test_the_same_run_and_the_same_resume(run, both):
    """Weights, moments, averages, figures and lines; the small files are small, and nothing is left lying about."""
    for name in 'whole', 'parts':
        args = ['--sharded'] if name == 'parts' else []
        result = run('train.py', '--init_from=resume', '--max_iters=14', '--keep_last=2', f'--out_dir={name}', *args)
        assert result.status == 0, result.err
    for file in 'ckpt.pt', 'best.pt', 'step_0000010.pt':
        whole, of_parts = (read(both / name / file) for name in ('whole', 'parts'))
        differ = {key for key in whole.keys() | of_parts.keys() if not equal(whole.get(key), of_parts.get(key))}
        assert differ <= {'config', 'random_states'}, differ  # of out_dir; of pictures
    figures = [[{k: v for k, v in record.items() if k not in OF_THE_MACHINE} for record in records(both / name)]
               for name in ('whole', 'parts')]
    assert figures[0] == figures[1] and len(figures[0]) > 14
    parts = both / 'parts'
    assert sorted(path.name for path in parts.glob('*.pt')) == [
        'best.pt', 'ckpt.pt', 'step_0000005.pt', 'step_0000010.pt']
    assert os.path.samefile(parts / 'ckpt.pt', parts / 'best.pt')
    assert folders(parts) == ['shards_0000005', 'shards_0000010', 'shards_0000014']
    assert {str(path.relative_to(parts / 'shards_0000014')) for path in parts.glob('shards_0000014/*/*')} == {
        f'{part}/{name}' for part in ('model', 'ema', 'optimizer') for name in ('.metadata', '__0_0.distcp')}
    assert (parts / 'ckpt.pt').stat().st_size < 40_000 < (both / 'whole/ckpt.pt').stat().st_size


def test_every_script_takes_them(run, both):
    """And gives what it gives for the same checkpoint in one file."""
    texts = [run('sample.py', f'--checkpoint={name}/best.pt', '--max_new_tokens=30', '--device=cpu')
             for name in ('whole', 'parts')]
    assert all(text.status == 0 for text in texts), texts[1].err
    assert len({text.out.replace('whole/', 'parts/') for text in texts}) == 1
    result = run('train.py', '--test', '--checkpoint=whole/best.pt,parts/best.pt', '--device=cpu')
    found = re.findall(r'test loss (\S+),', result.out)
    assert result.status == 0 and len(found) == 3 and len(set(found)) == 1, result.out + result.err
    for name in 'whole', 'parts':
        result = run('checkpoint_averaging.py', f'--checkpoint_dir={name}', '--num_checkpoints=2', '--device=cpu')
        assert result.status == 0 and result.out.count('val loss') == 3, result.err
    averages = [checkpoints.read(both / name / 'averaged_model.pt')['model'] for name in ('whole', 'parts')]
    assert equal(*averages)
    result = run('train.py', '--init_from=parts/best.pt', '--dataset=tiny', '--max_iters=2', '--out_dir=new',
                 '--device=cpu', '--tensorboard=False')
    assert result.status == 0 and 'weights: parts/best.pt, after 10 steps' in result.out, result.err


def test_export_and_back_bit_for_bit(run, both):
    one, two = both / 'one.pt', both / 'two' / 'ckpt.pt'
    result = run('export.py', '--checkpoint=parts/ckpt.pt', '--output=one.pt')
    assert result.status == 0 and 'wrote one.pt: parts/ckpt.pt, after 10 steps, in one file' in result.out, result.err
    foreign = two.parent / 'shards_0000001/model/.metadata'  # of a checkpoint that is elsewhere
    foreign.parent.mkdir(parents=True)
    foreign.write_text('')
    assert run('export.py', '--checkpoint=one.pt', '--output=two/ckpt.pt', '--sharded').status == 0
    assert equal(read(one), read(both / 'parts/ckpt.pt')) and equal(read(two), read(one))
    assert folders(two.parent) == ['shards_0000001', 'shards_0000010'] and foreign.exists()
    # as nanoGPT reads it
    saved = torch.load(one, map_location='cpu', weights_only=True)
    model = GPT(GPTConfig(**saved['model_args']))
    model.load_state_dict(saved['model'])
    optimizer = torch.optim.AdamW([{'params': group['params']} for group in [
        {'params': [p for p in model.parameters() if p.dim() >= 2]},
        {'params': [p for p in model.parameters() if p.dim() < 2]}]])
    optimizer.load_state_dict(saved['optimizer'])
    assert torch.equal(model.state_dict()['lm_head.weight'], saved['model']['transformer.wte.weight'])
    assert 'shards' not in saved and one.stat().st_size < 1.05 * (both / 'whole/ckpt.pt').stat().st_size  # tied once
    before = one.read_bytes()
    for args, words in (['--output=one.pt'], 'one.pt'), (['--output=two'], "'two'"), (['--output=x.pt/y.pt'], 'x.pt'):
        (both / 'x.pt').write_text('')
        result = run('export.py', '--checkpoint=parts/ckpt.pt', *args)
        assert result.status == 2 and words in result.err and result.err.count('\n') == 1, result.err
    assert one.read_bytes() == before


def test_a_folder_and_a_file_without_its_folder(run, both):
    result = run('sample.py', '--checkpoint=parts/shards_0000010')
    assert result.status == 2 and 'shards_0000010 holds the shards of' in result.err and 'ckpt.pt; name' in result.err
    shutil.copy(both / 'parts/ckpt.pt', both / 'alone.pt')
    result = run('sample.py', '--checkpoint=alone.pt')
    assert result.status == 2 and result.err.count('\n') == 1 and 'damaged' not in result.err, result.err
    assert 'alone.pt has its tensors in the folder shards_0000010, and that is neither beside it' in result.err
    (both / 'later.1').mkdir()
    (both / 'alone.pt').rename(both / 'later.1/step_0000010.pt')
    shutil.copytree(both / 'parts/shards_0000010', both / 'shards_0000010')
    assert read(both / 'later.1/step_0000010.pt')['iter_num'] == 10  # one folder up


# ---------------------------------------------------------------------------------------------------------------------
# several processes


def test_written_by_two_read_by_one_and_back(pair, run, tiny):
    args = ['--gradient_accumulation_steps=2', '--ema_decay=0.9', '--optimizer=adamw', '--architecture=gpt2']
    for name in 'whole', 'parts':
        result = pair(*args, f'--out_dir={name}', *(['--sharded'] if name == 'parts' else []))
        assert result.status == 0 and result.out.count('saving checkpoint') == 2, result.err
    parts = tiny / 'parts'
    written = lambda step: {path.name for path in parts.glob(f'shards_{step:07d}/model/*')}
    assert written(10) == {'.metadata', '__0_0.distcp', '__1_0.distcp'}
    for key in 'model', 'ema', 'optimizer', 'val_losses', 'recent_norms':
        assert equal(*(read(tiny / name / 'step_0000005.pt')[key] for name in ('whole', 'parts'))), key
    for step, launch in (12, run), (14, pair):
        script = ['train.py'] if launch is run else []
        result = launch(*script, '--init_from=resume', f'--max_iters={step}', '--out_dir=parts', '--sharded')
        assert result.status == 0 and f'after {step - 2} steps' in result.out, result.err
        assert len(written(step)) == (2 if launch is run else 3)
    assert read(parts / 'ckpt.pt')['iter_num'] == 14


# what two ranks do with a model that fully_shard has cut: sizes that divide, that do not, and one row alone
CUT = '''
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from kit.base import devices, ranks
from kit.state import checkpoints, shards
from kit.state.writer import Writer
ranks.start('gloo', torch.device('cpu'), 30.0, dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

def make(seed):
    torch.manual_seed(seed)
    model = torch.nn.Module()
    model.a, model.b, model.c = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3, bias=False), torch.nn.Linear(3, 1)
    model.tied = model.b
    fully_shard(model, mesh=init_device_mesh('cpu', (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = p.detach().clone()
    optimizer.step()
    return model, optimizer

model, optimizer = make(1)
writer = Writer('cut', 0, sharded=True)
state = {{'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'iter_num': 7, 'model_args': {{}},
         'best_val_loss': 1.0}}
writer.write(state, ['ckpt.pt'])
whole = {{name: tensor.full_tensor() for name, tensor in model.state_dict().items()}}
moments = [value.full_tensor() for value in optimizer.state_dict()['state'][0].values() if value.dim()]
optimizer.step()  # while it is written
assert writer.wait() is True
left = checkpoints.read('cut/ckpt.pt', resume=True)
assert left['model']['a.weight'].is_meta, 'until there is a model to read it for'
found = checkpoints.fetched(left, model)
assert whole.keys() == found['model'].keys() and all(torch.equal(whole[name], found['model'][name]) for name in whole)
assert found['model']['b.weight'].data_ptr() == found['model']['tied.weight'].data_ptr()
assert len(found['optimizer']['state']) == 5
assert all(map(torch.equal, moments, [v for v in found['optimizer']['state'][0].values() if v.dim()]))

ranks.is_fsdp = True
parts = checkpoints.fetched(left, model)
for name, tensor in parts['model'].items():
    assert tensor.to_local().shape == model.state_dict()[name].to_local().shape
    assert torch.equal(tensor.full_tensor(), whole[name])
theirs = [v.full_tensor() for v in parts['optimizer']['state'][0].values() if v.dim()]
assert all(map(torch.equal, moments, theirs)) and parts['optimizer']['state'][0]['step'] == 1

if ranks.rank:  # a bad number in what one rank has
    next(model.parameters()).to_local().detach()[0, 0] = float('nan')
writer.write(state | {{'iter_num': 8}}, ['ckpt.pt'])
assert writer.wait() is False
assert torch.load('cut/ckpt.pt', weights_only=True)['iter_num'] == 7 and os.listdir('cut') != []
ranks.wait()
if ranks.is_main:
    print('folders:', *sorted(name for name in os.listdir('cut') if name.startswith('shards')))
ranks.leave()
'''


def test_tensors_that_are_cut_over_the_ranks(pair, tiny):
    script = tiny / 'cut.py'
    script.write_text(CUT.format(root=str(ROOT), tests=str(ROOT / 'tests')))
    result = pair(script=script)
    assert result.status == 0, result.err
    assert 'folders: shards_0000007\n' in result.out
    assert 'WARNING: no checkpoint was saved to cut (rank 1: a.weight holds numbers that are not finite)' in result.out
    found = read(tiny / 'cut/ckpt.pt')  # by one process
    assert found['model']['a.weight'].shape == (8, 6) and found['model']['c.bias'].shape == (1,)


FULL = '''
import errno, os
from kit.state import dcp
sound = dcp.NewFiles.create_stream
def full(self, path, mode):
    if os.environ['RANK'] == '1' and 'shards_0000010' in str(path):
        raise OSError(errno.ENOSPC, 'No space left on device')
    return sound(self, path, mode)
dcp.NewFiles.create_stream = full
'''


def test_a_disk_that_is_full_for_one_rank_of_two(pair, tiny):
    """No checkpoint on any; both go on to the end, or both stop."""
    script = hooked_script(tiny, FULL)
    args = '--gradient_accumulation_steps=2', '--sharded', '--max_iters=15'
    result = pair(*args, script=script)
    assert result.status == 0 and len(losses(result)) == 15, result.err
    assert result.out.count('WARNING') == 1 and 'rank 1: [Errno 28] No space left on device' in result.out
    folder = tiny / 'checkpoints'
    assert sorted(steps(folder)) == ['best.pt', 'ckpt.pt', 'step_0000005.pt', 'step_0000015.pt']
    assert folders(folder) == ['shards_0000005', 'shards_0000015'] and read(folder / 'ckpt.pt')['iter_num'] == 15
    begin = time.time()
    result = pair(*args, '--save_errors=stop', '--out_dir=stopped', script=script)
    assert result.status == 1 and time.time() - begin < 60 and 'no checkpoint was saved to stopped (rank' in result.err
    assert steps(tiny / 'stopped')['ckpt.pt'] == 5 and folders(tiny / 'stopped') == ['shards_0000005']


# ---------------------------------------------------------------------------------------------------------------------
# whole or not there


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('call', ['fsync', 'mkdir', 'open', 'replace', 'rename', 'unlink'])
def test_killed_at_every_point_of_a_save(tmp_path, call):
    """Each name holds the old or the new state, whole; what is left of the killed save, the next one deletes."""
    names = ['step_0000002.pt', 'best.pt', 'ckpt.pt']
    assert not save(tmp_path, 1, ['best.pt', 'ckpt.pt'], loss=3.0)
    for n in range(0, 100, 2):
        status = killed_at(call, n, lambda: not save(tmp_path, 2, names))
        for name in steps(tmp_path):
            found = read(tmp_path / name)
            assert found['model']['a.weight'][0, 0] == found['iter_num'] in ((2,) if name in names[:1] else (1, 2))
        assert status in (0, 9)
        if status == 0:
            break
    assert status == 0
    assert not save(tmp_path, 3, ['best.pt', 'ckpt.pt'], loss=1.0)
    names = [read(path)['iter_num'] for path in tmp_path.glob('*.pt')]
    assert {3} <= {*names} and len(folders(tmp_path)) == len({*names})


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_a_run_that_is_killed_in_its_saves(run, tiny):
    """By SIGKILL at different places of its first three, and a resume each time; it ends as the one that was not."""
    kill = ('import os, signal\nfrom kit.state import dcp\nSOUND = dcp.NewFiles.create_stream\ncount = [0]\n'
            'def create_stream(self, path, mode):\n'
            '    count[0] += 1\n'
            '    if count[0] == {n}: os.kill(os.getpid(), signal.SIGKILL)\n'
            '    return SOUND(self, path, mode)\ndcp.NewFiles.create_stream = create_stream\n')
    args = [*ARGS, '--sharded', '--save_interval=2', '--eval_interval=0', '--max_iters=8', '--init_from=auto']
    for n in 2, 9, 12:
        result = run(hooked_script(tiny, kill.format(n=n)), *args)
        assert result.status == -9, result.err
    assert run('train.py', *args).status == run('train.py', *args, '--out_dir=undisturbed').status == 0
    found, expected = (read(tiny / name / 'ckpt.pt') for name in ('checkpoints', 'undisturbed'))
    for key in 'model', 'ema', 'optimizer', 'recent_norms':
        assert equal(found[key], expected[key]), key
    assert len(folders(tiny / 'checkpoints')) == 4


def test_a_step_goes_on_while_it_is_written(tmp_path, monkeypatch):
    """And what is written is the state of the call."""
    may_go_on, sound = threading.Event(), dcp.save
    monkeypatch.setattr(dcp, 'save', lambda *args: may_go_on.wait(60) and sound(*args))
    writer, saved = Writer(tmp_path, 0, sharded=True), state(5)
    before = copy.deepcopy(saved)
    writer.write(saved, ['ckpt.pt'])
    saved['model']['a.weight'].fill_(-1)
    saved['optimizer']['state'][0]['exp_avg'].zero_()
    assert writer.wait(block=False) is None and not (tmp_path / 'ckpt.pt').exists()
    may_go_on.set()
    assert writer.wait() is True
    found = read(tmp_path / 'ckpt.pt')
    assert equal({key: found[key] for key in before}, before)
    assert found['model']['c.weight'].data_ptr() == found['model']['a.weight'].data_ptr()


def test_a_disk_that_lies_is_noticed(tmp_path, monkeypatch):
    sound = os.fsync

    def flip_a_bit(handle):
        sound(handle)
        if (path := next(tmp_path.glob('shards_*/model/.metadata'), None)) and not flipped:
            flipped.append(flip(path.parent / '__0_0.distcp'))
    flipped = []
    monkeypatch.setattr(os, 'fsync', flip_a_bit)
    assert 'model/__0_0.distcp: other bytes than were written' in save(tmp_path, 1)
    assert not any(tmp_path.iterdir())


def test_a_small_file_that_cannot_be_written_leaves_no_shards(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise OSError('no space')
    writer = Writer(tmp_path, 0, sharded=True)
    writer.write(state(1), ['ckpt.pt'])
    assert writer.wait()
    monkeypatch.setattr(torch, 'save', lambda value, file, sound=torch.save: sound(value, file) if isinstance(
        value, torch.Tensor) else refuse())
    writer.write(state(2), ['ckpt.pt'])
    assert writer.wait() is False and 'no space' in capsys.readouterr().out
    assert steps(tmp_path) == {'ckpt.pt': 1} and folders(tmp_path) == ['shards_0000001']


# ---------------------------------------------------------------------------------------------------------------------
# files that are not what was written


def test_flipped_bits_and_cut_ends(tmp_path, capsys):
    """Of each kind of file: it is named, and the checkpoint before is taken."""
    save(tmp_path, 1, ['step_0000001.pt'])
    save(tmp_path, 2, ['ckpt.pt'])
    draw = random.Random(0)
    for path in sorted((tmp_path / 'shards_0000002').glob('*/*')):
        name, sound = f'shards_0000002/{path.parent.name}/{path.name}', path.read_bytes()
        for kind in 'flip', 'flip', 'flip', 'cut', 'longer', 'missing', 'link':
            data = bytearray(sound)
            if kind == 'flip':
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.unlink()
            if kind == 'link':
                (tmp_path / 'elsewhere').write_bytes(data)
                path.symlink_to(tmp_path / 'elsewhere')
            elif kind != 'missing':
                path.write_bytes({'cut': data[:-1], 'longer': data + b'0'}.get(kind, data))
            taken, found = checkpoints.newest(tmp_path)
            assert taken.name == 'step_0000001.pt' and found['iter_num'] == 1
            said = capsys.readouterr().out
            assert f'WARNING: {tmp_path / "ckpt.pt"} is damaged (' in said and said.count('\n') == 1, said
            assert name in said or kind == 'link', said
            path.unlink(missing_ok=True)
            path.write_bytes(sound)
    flip(tmp_path / 'ckpt.pt')
    assert checkpoints.newest(tmp_path)[0].name == 'step_0000001.pt'
    assert folders(tmp_path) == ['shards_0000001', 'shards_0000002']
    checkpoints.prune(tmp_path, 1)  # a file that is damaged keeps what it names
    assert folders(tmp_path) == ['shards_0000001', 'shards_0000002']
    with pytest.raises(checkpoints.Damaged):
        checkpoints.open_lazily(tmp_path / 'ckpt.pt')


def test_shards_of_another_checkpoint(tmp_path):
    save(tmp_path / 'a', 1)
    save(tmp_path / 'b', 2)
    shutil.rmtree(tmp_path / 'a/shards_0000001')
    (tmp_path / 'b/shards_0000002').rename(tmp_path / 'a/shards_0000001')
    with pytest.raises(checkpoints.Damaged, match='other bytes than were written'):
        read(tmp_path / 'a/ckpt.pt')


class Evil:
    def __reduce__(self):
        return os.mkdir, ('ran',)


def test_metadata_that_asks_for_code_is_refused_and_not_run(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 1)
    metadata = tmp_path / 'shards_0000001/model/.metadata'
    sound = pickle.loads(metadata.read_bytes())
    sound.planner_data = Evil()
    for evil in sound, Evil():
        metadata.write_bytes(pickle.dumps(evil))
        resign(tmp_path / 'ckpt.pt', 'model/.metadata')
        with pytest.raises(checkpoints.Damaged, match=r'asks for code, \w+\.mkdir'):
            read(tmp_path / 'ckpt.pt')
        result = run('sample.py', '--checkpoint=ckpt.pt')
        assert result.status == 2 and result.err.count('\n') == 1 and 'asks for code' in result.err
    assert not (tmp_path / 'ran').exists()
    path = tmp_path / 'shards_0000001/model/__0_0.distcp'
    resign(tmp_path / 'ckpt.pt', 'model/.metadata')
    path.write_bytes(pickle.dumps(Evil()) * 100)
    resign(tmp_path / 'ckpt.pt', 'model/__0_0.distcp')
    with pytest.raises(checkpoints.Damaged):
        read(tmp_path / 'ckpt.pt')
    assert not (tmp_path / 'ran').exists()


def entry(metadata, name='a.weight'):
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def change_class(metadata):
    metadata.state_dict_metadata['a.weight'] = metadata.storage_meta


@pytest.mark.parametrize('change', [
    lambda m: setattr(entry(m), 'relative_path', '../../secret'),
    lambda m: setattr(entry(m), 'relative_path', '/secret'),
    lambda m: setattr(entry(m), 'relative_path', '../optimizer/__0_0.distcp'),
    lambda m: setattr(entry(m), 'offset', -1), lambda m: setattr(entry(m), 'offset', 10**6),
    lambda m: setattr(entry(m), 'offset', 0.5), lambda m: setattr(entry(m), 'length', 2**70),
    lambda m: setattr(entry(m), 'length', 10), lambda m: setattr(entry(m), 'transform_descriptors', ['zstd']),
    lambda m: setattr(m.state_dict_metadata['a.weight'], 'size', torch.Size([2**40, 6])),
    lambda m: setattr(m.state_dict_metadata['a.weight'], 'chunks', []),
    lambda m: m.state_dict_metadata['a.weight'].chunks.append(m.state_dict_metadata['a.weight'].chunks[0]),
    lambda m: setattr(m.state_dict_metadata['a.weight'].chunks[0], 'sizes', torch.Size([4, 6])),
    lambda m: setattr(m.state_dict_metadata['a.weight'].chunks[0], 'offsets', torch.Size([4, 0])),
    lambda m: setattr(m.state_dict_metadata['a.weight'].properties, 'dtype', torch.float64),
    lambda m: m.state_dict_metadata.pop('a.weight'), lambda m: m.state_dict_metadata.update(x=None), change_class,
    lambda m: setattr(m, 'storage_data', None), lambda m: m.storage_data.clear()])
def test_metadata_that_lies_is_refused_before_anything_is_read(tmp_path, monkeypatch, change):
    save(tmp_path, 1)
    metadata = tmp_path / 'shards_0000001/model/.metadata'
    found = pickle.loads(metadata.read_bytes())
    change(found)
    metadata.write_bytes(pickle.dumps(found))
    resign(tmp_path / 'ckpt.pt', 'model/.metadata')
    monkeypatch.setattr(dcp, 'load', None)
    with pytest.raises(checkpoints.Damaged, match='is no checkpoint of flatGPT or nanoGPT .its .metadata is none'):
        read(tmp_path / 'ckpt.pt')


@pytest.mark.parametrize('change', [
    {'folder': '..'}, {'folder': '/tmp'}, {'folder': 'shards_1'}, {'folder': 3}, {'files': {}},
    {'files': {'../ckpt.pt': [1, 2]}}, {'files': {'model/.metadata': 'x'}}, {'files': None}])
def test_a_small_file_that_lies_is_refused(tmp_path, change):
    save(tmp_path, 1)
    small = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    small['shards'] |= change
    torch.save(small, tmp_path / 'other.pt')
    small['shards'] = 5
    torch.save(small, tmp_path / 'third.pt')
    del small['shards']
    torch.save(small, tmp_path / 'fourth.pt')
    for name in 'other.pt', 'third.pt', 'fourth.pt':
        with pytest.raises(checkpoints.Damaged, match='is no checkpoint of flatGPT or nanoGPT'):
            read(tmp_path / name)
    assert checkpoints.peek(tmp_path / 'fourth.pt') == {} and checkpoints.peek(tmp_path / 'ckpt.pt')['iter_num'] == 1


@pytest.mark.parametrize('shape, chunks, is_all', [
    ((8, 6), [((0, 0), (8, 6))], True), ((8, 6), [((4, 0), (4, 6)), ((0, 0), (4, 6))], True),
    ((3, 4), [((0, 0), (2, 4)), ((2, 0), (1, 4)), ((3, 0), (0, 4))], True), ((8, 6), [((0, 0), (8, 3)),
     ((0, 3), (8, 3))], True), ((1,), [((0,), (1,)), ((1,), (0,))], True), ((8, 6), [((0, 0), (4, 6))], False),
    ((8, 6), [((0, 0), (4, 6)), ((3, 0), (5, 6))], False), ((8, 6), [((0, 0), (4, 6)), ((4, 1), (4, 5))], False),
    ((8, 6), [((0, 0), (8, 6)), ((8, 0), (1, 6))], False), ((8,), [((0, 0), (8, 1))], False), ((8,), [], False)])
def test_pieces_that_are_all_of_a_tensor(shape, chunks, is_all):
    assert dcp.cover(chunks, shape) == is_all


# ---------------------------------------------------------------------------------------------------------------------
# folders


def test_prune_deletes_what_nothing_refers_to_and_nothing_else(tmp_path, capsys):
    for step in 1, 2, 3, 4:
        assert not save(tmp_path, step, [f'step_{step:07d}.pt', 'ckpt.pt'])
    assert folders(tmp_path) == ['shards_0000003', 'shards_0000004'] and len(steps(tmp_path)) == 3
    (tmp_path / 'later.1').mkdir()
    (tmp_path / 'step_0000003.pt').rename(tmp_path / 'later.1/step_0000003.pt')
    mine = tmp_path / 'shards_0000009'
    (mine / 'model').mkdir(parents=True)
    for name in 'model/.metadata', 'model/.metadata.tmp', 'model/__0_0.distcp', 'model/notes.txt', 'of_mine':
        (mine / name).write_text('')
    for name in 'shards', 'shards_of_mine', 'shards_0000001.old':
        (tmp_path / name).mkdir()
    (tmp_path / 'shards_0000008').symlink_to(tmp_path / 'shards')
    (tmp_path / 'shards_0000007').write_text('a file')
    (tmp_path / 'user.pt').write_text('no checkpoint')
    (tmp_path / 'empty.pt').write_text('')
    checkpoints.prune(tmp_path, 2)
    assert folders(tmp_path) == ['shards_0000001.old', 'shards_0000003', 'shards_0000004', 'shards_0000007',
                                 'shards_0000008', 'shards_0000009', 'shards_of_mine']
    assert sorted(path.name for path in mine.rglob('*')) == ['model', 'notes.txt', 'of_mine']
    assert read(tmp_path / 'later.1/step_0000003.pt')['iter_num'] == 3 and not capsys.readouterr().out


def test_no_name_of_a_folder_is_taken_twice(tmp_path):
    """A run that goes back comes to the same step again, while what lies beyond keeps its shards."""
    save(tmp_path, 5, ['step_0000005.pt'], loss=1.0)
    (tmp_path / 'later.1').mkdir()
    (tmp_path / 'step_0000005.pt').rename(tmp_path / 'later.1/step_0000005.pt')
    save(tmp_path, 5, ['ckpt.pt'], loss=2.0)
    assert folders(tmp_path) == ['shards_0000005', 'shards_0000005.1']
    assert read(tmp_path / 'ckpt.pt')['best_val_loss'] == 2
    assert read(tmp_path / 'later.1/step_0000005.pt')['best_val_loss'] == 1


def test_best_is_guarded_by_the_loss_on_the_disk(tmp_path, capsys):
    writer = Writer(tmp_path, 0, sharded=True)

    def wrote(step, loss):
        writer.write(state(step, loss), ['best.pt', 'ckpt.pt'])
        assert writer.wait()
        return steps(tmp_path)['best.pt']
    assert [wrote(1, 2.0), wrote(2, 3.0)] == [1, 1]
    assert 'best.pt stays: it is better' in capsys.readouterr().out
    flip(tmp_path / 'shards_0000001/model/__0_0.distcp')
    assert wrote(3, 3.0) == 3 and folders(tmp_path) == ['shards_0000003']


def test_a_mean_holds_what_a_run_deletes_meanwhile(tmp_path):
    for step in 1, 2:
        save(tmp_path, step, [f'step_{step:07d}.pt'])
    opened = [(path, *checkpoints.open_lazily(path)) for path in sorted(tmp_path.glob('*.pt'))]
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = averaging.mean(opened, [0.25, 0.75])
    assert (found['a.weight'] == 1.75).all() and found['c.weight'] is found['a.weight'] and found['n'] == 1
    assert torch.equal(found['b.weight'], state(1)['model']['b.weight'])


def test_what_goes_into_shards():
    """And what does not: no name is given twice, no view that says one number many times is made larger."""
    saved = state(1)
    saved['model'] |= {'spread': torch.ones(1).expand(5), 'none': torch.zeros(0, 3), 'x': torch.eye(2).to_sparse()}
    saved['optimizer']['state.0.exp_avg'] = torch.ones(2)
    small, parts = shards.split(saved)
    assert parts['model'].keys() == {'a.weight', 'b.weight'}
    assert parts['optimizer'].keys() == {'state.0.exp_avg', 'state.1.exp_avg'}
    assert small['optimizer']['state.0.exp_avg'] is not None and not small['optimizer']['state.0.exp_avg'].is_meta
    assert small['model']['c.weight'] is small['model']['a.weight'] and small['model']['b.weight'].stride() == (1, 3)
    assert not saved['model']['a.weight'].is_meta and forms.bad_numbers(small) == 'a.weight'
    assert ranks.group_of_a_thread() is None and len([*itertools.chain(*parts.values())]) == 4
