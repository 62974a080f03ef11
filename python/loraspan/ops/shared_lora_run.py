"""`shared_lora` below gradients and graphs: its checks, its plain version and its tables of backends."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from loraspan import _device, _native
from loraspan._dispatch import Backend, choose
from loraspan.errors import ArgumentError, ShapeError
from loraspan.ops.cores import Cores
from loraspan.ops.packed import Packed, refuses_packed, shape_of, unpacked
from loraspan.ops.shared_lora_cpu import is_negative, remember, run, run_again
from loraspan.ops.shared_lora_reference import reference as _everywhere

_CODES = _native.DTYPE_CODES


def add(
    y: Tensor,
    x: Tensor,
    v: Tensor | Packed,
    u: Tensor | Packed,
    cores: Cores,
    tasks: Tensor,
    shares: Tensor | None,
    scale: float,
    backend: str | None,
) -> None:
    """Check and run: what the form in place is where nobody asks for a gradient or a graph."""
    if backend is None and run_again(y, x, v, u, cores, tasks, shares, scale):
        return
    tables = (cores.index, cores.weights, cores.left, cores.left_private, cores.right, cores.right_private)
    if again_on_cuda(y, x, v, u, tables, cores.most, tasks, shares, scale, backend):
        return
    check(y, x, v, u, cores, tasks, shares)
    if 0 in y.stride() and y.numel() > 1 and not y.is_contiguous():
        raise ShapeError(f"shared_lora: rows of y share memory, strides {y.stride()}: use .contiguous() or shared_lora")
    remember(v, u, cores)
    args = (y, x, v, u, cores, *two_axes(tasks, shares), scale)
    choose("shared_lora", BACKENDS, backend, *args).run(*args)


def again_on_cuda(
    y: Tensor,
    x: Tensor,
    v: Tensor | Packed,
    u: Tensor | Packed,
    tables: Sequence[Tensor],
    most: Sequence[int],
    tasks: Tensor,
    shares: Tensor | None,
    scale: float,
    backend: str | None,
) -> bool:
    """Run with what was checked before, if the kernels of CUDA did so for the like; or give False, with nothing done.

    ``tables`` are those of the cores, the index first.
    """
    if not (y.is_cuda if backend is None else backend == "cuda") or isinstance(v, Packed) or isinstance(u, Packed):
        return False
    return _again()(y, x, v, u, tables, most, tasks, shares, scale)


@cache
def _again() -> Callable[..., bool]:
    # imported when it is asked for, as all that runs on a GPU
    found: Callable[..., bool] = importlib.import_module("loraspan._cuda.shared_lora").run_again
    return found


def two_axes(tasks: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Give both as ``[T, m]``, with one task to a row where they are ``[T]``."""
    if tasks.ndim == 2:
        return tasks, shares
    return tasks[:, None], None if shares is None else shares[:, None]


def check(
    y: Tensor,
    x: Tensor,
    v: Tensor | Packed,
    u: Tensor | Packed,
    cores: Cores,
    tasks: Tensor,
    shares: Tensor | None,
) -> None:
    """Refuse what does not fit, with a `ShapeError`."""
    flat = all(isinstance(basis, Packed) or basis.ndim == 2 for basis in (v, u))
    d, n = (shape_of(v)[0], shape_of(u)[0]) if flat else (-1, -1)
    rows = tasks.shape[0] if tasks.ndim else -1
    fits = flat and 1 <= tasks.ndim <= 2 and x.shape == (rows, d) and y.shape == (rows, n)
    if not fits or (shares is not None and shares.shape != tasks.shape):
        raise ShapeError(
            f"shared_lora: y [T, n], x [T, d], v [d, k_in], u [n, k_out], tasks [T] or [T, m] and shares like tasks "
            f"have to fit; got {list(y.shape)}, {list(x.shape)}, {_shape(v)}, {_shape(u)}, "
            f"{list(tasks.shape)} and {None if shares is None else list(shares.shape)}"
        )
    _check_ends(v, u, cores)
    for name, tensor in (("y", y), ("x", x), ("v", v), ("u", u)):
        dtype = torch.float32 if isinstance(tensor, Packed) else tensor.dtype
        if dtype not in _CODES or tensor.device != y.device:
            raise ShapeError(
                f"shared_lora: tensors are float16, bfloat16, float32 or float64 and on one device; "
                f"{name} is {dtype} on {tensor.device}, y {y.dtype} on {y.device}"
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


def _shape(basis: Tensor | Packed) -> list[int]:
    return list(shape_of(basis) if isinstance(basis, Packed) else basis.shape)


def _check_ends(v: Tensor | Packed, u: Tensor | Packed, cores: Cores) -> None:
    names = ("left", "left_private", "right", "right_private")
    (d, k_in), (n, k_out) = shape_of(v), shape_of(u)
    for name, table, width in zip(names, cores.ends, (k_out, n, k_in, d), strict=True):
        # a table without rows may have any width
        if table.shape[1] != width and table.shape[0]:
            raise ShapeError(
                f"shared_lora: cores.{name} has {table.shape[1]} columns and needs {width}, for v {_shape(v)} and "
                f"u {_shape(u)}"
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
    y, x, v, u, cores, tasks, shares, scale = call
    if y.device.type == "cpu":
        wrong = ((tasks < -1) | (tasks >= cores.tasks)).any(dim=1).nonzero()
        if len(wrong):
            _refuse_task(cores, tasks, int(wrong[0]))
    _everywhere(y, x, unpacked(v), unpacked(u), _unpacked_ends(cores), tasks, shares, scale, transposed=transposed)


def _unpacked_ends(cores: Cores) -> Cores:
    """Give the columns with all ends in full."""
    if not cores.is_packed:
        return cores
    full = [unpacked(t).T if isinstance(t, Packed) else t for t in cores.ends]
    wide = torch.promote_types(cores.weights.dtype, torch.float32)
    left, left_private, right, right_private = (t.to(wide) for t in full)
    return Cores(cores.index, cores.weights, left, left_private, right, right_private, cores.most)


def _refuses(y: Tensor, x: Tensor, v: Tensor | Packed, u: Tensor | Packed, *_: object) -> str | None:
    if y.device.type != "cpu":
        return f"it writes CPU memory, and y is on {y.device}"
    if y.is_neg() or x.is_neg() or is_negative(v) or is_negative(u):
        return "it reads memory, which does not say the values of a negative view: use .resolve_neg()"
    return None


def _refuses_packed(otherwise: Callable[..., str | None], *call: Any) -> str | None:
    _, _, v, u, cores, *_ = call
    return refuses_packed(v, u, *cores.packed) or otherwise(*call)


BACKENDS: tuple[Backend[Any], ...] = (
    *_native.backends(_cpu, _refuses),
    *[Backend(b.name, b.run, partial(_refuses_packed, b.refuses)) for b in _device.backends("shared_lora")],
    Backend("reference", reference, lambda *_: None),
)
# the same with dW^T for dW: what takes the gradient of y to that of x
TRANSPOSED: tuple[Backend[Any], ...] = (
    *_native.backends(partial(_cpu, transposed=True), _refuses),
    Backend("reference", partial(reference, transposed=True), lambda *_: None),
)
