"""A run that is killed five times; tests/chaos.py does sixty."""

import os

import pytest
from chaos import chaos


@pytest.mark.skipif(os.name == 'nt', reason='processes are killed')
def test_killed_five_times(tmp_path, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    found = chaos(tmp_path, kills=5, steps=500)
    assert found['kills'] == 5 and found['launches'] == 6
