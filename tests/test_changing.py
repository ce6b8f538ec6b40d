"""
What a change costs: changes of docs/changing.md, and some more, made in a copy of the repository, and then the whole
way with its scripts: trained, killed, resumed, sampled, tested, averaged, plotted, swept.
"""

import math
import re
import shutil
import zipfile

import pytest
import torch
from conftest import ROOT, TINY, losses, records, small_run

from kit.watch import curves, runlogs

SCRIPTS = ('train.py', 'model.py', 'attention.py', 'sample.py', 'checkpoint_averaging.py', 'plot_loss.py', 'prepare.py',
           'sweep.py')

# train.py that is killed at step 7, two steps behind a checkpoint, once that is written
KILLED = '''import os, signal, time
from kit.data import batches
__file__ = __file__.replace('killed.py', 'train.py')
sound = batches.torch_seed
def torch_seed(seed, step, rank):
    while step == 7 and not os.path.exists('checkpoints/ckpt.pt'):
        time.sleep(0.01)
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return sound(seed, step, rank)
batches.torch_seed = torch_seed
exec(compile(open(__file__).read(), __file__, 'exec'))
'''


def changes():
    """{section of docs/changing.md: [(file, old, new), ...]} of its diffs."""
    found = {}
    for section in re.split(r'^## ', (ROOT / 'docs/changing.md').read_text(encoding='utf-8'), flags=re.M)[1:]:
        for diff in re.findall(r'^```diff\n(.*?)^```', section, flags=re.M | re.S):
            for hunk in re.split(r'^@@ ', diff, flags=re.M)[1:]:
                place, *lines = hunk.splitlines()
                old, new = (''.join(line[1:] + '\n' for line in lines if line[:1] in (' ', '', sign)) for sign in '-+')
                found.setdefault(section.splitlines()[0], []).append((place.split(',')[0], old, new))
    return found


CHANGES = changes()


class Tree:
    """A copy of the repository, its changed files, and its scripts."""

    def __init__(self, folder, run):
        self.folder, self.run, self.changed = folder, run, set()
        folder.mkdir()
        for name in SCRIPTS:
            shutil.copy2(ROOT / name, folder)
        for name in 'kit', 'config':  # with what Python has compiled
            shutil.copytree(ROOT / name, folder / name)
        (folder / 'killed.py').write_text(KILLED)

    def change(self, file, old, new):
        path = self.folder / file
        text = path.read_text(encoding='utf-8')
        assert text.count(old) == 1, f'{file} has {text.count(old)} times\n{old}'
        path.write_text(text.replace(old, new), encoding='utf-8')
        self.changed.add(file)

    def make(self, section):
        """The change of a section of docs/changing.md."""
        for change in CHANGES[section]:
            self.change(*change)

    def __call__(self, script, *args, status=0):
        result = self.run(self.folder / script, *args)
        assert result.status == status, result.out + result.err
        return result

    def train(self, *args, script='train.py', **kwargs):
        return self(script, '--dataset=tiny', *small_run(*args), **kwargs)


@pytest.fixture
def tree(run, tiny):
    return Tree(tiny / 'tree', run)


def whole_way(tree, folder, *args, is_drawn=False):
    """
    A run is killed two steps behind a checkpoint and resumed, then all scripts use what it has left. Returns the
    records of its steps, and what the resumed run has printed.
    """
    tree.train(*args, script='killed.py', status=-9)
    resumed = tree('train.py', '--init_from=resume', '--device=cpu')
    steps = {}
    for record in records(folder / 'checkpoints'):
        if 'grad_norm' in record:
            steps.setdefault(record['step'], []).append(record)
    assert list(steps) == list(range(10))
    for step in 5, 6:  # made twice
        before, after = steps[step]
        assert {name: before[name] == after[name] for name in ('loss', 'grad_norm', 'lr')} == \
            {'loss': True, 'grad_norm': True, 'lr': True}
    written = tree('sample.py', '--max_new_tokens=40', '--device=cpu')
    tested = tree('train.py', '--test', '--checkpoint=checkpoints/best.pt', '--device=cpu')
    averaged = tree('checkpoint_averaging.py', '--num_checkpoints=2', '--device=cpu')
    written_too = tree('sample.py', '--checkpoint=checkpoints/averaged_model.pt', '--max_new_tokens=5', '--device=cpu')
    drawn = [tree('plot_loss.py', '--layers')] if is_drawn else []
    assert re.search(r'test loss \d\.\d+', tested.out) and 'val loss' in averaged.out
    assert all((folder / 'checkpoints' / name).exists() == is_drawn for name in ('loss_curve.png', 'layers.png'))
    for result in resumed, written, tested, averaged, written_too, *drawn:
        assert 'damaged' not in result.out + result.err and 'WARNING' not in result.out
    with zipfile.ZipFile(folder / 'checkpoints/source.zip') as source:  # the copy is what has run
        for file in tree.changed:
            assert source.read(file).decode() == (tree.folder / file).read_text(encoding='utf-8')
    return [steps[step][-1] for step in range(10)], resumed.out


