"""The saved state of any optimizer: compared with what it keeps of these parameters, then loaded."""

import copy
import inspect
import math
from collections import OrderedDict, defaultdict
from contextlib import redirect_stdout, suppress

import torch
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from kit.base import ranks
from kit.learn.model_state import is_finite, kind_of, words


def restore(optimizer, state):
    """
    Load a saved state. What the constructor takes (decay, betas, ...) is as the code and the settings of now have it;
    what else is in the groups, such as a count of the optimizer's own, is as it was saved. Raises ValueError where the
    state does not fit: a kernel would read past the end of a moment that is too short. A state_dict of another form, as
    that of an optimizer made of several, is its own affair: it can call this for each of them.
    """
    if type(optimizer).state_dict is not Optimizer.state_dict and not {'state', 'param_groups'} <= state.keys():
        optimizer.load_state_dict(state)
        return
    if not all(isinstance(group, dict) for group in state['param_groups']):
        raise ValueError('one of its groups is no dict')
    sizes, here = ([len(group['params']) for group in groups] for groups in (state['param_groups'],
                                                                             optimizer.param_groups))
    if sizes != here:
        raise ValueError(f'its groups have {sizes} parameters, and here they have {here}')
    params = [p for group in optimizer.param_groups for p in group['params']]
    indices = [i for group in state['param_groups'] for i in group['params']]
    if strange := [i for i in state['state'] if isinstance(i, int) and i not in indices]:
        raise ValueError(f'it has moments of parameter {strange[0]}, which is in none of its groups')
    made = try_out(optimizer, params)
    fitted = dict(state['state'])
    for i, p, known in zip(indices, params, made):
        if i in fitted:
            fitted[i] = fit(i, fitted[i], p, known, type(optimizer))
            fitted[i] = {name: ranks.like(value, p) if is_tensor(value) else value
                         for name, value in fitted[i].items()}
    if missing := [i for i, known in zip(indices, made) if known and not fitted.get(i)]:
        if len(missing) == len(params):
            raise ValueError(f'it has nothing of what {type(optimizer).__name__} keeps')
        print(f'the optimizer begins anew for {len(missing)} of {len(params)} parameters: the checkpoint has nothing '
              'of them, as where there was no gradient yet')
    if type(optimizer).__module__.startswith('torch.optim'):
        check_kind(state['param_groups'], optimizer)
        tensors = [ranks.local(value) for moments in fitted.values() for value in moments.values() if is_tensor(value)]
        places = [tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()]
        if len(set(places)) < len(places):
            raise ValueError('two of its moments share their memory')

    settings = {name for kind in type(optimizer).__mro__ for name in inspect.signature(kind.__init__).parameters}
    settings -= {'params'}
    groups = [mine | {name: value for name, value in saved.items() if name not in settings}
              for saved, mine in zip(state['param_groups'], optimizer.param_groups)]
    optimizer.load_state_dict(state | {'state': fitted, 'param_groups': groups})
    for i, p, known in zip(indices, params, made):
        loaded = optimizer.state[p] if i in fitted else {}
        for name, value in loaded.items():  # torch casts all to the dtype of the parameter, counts and lists too
            saved = fitted[i].get(name)
            if isinstance(saved, list | tuple | dict | str) or is_tensor(saved) and value.dtype != saved.dtype == (
                    getattr(known.get(name, saved), 'dtype', None)):
                loaded[name] = tree_map_only(torch.Tensor, lambda tensor, p=p: tensor.to(p.device, copy=True), saved)


def check_kind(saved, optimizer):
    """Say where the saved groups have other settings: several optimizers keep moments of the same names and shapes."""
    differ = {name for one, other in zip(saved, optimizer.param_groups) for name in one.keys() ^ other.keys()}
    if differ - {'param_names'}:
        print(f'the state of the optimizer was saved by another than {type(optimizer).__name__}, or by that of another '
              f'version of torch: one of the two has no {", ".join(sorted(map(str, differ)))}')


