"""
Text out of anything, document by document, in bounded memory: files of text, rows of tables, streams of Hugging Face.

read() yields (text, ends): a document, or a piece of one, and whether the document ends with it. A pair is two
documents, its prompt and its response. What cannot be read ends the script with one line that names the place.
"""

import codecs
import csv
import functools
import glob
import gzip
import io
import itertools
import json
import os
import re
from pathlib import Path

from kit.base import files
from kit.base.errors import explained, fail, reason
from kit.base.overrides import require
from kit.data.tokens import END

TEXTS = ('.txt', '.md', '.py')  # a document a file
ROWS = ('.jsonl', '.ndjson', '.json', '.csv', '.parquet')  # a document a row
PAIRS = ('.tsv',)  # a pair a line: prompt, tab, response
PAIR_KEYS = ('prompt', 'response')
PACKED = ('.gz', '.zst')  # behind any of these

BLOCK = 2**20  # bytes of a text file that are read at once
PATIENCE = 16  # blocks that are searched for a place to cut
LONGEST = 2**27  # characters of a row: what is longer is a bracket or a quote that does not close


def find(source):
    """
    The files that --input names, each once, in its order and in that of their names, and hf:NAMEs as they are. What is
    hidden in a folder stays so; what else is left out, or read for no better reason than its name, is printed.
    """
    found = []
    for word in map(str.strip, files.paths(source)):
        if word.startswith('hf:'):
            found.append(word)
        elif os.path.isdir(word):
            found += find_inside(word)
        elif os.path.lexists(word):
            found.append(Path(word))
        else:
            matches = sorted(path for path in map(Path, glob.glob(word, recursive=True)) if not path.is_dir())
            if not matches:
                with explained(f'--input={word:.200} cannot be read'):
                    os.stat(word)
            found += matches
    for name in found:  # before any work begins
        if isinstance(name, str):
            require('datasets', f'--input={name}')
        elif not os.path.isfile(name):
            with explained(f'--input={name} cannot be read'):  # a link to nowhere
                os.stat(name)
            fail(f'--input={name} is no file; cat {name} | python prepare.py --input=- reads it')
        for ending, package in ('.zst', 'zstandard'), ('.parquet', 'pyarrow'):
            if str(name).lower().endswith(ending):
                require(package, f'--input={name}')
    found = list({name if isinstance(name, str) else os.path.realpath(name): name for name in found}.values())
    if unknown := [str(name) for name in found if not isinstance(name, str) and not suffix(name)]:
        print(f'{in_short(unknown)} {"is" if len(unknown) == 1 else "are"} read as plain text')
    return found


def find_inside(folder):
    """The files of the known kinds in a folder and those below it; what else is in there is printed."""
    found, others, links = [], set(), []
    kinds = [kind for kind in TEXTS + ROWS + PAIRS if kind != '.json']  # it may hold anything: it has to be named

    def refuse(error):
        fail(f'--input={folder}: {error.filename} cannot be read ({reason(error)})')
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith('.')]
        links += [path for name in folders if os.path.islink(path := os.path.join(place, name))]
        for path in (Path(place, name) for name in names if not name.startswith('.')):
            if suffix(path) in kinds:
                found.append(path)
            else:
                others.add(suffix(path) or path.suffix or path.name)
    if links:
        print(f'{folder}: links to folders are not followed: {in_short(sorted(links))}')
    if not found:
        fail(f'--input={folder}: there is no file in this folder that ends in {", ".join(kinds)}; what is named '
             'itself is read')
    if others:
        print(f'{folder}: files that end in {in_short(sorted(others))} are left out; what is named itself is read')
    return sorted(found)


def in_short(names):
    """'a, b, c and 7 more'."""
    return ', '.join(names[:3]) + (f' and {len(names) - 3:,} more' if len(names) > 3 else '')


def suffix(path):
    """.jsonl of x.jsonl and of x.jsonl.gz; '' where it is none that is known here."""
    name = str(path).lower().removesuffix('.gz').removesuffix('.zst')
    return next((s for s in TEXTS + ROWS + PAIRS if name.endswith(s)), '')


def is_packed(path):
    return str(path).lower().endswith(PACKED)


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
        with explained(f'--input={source} cannot be read'):
            stat = None if isinstance(source, str) else source.stat()
        found.append([str(source), stat.st_size, stat.st_mtime_ns] if stat else [source])
    return found


