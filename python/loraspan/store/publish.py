"""Make a generation the current one: its files first, its name last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from loraspan.errors import ArgumentError, FormatError, StoreError
from loraspan.store import files
from loraspan.store import manifest as manifests
from loraspan.store.drafts import Drafts, not_replaced, tidy, unfinished
from loraspan.store.format import (
    CURRENT,
    DATA_FILE,
    LOCK,
    MANIFEST_FILE,
    PIN_FILE,
    PINS,
    TEMPORARY,
    UNFINISHED,
    manifest_name,
)
from loraspan.store.lock import locked
from loraspan.store.manifest import DataFile, Manifest
from loraspan.store.reader import current

if TYPE_CHECKING:
    from loraspan.store.opened import Opened

_LONGEST_NOTE = 10_000
AGAIN = "nothing was written; open it again and repeat the change"


class UnsyncedError(StoreError):
    """The new generation is the current one, but what made it so may not outlast a loss of power.

    Attributes:
        data: the bytes of its manifest.
        opened: the generation, where a collection was written.
    """

    data: bytes = b""
    opened: Opened | None = None


def publish(folder: Path, seen: int | None, timeout: float, make: Callable[[Drafts], Manifest]) -> bytes:
    """Write the generation after ``seen``, and give the bytes of its manifest.

    Args:
        folder: of the store.
        seen: the generation that the new one was made from; if the store is at another one, nothing is written.
        timeout: seconds to wait for another writer.
        make: writes the files that are missing, and gives the manifest. It is called with the store locked.

    Raises:
        UnsyncedError: if the generation was written, and something failed after that.
        StoreError: if another writer was faster or holds the lock, or the files cannot be written.
    """
    number, data = (seen or 0) + 1, b""
    try:
        files.make_folder(folder)
        with locked(folder, timeout):
            if (now := current(folder)) != seen:
                raise StoreError(
                    f"{folder}: another writer was faster: it is at generation {now} and was at {seen} when this "
                    f"began; {AGAIN}"
                )
            tidy(folder, seen)
            with unfinished(folder, number) as drafts:
                data = manifests.dump(make(drafts))
                _publish(folder, number, data, drafts)
    except StoreError:
        raise
    except OSError as error:
        what = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise _failed(folder, number, data, f"{folder}: cannot be written: {what}") from error
    return data


def _publish(folder: Path, number: int, data: bytes, drafts: Drafts) -> None:
    drafts.write(manifest_name(number), data)
    # every file that the manifest names, and the manifest, have to last before CURRENT names them
    files.sync_folder(folder)
    drafts.write(CURRENT, f"{number}\n".encode())
    if current(folder) != number:
        raise not_replaced(folder / CURRENT)
    files.sync_folder(folder)


def _failed(folder: Path, number: int, data: bytes, what: str) -> StoreError:
    with contextlib.suppress(OSError, FormatError):
        if data and current(folder) == number:
            error = UnsyncedError(
                f"{what}; generation {number} is the current one, and may not outlast a loss of power"
            )
            error.data = data
            return error
    return StoreError(f"{what}; the store is as it was before")


def standing(folder: Path, overwrite: bool) -> int | None:
    """Give the generation that a folder is at, None where there is none yet; refuse a folder of something else."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise StoreError(f"{folder}: a store is a folder, and this is a file: choose another path")
    generation = current(folder)
    if generation is None:
        # what the first save leaves when it is cut short
        strangers = [entry.name for entry in folder.iterdir() if not _ours(entry.name)]
        if strangers:
            raise StoreError(f"{folder}: a folder that is no store, with {strangers[0]!r} in it: choose another path")
    elif not overwrite:
        raise StoreError(
            f"{folder}: a store already, at generation {generation}: "
            "pass overwrite=True to write its next generation, or choose another path"
        )
    return generation


def check_note(operator: str, note: str) -> None:
    """Refuse a note that is no text, or too long."""
    if type(note) is not str or len(note) > _LONGEST_NOTE:
        raise ArgumentError(f"{operator}: note has to be text of at most {_LONGEST_NOTE} characters; got {note!r:.80}")


def check_files(folder: Path, wanted: Sequence[DataFile]) -> None:
    """See that files that stand are there, and of their size."""
    for data in wanted:
        try:
            size = (folder / data.file).stat().st_size
        except OSError as error:
            raise StoreError(f"{folder / data.file}: cannot be read: {error.strerror}; {AGAIN}") from error
        if size != data.size:
            raise StoreError(f"{folder / data.file}: needs {data.size} bytes; it has {size}; {AGAIN}")


def now() -> str:
    """Give the time for a manifest, in UTC to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _ours(name: str) -> bool:
    patterns = (DATA_FILE, MANIFEST_FILE, PIN_FILE)
    return (
        name in (LOCK, PINS, UNFINISHED)
        or name.startswith(TEMPORARY)
        or any(pattern.fullmatch(name) for pattern in patterns)
    )
