"""
One place to write to. What the scripts print goes to the console and to training.log; figures go to metrics.jsonl,
TensorBoard and Weights & Biases. Only rank 0 writes. A file or a service that fails is told once, and training goes on.
"""

import atexit
import io
import itertools
import json
import math
import numbers
import os
import re
import sys
import threading
import time
import warnings
from contextlib import redirect_stdout, suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from kit.base import devices, files, ranks
from kit.base.errors import explained, fail, reason, shown
from kit.base.overrides import require
from kit.watch import runlogs
from kit.watch.diagnosis import History

# the tags of the figures in TensorBoard, where they differ from those in metrics.jsonl and Weights & Biases
TAGS = {
    'train/loss': 'Loss/train', 'val/loss': 'Loss/val', 'raw/val/loss': 'Loss/val_raw',
    'train/accuracy': 'Accuracy/train', 'val/accuracy': 'Accuracy/val', 'loss': 'Training/Loss', 'lr': 'Learning_rate',
    'grad_norm': 'Training/GradNorm', 'clip_rate': 'Training/ClipRate', 'time_ms': 'Training/TimeMs',
    'data_ms': 'Training/DataMs', 'tokens_per_second': 'Training/TokensPerSecond', 'mfu': 'Training/MFU',
    'lr_factor': 'Training/RateFactor', 'clip_limit': 'Training/ClipLimit',
    'epoch': 'Training/Epoch', 'bad_steps': 'Training/BadSteps', 'rewinds': 'Training/Rewinds',
}
MOST_UNREAD = 1000  # updates whose figures wait on the device
PREFIXES = {'grad_norm/': 'GradNorm/', 'update_ratio/': 'UpdateRatio/', 'system/': 'System/',
            'train/loss/': 'Loss/train/', 'val/loss/': 'Loss/val/'}  # of the datasets of a mixture


