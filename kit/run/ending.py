"""The end of a run: why it ends, what came of it, what is worth typing next."""

import math
import os
import shlex
from pathlib import Path

from kit.base import overrides, ranks, signals
from kit.base.errors import reason
from kit.run.due import BAD_STEPS
from kit.state import checkpoints, shards
from kit.watch import diagnosis, samples

AVERAGED = 5  # checkpoints that checkpoint_averaging.py takes where it is not told how many


def finish(due, clock, s, model, data, meta, journal, device, dtype):
    """
    Say why a run ends and what came of it; returns the exit status. due, clock: of its last step; s: the settings;
    model: with the weights that are evaluated; data: the Rows of val; journal: of the run.
    """
    step, out_dir = due.state.step, s['out_dir']
    if due.end in signals.STOP:
        show_how_to_go_on(due.end, step, s)
        return signals.status(due.end)
    signals.obey()
    # not where a signal came: who sends it waits for some seconds only
    journal.show('checkpoints', out_dir, lambda: {path: shards.folders_in(path) for path in shards.files_of(out_dir)})
    if due.end == BAD_STEPS:
        print(stopped_by_bad_numbers(step, int(due.state.bad_steps[0]), s['learning_rate'], dtype))
        return 1
    show_why(due, out_dir, model)
    print(clock.in_words())
    if ranks.is_main:
        try:
            if not ranks.is_fsdp:  # in each pass of a model in parts all processes would have to take part
                samples.show(model, data, meta, device, dtype)
        except Exception as error:  # the verdict is worth more, and a model that went astray may not write
            print(f'no sample: {reason(error)}')
        print('\n'.join(diagnosis.verdict(journal.history)))
        is_sound = all(map(math.isfinite, journal.history.get('val/loss', 1)[1]))
        show_next_commands(out_dir, model.config.causal, is_sound)
    return 0 if due.is_saved else 1  # 1: the last state could not be saved


def stopped_by_bad_numbers(step, in_a_row, learning_rate, dtype):
    """Why a run stops that meets nothing but bad numbers, and what may help."""
    return (f'stopped at step {step}: the loss or the gradient of {in_a_row} steps in a row was not finite, for the '
            'second time and with other text. '
            f'What helps: a lower learning_rate (it is {learning_rate:g}), more warmup_iters, a grad_clip of 1.0, '
            + ('dtype = bfloat16 or float32, ' if dtype == 'float16' else '') + 'a look at the data')


def show_why(due, out_dir, model):
    """Why a run ends before its last step. After an early stop the model gets the weights of best.pt again."""
    path, step = Path(out_dir) / 'best.pt', due.state.step
    if due.why:
        print(due.why)
        try:
            if path.exists():
                checkpoints.fill(model, checkpoints.weights(checkpoints.read(path)))
                print(f'the weights are those of {path} again')
            else:
                print('no state was better than that of step 0, and none was kept as best.pt')
        except checkpoints.Damaged as error:
            print(f'WARNING: {error}; the weights stay those of the last step')
    elif not due.is_fitted:
        print(f'max_minutes: the time is up after {step:,} steps, before the speed was measured')
    elif step < due.max_iters:
        print(f'max_minutes: the time is up after {step:,} of {due.max_iters:,} steps; --init_from=resume makes the '
              'others')


def show_how_to_go_on(signal, step, s):
    """What a run says that a signal has stopped. s: the settings."""
    where = '' if s['out_dir'] == 'checkpoints' else f' --out_dir={shlex.quote(s["out_dir"])}'
    start = 'python'
    if ranks.world_size > 1:  # with what a resume does not take over
        is_one_node = ranks.variable('LOCAL_WORLD_SIZE', 1) == ranks.world_size
        start = f'torchrun {f"--standalone --nproc_per_node={ranks.world_size}" if is_one_node else "..."}'
        where += ''.join(f' --{name}={s[name]}' for name in ('parallel', 'cpu_offload', 'sharded')
                         if name in overrides.given)
    saved = checkpoints.peek(Path(s['out_dir']) / 'ckpt.pt').get('iter_num', 0)
    if saved:
        print(f'{signal}: stopped after {step} steps; this goes on '
              f'{"as if it had not been" if saved == step else f"after step {saved}, the last that was saved"}:\n'
              f'  {start} train.py{where} --init_from=resume')
    else:
        print(f'{signal}: stopped after {step} steps; there is nothing to go on from yet')


def show_next_commands(out_dir, can_write, is_sound):
    """What is worth typing after a run, and works. is_sound: whether its last state has a loss."""
    name = shlex.quote(out_dir)
    where, run, average = ('', '', '') if out_dir == 'checkpoints' else (
        f' --out_dir={name}', f' {name}', f' --checkpoint_dir={name}')
    has_best, has_last = (os.path.isfile(Path(out_dir) / name) for name in ('best.pt', 'ckpt.pt'))
    can_be_used = has_best or has_last and is_sound
    paths, steps = checkpoints.candidates(out_dir), set()
    if len(paths) >= AVERAGED:  # else none has to be read
        steps = {checkpoints.peek(path).get('iter_num') for path in paths} - {None}
    print('next:')
    if can_write and can_be_used:
        print(f'  python sample.py{where} --num_samples=3      more of its writing, after a --start of yours')
    print(f'  python plot_loss.py{run}      the loss curve as a picture')
    if can_be_used:
        print(f'  python train.py --test{where}      loss, perplexity and accuracy on the test split')
    if len(steps) >= AVERAGED and is_sound:
        print(f'  python checkpoint_averaging.py{average}      the last checkpoints as one, which may be better than '
              'any')
