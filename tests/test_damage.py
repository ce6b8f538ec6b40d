"""
Files that are not what was written: flipped bits, cut ends, pickles that ask for code. Each is found or harmless, and
nothing in them runs.
"""

import copy
import io
import math
import os
import pickle
import random
import shutil
import subprocess
import zipfile
from functools import reduce

import numpy as np
import pytest
import torch
from conftest import GPT2

from kit.data import tokens
from kit.learn import averages, optimizers
from kit.run.run_state import RunState
from kit.state import averaging, checkpoints
from model import GPT, GPTConfig


def equal(a, b):
    """The same types, numbers and tensors, all the way down."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


def test_300_flipped_bits_and_cut_ends(trained, capsys):
    """Of ckpt.pt; where one is found, the one before is taken."""
    path = trained / 'ckpt.pt'
    sound, expected = path.read_bytes(), torch.load(path, weights_only=True)
    for name in 'best.pt', 'step_0000010.pt':  # the same file as ckpt.pt
        (trained / name).unlink()
    draw = random.Random(0)
    found = harmless = 0
    with zipfile.ZipFile(path) as archive:  # the structure is a small part of the file: aim at it half of the time
        tensors = [info.header_offset for info in archive.infolist() if '/data/' in info.filename]
    for i in range(300):
        data = bytearray(sound)
        if i % 5 == 0:
            del data[draw.randrange(len(data)):]
        else:
            here = draw.choice([draw.randrange(len(data)), draw.choice(tensors) + draw.randrange(100),
                                len(data) - 1 - draw.randrange(9000)])
            data[here] ^= 1 << draw.randrange(8)
        path.unlink()
        path.write_bytes(data)
        taken, checkpoint = checkpoints.newest(trained)
        if taken == path:
            harmless += 1
            assert equal(checkpoint, expected)
        else:
            found += 1
            assert taken.name == 'step_0000005.pt' and checkpoint['iter_num'] == 5
            out = capsys.readouterr().out  # a bit of an entry's header makes it one that torch.save does not write
            assert f'{path} is damaged' in out or f'{path} is no checkpoint' in out and 'entry' in out
    assert found > 150 and harmless > 0


def test_a_tensor_marked_as_a_folder(trained):
    """One bit of the archive's directory, which has no checksum: torch would read the tensor as zeros."""
    path = trained / 'ckpt.pt'
    data = bytearray(path.read_bytes())
    entry = data.index(b'PK\x01\x02', data.index(b'PK\x01\x02') + 100)
    while b'/data/' not in data[entry:entry + 70]:
        entry = data.index(b'PK\x01\x02', entry + 1)
    data[entry + 38] ^= 0x10
    path.unlink()
    path.write_bytes(data)
    for read in checkpoints.read, checkpoints.open_lazily:
        with pytest.raises(checkpoints.Damaged):
            read(path)


