from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraspan import store
from loraspan.collection.collection import Collection, Segment, Task
from loraspan.collection.segments import merge
from store.growing import WHOLE, begun, part, without_bases
from store.samples import (
    adding,
    assert_same,
    assert_same_columns,
    renamed,
    same_bytes,
    without,
)


def data_files(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def written(opened, collection, *, again=False):
    """Commit, and give the new generation and the names of the files of tensors that it took.

    With ``again``, the same content may have been written to the same name once more.
    """
    before = data_files(opened.folder)
    after = store.commit(opened, collection)
    now = data_files(opened.folder)
    touched = {name for name in before if before[name] != now[name]}
    assert not touched or again, "a file that stood was written again"
    assert store.verify(opened.folder) == []
    assert_same(store.open(opened.folder), after.collection)
    return after, now.keys() - before.keys()


def test_opening_keeps_where_each_part_lies(tmp_path):
    opened = begun(tmp_path, 0, 3, 4)

    assert (opened.folder, opened.generation) == (tmp_path / "team.span", 1)
    assert_same(opened.collection, store.open(opened.folder))
    assert {opened.basis.file, *(data.file for data in opened.segments)} == data_files(opened.folder).keys()
    assert [data.tasks for data in opened.segments] == [3, 1]
    assert opened.names == {"task 0", "task 1", "task 2", "task 3"}
    store.commit(opened, without(opened.collection, "task 1"))
    assert_same(store.open_at(opened.folder, 1).collection, opened.collection)


def test_adding_writes_what_is_added(tmp_path):
    opened = begun(tmp_path, 0, 3)

    after, new = written(opened, adding(opened.collection, part(3, 4), part(4, 6)))

    assert new == {data.file for data in after.segments[1:]}
    assert [data.tasks for data in after.segments] == [3, 1, 2]
    assert after.basis == opened.basis
    assert after.collection.segments[0] is opened.collection.segments[0]
    assert after.collection.slots is opened.collection.slots
    assert after.names == {f"task {i}" for i in range(6)}
    assert_same_columns(merge(after.collection.segments), part(0, 6))


def test_what_was_added_lies_in_its_file(tmp_path):
    """Nothing anonymous stays: what comes back are views of the mapped files."""
    opened = begun(tmp_path, 0, 3)
    new = part(3, 5)

    after = store.commit(opened, adding(opened.collection, new))
    for columns in new.columns.values():
        for tensor in columns.tensors().values():
            tensor.zero_()

    assert_same(after.collection, store.open(opened.folder))
    assert any(columns.weights.any() for columns in after.collection.segments[1].columns.values())


def test_removing_and_renaming_write_a_manifest(tmp_path):
    opened = begun(tmp_path, 0, 4, 8)

    once, new = written(opened, without(opened.collection, "task 1", "task 6"))
    twice, newer = written(once, renamed(once.collection, **{"task 2": "two\n", "task 5": "task 1"}))
    again, newest = written(twice, renamed(without(twice.collection, "two\n"), **{"task 1": "task 5"}))

    assert not new | newer | newest
    assert [(data.removed, data.renamed) for data in once.segments] == [((1,), ()), ((2,), ())]
    assert [data.renamed for data in twice.segments] == [((2, "two\n"),), ((1, "task 1"),)]
    assert [(data.removed, data.renamed) for data in again.segments] == [((1, 2), ()), ((2,), ((1, "task 5"),))]
    assert [task.name for task in again.collection.tasks] == [f"task {i}" for i in (0, 3, 4, 5, 7)]
    assert again.names == {task.name for task in again.collection.tasks}
    assert_same(store.open(opened.folder, generation=1), opened.collection)


def test_a_segment_without_tasks_goes(tmp_path):
    opened = begun(tmp_path, 0, 2, 3)

    after, new = written(opened, without(opened.collection, "task 2"))
    last, _ = written(after, replace(after.collection, segments=()))

    assert not new
    assert after.segments == opened.segments[:1]
    assert (last.segments, last.names, last.collection.tasks) == ((), frozenset(), ())


def test_names_may_be_swapped_and_taken_over(tmp_path):
    opened = begun(tmp_path, 0, 4)

    swapped, _ = written(opened, renamed(opened.collection, **{"task 0": "task 1", "task 1": "task 0"}))
    held = renamed(without(swapped.collection, "task 2"), **{"task 3": "task 2"})
    other = Segment(tuple(replace(task, name="task 3") for task in part(5, 6).tasks), part(5, 6).columns)
    taken, _ = written(swapped, adding(held, other))

    assert [task.name for task in swapped.collection.tasks] == ["task 1", "task 0", "task 2", "task 3"]
    assert [task.name for task in taken.collection.tasks] == ["task 1", "task 0", "task 2", "task 3"]
    assert store.log(opened.folder)[0].change == store.Change(("task 3",), ("task 2",), (("task 3", "task 2"),))


OTHERS = {
    "error": 0.123,
    "error_kind": "measured",
    "norm": 2.5,
    "forgotten": 0.25,
    "config": {"r": 1},
    "factor_bytes": 1,
    "factor_dtype": "float16",
    "extras": {"head": torch.ones(3)},
    "scales": None,
    "lora_ranks": None,
    "source": None,
}


@pytest.mark.parametrize("field", [each.name for each in fields(Task) if each.name != "name"])
def test_a_task_that_changed_otherwise_is_written_anew(tmp_path, field):
    opened = begun(tmp_path, 0, 3, 4)
    one = opened.collection.segments[0]
    value = OTHERS[field]
    if value is None:
        was = getattr(one.tasks[1], field)
        value = dict(was) if field != "source" else replace(was, licence="MIT")
    tasks = (one.tasks[0], replace(one.tasks[1], **{field: value}), one.tasks[2])
    segments = (Segment(tasks, one.columns), opened.collection.segments[1])

    before = data_files(opened.folder)
    after, _ = written(opened, replace(opened.collection, segments=segments), again=True)

    # equal values that are other objects give the same file once more
    assert data_files(opened.folder)[after.segments[0].file] != before.get(after.segments[0].file)
    assert after.segments[1] == opened.segments[1]
    if field not in ("scales", "lora_ranks"):
        assert getattr(after.collection.tasks[1], field).__class__ is value.__class__
    if field not in ("scales", "lora_ranks", "extras"):
        assert getattr(after.collection.tasks[1], field) == value


def test_a_removed_task_comes_back_from_memory(tmp_path):
    opened = begun(tmp_path, 0, 3)
    less, _ = written(opened, without(opened.collection, "task 1"))
    back = Segment(opened.collection.segments[0].tasks, less.collection.segments[0].columns)

    after, _ = written(less, replace(less.collection, segments=(back,)), again=True)

    assert_same(after.collection, opened.collection)
    assert after.segments[0].removed == ()


def test_other_columns_are_written(tmp_path):
    """The same tensors in another mapping are not what was opened."""
    opened = begun(tmp_path, 0, 2, 3)
    one, two = opened.collection.segments
    twice = Segment(
        tuple(replace(task, name=f"{task.name}'") for task in two.tasks), two.columns
    )  # a mapping that serves two segments stands once
    held = replace(opened.collection, segments=(Segment(one.tasks, dict(one.columns)), two, twice))

    before = data_files(opened.folder)
    after, _ = written(opened, held, again=True)

    assert data_files(opened.folder)[after.segments[0].file] != before[after.segments[0].file]
    assert data_files(opened.folder)[after.segments[1].file] == before[after.segments[1].file]
    assert after.segments[2].file != opened.segments[1].file
    assert_same(after.collection, held)


def test_a_slot_comes_without_rewriting_the_bases(tmp_path):
    opened = begun(tmp_path, 0, 3)
    slots = {"first": without_bases(5, 6), **opened.collection.slots, "last": without_bases(7, 8)}

    after, new = written(opened, replace(opened.collection, slots=slots))
    less = {name: slot for name, slot in after.collection.slots.items() if name != "first"}
    fewer, newer = written(after, replace(after.collection, slots=less))

    assert not new | newer
    assert list(after.collection.slots) == ["first", *opened.collection.slots, "last"]
    assert list(fewer.collection.slots) == [*opened.collection.slots, "last"]


def test_other_bases_are_written(tmp_path):
    opened = begun(tmp_path, 0, 3)
    name, slot = next((n, s) for n, s in opened.collection.slots.items() if s.u.numel() and s.v.numel())
    turned = replace(slot, u=-slot.u)

    after, new = written(opened, replace(opened.collection, slots={**opened.collection.slots, name: turned}))
    kind, none = written(
        after,
        replace(
            after.collection,
            slots={**after.collection.slots, name: replace(after.collection.slots[name], kind="embedding")},
        ),
    )

    assert new == {after.basis.file}
    same_bytes(after.collection.slots[name].u, -slot.u)
    assert after.segments == opened.segments
    # what a slot is in the model stands in the manifest
    assert not none
    assert kind.collection.slots[name].kind == "embedding"


def test_a_slot_with_bases_takes_them_along(tmp_path):
    store.save(replace(WHOLE, segments=()), tmp_path / "a")
    opened = store.open_at(tmp_path / "a")
    name = next(n for n, s in opened.collection.slots.items() if s.u.numel())
    slots = {n: s for n, s in opened.collection.slots.items() if n != name}

    after, new = written(opened, replace(opened.collection, slots=slots))

    assert new == {after.basis.file}
    assert name not in after.collection.slots


@given(steps=st.lists(st.tuples(st.sampled_from("arn"), st.integers(0, 11)), max_size=12))
def test_any_changes_give_what_saving_them_gives(tmp_path_factory, steps):
    """Against a save of the same collection, whatever is added, removed and renamed in what order."""
    opened = begun(tmp_path_factory.mktemp("store"), 0, 3)
    names, fresh = 100, 3
    for kind, i in steps:
        held = opened.collection
        some = held.tasks[i % len(held.tasks)].name if held.tasks else ""
        if kind == "a" and fresh < 12:
            held, fresh = adding(held, part(fresh, fresh + 1)), fresh + 1
        elif kind == "r":
            held = without(held, some)
        elif kind == "n":
            held, names = renamed(held, **{some: f"name {names}"}), names + 1
        opened = store.commit(opened, held)
        assert_same(opened.collection, held)
        assert len(opened.segments) == len(opened.collection.segments)
        assert opened.names == {task.name for task in held.tasks}

    other = opened.folder.parent / "other.span"
    store.save(opened.collection, other)

    assert_same(store.open(opened.folder), store.open(other))
    assert store.verify(opened.folder) == []


def test_time_and_notes_are_kept(tmp_path):
    opened = begun(tmp_path, 0, 3)
    note = 'add "sql"\n\udc80 名前'

    store.commit(opened, adding(opened.collection, part(3, 4)), note=note)

    newest, first = store.log(opened.folder)
    assert (newest.note, first.note) == (note, "")
    assert newest.time[-6:] == "+00:00"
    assert len(newest.time) == len("2026-01-01T00:00:00+00:00")


def test_a_clock_that_goes_back_does_nothing(tmp_path, monkeypatch):
    opened = begun(tmp_path, 0, 3)
    from loraspan.store import transaction

    monkeypatch.setattr(transaction, "now", lambda: "1970-01-01T00:00:00+00:00")
    after = store.commit(opened, adding(opened.collection, part(3, 4)))

    assert store.log(opened.folder)[0].time == "1970-01-01T00:00:00+00:00"
    assert_same(store.open(opened.folder), after.collection)


def test_a_new_collection_can_grow_from_nothing(tmp_path):
    store.save(Collection({}), tmp_path / "a")
    opened = store.open_at(tmp_path / "a")

    after, _ = written(opened, replace(WHOLE, segments=(part(0, 2),)))

    assert_same_columns(after.collection.segments[0], part(0, 2))