class Journal:
    """Stands in for sys.stdout, so that a plain print is also a line of training.log once that is open."""

    def __init__(self):
        self.console = sys.stdout
        self.early = []  # lines printed before there was a folder to write to
        self.log = self.metrics = None
        self.history = History()
        self.unread = {}  # step: (figures, time.time()); None stands for those that wait on a device
        self.on_device = {}  # (device, dtype): ([(step, name), ...], [tensor of these, ...])
        self.on_the_way = []  # ([(step, name), ...], a function that waits for the tensor of these), of a device each
        self.line = None  # a function that shows the line of a step, where that comes later, see later()
        self.sinks = []
        self.waiting = []  # what the sinks get when the first update is made; None after that
        self.failed = set()  # files and sinks that could not be written to
        self.clipped = []  # for each update since the last iter line, whether it was
        sys.stdout = self

    # -----------------------------------------------------------------------------------------------------------------
    # lines

    def write(self, text):
        self.catch_up()
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

    # -----------------------------------------------------------------------------------------------------------------
    # figures

    def open(self, out_dir, settings, facts, step=None):
        """
        From here on write training.log and metrics.jsonl in out_dir, and to the sinks that the settings name. step:
        the one after which a run goes on, None for a new one.
        """
        self.history = History(settings | facts)
        if not ranks.is_main:
            return
        out_dir = Path(out_dir)
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            for name in 'training.log', 'metrics.jsonl':
                end_last_line(out_dir / name)
            self.log, self.metrics = (files.open_own(out_dir / name, encoding='utf-8', errors='backslashreplace',
                                                     buffering=1) for name in ('training.log', 'metrics.jsonl'))
        except OSError as error:
            fail(f'out_dir = {str(out_dir)!r}: {error.filename} cannot be written ({reason(error)}); choose another '
                 'folder')
        self.put(self.log, ''.join(self.early))
        atexit.register(self.rescue)
        last = {}
        if step is not None:
            last = next(reversed(runlogs.read_config(out_dir)['launches']), {}).get('sinks')
            last = last if isinstance(last, dict) else {}
            runlogs.read_records(out_dir, self.history)
            self.history.cut(step)
            self.history.replay()  # what was said before the interruption need not be said again
            self.clipped = self.clipped_before(step)
        self.pictures_due = time.time() + 100  # a shorter run gets them at its end
        self.start = time.time() - max(self.history.last('time', 1), default=0.0)
        name = settings['wandb_run_name'] or out_dir.name
        if settings['tensorboard']:
            self.sinks.append(TensorBoard(run_folder(name, last.get(TensorBoard.name)), settings, step))
        if settings['wandb_log']:
            self.sinks.append(WandB(settings, name, last.get(WandB.name)))

    def places(self):
        """Where the sinks write, to be remembered for a resume."""
        return {sink.name: sink.place for sink in self.sinks}

    def record(self, step, figures):
        """
        The figures of a step, by the names of metrics.jsonl, behind those of the updates up to now. Numbers or 0-dim
        tensors, as update() takes them.
        """
        figures = {name: float(value) if isinstance(value, torch.Tensor) else value
                   for name, value in checked(figures).items()}
        self.read()
        if self.history.series:  # the first record waits
            self.start_sinks()
        self.write_record(step, figures, time.time())

    def write_record(self, step, figures, at):
        if not self.metrics:
            return
        self.history.add(step, {'time': at - self.start} | figures)
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}  # JSON has no NaN
        record = {'step': step, 'time': round(at - self.start, 3)} | finite
        self.put(self.metrics, json.dumps(record) + '\n')
        self.show('record', step, figures, at)

    def update(self, step, figures):
        """
        An update of the weights, and its figures: {name: a number, or a 0-dim tensor of any real dtype on any device},
        not the same ones in each step. Tensors are copied, and stay on their device until read(). Raises ValueError
        for a figure that is none. Nothing is recorded with log_interval = 0.
        """
        figures, groups = checked(figures), {}
        if not self.metrics or not self.history.facts['log_interval']:
            return
        for name, value in figures.items():
            if isinstance(value, torch.Tensor):
                figures[name] = None
                groups.setdefault((value.device, value.dtype), {})[name] = value
        for key, group in groups.items():
            places, tensors = self.on_device.setdefault(key, ([], []))
            places += [(step, name) for name in group]
            tensors.append(torch.stack(list(group.values())))  # one copy for all of a kind
        self.unread[step] = figures, time.time()
        if len(self.unread) == MOST_UNREAD:
            self.read()

    def fetch(self):
        """Begin to copy what waits on the devices to the host."""
        waiting, self.on_device = self.on_device, {}
        for device in dict.fromkeys(device for device, _ in waiting):
            groups = [group for (at, _), group in waiting.items() if at == device]
            widest = torch.float32 if device.type == 'mps' else torch.float64  # which holds a float32 exactly
            values = torch.cat([torch.cat(tensors).to(widest) for _, tensors in groups])
            self.on_the_way.append(([place for places, _ in groups for place in places], devices.fetch(values)))

    def fill_in(self, unread):
        """Put what was on the devices into unread, {step: (figures, time)}. Waits once for each device."""
        self.fetch()
        arrived, self.on_the_way = self.on_the_way, []
        for places, values in arrived:
            for (step, name), value in zip(places, values().tolist()):
                unread[step][0][name] = value

    def later(self, line):
        """
        line() shows the line of the newest step, and reads it: when catch_up() is called, or before anything else is
        written, read or shown. Until then nothing waits for the device.
        """
        self.fetch()
        self.line = line

    def catch_up(self):
        """Show the line that comes later, if there is one."""
        line, self.line = self.line, None
        if line:
            line()

    def rescue(self):
        """Where an exception ends the script, the line that comes later is not lost, unless it is of a dead device."""
        with suppress(Exception):
            self.catch_up()

    def read(self, figures=None):
        """
        Record the updates since the last call. figures: what more is known of the newest; then it is also said what
        all of them mean, where that is news. Waits for the device.
        """
        self.catch_up()
        unread, self.unread = self.unread, {}
        if unread:
            self.fill_in(unread)
            limit, more = self.history.facts['grad_clip'] or math.inf, {}
            self.clipped += [found.get('clip_limit', limit) < found['grad_norm'] < math.inf
                             for found, _ in unread.values() if 'grad_norm' in found]
            if figures and self.clipped:
                more = {'clip_rate': sum(self.clipped) / len(self.clipped)}
            if figures:
                more |= figures
                self.clipped = []
            for step, (found, at) in unread.items():
                self.write_record(step, found | (more if step == max(unread) else {}), at)
            self.start_sinks()
        if figures:
            for line in self.history.news():
                print(line)

    def sync(self):
        """What was recorded is on the disk when this returns: those behind a checkpoint a resume makes again."""
        if self.metrics:
            with suppress(OSError):  # which a full disk has told already
                os.fsync(self.metrics.fileno())

    def go_back(self, step, rewinds):
        """The run goes back to a step, and its records after that are dropped. rewinds: how often it has done so."""
        self.catch_up()
        self.unread, self.on_device, self.on_the_way = {}, {}, []
        self.history.cut(step)
        self.clipped = self.clipped_before(step)
        self.record(step, {'rewinds': rewinds})

    def clipped_before(self, step):
        """For each of the updates between the last iter line before a step and that step, whether it was clipped."""
        lines = self.history.get('clip_rate')[0]
        lines = lines[lines < step]
        steps, norms = self.history.since('grad_norm', lines[-1] if len(lines) else -1, 0)
        is_clipped = np.isfinite(norms) & (norms > self.history.clip_limits(steps))  # JSON has no inf to go by
        return list(is_clipped[steps < step])

    # -----------------------------------------------------------------------------------------------------------------
    # what else there is to see, for TensorBoard and W&B

    def show(self, what, *args):
        """
        The same to every sink that has a method for it: ('text', step, name, text), see TensorBoard and WandB. What
        takes some making comes as a function that makes it.
        """
        self.catch_up()
        if not self.sinks:
            return
        try:
            args = [arg() if callable(arg) and not isinstance(arg, torch.nn.Module) else arg for arg in args]
        except Exception as error:  # no picture is worth a run
            name = f'{what} {args[1]}' if len(args) > 2 else what  # image Attention, histograms
            if name not in self.failed:
                self.failed.add(name)
                print(f'WARNING: no {name} from here on: {reason(error)}')
            return
        if self.waiting is not None:
            self.waiting.append((what, args))
            return
        for sink in [sink for sink in self.sinks if hasattr(sink, what)]:
            try:
                getattr(sink, what)(*args)
            except Exception as error:  # of a disk, of a network, of the service: none is worth a run
                is_lost = isinstance(error, OSError | ImportError)  # such as a full disk
                if is_lost:
                    self.sinks.remove(sink)
                if is_lost or (sink.name, what) not in self.failed:
                    self.failed.add((sink.name, what))
                    print(f'WARNING: {sink.name} ({sink.place}) gets {"nothing" if is_lost else f"no {what}"} from '
                          f'here on: {reason(error)}')

    def start_sinks(self):
        """Importing TensorBoard takes a second; so the first update is made before the sinks get what waits."""
        if self.waiting is not None:
            waiting, self.waiting = self.waiting, None
            for what, args in waiting:
                self.show(what, *args)

    def close(self):
        """Write out what waits, and give the console back."""
        self.read()
        self.start_sinks()
        self.show('close')
        sys.stdout = self.console


