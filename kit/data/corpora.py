"""
Known datasets, and how any text becomes a dataset folder.

python_docs and python_docstrings need no network: they are made of what every CPython carries. The two Shakespeares
are downloaded (1.1 MB) or taken from a file. openwebtext is streamed and large.
"""

import ast
import os
import shutil
import sys
import sysconfig
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kit.base.errors import ROOT, explained, fail, reason
from kit.base.overrides import nearest, require
from kit.data import bins, documents, downloads, places, tokens

SMALL = ('python_docs', 'python_docstrings', 'shakespeare_char', 'shakespeare')  # train.py makes them when missing
LARGE = ('openwebtext',)

TOKENIZER = {'python_docs': 'char', 'python_docstrings': 'char', 'shakespeare_char': 'char', 'shakespeare': 'gpt2',
             'openwebtext': 'gpt2'}

SHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def prepare_missing(name):
    """
    Make a dataset that a run needs and that is not there, if it is a small known one, so that nobody's first run ends
    with "file not found"; for the others the script ends with the command that makes them, or where another process is
    at it.
    """
    folder = tokens.dataset_folder(name)
    if name not in SMALL and places.is_locked(folder):
        fail(f'dataset = {name!r}: another process is preparing it; wait for its end')
    if name in LARGE:
        fail(f'dataset = {name!r} is not there yet, and it is large: python prepare.py {name}')
    if name not in SMALL:
        there = [path.name for root in (Path('data'), ROOT / 'data') for path in root.glob('*/')
                 if tokens.exists(path)]
        fail(f'dataset = {name!r}: there is no {folder / "train.bin"}'
             f'{nearest(name, [*there, *SMALL, *LARGE])}; python prepare.py --input=FILE --dataset={name} makes it '
             'from a text of yours')
    prepare(name, if_missing=True)


def prepare(name, source='', tokenizer='', overwrite=False, *, vocab_size=4096, text_key='text', pairs=False,
            split='90,5,5', seed=1337, errors='strict', shard_size=100_000_000, separator='', if_missing=False):
    """
    Make the dataset folder data/<name> and return its path. Another process that is making it ends the script.

    name:   one of SMALL and LARGE, or a name of the user's for the text in source
    source: what documents.find takes, or - for standard input; for the Shakespeares the file, where there is no network
    if_missing: another process that is making it is waited for, and a dataset that is there then is taken
    The others are the settings of prepare.py; a known dataset has its own tokenizer and splits.
    """
    root = Path('data') if Path('data').is_dir() else ROOT / 'data'
    folder = root / name
    if name not in TOKENIZER and not source:
        known = ', '.join(SMALL + LARGE)
        fail(f'{name} is no dataset that is known here ({known}); --input=FILE_OR_FOLDER makes one of your own text')
    fixed = TOKENIZER.get(name)
    if fixed and tokenizer and tokenizer != fixed:
        fail(f'tokenizer = {tokenizer!r}: {name} is made with {fixed}; give the text another --dataset=NAME for that')
    if source and fixed and not name.startswith('shakespeare'):
        fail(f'--input={source}: {name} is not made from a file; give the text another --dataset=NAME')
    if separator and name in SMALL:
        fail(f'--separator={separator!r}: {name} is cut as it is; give the text another --dataset=NAME')
    tokenizer = fixed or tokenizer or 'char'
    job = {'input': source, 'files': [], 'tokenizer': tokenizer, 'vocab_size': vocab_size, 'text_key': text_key,
           'pairs': pairs, 'errors': errors, 'counts': bins.parse_split(split), 'seed': seed, 'shard_size': shard_size,
           'separator': separator}
    with places.locked(folder, f'another process is preparing {folder}: waiting for its end' if if_missing else ''):
        if if_missing and tokens.exists(folder):
            return folder
        places.check(folder, tokenizer, overwrite)
        if if_missing:
            print(f'preparing the dataset {name}')
        if name in ('python_docs', 'shakespeare_char', 'shakespeare'):
            prepare_texts(folder, root, source, tokenizer)
        else:
            prepare_documents(folder, source, job, overwrite)
    return folder


