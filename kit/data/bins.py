"""
Documents to ids, on all cores, and onto the disk: train.bin, val.bin, test.bin, and what describes them.

A folder data/<name> is made in data/<name>/.part: first all ids in their order, with where each document ends, then the
splits, then every file goes to its place, those of train last (kit/data/places.py). progress.json remembers how far the
files there are good, so that the same command goes on after any interruption, to the same bytes.
"""

import json
import os
import pickle
import re
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from math import lcm

import numpy as np
from tqdm import tqdm

from kit.base.errors import fail, reason
from kit.base.files import open_own
from kit.base.overrides import require
from kit.data import places, tokens

SPLITS = ('train', 'val', 'test')

N_THREADS = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
BATCH = 2**19  # characters that one thread encodes at a time
NOTE_EVERY = 10  # seconds between two notes of how far the files are good
RAW_SHARD = 2**26  # ids in one file before they are dealt to the splits
CHUNK = 2**22  # ids that are dealt at a time
RUN = 2**11  # characters of one kind in a row that may be cut apart
SIGNS = re.compile(r'(?:[^\w\s]|_)+')
SAMPLE = 2**25  # characters that a vocabulary is learned from
CODE_END = 0x110000  # the code point behind the last: END, until the alphabet is known

# what GPT-4 splits text with, in the words that Rust's regex and Oniguruma share; digits by two, for small vocabularies
PATTERN = (r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]"""
           r"""|\s+(?!\S)|\s+""")


# ---------------------------------------------------------------------------------------------------------------------
# a tokenizer: (encode, END's id, dtype, description); encode takes [(text, whether a document ends)] and returns ids


def load_encoding(name):
    """tiktoken's encoding of that name, or that of a dataset, or the end of the script with what to do without it."""
    import tiktoken
    description = {'kind': 'bpe', 'name': name}
    if name not in tiktoken.list_encoding_names():
        if not re.fullmatch(r'[\w-][\w.-]*', name) or not tokens.exists(folder := tokens.dataset_folder(name)):
            fail(f'tokenizer = {name!r}: it is {", ".join(tokens.KINDS)}, one of '
                 f'{", ".join(tiktoken.list_encoding_names())}, or the name of a dataset, whose BPE is taken over')
        description = tokens.read_meta(folder)['tokenizer']
        if description['kind'] != 'bpe':
            fail(f'tokenizer = {name!r}: this dataset is by {description["kind"]}; only a BPE can be taken over')
    try:
        encoding = tokens.tokenizer(description).encoding
    except OSError as error:
        fail(f'the files of the tokenizer {description["name"]} could not be downloaded ({reason(error)}); give a '
             'folder FLATGPT_MIRROR with them in tiktoken/, or take --tokenizer=char or the dataset python_docs')
    if tokens.END not in encoding._special_tokens:
        fail(f'tokenizer = {name!r}: it has no id for the end of a document, {tokens.END}')
    return encoding


def tokenizer(name, vocab_size, progress, read):
    """
    What encodes by that name. read() gives the documents anew, for a vocabulary that is learned from them. A BPE is put
    into progress, or taken from there.
    """
    if name == 'char':  # as code points: the alphabet is known when all is read
        return partial(encode_units, codec='utf-32-le', unit=np.uint32, end=CODE_END), CODE_END, np.uint32, None
    if name == 'byte':
        return partial(encode_units, codec='utf-8', unit=np.uint8, end=256), 256, np.uint16, {'kind': 'byte'}
    if name in tokens.KINDS and name != 'bpe':  # any other that is the same for all texts
        text = tokens.tokenizer({'kind': name})
        dtype = np.uint16 if text.size <= 2**16 else np.uint32
        return partial(encode_batch, tokenizer=text, end=text.end, dtype=dtype), text.end, dtype, {'kind': name}
    if 'tokenizer' not in progress:  # in the note, whose hash is checked: another would give other ids
        learned = name == 'bpe'
        progress['tokenizer'] = learn_bpe(read(), vocab_size) if learned else tokens.describe_bpe(load_encoding(name))
    description = progress['tokenizer']
    encoding = tokens.tokenizer(description).encoding
    dtype = np.uint16 if encoding.n_vocab <= 2**16 else np.uint32
    return partial(encode_bpe, encoding=encoding, dtype=dtype), encoding.eot_token, dtype, description


