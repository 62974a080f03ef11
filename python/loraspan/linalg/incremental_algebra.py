"""The small algebra of :class:`loraspan.linalg.IncrementalSVD`: how rows combine, and which combinations are kept.

A state has the rows ``X [R, D]``: where it centres, first one row with the offset of its shift from its mean, then the
held rows, then the pending ones. Everything here is ``R x R`` and float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.ops.dense import eigh
from loraspan.ops.reconstruct import reconstruct


class Mixing(NamedTuple):
    """How the scatter of everything seen follows from the rows in memory.

    ``t [R, R]``: the scatter is ``(t X)^T (t X)``. ``share [R]``: ``share @ X`` is the mean of the pending rows, where
    there are such and they are centred. ``aged``: the weight that older rows keep, by which their energy falls twice.
    ``before``, ``mass``: the sums of squared weights of the older rows, aged, and of the newer ones.
    """

    t: Tensor
    share: Tensor | None
    aged: float
    before: float
    mass: float

    @property
    def newer(self) -> float:
        """The share of the newer rows in the weight of all."""
        return self.mass / (self.before + self.mass)


class Kept(NamedTuple):
    """``weights [m, R]``: ``weights @ X`` is what is kept; ``cut``: the energy that is not."""

    weights: Tensor
    cut: float


def mix_pending(held: int, pending: int, *, forget: float, weight: float, center: bool) -> Mixing:
    r"""Age what is held by the pending rows, and centre all of it.

    A pending row of age ``a`` has the weight ``w = forget^a``, held rows have ``forget^pending``. With the means and
    weights ``mu_A, W_A`` of what is held (aged) and ``mu_B, W_B`` of the pending rows, each weighted by ``w^2``, the
    scatter about the joint mean is

    .. math:: S_A + S_B + \frac{W_A W_B}{W_A + W_B} (\mu_B - \mu_A) (\mu_B - \mu_A)^T.

    Args:
        held: rows from before.
        pending: rows since then, the newest last.
        forget: in ``(0, 1]``.
        weight: of what is held, before it is aged.
        center: whether ``X`` begins with the row ``shift - mu_A``, pending rows being less ``shift``.

    Returns:
        See :class:`Mixing`.

    Example:
        >>> mix_pending(1, 2, forget=0.5, weight=0.0, center=False).t.diagonal()
        tensor([0.2500, 0.5000, 1.0000], dtype=torch.float64)

    Source:
        Ross, Lim, Lin, Yang, *Incremental learning for robust visual tracking*, 2008, lemma 1; here with the weight
        of a row, ``w^2``, in the means as well, so that the mean minimises the scatter.
    """
    ages = torch.arange(pending - 1, -1, -1, dtype=torch.float64)
    w = torch.full_like(ages, forget).pow(ages)
    old = forget**pending
    energy = w.square()
    before, mass = old * old * weight, float(energy.sum())
    if not center:
        return Mixing(_diagonal((held, old), w), None, old, before, mass)
    first = 1 + held
    share = torch.zeros(first + pending, dtype=torch.float64)
    share[first:] = energy / mass
    between = _between(before, mass)
    t = _diagonal((1, between), (held, old), w)
    t[0, first:] = between * share[first:]
    t[first:, first:] -= w.unsqueeze(1) * share[first:]
    return Mixing(t, share, old, before, mass)


def mix_merged(older: int, newer: int, *, aged: float, before: float, mass: float, center: bool) -> Mixing:
    """Age the held rows of one state, and put those of a newer one behind them.

    Args:
        older: held rows of the older state.
        newer: held rows of the newer state.
        aged: the weight that older rows keep.
        before: the weight of the older state, before it is aged.
        mass: the weight of the newer state.
        center: whether ``X`` begins with the row ``mu_newer - mu_older``.

    Returns:
        See :class:`Mixing`.

    Example:
        >>> mix_merged(1, 1, aged=0.5, before=4.0, mass=1.0, center=False).t.diagonal()
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    before *= aged * aged
    between = [(1, _between(before, mass))] if center else []
    return Mixing(_diagonal(*between, (older, aged), (newer, 1.0)), None, aged, before, mass)


def _between(before: float, mass: float) -> float:
    """The weight of the difference of two means in the scatter of both parts, as a row's."""
    return math.sqrt(before / (before + mass) * mass)


def _diagonal(*parts: Tensor | tuple[int, float]) -> Tensor:
    pieces = [p if isinstance(p, Tensor) else torch.full((p[0],), p[1], dtype=torch.float64) for p in parts]
    return torch.diag(torch.cat(pieces))


def keep_largest(gram: Tensor, t: Tensor, count: int, floor: float) -> Kept:
    """Give the at most ``count`` orthogonal combinations of the rows ``t X`` that hold the most energy.

    Args:
        gram: ``X X^T [R, R]``, float64.
        t: ``[R, R]``, float64.
        count: how many combinations at most.
        floor: those with less than this share of the largest energy are left out.

    Returns:
        See :class:`Kept`; ``weights`` are sorted by energy.

    Example:
        >>> kept = keep_largest(torch.tensor([[4.0, 0.0], [0.0, 9.0]]).double(), torch.eye(2).double(), 1, 0.0)
        >>> kept.weights.abs(), kept.cut
        (tensor([[0., 1.]], dtype=torch.float64), 4.0)
    """
    # products by the operator: the same bits for any number of threads
    values, vectors = eigh(reconstruct(t, reconstruct(gram, t.T)))
    values = values.clamp(min=0)
    present = int((values > floor * values[0]).sum()) if len(values) else 0
    count = min(count, present)
    return Kept(reconstruct(vectors[:, :count].T, t), float(values[count:].sum()))
