"""
Train a GPT. Read from top to bottom, this file is the algorithm.

$ python train.py                                                   a small model on the documentation of Python
$ python train.py config/train_shakespeare_char.py                  on Shakespeare, by character
$ python train.py config/train_gpt2.py --batch_size=8               any setting can be given: config file, then flags
$ torchrun --standalone --nproc_per_node=4 train.py config/train_gpt2.py    the same steps, on four GPUs
$ python train.py --init_from=resume                                go on after an interruption, as if there were none
$ python train.py --init_from=exp1/best.pt --dataset=book           a new run that begins with the weights of another
$ python train.py --test --checkpoint=checkpoints/best.pt           what a checkpoint is worth on the test split
$ python train.py --inspect_step=1234                               which text made the spike of that step
$ python train.py --max_minutes=30                                  as many steps as fit, the rate falling to the end
$ python train.py config/train_gpt2.py --find_lr                    which learning rate to begin with
"""

import math

import torch

from kit.base import devices, overrides, ranks, signals
from kit.data import batches, readers
from kit.learn import averages, building, gradients, optimizers, schedules
from kit.run import ending, first_look, fitting, nan_hunt, presets, rate_finder, replay, rules, starts, testing
from kit.run.clock import Clock
from kit.run.due import Due
from kit.run.iter_line import IterLine
from kit.state import checkpoints
from kit.state.writer import Writer
from kit.watch import evaluation, inside
from kit.watch.journal import Journal
from model import GPT, GPTConfig

journal = Journal()  # from here on every line that is printed also goes to training.log

# ---------------------------------------------------------------------------------------------------------------------
# settings: the defaults train a small model in about two minutes on two CPU cores. A comment begins with what a number
# or a choice may be, up to the colon, and that is checked; conditions between settings are in kit/run/rules.py