def test_the_page_names_what_is_there():
    """Files, functions and tests in the table, and each diff fits the code (those that nothing here makes too)."""
    text = (ROOT / 'docs/changing.md').read_text(encoding='utf-8')
    rows = [row for row in text.splitlines() if row.startswith('| ')][1:]
    assert len(rows) == len(CHANGES) >= 10
    for row, hunks in zip(rows, CHANGES.values()):
        _, _, place, lines, test, _, _ = row.split('|')
        n_new = sum(bool(line.strip()) and line not in old.splitlines() for _, old, new in hunks
                    for line in new.splitlines())
        assert n_new == int(lines), row
        assert {file for file, _, _ in hunks} == set(re.findall(r'`([\w/]+\.py)`', place)), row
        assert (ROOT / 'tests' / test.strip(' `')).is_file(), row
        for file, names in re.findall(r'`([\w/]+\.py)`: ([^;]*)', place):
            source = (ROOT / file).read_text(encoding='utf-8')
            for name in re.findall(r'`([\w.]+)', names):
                assert all(re.search(rf'\b{word}\b', source) for word in name.split('.')), (file, name)
    for section, hunks in CHANGES.items():
        assert len({file for file, _, _ in hunks}) <= 2, section
        for file, old, _ in hunks:
            assert (ROOT / file).read_text(encoding='utf-8').count(old) == 1, f'{section}: {file}\n{old}'


def test_rmsnorm_and_no_positions(tree, tiny, trained):
    tree.make('RMSNorm')
    tree.make('Positions')
    trained.rename(tiny / 'older')  # made by the code as it is
    tree('sample.py', '--checkpoint=older/best.pt', '--max_new_tokens=5', '--device=cpu')
    # TensorBoard shows its graph, its attention and its vectors
    whole_way(tree, tiny, '--architecture=modern,position=none', '--tensorboard=True', is_drawn=True)
    assert 'bit for bit: this is what happened' in tree('train.py', '--inspect_step=6', '--device=cpu').out
    tree('train.py', '--init_from=resume', '--dry_run', '--device=cpu')
    assert tree.changed == {'model.py'}
    names = torch.load(tiny / 'checkpoints/best.pt', weights_only=True)['model']
    assert 'transformer.wpe.weight' not in names and 'transformer.h.0.ln_1.weight' in names
    probe = tree.folder / 'probe.py'
    probe.write_text('''
import torch
import kit, model
from kit.watch import inside
assert kit.__path__[0].startswith(__file__.rpartition('/')[0])
gpt = model.GPT(model.GPTConfig(block_size=8, vocab_size=5, n_layer=1, n_head=2, n_embd=8, position='none')).eval()
ids = torch.tensor([[1, 2, 3, 4, 0, 2]])
caches = gpt.new_caches(8)
parts = [gpt.hidden(ids[:, :4], caches)] + [gpt.hidden(ids[:, i:i + 1], caches) for i in (4, 5)]
torch.testing.assert_close(torch.cat(parts, dim=1), gpt.hidden(ids))
twice = gpt.hidden(torch.cat([ids[:, :3]] * 2, dim=1), documents=torch.tensor([[0, 0, 0, 1, 1, 1]]))
torch.testing.assert_close(twice[:, :3], twice[:, 3:])
maps = inside.attention(gpt, ids[0])
assert maps.shape == (1, 2, 6, 6) and abs(maps.sum(-1) - 1).max() < 1e-5
''')
    tree('probe.py')


