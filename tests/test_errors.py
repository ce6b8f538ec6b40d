"""Errors as one line, streams that are closed, files that are links, the lock on a folder."""

import os
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

from kit.base import errors, files


def line_of(capsys):
    line, = capsys.readouterr().err.splitlines()
    return line.partition(': ')[2]


@pytest.mark.parametrize('error, words', [
    (FileNotFoundError(2, 'No such file or directory', 'x'), 'No such file or directory'),
    (ValueError('two\nlines'), 'ValueError: two lines'), (MemoryError(), 'MemoryError'),
    (RecursionError('x' * 3000), 'RecursionError: ...')])
def test_an_error_in_words(error, words, capsys):
    with pytest.raises(SystemExit) as end, errors.explained('it fails', 'mend it'):
        raise error
    assert end.value.code == 2 and line_of(capsys) == f'it fails ({words}); mend it'


def test_what_ended_the_script_is_not_explained_again(capsys):
    with pytest.raises(SystemExit), errors.explained('it fails', 'mend it'):
        errors.fail('once')
    assert line_of(capsys) == 'once'
    with pytest.raises(KeyboardInterrupt), errors.explained('it fails', 'mend it'):
        raise KeyboardInterrupt


@pytest.mark.parametrize('error, status, lines', [
    ('OSError(28, "No space left on device", "f")', 1, ['x.py: f: No space left on device']),
    ('MemoryError()', 1, ['x.py: MemoryError']), ('KeyboardInterrupt()', 130, ['x.py: interrupted'])])
def test_faults_of_the_machine_are_one_line(tmp_path, error, status, lines):
    (tmp_path / 'x.py').write_text(f'import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom kit.base import overrides\n'
                                   f'overrides.apply(globals())\nraise {error}\n')
    done = subprocess.run([sys.executable, tmp_path / 'x.py'], capture_output=True, text=True)
    assert (done.returncode % 256, done.stderr.splitlines()) in ((status, lines), (254, lines))


def test_closed_streams_are_the_null_device(tmp_path):
    """Else the first file that is opened, here or in a child, has the number of a stream, and gets what is printed."""
    (tmp_path / 'x.py').write_text(
        f'import subprocess, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom kit.base import errors\n'
        'file = open("file", "w")\nprint("printed")\nsys.stderr.write("told")\nassert sys.stdin.read() == ""\n'
        'child = "assert open(\'below\', \'w\').fileno() > 2; print(1)"\n'
        'subprocess.run([sys.executable, "-c", child], check=True)\nfile.write("mine")\n')
    assert subprocess.run(f'{sys.executable} x.py <&- >&- 2>&-', shell=True, cwd=tmp_path).returncode == 0
    assert (tmp_path / 'file').read_text() == 'mine'


@pytest.mark.parametrize('name, value', [('RANK', 'x'), ('WORLD_SIZE', '0'), ('WORLD_SIZE', '2'), ('RANK', '1'),
                                         ('LOCAL_RANK', '-1'), ('WORLD_SIZE', '9' * 5000)])
def test_an_environment_that_is_not_torchruns(train, tiny, name, value):
    result = train(env={name: value})
    assert result.status == 2 and name in result.err and len(result.err.splitlines()) == 1
    assert not (tiny / 'checkpoints').exists()


def test_files_are_whole_and_no_links(tmp_path):
    (tmp_path / 'mine').write_text('years of work')
    (tmp_path / 'link').symlink_to('mine')
    with pytest.raises(OSError, match='link'):
        files.open_own(tmp_path / 'link')
    (tmp_path / f'.link.{os.getpid()}.part').symlink_to('mine')  # nor by the name under which it is written first
    files.write_whole(tmp_path / 'link', 'ours')
    assert (tmp_path / 'mine').read_text() == 'years of work' and (tmp_path / 'link').read_text() == 'ours'
    assert not (tmp_path / 'link').is_symlink() and sorted(os.listdir(tmp_path)) == ['link', 'mine']


@pytest.mark.skipif(os.name != 'posix', reason='needs flock')
def test_the_lock_is_on_the_folder_that_is_there(tmp_path, monkeypatch):
    """Between the opening of its file and the lock on that the folder may be moved away, and another be there."""
    import fcntl
    folder, flock = tmp_path / 'run', fcntl.flock
    folder.mkdir()

    def moved_meanwhile(*args):
        monkeypatch.setattr(fcntl, 'flock', flock)
        folder.rename(tmp_path / 'run.1')
        folder.mkdir()
        flock(*args)
    monkeypatch.setattr(fcntl, 'flock', moved_meanwhile)
    lock = files.lock(folder)
    assert files.names(folder / '.lock', lock) and files.lock(folder) is None
    other = files.lock(tmp_path / 'run.1')
    assert other is not None
    threading.Timer(0.3, lock.close).start()
    assert files.names(folder / '.lock', files.lock(folder, waiting='another process is at it'))
