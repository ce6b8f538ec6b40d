"""What the tests share: real launches of the scripts in folders of their own, and small datasets made on the spot."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

# before torch is imported: models this small gain nothing from more threads, and those of two workers starve each other
os.environ.setdefault('OMP_NUM_THREADS', '1')

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MIRROR = Path(os.environ.get('FLATGPT_MIRROR', 'nowhere'))
needs_mirror = pytest.mark.skipif(not (MIRROR / 'tinyshakespeare.txt').is_file(),
                                  reason='FLATGPT_MIRROR names no folder with tinyshakespeare.txt and tiktoken/')

# a model and a run that take a second
TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=4', '--eval_iters=2',
        '--eval_interval=5', '--log_interval=1', '--save_interval=5', '--max_iters=10', '--warmup_iters=2',
        '--device=cpu', '--tensorboard=False']

GPT2 = ['--architecture=gpt2', '--optimizer=adamw']  # for tests that look into weights and moments


def small_run(*args):
    """
    The arguments of a small run. Where none of args says which model it is, the default's tables of n-grams, 8,192 rows
    each, which would be nearly all of it, have 64.
    """
    says = any(str(arg).startswith(('--architecture', '--init_from', '--test')) or not str(arg).startswith('-')
               for arg in args)
    return [*TINY, *([] if says else ['--architecture=modern,ngram_embeddings=64']), *args]


# figures of metrics.jsonl that differ between two runs of the same steps
OF_THE_MACHINE = ('time', 'time_ms', 'data_ms', 'tokens_per_second', 'mfu', 'system/cpu_memory_gib',
                  'system/cpu_free_gib', 'system/cpu_percent')


@dataclass
class Result:
    status: int
    out: str
    err: str


@pytest.fixture(scope='session')
def zygote(tmp_path_factory):
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONDONTWRITEBYTECODE'}
    env |= {'OMP_NUM_THREADS': '1', 'PYTHONPYCACHEPREFIX': str(tmp_path_factory.mktemp('pycache'))}  # compile once
    process = subprocess.Popen([sys.executable, str(ROOT / 'tests' / 'zygote.py')], text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env=env)
    yield process
    process.stdin.close()
    process.wait()


def launch_all(zygote, folder, script, args, cwd, envs):
    """The script run by the zygote, once for each of envs, side by side; the first status that is not 0 counts."""
    out, err = [[folder / f'.{name}.{i}' for i in range(len(envs))] for name in ('stdout', 'stderr')]
    zygote.stdin.write(json.dumps([dict(script=script, args=[str(a) for a in args], cwd=str(cwd), env=env,
                                        stdout=str(o), stderr=str(e)) for env, o, e in zip(envs, out, err)]) + '\n')
    zygote.stdin.flush()
    statuses = [int(word) for word in zygote.stdout.readline().split()]
    texts = [''.join(path.read_text(encoding='utf-8') for path in paths) for paths in (out, err)]
    for path in out + err:
        path.unlink()
    return Result(next(filter(None, statuses), 0), *texts)


@pytest.fixture
def run(zygote, tmp_path):
    """run('train.py', '--max_iters=3', cwd=..., env={...}) -> Result. Without cwd, in this test's own folder."""
    def launch(script, *args, cwd=tmp_path, env=None):
        env = {k: v for k, v in os.environ.items() if k != 'FLATGPT_MIRROR'} | (env or {})
        script = str(ROOT / script)
        if not hasattr(os, 'fork'):
            done = subprocess.run([sys.executable, script, *map(str, args)], cwd=cwd, env=env, text=True,
                                  capture_output=True, encoding='utf-8', stdin=subprocess.DEVNULL)
            return Result(done.returncode, done.stdout, done.stderr)
        return launch_all(zygote, tmp_path, script, args, cwd, [env])
    return launch


def some_text(n_chars=20_000, seed=0):
    """Text with a little structure: a few hundred made-up words in sentences."""
    rng = random.Random(seed)
    words = [''.join(rng.choices('etaoinshrdlu', k=rng.randint(2, 7))) for _ in range(300)]
    text = ''
    while len(text) < n_chars:
        text += ' '.join(rng.choices(words, k=rng.randint(4, 12))).capitalize() + '.\n'
    return text[:n_chars]


