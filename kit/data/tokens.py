"""
Tokenizers and dataset folders: text to ids and back, and train.bin, val.bin, test.bin with what describes them.

meta.json holds all that is needed to encode and decode, so neither needs a download. A folder that nanoGPT has made
(meta.pkl, or no meta at all: GPT-2's BPE) is read as well, and so are the shards of llm.c and modded-nanogpt.
"""

import base64
import hashlib
import json
import os
from contextlib import suppress
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np

from kit.base.errors import ROOT, explained, fail, shown
from kit.data import foreign

END = '<|endoftext|>'  # how what stands behind each document is shown; its id is meta['end_of_text']

MASK = '[MASK]'  # what a hidden token is shown as
NOTHING = '\N{REPLACEMENT CHARACTER}'  # what an id without a token is shown as

HASH_UP_TO = 64 * 2**20  # bytes: larger files have their size checked at each start, not their hash
SCAN_UP_TO = 50_000_000  # tokens: of larger splits a sample is searched for ids beyond the vocabulary
# a meta.json for uint32 ids that come without one
EXAMPLE = '{{"vocab_size": {0}, "dtype": "uint32", "tokenizer": {{"kind": "ids", "size": {0}}}}}'


# ---------------------------------------------------------------------------------------------------------------------
# tokenizers: their number of ids, the id of the end of a document (or None), and the ids that no token has. In a text
# that is encoded END is a text like any other.


class CharTokenizer:
    """One id a character. chars: the characters in the order of their ids; '' where there is none, END for the end."""

    def __init__(self, chars):
        self.chars = chars
        self.ids = {char: i for i, char in enumerate(chars) if char}
        self.size, self.end = len(chars), self.ids.get(END)
        self.gaps = [i for i, char in enumerate(chars) if not char]

    def encode(self, text):
        if unknown := sorted(set(text) - self.ids.keys()):
            raise ValueError(f'{unknown[0]!r} is not among the {len(self.ids)} characters of this model')
        return [self.ids[char] for char in text]

    def decode_bytes(self, ids):
        return ''.join(self.chars[i] or NOTHING for i in ids).encode(errors='surrogatepass')


class WordTokenizer:
    """
    One id a word, as in a meta.pkl of nanoGPT's whose itos has entries of several characters. Where most have, and none
    has a blank, blanks stand between them; else they stand side by side.
    """

    def __init__(self, words):
        self.words = words
        self.ids = {word: i for i, word in enumerate(words) if word and word != END}
        self.size, self.end = len(words), words.index(END) if END in words else None
        self.gaps = [i for i, word in enumerate(words) if not word]
        self.longest = max(map(len, self.ids), default=0)
        is_apart = sum(len(word) > 1 for word in self.ids) > len(self.ids) / 2 and ' ' not in ''.join(self.ids)
        self.blank = ' ' if is_apart else ''

    def encode(self, text):
        """From left to right the longest word that fits. Where blanks stand between words any white space may."""
        ids, place = [], 0
        while place < len(text):
            ends = range(min(len(text), place + self.longest), place, -1)
            word = next((text[place:end] for end in ends if text[place:end] in self.ids), '')
            if word:
                ids.append(self.ids[word])
            elif not (self.blank and text[place].isspace()):
                raise ValueError(f'{text[place:place + 20]!r} begins with none of the {len(self.ids)} words of this '
                                 'model')
            place += len(word) or 1
        return ids

    def decode_bytes(self, ids):
        return ''.join(self.blank + (self.words[i] or NOTHING) for i in ids).encode(errors='surrogatepass')


class IdTokenizer:
    """No text is known: ids are written as numbers, with blanks between them."""

    end, gaps = None, ()

    def __init__(self, size):
        self.size = size

    def encode(self, text):
        for word in text.split():
            if not word.isdecimal() or int(word) >= self.size:
                raise ValueError(f'{shown(word)} is no id from 0 to {self.size - 1}, and this model knows nothing '
                                 'else; give ids with blanks between them')
        return [int(word) for word in text.split()]

    def decode_bytes(self, ids):
        return ''.join(f' {i}' for i in ids).encode()


class ByteTokenizer:
    """One id a byte of UTF-8, and 256 for END."""

    size, end, gaps = 257, 256, ()

    def encode(self, text):
        return list(text.encode())

    def decode_bytes(self, ids):
        return b''.join(END.encode() if i == 256 else bytes([i]) for i in ids)


class BPETokenizer:
    """By tiktoken."""

    def __init__(self, encoding):
        self.encoding, self.size = encoding, encoding.n_vocab
        self.end = encoding._special_tokens.get(END)
        self.bytes_of = {i: token for token, i in encoding._mergeable_ranks.items()} | {
            i: special.encode() for special, i in encoding._special_tokens.items()}
        self.gaps = [i for i in range(self.size) if i not in self.bytes_of]

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids):
        return b''.join(self.bytes_of.get(i, NOTHING.encode()) for i in ids)


