"""What somebody has made torch's default device says where new models come to lie, and nothing about work done here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def cpu_by_default(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function with the CPU as torch's default device, whatever it is outside; for the edges that users call.

    Factors, files and small problems are the CPU's, and compiled kernels write to the addresses of tensors made for
    them: one on another device has no such address. What is to be elsewhere names its device, which then counts.

    ``torch.set_default_device`` and ``with torch.device(...)`` hold for one thread: a function that is handed to
    another one is an edge too. So is one whose result is made when it is first looked at. A generator is none: it would
    go on outside. What a graph is compiled through names its devices instead.

    Example:
        >>> @cpu_by_default
        ... def zeros():
        ...     return torch.zeros(1)
        >>> with torch.device("meta"):
        ...     torch.zeros(1).device, zeros().device
        (device(type='meta'), device(type='cpu'))
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or _is_cpu():
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run


def _is_cpu() -> bool:
    """Ask by making a tensor: not every version of ``torch.get_default_device`` knows of ``with torch.device(...)``."""
    try:
        return torch.empty(0).is_cpu
    except (RuntimeError, AssertionError):
        # a GPU that is not here, or cannot be used after a fork
        return False
