"""A name always holds a whole file, whatever happens while another is written."""

import os

import pytest
import torch

from kit import checkpoints


def load(path):
    return torch.load(path, weights_only=True)['n']


def test_one_state_under_all_its_names(tmp_path):
    checkpoints.save({'n': 1}, tmp_path, ['ckpt.pt', 'step_0000005.pt', 'best.pt'])
    checkpoints.save({'n': 2}, tmp_path, ['ckpt.pt'])
    assert [load(tmp_path / name) for name in ('ckpt.pt', 'step_0000005.pt', 'best.pt')] == [2, 1, 1]
    assert len(os.listdir(tmp_path)) == 3


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError('this file system has none')
    monkeypatch.setattr(os, 'link', refuse)
    checkpoints.save({'n': 1}, tmp_path, ['ckpt.pt', 'best.pt'])
    assert load(tmp_path / 'ckpt.pt') == load(tmp_path / 'best.pt') == 1 and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize('error', [RuntimeError('PytorchStreamWriter failed writing file'), OSError('no space')])
@pytest.mark.parametrize('left', ['.ckpt.pt.part', '.ckpt.pt.link'])
def test_a_failed_save_touches_nothing(tmp_path, monkeypatch, capsys, error, left):
    """Not even where a killed run has left a second name of the newest checkpoint behind."""
    checkpoints.save({'n': 1}, tmp_path, ['ckpt.pt', 'best.pt'])
    os.link(tmp_path / 'ckpt.pt', tmp_path / left)

    def fill_the_disk(checkpoint, file):
        file.write(b'half a file')
        raise error
    monkeypatch.setattr(torch, 'save', fill_the_disk)
    checkpoints.save({'n': 2}, tmp_path, ['ckpt.pt'])
    assert 'WARNING: no checkpoint was saved' in capsys.readouterr().out
    assert load(tmp_path / 'ckpt.pt') == load(tmp_path / 'best.pt') == 1
    assert sorted(os.listdir(tmp_path)) == ['best.pt', 'ckpt.pt']


def test_a_disk_that_lies_is_noticed(tmp_path, monkeypatch, capsys):
    checkpoints.save({'n': 1}, tmp_path, ['ckpt.pt'])
    sound = torch.save

    def flip_a_bit(checkpoint, file):
        sound(checkpoint, file)
        file.seek(-2000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    real_open = open
    monkeypatch.setattr('builtins.open', lambda p, m='r', *a, **k: real_open(p, 'w+b' if m == 'wb' else m, *a, **k))
    monkeypatch.setattr(torch, 'save', flip_a_bit)
    checkpoints.save({'n': torch.arange(5000)}, tmp_path, ['ckpt.pt'])
    assert 'WARNING' in capsys.readouterr().out and load(tmp_path / 'ckpt.pt') == 1


def test_the_newest_are_kept(tmp_path):
    for step in range(5):
        (tmp_path / f'step_{step:07d}.pt').touch()
    checkpoints.prune(tmp_path, 0)
    assert len(os.listdir(tmp_path)) == 5
    checkpoints.prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ['step_0000003.pt', 'step_0000004.pt']
