"""
PyTorch's distributed checkpoint (DCP, torch.distributed.checkpoint) as shards.py uses it: what it writes is summed on
its way to the disk, and what it reads is looked at first.

DCP's .metadata, which says where in which file a tensor lies, is a pickle. It is read with stand-ins for the classes
that DCP writes there, which do nothing, and all else is refused; of what they hold DCP is given what has been compared
with the checkpoint. DCP's own reading of it, and of anything but tensors, is never called.

This takes half a second to import, so it is imported where there are shards.
"""

import io
import math
import os
import pickle
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from kit.base import files
from kit.state import forms

METADATA = '.metadata'
warnings.filterwarnings('ignore', 'torch.distributed is disabled')  # one process alone is what is meant


# ---------------------------------------------------------------------------------------------------------------------
# writing


class Summed:
    """A file that is written from its begin to its end, how many bytes those are and their checksum."""

    def __init__(self, file):
        self.file, self.size, self.crc = file, 0, 0
        self.flush = file.flush

    def write(self, data):
        data = memoryview(data).cast('B')
        self.crc = zlib.crc32(data, self.crc)
        self.size += len(data)
        return self.file.write(data)

    def tell(self):
        return self.size

    def close(self):
        """DCP closes it early: it has to be synced first."""


class NewFiles(filesystem.FileSystem):
    """Where DCP writes: new files alone, on the disk when they are closed. sums: {name: [size, crc32]}."""

    def __init__(self):
        self.sums = {}

    @contextmanager
    def create_stream(self, path, mode):
        with files.open_own(path, 'xb') as file:
            stream = Summed(file)
            yield stream
            file.flush()
            os.fsync(file.fileno())
        self.sums[Path(path).name.removesuffix('.tmp')] = [stream.size, stream.crc]  # .metadata.tmp is renamed


class Writer(checkpoint.FileSystemWriter):
    def storage_meta(self):
        """DCP's own names the folder by a Path, which another system cannot read."""
        return StorageMeta(checkpoint_id=self.path.name)


def save(tensors, folder, group):
    """
    Write {key: tensor} into a new folder, each rank its part: of a DTensor the shard that it has, of what is whole on
    all ranks its share. group: of the ranks, None for one process alone. Returns {name: [size, crc32]} of the files of
    this rank. What goes wrong on one rank is raised on all.
    """
    writer = Writer(folder, sync_files=False, per_thread_copy_ahead=0, overwrite=False)  # all is on the host already
    writer.fs = NewFiles()
    planner = checkpoint.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        checkpoint.save(tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:  # no Exception, and its words are those of tracebacks
        rank, (cause, _) = min(error.failures.items())
        raise cause if group is None else RuntimeError(f'rank {rank}: {cause}') from None
    return writer.fs.sums


# ---------------------------------------------------------------------------------------------------------------------
# .metadata


class StandIn:
    """In the place of an object that a pickle asks for: what it is made of, and its class by its name."""

    state = None

    def __new__(cls, *args):
        stand_in = object.__new__(cls)
        stand_in.args = args
        return stand_in

    def __setstate__(self, state):
        self.state = state


KNOWN = {(module, name): type(name, (StandIn,), {}) for module, names in {
    'torch.distributed.checkpoint.metadata': (
        'Metadata', 'MetadataIndex', 'StorageMeta', 'TensorStorageMetadata', 'TensorProperties',
        'ChunkStorageMetadata', '_MEM_FORMAT_ENCODING'),
    'torch.distributed.checkpoint.filesystem': ('_StorageInfo',),
    'torch.serialization': ('_get_layout',),
    'torch': ('Size',),
}.items() for name in names}


class Restricted(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise forms.foreign(f'its {METADATA} asks for code, {module}.{name}, and that is never run; DCP writes none')


def read_metadata(data, tensors, sizes):
    """
    DCP's Metadata out of the bytes of a .metadata, for a checkpoint with these tensors, {key: meta tensor}, and files,
    {name: size}. Raises Unfit where it is not of these: every tensor must be cut along one dimension into pieces that
    together are all of it, each within a file.
    """
    try:
        found = Restricted(io.BytesIO(data)).load()
        described = {key: fields(value, 'TensorStorageMetadata', 'properties', 'size', 'chunks')
                     for key, value in of(found, 'Metadata')['state_dict_metadata'].items()}
        places = {}
        for index, info in found.state['storage_data'].items():
            key, offset = fields(index, 'MetadataIndex', 'fqn', 'offset')
            places[key, numbers(offset)] = fields(info, '_StorageInfo', 'relative_path', 'offset', 'length')
            if 'transform_descriptors' in info.state:
                raise ValueError('it names code that its files went through')
        if described.keys() != tensors.keys():
            raise ValueError('it has other tensors than the checkpoint')
        metadata, n_bytes = Metadata({}, storage_data={}, version='1.0.0'), 0
        for key, tensor in tensors.items():
            properties, size, chunks = described[key]
            chunks = [tuple(map(numbers, fields(chunk, 'ChunkStorageMetadata', 'offsets', 'sizes')))
                      for chunk in chunks]
            if numbers(size) != tensor.shape or of(properties, 'TensorProperties')[0] != tensor.dtype:
                raise ValueError(f'{key} has another shape or dtype than in the checkpoint')
            if not cover(chunks, tensor.shape):
                raise ValueError(f'the pieces of {key} are not all of it')
            for offsets, shape in chunks:
                name, begin, length = places[key, offsets]
                smallest = math.prod(shape) * tensor.element_size()
                n_bytes += smallest
                if not type(begin) is type(length) is int or length < smallest or not (
                        name in sizes and 0 <= begin <= sizes[name] - length):
                    raise ValueError(f'{key} lies beyond its files')
                metadata.storage_data[MetadataIndex(key, offsets)] = SimpleNamespace(
                    relative_path=name, offset=begin, length=length, transform_descriptors=None)
            metadata.state_dict_metadata[key] = TensorStorageMetadata(
                TensorProperties(tensor.dtype), tensor.shape,
                [ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape)) for offsets, shape in chunks])
        if n_bytes > sum(sizes.values()):  # else a small file could ask for more memory than there is
            raise ValueError('its tensors are larger than their files')
        return metadata
    except forms.Unfit:
        raise
    except Exception as error:  # whatever a pickle that DCP has not written leads to
        raise forms.foreign(f'its {METADATA} is none that DCP has written for it: {forms.reason(error)}') from None