def prepare_documents(folder, source, job, overwrite):
    """What comes document by document: any text, and the known sets that are rows."""
    name = folder.name
    if name == 'python_docstrings':
        found = [text for pair in python_docstrings() for text in pair]
        job |= {'input': f'functions and docstrings of Python {sys.version.split()[0]}', 'pairs': True}
        bins.make(folder, job, lambda skip, bar: ((text, True) for text in islice(found, skip, None)),
                  overwrite=overwrite)
        return
    if name == 'openwebtext':
        require('datasets', name)
        job |= {'input': 'hf:Skylion007/openwebtext', 'counts': [1998, 1, 1], 'seed': None}
        announce_openwebtext(folder)
    if job['tokenizer'] not in tokens.KINDS:
        bins.load_encoding(job['tokenizer'])  # before any work begins
    if source == '-':
        sources = [bins.spool(folder)]
        job['files'] = tokens.sha256(sources[0])  # of another text nothing is gone on with
    else:
        meta = (folder / 'meta.json').resolve()  # of the dataset that is replaced: no text
        sources = [path for path in documents.find(job['input']) if isinstance(path, str) or path.resolve() != meta]
        job['files'] = documents.stamps(sources)
        job['pairs'] |= documents.are_pairs(sources)
        if job['pairs'] and job['separator']:
            fail(f'--separator={job["separator"]!r}: pairs are documents already')
        part = folder / places.PART
        if inside := [path for path in sources if part.resolve() in Path(path).resolve().parents]:
            fail(f'--input={inside[0]}: what is in {part} goes when the dataset is made; copy it elsewhere first')
    is_stream = any(isinstance(path, str) for path in sources)
    total = 8_013_769 if name == 'openwebtext' else None if is_stream else sum(path.stat().st_size for path in sources)
    bins.make(folder, job, lambda skip, bar: documents.read(sources, job['text_key'], job['pairs'], job['errors'], skip,
                                                            bar, job['separator']),
              total, ' rows' if is_stream else 'B', overwrite)


