"""prepare.py and the dataset folders: known sets, texts of the user's, downloads, damage."""

import functools
import hashlib
import http.server
import json
import os
import pickle
import re
import shutil
import threading

import numpy as np
import pytest
from conftest import MIRROR, TINY, needs_mirror, some_text

from kit.data import corpora, downloads, tokens


def ids(folder, split):
    return np.fromfile(folder / f'{split}.bin', dtype='<u2')


def test_own_text_by_character(tiny):
    folder, text = tiny / 'data/tiny', (tiny / 'text.txt').read_text()
    meta = json.loads((folder / 'meta.json').read_text())
    chars = sorted(set(text))
    assert meta['tokenizer'] == {'kind': 'char', 'chars': chars} and meta['vocab_size'] == len(chars)
    found = [''.join(chars[i] for i in ids(folder, split)) for split in ('train', 'val', 'test')]
    assert ''.join(found) == text and [len(t) for t in found] == [18_000, 1000, 1000]
    for split in 'train', 'val', 'test':
        path = folder / f'{split}.bin'
        assert meta['files'][split] == {'tokens': path.stat().st_size // 2,
                                        'sha256': hashlib.sha256(path.read_bytes()).hexdigest()}
    with open(folder / 'meta.pkl', 'rb') as file:  # as nanoGPT's scripts read it
        pickled = pickle.load(file)
    assert pickled['vocab_size'] == len(chars)
    assert [pickled['itos'][pickled['stoi'][c]] for c in chars] == chars


def test_own_folder_of_files(run, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'books/deep').mkdir(parents=True)
    (tmp_path / 'books/b.txt').write_bytes('\ufeffzweites Buch: \u00fc\u4e16\r\n'.encode() * 20)
    (tmp_path / 'books/a.md').write_text('first book\n' * 50)
    (tmp_path / 'books/deep/c.py').write_text('print()\n')
    (tmp_path / 'books/picture.png').write_bytes(b'\xff\xfe\x00')
    result = run('prepare.py', '--input=books', '--dataset=books')
    assert result.status == 0, result.err
    folder = tmp_path / 'data/books'
    text = tokens.tokenizer(tokens.read_meta(folder)['tokenizer'])
    whole = ''.join(tokens.decode(text, ids(folder, s)) for s in ('train', 'val', 'test'))
    second = ('\ufeffzweites Buch: \u00fc\u4e16\n' * 20).removeprefix('\ufeff')
    documents = ['first book\n' * 50, second, 'print()\n']  # in the order of their names, an end behind each
    assert whole == ''.join(document + tokens.END for document in documents)


def test_python_docs(run, tmp_path):
    """The embedded dataset: real text, whole documents in three disjoint splits, the same each time."""
    (tmp_path / 'data').mkdir()
    assert run('prepare.py', 'python_docs').status == 0
    folder = tmp_path / 'data/python_docs'
    meta = tokens.read_meta(folder)
    text = tokens.tokenizer(meta['tokenizer'])
    parts = {split: tokens.decode(text, ids(folder, split)) for split in ('train', 'val', 'test')}
    assert len(parts['train']) > 1_000_000 and 'Python 3.' in meta['source']
    assert all(0.02 < len(parts[s]) / len(parts['train']) < 0.1 for s in ('val', 'test'))
    assert 'statement' in parts['train']
    documents = dict(corpora.python_documentation())
    for document in documents.values():
        if len(document) > 3000:
            assert sum(document in part for part in parts.values()) == 1
    encoded, _ = corpora.encode(corpora.split_documents(list(documents.items())), 'char')
    assert all(np.array_equal(encoded[split], ids(folder, split)) for split in parts)


def test_overwrite(run, tiny):
    (tiny / 'other.txt').write_text('another text\n' * 1000)
    assert run('prepare.py', '--input=other.txt', '--dataset=tiny', '--overwrite').status == 0
    data, meta = tokens.read_dataset(tiny / 'data/tiny')
    assert meta['vocab_size'] == 10 and len(data['train']) == 11_700


def test_a_missing_small_dataset_is_prepared(run, tmp_path):
    clone = tmp_path / 'clone'  # a fresh one, without datasets
    shutil.copytree(corpora.ROOT / 'kit', clone / 'kit')
    for script in 'train.py', 'model.py', 'attention.py':
        shutil.copy(corpora.ROOT / script, clone)
    result = run(clone / 'train.py', *TINY, '--dry_run', cwd=clone)
    assert result.status == 0 and 'preparing the dataset python_docs' in result.out, result.err
    assert tokens.read_dataset(clone / 'data/python_docs')
    assert 'preparing' not in run(clone / 'train.py', *TINY, '--dry_run').out  # from anywhere


