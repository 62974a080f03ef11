"""Which devices there are, what can be computed on them, and how a tensor gets from one to another."""

from __future__ import annotations

import torch
from torch import Tensor

from loraspan.errors import ArgumentError
from loraspan.ops.blocks import CPU

_TYPES = ("cpu", "cuda", "mps")
# Partial sums that wait on a device to be brought over together.
_WAITING_BYTES = 32 << 20


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
        return tensor.to("cpu").to(dtype)
    return tensor.to(dtype).to(device)


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
        together = torch.cat([part.flatten() for _, part in self._waiting]).cpu().to(torch.float64)
        sizes = [part.numel() for _, part in self._waiting]
        for (total, _), part in zip(self._waiting, torch.split(together, sizes), strict=True):
            total += part.view(total.shape)
        self._waiting, self._held = [], 0
