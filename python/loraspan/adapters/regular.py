"""Open a file to read it, and nothing that only looks like one."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

from loraspan.errors import StoreError


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file.

    A pipe would keep its reader waiting for ever, and a device may have no end; a link to a regular file is one.

    Raises:
        OSError: if it cannot be opened; a :class:`StoreError`, with the same attributes, if it is no regular file.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file, open_regular(file.name) as same:
        ...     same.read()
        b''
    """
    # to open a pipe for reading waits for its writer, unless this flag is there
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreError(errno.EINVAL, "it is no regular file", os.fspath(path))
    return os.fdopen(descriptor, "rb")
