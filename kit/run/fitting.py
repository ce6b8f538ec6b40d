"""
Whether a run fits the memory of its device: what a step takes by plan (kit/run/memory.py), what to do where that is too
much, and the largest micro-batch that fits (batch_size = 0).
"""

import math
from dataclasses import replace

import torch

from kit.base import devices, errors, ranks
from kit.run import memory

OF_FREE = 0.94      # of the memory that is free: the rest is for what lies between tensors, and for errors of the plan
CPU_TOKENS = 2**13  # in a micro-step of a CPU at most: its caches hold less, and larger ones gain nothing


def setup(s, tokens, micro_steps, device, dtype):
    """The memory.Setup of a run with the settings s, not yet compiled. tokens: of a micro-step of this process."""
    return memory.Setup(
        tokens=tokens, dtype=dtype, device=device.type, optimizer=s['optimizer'],
        is_averaged=bool(s['ema_decay'] or s['swa_start']), micro_steps=micro_steps, world_size=ranks.world_size,
        parallel='fsdp' if ranks.is_fsdp else 'ddp', checkpointing=s['activation_checkpointing'],
        offload=s['cpu_offload'])


def in_words(n):
    """A number of bytes."""
    unit, size = next((unit, size) for unit, size in (('GiB', 2**30), ('MiB', 2**20), ('KiB', 0)) if n >= size)
    return f'{n / (size or 2**10):.{1 if size == 2**30 else 0}f} {unit}'


