"""prepare.py on anything: formats, tokenizers, splits, pairs, mistakes, interruptions."""

import ast
import csv
import gzip
import json
import os
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import MIRROR, ROOT, TINY, needs_mirror, some_text
from tqdm import tqdm

from kit.data import bins, documents, tokens

END = tokens.END
# what is hard: quotes, tabs, line breaks of all kinds, an empty one, END as text, characters of one to four bytes
ODD = ['', 'a "quoted", word\n', 'tab\there\n\n', f'it says {END} as text', '\u00fc\u4e16\U0001f600 caf\u00e9', ' ',
       f'{END}{END}', "don't  stop\n   now"]
DOCUMENTS = [some_text(20 + i % 150, seed=i) for i in range(250)] + ODD


@pytest.fixture
def place(tmp_path):
    (tmp_path / 'data').mkdir()
    return tmp_path


@pytest.fixture
def prepare(run, place):
    """prepare('--input=x', code='') -> Result, of a launch that has to succeed; code is run before the script."""
    def launch(*args, code='', env=None, status=0):
        script = place / 'prepare_hooked.py'
        script.write_text(f'import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}\n'
                          f'exec(open({str(ROOT / "prepare.py")!r}).read())')
        result = run(script if code else 'prepare.py', '--dataset=x', *args, env=env)
        assert result.status in (status, 9), result.err  # 9: cut off by the code
        return result
    return launch


def write_jsonl(path, texts, key='text'):
    path.write_text(''.join(json.dumps({'n': 3, key: text}) + '\n' for text in texts), encoding='utf-8')


def write_csv(path):
    with open(path, 'w', newline='', encoding='utf-8-sig') as file:
        csv.writer(file).writerows([['n', 'text'], *([3, text] for text in DOCUMENTS)])


def write_parquet(path):
    pyarrow = pytest.importorskip('pyarrow')
    table = pyarrow.table({'n': [3] * len(DOCUMENTS), 'text': DOCUMENTS})
    pytest.importorskip('pyarrow.parquet').write_table(table, path, row_group_size=100)


def write_zst(path):
    zstandard = pytest.importorskip('zstandard')
    write_jsonl(path, DOCUMENTS)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b''.join(zstandard.compress(b''.join(part)) for part in (lines[:99], lines[99:])))  # two frames


def write_gz(path):
    write_jsonl(path, DOCUMENTS)
    path.write_bytes(gzip.compress(path.read_bytes()))


def write_json(path):
    path.write_text(json.dumps([{'n': 3, 'text': text} for text in DOCUMENTS], indent=1), encoding='utf-8')


def write_files(path):
    path.mkdir()
    for i, text in enumerate(DOCUMENTS):
        if i % 4 < 3:
            (path / f'{i:03}{(".txt", ".md", ".py")[i % 4]}').write_bytes(text.encode())
        else:
            (path / f'{i:03}.txt.gz').write_bytes(gzip.compress(text.encode()))
    (path / 'picture.png').write_bytes(b'\xff\xfe\x00')


FORMATS = {'x.jsonl': lambda path: write_jsonl(path, DOCUMENTS), 'x.jsonl.gz': write_gz, 'x.jsonl.zst': write_zst,
           'x.json': write_json, 'x.csv': write_csv, 'x.parquet': write_parquet, 'folder': write_files}


def expected(encode, end, documents=DOCUMENTS, seed=1337):
    """Document by document, as everybody writes it."""
    found = {'train': [], 'val': [], 'test': []}
    for text, code in zip(documents, bins.deal(0, len(documents), [90, 5, 5], seed)):
        found[('train', 'val', 'test')[code]] += [*encode(text), end]
    return found


def check(folder, found):
    data, meta = tokens.read_dataset(folder)
    assert {split: data[split][:].tolist() for split in data} == found
    return meta


@pytest.mark.parametrize('name', FORMATS)
def test_formats_are_one_text(prepare, place, name):
    FORMATS[name](place / name)
    prepare(f'--input={name}')
    chars = sorted(set(''.join(DOCUMENTS)))
    meta = check(place / 'data/x', expected(lambda text: [chars.index(c) for c in text], len(chars)))
    assert meta['tokenizer']['chars'] == chars + [END] and meta['end_of_text'] == len(chars)
    assert sum(meta['documents'].values()) == len(DOCUMENTS) and 10 <= meta['documents']['val'] <= 15
    assert not (place / 'data/x/.part').exists()


@needs_mirror
@pytest.mark.parametrize('tokenizer', ['byte', 'gpt2', 'bpe'])
def test_tokenizers_are_the_loop(prepare, place, tokenizer):
    write_jsonl(place / 'x.jsonl', DOCUMENTS)
    if tokenizer == 'bpe':
        pytest.importorskip('tokenizers')
    prepare('--input=x.jsonl', f'--tokenizer={tokenizer}', '--vocab_size=300', '--seed=3',
            env={'FLATGPT_MIRROR': str(MIRROR)})
    meta = tokens.read_meta(place / 'data/x')
    text = tokens.tokenizer(meta['tokenizer'])
    encode = (lambda t: t.encode()) if tokenizer == 'byte' else text.encoding.encode_ordinary
    check(place / 'data/x', expected(encode, meta['end_of_text'], seed=3))
    assert meta['end_of_text'] == meta['vocab_size'] - 1 == {'byte': 256, 'gpt2': 50256, 'bpe': 299}[tokenizer]
    for sample in DOCUMENTS:
        assert tokens.decode(text, text.encode(sample)) == sample


def test_bpe_learns_what_its_library_learns(prepare, place):
    """The vocabulary as tiktoken has it encodes as the package that it was learned with, and small texts give less."""
    pytest.importorskip('tokenizers')
    (place / 'x.txt').write_text(some_text(200_000), encoding='utf-8')
    result = prepare('--input=x.txt', '--tokenizer=bpe', '--vocab_size=5000')
    meta = tokens.read_meta(place / 'data/x')
    assert f'no more than {meta["vocab_size"]:,} ids' in result.out and 500 < meta['vocab_size'] < 5000
    text = tokens.tokenizer(meta['tokenizer'])
    assert text.decode_bytes(text.encode('plain text')) == b'plain text' and text.end == text.size - 1
    sizes = {split: entry['tokens'] for split, entry in meta['files'].items()}
    assert sum(sizes.values()) < 200_000 / 3  # bytes a token


