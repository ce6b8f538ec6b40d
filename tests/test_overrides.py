"""The command line of every script, on a script of a few settings, and what the settings of the real ones may be."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from kit.base import overrides
from kit.run import rules

SCRIPT = '''"""A script."""
import sys
sys.path.insert(0, {root!r})
from kit.base import overrides

# a group
batch_size = 12             # >= 1: rows in a batch
learning_rate = 1e-3        # the rate
compile = None              # True, False or None = chosen
decay_lr = True             # whether it decays
start = 'x'                 # a text # with a hash
too_long = 'cut'            # cut, drop or keep: what becomes of it
title = 'mine'              # not empty: of the picture
_private = 1
words = []
config = overrides.apply(globals(), ['0 < learning_rate < 1  # try 0.001'] {operands})
print(repr((batch_size, learning_rate, compile, decay_lr, start, words)))
print(list(config.values()) == [batch_size, learning_rate, compile, decay_lr, start, too_long, title])
'''


@pytest.fixture
def script(run, tmp_path):
    path = tmp_path / 'script.py'

    def launch(*args, operands=''):
        path.write_text(SCRIPT.format(root=str(ROOT), operands=operands))
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
    (['--start=\udcff'], (12, 1e-3, None, True, '\udcff', [])),  # a byte that is no UTF-8, as in names of files
    (['--start=' + 'x' * 70_000], (12, 1e-3, None, True, 'x' * 70_000, [])),
    (['--batch_size=1_0', '--learning_rate= .5 '], (10, 0.5, None, True, 'x', [])),  # what Python takes for a number
    (['--batch_size=\uff15'], (5, 1e-3, None, True, 'x', [])),
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
    assert '  --batch_size=12                    >= 1: rows in a batch' in result.out.splitlines()
    assert 'a text # with a hash' in result.out and '_private' not in result.out


@pytest.mark.parametrize('args, named', [
    (['--batch_sise=8'], ['--batch_sise', 'batch_size']),
    (['--batch-size=8'], ['--batch-size', 'batch_size']),
    (['--words=8'], ['--words']),
    (['--batch_size=8.0'], ['batch_size', '8.0', 'whole number']),
    (['--batch_size=many'], ['batch_size', 'many']),
    (['--batch_size'], ['batch_size', 'value']),
    (['--batch_size', '--decay_lr'], ['batch_size', 'value']),
    (['--batch_size=0'], ['batch_size = 0: it must hold that batch_size >= 1 (rows in a batch)\n']),
    (['--too_long=crop'], ["too_long = 'crop': it is one of cut, drop, keep; did you mean drop?\n"]),
    (['--too_long='], ["too_long = '': it is one of cut, drop, keep\n"]),
    (['--title='], ["title = '': it must not be empty (of the picture)\n"]),
    (['--learning_rate=fast'], ['learning_rate', 'fast', 'number']),
    (['--learning_rate=nan'], ['learning_rate', 'nan', 'finite']),
    (['--learning_rate=1e999'], ['learning_rate', '1e999', 'finite']),
    (['--learning_rate=2'], ['learning_rate = 2.0', 'try 0.001']),
    (['--learning_rate=' + '9' * 400], ['learning_rate', 'inf', 'finite']),
    (['--batch_size=' + '9' * 400], ['batch_size', '9 ... 9', '2**63']),
    (['--batch_size=' + '9' * 5000], ['batch_size', '9 ... 9', 'whole number']),
    (['--batch_size=-9223372036854775809'], ['batch_size', '2**63']),
    (['--batch_size=0x10'], ['batch_size', '0x10', 'whole number']),
    (['--batch_size='], ['batch_size', "''", 'whole number']),
    (['--learning_rate='], ['learning_rate', "''", 'number']),
    (['--batch_size=\udcff'], ['batch_size', 'udcff']),
    (['--=3'], ['--: there is no such setting']),
    (['---x=3'], ['---x: there is no such setting']),
    (['--' + 'x' * 70_000], ['--xxx']),
    (['--\udcff=1'], ['there is no such setting']),
    (['-'], ["'-'"]),
    ([''], ["''"]),
    (['x' * 300], ['x ... x']),
    (['x' * 300 + '.py'], ['no such config file']),
    (['\udcff.py'], ['no such config file']),
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
    ('raise SystemExit', ['c.py: SystemExit']),
    ('import sys\nsys.exit(2)', ['c.py: SystemExit: 2']),
    ('import sys\nsys.exit("why")', ['c.py: SystemExit: why']),
    ('import asyncio\nraise asyncio.CancelledError', ['c.py: CancelledError']),
    ('raise MemoryError', ['c.py: MemoryError']),
    ('def _f(): _f()\n_f()', ['c.py: RecursionError']),
    ('from kit.base.errors import fail\nfail("told once")', ['script.py: told once']),
    ('raise ValueError("two\\nlines")', ['c.py: ValueError: two lines']),
    ('batch_size = 10**5000', ['c.py: batch_size', '2**63']),
    ('batch_size = 10**12 * 10**12', ['c.py: batch_size', '2**63']),
    ('learning_rate = 10**400', ['c.py: learning_rate', '2**63']),
    ('class _X:\n    def __repr__(self): return 1\nbatch_size = _X()', ['c.py: batch_size', '_X', 'whole number']),
    ('batch_size = [[0] * 9999]', ['c.py: batch_size', ' ... ', 'whole number']),
    ('start = "a\\0b"', ['c.py: start', 'character']),
    ('start = "\\ud800"', ['c.py: start', 'character']),
    ('x = ' + '[' * 100_000, ['c.py', 'parentheses']),
    ('batch_size = ' + '-' * 100_000 + '1', ['c.py', 'MemoryError']),
    (b'batch_size = 3\0', ['c.py', 'UTF-8']),
    ('batch_size = 3'.encode('utf-16'), ['c.py', 'UTF-8']),
    (b'start = "\xe9"', ['c.py', 'utf-8']),
    (bytes(range(256)), ['c.py']),
    ('batch_size = -1', ['batch_size = -1']),
    ('too_long = "dorp"', ['did you mean drop?']),
])
def test_mistakes_in_config_files(script, tmp_path, source, named):
    (tmp_path / 'c.py').write_bytes(source if isinstance(source, bytes) else source.encode())
    result = script('c.py')
    assert result.status == 2 and result.err.count('\n') == 1 and len(result.err) < 400, result.err
    for word in named:
        assert word in result.err


@pytest.mark.parametrize('source', [
    b'\xef\xbb\xbfstart = "\xc3\xa9"', b'# -*- coding: latin-1 -*-\nstart = "\xe9"', b'start = "\xc3\xa9"\r\n'])
def test_encodings_of_config_files(script, tmp_path, source):
    (tmp_path / 'c.py').write_bytes(source)
    assert outcome(script('c.py'))[4] == '\u00e9'


@pytest.mark.skipif(os.name != 'posix', reason='needs pipes and links')
@pytest.mark.parametrize('make', [os.mkdir, os.mkfifo, lambda path: os.symlink(path, path)])
def test_config_files_that_are_none(script, tmp_path, make):
    make(tmp_path / 'c.py')
    result = script('c.py')
    assert result.status == 2 and result.err.count('\n') == 1 and 'c.py' in result.err
    assert 'no file' in result.err or 'no such config file' in result.err


# ---------------------------------------------------------------------------------------------------------------------
# what a setting may be stands at the beginning of its comment


@pytest.mark.parametrize('comment, default, text', [
    ('>= 0: steps between them; 0 = never', 1, '>= 0'),
    ('> 0', 0.5, '> 0'),
    ('<= -1.5e-3', -1.0, '<= -1.5e-3'),
    ('0 <= x < 1: a share: of all', 0.0, '0 <= x < 1'),
    ('258 <= x <= 1_000_000 : ids', 4096, '258 <= x <= 1_000_000'),
    ('0 <= x < 2**63', 7, '0 <= x < 2**63'),
    ('cut or drop: which', 'cut', 'cut or drop'),
    ('auto, float32, bfloat16 or float16', 'auto', 'auto, float32, bfloat16 or float16'),
    ('not empty: a folder', 'a', 'not empty'),
    ('', 1, None),
    ('steps between them, >= 0', 1, None),
    ('>= 0, steps', 1, None),
    ('>=0: steps', 1, '>=0'),
    ('big or small', 'a', None),
    ('text or number: what it is', 'a', None),
    ('0<=x<1: share', 1.0, '0<=x<1'),
    ('>= zero: steps', 1, None),
    ('0 <= y < 1: share', 1.0, None),
    ('1 > x >= 0: share', 1.0, None),
    ('x >= 0: share', 1.0, None),
    ('cut or drop: which', 1, None),
    ('not empty: what', 1, None),
    ('>= 0: what', 'a', None),
    ('cut: what', 'cut', None),
    ('cut, drop: which', 'cut', None),
    ('to cut or to drop: which', 'cut', None),
    ('cut (short), or drop: which', 'cut', None),
    ('>= 0: what', True, None),
    ('>= 0: what', None, None),
])
def test_the_grammar_of_comments(comment, default, text):
    spec = overrides.read_spec(comment, default)
    assert (spec and spec.text) == text
    if spec:
        assert spec.meaning == comment.partition(':')[2].strip()


@pytest.mark.parametrize('text, inside, outside', [
    ('>= 0', [0, 1], [-1]), ('> 0', [1e-9], [0.0]), ('< 1', [0.5], [1.0]), ('<= 1', [1], [2]),
    ('0 <= x < 1', [0.0, 0.999], [-0.1, 1.0]), ('0 < x <= 1', [0.1, 1.0], [0.0, 1.1]),
    ('0 <= x < 2**63', [2**63 - 1], [2**63, -1]), ('258 <= x <= 1_000_000', [258, 10**6], [257, 10**6 + 1]),
    ('cut or drop', ['cut', 'drop'], ['', 'cu', 'cut or drop']), ('not empty', ['a', ' '], ['']),
])
def test_what_it_means(capsys, text, inside, outside):
    for value in inside:
        overrides.check_spec('max_x', value, overrides.Spec(text, ''))
    for value in outside:
        with pytest.raises(SystemExit):
            overrides.check_spec('max_x', value, overrides.Spec(text, ''))
    assert all('max_x' in line for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize('args, line', [
    (['--dropout=1.5'], 'dropout = 1.5: it must hold that 0 <= dropout < 1 (share of activations dropped; 0.1 or more '
                        'where a small text is read often)'),
    (['--eval_interval=-1'], 'eval_interval = -1: it must hold that eval_interval >= 0 (steps between evaluations; '
                             '0 = only at the end)'),
    (['--seed=-1'], 'seed = -1: it must hold that 0 <= seed < 2**63 (of the first weights, the batches and dropout)'),
    (['--sampling=shufle'], "sampling = 'shufle': it is one of random, shuffle, sequential; did you mean shuffle?"),
    (['--dataset='], "dataset = '': it must not be empty (a folder in data/, see prepare.py; "
                     'or several in fixed shares: a:0.7,b:0.3)'),
    (['--out_dir=./'], "out_dir = './': the run needs a folder of its own, such as --out_dir=exp1"),
])
def test_the_lines_of_train(run, args, line):
    assert run('train.py', *args).err == f'train.py: {line}\n'


CHECKED = {  # script: {what they may be: settings}; a comment that says it no more is no check any more
    'train.py': {
        '>= 0': 'eval_interval eval_iters log_interval save_interval keep_last n_head threads max_epochs weight_decay '
                'grad_clip grad_clip_value max_bad_steps swa_start max_minutes early_stop min_delta warmup_iters '
                'warmup_start_lr lr_decay_iters min_lr batch_size',
        '>= 1': 'gradient_accumulation_steps block_size n_layer n_embd max_iters',
        '> 0': 'learning_rate find_lr_start find_lr_end',
        '0 <= x < 1': 'mask_prob dropout beta1 beta2 grad_clip_quantile ema_decay warmup_share',
        '0 <= x < 2**63': 'seed',
        '>= -1': 'inspect_step',
        'not empty': 'dataset',
        'warn or stop': 'save_errors',
        'none, best or all': 'wandb_checkpoints',
        'auto, default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs': 'compile_mode',
        'windows, packed or padded': 'batch_mode',
        'cut or drop': 'too_long',
        'random, shuffle or sequential': 'sampling',
        'causal or mlm': 'objective',
        'auto, float32, bfloat16 or float16': 'dtype',
        'auto, raw, ema or swa': 'weights',
        'auto, nccl or gloo': 'backend',
        '0 < x <= 1e6': 'timeout',
        'auto, ddp or fsdp': 'parallel',
    },
    'export.py': {'not empty': 'output'},
    'sample.py': {
        '>= 0': 'temperature top_k',
        '1 <= x <= 100_000': 'num_samples',
        '>= 1': 'max_new_tokens',
        '0 < x <= 1': 'top_p',
        '0 <= x < 2**63': 'seed',
        'not empty': 'start',
        'auto, raw, ema or swa': 'weights',
        'auto, float32, bfloat16 or float16': 'dtype',
    },
    'prepare.py': {
        '>= 0': 'seed',
        '>= 1000': 'shard_size',
        '258 <= x <= 1_000_000': 'vocab_size',
        'strict or replace': 'errors',
    },
    'sweep.py': {
        '>= 0': 'jobs seeds',
        '>= -1': 'max_runs',
    },
    'plot_loss.py': {
        'steps, tokens or time': 'x',
    },
    'checkpoint_averaging.py': {
        '>= 1': 'num_checkpoints',
        'uniform, linear or greedy': 'method',
        'auto, float32, bfloat16 or float16': 'dtype',
    },
}
SCRIPTS = sorted(path.name for path in ROOT.glob('*.py') if 'overrides.apply(' in path.read_text(encoding='utf-8'))


@pytest.mark.parametrize('name', SCRIPTS)
def test_what_is_checked(name):
    script = overrides.read_script(ROOT / name)
    assert {setting: spec.text for setting, spec in script.specs.items()} == {
        setting: text for text, settings in CHECKED[name].items() for setting in settings.split()}


@pytest.mark.parametrize('name', [*SCRIPTS, *(f'bench/{path.name}' for path in (ROOT / 'bench').glob('*.py'))])
def test_every_number_says_what_it_may_be(name):
    script = overrides.read_script(ROOT / name)
    assert script.settings
    assert [setting for setting, default in script.settings.items()
            if type(default) in (int, float) and setting not in script.specs] == []


@pytest.mark.parametrize('name', SCRIPTS)
def test_defaults_are_what_they_may_be(name):
    script = overrides.read_script(ROOT / name)
    overrides.check_settings(script, script.settings)


@pytest.mark.parametrize('source, error', [  # of several defaults the last one counts, of comments the first
    ('n = 1  # >= 0: what it is\nn = n - 2', 'n = -1: it must hold that n >= 0 (what it is)'),
    ('n = (\n    -2)  # >= 0: what it is', 'n = -2: it must hold that n >= 0 (what it is)'),
    ('n = -2  # what it is, >= 0', ''),
    ('# >= 0: above it\nn = -2', ''),
    ("n = 'a'  # >= 0: no number", ''),
])
def test_settings_of_ones_own(run, tmp_path, source, error):
    (tmp_path / 's.py').write_text(f'import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom kit.base import overrides\n'
                                   f'{source}\noverrides.apply(globals())\n')
    assert run(tmp_path / 's.py').err == (f's.py: {error}\n' if error else '')


def test_settings_without_a_source(monkeypatch):
    """There nothing but the conditions is checked; nor where __file__ names a file that has other settings."""
    monkeypatch.setattr('sys.argv', ['x', '--n=-3'])
    monkeypatch.setattr('sys.excepthook', None)
    monkeypatch.setattr(overrides, 'running', None)
    monkeypatch.setattr(overrides, 'given', set())
    for file in {}, {'__file__': 'nowhere.py'}, {'__file__': __file__}, {'__file__': str(ROOT / 'train.py')}:
        assert overrides.apply({'n': 1} | file, ['n < 0']) == {'n': -3}
    assert overrides.running == overrides.Script({'n': 1}, {}, set(), ['n < 0'], [])


# ---------------------------------------------------------------------------------------------------------------------
# another script, read as its source has it


def test_a_script_is_read_without_being_run(tmp_path):
    (tmp_path / 's.py').write_text(
        'import nowhere\nlog = nowhere.open()\nbatch_size = 2 * 6  # > 1: rows\nrate = -1.5  # why\nnothing = None\n'
        '_private = 1\nnames = ["a"]\nRULES = ["rate < 0  # below"]\nif True:\n    inner = 3\n'
        'config = overrides.apply(globals(), RULES)\nlater = 3\n')
    settings = {'batch_size': 12, 'rate': -1.5, 'nothing': None}
    assert overrides.read_script(tmp_path / 's.py') == overrides.Script(
        settings, {'batch_size': ('> 1', 'rows')}, set(), ['rate < 0  # below'], ['rate'])
    (tmp_path / 'c.py').write_text('batch_size = batch_size + 1\n')
    assert overrides.settings_of(tmp_path / 's.py', [str(tmp_path / 'c.py'), '--rate=-2']) == {
        'batch_size': 13, 'rate': -2.0, 'nothing': None}


@pytest.mark.parametrize('call, expected', [
    ('globals()', ()),
    ('globals(), ["a > 0", "a < 9"], words', ['a > 0', 'a < 9']),
    ('globals(), operands=words, rules=["a > 0"]', ['a > 0']),
    ('globals(), rules.TRAIN', rules.TRAIN),
    ('globals(), rules=rules.TRAIN + OWN', [*rules.TRAIN, 'a != 5']),
])
def test_the_rules_of_another_script(tmp_path, call, expected):
    (tmp_path / 's.py').write_text(f'from kit.run import rules\na = 1\nOWN = ["a != 5"]\nif nowhere():\n'
                                   f'    overrides.apply({call})\na = 2\n')
    script = overrides.read_script(tmp_path / 's.py')
    assert script.rules == expected and script.settings == {'a': 1}


def test_a_script_of_another_editor(tmp_path):
    """With a byte-order mark and the line ends of Windows, and a form feed, which ends no line."""
    source = '\ufeff"""Caf\u00e9"""\r\n\x0c\r\na = 1  # >= 0: \u00e9\r\noverrides.apply(globals())\r\n'
    (tmp_path / 's.py').write_bytes(source.encode())
    assert overrides.read_script(tmp_path / 's.py') == overrides.Script(
        {'a': 1}, {'a': ('>= 0', '\u00e9')}, set(), (), [])


@pytest.mark.parametrize('source', [
    '', '"""overrides.apply(globals())"""\na = 1  # >= 0\n', 'def apply(a):\n    pass\n'])
def test_a_file_that_is_no_script(tmp_path, source):
    (tmp_path / 's.py').write_text(source)
    assert overrides.read_script(tmp_path / 's.py') == overrides.Script({}, {}, set(), (), [])


@pytest.mark.parametrize('args, named', [
    (['--rat=-2'], 'rate'), (['--rate=2'], 'below'), (['--rate=x'], 'number'), (['--rate=-20'], 'rate >= -10')])
def test_mistakes_in_the_settings_of_another_script(tmp_path, capsys, args, named):
    (tmp_path / 's.py').write_text(
        'rate = -1.5  # >= -10\noverrides.apply(globals(), ["rate < 0  # below"], operands=[])\n')
    with pytest.raises(SystemExit) as end:
        overrides.settings_of(tmp_path / 's.py', args)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and named in err and err.count('\n') == 1 and not out


def test_what_is_read_of_train_is_what_it_has(run, tmp_path):
    """Every setting that its --help shows, with this default."""
    script = overrides.read_script(ROOT / 'train.py')
    shown = [line.split()[0][2:].partition('=') for line in run('train.py', '--help').out.splitlines()
             if line.startswith('  --')]
    assert [name for name, _, _ in shown] == list(script.settings) and len(script.settings) > 60
    assert script.rules is rules.TRAIN
    assert all(eval(default) == script.settings[name] for name, _, default in shown if ' ' not in default)


@pytest.mark.parametrize('name', SCRIPTS)
def test_what_is_read_is_what_the_running_script_has(run, tmp_path, name):
    """Word by word: settings, what they may be, those of the launch, and the conditions."""
    (tmp_path / 's.py').write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
__file__ = {str(ROOT / name)!r}
from kit.base import overrides
apply = overrides.apply
def compare(*args, **kwargs):
    apply(*args, **kwargs)
    print(overrides.running == overrides.read_script(__file__), len(overrides.running.settings))
    sys.exit()
overrides.apply = compare
exec(compile(open(__file__).read(), __file__, 'exec'))
""")
    result = run(tmp_path / 's.py')
    assert result.out.split() == ['True', str(len(overrides.read_script(ROOT / name).settings))], result.err


