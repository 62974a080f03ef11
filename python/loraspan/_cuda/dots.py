"""Plan and launch inner products of long rows, ``C = A B^T`` in float64 (kernels/cuda/dots.cuh)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan._cuda.library import opened, stream_of, upload
from loraspan._cuda.rows import BF16, F16, F32, F64

# rows of A and of B to a tile
_TILE = 64
# columns in a slab at least, and the blocks that fill a large card: more slabs would only add partial sums
_SLAB, _BLOCKS = 512, 512
_THREADS = 256


class Side(NamedTuple):
    """Rows of one side: the first in the table, their number, and how they are read."""

    first: int
    rows: int
    reading: int


class Product(NamedTuple):
    """One product over ``columns``; ``path`` is one of the dtypes' codes: whose tensor cores, or the dtype of sums."""

    left: Side
    right: Side
    columns: int
    path: int
    symmetric: bool = False


def path(precision: str, *kinds: int) -> int:
    """Give the path for rows of these dtypes: tensor cores where all are one half-precision dtype."""
    if precision == "f64":
        return F64
    return kinds[0] if kinds[0] in (F16, BF16) and len(set(kinds)) == 1 else F32


def as_table(products: Sequence[Product]) -> NDArray[np.int64]:
    """Give the products as :func:`launch` takes them, nine numbers each."""
    rows = [(*p.left, *p.right, p.columns, p.symmetric, p.path) for p in products]
    return np.asarray(rows, dtype=np.int64).reshape(len(rows), 9)


def plan(products: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give columns and number of slabs of each product, by its own sizes alone: so company changes no bit."""
    tiles = np.maximum(-(-products[:, 1] // _TILE) * -(-products[:, 4] // _TILE), 1)
    columns = products[:, 6]
    slabs = np.clip(_BLOCKS // tiles, 1, np.maximum(columns // _SLAB, 1))
    slab = np.maximum(-(-columns // (slabs * 128)) * 128, 128)
    return np.stack([slab, np.maximum(-(-columns // slab), 1)], axis=1)


def launch(
    operator: str, products: NDArray[np.int64], rows: Tensor, device: torch.device, seed: int = 0
) -> list[Tensor]:
    """Run the products and give each, float64 ``[M, N]``, on the CPU: one copy for all, for which the call waits.

    Args:
        operator: ``"gram"`` where both sides are rows of the table, ``"sketch"`` where the right one is random signs.
        products: from :func:`as_table`.
        rows: the table of rows, on the device.
        device: where the rows lie.
        seed: of the signs.
    """
    sizes = products[:, 1] * products[:, 4]
    slabs = plan(products)
    many = slabs[:, 1] > 1
    out = torch.empty(int(sizes.sum()), dtype=torch.float64, device=device)
    partial = torch.empty(int((sizes * slabs[:, 1] * many).sum()), dtype=torch.float64, device=device)
    places = out.data_ptr() + 8 * (np.cumsum(sizes) - sizes)
    spaces = sizes * slabs[:, 1] * many
    spaces = np.where(many, partial.data_ptr() + 8 * (np.cumsum(spaces) - spaces), places)
    blocks = -(-products[:, 1] // _TILE) * -(-products[:, 4] // _TILE) * slabs[:, 1]
    sums = np.where(many, -(-sizes // _THREADS), 0)
    with stream_of(device) as stream:
        for which in np.unique(products[:, 8]):
            chosen = products[:, 8] == which
            jobs = np.empty((int(chosen.sum()), 15), dtype=np.int64)
            jobs[:, 0] = np.cumsum(blocks[chosen]) - blocks[chosen]
            jobs[:, 1] = np.cumsum(sums[chosen]) - sums[chosen]
            jobs[:, 2:9] = products[chosen, :7]
            jobs[:, 9:11], jobs[:, 11], jobs[:, 12] = slabs[chosen], products[chosen, 7], seed
            jobs[:, 13], jobs[:, 14] = spaces[chosen], places[chosen]
            table = upload(jobs, device)
            counts = len(jobs), int(blocks[chosen].sum()), int(sums[chosen].sum())
            opened().call(operator, int(which), table.data_ptr(), *counts, rows.data_ptr(), stream)
        # after the last launch, and before a table may be given away
        found = out.cpu()
    shapes = products[:, [1, 4]].tolist()
    return [c.view(*shape) for c, shape in zip(torch.split(found, sizes.tolist()), shapes, strict=True)]
