"""Both private ends of columns rounded in turns, each solved for against the other as that is rounded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraspan.collection.formed import Formed, Stored
from loraspan.collection.rows import Rows, cat_rows, values_of
from loraspan.collection.steps import whole_steps
from loraspan.linalg.roots import gram_root
from loraspan.ops import gram, reconstruct

# How often an end is solved for, and from how many columns on for the lengths of their ends. What rounding an end loses
# in the span of the columns, a share of columns to length, the other can undo.
_TURNS, _WORTH = 7, 1 / 16
# Entries of ends that are worked on at once.
_AT_ONCE = 1 << 20


def worth_turns(sides: Sequence[Formed]) -> bool:
    """Say whether turns save enough, half a per cent of the bytes, for the time that they take."""
    return (
        all(side.rows.shape[1] for side in sides)
        and sum(int(side.counts.max()) / side.rows.shape[1] for side in sides) >= _WORTH
    )


def coded_in_turns(sides: Sequence[Formed], s: Tensor, steps: Tensor, kept: Tensor) -> list[Stored]:
    """Round the right ends, then the left ones that suit them best, and so on in turns.

    Args:
        sides: unit vectors, the left and right singular ones of what is to be carried.
        s: ``[T, q]`` singular values.
        steps: ``[T]``, of ends times their singular value.
        kept: ``[T, q]`` bool, leading ones of those that were formed.
    """
    most = int(sides[0].counts.max())
    some = max(_AT_ONCE // (most * max(side.rows.shape[1] for side in sides)), 1)
    parts = [slice(i, i + some) for i in range(0, len(s), some)]
    found = [
        _in_turns([side.padded(part) for side in sides], s[part, :most], steps[part], kept[part, :most])
        for part in parts
    ]
    counts = kept.sum(-1)
    joined = [cat_rows([rounded[i] for rounded in found]) for i in range(2)]
    return [Stored(rows, *side.measure(rows, counts)) for side, rows in zip(sides, joined, strict=True)]


def _in_turns(sides: Sequence[Tensor], s: Tensor, steps: Tensor, kept: Tensor) -> list[Rows]:
    """Do that with ``[T, q, n]`` and ``[T, q, d]``."""
    rounded: list[Rows] = list(sides)
    # what the ends that are rounded next are made of, and those that were rounded last
    made_of, units = torch.diag_embed(s), sides[0]
    for i in range(_TURNS + 1):
        at = (i + 1) % 2
        if i > 0:
            made_of = s.unsqueeze(-1) * _solved(sides[1 - at], units)
        lengths = made_of.norm(dim=1).clamp(min=1e-300)
        units = reconstruct((made_of / lengths[:, None]).mT.float().contiguous(), sides[at])
        rounded[at] = whole_steps(units[kept], (steps[:, None] / lengths)[kept])
        units[~kept] = 0
        units[kept] = values_of(rounded[at])
    return rounded


def _solved(side: Tensor, units: Tensor) -> Tensor:
    """Give ``side units^T (units units^T)^-1``, ``[T, q, q]``."""
    q = side.shape[1]
    products = gram(torch.cat([side, units], dim=1))
    inverse = gram_root(products[:, q:, q:]).inverse
    return products[:, :q, q:] @ inverse @ inverse.mT
