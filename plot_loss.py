"""
Draw the loss curves of runs, and say what they show.

$ python plot_loss.py                                       the newest run here -> loss_curve.png in its folder
$ python plot_loss.py exp1_baseline exp1_large_lr           several runs -> comparison.png here
$ python plot_loss.py nanogpt.log --x=tokens                logs will do, nanoGPT's too
$ python plot_loss.py exp1_baseline --layers                the gradients by layer as well -> layers.png
$ python plot_loss.py --schedule config/train_gpt2.py       the learning rate of a run not made yet -> schedule.png
"""

import os
import shlex
from pathlib import Path

from kit.base import overrides
from kit.base.errors import reason
from kit.learn import schedules
from kit.watch import curves, diagnosis, pictures, runlogs

# ---------------------------------------------------------------------------------------------------------------------
# settings; the bare words are runs: their folders, or logs

x = 'steps'                 # steps, tokens or time: what the curves run over
layers = False              # draw the gradient norm by layer too, as a heat map
schedule = ''               # arguments for train.py: 'config/train_gpt2.py --lr_schedule=wsd'; their rate is drawn
show = False                # open the pictures in a window

runs = []
overrides.apply(globals(), operands=runs)

MOST_STEPS = 10**7  # of a schedule that is drawn; they take ten seconds

is_shown = show and pictures.has_screen()
if show and not is_shown:
    print('no window: matplotlib finds no screen here; the pictures are in the files')

# ---------------------------------------------------------------------------------------------------------------------
# a run that is still to be made has nothing but its rate

if schedule:
    if runs:
        overrides.fail(f'{runs[0]}: --schedule is of a run to be made, and not drawn with others; in quotes it takes '
                       "more arguments: --schedule='config/train_gpt2.py --max_iters=1000'")
    try:
        words = shlex.split(schedule)
    except ValueError as error:
        overrides.fail(f'schedule = {schedule!r}: {error}')
    settings = overrides.settings_of(overrides.ROOT / 'train.py', words)
    warmup = schedules.check(settings)
    if settings['max_iters'] > MOST_STEPS:
        overrides.fail(f'schedule: of no more than {MOST_STEPS:,} steps; --max_iters takes fewer')
    rates = [schedules.rate(step, settings) for step in range(settings['max_iters'])]
    if max(rates) > diagnosis.BEYOND:
        overrides.fail(f'schedule: a rate of {max(rates):.1e} is beyond all that can be drawn; a lower --learning_rate')
    path, name = Path('schedule.png'), f'{schedule}: {settings["lr_schedule"] if settings["decay_lr"] else "constant"}'
    try:
        pictures.schedule(rates, name, path, is_shown)
    except OSError as error:
        overrides.fail(f'{path} cannot be written: {reason(error)}')
    print(f'wrote {path}')
    print(f'{len(rates):,} steps: {warmup} of warmup, {max(rates):.1e} at the highest, {rates[-1]:.1e} in the last, '
          f'{sum(rates) / len(rates):.1e} on average')
    for name, words in [('max_minutes', 'the number of steps is not known before; drawn is max_iters'),
                        ('max_epochs', 'the number of steps is that of the dataset; drawn is max_iters'),
                        ('lr_by_norm', 'the rate will be lower where the gradient norm spikes')]:
        if settings[name]:
            print(f'{name}: {words}')
    if settings['lr_schedule'].startswith('plateau'):
        print('plateau: the rate will be cut where evaluations bring no progress')
    if is_shown:
        pictures.show_windows()
    raise SystemExit

# ---------------------------------------------------------------------------------------------------------------------
# read them all before anything is written

if not runs:
    logs = [log for name in ('metrics.jsonl', 'training.log') for log in [*Path().glob(name), *Path().glob(f'*/{name}')]
            if log.is_file() and log.stat().st_size]
    if not logs:
        overrides.fail('no folder here holds a run; train first, or name the folder of a run')
    runs = [str(max(logs, key=lambda log: log.stat().st_mtime).parent)]
paths = list(dict.fromkeys(map(Path, runs)))
names = [path.resolve().name if os.path.isdir(path) else path.stem for path in paths]
if len(set(names)) < len(names):
    names = [str(path) for path in paths]
histories = dict(zip(names, map(runlogs.read, paths)))

for name, history in histories.items():
    if x == 'tokens' and not history.facts.get('tokens_per_step'):
        overrides.fail(f'x = tokens: {name} does not say how many tokens its steps have; --x=steps goes with every run')
    if x == 'time' and not len(history.get('time')[0]):
        overrides.fail(f'x = time: {name} does not say how long its steps took; --x=steps goes with every run')
    if layers and not any(figure.startswith('grad_norm/') and len(history.get(figure)[0]) for figure in history.series):
        overrides.fail(f'layers: {name} has no gradient norms by layer; they are in the metrics.jsonl of a run')

# ---------------------------------------------------------------------------------------------------------------------
# draw: beside the run, or where we are if there are several

folder = paths[0] if os.path.isdir(paths[0]) else paths[0].parent
try:
    if len(paths) == 1:
        path = folder / 'loss_curve.png'
        pictures.loss_curve(histories[names[0]], names[0], path, x, is_shown)
    else:
        folder, path = Path(), Path('comparison.png')
        pictures.comparison(histories, path, x, is_shown)
    print(f'wrote {path}')
    if layers:
        path = folder / 'layers.png'
        pictures.layers(histories, path, x, is_shown)
        print(f'wrote {path}')
except OSError as error:
    overrides.fail(f'{path} cannot be written: {reason(error)}')
if left_out := curves.own_panels(histories.values())[1]:
    more = f' and {len(left_out) - 5} more' if len(left_out) > 5 else ''
    print(f'not drawn: {", ".join(left_out[:5])}{more}; of other figures {curves.MOST_OWN_PANELS} panels are '
          f'drawn, with at most {curves.MOST_CURVES} in each')

# ---------------------------------------------------------------------------------------------------------------------
# what they show, in words

for name, history in histories.items():
    print(f'\n{name}')
    for line in diagnosis.verdict(history):
        print(f'  {line}')
if is_shown:
    pictures.show_windows()
