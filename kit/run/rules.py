"""
The conditions between settings of train.py, in Python, each with its remedy behind the #. What a setting may be by
itself stands at the beginning of its comment, those of the learning rate are checked by kit/learn/schedules.py.
"""

TRAIN = [
    'out_dir.strip("./")  # the run needs a folder of its own, such as --out_dir=exp1',
    'test + eval_only + dry_run + find_lr + (inspect_step >= 0) <= 1  # each replaces the training; give one of them',
    'test or not checkpoint  # --checkpoint goes with --test; a resume takes ckpt.pt of --out_dir',
    'batch_size * block_size <= 2**26  # no memory holds the tokens of such a micro-step; a smaller --batch_size',
    'batch_size * gradient_accumulation_steps <= 2**26  # a step of so many rows learns no more; take fewer',
    'n_layer * n_embd**2 <= 2**42 and n_layer <= 2**16  # no machine holds such a model; take a smaller one',
    'find_lr_start < find_lr_end  # the rates climb',
    'not (find_lr and debug_nan)  # where it diverges there are bad numbers, and no fault',
    'n_head == 0 or n_embd % n_head == 0  # n_embd must be a multiple of n_head; --n_head=0 takes a head per 64',
    'not (objective == "mlm" and batch_mode == "padded")  # pairs are for writing; windows or packed fill masks',
    'not (ema_decay and swa_start)  # one average at a time; --ema_decay=0 or --swa_start=0',
    'max_epochs or swa_start < max_iters  # the average would never begin',
    'not (max_epochs and max_minutes)  # one of them says when to end; set the other to 0',
    'not max_minutes or not (lr_decay_iters or warmup_share)  # how many steps is not known before; set them to 0',
    'not max_minutes or init_from == "resume" or warmup_iters >= 25  # measured in the warmup; --warmup_iters=100',
    'eval_interval or not (early_stop or early_stop_norm)  # they go by evaluations; --eval_interval=250',
]
