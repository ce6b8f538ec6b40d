"""What the tests share: real launches of the scripts in folders of their own, and small datasets made on the spot."""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HOUSE))

MIRROR = Path(os.environ.get('FLATGPT_MIRROR', 'nowhere'))
needs_mirror = pytest.mark.skipif(not (MIRROR / 'tinyshakespeare.txt').is_file(),
                                  reason='FLATGPT_MIRROR names no folder with tinyshakespeare.txt and tiktoken/')

# a model and a run that take a second
TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=16', '--batch_size=4', '--eval_iters=2',
        '--eval_interval=5', '--log_interval=1', '--save_interval=5', '--max_iters=10', '--warmup_iters=2',
        '--device=cpu', '--tensorboard=False']


@dataclass
class Result:
    status: int
    out: str
    err: str


@pytest.fixture(scope='session')
def zygote():
    # one thread: models this small gain nothing from more, and threads that wait for each other starve a busy machine
    process = subprocess.Popen([sys.executable, str(HOUSE / 'tests' / 'zygote.py')], text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, env=os.environ | {'OMP_NUM_THREADS': '1'})
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def run(zygote, tmp_path):
    """run('train.py', '--max_iters=3', cwd=..., env={...}) -> Result. Without cwd, in this test's own folder."""
    def launch(script, *args, cwd=tmp_path, env=None):
        env = {k: v for k, v in os.environ.items() if k != 'FLATGPT_MIRROR'} | (env or {})
        script = str(HOUSE / script)
        if not hasattr(os, 'fork'):
            done = subprocess.run([sys.executable, script, *map(str, args)], cwd=cwd, env=env, text=True,
                                  capture_output=True, encoding='utf-8', stdin=subprocess.DEVNULL)
            return Result(done.returncode, done.stdout, done.stderr)
        out, err = tmp_path / '.stdout', tmp_path / '.stderr'
        job = dict(script=script, args=[str(a) for a in args], cwd=str(cwd), env=env, stdout=str(out), stderr=str(err))
        zygote.stdin.write(json.dumps(job) + '\n')
        zygote.stdin.flush()
        status = int(zygote.stdout.readline())
        result = Result(status, out.read_text(encoding='utf-8'), err.read_text(encoding='utf-8'))
        out.unlink()
        err.unlink()
        return result
    return launch


def some_text(n_chars=20_000, seed=0):
    """Text with a little structure: a few hundred made-up words in sentences."""
    rng = random.Random(seed)
    words = [''.join(rng.choices('etaoinshrdlu', k=rng.randint(2, 7))) for _ in range(300)]
    text = ''
    while len(text) < n_chars:
        text += ' '.join(rng.choices(words, k=rng.randint(4, 12))).capitalize() + '.\n'
    return text[:n_chars]


@pytest.fixture
def tiny(run, tmp_path):
    """A folder with data/tiny, made by prepare.py from some text."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'text.txt').write_text(some_text(), encoding='utf-8')
    result = run('prepare.py', '--input=text.txt', '--dataset=tiny')
    assert result.status == 0, result.err
    return tmp_path


@pytest.fixture
def train(run, tiny):
    """train('--max_iters=3') -> Result: the real train.py on data/tiny, with the TINY settings first."""
    def launch(*args, **kwargs):
        return run('train.py', '--dataset=tiny', *TINY, *args, **kwargs)
    return launch


@pytest.fixture
def hooked(run, tiny):
    """hooked('code', '--max_iters=3') -> Result: train with some code run before the script."""
    def launch(code, *args, **kwargs):
        return run(hooked_script(tiny, code), '--dataset=tiny', *TINY, *args, **kwargs)
    return launch


def hooked_script(folder, code):
    """train.py with some code before it, as a script."""
    script = folder / 'hooked.py'
    script.write_text(f'import sys; sys.path.insert(0, {str(HOUSE)!r}); __file__ = {str(HOUSE / "train.py")!r}\n'
                      f'{code}\nexec(compile(open(__file__).read(), __file__, "exec"))\n')
    return script


def torchrun(folder, *args, script=HOUSE / 'train.py'):
    """train.py as two processes."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               str(script), '--dataset=tiny', *TINY, *args]
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    return Result(done.returncode, done.stdout, done.stderr)


def losses(result):
    """{step: loss} of the iter lines."""
    return {int(line.split()[1][:-1]): float(line.split()[3][:-1])
            for line in result.out.splitlines() if line.startswith('iter ')}


def records(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
