"""
The other processes of a run: whether all have come, whether all run the same, and which of them answers no more.

They tell each other through the store in which they meet, a TCPStore of torch.distributed, see ranks.py: it works
before anything else does between them, and while they wait for one that hangs.
"""

import json
import os
import platform
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from kit.base.errors import Failed, fail, reason, shown

JOIN_SECONDS = 600.0  # seconds that all have to come to the first meeting
QUIET_SECONDS = 10.0  # until it is said that some are still waited for
REPLY_SECONDS = 30.0  # seconds that those that live have to say so, once one of them has waited in vain for another
GRACE_SECONDS = 2.0  # seconds that the others give one of them to tell what is wrong

REMEDY = {
    'number of processes': 'start them all with the same WORLD_SIZE, or with torchrun',
    'settings': 'start them all with the same command',
    'code': 'it must be the same on all machines, such as one commit',
    'versions': 'install the same on all machines',
    'data': 'copy the folder of the dataset from one machine to the others',
}


def duration(seconds):
    return f'{seconds / 60:g} minutes' if seconds >= 60 else f'{seconds:g} seconds'


def named(ranks, people):
    """'ranks 1, 3 (host b)' of [1, 3]; people: {rank: {'host': ..., 'pid': ...}}, in which some may be missing."""
    hosts = dict.fromkeys(people[rank]['host'] for rank in ranks if rank in people)
    where = f' (host {", ".join(hosts)})' if hosts else ''
    return f'rank{"s" * (len(ranks) > 1)} {", ".join(map(str, ranks))}{where}'


# ---------------------------------------------------------------------------------------------------------------------
# the first meeting


def reach(host, port, seconds):
    """
    Wait until somebody listens at that address; where nobody does in that time, the end. torch, too, tries again and
    again, and warns of each.
    """
    begin, is_told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, min(10.0, seconds))).close()
            return
        except OSError as error:
            if time.monotonic() > begin + QUIET_SECONDS and not is_told:
                print(f'{host}:{port}: nobody answers there yet ({reason(error)}); it is tried again, for '
                      f'{duration(seconds)} at most', flush=True)
                is_told = True
            if time.monotonic() > begin + seconds:
                fail(f'MASTER_ADDR={host} MASTER_PORT={port}: nobody answers there, tried for {duration(seconds)} '
                     f'({reason(error)}); start rank 0 there, or all with torchrun')
        time.sleep(min(0.5, seconds / 10))


def wait_for(store, keys, seconds):
    """Wait until all these keys are in the store. Returns those that are not in that time."""
    end, pause = time.monotonic() + seconds, 0.005
    while keys := [key for key in keys if not store.check([key])]:
        if time.monotonic() > end:
            break
        time.sleep(pause)
        pause = min(0.5, 1.5 * pause)
    return keys


def meet(store, rank, world_size, about, address):
    """
    Wait until all processes are there, and see that all run the same. Else rank 0 says what is wrong and all end, with
    status 2. about: {kind: {name: value}} of this process, kinds as in REMEDY. address: where they meet, in words.

    Returns the name of this meeting, with which all keys of it begin: the store still holds what the processes before a
    restart have put there, and each torchrun counts its restarts for itself.
    """
    me = {'host': platform.node(), 'pid': os.getpid(), 'once': uuid4().hex,
          'about': {'number of processes': {'WORLD_SIZE': world_size}, **about}}
    if rank:
        return join(store, rank, me, address)
    name, others = uuid4().hex, range(1, world_size)
    store.set(f'{name}/here/0', json.dumps(me))
    store.set('meeting', name)
    keys = [f'{name}/here/{other}' for other in others]
    missing = wait_for(store, keys, min(QUIET_SECONDS, JOIN_SECONDS))
    if missing and JOIN_SECONDS > QUIET_SECONDS:
        print(f'{len(missing)} of {world_size} processes have not come to {address} yet; it is waited for them, for '
              f'{duration(JOIN_SECONDS)} at most', flush=True)
        missing = wait_for(store, missing, JOIN_SECONDS - QUIET_SECONDS)
    absent = [other for other in others if f'{name}/here/{other}' in missing]
    people = [me] + [json.loads(store.get(f'{name}/here/{other}')) for other in others if other not in absent]
    if absent:
        problem = (f'{len(people)} of {world_size} processes have come to {address} within '
                   f'{duration(JOIN_SECONDS)}: {named(absent, {})} did not; see what is said there, or start all with '
                   'torchrun')
    else:
        problem = difference(people)
    verdict = json.dumps({'is_good': not problem, 'for': [person['once'] for person in people]})
    if not problem:
        store.set(f'{name}/verdict', verdict)
        return name
    try:
        fail(problem)
    finally:
        store.set(f'{name}/verdict', verdict)  # behind the line: whoever hears of it ends, and torchrun then ends all
        wait_for(store, [f'{name}/heard/{other}' for other in others if other not in absent], 5)


