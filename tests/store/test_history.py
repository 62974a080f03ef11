import json
from dataclasses import replace

import pytest

from loraspan import store
from loraspan.collection.collection import Collection
from loraspan.errors import ArgumentError, FormatError, LoraspanError, StoreError
from store.samples import (
    ODD_EXTRAS,
    adding,
    assert_same,
    collection,
    edit_manifest,
    files_named,
    listing,
    part_of,
    renamed,
    saved,
    without,
)

WHOLE = collection(1, tasks=8, extras=ODD_EXTRAS)


@pytest.fixture
def space(tmp_path):
    """Generations 1 to 4: begun, one added, one removed, one renamed."""
    path = tmp_path / "team.span"
    store.save(replace(WHOLE, segments=(part_of(WHOLE, 0, 3),)), path, note="begin")
    opened = store.open_at(path)
    opened = store.commit(opened, adding(opened.collection, part_of(WHOLE, 3, 5)), note="add two")
    opened = store.commit(opened, without(opened.collection, "task 1"), note="remove one")
    store.commit(opened, renamed(opened.collection, **{"task 2": "two"}))
    return path


def test_the_log_tells_what_happened(space):
    entries = store.log(space)

    assert [(e.generation, e.current, e.parent, e.note, e.tasks, e.problem) for e in entries] == [
        (4, True, 3, "", 4, None),
        (3, False, 2, "remove one", 4, None),
        (2, False, 1, "add two", 5, None),
        (1, False, None, "begin", 3, None),
    ]
    assert [e.change for e in entries] == [
        store.Change(renamed=(("task 2", "two"),)),
        store.Change(removed=("task 1",)),
        store.Change(added=("task 3", "task 4")),
        None,
    ]
    for entry in entries:
        table = json.loads((space / f"manifest-{entry.generation:06d}.json").read_text())
        files = [space / name for name in files_named(table)] + [space / f"manifest-{entry.generation:06d}.json"]
        assert entry.nbytes == sum(path.stat().st_size for path in files)
        assert entry.time == table["time"]


def test_a_change_that_is_long_is_not_kept(space):
    opened = store.open_at(space)
    long = renamed(opened.collection, two="x" * 10_000)

    opened = store.commit(opened, long)

    assert store.log(space)[0].change is None
    assert "x" * 10_000 in opened.names


def test_damaged_and_missing_manifests_are_told(space):
    (space / "manifest-000002.json").write_bytes(b"\x00" * 100)
    (space / "manifest-000003.json").unlink()

    entries = store.log(space)

    assert [e.generation for e in entries] == [4, 3, 2, 1]
    assert [bool(e.problem) for e in entries] == [False, True, True, False]
    assert entries[1] == store.Entry(3, False, problem="its manifest is missing")
    assert "manifest-000002.json" in entries[2].problem
    assert entries[2].tasks is None


def test_a_current_generation_without_its_manifest_is_told(space):
    (space / "manifest-000004.json").unlink()

    entries = store.log(space)

    assert entries[0] == store.Entry(4, True, problem="its manifest is missing")
    assert [e.generation for e in entries] == [4, 3, 2, 1]


def test_files_that_are_missing_or_torn_are_told(space):
    opened = store.open_at(space)
    (space / opened.segments[1].file).write_bytes(b"")

    entries = store.log(space)

    size = opened.segments[1].size
    assert [e.problem for e in entries] == [f"{opened.segments[1].file}: needs {size} bytes; it has 0"] * 3 + [None]
    (space / opened.basis.file).unlink()
    assert all("it is missing" in e.problem for e in store.log(space))


def test_what_is_not_part_of_history_is_not_told(space):
    """A manifest above the current one is left over from a writer, and what gc removed is gone."""
    (space / "manifest-000005.json").write_bytes((space / "manifest-000004.json").read_bytes())
    (space / "manifest-000000.json").write_text("")
    (space / "manifest-000001.json").unlink()

    assert [e.generation for e in store.log(space)] == [4, 3, 2]


