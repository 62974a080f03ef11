r"""Keep loadings that were trained in the place of those that a task had.

A task that was trained has no original adapter any more. What was trained takes its place: the error of the task is
what storing it lost, relative to what was trained, and is of the kind ``"trained"``.

With ``P`` and ``Q`` a task's private ends, its ``dW`` is ``[U P] K [V Q]^T``, ``K`` made of its coefficients, and
``|dW|_F^2 = tr(G_left K G_right K^T)`` with the Grams of both, in float64: nothing of the size of ``dW`` is formed, and
the difference of two such tasks is that of their ``K``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loraspan.adapters.base import Source
from loraspan.collection.collection import Collection, Segment, SlotSpace, Task
from loraspan.collection.columns import FIELDS, Columns
from loraspan.collection.rows import Rows, Width, flip_rows, store_rows, values_of
from loraspan.collection.segments import merge, select
from loraspan.collection.update import remove
from loraspan.errors import ArgumentError, NotFiniteError
from loraspan.ops.packed import unpacked

KIND = "trained"
_BEGAN = "trained in a space, from "


class Loadings(NamedTuple):
    """What is trained of a task's columns in one slot, in the order of :class:`Columns`; of any signs and lengths.

    Attributes:
        weights: ``[c]``.
        left: ``[., k_out]``, shared left ends.
        right: ``[., k_in]``, shared right ends, but for the first of a dense core.
    """

    weights: Tensor
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Part:
    """One slot of one task.

    Attributes:
        space: its bases.
        columns: as stored, a table of one row.
        grams: of the two bases, once somebody has asked; shared by the tasks of a slot.
    """

    space: SlotSpace
    columns: Columns
    grams: list[Tensor] = field(default_factory=list)

    @property
    def loadings(self) -> Loadings:
        """What is stored, unpacked."""
        ends = (self.columns.left_loadings, self.columns.right_loadings)
        return Loadings(self.columns.weights, *(values_of(rows) for rows in ends))

    def core(self, loadings: Loadings) -> Tensor:
        """Give ``K [k_out + p, k_in + q]``, float64: loadings for these columns, on the bases and private ends."""
        (ss, sp, ps, pp), (k_out, k_in) = self.columns.counts[0].tolist(), self.space.ranks
        weights, left, right = (tensor.double() for tensor in loadings)
        dense = bool(self.columns.dense[0])
        outer, inner = weights.new_zeros(len(weights), k_out + ps + pp), weights.new_zeros(len(weights), k_in + sp + pp)
        outer[: ss + sp, :k_out] = left
        outer[ss + sp :, k_out:] = torch.eye(ps + pp)
        inner[:ss, :k_in] = torch.eye(ss, k_in) if dense else right[:ss]
        inner[ss : ss + sp, k_in : k_in + sp] = torch.eye(sp)
        inner[ss + sp : ss + sp + ps, :k_in] = right[0 if dense else ss :]
        inner[ss + sp + ps :, k_in + sp :] = torch.eye(pp)
        return (outer.T * weights) @ inner

    def squares(self, *cores: Tensor) -> Iterator[float]:
        """Give ``|[U P] K [V Q]^T|_F^2`` for some ``K``."""
        if not self.grams:
            bases = (unpacked(basis).double() for basis in (self.space.u, self.space.v))
            self.grams.extend(basis.T @ basis for basis in bases)
        sides = zip(
            (self.space.u, self.space.v),
            (self.columns.left_private, self.columns.right_private),
            self.grams,
            strict=True,
        )
        left, right = (_with_private(*side) for side in sides)
        return (max(0.0, float(((left @ core @ right) * core).sum())) for core in cores)


def parts_of(collection: Collection, name: str, grams: dict[str, list[Tensor]] | None = None) -> dict[str, Part]:
    """Give the slots of a task.

    Raises:
        UnknownTaskError: if there is no such task.
    """
    segment, place = collection.find(name)
    found = {}
    for path, columns in segment.columns.items():
        row = columns.row_of(place)
        if row is not None:
            alone = select(columns, np.array([row]), np.zeros(1, dtype=np.int64))
            found[path] = Part(collection.slots[path], alone, [] if grams is None else grams.setdefault(path, []))
    return found


def keep(collection: Collection, trained: Mapping[str, Mapping[str, Loadings]]) -> Collection:
    """Give the collection with trained loadings for tasks, which move to the end as they do when they are replaced.

    Shared columns are stored as the singular value decomposition of their core, so that rounding costs each its share
    of its own size; private ends stay bit for bit. A task none of whose loadings changed stays as it is, and so do the
    bases and all other tasks: the very same objects.

    Args:
        collection: has the tasks.
        trained: by task and slot.

    Raises:
        UnknownTaskError: if there is no such task.
        ArgumentError: if no loading of any of them changed.
        NotFiniteError: if a loading is NaN or infinite, or a column too long for float32; names it.
    """
    made, grams = [], dict[str, list[Tensor]]()
    for name, of_slots in trained.items():
        parts = parts_of(collection, name, grams)
        changed = {path: new for path, new in of_slots.items() if not _same(parts[path].loadings, new)}
        for path, new in changed.items():
            _check_finite(name, path, new)
        if changed:
            made.append(_kept(collection, collection.task(name), parts, changed))
    if not made:
        told = ", ".join(repr(name) for name in trained)
        raise ArgumentError(
            f"keep: needs loadings that were trained; those of {told} are as the space has them: give the optimizer "
            f"served.loadings().values(), and train before keep"
        )
    left = remove(collection, [task.name for segment in made for task in segment.tasks if task is not None])
    return replace(left, segments=(*left.segments, merge(made)))


def as_trained(task: Task, norm: float, error: float, began: str) -> Task:
    """Give a task as one that is trained: in place of its original there is what was trained, of norm ``norm``."""
    path = task.source.path if task.source.path.startswith(_BEGAN) else _BEGAN + (task.source.path or began)
    source = Source(path, base_model=task.source.base_model, licence=task.source.licence)
    return replace(task, error=error, error_kind=KIND, norm=norm, forgotten=0.0, source=source)


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Give rows of length 1 and their lengths; rows of zeros stay, with a length of 1."""
    lengths = rows.norm(dim=1)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    return rows / lengths[:, None], lengths


