# a character-level GPT on Tiny Shakespeare: 10.7M parameters; nanoGPT reports 3 minutes on an A100, val loss 1.47
# $ python train.py config/train_shakespeare_char.py

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # it sees up to 256 characters back
sampling = 'random'

n_layer = 6
n_head = 0  # one head per 64 channels: 6, and still right when n_embd is changed
n_embd = 384
dropout = 0.2  # the text is small and read many times over

# as nanoGPT has it; config/speedrun_shakespeare_char.py has what learns faster
architecture = 'gpt2'
optimizer = 'adamw'
dtype = 'auto'

learning_rate = 1e-3  # small models stand high rates
max_iters = 5000
lr_decay_iters = 0  # the rate decays to the end of the run, however long that is made
min_lr = 1e-4
beta2 = 0.99  # a step has few tokens, so the second moment is averaged over more of them
warmup_iters = 100

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # it overfits in the end: between the interval checkpoints only progress is saved
save_interval = 100
