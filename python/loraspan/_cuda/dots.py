"""Plan and launch inner products of long rows, ``C = A B^T`` in float64 (kernels/cuda/dots.cuh)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan._cuda.library import opened, stream_of, upload
from loraspan._cuda.rows import BF16, EIGHTS, F16, F32, F64
from loraspan.ops.places import fetched

# what else a kernel is built for: tensor cores for more than 64 rows, and 80 columns of float32 to a tile
_TALL, _WIDE = {F16: 4, BF16: 5}, 6
# rows of A and of B to a tile, by the path
_TILES: NDArray[np.int64] = np.asarray([(64, 64)] * 4 + [(128, 64)] * 2 + [(64, 80)])
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


def tiles(products: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give the number of tiles of each product."""
    sizes = _TILES[products[:, 8]]
    counts: NDArray[np.int64] = -(-products[:, [1, 4]] // sizes)
    found: NDArray[np.int64] = counts[:, 0] * counts[:, 1]
    return found


def _chosen(operator: str, products: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give the products with the kernels that suit their own sizes."""
    found: NDArray[np.int64] = products.copy()
    aside = products[:, 2] == EIGHTS
    if operator == "gram":
        aside &= products[:, 5] == EIGHTS
    tall = aside & (products[:, 1] > _TILES[F16][0])
    for kind, other in _TALL.items():
        found[tall & (products[:, 8] == kind), 8] = other
    if operator == "gram":
        # signs are drawn for tiles of 64 columns
        columns = products[:, 4]
        found[(products[:, 8] == F32) & (-(-columns // 80) * 80 < -(-columns // 64) * 64), 8] = _WIDE
    return found


def plan(products: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give columns and number of slabs of each product, by its own sizes alone: so company changes no bit."""
    columns = products[:, 6]
    slabs = np.clip(_BLOCKS // np.maximum(tiles(products), 1), 1, np.maximum(columns // _SLAB, 1))
    slab: NDArray[np.int64] = np.maximum(-(-columns // (slabs * 128)) * 128, 128)
    found: NDArray[np.int64] = np.stack([slab, np.maximum(-(-columns // slab), 1)], axis=1)
    return found


def launch(
    operator: str, products: NDArray[np.int64], rows: NDArray[np.int64] | Tensor, device: torch.device, seed: int = 0
) -> list[Tensor]:
    """Run the products and give each, float64 ``[M, N]``, on the CPU: one copy for all, for which the call waits.

    Args:
        operator: ``"gram"`` where both sides are rows of the table, ``"sketch"`` where the right one is random signs.
        products: from :func:`as_table`.
        rows: the table of rows, if it is on the device already, there.
        device: where the rows lie; where there are none it may be any.
        seed: of the signs.
    """
    sizes = products[:, 1] * products[:, 4]
    shapes = products[:, [1, 4]].tolist()
    if not sizes.any():
        return [torch.empty(*shape, dtype=torch.float64) for shape in shapes]
    products = _chosen(operator, products)
    slabs = plan(products)
    many = slabs[:, 1] > 1
    out = torch.empty(int(sizes.sum()), dtype=torch.float64, device=device)
    partial = torch.empty(int((sizes * slabs[:, 1] * many).sum()), dtype=torch.float64, device=device)
    places = out.data_ptr() + 8 * (np.cumsum(sizes) - sizes)
    spaces = sizes * slabs[:, 1] * many
    spaces = np.where(many, partial.data_ptr() + 8 * (np.cumsum(spaces) - spaces), places)
    blocks = tiles(products) * slabs[:, 1]
    sums = np.where(many, -(-sizes // _THREADS), 0)
    groups = []
    for which in set(products[:, 8].tolist()):
        chosen = products[:, 8] == which
        jobs = np.empty((int(chosen.sum()), 15), dtype=np.int64)
        jobs[:, 0] = np.cumsum(blocks[chosen]) - blocks[chosen]
        jobs[:, 1] = np.cumsum(sums[chosen]) - sums[chosen]
        jobs[:, 2:9] = products[chosen, :7]
        jobs[:, 9:11], jobs[:, 11], jobs[:, 12] = slabs[chosen], products[chosen, 7], seed
        jobs[:, 13], jobs[:, 14] = spaces[chosen], places[chosen]
        groups.append((which, jobs, int(blocks[chosen].sum()), int(sums[chosen].sum())))
    tables = [jobs for _, jobs, _, _ in groups]
    *there, table = upload([*tables, rows], device) if isinstance(rows, np.ndarray) else [*upload(tables, device), rows]
    with stream_of(device) as stream:
        for (which, jobs, *counts), own in zip(groups, there, strict=True):
            opened().call(operator, which, own.data_ptr(), len(jobs), *counts, table.data_ptr(), stream)
    # after the last launch, and before a table may be given away
    found = fetched(out)
    return [c.view(*shape) for c, shape in zip(torch.split(found, sizes.tolist()), shapes, strict=True)]
