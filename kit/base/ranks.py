"""
Several processes as one run: what torchrun started, wrapped and summed. The one module that knows torch.distributed
(but for kit/state/dcp.py, which knows how it writes checkpoints).

$ torchrun --standalone --nproc_per_node=4 train.py

One process alone is rank 0 of 1, and nothing here imports torch.distributed for it.
"""

import math
import os
import platform
import sys
import threading
from datetime import timedelta
from functools import partial

from kit.base import peers
from kit.base.errors import explained, fail, reason


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
GLOO_TIMEOUT = timedelta(hours=12)
LAST_WRITE = 60.0  # seconds that a checkpoint on its way to the disk has to arrive there, where a process was lost

MOST_OF_A_DEVICE = 0.6  # for the model with gradients and moments; the rest is for activations

WRITING = 'checkpoint'  # the name of threads that write one: the end waits for these, and for no pool of torch's own

between_hosts = None  # the group of gloo's that is so patient
in_step = None        # one that is not; None = the default group, which is gloo's then
is_fsdp = False   # whether each process holds a part of the model, see choose_parallel


def be_alone():
    """
    For a script of one process: what the environment says of others, as in a pod or a job that trains with several, is
    not about it. Several of it would write the same files.
    """
    global rank, world_size, is_main
    if world_size > 1 and 'TORCHELASTIC_RUN_ID' in os.environ:
        fail('one process does all of this; start it with python, without torchrun')
    rank, world_size, is_main = 0, 1, True


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
    if backend == 'nccl' and device.type != 'cuda':
        fail(f"backend = 'nccl': it is for GPUs, and device is {device.type}; --backend=auto")
    if backend == 'auto':
        backend = 'nccl' if device.type == 'cuda' and dist.is_nccl_available() else 'gloo'
    if missing := [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]:
        fail(f'the environment has WORLD_SIZE={world_size} and no {missing[0]}; start several processes with torchrun, '
             'or unset WORLD_SIZE')
    host, port, limit = os.environ['MASTER_ADDR'], variable('MASTER_PORT', 1), timedelta(minutes=minutes)
    if port >= 2**16:
        fail(f'the environment has MASTER_PORT={port}; a port is a number below 65,536, or start with torchrun')
    # torch's own rendezvous would wait for 30 minutes, and then not know who is missing
    is_torchruns = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
    if is_torchruns or not is_main:
        peers.reach(host, port, peers.JOIN_SECONDS)
    with explained(f'the processes cannot meet at {host}:{port}', 'start them with torchrun'):
        store = dist.TCPStore(host, port, is_master=is_main and not is_torchruns, wait_for_workers=False,
                              timeout=timedelta(seconds=peers.JOIN_SECONDS))
        store = dist.PrefixStore(peers.meet(store, rank, world_size, about(), f'{host}:{port}'), store)
        # what nccl waits for cannot be named: the hosts, which wait for each other in every step, find it first
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=limit + timedelta(minutes=5) if backend == 'nccl' else limit,
                                device_id=device if backend == 'nccl' else None)
        between_hosts = dist.new_group(backend='gloo', timeout=GLOO_TIMEOUT)
        if backend == 'nccl':  # what the hosts say to each other must not wait for the devices
            in_step = dist.new_group(backend='gloo', timeout=limit)
    sys.excepthook = partial(tell, sys.excepthook, store, minutes)
    print(f'processes: {world_size} (torchrun), backend {backend}')


def tell(before, store, minutes, kind, error, trace):
    """sys.excepthook, in front of the one before: where another process is lost one line says which, no traceback."""
    if not (how := peers.lost(error)):
        before(kind, error, trace)
        return
    peers.tell_lost(store, rank, world_size, how, minutes, reason(error))
    wait_for_writes(LAST_WRITE)
    sys.stdout.flush()
    os._exit(1)  # as in leave


def wait_for_writes(seconds=None):
    """Until the threads that write a checkpoint have ended, or so long."""
    for thread in threading.enumerate():
        if thread.name == WRITING:
            thread.join(seconds)


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


# ---------------------------------------------------------------------------------------------------------------------
# the work: rows of a step, and the gradients


