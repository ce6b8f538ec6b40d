"""
What users type and disks do, at random, by the hundred: no launch may end in a traceback, hang, lose or hide anything.

$ python tests/hostile.py                                   all of it, some hours on one core
$ python tests/hostile.py --only=commands,files --seed=7    other command lines and other damage
$ python tests/hostile.py --only=commands --scripts=sample.py

commands: every script with hostile values of its settings, which are read from its source
files:    every file that a script reads, damaged, each in turn
pairs:    two scripts, or three, at once in one folder
kills:    tests/chaos.py with settings that are drawn

A launch must end with status 0, or with 1 or 2 and one line on stderr. What it had no right to touch must be as it was.
"""

import collections
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ['OMP_NUM_THREADS'] = '1'  # before torch is imported: threads would not come along into a fork
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import chaos
import torch
from conftest import ROOT, TINY, copy_folder, some_text

from kit.base import overrides

SCRIPTS = 'train.py', 'sample.py', 'prepare.py', 'plot_loss.py', 'checkpoint_averaging.py', 'sweep.py'
LIMIT = 60  # >= 1: seconds, after which a launch hangs
MEMORY = 12 * 2**30  # >= 0: bytes of addresses that a launch may have, whatever the machine has
LONG = {'max_iters', 'max_epochs', 'max_minutes', 'max_new_tokens', 'n_layer', 'n_embd', 'block_size', 'batch_size',
        'gradient_accumulation_steps', 'num_samples', 'max_runs', 'seeds'}  # these may ask for hours
ENV = {'WANDB_MODE': 'offline', 'HF_HUB_OFFLINE': '1', 'PYTHONWARNINGS': 'ignore', 'MPLBACKEND': 'agg'}


# ---------------------------------------------------------------------------------------------------------------------
# a launch, and what may come of it


class Launch(NamedTuple):
    script: str
    words: list
    status: int | None  # None: it was still at work after LIMIT
    out: str
    err: str


def child(job):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    chaos.forked(job)


def begin(script, words, folder, number=0, env=None):
    """Start a script in a folder; number keeps the output of several apart."""
    out, err = (folder.parent / f'{name}.{number}' for name in ('stdout', 'stderr'))
    job = dict(script=str(ROOT / script), args=[str(word) for word in words], cwd=str(folder), stdout=str(out),
               stderr=str(err), env=dict(os.environ) | ENV | (env or {}))
    process = multiprocessing.get_context('fork').Process(target=child, args=[job])
    process.start()
    return process, script, words, out, err


def end(process, script, words, out, err, limit=LIMIT):
    """Wait for a script that begin has started: its Launch."""
    process.join(limit)
    status = process.exitcode
    if status is None:
        process.terminate()
        process.join(20)
        if process.exitcode is None:
            process.kill()
            process.join()
    return Launch(script, words, status, *(path.read_text('utf-8', 'replace') for path in (out, err)))


def fault(launch):
    """What is wrong with how a launch has ended, '' for nothing."""
    told = [line for line in launch.err.splitlines() if line.strip() and not is_of_a_library(line)]
    if 'Traceback (' in launch.err or 'Traceback (' in launch.out:
        return f'traceback: {(told or launch.out.splitlines())[-1]}'
    if launch.status is None:
        asked = {re.split('[= ]', str(word).lstrip('-'))[0] for word in launch.words}
        return '' if asked & LONG else 'hangs'
    if launch.status not in (0, 1, 2):
        return f'status {launch.status}: {" ".join(told[-1:])}'
    if launch.status and len(told) != 1 and not re.search('stopped at step|WARNING', launch.out):
        return f'status {launch.status} with {len(told)} lines: {" ".join(told[-1:])}'
    return ''


def is_of_a_library(line):
    return bool(re.search(r'\w+Warning: |^\s|^libgomp: |^\[\w?W\d|^wandb: |^WARNING: ', line))


