"""
What a run shows of itself: TensorBoard, W&B, the gradients by layer, the hunt for NaN and the replay of one step,
each against what torch, the log or a plain loop says.
"""

import json
import math
import os
import re
import struct
import subprocess
import sys
import types
import weakref

import numpy as np
import pytest
import torch
from conftest import GPT2, ROOT, TINY, fetch, hooked_script, losses, records, some_text

from kit.data import readers
from kit.learn import gradients
from kit.run import nan_hunt, replay
from kit.watch import evaluation, inside, runlogs
from kit.watch.diagnosis import History
from model import GPT, GPTConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=27, n_layer=3, n_head=2, n_embd=32))


def backward(model, rows=4):
    idx = torch.randint(27, (rows, 16))
    model(idx, torch.randint(27, (rows, 16)))[1].backward()
    return idx


# ---------------------------------------------------------------------------------------------------------------------
# gradients


def test_norms_are_those_of_torch(model):
    """Each parameter's, their total as clip_grad_norm_ computes it bit for bit, and 0 where there is no gradient."""
    backward(model)
    norms = gradients.norms([*model.parameters()])
    assert norms.tolist() == pytest.approx([p.grad.norm().item() for p in model.parameters()], rel=1e-5)
    total = torch.linalg.vector_norm(norms)
    clipped = [p.grad.clone() for p in model.parameters()]
    assert torch.equal(total, torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    for p, gradient in zip(model.parameters(), clipped):
        theirs, p.grad = p.grad, gradient
        torch.nn.utils.clip_grads_with_norm_(p, 0.1, total)
        assert torch.equal(p.grad, theirs)
    model.transformer.h[1].ln_1.weight.grad = None
    assert gradients.norms([*model.parameters()]).tolist().count(0.0) == 1


def test_layers_against_a_plain_loop(model):
    """Norms and update ratios by layer; parameters as small as these are compared whole."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model)
    norms, before = gradients.norms([*model.parameters()]), gradients.sample(model)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    found = gradients.by_layer(model, gradients.moves(model, norms, before))
    layers = {'wte': 'transformer.wte.', 'wpe': 'transformer.wpe.', 'ln_f': 'transformer.ln_f.'} | {
        f'h.{i}': f'transformer.h.{i}.' for i in range(3)}
    assert set(found) == {f'{kind}/{layer}' for kind in ('grad_norm', 'update_ratio') for layer in layers}
    for layer, prefix in layers.items():
        mine = {name: p for name, p in model.named_parameters() if name.startswith(prefix)}
        gradient = torch.cat([p.grad.flatten() for p in mine.values()]).norm()
        moved = torch.cat([(p.detach() - old[name]).flatten() for name, p in mine.items()]).norm()
        size = torch.cat([old[name].flatten() for name in mine]).norm()
        assert found[f'grad_norm/{layer}'] == pytest.approx(gradient.item(), rel=1e-5)
        assert found[f'update_ratio/{layer}'] == pytest.approx((moved / size).item(), rel=1e-4)
    before[0].zero_()
    found = gradients.by_layer(model, gradients.moves(model, norms, before))
    assert 'grad_norm/wte' in found and 'update_ratio/wte' not in found  # a share of nothing


def test_a_large_parameter_is_sampled_evenly(monkeypatch):
    monkeypatch.setattr(gradients, 'SAMPLE', 100)
    tensor = torch.arange(12_345.0)
    some = gradients.spread(tensor)
    assert 90 <= len(some) <= 100 and some[0] == 0 and some[-1] > 12_200


def test_attention_is_that_of_the_model(model):
    """The maps times the values give what the attention gave, in every layer."""
    idx = torch.randint(27, (16,))
    seen = []
    for block in model.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
        block.attn.c_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(idx[None])
    seen, maps = [*seen], inside.attention(model, idx)  # which runs c_attn once more
    assert maps.shape == (3, 2, 16, 16) and np.allclose(maps.sum(-1), 1, atol=1e-5)
    assert np.allclose(np.triu(maps, 1), 0)
    for layer in range(3):
        values = seen[2 * layer][0, :, 64:].view(16, 2, 16).transpose(0, 1)  # (H, T, C/H)
        y = (torch.from_numpy(maps[layer]) @ values).transpose(0, 1).reshape(16, 32)
        torch.testing.assert_close(y, seen[2 * layer + 1][0], rtol=1e-4, atol=1e-6)


def test_token_losses_have_the_mean_that_training_sees(model):
    data = np.random.default_rng(0).integers(27, size=500).astype(np.uint16)
    x, y, _ = fetch(readers.Windows(data, 16), np.arange(7) * 40)
    found = evaluation.token_losses(model, x, y, None, torch.device('cpu'), 'float32')
    loss = model(torch.from_numpy(x.astype(np.int64)), torch.from_numpy(y.astype(np.int64)))[1].item()
    assert found.shape == (7, 16) and found.mean() == pytest.approx(loss, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# the records and TensorBoard


def test_every_update_is_recorded(train, tiny):
    """Whatever the log interval: the same losses and norms, in the order of the steps, none missing."""
    train('--log_interval=1', '--max_iters=23', '--out_dir=each')
    train('--log_interval=7', '--max_iters=23', '--out_dir=seldom')
    each, seldom = ([(r['step'], r['loss'], r['grad_norm'], r['lr']) for r in records(tiny / name) if 'loss' in r]
                    for name in ('each', 'seldom'))
    assert each == seldom and [row[0] for row in each] == list(range(23))
    all_steps = [r['step'] for r in records(tiny / 'seldom')]
    assert all_steps == sorted(all_steps)
    assert [r['time'] for r in records(tiny / 'seldom')] == sorted(r['time'] for r in records(tiny / 'seldom'))
    assert [r['step'] for r in records(tiny / 'seldom') if 'tokens_per_second' in r] == [0, 7, 14, 21, 22]


def test_the_share_of_clipped_updates(train, tiny):
    """Of all since the last iter line, whatever was read in between for an evaluation."""
    train(*GPT2, '--log_interval=7', '--grad_clip=1.1', '--max_iters=20')
    found = records(tiny / 'checkpoints')
    norms = {r['step']: r['grad_norm'] for r in found if 'loss' in r}
    shares = {r['step']: r['clip_rate'] for r in found if 'clip_rate' in r}
    for begin, end in (0, 7), (7, 14), (14, 19):
        assert shares[end] == np.mean([norms[s] > 1.1 for s in range(begin + 1, end + 1)])
    assert set(shares) == {0, 7, 14, 19} and 0 < shares[7] + shares[14] < 2
    for name in 'ckpt.pt', 'best.pt', 'step_0000015.pt', 'step_0000020.pt':
        (tiny / 'checkpoints' / name).unlink()
    resumed = train('--init_from=resume', '--log_interval=7', '--grad_clip=1.1', '--max_iters=20')
    assert list(losses(resumed)) == [14, 19], resumed.err
    assert [r['clip_rate'] for r in records(tiny / 'checkpoints') if r.get('clip_rate') is not None
            and r['step'] == 14] == [shares[14]] * 2


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator(str(folder), dict.fromkeys(('scalars', 'histograms', 'images', 'tensors'), 0)).Reload()


def test_tensorboard_has_every_tag_of_the_contract(train, tiny):
    result = train(*GPT2, '--tensorboard=True', '--max_iters=50', '--eval_interval=20', '--log_interval=10')
    assert 'WARNING' not in result.out and result.err == ''
    folder, = (tiny / 'runs').iterdir()  # one run, no others beside it
    assert re.fullmatch(r'checkpoints-\d{8}-\d{6}', folder.name)
    found = events(folder)
    tags = found.Tags()
    layers = ['wte', 'wpe', 'h.0', 'h.1', 'ln_f']
    assert set(tags['scalars']) >= {
        'Loss/train', 'Loss/val', 'Accuracy/train', 'Accuracy/val', 'Training/Loss', 'Learning_rate',
        'Training/GradNorm', 'Training/ClipRate', 'Training/TokensPerSecond', 'Training/MFU', 'System/cpu_memory_gib',
        'System/cpu_percent', *(f'{kind}/{layer}' for kind in ('GradNorm', 'UpdateRatio') for layer in layers)}
    names = [name for name, _ in GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=27, block_size=16, bias=False)
                                     ).named_parameters()]
    assert set(tags['histograms']) == {f'{kind}/{name}' for kind in ('Parameters', 'Gradients') for name in names}
    assert set(tags['images']) == {'Attention', 'Loss_curve'} and tags['graph']
    assert set(tags['tensors']) >= {'Samples/text_summary', 'custom_scalars__config__'}
    assert {'_hparams_/session_start_info', '_hparams_/session_end_info'} <= set(found.PluginTagToContent('hparams'))
    assert 'Tokens' in (folder / 'projector_config.pbtxt').read_text()
    labels = (folder / '00050/Tokens/metadata.tsv').read_text().splitlines()
    assert len(labels) == 27 and labels[:2] == ['\\n', "' '"]  # a blank line would be no label to the projector
    # once per update, and the figures of the log
    in_log = {r['step']: r for r in records(tiny / 'checkpoints') if 'loss' in r}
    for tag, name in ('Training/GradNorm', 'grad_norm'), ('Training/Loss', 'loss'), ('Learning_rate', 'lr'):
        assert {e.step: e.value for e in found.Scalars(tag)} == {
            step: pytest.approx(r[name], rel=1e-6) for step, r in in_log.items()}, tag
    assert [e.step for e in found.Scalars('Loss/val')] == [0, 20, 40, 50]
    assert [e.step for e in found.Histograms(f'Gradients/{names[0]}')] == [0, 20, 40]


# ---------------------------------------------------------------------------------------------------------------------
# figures of a researcher's own

OWN = """
import math, numpy as np, torch
from kit.watch import journal
old = journal.Journal.update
weight, running = torch.tensor(2.0, requires_grad=True), torch.tensor(0.0)
def update(self, step, figures):
    running.add_(1)  # where it lies; what was handed over before stays as it was
    figures |= {'z_loss': weight * step, 'attention/entropy': torch.tensor(0.1, dtype=torch.float64),
                'half': torch.tensor(step / 4, dtype=torch.bfloat16), 'count': torch.tensor(2**40 + step),
                'is_odd': torch.tensor(step % 2 == 1), 'numpy': np.float32(0.25), 'plain': 3, 'running': running}
    if step % 3 == 0:
        figures['seldom'] = torch.tensor(math.nan if step == 3 else 0.5)
    old(self, step, figures)
journal.Journal.update = update
"""


def own_figures(step):
    """What OWN has put into the record of a step."""
    seldom = {} if step % 3 else {'seldom': None if step == 3 else 0.5}
    return {'z_loss': 2 * step, 'attention/entropy': 0.1, 'half': step / 4, 'count': 2**40 + step, 'plain': 3,
            'is_odd': step % 2, 'numpy': 0.25, 'running': step + 1} | seldom


def test_figures_of_ones_own(hooked, trained, tiny):
    """In the records and in TensorBoard; what each run records is bit for bit what it was."""
    result = hooked(OWN, '--out_dir=own', '--tensorboard=True', '--log_interval=4')
    assert result.status == 0 and 'WARNING' not in result.out, result.err
    updates = {r['step']: r for r in records(tiny / 'own') if 'loss' in r}
    for r in records(trained):
        if 'loss' in r:
            known = {name: r[name] for name in ('loss', 'grad_norm', 'lr')}
            mine = {name: updates[r['step']][name] for name in [*own_figures(r['step']), *known]}
            assert mine == own_figures(r['step']) | known
            assert ('seldom' in updates[r['step']]) == (r['step'] % 3 == 0)
    folder, = (tiny / 'runs').iterdir()
    found = events(folder)
    for name in 'z_loss', 'attention/entropy', 'half', 'is_odd', 'running':
        assert [(e.step, e.value) for e in found.Scalars(name)] == [
            (step, pytest.approx(own_figures(step)[name])) for step in range(10)], name
    assert [e.step for e in found.Scalars('seldom')] == [0, 3, 6, 9] and math.isnan(found.Scalars('seldom')[1].value)


@pytest.fixture
def journal(tmp_path, monkeypatch):
    from kit.watch.journal import Journal
    monkeypatch.setattr(sys, 'stdout', sys.stdout)  # to be given back
    journal = Journal()
    journal.open(tmp_path / 'run', {'log_interval': 9, 'grad_clip': 1.0, 'wandb_run_name': '', 'tensorboard': False,
                                    'wandb_log': False}, {})
    return journal


@pytest.mark.parametrize('name, value, words', [
    ('z_loss', torch.zeros(3), r'z_loss is a tensor of shape \(3,\); a figure is one number: take its mean\(\)'),
    ('z_loss', torch.zeros(1), r'z_loss is a tensor of shape \(1,\)'),
    ('z_loss', torch.tensor(1j), r'z_loss is a complex tensor; .* take its abs\(\)'),
    ('z_loss', 1j, 'z_loss is of type complex; a figure is one number'), ('z_loss', 'low', 'z_loss is of type str'),
    ('z_loss', None, 'z_loss is of type NoneType'), ('z_loss', np.zeros(2), 'z_loss is of type ndarray'),
    ('step', 1.0, "'step' cannot be the name"), ('time', torch.tensor(1.0), "'time' cannot"), (3, 1.0, '3 cannot'),
    ('', 1.0, "'' cannot")])
def test_what_is_no_figure(journal, name, value, words):
    """Refused where it is handed over, also by an evaluation, and where nothing is recorded."""
    with pytest.raises(ValueError, match=words):
        journal.record(0, {name: value})
    journal.history.facts['log_interval'] = 0
    with pytest.raises(ValueError, match=words):
        journal.update(0, {'loss': torch.tensor(1.0), name: value})


def test_figures_keep_no_graph_and_one_wait_is_enough(journal, tmp_path, monkeypatch):
    waits = []
    for name in 'tolist', 'item', '__float__':
        old = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, old=old: (waits.append(1), old(self))[1])
    weight = torch.ones(3, requires_grad=True)
    for step in range(5):
        loss = weight.sum()
        journal.update(step, {'loss': loss, 'z': loss.double() / 7, 'n': loss.long(), 'x': 0.5}
                       | ({'grad_norm': loss} if step > 2 else {}))
        graph = weakref.ref(loss)
        del loss
        assert graph() is None and not waits
    journal.read({'mfu': 0.5})
    assert len(waits) == 1
    found = records(tmp_path / 'run')
    assert [(r['loss'], r['z'], r['n'], r['x']) for r in found] == [(3.0, 3 / 7, 3, 0.5)] * 5
    assert ['grad_norm' in r for r in found] == [False] * 3 + [True] * 2 and found[-1]['clip_rate'] == 1
    journal.record(5, {'val/loss': torch.tensor(2.0), 'val/f1': np.float64(0.5)})
    assert {name: records(tmp_path / 'run')[-1][name] for name in ('val/loss', 'val/f1')} == {
        'val/loss': 2.0, 'val/f1': 0.5}


# ---------------------------------------------------------------------------------------------------------------------
# watching as such


def test_watching_without_iter_lines(train, tiny):
    train('--tensorboard=True', '--log_interval=0')
    folder, = (tiny / 'runs').iterdir()
    assert [e.step for e in events(folder).Scalars('Loss/val')] == [0, 5, 10]


def test_watching_in_bfloat16(train, tiny):
    result = train('--tensorboard=True', '--dtype=bfloat16')
    assert result.status == 0 and 'WARNING' not in result.out, result.err
    folder, = (tiny / 'runs').iterdir()
    assert set(events(folder).Tags()['images']) == {'Attention', 'Loss_curve'}


def test_no_picture_is_worth_a_run(hooked, tiny):
    """Without matplotlib, and with a model that cannot be asked: said once each, and the last state is saved."""
    args = '--dropout=0.3', '--eval_interval=2'
    result = hooked('import sys, model; sys.modules["matplotlib"] = None\n'
                    'model.GPT.generate = None', '--tensorboard=True', *args)
    # the same training, though the text failed while the model had its dropout off
    assert losses(result) == losses(hooked('', '--out_dir=unwatched', *args)) and len(losses(result)) == 10, result.err
    assert (tiny / 'checkpoints/step_0000010.pt').exists()
    for what in 'text Samples', 'image Attention', 'image Loss_curve':
        assert result.out.count(f'WARNING: no {what} from here on') == 1


def test_the_gradient_norm_is_that_before_clipping(train, tiny):
    train('--grad_clip=0.01', '--max_iters=3')
    assert all(r['grad_norm'] > 0.3 for r in records(tiny / 'checkpoints') if 'loss' in r)


def test_a_resumed_run_goes_on_in_its_folder(hooked, train, tiny):
    """Killed at step 9, after it has told TensorBoard of steps that the resume, from step 5, makes again."""
    hooked('import os, time, model\nold = model.GPT.forward\nn = [0]\n'
           'def forward(self, *args, **kwargs):\n'
           '    n[0] += self.training\n'
           '    while n[0] == 12 and not os.path.exists("checkpoints/ckpt.pt"): time.sleep(0.01)\n'
           '    if n[0] == 12: os._exit(9)\n'  # two passes are the look before training
           '    return old(self, *args, **kwargs)\n'
           'model.GPT.forward = forward', '--tensorboard=True')
    result = train('--init_from=resume', '--tensorboard=True')
    assert result.status == 0, result.err
    folder, = (tiny / 'runs').iterdir()
    found = events(folder)
    assert sorted({e.step for e in found.Scalars('Training/Loss')}) == list(range(10))
    assert [e.step for e in found.Scalars('Loss/val')] == [0, 5, 10]
    launches = json.loads((tiny / 'checkpoints/config.json').read_text())['launches']
    assert [launch['sinks'] for launch in launches] == [{'TensorBoard': f'runs/{folder.name}'}] * 2
    times = runlogs.read(tiny / 'checkpoints').get('time')[1]
    assert (np.diff(times) > -0.01).all() and times[-1] > 0.05  # the clock goes on


def test_watching_changes_nothing(train, tiny):
    """With all sinks on and with none: the same weights, bit for bit, with dropout and a sample at each evaluation."""
    args = '--dropout=0.3', '--eval_interval=3'
    train(*args, '--out_dir=a', '--tensorboard=True')
    train(*args, '--out_dir=b', '--log_interval=0')
    a, b = (torch.load(tiny / name / 'ckpt.pt', weights_only=True)['model'] for name in 'ab')
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_folder_that_cannot_be_written(train, tiny):
    (tiny / 'runs').write_text('in the way')
    result = train('--tensorboard=True')
    assert result.status == 0 and list(losses(result)) == list(range(10))
    lines = [line for line in result.out.splitlines() if 'WARNING' in line]
    assert len(lines) == 1 and 'TensorBoard (runs/' in lines[0] and 'gets nothing from here on' in lines[0]


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='it takes RLIMIT_FSIZE')
def test_a_full_disk_stops_no_training_that_is_watched(hooked, tiny):
    """Files may grow to 100 kB; the checkpoints fit, the event file and the log of a long run do not."""
    result = hooked('import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
                    'resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))',
                    '--tensorboard=True', '--max_iters=300', '--n_embd=16', '--save_interval=0')
    assert list(losses(result)) == list(range(300)), result.out[-2000:] + result.err
    assert result.err == '' and result.out.count('metrics.jsonl lacks lines') == 1


def test_two_runs_in_one_second_have_two_folders(tmp_path, monkeypatch):
    from kit.watch import journal
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal.time, 'strftime', lambda form: '20260101-000000')
    for expected in 'a-20260101-000000', 'a-20260101-000000.1', 'a-20260101-000000.2':
        folder = journal.run_folder('a')
        assert folder.name == expected
        folder.mkdir(parents=True)


# ---------------------------------------------------------------------------------------------------------------------
# Weights & Biases


def wandb_records(path):
    """The records of a run-*.wandb: LevelDB's log format, blocks of 32 KiB, the header of the file in the first."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, parts = path.read_bytes(), 7, b''
    while at + 7 <= len(data):
        rest = 2**15 - at % 2**15
        if rest < 7:
            at += rest
            continue
        _, length, kind = struct.unpack('<IHB', data[at:at + 7])
        parts, at = parts + data[at + 7:at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield Record.FromString(parts)
            parts = b''


def test_wandb_offline(hooked, train, tiny):
    """All of it without a network or an account; wandb finds the run again, and a resume keeps its id."""
    pytest.importorskip('wandb')
    env = {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true', 'WANDB_DIR': str(tiny)}
    result = hooked(OWN, '--wandb_log', '--wandb_project=some', '--wandb_run_name=mine', env=env)
    assert result.status == 0, result.err
    log, = (tiny / 'wandb').glob('offline-run-*/run-*.wandb')
    listed = subprocess.run([sys.executable, '-m', 'wandb', 'sync', '--dry-run', '--yes'], cwd=tiny, text=True,
                            capture_output=True, env=os.environ | {'WANDB_DIR': str(tiny)})
    assert 'Would sync 1 run' in listed.stdout + listed.stderr
    found = {}
    for record in wandb_records(log):
        found.setdefault(record.WhichOneof('record_type'), []).append(record)
    run_record = found['run'][0].run
    assert run_record.project == 'some' and run_record.display_name == 'mine'
    assert {u.key: u.value_json for u in run_record.config.update}['n_embd'] == '32'
    rows = [{'.'.join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            for record in found['history']]
    in_log = {r['step']: r['loss'] for r in records(tiny / 'checkpoints') if 'loss' in r}
    assert {int(row['step']): float(row['loss']) for row in rows if 'loss' in row} == in_log
    assert {int(row['step']): float(row['z_loss']) for row in rows if 'z_loss' in row} == {
        step: 2 * step for step in in_log}
    keys = {key.split('.')[0] for row in rows for key in row}
    assert {'val/loss', 'grad_norm', 'clip_rate', 'iter', 'Samples', 'Attention', 'Loss_curve', 'Tokens',
            'gradients/transformer', 'parameters/transformer'} <= keys
    models = [record.artifact for record in found['artifact'] if record.artifact.type == 'model']
    assert [[entry.path for entry in model.manifest.contents] for model in models] == [['best.pt']]
    resumed = train('--init_from=resume', '--max_iters=12', env=env)
    assert resumed.status == 0, resumed.err
    assert len({path.name.split('-')[1] for path in (tiny / 'wandb').glob('offline-run-*/run-*.wandb')}) == 1


@pytest.mark.parametrize('wanted, sent', [('none', None), ('best', ['best.pt']), ('all', ['best.pt', 'ckpt.pt'])])
def test_which_checkpoints_wandb_gets(hooked, tiny, wanted, sent):
    """Behind the last step, with all written; after a signal none, since who sends it waits for some seconds only."""
    fake = """
import types
from pathlib import Path
from kit.run import starts
from kit.watch import journal
class Artifact:
    def __init__(self, name, type):
        self.paths = []
    def add_file(self, path):
        self.paths.append(path)
class Fake(journal.WandB):
    def __init__(self, settings, name, run_id):
        self.wandb, self.settings, self.place = types.SimpleNamespace(Artifact=Artifact), settings, 'nowhere'
        self.run = types.SimpleNamespace(id='1', log_artifact=self.send, finish=lambda: print('W&B: the end'))
    def send(self, artifact):
        import torch
        for path in map(Path, artifact.paths):
            print('W&B gets', path.name, 'of step', torch.load(path, weights_only=True)['iter_num'])
    record = text = image = embedding = model = lambda *args: None
journal.WandB, starts.check_wandb = Fake, lambda project: None
"""
    words = '--wandb_log', f'--wandb_checkpoints={wanted}'
    result = hooked(fake, *words)
    got = re.findall('W&B gets (.*) of step 10', result.out)
    assert result.status == 0 and got == (sent or []) and 'W&B: the end' in result.out, result.out + result.err
    stop = ('import os, signal\nfrom kit.data import batches\nold_seed = batches.torch_seed\n'
            'def torch_seed(seed, step, rank):\n    step == 7 and os.kill(os.getpid(), signal.SIGTERM)\n'
            '    return old_seed(seed, step, rank)\nbatches.torch_seed = torch_seed\n')
    stopped = hooked(fake + stop, *words)
    assert stopped.status == 143 and 'W&B gets' not in stopped.out and 'W&B: the end' in stopped.out, stopped.err


@pytest.mark.parametrize('missing, named', [(True, 'pip install wandb'), (False, 'wandb login')])
def test_wandb_that_cannot_be_had(hooked, tiny, missing, named):
    if not missing:
        pytest.importorskip('wandb')
    code = ('import importlib.util as util\nold = util.find_spec\n'
            'util.find_spec = lambda name, *args: None if name == "wandb" else old(name, *args)')
    result = hooked(code if missing else '', '--wandb_log',
                    env={'HOME': str(tiny), 'NETRC': str(tiny / 'none'), 'WANDB_SILENT': 'true'})
    assert result.status == 2 and named in result.err and result.err.count('\n') == 1, result.err
    assert not (tiny / 'checkpoints').exists()


# ---------------------------------------------------------------------------------------------------------------------
# the hunt for NaN


def hunt(model):
    watch = nan_hunt.Watch(model)
    with watch:
        idx = torch.arange(64).view(4, 16) % 27
        model(idx, idx)[1].backward()
    watch.close()
    return watch.found


def test_a_healthy_step_has_nothing_to_find(model):
    assert hunt(model) == ''
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_every_module_is_named(model, value):
    """A bad number in what a module gives, one after the other; what comes behind it is bad too, and not named."""
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.LayerNorm | torch.nn.Embedding | torch.nn.GELU):
            continue
        hook = module.register_forward_hook(lambda module, args, out: out + float(value))
        found = hunt(model)
        hook.remove()
        assert found.startswith(f'the forward pass: what add in {name} gave holds ') and (
            'NaN' if value == 'nan' else 'Inf') in found


def test_every_gradient_is_named(model):
    for name, p in model.named_parameters():
        hook = p.register_hook(lambda gradient: gradient * math.nan)
        found = hunt(model)
        hook.remove()
        assert found.startswith(f'the backward pass: the gradient of parameter {name} holds '), found


def test_an_overflow_inside_the_attention(model):
    model.transformer.h[1].attn.c_attn.weight.data *= 1e25
    assert 'scaled_dot_product_attention in transformer.h.1.attn gave' in hunt(model)


def test_without_the_hunt_the_parameters_are_listed(hooked):
    plant = ('import model, torch\nfrom kit.data import batches\nold = model.GPT.__init__\n'
             'def init(self, config):\n    old(self, config)\n'
             '    for p in self.transformer.h[1].mlp.parameters():\n'
             '        p.register_hook(lambda g: g * float("inf") if '
             'torch.initial_seed() == batches.torch_seed(1337, 3, 0) else g)\n'
             'model.GPT.__init__ = init')
    result = hooked(plant, '--log_interval=5')
    line = next(line for line in result.out.splitlines() if line.startswith('WARNING: bad numbers'))
    assert re.search('The last of them: the gradient of transformer.h.1.mlp.c_fc.weight, '
                     r'transformer.h.1.mlp.c_proj.weight, of \d\d parameters$', line)


def test_debug_nan_lets_a_healthy_run_be(train, tiny):
    train('--out_dir=a')
    result = train('--out_dir=b', '--debug_nan')
    assert result.status == 0 and losses(result) == {r['step']: round(r['loss'], 4) for r in records(tiny / 'a')
                                                     if 'loss' in r}


def test_debug_nan_on_two_processes(pair, tiny):
    """The rank that made it says so."""
    plant = ('import model, torch, os\nfrom kit.data import batches\nold = model.MLP.forward\n'
             'def forward(self, x):\n'
             '    y = old(self, x)\n'
             '    return y * float("nan") if torch.initial_seed() == batches.torch_seed(1337, 3, 1) else y\n'
             'model.MLP.forward = forward')
    result = pair('--gradient_accumulation_steps=2', '--debug_nan', script=hooked_script(tiny, plant))
    assert result.status != 0
    lines = [line for line in result.out.splitlines() if line.startswith('debug_nan: step 3')]
    assert len(lines) == 2 and 'rank 0: made again, its forward and backward pass give no bad number' in lines[0]
    assert 'rank 1: micro-step 0: the forward pass: what mul in transformer.h.0.mlp gave' in lines[1]


# ---------------------------------------------------------------------------------------------------------------------
# the replay of one step


def replayed(result):
    """{figure: (here, logged, median)} of the table that --inspect_step prints; None where there is a dash."""
    rows = [line.split() for line in result.out.split(', replayed:')[1].splitlines()[2:]]
    return {row[0]: [None if cell == '-' else float(cell) for cell in row[1:]] for row in rows if len(row) == 4}


def test_a_step_is_replayed(train, run, tiny):
    """From the checkpoint before it, with dropout; its loss is the logged one, and nothing is written."""
    train('--dropout=0.2', '--max_iters=30', '--log_interval=7')
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob('*') if path.is_file()}
    result = run('train.py', '--inspect_step=18', '--device=cpu')
    assert result.status == 0 and result.err == ''
    assert 'checkpoint: checkpoints/step_0000015.pt' in result.out
    assert 'the loss is the logged one, bit for bit' in result.out, result.out
    logged = next(r for r in records(tiny / 'checkpoints') if r['step'] == 18 and 'loss' in r)
    table = replayed(result)
    for name in 'loss', 'grad_norm', 'lr':
        assert table[name][0] == table[name][1] == pytest.approx(logged[name], rel=1e-4)
    around = [r['loss'] for r in records(tiny / 'checkpoints') if 'loss' in r and r['step'] != 18]
    assert table['loss'][2] == pytest.approx(np.median(around), rel=1e-4)
    assert table['grad_norm/h.1'][0] > 0 and table['update_ratio/wte'][2] > 0
    after = {path: path.stat().st_mtime_ns for path in tiny.rglob('*') if path.is_file()}
    assert {path for path in after if before.get(path) != after[path]} <= {tiny / 'checkpoints/.lock'}


@pytest.mark.parametrize('step', [0, 3, 29])
def test_a_step_is_replayed_from_the_seed(train, run, tiny, step):
    """Where no checkpoint from before it is kept; also one with several micro-steps, and the last one of all."""
    train('--max_iters=30', '--keep_last=1', '--gradient_accumulation_steps=2')
    for path in (tiny / 'checkpoints').glob('best.pt'):
        path.unlink()
    result = run('train.py', f'--inspect_step={step}', '--init_from=resume', '--device=cpu')
    assert result.status == 0, result.err
    assert 'all is replayed, from the first' in result.out and 'bit for bit' in result.out, result.out
    assert 'the 8 rows of this step' in result.out


def test_a_replay_after_a_resume_with_other_settings(train, run, tiny):
    """The step is made with the settings that it was made with, which the checkpoint before it does not hold."""
    train('--max_iters=20')
    train('--init_from=resume', '--max_iters=30', '--learning_rate=1e-2', '--batch_size=6')
    result = run('train.py', '--inspect_step=22', '--device=cpu')
    assert 'bit for bit' in result.out and 'the 6 rows of this step' in result.out, result.out


def test_a_replay_after_a_rewind(hooked, run, tiny):
    """Three bad steps in a row sent the run back to step 5, with other text; the replay reads that text too."""
    spoil = ('import model, torch\nfrom kit.data import batches\nold = model.GPT.forward\nn = [0]\n'
             'bad = {batches.torch_seed(1337, step, 0) for step in (6, 7, 8, 9)}\n'
             'def forward(self, *args, **kwargs):\n'
             '    logits, loss = old(self, *args, **kwargs)\n'
             '    if self.training and torch.initial_seed() in bad and n[0] < 2:\n'
             '        n[0] += 1; loss = loss * float("nan")\n'
             '    return logits, loss\n'
             'model.GPT.forward = forward')
    result = hooked(spoil, '--max_bad_steps=2', '--max_iters=14')
    assert 'back to checkpoints/ckpt.pt, after 5 steps, with other text' in result.out, result.out
    result = run('train.py', '--inspect_step=9', '--device=cpu')
    assert result.status == 0 and 'bit for bit' in result.out, result.out + result.err


@pytest.mark.parametrize('begin', [['--init_from=auto'], ['--init_from=old/best.pt', '--weights=raw']])
def test_a_replay_from_where_the_run_began(train, run, tiny, begin):
    train('--out_dir=old', '--ema_decay=0.9')
    train(*begin, '--save_interval=0', '--out_dir=new')
    result = run('train.py', '--inspect_step=3', '--out_dir=new', '--device=cpu')
    assert 'all is replayed, from the first' in result.out and 'bit for bit' in result.out, result.out + result.err


def test_a_replay_past_a_damaged_checkpoint(train, run, tiny):
    train('--max_iters=20')
    with open(tiny / 'checkpoints/step_0000010.pt', 'r+b') as file:
        file.seek(5000)
        file.write(b'damaged')
    result = run('train.py', '--inspect_step=12', '--device=cpu')
    assert 'WARNING: checkpoints/step_0000010.pt' in result.out and 'step_0000005.pt, after 5' in result.out
    assert 'bit for bit' in result.out


@pytest.mark.parametrize('name, deterministic, off, expected', [
    ('cuda', False, 0.0, 'the loss is the logged one, bit for bit: this is what happened'),
    ('cuda', False, 1e-4, r'the loss is the logged one to rounding, it differs by 0\.0003: .* without --deterministic'),
    ('cuda', False, 1e-2, 'WARNING: the loss is .*differs by 0.03: .* its first step here was 1e-06 off'),
    ('cuda', False, math.inf, 'WARNING: the loss is not the logged one, it differs by inf'),
    ('cuda', True, 1e-6, 'WARNING: the loss is not the logged one, it differs by 3e-06: .* where the run began$'),
    ('cpu', False, 1e-6, 'WARNING: the loss is not the logged one, it differs by 3e-06'),
])
def test_how_near_a_replay_comes(model, monkeypatch, capsys, name, deterministic, off, expected):
    """Where the order of sums differs from time to time it is near, elsewhere equal. Nothing runs on that device."""
    past = History()
    for step in 3, 4:
        past.add(step, {'loss': 3.0, 'grad_norm': 1.0, 'lr': 1e-3})
    monkeypatch.setattr(replay, 'show_rows', lambda *args: None)

    def update(step, lr):
        backward(model)
        loss = torch.tensor(3.0 * (1 + off) if step == 4 else 3.0 + 1e-6, dtype=torch.float64)
        return {'loss': loss, 'grad_norm': 1.0, 'lr': lr}, gradients.norms([*model.parameters()])
    rows = types.SimpleNamespace(of_step=lambda *args: (None, None, 0))
    settings = {'inspect_step': 4, 'batch_size': 4, 'gradient_accumulation_steps': 1, 'seed': 0, 'sampling': 'random',
                'deterministic': deterministic}
    replay.run(update, lambda step: 1e-3, settings, types.SimpleNamespace(step=3, rewinds=0), past, model, rows, {},
               torch.device(name), 'float32')
    assert re.match(expected, capsys.readouterr().out.splitlines()[-1])


def test_garbage_in_the_text_is_found(run, tmp_path):
    """A document of noise in the training text: the step that met it spikes, and its row is the costliest."""
    text = some_text(60_000)
    noise = ''.join(np.random.default_rng(0).choice(list('QXZ0123456789#%&'), 80))
    (tmp_path / 'text.txt').write_text(text[:20_000] + noise + text[20_000:])
    (tmp_path / 'data').mkdir()
    run('prepare.py', '--input=text.txt', '--dataset=spoilt', cwd=tmp_path)
    args = ['--dataset=spoilt', *TINY, '--block_size=32', '--batch_size=8', '--max_iters=1200', '--eval_interval=0',
            '--log_interval=20', '--save_interval=50', '--keep_last=0', '--learning_rate=3e-3', *GPT2,
            '--sampling=random']
    result = run('train.py', *args)
    named = re.findall(r'WARNING: loss spike at step \d+: the loss of step (\d+) .*--inspect_step=(\d+)', result.out)
    assert named and named[0][0] == named[0][1], result.out[-3000:]
    history = runlogs.read(tmp_path / 'checkpoints')
    steps, values = history.get('loss')
    late = steps > 200
    assert int(named[-1][0]) in steps[late][values[late].argsort()[-len(named) - 5:]]
    for step in {named[0][0], named[-1][0]}:
        result = run('train.py', f'--inspect_step={step}', '--device=cpu')
        assert 'bit for bit' in result.out
        first = next(line for line in result.out.splitlines() if line.startswith('  1. loss '))
        row = first.split(' of train: ')[1].replace('[[', '').replace(']]', '')
        assert any(row[i:i + 8] in noise for i in range(len(row) - 7)), first


@pytest.mark.parametrize('args, named', [
    (['--inspect_step=99'], ['inspect_step = 99', 'steps 0 to 9']),
    (['--inspect_step=3', '--out_dir=nowhere'], ['nowhere', 'no run']),
    (['--inspect_step=-3'], ['inspect_step = -3']),
    (['--inspect_step=3', '--test'], ['each replaces the training']),
    (['--inspect_step=3', '--n_embd=64'], ['n_embd', '32']),
])
def test_steps_that_cannot_be_replayed(train, run, tiny, args, named):
    train()
    result = run('train.py', *args, '--device=cpu')
    assert result.status == 2 and result.err.count('\n') == 1 and all(word in result.err for word in named), result.err
    assert not (tiny / 'nowhere').exists()


def test_scripts_do_not_wait_for_matplotlib(tmp_path):
    code = (f'import sys; sys.path[0] = {str(ROOT)!r}\nfrom kit.run import ending, first_look, starts\n'
            'from kit.watch import diagnosis, inside, journal\n'
            'print([name for name in sys.modules if name.split(".")[0] in ("matplotlib", "tensorboard", "wandb")])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == '[]\n', done.stderr
