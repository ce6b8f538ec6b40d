"""
Runs the real scripts for the tests, each in a process of its own, forked from one that has imported torch already:
a launch takes a fifth of a second instead of three. A list of jobs a line on stdin, which run side by side; their exit
statuses on stdout.
"""

import json
import os
import runpy
import signal
import sys

import numpy  # noqa: F401
import tiktoken  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
import tqdm  # noqa: F401


def run(job):
    """What python script.py would do, in this (forked) process. Never returns."""
    os.chdir(job['cwd'])
    os.environ.clear()
    os.environ.update(job['env'])
    for number, path in (1, job['stdout']), (2, job['stderr']):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = [job['script'], *job['args']]
    sys.path[0] = os.path.dirname(job['script'])
    status = 0
    try:
        runpy.run_path(job['script'], run_name='__main__')
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1 if end.code else 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # what a user sees
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_all(jobs):
    """Their exit statuses. When one fails the others are told to stop, as torchrun does it."""
    pids, statuses = [], {}
    for job in jobs:
        pids.append(os.fork())
        if pids[-1] == 0:
            run(job)
    while len(statuses) < len(pids):
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if statuses[pid]:
            for other in pids:
                if other not in statuses:
                    os.kill(other, signal.SIGTERM)
    return [statuses[pid] for pid in pids]


if __name__ == '__main__':
    for line in sys.stdin:
        print(*run_all(json.loads(line)), flush=True)