def join(store, rank, me, address):
    """meet, of the others than rank 0."""
    limit, name, pause = JOIN_SECONDS + 60, None, 0.005
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if store.check(['meeting']) and (newest := store.get('meeting').decode()) != name:
            name = newest
            store.set(f'{name}/here/{rank}', json.dumps(me))
        verdict = json.loads(store.get(f'{name}/verdict')) if name and store.check([f'{name}/verdict']) else {}
        if me['once'] in verdict.get('for', ()):  # else it was for one that had this rank before
            if verdict['is_good']:
                return name
            store.set(f'{name}/heard/{rank}', '')
            time.sleep(GRACE_SECONDS)  # torchrun ends the others when the first leaves, and that should be rank 0
            raise Failed(2)
        time.sleep(pause)
        pause = min(0.5, 1.5 * pause)
    fail(f'rank 0 does not answer at {address}, tried for {duration(limit)}; see what it says itself')


def difference(people):
    """What is not the same in several processes, as a line with its remedy; '' where all is. See meet."""
    who = dict(enumerate(people))
    for kind, remedy in REMEDY.items():
        things = [person['about'].get(kind, {}) for person in people]
        names = [name for name in {name: None for thing in things for name in thing}
                 if any(thing.get(name) != things[0].get(name) for thing in things)]
        if not names:
            continue
        groups = {}  # value as JSON: ranks that have it
        for rank in who:
            groups.setdefault(json.dumps(things[rank].get(names[0])), []).append(rank)
        if kind in ('code', 'data'):  # hashes, which tell a reader nothing
            words = ', another in '.join(named(ranks, who) for ranks in groups.values())
            words = f'{"dataset " * (kind == "data")}{names[0]} is one in {words}'
        else:
            words = f'{names[0]} = ' + ', '.join(f'{shown(json.loads(value))} in {named(ranks, who)}'
                                                 for value, ranks in groups.items())
        more = f' (and so do {len(names) - 1} more)' if len(names) > 1 else ''
        return f'the processes differ in their {kind}: {words}{more}; {remedy}'
    return ''


# ---------------------------------------------------------------------------------------------------------------------
# one that answers no more


def lost(error):
    """What an error says of another process: 'timeout', 'closed', or '' where it is about something else."""
    text, kinds = str(error), {kind.__name__ for kind in type(error).__mro__}
    is_torchs = kinds & {'DistBackendError', 'DistNetworkError', 'DistStoreError'}
    if not isinstance(error, RuntimeError) or not (is_torchs or 'gloo' in text):
        return ''
    return 'timeout' if 'timed out' in text.lower() or 'timeout' in text.lower() else 'closed'


