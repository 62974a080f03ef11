"""A file of tensors of a store, mapped: its header is checked, its data are not read until someone looks."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor

from loraspan.adapters.header import parse_header
from loraspan.adapters.mapped import map_tensors, views_of
from loraspan.adapters.regular import open_regular
from loraspan.collection.headers import DATA, DIRECTORY, INFLATED
from loraspan.errors import FormatError, StoreError, UnsupportedError
from loraspan.store.format import DamagedError
from loraspan.store.manifest import DataFile


class TensorFile:
    """The tensors of a file, as views of its pages.

    The file is closed again before this returns, and may then be renamed or removed. Writing to a view changes memory
    and never the file.

    Args:
        folder: of the store.
        data: the file as the manifest knows it.

    Raises:
        StoreError: if it is missing or cannot be read.
        FormatError: if its size or header is not what it has to be.
    """

    def __init__(self, folder: Path, data: DataFile) -> None:
        self.name = data.file
        path = folder / data.file
        try:
            with open_regular(path) as file:
                actual = file.seek(0, 2)
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
        if actual != data.size:
            raise DamagedError(self.name, "size", f"the manifest says {data.size} bytes; it has {actual}")
        try:
            self._tensors = map_tensors(str(path)).tensors
            if self._tensors.keys() == {DIRECTORY, DATA}:
                self._tensors = listed_in(self._tensors[DIRECTORY], self._tensors[DATA], str(path))
        except (FormatError, UnsupportedError) as error:
            raise DamagedError(self.name, "header", str(error).removeprefix(f"{path}: ")) from None

    def names(self) -> Iterable[str]:
        """Give the names of the tensors."""
        return self._tensors.keys()

    def tensor(self, name: str, *dtypes: torch.dtype) -> Tensor | None:
        """Give a tensor as a view, or None where there is none; it has to be of one of ``dtypes``, if any are given."""
        found = self._tensors.get(name)
        if found is not None and dtypes and found.dtype not in dtypes:
            wanted = " or ".join(str(each) for each in dtypes)
            raise DamagedError(self.name, f"tensor {name!r}", f"it has to be {wanted}; it is {found.dtype}")
        return found

    def refuse_strangers(self, known: Collection[str]) -> None:
        """Refuse tensors that are not ``known``: a reader must not pass over what it does not understand."""
        for name in self._tensors:
            if name not in known:
                raise DamagedError(self.name, f"tensor {name!r}", "it does not belong in this file")


def listed_in(directory: Tensor, data: Tensor, path: str) -> dict[str, Tensor]:
    """Give the tensors that a directory lists, as views of ``data``.

    Raises:
        FormatError: naming the file, if the directory is not the header of such data, compressed as a writer does.
    """
    if directory.dtype != torch.uint8 or directory.ndim != 1 or data.dtype != torch.uint8 or data.ndim != 1:
        raise FormatError(f"{path}: needs a directory and data of bytes, with one dimension each")
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(directory.numpy().tobytes(), INFLATED * directory.numel() + 1)
    except zlib.error as error:
        raise FormatError(f"{path}: needs a directory compressed by zlib: {error}") from None
    if not stream.eof or stream.unused_data.strip(b"\0"):
        raise FormatError(f"{path}: needs a directory of one zlib stream, of at most {INFLATED} times its own length")
    return views_of(data, parse_header(text, data.numel(), path))
