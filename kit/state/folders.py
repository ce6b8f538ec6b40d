"""The folder of a run: its own for as long as it writes there, and an earlier run moved aside, never overwritten."""

import os
from contextlib import suppress
from pathlib import Path

from kit.base.errors import fail


def claim(folder, is_new, may_write=True):
    """
    Make a folder that of this run alone, for as long as the process lives. Another that writes there is refused. A new
    run never overwrites an old one: checkpoints becomes checkpoints.1, or the first number that is free. Without
    may_write only a folder that exists is locked, and nothing else is done yet.
    """
    global lock
    folder = Path(folder)
    try:
        if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
            fail(f'out_dir = {str(folder)!r}: the run needs a folder of its own, such as --out_dir=exp1')
        if may_write:
            folder.mkdir(parents=True, exist_ok=True)
        if folder.is_dir():
            lock = lock or take_lock(folder)
        if may_write and is_new and ((folder / 'training.log').exists() or any(folder.glob('*.pt'))):
            for inner in folder.rglob('*/.lock'):  # nor is a folder moved in which another run has its own
                take_lock(inner.parent)
            place = folder.resolve() if folder.is_symlink() else folder  # not the link is moved, but what it names
            aside = first_free(place)
            os.rename(place, aside)
            place.mkdir()
            lock = take_lock(folder)  # until here it was that of the old folder
            print(f'{folder} holds an earlier run: moved to {aside}')
    except (OSError, RuntimeError) as error:  # a RuntimeError is a circle of links
        reason = getattr(error, 'strerror', None) or error
        fail(f'out_dir = {str(folder)!r}: nothing can be written there ({reason}); choose another folder')


lock = None  # an open file; the system gives the lock back when the process ends, however it ends


def take_lock(folder):
    """A lock on a folder, or the end of the script where another process has it. Windows has no such locks."""
    with suppress(ImportError):
        import fcntl
        file = open(folder / '.lock', 'w')
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f'out_dir = {str(folder)!r}: another run is writing there; wait for its end, or choose another folder')
        except OSError:  # a network drive without locks
            print(f'{folder} cannot be locked: take care that no other run writes there')
        return file


def first_free(path):
    """path with the first number behind it that is free: path.1, path.2, ..."""
    number = 1
    while (free := path.with_name(f'{path.name}.{number}')).exists():
        number += 1
    return free
