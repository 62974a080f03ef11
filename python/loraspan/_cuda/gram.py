"""``gram`` on CUDA: the products of rows with each other, one triangle of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraspan import _native
from loraspan._cuda import dots, library, rows
from loraspan.ops.blocks import RowBlocks, block_table


def run(matrices: Sequence[RowBlocks], precision: str) -> list[Tensor]:
    """Give the Gram matrix of each, float64 on the CPU."""
    device = rows.home(matrices)
    blocks, _ = block_table(matrices)
    first, products = 0, []
    for x in matrices:
        side = dots.Side(first, x.shape[0], rows.reading(x.table, x.columns))
        products.append(dots.Product(side, side, x.columns, dots.path(precision, rows.kind(x.table)), True))
        first += x.shape[0]
    return dots.launch("gram", dots.as_table(products), rows.of_blocks(blocks), device)


def run_batch(batch: Tensor, precision: str) -> Tensor:
    """Take ``[N, R, d]`` without making a tensor of each member."""
    count, height, columns = batch.shape
    blocks = np.empty((count, 5), dtype=np.int64)
    blocks[:, [0, 2, 3, 4]], blocks[:, 1] = _native.batch_fields(batch), height
    products = np.empty((count, 9), dtype=np.int64)
    products[:, 0] = products[:, 3] = height * np.arange(count)
    # one answer for all: members of a batch that starts aligned and goes on unaligned are read one by one
    products[:, 2] = products[:, 5] = rows.reading(blocks, columns)
    products[:, [1, 4]], products[:, 6], products[:, 7] = height, columns, 1
    products[:, 8] = dots.path(precision, _native.DTYPE_CODES[batch.dtype])
    found = dots.launch("gram", products, rows.of_blocks(blocks), batch.device)
    return torch.stack(found) if found else torch.empty(0, height, height, dtype=torch.float64)


def refuses(matrices: Sequence[RowBlocks]) -> str | None:
    """Say why these matrices cannot be read, if so."""
    return library.refuses(rows.devices(matrices))


def refuses_batch(batch: Tensor) -> str | None:
    """Say why this batch cannot be read, if so."""
    return library.refuses([batch.device])