def _with_private(basis: Rows, private: Rows, gram: Tensor) -> Tensor:
    """Give the Gram of ``[basis, private ends]`` from that of the basis."""
    if not private.shape[0]:
        return gram
    own = values_of(private).double()
    cross = own @ unpacked(basis).double()
    return torch.cat([torch.cat([gram, cross.T], dim=1), torch.cat([cross, own @ own.T], dim=1)])


def _same(stored: Loadings, found: Loadings) -> bool:
    return all(torch.equal(old.to(new.dtype), new) for old, new in zip(stored, found, strict=True))


def _check_finite(task: str, path: str, found: Loadings) -> None:
    for name, tensor in found._asdict().items():
        if not tensor.isfinite().all():
            raise NotFiniteError(
                f"keep: what was trained of task {task!r}, slot {path!r}, {name}, has a NaN or an infinity, as where "
                f"training diverged: train anew, with a lower learning rate"
            )


def _kept(collection: Collection, task: Task, parts: Mapping[str, Part], changed: Mapping[str, Loadings]) -> Segment:
    """Give a segment of the task alone."""
    columns, norm, lost = {}, 0.0, 0.0
    for path, part in parts.items():
        wanted = part.core(changed.get(path, part.loadings))
        columns[path], off = part.columns, torch.zeros_like(wanted)
        if path in changed:
            columns[path], core = _stored(part, changed[path], collection.widths.loadings)
            if not columns[path].weights.isfinite().all():
                raise NotFiniteError(f"keep: a column of task {task.name!r} in slot {path!r} is too long for float32")
            off = wanted - core
        of_slot, gone = part.squares(wanted, off)
        norm, lost = norm + of_slot, lost + gone
    error = math.sqrt(lost / norm) if norm > 0 else 0.0
    return Segment((as_trained(task, math.sqrt(norm), error, repr(task.name)),), columns)


def _stored(part: Part, trained: Loadings, width: Width) -> tuple[Columns, Tensor]:
    """Give columns with unit ends and weights that are not negative, as they are stored, and their core."""
    ss, sp, ps, pp = part.columns.counts[0].tolist()
    weights, left, right = (tensor.double() for tensor in trained)
    dense = bool(part.columns.dense[0])
    if not dense:
        first = _decomposed(*(tensor[:ss] for tensor in (left, weights, right)))
        left, weights, right = (torch.cat([a, b[ss:]]) for a, b in zip(first, (left, weights, right), strict=True))
        ss = len(first[1])
    weights, (left, left_lengths) = weights.clone(), unit_rows(left)
    right, right_lengths = unit_rows(right)
    weights[: ss + sp] *= left_lengths
    with_right = torch.cat([torch.arange(0 if dense else ss), torch.arange(ss + sp, ss + sp + ps)])
    weights[with_right] *= right_lengths
    signs = torch.where(weights < 0, -1.0, 1.0).double()
    left *= signs[: ss + sp, None]
    right *= torch.where(with_right < ss, 1.0, signs[with_right])[:, None]
    turned = torch.ones(ps + pp)
    turned[ps:] = signs[ss + sp + ps :]
    own = flip_rows(part.columns.left_private, turned) if (turned < 0).any() else part.columns.left_private
    rows: tuple[Rows, ...] = (weights.abs().float(), store_rows(left, width), own, store_rows(right, width))
    rows = (*rows, part.columns.right_private)
    counts = np.array([[ss, sp, ps, pp]], dtype=np.int64)
    columns = Columns.made(part.columns.tasks, counts, part.columns.dense, dict(zip(FIELDS, rows, strict=True)))
    stored = Part(part.space, columns)
    # on the private ends as they were, before any was turned
    signs[: ss + sp + ps] = 1.0
    return columns, stored.core(stored.loadings._replace(weights=columns.weights.double() * signs))


def _decomposed(left: Tensor, weights: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give the singular value decomposition of ``sum_c weights_c left_c right_c^T``, rows for both sides."""
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left.T), torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd((r_left * weights) @ r_right.T, full_matrices=False)
    return (q_left @ u).T, s, vh @ q_right.T
