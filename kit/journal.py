"""
One place to write to. What the scripts print goes to the console and to training.log; figures go to metrics.jsonl,
TensorBoard and Weights & Biases. Only rank 0 writes.
"""

import json
import math
import sys
import time
from contextlib import suppress
from pathlib import Path

from kit import ranks
from kit.overrides import fail

# the tags of the figures in TensorBoard, where they differ from those in metrics.jsonl and Weights & Biases
TAGS = {
    'train/loss': 'Loss/train', 'val/loss': 'Loss/val', 'train/accuracy': 'Accuracy/train',
    'val/accuracy': 'Accuracy/val', 'loss': 'Training/Loss', 'lr': 'Learning_rate', 'grad_norm': 'Training/GradNorm',
    'tokens_per_second': 'Training/TokensPerSecond', 'mfu': 'Training/MFU', 'time_ms': 'Training/TimeMs',
    'epoch': 'Training/Epoch',
}


class Journal:
    """Stands in for sys.stdout, so that a plain print is also a line of training.log once that is open."""

    def __init__(self):
        self.console = sys.stdout
        self.early = []  # lines printed before there was a folder to write to
        self.log = self.metrics = self.tensorboard = self.wandb = None
        self.waiting = []  # records for TensorBoard, see record()
        self.failed = set()  # files that could not be written to
        sys.stdout = self

    def write(self, text):
        if ranks.is_main:
            with suppress(OSError):  # the terminal may be closed; training.log goes on
                self.console.write(text)
            if self.log:
                self.put(self.log, text)
            else:
                self.early.append(text)

    def put(self, file, text):
        """Write to a file of the run; a full disk is told once, and the training goes on."""
        try:
            file.write(text)
        except OSError as error:
            if file.name not in self.failed:
                self.failed.add(file.name)
                with suppress(OSError):
                    self.console.write(f'WARNING: {file.name} lacks lines from here on ({error.strerror})\n')

    def flush(self):
        if ranks.is_main:
            with suppress(OSError):
                self.console.flush()

    def __getattr__(self, name):  # isatty, encoding, fileno, ...
        return getattr(self.console, name)

    def open(self, out_dir, run_name, config, tensorboard=False, wandb_project=''):
        """From here on write training.log and metrics.jsonl in out_dir, TensorBoard under runs/, and W&B if named."""
        if not ranks.is_main:
            return
        if wandb_project:
            import wandb
            self.wandb = wandb.init(project=wandb_project, name=run_name, config=config)
        out_dir = Path(out_dir)
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            for name in 'training.log', 'metrics.jsonl':
                end_last_line(out_dir / name)
            self.log = open(out_dir / 'training.log', 'a', encoding='utf-8', buffering=1)
        except OSError as error:
            fail(f'out_dir = {str(out_dir)!r}: nothing can be written there ({error.strerror}); choose another folder')
        self.log.write(''.join(self.early))
        self.metrics = open(out_dir / 'metrics.jsonl', 'a', encoding='utf-8', buffering=1)
        self.start = time.time()
        if tensorboard:
            self.tensorboard = Path('runs') / f'{run_name}-{time.strftime("%Y%m%d-%H%M%S")}'

    def record(self, step, figures):
        """The figures of a step, by the names of metrics.jsonl."""
        if not ranks.is_main or not self.metrics:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}  # JSON has no NaN
        record = {'step': step, 'time': round(time.time() - self.start, 3)} | finite
        self.put(self.metrics, json.dumps(record) + '\n')
        if self.wandb:
            self.wandb.log(record | {'iter': step})
        if self.tensorboard:
            # its import takes a second: the first record waits for the second one, so that training begins before it
            self.waiting.append((step, figures))
            if len(self.waiting) > 1:
                self.flush_tensorboard()

    def flush_tensorboard(self):
        if isinstance(self.tensorboard, Path):
            from torch.utils.tensorboard import SummaryWriter
            try:
                self.tensorboard = SummaryWriter(self.tensorboard)
            except OSError as error:
                print(f'WARNING: no TensorBoard: {self.tensorboard} could not be written ({error.strerror})')
                self.tensorboard = None
                return
        for step, figures in self.waiting:
            for name, value in figures.items():
                self.tensorboard.add_scalar(TAGS.get(name, name), value, step)
        self.waiting.clear()

    def close(self):
        """Write out what waits, and give the console back."""
        if self.tensorboard:
            self.flush_tensorboard()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
        sys.stdout = self.console


def end_last_line(path):
    """A kill can leave half a line; what comes next begins a new one."""
    with open(path, 'a+b') as file:
        if file.tell() and (file.seek(-1, 2), file.read())[1] != b'\n':
            file.write(b'\n')


def duration(seconds):
    """Seconds as 41s, 1m32s or 2h05m."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f'{hours}h{m:02d}m' if hours else f'{m}m{s:02d}s' if m else f'{s}s'


def short(n):
    """A count as 950, 15.0k or 1.2M."""
    return f'{n / 1e6:.1f}M' if n >= 1e6 else f'{n / 1e3:.1f}k' if n >= 1e3 else f'{n:.0f}'
