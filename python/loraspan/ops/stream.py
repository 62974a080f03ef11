"""Send matrices to the device that computes with them, in chunks of columns, the next one while one is at work.

``RowBlocks.on(device)`` asks for it. Two chunks are on the device at a time, of ``DEVICE_BYTES`` together: a matrix
whose column takes ``c`` bytes goes there ``DEVICE_BYTES / 2 / c`` columns at a time, a multiple of 128 where that is at
least 128, and small matrices travel together. What an operator returns is a sum over chunks, added in float64 on the
CPU, or comes chunk by chunk; it lies where the blocks do. On CUDA the next chunk is packed into pinned memory and
copied on a stream of its own while the device works. What several operators read in turn is sent once for all of them:
see :func:`held`.

Metal has no float64: what is asked for in it is computed on the CPU, wherever the blocks lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from loraspan.ops.blocks import CPU, RowBlocks
from loraspan.ops.packing import Chunk, Packing, Span, groups
from loraspan.ops.slots import CudaSlots, ahead

# Bytes of entries on a device at any time: of the chunk at work and of the one on its way.
DEVICE_BYTES = 256 << 20


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


@contextmanager
def held(matrices: Sequence[RowBlocks]) -> Iterator[None]:
    """Keep matrices where they are sent to, for all calls within: on CUDA, if together they take no more than a chunk.

    Others go there chunk by chunk in every call, as ever.
    """
    sent = [x for x in matrices if x.target is not None and x.target.type == "cuda" and x.held is None]
    if not sent or len({x.target for x in sent}) > 1 or sum(x.nbytes for x in sent) > DEVICE_BYTES // 2:
        yield
        return
    assert sent[0].target is not None
    cargo = Packing([(Span(i, 0, x.columns), x) for i, x in enumerate(sent)], sent[0].target)
    slots = CudaSlots(cargo.size, sent[0].target, 1)
    slots.send(0, cargo)
    try:
        for x, chunk in zip(sent, slots.take(0, cargo), strict=True):
            x.held = chunk.x
        yield
    finally:
        for x in sent:
            x.held = None


def _place(x: RowBlocks, wide: bool) -> torch.device | None:
    """Say where a matrix is computed with; None is where it lies."""
    place = x.target or x.device
    if wide and place is not None and place.type == "mps":
        place = CPU
    return None if place == x.device else place


def _sent(matrices: Sequence[tuple[int, RowBlocks]], device: torch.device) -> Iterator[list[Chunk]]:
    there = [Chunk(i, 0, x.held) for i, x in matrices if x.held is not None]
    if there:
        yield there
    matrices = [(i, x) for i, x in matrices if x.held is None]
    if not matrices:
        return
    by_member = dict(matrices)
    cargo = [
        Packing([(span, by_member[span.member]) for span in group], device)
        for group in groups(matrices, DEVICE_BYTES // 2)
    ]
    if device.type == "cuda":
        yield from ahead(cargo, CudaSlots(max(packing.size for packing in cargo), device, min(2, len(cargo))))
        return
    for packing in cargo:
        memory = packing.pack(torch.empty(packing.size, dtype=torch.uint8))
        yield packing.unpack({dtype: memory[at].view(dtype).to(device) for dtype, at in packing.regions.items()})
