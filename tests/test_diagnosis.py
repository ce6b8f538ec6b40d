"""
What a run says of itself: planted sicknesses are named, and healthy runs are left in peace. Each is a real run of
train.py on a small text; what was planted is code that runs before the script, or a setting.
"""

import math

import numpy as np
import pytest
from conftest import GPT2, hooked_script, some_text

from kit.watch import diagnosis, runlogs
from kit.watch.diagnosis import History

BASE = ['--n_layer=2', '--n_head=2', '--n_embd=48', '--block_size=32', '--batch_size=8', '--max_iters=400',
        '--warmup_iters=40', '--learning_rate=3e-3', '--min_lr=3e-4', '--log_interval=5', '--eval_interval=50',
        '--eval_iters=10', '--save_interval=0', '--device=cpu', '--tensorboard=False']

# what is planted: into the model as it is made, into every forward pass, into a step
IN_INIT = """
import model, torch
from kit.data import batches
AT_STEP_50 = batches.torch_seed(1337, 50, 0)  # the generator's seed in that step alone
init = model.GPT.__init__
def planted(self, config):
    init(self, config)
    {}
model.GPT.__init__ = planted
"""
IN_FORWARD = """
import model, torch
forward = model.GPT.forward
def planted(self, idx, targets=None, *args, **kwargs):
    {}
    return forward(self, idx, targets, *args, **kwargs)
model.GPT.forward = planted
"""
SHUFFLE = """
    if targets is not None:
        targets = targets[torch.randperm(len(targets))][:, torch.randperm(targets.size(1))]
"""
NAN_IN_FORWARD = """
    self.transformer.h[1].mlp.register_forward_hook(
        lambda module, args, out: out * math.nan if torch.initial_seed() == AT_STEP_50 else out)
"""
NAN_IN_BACKWARD = """
    self.transformer.h[0].mlp.c_fc.weight.register_hook(
        lambda gradient: gradient * math.nan if torch.initial_seed() == AT_STEP_50 else gradient)
"""
NAN_IN_LOSS = """
import torch
from kit.data import batches
cross_entropy = torch.nn.functional.cross_entropy
def planted(*args, **kwargs):
    loss = cross_entropy(*args, **kwargs)
    return loss * math.nan if torch.initial_seed() == batches.torch_seed(1337, 50, 0) else loss
torch.nn.functional.cross_entropy = planted
"""
ID_IN_DATA = """
from kit.data import batches, readers
read = readers.Windows.read
def planted(self, starts):
    tokens = read(self, starts)
    if len(starts) == 8 and (starts == batches.window_starts(len(self.data), 32, 8, 1337, 50, 'random')).all():
        tokens[2, 3] = 60_000
    return tokens
readers.Windows.read = planted
"""
SLOW_DATA = """
import time
from kit.base import devices
send = devices.send
devices.send = lambda array, device: (
    time.sleep(0.015 if array is not None and len(array) == 8 else 0), send(array, device))[1]  # x, then y
"""

