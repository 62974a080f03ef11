"""The header of a safetensors file, checked before anything is mapped or allocated.

The format: 8 bytes little-endian length, that many bytes of JSON, then the data. Each entry gives a dtype, a shape
and a range of the data; the ranges must tile the data without gap or overlap.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from loraspan.adapters.strict_json import parse_object
from loraspan.errors import FormatError, UnsupportedError

# what the safetensors library itself allows
MAX_HEADER_BYTES = 100_000_000
MAX_NAME_CHARS = 1024
MAX_DIMS = 8
MAX_DIM = 2**40

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a file: its dtype, its shape, and its first byte and end, counted from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """The tensors of a file by name, and the free text that stands beside them."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def header_bytes(first: bytes, file_bytes: int, path: str) -> int:
    """Give the length of the header from the first 8 bytes of a file of ``file_bytes`` bytes.

    Raises:
        FormatError: if the file is too short for the header that it announces, or that header is absurdly long.

    Example:
        >>> header_bytes((16).to_bytes(8, "little"), 24, "x.safetensors")
        16
    """
    if file_bytes < 10 or len(first) < 8:
        raise FormatError(f"{path}: needs a safetensors file; got {file_bytes} bytes, too few for a header")
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER_BYTES or length + 8 > file_bytes:
        raise FormatError(
            f"{path}: needs a header of at most {min(MAX_HEADER_BYTES, file_bytes - 8)} bytes; it announces {length}: "
            "the file is truncated or not a safetensors file"
        )
    return length


def parse_header(raw: bytes, data_bytes: int, path: str) -> Header:
    """Parse and check a header.

    Args:
        raw: the JSON text.
        data_bytes: what the file holds after it.
        path: names the file in errors.

    Returns:
        The checked entries, in the order of the file's header.

    Raises:
        FormatError: naming the file and the tensor, if a name, dtype, shape or range is not what it has to be, or
            the ranges do not tile the data.
        UnsupportedError: if a dtype is none that torch has.

    Example:
        >>> header = parse_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', 8, "x.safetensors")
        >>> header.entries["a"].shape
        (2,)
    """
    entries: dict[str, Entry] = {}
    fields = parse_object(raw, path)
    metadata = _metadata(fields.pop("__metadata__", {}), path)
    for name, field in fields.items():
        entries[name] = _entry(name, field, path)
    _check_tiling(entries, data_bytes, path)
    return Header(entries, metadata)


def _metadata(value: object, path: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(f"{path}: needs __metadata__ to map text to text")
    return value


def _entry(name: str, field: Any, path: str) -> Entry:
    if len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise FormatError(
            f"{path}: needs tensor names of at most {MAX_NAME_CHARS} printable characters; got {name[:80]!r}"
        )
    if type(field) is not dict or field.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{path}: tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise UnsupportedError(
            f"{path}: tensor {name!r} needs a dtype among {', '.join(DTYPES)}; got {str(dtype)[:80]!r}"
        )
    if type(shape) is not list or len(shape) > MAX_DIMS or not _are_sizes(shape, MAX_DIM):
        raise FormatError(
            f"{path}: tensor {name!r} needs a shape of at most {MAX_DIMS} whole numbers from 0 to {MAX_DIM}; "
            f"got {str(shape)[:80]}"
        )
    if type(offsets) is not list or len(offsets) != 2 or not _are_sizes(offsets, 2**62):
        raise FormatError(f"{path}: tensor {name!r} needs data_offsets [begin, end]; got {str(offsets)[:80]}")
    begin, end = offsets
    needed = math.prod(shape) * _ITEM_BYTES[dtype]
    if end - begin != needed or math.prod(n for n in shape if n) > MAX_DIM:
        raise FormatError(
            f"{path}: tensor {name!r} of dtype {dtype} and shape {shape} takes {needed} bytes; "
            f"its data_offsets give {end - begin}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _are_sizes(values: list[Any], limit: int) -> bool:
    # type, not isinstance: JSON's true is an int to Python
    return all(type(value) is int and 0 <= value <= limit for value in values)


def _check_tiling(entries: dict[str, Entry], data_bytes: int, path: str) -> None:
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != at:
            what = "overlaps the tensor before it" if entry.begin < at else "leaves a gap before it"
            raise FormatError(f"{path}: tensor {name!r} {what}: it needs to begin at byte {at}; got {entry.begin}")
        at = entry.end
    if at != data_bytes:
        what = "truncated" if data_bytes < at else "longer than its header says"
        raise FormatError(f"{path}: the file is {what}: its tensors need {at} bytes, it holds {data_bytes}")
