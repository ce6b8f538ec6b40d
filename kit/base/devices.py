"""
Which device, number format and compiler a run takes. Chosen by fixed rules; each choice is printed with its reason.
"""

import ctypes
import gc
import importlib.util
import os
import re
import shutil
import sys
import textwrap
import time
import warnings
from collections import deque
from contextlib import nullcontext, suppress
from functools import cache

import numpy as np
import psutil
import torch

from kit.base import overrides, ranks
from kit.base.errors import fail

# dense bfloat16 (float16 before Ampere) peak in FLOP/s, from the makers' data sheets; the first name found counts, so
# what is longer stands before what it begins with. GeForce: with sums in float32, as torch takes them
PEAK_FLOPS = {
    'GB300': 2500e12, 'B300': 2250e12, 'GB200': 2500e12, 'B200': 2250e12,
    'GH200': 989e12, 'H200 NVL': 835e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12,
    'H800 PCIe': 756e12, 'H800': 989e12, 'H20': 148e12,
    'A100': 312e12, 'A800': 312e12, 'A30': 165e12, 'A40': 149.7e12, 'A10G': 70e12, 'A10': 125e12, 'RTX A6000': 155e12,
    'L40S': 362e12, 'L40': 181e12, 'L20': 119.5e12, 'L4': 121e12, 'RTX 6000 Ada': 364e12,
    'RTX PRO 6000 Blackwell Workstation': 503.8e12,
    'RTX 5090': 209e12, 'RTX 5080': 112.6e12, 'RTX 4090': 165e12, 'RTX 4080': 97.5e12,
    'RTX 3090 Ti': 80e12, 'RTX 3090': 71e12, 'RTX 3080': 59.5e12,
    'V100-PCIE': 112e12, 'V100': 125e12, 'T4': 65e12,
}

# what has the name of a card and not its speed: a slice of it (MIG, or a vGPU such as A10-4Q), its version for laptops
LESS_THAN_THE_CARD = re.compile(r'\b(MIG|Laptop|Max-Q)\b|-\d+[ABCQ](ME)?\b')
ANOTHER_CARD = r'(?! (Ti|SUPER|D|NVL)\b)'  # behind its name

# compiling takes 15 to 40 seconds, and saves between nothing and a third: a run must be long for a try to cost little
COMPILE_FROM_SECONDS = 300

# the host takes about 1 to 2 ms to launch the kernels of a small model; a fast GPU does this much arithmetic in less,
# and waits, unless a CUDA graph launches them at once. An estimate: not measured on any GPU yet
CUDA_GRAPHS_BELOW_FLOPS = 1e11

# on a CPU that computes in bfloat16 a step of two layers of 128 channels with 12 rows of 64 tokens took 14.7 ms in it,
# in float32 18.7, one of six of 384 with 8 of 256 took 338 and 856 (Zen 5); smaller ones were not measured
BFLOAT16_FROM_CHANNELS, BFLOAT16_FROM_TOKENS = 128, 512
# what a CPU needs for products in a format, by the names of torch.cpu.get_capabilities
CPU_FEATURES = {'bfloat16': ('avx512_bf16', 'amx_bf16'), 'float16': ('avx512_fp16', 'amx_fp16')}

NO_GPU = 'no GPU was found'
BUILDS = 'pytorch.org/get-started/locally'


