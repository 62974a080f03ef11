"""The leading eigenpairs of a Gram matrix, without a full decomposition where few are wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from loraspan._default_device import cpu_by_default
from loraspan.linalg.roots import orthonormalize
from loraspan.linalg.svd import column_signs
from loraspan.ops import reconstruct
from loraspan.ops.dense import eigh
from loraspan.ops.sketch import signs

# Below this size, or where more than an eighth is wanted, a full decomposition is faster.
_FULL_SIZE = 256
_FULL_SHARE = 8
_OVERSAMPLE = 16
_MAX_STEPS = 60


@torch.no_grad()
@cpu_by_default
def top_eigenpairs(gram: Tensor, count: int, *, tolerance: float = 1e-12) -> tuple[Tensor, Tensor]:
    r"""Give the ``count`` largest eigenvalues of a symmetric positive semidefinite matrix, and their vectors.

    Args:
        gram: ``[n, n]``, float64, symmetric.
        count: how many, cut to ``n``.
        tolerance: the block iteration ends when no wanted value moves by more than this share of the largest one.

    Returns:
        Values ``[count]``, descending, negative rounding cut to 0, and vectors ``[n, count]``, orthonormal, except
        that a vector whose value is zero to rounding may be zero itself. The entry of largest magnitude of a vector is
        positive.

    Example:
        >>> import torch
        >>> values, vectors = top_eigenpairs(torch.diag(torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)), 2)
        >>> values, vectors.T
        (tensor([3., 2.], dtype=torch.float64), tensor([[0., 1., 0.],
                [0., 0., 1.]], dtype=torch.float64))

    Source:
        Block iteration with Rayleigh-Ritz: Saad, *Numerical Methods for Large Eigenvalue Problems*, 2nd ed., ch. 5.
    """
    n = gram.shape[0]
    count = min(count, n)
    if n <= _FULL_SIZE or count * _FULL_SHARE > n:
        values, vectors = eigh(gram)
        values, vectors = values[:count], vectors[:, :count]
    else:
        values, vectors = _block_iteration(gram, count, tolerance)
    return values.clamp(min=0), vectors * column_signs(vectors)


def _block_iteration(gram: Tensor, count: int, tolerance: float) -> tuple[Tensor, Tensor]:
    block = torch.from_numpy(signs(gram.shape[0], count + _OVERSAMPLE, 0))
    before = torch.zeros(count, dtype=gram.dtype)
    for _ in range(_MAX_STEPS):
        # two products between orthonormalizations: float64 stands the squared spread of the spectrum
        q = orthonormalize(reconstruct(gram, reconstruct(gram, block)))
        image = reconstruct(gram, q)
        values, inner = eigh(reconstruct(q.T, image))
        block = reconstruct(image, inner)
        if (values[:count] - before).abs().max() <= tolerance * values[0].abs():
            break
        before = values[:count]
    return values[:count], reconstruct(q, inner[:, :count])
