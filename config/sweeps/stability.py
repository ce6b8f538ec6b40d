"""
Stability: what clipping, warmup and decay do at rates that are far too high, and whether a rate that gives way to the
gradient norm helps. Ten seeds each. A run has diverged that ends above the loss of a fair guess.
"""

config = 'config/train_shakespeare_char_cpu.py'
dtype = 'float32'  # as its table was made
n_head = 2
n_embd = 64
block_size = 32
batch_size = 8
max_iters = 200
eval_interval = 50
min_lr = 0.0
seeds = 10

learning_rate = [0.1, 1.0]
variants = {
    'no measure': {'grad_clip': 0.0, 'warmup_iters': 0, 'decay_lr': False},
    'clipping': {'grad_clip': 1.0, 'warmup_iters': 0, 'decay_lr': False},
    'clipping, warmup': {'grad_clip': 1.0, 'warmup_iters': 50, 'decay_lr': False},
    'clipping, warmup, decay': {'grad_clip': 1.0, 'warmup_iters': 50, 'decay_lr': True},
    'rate by norm': {'grad_clip': 0.0, 'warmup_iters': 0, 'decay_lr': False, 'lr_by_norm': True},
    'all four': {'grad_clip': 1.0, 'warmup_iters': 50, 'decay_lr': True, 'lr_by_norm': True},
}
