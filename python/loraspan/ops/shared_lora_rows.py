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
    def forward(ctx: Any, y: Tensor, x: Tensor, call: tuple[Any, ...]) -> Tensor:
        v, u, cores, tasks, shares, scale, backend = call
        out = y.clone()
        add(out, x, v, u, cores, tasks, shares, scale, backend)
        ctx.rest = call, x.dtype
        # these may be buffers that somebody fills anew: torch then refuses to go back
        if isinstance(v, Tensor) and isinstance(u, Tensor):
            ctx.save_for_backward(tasks, shares, v, u)
        else:
            ctx.save_for_backward(tasks, shares, *filter(torch.is_tensor, (v, u)))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[1]:
            return grad, None, None
        (v, u, cores, _, _, scale, backend), dtype = ctx.rest
        d = v.length if isinstance(v, Packed) else v.shape[0]
        of_x = grad.new_zeros(grad.shape[0], d, dtype=dtype)
        named = backend if backend in [b.name for b in TRANSPOSED] else None
        args = (of_x, grad, u, v, cores, *two_axes(*ctx.saved_tensors[:2]), scale)
        choose("shared_lora", TRANSPOSED, named, *args).run(*args)
        return grad, of_x, None


# to be applied to y, x and the other arguments
differentiable = applied(_Differentiable)
