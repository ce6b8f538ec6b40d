"""--find_lr: what is made of curves whose answer is known, and the whole launch, which leaves everything as it was."""

import csv
import json
import math

import numpy as np
import pytest
from conftest import copy_folder, hooked_script, losses, records

from kit.run import rate_finder
from kit.run.rate_finder import RangeTest, smoothed, suggestion
from kit.watch import pictures


def ranged(loss_at, start=1e-5, end=1.0):
    """A finished test whose step i at a rate had the loss loss_at(i, rate)."""
    test = RangeTest(start, end)
    while not test.take(loss_at(len(test.losses), test.rate())):
        pass
    return test


def valley(rate, best, depth=1.5, floor=2.6):
    """Like a transformer's: it falls over two decades and a half, then rises."""
    x = math.log10(rate / best)
    return floor + depth * (min(1, -x / 2.5) ** 2 if x < 0 else (x / 1.5) ** 2)


def noisy(seed, size, loss_at):
    noise = np.random.default_rng(seed).normal(0, size, 1000)
    return lambda i, rate: loss_at(rate) + noise[i]


# ---------------------------------------------------------------------------------------------------------------------
# curves whose answer is known


@pytest.mark.parametrize('best', [1e-3, 4e-3, 3e-2])
@pytest.mark.parametrize('seed', range(5))
def test_the_lowest_point_is_found_in_noise(best, seed):
    rate, words = suggestion(ranged(noisy(seed, 0.05, lambda rate: valley(rate, best))))
    assert best / 1.6 < rate < best * 1.6 and 'diverges at' in words


@pytest.mark.parametrize('beyond', [
    lambda rate: 2.6,  # no dip at all, flat over two decades
    lambda rate: 2.6 - 0.04 * math.log10(rate / 4e-3),  # the lowest point lies at its far end
    lambda rate: 2.6 + min(0.3 * math.log10(rate / 4e-3), 1.0 * abs(math.log10(rate / 0.15)))])  # a second dip
def test_where_the_loss_stays_flat_its_beginning_counts(beyond):
    """As that of small models does up to rates that leave them little more than the frequencies of the tokens."""
    curve = lambda rate: 4.1 if rate > 0.3 else beyond(rate) if rate > 4e-3 else valley(rate, 4e-3)
    test = ranged(noisy(1, 0.03, curve))
    rate, words = suggestion(test)
    assert 2e-3 < rate < 1.2e-2, (rate, words)


def test_a_single_lucky_step_is_no_minimum():
    rate, _ = suggestion(ranged(lambda i, rate: valley(rate, 4e-3) - (2.5 if i == 40 else 0)))
    assert 3e-3 < rate < 5e-3


def test_the_test_ends_where_the_loss_diverges():
    test = ranged(lambda i, rate: 3.0 if rate < 1e-2 else 30.0)
    assert len(test.losses) < test.steps and 1e-2 < test.rates[-1] < 1.1e-2


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_bad_number_ends_it_and_is_no_part_of_the_curve(bad):
    test = ranged(lambda i, rate: valley(rate, 1e-3) if rate < 1e-2 else bad)
    rate, words = suggestion(test)
    assert not math.isfinite(test.losses[-1]) and math.isfinite(test.losses[-2])
    assert 0.8e-3 < rate < 1.2e-3 and f'diverges at {test.rates[-1]:.1e}' in words


def test_a_test_that_ends_at_once():
    rate, words = suggestion(ranged(lambda i, rate: math.nan))
    assert rate is None and 'after 1 steps' in words and '--find_lr_start' in words


def test_a_loss_that_falls_to_the_end():
    test = ranged(lambda i, rate: 4 - 0.3 * math.log10(rate / 1e-5))
    rate, words = suggestion(test)
    assert len(test.losses) == test.steps and rate is None and '--find_lr_end' in words


@pytest.mark.parametrize('seed', range(10))
def test_noise_alone_suggests_nothing(seed):
    rate, words = suggestion(ranged(noisy(seed, 0.1, lambda rate: 2.5)))
    assert rate is None and ('no more than noise' in words or 'does not rise' in words)


def test_a_loss_that_only_rises_says_from_where():
    """As when a trained model goes on with its own text."""
    rate, words = suggestion(ranged(noisy(0, 0.05, lambda rate: 1.5 + max(0, math.log10(rate / 1e-3)) ** 2)))
    assert rate is None and 'had risen by ' in words
    assert 5e-4 < float(words.split('had risen by ')[1].split(';')[0]) < 5e-3


def test_the_rates_climb_by_the_same_factor():
    test = ranged(lambda i, rate: 2.0, 3e-5, 0.2)
    assert test.rates[0] == 3e-5 and test.rates[-1] == pytest.approx(0.2) and len(test.rates) == rate_finder.STEPS
    assert np.ptp(np.diff(np.log(test.rates))) < 1e-9


def test_smoothing():
    flat = smoothed([2.0] * 50 + [math.nan], 5)
    assert flat == pytest.approx([2.0] * 51)
    peak = smoothed([0.0] * 50 + [1.0] + [0.0] * 50, 5)
    assert peak.argmax() == 50 and peak[45] / peak[50] == pytest.approx(math.exp(-0.5), rel=1e-6)


