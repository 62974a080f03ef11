"""Defects that the fuzzer has found in reading adapters, each as the smallest input that shows it."""

import dataclasses

import pytest
import safetensors.torch
import torch

from adapters.folders import CONFIG, PREFIX, factors, write
from loraspan import compress
from loraspan.adapters import peft, scales
from loraspan.errors import FormatError, UnsupportedError

NUMBERS = {
    "lora_alpha past all floats": {"lora_alpha": 10**400},
    "an infinite lora_alpha": '{"peft_type": "LORA", "r": 2, "lora_alpha": 1e999}',
    "a lora_alpha that rsLoRA cannot divide": {"lora_alpha": -(10**400), "use_rslora": True},
    "a rank of infinity": '{"peft_type": "LORA", "r": 2, "rank_pattern": {"q": 1e999}}',
    "an alpha past all floats": {"alpha_pattern": {"q": 10**400}},
    "a rank of nothing": {"r": 0},
    "a rank below nothing": {"r": -2},
    "half a rank": {"rank_pattern": {"layers.0.q": 2.5}},
}


@pytest.mark.parametrize("what", NUMBERS)
def test_numbers_that_no_adapter_has(tmp_path, what):
    config = NUMBERS[what]
    folder = write(tmp_path / "a", config=config if isinstance(config, str) else CONFIG | config)

    with pytest.raises(FormatError, match=r"adapter_config\.json: "):
        peft.read(folder)


@pytest.mark.parametrize("rank", [0, -1, 10**30])
def test_experts_of_no_rank(tmp_path, rank):
    config = CONFIG | {"r": rank, "target_parameters": ["experts.up"], "target_modules": []}
    folder = write(tmp_path / "a", factors("mlp.experts", r=6), config)

    with pytest.raises(FormatError):
        peft.read(folder)


def test_a_pattern_may_not_take_for_ever(tmp_path, deadline, monkeypatch):
    """Two open repeats over a long name take its length cubed, for every key and every module."""
    path = "a." * 450 + "q"
    keys = {f"[a.]*[a.]*[a-{chr(ord('b') + i)}]": 2 for i in range(20)}
    tensors = {key: t for i in range(20) for key, t in factors(f"{path}{i}").items()}
    folder = write(tmp_path / "a", tensors, CONFIG | {"rank_pattern": keys})

    # some seconds at most; here a tenth of them
    assert scales.MAX_STEPS <= 2 * 10**9
    monkeypatch.setattr(scales, "MAX_STEPS", scales.MAX_STEPS // 10)
    with deadline(20), pytest.raises(UnsupportedError, match="would take very long"):
        peft.read(folder)


def test_doubled_names_are_found_at_once(tmp_path, deadline):
    names = ",".join(f'"{i}":0' for i in range(100_000))
    folder = write(tmp_path / "a", config=f'{{{names},"99999":1}}')

    with deadline(20), pytest.raises(FormatError, match="'99999' is there more than once"):
        peft.read(folder)


@pytest.mark.parametrize(("down", "up"), [((2, 0), (3, 2)), ((2, 5), (0, 2)), ((2**20, 0), (0, 2**20))])
def test_a_map_without_inputs_or_outputs(tmp_path, down, up):
    """Without an element nothing in the file stands against its rank, and a Gram of that rank is what a fit forms."""
    tensors = {f"{PREFIX}q.lora_A.weight": torch.zeros(down), f"{PREFIX}q.lora_B.weight": torch.zeros(up)}
    folder = write(tmp_path / "a", tensors, CONFIG | {"r": down[0]})

    with pytest.raises(FormatError, match=r"q\.lora_A\.weight' and .* need \[r, d\] and \[n, r\]"):
        compress([folder], rank=1)


def test_a_rank_far_past_its_map(tmp_path):
    """A file of 200 kB may not ask for a Gram of 20 GB."""
    rank = 50_000
    tensors = {
        f"{PREFIX}q.lora_A.weight": torch.ones(rank, 1).half(),
        f"{PREFIX}q.lora_B.weight": torch.ones(1, rank).half(),
    }
    folder = write(tmp_path / "a", tensors, CONFIG | {"r": rank})

    with pytest.raises(UnsupportedError, match="rank 50000"):
        compress([folder], rank=1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn])
def test_a_bias_that_takes_no_scale(tmp_path, dtype):
    """It is scaled when it is written again, which takes a dtype that can be."""
    bias = f"{PREFIX}layers.0.q.lora_B.bias"
    one = peft.read(write(tmp_path / "a", config=CONFIG | {"lora_bias": True}))
    with pytest.raises(UnsupportedError, match=r"layers\.0\.q\.lora_B\.bias' needs float16"):
        peft.write(dataclasses.replace(one, extras={bias: torch.ones(3).to(dtype)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()

    safetensors.torch.save_file(factors() | {bias: torch.ones(3).to(dtype)}, tmp_path / "a" / peft.WEIGHTS_NAME)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.q\.lora_B\.bias' needs float16"):
        peft.read(tmp_path / "a")


def test_a_parameter_whose_name_is_no_text(tmp_path):
    """JSON may have half a pair of surrogates: a slot of that name could not be written."""
    folder = write(tmp_path / "a", config=CONFIG | {"target_parameters": ["experts.\ud800"]})
    with pytest.raises(FormatError, match="target_parameters needs names of printable characters"):
        peft.read(folder)
