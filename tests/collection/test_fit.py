"""A fit meets its goal, says the error that is there, and depends on dW alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import planted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraspan.adapters.base import Adapter, Slot, Source
from loraspan.collection.fit import Goal, fit
from loraspan.collection.rebuild import rebuild
from loraspan.errors import ArgumentError, MismatchError, NotFiniteError, UnknownTaskError

CASES = {
    "both-shared": {},
    "none-shared": {"shared_out": 0, "shared_in": 0, "noise": 0.0},
    "input-shared": {"shared_out": 0, "count": 24},
    "output-shared": {"shared_in": 0, "count": 24, "shape": (56, 40)},
    "half-precision": {"dtype": torch.bfloat16, "noise": 0.2},
    "one-adapter": {"count": 1},
    "rank-one": {"ranks": (1,)},
    "more-rows-than-columns": {"count": 30, "shape": (12, 10)},
}
GOALS = {
    "rank": Goal(rank=6),
    "rank-bf16": Goal(rank=5, dtype=torch.bfloat16),
    "rank-f16": Goal(rank=7, dtype=torch.float16, refine=0),
    "energy": Goal(energy=0.9),
    "all-energy": Goal(energy=1.0),
    "error": Goal(max_error=0.3),
    "small-error": Goal(max_error=0.02),
    "small-error-f16": Goal(max_error=0.02, dtype=torch.float16),
    "lossless": Goal(max_error=1e-6),
}


def measured(collection, adapters):
    """Every task's error by the definition of the stored columns, in float64."""
    return [
        planted.relative_error(adapter, lambda path, i=i: planted.stored_delta(collection, path, i))
        for i, adapter in enumerate(adapters)
    ]


