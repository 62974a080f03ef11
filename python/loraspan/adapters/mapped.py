"""A safetensors file in memory without reading it: every tensor is a view of one mapping."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass

from torch import Tensor

from loraspan._native import map_file
from loraspan.adapters.header import DTYPES, Header, header_bytes, parse_header
from loraspan.adapters.regular import open_regular
from loraspan.errors import FormatError, StoreError

# bytes of the largest items
_WIDEST = 8


@dataclass(frozen=True)
class MappedFile:
    """The tensors of one file, by name.

    Attributes:
        tensors: views of one private mapping, which lives as long as any of them; the file itself is closed. Writing
            into one changes this process's copy of its pages and never the file.
        header: as parsed and checked.
        header_sha256: of the header's bytes, in hex.
    """

    tensors: dict[str, Tensor]
    header: Header
    header_sha256: str


def map_tensors(path: str) -> MappedFile:
    """Map a safetensors file.

    Args:
        path: of the file. Only its header is read.

    Returns:
        Its tensors, in the order of their bytes. A tensor whose bytes are not aligned to its dtype, as no current
        writer leaves them, is a copy.

    Raises:
        FormatError: naming the file and the tensor, if it cannot be opened or its header does not hold.

    Example:
        >>> import safetensors.torch, tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> safetensors.torch.save_file({"a": torch.ones(2, 3)}, f"{folder}/x.safetensors")
        >>> map_tensors(f"{folder}/x.safetensors").tensors["a"].shape
        torch.Size([2, 3])
    """
    whole = _map(path)
    size = whole.numel()
    length = header_bytes(bytes(whole[:8].tolist()), size, path)
    raw = whole[8 : 8 + length].numpy().tobytes()
    start = 8 + length
    header = parse_header(raw, size - start, path)
    return MappedFile(_views(whole, header, start), header, hashlib.sha256(raw).hexdigest())


def views_of(data: Tensor, header: Header) -> dict[str, Tensor]:
    """Give the tensors of a checked header of ``data``, bytes ``[size]``, as views; of a copy where those lie askew."""
    return _views(data if data.storage_offset() % _WIDEST == 0 else data.clone(), header, 0)


def file_sha256(path: str) -> str:
    """Give the sha256 of a whole file, in hex; it is read through once."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _map(path: str) -> Tensor:
    try:
        file = open_regular(path)
    except StoreError:
        raise FormatError(f"{path}: needs a regular file") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be opened: {error}") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise FormatError(f"{path}: needs a safetensors file; it is empty")
        try:
            # Python's mmap keeps a descriptor open for each file: thousands of adapters would run out of them
            return map_file(file.fileno(), size)
        except OSError as error:
            raise FormatError(f"{path}: cannot be mapped: {error.strerror}") from None


def _views(whole: Tensor, header: Header, start: int) -> dict[str, Tensor]:
    by_dtype: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, (code, shape, begin, end) in header.entries.items():
        typed = by_dtype.get(code)
        if typed is None:
            item = DTYPES[code].itemsize
            typed = by_dtype[code] = whole[: whole.numel() // item * item].view(DTYPES[code])
        first = start + begin
        if first % typed.itemsize:
            tensors[name] = whole[first : start + end].clone().view(typed.dtype).view(shape)
        else:
            tensors[name] = typed.as_strided(shape, _row_major(shape), typed.storage_offset() + first // typed.itemsize)
    return tensors


@functools.lru_cache(maxsize=1024)
def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 2:
        return (shape[1], 1)
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)
