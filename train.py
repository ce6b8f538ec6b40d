"""
Train a GPT. Read from top to bottom, this file is the algorithm.

$ python train.py                                                   a small model on the documentation of Python
$ python train.py config/train_shakespeare_char.py                  on Shakespeare, by character
$ python train.py config/train_gpt2.py --batch_size=8               any setting can be given: config file, then flags
$ torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py    the same steps, on four GPUs
$ python train.py --init_from=resume                                go on after an interruption
$ python train.py --test --checkpoint=checkpoints/best.pt           what a checkpoint is worth on the test split
"""

import math
import time
from pathlib import Path

import torch

from kit import (
    batches,
    checkpoints,
    corpora,
    devices,
    errands,
    evaluation,
    optimizers,
    overrides,
    pretrained,
    ranks,
    tokens,
)
from kit.journal import Journal, duration, short
from model import GPT, GPTConfig, default_heads

journal = Journal()  # from here on every line that is printed also goes to training.log

# ---------------------------------------------------------------------------------------------------------------------
# settings: the defaults train a small model in about two minutes on two CPU cores

# the run
out_dir = 'checkpoints'     # checkpoints, training.log and metrics.jsonl go here; an earlier run is moved aside
init_from = 'scratch'       # scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a Hugging Face folder
eval_interval = 400         # steps between evaluations, 0 = only at the end
eval_iters = 40             # batches an evaluation takes from each split, 0 = all of val and as much of train
eval_only = False           # evaluate once and leave
log_interval = 50           # steps between iter lines, 0 = none
save_interval = 400         # steps between the checkpoints step_*.pt, 0 = none
keep_last = 10              # how many of these are kept, 0 = all
always_save_checkpoint = True  # whether an evaluation without progress refreshes ckpt.pt too
dry_run = False             # show the batch, the model and what the run will take, and leave
test = False                # measure a checkpoint on the test split, and leave
checkpoint = ''             # which one --test takes, '' = best.pt of out_dir
# where figures go, beside the console
tensorboard = True          # to runs/
wandb_log = False           # to Weights & Biases
wandb_project = 'flatgpt'   # and its project there
wandb_run_name = ''         # '' = the name of out_dir
# data
dataset = 'python_docs'     # a folder in data/, see prepare.py
sampling = 'random'         # random windows, shuffle (each block once an epoch) or sequential
batch_size = 12             # rows in a micro-step
gradient_accumulation_steps = 1  # micro-steps in a step, counted over all processes
block_size = 64             # tokens in a row: how far back the model can look
# model
n_layer = 2                 # blocks, one after the other
n_head = 0                  # 0 = one head per 64 channels
n_embd = 128                # channels
dropout = 0.0               # share of activations dropped; 0.1 or more where a small text is read many times
bias = False                # biases in linear layers and LayerNorms; GPT-2 has them, new models do without
# optimizer: AdamW
learning_rate = 4e-3        # the highest rate; smaller for larger models
max_iters = 4000            # steps, that is updates of the weights
weight_decay = 1e-1         # on matrices and embeddings
beta1 = 0.9                 # memory of the mean gradient
beta2 = 0.99                # and of its square: 0.95 where a step has many tokens
grad_clip = 1.0             # gradients are scaled down to this norm, 0.0 = never
# learning rate over the steps
warmup_iters = 100          # steps of linear warmup, with or without decay
decay_lr = True             # cosine from learning_rate to min_lr, else constant
lr_decay_iters = 0          # the step at which min_lr is reached, 0 = max_iters
min_lr = 1e-4               # learning_rate / 10 or less
# machine
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16, float16 (its loss is scaled)
compile = None              # torch.compile: True, False, None = where it pays
backend = 'auto'            # between processes: auto, nccl, gloo
seed = 1337                 # of the first weights, the batches and dropout

# what must hold, checked before anything is written
RULES = [
    'eval_interval >= 0', 'eval_iters >= 0', 'log_interval >= 0', 'save_interval >= 0', 'keep_last >= 0',
    '0 <= seed < 2**63',
    'batch_size >= 1', 'gradient_accumulation_steps >= 1', 'block_size >= 1', 'n_layer >= 1', 'n_head >= 0',
    'n_embd >= 1', 'max_iters >= 1', 'warmup_iters >= 0', 'lr_decay_iters >= 0', 'learning_rate > 0', 'min_lr >= 0',
    'weight_decay >= 0', 'grad_clip >= 0', '0 <= dropout < 1', '0 <= beta1 < 1', '0 <= beta2 < 1',
    'n_head == 0 or n_embd % n_head == 0  # n_embd must be a multiple of n_head; --n_head=0 takes a head per 64',
    'not decay_lr or min_lr <= learning_rate  # the rate must decay downwards; lower min_lr, or --decay_lr=False',
    'not decay_lr or not lr_decay_iters or warmup_iters < lr_decay_iters  # warmup must end before the decay does',
    'sampling in ("random", "shuffle", "sequential")', 'dtype in ("auto", "float32", "bfloat16", "float16")',
    'backend in ("auto", "nccl", "gloo")',
    'test or not checkpoint  # --checkpoint goes with --test; a resume takes ckpt.pt of --out_dir',
    'out_dir.strip("./")  # the run needs a folder of its own, such as --out_dir=exp1',
    'dataset  # it needs the name of a folder in data/',
]
config = overrides.apply(globals(), RULES)

