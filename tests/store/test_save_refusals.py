"""What cannot be kept as it is, is refused before anything is written."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from loraspan import store
from loraspan.collection.collection import Segment
from loraspan.errors import ArgumentError, ShapeError
from store.samples import (
    collection,
    listing,
)


def _first(held, **changes):
    return _with_tasks(held, (replace(held.tasks[0], **changes), *held.tasks[1:]))


def _with_tasks(held, tasks):
    return replace(held, segments=(Segment(tasks, held.segments[0].columns),))


def _spoil(held, change):
    name, slot = next((n, s) for n, s in held.slots.items() if s.u.numel() and s.v.numel())
    return replace(held, slots={**held.slots, name: change(slot)})


def _spoil_columns(held, change):
    (one,) = held.segments
    name, found = next((n, c) for n, c in one.columns.items() if len(c.tasks) > 1 and c.left_private.numel())
    return replace(held, segments=(Segment(one.tasks, {**one.columns, name: change(found)}),))


COLUMN_FAULTS = {
    "weights: the counts ask for": lambda c: replace(c, weights=c.weights[:-1]),
    "weights: it has to be torch.float32": lambda c: replace(c, weights=c.weights.double()),
    "left_private: it has to be torch.float32": lambda c: replace(c, left_private=c.left_private.half()),
    "rows: they have to ascend": lambda c: replace(c, tasks=c.tasks[::-1].copy()),
    "counts: rows, counts and dense": lambda c: replace(c, counts=c.counts[:-1]),
    "counts: they have to be from 0": lambda c: replace(c, counts=c.counts - 9),
    "dense: a dense core has": lambda c: replace(c, dense=~c.dense, counts=c.counts + np.array([99, 0, 0, 0])),
}


@pytest.mark.parametrize("problem", COLUMN_FAULTS)
def test_columns_that_do_not_fit_are_not_written(tmp_path, problem):
    held = collection(8, slots=6)
    fault = COLUMN_FAULTS[problem]
    spoilt = _spoil_columns(held, fault)

    with pytest.raises(ShapeError, match=rf"save: {problem.split(':')[0]} of slot 'layers.*{problem.split(': ')[1]}"):
        store.save(spoilt, tmp_path / "a")

    assert listing(tmp_path) == []


FAULTS = {
    "v of slot .* has to be a matrix": lambda c: _spoil(c, lambda s: replace(s, v=s.v.half())),
    "the kind of slot": lambda c: _spoil(c, lambda s: replace(s, kind="odd")),
    "dtype of a collection": lambda c: replace(c, dtype=torch.int8),
    "two tasks are named 'task 0'": lambda c: _with_tasks(c, (*c.tasks[:3], replace(c.tasks[0]))),
    "which is no slot of the collection": lambda c: _first(c, scales={"x": 1.0}, lora_ranks={"x": 1}),
    "scales and lora_ranks for different slots": lambda c: _first(c, lora_ranks={}),
    "finite": lambda c: _first(c, error=float("nan")),
    "config of task 'task 0' .* plain JSON": lambda c: _first(c, config={"x": object()}),
    "config .* read again": lambda c: _first(c, config=_deep(40)),
    "complex64, which safetensors cannot hold": lambda c: _first(c, extras={"x": torch.zeros(1) * 1j}),
    "extra of task 'task 0' .* printable": lambda c: _first(c, extras={"\udc80": torch.zeros(1)}),
}


def _deep(levels):
    return {"x": _deep(levels - 1)} if levels else {}


@pytest.mark.parametrize("message", FAULTS)
def test_what_cannot_be_kept_is_refused(tmp_path, message):
    spoilt = FAULTS[message](collection(8, slots=6))

    with pytest.raises(ArgumentError, match=f"^save: .*{message}"):
        store.save(spoilt, tmp_path / "a")

    assert listing(tmp_path) == []
