"""
A fixed sample of what tests/hostile.py does by the hundred: every script with hostile values of every kind of setting,
and scripts that run at once. The long campaigns, with damaged files and kills too: python tests/hostile.py
"""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_nothing_ends_in_a_traceback_or_is_lost():
    """Not within pytest, whose threads would not come along into a fork."""
    words = '--only=commands,pairs', '--n_commands=24', '--n_pairs=3'
    done = subprocess.run([sys.executable, ROOT / 'tests/hostile.py', *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split() for line in done.stdout.splitlines()[-2:]] == [['commands', '24', '0'], ['pairs', '3', '0']]