def tree(folder):
    """{path in the folder: sha256} of the files there; of links where they lead."""
    found = {}
    for top, folders, names in os.walk(folder):
        for path in (os.path.join(top, name) for name in names + folders):
            if re.search(r'/std(out|err)\.\d+$', path):  # what begin has opened
                continue
            name = os.path.relpath(path, folder)
            if os.path.islink(path):
                found[name] = os.readlink(path)
            elif os.path.isfile(path):
                found[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return found


def lost(before, after, launch):
    """What a launch had no right to do to the files, '' for nothing. A run that is moved aside is not lost."""
    gone = [path for path, digest in before.items() if after.get(path) != digest and digest not in after.values()]
    new = [path for path in after if before.get(path) != after[path]]
    if launch.status == 2:
        gone, new = ([path for path in paths if not path.endswith('/.lock')] for paths in (gone, new))
        return f'status 2, and it wrote {new[:3]}, and took {gone[:3]}' if gone or new else ''
    words = ' '.join(map(str, launch.words))
    rewrites = {'train.py': r'work/(?!data/).*/.*' if re.search('resume|auto|=ckpt', words) else r'work/runs/.*',
                'prepare.py': r'work/data/.*' if '--overwrite' in words else 'nothing',
                'checkpoint_averaging.py': r'.*/averaged_model\.pt', 'plot_loss.py': r'.*\.png', 'sample.py': 'nothing',
                'sweep.py': r'work/sweeps/.*'}[launch.script]
    gone = [path for path in gone if not re.fullmatch(rewrites, path) and not path.endswith('.lock')]
    if launch.script == 'sample.py' and new:
        return f'it wrote {new[:3]}'
    return f'it took {gone[:3]}' if gone else ''


# ---------------------------------------------------------------------------------------------------------------------
# what the scripts work on


def template(folder):
    """A folder with a text, datasets of each kind and two runs, for every launch to copy."""
    work = folder / 'work'
    (work / 'data').mkdir(parents=True)
    text = some_text(8000)
    sentences = text.splitlines()
    (work / 'text.txt').write_text(text, encoding='utf-8')
    (work / 'prompt.txt').write_text('Ta', encoding='utf-8')
    rows = ''.join(json.dumps({'text': line, 'prompt': line[:9], 'response': line[9:]}) + '\n' for line in sentences)
    (work / 'rows.jsonl').write_text(rows, encoding='utf-8')
    (work / 'rows.jsonl.gz').write_bytes(gzip.compress(rows.encode(), mtime=0))
    (work / 'rows.json').write_text(json.dumps([json.loads(row) for row in rows.splitlines()]), encoding='utf-8')
    (work / 'rows.csv').write_text('id,text\n' + ''.join(f'{i},"{line}"\n' for i, line in enumerate(sentences)))
    (work / 'pairs.tsv').write_text(''.join(f'{line[:9]}\t{line[9:]}\n' for line in sentences))
    try:
        import zstandard
        (work / 'rows.jsonl.zst').write_bytes(zstandard.compress(rows.encode()))
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({'text': sentences}), work / 'rows.parquet')
    except ImportError:
        pass  # these packages are optional
    (work / 'config.py').write_text('max_iters = 3\n')
    (work / 'sweep_file.py').write_text(f'config = "{" ".join(TINY)} --dataset=tiny"\nmax_iters = 2\n'
                                        'learning_rate = [1e-3]\n')
    for words in (['--input=text.txt', '--dataset=tiny'], ['--input=pairs.tsv', '--dataset=pairs'],
                  ['--input=rows.jsonl', '--dataset=rows', '--tokenizer=byte'],
                  ['--input=text.txt', '--dataset=bpe', '--tokenizer=bpe', '--vocab_size=300']):
        sound('prepare.py', words, work)
    sound('train.py', [*TINY, '--dataset=tiny', '--ema_decay=0.9'], work)
    sound('train.py', [*TINY, '--dataset=rows', '--out_dir=other'], work)
    (folder / 'outside.txt').write_text('years of work')
    return folder


def sound(script, words, folder):
    """A launch that must go well."""
    launch = end(*begin(script, words, folder))
    assert launch.status == 0, launch
    return launch


