"""checkpoint_averaging.py, --test with several checkpoints, and their ensembles, against plain arithmetic."""

import math
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import GPT2, ROOT, TINY, copy_folder
from conftest import run as run_of_conftest
from no_wait import NoWait
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn

from kit.data import readers, tokens
from kit.learn import averages
from kit.state import averaging, checkpoints
from kit.watch import evaluation
from model import GPT, GPTConfig


@pytest.fixture(scope='module')
def ten(zygote, templates, tmp_path_factory):
    """Made once, for folder to copy."""
    made = tmp_path_factory.mktemp('ten')
    copy_folder(templates['tiny'], made)
    args = [*TINY, *GPT2, '--max_iters=20', '--save_interval=2', '--decay_lr=False']
    assert run_of_conftest.__wrapped__(zygote, made)('train.py', '--dataset=tiny', *args).status == 0
    return made / 'checkpoints'


@pytest.fixture
def folder(ten, tiny):
    """Ten checkpoints, as plain train.py leaves them: step_0000002.pt ... step_0000020.pt, best.pt, ckpt.pt."""
    copy_folder(ten, tiny / 'checkpoints')
    return tiny / 'checkpoints'


@pytest.fixture
def average(run, folder):
    return lambda *args: run('checkpoint_averaging.py', *args)


def state(path):
    return torch.load(path, weights_only=True)['model']


def val_of(folder):
    return readers.Rows(['tiny'], [readers.Windows(tokens.read_dataset(folder / 'data/tiny')[0]['val'], 16)], [1.0])


def plain_mean(folder, steps, shares=None):
    """In float64, all at once."""
    shares = shares or [1 / len(steps)] * len(steps)
    states = [state(folder / f'step_{step:07d}.pt') for step in steps]
    return {name: sum(share * s[name].double() for share, s in zip(shares, states)).float() for name in states[0]}


def equal(a, b, atol=1e-7):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)
    return True


def test_the_sequence_of_the_guide(run, folder):
    """After python train.py, word by word."""
    result = run('checkpoint_averaging.py', '--num_checkpoints', '8')
    assert result.status == 0, result.err
    assert equal(state(folder / 'averaged_model.pt'), plain_mean(folder, range(20, 4, -2)))
    for said in ('left out: ckpt.pt is step 20 again, as step_0000020.pt', 'left out: best.pt is step',
                 'the uniform average of 8 checkpoints, steps 20, 18, 16, 14, 12, 10, 8, 6'):
        assert said in result.out, said
    tested = run('train.py', '--test', '--checkpoint', './checkpoints/averaged_model.pt', '--device=cpu')
    assert tested.status == 0, tested.err
    loss, = re.findall(r'^test loss ([\d.]+), perplexity', tested.out, re.M)
    assert f'test loss {loss}: averaged_model.pt' in result.out
    again = run('checkpoint_averaging.py')  # an average is not averaged again
    assert again.status == 0 and 'left out: averaged_model.pt is an average' in again.out
    assert equal(state(folder / 'averaged_model.pt'), plain_mean(folder, range(20, 10, -2)))


def test_what_is_written(average, run, train, folder):
    assert average('--num_checkpoints=3', '--output_name=mine.pt').status == 0
    saved = torch.load(folder / 'mine.pt', weights_only=True)
    newest = torch.load(folder / 'ckpt.pt', weights_only=True)
    assert saved['averaged'] == {'steps': [20, 18, 16], 'method': 'uniform'} and 'optimizer' not in saved
    for key in 'model_args', 'iter_num', 'config', 'meta':
        assert saved[key] == newest[key]
    assert saved['model']['lm_head.weight'].data_ptr() == saved['model']['transformer.wte.weight'].data_ptr()
    for result in (run('sample.py', '--checkpoint=checkpoints/mine.pt', '--device=cpu', '--max_new_tokens=9'),
                   train('--test', '--checkpoint=checkpoints/mine.pt'),
                   train('--init_from=checkpoints/mine.pt', '--max_iters=1', '--out_dir=tuned'),
                   train('--init_from=resume', '--max_iters=21')):  # an average in the folder is no hindrance
        assert result.status == 0, result.err


