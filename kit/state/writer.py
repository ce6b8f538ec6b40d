"""
Saves that do not stop the training: what is saved is copied into the memory of the host, and a thread writes the copy
while the training goes on. All that checkpoints.py promises holds for it too.

Rank 0 writes a checkpoint into one file; with shards, see shards.py, all ranks do, each its own, and their threads talk
to each other beside what the main threads say. How it went, rank 0 knows and wait() tells all of them.
"""

import atexit
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

from kit.base import ranks
from kit.state import checkpoints, shards


class Writer:
    """
    Writes the checkpoints of a run into its folder, one after the other, and deletes what is past keep_last. Who reads
    the folder waits first. Lines are printed by whoever waits, never by the thread, so that their order is that of the
    calls; where an exception ends the script before that, at its end, behind the write. stop_on_error: the line of a
    save that failed ends the script, with several processes where all of them wait. sharded: write shards; then all
    ranks call write(), else rank 0 alone does.
    """

    def __init__(self, folder, keep_last, stop_on_error=False, sharded=False):
        self.folder, self.keep_last, self.stop_on_error = Path(folder), keep_last, stop_on_error
        self.sharded, self.last_words = sharded, ''
        self.group = ranks.group_of_a_thread() if sharded else None
        if sharded:  # imported here, for no thread can while the interpreter ends
            import kit.state.dcp  # noqa: F401
        self.thread, self.lines, self.failure, self.went_well = None, [], '', None
        self.seconds = 0.0  # that the last write took
        self.copies = Copies(gathers=not sharded)
        atexit.register(self.rescue)

    def write(self, checkpoint, names, parameters=None, first=None):
        """
        Wait for the write before, copy the checkpoint and begin to write it, as checkpoints.save does. first() comes
        before that, in the thread too: what must be on the disk when the checkpoint is.
        """
        self.finish()
        if not (ranks.is_main or self.sharded or ranks.is_fsdp):
            return
        taken, failure = None, ''
        try:
            taken = self.copies.take(checkpoint)
        except Exception as error:  # memory, of the host or of a device; and no save is worth a run
            failure = checkpoints.failure(error, self.folder)
        if not (ranks.is_main or self.sharded):
            return
        failures = ranks.from_all(failure) if self.sharded else [failure]  # no rank writes for itself alone
        if any(failures):
            self.fail(next(filter(None, failures)))
            return
        run, arguments = self.run_sharded if self.sharded else self.run, (taken, names, parameters, first)
        try:
            # no daemon: the script ends behind it
            self.thread = threading.Thread(target=run, args=arguments, name=ranks.WRITING)
            self.thread.start()
        except Exception as error:
            self.thread = None
            if self.sharded:
                run(*arguments)  # the threads of the others wait for this rank's
            else:
                self.fail(checkpoints.failure(error, self.folder))

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

    def run_sharded(self, checkpoint, names, parameters, first):
        begin = time.perf_counter()

        def prepare():
            if first:
                first()
            if ranks.is_main:
                with suppress(OSError):
                    shards.prune(self.folder)  # what a killed save has left may be what fills the disk
        try:
            small = shards.write(checkpoint, self.folder, self.group, parameters, prepare)
        except BaseException as error:
            self.fail(checkpoints.failure(error, self.folder))
        else:
            if ranks.is_main:
                self.run(small, names, parameters, None)
            if self.failure:
                with suppress(OSError):
                    shards.prune(self.folder)  # those of the file that is not there
        self.seconds = time.perf_counter() - begin

    def fail(self, words):
        """Nothing was saved; rank 0 says why."""
        self.failure = words if ranks.is_main else ''

    def rescue(self):
        """Where an exception ends the script, what a write had to say is said behind it."""
        self.stop_on_error = False
        self.finish()
        checkpoints.report(self.last_words, stop_on_error=False)

    def wait(self, block=True):
        """
        Until the last checkpoint is written. Returns whether all since the last call were, None where there was none:
        the same on all ranks, which all call it. Without block what there is to say of a write that has ended is said,
        and the next call with block returns how it went.
        """
        if not block:
            if not self.is_writing:
                self.finish()
            return None
        if not ranks.is_main:
            self.finish()
        return ranks.from_main(self.outcome)

    def outcome(self):
        self.finish()
        went_well, self.went_well = self.went_well, None
        if self.last_words:
            checkpoints.report(self.last_words, stop_on_error=True)
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
            if self.stop_on_error and ranks.world_size > 1:
                self.last_words = failure  # one process alone must not end here, while the others go on
            else:
                checkpoints.report(failure, self.stop_on_error)


class Copies:
    """
    Copies of checkpoints in the memory of the host, one at a time: the next one takes the memory of the one before, for
    the system takes longer to hand out memory than to copy.
    """

    def __init__(self, gathers=True):
        """gathers: of a tensor in parts all, to which all processes give their part; else what this one has of it."""
        self.gathers = gathers
        self.memory = []  # storages of the host
        self.of = {}  # which of them holds the copy of a storage, by what torch.save, too, tells storages apart

    def take(self, checkpoint):
        """Containers and tensors as they are now; tensors that share memory, as tied weights do, share it here too."""
        self.of, self.n, self.error = {}, 0, None
        taken = shards.over_tensors(checkpoint, lambda _, tensor: self.attempt(tensor.detach()))
        if self.error:
            raise self.error
        del self.memory[self.n:]
        return taken

    def attempt(self, tensor):
        """Copy a tensor; an error is raised by take, once all processes have given their parts of all that follow."""
        is_part = self.gathers and ranks.is_part(tensor)
        place = ranks.local(tensor).untyped_storage()._cdata if is_part else None
        if is_part and place not in self.of:
            self.of[place], whole = None, ranks.whole(tensor)
        if self.error or self.gathers and not ranks.is_main:  # this one keeps nothing
            return None
        try:
            if is_part and self.of[place] is None:
                whole = whole.clone(memory_format=torch.contiguous_format)
                self.of[place] = self.storage(whole.untyped_storage())
            if is_part:
                return torch.empty(0, dtype=tensor.dtype).set_(self.of[place]).view(tensor.shape)
            return self.tensor(tensor)
        except Exception as error:
            self.error = error

    def tensor(self, tensor):
        if is_traceable_wrapper_subclass(tensor):  # a DTensor: a copy of what this rank has of it
            return transform_subclass(tensor, lambda _, inside: self.tensor(inside.detach()) if (
                isinstance(inside, torch.Tensor)) else inside)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            return tensor.to('cpu', copy=True)  # no checkpoint of ours has these
        storage = tensor.untyped_storage()
        if storage._cdata not in self.of:
            self.of[storage._cdata] = self.storage(storage)
        here = self.of[storage._cdata]
        return torch.empty(0, dtype=tensor.dtype).set_(here, tensor.storage_offset(), tensor.shape, tensor.stride())

    def storage(self, storage):
        """Copy one storage more of a checkpoint."""
        i, self.n = self.n, self.n + 1
        if i == len(self.memory) or self.memory[i].nbytes() != storage.nbytes():
            self.memory[i:i + 1] = [torch.UntypedStorage(storage.nbytes())]
        self.memory[i].copy_(storage)
        return self.memory[i]
