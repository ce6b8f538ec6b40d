"""
What the gradients look like: their norms by parameter and by layer, how far an update moves the weights, histograms,
and steps whose numbers are not finite. Nothing here waits for the device but what says so.
"""

import math

import torch

from kit.base import ranks
from kit.learn.schedules import FEWEST_NORMS

RECENT = 100  # norms by which the next ones are judged
SAMPLE = 1 << 15  # values of a parameter that stand for all of it where an estimate will do


def norms(parameters):
    """(n,) norms of the gradients of parameters, 0 where one has none; one fused pass, as clip_grad_norm_'s."""
    nothing = torch.zeros((), device=parameters[0].device)
    found = iter(torch._foreach_norm([ranks.local(p.grad) for p in parameters if p.grad is not None]))
    found = torch.stack([nothing if p.grad is None else next(found) for p in parameters])
    return ranks.norms_of_all(found, parameters[0])


def clip_limit(recent, grad_clip, quantile):
    """
    The norm to clip to: with a quantile that of the recent norms, the present one among them (AutoClip, Seetharaman et
    al. 2020, arXiv:2007.14469; there over all norms since the start), which waits for the device; else, and while few
    are known, grad_clip, where 0 stands for none. recent: (RECENT,), inf where there was no step yet.
    """
    known = recent[recent.isfinite()] if quantile else ()
    return known.quantile(quantile).item() if len(known) >= FEWEST_NORMS else grad_clip or math.inf


def layers(names):
    """
    {name of a parameter: its layer}, by the paths of the modules: a block of a series is one layer and ends in its
    number, gpt.blocks.3.mlp.weight -> blocks.3; else it is a module, gpt.norm.weight -> norm. The outermost module is
    left out, unless two layers would have one name.
    """
    paths = {}
    for name in names:
        modules = name.split('.')[:-1] or [name]  # a bare parameter of the model is a layer of its own
        numbers = [i for i, word in enumerate(modules) if word.isdigit()]
        paths[name] = tuple(modules[:numbers[0] + 1] if numbers else modules[:2])
    short = {path: path[1:] if len(path) > 1 and not path[1].isdigit() else path for path in paths.values()}
    names_of = [*short.values()]
    return {name: '.'.join(short[path] if names_of.count(short[path]) == 1 else path) for name, path in paths.items()}


def sample(model):
    """Some weights of each parameter, evenly spread and at most SAMPLE: copies, to be compared after an update."""
    return [spread(ranks.local(p.detach())).clone() for p in model.parameters()]


def spread(tensor):
    return tensor.flatten()[::max(1, math.ceil(tensor.numel() / SAMPLE))]


def moves(model, norms, before):
    """
    (n, 3) of an update, a row a parameter: the norm of its gradient, of the update, of the weight before it. norms: of
    the parameters' gradients, before: a sample of the weights as they were, by which the latter two are estimated.
    """
    parts = [ranks.local(p.detach()) for p in model.parameters()]
    shares = [math.sqrt(part.numel() / max(1, len(some))) for part, some in zip(parts, before)]
    moved = torch._foreach_sub([spread(part) for part in parts], before)
    found = [torch.stack(torch._foreach_mul(torch._foreach_norm(each), shares)) for each in (moved, before)]
    return torch.stack([norms, *(ranks.norms_of_all(each, next(model.parameters())) for each in found)], dim=1)


def by_layer(model, rows):
    """
    {'grad_norm/<layer>': norm of its gradient, 'update_ratio/<layer>': norm of the update / norm of the weights} after
    an update, but for weights that were all 0; rows: its moves, on the host.
    """
    names, sums = layers(name for name, _ in model.named_parameters()), {}  # of squares
    for (name, _), norms in zip(model.named_parameters(), rows.tolist(), strict=True):
        of_layer = sums.setdefault(names[name], [0.0, 0.0, 0.0])
        for i, norm in enumerate(norms):
            of_layer[i] += norm**2
    return ({f'grad_norm/{name}': math.sqrt(gradient) for name, (gradient, _, _) in sums.items()}
            | {f'update_ratio/{name}': math.sqrt(move / size) for name, (_, move, size) in sums.items() if size})


