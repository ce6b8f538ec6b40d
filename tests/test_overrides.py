"""The command line of every script, on a script of six settings."""

import pytest
from conftest import HOUSE

from kit import overrides

SCRIPT = '''"""A script."""
import sys
sys.path.insert(0, {house!r})
from kit import overrides

# a group
batch_size = 12             # rows in a batch
learning_rate = 1e-3        # the rate
compile = None              # True, False or None = chosen
decay_lr = True             # whether it decays
start = 'x'                 # a text # with a hash
_private = 1
words = []
config = overrides.apply(globals(), ['0 < learning_rate < 1  # try 0.001', 'batch_size >= 1'] {operands})
print(repr((batch_size, learning_rate, compile, decay_lr, start, words)))
print(list(config.values()) == [batch_size, learning_rate, compile, decay_lr, start])
'''


@pytest.fixture
def script(run, tmp_path):
    path = tmp_path / 'script.py'

    def launch(*args, operands=''):
        path.write_text(SCRIPT.format(house=str(HOUSE), operands=operands))
        return run(path, *args)
    return launch


def outcome(result):
    assert result.status == 0, result.err
    assert result.out.splitlines()[-1] == 'True'
    return eval(result.out.splitlines()[-2])


@pytest.mark.parametrize('args, expected', [
    ([], (12, 1e-3, None, True, 'x', [])),
    (['--batch_size=8'], (8, 1e-3, None, True, 'x', [])),
    (['--batch_size', '8'], (8, 1e-3, None, True, 'x', [])),
    (['--batch_size=8', '--batch_size=9'], (9, 1e-3, None, True, 'x', [])),
    (['--learning_rate=5e-3'], (12, 5e-3, None, True, 'x', [])),
    (['--start', '-1', '--batch_size', '3'], (3, 1e-3, None, True, '-1', [])),
    (['--decay_lr=False'], (12, 1e-3, None, False, 'x', [])),
    (['--decay_lr=0'], (12, 1e-3, None, False, 'x', [])),
    (['--decay_lr', 'false', '--batch_size=2'], (2, 1e-3, None, False, 'x', [])),
    (['--decay_lr', '--batch_size=2'], (2, 1e-3, None, True, 'x', [])),
    (['--compile'], (12, 1e-3, True, True, 'x', [])),
    (['--compile=False'], (12, 1e-3, False, True, 'x', [])),
    (['--start=a=b --c'], (12, 1e-3, None, True, 'a=b --c', [])),
    (['--start=1'], (12, 1e-3, None, True, '1', [])),
    (['--start='], (12, 1e-3, None, True, '', [])),
])
def test_values(script, args, expected):
    assert outcome(script(*args)) == expected


def test_overrides_are_echoed(script):
    assert 'Overriding: batch_size = 8\n' in script('--batch_size=8').out


def test_config_files(script, tmp_path):
    (tmp_path / 'a.py').write_text('import math\n_half = 2\nbatch_size = 2 * batch_size * _half\nlearning_rate = 0.5\n')
    (tmp_path / 'b.py').write_text('if True:\n    start = f"{batch_size}"\ndecay_lr = False\ncompile = True\n')
    assert outcome(script('a.py', 'b.py')) == (48, 0.5, True, False, '48', [])
    assert outcome(script('--batch_size=3', 'a.py', '--start=y')) == (12, 0.5, None, True, 'y', [])
    (tmp_path / 'int.py').write_text('learning_rate = 1 - 1\n')
    assert 'learning_rate = 0.0' in script('int.py').err  # an int is taken for a float, then the rule counts


def test_config_files_that_import(script, tmp_path):
    (tmp_path / 'base.py').write_text('batch_size = 5\nhelper = 1\n')
    (tmp_path / 'd.py').write_text('import sys\nsys.path.insert(0, ".")\nfrom base import *\nlearning_rate = 0.25\n')
    assert outcome(script('d.py')) == (5, 0.25, None, True, 'x', [])


def test_operands(script, tmp_path):
    assert outcome(script('one', 'two.py', '--batch_size=3', operands=', operands=words'))[-1] == ['one', 'two.py']


def test_help(script):
    result = script('--batch_size=8', '--help')
    assert result.status == 0
    assert 'A script.' in result.out and 'a group' in result.out
    assert any(line.split() == ['--batch_size=12', 'rows', 'in', 'a', 'batch'] for line in result.out.splitlines())
    assert 'a text # with a hash' in result.out and '_private' not in result.out


