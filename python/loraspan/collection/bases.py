"""The bases of a slot as they will be stored, and every task's least-squares core on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.collection.assemble import Part
from loraspan.collection.rows import Width, row_bytes, store_rows, values_of
from loraspan.collection.stack import Stack
from loraspan.linalg.roots import gram_root
from loraspan.ops import combine
from loraspan.ops.dense import eigh
from loraspan.ops.packed import Packed, pack, unpack
from loraspan.ops.packed_products import packed_products
from loraspan.ops.places import fetched

# How far from orthonormal a stored basis may be, beyond what its dtype's rounding does: it is mended above this.
_ORTHOGONALITY = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
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


def make_basis(stack: Stack, w: Tensor, width: Width) -> Basis:
    """Form ``X^T w`` as it is stored, with its products in the same pass; again if it came out far from orthonormal.

    The products are summed in float64: errors are small differences of what they add up to. The basis is for the
    collection, which lies on the CPU.
    """
    dtype = torch.float32 if isinstance(width, int) else width
    v, xv, gram = combine(stack.x, w, dtype=dtype, precision="f64")
    for _ in range(2):
        eye = torch.eye(gram.shape[0], dtype=torch.float64)
        if not gram.numel() or (gram - eye).abs().max() <= _ORTHOGONALITY[dtype]:
            break
        w = w @ gram_root(gram).inverse
        v, xv, gram = combine(stack.x, w, dtype=dtype, precision="f64")
    if isinstance(width, int) and v.shape[1]:
        packed = pack(v.cpu().T, width)
        seen = packed_products(stack.x, packed.to(v.device), precision="f64")
        return Basis(packed, stack.pad(seen.rows), seen.basis)
    return Basis(fetched(v), stack.pad(xv), gram)


def empty_basis(stack: Stack, length: int, dtype: torch.dtype) -> Basis:
    """Give a basis of no vectors."""
    none = torch.zeros(0, 0, dtype=torch.float64)
    products = torch.zeros(stack.count, stack.weights.shape[-1], 0, dtype=torch.float64)
    return Basis(torch.empty(length, 0, dtype=dtype), products, none)


class SharedCores(NamedTuple):
    """The cores of all tasks as they will be stored, and the columns that hold them.

    Attributes:
        part: columns of form ss.
        cores: ``[T, k_out, k_in]``, float64: the cores with their stored, rounded entries.
        squares: ``[T]``: ``|dW_i - U C_i V^T|_F^2`` for those entries.
    """

    part: Part
    cores: Tensor
    squares: Tensor


def shared_cores(out: Basis, inn: Basis, scales: Tensor, squares: Tensor, width: Width) -> SharedCores:
    r"""Give every task's least-squares core on the stored bases, ``C_i = M_U^-1 T_i M_V^-1``, factored or dense.

    Args:
        out: the output basis.
        inn: the input basis.
        scales: ``[T]``.
        squares: ``[T]``: ``|dW_i|_F^2``.
        width: of the loadings.
    """
    b = _solve(out.gram, out.products)  # [T, k_out, r]
    a = _solve(inn.gram, inn.products) * scales[:, None, None]  # [T, k_in, r]
    left, right, present = _canonical(b, a)
    k_out, k_in = b.shape[1], a.shape[1]
    columns = int(present.sum())
    out_bytes, in_bytes = row_bytes(k_out, width), row_bytes(k_in, width)
    if columns * (out_bytes + in_bytes + 4) > b.shape[0] * k_in * (out_bytes + 4):
        part, cores = _dense(left @ right.mT, width)
    else:
        part, cores = _factored(left, right, present, width)
    seen = out.products.mT @ inn.products * scales[:, None, None]  # T_i = U^T dW_i V
    image = out.gram @ cores @ inn.gram
    lost = squares + (cores * (image - 2 * seen)).sum((-1, -2))
    return SharedCores(part, cores, lost.clamp(min=0))


def _solve(gram: Tensor, products: Tensor) -> Tensor:
    """Give ``gram^-1 products_i^T``, ``[T, k, r]``."""
    inverse = gram_root(gram).inverse
    return inverse @ (inverse.T @ products.mT)


def _canonical(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give ``b_i a_i^T`` as orthonormal left times orthogonal right columns, by size, and which are not zero.

    Left columns are orthonormal, so rounding a right column costs that share of its own size: a factor pair of any
    gauge is stored with the same accuracy.
    """
    root = gram_root(b.mT @ b)
    inner = root.r @ (a.mT @ a) @ root.r.mT
    values, vectors = eigh((inner + inner.mT) / 2)
    present = (values > _RANK_FLOOR**2 * values[:, :1]) & (values > 0)
    return b @ (root.inverse @ vectors), a @ (root.r.mT @ vectors), present


def _factored(left: Tensor, right: Tensor, present: Tensor, width: Width) -> tuple[Part, Tensor]:
    weights = left.norm(dim=-2) * right.norm(dim=-2) * present
    ends = [store_rows(unit(side).mT[present], width) for side in (left, right)]
    kept = []
    for side, rows in zip((left, right), ends, strict=True):
        held = torch.zeros_like(side.mT)
        held[present] = values_of(rows).double()
        kept.append(held)
    cores = (kept[0].mT * weights.float().double().unsqueeze(-2)) @ kept[1]
    return Part("ss", present.sum(-1), weights[present], ends[0], ends[1]), cores


def _dense(cores: Tensor, width: Width) -> tuple[Part, Tensor]:
    weights = cores.norm(dim=-2)
    left = store_rows(unit(cores).mT.reshape(-1, cores.shape[1]), width)
    counts = torch.full((cores.shape[0],), cores.shape[2])
    held = values_of(left).double().view(cores.shape[0], cores.shape[2], cores.shape[1])
    stored = held.mT * weights.float().double().unsqueeze(-2)
    return Part("ss", counts, weights.flatten(), left, None), stored


def unit(columns: Tensor) -> Tensor:
    """Give columns of length 1, zero ones as they are."""
    norm = columns.norm(dim=-2, keepdim=True)
    return columns / torch.where(norm > 0, norm, 1.0)
