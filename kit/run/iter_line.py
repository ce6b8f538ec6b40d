"""The iter line: what a step was, printed, and recorded with the updates since the last one."""

import math
from functools import partial

import torch

from kit.base import devices, ranks
from kit.learn import gradients
from kit.run.clock import FIRST_STEPS
from kit.watch.journal import duration, short

MUCH_SLOWER = 2.5  # times what the plan has,
UPDATE = 0.05      # seconds, and what it leaves out: the update, which takes as long as the rest in a tiny model


class IterLine:
    """
    model: not wrapped; journal, clock, due, bad_steps: the Journal, Clock, Due and gradients.BadSteps of the run;
    tokens_per_step: without padding; planned: seconds of a step, without its update, as the plan has it.
    """

    def __init__(self, model, journal, clock, due, bad_steps, tokens_per_step, steps_per_epoch, planned, device, dtype):
        self.model, self.journal, self.clock, self.due, self.bad_steps = model, journal, clock, due, bad_steps
        self.tokens_per_step, self.steps_per_epoch, self.planned = tokens_per_step, steps_per_epoch, planned
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
        if self.clock.steps > FIRST_STEPS and seconds > MUCH_SLOWER * self.planned + UPDATE:
            has_threads = self.device.type == 'cpu' and torch.get_num_threads() > 1
            times = f'{seconds / self.planned:.1f} times as long as planned'
            print(f'WARNING: a step takes {seconds * 1000:.1f}ms, {times}, {data_seconds * 1000:.1f}ms of that for '
                  'its batch. Is other work on this machine?'
                  + (' Then --init_from=resume --threads=1 may go on faster' if has_threads else ''))
            self.planned = math.inf  # said once