def bpe(description):
    """Raises OSError where it had to be downloaded and could not."""
    if 'ranks' not in description:  # a nanoGPT folder or checkpoint: all that is known is the name
        return BPETokenizer(tiktoken_encoding(description['name']))
    return bpe_of(description['name'], description['pattern'], description['ranks'],
                  tuple(description['special'].items()))


@lru_cache(maxsize=4)  # a launch asks several times
def bpe_of(name, pattern, ranks, special):
    import tiktoken
    ranks = {base64.b64decode(token, validate=True): rank for rank, token in enumerate(ranks.split('\n')) if token}
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f'its ranks have no token for the byte {missing[0]}')
    return BPETokenizer(tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(special)))


# the kinds of tokenizers that prepare.py knows, and how each is made of what meta['tokenizer'] says
KINDS = {
    'char': lambda description: CharTokenizer(description['chars']),
    'byte': lambda description: ByteTokenizer(),
    'bpe': bpe,
}

# those that are read and never made
READ_ONLY = {
    'word': lambda description: WordTokenizer(description['words']),
    'ids': lambda description: IdTokenizer(description['size']),
}


def tokenizer(description):
    """The tokenizer that meta['tokenizer'] describes. Raises OSError where it had to be downloaded and could not."""
    return (KINDS | READ_ONLY)[description['kind']](description)


def decode(tokens, ids):
    """
    Ids -> text, whatever they are. Bytes that are no whole UTF-8 character and ids that no token has become the
    replacement character, ids beyond the tokenizer's (the one that hides a token) become MASK.
    """
    pieces = [MASK.encode() * len(list(run)) if is_beyond else tokens.decode_bytes(list(run))
              for is_beyond, run in groupby(ids, lambda i: i >= tokens.size)]
    return b''.join(pieces).decode('utf-8', errors='replace')


def beginning(tokens, meta):
    """
    The ids that a new text begins with: end_of_text where it stands between documents, else a line break; a blank where
    the model knows none, else the first token that there is.
    """
    if meta.get('documents'):
        return [meta['end_of_text']]
    for text in '\n', ' ':
        with suppress(ValueError):
            if ids := tokens.encode(text):
                return ids
    return [next(i for i in range(tokens.size) if i not in tokens.gaps)]


def is_same_tokenizer(one, other):
    """Whether ids mean the same by two descriptions, of which one may know no more than the name, as nanoGPT's do."""
    keys = [key for key in ('chars', 'words', 'name', 'ranks') if key in one and key in other]
    return one['kind'] == other['kind'] and all(one[key] == other[key] for key in keys)


def bytes_per_token(meta, ids):
    """
    How many bytes of text a token of these ids stands for, on average; the end of a document stands for none. None
    where no text is known, or the tokenizer had to be downloaded and could not.
    """
    if meta['tokenizer']['kind'] == 'ids':
        return None
    try:
        text = tokenizer(meta['tokenizer'])
    except OSError:
        return None
    counts = sum(np.bincount(ids[i:i + 2**22], minlength=meta['vocab_size']) for i in range(0, len(ids), 2**22))
    n_bytes = sum(int(counts[i]) * len(text.decode_bytes([i])) for i in np.flatnonzero(counts[:text.size]).tolist()
                  if i != text.end)
    return n_bytes / len(ids)


def tiktoken_encoding(name):
    """tiktoken's encoding of that name, from its cache, from FLATGPT_MIRROR/tiktoken, or downloaded."""
    import tiktoken
    mirror = os.path.join(os.environ.get('FLATGPT_MIRROR', ''), 'tiktoken')
    if 'FLATGPT_MIRROR' in os.environ and os.path.isdir(mirror):
        os.environ.setdefault('TIKTOKEN_CACHE_DIR', mirror)
    try:
        return tiktoken.get_encoding(name)
    except ValueError as error:  # there is no such name, or what came was another file
        raise OSError(str(error)) from None


def describe_bpe(encoding):
    """meta['tokenizer'] for a tiktoken encoding, whole."""
    token_of = {rank: token for token, rank in encoding._mergeable_ranks.items()}
    ranks = (token_of.get(rank, b'') for rank in range(max(token_of) + 1))  # p50k has its END among them: a gap
    return {'kind': 'bpe', 'name': encoding.name, 'pattern': encoding._pat_str, 'special': encoding._special_tokens,
            'ranks': '\n'.join(base64.b64encode(token).decode() for token in ranks)}


