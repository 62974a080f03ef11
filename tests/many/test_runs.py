"""A run in groups meets its goals, says the errors that are there, and finds what a fit of all at once finds."""

from __future__ import annotations

import numpy as np
import planted
import pytest
import torch

import loraspan
from loraspan import store
from loraspan.adapters import peft
from loraspan.adapters.base import Adapter, Slot
from loraspan.collection.layout import columns_bytes
from loraspan.many import publish
from many_runs import COUNT, cut_by, run, write

GOALS = {
    "rank": {"rank": 6},
    "energy": {"energy": 0.99},
    "error": {"max_error": 0.05},
    "small-error-f16": {"max_error": 0.01, "dtype": torch.float16},
    "error-int8": {"max_error": 0.05, "dtype": "int8"},
    "rank-int4": {"rank": 6, "dtype": "int4"},
}
CASES = {
    "shared": {},
    "input-shared": {"shared_out": 0},
    "none-shared": {"shared_out": 0, "shared_in": 0, "noise": 0.0},
}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    cut_by(5, monkeypatch)


def measured(space, adapter):
    """The relative error of a task as rebuilt, in float64."""
    slots = space.reconstruct(adapter.name).slots
    return planted.relative_error(adapter, lambda path: planted.delta(slots[path]))


@pytest.mark.parametrize("goal", GOALS.values(), ids=GOALS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_goals_are_met_and_errors_are_what_they_are(case, goal, tmp_path):
    adapters = write(tmp_path / "in", **case)
    made = run(tmp_path / "in", tmp_path / "out", **goal)
    space = loraspan.open(tmp_path / "out")
    assert (made.tasks, made.errors, made.nbytes) == (space.tasks, space.errors, space.nbytes)
    assert len(space.collection.segments) > 1
    assert sorted(space.tasks) == sorted(str(i).zfill(3) for i in range(COUNT))
    truth = {f"{i:03d}": measured(space, Adapter(f"{i:03d}", a.slots)) for i, a in enumerate(adapters)}
    # factors are rebuilt in float32, and summed over at most 32 columns
    assert space.errors == pytest.approx(truth, abs=1e-6)
    if "max_error" in goal:
        assert max(truth.values()) <= goal["max_error"] * (1 + 1e-6)
    if "rank" in goal:
        assert {s.ranks for s in space.collection.slots.values()} == {(6, 6)}
    if "energy" in goal:
        norms = np.array([task.norm for task in space.collection.tasks])
        errors = np.array([truth[task.name] for task in space.collection.tasks])
        assert np.sum(np.square(errors * norms)) <= (1 - goal["energy"] + 1e-9) * np.sum(norms**2)


@pytest.mark.parametrize("rank", [3, 6])
def test_bases_hold_what_those_of_all_at_once_hold(rank, shared, tmp_path):
    """Within one per cent of the energy lost, though groups are small and the sample is smaller than all."""
    root, _ = shared
    run(root, tmp_path / "out", rank=rank)
    streamed = loraspan.open(tmp_path / "out").errors
    at_once = loraspan.compress(root, rank=rank).errors
    kept = [1 - np.mean(np.square(list(errors.values()))) for errors in (streamed, at_once)]
    assert kept[0] >= kept[1] - 0.01 * (1 - kept[1]) - 1e-4


def test_sharing_is_found_across_groups(tmp_path, monkeypatch):
    """A basis that no group pays for alone: one adapter a group, all of one input side."""
    write(tmp_path / "in", shared_out=0, shared_in=4, noise=1e-4, ranks=(3,), count=48, shape=(20, 200))
    cut_by(1, monkeypatch)
    run(tmp_path / "in", tmp_path / "out", max_error=0.01)
    space = loraspan.open(tmp_path / "out")
    assert len(space.collection.segments) > 4
    for path, slot in space.collection.slots.items():
        assert slot.v.shape[1] >= 4
        private = sum(int(columns.counts[:, [1, 3]].sum()) for _, columns in space.collection.columns_of(path))
        assert private == 0


def test_where_nothing_is_shared_no_bases_are_stored(tmp_path):
    write(tmp_path / "in", **CASES["none-shared"])
    space = run(tmp_path / "in", tmp_path / "out")
    assert all(s.u.shape[1] == s.v.shape[1] == 0 for s in space.collection.slots.values())
    assert "on its own" in space.summary


def test_private_columns_are_no_more_than_plain_svd_takes(shared, tmp_path):
    root, adapters = shared
    run(root, tmp_path / "out")
    space = loraspan.open(tmp_path / "out")
    plain = sum(
        int(columns_bytes([0, 0, 0, slot.lora_rank], n=40, d=56, k_out=0, k_in=0, dtype=torch.float32))
        for adapter in adapters
        for slot in adapter.slots.values()
    )
    stored = sum(line.nbytes for line in space.report().tasks)
    assert stored < plain


def test_slots_that_few_tasks_have_and_tasks_of_zeros(tmp_path):
    adapters = planted.adapters(count=12)
    extra = planted.adapters(count=2, slots=1, seed=9)
    for i in (3, 7):
        adapters[i] = Adapter("x", {**adapters[i].slots, "late": extra[i // 7].slots["layers.0.q_proj"]})
    zeros = {path: Slot(slot.down, torch.zeros_like(slot.up), slot.scale) for path, slot in adapters[5].slots.items()}
    adapters[5] = Adapter("zero", zeros)
    for i, adapter in enumerate(adapters):
        peft.write(adapter, tmp_path / "in" / f"{i:03d}")
    for number, goal in enumerate(({"max_error": 0.05}, {"rank": 5}, {"energy": 0.9})):
        run(tmp_path / "in", tmp_path / f"out{number}", **goal)
        space = loraspan.open(tmp_path / f"out{number}")
        assert set(space.reconstruct("003").slots) == set(adapters[3].slots)
        for i in (3, 5, 7, 8):
            if i != 5:
                truth = measured(space, Adapter(f"{i:03d}", adapters[i].slots))
                assert space.errors[f"{i:03d}"] == pytest.approx(truth, abs=1e-6)
        assert space.errors["005"] == 0
        if "rank" in goal:
            assert space.collection.slots["late"].u.shape[1] == 5


def test_summaries_are_widened_until_they_hold_the_energy(shared, tmp_path, monkeypatch):
    """A sample that sees too little is found out by what all tasks lose."""
    from loraspan.many import run as runs

    monkeypatch.setattr(runs, "widths_for", lambda ranks: dict.fromkeys(ranks, 2))
    root, _ = shared
    run(root, tmp_path / "out", energy=0.9)
    space = loraspan.open(tmp_path / "out")
    lost = sum((space.errors[f"{i:03d}"]) ** 2 * t.norm**2 for i, t in enumerate(space.collection.tasks))
    assert lost <= 0.1 * sum(t.norm**2 for t in space.collection.tasks)
    assert all(s.u.shape[1] > 2 for s in space.collection.slots.values())


@pytest.mark.parametrize(("options", "joined"), [({}, True), ({"dtype": "coded", "max_error": 0.2}, False)])
def test_pieces_are_joined_as_far_as_memory_goes(tmp_path, monkeypatch, options, joined):
    """Those of a run of many groups; of coded ones none, for what they unpack to stays."""
    write(tmp_path / "in")
    cut_by(1, monkeypatch)
    space = run(tmp_path / "in", tmp_path / "a", **options)
    assert (len(space.collection.segments) < COUNT) == joined
    monkeypatch.setattr(publish, "_SHARE", 10**9)
    alone = run(tmp_path / "in", tmp_path / "b", **options)
    assert len(alone.collection.segments) == COUNT
    assert alone.errors == space.errors
    assert not store.verify(tmp_path / "b")
