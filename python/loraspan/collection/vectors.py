"""One side of a slot: the vectors of all its tasks, as combinations of rows that are never formed anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from loraspan.ops import RowBlocks


class Vectors(Protocol):
    """One side of a slot: per task up to ``r`` vectors, as combinations of the rows of ``x``.

    A task's factor vectors are rows of ``x`` themselves (:class:`FactorRows`), or made of a basis and private ends
    (:class:`loraspan.collection.stored.Ends`): nothing as long as a row is ever formed for them.
    """

    @property
    def x(self) -> RowBlocks:
        """``[R, d]``."""
        ...

    @property
    def count(self) -> int:
        """The number of tasks, ``T``."""
        ...

    @property
    def total(self) -> int:
        """The number of vectors of all tasks."""
        ...

    def pad(self, flat: Tensor) -> Tensor:
        """Give what the vectors have, ``[T, r, l]``, from what the rows have, ``[R, l]``; 0 where there is none."""
        ...

    def spread(self, padded: Tensor) -> Tensor:
        """Give the adjoint of :meth:`pad`."""
        ...

    def pack(self, padded: Tensor) -> Tensor:
        """Give ``[T, r, l]`` without what pads it, ``[total, l]``."""
        ...

    def unpack(self, packed: Tensor) -> Tensor:
        """Undo :meth:`pack`."""
        ...

    def rows_of(self, task: int) -> list[Tensor]:
        """Give the rows that a task's vectors are made of, in blocks."""
        ...

    def spread_of(self, task: int, of_vectors: Tensor) -> Tensor:
        """Give :meth:`spread` of one task: from ``[r, q]``, on the rows of :meth:`rows_of`."""
        ...

    def pad_of(self, task: int, of_rows: Tensor) -> Tensor:
        """Give :meth:`pad` of one task: ``[r, q]``, from what the rows of :meth:`rows_of` have."""
        ...


class FactorRows:
    """The factors of tasks as they come: each is a block of rows. See :class:`Vectors`."""

    def __init__(self, factors: Sequence[Tensor] | RowBlocks, rank: int, place: torch.device | None = None) -> None:
        self.x = RowBlocks.of(factors).on(place)
        self.count = len(self.x.rows)
        self.total = sum(self.x.rows)
        self._rank = rank
        ranks = self.x.rows
        is_full = all(r == rank for r in ranks)
        self._mask = None if is_full else torch.arange(rank) < torch.tensor(ranks)[:, None]

    def on(self, place: torch.device | None) -> FactorRows:
        """Give the same, for ``place`` to compute with; see :meth:`RowBlocks.on`."""
        return self if place is None else FactorRows(self.x, self._rank, place)

    def pad(self, flat: Tensor) -> Tensor:
        """See :class:`Vectors`; so for the others."""
        if self._mask is None:
            return flat.view(self.count, self._rank, flat.shape[1])
        padded = flat.new_zeros(self.count, self._rank, flat.shape[1])
        padded[self._mask] = flat
        return padded

    def spread(self, padded: Tensor) -> Tensor:
        """As :class:`Vectors`."""
        return padded.reshape(self.total, padded.shape[2]) if self._mask is None else padded[self._mask]

    pack, unpack = spread, pad

    def some(self, tasks: Sequence[int]) -> FactorRows:
        """Give those of some tasks."""
        return FactorRows([self.x.blocks[i] for i in tasks], self._rank, self.x.target)

    def rows_of(self, task: int) -> list[Tensor]:
        """As :class:`Vectors`."""
        return [self.x.blocks[task]]

    def spread_of(self, task: int, of_vectors: Tensor) -> Tensor:
        """As :class:`Vectors`."""
        return of_vectors[: self.x.rows[task]]

    def pad_of(self, task: int, of_rows: Tensor) -> Tensor:  # noqa: ARG002 - all tasks have one length
        """As :class:`Vectors`."""
        short = self._rank - of_rows.shape[0]
        return torch.nn.functional.pad(of_rows, (0, 0, 0, short)) if short else of_rows
