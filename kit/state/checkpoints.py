"""
Checkpoints on disk: written whole or not at all, verified before they are used, found, pruned.

A checkpoint is a dict of plain types and tensors as torch.save writes it: a zip archive, and so every entry has a
checksum. torch itself does not look at those.
"""

import math
import os
import pickle
import platform
import random
import shutil
import sys
import textwrap
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from kit.base import errors, files, ranks
from kit.base.errors import fail
from kit.data.tokens import is_same_tokenizer
from kit.learn import model_state, optimizer_state
from kit.state import folders, forms, shards
from kit.state.forms import Damaged, Gone, Unreadable, is_no_damage

THREADS = min(8, os.cpu_count() or 1)  # that read a file side by side


# ---------------------------------------------------------------------------------------------------------------------
# writing


def save(checkpoint, folder, names, stop_on_error=False, parameters=None):
    """
    Write a checkpoint once and give it each of the names, in their order (e.g. step_0000500.pt, best.pt, ckpt.pt: what
    a resume takes comes last, when all the others are there). It is written beside, synced to the disk, its checksums
    are checked, then it is renamed: a name always holds a whole file, the old one or the new one, whenever the power
    goes. A best.pt that is better, or whose loss is a number where the new one is none, stays. Weights, averages and
    moments must be finite; of the model that holds for its parameters, by their names (None: all its tensors), while a
    buffer, such as a mask, may be infinite. The names are saved too, so that a reader can see the same. A small
    checkpoint, see shards.py, has had its tensors looked at by who has written them.

    Returns whether it was saved. Where it could not be, the older checkpoints are untouched, and one line says why:
    a run is worth more than one checkpoint. With stop_on_error it ends the script.
    """
    return report(write(checkpoint, folder, names, parameters), stop_on_error)


def write(checkpoint, folder, names, parameters=None, tell=print, threads=THREADS):
    """save, whose lines go to tell. Returns '', or why nothing was saved. threads: see verify."""
    folder = Path(folder)
    own = names[-1] if names[-1] == 'ckpt.pt' else f'{names[-1]}.{os.getpid()}'  # only a run has its folder alone
    part, link = folder / f'.{own}.part', folder / f'.{own}.link'
    loss = checkpoint.get('best_val_loss', math.inf)
    if 'best.pt' in names and not (math.isfinite(loss) and loss <= best_val_loss(folder, threads)):
        names = [name for name in names if name != 'best.pt']
        tell(f'{folder / "best.pt"} stays: ' + (
            'it is better, or cannot be read' if math.isfinite(loss) else 'the new val loss is no number'))
    checkpoint = checkpoint | {'parameters': list(parameters or checkpoint['model'])}
    try:
        if not shards.are_in(checkpoint) and (bad := forms.bad_numbers(checkpoint)):
            raise Damaged(f'{bad} holds numbers that are not finite')
        if not folder.exists():
            tell(f'WARNING: {folder} is gone; it is made again')
            folder.mkdir(parents=True)
        part.unlink(missing_ok=True)  # left by a kill it can be the same file as ckpt.pt: never write into it
        with files.open_own(part, 'xb') as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        verify(part, threads)
        for name in names:
            link.unlink(missing_ok=True)
            try:
                os.link(part, link)
            except OSError:  # a file system without hard links
                shutil.copyfile(part, link)
                files.sync(link)
            os.replace(link, folder / name)
        if os.name == 'posix':  # a rename is on the disk only when its folder is
            files.sync(folder)
    except Exception as error:  # torch.save raises a RuntimeError on a full disk; and no save is worth a run
        return failure(error, folder)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
            link.unlink(missing_ok=True)
    return ''


def failure(error, folder):
    """An error of a save, as what is said of it."""
    return f'no checkpoint was saved to {folder} ({why(error, folder)}); the older ones are untouched'


def report(failure, stop_on_error):
    """Say why nothing was saved, where that is so; with stop_on_error it ends the script. Returns `not failure`."""
    if failure and stop_on_error:
        print(failure, file=sys.stderr, flush=True)
        raise SystemExit(1)
    if failure:
        print(f'WARNING: {failure} and training goes on')
    return not failure


