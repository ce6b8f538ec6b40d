"""
Two checkouts make the same runs, bit for bit: what a change that is to change nothing is held against.

$ python tests/same_runs.py --before=CHECKOUT                   every case, about five minutes on two cores
$ python tests/same_runs.py --before=CHECKOUT --only=ema,minutes* --steps=140
$ python tests/same_runs.py --before=CHECKOUT --after=CHECKOUT  another one than this
$ python tests/same_runs.py --list                              the cases and their settings

Each case is run by both, side by side, on one thread and on the same small datasets. Equal must be: console lines,
training.log, every record of metrics.jsonl, every number in every checkpoint, exit statuses, and the names of the files
left behind. The clock of these runs is fed: it goes on with certain events alone, however often it is read, so that a
run that ends by the clock is the same each time too. Exit status 1 where anything differs.
"""

import argparse
import fnmatch
import functools
import importlib
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # before torch is imported: threads would not come along into a fork
TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))
import psutil  # noqa: E402
import torch  # noqa: E402
import zygote  # noqa: E402
from conftest import OF_THE_MACHINE, some_text  # noqa: E402
from torch.distributed import TCPStore  # noqa: E402

sys.path[:] = [path for path in sys.path if path != str(TESTS.parent)]  # kit must be that of the checkout which runs

# (regex, reason): what is taken out of each line before lines are compared; where nothing is left there is no line
LINES_NOT_COMPARED = [
    (r'^mfu: in units of .*', 'the speed of this machine'),
]
OF_A_CLOCK = [  # compared only with --times: it is fed, but code that means the same may read it a little later
    (r', time [\d.]+ms, mfu [\d.]+%', 'of iter lines'),
    (r', \S+ tok/s, eta \S+(?=,)', 'of iter lines'),
    (r', about \S+ without evaluations', 'how long a run will take'),
    (r'^[\d,]+ tokens/s(, mfu [\d.]+%)?$', 'of the lines that sum a run up'),
]
LONGEST = 300  # seconds that launches side by side may take
STEP, MEASURE, SAVE = 0.1, 2.0, 3.0  # seconds by which the fed clock goes on
BASE = ('--dataset=text --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --dropout=0.1 --eval_iters=2 '
        '--log_interval=1 --learning_rate=3e-3 --device=cpu --tensorboard=False')


@dataclass
class Case:
    args: str = ''           # of train.py, behind BASE
    hooks: tuple = ()        # called in the process before its script is run
    processes: int = 1
    cut: int = 0             # a second run is stopped by SIGTERM in this step and resumed; 0 = there is none
    is_whole: bool = True    # what was cut and resumed ends as the whole run
    then: tuple = ()         # further launches in the same folder; train.py has the settings of the run
    by_before: bool = False  # --before makes the run for both, and only the launches behind it are compared
    losses: int = -1         # so many must be seen, at least; -1 = one for each step
    evaluations: int = 6
    status: int = 0          # of the run; that of the launches behind it is 0
    told: str = ''           # a regex: where no line and no record has it, the case has missed what it is there for


