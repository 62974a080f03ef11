"""Defects that the fuzzer has found in reading stores, each as the smallest input that shows it."""

import json

import numpy as np
import pytest
import torch

from loraspan import store
from loraspan.cli.export import folder_names
from loraspan.collection.collection import Collection, Segment, SlotSpace, Task
from loraspan.collection.columns import Columns
from loraspan.errors import FormatError, LoraspanError, ShapeError
from loraspan.subspace import open as open_space
from store.damage import S, only, records, refused
from store.samples import edit_manifest, edit_tensors, saved


@pytest.mark.parametrize("kind", ["counts", "rows", "dense", "origin", "weights", "records"])
def test_a_tensor_without_a_dimension(tmp_path, kind):
    path = saved(tmp_path, seed=2)
    name = kind if kind == "records" else f"{kind}.{S}"

    edit_tensors(path, "tasks", lambda t: t.update({name: t[name].flatten()[0].clone()}))

    # shapes that have to agree are said together
    said = "tensor '" + {"rows": "counts", "dense": "counts"}.get(kind, kind)
    assert said in refused(path)
    assert said in str(only(path))


def test_rows_that_ascend_only_by_overflow(tmp_path):
    """Differences of 64-bit numbers wrap: 0, 2^63 - 1, -2^63, -1, 3 seem to ascend from 0 to 3."""
    path = saved(tmp_path, seed=5, slots=1, tasks=5)
    rows = torch.tensor([0, 2**63 - 1, -(2**63), -1, 3])
    assert (np.diff(rows.numpy()) > 0).all()

    def change(t):
        (name,) = (key for key in t if key.startswith("counts."))
        t[name] = torch.zeros(5, 4, dtype=torch.uint8)
        t[name.replace("counts", "rows")] = rows
        for key in [key for key in t if key.startswith(("weights.", "left_", "right_", "dense."))]:
            del t[key]

    edit_tensors(path, "tasks", change)

    assert "they have to ascend within the 5 tasks" in refused(path)


def test_a_basis_wider_than_its_vectors_are_long(tmp_path):
    """Without an element nothing in the file stands against its width, and verify forms a Gram of it."""
    path = saved(tmp_path, seed=2)

    def change(table):
        table["slots"].append({"name": "wide", "n": 0, "d": 4, "k_out": 2**31 - 1, "k_in": 0, "kind": "linear"})

    edit_manifest(path, change)

    assert "slot 'wide': a basis of 2147483647 vectors of length 0" in refused(path)
    assert "slot 'wide'" in str(only(path))


def with_empty_slots(path, count, size):
    """Give a store so many slots more, of ``size x size``, in which its tasks have no columns."""
    names = [f"wide.{i}" for i in range(count)]
    bare = {"n": size, "d": size, "k_out": 0, "k_in": 0, "kind": "linear"}
    edit_manifest(path, lambda table: table["slots"].extend({"name": name, **bare} for name in names))
    zeros = torch.zeros(3, 4, dtype=torch.uint8)
    edit_tensors(path, "tasks", lambda t: t.update({f"counts.{name}": zeros.clone() for name in names}))


def test_a_slot_longer_than_any_model_has(tmp_path):
    """Where no column fills it nothing in the file stands against its sides, and an export writes them as zeros."""
    path = saved(tmp_path, seed=1, slots=1, tasks=3)
    with_empty_slots(path, 1, 2**24 + 1)

    assert "slot 'wide.0': a side has at most 16777216 entries; it is 16777217 x 16777217" in refused(path)
    assert "slot 'wide.0'" in str(only(path))


def test_many_slots_that_nothing_stands_for(tmp_path):
    whole, path = (saved(tmp_path / name, seed=1, slots=1, tasks=3) for name in ("whole", "more"))
    with_empty_slots(whole, 32, 2**24)
    with_empty_slots(path, 33, 2**24)

    assert len(store.open(whole).slots) == 33
    assert "33 slots that no column fills have sides of 1107296256 entries" in refused(path)
    assert "at most 1073741824" in str(only(path))


