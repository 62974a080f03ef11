"""The bases of a slot as they will be stored, and every task's least-squares core on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.collection.assemble import Part
from loraspan.collection.rows import Width, row_bytes, store_rows, values_of
from loraspan.collection.stack import Stack
from loraspan.collection.steps import whole_steps
from loraspan.linalg.roots import gram_root
from loraspan.ops import combine
from loraspan.ops.dense import eigh
from loraspan.ops.packed import Packed, unpack
from loraspan.ops.packed_products import packed_products
from loraspan.ops.places import fetched
from loraspan.ops.product import product

# How far from orthonormal a stored basis may be, beyond what its dtype's rounding does: it is mended above this.
ORTHOGONALITY = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Singular values of a core below this share of its largest are rounding.
_RANK_FLOOR = 1e-7


class Basis(NamedTuple):
    """One basis as stored.

    Attributes:
        v: ``[d, k]``, as stored; packed, its vectors are rows.
        products: ``[T, r, k]``, float64: every task's factor times ``v``, zeros below smaller ranks.
        gram: ``[k, k]``, float64: ``v^T v`` of the stored entries.
    """

    v: Tensor | Packed
    products: Tensor
    gram: Tensor

    @property
    def rank(self) -> int:
        """The number of vectors, ``k``."""
        return self.gram.shape[0]

    @property
    def rows(self) -> Tensor:
        """The vectors as rows, ``[k, d]``, unpacked."""
        return unpack(self.v) if isinstance(self.v, Packed) else self.v.T


def make_basis(stack: Stack, w: Tensor, width: Width, steps: Tensor | None = None) -> Basis:
    """Form ``X^T w`` as it is stored, with its products in the same pass; again if it came out far from orthonormal.

    The products are summed in float64: errors are small differences of what they add up to. The basis is for the
    collection, which lies on the CPU.

    Args:
        stack: ``X``.
        w: ``[R, k]``.
        width: of the basis.
        steps: ``[k]``, which vectors are rounded to whole ones of.
    """
    dtype = torch.float32 if isinstance(width, int) else width
    v, xv, gram = combine(stack.x, w, dtype=dtype, precision="f64")
    for _ in range(2):
        eye = torch.eye(gram.shape[0], dtype=torch.float64)
        if not gram.numel() or (gram - eye).abs().max() <= ORTHOGONALITY[dtype]:
            break
        w = w @ gram_root(gram).inverse
        v, xv, gram = combine(stack.x, w, dtype=dtype, precision="f64")
    if isinstance(width, int) and v.shape[1]:
        packed = _packed(v.cpu().T, width, steps)
        seen = packed_products(stack.x, packed.to(v.device), precision="f64")
        return Basis(packed, stack.pad(seen.rows), seen.basis)
    return Basis(fetched(v), stack.pad(xv), gram)


def _packed(rows: Tensor, width: int, steps: Tensor | None) -> Packed:
    if steps is None:
        packed = store_rows(rows, width)
        assert isinstance(packed, Packed)
        return packed
    return whole_steps(rows, steps)


def empty_basis(stack: Stack, length: int, dtype: torch.dtype) -> Basis:
    """Give a basis of no vectors."""
    none = torch.zeros(0, 0, dtype=torch.float64)
    products = torch.zeros(stack.count, stack.weights.shape[-1], 0, dtype=torch.float64)
    return Basis(torch.empty(length, 0, dtype=dtype), products, none)


class SharedCores(NamedTuple):
    """The cores of all tasks as they will be stored, and the columns that hold them.

    Attributes:
        part: columns of form ss.
        left: ``[T, c, k_out]``, float64: the stored left ends times their weights, a row each; 0 where there is none.
        right: ``[T, c, k_in]``, likewise without weights; None for dense cores, whose right ends are the basis itself.
        squares: ``[T]``: ``|dW_i - U C_i V^T|_F^2`` for those entries.
    """

    part: Part
    left: Tensor
    right: Tensor | None
    squares: Tensor

    @property
    def cores(self) -> Tensor:
        """The cores with their stored, rounded entries, ``[T, k_out, k_in]``."""
        return self.left.mT if self.right is None else self.left.mT @ self.right


def shared_cores(out: Basis, inn: Basis, scales: Tensor, squares: Tensor, width: Width) -> SharedCores:
    r"""Give every task's least-squares core on the stored bases, ``C_i = M_U^-1 T_i M_V^-1``, factored or dense.

    Args:
        out: the output basis.
        inn: the input basis.
        scales: ``[T]``.
        squares: ``[T]``: ``|dW_i|_F^2``.
        width: of the loadings.
    """
    scale = scales[:, None, None]
    b = _solve(out.gram, out.products)  # [T, r, k_out]
    a = _solve(inn.gram, inn.products).mul_(scale)  # [T, r, k_in]
    left, right, present = _canonical(b, a)
    k_out, k_in = b.shape[2], a.shape[2]
    columns = int(present.sum())
    y: Tensor | None
    out_bytes, in_bytes = row_bytes(k_out, width), row_bytes(k_in, width)
    if columns * (out_bytes + in_bytes + 4) > b.shape[0] * k_in * (out_bytes + 4):
        part, x = _dense(left.mT @ right, width)
        y, y_gram, y_seen = None, inn.gram, inn.products.mT
    else:
        part, x, y = _factored(left, right, present, width)
        y_gram, y_seen = product(product(y, inn.gram), y.mT), product(y, inn.products.mT)
    # |dW|^2 + tr(C^T M_U C M_V) - 2 tr(C^T T), with C = x^T y and T = U^T dW V
    held = product(product(x, out.gram), x.mT).mul_(y_gram).sum((-1, -2))
    seen = product(x, out.products.mT).mul_(y_seen).sum((-1, -2)) * scales
    return SharedCores(part, x, y, (squares + (held - 2 * seen)).clamp(min=0))


def _solve(gram: Tensor, products: Tensor) -> Tensor:
    """Give ``products_i gram^-1``, ``[T, r, k]``."""
    inverse = gram_root(gram).inverse
    return product(products, inverse @ inverse.T)


def _canonical(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give ``b_i^T a_i`` as orthonormal left times orthogonal right rows, by size, and which are not zero.

    Left rows are orthonormal, so rounding a right one costs that share of its own size: a factor pair of any gauge is
    stored with the same accuracy.
    """
    root = gram_root(product(b, b.mT))
    middle = product(product(root.r, product(a, a.mT)), root.r.mT)
    values, vectors = eigh((middle + middle.mT) / 2)
    present = (values > _RANK_FLOOR**2 * values[:, :1]) & (values > 0)
    return product(product(root.inverse, vectors).mT, b), product(product(root.r.mT, vectors).mT, a), present


