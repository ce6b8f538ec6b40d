"""Experiment 1: what the settings do. The guide's five runs, on the Shakespeare model for a CPU (0.8M parameters)."""

config = 'config/train_shakespeare_char_cpu.py'
dtype = 'float32'  # as its table was made
max_iters = 1000
n_head = 0  # one per 32 channels would be the recipe's 4; one per 64 goes with every width

variants = {
    'baseline': {},
    'larger rate': {'learning_rate': 5e-3},
    'smaller rate': {'learning_rate': 1e-4},
    'smaller batch': {'batch_size': 3, 'eval_iters': 80},  # so that it is evaluated on as many rows as the others
    'larger model': {'n_layer': 6, 'n_embd': 192},
}
