"""A file of tensors of a store, mapped: its header is checked, its data are not read until someone looks."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor

from loraspan.adapters.mapped import map_tensors
from loraspan.adapters.regular import open_regular
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