@needs_mirror
def test_shakespeare_by_character_is_nanogpts(run, tmp_path):
    (tmp_path / 'data').mkdir()
    assert run('prepare.py', 'shakespeare_char', env={'FLATGPT_MIRROR': str(MIRROR)}).status == 0
    folder = tmp_path / 'data/shakespeare_char'
    data = (MIRROR / 'tinyshakespeare.txt').read_text()
    chars = sorted(set(data))
    expected = np.array([chars.index(c) for c in data], dtype=np.uint16)
    assert np.array_equal(ids(folder, 'train'), expected[:1003854])
    assert np.array_equal(ids(folder, 'val'), expected[1003854:])
    assert np.array_equal(ids(folder, 'test'), expected[1003854:][55770:])
    assert 'second half of val' in tokens.read_meta(folder)['split']


@needs_mirror
def test_shakespeare_by_bpe_is_nanogpts(run, tmp_path):
    (tmp_path / 'data').mkdir()
    result = run('prepare.py', 'shakespeare', env={'FLATGPT_MIRROR': str(MIRROR)})
    assert result.status == 0, result.err
    assert 'train has 301,966 tokens' in result.out and 'val has 36,059 tokens' in result.out
    # the folder alone encodes and decodes: without the mirror, without tiktoken's cache
    meta = tokens.read_meta(tmp_path / 'data/shakespeare')
    os.environ['TIKTOKEN_CACHE_DIR'] = str(tmp_path / 'empty')
    try:
        text = tokens.tokenizer(meta['tokenizer'])
    finally:
        del os.environ['TIKTOKEN_CACHE_DIR']
    data = (MIRROR / 'tinyshakespeare.txt').read_text()
    assert tokens.decode(text, ids(tmp_path / 'data/shakespeare', 'train')) == data[:1003854]
    assert text.end == 50256 == meta['end_of_text'] and text.encode('O Romeo\u00fc') == [46, 43989, 9116]
    assert tokens.padded_vocab_size(meta) == 50304 and text.size == 50257


@needs_mirror
def test_input_in_place_of_a_download(run, tmp_path):
    (tmp_path / 'data').mkdir()
    assert run('prepare.py', 'shakespeare_char', f'--input={MIRROR}/tinyshakespeare.txt').status == 0


@pytest.fixture
def server(tmp_path):
    """Files of a folder over HTTP on this machine."""
    (tmp_path / 'served').mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            if 'chunks' in self.path:  # breaks off within one
                self.protocol_version = 'HTTP/1.1'
                self.send_response(200)
                self.send_header('Transfer-Encoding', 'chunked')
                self.end_headers()
                self.wfile.write(b'5\r\nhello\r\n100\r\nwor')
                self.close_connection = True
            elif 'odd' in self.path:
                self.send_response(200)
                self.send_header('Content-Length', 'five')
                self.end_headers()
            elif 'torn' in self.path:  # promises more than it sends
                self.send_response(200)
                self.send_header('Content-Length', '1000')
                self.end_headers()
                self.wfile.write(b'x' * 10)
            else:
                super().do_GET()
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=tmp_path / 'served'))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}', tmp_path / 'served'
    httpd.shutdown()


def test_downloads_are_whole_or_not_there(server, tmp_path):
    url, served = server
    (served / 'text').write_bytes(b'hello')
    good = hashlib.sha256(b'hello').hexdigest()
    downloads.fetch(f'{url}/text', tmp_path / 'got/text', good)
    assert (tmp_path / 'got/text').read_bytes() == b'hello'
    for path, sha in ('text', '0' * 64), ('torn', ''), ('missing', good), ('chunks', ''), ('odd', ''):
        with pytest.raises(OSError):
            downloads.fetch(f'{url}/{path}', tmp_path / 'got/other', sha)
        assert os.listdir(tmp_path / 'got') == ['text']
    with pytest.raises(OSError):
        downloads.fetch('http://127.0.0.1:9/nobody', tmp_path / 'got/other', good)
    for path, word in ('chunks', 'IncompleteRead'), ('odd', 'five'), ('missing', '404'):
        with pytest.raises(OSError, match=word):
            downloads.fetch(f'{url}/{path}', tmp_path / 'new/other')
        assert not (tmp_path / 'new').exists()


