"""
inspect_step: a step of an earlier run is made again, from the checkpoint before it and with the rates of its log. Shown
are its texts, the costliest first, and its figures beside those of the log.
"""

import math

import numpy as np

from kit.base import overrides, ranks
from kit.data import tokens
from kit.learn import gradients
from kit.state import checkpoints
from kit.watch import evaluation, runlogs
from kit.watch.diagnosis import History

ROWS_SHOWN, EXCERPT = 8, 160  # rows, and tokens of a long one
AROUND, LINES_AROUND = 51, 11  # updates that it is compared with, and iter lines, itself among them
# of a loss, where sums differ from one time to the next: in the default run noise of 1e-6 in every gradient grows to it
# in 300 steps, in bfloat16 in 50 to 100; the loss of another text is 2e-2 away at once (docs/log.md)
ROUNDING = 1e-3


def run(update, get_lr, s, state, past, model, data, meta, device, dtype):
    """
    Make the steps from that of the RunState on up to inspect_step, with the rates of the log, and show that one.

    update, get_lr: of train.py; s: its settings; past: the History of the run; model: not wrapped; data: the Rows of
    train.
    """
    last, rows_per_step = s['inspect_step'], s['batch_size'] * s['gradient_accumulation_steps']
    for step in range(state.step, last + 1):
        rewinds, lr = past.at('rewinds', step), past.exactly('lr', step, get_lr(step))
        if 0 <= rewinds <= step:  # a log may be damaged
            state.rewinds = max(state.rewinds, int(rewinds))  # so often the run had gone back by then
        if step == last:
            rows, noise, _ = data.of_step(rows_per_step, s['seed'], step, s['sampling'], state.rewinds)
            show_rows(model, data, rows, noise, meta, device, dtype)
            weights = gradients.sample(model)
        figures, norms = update(step, lr if math.isfinite(lr) else get_lr(step))  # as it was, whatever had made it so
        if step == state.step:
            first_off = abs(float(figures['loss']) - past.exactly('loss', step, math.nan))
    plain = {name: float(figures[name]) for name in ('loss', 'grad_norm', 'lr')}
    layers = gradients.by_layer(model, gradients.moves(model, norms, weights).cpu())
    show_step(past, last, plain | layers, device.type == 'cpu' or s['deterministic'], first_off)


def find_past(out_dir, step):
    """
    Where a replay of a step of the run in out_dir begins: (init_from, path, checkpoint, settings, history), the newest
    checkpoint up to that step or, where none is whole, where the run began. The settings are those that the step was
    made with: a checkpoint from after it has them, else the last launch.
    """
    def look():
        kept = {checkpoints.peek(path).get('iter_num', -1): path for path in checkpoints.candidates(out_dir)}
        history = History()
        runlogs.read_records(out_dir, history)
        made = max([*kept, *(history.get('loss')[0] + 1)])
        after = [number for number in kept if number > step]
        settings = checkpoints.peek(kept[min(after)]).get('config') if after else (
            runlogs.read_config(out_dir)['settings'])
        if made < 0 or not settings:
            overrides.fail(f'{out_dir} holds no run; --out_dir=FOLDER names one')
        if not all(isinstance(settings.get(name, ''), str) for name in ('init_from', 'weights')):
            overrides.fail(f'{out_dir}: init_from or weights of this run is no text, so nobody knows how it began; '
                           'config.json there is damaged')
        if step >= made:
            overrides.fail(f'inspect_step = {step}: the run in {out_dir} has made the steps 0 to {made - 1}')
        return settings, history
    settings, history = ranks.from_main(look)
    path, saved = checkpoints.before(out_dir, step + 1)
    if saved:
        return 'resume', path, saved, settings, history
    print(f'no checkpoint from before step {step} is there: all is replayed, from the first')
    begin = settings.get('init_from')
    return 'scratch' if begin in (None, 'auto', 'resume') else begin, None, {}, settings, history


