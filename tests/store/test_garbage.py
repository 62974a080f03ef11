import os
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from loraspan import store
from loraspan.collection.collection import Collection
from loraspan.errors import ArgumentError, FormatError, StoreError
from loraspan.store import files
from store.growing import DAY, WHOLE, age, generations, part, six_generations
from store.samples import adding, assert_same, listing


@pytest.fixture
def space(tmp_path):
    return six_generations(tmp_path)


def named(folder):
    """The files that some generation names."""
    opened = [store.open_at(folder, number) for number in generations(folder)]
    return {data.file for each in opened for data in (each.basis, *each.segments)}


def visible(folder):
    return [name for name in listing(folder) if name not in (".lock", ".pins")]


@pytest.mark.parametrize("keep", [0, 1, 2, 5, 9])
def test_what_nobody_needs_goes(space, keep):
    held = store.open(space)
    before = {path.name: path.stat().st_size for path in space.iterdir()}

    found = store.gc(space, keep=keep)

    left = list(range(max(1, 6 - keep), 7))
    assert generations(space) == left
    assert found.generations == tuple(range(1, left[0]))
    gone = before.keys() - set(listing(space)) - {".lock"}
    assert set(found.files) == gone
    assert found.nbytes == sum(before[name] for name in gone)
    assert {name for name in visible(space) if name.endswith("safetensors")} == named(space)
    assert_same(store.open(space), held)
    assert store.verify(space) == []
    assert store.gc(space, keep=keep).files == ()


def test_a_dry_run_says_the_same_and_removes_nothing(space):
    age(space, 10 * DAY)
    before = {path.name: path.stat().st_mtime_ns for path in space.iterdir()}

    dry = store.gc(space, dry_run=True)

    assert {path.name: path.stat().st_mtime_ns for path in space.iterdir()} == before
    assert dry == store.gc(space)
    assert dry.generations == (1, 2, 3, 4)


def test_a_generation_outlives_its_end_by_the_grace(space):
    """It counts from when the next one came, not from when it was written."""
    age(space, 5 * DAY, "manifest-000004.json")

    found = store.gc(space, keep=0)

    assert found.generations == (1, 2, 5)
    assert found.kept == {3: "in its grace period", 4: "in its grace period"}
    assert generations(space) == [3, 4, 6]


def test_a_young_file_stays(space):
    """Its generation goes, and the file when it is as old."""
    first = store.open_at(space, 2).segments[1].file
    age(space, 0, first)

    found = store.gc(space, keep=0)

    assert found.generations == (1, 2, 3, 4, 5)
    assert first not in found.files
    assert (space / first).exists()
    age(space, 10 * DAY, first)
    assert store.gc(space, keep=0).files == (first,)


@pytest.mark.parametrize("pattern", ["*", "manifest-*"])
def test_times_in_the_future_keep_everything(space, pattern):
    """As after a clock was put back."""
    age(space, -DAY, pattern)

    found = store.gc(space, keep=0, grace=0)

    assert found.generations == ()
    assert found.files == ()
    assert sorted(found.kept) == [1, 2, 3, 4, 5]
    assert generations(space) == [1, 2, 3, 4, 5, 6]


def test_what_no_generation_names_goes_when_it_is_old(space):
    for name in (".tmp-x", f"tasks-{'0' * 32}.safetensors"):
        (space / name).write_bytes(b"12345")

    young = store.gc(space, keep=9)
    age(space, 10 * DAY, ".tmp-x")
    age(space, 10 * DAY, "tasks-0*")
    found = store.gc(space, keep=9)

    assert young.files == ()
    assert (set(found.files), found.nbytes) == ({".tmp-x", f"tasks-{'0' * 32}.safetensors"}, 10)


def test_strangers_stay(space):
    """What the store did not make is none of its business."""
    for name in ("README.md", "basis-1.safetensors", ".git", "manifest-1.json", "tasks"):
        (space / name).write_text("mine")
    age(space, 10 * DAY)

    found = store.gc(space, keep=0)

    assert not {"README.md", "basis-1.safetensors", ".git", "manifest-1.json", "tasks"} - set(listing(space))
    assert all(name.startswith(("manifest-00000", "tasks-")) for name in found.files)