# the run
eval_interval = 200         # >= 0: steps between evaluations; 0 = only at the end
eval_iters = 20             # >= 0: batches an evaluation takes from each split; 0 = all of val and as much of train
log_interval = 50           # >= 0: steps between iter lines; 0 = none
save_interval = 40          # >= 0: steps between the checkpoints step_*.pt; 0 = none; close ones average well
keep_last = 10              # >= 0: how many of these are kept; 0 = all
always_save_checkpoint = True  # whether an evaluation without progress refreshes ckpt.pt too
save_errors = 'warn'        # warn or stop: where a checkpoint cannot be written, warn and train on, or stop
# where figures go, beside the console
tensorboard = True          # to runs/
wandb_log = False           # to Weights & Biases
wandb_project = 'flatgpt'   # the project there
wandb_run_name = ''         # '' = the name of out_dir
wandb_checkpoints = 'best'  # none, best or all: what W&B gets at the end of a run, best.pt or ckpt.pt too
# data
dataset = 'python_docs'     # not empty: a folder in data/, see prepare.py; or several in fixed shares: a:0.7,b:0.3
batch_mode = 'windows'      # windows, packed or padded: rows of text, of whole documents, of pairs (loss on responses)
document_attention = True   # packed: no token looks into another document, and positions begin anew in each
too_long = 'cut'            # cut or drop: padded pairs beyond block_size lose the begin of the prompt, or are left out
sampling = 'shuffle'        # random, shuffle or sequential: random rows, each once an epoch, or one after the other
mask_prob = 0.0             # 0 <= x < 1: share of the input tokens that are hidden or replaced; 0 = none, in mlm 0.15
objective = 'causal'        # causal or mlm: each token from those before it, or hidden ones from both sides, as BERT
batch_size = 6              # >= 0: rows in a micro-step, at most; 0 = as many as fit, and a step keeps its rows
gradient_accumulation_steps = 1  # >= 1: so many times batch_size rows are a step, shared out over all processes
block_size = 256            # >= 1: tokens in a row: how far back the model can look
# model
architecture = 'modern'     # gpt2 or modern, and deviations by name, as modern,mlp=swiglu; --help has the names
n_layer = 2                 # >= 1: blocks, one after the other
n_head = 0                  # >= 0: heads of attention; 0 = one per 64 channels
n_embd = 128                # >= 1: channels
dropout = 0.0               # 0 <= x < 1: share of activations dropped; 0.1 or more where a small text is read often
bias = False                # biases in linear layers and LayerNorms; GPT-2 has them, new models do without
# optimizer
optimizer = 'muon:0.015'    # adamw, or muon and its rate for the matrices in the blocks; all else is AdamW's
learning_rate = 3e-3        # > 0: the highest rate; smaller for larger models
max_iters = 1300            # >= 1: steps, that is updates of the weights
max_epochs = 0.0            # >= 0: or as many steps as it takes to read the text so often; 0 = max_iters
weight_decay = 1e-1         # >= 0: on matrices and embeddings
beta1 = 0.9                 # 0 <= x < 1: memory of the mean gradient
beta2 = 0.99                # 0 <= x < 1: and of its square; 0.95 where a step has many tokens
grad_clip = 1.0             # >= 0: gradients are scaled down to this norm; 0.0 = never
grad_clip_quantile = 0.0    # 0 <= x < 1: or to this quantile of the last 100 norms; 0.1 clips nine of ten, 0.0 = off
grad_clip_value = 0.0       # >= 0: then each entry of a gradient is cut to this size; 0.0 = never
max_bad_steps = 20          # >= 0: so many steps in a row with a NaN or Inf: go back once, then stop; 0 = never stop
ema_decay = 0.0             # 0 <= x < 1: moving average of the weights, evaluated and saved too: 0.999 or so; 0 = none
swa_start = 0               # >= 0: or the plain mean of the weights from this step on; 0 = none
# when to end
max_minutes = 0.0           # >= 0: wall time, max_iters becomes what fits, measured in the warmup; 0 = no limit
early_stop = 0              # >= 0: evaluations in a row without progress; 0 = never
min_delta = 1e-4            # >= 0: what the val loss must fall by to be progress
early_stop_norm = False     # or when the gradient has died or exploded, looked at with each evaluation
# learning rate over the steps
lr_schedule = 'cosine'      # or linear, step:1000, restarts:1000, wsd, plateau:3, ...: see kit/learn/schedules.py
decay_lr = True             # False: constant after the warmup
warmup_iters = 100          # >= 0: steps of linear warmup, before any schedule
warmup_share = 0.0          # 0 <= x < 1: or this share of max_iters
warmup_start_lr = 0.0       # >= 0: the rate of the first step; 0 = learning_rate / (warmup_iters + 1)
lr_decay_iters = 0          # >= 0: the step at which min_lr is reached; 0 = max_iters
min_lr = 1e-4               # >= 0: learning_rate / 10 or less; no schedule goes below it
lr_by_norm = False          # lower it while the gradient norm spikes, or stays far above grad_clip
# machine
dtype = 'auto'              # auto, float32, bfloat16 or float16
scale_loss = True           # in float16, whose small gradients would be 0
seed = 1337                 # 0 <= x < 2**63: of the first weights, the batches and dropout
activation_checkpointing = False  # a block's activations are made again when needed: less memory, a third more time
deterministic = False       # the same numbers each time on a GPU too, as on a CPU; slower
threads = 0                 # >= 0: of a CPU; 0 = all, or one where that is faster, as on a busy machine
compile = None              # torch.compile: True, False, None = where it pays
compile_mode = 'auto'       # auto, default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs: see PyTorch
# this launch alone: a resume does not take these over
out_dir = 'checkpoints'     # checkpoints, training.log and metrics.jsonl go here; an earlier run is moved aside
init_from = 'scratch'       # scratch, resume, auto (resume if it can), FILE.pt, gpt2[-medium, -large, -xl], HF folder
eval_only = False           # evaluate once and leave
dry_run = False             # show the batch, the model and what the run will take, and leave
test = False                # measure a checkpoint on the test split, and leave
checkpoint = ''             # which one --test takes, or several: a.pt,b.pt; '' = best.pt of out_dir
weights = 'auto'            # auto, raw, ema or swa: of a checkpoint's weights; auto = its average where it has one
inspect_step = -1           # >= -1: replay this step of the run in out_dir: its texts, the costliest first; -1 = train
find_lr = False             # raise the rate step by step, suggest one, and leave
find_lr_start = 1e-5        # > 0: from this rate
find_lr_end = 1.0           # > 0: to this one, or to where the loss diverges
debug_nan = False           # at the first bad number: stop, and say which text, operation or gradient made it
sharded = False             # checkpoints in shards, each process writes its own, see export.py; for large models
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
backend = 'auto'            # auto, nccl or gloo: between processes
timeout = 30.0              # 0 < x <= 1e6: minutes that the processes wait within a step for one that hangs
parallel = 'auto'           # auto, ddp or fsdp: each process holds the model, or a part of it; auto = ddp where it fits
cpu_offload = False         # fsdp: parameters, gradients and moments lie in the memory of the host; slow

