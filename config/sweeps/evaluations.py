"""What evaluations cost: the guide has it that a smaller eval_interval means fewer of them."""

config = 'config/train_shakespeare_char_cpu.py'
dtype = 'float32'  # as its table was made
max_iters = 500

eval_interval = [25, 250, 0]
