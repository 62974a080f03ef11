"""What models call, as torch operators: schemas, fakes and gradients, so that graphs compile through them.

Eager calls that need no gradient go straight to the kernels; everything else comes by here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loraspan._dispatch import choose
from loraspan.ops.cores import Cores
from loraspan.ops.reconstruct import rebuild
from loraspan.ops.shared_lora import TRANSPOSED, add
from loraspan.ops.shared_lora_gradients import column_gradients

_CORES = (
    "Tensor v, Tensor u, Tensor index, Tensor weights, Tensor left, Tensor left_private, Tensor right, "
    "Tensor right_private, SymInt[] most, Tensor tasks, Tensor? shares, float scale"
)
_LIBRARY: Any = torch.library.Library("loraspan", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    f"shared_lora(Tensor y, Tensor x, {_CORES}, str? backend) -> Tensor",
    f"shared_lora_(Tensor(a!) y, Tensor x, {_CORES}, str? backend) -> ()",
    f"shared_lora_transposed(Tensor grad, ScalarType dtype, {_CORES}, str? backend) -> Tensor",
    f"shared_lora_columns(Tensor grad, Tensor x, {_CORES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "reconstruct(Tensor basis, Tensor loadings, float scale, ScalarType? dtype, str? backend) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def shared_lora(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    u: Tensor,
    cores: Cores,
    tasks: Tensor,
    shares: Tensor | None,
    scale: float,
    backend: str | None,
) -> Tensor:
    """Call the operator with what :func:`loraspan.ops.shared_lora` has checked."""
    found: Tensor = torch.ops.loraspan.shared_lora(y, x, v, u, *_fields(cores), tasks, shares, scale, backend)
    return found


def shared_lora_(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    u: Tensor,
    cores: Cores,
    tasks: Tensor,
    shares: Tensor | None,
    scale: float,
    backend: str | None,
) -> Tensor:
    """Call the operator that writes to ``y``."""
    torch.ops.loraspan.shared_lora_(y, x, v, u, *_fields(cores), tasks, shares, scale, backend)
    return y


def reconstruct(
    basis: Tensor, loadings: Tensor, scale: float, dtype: torch.dtype | None, backend: str | None
) -> Tensor:
    """Call the operator with what :func:`loraspan.ops.reconstruct` was given."""
    found: Tensor = torch.ops.loraspan.reconstruct(basis, loadings, scale, dtype, backend)
    return found


def _fields(cores: Cores) -> tuple[Any, ...]:
    c = cores
    return (c.index, c.weights, c.left, c.left_private, c.right, c.right_private, list(c.most))


def _cores(fields: Sequence[Any]) -> Cores:
    index, weights, left, left_private, right, right_private, most = fields
    return Cores(index, weights, left, left_private, right, right_private, tuple(most))


def _add(y: Tensor, x: Tensor, v: Tensor, u: Tensor, *rest: Any) -> None:
    *fields, tasks, shares, scale, backend = rest
    add(y, x, v, u, _cores(fields), tasks, shares, scale, backend)


def _add_to_copy(y: Tensor, *rest: Any) -> Tensor:
    out = y.clone()
    _add(out, *rest)
    return out


def _two_axes(tasks: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if tasks.ndim == 2:
        return tasks, shares
    return tasks[:, None], None if shares is None else shares[:, None]


def _transposed(grad: Tensor, dtype: torch.dtype, v: Tensor, u: Tensor, *rest: Any) -> Tensor:
    *fields, tasks, shares, scale, backend = rest
    out = grad.new_zeros(grad.shape[0], v.shape[0], dtype=dtype)
    named = backend if backend in [b.name for b in TRANSPOSED] else None
    args = (out, grad, u, v, _cores(fields), *_two_axes(tasks, shares), scale)
    choose("shared_lora", TRANSPOSED, named, *args).run(*args)
    return out


def _columns(grad: Tensor, x: Tensor, v: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *fields, tasks, shares, scale = rest
    cores = _cores(fields)
    found = column_gradients(grad, x, v, u, cores, *_two_axes(tasks, shares), scale)
    tables = (cores.weights, cores.left, cores.left_private, cores.right, cores.right_private)
    narrowed = [t.to(like.dtype) for t, like in zip(found, tables, strict=False)]
    return (*narrowed, found.shares.to(torch.float32).reshape(tasks.shape))


def _columns_fake(*args: Any) -> tuple[Tensor, ...]:
    _, _, _, _, *fields, tasks, _, _ = args
    return (*(torch.empty_like(t) for t in fields[1:6]), torch.empty_like(tasks, dtype=torch.float32))


def _rebuild_fake(basis: Tensor, loadings: Tensor, _scale: float, dtype: torch.dtype | None, _: str | None) -> Tensor:
    return basis.new_empty(*basis.shape[:-1], loadings.shape[-1], dtype=dtype or basis.dtype)


for _name, _run, _fake in (
    ("shared_lora", _add_to_copy, lambda y, *_: torch.empty_like(y)),
    ("shared_lora_", _add, lambda *_: None),
    ("shared_lora_transposed", _transposed, lambda g, dtype, v, *_: g.new_empty(g.shape[0], v.shape[0], dtype=dtype)),
    ("shared_lora_columns", _columns, _columns_fake),
    ("reconstruct", rebuild, _rebuild_fake),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"loraspan::{_name}", _fake, lib=_LIBRARY)


# of the operands of shared_lora: x, and what gradients of columns and shares need x for
_X, _COLUMNS = 1, (5, 6, 7, 8, 9, 12)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch passes it by name)
    _, x, v, u, *fields, tasks, shares, scale, backend = inputs
    ctx.dtype, ctx.most, ctx.scale, ctx.backend = x.dtype, fields[-1], scale, backend
    # x is as large as the batch: kept only for those who need it
    wanted = any(ctx.needs_input_grad[i] for i in _COLUMNS)
    ctx.save_for_backward(v, u, *fields[:-1], tasks, shares, x if wanted else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_x, tables, of_shares = _gradients(ctx, grad, ctx.needs_input_grad[_X])
    return (grad, of_x, None, None, None, *tables, None, None, of_shares, None, None)


def _gradients(ctx: Any, grad: Tensor, wants_x: bool) -> tuple[Tensor | None, tuple[Tensor | None, ...], Tensor | None]:
    """Give the gradients of x, of the five tables and of the shares, as far as they are wanted."""
    *rest, tasks, shares, x = ctx.saved_tensors
    of_x: Tensor | None = None
    columns: tuple[Tensor | None, ...] = (None,) * len(_COLUMNS)
    args = (*rest, ctx.most, tasks, shares, ctx.scale)
    if wants_x:
        of_x = torch.ops.loraspan.shared_lora_transposed(grad, ctx.dtype, *args, ctx.backend)
    if x is not None:
        columns = torch.ops.loraspan.shared_lora_columns(grad, x, *args)
    return of_x, columns[:-1], None if shares is None else columns[-1]


class _Differentiable(torch.autograd.Function):
    """The operator for eager code: a gradient registered with torch.library would cost several times the call."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, shares: Tensor | None, *rest: Any) -> Tensor:
        # the tables are handed over one by one, for their gradients; `cores` has them as well
        *tables, (v, u, cores, tasks, scale, backend) = rest
        out = y.clone()
        add(out, x, v, u, cores, tasks, shares, scale, backend)
        ctx.dtype, ctx.most, ctx.scale, ctx.backend = x.dtype, list(cores.most), scale, backend
        wanted = any(ctx.needs_input_grad[2:8])
        ctx.save_for_backward(v, u, cores.index, *tables, tasks, shares, x if wanted else None)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x, tables, of_shares = _gradients(ctx, grad, ctx.needs_input_grad[1])
        return (grad, of_x, of_shares, *tables, None)