class TensorBoard:
    """Event files in a folder under runs/. A resumed run goes on in its folder; what it had after that is purged."""

    name = 'TensorBoard'

    def __init__(self, folder, settings, step):
        self.place, self.settings, self.step = str(folder), settings, step

    @cached_property
    def writer(self):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams
        # its thread keeps a full disk for the next call to raise, and need not print it too
        threading.excepthook = lambda args: isinstance(args.exc_value, OSError) or threading.__excepthook__(args)
        writer = SummaryWriter(self.place, purge_step=None if self.step is None else self.step + 1)
        writer.add_custom_scalars({'Losses': {'train and val': ['Multiline', ['Loss/train', 'Loss/val']]}})
        # what add_hparams writes, but into this run: it would open another one
        plain = {name: value if isinstance(value, int | float) else str(value).encode(errors='replace').decode()
                 for name, value in self.settings.items()}  # a word of the command line may be no UTF-8
        *begin, self.end = hparams(plain, {tag: 0.0 for tag in ('Loss/train', 'Loss/val', 'Accuracy/val')})
        for summary in begin:
            writer.file_writer.add_summary(summary)
        return writer

    def record(self, step, figures, at):
        from tensorboard.compat.proto.summary_pb2 import Summary
        self.writer.file_writer.add_summary(Summary(value=[  # all in one event: add_scalar takes ten times as long
            Summary.Value(tag=tag(name), simple_value=value) for name, value in figures.items()]), step, at)

    def text(self, step, name, text):
        self.writer.add_text(name, '    ' + text.replace('\n', '\n    '), step)  # indented: Markdown for as it stands

    def image(self, step, name, picture):
        self.writer.add_image(name, picture, step, dataformats='HWC')

    def histograms(self, step, values):
        for name, some in values.items():
            if len(some):
                self.writer.add_histogram(name, some, step, bins=64)

    def model(self, model):
        class Logits(torch.nn.Module):  # the tracer does not take the None that comes with them
            def __init__(self):
                super().__init__()
                self.gpt = model

            def forward(self, idx):
                return self.gpt.forward(idx)[0]  # not what torch.compile made of it
        device = next(model.parameters()).device
        idx = torch.zeros((1, min(8, model.config.block_size)), dtype=torch.int64, device=device)
        with warnings.catch_warnings(action='ignore'), redirect_stdout(io.StringIO()):
            self.writer.add_graph(Logits(), idx)

    def embedding(self, step, name, vectors, labels):
        self.writer.add_embedding(vectors, metadata=labels, tag=name, global_step=step)

    def close(self):
        self.writer.file_writer.add_summary(self.end)
        self.writer.close()