def test_a_field_of_the_model_with_a_setting(tree, tiny, trained):
    tree.make('A size of the model')
    tree.make('Attention')
    trained.rename(tiny / 'older')  # made by the code as it is
    tree('sample.py', '--checkpoint=older/best.pt', '--max_new_tokens=5', '--device=cpu')
    older = tree.train('--init_from=resume', '--out_dir=older', '--max_iters=12')
    assert 'iter 11:' in older.out and 'damaged' not in older.out
    _, out = whole_way(tree, tiny, '--mlp_ratio=2')
    assert 'From the checkpoint: mlp_ratio = 2' in out
    saved = torch.load(tiny / 'checkpoints/best.pt', weights_only=True)
    assert saved['model_args']['mlp_ratio'] == 2 and len(saved['model']['transformer.h.0.mlp.c_fc.weight']) == 64
    refused = [tree.train('--init_from=resume', f'--{name}', status=2).err for name in ('mlp_ratio=3', 'n_embd=64')]
    assert refused[0] == refused[1].replace('n_embd = 64', 'mlp_ratio = 3').replace('n_embd = 32', 'mlp_ratio = 2')
    assert len(refused[0].splitlines()) == 1
    assert tree.changed == {'model.py', 'train.py'}


def test_parameters_and_buffers_of_all_kinds(tree, tiny, trained):
    trained.rename(tiny / 'older')  # made by the code as it is
    tree.change('model.py', '        self.config = config\n        self.slides', '''        self.config = config
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer('phases', torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer('nothing', torch.zeros(0))
        self.register_buffer('n_seen', torch.zeros((), dtype=torch.int64))
        self.register_buffer('size', torch.zeros(()))
        self.register_buffer('future', torch.full((16, 16), -math.inf).triu(1))
        self.register_buffer('mask', torch.ones(1, 1, 16, 16).tril())  # as nanoGPT's
        self.slides''')
    tree.change('model.py', '        return self.transformer.ln_f(x)', '''        self.n_seen += self.training
        if self.training:
            self.size.lerp_(x.detach().abs().mean(), 0.1)
        return self.gain * self.phases.abs().mean() * self.transformer.ln_f(x)''')
    refused = tree('sample.py', '--checkpoint=older/best.pt', '--device=cpu', status=2).err
    assert 'another model' in refused and 'damaged' not in refused and len(refused.splitlines()) == 1
    whole_way(tree, tiny, '--ema_decay=0.9')
    saved = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)
    average = torch.load(tiny / 'checkpoints/averaged_model.pt', weights_only=True)['model']
    for weights in saved['model'], saved['ema'], average:
        assert weights['phases'].is_complex() and len(weights['nothing']) == 0 and weights['gain'].isfinite()
        assert weights['n_seen'] == 10 and weights['size'] == saved['model']['size'] or weights is average
        assert torch.equal(weights['future'], torch.full((16, 16), -math.inf).triu(1)) and weights['mask'].sum() == 136
    assert tree.changed == {'model.py'}


def test_another_optimizer_and_a_bad_loss(tree, tiny):
    tree.make('An optimizer')
    tree.change('train.py', '            loss = loss / parts', '''            if step in (3, 6):
                loss = loss * math.nan
            loss = loss / parts''')
    tree.train(script='killed.py', status=-9)
    result = tree('train.py', '--init_from=resume', '--device=cpu', '--tensorboard=False')
    assert 'of 1 of the steps up to 6 was not finite; they were skipped' in result.out
    steps = {r['step']: r['loss'] for r in records(tiny / 'checkpoints') if 'grad_norm' in r}
    assert [step for step, loss in steps.items() if loss is None] == [3, 6] and steps[9] < steps[0]
    for path in (tiny / 'checkpoints').glob('*.pt'):
        saved = torch.load(path, weights_only=True)
        assert all(w.isfinite().all() for w in saved['model'].values())
        moments = [m for state in saved['optimizer']['state'].values() for m in state.values()]
        assert moments and all(m.isfinite().all() for m in moments if isinstance(m, torch.Tensor))
        assert 'mu_product' in saved['optimizer']['state'][0]
    tree('sample.py', '--max_new_tokens=5', '--device=cpu')
    tree('train.py', '--test', '--checkpoint=checkpoints/best.pt', '--device=cpu')
    tree('checkpoint_averaging.py', '--num_checkpoints=2', '--device=cpu')
    assert tree.changed == {'train.py'}