def choose_device(name, local_rank=0, world_size=1):
    """
    'auto' or a name as torch knows it ('cpu', 'cuda', 'cuda:1', 'mps') -> torch.device. A GPU that is here and cannot
    be used: 'auto' says why and takes the CPU, a name of CUDA's ends the script.
    """
    index = local_rank if world_size > 1 else 0
    fault, reason = '', 'as asked'
    is_auto = name == 'auto'
    if is_auto:
        fault = cuda_fault(index)
        has_mps = torch.backends.mps.is_available() and world_size == 1  # gloo knows no mps
        name = 'cuda' if not fault else 'mps' if has_mps else 'cpu'
        reason = {'cuda': 'a CUDA GPU is here', 'mps': 'an Apple GPU is here', 'cpu': NO_GPU}[name]
        if fault and fault != NO_GPU:
            reason = f'the GPU is not used: {fault}'
            if world_size > 1:
                fail(f"device = 'auto': {reason}; of several processes the others may have theirs: --device=cpu is the "
                     'CPU for all')
    try:
        device = torch.device(name)
    except RuntimeError:
        fail(f'device = {name!r}: torch knows no such device; try auto, cpu, cuda, cuda:1 or mps')
    if device.type not in ('cpu', 'mps', 'cuda'):
        fail(f'device = {name!r}: flatGPT runs on cpu, cuda and mps')
    if world_size > 1 and (device.type == 'mps' or device.index is not None):
        fail(f'device = {name!r}: of several processes each takes a GPU of its own, or all the CPU: auto, cuda, cpu')
    if device.type == 'cuda' and device.index is None:
        device = torch.device('cuda', index)
    if device.type == 'cuda' and not is_auto:
        fault = cuda_fault(device.index)
        if fault and fault != NO_GPU:
            fail(f'device = {name!r}: {fault}')
    # torch counts the cards that the driver shows, whether CUDA can use them or not
    count = {'cpu': 1, 'mps': int(torch.backends.mps.is_available()),
             'cuda': 0 if fault == NO_GPU else torch.cuda.device_count()}
    n_here = ranks.variable('LOCAL_WORLD_SIZE', 1)
    if device.type == 'cuda' and world_size > 1 and 0 < count['cuda'] < n_here:
        fail(f'device = {name!r}: {n_here} processes on this machine and {count["cuda"]} GPUs: each takes one of its '
             f'own; torchrun --nproc_per_node={count["cuda"]}, or --device=cpu')
    if not 0 <= (device.index or 0) < count[device.type]:  # torch makes -24 of cuda:1000
        here = ', '.join(f'{n} {kind}' for kind, n in count.items() if n)
        if device.type == 'cuda' and not torch.backends.cuda.is_built():
            here += f'; this torch, {torch.__version__}, is built without CUDA, {BUILDS} has others'
        fail(f'device = {name!r}: it is not on this machine (here: {here}); --device=auto takes what there is')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 where a product is in float32, as in nanoGPT
        reason += f', {torch.cuda.get_device_name(device)}'
    if device.type == 'cpu':
        keep_freed_memory()
    print(f'device: {device} ({reason})')
    return device


def keep_freed_memory():
    """
    Have the C library keep what tensors free, for those of the next step: glibc gives the end of its heap back to the
    system, and a step of a small model had 1,000 to 3,000 page faults for it, a tenth of its time and more. What the
    environment sets stays, and other libraries as they are. The numbers are those of glibc's malloc.h.
    """
    is_set = any(name.startswith('MALLOC_') or name == 'GLIBC_TUNABLES' for name in os.environ)
    if not sys.platform.startswith('linux') or is_set:
        return
    with suppress(AttributeError):  # musl has no such function
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: larger ones come and go; the most that mallopt(3) allows
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def set_threads(n):
    """Compute on the CPU with n threads; 0: with as many as torch takes by itself. A checkpoint may name too many."""
    most = ranks.cores()
    if n > most and 'threads' in overrides.given:
        fail(f'threads = {n}: this process may use {most} cores; --threads=0 takes them all, or one if that is faster')
    if n > most:
        print(f'threads: {most}, since here are no more cores; the run had {n}, so from here on sums are rounded in '
              'another order')
    if n:
        torch.set_num_threads(min(n, most))


def cuda_fault(index):
    """
    Why this torch cannot compute on the GPU of this number, with the remedy; '' where it can, and where there are GPUs
    and none of this number. NO_GPU where there is none, or torch is built without CUDA.
    """
    if not torch.backends.cuda.is_built():
        return NO_GPU
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch warns of the same, in many lines
        try:
            torch.cuda.init()  # it raises what is_available() keeps to itself
            if index >= torch.cuda.device_count():
                return ''
            torch.cuda.set_device(index)  # a card can be broken, or another process can have it for itself
            major, minor = torch.cuda.get_device_capability(index)
        except Exception as error:
            return cuda_error((str(error).splitlines() or [type(error).__name__])[0])
    archs = torch.cuda.get_arch_list()
    if not has_kernels(major, minor, archs):
        return (f'{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and this torch has '
                f'kernels for {" ".join(archs)} alone; another build of torch ({BUILDS})')
    return ''


