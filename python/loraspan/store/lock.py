"""One writer at a time: an advisory lock of the operating system on a file of the store."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from loraspan.errors import StoreError
from loraspan.store import files
from loraspan.store.format import LOCK

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked(folder: Path, timeout: float, name: str = LOCK) -> Iterator[None]:
    """Hold the lock of a store.

    Raises:
        StoreError: if somebody else has held it for ``timeout`` seconds, or the file system has no locks.
    """
    path = folder / name
    # made here, so that its mode follows the umask and whoever may write to the folder may lock it
    with contextlib.suppress(FileExistsError):
        files.close(files.create(path))
    lock = lock_on(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise StoreError(
            f"{folder}: another writer has held {name} for {timeout:g} s: wait until it is done, and repeat"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        raise StoreError(
            f"{folder}: its file system has no locks, without which two writers would spoil each other's work: "
            "nothing was changed; copy the store to another disk, change it there, and copy it back"
        ) from error
    try:
        yield
    finally:
        lock.release()


def lock_on(path: Path) -> BaseFileLock:
    """Give a lock on a file that goes with the process that holds it, or an error where there is none."""
    try:
        # a lock that is a file outlasts its process
        return FileLock(path, fallback_to_soft=False)
    except TypeError:
        return FileLock(path)
