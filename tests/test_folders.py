"""What a run writes and where: in its own folder, under its own names, whatever the files there say; and records."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import OF_THE_MACHINE, ROOT, TINY, records, small_run, some_text

from kit.watch import journal


def prepare(run, folder, text, *args, name='tiny'):
    (folder / 'other.txt').write_text(text, encoding='utf-8')
    result = run('prepare.py', '--input=other.txt', f'--dataset={name}', *args)
    assert result.status == 0, result.err


# ---------------------------------------------------------------------------------------------------------------------
# places


@pytest.mark.parametrize('place', ['data', 'runs', 'kit', 'config', 'data/tiny', '..', 'link'])
def test_a_run_is_not_written_among_other_things(train, tiny, place):
    if place == 'link':  # to data, which is one itself
        (tiny / 'data').rename(tiny / 'disk')
        (tiny / 'data').symlink_to('disk')
        (tiny / 'link').symlink_to('data')
    (tiny / place).mkdir(parents=True, exist_ok=True)
    before = sorted(tiny.rglob('*'))
    for more in '--max_iters=1', '--find_lr':
        result = train(f'--out_dir={place}', more)
        assert result.status == 2 and 'out_dir' in result.err and len(result.err.splitlines()) == 1
        assert sorted(tiny.rglob('*')) == before


@pytest.mark.parametrize('name', ['training.log', 'metrics.jsonl', 'config.json', 'source.zip', 'mine.pt'])
def test_what_is_there_under_the_names_of_a_run_is_moved_aside(train, tiny, name):
    (tiny / 'checkpoints').mkdir()
    (tiny / 'checkpoints' / name).write_text('mine')
    result = train('--max_iters=1')
    assert result.status == 0 and 'moved to checkpoints.1' in result.out
    assert (tiny / 'checkpoints.1' / name).read_text() == 'mine'


@pytest.mark.parametrize('name', ['.lock', 'training.log', 'metrics.jsonl'])
def test_links_at_the_place_of_files_are_not_followed(train, run, tiny, trained, name):
    (trained / name).unlink()
    (tiny / 'thesis.txt').write_text('years of work')
    (trained / name).symlink_to('../thesis.txt')
    result = run('train.py', '--init_from=resume', '--max_iters=12', '--device=cpu')
    assert result.status == 2 and name in result.err and 'is a link' in result.err, result.err
    assert len(result.err.splitlines()) == 1 and (tiny / 'thesis.txt').read_text() == 'years of work'


@pytest.mark.parametrize('name', ['config.json', 'source_0000010.zip', '.config.json.part', 'best.pt', 'ckpt.pt',
                                  '.ckpt.pt.part', '.ckpt.pt.link', 'step_0000015.pt'])
def test_links_are_replaced_and_not_written_through(run, tiny, trained, name):
    """Also where the file behind the link is one that will do."""
    is_checkpoint = name in ('best.pt', 'ckpt.pt')
    content = (trained / 'ckpt.pt').read_bytes() if is_checkpoint else b'years of work'
    (tiny / 'thesis').write_bytes(content)
    (trained / name).unlink(missing_ok=True)
    (trained / name).symlink_to('../thesis')
    result = run('train.py', '--init_from=resume', '--max_iters=15', '--device=cpu')
    assert result.status == 0, result.err
    assert (tiny / 'thesis').read_bytes() == content


def test_a_file_chooses_no_places(run, tiny, trained):
    """Neither a checkpoint by a setting nor config.json by the sinks of the last launch."""
    checkpoint = torch.load(trained / 'ckpt.pt', weights_only=True)
    checkpoint['config'] |= {'wandb_run_name': '../../evil/name', 'tensorboard': True, 'out_dir': '../evil'}
    for path in trained.glob('*.pt'):
        path.unlink()
    torch.save(checkpoint, trained / 'ckpt.pt')
    config = json.loads((trained / 'config.json').read_text())
    config['launches'][-1]['sinks'] = {'TensorBoard': '../evil'}
    (trained / 'config.json').write_text(json.dumps(config))
    before = set(tiny.parent.iterdir())
    result = run('train.py', '--init_from=resume', '--max_iters=11', '--device=cpu')
    assert result.status == 0 and "'../evil', where this run wrote before, is no folder in runs/" in result.out
    assert not list(tiny.rglob('evil*')) and set(tiny.parent.iterdir()) == before
    event, = tiny.rglob('events*')
    assert event.parent.parent == tiny / 'runs'


@pytest.mark.parametrize('last', ['../evil', '/tmp', 'runs/../../evil', 'runs', 'runs/', 'runs/none', 'runs/link',
                                  'runs/there/.', 5, ['runs'], 'x' * 300, 'runs/\0'])
def test_the_folder_of_the_last_launch(tmp_path, monkeypatch, last):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'runs/there').mkdir(parents=True)
    (tmp_path / 'runs/link').symlink_to('..')
    assert str(journal.run_folder('new', 'runs/there')) == 'runs/there'
    assert journal.run_folder('new', last).name.startswith('new-')


@pytest.mark.parametrize('name, begin', [
    ('exp1', 'exp1-2'), ('../../x', '_.._x-2'), ('/etc/x', '_etc_x-2'), ('x' * 300, 'x' * 100 + '-2'), ('..', '-2'),
    ('\u732b' * 90, '\u732b' * 33 + '-2'),
    ('lr=1e-3,bs=8', 'lr=1e-3,bs=8-2'), ('a\x00b\n', 'a_b_-2'), ('\udcff', '_-2'), ('Größe', 'Größe-2')])
def test_names_of_runs(tmp_path, monkeypatch, name, begin):
    monkeypatch.chdir(tmp_path)
    folder = journal.run_folder(name)
    assert folder.parent.name == 'runs' and folder.name.startswith(begin)


def test_names_that_are_no_utf8(train, run, tiny):
    """A word of the command line may be any bytes; it stands in training.log, config.json and the checkpoint."""
    name, out_dir = map(os.fsdecode, (b'--wandb_run_name=\xff\xfe', b'--out_dir=\xe9'))
    assert train(name, out_dir).status == 0
    result = run('train.py', '--init_from=resume', out_dir, '--max_iters=12', '--device=cpu')
    assert result.status == 0 and result.err == '', result.err
    assert (tiny / os.fsdecode(b'\xe9') / 'ckpt.pt').exists()


# ---------------------------------------------------------------------------------------------------------------------
# another text under the same name


def test_another_text_under_the_same_name(train, run, tiny):
    """As with another name: no loss of before is a mark, and best.pt of before is kept aside."""
    assert train().status == 0
    best = (tiny / 'checkpoints/best.pt').read_bytes()
    prepare(run, tiny, some_text(seed=1), '--overwrite')
    result = run('train.py', '--init_from=resume', '--max_iters=15', '--device=cpu')
    assert result.status == 0 and 'tiny is another text than that of the steps up to 10' in result.out, result.err
    assert (tiny / 'checkpoints/later.1/best.pt').read_bytes() == best
    saved = torch.load(tiny / 'checkpoints/best.pt', weights_only=True)
    val = [record['val/loss'] for record in records(tiny / 'checkpoints') if 'val/loss' in record][-1]
    assert saved['best_val_loss'] == pytest.approx(val) and saved['iter_num'] == 15 and len(saved['val_losses']) == 1
    facts = json.loads((tiny / 'checkpoints/config.json').read_text())['facts']
    assert saved['other_text_since'] == facts['other_text_since'] == 10
    result = run('train.py', '--init_from=resume', '--max_iters=20', '--device=cpu')  # and from there on it is the text
    assert result.status == 0 and 'another text' not in result.out


def test_the_same_text_under_another_name(train, run, tiny):
    assert train().status == 0
    shutil.move(tiny / 'data/tiny', tiny / 'data/moved')
    result = run('train.py', '--init_from=resume', '--dataset=moved', '--max_iters=15', '--device=cpu')
    assert result.status == 0 and 'another text' not in result.out
    assert not (tiny / 'checkpoints/later.1').exists()


@pytest.mark.parametrize('change, is_other', [
    (lambda ids: ids, False), (lambda ids: np.append(ids, ids[:1]), True), (lambda ids: np.roll(ids, 1), True)])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_folder_without_hashes(train, run, tiny, change, is_other, split):
    """What nanoGPT has made: by sizes, and what stands at the beginning and the end."""
    (tiny / 'data/tiny/meta.json').unlink()
    assert train().status == 0
    path = tiny / f'data/tiny/{split}.bin'
    change(np.fromfile(path, '<u2')).astype('<u2').tofile(path)
    result = run('train.py', '--init_from=resume', '--max_iters=15', '--device=cpu')
    assert result.status == 0 and ('is another text' in result.out) == is_other, result.err


def test_shares_and_order_of_a_mixture(train, run, tiny):
    shutil.copytree(tiny / 'data/tiny', tiny / 'data/twin')
    prepare(run, tiny, (tiny / 'text.txt').read_text()[::-1], name='other')
    go_on = ['train.py', '--init_from=resume', '--max_iters=11', '--device=cpu']
    assert train('--dataset=tiny:0.7,other:0.3').status == 0
    for mixture, is_other in ('other:3,tiny:7', False), ('twin:0.7,other:0.3', False), ('tiny,other', True):
        result = run(*go_on, f'--dataset={mixture}')
        assert result.status == 0 and ('is another text' in result.out) == is_other, (mixture, result.err)


def test_checkpoints_of_before_go_by_what_they_have(train, run, tiny):
    """By the hashes that meta.json had then; nanoGPT's by the name."""
    assert train().status == 0
    path = tiny / 'checkpoints/ckpt.pt'
    saved = torch.load(path, weights_only=True)
    del saved['meta']['text'], saved['other_text_since']
    for name in 'best.pt', 'step_0000010.pt', 'ckpt.pt':
        (tiny / 'checkpoints' / name).unlink()
    torch.save(saved, path)
    go_on = 'train.py', '--init_from=resume', '--max_iters=12', '--device=cpu'
    shutil.copytree(tiny / 'checkpoints', tiny / 'copy')
    assert 'another text' not in run(*go_on).out
    prepare(run, tiny, some_text(seed=1), '--overwrite')
    assert 'is another text' in run(*go_on, '--out_dir=copy').out


