"""
Told to stop, a run finishes its step and saves first. SIGTERM, SIGINT (Ctrl-C) and SIGHUP (its terminal was closed)
stop it, SIGUSR1 only saves; a second Ctrl-C leaves at once.
"""

import os
import signal
import time
from contextlib import suppress

from kit.base import ranks

WORDS = '', 'SIGUSR1', 'SIGHUP', 'SIGINT', 'SIGTERM'  # '' = none; a later one outdoes an earlier one
STOP = WORDS[2:]

if hasattr(signal, 'SIGUSR1'):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # before the first step there is nothing to save, nor to die for

received = 0  # an index into WORDS
since = 0.0  # when the last SIGINT came


def listen():
    """From here on signals are noted, not obeyed at once. What nohup has turned off stays off."""
    for word in WORDS[1:]:
        if hasattr(signal, word) and (word != 'SIGHUP' or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN):
            signal.signal(getattr(signal, word), note)


def obey():
    """From here on they end the script as they would any."""
    for word in STOP:
        if hasattr(signal, word) and signal.getsignal(getattr(signal, word)) == note:
            signal.signal(getattr(signal, word), signal.default_int_handler if word == 'SIGINT' else signal.SIG_DFL)


def note(number, frame):
    global received, since
    if number == signal.SIGINT:
        # under torchrun a Ctrl-C comes twice, from the terminal and from torchrun, within moments
        if since and (ranks.world_size == 1 or time.monotonic() - since > 1):
            os._exit(130)
        since = time.monotonic()
        if ranks.is_main:  # os.write, since print may be interrupted within itself
            with suppress(OSError):
                os.write(2, b'\nCtrl-C: finishing the step and saving; once more leaves at once\n')
    received = max(received, WORDS.index(signal.Signals(number).name))


def take():
    """The name of the signal that has come since the last call, or ''; the same on all ranks, at the same step."""
    global received
    mine, received = received, 0  # before the ranks wait for each other: what comes meanwhile is for the next call
    return WORDS[ranks.highest(mine)]


def status(word):
    """What a shell sees of a process that this signal has ended: 143 or 130."""
    return 128 + getattr(signal, word)
