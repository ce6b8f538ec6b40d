"""bench/gpu_check.py where there is no GPU: the whole script with tiny models, and what makes it FAIL."""

import json
import os

import pytest
import torch
from conftest import ROOT

CHECK = 'bench/gpu_check.py'
CORRECT = 'machine', 'optimizer', 'numbers', 'attention', 'flex', 'runs', 'waits', 'ranks', 'resume', 'giant'
TIMED = 'minutes', 'speed', 'pace'


@pytest.mark.long
def test_all_of_it_on_a_cpu(run, tmp_path):
    folder = tmp_path / 'temporary'
    folder.mkdir()
    result = run(CHECK, '--cpu', '--json=rows.json', '--seconds=3000', env={'TMPDIR': str(folder)})
    assert result.status == 0, result.out + result.err
    rows = json.loads((tmp_path / 'rows.json').read_text())
    verdicts = {section: {row['verdict'] for row in rows if row['section'] == section} for section in CORRECT + TIMED}
    assert all('ok' in verdicts[section] for section in CORRECT)
    assert all(verdicts[section] == {''} for section in TIMED), 'a busy CPU is no measure'
    assert {row['section'] for row in rows if ' ms' in row['found']} >= {'speed', 'pace'}
    assert f'{len(rows)} rows in ' in result.out and '0 FAIL' in result.out and 'no time' not in result.out
    left = [name for name in os.listdir(folder) if not name.startswith('torchinductor_')]  # torch's own, once imported
    assert not left, 'it leaves nothing behind'


@pytest.mark.parametrize('patch, failed', [
    ('optimizers.step = lambda optimizer, is_good: optimizer.step()', 'optimizer: in a bad step nothing moves'),
    ('devices.usage = lambda device: 1 / 0', 'machine: the rest of it'),
])
def test_what_does_not_hold_fails_and_the_others_go_on(run, tmp_path, patch, failed):
    (tmp_path / 'patched.py').write_text(
        f'import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom kit.base import devices\n'
        f'from kit.learn import optimizers\n{patch}\nrunpy.run_path({str(ROOT / CHECK)!r}, run_name="__main__")\n')
    result = run(tmp_path / 'patched.py', '--cpu', '--only=machine,optimizer')
    assert result.status == 1
    assert '1 FAIL' in result.out and result.out.rstrip().endswith(failed)
    assert 'ok   optimizer clipped' in result.out


def test_a_run_that_fails_is_told_with_its_output(run, tmp_path):
    (tmp_path / 'patched.py').write_text(
        'import runpy, subprocess\nstart = subprocess.Popen\n'
        'subprocess.Popen = lambda words, **how: start([*words, "--learning_rate=-1"], **how)\n'
        f'runpy.run_path({str(ROOT / CHECK)!r}, run_name="__main__")\n')
    result = run(tmp_path / 'patched.py', '--cpu', '--only=waits,pace')
    assert result.status == 1 and 'learning_rate = -1' in result.out
    assert 'waits: waits_ema: where the host waits' in result.out and 'pace: the rest of it' in result.out


def test_what_there_is_no_time_for_is_left_out_and_said(run):
    result = run(CHECK, '--cpu', '--seconds=10', '--only=numbers,optimizer')
    assert result.status == 3 and 'ok   optimizer' in result.out, 'not all was checked'
    assert 'and it needs 60' in result.out and result.out.rstrip().endswith('numbers: all of it')


def test_a_file_that_cannot_be_written_is_told_at_once(run):
    result = run(CHECK, '--cpu', '--json=nowhere/rows.json')
    assert result.status == 2 and result.err.count('\n') == 1 and 'there is no such folder' in result.err


def test_mistakes_are_one_line(run):
    result = run(CHECK, '--cpu', '--only=number')
    assert result.status == 2 and result.err.count('\n') == 1 and "'number' is no section" in result.err
    assert 'numbers, optimizer' in result.err


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_says_how_to_try_it(run):
    result = run(CHECK)
    assert result.status == 2 and result.err.count('\n') == 1 and '--cpu' in result.err
