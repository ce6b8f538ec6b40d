"""
Which device, number format and compiler a run takes. Chosen by fixed rules; each choice is printed with its reason.
"""

import importlib.util
import re
import time
from contextlib import nullcontext, suppress
from functools import cache

import numpy as np
import psutil
import torch

from kit.base.errors import fail

# dense bfloat16 (float16 before Ampere) peak in FLOP/s, from the makers' data sheets; the first name found counts
PEAK_FLOPS = {
    'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'GH200': 989e12,
    'A100': 312e12, 'A10G': 70e12, 'A10': 125e12, 'A6000': 155e12, 'L40S': 362e12, 'L4': 121e12,
    'RTX 5090': 209e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12, 'V100': 125e12, 'T4': 65e12,
}

# compiling costs half a minute to a minute; below this much arithmetic a run is over before that pays
COMPILE_FROM_FLOPS = 1e16


def choose_device(name, local_rank=0, world_size=1):
    """'auto' or a name as torch knows it ('cpu', 'cuda', 'cuda:1', 'mps') -> torch.device."""
    if name == 'auto':
        has_mps = torch.backends.mps.is_available() and world_size == 1  # gloo knows no mps
        name = 'cuda' if torch.cuda.is_available() else 'mps' if has_mps else 'cpu'
        reason = {'cuda': 'a CUDA GPU is here', 'mps': 'an Apple GPU is here', 'cpu': 'no GPU was found'}[name]
    else:
        reason = 'as asked'
    try:
        device = torch.device(name)
    except RuntimeError:
        fail(f'device = {name!r}: torch knows no such device; try auto, cpu, cuda, cuda:1 or mps')
    count = {'cpu': 1, 'mps': int(torch.backends.mps.is_available()), 'cuda': torch.cuda.device_count()}
    if device.type not in count:
        fail(f'device = {name!r}: flatGPT runs on cpu, cuda and mps')
    if world_size > 1 and (device.type == 'mps' or device.index is not None):
        fail(f'device = {name!r}: of several processes each takes a GPU of its own, or all the CPU: auto, cuda, cpu')
    if device.type == 'cuda' and device.index is None:
        device = torch.device('cuda', local_rank if world_size > 1 else 0)
    if (device.index or 0) >= count[device.type]:
        here = ', '.join(f'{n} {kind}' for kind, n in count.items() if n)
        fail(f'device = {name!r}: it is not on this machine (here: {here}); --device=auto takes what there is')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 where a product is in float32, as in nanoGPT
        reason += f', {torch.cuda.get_device_name(device)}'
    elif device.type == 'cpu':
        reason += f', {torch.get_num_threads()} threads'
    print(f'device: {device} ({reason})')
    return device


def choose_dtype(name, device):
    """'auto' or float32, bfloat16, float16 -> the name of the format in which the matrix products run."""
    reason = 'as asked'
    if name == 'auto':
        if device.type != 'cuda':
            name, reason = 'float32', f'the safe choice on {device.type}'
        elif torch.cuda.get_device_capability(device) >= (8, 0):
            name, reason = 'bfloat16', 'this GPU computes in it, and it needs no loss scaling'
        else:
            name, reason = 'float16', 'this GPU is too old for bfloat16; the loss is scaled'
    print(f'dtype: {name} ({reason})')
    return name


def choose_compile(wanted, device, flops):
    """wanted: True, False, or None = decide. flops: the arithmetic of the whole run. -> whether to torch.compile."""
    if wanted is not None:
        chosen, reason = wanted, 'as asked'
    elif device.type != 'cuda':
        chosen, reason = False, f'pays on {device.type} in long runs only; --compile turns it on'
    elif torch.cuda.get_device_capability(device) < (7, 0) or importlib.util.find_spec('triton') is None:
        chosen, reason = False, 'it takes triton and a GPU of compute capability 7.0'
    elif flops < COMPILE_FROM_FLOPS:
        chosen, reason = False, f'a run of {flops:.1e} FLOPs is over too soon; --compile turns it on'
    else:
        chosen, reason = True, f'a run of {flops:.1e} FLOPs; takes about a minute, --compile=False turns it off'
    print(f'compile: {chosen} ({reason})')
    return chosen


def autocast(device, dtype):
    """The context in which matrix products run in dtype (a name); nothing changes for float32."""
    return nullcontext() if dtype == 'float32' else torch.autocast(device.type, getattr(torch, dtype))


def send(array, device):
    """
    A NumPy array of ids -> an int64 tensor on the device; to a GPU from pinned memory, without waiting for it. None
    stays None.
    """
    if array is None:
        return None
    tensor = torch.from_numpy(array.astype(np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else tensor.to(device)


def synchronize(device):
    """Wait until the device has done all its work, so that the clock can be read."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


@cache
def peak_flops(device, dtype):
    """The FLOP/s that this device could reach at best, for MFU. A device with no data sheet here is measured, once."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAK_FLOPS.items():
            if re.search(rf'\b{known}\b', name):
                if dtype != 'float32':
                    return peak
                if torch.cuda.get_device_capability(device) >= (8, 0):
                    return peak / 2  # TF32 runs at half the rate; older ones have none
    n = 4096 if device.type == 'cuda' else 1024 if dtype != 'float16' else 128  # a CPU is a hundred times slower in it
    own = torch.Generator(device)  # the states of the others go into checkpoints, and a look changes nothing
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype), generator=own)
    seconds = []
    for _ in range(4):  # the best of them: the first warms up, and other work on the machine only ever takes away
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    peak = 2 * n**3 / min(seconds)
    print(f'mfu: in units of {peak / 1e9:,.0f} GFLOP/s, measured on a {n} x {n} {dtype} matrix product')
    return peak


def usage(device):
    """Memory in GiB, and how busy the machine is, under the names of metrics.jsonl."""
    this = psutil.Process()
    figures = {'system/cpu_memory_gib': this.memory_info().rss / 2**30,
               'system/cpu_free_gib': psutil.virtual_memory().available / 2**30,
               'system/cpu_percent': psutil.cpu_percent()}  # of all cores, since the last call
    if device.type == 'cuda':
        free, total = torch.cuda.mem_get_info(device)
        figures |= {'system/gpu_memory_gib': torch.cuda.memory_allocated(device) / 2**30,
                    'system/gpu_peak_gib': torch.cuda.max_memory_allocated(device) / 2**30,
                    'system/gpu_used_gib': (total - free) / 2**30}  # by all processes
        with suppress(ModuleNotFoundError, RuntimeError):  # it takes nvidia-ml-py
            figures['system/gpu_percent'] = torch.cuda.utilization(device)
    return figures