def test_a_term_of_the_loss_and_its_figure(tree, tiny, train):
    tree.make('The loss')
    tree.make('A figure')
    tree.make('An evaluation')
    assert losses(tree.train('--out_dir=without')) == losses(train('--out_dir=before'))  # with a weight of 0
    steps, _ = whole_way(tree, tiny, '--z_loss=0.01', is_drawn=True)
    assert all(r['z'] > 0 and r['weights/norm'] > 0 for r in steps) and len({r['z'] for r in steps}) > 5
    drawn, _ = curves.own_panels([runlogs.read(tiny / 'checkpoints')])
    assert sorted(drawn.values()) == [['val/last_token'], ['weights/norm'], ['z']]
    assert {'step', 'val/last_token'} <= {name for r in records(tiny / 'checkpoints') if 'val/loss' in r for name in r}
    assert tree.changed == {'train.py'}
    # the same figure however the step is cut
    tree.train('--z_loss=0.01', '--batch_size=1', '--gradient_accumulation_steps=4', '--out_dir=cut', '--max_iters=2')
    for a, b in zip(records(tiny / 'cut')[1:3], steps):
        assert a['z'] == pytest.approx(b['z'], rel=1e-5) and a['loss'] == pytest.approx(b['loss'], rel=1e-5)


@pytest.mark.parametrize('values', ['[0.1]', pytest.param('[0.0, 0.1]', marks=pytest.mark.long)])
def test_a_sweep_goes_by_a_figure(tree, tiny, values):
    tree.make('The loss')
    settings = ''.join(f'{name} = {value!r}\n' for name, value in (arg[2:].split('=') for arg in TINY))
    settings = re.sub(r"'(\d+|False)'", r'\1', settings)
    (tiny / 'x.py').write_text(f"dataset = 'tiny'\n{settings}max_iters = 5\nz_loss = {values}\nminimise = 'z'\n")
    result = tree('sweep.py', 'x.py')
    assert re.search(r'^\| 1 \| z_loss=0\.1 +\| +\d', result.out, flags=re.M) and 'lowest z' in result.out
    assert tree.changed == {'train.py'}


def test_a_schedule(tree, tiny):
    tree.make('A schedule')
    steps, _ = whole_way(tree, tiny, '--lr_schedule=polynomial:3', '--learning_rate=4e-3', '--min_lr=0')
    assert [r['lr'] for r in steps[2:]] == pytest.approx([4e-3 * (1 - t / 8)**3 for t in range(8)])
    wrong = tree.train('--lr_schedule=polynomial:x', status=2)
    assert len(wrong.err.splitlines()) == 1
    tree('plot_loss.py', '--schedule=--lr_schedule=polynomial')
    assert tree.changed == {'kit/learn/schedules.py'}


def test_a_batch_mode_and_a_sink(tree, tiny):
    tree.make('A batch mode')
    assert tree.changed == {'kit/data/readers.py', 'train.py'}
    tree.make('A sink')
    steps, _ = whole_way(tree, tiny, '--batch_mode=aligned')
    tree.train('--out_dir=windows')
    assert not {r['loss'] for r in steps[1:]} & {r.get('loss') for r in records(tiny / 'windows')}  # the first is ln V
    steps = [int(line.split(',')[0]) for line in (tiny / 'checkpoints/loss.csv').read_text().splitlines()]
    assert steps == [*range(7), *range(5, 10)]


def test_a_tokenizer(tree, tiny):
    tree.make('A tokenizer')
    tree('prepare.py', '--input=text.txt', '--dataset=letters', '--tokenizer=letters')
    whole_way(tree, tiny, '--dataset=letters')
    written = tree('sample.py', '--start=to be', '--max_new_tokens=40', '--device=cpu').out.splitlines()[-1]
    assert written.startswith('to be') and set(written) <= set(' abcdefghijklmnopqrstuvwxyz')
    assert tree.changed == {'kit/data/tokens.py'}
