"""prepare.py removes nothing that it has not made; one process at a time makes a dataset; a kill at any moment."""

import functools
import hashlib
import http.server
import json
import os
import shutil
import threading

import numpy as np
import pytest
from conftest import ROOT, TINY, launch_all, some_text

from kit.base import files
from kit.data import bins, corpora, downloads, places, tokens

TEXT, OTHER = some_text(), some_text(9000, seed=1)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with data/ and two texts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'text.txt').write_text(TEXT)
    (tmp_path / 'other.txt').write_text(OTHER)
    return tmp_path


@pytest.fixture
def prepare(place, capsys):
    """prepare('text.txt', overwrite=True) -> the line of a refusal, or '': corpora.prepare, in this process."""
    def launch(source='text.txt', name='x', **settings):
        capsys.readouterr()
        try:
            corpora.prepare(name, source, **settings)
            return ''
        except SystemExit as end:
            err = capsys.readouterr().err
            assert end.code == 2 and err.count('\n') == 1, err
            return err
    return launch


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def put(folder, **texts):
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# ---------------------------------------------------------------------------------------------------------------------
# files of others


UNREAD = {name: f'mine: {name}' for name in (
    'embeddings.bin', 'x.rows.npy', 'meta.md', 'training.bin', 'meta.json.bak', 'train.txt', '.lock', '.hidden',
    'done/train.bin', 'part/progress.json', 'part/ids_000000.bin', 'part/done/train.bin', 'part/notes')}


@pytest.mark.parametrize('name', ['x', 'python_docs'])
def test_what_is_not_read_stays(prepare, place, monkeypatch, name):
    monkeypatch.setattr(corpora, 'python_documentation', lambda: [(str(i), some_text(500, i)) for i in range(60)])
    folder, source = place / 'data' / name, '' if name == 'python_docs' else 'text.txt'
    put(folder, **UNREAD)
    assert not prepare(source, name)
    made = content(folder)
    assert made.keys() == UNREAD.keys() | {'train.bin', 'val.bin', 'test.bin', 'meta.json', 'meta.pkl'}
    assert tokens.read_dataset(folder)
    assert 'already' in prepare(source, name) and content(folder) == made
    assert not prepare(source, name, overwrite=True) and content(folder) == made


IN_THE_WAY = ['train.bin', 'val.bin', 'train_000000.bin', 'train_more.bin', 'fineweb_train.bin',
              'fineweb_val_000001.bin', 'my_test.bin', 'test.rows.npy', 'meta.pkl', 'meta.json']


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('name', IN_THE_WAY)
def test_what_would_be_overwritten_or_read_is_refused(prepare, place, name, overwrite):
    """By name, before the text is looked for, and whether a dataset of ours stands beside it or not."""
    put(place / 'data/x', **{name: 'mine'})
    for known in 'x', 'shakespeare_char':
        if known != 'x':
            os.rename(place / 'data/x', place / 'data' / known)
        refused = prepare('nowhere.txt', known, overwrite=overwrite)
        assert f'data/{known}/{name} was not made' in refused and 'move or delete' in refused
        assert '--dataset=NAME' in refused and content(place / 'data') == {f'{known}/{name}': b'mine'}
    shutil.rmtree(place / 'data/shakespeare_char')
    assert not prepare()
    if not (place / 'data/x' / name).exists():
        put(place / 'data/x', **{name: 'mine'})
        before = content(place / 'data')
        assert f'data/x/{name}' in prepare(overwrite=overwrite) and content(place / 'data') == before


@pytest.mark.parametrize('kind', ['folder', 'link', 'dangling'])
def test_what_is_no_file_is_refused(prepare, place, kind):
    assert not prepare()
    path = place / 'data/x/val.bin'
    os.rename(path, place / 'val.bin')
    path.mkdir() if kind == 'folder' else path.symlink_to(place / ('val.bin' if kind == 'link' else 'nothing'))
    kept = (place / 'val.bin').read_bytes()
    assert 'data/x/val.bin' in prepare(overwrite=True)
    assert os.path.lexists(path) and (place / 'val.bin').read_bytes() == kept


