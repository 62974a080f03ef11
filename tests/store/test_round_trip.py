import os
import re
import subprocess
import sys
import zlib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraspan import store
from loraspan.adapters.header import DTYPES
from loraspan.collection.collection import Collection, Segment, SlotSpace, Task
from loraspan.collection.deflated import inflate
from loraspan.collection.headers import DTYPE_NAMES
from store.damage import put_records
from store.samples import (
    NAMES,
    ODD_EXTRAS,
    assert_same,
    collection,
    columns,
    edit_manifest,
    edit_tensors,
    listing,
    orthonormal,
    same_bytes,
    save_in_segments,
    saved,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@given(seed=st.integers(0, 2**32 - 1), slots=st.integers(0, 4), tasks=st.integers(0, 5), dtype=st.sampled_from(FLOATS))
def test_open_gives_what_was_saved(tmp_path_factory, seed, slots, tasks, dtype):
    want = collection(seed, slots=slots, tasks=tasks, dtype=dtype, extras=ODD_EXTRAS)
    path = tmp_path_factory.mktemp("store") / "team.span"

    assert store.save(want, path) == 1

    assert_same(store.open(path), want)
    assert store.verify(path) == []


def test_records_that_could_be_squeezed_to_almost_nothing_are_read_again(tmp_path):
    """A reader unpacks to so many times the bytes that there are, and no further."""
    held = collection(4, tasks=2)
    [segment] = held.segments
    tasks = tuple(replace(task, config={"note": "a" * 1_000_000}) for task in segment.tasks)
    want = replace(held, segments=(replace(segment, tasks=tasks),))
    store.save(want, tmp_path / "a")
    assert_same(store.open(tmp_path / "a"), want)


def test_a_store_of_schema_2_is_read(tmp_path):
    """Whose manifest names files beside their checksums, and whose records were compressed without a dictionary."""
    want = collection(2)
    path = saved(tmp_path, seed=2)
    edit_tensors(path, "tasks", lambda t: put_records(t, zlib.compress(inflate(t["records"].numpy().tobytes())[0])))

    def older(table):
        table["schema"] = 2
        for kind, entry in (("basis", table["basis"]), ("tasks", table["segments"][0])):
            entry["file"] = f"{kind}-{entry['sha256'][:32]}.safetensors"

    edit_manifest(path, older)
    assert_same(store.open(path), want)
    assert store.verify(path) == []


@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 7), max_size=4))
def test_segments_read_as_one(tmp_path_factory, seed, cuts):
    want = collection(seed, tasks=7, extras=ODD_EXTRAS)
    path = tmp_path_factory.mktemp("store") / "team.span"

    save_in_segments(want, path, [0, *sorted(cuts), 7])

    assert_same(store.open(path), want)
    assert store.verify(path) == []


def test_an_opened_collection_can_be_saved_over_itself(tmp_path):
    want = collection(3, extras=ODD_EXTRAS)
    store.save(want, tmp_path / "a")

    store.save(store.open(tmp_path / "a"), tmp_path / "a", overwrite=True)

    assert_same(store.open(tmp_path / "a"), want)


def test_names_are_data(tmp_path):
    want = collection(1, tasks=len(NAMES), names=NAMES)

    store.save(want, tmp_path / "team.span")

    assert [task.name for task in store.open(tmp_path / "team.span").tasks] == list(NAMES)
    assert listing(tmp_path) == ["team.span"]
    assert len(listing(tmp_path / "team.span")) == 4


def test_every_field_of_a_task_is_kept(tmp_path):
    """A field that is added to Task and forgotten here would come back as its default."""
    want = collection(2, tasks=2, extras=ODD_EXTRAS)
    for field in fields(Task)[6:]:
        assert getattr(want.tasks[0], field.name) or getattr(want.tasks[1], field.name), field.name
    assert all(value is not None for value in (want.tasks[1].source.sha256, want.tasks[1].source.base_model))

    store.save(want, tmp_path / "a")

    assert_same(store.open(tmp_path / "a"), want)


@pytest.mark.parametrize("count", [255, 256, 40_000])
def test_integers_are_as_wide_as_they_have_to_be(tmp_path, count):
    rng = torch.Generator().manual_seed(0)
    held = columns(rng, [1], (2, 2, 0, 0), np.array([[0, 0, 0, count]]), np.zeros(1, bool), torch.float32)
    space = SlotSpace(torch.zeros(2, 0), torch.zeros(2, 0))
    tasks = tuple(Task(str(i), 0.0, "measured", 1.0, {"a": 1.0} if i else {}, {"a": 8} if i else {}) for i in range(2))
    want = Collection({"a": space}, (Segment(tasks, {"a": held}),))

    store.save(want, tmp_path / "a")

    assert_same(store.open(tmp_path / "a"), want)


