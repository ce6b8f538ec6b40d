"""
The folder of a dataset: made by one process at a time, and nothing is removed there that prepare.py has not made.

The work is done in the folder .part in it, which holds the lock. Which files of the dataset folder are ours meta.json
there tells, at every moment of an installation too: it is replaced when what the old one lists is gone, before what the
new one lists comes.
"""

import errno
import hashlib
import json
import os
import re
from contextlib import contextmanager, suppress

import numpy as np

from kit.base import files
from kit.base.errors import fail, reason
from kit.data import foreign, tokens
from kit.data.documents import in_short

PART = '.part'
LOCK = '.lock'  # the first that is made in .part, and the last that goes: without it the folder is not ours

# what a dataset is, what would be read as some of it (see tokens.files_of), and what .part holds while one is made
DATASET = r'(train|val|test)(_\d{6,})?\.bin|(train|val|test)\.rows\.npy|meta\.(json|pkl)'
READ = re.compile(r'(.*_)?(train|val|test)(_.*)?\.bin|(train|val|test)\.rows\.npy|meta\.(json|pkl)', re.DOTALL)
WORK = re.compile(rf'{re.escape(LOCK)}|input\.txt|(ids|ends)_\d{{6,}}\.bin|progress\.json'
                  rf'|\.progress\.json\.\d+\.part|done|done/({DATASET})')


# ---------------------------------------------------------------------------------------------------------------------
# one process at a time


@contextmanager
def locked(folder, waiting=''):
    """
    A dataset folder as that of this process alone, made if it is missing. Another process that has it ends the script,
    or with `waiting` that line is printed and it is waited for. What is in .part stays only if a note says how far it
    is good; a folder in which nothing is left is removed.
    """
    part = folder / PART
    try:
        lock = claim(folder, part, waiting)
    except OSError as error:
        with suppress(OSError):
            part.rmdir()
            folder.rmdir()
        fail(f'{error.filename or folder} cannot be written: {reason(error)}; make it writable, or take another '
             '--dataset=NAME')
    if not lock:
        fail(f'another process is preparing {folder}; wait for its end')
    try:
        if strange := [path for path in part.rglob('*') if not is_work(path, part)]:
            fail(f'{min(strange)} was not made by prepare.py, which works in that folder: move it away')
        yield
    finally:
        with suppress(OSError):
            if not noted(part).get('records'):
                clear(part)
            if os.listdir(part) == [LOCK]:
                (part / LOCK).unlink()  # while it is held: who waits for it looks for another
                part.rmdir()
                folder.rmdir()
        lock.close()


def is_locked(folder):
    """Whether another process is making the dataset: a short look."""
    with suppress(OSError):
        if os.path.exists(folder / PART / LOCK):
            lock = files.lock(folder / PART)
            if not lock:
                return True
            lock.close()
    return False


def claim(folder, part, waiting):
    """The lock on the folder, see files.lock. Raises OSError."""
    if os.path.islink(part):  # the dataset folder itself may be one, to a larger disk
        fail(f'{part} is a link, which is not followed: remove it, or take another --dataset=NAME')
    for attempt in range(100):
        try:
            part.mkdir(parents=True, exist_ok=True)
            if (there := os.listdir(part)) and LOCK not in there:
                fail(f'{part / min(there)} was not made by prepare.py, which works in that folder: move it away')
            return files.lock(part, waiting)
        except FileNotFoundError:  # who had the lock has removed the folder meanwhile
            if attempt == 99:
                raise


def is_work(path, part):
    """Whether a path in .part is one that is made there."""
    name = path.relative_to(part).as_posix()
    return bool(WORK.fullmatch(name)) and not path.is_symlink() and path.is_dir() == (name == 'done')


def clear(part, kept=''):
    """Remove what is made in .part, the note of how far it is last, but not the file of that name, nor the lock."""
    paths = [path for path in part.rglob('*') if is_work(path, part) and path.name not in (LOCK, kept)]
    for path in sorted(paths, key=lambda path: (path.name == 'done', path.name == 'progress.json')):
        path.rmdir() if path.name == 'done' else path.unlink()


