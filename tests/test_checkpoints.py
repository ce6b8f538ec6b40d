"""A name always holds a whole file, whatever happens while another is written; what is damaged is not used."""

import math
import os
import random

import numpy as np
import pytest
import torch
from conftest import killed_at

from kit.learn import model_state
from kit.state import checkpoints, folders


def state(step, loss=2.0):
    """A checkpoint in which only the step can be told."""
    args = dict(n_layer=1, n_head=1, n_embd=64, block_size=64, vocab_size=4)
    return {'model': {'transformer.wpe.weight': torch.full((64, 64), float(step))}, 'iter_num': step,
            'model_args': args, 'best_val_loss': loss, 'optimizer': {'param_groups': [{}], 'state': {0: {}}}}


def steps(folder):
    return {path.name: torch.load(path, weights_only=True)['iter_num'] for path in folder.glob('*.pt')}


def flip(path, where=0.5):
    """Flip a bit of a file in place, at that share of it."""
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(data)


def test_one_state_under_all_its_names(tmp_path):
    assert checkpoints.save(state(1), tmp_path, ['step_0000001.pt', 'best.pt', 'ckpt.pt'])
    assert checkpoints.save(state(2), tmp_path, ['ckpt.pt'])
    assert steps(tmp_path) == {'ckpt.pt': 2, 'step_0000001.pt': 1, 'best.pt': 1}
    assert len(os.listdir(tmp_path)) == 3 and os.path.samefile(tmp_path / 'best.pt', tmp_path / 'step_0000001.pt')


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError('this file system has none')
    monkeypatch.setattr(os, 'link', refuse)
    checkpoints.save(state(1), tmp_path, ['best.pt', 'ckpt.pt'])
    assert steps(tmp_path) == {'ckpt.pt': 1, 'best.pt': 1} and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize('error', [RuntimeError('PytorchStreamWriter failed writing file'), OSError('no space')])
@pytest.mark.parametrize('left', ['.ckpt.pt.part', '.ckpt.pt.link'])
def test_a_failed_save_touches_nothing(tmp_path, monkeypatch, capsys, error, left):
    """Not even where a killed run has left a second name of the newest checkpoint behind."""
    checkpoints.save(state(1), tmp_path, ['best.pt', 'ckpt.pt'])
    os.link(tmp_path / 'ckpt.pt', tmp_path / left)

    def fill_the_disk(checkpoint, file):
        file.write(b'half a file')
        raise error
    monkeypatch.setattr(torch, 'save', fill_the_disk)
    assert not checkpoints.save(state(2), tmp_path, ['ckpt.pt'])
    assert 'WARNING: no checkpoint was saved' in capsys.readouterr().out
    assert steps(tmp_path) == {'ckpt.pt': 1, 'best.pt': 1} and len(os.listdir(tmp_path)) == 2
    with pytest.raises(SystemExit) as end:
        checkpoints.save(state(2), tmp_path, ['ckpt.pt'], stop_on_error=True)
    assert end.value.code == 1 and 'no checkpoint was saved' in capsys.readouterr().err