def byte_level_characters():
    """The character that stands for each byte in GPT-2's vocabulary: itself, or one from U+0100 on if it is none."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


# what a folder without any meta means
GPT2 = {'vocab_size': 50257, 'tokenizer': {'kind': 'bpe', 'name': 'gpt2'}, 'end_of_text': 50256}


# ---------------------------------------------------------------------------------------------------------------------
# dataset folders


def dataset_folder(name):
    """data/<name> of the working directory if it is there, else that of the repository."""
    here = Path('data') / name
    return here if os.path.isdir(here) else ROOT / 'data' / name  # Path's raises over a long name


def exists(folder):
    """Whether there is a dataset, whole or not: its train.bin, or shards of it."""
    return bool(files_of(folder, 'train'))


def files_of(folder, split):
    """<split>.bin, or its shards <split>_*.bin in their order, or those of llm.c and modded-nanogpt."""
    patterns = f'{split}.bin', f'{split}_*.bin', f'*_{split}.bin', f'*_{split}_*.bin'
    found = [sorted(folder.glob(pattern)) for pattern in patterns] if os.path.isdir(folder) else []
    return next(filter(None, found), [])


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
        self.parts, self.dtype = parts, np.result_type(*(part.dtype for part in parts))
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
    for path in folder / 'meta.json', folder / 'meta.pkl':
        if os.path.isfile(path):
            with explained(f'{path} is damaged or foreign', 'prepare the dataset again'):
                is_json = path.suffix == '.json'
                return check_meta(json.loads(path.read_text(encoding='utf-8-sig')) if is_json else read_nanogpts(path))
    return GPT2


def read_nanogpts(path):
    """
    What a meta.pkl says: vocab_size, and the tokens in itos (a dict or a list) or stoi; where it has neither no text is
    known. An id that they leave out has no token.
    """
    pickled = foreign.load_plain_pickle(path)
    itos = pickled.get('itos') or {i: token for token, i in pickled.get('stoi', {}).items()}
    itos = itos if isinstance(itos, dict) else dict(enumerate(itos))
    size = pickled['vocab_size'] if 'vocab_size' in pickled else max(itos) + 1
    if not itos:
        return {'vocab_size': size, 'tokenizer': {'kind': 'ids', 'size': size}}
    tokens = [itos.get(i, '') for i in range(min(size, 2**16))]
    if strange := [token for token in tokens if not isinstance(token, str)]:
        raise ValueError(f'its itos has {shown(strange[0])}, which is no text')
    if all(len(token) <= 1 or token == END for token in tokens):
        return {'vocab_size': size, 'tokenizer': {'kind': 'char', 'chars': tokens}}
    return {'vocab_size': size, 'tokenizer': {'kind': 'word', 'words': tokens}}


# what the entries of a meta file are, and those of its tokenizer, where they stand there
TYPES = {'vocab_size': int, 'files': dict, 'documents': dict, 'pairs': bool, 'separator': str | None,
         'end_of_text': int | None, 'tokenizer': dict}
TOKENIZER_TYPES = {'kind': str, 'name': str, 'pattern': str, 'ranks': str, 'special': dict, 'chars': list,
                   'words': list, 'size': int}


def check_meta(meta):
    """Returns what describes a dataset, or raises ValueError, KeyError or TypeError where it cannot."""
    check_types(meta, TYPES)
    size, end, description = meta['vocab_size'], meta.get('end_of_text'), meta['tokenizer']
    if meta.get('format', 1) != 1:
        raise ValueError(f'it has format {meta["format"]!r}, and this version reads format 1')
    if not 1 <= size <= 2**32:
        raise ValueError(f'vocab_size is {size}')
    if meta.get('dtype', 'uint16') not in ('uint16', 'uint32'):
        raise ValueError(f'dtype is {meta["dtype"]!r}')
    if size > 2**16 and meta.get('dtype', 'uint16') == 'uint16':
        raise ValueError(f'its {size:,} ids do not fit uint16')
    if end is None and (meta.get('documents') or meta.get('separator')):
        raise ValueError('it has documents and no end_of_text')
    if end is not None and not 0 <= end < size:
        raise ValueError(f'end_of_text is {end}, and there are {size:,} ids')
    for entry in meta.get('files', {}).values():
        check_types(entry, {'tokens': int, 'sha256': str})
        entry['tokens'], entry['sha256']
    check_types(description, TOKENIZER_TYPES)
    ''.join(description.get('chars', []))  # a TypeError where one is no text
    if description['kind'] not in KINDS | READ_ONLY:
        raise ValueError(f'its tokenizer is of kind {description["kind"]!r}, which kit/data/tokens.py does not have')
    if not all(0 <= i < size for i in description.get('special', {}).values()):
        raise ValueError('the ids of its special tokens lie beyond its vocabulary')
    if description['kind'] == 'bpe' and not description.get('name'):
        raise ValueError('its BPE has no name')
    if description['kind'] != 'bpe' or 'ranks' in description:
        text = tokenizer(description)
        if text.size > size or description['kind'] == 'char' and text.size < size:
            where = 'beyond' if text.size > size else 'fewer than'
            raise ValueError(f'its tokenizer has {text.size} ids, {where} the vocabulary of {size}')
        if len(text.gaps) == text.size:
            raise ValueError('none of its ids has a token')
    return meta


def check_types(entries, types):
    """Raises TypeError where a dict is none, or an entry of it is of another type than it should be."""
    if not isinstance(entries, dict):
        raise TypeError(f'a dict should stand where {shown(entries)} does')
    for name in types.keys() & entries.keys():
        value, kind = entries[name], types[name]
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:  # to Python a bool is an int
            raise TypeError(f'{name} is {shown(value)}')


def padded_vocab_size(meta, with_mask=False):
    """
    The vocabulary of a new model: large ones are rounded up to a multiple of 64 (50257 to 50304), as in nanoGPT.
    with_mask: and one more id, the next free one, which hides a token.
    """
    size = meta['vocab_size'] + with_mask
    return size if size < 1024 else (size + 63) // 64 * 64


def read_tokens(path, meta, scan_up_to):
    """One .bin file as a memory map, after a look at its size, its hash and its ids, of so many tokens at most."""
    again = 'prepare the dataset again'
    expected = meta.get('files', {}).get(path.stem)
    if not path.is_file():  # a pipe would be waited for
        fail(f'{path} is no file; {again}')
    with explained(f'{path} cannot be read', again):
        size = path.stat().st_size
        with open(path, 'rb') as file:
            head = file.read(4096)
    if size == 0:
        fail(f'{path} is empty; {again}')
    dtype, offset = np.dtype(meta.get('dtype', 'uint16')).newbyteorder('<'), 0
    if int.from_bytes(head[:4], 'little') in foreign.SHARDS:
        dtype, offset, expected = foreign.read_header(path, head, size), foreign.HEADER, None
        if dtype.itemsize > 2 and meta is GPT2:
            fail(f'{path} holds ids of Llama 3, and no meta.json says so; put one beside it: ' + EXAMPLE.format(128256))
    elif not expected and (kind := foreign.foreign_kind(head)):
        fail(f'{path} is {kind}, and a .bin file holds ids alone, as array.astype("{dtype.name}").tofile() writes them')
    if (size - offset) % dtype.itemsize:
        fail(f'{path} has {size} bytes, which is no whole number of {dtype.name} ids; it is cut off: {again}')
    if expected and size != expected['tokens'] * dtype.itemsize:
        fail(f'{path} has {size // dtype.itemsize:,} tokens, meta.json says {expected["tokens"]:,}; {again}')
    if expected and size <= HASH_UP_TO and sha256(path) != expected['sha256']:
        fail(f'{path} is not the file that meta.json describes (its sha256 differs); {again}')
    data = np.memmap(path, dtype=dtype, mode='r', offset=offset)
    step = max(1, len(data) // scan_up_to) * 4096
    pieces = [data[i:i + 4096] for i in range(0, len(data), step)]
    if offset == 0 and 'dtype' not in meta and len(data) >= 32 and not any(piece[1::2].any() for piece in pieces):
        fail(f'{path}: every second uint16 in it is 0, as where ids are uint32; a meta.json says what they are, '
             'such as ' + EXAMPLE.format(meta['vocab_size']))
    highest = max(int(piece.max()) for piece in pieces)
    if highest >= meta['vocab_size']:
        fail(f'{path} holds the id {highest}, beyond the vocabulary of {meta["vocab_size"]}; {again}')
    return data


def read_rows(folder, split, n_tokens, meta):
    """
    The pairs of a split, (n, 3) int64: where a row starts, where its target starts, where it ends. None where the
    dataset has none.
    """
    path = folder / f'{split}.rows.npy'
    if not os.path.isfile(path):
        return None
    with explained(f'{path} is damaged', 'prepare the dataset again'):
        if sha256(path) != meta.get('rows', {}).get(path.name, sha256(path)):  # older ones have no hash
            raise ValueError('it is not the file that meta.json describes')
        rows = np.load(path, mmap_mode='r', allow_pickle=False)
        if rows.dtype != np.int64 or rows.ndim != 2 or rows.shape[1] != 3 or not len(rows):
            raise ValueError(f'it holds {rows.dtype} of shape {rows.shape}')
        if (rows[:, 0] < 0).any() or (np.diff(rows) <= 0).any() or (rows[:, 2] > n_tokens).any():
            raise ValueError(f'a row does not lie in the {n_tokens:,} tokens')
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
