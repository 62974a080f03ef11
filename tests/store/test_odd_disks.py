"""File systems that lack something: a change works there, or is refused with the store as it was."""

import contextlib
import errno
import itertools
import os
import sys
from dataclasses import replace

import pytest

from loraspan import store
from loraspan.errors import StoreError
from loraspan.store import files
from store.samples import ODD_EXTRAS, adding, assert_same, collection, part_of, without

WHOLE = collection(1, tasks=6, extras=ODD_EXTRAS)


def begun(folder):
    store.save(replace(WHOLE, segments=(part_of(WHOLE, 0, 2), part_of(WHOLE, 2, 4))), folder)
    opened = store.open_at(folder)
    store.commit(opened, without(opened.collection, "task 0"))
    return folder


WRITERS = {
    "save": lambda path: store.save(WHOLE, path, overwrite=True),
    "commit": lambda path: store.commit(
        opened := store.open_at(path), adding(opened.collection, part_of(WHOLE, 4, 6)), note="add"
    ),
    "rollback": lambda path: store.rollback(path, 1),
    "gc": lambda path: store.gc(path, keep=0, grace=0),
}


@pytest.fixture(params=WRITERS)
def writer(request):
    return WRITERS[request.param]


@pytest.fixture
def space(tmp_path):
    return begun(tmp_path / "team.span")


def state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (".lock", ".pins")}


@pytest.mark.skipif(os.name == "nt", reason="folders are not synced there")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_folders_that_cannot_be_synced(space, monkeypatch, writer, number):
    """Some network and user-space file systems have no such call: names last there when the system sees fit."""
    honest, refused = os.fsync, []

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112 (a link of the kernel)
            refused.append(descriptor)
            raise OSError(number, os.strerror(number))
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    writer(space)

    assert refused
    assert store.verify(space) == []


@pytest.mark.skipif(os.name == "nt", reason="folders are not synced there")
def test_a_folder_whose_sync_fails_is_not_written(space, monkeypatch, writer):
    honest, before = os.fsync, store.open(space)

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112 (a link of the kernel)
            raise OSError(errno.EIO, "Input/output error")
        honest(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StoreError, match="Input/output error"):
            writer(space)

    assert_same(store.open(space), before)
    assert store.verify(space) == []
    writer(space)


def test_a_swap_that_may_not_last_says_so(space, monkeypatch):
    """When the last sync fails, the new generation is there: the message must not say otherwise."""
    honest, calls = files.sync_folder, []

    def sync(folder):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        honest(folder)

    monkeypatch.setattr(files, "sync_folder", sync)
    opened = store.open_at(space)
    with pytest.raises(StoreError, match=r"generation 3 is the current one, and may not outlast a loss of power"):
        store.commit(opened, without(opened.collection, "task 1"))

    assert [task.name for task in store.open(space).tasks] == ["task 2", "task 3"]
    assert store.verify(space) == []


NOT_REPLACING = ("raises", "does nothing", "loses the new one", "leaves both")


@pytest.mark.parametrize("how", NOT_REPLACING)
def test_renames_that_do_not_replace(space, monkeypatch, writer, how):
    honest, before = files.rename, state(space)
    collecting = writer is WRITERS["gc"]

    def rename(old, new):
        if not new.exists():
            honest(old, new)
        elif how == "raises":
            raise FileExistsError(errno.EEXIST, "File exists", str(new))
        elif how == "loses the new one":
            old.unlink()

    monkeypatch.setattr(files, "rename", rename)
    if collecting:
        writer(space)
        return
    with pytest.raises(StoreError, match=r"does not put a new file in place of an old one.*as it was before.*copy it"):
        writer(space)

    assert {name: data for name, data in state(space).items() if name != ".unfinished"} == before
    monkeypatch.undo()
    writer(space)
    assert store.verify(space) == []


def test_a_first_save_needs_no_replacing(tmp_path, monkeypatch):
    def rename(old, new):
        assert not new.exists()
        old.replace(new)

    monkeypatch.setattr(files, "rename", rename)
    store.save(WHOLE, tmp_path / "a")

    assert_same(store.open(tmp_path / "a"), WHOLE)


@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks(space, monkeypatch, writer, number):
    import fcntl

    before = state(space)

    def flock(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        with pytest.raises(StoreError, match=r"has no locks.*nothing was changed; copy the store to another disk"):
            writer(space)
        with pytest.raises(StoreError, match="has no locks"), store.pin(space):
            pass
        assert state(space) == before
        assert_same(store.open(space), store.open(space, generation=2))
        assert store.verify(space) == []
    writer(space)


@pytest.mark.parametrize("step", ["create", "write", "sync", "rename", "sync_folder", "make_folder"])
def test_a_full_disk_leaves_the_store_as_it_was(space, monkeypatch, writer, step):
    """Nothing is left behind, so that what is there can be read and something else be removed."""
    before = state(space)
    used = []

    def fail(*_):
        used.append(step)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, step, fail)
        # collecting garbage makes no file but a mark, and has to work where a disk is full
        needed = writer is not WRITERS["gc"] or step in ("create", "sync_folder")
        with pytest.raises(StoreError, match="No space left on device") if needed else contextlib.nullcontext():
            writer(space)
        assert needed == bool(used)
        if writer is not WRITERS["gc"]:
            assert state(space) == before

    writer(space)
    assert store.verify(space) == []
    assert not [name for name in state(space) if name.startswith(".")]


def test_a_disk_fills_up_half_way(space, monkeypatch):
    """At each write in turn: what was written goes again."""
    before, honest = state(space), files.write
    for stop in itertools.count(step=9):
        calls = []

        def write(descriptor, data, calls=calls, stop=stop):
            calls.append(descriptor)
            if len(calls) > stop:
                raise OSError(errno.ENOSPC, "No space left on device")
            return honest(descriptor, data)

        with monkeypatch.context() as patch:
            patch.setattr(files, "write", write)
            try:
                store.save(WHOLE, space, overwrite=True)
            except StoreError:
                assert state(space) == before
                continue
        break
    assert stop >= 5 * 9
    assert_same(store.open(space), WHOLE)
