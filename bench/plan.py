"""
What fits, and how long a step takes: GPT-2's sizes on 1 to 64 GPUs, by the plan in kit/run/memory.py.

$ python bench/plan.py                                              H100s with 80 GB, 12 rows of 1,024 tokens on each
$ python bench/plan.py --gpu=A100 --gpu_gib=39.5 --rows=4 --bandwidth=25      40 GB, with 200 Gbit/s between them
$ python bench/plan.py --measure                                    the memory of real steps here beside the plan
"""

import gc
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch.profiler import ProfilerActivity, profile

from kit.base import devices, overrides
from kit.base.errors import fail
from kit.learn import building, optimizers
from kit.run import fitting, memory, presets
from model import GPT, GPTConfig

gpu = 'H100'            # not empty: a GPU of kit/base/devices.py's PEAK_FLOPS
gpu_gib = 79.2          # > 0: its memory, as torch.cuda.get_device_properties has it
bandwidth = 300.0       # > 0: GB/s into and out of each GPU at once: NVLink 4 gives about 300, 200 Gbit/s 25
mfu = 0.4               # 0 < x < 1.01: share of its peak FLOP/s that a run reaches
rows = 12               # >= 1: of a micro-step, on each GPU
micro_steps = 1         # >= 1: of a step, on each GPU
block_size = 1024       # >= 1: tokens of a row
architecture = 'gpt2'   # as train.py takes it
optimizer = 'adamw'     # as train.py takes it
dtype = 'bfloat16'      # float32, bfloat16 or float16
compiled = False        # whether by torch.compile
measure = False         # train two steps of some sizes, on the GPU that is here or the CPU, and compare
device = 'auto'         # auto, cpu or cuda: of --measure
config = overrides.apply(globals())

SIZES = {'124M': (12, 12, 768), '350M': (24, 16, 1024), '774M': (36, 20, 1280), '1.5B': (48, 25, 1600)}
ON_A_GPU = [('124M', 12, False), ('124M', 12, True), ('350M', 6, False), ('350M', 6, True), ('774M', 3, False),
            ('774M', 3, True), ('1.5B', 2, True)]  # size, rows, with checkpointing
SMALL = {'4 x 256': (4, 4, 256), '2 x 384': (2, 6, 384)}
ON_A_CPU = [('4 x 256', 1, False), ('4 x 256', 8, False), ('4 x 256', 8, True), ('2 x 384', 4, False)]


def model_config(sizes, vocab_size=50304, length=block_size):
    n_layer, n_head, n_embd = sizes
    return GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=length, vocab_size=vocab_size,
                     bias=False, **presets.parse(architecture, GPTConfig))


def table():
    """Print what each size takes on each number of GPUs."""
    peak = devices.listed_peak(gpu)
    if peak is None:
        fail(f'gpu = {gpu!r}: its peak is not known{overrides.nearest(gpu, devices.PEAK_FLOPS)}; PEAK_FLOPS in '
             f'kit/base/devices.py has {", ".join(devices.PEAK_FLOPS)}')
    if dtype == 'float32':
        peak /= 2  # TF32
    print(f'{gpu} with {gpu_gib:g} GiB, {peak / 1e12:.0f} TFLOP/s at {mfu:.0%}, {bandwidth:g} GB/s; a step has {rows} '
          f'rows x {micro_steps} micro-steps x {block_size} tokens a GPU; {architecture}, {optimizer}, {dtype}, '
          f'{"compiled" if compiled else "not compiled"}\nGiB a GPU and ms a step, ! = it does not fit; tokens/s of '
          'the fastest that fits; ckpt = fsdp (on one GPU alone) with activation checkpointing\n')
    print('| size | GPUs | tokens a step | ddp GiB | fsdp GiB | ckpt GiB | ddp ms | fsdp ms | ckpt ms | tokens/s |\n'
          f'|{"---|" * 10}')
    for name, sizes in SIZES.items():
        with torch.device('meta'):
            what = memory.sizes(GPT(model_config(sizes)))
        for n in 1, 2, 4, 8, 16, 32, 64:
            ddp = memory.Setup(rows * block_size, dtype, 'cuda', optimizer, micro_steps=micro_steps, world_size=n,
                               compiled=compiled)
            fsdp = replace(ddp, parallel='fsdp')
            hows = [ddp, fsdp if n > 1 else None, replace(fsdp, checkpointing=True)]
            takes = [how and memory.total(what, how) / 2**30 for how in hows]
            times = [how and sum(memory.seconds(what, how, peak, mfu, bandwidth * 1e9)) for how in hows]
            best = min((t for t, g in zip(times, takes) if t and g <= fitting.OF_FREE * gpu_gib), default=math.inf)
            tokens = n * micro_steps * rows * block_size
            memories = [f'{g:.1f}{"" if g <= fitting.OF_FREE * gpu_gib else "!"}' if g else '-' for g in takes]
            speeds = [f'{1000 * t:.0f}' if t else '-' for t in times]
            print(f'| {name} | {n} | {tokens:,} | {" | ".join(memories + speeds)} | '
                  f'{f"{tokens / best:,.0f}" if best < math.inf else "-"} |')