class WandB:
    """A run of Weights & Biases. A resumed run goes on in its run there, by its id."""

    name = 'W&B'

    def __init__(self, settings, name, run_id):
        import wandb
        self.wandb, self.settings = wandb, settings
        run_id = run_id if re.fullmatch(r'[A-Za-z0-9_-]{1,64}', str(run_id)) else None  # a part of a path
        options = dict(project=settings['wandb_project'], name=name, config=settings, id=run_id,
                       resume='allow' if run_id else None)
        try:
            self.run = wandb.init(**options)
        except wandb.errors.CommError as error:
            print(f'WARNING: W&B does not answer ({str(error).splitlines()[0]}); it gets the run offline, '
                  'wandb sync sends it later')
            self.run = wandb.init(**options, mode='offline')
        self.place = self.run.id
        self.run.define_metric('*', step_metric='step')  # a run that goes back makes steps again
        self.samples = wandb.Table(columns=['step', 'text'], log_mode='INCREMENTAL')

    def record(self, step, figures, at):
        self.run.log(figures | {'step': step, 'iter': step})

    def text(self, step, name, text):
        self.samples.add_data(step, text)
        self.run.log({name: self.samples, 'step': step})

    def image(self, step, name, picture):
        self.run.log({name: self.wandb.Image(picture), 'step': step})

    def embedding(self, step, name, vectors, labels):
        rows = [[label, *vector] for label, vector in zip(labels, vectors.tolist())]
        columns = ['token', *(f'd{i}' for i in range(vectors.shape[1]))]
        self.run.log({name: self.wandb.Table(columns=columns, data=rows), 'step': step})

    def model(self, model):
        self.run.watch(model, log='all', log_freq=self.settings['log_interval'] or 1000)

    def checkpoints(self, folder, shards_of):
        """shards_of: {path: the names of the folders beside a checkpoint that belong to it}."""
        names = {'none': [], 'best': ['best.pt'], 'all': ['best.pt', 'ckpt.pt']}[self.settings['wandb_checkpoints']]
        paths = [path for name in names if (path := Path(folder) / name).is_file() and not path.is_symlink()]
        if paths:
            artifact = self.wandb.Artifact(f'checkpoints-{self.run.id}', type='model')
            for path in paths:
                artifact.add_file(str(path))
                for name in shards_of[path]:
                    artifact.add_dir(str(path.parent / name), name=name)
            self.run.log_artifact(artifact)

    def close(self):
        self.run.finish()


