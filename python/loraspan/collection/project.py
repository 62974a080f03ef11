"""Say what a collection's bases carry of an adapter, and what keeping the rest would cost; nothing changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from loraspan.adapters.base import Adapter
from loraspan.collection.collection import Collection
from loraspan.collection.columns import Columns
from loraspan.collection.express import express, read_standing
from loraspan.collection.layout import segment_bytes
from loraspan.collection.update import check_goal
from loraspan.linalg.roots import gram_root

_SHOWN = 8


@dataclass(frozen=True)
class SlotProjection:
    """One slot of a :class:`Projection`.

    Attributes:
        path: its module path.
        share: of the adapter's energy ``|dW|_F^2`` that lies in this slot.
        error: relative error of the slot with shared ends alone.
        outside_in: share of the slot's energy outside the input basis.
        outside_out: share outside the output basis.
        known: whether the collection has this slot.
    """

    path: str
    share: float
    error: float
    outside_in: float
    outside_out: float
    known: bool


@dataclass(frozen=True)
class Projection:
    """What the bases carry of an adapter. ``str()`` of it is a table, ``as_dict()`` plain values.

    Attributes:
        name: of the adapter.
        error: relative Frobenius error on ``dW`` over all slots with shared ends alone, rounding included.
        outside: share of the energy that the bases do not carry, ``error ** 2``.
        slots: of the adapter, the one that adds most to the error first.
        max_error: what ``nbytes`` and the columns below are for.
        error_if_added: what its error would be.
        nbytes: what adding it within ``max_error`` would take on disk, beside the manifest.
        columns_if_added: how many columns it would have.
        private_if_added: how many of them would have a private end.
        loadings: by path, its columns with shared ends alone, as the collection would hold them.
    """

    name: str
    error: float
    outside: float
    slots: tuple[SlotProjection, ...]
    max_error: float
    error_if_added: float
    nbytes: int
    columns_if_added: int
    private_if_added: int
    loadings: Mapping[str, Columns] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Give plain values, for JSON; the loadings are left out."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "loadings"}
        return {**values, "slots": [asdict(slot) for slot in self.slots]}

    def __str__(self) -> str:
        lines = [
            f"{self.name}: the bases carry all but {self.outside:.3g} of its energy (error {self.error:.3g}). "
            f"Adding it within {self.max_error:g} takes {self.nbytes:,} bytes: {self.columns_if_added} columns, "
            f"{self.private_if_added} of them with a private end.",
            "",
            f"{'slot':<48} {'share':>7} {'error':>7} {'outside in':>10} {'out':>7}",
        ]
        for s in self.slots[:_SHOWN]:
            numbers = f"{s.share:>7.3f} {s.error:>7.3f} {s.outside_in:>10.3f} {s.outside_out:>7.3f}"
            lines.append(f"{s.path[-48:]:<48} {numbers}{'' if s.known else '  not in the collection'}")
        if len(self.slots) > _SHOWN:
            lines.append(f"and {len(self.slots) - _SHOWN} slots with smaller errors")
        return "\n".join(lines)


def project(collection: Collection, adapter: Adapter, *, max_error: float) -> Projection:
    """Give the report of an adapter against a collection's bases.

    Args:
        collection: nothing of it changes.
        adapter: it may have a task's name.
        max_error: relative error for which the cost of adding it is counted, between 0 and 1.

    Raises:
        ArgumentError: if ``max_error`` is not between 0 and 1, or below what rounding allows.
        MismatchError: if the adapter disagrees with the bases on a slot.
        NotFiniteError: if a factor holds a NaN or an infinity.
    """
    check_goal("project", max_error)
    shared, added = (
        express(collection.slots, [adapter], max_error=goal, dtype=collection.widths, operator="project")
        for goal in (None, max_error)
    )
    (alone,), (whole,) = shared.segment.tasks, added.segment.tasks
    assert alone is not None
    assert whole is not None
    counts = [columns.counts.sum(axis=0) for columns in added.segment.columns.values()]
    return Projection(
        name=adapter.name,
        error=alone.error,
        outside=alone.error**2,
        slots=_slots(collection, adapter, {path: float(gone) for path, (_, gone) in shared.lost.items()}),
        max_error=max_error,
        error_if_added=whole.error,
        nbytes=segment_bytes(added.segment),
        columns_if_added=int(sum(count.sum() for count in counts)),
        private_if_added=int(sum(count[1:].sum() for count in counts)),
        loadings=shared.segment.columns,
    )


def _slots(collection: Collection, adapter: Adapter, lost: Mapping[str, float]) -> tuple[SlotProjection, ...]:
    factors, bases = read_standing(collection.slots, [adapter], collection.dtype)
    total = max(sum(float(f.squares) for f in factors), math.ulp(0.0))
    found = []
    for f, both in zip(factors, bases, strict=True):
        canonical = f.canonical()
        outside = [
            _outside(factor, basis.products @ gram_root(basis.gram).inverse, canonical.s)
            for factor, basis in zip((canonical.x, canonical.y), both, strict=True)
        ]
        energy = float(f.squares)
        error = math.sqrt(lost[f.path] / energy) if energy > 0 else 0.0
        share = energy / total
        found.append(SlotProjection(f.path, share, error, outside[1], outside[0], f.path in collection.slots))
    return tuple(sorted(found, key=lambda slot: -slot.share * slot.error**2))


def _outside(transform: Tensor, seen: Tensor, s: Tensor) -> float:
    """Give the share of ``|dW|^2`` outside a basis: the other factor's columns are orthogonal, of squared length s."""
    inside = float((s.unsqueeze(-1) * (transform.mT @ seen).square()).sum())
    energy = float(s.square().sum())
    return max(0.0, 1 - inside / energy) if energy > 0 else 0.0