def read(sources, text_key='text', pairs=False, errors='strict', skip=0, bar=None, separator=''):
    """
    Yield (text, ends) from all sources, in their order, without the first `skip` of them. A document also ends where
    the separator stands, if there is one. bar, a tqdm, is told of the bytes that are read, or of the rows where a
    source is a stream.
    """
    keys = PAIR_KEYS if pairs else (text_key,)
    is_stream = len(sources) == 1 and isinstance(sources[0], str)
    if is_stream and not separator:  # the library can skip without downloading all
        rows, skip = divmod(skip, len(keys))
        found = pick(stream(sources[0], rows, bar), keys, f'{sources[0]}, row')
    else:
        found = itertools.chain.from_iterable(read_one(source, keys, errors, bar) for source in sources)
    if separator:
        found = split_at(separator, found)
    return itertools.islice(found, skip, None)


def read_one(source, keys, errors, bar):
    if isinstance(source, str):
        yield from pick(stream(source, 0, bar), keys, f'{source}, row')
        return
    kind = suffix(source)
    if keys == PAIR_KEYS and kind not in ROWS + PAIRS:
        fail(f'{source} holds no pairs; they come in a .tsv (prompt, tab, response) or, with --pairs, in a .jsonl with '
             'the keys prompt and response')
    can_be_cut = is_packed(source) or kind == '.parquet'
    with explained(f'{source} cannot be read', 'where it is cut off, copy it again' if can_be_cut else ''):
        if kind in PAIRS:
            yield from pick(tsv_rows(source, errors, bar), keys, f'{source}, line')
        elif kind == '.parquet':
            yield from pick(parquet_rows(source, keys, bar), keys, f'{source}, row')
        elif kind == '.csv':
            yield from pick(csv_rows(source, keys, errors, bar), keys, f'{source}, line')
        elif kind == '.json':
            yield from pick(json_rows(source, keys, errors, bar), keys, f'{source}, row')
        elif kind in ROWS:
            yield from pick(json_lines(source, keys, errors, bar), keys, f'{source}, line')
        else:
            yield from pieces(source, errors, bar)


def split_at(separator, found):
    """
    The documents in (text, ends), each ended also where the separator stands, across pieces too; it goes, and so does a
    document of white space alone. A piece that it may have begun in waits for the next.
    """
    waiting, begun = '', False  # a piece, and whether pieces of its document have gone before
    for text, ends in found:
        *whole, last = (waiting + text).split(separator)
        waiting = ''
        for piece, is_end in [*((piece, True) for piece in whole), (last, ends)]:
            if not is_end and (begins_in(piece, separator) or not begun and not piece.strip()):
                waiting = piece
            elif begun or piece.strip():
                yield piece, is_end
                begun = not is_end


def begins_in(text, mark):
    """How many characters at the end of a text may be the first of this mark."""
    return next((n for n in range(len(mark) - 1, 0, -1) if text.endswith(mark[:n])), 0)


# ---------------------------------------------------------------------------------------------------------------------
# text


def pieces(path, errors, bar):
    """
    A text file in pieces of about BLOCK bytes. A piece ends between a letter and white space: no pattern that splits
    text for BPE has a token across that, nor does END stand there, so the pieces have the tokens of the whole.
    """
    rest = ''
    for text in texts(path, errors, bar):
        searched = len(rest)
        rest += text
        cut = next((i for i in range(len(rest) - 1, max(searched, 1) - 1, -1)
                    if rest[i] in ' \n\r\t' and rest[i - 1].isalpha()), 0)
        if not cut and len(rest) > PATIENCE * BLOCK:  # no letters, or no space: one token may come out as two
            cut = len(rest) - max(begins_in(rest, '\r\n'), begins_in(rest, END))
        if cut:
            yield rest[:cut].replace('\r\n', '\n'), False
            rest = rest[cut:]
    yield rest.replace('\r\n', '\n'), True