def test_the_run_goes_on_from_the_one_before(train, tiny, trained):
    whole = (trained / 'ckpt.pt').read_bytes()
    with open(trained / 'ckpt.pt', 'r+b') as file:  # in place, so that best.pt and step_0000010.pt are hit too
        file.seek(len(whole) // 2)
        file.write(bytes([whole[len(whole) // 2] ^ 4]))
    result = train('--init_from=resume')
    assert result.status == 0, result.err
    assert 'WARNING: checkpoints/ckpt.pt is damaged' in result.out and 'step_0000005.pt, after 5 steps' in result.out
    assert 'step_0000010.pt: not of the run that goes on from step 5; moved to checkpoints/later.1' in result.out
    ours, theirs = torch.load(trained / 'ckpt.pt', weights_only=True), torch.load(io.BytesIO(whole), weights_only=True)
    assert equal(ours['model'], theirs['model']) and equal(ours['optimizer'], theirs['optimizer'])


# ---------------------------------------------------------------------------------------------------------------------
# ten pickles that would run code, each a checkpoint and a meta.pkl


def hostile(call):
    """A pickle that calls something when it is loaded. call(path) -> (function, args)."""
    class Evil:
        def __init__(self, path):
            self.path = path

        def __reduce__(self):
            return call(self.path)
    return Evil


HOSTILE = {
    'os.system': hostile(lambda path: (os.system, (f'touch {path}',))),
    'open': hostile(lambda path: (open, (path, 'w'))),
    'eval': hostile(lambda path: (eval, (f'open({path!r}, "w")',))),
    'exec': hostile(lambda path: (exec, (f'open({path!r}, "w")',))),
    'os.mkdir': hostile(lambda path: (os.mkdir, (path,))),
    'shutil.copy': hostile(lambda path: (shutil.copy, (os.__file__, path))),
    'subprocess': hostile(lambda path: (subprocess.call, (['touch', path],))),
    'io.open': hostile(lambda path: (io.open, (path, 'w'))),
    'import': hostile(lambda path: (__import__, ('antigravity',))),
    'torch.load': hostile(lambda path: (torch.save, ({}, path))),
}


@pytest.mark.parametrize('name', HOSTILE)
@pytest.mark.parametrize('form', ['pickle', 'zip', 'zip, nested'])
def test_hostile_checkpoints(tmp_path, capsys, name, form):
    evil, path = HOSTILE[name](str(tmp_path / 'ran')), tmp_path / 'ckpt.pt'
    if form == 'pickle':
        path.write_bytes(pickle.dumps({'model': evil, 'iter_num': 1}))
    else:
        inside = {'model': {'transformer.wpe.weight': torch.ones(3)}, 'iter_num': 1, 'config': {'deep': [evil]}}
        torch.save(inside if form == 'zip, nested' else evil, path)
    for read in (lambda: checkpoints.load(path), lambda: checkpoints.load(path, resume=True),
                 lambda: checkpoints.newest(tmp_path)):
        with pytest.raises(SystemExit) as end:
            read()
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count('\n') == 1 and str(path) in said
    with pytest.raises(checkpoints.Damaged):
        checkpoints.open_lazily(path)
    assert checkpoints.peek(path) == {} and not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('name', HOSTILE)
@pytest.mark.parametrize('nested', [False, True])
def test_hostile_metas(tmp_path, capsys, name, nested):
    evil = HOSTILE[name](str(tmp_path / 'ran'))
    meta = {'vocab_size': 2, 'itos': {0: 'a', 1: evil}, 'stoi': {}} if nested else evil
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    with pytest.raises(SystemExit) as end:
        tokens.read_meta(tmp_path)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count('\n') == 1 and 'asks for' in said
    assert not (tmp_path / 'ran').exists()


def test_the_pickles_are_hostile(tmp_path):
    """Loaded carelessly, one of them does run: the tests above can fail."""
    pickle.loads(pickle.dumps(HOSTILE['open'](str(tmp_path / 'ran')))).close()
    assert (tmp_path / 'ran').exists()


# ---------------------------------------------------------------------------------------------------------------------
# whole files that are something else: each is named, and none is called damaged


class Plain(torch.nn.Module):
    def forward(self, x):
        return x


def safetensors(path):
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(4))


def savez(path):
    with open(path, 'wb') as file:
        np.savez(file, a=np.ones(3))


def with_only(*keys):
    return lambda path, saved: torch.save({key: saved[key] for key in keys if key in saved}, path)


def without(*keys):
    return lambda path, saved: torch.save({key: value for key, value in saved.items() if key not in keys}, path)


OTHERS = [
    (lambda path, saved: torch.save(saved['model'], path), 'a bare state_dict'),
    (lambda path, saved: torch.save({'state_dict': saved['model'], 'pytorch-lightning_version': '2.5'}, path),
     'PyTorch Lightning'),
    (lambda path, saved: torch.save({'epoch': 3, 'model_state_dict': saved['model']}, path), "has 'epoch', 'model_st"),
    (lambda path, saved: torch.save(saved['optimizer'], path), 'the state of an optimizer alone'),
    (lambda path, saved: torch.save(torch.ones(3), path), 'a tensor alone'),
    (lambda path, saved: torch.save([1, 2], path), 'it is a list'),
    (lambda path, saved: torch.save(GPT(GPTConfig(**saved['model_args'])), path), 'asks for code, model.GPT'),
    (lambda path, saved: torch.save(saved, path, _use_new_zipfile_serialization=False), 'before version 1.6'),
    (lambda path, saved: path.write_bytes(pickle.dumps({'model': 1})), 'a pickle that torch.save has not written'),
    (lambda path, saved: torch.jit.save(torch.jit.script(Plain()), path), 'TorchScript'),
    (lambda path, saved: safetensors(path), 'a safetensors file'),
    (lambda path, saved: savez(path), 'a zip archive that torch.save has not written'),
    (lambda path, saved: path.write_text('version https://git-lfs.github.com/spec/v1\nsize 3\n'), 'git lfs pull'),
    (without('model_args'), 'it has no model_args'),
    (without('iter_num'), 'it has no iter_num'),
    (without('model', 'iter_num'), 'it has no model, no iter_num'),
]
OF_A_RESUME = [(without('optimizer'), 'holds weights alone, no optimizer: a new run begins with them, '
                                      '--init_from=FILE.pt'),
               (without('best_val_loss'), 'it has no best_val_loss')]


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning')
@pytest.mark.parametrize('make, named', OTHERS + OF_A_RESUME)
def test_other_files_are_named(trained, tmp_path, capsys, make, named):
    (tmp_path / 'other').mkdir()
    path = tmp_path / 'other/ckpt.pt'
    make(path, torch.load(trained / 'ckpt.pt', weights_only=True))
    reads = [lambda: checkpoints.load(path, resume=True), lambda: checkpoints.newest(path.parent)]
    if (make, named) in OTHERS:
        reads += [lambda: checkpoints.load(path), lambda: averaging.different_steps(path.parent, '*.pt')]
    for read in reads:
        with pytest.raises(SystemExit) as end:
            read()
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count('\n') == 1 and named in said and str(path) in said, said
        assert 'damaged' not in said


@pytest.mark.parametrize('prefix', ['module.', 'module._orig_mod.', '_orig_mod.module.'])
def test_names_that_ddp_and_compile_have_left(trained, tmp_path, prefix):
    saved = torch.load(trained / 'ckpt.pt', weights_only=True)
    state = saved['model']
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    torch.save(saved | {'model': wrapped, 'ema': wrapped, 'n_averaged': 2}, tmp_path / 'ddp.pt')
    for key in 'model', 'ema':
        GPT(GPTConfig(**saved['model_args'])).load_state_dict(checkpoints.load(tmp_path / 'ddp.pt', True)[key])
    part = {f'module.{name}' if 'ln' in name else name: tensor for name, tensor in state.items()}
    torch.save(saved | {'model': part}, tmp_path / 'own.pt')  # a module of that name is a part of somebody's model
    assert checkpoints.load(tmp_path / 'own.pt')['model'].keys() == part.keys()


# ---------------------------------------------------------------------------------------------------------------------
# each key of a checkpoint, with what should not stand there: it is refused, passed over or harmless


def nested(depth):
    return reduce(lambda inside, _: {'a': inside}, range(depth), {})


VALUES = [None, 0, 5, -1, 2.5, math.nan, math.inf, -math.inf, 10**400, 2**63, True, 'text', '', [], {}, [1], [None],
          [math.nan], ['a'], {'a': 1}, {1: 2}, (1, 2), nested(200), torch.tensor(math.nan), torch.tensor(3),
          torch.zeros(0), torch.zeros(1).expand(10**12), torch.empty(2, device='meta'), torch.eye(3).to_sparse(),
          torch.ones(2, dtype=torch.complex64), torch.ones(2, 3, dtype=torch.int64),
          torch.full((2, 3), 1e300, dtype=torch.float64)]
GONE = object()


def places(value, before=()):
    """The paths to all that a checkpoint holds; of what is numbered, the first."""
    found = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in found:
        if isinstance(key, str) or key == 0:
            yield (*before, key)
            yield from places(inside, (*before, key))


def put(value, path, new):
    """A copy of nested containers with something else at a path."""
    value, (key, *rest) = copy.copy(value), path
    if rest:
        value[key] = put(value[key], rest, new)
    elif new is GONE:
        del value[key]
    else:
        value[key] = new
    return value


def resume(folder):
    """What train.py does with the newest checkpoint: take all of it, a step, and a save."""
    path, saved = checkpoints.newest(folder)
    model = GPT(checkpoints.config_of(saved, GPTConfig, path))
    optimizer, average = optimizers.adamw(model, 0.1, 1e-3, (0.9, 0.99)), averages.running(model, 0.9, 0)
    scaler, state = torch.amp.GradScaler('cpu'), RunState()
    state.take(saved)
    checkpoints.restore(saved, model, optimizer, scaler)
    averages.restore(average, saved)
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    optimizer.step()
    average.update(torch.tensor(True))
    assert checkpoints.save({
        'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
        **averages.state(average), **state.keys(), 'model_args': model.config.args(), 'config': saved.get('config', {}),
        'random_states': checkpoints.random_states()}, folder / 'next', ['ckpt.pt'])
    checkpoints.read(folder / 'next/ckpt.pt', resume=True)


def use(folder):
    """What sample.py does with a checkpoint, up to the first word."""
    saved = checkpoints.load(folder / 'ckpt.pt')
    model = GPT(checkpoints.config_of(saved, GPTConfig, folder / 'ckpt.pt'))
    checkpoints.fill(model, checkpoints.weights(saved), folder / 'ckpt.pt')
    if 'meta' in saved:
        text = tokens.tokenizer(saved['meta']['tokenizer'])
        tokens.decode(text, tokens.beginning(text, saved['meta']))


def test_every_key_with_hostile_values(train, tiny, capsys):
    """A sample of some 5,000 pairs, another one where a key is new."""
    assert train(*GPT2, '--ema_decay=0.9', '--dtype=float16').status == 0
    folder = tiny / 'checkpoints'
    saved = torch.load(folder / 'ckpt.pt', weights_only=True)
    for name in 'ckpt.pt', 'best.pt', 'step_0000010.pt':
        os.unlink(folder / name)
    every = [place for place in places(saved) if place[:2] != ('random_states', 'python')]
    assert {('config', 'dataset'), ('optimizer', 'state', 0, 'exp_avg'), ('ema', 'lm_head.weight'), ('n_averaged',),
            ('meta', 'tokenizer', 'kind'), ('scaler', 'scale'), ('val_losses', 0)} <= set(every)
    draw = random.Random(0)
    ends = {'taken': 0, 'refused': 0}
    for place, value in draw.sample([(place, value) for place in every for value in [*VALUES, GONE]], 80):
        torch.save(put(saved, place, value), folder / 'ckpt.pt')
        for what in resume, use, lambda folder: averaging.different_steps(folder, 'ckpt.pt'):
            try:
                what(folder)
                ends['taken'] += 1
            except SystemExit as end:
                ends['refused'] += 1
                said = capsys.readouterr().err
                assert end.code == 2 and said.count('\n') == 1, (place, value, said)
            told = capsys.readouterr()
            assert not told.err and 'damaged' not in told.out, (place, value, told)
    assert min(ends.values()) > 25


@pytest.mark.parametrize('place, value', [
    (('config', 'dataset'), 5), (('config', 'batch_mode'), ['a']), (('config', 'objective'), [1]), (('config',), [1]),
    (('meta',), 'text'), (('meta', 'tokenizer', 'chars'), 5), (('model_args', 'n_embd'), 'a'), (('iter_num',), 2.5),
    (('model_args', 'n_layer'), 10**6), (('model_args', 'n_head'), -2), (('model_args', 'block_size'), 2**63),
    (('model', 'lm_head.weight'), torch.zeros(1).expand(10**12)),
    (('model', 'lm_head.weight'), torch.empty(2, device='meta')),
    (('model', 'transformer.ln_f.weight'), torch.ones(32, dtype=torch.int64)),
    (('model', 'transformer.ln_f.weight'), torch.ones(32, dtype=torch.complex64)),
    (('model', 'transformer.ln_f.weight'), torch.full((32,), 1e300, dtype=torch.float64)),
])
def test_hostile_values_in_the_scripts(run, trained, place, value):
    saved = put(torch.load(trained / 'ckpt.pt', weights_only=True), place, value)
    for path in trained.glob('*.pt'):
        path.unlink()
    torch.save(saved, trained / 'ckpt.pt')
    files = lambda: sorted((path, path.stat().st_mtime_ns) for path in trained.rglob('*') if path.name != '.lock')
    before = files()
    for script, *args in (['train.py', '--init_from=resume', '--max_iters=12'], ['sample.py'],
                          ['checkpoint_averaging.py', '--num_checkpoints=1']):
        result = run(script, *args, '--device=cpu')
        assert result.status == 2 and result.err.count('\n') == 1 and 'Traceback' not in result.err, result.err
        assert 'damaged' not in result.err and files() == before