def test_a_vocabulary_is_taken_over(prepare, run, place):
    pytest.importorskip('tokenizers')
    (place / 'x.txt').write_text(some_text(50_000))
    (place / 'y.txt').write_text('other words, other letters ' * 50)
    prepare('--input=x.txt', '--tokenizer=bpe', '--vocab_size=300')
    result = run('prepare.py', '--input=y.txt', '--dataset=y', '--tokenizer=x')
    assert result.status == 0, result.err
    assert tokens.read_meta(place / 'data/y')['tokenizer'] == tokens.read_meta(place / 'data/x')['tokenizer']
    assert run('train.py', '--dataset=x,y', *TINY, '--max_iters=1').status == 0
    assert run('prepare.py', '--input=y.txt', '--dataset=z').status == 0
    assert 'z' in (err := run('prepare.py', '--input=y.txt', '--dataset=u', '--tokenizer=z').err) and 'char' in err


@needs_mirror
@pytest.mark.parametrize('line_end', ['\n', '\r\n'])
def test_a_large_text_is_cut_where_no_token_is(prepare, place, line_end, monkeypatch):
    text = (MIRROR / 'tinyshakespeare.txt').read_text()[:300_000] + '\u4e16\u754c\uff0c ' * 200 + ODD[4]
    (place / 'x.txt').write_bytes(('\ufeff' + text).replace('\n', line_end).encode())
    small = 'from kit.data import bins, documents; documents.BLOCK = 997; bins.BATCH = 1'
    result = prepare('--input=x.txt', '--tokenizer=gpt2', code=small, env={'FLATGPT_MIRROR': str(MIRROR)})
    whole = tokens.tiktoken_encoding('gpt2').encode_ordinary(text)
    data, meta = tokens.read_dataset(place / 'data/x')
    assert np.concatenate([data[split] for split in ('train', 'val', 'test')]).tolist() == whole
    assert len(data['train']) == len(whole) * 9 // 10 and 'documents' not in meta
    assert '5%' in meta['split'] and 'tokens' in meta['split'] and 'train has' in result.out


def test_a_text_without_a_place_to_cut(place, monkeypatch):
    monkeypatch.setattr(documents, 'BLOCK', 101)
    (place / 'x.txt').write_bytes(b'1,2\r\n' * 2000)
    found = list(documents.read([place / 'x.txt'], bar=tqdm(disable=True)))
    assert ''.join(text for text, _ in found) == '1,2\n' * 2000 and 4 < len(found) < 10
    assert [ends for _, ends in found] == [False] * (len(found) - 1) + [True]


def test_several_inputs(prepare, place):
    """With commas between, a glob, and few documents: cut by tokens, and which document ends where is counted."""
    for name in 'a1.txt', 'a2.txt', 'b.md':
        (place / name).write_text(name[:2] * 100)
    write_jsonl(place / 'c.jsonl', ['x' * 200, 'y' * 200], key='body')
    prepare('--input=c.jsonl,a*.txt, b.md', '--text_key=body', '--tokenizer=byte', '--split=50,50,0')
    data, meta = tokens.read_dataset(place / 'data/x')
    whole = ''.join(f'{text}{END}' for text in ('x' * 200, 'y' * 200, 'a1' * 100, 'a2' * 100, 'b.' * 100))
    assert tokens.decode(tokens.ByteTokenizer(), np.concatenate([data['train'], data['val']])) == whole
    assert len(data['train']) == 1005 // 2 and len(data['val']) == 503
    assert meta['documents'] == {'train': 2, 'val': 3, 'test': 0} and not (place / 'data/x/test.bin').exists()


def test_each_file_is_read_once(prepare, place):
    folder = place / 'a folder of texts with a long name'
    (folder / '.hidden').mkdir(parents=True)
    (folder / '.hidden/x.txt').write_text('hidden')
    names = [f'{folder.name}/{i}.txt' for i in range(60)]
    for name in names:
        (place / name).write_text(name * 9)
    (place / 'one, two.txt').write_text('commas in its name')
    prepare(f'--input={",".join(names)},./{names[0]},{folder.name},one, two.txt,', '--tokenizer=byte')
    assert sum(tokens.read_meta(place / 'data/x')['documents'].values()) == 61


@needs_mirror
def test_a_long_word_takes_no_longer_than_others(prepare, place):
    """Uncut, BPE would be at it for hours."""
    texts = ['a' * 1_000_000, 'the end', '^' * 300_000 + 'x' * 5000 + END, ' ' * 300_000, '1' * 100_000, 'ab ' * 999]
    write_jsonl(place / 'x.jsonl', texts)
    prepare('--input=x.jsonl', '--tokenizer=gpt2', '--split=50,50,0', env={'FLATGPT_MIRROR': str(MIRROR)})
    data, meta = tokens.read_dataset(place / 'data/x')
    text = tokens.tokenizer(meta['tokenizer'])
    assert tokens.decode(text, np.concatenate([data['train'], data['val']])) == ''.join(t + END for t in texts)
    for text in [*texts, '', 'ab' * 1023, 'x' * 2048 + 'y', '-' * 2048]:
        assert ''.join(bins.cut_runs(text)) == text and all(len(run) < 4096 for run in bins.cut_runs(text)[:-1])


def read_all(path, **settings):
    """The documents of a file, whole."""
    found, text = [], ''
    for piece, ends in documents.read([path], bar=tqdm(disable=True), **settings):
        text += piece
        if ends:
            found.append(text)
            text = ''
    assert not text
    return found


def dumped_as(how):
    """DOCUMENTS as JSON, in one of many ways."""
    rows = [{'text': text, 'more': [{'a': '[{'}]} for text in DOCUMENTS]
    return {'array': json.dumps(rows), 'lines': '\n'.join(map(json.dumps, rows)), 'strings': json.dumps(DOCUMENTS),
            'indented': '\ufeff\n ' + json.dumps(rows, indent=40, ensure_ascii=False) + '\n \n',
            'indented objects': '\n'.join(json.dumps(row, indent=2) for row in rows)}[how]


