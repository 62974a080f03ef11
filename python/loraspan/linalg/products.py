"""The SVD of products ``left^T diag(weights) right`` that are never formed: many of one size at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.errors import NotFiniteError
from loraspan.linalg.factors import UNIT, Rows, grams, orthonormal_factors, rounding_share
from loraspan.linalg.svd import SVD, column_signs
from loraspan.ops.blocks import CPU, RowBlocks
from loraspan.ops.combine import combine_many
from loraspan.ops.dense import svd
from loraspan.ops.places import backend_at, off_metal
from loraspan.ops.reconstruct import reconstruct


class Products(NamedTuple):
    """N products ``left^T diag(weights) right``: ``left`` N times ``[R, n]``, ``right`` N times ``[R, d]``.

    ``sizes`` are N, R, n and d; ``weights``, ``[N, R]`` or ``[1, R]``, are float64; ``dtype`` is that of the vectors to
    give, ``named`` are the tensors that hold the factors with the names that the caller knows.
    """

    sizes: tuple[int, int, int, int]
    left: Rows
    right: Rows
    weights: Tensor
    dtype: torch.dtype
    named: Sequence[tuple[str, Tensor]]


class Triplets(NamedTuple):
    """What :func:`decompose` gives: vectors as rows, ``u [N, k, n]`` and ``v [N, k, d]``; ``s`` and ``discarded``.

    A triplet that does not exist has ``s = 0`` and zero vectors.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    discarded: Tensor

    def members(self) -> list[SVD]:
        """Give each member with as many triplets as it has."""
        found = []
        for count, u, s, v, discarded in zip(self.s.count_nonzero(-1).tolist(), *self, strict=True):
            if count < s.shape[0]:
                # copies, so that what is cut off does not stay in memory
                u, s, v = u[:count].clone(), s[:count].clone(), v[:count].clone()
            found.append(SVD(u.mT, s, v, discarded))
        return found


class _Core(NamedTuple):
    """Singular vectors ``[N, R, k]`` of the small matrices, zero where a triplet does not exist."""

    u: Tensor
    s: Tensor
    v: Tensor
    discarded: Tensor


def decompose(operator: str, products: Products, rank: int | None, backend: str | None) -> Triplets:
    r"""Give the leading triplets of every product.

    With ``X^T = Q r`` for both sides, the SVD of the small ``r_left diag(weights) r_right^T`` gives that of the
    product. Where ``R`` exceeds ``n`` or ``d``, the product is no larger than its factors and is formed, in float64.
    """
    count, rows, n, d = products.sizes
    if not min(products.sizes):
        return _nothing(products, rank)
    floor = torch.zeros(count, dtype=torch.float64)
    small = products
    if rows > min(n, d):
        small, floor = _formed(products, backend)
    both = [grams(side, backend) for side in (small.left, small.right)]
    if not all(bool(g.isfinite().all()) for g in both):
        _refuse(operator, products)
    limit = _spread_limit(products.dtype, small.sizes[1])
    left, right = (
        orthonormal_factors(side, g, limit, backend) for side, g in zip((small.left, small.right), both, strict=True)
    )
    size = (left.norms * right.norms * small.weights.abs()).sum(-1)
    floor = torch.maximum(floor, rounding_share(small.sizes[1]) * size)
    core = _core(
        reconstruct(left.r * small.weights.unsqueeze(-2), right.r.mT, backend=backend_at(CPU, backend)),
        floor,
        rank,
        products.dtype,
        backend,
    )
    if not bool(core.s.isfinite().all()):
        raise NotFiniteError(f"{operator}: singular values exceed {core.s.dtype}; pass float64 or a smaller scale")
    u = left.vectors(core.u, products.dtype, backend)
    signs = column_signs(u.mT).unsqueeze(-1)
    u *= signs
    v = right.vectors(core.v * signs.mT.to(core.v), products.dtype, backend)
    return Triplets(u, core.s.to(u.device), v, core.discarded)


def _nothing(products: Products, rank: int | None) -> Triplets:
    count, rows, n, d = products.sizes
    width = min(rows, n, d) if rank is None else min(rows, n, d, rank)
    device = products.named[0][1].device
    u, s, v = (
        torch.zeros(count, *shape, dtype=products.dtype, device=device) for shape in ((width, n), (width,), (width, d))
    )
    return Triplets(u, s, v, torch.zeros(count, dtype=torch.float64))


def _refuse(operator: str, products: Products) -> None:
    for name, tensor in products.named:
        bad = (~off_metal(tensor).isfinite()).nonzero()
        if len(bad):
            place = f" at {bad[0].tolist()}"
            raise NotFiniteError(f"{operator}: {name} holds a NaN or an infinity{place}; find where it comes from")
    names = ", ".join(name for name, _ in products.named)
    raise NotFiniteError(f"{operator}: entries of {names} have squares beyond float64; divide by the largest of them")


def _formed(products: Products, backend: str | None) -> tuple[Products, Tensor]:
    """Give products of the same value with ``R = min(n, d)``, one side the identity, and what rounding may add."""
    count, rows, n, d = products.sizes
    sides = [[_blocks(side, i) for i in range(count)] for side in (products.left, products.right)]
    wide = [torch.stack([torch.cat([b.to("cpu", torch.float64) for b in x.blocks]) for x in side]) for side in sides]
    size = (wide[0].norm(dim=-1) * wide[1].norm(dim=-1) * products.weights.abs()).sum(-1)
    weighted, long = products.weights.unsqueeze(-1) * wide[n > d], sides[n <= d]
    pairs = list(zip(long, weighted, strict=True))
    found = combine_many(pairs, dtype=torch.float64, precision="f64", products=False, backend=backend)
    formed: Rows = [RowBlocks([combined.v.mT]).on(long[0].target) for combined in found]
    width = min(n, d)
    eye = torch.eye(width, dtype=torch.float64, device=found[0].v.device).expand(count, -1, -1)
    small = products._replace(
        sizes=(count, width, n, d),
        left=eye if n <= d else formed,
        right=formed if n <= d else eye,
        weights=torch.ones(1, width, dtype=torch.float64),
    )
    return small, rounding_share(rows) * size


def _blocks(rows: Rows, i: int) -> RowBlocks:
    return RowBlocks([rows[i]]) if isinstance(rows, Tensor) else rows[i]


def _spread_limit(dtype: torch.dtype, rows: int) -> float:
    """Say how large the squared entries of the inverse of a scaled root may be, for one pass over its Gram to do.

    ``Q`` is off orthonormal by about ``R^2 spread 2^-53``; four units of roundoff of float32 are allowed.
    """
    return 2.0 if dtype == torch.float64 else max(2.0, 2.0**-22 / (rows**2 * UNIT))


def _core(product: Tensor, floor: Tensor, rank: int | None, dtype: torch.dtype, backend: str | None) -> _Core:
    """Take the SVDs of ``[N, R, R]``, and of them what is above the floors ``[N]`` and within ``rank``."""
    u, s, v = svd(product, backend=backend)
    width = s.shape[-1] if rank is None else min(rank, s.shape[-1])
    kept = s[:, :width].to(dtype)
    present = (s[:, :width] > floor.unsqueeze(-1)) & (kept > 0)
    energy = s.square()
    energy[:, :width] *= ~present
    u, v = (x[..., :width] * present.unsqueeze(-2) for x in (u, v))
    return _Core(u, kept * present, v, energy.sum(-1))
