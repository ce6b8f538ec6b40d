"""The scripts in launch/: as far as one machine can try them, several nodes being several torchruns on it."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, small_run

from kit.base import overrides

FILES = sorted((ROOT / 'launch').iterdir())
ARGS = ['--dataset=tiny', *small_run('--batch_size=4')]
STAND_INS = {
    'srun': 'shift; exec "$@"',
    'scontrol': 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi',
}


def test_what_they_say_is_there():
    """Their shell is right, and the options and settings that they give exist."""
    text = '\n'.join(path.read_text() for path in FILES)
    for path in FILES:
        assert path.suffix == '.yaml' or subprocess.run(['bash', '-n', path]).returncode == 0
    known = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--help'], capture_output=True, text=True)
    settings = overrides.read_script(ROOT / 'train.py').settings
    of_slurm = 'job-name ntasks-per-node cpus-per-task time requeue open-mode signal nodes gpus-per-node'.split()
    for word in re.findall(r'(?<=[ \n])--([a-z][\w-]+)', text):
        assert word in settings or f'--{word} ' in known.stdout.replace(',', ' ') or word in of_slurm, word
    for config in re.findall(r'config/\w+\.py', text):
        assert (ROOT / config).is_file()


def test_the_kubernetes_file():
    yaml = pytest.importorskip('yaml')
    job = yaml.safe_load((ROOT / 'launch/kubernetes.yaml').read_text())
    worker = job['spec']['pytorchReplicaSpecs']['Worker']
    pod = worker['template']['spec']
    container, = pod['containers']
    assert worker['replicas'] == job['spec']['elasticPolicy']['maxReplicas'] and job['kind'] == 'PyTorchJob'
    assert {mount['name'] for mount in container['volumeMounts']} == {volume['name'] for volume in pod['volumes']}
    grace = re.search(r'--shutdown-timeout=(\d+)', ' '.join(container['command']))
    assert int(grace[1]) < pod['terminationGracePeriodSeconds'], 'what torchrun waits for comes to its end'


def bash(folder, script, *args, **env):
    """A script of launch/ begins, with what it says in the file out."""
    os.makedirs(folder / 'bin', exist_ok=True)
    for name, line in STAND_INS.items():
        (folder / 'bin' / name).write_text(f'#!/bin/bash\n{line}\n')
        (folder / 'bin' / name).chmod(0o755)
    with open(folder / f'{script}.{env.pop("OUT", "")}.out', 'w') as out:
        env = os.environ | {'PATH': f'{folder / "bin"}:{os.environ["PATH"]}', 'PYTHON': sys.executable} | env
        return subprocess.Popen(['bash', ROOT / 'launch' / script, *args], cwd=folder, env=env, stdout=out,
                                stderr=subprocess.STDOUT)


def wait_for(folder, text, process):
    end = time.monotonic() + 90
    while not any(text in path.read_text() for path in folder.glob('*.out')):
        assert process.poll() is None and time.monotonic() < end, [path.read_text() for path in folder.glob('*.out')]
        time.sleep(0.1)


@pytest.mark.long
def test_one_node_goes_on(tiny):
    """The same line twice: the second finds that all steps are made."""
    for _ in range(2):
        assert bash(tiny, 'one_node.sh', *ARGS, GPUS='2').wait(120) == 0
    said = next(tiny.glob('one_node*.out')).read_text()
    assert 'init_from: resume (auto: checkpoints holds a checkpoint)' in said and 'processes: 2' in said


@pytest.mark.long
def test_two_nodes_are_one_run(tiny, pair):
    with_port = {'NODES': '2', 'HEAD': '127.0.0.1', 'PORT': str(29500 + os.getpid() % 400), 'GPUS': '1'}
    nodes = [bash(tiny, 'nodes.sh', *ARGS, '--out_dir=nodes', OUT=str(i), **with_port) for i in range(2)]
    assert [node.wait(120) for node in nodes] == [0, 0]
    assert pair(*ARGS[1:], '--out_dir=pair').status == 0
    one, other = (torch.load(tiny / folder / 'ckpt.pt', weights_only=True)['model'] for folder in ('nodes', 'pair'))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
def test_slurm_saves_before_the_time_is_up_and_goes_on(tiny):
    (tiny / 'launch').symlink_to(ROOT / 'launch')
    slurm = {'SLURM_JOB_ID': '7', 'SLURM_JOB_NODELIST': 'n[1-2]', 'SLURM_NNODES': '1', 'GPUS': '2'}
    args = ['--dataset=tiny', *TINY, '--architecture=modern,ngram_embeddings=64', '--eval_interval=0',
            '--save_interval=0']
    job = bash(tiny, 'slurm.sbatch', *args, '--max_iters=100000', **slurm)
    wait_for(tiny, 'iter 20:', job)
    job.send_signal(signal.SIGTERM)
    assert job.wait(90) != 0 and (tiny / 'requeued').read_text() == 'requeue 7\n'
    step = torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)['iter_num']
    again = bash(tiny, 'slurm.sbatch', *args, f'--max_iters={step + 3}', **slurm)
    assert again.wait(120) == 0 and (tiny / 'requeued').read_text() == 'requeue 7\n', 'this one has ended by itself'
    assert torch.load(tiny / 'checkpoints/ckpt.pt', weights_only=True)['iter_num'] == step + 3
