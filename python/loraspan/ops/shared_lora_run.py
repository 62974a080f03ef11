"""`shared_lora` below gradients and graphs: its checks, its plain version and its tables of backends."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraspan import _device, _native
from loraspan._dispatch import Backend, choose
from loraspan.errors import ArgumentError, ShapeError
from loraspan.ops.cores import Cores
from loraspan.ops.shared_lora_cpu import remember, run, run_again
from loraspan.ops.shared_lora_reference import reference as _everywhere

_CODES = _native.DTYPE_CODES


def add(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    u: Tensor,
    cores: Cores,
    tasks: Tensor,
    shares: Tensor | None,
    scale: float,
    backend: str | None,
) -> None:
    """Check and run: what the form in place is where nobody asks for a gradient or a graph."""
    if backend is None and run_again(y, x, v, u, cores, tasks, shares, scale):
        return
    check(y, x, v, u, cores, tasks, shares)
    if 0 in y.stride() and y.numel() > 1 and not y.is_contiguous():
        raise ShapeError(f"shared_lora: rows of y share memory, strides {y.stride()}: use .contiguous() or shared_lora")
    remember(v, u, cores)
    args = (y, x, v, u, cores, *two_axes(tasks, shares), scale)
    choose("shared_lora", BACKENDS, backend, *args).run(*args)


def two_axes(tasks: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Give both as ``[T, m]``, with one task to a row where they are ``[T]``."""
    if tasks.ndim == 2:
        return tasks, shares
    return tasks[:, None], None if shares is None else shares[:, None]


def check(y: Tensor, x: Tensor, v: Tensor, u: Tensor, cores: Cores, tasks: Tensor, shares: Tensor | None) -> None:
    """Refuse what does not fit, with a `ShapeError`."""
    d, n = v.shape[0], u.shape[0]
    rows = tasks.shape[0] if tasks.ndim else -1
    fits = v.ndim == u.ndim == 2 and 1 <= tasks.ndim <= 2 and x.shape == (rows, d) and y.shape == (rows, n)
    if not fits or (shares is not None and shares.shape != tasks.shape):
        raise ShapeError(
            f"shared_lora: y [T, n], x [T, d], v [d, k_in], u [n, k_out], tasks [T] or [T, m] and shares like tasks "
            f"have to fit; got {list(y.shape)}, {list(x.shape)}, {list(v.shape)}, {list(u.shape)}, "
            f"{list(tasks.shape)} and {None if shares is None else list(shares.shape)}"
        )
    _check_ends(v, u, cores)
    for name, tensor in (("y", y), ("x", x), ("v", v), ("u", u)):
        if tensor.dtype not in _CODES or tensor.device != y.device:
            raise ShapeError(
                f"shared_lora: tensors are float16, bfloat16, float32 or float64 and on one device; "
                f"{name} is {tensor.dtype} on {tensor.device}, y {y.dtype} on {y.device}"
            )
    if tasks.dtype != torch.int64 or (shares is not None and shares.dtype != torch.float32):
        raise ShapeError(
            f"shared_lora: tasks are int64 and shares float32; got {tasks.dtype} and "
            f"{None if shares is None else shares.dtype}"
        )
    if tasks.device != y.device or cores.index.device != y.device or (shares is not None and shares.device != y.device):
        raise ShapeError(
            f"shared_lora: tasks, shares and cores are on the device of y, {y.device}; tasks are on {tasks.device}, "
            f"cores on {cores.index.device}: use .to({str(y.device)!r})"
        )


def _check_ends(v: Tensor, u: Tensor, cores: Cores) -> None:
    pairs = (
        ("left", cores.left, u.shape[1]),
        ("right", cores.right, v.shape[1]),
        ("left_private", cores.left_private, u.shape[0]),
        ("right_private", cores.right_private, v.shape[0]),
    )
    for name, table, width in pairs:
        # a table without rows may have any width
        if table.shape[1] != width and table.shape[0]:
            raise ShapeError(
                f"shared_lora: cores.{name} has {table.shape[1]} columns and needs {width}, for v {list(v.shape)} and "
                f"u {list(u.shape)}"
            )


def _cpu(*call: Any, isa: str, transposed: bool = False) -> None:
    if (wrong := run(*call, isa=isa, transposed=transposed)) >= 0:
        _refuse_task(call[4], call[5], wrong)


def _refuse_task(cores: Cores, tasks: Tensor, row: int) -> None:
    raise ArgumentError(
        f"shared_lora: tasks are -1 for none or rows of cores, below {cores.tasks}, whose columns lie in its tables; "
        f"row {row} has {tasks[row].tolist()}"
    )


def reference(*call: Any, transposed: bool = False) -> None:
    """Say it in torch, on whatever device the tensors are (MPS among them)."""
    y, _, _, _, cores, tasks, _, _ = call
    if y.device.type == "cpu":
        wrong = ((tasks < -1) | (tasks >= cores.tasks)).any(dim=1).nonzero()
        if len(wrong):
            _refuse_task(cores, tasks, int(wrong[0]))
    _everywhere(*call, transposed=transposed)


def _refuses(y: Tensor, x: Tensor, v: Tensor, u: Tensor, *_: object) -> str | None:
    if y.device.type != "cpu":
        return f"it writes CPU memory, and y is on {y.device}"
    if y.is_neg() or x.is_neg() or v.is_neg() or u.is_neg():
        return "it reads memory, which does not say the values of a negative view: use .resolve_neg()"
    return None


BACKENDS: tuple[Backend[Any], ...] = (
    *_native.backends(_cpu, _refuses),
    *_device.backends("shared_lora"),
    Backend("reference", reference, lambda *_: None),
)
# the same with dW^T for dW: what takes the gradient of y to that of x
TRANSPOSED: tuple[Backend[Any], ...] = (
    *_native.backends(partial(_cpu, transposed=True), _refuses),
    Backend("reference", partial(reference, transposed=True), lambda *_: None),
)
