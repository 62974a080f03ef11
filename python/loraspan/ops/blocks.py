"""A matrix given as a list of row blocks, wherever its bytes lie."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan import _native
from loraspan.errors import ShapeError

CPU = torch.device("cpu")
# Columns per float32 sum of the references before it is added in float64; the kernels flush at least as often.
SUM_COLUMNS = 128
# What a reference holds in its own precision at a time.
_PANEL_BYTES = 64 << 20


class RowBlocks:
    """``X [R, d]`` as blocks ``[r_i, d]`` under each other: checked once, never stacked, copied or upcast.

    Args:
        blocks: tensors ``[r_i, d]`` of one device, each float16, bfloat16, float32 or float64, with any strides.
            ``r_i`` may be 0. A factor stored as ``[d, r_i]`` enters as its ``.T``.
        columns: ``d``; needed only where ``blocks`` is empty.

    Attributes:
        dtypes: of the blocks.
        device: where the blocks lie; None where there are none.
        target: the device that computes with them, if that is another one; see :meth:`on`.
        held: the same on that device, while it is kept there; see :func:`loraspan.ops.stream.held`.
        first: which column of a larger matrix column 0 is; :func:`loraspan.ops.sketch` draws its rows from there on.
        plain: whether they can be computed with where they lie, whatever the precision.

    Raises:
        ShapeError: if a block is not a dense matrix, or columns, devices or dtypes do not fit.

    Example:
        >>> import torch
        >>> x = RowBlocks([torch.ones(2, 5), torch.ones(5, 3, dtype=torch.float16).T])
        >>> x.shape
        (5, 5)
    """

    target: torch.device | None = None
    held: RowBlocks | None = None
    first = 0
    plain = True
    columns: int
    rows: list[int]
    dtypes: frozenset[torch.dtype]
    device: torch.device | None
    _table: NDArray[np.int64] | None = None

    def __init__(self, blocks: Sequence[Tensor], columns: int | None = None) -> None:
        if not blocks and columns is None:
            raise ShapeError("RowBlocks: an empty list of blocks needs columns=, the number of columns")
        self.blocks = tuple(blocks)
        if not self._read(columns):
            self._ask(columns)
        self.shape = (sum(self.rows), self.columns)

    def _read(self, columns: int | None) -> bool:
        """Take what the core reads of plain matrices on the CPU; False if some block may be something else."""
        if not self.blocks or _native.READER is None:
            return False
        first = self.blocks[0]
        if columns is None:
            columns = first.shape[-1] if isinstance(first, Tensor) and first.ndim else 0
        columns = int(columns)
        read = _native.READER.blocks(self.blocks, columns)
        if read is None:
            return False
        self._table, self.rows, bits = read
        self.columns, self.dtypes, self.device = columns, _native.DTYPES[bits], CPU
        return True

    def _ask(self, columns: int | None) -> None:
        """Check block by block, and say what does not fit."""
        for i, block in enumerate(self.blocks):
            # what reads memory must not be handed a tensor whose memory does not say its values
            if not isinstance(block, Tensor) or block.layout != torch.strided or block.is_neg():
                kind = type(block).__name__ if not isinstance(block, Tensor) else f"a {block.layout} tensor"
                raise ShapeError(
                    f"RowBlocks: blocks are dense torch tensors; block {i} is {kind}: "
                    f"use torch.as_tensor, .to_dense() or .resolve_neg()"
                )
        first = self.blocks[0] if columns is None else None
        self.columns = int(first.shape[-1]) if first is not None and first.ndim else int(columns or 0)
        device = self.blocks[0].device if self.blocks else None
        self.rows = [self._check(i, block, device) for i, block in enumerate(self.blocks)]
        self.dtypes = frozenset(block.dtype for block in self.blocks)
        self.device = device
        # torch.device.type takes a microsecond
        if self.blocks and self.blocks[0].is_mps:
            self.plain = False

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(block.numel() * block.element_size() for block in self.blocks)

    def _check(self, i: int, block: Tensor, device: torch.device | None) -> int:
        shape = block.shape
        if len(shape) != 2 or shape[1] != self.columns:
            raise ShapeError(f"RowBlocks: blocks are [rows, {self.columns}] matrices; block {i} is {list(shape)}")
        if block.dtype not in _native.DTYPE_CODES:
            raise ShapeError(f"RowBlocks: blocks are float16, bfloat16, float32 or float64; block {i} is {block.dtype}")
        if block.device != device:
            raise ShapeError(
                f"RowBlocks: blocks lie on one device; block 0 is on {device}, block {i} on {block.device}"
            )
        return shape[0]

    @classmethod
    def of(cls, x: RowBlocks | Sequence[Tensor] | Tensor) -> RowBlocks:
        """Take what a caller may hand over: row blocks, a list of tensors, or one matrix."""
        if isinstance(x, RowBlocks):
            return x
        return cls([x]) if isinstance(x, Tensor) else cls(x)

    def on(self, device: torch.device | None) -> RowBlocks:
        """Give the same blocks, for the operators to send to ``device`` in chunks of columns; None as they are.

        Results lie where the blocks do. See :mod:`loraspan.ops.stream`.
        """
        if device is None or self.device is None or device == (self.target or self.device):
            return self
        other = copy.copy(self)
        other.target, other.held = None if device == self.device else device, None
        other.plain = other.target is None and device.type != "mps"
        return other

    def home(self, dtype: torch.dtype) -> torch.device | None:
        """Say where a result of ``dtype`` that is as long as the rows lies: beside them, if float64 can."""
        on_metal = dtype == torch.float64 and not self.plain and self.blocks[0].is_mps
        return CPU if on_metal else self.device

    @property
    def table(self) -> NDArray[np.int64]:
        """The blocks as the compiled core reads them: address, rows, strides, dtype."""
        if self._table is None:
            self._table = _native.table(
                [
                    (b.data_ptr(), rows, *b.stride(), _native.DTYPE_CODES[b.dtype])
                    for b, rows in zip(self.blocks, self.rows, strict=True)
                ],
                5,
            )
        return self._table


def wide_columns(x: RowBlocks, piece: slice, dtype: torch.dtype) -> Tensor:
    """Give the columns ``piece`` of all rows as one matrix of ``dtype`` (references only)."""
    blocks = [b[:, piece].to(dtype) for b in x.blocks]
    if len(blocks) == 1:
        return blocks[0]
    return torch.cat(blocks) if blocks else torch.empty(0, len(range(x.columns)[piece]), dtype=dtype)


def panels(x: RowBlocks, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Give all columns as matrices of ``dtype`` of at most 64 MB, with their first column; blocks under each other."""
    width = max(1, _PANEL_BYTES // max(1, x.shape[0] * dtype.itemsize * SUM_COLUMNS)) * SUM_COLUMNS
    for start in range(0, x.columns, width):
        yield start, wide_columns(x, slice(start, start + width), dtype)


def sum_chunks(x: RowBlocks, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Give all columns, ``SUM_COLUMNS`` at a time, as contiguous matrices of ``dtype`` with their first column.

    Blocks are put under each other some thousand columns at a time: on a device every call counts.
    """
    for start, panel in panels(x, dtype):
        for at in range(0, panel.shape[1], SUM_COLUMNS):
            yield start + at, panel[:, at : at + SUM_COLUMNS].contiguous()


def refuses_device(matrices: Sequence[RowBlocks]) -> str | None:
    """Say why the compiled core cannot read these matrices, if it cannot."""
    for x in matrices:
        if x.device is not None and x.device.type != "cpu":
            return f"it reads CPU memory, and the blocks are on {x.device}"
    return None


def block_table(matrices: Sequence[RowBlocks]) -> tuple[NDArray[np.int64], list[tuple[int, int, int]]]:
    """Give the blocks of all matrices in one table, and per matrix its first block, block count and columns."""
    tables = [x.table for x in matrices]
    starts = accumulate((len(t) for t in tables), initial=0)
    spans = [(start, len(t), x.columns) for start, t, x in zip(starts, tables, matrices, strict=False)]
    if len(tables) == 1:
        return tables[0], spans
    return (np.concatenate(tables) if tables else _native.table([], 5)), spans
