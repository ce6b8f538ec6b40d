"""
What only a GPU can show, in one command of ten minutes on one GPU, without a network: a row a check.

$ python bench/gpu_check.py                          status 1: a row FAILs; 3: no time for all of it
$ python bench/gpu_check.py --only=numbers,resume    some sections: their names are at the end of this file
$ python bench/gpu_check.py --cpu                    tries this script itself, with tiny models and no compiler

First what must hold, then what it costs. A section that raises an error is a row that FAILs, and the next one begins.
"""

import inspect
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from json import dumps, loads
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kit.base import devices, overrides
from kit.base.errors import fail
from kit.learn import optimizers
from kit.state import checkpoints
from kit.state.writer import Writer
from model import GPT, GPTConfig

seconds = 580       # >= 1: for all; a section that needs more than is left of them is left out, and says so
only = ''           # these sections alone: numbers,resume; '' = all
json = ''           # a file for the rows; '' = none
cpu = False         # tries this script on the CPU
overrides.apply(globals())

BEGIN = time.perf_counter()
ROWS = []
LEFT = 'left'  # the verdict on what there was no time for
POOL = ThreadPoolExecutor(max(2, (os.cpu_count() or 1) // 2))  # for runs that nobody times: so many side by side

TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=64, batch_size=4)
SMALL = TINY if cpu else dict(n_layer=4, n_head=4, n_embd=256, block_size=256, batch_size=8)
DEFAULT = TINY if cpu else dict(n_layer=2, n_head=2, n_embd=128, block_size=64, batch_size=12)  # train_python_docs_gpt2
SHAKESPEARE = TINY if cpu else dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64)  # 10.7M parameters
GPT2 = TINY if cpu else dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=12)  # 124M
IDS = {'letters': 65, 'words': 65 if cpu else 50257}  # the datasets
COMMON = ['--warmup_iters=5', '--eval_iters=2', '--save_interval=0', '--learning_rate=1e-3', '--tensorboard=False',
          '--log_interval=1']
PACKED = ['--batch_mode=packed', '--sampling=shuffle']
MODERN = ['--architecture=modern', '--optimizer=muon:0.01']
COMPILED = [] if cpu else ['--compile=True']  # two cores would take minutes


def tell(section, what, found='', is_good=None, expected=''):
    """Print a row and keep it; is_good: also None where it is a figure without a verdict, or LEFT."""
    verdict = '' if is_good is None else LEFT if is_good is LEFT else 'ok' if is_good else 'FAIL'
    ROWS.append({'section': section, 'what': what, 'found': str(found), 'verdict': verdict, 'expected': expected})
    print(f'{verdict:4} {section:9} {what:58} {found!s:44} {expected}', flush=True)


def left():
    return seconds - (time.perf_counter() - BEGIN)


def on_gpu(is_good):
    """A verdict that a CPU cannot give."""
    return None if cpu else bool(is_good)


class TimeUp(Exception):
    """The seconds are over, which is no fault of what is checked."""


def caught(row, what, act, *args):
    """Call act; an error is a row that FAILs."""
    try:
        act(*args)
    except TimeUp:
        row(what, 'the time is up', LEFT)
    except (Exception, SystemExit) as error:
        row(what, f'{type(error).__name__}: {" ".join(str(error).split())[:200]}', False)
        traceback.print_exc()


# ---------------------------------------------------------------------------------------------------------------------
# models in this process, and the datasets


