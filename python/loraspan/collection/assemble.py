"""Put the columns that a fit made, form by form, into the ragged tensors of a slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loraspan.collection.columns import FORMS, Columns
from loraspan.collection.rows import Rows, cat_rows, no_rows, take_rows


class Part(NamedTuple):
    """Columns of one form, of all tasks of a slot.

    Attributes:
        form: one of :data:`loraspan.collection.columns.FORMS`.
        counts: ``[T]`` int64: columns per task.
        weights: ``[C]``, float64, columns of task after task.
        left: ``[C, k_out]`` or ``[C, n]``, as stored.
        right: ``[C, k_in]`` or ``[C, d]``; None for dense cores, whose right ends are the basis itself.
    """

    form: str
    counts: Tensor
    weights: Tensor
    left: Rows
    right: Rows | None


def join_parts(one: Part, other: Part) -> Part:
    """Give the columns of two parts of one form with two private ends, those of a task together."""
    assert one.form == other.form == "pp"
    counts = (one.counts, other.counts)
    ends = [
        _interleave(list(zip(counts, rows, strict=True)), one.left.shape[1], torch.float32)
        for rows in ((one.left, other.left), (one.right, other.right))
    ]
    weights = _interleave(
        list(zip(counts, (one.weights[:, None], other.weights[:, None]), strict=True)), 1, torch.float64
    )
    assert isinstance(weights, Tensor)
    return Part("pp", one.counts + other.counts, weights.flatten(), *ends)


def assemble(
    members: Sequence[int], parts: Sequence[Part], shape: tuple[int, int], ranks: tuple[int, int], dtype: torch.dtype
) -> Columns:
    """Give the columns of a slot: those of a task together, in the order of the forms.

    Args:
        members: the tasks that have the slot.
        parts: at most one per form.
        shape: ``(n, d)``.
        ranks: ``(k_out, k_in)``.
        dtype: of what has no rows.
    """
    ordered = sorted(parts, key=lambda part: FORMS.index(part.form))
    counts = torch.zeros(len(members), 4, dtype=torch.int64)
    for part in ordered:
        counts[:, FORMS.index(part.form)] = part.counts
    dense = any(part.right is None for part in ordered)

    def ends(side: int, kind: str, width: int) -> Rows:
        chosen = [part for part in ordered if part.form[side] == kind]
        return _interleave([(part.counts, part.left if side == 0 else part.right) for part in chosen], width, dtype)

    return Columns(
        tasks=np.asarray(members, dtype=np.int64),
        counts=counts.numpy(),
        dense=np.full(len(members), dense) & (counts[:, 0].numpy() > 0),
        weights=_weights(ordered),
        left_loadings=ends(0, "s", ranks[0]),
        left_private=ends(0, "p", shape[0]),
        right_loadings=ends(1, "s", ranks[1]),
        right_private=ends(1, "p", shape[1]),
    )


def _weights(parts: Sequence[Part]) -> Tensor:
    weights = _interleave([(part.counts, part.weights[:, None].float()) for part in parts], 1, torch.float32)
    assert isinstance(weights, Tensor)
    return weights.flatten()


def _interleave(parts: Sequence[tuple[Tensor, Rows | None]], width: int, dtype: torch.dtype) -> Rows:
    """Join the rows of several parts so that those of a task lie together, parts in order within it."""
    present = [(counts, rows) for counts, rows in parts if rows is not None and rows.shape[0]]
    if not present:
        return no_rows(width, dtype)
    joined = cat_rows([rows for _, rows in present])
    if len(present) == 1:
        return joined.contiguous() if isinstance(joined, Tensor) else joined
    tasks = torch.cat([torch.repeat_interleave(torch.arange(len(counts)), counts) for counts, _ in present])
    return take_rows(joined, torch.argsort(tasks, stable=True))