def check_wandb(project):
    """End the script where Weights & Biases is asked for and cannot be had: before anything is written."""
    require('wandb', 'wandb_log = True')
    import wandb
    with explained(f'wandb_project = {shown(project)}', 'choose another name'):
        wandb.Settings(project=project)
    if wandb.setup().settings.mode == 'online':
        with suppress(wandb.errors.Error):  # no network, which is no mistake of the user's
            if not wandb.login(prompt=False):
                fail('wandb_log = True: nobody is logged in to Weights & Biases; `wandb login` does that, '
                     'WANDB_MODE=offline goes without')


def checked(figures):
    """
    {name: value} as they can be recorded: tensors apart from their graph, which would hold the memory of the step;
    other numbers as int or float. Raises ValueError, which names the figure and the remedy.
    """
    found = {}
    for name, value in figures.items():
        if not isinstance(name, str) or name in ('', 'step', 'time'):
            raise ValueError(f'figures: {name!r} cannot be the name of a figure: it is a text, and step and time are '
                             'what each record has; rename it')
        if isinstance(value, torch.Tensor):
            if value.dim():
                raise ValueError(f'figures: {name} is a tensor of shape {tuple(value.shape)}; a figure is one number: '
                                 'take its mean()')
            if value.is_complex():
                raise ValueError(f'figures: {name} is a complex tensor; a figure is a real number: take its abs()')
            found[name] = value.detach()
        elif isinstance(value, numbers.Real | np.bool_):
            found[name] = value if type(value) in (int, float) else float(value)
        else:
            raise ValueError(f'figures: {name} is of type {type(value).__name__}; a figure is one number: give '
                             'a float, or a tensor without dimensions')
    return found


def tag(name):
    """The tag in TensorBoard of a figure: loss -> Training/Loss, grad_norm/h.0 -> GradNorm/h.0."""
    for prefix, other in PREFIXES.items():
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return TAGS.get(name, name)


def run_folder(name, last=None):
    """
    The folder of a run in TensorBoard: the last one where it goes on, else runs/<name>-<timestamp>, with .1, .2, ...
    behind it where two runs begin in the same second. A name and a last folder may come from files of others: what is
    written lies in runs/, and nowhere else.
    """
    if last is not None:
        place = Path('runs') / Path(str(last)).name
        if str(last) == str(place) and place.is_dir() and not place.is_symlink():
            return place
        print(f'TensorBoard: {str(last)[:100]!r}, where this run wrote before, is no folder in runs/ here; a new one')
    name = re.sub(r'[^\w.=,+-]+', '_', name).encode()[:100].decode(errors='ignore').lstrip('.')
    folder = Path('runs') / f'{name}-{time.strftime("%Y%m%d-%H%M%S")}'
    names = itertools.chain([folder], (f'{folder}.{i}' for i in itertools.count(1)))
    return next(path for path in map(Path, names) if not os.path.lexists(path))


def end_last_line(path):
    """A kill can leave half a line; what comes next begins a new one."""
    with files.open_own(path, 'a+b') as file:
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
