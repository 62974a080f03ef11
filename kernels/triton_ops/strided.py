"""Tiles of matrices given by two strides, read and written by 16 bytes where their form allows it.

Forms are those of :mod:`loraspan.triton_ops.rows`. A bound is rounded down to the run of 16 bytes that it is known to
be a multiple of, which changes nothing but tells the compiler that a mask is the same over a run.
"""

import torch
import triton
import triton.language as tl

from loraspan.triton_ops.rows import vector


def form_of(matrix: torch.Tensor) -> str:
    """Say how the entries of ``[m, k]`` (or of every member of ``[N, m, k]``) lie."""
    size = matrix.element_size()
    *batch, down, across = matrix.stride()
    m, k = matrix.shape[-2:]
    if matrix.data_ptr() % 16 or any(step * size % 16 for step in batch):
        return "any"
    if across == 1 and (down * size % 16 == 0 or m == 1) and k * size % 16 == 0:
        return "rows"
    return "columns" if down == 1 and across * size % 16 == 0 and m * size % 16 == 0 else "any"


@triton.jit
def entries(start, down, across, i, m, j, k, KIND: tl.constexpr, FORM: tl.constexpr):
    """Read ``[len(i), len(j)]`` of a matrix ``[m, k]`` at ``start``; 0 outside of it."""
    at, inside = _places(start, down, across, i, m, j, k, KIND, FORM)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def put(start, down, across, i, m, j, k, values, KIND: tl.constexpr, FORM: tl.constexpr):
    """Write ``values [len(i), len(j)]`` to a matrix ``[m, k]`` at ``start``."""
    at, inside = _places(start, down, across, i, m, j, k, KIND, FORM)
    tl.store(at, values, mask=inside)


@triton.jit
def _places(start, down, across, i, m, j, k, KIND: tl.constexpr, FORM: tl.constexpr):
    VECTOR: tl.constexpr = vector(KIND)
    if FORM == "rows":
        at = tl.multiple_of(start + i * down, [16])[:, None] + j[None, :]
        inside = (i < m)[:, None] & (j < k // VECTOR * VECTOR)[None, :]
    elif FORM == "columns":
        at = tl.multiple_of(start + j * across, [16])[None, :] + i[:, None]
        inside = (i < m // VECTOR * VECTOR)[:, None] & (j < k)[None, :]
    else:
        at = start + i[:, None] * down + j[None, :] * across
        inside = (i < m)[:, None] & (j < k)[None, :]
    return at, inside
