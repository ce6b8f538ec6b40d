# OpenAI's largest GPT-2, finetuned on Shakespeare; another size: --init_from=gpt2
# $ python train.py config/finetune_shakespeare.py

dataset = 'shakespeare'
sampling = 'random'
init_from = 'gpt2-xl'

# 1 row x 32 micro-steps x 1024 tokens = 32,768 tokens a step; the text has 301,966, so an epoch is 9.2 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# a constant rate, from the first step on
optimizer = 'adamw'
learning_rate = 3e-5
decay_lr = False
warmup_iters = 0
beta2 = 0.95

eval_interval = 5
eval_iters = 40
log_interval = 1
always_save_checkpoint = False  # only what has become better
save_interval = 0  # a checkpoint of this size takes 19 GB
