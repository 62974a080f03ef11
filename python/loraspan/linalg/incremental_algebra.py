"""The small algebra of :class:`loraspan.linalg.IncrementalSVD`: how rows combine, and which combinations are kept.

The rows in memory are ``X [R, D]``: where there is a mean, first one row of a difference of means, then the held rows,
then newer ones. Everything here has ``R`` or ``R x R`` entries and is float64; in NumPy, whose sums take one thread and
one order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan.linalg.roots import gram_root
from loraspan.ops.dense import eigh, svd
from loraspan.ops.gram import gram as products

Vector = NDArray[np.float64]


class Mixing(NamedTuple):
    """How the scatter ``(T X)^T (T X)`` of everything seen follows from the rows: ``T = diag(scale) + spread share^T``.

    ``share @ X`` is the mean of the newer rows, and ``spread`` where it goes; both are None where nothing is left to be
    centred. ``aged`` is the weight that older rows keep. ``before`` and ``mass`` are the sums of squared weights of the
    older rows, aged, and of the newer ones.
    """

    scale: Vector
    spread: Vector | None
    share: Vector | None
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
    weights ``mu_A, W_A`` of what is held (aged) and ``mu_B, W_B`` of the pending rows, both by ``w^2``, the scatter
    about the joint mean is

    .. math:: S_A + S_B + \frac{W_A W_B}{W_A + W_B} (\mu_B - \mu_A) (\mu_B - \mu_A)^T.

    Args:
        held: rows from before.
        pending: rows since then, the newest last.
        forget: in ``(0, 1]``.
        weight: of what is held, before it is aged.
        center: whether ``X`` begins with the row ``shift - mu_A``, the pending rows being less ``shift``.

    Returns:
        See :class:`Mixing`.

    Example:
        >>> mix_pending(1, 2, forget=0.5, weight=0.0, center=False).scale.tolist()
        [0.25, 0.5, 1.0]

    Source:
        Ross, Lim, Lin, Yang, *Incremental learning for robust visual tracking*, 2008, lemma 1; here with the squared
        weights in the means as well, so that the mean is the one that minimises the scatter.
    """
    w = forget ** np.arange(pending - 1, -1, -1, dtype=np.float64)
    aged = forget**pending
    energy = w * w
    before, mass = aged * aged * weight, float(energy.sum())
    if not center:
        return Mixing(np.concatenate([np.full(held, aged), w]), None, None, aged, before, mass)
    between = _between(before, mass)
    others = np.zeros(1 + held)
    share = np.concatenate([others, energy / mass])
    spread = np.concatenate([others, -w])
    spread[0] = between
    return Mixing(np.concatenate([[between], np.full(held, aged), w]), spread, share, aged, before, mass)


def mix_merged(older: int, newer: int, *, aged: float, weight: float, mass: float, center: bool) -> Mixing:
    """Age the held rows of one state, and put those of a newer one behind them.

    Args:
        older: held rows of the older state.
        newer: held rows of the newer state.
        aged: the weight that older rows keep.
        weight: of the older state, before it is aged.
        mass: of the newer state.
        center: whether ``X`` begins with the row ``mu_newer - mu_older``.

    Returns:
        See :class:`Mixing`.

    Example:
        >>> mix_merged(1, 1, aged=0.5, weight=4.0, mass=1.0, center=False).scale.tolist()
        [0.5, 1.0]
    """
    before = aged * aged * weight
    between = [_between(before, mass)] if center else []
    return Mixing(np.concatenate([between, np.full(older, aged), np.ones(newer)]), None, None, aged, before, mass)


def _between(before: float, mass: float) -> float:
    """Give the weight, as a row, of the difference of two means in the scatter of all."""
    return math.sqrt(before / (before + mass) * mass)


def keep_largest(gram: Tensor, mixing: Mixing, count: int, *, floor: float, resolved: float) -> Kept:
    """Give the at most ``count`` orthogonal combinations of the rows ``T X`` that hold the most energy.

    Args:
        gram: ``X X^T [R, R]``, float64.
        mixing: ``T``.
        count: how many combinations at most.
        floor: those with no more than this share of the largest energy are left out.
        resolved: where the last of ``count`` has less than this share of the largest energy, nothing is cut and all
            ``R`` combinations are given, since the Gram does not say which of the small ones hold more.

    Returns:
        See :class:`Kept`; ``weights`` are sorted by energy.

    Example:
        >>> mixing = mix_pending(0, 2, forget=1.0, weight=0.0, center=False)
        >>> gram = torch.tensor([[4.0, 0.0], [0.0, 9.0]]).double()
        >>> kept = keep_largest(gram, mixing, 1, floor=0.0, resolved=0.0)
        >>> kept.weights.abs(), kept.cut
        (tensor([[0., 1.]], dtype=torch.float64), 4.0)
    """
    g, scale, spread, share = gram.numpy(), mixing.scale, mixing.spread, mixing.share
    mixed = g * scale * scale[:, None]
    if spread is not None and share is not None:
        along = (g * share).sum(axis=1)
        crossed = np.multiply.outer(spread, scale * along)
        mixed += crossed + crossed.T + (along * share).sum() * np.multiply.outer(spread, spread)
    values, vectors = eigh(torch.from_numpy(mixed))
    # of what is finite; without it, nothing would be kept and nobody told
    assert values.isfinite().all()
    energies = values.clamp(min=0)
    if energies[min(count, len(energies)) - 1] < resolved * energies[0]:
        count = len(energies)
    else:
        count = min(count, int((energies > floor * energies[0]).sum()))
    kept = vectors[:, :count].T.numpy()
    weights = kept * scale
    if spread is not None and share is not None:
        weights += np.multiply.outer((kept * spread).sum(axis=1), share)
    return Kept(torch.from_numpy(weights), float(energies[count:].sum()))


class Values(NamedTuple):
    """``s [m]``, descending, and ``v [m, m]``: the singular vectors of rows ``Y`` are ``Y^T v / s``."""

    s: Tensor
    v: Tensor


def graded_values(rows: Tensor) -> Values:
    """Give the singular values of rows that are nearly orthogonal or about as small as they can be combined.

    They are those of the triangular root of the Gram of the rows scaled to unit norm, so small ones have the relative
    accuracy of the rows, which those of the Gram itself lack.

    Args:
        rows: ``[m, D]``, float32 or float64.

    Example:
        >>> graded_values(torch.tensor([[3.0, 0.0], [0.0, 1e-9]]).double()).s
        tensor([3.0000e+00, 1.0000e-09], dtype=torch.float64)

    Source:
        Demmel and Veselić, *Jacobi's method is more accurate than QR*, 1992: one-sided rotations keep the relative
        accuracy of scaled columns.
    """
    _, s, v = svd(gram_root(products(rows, precision="f64")).r)
    assert s.isfinite().all()
    return Values(s, v)
