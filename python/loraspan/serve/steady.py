"""Compute with a slot's tables while the space may change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loraspan.errors import ArgumentError, ShapeError
from loraspan.ops import shared_lora
from loraspan.serve.tables import SlotTables, Triple


def steady(path: str, tables: SlotTables, compute: Callable[[Triple], Tensor]) -> Tensor:
    """Give what ``compute`` makes of the tables, of newer ones if a refit took them away meanwhile.

    Raises:
        ArgumentError: if it is the tasks that are wrong; names the module.
    """
    while True:
        now = tables.now
        if torch.compiler.is_compiling():
            return compute(now)
        try:
            return compute(now)
        except ShapeError:
            raise
        except ArgumentError as error:
            if now is tables.now:
                raise ArgumentError(
                    f"{path}: a task of the batch has left the space, or its number was never one of the space's: "
                    f"take numbers from space.ids, and names from space.tasks"
                ) from error


def added(path: str, tables: SlotTables, y: Tensor, x: Tensor, ids: Tensor, shares: Tensor | None) -> Tensor:
    """Give ``y [N, n]`` with what the tasks make of ``x [N, d]``, see :func:`loraspan.ops.shared_lora`."""
    return steady(path, tables, lambda now: shared_lora(y, x, now.v, now.u, now.cores, ids, shares=shares))