def why(error, folder):
    """An error of a save in words; torch's own do not say that the disk is full."""
    words = next(iter(str(error).splitlines()), type(error).__name__)
    if 'unexpected pos' in words:
        words = 'it could not be written to its end: a full disk, a quota, or a limit on the size of a file'
    with suppress(OSError):
        if (free := shutil.disk_usage(folder).free) < 2**30:
            words += f'; {free / 2**20:.1f} MiB are free there'
    return words


def interval_checkpoints(folder):
    """{step: path} of the step_0002000.pt in a folder, in their order."""
    found = {int(path.stem[5:]): path for path in Path(folder).glob('step_*.pt') if path.stem[5:].isdecimal()}
    return dict(sorted(found.items()))


def prune(folder, keep_last, tell=print):
    """
    Delete all but the newest keep_last interval checkpoints, 0 keeps them all, and shards of no checkpoint. What cannot
    be is told.
    """
    for path in list(interval_checkpoints(folder).values())[:-keep_last or None] if keep_last else []:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            tell(f'WARNING: {path} is past keep_last and could not be deleted ({error.strerror})')
    try:
        shards.prune(folder)
    except OSError as error:
        tell(f'WARNING: {folder}: shards of no checkpoint could not be deleted ({error.filename}: {error.strerror})')


def move_later_aside(folder, step, best_too=False):
    """
    A run that goes on from a step goes its own way: interval checkpoints beyond it are moved to a folder later.1, ...
    in the folder of the run, and with best_too, where best.pt was measured on other text, that as well. Raises OSError.
    """
    later = [path for number, path in interval_checkpoints(folder).items() if number > step]
    if best_too and (Path(folder) / 'best.pt').exists():
        later.append(Path(folder) / 'best.pt')
    if later:
        aside = folders.first_free(Path(folder) / 'later')
        aside.mkdir()
        for path in later:
            os.replace(path, aside / path.name)
        print(f'{", ".join(path.name for path in later)}: not of the run that goes on from step {step}; '
              f'moved to {aside}')


# ---------------------------------------------------------------------------------------------------------------------
# finding


def exist(folder):
    """Whether there is anything to go on from, whole or not."""
    return ranks.from_main(lambda: any(os.path.isfile(path) for path in candidates(folder)))


def candidates(folder):
    """The files that hold a state of the training."""
    folder = Path(folder)
    return [folder / 'ckpt.pt', folder / 'best.pt', *interval_checkpoints(folder).values()]


def newest(folder):
    """
    (path, checkpoint) to go on from: ckpt.pt, or where that is damaged or missing, and it says so, the newest that is
    whole. Rank 0 chooses, the others take the same.
    """
    def choose():
        found = [path for path in candidates(folder) if os.path.isfile(path)]
        if not found:
            fail(f'{Path(folder) / "ckpt.pt"}: there is no checkpoint to go on from; train first, or give '
                 '--out_dir=FOLDER of a run')
        # what cannot be read comes first: it is named then
        steps = {path: peek(path).get('iter_num', math.inf) for path in found}
        damages = [] if found[0].name == 'ckpt.pt' else [f'{Path(folder) / "ckpt.pt"} is missing']
        for path in sorted(found, key=lambda path: (path.name == 'ckpt.pt', steps[path]), reverse=True):
            try:
                mine.append(read(path, resume=True))
            except Unreadable as error:  # it may be the newest all the same: nothing is gone on with before it
                fail(error)
            except Damaged as error:
                damages.append(str(error))
                continue
            for damage in damages:
                print(f'WARNING: {damage}; {path.name} is taken')
            return path
        fail(f'{damages[0]}; no other checkpoint there is whole')
    mine = []
    path = ranks.from_main(choose)
    return path, mine[0] if mine else load(path, resume=True)


def before(folder, step):
    """(path, checkpoint), the newest that is whole and of an earlier step; (None, {}) where there is none."""
    def choose():
        found = [path for path in candidates(folder) if os.path.isfile(path)]
        steps = {path: peek(path).get('iter_num', math.inf) for path in found}  # inf: it cannot be read, and is named
        for path in sorted(found, key=steps.get, reverse=True):
            if step <= steps[path] < math.inf:
                continue
            try:
                mine.append(read(path, resume=True))
                return path
            except Damaged as error:
                print(f'WARNING: {error}')
    mine = []
    path = ranks.from_main(choose)
    return path, mine[0] if mine else load(path, resume=True) if path else {}


