"""A space that lives in a folder: every change is there at once, or not at all."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import lives
import planted
import pytest
import torch

import loraspan
from loraspan import store
from loraspan.adapters import Adapter, Slot, Source
from loraspan.errors import ArgumentError, MismatchError, NotFiniteError, StoreError, UnknownTaskError
from loraspan.store import files
from store.samples import current_bytes

PATH = "layers.0.q_proj"
MORE = planted.adapters(count=14)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A store of six tasks that was opened, changed and left."""
    path = tmp_path_factory.mktemp("template") / "team.span"
    loraspan.compress(MORE[:6], max_error=0.05).save(path)
    loraspan.open(path).add(MORE[6:8])
    return path


@pytest.fixture
def folder(tmp_path, template):
    """A copy of it."""
    return Path(shutil.copytree(template, tmp_path / "team.span"))


def contents(folder):
    """Every file but the empty one for locks, which comes with the first writer."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def held(space):
    return (lives.bits(space.collection), space.tasks, space.errors, space.nbytes, space.generation, space.summary)


CHANGES = {
    "add": lambda space, **o: space.add(MORE[8:10], **o),
    "add-a-slot": lambda space, **o: space.add(with_a_slot(MORE[8]), **o),
    "add-zeros": lambda space, **o: space.add(zeros(MORE[8]), **o),
    "remove": lambda space, **o: space.remove("task 1", "task 7", **o),
    "remove-a-segment": lambda space, **o: space.remove("task 6", "task 7", **o),
    "replace": lambda space, **o: space.replace(Adapter("task 2", MORE[9].slots), **o),
    "refit": lambda space, **o: space.refit(max_forgetting=0.02, **o),
    "refit-rank": lambda space, **o: space.refit(rank=4, **o),
    "refit-bytes": lambda space, **o: space.refit(max_bytes=space.nbytes - 1500, **o),
    "absorb": lambda space, **o: space.absorb(MORE[8:], **o),
    "rename": lambda space, **o: space.rename("task 3", "a new name", **o),
}


def with_a_slot(adapter):
    return Adapter(adapter.name, {**adapter.slots, "layers.9.new": lives.turned(adapter.slots[PATH])})


def zeros(adapter):
    return Adapter(adapter.name, {p: Slot(s.down, torch.zeros_like(s.up), s.scale) for p, s in adapter.slots.items()})


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_in_the_folder_at_once(folder, change):
    space = loraspan.open(folder)
    names = {path.name for path in folder.iterdir()}

    done = change(space)

    assert space.generation == 3
    again = loraspan.open(folder)
    assert (again.tasks, again.errors, again.summary) == (space.tasks, space.errors, space.summary)
    for task in space.collection.tasks:
        for path, slot in space.reconstruct(task.name).slots.items():
            other = again.reconstruct(task.name).slots[path]
            assert torch.equal(slot.up, other.up)
            assert torch.equal(slot.down, other.down)
    assert names <= {path.name for path in folder.iterdir()}
    assert (done.nbytes[1], done.tasks[1]) == (space.nbytes, len(space.tasks))
    assert space.nbytes == pytest.approx(current_bytes(folder), rel=0.01, abs=600)
    assert store.log(folder)[0].note == done.what
    assert not store.verify(folder)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_dry_run_says_the_same_and_changes_nothing(folder, change):
    space = loraspan.open(folder)
    before, files_before = held(space), contents(folder)
    dry = change(space, dry_run=True)
    assert held(space) == before
    assert contents(folder) == files_before
    done = change(space)
    for name in ("what", "tasks", "worst_error", "added", "removed", "refitted", "forgotten"):
        assert getattr(dry, name) == getattr(done, name)
    assert (dry.dry_run, done.dry_run) == (True, False)
    assert dry.nbytes[1] == pytest.approx(done.nbytes[1], rel=0.01, abs=600)
    assert "would change" in str(dry)
    assert "would change" not in str(done)


STEPS = [(name, "write") for name in CHANGES]
STEPS += [(name, step) for name in ("add", "refit", "rename") for step in ("create", "sync", "rename")]


@pytest.mark.parametrize(("name", "step"), STEPS)
def test_a_full_disk_leaves_space_and_folder_as_they_were(folder, name, step, monkeypatch):
    change = CHANGES[name]
    space = loraspan.open(folder)
    before, files_before = held(space), contents(folder)

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, step, full)
    with pytest.raises(StoreError, match="No space left on device"):
        change(space)
    monkeypatch.undo()
    assert held(space) == before
    there = contents(folder)
    assert {file: there[file] for file in files_before} == files_before
    assert loraspan.open(folder).tasks == before[1]
    # and the space goes on from where it was
    assert change(space).dry_run is False
    assert loraspan.open(folder).tasks == space.tasks
    assert not [file for file in contents(folder) if file.startswith(".tmp")]


def spoiled(adapter):
    slots = {path: Slot(slot.down.clone(), slot.up.clone(), slot.scale) for path, slot in adapter.slots.items()}
    slots[PATH].down[1, 2] = float("nan")
    return Adapter(adapter.name, slots)


WRONG = {
    "nan": (lambda s: s.add([MORE[8], spoiled(MORE[9])]), NotFiniteError, "'task 9'"),
    "taken": (lambda s: s.add(MORE[7]), MismatchError, "'task 7'"),
    "shape": (
        lambda s: s.absorb(Adapter("wide", planted.adapters(count=1, shape=(40, 57))[0].slots)),
        MismatchError,
        "'wide'",
    ),
    "goal": (lambda s: s.add(MORE[8], max_error=1.5), ArgumentError, "max_error is between 0 and 1; got 1.5"),
    "rounding": (lambda s: s.add(MORE[8], max_error=1e-9), ArgumentError, "below what rounding"),
    "remove": (lambda s: s.remove("task 1", "sql"), UnknownTaskError, "'sql'"),
    "rename": (lambda s: s.rename("sql", "x"), UnknownTaskError, "'sql'"),
    "rename-taken": (lambda s: s.rename("task 1", "task 2"), MismatchError, "'task 2'"),
    "replace": (lambda s: s.replace(MORE[9]), UnknownTaskError, "'task 9'"),
    "refit": (lambda s: s.refit(), ArgumentError, "refit: give "),
    "refit-bytes": (
        lambda s: s.refit(max_forgetting=0.01, max_bytes=100),
        ArgumentError,
        "max_bytes=100 cannot be met",
    ),
    "absorb-bytes": (lambda s: s.absorb(MORE[8], max_bytes="1kB"), ArgumentError, "max_bytes=1,000 cannot be met"),
    "absorb-text": (lambda s: s.absorb(MORE[8], max_bytes="a lot"), ArgumentError, "'a lot'"),
    "several": (lambda s: s.project(MORE[8:]), ArgumentError, "project: takes one adapter; got 6"),
}


@pytest.mark.parametrize(("change", "error", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_refused_leaves_space_and_folder_as_they_were(folder, change, error, words):
    space = loraspan.open(folder)
    before, files_before = held(space), contents(folder)
    with pytest.raises(error, match=words):
        change(space)
    assert held(space) == before
    assert contents(folder) == files_before


@pytest.mark.parametrize("call", ["add", "absorb", "project"])
def test_another_base_model_is_refused(call):
    def of(base, adapter):
        return Adapter(adapter.name, adapter.slots, source=Source(base_model=base))

    space = loraspan.compress([of("one/model", a) for a in MORE[:2]], rank=3)
    with pytest.raises(MismatchError, match=r"'task 2' is for base model 'another', this space for 'one/model'"):
        getattr(space, call)(of("another", MORE[2]))
    for base in ("one/model/", None):
        getattr(space, call)(of(base, MORE[2]))
        space = loraspan.compress([of("one/model", a) for a in MORE[:2]], rank=3)


def test_two_writers_at_once(folder):
    """The slower one is told, keeps what it had, and its space still answers."""
    fast, slow = loraspan.open(folder), loraspan.open(folder)
    fast.add(MORE[8])
    before = held(slow)
    with pytest.raises(StoreError, match=r"another writer was faster.*open it again"):
        slow.add(MORE[9])
    assert held(slow) == before
    assert slow.reconstruct("task 6").slots.keys() == MORE[6].slots.keys()
    assert loraspan.open(folder).tasks == fast.tasks


def test_the_last_task_may_leave_and_others_come(folder):
    space = loraspan.open(folder)
    space.remove(*space.tasks)
    assert (space.tasks, space.errors) == ([], {})
    assert loraspan.open(folder).tasks == []
    assert space.report().tasks == ()
    with pytest.raises(ArgumentError, match="no task"):
        space.refit(rank=2)
    space.add(MORE[8:10])
    assert loraspan.open(folder).tasks == ["task 8", "task 9"]
    truth = lives.errors(space.collection, {a.name: a for a in MORE[8:10]})
    assert space.errors == pytest.approx(truth, abs=1e-6)


def test_a_store_can_be_taken_back(folder):
    space = loraspan.open(folder)
    before = {name: space.reconstruct(name) for name in space.tasks}
    space.refit(rank=2)
    space.remove("task 2")
    store.rollback(folder, 2)
    again = loraspan.open(folder)
    assert again.tasks == list(before)
    for name, adapter in before.items():
        other = again.reconstruct(name)
        assert all(torch.equal(slot.up, other.slots[path].up) for path, slot in adapter.slots.items())


def test_an_adapter_without_slots_is_kept_for_its_extras(folder):
    """A head alone, say, that was trained on the base model."""
    space = loraspan.open(folder)
    head = Adapter("head", {}, {"score.weight": torch.ones(2, 3)})
    for change in (space.add, space.replace, lambda again: space.absorb(Adapter("other", {}, again.extras))):
        change(head)
        again = loraspan.open(folder)
        assert again.errors["head"] == 0.0
        assert again.reconstruct("head").slots == {}
        assert torch.equal(again.reconstruct("head").extras["score.weight"], torch.ones(2, 3))
    assert (space.project(head).error, space.project(head).slots) == (0.0, ())
    space.refit(max_forgetting=0.02)
    space.refit(rank=2)
    assert loraspan.open(folder).errors["head"] == 0.0
    alone = loraspan.compress(head, max_error=0.05)
    assert alone.refit(rank=2, dry_run=True).tasks == (1, 1)
