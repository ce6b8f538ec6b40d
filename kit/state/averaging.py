"""The mean of many checkpoints: which of a folder belong together, and their sum, read a piece at a time."""

import glob
import math
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from kit.base.errors import fail
from kit.learn.model_state import is_finite
from kit.state import checkpoints, shards


def different_steps(folder, pattern):
    """
    {step: (path, checkpoint, sums)} of the training checkpoints in the folder of a run, by the step inside, the highest
    first, as checkpoints.open_lazily gives them: from here on a run may delete them. Averages, steps that come again,
    steps beyond ckpt.pt and what is deleted meanwhile are left out, and it says so. A file that is no whole checkpoint
    ends the script.
    """
    paths, opened, found = [folder / name for name in glob.glob(pattern, root_dir=folder)], {}, {}
    paths = [path for path in paths if not path.is_dir()]
    for path in sorted(paths, key=lambda path: (not path.name.startswith('step_'), path.name)):
        try:
            opened[path] = checkpoints.open_lazily(path)
        except checkpoints.Gone:
            print(f'left out: {path.name} is gone: a run has deleted it')
        except checkpoints.Damaged as error:
            fail(f'{error}; leave it out, with --pattern="step_*.pt" or by moving it elsewhere')
    last = checkpoints.peek(folder / 'ckpt.pt').get('iter_num', math.inf)  # where the run stands, perhaps by now
    for path, (checkpoint, sums) in opened.items():
        step = checkpoint['iter_num']
        if 'averaged' in checkpoint:
            print(f'left out: {path.name} is an average')
        elif step > last:
            print(f'left out: {path.name} is step {step}, beyond ckpt.pt: of a branch that was given up')
        elif step in found:
            print(f'left out: {path.name} is step {step} again, as {found[step][0].name}')
        else:
            found[step] = path, checkpoint, sums
    return dict(sorted(found.items(), reverse=True))


def mean(opened, shares, parameters=None):
    """
    The weighted mean of the raw weights of checkpoints, {name: tensor}; the shares add up to 1. opened: (path,
    checkpoint, sums) of each, as different_steps gives them. Each file is read once, a piece at a time, summed in
    float64 and compared with its checksums on the way: the memory taken is that of the result, however many there are.
    Where some are in shards, which were compared before, a tensor at a time: the memory of the largest comes to that.
    Raises checkpoints.Damaged, and ValueError where one of the parameters (names; None: all) is not finite; a buffer,
    such as a mask, may be infinite.
    """
    result, by_place, checks = {}, {}, []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # zlib computes without Python's lock, beside the sums
        for name in opened[0][1]['model']:
            tensors = [checkpoint['model'][name] for _, checkpoint, _ in opened]
            place = tuple((sums.names[name] if tensor.is_meta else tensor.data_ptr(), tensor.shape)
                          for tensor, (_, _, sums) in zip(tensors, opened))
            if place not in by_place:  # the output layer is the token embedding: one tensor under two names
                checks += [pool.submit(checkpoints.check_tensor, path, tensor, sums)
                           for tensor, (path, _, sums) in zip(tensors, opened) if not isinstance(sums, shards.Part)]
                is_in_files = not any(tensor.is_meta for tensor in tensors)
                by_place[place] = weighted_sum(tensors, shares) if is_in_files else (
                    sum_in_turn((weights(one, [name])[name] for one in opened), shares))
            result[name] = by_place[place]
        for check in checks:
            check.result()
    for name in parameters or result:
        if not is_finite(result[name]):
            bad = [one[0] for one in opened if not is_finite(weights(one, [name])[name])]
            raise ValueError(f'{bad[0] if bad else "the mean"}: {name} holds numbers that are not finite')
    return result


def weights(opened, names=None):
    """
    The raw weights of (path, checkpoint, sums), {name: tensor}, as they are in its file, or read from its shards.
    names: of those that are wanted, None: all. Raises whatever torch raises.
    """
    _, checkpoint, sums = opened
    found = {name: checkpoint['model'][name] for name in names or checkpoint['model']}
    in_shards = {name: sums.names[name] for name, tensor in found.items() if tensor.is_meta}
    read = sums.read({*in_shards.values()}) if in_shards else {}
    return found | {name: read[key] for name, key in in_shards.items()}


def sum_in_turn(tensors, shares):
    """weighted_sum of tensors that come one after the other, so that one at a time is in memory."""
    total = None
    for tensor, share in zip(tensors, shares):
        if not tensor.is_floating_point() and not tensor.is_complex():
            return tensor.clone()
        if total is None:
            total = torch.zeros(tensor.shape, dtype=torch.complex128 if tensor.is_complex() else torch.float64)
        total.add_(tensor, alpha=share)
    return total.to(tensor.dtype)


def weighted_sum(tensors, shares, piece=1 << 18):
    """
    Of tensors of one shape, the newest first, summed in float64, a piece of 2 MiB at a time. What is counted in whole
    numbers, such as a buffer's, has no mean: the newest is taken.
    """
    result = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    if result.is_complex():
        result = weighted_sum([torch.view_as_real(tensor) for tensor in tensors], shares, piece)
        return torch.view_as_complex(result)
    if not result.is_floating_point():
        return result.copy_(tensors[0])
    flat = [tensor.reshape(-1) for tensor in tensors]
    total, term = torch.empty(2, piece, dtype=torch.float64)  # made once: thousands of small ones leave holes in memory
    for i in range(0, result.numel(), piece):
        n = min(piece, result.numel() - i)
        total[:n].zero_()
        for tensor, share in zip(flat, shares):
            term[:n] = tensor[i:i + n]
            total[:n].add_(term[:n], alpha=share)
        result.view(-1)[i:i + n] = total[:n]
    return result
