"""Reads training.log back, ours or the console output of nanoGPT."""

import re

from kit.overrides import fail

NUMBER = r'([-+\w.]+)'
STEP = re.compile(rf'step (\d+): train loss {NUMBER}, val loss {NUMBER}')
ITER = re.compile(rf'iter (\d+): loss {NUMBER}')


def read(path):
    """
    {'train', 'val', 'loss': {step: value}} of a log: the evaluations and the loss of single steps. Of a step that
    stands there twice, after a resume, the last counts. Lines that say neither are passed over, torn ones too.
    """
    try:
        lines = path.read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError as error:
        fail(f'{path} cannot be read: {error.strerror}')
    curves = {'train': {}, 'val': {}, 'loss': {}}
    for line in lines:
        try:
            if match := STEP.search(line):
                step = int(match[1])
                curves['train'][step], curves['val'][step] = float(match[2]), float(match[3])
            elif match := ITER.search(line):
                curves['loss'][int(match[1])] = float(match[2])
        except ValueError:
            continue
    if not curves['val'] and not curves['loss']:
        fail(f'{path} has no line of a run (step N: train loss ..., or iter N: loss ...)')
    return curves
