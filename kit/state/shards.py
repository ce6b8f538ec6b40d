"""
Sharded checkpoints: the tensors of a checkpoint in a folder of their own, which all ranks write side by side.

    ckpt.pt           the checkpoint, a small file: in the place of each tensor one without numbers (torch's meta)
    shards_0000500/   its tensors as DCP writes them: a folder for each of model, ema, swa and optimizer

The small file says under 'shards' which folder is its own, with the size and the checksum of each file there. It comes
to the disk last, when all of these have been read back: so what is promised of a checkpoint in one file (whole or not
there, under several names, verified, found, pruned) is promised of this one, by the same code.
"""

import copy
import os
import re
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from kit.base import files, ranks
from kit.base.errors import on_one_line
from kit.state import forms
from kit.state.forms import Damaged

PARTS = *forms.WEIGHTS, 'optimizer'  # of a checkpoint, whose tensors go into shards; each can be read apart
FOLDER = re.compile(r'shards_\d{7,}(\.[1-9]\d{0,5})?')
FILE = re.compile(rf'({"|".join(PARTS)})/(\.metadata|__\d+_\d+\.distcp)')


def are_in(checkpoint):
    """Whether a checkpoint has its tensors, or had them, in shards."""
    return isinstance(checkpoint, dict) and 'shards' in checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# the tensors of a checkpoint


def over_tensors(value, change, place=()):
    """Containers anew, with change(place, tensor) for each tensor; place: the keys and indices that lead to it."""
    if isinstance(value, torch.Tensor):
        return change(place, value)
    if isinstance(value, dict):
        new = copy.copy(value)  # with its attributes, such as _metadata
        new.update((key, over_tensors(inside, change, (*place, key))) for key, inside in value.items())
        return new
    if type(value) in (list, tuple):
        return type(value)(over_tensors(inside, change, (*place, i)) for i, inside in enumerate(value))
    return value


def name_of(place):
    """The name of a tensor in a part: that of a weight as it is, 'state.0.exp_avg' of a moment."""
    return '.'.join(map(str, place))


def without_numbers(tensor):
    """
    A meta tensor of its shape and strides. None where it stays in the small file: what has no dimension or no number,
    and what is not laid out densely, such as a view that says one number many times.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or not tensor.dim() or not tensor.numel():
        return None
    stand_in = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device='meta')
    return stand_in if torch.empty_like(stand_in).stride() == stand_in.stride() else None


def split(checkpoint):
    """
    (small, parts): the checkpoint with meta tensors in the place of those that go into shards, and these, as {part:
    {name: tensor}}. A tensor under several names is there once, and so is its stand-in.
    """
    small, parts = dict(checkpoint), {}
    for part in filter(checkpoint.__contains__, PARTS):
        tensors, stand_ins = {}, {}

        def change(place, tensor, tensors=tensors, stand_ins=stand_ins):
            mine, name, stand_in = ranks.local(tensor), name_of(place), without_numbers(tensor)
            if stand_in is None:
                return mine
            same = mine.untyped_storage()._cdata, mine.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
            if same not in stand_ins:
                if name in tensors:  # of another tensor
                    return mine
                tensors[name], stand_ins[same] = tensor, stand_in
            return stand_ins[same]
        small[part] = over_tensors(checkpoint[part], change)
        if tensors:
            parts[part] = tensors
    return small, parts


def stand_ins(value):
    """
    (tensors, names) of a part of a small checkpoint: {name: meta tensor}, each tensor once, as split has named them,
    and {name: that name of it}.
    """
    tensors, names, first = {}, {}, {}

    def look(place, tensor):
        if tensor.is_meta:
            names[name_of(place)] = name = first.setdefault(id(tensor), name_of(place))
            tensors[name] = tensor
    over_tensors(value, look)
    return tensors, names


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write(checkpoint, folder, group=None, parameters=None, first=None):
    """
    Write the tensors of a checkpoint into a new folder of shards in `folder`, all ranks together, and return the small
    checkpoint that stands for it. group: of the ranks, for this thread alone; None for one process. parameters: as in
    checkpoints.save. first() comes before. Where something goes wrong on one rank it is raised on all of them, as far
    as they are concerned: rank 0 alone knows of what it does last. Numbers must be finite, else Damaged.
    """
    from kit.state import dcp
    folder = Path(folder)

    def check():
        if first:
            first()
        mine = {part: over_tensors(checkpoint[part], lambda _, tensor: ranks.local(tensor))
                for part in filter(checkpoint.__contains__, PARTS)}
        if bad := forms.bad_numbers(mine | {'parameters': list(parameters or checkpoint['model'])}):
            raise Damaged(f'{bad} holds numbers that are not finite')

    together(check, group)
    name, *_ = together(lambda: make_folder(folder, checkpoint['iter_num']) if ranks.is_main else '', group)
    try:
        small, parts = split(checkpoint)
        sums = {}
        for part, tensors in parts.items():
            written = dcp.save(tensors, folder / name / part, group)
            sums |= {f'{part}/{file}': entry for file, entry in written.items()}
        all_sums = {}
        for theirs in together(lambda: read_back(folder / name, sums), group):
            all_sums |= theirs
        if ranks.is_main:
            for file, (size, _) in all_sums.items():
                if not os.path.isfile(folder / name / file) or os.path.getsize(folder / name / file) != size:
                    raise Damaged(f'{name}/{file}, which another rank has written, is not to be seen from rank 0: with '
                                  'sharded = True all need one disk')
            for place in (*(folder / name / part for part in parts), folder / name, folder):
                if os.name == 'posix':  # a file is on the disk only when its folder is
                    files.sync(place)
        return small | {'shards': {'folder': name, 'files': all_sums}}
    except BaseException:
        if ranks.is_main:
            with suppress(OSError):
                delete(folder / name)
        raise


def together(do, group):
    """What do() returns on each rank, as a list; where it raises on one of them, this does on all."""
    if group is None:
        return [do()]
    mine, failure = None, ''
    try:
        mine = do()
    except Exception as error:
        failure = f'rank {ranks.rank}: {on_one_line(error) or type(error).__name__}'
    results = ranks.from_all((mine, failure), group)
    if failures := [theirs for _, theirs in results if theirs]:
        raise RuntimeError(failures[0])
    return [theirs for theirs, _ in results]


def make_folder(folder, step):
    """The name of a new folder of shards; none is taken that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    name, number = f'shards_{step:07d}', 0
    while True:
        try:
            free = f'{name}.{number}' if number else name
            (folder / free).mkdir()
            return free
        except FileExistsError:
            number += 1