def note(part, progress):
    """Remember how far the files in .part are good."""
    text = json.dumps(progress)
    files.write_whole(part / 'progress.json', f'{text}\n{hashlib.sha256(text.encode()).hexdigest()}')


def noted(part):
    """What note() has written; {} where there is nothing, or where it is damaged."""
    with suppress(OSError, ValueError):
        text, _, digest = (part / 'progress.json').read_text(encoding='utf-8').partition('\n')
        if hashlib.sha256(text.encode()).hexdigest() == digest:
            return json.loads(text)
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# what is ours


def check(folder, tokenizer, overwrite):
    """A file that is not ours and in the way ends the script; so does a dataset, unless it is half in its place."""
    if strange := [str(path) for path, own in standing(folder).items() if not own]:
        fail(f'{in_short(strange)} {"was" if len(strange) == 1 else "were"} not made by prepare.py, or not as now, and '
             'would be overwritten, or read with the dataset; move or delete, or take another --dataset=NAME')
    if overwrite or not tokens.exists(folder) or noted(folder / PART).get('laid_out'):
        return
    made = meta_of(folder)['tokenizer']
    made = made.get('name', made['kind'])
    fail(f'{folder} holds a dataset already{f", made with {made}" if made != tokenizer else ""}; '
         'another --dataset=NAME, or --overwrite, which replaces it')


def standing(folder):
    """{path: whether it is ours} of what a new dataset in that folder would overwrite, or be read with."""
    meta = meta_of(folder)
    return {folder / name: is_own(folder / name, meta) for name in sorted(os.listdir(folder)) if READ.fullmatch(name)}


def meta_of(folder):
    """meta.json of a folder, where prepare.py has written it; else {}."""
    with suppress(Exception):  # in whichever way it is damaged or foreign, it shows nothing
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        np.dtype(meta['dtype']), meta['tokenizer']['kind'], meta['source'], meta['split']
        if all(isinstance(entry['tokens'], int) for entry in meta['files'].values()):
            return meta
    return {}


def is_own(path, meta):
    """Whether prepare.py has made a file of a dataset folder, and nobody has changed it since, by its meta.json."""
    if path.is_symlink() or not path.is_file() or not meta:
        return False
    with suppress(Exception):  # a file that cannot be read, or a meta.json with other things in it, shows nothing
        if path.name == 'meta.json':
            return True
        if path.name == 'meta.pkl':
            return foreign.load_plain_pickle(path) == for_nanogpt(meta['tokenizer']['chars'])
        if path.suffix == '.npy':
            known = meta.get('rows', {path.name: None})  # without hashes in older ones
            return meta['pairs'] and path.name in known and known[path.name] in (None, tokens.sha256(path))
        size, known = path.stat().st_size, meta['files'][path.stem]
        has_size = size == known['tokens'] * np.dtype(meta['dtype']).itemsize
        return has_size and tokens.sha256(path) == known['sha256']  # of large ones too: it is nothing beside the work
    return False


def for_nanogpt(chars):
    """What meta.pkl holds of a dataset by character."""
    return {'vocab_size': len(chars), 'itos': dict(enumerate(chars)), 'stoi': {c: i for i, c in enumerate(chars)}}


# ---------------------------------------------------------------------------------------------------------------------
# into its place


def install(done, folder):
    """
    Move a dataset from done to folder, in the place of the one there. It goes on where it was interrupted; until it is
    through, meta.json lists a file that is missing. Raises OSError, also where a file that is not ours is in the way.
    """
    there = standing(folder)
    for path, own in there.items():
        if not own:
            raise FileExistsError(errno.EEXIST, 'it was not made by prepare.py, or not as it is now; move or delete it',
                                  str(path))
    if (done / 'meta.json').exists():
        for path in sorted(there.keys() - {folder / 'meta.json'}, key=is_train, reverse=True):
            path.unlink()
        os.replace(done / 'meta.json', folder / 'meta.json')
    for path in sorted(done.iterdir(), key=is_train):
        os.replace(path, folder / path.name)


def is_train(path):
    """Whether a folder with that file is taken for a dataset: the old one goes first, the new one comes last."""
    return path.name.startswith('train') and path.suffix == '.bin'
