"""A stand-in for CUDA's streams on which everything happens as late as it may.

A copy that need not wait, and work on what it brings, are noted on their streams, and done when something waits for
them or, on the current stream, when a number on the device is asked for. So pinned memory that is written to before it
has been copied, a buffer that is copied to while work still needs it, and work that does not wait for its copy all give
wrong numbers.
"""

import contextlib
import threading

import torch

import shadow
from loraspan import _device

_LOCK = threading.RLock()


class Event:
    """So far a stream had got when it was recorded."""

    def __init__(self, stream, position):
        self.stream, self.position = stream, position

    def synchronize(self):
        self.stream.run(self.position)


class Stream:
    """What was asked for, in order, and how much of it is done."""

    def __init__(self, _device=None):
        self.asked, self.done = [], 0

    def record_event(self):
        return Event(self, len(self.asked))

    def wait_event(self, event):
        self.asked.append(event.synchronize)

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def run(self, position):
        with _LOCK:
            while self.done < position:
                self.done += 1
                self.asked[self.done - 1]()


class Cuda:
    """One GPU, with its current stream and the copies asked for on others."""

    def __init__(self, machine):
        self.place, self.rules, self.put = machine.place, machine.rules, machine.put
        self.current = Stream()
        self.copies, self.wrong = 0, 0
        self._there = threading.local()

    @contextlib.contextmanager
    def on(self, stream):
        self._there.stream = stream
        yield
        self._there.stream = None

    def copy(self, target, source):
        """Note a copy on the stream that it was asked for on."""
        self.copies += 1
        self._there.stream.asked.append(lambda: target.inner.copy_(source))

    def finish(self):
        """Do all work of the current stream."""
        self.current.run(len(self.current.asked))

    def compare(self, x, wanted):
        """Note work that finds out whether ``x`` is ``wanted`` on the device."""

        def work():
            self.wrong += not torch.equal(x.inner, wanted)

        self.current.asked.append(work)


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
        machine.rules.copy_later, machine.rules.before = found.copy, found.finish
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", found.on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: found.current)
        yield found
