"""What users get wrong: one line on stderr that names it and the remedy, status 2, nothing written."""

import json
import pickle

import pytest
import torch

from kit.base import errors


def one_line(result, named):
    assert result.status == 2, result.out + result.err
    assert result.err.count('\n') == 1, result.err
    for word in named:
        assert word in result.err


@pytest.mark.parametrize('args, named', [
    (['--lerning_rate=1e-3'], ['lerning_rate', 'learning_rate']),
    (['--learning_rate=fast'], ['learning_rate', 'fast']),
    (['--learning_rate=nan'], ['learning_rate', 'nan']),
    (['--learning_rate=1e999'], ['learning_rate', '1e999']),
    (['--learning_rate=0'], ['learning_rate = 0.0']),
    (['--compile=maybe'], ['compile', 'maybe']),
    (['--dropout=1.5'], ['dropout = 1.5', '0 <= dropout < 1']),
    (['--dtype=float8'], ['dtype', 'float8', 'bfloat16']),
    (['--sampling=any'], ['sampling', 'any', 'shuffle']),
    (['config/missing.py'], ['config/missing.py']),
    (['typo.py'], ['typo.py', 'batch_sise', 'batch_size']),
    (['--n_embd=100', '--n_head=6'], ['n_embd = 100', 'n_head = 6', 'multiple']),
    (['--batch_size=-1'], ['batch_size = -1', '>= 0']),
    (['--block_size=-1'], ['block_size = -1']),
    (['--n_layer=0'], ['n_layer = 0']),
    (['--max_iters=0'], ['max_iters = 0']),
    (['--gradient_accumulation_steps=0'], ['gradient_accumulation_steps = 0']),
    (['--eval_iters=-1'], ['eval_iters = -1']),
    (['--warmup_iters=10', '--lr_decay_iters=10'], ['warmup_iters = 10', 'lr_decay_iters = 10', 'warmup must end']),
    (['--warmup_start_lr=1'], ['warmup_start_lr = 1.0', 'climb']),
    (['--lr_schedule=exponential', '--min_lr=0'], ['min_lr = 0.0', 'never comes down to 0']),
    (['--lr_schedule=plateau', '--eval_interval=0'], ['eval_interval = 0', 'plateau', 'evaluations']),
    (['--early_stop=3', '--eval_interval=0'], ['eval_interval = 0', 'early_stop = 3', 'evaluations']),
    (['--max_minutes=1', '--lr_decay_iters=5'], ['max_minutes = 1.0', 'lr_decay_iters = 5', 'set them to 0']),
    (['--max_minutes=1'], ['warmup_iters = 2', 'measured in the warmup']),
    (['--warmup_share=0.5', '--lr_decay_iters=5'], ['warmup_iters = 5', 'lr_decay_iters = 5', 'warmup must end']),
    (['--lr_schedule=wsd', '--decay_lr=False'], ['wsd', '--lr_schedule=constant']),
    (['--grad_clip_quantile=1'], ['grad_clip_quantile = 1.0']),
    (['--find_lr', '--find_lr_start=1', '--find_lr_end=0.1'], ['find_lr_start = 1.0', 'find_lr_end = 0.1', 'climb']),
    (['--find_lr', '--test'], ['each replaces the training']),
    (['--min_lr=1'], ['min_lr = 1.0', 'learning_rate', 'decay']),
    (['--device=cuda:7'], ['cuda:7', '--device=auto']),
    (['--device=cuda:1000'], ['cuda:1000', '--device=auto']),
    (['--device=toaster'], ['toaster', 'cpu']),
    (['--device=meta'], ['meta', 'cpu']),
    (['--seed=99999999999999999999'], ['seed', '2**63']),
    (['--seed=9223372036854775808'], ['seed', '2**63']),
    (['--device=cpu:1'], ['cpu:1', '--device=auto']),
    (['--device=cpu:' + '9' * 30], ['cpu:9', 'auto']),
    (['--batch_size=1000000000000'], ['batch_size = 1000000000000', 'a smaller --batch_size']),
    (['--gradient_accumulation_steps=1000000000000'], ['gradient_accumulation_steps = 1000000000000', 'take fewer']),
    (['--n_layer=1000000000000'], ['n_layer = 1000000000000', 'take a smaller one']),
    (['--n_embd=1000000000000'], ['n_embd = 1000000000000', 'take a smaller one']),
    (['--max_iters=' + '9' * 5000], ['max_iters', 'whole number']),
    (['--max_iters=' + '9' * 400], ['max_iters', '2**63']),
    (['--lr_schedule=step:' + '9' * 5000], ['lr_schedule', 'a whole number']),
    (['--lr_schedule=' + 'x' * 5000], ['lr_schedule', 'no such schedule']),
    (['--out_dir=' + 'x' * 260], ['out_dir', 'too long']),
    (['--init_from=' + 'x' * 260], ['init_from', 'xxx']),
    (['--init_from=' + 'x' * 260 + '.pt'], ['xxx']),
    (['--dataset=' + 'x' * 260], ['dataset', 'xxx']),
    (['--dataset=\udcff'], ['dataset']),
    (['--test', '--checkpoint=' + 'x' * 260], ['xxx']),
    (['--weights=' + 'x' * 260], ['weights', 'raw']),
    (['--backend=smoke'], ['backend', 'smoke', 'gloo']),
    (['--checkpoint=other.pt'], ['checkpoint', '--test']),
    (['--out_dir='], ['out_dir']),
    (['--out_dir=.'], ['out_dir', 'folder of its own']),
    (['--out_dir=data/..'], ['out_dir', 'folder of its own']),
    (['--dataset=tinny'], ['tinny', 'tiny', 'prepare.py']),
    (['--dataset=openwebtext'], ['openwebtext', 'python prepare.py openwebtext']),
    (['--block_size=5000', '--n_embd=8'], ['val.bin', '1,000', 'block_size']),
    (['--init_from=resume'], ['checkpoints/ckpt.pt', 'train first']),
    (['--init_from=gpt3'], ['gpt3', 'gpt2-xl']),
    (['--test'], ['checkpoints', 'no checkpoint']),
    (['--test', '--checkpoint=none.pt'], ['none.pt', 'no such checkpoint']),
    (['--test', '--checkpoint=text.txt'], ['text.txt', 'damaged', 'no checkpoint']),
    (['--test', '--checkpoint=other.pt'], ['other.pt', 'no checkpoint']),
    (['--test', '--checkpoint=hostile.pt'], ['hostile.pt', 'no checkpoint']),
    (['--test', '--checkpoint=data'], ['data', 'no checkpoint']),
])
def test_train(train, tiny, args, named):
    (tiny / 'typo.py').write_text('batch_sise = 8\n')
    torch.save({'other': 1}, tiny / 'other.pt')

    class Evil:
        def __reduce__(self):
            return open, (str(tiny / 'ran'), 'w')
    with open(tiny / 'hostile.pt', 'wb') as file:
        pickle.dump({'model': Evil(), 'model_args': {}, 'iter_num': 0}, file)
    before = sorted(tiny.rglob('*'))
    one_line(train(*args), named)
    assert sorted(tiny.rglob('*')) == before


