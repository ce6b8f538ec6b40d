"""sample.py on a model that has learnt one sentence by heart, so that what it writes is known."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import GPT2, hooked_script

from kit.base import devices, files
from kit.data import tokens
from kit.watch import evaluation
from model import GPT, GPTConfig

SENTENCE = 'the quick brown fox jumps over the lazy dog; '
SETTINGS = ['--dataset=fox', '--n_layer=2', '--n_head=2', '--n_embd=64', '--block_size=32', '--batch_size=16',
            '--max_iters=80', '--learning_rate=1e-2', '--warmup_iters=5', '--eval_interval=0', '--eval_iters=1',
            '--save_interval=0', '--device=cpu', '--tensorboard=False']


@pytest.fixture(scope='module')
def fox(zygote, tmp_path_factory):
    """A folder with a run in checkpoints/ that knows SENTENCE."""
    from conftest import run as run_fixture
    folder = tmp_path_factory.mktemp('fox')
    run = run_fixture.__wrapped__(zygote, folder)
    (folder / 'data').mkdir()
    (folder / 'fox.txt').write_text(SENTENCE * 60)
    assert run('prepare.py', '--input=fox.txt', '--dataset=fox').status == 0
    result = run('train.py', *SETTINGS)
    assert result.status == 0, result.err
    return folder


@pytest.fixture
def sample(run, fox):
    def launch(*args, script='sample.py', cwd=fox):
        result = run(script, '--device=cpu', *args, cwd=cwd)
        assert result.status == 0, result.err
        return result.out
    return launch


def test_greedy(sample):
    out = sample('--start=the quick', '--temperature=0', '--max_new_tokens=100')
    assert (SENTENCE * 4)[:109] in out and (SENTENCE * 4)[:110] not in out
    assert 'checkpoint: checkpoints/best.pt, after 80 steps' in out


def test_several_as_one_batch(sample):
    out = sample('--start=the lazy', '--num_samples=3', '--max_new_tokens=30')
    assert out.count('the lazy dog') >= 3 and out.count('---------------') == 3


def test_stop(sample, fox):
    """Where a device is given the next token before the host has read one, too: what came too much is not shown."""
    ahead = hooked_script(fox, '''
from kit.base import devices
def fetch(tensor):
    copy = tensor.clone()
    return lambda: copy
devices.runs_ahead, devices.fetch = lambda device: True, fetch
''', 'sample.py')
    for samples in 1, 2:
        args = '--start=the quick', '--temperature=0', '--stop=over', f'--num_samples={samples}'
        assert sample(*args).count('the quick brown fox jumps \n') == samples
        assert sample(*args, script=ahead).count('the quick brown fox jumps \n') == samples


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_prompt_from_a_file(sample, fox, encoding):
    (fox / 'prompt.txt').write_text('jumps ov', encoding=encoding)
    out = sample('--start=FILE:prompt.txt', '--temperature=0', '--max_new_tokens=20')
    assert out.splitlines()[-1].startswith('jumps over the lazy dog')


@pytest.fixture
def refused(run, fox):
    """refused('--start=X') -> the one line that sample.py ends with."""
    def launch(*args, status=2):
        result = run('sample.py', '--device=cpu', *args, cwd=fox)
        assert result.status == status and result.err.count('\n') == 1, result.err
        return result.err
    return launch


@pytest.mark.parametrize('content, named', [
    (b'', 'empty'), (b'\xef\xbb\xbf', 'empty'), (b'\x89PNG\r\n\xff', 'cannot be read'),
    (b't\0h\0e\0', 'null characters'), (b'\xff\xfet', 'cannot be read'), ('\u4e16'.encode(), 'not among'),
])
def test_a_file_that_is_no_prompt(refused, fox, content, named):
    (fox / 'odd.txt').write_bytes(content)
    assert named in refused('--start=FILE:odd.txt')


def test_a_prompt_that_is_no_file(refused):
    for name in 'nowhere.txt', 'data', 'x' * 300, '':
        assert f"FILE:{name[:50]}" in refused(f'--start=FILE:{name}')


def test_a_prompt_longer_than_the_model_sees(sample):
    out = sample(f'--start={SENTENCE * 2}', '--temperature=0', '--max_new_tokens=20')
    assert 'it has 90 tokens, and the model sees the last 32' in out and f'{SENTENCE * 2}the quick brown fox' in out


def test_where_the_model_knows_no_line_break(sample):
    out = sample('--temperature=0', '--max_new_tokens=20')
    assert "start: ' ', since this model knows no line break\n " in out


def changed(fox, name, **changes):
    """The checkpoint of the fox with other entries, as a file of that name."""
    saved = torch.load(fox / 'checkpoints/ckpt.pt', weights_only=True)
    torch.save(saved | changes, fox / name)
    return f'--checkpoint={name}'


def test_models_of_two_tokenizers_are_not_mixed(refused, fox):
    """In either order: no file is asked for that would not help."""
    saved = torch.load(fox / 'checkpoints/ckpt.pt', weights_only=True)
    by_byte = changed(fox, 'byte.pt', meta={'vocab_size': 257, 'tokenizer': {'kind': 'byte'}},
                      model_args=saved['model_args'] | {'vocab_size': 257},
                      model=GPT(GPTConfig(**saved['model_args'] | {'vocab_size': 257})).state_dict())
    for words in f'{by_byte},checkpoints/ckpt.pt', '--checkpoint=checkpoints/ckpt.pt,byte.pt':
        line = refused(words, '--start=the')
        assert 'checkpoints/ckpt.pt' in line and 'byte.pt' in line and 'have different tokenizers' in line


def test_the_end_of_a_document_in_a_prompt(sample, refused, fox):
    """Plain text, unless a separator makes it the end of a document: that of the dataset, or of this command."""
    meta = torch.load(fox / 'checkpoints/ckpt.pt', weights_only=True)['meta']
    size = meta['vocab_size']
    chars = ['!' if char == ' ' else char for char in meta['tokenizer']['chars'][:size - 1]] + [tokens.END]
    meta |= {'tokenizer': {'kind': 'char', 'chars': chars}, 'end_of_text': size - 1}
    text = lambda out: out.splitlines()[-1]
    args = '--temperature=0', '--max_new_tokens=20'
    prompt, without = f'--start=the{tokens.END}quick', changed(fox, 'without.pt', meta=meta)
    assert "'<' is not among" in refused(without, prompt)
    asked = text(sample(without, prompt, f'--separator={tokens.END}', *args))
    own = text(sample(changed(fox, 'own.pt', meta=meta | {'separator': tokens.END}), prompt, *args))
    other = text(sample(without, '--start=theoxquick', '--separator=ox', *args))
    assert asked == own == other.replace('theox', f'the{tokens.END}') and own.startswith(f'the{tokens.END}quick')
    assert 'separator' in refused('--start=the quick', '--separator=x')  # of a model without documents


def test_where_it_is_plain_text_it_is_said(run, tiny):
    (tiny / 'rows.jsonl').write_text('{"text": "to be, or not to be"}\n' * 50)
    assert run('prepare.py', '--input=rows.jsonl', '--dataset=rows', '--tokenizer=byte').status == 0
    result = run('train.py', '--dataset=rows', *SETTINGS[1:], '--max_iters=1')
    assert result.status == 0, result.err
    args = f'--start=to be{tokens.END}to', '--temperature=0', '--max_new_tokens=1', '--device=cpu'
    plain, apart = run('sample.py', *args), run('sample.py', *args, f'--separator={tokens.END}')
    assert plain.status == apart.status == 0, plain.err + apart.err
    said = f"start: {tokens.END} stands there as plain text; --separator='{tokens.END}' makes it the end of a document"
    assert said in plain.out and said not in apart.out


def test_commas_in_a_path(sample, fox):
    shutil.copytree(fox / 'checkpoints', fox / 'lr=1e-3,bs=8', dirs_exist_ok=True)
    out = sample('--checkpoint=lr=1e-3,bs=8/best.pt', '--start=the', '--max_new_tokens=5')
    assert 'checkpoint: lr=1e-3,bs=8/best.pt, after' in out
    out = sample('--checkpoint=checkpoints/ckpt.pt,lr=1e-3,bs=8/best.pt', '--start=the', '--max_new_tokens=5')
    assert out.count('checkpoint: ') == 2


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in 'a', 'b,c', 'a,b,c':
        (tmp_path / name).write_text('')
    assert files.paths('a,b,c') == ['a,b,c'] and files.paths('b,c,a') == ['b,c', 'a'] == files.paths(',b,c,,a,')
    assert files.paths('x,y,b,c') == ['x', 'y', 'b,c'] and files.paths('') == files.paths(',') == []


@pytest.mark.parametrize('temperature', [0, 0.8])
def test_a_model_that_has_diverged(refused, fox, temperature):
    """Its weights are numbers, what it makes of them is none."""
    model = torch.load(fox / 'checkpoints/ckpt.pt', weights_only=True)['model']
    word = changed(fox, 'wild.pt', model={name: 1e30 * weight for name, weight in model.items()})
    line = refused(word, '--start=the', f'--temperature={temperature}', status=1)
    assert line.startswith('sample.py: wild.pt: ') and 'not finite' in line and '--learning_rate' in line


def test_the_end_of_a_run_that_has_diverged(train, run, tiny):
    result = train(*GPT2, '--learning_rate=1e6', '--warmup_iters=0', '--max_iters=4', '--eval_interval=0')
    assert 'no sample: ' in result.out and 'Traceback' not in result.err


def test_ids_without_a_token_are_not_drawn():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=10))
    gaps = [0, 3, 7]
    for options in dict(temperature=50.0), dict(temperature=0), dict(top_k=9), dict(top_p=0.9):
        ids = model.generate(torch.zeros(64, 1, dtype=torch.long), 5, n_ids=9, gaps=gaps, **options)
        assert not set(ids[:, 1:].ravel().tolist()) & {*gaps, 9}
    assert set(model.generate(torch.zeros(64, 1, dtype=torch.long), 5, 50.0)[:, 1:].ravel().tolist()) == {*range(10)}
    for size in 7, 20:  # of two models what both know
        other = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=size))
        stream = model.stream(torch.zeros(64, 1, dtype=torch.long), 50.0, others=[other], gaps=[2])
        assert set(torch.cat([next(stream) for _ in range(12)]).ravel().tolist()) == {*range(min(size, 10))} - {2}


def test_answers_are_those_of_each_prompt_alone():
    """However many are answered side by side, by one model or two; up to the end of a document, which 0 is here."""
    torch.manual_seed(12)
    models = [GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=6)) for _ in range(2)]
    for p in (p for model in models for p in model.parameters()):  # what a token is depends on all before it
        torch.nn.init.normal_(p, std=0.5)
    text, prompts = SimpleNamespace(size=5, gaps=[3]), [torch.randint(5, (n,)).tolist() for n in (3, 9, 1, 9, 5, 12, 2)]

    def alone(model, ids):
        n = len(ids)
        while len(ids) < n + 5 and (len(ids) == n or ids[-1] != 0):
            probs = sum(m(torch.tensor([ids]))[0][0, -1, :5].softmax(0) for m in model)
            probs[3] = 0
            ids = [*ids, int(probs.argmax())]
        return [i for i in ids[n:] if i != 0]
    for model in models[:1], models:
        expected = [alone(model, prompt) for prompt in prompts]
        assert {*map(len, expected)} > {5}  # some are cut, some end before
        for batch_size in 1, 3, 7:
            found = evaluation.answer(model, prompts, 0, text, 5, batch_size, torch.device('cpu'), 'float32')
            assert found == expected
    models[1].lm_head.weight.data[2] = torch.nan
    with pytest.raises(FloatingPointError, match='not finite'):
        evaluation.answer(models, prompts, 0, text, 5, 3, torch.device('cpu'), 'float32')


@pytest.mark.parametrize('is_ahead, order', [
    (False, 'make 0, read 0, make 1, read 1, make 2, read 2'),
    (True, 'make 0, make 1, read 0, make 2, read 1, read 2')])
def test_where_the_host_runs_ahead_it_reads_what_was_made_before(monkeypatch, is_ahead, order):
    events = []

    def make():
        for i in range(3):
            events.append(f'make {i}')
            yield torch.tensor(i)
    monkeypatch.setattr(devices, 'runs_ahead', lambda device: is_ahead)
    monkeypatch.setattr(devices, 'fetch', lambda tensor: lambda: tensor.clone())
    for tensor in devices.fetched(make()):
        events.append(f'read {tensor}')
    assert ', '.join(events) == order


def test_the_bench(run, tmp_path):
    result = run('bench/sampling.py', '--device=cpu', '--n_layer=1', '--n_embd=8', '--block_size=16', '--prompt=9',
                 '--n_tokens=7', '--runs=1')
    told = re.findall(r'(\d+) side by side: .* tokens/s; a step takes (\S+) ms, to read \d+ MB \S+\n', result.out)
    assert [n for n, _ in told] == ['1', '10'] and all(float(step) > 0 for _, step in told), result.err
    assert run('bench/sampling.py', '--prompt=200').status == 2  # the window would be read anew


def test_without_a_compiler_it_writes_uncompiled_and_says_so(sample, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    out = sample('--start=the', '--max_new_tokens=5', '--compile')
    assert 'compile: False (on a CPU it takes a C++ compiler, and there is no no-such-compiler' in out


@pytest.mark.long
def test_compiled_texts_are_the_eager(sample):
    """torch.compile on the CPU takes a C++ compiler and half a minute."""
    for args in ['--start=the', '--temperature=0'], ['--start=t', '--temperature=1', '--num_samples=2']:
        args.append('--max_new_tokens=60')
        eager, compiled = (sample(*args, *more).split('steps\n')[1] for more in ([], ['--compile']))
        assert eager == compiled and len(eager) > 60


def test_the_seed_decides(sample):
    hot = '--start=t', '--temperature=9', '--max_new_tokens=50'
    text = lambda out: out.splitlines()[-1]
    assert text(sample(*hot)) == text(sample(*hot)) != text(sample(*hot, '--seed=1'))


def test_generous_cuts_pass(sample):
    assert 'quick' in sample('--start=the q', '--top_k=200', '--top_p=0.95', '--temperature=0.1')


def test_named_checkpoint_without_its_dataset(sample, fox, tmp_path):
    """The tokenizer comes from the checkpoint."""
    out = sample(f'--checkpoint={fox}/checkpoints/ckpt.pt', '--start=brown', '--temperature=0', cwd=tmp_path)
    assert 'brown fox jumps' in out


def test_ids_beyond_the_tokenizer_are_not_drawn(sample, fox):
    path = fox / 'padded.pt'
    saved = torch.load(fox / 'checkpoints/ckpt.pt', weights_only=True)
    V = saved['model_args']['vocab_size']
    saved['model_args'] |= {'vocab_size': V + 1000}
    saved['model'] = GPT(GPTConfig(**saved['model_args'])).fitted(saved['model'])
    torch.save(saved, path)
    out = sample(f'--checkpoint={path}', '--start=t', '--temperature=50', '--top_k=0', '--max_new_tokens=300')
    assert len(out.splitlines()[-1]) > 250
