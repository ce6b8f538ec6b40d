"""
sweep.py: what a file may say, runs that end in every way, interruptions, tables that say what the runs' logs say.
Where it is not about train.py itself a stand-in takes its place, which reads its settings alike and trains nothing.
"""

import csv
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types

import pytest
from conftest import ROOT, TINY, needs_mirror, records

from kit.base import overrides, ranks
from kit.sweeps import searches, tables, trials
from kit.watch.diagnosis import History

STAND_IN = '''"""A stand-in for train.py: its loss is a function of the settings and the step."""
import atexit, json, math, os, signal, sys, time
from pathlib import Path
from kit.base import overrides

learning_rate = 1e-3        # > 0: as in train.py
n_embd = 32                 # >= 1
dropout = 0.0               # 0 <= x < 1
bias = False
max_iters = 40              # >= 1
eval_interval = 10          # >= 0
save_interval = 100         # >= 0
tensorboard = True
dataset = 'none'            # not empty
wandb_project = 'flatgpt'
seed = 1337                 # 0 <= x < 2**63
lr_schedule = 'cosine'      # what kit/learn/schedules.py looks at
decay_lr = True
warmup_iters = 5            # >= 0
warmup_share = 0.0          # 0 <= x < 1
warmup_start_lr = 0.0       # >= 0
lr_decay_iters = 0          # >= 0
min_lr = 0.0                # >= 0
architecture = 'gpt2'       # what sweep.py looks at
n_head = 0
optimizer = 'adamw'
objective = 'causal'
how = 'well'                # well, crash, bad, nan, killed, worse, rises, leaves or mistake: how it ends
pace = 0.0                  # >= 0: seconds a step takes
# this launch alone
out_dir = 'checkpoints'
init_from = 'scratch'
device = 'cpu'
config = overrides.apply(globals(), ['not (dropout and n_embd > 64)  # dropout is for small models'])
folder = Path(out_dir)
step = int((folder / 'ckpt.pt').read_text()) if init_from == 'resume' else 0
if how == 'mistake':
    overrides.fail('how = mistake: so it ends')
log = open(folder / 'training.log', 'a', buffering=1)
(folder / 'config.json').write_text(json.dumps({'facts': {'vocab_size': 50304, 'parameters': n_embd}}))
atexit.register(print, 'wandb: Find logs at')
metrics = open(folder / 'metrics.jsonl', 'a', buffering=1)
(folder / 'environment').write_text(json.dumps(dict(os.environ)))
(folder / 'begins').open('a').write(f'{init_from} {step}\\n')
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
while True:
    if step % eval_interval == 0 and (step or init_from != 'resume'):
        loss = 2 + (math.log10(learning_rate) + 2.5)**2 + 2 * math.exp(-step / 10) + seed % 10 / 100 + n_embd / 1e4
        loss += step if how == 'worse' else step / 20 if how == 'rises' else 0
        loss = None if how == 'nan' and step else loss
        score = None if loss is None or step == 30 else 3 / loss  # a figure of its own, which is the better the higher
        metrics.write(json.dumps({'step': step, 'time': step / 100, 'val/loss': loss, 'train/loss': loss,
                                  'val/score': score}) + '\\n')
        (folder / 'ckpt.pt').write_text(str(step))
    if stopped:
        (folder / 'ckpt.pt').write_text(str(step))
        sys.exit(143)
    if step == 20 and how == 'crash':
        raise RuntimeError('out of luck')
    if step == 20 and how == 'bad':
        log.write('stopped at step 20: the loss or the gradient of 2 steps in a row was not finite\\n')
        sys.exit(1)
    if step == 20 and how == 'leaves':
        log.write('so far\\n')
        sys.exit(3)
    if step == 20 and how == 'killed':
        os.kill(os.getpid(), signal.SIGKILL)
    if step == max_iters:
        break
    metrics.write(json.dumps({'step': step, 'time': step / 100, 'loss': 3.0, 'lr': learning_rate,
                              'z_loss': abs(step - 25) / 1e4 + dropout,
                              'tokens_per_second': 100.0 + step, 'system/cpu_memory_gib': 0.25}) + '\\n')
    time.sleep(pace)
    step += 1
log.write('\\na sample of its own:\\nIt, "said"\\n\\nhe.\\n\\nbest val loss\\nnext:\\n')
'''


@pytest.fixture
def project(tmp_path):
    """A copy of the project whose train.py is the stand-in."""
    shutil.copytree(ROOT / 'kit', tmp_path / 'project/kit', ignore=shutil.ignore_patterns('__pycache__'))
    for name in 'sweep.py', 'model.py', 'attention.py':
        shutil.copy(ROOT / name, tmp_path / 'project')
    (tmp_path / 'project/train.py').write_text(STAND_IN)
    return tmp_path / 'project'


@pytest.fixture
def sweep(run, project, tmp_path):
    """sweep('learning_rate = [1, 2]', '--jobs=2') -> Result: the stand-in swept by a file x.py of these lines."""
    def launch(lines, *args, **kwargs):
        (tmp_path / 'x.py').write_text(lines)
        return run(project / 'sweep.py', 'x.py', *args, **kwargs)
    return launch


def table(folder):
    """The rows of results.csv."""
    with open(folder / 'results.csv', encoding='utf-8', newline='') as file:
        return list(csv.DictReader(file))


def setups(folder):
    return [(json.loads(path.read_text())['number'], json.loads(path.read_text())['point'])
            for path in sorted(folder.glob('*/result.json'))]


def wait_for(condition, seconds=30):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'it did not come'
        time.sleep(0.02)


def children(pid):
    return [int(p) for p in subprocess.run(['pgrep', '-P', str(pid)], text=True, capture_output=True).stdout.split()]


def is_alive(pid):
    try:
        return open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# values


def a_sweep(tmp_path, lines, script=ROOT / 'train.py', **given):
    (tmp_path / 'a.py').write_text(lines)
    return trials.read(str(tmp_path / 'a.py'), given, script, lambda settings: None)


def test_a_grid_has_every_combination_in_the_order_of_the_file(tmp_path):
    sweep = a_sweep(tmp_path, 'n_layer = [3, 1]\nbias = [True, False]\nvariants = {"a": {}, "b": {"dropout": 0.5}}')
    points = trials.points(sweep)
    assert [(p['variant'], p['n_layer'], p['bias']) for p in points] == [
        (v, n, b) for v in 'ab' for n in (3, 1) for b in (True, False)]
    assert sweep.settings(points[-1]) == {'dropout': 0.5, 'n_layer': 1, 'bias': False}
    sweep.max_runs = 3
    assert trials.points(sweep) == points[:3]
    assert trials.points(a_sweep(tmp_path, 'n_layer = 3\n')) == [{}], 'seeds alone are a sweep too'


