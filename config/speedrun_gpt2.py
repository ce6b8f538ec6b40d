# GPT-2 small on OpenWebText, 3.3 billion tokens: another block, Muon, a linear way down; its untied head makes it 162M
# $ python prepare.py openwebtext
# $ torchrun --standalone --nproc_per_node=8 train.py config/speedrun_gpt2.py
# Made ready on a CPU, by what smaller models and others' records showed; it has not run on a GPU yet.

dataset = 'openwebtext'
# 32 rows x 1024 tokens x 2 micro-steps x 8 GPUs = 524,288 tokens a step
batch_size = 32
block_size = 1024
sampling = 'shuffle'
gradient_accumulation_steps = 2 * 8

n_layer = 12
n_head = 6  # fewer, wider heads
n_embd = 768
dropout = 0.0
bias = False

architecture = 'modern,ngram_embeddings=0'  # words by the hash of two others were not tried
optimizer = 'muon:0.02'
learning_rate = 2e-3
min_lr = 0.0
lr_schedule = 'wsd:0.7'
max_iters = 6200
warmup_iters = 100
weight_decay = 0.0  # as the records have it; Muon's matrices grow, and the check on its rate sees less
beta2 = 0.95

eval_interval = 250
eval_iters = 200
log_interval = 10
save_interval = 1000
keep_last = 3