def measured(here, cfg, n_rows, is_made_again, is_compiled):
    """(bytes at the peak of a step, its seconds) of a model that is trained for some steps here."""
    model = building.build(GPT, cfg, 'ddp', is_made_again, False, here, dtype)
    by = optimizers.make(optimizer, model, 0.1, 1e-4, (0.9, 0.95), dtype)
    if is_compiled:
        model.compile()
    x = torch.randint(cfg.vocab_size, (n_rows, cfg.block_size), device=here)

    def step():
        by.zero_grad(set_to_none=True)
        with devices.autocast(here, dtype):
            _, loss = model(x, x, loss_alone=True)
        loss.backward()
        by.step()
        devices.synchronize(here)

    step()  # makes the moments
    by.zero_grad(set_to_none=True)
    start = time.perf_counter()
    if here.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(here)
        step()
        return torch.cuda.max_memory_allocated(here), time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    seconds, now, peak = time.perf_counter() - start, 0, 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == '[memory]']
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    state = [value for values in by.state.values() for value in values.values()]
    return peak + sum(tensor.nbytes for tensor in [*model.parameters(), *state]), seconds


def compare():
    """Print planned and measured memory side by side. Returns the largest error, as a share."""
    here = devices.choose_device(device)
    is_gpu = here.type == 'cuda'
    if not is_gpu:
        print("no GPU: small models, whose tensors torch's profiler counts; neither the sizes of GPT-2, nor what "
              'cuBLAS and compiled code take, can be measured here, nor the exchange between processes')
    print('| size | rows | checkpointing | planned GiB | measured GiB | off | ms |\n|---|---|---|---|---|---|---|')
    worst = 0.0
    for name, n_rows, is_made_again in ON_A_GPU if is_gpu else ON_A_CPU:
        cfg = model_config(SIZES[name]) if is_gpu else model_config(SMALL[name], vocab_size=512, length=128)
        with torch.device('meta'):
            what = memory.sizes(GPT(cfg))
        how = memory.Setup(n_rows * cfg.block_size, dtype, here.type, optimizer, checkpointing=is_made_again,
                           compiled=compiled and is_gpu)
        parts = memory.of_step(what, how)
        planned = sum(parts.values()) - parts.get('checkpoint copy', 0)
        if planned > fitting.OF_FREE * devices.free_memory(here):
            print(f'| {name} | {n_rows} | {is_made_again} | {planned / 2**30:.3f} | it does not fit here | | |')
            continue
        found, seconds = measured(here, cfg, n_rows, is_made_again, how.compiled)
        off = planned / found - 1
        worst = max(worst, abs(off))
        print(f'| {name} | {n_rows} | {is_made_again} | {planned / 2**30:.3f} | {found / 2**30:.3f} | {off:+.1%} | '
              f'{1000 * seconds:.0f} |')
        if is_gpu:
            gc.collect()  # a block and its checkpointed forward hold each other
            torch.cuda.empty_cache()
    return worst


if measure:
    worst = compare()
    print(f'the largest error: {worst:.1%}')
    raise SystemExit(worst > 0.15)
table()
