"""What a PEFT folder becomes: slots, scales, extras, provenance."""

import hashlib
import json

import pytest
import safetensors.torch
import torch

from adapters import folders
from loraspan.adapters import peft
from loraspan.errors import FormatError, UnsupportedError

PREFIX = folders.PREFIX


def test_slots_are_views_in_their_own_dtypes(tmp_path):
    tensors = folders.factors() | folders.factors("layers.0.v", dtype=torch.bfloat16)
    adapter = peft.read(folders.write(tmp_path / "sql", tensors))
    assert adapter.name == "sql"
    assert list(adapter.slots) == ["layers.0.q", "layers.0.v"]
    storages = set()
    for path, slot in adapter.slots.items():
        assert torch.equal(slot.down, tensors[f"{PREFIX}{path}.lora_A.weight"])
        assert torch.equal(slot.up, tensors[f"{PREFIX}{path}.lora_B.weight"])
        assert slot.down.dtype == tensors[f"{PREFIX}{path}.lora_A.weight"].dtype
        storages |= {slot.down.untyped_storage().data_ptr(), slot.up.untyped_storage().data_ptr()}
        assert (slot.scale, slot.kind, slot.lora_rank, slot.shape) == (3.0, "linear", 2, (3, 5))
    assert len(storages) == 1


def test_provenance(tmp_path):
    folder = folders.write(tmp_path / "sql")
    (folder / "README.md").write_text('---\nlibrary_name: peft\nlicense: "cc-by-4.0"\n---\n# license: none\n')
    whole = (folder / "adapter_model.safetensors").read_bytes()
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")]

    source = peft.read(folder, hash_file=True).source

    assert source.path == str(folder)
    assert source.header_sha256 == hashlib.sha256(header).hexdigest()
    assert source.sha256 == hashlib.sha256(whole).hexdigest()
    assert (source.base_model, source.licence) == ("base", "cc-by-4.0")
    assert peft.read(folder).source.sha256 is None


def test_a_file_by_itself(tmp_path):
    folder = folders.write(tmp_path / "sql")
    assert peft.read(folder / "adapter_model.safetensors").name == "sql"
    (folder / "adapter_model.safetensors").rename(folder / "legal.safetensors")
    assert peft.read(folder / "legal.safetensors").name == "legal"
    assert peft.read(folder / "legal.safetensors", name="../x").name == "../x"


def test_old_keys_are_read_under_their_new_names(tmp_path):
    tensors = {key.replace(".weight", ".default.weight"): t for key, t in folders.factors().items()}
    tensors[f"{PREFIX}layers.0.q.lora_magnitude_vector.default"] = torch.ones(3)
    adapter = peft.read(folders.write(tmp_path / "a", tensors, folders.CONFIG | {"use_dora": True}))
    assert list(adapter.slots) == ["layers.0.q"]
    assert list(adapter.extras) == [f"{PREFIX}layers.0.q.lora_magnitude_vector"]


def test_a_dora_without_a_magnitude_is_refused(tmp_path):
    """Read as a plain LoRA it would give other weights than PEFT makes of it."""
    folder = folders.write(tmp_path / "a", folders.factors(), folders.CONFIG | {"use_dora": True})
    with pytest.raises(FormatError, match=r"needs 'layers\.0\.q\.lora_magnitude_vector'.*use_dora to false"):
        peft.read(folder)
    assert peft.read(folders.write(tmp_path / "b", folders.factors(), folders.CONFIG | {"use_dora": False})).slots


def test_everything_else_is_an_extra(tmp_path):
    extras = {
        f"{PREFIX}classifier.weight": torch.rand(3, 4),
        f"{PREFIX}table.base_layer.weight": torch.rand(4, 2).half(),
        f"{PREFIX}layers.0.q.lora_B.bias": torch.rand(3),
    }
    adapter = peft.read(folders.write(tmp_path / "a", folders.factors() | extras))
    assert adapter.extras.keys() == extras.keys()
    assert all(torch.equal(adapter.extras[key], extras[key]) for key in extras)


def test_experts_as_peft_lays_them_out(tmp_path):
    rng = torch.Generator().manual_seed(0)
    experts, r, d, n = 3, 2, 5, 4
    per_expert = [(torch.randn(r, d, generator=rng), torch.randn(n, r, generator=rng)) for _ in range(experts)]
    tensors = {
        f"{PREFIX}mlp.experts.lora_A.weight": torch.cat([down for down, _ in per_expert]),
        f"{PREFIX}mlp.experts.lora_B.weight": torch.stack([up for _, up in per_expert], dim=2).flatten(1),
    }
    config = folders.CONFIG | {"target_parameters": ["experts.down_proj"]}
    adapter = peft.read(folders.write(tmp_path / "a", tensors, config))
    assert list(adapter.slots) == [f"mlp.experts.down_proj[{e}]" for e in range(experts)]
    for slot, (down, up) in zip(adapter.slots.values(), per_expert, strict=True):
        assert slot.kind == "expert"
        assert torch.equal(slot.down, down)
        assert torch.equal(slot.up, up)


