"""Interrupted at any step and resumed is never interrupted, bit for bit: weights, moments, averages, log, best loss."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import GPT2, OF_THE_MACHINE, ROOT, TINY, hooked_script, losses, records, torchrun

# sends the process a signal in the middle of a step
SEND = ('import os, signal\nfrom kit.data import batches\nsound, SIGNAL = batches.torch_seed, signal.{name}\n'
        'def torch_seed(seed, step, rank):\n'
        '    if step == {step}: os.kill(os.getpid(), SIGNAL)\n'
        '    return sound(seed, step, rank)\n'
        'batches.torch_seed = torch_seed\n')


def same(a, b):
    """Whether two checkpoints hold the same state of the training, bit for bit."""
    for key in a.keys() | b.keys():
        x, y = a.get(key), b.get(key)
        if key in ('model', 'ema', 'swa'):
            assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x), key
        elif key == 'optimizer':
            assert all(torch.equal(value, y['state'][i][name])
                       for i, state in x['state'].items() for name, value in state.items()), key
            assert x['param_groups'] == y['param_groups']
        elif key not in ('config', 'random_states', 'versions'):
            assert x == y, key
    return True


def told(result):
    """The lines of a log that tell of the training, without what depends on the clock."""
    lines = [re.sub(r'time [^,]+, mfu [^,]+|[^ ]+ tok/s, eta [^,]+', '', line) for line in result.out.splitlines()]
    return [line for line in lines if line.startswith(('iter', 'step', 'WARNING'))
            and not line.startswith('WARNING: a step takes')]  # a clock's too


@pytest.mark.parametrize('args', [
    ['--sampling=random'], ['--sampling=shuffle'], ['--sampling=sequential'], ['--gradient_accumulation_steps=2'],
    ['--ema_decay=0.9'], ['--swa_start=3'], ['--swa_start=6'], ['--dtype=bfloat16'], ['--beta2=0.9', '--bias=True'],
    ['--always_save_checkpoint=False', '--save_interval=3'],
    ['--lr_schedule=plateau:1:0.5', '--eval_interval=1', '--learning_rate=0.3', *GPT2],
    ['--grad_clip_quantile=0.5', '--grad_clip=0.5', '--max_iters=20'],
    ['--lr_by_norm', '--learning_rate=0.3', '--max_iters=20'],
    ['--early_stop=9', '--eval_interval=1', '--learning_rate=1e-9', '--min_lr=0', '--max_iters=99'],
], ids=' '.join)
def test_resume_is_the_uninterrupted_run(train, hooked, tiny, args):
    """Dropout is on. The run is told to stop in its step 4, and once more in its step 7."""
    args = '--dropout=0.2', *args
    whole = train(*args, '--out_dir=whole')
    assert whole.status == 0, whole.err
    first = hooked(SEND.format(step=4, name='SIGTERM'), *args, '--out_dir=cut')
    assert first.status == 143, first.err
    second = hooked(SEND.format(step=7, name='SIGINT'), *args, '--init_from=resume', '--out_dir=cut')
    assert second.status == 130, second.err
    third = train(*args, '--init_from=auto', '--out_dir=cut')
    assert third.status == 0, third.err
    assert [list(losses(run)) for run in (first, second)] == [[0, 1, 2, 3, 4], [5, 6, 7]]
    assert list(losses(third)) == list(losses(whole))[8:] != []
    assert told(first) + told(second) + told(third) == told(whole)
    names = sorted(path.name for path in (tiny / 'whole').glob('*.pt'))
    assert names == sorted(path.name for path in (tiny / 'cut').glob('*.pt'))
    for name in names:
        assert same(*(torch.load(tiny / run / name, weights_only=True) for run in ('whole', 'cut')))
    figures = [[{k: v for k, v in record.items() if k not in OF_THE_MACHINE}
                for record in records(tiny / run)] for run in ('whole', 'cut')]
    assert figures[0] == figures[1]


def test_float16_with_its_scaler(train, hooked, tiny):
    args = '--dtype=float16', '--max_iters=6'
    train(*args, '--out_dir=whole')
    assert hooked(SEND.format(step=2, name='SIGTERM'), *args, '--out_dir=cut').status == 143
    assert train('--init_from=resume', '--out_dir=cut', '--max_iters=6').status == 0
    whole, cut = (torch.load(tiny / run / 'ckpt.pt', weights_only=True) for run in ('whole', 'cut'))
    assert same(whole, cut) and whole['scaler']['scale'] > 0


def test_two_processes_are_resumed(pair, tiny):
    args = '--gradient_accumulation_steps=2', '--dropout=0.2', '--ema_decay=0.9'
    assert pair(*args, '--out_dir=whole').status == 0
    # the signal reaches only the second of them; both stop, at the same step
    send = SEND.format(step=4, name='SIGTERM').replace('\n', '\n    ')
    code = f'import os\nif os.environ["RANK"] == "1":\n    {send}'
    stopped = torchrun(tiny, *args, '--out_dir=cut', script=hooked_script(tiny, code))
    assert stopped.status != 0 and 'SIGTERM: stopped after 5 steps' in stopped.out, stopped.out + stopped.err
    assert '  torchrun --standalone --nproc_per_node=2 train.py --out_dir=cut --init_from=resume\n' in stopped.out
    assert pair('--init_from=resume', '--out_dir=cut').status == 0
    assert same(*(torch.load(tiny / run / 'ckpt.pt', weights_only=True) for run in ('whole', 'cut')))


@pytest.mark.parametrize('name, status', [('SIGTERM', 143), ('SIGINT', 130), ('SIGHUP', 129)])
def test_a_signal_saves_and_says_how_to_go_on(hooked, tiny, name, status):
    result = hooked(SEND.format(step=7, name=name), '--save_interval=0', '--eval_interval=0')
    assert result.status == status, result.err
    assert list(losses(result)) == list(range(8)) and 'Traceback' not in result.err
    assert f'{name}: stopped after 8 steps' in result.out and 'python train.py --init_from=resume' in result.out
    assert torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)['iter_num'] == 8
    assert (tiny / 'checkpoints/training.log').read_text() == result.out


def test_sigusr1_saves_and_runs_on(hooked, tiny):
    result = hooked(SEND.format(step=6, name='SIGUSR1'), '--save_interval=0', '--eval_interval=0')
    assert result.status == 0 and list(losses(result)) == list(range(10)), result.err
    assert result.out.count('saving checkpoint') == 2


def test_before_the_first_step_there_is_nothing_to_save(hooked, tiny):
    code = 'import os, signal\nfrom kit.base import signals\nsound = signals.listen\n' \
           'def listen():\n    sound()\n    os.kill(os.getpid(), signal.SIGTERM)\nsignals.listen = listen\n'
    result = hooked(code)
    assert result.status == 143 and not list((tiny / 'checkpoints').glob('*.pt')), result.err
    assert 'nothing to go on from yet' in result.out and '--init_from=resume' not in result.out


@pytest.mark.skipif(os.name == 'nt', reason='signals are sent')
def test_a_second_ctrl_c_leaves_at_once(tiny):
    """The real thing: a process in a step that takes long, and two signals from outside."""
    slow = 'import time\nfrom kit.data import batches\nsound = batches.torch_seed\n' \
           'def torch_seed(*key):\n    print("in a step", flush=True)\n    end = time.time() + 60\n' \
           '    while time.time() < end: time.sleep(0.1)\nbatches.torch_seed = torch_seed\n'
    process = subprocess.Popen([sys.executable, hooked_script(tiny, slow), '--dataset=tiny', *TINY], cwd=tiny,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith('in a step'):
            break
    start = time.time()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130 and time.time() - start < 20
    assert process.stderr.read().count('once more leaves at once') == 1


# ---------------------------------------------------------------------------------------------------------------------
# where a run begins


def test_auto(train, tiny):
    fresh = train('--init_from=auto')
    assert 'init_from: scratch (auto: checkpoints holds no checkpoint)' in fresh.out and len(losses(fresh)) == 10
    again = train('--init_from=auto', '--max_iters=12')
    assert 'init_from: resume' in again.out and list(losses(again)) == [10, 11] and 'moved to' not in again.out
    for path in (tiny / 'checkpoints').glob('*.pt'):
        path.write_bytes(b'damaged')
    lost = train('--init_from=auto')  # never silently from scratch, over what may be mended
    assert lost.status == 2 and lost.err.count('\n') == 1 and 'ckpt.pt is damaged' in lost.err


def test_a_finished_run_is_extended(train, tiny):
    train('--lr_decay_iters=10', '--eval_interval=2')
    result = train('--init_from=resume', '--max_iters=15', '--lr_decay_iters=10')
    assert list(losses(result)) == [10, 11, 12, 13, 14] and 'max_iters = 15 (it has 10)' in result.out
    assert torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)['iter_num'] == 15


def test_on_another_text(train, run, tiny):
    """The loss of the first text is no mark for the second: its best.pt goes to later.1, and a new one comes."""
    (tiny / 'other.txt').write_text((tiny / 'text.txt').read_text()[::-1])
    assert run('prepare.py', '--input=other.txt', '--dataset=other').status == 0
    train()
    result = run('train.py', '--init_from=resume', '--dataset=other', '--max_iters=15', '--device=cpu')
    assert result.status == 0 and 'best.pt: not of the run' in result.out, result.err
    assert torch.load(tiny / 'checkpoints/best.pt', weights_only=True)['iter_num'] == 15
    assert torch.load(tiny / 'checkpoints/later.1/best.pt', weights_only=True)['iter_num'] <= 10


@pytest.mark.parametrize('change, named', [
    (lambda saved: saved['optimizer'].update(param_groups=[]), 'its groups have []'),
    (lambda saved: saved['optimizer'].update(state={}), 'nothing of what Muon keeps'),
    (lambda saved: saved['optimizer']['param_groups'].pop(), 'does not fit'),
    (lambda saved: saved.update(iter_num=-5), 'iter_num'),
    (lambda saved: saved.update(rewinds=-1), 'bad steps'),
    (lambda saved: saved.update(val_losses=[None]), 'no checkpoint of flatGPT'),
    (lambda saved: saved['config'].update(learning_rate='fast'), 'learning_rate of the checkpoint'),
    (lambda saved: saved['model_args'].update(n_head=5), 'n_head = 5'),
])
def test_states_that_make_no_sense(run, trained, change, named):
    saved = torch.load(trained / 'ckpt.pt', weights_only=True)
    for path in trained.glob('*.pt'):
        path.unlink()
    change(saved)
    torch.save(saved, trained / 'ckpt.pt')
    result = run('train.py', '--init_from=resume', '--dataset=tiny', '--device=cpu')
    assert result.status == 2 and result.err.count('\n') == 1 and named in result.err, result.err


def test_generators_of_code_that_somebody_adds(hooked, tiny):
    """Python's and NumPy's go on where they stopped."""
    draws = ('import random, numpy\nfrom kit.data import batches\nSOUND_DRAW = batches.torch_seed\n'
             'def draw(*key):\n'
             '    print("drawn", key[1], random.random(), numpy.random.random())\n'
             '    return SOUND_DRAW(*key)\nbatches.torch_seed = draw\n')
    drawn = lambda result: [line for line in result.out.splitlines() if line.startswith('drawn')]
    whole = hooked(draws, '--out_dir=whole')
    first = hooked(draws + SEND.format(step=4, name='SIGTERM'), '--out_dir=cut')
    second = hooked(draws, '--init_from=resume', '--out_dir=cut')
    assert drawn(first) + drawn(second) == drawn(whole) and len(drawn(whole)) == 10


def test_ranks_take_what_rank_0_takes(pair, tiny, trained):
    """Rank 1 finds ckpt.pt damaged where rank 0 does not: it says so, and does not train on from elsewhere."""
    code = ('import os\nfrom kit.state import checkpoints\nSOUND_READ = checkpoints.read\n'
            'def read(path, resume=False):\n'
            '    if os.environ["RANK"] == "1": raise checkpoints.Damaged(f"{path} is damaged, here")\n'
            '    return SOUND_READ(path, resume)\ncheckpoints.read = read\n')
    result = pair('--init_from=resume', '--max_iters=20', script=hooked_script(tiny, code))
    assert result.status != 0 and 'is damaged, here' in result.err and not losses(result)


def test_what_rank_0_finds_wrong_is_told_once(tiny):
    result = torchrun(tiny, '--gradient_accumulation_steps=2', '--init_from=resume', '--out_dir=none')
    ours = [line for line in result.err.splitlines() if line.startswith('train.py: ')]
    assert result.status != 0 and len(ours) == 1 and 'none/ckpt.pt: there is no checkpoint' in ours[0], result.err
    assert 'Connection closed' not in result.err


def test_a_finished_run_is_left_alone(train, tiny, trained):
    before = (tiny / 'checkpoints/ckpt.pt').stat().st_mtime_ns
    result = train('--init_from=resume')
    assert result.status == 0 and 'all 10 steps are made; a higher --max_iters goes on' in result.out
    assert (tiny / 'checkpoints/ckpt.pt').stat().st_mtime_ns == before and not losses(result)


def test_a_new_run_from_weights(train, run, tiny):
    """Fine-tuning: another schedule, a smaller window; the old run is moved aside, its settings stay behind."""
    train('--dropout=0.2', '--weight_decay=0.3', '--ema_decay=0.9')
    old = torch.load(tiny / 'checkpoints/best.pt', weights_only=True)
    args = ['--dataset=tiny', '--max_iters=3', '--block_size=8', '--learning_rate=1e-9', '--min_lr=0', '--eval_iters=2',
            '--device=cpu', '--tensorboard=False', '--log_interval=1', '--weight_decay=0',
            '--optimizer=adamw']
    for weights, key in ('auto', 'ema'), ('raw', 'model'):
        result = run('train.py', '--init_from=checkpoints/best.pt', *args, '--out_dir=tuned', f'--weights={weights}')
        assert result.status == 0, result.err
        new = torch.load(tiny / 'tuned/ckpt.pt', weights_only=True)
        assert list(losses(result)) == [0, 1, 2] and new['iter_num'] == 3 and 'ema' not in new
        assert new['config']['dropout'] == 0 and new['config']['n_embd'] == 32 and new['model_args']['block_size'] == 8
        for name, value in old[key].items():
            if 'wpe' not in name:
                torch.testing.assert_close(new['model'][name], value, rtol=0, atol=1e-7)
    result = run('train.py', '--init_from=checkpoints/best.pt', *args)
    assert result.status == 0 and 'moved to checkpoints.1' in result.out


@pytest.mark.parametrize('args, named', [
    (['--init_from=none.pt'], ['none.pt', 'no such checkpoint']),
    (['--init_from=checkpoints/ckpt.pt', '--weights=swa'], ['weights', 'swa', 'raw']),
    (['--init_from=checkpoints/ckpt.pt', '--n_layer=3'], ['n_layer = 3', 'n_layer = 2']),
    (['--init_from=checkpoints/ckpt.pt', '--block_size=32'], ['block_size', '16 positions']),
    (['--init_from=text.pt'], ['text.pt', 'damaged', 'no checkpoint']),
    (['--weights=best'], ['weights', 'best', 'raw']),
    (['--save_errors=ignore'], ['save_errors', 'ignore', 'warn']),
    (['--ema_decay=1'], ['ema_decay']),
    (['--swa_start=-1'], ['swa_start']),
    (['--max_bad_steps=-1'], ['max_bad_steps']),
    (['--ema_decay=0.9', '--swa_start=3'], ['ema_decay', 'swa_start', 'one average']),
])
def test_what_will_not_do(run, tiny, trained_gpt2, args, named):
    (tiny / 'text.pt').write_text('no archive')
    before = sorted(tiny.rglob('*'))
    result = run('train.py', '--dataset=tiny', '--device=cpu', *args)
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    assert all(word in result.err for word in named), result.err
    assert sorted(tiny.rglob('*')) == before


def test_best_of_another_branch_stays(train, tiny):
    """An older state goes on with a rate that spoils it: the better best.pt of the first try is not replaced."""
    train('--eval_interval=2', '--max_iters=20')
    best = torch.load(tiny / 'checkpoints/best.pt', weights_only=True)
    for name in 'ckpt.pt', 'step_0000010.pt', 'step_0000015.pt', 'step_0000020.pt':
        (tiny / 'checkpoints' / name).unlink()
    os.link(tiny / 'checkpoints/step_0000005.pt', tiny / 'checkpoints/ckpt.pt')
    result = train('--init_from=resume', '--eval_interval=2', '--max_iters=8', '--learning_rate=1e-4', '--min_lr=1e-4')
    assert 'ckpt.pt, after 5 steps' in result.out and 'best.pt stays' in result.out, result.err
    after = torch.load(tiny / 'checkpoints/best.pt', weights_only=True)
    assert after['iter_num'] == best['iter_num'] and after['best_val_loss'] == best['best_val_loss']


def test_torn_lines_of_a_kill(train, tiny):
    train('--max_iters=5')
    for name in 'training.log', 'metrics.jsonl':
        with open(tiny / 'checkpoints' / name, 'a') as file:
            file.write('{"half a li')
    train('--init_from=resume', '--max_iters=7')
    assert '{"half a li\n' in (tiny / 'checkpoints/training.log').read_text()
    lines = (tiny / 'checkpoints/metrics.jsonl').read_text().splitlines()
    assert lines.count('{"half a li') == 1 and '"step": 5' in lines[lines.index('{"half a li') + 1]


# ---------------------------------------------------------------------------------------------------------------------
# what the disk does


FULL_DISK = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))'


def test_save_errors_stop(hooked, tiny):
    pytest.importorskip('resource')
    result = hooked(FULL_DISK, '--save_errors=stop', '--max_iters=100000', '--compile=False', '--eval_interval=0',
                    '--save_interval=5')
    assert result.status == 1 and result.err.count('\n') == 1 and 'no checkpoint was saved' in result.err
    assert 5 <= len(losses(result)) < 100_000, 'it goes on until the write has failed'


def test_what_was_not_saved_may_be_beaten_by_less(hooked, tiny):
    """The save of the lowest loss fails; a later one that is better than what lies on the disk is best.pt."""
    code = ('import torch, os\nfrom kit.watch import evaluation\n'
            'sound, sound_measure = torch.save, evaluation.measure\n'
            'values = iter([9, 9, 8, 8, 1, 1, 7, 7, 7.5, 7.5])\n'  # train and val at the steps 0, 2, 4, 6, 8
            'def save(checkpoint, file):\n'
            '    if checkpoint["iter_num"] == 4: raise OSError(28, "No space left on device")\n'
            '    sound(checkpoint, file)\n'
            'torch.save = save\nevaluation.measure = lambda *args: (float(next(values)), 0.5)\n')
    result = hooked(code, '--eval_interval=2', '--max_iters=8')
    assert result.status == 0 and 'No space left on device' in result.out, result.err
    best = torch.load(tiny / 'checkpoints/best.pt', weights_only=True)
    assert (best['iter_num'], best['best_val_loss']) == (6, 7.0)


def test_provenance(train, run, tiny):
    import json
    import zipfile
    (tiny / 'mine.py').write_text('learning_rate = 0.002\n')
    train('mine.py')
    found = json.loads((tiny / 'checkpoints/config.json').read_text())
    launch, = found['launches']
    assert found['settings']['learning_rate'] == 0.002 and 'mine.py' in launch['command']
    assert launch['versions']['torch'] == torch.__version__ and launch['machine']['cpus'] == os.cpu_count()
    with zipfile.ZipFile(tiny / 'checkpoints/source.zip') as archive:
        assert archive.read('train.py') == (ROOT / 'train.py').read_bytes()
        assert archive.read('config/mine.py') == b'learning_rate = 0.002\n'
        assert {path.relative_to(ROOT).as_posix() for path in (ROOT / 'kit').rglob('*.py')} <= set(archive.namelist())
    first = (tiny / 'checkpoints/source.zip').read_bytes()
    for steps, expected in (12, 'source_0000010.zip'), (14, 'source_0000012.zip'):  # no mine.py: other code is kept too
        train('--init_from=resume', f'--max_iters={steps}')
        launches = json.loads((tiny / 'checkpoints/config.json').read_text())['launches']
        assert launches[-1]['source'] == expected and (tiny / 'checkpoints' / expected).exists()
    assert (tiny / 'checkpoints/source.zip').read_bytes() == first
    for damage in b'no archive', first[:-9] + bytes([first[-9] ^ 1]) + first[-8:], first[:900] + b'0' + first[901:]:
        (tiny / 'checkpoints/source.zip').write_bytes(damage)  # what cannot be read is neither used nor a hindrance
        (tiny / 'checkpoints/config.json').write_text('{"launches": {}}')
        assert train('--init_from=resume', '--max_iters=14').status == 0
        assert (tiny / 'checkpoints/source.zip').read_bytes() == damage
