import json
import os
import threading

import pytest
import torch
from filelock import FileLock

from loraspan import store
from loraspan.collection.collection import Collection
from loraspan.errors import ArgumentError, StoreError
from loraspan.store import files
from loraspan.store.transaction import save_and_open
from store.crash import Crash, Disk
from store.samples import ODD_EXTRAS, assert_same, collection, files_named, listing

OLD, NEW = collection(1, extras=ODD_EXTRAS), collection(2, tasks=6, dtype=torch.bfloat16)


def published(folder):
    """The names of a folder that are part of one of its generations."""
    return [name for name in listing(folder) if not name.startswith(".")]


def test_saving_gives_what_opening_does(tmp_path):
    found = save_and_open(OLD, tmp_path / "team.span")
    opened = store.open_at(tmp_path / "team.span")
    assert_same(found.collection, opened.collection)
    for field in ("folder", "generation", "basis", "segments", "names"):
        assert getattr(found, field) == getattr(opened, field)
    # a change goes on from it: of what stands, nothing is written again
    assert store.commit(found, found.collection).basis == opened.basis


def test_generations(tmp_path):
    path = tmp_path / "team.span"

    assert store.save(OLD, path) == 1
    assert store.save(NEW, path, overwrite=True) == 2
    assert store.save(OLD, path, overwrite=True) == 3

    assert_same(store.open(path), OLD)
    assert_same(store.open(path, generation=2), NEW)
    assert_same(store.open(path, generation=1), OLD)
    assert all(store.verify(path, generation=g) == [] for g in (1, 2, 3))
    # what the first and the third have in common is there once
    assert len(list(path.glob("*.safetensors"))) == 4
    with pytest.raises(ArgumentError, match="generation has to be from 1 to 3, the current one; got 4"):
        store.open(path, generation=4)


def test_an_open_collection_keeps_its_generation(tmp_path):
    store.save(OLD, tmp_path / "a")
    held = store.open(tmp_path / "a")

    store.save(NEW, tmp_path / "a", overwrite=True)
    for path in list((tmp_path / "a").iterdir()):
        path.unlink()

    assert_same(held, OLD)


def test_an_existing_store_is_not_overwritten_unasked(tmp_path):
    store.save(OLD, tmp_path / "a")
    before = listing(tmp_path / "a")

    with pytest.raises(StoreError, match="at generation 1: pass overwrite=True"):
        store.save(NEW, tmp_path / "a")

    assert listing(tmp_path / "a") == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")

    with pytest.raises(StoreError, match=r"no store, with 'thesis.tex' in it"):
        store.save(OLD, tmp_path, overwrite=True)
    with pytest.raises(StoreError, match="this is a file"):
        store.save(OLD, tmp_path / "thesis.tex", overwrite=True)

    assert listing(tmp_path) == ["thesis.tex"]


def test_a_new_folder_may_be_deep_or_empty(tmp_path):
    (tmp_path / "empty").mkdir()

    assert store.save(OLD, tmp_path / "empty") == 1
    assert store.save(OLD, tmp_path / "a" / "b" / "c") == 1
    assert_same(store.open(tmp_path / "a" / "b" / "c"), OLD)


def test_two_writers(tmp_path, monkeypatch):
    """The one that comes first wins; the other, which began from the same generation, is told."""
    store.save(OLD, tmp_path / "a")
    reached, go_on, told = threading.Event(), threading.Event(), []
    honest = files.sync_folder

    def wait(folder):
        reached.set()
        assert go_on.wait(30)
        honest(folder)

    def second():
        try:
            store.save(OLD, tmp_path / "a", overwrite=True)
        except StoreError as error:
            told.append(str(error))

    monkeypatch.setattr(files, "sync_folder", wait)
    first = threading.Thread(target=lambda: store.save(NEW, tmp_path / "a", overwrite=True))
    first.start()
    assert reached.wait(30)
    late = threading.Thread(target=second)
    late.start()
    late.join(0.3)
    assert late.is_alive()
    go_on.set()
    first.join(30)
    late.join(30)

    assert len(told) == 1
    assert "another writer was faster: it is at generation 2 and was at 1" in told[0]
    assert_same(store.open(tmp_path / "a"), NEW)


def test_a_parent_that_is_gone(tmp_path):
    store.save(OLD, tmp_path / "a")

    with pytest.raises(StoreError, match="at generation 1, not 7"):
        store.save(NEW, tmp_path / "a", overwrite=True, parent=7)
    with pytest.raises(StoreError, match="at generation None, not 1"):
        store.save(NEW, tmp_path / "b", parent=1)

    assert store.save(NEW, tmp_path / "a", overwrite=True, parent=1) == 2


def test_a_lock_that_is_held(tmp_path):
    store.save(OLD, tmp_path / "a")

    with (
        FileLock(tmp_path / "a" / ".lock"),
        pytest.raises(StoreError, match=r"another writer has held .lock for 0.1 s"),
    ):
        store.save(NEW, tmp_path / "a", overwrite=True, timeout=0.1)

    assert_same(store.open(tmp_path / "a"), OLD)


def steps_of(monkeypatch, folder, held, **options):
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        store.save(held, folder, **options)
    return disk.steps


def crash_at(monkeypatch, folder, step, **options):
    with monkeypatch.context() as patch:
        disk = Disk(patch, step, torn=options.pop("torn"))
        with pytest.raises(Crash):
            store.save(NEW, folder, **options)
    return disk


