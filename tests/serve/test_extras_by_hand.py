"""Rows with parameters of their own, against what they are in float64; in graphs, in mixtures, token by token."""

import dataclasses

import pytest
import torch
from torch import nn

import loraspan
import oracles
from adapters import models
from loraspan.adapters import Adapter, Slot
from loraspan.errors import ArgumentError
from loraspan.serve.extras_modules import gather_of
from loraspan.serve.extras_run import Call
from loraspan.serve.extras_tables import GONE, NONE, Shelf
from loraspan.serve.rows import Rows
from matrices import normal
from oracles import F32
from serve.by_hand import Composite, Heads, Small, X, assert_close, headed, heads, of_composite, of_small


def by_hand(model, space, task, x=X, share=1.0):
    """In float64, with parameters between the model's own and the task's."""
    adapter = space.reconstruct(task)
    slot = adapter.slots["body"]
    head = {key: adapter.extras[f"base_model.model.head.{key}"].double() for key in ("weight", "bias")}
    body = model.body.base.weight.double() + share * slot.up.double() @ slot.down.double()
    z = nn.functional.linear(x.double(), body, model.body.base.bias.double())
    if share == 1.0:
        return nn.functional.linear(z, head["weight"], head["bias"])
    own = model.head.base
    weight = own.weight.double() + share * (head["weight"] - own.weight.double())
    return nn.functional.linear(z, weight, own.bias.double() + share * (head["bias"] - own.bias.double()))


def test_heads_of_several_sizes():
    model, space, served = heads(3, 4)
    with served.tasks("of 4"):
        actual = served(X)
    expected = by_hand(model, space, "of 4")
    assert actual.shape == (4, 4)
    assert_close(actual, expected)
    several = r"'of 3' \[3\]; 'of 4' \[4\].* batches of their own"
    with served.tasks(["of 4", "of 4", "of 3", "of 4"]), pytest.raises(ArgumentError, match=several):
        served(X)
    own = r"'of 4' \[4\].*the model's own \[3\]"
    with served.tasks(["of 4", None, None, "of 4"]), pytest.raises(ArgumentError, match=own):
        served(X)
    with served.tasks(["of 3", None, None, "of 3"]):
        assert_close(served(X)[[0, 3]], by_hand(model, space, "of 3")[[0, 3]])


def test_mixtures_are_linear_in_the_parameters():
    model, space, served = heads(3)
    with served.tasks([{"of 3": 0.25}, "of 3", None, {"of 3": 1.0}]):
        actual = served(X)
    assert_close(actual[0], by_hand(model, space, "of 3", share=0.25)[0])
    assert_close(actual[[1, 3]], by_hand(model, space, "of 3")[[1, 3]])
    assert oracles.same_bits(actual[2], served(X)[2])
    # and where a module is not linear in them, there is no such thing
    space = loraspan.compress([of_composite("sql"), of_composite("legal", 5)], max_error=1e-6, dtype=F32)
    served = loraspan.attach(nn.Sequential(Composite()), space)
    x = normal(5, 2, 6, dtype=F32)
    with torch.no_grad(), served.tasks([{"sql": 1.0}, None]):
        whole = served(x)
    with torch.no_grad(), served.tasks(["sql", None]):
        # with shares a few more products
        assert_close(served(x).double(), whole.double())
    named = r"a Composite, which is not linear in them, is not defined: .*'sql'"
    with served.tasks([{"sql": 0.5, "legal": 0.5}, None]), pytest.raises(ArgumentError, match=named):
        served(x)