class Report:
    """Counts launches, keeps what was wrong, and tells both."""

    def __init__(self):
        self.counts, self.faults = collections.Counter(), collections.defaultdict(list)

    def add(self, campaign, what, wrong):
        self.counts[campaign] += 1
        if wrong:
            self.faults[campaign, wrong[:300]].append(what)
            print(f'{campaign}: {what[:600]}\n    {wrong[:600]}', flush=True)

    def show(self):
        print(f'\n{"campaign":10} {"tried":>6} {"wrong":>6}')
        for campaign, tried in self.counts.items():
            wrong = sum(len(some) for (name, _), some in self.faults.items() if name == campaign)
            print(f'{campaign:10} {tried:6} {wrong:6}')
        for (campaign, wrong), some in sorted(self.faults.items(), key=lambda item: -len(item[1])):
            print(f'\n{len(some)} x {campaign}: {wrong}\n    {some[0][:600]}')
        return bool(self.faults)


# ---------------------------------------------------------------------------------------------------------------------
# commands

DIGITS = '9' * 400, '9' * 5000, '1' + '0' * 12, '1' + '0' * 9, str(2**63 - 1), str(2**63), str(-2**63 - 1), str(2**31)
NUMBERS = {
    int: ['', ' 5 ', '0', '-1', '1', '2', '3', '1_0', '0x10', '1e3', '1.0', 'nan', 'inf', '+7', 'None', 'True', '--5',
          '\uff15', '\u0663', '\udcff', '5 5', *DIGITS],
    float: ['', ' 0.5 ', '0', '-0.0', '-1', '0.5', '1', '1e308', '-1e308', '1.7976931348623157e308', '5e-324', '1e-308',
            'nan', 'inf', '-inf', '1e400', '0x1p3', '1,5', '1e', '1e-3', 'True', '\uff10.5', '\udcff', *DIGITS],
    bool: ['', 'True', 'False', '1', '0', 'TRUE', 'none', 'maybe', '2', '\udcff', 'yes', ' True']}
TEXTS = ['', ' ', 'x', 'x' * 260, 'x' * 70_000, '\udcff', '\u00e9', '\u4e16\u754c', '\U0001f642', 'a\nb', '\x1b[31m',
         "'; echo x", '%s', '{}', '$HOME', '~', '.', '..', '/', '-', '--', '*', '[', '**', ',', ',,', ':', 'a:b:c', '=',
         'a,b', '../x', '../../x', './x', 'x/', 'nowhere/x', 'x/' * 200, 'data', 'data/tiny', 'text.txt', 'rows.jsonl',
         'checkpoints', 'checkpoints/ckpt.pt', 'checkpoints/best.pt,checkpoints/ckpt.pt', 'other/best.pt', 'link',
         'circle', 'pipe', 'FILE:', 'FILE:data', 'FILE:nowhere', 'FILE:text.txt', 'FILE:pipe', 'None', 'auto', 'AUTO']
SPECIAL = {
    'dataset': ['tiny', 'tiny:1e308,rows:1e308', 'tiny:nan', 'tiny:0', 'tiny:1,tiny:1', 'tiny:', ':1', 'tiny:-1',
                'tiny:1e400', 'tiny:' + '9' * 5000, 'tiny:0.5,nowhere:0.5', '../data/tiny', 'tiny,', 'pairs', 'rows',
                'tiny:1:1', 'tiny:\uff11', 'con', 'tiny/', 'Tiny', 'bpe', 'rows:0.3,rows:0.7'],
    'lr_schedule': ['linear', 'step', 'step:0', 'step:1', 'step:' + '9' * 5000, 'step:1:0', 'step:1:nan', 'multistep',
                    'multistep:3,2', 'multistep:5:0.5', 'wsd:2', 'wsd:1e-300', 'plateau:1:0.5:9', 'restarts:1:1',
                    'restarts:1:' + '9' * 400, 'exponential', 'inverse_sqrt', 'constant', 'cosine:', 'step:1:1e-400'],
    'device': ['cpu', 'cuda:99', 'meta', 'xyz', 'cpu:1', 'cpu:-1', 'cuda:-1', 'cpu:' + '9' * 30, 'mps', 'cuda:x'],
    'split': ['80,10,10', '1e308,5,5', 'nan,1,1', '90,5', '100,0,0', 'a,b,c', '-1,50,51', '90;5;5', '9' * 400 + ',1,1',
              '0,50,50', '50,50,0', '1e-300,99,1', '90,5,5,0', 'inf,0,0'],
    'tokenizer': ['char', 'byte', 'bpe', 'gpt2', 'tiny', 'bpe:9', 'nowhere', 'rows', 'cl100k_base'],
    'input': ['text.txt', 'rows.jsonl', 'rows.jsonl.gz', 'rows.csv', 'rows.json', 'pairs.tsv', '-', 'hf:', 'hf:::',
              '*.txt', 'text.txt,text.txt', 'text.txt,', '/dev/null', 'data/tiny/train.bin', '*.jsonl*'],
    'init_from': ['scratch', 'resume', 'auto', 'gpt3', 'checkpoints/ckpt.pt', 'gpt2x', 'x.pt', 'data/tiny', '.pt'],
    'schedule': ['--max_iters=9', 'config.py', '"', '--x=1', '--lr_schedule=wsd', 'nowhere.py', '--max_epochs=1e308'],
    'pattern': ['*.pt', 'step_*', '*/*', '[', '../*.pt', '/', '**', 'ckpt.pt', '*' * 50],
    'output_name': ['averaged_model.pt', 'ckpt.pt', 'best.pt', '.pt', 'x' * 300 + '.pt', '../x.pt', '\udcff.pt'],
    'out_dir': ['checkpoints', 'other', 'exp1', 'a/b/c', 'data/x', 'runs', 'exp 1', 'config']}