def test_the_table(average, train, folder):
    """val and test of the average, of the newest and of best.pt, as train.py measures them."""
    result = average('--num_checkpoints=4')
    names = {'averaged_model.pt': 'averaged_model.pt', 'step_0000020.pt (the newest)': 'step_0000020.pt',
             f'best.pt (step {torch.load(folder / "best.pt", weights_only=True)["iter_num"]})': 'best.pt'}
    for said, name in names.items():
        val, test = re.search(rf'^val loss (.*), test loss (.*): {re.escape(said)}$', result.out, re.M).groups()
        assert f'test loss {test},' in train('--test', f'--checkpoint=checkpoints/{name}').out
        model = GPT(GPTConfig(**torch.load(folder / name, weights_only=True)['model_args']))
        model.load_state_dict(state(folder / name))
        data = val_of(folder.parent)
        loss, _ = evaluation.measure(model, data, 0, torch.device('cpu'), 'float32')
        assert float(val) == pytest.approx(loss, abs=1e-4)
    quiet = average('--evaluate=False')
    assert quiet.status == 0 and 'loss' not in quiet.out


def test_linear_weights(average, folder):
    assert average('--method=linear', '--num_checkpoints=3', '--evaluate=False').status == 0
    assert equal(state(folder / 'averaged_model.pt'), plain_mean(folder, [20, 18, 16], [3 / 6, 2 / 6, 1 / 6]))


def test_search_keeps_the_best_by_val(average, folder):
    result = average('--search')
    assert result.status == 0, result.err
    losses = {int(n): float(loss) for n, loss in re.findall(r'^ *(\d+) checkpoints: val loss (.*)$', result.out, re.M)}
    assert list(losses) == [1, 2, 3, 4, 5, 6, 8, 10] and 'test loss' not in result.out.split('wrote')[0]
    best = min(losses, key=losses.get)
    assert equal(state(folder / 'averaged_model.pt'), plain_mean(folder, range(20, 20 - 2 * best, -2)))


def test_greedy_soup(average, folder):
    """Against the recipe itself: by val loss, one after the other, kept where the soup gets no worse."""
    result = average('--method=greedy', '--num_checkpoints=6')
    assert result.status == 0, result.err
    data = val_of(folder.parent)
    model = GPT(GPTConfig(**torch.load(folder / 'ckpt.pt', weights_only=True)['model_args']))

    def loss(steps):
        model.load_state_dict(plain_mean(folder, steps))
        return evaluation.measure(model, data, 0, torch.device('cpu'), 'float32')[0]
    first, *others = sorted(range(20, 8, -2), key=lambda step: loss([step]))
    soup = [first]
    for step in others:
        if loss([*soup, step]) <= loss(soup):
            soup.append(step)
    averaged = torch.load(folder / 'averaged_model.pt', weights_only=True)['averaged']
    assert averaged == {'steps': soup, 'method': 'greedy'}


def test_a_best_of_another_step_counts(average, folder):
    """By the step inside, whatever the name; the highest come first."""
    saved = torch.load(folder / 'step_0000020.pt', weights_only=True)
    torch.save(saved | {'iter_num': torch.tensor(19)}, folder / 'copy.pt')
    result = average('--num_checkpoints=2', '--evaluate=False')
    assert 'steps 20, 19' in result.out


def test_what_lies_beyond_the_run_is_left_out(average, folder):
    """A best.pt of a branch that was given up: ckpt.pt stands before it."""
    saved = torch.load(folder / 'step_0000020.pt', weights_only=True)
    torch.save(saved | {'iter_num': 33}, folder / 'copy.pt')
    result = average('--num_checkpoints=2', '--evaluate=False')
    assert 'left out: copy.pt is step 33, beyond ckpt.pt' in result.out and 'steps 20, 18' in result.out


def test_a_best_that_is_missing_or_damaged(average, folder):
    """It is only a row of the table."""
    for spoil, said in ((folder / 'best.pt').unlink, 0), (lambda: (folder / 'best.pt').write_bytes(b'no'), 1):
        spoil()
        result = average('--pattern=step_*.pt')
        assert result.status == 0 and result.out.count('not compared: ') == said, result.err
        assert '(the newest)' in result.out


