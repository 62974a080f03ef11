"""Scales and ranks that slots of adapters came with, as a store keeps them: a table, and a number for each slot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from loraspan.collection.collection import Task


class Origins(NamedTuple):
    """Of tasks: the distinct pairs of scale and rank, and per slot 1 + the place of a task's pair, 0 without the slot.

    Attributes:
        table: as they first occur.
        codes: ``[T]`` of the slots where not all are 1.
    """

    table: list[tuple[float, int]]
    codes: dict[str, NDArray[np.int64]]

    @classmethod
    def of(cls, tasks: Sequence[Task], slots: Sequence[str]) -> Origins:
        """Gather them; every slot of a task is one of ``slots``."""
        codes = np.zeros((len(tasks), len(slots)), dtype=np.int64)
        place = {slot: j for j, slot in enumerate(slots)}
        table: dict[tuple[float, int], int] = {}
        for i, task in enumerate(tasks):
            pairs = [(float(scale), int(task.lora_ranks[slot])) for slot, scale in task.scales.items()]
            if len(pairs) == len(slots) and len(set(pairs)) == 1:
                codes[i] = table.setdefault(pairs[0], len(table) + 1)
            else:
                for slot, pair in zip(task.scales, pairs, strict=True):
                    codes[i, place[slot]] = table.setdefault(pair, len(table) + 1)
        return cls(list(table), {slot: codes[:, j] for j, slot in enumerate(slots) if (codes[:, j] != 1).any()})
