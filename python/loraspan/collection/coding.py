"""Whole numbers of few values in few bytes: several to a byte where they are small, and Huffman's code for those."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraspan.errors import FormatError

# of 8 or 16 bits
Codes = NDArray[np.signedinteger[Any]]
_DTYPES: dict[int, np.dtype[Any]] = {8: np.dtype(np.int8), 16: np.dtype(np.int16)}

# The largest magnitude in a row, and how many of its numbers go into a byte: (2 m + 1)^k <= 256. The last kind keeps
# low bits of large numbers apart: they are as good as drawn, and no code makes them shorter.
KINDS = ((1, 5), (2, 3), (7, 2), (127, 1))
_LAST = len(KINDS) - 1
# No stream holds more numbers for each of its bytes: five to a byte, and at least a bit for that. The byte of a row
# takes as much.
MOST, ROW = 40, 5
# Halves of an octave, of the mean magnitude, by which rows of a kind are put in order, so that what follows each other
# is alike; a byte for each row says kind and place in that order.
_PLACES, _PER_OCTAVE, _LOWEST = 64, 2, -10
# The place from which on numbers of the last kind have low bits, one more for each octave, and the most of them.
_LOW_FROM, _MOST_LOW = 17, 8
# The largest magnitude of a number, by the bits of its table.
LARGEST = {8: 127, 16: 127 << _MOST_LOW}
# Symbols in a block with a code of its own: 2^(this + 6) at most.
_MEMORY = 7


def encode(tables: Sequence[Codes]) -> bytes:
    """Give tables ``[R, L]`` of int8 from -127 to 127, or of int16 from -32512 to 32512, as one stream.

    It is a byte for each table, its bits, and then a zlib stream without matches: a byte for each row (the number of
    its kind in :data:`KINDS`, times 64, plus a place); the rows in ascending order of these bytes, each kind filled up
    with zeros to whole bytes; and the low bits of rows of the last kind, a place at a time, filled up too. Digits of a
    byte are the numbers plus ``m``, the first the least significant, to base ``2 m + 1``.

    Example:
        >>> import numpy as np
        >>> table = np.arange(-6000, 6000, 1000, dtype=np.int16).reshape(2, 6)
        >>> bool((decode(encode([table]), [(2, 6)])[0] == table).all())
        True
    """
    rows = [row for table in tables for row in table]
    marks = np.concatenate([np.zeros(0, dtype=np.uint8), *map(_marks, tables)])
    rows = [row for table in tables for row in table]
    deflate = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, _MEMORY, zlib.Z_HUFFMAN_ONLY)
    parts = [bytes(8 * table.itemsize for table in tables)]

    def write(data: NDArray[np.uint8]) -> None:
        parts.extend([deflate.compress(data.tobytes()), deflate.flush(zlib.Z_PARTIAL_FLUSH)])

    write(marks)
    for kind, places in _ordered(marks):
        most, many = KINDS[kind]
        digits = (np.concatenate([rows[i] >> low for low, chosen in places for i in chosen]) + most).astype(np.uint8)
        digits = np.pad(digits, (0, -len(digits) % many), constant_values=most).reshape(-1, many)
        values = np.zeros(len(digits), dtype=np.uint8)
        for j in reversed(range(many)):
            values = values * np.uint8((2 * most + 1) % 256) + digits[:, j]
        write(values)
        for low, chosen in places:
            if low:
                last = np.concatenate([rows[i].astype(np.uint8) for i in chosen])[:, None]
                write(np.packbits(np.unpackbits(last, axis=1, count=low, bitorder="little"), bitorder="little"))
    return b"".join([*parts, deflate.flush()])


def decode(stream: bytes, shapes: Sequence[tuple[int, int]]) -> list[Codes]:
    """Give the tables of :func:`encode`; nothing is unpacked beyond what their shapes ask for.

    Raises:
        FormatError: if the stream is not one of tables of these shapes.
    """
    bits = bits_in(stream, len(shapes))
    tables: list[Codes] = [np.zeros(shape, dtype=_DTYPES[each]) for shape, each in zip(shapes, bits, strict=True)]
    counts = np.array([rows for rows, _ in shapes], dtype=np.int64)
    of, firsts = np.repeat(np.arange(len(shapes)), counts), np.cumsum(counts) - counts
    lengths = np.array([length for _, length in shapes], dtype=np.int64)[of]
    largest = np.array([LARGEST[each] for each in bits])
    unpacked = _Unpacked(stream[len(shapes) :])
    marks = np.frombuffer(unpacked.take(len(of)), dtype=np.uint8)

    def fill(chosen: NDArray[np.int64], numbers: Codes) -> None:
        start = 0
        # no list of rows: there may be many, of one number each
        for i in chosen:
            row = tables[of[i]][i - firsts[of[i]]]
            row[:] = numbers[start : start + len(row)]
            start += len(row)

    for kind, places in _ordered(marks):
        many = KINDS[kind][1]
        sizes = [int(lengths[chosen].sum()) for _, chosen in places]
        data = np.frombuffer(unpacked.take(-(-sum(sizes) // many)), dtype=np.uint8)
        high, start = _digits()[kind][data].reshape(-1), 0
        for (low, chosen), size in zip(places, sizes, strict=True):
            numbers: Codes = high[start : start + size]
            if low:
                numbers = _with_low_bits(numbers, low, unpacked.take(-(-size * low // 8)))
                if (np.abs(numbers) > np.repeat(largest[of[chosen]], lengths[chosen])).any():
                    raise FormatError("needs numbers up to 127, or 32512 in tables of 16 bits")
            fill(chosen, numbers)
            start += size
    unpacked.end()
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


def _marks(table: Codes) -> NDArray[np.uint8]:
    size = np.abs(table.astype(np.int32))
    largest = size.max(axis=1, initial=0)
    kinds = np.searchsorted([most for most, _ in KINDS[:_LAST]], largest)
    with np.errstate(divide="ignore"):
        octaves = np.log2(size.mean(axis=1) if table.shape[1] else np.zeros(len(table)))
    places = np.round(_PER_OCTAVE * np.maximum(octaves, -1e3)) - _LOWEST
    # as many low bits as it takes for the others to be numbers of the last kind
    needed = np.ceil(np.log2(np.maximum(largest, 1) / KINDS[_LAST][0]))
    places = np.maximum(places, np.where(needed > 0, _LOW_FROM - 1 + _PER_OCTAVE * needed, 0))
    return np.asarray(kinds * _PLACES + np.clip(places, 0, _PLACES - 1), dtype=np.uint8)


def _ordered(marks: NDArray[np.uint8]) -> Iterator[tuple[int, list[tuple[int, NDArray[np.int64]]]]]:
    """Give each kind of row that there is, and by place the low bits of its numbers and which rows it has."""
    order = np.argsort(marks, kind="stable")
    values, starts = np.unique(marks[order], return_index=True)
    stops = [*starts[1:].tolist(), len(order)]
    groups = [(value, order[start:stop]) for value, start, stop in zip(values.tolist(), starts, stops, strict=False)]
    for kind in sorted({value // _PLACES for value in values.tolist()}):
        yield kind, [(_low_bits(value), chosen) for value, chosen in groups if value // _PLACES == kind]


def _low_bits(mark: int) -> int:
    kind, place = divmod(mark, _PLACES)
    return min(max((place - _LOW_FROM + 1) // _PER_OCTAVE, 0), _MOST_LOW) if kind == _LAST else 0


def _with_low_bits(high: Codes, low: int, data: bytes) -> Codes:
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=high.size * low, bitorder="little")
    return (high.astype(np.int16) << low) + np.packbits(bits.reshape(-1, low), axis=1, bitorder="little")[:, 0]


@cache
def _digits() -> list[NDArray[np.int8]]:
    """Give, for each kind, the numbers that each of the 256 bytes stands for."""
    found = []
    for most, many in KINDS:
        values = np.arange(256)[:, None] // (2 * most + 1) ** np.arange(many) % (2 * most + 1) - most
        found.append(values.astype(np.int8))
    return found


class _Unpacked:
    """What a stream unpacks to, as much of it as is asked for."""

    def __init__(self, stream: bytes) -> None:
        self._inflate, self._left = zlib.decompressobj(), stream

    def take(self, count: int) -> bytes:
        """Give the next bytes."""
        parts = []
        while count:
            part = self._some(count)
            if not part:
                raise FormatError("needs to be as long as its rows")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def end(self) -> None:
        """See that there are no more, of the stream or after it."""
        if self._some(1) or not self._inflate.eof or self._inflate.unused_data:
            raise FormatError("needs to end where its rows do")

    def _some(self, most: int) -> bytes:
        try:
            part = self._inflate.decompress(self._left, most)
        except zlib.error as error:
            raise FormatError(f"needs to be a zlib stream: {error}") from None
        self._left = self._inflate.unconsumed_tail
        return part
