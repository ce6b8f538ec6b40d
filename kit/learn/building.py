"""A new model, whole or in parts, with the first numbers of its parameters, and how its memory is saved."""

import copy
import math
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from kit.base import devices, ranks
from kit.base.errors import fail


def build(GPT, config, parallel, activation_checkpointing, cpu_offload, device, dtype):
    """
    GPT(config) on the device, with the same first numbers however it is held: on each process all of it, or with FSDP a
    part. parallel: see ranks.choose_parallel; dtype: of the run.
    """
    with torch.device('meta'):
        plain = GPT(config)  # shapes alone
    n_bytes = sum(p.numel() * p.element_size() for p in plain.parameters())
    ranks.choose_parallel(parallel, 4 * n_bytes, devices.total_memory(device), device)  # weight, gradient, two moments
    if cpu_offload and not (ranks.is_fsdp and device.type == 'cuda'):
        fail('cpu_offload = True: it takes parts of a model from GPUs to their host; --parallel=fsdp on several, or '
             'leave it out')
    if cpu_offload and dtype == 'float16':
        fail('cpu_offload = True: torch looks for overflows of float16 on the GPU alone; --dtype=bfloat16 or float32')
    if ranks.is_fsdp:
        model = copy.deepcopy(plain)
        ranks.shard(model, model.blocks(), device, dtype, cpu_offload)
        fill(model, plain)
    else:
        model = GPT(config).to(device)
    if activation_checkpointing:
        for block in model.blocks():
            block.forward = partial(recomputed, block.forward)
    return model


@torch.no_grad()
def fill(model, plain):
    """
    Give the parameters of a model in parts the numbers with which GPT(config) begins, by the same draws: those of
    reset_parameters, which torch's modules call when they are made, then the model's own. plain: the model on the meta
    device; one module of it, then one parameter, is all that lies in memory as a whole.
    """
    parts, filled = dict(model.named_parameters(remove_duplicate=False)), set()
    if buffers := [name for name, _ in plain.named_buffers()]:
        fail(f"parallel = 'fsdp': the buffer {buffers[0]} would be without its numbers; --parallel=ddp")
    for path, module in plain.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if own and hasattr(module, 'reset_parameters'):
            module = copy.deepcopy(module).to_empty(device='cpu', recurse=False)
            module.reset_parameters()
            for name in own:
                part = parts[f'{path}.{name}' if path else name]
                take(part, getattr(module, name))
                filled.add(part)
    for name, p in plain.named_parameters():
        numbers = torch.full(p.shape, math.nan, dtype=p.dtype)
        plain.initialize(name, numbers)
        if not numbers.isnan().all():
            take(parts[name], numbers)
        elif parts[name] not in filled:
            fail(f"parallel = 'fsdp': nothing says how {name} begins; give its module a method reset_parameters, as "
                 "torch's have, or --parallel=ddp")


def take(part, numbers):
    ranks.local(part).copy_(ranks.local(ranks.like(numbers, part)))


def recomputed(forward, *args):
    """
    Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): of a block its input alone is kept, and the backward
    pass makes the rest again, with the same dropout.
    """
    return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)
