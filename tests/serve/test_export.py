"""What is exported is the task, whatever it is padded to, and lies where its name can do no harm."""

import dataclasses
import json
import unicodedata

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

import oracles
from adapters import models
from adapters.test_peft_models import CASES
from loraspan import compress
from loraspan.adapters import Adapter, Slot, peft
from loraspan.errors import ArgumentError, FormatError, UnknownTaskError, UnsupportedError
from loraspan.serve.export import VLLM_RANKS
from loraspan.serve.names import INDEX, folder_name, folder_names, read_index
from serve import vllm_stand_in
from serve.samples import space_of

U32 = oracles.UNIT_ROUNDOFF[torch.float32]


def made(name, ranks, seed=0, **options):
    rng = torch.Generator().manual_seed(seed)
    slots = {
        path: Slot(torch.randn(r, 12, generator=rng), torch.randn(9, r, generator=rng), 0.7)
        for path, r in ranks.items()
    }
    return Adapter(name, slots, **options)


@pytest.fixture(scope="module")
def space():
    """Two tasks whose slots differ in rank, the second in two slots of which one is all but nothing."""
    nothing = made("b", {"q": 5, "v": 1}, seed=1)
    tiny = dataclasses.replace(nothing.slots["v"], scale=1e-9)
    return compress([made("a", {"q": 3, "v": 2}), dataclasses.replace(nothing, slots={**nothing.slots, "v": tiny})],
                    max_error=1e-4, dtype=torch.float32)  # fmt: skip


