"""A run that is killed five times; tests/chaos.py does sixty."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
def test_killed_five_times():
    """Not within pytest, whose threads would not come along into a fork."""
    command = [sys.executable, ROOT / 'tests/chaos.py', '--kills=5', '--steps=300']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'kills': 5" in done.stdout and "'launches': 6" in done.stdout, done.stdout
