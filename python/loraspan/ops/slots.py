"""Fill one place on a device while another is in use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

from loraspan.ops.packing import Chunk, Packing

Item = TypeVar("Item")
Sent = TypeVar("Sent", contravariant=True)


class Slots(Protocol[Sent]):
    """Two places on a device, filled in turn by one thread and used by another."""

    def send(self, slot: int, item: Sent) -> None:
        """Fill a place; called on the sending thread, once what was there is no longer used."""

    def take(self, slot: int, item: Sent) -> list[Chunk]:
        """Give what was sent."""

    def done(self, slot: int) -> None:
        """Say that all work on what was taken has been asked for."""


def ahead(items: Sequence[Item], slots: Slots[Item]) -> Iterator[list[Chunk]]:
    """Give every item from its place on the device, the next one being sent meanwhile by a thread."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming: Future[None] | None = None
        for turn in range(len(items) + 1):
            before, sent = turn - 1, coming
            if turn < len(items):
                # the place of the last but one, which is done
                coming = thread.submit(slots.send, turn % 2, items[turn])
            if sent is not None:
                sent.result()
                yield slots.take(before % 2, items[before])
                slots.done(before % 2)


class CudaSlots:
    """Two buffers of pinned memory, two on the GPU, and a stream that copies from those to these."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.there = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        # the memory may have been of tensors that work at hand still reads
        self.stream.wait_stream(torch.cuda.current_stream(device))
        for memory in self.there:
            memory.record_stream(self.stream)
        self.copied: list[torch.cuda.Event | None] = [None, None]
        self.used: list[torch.cuda.Event | None] = [None, None]

    def send(self, slot: int, item: Packing) -> None:
        """Pack and copy; the copy waits for the work on what the buffer held, this thread for the copy from it."""
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
