"""Any optimizer: a bad step is skipped whole, a resume is exact, and a state that does not fit is one line."""

import copy
import math
import re

import pytest
import torch
from conftest import hooked_script, losses, records
from test_bad_numbers import NO_MORE, spoil, state

from kit.learn import optimizer_state, optimizers

# what a researcher may write in the place of AdamW; p: the parameters
MAKE = '''
import torch
from kit.learn import optimizers
def make(text, model, weight_decay, lr, betas, dtype):
    p = [p for p in model.parameters() if p.requires_grad]
    return {line}
optimizers.make = make
'''
NADAM = MAKE.format(line='torch.optim.NAdam(p, lr=lr, betas=betas, weight_decay=weight_decay)')
FUSED_SGD = MAKE.format(line='torch.optim.SGD(p, lr=lr, momentum=0.9, fused=True)')
SGD = MAKE.format(line='torch.optim.SGD(p, lr=lr)')  # with no state at all
ODD_CLASS = '''
import torch
class Odd(torch.optim.Optimizer):
    """Counts in its groups and in integers, sums in doubles, a list, words, a history that grows, a late moment."""
    def __init__(self, params, lr=0.1, decay=0.0):
        super().__init__(params, {'lr': lr, 'decay': decay, 'k': 0})
    @torch.no_grad()
    def step(self, closure=None):
        self.state['all'] = {'n': self.state.get('all', {}).get('n', 0) + 1}
        for group in self.param_groups:
            group['k'] += 1
            for p in group['params']:
                if p.grad is None:
                    continue
                mine = self.state[p]
                if not mine:
                    mine.update(count=torch.zeros_like(p, dtype=torch.int64), words='abc', n=0,
                                sum=torch.zeros_like(p, dtype=torch.float64), history=p.new_zeros(0),
                                pair=[torch.zeros_like(p), torch.zeros(3, dtype=torch.int64)])
                mine['n'] += 1
                mine['count'] += p.grad > 0
                mine['sum'] += p.grad.double() / 3
                mine['pair'][0].lerp_(p.grad, 0.1)
                mine['history'] = torch.cat([mine['history'], p.grad.flatten()[:1]])
                if mine['n'] == 4:
                    mine['late'] = p.clone()
                move = mine['sum'] / (group['k'] + mine['count']) + mine['pair'][0] + mine.get('late', 0) * 0.01
                p.sub_(group['lr'] * move.float())
'''
ODD = ODD_CLASS + MAKE.format(line='Odd(p, lr)')
# Muon takes matrices alone; a state_dict of its own
BOTH = '''
import torch
from kit.learn import optimizer_state, optimizers
class Both(torch.optim.Optimizer):
    def __init__(self, params, lr):
        flat = [p for p in params if p.dim() < 2]
        self.parts = [torch.optim.Muon([p for p in params if p.dim() == 2], lr), torch.optim.NAdam(flat, lr)]
        super().__init__(params, {'lr': lr})
    def step(self):
        for part in self.parts:
            for group in part.param_groups:
                group['lr'] = self.param_groups[0]['lr']
            part.step()
    def state_dict(self):
        return {'parts': [part.state_dict() for part in self.parts]}
    def load_state_dict(self, state):
        for part, saved in zip(self.parts, state['parts']):
            optimizer_state.restore(part, saved)
''' + MAKE.format(line='Both(p, lr)')

# says whether anything moved in a bad step
WATCH = '''
import copy, torch
from kit.learn import optimizers
SOUND_STEP = optimizers.step
def all_of(optimizer):
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group['params']]
    return str(torch.utils._pytree.tree_map(lambda x: x.tolist() if isinstance(x, torch.Tensor) else x,
                                            [weights, optimizer.state_dict()]))
def step(optimizer, is_good):
    before = None if is_good else all_of(optimizer)
    SOUND_STEP(optimizer, is_good)
    if before:
        print('in the bad step nothing moved:', all_of(optimizer) == before)
optimizers.step = step
'''


