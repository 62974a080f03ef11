"""The tasks of a collection as a fit sees adapters: vectors made of bases and private ends, none of them formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan.collection.collection import Collection
from loraspan.collection.columns import Columns
from loraspan.collection.factors import SlotFactors
from loraspan.collection.rows import values_of
from loraspan.collection.segments import spans
from loraspan.ops import RowBlocks, gram_many, reconstruct
from loraspan.ops.packed import Packed, unpack

_Integers = NDArray[np.int64]


@dataclass(frozen=True)
class _Index:
    """Where the ends of one side lie: for each its task, its place among that task's columns, and its row."""

    task: _Integers
    place: _Integers
    row: _Integers

    def sorted(self) -> _Index:
        order = np.lexsort((self.place, self.task))
        return _Index(self.task[order], self.place[order], self.row[order])

    def of(self, task: int) -> slice:
        start, stop = np.searchsorted(self.task, (task, task + 1))
        return slice(int(start), int(stop))


class Ends:
    """One side of the columns of all tasks in a slot, as :class:`loraspan.collection.vectors.Vectors`.

    The rows of ``x`` are the vectors of the basis and the private ends, where they lie. A task's vectors are its
    columns' ends, each times the square root of the column's weight, so that ``dW_i = left_i right_i^T``.

    Args:
        basis: ``[k, d]``, its vectors as rows.
        private: blocks ``[., d]`` of private ends.
        loadings: ``[., k]``, float64: the shared ends.
        shared: of the shared ends; rows count in ``loadings``.
        own: of the private ends; rows count in ``private``, and those of a task follow each other.
        roots: ``[T, c]``, float64: square roots of the weights, 0 past a task's columns.
        counts: ``[T]``: columns of each task.
    """

    def __init__(
        self,
        basis: Tensor,
        private: Sequence[Tensor],
        loadings: Tensor,
        shared: _Index,
        own: _Index,
        roots: Tensor,
        counts: _Integers,
    ) -> None:
        self._basis, self._private, self._loadings = basis, [p for p in private if len(p)], loadings
        self._shared, self._own, self._roots = shared.sorted(), own.sorted(), roots
        self._mask = torch.arange(roots.shape[1]) < torch.from_numpy(counts)[:, None]
        self.count = len(counts)
        self.total = int(counts.sum())
        self.rank = basis.shape[0]
        self.x = RowBlocks([*([basis] if self.rank else []), *self._private], columns=basis.shape[1])
        self._starts = np.cumsum([0, *(len(p) for p in self._private)])

    def pad(self, flat: Tensor) -> Tensor:
        """As ``Vectors``."""
        out = flat.new_zeros(*self._roots.shape, flat.shape[1])
        if self.rank and len(self._shared.task):
            seen = reconstruct(self._loadings, flat[: self.rank].contiguous())
            out[self._shared.task, self._shared.place] = seen[self._shared.row]
        out[self._own.task, self._own.place] = flat[self.rank + self._own.row]
        return out * self._roots.unsqueeze(-1)

    def spread(self, padded: Tensor) -> Tensor:
        """As ``Vectors``."""
        ends = padded * self._roots.unsqueeze(-1)
        flat = ends.new_zeros(self.x.shape[0], ends.shape[2])
        if self.rank and len(self._shared.task):
            on = ends.new_zeros(len(self._loadings), ends.shape[2])
            on.index_add_(0, torch.from_numpy(self._shared.row), ends[self._shared.task, self._shared.place])
            flat[: self.rank] = reconstruct(self._loadings.T, on)
        flat[self.rank + self._own.row] = ends[self._own.task, self._own.place]
        return flat

    def pack(self, padded: Tensor) -> Tensor:
        """As ``Vectors``."""
        return padded[self._mask]

    def unpack(self, packed: Tensor) -> Tensor:
        """As ``Vectors``."""
        out = packed.new_zeros(*self._roots.shape, packed.shape[1])
        out[self._mask] = packed
        return out

    def rows_of(self, task: int) -> list[Tensor]:
        """As ``Vectors``."""
        rows = self._own.row[self._own.of(task)]
        if not len(rows):
            own = self._basis.new_empty(0, self._basis.shape[1])
        else:
            block = int(np.searchsorted(self._starts, rows[0], side="right")) - 1
            first = int(rows.min() - self._starts[block])
            own = self._private[block][first : first + len(rows)]
        return [self._basis, own] if self.rank else [own]

    def spread_of(self, task: int, of_vectors: Tensor) -> Tensor:
        """As ``Vectors``."""
        shared, own = self._of(task)
        ends = of_vectors * self._roots[task].unsqueeze(-1)
        on_basis = self._loadings[self._shared.row[shared]].T @ ends[self._shared.place[shared]]
        private = ends.new_zeros(own.stop - own.start, ends.shape[1])
        private[self._rows_within(own)] = ends[self._own.place[own]]
        return torch.cat([on_basis, private])

    def pad_of(self, task: int, of_rows: Tensor) -> Tensor:
        """As ``Vectors``."""
        shared, own = self._of(task)
        out = of_rows.new_zeros(self._roots.shape[1], of_rows.shape[1])
        out[self._shared.place[shared]] = self._loadings[self._shared.row[shared]] @ of_rows[: self.rank]
        out[self._own.place[own]] = of_rows[self.rank + self._rows_within(own)]
        return out * self._roots[task].unsqueeze(-1)

    def grams(self) -> Tensor:
        """Give ``[T, c, c]``, float64: the products of every task's vectors with each other."""
        grams, of_tasks = self._many_grams()
        width = self._roots.shape[1]
        inner = self._roots.new_zeros(self.count, width, width)
        cross = self._roots.new_zeros(self.count, width, self.rank)
        for gram, tasks in zip(grams, of_tasks, strict=True):
            first = self.rank
            for task in tasks:
                own = self._own.of(task)
                rows = torch.from_numpy(first + self._rows_within(own))
                places = torch.from_numpy(self._own.place[own])
                inner[task, places[:, None], places] = gram[rows[:, None], rows]
                cross[task, places] = gram[rows, : self.rank]
                first += own.stop - own.start
        if self.rank:
            on = self._roots.new_zeros(self.count, width, self.rank)
            on[self._shared.task, self._shared.place] = self._loadings[self._shared.row]
            edge = on @ cross.mT
            inner = inner + on @ grams[0][: self.rank, : self.rank] @ on.mT + edge + edge.mT
        return inner * self._roots.unsqueeze(-1) * self._roots.unsqueeze(-2)

    def _many_grams(self) -> tuple[list[Tensor], list[list[int]]]:
        """Grams of the basis with the private ends of some tasks each: of about as many rows as the basis has."""
        groups: list[list[int]] = [[]]
        rows = 0
        for task in range(self.count):
            own = self._own.of(task)
            more = own.stop - own.start
            if more and rows and rows + more > max(self.rank, 1):
                groups.append([])
                rows = 0
            if more:
                groups[-1].append(task)
                rows += more
        basis = [self._basis] if self.rank else []
        length = self._basis.shape[1]
        jobs = [RowBlocks([*basis, *(self.rows_of(task)[-1] for task in tasks)], columns=length) for tasks in groups]
        return gram_many(jobs, precision="f64"), groups

    def _of(self, task: int) -> tuple[slice, slice]:
        return self._shared.of(task), self._own.of(task)

    def _rows_within(self, own: slice) -> _Integers:
        rows = self._own.row[own]
        return rows - rows.min() if len(rows) else rows


