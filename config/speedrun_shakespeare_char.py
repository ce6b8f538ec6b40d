# Tiny Shakespeare to nanoGPT's loss (1.4697) in a fraction of its 5,000 steps: as wide and deep, another block, Muon
# $ python train.py config/speedrun_shakespeare_char.py
# On an H200 (one seed) val is 1.4612 after 700 steps and 1.4515 at the end. With n-grams it reads too well: 1.5002 at
# best, after 500 steps.

dataset = 'shakespeare_char'
batch_size = 64
block_size = 256
sampling = 'shuffle'

n_layer = 6
n_embd = 384
bias = False
dropout = 0.2

architecture = 'modern,ngram_embeddings=0'
optimizer = 'muon:0.01'
learning_rate = 1e-3
min_lr = 1e-5
max_iters = 1000
warmup_iters = 50
weight_decay = 0.1
beta2 = 0.99
ema_decay = 0.98  # over the last 50 steps

eval_interval = 100
eval_iters = 0  # all of val
log_interval = 10
save_interval = 100
