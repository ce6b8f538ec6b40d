"""Before any training: one micro-step and the model are shown, and what a step and the run will be."""

import math
import time

import torch

from kit.base import devices
from kit.data import tokens
from kit.watch import diagnosis, evaluation
from kit.watch.journal import duration


def show(model, raw_model, x, y, documents, meta, device, dtype, from_scratch, is_compiled):
    """
    Show one micro-step, (B, T) each, before any training: shapes, a piece of the text, and whether a new model's first
    loss is that of a fair guess, ln(vocab_size). model is raw_model as it will be trained, wrapped and compiled: what
    is compiled here is what the training and its evaluations run, so that no clock counts it as theirs. Returns the
    seconds of one pass forward and backward.
    """
    c, n_params = raw_model.config, raw_model.count_params()
    memory = raw_model.training_memory(x.numel(), dtype, device)
    print(f'model: {n_params / 1e6:.2f}M parameters in {raw_model.in_words()}; training takes about '
          f'{memory / 2**30:.2f} GiB of memory beside the program')
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
    seconds, first_loss = [], None
    buffers = [buffer.clone() for buffer in raw_model.buffers()]  # a look changes nothing
    for _ in range(2):  # the first pass warms up
        start = time.perf_counter()
        with devices.autocast(device, dtype):
            _, loss = model(x, y, documents, loss_alone=True)
        loss.backward()
        devices.synchronize(device)
        seconds.append(time.perf_counter() - start)
        first_loss = first_loss or loss.item()
        model.zero_grad(set_to_none=True)  # before the next: CUDA graphs cannot add to a gradient
    if is_compiled:
        with evaluation.evaluating(raw_model), torch.no_grad(), devices.autocast(device, dtype):
            raw_model(x, y, documents)
    for buffer, before in zip(raw_model.buffers(), buffers):
        buffer.copy_(before)
    guess = math.log(c.vocab_size)
    print(f'first loss: {first_loss:.4f}; a fair guess among {c.vocab_size:,} ids would have {guess:.4f}')
    if from_scratch and not abs(first_loss - guess) < diagnosis.FIRST_LOSS_OFF:
        print('WARNING: a new model should start near a fair guess; look at the initialisation and at the data')
    return min(seconds)


def plan(s, step, warmup, seconds, steps_per_epoch, data):
    """What a step and the run will be; s: the settings, seconds: of a step, data: the Rows of train."""
    rows, n, length = s['batch_size'] * s['gradient_accumulation_steps'], s['max_iters'], data.mean_length
    print(f'a step: {s["batch_size"]} rows x {s["gradient_accumulation_steps"]} micro-steps x '
          f'{f"{length:.1f} (on average)" if length % 1 else int(length)} tokens = {round(rows * length):,} tokens')
    if s['max_minutes']:
        print(f'the run: {s["max_minutes"]:g} minutes, counted from the start of the program')
        return
    print(f'the run: {n:,} steps = {n / steps_per_epoch:.2f} epochs of {data.n_tokens:,} tokens, about '
          f'{duration(seconds * max(0, n - step))} without evaluations')
    if warmup >= n:
        print(f'warmup_iters = {warmup} is not below max_iters = {n}: the rate climbs to the end')
    if step >= n:
        print(f'all {n:,} steps are made; a higher --max_iters goes on')
