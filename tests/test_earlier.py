"""What earlier commits have left, datasets and checkpoints, made here by their own code, goes on as it was made."""

import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, TINY, losses, some_text

# the first whole one; one before the loop became a page; the last with kit as one flat folder
COMMITS = ['d0bdad6', '840f9c1', '3e2909f']


@pytest.fixture
def earlier(run, tmp_path, request):
    """The folder in which an earlier commit has prepared data/tiny and trained ten steps; and its output."""
    commit, code = request.param, tmp_path / 'code'
    packed = subprocess.run(['git', 'archive', commit], cwd=ROOT, capture_output=True)
    if packed.returncode:
        pytest.skip(f'this copy of the repository has no commit {commit}')
    code.mkdir()
    subprocess.run(['tar', '-x', '-C', str(code)], input=packed.stdout, check=True)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'text.txt').write_text(some_text())
    assert run(code / 'prepare.py', '--input=text.txt', '--dataset=tiny').status == 0
    result = run(code / 'train.py', '--dataset=tiny', *TINY)
    assert result.status == 0, result.err
    return tmp_path, result


@pytest.mark.parametrize('earlier', COMMITS, indirect=True)
def test_checkpoints_of_earlier_commits(run, earlier):
    folder, whole = earlier
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


@pytest.mark.parametrize('args, expected', [([], 0.5), (['--weight_decay=0.2'], 0.2)])
def test_a_setting_that_is_younger_than_a_checkpoint(hooked, train, trained, args, expected):
    """It is what the code did that wrote the checkpoint, not the default of now; a command line goes before it."""
    saved = torch.load(trained / 'ckpt.pt', weights_only=True)
    del saved['config']['weight_decay']
    (trained / 'ckpt.pt').unlink()
    torch.save(saved, trained / 'ckpt.pt')
    result = hooked('from kit.run import rules\nrules.BEFORE = {"weight_decay": 0.5, "beta1": 0.8}\n',
                    '--init_from=resume', '--max_iters=11', *args)
    assert 'Older than a setting, the checkpoint stands for weight_decay = 0.5\n' in result.out, result.err
    config = torch.load(trained / 'ckpt.pt', weights_only=True)['config']
    assert config['weight_decay'] == expected and config['beta1'] == 0.9