# ---------------------------------------------------------------------------------------------------------------------
# records


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs SIGKILL')
@pytest.mark.parametrize('interval, dtype', [(7, 'float32'), (10, 'float32'), (1000, 'float16')])
def test_a_kill_after_a_save_loses_no_record(train, tiny, interval, dtype):
    """And the shares of clipped updates, told at each iter line, are those of the run that was not killed."""
    args = [f'--log_interval={interval}', '--eval_interval=0', '--save_interval=20', '--grad_clip_quantile=0.5',
            '--decay_lr=False', f'--dtype={dtype}']
    command = [sys.executable, ROOT / 'train.py', '--dataset=tiny', *small_run(*args), '--max_iters=100000',
               '--compile=False', '--out_dir=cut']
    process = subprocess.Popen(command, cwd=tiny, stdout=subprocess.DEVNULL, env=os.environ | {'OMP_NUM_THREADS': '1'})
    while not (tiny / 'cut/step_0000060.pt').exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    steps = torch.load(tiny / 'cut/ckpt.pt', weights_only=True)['iter_num'] + 2 * min(interval, 20)
    assert train(*args, '--init_from=resume', f'--max_iters={steps}', '--out_dir=cut').status == 0
    assert train(*args, f'--max_iters={steps}', '--out_dir=whole').status == 0
    whole, cut = ({record['step']: {name: value for name, value in record.items() if name not in OF_THE_MACHINE}
                   for record in records(tiny / name) if 'loss' in record} for name in ('whole', 'cut'))
    assert list(whole) == sorted(cut) == list(range(steps)) and sum('clip_rate' in one for one in whole.values()) > 1
    assert whole == cut


