# Tiny Shakespeare for a CPU: 0.8M parameters, about two minutes on two cores, val loss about 1.9
# $ python train.py config/train_shakespeare_char_cpu.py

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64
sampling = 'random'

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

# as nanoGPT has it; config/speedrun_shakespeare_char_cpu.py has what learns faster
architecture = 'gpt2'
optimizer = 'adamw'
dtype = 'auto'

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = 0  # = max_iters
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100

eval_interval = 250
eval_iters = 20
log_interval = 10
always_save_checkpoint = False
save_interval = 100

device = 'cpu'
