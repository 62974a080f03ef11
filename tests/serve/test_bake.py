"""A baked model is the base with the task in its weights: PEFT's own merge says so, and the base stays as it is."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import oracles
from adapters import models
from adapters.test_peft_models import CASES
from loraspan import compress
from loraspan.adapters import Adapter, Slot, peft
from loraspan.errors import MismatchError, NotFiniteError, ShapeError, UnknownTaskError, UnsupportedError
from loraspan.serve.bake import bake
from serve.samples import merged, space_of, untouched

U32 = oracles.UNIT_ROUNDOFF[torch.float32]


def off(slot):
    """Bound the difference of two sums ``W + dW`` in float32, in units of the largest ``|W|`` and ``|up| |down|``."""
    return (slot.lora_rank + 4) * U32, float((slot.up.abs() @ slot.down.abs()).max())


@pytest.mark.parametrize(
    "case",
    ["alpha-not-rank", "conv1d", "head", "all-biases", "embeddings", "tokens", "saved-module", "conv2d",
     "dora", "conv2d-dora", "one-expert-parameter", "two-expert-parameters"],
)  # fmt: skip
@pytest.mark.parametrize("share", [False, True])
def test_is_what_peft_merges(case, share, tmp_path):
    name, config = CASES[case]
    space = space_of(name, tmp_path / "in", {"sql": config})
    model = models.build(name)

    with untouched(model):
        baked = bake(model, space, "sql", share=share)

    theirs = merged(name, space, "sql", tmp_path / "out")
    ours, theirs = baked.state_dict(), theirs.state_dict()
    assert type(baked) is type(model)
    assert ours.keys() == theirs.keys()
    bounds = [off(slot) for slot in space.reconstruct("sql").slots.values()]
    for key, tensor in ours.items():
        bound = max(bound for bound, _ in bounds) * (tensor.abs().max() + max(size for _, size in bounds))
        assert (tensor - theirs[key]).abs().max() <= bound, key
    changed = [key for key, tensor in ours.items() if not torch.equal(tensor, model.state_dict()[key])]
    assert len(changed) >= len({slot.split("[")[0] for slot in space.reconstruct("sql").slots})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_is_rounded_once(dtype, tmp_path):
    name, config = CASES["alpha-not-rank"]
    space = space_of(name, tmp_path, {"sql": config})
    model = models.build(name).to(dtype)

    baked = bake(model, space, "sql")

    for path, slot in space.reconstruct("sql").slots.items():
        exact = oracles.to_numpy(model.get_submodule(path).weight)
        exact = exact + oracles.to_numpy(slot.up) @ oracles.to_numpy(slot.down)
        # float64 becomes a half by way of float32
        bound = (oracles.UNIT_ROUNDOFF[dtype] + 2 * U32) * abs(exact) + float(torch.finfo(dtype).tiny)
        oracles.assert_within(baked.get_submodule(path).weight, exact, bound)


TIED = {
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["wte"]},
    "both": {"target_modules": ["lm_head", "wte"]},
    "tokens": {"target_modules": ["c_attn"], "trainable_token_indices": [1, 5], "fan_in_fan_out": True},
    "saved-head": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("share", [False, True])
def test_what_is_tied_changes_where_it_is_adapted(case, share, tmp_path):
    """Against PEFT before it merges; merging changes both ends of a tie, whichever was adapted."""
    space = space_of("gpt2", tmp_path / "in", {"sql": {"r": 3, "lora_alpha": 7, **TIED[case]}})
    space.export("sql", tmp_path / "out")
    expected = models.load_outputs("gpt2", tmp_path / "out")
    model = models.build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight

    with untouched(model):
        baked = bake(model, space, "sql", share=share)

    base = models.outputs(model)
    assert (expected - base).norm() > 0.01 * base.norm()
    # two float32 runs of a model of about a hundred sums, as in the tests of exported adapters
    assert (models.outputs(baked) - expected).norm() <= 100 * U32 * expected.norm()
    assert (baked.lm_head.weight is baked.transformer.wte.weight) == (case == "tokens")
    assert baked.config.tie_word_embeddings == (case == "tokens")
    assert model.config.tie_word_embeddings
    baked.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(models.outputs(again), models.outputs(baked))


def test_another_base_weight_is_not_put_in_one_end_of_a_tie(tmp_path):
    """PEFT writes it into the parameter that both ends are."""
    models.save_adapter("gpt2", tmp_path, r=3, target_modules=["wte"])
    adapter = peft.read(tmp_path, name="sql")
    extras = {"base_model.model.transformer.wte.base_layer.weight": torch.ones(48, 32)}
    model = models.build("gpt2")
    with untouched(model), pytest.raises(UnsupportedError, match="one parameter"):
        bake(model, compress([dataclasses.replace(adapter, extras=extras)], rank=3), "sql")


def spans(model):
    """The memory of all parameters, by name."""
    return {name: parameter.untyped_storage().data_ptr() for name, parameter in model.named_parameters()}


def tiny(**slots):
    """A space of one task with these slots, given as their shapes ``(n, d)``."""
    rng = torch.Generator().manual_seed(3)
    made = {
        path: Slot(torch.randn(2, d, generator=rng), torch.randn(n, 2, generator=rng), 0.7)
        for path, (n, d) in slots.items()
    }
    return compress([Adapter("sql", made)], rank=2)


def test_sharing_takes_the_adapted_memory_and_no_more():
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7), nn.BatchNorm1d(7))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    shared, copied = (bake(model, tiny(**{"1": (7, 6)}), "sql", share=share) for share in (True, False))

    assert {name for name, at in spans(shared).items() if at != spans(model)[name]} == {"1.weight"}
    assert not set(spans(copied).values()) & set(spans(model).values())
    # whatever is done with the model that shares, but writing into what is shared
    shared.train()(torch.randn(8, 5)).sum().backward()
    shared.half()
    shared[0].weight = nn.Parameter(torch.zeros(6, 5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Quantized(nn.Linear):
    """A layer as quantizers write them: a Linear whose weight is packed."""

    def __init__(self):
        super().__init__(6, 5)
        self.weight = nn.Parameter(torch.zeros(15, 1, dtype=torch.uint8), requires_grad=False)


class Packed(nn.Module):
    """A layer as others write them: no weight at all."""

    qweight = torch.zeros(3, 5, dtype=torch.int32)


def twice():
    layer = nn.Linear(6, 5)
    return nn.ModuleDict({"q": layer, "same": layer})


REFUSED = {
    "another shape": (nn.ModuleDict({"q": nn.Linear(6, 4)}), ShapeError, r"'q'.*\[5, 6\].*\[4, 6\]"),
    "no module": (nn.ModuleDict({"k": nn.Linear(6, 5)}), MismatchError, "'q'.*no such module"),
    "quantized": (nn.ModuleDict({"q": Quantized()}), UnsupportedError, "'q'.*Quantized.*uint8"),
    "packed": (nn.ModuleDict({"q": Packed()}), UnsupportedError, "'q'.*Packed.*quantization"),
    "computed": (
        nn.ModuleDict({"q": nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))}),
        UnsupportedError,
        "q.weight.*computed",
    ),
    "float8": (
        nn.ModuleDict({"q": nn.Linear(6, 5).to(torch.float8_e4m3fn)}), UnsupportedError, "q.weight.*float8_e4m3fn"),
    "not loaded": (nn.ModuleDict({"q": nn.Linear(6, 5, device="meta")}), UnsupportedError, "meta"),
    "two names": (twice(), MismatchError, "'q', 'same'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused_by_name(case):
    model, error, words = REFUSED[case]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        bake(model, tiny(q=(5, 6)), "sql")
    after = model.state_dict()
    assert all(after[name].is_meta or torch.equal(after[name].float(), before[name].float()) for name in before)


def test_a_weight_that_overflows_is_refused():
    model = nn.ModuleDict({"q": nn.Linear(6, 5)}).half()
    model.q.weight.data.fill_(65504.0)
    space = compress([Adapter("sql", {"q": Slot(torch.ones(1, 6), 100 * torch.ones(5, 1), 1.0)})], rank=1)
    with pytest.raises(NotFiniteError, match=r"q\.weight.*float16"):
        bake(model, space, "sql")


def test_a_bias_without_a_place_is_refused(tmp_path):
    """PEFT refuses to merge it too: a config would not know of it."""
    space = space_of("llama", tmp_path, {"sql": CASES["lora-bias"][1]})
    model = models.build("llama")
    with untouched(model), pytest.raises(MismatchError, match=r"o_proj.*has no 'bias'"):
        bake(model, space, "sql")


@pytest.mark.parametrize("paths", [None, lambda path: f"inner.{path}"])
def test_a_model_that_something_wraps(paths, tmp_path):
    name, config = CASES["alpha-not-rank"]
    space = space_of(name, tmp_path, {"sql": config})
    model = models.build(name)
    wrapped = bake(nn.ModuleDict({"inner": model}), space, "sql", paths=paths)
    assert torch.equal(models.outputs(wrapped["inner"]), models.outputs(bake(model, space, "sql")))


def test_a_bias_of_lora_takes_its_scale(tmp_path):
    config = {"r": 4, "lora_alpha": 10, "lora_bias": True, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    space = space_of("bert", tmp_path / "in", {"sql": config})
    ours, theirs = (made.state_dict() for made in (
        bake(models.build("bert"), space, "sql"), merged("bert", space, "sql", tmp_path / "out")))  # fmt: skip
    for key, tensor in ours.items():
        assert (tensor - theirs[key]).abs().max() <= 8 * U32 * tensor.abs().max()


def test_an_unknown_task_is_refused():
    with pytest.raises(UnknownTaskError, match="'sqll'"):
        bake(nn.ModuleDict({"q": nn.Linear(6, 5)}), tiny(q=(5, 6)), "sqll")
