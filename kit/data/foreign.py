"""Files of other programs: pickles, shards of llm.c and modded-nanogpt, and what is no file of ids."""

import codecs
import pickle
import re
from contextlib import suppress

import numpy as np

from kit.base.errors import fail

HEADER = 1024  # bytes before the ids in a shard of llm.c
SHARDS = {20240520: (1, '<u2'), 20240801: (7, '<u4')}  # their first number: version and dtype, of GPT-2's and Llama 3's

# what files begin with that are no ids, whatever they are called
FOREIGN = {b'\x93NUMPY': 'a .npy file', b'PK\x03\x04': 'a zip, as torch.save writes', b'\x1f\x8b\x08': 'a .gz file',
           b'\x28\xb5\x2f\xfd': 'a .zst file', b'\xfd7zXZ': 'an .xz file', b'PAR1': 'a Parquet file'}


def load_plain_pickle(path):
    """
    A pickle of plain containers, numbers and texts, NumPy's too. Anything that names code is refused: no file runs any.
    """
    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) == ('numpy', 'dtype'):
                return Kind
            if name == 'scalar' and module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
                return lambda kind, data: np.frombuffer(data, kind.dtype)[0].item()
            raise pickle.UnpicklingError(f'it asks for {module}.{name}, and a plain file asks for nothing')

    class Kind:
        """What a pickle says of a dtype: of numbers and texts, nothing else."""

        def __init__(self, code, *_):
            if not re.fullmatch(r'[biufU]\d+', code):
                raise pickle.UnpicklingError(f'it has the dtype {code}, and a plain file has numbers and texts')
            self.dtype = np.dtype(code)

        def __setstate__(self, state):
            self.dtype = self.dtype.newbyteorder(state[1])

    with open(path, 'rb') as file:
        return Plain(file).load()


def read_header(path, head, size):
    """The dtype of the ids in a shard of llm.c or modded-nanogpt, which begins with what `head` begins with."""
    version, dtype = SHARDS[int.from_bytes(head[:4], 'little')]
    header, dtype = np.frombuffer(head[:min(len(head), HEADER) // 4 * 4], '<i4'), np.dtype(dtype)
    if len(header) < HEADER // 4:
        fail(f'{path} is cut off within its header: copy it again')
    if header[1] != version:
        fail(f'{path} is a shard of llm.c of version {header[1]}, and of this kind version {version} is read')
    if header[2] < 1 or size != HEADER + dtype.itemsize * int(header[2]):
        fail(f'{path} has {size:,} bytes, its header speaks of {header[2]:,} tokens; it is cut off: copy it again')
    return dtype


def foreign_kind(head):
    """What a file is that begins like this, in words; '' where that can be ids."""
    with suppress(UnicodeDecodeError):
        text = codecs.getincrementaldecoder('utf-8')().decode(head)
        if len(text) >= 64 and all(char.isprintable() or char.isspace() for char in text):
            return 'a text'
    return next((kind for begin, kind in FOREIGN.items() if head.startswith(begin)), '')
