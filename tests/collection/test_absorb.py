"""A hundred adapters come, one after another: bases follow, and no task passes its budget."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import lives
import planted
import pytest
import torch

from loraspan.adapters.base import Adapter
from loraspan.collection import absorb as module
from loraspan.collection.absorb import absorb
from loraspan.collection.fit import Goal, fit
from loraspan.collection.layout import collection_bytes
from loraspan.collection.refit import refit
from loraspan.collection.rows import CODED
from loraspan.collection.segments import merge
from loraspan.collection.update import add
from loraspan.errors import ArgumentError, MismatchError

ERROR = FORGETTING = 0.05


@pytest.fixture
def tried(monkeypatch):
    """The numbers of tasks at which a refit was tried."""
    counts = []
    honest = module.refit
    monkeypatch.setattr(module, "refit", lambda c, **o: counts.append(len(c.tasks)) or honest(c, **o))
    return counts


def begun(adapters, dtype=torch.float32):
    collection = fit(adapters, Goal(max_error=ERROR, dtype=dtype))
    return replace(collection, fitted=collection_bytes(collection))


@pytest.mark.parametrize("dtype", [*lives.DTYPES, 8, CODED], ids=str)
def test_a_hundred_absorbed_one_by_one(dtype, tried):
    """Families of tasks come one after the other, so that old bases no longer serve; all are checked in the end."""
    families = [planted.adapters(count=24, shape=(64, 72), seed=s, slots=1, noise=0.005) for s in range(5)]
    adapters = [Adapter(f"{a.name} of {i}", a.slots) for i, family in enumerate(families) for a in family]
    held = begun(adapters[:10], dtype)
    for i, adapter in enumerate(adapters[10:]):
        held = joined(absorb(held, [adapter], max_error=ERROR, max_forgetting=FORGETTING))
        if i % 20 == 13:  # refits that nobody needs spend of the same budget
            held = refit(held, max_forgetting=FORGETTING, spend=0.3)
    assert len(held.tasks) == 120
    truth = lives.errors(held, {a.name: a for a in adapters})
    for task in held.tasks:
        assert truth[task.name] <= task.error + lives.FLOOR
        assert task.error <= ERROR + FORGETTING + 1e-9
        assert task.forgotten <= FORGETTING + 1e-9
    oldest = [adapter.name for adapter in adapters[:10]]
    assert max(truth[name] for name in oldest) <= ERROR + FORGETTING + lives.FLOOR
    # the collection grows by half between two tries
    assert 1 <= len(tried) <= 10
    if dtype == CODED:
        # columns of so few bytes leave a basis nothing to save here: nobody forgets anything
        assert {task.error_kind for task in held.tasks} == {"measured"}
        return
    assert {held.task(name).error_kind for name in oldest} == {"bound"}
    assert max(task.forgotten for task in held.tasks) > FORGETTING / 2
    alone = add(begun(adapters[:10], dtype), adapters[10:], max_error=ERROR)
    assert collection_bytes(held) < 0.9 * collection_bytes(alone)


def joined(collection):
    """In one segment, as a store joins many small ones."""
    return replace(collection, segments=(merge(collection.segments),))


def test_many_at_once_are_one_change(tried):
    adapters = planted.adapters(count=40, noise=0.001)
    held = absorb(begun(adapters[:4]), adapters[4:], max_error=ERROR, max_forgetting=FORGETTING)
    assert tried == [40]
    truth = lives.errors(held, {a.name: a for a in adapters})
    assert max(truth.values()) <= ERROR + FORGETTING
    assert [task.name for task in held.tasks] == [adapter.name for adapter in adapters]


def test_a_refit_that_saves_little_is_not_taken(tried):
    """Tasks that share nothing: it is tried now and then, and the bases and all tasks stay as they are."""
    adapters = planted.adapters(count=30, shared_out=0, shared_in=0, noise=0.0, slots=1)
    first = held = begun(adapters[:4])
    for adapter in adapters[4:]:
        held = absorb(held, [adapter], max_error=ERROR, max_forgetting=FORGETTING)
    assert held.slots is first.slots
    assert held.segments[0] is first.segments[0]
    assert {task.error_kind for task in held.tasks} == {"measured"}
    assert 2 <= len(tried) <= 6
    assert min(b / a for a, b in pairwise(tried)) > 1.3


def test_a_collection_that_was_never_fitted_counts_from_now(tried):
    adapters = planted.adapters(count=6)
    held = replace(begun(adapters[:5]), fitted=0)
    after = absorb(held, adapters[5:], max_error=ERROR, max_forgetting=FORGETTING)
    assert tried == []
    assert after.fitted == collection_bytes(held)


def test_bytes_demand_a_refit(tried):
    """Past its bytes a collection is fitted anew, with all that may be forgotten if half of it is not enough."""
    adapters = planted.adapters(count=16, noise=0.001, shape=(80, 112))
    first = begun(adapters[:8])
    late = [Adapter(f"late {a.name}", a.slots) for a in planted.adapters(count=8, seed=1, noise=0.001, shape=(80, 112))]
    held = add(first, [*adapters[8:], *late[:-1]], max_error=ERROR)
    held = replace(held, fitted=collection_bytes(held))
    free = add(held, late[-1:], max_error=ERROR)
    limit = int(0.8 * collection_bytes(free))
    after = absorb(held, late[-1:], max_error=ERROR, max_forgetting=FORGETTING, max_bytes=limit)
    assert collection_bytes(after) <= limit
    assert after.fitted == collection_bytes(after)
    assert tried
    truth = lives.errors(after, {a.name: a for a in [*adapters, *late]})
    assert max(truth.values()) <= ERROR + FORGETTING
    was = lives.bits(held)
    with pytest.raises(
        ArgumentError, match=r"absorb: max_bytes=1,000 cannot be met: .* would take .*nothing was changed"
    ):
        absorb(held, late[-1:], max_error=ERROR, max_forgetting=FORGETTING, max_bytes=1000)
    assert lives.bits(held) == was


def test_a_spent_budget_keeps_the_bases():
    """Where nothing more may be forgotten, tasks still come, on the bases that are there."""
    adapters = planted.adapters(count=30, noise=0.02)
    held = begun(adapters[:4])
    worn = tuple(replace(task, forgotten=FORGETTING) for task in held.segments[0].tasks)
    held = replace(held, segments=(replace(held.segments[0], tasks=worn),))
    after = absorb(held, adapters[4:], max_error=ERROR, max_forgetting=FORGETTING)
    assert after.slots is held.slots
    assert len(after.tasks) == 30


@pytest.mark.parametrize("limit", [0.0, 1.0, -0.1, float("nan")])
def test_a_limit_out_of_range_is_refused_whether_or_not_a_refit_is_due(limit):
    adapters = planted.adapters(count=40)
    held = begun(adapters[:30])
    for more in (adapters[30:31], adapters[30:]):
        with pytest.raises(ArgumentError, match="max_forgetting is between 0 and 1"):
            absorb(held, more, max_error=ERROR, max_forgetting=limit)


def test_what_adding_refuses_is_refused():
    adapters = planted.adapters(count=4)
    held = begun(adapters)
    with pytest.raises(MismatchError, match="'task 2'"):
        absorb(held, adapters[2:3], max_error=ERROR, max_forgetting=FORGETTING)
    with pytest.raises(ArgumentError, match="max_error is between 0 and 1"):
        absorb(held, adapters[2:3], max_error=2.0, max_forgetting=FORGETTING)


def test_progress_is_told():
    adapters = planted.adapters(count=30, noise=0.001)
    calls = []
    absorb(
        begun(adapters[:4]),
        adapters[4:],
        max_error=ERROR,
        max_forgetting=FORGETTING,
        report=lambda *call: calls.append(call),
    )
    assert calls[:3] == [("add", i, 2) for i in range(3)]
    assert {stage for stage, _, _ in calls[3:]} == {"fit"}
    assert (calls[3], calls[-1]) == (("fit", 0, 2), ("fit", 2, 2))