def factors(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    paths = sorted({key.removeprefix("base_model.model.").split(".lora_")[0] for key in tensors})
    return {path: [tensors[f"base_model.model.{path}.lora_{side}.weight"] for side in "AB"] for path in paths}


@pytest.mark.parametrize(
    ("options", "rank"),
    [({"rank_multiple": 4}, 4), ({"rank_multiple": 1}, 3), ({"ranks": (2, 7, 5)}, 5), ({"engine": "vllm"}, 8)],
)
def test_padding_adds_zeros_and_nothing_else(space, tmp_path, options, rank):
    (folder,) = space.export("a", tmp_path / "a", **options).values()

    config = json.loads((folder / "adapter_config.json").read_text())
    assert folder == tmp_path / "a"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (rank, rank, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    for path, slot in space.reconstruct("a").slots.items():
        down, up = factors(folder)[path]
        assert down.shape == (rank, 12)
        assert up.shape == (9, rank)
        assert torch.equal(down[: slot.lora_rank], slot.down)
        assert torch.equal(up[:, : slot.lora_rank], slot.up)
        assert not down[slot.lora_rank :].any()
        assert not up[:, slot.lora_rank :].any()


def test_a_slot_without_columns_gets_one(space, tmp_path):
    assert space.reconstruct("b").slots["v"].lora_rank == 0
    space.export("b", tmp_path / "b")
    assert peft.read(tmp_path / "b").slots["v"].lora_rank == 1
    assert not factors(tmp_path / "b")["v"][1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_factors_are_of_the_dtype_that_was_asked_for(space, tmp_path, dtype):
    folders = space.export(None, tmp_path, dtype=dtype, rank_multiple=8)
    found = {tensor.dtype for folder in folders.values() for both in factors(folder).values() for tensor in both}
    assert found == {dtype}


@pytest.mark.parametrize(
    "case", ["mixed-ranks", "conv1d", "conv2d", "embeddings", "two-expert-parameters", "lora-bias"]
)
def test_peft_computes_the_same_from_padded_factors(case, tmp_path):
    name, config = CASES[case]
    space = space_of(name, tmp_path / "in", {"sql": config})
    space.export("sql", tmp_path / "plain")
    space.export("sql", tmp_path / "padded", rank_multiple=16)
    expected, base = models.load_outputs(name, tmp_path / "plain"), models.outputs(models.build(name))
    assert (expected - base).norm() > 0.05 * base.norm()
    # zeros add nothing, but sums may run in another order: two float32 runs of about a hundred sums
    actual = models.load_outputs(name, tmp_path / "padded")
    assert (actual - expected).norm() <= 100 * U32 * expected.norm()


def test_what_vllm_loads_is_the_task(space, tmp_path):
    for task, folder in space.export(["b", "a"], tmp_path, engine="vllm").items():
        loaded = vllm_stand_in.load(folder, max_lora_rank=8)
        for path, slot in space.reconstruct(task).slots.items():
            down, up, scale = loaded[path]
            assert (scale * up @ down - slot.up @ slot.down).norm() <= 8 * U32 * (slot.up.norm() * slot.down.norm())
    space.export("b", tmp_path / "plain")
    # ranks 5 and 1, and r is the commonest: without padding the larger would be written past the room for r
    with pytest.raises((AssertionError, vllm_stand_in.Refused)):
        vllm_stand_in.load(tmp_path / "plain", max_lora_rank=1)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("dora", "use_dora True"),
        ("head", "modules_to_save"),
        ("saved-module", "modules_to_save"),
        ("all-biases", "bias 'all'"),
        ("tokens", "trainable_token_indices"),
        ("lora-bias", "lora_bias True"),
        ("embeddings", "base_layer.weight"),
        ("one-expert-parameter", "target_parameters"),
        ("conv2d", "kind 'conv2d'"),
    ],
)
def test_what_vllm_cannot_take_is_refused_before_anything_is_written(case, words, tmp_path):
    name, config = CASES[case]
    bad = space_of(name, tmp_path / "in", {"sql": config}).reconstruct("sql")
    space = compress([made("a", {"q": 3}), dataclasses.replace(bad, name="sql")], rank=4)
    with pytest.raises(UnsupportedError, match=f"(?s)vLLM cannot take task 'sql'.*{words}"):
        space.export(None, tmp_path / "out", engine="vllm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "options", "error", "words"),
    [
        ("c", {}, UnknownTaskError, "'c'"),
        (["a", "c"], {}, UnknownTaskError, "'c'"),
        ("b", {"ranks": (1, 4)}, ArgumentError, "5 columns.*at most 4"),
        ("a", {"ranks": ()}, ArgumentError, "at least one"),
        ("a", {"ranks": (8, 0)}, ArgumentError, "got 0"),
        ("a", {"rank_multiple": 2.0}, ArgumentError, r"got 2\.0"),
        ("a", {"rank_multiple": 2, "ranks": (8,)}, ArgumentError, "both"),
        ("a", {"engine": "sglang"}, ArgumentError, "'vllm'; got 'sglang'"),
        ("a", {"dtype": torch.int8}, ArgumentError, "dtype"),
    ],
)
def test_bad_arguments_write_nothing(space, tmp_path, names, options, error, words):
    with pytest.raises(error, match=words):
        space.export(names, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_index_says_what_is_there(space, tmp_path):
    seen = []
    space.export(["b"], tmp_path, progress=lambda *told: seen.append(told))
    with pytest.raises(ArgumentError, match="5 columns"):
        space.export(["a", "b"], tmp_path, ranks=(4,))

    assert seen == [("export", 1, 1)]
    # what was written before the error counts, and what was there stays
    assert {name: entry["rank"] for name, entry in read_index(tmp_path).items()} == {"b": 5, "a": 4}
    assert peft.read(tmp_path / "a").slots["q"].lora_rank == 4
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", INDEX}


INDICES = {
    "no JSON": "{",
    "another file": '{"tasks": {}}',
    "a path": '{"format": "loraspan-export", "tasks": {"a": {"folder": "../a"}}}',
    "another's folder": '{"format": "loraspan-export", "tasks": {"a": {"folder": "b"}}}',
    "no folder": '{"format": "loraspan-export", "tasks": {"a": "a"}}',
    "a name twice": '{"format": "loraspan-export", "tasks": {"a": {"folder": "a"}, "a": {"folder": "a"}}}',
}


@pytest.mark.parametrize("case", INDICES)
def test_a_foreign_index_is_refused(space, tmp_path, case):
    (tmp_path / INDEX).write_text(INDICES[case])
    with pytest.raises(FormatError, match=INDEX):
        space.export(None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [INDEX]
    assert (tmp_path / INDEX).read_text() == INDICES[case]


PLAIN = ["sql", "llama-3.1_sql", "a", "0", "ss", "x" * 80]
ODD = [
    "",
    ".",
    "..",
    "../../etc",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "C:\\x",
    "C:",
    "\x1b[31m",
    "\0",
    "con",
    "nul.txt",
    "com1",
]
ODD += ["x. ", "x.", " x", "-rf", ".hidden", "_x", "SQL", "Sql", "x" * 81, "x" * 10_000, "x" * 9_999 + "y", INDEX]
# halves of pairs, look-alikes, and what folding or composing makes one
ODD += ["sql~abc", "~root", "$HOME", "*", "a\nb", "\ud800", "\uff41", "\u0430", "\u00df", "\u0130", "i\u0307", "\u00e9"]
ODD += ["e\u0301", "\u202esql"]


def test_every_name_has_a_folder_of_its_own():
    folders = folder_names([*PLAIN, *ODD])
    assert [folders[name] for name in PLAIN] == PLAIN
    folded = {unicodedata.normalize("NFKC", folder).casefold() for folder in folders.values()}
    assert len(folded) == len(PLAIN) + len(ODD)
    assert not set(ODD) & set(folders.values())


@hypothesis.given(st.text(st.characters(), max_size=120))
@hypothesis.example("\ud800")
def test_a_name_is_never_a_path(name):
    folder = folder_name(name)
    assert folder == folder_name(name)
    assert folder.isascii()
    assert all(c.isalnum() or c in "._~-" for c in folder)
    assert folder[0] not in ".~-"
    assert folder[-1] != "."
    assert 1 <= len(folder) <= 80
    assert folder.lower() not in {INDEX, "con", "nul", ".", ".."}
    assert (folder == name) or "~" in folder


def test_vllms_ranks_are_those_of_vllm():
    assert set(VLLM_RANKS) == set(vllm_stand_in.RANKS) - {1}
