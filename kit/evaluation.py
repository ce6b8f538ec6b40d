"""What a model is worth on a split. The model comes in as an argument, the data as an array of ids."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from kit import batches, devices, ranks


class Ensemble(torch.nn.Module):
    """Several models as one that gives every token the mean of their probabilities."""

    def __init__(self, models):
        super().__init__()
        self.models = torch.nn.ModuleList(models)
        # the one with the shortest rows sets their length; ids that not all of them know stand for nothing
        self.config = min((model.config for model in self.models), key=lambda config: config.block_size)
        self.n_ids = min(model.config.vocab_size for model in self.models)

    def forward(self, idx, targets):
        """(B, T) ids and targets -> (log-probabilities (B, T, V), mean loss), as GPT.forward."""
        total = None
        for model in self.models:
            log_probs = F.log_softmax(model(idx, targets)[0].float(), dim=-1)[..., :self.n_ids]  # (B, T, V)
            total = log_probs if total is None else torch.logaddexp(total, log_probs)
        total -= math.log(len(self.models))
        return total, F.nll_loss(total.flatten(0, 1), targets.flatten(), ignore_index=-1)


@torch.no_grad()
def measure(model, data, block_size, batch_size, rows, device, dtype):
    """
    (mean loss in nats, accuracy of the likeliest token), each over all targets of evenly spaced windows of data, the
    same windows every time. rows: how many windows, 0 = all of the text. The ranks share the work. No random number
    is drawn. Every batch has batch_size rows, so that a compiled model sees one shape: those that fill up the last
    one count nothing.
    """
    starts, skip = batches.evaluation_windows(len(data), block_size, rows)
    fill = -len(starts) % (batch_size * ranks.world_size)
    starts, skip = np.pad(starts, (0, fill)), np.pad(skip, (0, fill), constant_values=block_size)
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, device=device, dtype=torch.float32 if device.type == 'mps' else torch.float64)
    for i in range(ranks.rank * batch_size, len(starts), ranks.world_size * batch_size):
        here = slice(i, i + batch_size)
        if (skip[here] == block_size).all():
            continue
        tokens = devices.send(batches.windows(data, starts[here], block_size), device)  # (B, T + 1)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if skip[here].any():
            y[torch.arange(block_size, device=device) < devices.send(skip[here, None], device)] = -1
        with devices.autocast(device, dtype):
            logits, loss = model(x, y)
        count = (y >= 0).sum()
        sums += torch.stack([loss * count, (logits.argmax(dim=-1) == y).sum(), count]).to(sums.dtype)
    model.train(was_training)
    loss, right, count = ranks.total(sums).tolist()
    return loss / count, right / count
