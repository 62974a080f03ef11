"""attach and detach: which module a slot means, what is refused, and a model that is as it was."""

import gc
import subprocess
import sys

import pytest
import torch
from torch import nn

import loraspan
import oracles
import serving
from loraspan.adapters import Adapter, Slot
from loraspan.errors import ArgumentError, MismatchError, UnsupportedError

NAMES = ["task 0", None, "task 3"]


def linear_space(path, n=4, d=6, kind="linear"):
    slot = Slot(torch.ones(2, d) + torch.eye(2, d), torch.eye(n, 2), 0.3, kind)
    return loraspan.compress([Adapter("one", {path: slot})], rank=2)


@pytest.mark.parametrize("gradients", [True, False])
def test_every_row_has_its_task_and_a_row_without_one_the_bits_of_the_base_model(device, gradients):
    """With gradients into new memory, without them in place."""
    with torch.set_grad_enabled(gradients):
        every_row_has_its_task(device)


def every_row_has_its_task(device):
    space, model, x = serving.team(), serving.Tower().to(device), serving.batch(4)
    tasks = ["task 0", None, {"task 1": 0.7, "task 3": -0.4}, "task 2"]
    base = model(x.to(device))
    served = loraspan.attach(model, space)
    with served.tasks(tasks):
        y = served(x.to(device))
    serving.close(y, serving.expected(space, x, tasks))
    assert oracles.same_bits(y[1], base[1])
    assert not torch.equal(y[0], base[0])
    assert oracles.same_bits(served(x.to(device)), base)
    with served.tasks(None):
        assert oracles.same_bits(served(x.to(device)), base)


def test_tokens_of_a_row_have_their_own_tasks():
    space, x = serving.team(), serving.batch(2)
    names = [["task 0", None, {"task 1": 0.5}], ["task 3", "task 3", "task 2"]]
    served = loraspan.attach(serving.Tower(), space)
    with served.tasks(names, per="token"):
        y = served(x)
    # the tower works token by token, so each token is a row
    flat = serving.expected(space, x.reshape(-1, 1, serving.D), [name for row in names for name in row])
    serving.close(y, flat.reshape(y.shape))


@pytest.mark.parametrize("form", ["rows", "tokens", "mixtures"])
def test_tensors_say_what_names_say(form):
    space, x = serving.team(), serving.batch(2)
    served = loraspan.attach(serving.Tower(), space)
    if form == "rows":
        given, names, options = {"task_ids": space.ids(["task 2", None])}, ["task 2", None], {}
    elif form == "tokens":
        names, options = [["task 2", None, "task 1"], ["task 0", "task 0", None]], {"per": "token"}
        given = {"task_ids": space.ids(names)}
    else:
        names, options = [{"task 1": 0.5, "task 2": 2.0}, "task 0"], {}
        ids = torch.tensor([[1, 2], [0, -1]])
        given = {"task_ids": ids, "task_shares": torch.tensor([[0.5, 2.0], [1.0, 0.0]])}
    with served.tasks(names, **options):
        wanted = served(x)
    assert oracles.same_bits(served(x, **given), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_tables_take_the_dtype_of_the_weight(dtype):
    space, x = serving.team(), serving.batch(3, dtype)
    model = serving.Tower().to(dtype)
    served = loraspan.attach(model, space)
    with served.tasks(NAMES):
        y = served(x)
    assert y.dtype == dtype
    serving.close(y, serving.expected(space, x, NAMES), dtype)
    tables = model.layers[0].q_proj.tables
    assert {tables.now.v.dtype, tables.now.cores.left.dtype, tables.now.cores.right_private.dtype} == {dtype}
    given = loraspan.attach(served.detach(), space, dtype=torch.float16)
    assert given.model.layers[0].q_proj.tables.now.u.dtype == torch.float16


def test_tables_follow_a_model_that_moves():
    space, x = serving.team(), serving.batch(3)
    served = loraspan.attach(serving.Tower(), space)
    served.double()
    with served.tasks(NAMES):
        serving.close(served(x.double()), serving.expected(space, x, NAMES), torch.float64)


def test_detach_gives_the_very_modules_back():
    model, x = serving.Tower(), serving.batch(2)
    before, state = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    hook = model.layers[0].q_proj.register_forward_hook(lambda *_: None)
    served = loraspan.attach(model, serving.team())
    assert set(served.state_dict()) == set(model.state_dict()) == set(state)
    served.load_state_dict({key: value + 1 for key, value in state.items()})
    assert torch.equal(before["layers.0.q_proj"].weight, state["layers.0.q_proj.weight"] + 1)
    model.load_state_dict(state)
    assert served.layers is model.layers
    assert model.layers[0].q_proj.in_features == serving.D
    with served.tasks("task 0"):
        served(x)
    assert served.detach() is model
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in before.items()}
    assert all(oracles.same_bits(value, state[name]) for name, value in model.state_dict().items())
    assert list(model.layers[0].q_proj._forward_hooks) == [hook.id]
    for call in (lambda: served(x), lambda: served.tasks("task 0").__enter__()):
        with pytest.raises(ArgumentError, match="is detached: attach again"):
            call()