@pytest.mark.parametrize('args, named', [
    (['--batch_sise=8'], ['--batch_sise', 'batch_size']),
    (['--batch-size=8'], ['--batch-size', 'batch_size']),
    (['--words=8'], ['--words']),
    (['--batch_size=8.0'], ['batch_size', '8.0', 'whole number']),
    (['--batch_size=many'], ['batch_size', 'many']),
    (['--batch_size'], ['batch_size', 'value']),
    (['--batch_size', '--decay_lr'], ['batch_size', 'value']),
    (['--batch_size=0'], ['batch_size = 0', 'batch_size >= 1']),
    (['--learning_rate=fast'], ['learning_rate', 'fast', 'number']),
    (['--learning_rate=nan'], ['learning_rate', 'nan', 'finite']),
    (['--learning_rate=1e999'], ['learning_rate', '1e999', 'finite']),
    (['--learning_rate=2'], ['learning_rate = 2.0', 'try 0.001']),
    (['--compile=maybe'], ['compile', 'maybe', 'True', 'False']),
    (['--decay_lr=yes'], ['decay_lr', 'yes', 'True']),
    (['-b', '8'], ['-b']),
    (['word'], ['word']),
    (['missing.py'], ['missing.py', 'no such config file']),
    (['config/train_gpt.py'], ['config/train_gpt.py', 'train_gpt2.py']),
])
def test_mistakes_are_one_line(script, args, named):
    result = script(*args)
    assert result.status == 2
    assert result.err.count('\n') == 1 and result.err.startswith('script.py: ')
    for word in named:
        assert word in result.err
    assert result.out.count('(') == 0  # it did not go on


@pytest.mark.parametrize('source, named', [
    ('batch_sise = 8', ['batch_sise', 'batch_size']),
    ('batch_size = 8.5', ['batch_size', '8.5', 'whole number']),
    ('batch_size = True', ['batch_size', 'True']),
    ('start = 1', ['start', 'text']),
    ('decay_lr = 1', ['decay_lr', 'True or False']),
    ('compile = "auto"', ['compile', 'auto']),
    ('learning_rate = float("nan")', ['learning_rate', 'finite']),
    ('batch_size = ', ['line 1']),
    ('batch_size = undefined', ['NameError', 'undefined']),
    ('raise SystemExit', ['SystemExit']),
    ('batch_size = -1', ['batch_size = -1']),
])
def test_mistakes_in_config_files(script, tmp_path, source, named):
    (tmp_path / 'c.py').write_text(source)
    result = script('c.py')
    assert result.status == 2 and result.err.count('\n') == 1
    for word in named:
        assert word in result.err


def test_a_script_is_read_without_being_run(tmp_path):
    (tmp_path / 's.py').write_text(
        'import nowhere\nlog = nowhere.open()\nbatch_size = 2 * 6\nrate = -1.5  # why\nnothing = None\n_private = 1\n'
        'names = ["a"]\nRULES = ["batch_size > 1", "rate < 0  # below"]\nif True:\n    inner = 3\n'
        'config = overrides.apply(globals(), RULES)\nlater = 3\n')
    assert overrides.read_script(tmp_path / 's.py') == (
        {'batch_size': 12, 'rate': -1.5, 'nothing': None}, ['batch_size > 1', 'rate < 0  # below'])
    (tmp_path / 'c.py').write_text('batch_size = batch_size + 1\n')
    assert overrides.settings_of(tmp_path / 's.py', [str(tmp_path / 'c.py'), '--rate=-2']) == {
        'batch_size': 13, 'rate': -2.0, 'nothing': None}


@pytest.mark.parametrize('args, named', [(['--rat=-2'], 'rate'), (['--rate=2'], 'below'), (['--rate=x'], 'number')])
def test_mistakes_in_the_settings_of_another_script(tmp_path, capsys, args, named):
    (tmp_path / 's.py').write_text('rate = -1.5\noverrides.apply(globals(), ["rate < 0  # below"], operands=[])\n')
    with pytest.raises(SystemExit) as end:
        overrides.settings_of(tmp_path / 's.py', args)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and named in err and err.count('\n') == 1 and not out


def test_what_is_read_of_train_is_what_it_has(run, tmp_path):
    """Every setting that its --help shows, with this default."""
    settings, rules = overrides.read_script(HOUSE / 'train.py')
    shown = [line.split()[0][2:].partition('=') for line in run('train.py', '--help').out.splitlines()
             if line.startswith('  --')]
    assert [name for name, _, _ in shown] == list(settings) and len(rules) > 20
    assert all(eval(default) == settings[name] for name, _, default in shown if ' ' not in default)
