"""
Before any training: one micro-step and the model are shown, what makes this run fastest is chosen by the time that such
a micro-step takes, and what a step and the run will be is told.
"""

import math
import os
import time
from functools import partial

import torch

from kit.base import devices, ranks
from kit.base.errors import reason
from kit.data import tokens
from kit.run import fitting, memory
from kit.watch import diagnosis, evaluation
from kit.watch.journal import duration

PASSES = 4                # with one and with all threads are timed at most, in turn: other work comes and goes
LONG_PASS = 0.5           # seconds: one will do
CLEAR = 1.3               # times as long is a difference that needs no more of them
THREADS_BELOW_FLOPS = 2e10  # of a pass; in longer ones threads seldom wait for each other, and the look would take long
ONE_IS_FASTER = 0.9       # of the time with all threads: what one must take, so that no chance decides
COMPILED_IS_FASTER = 0.95  # of the time without: what compiled code must take, to be kept where nobody asked for it


def show(s, model, raw_model, batch, meta, micro_steps, device, dtype, is_new):
    """
    Show one micro-step, batch = (x, y, documents), (B, T) each, before any training: shapes, a piece of the text, and
    whether a new model's first loss is that of a fair guess, ln(vocab_size). s: the settings; model is raw_model as it
    will be trained. From here on an error for want of memory is explained by the plan.
    """
    (x, y, documents), c = batch, raw_model.config
    what, how = memory.sizes(raw_model), fitting.setup(s, x.numel(), micro_steps, device, dtype)
    takes = fitting.in_words(memory.total(what, how))
    fitting.explain(s['batch_size'] * s['gradient_accumulation_steps'], what, how, device)
    print(f'model: {raw_model.count_params() / 1e6:.2f}M parameters in {c.n_layer} layers of {c.n_head} heads and '
          f'{c.n_embd} channels; training takes about {takes} of memory beside the program')
    n_targets = int((y >= 0).sum())
    print(f'one micro-step: x {tuple(x.shape)}, y {tuple(y.shape)}; y is '
          + ('x moved on by one token' if c.causal else 'what x hides, at its own place')
          + (f', and -1 where nothing is to be learned: {n_targets:,} targets' if n_targets < y.numel() else ''))
    if documents is not None:
        why = ('FlexAttention is for rows of more than 128 tokens, heads of 16 channels or more, and no dropout'
               if x.is_cuda else f'the choice on {device.type}')
        print('attention within documents: ' + (
            'FlexAttention, with a block mask; in evaluations a dense one' if raw_model.is_sparse(device, x.size(1))
            else f'a dense mask ({why})'))
    try:
        text = tokens.tokenizer(meta['tokenizer'])
        for name, ids in ('x', x[0, :40].tolist()), ('y', y[0][y[0] >= 0][:40].tolist()):
            print(f'  {name}[0] = {ids[:6]}... = {tokens.decode(text, ids)!r}...')
    except OSError:
        print(f'  x[0] = {x[0, :16].tolist()}... (the files of the tokenizer could not be downloaded)')
    _, first_loss = one_pass(model, raw_model, batch, device, dtype)
    guess = math.log(c.vocab_size)
    print(f'first loss: {first_loss:.4f}; a fair guess among {c.vocab_size:,} ids would have {guess:.4f}')
    if is_new and not abs(first_loss - guess) < diagnosis.FIRST_LOSS_OFF:
        print('WARNING: a new model should start near a fair guess; look at the initialisation and at the data')


def one_pass(model, raw_model, batch, device, dtype):
    """(seconds, loss) of a pass forward and backward, which changes nothing."""
    buffers = [buffer.clone() for buffer in raw_model.buffers()]
    start = time.perf_counter()
    try:
        with devices.autocast(device, dtype):
            _, loss = model(*batch, loss_alone=True)
        loss.backward()
        devices.synchronize(device)
        return time.perf_counter() - start, loss.item()
    finally:
        model.zero_grad(set_to_none=True)  # before the next: CUDA graphs cannot add to a gradient
        for buffer, before in zip(raw_model.buffers(), buffers):
            buffer.copy_(before)


