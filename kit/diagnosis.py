"""What the figures of a run say, in words. Floats in, words out; no torch."""

import statistics


def spike(recent, loss):
    """Words where a loss stands far above the ones before it, else ''. recent: the losses logged last."""
    if len(recent) < 10:
        return ''
    middle = statistics.median(recent)
    spread = statistics.median(abs(value - middle) for value in recent)
    if loss <= middle + max(8 * spread, 0.1 * middle):  # 8 of these are 5.4 standard deviations
        return ''
    return f'a loss spike: {loss:.4f}, where the {len(recent)} before it had about {middle:.4f}'


def bad_numbers(step, in_a_row, learning_rate, dtype):
    """Why a run stops that meets nothing but bad numbers, and what may help."""
    return (f'stopped at step {step}: the loss or the gradient of {in_a_row} steps in a row was not finite, for the '
            'second time and with other text. '
            f'What helps: a lower learning_rate (it is {learning_rate:g}), more warmup_iters, a grad_clip of 1.0, '
            + ('dtype = bfloat16 or float32, ' if dtype == 'float16' else '') + 'a look at the data')
