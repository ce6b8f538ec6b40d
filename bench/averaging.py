"""
The averaging of checkpoints against reading the same bytes: seconds, and the peak of anonymous memory.

$ python bench/averaging.py                 8 checkpoints of 124M parameters, with their moments: 12 GB in a new folder
$ python bench/averaging.py --checkpoints_to_average=2 --n_layer=4 --n_embd=256

raw:     every byte of the model's tensors is read once, by the system's calls, into one buffer
torch:   the same tensors are read by torch.load, file by file
average: kit.learn.averaging.mean, checksums included

Each in a process of its own, in turns, with the files dropped from the system's cache before each turn (Linux), and
then with the files in it.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from kit.base import overrides
from kit.state import averaging, checkpoints
from model import GPT, GPTConfig

checkpoints_to_average = 8  # >= 1: how many
n_layer = 12                # >= 1: GPT-2 124M
n_embd = 768                # >= 64: channels
moments = True              # whether the files hold AdamW's two moments, as those of a run do
turns = 5                   # >= 1: of each
folder = ''                 # where the files are made, '' = a temporary folder, which goes again
role = ''                   # set by the bench itself: what a process of its own does


def spans(path):
    """The places of the model's tensors in a file, [(start, length)], each storage once."""
    state = checkpoints.peek(path)['model']
    pointers = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    with open('/proc/self/maps') as maps:
        base = next(int(line.split('-')[0], 16) for line in maps if line.rstrip().endswith(str(path)))
    return sorted((pointer - base, length) for pointer, length in pointers.items())


def read_raw(paths):
    buffer = memoryview(bytearray(1 << 24))
    for path in paths:
        places = spans(path)
        with open(path, 'rb', buffering=0) as file:
            for start, length in places:
                file.seek(start)
                while length:
                    length -= file.readinto(buffer[:min(length, len(buffer))])


def read_by_torch(paths):
    for path in paths:
        {name: tensor.clone() for name, tensor in checkpoints.peek(path)['model'].items() if name != 'lm_head.weight'}


def average(paths):
    averaging.mean([(path, *checkpoints.open_lazily(path)) for path in paths], [1 / len(paths)] * len(paths))


def anonymous_bytes(pid):
    with open(f'/proc/{pid}/status') as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith('RssAnon'))


def measure(role, folder, drop):
    """(seconds, peak of the anonymous bytes above those before) of a turn."""
    if drop:
        for path in Path(folder).glob('*.pt'):
            with open(path, 'rb') as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    process = subprocess.Popen([sys.executable, __file__, f'--role={role}', f'--folder={folder}'],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while process.stdout.readline() != 'ready\n':  # torch is imported
        pass
    before = peak = anonymous_bytes(process.pid)
    process.stdin.write('go\n')
    process.stdin.flush()
    os.set_blocking(process.stdout.fileno(), False)
    while not (line := process.stdout.readline()):
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.002)
    process.communicate()
    return float(line), peak - before


def make(folder):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // 64, bias=False))
    args = vars(model.config).copy()
    args.pop('gelu_approximate')
    optimizer = {i: {'exp_avg': torch.rand_like(p), 'exp_avg_sq': torch.rand_like(p)} if moments else {}
                 for i, p in enumerate(model.parameters())}
    for step in range(checkpoints_to_average):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
        torch.save({'model': model.state_dict(), 'optimizer': {'state': optimizer}, 'model_args': args,
                    'iter_num': step}, Path(folder) / f'step_{step:07d}.pt')
    return sum(p.numel() * 4 for p in model.parameters())


def main(folder):
    size = make(folder)
    print(f'{checkpoints_to_average} checkpoints, each with {size / 1e6:.0f} MB of weights')
    for drop in True, False:
        found = {'read_raw': [], 'read_by_torch': [], 'average': []}
        for _ in range(turns):
            for role in found:
                found[role].append(measure(role, folder, drop))
        seconds = {role: statistics.median(turn[0] for turn in found[role]) for role in found}
        peak = max(turn[1] for turn in found['average'])
        raw, by_torch, average = seconds.values()
        print(f'from the {"disk" if drop else "cache"}: raw {raw:.2f} s, torch {by_torch:.2f} s, '
              f'average {average:.2f} s = {average / raw:.2f} x raw, {average / by_torch:.2f} x torch; '
              f'peak of anonymous memory {peak / 1e6:.0f} MB = {peak / size:.2f} models')


overrides.apply(globals())
if role:
    paths = sorted(Path(folder).glob('*.pt'))
    print('ready', flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    globals()[role](paths)
    print(time.perf_counter() - start, flush=True)
elif folder:
    Path(folder).mkdir(parents=True, exist_ok=True)
    main(folder)
else:
    with tempfile.TemporaryDirectory() as temporary:
        main(temporary)
