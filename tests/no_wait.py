"""A mode in which whatever would make the host wait for a GPU raises: how a CPU shows that nothing does."""

from contextlib import ExitStack

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ASK_THE_DEVICE = {'_local_scalar_dense', 'is_nonzero', 'equal', 'nonzero', 'masked_select', '_unique2', 'bincount'}
COPY_TO_THE_HOST = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__bool__,
                    torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__format__}


class Waits(Exception):
    pass


class Operations(TorchDispatchMode):
    """What torch calls by itself, too: bool(), float() and numbers that an operation takes from a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ('index', 'index_put_') and any(
            index is not None and index.dtype == torch.bool for index in args[1])
        if name in ASK_THE_DEVICE or by_mask:
            raise Waits(f'the host would wait: {function}')
        return function(*args, **kwargs or {})


class Calls(TorchFunctionMode):

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in COPY_TO_THE_HOST:
            raise Waits(f'the host would wait: {function.__name__}')
        return function(*args, **kwargs or {})


class NoWait:

    def __enter__(self):
        self.modes = ExitStack()
        self.modes.enter_context(Calls())
        self.modes.enter_context(Operations())

    def __exit__(self, *error):
        self.modes.close()
