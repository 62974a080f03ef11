"""How a file of tensors begins: the header of safetensors, or where that is long, a shorter one and a directory."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch

# the names that the safetensors format gives to dtypes
DTYPE_NAMES: Mapping[torch.dtype, str] = {
    getattr(torch, ours): name
    for name, ours in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
    }.items()
    if hasattr(torch, ours)
}

# a tensor of a file: its name, dtype and shape
Entry = tuple[str, torch.dtype, Sequence[int]]

# Data begins at a multiple of a cache line, or of 8 where all items are bytes. Tensors follow each other without gaps,
# widest items first, so that each starts at a multiple of its item.
ALIGNMENT, _OF_BYTES = 64, 8
_LENGTH_BYTES = 8
# Text in a store is at most so many times as long as the bytes that it was compressed to: a reader has a limit.
INFLATED = 64
_ZLIB_LEVEL = 6
# A header up to so long is no burden, nor is one of a 64th of the data.
_LONG, _DATA_PER_HEADER = 2048, 64
# the two tensors of a file with a directory
DIRECTORY, DATA = "directory", "data"


def order(entries: Iterable[Entry]) -> list[int]:
    """Give the order in which entries lie in a file: wider items first, otherwise as given."""
    widths = [-dtype.itemsize for _, dtype, _ in entries]
    return sorted(range(len(widths)), key=widths.__getitem__)


def header(entries: Iterable[Entry], metadata: Mapping[str, str], alignment: int = ALIGNMENT) -> bytes:
    """Give the first bytes of a safetensors file, up to where the data of ``entries`` begin, in the order given.

    Example:
        >>> len(header([("x", torch.float32, [2, 3])], {}))
        128
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, dtype, shape in entries:
        stop = start + count(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % alignment)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def file_start(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """Give the first bytes of a file of a store, up to where the data of ``entries`` begin, in the order given.

    They are :func:`header`, or where that is longer than 2 kB and than a 64th of the data, the header of a file of two
    tensors: ``directory``, the text of that long header compressed by zlib, with zeros behind it, and ``data``, all the
    data.

    Example:
        >>> names = [(f"blocks.{i}.attention", torch.uint8, [8]) for i in range(100)]
        >>> len(header(names, {})), len(file_start(names, {})) < len(header(names, {})) / 5
        (7424, True)
    """
    of_bytes = all(dtype.itemsize == 1 for _, dtype, _ in entries)
    plain = header(entries, metadata, _OF_BYTES if of_bytes else ALIGNMENT)
    data = sum(count(shape) * dtype.itemsize for _, dtype, shape in entries)
    if len(plain) <= _LONG or len(plain) * _DATA_PER_HEADER <= data:
        return plain
    text = plain[_LENGTH_BYTES:].rstrip(b" ")
    directory = zlib.compress(text, _ZLIB_LEVEL)
    if len(text) > INFLATED * len(directory):
        return plain
    directory += bytes(-len(directory) % ALIGNMENT)
    return header([(DIRECTORY, torch.uint8, [len(directory)]), (DATA, torch.uint8, [data])], metadata) + directory


def narrow(largest: int) -> torch.dtype:
    """Give the narrowest integer dtype that a store uses for values from 0 to ``largest``.

    Example:
        >>> narrow(255), narrow(256)
        (torch.uint8, torch.int16)
    """
    limits = ((255, torch.uint8), (2**15 - 1, torch.int16), (2**31 - 1, torch.int32))
    return next((dtype for limit, dtype in limits if largest <= limit), torch.int64)


def count(shape: Sequence[int]) -> int:
    """Give the number of entries of a shape."""
    size = 1
    for axis in shape:
        size *= int(axis)
    return size
