"""A run that is killed a few times; tests/chaos.py does sixty, and tests/hostile.py all kinds of runs."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from kit.base import devices


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs os.fork')
@pytest.mark.parametrize('settings', [
    '', '--log_interval=1000 --grad_clip=0.5 --dataset=rows --batch_mode=packed --mask_prob=0.2 --sampling=shuffle'])
@pytest.mark.long
def test_killed_five_times(settings):
    """Not within pytest, whose threads would not come along into a fork."""
    command = [sys.executable, ROOT / 'tests/chaos.py', '--kills=5', '--steps=300', f'--settings={settings}']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'kills': 5" in done.stdout and "'launches': 6" in done.stdout, done.stdout


def test_measuring_the_machine_draws_no_numbers_of_the_run():
    """It comes at the first iter line of a launch, and a checkpoint may be next."""
    before = torch.get_rng_state()
    assert devices.peak_flops.__wrapped__(torch.device('cpu'), 'bfloat16') > 0
    assert torch.equal(torch.get_rng_state(), before)
