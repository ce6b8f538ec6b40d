"""
Text out of anything, document by document, in bounded memory: files of text, rows of tables, streams of Hugging Face.

read() yields (text, ends): a document, or a piece of one, and whether the document ends with it. A pair is two
documents, its prompt and its response. What cannot be read ends the script with one line that names the place.
"""

import codecs
import csv
import glob
import gzip
import io
import itertools
import json
import os
from pathlib import Path

from kit.base.errors import fail
from kit.base.overrides import require

TEXTS = ('.txt', '.md', '.py')  # a document a file
ROWS = ('.jsonl', '.jsonl.gz', '.jsonl.zst', '.csv', '.parquet')  # a document a row
PAIRS = ('.tsv',)  # a pair a line: prompt, tab, response
PAIR_KEYS = ('prompt', 'response')

BLOCK = 2**20  # bytes of a text file that are read at once
PATIENCE = 16  # blocks that are searched for a place to cut


def find(source):
    """
    The files that --input names, each once, in its order and in that of their names, and hf:NAMEs as they are. What is
    hidden in a folder stays so.
    """
    found = []
    for word in [source] if os.path.exists(source) else map(str.strip, source.split(',')):
        path = Path(word)
        if not word:
            fail(f'--input={source:.80}: there is nothing before, between or behind a comma')
        if word.startswith('hf:'):
            found.append(word)
        elif path.is_dir():
            inside = sorted(p for p in path.rglob('*') if suffix(p) and p.is_file()
                            and not any(part.startswith('.') for part in p.relative_to(path).parts))
            found += inside or fail(f'--input={word}: there is no file in this folder that ends in '
                                    f'{", ".join(TEXTS + ROWS + PAIRS)}')
        elif path.exists():
            found.append(path)
        else:
            matches = sorted(p for p in map(Path, glob.glob(word, recursive=True)) if p.is_file())
            found += matches or fail(f'--input={word}: there is no such file')
    found = list({name if isinstance(name, str) else name.resolve(): name for name in found}.values())
    for name in found:  # before any work begins
        for ending, package in ('.zst', 'zstandard'), ('.parquet', 'pyarrow'):
            if str(name).lower().endswith(ending):
                require(package, f'--input={name}')
        if isinstance(name, str):
            require('datasets', f'--input={name}')
    return found


def suffix(path):
    """.jsonl.gz of x.jsonl.gz; '' where it is none that is known here."""
    return next((s for s in TEXTS + ROWS + PAIRS if str(path).lower().endswith(s)), '')


def are_pairs(sources):
    """Whether the sources are pairs by their names. Pairs and texts in one dataset are a mistake."""
    pairs = [s for s in sources if suffix(s) in PAIRS]
    others = [s for s in sources if suffix(s) not in PAIRS]
    if pairs and any(suffix(s) not in ROWS for s in others):
        other = next(s for s in others if suffix(s) not in ROWS)
        fail(f'{pairs[0]} holds pairs and {other} text; make a dataset of each')
    return bool(pairs)


def stamps(sources):
    """What tells whether the files are still the same: [name, bytes, time of the last change] of each."""
    found = []
    for source in sources:
        try:
            stat = None if isinstance(source, str) else source.stat()
        except OSError as error:
            fail(f'--input={source} cannot be read: {error.strerror}')
        found.append([str(source), stat.st_size, stat.st_mtime_ns] if stat else [source])
    return found


def read(sources, text_key='text', pairs=False, errors='strict', skip=0, bar=None):
    """
    Yield (text, ends) from all sources, in their order, without the first `skip` of them. bar, a tqdm, is told of the
    bytes that are read, or of the rows where a source is a stream.
    """
    keys = PAIR_KEYS if pairs else (text_key,)
    if len(sources) == 1 and isinstance(sources[0], str):  # the library can skip without downloading all
        rows, skip = divmod(skip, len(keys))
        found = pick(stream(sources[0], rows, bar), keys, f'{sources[0]}, row')
    else:
        found = itertools.chain.from_iterable(read_one(source, keys, errors, bar) for source in sources)
    return itertools.islice(found, skip, None)