def test_a_disk_that_lies_is_noticed(tmp_path, monkeypatch, capsys):
    checkpoints.save(state(1), tmp_path, ['ckpt.pt'])
    sound = os.fsync

    def flip_a_bit(handle):
        sound(handle)
        flip(tmp_path / '.ckpt.pt.part')
    monkeypatch.setattr(os, 'fsync', flip_a_bit)
    assert not checkpoints.save(state(2), tmp_path, ['ckpt.pt'])
    assert 'other bytes than were written' in capsys.readouterr().out and steps(tmp_path) == {'ckpt.pt': 1}


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('call', ['fsync', 'link', 'replace', 'unlink'])
def test_killed_at_every_point_of_a_save(tmp_path, call):
    """A process dies at the n-th such call, for every n: each name holds the old or the new state, whole."""
    names = ['step_0000002.pt', 'best.pt', 'ckpt.pt']
    checkpoints.save(state(1, loss=3.0), tmp_path, ['best.pt', 'ckpt.pt'])
    for n in range(40):
        status = killed_at(call, n, lambda: checkpoints.save(state(2), tmp_path, names))
        for name, step in steps(tmp_path).items():
            checkpoints.verify(tmp_path / name)
            assert step == 2 if name.startswith('step_') else step in (1, 2)
        # ckpt.pt comes last: where it is new, so are the others
        assert steps(tmp_path)['ckpt.pt'] == 1 or steps(tmp_path) == dict.fromkeys(names, 2)
        if status == 0:
            break
    assert status == 0 and n > 0
    assert checkpoints.save(state(3, loss=1.0), tmp_path, ['best.pt', 'ckpt.pt'])  # what was left is no hindrance
    assert steps(tmp_path)['ckpt.pt'] == steps(tmp_path)['best.pt'] == 3


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('share', [0, 0.3, 0.9, 1])
def test_killed_while_writing(tmp_path, share):
    checkpoints.save(state(1), tmp_path, ['ckpt.pt'])
    pid = os.fork()
    if pid == 0:
        sound = torch.save

        def die(checkpoint, file):
            sound(checkpoint, file)
            file.truncate(int(file.tell() * share))
            os._exit(9)
        torch.save = die
        checkpoints.save(state(2), tmp_path, ['ckpt.pt'])
    os.waitpid(pid, 0)
    assert steps(tmp_path) == {'ckpt.pt': 1} and (tmp_path / '.ckpt.pt.part').exists()
    assert checkpoints.save(state(3), tmp_path, ['ckpt.pt'])
    assert steps(tmp_path) == {'ckpt.pt': 3} and os.listdir(tmp_path) == ['ckpt.pt']


def test_the_newest_are_kept(tmp_path):
    for step in range(5):
        (tmp_path / f'step_{step:07d}.pt').touch()
    checkpoints.prune(tmp_path, 0)
    assert len(os.listdir(tmp_path)) == 5
    checkpoints.prune(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ['step_0000003.pt', 'step_0000004.pt']


@pytest.mark.parametrize('loss, replaced', [(1.9, True), (2.0, True), (2.1, False), (math.nan, False),
                                            (math.inf, False)])
def test_best_is_never_replaced_by_a_worse_one(tmp_path, capsys, loss, replaced):
    checkpoints.save(state(1, loss=2.0), tmp_path, ['best.pt', 'ckpt.pt'])
    checkpoints.save(state(2, loss=loss), tmp_path, ['best.pt', 'ckpt.pt'])
    assert steps(tmp_path) == {'ckpt.pt': 2, 'best.pt': 2 if replaced else 1}
    assert ('best.pt stays' in capsys.readouterr().out) != replaced


@pytest.mark.parametrize('spoil', [lambda path: path.write_bytes(b'nothing'), flip])
def test_a_damaged_best_is_replaced(tmp_path, spoil):
    checkpoints.save(state(1, loss=1.0), tmp_path, ['best.pt', 'ckpt.pt'])
    spoil(tmp_path / 'best.pt')
    checkpoints.save(state(2, loss=2.0), tmp_path, ['best.pt', 'ckpt.pt'])
    assert steps(tmp_path)['best.pt'] == 2


# ---------------------------------------------------------------------------------------------------------------------
# which one a resume takes


def test_a_damaged_newest_is_named_and_the_one_before_it_taken(tmp_path, capsys):
    for step in 5, 10, 15:
        checkpoints.save(state(step, loss=30 - step), tmp_path, [f'step_{step:07d}.pt', 'ckpt.pt'])
    checkpoints.save(state(12), tmp_path, ['best.pt'])
    newest = lambda: (lambda path, saved: (path.name, saved['iter_num']))(*checkpoints.newest(tmp_path))
    assert newest() == ('ckpt.pt', 15) and not capsys.readouterr().out
    flip(tmp_path / 'ckpt.pt')  # and with it step_0000015.pt, the same file
    assert newest() == ('best.pt', 12)
    said = capsys.readouterr().out
    assert said.count('is damaged') == 2 and 'ckpt.pt is damaged' in said and 'best.pt is taken' in said
    (tmp_path / 'best.pt').unlink()
    assert newest() == ('step_0000010.pt', 10)
    (tmp_path / 'ckpt.pt').unlink()
    (tmp_path / 'step_0000010.pt').write_bytes(b'')
    assert newest() == ('step_0000005.pt', 5)
    flip(tmp_path / 'step_0000005.pt')
    with pytest.raises(SystemExit) as end:
        newest()
    assert end.value.code == 2 and 'no other checkpoint there is whole' in capsys.readouterr().err


def test_the_newest_before_a_step(tmp_path):
    for step in 5, 10, 15:
        checkpoints.save(state(step), tmp_path, [f'step_{step:07d}.pt', 'ckpt.pt'])
    flip(tmp_path / 'step_0000010.pt')
    for step, expected in (16, 15), (15, 5), (6, 5):
        assert checkpoints.before(tmp_path, step)[1]['iter_num'] == expected
    assert checkpoints.before(tmp_path, 5) == checkpoints.before(tmp_path / 'elsewhere', 9) == (None, {})
    assert checkpoints.exist(tmp_path) and not checkpoints.exist(tmp_path / 'elsewhere')


def test_a_newest_that_is_missing_or_unreadable_is_named(tmp_path, capsys):
    for step in 5, 10:
        checkpoints.save(state(step), tmp_path, [f'step_{step:07d}.pt', 'ckpt.pt'])
    (tmp_path / 'ckpt.pt').unlink()
    (tmp_path / 'step_0000010.pt').write_bytes(b'cut off')
    assert checkpoints.newest(tmp_path)[1]['iter_num'] == 5
    said = capsys.readouterr().out
    assert 'ckpt.pt is missing' in said and 'step_0000010.pt is damaged' in said


def test_what_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, capsys):
    """Too little memory is no reason to go back a step."""
    for step in 5, 10:
        checkpoints.save(state(step), tmp_path, [f'step_{step:07d}.pt', 'ckpt.pt'])
    errors = MemoryError(), RuntimeError('can not allocate memory'), PermissionError(13, 'no'), OSError(24, 'too many')
    for error in errors:
        with monkeypatch.context() as patch:
            def refuse(*args, error=error, **kwargs):
                raise error
            patch.setattr(torch, 'load', refuse)
            for find in lambda: checkpoints.load(tmp_path / 'ckpt.pt'), lambda: checkpoints.newest(tmp_path):
                with pytest.raises(SystemExit) as end:
                    find()
                told = capsys.readouterr().err
                assert end.value.code == 2 and 'cannot be read' in told and 'damaged' not in told
            assert checkpoints.before(tmp_path, 11) == (None, {})  # in a run, which goes on: it is told
            assert capsys.readouterr().out.count('cannot be read') == 3


