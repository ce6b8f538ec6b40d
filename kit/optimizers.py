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


def resume(optimizer, state):
    """Load a saved state. What the settings say of decay and betas goes before what the state says."""
    for saved, mine in zip(state['param_groups'], optimizer.param_groups):
        saved.update({key: mine[key] for key in ('weight_decay', 'betas', 'fused')})
    optimizer.load_state_dict(state)