def wrap(model, device):
    """The model with its gradients averaged over the processes: DDP, or as it is where shard() has seen to that."""
    if world_size == 1 or is_fsdp:
        return model
    from torch.nn.parallel import DistributedDataParallel
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None,
                                   gradient_as_bucket_view=True)  # one copy of the gradients less in memory


def share(n_rows, batch_size):
    """How many micro-steps of at most batch_size rows each process makes of the n_rows of a step."""
    if n_rows % world_size:
        fits = [n for n in range(1, n_rows + 1) if n_rows % n == 0]
        near = [max(n for n in fits if n < world_size), *(n for n in fits if n > world_size)][:2]
        fail(f'the {n_rows} rows of a step (batch_size x gradient_accumulation_steps) cannot be shared out evenly over '
             f'{world_size} processes; {" or ".join(map(str, near))} can share them, or '
             f'{max(1, round(n_rows / world_size)) * world_size} rows are shared by these')
    return -(-n_rows // world_size // batch_size)


def rows_of(n_rows, micro_steps, micro_step):
    """The slice of the n_rows of a step that this process reads in a micro-step; all read equally many in each."""
    mine = n_rows // world_size
    begin, end = mine * micro_step // micro_steps, mine * (micro_step + 1) // micro_steps
    first = begin * world_size + rank * (end - begin)
    return slice(first, first + end - begin)


def exchange_gradients(model, now):
    """Whether the next backward pass of a model that wrap() gave averages the gradients over the processes."""
    if is_fsdp:
        model.set_requires_gradient_sync(now)
    elif world_size > 1:
        model.require_backward_grad_sync = now


def total(tensor):
    """The sum of a tensor over the processes, in place; returned for reading on."""
    if world_size > 1:
        import torch.distributed as dist
        dist.all_reduce(tensor)
    return tensor


# ---------------------------------------------------------------------------------------------------------------------
# a model in parts: FSDP2 (Zhao et al. 2023, arXiv:2304.11277), whose parameters, gradients and moments are DTensors. Of
# each the first dimension is cut as torch.chunk does it; what lies here is its local part, maybe nothing


def choose_parallel(name, needed, has, device):
    """
    auto, ddp (each process holds the whole model) or fsdp (each holds a part). needed, has: bytes that the model
    takes with its gradients and moments, and that a device has.
    """
    global is_fsdp
    if name == 'fsdp' and world_size == 1:
        fail("parallel = 'fsdp': it shares a model out over several processes, and this is one alone; start them with "
             'torchrun, or leave --parallel out')
    if world_size == 1:
        return
    why = 'as asked'
    if name == 'auto':
        name = 'fsdp' if needed > MOST_OF_A_DEVICE * has else 'ddp'
        why = f'the model with gradients and moments takes {needed / 2**30:.3g} GiB, a device has {has / 2**30:.3g}'
    is_fsdp = name == 'fsdp'
    import torch.distributed as dist
    if is_fsdp and device.type == 'cuda' and dist.get_backend() != 'nccl':
        fail(f"parallel = 'fsdp': on GPUs it takes nccl, and backend is {dist.get_backend()}, with which torch 2.11 "
             'broke off where parts of a tensor were put together; --backend=nccl')
    print(f'parallel: {name} ({why})')


def shard(model, blocks, device, dtype, cpu_offload):
    """
    Share a model on the meta device out, in place: from here on each process holds a part of each parameter, which has
    no numbers yet. The parts of a block are gathered when it comes to work, and left again. dtype: of the run, on a GPU
    they are gathered in it, where autocast would bring the same matrices to it.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    if scalars := [name for name, p in model.named_parameters() if p.dim() == 0]:
        fail(f"parallel = 'fsdp': a parameter needs a dimension, and {scalars[0]} has none; give it the shape (1,), or "
             'take --parallel=ddp')
    how = {'mesh': init_device_mesh(device.type, (world_size,))}
    if cpu_offload:
        how['offload_policy'] = CPUOffloadPolicy()
    is_cast = device.type == 'cuda' and dtype != 'float32'  # a CPU's layer_norm takes no gains in another format
    policy = MixedPrecisionPolicy()
    if is_cast:
        policy = MixedPrecisionPolicy(getattr(torch, dtype), reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mp_policy=policy, **how)
    fully_shard(model, **how)  # what is outside of the blocks is read in float32: there the stream begins and ends
    model.to_empty(device='cpu' if cpu_offload else device)


def reshard(model):
    """Leave what a pass without a backward pass has gathered."""
    if is_fsdp and hasattr(model, 'reshard'):
        model.reshard()


def is_part(tensor):
    """Whether this process holds a part of a tensor alone."""
    return hasattr(tensor, 'full_tensor')


def local(tensor):
    """What of a tensor lies here."""
    return tensor.to_local() if is_part(tensor) else tensor


def whole(tensor):
    """All of a tensor, on the device that computes. All processes call this together."""
    if not is_part(tensor):
        return tensor
    return placed(at_work(tensor), tensor, tensor.placements, tensor.shape).full_tensor()


def at_work(tensor):
    """The local part of a tensor on the device that computes, where it may lie in the memory of the host."""
    return local(tensor).to(tensor.device_mesh.device_type)


def placed(mine, other, placements, shape):
    """A tensor of a shape in parts over the processes of another; mine: the part that lies here."""
    from torch.distributed.tensor import DTensor
    stride = tuple(math.prod(shape[i + 1:]) for i in range(len(shape)))
    return DTensor.from_local(mine.contiguous(), other.device_mesh, placements, shape=shape, stride=stride)


def like(value, tensor):
    """
    A whole tensor, which each process has, as one in parts where the other tensor is that; as it is where its shape is
    another, for who takes it to say so.
    """
    if not is_part(tensor) or value.shape != tensor.shape:
        return value
    mine = local(value) if is_part(value) else mine_of(value)
    return placed(mine.to(tensor.device), tensor, tensor.placements, tensor.shape)


def mine_of(tensor):
    """What this process has of a tensor that is cut, as all are here, in its first dimension."""
    parts = tensor.chunk(world_size)
    return parts[rank] if rank < len(parts) else tensor[:0]


def empty_part(meta, other):
    """A tensor of the shape of one on the meta device, in parts as another is, in the memory of the host."""
    import torch
    return placed(torch.empty_like(mine_of(meta), device='cpu'), other, other.placements, meta.shape)


def whole_matrices(parts, matrix):
    """
    (n, rows here, columns), the local parts of n matrices such as one -> (n here, rows, columns), some of them whole,
    on the device that computes.
    """
    return recut(parts.to(matrix.device_mesh.device_type), matrix, (len(parts), *matrix.shape), 1, 0)


def parts_of_matrices(matrices, matrix, n):
    """The way back from whole_matrices."""
    return recut(matrices, matrix, (n, *matrix.shape), 0, 1).to(matrix.device)


def recut(mine, matrix, shape, before, after):
    """What lies here of a stack (n, rows, columns) cut in one dimension -> what does when it is cut in another."""
    from torch.distributed.tensor import Replicate, Shard
    stack = placed(mine, matrix, [Shard(before)], shape)
    if mine.device.type == 'cpu':  # gloo has no other way, and torch would warn of it
        stack = stack.redistribute(placements=[Replicate()])
    return stack.redistribute(placements=[Shard(after)]).to_local()


def norms_of_all(norms, tensor):
    """(n,) norms of the local parts of tensors such as this one -> those of the whole, on the device that computes."""
    if not is_part(tensor):
        return norms
    squares = norms.to(tensor.device_mesh.device_type).double().square()
    return total(squares).sqrt().to(norms.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# what the processes say to each other, and the end


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
        wait_for_writes()
        dist.barrier(group=between_hosts)
        dist.destroy_process_group()
        sys.stdout.flush()
        # gloo's threads can abort a process while its interpreter winds down (in 2 of 6 runs with torch 2.13,
        # see pytorch/pytorch#179291), and torchrun would report a crash; nothing is left to wind down, so leave at once
        os._exit(status)
    raise SystemExit(status)