def test_what_lies_beyond_the_resumed_step_is_moved(tmp_path, capsys):
    for step in 5, 10, 15:
        checkpoints.save(state(step), tmp_path, [f'step_{step:07d}.pt', 'best.pt', 'ckpt.pt'])
    (tmp_path / 'step_backup.pt').touch()  # somebody's own
    checkpoints.move_later_aside(tmp_path, 15)
    assert not capsys.readouterr().out
    checkpoints.move_later_aside(tmp_path, 7)
    assert steps(tmp_path / 'later.1') == {'step_0000010.pt': 10, 'step_0000015.pt': 15}
    assert 'step_0000010.pt, step_0000015.pt' in capsys.readouterr().out and (tmp_path / 'step_0000005.pt').exists()
    checkpoints.save(state(10), tmp_path, ['step_0000010.pt'])
    checkpoints.move_later_aside(tmp_path, 7, best_too=True)
    assert steps(tmp_path / 'later.2').keys() == {'step_0000010.pt', 'best.pt'}
    assert (tmp_path / 'step_backup.pt').exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys):
    checkpoints.save(state(1), tmp_path, ['ckpt.pt'])
    for bad in math.nan, math.inf, -math.inf:
        spoilt = state(2)
        spoilt['model']['transformer.wpe.weight'][3, 4] = bad
        assert not checkpoints.save(spoilt, tmp_path, ['ckpt.pt'])
        assert 'transformer.wpe.weight holds numbers that are not finite' in capsys.readouterr().out
    assert steps(tmp_path) == {'ckpt.pt': 1}


def with_moments(step, loss=2.0):
    saved = state(step, loss) | {'ema': {'transformer.wpe.weight': torch.ones(64, 64)}, 'n_averaged': step}
    saved['optimizer']['state'][0] = {'exp_avg': torch.zeros(64, 64), 'exp_avg_sq': torch.zeros(64, 64)}
    return saved


PLACES = {  # where a number stands, and how it is named
    'transformer.wpe.weight': lambda saved: saved['model']['transformer.wpe.weight'],
    'ema: transformer.wpe.weight': lambda saved: saved['ema']['transformer.wpe.weight'],
    "optimizer['state'][0]['exp_avg_sq']": lambda saved: saved['optimizer']['state'][0]['exp_avg_sq'],
}


