"""The columns of all tasks in one slot, ragged: what a collection holds and a store writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from loraspan.collection.rows import Rows, some_rows

FORMS = ("ss", "sp", "ps", "pp")
FIELDS = ("weights", "left_loadings", "left_private", "right_loadings", "right_private")


@dataclass(frozen=True)
class Columns:
    """Rank-one columns of tasks in one slot: ``dW_i ~ sum_j weight_j left_j right_j^T``.

    Each end of a column is shared (unit coefficients on the slot's basis) or private (an explicit unit vector). A
    task's columns come in the order of :data:`FORMS`: both ends shared; left shared, right private; left private,
    right shared; both private. A task may instead hold a dense core: ``dense`` is set, its shared columns have
    coefficients on the left only, and the right end of column ``c`` is column ``c`` of the basis ``v`` itself
    (so it has ``ss == k_in``).

    Attributes:
        tasks: ``[T]`` int64, ascending: the segment's task of each row below. A task may lack a slot.
        counts: ``[T, 4]`` int64: its number of columns of each form.
        dense: ``[T]`` bool.
        weights: ``[C]`` float32, all columns of all rows in order, not negative.
        left_loadings: ``[., k_out]``, one row per shared left end (forms ss, sp), task after task.
        left_private: ``[., n]``, one row per private left end (forms ps, pp).
        right_loadings: ``[., k_in]``, one row per shared right end (forms ss unless dense, ps).
        right_private: ``[., d]``, one row per private right end (forms sp, pp).

    The four tensors of ends may be packed instead, each as a whole.
    """

    tasks: NDArray[np.int64]
    counts: NDArray[np.int64]
    dense: NDArray[np.bool_]
    weights: Tensor
    left_loadings: Rows
    left_private: Rows
    right_loadings: Rows
    right_private: Rows

    @classmethod
    def made(
        cls, tasks: NDArray[np.int64], counts: NDArray[np.int64], dense: NDArray[np.bool_], rows: Mapping[str, Rows]
    ) -> Columns:
        """Build from what :meth:`tensors` gives."""
        weights, *ends = (rows[name] for name in FIELDS)
        assert isinstance(weights, Tensor)
        return cls(tasks, counts, dense, weights, *ends)

    def offsets(self) -> NDArray[np.int64]:
        """Give where each row starts in the five tensors: ``[T + 1, 5]`` in the order of the attributes."""
        ss, sp, ps, pp = self.counts.T
        lengths = np.stack([ss + sp + ps + pp, ss + sp, ps + pp, np.where(self.dense, 0, ss) + ps, sp + pp], axis=1)
        return np.concatenate([np.zeros((1, 5), dtype=np.int64), np.cumsum(lengths, axis=0)])

    def tensors(self) -> dict[str, Rows]:
        """Give the five tensors by name, in the order of the attributes."""
        return {name: getattr(self, name) for name in FIELDS}

    def row_of(self, task: int) -> int | None:
        """Give the row of a task, None if it lacks the slot."""
        row = int(self.tasks.searchsorted(task))
        return row if row < len(self.tasks) and self.tasks[row] == task else None

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return self.offsets()

    def of_row(self, row: int) -> dict[str, Rows]:
        """Give the five tensors of one row, as views."""
        starts, stops = self._starts[row : row + 2]
        pieces = zip(self.tensors().items(), starts.tolist(), stops.tolist(), strict=True)
        return {name: some_rows(rows, a, b) for (name, rows), a, b in pieces}
