"""A number that is not finite gets into nothing: not the weights, the moments, the average, on any rank."""

import math

import pytest
import torch
from conftest import hooked_script, losses, records

from kit.data import batches

# the loss, or one gradient, of some steps is spoilt; which step it is, the seed of the step tells
SPOIL = '''
import os, torch, model
from kit.data import batches
NOW, SOUND_SEED, SOUND_FORWARD = [0], batches.torch_seed, model.GPT.forward
def torch_seed(seed, step, rank):
    NOW[0] = step if len(NOW) == 1 else -1
    return SOUND_SEED(seed, step, rank)
def forward(self, *args, **kwargs):
    logits, loss = SOUND_FORWARD(self, *args, **kwargs)
    if self.training and NOW[0] in {steps} and os.environ.get('RANK', '{rank}') == '{rank}':
        if '{what}' == 'gradient':
            loss.register_hook(lambda gradient: gradient * {value})
        else:
            loss = loss * {value}
    return logits, loss
batches.torch_seed, model.GPT.forward = torch_seed, forward
'''
# the same steps, whole, but for an optimizer and an average that are not called
LEAVE_OUT = '''
from kit.data import batches
from kit.learn import optimizers
from kit.learn.averages import Average
NOW, SOUND_SEED, SOUND_STEP, SOUND_UPDATE = [0], batches.torch_seed, optimizers.step, Average.update
def torch_seed(seed, step, rank):
    NOW[0] = step
    return SOUND_SEED(seed, step, rank)
batches.torch_seed = torch_seed
optimizers.step = lambda *args: SOUND_STEP(*args) if NOW[0] not in {steps} else None
Average.update = lambda *args: SOUND_UPDATE(*args) if NOW[0] not in {steps} else None
'''


# nothing is bad any more once the run has gone back
NO_MORE = '''
from kit.state import checkpoints
SOUND_BEFORE = checkpoints.before
def before(*args):
    NOW.clear(), NOW.append(-1), NOW.append('no more')
    return SOUND_BEFORE(*args)
checkpoints.before = before
'''


def spoil(steps, what='loss', value='float("nan")', rank='0'):
    return SPOIL.format(steps=set(steps), what=what, value=value, rank=rank)


def state(folder, name='ckpt.pt'):
    return torch.load(folder / name, weights_only=True)


def equal(a, b):
    for key in ('model', 'ema', 'swa'):
        assert (key in a) == (key in b)
        assert all(torch.equal(value, b[key][name]) for name, value in a.get(key, {}).items()), key
    assert all(torch.equal(value, b['optimizer']['state'][i][name])
               for i, moments in a['optimizer']['state'].items() for name, value in moments.items())
    assert a.get('n_averaged') == b.get('n_averaged')
    return True


@pytest.mark.parametrize('what', ['loss', 'gradient'])
@pytest.mark.parametrize('value', ['float("nan")', 'float("inf")', '-float("inf")'])
@pytest.mark.parametrize('average', ['--ema_decay=0.9', '--swa_start=2'])
def test_a_bad_step_is_skipped_whole(hooked, tiny, what, value, average):
    """Bit for bit what a run has that never called its optimizer at these steps."""
    spoilt = hooked(spoil([3, 6, 7], what, value), average)
    assert spoilt.status == 0, spoilt.err
    left_out = hooked(LEAVE_OUT.format(steps={3, 6, 7}), average, '--out_dir=left_out')
    assert left_out.status == 0, left_out.err
    assert equal(state(tiny / 'checkpoints'), state(tiny / 'left_out'))
    assert all(value.isfinite().all() for value in state(tiny / 'checkpoints')['model'].values())
    assert state(tiny / 'checkpoints')['optimizer']['state'][0]['step'] == 7
    assert [r['step'] for r in records(tiny / 'checkpoints') if r.get('bad_steps')] == [3, 6, 7]
    assert spoilt.out.count('WARNING: bad numbers') == 3


def test_zeroed_gradients_would_not_be_a_skip(hooked, tiny):
    """The test above can fail: with gradients of zero moments and weights move."""
    zeroed = hooked(spoil([3], 'gradient', '0.0'))
    left_out = hooked(LEAVE_OUT.format(steps={3}), '--out_dir=left_out')
    assert zeroed.status == left_out.status == 0
    assert not torch.equal(state(tiny / 'checkpoints')['model']['lm_head.weight'],
                           state(tiny / 'left_out')['model']['lm_head.weight'])


def test_bad_steps_between_the_lines_are_told(hooked):
    result = hooked(spoil([2, 3, 7]), '--log_interval=5')
    assert list(losses(result)) == [0, 5, 9] and not any(math.isnan(loss) for loss in losses(result).values())
    assert '2 of the steps up to 5 was not finite' in result.out and '1 of the steps up to 9' in result.out