def averaging_with(folder, code):
    """checkpoint_averaging.py with some code before it, as a script."""
    script = folder.parent / 'hooked.py'
    script.write_text(f'import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}\n'
                      f'__file__ = {str(ROOT / "checkpoint_averaging.py")!r}\nexec(open(__file__).read())\n')
    return script


@pytest.mark.parametrize('name, steps', [
    ('open_lazily', [20, 16, 14]), ('open_unverified', [20, 16, 14]), ('check_tensor', [20, 18, 16])])
def test_what_a_run_deletes_meanwhile(run, folder, name, steps):
    """Before it is opened, or half opened, it is left out; once opened it is whole, whoever deletes it."""
    expected = plain_mean(folder, steps)
    code = (f'import os\nfrom kit.state import checkpoints\nSOUND = checkpoints.{name}\n'
            'def hooked(path, *args, **kwargs):\n'
            '    if str(path).endswith("step_0000018.pt") and os.path.exists(path): os.unlink(path)\n'
            f'    return SOUND(path, *args, **kwargs)\ncheckpoints.{name} = hooked\n')
    result = run(averaging_with(folder, code), '--num_checkpoints=3', '--evaluate=False')
    assert result.status == 0, result.err
    assert ('left out: step_0000018.pt is gone: a run has deleted it' in result.out) == (18 not in steps)
    assert equal(state(folder / 'averaged_model.pt'), expected) and not (folder / 'step_0000018.pt').exists()


def test_beside_a_run_that_prunes(run, tiny):
    """A save and a deletion in every step; whatever there is at that moment is averaged."""
    words = [sys.executable, str(ROOT / 'train.py'), '--dataset=tiny', *TINY, '--max_iters=100000', '--compile=False',
             '--save_interval=1', '--eval_interval=0', '--log_interval=0', '--keep_last=3']
    training = subprocess.Popen(words, cwd=tiny, env=os.environ | {'OMP_NUM_THREADS': '1'}, stdout=subprocess.DEVNULL)
    try:
        while not list((tiny / 'checkpoints').glob('step_*[1-9]?.pt')) and training.poll() is None:
            time.sleep(0.05)
        done = 0
        for _ in range(12):
            result = run('checkpoint_averaging.py', '--num_checkpoints=2', '--evaluate=False')
            assert 'Traceback' not in result.err and 'damaged' not in result.err, result.err
            assert result.status == 0 or 'num_checkpoints = 2: of different steps' in result.err, result.err
            done += result.status == 0
        assert training.poll() is None and done
    finally:
        training.kill()
        training.wait()


@pytest.mark.parametrize('name', ['a,b', 'a=1,b=2'])
def test_commas_in_its_folder(run, folder, name):
    os.rename(folder, folder.parent / name)
    result = run('checkpoint_averaging.py', f'--checkpoint_dir={name}', '--output_name=c,d.pt', '--num_checkpoints=2')
    assert result.status == 0 and f'wrote {name}/c,d.pt' in result.out, result.err


def test_a_link_in_the_place_of_the_average(average, folder):
    """It is replaced, and what it names stays as it is."""
    (folder.parent / 'thesis.txt').write_text('years of work')
    os.symlink(folder.parent / 'thesis.txt', folder / 'mine.pt')
    os.symlink(folder.parent / 'thesis.txt', folder / '.other.pt.part')
    assert average('--output_name=mine.pt', '--evaluate=False', '--pattern=step_*.pt').status == 2
    os.symlink(folder.parent / 'none', folder / 'other.pt')
    assert average('--output_name=other.pt', '--evaluate=False', '--pattern=step_*.pt').status == 0
    assert (folder.parent / 'thesis.txt').read_text() == 'years of work' and not (folder / 'other.pt').is_symlink()
    assert not (folder.parent / 'none').exists()


def test_patterns(average, folder):
    result = average('--pattern', 'step_000001*.pt', '--num_checkpoints', '2', '--evaluate=False')
    assert 'steps 18, 16' in result.out and 'left out' not in result.out
    assert average('--pattern', 'none_*.pt').status == 2


def change(path, **changes):
    saved = torch.load(path, weights_only=True)
    path.unlink()
    torch.save(saved | changes, path)


