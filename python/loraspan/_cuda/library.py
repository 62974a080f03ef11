"""The library of CUDA kernels: where it is, whether it can run here, and calls into it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan.errors import BackendError

NAME = "libloraspan_cuda.so"
# what mma.sync of bfloat16 and 16-byte loads ask for
_CAPABILITY = (8, 0)


class Library:
    """The functions of a library of kernels; each takes integers and addresses, and gives a CUDA error or 0.

    Args:
        path: of the shared library. One that is emulated runs on the CPU and takes CPU tensors (the tests do this).
    """

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        self._functions.loraspan_cuda_error.restype = ctypes.c_char_p
        self.emulated = bool(self._functions.loraspan_cuda_emulated())
        self._ready = self.emulated
        self._operators: dict[str, Callable[..., int]] = {}

    def call(self, operator: str, *arguments: int | bytes) -> None:
        """Launch ``loraspan_cuda_<operator>``; an error of the launch is raised as a BackendError.

        Bytes are handed over by their address, and held until the call returns.
        """
        function = self._operators.get(operator) or self._found(operator, len(arguments))
        if code := function(*arguments):
            raise BackendError(f"{operator}: backend 'cuda' cannot launch its kernel: {self._words(code)}")

    def _found(self, operator: str, count: int) -> Callable[..., int]:
        """Give a function whose arguments are all told in 8 bytes, which an address is the quickest way to say."""
        function = getattr(self._functions, f"loraspan_cuda_{operator}")
        function.argtypes = (ctypes.c_void_p,) * count
        self._operators[operator] = function
        found: Callable[..., int] = function
        return found

    def refuses(self) -> str | None:
        """Say why no kernel can run on this machine, if so."""
        if self._ready:
            return None
        count = ctypes.c_int()
        if code := self._functions.loraspan_cuda_devices(ctypes.byref(count)):
            return f"CUDA finds no device: {self._words(code)}"
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} cannot use CUDA: install a CUDA build of torch"
        self._ready = True
        return None

    def _words(self, code: int) -> str:
        words: bytes = self._functions.loraspan_cuda_error(code)
        return f"{words.decode()} (error {code})"


@cache
def library() -> Library | None:
    """Open the library beside the compiled core, once; None where the build had no CUDA compiler."""
    core = find_spec("loraspan._core")
    path = Path(core.origin if core and core.origin else __file__).with_name(NAME)
    return Library(path) if path.exists() else None


def opened() -> Library:
    """Give the library to a backend that did not refuse."""
    found = library()
    assert found is not None
    return found


def refuses(devices: Sequence[torch.device]) -> str | None:
    """Say why tensors on these devices cannot be taken, if so."""
    found = library()
    if found is None:
        return "this build has no CUDA kernels, since nvcc was not found when it was made"
    if (reason := found.refuses()) is not None:
        return reason
    memory = "cpu" if found.emulated else "cuda"
    for device in devices:
        if device.type != memory:
            return f"it reads {memory.upper()} memory, and a tensor is on {device}"
        if memory == "cuda" and not _capable(device):
            return f"it needs compute capability 8.0 or more, and {torch.cuda.get_device_name(device)} has less"
    return None


@cache
def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _CAPABILITY


def stream_of(device: torch.device) -> AbstractContextManager[int]:
    """Make a device the current one and give the address of torch's current stream there."""
    if device.type == "cpu":
        return nullcontext(0)
    # nearly always it is the current one: torch's own way to ask takes several times as long as the answer
    if torch._C._cuda_getDevice() == device.index:
        return nullcontext(torch._C._cuda_getCurrentRawStream(device.index))
    return _elsewhere(device)


@contextmanager
def _elsewhere(device: torch.device) -> Iterator[int]:
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def upload(tables: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Give tables on the device, flat: by one copy, which is not waited for."""
    sizes = [table.size for table in tables]
    host = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate([table.reshape(-1) for table in tables], out=host.numpy())
    return list(torch.split(host.to(device, non_blocking=True), sizes))
