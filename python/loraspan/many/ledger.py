"""The ledger of a run: a folder of finished pieces, each written whole or not at all, so that a run can be resumed.

There is no list of what is done: a piece is done when its file is there. Files come under a temporary name, are made to
last, and get their name in one step; so after any interruption each piece is there in full or is made again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan.adapters.mapped import map_tensors
from loraspan.adapters.strict_json import parse_object
from loraspan.collection.headers import header, order
from loraspan.errors import FormatError, StoreError
from loraspan.store import files

_RUN = "run.json"
# the last piece: nothing is to be done but to remove the folder
DONE = "done.json"
_LOCK = ".lock"
_TEMPORARY = ".tmp-"
_NOTES = "notes"

# the pieces of a file, as bytes: they pickle as they are, which tensors do not without shared memory
Pieces = list[NDArray[np.uint8]]


def encode(named: Sequence[tuple[str, Tensor]], notes: Mapping[str, Any]) -> Pieces:
    """Give a safetensors file of tensors, with ``notes`` as JSON beside them; tensors are not copied where they lie.

    Example:
        >>> sum(map(len, encode([("x", torch.ones(2))], {})))
        136
    """
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in named]
    places = order(entries)
    first = header((entries[i] for i in places), {_NOTES: json.dumps(notes)})
    return [np.frombuffer(first, dtype=np.uint8), *(_memory(named[i][1]) for i in places)]


def _memory(tensor: Tensor) -> NDArray[np.uint8]:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    found: NDArray[np.uint8] = flat.numpy()
    return found


class Ledger:
    """The folder of one run.

    Args:
        path: where it is or will be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out, and clear away what one that was cut short had not finished.

        Raises:
            StoreError: if another run is at work, or the folder cannot be written.
        """
        from filelock import FileLock, Timeout

        try:
            files.make_folder(self.path)
            lock = FileLock(self.path / _LOCK)
            lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(f"{self.path}: another run is at work here: wait until it is done") from None
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be written: {error.strerror}") from error
        try:
            for entry in self.path.iterdir():
                if entry.name.startswith(_TEMPORARY):
                    files.remove(entry)
            yield
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"{self.path}: cannot be written: {error.strerror or error}; what is done so far is kept: mend it and "
                "run the same again"
            ) from error
        finally:
            lock.release()

    def has(self, name: str) -> bool:
        """Say whether a piece is done."""
        return (self.path / name).exists()

    def is_barren(self) -> bool:
        """Say whether no piece of work is done that took longer than looking at the sources."""
        return not any(entry.suffix == ".safetensors" for entry in self.path.iterdir())

    def write(self, name: str, pieces: Sequence[NDArray[np.uint8]]) -> None:
        """Make a piece last.

        Raises:
            StoreError: if it cannot be written.
        """
        temporary = self.path / f"{_TEMPORARY}{os.getpid()}"
        try:
            descriptor = files.create(temporary)
            try:
                for piece in pieces:
                    view, done = memoryview(piece.data), 0
                    while done < len(view):
                        done += files.write(descriptor, view[done:])
                files.sync(descriptor)
            finally:
                files.close(descriptor)
            files.rename(temporary, self.path / name)
            files.sync_folder(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                files.remove(temporary)
            raise StoreError(
                f"{self.path / name}: cannot be written: {error.strerror}; what is done so far is kept: mend it and "
                "run the same again"
            ) from error

    def write_json(self, name: str, table: Mapping[str, Any]) -> None:
        """Make a small piece last."""
        self.write(name, [np.frombuffer(json.dumps(table).encode(), dtype=np.uint8)])

    def read_json(self, name: str) -> dict[str, Any]:
        """Give a small piece back."""
        try:
            return parse_object((self.path / name).read_bytes(), str(self.path / name))
        except OSError as error:
            raise StoreError(f"{self.path / name}: cannot be read: {error.strerror}") from error

    def remove(self, names: Sequence[str]) -> None:
        """Remove pieces that others stand for by now."""
        for name in names:
            files.remove(self.path / name)

    def clear(self) -> None:
        """Remove all pieces; that which says that the run is done goes last."""
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == DONE):
            if entry.name != _LOCK:
                files.remove(entry)

    def drop(self) -> None:
        """Remove the whole folder; where a locked file cannot be removed, an empty one stays."""
        self.clear()
        with contextlib.suppress(OSError):
            files.remove(self.path / _LOCK)
            self.path.rmdir()

    def claim(self, arguments: Mapping[str, Any]) -> bool:
        """Say whether this is a run that was begun with the same arguments; begin one if there is none.

        Raises:
            StoreError: if one was begun with others; names what differs.
        """
        if not self.has(_RUN):
            self.write_json(_RUN, arguments)
            return False
        before = self.read_json(_RUN)
        # as they would be read again: tuples are lists there
        now = parse_object(json.dumps(arguments).encode(), "arguments")
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        changed = [f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}" for key in keys]
        if keys:
            raise StoreError(
                f"{self.path}: a run is not finished here, and it was begun with other arguments: "
                f"{'; '.join(changed)}. Give the same to go on with it, or remove this folder to begin anew"
            )
        return True


def read_piece(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Map a piece: its tensors, and the notes beside them."""
    mapped = map_tensors(path)
    if _NOTES not in mapped.header.metadata:
        raise FormatError(f"{path}: it is no piece of a ledger; remove the folder and begin anew")
    return mapped.tensors, parse_object(mapped.header.metadata[_NOTES].encode(), path)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