@pytest.mark.parametrize("goal", GOALS.values(), ids=GOALS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_reported_error_is_the_measured_one(case, goal):
    adapters = planted.adapters(**case)
    collection = fit(adapters, goal)
    truth = measured(collection, adapters)
    assert [task.error for task in collection.tasks] == pytest.approx(truth, abs=1e-6)
    if goal.max_error is not None:
        assert max(truth) <= goal.max_error * (1 + 1e-6)
    if goal.energy is not None:
        norms = np.array([task.norm for task in collection.tasks])
        assert np.sum(np.square(truth * norms)) <= (1 - goal.energy + 1e-10) * np.sum(norms**2)


@pytest.mark.parametrize("goal", GOALS.values(), ids=GOALS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rebuilt_adapter_is_what_is_stored(case, goal):
    adapters = planted.adapters(**case)
    collection = fit(adapters, goal)
    for i, adapter in enumerate(adapters):
        slots = rebuild(collection, adapter.name).slots
        assert slots.keys() == adapter.slots.keys()
        for path, slot in slots.items():
            stored = planted.stored_delta(collection, path, i)
            # factors rounded once to float32, sums over at most 128 terms
            assert np.linalg.norm(planted.delta(slot) - stored) <= 1e-6 * np.linalg.norm(stored)
            assert slot.scale == 1.0


@pytest.mark.parametrize(
    ("case", "form"),
    [("both-shared", 0), ("input-shared", 2), ("output-shared", 1), ("none-shared", 3)],
)
def test_form_follows_structure(case, form):
    """Where one end is shared and the other is not, most columns have that form; where none is, all are private."""
    collection = fit(planted.adapters(**CASES[case] | {"noise": 0.001}), Goal(max_error=0.05))
    counts = sum(held.counts.sum(axis=0) for held in collection.segments[0].columns.values())
    assert counts.argmax() == form


@pytest.mark.parametrize(
    "goal", [GOALS["rank"], GOALS["energy"], GOALS["small-error"]], ids=["rank", "energy", "error"]
)
def test_gauge_changes_nothing(goal):
    adapters = planted.adapters(dtype=torch.float64)
    rng = np.random.default_rng(5)
    turned = []
    for adapter in adapters:
        slots = {}
        for path, slot in adapter.slots.items():
            gauge = torch.from_numpy(rng.standard_normal((slot.lora_rank, slot.lora_rank)))
            slots[path] = Slot(torch.linalg.solve(gauge, slot.down) * 2.5, slot.up @ gauge, slot.scale / 2.5)
        turned.append(Adapter(adapter.name, slots))
    one, two = fit(adapters, goal), fit(turned, goal)
    for path, held in one.segments[0].columns.items():
        assert np.array_equal(held.counts, two.segments[0].columns[path].counts)
        for i in range(len(adapters)):
            a, b = (planted.stored_delta(c, path, i) for c in (one, two))
            assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a)


@pytest.mark.parametrize("goal", [GOALS["rank"], GOALS["small-error"]], ids=["rank", "error"])
def test_order_changes_nothing(goal):
    adapters = planted.adapters()
    order = np.random.default_rng(1).permutation(len(adapters))
    one, two = fit(adapters, goal), fit([adapters[i] for i in order], goal)
    for place, i in enumerate(order):
        for path in adapters[i].slots:
            a = planted.stored_delta(one, path, int(i))
            b = planted.stored_delta(two, path, place)
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


@given(
    count=st.integers(1, 7),
    n=st.integers(1, 30),
    d=st.integers(1, 30),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    max_error=st.sampled_from([0.5, 0.1, 1e-3, 1e-6]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_any_error_is_met_on_any_collection(count, n, d, ranks, max_error, seed):
    adapters = planted.adapters(count=count, shape=(n, d), ranks=ranks, shared_out=min(3, n), shared_in=0, seed=seed)
    collection = fit(adapters, Goal(max_error=max_error))
    truth = measured(collection, adapters)
    assert max(truth) <= max_error * (1 + 1e-6)
    assert [task.error for task in collection.tasks] == pytest.approx(truth, abs=1e-6)


def test_sketch_is_as_good_as_the_gram():
    """Many adapters at a small rank take the sketch; what it loses is what the best bases lose, nearly."""
    adapters = planted.adapters(count=300, shape=(64, 96), ranks=(4,), slots=1, noise=0.3)
    collection = fit(adapters, Goal(rank=6, refine=0))
    path = "layers.0.q_proj"
    scaled = [planted.delta(a.slots[path]) for a in adapters]
    scaled = [w / np.linalg.norm(w) for w in scaled]
    u = np.linalg.svd(np.hstack(scaled), full_matrices=False)[0][:, :6]
    v = np.linalg.svd(np.vstack(scaled), full_matrices=False)[2][:6].T
    best = np.mean([1 - np.square(u.T @ w @ v).sum() for w in scaled])
    ours = np.mean(np.square([task.error for task in collection.tasks]))
    assert best * (1 - 1e-6) <= ours <= best * 1.01


def test_joint_refinement_never_loses():
    adapters = planted.adapters(noise=0.5, count=20)
    errors = [np.mean(np.square([t.error for t in fit(adapters, Goal(rank=3, refine=i)).tasks])) for i in (0, 1, 4)]
    assert errors[1] < errors[0] * (1 - 1e-4)
    assert errors[2] <= errors[1] * (1 + 1e-9)


def test_weak_task_counts_as_much_as_strong_ones():
    """By energy alone a task a thousand times weaker than the rest would be lost."""
    adapters = planted.adapters(count=4, shared_out=0, shared_in=0, ranks=(2,), noise=0.0, slots=1)
    path, slot = next(iter(adapters[0].slots.items()))
    adapters[0] = Adapter("weak", {path: Slot(slot.down, slot.up, slot.scale * 1e-3)})
    errors = [task.error for task in fit(adapters, Goal(rank=6)).tasks]
    assert errors[0] < 0.75


def test_zero_and_rank_deficient_adapters():
    adapters = planted.adapters(count=5)
    path, slot = next(iter(adapters[0].slots.items()))
    zero = Adapter("zero", {path: Slot(slot.down, torch.zeros_like(slot.up), 0.7)})
    twice = Adapter("twice", {path: Slot(slot.down[[0, 0, 1]], slot.up[:, [0, 1, 2]], 0.7)})
    adapters += [zero, twice]
    for goal in (Goal(rank=6), Goal(energy=0.99), Goal(max_error=1e-6)):
        collection = fit(adapters, goal)
        assert collection.tasks[5].error == 0.0
        assert measured(collection, adapters[:5]) == pytest.approx(
            [task.error for task in collection.tasks[:5]], abs=1e-6
        )
        assert not rebuild(collection, "zero").slots[path].up.abs().sum() > 0
    assert fit([zero], Goal(rank=4)).slots[path].u.shape[1] == 0


def test_rank_stops_at_the_numerical_rank():
    adapters = planted.adapters(count=3, noise=0.0, shared_out=4, shared_in=4)
    collection = fit(adapters, Goal(rank=64))
    for space in collection.slots.values():
        assert space.u.shape[1] <= 12
        gram = space.v.double().T @ space.v.double()
        assert (gram - torch.eye(len(gram))).abs().max() < 1e-4
    assert max(task.error for task in collection.tasks) < 1e-5


def test_a_task_may_lack_slots():
    adapters = planted.adapters(count=4)
    path = "layers.1.q_proj"
    adapters[2] = Adapter("partial", {path: adapters[2].slots[path]})
    collection = fit(adapters, Goal(max_error=0.01))
    assert list(collection.segments[0].columns["layers.0.q_proj"].tasks) == [0, 1, 3]
    assert list(rebuild(collection, "partial").slots) == [path]


@pytest.mark.parametrize("factor", ["up", "down"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_names_adapter_slot_and_factor(factor, value):
    adapters = planted.adapters(count=3)
    slot = adapters[1].slots["layers.1.q_proj"]
    getattr(slot, factor)[0, 1] = value
    with pytest.raises(NotFiniteError, match=rf"'task 1'.*'{factor}'.*'layers.1.q_proj'"):
        fit(adapters, Goal(rank=2))


def test_what_is_not_finite_names_the_file():
    one = dataclasses.replace(planted.adapters(count=1)[0], source=Source(path="in/sql"))
    next(iter(one.slots.values())).up[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"'task 0' \(in/sql\)"):
        fit([one], Goal(rank=2))


@pytest.mark.parametrize("scale", [1e38, -1e60, 1e160, 1e300])
@pytest.mark.parametrize("goal", [Goal(rank=4), Goal(max_error=0.1), Goal(max_error=0.1, dtype=None), Goal(energy=0.9)])
def test_a_scale_past_float32_is_refused_by_name(scale, goal):
    """It came out as NaN, and an error that is NaN exceeds no limit."""
    adapters = planted.adapters(count=3)
    slots = dict(adapters[1].slots)
    slots["layers.1.q_proj"] = dataclasses.replace(slots["layers.1.q_proj"], scale=scale)
    adapters[1] = Adapter("task 1", slots)
    with pytest.raises(NotFiniteError, match=r"'task 1'.*'layers.1.q_proj'.*lora_alpha"):
        fit(adapters, goal)


@pytest.mark.parametrize("apart", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("goal", [Goal(rank=4), Goal(max_error=0.01, dtype=None), Goal(max_error=1e-6)])
def test_factors_that_almost_cancel(apart, goal):
    """As PEFT converts PiSSA adapters: what training changed is the difference of long factors."""
    rng = torch.Generator().manual_seed(3)
    adapters = []
    for i in range(4):
        down, up = torch.randn(4, 56, generator=rng), torch.randn(40, 4, generator=rng)
        moved_down = down + apart * torch.randn(4, 56, generator=rng)
        moved_up = up + apart * torch.randn(40, 4, generator=rng)
        slot = Slot(torch.cat([moved_down, down]), torch.cat([moved_up, -up], dim=1), 0.5)
        adapters.append(Adapter(f"task {i}", {"q": slot}))
    collection = fit(adapters, goal)
    errors = [task.error for task in collection.tasks]
    assert measured(collection, adapters) == pytest.approx(errors, abs=1e-6)


def test_factors_that_cancel_are_zero():
    slot = planted.adapters(count=1)[0].slots["layers.0.q_proj"]
    nothing = Slot(slot.down.repeat(2, 1), torch.cat([slot.up, -slot.up], dim=1), 0.5)
    collection = fit([Adapter("nothing", {"q": nothing})], Goal(max_error=1e-6))
    assert collection.tasks[0].error == collection.tasks[0].norm == 0.0


def test_mismatch_names_both_adapters():
    adapters = [*planted.adapters(count=2), Adapter("other", planted.adapters(count=1, shape=(41, 56))[0].slots)]
    with pytest.raises(MismatchError, match=r"'task 0'.*\[41, 56\] in 'other'"):
        fit(adapters, Goal(rank=2))


def test_duplicate_names_are_refused():
    with pytest.raises(MismatchError, match="2 adapters are named 'task 0'"):
        fit(planted.adapters(count=2) + planted.adapters(count=1), Goal(rank=2))


def test_error_below_rounding_is_refused():
    with pytest.raises(ArgumentError, match=r"below what rounding to bfloat16 allows"):
        fit(planted.adapters(), Goal(max_error=1e-4, dtype=torch.bfloat16))


WRONG_GOALS = [
    {},
    {"rank": 2, "energy": 0.5},
    {"rank": 0},
    {"energy": 0.0},
    {"energy": 1.5},
    {"max_error": 0.0},
    {"max_error": 1.0},
    {"rank": 2, "refine": -1},
    {"rank": 2, "dtype": torch.float64},
    {"rank": "2"},
    {"rank": 2.5},
    {"rank": True},
    {"energy": "0.9"},
    {"max_error": "0.1"},
    {"rank": 2, "refine": 1.5},
    {"rank": 2, "seed": None},
]


@pytest.mark.parametrize("wrong", WRONG_GOALS)
def test_goals_out_of_range_are_refused(wrong):
    with pytest.raises(ArgumentError, match="compress: "):
        Goal(**wrong)


def test_numbers_of_numpy_are_numbers():
    assert Goal(rank=np.int64(4), refine=np.int32(1)).rank == 4
    assert Goal(max_error=np.float32(0.5)).max_error == 0.5


def test_unknown_task_lists_some():
    with pytest.raises(UnknownTaskError, match=r"no task 'sql'.*'task 0'"):
        rebuild(fit(planted.adapters(count=2), Goal(rank=2)), "sql")
