"""The saved weights of any model: compared with its own, then loaded; whether numbers are finite."""

import math

import torch

from kit.base import ranks

PIECE = 1 << 15  # numbers that torch looks at in the thread that asks: more take others, and a training may need those


def load(model, state):
    """
    Load weights {name: tensor} into a model, which may fit them first (model.fitted); into one in parts each process
    its own. Raises ValueError, TypeError or RuntimeError in words where names, shapes or kinds of numbers are not the
    model's, or a parameter is not finite.
    """
    state, own = model.fitted(state), model.state_dict()
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    one = {}  # of the names of one tensor, the first
    for name in filter(state.__contains__, own):
        if kind_of(own[name]) != kind_of(state[name]):  # torch would round or cut off without a word
            raise ValueError(f'{name} is {words(state[name])}, and must be {words(own[name])}')
        first = one.setdefault(parameters.get(name) or (own[name].data_ptr(), own[name].shape), name)
        if state[first].data_ptr() != state[name].data_ptr() and not torch.equal(state[first], state[name]):
            raise RuntimeError(f'{name} is not {first}, and the two are one in it')  # the last would win
    model.load_state_dict({name: ranks.like(value, own.get(name)) for name, value in state.items()})
    # seen here, since float32 may not hold what float64 did
    bad = [name for name, p in model.named_parameters() if not is_finite(ranks.local(p))]
    if bad := sum(ranks.from_all(bad) if ranks.is_fsdp else [bad], []):
        raise ValueError(f'{bad[0]} holds numbers that are not finite')


def is_finite(tensor, or_infinite=False):
    """
    Whether all numbers are; or_infinite: whether none is NaN. Without a copy of the tensor: NaN is both the lowest and
    the highest. No more is read than is stored, however large a view of it is. A tensor without numbers (meta), or of
    codes for them (quantized), is none.
    """
    tensor = tensor.detach()
    if tensor.is_meta or tensor.is_quantized:
        return False
    if tensor.layout != torch.strided:
        tensor = tensor._values() if tensor.is_sparse else tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        tensor = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    is_cut = tensor.device.type == 'cpu' and tensor.is_contiguous()
    for piece in tensor.view(-1).split(PIECE) if is_cut else [tensor]:
        lowest, highest = (piece.float() if piece.element_size() == 1 else piece).aminmax()  # float8 has none
        if math.isnan(lowest) or not or_infinite and not (math.isfinite(lowest) and math.isfinite(highest)):
            return False
    return True


def kind_of(tensor):
    return tensor.is_floating_point(), tensor.is_complex()


def words(value):
    """'float32 of shape (2, 3)', or the type of what is no tensor."""
    if isinstance(value, torch.Tensor):
        return f'{str(value.dtype).removeprefix("torch.")} of shape {tuple(value.shape)}'
    return f'of type {type(value).__name__}'