def stored_slots(collection: Collection) -> list[SlotFactors]:
    """Give every slot that some task has as a fit takes it; members count in ``collection.tasks``."""
    return [found for path in collection.slots if (found := _stored_slot(collection, path)) is not None]


def _stored_slot(collection: Collection, path: str) -> SlotFactors | None:
    space = collection.slots[path]
    parts: list[tuple[Columns, _Integers, _Integers]] = []
    members: list[int] = []
    first = 0
    for segment in collection.segments:
        alive = np.array([task is not None for task in segment.tasks], dtype=np.bool_)
        if path in segment.columns:
            columns = segment.columns[path]
            rows = np.flatnonzero(alive[columns.tasks])
            parts.append((columns, rows, len(members) + np.arange(len(rows))))
            members += (first + np.cumsum(alive) - 1)[columns.tasks[rows]].tolist()
        first += segment.living
    if not members:
        return None
    up, down = (_ends(side, basis, parts, len(members)) for side, basis in enumerate((space.u, space.v)))
    grams = up.grams(), down.grams()
    squares = (grams[0] * grams[1]).sum((-1, -2)).clamp(min=0)
    double = collection.dtype == torch.float64
    ones = torch.ones(len(members), dtype=torch.float64)
    return SlotFactors(path, space.shape, space.kind, space.kernel, members, up, down, *grams, ones, squares, double)


