"""Columns of matrices as they are sent to a device: cut to a size, and packed into one piece of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.ops.blocks import SUM_COLUMNS, RowBlocks

# Where blocks begin in a packed chunk, so that kernels may load 16 bytes at a time.
_ALIGNED = 256


class Span(NamedTuple):
    """Columns ``[start, stop)`` of matrix ``member`` of a call."""

    member: int
    start: int
    stop: int


class Chunk(NamedTuple):
    """Columns from ``start`` on of matrix ``member`` of a call, on the device that computes with them."""

    member: int
    start: int
    x: RowBlocks


def groups(matrices: Sequence[tuple[int, RowBlocks]], limit: int) -> Iterator[list[Span]]:
    """Cut matrices into spans of columns of at most ``limit`` bytes, and put small ones together up to that.

    Example:
        >>> tall, small = RowBlocks([torch.zeros(4, 600)]), RowBlocks([torch.zeros(1, 2)])
        >>> for group in groups([(0, tall), (1, small)], limit=4096):
        ...     print(*map(tuple, group))
        (0, 0, 256)
        (0, 256, 512)
        (0, 512, 600) (1, 0, 2)
    """
    group: list[Span] = []
    held = 0
    for index, x in matrices:
        column = max(1, sum(b.shape[0] * b.element_size() for b in x.blocks))
        width = max(1, limit // column)
        width = max(1, width // SUM_COLUMNS) * SUM_COLUMNS if width >= SUM_COLUMNS else width
        for start in range(0, max(1, x.columns), width):
            stop = min(x.columns, start + width)
            if group and held + (stop - start) * column > limit:
                yield group
                group, held = [], 0
            group.append(Span(index, start, stop))
            held += (stop - start) * column
    if group:
        yield group


class Packing:
    """How a group lies in memory on its way: a region for each dtype, block after block, rows or columns as they lay.

    Attributes:
        size: bytes.
        regions: where the entries of each dtype are, in bytes.
    """

    def __init__(self, spans: Sequence[tuple[Span, RowBlocks]], device: torch.device) -> None:
        self.spans = spans
        self._fits = device.type != "mps"
        counts: dict[torch.dtype, int] = {}
        self._starts: list[list[int]] = []
        for span, x in spans:
            starts = []
            for block in x.blocks:
                dtype = self._dtype(block)
                starts.append(counts.get(dtype, 0))
                room = _ALIGNED // dtype.itemsize
                count = block.shape[0] * (span.stop - span.start)
                counts[dtype] = starts[-1] + -(-count // room) * room
            self._starts.append(starts)
        self.size, self.regions = 0, {}
        for dtype, count in counts.items():
            self.regions[dtype] = slice(self.size, self.size + count * dtype.itemsize)
            self.size += count * dtype.itemsize

    def _dtype(self, block: Tensor) -> torch.dtype:
        # the operators round float64 to float32 first where they do not sum in float64
        return block.dtype if self._fits or block.dtype != torch.float64 else torch.float32

    def pack(self, memory: Tensor) -> Tensor:
        """Copy the entries into ``memory``, uint8 on the CPU, of at least ``size`` bytes."""
        typed = {dtype: memory[at].view(dtype) for dtype, at in self.regions.items()}
        for (span, x), views in zip(self.spans, self._views(typed), strict=True):
            for block, view in zip(x.blocks, views, strict=True):
                view.copy_(block.detach()[:, span.start : span.stop])
        return memory

    def unpack(self, regions: Mapping[torch.dtype, Tensor]) -> list[Chunk]:
        """Give the chunks of the group, as views of its regions on the device."""
        chunks = []
        for (span, _), views in zip(self.spans, self._views(regions), strict=True):
            x = RowBlocks(views, span.stop - span.start)
            x.first = span.start
            chunks.append(Chunk(span.member, span.start, x))
        return chunks

    def _views(self, regions: Mapping[torch.dtype, Tensor]) -> Iterator[list[Tensor]]:
        for (span, x), starts in zip(self.spans, self._starts, strict=True):
            views = []
            for block, start in zip(x.blocks, starts, strict=True):
                rows, width = block.shape[0], span.stop - span.start
                flat = regions[self._dtype(block)][start : start + rows * width]
                by_columns = block.stride(0) < block.stride(1)
                views.append(flat.view(width, rows).T if by_columns else flat.view(rows, width))
            yield views
