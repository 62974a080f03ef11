"""Roots of small Gram matrices, and tall blocks made orthonormal with them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A pivot of the scaled Gram below this goes to the eigendecomposition, which tells small from absent.
_PIVOT_FLOOR = 1e-10
# Eigenvalues of the scaled Gram below this, times its size, are rounding.
_RANK_FLOOR = 1e-15


class Root(NamedTuple):
    """``r`` and ``inverse``, both ``[..., n, n]``, with ``r.mT @ r = G`` and ``r @ inverse`` the projector on range."""

    r: Tensor
    inverse: Tensor


def gram_root(gram: Tensor) -> Root:
    r"""Give ``R`` with ``R^T R = G`` for float64 positive semidefinite matrices, and its pseudo-inverse.

    If ``G = B^T B`` then ``B @ inverse`` has orthonormal columns (zero ones where ``G`` lacks rank). Cholesky of the
    matrix scaled to a unit diagonal; an eigendecomposition for the members that are rank-deficient.

    Args:
        gram: ``[..., n, n]``, float64, symmetric positive semidefinite up to rounding.

    Returns:
        ``r`` and ``inverse``. Directions below ``sqrt(n 1e-15)`` of the largest (after scaling) count as absent.

    Example:
        >>> import torch
        >>> root = gram_root(torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
        >>> root.r.abs().sum().item(), root.inverse.abs().sum().item()
        (2.0, 0.5)
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    # a zero vector becomes a unit one of its own, which the scale below removes again
    scaled = gram / safe.unsqueeze(-1) / safe.unsqueeze(-2) + torch.diag_embed((scale == 0).to(gram.dtype))
    lower, info = torch.linalg.cholesky_ex(scaled)
    pivots = lower.diagonal(dim1=-2, dim2=-1)
    deficient = (info != 0) | ~(pivots.square() > _PIVOT_FLOOR).all(-1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    if deficient.any():
        lower = torch.where(deficient[..., None, None], eye, lower)
    r, inverse = lower.mT.contiguous(), torch.linalg.solve_triangular(lower.mT, eye.expand_as(lower), upper=True)
    if deficient.any():
        values, vectors = torch.linalg.eigh(scaled[deficient])
        values, vectors = values.flip(-1), vectors.flip(-1)
        present = values > _RANK_FLOOR * gram.shape[-1] * values[..., :1].clamp(min=0)
        root = torch.where(present, values, torch.ones_like(values)).sqrt() * present
        r[deficient] = root.unsqueeze(-1) * vectors.mT
        inverse[deficient] = vectors * torch.where(present, 1 / root, torch.zeros_like(root)).unsqueeze(-2)
    return Root(r * scale.unsqueeze(-2), inverse * torch.where(scale > 0, 1 / safe, 0 * safe).unsqueeze(-1))


def orthonormalize(block: Tensor) -> Tensor:
    r"""Make the columns of a tall float64 block orthonormal by two rounds of Cholesky QR.

    Columns that depend on others come out as zeros, so the result spans what the block spans.

    Args:
        block: ``[m, k]``, float64.

    Returns:
        ``[m, k]`` with ``Q^T Q = I`` to ``1e-14 k`` on its non-zero columns.

    Example:
        >>> import torch
        >>> orthonormalize(torch.tensor([[3.0], [4.0]], dtype=torch.float64)).T
        tensor([[0.6000, 0.8000]], dtype=torch.float64)

    Source:
        Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, *Roundoff error analysis of the CholeskyQR2 algorithm*, 2015.
    """
    for _ in range(2):
        block = block @ gram_root(block.T @ block).inverse
    return block