@pytest.mark.parametrize('name', PLACES)
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_neither_saved_nor_taken(tmp_path, capsys, name, bad):
    for step in 5, 10:
        checkpoints.save(with_moments(step), tmp_path, [f'step_{step:07d}.pt', 'ckpt.pt'])
    spoilt = with_moments(15)
    PLACES[name](spoilt)[3, 4] = bad
    assert not checkpoints.save(spoilt, tmp_path, ['ckpt.pt'])
    assert f'{name} holds numbers that are not finite' in capsys.readouterr().out and steps(tmp_path)['ckpt.pt'] == 10
    (tmp_path / 'ckpt.pt').unlink()
    torch.save(spoilt | {'parameters': ['transformer.wpe.weight']}, tmp_path / 'ckpt.pt')  # by another program, say
    said = f'WARNING: {tmp_path}/ckpt.pt holds numbers that are not finite: {name}'
    path, saved = checkpoints.newest(tmp_path)
    out = capsys.readouterr().out
    assert (path.name, saved['iter_num']) == ('step_0000010.pt', 10) and said in out and 'damaged' not in out
    assert checkpoints.before(tmp_path, 16)[1]['iter_num'] == 10 and said in capsys.readouterr().out
    for path in tmp_path.glob('step_*.pt'):
        path.unlink()
    with pytest.raises(SystemExit) as end:
        checkpoints.newest(tmp_path)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count('\n') == 1 and name in err and 'damaged' not in err


def test_a_buffer_may_be_infinite_and_no_nan(tmp_path):
    mask = torch.full((3, 3), -math.inf)
    saved = state(1)
    saved['model']['mask'] = mask
    assert checkpoints.save(saved, tmp_path, ['ckpt.pt'], parameters=['transformer.wpe.weight'])
    assert torch.equal(checkpoints.newest(tmp_path)[1]['model']['mask'], mask)
    mask[0, 0] = math.nan
    assert not checkpoints.save(saved, tmp_path, ['ckpt.pt'], parameters=['transformer.wpe.weight'])


@pytest.mark.parametrize('loss', [math.nan, -math.inf, torch.tensor(math.nan)])
def test_a_best_loss_that_is_no_number_is_none(tmp_path, loss):
    torch.save(state(1, loss), tmp_path / 'best.pt')
    assert checkpoints.load(tmp_path / 'best.pt', resume=True)['best_val_loss'] == math.inf
    checkpoints.save(state(2, 5.0), tmp_path, ['best.pt', 'ckpt.pt'])
    assert steps(tmp_path)['best.pt'] == 2


def test_a_best_whose_weights_are_no_numbers_is_replaced(tmp_path):
    saved = state(1, 1.0)
    saved['model']['transformer.wpe.weight'][0] = math.nan
    torch.save(saved, tmp_path / 'best.pt')
    checkpoints.save(state(2, 5.0), tmp_path, ['best.pt', 'ckpt.pt'])
    assert steps(tmp_path)['best.pt'] == 2


LAUNCHES = [('train.py', ['--init_from=resume']), ('train.py', ['--test', '--checkpoint=checkpoints/ckpt.pt']),
            ('train.py', ['--init_from=checkpoints/ckpt.pt', '--out_dir=new']),
            ('sample.py', ['--checkpoint=checkpoints/ckpt.pt']), ('checkpoint_averaging.py', ['--num_checkpoints=1'])]


@pytest.mark.parametrize('script, args', LAUNCHES)
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_every_script_refuses_weights_that_are_not_finite(run, trained, script, args, bad):
    """Infinite ones also in a file that does not say which are its parameters, as nanoGPT's."""
    saved = torch.load(trained / 'ckpt.pt', weights_only=True)
    saved['model']['transformer.h.0.ln_1.weight'][0] = bad
    saved.pop('parameters')
    for path in trained.glob('*.pt'):
        path.unlink()
    torch.save(saved, trained / 'ckpt.pt')
    result = run(script, *args, *(['--dataset=tiny', '--device=cpu', '--max_iters=12'] if script == 'train.py' else []))
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    assert 'transformer.h.0.ln_1.weight' in result.err and 'not finite' in result.err and 'damaged' not in result.err