def change(path):
    with open(path, 'r+b') as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


@pytest.mark.parametrize('name', ['train.bin', 'val.bin', 'test.bin', 'val.rows.npy', 'meta.pkl', 'meta.json'])
def test_a_file_of_ours_that_somebody_changed_is_theirs(prepare, place, name):
    (place / 'pairs.tsv').write_text(''.join(f'question {i}\tanswer {i * i}\n' for i in range(400)))
    assert not prepare('pairs.tsv') and (place / 'data/x/val.rows.npy').exists()
    change(place / 'data/x' / name)
    before = content(place / 'data')
    assert 'not made by prepare.py' in (refused := prepare(overwrite=True)) and content(place / 'data') == before
    (place / 'data/x' / name).unlink()
    if name != 'meta.json':  # then nothing shows any longer whose the others are
        assert name in refused and not prepare(overwrite=True)
        assert content(place / 'data/x').keys() == {'train.bin', 'val.bin', 'test.bin', 'meta.json', 'meta.pkl'}
    else:
        assert 'data/x/meta.pkl' in prepare(overwrite=True)


def test_all_that_is_in_the_way_is_named(prepare, place):
    put(place / 'data/x', **{f'{name}_train.bin': 'mine' for name in 'edcba'})
    refused = prepare(overwrite=True)
    assert 'data/x/a_train.bin, data/x/b_train.bin, data/x/c_train.bin and 2 more were not made by' in refused


def test_a_large_file_that_somebody_changed_is_theirs_too(prepare, place, monkeypatch):
    monkeypatch.setattr(tokens, 'HASH_UP_TO', 100)  # above it a start looks at the size alone
    assert not prepare()
    change(place / 'data/x/train.bin')
    before = content(place / 'data')
    assert 'data/x/train.bin' in prepare(overwrite=True) and content(place / 'data') == before


def test_datasets_of_before_are_ours(prepare, place):
    (place / 'pairs.tsv').write_text(''.join(f'question {i}\tanswer {i * i}\n' for i in range(400)))
    assert not prepare('pairs.tsv')
    meta = json.loads((place / 'data/x/meta.json').read_text())
    assert {*meta.pop('rows')} == {f'{split}.rows.npy' for split in bins.SPLITS}
    (place / 'data/x/meta.json').write_text(json.dumps(meta))
    assert not prepare(overwrite=True)
    assert not list((place / 'data/x').glob('*.npy')) and tokens.read_dataset(place / 'data/x')


def test_a_meta_file_names_nothing_outside(prepare, place):
    """However well it knows a file elsewhere, that is not removed; nor is one in the folder that no dataset has."""
    assert not prepare()
    ids = np.arange(500, dtype='<u2').tobytes()
    for path in place / 'thesis.bin', place / 'data/x/thesis.bin':
        path.write_bytes(ids)
    meta = json.loads((place / 'data/x/meta.json').read_text())
    for stem in '../../thesis', str(place / 'thesis'), 'thesis':
        meta['files'][stem] = {'tokens': 500, 'sha256': hashlib.sha256(ids).hexdigest()}
    (place / 'data/x/meta.json').write_text(json.dumps(meta))
    assert not prepare('other.txt', overwrite=True)
    assert (place / 'thesis.bin').read_bytes() == ids == (place / 'data/x/thesis.bin').read_bytes()


@pytest.mark.parametrize('meta', ['', '[]', '3', 'null', '{}', '[' * 100_000, '{"files": {"train": {"tokens": 1e400}}}',
                                  '{"dtype": "x", "files": [], "source": 1, "split": 1, "tokenizer": {"kind": []}}'])