def test_what_would_not_open_is_not_saved(tmp_path):
    def bare(count, size):
        slots = {str(i): SlotSpace(torch.empty(size, 0), torch.empty(size, 0)) for i in range(count)}
        ends = [torch.empty(shape) for shape in (0, (0, 0), (0, size), (0, 0), (0, size))]
        none = Columns(np.array([0]), np.zeros((1, 4), dtype=np.int64), np.array([False]), *ends)
        tasks = (Task("sql", 0.0, "measured", 0.0, dict.fromkeys(slots, 1.0), dict.fromkeys(slots, 1)),)
        return Collection(slots, (Segment(tasks, dict.fromkeys(slots, none)),))

    with pytest.raises(ShapeError, match="slot '0': a side has at most 16777216 entries"):
        store.save(bare(1, 2**24 + 1), tmp_path / "a")
    with pytest.raises(ShapeError, match="33 slots that no column fills"):
        store.save(bare(33, 2**24), tmp_path / "a")
    store.save(bare(32, 2**24), tmp_path / "a")
    assert len(store.open(tmp_path / "a").slots) == 32


@pytest.mark.parametrize("kernel", [[2, 2, 2], None, [2**40, 2**40, 2**40]])
def test_a_kernel_that_is_not_of_its_slot(tmp_path, kernel):
    path = saved(tmp_path, seed=2)
    slots = []

    def change(table):
        slot = next(slot for slot in table["slots"] if slot.get("kind") == "conv2d")
        slot.update(d=7, kernel=kernel)
        slots.append(slot["name"])

    edit_manifest(path, change)

    assert f"slot '{slots[0]}': a convolution" in refused(path)


CONFIGS = {
    "a list for a table": {"rank_pattern": [1]},
    "a number for a list": {"target_parameters": 5},
    "a text for a number": {"lora_alpha": "x", "r": 8},
    "a table for a text": {"target_parameters": [{}]},
    "code": {"auto_mapping": {"base_model_class": "x"}},
    "a number past all floats": {"lora_alpha": 10**400},
}


@pytest.mark.parametrize("config", CONFIGS)
def test_a_stored_configuration_is_believed_no_more_than_a_file(tmp_path, config):
    path = saved(tmp_path, seed=2)
    edit_tensors(path, "tasks", lambda t: records(t, lambda r: r.update(config_table=[CONFIGS[config]] * 9)))
    space = open_space(path)

    for name, folder in folder_names(space.tasks).items():
        try:
            space.export(name, tmp_path / "out" / folder)
        except LoraspanError:
            assert not (tmp_path / "out" / folder).exists()
        else:
            written = json.loads((tmp_path / "out" / folder / "adapter_config.json").read_text())
            assert written["target_parameters"] is None
            assert "auto_mapping" not in written


def test_an_extra_does_not_take_the_name_of_a_factor(tmp_path):
    path = saved(tmp_path, seed=2)
    factor = f"base_model.model.{S}.lora_A.weight"
    edit_tensors(path, "tasks", lambda t: t.update({f"extra.1.{factor}": torch.zeros(1)}))
    space = open_space(path)

    with pytest.raises(FormatError, match=f"extra '{factor}'"):
        space.export("task 1", tmp_path / "out")


def test_many_doubled_names_are_found_at_once(tmp_path, deadline):
    """Looking for the first of n names that occurs twice must not take n^2 steps."""
    path = saved(tmp_path)
    names = ",".join(f'"{i}":0' for i in range(100_000))

    with deadline(20):
        name = edit_manifest(path, lambda _: f'{{{names},"99999":1}}')

        assert f"{name}: manifest: needs one JSON object in UTF-8; the name '99999' is there more than once" in refused(
            path
        )
    assert store.verify(path)
