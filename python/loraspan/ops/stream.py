"""Send matrices to the device that computes with them, in chunks of columns, the next one while one is at work.

``RowBlocks.on(device)`` asks for it. Two chunks are on the device at a time, of ``DEVICE_BYTES`` together: a matrix
whose column takes ``c`` bytes goes there ``DEVICE_BYTES / 2 / c`` columns at a time, a multiple of 128 where that is at
least 128, and small matrices travel together. What an operator returns is a sum over chunks, added in float64 on the
CPU, or comes chunk by chunk; it lies where the blocks do. On CUDA a thread packs the next chunk into pinned memory and
copies it on a stream of its own while the device works.

Metal has no float64: what is asked for in it is computed on the CPU, wherever the blocks lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.ops.blocks import CPU, SUM_COLUMNS, RowBlocks
from loraspan.ops.slots import CudaSlots, ahead

# Bytes of entries on a device at any time: of the chunk at work and of the one on its way.
DEVICE_BYTES = 256 << 20
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


def in_chunks(matrices: Sequence[RowBlocks], *, wide: bool) -> Iterator[list[Chunk]]:
    """Give matrices chunk by chunk of columns where they are computed with, several small ones together.

    Args:
        matrices: any of them may have a target.
        wide: whether float64 is needed.
    """
    by_place: dict[torch.device | None, list[int]] = {}
    for i, x in enumerate(matrices):
        by_place.setdefault(_place(x, wide), []).append(i)
    for place, members in by_place.items():
        if place is None:
            yield [Chunk(i, 0, matrices[i]) for i in members]
        else:
            yield from _sent([(i, matrices[i]) for i in members], place)


def _place(x: RowBlocks, wide: bool) -> torch.device | None:
    """Say where a matrix is computed with; None is where it lies."""
    place = x.target or x.device
    if wide and place is not None and place.type == "mps":
        place = CPU
    return None if place == x.device else place


def _sent(matrices: Sequence[tuple[int, RowBlocks]], device: torch.device) -> Iterator[list[Chunk]]:
    by_member = dict(matrices)
    cargo = [
        Packing([(span, by_member[span.member]) for span in group], device)
        for group in groups(matrices, DEVICE_BYTES // 2)
    ]
    if device.type == "cuda":
        yield from ahead(cargo, CudaSlots(max(packing.size for packing in cargo), device))
        return
    for packing in cargo:
        memory = packing.pack(torch.empty(packing.size, dtype=torch.uint8))
        yield packing.unpack({dtype: memory[at].view(dtype).to(device) for dtype, at in packing.regions.items()})


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
