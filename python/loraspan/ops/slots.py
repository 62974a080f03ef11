"""Fill one place on a device while another is in use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import torch

from loraspan.ops.packing import Chunk, Packing

Item = TypeVar("Item")
Sent = TypeVar("Sent", contravariant=True)


class Slots(Protocol[Sent]):
    """Two places on a device, filled and used in turn."""

    def send(self, slot: int, item: Sent) -> None:
        """Begin to fill a place, what was there having been used."""

    def take(self, slot: int, item: Sent) -> list[Chunk]:
        """Give what was sent."""

    def done(self, slot: int) -> None:
        """Say that all work on what was taken has been asked for."""


def ahead(items: Sequence[Item], slots: Slots[Item]) -> Iterator[list[Chunk]]:
    """Give every item from its place on the device, the next one being on its way there meanwhile.

    All is asked for by the calling thread. Another one would bring threads of its own for its copies, and two such
    teams on the cores of one make every small operation of the first wait: measured, a tenth of the speed.
    """
    for turn in range(len(items) + 1):
        if turn < len(items):
            # the place of the last but one, which is done
            slots.send(turn % 2, items[turn])
        if turn:
            yield slots.take((turn - 1) % 2, items[turn - 1])
            slots.done((turn - 1) % 2)


class CudaSlots:
    """Buffers of pinned memory, as many on the GPU, and a stream that copies from those to these; ``count`` of each."""

    def __init__(self, size: int, device: torch.device, count: int = 2) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
        self.there = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        # the memory may have been of tensors that work at hand still reads
        self.stream.wait_stream(torch.cuda.current_stream(device))
        for memory in self.there:
            memory.record_stream(self.stream)
        self.copied: list[torch.cuda.Event | None] = [None, None]
        self.used: list[torch.cuda.Event | None] = [None, None]

    def send(self, slot: int, item: Packing) -> None:
        """Pack, and copy while other work goes on; the copy waits for the work on what the buffer held."""
        copied, used = self.copied[slot], self.used[slot]
        if copied is not None:
            copied.synchronize()
        item.pack(self.pinned[slot])
        if used is not None:
            self.stream.wait_event(used)
        with torch.cuda.stream(self.stream):
            self.there[slot][: item.size].copy_(self.pinned[slot][: item.size], non_blocking=True)
        self.copied[slot] = self.stream.record_event()

    def take(self, slot: int, item: Packing) -> list[Chunk]:
        """Let the work to come wait for the copy."""
        copied = self.copied[slot]
        assert copied is not None
        torch.cuda.current_stream(self.device).wait_event(copied)
        return item.unpack({dtype: self.there[slot][at].view(dtype) for dtype, at in item.regions.items()})

    def done(self, slot: int) -> None:
        """Mark the end of the work so far, for the next copy to this buffer to wait for."""
        self.used[slot] = torch.cuda.current_stream(self.device).record_event()