def test_what_is_in_a_served_module_keeps_its_mode():
    model = nn.Sequential(Composite())
    model[0].dense.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    served = loraspan.attach(model, loraspan.compress([of_composite("sql")], max_error=1e-6, dtype=F32))
    assert served.detach() is model
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_head_within_the_model_has_its_rows():
    """Layers below a module that runs for some rows serve those rows; its other arguments are taken apart too."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = Composite()

        def forward(self, x, mask=None):
            return self.inside(x, mask=mask)

    tasks = [of_composite("sql"), of_composite("legal", 5)]
    moved = [dataclasses.replace(task, slots={"inside.dense": task.slots["0.dense"]},
                                 extras={"base_model.model.inside.scale": task.extras["base_model.model.0.scale"]})
             for task in tasks]  # fmt: skip
    space = loraspan.compress(moved, max_error=1e-6, dtype=F32)
    model = Around()
    served = loraspan.attach(model, space)
    x, mask = normal(5, 5, 6, dtype=F32), torch.rand(5, 6, generator=torch.Generator().manual_seed(1))
    names = ["legal", "sql", None, "legal", "sql"]
    with torch.no_grad(), served.tasks(names):
        actual = served(x, mask=mask)
    plain = served.detach().inside
    for row, name in enumerate(names):
        slot, scale = Slot(torch.zeros(1, 6), torch.zeros(6, 1), 0.0), plain.scale.double()
        if name is not None:
            adapter = space.reconstruct(name)
            slot, scale = adapter.slots["inside.dense"], adapter.extras["base_model.model.inside.scale"].double()
        weight = plain.dense.weight.double() + slot.scale * slot.up.double() @ slot.down.double()
        z = torch.tanh(nn.functional.linear(x[row].double(), weight, plain.dense.bias.double())) * scale[0]
        out = nn.functional.linear(z * mask[row], plain.out_proj.weight.double(), plain.out_proj.bias.double())
        assert_close(actual[row], out.detach())


@pytest.mark.parametrize("first", ["a head", "factors"])
def test_what_comes_for_a_module_that_is_served_leaves_what_is_there(first):
    """Graphs may read it, and have to be told of tasks that leave."""
    slots = {"body": Slot(normal(1, 2, 5, dtype=F32), normal(2, 6, 2, dtype=F32), 0.7)}
    slots["head"] = Slot(normal(3, 2, 6, dtype=F32), normal(4, 3, 2, dtype=F32), 0.7)
    tasks = {"a head": headed("a head", 3, 9), "factors": Adapter("factors", slots)}
    space = loraspan.compress([tasks.pop(first)], max_error=1e-6, dtype=F32)
    served = loraspan.attach(Heads().requires_grad_(False), space)
    before = served.model.head
    (second,) = tasks.values()
    space.add(second, max_error=1e-6)
    if first == "factors":
        assert served.model.head.tables is before.tables
    else:
        assert served.model.head.base is before
    names = ["a head", None, "factors", "a head"]
    y, alone = served(X, task_ids=space.ids(names)), {}
    for name in space.tasks:
        other = loraspan.attach(Heads().requires_grad_(False), loraspan.compress([space.reconstruct(name)], rank=2))
        other.load_state_dict(served.state_dict())
        with other.tasks(name):
            alone[name] = other(X)
    assert_close(y, torch.stack([served(X)[i] if name is None else alone[name][i] for i, name in enumerate(names)]))
    with served.tasks(first):
        before(torch.ones(1, 6))
        space.remove(first)
        with pytest.raises(ArgumentError, match="has left"):
            before(torch.ones(1, 6))


def test_what_was_attached_while_inferring_follows_and_has_gradients():
    model, space, served = heads(3)
    served.detach()
    with torch.inference_mode():
        served = loraspan.attach(model, space)
    space.add(headed("more", 3, 9), max_error=1e-6)
    x = X.clone().requires_grad_()
    with served.tasks(["of 3", "more", None, "of 3"]):
        served(x).sum().backward()
    assert (x.grad != 0).any()
    space.remove("of 3")
    with torch.inference_mode(), served.tasks("more"):
        served(X)


def test_the_default_device_is_not_asked():
    """As `torch.set_default_device` sets it: the model says where it is served."""
    model, space, served = heads(3)
    names = ["of 3", None, {"of 3": 0.5}, "of 3"]
    with served.tasks(names):
        expected = served(X)
    served.detach()
    with torch.device("meta"):
        served = loraspan.attach(model, space)
        with served.tasks(names):
            assert oracles.same_bits(served(X), expected)


def test_a_program_has_the_heads_of_its_rows_and_refuses_tasks_that_left():
    _, space, served = heads(3)
    ids = space.ids(["of 3", None, None, "of 3"])
    program = torch.export.export(served, (X,), {"task_ids": ids}).module()
    assert_close(program(X, task_ids=ids), served(X, task_ids=ids))
    space.remove("of 3")
    with pytest.raises(ArgumentError, match="tasks are -1"):
        program(X, task_ids=ids)


def test_per_token():
    model, space, served = heads(3)
    x = normal(8, 2, 3, 5, dtype=F32)
    with served.tasks([["of 3", None, "of 3"], [None, "of 3", None]], per="token"):
        actual = served(x)
    assert_close(actual[0, [0, 2]], by_hand(model, space, "of 3", x)[0, [0, 2]])
    assert oracles.same_bits(actual[1, ::2], served(x)[1, ::2])
    assert_close(actual[1, 1], by_hand(model, space, "of 3", x)[1, 1])


@pytest.mark.parametrize("names", [("weight",), ("weight", "bias")])
@pytest.mark.parametrize("module", [nn.Linear(5, 3), nn.Linear(5, 3, bias=False), nn.LayerNorm(5)], ids=str)
def test_a_graph_gathers_what_is_brought(module, names):
    """What a task does not bring is the module's own."""
    names = [name for name in names if getattr(module, name) is not None]
    brought = {name: normal(i, 4, *getattr(module, name).shape, dtype=F32) for i, name in enumerate(names)}
    x = normal(6, 4, 2, 5, dtype=F32)
    actual = gather_of(module)(module, brought, x)
    for row in range(4):
        theirs = torch.func.functional_call(module, {name: value[row] for name, value in brought.items()}, x[row])
        assert_close(actual[row], theirs)


