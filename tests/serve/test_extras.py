"""Heads, biases and saved modules are the row's own task's: against PEFT, row by row and as the space changes."""

import dataclasses

import pytest
import torch
from torch import nn

import loraspan
import oracles
from adapters import models
from loraspan.adapters import peft
from loraspan.errors import ArgumentError, UnknownTaskError, UnsupportedError
from matrices import normal
from oracles import F32
from serve.by_hand import Composite, Heads, X, assert_close, headed
from serve.samples import space_of

transformers = pytest.importorskip("transformers")
U32 = oracles.UNIT_ROUNDOFF[F32]
SEQ = {"r": 3, "lora_alpha": 7, "task_type": "SEQ_CLS"}
QUERY = {**SEQ, "target_modules": ["query", "value"]}


def roberta():
    sizes = {**models.SIZES, "num_attention_heads": 4, "max_position_embeddings": 40, "num_labels": 3}
    return transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes))


class Pictures(nn.Module):
    """A convolution with a bias, norms of two kinds, and a composite head."""

    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(48, 6), nn.Conv2d(6, 5, (1, 3))
        self.norm, self.inner, self.head = nn.GroupNorm(1, 5), nn.Linear(5, 6), Composite()

    def forward(self, input_ids):
        grid = self.table(input_ids).permute(0, 2, 1).unflatten(2, (2, 4))
        return self.head(self.inner(self.norm(self.conv(grid)).mean((2, 3))))


