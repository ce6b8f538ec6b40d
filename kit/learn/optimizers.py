"""The optimizer of a model, which parameters decay, and a step that is left out where a number is not finite."""

import inspect
import math

import torch

from kit.base import ranks
from kit.base.errors import fail, shown
from kit.base.overrides import nearest

MOMENTUM = 0.95        # of Muon: the memory of its mean gradient
FIRST_MOMENTUM = 0.85  # with which it begins,
WARMUP = 300           # and its steps from the one to the other
MOST = 1e36            # rates below it do not overflow in float32
# coefficients of its iterations (Amsel et al. 2025, arXiv:2505.16932), which leave 1% for rounding
NEWTON_SCHULZ = [(8.2052, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250),
                 (3.2856, -2.4153, 0.4853)]


def make(text, model, weight_decay, learning_rate, betas, dtype):
    """
    The optimizer that the setting names: 'adamw', or 'muon:0.02', which is Muon with such a rate for the matrices in
    the blocks and AdamW for all else. dtype: in which the run computes.
    """
    name, rate = parse(text)
    if name == 'adamw':
        return adamw(model, weight_decay, learning_rate, betas)
    matrices = model.hidden_matrices()
    if not matrices:
        fail(f'optimizer = {text!r}: this model has no matrices in its blocks for Muon; --optimizer=adamw')
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    if not rate / learning_rate < MOST:
        fail(f'optimizer = {text!r}: its rate is too far above learning_rate = {learning_rate:g}, to which it is tied')
    return Muon(matrices, others, learning_rate, rate / learning_rate, weight_decay, betas,
                torch.bfloat16 if dtype == 'bfloat16' else torch.float32)


def parse(text):
    """'muon:0.02' -> ('muon', 0.02); one line where it is no optimizer."""
    name, is_given, number = text.partition(':')
    name = name.strip().lower()
    if name not in ('adamw', 'muon'):
        fail(f'optimizer = {shown(text)}: there is no such optimizer{nearest(name, ["adamw", "muon"])}; there are '
             'adamw and muon:0.02')
    if name == 'adamw':
        if is_given:
            fail(f'optimizer = {shown(text)}: the rate of adamw is learning_rate; --optimizer=adamw')
        return name, None
    try:
        rate = float(number) if is_given else 0.02
    except ValueError:
        rate = 0.0
    if not 0 < rate < MOST:
        fail(f'optimizer = {shown(text)}: {shown(number)} is no rate, which is above 0, as in --optimizer=muon:0.02')
    return name, rate


def text_of(name, rate):
    """The setting of a name and a rate, as parse gives them."""
    return name if rate is None else f'{name}:{rate}'