def test_random_draws(tmp_path):
    lines = ('method = "random"\nmax_runs = 400\nlearning_rate = log_uniform(1e-4, 1e-1)\nn_layer = uniform(1, 4)\n'
             'block_size = log_uniform(32, 512)\ndropout = uniform(0, 0.5)\ndecay_lr = [True, False]\nmin_lr = 1e-5\n')
    points = trials.points(a_sweep(tmp_path, lines))
    assert points == trials.points(a_sweep(tmp_path, lines)), 'the same file, the same draws'
    assert points[:7] == trials.points(a_sweep(tmp_path, lines, max_runs=7)), 'more of them leave the first as they are'
    rates = [point['learning_rate'] for point in points]
    assert 1e-4 <= min(rates) < 2e-4 and 5e-2 < max(rates) <= 1e-1
    for low in 1e-4, 1e-3, 1e-2:  # a third in each decade: 133 of 400, standard deviation 9
        assert 95 < sum(low <= rate < 10 * low for rate in rates) < 175
    assert {point['n_layer'] for point in points} == {1, 2, 3, 4}
    assert all(type(point['block_size']) is int and 32 <= point['block_size'] <= 512 for point in points)
    assert 70 < sum(point['block_size'] < 64 for point in points) < 130, 'an octave of four'
    assert all(type(point['dropout']) is float for point in points), 'n_layer takes whole numbers, dropout does not'
    assert len({json.dumps(point) for point in points}) == 400
    assert len(trials.points(a_sweep(tmp_path, 'method = "random"\nmax_runs = 50\nn_layer = uniform(1, 3)\n'
                                               'bias = [True, False]'))) == 6, 'there are no more'
    few = trials.points(a_sweep(tmp_path, 'method = "random"\nmax_runs = 50\ndropout = uniform(0.1, 0.1002)'))
    assert sorted(point['dropout'] for point in few) == [0.1, 0.1001, 0.1002], 'to four digits these are all'


@pytest.mark.parametrize('values', [trials.Range(2, 5, False), trials.Range(2, 5, True), trials.Range(1e-3, 1.0, True),
                                    [4, 5, 6]])
def test_shares_reach_both_ends(values):
    found = [trials.at(values, share) for share in (0, 0.5, 1 - 1e-9)]
    assert found == sorted(found) and found[::2] == ([4, 6] if isinstance(values, list) else [values.low, values.high])


def test_bayes_begins_evenly(tmp_path):
    sweep = a_sweep(tmp_path, 'method = "random"\nmax_runs = 1\nlearning_rate = log_uniform(1e-5, 1.0)\nmin_lr = 0.0\n'
                              'n_layer = uniform(1, 5)\nbias = [True, False]')
    points = searches.first_points(sweep)
    assert sorted(point['learning_rate'] for point in points) == pytest.approx([10**-(i + 0.5) for i in range(5)][::-1],
                                                                             rel=1e-3)
    assert sorted(point['n_layer'] for point in points) == [1, 2, 3, 4, 5]


def test_labels():
    assert len({trials.label({'learning_rate': rate}) for rate in (0.12345671, 0.12345672)}) == 2
    assert trials.label({'variant': 'two\nlines', 'dropout': 1e-05}) == 'two lines, dropout=1e-05'
    assert trials.label({}) == 'as it is'


def test_seconds_left():
    assert trials.seconds_left([10, 20], 6, 2) == 45 and trials.seconds_left([10, 20], 1, 8) == 15
    assert trials.seconds_left([10], 0, 4) == 0


def test_gpus(monkeypatch):
    for value, names in ('2,0', ['2', '0']), ('-1', []), ('1,-1,0', ['1']):
        monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', value)
        assert trials.visible_gpus() == names


def test_the_mean_of_histories():
    first, second = History({'parameters': 3}), History()
    for step, value in (0, 4.0), (10, 2.0), (20, 1.0):
        first.add(step, {'val/loss': value, 'lr': 0.5})
    for step, value in (0, 2.0), (20, 2.0), (30, 9.0):
        second.add(step, {'val/loss': value})
    mean = tables.mean_history([first, second])
    assert [list(values) for values in mean.get('val/loss')] == [[0, 20], [3.0, 1.5]], 'steps that both have'
    assert not len(mean.get('lr')[0]) and mean.facts == {'parameters': 3}
    assert tables.mean_history([first]) is first


@pytest.mark.parametrize('file', sorted((ROOT / 'config/sweeps').glob('*.py')), ids=lambda file: file.stem)
@needs_mirror
def test_files_of_the_project(file, tmp_path, monkeypatch):
    if file.stem == 'rate_bayes':
        pytest.importorskip('optuna')
    (tmp_path / 'data').mkdir()
    monkeypatch.chdir(tmp_path)
    sweep = trials.read(str(file), {}, ROOT / 'train.py', lambda settings: None)
    assert sweep.description and sweep.axes()


# ---------------------------------------------------------------------------------------------------------------------
# commands


QUIET = ['--tensorboard=False', '--save_interval=0']


def test_commands(tmp_path):
    (tmp_path / 'base.py').write_text('init_from = "gpt2"\nsave_interval = 50\n')

    def words(lines):
        sweep = a_sweep(tmp_path, lines)
        return trials.command(sweep, trials.new_run(tmp_path / 's', 1, trials.points(sweep)[0], 7), 'train.py')[2:]
    assert words('batch_size = [3]\nlearning_rate = 1e-3\nmin_lr = 1e-5') == [
        *QUIET, '--learning_rate=0.001', '--min_lr=1e-05', '--batch_size=3',
        '--seed=7', f'--out_dir={tmp_path}/s/001-batch_size=3-7', '--init_from=auto']
    found = words(f'config = "{tmp_path}/base.py --tensorboard=True"\nsave_interval = [100]')
    assert found[:4] == [*QUIET, f'{tmp_path}/base.py', '--tensorboard=True'], 'what the file says wins'
    assert '--save_interval=100' in found and found[-1] == '--init_from=gpt2'
    base = a_sweep(tmp_path, f'config = "{tmp_path}/base.py"').base
    assert (base['save_interval'], base['tensorboard']) == (50, False)
    (tmp_path / 's/001-batch_size=3-7').mkdir(parents=True)
    (tmp_path / 's/001-batch_size=3-7/ckpt.pt').touch()
    assert words(f'config = "{tmp_path}/base.py"\nbatch_size = [3]')[-1] == '--init_from=resume'


# ---------------------------------------------------------------------------------------------------------------------
# mistakes