def of(stand_in, name):
    """The state of a stand-in of this class."""
    if type(stand_in).__name__ != name:
        raise TypeError(f'{name} is expected, and there is {type(stand_in).__name__}')
    return stand_in.state


def fields(stand_in, name, *names):
    return [of(stand_in, name)[field] for field in names]


def numbers(size):
    """The numbers in a torch.Size."""
    of(size, 'Size')
    if not all(type(number) is int and 0 <= number < 2**63 for number in size.args[0]):
        raise ValueError('a size is no list of numbers')
    return tuple(size.args[0])


def cover(chunks, shape):
    """Whether pieces, (offsets, sizes) of each, are a tensor of this shape, cut along one dimension."""
    if not all(len(offsets) == len(sizes) == len(shape) for offsets, sizes in chunks):
        return False
    chunks = [(offsets, sizes) for offsets, sizes in chunks if math.prod(sizes)] if math.prod(shape) else chunks[:1]
    cut = next((dim for dim, n in enumerate(shape) if chunks and chunks[0][1][dim] != n), 0)
    end = 0
    for offsets, sizes in sorted(chunks, key=lambda chunk: chunk[0][cut:]):
        if any((offset, n) != ((end, n) if dim == cut else (0, shape[dim]))
               for dim, (offset, n) in enumerate(zip(offsets, sizes))):
            return False
        end += sizes[cut] if sizes else 1
    return end == (shape[cut] if shape else 1)


# ---------------------------------------------------------------------------------------------------------------------
# reading


class OpenFiles(filesystem.FileSystem):
    """Where DCP reads: files that are open, and so those that were verified, even where a run deletes them."""

    def __init__(self, opened):
        self.opened = opened

    @contextmanager
    def create_stream(self, path, mode):
        yield self.opened[Path(path).name]


class Reader(checkpoint.FileSystemReader):
    def __init__(self, metadata, opened):
        super().__init__('.')
        self.metadata, self.fs = metadata, OpenFiles(opened)

    def read_metadata(self, *args, **kwargs):
        return self.metadata


class Planner(checkpoint.DefaultLoadPlanner):
    def load_bytes(self, *args):
        raise pickle.UnpicklingError('what is no tensor is not read from shards: DCP would run a pickle')


def load(tensors, metadata, opened):
    """
    Fill tensors, {key: tensor}, some or all of a part of a checkpoint. Of a DTensor the part that this rank has is
    read; no rank waits for another. metadata: as read_metadata gives it; opened: {name: open file}.
    """
    checkpoint.load(tensors, storage_reader=Reader(metadata, opened), no_dist=True,
                    planner=Planner(flatten_state_dict=False, flatten_sharded_tensors=False))


class Slice(io.RawIOBase):
    """Bytes of an open file, as a file of its own."""

    def __init__(self, file, begin, length):
        self.file, self.begin, self.length, self.at = file, begin, length, 0

    def seekable(self):
        return True

    def readable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence]
        return self.at

    def tell(self):
        return self.at

    def readinto(self, buffer):
        self.file.seek(self.begin + self.at)
        data = self.file.read(max(0, min(len(buffer), self.length - self.at)))
        buffer[:len(data)] = data
        self.at += len(data)
        return len(data)


def check_archives(metadata, opened):
    """Each piece of a tensor is an archive as torch.save writes it, see forms.check_archive. Raises Unfit."""
    for info in metadata.storage_data.values():
        try:
            with zipfile.ZipFile(Slice(opened[info.relative_path], info.offset, info.length)) as archive:
                forms.check_archive(archive)
        except zipfile.BadZipFile:
            raise forms.foreign(f'there is no tensor in its {info.relative_path}, where one should be') from None
