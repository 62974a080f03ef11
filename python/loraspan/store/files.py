"""Every operation on files that a writer does, one function each: what a crash can fall between."""

from __future__ import annotations

import os
from pathlib import Path

from loraspan.adapters import exchange


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
    exchange.sync_folder(path)


def remove(path: Path) -> None:
    """Remove a file."""
    path.unlink(missing_ok=True)
