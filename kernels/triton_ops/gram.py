"""gram: ``G = X X^T`` for a batch of matrices that lie in row blocks.

The products of :mod:`loraspan.triton_ops.products` with themselves, lower half only. Two launches, and one more for
each further dtype, storage and class of size in the batch; two copies to the device and one back. ``R^2 d`` operations
over ``R d`` entries read: memory bounds it up to about 200 rows of half precision on a card with 300 operations per
byte. On an H100 0.13 of the floor is reached there; beyond, see there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan import _native
from loraspan.ops.blocks import RowBlocks, block_table
from loraspan.triton_ops import launch, products
from loraspan.triton_ops.rows import table


def run(matrices: Sequence[RowBlocks], precision: str) -> list[Tensor]:
    """Give a float64 ``[R, R]`` on the CPU per matrix."""
    devices = [x.device for x in matrices if x.device is not None]
    blocks, spans = block_table(matrices)
    return _run(blocks, spans, precision, devices[0] if devices else torch.device("cpu"))


def run_batch(batch: Tensor, precision: str) -> Tensor:
    """Take ``[N, R, d]`` without making a tensor of each member; give ``[N, R, R]``."""
    count, rows, columns = batch.shape
    blocks: NDArray[np.int64] = np.empty((count, 5), dtype=np.int64)
    blocks[:, [0, 2, 3, 4]], blocks[:, 1] = _native.batch_fields(batch), rows
    grams = _run(blocks, [(i, 1, columns) for i in range(count)], precision, batch.device)
    return torch.stack(grams) if grams else torch.empty(0, rows, rows, dtype=torch.float64)


def _run(
    blocks: NDArray[np.int64], spans: Sequence[tuple[int, int, int]], precision: str, device: torch.device
) -> list[Tensor]:
    rows = table(blocks, spans)
    return products.run(rows, [products.Job(x) for x in rows.matrices], precision == "f64", device)


def refuses(matrices: Sequence[RowBlocks]) -> str | None:
    """Say why these matrices cannot be read, if they cannot."""
    return launch.refuses(x.device for x in matrices)


def refuses_batch(batch: Tensor) -> str | None:
    """Say why this batch cannot be read, if it cannot."""
    return launch.refuses([batch.device])
