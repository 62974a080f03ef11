"""A task comes, goes and changes its name, and nothing else moves by a bit."""

from __future__ import annotations

from dataclasses import replace

import lives
import numpy as np
import planted
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraspan.adapters.base import Adapter, Slot
from loraspan.collection.fit import Goal, fit
from loraspan.collection.layout import segment_bytes
from loraspan.collection.rebuild import rebuild
from loraspan.collection.rows import CODED
from loraspan.collection.update import add, remove, rename, replace_tasks
from loraspan.errors import ArgumentError, MismatchError, NotFiniteError, UnknownTaskError

PATHS = ("layers.0.q_proj", "layers.1.q_proj")


@pytest.fixture
def collection():
    return fit(planted.adapters(count=6), Goal(max_error=0.05))


@given(life=lives.drawn(), seed=st.integers(100, 199))
def test_what_is_added_is_measured_and_all_else_stays(life, seed):
    before, originals = life.made()
    was = lives.bits(before)
    more = [Adapter(f"more {a.name}", a.slots) for a in planted.adapters(count=5, shape=shape_of(before), seed=seed)]
    more[1] = Adapter(more[1].name, {PATHS[1]: more[1].slots[PATHS[1]]})
    more[3] = Adapter(more[3].name, {**more[3].slots, "layers.8.other": lives.turned(more[3].slots[PATHS[0]])})
    zero = more[4].slots[PATHS[0]]
    more[4] = Adapter(more[4].name, {PATHS[0]: Slot(zero.down, torch.zeros_like(zero.up), zero.scale)})
    max_error = lives.ROOMY[life.dtype]

    after = add(before, more, max_error=max_error)

    assert lives.bits(before) == was
    assert all(after.slots[path] is space for path, space in before.slots.items())
    assert all(one is two for one, two in zip(before.segments, after.segments, strict=False))
    assert len(after.segments) == len(before.segments) + 1
    assert {sum(s.ranks) for path, s in after.slots.items() if path not in before.slots} <= {0}
    assert [task.name for task in after.tasks[len(before.tasks) :]] == [adapter.name for adapter in more]
    truth = lives.errors(after, originals | {adapter.name: adapter for adapter in more})
    assert lives.reported(after) == pytest.approx(truth, abs=1e-6)
    assert max(truth[adapter.name] for adapter in more) <= max_error + lives.FLOOR
    assert {task.error_kind for task in after.tasks} == {"measured"}


def shape_of(collection):
    return collection.slots[PATHS[0]].shape


@pytest.mark.parametrize("dtype", lives.DTYPES, ids=str)
@pytest.mark.parametrize("structure", lives.STRUCTURES.values(), ids=lives.STRUCTURES.keys())
def test_one_after_another_is_all_at_once(structure, dtype):
    """What a task becomes depends on the bases and on itself."""
    adapters = planted.adapters(count=10, **structure)
    before = fit(adapters[:4], Goal(max_error=lives.ROOMY[dtype], dtype=dtype))
    together, singly = add(before, adapters[4:], max_error=0.1), before
    for adapter in adapters[4:]:
        singly = add(singly, [adapter], max_error=0.1)
    for adapter in adapters[4:]:
        for path in adapter.slots:
            one, two = (planted.stored_delta(c, path, adapter.name) for c in (together, singly))
            # whether cores are stored dense is decided for all at once, and rounds them otherwise
            slack = 4 * torch.finfo(dtype).eps * np.linalg.norm(planted.delta(adapter.slots[path]))
            assert np.linalg.norm(one - two) <= slack


def test_bases_carry_what_they_can(collection):
    """An adapter of the same directions takes shared ends; one of other directions takes private ones alone."""
    known = planted.adapters(count=8, noise=0.0)[7]
    foreign = Adapter("foreign", planted.adapters(count=8, seed=1)[7].slots)
    after = add(collection, [known, foreign], max_error=0.05)
    counts = sum(columns.counts for columns in after.segments[-1].columns.values())
    assert counts[0, :3].sum() >= counts[0, 3]
    assert counts[1, :3].sum() == 0
    assert counts[1, 3] > 0


