"""One writer at a time: an advisory lock of the operating system on a file of the store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from loraspan.errors import StoreError
from loraspan.store import files
from loraspan.store.format import LOCK


@contextlib.contextmanager
def locked(folder: Path, timeout: float, name: str = LOCK) -> Iterator[None]:
    """Hold the lock of a store.

    Raises:
        StoreError: if somebody else has held it for ``timeout`` seconds, or the file system has no locks.
    """
    from filelock import FileLock, Timeout

    path = folder / name
    # made here, so that its mode follows the umask and whoever may write to the folder may lock it
    with contextlib.suppress(FileExistsError):
        files.close(files.create(path))
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise StoreError(
            f"{folder}: another writer has held {name} for {timeout:g} s: wait until it is done, and repeat"
        ) from None
    try:
        yield
    finally:
        lock.release()
