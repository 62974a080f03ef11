"""Tables of one slot with room for more rows than they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan.collection.columns import FIELDS, Columns
from loraspan.collection.rows import Rows, values_of
from loraspan.ops.cores import Cores
from loraspan.ops.packed import Packed
from loraspan.ops.packed_reference import BLOCK

_Integers = NDArray[np.int64]
_Most = tuple[int, int, int, int]
# rows of columns, and the tasks that they are of, by their rows in the index
Parts = Sequence[tuple[_Integers, Columns]]
# past the end of any table, and below what the kernels take for a damaged index
_NOWHERE = 1 << 59
# spare rows at least, and the share of them
_SPARE, _SHARE = 16, 8


class Form(NamedTuple):
    """How tables are kept.

    Attributes:
        device: where.
        dtype: of bases, and of ends unless they are trained: float16, bfloat16, float32 or float64; not of what is
            packed.
        packed: whether what is packed stays so.
        given: whether a user chose ``dtype``, which stays when the module takes another.
        train: whether weights and shared loadings are leaves that require gradients; there is no spare room then.
    """

    device: torch.device
    dtype: torch.dtype
    packed: bool = False
    given: bool = False
    train: bool = False

    @property
    def wide(self) -> torch.dtype:
        """The dtype of weights."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def ends(self) -> torch.dtype:
        """The dtype of ends that are not packed: what is trained has that of weights, for small steps to count."""
        return self.wide if self.train else self.dtype


