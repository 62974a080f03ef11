"""A model with an exported adapter gives the outputs of the original: PEFT saves, we read and write, PEFT loads."""

import dataclasses

import pytest
import torch

import oracles
from adapters import models
from loraspan.adapters import peft

ATTENTION = ["q_proj", "k_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "alpha-not-rank": ("llama", {"r": 6, "lora_alpha": 20, "target_modules": ATTENTION}),
    "rslora": ("llama", {"r": 5, "lora_alpha": 9, "use_rslora": True, "target_modules": ATTENTION}),
    "mixed-ranks": (
        "llama",
        {
            "r": 3,
            "lora_alpha": 10,
            "target_modules": [*ATTENTION, "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 64, r"layers\.\d\.self_attn\.[qk]_proj": 7},
            "alpha_pattern": {r"(model|decoder)\.layers\.0\..*k_proj": 31, "v_proj": 1.5},
        },
    ),
    "rslora-patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": ATTENTION,
            "rank_pattern": {"q_proj": 9},
            "alpha_pattern": {"0.self_attn.k_proj": 13},
        },
    ),
    "embeddings": (
        "llama",
        {"r": 4, "lora_alpha": 7, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    ),
    "tokens": (
        "llama",
        {"r": 4, "lora_alpha": 7, "target_modules": ["v_proj"], "trainable_token_indices": [1, 5]},
    ),
    "saved-module": ("llama", {"r": 4, "lora_alpha": 7, "modules_to_save": ["lm_head"], "target_modules": ["v_proj"]}),
    "dora": ("llama", {"r": 4, "lora_alpha": 7, "use_dora": True, "target_modules": ["q_proj", "up_proj"]}),
    "lora-bias": ("llama", {"r": 4, "lora_alpha": 10, "lora_bias": True, "target_modules": ["q_proj", "o_proj"]}),
    "head": ("bert", {"r": 4, "lora_alpha": 7, "task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    "all-biases": (
        "bert",
        {"r": 4, "lora_alpha": 7, "bias": "all", "task_type": "SEQ_CLS", "target_modules": ["query", "dense"],
         "exclude_modules": r".*pooler\.dense"},
    ),
    "conv1d": ("gpt2", {"r": 4, "lora_alpha": 7, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]}),
    "two-expert-parameters": (
        "mixtral",
        {"r": 3, "lora_alpha": 10, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "one-expert-parameter": (
        "mixtral",
        {"r": 3, "lora_alpha": 10, "target_modules": ["q_proj"], "target_parameters": EXPERTS[1:],
         "rank_pattern": {"q_proj": 5, "experts.down_proj": 2}},
    ),
    "conv2d": (
        "pixels",
        {"r": 4, "lora_alpha": 10, "target_modules": ["table", "first", "second", "head"], "rank_pattern": {"head": 2}},
    ),
    "conv2d-dora": ("pixels", {"r": 4, "lora_alpha": 10, "use_dora": True, "target_modules": ["first", "head"]}),
}  # fmt: skip


def other_gauge(adapter, seed=7):
    """Give the same ``dW`` with scale 1 from other factors, as a subspace would give it back."""
    rng = torch.Generator().manual_seed(seed)
    slots = {}
    for path, slot in adapter.slots.items():
        r = slot.lora_rank
        turn, _ = torch.linalg.qr(torch.randn(r, r, generator=rng, dtype=torch.float64))
        down, up = turn @ slot.down.double(), slot.scale * slot.up.double() @ turn.T
        slots[path] = dataclasses.replace(slot, down=down.to(slot.down.dtype), up=up.to(slot.up.dtype), scale=1.0)
    return dataclasses.replace(adapter, slots=slots)


def assert_same_outputs(actual, expected, base, dtype):
    """Compare outputs under a bound from the dtype.

    Rounding turns each dW into one that is at most 3 u off in norm (two factors, and one rounding when they are
    written), so what the adapter does to the outputs moves by some small multiple of u; and two float32 runs of a
    model of about a hundred sums differ by that many float32 roundings.
    """
    effect = (expected - base).norm()
    assert effect > 0.05 * base.norm(), "the adapter has to matter, or nothing is tested"
    slack = 12 * oracles.UNIT_ROUNDOFF[dtype] * effect + 100 * oracles.UNIT_ROUNDOFF[torch.float32] * expected.norm()
    assert (actual - expected).norm() <= slack, f"{(actual - expected).norm() / slack:.2f} times the bound"


@pytest.mark.parametrize("rebuilt", [False, True], ids=["as-read", "rebuilt"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_survive(case, rebuilt, tmp_path):
    name, config = CASES[case]
    expected = models.save_adapter(name, tmp_path / "in", **config)

    adapter = peft.read(tmp_path / "in")
    peft.write(other_gauge(adapter) if rebuilt else adapter, tmp_path / "out")

    actual = models.load_outputs(name, tmp_path / "out")
    assert_same_outputs(actual, expected, models.outputs(models.build(name)), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_outputs_survive_in_half_precision(dtype, tmp_path):
    config = {"r": 6, "lora_alpha": 20, "target_modules": ATTENTION, "rank_pattern": {"q_proj": 4}}
    expected = models.save_adapter("llama", tmp_path / "in", dtype=dtype, **config)

    adapter = peft.read(tmp_path / "in")
    assert {slot.up.dtype for slot in adapter.slots.values()} == {dtype}
    peft.write(other_gauge(adapter), tmp_path / "out")

    actual = models.load_outputs("llama", tmp_path / "out")
    assert_same_outputs(actual, expected, models.outputs(models.build("llama")), dtype)


@pytest.mark.parametrize("case", ["alpha-not-rank", "one-expert-parameter", "conv2d", "embeddings", "conv1d"])
def test_dw_is_that_of_peft(case, tmp_path):
    """Each slot's dW is what PEFT's own layer says, on a model that PEFT loaded from the same file."""
    name, config = CASES[case]
    models.save_adapter(name, tmp_path / "in", **config)
    adapter = peft.read(tmp_path / "in")
    with models.quiet():
        model = models.peft.PeftModel.from_pretrained(models.build(name), tmp_path / "in")
    modules = dict(model.base_model.model.named_modules())
    targets = config.get("target_parameters", [])

    for path, slot in adapter.slots.items():
        layer = modules[peft_path(path, targets)]
        theirs = layer.get_delta_weight("default").double().detach()
        if slot.kind == "expert":
            theirs = theirs[int(path.rpartition("[")[2][:-1])]
        # an embedding and a Conv1D keep their weights as [d, n]
        theirs = theirs.flatten(1) if slot.kind == "conv2d" else theirs
        theirs = theirs.T if slot.kind == "embedding" or name == "gpt2" else theirs
        ours = slot.scale * slot.up.double() @ slot.down.double()
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= 100 * oracles.UNIT_ROUNDOFF[torch.float32] * ours.norm()


def peft_path(path, targets):
    """Give the module of a slot: of an expert of one adapted parameter, that which holds the parameter."""
    stem = path.rpartition("[")[0] or path
    return stem.rpartition(".")[0] if any(stem.endswith(target) for target in targets) else stem