def read_back(folder, sums):
    """The same sums, once the files have been read; a disk may lie. Raises Damaged."""
    for name, entry in sums.items():
        with files.open_own(folder / name, 'rb') as file:
            compare(file, entry, f'{folder.name}/{name}')
    return sums


def compare(file, entry, name):
    """Read all of a file and compare it with its [size, crc32]. Raises Damaged."""
    size = crc = 0
    file.seek(0)
    while data := file.read(1 << 22):
        size, crc = size + len(data), zlib.crc32(data, crc)
        if size > entry[0]:
            break
    if [size, crc] != entry:
        raise Damaged(f'{name}: other bytes than were written' if size == entry[0] else
                      f'{name}: it has not the {entry[0]:,} bytes that were written')


# ---------------------------------------------------------------------------------------------------------------------
# folders


def folder_of(path, checkpoint):
    """
    The folder with the shards of the small checkpoint in path: beside it, or a folder above it, since files of a run
    are moved to later.1/. Raises Unfit.
    """
    said, beside = checkpoint['shards'], Path(path).parent
    if not (isinstance(said, dict) and isinstance(said.get('folder'), str) and FOLDER.fullmatch(said['folder'])
            and isinstance(said.get('files'), dict) and all(map(is_entry, said['files'].items()))):
        raise forms.foreign(f'its shards are {forms.shown(said)}')
    for place in beside, beside / os.pardir:
        if os.path.isdir(place / said['folder']):
            return place / said['folder']
    raise forms.Unfit(f'has its tensors in the folder {said["folder"]}, and that is neither beside it nor one folder '
                      'above; the two belong together, copy both')


def is_entry(item):
    name, entry = item
    return isinstance(name, str) and FILE.fullmatch(name) is not None and type(entry) is list and (
        [type(number) for number in entry] == [int, int])


def belonging(path):
    """The checkpoint whose shards a folder holds; None where it is no such folder, or none is there."""
    path = Path(path).absolute()
    for folder in path, path.parent:
        if FOLDER.fullmatch(folder.name):
            return next((file for file in files_of(folder.parent) if folder.name in folders_in(file)), None)
    return None


def files_of(folder):
    """The files of a run that can refer to shards, the newest state first."""
    found = [*Path(folder).glob('*.pt'), *Path(folder).glob('*/*.pt')]
    return sorted(filter(os.path.isfile, found), key=lambda path: (path.name != 'ckpt.pt', path))


