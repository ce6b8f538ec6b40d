"""
flatGPT beside a checkout of nanoGPT: in turn (A B C A B C ...), on the same machine, with the same data and sizes.

$ python bench/vs_nanogpt.py --peer=CHECKOUT                    all parts, each in less than ten minutes on two cores
$ python bench/vs_nanogpt.py --peer=CHECKOUT --parts=recipe,launch --runs=9 --json=found.json

recipe    a step of the recipe that nanoGPT's README has for a CPU: 4 layers, 4 heads, 128 channels, 12 x 64 tokens
default   of config/train_python_docs_gpt2.py: 2 layers, 2 heads, 128 channels, 12 x 64 tokens
10m       of 10.7M parameters: 6 layers, 6 heads, 384 channels, 16 x 256 tokens
gpt2      of 124M parameters, 12 x 1024 random tokens; on a GPU only
launch    from the start of the process to the end of its first step, the evaluation of step 0 included; the recipe
          without compile, 20 batches of each split
sampling  sample.py for ten texts of 500 tokens, with random weights of 10.7M parameters; and the writing alone
batches   a get_batch of 64 x 256 tokens, warm, on the CPU
memory    the most that the training process has in memory (RSS), 10.7M parameters, seven steps, two evaluations, a save
losses    what the recipe's 2,000 steps have learned: flatGPT measures both last checkpoints in float32, on all of val.
          One seed each, as nanoGPT has no other: it shows a fault, not a hundredth
speedrun  from the start of the process to the end of training, on a CPU: of nanoGPT's recipe, and of
          config/speedrun_shakespeare_char_cpu.py; and what each has learned, as in losses

Each side comes as its README has it: nanoGPT on a CPU with --device=cpu --compile=False, flatGPT with nothing but the
sizes, so that it chooses format, compiler and threads; once more both in float32 without a compiler, as nanoGPT comes
on a CPU; and there steps also with --compile=True. There is no dropout. CUDA_VISIBLE_DEVICES= hides a GPU.

A step takes the time between the arrivals of two iter lines / the steps between them, so that all that a side does
counts: the figure that nanoGPT prints is that of one step in ten, that of flatGPT leaves out what it logs. Lines come
every ten steps, as in the recipe's config file, or each step where one takes seconds; a run's figure is the median of
its stretches behind the first, in which a compiler is at work. A run has the length of its recipe ahead of it, by which
a side may decide what pays, and is killed when it has told enough. sample.py is timed as people start it, since it
chooses how it writes (format, texts side by side); the writing alone is what ten texts of one token take less.

What stdout ends with is a section for bench/results.md; how far it is stands on stderr.
"""

import ast
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from itertools import pairwise
from json import dumps
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from kit.base import devices, overrides, ranks
from kit.base.errors import fail
from kit.data import readers, tokens
from model import GPT, GPTConfig

peer = ''           # not empty: the folder of a nanoGPT checkout, --peer=CHECKOUT; nothing is written there
parts = 'all'       # these alone: recipe,launch
runs = 0            # >= 0: turns of each part; 0 = as many as take some minutes
json = ''           # a file for all figures; '' = none

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
EAGER = ['--dtype=float32', '--compile=False']
SIDES = {'nanoGPT': [], 'flatGPT': [], 'nanoGPT, float32': EAGER, 'flatGPT, float32': EAGER}  # beside the sizes
COMPILED = {}  # steps alone are measured so
if DEVICE.type == 'cpu':
    SIDES['nanoGPT'] = ['--device=cpu', '--compile=False']
    del SIDES['nanoGPT, float32']  # it is float32 already
    COMPILED = {'nanoGPT, compiled': ['--device=cpu', '--compile=True'], 'flatGPT, compiled': ['--compile=True']}

CASES = {  # what is not as in config/train_shakespeare_char.py, which both have; each has its own length of a run
    'recipe': dict(dataset='shakespeare_char', n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12,
                   max_iters=2000, lr_decay_iters=2000),
    'default': dict(dataset='python_docs', n_layer=2, n_head=2, n_embd=128, block_size=64, batch_size=12,
                    max_iters=4000),
    '10m': dict(dataset='shakespeare_char', n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=16),
    'gpt2': dict(dataset='random', n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=12,
                 max_iters=600000),
}


# ---------------------------------------------------------------------------------------------------------------------
# a script of a side, in a process of its own


