"""The header of a safetensors file, checked before anything is mapped or allocated.

The format: 8 bytes little-endian length, that many bytes of JSON, then the data. Each entry gives a dtype, a shape
and a range of the data; the ranges must tile the data without gap or overlap.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from loraspan.adapters.strict_json import parse_object
from loraspan.errors import FormatError, UnsupportedError

# what the safetensors library itself allows
MAX_HEADER_BYTES = 100_000_000
MAX_NAME_CHARS = 1024
MAX_DIMS = 8
# a size or an offset beyond this is absurd, and products of 8 of them would not fit 64 bits
MAX_SIZE = 2**48

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
_FIELDS = {"dtype", "shape", "data_offsets"}
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
        The checked entries, in the order of the file's header. Equal headers may share one object.

    Raises:
        FormatError: naming the file and the tensor, if a name, dtype, shape or range is not what it has to be, or
            the ranges do not tile the data.
        UnsupportedError: if a dtype is none that torch has.

    Example:
        >>> header = parse_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', 8, "x.safetensors")
        >>> header.entries["a"].shape
        (2,)
    """
    try:
        return _parsed(raw, data_bytes)
    except (FormatError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from None


# the adapters of one training recipe have one header, byte for byte
@functools.lru_cache(maxsize=8)
def _parsed(raw: bytes, data_bytes: int) -> Header:
    # every value is checked for its exact type below, whatever the depth
    fields = parse_object(raw, "its header", max_depth=None)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise FormatError("needs __metadata__ to map text to text")
    entries = {name: _entry(name, field) for name, field in fields.items()}
    _check_tiling(entries, data_bytes)
    return Header(entries, metadata)


def _entry(name: str, field: Any) -> Entry:
    if len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise FormatError(f"needs tensor names of at most {MAX_NAME_CHARS} printable characters; got {name[:80]!r}")
    if type(field) is not dict or field.keys() != _FIELDS:
        raise FormatError(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if type(dtype) is not str or dtype not in _ITEM_BYTES:
        raise UnsupportedError(f"tensor {name!r} needs a dtype among {', '.join(DTYPES)}; got {str(dtype)[:80]!r}")
    if type(shape) is not list or len(shape) > MAX_DIMS or not _are_sizes(shape):
        raise FormatError(
            f"tensor {name!r} needs a shape of at most {MAX_DIMS} whole numbers from 0 to {MAX_SIZE}; "
            f"got {str(shape)[:80]}"
        )
    if type(offsets) is not list or len(offsets) != 2 or not _are_sizes(offsets):
        raise FormatError(f"tensor {name!r} needs data_offsets [begin, end]; got {str(offsets)[:80]}")
    begin, end = offsets
    needed = math.prod(shape) * _ITEM_BYTES[dtype]
    # a size of 0 hides the others from the product
    if end - begin != needed or (not needed and math.prod(n for n in shape if n) > MAX_SIZE):
        raise FormatError(
            f"tensor {name!r} of dtype {dtype} and shape {shape} takes {needed} bytes; "
            f"its data_offsets give {end - begin}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _are_sizes(values: list[Any]) -> bool:
    for value in values:  # noqa: SIM110 (a generator costs more than the loop, on every tensor of every file)
        # type, not isinstance: JSON's true is an int to Python
        if type(value) is not int or not 0 <= value <= MAX_SIZE:
            return False
    return True


def _check_tiling(entries: dict[str, Entry], data_bytes: int) -> None:
    at = 0
    for begin, end, name in sorted([(entry.begin, entry.end, name) for name, entry in entries.items()]):
        if begin != at:
            what = "overlaps the tensor before it" if begin < at else "leaves a gap before it"
            raise FormatError(f"tensor {name!r} {what}: it needs to begin at byte {at}; got {begin}")
        at = end
    if at != data_bytes:
        what = "truncated" if data_bytes < at else "longer than its header says"
        raise FormatError(f"the file is {what}: its tensors need {at} bytes, it holds {data_bytes}")