def _factored(left: Tensor, right: Tensor, present: Tensor, width: Width) -> tuple[Part, Tensor, Tensor]:
    norms = [side.square().sum(-1).sqrt() for side in (left, right)]
    weights = norms[0] * norms[1] * present
    is_full = bool(present.all())
    ends, kept = [], []
    for side, norm in zip((left, right), norms, strict=True):
        rows = side / torch.where(norm > 0, norm, 1.0).unsqueeze(-1)
        ends.append(store_rows(rows.flatten(0, 1) if is_full else rows[present], width))
        if is_full:
            kept.append(values_of(ends[-1]).double().view(side.shape))
        else:
            kept.append(torch.zeros_like(side))
            kept[-1][present] = values_of(ends[-1]).double()
    part = Part("ss", present.sum(-1), weights[present], ends[0], ends[1])
    return part, kept[0] * weights.float().double().unsqueeze(-1), kept[1]


def _dense(cores: Tensor, width: Width) -> tuple[Part, Tensor]:
    weights = cores.norm(dim=-2)
    left = store_rows(unit(cores).mT.reshape(-1, cores.shape[1]), width)
    counts = torch.full((cores.shape[0],), cores.shape[2])
    held = values_of(left).double().view(cores.shape[0], cores.shape[2], cores.shape[1])
    return Part("ss", counts, weights.flatten(), left, None), held * weights.float().double().unsqueeze(-1)


def unit(columns: Tensor) -> Tensor:
    """Give columns of length 1, zero ones as they are."""
    norm = columns.norm(dim=-2, keepdim=True)
    return columns / torch.where(norm > 0, norm, 1.0)
