"""The report on an adapter that is not in the collection: its figures are those of dense algebra."""

from __future__ import annotations

import json

import lives
import numpy as np
import planted
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraspan.adapters.base import Adapter, Slot
from loraspan.collection.collection import Collection, Segment
from loraspan.collection.fit import Goal, describe, fit
from loraspan.collection.layout import segment_bytes
from loraspan.collection.project import project
from loraspan.collection.update import add
from loraspan.errors import ArgumentError, MismatchError, NotFiniteError
from loraspan.ops.packed import unpacked

PATH = "layers.0.q_proj"


def outside(delta, basis):
    """The share of ``|delta|^2`` outside the span of ``basis``, on the input side."""
    q = np.linalg.qr(unpacked(basis).double().numpy())[0]
    return 1 - np.square(delta @ q).sum() / np.square(delta).sum()


@given(life=lives.drawn(), seed=st.integers(100, 199), max_error=st.sampled_from([0.4, 0.6]))
def test_figures_are_those_of_dense_algebra(life, seed, max_error):
    collection, _ = life.made()
    was = lives.bits(collection)
    adapter = planted.adapters(count=3, shape=collection.slots[PATH].shape, seed=seed)[2]
    adapter = Adapter("new", {**adapter.slots, "layers.7.foreign": lives.turned(adapter.slots[PATH])})

    found = project(collection, adapter, max_error=max_error)

    assert lives.bits(collection) == was
    deltas = {path: planted.delta(slot) for path, slot in adapter.slots.items()}
    total = sum(np.square(delta).sum() for delta in deltas.values())
    assert {line.path for line in found.slots} == deltas.keys()
    lost = 0.0
    for line in found.slots:
        delta, space = deltas[line.path], collection.slots.get(line.path)
        assert line.share == pytest.approx(np.square(delta).sum() / total, abs=1e-9)
        assert line.known == (space is not None)
        lost += line.share * line.error**2
        if space is None:
            assert (line.error, line.outside_in, line.outside_out) == (1.0, 1.0, 1.0)
            continue
        # to the rounding of bases whose products are summed in float64
        assert line.outside_in == pytest.approx(outside(delta, space.v), abs=1e-9)
        assert line.outside_out == pytest.approx(outside(delta.T, space.u), abs=1e-9)
    alone = shared_alone(collection, adapter, found)
    error = planted.relative_error(adapter, lambda path: planted.stored_delta(alone, path, "new"))
    assert found.error == pytest.approx(error, abs=1e-6)
    assert found.outside == pytest.approx(lost, abs=1e-9) == pytest.approx(found.error**2, abs=1e-12)
    parts = [line.share * line.error**2 for line in found.slots]
    assert parts == sorted(parts, reverse=True)


def shared_alone(collection, adapter, found):
    """A collection with the adapter as its reported loadings give it."""
    whole = add(collection, [adapter], max_error=0.6).slots
    task = describe([adapter], torch.ones(1), torch.zeros(1))
    return Collection(whole, (Segment(task, found.loadings),), collection.dtype)


@pytest.mark.parametrize("dtype", lives.DTYPES, ids=str)
def test_shared_ends_are_the_best_there_are(dtype):
    """No coefficients on the stored bases come closer, beyond the rounding of the coefficients."""
    adapters = planted.adapters(count=9, noise=0.2)
    collection = fit(adapters[:8], Goal(rank=6, dtype=dtype))
    found = project(collection, adapters[8], max_error=0.4)
    for line in found.slots:
        delta, space = planted.delta(adapters[8].slots[line.path]), collection.slots[line.path]
        u, v = (np.linalg.qr(unpacked(side).double().numpy())[0] for side in (space.u, space.v))
        best = np.linalg.norm(delta - u @ (u.T @ delta @ v) @ v.T) / np.linalg.norm(delta)
        assert best - 1e-9 <= line.error <= best + torch.finfo(dtype).eps


@pytest.mark.parametrize("max_error", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("structure", [{}, {"shared_in": 0}, {"shared_out": 0}], ids=["both", "output", "input"])
def test_cost_is_what_adding_takes(structure, max_error):
    adapters = planted.adapters(count=9, noise=0.1 if not structure else 0.02, **structure)
    collection = fit(adapters[:8], Goal(max_error=0.05))
    found = project(collection, adapters[8], max_error=max_error)
    segment = add(collection, [adapters[8]], max_error=max_error).segments[-1]
    counts = sum(columns.counts.sum(axis=0) for columns in segment.columns.values())
    assert found.nbytes == segment_bytes(segment)
    assert (found.columns_if_added, found.private_if_added) == (counts.sum(), counts[1:].sum())
    assert found.error_if_added == segment.tasks[0].error <= max_error
    assert found.max_error == max_error


def test_a_known_task_and_a_foreign_one():
    adapters = planted.adapters(count=8, noise=0.001)
    collection = fit(adapters, Goal(max_error=0.01))
    known = project(collection, adapters[3], max_error=0.05)
    assert known.error < 0.01
    assert known.private_if_added == 0
    foreign = project(collection, Adapter("x", planted.adapters(count=8, seed=1)[3].slots), max_error=0.05)
    assert foreign.error > 0.9
    assert foreign.private_if_added == foreign.columns_if_added > 0


def test_a_zero_adapter_costs_next_to_nothing():
    collection = fit(planted.adapters(count=4), Goal(rank=5))
    slot = planted.adapters(count=1)[0].slots[PATH]
    found = project(collection, Adapter("zero", {PATH: Slot(slot.down, slot.up * 0, 1.0)}), max_error=0.05)
    assert (found.error, found.outside, found.columns_if_added) == (0.0, 0.0, 0)
    assert found.slots[0].share == found.slots[0].outside_in == 0.0
    json.dumps(found.as_dict(), allow_nan=False)


def test_text_and_values_tell_the_same():
    adapters = planted.adapters(count=5, slots=11)
    collection = fit(adapters[:4], Goal(rank=5))
    found = project(
        collection, Adapter("new", {**adapters[4].slots, "far.away": adapters[4].slots[PATH]}), max_error=0.1
    )
    text, values = str(found), json.loads(json.dumps(found.as_dict()))
    assert values["slots"][0]["path"] == found.slots[0].path == "far.away"
    assert "loadings" not in values
    assert f"{found.nbytes:,} bytes" in text
    assert "far.away" in text
    assert "not in the collection" in text
    assert "and 4 slots with smaller errors" in text


def test_what_cannot_be_projected_says_project():
    adapters = planted.adapters(count=5)
    collection = fit(adapters[:4], Goal(rank=5, dtype=torch.bfloat16))
    with pytest.raises(ArgumentError, match="project: max_error is between 0 and 1; got 1"):
        project(collection, adapters[4], max_error=1.0)
    with pytest.raises(ArgumentError, match="project: max_error=1e-06 is below what rounding"):
        project(collection, adapters[4], max_error=1e-6)
    with pytest.raises(MismatchError, match=r"\[40, 56\] in the collection.*'wide'"):
        project(collection, Adapter("wide", planted.adapters(count=1, shape=(40, 57))[0].slots), max_error=0.1)
    adapters[4].slots[PATH].down[0, 0] = float("inf")
    with pytest.raises(NotFiniteError, match=r"'task 4'.*'down'"):
        project(collection, adapters[4], max_error=0.1)
