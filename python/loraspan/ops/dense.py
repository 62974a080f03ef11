"""Eigenvectors, singular vectors and roots of many small float64 matrices at once.

The compiled kernels take matrices of up to 512 columns, one thread to each, and give a member of a batch the bits that
it has alone, for any number of threads. Larger ones go to LAPACK, whose threads may show in the last bits. All of this
stays on the CPU: where large products are taken by a GPU's backend, these take the first of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from loraspan import _core, _native
from loraspan._default_device import cpu_by_default
from loraspan._dispatch import Backend, choose
from loraspan.errors import ShapeError
from loraspan.ops.places import backend_at


class Eigen(NamedTuple):
    """What :func:`eigh` gives: ``values [..., n]``, descending, and ``vectors [..., n, n]``, one a column."""

    values: Tensor
    vectors: Tensor


class Svd(NamedTuple):
    """What :func:`svd` gives: ``u [..., m, q]``, ``s [..., q]``, descending, and ``v [..., n, q]``."""

    u: Tensor
    s: Tensor
    v: Tensor


class Root(NamedTuple):
    """``r`` and ``inverse``, both ``[..., n, n]``, with ``r.mT @ r = G`` and ``r @ inverse`` the projector on range."""

    r: Tensor
    inverse: Tensor


T = TypeVar("T", Eigen, Svd)

# Past so many columns the blocked methods of LAPACK are faster than one thread a matrix.
LARGEST = 512
# A pivot of the scaled Gram below this goes to the eigendecomposition, which tells small from absent.
_PIVOT_FLOOR = 1e-10
# Eigenvalues of the scaled Gram below this, times its size, are rounding.
_RANK_FLOOR = 1e-15


def eigh(a: Tensor, *, backend: str | None = None) -> Eigen:
    r"""Give all eigenvalues and eigenvectors of symmetric matrices.

    Args:
        a: ``[..., n, n]``, float64. Only the lower triangle is read.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``.

    Returns:
        Values ``[..., n]``, descending, and orthonormal vectors ``[..., n, n]``: ``a = vectors diag(values)
        vectors^T`` within ``8 n 2^-53 |a|_2``. A member has the bits that it has alone, for any number of threads.

    Raises:
        ShapeError: if ``a`` is not float64 or its last two sizes differ.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> values, vectors = eigh(torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64))
        >>> values, vectors.abs()
        (tensor([3., 2.], dtype=torch.float64), tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64))
    """
    if a.ndim < 2 or a.shape[-1] != a.shape[-2] or a.dtype != torch.float64:
        raise ShapeError(f"eigh: a is [..., n, n] of float64; got {list(a.shape)} of {a.dtype}")
    return choose("eigh", EIGH_BACKENDS, backend_at(a.device, backend), a).run(a.resolve_neg())


def svd(a: Tensor, *, backend: str | None = None) -> Svd:
    r"""Give ``a = u diag(s) v^T``, the thin singular value decomposition.

    Args:
        a: ``[..., m, n]``, float64.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``.

    Returns:
        ``u [..., m, q]``, ``s [..., q]``, descending, and ``v [..., n, q]``, ``q = min(m, n)``. Where ``s`` is 0, the
        vector on the longer side is zero or a unit vector. A member has the bits that it has alone, for any number of
        threads.

    Raises:
        ShapeError: if ``a`` is not a float64 matrix.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> u, s, v = svd(torch.tensor([[0.0, 3.0], [2.0, 0.0]], dtype=torch.float64))
        >>> s
        tensor([3., 2.], dtype=torch.float64)
    """
    if a.ndim < 2 or a.dtype != torch.float64:
        raise ShapeError(f"svd: a is [..., m, n] of float64; got {list(a.shape)} of {a.dtype}")
    if a.shape[-2] < a.shape[-1]:
        v, s, u = svd(a.mT, backend=backend)
        return Svd(u, s, v)
    return choose("svd", SVD_BACKENDS, backend_at(a.device, backend), a).run(a.resolve_neg())


@cpu_by_default
def gram_root(gram: Tensor, *, backend: str | None = None) -> Root:
    r"""Give ``R`` with ``R^T R = G`` for positive semidefinite matrices, and its pseudo-inverse.

    If ``G = B^T B`` then ``B @ inverse`` has orthonormal columns (zero ones where ``G`` lacks rank). Cholesky of the
    matrix scaled to a unit diagonal; an eigendecomposition for the members that are rank-deficient.

    Args:
        gram: ``[..., n, n]``, float64, symmetric positive semidefinite up to rounding.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``.

    Returns:
        ``r`` and ``inverse``. Directions below ``sqrt(n 1e-15)`` of the largest (after scaling) count as absent. A
        member has the bits that it has alone, for any number of threads; one with a NaN or infinity comes out NaN.

    Raises:
        ShapeError: if ``gram`` is not float64 or its last two sizes differ.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> root = gram_root(torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
        >>> root.r.abs().sum().item(), root.inverse.abs().sum().item()
        (2.0, 0.5)
    """
    if gram.ndim < 2 or gram.shape[-1] != gram.shape[-2] or gram.dtype != torch.float64:
        raise ShapeError(f"gram_root: gram is [..., n, n] of float64; got {list(gram.shape)} of {gram.dtype}")
    return choose("gram_root", ROOT_BACKENDS, backend_at(gram.device, backend), gram).run(gram.resolve_neg())


def _eigh(a: Tensor, *, isa: str) -> Eigen:
    if a.shape[-1] > LARGEST:
        return reference_eigh(a)
    a = a.detach().contiguous()
    values, vectors = a.new_empty(a.shape[:-1]), torch.empty_like(a)
    _core.eigh(a.data_ptr(), _count(a), a.shape[-1], values.data_ptr(), vectors.data_ptr(), _native.threads(), isa)
    return _completed(a, Eigen(values, vectors), values, reference_eigh)


def _svd(a: Tensor, *, isa: str) -> Svd:
    if a.shape[-1] > LARGEST:
        return reference_svd(a)
    a = a.detach().contiguous()
    *batch, m, n = a.shape
    u, s, v = torch.empty_like(a), a.new_empty(*batch, n), a.new_empty(*batch, n, n)
    places = u.data_ptr(), s.data_ptr(), v.data_ptr()
    _core.svd(a.data_ptr(), _count(a), m, n, *places, _native.threads(), isa)
    return _completed(a, Svd(u, s, v), s, reference_svd)


def _completed(a: Tensor, found: T, values: Tensor, otherwise: Callable[[Tensor], T]) -> T:
    """Do with LAPACK the finite members whose iteration did not end; none is known, but a NaN must not pass for one."""
    if values.isnan().any():
        failed = values.isnan().any(-1)
        failed &= a.isfinite().flatten(max(0, a.ndim - 2)).all(-1)
        for place, part in zip(found, otherwise(a[failed]), strict=True):
            place[failed] = part
    return found


def _root(gram: Tensor, *, isa: str) -> Root:
    if gram.shape[-1] > LARGEST:
        return reference_root(gram)
    gram = gram.detach().contiguous()
    r, inverse = torch.empty_like(gram), torch.empty_like(gram)
    places = r.data_ptr(), inverse.data_ptr()
    _core.root(gram.data_ptr(), _count(gram), gram.shape[-1], *places, _native.threads(), isa)
    return Root(r, inverse)


def _count(a: Tensor) -> int:
    return math.prod(a.shape[:-2])


@torch.no_grad()
def reference_eigh(a: Tensor) -> Eigen:
    """Say it with LAPACK."""
    values, vectors = torch.linalg.eigh(a)
    return Eigen(values.flip(-1), vectors.flip(-1))


@torch.no_grad()
def reference_svd(a: Tensor) -> Svd:
    """Say it with LAPACK."""
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    return Svd(u, s, vh.mT)


@torch.no_grad()
def reference_root(gram: Tensor) -> Root:
    """Say it with LAPACK."""
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


def _refuses(a: Tensor) -> str | None:
    return None if a.is_cpu else f"it reads CPU memory, and the matrices are on {a.device}"


EIGH_BACKENDS = (*_native.backends(_eigh, _refuses), Backend("reference", reference_eigh, lambda *_: None))
SVD_BACKENDS = (*_native.backends(_svd, _refuses), Backend("reference", reference_svd, lambda *_: None))
ROOT_BACKENDS = (*_native.backends(_root, _refuses), Backend("reference", reference_root, lambda *_: None))