SICKNESSES = {  # name: (what is planted, settings, what is found, the command that is advised)
    'a rate 100 times too large': ('', ['--learning_rate=0.3'], 'rate too large', '--learning_rate=0.03'),
    'a rate 100 times too small': ('', ['--learning_rate=3e-5', '--min_lr=3e-6', '--optimizer=adamw'],
                                   'rate too small', '--learning_rate=0.0003'),
    "Muon's rate 100 times too large": ('', ['--optimizer=muon:1.5'], 'rate too large', '--optimizer=muon:0.15'),
    'all rates 100 times too small': ('', ['--learning_rate=3e-5', '--min_lr=3e-6', '--optimizer=muon:1.5e-4'],
                                      'rate too small', '--learning_rate=0.0003 --optimizer=muon:0.0015'),
    'dropout off, a tiny text': ('', ['--dataset=short', '--batch_size=16'], 'overfitting', '--dropout=0.2'),
    'frozen layers': (IN_INIT.format('[p.requires_grad_(False) for p in self.transformer.h.parameters()]'), [],
                      'layers without gradient', 'h.0, h.1'),
    'an exploding initialisation': (IN_INIT.format('[p.data.mul_(30) for p in self.parameters() if p.dim() > 1]'),
                                    ['--architecture=gpt2'], 'first loss', 'model.py'),
    'shuffled targets': (IN_FORWARD.format(SHUFFLE), [], 'no use of the context', '--dry_run'),
    'constant data': ('', ['--dataset=constant'], 'nothing to learn', '--dry_run'),
    'clipped always': ('', ['--grad_clip=0.01'], 'clipped always', '--grad_clip=2.'),
    'an id beyond the vocabulary': (ID_IN_DATA, ['--debug_nan', '--sampling=random'], 'debug_nan: step 50',
                                    'the data: x[2, 3] is the id 60000'),
    'NaN in the forward pass': ('import math\n' + IN_INIT.format(NAN_IN_FORWARD), ['--debug_nan'], 'debug_nan: step 50',
                                'the forward pass: what mul in transformer.h.1.mlp gave'),
    'NaN in the loss': ('import math' + NAN_IN_LOSS, ['--debug_nan'], 'debug_nan: step 50',
                        'the forward pass: what planted (the loss) gave'),
    'NaN in the backward pass': ('import math\n' + IN_INIT.format(NAN_IN_BACKWARD), ['--debug_nan'],
                                 'debug_nan: step 50', 'the gradient of parameter transformer.h.0.mlp.c_fc.weight'),
    'NaN, not hunted': ('import math\n' + IN_INIT.format(NAN_IN_BACKWARD), [], 'numbers not finite', '--debug_nan'),
    'a disk that is slow': (SLOW_DATA, ['--max_iters=60'], 'data stall', 'local disk'),
    'an initialisation that drowns a layer': (
        IN_INIT.format('self.transformer.h[1].attn.c_proj.weight.data.zero_(); '
                       'self.transformer.h[1].mlp.c_proj.weight.requires_grad_(False).zero_(); '
                       'self.transformer.h[1].attn.c_proj.weight.requires_grad_(False)'), ['--architecture=gpt2'],
        'layers without gradient', 'h.1'),
    'a model too small': ('', [*GPT2, '--n_layer=1', '--n_head=1', '--n_embd=4', '--max_iters=2000', '--decay_lr=False',
                               '--learning_rate=0.01', '--eval_interval=400', '--log_interval=25'], 'plateau',
                          '--n_embd=8'),
}
HEALTHY = {
    'as it is': [], 'another seed': ['--seed=2'], 'a third': ['--seed=3'], 'smaller': ['--n_embd=32'],
    'larger': ['--n_embd=96', '--n_layer=3', '--max_iters=250', '--learning_rate=2e-3'],
    'longer rows': ['--block_size=64', '--batch_size=4'], 'dropout': ['--dropout=0.1'],
    'GPT-2, AdamW': GPT2, 'GPT-2, Muon': ['--architecture=gpt2'], 'modern, AdamW': ['--optimizer=adamw'],
    "Muon's default rate": ['--optimizer=muon'], 'a constant rate': ['--decay_lr=False', '--learning_rate=1e-3'],
    'accumulated': ['--batch_size=4', '--gradient_accumulation_steps=2'], 'random rows': ['--sampling=random'],
    'biases, and longer': ['--bias=True', '--max_iters=600'], 'other text': ['--dataset=other'],
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('watched')


@pytest.fixture
def watched(run, folder):
    """watched('code', '--max_iters=3') -> Result: train.py with BASE in a folder that has four small datasets."""
    texts = {'words': some_text(200_000), 'other': some_text(200_000, seed=1), 'short': some_text(1500),
             'constant': 'ab' + 'a' * 20_000}
    for name, text in texts.items():
        if not (folder / 'data' / name).exists():
            (folder / 'data').mkdir(exist_ok=True)
            (folder / f'{name}.txt').write_text(text)
            assert run('prepare.py', f'--input={name}.txt', f'--dataset={name}', cwd=folder).status == 0

    def launch(code, *args):
        return run(hooked_script(folder, code), '--dataset=words', *BASE, *args, cwd=folder)
    return launch


@pytest.mark.parametrize('sickness', SICKNESSES)
def test_a_sickness_is_named(watched, sickness):
    code, args, found, advice = SICKNESSES[sickness]
    result = watched(code, *args)
    assert result.err == ''
    begin = found if 'debug_nan' in found else f'WARNING: {found} at step '
    lines = [line for line in result.out.splitlines() if line.startswith(begin)]
    assert lines and advice in lines[0], result.out[-3000:]


@pytest.mark.parametrize('health', HEALTHY)
def test_a_healthy_run_is_left_in_peace(watched, health):
    result = watched('', *HEALTHY[health])
    assert result.status == 0, result.err
    assert 'WARNING' not in result.out, result.out
    assert 'nothing to complain about' in result.out


def test_a_finding_is_said_once(watched, folder):
    """When it starts, and when it is over; the log that is read back says the same."""
    result = watched('', '--grad_clip=0.01', '--out_dir=clipped')
    assert result.out.count('WARNING: clipped always at step ') == 1 and 'over at' not in result.out
    verdict = diagnosis.verdict(runlogs.read(folder / 'clipped'))
    assert sum(line.startswith('clipped always, from step ') and ' to the end: ' in line for line in verdict) == 1
    resumed = watched('', '--init_from=resume', '--out_dir=clipped', '--max_iters=450', '--grad_clip=0.01')
    assert 'WARNING: clipped always' not in resumed.out and 'clipped always, from step' in resumed.out


# ---------------------------------------------------------------------------------------------------------------------
# made-up histories, for what a small run cannot show


def history(n=400, every=10, facts=None, **figures):
    """A calm run of n updates; figures: of the step, in place of the calm ones."""
    calm = {'loss': lambda t: 2 + 2 / (1 + t / 50) + 0.05 * math.sin(t), 'lr': lambda t: 1e-3,
            'grad_norm': lambda t: 0.5 + 0.1 * math.sin(2 * t)}
    at_lines = {'tokens_per_second': lambda t: 1000.0, 'time_ms': lambda t: 10.0, 'data_ms': lambda t: 0.1,
                'time': lambda t: 5.0 * t}
    h = History({'warmup_iters': 20, 'grad_clip': 1.0, 'learning_rate': 1e-3} | (facts or {}))
    lines = []
    for t in range(n):
        these = (calm | (at_lines if t % every == 0 else {})) | {
            name: f for name, f in figures.items() if name in calm or t % every == 0}
        h.add(t, {name: f(t) for name, f in these.items()})
        if t % every == 0:
            lines += h.news()
    return h, lines


def test_a_calm_history_has_no_news():
    h, lines = history()
    assert lines == [] and diagnosis.verdict(h)[-1] == 'nothing to complain about'


@pytest.mark.parametrize('name, figures', [
    ('explosion', {'grad_norm': lambda t: 12.0 if 200 < t < 250 else 0.5}),
    ('vanishing', {'grad_norm': lambda t: 0.005 if 100 < t < 260 else 0.5}),
    ('swings', {'grad_norm': lambda t: (0.05 if t % 2 else 5.0) if 100 < t < 200 else 0.5}),
    ('rate too large', {'loss': lambda t: 3.5 if 200 < t < 240 else 2.5}),
    ('throughput collapse', {'tokens_per_second': lambda t: 300.0 if 250 < t < 340 else 1000.0}),
    ('data stall', {'data_ms': lambda t: 7.0 if 100 < t < 200 else 0.1}),
    ('overfitting', {'val/loss': lambda t: 3.0 if 100 < t < 200 else 2.5, 'train/loss': lambda t: 2.5 - t / 4000}),
])
def test_it_begins_and_it_ends(name, figures):
    h, lines = history(n=600, **figures)
    begun = [line for line in lines if line.startswith(f'WARNING: {name} at step ')]
    over = [line for line in lines if line.endswith(f': {name}') and line.startswith('over at step ')]
    assert len(begun) == len(over) == 1, lines
    assert any(line.startswith(f'{name}, from step ') for line in diagnosis.verdict(h))


@pytest.mark.parametrize('name, figures', [
    ('throughput collapse', {'tokens_per_second': lambda t: 300.0 if 250 < t < 270 else 1000.0}),  # a moment
    ('rate too large', {'loss': lambda t: 3.5 if t == 200 else 2.5}),  # a spike is another finding
    ('explosion', {'grad_norm': lambda t: 12.0 if t < 20 else 0.5}),  # in the warmup
    ('clipped always', {'grad_norm': lambda t: 2.0}),  # AdamW does not mind
    ('overfitting', {'val/loss': lambda t: 2.5 + 0.02 * math.sin(t), 'train/loss': lambda t: 2.5 - t / 4000}),  # noise
])
def test_what_is_no_finding(name, figures):
    assert not [line for line in history(**figures)[1] if name in line]


def test_a_gap_is_overfitting_too():
    """Val that brings nothing better while train falls away from it; but not where train falls with it."""
    _, lines = history(n=600, every=20, **{'val/loss': lambda t: 2.0, 'train/loss': lambda t: 2 - t / 1000})
    assert len(lines) == 1 and 'overfitting' in lines[0]
    _, lines = history(n=600, every=20, **{'val/loss': lambda t: 2 - t / 2000, 'train/loss': lambda t: 2 - t / 1000})
    assert lines == []


def test_spikes():
    spikes = lambda f: [line for line in history(loss=f)[1] if 'loss spike' in line]
    assert len(spikes(lambda t: 3.5 if t == 207 else 2 + 0.05 * math.sin(t))) == 1
    line, = spikes(lambda t: 3.5 if t == 207 else 2 + 0.05 * math.sin(t))
    assert 'the loss of step 207 is 3.5000' in line and '--inspect_step=207' in line
    assert len(spikes(lambda t: 3.5 if t in (207, 333) else 2 + 0.05 * math.sin(t))) == 2
    assert not spikes(lambda t: 2.1 if t == 207 else 2 + 0.05 * math.sin(t))
    assert not spikes(lambda t: 10 / (t + 1))
    assert not spikes(lambda t: 1.0 if t == 207 else 2 + 0.05 * math.sin(t))
    assert not spikes(lambda t: 99.0 if t == 9 else 2.0)  # too few before it to tell


def test_every_spike_of_a_long_log_is_found():
    """Also where a look takes in thousands of updates; the highest is named, the others are counted."""
    rng = np.random.default_rng(0)
    h = History()
    for step, noise in enumerate(rng.normal(0, 0.05, 30_000)):
        h.add(step, {'loss': 2 + noise + (3 if step in (7_777, 20_020, 20_030) else 0)})
    lines = [line for line in diagnosis.verdict(h) if 'loss spike' in line]
    assert len(lines) == 2 and 'the loss of step 7777 is ' in lines[0] and '(the highest of 2)' in lines[1]
    h.findings, h.looked = [], -1
    h.news()
    assert '(the highest of 3)' in h.findings[0][-1]


def test_bad_numbers_of_a_plain_log():
    """nanoGPT tells a NaN in its loss alone."""
    h, lines = history(loss=lambda t: math.nan if t > 200 else 2.0)
    assert len(lines) == 1 and 'numbers not finite' in lines[0] and 'float16' not in lines[0]
    only_nan = History()
    for step in range(30):
        only_nan.add(step, {'loss': math.nan})
    assert any('nan at the end' in line for line in diagnosis.verdict(only_nan))


def test_a_noisy_run_is_no_plateau():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.3, 700)
    assert history(n=700, loss=lambda t: 2.5 + noise[t] - t / 70_000)[1] == []