def test_what_is_written_into_a_served_layer_is_written_into_the_module():
    """As where transformers ties weights."""
    model = serving.Tower()
    served, module = loraspan.attach(model, serving.team()), model.layers[0].q_proj.base
    weight = nn.Parameter(torch.zeros_like(module.weight))
    model.layers[0].q_proj.weight = weight
    assert module.weight is weight
    assert [name for name, _ in model.layers[0].q_proj.named_parameters()] == ["base.weight", "base.bias"]
    model.layers[0].q_proj.bias = None
    assert module.bias is None
    assert set(served.state_dict()) == set(served.detach().state_dict())


class Around(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.inside = module

    def forward(self, x):
        return self.inside(x)


def test_detach_finds_its_layers_where_others_put_them_and_leaves_theirs():
    """Such as PEFT, which puts what it has wrapped back when it merges."""
    model, x = serving.Tower(), serving.batch(1)
    first = model.layers[0].q_proj
    model.layers[0].q_proj = around = Around(first)
    served = loraspan.attach(model, serving.team(), paths=lambda path: f"{path}.inside" if "0" in path else None)
    model.layers[0].q_proj = around.inside
    model.layers[1].q_proj = other = nn.Linear(serving.D, serving.N)
    served.detach()
    assert model.layers[0].q_proj is around.inside is first
    assert model.layers[1].q_proj is other
    model(x)


def test_a_model_whose_wrapper_nobody_holds_has_its_modules_back():
    """Nobody could name its tasks, nor detach it."""
    model, space = serving.Tower(), serving.team()
    before = [id(module) for module in model.modules()]
    loraspan.attach(model, space)
    gc.collect()
    assert [id(module) for module in model.modules()] == before
    served = loraspan.attach(model, space)
    with served.tasks("task 0"):
        assert not torch.equal(served(serving.batch(1)), serving.Tower()(serving.batch(1)))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = serving.Tower(), serving.Tower(2)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 4)])


REFUSED = {
    "nothing there": (nn.Sequential(nn.Linear(6, 4)), "q", MismatchError, r"'q': the model has no such module"),
    "two of a name": (Twice(), "layers.0.q_proj", MismatchError, r"may mean 'encoder.layers.0.q_proj', 'decoder"),
    "another shape": (nn.Sequential(nn.Linear(6, 5)), "0", MismatchError, r"\[4, 6\] and meets \[5, 6\] at '0'"),
    "no linear map": (nn.Sequential(nn.LayerNorm(6)), "0", MismatchError, r"meets a LayerNorm"),
    "attention": (
        nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)}), "a.out_proj", UnsupportedError, "MultiheadAttention, which",
    ),
    "a fast path": (nn.TransformerEncoderLayer(4, 2, 6), "linear2", UnsupportedError, "does not call it"),
    "a routed expert": (Routed(), "experts.0", UnsupportedError, "sees the tokens that were routed to it"),
    "no memory": (nn.Sequential(nn.Linear(6, 4, device="meta")), "0", UnsupportedError, "meta device"),
    "the whole": (nn.Linear(6, 4), "", UnsupportedError, "whole model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_by_name_and_the_model_left_as_it_was(case):
    model, path, error, message = REFUSED[case]
    n, d = (4, 4) if case == "attention" else (4, 6)
    space = linear_space(path or "x", n, d)
    before = [id(module) for module in model.modules()]
    with pytest.raises(error, match=message):
        loraspan.attach(model, space, paths=(lambda _: "") if not path else None)
    assert [id(module) for module in model.modules()] == before


def test_a_module_that_fails_after_others_were_built_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4), Routed())
    slot = Slot(torch.eye(2, 6), torch.eye(4, 2), 1.0)
    space = loraspan.compress([Adapter("one", {"0": slot, "1.experts.0": slot})], rank=2)
    before = [id(module) for module in model.modules()]
    with pytest.raises(UnsupportedError, match="experts"):
        loraspan.attach(model, space)
    assert [id(module) for module in model.modules()] == before


def test_the_error_lists_what_is_wrong_with_every_slot():
    slot = Slot(torch.eye(2, 6), torch.eye(4, 2), 1.0)
    space = loraspan.compress([Adapter("one", dict.fromkeys(("a", "b", "0", "1", "c", "e", "f"), slot))], rank=2)
    with pytest.raises(MismatchError) as error:
        loraspan.attach(nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 5)), space)
    text = str(error.value)
    assert "6 of the space's slots" in text
    assert "and 1 more" in text
    assert "'a': the model has no such module" in text
    assert "has shape [4, 6] and meets [5, 6]" in text
    assert "The model has '0', '1'" in text


