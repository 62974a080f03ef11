"""``combine`` on CUDA: the basis by its own kernel, its products by that of ``gram``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan import _native
from loraspan._cuda import dots, library, rows
from loraspan.ops.blocks import RowBlocks, block_table
from loraspan.ops.combine import Combined

# columns of X to a tile, in float32 and in float64; columns of W
_TILES = {"f32": 128, "f64": 64}
_RANK = 64


class Factors(NamedTuple):
    """Matrices and weights on the device, for :func:`form` and the products after it."""

    matrices: list[RowBlocks]
    sides: list[dots.Side]
    table: NDArray[np.int64]
    device: torch.device


def gather(matrices: Sequence[RowBlocks]) -> Factors:
    """Put the rows of all matrices in one table, and say where each begins."""
    blocks, _ = block_table(matrices)
    sides, first = [], 0
    for x in matrices:
        sides.append(dots.Side(first, x.shape[0], rows.reading(x.table, x.columns)))
        first += x.shape[0]
    return Factors(list(matrices), sides, rows.of_blocks(blocks), rows.home(matrices))


def form(factors: Factors, table: Tensor, weights: Sequence[Tensor], places: Sequence[Tensor], precision: str) -> None:
    """Write ``X^T W`` of each matrix to its place ``[d, k]``, of any strides."""
    device = factors.device
    flat = library.upload(torch.cat([w.detach().cpu().reshape(-1) for w in weights]), device)
    tile, jobs, first, offset = _TILES[precision], [], 0, 0
    for x, side, w, v in zip(factors.matrices, factors.sides, weights, places, strict=True):
        address = flat.data_ptr() + 8 * offset
        fields = _native.matrix_fields(v)
        jobs.append((first, *side, x.columns, w.shape[1], address, *fields))
        first += -(-x.columns // tile) * -(-w.shape[1] // _RANK)
        offset += w.numel()
    if first:
        on_device = library.upload(_native.table(jobs, 11), device)
        with library.stream_of(device) as stream:
            wide = int(precision == "f64")
            library.opened().call("combine", wide, on_device.data_ptr(), len(jobs), first, table.data_ptr(), stream)


def columns_of(places: Sequence[Tensor]) -> NDArray[np.int64]:
    """Give the columns of each ``[d, k]`` as a block of rows."""
    codes = _native.DTYPE_CODES
    return _native.table([(v.data_ptr(), v.shape[1], v.stride(1), v.stride(0), codes[v.dtype]) for v in places], 5)


def run(
    pairs: Sequence[tuple[RowBlocks, Tensor]],
    dtype: torch.dtype,
    precision: str,
    products: bool,
    places: Sequence[Tensor | None],
) -> list[Combined]:
    """Give each basis on the device, and its products, float64 on the CPU."""
    factors, weights = gather([x for x, _ in pairs]), [w for _, w in pairs]
    made = [
        _basis(x.columns, w.shape[1], dtype, factors.device, products) if place is None else place
        for (x, w), place in zip(pairs, places, strict=True)
    ]
    if not pairs:
        return []
    of_v = columns_of(made)
    table = library.upload(np.concatenate([factors.table, rows.of_blocks(of_v)]), factors.device)
    form(factors, table, weights, made, precision)
    wanted, first = [], len(factors.table)
    for i, (x, side) in enumerate(zip(factors.matrices, factors.sides, strict=True)):
        own = of_v[i : i + 1]
        vectors = dots.Side(first, made[i].shape[1], rows.reading(own, x.columns))
        # of no rows where X V is not wanted
        left = side if products else side._replace(rows=0)
        kinds = rows.kind(x.table), _native.DTYPE_CODES[dtype]
        wanted.append(dots.Product(left, vectors, x.columns, dots.path(precision, *kinds)))
        wanted.append(dots.Product(vectors, vectors, x.columns, dots.path(precision, kinds[1]), True))
        first += made[i].shape[1]
    found = dots.launch("gram", dots.as_table(wanted), table, factors.device)
    return [Combined(v, found[2 * i], found[2 * i + 1]) for i, v in enumerate(made)]


def _basis(columns: int, rank: int, dtype: torch.dtype, device: torch.device, products: bool) -> Tensor:
    if products:
        return torch.empty(columns, rank, dtype=dtype, device=device)
    return torch.empty(rank, columns, dtype=dtype, device=device).T


def refuses(pairs: Sequence[tuple[RowBlocks, Tensor]]) -> str | None:
    """Say why these matrices cannot be read, if so."""
    return library.refuses(rows.devices([x for x, _ in pairs]))
