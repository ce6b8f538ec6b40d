"""
Experiment 3: overfitting, and what holds against it. On a tenth of Tiny Shakespeare, 100,000 characters, since a model
that two cores can train would have to read all of it for hours before it knew it by heart.
"""

import tempfile as _tempfile
from pathlib import Path as _Path

from kit.data import corpora as _corpora
from kit.data import tokens as _tokens

if not (_tokens.dataset_folder('shakespeare_tenth') / 'train.bin').is_file():
    with _tempfile.TemporaryDirectory() as _folder:
        _text = _Path(_folder) / 'shakespeare_tenth.txt'
        _text.write_text(_corpora.read_shakespeare(_Path('data'), '')[:111_000], encoding='utf-8')
        _corpora.prepare('shakespeare_tenth', str(_text))

config = 'config/train_shakespeare_char_cpu.py'
dtype = 'float32'  # as its table was made
dataset = 'shakespeare_tenth'
learning_rate = 4e-3  # at the recipe's 1e-3 the best of 3,000 steps is still the last
max_iters = 2500
eval_iters = 0  # all of val: it is small

variants = {
    'neither': {'dropout': 0.0, 'weight_decay': 0.0},
    'dropout': {'dropout': 0.2, 'weight_decay': 0.0},
    'weight decay': {'dropout': 0.0, 'weight_decay': 0.1},
    'both': {'dropout': 0.2, 'weight_decay': 0.1},
}
