"""Every change that a process makes to a disk, counted, and what goes wrong at one of them."""

import contextlib
import errno
import os
import signal
import sys
import threading

from loraspan.adapters import publish

# what makes, fills, names or removes a file or a folder
CHANGES = ("open", "write", "fsync", "rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir")
_OPENS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_TAKES_ROOM = ("open", "write", "fsync", "mkdir")


class Steps:
    """Replace the functions of ``os`` by ones that count, and stop or fail at step ``stop``; for a process that ends.

    Args:
        kind: ``"kill"`` ends the process before the step, ``"torn"`` in the middle of a write and after any other step,
            both by SIGKILL; ``"full"`` lets this and every later step fail that takes room on a disk, as one that is
            full does; ``"broken"`` lets this step alone fail, as a bad sector does. None counts.
        stop: the step, counted from 0.
    """

    def __init__(self, kind=None, stop=-1):
        self.seen, self.uncounted = [], []
        self._kind, self._stop, self._lock = kind, stop, threading.RLock()
        self._honest = {name: getattr(os, name) for name in CHANGES}

    def install(self):
        """Count from here on."""
        for name in CHANGES:
            setattr(os, name, lambda *args, name=name, **options: self._call(name, *args, **options))
        honest = publish.exchange
        publish.exchange = lambda *args: self._step("exchange", honest, args, {})
        sys.addaudithook(self._audit)
        return self

    def _call(self, name, *args, **options):
        honest = self._honest[name]
        flags = args[1] if name == "open" and len(args) > 1 else options.get("flags", _OPENS)
        if name == "open" and not flags & _OPENS:
            return honest(*args, **options)
        return self._step(name, honest, args, options)

    def _step(self, name, honest, args, options):
        with self._lock:
            number = len(self.seen)
            self.seen.append(name)
            if number == self._stop and self._kind in ("kill", "torn"):
                if self._kind == "torn":
                    half = (args[0], args[1][: len(args[1]) // 2]) if name == "write" else args
                    with contextlib.suppress(OSError):
                        honest(*half, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            if number >= self._stop >= 0 and self._kind == "full" and name in _TAKES_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if number == self._stop and self._kind == "broken":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return honest(*args, **options)

    def _audit(self, event, args):
        # a file opened to be written other than by os.open would pass uncounted
        if event == "open" and args[1] is not None and set(args[1]) & set("wax+"):
            self.uncounted.append(str(args[0]))
