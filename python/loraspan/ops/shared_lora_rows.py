"""The gradient of `shared_lora` with respect to its rows alone: where no column trains, packed ones among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loraspan._dispatch import choose
from loraspan.ops.library import applied
from loraspan.ops.packed import Packed
from loraspan.ops.shared_lora_run import TRANSPOSED, add, two_axes


class _Differentiable(torch.autograd.Function):
    """Eager code only. Each tensor that torch is handed by itself costs a call microseconds, so there are two."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, rest: tuple[Any, ...]) -> Tensor:
        out = y.clone()
        add(out, x, *rest)
        ctx.rest, ctx.dtype = rest, x.dtype
        # these may be buffers that somebody fills anew: torch then refuses to go back
        ctx.save_for_backward(*rest[3:5], *filter(torch.is_tensor, rest[:2]))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        v, u, cores, _, _, scale, backend = ctx.rest
        d = v.length if isinstance(v, Packed) else v.shape[0]
        of_x = grad.new_zeros(grad.shape[0], d, dtype=ctx.dtype)
        named = backend if backend in [b.name for b in TRANSPOSED] else None
        args = (of_x, grad, u, v, cores, *two_axes(*ctx.saved_tensors[:2]), scale)
        choose("shared_lora", TRANSPOSED, named, *args).run(*args)
        return grad, of_x, None


_apply = applied(_Differentiable)


def differentiable(y: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Give what `shared_lora` does, differentiable in ``y`` and ``x``; ``rest`` is the rest of its arguments."""
    found: Tensor = _apply(y, x, rest)
    return found
