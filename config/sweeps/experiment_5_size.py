"""Experiment 5: four sizes of model, the same 1,500 steps each."""

config = 'config/train_shakespeare_char_cpu.py'
dtype = 'float32'  # as its table was made
max_iters = 1500
n_head = 0  # one per 64 channels

variants = {
    'tiny': {'n_layer': 1, 'n_embd': 64},
    'small': {'n_layer': 2, 'n_embd': 128},
    'medium': {'n_layer': 4, 'n_embd': 128},
    'large': {'n_layer': 6, 'n_embd': 192},
}