@pytest.mark.parametrize('args, spoil, named', [
    (['--num_checkpoints=0'], None, ['num_checkpoints = 0']),
    (['--num_checkpoints=11'], None, ['num_checkpoints = 11', 'has 10', 'save_interval', 'keep_last']),
    (['--checkpoint_dir=elsewhere'], None, ['elsewhere', 'no such folder']),
    (['--checkpoint_dir=data'], None, ['data has 0 (none)', 'num_checkpoints']),
    (['--output_name=ckpt.pt'], None, ['output_name', 'ckpt.pt']),
    (['--output_name=step_0000002.pt'], None, ['output_name', 'step_0000002.pt']),
    (['--output_name=step_0000077.pt'], None, ['output_name', 'another name']),
    (['--output_name=best.pt'], None, ['output_name', 'best.pt']),
    (['--output_name=../averaged.pt'], None, ['output_name', 'checkpoint_dir']),
    (['--output_name=averaged'], None, ['output_name', '.pt']),
    (['--method=median'], None, ['method', 'median', 'greedy']),
    (['--method=greedy', '--evaluate=False'], None, ['val loss']),
    (['--search', '--evaluate=False'], None, ['val loss']),
    (['--pattern=/tmp/*.pt'], None, ['pattern', 'checkpoint_dir']),
    (['--num_checkpoint=3'], None, ['num_checkpoint', 'num_checkpoints']),
    (['--pattern=a**b.pt'], None, ['pattern', 'a**b.pt']),
    (['--pattern=.'], None, ['pattern']),
    (['--output_name=.pt'], None, ['output_name']),
    (['--output_name=sub.pt'], lambda f: (f / 'sub.pt').mkdir(), ['output_name', 'sub.pt', 'a folder']),
    ([f'--output_name={"x" * 300}.pt'], None, ['output_name', 'too long']),
    (['--pattern=../*.pt'], None, ['pattern', 'checkpoint_dir']),
    ([f'--pattern={"x" * 5000}'], None, ['pattern']),
    ([f'--checkpoint_dir={"x" * 300}'], None, ['no such folder']),
    (['--checkpoint_dir=text.txt'], None, ['no such folder']),
    ([], lambda f: (f / 'a.pt').write_text('version https://git-lfs.github.com/spec/v1'), ['a.pt', 'git lfs pull']),
    (['--search', '--num_checkpoints=500'], None, ['num_checkpoints = 500']),
    (['--evaluate=False', '--num_checkpoints=10'], lambda f: [
        change(path, model={k: v for k, v in state(path).items() if 'ln_f' not in k}) for path in sorted(f.glob('*.pt'))
    ], ['step_0000020.pt', 'another model', 'transformer.ln_f.weight']),
    ([], lambda f: change(f / 'step_0000018.pt', model_args=checkpoints.peek(f / 'step_0000018.pt')['model_args'] |
                          {'n_head': 4}), ['step_0000018.pt', 'n_head is 4 and 2']),
    ([], lambda f: change(f / 'step_0000018.pt', model=state(f / 'step_0000018.pt') |
                          {'transformer.ln_f.weight': torch.ones(3)}), ['transformer.ln_f.weight is (3,) and (32,)']),
    ([], lambda f: change(f / 'step_0000018.pt', meta={'vocab_size': 27, 'tokenizer':
                                                       {'kind': 'char', 'chars': [chr(97 + i) for i in range(27)]}}),
     ['step_0000018.pt', 'tokenizers differ']),
    ([], lambda f: change(f / 'step_0000018.pt', model=state(f / 'step_0000018.pt') |
                          {'transformer.ln_f.weight': torch.full((32,), math.nan)}),
     ['step_0000018.pt', 'transformer.ln_f.weight', 'not finite']),
    ([], lambda f: change(f / 'step_0000018.pt', model=state(f / 'step_0000018.pt') |
                          {'transformer.ln_f.weight': torch.full((32,), math.inf)}), ['not finite']),
    ([], lambda f: (f / 'step_0000018.pt').write_bytes(b'damaged'), ['step_0000018.pt is damaged', '--pattern']),
    ([], lambda f: flip_a_weight(f / 'step_0000018.pt'), ['step_0000018.pt is damaged', 'leave it out']),
])
def test_refusals(average, folder, args, spoil, named):
    """One line, and nothing is written."""
    if spoil:
        spoil(folder)
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.parent.rglob('*') if path.is_file())
    result = average(*args)
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    assert all(word in result.err for word in named), result.err
    after = sorted((path, path.stat().st_mtime_ns) for path in folder.parent.rglob('*') if path.is_file())
    assert before == after


