"""
Tokenizers and dataset folders: text to ids and back, and train.bin, val.bin, test.bin with what describes them.

meta.json holds all that is needed to encode and decode, so neither needs a download. A folder that nanoGPT has made
(meta.pkl, or no meta at all: GPT-2's BPE) is read as well, and so are the shards of llm.c and modded-nanogpt.
"""

import base64
import hashlib
import json
import os
import pickle
from itertools import groupby
from pathlib import Path

import numpy as np

from kit.base.errors import ROOT, fail

END = '<|endoftext|>'  # what stands behind each document, as text; its id is meta['end_of_text']

MASK = '[MASK]'  # what a hidden token is shown as

HASH_UP_TO = 64 * 2**20  # bytes: larger files have their size checked at each start, not their hash
SCAN_UP_TO = 50_000_000  # tokens: of larger splits a sample is searched for ids beyond the vocabulary
HEADER = 1024  # bytes before the ids in a shard of llm.c


class CharTokenizer:
    """One id a character. chars: the characters in the order of their ids; the last can be END."""

    def __init__(self, chars):
        self.chars = chars
        self.ids = {char: i for i, char in enumerate(chars)}
        self.size = len(chars)
        self.specials = {self.ids[END]} if END in self.ids else set()

    def encode(self, text):
        pieces = text.split(END) if self.specials else [text]
        unknown = sorted(set().union(*pieces) - self.ids.keys())
        if unknown:
            raise ValueError(f'{unknown[0]!r} is not among the {self.size} characters of this model')
        ids = [self.ids[char] for char in pieces[0]]
        for piece in pieces[1:]:
            ids += [self.ids[END], *(self.ids[char] for char in piece)]
        return ids

    def decode_bytes(self, ids):
        return ''.join(self.chars[i] for i in ids).encode()


class ByteTokenizer:
    """One id a byte of UTF-8, and 256 for END."""

    size, specials = 257, {256}

    def encode(self, text):
        pieces = text.split(END)
        ids = list(pieces[0].encode())
        for piece in pieces[1:]:
            ids += [256, *piece.encode()]
        return ids

    def decode_bytes(self, ids):
        return b''.join(END.encode() if i == 256 else bytes([i]) for i in ids)


class BPETokenizer:
    """Byte-pair encoding by tiktoken. END in a text is the special token."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.size = encoding.n_vocab
        self.specials = set(encoding._special_tokens.values())

    def encode(self, text):
        return self.encoding.encode(text, allowed_special={END})

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)


def bpe(description):
    """Raises OSError where it had to be downloaded and could not."""
    if 'ranks' not in description:  # a nanoGPT folder or checkpoint: all that is known is the name
        return BPETokenizer(tiktoken_encoding(description['name']))
    import tiktoken
    ranks = {base64.b64decode(token): rank for rank, token in enumerate(description['ranks'].split('\n')) if token}
    return BPETokenizer(tiktoken.Encoding(description['name'], pat_str=description['pattern'], mergeable_ranks=ranks,
                                          special_tokens=description['special']))


# the kinds of tokenizers, and how each is made of what meta['tokenizer'] says
KINDS = {
    'char': lambda description: CharTokenizer(description['chars']),
    'byte': lambda description: ByteTokenizer(),
    'bpe': bpe,
}


def tokenizer(description):
    """The tokenizer that meta['tokenizer'] describes. Raises OSError where it had to be downloaded and could not."""
    return KINDS[description['kind']](description)


def encode_batch(batch, tokenizer, end, dtype):
    """[(text, whether a document ends)] -> the ids of all, with END's id behind each document, and nowhere else."""
    ids = []
    for text, is_end in batch:
        ids += [i for i in tokenizer.encode(text) if i != end] + [end] * is_end
    return np.array(ids, dtype)


def decode(tokens, ids):
    """
    Ids -> text. Bytes that are no whole UTF-8 character become the replacement character, ids beyond the tokenizer's
    (the one that hides a token) become MASK.
    """
    pieces = [MASK.encode() * len(list(run)) if is_beyond else tokens.decode_bytes(list(run))
              for is_beyond, run in groupby(ids, lambda i: i >= tokens.size)]
    return b''.join(pieces).decode('utf-8', errors='replace')