def test_more_error_takes_fewer_bytes(collection):
    adapter = planted.adapters(count=9)[8]
    sizes = [segment_bytes(add(collection, [adapter], max_error=e).segments[-1]) for e in (0.001, 0.1, 0.6)]
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.parametrize("structure", lives.STRUCTURES.values(), ids=lives.STRUCTURES.keys())
@pytest.mark.parametrize(("width", "max_error"), [(4, 0.01), (8, 1e-3), (8, 1e-4)])
def test_packed_ends_carry_what_packing_leaves(structure, width, max_error):
    """A collection in few bits still takes a task as exactly as it is wanted: more columns hold what rounding took."""
    adapters = planted.adapters(count=8, **structure)
    before = fit(adapters[:5], Goal(max_error=0.3, dtype=width))
    after = add(before, adapters[5:], max_error=max_error)
    truth = lives.errors(after, {a.name: a for a in adapters})
    assert lives.reported(after) == pytest.approx(truth, abs=1e-6)
    assert max(truth[a.name] for a in adapters[5:]) <= max_error + lives.FLOOR
    assert after.widths == before.widths
    alone = sum(c.counts[:, 3].sum() for c in after.segments[-1].columns.values())
    assert alone > sum(slot.lora_rank for a in adapters[5:] for slot in a.slots.values())


@pytest.mark.parametrize("max_error", [1e-5, 1e-6, 2e-7])
def test_small_errors_are_met_as_far_as_they_can_be_told(max_error):
    """Columns of 16 bits for what others leave would go on where float64 sees no difference any more."""
    adapters = planted.adapters(count=9)
    before = fit(adapters[:8], Goal(max_error=0.05, dtype=CODED))
    after = add(before, adapters[8:], max_error=max_error)
    truth = lives.errors(after, {"task 8": adapters[8]})["task 8"]
    assert truth <= 1.05 * max_error
    assert after.task("task 8").error == pytest.approx(truth, rel=0.05)
    with pytest.raises(ArgumentError, match=r"add: max_error=1\.9e-07 is below what rounding .* 2e-07 or more"):
        add(before, adapters[8:], max_error=1.9e-7)


def test_adding_to_nothing(collection):
    """A collection whose tasks all left has its bases still, and takes the same columns on them."""
    emptied = remove(collection, [task.name for task in collection.tasks])
    assert emptied.segments == ()
    adapters = planted.adapters(count=6)
    after = add(emptied, adapters, max_error=0.05)
    assert lives.reported(after) == pytest.approx(lives.errors(after, {a.name: a for a in adapters}), abs=1e-6)
    assert all(after.slots[path] is space for path, space in collection.slots.items())


def test_removed_tasks_leave_all_else(collection):
    grown = add(collection, planted.adapters(count=9)[6:], max_error=0.05)
    kept = remove(grown, ["task 7", "task 1", "task 7"])
    assert [task.name for task in kept.tasks] == [f"task {i}" for i in (0, 2, 3, 4, 5, 6, 8)]
    assert kept.slots is grown.slots
    for one, two in zip(grown.segments, kept.segments, strict=True):
        assert one.columns is two.columns
    for task in kept.tasks:
        for path in PATHS:
            one, two = (planted.stored_delta(c, path, task.name) for c in (grown, kept))
            assert np.array_equal(one, two)
    assert len(remove(kept, ["task 6", "task 8"]).segments) == 1
    assert remove(kept, ["task 6"]).segments[0] is kept.segments[0]


def test_renamed_tasks_are_the_same(collection):
    after = rename(collection, {"task 1": "task 2", "task 2": "task 1", "task 0": "zero", "task 3": "task 3"})
    assert [task.name for task in after.tasks] == ["zero", "task 2", "task 1", "task 3", "task 4", "task 5"]
    assert after.segments[0].columns is collection.segments[0].columns
    assert np.array_equal(
        planted.stored_delta(after, PATHS[0], "task 2"), planted.stored_delta(collection, PATHS[0], "task 1")
    )
    assert rebuild(after, "zero").name == "zero"


