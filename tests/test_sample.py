"""sample.py on a model that has learnt one sentence by heart, so that what it writes is known."""

import pytest
import torch

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
    def launch(*args, cwd=fox):
        result = run('sample.py', '--device=cpu', *args, cwd=cwd)
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


def test_stop(sample):
    for samples in 1, 2:
        out = sample('--start=the quick', '--temperature=0', '--stop=over', f'--num_samples={samples}')
        assert out.count('the quick brown fox jumps \n') == samples


def test_prompt_from_a_file(sample, fox):
    (fox / 'prompt.txt').write_text('jumps ov')
    assert 'jumps over the lazy dog' in sample('--start=FILE:prompt.txt', '--temperature=0', '--max_new_tokens=20')


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
    weight = saved['model']['lm_head.weight']
    weight = torch.cat((weight, weight.mean(0).expand(1000, -1)))
    saved['model'] |= {'lm_head.weight': weight, 'transformer.wte.weight': weight}
    saved['model_args']['vocab_size'] = V + 1000
    torch.save(saved, path)
    out = sample(f'--checkpoint={path}', '--start=t', '--temperature=50', '--top_k=0', '--max_new_tokens=300')
    assert len(out.splitlines()[-1]) > 250