def folders_in(path):
    """
    The folders of shards that a file names. It is not unpickled for that: what torch.save writes is not compressed, and
    a file that is damaged keeps what it names.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            data = b''.join(archive.read(name) for name in archive.namelist() if name.endswith('/data.pkl'))
    except OSError:
        raise
    except Exception:  # a broken archive raises many kinds
        data = Path(path).read_bytes()
    return {found[0].decode() for found in re.finditer(FOLDER.pattern.encode(), data)}


def prune(folder):
    """
    Delete the folders of shards to which no file of the run refers: of checkpoints that are gone, and of a save that
    was killed. Raises OSError where a file cannot be read or deleted.
    """
    folders = [path for path in Path(folder).glob('shards_*') if FOLDER.fullmatch(path.name) and path.is_dir()
               and not path.is_symlink()]
    if not folders:
        return
    named = set().union(*map(folders_in, {os.stat(path).st_ino: path for path in files_of(folder)}.values()))
    for path in folders:
        if path.name not in named:
            delete(path)


def delete(path):
    """Delete a folder of shards: what DCP has written in it, and it and its parts where nothing else is in them."""
    for file in path.glob('*/*'):
        if FILE.fullmatch(f'{file.parent.name}/{file.name}'.removesuffix('.tmp')):
            file.unlink()
    for place in (*(path / part for part in PARTS), path):
        with suppress(OSError):  # of no such part, or something else is in there
            place.rmdir()


# ---------------------------------------------------------------------------------------------------------------------
# reading


@dataclass
class Part:
    """
    A part of a checkpoint, verified: its tensors as {name: meta tensor}, under which of these names those of the
    checkpoint are, DCP's metadata of them, and its files, which are open, and so whole when a run deletes them.
    """
    tensors: dict
    names: dict
    metadata: object
    opened: dict

    def read(self, names, like=None):
        """{name: tensor}, read into memory; like: a tensor in parts, of which each process then reads its own."""
        from kit.state import dcp
        tensors = {name: torch.empty_like(self.tensors[name], device='cpu') if like is None else
                   ranks.empty_part(self.tensors[name], like) for name in names}
        dcp.load(tensors, self.metadata, self.opened)
        return tensors


def open_parts(path, checkpoint, wanted, threads, stack, is_verified=False):
    """
    {name: Part} of those of the wanted parts of a small checkpoint that have shards. All bytes of theirs are compared
    with their checksums, and nothing is taken from them before that. stack: an ExitStack that closes the files. Raises
    Damaged, Unfit and whatever the system does.
    """
    from kit.state import dcp
    said, folder = checkpoint['shards'], folder_of(path, checkpoint)
    there = {part: stand_ins(checkpoint[part]) for part in filter(checkpoint.__contains__, wanted)}
    there = {part: found for part, found in there.items() if found[0]}
    opened = {}
    for name in said['files']:
        if name.partition('/')[0] in there:
            try:
                opened[name] = stack.enter_context(files.open_own(folder / name, 'rb'))
            except (FileNotFoundError, NotADirectoryError):
                raise Damaged(f'{folder.name}/{name} is missing') from None

    def check(name):  # zlib computes without Python's lock, so that the threads work side by side
        compare(opened[name], said['files'][name], f'{folder.name}/{name}')
    if is_verified:  # by rank 0, which has chosen this file
        pass
    elif threads == 1:
        list(map(check, opened))
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(check, opened))
    parts = {}
    for part, (tensors, names) in there.items():
        own = {name.partition('/')[2]: file for name, file in opened.items() if name.startswith(f'{part}/')}
        sizes = {name: said['files'][f'{part}/{name}'][0] for name in own}
        if dcp.METADATA not in own:
            raise forms.foreign(f'its shards have no {part}/{dcp.METADATA}')
        own[dcp.METADATA].seek(0)
        metadata = dcp.read_metadata(own.pop(dcp.METADATA).read(), tensors, sizes)
        dcp.check_archives(metadata, own)
        parts[part] = Part(tensors, forms.plain_names(names), metadata, own)
    return parts


def verify(path, checkpoint, threads):
    """The same small checkpoint, once all its shards were compared with what was written; see open_parts."""
    with ExitStack() as stack:
        open_parts(path, checkpoint, PARTS, threads, stack)
    return checkpoint


def fill(path, checkpoint, wanted, threads, like=None, is_verified=False):
    """
    The small checkpoint of path as one in one file, with the tensors of the wanted parts read into memory; all its
    shards are verified, if they are not yet. like: see Part.read. Raises what open_parts raises, and what torch does.
    """
    with ExitStack() as stack:
        parts = open_parts(path, checkpoint, PARTS, threads, stack, is_verified)
        for part in filter(parts.__contains__, wanted):
            read = parts[part].read(parts[part].tensors, like)
            by_stand_in = {id(parts[part].tensors[name]): tensor for name, tensor in read.items()}
            checkpoint[part] = over_tensors(checkpoint[part], lambda _, tensor, found=by_stand_in:
                                            found.get(id(tensor), tensor))
    return {key: value for key, value in checkpoint.items() if key != 'shards'}

