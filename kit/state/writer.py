"""
Saves that do not stop the training: what is saved is copied into the memory of the host, and a thread writes the copy
while the training goes on. All that checkpoints.py promises holds for it too.
"""

import atexit
import copy
import threading
import time
from pathlib import Path

import torch

from kit.base import ranks
from kit.state import checkpoints


class Writer:
    """
    Writes the checkpoints of a run into its folder, one after the other, and deletes what is past keep_last. Who reads
    the folder waits first. Lines are printed by whoever waits, never by the thread, so that their order is that of the
    calls; where an exception ends the script before that, at its end, behind the write. stop_on_error: the line of a
    save that failed ends the script.
    """

    def __init__(self, folder, keep_last, stop_on_error=False):
        self.folder, self.keep_last, self.stop_on_error = Path(folder), keep_last, stop_on_error
        self.thread, self.lines, self.failure, self.went_well = None, [], '', None
        self.seconds = 0.0  # that the last write took
        self.copies = Copies()
        atexit.register(self.rescue)

    def write(self, checkpoint, names, parameters=None, first=None):
        """
        Wait for the write before, copy the checkpoint and begin to write it, as checkpoints.save does. first() comes
        before that, in the thread too: what must be on the disk when the checkpoint is.
        """
        self.finish()
        if not ranks.is_main:
            ranks.gather(checkpoint)  # what rank 0 copies of a model in parts
            return
        try:
            arguments = self.copies.take(checkpoint), names, parameters, first
            self.thread = threading.Thread(target=self.run, args=arguments)  # no daemon: the script ends behind it
            self.thread.start()
        except Exception as error:  # memory, of the host or of a device; and no save is worth a run
            self.thread, self.failure = None, checkpoints.failure(error, self.folder)

    @property
    def is_writing(self):
        return self.thread is not None and self.thread.is_alive()

    def run(self, checkpoint, names, parameters, first):
        begin = time.perf_counter()
        try:
            if first:
                first()
            self.failure = checkpoints.write(checkpoint, self.folder, names, parameters, self.lines.append, threads=1)
            if not self.failure:
                checkpoints.prune(self.folder, self.keep_last, self.lines.append)
        except BaseException as error:
            self.failure = checkpoints.failure(error, self.folder)
        self.seconds = time.perf_counter() - begin

    def rescue(self):
        """Where an exception ends the script, what a write had to say is said behind it."""
        self.stop_on_error = False
        self.finish()

    def wait(self, block=True):
        """
        Until the last checkpoint is written, for all processes. Returns whether all since the last such call were, None
        where there was none. Without block: print what there is to say of one that is written, and go on.
        """
        if block:
            return ranks.from_main(self.outcome)
        if not self.is_writing:
            self.finish()

    def outcome(self):
        self.finish()
        went_well, self.went_well = self.went_well, None
        return went_well

    def finish(self):
        """Until the last checkpoint is written; prints what there was to say of it. How it went wait() tells."""
        if self.thread:
            self.thread.join()
            self.went_well = self.went_well is not False
        self.thread, lines, failure = None, self.lines, self.failure
        self.lines, self.failure = [], ''
        for line in lines:
            print(line)
        if failure:
            self.went_well = False
            checkpoints.report(failure, self.stop_on_error)


class Copies:
    """
    Copies of checkpoints in the memory of the host, one at a time: the next one takes the memory of the one before, for
    the system takes longer to hand out memory than to copy.
    """

    def __init__(self):
        self.memory = []  # storages of the host
        self.of = {}  # which of them holds the copy of a storage, by what torch.save, too, tells storages apart

    def take(self, checkpoint):
        """Containers and tensors as they are now; tensors that share memory, as tied weights do, share it here too."""
        self.of = {}
        taken = self.copied(checkpoint)
        del self.memory[len(self.of):]
        return taken

    def copied(self, value):
        if isinstance(value, torch.Tensor):
            return self.tensor(value.detach())
        if isinstance(value, dict):
            new = copy.copy(value)  # with its attributes, such as _metadata
            new.update((key, self.copied(inside)) for key, inside in value.items())
            return new
        if type(value) in (list, tuple):
            return type(value)(self.copied(inside) for inside in value)
        return value

    def tensor(self, tensor):
        if ranks.is_part(tensor):
            return self.gathered(tensor)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            return tensor.to('cpu', copy=True)  # no checkpoint of ours has these
        storage = tensor.untyped_storage()
        if storage._cdata not in self.of:
            self.of[storage._cdata] = self.storage(storage, len(self.of))
        here = self.of[storage._cdata]
        return torch.empty(0, dtype=tensor.dtype).set_(here, tensor.storage_offset(), tensor.shape, tensor.stride())

    def gathered(self, tensor):
        """A tensor in parts, whole; all processes take part, see ranks.gather."""
        place = ranks.local(tensor).untyped_storage()._cdata
        if place not in self.of:
            whole = ranks.whole(tensor).clone(memory_format=torch.contiguous_format)
            self.of[place] = self.storage(whole.untyped_storage(), len(self.of))
        return torch.empty(0, dtype=tensor.dtype).set_(self.of[place]).view(tensor.shape)

    def storage(self, storage, i):
        """Copy the i-th storage of a checkpoint."""
        if i == len(self.memory) or self.memory[i].nbytes() != storage.nbytes():
            self.memory[i:i + 1] = [torch.UntypedStorage(storage.nbytes())]
        self.memory[i].copy_(storage)
        return self.memory[i]
