"""`shared_lora` where gradients or graphs are asked for: operators of torch, and their gradients in eager code."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from loraspan._dispatch import choose
from loraspan.ops.cores import Cores
from loraspan.ops.library import applied, register
from loraspan.ops.shared_lora_cpu import run_again, tensors_of
from loraspan.ops.shared_lora_gradients import column_gradients
from loraspan.ops.shared_lora_run import TRANSPOSED, add, again_on_cuda, two_axes

_CORES = (
    "Tensor v, Tensor u, Tensor index, Tensor weights, Tensor left, Tensor left_private, Tensor right, "
    "Tensor right_private, SymInt[] most, Tensor tasks, Tensor? shares, float scale"
)
# of the operands of shared_lora: x, and what gradients of columns and shares need x for
_X, _COLUMNS = 1, (5, 6, 7, 8, 9, 12)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch passes it by name)
    _, x, v, u, index, *tables, most, tasks, shares, scale, backend = inputs
    # x is as large as the batch: kept only for those who need it
    wanted = any(ctx.needs_input_grad[i] for i in _COLUMNS)
    ctx.rest = (x.dtype, most, scale, backend)
    ctx.save_for_backward(v, u, index, tasks, shares, x if wanted else None, *tables)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x, tables, of_shares = _gradients(ctx, grad, ctx.needs_input_grad[_X])
    return (grad, of_x, None, None, None, *tables, None, None, of_shares, None, None)


def _gradients(ctx: Any, grad: Tensor, wants_x: bool) -> tuple[Tensor | None, tuple[Tensor | None, ...], Tensor | None]:
    """Give the gradients of x, of the five tables and of the shares, as far as they are wanted."""
    v, u, index, tasks, shares, x, *tables = ctx.saved_tensors
    dtype, most, scale, backend = ctx.rest
    of_x: Tensor | None = None
    columns: tuple[Tensor | None, ...] = (None,) * len(_COLUMNS)
    args = (v, u, index, *tables, most, tasks, shares, scale)
    if wants_x:
        of_x = torch.ops.loraspan.shared_lora_transposed(grad, dtype, *args, backend)
    if x is not None:
        columns = torch.ops.loraspan.shared_lora_columns(grad, x, *args)
    return of_x, columns[:-1], None if shares is None else columns[-1]


class _Differentiable(torch.autograd.Function):
    """The operator for eager code: a gradient registered with torch.library would cost several times the call.

    Each tensor that torch is handed by itself costs microseconds: of the tables and shares there are those that train.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, call: tuple[Any, ...], *_: Tensor) -> Tensor:
        v, u, cores, tasks, shares, scale, backend, _ = call
        out = y.clone()
        held = None if backend else run_again(out, x, v, u, cores, tasks, shares, scale)
        if held is None:
            add(out, x, v, u, cores, tasks, shares, scale, backend)
            held = tensors_of(v, u, cores)
        ctx.call = call
        # these may change before torch goes back: it refuses to, then
        if shares is None:
            ctx.save_for_backward(x, tasks, *held)
        else:
            ctx.save_for_backward(x, tasks, shares, *held)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, u, cores, _, shares, scale, backend, trains = ctx.call
        x, tasks, *more = ctx.saved_tensors
        args = (v, u, *cores.fields(), tasks, None if shares is None else more[0], scale)
        of_x = None
        if ctx.needs_input_grad[_X]:
            of_x = torch.ops.loraspan.shared_lora_transposed(grad, x.dtype, *args, backend)
        found = torch.ops.loraspan.shared_lora_columns(grad, x, *args)
        return (grad, of_x, None, *compress(found, trains))


# to be applied to y, x, the other arguments and which of tables and shares train, and these
differentiable = applied(_Differentiable)


def _cores(fields: Sequence[Any]) -> Cores:
    index, weights, left, left_private, right, right_private, most = fields
    return Cores(index, weights, left, left_private, right, right_private, tuple(most))


def _add(y: Tensor, x: Tensor, v: Tensor, u: Tensor, *rest: Any) -> None:
    *fields, tasks, shares, scale, backend = rest
    # to make an object of the tables takes longer than to find that they are the ones of before
    if not again_on_cuda(y, x, v, u, fields[:-1], fields[-1], tasks, shares, scale, backend):
        add(y, x, v, u, _cores(fields), tasks, shares, scale, backend)


def _add_to_copy(y: Tensor, *rest: Any) -> Tensor:
    out = y.clone()
    _add(out, *rest)
    return out


def _transposed(grad: Tensor, dtype: torch.dtype, v: Tensor, u: Tensor, *rest: Any) -> Tensor:
    *fields, tasks, shares, scale, backend = rest
    out = grad.new_zeros(grad.shape[0], v.shape[0], dtype=dtype)
    named = backend if backend in [b.name for b in TRANSPOSED] else None
    args = (out, grad, u, v, _cores(fields), *two_axes(tasks, shares), scale)
    choose("shared_lora", TRANSPOSED, named, *args).run(*args)
    return out


def _columns(grad: Tensor, x: Tensor, v: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *fields, tasks, shares, scale = rest
    cores = _cores(fields)
    found = column_gradients(grad, x, v, u, cores, *two_axes(tasks, shares), scale)
    narrowed = [t.to(like.dtype) for t, like in zip(found, cores.tables, strict=False)]
    return (*narrowed, found.shares.to(torch.float32).reshape(tasks.shape))


def _columns_fake(*args: Any) -> tuple[Tensor, ...]:
    _, _, _, _, *fields, tasks, _, _ = args
    return (*(torch.empty_like(t) for t in fields[1:6]), torch.empty_like(tasks, dtype=torch.float32))


for _schema, _run, _fake in (
    (f"shared_lora_(Tensor(a!) y, Tensor x, {_CORES}, str? backend) -> ()", _add, lambda *_: None),
    (
        f"shared_lora_transposed(Tensor grad, ScalarType dtype, {_CORES}, str? backend) -> Tensor",
        _transposed,
        lambda grad, dtype, v, *_: grad.new_empty(grad.shape[0], v.shape[0], dtype=dtype),
    ),
    (
        f"shared_lora_columns(Tensor grad, Tensor x, {_CORES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _columns,
        _columns_fake,
    ),
):
    register(_schema, _run, _fake)
register(
    f"shared_lora(Tensor y, Tensor x, {_CORES}, str? backend) -> Tensor",
    _add_to_copy,
    lambda y, *_: torch.empty_like(y),
    backward=_backward,
    keep=_keep,
)