def same(a, b):
    """Bit for bit, and of one dtype."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# ---------------------------------------------------------------------------------------------------------------------
# runs


@pytest.mark.parametrize('make', [NADAM, FUSED_SGD, SGD, ODD, BOTH], ids=['NAdam', 'fused SGD', 'SGD', 'odd', 'Muon'])
def test_bad_steps_are_skipped_and_a_resume_is_exact(hooked, tiny, make):
    """The first step is bad, and one before and one after the checkpoint that the run is resumed from."""
    code = make + spoil([0, 3, 7]) + WATCH
    whole = hooked(code, '--out_dir=whole')
    assert whole.status == 0, whole.err
    assert whole.out.count('in the bad step nothing moved: True') == 3 == whole.out.count('WARNING: bad numbers')
    assert whole.out.count('the host waits in each step') == 1
    assert [r['step'] for r in records(tiny / 'whole') if r.get('bad_steps')] == [0, 3, 7]
    (tiny / 'cut').mkdir()
    (tiny / 'whole/step_0000005.pt').rename(tiny / 'cut/ckpt.pt')
    rest = hooked(code, '--init_from=resume', '--out_dir=cut')
    assert rest.status == 0, rest.err
    assert list(losses(rest)) == [5, 6, 7, 8, 9]
    assert str([*losses(whole).items()][5:]) == str([*losses(rest).items()])  # of which one is NaN
    a, b = state(tiny / 'whole'), state(tiny / 'cut')
    assert same(a['model'], b['model']) and same(a['optimizer'], b['optimizer'])
    assert all(value.isfinite().all() for value in a['model'].values())


def test_back_over_bad_steps_with_another_optimizer(hooked, tiny):
    """With clipping by value, an average and a rate that follows the norms."""
    result = hooked(NADAM + spoil(range(6, 99)) + NO_MORE, '--max_bad_steps=4', '--max_iters=14', '--ema_decay=0.9',
                    '--grad_clip_value=0.1', '--lr_by_norm=True')
    assert result.status == 0 and 'back to checkpoints/step_0000005.pt' in result.out, result.out + result.err
    saved = state(tiny / 'checkpoints')
    assert saved['optimizer']['state'][0]['step'] == 14 and saved['ema']
    assert all(value.isfinite().all() for value in saved['ema'].values())


def test_on_two_processes(pair, tiny):
    """A bad number on one of them; both leave the step out, and are as one process that never made it."""
    args = '--gradient_accumulation_steps=2', '--max_iters=8', '--save_interval=4'
    result = pair(*args, script=hooked_script(tiny, NADAM + spoil([3, 6], rank='1') + WATCH))
    assert result.status == 0 and result.out.count('nothing moved: True') == 2, result.out + result.err
    steps = state(tiny / 'checkpoints')['optimizer']['state'][0]['step']
    assert steps == 6 and all(w.isfinite().all() for w in state(tiny / 'checkpoints')['model'].values())


def test_float16_with_another_optimizer(hooked, tiny):
    """A gradient that overflows the scaled loss is no bad step, and skipped all the same."""
    result = hooked(NADAM + spoil([2, 3], 'gradient', 'float("inf")') + WATCH, '--dtype=float16', '--max_iters=5')
    assert result.status == 0 and 'bad numbers' not in result.out, result.err
    assert result.out.count('nothing moved: True') == 2
    saved = state(tiny / 'checkpoints')
    assert saved['scaler']['scale'] == 65536 / 4 and saved['optimizer']['state'][0]['step'] == 3


def test_the_other_ways_to_launch_it(hooked, tiny):
    assert hooked(NADAM, '--find_lr').status == 0
    bad = hooked(NADAM + spoil([7]), '--debug_nan')
    assert bad.status == 1 and 'debug_nan: step 7' in bad.out
    replayed = hooked(NADAM, '--inspect_step=6')
    assert replayed.status == 0 and 'Traceback' not in replayed.err, replayed.out + replayed.err


def test_one_that_wants_a_closure(hooked, tiny):
    result = hooked(MAKE.format(line='torch.optim.LBFGS(p, lr=lr)'))
    assert result.status == 2 and result.err.count('\n') == 1 and 'LBFGS computes the loss several times' in result.err
    assert not (tiny / 'checkpoints').exists()


def test_resume_with_another_optimizer(hooked, trained):
    result = hooked(NADAM, '--init_from=resume', '--max_iters=12')
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    assert 'parameter' in result.err or 'group' in result.err
    assert '--init_from=FILE.pt' in result.err


def moment(change, key='exp_avg'):
    """Change a moment of the first parameter, the embedding."""
    def damage(saved):
        saved['state'][0][key] = change(saved['state'][0][key])
    return damage


DAMAGES = {
    'shorter': (moment(lambda m: m[:3].clone()), r'exp_avg of parameter 0 is float32 of shape \(3, 32\), and must be'),
    'transposed': (moment(lambda m: m.t().contiguous()), r'exp_avg of parameter 0 is float32 of shape \(32, '),
    'flat': (moment(lambda m: m.flatten()), 'exp_avg of parameter 0'),
    'integers': (moment(lambda m: m.long()), 'exp_avg of parameter 0 is int64'),
    'complex': (moment(lambda m: m + 0j), 'exp_avg of parameter 0 is complex64'),
    'a number': (moment(lambda m: 0.5), 'exp_avg of parameter 0 is of type float, and must be float32'),
    'nothing': (moment(lambda m: None), 'exp_avg of parameter 0 is of type NoneType'),
    'a count of a shape': (moment(lambda m: torch.ones(2), 'step'), r'step of parameter 0 is float32 of shape \(2,\)'),
    'a count without end': (moment(lambda m: math.inf, 'step'), 'step of parameter 0 holds numbers that are not'),
    'beyond float32': (moment(lambda m: m.double() + 1e300), 'exp_avg of parameter 0 holds numbers that are not'),
    'one tensor twice': (lambda saved: saved['state'][0].update(exp_avg=saved['state'][0]['exp_avg_sq']),
                         'two of its moments share their memory'),
    'a group that is none': (lambda saved: saved['param_groups'].__setitem__(0, 5), 'one of its groups is no dict'),
    'missing': (lambda saved: saved['state'][0].pop('exp_avg_sq'), 'parameter 0 lacks exp_avg_sq'),
    'extra': (lambda saved: saved['state'][0].update(momentum=torch.ones(2)), 'parameter 0 has momentum'),
    'no dict': (lambda saved: saved['state'].update({0: torch.ones(2)}), 'what it has of parameter 0 is float32'),
    'of no parameter': (lambda saved: saved['state'].update({99: saved['state'][0]}), 'moments of parameter 99'),
    'one index less': (lambda saved: saved['param_groups'][0]['params'].pop(),
                       r'its groups have \[1, 1\] parameters'),
    'one index more': (lambda saved: saved['param_groups'][0]['params'].append(99),
                       r'its groups have \[3, 1\] parameters'),
    'one index twice': (lambda saved: saved['param_groups'][0].update(
        params=[0] * len(saved['param_groups'][0]['params'])), 'parameter 1, which is in none'),
    'a group less': (lambda saved: saved['param_groups'].pop(),
                     r'its groups have \[2\] parameters, and here they have \[2, 1\]'),
}


@pytest.mark.parametrize('name', ['shorter', 'transposed'])
def test_a_damaged_state_is_one_line(train, trained_gpt2, name):
    damage, words = DAMAGES[name]
    saved = state(trained_gpt2)
    damage(saved['optimizer'])
    torch.save(saved, trained_gpt2 / 'ckpt.pt')
    result = train('--init_from=resume', '--max_iters=12')
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    assert re.search(words, result.err) and '--init_from=FILE.pt' in result.err


# ---------------------------------------------------------------------------------------------------------------------
# restore and step alone


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (4, 6), (5, 5))]


def trained_with(make, n=5):
    """(parameters, optimizer) after n steps."""
    params = parameters()
    optimizer = make(params)
    go_on(params, optimizer, range(n))
    return params, optimizer


def go_on(params, optimizer, steps):
    for n in steps:
        generator = torch.Generator().manual_seed(n)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizers.step(optimizer, torch.tensor(True))


def fused(params, **settings):
    return torch.optim.AdamW(params, fused=True, **settings)


def odd(params):
    space = {'__name__': 'odd'}
    exec(ODD_CLASS, space)
    return space['Odd'](params)


KINDS = {'AdamW': fused, 'SGD': torch.optim.SGD, 'odd': odd,
         'momentum': lambda params: torch.optim.SGD(params, momentum=0.9),
         'amsgrad': lambda params: torch.optim.Adam(params, amsgrad=True),
         'foreach': lambda params: torch.optim.Adam(params, foreach=True),
         **{name: getattr(torch.optim, name) for name in ('NAdam', 'RAdam', 'Adamax', 'Adagrad', 'Adadelta', 'RMSprop',
                                                          'Rprop', 'ASGD', 'Adafactor', 'Muon')}}


def test_a_run_goes_back_to_before_a_late_moment():
    _, young = trained_with(odd, 3)
    params, old = trained_with(odd, 5)
    assert 'late' in old.state[params[0]]
    optimizer_state.restore(old, copy.deepcopy(young.state_dict()))
    assert same(old.state_dict(), young.state_dict())


@pytest.mark.parametrize('name', KINDS)
def test_restored_it_goes_on_as_if_nothing_had_been(name):
    """By a new one, and by the same later, as where a run goes back; its gradients are stale then and move nothing."""
    params, optimizer = trained_with(KINDS[name])
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(params)
    others = copy.deepcopy(params)
    other = KINDS[name](others)
    optimizer_state.restore(other, copy.deepcopy(saved))  # what is loaded is then changed in place
    assert same(other.state_dict(), saved)
    for _ in range(2):
        go_on(params, optimizer, range(5, 9))
        go_on(others, other, range(5, 9))
        assert all(map(torch.equal, params, others)) and same(other.state_dict(), optimizer.state_dict())
        assert all(optimizer_state.try_out(other, others)) or name == 'SGD'
        for p, q, weight in zip(params, others, weights):
            p.data, q.data = weight.detach().clone(), weight.detach().clone()
        for each in optimizer, other:
            optimizer_state.restore(each, copy.deepcopy(saved))
        assert all(map(torch.equal, params, weights)) and same(optimizer.state_dict(), saved)


@pytest.mark.parametrize('mine, theirs', [
    ('AdamW', 'NAdam'), ('NAdam', 'AdamW'), ('AdamW', 'momentum'), ('momentum', 'AdamW'), ('SGD', 'momentum'),
    ('AdamW', 'amsgrad'), ('amsgrad', 'AdamW'), ('Adafactor', 'AdamW'), ('Muon', 'RMSprop'), ('odd', 'AdamW'),
    ('AdamW', 'odd'), ('ASGD', 'AdamW')])
def test_of_another_kind(mine, theirs):
    _, other = trained_with(KINDS[theirs])
    with pytest.raises(ValueError, match='parameter 0 (lacks|has) .*: it is of another optimizer than'):
        optimizer_state.restore(KINDS[mine](parameters()), other.state_dict())


@pytest.mark.parametrize('mine, theirs', [('AdamW', 'RAdam'), ('RAdam', 'AdamW'), ('AdamW', 'AdamW')])
def test_of_another_kind_with_the_same_moments(capsys, mine, theirs):
    """They can be taken, and it is said."""
    _, other = trained_with(KINDS[theirs])
    optimizer_state.restore(KINDS[mine](parameters()), other.state_dict())
    said = capsys.readouterr().out
    assert said == '' if mine == theirs else f'saved by another than {mine}' in said and 'amsgrad' in said


@pytest.mark.parametrize('name', DAMAGES)
def test_damaged(name):
    def make(shape):
        params = [torch.nn.Parameter(torch.ones(shape)), torch.nn.Parameter(torch.ones(32))]
        params += [torch.nn.Parameter(torch.ones(4, 4))]
        return params, fused([{'params': params[::2]}, {'params': params[1:2]}])
    params, optimizer = make((50, 32))
    go_on(params, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    damage, words = DAMAGES[name]
    damage(saved)
    with pytest.raises(ValueError, match=words):
        optimizer_state.restore(make((50, 32))[1], saved)


def test_a_moment_that_lies_otherwise_in_memory():
    """A fused kernel takes the numbers as they lie there: it took such a moment transposed."""
    params, optimizer = trained_with(fused)
    saved = copy.deepcopy(optimizer.state_dict())
    saved['state'][2]['exp_avg'] = saved['state'][2]['exp_avg'].t().contiguous().t()
    others = copy.deepcopy(params)
    other = fused(others)
    optimizer_state.restore(other, saved)
    go_on(params, optimizer, range(5, 8))
    go_on(others, other, range(5, 8))
    assert all(map(torch.equal, params, others))


def test_a_late_moment_of_ones_own_is_looked_at_by_its_size():
    """What no step of it has made yet: where it is of as many numbers as the parameter it must have its shape."""
    _, optimizer = trained_with(odd, 3)
    for value, fits in ((torch.ones(4, 6), False), (torch.ones(6, 4), True), (torch.ones(24), True)):
        saved = copy.deepcopy(optimizer.state_dict())
        saved['state'][0]['late'] = value
        if fits:
            optimizer_state.restore(odd(parameters()), saved)
        else:
            with pytest.raises(ValueError, match=r'late of parameter 0 is float32 of shape \(4, 6\), and must'):
                optimizer_state.restore(odd(parameters()), saved)


def test_a_factor_of_another_shape():
    _, optimizer = trained_with(torch.optim.Adafactor)
    for value in torch.ones(1, 1), torch.ones(6, 4), torch.ones(6):
        saved = copy.deepcopy(optimizer.state_dict())
        saved['state'][0]['row_var'] = value
        with pytest.raises(ValueError, match='row_var of parameter 0 is float32 of shape .*, and must'):
            optimizer_state.restore(torch.optim.Adafactor(parameters()), saved)


def test_a_state_that_the_constructor_begins():
    _, optimizer = trained_with(torch.optim.Adagrad)
    saved = copy.deepcopy(optimizer.state_dict())
    saved['state'][1]['sum'] = torch.ones(3)
    with pytest.raises(ValueError, match=r'sum of parameter 1 is float32 of shape \(3,\), and must be'):
        optimizer_state.restore(torch.optim.Adagrad(parameters()), saved)


def test_counts_of_steps_of_old_torch():
    params, optimizer = trained_with(fused)
    saved = copy.deepcopy(optimizer.state_dict())
    for moments in list(saved['state'].values())[1:]:
        moments['step'] = int(moments['step'])
    other = fused(parameters())
    optimizer_state.restore(other, saved)
    assert same(other.state_dict()['state'], optimizer.state_dict()['state'])


def test_settings_are_those_of_now_and_counts_those_of_then():
    _, optimizer = trained_with(odd)
    other = odd(parameters())
    other.param_groups[0].update(decay=0.5)
    saved = copy.deepcopy(optimizer.state_dict())
    saved['param_groups'][0].update(decay=0.2)
    del saved['param_groups'][0]['lr']
    optimizer_state.restore(other, saved)
    assert other.param_groups[0]['k'] == 5 and other.param_groups[0]['decay'] == 0.5
    assert other.param_groups[0]['lr'] == 0.1 and other.state['all'] == {'n': 5}
    _, optimizer = trained_with(fused)
    nanogpts = copy.deepcopy(optimizer.state_dict())  # of versions of torch that knew less
    for key in ('decoupled_weight_decay', 'differentiable', 'fused'):
        del nanogpts['param_groups'][0][key]
    nanogpts['param_groups'][0].update(betas=(0.1, 0.2), foreach=True, weight_decay=0.7)
    other = fused(parameters(), weight_decay=0.3)
    optimizer_state.restore(other, nanogpts)
    mine = fused(parameters(), weight_decay=0.3)
    assert {**other.param_groups[0], 'params': 0} == {**mine.param_groups[0], 'params': 0}


def test_what_had_no_gradient_yet_has_no_state(capsys):
    params = parameters()
    optimizer = torch.optim.NAdam(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    other = torch.optim.NAdam(parameters())
    optimizer_state.restore(other, optimizer.state_dict())
    assert len(other.state) == 1
    assert 'begins anew for 2 of 3 parameters' in capsys.readouterr().out
    optimizer_state.restore(torch.optim.SGD(parameters()), torch.optim.SGD(parameters()).state_dict())
    assert capsys.readouterr().out == ''


def test_trying_it_out_leaves_all_as_it_was():
    """Also where it holds others, the gradients are stale, or something listens to its steps."""
    params, optimizer = trained_with(odd)
    optimizer.inner, heard = fused(params), []
    optimizer.register_step_post_hook(lambda *_: heard.append(1))
    before = copy.deepcopy([params, optimizer.state_dict()])
    assert all(optimizer_state.try_out(optimizer, params))
    assert same(before[1], optimizer.state_dict()) and all(map(torch.equal, before[0], params)) and not heard
    assert not optimizer.inner.state
    params, optimizer = trained_with(fused)
    assert all(optimizer_state.try_out(optimizer, params))  # although it holds a verdict


def test_adamw_does_not_wait(monkeypatch):
    """The verdict stays on the device: a tensor of it that is asked for its value on the host would raise."""
    class Verdict(torch.Tensor):
        def __bool__(self):
            raise AssertionError('the host waited')
        item = tolist = __float__ = __bool__
    params, optimizer = trained_with(fused)
    quiet = lambda optimizer: None
    quiet.__module__ = 'torch.optim.adamw'
    monkeypatch.setattr(torch.optim.AdamW, 'step', quiet)
    optimizers.step(optimizer, torch.tensor(False).as_subclass(Verdict))
    assert optimizer.found_inf.as_subclass(torch.Tensor) == 1
    with pytest.raises(AssertionError, match='the host waited'):
        optimizers.step(torch.optim.NAdam(params), torch.tensor(False).as_subclass(Verdict))


@pytest.mark.parametrize('change', [
    lambda optimizer, params: optimizer.register_step_post_hook(lambda *_: params[0].data.mul_(0.9)),
    lambda optimizer, params: setattr(optimizer, 'step', lambda: params[0].data.mul_(0.9)),
    lambda optimizer, params: optimizer.param_groups[0].update(fused=False)])
def test_what_belongs_to_a_step_is_skipped_too(change):
    params, optimizer = trained_with(fused)
    change(optimizer, params)
    before = copy.deepcopy([params, optimizer.state_dict()])
    params[0].grad.fill_(math.nan)
    optimizers.step(optimizer, torch.tensor(False))
    assert all(map(torch.equal, params, before[0])) and same(optimizer.state_dict(), before[1])


def test_a_resume_of_one_that_holds_the_parameters(hooked, tiny):
    """In a function of its own: a step that is tried out moves them, before the weights are loaded."""
    code = """
