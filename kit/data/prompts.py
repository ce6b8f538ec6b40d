"""What a text begins with, as somebody gives it at the command line, and the ids that a model takes for it."""

import codecs

from kit.base.errors import explained, fail
from kit.data import tokens


def read(start):
    """The text that --start means: itself, or with FILE:NAME that of a file. What cannot be read ends the script."""
    if not start.startswith('FILE:'):
        return start
    with explained(f'start = {start!r}: the file cannot be read', 'a prompt is text in UTF-8'):
        text = read_file(start[5:])
    if not text:
        fail(f'start = {start!r}: the file is empty, and a prompt needs at least one character')
    return text


def read_file(path):
    """The text of a file, in UTF-8, or in UTF-16 with its mark. Raises OSError, ValueError."""
    with open(path, 'rb') as file:
        data = file.read()
    is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode('utf-16' if is_utf_16 else 'utf-8-sig').replace('\r\n', '\n')
    if '\0' in text:
        raise ValueError('it holds null characters')
    return text


def encode(start, text, meta, separator, path):
    """
    (ids, the text that stands for them) of the prompt of a model; the end of a document alone is shown as none. start:
    None is the beginning of a new text. text: the tokenizer; separator: what in start is the end of a document, '' = as
    in the model's dataset; path: of its checkpoint. What it knows no ids for ends the script.
    """
    end = meta.get('end_of_text')
    if separator and end is None:
        fail(f'separator = {separator!r}: {path} knows no end of a document, its text was a single one')
    separator = separator or meta.get('separator', '')
    if start is None:
        ids = tokens.beginning(text, meta)
        start = tokens.decode(text, ids)
        if start != '\n' and ids != [end]:
            print(f'start: {start!r}, since this model knows no line break')
    else:
        if tokens.END in start and tokens.END != separator:
            remedy = '' if end is None else f"; --separator='{tokens.END}' makes it the end of a document"
            print(f'start: {tokens.END} stands there as plain text{remedy}')
        try:
            first, *others = [text.encode(piece) for piece in (start.split(separator) if separator else [start])]
        except ValueError as error:
            fail(f'start: {error}')
        ids = [*first, *(i for piece in others for i in (end, *piece))]
    if not ids:
        fail(f'start = {start!r}: nothing in it is a token of this model')
    if max(ids) >= meta['vocab_size']:
        fail(f'start: {path} knows {meta["vocab_size"]:,} ids, and the prompt holds the id {max(ids)}')
    return ids, '' if ids == [end] else start