@pytest.mark.parametrize('loss_at, suggested', [
    (lambda i, rate: valley(rate, 4e-3) if rate < 0.1 else math.nan, 4e-3), (lambda i, rate: 2.5, None)])
def test_the_picture(loss_at, suggested):
    test = ranged(loss_at)
    curve = smoothed(test.losses, 10)
    with_it = pictures.lr_finder(test.rates, test.losses, curve, suggested)
    without = pictures.lr_finder(test.rates, test.losses, curve, None)
    assert with_it.shape[2] == 3 and with_it.std() > 5 and (with_it != without).any() == bool(suggested)


# ---------------------------------------------------------------------------------------------------------------------
# the launch


SHORT = 'from kit.run import rate_finder; rate_finder.STEPS = 60'  # of 200, which take a second


@pytest.fixture
def find(hooked):
    """find('--out_dir=a') -> Result: train with --find_lr, in a few steps."""
    return lambda *args: hooked(SHORT, '--find_lr', *args)


def table(folder):
    with open(folder / 'lr_finder.csv', newline='') as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('muon', [0.015, 2e-3, 1e-3])
def test_the_files_and_the_words(train, tiny, muon):
    result = train('--find_lr', '--out_dir=new/lr', '--learning_rate=2e-3', f'--optimizer=muon:{muon}')
    assert result.status == 0 and result.err == ''
    rows = table(tiny / 'new/lr')
    rates = [row['learning_rate'] for row in rows]
    assert [row['step'] for row in rows] == list(range(len(rows))) and 50 < len(rows) <= rate_finder.STEPS
    assert rates[0] == 1e-5 and np.ptp(np.diff(np.log(rates))) < 1e-9
    assert rates[-1] <= 1.0000001 and rates[1] / rates[0] == pytest.approx(1e5 ** (1 / (rate_finder.STEPS - 1)))
    assert (tiny / 'new/lr/lr_finder.png').read_bytes()[:4] == b'\x89PNG'
    first, lowest = rows[0]['smoothed_loss'], min(rows, key=lambda row: row['smoothed_loss'])
    flat = next(row for row in rows if first - row['smoothed_loss'] >= 0.95 * (first - lowest['smoothed_loss']))
    best = min(lowest['learning_rate'], 3 * flat['learning_rate'])
    words = f'--learning_rate={best:.1e} --min_lr={best / 10:.1e} --optimizer=muon:{muon / 2e-3 * best:.1e}'
    assert f'\nsuggested: {best:.1e} ({words})\n' in result.out, result.out
    assert {path.name for path in (tiny / 'new/lr').iterdir()} == {'lr_finder.csv', 'lr_finder.png'}
    assert 'iter 0' not in result.out and 'saving' not in result.out


def test_the_rates_reach_the_optimizer_and_the_first_loss_is_that_of_a_run(hooked, train, tiny):
    spy = ('import json\nfrom kit.learn import optimizers\nold = optimizers.step\n'
           'def step(optimizer, is_good):\n'
           '    print(json.dumps([g["lr"] for g in optimizer.param_groups]), file=open("rates", "a"))\n'
           '    old(optimizer, is_good)\n'
           'optimizers.step = step')
    hooked(f'{SHORT}\n{spy}', '--find_lr', '--find_lr_end=1e-2', '--learning_rate=1e-3', '--optimizer=muon:5e-3')
    rows = table(tiny / 'checkpoints')
    rates = [row['learning_rate'] for row in rows]
    assert [json.loads(line) for line in open(tiny / 'rates')] == [[5 * rate, rate, rate] for rate in rates]
    train('--out_dir=a')
    assert rows[0]['loss'] == records(tiny / 'a')[1]['loss']


def test_a_run_in_the_folder_stays_and_goes_on_as_if_nothing_had_been(find, train, trained, tiny):
    before = everything(tiny)
    result = find('--dropout=0.2')
    assert result.status == 0, result.err
    (tiny / 'hooked.py').unlink()
    after = everything(tiny)
    assert {path.name for path in after.keys() - before.keys()} == {'lr_finder.csv', 'lr_finder.png'}
    assert all(after[path] == content for path, content in before.items())
    assert not (tiny / 'checkpoints.1').exists()
    copy_folder(trained, tiny / 'other')
    on = train('--init_from=resume', '--max_iters=15')
    other = train('--init_from=resume', '--max_iters=15', '--out_dir=other')
    assert on.status == 0 and list(losses(on)) == [10, 11, 12, 13, 14] and losses(on) == losses(other)
    assert 'From the checkpoint: find_lr' not in on.out


def test_a_training_after_it_is_the_training_without_it(find, train, tiny):
    """The same losses bit for bit, and the folder with the curve is not taken for a run."""
    find('--out_dir=a')
    result = train('--out_dir=a', '--dropout=0.2')
    train('--out_dir=b', '--dropout=0.2')
    assert 'moved to' not in result.out and (tiny / 'a/lr_finder.csv').exists()
    assert [(r['step'], r.get('loss'), r.get('val/loss')) for r in records(tiny / 'a')] == [
        (r['step'], r.get('loss'), r.get('val/loss')) for r in records(tiny / 'b')]


