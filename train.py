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
$ python train.py config/train_gpt2.py --max_minutes=30             as many steps as fit, the rate falling to the end
$ python train.py config/train_gpt2.py --find_lr                    which learning rate to begin with
"""

import math
import time

import torch

from kit import (
    averages,
    batches,
    checkpoints,
    devices,
    diagnosis,
    errands,
    evaluation,
    gradients,
    optimizers,
    overrides,
    provenance,
    ranks,
    rate_finder,
    readers,
    schedules,
    signals,
    starts,
)
from kit.budget import Budget
from kit.journal import Journal, check_wandb, duration, short
from model import GPT, GPTConfig, default_heads

journal = Journal()  # from here on every line that is printed also goes to training.log

# ---------------------------------------------------------------------------------------------------------------------
# settings: the defaults train a small model in about two minutes on two CPU cores

# the run
out_dir = 'checkpoints'     # checkpoints, training.log and metrics.jsonl go here; an earlier run is moved aside
init_from = 'scratch'       # scratch, resume, auto (resume if it can), FILE.pt, gpt2[-medium, -large, -xl], HF folder
eval_interval = 400         # steps between evaluations, 0 = only at the end
eval_iters = 40             # batches an evaluation takes from each split, 0 = all of val and as much of train
eval_only = False           # evaluate once and leave
log_interval = 50           # steps between iter lines, 0 = none
save_interval = 100         # steps between the checkpoints step_*.pt, 0 = none; close ones average well
keep_last = 10              # how many of these are kept, 0 = all
always_save_checkpoint = True  # whether an evaluation without progress refreshes ckpt.pt too
save_errors = 'warn'        # where a checkpoint cannot be written: warn and train on, or stop
dry_run = False             # show the batch, the model and what the run will take, and leave
test = False                # measure a checkpoint on the test split, and leave
checkpoint = ''             # which one --test takes, or several: a.pt,b.pt; '' = best.pt of out_dir
weights = 'auto'            # of a checkpoint's weights: auto (its average where it has one), raw, ema, swa
inspect_step = -1           # replay this step of the run in out_dir: its texts, the costliest first; -1 = train
find_lr = False             # raise the rate step by step, suggest one, and leave
find_lr_start = 1e-5        # from this rate
find_lr_end = 1.0           # to this one, or to where the loss diverges
debug_nan = False           # at the first bad number: stop, and say which text, operation or gradient made it
# where figures go, beside the console
tensorboard = True          # to runs/
wandb_log = False           # to Weights & Biases
wandb_project = 'flatgpt'   # and its project there
wandb_run_name = ''         # '' = the name of out_dir
# data
dataset = 'python_docs'     # a folder in data/, see prepare.py; or several in fixed shares: a:0.7,b:0.3
batch_mode = 'windows'      # rows: windows of the text, packed (whole documents), padded (pairs, loss on the responses)
document_attention = True   # packed: no token looks into another document, and positions begin anew in each
too_long = 'cut'            # padded: of pairs longer than block_size cut the prompt from the left, or drop them
sampling = 'random'         # random rows, shuffle (each once an epoch) or sequential
mask_prob = 0.0             # share of the input tokens that are hidden or replaced; 0 = none, in mlm 0.15
objective = 'causal'        # causal: each token from those before it; mlm: hidden ones from both sides, as BERT
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
max_epochs = 0.0            # or as many steps as it takes to read the text so often; 0 = max_iters
weight_decay = 1e-1         # on matrices and embeddings
beta1 = 0.9                 # memory of the mean gradient
beta2 = 0.99                # and of its square: 0.95 where a step has many tokens
grad_clip = 1.0             # gradients are scaled down to this norm, 0.0 = never
grad_clip_quantile = 0.0    # or to this quantile of the last 100 norms: 0.1 clips nine of ten, 0.0 = not so
grad_clip_value = 0.0       # then each number of theirs is cut to this size, 0.0 = never
max_bad_steps = 20          # so many steps in a row with a NaN or Inf: go back once, then stop; 0 = go on and on
ema_decay = 0.0             # moving average of the weights, evaluated and saved beside them: 0.999, 0.9999; 0 = none
swa_start = 0               # or the plain mean of the weights from this step on, 0 = none
# when to end
max_minutes = 0.0           # wall time: max_iters becomes what fits, measured in the warmup; 0 = as long as it takes
early_stop = 0              # evaluations in a row without progress, 0 = never
min_delta = 1e-4            # what the val loss must fall by to be progress
early_stop_norm = False     # or when the gradient has died or exploded, looked at with each evaluation
# learning rate over the steps
lr_schedule = 'cosine'      # or linear, step:1000, restarts:1000, wsd, plateau:3, ...: kit/schedules.py has them all
decay_lr = True             # False: constant after the warmup
warmup_iters = 100          # steps of linear warmup, before any schedule
warmup_share = 0.0          # or this share of max_iters
warmup_start_lr = 0.0       # the rate of the first step, 0 = learning_rate / (warmup_iters + 1)
lr_decay_iters = 0          # the step at which min_lr is reached, 0 = max_iters
min_lr = 1e-4               # learning_rate / 10 or less; no schedule goes below it
lr_by_norm = False          # lower it while the gradient norm spikes, or stays far above grad_clip
# machine
device = 'auto'             # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'              # auto, float32, bfloat16, float16
scale_loss = True           # in float16, whose small gradients would be 0
compile = None              # torch.compile: True, False, None = where it pays
backend = 'auto'            # between processes: auto, nccl, gloo
seed = 1337                 # of the first weights, the batches and dropout

# what must hold, checked before anything is written
RULES = [
    'eval_interval >= 0', 'eval_iters >= 0', 'log_interval >= 0', 'save_interval >= 0', 'keep_last >= 0',
    '0 <= seed < 2**63', 'inspect_step >= -1',
    'batch_size >= 1', 'gradient_accumulation_steps >= 1', 'block_size >= 1', 'n_layer >= 1', 'n_head >= 0',
    'n_embd >= 1', 'max_iters >= 1', 'warmup_iters >= 0', 'lr_decay_iters >= 0', 'learning_rate > 0', 'min_lr >= 0',
    'weight_decay >= 0', '0 <= dropout < 1', '0 <= beta1 < 1', '0 <= beta2 < 1', 'grad_clip >= 0',
    '0 <= grad_clip_quantile < 1', 'grad_clip_value >= 0', 'max_bad_steps >= 0', '0 <= ema_decay < 1', 'swa_start >= 0',
    'max_minutes >= 0', 'early_stop >= 0', 'min_delta >= 0', '0 <= warmup_share < 1', 'warmup_start_lr >= 0',
    '0 < find_lr_start < find_lr_end  # the rates climb',
    'max_epochs or swa_start < max_iters  # the average would never begin',
    'not (ema_decay and swa_start)  # one average at a time; --ema_decay=0 or --swa_start=0',
    'weights in ("auto", "raw", "ema", "swa")', 'save_errors in ("warn", "stop")',
    'n_head == 0 or n_embd % n_head == 0  # n_embd must be a multiple of n_head; --n_head=0 takes a head per 64',
    'eval_interval or not (early_stop or early_stop_norm)  # they go by evaluations; --eval_interval=250',
    'not max_minutes or not (lr_decay_iters or warmup_share)  # how many steps is not known before; set them to 0',
    'not max_minutes or init_from == "resume" or warmup_iters >= 25  # measured in the warmup; --warmup_iters=100',
    'sampling in ("random", "shuffle", "sequential")', 'batch_mode in ("windows", "packed", "padded")',
    'too_long in ("cut", "drop")', 'objective in ("causal", "mlm")', '0 <= mask_prob < 1', 'max_epochs >= 0',
    'not (objective == "mlm" and batch_mode == "padded")  # pairs are for writing; windows or packed fill masks',
    'not (max_epochs and max_minutes)  # one of them says when to end; set the other to 0',
    'dtype in ("auto", "float32", "bfloat16", "float16")', 'backend in ("auto", "nccl", "gloo")',
    'test or not checkpoint  # --checkpoint goes with --test; a resume takes ckpt.pt of --out_dir',
    'out_dir.strip("./")  # the run needs a folder of its own, such as --out_dir=exp1',
    'test + eval_only + dry_run + find_lr + (inspect_step >= 0) <= 1  # one errand at a time',
    'not (find_lr and debug_nan)  # where it diverges there are bad numbers, and no fault',
    'dataset  # it needs the name of a folder in data/',
]
# settings that belong to a launch: a resume does not take them over
LAUNCH = ('out_dir', 'init_from', 'eval_only', 'dry_run', 'test', 'checkpoint', 'weights', 'inspect_step', 'find_lr',
          'find_lr_start', 'find_lr_end', 'debug_nan', 'device', 'compile', 'backend')
SHAPE = 'n_layer', 'n_head', 'n_embd', 'bias', 'block_size'  # what weights cannot do without
config = overrides.apply(globals(), RULES)

# ---------------------------------------------------------------------------------------------------------------------
# where we start from: nothing, a checkpoint, or OpenAI's weights; those bring the settings of their model along

device = devices.choose_device(device, ranks.local_rank, ranks.world_size)
ranks.start(backend, device)

is_errand = test or eval_only or dry_run or find_lr or inspect_step >= 0  # which writes nothing of a run
if test:
    config, tested = starts.find_tested(globals(), config, RULES, SHAPE, LAUNCH)
else:
    config, saved, past = starts.find(globals(), config, RULES, SHAPE, LAUNCH, is_errand)
if find_lr or inspect_step >= 0:
    max_iters = max(max_iters, inspect_step + 1)
    eval_interval = save_interval = log_interval = max_bad_steps = max_minutes = early_stop = early_stop_norm = 0
if wandb_log and not is_errand:
    check_wandb()
dtype = devices.choose_dtype(dtype, device)
micro_steps = ranks.share(gradient_accumulation_steps, 'gradient_accumulation_steps')  # of this process
rows_per_step = batch_size * gradient_accumulation_steps

# ---------------------------------------------------------------------------------------------------------------------
# data: the rows of a step are a function of (seed, step), however it is cut into micro-steps and processes

if objective == 'mlm' and not mask_prob:
    mask_prob = config['mask_prob'] = 0.15
data, meta = readers.open(config)
steps_per_epoch = data['train'].rows_per_epoch(sampling) / rows_per_step
tokens_per_step = round(rows_per_step * data['train'].mean_length)  # without padding
if max_epochs:
    max_iters = config['max_iters'] = schedules.steps(config, steps_per_epoch, is_run=not test)
warmup_steps = schedules.check(config)


def get_rows(split, step):
    """All rows of a step, of every micro-step and process: see Rows.of_step."""
    n = rewinds if inspect_step < 0 else max(rewinds, int(past.at('rewinds', step)))
    return data[split].of_step(rows_per_step, seed, step, sampling, n)


def get_batch(split, step, micro_step):
    """
    One micro-step of this process. x, y and documents, each (batch_size, T): y is what should come after x, or -1 where
    none counts; documents is None where attention may look at the whole row. And how many parts of its size, by the
    number of targets, the step of all processes has.
    """
    step, micro_step = step + micro_step // micro_steps, micro_step % micro_steps  # the one after the last
    first = (micro_step * ranks.world_size + ranks.rank) * batch_size
    rows, noise, n_targets = get_rows(split, step)
    mine = rows[first:first + batch_size], noise if noise is None else noise[first:first + batch_size]
    parts = n_targets / data[split].count(*mine)
    return *(devices.send(a, device) for a in data[split].fetch(*mine)), parts / ranks.world_size


if test:
    errands.test(tested, lambda args: GPT(GPTConfig(**args)), weights, config, data, meta, device, dtype)
    ranks.leave()

# ---------------------------------------------------------------------------------------------------------------------
# model and optimizer

model_args = starts.model_args(
    saved, meta, mask_prob > 0, objective == 'causal', n_layer=n_layer, n_head=n_head or default_heads(n_embd),
    n_embd=n_embd, block_size=block_size, bias=bias, dropout=dropout)
batches.seed_all(seed)
raw_model = GPT(GPTConfig(**model_args))
if saved:
    checkpoints.fill(raw_model, saved['model'])
raw_model.to(device)
average = averages.running(raw_model, ema_decay, swa_start)

optimizer = optimizers.adamw(raw_model, weight_decay, learning_rate, (beta1, beta2))
scaler = torch.amp.GradScaler(device.type, enabled=dtype == 'float16' and scale_loss)
state = saved if init_from == 'resume' else {}  # of the training that goes on
step, val_losses, recent_norms = starts.position(state, device)
best_val_loss, rewinds = float(state.get('best_val_loss', math.inf)), state.get('rewinds', 0)  # over bad numbers
bad_steps = torch.tensor(state.get('bad_steps', [0, 0]), device=device)  # in a row up to now, since the last iter line
if state:
    checkpoints.restore(state, raw_model, optimizer, scaler)
    averages.restore(average, state)
is_other_text = state.get('config', {}).get('dataset', dataset) != dataset
if is_other_text:
    best_val_loss, val_losses = math.inf, []  # a loss on another text is no mark
if find_lr:
    finder = rate_finder.RangeTest(find_lr_start, find_lr_end)
    max_iters = step + finder.steps
budget = Budget(max_minutes, step, warmup_steps, device, state.get('fitted_minutes') == max_minutes)
if max_minutes and budget.is_fitted:
    max_iters = config['max_iters'] = state['config']['max_iters']  # whatever is given here
first_new_step = step + 1 if init_from == 'resume' else 0  # the resumed one was evaluated and saved before
saved = state = None  # its memory is free again

flops_per_step = raw_model.flops_per_token() * tokens_per_step
if devices.choose_compile(compile, device, flops_per_step * max_iters):
    raw_model.compile()
    if average:
        average.module.compile()
model = ranks.wrap(raw_model, device)

# ---------------------------------------------------------------------------------------------------------------------
# the learning rate of a step: linear warmup, then a cosine down to min_lr (arXiv:1608.03983), or another schedule


def get_lr(step):
    if step < warmup_steps:
        first = not warmup_start_lr  # nanoGPT's step 0 is one stride above a rate of 0
        return warmup_start_lr + (learning_rate - warmup_start_lr) * (step + first) / (warmup_steps + first)
    if not budget.is_fitted:
        return learning_rate  # how far it is to the end is not known yet
    if not decay_lr or lr_schedule != 'cosine':
        return schedules.rate(step, config, val_losses)
    n = max(1, (lr_decay_iters or max_iters) - warmup_steps)
    progress = min(1, (step - warmup_steps) / n)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


# ---------------------------------------------------------------------------------------------------------------------
# evaluation: the same windows every time, shared out over the processes; no random number is drawn


def evaluate():
    evaluated = averages.smoothed(raw_model, average)  # best.pt goes by it
    rows = {'val': eval_iters * batch_size, 'train': eval_iters * batch_size or data['val'].n_tokens // block_size}
    figures = {}
    for split in 'train', 'val':
        figures |= evaluation.figures(evaluated, data[split], split, batch_size, rows[split], device, dtype)
    line = (f'step {step}: train loss {figures["train/loss"]:.4f}, val loss {figures["val/loss"]:.4f}, '
            f'val accuracy {figures["val/accuracy"]:.2%}')
    if evaluated is not raw_model:
        raw = evaluation.figures(raw_model, data['val'], 'val', batch_size, rows['val'], device, dtype)
        figures['raw/val/loss'] = raw['val/loss']
        line += f', raw val loss {figures["raw/val/loss"]:.4f} (the others are of the {average.kind})'
    line += ''.join(f', {name} {loss:.4f}' for name, loss in figures.items() if name.startswith('val/loss/'))
    print(line)
    return figures


if eval_only:
    evaluate()
    ranks.leave()

# ---------------------------------------------------------------------------------------------------------------------
# a look before training

X, Y, D, parts = get_batch('train', step, 0)
seconds = errands.first_look(model, raw_model, X, Y, D, meta, device, dtype, dry_run and init_from == 'scratch')
if not is_errand or dry_run:
    errands.show_plan(config, step, warmup_steps, micro_steps * seconds, steps_per_epoch, data['train'])
if dry_run:
    ranks.leave()

if not is_errand:
    ranks.from_main(lambda: checkpoints.claim(out_dir, is_new=init_from != 'resume'))
    facts = {'vocab_size': model_args['vocab_size'], 'parameters': raw_model.count_params(),
             'tokens_per_step': tokens_per_step, 'warmup_iters': warmup_steps,
             'unigram_entropy': data['train'].unigram_entropy()}
    journal.open(out_dir, config, facts, step if init_from == 'resume' else None)
    journal.show('model', raw_model, X[:1, :8])
    if ranks.is_main:
        provenance.record(out_dir, config, facts, step, journal.places())
        checkpoints.move_later_aside(out_dir, step, best_too=is_other_text)

# ---------------------------------------------------------------------------------------------------------------------
# training: steps are numbered by the updates made so far, so `step` 0 is the untrained model and max_iters the last

if not is_errand:  # which has nothing to save
    signals.listen()
why_stop = ''
clock, steps_timed, data_seconds, is_saved = time.perf_counter(), 0, 0.0, True
norms_of_bad = torch.zeros(len(list(raw_model.parameters())), device=device)  # of the last bad step's gradients
while True:
    # bad steps are skipped, see below; where they do not end, go back to before them, with other text from there on
    if max_bad_steps and step % max_bad_steps == 0 and bad_steps[0] >= max_bad_steps:  # seldom, since it waits
        if rewinds:
            print(diagnosis.stopped_by_bad_numbers(step, int(bad_steps[0]), learning_rate, dtype))
            journal.close()
            ranks.leave(1)
        saved = errands.go_back(out_dir, step - int(bad_steps[0]), raw_model, optimizer, scaler, average)
        if saved:
            step, val_losses, recent_norms = starts.position(saved, device)
            first_new_step, saved = step + 1, None
        rewinds += 1
        journal.go_back(step, rewinds)
        bad_steps[0] = 0
        X, Y, D, parts = get_batch('train', step, 0)

    # evaluate: at each interval, at the end, and where max_minutes measures how long it takes
    budget.took('step', step)
    is_new, is_at_interval = step >= first_new_step, eval_interval > 0 and step % eval_interval == 0
    is_last = budget.is_over(step) or (budget.is_fitted and step >= max_iters)
    is_evaluated = is_last or (is_new and is_at_interval) or budget.evaluates_at(step)
    best_before, is_best = best_val_loss, False
    if is_evaluated:
        figures = evaluate()
        is_best = figures['val/loss'] < best_val_loss
        best_val_loss = min(best_val_loss, figures['val/loss'])
        journal.record(step, figures)
        budget.took('evaluation', step)
    if is_new and is_at_interval:
        val_losses.append(figures['val/loss'])
    if is_at_interval and not is_last:  # where it has ended before, a resume ends again, unless it allows for more
        why_stop = diagnosis.early_stop(val_losses, early_stop, min_delta,
                                        recent_norms.tolist() if early_stop_norm else [])
        is_last = why_stop != ''

    # save what is new, best, due, last, or asked for by a signal
    asked = signals.take()
    is_due = save_interval > 0 and step % save_interval == 0
    is_worth_it = is_evaluated and (is_best or always_save_checkpoint) or budget.saves_at(step)
    if is_new and step > 0 and not is_errand and (is_last or is_due or asked or is_worth_it):
        names = ([f'step_{step:07d}.pt'] if is_due else []) + (['best.pt'] if is_best else []) + ['ckpt.pt']
        if ranks.is_main:
            print(f'saving checkpoint to {out_dir} ({", ".join(names)})')
            is_saved = checkpoints.save({
                'model': raw_model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
                **averages.state(average), 'model_args': model_args, 'iter_num': step, 'best_val_loss': best_val_loss,
                'config': config, 'meta': meta, 'epoch': step / steps_per_epoch, 'rewinds': rewinds,
                'bad_steps': bad_steps.tolist(), 'val_losses': val_losses, 'recent_norms': recent_norms.tolist(),
                'fitted_minutes': max_minutes if budget.is_fitted else 0.0,
                'random_states': checkpoints.random_states(), 'versions': provenance.versions(),
            }, out_dir, names, stop_on_error=save_errors == 'stop')
            if is_saved:
                checkpoints.prune(out_dir, keep_last)
            else:
                best_val_loss = best_before  # what could not be kept may be beaten by less
        budget.took('save', step)
    if is_evaluated:
        errands.show_inside(journal, step, averages.smoothed(raw_model, average), data['val'], meta, device, is_last)
        budget.took('evaluation', step, 0)
    if asked in signals.STOP:
        errands.show_how_to_go_on(asked, step, out_dir)
        journal.close()
        ranks.leave(signals.status(asked))
    if is_last:
        break
    if step == budget.fit_at and not budget.is_fitted:
        max_iters = config['max_iters'] = budget.fit(step, eval_interval, save_interval)
    if is_evaluated or is_due or asked:
        clock, steps_timed, data_seconds = time.perf_counter(), 0, 0.0

    # one step: the mean gradient of all its rows, a micro-step at a time
    if step == inspect_step:
        errands.show_rows(raw_model, data['train'], *get_rows('train', step)[:2], meta, batch_size, device, dtype)
    torch.manual_seed(batches.torch_seed(seed, step, ranks.rank))  # dropout draws anew, so a resume needs no history
    loss_of_step = 0.0
    for micro_step in range(micro_steps):
        if debug_nan:
            errands.check_ids(X, Y, model_args['vocab_size'], step, micro_step)
        ranks.exchange_gradients(model, micro_step == micro_steps - 1)  # once a step is enough
        with devices.autocast(device, dtype):
            _, loss = model(X, Y, D)
            loss = loss / parts  # each target of the step counts the same
        before_batch = time.perf_counter()
        X, Y, D, parts = get_batch('train', step, micro_step + 1)  # the next one, while the device works on this one
        data_seconds += time.perf_counter() - before_batch
        scaler.scale(loss).backward()
        loss_of_step += loss.detach()
    loss_of_step = ranks.total(loss_of_step) / ranks.world_size
    scaler.unscale_(optimizer)  # the norm must be that of the true gradients
    norms = gradients.norms(raw_model)  # of each parameter's, before clipping
    grad_norm = torch.linalg.vector_norm(norms)
    # a bad number on any rank makes loss or norm bad on all: then nothing moves, neither weights, moments nor average
    is_good = torch.isfinite(loss_of_step) & torch.isfinite(grad_norm)  # stays on the device
    recent_norms = torch.where(is_good, torch.cat([recent_norms[1:], grad_norm[None]]), recent_norms)

    # clip, choose the rate, and step
    limit = gradients.clip_limit(recent_norms, grad_clip, grad_clip_quantile)
    torch.nn.utils.clip_grads_with_norm_(raw_model.parameters(), limit, grad_norm)
    if grad_clip_value:
        torch.nn.utils.clip_grad_value_(raw_model.parameters(), grad_clip_value)
    factor = schedules.damping(recent_norms.tolist(), limit) if lr_by_norm else 1.0
    lr = finder.rate() if find_lr else factor * get_lr(step)
    if past:
        lr = past.exactly('lr', step, lr)  # as it was, whatever evaluations or a clock had made of it
    for group in optimizer.param_groups:
        group['lr'] = lr
    is_logged = log_interval and (step % log_interval == 0 or step + 1 == max_iters) or step == inspect_step
    weights_before = gradients.sample(raw_model) if is_logged else None
    optimizers.step(optimizer, is_good)
    if average and step >= swa_start and is_good:
        average.update_parameters(raw_model)
    # while float16's scale is above 1, a norm that overflows only lowers it, and is no bad step
    is_bad = ~torch.isfinite(loss_of_step) if scaler.get_scale() > 1 else ~is_good
    bad_steps = torch.stack([(bad_steps[0] + 1) * is_bad, bad_steps[1] + is_bad])
    norms_of_bad = torch.where(is_bad, norms, norms_of_bad)
    if debug_nan and is_bad:
        errands.hunt(raw_model, [get_batch('train', step, i) for i in range(micro_steps)], step,
                     norms, batches.torch_seed(seed, step, ranks.rank), scaler, device, dtype)
        journal.close()
        ranks.leave(1)
    if find_lr and finder.take(math.nan if is_bad else loss_of_step.item()):
        ranks.from_main(lambda: rate_finder.report(finder, out_dir))
        ranks.leave()
    scaler.update(scaler.get_scale() if scaler.is_enabled() and is_bad else None)  # these are no fault of the scale
    steps_timed += 1

    # log; reading the loss waits for the device, so the steps in between stay unread
    if log_interval:
        journal.update(step, loss_of_step, grad_norm, {'lr': lr} | ({'lr_factor': factor} if lr_by_norm else {})
                       | ({'clip_limit': limit} if grad_clip_quantile else {}))
    if is_logged:
        loss_of_step = loss_of_step.item()
        seconds = (time.perf_counter() - clock) / steps_timed
        layers = gradients.by_layer(raw_model, norms, weights_before)
        if step == inspect_step:
            errands.show_step(past, step, {'loss': loss_of_step, 'grad_norm': grad_norm.item(), 'lr': lr} | layers)
            ranks.leave()
        rate = tokens_per_step / seconds
        mfu = flops_per_step / seconds / (devices.peak_flops(device, dtype) * ranks.world_size)
        epoch = (step + 1) / steps_per_epoch
        eta = seconds * (max_iters - step - 1) if budget.is_fitted else budget.left()
        print(f'iter {step}: loss {loss_of_step:.4f}, time {seconds * 1000:.2f}ms, mfu {mfu:.2%}, lr {lr:.1e}, '
              f'norm {grad_norm:.2f}, {short(rate)} tok/s, eta {duration(eta)}, epoch {epoch:.2f}')
        journal.read({'time_ms': seconds * 1000, 'data_ms': data_seconds / steps_timed * 1000,
                      'tokens_per_second': rate, 'mfu': mfu, 'epoch': epoch, 'bad_steps': int(bad_steps[1])}
                     | layers | devices.usage(device))
        if bad_steps[1]:
            print(f'WARNING: bad numbers: the loss or the gradient of {int(bad_steps[1])} of the steps up to {step} '
                  f'was not finite; they were skipped. The last of them: {gradients.at_fault(raw_model, norms_of_bad)}')
            bad_steps[1] = 0
    if is_evaluated:
        journal.show('histograms', step, lambda: gradients.values(raw_model))
    if is_logged or is_evaluated:
        clock, steps_timed, data_seconds = time.perf_counter(), 0, 0.0
    optimizer.zero_grad(set_to_none=True)
    step += 1

# ---------------------------------------------------------------------------------------------------------------------
# what came of it

signals.obey()
errands.show_end(why_stop, step, max_iters, budget, out_dir, averages.smoothed(raw_model, average))
if ranks.is_main:
    errands.show_sample(averages.smoothed(raw_model, average), data['val'], meta, device, dtype)
    print('\n'.join(diagnosis.verdict(journal.history)))
    errands.show_next_commands(out_dir, objective == 'causal')
journal.close()
ranks.leave(0 if is_saved else 1)  # 1: the last state could not be saved
