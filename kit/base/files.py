"""
What the scripts write: never through a link, a file whole or not at all, a folder by one process at a time.

A link at the place of a file of ours may name any other file of the user's: it is not followed, and the error says so.
"""

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

NO_SURPRISE = getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0)  # no link, no wait for the end of a pipe


def open_own(path, mode='a', **options):
    """open() for a file that a script writes beside others of its own. Raises OSError, also for a link or a pipe."""
    def opener(path, flags):
        handle = os.open(path, flags | NO_SURPRISE, 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.EINVAL, 'it is a pipe or a device, and no file; remove it', str(path))
        return handle
    try:
        return open(path, mode, opener=opener, **options)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, 'it is a link, which is not followed; remove it', str(path)) from None
        raise


def paths(words):
    """'a.pt,b.pt' -> ['a.pt', 'b.pt']; what exists is one path, commas and all: 'lr=1,bs=8/a.pt,b.pt' are two."""
    found, words = [], words.split(',')
    while words:
        n = next((n for n in range(min(len(words), 50), 0, -1) if os.path.exists(','.join(words[:n]))), 1)
        found.append(','.join(words[:n]))
        words = words[n:]
    return [path for path in found if path]


def write_whole(path, data):
    """The old bytes or the new ones are there, whatever happens; they are on the disk when this returns."""
    path = Path(path)
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')  # of two at once each writes its own
    part.unlink(missing_ok=True)
    try:
        with open_own(part, 'xb') as file:
            file.write(data if isinstance(data, bytes) else data.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def sync(path):
    """What was written to a file, or renamed in a folder, is on the disk when this returns."""
    handle = os.open(path, os.O_RDONLY if Path(path).is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(folder, waiting=''):
    """
    An open file that holds the lock on a folder until it is closed or the process ends, however it ends. None where
    another process has it; with `waiting` that line is printed, and it is waited for. Raises OSError. Where there are
    no locks (Windows, some network drives) the file comes without one, and the second is said.
    """
    path = Path(folder) / '.lock'
    try:
        import fcntl
    except ImportError:
        return open_own(path)
    while True:
        file = open_own(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waiting:
                file.close()
                return None
            print(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            print(f'{folder} cannot be locked: take care that nothing else writes there')
            return file
        if names(path, file):
            return file
        file.close()  # the folder was moved away between the two: once more, in the one that is there now


def names(path, file):
    """Whether a path still names an open file."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file.fileno()))
    return False