@pytest.mark.parametrize('begin', ['resume', 'checkpoints/best.pt'])
def test_rates_for_weights_that_are_trained(find, trained, begin):
    """A run that is at its end has steps enough for it; an average does not stand in its way."""
    before = everything(trained)
    result = find(f'--init_from={begin}', '--ema_decay=0.9')
    assert result.status == 0, result.err
    rows = table(trained)
    last = next(r['loss'] for r in reversed(records(trained)) if 'loss' in r)
    assert len(rows) > 30 and rows[0]['loss'] == pytest.approx(last, abs=0.3)
    after = everything(trained)
    assert all(after[path] == content for path, content in before.items()) and len(after) == len(before) + 2


def test_told_to_stop_it_saves_nothing(hooked, tiny):
    stop = ('import os, signal\nfrom kit.learn import optimizers\nold, n = optimizers.step, [0]\n'
            'def step(*args):\n'
            '    old(*args); n[0] += 1\n'
            '    if n[0] == 5: os.kill(os.getpid(), signal.SIGTERM)\n'
            'optimizers.step = step')
    assert hooked(stop, '--find_lr').status != 0 and not (tiny / 'checkpoints').exists()


@pytest.mark.parametrize('step', [0, 30])
@pytest.mark.parametrize('spoilt', ['loss * float("nan")', 'loss.register_hook(lambda g: g * float("nan")) and loss'])
def test_bad_numbers_end_it(hooked, tiny, spoilt, step):
    """In the loss, or in the gradient alone."""
    spoil = (f'{SHORT}\nimport model, torch\nfrom kit.data import batches\nold = model.GPT.forward\n'
             'def forward(self, *args, **kwargs):\n'
             '    logits, loss = old(self, *args, **kwargs)\n'
             f'    is_bad = torch.initial_seed() == batches.torch_seed(1337, {step}, 0)\n'
             f'    return logits, {spoilt} if is_bad else loss\n'
             'model.GPT.forward = forward')
    result = hooked(spoil, '--find_lr')
    rows = table(tiny / 'checkpoints')
    assert result.status == 0 and result.err == '' and len(rows) == step + 1 and math.isnan(rows[-1]['loss'])
    assert all(math.isfinite(row['smoothed_loss']) for row in rows) == (step > 0)
    assert f'after {step + 1} steps' in result.out or step


def test_two_processes_find_what_one_finds(find, pair, tiny):
    find('--gradient_accumulation_steps=2', '--out_dir=one')
    two = pair('--find_lr', '--gradient_accumulation_steps=2', '--out_dir=two', script=hooked_script(tiny, SHORT))
    assert two.status == 0, two.err
    assert two.out.count('the curve: two/lr_finder.csv') == 1
    one, two = table(tiny / 'one'), table(tiny / 'two')
    assert [row['loss'] for row in one[:30]] == pytest.approx([row['loss'] for row in two[:30]], abs=1e-3)


@pytest.mark.parametrize('args, named', [
    (['--find_lr_start=1', '--find_lr_end=1e-3'], ['find_lr_start = 1.0', 'find_lr_end = 0.001', 'climb']),
    (['--find_lr_start=0'], ['find_lr_start = 0.0']),
    (['--find_lr_start=1e-300', '--find_lr_end=1e300'], ['find_lr_start = 1e-300', '1e-20 to 1e+20']),
    (['--test'], ['each replaces the training']),
    (['--inspect_step=3'], ['each replaces the training']),
    (['--out_dir=text.txt/x'], ['text.txt/x', 'cannot be written']),
])
def test_what_cannot_be_tested(train, tiny, args, named):
    before = everything(tiny)
    result = train('--find_lr', *args)
    assert result.status == 2 and result.err.count('\n') == 1 and all(word in result.err for word in named), result.err
    assert everything(tiny) == before


def test_its_files_are_not_written_through_links(find, tiny):
    (tiny / 'mine').write_text('precious')
    (tiny / 'a').mkdir()
    for name in 'lr_finder.csv', 'lr_finder.png':
        (tiny / 'a' / name).symlink_to('../mine')
    result = find('--out_dir=a')
    assert result.status == 0 and (tiny / 'mine').read_text() == 'precious', result.err
    assert {path.name for path in (tiny / 'a').iterdir()} == {'lr_finder.csv', 'lr_finder.png'}
    assert len(table(tiny / 'a')) > 20


def test_where_its_files_cannot_be_written_it_still_says_what_it_found(find, tiny):
    (tiny / 'a/lr_finder.png').mkdir(parents=True)
    result = find('--out_dir=a')
    assert result.status == 2 and result.err.count('\n') == 1
    assert 'lr_finder.png: the curve cannot be written' in result.err
    assert ' steps, rates from 1.0e-05 to ' in result.out