def test_numbers_far_apart_take_no_time(space):
    """A hole in the numbers is not counted through."""
    late = 2 * 10**9
    edit_manifest(space, lambda table: {**table, "generation": late, "parent": 10**9})
    (space / "manifest-000004.json").rename(space / f"manifest-{late}.json")
    (space / "CURRENT").write_text(f"{late}\n")

    assert [e.generation for e in store.log(space)] == [late, 10**9, 3, 2, 1]


def test_no_store_has_no_log(tmp_path):
    with pytest.raises(StoreError, match="not a loraspan store"):
        store.log(tmp_path)
    path = saved(tmp_path)
    (path / "CURRENT").write_text("x")
    with pytest.raises(FormatError, match=rf"{path}/CURRENT"):
        store.log(path)


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_rolling_back_brings_back_what_was(space, generation):
    want, before = store.open(space, generation=generation), set(listing(space))

    told = store.rollback(space, generation)

    assert_same(store.open(space), want)
    assert set(listing(space)) - before == {"manifest-000005.json"}
    assert told == store.log(space)[0]
    assert (told.generation, told.current, told.parent, told.note) == (5, True, 4, f"roll back to {generation}")
    assert store.verify(space) == []
    # and forward again, and on from there
    store.rollback(space, 4, note="no, that was right")
    assert_same(store.open(space), store.open(space, generation=4))
    opened = store.open_at(space)
    store.commit(opened, without(opened.collection, "two"))
    assert [e.generation for e in store.log(space)] == [7, 6, 5, 4, 3, 2, 1]


def test_rolling_back_tells_names(space):
    assert store.rollback(space, 1).change == store.Change(("task 1", "task 2"), ("task 3", "task 4", "two"))


def test_a_dry_run_changes_nothing(space):
    before = {path.name: path.stat().st_mtime_ns for path in space.iterdir()}

    told = store.rollback(space, 2, dry_run=True)

    assert (told.generation, told.current, told.tasks) == (5, False, 5)
    assert {path.name: path.stat().st_mtime_ns for path in space.iterdir()} == before


@pytest.mark.parametrize(("generation", "words"), [(0, "from 1 to 4"), (5, "from 1 to 4"), (4, "is the current one")])
def test_there_is_no_way_back_to_what_never_was(space, generation, words):
    with pytest.raises(ArgumentError, match=words):
        store.rollback(space, generation)


@pytest.mark.parametrize("fault", ["manifest missing", "manifest damaged", "file missing", "file torn", "wrong header"])
def test_there_is_no_way_back_to_what_is_damaged(space, fault):
    opened = store.open_at(space, 1)
    store.save(Collection({}), space, overwrite=True)
    manifest, file = space / "manifest-000001.json", space / opened.segments[0].file
    content = file.read_bytes()
    {
        "manifest missing": manifest.unlink,
        "manifest damaged": lambda: manifest.write_bytes(manifest.read_bytes()[:-9]),
        "file missing": file.unlink,
        "file torn": lambda: file.write_bytes(content[:-1]),
        "wrong header": lambda: file.write_bytes(b"\xff" * 16 + content[16:]),
    }[fault]()

    with pytest.raises(LoraspanError, match=manifest.name if "manifest" in fault else file.name):
        store.rollback(space, 1)

    assert_same(store.open(space), Collection({}))
    assert store.log(space)[0].generation == 5


def test_there_is_a_way_back_from_what_is_damaged(space):
    (space / "manifest-000004.json").write_text("")

    told = store.rollback(space, 3)

    assert told.change is None
    assert_same(store.open(space), store.open(space, generation=3))


def test_files_that_go_while_rolling_back_are_noticed(space, monkeypatch):
    """Somebody collects garbage between the look and the lock."""
    from loraspan.store import files

    gone = space / store.open_at(space, 2).segments[1].file
    store.save(Collection({}), space, overwrite=True)
    honest = files.make_folder
    monkeypatch.setattr(files, "make_folder", lambda path: gone.unlink() or honest(path))

    with pytest.raises(StoreError, match=rf"{gone.name}: cannot be read: .*nothing was written"):
        store.rollback(space, 2)

    assert_same(store.open(space), Collection({}))
