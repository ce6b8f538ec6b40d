# the lowest val loss on Tiny Shakespeare with no more than nanoGPT's 10.7M parameters, however long it takes
# $ python train.py config/best_shakespeare_char.py
# On an H200 (one seed) best.pt, of step 1,750, has 1.4237 on val and 1.5105 on test; nanoGPT has 1.4697 on val. Fewer
# steps (1,800 end at 1.4316) and more dropout (0.4, 2,400 steps: 1.4378) were worse.

dataset = 'shakespeare_char'
batch_size = 64
block_size = 256
sampling = 'shuffle'

n_layer = 6
n_embd = 384
bias = False
dropout = 0.3  # it reads the text forty times over

architecture = 'modern,ngram_embeddings=0'  # they would make it larger than 10.7M
optimizer = 'muon:0.01'
learning_rate = 1e-3
min_lr = 1e-5
max_iters = 2500
warmup_iters = 100
weight_decay = 0.1
beta2 = 0.99
ema_decay = 0.99

eval_interval = 250
eval_iters = 0  # all of val
log_interval = 10
always_save_checkpoint = False
save_interval = 100