def test_a_hostile_meta_file_is_theirs(prepare, place, meta):
    put(place / 'data/x', **{'meta.json': meta})
    assert 'data/x/meta.json' in prepare(overwrite=True) and content(place / 'data/x') == {'meta.json': meta.encode()}


@pytest.mark.parametrize('source', ['data/x/part', 'data/x/ch1.txt', 'data/x', 'data/x/part/*.txt', 'data/x/input.txt'])
def test_the_input_may_lie_in_the_dataset_folder(prepare, place, source):
    texts = {'part/ch1.txt': TEXT, 'part/input.txt': OTHER, 'ch1.txt': TEXT, 'input.txt': OTHER}
    put(place / 'data/x', **texts)
    for overwrite in False, True:
        assert not prepare(source, overwrite=overwrite)
        made = content(place / 'data/x')
        assert tokens.read_dataset(place / 'data/x') and {name: made[name].decode() for name in texts} == texts


def test_the_input_may_not_lie_where_the_work_is_done(prepare, place):
    put(place / 'data/x/.part', **{'.lock': '', 'input.txt': TEXT})
    os.link(place / 'data/x/.part/input.txt', place / 'kept.txt')
    assert 'elsewhere' in prepare('data/x/.part/input.txt') and (place / 'kept.txt').read_text() == TEXT


# ---------------------------------------------------------------------------------------------------------------------
# the folder in which the work is done


@pytest.mark.parametrize('there', [{'notes': 'mine'}, {'input.txt': 'mine'}, {'.lock': '', 'notes': 'mine'},
                                   {'.lock': '', 'done/notes': 'mine'}, {'.lock': '', 'ids_000000.bin/a': 'mine'},
                                   {'.lock': '', 'ids_mine.bin': 'mine'}, {'.lock': '', 'done/meta.md': 'mine'}])
def test_strange_files_where_the_work_is_done_are_refused(prepare, place, there):
    put(place / 'data/x/.part', **there)
    refused = prepare(overwrite=True)
    assert 'data/x/.part/' in refused and 'move it away' in refused and 'mine' in str(content(place / 'data/x/.part'))


@pytest.mark.parametrize('link', ['x/.part', 'x/.part/done', 'x/.part/.lock', 'x/.part/input.txt'])
def test_links_are_not_followed(prepare, place, link):
    put(place / 'mine', **{'train.bin': 'mine', 'progress.json': 'mine', 'file': 'mine'})
    if link.startswith('x/.part/'):
        put(place / 'data/x/.part', **{'.lock': ''})
        (place / 'data' / link).unlink(missing_ok=True)
    (place / 'data/x' if '/' in link else place).mkdir(exist_ok=True)
    is_folder = link.endswith(('x', 'part', 'done'))
    (place / 'data' / link).symlink_to(place / 'mine' if is_folder else place / 'mine/file')
    before = content(place / 'mine')
    assert f'data/{link}' in prepare(overwrite=True) and content(place / 'mine') == before
    assert (place / 'data' / link).is_symlink()


@pytest.mark.parametrize('at', ['data/x', 'data/x/.part'])
def test_a_file_in_place_of_a_folder(prepare, place, at):
    (place / at).parent.mkdir(exist_ok=True)
    (place / at).write_text('mine')
    assert at in prepare() and (place / at).read_text() == 'mine'


@pytest.mark.skipif(not os.path.isdir('/proc/self'), reason='needs a place where nobody can write')
def test_a_place_where_nothing_can_be_written(run, place):
    (place / 'data').rmdir()
    (place / 'data').symlink_to('/proc/self')
    result = run('prepare.py', '--input=text.txt', '--dataset=x')
    assert result.status == 2 and result.err.count('\n') == 1 and 'data/x' in result.err


def test_mistakes_leave_the_folder_as_it_was(prepare, place):
    put(place / 'data/x', notes='mine')
    (place / 'empty.txt').touch()
    for source in 'nowhere.txt', 'empty.txt':
        assert source in prepare(source) and content(place / 'data') == {'x/notes': b'mine'}
        assert source in prepare(source, 'y') and os.listdir(place / 'data') == ['x']


