"""Every operation on files that a writer does, one function each: what a crash can fall between."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing, and make their names last."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def create(path: Path) -> int:
    """Make a new file and give its descriptor. Its mode follows the umask."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)


def write(descriptor: int, data: memoryview) -> int:
    """Write some of ``data``, and say how many bytes it was."""
    return os.write(descriptor, data)


def sync(descriptor: int) -> None:
    """Make what was written last through a loss of power."""
    os.fsync(descriptor)


def close(descriptor: int) -> None:
    """Close a descriptor."""
    os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Give a file its name in one step, in place of whatever had it."""
    old.replace(new)


def sync_folder(path: Path) -> None:
    """Make the names in a folder last through a loss of power."""
    if os.name == "nt":
        return  # there a folder cannot be opened for this
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # such a file system has no way to ask for it, and keeps names in its own time
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file."""
    path.unlink(missing_ok=True)
