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

# columns of X in a tile: the larger where that leaves enough blocks for a large card; columns of W in 16s
_HEIGHTS = {"f32": (128, 64), "f64": (64,)}
_WIDTHS = {"f32": (2, 3, 4, 5, 6), "f64": (2, 4)}
_BLOCKS = 264


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


def form(
    factors: Factors, table: NDArray[np.int64], weights: Sequence[Tensor], places: Sequence[Tensor], precision: str
) -> Tensor:
    """Write ``X^T W`` of each matrix to its place ``[d, k]``, of any strides; give ``table`` on the device."""
    device = factors.device
    flat, starts = _flat(weights, torch.float32 if precision == "f32" else torch.float64, device)
    # every tile adds the same products in the same order, so company may choose it
    widest = max(w.shape[1] for w in weights)
    width = min(_WIDTHS[precision], key=lambda width: (-(-widest // (16 * width)) * width, -width))
    across = [-(-w.shape[1] // (16 * width)) for w in weights]
    for height in _HEIGHTS[precision]:
        tiles = [-(-x.columns // height) * count for x, count in zip(factors.matrices, across, strict=True)]
        if sum(tiles) >= _BLOCKS:
            break
    jobs, first = [], 0
    for x, side, w, v, start, count in zip(
        factors.matrices, factors.sides, weights, places, starts, tiles, strict=True
    ):
        address = flat.data_ptr() + flat.element_size() * start
        how = rows.ALONG_COLUMNS if w.shape[1] % 8 else rows.EIGHTS
        jobs.append((first, *side, x.columns, w.shape[1], address, how, *_native.matrix_fields(v)))
        first += count
    there, own = library.upload([table, _native.table(jobs, 12)], device)
    if first:
        with library.stream_of(device) as stream:
            kind = int(precision == "f64"), height // 16, width
            library.opened().call("combine", *kind, own.data_ptr(), len(jobs), first, there.data_ptr(), stream)
    return there


def _flat(weights: Sequence[Tensor], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[int]]:
    """Give all weights on the device in the dtype of the sums, rounded once, and where each begins: at 16 bytes."""
    starts = [0]
    for w in weights:
        starts.append(starts[-1] + -(-w.numel() // 4) * 4)
    there = all(w.device == device for w in weights)
    flat = torch.empty(starts[-1], dtype=dtype, device=device if there else "cpu", pin_memory=not there)
    for w, start in zip(weights, starts, strict=False):
        flat[start : start + w.numel()].view(w.shape).copy_(w.detach())
    return flat.to(device, non_blocking=True), starts[:-1]


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
    if not pairs:
        return []
    factors, weights = gather([x for x, _ in pairs]), [w for _, w in pairs]
    made = [
        _basis(x.columns, w.shape[1], dtype, factors.device, products) if place is None else place
        for (x, w), place in zip(pairs, places, strict=True)
    ]
    of_v = columns_of(made)
    table = form(factors, np.concatenate([factors.table, rows.of_blocks(of_v)]), weights, made, precision)
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
