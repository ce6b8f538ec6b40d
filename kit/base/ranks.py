"""
Several processes as one run: what torchrun started, wrapped and summed. The one module that knows torch.distributed.

$ torchrun --standalone --nproc_per_node=4 train.py

One process alone is rank 0 of 1, and nothing here imports torch.distributed for it.
"""

import os
import platform
import sys
import threading
import time
from datetime import timedelta
from functools import partial

from kit.base import peers
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

# how long the others wait for one of them in wait(), from_main() and from_all(): as long as rank 0's downloads, saves,
# uploads and pictures may take. Within a step it is --timeout. Where one dies, torchrun ends the others at once
PATIENCE = timedelta(hours=12)
LAST_WRITE = 60.0  # seconds that a checkpoint on its way to the disk has to arrive there, where a process was lost

between_hosts = None  # the group of gloo's that is so patient
in_step = None        # one that is not; None = the default group, which is gloo's then


def cores():
    """How many cores of this machine are for this process."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, n // variable('LOCAL_WORLD_SIZE', 1))


def start(backend, device, minutes, about):
    """
    Join the other processes, which must run the same. backend: auto (nccl on CUDA, else gloo) or one that
    torch.distributed knows. minutes: that they wait for one of them within a step. about: a function that tells what
    this one runs, as peers.meet takes it.
    """
    global between_hosts, in_step
    if world_size == 1:
        return
    import torch.distributed as dist
    if backend == 'auto':
        backend = 'nccl' if device.type == 'cuda' and dist.is_nccl_available() else 'gloo'
    if missing := [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]:
        fail(f'the environment has WORLD_SIZE={world_size} and no {missing[0]}; start several processes with torchrun, '
             'or unset WORLD_SIZE')
    host, port, limit = os.environ['MASTER_ADDR'], variable('MASTER_PORT', 1), timedelta(minutes=minutes)
    if port >= 2**16:
        fail(f'the environment has MASTER_PORT={port}; a port is a number below 65,536, or start with torchrun')
    # torch's own rendezvous would wait for 30 minutes, and then not know who is missing; and torchrun's store holds
    # what those before a restart have put there
    is_torchruns = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
    if is_torchruns or not is_main:
        peers.reach(host, port, peers.COME)
    with explained(f'the processes cannot meet at {host}:{port}', 'start them with torchrun'):
        store = dist.TCPStore(host, port, is_master=is_main and not is_torchruns, wait_for_workers=False,
                              timeout=timedelta(seconds=peers.COME))
        store = dist.PrefixStore(f'restart_{variable("TORCHELASTIC_RESTART_COUNT", 0)}', store)
        peers.meet(store, rank, world_size, about(), f'{host}:{port}')
        # what nccl waits for cannot be named: the hosts, which wait for each other in every step, find it first
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=limit + timedelta(minutes=5) if backend == 'nccl' else limit,
                                device_id=device if backend == 'nccl' else None)
        between_hosts = dist.new_group(backend='gloo', timeout=PATIENCE)
        if backend == 'nccl':  # what the hosts say to each other must not wait for the devices
            in_step = dist.new_group(backend='gloo', timeout=limit)
    sys.excepthook = partial(tell, sys.excepthook, store, minutes)
    print(f'processes: {world_size} (torchrun), backend {backend}')


def tell(before, store, minutes, kind, error, trace):
    """sys.excepthook, in front of the one before: where another process is lost one line says which, no traceback."""
    if not (how := peers.lost(error)):
        before(kind, error, trace)
        return
    peers.tell_lost(store, rank, world_size, how, minutes)
    end = time.monotonic() + LAST_WRITE
    for thread in threading.enumerate():  # such as one that writes a checkpoint
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, end - time.monotonic()))
    sys.stdout.flush()
    os._exit(1)  # as in leave


def agree(kind, things):
    """That these {name: value} are the same in all processes; else one line, and the end of all. kind: of peers."""
    if world_size > 1:
        people = from_all({'host': platform.node(), 'about': {kind: things}})
        problem = peers.difference(people)  # the same on all
        from_main(lambda: fail(problem) if problem else None)


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
    """The highest of the ints that the processes give here, within a step. Does not wait for the devices."""
    if world_size > 1:
        import torch
        import torch.distributed as dist
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=in_step)
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


def from_all(thing):
    """What each of the processes gives here, as a list on all of them."""
    if world_size == 1:
        return [thing]
    import torch.distributed as dist
    things = [None] * world_size
    dist.all_gather_object(things, thing, group=between_hosts)
    return things


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
