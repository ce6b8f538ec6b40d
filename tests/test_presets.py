"""The setting architecture: what a text stands for, what is none, and what a resume makes of it."""

from dataclasses import asdict, dataclass
from itertools import product
from typing import Literal

import pytest
import torch

from kit.run import presets
from model import GPTConfig

GPT2, MODERN = GPTConfig.PRESETS['gpt2'], GPTConfig.PRESETS['modern']


def test_presets_name_the_same_fields_and_gpt2_is_the_default():
    assert GPT2.keys() == MODERN.keys() == presets.kinds_of(GPTConfig).keys()
    assert {name: asdict(GPTConfig())[name] for name in GPT2} == GPT2


def test_a_text_is_a_preset_and_deviations():
    assert presets.parse('GPT2', GPTConfig) == GPT2 and presets.parse('modern', GPTConfig) == MODERN
    assert presets.parse(' modern , qk_norm=false, ngram_embeddings=1_000,mlp=swiglu', GPTConfig) == MODERN | {
        'qk_norm': False, 'ngram_embeddings': 1000, 'mlp': 'swiglu'}
    assert presets.parse('gpt2,position=rope,position=rope', GPTConfig) == GPT2 | {'position': 'rope'}


def test_fields_become_the_shortest_text_for_them():
    assert presets.text_of({}, GPTConfig) == 'gpt2' == presets.text_of(asdict(GPTConfig()), GPTConfig)
    assert presets.text_of(MODERN, GPTConfig) == 'modern'
    assert presets.text_of(MODERN | {'qk_norm': False}, GPTConfig) == 'modern,qk_norm=False'
    for position, qk_norm, tied, table in product(['learned', 'rope'], [True, False], [True, False], [0, 64]):
        fields = MODERN | {'position': position, 'qk_norm': qk_norm, 'tied': tied, 'ngram_embeddings': table}
        text = presets.text_of(GPTConfig(**fields, n_head=0).args(), GPTConfig)
        assert presets.parse(text, GPTConfig) == fields and text.count(',') <= len(GPT2) // 2


@pytest.mark.parametrize('text, words', [
    ('moden', "there is no 'moden'; did you mean modern?"), ('', "there is no ''; there are gpt2, modern"),
    ('gpt3', 'did you mean gpt2?'), ('mlp=gelu', 'it begins with gpt2 or modern, as in gpt2,mlp=gelu'),
    ('modern,gpt2', 'modern and gpt2 are two'), ('modern,mpl=gelu', "there is no 'mpl'; did you mean mlp?"),
    ('modern,', "there is no ''"), ('modern,mlp=swigl', "not 'swigl'; did you mean swiglu?"),
    ('modern,mlp=swiglu,mlp=gelu', 'mlp is both swiglu and gelu'), ('modern,qk_norm', 'qk_norm is True or False'),
    ('modern,qk_norm=yes', "qk_norm is True or False, not 'yes'"),
    ('modern,ngram_embeddings=many', 'ngram_embeddings takes a number'),
    ('modern,ngram_embeddings=1.5', "not '1.5'"), ('modern,n_layer=3', 'n_layer is no part of it'),
    ('modern,vocab_size=3', 'vocab_size is no part of it'), ('modern,causal=False', 'causal is no part of it'),
    ('modern;mlp=gelu', 'it begins with gpt2 or modern')])
def test_what_is_no_architecture(train, tiny, text, words):
    result = train(f'--architecture={text}')
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    assert f"architecture = '{text}': " in result.err and words in result.err
    assert not (tiny / 'checkpoints').exists()


def test_rope_needs_pairs_of_channels(train, tiny):
    result = train('--n_head=2', '--n_embd=6')
    assert result.status == 2 and result.err.count('\n') == 1, result.err
    assert 'n_embd = 6: rope in 2 heads needs an even n_embd / n_head' in result.err
    assert train('--n_head=2', '--n_embd=6', '--architecture=gpt2', '--max_iters=1').status == 0


def test_heads_that_nobody_names_are_such_as_rope_takes():
    heads = {(position, n_embd): GPTConfig(position=position, n_embd=n_embd, n_head=0).n_head
             for position in ('rope', 'learned') for n_embd in (32, 130, 192, 390)}
    assert [*heads.values()] == [1, 1, 3, 5, 1, 2, 3, 6]
    with pytest.raises(ValueError, match='in 1 heads'):
        GPTConfig(n_embd=33, n_head=0, position='rope')
    with pytest.raises(ValueError, match='block_size'):  # at once, whatever a file asks for
        GPTConfig(n_embd=10**11 + 3, n_head=0, block_size=0)


@pytest.mark.parametrize('n', [-5, 10**12, 10**22])
def test_a_table_that_no_memory_holds(train, tiny, n):
    result = train(f'--architecture=modern,ngram_embeddings={n}')
    assert result.status == 2 and result.err.count('\n') == 1
    assert f'ngram_embeddings = {n} should be 0 or as many rows as memory holds' in result.err
    assert not (tiny / 'checkpoints').exists()


