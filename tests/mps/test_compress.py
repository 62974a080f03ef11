"""compress(device="mps") end to end: the same guarantees, a collection on the CPU, and nothing Metal cannot do."""

import numpy as np
import planted
import pytest
import torch

import loraspan
from loraspan.adapters.base import Adapter, Slot
from loraspan.collection.rebuild import rebuild
from loraspan.ops import stream

GOALS = [{"rank": 6}, {"energy": 0.95}, {"max_error": 0.02}, {"max_error": 1e-3}]
CASES = {
    "shared": {},
    "one side": {"shared_out": 0, "noise": 0.001},
    "none": {"shared_out": 0, "shared_in": 0},
    "half": {"dtype": torch.float16},
}


def tensors(space):
    for slot in space.collection.slots.values():
        yield from (slot.u, slot.v)
    for columns in space.collection.segments[0].columns.values():
        yield from columns.tensors().values()


@pytest.mark.parametrize("goal", GOALS, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gives_what_the_cpu_gives(mps, case, goal):
    adapters = planted.adapters(**case)
    here, there = loraspan.compress(adapters, **goal), loraspan.compress(adapters, device="mps", **goal)
    assert all(tensor.device.type == "cpu" for tensor in tensors(there))
    assert there.tasks == here.tasks
    for adapter in adapters:
        # ranges are rounded otherwise; within a budget that may decide for one column more or less
        if "max_error" not in goal:
            assert there.errors[adapter.name] == pytest.approx(here.errors[adapter.name], rel=1e-3, abs=1e-6)
        assert there.errors[adapter.name] <= goal.get("max_error", 1)
        back = rebuild(there.collection, adapter.name)
        error = planted.relative_error(adapter, lambda path, back=back: planted.delta(back.slots[path]))
        assert error == pytest.approx(there.errors[adapter.name], rel=1e-3, abs=2e-6)
    assert there.nbytes == pytest.approx(here.nbytes, rel=0.02)
    fine = goal.get("max_error", 1) <= 1e-2
    assert ("mm" in mps.rules.names) == (not fine), "coarse ranges are the device's, all else the CPU's"


def test_many_adapters_in_many_chunks(mps, monkeypatch):
    """Sketched, with random signs that have to go on from chunk to chunk."""
    adapters = planted.adapters(count=60, ranks=(8,), shape=(300, 340), slots=1)
    limit = 8 * 60 * 128 * 4
    monkeypatch.setattr(stream, "DEVICE_BYTES", 2 * limit)
    here, there = loraspan.compress(adapters, rank=6), loraspan.compress(adapters, rank=6, device="mps")
    for name, error in here.errors.items():
        assert there.errors[name] == pytest.approx(error, rel=1e-3)
    assert max(size for direction, size, _ in mps.rules.moves if direction == "to") <= limit


@pytest.mark.parametrize("goal", GOALS, ids=str)
def test_adapters_that_lie_there(mps, goal):
    adapters = planted.adapters()
    moved = [
        Adapter(a.name, {p: Slot(mps.put(s.down), mps.put(s.up), s.scale) for p, s in a.slots.items()})
        for a in adapters
    ]
    here, there = loraspan.compress(adapters, **goal), loraspan.compress(moved, **goal)
    assert all(tensor.device.type == "cpu" for tensor in tensors(there))
    for name, error in here.errors.items():
        if "max_error" not in goal:
            assert there.errors[name] == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert there.errors[name] <= goal.get("max_error", 1)


def test_from_files_to_a_store(mps, tmp_path):
    """Mapped files are sent, and the store is as any other."""
    from loraspan.adapters import peft

    for adapter in planted.adapters(count=5):
        config = {"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4}
        peft.write(Adapter(adapter.name, adapter.slots, config=config), tmp_path / "in" / adapter.name)
    space = loraspan.compress(tmp_path / "in", rank=5, device="mps")
    space.save(tmp_path / "team.span")
    assert loraspan.open(tmp_path / "team.span").errors == space.errors
    assert np.mean(list(space.errors.values())) < 0.6
    assert {direction for direction, *_ in mps.rules.moves} == {"to", "from"}
