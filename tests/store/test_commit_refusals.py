import threading
import warnings
from dataclasses import replace

import pytest
import torch

from loraspan import store
from loraspan.errors import ArgumentError, ShapeError, StoreError
from loraspan.store import files
from store.growing import WHOLE, begun, part, without_bases
from store.samples import adding, assert_same, collection, listing, renamed


def test_another_dtype_needs_other_tensors(tmp_path):
    opened = begun(tmp_path, 0, 3)

    with pytest.raises(ShapeError, match=r"has to be .*torch.float64"):
        store.commit(opened, replace(opened.collection, dtype=torch.float64))

    after = store.commit(opened, collection(5, dtype=torch.float64))
    assert_same(after.collection, collection(5, dtype=torch.float64))


def test_slots_that_go_are_missed_by_segments_that_stand(tmp_path):
    opened = begun(tmp_path, 0, 3)
    name = next(iter(opened.collection.segments[0].columns))
    slots = {n: s for n, s in opened.collection.slots.items() if n != name}

    with pytest.raises(ShapeError, match="which is no slot of the collection"):
        store.commit(opened, replace(opened.collection, slots=slots))
    wider = without_bases(opened.collection.slots[name].u.shape[0] + 1, opened.collection.slots[name].v.shape[0])
    with pytest.raises(ShapeError, match=rf"of slot '{name}'"):
        store.commit(opened, replace(opened.collection, slots={**opened.collection.slots, name: wider}))

    assert store.log(opened.folder)[0].generation == 1


@pytest.mark.parametrize("where", ["new and old", "two new", "renamed"])
def test_two_tasks_of_one_name_are_refused(tmp_path, where):
    opened = begun(tmp_path, 0, 3)
    held = {
        "new and old": lambda: adding(opened.collection, part(2, 3)),
        "two new": lambda: adding(opened.collection, part(4, 5), part(4, 5)),
        "renamed": lambda: renamed(opened.collection, **{"task 1": "task 2"}),
    }[where]()
    before = listing(opened.folder)

    with pytest.raises(ArgumentError, match="two tasks are named 'task"):
        store.commit(opened, held)

    assert listing(opened.folder) == before


@pytest.mark.parametrize("note", [7, "x" * 10_001])
def test_a_note_is_a_text(tmp_path, note):
    opened = begun(tmp_path, 0, 1)

    for write in (
        lambda: store.commit(opened, opened.collection, note=note),
        lambda: store.save(WHOLE, tmp_path / "b", note=note),
        lambda: store.rollback(opened.folder, 1, note=note),
    ):
        with pytest.raises(ArgumentError, match="note has to be text"):
            write()


def test_the_later_of_two_is_told_what_to_do(tmp_path):
    opened = begun(tmp_path, 0, 3)
    first = store.commit(opened, adding(opened.collection, part(3, 4)))
    before = listing(opened.folder)

    with pytest.raises(StoreError, match=r"it is at generation 2 and was at 1 when it was opened; .* open it"):
        store.commit(opened, adding(opened.collection, part(4, 5)))

    assert listing(opened.folder) == before
    assert_same(store.open(opened.folder), first.collection)


def test_two_writers_at_once(tmp_path, monkeypatch):
    """Both begin from one generation and reach the lock together: one wins, the other is told, nothing is lost."""
    opened = begun(tmp_path, 0, 3)
    barrier, told, done = threading.Barrier(2), [], []
    honest = files.make_folder

    def together(folder):
        barrier.wait(30)
        honest(folder)

    def write(i):
        try:
            done.append(store.commit(store.open_at(opened.folder), adding(opened.collection, part(i, i + 1))))
        except StoreError as error:
            told.append(str(error))

    monkeypatch.setattr(files, "make_folder", together)
    threads = [threading.Thread(target=write, args=(i,)) for i in (4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert (len(done), len(told)) == (1, 1)
    assert "another writer was faster: it is at generation 2 and was at 1" in told[0]
    assert_same(store.open(opened.folder), done[0].collection)


def test_another_store_of_that_name_is_not_taken_for_the_one_that_was_opened(tmp_path):
    opened = begun(tmp_path, 0, 3)
    for path in opened.folder.iterdir():
        path.unlink()
    store.save(collection(2), opened.folder)

    with pytest.raises(StoreError, match="generation 1 is not the one that was opened"):
        store.commit(opened, adding(opened.collection, part(3, 4)))

    assert_same(store.open(opened.folder), collection(2))


@pytest.mark.parametrize("fault", ["gone", "torn"])
def test_a_file_that_stands_has_to_be_there(tmp_path, fault):
    opened = begun(tmp_path, 0, 3)
    path = opened.folder / opened.segments[0].file
    path.unlink() if fault == "gone" else path.write_bytes(b"x")

    with pytest.raises(StoreError, match=rf"{path.name}: .*open it again"):
        store.commit(opened, adding(opened.collection, part(3, 4)))

    assert store.log(opened.folder)[0].generation == 1


def test_committing_says_nothing(tmp_path):
    opened = begun(tmp_path, 0, 3)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.commit(opened, adding(opened.collection, part(3, 4)))
