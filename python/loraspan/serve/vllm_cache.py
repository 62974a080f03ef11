"""Folders of adapters within a number of bytes, shared by processes: what was used longest ago leaves."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from loraspan.adapters import peft
from loraspan.adapters.base import Adapter
from loraspan.errors import StoreError
from loraspan.store.lock import lock_on

LOCK = "lock"
_HOLD = "held-"
# a folder of this form was being written or removed by a process that is gone, if nobody has the lock
_DRAFT = re.compile(r"\..+\.(new|old|gone)")
# seconds: to write one adapter, and that one which left the hands of a server is still read
_PATIENCE, _GRACE = 120.0, 60.0


class Cache:
    """Adapter folders by key.

    What a process took stays for as long as it runs (a lock on a file of its own says so, and ends with it); of the
    rest, the folders that were taken longest ago leave where others need their room.

    Args:
        folder: to hold them; made if it is missing.
        limit: bytes that all of them may take. Where the file system has less, that counts.
        hold: whether what this process takes stays while it runs.
        private: refuse a folder that others may have put there: for one in a place where everybody writes.
        grace: seconds for which a folder stays after it was taken.

    Raises:
        StoreError: if the folder cannot be made, or is not this user's own.
    """

    def __init__(
        self, folder: Path, limit: int, *, hold: bool = True, private: bool = False, grace: float = _GRACE
    ) -> None:
        self._folder, self._limit, self._hold, self._grace = folder, limit, hold, grace
        self._guard = threading.Lock()
        self._held: dict[str, None] = {}
        self._own: tuple[Path, object] | None = None
        self._process = os.getpid()
        try:
            folder.mkdir(mode=0o700 if private else 0o777, parents=not private, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{folder}: the cache cannot be made: {error.strerror or error}") from error
        found = folder.lstat()
        if private and (not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022):
            raise StoreError(f"{folder}: the cache needs a folder that is this user's own, and that nobody else writes")

    def take(self, key: str, make: Callable[[], Adapter]) -> Path:
        """Give the folder of a key, made if it is not there.

        Args:
            key: the name of a folder: equal keys are equal adapters.
            make: gives the adapter, called without the lock.

        Raises:
            StoreError: if there is no room, or the folder cannot be written.
        """
        with self._guard:
            with self._locked():
                if self._is_there(key):
                    return self._taken(key)
            adapter = make()
            with self._locked():
                if not self._is_there(key):
                    # what is left of one, where its files were swept
                    _remove(self._folder / key)
                    self._make_room(key, _size_of(adapter))
                    peft.write(adapter, self._folder / key)
                return self._taken(key)

    def release(self, key: str) -> None:
        """Hold a folder no longer: it may leave, as soon as its grace is over."""
        with self._guard, self._locked():
            if key in self._held:
                del self._held[key]
                self._write_held()
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self._folder / key)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import Timeout

        lock = lock_on(self._folder / LOCK)
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            raise StoreError(f"{self._folder}: another process has held the cache for {_PATIENCE:g} s") from None
        except OSError as error:
            raise StoreError(f"{self._folder}: the cache cannot be locked: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()

    def _is_there(self, key: str) -> bool:
        return all((self._folder / key / name).is_file() for name in (peft.CONFIG_NAME, peft.WEIGHTS_NAME))

    def _taken(self, key: str) -> Path:
        os.utime(self._folder / key)
        if self._hold and key not in self._held:
            self._held[key] = None
            self._write_held()
        return self._folder / key

    def _write_held(self) -> None:
        """Say what this process holds; a whole file at a time, under the lock."""
        if self._own is None or self._process != os.getpid():
            # a fork has the parent's lock, and goes on with one of its own
            self._process = os.getpid()
            path = self._folder / f"{_HOLD}{uuid.uuid4().hex}"
            lock = lock_on(path)
            lock.acquire(timeout=0)
            self._own = (path, lock)
        self._own[0].write_text("\n".join(self._held))

    def _held_by_anyone(self) -> set[str]:
        """Give the keys that living processes hold, and forget those of the others."""
        from filelock import Timeout

        held = set(self._held)
        for path in self._folder.glob(f"{_HOLD}*"):
            if self._own is not None and path == self._own[0]:
                continue
            lock = lock_on(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                held.update(path.read_text().split("\n"))
                continue
            lock.release()
            path.unlink(missing_ok=True)
        return held

    def _make_room(self, key: str, size: int) -> None:
        entries: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            if _DRAFT.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
            elif path.is_dir():
                entries.append((path.stat().st_mtime, sum(each.lstat().st_size for each in path.iterdir()), path))
        used = sum(taken for _, taken, _ in entries)
        room = min(self._limit - used, shutil.disk_usage(self._folder).free)
        held = self._held_by_anyone()
        before = time.time() - self._grace
        idle = sorted(entry for entry in entries if entry[2].name not in held and entry[0] <= before)
        if room + sum(taken for _, taken, _ in idle) < size:
            kept = sum(path.name in held for _, _, path in entries)
            raise StoreError(
                f"{self._folder}: no room for the {size} bytes of {key!r}: the cache may take {self._limit} bytes, "
                f"{room} are left, and {kept} of its {len(entries)} adapters are those of servers that run. Let it "
                "take more, or put it on a larger file system"
            )
        for _, taken, path in idle:
            if room >= size:
                return
            _remove(path)
            room += taken


def _remove(folder: Path) -> None:
    """Remove a folder, if it is there, at once for whoever looks for it."""
    if folder.is_dir() and not folder.is_symlink():
        gone = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.gone")
        folder.rename(gone)
        shutil.rmtree(gone)


def _size_of(adapter: Adapter) -> int:
    """Bound the bytes of an adapter's folder: its tensors, and some for each of their names."""
    names = sum(6 * len(path) + 512 for path in adapter.slots)
    return adapter.nbytes + sum(extra.nbytes for extra in adapter.extras.values()) + names + 8192