class Room:
    """``[capacity, width]``, zeros at first: rows are written one block after another, plain or packed.

    Args:
        capacity: how many rows it has room for.
        width: of a row.
        dtype: of the entries where they are not packed.
        device: of the table.
        bits: of packed rows, 0 for plain ones.
    """

    def __init__(self, capacity: int, width: int, dtype: torch.dtype, device: torch.device, bits: int) -> None:
        self.capacity, self.used, self.bits = capacity, 0, bits
        self.rows: Rows
        if bits:
            codes = torch.zeros(capacity, -(-width * bits // 8), dtype=torch.uint8, device=device)
            scales = torch.zeros(capacity, -(-width // BLOCK), dtype=torch.float16, device=device)
            self.rows = Packed(codes, scales, width, bits)
        else:
            self.rows = torch.zeros(capacity, width, dtype=dtype, device=device)

    def takes(self, count: int, bits: int) -> bool:
        """Say whether so many more rows fit, of that form."""
        return not count or (self.used + count <= self.capacity and self.bits in (0, bits))

    def write(self, rows: Rows) -> None:
        """Write rows behind the others."""
        at = slice(self.used, self.used + rows.shape[0])
        if isinstance(self.rows, Packed):
            if rows.shape[0]:
                assert isinstance(rows, Packed)
                self.rows.codes[at], self.rows.scales[at] = rows.codes, rows.scales
        else:
            # of weights [., 1], which come as [.]
            self.rows[at].view(rows.shape).copy_(values_of(rows))
        self.used = at.stop


class Tables:
    """The columns of the tasks of a slot, and their index.

    Args:
        form: how they are kept.
        widths: ``(k_out, n, k_in, d)``.
        parts: what is to be written into them, for its size and form.
        rows: of the index.
        like: what they take the place of: no table gets smaller, and one that was too small gets twice as large.
    """

    def __init__(
        self, form: Form, widths: tuple[int, int, int, int], parts: Parts, rows: int, like: Tables | None
    ) -> None:
        self.form = form
        self.sizes: tuple[int, ...]
        needs, old = (*_lengths(parts), rows), (0,) * (len(FIELDS) + 1) if like is None else like.sizes
        self.sizes = tuple(_roomy(need, size, form.train) for need, size in zip(needs, old, strict=True))
        dtypes = (form.wide, *[form.ends] * len(widths))
        fields = zip(self.sizes, (1, *widths), dtypes, _bits_of(parts, form), strict=False)
        self._rooms = [Room(size, width, dtype, form.device, bits) for size, width, dtype, bits in fields]
        self.refusal, most = self._refuse_by(widths[0], _most(parts, like))
        index = torch.from_numpy(np.tile(self.refusal, (self.sizes[-1], 1)))
        self.cores = self._cores(index.to(form.device), most)

    def takes(self, parts: Parts, rows: int) -> bool:
        """Say whether more columns, and an index of so many rows, fit."""
        lengths, bits = _lengths(parts), _bits_of(parts, self.form)
        fit = all(room.takes(*more) for room, *more in zip(self._rooms, lengths, bits, strict=True))
        return fit and rows <= self.sizes[-1]

    def widen(self, parts: Parts) -> None:
        """Have ``cores`` that tasks of so many columns may be written to.

        Where they take new ones, these have an index of their own: what was told of fewer columns reads the old one.
        """
        most = _most(parts, self)
        if most != self.cores.most:
            self.cores = replace(self.cores, index=self.cores.index.clone(), most=most)

    @torch.no_grad()
    def write(self, parts: Parts, numbers: _Integers) -> None:
        """Write the columns of tasks whose rows of the index are ``numbers``, ascending: the index at last, at once."""
        lines = np.zeros((len(numbers), self.refusal.shape[0]), dtype=np.int64)
        for of_rows, columns in parts:
            starts = columns.offsets()[:-1] + [room.used for room in self._rooms]
            at = np.searchsorted(numbers, of_rows)
            lines[at] = np.concatenate([starts, columns.counts, columns.dense[:, None]], axis=1)
            for room, rows in zip(self._rooms, columns.tensors().values(), strict=True):
                room.write(rows)
        device = self.form.device
        self.cores.index[torch.from_numpy(numbers).to(device)] = torch.from_numpy(lines).to(device)

    def _refuse_by(self, k_out: int, most: _Most) -> tuple[_Integers, _Most]:
        """Give the row of the index that refuses, and ``most`` with it.

        On the CPU it points past the tables, of which the kernels tell. Elsewhere it is a column that lies in them, as
        not all kernels look: left shared, or private where there is no basis, with a weight that makes NaN of it.
        """
        row = np.zeros(len(FIELDS) + 5, dtype=np.int64)
        form = 0 if k_out or self.form.device.type == "cpu" else 2
        row[len(FIELDS) + form] = 1
        if self.form.device.type == "cpu":
            row[0] = _NOWHERE
            return row, most
        weights = self._rooms[0]
        weights.capacity -= 1
        weights.rows[weights.capacity] = torch.nan  # type: ignore[index]
        row[0] = weights.capacity
        ss, sp, ps, pp = most
        return row, (max(ss, 1), sp, ps, pp) if form == 0 else (ss, sp, max(ps, 1), pp)

    def _cores(self, index: Tensor, most: _Most) -> Cores:
        weights, *ends = (room.rows for room in self._rooms)
        assert isinstance(weights, Tensor)
        weights = weights.view(-1)
        left, left_private, right, right_private = (end.codes if isinstance(end, Packed) else end for end in ends)
        if self.form.train:
            for leaf in (weights, left, right):
                leaf.requires_grad_()
        packed = [end if isinstance(end, Packed) else None for end in ends]
        return Cores(
            index, weights, left, left_private, right, right_private, most,
            (packed[0], packed[1], packed[2], packed[3]),
        )  # fmt: skip


def refuse(index: Tensor, refusal: _Integers, numbers: _Integers) -> None:
    """Let an index refuse tasks, those of them that it has."""
    numbers = numbers[numbers < index.shape[0]]
    if len(numbers):
        index[torch.from_numpy(numbers).to(index.device)] = torch.from_numpy(refusal).to(index.device)


def _roomy(need: int, old: int, exact: bool) -> int:
    if exact:
        # one that refuses, and no table is empty
        return need + 1
    first = need + need // _SHARE + _SPARE
    return first if not old else old if need < old else max(2 * old, first)


def _lengths(parts: Parts) -> list[int]:
    """Give how many rows of each table there are to write."""
    found: list[int] = sum((columns.offsets()[-1] for _, columns in parts), np.zeros(len(FIELDS), np.int64)).tolist()
    return found


def _bits_of(parts: Parts, form: Form) -> list[int]:
    """Give the bits of each table: those of all rows to write, 0 where they differ or are to be plain."""
    found: list[set[int]] = [set() for _ in FIELDS]
    for _, columns in parts:
        for bits, rows in zip(found, columns.tensors().values(), strict=True):
            if rows.shape[0]:
                bits.add(rows.bits if isinstance(rows, Packed) else 0)
    return [bits.copy().pop() if form.packed and len(bits) == 1 else 0 for bits in found]


def _most(parts: Parts, like: Tables | None) -> _Most:
    """Give the capacity for columns of a task: powers of two, unless what was there is enough."""
    old = (0,) * 4 if like is None else like.cores.most
    counts = [columns.counts.max(axis=0) for _, columns in parts]
    new = np.max(counts, axis=0, initial=0).tolist() if counts else [0] * 4
    ss, sp, ps, pp = (a if b <= a else 1 << (b - 1).bit_length() for a, b in zip(old, new, strict=True))
    return ss, sp, ps, pp