@pytest.mark.parametrize('how', ['array', 'lines', 'strings', 'indented', 'indented objects'])
def test_json_is_read_in_pieces(place, how, monkeypatch):
    (place / 'x.json').write_text(dumped_as(how), encoding='utf-8')
    for block in 50, 1009, 2**20:
        monkeypatch.setattr(documents, 'BLOCK', block)
        assert read_all(place / 'x.json') == DOCUMENTS
    assert list(documents.read([place / 'x.json'], bar=tqdm(disable=True), skip=9))[0] == (DOCUMENTS[9], True)
    (place / 'x.json').write_text(' ' * 2**21 + dumped_as(how).removeprefix('\ufeff'), encoding='utf-8')
    assert read_all(place / 'x.json') == DOCUMENTS


@pytest.mark.parametrize('separator', [';', '\t', '|'])
def test_separators_of_spreadsheets(prepare, place, separator):
    with open(place / 'x.csv', 'w', newline='', encoding='utf-8-sig') as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([['n', 'a, b', 'text'], *(['3,5', '', text] for text in DOCUMENTS)])
    result = prepare('--input=x.csv', '--tokenizer=bpe', '--vocab_size=300')
    assert result.out.count(f'its columns are parted by {separator!r}') == 1
    assert f'{len(DOCUMENTS)} documents' in result.out
    assert read_all(place / 'x.csv') == DOCUMENTS
    assert read_all(place / 'x.csv', text_key='n') == ['3,5'] * len(DOCUMENTS)


def test_other_files_are_said(prepare, place):
    """What is read as text for want of a better name, and what is not read; only what is text is text."""
    (place / 'many').mkdir()
    for name in 'a.txt', 'b.png', 'c.bin', 'package.json', 'LICENSE':
        (place / 'many' / name).write_text(some_text())
    (place / 'page.html').write_text(some_text())
    odd = os.fsdecode(b'caf\xe9')
    (place / odd).write_bytes(gzip.compress(some_text().encode()))
    (place / f'{odd}.gz').write_bytes(gzip.compress(some_text().encode()))
    result = prepare(f'--input=many,page.html,{odd}.gz')
    assert 'many: files that end in .bin, .json, .png and 1 more are left out; what is named itself' in result.out
    assert 'page.html, caf?.gz are read as plain text' in result.out and '3 documents' in result.out
    result = prepare(f'--input={odd}', '--overwrite', status=2)
    assert 'is no text: there is a NUL' in result.err and result.err.count('\n') == 1


def test_a_json_in_a_folder_has_to_be_named(prepare, place):
    (place / 'many').mkdir()
    write_json(place / 'many/a.json')
    (place / 'many/b.json.gz').write_bytes(gzip.compress((place / 'many/a.json').read_bytes()))
    result = prepare('--input=many', status=2)
    assert 'no file in this folder' in result.err and 'named' in result.err and result.err.count('\n') == 1
    assert f'{2 * len(DOCUMENTS)} documents' in prepare('--input=many/*.json*').out


def test_links_to_folders_are_said(prepare, place):
    for name in 'many', 'elsewhere':
        (place / name).mkdir()
        (place / name / f'{name}.txt').write_text(some_text())
    os.symlink('../elsewhere', place / 'many/link')
    os.symlink('../elsewhere', place / 'many/.hidden')
    result = prepare('--input=many')
    assert 'many: links to folders are not followed: many/link\n' in result.out and 'documents' not in result.out
    assert '2 documents' in prepare('--input=many,many/link', '--overwrite').out


def test_input_is_files(prepare, place):
    """No pipes that never end, no links to nowhere, no names that no file can have."""
    os.mkfifo(place / 'pipe.txt')
    os.symlink('nowhere', place / 'link.txt')
    os.symlink('loop.txt', place / 'loop.txt')
    (place / 'folder').mkdir()
    os.symlink('nowhere', place / 'folder/link.txt')
    for name, why in [('pipe.txt', '--input=-'), ('/dev/null', '--input=-'), ('link.txt', 'No such file'),
                      ('loop.txt', 'symbolic links'), ('folder', 'folder/link.txt'), ('x' * 300, 'too long'),
                      ('x' * 5000, 'too long'), ('pipe.txt/x', 'Not a directory'), ('p*.txt', '--input=-')]:
        result = prepare(f'--input={name}', status=2)
        assert why in result.err and result.err.count('\n') == 1 and len(result.err) < 600, result.err
        assert os.listdir(place / 'data') == []


def test_a_folder_that_may_not_be_read(place, monkeypatch, capsys):
    """os.walk tells of it to who asks; the files in there would be missing."""
    def walk(folder, onerror):
        onerror(PermissionError(13, 'Permission denied', f'{folder}/closed'))
        return iter([])
    monkeypatch.setattr(os, 'walk', walk)
    with pytest.raises(SystemExit):
        documents.find(str(place))
    assert f'{place}/closed cannot be read (Permission denied)' in capsys.readouterr().err