def texts(path, errors, bar):
    """The text of a file, packed or not, in blocks of BLOCK bytes."""
    decoder, offset, position = codecs.getincrementaldecoder('utf-8')(errors), 0, 0
    with open(path, 'rb') as raw:
        file = unpacked(path, raw)
        while block := file.read(BLOCK):
            if 0 in block:
                fail_no_text(path, offset + block.index(0))
            text = decode(decoder, block, path, offset)
            yield text if offset else text.removeprefix('\ufeff')
            offset += len(block)
            bar.update(raw.tell() - position)
            position = raw.tell()
        yield decode(decoder, b'', path, offset, final=True)


def decode(decoder, block, path, offset, final=False):
    pending = len(decoder.getstate()[0])  # bytes of a character that began in the block before
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        fail_undecodable(path, offset - pending + error.start)


def fail_undecodable(path, offset):
    fail(f'{path} is not UTF-8: the byte at offset {offset} cannot be read; convert the file to UTF-8, or '
         '--errors=replace puts U+FFFD in its place')


def fail_no_text(path, offset):
    fail(f'{path} is no text: there is a NUL at offset {offset}; where it is UTF-16, convert it to UTF-8')


def lines(path, errors, bar):
    """(number, line) of a file, packed or not; the line ends in a newline, or not at all."""
    with open(path, 'rb') as raw:
        offset, position = 0, 0
        for number, line in enumerate(unpacked(path, raw), 1):
            try:
                text = line.decode('utf-8', errors)
            except UnicodeDecodeError as error:
                fail_undecodable(path, offset + error.start)
            if 0 in line:
                fail_no_text(path, offset + line.index(0))
            if number == 1:
                text = text.removeprefix('\ufeff')
            offset += len(line)
            if number % 1000 == 0:
                bar.update(raw.tell() - position)
                position = raw.tell()
            yield number, text[:-2] + '\n' if text.endswith('\r\n') else text


def unpacked(path, raw):
    """The file that is in an open one, or that one where nothing is packed. Raises what says that it is cut off."""
    file, size = raw, os.fstat(raw.fileno()).st_size
    if is_packed(path) and not size:
        raise EOFError('it is empty')
    if str(path).lower().endswith('.gz'):
        file = gzip.open(raw)
    elif is_packed(path):
        import zstandard
        check_frames(raw, size)
        frames = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(raw, read_across_frames=True)
        file = io.BufferedReader(frames, BLOCK)
    if file.peek(4).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        fail(f'{path} is UTF-16 or UTF-32; convert it to UTF-8: iconv -f UTF-16 -t UTF-8 FILE > OTHER')
    return file


def check_frames(file, size):
    """
    Whether a .zst ends where a frame does, by the sizes that stand before its blocks: zstandard takes one that is cut
    off for whole. Raises EOFError, and what zstandard raises where there is no frame.
    """
    import zstandard
    place, frame = 0, None
    while place < size:
        file.seek(place)
        head = file.read(18)  # of a block, or of a frame, which is the longer
        if frame:
            word = int.from_bytes(head[:3], 'little')
            place += 3 + (1 if word >> 1 & 3 == 1 else word >> 3)  # 1: a single byte, so many times
            if word & 1:  # its last block
                place, frame = place + 4 * frame.has_checksum, None
        elif head[1:4] == b'\x2a\x4d\x18' and head[0] >> 4 == 5:  # no text: to be skipped
            place += 8 + int.from_bytes(head[4:8], 'little')
        else:
            frame = zstandard.get_frame_parameters(head)
            place += zstandard.frame_header_size(head)
    if frame or place > size:
        raise EOFError('it ends within a frame')
    file.seek(0)


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
    inside = [key for key, value in row.items() if isinstance(value, list)]
    if keys == PAIR_KEYS:
        remedy = 'a pair has the keys prompt and response'
    elif row.keys() >= set(PAIR_KEYS):
        remedy = '--pairs makes pairs of prompt and response'
    else:
        rows = f', and rows inside of {inside[0]} have to stand by themselves, as a .jsonl' if inside else ''
        remedy = f'--text_key={next(iter(row), "KEY")} takes another{rows}'
    key = next(key for key in keys if key not in row)
    fail(f'{where}: there is no {key}, only {", ".join(map(str, row)) or "nothing"}; {remedy}')


