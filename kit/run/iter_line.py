"""The iter line: what a step was, printed, and recorded with the updates since the last one."""

from functools import partial

import torch

from kit.base import devices, ranks
from kit.learn import gradients
from kit.watch.journal import duration, short


class IterLine:
    """
    model: not wrapped; journal, clock, due, bad_steps: the Journal, Clock, Due and gradients.BadSteps of the run;
    tokens_per_step: without padding.
    """

    def __init__(self, model, journal, clock, due, bad_steps, tokens_per_step, steps_per_epoch, device, dtype):
        self.model, self.journal, self.clock, self.due, self.bad_steps = model, journal, clock, due, bad_steps
        self.tokens_per_step, self.steps_per_epoch = tokens_per_step, steps_per_epoch
        self.flops_per_step = model.flops_per_token() * tokens_per_step  # forward and backward
        self.device, self.dtype = device, dtype

    def take(self, step, figures, norms, weights):
        """
        A step whose figures and norms update() has given; weights: a sample of them from before it. Its line is shown
        at once; where the host runs ahead, when the device has the next step to do, so that it is not idle meanwhile.
        """
        is_late, pace = devices.runs_ahead(self.device), None
        if not is_late:
            devices.synchronize(self.device)
            pace = self.clock.pace()
        n_bad, bad_norms = self.bad_steps.take()
        moves = gradients.moves(self.model, norms, weights)
        numbers = devices.fetch(torch.cat([figures['loss'][None], figures['grad_norm'][None], n_bad[None],
                                           moves.flatten()]))
        self.journal.later(partial(self.show, step, figures['lr'], numbers, bad_norms, pace))
        if not is_late:
            self.journal.catch_up()
            self.clock.took('step', n=0)

    def show(self, step, lr, numbers, bad_norms, pace):
        """numbers(): waits for the step and gives what was taken of it; pace: None where it is read behind that."""
        loss, grad_norm, n_bad = numbers()[:3].tolist()
        seconds, data_seconds = pace or self.clock.pace()
        tokens_per_second, epoch = self.tokens_per_step / seconds, (step + 1) / self.steps_per_epoch
        mfu = self.flops_per_step / seconds / (devices.peak_flops(self.device, self.dtype) * ranks.world_size)
        eta = seconds * (self.due.max_iters - step - 1) if self.due.is_fitted else self.clock.left()
        print(f'iter {step}: loss {loss:.4f}, time {seconds * 1000:.2f}ms, mfu {mfu:.2%}, lr {lr:.1e}, '
              f'norm {grad_norm:.2f}, {short(tokens_per_second)} tok/s, eta {duration(eta)}, epoch {epoch:.2f}')
        self.journal.read({
            'time_ms': seconds * 1000, 'data_ms': data_seconds * 1000, 'tokens_per_second': tokens_per_second,
            'mfu': mfu, 'epoch': epoch, 'bad_steps': int(n_bad),
        } | gradients.by_layer(self.model, numbers()[3:].reshape(-1, 3)) | devices.usage(self.device))
        self.bad_steps.warn(step, int(n_bad), bad_norms)