def choose(s, model, raw_model, batch, micro_steps, n_steps, device, dtype):
    """
    Choose, for a run that has n_steps to make, with how many threads a CPU computes, and whether the model is compiled,
    which is done in place. Both are put into s, the settings, so that a resume computes as before. To be called once
    the model has made a pass. Returns the seconds of a step, without its update.
    """
    timed = partial(one_pass, model, raw_model, batch, device, dtype)
    flops = raw_model.flops_per_token() * batch[0].numel()
    if device.type == 'cpu':
        choose_threads(s, timed, flops)
    seconds = seconds_of(timed)
    whole_run = 60 * s['max_minutes'] if s['max_minutes'] and not s['find_lr'] else seconds * micro_steps * n_steps
    is_compiled, why = devices.choose_compile(s['compile'], device, whole_run)
    if is_compiled:
        parts = raw_model.blocks() if ranks.is_fsdp else [raw_model]  # what is gathered for a part stays outside
        mode = devices.choose_compile_mode(s['compile_mode'], device, flops, micro_steps)
        try:
            for part in parts:
                part.compile(mode=mode)
            for _ in range(2):  # compiles, then records a CUDA graph; no clock counts this as a step's
                timed()
            evaluation.warm_up(raw_model, *batch, device, dtype)
            compiled = seconds_of(timed)
        except Exception as error:  # there is no C++ compiler, no Triton, or an operation is too new for them
            if ranks.world_size > 1:
                raise  # the others may have no error, and wait in this pass: torchrun ends them
            is_compiled, why = False, f'that failed: {reason(error)}'
        else:
            why += f'; a pass takes {1000 * compiled:.1f}ms, {1000 * seconds:.1f}ms without'
            is_compiled = s['compile'] is not None or compiled < COMPILED_IS_FASTER * seconds
            seconds = compiled if is_compiled else seconds
        if not is_compiled:
            for part in parts:
                part._compiled_call_impl = None  # takes compile() back; torch has no other way for a single model
            torch.compiler.reset()
    print(f'compile: {is_compiled} ({why})')
    s['compile'] = is_compiled
    return seconds * micro_steps


def choose_threads(s, timed, flops):
    """
    Choose s['threads'] where that is 0, and print it: all that torch takes, or one, where several wait for each other,
    as they do on a machine with other work. flops: of a pass.
    """
    n, why = torch.get_num_threads(), devices.who_chose('threads') if s['threads'] else 'all there are'
    if not s['threads'] and os.environ.get('OMP_NUM_THREADS'):
        why = 'OMP_NUM_THREADS'
    elif not s['threads'] and n > 1 and ranks.world_size == 1 and flops < THREADS_BELOW_FLOPS:
        in_ms(timed, threads=1)  # the first with another number is slow: oneDNN makes its kernels anew
        several = one = 0.0
        n_passes = 0
        while n_passes < PASSES and max(one, several) <= CLEAR * min(one, several):
            one += in_ms(timed, threads=1)
            several += in_ms(timed, threads=n)
            n_passes += 1
        why = f'a pass takes {several / n_passes:.1f}ms with {n}, {one / n_passes:.1f}ms with one'
        n = 1 if one < ONE_IS_FASTER * several else n
        torch.set_num_threads(n)
    print(f'threads: {n} ({why})')
    if ranks.world_size == 1:  # how many one of several has says nothing of one alone
        s['threads'] = n


def in_ms(timed, threads):
    torch.set_num_threads(threads)
    return 1000 * timed()[0]


def seconds_of(timed):
    """The seconds of a pass, as rank 0 has them; of two where it is short, the shorter: other work only adds."""
    mine, _ = timed()
    seconds = ranks.from_main(lambda: mine)
    if seconds > LONG_PASS:
        return seconds
    mine, _ = timed()
    return min(seconds, ranks.from_main(lambda: mine))


def plan(s, step, warmup, seconds, steps_per_epoch, data):
    """What a step and the run will be; s: the settings, seconds: of a step, data: the Rows of train."""
    rows, n, length = s['batch_size'] * s['gradient_accumulation_steps'], s['max_iters'], data.mean_length
    print(f'a step: {s["batch_size"]} rows x {s["gradient_accumulation_steps"]} micro-steps x '
          f'{f"{length:.1f} (on average)" if length % 1 else int(length)} tokens = {round(rows * length):,} tokens'
          + (f', shared out over {ranks.world_size} processes' if ranks.world_size > 1 else ''))
    if s['max_minutes']:
        print(f'the run: {s["max_minutes"]:g} minutes, counted from the start of the program')
        return
    print(f'the run: {n:,} steps = {n / steps_per_epoch:.2f} epochs of {data.n_tokens:,} tokens, about '
          f'{duration(seconds * max(0, n - step))} without evaluations')
    if warmup >= n:
        print(f'warmup_iters = {warmup} is not below max_iters = {n}: the rate climbs to the end')
    if step >= n:
        print(f'all {n:,} steps are made; a higher --max_iters goes on')
