"""Add to each row of a batch what its own task makes of it, by way of bases that all tasks share."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from loraspan.errors import ArgumentError
from loraspan.ops.cores import PLAIN, Cores
from loraspan.ops.library import transformed
from loraspan.ops.packed import Packed
from loraspan.ops.shared_lora_graph import differentiable as in_columns
from loraspan.ops.shared_lora_rows import differentiable as in_rows
from loraspan.ops.shared_lora_run import BACKENDS, add, check

__all__ = ["BACKENDS", "shared_lora", "shared_lora_"]


def shared_lora(
    y: Tensor,
    x: Tensor,
    v: Tensor | Packed,
    u: Tensor | Packed,
    cores: Cores,
    tasks: Tensor,
    *,
    shares: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""Give ``y[t] + scale * sum_m shares[t, m] dW(tasks[t, m]) x[t]`` for rows with different tasks.

    No ``dW = u C v^T`` is ever formed: ``z = x v`` and ``g u^T`` are products of the whole batch, and between them each
    row meets the few columns of its own task. Differentiable in ``y``, ``x``, ``shares`` and the columns of ``cores``
    (weights and all four tables of ends), not in the bases, which are frozen.

    Bases and tables of ends may be packed, with the bits that unpacking them to float32 first would give: the compiled
    kernels unpack a tile at a time, ``"reference"`` all of it. Then it is differentiable in ``y`` and ``x`` alone, and
    compiled graphs break at it.

    Args:
        y: ``[T, n]``, what the base layer gave; float16, bfloat16, float32 or float64.
        x: ``[T, d]``, what went into it; its dtype may differ.
        v: ``[d, k_in]``, the input basis; or a :class:`loraspan.ops.Packed` ``[k_in, d]`` of its vectors.
        u: ``[n, k_out]``, the output basis; or a :class:`loraspan.ops.Packed` ``[k_out, n]``.
        cores: the columns of all tasks.
        tasks: ``[T]`` or ``[T, m]`` int64, rows of ``cores``; -1 for none.
        shares: ``[T, m]`` (or ``[T]``) float32, the weight of each task in its row; None for ones.
        scale: a factor without unit, of all of it.
        backend: ``"cpu"`` (or one instruction set, such as ``"cpu:avx2"``), ``"triton"``, ``"cuda"`` or
            ``"reference"``.

    Returns:
        ``[T, n]`` of the dtype of ``y``. A row whose tasks are all -1 is that of ``y`` bit for bit. Sums are kept in
        float32, or in float64 where a tensor is float64, and each entry is rounded once, with ``y`` in the sum. To
        first order it is within ``(d + k_in + k_out + P + 8) u`` times ``|y| + |scale| |dW|' |x|`` of the exact one,
        ``u`` the unit roundoff of the sum, ``P`` the columns of the row's tasks and ``|dW|'`` made of the absolute
        values of all factors. The compiled kernels give a row the same bits for any number of threads and whatever the
        other rows' tasks are; a task with so many rows that rebuilding its own factors saves work is rounded otherwise
        than one with few.

    Raises:
        ShapeError: if sizes, dtypes or devices do not fit.
        ArgumentError: if a task is out of range or its columns do not lie in the tables (on the CPU; on a GPU, where
            asking would mean waiting, its row gets NaN); if a basis requires a gradient, or columns or shares do where
            something is packed; or if that is to be part of a whole compiled graph.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> none = torch.empty(0, 2)
        >>> two = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> cores = Cores.of([[1, 0, 0, 0]] * 2, torch.tensor([2.0, 3.0]), two, none, two, none)
        >>> y, x, basis = torch.zeros(3, 2), torch.ones(3, 2), torch.eye(2)
        >>> shared_lora(y, x, basis, basis, cores, torch.tensor([0, 1, -1]))
        tensor([[2., 0.],
                [0., 3.],
                [0., 0.]])

    Source:
        Serving from a shared basis: Gabrielsson et al., *Compress then Serve*, 2024, section 4. The bound: Higham,
        *Accuracy and Stability of Numerical Algorithms*, 2nd ed., section 3.5.
    """
    found: Tensor
    if is_compiling():
        _refuse_packed(v, u, cores)
        check(y, x, v, u, cores, tasks, shares)
        call = (x, v, u, *cores.fields(), tasks, shares, scale, backend)
        if not _has_gradient(y, x, v, u, cores, shares):
            # what a compiler may do in place where nobody needs y any more, and no questions of gradients when it runs
            out = y.clone()
            torch.ops.loraspan.shared_lora_(out, *call)
            return out
        found = torch.ops.loraspan.shared_lora(y, *call)
        return found
    if torch.is_grad_enabled():
        if (isinstance(v, Tensor) and v.requires_grad) or (isinstance(u, Tensor) and u.requires_grad):
            _refuse_training_of_bases()
        # by their names: a loop or a function of its own takes twice the time, at every call
        weights, left, left_private, right, right_private = cores.tables
        trains: tuple[bool, ...] = (
            weights.requires_grad,
            left.requires_grad,
            left_private.requires_grad,
            right.requires_grad,
            right_private.requires_grad,
        )
        if True in trains or (shares is not None and shares.requires_grad):
            if cores.packed != PLAIN or isinstance(v, Packed) or isinstance(u, Packed):
                _refuse_packed_training(cores, shares)
            trained = list(compress(cores.tables, trains))
            if shares is not None and shares.requires_grad:
                trained.append(shares)
                trains = (*trains, True)
            columns = in_columns.apply if transformed() else in_columns.direct
            found = columns(y, x, (v, u, cores, tasks, shares, scale, backend, trains), *trained)
            return found
        if y.requires_grad or x.requires_grad:
            rows = in_rows.apply if transformed() else in_rows.direct
            found = rows(y, x, (v, u, cores, tasks, shares, scale, backend))
            return found
    out = y.clone()
    add(out, x, v, u, cores, tasks, shares, scale, backend)
    return out