def test_standard_input_that_is_closed(place):
    result = subprocess.run(f'{sys.executable} {ROOT}/prepare.py --input=- --dataset=x <&-', shell=True, cwd=place,
                            capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count('\n') == 1 and '0 characters' in result.stderr
    assert os.listdir(place / 'data') == []


def test_standard_input(prepare, place):
    (place / 'x.txt').write_text(some_text())
    prepare('--input=-', code='sys.stdin = open("x.txt")')
    files = tokens.read_meta(place / 'data/x')['files']
    prepare('--input=x.txt', '--overwrite')
    assert tokens.read_meta(place / 'data/x')['files'] == files


@pytest.mark.parametrize('split, counts', [('90,5,5', [90, 5, 5]), ('98, 2, 0', [98, 2, 0]),
                                           ('99.8,0.1,0.1', [998, 1, 1]), ('37.5,37.5,25', [75, 75, 50])])
def test_documents_are_dealt(split, counts):
    """Exactly as many of each run, others for another seed, and the same wherever one begins to ask."""
    assert bins.parse_split(split) == counts
    run = sum(counts)
    codes = bins.deal(0, 5 * run, counts, 1)
    for i in range(5):
        assert np.bincount(codes[i * run:][:run], minlength=3).tolist() == counts
    assert np.array_equal(bins.deal(run // 3, 3 * run + 7, counts, 1), codes[run // 3:3 * run + 7])
    assert not np.array_equal(codes, bins.deal(0, 5 * run, counts, 2))
    assert not np.array_equal(codes[:run], codes[run:2 * run])


def test_shards_train(prepare, run, place):
    write_jsonl(place / 'x.jsonl', DOCUMENTS)
    prepare('--input=x.jsonl', '--shard_size=2000')
    folder = place / 'data/x'
    n_shards = len(list(folder.glob('train_*.bin')))
    assert n_shards > 5 and not (folder / 'train.bin').exists() and (folder / 'val.bin').exists()
    assert all(path.stat().st_size <= 4000 for path in folder.glob('*.bin'))
    chars = sorted(set(''.join(DOCUMENTS)))
    check(folder, expected(lambda text: [chars.index(c) for c in text], len(chars)))
    result = run('train.py', '--dataset=x', *TINY, '--max_iters=2')
    assert result.status == 0, result.err
    assert "did you mean x?" in run('train.py', '--dataset=xx', *TINY).err
    result = prepare('--input=x.jsonl', '--tokenizer=byte', status=2)
    assert 'made with char' in result.err and '--overwrite' in result.err
    (place / 'x.txt').write_text(some_text())
    prepare('--input=x.txt', '--tokenizer=byte', '--overwrite')  # nothing of the old one stays
    assert {path.name for path in folder.iterdir()} == {'train.bin', 'val.bin', 'test.bin', 'meta.json'}


# ---------------------------------------------------------------------------------------------------------------------
# pairs

PAIRS = [(f'Frage {i}', some_text(1 + i % 30, seed=i).replace('\n', ' ')) for i in range(150)] + [('', 'no prompt')]


def read_pairs(folder):
    """{split: [(prompt, response)]}, by the rows alone, which lie without a gap."""
    data, meta = tokens.read_dataset(folder)
    text, found = tokens.tokenizer(meta['tokenizer']), {}
    for split, values in data.items():
        rows = tokens.read_rows(folder, split, len(values), meta)
        assert rows[0, 0] == 0 and rows[-1, 2] == len(values) and (rows[1:, 0] == rows[:-1, 2]).all()
        assert {values[i - 1] for i in rows[:, 1:].ravel()} == {meta['end_of_text']} and meta['pairs']
        found[split] = [(tokens.decode(text, values[a:b - 1]), tokens.decode(text, values[b:c - 1]))
                        for a, b, c in rows.tolist()]
        assert meta['documents'][split] == len(rows)
    return found


@pytest.mark.parametrize('name, tokenizer', [('x.tsv', 'char'), ('x.tsv', 'byte'), ('x.jsonl', 'char')])
def test_pairs(prepare, place, name, tokenizer):
    if name == 'x.tsv':
        (place / name).write_text(''.join(f'{prompt}\t{response}\n' for prompt, response in PAIRS))
        prepare('--input=x.tsv', f'--tokenizer={tokenizer}')
    else:
        (place / name).write_text(''.join(json.dumps(dict(zip(('prompt', 'response'), pair))) + '\n' for pair in PAIRS))
        prepare('--input=x.jsonl', '--pairs')
    found, codes = read_pairs(place / 'data/x'), bins.deal(0, len(PAIRS), [90, 5, 5], 1337)
    assert found == {split: [pair for pair, code in zip(PAIRS, codes) if code == i]
                     for i, split in enumerate(('train', 'val', 'test'))}


def test_few_pairs(prepare, place):
    (place / 'x.tsv').write_text(''.join(f'{prompt}\t{response}\n' for prompt, response in PAIRS[:15]))
    prepare('--input=x.tsv')
    assert read_pairs(place / 'data/x') == {'train': PAIRS[:13], 'val': PAIRS[13:14], 'test': PAIRS[14:15]}
    (place / 'y.tsv').write_text('what is asked' * 10 + '\tan answer\n')
    assert 'too few' in prepare('--input=y.tsv', '--overwrite', status=2).err
    assert read_pairs(place / 'data/x')  # the old one is as it was


def test_python_docstrings(run, place):
    assert run('prepare.py', 'python_docstrings').status == 0
    found = read_pairs(place / 'data/python_docstrings')
    sources = [source for pairs in found.values() for source, _ in pairs]
    docstrings = [docstring for pairs in found.values() for _, docstring in pairs]
    assert len(sources) == len(set(sources)) == len(set(docstrings)) > 2000
    for source, docstring in found['val'] + found['test']:
        function = ast.parse(source).body[0]
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and not ast.get_docstring(function)
        assert len(source) <= 400 and 10 <= len(docstring) <= 100


# ---------------------------------------------------------------------------------------------------------------------
# what ends a document inside of a text


@needs_mirror
@pytest.mark.parametrize('tokenizer', ['char', 'byte', 'bpe', 'gpt2'])
def test_separator(prepare, place, tokenizer):
    """Wherever it stands, in a file or a row, a document ends; without --separator it is text, and counted."""
    stories = [f'\nStory {i} begins: {some_text(20 + i % 90, seed=i)}' for i in range(300)]
    (place / 'x.txt').write_text(END.join(stories[:200]) + END + ' \n')
    write_jsonl(place / 'y.jsonl', [END + END.join(stories[200:250]), f' {END}{END}\n', *stories[250:]])
    command = ['--input=x.txt,y.jsonl', f'--tokenizer={tokenizer}', '--vocab_size=300']
    small, env = 'from kit.data import bins, documents; documents.BLOCK = 97', {'FLATGPT_MIRROR': str(MIRROR)}
    result = prepare(*command, f'--separator={END}', code=small, env=env)
    meta = tokens.read_meta(place / 'data/x')
    assert meta['separator'] == END and 'plain text' not in result.out and '300 documents' in result.out
    text, ids = tokens.tokenizer(meta['tokenizer']), lambda piece: text.encode(piece)
    if tokenizer == 'char':
        ids = lambda piece: [meta['tokenizer']['chars'].index(char) for char in piece]  # noqa: E731
        assert not set('<|>') & set(meta['tokenizer']['chars'])
    check(place / 'data/x', expected(ids, meta['end_of_text'], stories))
    result = prepare(*command, '--overwrite', code=small, env=env)
    assert f"{END} stands 252 times in the text, as plain text; --separator='{END}' makes it the end" in result.out
    data, meta = tokens.read_dataset(place / 'data/x')
    whole = np.concatenate([data[split] for split in ('train', 'val', 'test')])
    assert 'separator' not in meta and sum(meta['documents'].values()) == 53
    assert int((whole == meta['end_of_text']).sum()) == 53


def test_separators_across_pieces(place, monkeypatch):
    draw = random.Random(5)
    for _ in range(300):
        monkeypatch.setattr(documents, 'BLOCK', draw.choice([3, 7, 20, 97]))
        monkeypatch.setattr(documents, 'PATIENCE', draw.choice([1, 3]))
        separator = draw.choice([END, 'a', 'ab', '\n\n', 'aa', 'b a', 'aab', ' '])
        letters = draw.choice(['ab ', 'a', '<|endoftext|> ', '\n a', '\u4e16b '])
        text = draw.choice([separator, END]).join(''.join(draw.choices(letters, k=draw.randint(0, 60))) for _ in 'abc')
        (place / 'x.txt').write_bytes(text.encode())
        assert read_all(place / 'x.txt', separator=separator) == [t for t in text.split(separator) if t.strip()]
        pieces = list(documents.read([place / 'x.txt'], bar=tqdm(disable=True)))
        assert sum(piece.count(END) for piece, _ in pieces) == text.count(END)  # none is cut apart


def test_separator_that_stands_nowhere(prepare, place):
    text(place / 'x.txt', some_text())
    assert f'{END!r} divides nothing' in prepare('--input=x.txt', f'--separator={END}').out
    _, meta = tokens.read_dataset(place / 'data/x')
    assert 'separator' not in meta and 'documents' not in meta


def test_marks_beside_another_separator_are_counted(prepare, place):
    text(place / 'x.txt', f'once upon{END} a time\n\n' * 40)
    result = prepare('--input=x.txt', '--separator=\n\n')
    assert f'{END} stands 40 times in the text, as plain text\n' in result.out and '40 documents' in result.out


def test_a_typo_in_a_separator(prepare, place):
    """Of several files it makes no more documents than these are; rows are documents anyhow."""
    for name in 'a.txt', 'b.txt':
        text(place / name, f'once upon{END} a time ' * 40)
    result = prepare('--input=a.txt,b.txt', '--separator=<|endoftxt|>')
    assert "'<|endoftxt|>' divides nothing in the text: it has 2 documents and 2 files" in result.out
    assert f'{END} stands 80 times' in result.out
    assert 'divides' not in prepare('--input=a.txt,b.txt', f'--separator={END}', '--overwrite').out
    result = prepare('--input=-', '--separator=<|endoftxt|>', '--overwrite', code='sys.stdin = open("a.txt")')
    assert 'divides nothing' in result.out


def test_separator_is_not_for_all(prepare, run, place):
    text(place / 'a.tsv', 'x\ty\n' * 200)
    for result in (prepare('--input=a.tsv', f'--separator={END}', status=2),
                   run('prepare.py', 'python_docs', f'--separator={END}')):
        assert result.status == 2 and result.err.count('\n') == 1 and f"--separator='{END}'" in result.err
        assert os.listdir(place / 'data') == []


# ---------------------------------------------------------------------------------------------------------------------
# files that are cut off


def zst_frames(text):
    """Some frames, with and without a checksum and the size of what is in them, and one that holds no text."""
    zstandard = pytest.importorskip('zstandard')
    size = len(text) // 5 + 1
    frames = [zstandard.ZstdCompressor(write_checksum=i % 2 == 0, write_content_size=i % 3 == 0).compress(
        text[i * size:(i + 1) * size]) for i in range(5)]
    return [*frames[:2], b'\x53\x2a\x4d\x18\x04\0\0\0abcd', *frames[2:], zstandard.compress(b'x' * 10**6 + b'\n')]


def gz_members(text):
    return [gzip.compress(text[:3000]), gzip.compress(text[3000:])]


def parquet_bytes(text):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({'text': text.decode().split('\n')}), sink)
    return [sink.getvalue().to_pybytes()]


@pytest.mark.parametrize('name, pack', [('x.txt.zst', zst_frames), ('x.txt.gz', gz_members),
                                        ('x.parquet', parquet_bytes)])
def test_the_end_is_seen(place, capsys, name, pack):
    """Cut off anywhere but between two frames, where nobody can know, or with something behind: one line."""
    data = some_text(9000).encode() + os.urandom(400).hex().encode()
    parts = pack(data)
    whole, borders = b''.join(parts), {sum(map(len, parts[:i])) for i in range(1, len(parts) + 1)}
    (place / name).write_bytes(whole)
    assert len(''.join(read_all(place / name))) > 9000
    cuts = {*range(40), *range(len(whole) - 40, len(whole)), *range(0, len(whole), 61)} - borders
    for cut in sorted(cuts):
        (place / name).write_bytes(whole[:cut])
        with pytest.raises(SystemExit):
            read_all(place / name)
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and name in err and 'cut off' in err, (cut, err)
    (place / name).write_bytes(whole + b'garbage')
    with pytest.raises(SystemExit):
        read_all(place / name)


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


def text(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


GOOD = json.dumps({'text': 'some words ' * 50}) + '\n'

MISTAKES = {
    'no JSON': ('a.jsonl', GOOD + GOOD + '{"text": "x\n' + GOOD, [], ['a.jsonl, line 3', 'JSON']),
    'no object': ('a.jsonl', GOOD + '[1, 2]\n', [], ['a.jsonl, line 2', '[1, 2]']),
    'no key': ('a.jsonl', GOOD + '{"body": "x", "n": 1}\n', [],
               ['a.jsonl, line 2', 'text', 'body, n', '--text_key=body']),
    'no text': ('a.jsonl', GOOD + '{"text": null}\n', [], ['a.jsonl, line 2', 'None']),
    'pairs': ('a.jsonl', '{"prompt": "x", "response": "y"}\n', [], ['a.jsonl, line 1', '--pairs']),
    'no pairs': ('a.jsonl', GOOD, ['--pairs'], ['a.jsonl, line 1', 'prompt', 'response']),
    'text as pairs': ('a.txt', 'x' * 200, ['--pairs'], ['a.txt', '.tsv', 'prompt']),
    'no column': ('a.csv', 'body,n\n' + 'x,1\n' * 9, [], ['a.csv, line 2', 'body, n', '--text_key=body']),
    'a short row': ('a.csv', 'text,n\nx,1\n"a\nb"\n', [], ['a.csv, line 4', '1 columns']),
    'three columns': ('a.tsv', 'x\ty\nx\ty\tz\n', [], ['a.tsv, line 2', '3', 'tab']),
    'no response': ('a.tsv', 'x\ty\nx\t\n', [], ['a.tsv, line 2', 'empty']),
    'no UTF-8': ('a.txt', b'\xef\xbb\xbf' + b'a' * 3000 + b'\xe4\xb8', [],
                 ['a.txt', 'offset 3003', '--errors=replace']),
    'no UTF-8 in a row': ('a.jsonl', GOOD.encode() + b'{"text": "\xff"}\n', [],
                          ['a.jsonl', f'offset {len(GOOD) + 10}', '--errors=replace']),
    'half a character': ('a.jsonl', GOOD + '{"text": "\\ud83d"}\n', [], ['a.jsonl, line 2', '--errors=replace']),
    'torn gzip': ('a.jsonl.gz', gzip.compress(GOOD.encode() * 99)[:-20], [], ['a.jsonl.gz']),
    'no gzip': ('a.jsonl.gz', GOOD, [], ['a.jsonl.gz', 'gzip']),
    'no zstd': ('a.jsonl.zst', GOOD, [], ['a.jsonl.zst']),
    'no parquet': ('a.parquet', GOOD, [], ['a.parquet']),
    'no array': ('a.json', '{"version": "1", "data": [{"text": "x"}]}', [], ['a.json, row 1', 'inside of data']),
    'numbers': ('a.json', '[1, 2]', [], ['a.json, row 1', 'no object']),
    'an open array': ('a.json', f'[{GOOD}', [], ['a.json, row 2', 'cut off']),
    'half a row': ('a.json', f'[{GOOD[:-9]}', [], ['a.json, row 1', 'cut off']),
    'more than an array': ('a.json', f'[{GOOD}] and {GOOD}', [], ['a.json, row 2', 'no JSON']),
    'text in .json': ('a.json', 'some words ' * 50, [], ['a.json, row 1', 'no JSON']),
    'deep JSON': ('a.json', '[' * 100_000, [], ['a.json, row 1', 'recursion']),
    'a deep line': ('a.jsonl', GOOD + '[' * 100_000, [], ['a.jsonl, line 2', 'recursion']),
    'NaN': ('a.json', f'[{GOOD}, {{"text": NaN}}]', [], ['a.json, row 2', 'nan']),
    'a key twice': ('a.json', f'[{GOOD}, {{"text": "x", "text": "y"}}]', [], ['a.json, row 2', 'twice']),
    'a key twice in a line': ('a.jsonl', GOOD + '{"text": "x", "text": "y"}', [], ['a.jsonl, line 2', 'twice']),
    'no pairs in .json': ('a.json', f'[{GOOD}]', ['--pairs'], ['a.json, row 1', 'prompt', 'response']),
    'a column twice': ('a.csv', 'text,text\nx,y\n', [], ['a.csv', 'two columns', 'text']),
    'an open quote': ('a.csv', 'n,text\n1,x\n2,"never\n3,closed\n', [], ['a.csv, line 3', 'quote']),
    'a quote in between': ('a.csv', 'n,text\n1,"x" and y\n', [], ['a.csv, line 2', 'quote']),
    'another separator': ('a.csv', 'id;body\n1;x\n', [], ['a.csv, line 2', 'id, body', '--text_key=id takes']),
    'NUL': ('a.txt', 'x' * 200 + '\0', [], ['a.txt', 'NUL', 'offset 200']),
    'NUL in a row': ('a.csv', 'text\nx\0\n', ['--errors=replace'], ['a.csv', 'NUL', 'offset 6']),
    'UTF-16': ('a.txt', ('x' * 200).encode('utf-16'), ['--errors=replace'], ['a.txt', 'UTF-16', 'iconv']),
    'UTF-16 rows': ('a.csv', 'n;text\n'.encode('utf-16'), [], ['a.csv', 'UTF-16', 'iconv']),
    'UTF-32': ('a.jsonl', GOOD.encode('utf-32-be'), [], ['a.jsonl', 'NUL', 'offset 0']),
    'UTF-16 without a mark': ('a.md', ('x' * 200).encode('utf-16-le'), [], ['a.md', 'NUL', 'UTF-16']),
    'a document of Word': ('a.docx', b'PK\x03\x04\x14\0\x06\0' + b'x' * 200, [], ['a.docx is no text']),
    'a gzip in disguise': ('a.txt', gzip.compress(GOOD.encode()), [], ['a.txt is no']),
    'an empty gzip': ('a.txt.gz', b'', [], ['a.txt.gz', 'empty']),
    'no rows': ('a.jsonl', '', [], ['0 characters']),
    'little text': ('a.txt', 'x' * 99, [], ['99 characters']),
    'few tokens': ('a.txt', '-' * 128, ['--tokenizer=gpt2'], ['2 tokens', 'too few']),
    'split': ('a.txt', 'x' * 200, ['--split=90,5'], ['split', '90,5,5']),
    'no val': ('a.txt', 'x' * 200, ['--split=95,0,5'], ['split', '90,5,5']),
    'split of words': ('a.txt', 'x' * 200, ['--split=most,some,few'], ['split', 'most']),
    'vocab_size': ('a.txt', 'x' * 200, ['--tokenizer=bpe', '--vocab_size=257'], ['vocab_size = 257', '256 bytes']),
    'errors': ('a.txt', 'x' * 200, ['--errors=ignore'], ['ignore', 'replace']),
    'no glob': ('a.txt', 'x' * 200, ['--input=b*.txt'], ['b*.txt']),
    'mixed': ('a.tsv', 'x\ty\n', ['--input=a.tsv,text.txt'], ['a.tsv', 'text.txt']),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes(prepare, place, mistake):
    name, content, args, named = MISTAKES[mistake]
    if name.endswith(('.zst', '.parquet')):
        pytest.importorskip({'.zst': 'zstandard', '.parquet': 'pyarrow'}[name[name.rindex('.'):]])
    text(place / name, content)
    text(place / 'text.txt', 'x' * 200)
    if '--tokenizer=gpt2' in args and not (MIRROR / 'tiktoken').is_dir():
        pytest.skip('needs FLATGPT_MIRROR')
    result = prepare(f'--input={name}', *args, env={'FLATGPT_MIRROR': str(MIRROR)}, status=2)
    assert result.err.count('\n') == 1, result.err
    for word in named:
        assert word in result.err, result.err
    assert os.listdir(place / 'data') == []


def test_errors_replace(prepare, place):
    text(place / 'a.jsonl', GOOD.encode() + b'{"text": "\xff"}\n{"text": "\\ud83d|\\ud83d\\ude00"}\n')
    prepare('--input=a.jsonl', '--errors=replace')
    chars = tokens.read_meta(place / 'data/x')['tokenizer']['chars']
    assert chars[-3:] == ['\ufffd', '\U0001f600', END]


@pytest.mark.parametrize('name, package', [('x.jsonl.zst', 'zstandard'), ('x.parquet', 'pyarrow'),
                                           ('hf:some/thing', 'datasets'), ('x.txt', 'tokenizers')])
def test_packages_that_are_not_there(prepare, place, name, package):
    text(place / name.replace(':', '_').replace('/', '_'), 'x' * 200)
    hide = f'import importlib.util as u; f = u.find_spec; u.find_spec = lambda n: None if n == "{package}" else f(n)'
    result = prepare(f'--input={name}', '--tokenizer=bpe', code=hide, status=2)
    assert f'pip install {package}' in result.err and result.err.count('\n') == 1
    assert os.listdir(place / 'data') == []


# ---------------------------------------------------------------------------------------------------------------------
# interruptions

# many batches, notes and files in little text
SMALL_STEPS = """
from kit.data import bins, documents
bins.BATCH, bins.N_THREADS, bins.NOTE_EVERY, bins.RAW_SHARD, bins.CHUNK, documents.BLOCK = 1500, 2, -1, 4000, 1000, 700
"""
# after so many of the calls that change something, the power goes; in append when half is written
POWER_CUT = """
import os
left = [int(os.environ['CALLS'])]
def counted(function, half):
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            half and function(*args[:2], args[2][:len(args[2]) // 2], *args[3:])
            os._exit(9)
        return function(*args, **kwargs)
    return call
for name in 'fsync', 'replace', 'unlink':
    setattr(os, name, counted(getattr(os, name), False))
bins.append = counted(bins.append, True)
"""


def is_whole(folder):
    """Whether train.py would take the folder."""
    if not tokens.exists(folder):
        return False
    try:
        tokens.read_dataset(folder)
    except SystemExit:
        return False
    return True


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


CASES = {'char': ['--input=x.jsonl', '--shard_size=5000'], 'byte': ['--input=x.txt', '--tokenizer=byte'],
         'bpe': ['--input=x.jsonl', '--tokenizer=bpe', '--vocab_size=400', '--shard_size=3000'],
         'pairs': ['--input=x.tsv'], 'separator': ['--input=x.txt', '--tokenizer=byte', '--separator=. ']}


@pytest.mark.parametrize('case', CASES)
def test_power_cuts(prepare, place, case):
    """Cut off again and again, at ever later calls, it comes to the bytes of a launch that was left alone."""
    if case == 'bpe':
        pytest.importorskip('tokenizers')
    write_jsonl(place / 'x.jsonl', DOCUMENTS)
    (place / 'x.txt').write_text(''.join(DOCUMENTS))
    (place / 'x.tsv').write_text(''.join(f'{prompt}\t{response}\n' for prompt, response in PAIRS * 5))
    prepare(*CASES[case])
    folder, whole = place / 'data/x', content(place / 'data/x')
    (place / 'old.txt').write_text(some_text())
    prepare('--input=old.txt', '--overwrite', '--shard_size=1000')  # what is to be replaced
    calls, resumed = 1, 0
    for _ in range(60):
        result = prepare(*CASES[case], '--overwrite', code=SMALL_STEPS + POWER_CUT, env={'CALLS': str(calls)})
        resumed += 'going on' in result.out
        if result.status == 0:
            break
        assert content(folder) == whole or not is_whole(folder) or tokens.read_meta(folder)['source'] == 'old.txt'
        calls += 1 + calls // 5
    assert content(folder) == whole and resumed > 5
    assert (f'{END} stands 3 times' in result.out) == (case != 'pairs')


STOPPED = """
store = bins.append
def append(folder, stem, ids, start, size):
    if start > 20_000:
        raise ERROR
    return store(folder, stem, ids, start, size)
bins.append = append
"""


@pytest.mark.parametrize('error, status', [('KeyboardInterrupt', 1), ("OSError(28, 'No space left on device')", 2)])
def test_work_within_one_document_is_kept(prepare, place, error, status):
    """A book is a single document, and it does not end before its file does."""
    (place / 'x.txt').write_text(some_text(60_000))
    prepare('--input=x.txt')
    whole = content(place / 'data/x')
    code = SMALL_STEPS + STOPPED.replace('ERROR', error)
    cut = prepare('--input=x.txt', '--overwrite', code=code, status=status)
    result = prepare('--input=x.txt', '--overwrite', code=SMALL_STEPS)
    kept = re.search('going on after ([0-9,]+) characters', result.out)[1]
    assert int(kept.replace(',', '')) >= 20_000 and content(place / 'data/x') == whole
    assert 'interrupted' in cut.err if status == 1 else f'{kept} characters are kept' in cut.err


def test_another_job_does_not_go_on(prepare, place):
    write_jsonl(place / 'x.jsonl', DOCUMENTS)
    cut = dict(code=SMALL_STEPS + POWER_CUT, env={'CALLS': '40'})
    assert prepare('--input=x.jsonl', **cut).status == 9
    left = prepare('--input=x.jsonl', '--seed=2', status=2)
    assert left.err.count('\n') == 1 and 'half-made with another seed' in left.err and '--overwrite' in left.err
    write_jsonl(place / 'x.jsonl', DOCUMENTS[1:])
    assert 'another files' in prepare('--input=x.jsonl', status=2).err
    result = prepare('--input=x.jsonl', '--overwrite')
    assert 'going on' not in result.out and not (place / 'data/x/.part').exists()
    assert sum(tokens.read_meta(place / 'data/x')['documents'].values()) == len(DOCUMENTS) - 1


@pytest.mark.parametrize('calls', [1, 30, 60, 76])
def test_a_full_disk(prepare, place, calls):
    write_jsonl(place / 'x.jsonl', DOCUMENTS)
    prepare('--input=x.jsonl')
    whole = content(place / 'data/x')
    full = POWER_CUT.replace('os._exit(9)', "raise OSError(28, 'No space left on device')")
    result = prepare('--input=x.jsonl', '--overwrite', code=SMALL_STEPS + full, env={'CALLS': str(calls)}, status=2)
    assert result.err.count('\n') == 1 and 'No space left' in result.err
    assert content(place / 'data/x') == whole  # the old one
    assert ('goes on' in result.err) == (place / 'data/x/.part').exists() == (calls > 1)
    result = prepare('--input=x.jsonl', '--overwrite', code=SMALL_STEPS)
    assert content(place / 'data/x') == whole and ('going on' in result.out) == (calls > 1)


def test_a_disk_without_room_for_a_note(prepare, place):
    write_jsonl(place / 'x.jsonl', DOCUMENTS)
    full = ("\nfrom kit.base import files\ndef full(*args):\n    raise OSError(28, 'No space left on device')\n"
            'files.write_whole = full\n')
    result = prepare('--input=x.jsonl', '--tokenizer=byte', code=SMALL_STEPS + full, status=2)
    assert 'nothing is kept' in result.err and not (place / 'data/x').exists()


def test_ctrl_c(place):
    """The real signal: one line, and the same command goes on."""
    write_jsonl(place / 'x.jsonl', DOCUMENTS)
    (place / 'cut.py').write_text(
        f'import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})\n{SMALL_STEPS}'
        'signal.signal(signal.SIGINT, signal.default_int_handler)\n'  # a shell's background job ignores it
        'store = bins.append\n'
        'def append(folder, stem, ids, start, size):\n'
        '    if start > 8000: os.kill(os.getpid(), signal.SIGINT)\n'
        '    return store(folder, stem, ids, start, size)\n'
        'bins.append = append\n'
        f'exec(open({str(ROOT / "prepare.py")!r}).read())')
    command = ['--input=x.jsonl', '--dataset=x']
    cut = subprocess.run([sys.executable, 'cut.py', *command], cwd=place, capture_output=True, text=True)
    assert cut.returncode and cut.stderr == 'cut.py: interrupted\n' and not tokens.exists(place / 'data/x')
    (place / 'cut.py').write_text((place / 'cut.py').read_text().replace('os.kill', 'print'))
    done = subprocess.run([sys.executable, 'cut.py', *command], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0 and 'going on after' in done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face

FAKE_DATASETS = """
import os, sys, types

class Stream:
    def __init__(self, name, first=0):
        self.name, self.first = name, first
    def skip(self, n):
        print('skipped', n)
        return Stream(self.name, self.first + n)
    def __iter__(self):
        for i in range(self.first, 300):
            if i == int(os.environ.get('STOP_AT', -1)):
                raise TimeoutError('the network is gone')
            yield {'n': i, 'story': f'{self.name} {i} tells of ' + 'word ' * (i % 7)}

def load_dataset(name, config='', *, split, streaming):
    assert streaming
    return Stream(f'{name}/{config}/{split}')

sys.modules['datasets'] = types.ModuleType('datasets')
sys.modules['datasets'].__spec__ = types.SimpleNamespace()
sys.modules['datasets'].load_dataset = load_dataset
"""


@pytest.mark.parametrize('name, story', [('a/b', 'a/b//train'), ('a/b:c', 'a/b/c/train'), ('a/b:c:d', 'a/b/c/d'),
                                         ('a/b::d', 'a/b//d')])
def test_streams(prepare, place, name, story):
    command, code = [f'--input=hf:{name}', '--text_key=story', '--tokenizer=byte'], SMALL_STEPS + FAKE_DATASETS
    result = prepare(*command, code=code + 'bins.BATCH = 300', env={'STOP_AT': '200'}, status=2)
    assert result.err.count('\n') == 1 and 'network is gone' in result.err and 'goes on from there' in result.err
    result = prepare(*command, code=code)
    assert re.search('going on after [0-9],[0-9]{3} characters', result.out) and 'skipped 1' in result.out
    texts = [f'{story} {i} tells of ' + 'word ' * (i % 7) for i in range(300)]
    check(place / 'data/x', expected(str.encode, 256, texts))


def test_a_stream_with_a_separator(prepare, place):
    """A row is no longer one document: what is done already is read again."""
    command = ['--input=hf:a/b', '--text_key=story', '--tokenizer=byte', '--separator= tells of ']
    code = SMALL_STEPS + FAKE_DATASETS
    result = prepare(*command, code=code + 'bins.BATCH = 300', env={'STOP_AT': '200'}, status=2)
    assert 'goes on from there' in result.err
    result = prepare(*command, code=code)
    assert 'going on after' in result.out and 'skipped' not in result.out
    texts = [text for i in range(300) for text in (f'a/b//train {i}', 'word ' * (i % 7)) if text]
    check(place / 'data/x', expected(str.encode, 256, texts))


def test_a_stream_without_the_key(prepare, place):
    result = prepare('--input=hf:a/b', code=SMALL_STEPS + FAKE_DATASETS, status=2)
    assert 'a/b, row 1' in result.err and '--text_key=n' in result.err and os.listdir(place / 'data') == []
