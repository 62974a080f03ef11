"""The tensors of bases and columns in their files: as they are in memory, or coded where they were rounded for that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan._default_device import cpu_by_default
from loraspan.collection import coding, weights
from loraspan.collection.beside import Beside, same
from loraspan.collection.coding import Known
from loraspan.collection.columns import Columns
from loraspan.collection.rows import CODED, Rows, row_bytes, tensors_of
from loraspan.collection.steps import packed_numbers, scales_of
from loraspan.errors import FormatError
from loraspan.ops.packed import Packed
from loraspan.ops.packed_reference import BLOCK

# What may be coded, in the order in which a stream has them.
CODED_FIELDS = ("left_loadings", "left_private", "right_loadings", "right_private")
BASES = ("u", "v")
# Names of streams of rows begin so, and the stream of weights is called so.
CODED_KIND, WEIGHTS = "coded.", "weights"
# Slots that follow each other share a stream until it holds so many numbers.
GROUP = 1 << 20

Shapes = Mapping[str, Mapping[str, tuple[int, int]]]
"""Of coded rows, by slot and field."""


def column_tensors(columns: Mapping[str, Columns]) -> list[tuple[str, Tensor]]:
    """Give the tensors of all columns of a segment by the names that a file has for them.

    Rows that :func:`loraspan.collection.steps.whole_steps` made are coded, those of several small slots in one stream,
    ``coded.<the last of these slots>``; their scales follow from them and are left out. The weights beside them are
    coded too, ``weights``, those of all slots whose differences are small.
    """
    named: list[tuple[str, Tensor]] = []
    tables: dict[str, dict[str, Packed]] = {}
    known = {}
    falls = {}
    for slot, table in columns.items():
        coded = _coded_of({field: getattr(table, field) for field in CODED_FIELDS})
        elsewhere = {*coded}
        if coded:
            tables[slot] = coded
            known[slot] = Beside.of(table).known()
            if (found := weights.falls_of(table)) is not None:
                falls[slot] = found
                elsewhere.add(WEIGHTS)
        for field, rows in table.tensors().items():
            if field not in elsewhere:
                named += tensors_of(field, slot, rows)
    named += _streams(tables, known)
    if falls:
        named.append((WEIGHTS, _bytes(weights.encode([falls[slot] for slot in sorted(falls)]))))
    return named


def basis_tensors(bases: Mapping[str, tuple[Rows, Rows]]) -> list[tuple[str, Tensor]]:
    """Give the tensors of the bases ``u`` and ``v`` of all slots by the names that a file has for them.

    Those whose vectors were rounded to whole steps are coded as columns are, without anything beside them.
    """
    named: list[tuple[str, Tensor]] = []
    tables: dict[str, dict[str, Packed]] = {}
    for slot, pair in bases.items():
        coded = _coded_of(dict(zip(BASES, pair, strict=True)))
        if coded:
            tables[slot] = coded
        for side, rows in zip(BASES, pair, strict=True):
            if side not in coded:
                named += tensors_of(side, slot, rows)
    return named + _streams(tables, {})


def _coded_of(rows: Mapping[str, Rows]) -> dict[str, Packed]:
    return {field: each for field, each in rows.items() if isinstance(each, Packed) and _is_coded(each)}


def _streams(
    tables: Mapping[str, Mapping[str, Packed]], known: Mapping[str, Mapping[str, Known]]
) -> list[tuple[str, Tensor]]:
    # by name: a reader may know the slots in another order
    shapes = {slot: {field: rows.shape for field, rows in tables[slot].items()} for slot in sorted(tables)}
    return [
        (
            f"{CODED_KIND}{slots[-1]}",
            _stream_of(
                [rows for slot in slots for rows in tables[slot].values()],
                [known[slot][field] for slot in slots if slot in known for field in tables[slot]],
            ),
        )
        for slots in groups(shapes)
    ]


def _stream_of(tables: Sequence[Packed], known: list[Known]) -> Tensor:
    """Give the stream of some tables: that of a file as it is, where it holds these and no others."""
    first = tables[0]
    if isinstance(first, Coded) and first.stream.holds(tables, known):
        return first.stream.data
    return _bytes(coding.encode([rows.numbers.numpy() for rows in tables], known))


def _bytes(stream: bytes) -> Tensor:
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def groups(shapes: Shapes) -> Iterator[list[str]]:
    """Give the slots of each stream."""
    slots: list[str] = []
    numbers = 0
    for slot, of_slot in shapes.items():
        slots.append(slot)
        numbers += sum(rows * length for rows, length in of_slot.values())
        if numbers >= GROUP:
            yield slots
            slots, numbers = [], 0
    if slots:
        yield slots


class Stream:
    """A stream of some slots, unpacked when one of them is looked at.

    Args:
        data: of the file, a view.
        shapes: of what it holds.
        refuse: makes an error of what is wrong with it.
        known: gives what is known of them, when they are unpacked.
    """

    def __init__(
        self,
        data: Tensor,
        shapes: Sequence[tuple[int, int]],
        refuse: Callable[[str], Exception],
        known: Callable[[], list[Known]],
    ) -> None:
        self.data, self._shapes, self._refuse, self._known = data, shapes, refuse, known

    @cached_property
    def bits(self) -> list[int]:
        """Of the rows in memory.

        Raises:
            FormatError: if the stream does not begin with 8 or 16 for each.
        """
        try:
            return coding.bits_in(self.data[: len(self._shapes)].numpy().tobytes(), len(self._shapes))
        except FormatError as error:
            raise self._refuse(str(error)) from None

    @cached_property
    @cpu_by_default
    def tables(self) -> list[Packed]:
        """The rows.

        Raises:
            FormatError: if the stream is not one of such rows.
        """
        try:
            tables = coding.decode(self.data.numpy().tobytes(), self._shapes, self._known())
        except FormatError as error:
            raise self._refuse(str(error)) from None
        return [packed_numbers(torch.from_numpy(table)) for table in tables]

    def holds(self, tables: Sequence[Packed], known: list[Known]) -> bool:
        """Say whether these are its tables, all of them in their order, of which the same is known."""
        own = [isinstance(rows, Coded) and rows.stream is self and rows.place == i for i, rows in enumerate(tables)]
        return all(own) and len(own) == len(self._shapes) and same(known, self._known())

    @property
    def bytes_per_number(self) -> float:
        """What the stream takes in its file for each of its numbers."""
        return self.data.numel() / sum(rows * length for rows, length in self._shapes)


class Coded(Packed):
    """Rows of a :class:`Stream`, in memory from when they are first looked at."""

    stream: Stream
    place: int
    _rows: int

    def __init__(self, stream: Stream, place: int, shape: tuple[int, int]) -> None:
        found = {"length": shape[1], "bits": stream.bits[place], "stream": stream, "place": place, "_rows": shape[0]}
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @cached_property
    def codes(self) -> Tensor:
        """As :class:`Packed`."""
        return self.stream.tables[self.place].codes

    @cached_property
    def scales(self) -> Tensor:
        """As :class:`Packed`."""
        return self.stream.tables[self.place].scales

    @property
    def shape(self) -> tuple[int, int]:
        """As :class:`Packed`."""
        return self._rows, self.length

    @property
    def nbytes(self) -> int:
        """As :class:`Packed`."""
        return self.shape[0] * (self.length * self.bits // 8 + torch.float16.itemsize * -(-self.length // BLOCK))

    @property
    def file_bytes(self) -> float:
        """What a row takes in its file."""
        return self.length * self.stream.bytes_per_number

    @property
    def device(self) -> torch.device:
        """As :class:`Packed`."""
        return torch.device("cpu")


def coded_bytes(columns: Columns) -> NDArray[np.int64]:
    """Give how much less than in memory the columns of every task take in a file because they are coded, ``[T]``.

    A stream's bytes count for all of its rows alike, by their lengths; what is in no file yet is coded for it, a table
    at a time.
    """
    saved = np.zeros(len(columns.tasks))
    known = Beside.of(columns).known()
    ss, sp, ps, pp = columns.counts.T
    rows_of = dict(zip(CODED_FIELDS, (ss + sp, ps + pp, np.where(columns.dense, 0, ss) + ps, sp + pp), strict=True))
    for field in CODED_FIELDS:
        rows = getattr(columns, field)
        if not _is_coded(rows):
            continue
        each = (
            rows.file_bytes
            if isinstance(rows, Coded)
            else len(coding.encode([rows.numbers.numpy()], [known[field]])) / len(rows.codes)
        )
        saved += (row_bytes(rows.length, CODED) - each) * rows_of[field]
    if saved.any() and (falls := weights.falls_of(columns)) is not None:
        each = len(weights.encode([falls])) / len(columns.weights)
        saved += (columns.weights.itemsize - each) * columns.counts.sum(1)
    whole: NDArray[np.int64] = saved.round().astype(np.int64)
    return whole


def _is_coded(rows: Rows) -> bool:
    if isinstance(rows, Coded):
        return True
    if not isinstance(rows, Packed) or rows.bits not in coding.LARGEST or 0 in rows.shape:
        return False
    numbers = rows.numbers
    # no stream has -128
    if int(numbers.min()) < -coding.LARGEST[rows.bits] or int(numbers.max()) > coding.LARGEST[rows.bits]:
        return False
    # rows that were not rounded so tell in the first one
    return all(torch.equal(scales_of(numbers[:stop]), rows.scales[:stop]) for stop in (1, len(numbers)))