def test_replaced_task_is_the_other_adapter(collection):
    other = Adapter("task 2", planted.adapters(count=7, seed=3)[6].slots)
    after = replace_tasks(collection, [other], max_error=0.01)
    assert [task.name for task in after.tasks] == [f"task {i}" for i in (0, 1, 3, 4, 5, 2)]
    assert lives.errors(after, {"task 2": other})["task 2"] == pytest.approx(after.task("task 2").error, abs=1e-6)
    assert after.task("task 2").error <= 0.01
    assert after.segments[0].columns is collection.segments[0].columns


def spoiled(adapter, path=PATHS[1], value=float("nan")):
    slots = {p: Slot(s.down.clone(), s.up.clone(), s.scale) for p, s in adapter.slots.items()}
    slots[path].up[2, 0] = value
    return Adapter(adapter.name, slots)


NEW = planted.adapters(count=8)[7]
REFUSED = {
    "taken": (
        lambda c: add(c, [Adapter("task 3", NEW.slots)], max_error=0.1),
        MismatchError,
        "a task 'task 3' already",
    ),
    "twice": (lambda c: add(c, [NEW, NEW], max_error=0.1), MismatchError, "two tasks would be named 'task 7'"),
    "none": (lambda c: add(c, [], max_error=0.1), ArgumentError, "add: there is no adapter"),
    "zero-error": (lambda c: add(c, [NEW], max_error=0.0), ArgumentError, "add: max_error is between 0 and 1"),
    "whole-error": (lambda c: add(c, [NEW], max_error=1.0), ArgumentError, "add: max_error is between 0 and 1"),
    "nan-error": (lambda c: add(c, [NEW], max_error=float("nan")), ArgumentError, "max_error is between 0 and 1"),
    "text-error": (lambda c: add(c, [NEW], max_error="0.1"), ArgumentError, "max_error is between 0 and 1; got .0.1."),
    "rounding": (lambda c: add(c, [NEW], max_error=1e-9), ArgumentError, "add: max_error=1e-09 is below what rounding"),
    "nan": (lambda c: add(c, [spoiled(NEW)], max_error=0.1), NotFiniteError, "'task 7'.*'up'.*'layers.1.q_proj'"),
    "infinite": (
        lambda c: add(c, [spoiled(NEW, value=float("inf"))], max_error=0.1),
        NotFiniteError,
        "'task 7'.*'up'.*'layers.1.q_proj'",
    ),
    "shape": (
        lambda c: add(c, [Adapter("wide", planted.adapters(count=1, shape=(40, 57))[0].slots)], max_error=0.1),
        MismatchError,
        r"\[40, 56\] in the collection.*\[40, 57\] in adapter 'wide'",
    ),
    "kind": (
        lambda c: add(c, [Adapter("odd", {PATHS[0]: replace(NEW.slots[PATHS[0]], kind="embedding")})], max_error=0.1),
        MismatchError,
        "a linear of shape.*a embedding of shape.*'odd'",
    ),
    "remove-unknown": (lambda c: remove(c, ["task 1", "sql"]), UnknownTaskError, "no task 'sql'"),
    "rename-unknown": (lambda c: rename(c, {"sql": "x"}), UnknownTaskError, "no task 'sql'"),
    "rename-taken": (lambda c: rename(c, {"task 1": "task 2"}), MismatchError, "a task 'task 2' already"),
    "rename-twice": (lambda c: rename(c, {"task 1": "x", "task 2": "x"}), MismatchError, "would be named 'x'"),
    "rename-none": (lambda c: rename(c, {}), ArgumentError, "rename: there is no name"),
    "replace-unknown": (lambda c: replace_tasks(c, [NEW], max_error=0.1), UnknownTaskError, "no task 'task 7'"),
}


@pytest.mark.parametrize(("change", "error", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_changes_nothing(collection, change, error, words):
    was = lives.bits(collection)
    with pytest.raises(error, match=words):
        change(collection)
    assert lives.bits(collection) == was
