# what OpenAI's gpt2 (124M parameters) is worth on OpenWebText
# $ python train.py config/eval_gpt2.py

dataset = 'openwebtext'
init_from = 'gpt2'
eval_only = True
eval_iters = 500
batch_size = 8
