"""A file system that stops at a chosen step, and one that then forgets what was never made to last."""

import threading

from loraspan.store import files

STEPS = ("make_folder", "create", "write", "sync", "rename", "sync_folder", "remove")


class Crash(BaseException):
    """Not an Exception: nothing that tidies up after errors may catch it."""


class Disk:
    """Count the steps of a save, stop at step ``stop``, and refuse everything after it.

    ``torn`` stops in the middle of a write and after any other step rather than before it.
    """

    def __init__(self, monkeypatch, stop=None, *, torn=False):
        self.stop, self.torn, self.steps, self.dead = stop, torn, [], False
        self._lock = threading.RLock()
        self._paths, self._volatile, self._changes = {}, set(), []
        self._honest = {name: getattr(files, name) for name in STEPS}
        for name in STEPS:
            monkeypatch.setattr(files, name, lambda *args, name=name: self._step(name, *args))

    def _step(self, name, *args):
        with self._lock:
            if self.dead:
                raise Crash
            self.steps.append(name)
            if len(self.steps) - 1 != self.stop:
                return self._do(name, *args)
            self.dead = True
            if self.torn:
                self._do(name, args[0], args[1][: len(args[1]) // 2]) if name == "write" else self._do(name, *args)
            raise Crash

    def _do(self, name, *args):
        target = {"rename": args[-1], "remove": args[0]}.get(name)
        before = target.read_bytes() if target is not None and target.exists() else None
        # what lasts is counted here, so nobody waits for the disk below
        result = self._honest[name](*args) if name not in ("sync", "sync_folder") else None
        if name == "create":
            self._paths[result] = args[0]
            self._volatile.add(args[0])
        elif name == "sync":
            self._volatile.discard(self._paths[args[0]])
        elif name == "rename":
            if args[0] in self._volatile:
                self._volatile.remove(args[0])
                self._volatile.add(args[1])
            self._changes.append((*args, before))
        elif name == "remove" and before is not None:
            self._changes.append((None, *args, before))
        elif name == "sync_folder":
            self._changes.clear()
        return result

    def lose_power(self, *, names, data):
        """Forget ``"all"`` renames and removals that no folder was synced after, or all ``"but the last"``.

        With ``data``, forget half of every file that was not synced too. A disk keeps its own order.
        """
        for path in self._volatile if data else ():
            if path.exists():
                content = path.read_bytes()
                path.write_bytes(content[: len(content) // 2])
        lost = {"none": [], "all": self._changes, "but the last": self._changes[:-1]}[names]
        for old, new, before in reversed(lost):
            if old is not None and new.exists():
                new.replace(old)
            if before is not None:
                new.write_bytes(before)