def test_a_test_on_another_text_says_so(train, run, tiny):
    assert train().status == 0
    assert 'another text' not in run('train.py', '--test', '--device=cpu').out
    prepare(run, tiny, some_text(seed=1), '--overwrite')
    result = run('train.py', '--test', '--device=cpu')
    assert result.status == 0 and 'tiny is another text than that which checkpoints/best.pt has read' in result.out


def test_what_names_no_dataset_is_asked_for_it(run, tiny, trained_gpt2):
    saved = torch.load(trained_gpt2 / 'ckpt.pt', weights_only=True)
    del saved['config']
    for path in trained_gpt2.glob('*.pt'):
        path.unlink()
    torch.save(saved, trained_gpt2 / 'ckpt.pt')
    before = sorted(tiny.rglob('*'))
    result = run('train.py', '--init_from=resume', '--max_iters=12', '--device=cpu')
    assert result.status == 2 and '--dataset=NAME' in result.err and sorted(tiny.rglob('*')) == before
    result = run('train.py', '--init_from=resume', *TINY, '--dataset=tiny', '--max_iters=12')
    assert result.status == 0 and 'names no settings' in result.out, result.err
    assert 'optimizer = adamw: the checkpoint is older than this setting' in result.out


def test_a_best_in_a_folder_that_is_no_utf8_is_kept(train, run, tiny):
    """All scripts read there, and what was better stays."""
    name = os.fsdecode(b'caf\xe9')
    assert train(f'--out_dir={name}').status == 0
    best = torch.load(open(tiny / name / 'best.pt', 'rb'), weights_only=True)
    best['best_val_loss'] = 0.001
    (tiny / name / 'best.pt').unlink()
    with open(tiny / name / 'best.pt', 'wb') as file:
        torch.save(best, file)
    shutil.copy(tiny / name / 'step_0000005.pt', tiny / name / 'other')
    for path in (tiny / name).glob('step_*10.pt'):
        path.unlink()
    os.replace(tiny / name / 'other', tiny / name / 'ckpt.pt')
    result = run('train.py', '--init_from=resume', f'--out_dir={name}', '--max_iters=10', '--device=cpu')
    assert result.status == 0 and 'stays: it is better' in result.out, result.err
    for words in (['sample.py', '--max_new_tokens=3'], ['train.py', '--test'], ['train.py', '--inspect_step=6']):
        result = run(*words, f'--out_dir={name}', '--device=cpu')
        assert result.status == 0 and result.err == '', result.err
    assert run('checkpoint_averaging.py', f'--checkpoint_dir={name}', '--num_checkpoints=2').status == 0


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs pipes')
@pytest.mark.parametrize('name', ['data/tiny/train.bin', 'data/tiny/val.bin', 'checkpoints/config.json',
                                  'checkpoints/training.log', 'checkpoints/.lock'])
def test_a_pipe_is_not_waited_for(run, tiny, trained, name):
    (tiny / name).unlink()
    os.mkfifo(tiny / name)
    result = run('train.py', '--init_from=resume', '--max_iters=12', '--device=cpu')
    assert name.rpartition('/')[2] in result.out + result.err and len(result.err.splitlines()) == (result.status == 2)


def test_a_run_may_have_a_copy_of_the_script_beside_it(run, tiny, trained):
    for name in 'train.py', 'meta.pkl':
        shutil.copy(ROOT / 'train.py', trained / name)
    result = run('train.py', '--init_from=resume', '--max_iters=12', '--device=cpu')
    assert result.status == 0, result.err


def test_a_home_that_no_shell_has_written_out(train, tiny):
    result = train('--out_dir=~/exp1')
    assert result.status == 2 and 'the shell' in result.err and not (tiny / '~').exists()
