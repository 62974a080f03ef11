"""What the operating system offers for folders: two names exchanged in one step, names made to last, a sign of life."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from loraspan.errors import StoreError

# renameat2(2) and renamex_np(2): RENAME_EXCHANGE and RENAME_SWAP happen to be the same number
_SWAP = 2
_HERE = -100
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or its file system cannot, and then nothing is done.

    Raises:
        OSError: if it can, and did not.
    """
    a, b = os.fsencode(one), os.fsencode(other)
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        result = library.renameat2(_HERE, a, _HERE, b, _SWAP)  # type: ignore[union-attr]
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        result = library.renamex_np(a, b, _SWAP)
    else:
        return False
    number = ctypes.get_errno()
    if result and number not in _CANNOT:
        raise StoreError(number, os.strerror(number), str(one), None, str(other))
    return not result


def sync_folder(path: Path) -> None:
    """Make the names in a folder last through a loss of power."""
    if os.name == "nt":
        return  # there a folder cannot be opened for this
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # such a file system has no way to ask for it, and keeps names in its own time
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def mark(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, by which :func:`alive` sees that its process lives."""
    if os.name == "nt":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # a file system without locks has no signs of life either
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def alive(folder: Path) -> bool:
    """Tell whether a process may still be at work in a folder: True if it is marked, or that cannot be told."""
    if os.name == "nt":
        return True
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