def run(side, script, words, last=''):
    """
    (lines, seconds, MiB) of a script: [(seconds since its start, line)], the time and the peak memory of its process.
    It is killed when a line begins with `last`; '' = it runs to its end. Raises RuntimeError where it ends otherwise.
    """
    folder = Path(peer).resolve() if side.startswith('nanoGPT') else ROOT
    cwd = WORK if folder == ROOT else folder  # nanoGPT looks for its own files there
    command = [sys.executable, '-u', str(folder / script), *words, *(SIDES | COMPILED)[side]]
    lines, start = [], time.perf_counter()
    with open(WORK / 'stderr', 'w') as errors:
        process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=errors, encoding='utf-8',
                                   errors='replace', start_new_session=True)
    try:
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line))
            if last and line.startswith(last):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that a compiler has started
                break
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
    if not lines or not lines[-1][1].startswith(last) or not last and status:
        why = (WORK / 'stderr').read_text(errors='replace').strip().rpartition('\n')[2]
        raise RuntimeError(f'{side} ended too early ({why[:300]}); to see more: '
                           f'cd {shlex.quote(str(folder))} && {shlex.join(command)}')
    return lines, time.perf_counter() - start, used.ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)


def train(side, part, *words, last='', out_dir=''):
    """run() of train.py with the settings of a case; without out_dir into a folder that is removed behind it."""
    with tempfile.TemporaryDirectory(dir=WORK) as temporary:
        settings = CASES[part] | {'dropout': 0.0, 'out_dir': out_dir or temporary}
        if side.startswith('nanoGPT'):
            settings['dataset'] = (WORK / 'data' / settings['dataset']).resolve()
        return run(side, 'train.py', ['config/train_shakespeare_char.py',
                                      *(f'--{name}={value}' for name, value in settings.items()), *words], last)


def per_step(lines, first):
    """ms a step: the median over all stretches between two iter lines, from that of step `first` on."""
    found = [(int(line.split()[1].rstrip(':')), seconds) for seconds, line in lines if line.startswith('iter ')]
    return statistics.median((end - begin) / (after - before) * 1000
                             for (before, begin), (after, end) in pairwise(found) if before >= first)


# ---------------------------------------------------------------------------------------------------------------------
# the parts: {what: figure} of a side, in one turn


def step(side, part):
    every, first, last = (1, 2, 8) if part == '10m' and DEVICE.type == 'cpu' else (10, 20, 240)
    lines, _, _ = train(side, part, '--eval_interval=1000000', '--eval_iters=1', f'--log_interval={every}',
                        last=f'iter {last}:')
    return {'ms a step': per_step(lines, first)}


def launch(side):
    lines, _, _ = train(side, 'recipe', '--eval_iters=20', '--log_interval=1', '--compile=False', last='iter 0:')
    return {'s to the end of the first step': lines[-1][0]}


def sampling(side):
    ten_texts_of = lambda n: run(side, 'sample.py', [f'--out_dir={random_weights()}', '--num_samples=10',
                                                     f'--max_new_tokens={n}'])[1]
    whole = ten_texts_of(500)
    return {'s, sample.py as a whole': whole, 's, the writing alone': whole - ten_texts_of(1)}


@cache
def random_weights():
    """The folder of a ckpt.pt of 10.7M parameters, as nanoGPT writes it: both read that."""
    folder, dataset = WORK / 'random_weights', WORK / 'data/shakespeare_char'
    folder.mkdir()
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, bias=False,
                          vocab_size=tokens.read_meta(dataset)['vocab_size']))
    torch.save({'model': model.state_dict(), 'model_args': model.config.args(), 'iter_num': 0, 'best_val_loss': 9.0,
                'config': {'dataset': str(dataset)}}, folder / 'ckpt.pt')
    return folder


def batches(side):
    get_batch, times = own_get_batch(side), []
    for step in range(440):
        start = time.perf_counter()
        get_batch(step)
        times.append((time.perf_counter() - start) * 1e6)
    return {'us a get_batch of 64 x 256': statistics.median(times[40:])}