SPECIAL['checkpoint_dir'] = SPECIAL['out_dir']
OPERANDS = {'prepare.py': ['tiny', 'x', '..', 'a/b', '', 'x' * 300, '\udcff'],
            'plot_loss.py': ['checkpoints', 'other', 'nowhere', 'text.txt', 'checkpoints/metrics.jsonl', '\udcff',
                             'checkpoints/training.log', 'data/tiny/val.bin', '', 'x' * 300, 'link', 'circle', 'pipe'],
            'sweep.py': ['sweep_file.py', 'nowhere.py', 'text.txt', '', 'config.py', 'x' * 300, 'pipe', 'data']}
MISSHAPEN = ['--', '---', '--=3', '---x=3', '-x', '-', '', '--help', '-h', '--no_such', '--\udcff=1', 'nowhere.py',
             'data', 'config.py', 'text.txt', '=', '--max_iters', '--seed 1', 'x' * 300 + '.py', 'pipe.py', 'circle.py']
BASE = {'train.py': [*TINY, '--dataset=tiny', '--max_iters=2'], 'sample.py': ['--device=cpu', '--max_new_tokens=5'],
        'prepare.py': ['--dataset=new', '--input=text.txt'], 'plot_loss.py': ['checkpoints'],
        'checkpoint_averaging.py': ['--device=cpu', '--num_checkpoints=2'], 'sweep.py': ['sweep_file.py']}


def values(name, default, spec):
    """Hostile values for a setting, and some that it takes."""
    if isinstance(default, int | float) and not isinstance(default, bool):
        return NUMBERS[type(default)]
    if not isinstance(default, str):
        return [word for word in NUMBERS[bool] if name != 'compile' or word.lower() not in ('true', '1')]
    choices = overrides.choices_of(spec.text) if spec and spec.text != 'not empty' else []
    return choices + SPECIAL.get(name, []) + TEXTS


def command(script, draw, settings, specs, first):
    """A command line: settings of a script, one to four of them, with values that were drawn. first: one of them."""
    words = list(BASE[script])
    if script in OPERANDS and draw.random() < 0.2:
        words = [word for word in words if word.startswith('--')] + [draw.choice(OPERANDS[script])]
    for name in [first, *draw.sample(sorted(settings), draw.choice([0, 0, 0, 1, 1, 2, 3]))]:
        value = draw.choice(values(name, settings[name], specs.get(name)))
        words += [f'--{name}={value}'] if draw.random() < 0.9 else [f'--{name}', value]
    if draw.random() < 0.1:
        words.insert(draw.randrange(len(words)), draw.choice(MISSHAPEN))
    return words