def differentiable(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    u: Tensor,
    cores: Cores,
    tasks: Tensor,
    shares: Tensor | None,
    scale: float,
    backend: str | None,
) -> Tensor:
    """Give what :func:`shared_lora` here does, in eager code."""
    tables = (cores.weights, cores.left, cores.left_private, cores.right, cores.right_private)
    rest = (v, u, cores, tasks, scale, backend)
    found: Tensor = _Differentiable.apply(y, x, shares, *tables, rest)  # type: ignore[no-untyped-call]
    return found


def _keep_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    basis, loadings, ctx.scale, _, ctx.backend = inputs
    ctx.save_for_backward(basis, loadings)


def _backward_of_factors(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    basis, loadings = ctx.saved_tensors
    of_basis = of_loadings = None
    if ctx.needs_input_grad[0]:
        of_basis = reconstruct(grad, loadings.mT, ctx.scale, basis.dtype, ctx.backend)
    if ctx.needs_input_grad[1]:
        of_loadings = reconstruct(basis.mT, grad, ctx.scale, loadings.dtype, ctx.backend)
    return of_basis, of_loadings, None, None, None


torch.library.register_autograd("loraspan::shared_lora", _backward, setup_context=_keep, lib=_LIBRARY)
torch.library.register_autograd(
    "loraspan::reconstruct", _backward_of_factors, setup_context=_keep_factors, lib=_LIBRARY
)