def prepare_texts(folder, root, source, tokenizer):
    """The known sets that are cut before they are encoded."""
    if folder.name == 'python_docs':
        texts = split_documents(python_documentation())
        source = f'the documentation of Python {sys.version.split()[0]}'
        split = 'whole documents: 90%, 5% and 5% of the text'
    else:
        text = read_shakespeare(root, source)
        cut = int(len(text) * 0.9)
        texts = {'train': text[:cut], 'val': text[cut:]}
        source = 'Tiny Shakespeare'
        split = "the first 90% and the last 10%, as nanoGPT's; test is the second half of val"
    ids, description = encode(texts, tokenizer)
    if 'test' not in ids:
        ids['test'] = ids['val'][len(ids['val']) // 2:]
    bins.write_dataset(folder, ids, description, source, split)


def announce_openwebtext(folder):
    free = shutil.disk_usage(folder).free
    print(f'openwebtext: 9 billion tokens take 18 GB in {folder} ({free / 1e9:.0f} GB are free) and some hours')
    if free < 18e9:
        print('openwebtext: the disk will not hold all of it; free some space, and the same command goes on')


# ---------------------------------------------------------------------------------------------------------------------
# texts


def library(desc):
    """(name, tree) of each module of the standard library, nothing imported."""
    folder = Path(sysconfig.get_path('stdlib'))
    apart = {'site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'lib2to3', 'pydoc_data', 'turtledemo'}
    paths = [p for p in folder.rglob('*.py') if not apart.intersection(p.relative_to(folder).parts)]
    for path in tqdm(sorted(paths), desc=desc, leave=False, disable=None):
        try:
            yield path.relative_to(folder).as_posix(), ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some distributions carry templates under the name of modules
            continue


def python_documentation():
    """[(name, text)]: the language reference in pydoc_data, and the docstrings of each module of the library."""
    from pydoc_data.topics import topics
    found = [(f'topic {name}', text.strip()) for name, text in sorted(topics.items())]
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for name, tree in library('reading docstrings'):
        docstrings = filter(None, (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)))
        if text := '\n\n'.join(docstrings).strip():
            found.append((name, text))
    return found


def python_docstrings():
    """
    [(source, docstring)]: short functions of the library without their docstrings, and the first lines of those, where
    they say something whole. No source and no docstring comes twice: what is val or test does not stand in train.
    """
    found, seen = [], set()
    for _, tree in library('reading functions'):
        for node in ast.walk(tree):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if not is_function or len(node.body) < 2 or not (docstring := ast.get_docstring(node)):
                continue
            line, _, rest = docstring.partition('\n')
            del node.body[0]
            source = ast.unparse(node)
            is_whole = line.endswith('.') or not rest.split('\n')[0]
            if (is_whole and 10 <= len(line) <= 100 and not line.startswith(f'{node.name}(') and len(source) <= 400
                    and (source + line).isascii() and not seen & {source, line}):
                seen |= {source, line}
                found.append((source, line))
    return found


def split_documents(documents):
    """Whole documents, shuffled once, dealt out to train (90% of the text), val (5%) and test (5%)."""
    order = np.random.default_rng(1337).permutation(len(documents))
    shuffled = [documents[i][1] for i in order]
    ends = np.cumsum([len(text) for text in shuffled]) / sum(len(text) for text in shuffled)
    parts = {'train': [], 'val': [], 'test': []}
    for text, end in zip(shuffled, ends):
        parts['train' if end <= 0.9 else 'val' if end <= 0.95 else 'test'].append(text)
    return {split: '\n\n'.join(part) for split, part in parts.items()}


def read_shakespeare(root, source):
    """Tiny Shakespeare: from the file given, from FLATGPT_MIRROR, or downloaded once to data/tinyshakespeare.txt."""
    mirror = Path(os.environ.get('FLATGPT_MIRROR', root)) / 'tinyshakespeare.txt'
    path = Path(source) if source else mirror if os.path.isfile(mirror) else root / 'tinyshakespeare.txt'
    if not source and not path.is_file():
        try:
            downloads.fetch(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
        except OSError as error:
            fail(f'Tiny Shakespeare could not be downloaded ({reason(error)}); fetch {SHAKESPEARE_URL} by hand and '
                 'give it with prepare.py --input=FILE, or as tinyshakespeare.txt in a folder that the environment '
                 'variable FLATGPT_MIRROR names; the dataset python_docs needs no network')
    if not os.path.isfile(path):
        fail(f'--input={source}: there is no such file')
    with explained(f'{path} cannot be read', 'give another --input=FILE'):
        is_it = tokens.sha256(path) == SHAKESPEARE_SHA256
    if not is_it:
        fail(f'{path} is not Tiny Shakespeare (its sha256 differs); '
             f'for a text of your own: python prepare.py --input={path} --dataset=NAME')
    return path.read_bytes().decode('utf-8')


# ---------------------------------------------------------------------------------------------------------------------
# ids in memory, for the small sets that are split before they are encoded


def encode(texts, tokenizer):
    """{split: text} -> ({split: ids}, the tokenizer's description)."""
    if tokenizer == 'char':
        codes = {split: np.frombuffer(text.encode('utf-32-le'), dtype=np.uint32) for split, text in texts.items()}
        alphabet = np.unique(np.concatenate(list(codes.values())))  # sorted by code point, as sorted(set(text)) is
        ids = {split: np.searchsorted(alphabet, code) for split, code in codes.items()}
        return ids, {'kind': 'char', 'chars': [chr(code) for code in alphabet]}
    encoding = bins.load_encoding(tokenizer)
    ids = {split: encoding.encode_ordinary(text) for split, text in texts.items()}
    return ids, tokens.describe_bpe(encoding)
