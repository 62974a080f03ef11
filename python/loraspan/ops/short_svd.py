"""Leading singular vectors of many matrices of few rows and one size, each through its Gram, with sums in float32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loraspan import _core, _native
from loraspan._dispatch import Backend, choose
from loraspan.ops.blocks import RowBlocks, refuses_device
from loraspan.ops.combine import reference as combine_reference
from loraspan.ops.dense import reference_eigh
from loraspan.ops.gram import reference as gram_reference


class ShortSvd(NamedTuple):
    """What :func:`short_svd` gives, all float64.

    ``values [N, R]`` are the eigenvalues of the Gram, descending, as they come; ``totals [N]`` is its trace; ``w
    [N, R, k]`` holds its leading eigenvectors, and ``vtv [N, k, k]`` what ``V^T V`` is as rounded.
    """

    values: Tensor
    totals: Tensor
    w: Tensor
    vtv: Tensor


def short_svd(x: Tensor, v: Tensor, *, backend: str | None = None) -> ShortSvd:
    r"""Fill ``V = X^T W / sqrt(values)`` for each ``X``, where ``X X^T = W diag(values) W^T``.

    It does what :func:`loraspan.ops.gram`, :func:`loraspan.ops.dense.eigh` and :func:`loraspan.ops.combine` do one
    after the other, with the same bits; a matrix goes through all three while it is in cache.

    Args:
        x: ``[N, R, d]``, N and R at least 1, in CPU memory, of any dtype and strides that :class:`RowBlocks` takes.
        v: ``[N, d, k]``, the places of ``V``, of any such dtype and strides; ``k`` is at least 1 and at most ``R``.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``) or ``"reference"``.

    Returns:
        :class:`ShortSvd`. The first entry of largest magnitude of a column of ``w`` is positive. A column of ``V`` is
        finite where its value is above zero. The compiled kernels give NaN for a matrix whose entries are not finite.

    Raises:
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> v = torch.empty(1, 2, 1)
        >>> found = short_svd(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]), v)
        >>> found.values, found.w.flatten(), v.flatten()
        (tensor([[16.,  9.]], dtype=torch.float64), tensor([0., 1.], dtype=torch.float64), tensor([0., 1.]))
    """
    return choose("short_svd", BACKENDS, backend, x).run(x, v)


def _cpu(x: Tensor, v: Tensor, *, isa: str) -> ShortSvd:
    count, rows, columns = x.shape
    rank = v.shape[-1]
    shapes = (count, rows), (count,), (count, rows, rank), (count, rank, rank)
    found = ShortSvd(*(torch.empty(shape, dtype=torch.float64) for shape in shapes))
    first_x, first_v = ((*_native.matrix_fields(t[0]), t.stride(0) * t.element_size()) for t in (x, v))
    sizes, out = (count, rows, columns, rank), [t.data_ptr() for t in found]
    _core.short_svd(first_x, first_v, sizes, out, _native.threads(), isa)
    return found


@torch.no_grad()
def _reference(x: Tensor, v: Tensor) -> ShortSvd:
    matrices = [RowBlocks([member]) for member in x]
    grams = torch.stack(gram_reference(matrices, "f32"))
    values, vectors = reference_eigh(grams)
    w = vectors[..., : v.shape[-1]]
    first = w.gather(-2, w.abs().argmax(-2, keepdim=True))
    w = torch.where(first < 0, -w, w)
    weights = w / values[:, None, : w.shape[-1]].clamp(min=0).sqrt()
    images = combine_reference(list(zip(matrices, weights, strict=True)), v.dtype, "f32", False, list(v))
    totals = grams.diagonal(dim1=1, dim2=2).sum(1)
    return ShortSvd(values, totals, w, torch.stack([image.vtv for image in images]))


def _refuses(x: Tensor) -> str | None:
    return refuses_device([RowBlocks([x[0]])])


BACKENDS = (*_native.backends(_cpu, _refuses), Backend("reference", _reference, lambda *_: None))
