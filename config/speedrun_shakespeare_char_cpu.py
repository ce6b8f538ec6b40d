# Tiny Shakespeare by character, to the loss of nanoGPT's recipe for a CPU in a twelfth of its time; 1.2M parameters
# $ python train.py config/speedrun_shakespeare_char_cpu.py

dataset = 'shakespeare_char'
batch_size = 16
block_size = 64
sampling = 'shuffle'

n_layer = 2
n_embd = 64
bias = False

architecture = 'modern'
optimizer = 'muon:0.06'
learning_rate = 1.2e-2
max_iters = 190
warmup_iters = 10
weight_decay = 0.1
beta2 = 0.99
min_lr = 2e-4

eval_interval = 0  # at the end
eval_iters = 0     # all of val
log_interval = 50
save_interval = 0

device = 'cpu'
