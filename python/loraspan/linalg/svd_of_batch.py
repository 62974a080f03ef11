"""The leading triplets of many short matrices of one size, from one stacked tensor into others.

The way of :mod:`loraspan.linalg.svd_by_gram`, with the same bits, in one call for all matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.linalg.svd import column_signs
from loraspan.linalg.svd_by_gram import FAST_FLOOR
from loraspan.linalg.svd_range import are_settled, float32_range
from loraspan.ops.short_svd import short_svd


class Found(NamedTuple):
    """``s [N, k]`` and ``discarded [N]``, float64; they say nothing of a member that is not ``done [N]``."""

    s: Tensor
    discarded: Tensor
    done: Tensor


def svd_of_batch(x: Tensor, left: Tensor, right: Tensor, by_right: bool, backend: str | None) -> Found:
    """Put singular vectors of ``x [N, R, d]`` into ``left [N, R, k]`` and ``right [N, d, k]``, all in CPU memory.

    Their signs are settled by the left ones, or ``by_right``. Done are the members for which sums in float32 carry far
    enough.
    """
    rows, rank = left.shape[1:]
    values, totals, w, inner = short_svd(x, right, backend=backend)
    values = values.clamp(min=0)
    left.copy_(w)
    if by_right:
        signs = column_signs(right).unsqueeze(-2)
        left *= signs
        right *= signs
    s = values[:, :rank].sqrt() * inner.diagonal(dim1=1, dim2=2).sqrt()
    low, high = float32_range(x.shape[1:])
    done = (low <= totals) & (totals <= high) & (values[:, rank - 1] >= FAST_FLOOR * values[:, 0])
    done &= are_settled(inner, s)
    if rank == rows:
        return Found(s, torch.zeros_like(totals), done)
    # from the smallest up, so that a small rest is not a difference of large sums
    rest = values[:, rank:].flip(1).cumsum(1)[:, -1]
    return Found(s, rest, done & (rest >= FAST_FLOOR * totals))
