"""Whole numbers of few values in few bytes: several to a byte where they are small, and Huffman's code for those."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from loraspan.errors import FormatError

Codes = NDArray[np.int8]

# The largest magnitude in a row, and how many of its numbers go into a byte: (2 m + 1)^k <= 256.
KINDS = ((1, 5), (2, 3), (7, 2), (127, 1))
# No stream holds more numbers for each of its bytes: five to a byte, and at least a bit for that. The byte of a row
# takes as much.
MOST, ROW = 40, 5
# Halves of an octave, of the mean magnitude, by which rows of a kind are put in order, so that what follows each other
# is alike; a byte for each row says kind and place in that order.
_PLACES, _PER_OCTAVE, _LOWEST = 64, 2, -10
# Symbols in a block with a code of its own: 2^(this + 6) at most.
_MEMORY = 7


def encode(tables: Sequence[Codes]) -> bytes:
    """Give tables ``[R, L]`` of numbers from -127 to 127 as one deflate stream without matches.

    The stream is a byte for each row (the number of its kind in :data:`KINDS`, times 64, plus a place), and then the
    rows in ascending order of these bytes, each kind filled up with zeros to whole bytes. Digits of a byte are the
    numbers plus ``m``, the first the least significant, to base ``2 m + 1``.

    Example:
        >>> import numpy as np
        >>> table = np.arange(-6, 6, dtype=np.int8).reshape(2, 6)
        >>> bool((decode(encode([table]), [(2, 6)])[0] == table).all())
        True
    """
    rows = [row for table in tables for row in table]
    marks = np.concatenate([np.zeros(0, dtype=np.uint8), *map(_marks, tables)])
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, _MEMORY, zlib.Z_HUFFMAN_ONLY)
    parts = [stream.compress(marks.tobytes()), stream.flush(zlib.Z_PARTIAL_FLUSH)]
    order = np.argsort(marks, kind="stable")
    for kind, (most, many) in enumerate(KINDS):
        chosen = order[marks[order] // _PLACES == kind]
        if not len(chosen):
            continue
        digits = np.concatenate([rows[i] for i in chosen]).astype(np.uint8) + np.uint8(most)
        digits = np.pad(digits, (0, -len(digits) % many), constant_values=most).reshape(-1, many)
        values = np.zeros(len(digits), dtype=np.uint8)
        for j in reversed(range(many)):
            values = values * np.uint8((2 * most + 1) % 256) + digits[:, j]
        parts += [stream.compress(values.tobytes()), stream.flush(zlib.Z_PARTIAL_FLUSH)]
    return b"".join([*parts, stream.flush()])


def decode(stream: bytes, shapes: Sequence[tuple[int, int]]) -> list[Codes]:
    """Give the tables of :func:`encode`; nothing is unpacked beyond what their shapes ask for.

    Raises:
        FormatError: if the stream is not one of tables of these shapes.
    """
    tables = [np.zeros(shape, dtype=np.int8) for shape in shapes]
    counts = np.array([rows for rows, _ in shapes], dtype=np.int64)
    of, firsts = np.repeat(np.arange(len(shapes)), counts), np.cumsum(counts) - counts
    unpacked = _Unpacked(stream)
    marks = np.frombuffer(unpacked.take(len(of)), dtype=np.uint8)
    kinds, order = marks // _PLACES, np.argsort(marks, kind="stable")
    lengths = np.array([length for _, length in shapes], dtype=np.int64)[of]
    for kind, (_, many) in enumerate(KINDS):
        chosen = order[kinds[order] == kind]
        size = int(lengths[chosen].sum())
        data = np.frombuffer(unpacked.take(-(-size // many)), dtype=np.uint8)
        flat = _digits()[kind][data].reshape(-1)
        start = 0
        # no list of rows: there may be many, of one number each
        for i in chosen:
            row = tables[of[i]][i - firsts[of[i]]]
            row[:] = flat[start : start + len(row)]
            start += len(row)
    unpacked.end()
    return tables


def _marks(table: Codes) -> NDArray[np.uint8]:
    size = np.abs(table.astype(np.int16))
    largest = size.max(axis=1, initial=0)
    kinds = np.searchsorted([most for most, _ in KINDS], largest)
    with np.errstate(divide="ignore"):
        octaves = np.log2(size.mean(axis=1) if table.shape[1] else np.zeros(len(table)))
    places = np.clip(np.round(_PER_OCTAVE * np.maximum(octaves, -1e3)) - _LOWEST, 0, _PLACES - 1)
    return np.asarray(kinds * _PLACES + places, dtype=np.uint8)


@cache
def _digits() -> list[Codes]:
    """Give, for each kind, the numbers that each of the 256 bytes stands for."""
    found = []
    for most, many in KINDS:
        values = np.arange(256)[:, None] // (2 * most + 1) ** np.arange(many) % (2 * most + 1) - most
        found.append(values.astype(np.int8))
    return found


class _Unpacked:
    """What a stream unpacks to, as much of it as is asked for."""

    def __init__(self, stream: bytes) -> None:
        self._inflate, self._left = zlib.decompressobj(-zlib.MAX_WBITS), stream

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
            raise FormatError(f"needs to be a deflate stream: {error}") from None
        self._left = self._inflate.unconsumed_tail
        return part