def encode_batch(batch, tokenizer, end, dtype):
    """[(text, whether a document ends)] -> the ids of all, with the id `end` behind each document."""
    ids = []
    for text, is_end in batch:
        ids += [*tokenizer.encode(text), *[end] * is_end]
    return np.array(ids, dtype)


def encode_units(batch, codec, unit, end):
    """A text is its code points, or its bytes."""
    texts = [text.encode(codec) for text, _ in batch]
    ids = np.frombuffer(b''.join(texts), unit).astype(np.uint32 if end > 2**16 else np.uint16)
    ends = np.cumsum([len(text) for text in texts]) // unit().itemsize
    return np.insert(ids, ends[[is_end for _, is_end in batch]], end)


def encode_bpe(batch, encoding, dtype):
    """By tiktoken, all texts in one call, with END between them; END inside a text is text."""
    pieces = [cut_runs(text) for text, _ in batch]
    if len(pieces) < sum(map(len, pieces)) or any(tokens.END in text for text, _ in batch):
        ids = []
        for texts, (_, is_end) in zip(pieces, batch):
            ids += [encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
            ids.append([encoding.eot_token] * is_end)
        return np.concatenate(ids).astype(dtype)
    text = ''.join([text + tokens.END if is_end else text for text, is_end in batch])
    return encoding.encode_to_numpy(text, allowed_special={tokens.END}, disallowed_special=()).astype(dtype)


def cut_runs(text):
    """
    A text in the pieces that it is encoded in: whole, but that 2 x RUN characters of one kind (letters, digits, spaces
    or signs) are cut somewhere. BPE sees a run as one word, and its time grows with the square of a word's length.
    """
    pieces, done = [], 0
    for i in range(0, len(text) - RUN + 1, RUN):
        run = text[i:i + RUN]
        if run.isalpha() or run.isspace() or run.isnumeric() or SIGNS.fullmatch(run):
            pieces += [text[done:i], run] if i > done else [run]
            done = i + RUN
    return [*pieces, text[done:]] if done < len(text) or not pieces else pieces


def learn_bpe(documents, vocab_size):
    """The description of a BPE learned from an evenly spread sample of the documents."""
    require('tokenizers', '--tokenizer=bpe')
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    kept, size, step = [], 0, 1
    for i, (text, _) in enumerate(documents):
        if i % step == 0:
            kept.append(text)
            size += len(text)
        while size > SAMPLE and len(kept) > 1:  # every second goes, and of those to come too
            kept, step = kept[::2], 2 * step
            size = sum(map(len, kept))
    print(f'learning a vocabulary of {vocab_size:,} from {size:,} characters')
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    learner.train_from_iterator((piece for text in kept for piece in cut_runs(text)), trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    byte_of = {char: byte for byte, char in enumerate(tokens.byte_level_characters())}
    vocabulary = learner.get_vocab()
    ranks = {bytes(byte_of[char] for char in token): rank for token, rank in vocabulary.items()}
    if len(ranks) + 1 < vocab_size:
        print(f'the text gives no more than {len(ranks) + 1:,} ids')
    import tiktoken
    return tokens.describe_bpe(tiktoken.Encoding('bpe', pat_str=PATTERN, mergeable_ranks=ranks,
                                                 special_tokens={tokens.END: len(ranks)}))


# ---------------------------------------------------------------------------------------------------------------------
# files


def sync(path):
    with open(path, 'r+b') as file:  # Windows syncs only what it could write
        os.fsync(file.fileno())


def append(folder, stem, ids, start, shard_size):
    """
    Write ids at the place `start` of a row of files <stem>_000000.bin, ... with shard_size ids in each. Returns the
    paths. What stood there before, after an interruption, were the same ids.
    """
    paths = []
    while len(ids):
        number, place = divmod(start, shard_size)
        piece, ids = ids[:shard_size - place], ids[shard_size - place:]
        paths.append(folder / f'{stem}_{number:06d}.bin')
        with open_own(paths[-1], 'r+b' if place else 'wb') as file:
            file.seek(place * piece.itemsize)
            file.write(piece.astype(piece.dtype.newbyteorder('<'), copy=False).data)
        start += len(piece)
    return paths


def note(part, progress, touched):
    """Remember how far the files are good, after they have reached the disk."""
    for path in touched:
        sync(path)
    touched.clear()
    places.note(part, progress)


# ---------------------------------------------------------------------------------------------------------------------
# splits


def parse_split(text):
    """'90,5,5' -> how many of a run of 100 documents go to train, val and test; of 1,000 for '99.8,0.1,0.1'."""
    try:
        shares = [Fraction(word) for word in text.split(',')]
        whole = lcm(*(share.denominator for share in shares))
    except (ValueError, ZeroDivisionError):
        shares, whole = [], 1
    if len(shares) != 3 or sum(shares) != 100 or min(shares) < 0 or not shares[0] * shares[1] or whole > 100:
        fail(f'split = {text!r}: these are the percent of train, val and test, like 90,5,5 or 98,2,0')
    return [int(share * whole) for share in shares]


def deal(first, last, counts, seed):
    """
    The splits (0, 1, 2) of the documents first to last, a function of (seed, number): of each run of sum(counts)
    documents these counts, in an order of its own; without a seed first those of val, then of test, then of train.
    """
    run = sum(counts)
    shares = np.repeat(np.uint8([1, 2, 0]), [counts[1], counts[2], counts[0]])
    runs = range(first // run, -(-last // run))
    codes = [shares if seed is None else np.random.default_rng((seed, i)).permutation(shares) for i in runs]
    return np.concatenate(codes)[first % run:][:last - first]


def plan(job, progress, ends):
    """
    (ends, codes, documents, words): where the stretches of ids end that go to one split, a function that tells the
    splits of the stretches i to j, how many documents each split gets, and how to say it. A stretch is a document or a
    pair; where there are less than a run of them, and no pairs, it is the whole of a split.
    """
    counts, n = job['counts'], len(ends)
    if n >= sum(counts):
        codes = partial(deal, counts=counts, seed=job['seed'])
        documents = sum((np.bincount(codes(i, min(n, i + CHUNK)), minlength=3) for i in range(0, n, CHUNK)),
                        np.zeros(3, int))
        order = 'drawn by the seed {seed}' if job['seed'] is not None else 'val first, then test'
        kind = 'pairs' if job['pairs'] else 'documents'
        return ends, codes, documents, (f'whole {kind}: of each {sum(counts):,} {counts[0]:,} are train, {counts[1]:,} '
                                        f'val, {counts[2]:,} test, ' + order.format(**job))
    shares = ', '.join(f'the {place} {100 * count / sum(counts):g}%'
                       for place, count in zip(('first', 'next', 'last'), counts) if count)
    if job['pairs']:
        held = [max(1, round(n * count / sum(counts))) if count else 0 for count in counts[1:]]
        documents = np.array([n - sum(held), *held])
        if documents[0] < 1:
            fail(f'{job["input"]} holds {n} pairs, too few for one in each split; give more')
        each = np.repeat(np.uint8([0, 1, 2]), documents)
        return ends, lambda i, j: each[i:j], documents, f'{shares} of the pairs'
    total = progress['tokens'] - (n == 1)  # a single document needs no end
    cuts = [total * counts[0] // sum(counts), total * (counts[0] + counts[1]) // sum(counts), total]
    documents = np.diff(np.searchsorted(ends, [0, *cuts], side='right'))
    return np.array(cuts), lambda i, j: np.arange(3)[i:j], documents, f'{shares} of the tokens'


# ---------------------------------------------------------------------------------------------------------------------
# a folder


def make(folder, job, read, total=None, unit='B', overwrite=False):
    """
    Make the dataset folder.

    job:   what the result depends on: input, stamps of its files, tokenizer, vocab_size, pairs, counts and seed of the
           split, shard_size, and what else read heeds; another job does not go on where this one broke off
    read:  read(skip, bar) -> (text, ends) of the documents, see kit/data/documents.py
    total: of the bar, in the unit that read tells it
    """
    part, job = folder / places.PART, job | {'raw_shard': RAW_SHARD}
    progress = begin(part, job, overwrite)
    try:
        if not progress['laid_out']:
            encode_all(part, job, progress, read, total, unit)
            lay_out(part, job, progress)
        places.install(part / 'done', folder)
    except SystemExit:  # the text has to be corrected, and is then another
        places.clear(part)
        raise
    except OSError as error:
        n = places.noted(part).get('characters')
        kept = f'{n:,} characters are kept, and the same command goes on from there' if n else 'nothing is kept'
        what = f'{error.filename or folder} could not be written: {reason(error)}' if error.errno else error
        fail(f'{what}; {kept}')
    places.clear(part)
    report(folder)
    if progress['marks']:
        has_ends = job['pairs'] or job['separator']
        remedy = '' if has_ends else f"; --separator='{tokens.END}' makes it the end of a document"
        print(f'{tokens.END} stands {progress["marks"]:,} times in the text, as plain text{remedy}')
    n_files = len(job['files']) if isinstance(job['files'], list) else 1  # of standard input it is the hash
    if job['separator'] and progress['documents'] <= n_files:
        print(f'{job["separator"]!r} divides nothing in the text: it has {progress["documents"]:,} documents and '
              f'{n_files:,} files')


def spool(folder):
    """Standard input as a file, so that it can be read twice."""
    path = folder / places.PART / 'input.txt'
    try:
        with open_own(path, 'wb') as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    except OSError as error:
        fail(f'standard input could not be written to {path}: {reason(error)}')
    return path


def begin(part, job, overwrite):
    """What is known of the work so far; a half-made folder of another job is named."""
    fresh = {'job': job, 'records': 0, 'tokens': 0, 'documents': 0, 'characters': 0, 'alphabet': [], 'encoded': False,
             'marks': 0, 'dealt': 0, 'sizes': [0, 0, 0], 'laid_out': False}
    progress = places.noted(part) or fresh
    if progress is fresh and (part / 'progress.json').exists():
        print(f'{part}/progress.json is damaged: what was half-made there begins anew')
    if progress['job'] != job:
        other = ', '.join(key for key in job if progress['job'].get(key) != job[key])
        if not overwrite:
            fail(f'{part} is half-made with another {other}; the command that began it goes on, '
                 '--overwrite begins anew')
        progress = fresh
    if progress is fresh:
        places.clear(part, 'input.txt')
    else:
        print(f'going on after {progress["characters"]:,} characters')
    return progress


def encode_all(part, job, progress, read, total, unit):
    """All ids in their order into part/ids_*.bin, where each document ends into part/ends_*.bin, as far as missing."""
    if progress['encoded']:
        return
    bar = tqdm(total=total, unit=unit, unit_scale=True, desc='reading', leave=False, disable=None)
    quiet = tqdm(disable=True)
    encode, end, _, _ = tokenizer(job['tokenizer'], job['vocab_size'], progress, lambda: read(0, quiet))
    seen = np.zeros(CODE_END, bool) if job['tokenizer'] == 'char' else None
    if seen is not None:
        seen[progress['alphabet']] = True
    touched, noted, waiting = set(), time.monotonic(), deque()

    def store(records, characters, marks, future):
        ids = future.result()
        is_end = ids == end
        ends = np.flatnonzero(is_end) + progress['tokens'] + 1
        touched.update(append(part, 'ids', ids, progress['tokens'], RAW_SHARD))
        touched.update(append(part, 'ends', ends, progress['documents'], 2**60))
        if seen is not None:
            seen[ids[~is_end]] = True
        for key, more in dict(records=records, characters=characters, marks=marks, tokens=len(ids),
                              documents=len(ends)).items():
            progress[key] += more

    def remember():
        if seen is not None:
            progress['alphabet'] = np.flatnonzero(seen).tolist()
        note(part, progress, touched)

    with ThreadPoolExecutor(N_THREADS) as pool, bar:  # tiktoken works without the interpreter's lock
        try:
            for batch, characters in batches(read(progress['records'], bar)):
                marks = sum(text.count(tokens.END) for text, _ in batch)
                waiting.append((len(batch), characters, marks, pool.submit(encode, batch)))
                if len(waiting) > 2 * N_THREADS:
                    store(*waiting.popleft())
                if touched and time.monotonic() > noted + NOTE_EVERY:
                    remember()
                    noted = time.monotonic()
            while waiting:
                store(*waiting.popleft())
            progress['encoded'] = True
        finally:
            pool.shutdown(cancel_futures=True)
            remember()


def batches(documents):
    """([(text, ends), ...], characters) with enough text for a thread."""
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document[0])
        if characters >= BATCH or len(batch) >= BATCH // 16:
            yield batch, characters
            batch, characters = [], 0
    if batch:
        yield batch, characters


def lay_out(part, job, progress):
    """From the ids in their order to the files of the splits, and what describes them, in part/done."""
    if progress['characters'] < 100:
        fail(f'--input={job["input"]} holds {progress["characters"]} characters, too few to train on; give at least '
             'some pages of text')
    ends = np.memmap(part / 'ends_000000.bin', '<i8', 'r', shape=progress['documents'])
    middles, ends = (ends[0::2], np.ascontiguousarray(ends[1::2])) if job['pairs'] else (None, ends)
    stretches, codes, documents, words = plan(job, progress, ends)
    _, _, raw_dtype, description = tokenizer(job['tokenizer'], job['vocab_size'], progress, None)
    dtype, table = raw_dtype, None
    if job['tokenizer'] == 'char':  # now the alphabet is known
        chars = [chr(code) for code in progress['alphabet']] + [tokens.END] * (job['pairs'] or len(ends) > 1)
        description, dtype = {'kind': 'char', 'chars': chars}, np.uint16 if len(chars) <= 2**16 else np.uint32
        table = np.full(CODE_END + 1, len(chars) - 1, dtype)
        table[progress['alphabet']] = np.arange(len(progress['alphabet']))
    done, touched = part / 'done', set()
    done.mkdir(exist_ok=True)
    for split in SPLITS:  # named for good, and then interrupted
        if (done / f'{split}.bin').exists():
            (done / f'{split}.bin').replace(done / f'{split}_000000.bin')
    n_raw = -(-progress['tokens'] // RAW_SHARD)
    for number in range(progress['dealt'], n_raw):
        path, start = part / f'ids_{number:06d}.bin', number * RAW_SHARD
        stop, sizes = min(start + RAW_SHARD, progress['tokens']), list(progress['sizes'])
        for first in range(start, stop, CHUNK):
            last = min(first + CHUNK, stop)
            which = splits_of(first, last, stretches, codes)
            size = np.dtype(raw_dtype).itemsize
            ids = np.fromfile(path, raw_dtype, last - first, offset=(first - start) * size)[:len(which)]
            for i, split in enumerate(SPLITS):
                mine = ids[which == i] if table is None else table[ids[which == i]]
                touched.update(append(done, split, mine, sizes[i], job['shard_size']))
                sizes[i] += len(mine)
        if number + 1 < n_raw:  # what is dealt can go, so that the disk never holds all twice
            progress.update(sizes=sizes, dealt=number + 1)
            note(part, progress, touched)
            path.unlink()
    if not sizes[0] or not sizes[1]:
        fail(f'--input={job["input"]} holds {sum(sizes):,} tokens, too few for train and val; give more text')
    for i, split in enumerate(SPLITS):
        if len(shards := sorted(done.glob(f'{split}_*.bin'))) == 1:
            shards[0].replace(done / f'{split}.bin')
        if job['pairs'] and sizes[i]:
            with open_own(done / f'{split}.rows.npy', 'wb') as file:
                np.save(file, rows_of(middles, ends, codes(0, len(ends)) == i))
    write_meta(done, description, dtype, job['input'], words, pairs=job['pairs'],
               documents=dict(zip(SPLITS, documents.tolist())) if len(ends) > 1 else None, separator=job['separator'])
    progress['laid_out'] = True
    note(part, progress, set(done.iterdir()))


def splits_of(first, last, ends, codes):
    """The split of each of the ids first to last, of which those behind the last stretch are in none."""
    i, j = np.searchsorted(ends, first, 'right'), min(np.searchsorted(ends, last) + 1, len(ends))
    return np.repeat(codes(i, j), np.diff(np.minimum(ends[i:j], last), prepend=first))


def rows_of(middles, ends, mine):
    """(n, 3) int64: where the pairs of a split start, where their targets do, where they end, in its ids."""
    starts = np.concatenate([[0], ends[:-1]])
    lengths, prompts = (ends - starts)[mine], (middles - starts)[mine]
    stops = np.cumsum(lengths)
    return np.stack([stops - lengths, stops - lengths + prompts, stops], axis=1).astype('<i8')


def write_dataset(folder, ids, description, source, split):
    """Make a dataset folder of {split: ids} in memory, as whole as make does."""
    part, done = folder / places.PART, folder / places.PART / 'done'
    dtype = np.uint16 if tokens.tokenizer(description).size <= 2**16 else np.uint32
    try:
        places.clear(part)
        done.mkdir()
        for name, values in ids.items():
            append(done, name, np.asarray(values).astype(dtype), 0, 2**60)
            (done / f'{name}_000000.bin').replace(done / f'{name}.bin')
        write_meta(done, description, dtype, source, split)
        for path in done.iterdir():
            sync(path)
        places.install(done, folder)
    except OSError as error:
        fail(f'{error.filename or folder} could not be written: {reason(error)}; nothing of it is kept')
    places.clear(part)
    report(folder)


def write_meta(folder, description, dtype, source, split, pairs=False, documents=None, separator=''):
    """meta.json for the .bin files in a folder, and for characters the meta.pkl that nanoGPT's scripts read."""
    dtype, text = np.dtype(dtype), tokens.tokenizer(description)
    files = {path.stem: {'tokens': path.stat().st_size // dtype.itemsize, 'sha256': tokens.sha256(path)}
             for split in SPLITS for path in tokens.files_of(folder, split)}
    meta = {'format': 1, 'dtype': dtype.name, 'vocab_size': text.size, 'tokenizer': description,
            'end_of_text': text.end, 'pad': None, 'mask': None,
            'files': files, 'source': source, 'split': split}
    meta |= {'pairs': True, 'rows': {path.name: tokens.sha256(path) for path in folder.glob('*.npy')}} if pairs else {}
    meta |= {'documents': documents} if documents else {}
    meta |= {'separator': separator} if separator and documents else {}
    (folder / 'meta.json').write_text(json.dumps(meta, indent=1), encoding='utf-8')
    if description['kind'] == 'char':
        with open(folder / 'meta.pkl', 'wb') as file:
            pickle.dump(places.for_nanogpt(description['chars']), file)


def report(folder):
    meta = tokens.read_meta(folder)
    for split in SPLITS:
        sizes = [entry['tokens'] for stem, entry in meta['files'].items() if stem.split('_')[0] == split]
        if sizes:
            print(f'{split} has {sum(sizes):,} tokens' + (f' in {len(sizes)} files' if len(sizes) > 1 else ''))
    documents = f'{sum(meta["documents"].values()):,} documents, ' if 'documents' in meta else ''
    print(f'wrote {folder} ({meta["source"]}, {documents}vocabulary of {meta["vocab_size"]:,})')
