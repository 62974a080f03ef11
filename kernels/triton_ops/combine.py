"""combine: ``V = X^T W`` stored in its dtype, then ``X V`` and ``V^T V`` of the stored V.

:mod:`loraspan.triton_ops.transposed` makes V, :mod:`loraspan.triton_ops.products` the products, in which the columns of
V are rows of the same table. X is read twice, the second time from the L2 cache where it fits; a pass that
multiplies each chunk at once would have to add into an ``[R, k]`` of float64 per 128 columns, more bytes than X has.
Operations and floors: see there. On an H100 a matrix of 1600 x 4096 reaches 0.21 of the sum of both floors, 24 of them
0.46 to 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraspan import _native
from loraspan.ops.blocks import RowBlocks, block_table
from loraspan.ops.combine import Combined
from loraspan.triton_ops import launch, products, transposed
from loraspan.triton_ops.rows import table


def run(
    pairs: Sequence[tuple[RowBlocks, Tensor]],
    dtype: torch.dtype,
    precision: str,
    products_wanted: bool,
    places: Sequence[Tensor | None],
) -> list[Combined]:
    """Give V on the data's device, and the products in float64 on the CPU."""
    if not pairs:
        return []
    device, wide = pairs[0][0].device or torch.device("cpu"), precision == "f64"
    made = [
        _basis(x.columns, w.shape[1], dtype, device, products_wanted) if place is None else place
        for (x, w), place in zip(pairs, places, strict=True)
    ]
    blocks, spans = block_table([x for x, _ in pairs])
    columns = [(v.data_ptr(), v.shape[1], v.stride(1), v.stride(0), _native.DTYPE_CODES[dtype]) for v in made]
    spans += [(len(blocks) + i, 1, v.shape[0]) for i, v in enumerate(made)]
    rows = table(np.concatenate([blocks, _native.table(columns, 5)]), spans)
    xs, vs = rows.matrices[: len(pairs)], rows.matrices[len(pairs) :]

    jobs = [transposed.Job(x, w, v) for x, (_, w), v in zip(xs, pairs, made, strict=True)]
    transposed.run(rows, jobs, wide, device)
    wanted = [products.Job(v) for v in vs]
    if products_wanted:
        wanted += [products.Job(x, v) for x, v in zip(xs, vs, strict=True)]
    found = products.run(rows, wanted, wide, device)
    xv = found[len(pairs) :] or [torch.empty(0, v.shape[1], dtype=torch.float64) for v in made]
    return [Combined(*one) for one in zip(made, xv, found, strict=False)]


def _basis(d: int, k: int, dtype: torch.dtype, device: torch.device, products_wanted: bool) -> Tensor:
    # as on the CPU: without products, column after column
    shape = (d, k) if products_wanted else (k, d)
    v = torch.empty(shape, dtype=dtype, device=device)
    return v if products_wanted else v.T


def refuses(pairs: Sequence[tuple[RowBlocks, Tensor]]) -> str | None:
    """Say why these matrices cannot be read, if they cannot."""
    return launch.refuses(x.device or w.device for x, w in pairs)
