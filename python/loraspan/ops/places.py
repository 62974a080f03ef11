"""Which devices there are, what can be computed on them, and how a tensor gets from one to another."""

from __future__ import annotations

import torch
from torch import Tensor

from loraspan.errors import ArgumentError
from loraspan.ops.blocks import CPU

_TYPES = ("cpu", "cuda", "mps")
# Partial sums that wait on a device to be brought over together.
_WAITING_BYTES = 32 << 20
# Up to so many bytes a plain copy to the CPU is as fast as one through pinned memory, which goes so many at a time.
_PLAIN_BYTES, _STAGE_BYTES = 1 << 20, 8 << 20


def find_device(caller: str, device: str | torch.device | None) -> torch.device | None:
    """Give the device that a caller names, with its index, or refuse it.

    Args:
        caller: named in the message.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``, or None for where the data lie.

    Raises:
        ArgumentError: if it is none of these, or this machine or this torch has none.

    Example:
        >>> find_device("compress", "cpu"), find_device("compress", None)
        (device(type='cpu'), None)
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in _TYPES:
        raise ArgumentError(f"{caller}: device is None, 'cpu', 'cuda', 'cuda:N' or 'mps'; got {str(device)!r}")
    if found.type == "cpu":
        return CPU
    count, current = _count(found.type)
    index = current if found.index is None else found.index
    if index >= count:
        there = f"found {count}" if count else f"torch {torch.__version__} finds none here"
        raise ArgumentError(f"{caller}: device {str(device)!r} cannot be used: {there}; leave device out for the CPU")
    return torch.device(found.type, index)


def _count(kind: str) -> tuple[int, int]:
    """Say how many devices of a kind there are, and which is the current one."""
    if kind == "mps":
        return int(torch.backends.mps.is_available()), 0
    return (torch.cuda.device_count(), torch.cuda.current_device()) if torch.cuda.is_available() else (0, 0)


def off_metal(tensor: Tensor) -> Tensor:
    """Give ``tensor``, on the CPU if it lies on MPS: there is no float64, and sums and extremes are not trusted."""
    return tensor.cpu() if tensor.is_mps else tensor


def carried(tensor: Tensor, device: torch.device | None, dtype: torch.dtype) -> Tensor:
    """Give ``tensor`` on another device and in another dtype, in two steps, so that no float64 comes near Metal."""
    if device is None or device.type == "cpu":
        return fetched(tensor).to(dtype)
    return tensor.to(dtype).to(device)


def fetched(tensor: Tensor) -> Tensor:
    """Give ``tensor`` on the CPU, its rows or its columns in a row as they were.

    What CUDA copies to memory that is not pinned goes through a buffer of the driver's at a few GB/s, and at one where
    the memory is new. So it comes through two pinned buffers, from which all cores write it to where it stays.
    """
    size = tensor.element_size()
    if not tensor.is_cuda or tensor.numel() * size <= _PLAIN_BYTES:
        return tensor.cpu()
    if tensor.ndim == 2 and not tensor.is_contiguous() and tensor.mT.is_contiguous():
        return fetched(tensor.mT).mT
    out = torch.empty(tensor.shape, dtype=tensor.dtype)
    step = _STAGE_BYTES // size
    pieces = (torch.split(each.reshape(-1), step) for each in (tensor, out))
    parts = list(zip(*pieces, strict=True))
    stages = [torch.empty_like(part, pin_memory=True) for _, part in parts[:2]]
    stream, landed = torch.cuda.current_stream(tensor.device), []
    for i in range(len(parts) + 1):
        if i < len(parts):
            source, _ = parts[i]
            stages[i % 2][: source.numel()].copy_(source, non_blocking=True)
            landed.append(stream.record_event())
        if i:
            landed[i - 1].synchronize()
            _, target = parts[i - 1]
            target.copy_(stages[(i - 1) % 2][: target.numel()])
    return out


def backend_at(device: torch.device | None, backend: str | None) -> str | None:
    """Give the backend for what lies on ``device``: that of a GPU computes nothing on the CPU, which then chooses."""
    return None if backend in ("cuda", "triton") and (device is None or device.type == "cpu") else backend


class Partials:
    """Partial sums, added in float64 on the CPU in the order in which they come, many to a copy from the device."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._held = 0

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add ``part`` to ``total``, float64 on the CPU, now or at the next :meth:`flush`."""
        if part.is_cpu:
            total += part
            return
        self._waiting.append((total, part))
        self._held += part.numel() * part.element_size()
        if self._held >= _WAITING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Add all that waits."""
        if not self._waiting:
            return
        together = fetched(torch.cat([part.flatten() for _, part in self._waiting])).to(torch.float64)
        sizes = [part.numel() for _, part in self._waiting]
        for (total, _), part in zip(self._waiting, torch.split(together, sizes), strict=True):
            total += part.view(total.shape)
        self._waiting, self._held = [], 0
