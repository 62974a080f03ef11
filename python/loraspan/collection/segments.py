"""Put segments together: the living tasks of several in one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from loraspan.collection.collection import Segment
from loraspan.collection.columns import FIELDS, Columns
from loraspan.collection.rows import cat_rows, take_rows


def merge(segments: Sequence[Segment]) -> Segment:
    """Give one segment with the living tasks of several, in order.

    Columns are copied, but for a single segment whose tasks all live, which is given back itself.
    """
    if len(segments) == 1 and segments[0].living == len(segments[0].tasks):
        return segments[0]
    parts: dict[str, list[Columns]] = {}
    first = 0
    for segment in segments:
        alive = np.array([task is not None for task in segment.tasks], dtype=np.bool_)
        for path, columns in segment.columns.items():
            kept = _living(columns, alive, first)
            if len(kept.tasks):
                parts.setdefault(path, []).append(kept)
        first += segment.living
    tasks = tuple(task for segment in segments for task in segment.tasks if task is not None)
    return Segment(tasks, {path: _join(of_slot) for path, of_slot in parts.items()})


def interleave(parts: Sequence[tuple[NDArray[np.int64], Columns]]) -> Columns:
    """Give the rows of several columns in one, each at its place.

    Args:
        parts: places of the rows, ascending, and the rows; all places together are 0 to their number.
    """
    if len(parts) == 1:
        return parts[0][1]
    joined = _join([columns for _, columns in parts])
    order = np.argsort(np.concatenate([places for places, _ in parts]), kind="stable")
    return select(joined, order, joined.tasks[order])


def select(columns: Columns, rows: NDArray[np.int64], tasks: NDArray[np.int64]) -> Columns:
    """Give some rows, as rows of ``tasks``."""
    if len(rows) == len(columns.tasks) and (rows == np.arange(len(rows))).all():
        return Columns.made(tasks, columns.counts, columns.dense, columns.tensors())
    offsets = columns.offsets()
    tensors = {
        field: take_rows(held, torch.from_numpy(spans(offsets[rows, j], offsets[rows + 1, j])))
        for j, (field, held) in enumerate(columns.tensors().items())
    }
    return Columns.made(tasks, columns.counts[rows], columns.dense[rows], tensors)


def _living(columns: Columns, alive: NDArray[np.bool_], first: int) -> Columns:
    rows = np.flatnonzero(alive[columns.tasks])
    places = np.cumsum(alive) - 1 + first
    return select(columns, rows, places[columns.tasks[rows]])


def spans(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give the numbers from each start to its stop, one span after another."""
    lengths = stops - starts
    jumps = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return jumps + np.arange(int(lengths.sum()), dtype=np.int64)


def _join(parts: Sequence[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    tensors = [part.tensors() for part in parts]
    return Columns.made(
        np.concatenate([part.tasks for part in parts]),
        np.concatenate([part.counts for part in parts]),
        np.concatenate([part.dense for part in parts]),
        {field: cat_rows([each[field] for each in tensors]) for field in FIELDS},
    )
