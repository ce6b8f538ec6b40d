"""Muon: its arithmetic beside torch's and beside a loop, bad steps, a resume, what a user may write."""

import math

import pytest
import torch
from conftest import losses, records
from test_bad_numbers import spoil, state
from test_optimizers import WATCH, same

from kit.learn import optimizers
from kit.learn.optimizers import Muon, orthogonal
from model import GPT, GPTConfig

SHAPES = [(24, 8), (8, 8), (32, 8), (8, 32)] * 2


def weights(seed=0, shapes=SHAPES):
    rng = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(0.1 * torch.randn(shape, generator=rng)) for shape in shapes]


def muon(matrices, others=(), rate=0.02, weight_decay=0.1, dtype=torch.float32):
    """Its learning rate is 1e-3, so that of its matrices is rate."""
    others = others or weights(1, [(5, 3), (3,)])
    optimizer = Muon(matrices, others, 1e-3, rate / 1e-3, weight_decay, (0.9, 0.95), dtype)
    for group in optimizer.param_groups:
        group['lr'] = 1e-3 * group.get('lr_factor', 1.0)
    return optimizer


def give_gradients(seed, *parameters):
    """The same ones to each list of parameters."""
    for several in zip(*parameters, strict=True):
        seed += 1
        gradient = torch.randn(several[0].shape, generator=torch.Generator().manual_seed(seed))
        for p in several:
            p.grad = gradient.clone()


def test_matrices_move_as_in_torchs_muon_and_all_else_as_in_adamw(monkeypatch):
    """Which has no warmup of the momentum, other iterations, and makes their products in bfloat16 in any case."""
    monkeypatch.setattr(optimizers, 'FIRST_MOMENTUM', optimizers.MOMENTUM)
    monkeypatch.setattr(optimizers, 'NEWTON_SCHULZ', 5 * [(3.4445, -4.7750, 2.0315)])
    mine, theirs = weights(), weights()
    others, others_alone = (weights(1, [(5, 3), (3,), ()]) for _ in range(2))
    ours = muon(mine, others, dtype=torch.bfloat16)
    torchs = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=optimizers.MOMENTUM)
    adamw = torch.optim.AdamW([{'params': others_alone[:1], 'weight_decay': 0.1},
                               {'params': others_alone[1:], 'weight_decay': 0.0}], lr=1e-3, betas=(0.9, 0.95),
                              fused=True)
    for step in range(20):
        give_gradients(100 * step, mine, theirs)
        give_gradients(100 * step + 50, others, others_alone)
        for optimizer in ours, torchs, adamw:
            optimizer.step()
    for a, b, start in zip(mine, theirs, weights()):
        assert (a - b).norm() < 0.01 * (b - start).norm()  # rounding in bfloat16, in another order
    assert all(map(torch.equal, others, others_alone))


def test_the_products_may_be_made_in_float32():
    """By a loop over the matrices, with the warmup of the momentum, as its paper has it."""
    mine, plain = weights(), [w.detach().clone() for w in weights()]
    means = [torch.zeros_like(w) for w in plain]
    optimizer = muon(mine)
    for step in range(5):
        give_gradients(100 * step, mine)
        optimizer.step()
        momentum = 0.85 + 0.10 * step / 300
        for w, mean, p in zip(plain, means, mine):
            mean.mul_(momentum).add_(p.grad, alpha=1 - momentum)
            x = (1 - momentum) * p.grad + momentum * mean
            x = x / x.norm()
            for a, b, c in optimizers.NEWTON_SCHULZ:
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
            w.mul_(1 - 0.02 * 0.1).sub_(0.02 * max(1, w.size(0) / w.size(1)) ** 0.5 * x)
    for a, b in zip(mine, plain):
        torch.testing.assert_close(a.detach(), b, rtol=1e-4, atol=1e-5)


def test_the_momentum_is_warm_at_last(monkeypatch):
    monkeypatch.setattr(optimizers, 'WARMUP', 3)
    matrices = weights(shapes=[(4, 4)])
    optimizer, mean = muon(matrices), torch.zeros(4, 4)
    for step in range(6):
        give_gradients(step, matrices)
        optimizer.step()
        momentum = min(0.85 + 0.10 * step / 3, 0.95)
        mean = momentum * mean + (1 - momentum) * matrices[0].grad
    torch.testing.assert_close(optimizer.state[matrices[0]]['momentum_buffer'], mean)


