"""Experiment 4: warmup and decay, each alone, both, and neither; three seeds, since the differences are small."""

config = 'config/train_shakespeare_char_cpu.py'
dtype = 'float32'  # as its table was made
max_iters = 1000
eval_interval = 100
seeds = 3

variants = {
    'neither': {'warmup_iters': 0, 'decay_lr': False},
    'warmup alone': {'warmup_iters': 100, 'decay_lr': False},
    'decay alone': {'warmup_iters': 0, 'decay_lr': True},
    'both': {'warmup_iters': 100, 'decay_lr': True},
}
