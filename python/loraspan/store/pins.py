"""Pins: files on which a reader holds a lock, so that nobody removes what it reads."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout

from loraspan.errors import StoreError
from loraspan.store import files
from loraspan.store.format import PIN, PIN_FILE, PINS, DamagedError, manifest_name
from loraspan.store.lock import lock_on, locked
from loraspan.store.reader import wanted


@contextlib.contextmanager
def pin(path: str | os.PathLike[str], generation: int | None = None, *, timeout: float = 30.0) -> Iterator[int]:
    """Keep a generation from being removed by :func:`gc` for as long as the context is open.

    A pin is a file in the folder that is locked by this process, and ends with it: one whose process was killed counts
    no more. Writers do not wait for pins, and a pin waits for nobody but :func:`gc`.

    Args:
        path: the folder.
        generation: which one to keep; None takes the current one.
        timeout: seconds to wait for :func:`gc`.

    Yields:
        The number of the generation, for :func:`open_at`.

    Raises:
        StoreError: if the folder is no store, no longer has the generation, or may not be written to.
        ArgumentError: if there never was such a generation.

    Example:
        >>> import tempfile
        >>> from loraspan.collection.collection import Collection
        >>> from loraspan.store import open, pin, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     number = save(Collection({}), folder)
        ...     with pin(folder) as number:
        ...         len(open(folder, generation=number).tasks)
        0
    """
    folder = Path(path)
    try:
        wanted(folder, generation)
        # gc holds this lock from when it looks for pins until it has removed what they do not keep
        with locked(folder, timeout, PINS):
            number = wanted(folder, generation)
            if not (folder / manifest_name(number)).exists():
                raise StoreError(f"{folder}: generation {number} is no longer there: open another one")
            file = folder / f"{PIN}{number:06d}-{uuid.uuid4().hex}"
            files.close(files.create(file))
            lock = lock_on(file)
            lock.acquire(timeout=timeout)
    except DamagedError as error:
        raise error.within(folder) from None
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{folder}: generation cannot be pinned: {error.strerror or error}: a pin is a file in the folder; open it "
            "without one, and see that nobody collects garbage there meanwhile"
        ) from error
    try:
        yield number
    finally:
        lock.release()
        # whoever may lock it now will find that nobody holds it, and remove it
        with contextlib.suppress(OSError):
            files.remove(file)


def pinned(folder: Path, *, clean: bool) -> set[int]:
    """Give the generations that readers hold, and, with ``clean``, remove the pins of those that have ended."""
    held: set[int] = set()
    for entry in sorted(folder.iterdir()):
        match = PIN_FILE.fullmatch(entry.name)
        if not match or int(match[1]) in held:
            continue
        lock = lock_on(entry)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            held.add(int(match[1]))
            continue
        lock.release()
        if clean:
            files.remove(entry)
    return held