WRONG_FACTORS = {
    "lonely": ({f"{PREFIX}q.lora_A.weight": torch.ones(2, 5)}, FormatError, "both factors"),
    "ranks-differ": (folders.factors() | {f"{PREFIX}layers.0.q.lora_B.weight": torch.ones(3, 4)}, FormatError, "r at"),
    "rank-0": (folders.factors(r=0), FormatError, "r at least 1"),
    "twice": (
        folders.factors() | {f"{PREFIX}layers.0.q.lora_A.default.weight": torch.ones(2, 5)},
        FormatError, "second factor",
    ),
    "grouped-conv": (
        {f"{PREFIX}q.lora_A.weight": torch.ones(2, 1, 3, 3), f"{PREFIX}q.lora_B.weight": torch.ones(4, 1, 1, 1)},
        FormatError, "q.lora_A",
    ),
    "conv3d": (
        {f"{PREFIX}q.lora_A.weight": torch.ones(2, 1, 3, 3, 3), f"{PREFIX}q.lora_B.weight": torch.ones(4, 2, 1, 1, 1)},
        UnsupportedError, "Conv2d",
    ),
    "integers": (
        {f"{PREFIX}q.lora_A.weight": torch.ones(2, 3).byte(), f"{PREFIX}q.lora_B.weight": torch.ones(4, 2).byte()},
        UnsupportedError, "float16",
    ),
    "no-factors": ({f"{PREFIX}head.weight": torch.ones(2, 3)}, FormatError, "at least one pair"),
    "no-prefix": ({"q.lora_A.weight": torch.ones(2, 3)}, FormatError, "base_model.model"),
    "variant": (folders.factors() | {f"{PREFIX}layers.0.q.lora_diag": torch.ones(2)}, UnsupportedError, "lora_diag"),
    "other-name": (
        {k.replace(".weight", ".mine.weight"): t for k, t in folders.factors().items()}, UnsupportedError, "mine",
    ),
    "dots": (folders.factors("a..b"), FormatError, "empty parts"),
    "no-path": (folders.factors(""), FormatError, "empty parts"),
    "wrapped": (folders.factors("x.base_layer.out_proj"), UnsupportedError, "MultiheadAttention"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_FACTORS)
def test_factors_that_do_not_fit_are_refused(case, tmp_path):
    tensors, error, says = WRONG_FACTORS[case]
    folder = folders.write(tmp_path / "a", tensors)
    with pytest.raises(error, match=says) as caught:
        peft.read(folder)
    assert str(folder) in str(caught.value)


WRONG_EXPERTS = {
    "rank-does-not-divide": ({"target_parameters": ["x.p"], "r": 3}, FormatError, "multiple"),
    "ambiguous": (
        {"target_parameters": ["x.p", "x.o"], "rank_pattern": {"x.p": 1}}, UnsupportedError, "different ranks",
    ),
    "pattern-or-parameter": ({"target_parameters": ["p"], "target_modules": ".*q"}, UnsupportedError, "full names"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_EXPERTS)
def test_experts_that_are_not_plain_are_refused(case, tmp_path):
    fields, error, says = WRONG_EXPERTS[case]
    folder = folders.write(tmp_path / "a", folders.factors("x", r=4), folders.CONFIG | fields)
    with pytest.raises(error, match=says):
        peft.read(folder)


def test_a_pickle_is_refused_with_the_remedy(tmp_path):
    folder = folders.write(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    for path in (folder, folder / "adapter_model.bin"):
        with pytest.raises(UnsupportedError, match="save_file"):
            peft.read(path)


@pytest.mark.parametrize("gone", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(gone, tmp_path):
    folder = folders.write(tmp_path / "a")
    (folder / gone).unlink()
    with pytest.raises(FormatError, match=gone):
        peft.read(folder)


def test_a_rank_that_the_configuration_leaves_out_is_that_of_the_factors(tmp_path):
    config = {"peft_type": "LORA", "lora_alpha": 6}
    assert peft.read(folders.write(tmp_path / "a", config=config)).slots["layers.0.q"].scale == 3.0


def test_adapters_of_one_recipe_do_not_share_what_can_change(tmp_path):
    one, two = (peft.read(folders.write(tmp_path / name)) for name in ("one", "two"))
    one.config["lora_alpha"] = 99
    one.slots.clear()
    one.extras["x"] = torch.ones(1)
    assert two.config["lora_alpha"] == 6
    assert len(two.slots) == 1
    assert not peft.read(tmp_path / "one").extras
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["lora_alpha"] == 6


def test_what_safetensors_writes_is_read(tmp_path):
    folder = folders.write(tmp_path / "a")
    tensors = folders.factors(r=2, d=1, n=1)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"license": "mit"})
    adapter = peft.read(folder)
    assert adapter.slots["layers.0.q"].shape == (1, 1)
    assert adapter.source.licence == "mit"