def cuda_error(words):
    """What torch says (c10/cuda/CUDAFunctions.cpp) where CUDA does not come up, as cuda_fault gives it."""
    if re.search('no NVIDIA driver|No .*GPUs are available', words):
        return NO_GPU
    if found := re.search(r'driver .*too old \(found version (\d+)', words):
        version = int(found[1])  # 12040 is CUDA 12.4
        return (f'the driver is too old: it knows CUDA up to {version // 1000}.{version % 1000 // 10}, this torch is '
                f'built for {torch.version.cuda}; a newer driver (nvidia.com) or a torch for an older CUDA ({BUILDS})')
    return (f'CUDA does not work here ({textwrap.shorten(words, 300, placeholder=" ...")}); nvidia-smi shows whether '
            'driver and card are well')


def has_kernels(major, minor, archs):
    """
    Whether code for one of archs (as torch.cuda.get_arch_list gives them) runs on a GPU of this compute capability:
    that for sm_XY from X.Y to the end of X, for sm_XYf too, for sm_XYa on X.Y alone; compute_XY is compiled by the
    driver, for X.Y and all that is newer (NVIDIA: CUDA C++ Programming Guide, Compute Capabilities). Where no name is
    of this form, as on ROCm, there is nothing to judge by.
    """
    known = [found.groups() for arch in archs if (found := re.fullmatch(r'(sm|compute)_(\d+)(\d)([af]?)', arch))]
    for kind, x, y, suffix in known:
        code = int(x), int(y)
        if suffix == 'a':
            runs = code == (major, minor)
        elif kind == 'compute' and not suffix:
            runs = code <= (major, minor)
        else:
            runs = code[0] == major and code[1] <= minor
        if runs:
            return True
    return not known


def who_chose(name):
    """Why a setting is not auto."""
    return 'as asked' if name in overrides.given else 'as the run began'


def choose_dtype(name, device, measures=False, n_embd=0, n_tokens=0, is_kept=False):
    """
    'auto' or float32, bfloat16, float16 -> the name of the format in which the matrix products run. measures: losses
    are all that is computed. n_embd, n_tokens: the channels of a model that is trained, and the tokens of a micro-step.
    is_kept: where the command line says nothing the name is a checkpoint's.
    """
    best, why = best_dtype(device, n_embd, n_tokens)
    if measures and device.type == 'cpu':
        name, reason = measuring_dtype(name, device), 'in which all is measured on a CPU'
    elif name == 'auto':
        name, reason = best, why
    else:
        is_kept = is_kept and 'dtype' not in overrides.given
        reason = 'as the run began' if is_kept else 'as asked'
        if not computes_in(name, device):
            chip = 'CPU' if device.type == 'cpu' else 'GPU'
            reason += f'; this {chip} does not compute in it, which takes many times as long; --dtype={best}'
        elif is_kept and name != best:
            reason += f'; auto would be {best}: {why}'
    if name == 'float32' and device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0):
        reason += '; matrix products run in TF32, which keeps 10 bits of the 23 behind the point'
    print(f'dtype: {name} ({reason})')
    ranks.agree('settings', {'dtype': name})
    return name


def best_dtype(device, n_embd, n_tokens):
    """What auto is, and why, see choose_dtype; a CPU is not asked for more than float32 where nothing is trained."""
    if device.type == 'cuda' and computes_in('bfloat16', device):
        return 'bfloat16', 'this GPU computes in it, and it needs no loss scaling'
    if device.type == 'cuda':
        return 'float16', 'this GPU is too old for bfloat16; the loss is scaled'
    if device.type != 'cpu' or not n_tokens:
        return 'float32', f'the safe choice on {device.type}'
    if not cpu_has('bfloat16'):
        return 'float32', 'this CPU has neither AVX512_BF16 nor AMX, with which bfloat16 is faster'
    if n_embd < BFLOAT16_FROM_CHANNELS or n_tokens < BFLOAT16_FROM_TOKENS:
        return 'float32', (f'this CPU computes in bfloat16 too, which pays from {BFLOAT16_FROM_CHANNELS} channels and '
                           f'{BFLOAT16_FROM_TOKENS} tokens in a micro-step on')
    return 'bfloat16', 'this CPU computes in it; losses are measured in float32'


def measuring_dtype(name, device):
    """In what a model that runs in this format is measured: on a CPU in float32, for the same number on any of them."""
    return 'float32' if device.type == 'cpu' else name