@pytest.mark.parametrize('name', ['exp_avg', 'exp_avg_sq', 'step'])
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_resume_passes_over_moments_that_are_not_finite(run, trained_gpt2, name, bad):
    saved = torch.load(trained_gpt2 / 'ckpt.pt', weights_only=True)
    saved['optimizer']['state'][1][name].fill_(bad)
    os.unlink(trained_gpt2 / 'ckpt.pt')
    torch.save(saved, trained_gpt2 / 'ckpt.pt')
    result = run('train.py', '--init_from=resume', '--device=cpu', '--max_iters=12')
    assert result.status == 0 and '; best.pt is taken' in result.out, result.err  # the same state under another name
    assert f"not finite: optimizer['state'][1]['{name}']" in result.out
    again = checkpoints.load(trained_gpt2 / 'ckpt.pt', resume=True)
    assert again['iter_num'] == 12 and all(value.isfinite().all() for value in again['optimizer']['state'][1].values())


def test_an_average_of_another_model(run, trained):
    saved = torch.load(trained / 'ckpt.pt', weights_only=True)
    for change, named in ({'n_averaged': 3, 'ema': {'a.weight': torch.ones(3)}}, 'the ema of the checkpoint'), (
            {'ema': saved['model']}, 'n_averaged'), (
            {'n_averaged': 3, 'ema': saved['model'] | {'lm_head.weight': torch.ones(2, 2)}}, 'lm_head.weight'):
        for path in trained.glob('*.pt'):
            path.unlink()
        torch.save(saved | change, trained / 'ckpt.pt')
        result = run('train.py', '--init_from=resume', '--device=cpu', '--max_iters=12', '--ema_decay=0.9')
        assert result.status == 2 and result.err.count('\n') == 1 and named in result.err, result.err


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """torch opens a file several times, and between two of them a run puts the next ckpt.pt in its place."""
    sound, later = torch.load, iter([2, 3])
    checkpoints.save(state(1), tmp_path, ['ckpt.pt'])

    def load(*args, **kwargs):
        loaded = sound(*args, **kwargs)
        if step := next(later, None):
            with monkeypatch.context() as patch:
                patch.setattr(torch, 'load', sound)
                checkpoints.save(state(step), tmp_path, ['ckpt.pt'])
        return loaded
    monkeypatch.setattr(torch, 'load', load)
    saved, sums = checkpoints.open_lazily(tmp_path / 'ckpt.pt')
    assert saved['iter_num'] == 3
    checkpoints.check_tensor(tmp_path / 'ckpt.pt', saved['model']['transformer.wpe.weight'], sums)

    def delete(*args, **kwargs):
        os.unlink(tmp_path / 'ckpt.pt')
        raise RuntimeError('unable to open file')
    monkeypatch.setattr(torch, 'load', delete)
    with pytest.raises(checkpoints.Gone, match='ckpt.pt is gone'):
        checkpoints.open_lazily(tmp_path / 'ckpt.pt')


def test_a_folder_that_went_away_is_made_again(tmp_path):
    assert checkpoints.save(state(1), tmp_path / 'gone', ['ckpt.pt']) and steps(tmp_path / 'gone') == {'ckpt.pt': 1}


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no such locks')
def test_two_runs_in_one_folder(train, tiny):
    """The second is refused, whether it goes on or begins, and moves nothing."""
    assert train().status == 0
    lock = folders.take_lock(tiny / 'checkpoints')  # this process is the first
    for args in ['--init_from=resume', '--max_iters=20'], [], ['--init_from=auto']:
        result = train(*args)
        assert result.status == 2 and result.err.count('\n') == 1 and 'another run is writing there' in result.err
    assert not (tiny / 'checkpoints.1').exists()
    lock.close()
    assert train().status == 0 and (tiny / 'checkpoints.1').exists()
    (tiny / 'checkpoints/inner').mkdir()
    inner = folders.take_lock(tiny / 'checkpoints/inner')  # a run in a folder of this one is not moved either
    result = train()
    assert result.status == 2 and 'checkpoints/inner' in result.err and not (tiny / 'checkpoints.2').exists()
    inner.close()


def test_a_linked_folder_stays_a_link(train, tiny):
    """What it points to is moved: the link to a large disk goes on to that disk."""
    (tiny / 'disk').mkdir()
    os.symlink(tiny / 'disk', tiny / 'link')
    for _ in range(2):
        assert train('--out_dir=link', '--max_iters=1').status == 0
    assert (tiny / 'link').is_symlink() and (tiny / 'disk.1/ckpt.pt').exists() and (tiny / 'disk/ckpt.pt').exists()
    os.symlink(tiny / 'loop', tiny / 'loop')
    result = train('--out_dir=loop')
    assert result.status == 2 and result.err.count('\n') == 1 and 'out_dir' in result.err