def flip_a_weight(path):
    """The lowest bit of one weight: torch loads it without a word."""
    weight = state(path)['transformer.h.1.mlp.c_fc.weight'].numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(weight) + 100] ^= 1
    path.unlink()
    path.write_bytes(data)


def test_without_its_dataset(average, run, folder):
    os.rename(folder.parent / 'data', folder.parent / 'gone')
    result = average()
    assert result.status == 2 and result.err.count('\n') == 1 and 'tiny' in result.err
    assert '--evaluate=False' in result.out and average('--evaluate=False').status == 0


def test_a_full_disk(run, folder):
    """The average is refused, not half written."""
    pytest.importorskip('resource')
    script = folder.parent / 'limited.py'
    script.write_text(f'import resource, sys; sys.path.insert(0, {str(ROOT)!r})\n'
                      'resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n'
                      f'__file__ = {str(ROOT / "checkpoint_averaging.py")!r}\nexec(open(__file__).read())\n')
    result = run(script)
    assert result.status == 1 and result.err.count('\n') == 1 and 'no checkpoint was saved' in result.err, result.err
    assert not (folder / 'averaged_model.pt').exists() and not list(folder.glob('.averaged*'))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float64(dtype):
    torch.manual_seed(0)
    tensors = [(torch.randn(700, 500) * 10 ** (i % 3)).to(dtype).t() for i in range(8)]  # larger than a piece, strided
    expected = sum(tensor.double() / 8 for tensor in tensors).to(dtype)
    found = averaging.weighted_sum(tensors, [1 / 8] * 8)
    assert found.dtype == dtype and found.shape == (500, 700) and torch.equal(found, expected)


# ---------------------------------------------------------------------------------------------------------------------
# running averages


def test_ema_is_its_recurrence():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    average, expected = averages.running(model, 0.9, 0), None
    for n in range(30):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update(torch.tensor(True))
        decay = min(0.9, (1 + n) / (10 + n))
        expected = model.weight.clone() if n == 0 else decay * expected + (1 - decay) * model.weight
        torch.testing.assert_close(averages.state(average)['ema']['weight'], expected)


@pytest.mark.parametrize('ema_decay', [0.9, 0.999, 0.3, 0.0])
def test_averages_are_those_of_torch(ema_decay):
    """Bit for bit those of AveragedModel, which is called in good steps alone; buffers too. Nothing waits."""
    def ema(averages, weights, n):
        torch._foreach_lerp_(averages, weights, 1 - min(ema_decay, float((1 + n) / (10 + n))))

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 40), torch.nn.BatchNorm1d(40))
    theirs = AveragedModel(model, multi_avg_fn=ema if ema_decay else get_swa_multi_avg_fn())
    mine = averages.running(model, ema_decay, 0 if ema_decay else 1)
    with averages.smoothed(mine) as kind:
        assert kind == '', 'there is no average yet'
    for step in range(100):
        model(torch.randn(5, 3))
        for p in model.parameters():
            p.data.add_(torch.randn_like(p))
        is_good = torch.tensor(step % 7 != 3 and step > 1)
        with NoWait():
            mine.update(is_good)
        if is_good:
            theirs.update_parameters(model)
    raw, own = ({name: tensor.clone() for name, tensor in some.state_dict().items()} for some in (model, theirs.module))
    assert int(mine.n) == theirs.n_averaged and equal(averages.state(mine)[mine.kind], own, atol=0)
    with pytest.raises(KeyError), averages.smoothed(mine) as kind:
        assert kind == mine.kind and equal(model.state_dict(), own, atol=0)
        raise KeyError
    assert equal(model.state_dict(), raw, atol=0), 'its own weights are back, whatever happened'