def best(folder):
    """The checkpoint to sample from or to test where none is named: best.pt, else ckpt.pt."""
    for name in ('best.pt', 'ckpt.pt'):
        if os.path.isfile(Path(folder) / name):
            return Path(folder) / name
    fail(f'{folder} holds no checkpoint; train first (python train.py), or give --checkpoint=FILE or --out_dir=FOLDER')


def best_val_loss(folder, threads=THREADS):
    """That of best.pt; inf where there is none, or one that will not do."""
    path = Path(folder) / 'best.pt'
    try:
        verify(path, threads)
        best = open_unverified(path, fetch=lambda small: shards.verify(path, small, threads))
        # those that went into shards were finite, and no rank need hold all of them
        if not shards.are_in(best) and forms.bad_numbers(best, resume=False):
            return math.inf
        return best.get('best_val_loss', math.inf)
    except Exception as error:  # torch raises many kinds
        is_there = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        return -math.inf if is_there or is_no_damage(error) else math.inf  # it cannot be judged now, and so it stays


def peek(path):
    """A checkpoint with its tensors still on the disk, or in shards, and not verified; {} where it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            forms.check_archive(archive)
        return open_unverified(path)
    except Exception:  # torch raises many kinds
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# reading


def load(path, resume=False):
    """
    A checkpoint of this project or of nanoGPT, on the CPU, its model's names without the prefixes that torch.compile
    and DDP have left there. Every byte is verified; nothing in the file is run. resume: it must hold the state of the
    training too, and is read into memory; else its tensors stay on the disk until they are used. Whether its model is
    the one that model.py makes is seen in config_of and fill.
    """
    if os.path.isdir(path):
        owner = shards.belonging(path)
        fail(f'{path} holds the shards of {owner}; name that' if owner else
             f'{path} is a folder and no checkpoint; name a file in it, such as {Path(path) / "best.pt"}')
    if not os.path.isfile(path):
        fail(f'{path}: there is no such checkpoint')
    try:
        return read(path, resume)
    except Damaged as error:
        fail(error)


def read(path, resume=False):
    """load, raising Damaged. Of several processes rank 0 verifies shards, and a resume leaves them to fetched."""
    def fetch(small):
        if resume and ranks.world_size > 1:
            return shards.verify(path, small, THREADS) if ranks.is_main else small
        return shards.fill(path, small, shards.PARTS if resume else forms.WEIGHTS, THREADS)

    def look():
        verify(path)
        checkpoint = open_unverified(path, resume, fetch)
        if shards.are_in(checkpoint):
            return checkpoint | {'shards': checkpoint['shards'] | {'path': path}}
        if bad := forms.bad_numbers(checkpoint, resume):
            raise forms.Unfit(f'holds numbers that are not finite: {bad}')
        return checkpoint
    return from_one_file(path, look)


def fetched(saved, model):
    """
    A checkpoint to go on from, as read() gives it, with those tensors that it has left in shards until there is a
    model: of one in parts each process reads its own, and none has all of them.
    """
    if not shards.are_in(saved):
        return saved
    path, like = saved['shards']['path'], next(model.parameters()) if ranks.is_fsdp else None
    try:
        found = open_unverified(path, True, lambda small: shards.fill(path, small, shards.PARTS, THREADS, like, True))
    except Exception as error:  # torch raises many kinds
        fail(damaged(path, error))
    mine = {key: shards.over_tensors(value, lambda _, tensor: ranks.local(tensor)) for key, value in found.items()}
    if bad := next(filter(None, ranks.from_all(forms.bad_numbers(mine))), ''):
        fail(f'{path} holds numbers that are not finite: {bad}')
    return found


def from_one_file(path, look):
    """
    What look() makes of a file, and once more where a run has put another in its place meanwhile: torch opens a file
    several times. Raises Damaged.
    """
    while True:
        failure = None
        try:
            with open(path, 'rb') as file:
                try:
                    found = look()
                except Exception as error:  # torch raises many kinds, and each means that this file will not do
                    failure = error
                is_the_same = os.path.samestat(os.stat(path), os.fstat(file.fileno()))
        except OSError as error:
            failure, is_the_same = error, True
        if is_the_same and failure:
            raise damaged(path, failure) from None
        if is_the_same:
            return found


def damaged(path, error):
    """The Damaged that an error in reading stands for; one that is no fault of the file's ends the script."""
    reason = errors.reason(error)
    if isinstance(error, FileNotFoundError):
        return Gone(f'{path} is gone')
    if is_no_damage(error):
        return Unreadable(f'{path} cannot be read: {reason}')
    if isinstance(error, Damaged):
        return Damaged(f'{path} is damaged ({error})')
    if isinstance(error, pickle.UnpicklingError):
        error = forms.asks_for_code(error)
    elif isinstance(error, RecursionError):
        error = forms.foreign('it is nested too deeply')
    if isinstance(error, forms.Unfit):
        return Damaged(f'{path} {error}')
    if isinstance(error, RuntimeError | zipfile.BadZipFile | EOFError | OSError):  # in the archive itself
        return Damaged(f'{path} is damaged ({reason})')
    return Damaged(f'{path} {forms.foreign(reason)}')


