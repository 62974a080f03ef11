"""New bases from what is stored: what every task loses is said, and stays within its budget over its life."""

from __future__ import annotations

import math

import lives
import numpy as np
import planted
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraspan.adapters.base import Adapter, Slot
from loraspan.collection import ranges
from loraspan.collection.fit import Goal, fit
from loraspan.collection.layout import collection_bytes
from loraspan.collection.rebuild import rebuild
from loraspan.collection.refit import refit
from loraspan.collection.rows import CODED
from loraspan.collection.update import add, remove
from loraspan.errors import ArgumentError
from loraspan.ops.packed import Packed

PATH = "layers.0.q_proj"
LIMITS = {torch.float32: 0.02, torch.float16: 0.05, torch.bfloat16: 0.2, 8: 0.2, 4: 0.8, CODED: 0.2}


def as_stored(collection):
    """Every task as it is stored, as an adapter with float64 factors: what a refit starts from, by name."""
    made = {}
    for task in collection.tasks:
        slots = {}
        for path in rebuild(collection, task.name).slots:
            delta = torch.from_numpy(planted.stored_delta(collection, path, task.name))
            u, s, vh = torch.linalg.svd(delta, full_matrices=False)
            kept = int((s > 1e-13 * s[:1]).sum())
            slots[path] = Slot(s[:kept, None] * vh[:kept], u[:, :kept], 1.0)
        made[task.name] = Adapter(task.name, slots)
    return made


def distances(one, two):
    """How far the tasks of two collections are from each other, relative to the norms of their originals."""
    found = {}
    for task in one.tasks:
        paths = rebuild(one, task.name).slots
        gone = sum(
            np.square(planted.stored_delta(one, path, task.name) - planted.stored_delta(two, path, task.name)).sum()
            for path in paths
        )
        found[task.name] = math.sqrt(gone) / (task.norm or 1.0)
    return found


@given(life=lives.drawn(), rank=st.sampled_from([None, 1, 4, 11]))
def test_losses_are_measured_within_the_limit_and_add_up(life, rank):
    before, originals = life.made()
    was, limit = lives.bits(before), LIMITS[life.dtype]

    after = refit(before, rank=rank, max_forgetting=limit)

    assert lives.bits(before) == was
    assert [task.name for task in after.tasks] == [task.name for task in before.tasks]
    assert len(after.segments) == 1
    moved = distances(before, after)
    assert {task.name: task.forgotten for task in after.tasks} == pytest.approx(moved, abs=1e-6)
    assert max(moved.values()) <= limit + lives.FLOOR
    truth = lives.errors(after, originals)
    for old, new in zip(before.tasks, after.tasks, strict=True):
        assert new.error == pytest.approx(old.error + new.forgotten, abs=1e-15)
        assert new.error_kind == ("bound" if new.forgotten else "measured")
        assert truth[new.name] <= new.error + lives.FLOOR


@given(life=lives.drawn(), rank=st.sampled_from([1, 3, 5, 12]))
def test_rank_alone_is_the_direct_fit_of_what_is_stored(life, rank):
    """Not an approximation to compressing the reconstructions, but that very thing, up to the rounding of entries."""
    before, _ = life.made()
    after = refit(before, rank=rank)
    direct = fit(list(as_stored(before).values()), Goal(rank=rank, dtype=life.dtype))
    for task, other in zip(after.tasks, direct.tasks, strict=True):
        slack = max(1e-6, lives.STEP[life.dtype] / 8)
        assert task.forgotten == pytest.approx(other.error * other.norm / (task.norm or 1.0), abs=slack)
    widths = [s.ranks for s in after.slots.values()]
    assert widths == [s.ranks for s in (direct.slots[path] for path in after.slots)]
    assert {int(c.counts[:, 1:].sum()) for s in after.segments for c in s.columns.values()} == {0}


