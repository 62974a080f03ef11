"""A matrix given as a list of row blocks, wherever its bytes lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan import _native
from loraspan.errors import ShapeError


class RowBlocks:
    """``X [R, d]`` as blocks ``[r_i, d]`` under each other: checked once, never stacked, copied or upcast.

    Args:
        blocks: tensors ``[r_i, d]`` of one device, each float16, bfloat16, float32 or float64, with any strides.
            ``r_i`` may be 0. A factor stored as ``[d, r_i]`` enters as its ``.T``.
        columns: ``d``; needed only where ``blocks`` is empty.

    Raises:
        ShapeError: if a block is not a dense matrix, or columns, devices or dtypes do not fit.

    Example:
        >>> import torch
        >>> x = RowBlocks([torch.ones(2, 5), torch.ones(5, 3, dtype=torch.float16).T])
        >>> x.shape
        (5, 5)
    """

    def __init__(self, blocks: Sequence[Tensor], columns: int | None = None) -> None:
        if not blocks and columns is None:
            raise ShapeError("RowBlocks: an empty list of blocks needs columns=, the number of columns")
        self.blocks = tuple(blocks)
        for i, block in enumerate(self.blocks):
            # what reads memory must not be handed a tensor whose memory does not say its values
            if not isinstance(block, Tensor) or block.layout != torch.strided or block.is_neg():
                kind = type(block).__name__ if not isinstance(block, Tensor) else f"a {block.layout} tensor"
                raise ShapeError(
                    f"RowBlocks: blocks are dense torch tensors; block {i} is {kind}: "
                    f"use torch.as_tensor, .to_dense() or .resolve_neg()"
                )
        self.columns = int(blocks[0].shape[-1]) if columns is None and blocks[0].ndim else int(columns or 0)
        for i, block in enumerate(self.blocks):
            self._check(i, block)
        self.rows = [block.shape[0] for block in self.blocks]
        self.shape = (sum(self.rows), self.columns)
        self.device = self.blocks[0].device if self.blocks else None
        self._table: NDArray[np.int64] | None = None

    def _check(self, i: int, block: Tensor) -> None:
        if block.ndim != 2 or block.shape[1] != self.columns:
            raise ShapeError(f"RowBlocks: blocks are [rows, {self.columns}] matrices; block {i} is {list(block.shape)}")
        if block.dtype not in _native.DTYPE_CODES:
            raise ShapeError(f"RowBlocks: blocks are float16, bfloat16, float32 or float64; block {i} is {block.dtype}")
        if block.device != self.blocks[0].device:
            raise ShapeError(
                f"RowBlocks: blocks lie on one device; block 0 is on {self.blocks[0].device}, "
                f"block {i} on {block.device}"
            )

    @classmethod
    def of(cls, x: RowBlocks | Sequence[Tensor] | Tensor) -> RowBlocks:
        """Take what a caller may hand over: row blocks, a list of tensors, or one matrix."""
        if isinstance(x, RowBlocks):
            return x
        return cls([x]) if isinstance(x, Tensor) else cls(x)

    @property
    def table(self) -> NDArray[np.int64]:
        """The blocks as the compiled core reads them: address, rows, strides, dtype."""
        if self._table is None:
            self._table = _native.table(
                [
                    (b.data_ptr(), b.shape[0], b.stride(0), b.stride(1), _native.DTYPE_CODES[b.dtype])
                    for b in self.blocks
                ],
                5,
            )
        return self._table


def wide_columns(x: RowBlocks, piece: slice, dtype: torch.dtype) -> Tensor:
    """Give the columns ``piece`` of all rows as one matrix of ``dtype`` (references only)."""
    blocks = [b[:, piece].to(dtype) for b in x.blocks]
    return torch.cat(blocks) if blocks else torch.empty(0, len(range(x.columns)[piece]), dtype=dtype)


def refuses_device(matrices: Sequence[RowBlocks]) -> str | None:
    """Say why the compiled core cannot read these matrices, if it cannot."""
    for x in matrices:
        if x.device is not None and x.device.type != "cpu":
            return f"it reads CPU memory, and the blocks are on {x.device}"
    return None


def block_table(matrices: Sequence[RowBlocks]) -> tuple[NDArray[np.int64], list[tuple[int, int, int]]]:
    """Give the blocks of all matrices in one table, and per matrix its first block, block count and columns."""
    tables = [x.table for x in matrices]
    starts = np.cumsum([0, *(len(t) for t in tables)])
    spans = [(int(start), len(t), x.columns) for start, t, x in zip(starts, tables, matrices, strict=False)]
    return (np.concatenate(tables) if tables else _native.table([], 5)), spans
