"""plot_loss.py, from logs as they come: ours, nanoGPT's, resumed, torn, with NaN."""

import pytest

from kit import runlogs

NANOGPT = """number of parameters: 10.65M
step 0: train loss 4.2874, val loss 4.2823
iter 0: loss 4.2649, time 31527.02ms, mfu -100.00%
iter 10: loss 3.1, time 30.50ms, mfu 12.10%
step 20: train loss 2.5, val loss 2.6
saving checkpoint to out
step 20: train loss 2.4, val loss 2.55
iter 20: loss nan, time 30.50ms, mfu 12.10%
iter 30: loss 2."""


def test_logs_are_read(tmp_path):
    (tmp_path / 'log').write_text(NANOGPT)
    curves = runlogs.read(tmp_path / 'log')
    assert curves['train'] == {0: 4.2874, 20: 2.4} and curves['val'] == {0: 4.2823, 20: 2.55}
    assert list(curves['loss']) == [0, 10, 20, 30] and curves['loss'][10] == 3.1


@pytest.mark.parametrize('args, picture', [([], 'checkpoints/loss_curve.png'), (['a', 'b.log'], 'comparison.png'),
                                           (['a'], 'a/loss_curve.png'), (['b.log'], 'loss_curve.png')])
def test_pictures(train, run, tiny, args, picture):
    train('--out_dir=a')
    train()
    (tiny / 'b.log').write_text(NANOGPT)
    result = run('plot_loss.py', *args)
    assert result.status == 0, result.err
    assert result.out == f'wrote {picture}\n'
    assert (tiny / picture).read_bytes().startswith(b'\x89PNG') and (tiny / picture).stat().st_size > 10_000
