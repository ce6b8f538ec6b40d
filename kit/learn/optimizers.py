"""The optimizer of a model: which parameters decay, and AdamW in its fused form."""

import torch


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
    moments nor their step counts move. The fused kernel reads it on the device, so that the host need not wait.
    """
    if is_good.device.type == 'mps':  # where found_inf could not be tried
        return optimizer.step() if is_good else None
    optimizer.found_inf = (~is_good).float()
    optimizer.step()


def restore(optimizer, state):
    """Load a saved state. What the settings say of decay and betas goes before what the state says."""
    for saved, mine in zip(state['param_groups'], optimizer.param_groups):
        saved.update({key: mine[key] for key in ('weight_decay', 'betas', 'fused')})
    optimizer.load_state_dict(state)
