"""
Runs the real scripts for the tests, each in a process of its own, forked from one that has imported torch already:
a launch takes a fifth of a second instead of three. One job a line on stdin, its exit status on stdout.
"""

import json
import os
import runpy
import sys
import traceback

import numpy  # noqa: F401
import tiktoken  # noqa: F401
import torch._dynamo  # noqa: F401
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
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