@pytest.mark.parametrize("generation", [5, 6])
def test_nothing_goes_where_a_generation_that_stays_cannot_be_read(space, generation):
    (space / f"manifest-{generation:06d}.json").write_text("damaged")
    before = visible(space)

    with pytest.raises(StoreError, match=rf"generation {generation} stays and cannot be read.*nothing was removed"):
        store.gc(space)

    assert visible(space) == before


def test_a_damaged_generation_goes_with_the_others(space):
    (space / "manifest-000002.json").write_text("damaged")
    age(space, 10 * DAY)

    assert store.gc(space).generations == (1, 2, 3, 4)
    assert store.verify(space) == []


BAD = [{"keep": -1}, {"keep": 1.5}, {"keep": True}, {"grace": -1.0}, {"grace": float("nan")}]


@pytest.mark.parametrize("options", BAD)
def test_arguments_are_checked(space, options):
    with pytest.raises(ArgumentError, match="gc: keep is a number and grace seconds"):
        store.gc(space, **options)


def test_no_store_has_no_garbage(tmp_path):
    with pytest.raises(StoreError, match="not a loraspan store"):
        store.gc(tmp_path)
    assert list(tmp_path.iterdir()) == []
    store.save(Collection({}), tmp_path / "a")
    (tmp_path / "a" / "CURRENT").write_text("")
    with pytest.raises(FormatError, match=f"{tmp_path}/a/CURRENT"):
        store.gc(tmp_path / "a")


def test_a_writer_is_waited_for(space):
    with FileLock(space / ".lock"), pytest.raises(StoreError, match=r"has held .lock for 0.1 s"):
        store.gc(space, timeout=0.1)


def test_a_file_that_cannot_be_removed_is_told(space, monkeypatch):
    honest = files.remove

    def refuse(path):
        if path.name.startswith("tasks"):
            raise PermissionError(13, "Permission denied", str(path))
        honest(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "remove", refuse)
        with pytest.raises(StoreError, match=r"cannot be collected: Permission denied.*every generation that is left"):
            store.gc(space)
    held = store.open(space)

    assert generations(space) == [5, 6]
    # the next writer finds the mark, and removes what is left over
    store.commit(store.open_at(space), held)
    assert {name for name in visible(space) if name.endswith("safetensors")} == named(space)


def test_what_is_mapped_stays_readable(space):
    held = store.open(space, generation=1)
    want = store.open(space, generation=1)

    store.gc(space, keep=0)

    assert_same(held, want)


def test_opening_follows_a_writer_whose_past_is_collected(space, monkeypatch):
    """The current generation may be replaced and collected between a look at CURRENT and the manifest."""
    from loraspan.store import opened as module

    honest, calls = module.read_sealed, []

    def late(folder, number):
        calls.append(number)
        if len(calls) == 1:
            (space / "CURRENT").write_text("6\n")
            (space / "manifest-000005.json").unlink()
        return honest(folder, number)

    (space / "CURRENT").write_text("5\n")
    monkeypatch.setattr(module, "read_sealed", late)

    assert store.open_at(space).generation == 6
    assert calls == [5, 6]


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path, umask, mode):
    """Of every file that any transaction makes: whoever may write to the folder may lock, pin and collect."""
    before = os.umask(umask)
    try:
        store.save(replace(WHOLE, segments=(part(0, 2),)), tmp_path / "a")
        opened = store.open_at(tmp_path / "a")
        store.commit(opened, adding(opened.collection, part(2, 3)))
        store.rollback(tmp_path / "a", 1)
        store.gc(tmp_path / "a", grace=0)
        with store.pin(tmp_path / "a"):
            modes = {path.name: path.stat().st_mode & 0o777 for path in Path(tmp_path / "a").iterdir()}
    finally:
        os.umask(before)

    assert set(modes.values()) == {mode}
    assert any(name.startswith(".pin-") for name in modes)