@pytest.mark.parametrize("dtype", lives.DTYPES, ids=str)
def test_no_budget_is_passed_over_many_refits(dtype):
    """Against the originals, while tasks come and go; and once it is spent, a refit says so and does nothing."""
    error, limit = 0.05, 0.06
    adapters = planted.adapters(count=24, seed=4)
    originals = {a.name: a for a in adapters}
    held = fit(adapters[:6], Goal(max_error=error, dtype=dtype))
    for i in range(6, 24, 3):
        held = add(held, adapters[i : i + 3], max_error=error)
        held = refit(held, max_forgetting=limit, spend=0.5)
        held = remove(held, [held.tasks[i % 5].name])
    truth = lives.errors(held, {task.name: originals[task.name] for task in held.tasks})
    for task in held.tasks:
        assert truth[task.name] <= task.error + lives.FLOOR <= error + limit + 2 * lives.FLOOR
        assert task.forgotten <= limit + 1e-9
    # the bound would be no news if nothing were ever lost
    assert max(task.forgotten for task in held.tasks) > limit / 2

    was = lives.bits(held)
    spent = max(task.forgotten for task in held.tasks)
    with pytest.raises(ArgumentError, match=r"refit: max_forgetting=.* cannot be met: task '.*nothing was changed"):
        refit(held, max_forgetting=spent * (1 - 1e-3))
    assert lives.bits(held) == was


def test_what_became_common_is_shared():
    """Tasks that came later share directions that the bases lack; they took private ends, and a refit shares them."""
    early, late = (planted.adapters(count=c, seed=c, shape=(80, 112), noise=0.001) for c in (8, 30))
    late = [Adapter(f"late {a.name}", a.slots) for a in late]
    held = add(fit(early, Goal(max_error=0.01)), late, max_error=0.01)
    assert private(held) > 200
    after = refit(held, max_forgetting=0.01)
    assert private(after) < 0.1 * private(held)
    assert collection_bytes(after) < 0.5 * collection_bytes(held)
    assert all(min(s.ranks) >= 12 for s in after.slots.values())


def private(collection):
    return sum(int(c.counts[:, 1:].sum()) for s in collection.segments for c in s.columns.values())


def test_bases_that_no_longer_pay_go():
    """Where nothing is shared any more, every task is on its own again."""
    shared = planted.adapters(count=12, noise=0.001, slots=1)
    apart = [
        Adapter(f"own {a.name}", a.slots)
        for a in planted.adapters(count=2, shared_out=0, shared_in=0, noise=0.0, slots=1, seed=5)
    ]
    held = add(fit(shared, Goal(max_error=0.01)), apart, max_error=0.01)
    after = refit(remove(held, [a.name for a in shared]), max_forgetting=0.01)
    assert after.slots[PATH].ranks == (0, 0)


@pytest.mark.parametrize("goal", [{"max_forgetting": 0.02}, {"rank": 6, "max_forgetting": 0.02}], ids=["bytes", "rank"])
def test_many_private_ends_are_sketched(goal, monkeypatch):
    """More ends than a Gram is worth: the range comes from a sketch, and the losses are measured all the same."""
    sketched = []
    by_sketch = ranges._by_sketch
    monkeypatch.setattr(ranges, "_by_sketch", lambda *a, **o: sketched.append(a[0].x.shape[0]) or by_sketch(*a, **o))
    adapters = planted.adapters(count=70, shape=(90, 110), ranks=(14,), shared_out=20, shared_in=20, slots=1, noise=0.1)
    held = fit(adapters[:2], Goal(rank=1))
    held = add(held, adapters[2:], max_error=0.01)
    after = refit(held, **goal)
    assert max(sketched) > 800
    moved = distances(held, after)
    assert {task.name: task.forgotten for task in after.tasks} == pytest.approx(moved, abs=1e-6)
    assert max(moved.values()) <= 0.02 + lives.FLOOR


@pytest.mark.parametrize("goal", [{"rank": 5}, {"max_forgetting": 0.8}, {"rank": 5, "max_forgetting": 0.8}], ids=str)
@pytest.mark.parametrize("width", lives.WIDTHS, ids=str)
def test_what_is_stored_keeps_its_width(width, goal):
    held = fit(planted.adapters(count=12), Goal(max_error=lives.ROOMY[width], dtype=width))
    after = refit(held, **goal)
    assert after.widths == held.widths
    stored = [t for s in after.slots.values() for t in (s.u, s.v) if t.shape[1]]
    for segment in after.segments:
        for columns in segment.columns.values():
            ends = {name: rows for name, rows in columns.tensors().items() if name != "weights"}
            stored += [rows for rows in ends.values() if rows.shape[0] and rows.shape[1]]
    assert stored
    # coded ends are whole numbers of 8 bits in memory, or of 16, and what is shared beside them has 8
    wanted = {8, 16} if width == CODED else {width}
    assert {rows.bits if isinstance(rows, Packed) else rows.dtype for rows in stored} <= wanted


