"""A safetensors file, mapped: its header is checked, its data are not read until someone looks."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraspan.collection.layout import DTYPE_NAMES
from loraspan.errors import StoreError
from loraspan.store.format import DamagedError, parse_json, take
from loraspan.store.manifest import DataFile

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
# the safetensors library's own limit
_LARGEST_HEADER = 100_000_000
_LARGEST_AXIS = 2**48


class TensorFile:
    """The tensors of a file, as views of its pages.

    The file is closed again before this returns, and may then be renamed or removed. Writing to a view changes memory
    and never the file.

    Args:
        folder: of the store.
        data: the file as the manifest knows it.

    Raises:
        StoreError: if it cannot be read.
        FormatError: if its size or header is not what it has to be.
    """

    def __init__(self, folder: Path, data: DataFile) -> None:
        self.name, size = data.file, data.size
        path = folder / data.file
        try:
            with path.open("rb") as file:
                actual = os.fstat(file.fileno()).st_size
                if actual != size:
                    raise DamagedError(self.name, "size", f"the manifest says {size} bytes; it has {actual}")
                header = self._header(file.read(8), file, size)
            self._bytes = _map(path, size)
        except DamagedError:
            raise
        except (OSError, RuntimeError) as error:
            raise StoreError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        self._entries = self._parse(header, size - 8 - len(header))
        self._start = 8 + len(header)

    def names(self) -> Iterable[str]:
        """Give the names of the tensors, in the order in which they lie."""
        return self._entries.keys()

    def tensor(self, name: str, *dtypes: torch.dtype) -> Tensor | None:
        """Give a tensor as a view, or None where there is none; it has to be of one of ``dtypes``, if any are given."""
        if name not in self._entries:
            return None
        dtype, shape, start, stop = self._entries[name]
        if dtypes and dtype not in dtypes:
            wanted = " or ".join(str(each) for each in dtypes)
            raise DamagedError(self.name, f"tensor {name!r}", f"it has to be {wanted}; it is {dtype}")
        raw = self._bytes[self._start + start : self._start + stop]
        return raw.view(dtype).reshape(shape)

    def refuse_strangers(self, known: Collection[str]) -> None:
        """Refuse tensors that are not ``known``: a reader must not pass over what it does not understand."""
        for name in self._entries:
            if name not in known:
                raise DamagedError(self.name, f"tensor {name!r}", "it does not belong in this file")

    def _header(self, length: bytes, file: Any, size: int) -> bytes:
        count = int.from_bytes(length, "little")
        if len(length) < 8 or count > min(size - 8, _LARGEST_HEADER):
            raise DamagedError(self.name, "header", f"its length, {count}, does not fit a file of {size} bytes")
        header: bytes = file.read(count)
        return header

    def _parse(self, header: bytes, room: int) -> dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]:
        table = parse_json(header, self.name, "header")
        if type(table) is not dict:
            raise DamagedError(self.name, "header", "it has to be a JSON object")
        table.pop("__metadata__", None)
        entries = {name: self._entry(name, entry) for name, entry in table.items()}
        entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
        end = 0
        for name, (_, _, start, stop) in entries.items():
            if start != end:
                raise DamagedError(
                    self.name, f"tensor {name!r}", f"its data have to begin at {end}; they begin at {start}"
                )
            end = stop
        if end != room:
            raise DamagedError(self.name, "header", f"its tensors take {end} bytes, and the file has {room} for them")
        return entries

    def _entry(self, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
        what = f"tensor {name!r}"
        dtype = _DTYPES.get(take(entry, "dtype", str, self.name, what))
        shape = take(entry, "shape", list, self.name, what)
        offsets = take(entry, "data_offsets", list, self.name, what)
        if dtype is None:
            raise DamagedError(self.name, what, f"its dtype {entry['dtype']!r} is none that this version knows")
        if not all(type(axis) is int and 0 <= axis <= _LARGEST_AXIS for axis in shape) or len(shape) > 64:
            raise DamagedError(self.name, what, f"its shape has to be a few sizes; it is {shape!r}"[:300])
        if len(offsets) != 2 or not all(type(at) is int and 0 <= at < 2**62 for at in offsets):
            raise DamagedError(self.name, what, f"data_offsets have to be two places; they are {offsets!r}"[:300])
        count = dtype.itemsize
        for axis in shape:
            count *= axis
        if offsets[1] - offsets[0] != count:
            raise DamagedError(
                self.name, what, f"{dtype} {shape} takes {count} bytes; it has {offsets[1] - offsets[0]}"
            )
        if offsets[0] % dtype.itemsize:
            raise DamagedError(self.name, what, f"its data have to begin at a multiple of {dtype.itemsize}")
        return dtype, tuple(shape), offsets[0], offsets[1]


def _map(path: Path, size: int) -> Tensor:
    # torch maps privately and closes the descriptor at once; Python's mmap would hold one for each file
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
