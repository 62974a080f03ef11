"""Roots of small Gram matrices, and tall blocks made orthonormal with them."""

from __future__ import annotations

import torch
from torch import Tensor

from loraspan._default_device import cpu_by_default
from loraspan.ops import dense
from loraspan.ops.dense import Root
from loraspan.ops.gram import gram
from loraspan.ops.places import backend_at
from loraspan.ops.reconstruct import Piece, reconstruct_many

__all__ = ["Root", "gram_root", "orthonormalize"]

# Columns made unit ones whose inverse root has no larger entry come out of one round orthonormal to some units.
_NEARLY_ORTHOGONAL = 1.5


def gram_root(gram: Tensor, *, backend: str | None = None) -> Root:
    """Give what :func:`loraspan.ops.dense.gram_root` gives, and LAPACK's root of what that found none of.

    Its iteration for eigenvectors may not end where many rows of very different lengths depend on each other.

    Example:
        >>> import torch
        >>> gram_root(torch.tensor([[4.0]], dtype=torch.float64))
        Root(r=tensor([[2.]], dtype=torch.float64), inverse=tensor([[0.5000]], dtype=torch.float64))
    """
    found = dense.gram_root(gram, backend=backend)
    if found.r.isnan().any():
        failed = found.r.isnan().any(-1).any(-1) & gram.isfinite().all(-1).all(-1)
        for place, part in zip(found, dense.gram_root(gram[failed], backend="reference"), strict=True):
            place[failed] = part
    return found


@torch.no_grad()
@cpu_by_default
def orthonormalize(block: Tensor, *, backend: str | None = None) -> Tensor:
    r"""Make the columns of a tall float64 block orthonormal by Cholesky QR, in two rounds where they were far from it.

    Columns that depend on others come out as zeros, so the result spans what the block spans.

    Args:
        block: ``[m, k]``, float64.
        backend: as for the operators.

    Returns:
        ``[m, k]`` with ``Q^T Q = I`` to ``1e-14 k`` on its non-zero columns.

    Example:
        >>> import torch
        >>> orthonormalize(torch.tensor([[3.0], [4.0]], dtype=torch.float64)).T
        tensor([[0.6000, 0.8000]], dtype=torch.float64)

    Source:
        Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, *Roundoff error analysis of the CholeskyQR2 algorithm*, 2015.
    """
    if not block.shape[1]:
        return block
    backend = backend_at(block.device, backend)
    out = torch.empty_like(block, memory_format=torch.contiguous_format)
    for _ in range(2):
        measured = gram([block.T], precision="f64", backend=backend)
        root = gram_root(measured, backend=backend)
        reconstruct_many([Piece(block, root.inverse.to(block.device), out)], backend=backend)
        block = out
        # what one round leaves grows with the square of this, 1 for columns that were orthogonal
        if float((measured.diagonal().sqrt().unsqueeze(1) * root.inverse).abs().amax()) <= _NEARLY_ORTHOGONAL:
            break
    return block