CASES = {
    "classifier": ("bert", QUERY),
    "lora-only": ("bert", {**QUERY, "bias": "lora_only"}),
    "all-biases": ("bert", {**SEQ, "target_modules": ["query", "dense"], "bias": "all",
                            "exclude_modules": r".*pooler\.dense"}),
    "nested-head": ("roberta", QUERY),
    "lora-bias": ("llama", {"r": 3, "lora_alpha": 10, "lora_bias": True, "target_modules": ["q_proj", "o_proj"]}),
    "norms": ("llama", {"r": 3, "lora_alpha": 10, "modules_to_save": ["norm"], "target_modules": ["q_proj"]}),
    "tables": ("llama", {"r": 3, "lora_alpha": 10, "modules_to_save": ["embed_tokens", "lm_head"],
                         "target_modules": ["q_proj"]}),
    "conv1d": ("gpt2", {"r": 3, "lora_alpha": 10, "bias": "all", "fan_in_fan_out": True, "target_modules": ["c_attn"]}),
    "composite": ("pictures", {"r": 3, "lora_alpha": 10, "bias": "all", "modules_to_save": ["norm", "head"],
                               "target_modules": ["conv", "inner"]}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _more_models(monkeypatch):
    monkeypatch.setitem(models.BUILD, "roberta", roberta)
    monkeypatch.setitem(models.BUILD, "pictures", Pictures)


def exported(name, space, folder):
    """What PEFT makes of every task as the space gives it back."""
    found = {}
    for task in space.tasks:
        peft.write(space.reconstruct(task), folder / task)
        found[task] = models.load_outputs(name, folder / task)
    return found


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_peft(case, tmp_path):
    name, config = CASES[case]
    plain = {"r": 2, "lora_alpha": 5, "target_modules": config["target_modules"]}
    if name == "gpt2":
        plain["fan_in_fan_out"] = True
    space = space_of(name, tmp_path / "in", {"sql": config, "plain": plain, "legal": config})
    served = loraspan.attach(models.build(name), space)
    base, theirs = models.outputs(served), exported(name, space, tmp_path / "out")
    for tasks in (["sql", "legal"], [None, "sql"], ["legal", "plain"], ["plain", None], ["sql", "sql"]):
        with served.tasks(tasks):
            actual = models.outputs(served)
        for row, task in enumerate(tasks):
            if task is None:
                assert oracles.same_bits(actual[row], base[row])
            else:
                assert (theirs[task][row] - base[row]).norm() > 0.005 * base[row].norm()
                assert_close(actual[row], theirs[task][row])
    model = served.detach()
    assert oracles.same_bits(models.outputs(model), base)
    assert not any(type(module).__module__.startswith("loraspan") for module in model.modules())


def spaced(configs, folder, name="bert"):
    space = space_of(name, folder / "in", configs)
    return space, loraspan.attach(models.build(name), space), exported(name, space, folder / "out")


def test_follows_the_space(tmp_path):
    space, served, theirs = spaced({"sql": {"r": 2, "target_modules": ["query"]}, "legal": QUERY}, tmp_path)
    base = models.outputs(served)
    old = space.ids(["legal"])
    # the first bias and the first pooler's weight of this space, after a removal that takes the only head
    space.remove("legal")
    with pytest.raises(UnknownTaskError), served.tasks("legal"):
        pass
    with pytest.raises(ArgumentError), torch.no_grad():
        served(input_ids=models.TOKENS, task_ids=old)
    for seed in range(3):
        config = {**CASES["all-biases"][1], "modules_to_save": ["pooler"]}
        models.save_adapter("bert", tmp_path / "more" / f"chat {seed}", seed=20 + seed, **config)
        space.add(tmp_path / "more" / f"chat {seed}", max_error=1e-5)
    theirs = exported("bert", space, tmp_path / "again")
    for tasks in (["chat 0", "sql"], ["chat 2", "chat 1"], [None, "chat 2"]):
        with served.tasks(tasks):
            actual = models.outputs(served)
        for row, task in enumerate(tasks):
            assert_close(actual[row], (base if task is None else theirs[task])[row])
    served.detach()


def test_moves_with_the_model(tmp_path):
    _, served, _ = spaced({"sql": QUERY, "legal": CASES["all-biases"][1]}, tmp_path)
    with served.tasks(["sql", "legal"]):
        before = models.outputs(served)
    served.double()
    with served.tasks(["sql", "legal"]):
        wide = models.outputs(served)
    served.float()
    with served.tasks(["sql", "legal"]):
        assert oracles.same_bits(models.outputs(served), before)
    assert_close(before, wide)
    assert not torch.equal(before, wide)


EXTRAS = {
    "dora": ({"head.lora_magnitude_vector": (6,)}, "DoRA"),
    "dora-without": ({}, "DoRA"),
    "tokens": ({"head.token_adapter.trainable_tokens_delta": (2, 6)}, "trained tokens"),
    "no-module": ({"tail.weight": (3, 6)}, "no module for its tensor 'base_model.model.tail.weight'"),
    "no-parameter": ({"head.gain": (3,)}, "has no 'gain'"),
    "shape": ({"head.weight": (3, 7)}, r"is \[3, 6\] in the model and \[3, 7\] in the file"),
    "labels": ({"head.weight": (4, 6)}, r"is \[3, 6\] in the model and \[4, 6\] in the file"),
    "bias": ({"body.bias": (7,)}, r"needs a vector of floats \[6\]; got \[7\]"),
    "no-factors": ({"head.lora_B.bias": (3,)}, "has no factors beside it"),
    "two-names": ({"head.bias": (3,), "head.modules_to_save.bias": (3,)}, "are one parameter, and differ"),
}


@pytest.mark.parametrize("case", EXTRAS)
def test_what_no_rule_covers_is_refused_by_name(case):
    shapes, message = EXTRAS[case]
    extras = {f"base_model.model.{key}": normal(i, *shape, dtype=F32) for i, (key, shape) in enumerate(shapes.items())}
    wrong = dataclasses.replace(headed("wrong", 3, 1), extras=extras, config={"use_dora": case == "dora-without"})
    space = loraspan.compress([headed("fine", 3), wrong], max_error=1e-6, dtype=F32)
    served = loraspan.attach(Heads(), space)
    with served.tasks(["fine", None, None, None]):
        served(X)
    with pytest.raises(UnsupportedError, match=message) as refused, served.tasks("wrong"):
        served(X)
    assert "'wrong'" in str(refused.value)
    with pytest.raises(ArgumentError):
        served(X, task_ids=space.ids(["wrong"]))


def test_what_peft_writes_into_the_base(tmp_path):
    """An embedding that is adapted may be saved whole: a task's own where it is not the model's."""
    models.save_adapter("gpt2", tmp_path / "sql", r=2, target_modules=["wte"], fan_in_fan_out=True)
    model = models.build("gpt2")
    key, own = "base_model.model.transformer.wte.base_layer.weight", model.transformer.wte.weight.detach().clone()
    read = peft.read(tmp_path / "sql")
    same = dataclasses.replace(read, extras={key: own})
    other = dataclasses.replace(read, name="other", extras={key: 2 * own})
    space = loraspan.compress([same, other], max_error=1e-6, dtype=F32)
    served = loraspan.attach(model, space)
    with served.tasks("sql"):
        actual = models.outputs(served)
    assert_close(actual, exported("gpt2", loraspan.compress([same], max_error=1e-6), tmp_path / "out")["sql"])
    # the head is tied to it, and PEFT would change that too
    with pytest.raises(UnsupportedError, match="'lm_head' has too"), served.tasks("other"):
        pass
    served.detach()

    model.lm_head.weight = nn.Parameter(own.clone())
    served = loraspan.attach(model, space)
    with served.tasks([None, "other"]):
        actual = models.outputs(served)
    served.detach()
    with torch.no_grad():
        model.transformer.wte.weight *= 2
    served = loraspan.attach(model, loraspan.compress([read], max_error=1e-6, dtype=F32))
    with served.tasks("sql"):
        assert_close(actual[1], models.outputs(served)[1])
