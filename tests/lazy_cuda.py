"""A stand-in for CUDA's streams that does every copy as late as it may, and sees one that comes too early.

Work at hand is done at once, as calls on shadows are; a copy on another stream waits until something waits for it. So
what reads a buffer before its copy, or writes to pinned memory that has not been copied yet, gets wrong numbers; and a
copy to a buffer that is in use, without having waited for that, is a fault.
"""

import contextlib
import threading

import torch

import shadow
from loraspan import _device


class Event:
    """So far a stream had got when it was recorded."""

    def __init__(self, stream, position):
        self.stream, self.position = stream, position

    def synchronize(self):
        self.stream.run(self.position)


class Stream:
    def __init__(self, device=None, *, current=None):
        self.device, self.current = device, current
        self.asked, self.done = [], 0
        # how far the work at hand is known to have got
        self.seen = 0

    def record_event(self):
        return Event(self, len(self.asked))

    def wait_event(self, event):
        if self.current is None:
            event.synchronize()
        else:
            self.asked.append(lambda: self._see(event.position))

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def _see(self, position):
        self.seen = max(self.seen, position)

    def run(self, position):
        while self.done < position:
            self.asked[self.done]()
            self.done += 1


class Cuda:
    """One GPU, with its current stream and the copies asked for on others."""

    def __init__(self, machine):
        self.place, self.rules = machine.place, machine.rules
        self.put = machine.put
        self.current = Stream()
        self.copies = 0
        self.used = {}
        self._there = threading.local()

    def stream(self, device=None):
        return Stream(device, current=self.current)

    @contextlib.contextmanager
    def on(self, stream):
        self._there.stream = stream
        yield
        self._there.stream = None

    def copy(self, target, source):
        """What a copy that need not wait does: wait for its turn on its stream."""
        stream, self.copies = self._there.stream, self.copies + 1

        def do():
            # the last use of the buffer, if it had one
            if stream.seen < self.used.get(_memory(target), 0):
                raise shadow.Fault("a copy to a buffer does not wait for the work that reads it")
            target.inner.copy_(source)

        stream.asked.append(do)

    def use(self, x):
        """Do some work that reads a matrix."""
        self.current.asked.append(lambda: None)
        self.current.run(len(self.current.asked))
        for block in x.blocks:
            self.used[_memory(block)] = len(self.current.asked)


def _memory(tensor):
    return tensor.inner.untyped_storage().data_ptr()


REAL = torch.cuda.is_available()


class Real:
    """The GPU that is there."""

    def __init__(self):
        self.place = torch.device("cuda", torch.cuda.current_device())

    def put(self, tensor):
        return tensor.to(self.place)


def _no_kernels(name, *_):
    # shadows are no memory that kernels could read
    raise ImportError("no kernels for shadows", name=name)


@contextlib.contextmanager
def cuda(monkeypatch):
    """Run on the GPU that is there, or on a machine with such a one."""
    if REAL:
        yield Real()
        return
    monkeypatch.setattr(_device, "_find", _no_kernels)
    with shadow.machine("cuda", monkeypatch) as machine:
        found = Cuda(machine)
        machine.rules.copy_later = found.copy
        monkeypatch.setattr(torch.cuda, "Stream", found.stream)
        monkeypatch.setattr(torch.cuda, "stream", found.on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: found.current)
        yield found