import torch
from kit.learn import optimizers
class Holds(torch.optim.Optimizer):
    def __init__(self, params, lr):
        self.decay = lambda: [p.data.mul_(0.9) for p in params]
        super().__init__(params, {'lr': lr})
    def step(self):
        self.decay()
        for p in self.param_groups[0]['params']:
            self.state[p]['n'] = self.state[p].get('n', 0) + 1
            p.data.sub_(self.param_groups[0]['lr'] * p.grad)
        print('a step of it')
optimizers.make = lambda text, model, weight_decay, lr, betas, dtype: Holds(list(model.parameters()), lr)
"""
    whole = hooked(code, '--out_dir=whole')
    (tiny / 'cut').mkdir()
    (tiny / 'whole/step_0000005.pt').rename(tiny / 'cut/ckpt.pt')
    rest = hooked(code, '--init_from=resume', '--out_dir=cut')
    assert [*losses(whole).items()][5:] == [*losses(rest).items()] and rest.out.count('a step of it') == 5, rest.err
    assert same(state(tiny / 'whole')['model'], state(tiny / 'cut')['model'])


def test_a_step_around_that_of_torch_is_skipped_too():
    class Mine(torch.optim.AdamW):
        def step(self):
            super().step()
            for p in self.param_groups[0]['params']:
                p.data += 1
    params, optimizer = trained_with(lambda params: Mine(params, fused=True))
    before = copy.deepcopy([params, optimizer.state_dict()])
    optimizers.step(optimizer, torch.tensor(False))
    assert all(map(torch.equal, params, before[0])) and same(optimizer.state_dict(), before[1])