@pytest.mark.parametrize("how", ["wrapped", "headless", "a function"])
def test_paths_that_end_alike_or_a_function_find_the_module(how):
    space, x, tower = serving.team(), serving.batch(1), serving.Tower()
    model = {"wrapped": nn.Sequential(nn.Sequential(tower)), "headless": tower.layers, "a function": Twice()}[how]
    paths = (lambda path: f"encoder.{path}") if how == "a function" else None
    served = loraspan.attach(model, space, paths=paths)
    inner = model.encoder if how == "a function" else tower
    with served.tasks("task 1"):
        y = inner(x)
        other = model.decoder(x) if how == "a function" else None
    serving.close(y, serving.expected(space, x, ["task 1"]))
    if other is not None:
        assert oracles.same_bits(other, serving.Tower(2)(x))


def test_a_module_that_stands_in_two_places_is_served_in_both():
    space = linear_space("a")
    linear = nn.Linear(6, 4)
    model = nn.ModuleDict({"a": linear, "b": linear})
    served = loraspan.attach(model, space)
    assert model["a"] is model["b"]
    served.detach()
    assert model["a"] is linear
    assert model["b"] is linear


class Through(nn.Linear):
    """What comes out is what went in, turned."""

    def forward(self, x):
        return x[..., : self.out_features]


@pytest.mark.parametrize("how", ["shares memory", "hooked", "remembers"])
def test_what_others_hold_of_the_base_output_is_left_alone(how):
    space, seen = linear_space("0", 6, 6), []
    model = nn.Sequential(Through(6, 6) if how == "shares memory" else nn.Linear(6, 6))
    if how == "hooked":
        model[0].register_forward_hook(lambda _, __, y: seen.append(y))
    if how == "remembers":
        honest = model[0].forward
        model[0].forward = lambda x: seen[0] if seen else seen.append(honest(x)) or seen[0]
    served = loraspan.attach(model, space)
    x = torch.randn(2, 6)
    kept, base = x.clone(), model[0].base(x).detach().clone()
    seen.clear()
    with torch.no_grad(), served.tasks("one"):
        y = served(x)
    assert not torch.equal(y, base)
    assert torch.equal(x, kept)
    assert all(torch.equal(each, base) for each in seen)


class Eighths(nn.Module):
    """A linear layer in integers: what a quantized base looks like."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("codes", (linear.weight * 8).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) / 8, self.bias)


def test_a_quantized_base_is_served_in_the_dtype_that_is_stored():
    space, x = serving.team(), serving.batch(2)
    model, plain = serving.Tower(), serving.Tower()
    for tower in (model, plain):
        for layer in tower.layers:
            quantized = Eighths(layer.q_proj)
            layer.q_proj = quantized
            if tower is plain:
                layer.q_proj = nn.Linear(serving.D, serving.N)
                layer.q_proj.weight.data, layer.q_proj.bias = quantized.codes / 8, quantized.bias
    served, same = loraspan.attach(model, space), loraspan.attach(plain, space)
    with served.tasks(["task 0", "task 3"]), same.tasks(["task 0", "task 3"]):
        assert oracles.same_bits(served(x), same(x))
    tables = model.layers[0].q_proj.tables
    assert tables.now.v.dtype == space.collection.dtype == torch.float32


ALONE = """
import sys
for name in ("peft", "transformers", "vllm"):
    assert name not in sys.modules
    sys.modules[name] = None
import torch
import loraspan
from loraspan.adapters import Adapter, Slot
space = loraspan.compress([Adapter("sql", {"0": Slot(torch.ones(1, 3), torch.ones(2, 1), 0.5)})], rank=1)
model = torch.nn.Sequential(torch.nn.Linear(3, 2))
served = loraspan.attach(model, space)
with torch.no_grad(), served.tasks(["sql", None]):
    y = served(torch.ones(2, 3))
assert torch.allclose(y[0] - y[1], torch.tensor(1.5))
loraspan.bake(served.detach(), space, "sql")
"""


def test_it_needs_neither_peft_nor_transformers():
    subprocess.run([sys.executable, "-c", ALONE], check=True)


def test_switching_takes_microseconds_and_makes_nothing_anew():
    served = loraspan.attach(serving.Tower(), serving.team())
    names = ["task 0", None, "task 3"] * 20
    with served.tasks(names):
        first = served._board.current()
    with served.tasks(list(names)):
        again = served._board.current()
        served(serving.batch(60))
        kept = again.of((60, serving.TOKENS), torch.device("cpu"))[0]
    assert first is again
    with served.tasks(names):
        assert again.of((60, serving.TOKENS), torch.device("cpu"))[0] is kept
