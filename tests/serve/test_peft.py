"""Tasks in PEFT's own models: what PEFT computes from an exported folder, it computes from a space without one."""

import contextlib
import warnings

import pytest
import torch
from torch import nn

import oracles
from adapters import models
from adapters.test_peft_models import CASES
from loraspan import compress
from loraspan.adapters import Adapter, Slot
from loraspan.errors import ArgumentError, MismatchError, ShapeError, UnknownTaskError, UnsupportedError
from loraspan.serve.peft import as_peft
from loraspan.serve.peft_swap import swap_peft
from serve.samples import space_of, untouched

U32 = oracles.UNIT_ROUNDOFF[torch.float32]
LLAMA = {
    "sql": {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "legal": {"r": 6, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
}


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def close(actual, expected, base):
    """Fail unless outputs agree up to a few roundings of ``dW`` and two float32 runs of about a hundred sums."""
    effect = (expected - base).norm()
    assert effect > 0.05 * base.norm(), "the adapter has to matter, or nothing is tested"
    assert (actual - expected).norm() <= 12 * U32 * effect + 100 * U32 * expected.norm()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A space of two tasks of different ranks, and the outputs of PEFT with each and with none."""
    folder = tmp_path_factory.mktemp("llama")
    space = space_of("llama", folder, LLAMA)
    outputs = {None: models.outputs(models.build("llama"))}
    for task in space.tasks:
        space.export(task, folder / "out" / task)
        outputs[task] = models.load_outputs("llama", folder / "out" / task)
    return space.collection, outputs


@pytest.mark.parametrize(
    "case",
    ["mixed-ranks", "embeddings", "tokens", "saved-module", "dora", "lora-bias", "head", "all-biases", "conv1d",
     "conv2d", "one-expert-parameter", "two-expert-parameters"],
)  # fmt: skip
def test_is_what_peft_loads(case, tmp_path):
    name, config = CASES[case]
    space = space_of(name, tmp_path / "in", {"sql": config})
    space.export("sql", tmp_path / "out")
    expected = models.load_outputs(name, tmp_path / "out")
    model = models.build(name)
    base = models.outputs(model)

    with quiet():
        loaded = as_peft(space.collection, model, "sql")

    assert type(loaded).__module__.startswith("peft.")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    close(models.outputs(loaded), expected, base)


def test_several_tasks_are_several_adapters(llama):
    collection, outputs = llama
    model = models.build("llama")

    loaded = as_peft(collection, model, {"sql": "sql", "other": "legal"})

    assert loaded.active_adapter == "sql"
    close(models.outputs(loaded), outputs["sql"], outputs[None])
    loaded.set_adapter("other")
    close(models.outputs(loaded), outputs["legal"], outputs[None])
    assert set(as_peft(collection, models.build("llama"), ["legal", "sql"]).peft_config) == {"legal", "sql"}
    assert torch.equal(models.outputs(loaded.unload()), outputs[None])


@pytest.mark.parametrize("name", ["a.b", "", "keys", "lora_A", "weight", "default.x"])
def test_a_name_that_peft_cannot_hold_is_refused(llama, name):
    collection, _ = llama
    with pytest.raises(ArgumentError, match="dict from a name"):
        as_peft(collection, models.build("llama"), {name: "sql"})


def odd(path="q", shape=(6, 8), name="odd", **options):
    rng = torch.Generator().manual_seed(5)
    slot = Slot(torch.randn(2, shape[1], generator=rng), torch.randn(shape[0], 2, generator=rng), 1.0)
    return compress([Adapter(name, {path: slot}, **options)], rank=2).collection


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("collection", "tasks", "error"),
    [
        (odd("model.layers.7.q"), "odd", MismatchError),
        (odd(Q), "odd", MismatchError),
        (odd(Q, (32, 32), extras={"base_model.model.x": torch.ones(2)}), "odd", MismatchError),
        (odd(), "sqll", UnknownTaskError),
        (odd(), [], ArgumentError),
    ],
    ids=["no-module", "another-shape", "no-place", "no-task", "nothing"],
)  # fmt: skip
def test_a_failure_leaves_the_model_as_it_was(collection, tasks, error):
    model = models.build("llama")
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    with untouched(model), pytest.raises(error):
        as_peft(collection, model, tasks)
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients


def test_what_has_adapters_already_is_refused(llama):
    collection, _ = llama
    model = models.build("llama")
    as_peft(collection, model, "sql")
    with pytest.raises(UnsupportedError, match="unload"):
        as_peft(collection, model, "legal")
    with pytest.raises(ArgumentError, match="rank has to be at least 6"):
        as_peft(collection, models.build("llama"), "legal", rank=5)


def test_a_swap_is_another_task(llama):
    collection, outputs = llama
    model = as_peft(collection, models.build("llama"), "sql", rank=8)
    held = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    for task in ("legal", "sql", "legal"):
        swap_peft(collection, model, task)
        close(models.outputs(model), outputs[task], outputs[None])
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == held


@pytest.mark.parametrize("prepared", [False, True])
def test_a_model_of_pefts_own_keeps_its_scale(llama, prepared, tmp_path):
    """And what it saves afterwards is the task that it serves."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    collection, outputs = llama
    folder = tmp_path / "in"
    models.save_adapter("llama", folder, **{**LLAMA["sql"], "r": 6, "lora_alpha": 20})
    with models.quiet():
        model = models.peft.PeftModel.from_pretrained(models.build("llama"), folder).eval()
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=9, config=model.peft_config)

    swap_peft(collection, model, "legal")

    close(models.outputs(model), outputs["legal"], outputs[None])
    if not prepared:
        model.save_pretrained(tmp_path / "out")
        close(models.load_outputs("llama", tmp_path / "out"), outputs["legal"], outputs[None])


def test_a_compiled_model_compiles_nothing_again(llama):
    collection, outputs = llama
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = as_peft(collection, models.build("llama"), "sql", rank=6)
    fast = torch.compile(model, backend=backend)
    close(models.outputs(fast), outputs["sql"], outputs[None])
    count = len(compiled)
    assert count
    for task in ("legal", "sql"):
        swap_peft(collection, fast, task)
        close(models.outputs(fast), outputs[task], outputs[None])
    assert len(compiled) == count


def test_a_swap_leaves_other_adapters_alone(llama):
    collection, outputs = llama
    model = as_peft(collection, models.build("llama"), {"one": "sql", "two": "legal"}, rank=6)

    swap_peft(collection, model, "legal", adapter_name="one")
    model.set_adapter("two")
    swap_peft(collection, model, "sql", adapter_name="one")
    close(models.outputs(model), outputs["legal"], outputs[None])

    # PEFT would set those of the second to zero
    model = as_peft(collection, models.build("llama"), {"sql": "sql", "sql-2": "legal"}, rank=6)
    with untouched(model), pytest.raises(ArgumentError, match=r"'sql' is a part of '.*sql-2"):
        swap_peft(collection, model, "legal", adapter_name="sql")


def spanning(scale=1.0, rank=2, path="q", **options):
    slots = {path: Slot(torch.eye(rank, 8), torch.eye(6, rank), scale)}
    return Adapter("new", slots, **options)


LIVE = Adapter("live", {"q": Slot(torch.eye(2, 8), torch.eye(6, 2), 1.0)})
TOO = {
    "many columns": (spanning(rank=3), {}, ShapeError, "3 columns, and the model room for 2.*rank=3"),
    "many modules": (spanning(path="k"), {}, MismatchError, "adapts 'k'"),
    "many tensors": (spanning(extras={"base_model.model.h.weight": torch.ones(1)}), {}, UnsupportedError, "h.weight"),
    "no adapter": (spanning(), {"adapter_name": "sql"}, ArgumentError, "'sql'; it has 'default'"),
    "embedding": (
        Adapter("new", {"q": Slot(torch.eye(2, 8), torch.eye(6, 2), 1.0, "embedding")}),
        {}, UnsupportedError, "embedding"),
    "another base": (
        Adapter("new", {"q": Slot(torch.eye(2, 7), torch.eye(6, 2), 1.0)}), {}, ShapeError, r"\[2, 7\].*\[2, 8\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO)
def test_what_does_not_fit_is_refused_and_changes_nothing(case):
    adapter, options, error, words = TOO[case]
    one = compress([LIVE], rank=2).collection
    model = as_peft(one, nn.ModuleDict({"q": nn.Linear(8, 6), "k": nn.Linear(8, 6)}), "live")
    collection = compress([adapter], max_error=1e-5, dtype=torch.float32).collection
    with untouched(model), pytest.raises(error, match=words):
        swap_peft(collection, model, "new", **options)


def test_a_merged_adapter_and_a_head_are_refused(llama, tmp_path):
    collection, _ = llama
    model = as_peft(collection, models.build("llama"), "sql", rank=6)
    model.merge_adapter()
    with untouched(model), pytest.raises(UnsupportedError, match="unmerge"):
        swap_peft(collection, model, "legal")
    space = space_of("bert", tmp_path, {"sql": CASES["head"][1]})
    model = as_peft(space.collection, models.build("bert"), "sql")
    with untouched(model), pytest.raises(UnsupportedError, match="modules_to_save"):
        swap_peft(space.collection, model, "sql")


def test_layers_of_different_scales_are_refused(tmp_path):
    models.save_adapter("llama", tmp_path, **{**LLAMA["sql"], "alpha_pattern": {"q_proj": 31}})
    with models.quiet():
        model = models.peft.PeftModel.from_pretrained(models.build("llama"), tmp_path)
    space = odd(Q, (32, 32))
    with untouched(model), pytest.raises(UnsupportedError, match="one scale"):
        swap_peft(space, model, "odd")