# ---------------------------------------------------------------------------------------------------------------------
# where we start from: nothing, a checkpoint, or OpenAI's weights; those bring the settings of their model along

device = devices.choose_device(device, ranks.local_rank, ranks.world_size)
ranks.start(backend, device)

saved = {}
if test or init_from == 'resume':
    path = (checkpoint or checkpoints.best(out_dir)) if test else checkpoints.newest(out_dir)
    saved = checkpoints.load(path, resume=not test)
    print(f'checkpoint: {path}, after {saved["iter_num"]} steps')
elif init_from != 'scratch':
    saved = pretrained.load(init_from)
if saved:
    shape = ['n_layer', 'n_head', 'n_embd', 'bias'] + (['block_size'] if init_from == 'resume' else [])
    config = overrides.adopt(
        globals(), saved.get('config', {}) | saved['model_args'], config, RULES, fixed=shape,
        launch=('out_dir', 'init_from', 'eval_only', 'dry_run', 'test', 'checkpoint', 'device', 'compile', 'backend'))

if wandb_log:
    overrides.require('wandb', 'wandb_log = True')
dtype = devices.choose_dtype(dtype, device)
if gradient_accumulation_steps % ranks.world_size:
    overrides.fail(f'gradient_accumulation_steps = {gradient_accumulation_steps}: it counts over all processes and '
                   f'must be a multiple of their number, {ranks.world_size}')
micro_steps = gradient_accumulation_steps // ranks.world_size  # of this process
rows_per_step = batch_size * gradient_accumulation_steps
tokens_per_step = rows_per_step * block_size

# ---------------------------------------------------------------------------------------------------------------------
# data: the rows of a step are a function of (seed, step), however it is cut into micro-steps and processes

data, meta = tokens.read_dataset(corpora.find_or_prepare(dataset), block_size)
steps_per_epoch = batches.rows_per_epoch(len(data['train']), block_size, sampling) / rows_per_step