def beginning(tokens, meta):
    """The ids that a new text begins with: end_of_text where it stands between documents, else a line break."""
    return [meta['end_of_text']] if meta.get('documents') else tokens.encode('\n')


def is_same_tokenizer(one, other):
    """Whether ids mean the same by two descriptions, of which one may know no more than the name, as nanoGPT's do."""
    keys = [key for key in ('chars', 'name', 'ranks') if key in one and key in other]
    return one['kind'] == other['kind'] and all(one[key] == other[key] for key in keys)


def bytes_per_token(meta, ids):
    """
    How many bytes of text a token of these ids stands for, on average; special tokens stand for none. None where the
    tokenizer had to be downloaded and could not.
    """
    try:
        text = tokenizer(meta['tokenizer'])
    except OSError:
        return None
    counts = sum(np.bincount(ids[i:i + 2**22], minlength=text.size) for i in range(0, len(ids), 2**22))
    n_bytes = sum(int(counts[i]) * len(text.decode_bytes([i])) for i in np.flatnonzero(counts).tolist()
                  if i not in text.specials)
    return n_bytes / len(ids)


def unigram_entropy(ids):
    """Nats a token, of at most a million of ids: the loss of who knows how frequent each token is, and nothing else."""
    pieces = [ids[i:i + 4096] for i in range(0, len(ids), max(1, len(ids) // 2**20) * 4096)]
    counts = np.bincount(np.concatenate(pieces))
    shares = counts[counts > 0] / sum(map(len, pieces))
    return float(-(shares * np.log(shares)).sum())


def tiktoken_encoding(name):
    """tiktoken's encoding of that name, from its cache, from FLATGPT_MIRROR/tiktoken, or downloaded."""
    import tiktoken
    mirror = os.path.join(os.environ.get('FLATGPT_MIRROR', ''), 'tiktoken')
    if 'FLATGPT_MIRROR' in os.environ and os.path.isdir(mirror):
        os.environ.setdefault('TIKTOKEN_CACHE_DIR', mirror)
    return tiktoken.get_encoding(name)


def describe_bpe(encoding):
    """meta['tokenizer'] for a tiktoken encoding, whole."""
    token_of = {rank: token for token, rank in encoding._mergeable_ranks.items()}
    ranks = (token_of.get(rank, b'') for rank in range(max(token_of) + 1))  # p50k has its END among them: a gap
    return {'kind': 'bpe', 'name': encoding.name, 'pattern': encoding._pat_str, 'special': encoding._special_tokens,
            'ranks': '\n'.join(base64.b64encode(token).decode() for token in ranks)}


# what a folder without any meta means
GPT2 = {'vocab_size': 50257, 'tokenizer': {'kind': 'bpe', 'name': 'gpt2'}, 'end_of_text': 50256}


# ---------------------------------------------------------------------------------------------------------------------
# dataset folders


def dataset_folder(name):
    """data/<name> of the working directory if it is there, else that of the repository."""
    here = Path('data') / name
    return here if here.is_dir() else ROOT / 'data' / name


def exists(folder):
    """Whether there is a dataset, whole or not: its train.bin, or shards of it."""
    return bool(files_of(folder, 'train'))


def files_of(folder, split):
    """<split>.bin, or its shards <split>_*.bin in their order, or those of llm.c and modded-nanogpt."""
    for pattern in f'{split}.bin', f'{split}_*.bin', f'*_{split}.bin', f'*_{split}_*.bin':
        if found := sorted(folder.glob(pattern)):
            return found
    return []


def read_dataset(folder, block_size=1):
    """
    (splits, meta) of a dataset folder: a read-only array of ids for each split, a memory map or Shards of several, and
    what describes them. A folder that is not whole, or has ids beyond its vocabulary, ends the script with the reason.
    """
    if not exists(folder):
        fail(f'{folder} holds no dataset (no train.bin); python prepare.py --help tells how to make one')
    meta = read_meta(folder)
    listed = {name: [stem for stem in meta.get('files', {}) if stem == name or stem.startswith(f'{name}_')]
              for name in ('train', 'val', 'test')}
    splits = {}
    for split in ('train', 'val', 'test'):
        paths = files_of(folder, split)
        if missing := set(listed[split]) - {path.stem for path in paths}:
            fail(f'{folder / min(missing)}.bin is missing; prepare the dataset again, or copy the file there')
        if paths:
            splits[split] = read_split(paths, meta, block_size)
        elif split != 'test':
            fail(f'{folder / split}.bin is missing; prepare the dataset again, or copy the file there')
    return splits, meta


def read_split(paths, meta, block_size):
    """The files of a split as one array of ids."""
    parts = [read_tokens(path, meta, SCAN_UP_TO // len(paths)) for path in paths]
    data = parts[0] if len(parts) == 1 else Shards(parts)
    if len(data) < block_size + 1:
        fail(f'{paths[0]} has {len(data):,} tokens, too few for a window of block_size + 1 = {block_size + 1}; '
             f'take a block_size below {len(data)} or more text')
    return data


class Shards:
    """Several arrays of ids as one, with what is asked of one here: its length, slices, arrays of places."""

    def __init__(self, parts):
        self.parts, self.dtype = parts, parts[0].dtype
        self.ends = np.cumsum([len(part) for part in parts])  # of each, in the whole

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, places):
        """The ids of a slice or at an array of non-negative places, in its shape."""
        if isinstance(places, slice):
            start, stop, _ = places.indices(len(self))  # every id: no one here asks for every second
            firsts = self.ends - [len(part) for part in self.parts]
            return np.concatenate([part[max(0, start - first):max(0, stop - first)]
                                   for part, first in zip(self.parts, firsts.tolist())])
        places = np.asarray(places)
        found, which = np.empty(places.shape, self.dtype), np.searchsorted(self.ends, places, side='right')
        for i in np.unique(which):
            here = which == i
            found[here] = self.parts[i][places[here] - (self.ends[i] - len(self.parts[i]))]
        return found

    def without_first(self):
        """All ids but the first, still on the disk."""
        return Shards([self.parts[0][1:], *self.parts[1:]])


def read_meta(folder):
    """meta.json, else nanoGPT's meta.pkl, else what nanoGPT assumes where it finds none."""
    try:
        if (folder / 'meta.json').is_file():
            meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
            return check_meta(meta)
        if (folder / 'meta.pkl').is_file():
            pickled = load_plain_pickle(folder / 'meta.pkl')
            chars = [pickled['itos'][i] for i in range(len(pickled['itos']))]
            return check_meta({'vocab_size': pickled['vocab_size'], 'tokenizer': {'kind': 'char', 'chars': chars}})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, IndexError,
            pickle.UnpicklingError) as error:
        fail(f'the meta file in {folder} is damaged or foreign ({error}); prepare the dataset again')
    return GPT2


def check_meta(meta):
    """Returns what describes a dataset, or raises ValueError, KeyError, TypeError or AttributeError where it cannot."""
    if meta.get('format', 1) != 1:
        raise ValueError(f'it has format {meta["format"]!r}, and this version reads format 1')
    if not isinstance(meta['vocab_size'], int) or meta['vocab_size'] < 1:
        raise ValueError(f'vocab_size is {meta["vocab_size"]!r}')
    if meta.get('dtype', 'uint16') not in ('uint16', 'uint32'):
        raise ValueError(f'dtype is {meta["dtype"]!r}')
    if meta['vocab_size'] > 2**16 and meta.get('dtype', 'uint16') == 'uint16':
        raise ValueError(f'its {meta["vocab_size"]:,} ids do not fit uint16')
    for entry in meta.get('files', {}).values():
        int(entry['tokens']), str(entry['sha256'])
    kind = meta['tokenizer']['kind']
    if kind not in KINDS:
        raise ValueError(f'its tokenizer is of kind {kind!r}, which kit/data/tokens.py does not have')
    if kind == 'char' and len(''.join(meta['tokenizer']['chars'])) < meta['vocab_size']:
        raise ValueError('it has fewer characters than ids')
    return meta


def padded_vocab_size(meta, with_mask=False):
    """
    The vocabulary of a new model: large ones are rounded up to a multiple of 64 (50257 to 50304), as in nanoGPT.
    with_mask: and one more id, the next free one, which hides a token.
    """
    size = meta['vocab_size'] + with_mask
    return size if size < 1024 else (size + 63) // 64 * 64


def load_plain_pickle(path):
    """A pickle of plain containers, numbers and texts. Anything that names code is refused: no file runs any."""
    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f'it asks for {module}.{name}, and a plain file asks for nothing')
    with open(path, 'rb') as file:
        return Plain(file).load()


def read_tokens(path, meta, scan_up_to):
    """One .bin file as a memory map, after a look at its size, its hash and its ids, of so many tokens at most."""
    again = 'prepare the dataset again'
    dtype = np.dtype(meta.get('dtype', 'uint16')).newbyteorder('<')
    size, offset = path.stat().st_size, 0
    expected = meta.get('files', {}).get(path.stem)
    if size == 0:
        fail(f'{path} is empty; {again}')
    if n_tokens := header_of(path):
        dtype, offset = np.dtype('<u2'), HEADER
        if size != offset + 2 * n_tokens:
            fail(f'{path} has {size:,} bytes, its header speaks of {n_tokens:,} tokens; it is cut off: copy it again')
        expected = None
    if (size - offset) % dtype.itemsize:
        fail(f'{path} has {size} bytes, which is no whole number of {dtype.name} ids; it is cut off: {again}')
    if expected and size != expected['tokens'] * dtype.itemsize:
        fail(f'{path} has {size // dtype.itemsize:,} tokens, meta.json says {expected["tokens"]:,}; {again}')
    if expected and size <= HASH_UP_TO and sha256(path) != expected['sha256']:
        fail(f'{path} is not the file that meta.json describes (its sha256 differs); {again}')
    data = np.memmap(path, dtype=dtype, mode='r', offset=offset)
    step = max(1, len(data) // scan_up_to) * 4096
    highest = max(int(data[i:i + 4096].max()) for i in range(0, len(data), step))
    if highest >= meta['vocab_size']:
        fail(f'{path} holds the id {highest}, beyond the vocabulary of {meta["vocab_size"]}; {again}')
    return data


def header_of(path):
    """The number of tokens that the header of a shard of llm.c or modded-nanogpt speaks of; 0 where there is none."""
    header = np.fromfile(path, dtype='<i4', count=HEADER // 4)
    is_one = len(header) == HEADER // 4 and (header[:2] == (20240520, 1)).all() and not header[3:].any()
    return int(header[2]) if is_one else 0


def read_rows(folder, split, n_tokens):
    """
    The pairs of a split, (n, 3) int64: where a row starts, where its target starts, where it ends. None where the
    dataset has none.
    """
    path = folder / f'{split}.rows.npy'
    if not path.is_file():
        return None
    try:
        rows = np.load(path, mmap_mode='r', allow_pickle=False)
        if rows.dtype != np.int64 or rows.ndim != 2 or rows.shape[1] != 3 or not len(rows):
            raise ValueError(f'it holds {rows.dtype} of shape {rows.shape}')
        if (rows[:, 0] < 0).any() or (np.diff(rows) <= 0).any() or (rows[:, 2] > n_tokens).any():
            raise ValueError(f'a row does not lie in the {n_tokens:,} tokens')
    except (OSError, ValueError, EOFError) as error:
        fail(f'{path} is damaged ({error}); prepare the dataset again')
    return rows


def fingerprint(folder, meta):
    """What tells the text of train and val from any other: the hashes that meta.json has, else those of some of it."""
    paths = [path for split in ('train', 'val') for path in files_of(folder, split)]
    known = {stem: entry['sha256'] for stem, entry in meta.get('files', {}).items()}
    digests = [known[path.stem] if path.stem in known else sha256_of_ends(path) for path in paths]
    return hashlib.sha256(' '.join(digests).encode()).hexdigest()


def sha256_of_ends(path):
    """Of the size of a file, its first MiB and its last: a large one is not read at each start."""
    size = path.stat().st_size
    with open(path, 'rb') as file:
        begin = file.read(2**20)
        file.seek(max(0, size - 2**20))
        return hashlib.sha256(str(size).encode() + begin + file.read(2**20)).hexdigest()


def sha256(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