config = overrides.apply(globals(), rules.TRAIN, more_help=presets.help_text(GPTConfig))

# ---------------------------------------------------------------------------------------------------------------------
# where we start from: nothing, a checkpoint, or OpenAI's weights; those bring the settings of their model along

device = devices.choose_device(device, ranks.local_rank, ranks.world_size)
ranks.start(backend, device, timeout, lambda: starts.about(config, device))
fits_batch = batch_size == 0  # found once there is a model; until then the number that the 0 has replaced counts
trains = not (test or eval_only or dry_run or find_lr or inspect_step >= 0)  # else nothing of a run is written
config, saved, is_resume, past = starts.find(config, trains, GPTConfig, device)  # past: the log of a run to be replayed
globals().update(config | {'device': device})  # the settings, with those that the checkpoint brings
if deterministic:
    devices.make_deterministic()
devices.set_threads(threads)
dtype = config['dtype'] = devices.choose_dtype(dtype, device, test or eval_only, n_embd, batch_size * block_size,
                                               bool(saved))  # the name that auto stood for goes into checkpoints
rows_per_step = batch_size * gradient_accumulation_steps
micro_steps = ranks.share(rows_per_step, batch_size)  # of this process, each of batch_size rows at most

# ---------------------------------------------------------------------------------------------------------------------
# data: the rows of a step are a function of (seed, step), however it is cut into micro-steps and processes

data, meta = readers.open(config, devices.row_multiple(device))
steps_per_epoch = data['train'].rows_per_epoch(sampling) / rows_per_step
tokens_per_step = round(rows_per_step * data['train'].mean_length)  # without padding
if max_epochs:
    max_iters = config['max_iters'] = schedules.steps(config, steps_per_epoch, is_run=not test)
warmup_steps = schedules.check(config)
clock = Clock(max_minutes, device)


@clock.data  # its time is data_ms
def get_batch(split, step, micro_step):
    """
    One micro-step of this process: x, y and documents, each (rows, T). y is what should come after x, -1 where
    nothing is to be learned; documents is None where attention may look at the whole row. And parts, by which its mean
    loss is divided so that each target of the step counts the same: the targets of the step / those here / processes.
    """
    # all rows of the step, of which this is a slice; rewinds: how often the run went back, each time other text comes
    rows, noise, n_targets = data[split].of_step(rows_per_step, seed, step, sampling, state.rewinds)
    mine = ranks.rows_of(rows_per_step, micro_steps, micro_step)
    rows, noise = rows[mine], noise if noise is None else noise[mine]
    tokens = data[split].read(rows)  # (rows, T + 1)
    x, y = tokens[:, :-1], tokens[:, 1:]  # y is x moved on by one
    x, y, documents = data[split].mark(x, y, rows, noise)  # what is special in pairs, packed documents, hidden tokens
    parts = n_targets / data[split].count(rows, noise) / ranks.world_size
    return *(devices.send(a, device) for a in (x, y, documents)), parts


if test:
    testing.measure(saved, GPT, GPTConfig, weights, config, data, meta, device, dtype)
    ranks.leave()

# ---------------------------------------------------------------------------------------------------------------------
# model and optimizer

model_config = starts.model_config(saved, meta, config, GPTConfig)  # the settings that are fields of GPTConfig
batches.seed_all(seed)
raw_model = building.build(GPT, model_config, parallel, activation_checkpointing, cpu_offload, device, dtype)
parameters = list(raw_model.parameters())
average = averages.running(raw_model, ema_decay, swa_start)
optimizer = optimizers.make(optimizer, raw_model, weight_decay, learning_rate, (beta1, beta2), dtype)
scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16' and scale_loss)
state = starts.restore(saved, is_resume, config, meta, raw_model, optimizer, scaler, average, device)
bad_steps = gradients.BadSteps(state, raw_model, scaler)
due = Due(config, state, warmup_steps)
writer = Writer(out_dir, keep_last, save_errors == 'stop', sharded)
saved = None  # its memory is free again

model = ranks.wrap(raw_model, device)

# ---------------------------------------------------------------------------------------------------------------------
# the learning rate of a step: linear warmup, then a cosine down to min_lr (arXiv:1608.03983), or another schedule


