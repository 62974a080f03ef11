"""From files to a store and back: what a user does, end to end."""

from __future__ import annotations

import numpy as np
import planted
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import loraspan
from loraspan.adapters import Adapter, peft
from loraspan.errors import ArgumentError, LoraspanError, StoreError

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul", "mv", "dot", "einsum", "linear")


def written(tmp_path, **options):
    """Planted adapters as PEFT folders, and themselves."""
    adapters = [
        Adapter(a.name, a.slots, config={"peft_type": "LORA", "target_modules": ["q_proj"], "r": 4})
        for a in planted.adapters(**options)
    ]
    for adapter in adapters:
        peft.write(adapter, tmp_path / "adapters" / adapter.name)
    return adapters


@pytest.mark.parametrize("goal", [{"rank": 6}, {"energy": 0.95}, {"max_error": 0.02}], ids=["rank", "energy", "error"])
def test_folder_to_store_to_peft_and_back(tmp_path, goal):
    adapters = written(tmp_path)
    space = loraspan.compress(tmp_path / "adapters", **goal)
    space.save(tmp_path / "team.span")
    opened = loraspan.open(tmp_path / "team.span")
    assert opened.tasks == [adapter.name for adapter in adapters]
    assert opened.errors == space.errors
    assert opened.summary == space.summary
    for adapter in adapters:
        opened.export(adapter.name, tmp_path / "out" / adapter.name)
        back = peft.read(tmp_path / "out" / adapter.name)
        error = planted.relative_error(adapter, lambda path, back=back: planted.delta(back.slots[path]))
        assert error == pytest.approx(opened.errors[adapter.name], abs=1e-6)


def test_nbytes_is_the_size_of_the_folder(tmp_path):
    written(tmp_path)
    space = loraspan.compress(tmp_path / "adapters", rank=6)
    space.save(tmp_path / "team.span")
    size = sum(file.stat().st_size for file in (tmp_path / "team.span").iterdir())
    assert space.nbytes == pytest.approx(size, rel=0.01, abs=600)


def test_export_keeps_the_dtype_of_the_original(tmp_path):
    written(tmp_path, dtype=torch.bfloat16)
    space = loraspan.compress(tmp_path / "adapters", rank=6)
    space.export("task 0", tmp_path / "same")
    space.export("task 0", tmp_path / "asked", dtype=torch.float16)
    assert {slot.up.dtype for slot in peft.read(tmp_path / "same").slots.values()} == {torch.bfloat16}
    assert {slot.up.dtype for slot in peft.read(tmp_path / "asked").slots.values()} == {torch.float16}


def test_compress_multiplies_no_factor_sized_tensor_in_torch(tmp_path):
    """Whatever is as long as a slot is wide goes through the compiled operators, straight from the files."""
    n, d = 211, 307
    written(tmp_path, shape=(n, d), count=6)
    seen: list[str] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            sizes = {size for arg in args if isinstance(arg, torch.Tensor) for size in arg.shape}
            name = func.overloadpacket.__name__
            if name in PRODUCTS and sizes & {n, d}:
                seen.append(f"{name} {[list(a.shape) for a in args if isinstance(a, torch.Tensor)]}")
            return func(*args, **(kwargs or {}))

    with Recorder():
        torch.ones(n, 2).T @ torch.ones(n, 2)
        assert seen.pop().startswith("mm")  # the recorder sees what it is to see
        for goal in ({"rank": 6}, {"energy": 0.9}, {"max_error": 0.01}):
            loraspan.compress(tmp_path / "adapters", **goal)
    assert seen == []


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit_of_a_task(tmp_path, threads):
    written(tmp_path, count=4)
    before = torch.get_num_threads()
    stored = []
    try:
        for count in (2, threads):
            torch.set_num_threads(count)
            space = loraspan.compress(tmp_path / "adapters", rank=4)
            slot = space.reconstruct("task 1").slots["layers.0.q_proj"]
            stored.append(slot.up.numpy().tobytes() + slot.down.numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert stored[0] == stored[1]


def test_progress_counts_up_to_its_total(tmp_path):
    written(tmp_path, count=3)
    calls = []
    loraspan.compress(tmp_path / "adapters", rank=2, progress=lambda *call: calls.append(call))
    for stage in ("read", "fit"):
        counts = [(done, total) for name, done, total in calls if name == stage]
        assert counts[0][0] == 0
        assert counts[-1][0] == counts[-1][1] > 0


def test_one_bad_adapter_is_named_and_nothing_is_written(tmp_path):
    written(tmp_path, count=3)
    file = tmp_path / "adapters" / "task 1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(LoraspanError, match="task 1"):
        loraspan.compress(tmp_path / "adapters", rank=2).save(tmp_path / "team.span")
    assert not (tmp_path / "team.span").exists()


def test_save_does_not_overwrite_unasked(tmp_path):
    space = loraspan.compress(planted.adapters(count=2), rank=2)
    space.save(tmp_path / "team.span")
    with pytest.raises(StoreError):
        space.save(tmp_path / "team.span")
    space.save(tmp_path / "team.span", overwrite=True)


def test_exactly_one_goal():
    with pytest.raises(ArgumentError, match="exactly one of rank, energy, max_error and max_bytes"):
        loraspan.compress(planted.adapters(count=2))


def test_summary_says_what_is_shared():
    shared = loraspan.compress(planted.adapters(noise=0.01), rank=6).summary
    apart = loraspan.compress(
        planted.adapters(shared_out=0, shared_in=0, noise=0.0), max_error=0.1, dtype=torch.float32
    ).summary
    assert "share most of their directions" in shared
    assert "Sharing does not pay" in apart


def test_report_adds_up():
    space = loraspan.compress(planted.adapters(), max_error=0.02, dtype=torch.float32)
    report = space.report()
    assert [line.name for line in report.tasks] == space.tasks
    columns = space.collection.segments[0].columns.values()
    tensors = sum(tensor.nbytes for held in columns for tensor in held.tensors().values())
    assert sum(line.nbytes for line in report.tasks) == tensors
    assert report.basis_nbytes + tensors < report.nbytes
    assert np.isclose(report.as_dict()["tasks"][0]["error"], space.errors["task 0"])
    assert "task 0" in str(report)
