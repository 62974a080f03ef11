"""What :class:`loraspan.linalg.IncrementalSVD` shows of its rows: singular vectors, loadings, and changes of basis."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.linalg.incremental_algebra import graded_values
from loraspan.linalg.roots import gram_root
from loraspan.linalg.svd import column_signs
from loraspan.ops.dense import eigh
from loraspan.ops.gram import gram, gram_many
from loraspan.ops.places import carried, off_metal
from loraspan.ops.reconstruct import Piece, reconstruct_many

# Singular values below this share of the largest are rounding of the rows in memory.
_FLOOR = {torch.float32: 2.0**-22, torch.float64: 2.0**-49}
# Vectors per Gram that takes their products with a basis; more would mostly multiply vectors with each other.
_PROJECTED = 32
# Products of float64 components that are off by less are as good as summed.
_ROUNDOFF = 4 * 2.0**-53


class Leading(NamedTuple):
    """``components [k, D]``, orthonormal, ``s [k]``, float64, descending, and the energy of the ``tail``."""

    components: Tensor
    s: Tensor
    tail: float


class View(NamedTuple):
    """What can be read off a state: see the properties of the class."""

    components: Tensor
    s: Tensor
    discarded: float
    mean: Tensor | None
    weight: float


class Rotation(NamedTuple):
    """How loadings move to another basis: ``matrix [k, k_old]``, float64, and the largest share they lose."""

    matrix: Tensor
    error: float


def leading(rows: Tensor, rank: int) -> Leading:
    """Give the leading right singular vectors of a few rows, nearly orthogonal to each other.

    Args:
        rows: ``[m, D]``, float32 or float64.
        rank: how many at most; fewer where the others are rounding.

    Returns:
        See :class:`Leading`. The entry of largest magnitude of a component is positive.

    Example:
        >>> components, s, tail = leading(torch.tensor([[-6.0, -8.0], [4.0, -3.0]]), 1)
        >>> components, s, round(tail, 6)
        (tensor([[0.6000, 0.8000]]), tensor([10.], dtype=torch.float64), 25.0)
    """
    if not len(rows):
        return Leading(rows, torch.zeros(0, dtype=torch.float64), 0.0)
    s, v = graded_values(rows)
    largest = float(s[0])
    k = min(rank, int((s > _FLOOR[rows.dtype] * largest).sum()))
    components = rows.new_empty(k, rows.shape[1])
    if k:
        # the factor 1 / largest apart: with it, weights of tiny rows would leave float32
        weights = v[:, :k] * (largest / s[:k])
        weights = carried(weights, rows.device, rows.dtype)
        reconstruct_many([Piece(rows.T, weights, components.T, scale=1 / largest)])
        if rows.dtype == torch.float64:
            _make_orthonormal(components)
        components *= column_signs(components.T).unsqueeze(1)
    return Leading(components, s[:k], float(s[k:].square().sum()))


def _make_orthonormal(components: Tensor) -> None:
    """Take out of small components what rounding left of larger ones: over many decades it is more than roundoff."""
    products = gram(components, precision="f64")
    if float((products - torch.eye(len(products), dtype=products.dtype)).abs().max()) > _ROUNDOFF:
        # triangular, so that each is changed by those before it alone
        inverse = carried(gram_root(products).inverse, components.device, components.dtype)
        reconstruct_many([Piece(components.T, inverse, components.T)])


def project(rows: Tensor, components: Tensor, mean: Tensor | None) -> Tensor:
    """Give ``(rows - mean) @ components.T`` in float64, whatever the size of the mean.

    Args:
        rows: ``[n, D]``.
        components: ``[k, D]``.
        mean: ``[D]``, float64, or None for zero.

    Example:
        >>> project(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]]), None)
        tensor([[4.]], dtype=torch.float64)
    """
    k = components.shape[0]
    # the sums are float64, which Metal has none of
    rows, components = off_metal(rows.to(components.device)), off_metal(components)
    fixed = [components] if mean is None else [components, mean.unsqueeze(0)]
    step = max(_PROJECTED, k)
    slices = [rows[i : i + step] for i in range(0, len(rows), step)]
    grams = gram_many([[*fixed, piece] for piece in slices], precision="f64")
    parts = [g[k + len(fixed) - 1 :, :k] - (0 if mean is None else g[k, :k]) for g in grams]
    return torch.cat(parts) if parts else torch.zeros(0, k, dtype=torch.float64)


def change_of_basis(components: Tensor, old: Tensor) -> Rotation:
    """Give ``components @ old`` and the spectral norm of what ``old`` has outside the components.

    Args:
        components: ``[k, D]``, orthonormal.
        old: ``[D, k_old]``.

    Example:
        >>> matrix, error = change_of_basis(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6], [0.8]]))
        >>> matrix, round(error, 6)
        (tensor([[0.6000]], dtype=torch.float64), 0.8)
    """
    components, old = off_metal(components), off_metal(old)
    k, count = components.shape[0], old.shape[1]
    if not count:
        return Rotation(torch.zeros(k, 0, dtype=torch.float64), 0.0)
    matrix = gram([components, old.T], precision="f64")[:k, k:]
    # the rest itself: as a difference of norms it would be known to the root of a rounding only
    inside = torch.empty(count, old.shape[0], dtype=torch.float64, device=old.device)
    reconstruct_many([Piece(components.T, matrix.to(old.device), inside.T)])
    rest = old.T.to(torch.float64) - inside
    largest = float(eigh(gram(rest, precision="f64")).values[0])
    return Rotation(matrix.clone(), math.sqrt(max(0.0, largest)))
