"""A running average of the weights beside the training: EMA or SWA."""

import torch
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from kit.base.errors import explained
from kit.learn import model_state


def running(model, ema_decay, swa_start):
    """
    A second model that follows the average of a model's weights, or None where neither is asked for.

    ema_decay: exponential moving average, as in Polyak and Juditsky 1992: average <- d average + (1 - d) weights.
               In its first n updates d is at most (1 + n) / (10 + n), so that the untrained weights are soon forgotten.
    swa_start: the plain mean from that step on (stochastic weight averaging, Izmailov et al. 2018, arXiv:1803.05407).
    """
    if not ema_decay and not swa_start:
        return None

    def ema(averages, weights, n):
        torch._foreach_lerp_(averages, weights, 1 - min(ema_decay, float((1 + n) / (10 + n))))

    average = AveragedModel(model, multi_avg_fn=ema if ema_decay else get_swa_multi_avg_fn())
    average.kind = 'ema' if ema_decay else 'swa'
    return average.requires_grad_(False)


def smoothed(model, average):
    """The average as a model, once it has averaged anything; before that, or where there is none, model itself."""
    return average.module if average is not None and average.n_averaged > 0 else model


def state(average):
    """What a checkpoint keeps of a running average; nothing before its first update."""
    if average is None or not average.n_averaged:
        return {}
    return {average.kind: average.module.state_dict(), 'n_averaged': int(average.n_averaged)}


def restore(average, saved):
    """Go on with the average of a checkpoint; where it has none of this kind, begin at its weights."""
    if average is not None:
        key = average.kind if average.kind in saved else 'model'
        with explained(f'the {key} of the checkpoint does not fit', 'take the weights alone: --init_from=FILE.pt'):
            model_state.load(average.module, saved[key])
        average.n_averaged.fill_(saved['n_averaged'] if key == average.kind else 0)