def new_model(shape, data='letters', **more):
    torch.manual_seed(0)
    sizes = {name: size for name, size in shape.items() if name != 'batch_size'}
    return GPT(GPTConfig(**sizes, bias=False, vocab_size=-(-IDS[data] // 64) * 64, **more)).to(device)


def compiled(model):
    model.compile(backend='eager' if cpu else 'inductor')


def learn(model, *batch, dtype='bfloat16', **how):
    """(loss, all gradients in one float64 tensor) of a batch."""
    model.zero_grad()
    with devices.autocast(device, dtype):
        loss = model(*batch, **how)[1]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def compare(row, what, found, truth, most=0.02, cosine=0.995, more=''):
    """A row for what learn() has found, whose loss may be so far from the truth, and the gradients so near to it."""
    gap, angle = found[0] - truth[0], F.cosine_similarity(found[1], truth[1], dim=0).item()
    row(what, f'loss {gap:+.1e}, cosine {angle:.6f}{more}', abs(gap) < most and angle > cosine)


def milliseconds(act, n=20):
    """Of a call, the mean of n behind two others."""
    for i in range(n + 2):
        if i == 2:
            devices.synchronize(device)
            start = time.perf_counter()
        act()
    devices.synchronize(device)
    return (time.perf_counter() - start) / n * 1000


def make_data(name, n):
    """n ids, each followed by one of four, in documents and pairs; as no text is known, no tokenizer is looked for."""
    rng, folder, end = np.random.default_rng(0), WORK / 'data' / name, IDS[name] - 1
    folder.mkdir(parents=True)
    follows = rng.integers(end, size=(end, 4))
    for split, size in ('train', n), ('val', n // 10):
        chains = np.zeros((size // 1000, 1000), np.uint16)  # each column is one
        for t in range(1, len(chains)):
            chains[t] = follows[chains[t - 1], rng.integers(4, size=1000)]
        ids = chains.T.ravel()
        ends = np.cumsum(rng.integers(20, 900, size=size // 300))
        ends = ends[ends < size]
        ids[ends - 1] = end
        ids.tofile(folder / f'{split}.bin')
        lengths = np.minimum(np.diff(ends), 250)
        np.save(folder / f'{split}.rows.npy', np.stack([ends[1:] - lengths, ends[1:] - lengths // 2, ends[1:]], axis=1))
    meta = {'vocab_size': end + 1, 'end_of_text': end, 'tokenizer': {'kind': 'ids', 'size': end + 1}}
    (folder / 'meta.json').write_text(dumps(meta))


# ---------------------------------------------------------------------------------------------------------------------
# runs of train.py, in processes of their own


def launch(name, *words, shape=SMALL, data='letters', hook=None, env=()):
    """train.py with the folder `name`, and a function of this file called before it. Returns the process."""
    if left() < 10:
        raise TimeUp
    code = f'import sys\nsys.path.insert(0, {str(ROOT)!r})\n__file__ = {str(ROOT / "train.py")!r}\n'
    if hook:
        code += f'{inspect.getsource(before_steps)}\n{inspect.getsource(hook)}\n{hook.__name__}()\n'
    (WORK / f'{name}.py').write_text(code + 'exec(compile(open(__file__, encoding="utf-8").read(), __file__, "exec"))')
    sizes = [f'--{setting}={size}' for setting, size in shape.items()]
    command = [sys.executable, f'{name}.py', f'--dataset={data}', f'--device={device.type}', f'--out_dir={name}',
               '--architecture=gpt2', '--optimizer=adamw', *sizes, *COMMON, *words]
    with open(WORK / f'{name}.txt', 'w') as log:
        return subprocess.Popen(command, cwd=WORK, stdout=log, stderr=subprocess.STDOUT,
                                env=os.environ | {'OMP_NUM_THREADS': '1' if cpu else '2'} | dict(env))


def finish(name, process, limit=200):
    """(status, output) of a process, once it has ended, after limit seconds by us; if it failed its output is shown."""
    is_up = left() < limit
    try:
        process.wait(max(1, min(limit, left())))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        if is_up:
            raise TimeUp from None
    text = (WORK / f'{name}.txt').read_text(errors='replace')
    if process.returncode not in (0, 128 + signal.SIGTERM):
        print(f'--- {name} ended with status {process.returncode}:\n{text[-2500:]}', flush=True)
    return process.returncode, text


def train(name, *words, **how):
    return finish(name, launch(name, *words, **how))


def alone(function):
    """A function of this file in a process of its own, which an illegal memory access ends. Returns how it went."""
    code = f'import sys\nsys.path.insert(0, {str(ROOT)!r})\n{inspect.getsource(function)}\n{function.__name__}({cpu})'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=max(5, left()))
    said = done.stdout if done.returncode == 0 else f'status {done.returncode}: {" ".join(done.stderr.split())[-160:]}'
    return said.strip()


def losses(name):
    """Of all updates of a run, in full, as metrics.jsonl has them."""
    path = WORK / name / 'metrics.jsonl'
    records = map(loads, path.read_text().splitlines() if path.exists() else ())
    return np.array([record['loss'] for record in records if 'loss' in record], float)


def apart(one, other):
    """How far the losses of two runs are apart at most, in nats; inf where one has other steps."""
    a, b = losses(one), losses(other)
    return abs(a - b).max() if len(a) == len(b) > 0 else math.inf


def same_weights(one, other):
    a, b = (torch.load(WORK / name / 'ckpt.pt', 'cpu', weights_only=True)['model'] for name in (one, other))
    return all(torch.equal(a[name], b[name]) for name in a)


# hooks: their source is copied into a run, so they import what they need, and are given nothing


def before_steps(actions):
    """Call functions before the updates of some steps, {step: function}. Each update seeds torch once."""
    import itertools

    from kit.base import devices
    seed, steps = devices.seed, itertools.count()

    def counted(device, number):
        actions.get(next(steps), int)()
        return seed(device, number)
    devices.seed = counted


def count_waits():
    """Print where the host waits for the device in 16 steps, {line: how often}."""
    import collections
    import warnings

    import torch
    found = collections.Counter()

    def note(message, category, filename, line, *_):
        if 'called a synchronizing' in str(message):  # set_sync_debug_mode has a warning of its own
            found[f'{filename}:{line}'] += 1
    warnings.showwarning = note
    warnings.simplefilter('always')
    set_mode = torch.cuda.set_sync_debug_mode if torch.cuda.is_available() else str
    before_steps({21: lambda: set_mode('warn'), 37: lambda: set_mode('default'),
                  38: lambda: print('WAITS', dict(found))})


def note_widths():
    """Print how wide the rows were that went to the device."""
    import atexit

    from kit.base import devices
    widths, send = set(), devices.send

    def noted(array, device):
        widths.update(() if array is None else array.shape[1:])
        return send(array, device)
    devices.send = noted
    atexit.register(lambda: print('WIDTHS', sorted(widths)))


def without_tf32():
    import torch
    torch.set_float32_matmul_precision = str


def with_cuda_graphs():
    """Where train.py would refuse them, too."""
    from kit.base import devices
    devices.choose_compile_mode = lambda *_: 'reduce-overhead'


def measure():
    """Print ms a step of 60, then of 10 more in which share of the time the device is busy, and with what."""
    import json
    import time

    import torch
    from torch.profiler import ProfilerActivity, profile
    cuda, times = torch.cuda if torch.cuda.is_available() else None, []
    profiler = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])

    def note():
        if cuda:
            cuda.synchronize()
        times.append(time.perf_counter())

    def begin():
        note()
        profiler.start()
        note()

    def end():
        note()
        profiler.stop()
        kernels = sorted(profiler.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
        busy = sum(kernel.self_device_time_total for kernel in kernels) / 1e6
        print('MEASURED', json.dumps({
            'ms': (times[1] - times[0]) / 60 * 1000, 'busy': busy / (times[3] - times[2]),
            'gib': cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
            'kernels': [f'{kernel.self_device_time_total / 1e4:.3f} ms a step, {kernel.count // 10} x {kernel.key[:80]}'
                        for kernel in kernels[:10] if kernel.self_device_time_total]}))
    before_steps({30: cuda.reset_peak_memory_stats if cuda else int, 40: note, 100: begin, 110: end})


def measured(name, *words, tuned=False, **how):
    """What measure() found in a run; tuned: the compiler tries more sizes for its kernels."""
    env = {'TORCHINDUCTOR_COORDINATE_DESCENT_TUNING': '1'} if tuned else {}
    status, text = train(name, '--max_iters=112', '--eval_interval=0', '--dtype=bfloat16', *COMPILED, *words,
                         hook=measure, env=env, **how)
    found = re.search('^MEASURED (.*)', text, re.M)
    if not found:
        raise RuntimeError(f'{name} ended with status {status} before it was measured')
    return loads(found[1]) | {'mfu': max(map(float, re.findall(r'mfu ([\d.]+)%', text)), default=math.nan)}


# ---------------------------------------------------------------------------------------------------------------------
# in this process: the device, the optimizer, numbers, attention


def machine(row):
    row('torch, CUDA, cuDNN, Python', f'{torch.__version__}, {torch.version.cuda}, {torch.backends.cudnn.version()}, '
        f'{sys.version.split()[0]}')
    if not cpu:
        row('GPU, its capability', f'{torch.cuda.get_device_name()}, {torch.cuda.get_device_capability()}')
        row('this torch has kernels for', ' '.join(torch.cuda.get_arch_list()))
    n = 256 if cpu else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    share = 2 * n**3 / milliseconds(lambda: a @ a) * 1000 / devices.peak_flops(device, 'bfloat16')
    row(f'a product of {n} x {n} in bfloat16, of peak_flops', f'{share:.0%}', on_gpu(0.5 < share < 1.05), '60% to 90%')
    took = milliseconds(lambda: devices.usage(device), n=1)
    row('devices.usage', f'{len(devices.usage(device))} figures in {took:.1f} ms', on_gpu(took < 200), 'below 200 ms')
    take = devices.fetch(torch.full((4,), 7.0, device=device))
    start = time.perf_counter()
    for _ in range(50):
        a @ a
    is_right = take().tolist() == [7.0] * 4
    took = time.perf_counter() - start
    devices.synchronize(device)
    share = took / (time.perf_counter() - start)
    row('devices.fetch waits for its own copy, and products behind it', f'for {share:.0%} of their time',
        is_right and (cpu or share < 0.5), 'below 50%')


def optimizer(row):
    """The fused optimizer clips, and reads on the device whether a step is good."""
    one, other = (torch.nn.Linear(300, 300, device=device) for _ in range(2))
    other.load_state_dict(one.state_dict())
    by_torch, fused = (optimizers.adamw(model, 0.1, 1e-2, (0.9, 0.95)) for model in (one, other))
    pairs, good = [*zip(one.parameters(), other.parameters())], torch.tensor(True, device=device)
    clip = partial(optimizers.clip, fused, [*other.parameters()], limit=1.0, most=0.0)
    for _ in range(3):
        for p, q in pairs:
            p.grad = torch.randn_like(p) * 3
            q.grad = p.grad.clone()
        norm = torch.nn.utils.get_total_norm([p.grad for p, _ in pairs])
        torch.nn.utils.clip_grads_with_norm_(one.parameters(), 1.0, norm)
        clip(norm=norm)
        for each in by_torch, fused:
            optimizers.step(each, good)
    for what, gaps in ('weights', [p - q for p, q in pairs]), ('gradients left', [p.grad - q.grad for p, q in pairs]):
        gap = max(gap.abs().max().item() for gap in gaps)
        row(f'clipped inside, or by torch before: the {what}', f'{gap:.1e} apart', gap < 1e-5)

    def everything():
        moments = [value for state in fused.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in (*other.parameters(), *moments)]
    before = everything()
    other.weight.grad[0, 0] = math.nan
    clip(norm=norm * math.nan)
    optimizers.step(fused, ~good)
    row('in a bad step nothing moves', '', all(map(torch.equal, before, everything())))


def numbers(row):
    """One model, one batch: float32 without TF32 is the truth."""
    shape = GPT2 | (TINY if cpu else dict(n_layer=4, batch_size=8))
    model = new_model(shape, 'words')
    batch = torch.randint(IDS['words'], (2, shape['batch_size'], shape['block_size']), device=device)
    learned = partial(learn, model, *batch)
    torch.set_float32_matmul_precision('highest')
    truth = learned(dtype='float32')
    torch.set_float32_matmul_precision('high')
    compare(row, 'TF32 against float32', learned(dtype='float32'), truth)
    eager = learned()
    compare(row, 'bfloat16 against float32', eager, truth)
    compare(row, 'the loss alone against logits and loss', learned(loss_alone=True), eager, 1e-4, 0.9999)
    compiled(model)
    found, gib = {}, {}
    start = time.perf_counter()
    for loss_alone in True, False:
        learned(loss_alone=loss_alone)  # compiles
        if not cpu:
            torch.cuda.reset_peak_memory_stats()
        found[loss_alone] = learned(loss_alone=loss_alone)
        gib[loss_alone] = 0 if cpu else torch.cuda.max_memory_allocated() / 2**30
    row('both compiled', f'{time.perf_counter() - start:.0f} s')
    compare(row, 'bfloat16 compiled against float32', found[True], truth)
    compare(row, 'the loss alone, compiled, against logits and loss', found[True], found[False], 1e-4, 0.999)
    row('memory at its peak: the loss alone, logits and loss', f'{gib[True]:.2f}, {gib[False]:.2f} GiB',
        on_gpu(gib[True] < gib[False]), 'less')


def attention(row):
    """Which kernels torch takes of itself, and that cuDNN's stay out where they do harm."""
    shape = (1, 2, 64, 16) if cpu else (12, 12, 1024, 64)
    heads = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    there_and_back = lambda: F.scaled_dot_product_attention(*heads, is_causal=True).sum().backward()
    with torch.profiler.profile() as profiler:
        there_and_back()
    names = ' '.join(event.key.lower() for event in profiler.key_averages())
    row('causal attention by default', [kind for kind in ('cudnn', 'flash', 'efficient') if kind in names])
    for kind in SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION:
        try:
            with sdpa_kernel(kind):
                row(f'{kind.name} {shape} there and back', f'{milliseconds(there_and_back):.3f} ms')
        except RuntimeError:
            row(kind.name, 'not here')
    model = new_model(GPT2).eval()
    times = []
    for length in (3, 20, 20) if cpu else (3, 200, 200):  # the first warms up, the second meets each length first
        start = time.perf_counter()
        with devices.autocast(device, 'bfloat16'):
            model.generate(torch.zeros(1, 1, dtype=torch.int64, device=device), length)
        devices.synchronize(device)
        times.append((time.perf_counter() - start) / length * 1000)
    row('a token while writing, at new lengths and at known ones', f'{times[1]:.2f}, {times[2]:.2f} ms',
        on_gpu(times[1] - times[2] < 5), 'less than 5 ms apart')
    with_cudnn = {}
    for T in 64, 192, 256:  # the case of pytorch/pytorch#196678
        q, k, v = (torch.randn(1, 1, T, 64, device=device, dtype=torch.bfloat16) * 0.1 for _ in range(3))
        q[..., 0], k[..., 0] = 1.0, -960.0
        heads = [x.requires_grad_() for x in (q, k, v)]
        mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=device).tril()
        model = new_model(dict(n_layer=1, n_head=1, n_embd=64, block_size=T))
        model.transformer.h[0].attn.heads = lambda *args, heads=heads: heads
        model.is_sparse = lambda device, T: False
        idx = torch.zeros(1, T, dtype=torch.int64, device=device)
        with devices.autocast(device, 'bfloat16'):
            model.hidden(idx, documents=idx).float().square().sum().backward()  # one document: the mask is this one
        n_bad = sum(int((~x.grad.isfinite()).sum()) for x in heads)
        row(f'bad numbers in the gradients behind a dense mask, T = {T}', n_bad, n_bad == 0, '0')
        q.grad = None
        try:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                F.scaled_dot_product_attention(*heads, attn_mask=mask).square().sum().backward()
            with_cudnn[T] = int((~q.grad.isfinite()).sum())
        except RuntimeError:
            with_cudnn[T] = 'not here'
    row('and by cuDNN, which model.py does not take there', with_cudnn, None, 'an H200: some at 64 and 192')


def flex(row):
    """FlexAttention where training uses it, and the dense mask elsewhere, against the dense mask."""
    forward = POOL.submit(alone, compiled_forward)
    cases = [(256, 64, True, False), (1024, 64, True, True), (256, 64, False, True),  # T, channels, causal, compiled
             (128, 64, True, True), (256, 8, True, True)]  # these take the dense mask
    for i, (T, channels, causal, is_compiled) in enumerate(cases[:2] if cpu else cases):
        what = f'T = {T}, heads of {channels}, {"causal" if causal else "mlm"}{", compiled" if is_compiled else ""}'
        caught(row, what, flex_case, row, what, i < 3, T, channels, causal, is_compiled)
    row('FlexAttention compiled without gradients', forward.result(), None, 'an H200, torch 2.11: a crash')


def flex_case(row, what, is_sparse, T, channels, causal, is_compiled):
    torch._dynamo.reset()
    counters.clear()
    T = TINY['block_size'] if cpu else T
    model = new_model(dict(n_layer=2, n_head=4, n_embd=4 * channels, block_size=T), causal=causal)
    idx = torch.randint(IDS['letters'], (4, T), device=device)
    documents, others = ((torch.rand(4, T, device=device) < share).cumsum(1) for share in (0.02, 0.03))
    model.is_sparse = lambda device, T: False
    truth = learn(model, idx, idx, documents)
    del model.is_sparse
    if is_compiled:
        compiled(model)
    found = learn(model, idx, idx, documents, loss_alone=True)
    learn(model, idx, idx, others, loss_alone=True)  # nothing is compiled anew
    compare(row, what, found, truth, 0.01, 0.99, f', {counters["stats"]["unique_graphs"]} graphs')
    is_used = model.is_sparse(device, T)
    row(f'{what}: the mask', 'sparse' if is_used else 'dense', on_gpu(is_used == is_sparse))


def compiled_forward(cpu):
    import torch

    from model import GPT, GPTConfig
    device, T = ('cpu', 64) if cpu else ('cuda', 256)
    model = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=T, vocab_size=64)).to(device).eval()
    model.is_sparse = lambda device, T: True
    model.compile(disable=cpu)
    for _ in range(4):
        idx, documents = torch.randint(64, (8, T), device=device), (torch.rand(8, T, device=device) < 0.03).cumsum(1)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            loss = model(idx, idx, documents)[1].item()
    print(f'loss {loss:.2f}: no crash')


# ---------------------------------------------------------------------------------------------------------------------
# runs side by side, which nobody times


def runs(row):
    """Small models in every mode, with an evaluation in the middle and one at the end."""
    graphs = ['--dtype=bfloat16', *COMPILED]
    jobs = {
        'plain': [], 'ema': ['--ema_decay=0.99'], 'bf16': ['--dtype=bfloat16'], 'fp16': ['--dtype=float16'],
        'packed': [*PACKED, '--dtype=bfloat16', *COMPILED], 'dropout': [*PACKED, '--dropout=0.1', '--block_size=64'],
        'padded': ['--batch_mode=padded', '--sampling=shuffle', '--ema_decay=0.99', *COMPILED],
        'mlm': ['--objective=mlm', *COMPILED], 'modern': [*MODERN, *graphs], 'debug_nan': [*PACKED, '--debug_nan=True'],
        'no_graphs': [*graphs, '--compile_mode=default'], 'graphs': [*graphs, '--compile_mode=reduce-overhead'],
        'no_graphs_2': [*graphs, '--compile_mode=default', '--gradient_accumulation_steps=2'],
        'graphs_2': [*graphs, '--gradient_accumulation_steps=2'],
    }
    hooks = {'padded': note_widths, 'graphs_2': with_cuda_graphs}
    jobs = {name: POOL.submit(train, name, '--max_iters=40', '--eval_interval=20', *words, hook=hooks.get(name),
                              env={'TORCH_LOGS': 'recompiles'}) for name, words in jobs.items()
            if not cpu or name in ('dropout', 'padded')}
    for name, job in jobs.items():
        status, found = job.result()[0], losses(name)
        row(name, f'status {status}, loss {found[:1]} to {found[-1:]}',
            None if name == 'graphs_2' else status == 0 and len(found) == 40 and found[-1] < found[0])
    text = jobs['padded'].result()[1]
    widths = [int(width) for found in re.findall(r'^WIDTHS \[(.*)\]', text, re.M) for width in found.split(',')]
    row('padded: widths of its rows', widths, on_gpu(widths and not any(w % 64 for w in widths)), 'multiples of 64')
    n_anew = text.count('Recompiling function forward')
    row('padded: compiled anew', f'{n_anew} times', on_gpu(n_anew <= 5), '3: for other widths, and in evaluations')
    if not cpu:
        gaps = [apart(*pair) for pair in (('fp16', 'bf16'), ('graphs', 'no_graphs'), ('graphs_2', 'no_graphs_2'))]
        row('float16 against bfloat16', f'{gaps[0]:.1e} nats apart', gaps[0] < 0.05)
        row('CUDA graphs against none', f'{gaps[1]:.1e} nats apart', gaps[1] < 0.01)
        row('the same over two micro-steps, which train.py refuses', f'{gaps[2]:.1e} nats apart', None,
            'pytorch/pytorch#169545')


def waits(row):
    """An ordinary step only queues work."""
    words = ['--max_iters=40', '--log_interval=0', '--eval_interval=0', '--max_bad_steps=0']
    kinds = {'waits_ema': ['--ema_decay=0.99'], 'waits_modern': MODERN, 'waits': [], 'waits_compiled': COMPILED}
    jobs = {name: POOL.submit(train, name, *words, *more, hook=count_waits) for name, more in kinds.items()
            if not cpu or name in ('waits_ema', 'waits_modern')}
    for name, job in jobs.items():
        found = re.search('^WAITS (.*)', job.result()[1], re.M)
        where = found[1] if found else 'not counted'
        row(f'{name}: where the host waits in 16 steps', where, where == '{}', '{}')


def ranks(row):
    """Two processes on one GPU, over gloo, against one; and nccl alone, with its gloo group."""
    words = ['--max_iters=12', '--eval_interval=6', '--gradient_accumulation_steps=2', '--dtype=float32']
    nccl = None if cpu else POOL.submit(alone, nccl_and_gloo)
    part = POOL.submit(alone, in_one_part)
    single = POOL.submit(train, 'single', *words, hook=without_tf32)
    kinds = {'pair': [], 'pair_compiled': COMPILED, 'pair_packed': [*PACKED, *COMPILED]}
    jobs = {name: POOL.submit(pair, name, *words, *more) for name, more in kinds.items() if not cpu or name == 'pair'}
    single.result()
    for name, job in jobs.items():
        statuses, gap, is_other = job.result(), apart('single', name), name == 'pair_packed'
        row(name, f'status {statuses}, {gap:.1e} nats apart', statuses == [0, 0] and (is_other or gap < 2e-3),
            'it sees other rows' if is_other else 'below 2e-3')
    row('FSDP in one part, on the GPU and on its host', part.result(), part.result().startswith('near'), 'near')
    if nccl:
        row('nccl with a device, beside it a group of gloo', nccl.result(), nccl.result() == '')


def pair(name, *words):
    """The statuses of two ranks."""
    with socket.socket() as some:
        some.bind(('127.0.0.1', 0))
        port = some.getsockname()[1]
    env = {'WORLD_SIZE': '2', 'LOCAL_RANK': '0', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    processes = {f'{name}_{rank}': launch(f'{name}_{rank}', *words, '--backend=gloo', f'--out_dir={name}',
                                          hook=without_tf32, env=env | {'RANK': str(rank)}) for rank in range(2)}
    return [finish(own, process)[0] for own, process in processes.items()]


def in_one_part(cpu):
    """FSDP over one process, which train.py refuses: its policy for bfloat16, parts on the host, Muon, whole copies."""
    import os

    import torch
    import torch.distributed as dist

    from kit.base import devices, ranks
    from kit.learn import averages, building, gradients, optimizers
    from model import GPT, GPTConfig
    os.environ |= {'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29912'}
    device = torch.device('cpu' if cpu else 'cuda:0')
    dist.init_process_group('gloo' if cpu else 'nccl', device_id=None if cpu else device)
    ranks.choose_parallel = lambda *_: None
    config = GPTConfig(n_layer=2, n_head=4, n_embd=256, block_size=256, vocab_size=512, **GPTConfig.PRESETS['modern'])
    idx, found = torch.randint(512, (8, 256), device=device), {}
    for what, is_fsdp, offload in ('whole', False, False), ('part', True, False), ('host', True, not cpu):
        ranks.is_fsdp = is_fsdp
        torch.manual_seed(0)
        model = building.build(GPT, config, 'fsdp', True, offload, device, 'bfloat16')
        parameters, average = [*model.parameters()], averages.running(model, 0.9, 0)
        optimizer = optimizers.make('muon:0.01', model, 0.1, 1e-3, (0.9, 0.95), 'bfloat16')
        for _ in range(10):
            optimizer.zero_grad()
            with devices.autocast(device, 'bfloat16'):
                loss = model(idx, idx, loss_alone=True)[1]
            loss.backward()
            norms = gradients.norms(parameters)
            norm = torch.linalg.vector_norm(norms)
            is_good = torch.isfinite(loss) & torch.isfinite(norm)
            optimizers.clip(optimizer, parameters, norm, 1.0, 0.0)
            optimizers.step(optimizer, is_good)
            average.update(is_good)
        found[what] = [loss.item(), norm.item(), *(ranks.whole(p.detach()).norm().item() for p in parameters[:3])]
        assert all(p.device.type == ('cpu' if offload else device.type) for p in parameters)
    far = {what: max(abs(a / b - 1) for a, b in zip(found[what], found['whole'])) for what in ('part', 'host')}
    print('far' if max(far.values()) > 0.02 else 'near', {what: f'{value:.1e}' for what, value in far.items()})
    dist.destroy_process_group()
    os._exit(0)


def nccl_and_gloo(cpu):
    import os

    import torch
    import torch.distributed as dist
    os.environ |= {'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29911'}
    torch.cuda.set_device(0)
    dist.init_process_group('nccl', device_id=torch.device('cuda', 0))
    group = dist.new_group(backend='gloo')
    dist.all_reduce(torch.ones(3, device='cuda', dtype=torch.float64))
    dist.all_reduce(torch.tensor(3), dist.ReduceOp.MAX, group=group)
    dist.broadcast_object_list([1], src=0, group=group)
    dist.barrier(group=group)
    dist.destroy_process_group()
    os._exit(0)


def resume(row):
    """A run made twice, and one in two halves: to rounding, and bit for bit with --deterministic."""
    exact = ['--deterministic=True']
    kinds = {'exact': exact, 'exact_packed': exact + PACKED, 'exact_modern': exact + MODERN, 'default': []}
    jobs = {name: POOL.submit(halves, name, *words) for name, words in kinds.items() if not cpu or name == 'exact'}
    stopped = POOL.submit(stop)
    for name, job in jobs.items():
        most = 5e-3 if name == 'default' else 0.0
        again, resumed, is_same = job.result()
        row(f'{name}: made twice', f'{again:.1e} nats apart', again <= most, f'{most:g}')
        row(f'{name}: in two halves', f'{resumed:.1e} nats apart', resumed <= most, f'{most:g}')
        row(f'{name}: in two halves, the same last weights', is_same, None if most else is_same)
    status, text = stopped.result()
    row('SIGTERM saves and leaves', f'status {status}', status == 143 and 'saving checkpoint' in text, 'status 143')


def halves(name, *words):
    """How far a second run and one in halves are from the first, in nats, and whether that has the same weights."""
    words = [*words, '--eval_interval=10', '--lr_decay_iters=20', '--max_iters=20']
    train(f'{name}_whole', *words)
    train(f'{name}_again', *words)
    train(f'{name}_half', *words, '--max_iters=10')
    train(f'{name}_rest', *words, '--init_from=resume', f'--out_dir={name}_half')
    return (*(apart(f'{name}_whole', f'{name}_{other}') for other in ('again', 'half')),
            same_weights(f'{name}_whole', f'{name}_half'))


def stop():
    process = launch('stopped', '--max_iters=100000', '--eval_interval=0')
    while process.poll() is None and 'iter 50:' not in (WORK / 'stopped.txt').read_text() and left() > 10:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    return finish('stopped', process)


# ---------------------------------------------------------------------------------------------------------------------
# what is timed, alone on the GPU


def giant(row):
    """124M parameters: what a save costs the thread that trains, and what clipping costs."""
    model = new_model(GPT2, 'words')
    adamw, parameters = optimizers.adamw(model, 0.1, 1e-5, (0.9, 0.95)), [*model.parameters()]
    good, norm = torch.tensor(True, device=device), torch.tensor(2.0, device=device)
    learn(model, *torch.randint(IDS['words'], (2, 1, GPT2['block_size']), device=device))
    inside = milliseconds(lambda: (optimizers.clip(adamw, parameters, norm, 1.0, 0.0), optimizers.step(adamw, good)))
    adamw.grad_scale = None
    before = milliseconds(lambda: (torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm),
                                   optimizers.step(adamw, good)))
    row('a step of the optimizer with clipping inside, and before it', f'{inside:.3f}, {before:.3f} ms')
    state = {'model': model.state_dict(), 'optimizer': adamw.state_dict(), 'model_args': model.config.args()}
    names, writer = [name for name, _ in model.named_parameters()], Writer(WORK / 'beside', keep_last=1)
    ways = {'beside': lambda: writer.write(state, ['ckpt.pt'], names),
            'at_once': lambda: checkpoints.save(state, WORK / 'at_once', ['ckpt.pt'], True, names)}
    took = dict.fromkeys(ways, math.inf)
    for way, save in [*ways.items()] * 2:  # the better of two
        (WORK / way).mkdir(exist_ok=True)
        devices.synchronize(device)
        start = time.perf_counter()
        save()
        took[way] = min(took[way], time.perf_counter() - start)
        writer.wait()
    row('a save by a thread, and at once', f'{took["beside"]:.3f}, {took["at_once"]:.3f} s',
        on_gpu(took['beside'] < 0.1 * took['at_once']), 'a tenth or less')
    row('both hold the same', '', same_weights('beside', 'at_once'))


def minutes(row):
    """With a compiler, too, the time is used and kept."""
    wanted, start = 0.1 if cpu else 1.5, time.perf_counter()
    status, text = train('minutes', f'--max_minutes={wanted}', '--warmup_iters=30', '--eval_interval=200',
                         '--log_interval=100', *COMPILED)
    took, fitted = time.perf_counter() - start, re.search('so ([0-9,]+) steps fit', text)
    row(f'max_minutes = {wanted}', f'status {status}, {took:.0f} s, {fitted[1] if fitted else "no"} steps fit',
        on_gpu(fitted and status == 0 and 65 < took < 95), '75 to 90 s')


def speed(row):
    """124M parameters, compiled, in bfloat16."""
    cases = {'12 rows': [], '12 rows, EMA': ['--ema_decay=0.999'], '32 rows': ['--batch_size=32'], '12 rows, tuned': []}
    for i, (what, words) in enumerate(cases.items()):
        if left() < 60 or cpu and i:
            row(what, f'{left():.0f} s are left', None if cpu else LEFT)
            continue
        found = measured(f'speed{i}', *words, '--log_interval=20', shape=GPT2, data='words', tuned='tuned' in what)
        n_tokens = GPT2['block_size'] * (32 if '32' in what else GPT2['batch_size'])
        row(what, f'{found["ms"]:.2f} ms, {n_tokens / found["ms"]:.0f}k tok/s, mfu {found["mfu"]:.1f}%, '
            f'busy {found["busy"]:.0%}, {found["gib"]:.1f} GiB', None, ('an H200: 26 ms', '', 'an H200: 61 ms', '')[i])
        for kernel in found['kernels']:
            print(f'{"":15}{kernel}', flush=True)


def pace(row):
    """Small models: what the host does between their steps, and from how many FLOPs on CUDA graphs do not pay."""
    words = '--log_interval=0', '--compile_mode=default'
    quiet = measured('quiet', *words, shape=SHAKESPEARE)
    row('10.7M parameters, no iter line', f'{quiet["ms"]:.2f} ms a step, busy {quiet["busy"]:.0%}')
    if cpu:
        return
    loud = measured('loud', *words, '--log_interval=1', shape=SHAKESPEARE)
    row('an iter line at each step', f'{loud["ms"]:.2f} ms a step, busy {loud["busy"]:.0%}',
        loud['busy'] > 0.9 * quiet['busy'], 'as busy')
    saving = measured('saving', *words, '--save_interval=10', shape=SHAKESPEARE)
    row('a checkpoint every 10 steps', f'{saving["ms"]:.2f} ms a step')
    for what, shape in ('10.7M parameters', SHAKESPEARE), ('the default model', DEFAULT):
        flops = new_model(shape).flops_per_token() * shape['batch_size'] * shape['block_size']
        ms = [measured(f'{mode}_{shape["n_embd"]}', *words, f'--compile_mode={mode}', shape=shape)['ms']
              for mode in ('default', 'reduce-overhead')]
        row(f'{what}, {flops:.1e} FLOPs a micro-step', f'{ms[0]:.2f} ms, with CUDA graphs {ms[1]:.2f} ms')


# ---------------------------------------------------------------------------------------------------------------------
# the sections and the seconds that each needs on a GPU; one after the other, those of a line side by side

SECTIONS = [{machine: 5}, {optimizer: 5}, {numbers: 60}, {attention: 20}, {flex: 60},
            {resume: 100, ranks: 100, runs: 120, waits: 60}, {giant: 30}, {minutes: 100}, {speed: 60}, {pace: 110}]


def section(check, needs):
    """Make a check, unless there is no time for it."""
    row, start = partial(tell, check.__name__), time.perf_counter()
    if left() < needs:
        return row('all of it', f'{left():.0f} s are left, and it needs {needs}', LEFT)
    caught(row, 'the rest of it', check, row)
    print(f'     {check.__name__:9} took {time.perf_counter() - start:.0f} s', flush=True)


known = {check.__name__ for group in SECTIONS for check in group}
wanted = set(only.split(',')) if only else known
if wanted - known:
    fail(f'only = {only!r}: {min(wanted - known)!r} is no section; there are {", ".join(sorted(known))}')
if json and not Path(json).absolute().parent.is_dir():
    fail(f'json = {json!r}: there is no such folder')
if not cpu and (fault := devices.cuda_fault(0)):
    fail(f'{fault}; --cpu tries this script without a GPU')
device = devices.choose_device('cpu' if cpu else 'cuda')
TEMPORARY = tempfile.TemporaryDirectory(prefix='gpu_check_')
WORK = Path(TEMPORARY.name)  # where all is written
for name in IDS:
    make_data(name, 200_000 if cpu else 4_000_000)
for group in SECTIONS:
    checks = [(check, needs) for check, needs in group.items() if check.__name__ in wanted]
    if len(checks) > 1:
        with ThreadPoolExecutor(len(checks)) as threads:
            for check in checks:
                threads.submit(section, *check)
    elif checks:  # in this thread, as profilers want it
        section(*checks[0])
POOL.shutdown()
TEMPORARY.cleanup()

bad, late = ([f'{row["section"]}: {row["what"]}' for row in ROWS if row['verdict'] == kind] for kind in ('FAIL', LEFT))
if cpu:
    print('\nall this says nothing of a GPU')
print(f'\n{len(ROWS)} rows in {time.perf_counter() - BEGIN:.0f} s, {len(bad)} FAIL', *bad, sep='\n  ')
if late:
    print('there was no time for', *late, sep='\n  ')
if json:
    Path(json).write_text(dumps(ROWS, indent=1), encoding='utf-8')
sys.exit(1 if bad else 3 if late else 0)
