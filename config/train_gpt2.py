# GPT-2 (124M) on OpenWebText: 300 billion tokens; nanoGPT reports a loss of 2.85 after some days on 8 A100s
# $ python prepare.py openwebtext
# $ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

dataset = 'openwebtext'
# 12 rows x 1024 tokens x 5 micro-steps x 8 GPUs = 491,520 tokens a step
batch_size = 12
block_size = 1024
sampling = 'random'
gradient_accumulation_steps = 5 * 8

n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False

# as nanoGPT has it; config/speedrun_gpt2.py has what learns faster
architecture = 'gpt2'
optimizer = 'adamw'
dtype = 'auto'

learning_rate = 6e-4
max_iters = 600000
lr_decay_iters = 600000
min_lr = 6e-5
warmup_iters = 2000
weight_decay = 1e-1
beta2 = 0.95

eval_interval = 1000
eval_iters = 200
log_interval = 10
save_interval = 5000
keep_last = 3  # 1.5 GB each
