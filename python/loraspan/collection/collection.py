"""A collection: bases per slot and the columns of every task, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loraspan.adapters.base import Source
from loraspan.collection.columns import Columns


@dataclass(frozen=True)
class SlotSpace:
    """One slot: its shared bases and the columns of the tasks that have it.

    Attributes:
        u: ``[n, k_out]``, the output basis as stored; ``k_out`` may be 0.
        v: ``[d, k_in]``, the input basis as stored.
        columns: of all tasks.
        kind: what the map is in the model, see :class:`loraspan.adapters.base.Slot`.
        kernel: of a convolution.
    """

    u: Tensor
    v: Tensor
    columns: Columns
    kind: str = "linear"
    kernel: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Task:
    """What a collection knows of one task beside its columns.

    Attributes:
        name: any text, unique in the collection.
        error: relative Frobenius error of its ``dW`` over all its slots.
        error_kind: ``"measured"``, or ``"bound"`` once a refit that truncates has touched it.
        norm: Frobenius norm of its original ``dW`` over all its slots.
        scales: the original scale of each of its slots.
        lora_ranks: the original rank of each of its slots.
        config: its original configuration.
        source: its provenance.
        factor_bytes: what its factors took in its file.
        factor_dtype: the dtype of its factors there: "float32", "bfloat16", "float16" or "float64".
        extras: tensors kept byte for byte, by their key in the original file.
    """

    name: str
    error: float
    error_kind: str
    norm: float
    scales: Mapping[str, float]
    lora_ranks: Mapping[str, int]
    config: Mapping[str, Any] = field(default_factory=dict)
    source: Source = field(default_factory=Source)
    factor_bytes: int = 0
    factor_dtype: str = "float32"
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Collection:
    """Bases and tasks.

    Attributes:
        slots: by module path, in a fixed order.
        tasks: in the order in which they came; ``Columns.tasks`` counts in it.
        dtype: of bases, loadings and private columns as stored.
        base_model: the base model that the adapters name, if they do.
        summary: one sentence on how much is shared and which form was chosen.
    """

    slots: Mapping[str, SlotSpace]
    tasks: tuple[Task, ...]
    dtype: torch.dtype = torch.float32
    base_model: str | None = None
    summary: str = ""