# ---------------------------------------------------------------------------------------------------------------------
# kills


class Killed(BaseException):
    pass


@pytest.fixture
def killed(monkeypatch):
    """killed(function, n): the nth of the calls that change a name is the last; after it there are no others."""
    def launch(function, n):
        calls = [0]

        def counted(call):
            def wrapped(*args, **kwargs):
                calls[0] += 1
                if calls[0] > n:
                    raise Killed
                return call(*args, **kwargs)
            return wrapped
        with monkeypatch.context() as patch:
            for name in 'replace', 'unlink', 'rmdir', 'mkdir':
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                function()
                return False
            except Killed:
                return True
    return launch


@pytest.mark.parametrize('name', ['x', 'shakespeare_char'])
def test_a_kill_at_any_moment(prepare, killed, place, monkeypatch, name):
    """What is there then is the old dataset, none, or the new one; and the same command comes to the same bytes."""
    def known(source):
        monkeypatch.setattr(corpora, 'SHAKESPEARE_SHA256', hashlib.sha256((place / source).read_bytes()).hexdigest())
    folder, n, moments = place / 'data' / name, 0, set()
    command = functools.partial(prepare, 'text.txt', name, overwrite=True)
    whole = {}
    for source in 'other.txt', 'text.txt':
        known(source)
        assert not prepare(source, name, overwrite=True)
        whole[source] = content(folder)
    put(folder, **UNREAD)
    is_killed = True
    while is_killed:
        known('other.txt')
        assert not prepare('other.txt', name, overwrite=True)
        known('text.txt')
        is_killed = killed(command, n)
        n += 1
        there = content(folder)
        assert UNREAD.keys() <= there.keys()
        try:
            tokens.read_dataset(folder)
            is_there = [source for source in whole if all(there[file] == whole[source][file] for file in whole[source])]
            assert len(is_there) == 1
            moments |= {*is_there}
        except SystemExit:
            moments.add('none')
        assert not command()
        assert content(folder) == whole['text.txt'] | {file: text.encode() for file, text in UNREAD.items()}
    assert moments == {'other.txt', 'text.txt', 'none'} and n > 15


def test_what_a_kill_has_left_goes_with_the_next_command(prepare, killed, place):
    """Whichever that is, where it cannot be gone on with: nothing stays for ever."""
    put(place / 'data/x/.part', **{'.lock': '', 'input.txt': 'half of what', '.progress.json.12.part': '{'})
    assert 'nowhere.txt' in prepare('nowhere.txt') and os.listdir(place / 'data') == []
    put(place / 'data/x/.part', **{'.lock': '', 'input.txt': 'half of what', 'done/train.bin': 'half'})
    assert not prepare() and not (place / 'data/x/.part').exists()
    put(place / 'data/x/.part', **{'.lock': '', 'done/train.bin': 'half'})
    assert 'already' in prepare() and not (place / 'data/x/.part').exists()


def half_made(prepare, place, monkeypatch, **settings):
    """data/x/.part, of which a note says that it can be gone on with."""
    (place / 'rows.jsonl').write_text(''.join(json.dumps({'text': some_text(200, i)}) + '\n' for i in range(300)))
    lay_out = bins.lay_out

    def full(*args):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(bins, 'lay_out', full)
    assert 'goes on' in prepare('rows.jsonl', **settings)
    monkeypatch.setattr(bins, 'lay_out', lay_out)
    return place / 'data/x/.part'