def test_a_bad_number_stays_out_of_the_buffers(hooked, tiny):
    """Of a model that changes them in its forward pass, the seventh here: three looks go before the first step."""
    code = '''
import model, torch
old_init, old_forward, calls = model.GPT.__init__, model.GPT.forward, [0]
def init(self, config):
    old_init(self, config)
    self.register_buffer('mean', torch.zeros(()))
    self.register_buffer('count', torch.zeros((), dtype=torch.int64))
def forward(self, *args, loss_alone=False):
    logits, loss = old_forward(self, *args)
    if self.training:
        calls[0] += 1
        factor = float('nan') if calls[0] == 7 else 1.0
        self.mean.lerp_(logits.detach().abs().mean() * factor, 0.1)
        self.count += 1
        loss = loss * factor
    return logits, loss
model.GPT.__init__, model.GPT.forward = init, forward
'''
    result = hooked(code, '--ema_decay=0.9')
    assert result.status == 0 and '1 of the steps up to 3 was not finite' in result.out, result.out + result.err
    saved = state(tiny / 'checkpoints')
    assert saved['model']['mean'].isfinite() and saved['model']['count'] == 9 == saved['ema']['count']


@pytest.mark.parametrize('what, value', [('loss', 'float("inf")'), ('gradient', 'float("nan")')])
def test_a_bad_number_of_one_rank_is_skipped_on_all(pair, tiny, what, value):
    args = '--gradient_accumulation_steps=2', '--max_iters=5', '--ema_decay=0.9'
    script = hooked_script(tiny, spoil([3], what, value, rank='1'))
    result = pair(*args, script=script)
    assert result.status == 0 and '1 of the steps up to 3 was not finite' in result.out, result.out + result.err
    script = hooked_script(tiny, LEAVE_OUT.format(steps={3}))
    assert pair(*args, '--out_dir=left_out', script=script).status == 0
    assert equal(state(tiny / 'checkpoints'), state(tiny / 'left_out'))


def test_float16_skips_are_not_bad_steps(hooked, tiny):
    """A gradient that overflows lowers the scale; only one that does so at a scale of 1 is bad. A loss of NaN is."""
    result = hooked(spoil([2, 3], 'gradient', 'float("inf")'), '--dtype=float16', '--max_iters=5')
    assert result.status == 0 and 'bad numbers' not in result.out, result.err
    saved = state(tiny / 'checkpoints')
    assert saved['scaler']['scale'] == 65536 / 4 and saved['optimizer']['state'][0]['step'] == 3
    result = hooked(spoil([2, 3], 'loss'), '--dtype=float16', '--max_iters=5')
    assert result.out.count('WARNING: bad numbers') == 2


def test_float16_at_a_scale_of_one(hooked):
    code = spoil(range(25), 'gradient', 'float("nan")')
    result = hooked(code, '--dtype=float16', '--max_iters=25', '--max_bad_steps=0')
    told = [int(line.split('up to ')[1].split()[0]) for line in result.out.splitlines() if 'bad numbers' in line]
    assert told == list(range(16, 25))  # 65536 is halved 16 times


def test_float16_keeps_its_scale_while_the_loss_is_bad(hooked, tiny):
    """Else a streak of NaNs would leave a scale at which every gradient vanishes."""
    result = hooked(spoil(range(2, 8)), '--dtype=float16', '--max_bad_steps=0')
    assert result.status == 0 and state(tiny / 'checkpoints')['scaler']['scale'] == 65536, result.err


def test_a_rate_that_makes_infinite_weights(hooked, tiny):
    """The gradients are finite, the update is not: such weights are never saved."""
    result = hooked('', '--learning_rate=1e39', '--min_lr=0', '--warmup_iters=0', '--max_bad_steps=3')
    assert result.status == 1 and 'not finite' in result.out and not list((tiny / 'checkpoints').glob('*.pt'))


# ---------------------------------------------------------------------------------------------------------------------
# back once, then the end


def test_back_to_before_the_trouble_with_other_text(hooked, tiny):
    """Steps 6 and on are bad until the run has gone back; ckpt.pt and step_0000010.pt are from amidst them."""
    code = spoil(range(6, 99)) + NO_MORE
    result = hooked(code, '--max_bad_steps=4', '--max_iters=16', '--sampling=random')
    assert result.status == 0, result.out + result.err
    # looked at every 4 steps: at 12 six were bad
    assert 'WARNING: every step since 6 was bad: back to checkpoints/step_0000005.pt, after 5 steps' in result.out
    steps = [int(line.split()[1][:-1]) for line in result.out.splitlines() if line.startswith('iter ')]
    assert steps == [*range(12), *range(5, 16)]
    saved = state(tiny / 'checkpoints')
    assert saved['rewinds'] == 1 and saved['iter_num'] == 16 and saved['bad_steps'] == [0, 0]
    other, = {tuple(batches.window_starts(18_000, 16, 4, 1337, 5, 'random', rewinds=1))}
    assert other != tuple(batches.window_starts(18_000, 16, 4, 1337, 5, 'random'))
    sound = losses(hooked('', '--max_iters=16', '--out_dir=sound', '--sampling=random'))
    assert losses(result)[4] == sound[4] and losses(result)[5] != sound[5]


