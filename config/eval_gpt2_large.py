# what OpenAI's gpt2-large (774M parameters) is worth on OpenWebText
# $ python train.py config/eval_gpt2_large.py

dataset = 'openwebtext'
init_from = 'gpt2-large'
eval_only = True
eval_iters = 500
batch_size = 8