def values(model):
    """
    {"Parameters/<name>": array, "Gradients/<name>": array} of at most SAMPLE values of each, for histograms. After
    an update, so the gradients are as they were clipped; bad numbers are left out. Of a model in parts those of this
    process. Waits for the device.
    """
    found = {}
    for name, p in model.named_parameters():
        for kind, tensor in ('Parameters', p.detach()), ('Gradients', p.grad):
            if tensor is not None:
                tensor = ranks.local(tensor)
                some = spread(torch.view_as_real(tensor) if tensor.is_complex() else tensor).float()
                found[f'{kind}/{name}'] = some[some.isfinite()].cpu().numpy()
    return found


def at_fault(model, norms):
    """Words for which gradients are not finite. norms: of the parameters. Waits for the device."""
    names = [name for name, _ in model.named_parameters()]
    bad = [name for name, norm in zip(names, norms.tolist()) if not math.isfinite(norm)]
    if len(bad) == len(names):
        return f'the gradients of all {len(names)} parameters: the loss itself was bad, or its first gradient'
    if not bad:
        return 'no gradient: each is finite, and their norm or the loss is not'
    more = f' and {len(bad) - 5} more' if len(bad) > 5 else ''
    return f'the gradient of {", ".join(bad[:5])}{more}, of {len(names)} parameters'


# ---------------------------------------------------------------------------------------------------------------------
# bad steps


class BadSteps:
    """
    Steps whose loss or gradient is not finite. They are skipped, and counted in state.bad_steps: in a row up to now,
    and since the last iter line. Nothing here waits for the device but warn, and what float16 needs. In each step
    begin() comes first, then note(); an iter line takes the count.
    """

    def __init__(self, state, model, scaler):
        self.state, self.model, self.scaler = state, model, scaler
        device = state.bad_steps.device
        self.is_bad = torch.zeros((), dtype=torch.bool, device=device)  # whether the newest one was
        self.norms = torch.zeros(len(list(model.parameters())), device=device)  # of the last bad one's gradients
        self.buffers = []  # of the model, as they were before the newest step

    def begin(self):
        """Keep the model's buffers, if any: a forward pass may change them, and a bad one must not."""
        self.buffers = [buffer.clone() for buffer in self.model.buffers()]

    def note(self, loss, norms, is_good):
        """
        Count a step, put the buffers of a bad one back, and let the scale of float16 move. loss: of the step; norms:
        (n,) of the parameters' gradients; is_good: whether all is finite. While the scale is above 1, a norm that
        overflows only lowers it, and is no bad step; a bad step is no fault of the scale, which stays.
        """
        self.is_bad = ~torch.isfinite(loss) if self.scaler.get_scale() > 1 else ~is_good
        in_a_row, since_line = self.state.bad_steps
        self.state.bad_steps = torch.stack([(in_a_row + 1) * self.is_bad, since_line + self.is_bad])
        self.norms = torch.where(self.is_bad, norms, self.norms)
        for before, buffer in zip(self.buffers, self.model.buffers()):  # so: a model is not searched where it has none
            buffer.copy_(torch.where(is_good, buffer, before))
        self.scaler.update(self.scaler.get_scale() if self.scaler.is_enabled() and self.is_bad else None)

    def take(self):
        """(how many since the last call, norms of the last one's gradients), on the device; the count begins anew."""
        in_a_row, since_line = self.state.bad_steps
        self.state.bad_steps = torch.stack([in_a_row, torch.zeros_like(since_line)])
        return since_line, self.norms

    def warn(self, step, n, norms):
        """Say how many there were up to a step. n, norms: what take() gave, n on the host."""
        if n:
            print(f'WARNING: bad numbers: the loss or the gradient of {n} of the steps up to {step} was not finite; '
                  f'they were skipped. The last of them: {at_fault(self.model, norms)}')


def count_bad(tensor):
    """'3 NaN, 1 Inf among 2,048 numbers', or '' where all are finite."""
    if tensor.isfinite().all():
        return ''
    counts = (int(tensor.isnan().sum()), 'NaN'), (int(tensor.isinf().sum()), 'Inf')
    return ', '.join(f'{n:,} {kind}' for n, kind in counts if n) + f' among {tensor.numel():,} numbers'