def test_a_foreign_file_that_comes_meanwhile(prepare, place, monkeypatch):
    """The work of hours is not lost for it."""
    half_made(prepare, place, monkeypatch)
    put(place / 'data/x', **{'val.bin': 'mine'})
    assert 'data/x/val.bin' in prepare('rows.jsonl') and (place / 'data/x/.part/ids_000000.bin').exists()
    install = places.install

    def late(*args):
        put(place / 'data/x', **{'val.bin': 'mine'})
        return install(*args)
    (place / 'data/x/val.bin').unlink()
    monkeypatch.setattr(places, 'install', late)
    refused = prepare('rows.jsonl')
    assert 'data/x/val.bin' in refused and f'{300 * 200:,} characters are kept' in refused
    assert (place / 'data/x/val.bin').read_text() == 'mine' and not (place / 'data/x/train.bin').exists()
    monkeypatch.setattr(places, 'install', install)
    (place / 'data/x/val.bin').unlink()
    assert not prepare('rows.jsonl') and tokens.read_dataset(place / 'data/x')


@pytest.mark.parametrize('damage', ['two tokens', 'cut off'])
def test_a_damaged_tokenizer_is_said_and_not_believed(prepare, place, monkeypatch, capsys, damage):
    """That of a half-made dataset: other ids would come, or none could be read."""
    pytest.importorskip('tokenizers')
    make = functools.partial(prepare, 'rows.jsonl', tokenizer='bpe', vocab_size=300)
    part = half_made(prepare, place, monkeypatch, tokenizer='bpe', vocab_size=300)
    text = (part / 'progress.json').read_text()
    ranks = json.loads(text.partition('\n')[0])['tokenizer']['ranks'].split('\n')
    swapped = text.replace('\\n'.join(ranks[-2:]), '\\n'.join(ranks[:-3:-1]))
    assert swapped != text
    (part / 'progress.json').write_text(swapped if damage == 'two tokens' else text[:2000])
    corpora.prepare('x', 'rows.jsonl', tokenizer='bpe', vocab_size=300)
    assert 'progress.json is damaged' in capsys.readouterr().out
    resumed = content(place / 'data/x')
    assert not make(overwrite=True) and content(place / 'data/x') == resumed


@pytest.mark.parametrize('damage', ['one number', 'cut off', 'other JSON', 'no text'])
def test_a_damaged_note_is_said_and_not_believed(prepare, place, monkeypatch, capsys, damage):
    part = half_made(prepare, place, monkeypatch)
    text = (part / 'progress.json').read_text()
    assert '"documents": 300' in text
    damaged = {'one number': text.replace('"documents": 300', '"documents": 299').encode(),
               'cut off': text[:-70].encode(), 'other JSON': b'[]\n', 'no text': b'\xff'}
    (part / 'progress.json').write_bytes(damaged[damage])
    corpora.prepare('x', 'rows.jsonl')
    assert 'progress.json is damaged' in capsys.readouterr().out
    assert tokens.read_meta(place / 'data/x')['documents'] == {'train': 270, 'val': 15, 'test': 15}


# ---------------------------------------------------------------------------------------------------------------------
# one process at a time


@pytest.mark.parametrize('words', [['--input=text.txt', '--dataset=x'], ['python_docs'], ['python_docstrings'],
                                   ['--input=text.txt', '--dataset=x', '--overwrite']])
def test_another_process_is_preparing(run, place, words):
    name = words[0] if words[0].startswith('python') else 'x'
    part = place / 'data' / name / '.part'
    part.mkdir(parents=True)
    lock = files.lock(part)
    (part / 'ids_000000.bin').write_text('of the other process')
    result = run('prepare.py', *words)
    assert result.status == 2 and result.err.count('\n') == 1
    assert f'another process is preparing data/{name}' in result.err and 'wait' in result.err
    assert (part / 'ids_000000.bin').read_text() == 'of the other process' and not (part.parent / 'meta.json').exists()
    lock.close()
    if name == 'x':
        assert run('prepare.py', *words).status == 0 and not part.exists()