def open_unverified(path, resume=False, fetch=None):
    """
    The checkpoint, raising whatever torch and forms raise. Tensors that are in shards stay there, unless fetch(small)
    makes another checkpoint of it.
    """
    is_utf8 = str(path).encode(errors='replace').decode() == str(path)  # torch maps no file of another name
    is_mapped = is_utf8 and (not resume or ranks.world_size > 1)  # of a model in parts no process is to hold all of it
    found = torch.load(path, map_location='cpu', weights_only=True, mmap=is_mapped)
    return forms.checked(fetch(found) if fetch and shards.are_in(found) else found, resume)


def verify(path, threads=THREADS):
    """
    Read every entry of an archive and compare it with its checksum. With one thread, which is this one, it can be done
    while the interpreter ends. Raises Damaged.
    """
    check_is_archive(path)

    def check(first):  # zlib computes without Python's lock, so that the threads work side by side
        with zipfile.ZipFile(path) as archive:
            forms.check_archive(archive)
            for info in archive.infolist()[first::threads]:
                with archive.open(info) as entry:
                    while entry.read(1 << 22):
                        pass
    try:
        if threads == 1:
            check(0)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(check, range(threads)))
    except Exception as error:  # a broken archive raises many kinds
        if is_no_damage(error) or isinstance(error, forms.Unfit):
            raise
        raise Damaged(f'other bytes than were written: {" ".join(str(error).split())[:80]}') from None


def check_is_archive(path):
    """As everything that torch.save writes; other pickles are not even opened. Raises Damaged, or Unfit by its name."""
    with open(path, 'rb') as file:
        if not zipfile.is_zipfile(file):
            forms.check_bytes(path)
            raise Damaged('no archive of torch.save: it was cut off, or is no checkpoint at all')


def open_lazily(path):
    """
    (checkpoint, sums) with the tensors still on the disk and not verified: check_tensor does that with the sums, once
    they are used. All else in the file is verified. It stays open, and so whole, when a run deletes it. Raises Damaged.
    Of one with shards (checkpoint, Part): its model, verified, is read from there, and all others stay where they are.
    """
    def look():
        check_is_archive(path)
        with zipfile.ZipFile(path) as archive:
            forms.check_archive(archive)
            for info in archive.infolist():
                with archive.open(info) as entry:  # compares the header of an entry with the directory
                    if '/data/' not in info.filename:
                        entry.read()
            sums = {(info.file_size, info.CRC) for info in archive.infolist()}
        parts = {}

        def open_model(small):
            parts.update(shards.open_parts(path, small, ['model'], THREADS, ExitStack()))
            return small
        checkpoint = open_unverified(path, fetch=open_model)
        return checkpoint, parts.get('model', sums)
    return from_one_file(path, look)


def check_tensor(path, tensor, sums):
    """The bytes of a tensor, with those beside it in its storage, must be those of an entry of the file."""
    stored = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    if (len(stored), zlib.crc32(stored.numpy())) not in sums:
        raise Damaged(f'{path} is damaged (a tensor has other bytes than were written)')


def average_in(checkpoint):
    """'ema' or 'swa', where a checkpoint has such weights beside the raw ones; else None."""
    return next((kind for kind in ('ema', 'swa') if kind in checkpoint), None)


def weights(checkpoint, which='auto'):
    """Its weights: raw, ema or swa; auto takes the average where it has one."""
    average = average_in(checkpoint)
    if which not in ('auto', 'raw', average):
        fail(f'weights = {which!r}: this checkpoint has raw{f" and {average}" if average else ""} weights')
    return checkpoint['model' if which == 'raw' or not average else average]


