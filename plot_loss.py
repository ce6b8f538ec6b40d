"""
Draw the loss curves of runs from their logs.

$ python plot_loss.py                                       the newest run -> loss_curve.png in its folder
$ python plot_loss.py exp1_baseline exp1_large_lr           several runs -> comparison.png here
"""

from pathlib import Path

from kit import overrides, pictures, runlogs

runs = []
overrides.apply(globals(), operands=runs)

logs = [Path(run) / 'training.log' if Path(run).is_dir() else Path(run) for run in runs]
if not logs:
    logs = sorted(Path().glob('*/training.log'), key=lambda path: path.stat().st_mtime)[-1:]
    if not logs:
        overrides.fail('no folder here holds a training.log; train first, or name the folder of a run')
for log in logs:
    if not log.is_file():
        overrides.fail(f'{log}: there is no such log')
names = [log.parent.name if log.name == 'training.log' else log.stem for log in logs]
if len(set(names)) < len(names):
    names = [str(log) for log in logs]
curves = [runlogs.read(log) for log in logs]

path = logs[0].parent / 'loss_curve.png' if len(logs) == 1 else Path('comparison.png')
try:
    if len(logs) == 1:
        pictures.loss_curve(curves[0], names[0], path)
    else:
        pictures.comparison(dict(zip(names, curves)), path)
except OSError as error:
    overrides.fail(f'{path} cannot be written: {error.strerror}')
print(f'wrote {path}')