@cache
def own_get_batch(side):
    """The function of a step that calls get_batch, taken out of the train.py of that side as it stands there."""
    sizes, cpu = dict(batch_size=64, block_size=256), torch.device('cpu')
    if side == 'nanoGPT':
        path, args = Path(peer) / 'train.py', lambda step: ('train',)
        names = dict(np=np, torch=torch, os=os, data_dir=str(WORK / 'data/shakespeare_char'), device='cpu',
                     device_type='cpu') | sizes
    else:
        path, args = ROOT / 'train.py', lambda step: ('train', step, 0)
        settings = overrides.settings_of(path, ['--dataset=shakespeare_char', '--sampling=random']) | sizes
        names = settings | dict(data=readers.open(settings)[0], rows_per_step=64, micro_steps=1, ranks=ranks,
                                devices=devices, device=cpu, state=SimpleNamespace(rewinds=0))
    tree = ast.parse(path.read_text(encoding='utf-8'))
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == 'get_batch')
    function.decorator_list = []  # a clock
    exec(compile(ast.Module([function], []), str(path), 'exec'), names)
    return lambda step: names['get_batch'](*args(step))


def memory(side):
    # Linux tells no less than the peak of the process that has started it: of this one, far below what is found
    _, _, mib = train(side, '10m', '--eval_interval=3', '--eval_iters=2', '--log_interval=1',
                      '--always_save_checkpoint=True', last='iter 6:')
    return {'MiB at most': mib}


def losses(side):
    with tempfile.TemporaryDirectory(dir=WORK) as out_dir:
        train(side, 'recipe', '--eval_interval=2000', '--eval_iters=20', '--always_save_checkpoint=True',
              out_dir=out_dir)
        return {'nats a token of val': val_loss(out_dir)}


def val_loss(out_dir):
    """What the last checkpoint there has learned: in float32, on all of val."""
    lines, _, _ = run('flatGPT, float32', 'train.py', [f'--init_from={out_dir}/ckpt.pt', '--dataset=shakespeare_char',
                                                       '--eval_only', '--eval_iters=0', '--device=cpu'])
    return float(re.search(r'val loss ([\d.]+)', ''.join(line for _, line in lines))[1])


def speedrun(side):
    words = ['--eval_iters=1', '--log_interval=100', '--always_save_checkpoint=True']  # evaluations of milliseconds
    recipe = 'config/speedrun_shakespeare_char_cpu.py'
    with tempfile.TemporaryDirectory(dir=WORK) as out_dir:
        if side.startswith('nanoGPT'):
            n_steps = CASES['recipe']['max_iters']
            lines, _, _ = train(side, 'recipe', f'--eval_interval={n_steps}', *words, out_dir=out_dir)
        else:
            n_steps = overrides.settings_of(ROOT / 'train.py', [str(ROOT / recipe)])['max_iters']
            lines, _, _ = run(side, 'train.py', [recipe, f'--out_dir={out_dir}', *words])
        end = next(seconds for seconds, line in lines if line.startswith(f'step {n_steps}:'))
        return {'s to the end of training': end, 'nats a token of val': val_loss(out_dir)}


PARTS = {  # and their turns
    'recipe': (partial(step, part='recipe'), 5), 'default': (partial(step, part='default'), 5),
    '10m': (partial(step, part='10m'), 3), 'gpt2': (partial(step, part='gpt2'), 2), 'launch': (launch, 7),
    'sampling': (sampling, 2), 'batches': (batches, 9), 'memory': (memory, 2), 'losses': (losses, 1),
    'speedrun': (speedrun, 3),
}


def in_turn(part):
    """{what: {side: [figure of each turn]}}."""
    measure, n = PARTS[part]
    n, found = n if part == 'losses' else runs or n, {}
    sides = list(SIDES)[:2] if part in ('batches', 'speedrun') else [*SIDES, *COMPILED] if part in CASES else SIDES
    for turn in range(n):
        for side in sides:
            for what, figure in measure(side).items():
                found.setdefault(what, {}).setdefault(side, []).append(figure)
                print(f'{part}, turn {turn + 1} of {n}, {side}: {number(figure)} {what}', file=sys.stderr)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# what is told


def number(figure):
    return f'{figure:,.0f}' if figure >= 1000 else f'{figure:.4g}'


def table(part, found):
    """Lines of the table: for each figure what both have as they come, in float32, and compiled."""
    case = CASES.get(part, {})
    for what, figures in found.items():
        for how, end in ('as they come', ''), ('float32', ', float32'), ('compiled', ', compiled'):
            if f'flatGPT{end}' not in figures:
                continue
            pair = figures.get(f'nanoGPT{end}', figures['nanoGPT']), figures[f'flatGPT{end}']
            middle = [statistics.median(turns) for turns in pair]
            cells = [f'{number(x)} ({number(min(turns))} to {number(max(turns))})' for x, turns in zip(middle, pair)]
            if case:
                n_tokens = case['batch_size'] * case['block_size']
                cells = [f'{cell}, {n_tokens / x * 1000:,.0f} tokens/s' for x, cell in zip(middle, cells)]
            yield f'| {part} | {what} | {how} | {cells[0]} | {cells[1]} | {middle[0] / middle[1]:.2f} |'