@pytest.mark.parametrize('shape', [(1, 1), (6, 6), (3, 50), (64, 64)])
def test_singular_values_come_near_to_one(shape):
    x = orthogonal(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(x)
    assert x.shape == (2, *shape) and values.max() < 1.6
    assert (values > 0.4).float().mean() > 0.9  # a square matrix has a few that are as good as 0
    assert torch.equal(orthogonal(torch.zeros(2, *shape)), torch.zeros(2, *shape))


def test_nothing_moves_in_a_bad_step():
    """Where the verdict is on the device; and the next step is as if it had not been."""
    (mine, others), (alone, others_alone) = ((weights(), weights(1, [(5, 3), (3,)])) for _ in range(2))
    optimizer, without = muon(mine, others), muon(alone, others_alone)
    for step in range(4):
        give_gradients(10 * step, [*mine, *others], [*alone, *others_alone])
        if step == 2:
            mine[1].grad[0, 0], others[0].grad[0] = math.nan, math.inf
        optimizers.step(optimizer, torch.tensor(step != 2))
        if step != 2:
            optimizers.step(without, torch.tensor(True))
    assert all(map(torch.equal, [*mine, *others], [*alone, *others_alone]))
    assert same(optimizer.state_dict(), without.state_dict())


def test_gradients_are_divided_by_the_scale_that_clips_them():
    mine, scaled = weights(), weights()
    optimizer, divided = muon(mine), muon(scaled)
    for step in range(3):
        give_gradients(10 * step, mine, scaled)
        for p in mine:
            p.grad /= 8
        divided.grad_scale = torch.tensor(8.0)
        for one in optimizer, divided:
            give_gradients(10 * step + 100, one.param_groups[1]['params'])
            one.step()
    assert all(map(torch.equal, mine, scaled))


def test_what_has_no_gradient_stays():
    matrices = weights()
    give_gradients(0, matrices[1:])
    muon(matrices).step()
    assert [torch.equal(a, b) for a, b in zip(matrices, weights())] == [True] + [False] * 7


def test_which_parameters_are_its_own():
    """The matrices in the blocks; no embedding, no output layer, no gains."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11))
    optimizer = optimizers.make('muon:0.01', model, 0.1, 1e-3, (0.9, 0.95), 'float32')
    own, decay, rest = ([p.shape for p in group['params']] for group in optimizer.param_groups)
    assert own == [(48, 16), (16, 16), (64, 16), (16, 64)] * 2
    assert decay == [(11, 16), (8, 16)] and {len(shape) for shape in rest} == {1}
    assert [group.get('lr_factor') for group in optimizer.param_groups] == [pytest.approx(10), None, None]
    assert [group['weight_decay'] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


# ---------------------------------------------------------------------------------------------------------------------
# runs


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_bad_steps_are_skipped_and_a_resume_is_exact(hooked, tiny, dtype):
    code = spoil([1, 3, 7]) + WATCH  # in the very first one moments are made, of zeros
    options = '--optimizer=muon:0.03', '--learning_rate=1e-3', f'--dtype={dtype}', '--ema_decay=0.9'
    whole = hooked(code, *options, '--out_dir=whole')
    assert whole.status == 0 and 'the host waits' not in whole.out, whole.err
    assert whole.out.count('in the bad step nothing moved: True') == 3 == whole.out.count('WARNING: bad numbers')
    (tiny / 'cut').mkdir()
    (tiny / 'whole/step_0000005.pt').rename(tiny / 'cut/ckpt.pt')
    rest = hooked(code, '--init_from=resume', '--out_dir=cut')
    assert rest.status == 0 and 'From the checkpoint: optimizer = muon:0.03' in rest.out, rest.err
    assert str([*losses(whole).items()][5:]) == str([*losses(rest).items()])
    a, b = state(tiny / 'whole'), state(tiny / 'cut')
    assert all(same(a[key], b[key]) for key in ('model', 'optimizer', 'ema'))
    assert a['optimizer']['param_groups'][0]['lr_factor'] == pytest.approx(30)


def test_two_processes_are_one(pair, train, tiny):
    """The same rows, the same losses to rounding; the norms are those of all gradients."""
    options = '--gradient_accumulation_steps=2', '--optimizer=muon', '--dtype=float32'
    two = pair(*options, '--out_dir=two')
    one = train(*options, '--out_dir=one')
    assert two.status == one.status == 0, two.err + one.err
    for step, loss in losses(one).items():
        assert losses(two)[step] == pytest.approx(loss, abs=2e-4)
    norms_of_one, norms_of_two = ([r['grad_norm'] for r in records(tiny / name) if 'grad_norm' in r]
                                  for name in ('one', 'two'))
    assert norms_of_two == pytest.approx(norms_of_one, rel=1e-3) and len(norms_of_one) == 10


def test_a_rate_of_its_own_that_follows_the_schedule(train, tiny):
    options = '--optimizer=muon:0.05', '--learning_rate=1e-3', '--min_lr=1e-4', '--eval_interval=0'
    assert train(*options).status == 0
    saved = state(tiny / 'checkpoints')
    last = [r['lr'] for r in records(tiny / 'checkpoints') if 'lr' in r][-1]
    own, decay, _ = saved['optimizer']['param_groups']
    assert decay['lr'] == pytest.approx(last) and own['lr'] == pytest.approx(50 * last)


def test_another_optimizer_at_a_resume(train, trained):
    """Another rate is no matter; AdamW has other moments."""
    other = train('--init_from=resume', '--optimizer=muon:0.001', '--max_iters=12')
    assert other.status == 0, other.err
    assert state(trained)['optimizer']['param_groups'][0]['lr_factor'] < 1
    adamw = train('--init_from=resume', '--optimizer=adamw', '--max_iters=12')
    assert adamw.status == 2 and adamw.err.count('\n') == 1 and '--init_from=FILE.pt' in adamw.err


@pytest.mark.parametrize('text, words', [
    ('moun:0.02', 'there is no such optimizer; did you mean muon?'), ('', 'there are adamw and muon'),
    ('muon:', 'is no rate'), ('muon:0', 'is no rate'), ('muon:-1', 'is no rate'), ('muon:nan', 'is no rate'),
    ('muon:inf', 'is no rate'), ('muon:fast', "'fast' is no rate, which is above 0"), ('muon:0.02:3', 'no rate'),
    ('adamw:0.01', 'the rate of adamw is learning_rate'), ('muon:1e39', "'1e39' is no rate")])
def test_what_is_no_optimizer(train, tiny, text, words):
    result = train(f'--optimizer={text}')
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    assert f"optimizer = '{text}'" in result.err and words in result.err
    assert not (tiny / 'checkpoints').exists()


def test_rates_that_are_too_far_apart(train, tiny):
    result = train('--learning_rate=1e-311', '--min_lr=0')
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    assert 'its rate is too far above learning_rate = 1e-311' in result.err and not (tiny / 'checkpoints').exists()


@pytest.mark.parametrize('text', ['MUON: 1E-1 ', 'muon:+0.1', 'muon:.1'])
def test_a_rate_in_other_words_is_the_same(train, tiny, text):
    """Also to what reads it later, such as the diagnosis."""
    assert train(f'--optimizer={text}', '--max_iters=1').status == 0
    assert state(tiny / 'checkpoints')['config']['optimizer'] == 'muon:0.1'
    assert train('--init_from=resume', '--optimizer=muon:0.1', '--max_iters=2').status == 0


def test_a_model_without_matrices_in_its_blocks(capsys):
    model = torch.nn.Embedding(3, 4)
    model.hidden_matrices = lambda: []
    with pytest.raises(SystemExit) as end:
        optimizers.make('muon', model, 0.1, 1e-3, (0.9, 0.95), 'float32')
    assert end.value.code == 2
    assert 'no matrices in its blocks for Muon; --optimizer=adamw' in capsys.readouterr().err