def test_what_steers_the_run_goes_back_too(hooked, tiny):
    """The val losses and norms of the steps that are made again count once."""
    code = spoil(range(8, 99)) + NO_MORE
    result = hooked(code, '--max_bad_steps=4', '--max_iters=16')
    assert result.status == 0 and 'back to checkpoints/step_0000005.pt' in result.out, result.out + result.err
    saved = state(tiny / 'checkpoints')
    assert len(saved['val_losses']) == len([0, 5, 10, 15]) and saved['iter_num'] == 16
    assert sum(map(math.isfinite, saved['recent_norms'])) == 16


def test_it_stops_the_second_time(hooked, tiny):
    result = hooked(spoil(range(6, 99)), '--max_bad_steps=4', '--max_iters=40')
    assert result.status == 1 and 'Traceback' not in result.err
    assert result.out.count('was bad: back to') == 1
    last = result.out.splitlines()[-1]
    assert last.startswith('stopped at step 12') and 'the second time' in last and 'learning_rate (it is 0.003)' in last
    saved = state(tiny / 'checkpoints')
    assert all(value.isfinite().all() for value in saved['model'].values())
    # what was learnt before is there, and a lower rate goes on from it
    again = hooked('', '--init_from=resume', '--learning_rate=1e-3', '--max_iters=40')
    assert again.status == 0 and not any(math.isnan(loss) for loss in losses(again).values()), again.err


def test_where_there_is_nothing_to_go_back_to_the_text_changes(hooked, tiny):
    """From the first step on; the second time it stops all the same."""
    result = hooked(spoil(range(99)), '--max_bad_steps=4', '--max_iters=40')
    assert result.status == 1 and 'since 0 was bad, no checkpoint is from before: other text' in result.out
    assert result.out.splitlines()[-1].startswith('stopped at step 8')
    sound = hooked('', '--out_dir=sound')
    passing = hooked(spoil(range(4)), '--max_bad_steps=4')
    assert passing.status == 0 and losses(passing)[4] != losses(sound)[4], passing.err
    assert state(tiny / 'checkpoints')['rewinds'] == 1
    never = hooked(spoil(range(99)), '--max_bad_steps=0')
    assert never.status == 0 and list(losses(never)) == list(range(10))


def test_a_rewound_run_is_resumed_exactly(hooked, tiny):
    """Stopped by a signal after it went back; the count of rewinds comes with the checkpoint."""
    bad = 'SEEN = []\n' + spoil(range(6, 9)).replace('NOW[0] in {', 'not SEEN and NOW[0] in {')
    bad += ('\nfrom kit.state import checkpoints\nSOUND_BEFORE = checkpoints.before\n'
            'def before(*args):\n    SEEN.append(1)\n    return SOUND_BEFORE(*args)\ncheckpoints.before = before\n')
    args = '--max_bad_steps=3', '--max_iters=14', '--dropout=0.1'
    whole = hooked(bad, *args, '--out_dir=whole')
    assert whole.status == 0 and 'back to whole/ckpt.pt, after 5 steps' in whole.out, whole.out + whole.err
    stop = ('\nimport os, signal as signals_of_python\nSOUND_SEED_2 = batches.torch_seed\n'
            'def torch_seed_2(seed, step, rank):\n'
            '    if SEEN and step == 10: os.kill(os.getpid(), signals_of_python.SIGTERM)\n'
            '    return SOUND_SEED_2(seed, step, rank)\nbatches.torch_seed = torch_seed_2\n')
    assert hooked(bad + stop, *args, '--out_dir=cut').status == 143
    rest = hooked('', *args, '--init_from=resume', '--out_dir=cut')
    assert list(losses(rest)) == [11, 12, 13] and losses(rest).items() <= losses(whole).items()
    assert equal(state(tiny / 'whole'), state(tiny / 'cut')) and state(tiny / 'cut')['rewinds'] == 1


@pytest.mark.parametrize('sampling', ['random', 'shuffle', 'sequential'])
def test_rewinds_bring_other_text(sampling):
    starts = [batches.window_starts(10_000, 16, 8, 7, 3, sampling, rewinds).tolist() for rewinds in (0, 1)]
    assert starts[0] != starts[1] and all(0 <= start <= 10_000 - 17 for start in starts[1])


# ---------------------------------------------------------------------------------------------------------------------
# spikes


def test_a_spike_is_named(hooked):
    result = hooked(spoil([25], 'loss', '3.0'), '--max_iters=28')
    assert result.status == 0 and result.out.count('loss spike') == 2, result.out  # when it happens, and at the end
    assert 'WARNING: loss spike at step 25: the loss of step 25 is ' in result.out
    assert 'spike' not in hooked('', '--max_iters=60').out
