"""Turn a model into one that serves every task of a space, row by row, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from loraspan._default_device import cpu_by_default
from loraspan.errors import ArgumentError
from loraspan.serve.attached import Attached
from loraspan.serve.layer import DTYPES, Served
from loraspan.serve.roster import Roster

__all__ = ["Attached", "Space", "attach"]


class Space(Protocol):
    """What is attached: a :class:`loraspan.Subspace`."""

    @property
    def roster(self) -> Roster:
        """Numbers of tasks, and who is told of them."""


@cpu_by_default
def attach(
    model: nn.Module,
    space: Space,
    *,
    paths: Callable[[str], str | None] | None = None,
    dtype: torch.dtype | None = None,
    train: bool = False,
) -> Attached:
    """Let a model serve every task of a space: each row of a batch has its own.

    Modules that the tasks adapt are replaced, in the model, by layers that run them and add what the row's task makes
    of their input. The modules themselves are not touched, nor copied: they may be of any dtype, quantized, on several
    devices. Where PEFT has put a LoRA layer, it is the base of that layer which is replaced, and PEFT's own adapters go
    on working, as part of what is the base model here. Tasks that come to the space, leave it or are refitted are
    followed. It takes the memory of the coefficients of all tasks, and no more.

    Args:
        model: any module whose modules lie where the adapters' did: with the same paths, or paths that end alike, as in
            a model that something wraps or one without its head.
        space: the tasks.
        paths: gives the model's path of a module for an adapter's, where they differ otherwise; None for its own way.
        dtype: of bases and coefficients: float16, bfloat16, float32 or float64. None takes that of each module's weight
            where it is one of these, else what is stored; on the CPU, what is packed in 8 or 4 bits stays so (compiled
            graphs take no packed tables: name a dtype there).
        train: make weights and shared loadings of all tasks leaves that require gradients, listed by
            :meth:`Attached.loadings`, in float32 (float64 beside float64 bases); bases and private columns stay
            frozen. The space may not change then but by :meth:`loraspan.Subspace.keep`, which puts them into it.

    Returns:
        The model in a wrapper, see :class:`Attached`.

    Raises:
        ArgumentError: if the model is attached already, or ``dtype`` is none of those.
        MismatchError: if a slot matches no module, several, or one of another shape; all are listed.
        UnsupportedError: if a module is of a kind that cannot be served; names it.
        In each case the model is as it was.

    Example:
        >>> from loraspan import compress
        >>> from loraspan.adapters import Adapter, Slot
        >>> one = Adapter("one", {"0": Slot(torch.eye(1, 2), torch.eye(2, 1), scale=3.0)})
        >>> space = compress([one], rank=1)
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False)).requires_grad_(False)
        >>> _ = model[0].weight.copy_(torch.eye(2))
        >>> served = attach(model, space)
        >>> with served.tasks(["one", None]):
        ...     served(torch.ones(2, 2))
        tensor([[4., 1.],
                [1., 1.]])
        >>> served.detach() is model
        True

    Source:
        Serving from a shared basis: Gabrielsson et al., *Compress then Serve*, 2024, section 4.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"attach: dtype is float16, bfloat16, float32, float64 or None; got {dtype!r}")
    if any(isinstance(module, (Served, Attached)) for module in model.modules()):
        raise ArgumentError(
            "attach: the model is attached already: detach it first, or attach the other space to a copy"
        )
    return Attached(model, space.roster, paths=paths, dtype=dtype, train=train)