def hostile_names(work):
    """What a user's folder may hold beside texts."""
    (work / 'link').symlink_to('checkpoints')
    (work / 'circle').symlink_to('circle')
    (work / 'circle.py').symlink_to('circle.py')
    os.mkfifo(work / 'pipe')
    os.mkfifo(work / 'pipe.py')


def commands(report, source, folder, draw, number, names):
    """number command lines, over the scripts and the kinds of their settings in turn."""
    scripts = {name: overrides.read_script(ROOT / name) for name in names}
    for i in range(number):
        name = names[i % len(names)]
        settings, specs, by_kind = scripts[name].settings, scripts[name].specs, collections.defaultdict(list)
        for setting, default in settings.items():
            by_kind[type(default)].append(setting)
        first = draw.choice(list(by_kind.values())[i // len(names) % len(by_kind)])
        words = command(name, draw, settings, specs, first)
        try_command(report, source, folder, name, words)


def try_command(report, source, folder, script, words):
    work = fresh(source, folder)
    hostile_names(work)
    before = tree(folder)
    launch = end(*begin(script, words, work))
    shown = f'{script} {" ".join(map(overrides.shown, words))}'
    report.add('commands', shown, fault(launch) or lost(before, tree(folder), launch))


def fresh(source, folder):
    """A new copy of the template."""
    shutil.rmtree(folder, ignore_errors=True)
    copy_folder(source, folder)
    return folder / 'work'


# ---------------------------------------------------------------------------------------------------------------------
# files

GOING_ON = [*TINY, '--init_from=resume', '--max_iters=12']
READERS = {  # what reads a file: several take turns
    'data/tiny/train.bin': [('train.py', BASE['train.py'])],
    'data/tiny/val.bin': [('train.py', BASE['train.py']), ('train.py', ['--test', '--device=cpu'])],
    'data/tiny/meta.json': [('train.py', BASE['train.py']), ('train.py', GOING_ON)],
    'data/old/meta.pkl': [('train.py', [*BASE['train.py'], '--dataset=old'])],
    'data/rows/train.rows.npy': [('train.py', [*BASE['train.py'], '--dataset=rows', '--batch_mode=packed'])],
    'data/pairs/train.rows.npy': [('train.py', [*BASE['train.py'], '--dataset=pairs', '--batch_mode=padded'])],
    'data/bpe/meta.json': [('train.py', [*BASE['train.py'], '--dataset=bpe']),
                           ('prepare.py', ['--input=text.txt', '--dataset=new', '--tokenizer=bpe'])],
    'checkpoints/ckpt.pt': [('train.py', GOING_ON),
                            ('sample.py', ['--checkpoint=checkpoints/ckpt.pt', *BASE['sample.py']]),
                            ('train.py', ['--test', '--checkpoint=checkpoints/ckpt.pt', '--device=cpu']),
                            ('train.py', [*BASE['train.py'], '--init_from=checkpoints/ckpt.pt', '--out_dir=new']),
                            ('checkpoint_averaging.py', BASE['checkpoint_averaging.py'])],
    'checkpoints/best.pt': [('sample.py', BASE['sample.py']), ('train.py', GOING_ON)],
    'checkpoints/metrics.jsonl': [('plot_loss.py', ['checkpoints']), ('train.py', GOING_ON),
                                  ('train.py', ['--inspect_step=7', '--device=cpu'])],
    'checkpoints/training.log': [('plot_loss.py', ['checkpoints/training.log']), ('train.py', GOING_ON)],
    'checkpoints/config.json': [('plot_loss.py', ['checkpoints']), ('train.py', GOING_ON)],
    'checkpoints/source.zip': [('train.py', GOING_ON)],
    'checkpoints/.lock': [('train.py', GOING_ON)],
    'text.txt': [('prepare.py', ['--input=text.txt', '--dataset=new']),
                 ('prepare.py', ['--input=text.txt', '--dataset=new', '--errors=replace', '--tokenizer=byte'])],
    **{name: [('prepare.py', [f'--input={name}', '--dataset=new', '--tokenizer=byte'])] for name in (
        'rows.jsonl', 'rows.jsonl.gz', 'rows.jsonl.zst', 'rows.json', 'rows.csv', 'rows.parquet', 'pairs.tsv')},
    'prompt.txt': [('sample.py', ['--start=FILE:prompt.txt', *BASE['sample.py']])],
    'config.py': [('train.py', [*BASE['train.py'], 'config.py'])],
    'sweep_file.py': [('sweep.py', ['sweep_file.py'])],
    **{f'sweeps/sweep_file/{name}': [('sweep.py', ['sweep_file.py'])] for name in ('sweep.json', 'results.csv')},
    'sweeps/sweep_file/001-learning_rate=0.001-1337/result.json': [('sweep.py', ['sweep_file.py'])],
    'sweeps/search/study.db': [('sweep.py', ['search.py'])],
    **{f'hf/{name}': [('sample.py', ['--init_from=hf', '--start=a', *BASE['sample.py']])]
       for name in ('config.json', 'model.safetensors', 'vocab.json', 'merges.txt')}}


def more_files(work):
    """What takes longer to make, and is read: a nanoGPT's dataset, sweeps, a folder of Hugging Face."""
    import pickle
    copy_folder(work / 'data/tiny', work / 'data/old')
    chars = json.loads((work / 'data/tiny/meta.json').read_text())['tokenizer']['chars']
    (work / 'data/old/meta.json').unlink()
    (work / 'data/old/meta.pkl').write_bytes(pickle.dumps({
        'vocab_size': len(chars), 'stoi': {c: i for i, c in enumerate(chars)}, 'itos': dict(enumerate(chars))}))
    end(*begin('sweep.py', ['sweep_file.py'], work))
    (work / 'search.py').write_text((work / 'sweep_file.py').read_text().replace('[1e-3]', 'log_uniform(1e-4, 1e-2)')
                                    + 'method = "bayes"\nmax_runs = 1\n')
    end(*begin('sweep.py', ['search.py'], work))
    (work / 'hf').mkdir()
    n, e = 257, 8
    weights = {'wte.weight': torch.randn(n, e), 'wpe.weight': torch.randn(16, e), 'ln_f.weight': torch.ones(e),
               'ln_f.bias': torch.zeros(e)}
    for name, a, b in ('attn.c_attn', 1, 3), ('attn.c_proj', 1, 1), ('mlp.c_fc', 1, 4), ('mlp.c_proj', 4, 1):
        weights |= {f'h.0.{name}.weight': torch.randn(a * e, b * e), f'h.0.{name}.bias': torch.zeros(b * e)}
    for name in 'ln_1', 'ln_2':
        weights |= {f'h.0.{name}.weight': torch.ones(e), f'h.0.{name}.bias': torch.zeros(e)}
    from safetensors.torch import save_file
    save_file({f'transformer.{name}': tensor for name, tensor in weights.items()}, work / 'hf/model.safetensors')
    (work / 'hf/config.json').write_text(json.dumps(dict(
        model_type='gpt2', n_layer=1, n_head=2, n_embd=e, n_positions=16, vocab_size=n, activation_function='gelu_new',
        layer_norm_epsilon=1e-5, bos_token_id=256, eos_token_id=256)))
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 shows other bytes as letters above them
    letters = {**{i: chr(i) for i in kept}, **{i: chr(256 + k) for k, i in enumerate(
        i for i in range(256) if i not in kept)}}
    (work / 'hf/vocab.json').write_text(json.dumps({**{letters[i]: i for i in range(256)}, '<|endoftext|>': 256}))
    (work / 'hf/merges.txt').write_text('#version: 0.2\n')


def other_type(draw, thing):
    """Somewhere in what JSON holds, a value becomes one of another type, or beyond all bounds."""
    if isinstance(thing, dict | list) and thing and draw.random() < 0.8:
        key = draw.choice(list(thing) if isinstance(thing, dict) else range(len(thing)))
        if draw.random() < 0.1:
            del thing[key]
        else:
            thing[key] = other_type(draw, thing[key])
        return thing
    return draw.choice([None, True, [], {}, '', 'x', '../../x', 0, -1, 1.5, 10**30, 1e308, float('nan'), [[]], {'a': 1},
                        [1] * 9, 'x' * 999, '\udcff', 2**31, -2**63, '\0'])


def damage(path, draw):
    """Do something to a file; says what."""
    data = path.read_bytes() or b'\0'
    there = draw.randrange(max(1, len(data)))
    kind = draw.choice(['bits', 'bit', 'cut', 'empty', 'garbage', 'doubled', 'zeros', 'mark', 'utf16', 'latin', 'deep',
                        'folder', 'missing', 'circle', 'pipe', 'tail', 'hole'] + ['types'] * 8 * path.name.endswith(
                            ('.json', '.jsonl')))
    new = bytearray(data)
    match kind:
        case 'bit' | 'bits':
            for _ in range(1 if kind == 'bit' else 50):
                new[draw.randrange(len(new))] ^= 1 << draw.randrange(8)
        case 'cut':
            new = new[:there]
        case 'tail':
            new += data[:draw.randrange(1, 20)]
        case 'hole':
            del new[there:there + draw.randrange(1, 99)]
        case 'empty':
            new = b''
        case 'garbage':
            new = draw.randbytes(len(data) or 100)
        case 'doubled':
            new += data
        case 'zeros':
            new[there:there + 512] = bytes(512)
        case 'mark':
            new = b'\xef\xbb\xbf' + data
        case 'utf16':
            new = data.decode('utf-8', 'replace').encode('utf-16')
        case 'latin':
            new[there:there] = b'\xe9\xff'
        case 'deep':
            new = b'[' * 100_000
        case 'types':
            lines = [data] if path.suffix == '.json' else data.splitlines()
            line = draw.randrange(len(lines))
            lines[line] = json.dumps(other_type(draw, json.loads(lines[line]))).encode()
            new = b'\n'.join(lines) + b'\n'
    path.unlink()
    match kind:
        case 'folder':
            path.mkdir()
        case 'circle':
            path.symlink_to(path.name)
        case 'pipe':
            os.mkfifo(path)
        case 'missing':
            pass
        case _:
            path.write_bytes(new)
    return f'{kind} (at {there})' if kind in ('cut', 'hole', 'zeros', 'latin') else kind


def figures(launch):
    """What a launch says of losses, and of the steps of averages."""
    return re.findall(r'^(?:step|iter) .*?loss [\d.]+|test loss [\d.]+|wrote .*', launch.out, re.M)


def files(report, source, folder, draw, number):
    """number damaged files, each kind in turn, and whatever reads it."""
    more_files(source / 'work')
    whole = {}
    for i in range(number):
        name = list(READERS)[i % len(READERS)]
        script, words = READERS[name][i // len(READERS) % len(READERS[name])]
        if (script, *words) not in whole:
            whole[script, *words] = end(*begin(script, words, fresh(source, folder)))
        work = fresh(source, folder)
        if not (work / name).is_file():
            continue
        what = damage(work / name, draw)
        before = tree(folder)
        launch = end(*begin(script, words, work))
        wrong = fault(launch) or lost(before, tree(folder), launch)
        told = re.search('damaged|left out|not compared|WARNING', launch.out + launch.err)
        if not wrong and name.endswith('.pt') and launch.status == 0 and not told and (
                figures(launch) != figures(whole[script, *words])):
            wrong = f'silently other: {figures(launch)[-1:]} and not {figures(whole[script, *words])[-1:]}'
        report.add('files', f'{name}, {what}: {script} {" ".join(words)}', wrong)


# ---------------------------------------------------------------------------------------------------------------------
# pairs

BEGIN, ANEW = ('train.py', BASE['train.py']), ('train.py', [*TINY, '--dataset=tiny', '--max_iters=30'])
ON, MEAN = ('train.py', GOING_ON), ('checkpoint_averaging.py', BASE['checkpoint_averaging.py'])
MAKE = 'prepare.py', ['--input=text.txt', '--dataset=new', '--tokenizer=byte']
REMAKE = 'prepare.py', ['--input=text.txt', '--dataset=tiny', '--overwrite']
USE = 'train.py', [*TINY, '--dataset=new', '--max_iters=5']
TEST, DRAW = ('train.py', ['--test', '--device=cpu']), ('plot_loss.py', ['checkpoints'])
WRITE, SEARCH = ('sample.py', BASE['sample.py']), ('sweep.py', ['sweep_file.py'])
PAIRS = [[MAKE, MAKE], [MAKE, MAKE, MAKE], [REMAKE, ANEW], [REMAKE, REMAKE], [REMAKE, ON], [REMAKE, MEAN],
         [REMAKE, TEST], [BEGIN, BEGIN], [BEGIN, ON], [ON, ON], [ON, MEAN], [ANEW, MEAN], [MEAN, MEAN], [MEAN, TEST],
         [ANEW, DRAW], [ON, DRAW], [DRAW, DRAW], [ANEW, WRITE], [ON, WRITE], [MEAN, WRITE], [SEARCH, SEARCH],
         [ANEW, TEST], [ON, TEST], [MAKE, USE], [USE, MAKE], [BEGIN, BEGIN, BEGIN], [ON, ON, MEAN], [ANEW, ON, DRAW],
         [BEGIN, ON, MEAN], [SEARCH, MEAN]]


def pairs(report, source, folder, draw, number):
    """Scripts at once in one folder, the second a moment after the first."""
    for i in range(number):
        group = PAIRS[i % len(PAIRS)]
        work = fresh(source, folder)
        before = tree(folder)
        begun = []
        for k, (script, words) in enumerate(group):
            begun.append(begin(script, words, work, k))
            time.sleep(draw.choice([0, 0.05, 0.1, 0.2, 0.4, 0.8]))
        launches = [end(*one) for one in begun]
        after, wrong = tree(folder), '; '.join(filter(None, map(fault, launches)))
        digests = set(after.values())
        if 'prepare.py' not in [script for script, _ in group] and not wrong:  # runs are moved aside, or go on
            wrong = '; '.join(f'{path} is lost' for path, digest in before.items() if digest not in digests
                              and '/data/' in path)
        if not wrong and 0 not in [launch.status for launch in launches]:
            wrong = f'none went well: {[launch.err for launch in launches]}'
        new = work / 'data/new'
        if not wrong and group[0] is MAKE and new.exists():  # what one has made is what both have promised
            shutil.move(new, work / 'data/first')
            sound(*MAKE, work)
            if tree_names(new) != tree_names(work / 'data/first'):
                wrong = 'other bytes than one alone has made'
        report.add('pairs', ' + '.join(' '.join([script, *words[-2:]]) for script, words in group), wrong)


def tree_names(folder):
    return {path: digest for path, digest in tree(folder).items() if path.endswith('.bin')}


# ---------------------------------------------------------------------------------------------------------------------
# kills


def kills(report, folder, draw, number):
    """Runs with all features mixed, each killed ten times; see tests/chaos.py."""
    for i in range(0, number, 10):
        words = chaos.mixture(draw)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            chaos.chaos(folder, kills=min(10, number - i), steps=400, seed=draw.randrange(2**31), settings=words)
            wrong = ''
        except (AssertionError, SystemExit) as error:
            wrong = f'{type(error).__name__}: {error}'
        report.add('kills', ' '.join(words), wrong)


if __name__ == '__main__':
    only = 'commands,files,pairs,kills'
    scripts = ','.join(SCRIPTS)  # of commands
    seed = 0
    n_commands = 500
    n_files = 300
    n_pairs = 30
    n_kills = 100
    overrides.apply(globals(), ['n_commands >= 0 and n_files >= 0 and n_pairs >= 0 and n_kills >= 0'])
    report = Report()
    signal.signal(signal.SIGUSR1, lambda *_: report.show())  # what there is so far
    with tempfile.TemporaryDirectory() as base:
        base = Path(base)
        sandbox = base / 'sandbox'
        source = template(base / 'template')
        for campaign in only.split(','):
            draw = random.Random(f'{campaign} {seed}')
            match campaign:
                case 'commands':
                    commands(report, source, sandbox, draw, n_commands, scripts.split(','))
                case 'files':
                    files(report, source, sandbox, draw, n_files)
                case 'pairs':
                    pairs(report, source, sandbox, draw, n_pairs)
                case 'kills':
                    kills(report, base / 'kills', draw, n_kills)
    raise SystemExit(report.show())
