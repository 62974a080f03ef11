"""Whole numbers in few bytes: a range coder, with a model for each size that rows have and none to tell of."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan import _core, _native
from loraspan.errors import FormatError

# of 8 or 16 bits
Codes = NDArray[np.signedinteger[Any]]
_DTYPES: dict[int, np.dtype[Any]] = {8: np.dtype(np.int8), 16: np.dtype(np.int16)}

# The largest magnitude of a number, by the bits of its table.
LARGEST = {8: 127, 16: 32512}
# No stream holds more numbers for each of its bytes: a number takes a tenth of a bit at the least.
MOST = 90
# Bytes that a stream takes at the most: for each number, for each row, and beside.
_NUMBER, _ROW, _BESIDE = 6, 6, 8
_CHECKSUM = 4
# What a trellis may round, in its whole numbers, so that they fit 8 or 16 bits: the next of a set are up to 2 from it.
ROUNDED = {bits: largest - 2.0 for bits, largest in LARGEST.items()}


class Known(NamedTuple):
    """What is known of the rows of a table before they are read; it tells about how long they are.

    Attributes:
        weights: ``[R]`` float32: of their columns.
        tasks: ``[R]`` int32, not negative: whose columns have one step in a slot.
    """

    weights: NDArray[np.float32]
    tasks: NDArray[np.int32]


def encode(tables: Sequence[Codes], known: Sequence[Known] = (), isa: str = _native.BEST) -> bytes:
    """Give tables ``[R, L]`` of int8 from -127 to 127, or of int16 from -32512 to 32512, as one stream.

    It is a byte for each table, its bits; what ``csrc/cpu/coding.inl`` makes of the rows, beside what is ``known`` of
    all, if anything (those that :func:`trellis` gave take fewer bits); and the CRC-32 of all before, least significant
    byte first.

    Example:
        >>> import numpy as np
        >>> table = np.arange(-6000, 6000, 1000, dtype=np.int16).reshape(2, 6)
        >>> bool((decode(encode([table]), [(2, 6)])[0] == table).all())
        True
    """
    tables = [np.ascontiguousarray(table) for table in tables]
    room = sum(_NUMBER * table.size + _ROW * len(table) for table in tables) + _BESIDE
    out = np.empty(room, dtype=np.uint8)
    size = _core.encode(_fields(tables, known), out.ctypes.data, room, isa)
    stream = bytes(8 * table.itemsize for table in tables) + out[:size].tobytes()
    return stream + zlib.crc32(stream).to_bytes(_CHECKSUM, "little")


def decode(
    stream: bytes,
    shapes: Sequence[tuple[int, int]],
    known: Sequence[Known] = (),
    isa: str = _native.BEST,
) -> list[Codes]:
    """Give the tables of :func:`encode`, of which as much has to be ``known``.

    Raises:
        FormatError: if the stream is not one of tables of these shapes.
    """
    bits = bits_in(stream, len(shapes))
    if sum(rows * max(length, 1) for rows, length in shapes) > MOST * len(stream):
        raise FormatError(f"needs a byte for {MOST} numbers")
    body = stream[:-_CHECKSUM]
    if len(body) < len(shapes) or zlib.crc32(body).to_bytes(_CHECKSUM, "little") != stream[-_CHECKSUM:]:
        raise FormatError("needs to end with the checksum of its bytes")
    tables: list[Codes] = [np.empty(shape, dtype=_DTYPES[each]) for shape, each in zip(shapes, bits, strict=True)]
    data = np.frombuffer(body, dtype=np.uint8)[len(shapes) :]
    if not _core.decode(_fields(tables, known), data.ctypes.data, len(data), isa):
        raise FormatError("needs to end where its rows do, with numbers up to 127, or 32512 in tables of 16 bits")
    return tables


def bits_in(stream: bytes, count: int) -> list[int]:
    """Give the bits of the numbers of each of ``count`` tables in a stream.

    Raises:
        FormatError: if it says others than 8 and 16.
    """
    bits = list(stream[:count])
    if len(bits) != count or not set(bits) <= _DTYPES.keys():
        raise FormatError(f"needs to begin with 8 or 16, the bits of numbers, for each of {count} tables")
    return bits


def trellis(rows: Tensor, isa: str = _native.BEST) -> Tensor:
    """Round rows ``[R, L]`` of entries up to 32510 in size to int16, each row on a path of ``csrc/cpu/trellis.inl``.

    Of the numbers only every other one is possible after those before, and that one is coded: at the same error an
    entry takes 0.22 bits less than if each were rounded by itself, at any rate above one bit.
    """
    rows = rows.to(torch.float32).contiguous()
    numbers = torch.empty(rows.shape, dtype=torch.int16)
    _core.trellis(rows.data_ptr(), rows.shape[0], rows.shape[1], numbers.data_ptr(), _native.threads(), isa)
    return numbers


def _fields(tables: Sequence[Codes], known: Sequence[Known]) -> NDArray[np.int64]:
    of_rows = [(k.weights.ctypes.data, k.tasks.ctypes.data) for k in known] or [(0, 0)] * len(tables)
    return _native.table(
        [(t.ctypes.data, *t.shape, 8 * t.itemsize, *own) for t, own in zip(tables, of_rows, strict=True)], 6
    )
