"""Rows of matrices wherever they lie: a table of addresses, and tiles read through it.

A row is an address, the distance of its columns and a dtype, so that blocks of any strides, of several matrices and
even of several dtypes stand in one table. How the rows of one matrix lie as a whole is its *form*, known when a kernel
is compiled: ``"rows"`` (columns adjacent, 16-byte loads along a row), ``"columns"`` (rows adjacent in runs of 16 bytes,
16-byte loads across rows, as the transpose of a stored factor has them), ``"any"`` (an entry at a time).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from loraspan.triton_ops.launch import upload

# as in loraspan._native.DTYPE_CODES
_KINDS = ("f16", "bf16", "f32", "f64")
_SIZES = np.asarray([2, 2, 4, 8])


class Rows(NamedTuple):
    """One matrix in a table: where its rows begin, how many, their dtype (``"mixed"`` for several) and form."""

    first: int
    count: int
    columns: int
    kind: str
    form: str


class Table:
    """Rows of all matrices of a call: ``fields [3, total]`` (address, distance of columns, dtype), and each matrix."""

    def __init__(self, fields: NDArray[np.int64], matrices: list[Rows]) -> None:
        self.fields = fields
        self.matrices = matrices
        self.total: int = fields.shape[1]
        self._there: torch.Tensor | None = None

    def on(self, device: torch.device) -> torch.Tensor:
        """Give the fields on ``device``, copied there once."""
        if self._there is None:
            [self._there] = upload([self.fields], device)
        return self._there


def table(blocks: NDArray[np.int64], spans: Sequence[tuple[int, int, int]]) -> Table:
    """Take blocks ``[., 5]`` (address, rows, strides, dtype) and each matrix's first block, block count and columns."""
    address, count, down, across, code = blocks.T
    size = _SIZES[code]
    first = np.cumsum([0, *count])
    within = np.arange(first[-1]) - np.repeat(first[:-1], count)
    fields = np.stack(
        [
            np.repeat(address, count) + within * np.repeat(down * size, count),
            np.repeat(across, count),
            np.repeat(code, count),
        ]
    )
    aligned = address % 16 == 0
    by_rows = aligned & (across == 1) & ((down * size % 16 == 0) | (count == 1))
    by_columns = aligned & (down == 1) & (count * size % 16 == 0) & (across * size % 16 == 0)
    matrices = []
    for start, number, columns in spans:
        own = np.arange(start, start + number)
        own = own[count[own] > 0]
        kinds = {_KINDS[c] for c in code[own].tolist()}
        kind = "mixed" if len(kinds) > 1 else next(iter(kinds), "f32")
        form = "any"
        if kind != "mixed" and by_rows[own].all() and columns * _SIZES[_KINDS.index(kind)] % 16 == 0:
            form = "rows"
        elif kind != "mixed" and by_columns[own].all():
            form = "columns"
        matrices.append(Rows(int(first[start]), int(count[own].sum()), columns, kind, form))
    return Table(fields, matrices)


@triton.jit
def row_ends(rows, total, first, index, count, KIND: tl.constexpr, FORM: tl.constexpr):
    """Give address, distance of columns and dtype of rows ``first + index``; zeros from ``count`` on."""
    inside = index < count
    at = rows + first + index
    address = tl.load(at, mask=inside, other=0)
    stride = tl.load(at + total, mask=inside, other=0)
    code = tl.load(at + 2 * total, mask=inside, other=-1)
    if FORM == "columns":
        VECTOR: tl.constexpr = vector(KIND)
        stride = tl.multiple_of(tl.max_constancy(stride, [VECTOR]), [VECTOR])
    return address, stride, code


@triton.jit
def row_tile(address, stride, code, columns, inside, KIND: tl.constexpr, FORM: tl.constexpr, TYPE: tl.constexpr):
    """Read ``[rows, columns]`` in TYPE, 0 where not ``inside``."""
    if KIND == "mixed":
        its = (code == 0)[:, None]
        tile = _tile(address, stride, columns, inside & its, "f16", FORM).to(TYPE)
        its = (code == 1)[:, None]
        tile = tl.where(its, _tile(address, stride, columns, inside & its, "bf16", FORM).to(TYPE), tile)
        its = (code == 2)[:, None]
        tile = tl.where(its, _tile(address, stride, columns, inside & its, "f32", FORM).to(TYPE), tile)
        its = (code == 3)[:, None]
        tile = tl.where(its, _tile(address, stride, columns, inside & its, "f64", FORM).to(TYPE), tile)
    else:
        tile = _tile(address, stride, columns, inside, KIND, FORM).to(TYPE)
    return tile


@triton.jit
def _tile(address, stride, columns, inside, KIND: tl.constexpr, FORM: tl.constexpr):
    start = address.to(tl.pointer_type(element(KIND)))
    if FORM == "rows":
        at = tl.multiple_of(start, [16])[:, None] + columns[None, :]
    elif FORM == "columns":
        start = tl.max_contiguous(tl.multiple_of(start, [16]), [vector(KIND)])
        at = start[:, None] + columns[None, :] * stride[:, None]
    else:
        at = start[:, None] + columns[None, :] * stride[:, None]
    return tl.load(at, mask=inside, other=0.0)


@triton.constexpr_function
def element(kind):
    """Give the type of a kind."""
    return {"f16": tl.float16, "bf16": tl.bfloat16, "f32": tl.float32, "f64": tl.float64}[kind]


@triton.constexpr_function
def vector(kind):
    """Give how many entries of a kind are 16 bytes."""
    return {"f16": 8, "bf16": 8, "f32": 4, "f64": 2, "mixed": 1}[kind]
