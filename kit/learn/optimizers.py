"""The optimizer of a model, which parameters decay, and a step that is left out where a number is not finite."""

import inspect
from functools import cache

import torch

from kit.base.overrides import fail


def adamw(model, weight_decay, learning_rate, betas):
    """
    AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101). Matrices and embeddings decay; biases and LayerNorm gains,
    which have one dimension, do not. The groups and their order are nanoGPT's, so its optimizer states load.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def step(optimizer, is_good):
    """
    Update the weights, unless is_good, a 0-dim bool on their device, is False: then neither the weights nor the
    moments nor their step counts move. Fused kernels read it on the device; for other optimizers the host waits for it.
    """
    if takes_verdict(optimizer, is_good.device):
        optimizer.found_inf = (~is_good).float()
        optimizer.step()
        return
    tell_of_waiting(type(optimizer))
    if is_good:
        optimizer.step()


def takes_verdict(optimizer, device):
    """Whether the optimizer itself leaves a bad step out, by its attribute found_inf."""
    kind = type(optimizer)
    return (getattr(optimizer, '_step_supports_amp_scaling', False)
            and device.type != 'mps'  # where it could not be tried
            and kind is not torch.optim.SGD  # after a bad first step its kernel leaves the momentum unset
            and kind.step.__module__.startswith('torch.optim'))  # a step written around torch's may do more


@cache  # once
def tell_of_waiting(kind):
    """Say that each step waits for the device; end the script where the optimizer wants what it cannot have."""
    closure = inspect.signature(kind.step).parameters.get('closure')
    if closure and closure.default is inspect.Parameter.empty:
        fail(f'{kind.__name__} computes the loss several times in a step (closure), which train.py cannot do; '
             'choose another optimizer in kit/learn/optimizers.py')
    print(f'{kind.__name__} cannot skip a bad step on the device: the host waits in each step until it knows that the '
          'loss and the gradient are finite')
