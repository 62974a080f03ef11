"""What served layers are told: the tasks that live, and the rows that they have in every table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loraspan.collection.collection import Collection
from loraspan.collection.columns import Columns
from loraspan.collection.segments import select


@dataclass(frozen=True)
class State:
    """A collection and its tasks' rows in tables, at attach and at each change of the space.

    Attributes:
        collection: bases and columns.
        numbers: of the tasks that are served, by name: their rows. Others that live are refused.
        rows: all numbers ever given are below it.
        fitted: another number once bases, or columns of a task that stays, are others than before.
    """

    collection: Collection
    numbers: Mapping[str, int]
    rows: int
    fitted: int = 0

    @cached_property
    def alive(self) -> NDArray[np.bool_]:
        """Which rows are of tasks that are served, ``[rows]``."""
        alive = np.zeros(self.rows, dtype=np.bool_)
        alive[list(self.numbers.values())] = True
        return alive

    @cached_property
    def of_segments(self) -> tuple[NDArray[np.int64], ...]:
        """For each segment the rows of its tasks, -1 for what is not served."""
        return tuple(
            np.array([-1 if task is None else self.numbers.get(task.name, -1) for task in segment.tasks], np.int64)
            for segment in self.collection.segments
        )

    @cached_property
    def known(self) -> frozenset[int]:
        """What a row may ask for: the numbers that are served, and -1."""
        return frozenset((*self.numbers.values(), -1))

    def strangers(self, numbers: Tensor) -> list[int]:
        """Give those of some numbers that no task has, -1 apart. Asked at each call of a model, of few numbers."""
        return sorted(set(numbers.flatten().tolist()) - self.known)

    def columns_of(self, path: str, wanted: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], Columns]]:
        """Give the columns of tasks whose rows are ``wanted [rows]``, segment after segment, and those rows."""
        for segment, numbers in zip(self.collection.segments, self.of_segments, strict=True):
            columns = segment.columns.get(path)
            if columns is None:
                continue
            of_rows = numbers[columns.tasks]
            kept = np.flatnonzero(np.append(wanted, False)[of_rows])
            if len(kept):
                yield of_rows[kept], select(columns, kept, kept)