def test_a_long_name(train):
    for args in ['--init_from=resume'], ['--init_from=auto'], ['--test'], []:
        result = train(f'--out_dir={"x" * 300}', *args)
        assert result.status == 2 and result.err.count('\n') == 1, result.err


@pytest.mark.parametrize('tensor, expected', [
    (torch.tensor([1 + 2j, 3j]), True), (torch.tensor([1 + 2j, complex(0, math.nan)]), False),
    (torch.tensor([complex(math.inf, 0)]).conj(), False), (torch.empty(0), True), (torch.empty(3, 0, 2), True),
    (torch.empty(0, dtype=torch.complex64), True), (torch.tensor([True, False]), True), (torch.tensor([2**62]), True),
    (torch.tensor(math.nan), False), (torch.tensor([1.0, -math.inf], dtype=torch.bfloat16), False),
    (torch.zeros(1).expand(10**12), True), (torch.full((1,), math.inf).expand(10**12), False),
    (torch.tensor([0.0, math.nan]).as_strided((10**6, 2), (0, 1)), False), (torch.empty(3, device='meta'), False),
    (torch.tensor([1.0, math.inf]).to_sparse(), False), (torch.tensor([1.0]).to(torch.float8_e4m3fn), True),
])
def test_whether_all_numbers_are_finite(tensor, expected):
    assert model_state.is_finite(tensor) == expected


OF_ANOTHER_MODEL = [
    (lambda saved: saved['model_args'].update(rope=True), "unexpected keyword argument 'rope'"),
    (lambda saved: saved['model'].pop('transformer.wpe.weight'), 'Missing key(s)'),
    (lambda saved: saved['model_args'].update(n_layer='two'), "n_layer = 'two' should be of type int"),
    (lambda saved: saved['model_args'].update(n_embd=33), 'n_embd = 33 must be a multiple of n_head = 2'),
    (lambda saved: saved['model_args'].update(vocab_size=0), 'vocab_size = 0 should be 1 or more'),
    (lambda saved: saved['model'].update(scale=torch.ones(3)), 'Unexpected key(s) in state_dict: "scale"'),
    (lambda saved: saved['model_args'].update(n_embd=64), 'size mismatch for transformer.wte.weight'),
    (lambda saved: saved['model'].update({'lm_head.weight': saved['model']['lm_head.weight'] + 1}),
     'lm_head.weight is not transformer.wte.weight, and the two are one in it'),
]


@pytest.mark.parametrize('script, args, change, words', [
    *(('train.py', ['--init_from=resume'], *case) for case in OF_ANOTHER_MODEL),
    *((*launch, *case) for case in OF_ANOTHER_MODEL[:2] for launch in [
        ('train.py', ['--test']), ('train.py', ['--init_from=checkpoints/ckpt.pt']), ('sample.py', []),
        ('checkpoint_averaging.py', ['--num_checkpoints=1'])])])
def test_a_checkpoint_of_another_model_is_no_damage(run, tiny, trained_gpt2, script, args, change, words):
    """Nor is another one taken in its place. The words are those of GPTConfig and of load_state_dict."""
    saved = torch.load(trained_gpt2 / 'ckpt.pt', weights_only=True)
    change(saved)
    for path in trained_gpt2.glob('*.pt'):
        path.unlink()
    for name in 'ckpt.pt', 'step_0000010.pt', 'best.pt':
        torch.save(saved, trained_gpt2 / name)
    result = run(script, *args, *(['--dataset=tiny', '--max_iters=12'] if script == 'train.py' else []))
    assert result.status == 2 and result.err.count('\n') == 1 and words in result.err, result.err
    assert 'holds' in result.err and 'than model.py makes' in result.err and 'damaged' not in result.err + result.out


def test_random_states_go_through_a_file(tmp_path):
    draw = lambda: (random.random(), np.random.random(), torch.rand(1).item())
    torch.save(checkpoints.random_states(), tmp_path / 'states.pt')
    expected = draw()
    draw()
    checkpoints.restore_random_states(torch.load(tmp_path / 'states.pt', weights_only=True))
    assert draw() == expected
