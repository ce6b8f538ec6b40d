# what OpenAI's gpt2-medium (350M parameters) is worth on OpenWebText
# $ python train.py config/eval_gpt2_medium.py

dataset = 'openwebtext'
init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500
batch_size = 8
