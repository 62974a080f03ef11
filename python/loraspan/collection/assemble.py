"""Put the columns that a fit made, form by form, into the ragged tensors of a slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loraspan.collection.columns import FORMS, Columns


class Part(NamedTuple):
    """Columns of one form, of all tasks of a slot.

    Attributes:
        form: one of :data:`loraspan.collection.columns.FORMS`.
        counts: ``[T]`` int64: columns per task.
        weights: ``[C]``, float64, columns of task after task.
        left: ``[C, k_out]`` or ``[C, n]``, in the stored dtype.
        right: ``[C, k_in]`` or ``[C, d]``; None for dense cores, whose right ends are the basis itself.
    """

    form: str
    counts: Tensor
    weights: Tensor
    left: Tensor
    right: Tensor | None


def assemble(
    members: Sequence[int], parts: Sequence[Part], shape: tuple[int, int], ranks: tuple[int, int], dtype: torch.dtype
) -> Columns:
    """Give the columns of a slot: those of a task together, in the order of the forms.

    Args:
        members: the tasks that have the slot.
        parts: at most one per form.
        shape: ``(n, d)``.
        ranks: ``(k_out, k_in)``.
        dtype: of loadings and private ends.
    """
    ordered = sorted(parts, key=lambda part: FORMS.index(part.form))
    counts = torch.zeros(len(members), 4, dtype=torch.int64)
    for part in ordered:
        counts[:, FORMS.index(part.form)] = part.counts
    dense = any(part.right is None for part in ordered)

    def ends(side: int, kind: str, width: int) -> Tensor:
        chosen = [part for part in ordered if part.form[side] == kind]
        return _interleave([(part.counts, part.left if side == 0 else part.right) for part in chosen], width, dtype)

    return Columns(
        tasks=np.asarray(members, dtype=np.int64),
        counts=counts.numpy(),
        dense=np.full(len(members), dense) & (counts[:, 0].numpy() > 0),
        weights=_interleave([(part.counts, part.weights[:, None]) for part in ordered], 1, torch.float32).flatten(),
        left_loadings=ends(0, "s", ranks[0]),
        left_private=ends(0, "p", shape[0]),
        right_loadings=ends(1, "s", ranks[1]),
        right_private=ends(1, "p", shape[1]),
    )


def _interleave(parts: Sequence[tuple[Tensor, Tensor | None]], width: int, dtype: torch.dtype) -> Tensor:
    """Join the rows of several parts so that those of a task lie together, parts in order within it."""
    present = [(counts, rows) for counts, rows in parts if rows is not None and rows.shape[0]]
    if not present:
        return torch.empty(0, width, dtype=dtype)
    rows = torch.cat([rows.to(dtype) for _, rows in present]) if len(present) > 1 else present[0][1].to(dtype)
    if len(present) == 1:
        return rows.contiguous()
    tasks = torch.cat([torch.repeat_interleave(torch.arange(len(counts)), counts) for counts, _ in present])
    return rows[torch.argsort(tasks, stable=True)]
