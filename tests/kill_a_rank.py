"""
A run of two processes under torchrun --max-restarts=3, of which one is killed by SIGKILL again and again, against the
same run left alone.

$ python tests/kill_a_rank.py --rounds=10                   a quarter of a minute each; tests/test_faults.py does one
$ python tests/kill_a_rank.py --rounds=40 --sharded         every second run writes sharded checkpoints

In each round one or two processes are killed, at random steps; in half of the rounds the first of them during a save.
In half of the rounds, by fours, each process holds a part of the model (FSDP).
At the end weights, moments, averages and records must be equal, bit for bit, and no temporary file may be left.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from chaos import SETTINGS, TESTS, differences, last_step, losses, prepare

from kit.base import overrides
from kit.state import checkpoints


def torchrun(folder, *words):
    """train.py as two processes: those that torchrun starts, and starts again."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=3',
               str(TESTS.parent / 'train.py'), *SETTINGS, '--gradient_accumulation_steps=2',
               '--architecture=modern,ngram_embeddings=64', *words]
    with open(folder / 'out', 'w') as out, open(folder / 'err', 'w') as err:
        return subprocess.Popen(command, cwd=folder, stdout=out, stderr=err)


def worker(launch, rank):
    """The process of a rank, None where there is none now."""
    with suppress(psutil.Error):
        for process in psutil.Process(launch.pid).children():
            with suppress(psutil.Error):
                if process.environ().get('RANK') == str(rank):
                    return process


def is_saving(out_dir):
    """Whether a checkpoint is being written: its file, or its shards, behind which ckpt.pt comes."""
    last, shards = out_dir / 'ckpt.pt', list(out_dir.glob('shards_*'))
    since = last.stat().st_mtime_ns if last.exists() else 0
    with suppress(FileNotFoundError):  # one that is deleted now
        return any(out_dir.glob('.*.part')) or any(folder.stat().st_mtime_ns > since for folder in shards)


def wait(launch, is_true, pause):
    while not is_true():
        assert launch.poll() is None, 'the run was over before it could be disturbed; more --steps'
        time.sleep(pause)


def kill(launch, out_dir, rank, step, in_a_save):
    """Kill a rank when the run has come to a step. Returns whether it was saving."""
    log = out_dir / 'metrics.jsonl'
    wait(launch, lambda: log.exists() and '"step"' in log.read_text() and last_step(log) >= step, 0.005)
    if in_a_save:
        wait(launch, lambda: is_saving(out_dir), 0.0005)
    process = worker(launch, rank)
    was_saving = is_saving(out_dir)
    process.kill()
    wait(launch, lambda: worker(launch, rank) not in (None, process), 0.05)
    return was_saving


def finish(launch, folder):
    status = launch.wait()
    assert status == 0, (folder / 'err').read_text()


def compare(whole, cut):
    """That nothing tells a run that was disturbed from one that was not."""
    a, b = (checkpoints.load(run / 'ckpt.pt', resume=True) for run in (whole, cut))
    assert not differences(a, b), differences(a, b)[:9]
    a, b = losses(whole), losses(cut)
    assert a == b, [key for key in {**a, **b} if a.get(key) != b.get(key)][:9]
    names = [sorted(path.name for path in run.glob('*.pt')) for run in (whole, cut)]
    assert names[0] == names[1], names
    assert not is_saving(cut), [path.name for path in cut.iterdir()]


def rounds_of(folder, rounds, steps, seed, sharded):
    """Prints a line a round; raises AssertionError where a promise does not hold. Returns what was done."""
    draw, done = random.Random(seed), {'rounds': 0, 'kills': 0, 'during a save': 0, 'sharded': 0}
    prepare(folder)
    for i in range(rounds):
        is_sharded, in_parts = sharded and i % 2 == 1, i % 8 >= 4
        words = f'--max_iters={steps}', *['--sharded'] * is_sharded, *['--parallel=fsdp'] * in_parts
        whole, cut = folder / f'whole{is_sharded:d}{in_parts:d}', folder / 'cut'
        if not whole.exists():
            finish(torchrun(folder, *words, f'--out_dir={whole.name}'), folder)
        shutil.rmtree(cut, ignore_errors=True)
        begin, told = time.monotonic(), []
        launch = torchrun(folder, *words, f'--out_dir={cut.name}')
        kills = 1 + (i % 3 == 2)
        for k in range(kills):
            rank, step = draw.randrange(2), int(steps * (k + draw.random()) / (kills + 0.5))
            in_a_save = kill(launch, cut, rank, step, in_a_save=k == 0 and i % 4 < 2)
            told.append(f'rank {rank} from step {step} on{" during a save" * in_a_save}')
            done['kills'] += 1
            done['during a save'] += in_a_save
        finish(launch, folder)
        out = (folder / 'out').read_text()
        went_on = out.count('torchrun has started the processes again')
        compare(whole, cut)
        done['rounds'] += 1
        done['sharded'] += is_sharded
        kind = ', sharded' * is_sharded + ', in parts' * in_parts
        print(f'round {i}{kind}: killed {", ".join(told)}; {went_on} went on from a checkpoint; equal; '
              f'{time.monotonic() - begin:.1f}s', flush=True)
    return done


if __name__ == '__main__':
    rounds = 10
    steps = 200
    seed = 0
    sharded = False
    overrides.apply(globals(), ['rounds >= 1', 'steps >= 1'])
    os.environ['OMP_NUM_THREADS'] = '1'
    with tempfile.TemporaryDirectory() as folder:
        print(rounds_of(Path(folder), rounds, steps, seed, sharded))
