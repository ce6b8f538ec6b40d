"""Several processes of which one dies, hangs, never comes or runs something else: one line, and all end, in time."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, hooked_script, launch_all, losses, small_run
from test_resume import same

from kit.base import devices, peers

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')

# in step 3 of the rank that the environment names
IN_STEP_3 = ('import os, signal, time\nfrom kit.base import peers\nfrom kit.data import batches\n'
             'peers.REPLY_SECONDS, peers.GRACE_SECONDS, sound = 1, 0.5, batches.torch_seed\n'
             'def torch_seed(seed, step, rank):\n'
             '    if step == 3 and str(rank) == os.environ.get("WHO"):\n'
             '        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # after 30 seconds torchrun would kill it\n'
             '        {}\n'
             '    return sound(seed, step, rank)\nbatches.torch_seed = torch_seed\n')


@pytest.fixture
def several(zygote, tiny):
    """
    several(n, '--max_iters=3', envs={rank: {...}}) -> Result: n processes in the environment of torchrun's workers, see
    conftest.pair. with_store=False: rank 0 makes the store, as where no torchrun has started them.
    """
    def launch(n, *args, code='', envs=None, with_store=True):
        from torch.distributed import TCPStore
        env = {name: value for name, value in os.environ.items() if name != 'FLATGPT_MIRROR'}
        env |= {'WORLD_SIZE': str(n), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
        if with_store:
            store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
            env |= {'MASTER_PORT': str(store.port), 'TORCHELASTIC_USE_AGENT_STORE': 'True'}
        jobs = [env | {'RANK': str(rank), 'LOCAL_RANK': str(rank)} | (envs or {}).get(rank, {}) for rank in range(n)]
        script = hooked_script(tiny, code) if code else ROOT / 'train.py'
        args = '--dataset=tiny', *small_run('--gradient_accumulation_steps=12', *args)
        begin = time.monotonic()
        result = launch_all(zygote, tiny, str(script), args, tiny, jobs)
        assert time.monotonic() - begin < 25
        return result
    return launch


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def one_line(result):
    """What a launch says on stderr, which is one line of ours."""
    assert result.status != 0 and result.err.count('\n') == 1 and 'Traceback' not in result.err, result.err
    return result.err


# ---------------------------------------------------------------------------------------------------------------------
# one that answers no more


@pytest.mark.parametrize('n, who, with_store', [
    pytest.param(2, 1, True, marks=pytest.mark.long), (3, 0, True), pytest.param(3, 1, False, marks=pytest.mark.long)])
def test_one_that_hangs_is_named(several, tiny, n, who, with_store):
    code = IN_STEP_3.format('open("pid", "w").write(str(os.getpid())); time.sleep(60)')
    result = several(n, '--timeout=0.05', code=code, envs={who: {'WHO': str(who)}}, with_store=with_store)
    pid = (tiny / 'pid').read_text()
    assert f'rank {who} (host ' in one_line(result)
    assert f'process {pid}) has not answered for 0.05 minutes' in result.err
    assert f'py-spy dump --pid {pid}' in result.err and '--log-dir' in result.err
    assert list(losses(result))[:2] == [0, 1] and 3 not in losses(result), result.out


@pytest.mark.parametrize('who, with_store', [(1, True), (2, False)])
def test_one_that_is_killed_is_named(several, who, with_store):
    code = IN_STEP_3.format('os.kill(os.getpid(), signal.SIGKILL)')
    result = several(3, code=code, envs={who: {'WHO': str(who)}}, with_store=with_store)
    assert f'rank {who} (host ' in one_line(result) and 'has ended, and the run cannot go on' in result.err


def test_an_error_of_one_is_told_by_it_and_by_no_other(several):
    result = several(3, code=IN_STEP_3.format('raise AssertionError("mine")'), envs={2: {'WHO': '2'}})
    assert result.err.count('Traceback') == 1 and result.err.count('AssertionError: mine') == 1
    assert result.err.count('rank 2 (host ') == 1 and 'gloo' not in result.err, result.err


@pytest.mark.long
@pytest.mark.parametrize('what', ['write', 'show'])
def test_rank_0_may_take_longer_than_a_step(several, what):
    """For its disk and its pictures, with all others waiting."""
    code = ('import os, time\nfrom kit.state import checkpoints\nfrom kit.watch import inside\n'
            'from kit.state.writer import Writer\nwrite, show = Writer.write, inside.show\n'
            'def slow_write(*args, **kwargs):\n    time.sleep(2.5)\n    write(*args, **kwargs)\n'
            'def slow_show(*args):\n    time.sleep(2.5 * (os.environ["RANK"] == "0"))\n    show(*args)\n'
            + {'write': 'Writer.write = slow_write\n', 'show': 'inside.show = slow_show\n'}[what])
    when = {'write': ['--eval_interval=0', '--save_interval=1'], 'show': ['--eval_interval=1', '--save_interval=0']}
    result = several(2, '--timeout=0.03', '--max_iters=2', *when[what], code=code)
    assert result.status == 0 and list(losses(result)) == [0, 1], result.err


def test_errors_about_other_things_are_left_alone():
    assert peers.lost(RuntimeError('[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:5')) == 'closed'
    assert peers.lost(RuntimeError('[gloo/unbound_buffer.cc:81] Timed out waiting 1000ms for recv')) == 'timeout'
    assert peers.lost(torch.distributed.DistNetworkError('broken pipe')) == 'closed'
    for error in RuntimeError('mat1 and mat2'), ValueError('gloo'), AssertionError('timeout'):
        assert peers.lost(error) == ''


# ---------------------------------------------------------------------------------------------------------------------
# those that run something else


OTHERS = {
    'settings': ('import sys, os\nsys.argv += ["--learning_rate=0.5"] * (os.environ["RANK"] == "1")\n',
                 'learning_rate = 0.003 in rank 0 (host', '0.5 in rank 1 (host'),
    'code': ('import os\nfrom kit.state import provenance\nsound = provenance.collect_source\n'
             'provenance.collect_source = lambda: sound() | ({"kit/data/bins.py": b"x"} if os.environ["RANK"] == "1" '
             'else {})\n', 'kit/data/bins.py is one in rank 0', 'another in rank 1'),
    'versions': ('import os, torch\nif os.environ["RANK"] == "1": torch.__version__ = "2.4.1"\n',
                 f"torch = '{torch.__version__}' in rank 0", "'2.4.1' in rank 1"),
    'data': ('import os\nfrom kit.data import tokens\nsound = tokens.fingerprint\n'
             'tokens.fingerprint = lambda *args: sound(*args) + os.environ["RANK"]\n',
             'dataset tiny is one in rank 0', 'another in rank 1'),
    'number of processes': ('', 'WORLD_SIZE = 2 in rank 0', '3 in rank 1'),
}


@pytest.mark.parametrize('kind', OTHERS)
def test_processes_that_differ_are_told_apart(several, tiny, kind):
    code, *words = OTHERS[kind]
    result = several(2, code=code, envs={1: {'WORLD_SIZE': '3'}} if kind == 'number of processes' else None)
    line = one_line(result)
    assert f'the processes differ in their {kind}: ' in line and all(word in line for word in words), line
    assert result.status == 2 and not (tiny / 'checkpoints').exists()


def test_what_may_differ(several):
    code = ('import sys, os\nsys.argv += ["--threads=1"] * (os.environ["RANK"] == "1")\n')
    result = several(2, '--max_iters=1', code=code, envs={1: {'LOCAL_RANK': '0', 'HOSTNAME': 'other'}})
    assert result.status == 0, result.err


def test_all_that_differ_are_counted():
    people = [{'host': host, 'about': {'settings': {'a': a, 'b': b}}} for host, a, b in
              [('x', 1, 1), ('x', 1, 1), ('y', 2, 1), ('y', 1, 9)]]
    line = peers.difference(people)
    assert 'a = 1 in ranks 0, 1, 3 (host x, y), 2 in rank 2 (host y) (and so do 1 more)' in line
    assert peers.difference(people[:2]) == ''


# ---------------------------------------------------------------------------------------------------------------------
# the first meeting


SOON = 'from kit.base import errors, peers\npeers.JOIN_SECONDS = 1\n' \
       'errors.time.sleep = lambda s, sound=errors.time.sleep: sound(min(s, 0.5))\n'


def test_one_that_never_comes(several, tiny):
    """Rank 1 of three is late by more than all would wait."""
    code = f'import os\nif os.environ["RANK"] == "1": os._exit(0)\n{SOON}'
    result = several(3, code=code)
    assert '2 of 3 processes have come to 127.0.0.1:' in one_line(result) and 'rank 1 did not' in result.err
    assert 'within 1 seconds' in result.err and result.status == 2 and not (tiny / 'checkpoints').exists()


@pytest.mark.parametrize('env, words', [
    ({'MASTER_ADDR': ''}, 'WORLD_SIZE=2 and no MASTER_ADDR'), ({'MASTER_PORT': ''}, 'WORLD_SIZE=2 and no MASTER_PORT'),
    ({'MASTER_PORT': 'http'}, 'MASTER_PORT=http'), ({'MASTER_PORT': '99999'}, 'MASTER_PORT=99999'),
    ({'MASTER_PORT': '0'}, 'MASTER_PORT=0'), ({'RANK': '2'}, 'RANK=2 and WORLD_SIZE=2'),
    ({}, 'nobody answers there, tried for 1 seconds (Connection refused)'),
    ({'MASTER_ADDR': 'nowhere.invalid'}, 'MASTER_ADDR=nowhere.invalid'),
])
def test_an_address_that_will_not_do(hooked, tiny, env, words):
    env = {'WORLD_SIZE': '2', 'RANK': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())} | env
    begin = time.monotonic()
    result = hooked(SOON, env=env)
    assert words in one_line(result) and result.status == 2 and time.monotonic() - begin < 15
    assert not (tiny / 'checkpoints').exists()


def test_more_processes_than_gpus(monkeypatch, capsys):
    monkeypatch.setattr(devices, 'cuda_fault', lambda index: '')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    for name in 'auto', 'cuda':
        with pytest.raises(SystemExit) as end:
            devices.choose_device(name, 0, 4)
        err = capsys.readouterr().err
        assert end.value.code == 2 and '4 processes on this machine and 2 GPUs' in err and err.count('\n') == 1
        assert '--nproc_per_node=2' in err


# ---------------------------------------------------------------------------------------------------------------------
# restarts


RESTARTED = {'TORCHELASTIC_RUN_ID': 'x', 'TORCHELASTIC_RESTART_COUNT': '1'}  # its agent here is the zygote


@pytest.mark.parametrize('init_from', [pytest.param('scratch', marks=pytest.mark.long), 'first.pt'])
def test_what_torchrun_restarts_goes_on(train, several, tiny, init_from):
    """Whatever it was told to begin with; the end is that of a run that nothing has disturbed."""
    if init_from == 'first.pt':
        assert train('--max_iters=1', '--out_dir=first').status == 0
        (tiny / 'first/ckpt.pt').rename(tiny / 'first.pt')
    args = f'--init_from={init_from}', '--dropout=0.1'
    assert several(2, *args, '--out_dir=whole').status == 0
    assert train('--out_dir=cut', '--max_iters=7').status == 0  # an earlier run, of another launch
    first = several(2, *args, '--out_dir=cut', code=IN_STEP_3.replace('3', '7', 1).format('os._exit(1)'),
                    envs={0: {'TORCHELASTIC_RUN_ID': 'x'}, 1: {'TORCHELASTIC_RUN_ID': 'x', 'WHO': '1'}})
    assert first.status == 1 and list(losses(first))[0] == 0 and 'moved to cut.1' in first.out, first.err
    second = several(2, *args, '--out_dir=cut', envs={0: RESTARTED, 1: RESTARTED})
    assert 'init_from: resume (torchrun has started the processes again' in second.out, second.err
    assert list(losses(second)) == [5, 6, 7, 8, 9] and not (tiny / 'cut.2').exists()
    assert same(*(torch.load(tiny / run / 'ckpt.pt', weights_only=True) for run in ('whole', 'cut')))


def test_an_earlier_run_is_not_taken_for_that_of_this_launch(train, tiny):
    """Nor one of another torchrun, nor what this one has begun and not saved."""
    launches = lambda: json.loads((tiny / 'checkpoints/config.json').read_text())
    assert train(env=RESTARTED).status == 0
    config = launches()
    assert len(config['launches'][-1]['torchrun']) == 3
    config['launches'][-1]['torchrun'][2] -= 3600  # by then it was another with this number
    (tiny / 'checkpoints/config.json').write_text(json.dumps(config))
    again = train('--max_iters=2', env=RESTARTED)
    assert 'moved to checkpoints.1' in again.out and list(losses(again)) == [0, 1], again.err
    for path in (tiny / 'checkpoints').glob('*.pt'):
        path.unlink()
    again = train('--max_iters=3', env=RESTARTED)
    assert 'moved to checkpoints.2' in again.out and list(losses(again)) == [0, 1, 2], again.err
    again = train('--max_iters=4', env=RESTARTED)
    assert 'started the processes again' in again.out and list(losses(again)) == [3], again.err
    again = train('--max_iters=1')  # no torchrun
    assert 'moved to checkpoints.3' in again.out and launches()['launches'][-1]['torchrun'] is None


FAULTS = """
import glob, os, signal, time
from kit.data import batches
_attempt, sound, fsync = int(os.environ['TORCHELASTIC_RESTART_COUNT']), batches.torch_seed, os.fsync
def torch_seed(seed, step, rank):
    if (_attempt, rank, step) == (0, 1, 7):
        os.kill(os.getpid(), signal.SIGKILL)
    if (_attempt, rank, step) == (2, 1, 8):
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1)
    return sound(seed, step, rank)
