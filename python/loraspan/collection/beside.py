"""What is known of coded ends before they are unpacked: the weights of their columns, and the tasks that have them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loraspan.collection.coding import Known
from loraspan.collection.columns import FIELDS, Columns


class Beside(NamedTuple):
    """Of the columns of a slot what :class:`loraspan.collection.columns.Columns` has beside their ends."""

    weights: Tensor
    tasks: NDArray[np.int64]
    counts: NDArray[np.int64]
    dense: NDArray[np.bool_]

    @classmethod
    def of(cls, columns: Columns) -> Beside:
        """Give it of some columns."""
        return cls(columns.weights, columns.tasks, columns.counts, columns.dense)

    def known(self) -> dict[str, Known]:
        """Give what that tells of the rows of ends, by field."""
        form = np.repeat(np.tile(np.arange(4), len(self.counts)), self.counts.ravel())
        task, dense = (np.repeat(each, self.counts.sum(1)) for each in (self.tasks.astype(np.int32), self.dense))
        has = (form < 2, form >= 2, (form == 2) | ((form == 0) & (dense == 0)), form % 2 == 1)
        weights = self.weights.numpy()
        return {field: Known(weights[own], task[own]) for field, own in zip(FIELDS[1:], has, strict=True)}


def same(some: list[Known], others: list[Known]) -> bool:
    """Say whether the same is known of the rows of two lists of tables."""
    return len(some) == len(others) and all(
        np.array_equal(*pair) for one, other in zip(some, others, strict=True) for pair in zip(one, other, strict=True)
    )
