"""Spaces from their beginning: in memory until they are saved, and through a whole life on disk."""

from __future__ import annotations

import lives
import planted
import pytest
import torch

import loraspan
from loraspan import store
from loraspan.adapters import Adapter
from store.samples import current_bytes

MORE = planted.adapters(count=14)


def test_a_new_space_changes_in_memory_until_it_is_saved(tmp_path):
    space = loraspan.compress(MORE[:5], max_error=0.05)
    space.add(MORE[5:7])
    space.remove("task 0")
    assert (space.path, space.generation) == (None, None)
    space.save(tmp_path / "team.span")
    assert (space.path, space.generation) == (tmp_path / "team.span", 1)
    space.rename("task 1", "one")
    assert loraspan.open(tmp_path / "team.span").tasks == space.tasks == ["one", *(f"task {i}" for i in range(2, 7))]


@pytest.mark.parametrize("dtype", [*lives.DTYPES, "int8", "coded"], ids=str)
def test_a_whole_life(tmp_path, dtype):
    """Add, absorb, rename, replace, remove, refit, over many generations: names, errors and bytes stay true."""
    adapters = planted.adapters(count=40, slots=1, noise=0.01)
    originals = {a.name: a for a in adapters[:5]}
    space = loraspan.compress(adapters[:5], max_error=0.05, dtype=dtype)
    space.save(tmp_path / "team.span")
    for i in range(5, 40, 5):
        space = loraspan.open(tmp_path / "team.span")
        space.add(adapters[i : i + 2])
        space.absorb(adapters[i + 2 : i + 4])
        space.absorb(adapters[i + 4])
        originals |= {a.name: a for a in adapters[i : i + 5]}
        space.remove(f"task {i}")
        del originals[f"task {i}"]
        space.rename(f"task {i + 1}", f"renamed {i}")
        originals[f"renamed {i}"] = originals.pop(f"task {i + 1}")
        space.replace(Adapter(f"task {i + 2}", adapters[i].slots))
        originals[f"task {i + 2}"] = adapters[i]
        if i % 15 == 0:
            space.refit(max_forgetting=0.05)
        assert space.nbytes == pytest.approx(current_bytes(tmp_path / "team.span"), rel=0.01, abs=600)
    opened = loraspan.open(tmp_path / "team.span")
    assert opened.tasks == space.tasks
    assert set(opened.tasks) == originals.keys()
    truth = lives.errors(opened.collection, originals)
    for name, error in opened.errors.items():
        assert truth[name] <= error + lives.FLOOR
        assert error <= 0.1 + 1e-9
    assert not store.verify(tmp_path / "team.span")
    assert {e.problem for e in store.log(tmp_path / "team.span")} == {None}


def test_extras_of_a_task_travel_with_it(tmp_path):
    extras = {"score.weight": torch.arange(6.0).reshape(2, 3)}
    space = loraspan.compress(MORE[:3], rank=4)
    space.save(tmp_path / "team.span")
    space.add(Adapter("headed", MORE[4].slots, extras, {"peft_type": "LORA"}))
    space.refit(rank=3)
    space.rename("headed", "again")
    back = loraspan.open(tmp_path / "team.span").reconstruct("again")
    assert torch.equal(back.extras["score.weight"], extras["score.weight"])
    assert back.config == {"peft_type": "LORA"}