def heading(wanted):
    """The beginning of the section: the day, the machine, versions, the command."""
    info = Path('/proc/cpuinfo').read_text() if os.path.exists('/proc/cpuinfo') else ''
    cpu = re.search(r'^model name\s*: (.*)', info, re.M)
    gpu = torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'no GPU'
    formats = ', '.join(f'{name} {"yes" if name.lower() in info.split() else "no"}'
                        for name in ('AVX2', 'AVX512F', 'AVX512_BF16', 'AMX_BF16'))
    return f"""
## {time.strftime('%Y-%m-%d')}: {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, {gpu}

`python bench/vs_nanogpt.py --peer=CHECKOUT --parts={','.join(wanted)} --runs={runs}`
({formats}; torch {torch.__version__}, {torch.get_num_threads()} threads, Python {platform.python_version()};
flatGPT {commit(ROOT)}, nanoGPT {commit(peer)})

| part | what | how | nanoGPT | flatGPT | nanoGPT / flatGPT |
|---|---|---|--:|--:|--:|"""


def commit(folder):
    """The git commit of a checkout, '+' where it was changed since; '' where there is none."""
    words = ['git', '-C', str(folder), 'describe', '--always', '--exclude=*', '--dirty=+']
    return subprocess.run(words, text=True, capture_output=True).stdout.strip() if shutil.which('git') else ''


def make_data(wanted):
    """WORK/data, where both sides read: links to the datasets, and random ids for gpt2, without a text or a network."""
    (WORK / 'data').mkdir()
    for name in ['shakespeare_char', *(['python_docs'] if 'default' in wanted else [])]:
        (WORK / 'data' / name).symlink_to(readers.find(name).resolve())
    if 'gpt2' in wanted:
        folder = WORK / 'data/random'
        folder.mkdir()
        for split, n in ('train', 4_000_000), ('val', 400_000):
            np.random.default_rng(n).integers(50257, size=n, dtype=np.uint16).tofile(folder / f'{split}.bin')
        (folder / 'meta.json').write_text(dumps({'vocab_size': 50257, 'tokenizer': {'kind': 'ids', 'size': 50257}}))


if __name__ == '__main__':
    overrides.apply(globals())
    wanted = list(PARTS) if parts == 'all' else parts.split(',')
    if strange := set(wanted) - PARTS.keys():
        fail(f'parts = {parts!r}: {min(strange)!r} is no part; there are {", ".join(PARTS)}')
    for name in 'train.py', 'model.py', 'sample.py':
        if not (Path(peer) / name).is_file():
            fail(f'peer = {peer!r}: no {name} is there; git clone https://github.com/karpathy/nanoGPT makes a folder '
                 'with all of it')
    if json and not Path(json).absolute().parent.is_dir():
        fail(f'json = {json!r}: there is no such folder')
    if 'gpt2' in wanted and DEVICE.type != 'cuda':
        print('gpt2 is left out: no GPU is here')
        wanted.remove('gpt2')
    if 'speedrun' in wanted and DEVICE.type == 'cuda':
        print('speedrun is left out: it compares on a CPU (CUDA_VISIBLE_DEVICES=)')
        wanted.remove('speedrun')
    os.environ.pop('PYTHONDONTWRITEBYTECODE', None)  # no launch but the first compiles what it imports
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through all that cleans up
    status, found = 0, {}
    with tempfile.TemporaryDirectory(prefix='vs_nanogpt_') as temporary:
        WORK = Path(temporary)
        make_data(wanted)
        section = heading(wanted)
        print(section)
        for part in wanted:
            try:
                found[part] = in_turn(part)
                print(*table(part, found[part]), sep='\n')
            except RuntimeError as error:
                print(f'vs_nanogpt.py: {part}: {error}', file=sys.stderr)
                status = 1
            if json:
                Path(json).write_text(dumps({'section': section, 'found': found}, indent=1), encoding='utf-8')
    sys.exit(status)