def get_lr(step):
    if step < warmup_steps:
        offset = 0 if warmup_start_lr else 1  # nanoGPT's step 0 is one stride above a rate of 0
        return warmup_start_lr + (learning_rate - warmup_start_lr) * (step + offset) / (warmup_steps + offset)
    if not due.is_fitted:
        return learning_rate  # max_minutes: how far it is to the end is not known yet
    if not decay_lr or lr_schedule != 'cosine':
        return schedules.rate(step, config, state.val_losses)
    n = max(1, (lr_decay_iters or max_iters) - warmup_steps)
    progress = min(1, (step - warmup_steps) / n)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


# ---------------------------------------------------------------------------------------------------------------------
# evaluations: the same windows every time, shared out over the processes; checkpoints: written whole or not at all


def evaluate():
    journal.catch_up()
    rows = {'val': eval_iters * batch_size, 'train': eval_iters * batch_size or data['val'].n_tokens // block_size}
    measure = lambda split: evaluation.figures(raw_model, data[split], split, rows[split], device, dtype)
    with averages.smoothed(average) as kind:  # best.pt goes by these weights
        figures = measure('train') | measure('val')
    if kind:
        figures['raw/val/loss'] = measure('val')['val/loss']
    print(evaluation.line(state.step, figures, kind))
    return figures


def save(names):
    """Begin to write all that a resume needs, under these names: a copy of it, while the training goes on."""
    journal.catch_up()
    due.saved(writer.wait())
    due.saving()
    journal.read()  # after a kill the records up to here could not be made again: they come to the disk first
    print(f'saving checkpoint to {out_dir} ({", ".join(names)})')
    writer.write({
        'model': raw_model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
        **averages.state(average), **state.keys(), 'model_args': model_config.args(), 'config': config, 'meta': meta,
        'epoch': state.step / steps_per_epoch, 'random_states': checkpoints.random_states(),
        'versions': checkpoints.versions(),
    }, names, [name for name, _ in raw_model.named_parameters()], first=journal.sync)
    if not due.is_fitted:
        writer.finish()  # max_minutes measures all of it


def leave(status):
    """End the script, with all written."""
    writer.finish()
    journal.close()
    ranks.leave(status)


# ---------------------------------------------------------------------------------------------------------------------
# a step: all that makes the weights after it out of those before it; a function of them, of its number and its rate


def update(step, lr):
    """
    The mean gradient of all rows of a step, a micro-step at a time, clipped, and the optimizer's step with it; nothing
    moves where a number is not finite. Returns the figures of the step (loss and grad_norm stay on the device; lr is
    the rate that was used) and the (n,) norms of the parameters' gradients.
    """
    optimizer.zero_grad(set_to_none=True)
    bad_steps.begin()
    devices.seed(device, batches.torch_seed(seed, step, ranks.rank))  # dropout draws anew: a resume needs no history
    loss_of_step = 0.0
    for micro_step in range(micro_steps):
        X, Y, D, parts = get_batch('train', step, micro_step)  # while the device is still at work on the one before
        ranks.exchange_gradients(model, micro_step == micro_steps - 1)  # once a step is enough
        with devices.autocast(device, dtype):
            _, loss = model(X, Y, D, loss_alone=True)
            loss = loss / parts  # each target of the step counts the same
        scaler.scale(loss).backward()
        loss_of_step += loss.detach()
    loss_of_step = ranks.total(loss_of_step) / ranks.world_size
    scaler.unscale_(optimizer)  # the norm must be that of the true gradients
    norms = gradients.norms(parameters)  # of each parameter's, before clipping
    grad_norm = torch.linalg.vector_norm(norms)
    # a bad number on any rank makes loss or norm bad on all: then nothing moves, neither weights, moments nor average
    is_good = torch.isfinite(loss_of_step) & torch.isfinite(grad_norm)
    newest = torch.cat([state.recent_norms[1:], grad_norm[None]])
    state.recent_norms = torch.where(is_good, newest, state.recent_norms)

    limit = gradients.clip_limit(state.recent_norms, grad_clip, grad_clip_quantile)
    optimizers.clip(optimizer, parameters, grad_norm, limit, grad_clip_value)
    factor = schedules.damping(state.recent_norms.tolist(), limit) if lr_by_norm else 1.0
    lr = factor * lr

    for group in optimizer.param_groups:
        group['lr'] = lr * group.get('lr_factor', 1.0)  # Muon's matrices have a rate of their own
    optimizers.step(optimizer, is_good)
    if average and step >= swa_start:
        average.update(is_good)
    bad_steps.note(loss_of_step, norms, is_good)  # counted; the scale of float16 moves here too

    figures = {'loss': loss_of_step, 'grad_norm': grad_norm, 'lr': lr}
    if lr_by_norm:
        figures['lr_factor'] = factor
    if grad_clip_quantile:
        figures['clip_limit'] = limit
    return figures, norms


# ---------------------------------------------------------------------------------------------------------------------
# what does not train: an evaluation, a look, the learning-rate finder, a step of an earlier run once more; and a look
# at what is to be trained, by which threads and compiling are chosen

if eval_only:
    evaluate()
    ranks.leave()
batch = get_batch('train', state.step, 0)[:3]
if fits_batch:
    batch_size, eval_iters, micro_steps = fitting.find(config, model, raw_model, optimizer, batch, device, dtype)
    batch = get_batch('train', state.step, 0)[:3]
first_look.show(config, model, raw_model, batch, meta, micro_steps, device, dtype,
                dry_run and init_from == 'scratch' and not is_resume)
n_steps = rate_finder.STEPS if find_lr else max(0, max_iters - state.step)
seconds = first_look.choose(config, model, raw_model, batch, micro_steps, n_steps, device, dtype)
if trains or dry_run:
    first_look.plan(config, state.step, warmup_steps, seconds, steps_per_epoch, data['train'])
if dry_run:
    fitting.show(config, raw_model, micro_steps, seconds, device, dtype)
if debug_nan:  # update calls the new get_batch, by its name
    get_batch, update = nan_hunt.watched(get_batch, update, raw_model, bad_steps, scaler, micro_steps, seed, leave,
                                         device, dtype)
if find_lr:
    rate_finder.run(update, state.step, bad_steps, find_lr_start, find_lr_end, out_dir,
                    optimizer.param_groups[0].get('lr_factor'))
if inspect_step >= 0:
    replay.run(update, get_lr, config, state, past, raw_model, data['train'], meta, device, dtype)
if not trains:
    ranks.leave()

# ---------------------------------------------------------------------------------------------------------------------
# training: steps are numbered by the updates made so far, so step 0 is the untrained model and max_iters the last. What
# is due at a step, and why a run ends, is decided in kit/run/due.py, which is told of the clock, of saves and signals

starts.begin(config, raw_model, data['train'], tokens_per_step, warmup_steps, state, is_resume, journal)
iter_line = IterLine(raw_model, journal, clock, due, bad_steps, tokens_per_step, steps_per_epoch, seconds, device,
                     dtype)
signals.listen()
devices.settle_garbage(device)
clock.start(due.is_fitted, config['compile'])
while True:
    # bad steps are skipped; where they do not end, go back to before them, with other text from there on
    if due.going_back:
        writer.finish()
        starts.go_back(out_dir, state, raw_model, optimizer, scaler, average, journal)
    writer.wait(block=False)  # says what there is to say
    due.look(clock.is_up(writer))

    # evaluate, save, or leave
    if due.evaluation:
        figures = evaluate()
        due.saved(writer.wait())
        due.evaluated(figures['val/loss'])
        journal.record(state.step, figures)
        clock.took('evaluation')
    due.hear(signals.take())
    if due.save:
        save(due.names)
        clock.took('save')
    if due.evaluation:  # pictures come last: they draw random numbers, and a checkpoint holds the generators' states
        with averages.smoothed(average):
            inside.show(journal, state.step, raw_model, data['val'], meta, device, due.is_last)
        clock.took('evaluation', n=0)
    if due.save or due.evaluation:
        ranks.wait()  # for rank 0's disk and pictures, however long they take; a step has a time limit
    if due.end:
        break
    max_iters = config['max_iters'] = due.fit(clock)  # with max_minutes another, from the end of the warmup on

    # one step
    weights_before = gradients.sample(raw_model) if due.line else None
    figures, norms = update(state.step, get_lr(state.step))
    journal.catch_up()  # with the line of the step before, now that a GPU has this one to do
    clock.took('step')

    # log; what is not read stays on the device, so that nothing waits for it
    journal.update(state.step, figures)
    if due.line:
        iter_line.take(state.step, figures, norms, weights_before)
    if due.evaluation:
        journal.show('histograms', state.step, lambda: gradients.values(raw_model))
        clock.took('step', n=0)
    state.step += 1

# ---------------------------------------------------------------------------------------------------------------------
# what came of it

due.saved(writer.wait())
with averages.smoothed(average):
    status = ending.finish(due, clock, config, raw_model, data['val'], meta, journal, device, dtype)
leave(status)
