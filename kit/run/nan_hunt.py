"""
debug_nan: the first bad number of a run, and what made it: the text, an operation of the forward or the backward pass,
or what comes behind them. The step is made again, which is possible since it is a function of the state before it.
"""

import torch
from torch.overrides import TorchFunctionMode

from kit.base import devices, ranks
from kit.base.errors import fail
from kit.data import batches
from kit.learn import gradients


def watched(get_batch, update, model, bad_steps, scaler, micro_steps, seed, leave, device, dtype):
    """
    (get_batch, update) of train.py, which look at what they have made: at a bad number they say where it came from and
    end the script. model: not wrapped; bad_steps: a gradients.BadSteps. Both wait for the device.
    """
    if ranks.is_fsdp:
        fail('debug_nan = True: each process looks for itself, and passes of a model in parts take all of them; '
             '--parallel=ddp, or one process')
    def get_checked(split, step, micro_step):
        batch = get_batch(split, step, micro_step)
        found = ranks.from_all(wrong_ids(*batch[:2], model.config.vocab_size))
        for rank, words in enumerate(found):
            if words:
                print(f'{who(step, rank)}, micro-step {micro_step}: the data: {words}')
        if any(found):
            leave(1)
        return batch

    def update_checked(step, lr):
        figures, norms = update(step, lr)
        if bad_steps.is_bad:
            at_fault = gradients.at_fault(model, norms)
            devices.seed(device, batches.torch_seed(seed, step, ranks.rank))
            found = make_again(model, (get_batch('train', step, i) for i in range(micro_steps)), scaler,
                               device, dtype)
            for rank, words in enumerate(ranks.from_all(found)):
                print(f'{who(step, rank)}: '
                      + (words or 'made again, its forward and backward pass give no bad number: what comes behind '
                                  f'them does, or what is compiled. {at_fault}'))
            leave(1)
        return figures, norms

    def who(step, rank):
        return f'debug_nan: step {step}' + (f', rank {rank}' if ranks.world_size > 1 else '')

    return get_checked, update_checked


def wrong_ids(x, y, vocab_size):
    """Words for ids in a batch that the model does not know; '' where it knows all."""
    for name, ids, lowest in ('x', x, 0), ('y', y, -1):
        wrong = ((ids < lowest) | (ids >= vocab_size)).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            return (f'{name}[{row}, {column}] is the id {ids[row, column]}, and the model knows 0 to {vocab_size - 1}; '
                    f'{len(wrong)} such in {name}')
    return ''


def make_again(model, micro_batches, scaler, device, dtype):
    """Words for where the first bad number of a step comes up: weights, forward, loss or backward; '' for nowhere."""
    for name, p in model.named_parameters():
        if bad := gradients.count_bad(p.detach()):
            return f'the weights: parameter {name} held {bad} before the step'
    model.zero_grad(set_to_none=True)
    for micro_step, (x, y, documents, parts) in enumerate(micro_batches):
        watch = Watch(model)
        with watch:
            with devices.autocast(device, dtype):
                _, loss = model.forward(x, y, documents, loss_alone=True)  # not what torch.compile made of it
            scaler.scale(loss / parts).backward()
        watch.close()
        if watch.found:
            return f'micro-step {micro_step}: {watch.found}'
    return ''


class Watch(TorchFunctionMode):
    """While it is entered, looks at all that the operations of a model give, forward and backward, for NaN and Inf."""

    def __init__(self, model):
        super().__init__()
        self.found = ''  # words for the first bad number
        self.inside = []  # the modules that are at work, the innermost last
        self.readers = {}  # id of a tensor: the place that read it
        self.kept = []  # all tensors, so that no id comes twice
        self.hooks = []
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.hooks.append(p.register_hook(self.look_back(f'parameter {name}', p)))
        for name, module in model.named_modules():
            self.hooks += [module.register_forward_pre_hook(lambda *_, name=name: self.inside.append(name)),
                           module.register_forward_hook(self.leave)]

    def leave(self, *_):
        self.inside.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.found or not isinstance(out, torch.Tensor) or not out.is_floating_point():
            return out
        place = func.__name__ + (f' in {self.inside[-1] or "the model"}' if self.inside else '')
        place += ' (the loss)' if out.dim() == 0 else ''
        self.readers |= {id(tensor): place for tensor in args if isinstance(tensor, torch.Tensor)}
        self.kept.append(out)
        with torch._C.DisableTorchFunctionSubclass():
            if bad := gradients.count_bad(out):
                self.found = f'the forward pass: what {place} gave holds {bad}; all numbers before were finite'
            elif out.requires_grad:
                out.register_hook(self.look_back(f'what {place} gave', out))
        return out

    def look_back(self, place, tensor):
        def look(gradient):
            if not self.found and (bad := gradients.count_bad(gradient)):
                reader = self.readers.get(id(tensor))
                self.found = f'the backward pass: the gradient of {place} holds {bad}' + (
                    f'; it came back through {reader}' if reader else '')
        return look

    def close(self):
        for hook in self.hooks:
            hook.remove()
