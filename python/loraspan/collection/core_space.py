"""The core space of a slot: small float64 cores in which ranks, energies and joint refinement are decided."""

from __future__ import annotations

import torch
from torch import Tensor

from loraspan.linalg.eig import top_eigenpairs
from loraspan.ops.joint_gram import joint_gram


def energy_by_rank(cores: Tensor) -> Tensor:
    r"""Give the energy of all cores inside the leading ``k x k`` corner, for every ``k``.

    Args:
        cores: ``[T, l_out, l_in]``, float64, each axis ordered by energy.

    Returns:
        ``[max(l_out, l_in) + 1]``: entry ``k`` is ``sum_i |C_i[:k, :k]|_F^2``.

    Example:
        >>> import torch
        >>> energy_by_rank(torch.tensor([[[3.0, 0.0], [1.0, 2.0]]], dtype=torch.float64))
        tensor([ 0.,  9., 14.], dtype=torch.float64)
    """
    squares = cores.square().sum(0)
    size = max(squares.shape)
    padded = squares.new_zeros(size + 1, size + 1)
    padded[1 : squares.shape[0] + 1, 1 : squares.shape[1] + 1] = squares
    return padded.cumsum(0).cumsum(1).diagonal().clone()


def refine_jointly(cores: Tensor, rank_out: int, rank_in: int, iterations: int) -> tuple[Tensor, Tensor]:
    r"""Find orthonormal ``G_out``, ``G_in`` that hold more of the cores together than each side's leading directions.

    Alternates ``G_out <- top of sum C_i G_in G_in^T C_i^T`` and ``G_in <- top of sum C_i^T G_out G_out^T C_i``; the
    energy held never falls.

    Args:
        cores: ``[T, l_out, l_in]``, float64, weighted, each axis ordered by energy.
        rank_out: columns of ``G_out``, at most ``l_out``.
        rank_in: columns of ``G_in``, at most ``l_in``.
        iterations: how often to alternate; 0 gives the leading directions themselves.

    Returns:
        ``G_out [l_out, rank_out]`` and ``G_in [l_in, rank_in]``, columns ordered by energy.

    Example:
        >>> import torch
        >>> g_out, g_in = refine_jointly(torch.eye(3, dtype=torch.float64)[None], 2, 2, 1)
        >>> g_out.shape, g_in.shape
        (torch.Size([3, 2]), torch.Size([3, 2]))

    Source:
        Higher-order orthogonal iteration: De Lathauwer, De Moor, Vandewalle, 2000; as joint diagonalisation of
        adapters in Compress then Serve, arXiv 2407.00066.
    """
    g_out = torch.eye(cores.shape[1], rank_out, dtype=cores.dtype)
    g_in = torch.eye(cores.shape[2], rank_in, dtype=cores.dtype)
    for _ in range(iterations):
        g_out = _leading(cores @ g_in, rank_out)
        g_in = _leading(cores.mT @ g_out, rank_in)
    return g_out, g_in


def refine_products(left: Tensor, right: Tensor, rank_out: int, rank_in: int, iterations: int) -> tuple[Tensor, Tensor]:
    r"""Give :func:`refine_jointly` of cores ``C_i = left_i^T right_i``, which are never formed where ``r`` is small.

    ``C_i G G^T C_i^T = left_i^T (right_i G) (right_i G)^T left_i``: a square of ``r`` in the middle.

    Args:
        left: ``[T, r, l_out]``, float64, weighted.
        right: ``[T, r, l_in]``, float64.
        rank_out: as for :func:`refine_jointly`, and so the rest.
        rank_in: so.
        iterations: so.

    Example:
        >>> import torch
        >>> left, right = torch.eye(3, dtype=torch.float64)[None], torch.eye(3, dtype=torch.float64)[None]
        >>> [g.shape for g in refine_products(left, right, 2, 2, 1)]
        [torch.Size([3, 2]), torch.Size([3, 2])]
    """
    # multiply-adds of one turn and task: 2 l^2 k, or r l k + r^2 k + r^2 l + r l^2
    if 2 * left.shape[1] > max(left.shape[2], right.shape[2]):
        return refine_jointly(left.mT @ right, rank_out, rank_in, iterations)
    g_out = torch.eye(left.shape[2], rank_out, dtype=left.dtype)
    g_in = torch.eye(right.shape[2], rank_in, dtype=right.dtype)
    for _ in range(iterations):
        g_out = top_eigenpairs(joint_gram(left, right, g_in), rank_out)[1]
        g_in = top_eigenpairs(joint_gram(right, left, g_out), rank_in)[1]
    return g_out, g_in


def _leading(images: Tensor, rank: int) -> Tensor:
    """Top left directions of ``[T, l, k]`` side by side."""
    tasks, size, rank_seen = images.shape
    flat = images.transpose(0, 1).reshape(size, tasks * rank_seen)
    return top_eigenpairs(flat @ flat.T, rank)[1]