def shared_lora_(
    y: Tensor,
    x: Tensor,
    v: Tensor | Packed,
    u: Tensor | Packed,
    cores: Cores,
    tasks: Tensor,
    *,
    shares: Tensor | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Do :func:`shared_lora` in place: nothing is copied, and rows without a task are not touched.

    Args:
        y: as for :func:`shared_lora`; added to.
        x: as for :func:`shared_lora`; must not overlap ``y``.
        v: as for :func:`shared_lora`.
        u: as for :func:`shared_lora`.
        cores: as for :func:`shared_lora`.
        tasks: as for :func:`shared_lora`.
        shares: as for :func:`shared_lora`.
        scale: as for :func:`shared_lora`.
        backend: as for :func:`shared_lora`.

    Returns:
        ``y``.

    Raises:
        ShapeError: if sizes, dtypes or devices do not fit; ``y`` is as it was then.
        ArgumentError: as for :func:`shared_lora`, or if a gradient is asked for: that takes the other form.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> none, one = torch.empty(0, 1), torch.ones(1, 1)
        >>> y = torch.zeros(2, 1)
        >>> shared_lora_(y, y + 5, one, one, Cores.of([[1, 0, 0, 0]], torch.ones(1), one, none, one, none),
        ...              torch.tensor([-1, 0]))
        tensor([[0.],
                [5.]])
    """
    if is_compiling():
        _refuse_packed(v, u, cores)
        check(y, x, v, u, cores, tasks, shares)
        torch.ops.loraspan.shared_lora_(y, x, v, u, *cores.fields(), tasks, shares, scale, backend)
        return y
    if torch.is_grad_enabled():
        if y.requires_grad or x.requires_grad or _trains(v, u, cores, shares):
            raise ArgumentError("shared_lora_: the form in place has no gradient; use shared_lora, or torch.no_grad()")
        # whoever kept y for a gradient of theirs is to be told that it is another now
        torch.autograd.graph.increment_version(y)
    add(y, x, v, u, cores, tasks, shares, scale, backend)
    return y


def _refuse_packed(v: Tensor | Packed, u: Tensor | Packed, cores: Cores) -> None:
    if isinstance(v, Packed) or isinstance(u, Packed) or cores.is_packed:
        raise ArgumentError(
            "shared_lora: packed bases and ends are not for compiled graphs: leave the call out of the graph "
            "(torch.compiler.disable), or unpack them"
        )


def _has_gradient(y: Tensor, x: Tensor, v: Any, u: Any, cores: Cores, shares: Tensor | None) -> bool:
    given = (y, x, v, u, *cores.tables) if shares is None else (y, x, v, u, *cores.tables, shares)
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)


def _trains(v: Tensor | Packed, u: Tensor | Packed, cores: Cores, shares: Tensor | None) -> bool:
    if (isinstance(v, Tensor) and v.requires_grad) or (isinstance(u, Tensor) and u.requires_grad):
        _refuse_training_of_bases()
    return (
        cores.weights.requires_grad
        or cores.left.requires_grad
        or cores.left_private.requires_grad
        or cores.right.requires_grad
        or cores.right_private.requires_grad
        or (shares is not None and shares.requires_grad)
    )


def _refuse_training_of_bases() -> None:
    raise ArgumentError("shared_lora: the bases v and u are frozen: use .detach(); train the columns of cores")


def _refuse_packed_training(cores: Cores, shares: Tensor | None) -> None:
    names = ("weights", "left", "left_private", "right", "right_private")
    wanted = [f"cores.{name}" for name in names if getattr(cores, name).requires_grad]
    if shares is not None and shares.requires_grad:
        wanted.append("shares")
    raise ArgumentError(
        f"shared_lora: with packed bases or ends there are gradients of y and x alone; {', '.join(wanted)} "
        f"requires one: use .detach(), or unpack"
    )