@pytest.mark.parametrize('lines, args, named', [
    ('learning_rte = [1e-3]', [], ['learning_rte', 'learning_rate']),
    ('metod = "grid"', [], ['metod', 'method']),
    ('batch_size = [8, 1.5]', [], ['batch_size', '1.5', 'whole number']),
    ('batch_size = "8"', [], ['batch_size', 'whole number']),
    ('batch_size = []', [], ['batch_size = []', 'at least one']),
    ('learning_rate = [0.0]', [], ['learning_rate = 0.0', 'learning_rate > 0']),
    ('n_embd = [64, 96]\nn_head = [2, 5]', [], ['n_embd = 64', 'n_head = 5', 'multiple']),
    ('variants = {"a": {"n_head": 3}}', [], ['n_head = 3', 'multiple']),
    ('lr_schedule = ["cosine", "wds"]', [], ['wds', 'did you mean wsd?']),
    ('lr_schedule = "multistep:200,100"', [], ['200,100', 'each higher than the one before']),
    ('variants = {"a": {"n_hed": 3}}', [], ['n_hed', 'n_head']),
    ('variants = {"a": 3}', [], ['variants', "'a'"]),
    ('variants = ["a"]', [], ['variants']),
    ('variants = {"a": {"n_layer": 3}}\nn_layer = [1, 2]', [], ['n_layer', "'a'"]),
    ('method = "gird"', [], ['gird', 'grid']),
    ('', ['--method=gird'], ['gird', 'grid']),
    ('learning_rate = uniform(0.1, 0.2)', [], ['learning_rate', 'range', 'random']),
    ('method = "random"\nlearning_rate = uniform(0.1, 0.2)', [], ['max_runs = 0', '--max_runs=20']),
    ('method = "random"\nlearning_rate = log_uniform(0, 0.2)', ['--max_runs=2'], ['log_uniform', 'above 0']),
    ('method = "random"\nlearning_rate = uniform(0.2, 0.1)', ['--max_runs=2'], ['learning_rate', 'smaller first']),
    ('method = "random"\nn_layer = uniform(1, 2.5)', ['--max_runs=2'], ['n_layer', 'whole number']),
    ('method = "random"\nbias = uniform(0, 1)', ['--max_runs=2'], ['bias', 'list']),
    ('method = "bayes"\nn_head = uniform(1, 3)', ['--max_runs=2'], ['n_head = 3', 'multiple']),
    ('minimise = "a"\nmaximise = "b"', [], ["minimise = 'a'", "maximise = 'b'", 'one of them']),
    ('minimise = ""', [], ["minimise = ''", "maximise = ''", 'one of them']),
    ('maximise = 3', [], ['maximise = 3']),
    ('seeds = 0', [], ['seeds', 'from 1 on']),
    ('seeds = [1, "a"]', [], ['seeds', 'whole']),
    ('seeds = "three"', [], ['seeds', 'three']),
    ('out_dir = "here"', [], ['out_dir', '--out_dir']),
    ('seed = [1, 2]', [], ['seed', 'seeds']),
    ('init_from = "resume"', [], ['init_from', 'new']),
    ('init_from = ["scratch", "auto"]', [], ['init_from = auto', 'new']),
    ('variants = {"a": {"init_from": "resume"}}', [], ['init_from = resume', 'new']),
    ('dry_run = True', [], ['dry_run', 'trains']),
    ('variants = {"a": {"find_lr": True}}', [], ['find_lr', 'trains']),
    ('config = "--eval_only"', [], ['eval_only', 'trains']),
    ('config = "--out_dir=here"', [], ['out_dir', '--out_dir']),
    ('config = "--seed 7"', [], ['seed', 'seeds']),
    ('config = "\'unclosed"', [], ['config', 'quotation']),
    ('complie = None', [], ['complie', 'did you mean compile?']),
    ('from kit.base import overrides as _o\n_o.fail("of my own")', [], ['of my own']),
    ('method = "bayes"\nmax_runs = 3', [], ['bayes', 'no setting']),
    ('batch_size = [1]', ['--wandb', '--jobs=2'], ['jobs = 2', 'wandb']),
    ('batch_size = [1]', [f'--out_dir={"x" * 300}'], ['xxx', 'nothing can be written']),
    ('config = "config/train_shakespeare_cha.py"', [], ['train_shakespeare_cha', 'train_shakespeare_char.py']),
    ('config = "--batch_sise=3"', [], ['batch_sise', 'batch_size']),
    ('batch_size = [', [], ['x.py', 'line 1']),
    ('batch_size = undefined', [], ['NameError']),
    ('', ['--job=2'], ['--job', 'jobs']),
    ('', ['y.py'], ['one sweep file', '2']),
    ('', ['--jobs=-1'], ['jobs = -1']),
    ('import sys\nsys.exit(2)', [], ['x.py: SystemExit: 2']),
    ('variants = {1: {}}', [], ['x.py: variants: 1 is no name']),
    ('variants = {"a": {1: 2}}', [], ["variants, 'a': 1"]),
    ('variants = {"a": {"__class__": 2}}', [], ['__class__']),
    ('variants = {"a\\0": {}}', [], ['is no name']),
    ('seeds = 10**12', [], ['seeds = 1000000000000', '100,000']),
    ('seeds = 10**400', [], ['seeds', '2**63']),
    ('max_runs = 10**400', [], ['max_runs', '2**63']),
    ('learning_rate = [i / 1e9 for i in range(1, 10**5)]\nn_embd = list(range(1, 10**5))', [], ['9999800001 runs']),
    ('method = "random"\nlearning_rate = uniform(0.1, 0.2)', ['--max_runs=1000000000000'], ['1000000000000 runs']),
    ('method = "bayes"\nn_embd = list(range(1, 10**3))\nlearning_rate = [i / 1e9 for i in range(1, 10**3)]',
     ['--max_runs=3'], ['corners']),
    ('learning_rate = uniform(float("nan"), 1)', [], ['nan', 'finite']),
    ('learning_rate = uniform(10**5000, 1)', [], ['learning_rate', '2**63']),
    ('learning_rate = (x for x in range(3))', [], ['generator', 'a number']),
    ('wandb_run_name = ["a\\0b"]', [], ['wandb_run_name', 'character']),
    ('config = "--wandb_run_name=\\0"', [], ['config', 'character']),
    ('config = "\\""', [], ['config', 'quotation']),
    ('config = "' + 'x' * 9999 + '"', [], ['xxx']),
    ('minimise = "' + '__class__' + '"\nmaximise = 3', [], ['maximise = 3']),
    ('architecture = ["modern", "modern,mlp=swigloo"]', [], ['swigloo', 'did you mean swiglu?']),
    ('optimizer = ["muon:0.02", "muon:x"]', [], ['muon:x', 'is no rate']),
    ('n_embd = [32, 33]', [], ['n_embd = 33', 'needs an even']),
])
def test_mistakes_are_one_line(run, tmp_path, lines, args, named):
    (tmp_path / 'x.py').write_text(lines)
    result = run('sweep.py', 'x.py', *args)
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    for word in named:
        assert word in result.err
    assert os.listdir(tmp_path) == ['x.py']


def test_no_file_or_an_unknown_one(run):
    result = run('sweep.py')
    assert result.status == 2 and 'config/sweeps/rate_grid.py' in result.err and result.err.count('\n') == 1
    result = run('sweep.py', 'config/sweeps/rate_gird.py')
    assert result.status == 2 and 'did you mean config/sweeps/rate_grid.py?' in result.err
    assert '--jobs=0' in run('sweep.py', '--help').out


def test_bayes_without_optuna(run, tmp_path):
    (tmp_path / 'x.py').write_text('method = "bayes"\nmax_runs = 3\nlearning_rate = log_uniform(1e-3, 1e-1)')
    (tmp_path / 'hooked.py').write_text(
        f'import sys; sys.path.insert(0, {str(ROOT)!r}); __file__ = {str(ROOT / "sweep.py")!r}\n'
        'import importlib.util as util\nold = util.find_spec\n'
        'util.find_spec = lambda name, *args: None if name == "optuna" else old(name, *args)\n'
        'exec(compile(open(__file__).read(), __file__, "exec"))\n')
    result = run(tmp_path / 'hooked.py', 'x.py')
    assert result.status == 2 and 'pip install optuna' in result.err and result.err.count('\n') == 1, result.err


