"""
Known datasets, and how any text becomes a dataset folder.

python_docs needs no network: it is the documentation that every CPython carries. The two Shakespeares are downloaded
(1.1 MB) or taken from a file. openwebtext is streamed and large.
"""

import ast
import json
import os
import pickle
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kit import downloads, ranks, tokens
from kit.overrides import HOUSE, fail, nearest

SMALL = ('python_docs', 'shakespeare_char', 'shakespeare')  # made in seconds: train.py prepares them when missing
LARGE = ('openwebtext',)

SHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
TEXT_SUFFIXES = ('.txt', '.md', '.py')


def find_or_prepare(name):
    """
    The folder of a dataset. A small known one that is missing is made here, by rank 0 while the others wait, so that
    nobody's first run ends with "file not found"; for the others the script ends with the command that makes them.
    """
    folder = tokens.dataset_folder(name)
    if ranks.is_main and not (folder / 'train.bin').is_file():
        if name in LARGE:
            fail(f'dataset = {name!r} is not there yet, and it is large: python prepare.py {name}')
        if name not in SMALL:
            there = [path.parent.name for root in (Path('data'), HOUSE / 'data') for path in root.glob('*/train.bin')]
            fail(f'dataset = {name!r}: there is no {folder / "train.bin"}{nearest(name, [*there, *SMALL, *LARGE])}; '
                 f'python prepare.py --input=FILE --dataset={name} makes it from a text of yours')
        print(f'preparing the dataset {name}')
        prepare(name)
    ranks.wait()
    return tokens.dataset_folder(name)