@pytest.mark.parametrize('name', ['book', 'openwebtext'])
def test_a_first_run_on_a_set_that_is_being_made(run, place, name):
    (place / f'data/{name}/.part').mkdir(parents=True)
    lock = files.lock(place / f'data/{name}/.part')
    result = run('train.py', f'--dataset={name}', *TINY)
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    assert f"dataset = '{name}': another process is preparing it; wait" in result.err
    lock.close()
    assert 'prepare.py' in (left := run('train.py', f'--dataset={name}', *TINY).err) and 'another process' not in left
    assert os.listdir(place / f'data/{name}/.part') == ['.lock']  # a look changes nothing


def test_three_first_runs_at_once_make_the_dataset_once(zygote, tmp_path):
    clone = tmp_path / 'clone'  # a fresh one, without datasets
    shutil.copytree(ROOT / 'kit', clone / 'kit')
    for script in 'train.py', 'model.py', 'attention.py':
        shutil.copy(ROOT / script, clone)
    result = launch_all(zygote, tmp_path, str(clone / 'train.py'), [*TINY, '--dry_run', '--dataset=python_docs'], clone,
                        [{**os.environ}] * 3)
    assert result.status == 0 and result.err == '', result.err
    assert result.out.count('preparing the dataset python_docs') == 1
    assert sorted(os.listdir(clone / 'data')) == ['python_docs']
    assert tokens.read_dataset(clone / 'data/python_docs') and not (clone / 'data/python_docs/.part').exists()


def test_who_waits_takes_what_is_there_then_or_makes_it(place, monkeypatch, capsys):
    """Also where the one that was waited for fails, and removes the folder that it had made."""
    monkeypatch.setattr(corpora, 'python_documentation', lambda: [(str(i), some_text(500, i)) for i in range(60)])
    monkeypatch.setattr(tokens, 'dataset_folder', lambda name: place / 'data' / name)
    with pytest.raises(SystemExit), places.locked(place / 'data/python_docs'):
        waiting = threading.Thread(target=corpora.prepare_missing, args=['python_docs'])
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        raise SystemExit(2)
    waiting.join()
    out = capsys.readouterr().out
    assert 'another process is preparing' in out and 'preparing the dataset python_docs' in out
    before = content(place / 'data')
    assert tokens.read_dataset(place / 'data/python_docs')
    corpora.prepare_missing('python_docs')  # it was missing when train.py looked
    assert 'preparing' not in capsys.readouterr().out and content(place / 'data') == before


# ---------------------------------------------------------------------------------------------------------------------
# downloads


@pytest.fixture
def served(tmp_path):
    """(address, a list of what was asked for) of a server that gives any file as 'hello', slowly."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header('Content-Length', '5')
            self.end_headers()
            self.wfile.write(b'hel')
            self.wfile.flush()
            threading.Event().wait(0.3)
            self.wfile.write(b'lo')
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}', asked
    httpd.shutdown()


def test_two_downloads_at_once(served, tmp_path):
    url, asked = served
    path, good = tmp_path / 'got/text', hashlib.sha256(b'hello').hexdigest()
    threads = [threading.Thread(target=downloads.fetch, args=[url, path, good]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == b'hello' and len(asked) == 1 and os.listdir(tmp_path / 'got') == ['text']


def test_what_a_killed_download_has_left_goes(served, tmp_path):
    put(tmp_path / 'got', **{'.text.part': 'much longer than what comes', '.lock': ''})
    downloads.fetch(served[0], tmp_path / 'got/text', hashlib.sha256(b'hello').hexdigest())
    assert content(tmp_path / 'got') == {'text': b'hello'}


def test_a_download_follows_no_link(served, tmp_path):
    (tmp_path / 'thesis').write_text('years of work')
    (tmp_path / 'got').mkdir()
    (tmp_path / 'got/.text.part').symlink_to(tmp_path / 'thesis')
    with pytest.raises(OSError, match='a link'):
        downloads.fetch(served[0], tmp_path / 'got/text')
    assert (tmp_path / 'thesis').read_text() == 'years of work' and not (tmp_path / 'got/text').exists()
