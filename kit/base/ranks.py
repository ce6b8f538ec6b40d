"""
Several processes as one run: what torchrun started, wrapped and summed. The one module that knows torch.distributed.

$ torchrun --standalone --nproc_per_node=4 train.py

One process alone is rank 0 of 1, and nothing here imports torch.distributed for it.
"""

import os
import sys
import threading
from datetime import timedelta

from kit.base.errors import explained, fail


def variable(name, default):
    """A whole number that torchrun puts into the environment."""
    with explained(f'the environment has {name}={os.environ.get(name)}', f'start with torchrun, or unset {name}'):
        number = int(os.environ.get(name, default))
        if number < default:
            raise ValueError(f'a number from {default} on is expected')
    return number


rank, local_rank, world_size = variable('RANK', 0), variable('LOCAL_RANK', 0), variable('WORLD_SIZE', 1)
if rank >= world_size:
    fail(f'the environment has RANK={rank} and WORLD_SIZE={world_size}; start with torchrun, or unset RANK')
is_main = rank == 0

# how long the others wait for one of them before they are killed; torch's own 30 and 10 minutes are shorter than some
# of what they wait for. Where one dies, torchrun ends the others at once, whatever stands here
GLOO_TIMEOUT = timedelta(hours=12)  # rank 0's downloads and uploads
NCCL_TIMEOUT = timedelta(hours=2)   # rank 0's save, and the write before it, in the next sum over the gradients

between_hosts = None  # a group of gloo's, None = the default one


def cores():
    """How many cores of this machine are for this process."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, n // variable('LOCAL_WORLD_SIZE', 1))


def start(backend, device):
    """Join the other processes. backend: auto (nccl on CUDA, else gloo) or one that torch.distributed knows."""
    if world_size == 1:
        return
    import torch.distributed as dist
    if backend == 'auto':
        backend = 'nccl' if device.type == 'cuda' and dist.is_nccl_available() else 'gloo'
    if missing := [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]:
        fail(f'the environment has WORLD_SIZE={world_size} and no {missing[0]}; start several processes with torchrun, '
             'or unset WORLD_SIZE')
    with explained('the processes cannot meet', 'start them with torchrun'):
        # not in init_process_group, which would wait as long for one that never comes
        store, *_ = next(dist.rendezvous('env://'))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=NCCL_TIMEOUT if backend == 'nccl' else GLOO_TIMEOUT,
                                device_id=device if backend == 'nccl' else None)
    if backend == 'nccl':  # what the hosts say to each other must not wait for the devices
        global between_hosts
        between_hosts = dist.new_group(backend='gloo', timeout=GLOO_TIMEOUT)
    print(f'processes: {world_size} (torchrun), backend {backend}')


def wait():
    """All processes meet here, for as long as one of them takes."""
    if world_size > 1:
        import torch.distributed as dist
        dist.barrier(group=between_hosts)


def wrap(model, device):
    """The model with its gradients averaged over the processes (DDP). FSDP would belong here too."""
    if world_size == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None,
                                   gradient_as_bucket_view=True)  # one copy of the gradients less in memory


def share(n, name):
    """n things over all processes: how many are this one's. name: of the setting that counts them."""
    if n % world_size:
        fail(f'{name} = {n}: it counts over all processes and must be a multiple of their number, {world_size}')
    return n // world_size


def exchange_gradients(model, now):
    """Whether the next backward pass of a wrapped model averages the gradients over the processes."""
    if world_size > 1:
        model.require_backward_grad_sync = now


def total(tensor):
    """The sum of a tensor over the processes, in place; returned for reading on."""
    if world_size > 1:
        import torch.distributed as dist
        dist.all_reduce(tensor)
    return tensor


def highest(number):
    """The highest of the ints that the processes give here. Does not wait for the devices."""
    if world_size > 1:
        import torch
        import torch.distributed as dist
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=between_hosts)
        number = int(tensor)
    return number


def from_main(find):
    """
    What find() returns on rank 0, on all ranks: of what lies on disks they may not see the same. Where it ends the
    script there, it ends on all.
    """
    if world_size == 1:
        return find()
    import torch.distributed as dist
    found, status = None, 0
    if is_main:
        try:
            found = find()
        except SystemExit as end:
            status = end.code
    told = [found, status]
    dist.broadcast_object_list(told, src=0, group=between_hosts)
    if told[1]:
        leave(told[1])
    return told[0]


def from_all(thing, group=None):
    """What each of the processes gives here, as a list on all of them. group: of a thread, see group_of_a_thread."""
    if world_size == 1:
        return [thing]
    import torch.distributed as dist
    things = [None] * world_size
    dist.all_gather_object(things, thing, group=group or between_hosts)
    return things


def group_of_a_thread():
    """
    A group of all processes for what a thread of each says to the others while their main threads go on; None for one
    process alone. All of them call it at the same place.
    """
    if world_size == 1:
        return None
    import torch.distributed as dist
    return dist.new_group(backend='gloo', timeout=GLOO_TIMEOUT)


def leave(status=0):
    """End the script, all processes together. To be called where nothing is left to close."""
    if world_size > 1:
        import torch.distributed as dist
        for thread in threading.enumerate():  # such as one that writes a checkpoint
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        dist.barrier(group=between_hosts)
        dist.destroy_process_group()
        sys.stdout.flush()
        # gloo's threads can abort a process while its interpreter winds down (in 2 of 6 runs with torch 2.13,
        # see pytorch/pytorch#179291), and torchrun would report a crash; nothing is left to wind down, so leave at once
        os._exit(status)
    raise SystemExit(status)