@pytest.mark.parametrize('name', ['x' * 260, '\udcff', '..', 'a\nb'])
def test_odd_names_do_not_end_a_run(run, train, tiny, name):
    """Neither too long nor with bytes that are no UTF-8: the run has its log, its records and its checkpoint."""
    words = ['--max_iters=2', '--tensorboard=True', f'--wandb_run_name={name}', f'--out_dir=run{name[:100].strip("/")}']
    if len(name) > 100:
        words[-1] = '--out_dir=run'
    result = train(*words)
    assert result.status == 0 and not result.err, result.err
    folder = tiny / words[-1].partition('=')[2]
    assert json.loads((folder / 'config.json').read_text())['settings']['wandb_run_name'] == name
    assert 'step 2: ' in (folder / 'training.log').read_text(encoding='utf-8')
    assert [path for path in tiny.rglob('events*') if path.is_relative_to(tiny / 'runs')]
    result = run('train.py', '--init_from=resume', words[-1], '--max_iters=3', '--device=cpu')
    assert result.status == 0, result.err


def test_memory_that_is_not_there_is_one_line(capsys):
    for error in (MemoryError('Unable to allocate 9 TiB'), RuntimeError('you tried to allocate 9 bytes.\nframe #0: x'),
                  torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9.00 GiB.')):
        errors.tell(type(error), error, None)
        line, = capsys.readouterr().err.splitlines()
        assert 'llocate 9' in line
    errors.tell(ValueError, ValueError('ours'), None)
    assert capsys.readouterr().err.splitlines()[-1] == 'ValueError: ours'


@pytest.mark.parametrize('variable, value', [
    ('OMP_NUM_THREADS', 'abc'), ('FLATGPT_MIRROR', __file__), ('FLATGPT_MIRROR', 'nowhere'), ('HF_HOME', '/dev/null'),
    ('TMPDIR', 'nowhere'), ('PYTHONIOENCODING', 'ascii'), ('LC_ALL', 'C'), ('LC_ALL', 'nowhere'), ('HOME', 'nowhere'),
    ('CUDA_VISIBLE_DEVICES', 'abc'), ('COLUMNS', 'x'), ('MPLBACKEND', 'x'), ('TERM', '')])
def test_odd_environments(run, tiny, trained, variable, value):
    for script, words in ('train.py', ['--init_from=resume', '--max_iters=11', '--device=cpu']), (
            'sample.py', ['--max_new_tokens=5', '--device=cpu']), ('plot_loss.py', ['checkpoints']):
        result = run(script, *words, env={variable: value})
        assert 'Traceback' not in result.err and result.status in (0, 2), result.err
        assert result.err.count('\n') == (result.status == 2), result.err


@pytest.mark.parametrize('args', [
    ['--warmup_iters=100', '--max_iters=2'],
    ['--learning_rate=3e-5', '--min_lr=6e-5', '--decay_lr=False', '--max_iters=2'],
    ['--warmup_iters=10', '--lr_decay_iters=10', '--decay_lr=False', '--max_iters=2'],
    ['--grad_clip=0.0', '--max_iters=2'],
    ['--weight_decay=0', '--learning_rate=1', '--max_iters=2'],
    ['--eval_interval=0', '--log_interval=0', '--save_interval=0', '--max_iters=2'],
    ['--max_iters=1', '--bias=True', '--n_embd=96', '--n_head=6'],
    ['--max_iters=2', '--compile=False', '--backend=gloo', '--device=cpu', '--eval_iters=500'],
])
def test_values_of_real_recipes_pass(train, args):
    result = train(*args)
    assert result.status == 0, result.err
    assert f'step {2 if "--max_iters=2" in args else 1}: ' in result.out


@pytest.mark.parametrize('change, named', [
    (['--n_layer=3'], ['n_layer = 3', 'n_layer = 2']),
    (['--n_embd=64'], ['n_embd = 64', '32']),
    (['--block_size=32'], ['block_size = 32', 'block_size = 16']),
    (['--block_size=8'], ['block_size = 8', 'block_size = 16']),
    (['--dataset=other'], ['dataset', 'tokenizer']),
    (['--learning_rate=-1'], ['learning_rate = -1']),
    (['--min_lr=0.5'], ['min_lr = 0.5', 'learning_rate']),
])
def test_resume_with_what_does_not_fit(run, tiny, trained, change, named):
    (tiny / 'other.txt').write_text('0123456789 \u00e4\u00f6\n' * 500)
    assert run('prepare.py', '--input=other.txt', '--dataset=other').status == 0
    before = sorted(tiny.rglob('*'))
    one_line(run('train.py', '--init_from=resume', '--device=cpu', *change), named)
    assert sorted(tiny.rglob('*')) == before


def without(key):
    return lambda saved: saved.pop(key)


FOREIGN = {
    'no model': without('model'), 'no model_args': without('model_args'), 'no iter_num': without('iter_num'),
    'empty model_args': lambda saved: saved.update(model_args={}),
    'model_args as a list': lambda saved: saved.update(model_args=[1]),
    'another architecture': lambda saved: saved['model_args'].update(rope=True),
    'a tensor missing': lambda saved: saved['model'].pop('transformer.ln_f.weight'),
    'a tensor of another shape': lambda saved: saved['model'].update({'transformer.ln_f.weight': torch.ones(3)}),
    'config as a number': lambda saved: saved.update(config=3),
    'an empty meta': lambda saved: saved.update(meta={}),
    'no optimizer': without('optimizer'), 'no best_val_loss': without('best_val_loss'),
}


@pytest.mark.parametrize('change', FOREIGN)
def test_foreign_checkpoints(train, run, trained, change):
    path = trained / 'ckpt.pt'
    saved = torch.load(path, weights_only=True)
    FOREIGN[change](saved)
    for other in trained.glob('*.pt'):  # which would be taken instead
        other.unlink()
    torch.save(saved, path)
    one_line(train('--init_from=resume'), ['train.py: '])
    if change not in ('no optimizer', 'no best_val_loss'):
        one_line(run('sample.py', f'--checkpoint={path}'), ['sample.py: '])
        one_line(train('--test', f'--checkpoint={path}'), ['train.py: '])


def test_checkpoints_cut_short(train, trained):
    """All of them: ckpt.pt, best.pt and step_0000010.pt are one file, and one other is left."""
    for name in 'ckpt.pt', 'step_0000005.pt':
        path = trained / name
        path.write_bytes(path.read_bytes()[:-1000])
    one_line(train('--init_from=resume'), ['ckpt.pt', 'damaged', 'no other checkpoint'])


def test_unwritable_folder(train, tiny):
    (tiny / 'file').write_text('')
    one_line(train('--out_dir=file/run'), ['file/run', 'out_dir'])


@pytest.mark.parametrize('args, named', [
    (['--start='], ['empty', 'at least one character']),
    (['--start=FILE:none.txt'], ['none.txt']),
    (['--start=FILE:empty.txt'], ['empty.txt', 'empty']),
    (['--start=\u4e16'], ['\u4e16', '27 characters']),
    (['--temperature=-1'], ['temperature = -1']),
    (['--top_k=-1'], ['top_k = -1']),
    (['--top_p=0'], ['top_p = 0']),
    (['--num_samples=0'], ['num_samples = 0']),
    (['--max_new_tokens=0'], ['max_new_tokens = 0']),
    (['--out_dir=nowhere'], ['nowhere', 'no checkpoint']),
    (['--checkpoint=text.txt'], ['text.txt', 'no checkpoint']),
    (['--init_from=gpt3'], ['gpt3']),
    (['--init_from=scratch'], ['scratch']),
    (['--device=cuda:9'], ['cuda:9']),
    (['--stpo=x'], ['stpo', 'stop']),
])
def test_sample(run, tiny, trained, args, named):
    (tiny / 'empty.txt').touch()
    one_line(run('sample.py', *args), named)


@pytest.mark.parametrize('args, named', [
    ([], ['no folder here', 'train first']),
    (['nowhere'], ['nowhere']),
    (['empty'], ['empty', 'no line of a run']),
    (['noise'], ['noise', 'no line of a run']),
    (['--shwo'], ['shwo']),
])
def test_plot_loss(run, tmp_path, args, named):
    for name, content in ('empty', b''), ('noise', bytes(range(256)) * 50):
        (tmp_path / 'logs' / name).mkdir(parents=True)
        (tmp_path / 'logs' / name / 'training.log').write_bytes(content)
    cwd = tmp_path / 'logs' if args in (['empty'], ['noise']) else tmp_path
    one_line(run('plot_loss.py', *args, cwd=cwd), named)