def get_batch(split, step, micro_step):
    """x and y of one micro-step of this process, each (batch_size, block_size); y is x moved on by one token."""
    step, micro_step = step + micro_step // micro_steps, micro_step % micro_steps  # the one after the last
    starts = batches.window_starts(len(data[split]), block_size, rows_per_step, seed, step, sampling)
    first = (micro_step * ranks.world_size + ranks.rank) * batch_size
    rows = batches.windows(data[split], starts[first:first + batch_size], block_size)  # (B, T + 1)
    rows = devices.send(rows, device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# model and optimizer

n_head = n_head or default_heads(n_embd)
model_args = saved.get('model_args', {'vocab_size': tokens.padded_vocab_size(meta)}) | dict(
    n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, bias=bias, dropout=dropout)
checkpoints.check_fit(saved, model_args, meta)
if saved:  # GPT-2's 1,024 positions can be cut to fewer
    positions = 'transformer.wpe.weight'
    saved['model'][positions] = saved['model'][positions][:block_size]

torch.manual_seed(seed)
raw_model = GPT(GPTConfig(**model_args))
if saved:
    checkpoints.fill(raw_model, saved['model'])
raw_model.to(device)
if test:
    errands.test(raw_model, data, meta, batch_size, device, dtype)
    ranks.leave()

optimizer = optimizers.adamw(raw_model, weight_decay, learning_rate, (beta1, beta2))
scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16')
step, best_val_loss = 0, math.inf
if init_from == 'resume':
    step, best_val_loss = saved['iter_num'], float(saved['best_val_loss'])
    optimizers.resume(optimizer, saved['optimizer'])
    if saved.get('scaler'):  # empty where the loss was not scaled
        scaler.load_state_dict(saved['scaler'])
first_step = step
saved = None  # its memory is free again

flops_per_step = raw_model.flops_per_token() * tokens_per_step
if devices.choose_compile(compile, device, flops_per_step * max_iters):
    raw_model.compile()
model = ranks.wrap(raw_model, device)

# ---------------------------------------------------------------------------------------------------------------------
# the learning rate of a step: linear warmup, then a cosine down to min_lr (arXiv:1608.03983), or constant


def get_lr(step):
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if not decay_lr:
        return learning_rate
    end = lr_decay_iters or max_iters
    if step >= end:
        return min_lr
    progress = (step - warmup_iters) / (end - warmup_iters)  # from 0 to 1
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: the same windows every time, shared out over the processes; no random number is drawn


def evaluate():
    val_rows = eval_iters * batch_size or len(data['val']) // block_size
    figures = {}
    for split, rows in ('train', val_rows), ('val', eval_iters * batch_size):
        figures[f'{split}/loss'], figures[f'{split}/accuracy'] = evaluation.measure(
            raw_model, data[split], block_size, batch_size, rows, device, dtype)
    print(f'step {step}: train loss {figures["train/loss"]:.4f}, val loss {figures["val/loss"]:.4f}, '
          f'val accuracy {figures["val/accuracy"]:.2%}')
    return figures


if eval_only:
    evaluate()
    ranks.leave()

# ---------------------------------------------------------------------------------------------------------------------
# a look before training

X, Y = get_batch('train', step, 0)
seconds = errands.first_look(model, raw_model, X, Y, meta, device, dtype, init_from == 'scratch')
print(f'a step: {batch_size} rows x {gradient_accumulation_steps} micro-steps x {block_size} tokens = '
      f'{tokens_per_step:,} tokens')
print(f'the run: {max_iters:,} steps = {max_iters / steps_per_epoch:.2f} epochs of {len(data["train"]):,} tokens, '
      f'about {duration(seconds * micro_steps * max(0, max_iters - step))} without evaluations')
if warmup_iters >= max_iters:
    print(f'warmup_iters = {warmup_iters} is not below max_iters = {max_iters}: the rate climbs to the end')
if step >= max_iters:
    print(f'all {max_iters:,} steps are made; a higher --max_iters goes on')
if dry_run:
    ranks.leave()

if ranks.is_main and init_from != 'resume':
    checkpoints.move_aside(out_dir)
journal.open(out_dir, wandb_run_name or Path(out_dir).name, config, tensorboard, wandb_project if wandb_log else '')

# ---------------------------------------------------------------------------------------------------------------------
# training: steps are numbered by the updates made so far, so `step` 0 is the untrained model and max_iters the last

clock, steps_timed = time.perf_counter(), 0
while True:
    lr = get_lr(step)
    for group in optimizer.param_groups:
        group['lr'] = lr
    is_last = step >= max_iters
    is_new = step > first_step or init_from != 'resume'  # where a resumed run starts, all this was done before

    # evaluate, and save what is new, best, due or last
    is_evaluated = is_last or (is_new and eval_interval > 0 and step % eval_interval == 0)
    is_best = False
    if is_evaluated:
        figures = evaluate()
        is_best = figures['val/loss'] < best_val_loss
        best_val_loss = min(best_val_loss, figures['val/loss'])
        journal.record(step, figures)
    is_due = is_new and save_interval > 0 and step % save_interval == 0
    if step > 0 and (is_last or is_due or (is_evaluated and (is_best or always_save_checkpoint))):
        names = ['ckpt.pt'] + ([f'step_{step:07d}.pt'] if is_due else []) + (['best.pt'] if is_best else [])
        if ranks.is_main:
            print(f'saving checkpoint to {out_dir} ({", ".join(names)})')
            checkpoints.save({
                'model': raw_model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
                'model_args': model_args, 'iter_num': step, 'best_val_loss': best_val_loss, 'config': config,
                'meta': meta, 'epoch': step / steps_per_epoch, 'torch': str(torch.__version__),
            }, out_dir, names)
            checkpoints.prune(out_dir, keep_last)
    if is_last:
        break
    if is_evaluated or is_due:
        clock, steps_timed = time.perf_counter(), 0

    # one step: the mean gradient of all its rows, a micro-step at a time
    torch.manual_seed(batches.torch_seed(seed, step, ranks.rank))  # dropout draws anew, so a resume needs no history
    loss_of_step = 0.0
    for micro_step in range(micro_steps):
        ranks.exchange_gradients(model, micro_step == micro_steps - 1)  # once a step is enough
        with devices.autocast(device, dtype):
            _, loss = model(X, Y)
            loss = loss / micro_steps  # all micro-steps have the same number of targets
        X, Y = get_batch('train', step, micro_step + 1)  # the next one, while the device works on this one
        scaler.scale(loss).backward()
        loss_of_step += loss.detach()
    scaler.unscale_(optimizer)  # the norm must be that of the true gradients
    grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    steps_timed += 1

    # log; reading the loss waits for the device, so the steps in between stay unread
    if log_interval and (step % log_interval == 0 or step + 1 == max_iters):
        loss_of_step = ranks.total(loss_of_step).item() / ranks.world_size
        seconds = (time.perf_counter() - clock) / steps_timed
        rate = tokens_per_step / seconds
        mfu = flops_per_step / seconds / (devices.peak_flops(device, dtype) * ranks.world_size)
        epoch = (step + 1) / steps_per_epoch
        print(f'iter {step}: loss {loss_of_step:.4f}, time {seconds * 1000:.2f}ms, mfu {mfu:.2%}, lr {lr:.1e}, '
              f'norm {grad_norm:.2f}, {short(rate)} tok/s, eta {duration(seconds * (max_iters - step - 1))}, '
              f'epoch {epoch:.2f}')
        journal.record(step, {'loss': loss_of_step, 'lr': lr, 'grad_norm': grad_norm.item(), 'time_ms': seconds * 1000,
                              'tokens_per_second': rate, 'mfu': mfu, 'epoch': epoch})
        clock, steps_timed = time.perf_counter(), 0
    step += 1

# ---------------------------------------------------------------------------------------------------------------------
# what came of it

if ranks.is_main:
    errands.show_sample(raw_model, meta, device, dtype)
    errands.show_next_commands(out_dir)
journal.close()
ranks.leave()