def test_a_failed_download_says_what_to_do(run, tmp_path):
    (tmp_path / 'data').mkdir()
    result = run('prepare.py', 'shakespeare_char', env={'https_proxy': 'http://127.0.0.1:9'})
    assert result.status == 2 and result.err.count('\n') == 1
    for word in '--input', 'FLATGPT_MIRROR', 'python_docs':
        assert word in result.err
    assert os.listdir(tmp_path / 'data') == []


FAKE_DATASETS = '''
import os

class Stream:
    def __init__(self, first=0):
        self.first = first
    def skip(self, n):
        return Stream(self.first + n)
    def __iter__(self):
        for i in range(self.first, 25_000):
            if i == int(os.environ.get('STOP_AT', -1)):
                os._exit(9)  # as a power cut
            yield {'text': f'document {i} ' + 'word ' * (i % 7)}

def load_dataset(name, split, streaming):
    assert split == 'train' and streaming
    return Stream()
'''


@needs_mirror
def test_openwebtext_streams_and_survives_interruption(run, tmp_path):
    import tiktoken
    (tmp_path / 'data').mkdir()
    (tmp_path / 'fake').mkdir()
    (tmp_path / 'fake/datasets.py').write_text(FAKE_DATASETS)
    env = {'PYTHONPATH': str(tmp_path / 'fake'), 'FLATGPT_MIRROR': str(MIRROR)}
    script = tmp_path / 'prepare_with_fake.py'
    script.write_text(f'import sys; sys.path[:0] = [{str(tmp_path / "fake")!r}, {str(corpora.ROOT)!r}]\n'
                      'from kit.data import bins; bins.BATCH, bins.N_THREADS, bins.NOTE_EVERY = 16_000, 1, -1\n'
                      f'exec(open({str(corpora.ROOT / "prepare.py")!r}).read())')
    for stop in '12345', '21000':
        assert run(script, 'openwebtext', env=env | {'STOP_AT': stop}).status == 9
        assert not (tmp_path / 'data/openwebtext/train.bin').exists()  # not taken for whole
    result = run(script, 'openwebtext', env=env)
    assert result.status == 0 and '18 GB' in result.out
    kept = int(re.search('going on after (.*) characters', result.out)[1].replace(',', ''))
    lengths = np.cumsum([len(f'document {i} ' + 'word ' * (i % 7)) for i in range(21_000)])
    assert lengths[18_000] < kept < lengths[-1]  # of the second launch
    encoding = tokens.tiktoken_encoding('gpt2')
    assert isinstance(encoding, tiktoken.Encoding)
    expected = {'train': [], 'val': [], 'test': []}
    for i in range(25_000):
        split = {0: 'val', 1: 'test'}.get(i % 2000, 'train')
        expected[split] += encoding.encode_ordinary(f'document {i} ' + 'word ' * (i % 7)) + [50256]
    data, meta = tokens.read_dataset(tmp_path / 'data/openwebtext')
    assert {split: data[split].tolist() for split in data} == expected
    assert meta['vocab_size'] == 50257


def test_openwebtext_without_datasets(run, tmp_path):
    (tmp_path / 'data').mkdir()
    result = run('prepare.py', 'openwebtext')
    assert result.status == 2 and 'pip install datasets' in result.err and result.err.count('\n') == 1


@pytest.mark.parametrize('args, named', [
    ([], ['name', 'python_docs']),
    (['nowhere'], ['nowhere', '--input']),
    (['--input=none.txt', '--dataset=x'], ['none.txt']),
    (['--input=binary.txt', '--dataset=x'], ['binary.txt', 'UTF-8', 'offset 120']),
    (['--input=empty.txt', '--dataset=x'], ['empty.txt', '0 characters']),
    (['--input=folder', '--dataset=x'], ['folder', '.txt']),
    (['--input=text.txt', '--dataset=x', '--tokenizer=words'], ['tokenizer', 'words', 'char', 'gpt2']),
    (['--input=text.txt', '--dataset=../x'], ['../x']),
    (['--input=text.txt', '--dataset=..'], ['..']),
    (['python_docs', '--input=text.txt', '--overwrite'], ['text.txt', 'python_docs', '--dataset=NAME']),
    (['--input=text.txt'], ['--dataset']),
    (['shakespeare_char', '--tokenizer=gpt2'], ['shakespeare_char', 'gpt2']),
    (['shakespeare_char', '--input=text.txt'], ['text.txt', 'not Tiny Shakespeare', '--dataset=NAME']),
    (['tiny', '--input=text.txt'], ['tiny', 'already', '--overwrite']),
    (['python_docs', 'shakespeare'], ['one dataset']),
])
def test_mistakes(run, tiny, args, named):
    (tiny / 'binary.txt').write_bytes(b'a' * 120 + b'\xff\xfe' + b'b' * 120)
    (tiny / 'empty.txt').touch()
    (tiny / 'folder').mkdir()
    before = sorted((tiny / 'data').rglob('*'))
    result = run('prepare.py', *args)
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    for word in named:
        assert word in result.err
    assert sorted((tiny / 'data').rglob('*')) == before