def test_many_different_scales(tmp_path):
    rng, slot = torch.Generator().manual_seed(0), "a"
    held = columns(rng, range(300), (2, 2, 0, 0), np.tile([0, 0, 0, 1], (300, 1)), np.zeros(300, bool), torch.float32)
    tasks = tuple(Task(str(i), 0.0, "measured", 1.0, {slot: 1 / (i + 1)}, {slot: i}) for i in range(300))
    want = Collection({slot: SlotSpace(torch.zeros(2, 0), torch.zeros(2, 0))}, (Segment(tasks, {slot: held}),))

    store.save(want, tmp_path / "a")

    assert_same(store.open(tmp_path / "a"), want)
    assert repr(store.open(tmp_path / "a").tasks[7].scales) == repr({slot: 1 / 8})
    with pytest.raises(KeyError):
        store.open(tmp_path / "a").tasks[7].scales["other"]


def test_the_safetensors_library_reads_the_files(tmp_path):
    want = collection(0, slots=1, tasks=1, extras=ODD_EXTRAS, dtype=torch.bfloat16)
    store.save(want, tmp_path / "a")

    basis = safetensors.torch.load_file(next((tmp_path / "a").glob("basis-*")))
    tasks = safetensors.torch.load_file(next((tmp_path / "a").glob("tasks-*")))

    for name, slot in want.slots.items():
        for side in ("u", "v"):
            if getattr(slot, side).numel():
                same_bytes(basis[f"{side}.{name}"], getattr(slot, side))
    for name, columns_of in want.segments[0].columns.items():
        for field, tensor in columns_of.tensors().items():
            if tensor.numel():
                same_bytes(tasks[f"{field}.{name}"], tensor)
    for key, extra in ODD_EXTRAS.items():
        same_bytes(tasks[f"extra.0.{key}"], extra)
    with safetensors.safe_open(next((tmp_path / "a").glob("tasks-*")), "pt") as file:
        assert file.metadata() == {"loraspan": "tasks"}


def test_tensors_start_where_their_items_may(tmp_path):
    """An address that is no multiple of the item would make a view impossible."""
    store.save(collection(4, extras=ODD_EXTRAS), tmp_path / "a")
    held = store.open(tmp_path / "a")

    tensors = [t for task in held.tasks for t in task.extras.values()]
    tensors += [t for slot in held.slots.values() for t in (slot.u, slot.v)]
    tensors += [t for part in held.segments[0].columns.values() for t in part.tensors().values()]

    assert all(t.data_ptr() % t.element_size() == 0 for t in tensors)


def test_what_is_written_can_be_read():
    assert {name: dtype for dtype, name in DTYPE_NAMES.items()} == DTYPES


def test_views_do_not_write_through(tmp_path):
    want = collection(6)
    store.save(want, tmp_path / "a")

    slot = next(iter(store.open(tmp_path / "a").slots.values()))
    slot.v.fill_(9)

    assert_same(store.open(tmp_path / "a"), want)


LAZY = """
import os, sys
from pathlib import Path
from loraspan import store

def status(key):
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key)).split()[1])

store.open(sys.argv[1])
before = status("RssAnon"), status("RssFile"), len(os.listdir("/proc/self/fd"))
held = store.open(sys.argv[2])
after = status("RssAnon"), status("RssFile"), len(os.listdir("/proc/self/fd"))
assert sum(s.u.nbytes + s.v.nbytes for s in held.slots.values()) == 32 << 20
print(*(b - a for a, b in zip(before, after)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_reads_no_data(tmp_path):
    """32 MB of bases are replaced by a hole, and opening neither notices nor grows."""
    basis = torch.ones(1 << 20, 4)
    store.save(Collection({"a": SlotSpace(basis, basis)}), tmp_path / "big")
    store.save(Collection({}), tmp_path / "small")
    path = next((tmp_path / "big").glob("basis-*"))
    size = path.stat().st_size
    with path.open("r+b") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(header)
        file.truncate(size)
    command = [sys.executable, "-c", LAZY, tmp_path / "small", tmp_path / "big"]

    grown = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout.split()

    anonymous, mapped, descriptors = map(int, grown)
    assert anonymous < 1024
    assert mapped < 1024
    assert descriptors == 0


def test_a_basis_of_any_layout(tmp_path):
    rng = torch.Generator().manual_seed(1)
    u, v = orthonormal(rng, 6, 3, torch.float16), orthonormal(rng, 5, 2, torch.float16)
    want = Collection({"a": SlotSpace(u.T.contiguous().T, v.repeat(1, 2)[:, ::2])}, (), torch.float16)

    store.save(want, tmp_path / "a")

    assert_same(store.open(tmp_path / "a"), want)


def test_the_folder_is_what_the_documentation_says(tmp_path):
    store.save(collection(1), tmp_path / "team.span")

    names = listing(tmp_path / "team.span")

    patterns = (
        "CURRENT",
        r"basis-[0-9a-f]{32}\.safetensors",
        r"manifest-000001\.json",
        r"tasks-[0-9a-f]{32}.safetensors",
    )
    assert len(names) == 4
    assert all(re.fullmatch(pattern, name) for pattern, name in zip(patterns, names, strict=True))
    assert Path(tmp_path / "team.span" / "CURRENT").read_text() == "1\n"
