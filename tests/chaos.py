"""
A run that is killed again and again, at random moments and during saves too, against the same run left alone.

$ python tests/chaos.py --kills=60                                  some minutes; tests/test_chaos.py does a few
$ python tests/chaos.py --settings='--log_interval=1000 --dtype=bfloat16'
$ python tests/chaos.py --mixed --seed=7                            settings that are drawn; tests/hostile.py does many

After every kill ckpt.pt must be whole. At the end weights, moments and averages must be equal, bit for bit, and so must
the records: one of every update, whatever log_interval is, with the share of those that were clipped.
"""

import json
import multiprocessing
import os
import random
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # before torch is imported: threads would not come along into a fork
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import torch
import zygote
from conftest import OF_THE_MACHINE, some_text

from kit.base import overrides
from kit.state import checkpoints

# a save at every tenth step, of a model that is large enough for a save to take a good part of the time
SETTINGS = ['--dataset=tiny', '--n_layer=2', '--n_head=2', '--n_embd=128', '--block_size=16', '--batch_size=4',
            '--dropout=0.1', '--ema_decay=0.99', '--eval_interval=20', '--eval_iters=1', '--log_interval=1',
            '--save_interval=10', '--keep_last=3', '--warmup_iters=20', '--device=cpu', '--tensorboard=False']


def mixture(draw):
    """Settings beside these in which a resume has more to remember."""
    either = lambda *choices: draw.choice(choices).split()
    return [f'--log_interval={draw.choice([1, 7, 1000])}', *either('', '--ema_decay=0 --swa_start=50', '--ema_decay=0'),
            *either('', '--dropout=0'), *either('', '--dtype=bfloat16'), *either('', '--gradient_accumulation_steps=3'),
            *either('', '--grad_clip_quantile=0.3', '--grad_clip=0.5', '--grad_clip=0.5 --grad_clip_value=0.01'),
            *either('', '--lr_by_norm'), *either('', '--lr_schedule=plateau:1:0.7', '--lr_schedule=wsd'),
            *either('', '--sampling=shuffle', '--sampling=sequential'),
            *either('', '--dataset=rows --batch_mode=packed', '--dataset=pairs --batch_mode=padded',
                    '--dataset=tiny:0.6,rows:0.4', '--mask_prob=0.2', '--objective=mlm',
                    '--dataset=rows --batch_mode=packed --objective=mlm')]


def forked(job):
    """A script in this process, a fork of one that has imported torch, as if it had just been started. No return."""
    for name in [name for name in sys.modules if name.split('.')[0] in ('kit', 'model')]:
        del sys.modules[name]  # they know what this command line has set
    zygote.run(job)


def launch(folder, script, *words):
    """A script in a process of its own, forked from this one."""
    job = dict(script=str(TESTS.parent / script), args=words, cwd=str(folder), env=dict(os.environ),
               stdout=os.devnull, stderr=str(folder / 'stderr'))
    process = multiprocessing.get_context('fork').Process(target=forked, args=[job])
    process.start()
    return process


def end(process, folder):
    process.join()
    assert process.exitcode == 0, (folder / 'stderr').read_text()


def last_step(log):
    return int(re.findall(r'^{"step": (\d+),', log.read_text(), re.M)[-1])


def losses(folder):
    """{step: [loss, lr, norm] and the losses of evaluations} of metrics.jsonl; the last record of a step counts."""
    found = {}
    for line in (folder / 'metrics.jsonl').read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        kind = 'step' if 'val/loss' in record else 'iter'
        found[kind, record['step']] = {key: value for key, value in record.items()
                                       if key not in OF_THE_MACHINE}
    return found


def differences(a, b, path=''):
    """Where two checkpoints differ, bit for bit, but for what tells of the launch."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        keys = (a.keys() | b.keys()) - {'out_dir', 'init_from'}
        return [d for key in sorted(keys, key=str) for d in differences(a.get(key), b.get(key), f'{path}/{key}')]
    if isinstance(a, list | tuple):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f'{path}/{i}')]
    return [] if a == b else [path]


def prepare(folder):
    """A text, documents and pairs of it: data/tiny, data/rows and data/pairs."""
    (folder / 'data').mkdir()
    lines = some_text().splitlines()
    (folder / 'tiny.txt').write_text('\n'.join(lines), encoding='utf-8')
    (folder / 'rows.jsonl').write_text('\n'.join(json.dumps({'text': line}) for line in lines), encoding='utf-8')
    (folder / 'pairs.tsv').write_text('\n'.join(f'{line[:9]}\t{line[9:]}.' for line in lines), encoding='utf-8')
    for file in 'tiny.txt', 'rows.jsonl', 'pairs.tsv':
        words = f'--input={file}', f'--dataset={file.split(".")[0]}', '--tokenizer=byte'
        end(launch(folder, 'prepare.py', *words), folder)


def chaos(folder, kills, steps, seed=0, settings=()):
    """Returns {'kills', 'during a save', 'launches'}; raises AssertionError where a promise does not hold."""
    draw = random.Random(seed)
    prepare(folder)
    train = lambda out_dir: launch(folder, 'train.py', *SETTINGS, *settings, f'--max_iters={steps}', '--init_from=auto',
                                   f'--out_dir={out_dir}')
    end(train('whole'), folder)
    done = during_a_save = launches = 0
    out = folder / 'cut'
    while True:
        process = train('cut')
        launches += 1
        if done == kills:
            end(process, folder)
            break
        log, size = out / 'metrics.jsonl', 0
        if log.exists():
            size = log.stat().st_size
        while process.exitcode is None and not (log.exists() and log.stat().st_size > size):
            time.sleep(0.005)  # until it trains
        # so that the kills are spread over the whole run, on a machine that is faster now and slower then
        step = steps * (done + draw.random()) / (kills + 1)
        while process.exitcode is None and last_step(log) < step:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.02))
        if done % 2 == 0:  # half of them wait for a save to begin
            while process.exitcode is None and not (out / '.ckpt.pt.part').exists():
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, 0.01) if during_a_save else 0)  # the first surely hits one
        if process.exitcode is not None:
            end(process, folder)
            raise AssertionError(f'the run was over after {done} kills; more --steps')
        process.kill()
        process.join()
        done += 1
        during_a_save += (out / '.ckpt.pt.part').exists() or (out / '.ckpt.pt.link').exists()
        if (out / 'ckpt.pt').exists():
            checkpoints.load(out / 'ckpt.pt', resume=True)  # ends the script where it is damaged
    a, b = (torch.load(folder / run / 'ckpt.pt', weights_only=True) for run in ('whole', 'cut'))
    assert not differences(a, b), differences(a, b)[:9]
    a, b = losses(folder / 'whole'), losses(out)
    assert a == b, [key for key in {**a, **b} if a.get(key) != b.get(key)][:9]
    assert {('iter', step) for step in range(steps)} <= a.keys()
    assert during_a_save > 0
    names = [sorted(path.name for path in (folder / run).glob('*.pt')) for run in ('whole', 'cut')]
    assert names[0] == names[1], names
    return {'kills': done, 'during a save': during_a_save, 'launches': launches, 'steps': steps}


if __name__ == '__main__':
    kills = 60
    steps = 6000
    seed = 0
    settings = ''  # more of them, for train.py
    mixed = False  # or drawn
    overrides.apply(globals(), ['kills >= 1', 'steps >= 1'])
    words = mixture(random.Random(seed)) if mixed else shlex.split(settings)
    print(' '.join(words))
    with tempfile.TemporaryDirectory() as folder:
        print(chaos(Path(folder), kills, steps, seed, words))