def prepare(name, source='', tokenizer='', overwrite=False):
    """
    Make the dataset folder data/<name> and return its path.

    name:      one of SMALL and LARGE, or a name of the user's for the text in source
    source:    a file or a folder of text; for the Shakespeares the file, where there is no network
    tokenizer: char or gpt2; '' is char, or what a known dataset has
    """
    root = Path('data') if Path('data').is_dir() else HOUSE / 'data'
    folder = root / name
    if (folder / 'train.bin').exists() and not overwrite:
        fail(f'{folder} holds a dataset already; --overwrite=True replaces it, --dataset=NAME makes another')
    fixed = {'python_docs': 'char', 'shakespeare_char': 'char', 'shakespeare': 'gpt2', 'openwebtext': 'gpt2'}.get(name)
    if fixed and tokenizer and tokenizer != fixed:
        fail(f'tokenizer = {tokenizer!r}: {name} is made with {fixed}; give the text another --dataset=NAME for that')
    if source and name in ('python_docs', 'openwebtext'):
        fail(f'--input={source}: {name} is not made from a file; give the text another --dataset=NAME')
    tokenizer = fixed or tokenizer or 'char'
    if name == 'openwebtext':
        return prepare_openwebtext(folder)
    if name == 'python_docs':
        texts = split_documents(python_documentation())
        source = f'the documentation of Python {sys.version.split()[0]}'
        split = 'whole documents: 90%, 5% and 5% of the text'
    elif name in SMALL:
        text = read_shakespeare(root, source)
        cut = int(len(text) * 0.9)
        texts = {'train': text[:cut], 'val': text[cut:]}
        source = 'Tiny Shakespeare'
        split = "the first 90% and the last 10%, as nanoGPT's; test is the second half of val"
    elif source:
        text = read_text(Path(source))
        cuts = int(len(text) * 0.9), int(len(text) * 0.95)
        texts = {'train': text[:cuts[0]], 'val': text[cuts[0]:cuts[1]], 'test': text[cuts[1]:]}
        split = 'the first 90%, the next 5% and the last 5% of the characters'
    else:
        known = ', '.join(SMALL + LARGE)
        fail(f'{name} is no dataset that is known here ({known}); --input=FILE_OR_FOLDER makes one of your own text')
    ids, description, vocab_size = encode(texts, tokenizer)
    if name in ('shakespeare_char', 'shakespeare'):
        ids['test'] = ids['val'][len(ids['val']) // 2:]
    write_dataset(folder, ids, description, vocab_size, source, split)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# texts


def python_documentation():
    """[(name, text)]: the language reference in pydoc_data, and the docstrings of each module of the library."""
    from pydoc_data.topics import topics
    documents = [(f'topic {name}', text.strip()) for name, text in sorted(topics.items())]
    library = Path(sysconfig.get_path('stdlib'))
    apart = {'site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'lib2to3', 'pydoc_data', 'turtledemo'}
    paths = [p for p in library.rglob('*.py') if not apart.intersection(p.relative_to(library).parts)]
    for path in tqdm(sorted(paths), desc='reading docstrings', leave=False, disable=None):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # some distributions carry templates under the name of modules
            continue
        kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
        docstrings = filter(None, (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)))
        if text := '\n\n'.join(docstrings).strip():
            documents.append((path.relative_to(library).as_posix(), text))
    return documents


def split_documents(documents):
    """Whole documents, shuffled once, dealt out to train (90% of the text), val (5%) and test (5%)."""
    order = np.random.default_rng(1337).permutation(len(documents))
    shuffled = [documents[i][1] for i in order]
    ends = np.cumsum([len(text) for text in shuffled]) / sum(len(text) for text in shuffled)
    parts = {'train': [], 'val': [], 'test': []}
    for text, end in zip(shuffled, ends):
        parts['train' if end <= 0.9 else 'val' if end <= 0.95 else 'test'].append(text)
    return {split: '\n\n'.join(part) for split, part in parts.items()}


def read_text(path):
    """The text of a file, or of every .txt, .md and .py file below a folder, in the order of their names."""
    if path.is_dir():
        paths = sorted(p for p in path.rglob('*') if p.suffix in TEXT_SUFFIXES and p.is_file())
        if not paths:
            fail(f'--input={path}: there is no file in this folder that ends in {", ".join(TEXT_SUFFIXES)}')
    else:
        paths = [path]
    texts = []
    for path in paths:
        try:
            texts.append(path.read_bytes().decode('utf-8-sig').replace('\r\n', '\n'))
        except UnicodeDecodeError as error:
            fail(f'{path} is not UTF-8: the byte at offset {error.start} cannot be read; convert the file to UTF-8')
        except OSError as error:
            fail(f'--input={path} cannot be read: {error.strerror}')
    text = '\n\n'.join(texts)
    if len(text) < 100:
        fail(f'--input={path} holds {len(text)} characters, too few to train on; give at least some pages of text')
    return text


def read_shakespeare(root, source):
    """Tiny Shakespeare: from the file given, from FLATGPT_MIRROR, or downloaded once to data/tinyshakespeare.txt."""
    mirror = Path(os.environ.get('FLATGPT_MIRROR', root)) / 'tinyshakespeare.txt'
    path = Path(source) if source else mirror if mirror.is_file() else root / 'tinyshakespeare.txt'
    if not source and not path.is_file():
        try:
            downloads.fetch(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
        except OSError as error:
            fail(f'Tiny Shakespeare could not be downloaded ({error}); fetch {SHAKESPEARE_URL} by hand and give it '
                 'with prepare.py --input=FILE, or as tinyshakespeare.txt in a folder that the environment variable '
                 'FLATGPT_MIRROR names; the dataset python_docs needs no network')
    if not path.is_file():
        fail(f'--input={source}: there is no such file')
    if tokens.sha256(path) != SHAKESPEARE_SHA256:
        fail(f'{path} is not Tiny Shakespeare (its sha256 differs); '
             f'for a text of your own: python prepare.py --input={path} --dataset=NAME')
    return path.read_bytes().decode('utf-8')


# ---------------------------------------------------------------------------------------------------------------------
# ids


def encode(texts, tokenizer):
    """{split: text} -> ({split: ids}, the tokenizer's description, the size of its vocabulary)."""
    if tokenizer == 'char':
        codes = {split: np.frombuffer(text.encode('utf-32-le'), dtype=np.uint32) for split, text in texts.items()}
        alphabet = np.unique(np.concatenate(list(codes.values())))  # sorted by code point, as sorted(set(text)) is
        ids = {split: np.searchsorted(alphabet, code) for split, code in codes.items()}
        return ids, {'kind': 'char', 'chars': [chr(code) for code in alphabet]}, len(alphabet)
    try:
        encoding = tokens.tiktoken_encoding(tokenizer)
    except OSError as error:
        fail(f'the files of the tokenizer {tokenizer} could not be downloaded ({type(error).__name__}); give a folder '
             'FLATGPT_MIRROR with them in tiktoken/, or take --tokenizer=char or the dataset python_docs')
    ids = {split: encoding.encode_ordinary(text) for split, text in texts.items()}
    return ids, tokens.describe_bpe(encoding), encoding.n_vocab


def write_dataset(folder, ids, description, vocab_size, source, split):
    """
    Write data/<name>: all files into a temporary folder first, then each to its place, train.bin last. A folder
    with a train.bin is thus a whole one, wherever the writing was cut off.
    """
    dtype = 'uint16' if vocab_size <= 2**16 else 'uint32'
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f'.{folder.name}.', dir=folder.parent) as part:
            part = Path(part)
            for name, values in ids.items():
                np.asarray(values).astype(np.dtype(dtype).newbyteorder('<')).tofile(part / f'{name}.bin')
            write_meta(part, list(ids), dtype, description, vocab_size, source, split)
            install(part, folder)
    except OSError as error:
        fail(f'{folder} could not be written: {error.strerror}; nothing of it is kept')
    for name, values in ids.items():
        print(f'{name} has {len(values):,} tokens')
    print(f'wrote {folder} ({source}, vocabulary of {vocab_size:,})')


def write_meta(folder, splits, dtype, description, vocab_size, source, split):
    """meta.json for the .bin files in a folder, and for characters the meta.pkl that nanoGPT's scripts read."""
    def count(name):
        return (folder / f'{name}.bin').stat().st_size // np.dtype(dtype).itemsize
    files = {name: {'tokens': count(name), 'sha256': tokens.sha256(folder / f'{name}.bin')} for name in splits}
    meta = {'format': 1, 'dtype': dtype, 'vocab_size': vocab_size, 'tokenizer': description,
            'end_of_text': description.get('special', {}).get('<|endoftext|>'), 'pad': None, 'mask': None,
            'files': files, 'source': source, 'split': split}
    (folder / 'meta.json').write_text(json.dumps(meta, indent=1), encoding='utf-8')
    if description['kind'] == 'char':
        itos = dict(enumerate(description['chars']))
        with open(folder / 'meta.pkl', 'wb') as file:
            pickle.dump({'vocab_size': vocab_size, 'itos': itos, 'stoi': {c: i for i, c in itos.items()}}, file)


def install(part, folder):
    """Move the files of a finished temporary folder to their places, train.bin last."""
    folder.mkdir(exist_ok=True)
    for stale in ('train.bin', 'test.bin', 'meta.pkl'):  # of a dataset that is being replaced
        (folder / stale).unlink(missing_ok=True)
    made = [*part.glob('meta.*'), part / 'train.bin', *part.glob('*.bin')]
    for path in sorted(set(made), key=lambda p: p.name == 'train.bin'):
        with open(path, 'r+b') as file:  # Windows syncs only what it could write
            os.fsync(file.fileno())
        os.replace(path, folder / path.name)


# ---------------------------------------------------------------------------------------------------------------------
# OpenWebText


def prepare_openwebtext(folder, flush_every=10_000):
    """
    Stream OpenWebText (8 million documents) through GPT-2's BPE into train.bin, val.bin and test.bin, of each 2,000
    documents one to val and one to test. Memory stays bounded. progress.json remembers how far the files are good:
    after an interruption the same command goes on from there.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        fail('openwebtext is streamed with the package datasets: pip install datasets; python_docs needs nothing')
    try:
        encoding = tokens.tiktoken_encoding('gpt2')
        stream = load_dataset('Skylion007/openwebtext', split='train', streaming=True)
    except Exception as error:  # no network, in any of the words of two libraries
        fail(f'openwebtext could not be reached ({type(error).__name__}: {str(error)[:80]}); try again with a network, '
             'or take the dataset python_docs, which needs none')
    part = folder / 'part'
    part.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(part).free
    print(f'openwebtext: 9 billion tokens take 18 GB in {folder} ({free / 1e9:.0f} GB are free) and some hours')
    if free < 18e9:
        print('openwebtext: the disk will not hold all of it; free some room, and the same command goes on')
    progress = {'documents': 0, 'train': 0, 'val': 0, 'test': 0}  # and the bytes of each file
    if (part / 'progress.json').is_file():
        progress = json.loads((part / 'progress.json').read_text())
        print(f'going on after {progress["documents"]:,} documents')
    files = {}
    for split in ('train', 'val', 'test'):
        files[split] = open(part / f'{split}.bin', 'ab')
        if (part / f'{split}.bin').stat().st_size < progress[split]:
            fail(f'{part}/{split}.bin is shorter than progress.json says; delete the folder and begin anew')
        files[split].truncate(progress[split])  # what came after the last note may be half a document

    def save(ids):
        for place, document in enumerate(ids, progress['documents']):
            split = {0: 'val', 1: 'test'}.get(place % 2000, 'train')
            files[split].write(np.array(document + [encoding.eot_token], dtype='<u2').tobytes())
        for split, file in files.items():
            file.flush()
            os.fsync(file.fileno())
            progress[split] = file.tell()
        progress['documents'] += len(ids)
        (part / 'progress.new').write_text(json.dumps(progress))
        os.replace(part / 'progress.new', part / 'progress.json')

    texts, documents = [], stream.skip(progress['documents'])
    try:
        for document in tqdm(documents, initial=progress['documents'], total=8_013_769, unit=' docs', disable=None):
            texts.append(document['text'])
            if len(texts) == flush_every:
                save(encoding.encode_ordinary_batch(texts))
                texts = []
        save(encoding.encode_ordinary_batch(texts))
    except Exception as error:  # the network or the disk; the files are good up to the last note
        fail(f'openwebtext broke off after {progress["documents"]:,} documents ({type(error).__name__}: '
             f'{str(error)[:80]}); the same command goes on from there')
    for file in files.values():
        file.close()
    write_meta(part, list(files), 'uint16', tokens.describe_bpe(encoding), encoding.n_vocab, 'OpenWebText',
               'of each 2,000 documents the first is val, the second test')
    install(part, folder)
    shutil.rmtree(part)
    return folder
