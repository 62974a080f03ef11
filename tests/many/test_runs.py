"""A run in groups meets its goals, says the errors that are there, and finds what a fit of all at once finds."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import planted
import pytest
import torch

import loraspan
from loraspan.adapters import peft
from loraspan.adapters.base import Adapter, Slot
from loraspan.collection.layout import columns_bytes
from loraspan.errors import ArgumentError, FormatError, MismatchError, NotFiniteError, StoreError
from many_runs import COUNT, cut_by, files_of, run, write

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


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return root, write(root)


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


def test_files_are_closed_and_groups_forgotten(shared, tmp_path):
    """Not one descriptor stays open for a source, and no more maps than a group has."""
    root, _ = shared
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir()))
    seen = []

    def progress(_stage, _done, _total):
        mapped = Path("/proc/self/maps").read_text().count(str(root))
        seen.append((len(list(descriptors.iterdir())) - before, mapped))

    run(root, tmp_path / "out", progress=progress)
    assert max(more for more, _ in seen) <= 3
    # slots of a group hold on to it until its result is there
    assert max(mapped for _, mapped in seen) <= 5


def test_progress_counts_bytes(shared, tmp_path):
    root, adapters = shared
    seen = {}
    run(root, tmp_path / "out", progress=lambda *step: seen.setdefault(step[0], []).append(step[1:]))
    assert list(seen) == ["read", "summarize", "express"]
    total = sum(adapter.nbytes for adapter in adapters)
    for stage in ("summarize", "express"):
        done = [step[0] for step in seen[stage]]
        assert done[0] == 0
        assert done == sorted(set(done))
        assert seen[stage][-1] == (total, total)
        assert len(done) > 2


def test_memory_that_is_too_little_says_what_would_do(shared, tmp_path):
    root, _ = shared
    with pytest.raises(ArgumentError, match="the least is") as refused:
        run(root, tmp_path / "out", rank=4, memory=1)
    assert list(tmp_path.iterdir()) == []
    least = int(str(refused.value).rpartition(" ")[2].replace(",", ""))
    with pytest.raises(ArgumentError, match="the least is"):
        run(root, tmp_path / "out", rank=4, memory=least - 1)
    # with the widths known, the least may be more; what it says then is the last word
    try:
        run(root, tmp_path / "out", rank=4, memory=least)
    except ArgumentError as error:
        shutil.rmtree(tmp_path / "out.progress", ignore_errors=True)
        run(root, tmp_path / "out", rank=4, memory=int(str(error).rpartition(" ")[2].replace(",", "")))
    assert len(loraspan.open(tmp_path / "out").tasks) == COUNT


@pytest.mark.parametrize("memory", ["", "1 XB", "-1", 0, -5, True, 1.5, "GB"])
def test_a_memory_that_is_none_is_refused(memory, shared, tmp_path):
    with pytest.raises(ArgumentError, match=r"memory.* bytes"):
        run(shared[0], tmp_path / "out", memory=memory)
    assert list(tmp_path.iterdir()) == []


# -- what does not do ----------------------------------------------------------------------------------------------


def spoil_damaged(root):
    path = root / "003" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def spoil_nan(root):
    from safetensors.torch import load_file, save_file

    path = root / "005" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, path)


def spoil_shape(root):
    shutil.rmtree(root / "000")
    peft.write(planted.adapters(count=1, shape=(40, 57))[0], root / "000")


def spoil_base(root):
    for folder in sorted(root.iterdir()):
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "other" if folder.name == "000" else "usual"
        (folder / "adapter_config.json").write_text(json.dumps(config))


def spoil_kind(root):
    config = json.loads((root / "011" / "adapter_config.json").read_text())
    (root / "011" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))


SPOILT = {
    "damaged": (spoil_damaged, "003", FormatError, "truncated"),
    "nan": (spoil_nan, "005", NotFiniteError, "NaN"),
    "shape": (spoil_shape, "000", MismatchError, r"in most it is linear \[40, 56\]"),
    "base": (spoil_base, "000", MismatchError, "base model 'other', most are for 'usual'"),
    "kind": (spoil_kind, "011", Exception, "IA3"),
}


@pytest.mark.parametrize(("spoil", "name", "kind", "reason"), SPOILT.values(), ids=SPOILT.keys())
def test_a_bad_adapter_stops_the_run_or_is_set_aside(spoil, name, kind, reason, tmp_path):
    write(tmp_path / "in")
    spoil(tmp_path / "in")
    with pytest.raises(kind, match=reason):
        run(tmp_path / "in", tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    space = run(tmp_path / "in", tmp_path / "out", on_error="skip")
    assert len(space.tasks) == COUNT - 1
    assert [one.source for one in space.aside] == [str(tmp_path / "in" / name)]
    assert re.search(reason, space.aside[0].reason)
    assert name not in space.tasks
    if spoil is not spoil_nan:
        # who is not there from the beginning leaves no trace
        shutil.rmtree(tmp_path / "in" / name)
        run(tmp_path / "in", tmp_path / "without")
        assert files_of(tmp_path / "without") == files_of(tmp_path / "out")


def test_sources_that_name_nothing_or_one_name_twice(shared, tmp_path):
    root, _ = shared
    sources = [root / "000", root / "nowhere", root / "001", root / "000"]
    with pytest.raises(FormatError, match="nowhere"):
        run(sources, tmp_path / "out")
    with pytest.raises(MismatchError, match="both be task '000'"):
        run([root / "000", root / "000"], tmp_path / "out")
    space = run(sources, tmp_path / "out", on_error="skip")
    assert len(space.tasks) == 2
    assert [one.reason.split(":")[0] for one in space.aside] == [
        str(root / "nowhere"),
        "two adapters would both be task '000'",
    ]
    named = run({"a": root / "000", "b": root / "nowhere"}, tmp_path / "named", on_error="skip")
    assert named.tasks == ["a"]


def test_nobody_left_is_an_error(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(ArgumentError, match="there is no adapter to compress: 1 were set aside"):
        run(tmp_path / "in", tmp_path / "out", on_error="skip")
    adapters = planted.adapters(count=1)
    slots = {path: Slot(slot.down * float("nan"), slot.up, 1.0) for path, slot in adapters[0].slots.items()}
    peft.write(Adapter("bad", slots), tmp_path / "bad")
    with pytest.raises(ArgumentError, match="there is no adapter to compress"):
        run(tmp_path / "bad", tmp_path / "out", on_error="skip")
    assert not (tmp_path / "out").exists()


def test_adapters_in_memory_and_wrong_words_are_refused(shared, tmp_path):
    root, adapters = shared
    with pytest.raises(ArgumentError, match="'task 0', which is in memory already"):
        run(adapters, tmp_path / "out", on_error="skip")
    with pytest.raises(ArgumentError, match="on_error is 'stop' or 'skip'; got 'ignore'"):
        run(root, tmp_path / "out", on_error="ignore")
    with pytest.raises(ArgumentError, match="below what rounding"):
        run(root, tmp_path / "out", max_error=1e-5, dtype=torch.bfloat16)


def test_what_is_there_is_not_written_over(shared, tmp_path):
    root, _ = shared
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(StoreError, match="is no store"):
        run(root, tmp_path / "other")
    run(root, tmp_path / "out", rank=2)
    with pytest.raises(StoreError, match="a store already"):
        run(root, tmp_path / "out", rank=3)
    run(root, tmp_path / "out", rank=3, overwrite=True)
    assert {s.u.shape[1] for s in loraspan.open(tmp_path / "out").collection.slots.values()} == {3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_single_adapter_is_enough(shared, tmp_path):
    root, _ = shared
    assert run(root / "000", tmp_path / "out", rank=2).tasks == ["000"]