def unique(pairs):
    """An object of JSON. Raises ValueError where a key stands twice: one of the two would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError('a key stands twice')
    return row


JSON = json.JSONDecoder(object_pairs_hook=unique)


def json_lines(path, keys, errors, bar):
    for number, line in lines(path, errors, bar):
        if line.isspace():
            continue
        where = f'{path}, line {number}'
        try:
            row = JSON.decode(line)
        except (ValueError, RecursionError) as error:
            fail_json(where, error)
        yield number, json_row(row, keys, '\\u' in line, where, errors)


BETWEEN = re.compile(r'[\s,]*')  # the rows of an array


def json_rows(path, keys, errors, bar):
    """
    The rows of a .json: those of the array in it, else what stands at its top, one object or many. So much of it is
    held as the next row needs: one that does not end yet is tried again when twice as much is there.
    """
    blocks = itertools.chain(itertools.dropwhile(str.isspace, filter(None, texts(path, errors, bar))), ['\n'])
    text, number = next(blocks).lstrip(), 1
    in_array = begin = text.startswith('[')
    while True:
        begin = BETWEEN.match(text, begin).end()
        if in_array and text.startswith(']', begin):
            in_array, begin = False, begin + 1
            continue
        where = f'{path}, row {number}'
        try:
            row, end = JSON.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            if not goes_on(text, error):
                fail_json(where, error, begin)
            end = len(text)
        if end < len(text):
            yield number, json_row(row, keys, text.find('\\u', begin, end) >= 0, where, errors)
            number, begin = number + 1, end
        elif end - begin > LONGEST:
            fail(f'{where} has more than {LONGEST:,} characters; give the rows as an array, or as a .jsonl')
        elif more := ''.join(itertools.islice(blocks, 1 + (end - begin) // BLOCK)):
            text, begin = text[begin:] + more, 0
        elif begin < end or in_array:
            fail(f'{where} does not end: the file is cut off, or no JSON')
        else:
            return


def goes_on(text, error):
    """Whether that may be no JSON for no other reason than that it is not all there."""
    return isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith('Unterminated string') or not text[error.pos + len('-Infinity'):].strip())


def fail_json(where, error, begin=0):
    is_syntax = isinstance(error, json.JSONDecodeError)
    fail(f'{where}: this is no JSON '
         f'({f"{error.msg}, column {error.pos - begin + 1}" if is_syntax else reason(error)})')


def json_row(row, keys, has_escapes, where, errors):
    """What JSON holds for a row as a dict; a text alone is the one under the key that is looked for."""
    if isinstance(row, str) and len(keys) == 1:
        row = {keys[0]: row}
    if not isinstance(row, dict):
        fail(f'{where}: this is no object with keys, but {json.dumps(row):.40}')
    if has_escapes:  # half a character that UTF-16 writes as two is no text
        row = {key: whole_characters(value, where, errors) for key, value in row.items()}
    return row


def whole_characters(value, where, errors):
    if not isinstance(value, str) or value.isascii():
        return value
    try:
        return value.encode('utf-16', 'surrogatepass').decode('utf-16', errors)
    except UnicodeDecodeError:
        fail(f'{where}: a \\u escape stands for half a character; --errors=replace puts U+FFFD in its place')


def csv_rows(path, keys, errors, bar):
    csv.field_size_limit(LONGEST)
    text = (line for _, line in lines(path, errors, bar))
    first, begin = next(text, ''), 1  # begin: the line of a row's first character
    headers = {mark: next(csv.reader([first], delimiter=mark), []) for mark in ',;\t|'}
    delimiter = next((mark for mark in headers if set(keys) <= set(headers[mark])),
                     next((mark for mark in headers if len(headers[mark]) > 1), ','))
    if delimiter != ',':
        tell_delimiter(path, delimiter)
    reader = csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if twice := [key for key in keys if header.count(key) > 1]:
            fail(f'{path}: two columns have the name {twice[0]}')
        begin = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                fail(f'{path}, line {reader.line_num}: {len(row)} columns, and the header has {len(header)} '
                     f'(delimiter {delimiter!r})')
            if row:
                yield reader.line_num, dict(zip(header, row))
            begin = reader.line_num + 1
    except csv.Error as error:
        fail(f'{path}, line {begin}: the row that begins here is no CSV ({error}); does a quote not close?')


@functools.cache  # once: a text that a vocabulary is learned from is read twice
def tell_delimiter(path, delimiter):
    print(f'{path}: its columns are parted by {delimiter!r}')


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
