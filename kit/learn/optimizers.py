"""The optimizer of a model, which parameters decay, and a step that is left out where a number is not finite."""

import inspect

import torch

from kit.base.errors import fail


def adamw(model, weight_decay, learning_rate, betas):
    """
    AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101). Matrices and embeddings decay; biases and LayerNorm gains,
    which have one dimension, do not. The groups and their order are nanoGPT's, so its optimizer states load.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def clip(optimizer, parameters, norm, limit, most):
    """
    Scale the gradients down to a norm of limit where theirs, a 0-dim tensor, is above it; then cut each entry to most
    (0: not). On CUDA a fused optimizer does the first as it reads them: no pass over them of its own.
    """
    if norm.is_cuda and not most and takes_verdict(optimizer, norm.device):
        optimizer.grad_scale = clip_scale(norm, limit)
        return
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    if most:
        torch.nn.utils.clip_grad_value_(parameters, most)


def clip_scale(norm, limit):
    """What gradients of a norm are divided by, as clip_grads_with_norm_ has it; kernels read it in float32."""
    return ((norm + 1e-6) / limit).clamp(min=1.0).float()


def step(optimizer, is_good):
    """
    Update the weights, unless is_good, a 0-dim bool on their device, is False: then neither the weights nor the
    moments nor their step counts move. Fused kernels read it on the device; for other optimizers the host waits for it.
    """
    if takes_verdict(optimizer, is_good.device):
        optimizer.found_inf = (~is_good).float()
        optimizer.step()
    elif is_good:
        optimizer.step()


def takes_verdict(optimizer, device):
    """Whether the optimizer itself leaves a bad step out, by its attribute found_inf."""
    kind = type(optimizer)
    if not getattr(optimizer, '_step_supports_amp_scaling', False) or kind is torch.optim.SGD or device.type == 'mps':
        return False  # fused SGD leaves its momentum unset after a bad first step; on mps it could not be tried
    # what is written around torch's step, or called by it, may do more
    is_plain = kind.step.__module__.startswith('torch.optim') and 'step' not in vars(optimizer)
    has_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return is_plain and not has_hooks and all(group['fused'] for group in optimizer.param_groups)


def check(optimizer, device):
    """End the script where an optimizer needs what it cannot have; say so where the host must wait in each step."""
    kind = type(optimizer)
    closure = inspect.signature(kind.step).parameters.get('closure')
    if closure and closure.default is inspect.Parameter.empty:
        fail(f'{kind.__name__} computes the loss several times in a step (closure), which train.py cannot do; '
             'choose another optimizer there')
    if not takes_verdict(optimizer, device):
        print(f'{kind.__name__} cannot skip a bad step on the device: the host waits in each step until it knows that '
              'the loss and the gradient are finite')
