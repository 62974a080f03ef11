"""Exports: the same dW under scale 1, extras byte for byte, a folder that appears whole or not at all."""

import dataclasses
import json
import os
import stat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from adapters import folders
from loraspan.adapters import Adapter, Slot, exchange, experts, peft, publish
from loraspan.errors import ArgumentError, FormatError, NotFiniteError, StoreError, UnsupportedError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
KINDS = ["linear", "embedding", "conv2d"]


def dw(slot):
    return slot.scale * slot.up.double() @ slot.down.double()


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 0.3, 2.5, 7.1]),
    seed=st.integers(0, 2**32 - 1),
)
def test_reading_undoes_writing(ranks, kind, dtype, scale, seed, tmp_path_factory):
    rng = torch.Generator().manual_seed(seed)
    slots = {}
    for i, r in enumerate(ranks):
        kernel = (2, 3, 1) if kind == "conv2d" else None
        down, up = torch.randn(r, 6, generator=rng), torch.randn(4, r, generator=rng)
        # paths of which one ends another: a pattern must not reach too far
        path = "x." * i + "layers.1.q"
        slots[path] = Slot(down.to(dtype), up.to(dtype).T.contiguous().T, scale, kind, kernel)
    extras = {f"{folders.PREFIX}head.weight": torch.randn(3, 4, generator=rng).to(dtype)}
    folder = tmp_path_factory.mktemp("out") / "sql"

    peft.write(Adapter("sql", slots, extras, {"task_type": "CAUSAL_LM"}), folder)
    back = peft.read(folder)

    assert back.slots.keys() == slots.keys()
    for path, slot in back.slots.items():
        was = slots[path]
        assert (slot.scale, slot.kind, slot.kernel, slot.up.dtype) == (1.0, was.kind, was.kernel, dtype)
        assert torch.equal(slot.down, was.down)
        # one rounding of each entry of up
        bound = oracles.UNIT_ROUNDOFF[dtype] * scale * was.up.double().abs() @ was.down.double().abs()
        assert ((dw(slot) - dw(was)).abs() <= 1.001 * bound + 1e-300).all()
        assert scale != 1.0 or torch.equal(slot.up, was.up)
    assert torch.equal(back.extras[f"{folders.PREFIX}head.weight"], extras[f"{folders.PREFIX}head.weight"])


@given(experts_count=st.integers(1, 5), ranks=st.data(), seed=st.integers(0, 2**32 - 1))
def test_reading_undoes_writing_of_experts(experts_count, ranks, seed, tmp_path_factory):
    rng = torch.Generator().manual_seed(seed)
    slots = {}
    for parameter, (n, d) in {"mlp.experts.base_layer": (3, 5), "mlp.experts": (5, 4)}.items():
        for e in range(experts_count):
            r = ranks.draw(st.integers(1, 4), label="rank")
            down, up = torch.randn(r, d, generator=rng), torch.randn(n, r, generator=rng)
            slots[f"{parameter}[{e}]"] = Slot(down, up, 1.0, "expert")
    slots["q"] = Slot(torch.randn(3, 5, generator=rng), torch.randn(2, 3, generator=rng), 1.0)
    folder = tmp_path_factory.mktemp("out") / "moe"

    config = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    peft.write(Adapter("moe", slots, config=config), folder)
    back = peft.read(folder)

    assert back.slots.keys() == slots.keys()
    for path, slot in back.slots.items():
        # missing ranks are filled up with zeros, which change nothing
        torch.testing.assert_close(dw(slot), dw(slots[path]), rtol=0, atol=1e-15)


def test_configuration_of_an_export(tmp_path):
    original = folders.CONFIG | {"use_rslora": True, "lora_dropout": 0.1, "auto_mapping": {"a": "b"}, "revision": "v1"}
    adapter = peft.read(folders.write(tmp_path / "in", config=original))
    peft.write(adapter, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 2, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == ["layers.0.q"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("base", "v1")
    assert config["init_lora_weights"] is True
    assert "auto_mapping" not in config


def test_a_bias_takes_the_original_scale_once(tmp_path):
    """Also when the factors come back from a subspace with scale 1; and a second export leaves it."""
    bias = torch.tensor([1.0, 2.0, 4.0])
    tensors = folders.factors() | {f"{folders.PREFIX}layers.0.q.lora_B.bias": bias}
    adapter = peft.read(folders.write(tmp_path / "in", tensors, folders.CONFIG | {"lora_bias": True}))
    slot = adapter.slots["layers.0.q"]
    rebuilt = {"layers.0.q": dataclasses.replace(slot, up=slot.scale * slot.up, scale=1.0)}
    for i, one in enumerate([adapter, dataclasses.replace(adapter, slots=rebuilt)]):
        peft.write(one, tmp_path / f"out{i}")
        peft.write(peft.read(tmp_path / f"out{i}"), tmp_path / f"again{i}")
        for folder in (f"out{i}", f"again{i}"):
            (found,) = peft.read(tmp_path / folder).extras.values()
            assert torch.equal(found, 3.0 * bias)


def test_another_dtype(tmp_path):
    peft.write(folders.adapter(), tmp_path / "out", dtype=torch.bfloat16)
    slot = peft.read(tmp_path / "out").slots["layers.0.q"]
    assert slot.down.dtype == slot.up.dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1e9, 1e-9])
