"""
Average the weights of the last checkpoints of a run: often one better model than any of them, for no training at all.

$ python checkpoint_averaging.py --num_checkpoints 8            the newest 8 of checkpoints/ -> averaged_model.pt there
$ python checkpoint_averaging.py --checkpoint_dir exp1 --search         how many are best? decided on val
$ python checkpoint_averaging.py --method=greedy                take in one after the other, keep what helps on val
$ python train.py --test --checkpoint ./checkpoints/averaged_model.pt

Averages pay after a constant rate; after one that has decayed to nearly nothing the last checkpoints are nearly one.
"""

import os
from pathlib import Path

from kit.base import devices, errors, overrides
from kit.data import readers
from kit.state import averaging, checkpoints
from kit.watch import evaluation
from model import GPT, GPTConfig

# ---------------------------------------------------------------------------------------------------------------------
# settings

checkpoint_dir = './checkpoints'  # the folder of a run
num_checkpoints = 5         # >= 1: how many, those of the highest training steps
output_name = 'averaged_model.pt'  # written to the same folder
pattern = '*.pt'            # which files there come into question
method = 'uniform'          # uniform, linear or greedy: equal weights, of N the newest N times, or a soup by val loss
search = False              # try several numbers, up to all or to num_checkpoints if given; keep the best by val loss
evaluate = True             # measure the average, best.pt and the newest on val and test
device = 'auto'             # auto, cpu, cuda, cuda:1, mps: for measuring; the averaging itself runs on the CPU
dtype = 'auto'              # auto, float32, bfloat16 or float16: for measuring on a GPU; a CPU does it in float32

overrides.apply(globals(), [
    'pattern and pattern[0] != "/" and ".." not in pattern  # it is looked for in checkpoint_dir, such as "step_*.pt"',
    'evaluate or not search and method != "greedy"  # these go by the val loss; leave --evaluate=False out',
    'not (search and method == "greedy")  # a greedy soup chooses by itself; leave --search out',
    'output_name and "/" not in output_name  # a name in checkpoint_dir, such as averaged_model.pt',
    'output_name[-3:] == ".pt" and output_name[0] != "."  # a name that ends in .pt, such as averaged_model.pt',
])

# ---------------------------------------------------------------------------------------------------------------------
# which: the newest different steps, by the step that stands in the file

folder, output = Path(checkpoint_dir), Path(checkpoint_dir) / output_name
if not os.path.isdir(folder):
    overrides.fail(f'checkpoint_dir = {errors.shown(checkpoint_dir)}: there is no such folder; train first, or name '
                   'that of a run')
found = averaging.different_steps(folder, pattern)
for path, saved, _ in found.values():
    checkpoints.config_of(saved, GPTConfig, path)
steps, paths = list(found), {step: path for step, (path, _, _) in found.items()}
n_wanted = 1 if search and 'num_checkpoints' not in overrides.given else num_checkpoints
if len(steps) < n_wanted:
    there = f'{checkpoint_dir} has {len(steps)} ({", ".join(map(str, steps)) or "none"}) with pattern = ' + (
        errors.shown(pattern))
    overrides.fail(f'num_checkpoints = {num_checkpoints}: of different steps {there}; take fewer, or train with a '
                   'smaller --save_interval and a larger --keep_last to have more')
if os.path.isdir(output) or len(os.fsencode(output_name)) > 200:
    overrides.fail(f'output_name = {errors.shown(output_name)}: that is a folder, or too long; choose another name')
if (output_name in ('ckpt.pt', 'best.pt') or output_name.startswith('step_')
        or os.path.exists(output) and 'averaged' not in checkpoints.peek(output)):
    overrides.fail(f'output_name = {output_name!r}: that is a checkpoint of the training; choose another name')