def test_help_lists_presets_names_and_choices(run):
    table = run('train.py', '--help').out.split('architecture: a preset')[1].splitlines()[1:]
    assert table[0].split() == ['gpt2', 'modern', 'takes'] and len(table) == 1 + len(GPT2)
    rows = {line.split()[0]: line.split(maxsplit=3)[1:] for line in table[1:]}
    assert rows.keys() == GPT2.keys() and rows['position'] == ['learned', 'rope', 'learned or rope']
    assert rows['mlp'][2] == 'gelu or swiglu' and rows['ngram_embeddings'] == ['0', '8192', 'a whole number']


def test_a_field_may_be_a_fraction():
    @dataclass
    class Config:
        mlp: Literal['gelu', 'relu'] = 'gelu'
        softcap: float = 0.0
        PRESETS = {'plain': {'mlp': 'gelu', 'softcap': 0.0}, 'capped': {'mlp': 'gelu', 'softcap': 15.0}}
    assert presets.parse('plain,softcap=2.5', Config) == {'mlp': 'gelu', 'softcap': 2.5}
    assert presets.help_text(Config).splitlines()[-1].split() == ['softcap', '0.0', '15.0', 'a', 'number']


def test_a_checkpoint_keeps_the_fields_and_they_win(train, run, tiny):
    """Whatever a preset of that name is by then; without a word of it, or with the same in other words."""
    assert train('--architecture=modern,mlp=swiglu').status == 0
    saved = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)
    assert {name: saved['model_args'][name] for name in MODERN if MODERN[name] != GPT2[name]} == {
        name: value for name, value in MODERN.items() if value != GPT2[name]}
    assert saved['model_args']['mlp'] == 'swiglu' and saved['config']['architecture'] == 'modern,mlp=swiglu'
    resumed = train('--init_from=resume', '--max_iters=12')
    assert resumed.status == 0 and 'From the checkpoint: architecture = modern,mlp=swiglu' in resumed.out
    spelled = ','.join(f'{name}={value}' for name, value in MODERN.items() if name != 'mlp')
    same = train('--init_from=resume', '--max_iters=14', f'--architecture=gpt2,mlp=swiglu,{spelled}')
    assert same.status == 0, same.err
    for other in 'modern', 'gpt2', 'modern,mlp=swiglu,tied=True':
        refused = train('--init_from=resume', '--max_iters=16', f'--architecture={other}')
        assert refused.status == 2 and refused.err.count('\n') == 1, refused.err
        assert f'architecture = {other}: these weights have architecture = ' in refused.err
        assert "'modern,mlp=swiglu'; another architecture is another run" in refused.err
        refused = train('--init_from=checkpoints/best.pt', '--out_dir=new', f'--architecture={other}')
        assert refused.status == 2 and refused.err.count('\n') == 1, refused.err
    begun = train('--init_from=checkpoints/best.pt', '--out_dir=new', '--max_iters=2')
    assert begun.status == 0 and 'From the checkpoint: architecture = modern,mlp=swiglu' in begun.out
    assert run('train.py', '--test', '--device=cpu', '--checkpoint=checkpoints/best.pt').status == 0


def test_a_preset_that_has_changed_since_changes_no_run(hooked, train, tiny):
    """What was made as modern goes on as it was."""
    code = "import model\nmodel.GPTConfig.PRESETS['modern'].update(tied=True, qk_norm=False)"
    assert hooked(code, '--architecture=modern').status == 0
    resumed = train('--init_from=resume', '--max_iters=12')
    assert resumed.status == 0, resumed.err
    assert 'From the checkpoint: architecture = modern,qk_norm=False,tied=True' in resumed.out
    args = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)['model_args']
    assert args.get('tied', True) and not args.get('qk_norm', False)


@pytest.mark.parametrize('text', ['gpt2', 'modern', 'gpt2,position=rope,mlp=swiglu', 'modern,position=learned'])
def test_all_scripts_take_it(train, run, tiny, text):
    """An EMA, an average of checkpoints, hidden tokens, packed documents, TensorBoard's pictures, sampling."""
    result = train(f'--architecture={text}', '--ema_decay=0.9', '--tensorboard=True')
    assert result.status == 0, result.err
    averaged = run('checkpoint_averaging.py', '--num_checkpoints=2', '--device=cpu')
    assert averaged.status == 0, averaged.err
    for name in 'best.pt', 'averaged_model.pt':
        written = run('sample.py', f'--checkpoint=checkpoints/{name}', '--device=cpu', '--max_new_tokens=50')
        assert written.status == 0, written.err
    masked = train(f'--architecture={text}', '--objective=mlm', '--out_dir=masked', '--max_iters=2')
    assert masked.status == 0, masked.err
    more = train(f'--architecture={text}', '--mask_prob=0.1', '--init_from=checkpoints/best.pt', '--out_dir=more',
                 '--max_iters=2')
    assert more.status == 0, more.err  # its vocabulary has an id more now
