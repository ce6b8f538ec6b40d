"""bench/vs_nanogpt.py with a stand-in for a checkout of nanoGPT; of the real one bench/results.md tells."""

import json
import runpy

import pytest
from conftest import ROOT, copy_folder

BENCH = 'bench/vs_nanogpt.py'
GET_BATCH = '''
def get_batch(split):
    data = np.memmap(os.path.join(data_dir, split + '.bin'), dtype=np.uint16, mode='r')
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy((data[i:i+block_size]).astype(np.int64)) for i in ix])
    return x.to(device), x.to(device)
raise SystemExit("this is no nanoGPT")
'''


@pytest.fixture
def peer(tiny):
    """A folder with what a checkout of nanoGPT has, whose train.py ends at once; beside it data/shakespeare_char."""
    copy_folder(tiny / 'data/tiny', tiny / 'data/shakespeare_char')
    (tiny / 'peer').mkdir()
    for name in 'train.py', 'model.py', 'sample.py':
        (tiny / 'peer' / name).write_text(GET_BATCH)
    return tiny / 'peer'


@pytest.mark.parametrize('args, told', [
    ([], '--peer=CHECKOUT'),
    (['--peer=nowhere'], 'no train.py is there; git clone'),
    (['--peer=peer', '--parts=batches,lunch'], "'lunch' is no part; there are recipe, default"),
    (['--peer=peer', '--json=nowhere/found.json'], 'there is no such folder'),
])
def test_a_mistake_is_one_line(run, peer, args, told):
    result = run(BENCH, *args)
    assert result.status == 2 and result.err.count('\n') == 1 and told in result.err


def test_a_part_is_a_row_and_one_that_fails_is_a_line(run, peer, tmp_path):
    folder = tmp_path / 'temporary'
    folder.mkdir()
    result = run(BENCH, '--peer=peer', '--parts=gpt2,launch,batches', '--runs=2', '--json=found.json',
                 env={'TMPDIR': str(folder), 'CUDA_VISIBLE_DEVICES': ''})
    assert result.status == 1
    told, = [line for line in result.err.splitlines() if line.startswith('vs_nanogpt.py: ')]
    assert 'launch: nanoGPT ended too early (this is no nanoGPT); to see more: cd ' in told
    assert 'peer/train.py config/train_shakespeare_char.py' in told and '--compile=False' in told
    assert 'gpt2 is left out' in result.out
    found = json.loads((tmp_path / 'found.json').read_text())['found']
    (what, both), = found['batches'].items()
    theirs, ours = (sum(both[side]) / 2 for side in ('nanoGPT', 'flatGPT'))  # of two the mean is the median
    *_, ruler, row = result.out[result.out.index('\n## '):].splitlines()
    assert set(ruler) == set('|-:') and row.startswith(f'| batches | {what} | as they come | ')
    assert row.endswith(f') | {theirs / ours:.2f} |') and list(found) == ['batches']
    assert not list(folder.iterdir()), 'it leaves nothing behind'


def test_a_step_is_the_median_stretch_between_iter_lines():
    per_step = runpy.run_path(str(ROOT / BENCH))['per_step']
    times = {0: 10, 10: 100, 20: 101, 30: 102, 40: 109, 50: 110.5}  # a compiler at first, and once the machine is busy
    lines = [(seconds, f'iter {step}: loss 4.1, time 9.9ms, mfu 1.00%') for step, seconds in times.items()]
    lines.insert(2, (100.5, 'saving checkpoint to x'))
    assert per_step(lines, first=10) == pytest.approx(125)  # of 100, 100, 700 and 150
    assert per_step(lines, first=40) == pytest.approx(150)