def rewrite(folder, **changes):
    path = folder / 'meta.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    'no train.bin': (lambda d: (d / 'train.bin').unlink(), ['train.bin', 'tiny']),
    'no val.bin': (lambda d: (d / 'val.bin').unlink(), ['val.bin', 'missing']),
    'empty': (lambda d: (d / 'train.bin').write_bytes(b''), ['train.bin', 'empty']),
    'odd length': (lambda d: (d / 'train.bin').write_bytes(b'\0' * 3001), ['train.bin', '3001 bytes']),
    'short': (lambda d: (d / 'val.bin').write_bytes(b'\0' * 20), ['val.bin', '10']),
    'other bytes': (lambda d: (d / 'val.bin').write_bytes(b'\1' * 2000), ['val.bin', 'sha256']),
    'beyond the vocabulary': (lambda d: (rewrite(d, files={}), (d / 'val.bin').write_bytes(b'\x63\0' * 1000)),
                              ['val.bin', 'id 99', 'beyond the vocabulary of']),
    'a vocabulary of another size': (lambda d: rewrite(d, vocab_size=20), ['meta', '20']),
    'no tokenizer': (lambda d: rewrite(d, tokenizer=None), ['meta', 'prepare']),
    'odd vocabulary': (lambda d: rewrite(d, vocab_size='27'), ['meta', '27']),
    'odd dtype': (lambda d: rewrite(d, dtype='foo'), ['meta', 'foo']),
    'odd files': (lambda d: rewrite(d, files={'train': 3}), ['meta', 'prepare']),
    'torn meta': (lambda d: (d / 'meta.json').write_text('{"format": 1, '), ['meta']),
    'foreign meta': (lambda d: rewrite(d, format=7), ['format 7']),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_datasets(train, tiny, damage):
    spoil, named = DAMAGES[damage]
    spoil(tiny / 'data/tiny')
    result = train()
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    for word in named:
        assert word in result.err
    assert not (tiny / 'checkpoints').exists()


def test_nanogpt_folders(train, tiny):
    """A folder with nothing but nanoGPT's three files, and one too short for the block."""
    folder = tiny / 'data/tiny'
    (folder / 'meta.json').unlink()
    (folder / 'test.bin').unlink()
    result = train('--max_iters=1')
    assert result.status == 0 and '... = ' in result.out
    result = train('--test')
    assert 'no test.bin: val is taken' in result.out and 'val loss' in result.out
    (folder / 'val.bin').write_bytes(b'\0\0' * 16)
    assert 'too few for a window of block_size + 1 = 17' in train().err


class Evil:
    def __reduce__(self):
        return os.system, ('touch ran',)


@pytest.mark.parametrize('payload', [Evil(), {'vocab_size': Evil()}, {'itos': {0: Evil()}, 'vocab_size': 1}, [], 3])
def test_hostile_meta_pickles(train, tiny, payload):
    (tiny / 'data/tiny/meta.json').unlink()
    with open(tiny / 'data/tiny/meta.pkl', 'wb') as file:
        pickle.dump(payload, file)
    result = train()
    assert result.status == 2 and result.err.count('\n') == 1 and 'meta' in result.err
    assert not (tiny / 'ran').exists() and not (tiny / 'checkpoints').exists()


def test_char_encoding_is_sorted_set(tmp_path):
    text = some_text() + '\u00e9\U0001f600\n'
    encoded, description = corpora.encode({'train': text}, 'char')
    assert description['chars'] == sorted(set(text))
    assert encoded['train'].tolist() == [description['chars'].index(c) for c in text]
