"""
A fixed sample of what tests/hostile.py does by the hundred: every script with hostile values of every kind of setting,
files that are damaged, scripts that run at once. The long campaigns run by hand: python tests/hostile.py
"""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('words, tried', [
    (['--only=commands', '--n_commands=50',
      '--scripts=train.py,sample.py,prepare.py,plot_loss.py,checkpoint_averaging.py'], 50),
    (['--only=commands', '--n_commands=6', '--scripts=sweep.py'], 6)])
def test_nothing_ends_in_a_traceback_or_is_lost(words, tried):
    """Not within pytest, whose threads would not come along into a fork."""
    done = subprocess.run([sys.executable, ROOT / 'tests/hostile.py', *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].split() == ['commands', str(tried), '0'], done.stdout
