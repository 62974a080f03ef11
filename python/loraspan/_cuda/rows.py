"""Tables of rows as the kernels read them, and how a block's threads should share them out (kernels/cuda/rows.cuh)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from loraspan.ops.blocks import RowBlocks

ALONG_COLUMNS, ALONG_ROWS, EIGHTS, EIGHTS_ACROSS = 0, 1, 2, 3
F16, BF16, F32, F64 = 0, 1, 2, 3
# bytes of an entry, by the code of its dtype
SIZES = np.asarray([2, 2, 4, 8], dtype=np.int64)


def of_blocks(blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give ``(address, column stride, dtype)`` of every row, of blocks ``(address, rows, strides, dtype)``."""
    address, heights, stride, step, dtype = blocks.T
    starts = np.cumsum(heights) - heights
    place = np.arange(heights.sum()) - np.repeat(starts, heights)
    rows = np.repeat(np.stack([address, step, dtype], axis=1), heights, axis=0)
    rows[:, 0] += place * np.repeat(stride * SIZES[dtype], heights)
    return rows


def reading(blocks: NDArray[np.int64], columns: int) -> int:
    """Say how to read blocks ``(address, rows, strides, dtype)``: by 16 bytes if every row of every one allows it."""
    blocks = blocks[blocks[:, 1] > 0]
    address, heights, stride, step, dtype = blocks.T
    between = np.where(heights > 1, stride * SIZES[dtype], 0)
    if columns % 8 == 0 and not ((address | between) % 16).any() and (step == 1).all():
        return EIGHTS
    if not ((stride == 1) & (step != 1)).all():
        return ALONG_COLUMNS
    across = np.where(columns > 1, step * SIZES[dtype], 0)
    return ALONG_ROWS if (heights % 8).any() or ((address | across) % 16).any() else EIGHTS_ACROSS


def reading_of_one(address: int, height: int, stride: int, step: int, size: int, columns: int) -> int:
    """Give :func:`reading` of one block with entries of ``size`` bytes, and make no array: served rows wait for it."""
    between = stride * size if height > 1 else 0
    if columns % 8 == 0 and step == 1 and not (address | between) % 16:
        return EIGHTS
    if stride != 1 or step == 1:
        return ALONG_COLUMNS
    across = step * size if columns > 1 else 0
    return ALONG_ROWS if height % 8 or (address | across) % 16 else EIGHTS_ACROSS


def kind(blocks: NDArray[np.int64]) -> int:
    """Give the one dtype of all rows, by its code; that of float32 where they are mixed."""
    found = set(blocks[blocks[:, 1] > 0, 4].tolist())
    return found.pop() if len(found) == 1 else F32


def devices(matrices: Sequence[RowBlocks]) -> list[torch.device]:
    """Give where the matrices lie, which have any blocks."""
    return [x.device for x in matrices if x.device is not None]


def home(matrices: Sequence[RowBlocks]) -> torch.device:
    """Give the device to work on; the CPU, on which no kernel runs, where no matrix has a block."""
    found = devices(matrices)
    return found[0] if found else torch.device("cpu")