def test_a_bias_takes_the_place_of_the_one_that_is_there_now():
    space = loraspan.compress([of_small("sql", 10)], max_error=1e-6, dtype=F32)
    model = Small().requires_grad_(False)
    served = loraspan.attach(model, space)
    with served.tasks([None, "sql"]):
        before = served(models.TOKENS)
        model.conv.base.bias += 1
        after = served(models.TOKENS)
    assert_close(after[1], before[1])
    assert (after[0] - before[0]).norm() > 0.1 * before[0].norm()


def test_compiles_whole_and_once():
    plain = dataclasses.replace(of_small("plain", 40), extras={})
    space = loraspan.compress([of_small("sql", 10), of_small("legal", 20), plain], max_error=1e-6, dtype=F32)
    served = loraspan.attach(Small().requires_grad_(False), space)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(served, fullgraph=True, backend=backend, dynamic=False)
    base = served(models.TOKENS)
    for tasks in (["sql", "legal"], [None, "sql"], ["plain", "legal"]):
        actual = compiled(models.TOKENS, task_ids=space.ids(tasks))
        with served.tasks(tasks):
            assert_close(actual, served(models.TOKENS))
    assert oracles.same_bits(compiled(models.TOKENS, task_ids=space.ids([None, "sql"]))[0], base[0])
    assert len(graphs) == 1
    mixed = {"task_ids": torch.tensor([[0, 1], [-1, 0]]), "task_shares": torch.tensor([[0.5, 0.25], [3.0, 0.75]])}
    eager = served(models.TOKENS, **mixed)
    assert_close(compiled(models.TOKENS, **mixed), eager)
    assert (eager - base).norm() > 0.05 * base.norm()
    # compiled without task_ids, each layer is served between two graphs
    pieces = torch.compile(served, backend="eager")
    with served.tasks(["sql", "legal"]):
        assert_close(pieces(models.TOKENS), served(models.TOKENS))
    # a task that left is nobody else's, and no number where no error is raised
    space.remove("legal")
    with pytest.raises(ArgumentError):
        compiled(models.TOKENS, task_ids=torch.tensor([0, 1]))
    norm = served.model.norm
    x, call = torch.ones(2, 4, 6), (Rows(torch.tensor([0, 1])), Rows(torch.tensor([0, -1])))
    gone, fine = (norm._in_graph(Call((x,), {}, rows)) for rows in call)
    assert torch.equal(gone[0], fine[0])
    assert gone[1].isnan().all()


