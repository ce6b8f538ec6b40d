"""A running average of the weights beside the training: EMA or SWA."""

from contextlib import contextmanager

import torch

from kit.base import ranks
from kit.base.errors import explained
from kit.learn import model_state


def running(model, ema_decay, swa_start):
    """
    The Average of a model's weights, or None where neither is asked for.

    ema_decay: exponential moving average, as in Polyak and Juditsky 1992: average <- d average + (1 - d) weights.
               In its first n updates d is at most (1 + n) / (10 + n), so that the untrained weights are soon forgotten.
    swa_start: the plain mean from that step on (stochastic weight averaging, Izmailov et al. 2018, arXiv:1803.05407).
    """
    if ema_decay:
        exact = torch.float32 if next(model.parameters()).device.type == 'mps' else torch.float64  # mps has no float64
        return Average(model, 'ema', lambda n: 1 - ((1 + n) / (10 + n)).to(exact).clamp(max=ema_decay))
    return Average(model, 'swa', lambda n: 1 / (n + 1)) if swa_start else None


class Average:
    """
    What torch.optim.swa_utils.AveragedModel does, and the host waits for nothing: how many updates there were, and
    whether a step was good, is known on the device alone.

    kind: 'ema' or 'swa'; n: the updates so far, a 0-dim int64; share(n): the weight of the newest, once there were n.
    tensors: the averages, in the order of tensors(model), whose parameters come first.
    """

    def __init__(self, model, kind, share):
        self.model, self.kind, self.share = model, kind, share
        self.tensors = [tensor.clone() for tensor in tensors(model)]
        self.n = torch.zeros((), dtype=torch.int64, device=next(model.parameters()).device)

    @torch.no_grad()
    def update(self, is_good):
        """Take the weights of the model in; is_good: a 0-dim bool on their device, where it is False nothing moves."""
        is_good = is_good.to(self.n.device)  # which is the host, where the weights lie there
        share = torch.where(self.n > 0, self.share(self.n), 1.0) * is_good
        n, newest = len([*self.model.parameters()]), tensors(self.model)
        shares = {dtype: share.to(dtype) for dtype in {average.dtype for average in self.tensors[:n]}}
        torch._foreach_lerp_(*([ranks.local(tensor) for tensor in each[:n]] for each in (self.tensors, newest)),
                             [shares[average.dtype] for average in self.tensors[:n]])
        for average, buffer in zip(self.tensors[n:], newest[n:]):
            average.copy_(torch.where(is_good, buffer, average))
        self.n += is_good


@contextmanager
def smoothed(average):
    """
    In it the model has the averaged weights, once there are any: no second model runs, so nothing is compiled for it.
    Gives the kind of the average, '' where the weights are the model's own. Waits for the device.
    """
    if average is None or not average.n:
        yield ''
        return
    model, kept = tensors(average.model), [tensor.clone() for tensor in tensors(average.model)]
    copy(average.tensors, model)
    try:
        yield average.kind
    finally:
        copy(kept, model)


def tensors(model):
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]


def copy(sources, targets):
    for source, target in zip(sources, targets):
        target.copy_(source)


def state(average):
    """What a checkpoint keeps of a running average; nothing before its first update."""
    if average is None or not average.n:
        return {}
    model = average.model
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    averages = {id(own): mean for own, mean in zip((*model.parameters(), *model.buffers()), average.tensors)}
    weights = {name: averages.get(id(named.get(name)), value) for name, value in model.state_dict().items()}
    return {average.kind: weights, 'n_averaged': int(average.n)}


def restore(average, saved):
    """Go on with the average of a checkpoint; where it has none of this kind, begin at its weights."""
    if average is not None:
        key = average.kind if average.kind in saved else 'model'
        model, kept = average.model, [tensor.clone() for tensor in tensors(average.model)]
        with explained(f'the {key} of the checkpoint does not fit', 'take the weights alone: --init_from=FILE.pt'):
            model_state.load(model, saved[key])
        copy(tensors(model), average.tensors)
        copy(kept, tensors(model))
        average.n.fill_(saved['n_averaged'] if key == average.kind else 0)