def test_swa_is_the_mean_of_the_weights(train, tiny):
    """Of those after every step from swa_start on; here of steps 8, 9 and 10."""
    train('--swa_start=7', '--save_interval=1')
    saved = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)
    assert saved['n_averaged'] == 3
    assert equal(saved['swa'], plain_mean(tiny / 'checkpoints', [8, 9, 10]), atol=1e-6)
    assert 'swa' not in torch.load(tiny / 'checkpoints/step_0000007.pt', weights_only=True)


def test_the_average_is_evaluated_beside_the_raw_weights(train, tiny):
    result = train('--ema_decay=0.9', '--eval_iters=0')
    line = [line for line in result.out.splitlines() if line.startswith('step 10:')][0]
    val, raw = re.search(r'val loss ([\d.]+), val accuracy [\d.]+%, raw val loss ([\d.]+) ', line).groups()
    saved = torch.load(tiny / 'checkpoints/best.pt', weights_only=True)
    data = val_of(tiny)
    model = GPT(GPTConfig(**saved['model_args']))
    for key, printed in ('ema', val), ('model', raw):
        model.load_state_dict(saved[key])
        loss, _ = evaluation.measure(model, data, 0, torch.device('cpu'), 'float32')
        assert float(printed) == pytest.approx(loss, abs=1e-4)
    assert f'{saved["best_val_loss"]:.4f}' == val
    auto, raw, ema = (train('--test', f'--weights={which}').out.splitlines()[-1] for which in ('auto', 'raw', 'ema'))
    assert auto == ema != raw
    missing = train('--test', '--weights=swa')
    assert missing.status == 2 and "weights = 'swa'" in missing.err and 'ema' in missing.err


def test_nothing_changes_for_the_raw_weights(train, tiny):
    """An average only watches."""
    train('--out_dir=plain')
    train('--out_dir=with', '--ema_decay=0.99', '--dropout=0.0')
    assert equal(state(tiny / 'plain/ckpt.pt'), state(tiny / 'with/ckpt.pt'))


# ---------------------------------------------------------------------------------------------------------------------
# --test, and ensembles


def test_a_row_each_and_the_ensemble(train, folder):
    paths = [f'checkpoints/step_00000{step:02d}.pt' for step in (10, 20)]
    result = train('--test', f'--checkpoint={",".join(paths)}')
    assert result.status == 0, result.err
    rows = [line for line in result.out.splitlines() if line.startswith('test loss')]
    assert [row.split(': ')[-1] for row in rows] == [*paths, 'ensemble']
    assert rows[0] == train('--test', f'--checkpoint={paths[0]}').out.splitlines()[-1]
    data = torch.from_numpy(np.fromfile(folder.parent / 'data/tiny/test.bin', dtype=np.uint16).astype(np.int64))
    models = []
    for path in paths:
        models.append(GPT(GPTConfig(**torch.load(folder.parent / path, weights_only=True)['model_args'])))
        models[-1].load_state_dict(state(folder.parent / path))
    total = right = 0
    for t in range(0, 999, 16):
        start = min(t, 999 - 16)
        probs = sum(model(data[None, start:start + 16], data[None, start:start + 16])[0][0].softmax(-1)
                    for model in models)[t - start:] / 2
        targets = data[t + 1:t + 1 + len(probs)]
        total -= probs.gather(1, targets[:, None]).log().sum().item()
        right += (probs.argmax(-1) == targets).sum().item()
    assert rows[2].startswith(f'test loss {total / 999:.4f}, perplexity {math.exp(total / 999):.3f}, '
                              f'accuracy {right / 999:.2%}')


def test_several_write_as_one(run, folder):
    """An ensemble of a model with itself writes what the model writes; of two, something of its own."""
    os.link(folder / 'step_0000020.pt', folder / 'twin.pt')
    write = lambda *names: run('sample.py', '--device=cpu', '--max_new_tokens=40', '--start=a', '--temperature=1',
                               f'--checkpoint={",".join(f"checkpoints/{name}.pt" for name in names)}')
    alone, twice, two = write('step_0000020'), write('step_0000020', 'twin'), write('step_0000020', 'step_0000002')
    assert alone.status == twice.status == two.status == 0, two.err
    text = lambda result: result.out.split('steps\n')[-1]
    assert text(alone) == text(twice) != text(two)


