# what minimal.py trains: the block of GPT-2 and AdamW on the documentation of Python, 0.4M parameters
# $ python train.py config/train_python_docs_gpt2.py --dtype=float32 --compile=False      the losses of minimal.py

dataset = 'python_docs'
batch_size = 12
block_size = 64
sampling = 'random'

n_layer = 2
n_embd = 128
architecture = 'gpt2'
optimizer = 'adamw'

learning_rate = 4e-3
max_iters = 4000
min_lr = 1e-4

eval_interval = 400
eval_iters = 40
