"""What a model is worth on a split. The model comes in as an argument, the data as an array of ids."""

import math
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

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


@contextmanager
def evaluating(model):
    """Without dropout; afterwards the model is as it was, whatever happened."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


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
    sums = torch.zeros(3, device=device, dtype=torch.float32 if device.type == 'mps' else torch.float64)
    with evaluating(model):
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
    loss, right, count = ranks.total(sums).tolist()
    return loss / count, right / count


@torch.no_grad()
def token_losses(model, rows, batch_size, device, dtype):
    """The loss of every target of rows (n, T + 1), without dropout: (n, T) float32, in nats."""
    losses = []
    for i in range(0, len(rows), batch_size):
        tokens = devices.send(rows[i:i + batch_size], device)
        with evaluating(model), devices.autocast(device, dtype):
            logits, _ = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        losses.append(F.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction='none').cpu())
    return torch.cat(losses).numpy()


class AttentionMaps(TorchFunctionMode):
    """While it is entered, computes what scaled_dot_product_attention does not give: who looks where."""

    def __init__(self):
        super().__init__()
        self.maps = []  # of each layer: (B, H, T, T), a row sums to 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            scores = q.float() @ k.float().transpose(-2, -1) / math.sqrt(q.size(-1))
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            self.maps.append(scores.masked_fill(future, -math.inf).softmax(dim=-1))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def attention(model, ids):
    """The attention of every layer and head over one row of ids (T,): an array (L, H, T, T); causal."""
    with evaluating(model), AttentionMaps() as seen:
        model.hidden(ids[None])  # in float32: nothing is compiled or cast here
    return torch.stack(seen.maps)[:, 0].cpu().numpy()