def is_dead(person):
    """Whether a process of this machine has ended; of another machine's nobody here knows."""
    import psutil
    if person['host'] != platform.node():
        return False
    try:
        return psutil.Process(person['pid']).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def tell_lost(store, rank, world_size, how, minutes, error):
    """
    One line on stderr, in one of the processes, on those that answer no more. Each that lives comes here when it has
    waited in vain, and says so in the store. how: as lost() says it. minutes: that this one has waited. error: what
    torch says, in words.
    """
    others = [other for other in range(world_size) if other != rank]
    try:
        at = store.underlying_store  # torch would say with a page of its own that nobody is there
        socket.create_connection((at.host, at.port), timeout=REPLY_SECONDS).close()
        store.set(f'waited/{rank}', how)
        people = {other: json.loads(store.get(f'here/{other}')) for other in range(world_size)}
        begin, silent, dead = time.monotonic(), others, []
        while set(silent) != set(dead) and time.monotonic() < begin + (GRACE_SECONDS if dead else REPLY_SECONDS):
            silent = [other for other in others if not store.check([f'waited/{other}'])]
            dead = [other for other in silent if is_dead(people[other])]
            time.sleep(0.1)
        answered = [other for other in range(world_size) if other not in silent]
        is_timeout = b'timeout' in [store.get(f'waited/{other}') for other in answered]
        store.set(f'knows/{rank}', '')
    except (OSError, RuntimeError):  # of who holds the store
        holder = 'torchrun' if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True' else 'rank 0'
        print(f'{Path(sys.argv[0]).name}: {holder} has ended or cannot be reached ({error}), and the run cannot go on',
              file=sys.stderr, flush=True)
        return
    if rank == min(answered):
        message = words_on_lost(dead or silent, people, bool(dead), is_timeout, minutes, error)
        print(f'{Path(sys.argv[0]).name}: {message}', file=sys.stderr, flush=True)
    else:
        time.sleep(GRACE_SECONDS)
    if rank == 0:  # which may hold the store
        with suppress(OSError, RuntimeError):
            wait_for(store, [f'knows/{other}' for other in answered], GRACE_SECONDS)


def words_on_lost(ranks, people, is_dead, is_timeout, minutes, error):
    """The line of tell_lost."""
    logs = "torchrun's --log-dir=logs --tee=3 keeps what each process says"
    each = ', '.join(f'rank {rank}' + (f' (host {people[rank]["host"]}, process {people[rank]["pid"]})'
                                       if rank in people else '') for rank in ranks)
    have = 'has' if len(ranks) == 1 else 'have'
    if not ranks:
        return f'the connection between the processes broke, and all of them are there ({error}); {logs}'
    if is_dead:
        return f'{each} {have} ended, and the run cannot go on; {logs}'
    if not is_timeout:
        return f'{each} {have} ended or cannot be reached ({error}), and the run cannot go on; {logs}'
    pid = people[ranks[0]]['pid'] if ranks[0] in people else 'PID'
    return (f'{each} {have} not answered for {minutes:g} minutes (--timeout), and the run ends; while one hangs, '
            f'py-spy dump --pid {pid} shows where, and {logs}')


# ---------------------------------------------------------------------------------------------------------------------
# torchrun


def agent():
    """
    The torchrun that has started this process, and does so again after a fault: [host, pid, when it began, in seconds
    since 1970]; None where there is none. Whatever stands between the two has torchrun's variables, as this process.
    """
    import psutil
    parents = psutil.Process().parents() if 'TORCHELASTIC_RUN_ID' in os.environ else []
    if not parents:
        return None
    found = parents[0]
    with suppress(psutil.Error):
        found = next(parent for parent in parents if 'TORCHELASTIC_RUN_ID' not in parent.environ())
    return [platform.node(), found.pid, found.create_time()]


def is_agent(value, others):
    """Whether what a file says was agent() is one of others; the time of a machine may have been set meanwhile."""
    try:
        return any(other[:2] == value[:2] and abs(other[2] - value[2]) < 5 for other in others if other)
    except (TypeError, IndexError, KeyError):
        return False
