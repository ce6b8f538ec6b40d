# what OpenAI's gpt2-xl (1558M parameters) is worth on OpenWebText
# $ python train.py config/eval_gpt2_xl.py

dataset = 'openwebtext'
init_from = 'gpt2-xl'
eval_only = True
eval_iters = 500
batch_size = 8