def test_a_graph_refuses_what_it_cannot_hold():
    space = loraspan.compress([of_composite("sql")], max_error=1e-6, dtype=F32)
    served = loraspan.attach(nn.Sequential(Composite()), space)
    compiled = torch.compile(served, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="runs in eager code"):
        compiled(torch.ones(2, 6), task_ids=space.ids(["sql", None]))
    model, space, served = heads(3, 4)
    with pytest.raises(Exception, match="heads of 2 shapes"):
        torch.compile(served, fullgraph=True, backend="eager")(X, task_ids=space.ids(["of 3"] * 4))
    # heads of another size than the model's: rows that have none are no numbers
    model, space, served = heads(4)
    out = torch.compile(served, fullgraph=True, backend="eager")(X, task_ids=space.ids(["of 4", None, "of 4", None]))
    assert out[1::2].isnan().all()
    assert_close(out[::2], by_hand(model, space, "of 4")[::2])


def test_numbers_lead_to_stacks():
    shelf = Shelf(torch.device("cpu"))
    shelf.write(2, {0: {"weight": torch.full((3,), 1.0)}, 1: {}}, ())
    first, last = shelf.now, len(shelf.now.rows) - 1
    shelf.write(2, {}, ())
    assert shelf.now is first
    shelf.write(last + 1, {last: {}}, ())
    assert shelf.now.places(torch.tensor([0, last, last + 1, -2])).tolist() == [0, NONE, GONE, GONE]
    first.rows[last] = GONE
    # another shape has a stack of its own; the first has no room left
    shelf.write(5, {2: {"weight": torch.full((3,), 2.0)}, 4: {"weight": torch.full((2,), 4.0)}}, [0])
    ids = torch.tensor([-1, 1, 2, 4, 0, 3, 5, 10**12, -2])
    found = shelf.now.places(ids).tolist()
    assert found[:2] == [NONE, NONE]
    assert found[4:] == [GONE] * 5
    assert [shelf.now.at(place)["weight"].tolist() for place in found[2:4]] == [[2.0] * 3, [4.0] * 2]
    # what a graph may still read has what it had, but for the task that left
    assert first.places(ids).tolist() == [NONE, NONE, GONE, GONE, GONE, GONE, GONE, GONE, GONE]
    assert first.stacks[0]["weight"].tolist() == [[1.0] * 3]
    now = shelf.now
    shelf.write(6, {5: {"weight": torch.full((2,), 5.0)}}, ())
    shelf.write(7, {6: {"weight": torch.full((2,), 6.0)}}, ())
    shelf.write(8, {7: {"weight": torch.full((2,), 7.0)}}, ())
    assert [len(stack["weight"]) for stack in (*now.stacks, *shelf.now.stacks)] == [2, 1, 2, 4]
    assert shelf.now.at(int(shelf.now.places(torch.tensor(7))))["weight"].tolist() == [7.0] * 2
    # whose stack was too small does not know what was put in a larger one
    assert now.places(torch.tensor([4, 5, 6])).tolist()[1:] == [GONE, GONE]
    assert now.at(int(now.places(torch.tensor(4))))["weight"].tolist() == [4.0] * 2
    # within the room there is, it is the same tables
    now = shelf.now
    shelf.write(8, {}, [7])
    assert shelf.now is now
    assert int(now.places(torch.tensor(7))) == GONE