def first_difference(a, b, free=()):
    """
    What keeps the weights of two checkpoints, whose model_args config_of has completed, from being averaged, in words;
    '' where nothing does. free: those of model_args that may differ.
    """
    for key, mine in a['model_args'].items():
        theirs = b['model_args'][key]
        if mine != theirs and key not in free:
            return f'{key} is {theirs} and {mine}'
    if a.get('meta', {}).get('tokenizer') != b.get('meta', {}).get('tokenizer'):
        return 'their tokenizers differ'
    for name in a['model'] | b['model']:
        mine, theirs = (tuple(state[name].shape) if name in state else 'missing' for state in (a['model'], b['model']))
        if mine != theirs:
            return f'{name} is {theirs} and {mine}'
    return ''


def config_of(saved, GPTConfig, path):
    """
    The GPTConfig of a checkpoint. Fields that its model_args lack have their defaults, and from here on they have all.
    Where they are not those of today's model.py it ends the script: that is no damage, but another model.
    """
    try:
        config = GPTConfig(**saved['model_args'])
    except (TypeError, ValueError) as error:
        fail_of_another_model(path, str(error).replace('GPTConfig.__init__()', 'GPTConfig'))
    n_numbers = sum(min(tensor.numel(), tensor.untyped_storage().nbytes()) for tensor in saved['model'].values())
    if config.least_numbers() > n_numbers or config.block_size > max(n_numbers, 2**20):
        fail_of_another_model(path, f'its model_args are those of a larger one than its {n_numbers:,} numbers')
    saved['model_args'] = asdict(config)
    return config


def fill(model, state, path='the checkpoint'):
    """Load weights into a model, which judges them: where they do not fit, the script ends with its words."""
    try:
        model_state.load(model, state)
    except ValueError as error:
        fail(f'{path}: {error}')
    except (RuntimeError, TypeError) as error:
        lines = str(error).splitlines()
        fail_of_another_model(path, textwrap.shorten(' '.join(lines[1:] or lines), 300))


def fail_of_another_model(path, words):
    fail(f'{path} holds another model than model.py makes: {words}; the one that made it is in source.zip of its run')


def restore(saved, model, optimizer, scaler):
    """Put the objects of a training back to where a checkpoint has them. nanoGPT's have fewer."""
    fill(model, saved['model'])
    for what, load in ('optimizer', lambda: optimizer_state.restore(optimizer, saved['optimizer'])), (
            'scaler', lambda: restore_scaler(scaler, saved.get('scaler'))), (
            'random number generators', lambda: restore_random_states(saved.get('random_states'))):
        with errors.explained(f'the state of the {what} does not fit', 'take the weights alone: --init_from=FILE.pt'):
            load()
    fill(model, saved['model'])  # again: one step of the optimizer is tried out, and one of your own may hold them


def restore_scaler(scaler, state):
    if state and scaler.is_enabled():  # empty where the loss was not scaled
        scaler.load_state_dict(state)


def random_states():
    """
    The states of all generators. A step needs none of them, since it seeds torch anew; code that somebody adds may draw
    from Python's and NumPy's, and goes on where it stopped.
    """
    kind, keys, *rest = np.random.get_state()
    return {'python': random.getstate(), 'numpy': (kind, keys.tolist(), *rest), 'torch': torch.get_rng_state(),
            'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_random_states(states):
    if states:
        random.setstate(states['python'])
        np.random.set_state(states['numpy'])
        torch.set_rng_state(states['torch'])
        for i, state in enumerate(states['cuda'][:torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, i)


def versions():
    return {'python': platform.python_version(), 'torch': str(torch.__version__), 'numpy': np.__version__,
            'cuda': torch.version.cuda}


def check_fit(saved, meta):
    """Saved weights, if any, must know the ids of the dataset."""
    if not saved:
        return
    known = saved['model_args']['vocab_size']
    if meta['vocab_size'] > known:
        fail(f'dataset: it has {meta["vocab_size"]:,} ids and these weights know {known:,}; prepare the text with '
             'their tokenizer')
    if not is_same_tokenizer(meta['tokenizer'], saved.get('meta', meta)['tokenizer']):
        fail('dataset: its ids mean other tokens than those of these weights; prepare the text with their tokenizer')