def show_rows(model, data, rows, noise, meta, device, dtype):
    """
    The rows of a step as text: the costliest first, their costliest targets in [[ ]]. data: the Rows of train; rows,
    noise: what they draw for the step.
    """
    x, y, documents = data.fetch(rows, noise)
    losses = evaluation.token_losses(model, x, y, documents, device, dtype)  # (n, T), 0 where none counts
    means = losses.sum(axis=1) / (y >= 0).sum(axis=1)
    order = means.argsort()[::-1]
    shift = 0 if data.is_mlm else 1  # a target stands behind its input, or in its place
    ids = np.where(y >= 0, y, np.roll(x, -shift, axis=1))
    ids = np.concatenate([x[:, :shift], ids], axis=1)  # (n, T + shift): the text
    print(f'the {len(rows)} rows of this step, by their loss before the update (nats a token, without dropout)'
          + (f'; the first {ROWS_SHOWN}' if len(rows) > ROWS_SHOWN else ''))
    try:
        text = tokens.tokenizer(meta['tokenizer'])
        decode = lambda ids: tokens.decode(text, ids)
    except OSError:
        decode = lambda ids: ''.join(f' {i}' for i in ids)
    for place, i in enumerate(order[:ROWS_SHOWN], 1):
        own = losses[i, :data.lengths(rows[i:i + 1])[0]]
        worst = set(own.argsort()[::-1][:min(3, (y[i] >= 0).sum())] + shift)
        # of a long row the part with the highest loss
        length = min(EXCERPT, len(own))
        first = int(np.convolve(own, np.ones(length), 'valid').argmax())
        piece = ''.join(f'[[{word}]]' if t in worst else word for t in range(first, first + length + shift)
                        for word in [repr(decode([int(ids[i, t])]))[1:-1]])
        told = ', '.join(f'{decode([int(ids[i, t])])!r} {losses[i, t - shift]:.2f}' for t in sorted(worst))
        print(f'{place:3}. loss {means[i]:.4f}, {data.where(rows[i])} of train: {piece}\n     costliest: {told}')


def show_step(past, step, figures, is_exact, first_off):
    """
    What a replayed step did: each figure beside what the log says, and the median of the steps around it. is_exact:
    whether this device makes a step again bit for bit; first_off: by how much the first loss of the replay differs.
    """
    print(f'step {step}, replayed:')
    print(f'  {"":22} {"here":>12} {"logged":>12} {"median around":>14}')
    for name, value in figures.items():
        steps, values = past.get(name)
        near = np.abs(steps - step).argsort(kind='stable')[:AROUND if '/' not in name else LINES_AROUND]
        others = values[near][steps[near] != step]
        others = others[np.isfinite(others)]
        logged = values[steps == step]
        print(f'  {name:22} {value:12.5g} ' + (f'{logged[0]:12.5g} ' if len(logged) else f'{"-":>12} ')
              + (f'{np.median(others):14.5g}' if len(others) else f'{"-":>14}'))
    steps, values = past.get('loss')
    logged = values[steps == step]
    if not len(logged):
        print('the log does not hold the loss of this step')
    elif logged[0] == figures['loss'] or math.isnan(logged[0]) and not math.isfinite(figures['loss']):
        print('the loss is the logged one, bit for bit: this is what happened')
    elif not is_exact and math.isclose(logged[0], figures['loss'], rel_tol=ROUNDING):
        print(f'the loss is the logged one to rounding, it differs by {abs(logged[0] - figures["loss"]):.2g}: this is '
              'what happened, as near as a GPU makes it again without --deterministic')
    else:
        is_known = math.isfinite(first_off) and not is_exact
        rounding = f'; or rounding, which grows: its first step here was {first_off:.2g} off' if is_known else ''
        print(f'WARNING: the loss is not the logged one, it differs by {abs(logged[0] - figures["loss"]):.2g}: another '
              'text by that name, device, number of processes, version of this code, or weights that have changed '
              f'where the run began{rounding}')
