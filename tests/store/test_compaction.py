import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import planted
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraspan import compress, store
from loraspan.collection.collection import Collection, Segment, SlotSpace, Task
from loraspan.collection.segments import merge
from loraspan.store import files
from loraspan.store import plan as plans
from loraspan.store.compaction import groups
from store.samples import adding, assert_same, assert_same_columns, collection, columns, part_of, without

UNIT, LARGEST, MEMORY = 4096, 2**26, 3 * 2**28
SIZES = st.sampled_from([1000, 5000, 9000, 32_768, 60_000, 300_000, 2_100_000, 20_000_000, 200_000_000])


def classes(sizes):
    """How many size classes there are: below 4096 bytes, and then eightfold ones."""
    return len({0 if size < UNIT else 1 + int(math.log2(size // UNIT)) // 3 for size in sizes})


def added(sizes):
    """Add segments of these sizes one after another: what is there after each, and what was written."""
    held, written = [], 0
    for size in sizes:
        held.append(size)
        held = [sum(held[places.start : places.stop]) for places in groups(held, len(held) - 1)]
        written += held[-1]
        yield held, written


@given(pattern=st.lists(st.tuples(SIZES, st.integers(1, 12)), min_size=1, max_size=6), repeats=st.integers(1, 40))
def test_segments_stay_few_and_are_seldom_written_again(pattern, repeats):
    """Whatever comes in whatever order: 8 to a class, and each byte written about once on each class."""
    sizes = [size for size, count in pattern for _ in range(count)] * repeats
    written = 0
    for held, total in added(sizes):
        written = total
        joined = [size for size in held if size <= LARGEST]
        # the large ones stay, and stand between tails
        tails = 1 + len(held) - len(joined)
        assert len(joined) <= 8 * tails * max(1, classes(joined))
    small = [size for size in sizes if size <= LARGEST]
    levels = 1 + math.log(sum(small) / min(small), 8) if small else 0
    assert written <= levels * sum(small) + sum(size for size in sizes if size > LARGEST)


@pytest.mark.parametrize("size", [1000, 9000, 300_000])
def test_tasks_of_one_size_are_written_once_on_each_class(size):
    held, written = list(added([size] * 5000))[-1]

    assert written <= (1 + math.log(5000, 8)) * 5000 * size
    assert len(held) <= 8 * classes(held)


def alone(*places):
    return [range(i, i + 1) for i in places]


def test_large_segments_are_left_alone():
    assert groups([LARGEST + 1] * 100) == alone(*range(100))
    assert groups([9000] * 8 + [LARGEST + 1]) == alone(*range(9))
    assert groups([LARGEST + 1, *[9000] * 9]) == [*alone(0), range(1, 10)]
    assert groups([LARGEST] * 9) == [range(9)]


def test_many_at_once_are_joined_as_if_they_came_one_by_one():
    held, together = list(added([9000] * 1000))[-1][0], groups([9000] * 1000)

    assert [9000 * len(places) for places in together] == held
    assert [place for places in together for place in places] == list(range(1000))


@given(sizes=st.lists(SIZES, max_size=300))
def test_joining_takes_bounded_memory(sizes):
    """Whatever a store has piled up: what it was never joined by these rules is joined as far as memory goes."""
    for standing in (0, len(sizes)):
        for places in groups(sizes, standing):
            some = sizes[places.start : places.stop]
            assert len(some) == 1 or sum(some) <= MEMORY


@given(pairs=st.lists(st.tuples(SIZES, st.integers(1, 40)), max_size=100), memory=st.integers(0, 10**9))
def test_joining_takes_what_it_may(pairs, memory):
    """Of files that are larger in memory than on disk, too."""
    sizes, taking = [size for size, _ in pairs], [size * times for size, times in pairs]
    for standing in (0, len(sizes)):
        found = groups(sizes, standing, taking=taking, memory=memory)
        assert [i for places in found for i in places] == list(range(len(sizes)))
        for places in found:
            assert len(places) == 1 or sum(taking[places.start : places.stop]) <= memory


def test_coded_ends_count_as_they_are_unpacked(tmp_path):
    """They are joined where there is room for what they become, which is more than their files have."""
    adapters = planted.adapters(count=1, shape=(300, 400), shared_out=0, shared_in=0)
    compress(adapters, max_error=0.3, dtype="coded").save(tmp_path / "s")
    opened = store.open_at(tmp_path / "s")
    parts = [plans.Part(opened.collection.segments, opened.segments[0])] * 9
    size, ends = (
        opened.segments[0].size,
        [
            rows
            for held in opened.collection.segments[0].columns.values()
            for rows in (held.left_private, held.right_private)
        ],
    )
    unpacked = 4 * sum(rows.codes.nbytes + rows.scales.nbytes for rows in ends)
    assert unpacked > 4 * size
    for memory, count in ((9 * size, 9), (9 * (size + unpacked) - 1, 2), (9 * (size + unpacked), 1)):
        assert len(plans._joined(parts, 9, memory)) == count


def test_a_pile_of_others_is_joined_at_its_end():
    assert groups([LARGEST] * 100, 100) == [*alone(*range(88)), range(88, 100)]


@pytest.fixture
def disk(monkeypatch):
    """Count the bytes that are written, and wait for no disk."""
    counted = []
    honest = files.write

    def write(descriptor, data):
        done = honest(descriptor, data)
        counted.append(done)
        return done

    monkeypatch.setattr(files, "write", write)
    monkeypatch.setattr(files, "sync", lambda _: None)
    monkeypatch.setattr(files, "sync_folder", lambda _: None)
    return counted


def one_task(i):
    """A task of 20 kB in one slot."""
    rng = torch.Generator().manual_seed(i)
    held = columns(rng, [0], (2000, 500, 4, 4), np.array([[1, 0, 0, 2]]), np.zeros(1, bool), torch.float32)
    task = Task(f"task {i}", 0.1, "measured", 1.0, {"a": 1.0}, {"a": 8})
    return Segment((task,), {"a": held})


SPACE = {"a": SlotSpace(torch.eye(2000, 4), torch.eye(500, 4))}


def test_a_thousand_tasks_one_by_one(tmp_path, disk):
    """Bytes written stay below (1 + log8 n) times those of the tasks, manifests of bounded size aside."""
    store.save(Collection(SPACE), tmp_path / "a")
    opened, count = store.open_at(tmp_path / "a"), 1000
    total = manifests = 0
    first = 0
    for i in range(count):
        disk.clear()
        opened = store.commit(opened, adding(opened.collection, one_task(i)), note=f"add {i}")
        manifest = (opened.folder / f"manifest-{opened.generation:06d}.json").stat().st_size
        manifests = max(manifests, manifest)
        total += sum(disk) - manifest
        first = first or total
        assert len(opened.segments) <= 8 * classes([data.size for data in opened.segments])

    assert total <= (1 + math.log(count, 8)) * count * first
    # a segment takes a line of about 200 bytes, and the change and the note of one task do not grow
    assert manifests <= 1000 + 220 * 8 * 4
    assert [task.name for task in opened.collection.tasks] == [f"task {i}" for i in range(count)]
    assert_same_columns(merge(opened.collection.segments), merge([one_task(i) for i in range(count)]))
    assert store.verify(opened.folder) == []


def many(count):
    rng = torch.Generator().manual_seed(0)
    each = np.tile([[1, 0, 0, 2]], (count, 1))
    held = columns(rng, range(count), (20, 50, 4, 4), each, np.zeros(count, bool), torch.float32)
    tasks = tuple(Task(f"task {i}", 0.1, "measured", 1.0, {"a": 1.0}, {"a": 8}) for i in range(count))
    return Collection({"a": SlotSpace(torch.eye(20, 4), torch.eye(50, 4))}, (Segment(tasks, {"a": held}),))


def calls_of(act):
    """How many calls of functions, in Python and below, it takes."""
    counted = [0]

    def count(_frame, event, _arg):
        counted[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
    return counted[0]


def test_adding_takes_what_is_added(tmp_path, disk):
    """Steps and bytes of adding a task do not depend on how many there are."""
    new = part_of(many(3), 2, 3)
    new = Segment((replace(new.tasks[0], name="new"),), new.columns)
    steps, written = [], []
    for count in (3, 30, 3000):
        store.save(many(count), tmp_path / str(count))
        opened = store.open_at(tmp_path / str(count))
        held = adding(opened.collection, new)
        store.commit(opened, held)
        store.rollback(opened.folder, 1)
        opened = store.open_at(opened.folder)
        held = adding(opened.collection, new)
        disk.clear()
        steps.append(calls_of(lambda opened=opened, held=held: store.commit(opened, held)))
        written.append(sum(disk))

    # tables of a few entries, and the digits of sizes
    assert max(steps) - min(steps) <= 100
    assert max(written) - min(written) <= 20


def test_more_than_half_removed_is_written_anew(tmp_path):
    whole = collection(1, tasks=8)
    store.save(replace(whole, segments=(part_of(whole, 0, 5), part_of(whole, 5, 8))), tmp_path / "a")
    first = store.open_at(tmp_path / "a")

    opened, removed = first, []
    for i in range(5):
        opened = store.commit(opened, without(opened.collection, f"task {i}"))
        removed.append([data.removed for data in opened.segments])
        assert opened.segments[-1] == first.segments[1]
        assert store.verify(opened.folder) == []

    assert removed[0][0] == (0,)
    rewritten = next(i for i, each in enumerate(removed) if each[0] == ())
    assert 2 <= rewritten <= 3
    assert len(removed[-1]) == 1
    assert_same(opened.collection, store.open(opened.folder))


def test_half_removed_stays(tmp_path):
    """Ten equal tasks: five may go, the sixth takes the rest along."""
    store.save(many(10), tmp_path / "a")
    opened = store.open_at(tmp_path / "a")

    half = store.commit(opened, without(opened.collection, *(f"task {i}" for i in range(5))))
    more = store.commit(half, without(half.collection, "task 5"))

    assert half.segments[0].removed == (0, 1, 2, 3, 4)
    assert half.segments[0].file == opened.segments[0].file
    assert (more.segments[0].tasks, more.segments[0].removed) == (4, ())
    assert more.segments[0].size < opened.segments[0].size


def test_removed_tasks_are_not_joined(tmp_path):
    whole = many(20)
    store.save(replace(whole, segments=tuple(part_of(whole, i, i + 3) for i in range(0, 18, 3))), tmp_path / "a")
    opened = store.open_at(tmp_path / "a")
    opened = store.commit(opened, without(opened.collection, "task 4", "task 9"))
    assert [data.removed for data in opened.segments] == [(), (1,), (), (0,), (), ()]

    for i in range(3):
        other = part_of(whole, 17 + i, 18 + i)
        task = replace(other.tasks[0], name=f"new {i}")
        opened = store.commit(opened, adding(opened.collection, Segment((task,), other.columns)))

    assert [(data.tasks, data.removed) for data in opened.segments] == [(19, ())]
    names = [f"task {i}" for i in range(18) if i not in (4, 9)] + ["new 0", "new 1", "new 2"]
    assert [task.name for task in opened.collection.tasks] == names
    assert_same_columns(
        opened.collection.segments[0],
        merge([part_of(whole, i, i + 1) for i in (*range(4), *range(5, 9), *range(10, 18), 17, 18, 19)]),
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_joined_is_mapped_from_its_file(tmp_path):
    whole = many(9)
    store.save(replace(whole, segments=tuple(part_of(whole, i, i + 1) for i in range(8))), tmp_path / "a")
    opened = store.open_at(tmp_path / "a")

    after = store.commit(opened, adding(opened.collection, part_of(whole, 8, 9)))

    assert [data.tasks for data in after.segments] == [9]
    name = after.segments[0].file
    spans = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(name)]
    limits = [tuple(int(end, 16) for end in span.split("-")) for span in spans]
    for tensor in after.collection.segments[0].columns["a"].tensors().values():
        assert any(a <= tensor.data_ptr() < b for a, b in limits)