def explain(rows, what, how, device):
    """
    Have an error for want of memory say what a step takes by plan, what there is, and which settings would fit.
    rows: of a step, over all processes.
    """
    takes, has = memory.total(what, how), devices.free_memory(device)
    words = f'a step takes about {in_words(takes)} by plan, {device} had {in_words(has)} free as the run began'
    if takes > OF_FREE * has:
        ways = alternatives(what, how, rows, OF_FREE * has)
        words += f'; what would fit: {"; or ".join(ways) or "a smaller model, or a device that has more"}'
    else:
        ways = [f'--batch_size={n} --gradient_accumulation_steps={rows // n}'
                for n in memory.divisors(rows // how.world_size) if n <= how.tokens / what.block_size / 2][:1]
        ways += [] if how.checkpointing else ['--activation_checkpointing']
        words += ('; so other programs have taken it, or it takes more than planned'
                  + (f'; what takes less: {"; or ".join(ways)}' if ways else ''))
    errors.where_memory_ends = words


def alternatives(what, how, rows, room):
    """
    Settings, as words of a command line, under which a step of so many rows, over all processes, takes at most room
    bytes: a smaller micro-batch, activation checkpointing, FSDP on more GPUs, the first number of them that does.
    """
    now, ways = how.tokens // what.block_size, []
    options = [''] if how.checkpointing else ['', '--activation_checkpointing']
    numbers = [n for n in (2, 4, 8, 16, 32, 64) if n > how.world_size - (not how.is_fsdp) and rows % n == 0]
    for n_devices in [how.world_size, *(numbers if how.device == 'cuda' else [])]:
        found = []
        for option in options:
            other = replace(how, checkpointing=how.checkpointing or bool(option))
            words = [option]
            if n_devices in numbers:
                other = replace(other, parallel='fsdp', world_size=n_devices)
                words = ['--parallel=fsdp', option, f'on {n_devices} GPUs']
            n, here = memory.most_rows(what, other, rows // n_devices, room, most=now), rows // n_devices
            if n and n < min(now, here):
                words = [f'--batch_size={n} --gradient_accumulation_steps={rows // n}', *words]
            if n and any(words):
                found.append(' '.join(filter(None, words)))
        ways += found
        if found and n_devices in numbers:
            break
    return ways


def show(s, model, micro_steps, seconds, device, dtype):
    """
    For --dry_run: the memory of a step by its parts and what the device has, its time, and both under other settings.
    seconds: of a step, as measured.
    """
    what = memory.sizes(model)
    rows = -(-s['batch_size'] * s['gradient_accumulation_steps'] // ranks.world_size // micro_steps)
    how = replace(setup(s, rows * s['block_size'], micro_steps, device, dtype), compiled=s['compile'])
    parts, free = memory.of_step(what, how), devices.free_memory(device)
    takes = sum(parts.values())
    print(f'memory of a step, by plan: {in_words(takes)} at its peak: '
          + ', '.join(f'{name} {in_words(n)}' for name, n in parts.items() if n >= takes / 200)
          + f'; {device} has {in_words(free)} free of {in_words(devices.total_memory(device))}')
    print(f'time of a step: about {1000 * seconds:.0f}ms, by the passes above, without the optimizer'
          + (' and the exchange between processes' if how.world_size > 1 else ''))
    others = {}
    if not how.checkpointing:
        others['--activation_checkpointing'] = replace(how, checkpointing=True)
    if how.world_size > 1 and not how.is_fsdp:
        others[f'--parallel=fsdp on these {how.world_size} processes'] = replace(how, parallel='fsdp')
        if not how.checkpointing:
            others['both'] = replace(how, parallel='fsdp', checkpointing=True)
    for words, other in others.items():
        longer = memory.flops(what, other) / memory.flops(what, how)
        print(f'with {words}: {in_words(memory.total(what, other))}, about {1000 * seconds * longer:.0f}ms')


def find(s, model, raw_model, optimizer, batch, device, dtype):
    """
    Find the most rows of a micro-step that fit the memory, of those by which the rows of a step can be divided, and put
    them into the settings s, with as many micro-steps as keep the rows of a step, and as many batches of an evaluation
    as have its rows, or some more. Begins with what fits by plan, on a CPU at most CPU_TOKENS tokens, and takes fewer
    as long as a pass finds no memory; of several processes all take what fits on each.

    batch: (x, y, documents), as the settings have them now. Returns (batch_size, eval_iters, micro-steps of a
    process). Raises torch's error where there is no memory for a single row.
    """
    rows, before = s['batch_size'] * s['gradient_accumulation_steps'], s['batch_size']
    here = rows // ranks.world_size
    what, how = memory.sizes(raw_model), setup(s, 0, 1, device, dtype)
    most = here if device.type == 'cuda' else max(1, CPU_TOKENS // s['block_size'])
    n = memory.most_rows(what, how, here, OF_FREE * devices.free_memory(device), most) or 1
    n = -ranks.highest(-n)
    why, moments = 'by plan', [tensor for state in optimizer.state.values() for tensor in state.values()]
    beside = memory.optimizer_bytes(what, replace(how, is_averaged=False))  # an average is there already
    beside = max(0, beside - sum(tensor.nbytes for tensor in moments if torch.is_tensor(tensor)))
    while not how.is_fsdp:  # else a process that finds no memory would leave the others waiting
        shortage = shortage_of(n, here // n, beside, s, model, raw_model, batch, device, dtype)
        if not ranks.highest(int(shortage is not None)):
            why = 'and a pass of so many has found its memory'
            break
        if n == 1:
            explain(rows, what, replace(how, tokens=s['block_size'], micro_steps=here), device)
            raise shortage or RuntimeError('another process tried to allocate memory for one row, and found none')
        print(f'batch_size: {n} rows find no memory')
        n = next(d for d in memory.divisors(here) if d < n)
    ranks.exchange_gradients(model, True)  # the passes here did without
    s['batch_size'], s['gradient_accumulation_steps'] = n, rows // n
    s['eval_iters'] = math.ceil(s['eval_iters'] * before / n)
    print(f'batch_size: {n}, gradient_accumulation_steps: {rows // n}, eval_iters: {s["eval_iters"]} (batch_size = 0: '
          f'a step keeps its {rows} rows; {why})')
    return n, s['eval_iters'], here // n


def shortage_of(n, micro_steps, beside, s, model, raw_model, batch, device, dtype):
    """
    The error for want of memory that a step over micro-steps of n rows makes, forward and backward, or None; nothing is
    changed. beside: bytes of what a step will have and is not there yet, the optimizer's moments.
    """
    buffers, found = [buffer.clone() for buffer in raw_model.buffers()], None
    try:
        add_gradients(n, micro_steps, beside, s['block_size'], model, batch, device, dtype)
    except RuntimeError as error:
        if not errors.is_out_of_memory(error):
            raise
        found = error.with_traceback(None)  # whose frames hold all that was there
    model.zero_grad(set_to_none=True)
    for buffer, before in zip(raw_model.buffers(), buffers):
        buffer.copy_(before)
    if device.type == 'cuda':
        torch.cuda.empty_cache()
    return found


def add_gradients(n, micro_steps, beside, block_size, model, batch, device, dtype):
    """The first micro-steps of a step, two at most: those behind find the same memory as the second."""
    ballast = torch.empty(beside if device.type == 'cuda' else 0, dtype=torch.uint8, device=device)
    rows = [tiled(tensor, n, block_size) for tensor in batch]
    for _ in range(min(2, micro_steps)):
        ranks.exchange_gradients(model, False)  # another process may have found no memory, and never come
        with devices.autocast(device, dtype):
            _, loss = model(*rows, loss_alone=True)
        loss.backward()
    devices.synchronize(device)
    del ballast  # until here it takes its place


def tiled(tensor, n, length):
    """(B, T) -> (n, length), the same over and over; None stays None."""
    if tensor is None:
        return None
    down, across = math.ceil(n / tensor.size(0)), math.ceil(length / tensor.size(1))
    return tensor.repeat(down, across)[:n, :length]
