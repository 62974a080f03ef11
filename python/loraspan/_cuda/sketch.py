"""``sketch`` and ``power`` on CUDA: products with signs that are drawn in registers, and two products in a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from loraspan._cuda import dots, library, rows
from loraspan._cuda.combine import columns_of, form, gather
from loraspan.ops.blocks import RowBlocks


def run(pairs: Sequence[tuple[RowBlocks, int]], seed: int, precision: str) -> list[Tensor]:
    """Give ``X Omega`` of each, float64 on the CPU."""
    factors = gather([x for x, _ in pairs])
    wanted = [
        dots.Product(side, dots.Side(0, width, 0), x.columns, dots.path(precision, rows.kind(x.table)))
        for (x, width), side in zip(pairs, factors.sides, strict=True)
    ]
    return dots.launch("sketch", dots.as_table(wanted), factors.table, factors.device, seed)


def run_power(pairs: Sequence[tuple[RowBlocks, Tensor]], precision: str) -> list[Tensor]:
    """Give ``X (X^T Q)`` of each, float64 on the CPU; ``X^T Q`` stays on the device, in the dtype of the sums."""
    if not any(x.shape[0] for x, _ in pairs):
        return [torch.zeros(q.shape, dtype=torch.float64) for _, q in pairs]
    factors, weights = gather([x for x, _ in pairs]), [q for _, q in pairs]
    wide = torch.float32 if precision == "f32" else torch.float64
    # column after column, so that the second product reads along them
    middle = [torch.empty(q.shape[1], x.columns, dtype=wide, device=factors.device).T for x, q in pairs]
    of_middle = columns_of(middle)
    table = form(factors, np.concatenate([factors.table, rows.of_blocks(of_middle)]), weights, middle, precision)
    wanted, first = [], len(factors.table)
    for i, (x, side) in enumerate(zip(factors.matrices, factors.sides, strict=True)):
        right = dots.Side(first, weights[i].shape[1], rows.reading(of_middle[i : i + 1], x.columns))
        wanted.append(dots.Product(side, right, x.columns, dots.path(precision, rows.F32)))
        first += weights[i].shape[1]
    return dots.launch("gram", dots.as_table(wanted), table, factors.device)


def refuses(pairs: Sequence[tuple[RowBlocks, int]]) -> str | None:
    """Say why these matrices cannot be read, if so."""
    return library.refuses(rows.devices([x for x, _ in pairs]))


def refuses_power(pairs: Sequence[tuple[RowBlocks, Tensor]]) -> str | None:
    """Say why these matrices cannot be read, if so."""
    return library.refuses(rows.devices([x for x, _ in pairs]))
