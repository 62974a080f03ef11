"""The gradient of `shared_lora` with respect to its rows, where bases or ends of columns are packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loraspan._dispatch import choose
from loraspan.errors import ArgumentError
from loraspan.ops.cores import Cores
from loraspan.ops.packed import Packed
from loraspan.ops.shared_lora_run import TRANSPOSED, add, two_axes


class _Differentiable(torch.autograd.Function):
    """Eager code only: an operator of torch takes no packed rows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, rest: tuple[Any, ...]) -> Tensor:
        out = y.clone()
        add(out, x, *rest)
        ctx.rest, ctx.dtype = rest, x.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        v, u, cores, tasks, shares, scale, backend = ctx.rest
        d = v.length if isinstance(v, Packed) else v.shape[0]
        of_x = grad.new_zeros(grad.shape[0], d, dtype=ctx.dtype)
        named = backend if backend in [b.name for b in TRANSPOSED] else None
        args = (of_x, grad, u, v, cores, *two_axes(tasks, shares), scale)
        choose("shared_lora", TRANSPOSED, named, *args).run(*args)
        return grad, of_x, None


def differentiable(
    y: Tensor,
    x: Tensor,
    v: Tensor | Packed,
    u: Tensor | Packed,
    cores: Cores,
    tasks: Tensor,
    shares: Tensor | None,
    scale: float,
    backend: str | None,
) -> Tensor:
    """Give what `shared_lora` does, differentiable in ``y`` and ``x``."""
    names = ("weights", "left", "left_private", "right", "right_private")
    wanted = [f"cores.{name}" for name in names if getattr(cores, name).requires_grad]
    if shares is not None and shares.requires_grad:
        wanted.append("shares")
    if wanted:
        raise ArgumentError(
            f"shared_lora: with packed bases or ends there are gradients of y and x alone; {', '.join(wanted)} "
            f"requires one: use .detach(), or unpack"
        )
    found: Tensor = _Differentiable.apply(y, x, (v, u, cores, tasks, shares, scale, backend))  # type: ignore[no-untyped-call]
    return found