def read_one(source, keys, errors, bar):
    if isinstance(source, str):
        yield from pick(stream(source, 0, bar), keys, f'{source}, row')
        return
    kind = suffix(source)
    if keys == PAIR_KEYS and kind not in ROWS + PAIRS:
        fail(f'{source} holds no pairs; they come in a .tsv (prompt, tab, response) or, with --pairs, in a .jsonl with '
             'the keys prompt and response')
    try:
        if kind in PAIRS:
            yield from pick(tsv_rows(source, errors, bar), keys, f'{source}, line')
        elif kind == '.parquet':
            yield from pick(parquet_rows(source, keys, bar), keys, f'{source}, row')
        elif kind == '.csv':
            yield from pick(csv_rows(source, errors, bar), keys, f'{source}, line')
        elif kind in ROWS:
            yield from pick(json_rows(source, errors, bar), keys, f'{source}, line')
        else:
            yield from pieces(source, errors, bar)
    except Exception as error:  # the disk, or a file that is not what its name says, in the words of six libraries
        fail(f'{source} cannot be read: {getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"}')


# ---------------------------------------------------------------------------------------------------------------------
# text


def pieces(path, errors, bar):
    """
    A text file in pieces of about BLOCK bytes. A piece ends between a letter and white space: no pattern that splits
    text for BPE has a token across that, so the pieces have the tokens of the whole.
    """
    decoder, rest, offset = codecs.getincrementaldecoder('utf-8')(errors), '', 0
    with open(path, 'rb') as file:
        while block := file.read(BLOCK):
            searched = len(rest)
            rest += decode(decoder, block, path, offset)
            if offset == 0:
                rest = rest.removeprefix('\ufeff')
            offset += len(block)
            bar.update(len(block))
            cut = next((i for i in range(len(rest) - 1, max(searched, 1) - 1, -1)
                        if rest[i] in ' \n\r\t' and rest[i - 1].isalpha()), 0)
            if not cut and len(rest) > PATIENCE * BLOCK:  # no letters, or no space: one token may come out as two
                cut = len(rest) - rest.endswith('\r')
            if cut:
                yield rest[:cut].replace('\r\n', '\n'), False
                rest = rest[cut:]
        rest += decode(decoder, b'', path, offset, final=True)
        yield rest.replace('\r\n', '\n'), True


def decode(decoder, block, path, offset, final=False):
    pending = len(decoder.getstate()[0])  # bytes of a character that began in the block before
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        fail_undecodable(path, offset - pending + error.start)


def fail_undecodable(path, offset):
    fail(f'{path} is not UTF-8: the byte at offset {offset} cannot be read; convert the file to UTF-8, or '
         '--errors=replace puts U+FFFD in its place')


def lines(path, errors, bar):
    """(number, line) of a file, packed or not; the line ends in a newline, or not at all."""
    with open(path, 'rb') as raw:
        offset, position = 0, 0
        for number, line in enumerate(unpacked(path, raw), 1):
            try:
                text = line.decode('utf-8', errors)
            except UnicodeDecodeError as error:
                fail_undecodable(path, offset + error.start)
            if number == 1:
                text = text.removeprefix('\ufeff')
            offset += len(line)
            if number % 1000 == 0:
                bar.update(raw.tell() - position)
                position = raw.tell()
            yield number, text[:-2] + '\n' if text.endswith('\r\n') else text


def unpacked(path, raw):
    if str(path).lower().endswith('.gz'):
        return gzip.open(raw)
    if str(path).lower().endswith('.zst'):
        import zstandard
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True), BLOCK)
    return raw


# ---------------------------------------------------------------------------------------------------------------------
# rows: (number, {key: value})