def computes_in(name, device):
    """Whether a device has arithmetic for a format. Of Apple's GPUs and CPUs other than x86 nothing is known: True."""
    if device.type == 'cuda':
        return name != 'bfloat16' or torch.cuda.get_device_capability(device) >= (8, 0)
    is_x86 = torch.cpu.get_capabilities().get('architecture') == 'x86_64'
    return name == 'float32' or device.type != 'cpu' or not is_x86 or cpu_has(name)


def cpu_has(name):
    """Whether the CPU has instructions for products in bfloat16 or float16."""
    found = torch.cpu.get_capabilities()  # on other CPUs than x86 these are not among them
    return any(found.get(feature) for feature in CPU_FEATURES[name])


def choose_compile(wanted, device, seconds):
    """
    wanted: True, False, or None = decide. seconds: of the whole run, as it would be without. -> (whether to try
    torch.compile, why).
    """
    compiler = os.environ.get('CXX') or ('clang++' if sys.platform == 'darwin' else 'g++')  # as torch has it
    if device.type == 'cpu' and wanted is not False and not shutil.which(compiler) and sys.platform != 'win32':
        return False, f'on a CPU it takes a C++ compiler, and there is no {compiler}; CXX names another'
    if wanted is not None:
        return wanted, who_chose('compile')
    if device.type == 'mps':
        return False, 'on mps it has not been tried here; --compile turns it on'
    if device.type == 'cuda' and (
            torch.cuda.get_device_capability(device) < (7, 0) or importlib.util.find_spec('triton') is None):
        return False, 'it takes triton and a GPU of compute capability 7.0'
    if seconds < COMPILE_FROM_SECONDS:
        return False, f'a run of {seconds / 60:.1f} minutes is over too soon; --compile turns it on'
    return True, f'a run of {seconds / 60:.0f} minutes without; --compile=False turns it off'


def choose_compile_mode(name, device, flops, micro_steps=1):
    """
    'auto' or a mode as torch.compile knows it -> that mode. flops: the arithmetic of one micro-step, forward and
    backward; micro_steps: of this process in a step. To be called where the model is compiled.
    """
    reason = 'as asked'
    if name in ('reduce-overhead', 'max-autotune') and device.type == 'cuda' and micro_steps > 1:
        fail(f'compile_mode = {name!r}: its CUDA graphs lose gradients that add up over {micro_steps} micro-steps '
             '(pytorch/pytorch#169545); --gradient_accumulation_steps=1 with a larger --batch_size, or '
             '--compile_mode=default')
    if name == 'auto' and device.type != 'cuda':
        name, reason = 'default', 'CUDA graphs are for CUDA'
    elif name == 'auto' and (micro_steps > 1 or ranks.world_size > 1):
        name, reason = 'default', 'CUDA graphs are for steps of one micro-step, in one process'
    elif name == 'auto' and flops < CUDA_GRAPHS_BELOW_FLOPS:
        name, reason = 'reduce-overhead', f'CUDA graphs: the GPU would wait for the host to launch {flops:.1e} FLOPs'
    elif name == 'auto':
        name, reason = 'default', f'a micro-step of {flops:.1e} FLOPs keeps the GPU busy without CUDA graphs'
    print(f'compile_mode: {name} ({reason})')
    return name


def make_deterministic():
    """
    Sums on a GPU come out the same each time. Strictly: what can only warn leaves torch's memory-efficient attention as
    it is (aten/src/ATen/native/transformers/cuda/attention_backward.cu), and an operation that has no such form
    raises RuntimeError. To be called before the first matrix product on the device, when cuBLAS reads its variable.
    """
    workspace = os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    if workspace not in (':4096:8', ':16:8'):
        fail(f'the environment has CUBLAS_WORKSPACE_CONFIG={workspace}: the same sums each time take :4096:8 or :16:8; '
             'unset it')
    torch.use_deterministic_algorithms(True)
    print(f'deterministic: True (deterministic algorithms, CUBLAS_WORKSPACE_CONFIG={workspace}; slower on a GPU)')


def seed(device, number):
    """Seed torch's generators, as often as in each step: torch.manual_seed takes half a millisecond on a CPU alone."""
    if device.type == 'cpu':
        torch.default_generator.manual_seed(number)
    else:
        torch.manual_seed(number)


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