def test_layers_are_named():
    _, lines = history(**{'grad_norm/h.0': lambda t: 0.5, 'grad_norm/h.1': lambda t: 0.4,
                          'grad_norm/h.2': lambda t: 1e-5 if t > 200 else 0.3, 'grad_norm/wte': lambda t: 1.0})
    line, = lines
    assert 'layers without gradient' in line and ' h.2: ' in line and 'h.1' not in line
    _, lines = history(grad_norm=lambda t: 20.0 if t > 200 else 0.5,
                       **{'grad_norm/h.0': lambda t: 0.5, 'grad_norm/h.1': lambda t: 20.0 if t > 200 else 0.5})
    assert any('explosion' in line and 'most of it in h.1' in line for line in lines)


def test_blocks_are_layers_that_end_in_a_number():
    """Whatever they are called; and a model without any is no worse off."""
    ratio = lambda t: 0.05 if t > 200 else 0.005
    known = {'unigram_entropy': 3.0, 'vocab_size': 50}
    for name in 'h.0', 'blocks.11', 'encoder.layers.3', '0':
        _, lines = history(facts=known, **{f'update_ratio/{name}': ratio, 'update_ratio/head': lambda t: 0.1})
        assert len(lines) == 1 and 'rate too large' in lines[0] and 'moves the blocks by 5.0%' in lines[0], name
        assert 'norm layer' not in lines[0]
    for name in 'ln_f', 'norm', 'final_LayerNorm', 'model.norm_f':
        _, lines = history(facts=known, **{f'update_ratio/{name}': ratio, 'update_ratio/embedding': ratio})
        assert len(lines) == 1 and 'the gains of the last LayerNorm by 5.0%' in lines[0], name
        assert 'blocks' not in lines[0]
    _, lines = history(facts=known, loss=lambda t: 3.0, **{
        'update_ratio/embedding': lambda t: 1e-6, 'update_ratio/mlnet': ratio, 'grad_norm/head': lambda t: 1.0})
    assert len(lines) == 1 and 'no use of the context' in lines[0], 'the rate of blocks is not known to be too small'
    assert history(facts=known, loss=lambda t: 3.0, **{'update_ratio/layers.0': lambda t: 1e-6})[1][0].startswith(
        'WARNING: rate too small')


