"""The learning rate of rate_grid.py, looked for by Optuna, which ends runs that are not worth their steps."""

config = 'config/train_shakespeare_char_cpu.py'
dtype = 'float32'  # as its table was made
max_iters = 400
eval_interval = 50
min_lr = 1e-5

method = 'bayes'
learning_rate = log_uniform(1e-4, 1e-1)
max_runs = 12