# ---------------------------------------------------------------------------------------------------------------------
# settings of one launch alone, and those of a checkpoint


def test_which_settings_belong_to_a_launch(tmp_path):
    """Those below a heading that begins so, up to a blank line, whatever other comments stand between them."""
    (tmp_path / 's.py').write_text(
        '# the run\na = 1\n\n# this launch alone, and no other\nb = 1  # >= 0\n    # no heading\n_c = d = []\n'
        'e = None\n# my own\n# g = 2\nf: int = 1  # >= 1\n\nh = 1\noverrides.apply(globals())\n')
    script = overrides.read_script(tmp_path / 's.py')
    assert script.launch == {'b', 'e', 'f'} and list(script.settings) == ['a', 'b', 'e', 'f', 'h']


def test_a_script_without_a_file_says_that_little_is_checked(tmp_path):
    code = (f'import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom kit.base import overrides\nbatch_size = 1  # >= 1\n'
            'print(overrides.apply(globals()))')
    done = subprocess.run([sys.executable, '-c', code, '--batch_size=0'], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and 'WARNING: the source of this script is no file' in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "{'batch_size': 0}"


def test_a_number_whose_comment_says_nothing_is_told(script):
    """It is not checked, and that is not silent."""
    assert 'WARNING: learning_rate is not checked: its comment does not begin with what it may be' in script().out
    assert script().out.count('WARNING') == 1


def test_a_setting_that_is_gone_is_told(launched, capsys):
    """A checkpoint of a script with one setting more."""
    assert overrides.adopt(launched(), {'a': 2, 'my_noise': 0.5})['a'] == 2
    assert 'since this script has no such settings: my_noise = 0.5' in capsys.readouterr().out


def test_the_launch_settings_of_train():
    """They stand last."""
    script = overrides.read_script(ROOT / 'train.py')
    assert list(script.settings)[-len(script.launch):] == [
        'out_dir', 'init_from', 'eval_only', 'dry_run', 'test', 'checkpoint', 'weights', 'inspect_step', 'find_lr',
        'find_lr_start', 'find_lr_end', 'debug_nan', 'sharded', 'device', 'backend', 'timeout', 'parallel',
        'cpu_offload']
    assert script.launch == set(list(script.settings)[-18:])


@pytest.fixture
def launched(monkeypatch):
    """launched('a') makes a script of a few settings the running one, 'a' being given on its command line."""
    def launch(*given):
        settings = {'a': 1, 'b': 2.0, 'size': 0, 'out_dir': 'here'}
        script = overrides.Script(settings, {'b': overrides.Spec('> 0', '')}, {'out_dir'},
                                  ['a < 9  # it has', 'b < 9'], [])
        monkeypatch.setattr(overrides, 'running', script)
        monkeypatch.setattr(overrides, 'given', set(given))
        return settings
    return launch


@pytest.mark.parametrize('given, saved, expected, line', [
    ([], {'a': 5, 'b': 2.0}, {'a': 5}, 'From the checkpoint: a = 5'),
    ([], {'b': 3}, {'b': 3.0}, 'From the checkpoint: b = 3.0'),
    (['a'], {'a': 5}, {}, 'Not from the checkpoint: a = 1 (it has 5)'),
    ([], {'out_dir': 'there'}, {}, ''),
    ([], {'size': 4}, {'size': 4}, 'From the checkpoint: size = 4'),
    (['size'], {'size': 4}, {'size': 4}, 'From the checkpoint: size = 4'),  # given as 0, which stands for it
    ([], {'a': 99}, {'a': 99}, 'From the checkpoint: a = 99'),  # a rule that came later
])
def test_settings_of_a_checkpoint(launched, capsys, given, saved, expected, line):
    config = launched(*given)
    before = dict(config)
    adopted = overrides.adopt(config, saved, fixed=['size'])
    assert adopted == before | expected and config == before and list(adopted) == list(before)
    assert capsys.readouterr().out.strip() == line


@pytest.mark.parametrize('given, changed, saved, named', [
    (['size'], {'size': 8}, {'size': 4}, 'size = 8: these weights have size = 4'),
    (['a'], {'a': 10}, {}, 'a = 10: it has'),
    (['b'], {'b': -1.0}, {}, 'b = -1.0: it must hold that b > 0'),
    ([], {}, {'a': 'x'}, "a of the checkpoint: 'x' does not fit a"),
    ([], {}, {'b': -1.0}, 'b = -1.0: it must hold that b > 0'),
])
def test_settings_that_do_not_fit_a_checkpoint(launched, capsys, given, changed, saved, named):
    with pytest.raises(SystemExit) as end:
        overrides.adopt(launched(*given) | changed, saved, fixed=['size'])
    assert end.value.code == 2 and named in capsys.readouterr().err


def test_a_resume_has_the_settings_of_its_own_launch(train, tiny):
    """Under another name the run goes on there, and the weights chosen for the first launch are not for the second."""
    assert train('--weights=raw', '--learning_rate=1e-4').status == 0
    (tiny / 'checkpoints').rename(tiny / 'moved')
    result = train('--init_from=resume', '--out_dir=moved', '--max_iters=12')
    assert result.status == 0, result.err
    assert 'From the checkpoint: learning_rate = 0.0001' in result.out
    assert not any(f'he checkpoint: {name} = ' in result.out for name in ('weights', 'out_dir', 'init_from'))
    assert not (tiny / 'checkpoints').exists()