# ---------------------------------------------------------------------------------------------------------------------
# with train.py itself


def test_a_grid_of_real_runs(run, tiny):
    (tiny / 'x.py').write_text(f'"""Two rates."""\nconfig = "{" ".join(TINY)} --dataset=tiny"\nmax_bad_steps = 2\n'
                               'learning_rate = [1e-2, 1e38]\n')
    result = run('sweep.py', 'x.py', '--jobs=2')
    assert result.status == 0, result.err
    good, bad = table(tiny / 'sweeps/x')
    assert (good['status'], bad['status']) == ('finished', 'diverged') and 'not finite' in bad['error']
    assert float(good['learning_rate']) == 1e-2 and good['seed'] == '1337' and good['steps'] == '10'
    folder = tiny / 'sweeps/x' / good['run']
    logged = records(folder)
    losses = {record['step']: record['val/loss'] for record in logged if 'val/loss' in record}
    assert float(good['lowest val/loss']) == min(losses.values()) and float(good['last val/loss']) == losses[10]
    assert losses[int(good['at step'])] == min(losses.values())
    assert float(good['last train/loss']) == [r['train/loss'] for r in logged if 'train/loss' in r][-1]
    assert float(good['seconds']) == max(record['time'] for record in logged)
    assert float(good['peak memory (GiB)']) == max(r.get('system/cpu_memory_gib', 0) for r in logged)
    assert float(good['tokens/s']) == statistics.median(r['tokens_per_second'] for r in logged if 'mfu' in r)
    console = (folder / 'console.log').read_text(encoding='utf-8')
    assert len(good['sample']) == 8 * 16 + 1 and f'a sample of its own:\n{good["sample"]}\n\n' in console
    text = (tiny / 'sweeps/x/results.md').read_text(encoding='utf-8')
    assert 'Two rates.' in text and '1 finished, 1 diverged' in text and 'learning_rate=0.01' in result.out
    assert (tiny / 'sweeps/x/comparison.png').stat().st_size > 10_000
    assert {path.name for path in folder.glob('step_*.pt')} == {'step_0000005.pt', 'step_0000010.pt'}, \
        'save_interval = 5 of the words counts'
    assert not (tiny / 'runs').exists()


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere the runs of a killed sweep end by themselves')
@pytest.mark.long
def test_a_killed_sweep_goes_on(run, tiny):
    """kill -9: no process is left, the finished run stays, the half-made one goes on bit for bit."""
    lines = (f'config = "{" ".join(TINY)} --dataset=tiny"\nmax_iters = [10, 300]\neval_interval = 50\n'
             'always_save_checkpoint = True\nsave_interval = 50\nlog_interval = 50\nkeep_last = 1\n')
    (tiny / 'x.py').write_text(lines)
    env = os.environ | {'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen([sys.executable, str(ROOT / 'sweep.py'), 'x.py'], cwd=tiny, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    half = tiny / 'sweeps/x/002-max_iters=300-1337'
    wait_for(lambda: (half / 'ckpt.pt').exists())
    left = children(process.pid)
    process.kill()
    process.wait()
    assert left
    finished = (tiny / 'sweeps/x/001-max_iters=10-1337/result.json').stat().st_mtime_ns
    result = run('sweep.py', 'x.py', env={'OMP_NUM_THREADS': '1'})  # at once, while the old run may still be saving
    assert result.status == 0, result.err
    assert not any(map(is_alive, left))
    assert (tiny / 'sweeps/x/001-max_iters=10-1337/result.json').stat().st_mtime_ns == finished
    assert 'ckpt.pt, after' in (half / 'console.log').read_text() and not list(tiny.glob('sweeps/x/*.1'))
    (tiny / 'y.py').write_text(lines.replace('[10, 300]', '[300]'))
    assert run('sweep.py', 'y.py', env={'OMP_NUM_THREADS': '1'}).status == 0
    whole, = table(tiny / 'sweeps/y')
    resumed = table(tiny / 'sweeps/x')[1]
    assert resumed['status'] == whole['status'] == 'finished'
    for name in 'lowest val/loss', 'at step', 'last train/loss', 'steps', 'sample':
        assert resumed[name] == whole[name], name


# ---------------------------------------------------------------------------------------------------------------------
# ends of all kinds, with the stand-in


def test_runs_that_fail_are_counted_and_the_sweep_goes_on(sweep, tmp_path):
    lines = 'how = ["well", "crash", "bad", "nan", "killed", "worse", "rises", "leaves"]\n'
    result = sweep(lines, '--jobs=2')
    assert result.status == 0 and 'Traceback' not in result.err, result.err
    rows = table(tmp_path / 'sweeps/x')
    assert [row['status'] for row in rows] == [
        'finished', 'crashed', 'diverged', 'diverged', 'crashed', 'diverged', 'finished', 'crashed']
    assert [row['steps'] for row in rows] == ['40', '20', '20', '40', '20', '40', '40', '20']
    assert rows[1]['error'] == 'RuntimeError: out of luck' and 'SIGKILL' in rows[4]['error']
    assert rows[2]['error'].startswith('stopped at step 20') and rows[7]['error'].startswith('status 3 after: ')
    assert rows[6]['at step'] == '10' and float(rows[6]['lowest val/loss']) < float(rows[6]['last val/loss']) - 0.5
    assert rows[0]['sample'] == 'It, "said"\n\nhe.' and rows[1]['sample'] == ''
    text = (tmp_path / 'sweeps/x/results.md').read_text()
    assert '2 finished, 3 diverged, 3 crashed; 240 steps in all' in text
    assert rows[5]['error'] == 'val/loss is 42.3598 at the end, and a fair guess has 10.8258'
    assert rows[0]['parameters'] == '32'
    assert text.index('how=well') < text.index('how=bad') < text.index('how=crash')
    begins = lambda: {p.parent.name[:3]: p.read_text().split('\n')[:-1] for p in tmp_path.glob('sweeps/x/*/begins')}
    assert begins() == {f'00{i}': ['auto 0'] for i in range(1, 9)}
    assert sweep(lines).status == 0
    assert begins() == {f'00{i}': ['auto 0'] + (['resume 20'] if i in (2, 5, 8) else []) for i in range(1, 9)}, \
        'crashed ones are tried again'


def test_seeds_are_averaged(sweep, tmp_path):
    lines = 'learning_rate = [1e-2, 1e-4]\nn_embd = [32, 64]\n'
    assert sweep(lines).status == 0
    result = sweep(lines, '--seeds=3', '--jobs=3')
    assert result.status == 0 and '12 runs' in result.out and '4 were made before' in result.out, result.out
    rows = table(tmp_path / 'sweeps/x')
    assert len(rows) == 12 and {row['seed'] for row in rows} == {'1337', '1338', '1339'}
    losses = [float(row['lowest val/loss']) for row in rows if (row['learning_rate'], row['n_embd']) == ('0.01', '64')]
    line, = [line for line in (tmp_path / 'sweeps/x/results.md').read_text().split('\n')
             if 'learning_rate=0.01, n_embd=64' in line]
    cells = [cell.strip() for cell in line.split('|')]
    assert cells[3:6] == [f'{statistics.mean(losses):.4f}', f'{statistics.stdev(losses):.4f}', '3']
    assert cells[1] == '2', 'the larger one has the larger loss'
    assert len(list(tmp_path.glob('sweeps/x/*/begins'))) == 12
    assert all(path.read_text() == 'auto 0\n' for path in tmp_path.glob('sweeps/x/*/begins'))


def test_the_highest_of_a_figure_of_an_evaluation(sweep, tmp_path):
    """Table, CSV, lines and the order of the set-ups; a NaN, as at step 30, is no best."""
    result = sweep('maximise = "val/score"\nlearning_rate = [1e-4, 1e-2, 3e-3]\nhow = ["rises"]\n', '--jobs=2')
    assert result.status == 0, result.err
    rows = table(tmp_path / 'sweeps/x')
    for row in rows:
        scores = {r['step']: r['val/score'] for r in records(tmp_path / 'sweeps/x' / row['run']) if 'val/score' in r}
        assert scores[30] is None
        best = max(scores, key=lambda step: scores[step] or 0)
        assert (float(row['highest val/score']), int(row['at step'])) == (scores[best], best) and best == 10
    order = sorted(rows, key=lambda row: -float(row['highest val/score']))
    lines = [line for line in result.out.splitlines() if line.startswith('| ') and 'learning_rate=' in line]
    assert '| highest val/score |' in result.out and len(lines) == 3
    for line, row in zip(lines, order):
        assert f'learning_rate={row["learning_rate"]},' in line and f'{float(row["highest val/score"]):.4f}' in line
    assert ': highest val/score ' in result.out
    assert 'A figure is the highest val/score of a run' in (tmp_path / 'sweeps/x/results.md').read_text()
    assert (tmp_path / 'sweeps/x/comparison.png').stat().st_size > 10_000
    again = sweep('learning_rate = [1e-4, 1e-2, 3e-3]\nhow = ["rises"]\n')
    assert again.status == 2 and 'holds another sweep' in again.err, 'whose runs are judged by the loss'


def test_the_lowest_of_a_figure_of_the_updates(sweep, tmp_path):
    """Small ones are told apart; whether a run has diverged still goes by its loss."""
    result = sweep('minimise = "z_loss"\nvariants = {"a": {"dropout": 1e-5}, "b": {"how": "worse"}}\n', '--jobs=2')
    assert result.status == 0, result.err
    rows = table(tmp_path / 'sweeps/x')
    assert [(row['status'], float(row['lowest z_loss'])) for row in rows] == [('finished', 1e-5), ('diverged', 0)]
    assert rows[0]['at step'] == '25' and rows[1]['error'].startswith('val/loss is ') and ' 1e-05 |' in result.out


def test_a_figure_that_no_run_records(sweep, tmp_path):
    """One line; the run stays, and with the right name the sweep goes on from it."""
    lines = 'maximise = "val/scor"\nn_embd = [32]\n'
    result = sweep(lines)
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    assert 'run 001-n_embd=32-1337' in result.err and 'figure val/scor,' in result.err and 'val/score' in result.err
    assert [path.parent.name for path in tmp_path.glob('sweeps/x/*/metrics.jsonl')] == ['001-n_embd=32-1337']
    assert not list(tmp_path.glob('sweeps/x/*/result.json'))
    assert sweep(lines.replace('scor"', 'score"')).status == 0
    assert [path.read_text().split()[::2] for path in sorted(tmp_path.glob('sweeps/x/*/begins'))] == [
        ['auto', 'resume']]


def test_a_sweep_of_before_figures_could_be_maximised(sweep, tmp_path):
    """Its sweep.json has no maximise, and its results call the best the lowest."""
    assert sweep('n_embd = [32]\n').status == 0
    before = table(tmp_path / 'sweeps/x')
    identity = json.loads((tmp_path / 'sweeps/x/sweep.json').read_text())
    assert identity.pop('maximise') == '' and identity['minimise'] == 'val/loss'
    (tmp_path / 'sweeps/x/sweep.json').write_text(json.dumps(identity))
    for path in tmp_path.glob('sweeps/x/*/result.json'):
        path.write_text(path.read_text().replace('"best"', '"lowest"'))
    result = sweep('n_embd = [32]\n', '--seeds=2')
    assert result.status == 0 and '1 were made before' in result.out, result.err
    assert [row for row in table(tmp_path / 'sweeps/x') if row['seed'] == '1337'] == before


def test_threads_and_gpus(sweep, project, tmp_path):
    environment = lambda: [json.loads(p.read_text()) for p in sorted(tmp_path.glob('sweeps/x/*/environment'))]
    env = {k: v for k, v in os.environ.items() if k not in ('OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES')}
    (tmp_path / 'x.py').write_text('seeds = 2\n')
    subprocess.run([sys.executable, project / 'sweep.py', 'x.py', '--jobs=2'], cwd=tmp_path, env=env, check=True,
                   capture_output=True)
    assert [e['OMP_NUM_THREADS'] for e in environment()] == [str(max(1, ranks.cores() // 2))] * 2
    shutil.rmtree(tmp_path / 'sweeps')
    result = sweep('device = "cuda"\nseeds = 4\npace = 0.01\n', env={'CUDA_VISIBLE_DEVICES': '5,7'})
    assert result.status == 0 and '2 at a time' in result.out, result.err
    assert {e['CUDA_VISIBLE_DEVICES'] for e in environment()} == {'5', '7'}


@pytest.mark.parametrize('word', ['SIGTERM', 'SIGINT'])
def test_told_to_stop(sweep, project, tmp_path, word):
    lines = 'n_embd = [32, 64, 96]\npace = 0.02\n'
    (tmp_path / 'x.py').write_text(lines)
    process = subprocess.Popen([sys.executable, str(project / 'sweep.py'), 'x.py', '--jobs=2'], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: len(list(tmp_path.glob('sweeps/x/*/ckpt.pt'))) == 2)
    left = children(process.pid)
    process.send_signal(signal.Signals[word])
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.Signals[word], err
    assert len(left) == 2 and not any(map(is_alive, left))
    assert f'{word}: stopped with 0 of 3' in out and 'sweep.py x.py --jobs=2' in out and 'Traceback' not in err
    assert sweep(lines, '--jobs=3').status == 0
    rows = table(tmp_path / 'sweeps/x')
    assert [row['status'] for row in rows] == ['finished'] * 3
    begins = [path.read_text().split() for path in sorted(tmp_path.glob('sweeps/x/*/begins'))]
    assert [words[::2] for words in begins] == [['auto', 'resume'], ['auto', 'resume'], ['auto']]


def test_folders_of_others(sweep, tmp_path):
    assert sweep('n_embd = [32, 64]\n').status == 0
    for lines, named in [('n_embd = [32, 96]\n', 'space'), ('n_embd = [64, 32]\n', 'space'),
                         ('n_embd = [32, 64]\ndropout = 0.5\n', 'settings'),
                         ('n_embd = [32, 64]\nmethod = "random"\nmax_runs = 2\n', 'method')]:
        result = sweep(lines)
        assert result.status == 2 and result.err.count('\n') == 1, result.err
        assert 'holds another sweep' in result.err and named in result.err and '--out_dir' in result.err
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/notes').touch()
    result = sweep('n_embd = [32, 64]\n', '--out_dir=mine')
    assert result.status == 2 and 'no sweep' in result.err and os.listdir(tmp_path / 'mine') == ['notes']
    (tmp_path / 'mine/notes').rename(tmp_path / 'mine/.sweep.json.part')
    assert sweep('n_embd = [32, 64]\n', '--out_dir=mine').status == 0, 'killed when it had just begun'
    (tmp_path / 'sweeps/x/sweep.json').write_text('{"method": ')
    result = sweep('n_embd = [32, 64]\n')
    assert result.status == 2 and 'cannot be read' in result.err


def test_a_damaged_result_is_made_again(sweep, tmp_path):
    assert sweep('n_embd = [32, 64]\n').status == 0
    next(tmp_path.glob('sweeps/x/002-*/result.json')).write_text('{"number": 2, "po')
    result = sweep('n_embd = [32, 64]\n')
    assert result.status == 0 and '1 were made before' in result.out, result.err
    assert [path.read_text().split()[::2] for path in sorted(tmp_path.glob('sweeps/x/*/begins'))] == [
        ['auto'], ['auto', 'resume']]
    assert len(table(tmp_path / 'sweeps/x')) == 2


def test_fewer_seeds_count_fewer_runs(sweep, tmp_path):
    assert sweep('seeds = 3\n').status == 0
    result = sweep('seeds = 1\n')
    assert '1 runs in' in result.out and '1 were made before; 2 more, of other seeds' in result.out
    assert len(table(tmp_path / 'sweeps/x')) == 1


def test_mistakes_that_a_run_finds_stop_the_sweep(sweep, tmp_path):
    result = sweep('how = ["mistake", "well", "rises"]\npace = 0.05\n', '--jobs=2')
    assert result.status == 2 and result.err.count('\n') == 1 and 'how = mistake: so it ends' in result.err, result.err
    assert not list(tmp_path.glob('sweeps/x/*/result.json')) and len(list(tmp_path.glob('sweeps/x/0*'))) == 2


def test_nothing_finished(sweep):
    result = sweep('how = ["nan", "bad"]\n')
    assert result.status == 1 and not result.err and '| how=nan | ' in result.out and 'results.csv' in result.out


def test_a_full_disk(sweep, tmp_path):
    """In its place a folder where the picture should be, which cannot be written either."""
    assert sweep('n_embd = [32]\n').status == 0
    (tmp_path / 'sweeps/x/comparison.png').unlink()
    (tmp_path / 'sweeps/x/comparison.png').mkdir()
    result = sweep('n_embd = [32]\n', '--seeds=2')
    assert result.status == 0 and result.err.count('WARNING') == 1 and 'the sweep goes on' in result.err, result.err
    assert ', comparison.png' not in result.out and len(table(tmp_path / 'sweeps/x')) == 2


def test_a_folder_in_which_another_process_writes(sweep, project, tmp_path):
    fcntl = pytest.importorskip('fcntl')
    (tmp_path / 'x.py').write_text('n_embd = [32]\n')
    name = '001-n_embd=32-1337'
    (tmp_path / 'sweeps/x' / name).mkdir(parents=True)
    (tmp_path / 'sweeps/x/sweep.json').write_text(
        json.dumps(a_sweep(tmp_path, 'n_embd = [32]\n', project / 'train.py').identity()))
    with open(tmp_path / 'sweeps/x' / name / '.lock', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = subprocess.Popen([sys.executable, str(project / 'sweep.py'), 'x.py'], cwd=tmp_path, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        wait = [process.stdout.readline() for _ in range(2)]
        time.sleep(0.5)
        assert f'waits for {name}: another process writes there\n' in wait
        assert not (tmp_path / 'sweeps/x' / name / 'begins').exists()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and 'waits' not in out


def test_one_sweep_at_a_time_in_a_folder(sweep, project, tmp_path):
    lines = 'n_embd = [32, 64]\npace = 0.05\n'
    (tmp_path / 'x.py').write_text(lines)
    process = subprocess.Popen([sys.executable, str(project / 'sweep.py'), 'x.py'], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: list(tmp_path.glob('sweeps/x/*/begins')))
    result = sweep(lines)
    process.terminate()
    process.wait()
    assert result.status == 2 and 'another run is writing there' in result.err and result.err.count('\n') == 1


# ---------------------------------------------------------------------------------------------------------------------
# bayes

BAYES = 'method = "bayes"\nmax_runs = 12\nlearning_rate = log_uniform(1e-5, 1.0)\neval_interval = 2\npace = 0.004\n'


@pytest.mark.long
def test_bayes_prunes_and_comes_near(sweep, tmp_path):
    pytest.importorskip('optuna')
    result = sweep(BAYES)
    assert result.status == 0, result.err
    rows = table(tmp_path / 'sweeps/x')
    assert len(rows) == 12 and {row['status'] for row in rows} == {'finished', 'pruned'}
    best = min((row for row in rows if row['status'] == 'finished'), key=lambda row: float(row['lowest val/loss']))
    assert abs(math.log10(float(best['learning_rate'])) + 2.5) < 0.4, 'the best rate is 10**-2.5'
    pruned = [row for row in rows if row['status'] == 'pruned']
    assert all(0 < int(row['steps']) < 40 for row in pruned) and 'pruned after' in result.out
    begun = len(list(tmp_path.glob('sweeps/x/*/begins')))
    assert sweep(BAYES).status == 0 and len(list(tmp_path.glob('sweeps/x/*/begins'))) == begun == 12
    assert sweep(BAYES, '--max_runs=13').status == 0 and len(table(tmp_path / 'sweeps/x')) == 13


@pytest.mark.long
def test_bayes_goes_on_after_a_kill(sweep, project, tmp_path):
    """With the set-ups that it would have had."""
    pytest.importorskip('optuna')
    lines = BAYES.replace('eval_interval = 2', 'eval_interval = 40').replace('12', '7')
    (tmp_path / 'x.py').write_text(lines)
    process = subprocess.Popen([sys.executable, str(project / 'sweep.py'), 'x.py'], cwd=tmp_path,
                               stdout=subprocess.DEVNULL)
    wait_for(lambda: (list(tmp_path.glob('sweeps/x/006-*/begins'))))
    process.kill()
    process.wait()
    result = sweep(lines)
    assert result.status == 0, result.err
    assert sweep(lines, '--out_dir=whole').status == 0
    assert setups(tmp_path / 'sweeps/x') == setups(tmp_path / 'whole') and len(setups(tmp_path / 'whole')) == 7
    assert all(row['status'] == 'finished' for row in table(tmp_path / 'sweeps/x')), 'there was nothing to prune by'


def a_study(tmp_path, lines, results=()):
    sweep = a_sweep(tmp_path, f'method = "bayes"\nmax_runs = 9\n{lines}')
    return searches.Study(sweep, tmp_path, dict.fromkeys(results))


def finished(study, run, loss):
    return study.next_of(run.number, {(run.number, run.seed): {'status': 'finished', 'best': loss}})


def test_bayes_hears_nothing_of_step_0(tmp_path):
    pytest.importorskip('optuna')
    study = a_study(tmp_path, 'learning_rate = log_uniform(1e-4, 1e-3)\nmin_lr = 0.0')
    run, = study.ask()
    run.history.add(0, {'val/loss': 9.0})
    assert not study.is_hopeless(run) and not study.study.trials[0].intermediate_values
    run.history.add(10, {'val/loss': 3.0})
    assert not study.is_hopeless(run) and study.study.trials[0].intermediate_values == {10: 3.0}
    study.study = None
    assert not study.is_hopeless(run), 'where there is nothing new nobody is asked'


def test_bayes_looks_for_the_highest(tmp_path):
    """Optuna knows the direction; of a figure that each update has it hears the best since the last evaluation."""
    pytest.importorskip('optuna')
    study = a_study(tmp_path, 'learning_rate = log_uniform(1e-4, 1e-3)\nmin_lr = 0.0\nmaximise = "score"')
    assert study.study.direction.name == 'MAXIMIZE'
    run, = study.ask()
    for step in range(21):
        if step % 10 == 0:
            run.history.add(step, {'val/loss': 3.0})
            assert not study.is_hopeless(run)
        run.history.add(step, {'score': math.nan if step == 5 else float(step % 10)})
    assert study.study.trials[0].intermediate_values == {10: 9.0, 20: 9.0}
    assert study.next_of(1, {(1, run.seed): {'status': 'finished', 'best': None}}) == [], 'all of it was NaN'
    assert study.study.trials[0].state.name == 'PRUNED'


def test_bayes_makes_no_point_twice(tmp_path):
    pytest.importorskip('optuna')
    study, points = a_study(tmp_path, 'n_layer = [1, 2, 3]'), []
    while runs := study.ask():
        points.append(runs[0].point['n_layer'])
        assert finished(study, runs[0], float(points[-1])) == []
    assert sorted(points) == sorted(set(points)) and len(study.study.trials) <= 9
    assert all(trial.value == trial.params['n_layer'] for trial in study.study.trials)


def test_bayes_goes_on_where_it_was_killed_while_it_asked(tmp_path):
    pytest.importorskip('optuna')
    lines = 'learning_rate = log_uniform(1e-4, 1e-3)\nmin_lr = 0.0\nn_layer = uniform(1, 5)'
    study = a_study(tmp_path, lines)
    study.study.enqueue_trial(searches.first_points(study.sweep)[0])
    again = a_study(tmp_path, lines)
    run, = again.undone({})
    assert run.point == searches.first_points(study.sweep)[0]
    half = again.study.ask()  # of which nothing is chosen yet
    half.suggest_float('learning_rate', 1e-4, 1e-3, log=True)
    again = a_study(tmp_path, lines)
    assert [run.point.keys() for run in again.undone({})] == [{'learning_rate', 'n_layer'}] * 2


def test_bayes_without_its_study(tmp_path, capsys):
    pytest.importorskip('optuna')
    for damage in None, '', 'no database':
        if damage is not None:
            (tmp_path / 'study.db').write_text(damage)
        with pytest.raises(SystemExit) as end:
            a_study(tmp_path, 'n_layer = [1, 2]', [(1, 1337)])
        err = capsys.readouterr().err
        assert end.value.code == 2 and 'study.db' in err and err.count('\n') == 1
        assert [path.read_text() for path in tmp_path.glob('study.db')] == ([] if damage is None else [damage])


def test_bayes_with_seeds_variants_and_failures(sweep, tmp_path):
    pytest.importorskip('optuna')
    lines = ('method = "bayes"\nmax_runs = 7\nseeds = 2\n'
             'variants = {"a": {}, "b": {"how": "crash"}, "c": {"how": "nan"}}\nn_embd = log_uniform(32, 64)\n')
    result = sweep(lines, '--jobs=2')
    assert result.status == 0, result.err
    rows = table(tmp_path / 'sweeps/x')
    seeds = {}
    for row in rows:
        seeds.setdefault((row['variant'], row['status'], row['run'][:3]), []).append(row['seed'])
    kinds = {kind: {len(found) for (*one, _), found in seeds.items() if tuple(one) == kind}
             for kind in [('a', 'finished'), ('b', 'crashed'), ('c', 'diverged')]}
    assert list(kinds.values()) == [{2}, {1}, {1}], 'what failed needs no second seed'


# ---------------------------------------------------------------------------------------------------------------------
# Weights & Biases: there is no server in a test, so its own source is asked what it makes of our file, and a module
# stands in for it where it would call one


def test_wandb_config(tmp_path):
    utils = pytest.importorskip('wandb.sdk.launch.sweeps.utils')
    sweep = a_sweep(tmp_path, '"""Why."""\nconfig = "config/train_gpt2.py --compile=False"\nmethod = "random"\n'
                              'max_runs = 9\nseeds = 2\nbatch_size = [1, 2]\nlearning_rate = log_uniform(1e-4, 1e-3)\n'
                              'dropout = uniform(0, 0.5)\nn_layer = uniform(2, 4)\nblock_size = log_uniform(32, 64)\n'
                              'max_iters = 7')
    config = searches.wandb_config(sweep, 'x', tmp_path / 'a b', ROOT / 'train.py')
    assert config['metric'] == {'name': 'val/loss', 'goal': 'minimize'} and config['method'] == 'random'
    other = searches.wandb_config(a_sweep(tmp_path, 'maximise = "a"'), 'x', tmp_path, ROOT / 'train.py')
    assert other['metric'] == {'name': 'a', 'goal': 'maximize'}
    assert config['parameters'] == {
        'seed': {'values': [1337, 1338]}, 'batch_size': {'values': [1, 2]},
        'learning_rate': {'distribution': 'log_uniform_values', 'min': 1e-4, 'max': 1e-3},
        'dropout': {'distribution': 'uniform', 'min': 0.0, 'max': 0.5},
        'n_layer': {'distribution': 'int_uniform', 'min': 2, 'max': 4},
        'block_size': {'distribution': 'q_log_uniform_values', 'min': 32, 'max': 64, 'q': 1}}
    # what the agent does with it, wandb_agent.py: Agent._command_run
    words = utils.create_sweep_command(list(config['command']))
    args = utils.create_sweep_command_args({'args': {'batch_size': {'value': 2}, 'learning_rate': {'value': 3e-4}}})
    words = [w for word in words for w in (args['args'] if word == '${args}' else [word])]
    (tmp_path / 'show.py').write_text('import sys; print(sys.argv[1:])')
    words[words.index(str(ROOT / 'train.py'))] = str(tmp_path / 'show.py')
    shown = subprocess.run(words, env=os.environ | {'WANDB_RUN_ID': 'id7'}, capture_output=True, text=True, check=True)
    assert eval(shown.stdout) == [*QUIET, 'config/train_gpt2.py', '--compile=False', '--max_iters=7', '--wandb_log',
                                  '--batch_size=2', '--learning_rate=0.0003', f'--out_dir={tmp_path}/a b/id7']


def fake_wandb(calls, mode='online', is_logged_in=True):
    module = types.ModuleType('wandb')
    module.setup = lambda: types.SimpleNamespace(settings=types.SimpleNamespace(mode=mode))
    module.login = lambda **kwargs: is_logged_in
    module.sweep = lambda config, **kwargs: calls.append(('sweep', config, kwargs)) or 'id1'
    module.agent = lambda *args, **kwargs: calls.append(('agent', args, kwargs))
    module.errors = types.SimpleNamespace(Error=ConnectionError)
    return module


def test_wandb_is_called(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(overrides, 'require', lambda *args: None)
    monkeypatch.setitem(sys.modules, 'wandb', fake_wandb(calls))
    sweep = a_sweep(tmp_path, 'method = "bayes"\nmax_runs = 9\nlearning_rate = log_uniform(1e-4, 1e-3)\nmin_lr=0.0\n'
                              'wandb_project = "p"')
    searches.run_on_wandb(sweep, 'x', tmp_path / 'x', ROOT / 'train.py')
    (_, config, project), agent = calls
    assert config == searches.wandb_config(sweep, 'x', tmp_path / 'x', ROOT / 'train.py')
    assert project == {'project': 'p'}
    assert agent == ('agent', ('id1',), {'project': 'p', 'count': 9}) and not (tmp_path / 'x').exists()
    for kind, named in ({'mode': 'offline'}, 'offline'), ({'is_logged_in': False}, 'wandb login'):
        monkeypatch.setitem(sys.modules, 'wandb', fake_wandb(calls, **kind))
        with pytest.raises(SystemExit) as end:
            searches.run_on_wandb(sweep, 'x', tmp_path / 'x', ROOT / 'train.py')
        err = capsys.readouterr().err
        assert end.value.code == 2 and named in err and err.count('\n') == 1 and len(calls) == 2
    sweep.seeds = [1, 2]
    with pytest.raises(SystemExit):
        searches.run_on_wandb(sweep, 'x', tmp_path / 'x', ROOT / 'train.py')
    assert '--seeds=1' in capsys.readouterr().err


def test_wandb_offline_is_one_line(run, tmp_path):
    pytest.importorskip('wandb')
    (tmp_path / 'x.py').write_text('learning_rate = [1e-3]')
    for env, named in ({'WANDB_MODE': 'offline'}, 'offline'), ({'NETRC': str(tmp_path / 'none')}, 'wandb login'):
        result = run('sweep.py', 'x.py', '--wandb', env={'HOME': str(tmp_path), 'WANDB_SILENT': 'true'} | env)
        assert result.status == 2 and named in result.err and result.err.count('\n') == 1, result.err
        assert not (tmp_path / 'sweeps').exists()


@pytest.mark.parametrize('change', [
    lambda result: [], lambda result: {}, lambda result: 3, lambda result: result | {'number': 'x'},
    lambda result: result | {'point': None}, lambda result: result | {'steps': None},
    lambda result: result | {'best': 'x'}, lambda result: {name: result[name] for name in result if name != 'sample'}])
def test_a_result_of_other_types_is_made_again(sweep, tmp_path, change):
    assert sweep('learning_rate = [1e-3, 1e-2]').status == 0
    path = next((tmp_path / 'sweeps/x').glob('001*/result.json'))
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(change(whole)))
    result = sweep('learning_rate = [1e-3, 1e-2]')
    assert result.status == 0, result.err
    assert json.loads(path.read_text())['best'] == whole['best'] and '1 were made before' in result.out


@pytest.mark.parametrize('content', [b'', b'[]', b'3', b'[' * 100_000, b'\xff', b'{"method": 3}'])
def test_a_damaged_sweep_is_named(sweep, tmp_path, content):
    assert sweep('learning_rate = [1e-3]').status == 0
    (tmp_path / 'sweeps/x/sweep.json').write_bytes(content)
    result = sweep('learning_rate = [1e-3]')
    assert result.status == 2 and result.err.count('\n') == 1 and 'sweep.json' in result.err


def test_pipes_in_the_folder_of_a_sweep_are_not_waited_for(sweep, tmp_path):
    assert sweep('learning_rate = [1e-3]').status == 0
    path = next((tmp_path / 'sweeps/x').glob('001*/result.json'))
    path.unlink()
    os.mkfifo(path)
    assert sweep('learning_rate = [1e-3]').status == 0
    path = tmp_path / 'sweeps/x/sweep.json'
    path.unlink()
    os.mkfifo(path)
    result = sweep('learning_rate = [1e-3]')
    assert result.status == 2 and 'no sweep' in result.err


def test_files_of_a_sweep_that_are_links(sweep, tmp_path):
    """What they name is not the sweep's, and keeps its bytes."""
    mine = tmp_path / 'thesis.txt'
    mine.write_text('years of work')
    assert sweep('learning_rate = [1e-3]').status == 0
    folder = tmp_path / 'sweeps/x'
    for path in folder / 'results.csv', folder / 'results.md', folder / 'sweep.json.part', folder / '.results.csv.part':
        path.unlink(missing_ok=True)
        path.symlink_to(mine)
    assert sweep('learning_rate = [1e-3]').status == 0
    assert mine.read_text() == 'years of work'


def test_a_lock_that_is_a_link_holds_nobody(tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/.lock').symlink_to(tmp_path / 'nowhere')
    assert not trials.is_locked(tmp_path / 'run') and not (tmp_path / 'nowhere').exists()


def test_a_short_run_that_diverges(run, tiny):
    """It ends before max_bad_steps: with no loss, and status 0, or 1 where its weights are none to be saved."""
    words = ' '.join([*TINY, '--dataset=tiny', '--warmup_iters=0', '--eval_iters=1', '--grad_clip=0.0'])
    (tiny / 'x.py').write_text(f'config = {words!r}\nlearning_rate = [1e6, 1e38]\n')
    result = run('sweep.py', 'x.py')
    assert 'crashed' not in result.out and result.out.count('diverged: val/loss is') == 2, result.out + result.err


@pytest.mark.long
def test_what_lies_in_the_folder_of_a_run_to_come_stays(run, tiny):
    words = ' '.join([*TINY, '--dataset=tiny', '--max_iters=2'])
    (tiny / 'x.py').write_text(f'config = {words!r}\nlearning_rate = [1e-3, 2e-3]\n')
    assert run('sweep.py', 'x.py', '--max_runs=1').status == 0
    mine = tiny / 'sweeps/x/002-learning_rate=0.002-1337'
    mine.mkdir()
    (mine / 'notes.txt').write_text('mine')
    assert run('sweep.py', 'x.py').status == 0
    assert (mine / 'notes.txt').read_text() == 'mine' and (mine / 'ckpt.pt').exists()