def pick(rows, keys, place):
    """The texts of the rows under these keys, each a document. place: what stands before a number in a complaint."""
    for number, row in rows:
        for key in keys:
            if key not in row:
                fail_missing(f'{place} {number}', row, keys)
            if not isinstance(row[key], str):
                fail(f'{place} {number}: {key} is {row[key]!r:.40}, and should be text')
        if keys == PAIR_KEYS and not row['response']:
            fail(f'{place} {number}: the response is empty, and there would be nothing to learn; leave this pair out')
        for key in keys:
            yield row[key], True


def fail_missing(where, row, keys):
    if keys == PAIR_KEYS:
        remedy = 'a pair has the keys prompt and response'
    elif row.keys() >= set(PAIR_KEYS):
        remedy = '--pairs makes pairs of prompt and response'
    else:
        remedy = f'--text_key={next(iter(row), "KEY")} takes another'
    key = next(key for key in keys if key not in row)
    fail(f'{where}: there is no {key}, only {", ".join(map(str, row)) or "nothing"}; {remedy}')


def json_rows(path, errors, bar):
    for number, line in lines(path, errors, bar):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            fail(f'{path}, line {number}: this is no JSON ({error.msg}, column {error.colno})')
        if not isinstance(row, dict):
            fail(f'{path}, line {number}: this is no object with keys, but {line.strip():.40}')
        if '\\u' in line:  # half a character that UTF-16 writes as two is no text
            row = {key: whole_characters(value, f'{path}, line {number}', errors) for key, value in row.items()}
        yield number, row


def whole_characters(value, where, errors):
    if not isinstance(value, str) or value.isascii():
        return value
    try:
        return value.encode('utf-16', 'surrogatepass').decode('utf-16', errors)
    except UnicodeDecodeError:
        fail(f'{where}: a \\u escape stands for half a character; --errors=replace puts U+FFFD in its place')


def csv_rows(path, errors, bar):
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(line for _, line in lines(path, errors, bar))
    header = next(reader, [])
    for row in reader:
        if row and len(row) != len(header):
            fail(f'{path}, line {reader.line_num}: {len(row)} columns, and the header has {len(header)}')
        if row:
            yield reader.line_num, dict(zip(header, row))


def tsv_rows(path, errors, bar):
    for number, line in lines(path, errors, bar):
        if line.isspace() and '\t' not in line:
            continue
        columns = line.removesuffix('\n').split('\t')
        if len(columns) != 2:
            fail(f'{path}, line {number}: a pair has two columns, prompt, tab, response; here are {len(columns)}')
        yield number, dict(zip(PAIR_KEYS, columns))


def parquet_rows(path, keys, bar):
    import pyarrow.parquet
    table, before = pyarrow.parquet.ParquetFile(path), 0
    names = table.schema_arrow.names
    if not set(keys) <= set(names):
        fail_missing(path, dict.fromkeys(names), keys)
    for batch in table.iter_batches(batch_size=1024, columns=list(keys), use_threads=False):
        yield from enumerate(batch.to_pylist(), before + 1)
        before += batch.num_rows
        bar.update(path.stat().st_size * batch.num_rows // table.metadata.num_rows)


def stream(source, skip, bar):
    """The rows of hf:OWNER/NAME[:CONFIG[:SPLIT]]. Raises ConnectionError where the network breaks off."""
    from datasets import load_dataset
    name, config, split = (source.removeprefix('hf:').split(':') + ['', ''])[:3]
    try:
        rows = load_dataset(*filter(None, (name, config)), split=split or 'train', streaming=True)
        for number, row in enumerate(rows.skip(skip) if skip else rows, skip + 1):
            bar.update(1)
            yield number, row
    except Exception as error:  # in any of the words of two libraries
        raise ConnectionError(f'{name} could not be reached ({type(error).__name__}: {str(error)[:80]})') from error
