"""Twelve learning rates, evenly spread over three decades, for the small Shakespeare model: 400 steps each."""

config = 'config/train_shakespeare_char_cpu.py'
dtype = 'float32'  # as its table was made
max_iters = 400
eval_interval = 50
min_lr = 1e-5

method = 'grid'
learning_rate = [float(f'{1e-4 * 1000 ** (_i / 11):.3g}') for _i in range(12)]
