"""Operators of torch: what a model calls has a schema and a fake, so that graphs compile through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# torch keeps only what its own code needs of a library: this name keeps the operators alive
_LIBRARY: Any = torch.library.Library("loraspan", "DEF")  # type: ignore[no-untyped-call]

# whether vmap or its kin run; where torch does not say, they may
transformed: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


class Applied(NamedTuple):
    """A function's ``apply``, and ``direct``, for where nothing is ``transformed``: without what prepares for that.

    That is a third of what a gradient costs beside the work, and lies outside of torch's compiled code.
    """

    apply: Callable[..., Any]
    direct: Callable[..., Any]


def applied(function: type[torch.autograd.Function]) -> Applied:
    """Give both of a function, which has no ``setup_context``."""
    return Applied(function.apply, super(torch.autograd.Function, function).apply)  # type: ignore[misc]


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    keep: Callable[..., Any] | None = None,
) -> None:
    """Make ``torch.ops.loraspan.<name>`` of a function.

    Args:
        schema: the operator's name, arguments and results in torch's notation.
        run: does it, on tensors of any device.
        fake: gives empty results of the right shapes and dtypes.
        backward: gives the gradients of all arguments from ``ctx`` and that of the result; none where there is none.
        keep: fills ``ctx`` from ``ctx, inputs, output``, as `torch.library.register_autograd` asks.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"loraspan::{name}", fake, lib=_LIBRARY)
    if backward:
        torch.library.register_autograd(f"loraspan::{name}", backward, setup_context=keep, lib=_LIBRARY)