def adamw(model, weight_decay, learning_rate, betas):
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101)."""
    return torch.optim.AdamW(decay_groups(model.parameters(), weight_decay), lr=learning_rate, betas=betas, fused=True)


def decay_groups(params, weight_decay):
    """
    Matrices and embeddings decay; biases, gains and scalars, which have one dimension or none, do not. The groups and
    their order are nanoGPT's, so its optimizer states load.
    """
    params = [p for p in params if p.requires_grad]
    return [{'params': [p for p in params if p.dim() >= 2], 'weight_decay': weight_decay},
            {'params': [p for p in params if p.dim() < 2], 'weight_decay': 0.0}]


class Muon(torch.optim.AdamW):
    """
    AdamW, but the matrices in the blocks are moved by Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon):
    what a step takes from such a matrix is its mean gradient with all singular values brought to about 1, so that no
    direction drowns in a stronger one.

    torch.optim.Muon moves one matrix after the other, by five iterations of one polynomial. Here those of one shape go
    together, four polynomials do as well, a bad step is skipped on the device (found_inf), the momentum warms up, and
    everything else is AdamW's.
    """

    def __init__(self, matrices, others, lr, lr_factor, weight_decay, betas, dtype):
        """lr_factor: the rate of the matrices is that of the others times this; dtype: of Muon's matrix products."""
        own = {'params': matrices, 'weight_decay': weight_decay, 'lr_factor': lr_factor}
        super().__init__([own, *decay_groups(others, weight_decay)], lr=lr, betas=betas, fused=True)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        own, *others = self.param_groups
        self.param_groups = others
        super().step()
        self.param_groups = [own, *others]
        by_shape = {}
        for p in own['params']:
            if p.grad is not None:
                shape = tuple(p.shape)
                by_shape.setdefault(shape if ranks.is_part(p) else (min(shape), max(shape)), []).append(p)
        for params in by_shape.values():
            self.move(params, own['lr'], own['weight_decay'])

    def move(self, params, lr, weight_decay):
        """Move matrices of one shape, some of which may stand where the others lie if each process has them whole."""
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros((), device=p.device), momentum_buffer=torch.zeros_like(p))
        counts, buffers = ([ranks.local(self.state[p][name]) for p in params] for name in ('step', 'momentum_buffer'))
        gradients, is_good = [ranks.local(p.grad) for p in params], 1.0
        if getattr(self, 'grad_scale', None) is not None:
            gradients = torch._foreach_div(gradients, self.grad_scale)
        if getattr(self, 'found_inf', None) is not None:
            is_good = 1.0 - self.found_inf
            gradients = [gradient.masked_fill(self.found_inf > 0, 0.0) for gradient in gradients]  # NaN times 0 is NaN
        n, momentum = len(params), FIRST_MOMENTUM + (MOMENTUM - FIRST_MOMENTUM) * (counts[0] / WARMUP).clamp(max=1.0)
        torch._foreach_lerp_(buffers, gradients, n * [(1 - momentum) * is_good])
        updates = torch._foreach_lerp(gradients, buffers, n * [momentum])  # Nesterov's
        if ranks.is_part(params[0]):  # each process takes some of them, and has them whole
            some = ranks.whole_matrices(torch.stack(updates).to(self.dtype), params[0])
            some = laid(orthogonal(laid(some, params[0])), params[0])
            updates = ranks.parts_of_matrices(some, params[0], n)
        else:
            updates = orthogonal(torch.stack([laid(x, p).to(self.dtype) for x, p in zip(updates, params)]))
            updates = [laid(update, p) for update, p in zip(updates, params)]
        scales = [math.sqrt(max(1, p.size(0) / p.size(1))) for p in params]
        params = [ranks.local(p) for p in params]
        torch._foreach_mul_(params, 1 - lr * weight_decay * is_good)
        for p, update, scale in zip(params, updates, scales):
            p.add_(update * is_good, alpha=-lr * scale)
        torch._foreach_add_(counts, n * [is_good])


def laid(x, p):
    """x, transposed where the matrix p has more rows than columns: so all of one size lie, and stand again."""
    return x.mT if p.size(0) > p.size(1) else x


def orthogonal(x):
    """
    Each of x (n, rows, columns), no more rows than columns, with its singular values brought to 0.4 to 1.6, those of
    less than a thousandth of their norm to less: Newton-Schulz iterations.
    """
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # none is above 1
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def clip(optimizer, parameters, norm, limit, most):
    """
    Scale the gradients down to a norm of limit where theirs, a 0-dim tensor, is above it; then cut each entry to most
    (0: not). On CUDA a fused optimizer does the first as it reads them: no pass over them of its own.
    """
    if norm.is_cuda and parameters[0].is_cuda and not most and takes_verdict(optimizer, norm.device):
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
        optimizer.found_inf = (~is_good).float().to(optimizer.param_groups[0]['params'][0].device)
        optimizer.step()
    elif is_good:
        optimizer.step()


def takes_verdict(optimizer, device):
    """Whether the optimizer itself leaves a bad step out, by its attribute found_inf."""
    kind = type(optimizer)
    if not getattr(optimizer, '_step_supports_amp_scaling', False) or kind is torch.optim.SGD or device.type == 'mps':
        return False  # fused SGD leaves its momentum unset after a bad first step; on mps it could not be tried
    # what is written around torch's step, or called by it, may do more
    is_plain = kind.step.__module__.startswith(('torch.optim', __name__)) and 'step' not in vars(optimizer)
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