def killed_in_a_save(handle):
    if _attempt == 1 and glob.glob('cut/.*.pt.part'):
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(handle)
batches.torch_seed, os.fsync = torch_seed, killed_in_a_save
"""


def test_torchrun_restarts_and_is_told_to_stop(several, tiny):
    """Rank 1 is killed in a step, rank 0 in a save, and then torchrun gets a SIGTERM, as Slurm sends it."""
    args = '--max_iters=15', '--dropout=0.1', '--gradient_accumulation_steps=2'
    assert several(2, *args, '--out_dir=whole').status == 0
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=3',
               hooked_script(tiny, FAULTS), '--dataset=tiny', *small_run(*args, '--out_dir=cut')]
    done = subprocess.run(command, cwd=tiny, capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'},
                          timeout=120)
    assert done.returncode != 0 and 'SIGTERM: stopped after 9 steps; this goes on as if' in done.stdout, done.stderr
    assert done.stdout.count('init_from: resume (torchrun has started the processes again') == 2
    assert done.stdout.count('checkpoint: cut/ckpt.pt, after 5 steps') == 2, done.stdout
    assert done.stderr.count('has ended, and the run cannot go on') == 2 and 'gloo' not in done.stderr, done.stderr
    assert several(2, *args, '--init_from=resume', '--out_dir=cut').status == 0
    assert same(*(torch.load(tiny / run / 'ckpt.pt', weights_only=True) for run in ('whole', 'cut')))


@pytest.mark.long
def test_a_rank_that_is_killed_at_random():
    """tests/kill_a_rank.py does many rounds."""
    command = [sys.executable, ROOT / 'tests/kill_a_rank.py', '--rounds=1', '--steps=120']
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'during a save': 1" in done.stdout and '1 went on from a checkpoint; equal' in done.stdout, done.stdout


def test_a_meeting_before_is_not_this_one():
    """The store of torchrun keeps what was said before a restart, and each torchrun counts its own."""
    store = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    names = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:  # rank 0 last: the others find what the meeting before has left
            others = [pool.submit(peers.meet, store, rank, 3, {}, 'here') for rank in (1, 2)]
            time.sleep(0.2)
            names.append(peers.meet(store, 0, 3, {}, 'here'))
            assert [other.result(20) for other in others] == [names[-1]] * 2
    assert names[0] != names[1]


def test_threads_that_are_not_ours_hold_up_no_end(pair, tiny):
    """Such as those of the compiler's pool, which end with the interpreter alone."""
    code = ('from concurrent.futures import ThreadPoolExecutor\n_pool = ThreadPoolExecutor(1)\n'
            '_pool.submit(int).result()\n')
    begin = time.monotonic()
    result = pair('--max_iters=2', script=hooked_script(tiny, code))
    assert result.status == 0 and time.monotonic() - begin < 60, result.err