def try_out(optimizer, params):
    """
    What the optimizer keeps of each of params, [{name: value}]: a copy of it makes a step with parameters that have a
    shape and no numbers (torch's meta device), or zeros where it reads numbers. Of one that can do neither, since it
    begins its state in its constructor, what it keeps already.
    """
    for device in 'meta', 'cpu':
        stand_ins = [torch.nn.Parameter(torch.zeros_like(p, device=device) if not ranks.is_part(p) else
                                        torch.zeros(p.shape, dtype=p.dtype, device=device)) for p in params]
        for stand_in in stand_ins:
            stand_in.grad = torch.zeros_like(stand_in)
        twin, state, left = object.__new__(type(optimizer)), defaultdict(dict), iter(stand_ins)
        groups = [group | {name: False for name in ('fused', 'foreach', 'capturable') if name in group}
                  | {'params': [next(left) for _ in group['params']]} for group in optimizer.param_groups]
        own = {'state': state, 'param_groups': groups, 'found_inf': None, 'grad_scale': None,
               '_optimizer_step_pre_hooks': OrderedDict(), '_optimizer_step_post_hooks': OrderedDict()}
        others = {name: value for name, value in optimizer.__dict__.items() if name not in own}
        originals = {id(p): stand_in for p, stand_in in zip(params, stand_ins)}  # a copy refers to none of these
        with suppress(Exception), redirect_stdout(None):  # whatever one written by hand raises, or prints
            twin.__dict__ = copy.deepcopy(others, originals | {id(optimizer): twin}) | own
            type(optimizer).step(twin)
            return [state[p] for p in stand_ins]
    return [optimizer.state.get(p, {}) for p in params]


def fit(index, moments, param, made, kind):
    """
    The saved moments {name: value} of a parameter. Raises ValueError where they are not what is made of it: what has
    the shape of the parameter, and what is one number, must have that. Another shape is that of a factor, in torch's
    own optimizers, or may be that of a history, which grows.
    """
    if not isinstance(moments, dict):
        raise ValueError(f'what it has of parameter {index} is {words(moments)}')
    if not moments:  # there was no gradient yet
        return {}
    if missing := made.keys() - moments.keys():
        raise ValueError(f'parameter {index} lacks {", ".join(sorted(missing))}: it is of another optimizer than '
                         f'{kind.__name__}, or of other settings')
    strange = [name for name in moments.keys() - made.keys() if moments[name] is not None]
    if strange and kind.__module__.startswith('torch.optim'):  # one written by hand may add something in later steps
        raise ValueError(f'parameter {index} has {", ".join(sorted(map(str, strange)))}: it is of another optimizer '
                         f'than {kind.__name__}, or of other settings')
    fitted = dict(moments)
    for name, value in moments.items():
        expected = made.get(name)
        if is_tensor(value) and name not in made and value.numel() == param.numel() and value.dim() == param.dim():
            expected = param
        if not is_tensor(expected) or expected.dim() and expected.shape != param.shape and (
                not kind.__module__.startswith('torch.optim')):
            continue
        if shape_of(value) != shape_of(expected) or is_tensor(value) and kind_of(value) != kind_of(expected):
            raise ValueError(f'{name} of parameter {index} is {words(value)}, and must be {words(expected)}')
        # what a tensor holds has been looked at, unless it is cut off here
        if is_tensor(value) and value.dtype != expected.dtype and not is_finite(value.to(expected.dtype)) or (
                isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f'{name} of parameter {index} holds numbers that are not finite')
        if expected.shape == param.shape and is_tensor(value) and value.stride() != param.stride():
            # kernels take the numbers as they lie in memory
            fitted[name] = torch.empty_strided(param.shape, param.stride(), dtype=value.dtype).copy_(value)
    return fitted


def is_tensor(value):
    return isinstance(value, torch.Tensor)


def shape_of(value):
    """That of a tensor, () of a number, None of anything else."""
    if is_tensor(value):
        return tuple(value.shape)
    return () if isinstance(value, int | float) else None
