"""
Errors in plain words. A mistake of the user's, and whatever goes wrong in reading a file, a word or a variable of the
environment, ends a script with one line that names the remedy, and status 2; a fault of the machine with one line and
status 1. A traceback is left for what is wrong in the code.

    with errors.explained(f'{path} is damaged', 'prepare the dataset again'):
        meta = json.loads(path.read_text(encoding='utf-8'))

    train.py: data/x/meta.json is damaged (JSONDecodeError: Expecting value: line 1 column 1); prepare the dataset again
"""

import os
import sys
import textwrap
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds train.py, config/ and data/


def open_streams():
    """
    A stream that was closed before the script began (train.py >&-) is the null device: else the first file that is
    opened takes its place, and gets what is printed.
    """
    for number, name, mode in (0, 'stdin', 'r'), (1, 'stdout', 'w'), (2, 'stderr', 'w'):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it has the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding='utf-8', closefd=False))


open_streams()

where_memory_ends = ''  # what tell adds where a device has no more memory: how much a run takes, and what would fit


class Failed(SystemExit):
    """The end of a script by fail, which has told why; whatever else exits has not."""


def fail(message):
    """
    End the script over a mistake of its user's: one line on stderr, status 2, no traceback. Under torchrun every rank
    finds the same mistakes and one of them tells: by the time the others would, torchrun has ended them.
    """
    if os.environ.get('RANK', '0') != '0' and os.environ.get('WORLD_SIZE', '1') != '1':
        time.sleep(5)
    print(f'{Path(sys.argv[0]).name}: {on_one_line(message)}', file=sys.stderr, flush=True)
    raise Failed(2)


@contextmanager
def explained(what, remedy=''):
    """
    Whatever goes wrong in the block ends the script with one line: what it is about, why, and the remedy. For what
    reads something of the user's, in whichever of its own words a library complains; what else is wrong in there is
    hidden, so the block is short.
    """
    try:
        yield
    except Exception as error:  # a fail() in there is a SystemExit, and none of these
        fail(f'{what} ({reason(error)}){f"; {remedy}" if remedy else ""}')


def reason(error):
    """An error in words, on one line: those of the system for a file, else its kind and what it says."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = textwrap.shorten(str(error), 200, placeholder=' ...')
    return f'{type(error).__name__}: {words}' if words else type(error).__name__


def on_one_line(text):
    return ' '.join(str(text).split())


def shown(value):
    """A value as Python writes it, of a long one its two ends. A whole number of more than 4,300 digits has no repr."""
    try:
        text = repr(value)
    except Exception:
        return f'a value of type {type(value).__name__}'
    return text if len(text) <= 100 else f'{text[:60]} ... {text[-20:]}'


def is_out_of_memory(error):
    """Whether torch found no memory, on a GPU (torch.OutOfMemoryError) or on a CPU, where it is a RuntimeError."""
    return type(error).__name__ == 'OutOfMemoryError' or 'tried to allocate' in str(error).lower()


def tell(kind, error, trace):
    """
    sys.excepthook of the scripts. Ctrl-C is no fault of theirs, nor is `| head`, which has read enough; and what a disk
    or the memory refuses is said in one line, with the place in the code.
    """
    name = Path(sys.argv[0]).name
    if issubclass(kind, KeyboardInterrupt):
        print(f'{name}: interrupted', file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    elif issubclass(kind, OSError | MemoryError) or is_out_of_memory(error):
        path = f'{error.filename}: ' if getattr(error, 'filename', None) else ''
        mine = [frame for frame in traceback.extract_tb(trace) if Path(frame.filename).is_relative_to(ROOT)]
        place = f' ({Path(mine[-1].filename).name}, line {mine[-1].lineno})' if mine else ''
        remedy = f'; {where_memory_ends}' if where_memory_ends and is_out_of_memory(error) else ''
        print(f'{name}: {path}{reason(error)}{place}{remedy}', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
