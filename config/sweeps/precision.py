"""
Precision: float32, bfloat16, float16 with its loss scaled and without, on a model small enough for a CPU, where float16
is slow. On a GPU the same file runs there.
"""

config = 'config/train_shakespeare_char_cpu.py'
device = 'auto'
n_layer = 2
n_embd = 64
max_iters = 200
eval_interval = 50
eval_iters = 5

variants = {
    'float32': {'dtype': 'float32'},
    'bfloat16': {'dtype': 'bfloat16'},
    'float16, scaled': {'dtype': 'float16'},
    'float16, not scaled': {'dtype': 'float16', 'scale_loss': False},
}
