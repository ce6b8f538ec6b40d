# pairs: a docstring for a function of Python's library, by character; 1.8M parameters, twenty minutes on two cores
# $ python train.py config/train_docstrings.py
# $ python train.py --test        BLEU and exact match; python sample.py --start='def add(a, b): return a + b'

dataset = 'python_docstrings'
batch_mode = 'padded'  # the loss is that of the docstring alone
sampling = 'shuffle'
batch_size = 32
block_size = 512  # the longest pair has 471 characters

n_layer = 4
n_embd = 192
dropout = 0.2  # 2,929 pairs are few
architecture = 'gpt2'

optimizer = 'adamw'
learning_rate = 2e-3
min_lr = 2e-4
beta2 = 0.99
max_epochs = 15

eval_interval = 100
eval_iters = 0  # all of val
log_interval = 20
save_interval = 50
