"""sketch and power: ``X Omega`` with signs drawn in registers, and ``X (X^T Q)``.

A sketch is the products of :mod:`loraspan.triton_ops.products` whose right side is drawn by Philox where the tile is
needed: 10 rounds of about ten integer operations per row of Omega and 128 of its columns, and one select per sign, so
that ``R d`` entries are all that is read. On half precision the signs are exact and the products run on tensor cores.
On an H100 0.13 to 0.2 of the floor that the bytes of X set is reached in half precision, and 0.07 to 0.1 in float32.

A power step is :mod:`loraspan.triton_ops.transposed`, with ``X^T Q`` in a workspace ``[l, d]`` of float32 (or
float64), and the products with it: X is read twice, as in combine, and ``2 l d`` entries of the workspace on top.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraspan import _native
from loraspan.ops.blocks import RowBlocks, block_table
from loraspan.triton_ops import launch, products, transposed
from loraspan.triton_ops.rows import table


def run(pairs: Sequence[tuple[RowBlocks, int]], seed: int, precision: str) -> list[Tensor]:
    """Give a float64 ``[R, width]`` on the CPU per pair."""
    devices = [x.device for x, _ in pairs if x.device is not None]
    rows = table(*block_table([x for x, _ in pairs]))
    jobs = [products.Job(x, width=width) for x, (_, width) in zip(rows.matrices, pairs, strict=True)]
    return products.run(rows, jobs, precision == "f64", devices[0] if devices else torch.device("cpu"), seed)


def run_power(pairs: Sequence[tuple[RowBlocks, Tensor]], precision: str) -> list[Tensor]:
    """Give a float64 ``[R, l]`` on the CPU per pair."""
    if not any(x.shape[0] for x, _ in pairs):
        return [torch.zeros(q.shape, dtype=torch.float64) for _, q in pairs]
    x, q = next((x, q) for x, q in pairs if x.device is not None)
    device, wide = x.device or q.device, precision == "f64"
    dtype = torch.float64 if wide else torch.float32
    # rows of 16-byte multiples, so that the products may load them so
    sizes = [q.shape[1] * -(-x.columns // 4) * 4 for x, q in pairs]
    memory = torch.empty(sum(sizes), dtype=dtype, device=device)
    images = [
        part.view(q.shape[1], -(-x.columns // 4) * 4)[:, : x.columns]
        for part, (x, q) in zip(torch.split(memory, sizes), pairs, strict=True)
    ]
    blocks, spans = block_table([x for x, _ in pairs])
    own = [(z.data_ptr(), z.shape[0], *z.stride(), _native.DTYPE_CODES[dtype]) for z in images]
    spans += [(len(blocks) + i, 1, z.shape[1]) for i, z in enumerate(images)]
    rows = table(np.concatenate([blocks, _native.table(own, 5)]), spans)
    xs, zs = rows.matrices[: len(pairs)], rows.matrices[len(pairs) :]
    jobs = [transposed.Job(x, q, z.T) for x, (_, q), z in zip(xs, pairs, images, strict=True)]
    transposed.run(rows, jobs, wide, device)
    return products.run(rows, [products.Job(x, z) for x, z in zip(xs, zs, strict=True)], wide, device)


def refuses(pairs: Sequence[tuple[RowBlocks, int]]) -> str | None:
    """Say why these matrices cannot be read, if they cannot."""
    return launch.refuses(x.device for x, _ in pairs)


def refuses_power(pairs: Sequence[tuple[RowBlocks, Tensor]]) -> str | None:
    """Say why these matrices cannot be read, if they cannot."""
    return launch.refuses(x.device or q.device for x, q in pairs)