@pytest.fixture(scope='session')
def templates(zygote, tmp_path_factory):
    """
    {name: folder} for the fixtures of these names to copy, since making them takes a second: 'tiny' has data/tiny,
    'trained' and 'trained_gpt2' a run in checkpoints/ too.
    """
    folders = {name: tmp_path_factory.mktemp(name) for name in ('tiny', 'trained', 'trained_gpt2')}
    launch = run.__wrapped__(zygote, folders['tiny'])
    (folders['tiny'] / 'data').mkdir()
    (folders['tiny'] / 'text.txt').write_text(some_text(), encoding='utf-8')
    result = launch('prepare.py', '--input=text.txt', '--dataset=tiny')
    assert result.status == 0, result.err
    for name, more in ('trained', []), ('trained_gpt2', GPT2):
        copy_folder(folders['tiny'], folders[name])
        result = launch('train.py', '--dataset=tiny', *small_run(*more), cwd=folders[name])
        assert result.status == 0, result.err
    return folders


def copy_folder(source, target):
    """As it is: what is one file under several names, as ckpt.pt and best.pt can be, stays one."""
    copies = {}

    def link_or_copy(path, copy):
        file = os.stat(path).st_ino
        if file in copies:
            os.link(copies[file], copy)
        else:
            copies[file] = shutil.copy2(path, copy)
    shutil.copytree(source, target, copy_function=link_or_copy, dirs_exist_ok=True)


@pytest.fixture
def tiny(templates, tmp_path):
    """A folder with data/tiny, made by prepare.py from some text."""
    copy_folder(templates['tiny'], tmp_path)
    return tmp_path


@pytest.fixture
def trained(templates, tiny):
    """checkpoints/ in tiny, with a run of ten steps that train.py has made with the TINY settings."""
    copy_folder(templates['trained'] / 'checkpoints', tiny / 'checkpoints')
    return tiny / 'checkpoints'


@pytest.fixture
def trained_gpt2(templates, tiny):
    """The same, of a GPT-2 and AdamW."""
    copy_folder(templates['trained_gpt2'] / 'checkpoints', tiny / 'checkpoints')
    return tiny / 'checkpoints'


@pytest.fixture
def train(run, tiny):
    """train('--max_iters=3') -> Result: the real train.py on data/tiny, with the TINY settings first."""
    def launch(*args, **kwargs):
        return run('train.py', '--dataset=tiny', *small_run(*args), **kwargs)
    return launch


@pytest.fixture
def hooked(run, tiny):
    """hooked('code', '--max_iters=3') -> Result: train with some code run before the script."""
    def launch(code, *args, **kwargs):
        return run(hooked_script(tiny, code), '--dataset=tiny', *small_run(*args), **kwargs)
    return launch


def hooked_script(folder, code, name='train.py'):
    """train.py, or another script, with some code before it, as a script."""
    script = folder / 'hooked.py'
    script.write_text(f'import sys; sys.path.insert(0, {str(ROOT)!r}); __file__ = {str(ROOT / name)!r}\n'
                      f'{code}\nexec(compile(open(__file__).read(), __file__, "exec"))\n')
    return script


def torchrun(folder, *args, script=ROOT / 'train.py', n=2):
    """train.py as n processes."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}',
               str(script), '--dataset=tiny', *small_run(*args)]
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def pair(zygote, tiny):
    """
    pair('--max_iters=3') -> Result: what torchrun() does, in a second instead of ten, with n processes. The zygote runs
    them, in the environment that torchrun gives to its workers. What is about torchrun itself, or how it ends them,
    goes through it.
    """
    def launch(*args, script=ROOT / 'train.py', n=2):
        if not hasattr(os, 'fork'):
            return torchrun(tiny, *args, script=script, n=n)
        from torch.distributed import TCPStore
        store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)  # where they meet; any free port
        env = os.environ | {'WORLD_SIZE': str(n), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(store.port),
                            'TORCHELASTIC_USE_AGENT_STORE': 'True'}
        envs = [env | {'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(n)]
        result = launch_all(zygote, tiny, str(script), ['--dataset=tiny', *small_run(*args)], tiny, envs)
        assert f'processes: {n} ' in result.out, result.err
        return result
    return launch


def fetch(reader, rows):
    """x, y and documents of these rows of one reader."""
    from kit.data import readers
    return readers.Rows(['alone'], [reader], [1.0]).fetch(rows)


def killed_at(call, n, save):
    """The status of a process that makes a save and dies at the n-th call of a function of os; 1 where save() fails."""
    pid = os.fork()
    if pid == 0:
        calls, sound = iter(range(n)), getattr(os, call)

        def dying(*args, **kwargs):
            if next(calls, None) is None:
                os._exit(9)
            return sound(*args, **kwargs)
        setattr(os, call, dying)
        os._exit(0 if save() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def losses(result):
    """{step: loss} of the iter lines."""
    return {int(line.split()[1][:-1]): float(line.split()[3][:-1])
            for line in result.out.splitlines() if line.startswith('iter ')}


def records(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
