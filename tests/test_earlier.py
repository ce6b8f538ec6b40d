"""What earlier commits have left, datasets and checkpoints, made here by their own code, goes on as it was made."""

import re
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, TINY, losses, records, some_text

from kit.base import overrides
from kit.run import earlier

# the first whole one; one before the loop became a page; the last with kit as one flat folder; modern and Muon
COMMITS = ['d0bdad6', '840f9c1', '3e2909f', '513639e']


@pytest.fixture
def made_earlier(run, tmp_path, request):
    """The folder in which an earlier commit has prepared data/tiny and trained ten steps; and its output."""
    commit, code = request.param, tmp_path / 'code'
    packed = subprocess.run(['git', 'archive', commit], cwd=ROOT, capture_output=True)
    if packed.returncode:
        pytest.skip(f'this copy of the repository has no commit {commit}')  # it is shallow, or no git at all
    code.mkdir()
    subprocess.run(['tar', '-x', '-C', str(code)], input=packed.stdout, check=True)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'text.txt').write_text(some_text())
    assert run(code / 'prepare.py', '--input=text.txt', '--dataset=tiny').status == 0
    result = run(code / 'train.py', '--dataset=tiny', *TINY)
    assert result.status == 0, result.err
    return tmp_path, result


@pytest.mark.parametrize('made_earlier', COMMITS, indirect=True)
def test_checkpoints_of_earlier_commits(run, made_earlier):
    folder, whole = made_earlier
    (folder / 'half').mkdir()
    shutil.copy(folder / 'checkpoints/step_0000005.pt', folder / 'half/ckpt.pt')
    result = run('train.py', '--init_from=resume', '--out_dir=half')
    assert result.status == 0 and 'WARNING' not in result.out, result.err
    assert losses(result) == {step: loss for step, loss in losses(whole).items() if step >= 5}
    theirs, mine = (torch.load(folder / name / 'ckpt.pt', weights_only=True) for name in ('checkpoints', 'half'))
    assert all(torch.equal(mine['model'][name], tensor) for name, tensor in theirs['model'].items())
    for i, moments in theirs['optimizer']['state'].items():
        assert all(torch.equal(mine['optimizer']['state'][i][name], tensor) for name, tensor in moments.items())
    for script, *args in ['train.py', '--test'], ['sample.py', '--max_new_tokens=9'], [
            'checkpoint_averaging.py', '--num_checkpoints=2'], ['plot_loss.py', 'checkpoints']:
        result = run(script, *args)
        assert result.status == 0 and result.err == '', f'{script}: {result.err}'


def test_every_setting_is_of_the_first_version_or_told_of():
    """Of those that came later kit/run/earlier.py says what the code did before."""
    first = subprocess.run(['git', 'show', f'{COMMITS[0]}:train.py'], cwd=ROOT, capture_output=True, text=True)
    if first.returncode:
        pytest.skip(f'this copy of the repository has no commit {COMMITS[0]}')
    known = set(re.findall(r'(?m)^(\w+) = ', first.stdout)) | earlier.SETTINGS.keys() | {'threads'}
    script = overrides.read_script(ROOT / 'train.py')
    assert not script.settings.keys() - script.launch - known
    assert not earlier.SETTINGS.keys() - script.settings.keys()


@pytest.mark.parametrize('args, expected', [([], 0.5), (['--ema_decay=0.2'], 0.2)])
def test_a_setting_that_is_younger_than_a_checkpoint(hooked, trained, args, expected):
    """It is what the code did that wrote the checkpoint, not the default of now; a command line goes before it."""
    saved = torch.load(trained / 'ckpt.pt', weights_only=True)
    del saved['config']['ema_decay']
    (trained / 'ckpt.pt').unlink()
    torch.save(saved, trained / 'ckpt.pt')
    old = 'from kit.run import earlier\nearlier.SETTINGS = {"ema_decay": 0.5, "beta1": 0.8}\n'
    result = hooked(old, '--init_from=resume', '--max_iters=11', *args)
    assert ('\nema_decay = 0.5: the checkpoint is older than this setting' in result.out) == (not args), result.err
    saved = torch.load(trained / 'ckpt.pt', weights_only=True)
    assert saved['config']['ema_decay'] == expected and 'ema' in saved and saved['config']['beta1'] == 0.9


def test_a_replay_is_made_with_what_was_then(run, tiny, trained):
    """Also of settings, and of fields of GPTConfig, that the run does not name and that have other defaults now."""
    code = tiny / 'code'
    code.mkdir()
    for path in ROOT.glob('*.py'):
        shutil.copy(path, code)
    shutil.copytree(ROOT / 'kit', code / 'kit')
    for name, old, new in [
            ('model.py', "    PRESETS = {", "    wide: int = 4\n    PRESETS = {"),
            ('model.py', '4 * config.n_embd', 'config.wide * config.n_embd'),
            ('train.py', 'n_layer = 2 ', 'wide = 2  # >= 1: as wide\nn_layer = 2 '),
            ('train.py', 'ema_decay = 0.0 ', 'younger = 0.5  # >= 0: an addition to the loss\nema_decay = 0.0 '),
            ('train.py', 'loss = loss / parts ', 'loss = loss / parts + younger '),
            ('kit/run/earlier.py', "    'ema_decay'", "    'younger': 0.0, 'ema_decay'")]:
        source = (code / name).read_text()
        assert old in source, old
        (code / name).write_text(source.replace(old, new))
    whole = records(trained)
    for args in ['--inspect_step=6'], ['--init_from=resume', '--max_iters=11']:
        result = run(code / 'train.py', *args)
        assert result.status == 0 and 'younger = 0.0: the checkpoint is older' in result.out, result.err
        assert 'bit for bit' in result.out or args[0] != '--inspect_step=6', result.out
    assert [r['loss'] for r in records(trained) if 'loss' in r][:10] == [r['loss'] for r in whole if 'loss' in r]
    saved = torch.load(trained / 'ckpt.pt', weights_only=True)
    assert saved['config']['wide'] == 4 and 'wide' not in saved['model_args']