def test_convergence_and_underfitting():
    flat = {'loss': lambda t: 2.5 + 0.05 * math.sin(t), 'train/loss': lambda t: 2.5}
    _, lines = history(n=700, **flat, **{'val/loss': lambda t: 2.51})
    assert len(lines) == 1 and 'the model underfits' in lines[0]
    _, lines = history(n=700, **flat, **{'val/loss': lambda t: 2.7})
    assert len(lines) == 1 and 'It has converged' in lines[0]
    _, lines = history(n=700, lr=lambda t: 1e-3 * (1 - t / 700)**2, **flat, **{'val/loss': lambda t: 2.51})
    assert lines == []  # the rate goes down: it is meant to end


def test_histories_against_a_plain_list():
    """Steps that come again take the place of all from there on; what is beyond `until` is not seen."""
    rng = np.random.default_rng(0)
    h, plain, step = History(), [], 0
    for _ in range(500):
        step = max(0, step + int(rng.integers(-3, 6)))
        value = float(rng.random())
        h.add(step, {'loss': value})
        plain = [(s, v) for s, v in plain if s < step] + [(step, value)]
    assert list(zip(*h.get('loss'))) == plain and h.step() == plain[-1][0]
    middle = plain[len(plain) // 2][0]
    assert h.at('loss', middle) == dict(plain)[middle] and h.at('loss', -1, None) is None
    h.until = middle
    assert list(zip(*h.get('loss', 5))) == [(s, v) for s, v in plain if s <= middle][-5:]
    h.until = math.inf
    h.cut(middle)
    assert list(zip(*h.get('loss'))) == [(s, v) for s, v in plain if s <= middle]


# ---------------------------------------------------------------------------------------------------------------------
# runs that diverge, however short


@pytest.mark.parametrize('losses, vals, is_diverged', [
    ([4.2] + [math.nan] * 9, [4.2, math.nan], True), ([math.nan] * 10, [math.nan, math.nan], True),
    ([4.2, 1e30, 1e30], [4.2, 1e30], True), ([4.2] + [1e308] * 6, [4.2], True), ([4.2] + [math.nan] * 6, [4.2], True),
    ([4.2] + [60.0] * 9, [4.2, 55.0], True), ([9.0, 8.0, 7.0], [9.0, 6.9], False),  # it began high, and comes down
    ([4.2, 4.3, 4.4], [4.2, 4.3], False), ([4.2, math.nan, math.nan, 4.0], [4.2, 3.9], False), ([4.2], [4.2], False),
    ([4.2] + [math.nan] * 3, [4.2], False)])  # too few to tell
def test_a_run_has_diverged(losses, vals, is_diverged):
    h = History({'vocab_size': 65, 'learning_rate': 1e6, 'warmup_iters': 0, 'grad_clip': 1.0})
    for step, loss in enumerate(losses):
        h.add(step, {'loss': loss, 'grad_norm': 1.0, 'lr': 1e6})
    for step, loss in zip([0, len(losses)], vals):
        h.add(step, {'val/loss': loss, 'train/loss': loss})
    words = [line for line in diagnosis.verdict(h) if line.startswith('diverged: ')]
    assert len(words) == is_diverged
    for line in words:
        assert 'a fair guess among 65 ids has 4.1744' in line and '--learning_rate=0.03' in line and '--find_lr' in line


@pytest.mark.parametrize('args', [['--learning_rate=1e6', *GPT2],
                                  ['--learning_rate=1e30', '--optimizer=muon:1e30', '--save_interval=1'],
                                  [*GPT2, '--learning_rate=1e6', '--grad_clip=0', '--eval_interval=0',
                                   '--max_iters=3']])
def test_a_short_run_that_diverges_ends_with_its_verdict(train, run, trained, args):
    """Shorter than max_bad_steps; and no command is offered that has nothing to work with."""
    result = train(*args, '--warmup_iters=0', '--out_dir=short')
    assert result.status == 0 and result.err == '', result.err
    assert '\ndiverged: the val loss is ' in result.out and '--learning_rate=0.03' in result.out
    assert 'no sample: ' in result.out and 'plot_loss.py short' in result.out
    offered = result.out.partition('\nnext:')[2]
    assert not any(name in offered for name in ('sample.py', '--test', 'checkpoint_averaging')), offered
    drawn = run('plot_loss.py', 'short')
    assert drawn.status == 0 and drawn.err == '' and 'diverged: the val loss is ' in drawn.out


def test_whatever_sampling_does_the_verdict_comes(hooked):
    result = hooked('from kit.watch import samples\ndef broken(*args):\n    raise RuntimeError("no words")\n'
                    'samples.show = broken')
    assert result.status == 0 and result.err == '', result.err
    assert '\nno sample: RuntimeError: no words\nbest val loss ' in result.out
    assert 'sample.py' in result.out and '--test' in result.out


@pytest.mark.parametrize('interval, is_offered', [(1, True), (5, False)])
def test_averaging_is_offered_where_it_has_enough(train, run, interval, is_offered):
    result = train(f'--save_interval={interval}')
    assert ('checkpoint_averaging.py' in result.out.partition('\nnext:')[2]) == is_offered
    assert (run('checkpoint_averaging.py', '--evaluate=False').status == 0) == is_offered


def test_the_same_event_is_told_in_full_a_few_times():
    h, _ = history(loss=lambda t: 9.0 if t % 40 == 39 else 2 + 0.05 * math.sin(t))
    lines = [line for line in diagnosis.verdict(h) if line.startswith('loss spike')]
    assert len(lines) == diagnosis.MOST_OFTEN + 1 and lines[-1] == 'loss spike: 7 more times'


def test_a_replay_of_damaged_records(train, trained):
    metrics, config = trained / 'metrics.jsonl', trained / 'config.json'
    with open(metrics, 'a') as file:
        file.write('{"step": 9, "loss": 1e400, "lr": NaN, "rewinds": 1e300}\n{"step": 9, "rewinds": NaN}\n')
    result = train('--inspect_step=9')
    assert result.status == 0 and 'step 9, replayed:' in result.out, result.err
    result = train('--inspect_step=1000000000000000000')
    assert result.status == 2 and result.err.count('\n') == 1 and 'has made the steps 0 to 9' in result.err
    for path in trained.glob('*.pt'):
        path.unlink()
    for text in '[]', '{"settings": 5}', '{"settings": {"init_from": 5}}', '{"settings": {"weights": [1]}}', '{':
        config.write_text(text)
        result = train('--inspect_step=3')
        assert result.status == 2 and result.err.count('\n') == 1 and 'checkpoints' in result.err, result.err
