"""A writer that is cut short, at every step of everything that a store does: the old generation or the new one."""

import json
import shutil

import pytest

from loraspan import store
from loraspan.collection.collection import Collection, SlotSpace
from store.crash import Crash, Disk
from store.samples import ODD_EXTRAS, adding, assert_same, collection, files_named, listing, part_of, renamed, without

WHOLE = collection(1, tasks=12, extras=ODD_EXTRAS)
POWER = [("none", False), ("all", False), ("none", True), ("but the last", True)]


def parts(first, last):
    return [part_of(WHOLE, i, i + 1) for i in range(first, last)]


def with_segments(*segments):
    return Collection(WHOLE.slots, segments, WHOLE.dtype, WHOLE.base_model, WHOLE.summary)


def with_a_slot(held):
    space = SlotSpace(held.slots["layers.0.weights"].u[:, :0], held.slots["layers.0.weights"].v[:, :0])
    return Collection({**held.slots, "new": space}, held.segments, held.dtype, held.base_model, held.summary)


def change(of):
    """Give a writer that commits ``of(collection)``."""

    def act(folder):
        opened = store.open_at(folder)
        return store.commit(opened, of(opened.collection))

    return act


def all_at_once(held):
    return renamed(without(adding(with_a_slot(held), *parts(5, 6)), "task 1"), **{"task 2": "other"})


def anew(_):
    """Bases that are other objects have to be written, and a segment with other columns too."""
    return with_segments(*parts(3, 5))


# what a store is before, how it is changed, and how many files of tensors that takes
CHANGES = {
    "add": (parts(0, 3), change(lambda c: adding(c, *parts(3, 5))), 2),
    "remove": ([part_of(WHOLE, 0, 5)], change(lambda c: without(c, "task 1")), 0),
    "rename": ([part_of(WHOLE, 0, 5)], change(lambda c: renamed(c, **{"task 1": "task 99"})), 0),
    "drop a segment": (parts(0, 3), change(lambda c: without(c, "task 1")), 0),
    "all at once": ([part_of(WHOLE, 0, 5)], change(all_at_once), 1),
    "anew": (parts(0, 3), change(anew), 3),
    "join": (parts(0, 8), change(lambda c: adding(c, *parts(8, 9))), 1),
    "without the dead": ([part_of(WHOLE, 0, 5)], change(lambda c: without(c, *(f"task {i}" for i in range(4)))), 1),
}


def crashed(monkeypatch, folder, act, stop, torn):
    with monkeypatch.context() as patch:
        disk = Disk(patch, stop, torn=torn)
        with pytest.raises(Crash):
            act(folder)
    names, data = POWER[stop % 4]
    disk.lose_power(names=names, data=data)


def each_crash(tmp_path, monkeypatch, before, act):
    """Yield a copy of ``before`` for each step at which ``act`` was cut short in it."""
    shutil.copytree(before, tmp_path / "count")
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        act(tmp_path / "count")
    # writes of tensors are alike: one in twenty-five
    chosen = [i for i, step in enumerate(disk.steps) if step != "write" or i % 25 == 0]
    for stop in chosen:
        for torn in (False, True):
            folder = tmp_path / f"{stop}-{torn}"
            shutil.copytree(before, folder)
            crashed(monkeypatch, folder, act, stop, torn)
            yield folder
            shutil.rmtree(folder)


def check_whole(folder):
    """Every generation that claims to be there opens, and the current one is as it should be to the last byte."""
    assert [entry for entry in store.log(folder) if entry.problem] == []
    for entry in store.log(folder):
        store.open(folder, generation=entry.generation)
    assert store.verify(folder) == []


def check_tidied(folder):
    """The next writer leaves nothing that no generation names."""
    opened = store.open_at(folder)
    after = store.commit(opened, opened.collection)
    tables = [json.loads(path.read_text()) for path in folder.glob("manifest-*")]
    data = files_named(*tables)
    known = data | {"CURRENT", ".pins"} | {path.name for path in folder.glob("manifest-*")}
    assert set(listing(folder)) - {".pins"} == known - {".pins"}
    assert after.generation == opened.generation + 1
    assert_same(store.open(folder), opened.collection)


@pytest.mark.parametrize("name", CHANGES)
def test_a_crash_leaves_the_old_generation_or_the_new(tmp_path, monkeypatch, name):
    segments, act, files = CHANGES[name]
    store.save(with_segments(*segments), tmp_path / "before")
    old = store.open(tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    new = act(tmp_path / "after").collection
    assert len(list((tmp_path / "after").glob("*.safetensors"))) - len(segments) - 1 == files - (name == "anew")

    outcomes = []
    for folder in each_crash(tmp_path, monkeypatch, tmp_path / "before", act):
        held = store.open(folder)
        outcomes.append(store.log(folder)[0].generation)
        assert_same(held, old if outcomes[-1] == 1 else new)
        check_whole(folder)
        check_tidied(folder)

    assert set(outcomes) == {1, 2}
    assert len(outcomes) >= 2 * (11 + 3 * files)


def test_a_crash_of_rolling_back(tmp_path, monkeypatch):
    store.save(with_segments(*parts(0, 3)), tmp_path / "before")
    change(lambda c: adding(without(c, "task 1"), *parts(5, 6)))(tmp_path / "before")
    old, new = (store.open(tmp_path / "before", generation=g) for g in (2, 1))

    outcomes = []
    for folder in each_crash(tmp_path, monkeypatch, tmp_path / "before", lambda path: store.rollback(path, 1)):
        outcomes.append(store.log(folder)[0].generation)
        assert_same(store.open(folder), old if outcomes[-1] == 2 else new)
        check_whole(folder)
        check_tidied(folder)

    assert set(outcomes) == {2, 3}
    assert len(outcomes) >= 2 * 11


def test_a_crash_of_collecting_garbage(tmp_path, monkeypatch):
    store.save(with_segments(*parts(0, 3)), tmp_path / "before")
    for i in range(3, 6):
        change(lambda c, i=i: adding(without(c, f"task {i - 3}"), *parts(i, i + 1)))(tmp_path / "before")
    held = store.open(tmp_path / "before")

    def collect(path):
        store.gc(path, keep=0, grace=0)

    left = []
    for folder in each_crash(tmp_path, monkeypatch, tmp_path / "before", collect):
        assert_same(store.open(folder), held)
        check_whole(folder)
        left.append(len(store.log(folder)))
        check_tidied(folder)

    assert set(left) == {1, 2, 3, 4}
    # two locks, a mark, three manifests and three segments that nobody needs, two syncs and the mark again
    assert len(left) == 2 * 12