def test_again_at_the_same_rank_loses_nothing():
    held, _ = lives.lived(Goal(max_error=0.02), lives.some(12))
    once = refit(held, rank=5)
    twice = refit(once, rank=5)
    # float32 numbers of two collections: each entry of a basis and of a core is rounded anew
    assert max(distances(once, twice).values()) < 1e-6


def test_order_of_tasks_and_segments_changes_nothing():
    adapters = planted.adapters(count=10)
    held = fit(adapters[:4], Goal(max_error=0.02))
    one = refit(add(add(held, adapters[4:7], max_error=0.02), adapters[7:], max_error=0.02), rank=5)
    two = refit(add(add(held, adapters[7:], max_error=0.02), adapters[4:7], max_error=0.02), rank=5)
    assert max(distances(one, two).values()) < 1e-5


@pytest.mark.parametrize("limit", [0.8, 1e-4])
def test_a_slot_that_no_task_has_goes(limit):
    """Whether or not new bases pay."""
    held = fit(lives.some(8), Goal(max_error=0.1))
    after = refit(remove(held, ["task 6", "task 7"]), max_forgetting=limit)
    assert (after.slots[PATH] is held.slots[PATH]) == (limit == 1e-4)
    assert list(held.slots) == [*after.slots, "layers.9.new"]


def test_zero_tasks_stay_zero():
    held, _ = lives.lived(Goal(max_error=0.02), lives.some(10))
    for goal in ({"rank": 3}, {"max_forgetting": 0.1}, {"rank": 3, "max_forgetting": 0.1}):
        after = refit(held, **goal)
        assert (after.task("task 1").error, after.task("task 1").forgotten) == (0.0, 0.0)
        assert not planted.stored_delta(after, PATH, "task 1").any()
    nothing = remove(held, [task.name for task in held.tasks if task.norm > 0])
    assert refit(nothing, max_forgetting=0.1).tasks == nothing.tasks


def test_progress_counts_slots():
    held, _ = lives.lived(Goal(max_error=0.02), lives.some(10))
    for goal in ({"rank": 3}, {"max_forgetting": 0.1}, {"rank": 3, "max_forgetting": 0.1}):
        calls = []
        refit(held, **goal, report=lambda *call, calls=calls: calls.append(call))
        assert calls == [("fit", i, 3) for i in range(4)]


WRONG = {
    "no-goal": ({}, "refit: give rank, max_forgetting, max_bytes or several"),
    "rank": ({"rank": 0}, "refit: rank is at least 1; got 0"),
    "zero": ({"max_forgetting": 0.0}, "refit: max_forgetting is between 0 and 1; got 0"),
    "all": ({"max_forgetting": 1.0}, "refit: max_forgetting is between 0 and 1; got 1"),
    "nan": ({"max_forgetting": float("nan")}, "refit: max_forgetting is between 0 and 1; got nan"),
    "rounding": ({"max_forgetting": 1e-8, "rank": 3}, "max_forgetting=1e-08 cannot be met: task .*, rounding to"),
}


@pytest.mark.parametrize(("goal", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_refused_changes_nothing(goal, words):
    held = fit(planted.adapters(count=5), Goal(max_error=0.05, dtype=torch.float16))
    was = lives.bits(held)
    with pytest.raises(ArgumentError, match=words):
        refit(held, **goal)
    assert lives.bits(held) == was


def test_a_collection_without_tasks_is_refused():
    held = fit(planted.adapters(count=2), Goal(rank=3))
    with pytest.raises(ArgumentError, match="refit: the collection has no task; add one first"):
        refit(remove(held, ["task 0", "task 1"]), rank=2)


def test_what_needs_no_new_bases_keeps_its_own():
    """Just fitted: new bases would take as many bytes and a record of what each task lost for them."""
    held = fit(planted.adapters(count=20, slots=1, noise=0.05), Goal(max_error=0.1))
    same = refit(held, max_forgetting=0.01)
    assert collection_bytes(same) == collection_bytes(held)
    assert [task.forgotten for task in same.tasks] == [0.0] * 20
    for i in range(20):
        assert np.array_equal(planted.stored_delta(same, PATH, i), planted.stored_delta(held, PATH, i))
