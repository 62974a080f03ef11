"""The SVD of products ``left^T diag(weights) right`` that are never formed: many at once, of all sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.errors import NotFiniteError
from loraspan.linalg.factors import UNIT, Factor, alike, form, orthonormal_factors, rounding_share
from loraspan.linalg.svd import SVD, column_signs
from loraspan.ops.blocks import RowBlocks
from loraspan.ops.combine import combine
from loraspan.ops.dense import svd
from loraspan.ops.gram import gram_many
from loraspan.ops.reconstruct import reconstruct


class Product(NamedTuple):
    """``left^T diag(weights) right``: ``left [R, n]`` and ``right [R, d]`` as row blocks, ``weights [R]`` in float64.

    ``dtype`` is that of the vectors to give, ``names`` are those of the blocks of ``left``, then of ``right``, and
    singular values up to ``floor`` are rounding.
    """

    left: RowBlocks
    right: RowBlocks
    weights: Tensor
    dtype: torch.dtype
    names: Sequence[str]
    floor: float = 0.0

    @property
    def sizes(self) -> tuple[int, int, int]:
        """``R``, ``n`` and ``d``."""
        return self.left.shape[0], self.left.columns, self.right.columns


class Group(NamedTuple):
    """Decompositions of products of equal sizes: vectors as rows, ``u [N, k, n]`` and ``v [N, k, d]``.

    ``which`` says which products they are. A triplet that does not exist has ``s = 0`` and zero vectors.
    """

    which: list[int]
    u: Tensor
    s: Tensor
    v: Tensor
    discarded: Tensor

    def members(self) -> Iterator[tuple[int, SVD]]:
        """Give each member with as many triplets as it has."""
        counts = self.s.count_nonzero(-1).tolist()
        for i, count, u, s, v, discarded in zip(self.which, counts, *self[1:], strict=True):
            if count < s.shape[0]:
                # copies, so that what is cut off does not stay in memory
                u, s, v = u[:count].clone(), s[:count].clone(), v[:count].clone()
            yield i, SVD(u.mT, s, v, discarded)


class _Core(NamedTuple):
    """What a group needs to form its vectors: ``u = left.rows^T w_left``, ``v = right.rows^T w_right``."""

    which: list[int]
    left: list[RowBlocks]
    right: list[RowBlocks]
    w_left: Tensor
    w_right: Tensor
    s: Tensor
    discarded: Tensor


def decompose(operator: str, products: Sequence[Product], rank: int | None, backend: str | None) -> list[Group]:
    r"""Give the leading triplets of every product, in groups of equal sizes and dtypes.

    With ``X^T = Q r`` for both sides, the SVD of the small ``r_left diag(weights) r_right^T`` gives that of the
    product. Where ``R`` exceeds ``n`` or ``d``, the product is no larger than its factors and is formed, in float64.
    """
    small = {i: _no_larger(p, backend) for i, p in enumerate(products) if min(p.sizes)}
    rows = [p.left for p in small.values()] + [p.right for p in small.values()]
    grams = gram_many(rows, precision="f64", backend=backend)
    for i, gram in zip((*small, *small), grams, strict=True):
        if not bool(gram.diagonal().isfinite().all()):
            _refuse(operator, products[i])
    factors = orthonormal_factors(rows, grams, [_spread_limit(p) for p in small.values()] * 2, backend)
    pairs = {i: (factors[j], factors[j + len(small)]) for j, i in enumerate(small)}
    groups, cores = [], []
    for which in alike([(*p.sizes, p.dtype) for p in products]):
        if which[0] in small:
            cores.append(_core(which, small, pairs, rank, backend))
        else:
            groups.append(_nothing(which, products[which[0]]))
    for core in cores:
        if not bool(core.s.isfinite().all()):
            raise NotFiniteError(f"{operator}: singular values exceed {core.s.dtype}; pass float64 or a smaller scale")
    return groups + _vectors(cores, backend)


def _refuse(operator: str, product: Product) -> None:
    for name, block in zip(product.names, (*product.left.blocks, *product.right.blocks), strict=True):
        if not bool(block.isfinite().all()):
            raise NotFiniteError(f"{operator}: {name} holds a NaN or an infinity; find where it comes from")
    names = ", ".join(product.names)
    raise NotFiniteError(f"{operator}: entries of {names} have squares beyond float64; divide by the largest of them")


def _nothing(which: list[int], product: Product) -> Group:
    _, n, d = product.sizes
    u = torch.zeros(len(which), 0, n, dtype=product.dtype, device=product.left.device)
    s, v = u.new_zeros(len(which), 0), u.new_zeros(len(which), 0, d)
    return Group(which, u, s, v, torch.zeros(len(which), dtype=torch.float64))


def _no_larger(product: Product, backend: str | None) -> Product:
    """Give a product with ``R`` at most ``n`` and ``d``: the same, or one side formed and the other the identity."""
    rows, n, d = product.sizes
    if rows <= min(n, d):
        return product
    left, right = (torch.cat([b.to("cpu", torch.float64) for b in x.blocks]) for x in (product.left, product.right))
    size = (left.norm(dim=1) * right.norm(dim=1) * product.weights.abs()).sum()
    weighted = product.weights.unsqueeze(-1) * (left if n <= d else right)
    long = product.right if n <= d else product.left
    product_t = combine(long, weighted, dtype=torch.float64, precision="f64", products=False, backend=backend).v
    formed = RowBlocks([product_t.mT])
    identity = RowBlocks([torch.eye(min(n, d), dtype=torch.float64, device=formed.device)])
    return product._replace(
        left=identity if n <= d else formed,
        right=formed if n <= d else identity,
        weights=torch.ones(min(n, d), dtype=torch.float64),
        floor=rounding_share(rows) * float(size),
    )


def _spread_limit(product: Product) -> float:
    """Say how large the squared entries of the inverse of a scaled root may be, for one pass over its Gram to do.

    ``Q`` is off orthonormal by about ``R^2 spread 2^-53``; four units of roundoff of the dtype are allowed.
    """
    if product.dtype == torch.float64:
        return 2.0
    return max(2.0, 2.0**-22 / (product.left.shape[0] ** 2 * UNIT))


def _core(
    which: list[int],
    products: Mapping[int, Product],
    pairs: Mapping[int, tuple[Factor, Factor]],
    rank: int | None,
    backend: str | None,
) -> _Core:
    """Take the small SVDs of a group, and what is left of them above rounding and within ``rank``."""
    left, right = ([pairs[i][side] for i in which] for side in (0, 1))
    weights = torch.stack([products[i].weights for i in which])
    sizes = torch.stack([f.norms for f in left]) * torch.stack([f.norms for f in right]) * weights.abs()
    floor = rounding_share(weights.shape[-1]) * sizes.sum(-1)
    floor = torch.maximum(floor, floor.new_tensor([products[i].floor for i in which])).unsqueeze(-1)
    weighted = torch.stack([f.r for f in left]) * weights.unsqueeze(-2)
    u, s, v = svd(reconstruct(weighted, torch.stack([f.r for f in right]).mT, backend=backend), backend=backend)
    width = s.shape[-1] if rank is None else min(rank, s.shape[-1])
    kept = s[:, :width].to(products[which[0]].dtype)
    present = (s[:, :width] > floor) & (kept > 0)
    energy = s.square()
    energy[:, :width] *= ~present
    w_left, w_right = (
        reconstruct(torch.stack([f.inverse for f in side]), x[..., :width] * present.unsqueeze(-2), backend=backend)
        for side, x in ((left, u), (right, v))
    )
    rows = [f.rows for f in left], [f.rows for f in right]
    return _Core(which, *rows, w_left, w_right, kept * present, energy.sum(-1))


def _vectors(cores: Sequence[_Core], backend: str | None) -> list[Group]:
    """Form the vectors of all groups, in one call a side and dtype; the signs of ``u`` go into the weights of ``v``."""
    groups: list[Group] = []
    for dtype in dict.fromkeys(core.s.dtype for core in cores):
        mine = [core for core in cores if core.s.dtype == dtype]
        us = _form_batches([(c.left, c.w_left) for c in mine], dtype, backend)
        for core, u in zip(mine, us, strict=True):
            signs = column_signs(u.mT)
            u *= signs.unsqueeze(-1)
            core.w_right.mul_(signs.to("cpu", torch.float64).unsqueeze(-2))
        vs = _form_batches([(c.right, c.w_right) for c in mine], dtype, backend)
        groups += [Group(c.which, u, c.s.to(u.device), v, c.discarded) for c, u, v in zip(mine, us, vs, strict=True)]
    return groups


def _form_batches(
    batches: Sequence[tuple[list[RowBlocks], Tensor]], dtype: torch.dtype, backend: str | None
) -> list[Tensor]:
    """Give ``w^T X [N, k, d]`` for every batch of ``X [R, d]`` and ``w [N, R, k]``."""
    out = [torch.empty(len(xs), w.shape[-1], xs[0].columns, dtype=dtype, device=xs[0].device) for xs, w in batches]
    jobs = [job for (xs, w), target in zip(batches, out, strict=True) for job in zip(xs, w, target, strict=True)]
    form(jobs, dtype, backend)
    return out