def row_multiple(device):
    """Of how many tokens padded rows are a multiple: the kernels and the memory of a GPU are made for few widths."""
    return 64 if device.type == 'cuda' else 1


def runs_ahead(device):
    """Whether the host only queues work there, and goes on before it is done."""
    return device.type == 'cuda'


def settle_garbage(device):
    """
    Where the host runs ahead, what the setup has left is looked through for garbage once and then no more: that takes a
    tenth of a second, in which the device would be given nothing to do.
    """
    if runs_ahead(device):
        gc.collect()
        gc.freeze()


def fetch(tensor):
    """
    Begin to copy a tensor to the host -> a function that waits for this copy alone, not for what the device was given
    after it, and returns the CPU tensor. Without a queue the copy is made at once; of a tensor on the CPU there is
    none, so what changes it in place changes what was fetched.
    """
    tensor = tensor.detach()
    if not runs_ahead(tensor.device):
        here = tensor.cpu()
        return lambda: here
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)  # into other memory a copy would wait
    here.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait():
        copied.synchronize()
        return here
    return wait


def fetched(tensors):
    """
    The tensors of an iterator as CPU tensors, in their order. Where the host runs ahead it waits for one once the
    device has the next to make, which is in vain if the iterator is left before its end.
    """
    waits = deque()
    for tensor in tensors:
        waits.append(fetch(tensor))
        if len(waits) > runs_ahead(tensor.device):
            yield waits.popleft()()
    for wait in waits:
        yield wait()


def synchronize(device):
    """Wait until the device has done all its work, so that the clock can be read."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()


def listed_peak(name):
    """The data sheet's FLOP/s of a GPU, by its name as the driver gives it; None where PEAK_FLOPS has no such card."""
    if LESS_THAN_THE_CARD.search(name):
        return None
    return next((peak for known, peak in PEAK_FLOPS.items() if re.search(rf'\b{known}\b{ANOTHER_CARD}', name)), None)


@cache
def peak_flops(device, dtype):
    """The FLOP/s that this device could reach at best, for MFU. A device with no data sheet here is measured, once."""
    if device.type == 'cuda':
        peak = listed_peak(torch.cuda.get_device_name(device))
        if peak and dtype != 'float32':
            return peak
        if peak and torch.cuda.get_device_capability(device) >= (8, 0):
            return peak / 2  # TF32 runs at half the rate; older ones have none
    n = 4096 if device.type == 'cuda' else 768 if computes_in(dtype, device) else 128
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


@cache
def total_memory(device):
    """
    Bytes that the device has, or this process of the machine where it has none of its own; of several processes the
    least that one has, since all decide by it alike. The first time they call it together.
    """
    if device.type == 'cuda':
        mine = torch.cuda.get_device_properties(device).total_memory
    else:
        mine = psutil.virtual_memory().total // ranks.variable('LOCAL_WORLD_SIZE', 1)
    return -ranks.highest(-mine)


def free_memory(device):
    """Bytes that this process can have of the device, those that torch keeps included; on a CPU, its share of them."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return psutil.virtual_memory().available // ranks.variable('LOCAL_WORLD_SIZE', 1)


def usage(device):
    """
    Memory in GiB, and how busy the machine is, under the names of metrics.jsonl. What cannot be had is left out: a log
    line ends no run, and a container, a slice of a GPU (MIG, vGPU) or a driver may refuse any of these.
    """
    gib = 2**30

    def used_by_all():
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / gib

    probes = {'system/cpu_memory_gib': lambda: psutil.Process().memory_info().rss / gib,
              'system/cpu_free_gib': lambda: psutil.virtual_memory().available / gib,
              'system/cpu_percent': psutil.cpu_percent}  # of all cores, since the last call
    if device.type == 'cuda':
        probes |= {'system/gpu_memory_gib': lambda: torch.cuda.memory_allocated(device) / gib,
                   'system/gpu_peak_gib': lambda: torch.cuda.max_memory_allocated(device) / gib,
                   'system/gpu_used_gib': used_by_all,
                   'system/gpu_percent': lambda: torch.cuda.utilization(device)}
    figures = {}
    for name, probe in probes.items():
        with suppress(Exception):
            figures[name] = probe()
    return figures