def test_nccl_is_for_gpus(pair, tiny):
    with pytest.raises(AssertionError, match="backend = 'nccl': it is for GPUs, and device is cpu; --backend=auto"):
        pair('--backend=nccl')


def test_a_script_of_one_process_is_one(run, trained):
    """In a pod or a job that trains with several, too; but not several times at once."""
    several = {'WORLD_SIZE': '2', 'RANK': '1', 'MASTER_ADDR': 'nowhere', 'MASTER_PORT': '1'}
    words = ['--checkpoint=checkpoints/ckpt.pt', '--output=new.pt', '--sharded']
    refused = run('export.py', *words, env=several | {'TORCHELASTIC_RUN_ID': 'x'})
    assert refused.status == 2 and 'start it with python, without torchrun' in refused.err, refused.err
    for given in words, ['--checkpoint=new.pt', '--output=back.pt']:
        result = run('export.py', *given, env=several)
        assert result.status == 0 and 'wrote ' in result.out, result.err
    one, back = (torch.load(path, weights_only=True)['model'] for path in (trained / 'ckpt.pt',
                                                                           trained.parent / 'back.pt'))
    assert all(torch.equal(one[name], back[name]) for name in one)
    averaged = run('checkpoint_averaging.py', '--num_checkpoints=2', '--evaluate=False', env=several)
    assert averaged.status == 0, averaged.err
