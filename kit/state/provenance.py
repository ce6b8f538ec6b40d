"""config.json and source.zip: with which settings a run was made, where, by which command and which code."""

import io
import json
import os
import platform
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch

from kit.base import files, peers
from kit.base.errors import ROOT, reason
from kit.state import checkpoints
from kit.watch import runlogs


def record(folder, config, facts, step, sinks):
    """
    Write both into the folder of a run. One that goes on adds its launch to config.json; where it runs other code,
    that comes beside the first as source_0002000.zip, after the step from which on it ran. No archive is written over.
    facts: what else is known of the run. sinks: {name: where this launch writes}, for a resume to go on there.
    """
    folder = Path(folder)
    launches = runlogs.read_config(folder)['launches']
    code = collect_source()
    names = ['source.zip', f'source_{step:07d}.zip', *(f'source_{step:07d}.{i}.zip' for i in range(1, 1000))]
    source = next(folder / name for name in names if read_source(folder / name) in (None, code))
    launches.append({
        'step': step, 'time': time.strftime('%Y-%m-%d %H:%M:%S %z'), 'command': [sys.executable, *sys.argv],
        'source': source.name, 'git': commit(), 'versions': checkpoints.versions(), 'machine': machine(),
        'sinks': sinks, 'torchrun': peers.agent(),
    })
    try:
        files.write_whole(folder / 'config.json', json.dumps(
            {'settings': config, 'facts': facts, 'launches': launches}, indent=1) + '\n')
        if not os.path.lexists(source):
            packed = io.BytesIO()
            with zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as archive:
                for name, content in code.items():
                    archive.writestr(name, content)
            files.write_whole(source, packed.getvalue())
    except OSError as error:
        print(f'WARNING: config.json or source.zip could not be written to {folder} ({reason(error)})')


def collect_source():
    """{name: bytes} of the scripts, kit, and the config files on the command line."""
    paths = [*ROOT.glob('*.py'), *ROOT.glob('kit/**/*.py')]
    source = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sorted(paths)}
    for word in sys.argv[1:]:
        path = Path(word) if os.path.exists(word) else ROOT / word
        if word.endswith('.py') and os.path.isfile(path):
            source[f'config/{path.name}'] = path.read_bytes()
    return source


def read_source(path):
    """{name: bytes} of a source.zip; None where there is none, {} where it is damaged."""
    if not os.path.lexists(path):
        return None
    if not os.path.isfile(path):
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # a broken archive raises many kinds
        return {}


def machine():
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {'name': platform.node(), 'system': platform.platform(), 'cpus': os.cpu_count(), 'gpus': gpus}


def commit():
    """The git commit of the scripts, '+' where they were changed since; None where there is no repository."""
    words = ['git', 'describe', '--always', '--abbrev=40', '--exclude=*', '--dirty=+']
    try:
        return subprocess.run(words, cwd=ROOT, text=True, capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