newest = found[steps[0]][1]
chosen = steps if search and n_wanted == 1 else steps[:num_checkpoints]  # the newest first
model = GPT(GPTConfig(**newest['model_args']))
checkpoints.fill(model, averaging.weights(found[steps[0]]), paths[steps[0]])  # what does not fit model.py is no use
parameters = [name for name, _ in model.named_parameters()]
for step in chosen:
    if difference := checkpoints.first_difference(newest, found[step][1], GPTConfig.FREE):
        overrides.fail(f'{paths[step]} and {paths[steps[0]]} do not belong together: {difference}; '
                       'choose with --pattern, or from one run')

# ---------------------------------------------------------------------------------------------------------------------
# on what the average is measured: the whole of val and test, as in train.py

if evaluate:
    dataset = newest.get('config', {}).get('dataset', '')
    if not dataset:
        overrides.fail(f'{paths[steps[0]]} does not name its dataset, so nothing can be measured; --evaluate=False')
    print(f'measured on the dataset {dataset} (--evaluate=False leaves that out)')
    device = devices.choose_device(device)
    dtype = devices.choose_dtype(dtype, device, measures=True)
    data, meta = readers.open(newest['config'] | {'block_size': newest['model_args']['block_size']})
    checkpoints.check_fit(newest, meta)
    model.to(device)


def measure(weights, split='val'):
    """The loss of weights, {name: tensor}, over the whole of a split."""
    checkpoints.fill(model, weights)
    return evaluation.figures(model, data[split], split, 0, device, dtype)[f'{split}/loss']


# ---------------------------------------------------------------------------------------------------------------------
# the average


def average(steps):
    """The mean of these checkpoints, the newest first."""
    total = sum(range(1, len(steps) + 1))
    shares = [(len(steps) - i) / total if method == 'linear' else 1 / len(steps) for i in range(len(steps))]
    try:
        return averaging.mean([found[step] for step in steps], shares, parameters)
    except (checkpoints.Damaged, ValueError) as error:
        overrides.fail(f'{error}; leave it out with --pattern, or take fewer')


if search:
    losses = {}
    for n in [n for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100) if n <= len(chosen)]:
        losses[n] = measure(average(steps[:n]))
        print(f'{n:3} checkpoints: val loss {losses[n]:.4f}')
    chosen = steps[:min(losses, key=losses.get)]
elif method == 'greedy':  # Wortsman et al. 2022, arXiv:2203.05482
    alone = {step: measure(average([step])) for step in chosen}
    first, *others = sorted(alone, key=alone.get)
    chosen, lowest = [first], alone[first]
    for step in others:
        loss = measure(average([*chosen, step]))
        print(f'with step {step}: val loss {loss:.4f}, {"taken in" if loss <= lowest else "left out"}')
        if loss <= lowest:
            chosen, lowest = [*chosen, step], loss

averaged = {key: newest[key] for key in ('iter_num', 'best_val_loss', 'config', 'meta') if key in newest}
averaged = {'model': average(chosen), 'model_args': model.config.args(), **averaged,
            'averaged': {'steps': chosen, 'method': method}}
checkpoints.save(averaged, folder, [output_name], stop_on_error=True, parameters=parameters)
print(f'wrote {output}: the {method} average of {len(chosen)} checkpoints, steps {", ".join(map(str, chosen))}')

# ---------------------------------------------------------------------------------------------------------------------
# what it is worth, beside best.pt and the newest

if evaluate:
    rows = {output_name: averaged['model'], f'{paths[steps[0]].name} (the newest)': averaging.weights(found[steps[0]])}
    try:
        best = checkpoints.read(folder / 'best.pt') if os.path.isfile(folder / 'best.pt') else None
        if best:
            checkpoints.config_of(best, GPTConfig, folder / 'best.pt')
        if best and not checkpoints.first_difference(newest, best, GPTConfig.FREE):
            kind = checkpoints.average_in(best)
            rows[f'best.pt (step {best["iter_num"]}{f", its {kind}" if kind else ""})'] = checkpoints.weights(best)
    except checkpoints.Damaged as error:
        print(f'not compared: {error}')
    for name, weights in rows.items():
        losses = [f'{split} loss {measure(weights, split):.4f}' for split in ('val', 'test') if split in data]
        print(f'{", ".join(losses)}: {name}')
