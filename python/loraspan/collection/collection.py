"""A collection: bases per slot, and tasks with their columns in segments, in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loraspan.adapters.base import Source
from loraspan.collection.columns import Columns
from loraspan.collection.rows import Widths
from loraspan.errors import UnknownTaskError
from loraspan.ops.packed import Packed, shape_of


@dataclass(frozen=True)
class SlotSpace:
    """The shared bases of one slot.

    Attributes:
        u: ``[n, k_out]``, the output basis as stored; ``k_out`` may be 0. A packed one has its vectors as rows.
        v: ``[d, k_in]``, the input basis as stored, likewise.
        kind: what the map is in the model, see :class:`loraspan.adapters.base.Slot`.
        kernel: of a convolution.
    """

    u: Tensor | Packed
    v: Tensor | Packed
    kind: str = "linear"
    kernel: tuple[int, int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, d)``."""
        return shape_of(self.u)[0], shape_of(self.v)[0]

    @property
    def ranks(self) -> tuple[int, int]:
        """``(k_out, k_in)``."""
        return shape_of(self.u)[1], shape_of(self.v)[1]


@dataclass(frozen=True)
class Task:
    """What a collection knows of one task beside its columns.

    Attributes:
        name: any text, unique in the collection.
        error: relative Frobenius error of its ``dW`` over all its slots.
        error_kind: ``"measured"``, or ``"bound"`` once a refit that truncates has touched it; ``"trained"`` where what
            was trained in the space has taken the place of the original.
        norm: Frobenius norm of its original ``dW`` over all its slots.
        scales: the original scale of each of its slots.
        lora_ranks: the original rank of each of its slots.
        config: its original configuration.
        source: its provenance.
        factor_bytes: what its factors took in its file.
        factor_dtype: the dtype of its factors there: "float32", "bfloat16", "float16" or "float64".
        extras: tensors kept byte for byte, by their key in the original file.
        forgotten: the part of ``error`` that refits have added since the task came, relative to ``norm`` too.
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
    forgotten: float = 0.0


@dataclass(frozen=True, eq=False)
class Segment:
    """Tasks that came together, and their columns.

    A segment never changes: a task is added with a segment of its own, and leaves with a segment that has None in its
    place and shares all else.

    Attributes:
        tasks: in the order in which they came; None where one was removed, whose columns stay until the segment is
            written anew.
        columns: by module path, for every slot that some of the tasks has; ``Columns.tasks`` counts in ``tasks``.
    """

    tasks: tuple[Task | None, ...]
    columns: Mapping[str, Columns]

    @cached_property
    def living(self) -> int:
        """The number of tasks that were not removed."""
        return sum(task is not None for task in self.tasks)


@dataclass(frozen=True)
class Collection:
    """Bases and tasks.

    Attributes:
        slots: by module path, in a fixed order.
        segments: of tasks, in the order in which they came.
        dtype: of bases, loadings and private columns as stored, where they are not packed.
        bits: of bases, loadings and private columns, 0 where they are not packed.
        base_model: the base model that the adapters name, if they do.
        summary: one sentence on how much is shared and which form was chosen.
        fitted: bytes of the collection when its bases were last fitted, or a refit was last found not to pay.
    """

    slots: Mapping[str, SlotSpace]
    segments: tuple[Segment, ...] = ()
    dtype: torch.dtype = torch.float32
    base_model: str | None = None
    summary: str = ""
    fitted: int = 0
    bits: tuple[int, int, int] = (0, 0, 0)

    @property
    def widths(self) -> Widths:
        """How new columns are stored."""
        return Widths.from_bits(self.dtype, self.bits)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in the order in which they came."""
        return tuple(task for segment in self.segments for task in segment.tasks if task is not None)

    @cached_property
    def places(self) -> Mapping[str, tuple[int, int]]:
        """By name of a task: its segment, and its place in that."""
        return {
            task.name: (i, j)
            for i, segment in enumerate(self.segments)
            for j, task in enumerate(segment.tasks)
            if task is not None
        }

    def find(self, name: str) -> tuple[Segment, int]:
        """Give the segment of a task, and its place in that.

        Raises:
            UnknownTaskError: if there is none of that name; says which there are.
        """
        if name in self.places:
            i, j = self.places[name]
            return self.segments[i], j
        known = ", ".join(repr(task.name) for task in self.tasks[:5])
        more = f" and {len(self.tasks) - 5} more" if len(self.tasks) > 5 else ""
        raise UnknownTaskError(f"no task {name!r} in this collection; it has {known}{more}")

    def task(self, name: str) -> Task:
        """Give a task by its name.

        Raises:
            UnknownTaskError: if there is none of that name.
        """
        segment, j = self.find(name)
        found = segment.tasks[j]
        assert found is not None
        return found

    def columns_of(self, path: str) -> Iterator[tuple[Segment, Columns]]:
        """Give the columns of a slot, segment after segment."""
        return ((segment, segment.columns[path]) for segment in self.segments if path in segment.columns)
