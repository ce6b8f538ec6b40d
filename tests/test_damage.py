"""
Files that are not what was written: flipped bits, cut ends, pickles that ask for code. Each is found or harmless, and
nothing in them runs.
"""

import io
import os
import pickle
import random
import shutil
import subprocess
import zipfile

import pytest
import torch

from kit.data import tokens
from kit.state import checkpoints


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
