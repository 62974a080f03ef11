"""Roots of small Gram matrices, and tall blocks made orthonormal with them."""

from __future__ import annotations

from torch import Tensor

from loraspan.ops import gram, reconstruct
from loraspan.ops.dense import Root, gram_root

__all__ = ["Root", "gram_root", "orthonormalize"]


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
        block = reconstruct(block, gram_root(gram([block.T], precision="f64")).inverse)
    return block