def _ends(
    side: int, stored: Tensor | Packed, parts: Sequence[tuple[Columns, _Integers, _Integers]], count: int
) -> Ends:
    """Join the ends of one side over the segments."""
    basis = unpack(stored) if isinstance(stored, Packed) else stored.T
    counts = np.zeros(count, dtype=np.int64)
    for columns, rows, tasks in parts:
        counts[tasks] = columns.counts[rows].sum(axis=1)
    roots = torch.zeros(count, int(counts.max(initial=0)), dtype=torch.float64)
    pieces: dict[str, list[_Index]] = {"shared": [], "own": []}
    loadings, private, seen, owned = [], [], 0, 0
    for columns, rows, tasks in parts:
        offsets = columns.offsets()
        weights = _index(tasks, counts[tasks], np.zeros_like(tasks), offsets[rows, 0])
        roots[weights.task, weights.place] = columns.weights[weights.row].double().sqrt()
        on = values_of([columns.left_loadings, columns.right_loadings][side]).double()
        if side == 1 and columns.dense.any():
            on = torch.cat([on, torch.eye(len(basis), dtype=torch.float64)])
        for kind, index in _runs(side, columns, rows, tasks, len(on) - len(basis)):
            shift = seen if kind == "shared" else owned
            pieces[kind].append(_Index(index.task, index.place, index.row + shift))
        loadings.append(on)
        private.append(values_of([columns.left_private, columns.right_private][side]))
        seen, owned = seen + len(on), owned + len(private[-1])
    joined = {kind: _joined(found) for kind, found in pieces.items()}
    return Ends(basis, private, torch.cat(loadings), joined["shared"], joined["own"], roots, counts)


def _runs(side: int, columns: Columns, rows: _Integers, tasks: _Integers, identity: int) -> list[tuple[str, _Index]]:
    """The runs of ends of one side: how many, from which place among the columns, and from which row."""
    ss, sp, ps, pp = columns.counts[rows].T
    offsets, zero = columns.offsets()[rows], np.zeros_like(tasks)
    if side == 0:
        runs = [("shared", ss + sp, zero, offsets[:, 1]), ("own", ps + pp, ss + sp, offsets[:, 2])]
    else:
        dense = columns.dense[rows]
        listed = np.where(dense, 0, ss)
        runs = [
            ("shared", listed, zero, offsets[:, 3]),
            ("shared", ss - listed, zero, zero + identity),
            ("own", sp, ss, offsets[:, 4]),
            ("shared", ps, ss + sp, offsets[:, 3] + listed),
            ("own", pp, ss + sp + ps, offsets[:, 4] + sp),
        ]
    return [(kind, _index(tasks, length, place, row)) for kind, length, place, row in runs]


def _index(tasks: _Integers, lengths: _Integers, places: _Integers, rows: _Integers) -> _Index:
    return _Index(np.repeat(tasks, lengths), spans(places, places + lengths), spans(rows, rows + lengths))


def _joined(pieces: Sequence[_Index]) -> _Index:
    return _Index(*(np.concatenate([getattr(p, field) for p in pieces]) for field in ("task", "place", "row")))