def test_a_scale_that_the_dtype_cannot_hold_is_refused(scale, tmp_path):
    up = torch.ones(3, 2, dtype=torch.float16)
    adapter = Adapter("sql", {"q": Slot(torch.ones(2, 5), up, scale)})
    with pytest.raises(UnsupportedError, match=r"'q', factor up: .*float16.*dtype=torch.float32"):
        peft.write(adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    peft.write(adapter, tmp_path / "out", dtype=torch.float32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad, tmp_path):
    adapter = Adapter("sql", {"q": Slot(torch.ones(2, 5), torch.full((3, 2), bad), 2.5)})
    with pytest.raises(NotFiniteError, match="'q', factor up"):
        peft.write(adapter, tmp_path / "out")


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        peft.write(folders.adapter(), tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "out", *(tmp_path / "out").iterdir()]}
    assert modes == {"out": 0o750, "adapter_config.json": 0o640, "adapter_model.safetensors": 0o640}


def test_an_export_may_be_replaced_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    peft.write(folders.adapter(), out)
    peft.write(folders.adapter(d=7), out)
    assert peft.read(out).slots["layers.0.q"].shape == (3, 7)

    (out / "notes.txt").touch()
    own = folders.write(tmp_path / "own")
    file = tmp_path / "file"
    file.touch()
    for target, says in ((out, "notes.txt"), (own, "adapter_model.safetensors"), (file, "something else")):
        with pytest.raises(ArgumentError, match=says):
            peft.write(folders.adapter(), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "own"]
    assert peft.read(own).slots["layers.0.q"].scale == 3.0


@pytest.mark.parametrize("step", ["write_tensors", "write_text"])
def test_a_failure_on_the_way_leaves_the_old_export(step, tmp_path, monkeypatch):
    peft.write(folders.adapter(), tmp_path / "out")

    def fails(path, *_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(f"loraspan.adapters.peft_write.{step}", fails)
    with pytest.raises(OSError, match="disk full"):
        peft.write(folders.adapter(d=7), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert peft.read(tmp_path / "out").slots["layers.0.q"].shape == (3, 5)


@pytest.mark.parametrize("cannot", [False, True])
def test_folders_are_exchanged_with_the_system_s_help_or_without(cannot, tmp_path, monkeypatch):
    peft.write(folders.adapter(), tmp_path / "out")
    if cannot:
        monkeypatch.setattr(publish, "exchange", lambda *_: False)
    peft.write(folders.adapter(d=7), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert peft.read(tmp_path / "out").slots["layers.0.q"].shape == (3, 7)


def test_a_failed_exchange_of_folders_puts_the_old_one_back(tmp_path, monkeypatch):
    peft.write(folders.adapter(), tmp_path / "out")
    honest = publish.Path.rename
    monkeypatch.setattr(publish, "exchange", lambda *_: False)

    def rename(self, target):
        if self.suffix == ".new":
            raise OSError("no")
        return honest(self, target)

    monkeypatch.setattr(publish.Path, "rename", rename)
    with pytest.raises(StoreError, match="out: cannot be written: no; what was there before is as it was"):
        peft.write(folders.adapter(d=7), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert peft.read(tmp_path / "out").slots["layers.0.q"].shape == (3, 5)


def test_a_draft_goes_with_its_process_and_not_before(tmp_path):
    """One that is held stays; one that nobody holds, and an old folder set aside, are removed by the next export."""
    held, left, aside = (tmp_path / f".out.0000000{i}.{end}" for i, end in enumerate(("new", "new", "old")))
    other = tmp_path / ".out.notes.new"
    for path in (held, left, aside, other):
        path.mkdir()
    with exchange.mark(held):
        peft.write(folders.adapter(), tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"out", held.name, other.name}
    peft.write(folders.adapter(), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", other.name}


def expert(d=5):
    return Slot(torch.ones(2, d), torch.ones(3, 2), 1.0, "expert")


WRONG = {
    "nothing": ({}, {}, ArgumentError, "at least one slot"),
    "a-gap": ({"x.p[0]": expert(), "x.p[2]": expert()}, {"target_parameters": ["x.p"]}, ArgumentError, "0 to 2"),
    "shapes": ({"x.p[0]": expert(), "x.p[1]": expert(6)}, {"target_parameters": ["x.p"]}, ArgumentError, "one shape"),
    "no-number": ({"x.p": expert()}, {"target_parameters": ["x.p"]}, FormatError, "number"),
    "no-parameters": ({"x.p[0]": expert()}, {}, ArgumentError, "target_parameters"),
    "no-kernel": (
        {"q": Slot(torch.ones(2, 4), torch.ones(3, 2), 1.0, "conv2d")}, {}, FormatError, "kernel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_peft_could_not_hold_is_refused(case, tmp_path):
    slots, config, error, says = WRONG[case]
    with pytest.raises(error, match=says):
        peft.write(Adapter("sql", slots, config=config), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_names_of_experts():
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert experts.parameters_of("l.0.mlp.experts.base_layer", targets[:1]) == ["l.0.mlp.experts.gate_up_proj"]
    assert experts.file_path_of("l.0.mlp.experts.base_layer[3]", targets) == "l.0.mlp.experts.base_layer"
    assert experts.file_path_of("l.0.mlp.experts.down_proj[3]", targets[1:]) == "l.0.mlp.experts"
    assert not experts.parameters_of("l.0.xmlp.experts", targets)


def test_what_the_model_needs_beside_the_factors_is_written_again(tmp_path):
    needs = {
        "bias": "lora_only",
        "fan_in_fan_out": True,
        "lora_bias": True,
        "lora_dropout": 0.1,
        "modules_to_save": ["head"],
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": {"table": [1, 5]},
        "use_dora": True,
    }
    tensors = folders.factors() | {f"{folders.PREFIX}layers.0.q.lora_magnitude_vector": torch.ones(3)}
    peft.write(peft.read(folders.write(tmp_path / "in", tensors, folders.CONFIG | needs)), tmp_path / "out")
    assert config_of(tmp_path / "out").items() >= needs.items()