def test_ensembles_of_padded_vocabularies(train, folder):
    """As 50,257 ids of GPT-2 and 50,304 of ours: the text has none beyond the smaller one."""
    saved = torch.load(folder / 'step_0000020.pt', weights_only=True)
    weight = torch.cat((saved['model']['lm_head.weight'], torch.full((5, 32), -0.1)))
    saved['model'] |= {'lm_head.weight': weight, 'transformer.wte.weight': weight}
    torch.save(saved | {'model_args': saved['model_args'] | {'vocab_size': 32}}, folder.parent / 'padded.pt')
    result = train('--test', '--checkpoint=padded.pt,checkpoints/ckpt.pt')
    assert result.status == 0 and result.out.splitlines()[-1].endswith('ensemble'), result.err


def test_ensembles_speak_one_language(run, train, folder):
    (folder.parent / 'other.txt').write_text('0123456789 ' * 3000)
    run('prepare.py', '--input=other.txt', '--dataset=digits')
    assert run('train.py', '--dataset=digits', *TINY, '--max_iters=1', '--out_dir=digits').status == 0
    both = '--checkpoint=checkpoints/ckpt.pt,digits/ckpt.pt'
    for result in run('sample.py', both, '--device=cpu'), train('--test', both):
        assert result.status == 2 and result.err.count('\n') == 1 and 'tokenizer' in result.err


@pytest.mark.parametrize('block_size', [16, 8])
def test_ensembles_of_different_windows(block_size):
    """The shorter rows count; a stream with caches is the uncached mean of probabilities."""
    torch.manual_seed(0)
    models = [GPT(GPTConfig(block_size=size, vocab_size=11, n_layer=1, n_head=1, n_embd=8)).eval()
              for size in (16, block_size)]
    for model in models:
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.5)
    assert evaluation.Ensemble(models).config.block_size == block_size
    idx = torch.tensor([[1, 2, 3]])
    stream = models[0].stream(idx, temperature=0, others=models[1:])
    for _ in range(block_size - 3):
        expected = sum(model(idx)[0][:, -1].softmax(-1) for model in models).argmax(-1, keepdim=True)
        new = next(stream)
        assert torch.equal(new, expected)
        idx = torch.cat((idx, new), dim=1)


def test_bits_per_byte(run, tmp_path):
    """Of characters that take one to four bytes each: the loss in bits over all bytes."""
    (tmp_path / 'data').mkdir()
    text = 'naive cafe \N{GREEK SMALL LETTER ALPHA}\N{SNOWMAN}\N{OWL}.\n' * 600
    (tmp_path / 'text.txt').write_text(text, encoding='utf-8')
    assert run('prepare.py', '--input=text.txt', '--dataset=tiny').status == 0
    assert run('train.py', '--dataset=tiny', *TINY, '--max_iters=2').status == 0
    line = run('train.py', '--test', '--device=cpu').out.splitlines()[-1]
    loss, bits = map(float, re.search(r'test loss ([\d.]+), .* bits per byte ([\d.]+) ', line).groups())
    ids = np.fromfile(tmp_path / 'data/tiny/test.bin', dtype=np.uint16)[1:]
    meta = tokens.read_meta(tmp_path / 'data/tiny')
    n_bytes = len(''.join(meta['tokenizer']['chars'][i] for i in ids).encode())
    assert n_bytes > len(ids) and bits == pytest.approx(loss * len(ids) / math.log(2) / n_bytes, abs=2e-4)


def test_bytes_of_bpe_tokens():
    pytest.importorskip('tiktoken')
    import tiktoken
    ranks = {bytes([i]): i for i in range(256)} | {b'ab': 256, 'é'.encode(): 257}
    encoding = tiktoken.Encoding('small', pat_str='.+', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 258})
    meta = {'vocab_size': 259, 'tokenizer': tokens.describe_bpe(encoding)}
    ids = encoding.encode('abxé<|endoftext|>', allowed_special='all')
    assert tokens.bytes_per_token(meta, np.array(ids)) == (2 + 1 + 2 + 0) / 4
