"""The folder of a run: its own for as long as it writes there, and an earlier run moved aside, never overwritten."""

import os
from pathlib import Path

from kit.base import files
from kit.base.errors import ROOT, fail, reason

OTHERS = 'data', 'runs', 'config', 'kit', 'docs', 'tests', 'bench', 'sweeps'  # folders here that hold other things
WRITTEN = 'training.log', 'metrics.jsonl', 'config.json', 'source.zip'


def claim(folder, is_new, may_write=True):
    """
    Make a folder that of this run alone, for as long as the process lives. Another that writes there is refused. A new
    run never overwrites an old one: checkpoints becomes checkpoints.1, or the first number that is free. Without
    may_write only a folder that exists is locked, and nothing else is done yet.
    """
    global lock
    folder = Path(folder)
    try:
        check_place(folder)
        if may_write:
            folder.mkdir(parents=True, exist_ok=True)
        if folder.is_dir() and not (lock and files.names(folder / '.lock', lock)):
            lock = take_lock(folder)
        if may_write and is_new and holds_a_run(folder):
            inner = [take_lock(path.parent) for path in folder.rglob('*/.lock')]  # nor is that of another run moved
            place = folder.resolve() if folder.is_symlink() else folder  # not the link is moved, but what it names
            aside = first_free(place)
            os.rename(place, aside)
            place.mkdir()
            lock = take_lock(folder)  # until here it was that of the old folder
            del inner
            print(f'{folder} holds an earlier run: moved to {aside}')
    except (OSError, RuntimeError, ValueError) as error:  # a RuntimeError is a circle of links
        place = getattr(error, 'filename', None) or folder
        fail(f'out_dir = {str(folder)!r}: {place} cannot be written ({reason(error)}); choose another folder')


lock = None  # an open file; the system gives the lock back when the process ends, however it ends


def check_place(folder):
    """A run is not written among other things: where scripts, texts or datasets are."""
    if str(folder).startswith('~'):
        fail(f'out_dir = {str(folder)!r}: the shell reads ~ at the begin of a word alone; --out_dir ~/... or $HOME/...')
    place = folder.resolve()
    taken = {(root / name).resolve() for root in (Path.cwd(), ROOT) for name in OTHERS}
    of_others = {ROOT / name for name in ('kit', 'config', 'tests', 'docs', 'bench')}
    names = ['train.bin', 'val.bin']
    if not any(folder.glob('*.pt')):  # beside the checkpoints of a run there may be copies of these
        names += ['train.py', 'meta.json', 'meta.pkl']
    if place in {ROOT, Path.cwd(), *Path.cwd().parents, *taken} or of_others & {*place.parents} or any(
            (folder / name).exists() for name in names):
        fail(f'out_dir = {str(folder)!r}: other things are kept there, and the run needs a folder of its own, such as '
             '--out_dir=exp1')


def holds_a_run(folder):
    """Or files by the names that a run writes, whoever made them."""
    return any(os.path.lexists(folder / name) for name in WRITTEN) or any(folder.glob('*.pt'))


def take_lock(folder):
    """The lock on a folder, or the end of the script where another process has it."""
    return files.lock(folder) or fail(f'out_dir = {str(folder)!r}: another run is writing there; wait for its end, or '
                                      'choose another folder')


def first_free(path):
    """path with the first number behind it that is free: path.1, path.2, ..."""
    number = 1
    while os.path.lexists(free := path.with_name(f'{path.name}.{number}')):
        number += 1
    return free