def cases(n):
    """{name: Case}; n: how many steps a run has."""
    nan, inf, half, trouble = math.nan, math.inf, n // 2, range(n * 9 // 20, n * 9 // 20 + 7)
    scattered = {n // 10, n // 4, n // 4 + 1, n * 4 // 5}
    skipped, back = 'was not finite; they were skipped', r'every step since \d+ was bad: back to checkpoints/'
    minutes, fit = f'--warmup_iters=25 --save_interval={n // 5} --max_minutes={n / 600 + 0.75:g}', 'steps fit'
    packed, pairs = '--dataset=stories --batch_mode=packed', '--dataset=pairs --batch_mode=padded'
    unsaved, often, micro = 'no checkpoint was saved', f'--eval_interval={n // 20}', '--gradient_accumulation_steps'
    tools = (
        'sample.py --num_samples=2 --max_new_tokens=60',
        'sample.py --checkpoint=checkpoints/ckpt.pt --weights=raw --top_k=5 --max_new_tokens=60',
        'sample.py --checkpoint=checkpoints/ckpt.pt,checkpoints/best.pt --temperature=0 --max_new_tokens=60',
        'train.py --test', 'train.py --test --weights=raw', 'checkpoint_averaging.py --num_checkpoints=3',
        'checkpoint_averaging.py --search --output_name=found.pt',
        'train.py --test --checkpoint=checkpoints/ckpt.pt,checkpoints/found.pt',
        'train.py --eval_only --init_from=resume', 'train.py --dry_run --init_from=resume', 'train.py --find_lr',
        f'train.py --inspect_step={half + 3}', f'train.py --init_from=resume --max_iters={n + 30}',
        'train.py --init_from=checkpoints/best.pt --block_size=16 --max_iters=30 --out_dir=tuned')
    return {
        # formats, micro-steps, processes
        'float32': Case(cut=half, then=('train.py --eval_only', 'train.py --dry_run', f'train.py --inspect_step={half}',
                                        'train.py --inspect_step=7', 'train.py --init_from=resume', 'train.py')),
        'bfloat16': Case('--dtype=bfloat16 --bias=True', cut=half),
        'float16': Case('--dtype=float16', [spoil(scattered, inf, 'gradient')], cut=half),
        'float16-nan': Case('--dtype=float16 --ema_decay=0.9', [spoil(scattered, nan)], told=skipped),
        'float16-unscaled': Case('--dtype=float16 --scale_loss=False', [spoil(scattered, inf, 'gradient')],
                                 told=skipped),
        'accumulation': Case(f'{micro}=4', cut=half),
        'pair': Case(f'{micro}=2', processes=2, told='processes: 2'),
        'pair-accumulation': Case(f'{micro}=8 --ema_decay=0.95', [spoil(scattered, nan, rank=1)], processes=2,
                                  cut=half, told=skipped),
        'pair-rewinds': Case(f'{micro}=2 --max_bad_steps=4', [spoil(trouble, nan, rank=1)], processes=2, told=back),
        'pair-minutes': Case(f'{micro}=2 {minutes}', processes=2, losses=half, told=fit),
        # data
        'packed': Case(packed, cut=half),
        'packed-open': Case(f'{packed} --document_attention=False --sampling=shuffle'),
        'padded': Case(pairs, cut=half, then=('train.py --test',)),
        'padded-drop': Case(f'{pairs} --too_long=drop {micro}=3'),
        'mlm': Case('--objective=mlm', cut=half, then=('train.py --test',)),
        'mlm-packed': Case(f'--objective=mlm {packed} {micro}=2'),
        'mixture': Case('--dataset=text:0.7,other:0.3', cut=half, told='val/loss/other'),
        'mask-prob': Case('--mask_prob=0.2', cut=half),
        'shuffle': Case('--sampling=shuffle', cut=half),
        'sequential': Case('--sampling=sequential --max_epochs=1.4', cut=half, losses=150),
        # averages, bad numbers
        'ema': Case('--ema_decay=0.95', [spoil(scattered, nan)], cut=n * 3 // 5 - 1, told=skipped),
        'swa': Case(f'--swa_start={n // 4 + 2}', [spoil(scattered, inf, 'gradient')], cut=half, told=skipped),
        'rewinds': Case('--max_bad_steps=4 --ema_decay=0.95', [spoil(trouble, nan)], cut=n * 3 // 4, told=back,
                        then=(f'train.py --inspect_step={n - 5}', f'train.py --inspect_step={trouble[0] - 5}')),
        'rewinds-cut-amid': Case('--max_bad_steps=4', [spoil(trouble, nan)], cut=trouble[2], is_whole=False, told=back),
        'rewinds-shuffle': Case('--max_bad_steps=4 --sampling=shuffle', [spoil(trouble, nan, 'gradient')], told=back),
        'rewinds-to-nothing': Case('--max_bad_steps=4', [spoil(range(4), nan, ends=False)], told='other text from'),
        'rewinds-twice': Case('--max_bad_steps=4 --swa_start=20', [spoil(range(trouble[0], n), nan, ends=False)],
                              losses=trouble[0] + 6, evaluations=3, status=1, told='for the second time'),
        'debug-nan': Case('--debug_nan --max_bad_steps=4', [spoil(trouble, nan, 'gradient', ends=False)],
                          losses=trouble[0], evaluations=3, status=1, told='debug_nan: step .* backward pass'),
        'debug-nan-loss': Case(f'--debug_nan {micro}=2', [spoil(trouble, inf, ends=False)], losses=trouble[0],
                               evaluations=3, status=1, told='debug_nan: step .* micro-step'),
        'debug-nan-passing': Case('--debug_nan', [spoil(trouble, nan, 'gradient')], losses=trouble[0], evaluations=3,
                                  status=1, told='debug_nan: step .* made again'),
        # when a run ends
        'early-stop': Case(f'--early_stop=3 {often}', [better(0, n // 10)], cut=n // 10 + 5, losses=n // 4,
                           told='the weights are those of checkpoints/best.pt again'),
        'early-stop-norm': Case('--early_stop_norm', [spoil(range(n), 1e-5, 'gradient', ends=False)],
                                losses=half, evaluations=3, told='the gradient has died'),
        'minutes': Case(minutes, cut=half, is_whole=False, losses=half, told=fit),
        'minutes-slower': Case(minutes, [slower(half - 20)], losses=half, evaluations=4, told='the time is up .* of'),
        'minutes-short': Case('--warmup_iters=25 --max_minutes=0.3', losses=5, evaluations=2, told='before the speed'),
        'minutes-anew': Case(f'{minutes} --ema_decay=0.9 --eval_interval=0', cut=20, is_whole=False, losses=half,
                             evaluations=3, told=fit),
        # the rate, and clipping
        'plateau': Case(f'--lr_schedule=plateau:1:0.5 {often} --learning_rate=0.05', cut=half,
                        then=(f'train.py --inspect_step={half - 3}',)),
        'lr-by-norm': Case('--lr_by_norm', [spoil({n // 3, n // 3 + 1, n * 2 // 3}, 30.0)], cut=n // 3 + 4,
                           then=(f'train.py --inspect_step={n // 3 + 6}',), told='"lr_factor": 0'),
        'lr-by-norm-limit': Case('--lr_by_norm --grad_clip=0.02', told='"lr_factor": 0'),
        'quantile': Case('--grad_clip_quantile=0.3 --lr_by_norm', cut=half, told='"clip_limit": 0'),
        'clip-value': Case('--grad_clip_value=0.01 --grad_clip=0.5', cut=half),
        'no-clip': Case('--grad_clip=0'),
        'warmup-share': Case('--warmup_share=0.2 --warmup_start_lr=1e-4'),
        'wsd': Case('--lr_schedule=wsd', cut=n - 10),
        'restarts': Case('--lr_schedule=restarts:40:2'),
        'linear': Case(f'--lr_schedule=linear --lr_decay_iters={half} --min_lr=1e-5'),
        'no-decay': Case('--decay_lr=False'),
        # when it saves, logs and evaluates
        'not-always-saved': Case('--always_save_checkpoint=False --save_interval=0 --learning_rate=0.1', cut=half),
        'best-before': Case(often, [better(0, half - 5)], cut=half),
        'no-intervals': Case('--save_interval=0 --eval_interval=0', cut=half, evaluations=1),
        'keep-last': Case('--keep_last=2 --save_interval=9'),
        'log-0': Case('--log_interval=0', [spoil(scattered, nan)], cut=half, losses=0),
        'log-7': Case('--log_interval=7', [spoil(scattered, nan)], cut=n * 3 // 4, told='2 of the steps'),
        'log-7-cut-amid': Case('--log_interval=7', [spoil(scattered, nan)], cut=n // 4 + 1, is_whole=False,
                               told='2 of the steps'),
        'tensorboard': Case('--tensorboard --ema_decay=0.9'),
        'all-of-val': Case(f'--eval_iters=0 --eval_interval={half}', evaluations=3),
        'sigusr1': Case('--save_interval=0 --eval_interval=0', [send('SIGUSR1', half)], evaluations=1),
        'sigint': Case('', [send('SIGINT', half)], losses=half, evaluations=3, status=130, told='stopped after'),
        'full-disk': Case(often, [full_disk(half - 30, half + 30), better(half - 20, half + 20)], told=unsaved),
        'full-disk-at-the-end': Case('', [full_disk(half, n + 9)], status=1, told=unsaved),
        'full-disk-stop': Case('--save_errors=stop', [full_disk(half, n)], losses=half, evaluations=3, status=1,
                               told=unsaved),
        # launches that do not train, and those on what --before has left
        'find-lr': Case('--find_lr', losses=0, evaluations=0, told='suggested|no suggestion'),
        'find-lr-diverges': Case(f'--find_lr --find_lr_end=1e4 {micro}=2 {packed}', losses=0, evaluations=0,
                                 told='diverge'),
        'eval-only': Case('--eval_only', losses=0, evaluations=0, told='step 0: train loss'),
        'dry-run': Case('--dry_run', losses=0, evaluations=0, told='a fair guess'),
        'wrong': Case('--init_from=resume', losses=0, evaluations=0, status=2, told='there is no checkpoint'),
        'on-checkpoints': Case('--save_interval=20', then=tools, by_before=True),
        'on-checkpoints-ema': Case('--ema_decay=0.9 --lr_by_norm', then=tools, by_before=True),
        'on-another-text': Case(then=(f'train.py --init_from=resume --dataset=other --max_iters={n + 50}',
                                      f'train.py --init_from=auto --max_iters={n + 60}'), by_before=True),
    }


# ---------------------------------------------------------------------------------------------------------------------
# in the process of a launch, before its script: hooks on names of torch, and on few of the checkout's

CLOCK = [1.7e9]  # what time tells


def kit(name):
    """A module of the checkout's kit by its last name, wherever in it that is."""
    path, = (Path(sys.path[0]) / 'kit').rglob(f'{name}.py')
    return importlib.import_module('.'.join(path.relative_to(sys.path[0]).with_suffix('').parts))


def wrap(owner, name, before=lambda *args: None, seconds=0.0):
    """Something is done before each call of a function, and when it returns the clock goes on."""
    sound = getattr(owner, name)

    @functools.wraps(sound)
    def call(*args, **kwargs):
        before(*args)
        found = sound(*args, **kwargs)
        CLOCK[0] += seconds
        return found
    setattr(owner, name, call)


def feed_the_clock():
    """For all launches; and what takes long and says little is shortened."""
    begin, matmul, generate = CLOCK[0], torch.Tensor.__matmul__, importlib.import_module('model').GPT.generate

    def timed(a, b):
        if a is not b:
            return matmul(a, b)
        CLOCK[0] += 1e-3  # the product of a matrix with itself is how the speed of a machine is measured
        return a
    torch.Tensor.__matmul__ = timed
    importlib.import_module('model').GPT.generate = lambda self, idx, n, *args, **kwargs: generate(
        self, idx, min(n, 40), *args, **kwargs)
    time.time = time.perf_counter = lambda: CLOCK[0]
    psutil.Process.create_time = lambda process: begin
    wrap(kit('optimizers'), 'step', seconds=STEP)
    wrap(kit('evaluation'), 'measure', seconds=MEASURE)
    writer = kit('writer').Writer
    wrap(writer, 'write', seconds=SAVE)
    begin_to_write = writer.write

    def write(*args, **kwargs):  # when a thread is done is chance
        begin_to_write(*args, **kwargs)
        args[0].finish()
    writer.write = write


def at_steps(do, rank=0):
    """do(step) when a step of the training begins, on one rank."""
    if int(os.environ.get('RANK', 0)) == rank:
        wrap(kit('batches'), 'torch_seed', before=lambda seed, step, rank: do(step))


def spoil(steps, factor, what='loss', rank=0, ends=True):
    """
    The loss of these steps, or its gradient, is multiplied, on one rank; with `ends` no more once a step was made again
    or the run went back.
    """
    def hook():
        now = {'step': -1, 'again': False}

        def note(step):
            now.update({'step': step, 'again': now['again'] or step <= now['step']})

        def forward(model, *args, **kwargs):
            logits, loss = sound(model, *args, **kwargs | {'loss_alone': False})
            if not model.training or now['step'] not in steps or ends and now['again']:
                return logits, loss
            if what == 'loss':
                return logits, loss * torch.where(logits > 0, factor, 1.0).amax()  # --debug_nan counts: dropout shows
            loss.register_hook(lambda gradient: gradient * factor)
            return logits, loss
        at_steps(note, rank)
        gpt = importlib.import_module('model').GPT
        gpt.forward, sound = forward, gpt.forward
    return hook


def send(name, step, rank=0):
    """A signal comes in a step, on one rank."""
    return lambda: at_steps(lambda now: os.kill(os.getpid(), getattr(signal, name)) if now == step else None, rank)


def slower(step):
    """From this step on each takes twice as long."""
    return lambda: at_steps(lambda now: CLOCK.append(CLOCK.pop() + STEP * (now > step)))


def better(begin, end):
    """Evaluations that are made behind these steps find a lower loss."""
    def hook():
        now, evaluation = [-1], kit('evaluation')
        at_steps(lambda step: now.append(step))
        sound = evaluation.measure

        def measure(*args, **kwargs):
            loss, accuracy = sound(*args, **kwargs)
            return loss - (begin <= now[-1] < end), accuracy
        evaluation.measure = measure
    return hook


def full_disk(begin, end):
    """From one step to another no file can grow to the size of a checkpoint."""
    def hook():
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        at_steps(lambda now: resource.setrlimit(resource.RLIMIT_FSIZE, (250_000 if begin <= now < end else most, most)))
    return hook


def child(job):
    """In a forked process: hooks, then the script. Never returns."""
    try:
        os.environ.update(job['env'])  # kit reads the rank when it is imported
        sys.path.insert(0, os.path.dirname(job['script']))
        for hook in (feed_the_clock, *job['hooks']):
            hook()
        zygote.run(job)
    except BaseException:
        Path(job['stderr']).write_text(traceback.format_exc())
    os._exit(99)


# ---------------------------------------------------------------------------------------------------------------------
# launches: PLACE/before/code is a checkout, PLACE/before/ema a folder in which it runs, PLACE/before/ema.00.0.out what
# rank 0 of the first launch there has printed


def jobs_of(folder, words, hooks=(), processes=1):
    """A launch in a folder: its processes, each a job as the zygote takes it."""
    if not folder.exists():
        folder.mkdir()
        (folder / 'data').symlink_to('../../before/made/data')
    script, *args = shlex.split(words)
    number = len(list(folder.parent.glob(f'{folder.name}.*.0.out')))
    store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False) if processes > 1 else None  # any free port
    jobs = []
    for rank in range(processes):
        env = {'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(processes), 'MASTER_ADDR': '127.0.0.1',
               'MASTER_PORT': str(store.port), 'TORCHELASTIC_USE_AGENT_STORE': 'True'} if store else {}
        out, err = (str(folder.with_name(f'{folder.name}.{number:02}.{rank}.{kind}')) for kind in ('out', 'err'))
        jobs.append(dict(script=str(folder.parent / 'code' / script), args=args, cwd=str(folder), hooks=hooks,
                         env=dict(os.environ) | env, stdout=out, stderr=err, store=store))
    return jobs


def run_all(*launches):
    """All of them side by side; exit statuses go to files such as ema.00.0.status."""
    running, end = {}, time.monotonic() + LONGEST
    for job in sum(launches, []):
        pid = os.fork()
        if pid == 0:
            child(job)
        running[pid] = job
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            path = Path(running.pop(pid)['stdout']).with_suffix('.status')
            path.write_text(f'{os.waitstatus_to_exitcode(status)}\n')
            continue
        for pid in running if time.monotonic() > end else ():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def make_data(folder):
    """data/ with text, other (in the same characters), stories (documents) and pairs."""
    (folder / 'data').mkdir(parents=True)  # else they would go to that of the checkout
    texts = [some_text(20 + i * 37 % 280, seed=i).strip() for i in range(200)]
    pairs = [(text.replace('\n', ' ')[:3 + i % 23], text.replace('\n', ' ')[:2 + i % 13].upper())
             for i, text in enumerate(texts)]
    (folder / 'text.txt').write_text(some_text(20_000))
    (folder / 'other.txt').write_text(some_text(12_000, seed=1))
    (folder / 'stories.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    (folder / 'pairs.tsv').write_text(''.join(f'{prompt}\t{response}\n' for prompt, response in pairs))
    for name in 'text.txt', 'other.txt', 'stories.jsonl', 'pairs.tsv':
        jobs = jobs_of(folder, f'prepare.py --input={name} --dataset={name.split(".")[0]}')
        run_all(jobs)
        if words := Path(jobs[0]['stderr']).read_text():
            sys.exit(words)


def copy_code(checkout, folder):
    """So that work on a checkout does not disturb its runs."""
    if not (Path(checkout) / 'train.py').is_file():
        sys.exit(f'{checkout} is no checkout: it has no train.py')
    folder.mkdir(parents=True)
    for path in Path(checkout).iterdir():
        if path.is_dir() and path.name not in ('data', 'docs', 'tests', 'bench') and any(path.glob('*.py')):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns('__pycache__'))
        elif path.suffix == '.py':
            shutil.copy(path, folder)


def copy_run(source, target):
    """A folder, and what its launches have printed."""
    shutil.copytree(source, target, symlinks=True)
    for path in source.parent.glob(f'{source.name}.[0-9]*'):
        shutil.copy(path, target.with_name(target.name + path.name.removeprefix(source.name)))


# ---------------------------------------------------------------------------------------------------------------------
# comparing


def look(folder, is_timed):
    """All that the launches in a folder have left: {'out', 'err', 'status': {launch: lines}, 'files': {name: ...}}."""
    seen = {'status': {}, 'out': {}, 'err': {}, 'files': {}}
    for path in sorted(folder.parent.glob(f'{folder.name}.[0-9]*')):
        seen[path.suffix[1:]][path.stem.removeprefix(folder.name)[1:]] = lines_of(path, is_timed)
    for path in sorted(folder.rglob('*')):
        name = path.relative_to(folder).as_posix()
        is_other_code = re.fullmatch(r'.*/source_\d+(\.\d+)?\.zip', name)  # that of the checkout which resumed
        if path.is_file() and not name.startswith('runs/') and not is_other_code:
            seen['files'][name] = content(path, is_timed)
    return seen


def lines_of(path, is_timed):
    lines = re.sub(r'[^\s"]*/(before|after)/code/', '', path.read_text()).splitlines()
    for regex, _ in LINES_NOT_COMPARED + ([] if is_timed else OF_A_CLOCK):
        lines = [new for line in lines if (new := re.sub(regex, '', line)) or not line]
    return lines


def content(path, is_timed):
    """What is compared of a file; of a picture, say, no more than its name."""
    if path.suffix == '.jsonl':
        others = [name for name in OF_THE_MACHINE if name.startswith('system/') or not is_timed]
        return [{name: value for name, value in json.loads(line).items() if name not in others}
                for line in path.read_text().splitlines()]
    if path.suffix == '.pt':
        saved = torch.load(path, weights_only=True)
        return {name: value for name, value in saved.items() if name not in ('versions', 'time')}
    if path.name == 'config.json':
        found = json.loads(path.read_text())
        return found['settings'] | found['facts'], [launch['step'] for launch in found['launches']]
    return lines_of(path, is_timed) if path.suffix in ('.log', '.csv') else ''


def differences(a, b, where=''):
    """Each place where two things differ, in words."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape):
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
        return [] if torch.equal(*bits) else [f'{where}: {int((a != b).sum())} of {a.numel()} numbers']
    if isinstance(a, dict) and isinstance(b, dict):
        alone = [f'{where}/{key}: only {"before" if key in a else "after"}' for key in a.keys() ^ b.keys()]
        return sorted(alone) + [d for key in a if key in b for d in differences(a[key], b[key], f'{where}/{key}')]
    if isinstance(a, list | tuple) and type(a) is type(b):
        counts = [f'{where}: {len(a)} and {len(b)} of them'] if len(a) != len(b) else []
        return counts + [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f'{where}/{i}')]
    return [] if repr(a) == repr(b) else [f'{where}: {a!r} and {b!r}']


def of_training(folder):
    """What a run that was cut and resumed has in common with a whole one; a clock it has not."""
    seen = look(folder, is_timed=False)
    lines = [line for launch in seen['out'].values() for line in launch if line.startswith(('iter', 'step', 'WARNING'))]
    files = {name: found for name, found in seen['files'].items()
             if not re.search(r'source_\d+\.zip$|config\.json$|\.log$', name)}
    return {'lines': lines, 'files': files}


def check(name, case, n, place, is_timed):
    """All launches of a case. Returns (where they differ, what was compared), in words."""
    length = '' if 'max_epochs' in case.args else f' --max_iters={n}'
    intervals = f'--eval_interval={n // 5} --save_interval={n // 4} --warmup_iters={n // 10}'
    train = f'train.py {BASE} {intervals}{length} {case.args}'
    launch = functools.partial(jobs_of, hooks=case.hooks, processes=case.processes)
    stop = [*case.hooks, send('SIGTERM', case.cut, case.processes - 1)]
    runs = [place / side / name for side in ('before', 'after')]
    cut = [place / side / f'{name}+cut' for side in ('before', 'after')] if case.cut else []
    run_all(*[launch(folder, train) for folder in (runs[:1] if case.by_before else runs)],
            *[launch(folder, train, hooks=stop) for folder in cut])
    if case.by_before:
        copy_run(*runs)
    of_resumes = []
    if cut:
        cut.append(place / 'after' / f'{name}+crossed')
        copy_run(cut[0], cut[2])
        run_all(*[launch(folder, f'{train} --init_from=resume') for folder in cut])
        of_resumes = [f'resumed{d}' for d in differences(*(look(folder, is_timed) for folder in cut[:2]))]
        goal = of_training(runs[0] if case.is_whole else cut[0])
        for folder, kind in zip(cut[1:], ('resumed, and whole', 'crossed, and whole')):
            of_resumes += [f'{kind}{d}' for d in differences(goal, of_training(folder))]
    for words in case.then:
        run_all(*[launch(folder, words.replace('train.py', train)) for folder in runs])

    before, after = (look(folder, is_timed) for folder in runs)
    found = differences(before, after) + of_resumes
    for key, status in after['status'].items():
        if status != [str(case.status if key.startswith('00') else 0)]:
            found.append(f'launch {key} ended with status {status}: {after["err"][key][-1:]}')
        if key.endswith('.0') and not after['out'][key]:
            found.append(f'launch {key} printed nothing')
    lines = [line for launch in after['out'].values() for line in launch]
    records = [record for path, found in after['files'].items() if path.endswith('.jsonl') for record in found]
    counts = {'losses': sum('loss' in record for record in records),
              'evaluations': sum('val/loss' in record for record in records), 'records': len(records),
              'lines': len(lines), 'checkpoints': sum(path.endswith('.pt') for path in after['files'])}
    for kind, least in ('losses', n if case.losses < 0 else case.losses), ('evaluations', case.evaluations):
        if counts[kind] < least:
            found.append(f'{counts[kind]} {kind} were seen, at least {least} were expected')
    if not re.search(case.told, '\n'.join([*lines, *map(json.dumps, records), *sum(after['err'].values(), [])])):
        found.append(f'nothing tells of {case.told!r}')
    words = ', '.join(f'{count} {kind}' for kind, count in counts.items() if count)
    return found, words + (', resumed and crossed' if cut else '')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--before', help='the checkout that is known to be right')
    parser.add_argument('--after', default=TESTS.parent, help='the one that is held against it: this')
    parser.add_argument('--only', default='*', help='names of cases, with commas between; they may hold *')
    parser.add_argument('--steps', type=int, default=200, help='of a run')
    parser.add_argument('--times', action='store_true', help='compare what the fed clock decides, too')
    parser.add_argument('--list', action='store_true', help='name the cases, and leave')
    args = parser.parse_args()
    table = cases(args.steps)
    chosen = [name for name in table if any(fnmatch.fnmatch(name, word) for word in args.only.split(','))]
    if args.list:
        print('\n'.join(f'{name:22} {table[name].args}' for name in chosen))
        return 0
    if not args.before or not chosen or args.steps < 140 or args.steps % 20:
        parser.error('it takes --before=CHECKOUT, --only of what --list names, and --steps of 140, 160, 180, ...')
    place, begin, failed = Path(tempfile.mkdtemp(prefix='same_runs_')), time.monotonic(), []
    copy_code(args.before, place / 'before' / 'code')
    copy_code(args.after, place / 'after' / 'code')
    make_data(place / 'before' / 'made')
    for name in chosen:
        start = time.monotonic()
        found, words = check(name, table[name], args.steps, place, args.times)
        words = f'{len(found)} places, {"; ".join(found[:4])}' if found else words
        print(f'{"DIFFERS" if found else "ok     "} {name}: {words} ({time.monotonic() - start:.1f}s)', flush=True)
        failed += [name] if found else []
    print(f'{len(chosen) - len(failed)} of {len(chosen)} cases are equal, {time.monotonic() - begin:.0f}s'
          + (f'; the runs are in {place}' if failed else ''))
    if not failed:
        shutil.rmtree(place)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
