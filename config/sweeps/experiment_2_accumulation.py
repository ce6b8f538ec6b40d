"""Experiment 2: 12 rows at once, and 4 micro-steps of 3 rows; without dropout, and with it as the guide has it."""

config = 'config/train_shakespeare_char_cpu.py'
dtype = 'float32'  # as its table was made
max_iters = 500
eval_interval = 50

dropout = [0.0, 0.2]
variants = {
    '12 x 1': {'batch_size': 12, 'gradient_accumulation_steps': 1},
    '3 x 4': {'batch_size': 3, 'gradient_accumulation_steps': 4, 'eval_iters': 80},  # the same rows are evaluated
}