def check_old_or_new(folder, disk):
    held = store.open(folder)
    renames = disk.steps.count("rename")
    assert_same(held, NEW if len(held.tasks) == len(NEW.tasks) else OLD)
    assert store.verify(folder) == []
    # two files of tensors and a manifest come before CURRENT
    assert len(held.tasks) == len(OLD.tasks) or renames == 4
    number = int((folder / "CURRENT").read_text())
    assert store.save(NEW, folder, overwrite=True) == number + 1
    assert_same(store.open(folder), NEW)
    assert not [name for name in listing(folder) if name.startswith(".")]
    assert set(listing(folder)) == referenced(folder)


def referenced(folder):
    tables = [json.loads(path.read_text()) for path in folder.glob("manifest-*")]
    data = files_named(*tables)
    return data | {"CURRENT"} | {path.name for path in folder.glob("manifest-*")}


POWER = [("none", False), ("all", False), ("none", True), ("but the last", True)]


@pytest.mark.parametrize("torn", [False, True])
def test_a_crash_leaves_the_old_generation_or_the_new(tmp_path, monkeypatch, torn):
    """At every step of a save, before, within or after it, with and without a loss of power."""
    store.save(OLD, tmp_path / "count")
    steps = steps_of(monkeypatch, tmp_path / "count", NEW, overwrite=True)
    assert {"create", "write", "sync", "rename", "sync_folder"} <= set(steps)
    # many writes of tensors are alike: the first ones, the last ones and one in twenty between
    chosen = [i for i, step in enumerate(steps) if step != "write" or i < 8 or i % 20 == 0]
    for i in chosen:
        names, data = POWER[i % 4]
        folder = tmp_path / f"at-{i}"
        store.save(OLD, folder)
        disk = crash_at(monkeypatch, folder, i, torn=torn, overwrite=True)
        disk.lose_power(names=names, data=data)
        check_old_or_new(folder, disk)


@pytest.mark.parametrize(("names", "data"), POWER)
def test_a_loss_of_power_around_the_swap(tmp_path, monkeypatch, names, data):
    """The last steps, each with each kind of loss: here a missing sync would show."""
    steps = steps_of(monkeypatch, tmp_path / "count", NEW)
    from_end = [len(steps) - 1 - i for i, step in enumerate(steps) if step in ("rename", "sync_folder", "sync")]
    for back in from_end:
        folder = tmp_path / f"at-{back}"
        store.save(OLD, folder)
        stop = len(steps_of_second(steps)) - 1 - back
        disk = crash_at(monkeypatch, folder, stop, torn=True, overwrite=True)
        disk.lose_power(names=names, data=data)
        check_old_or_new(folder, disk)


def steps_of_second(steps):
    """The steps of a save into a store: those of a new one without the lock file."""
    return steps[: steps.index("create")] + steps[steps.index("create") + 1 :]


def test_a_first_save_cut_short_can_be_repeated(tmp_path, monkeypatch):
    steps = steps_of(monkeypatch, tmp_path / "count", NEW)
    for i in [i for i, step in enumerate(steps) if step != "write" or i % 20 == 0]:
        folder = tmp_path / f"at-{i}"
        crash_at(monkeypatch, folder, i, torn=bool(i % 2))
        if (folder / "CURRENT").exists():
            assert_same(store.open(folder), NEW)
        else:
            with pytest.raises(StoreError, match="not a loraspan store"):
                store.open(folder)
        store.save(OLD, folder, overwrite=True)
        assert_same(store.open(folder), OLD)
        assert set(listing(folder)) == referenced(folder)


@pytest.mark.parametrize("step", ["create", "write", "sync", "rename", "sync_folder"])
def test_an_error_leaves_nothing_behind(tmp_path, monkeypatch, step):
    """A full disk or a folder that may not be written is an error, not a crash: temporary files go at once."""
    store.save(OLD, tmp_path / "a")
    before = listing(tmp_path / "a")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, step, fail)
        with pytest.raises(StoreError, match=r"a: cannot be written: No space left on device"):
            store.save(NEW, tmp_path / "a", overwrite=True)

    assert_same(store.open(tmp_path / "a"), OLD)
    assert not [name for name in listing(tmp_path / "a") if name.startswith(".tmp")]
    assert set(before) <= set(published(tmp_path / "a"))
    assert store.save(NEW, tmp_path / "a", overwrite=True) == 2
    assert set(listing(tmp_path / "a")) == referenced(tmp_path / "a")


def test_a_store_that_may_only_be_read(tmp_path, monkeypatch):
    store.save(OLD, tmp_path / "a")
    before = sorted((tmp_path / "a").iterdir())

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    for step in ("create", "rename", "remove", "make_folder"):
        monkeypatch.setattr(files, step, refuse)

    assert_same(store.open(tmp_path / "a"), OLD)
    assert store.verify(tmp_path / "a") == []
    with pytest.raises(StoreError, match="Permission denied"):
        store.save(NEW, tmp_path / "a", overwrite=True)
    assert sorted((tmp_path / "a").iterdir()) == before


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        store.save(OLD, tmp_path / "a")
    finally:
        os.umask(before)

    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {mode}


def test_a_generation_that_cannot_be_read_keeps_its_files(tmp_path):
    """Whoever repairs a damaged manifest will want the files that it names."""
    store.save(OLD, tmp_path / "a")
    store.save(NEW, tmp_path / "a", overwrite=True)
    (tmp_path / "a" / "manifest-000001.json").write_text("damaged")
    data = set((tmp_path / "a").glob("*.safetensors"))

    store.save(Collection({}), tmp_path / "a", overwrite=True)

    assert data < set((tmp_path / "a").glob("*.safetensors"))
