"""Whole graphs: compiled once whatever the tasks are, and never of a task that has left."""

import pytest
import torch
from torch._dynamo.utils import counters

import loraspan
import oracles
import serving
from loraspan.errors import ArgumentError
from loraspan.serve.layer import Served

REST = serving.adapters(noise=0.1)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def gives(space, compiled, names, device):
    """Whether the graph gives each row what its task makes of it."""
    x = serving.batch(len(names))
    y = compiled(x.to(device), task_ids=space.ids(names).to(device))
    serving.close(y, serving.expected(space, x, names))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_one_graph_serves_all_tasks_and_those_that_come_and_go(backend, device):
    space = serving.team()
    # columns of every form that tasks to come have
    space.add(REST[4], max_error=0.3)
    served = loraspan.attach(serving.Tower().to(device), space)
    compiled = torch.compile(served, fullgraph=True, backend=backend)
    # 2 rows: a size of 1 would be another graph
    for names in (["task 0", None], ["task 3", "task 4"], [None, None], ["task 2", "task 2"]):
        gives(space, compiled, names, device)
    gone = space.ids(["task 1", "task 4"]).to(device)
    space.add(REST[5], max_error=0.3)
    gives(space, compiled, ["task 4", "task 5"], device)
    space.remove("task 1", "task 4")
    gives(space, compiled, ["task 0", "task 5"], device)
    space.rename("task 0", "zero")
    space.add(REST[1], max_error=0.3)
    gives(space, compiled, ["zero", "task 1"], device)
    for number in gone:
        ids = torch.stack([number, number * 0 - 1])
        x = serving.batch(2).to(device)
        if device.type == "cpu":
            with pytest.raises(ArgumentError, match="tasks are -1 for none"):
                compiled(x, task_ids=ids)
        else:
            y = compiled(x, task_ids=ids)
            assert y[0].isnan().all()
            assert y[1].isfinite().all()
    gives(space, compiled, ["task 2", "task 5"], device)
    assert counters["stats"]["unique_graphs"] == 1


def test_what_was_compiled_is_so_again_for_larger_tables_and_new_bases_and_no_more():
    space = serving.team(3)
    served, cpu = loraspan.attach(serving.Tower(), space), torch.device("cpu")
    compiled = torch.compile(served, fullgraph=True, backend="eager")
    for adapter in REST[3:]:
        space.add(adapter, max_error=0.01)
        gives(space, compiled, [adapter.name, "task 0"], cpu)
    space.refit(rank=5)
    gives(space, compiled, ["task 2", "task 5"], cpu)
    # the first, one for columns of more forms, one for tables of any length, one for bases of another width
    assert counters["stats"]["unique_graphs"] <= 4


def test_a_graph_takes_tokens_and_mixtures():
    space, x = serving.team(), serving.batch(2)
    served = loraspan.attach(serving.Tower(), space)
    compiled = torch.compile(served, fullgraph=True, backend="aot_eager")
    tokens = space.ids([["task 0", None, "task 1"], ["task 3", "task 2", "task 2"]])
    assert torch.equal(compiled(x, task_ids=tokens), served(x, task_ids=tokens))
    mixture = {"task_ids": torch.tensor([[0, 1], [2, -1]]), "task_shares": torch.tensor([[0.3, 0.6], [1.0, 0.0]])}
    assert torch.equal(compiled(x, **mixture), served(x, **mixture))


def test_a_graph_has_gradients():
    space, x = serving.team(), serving.batch(2).requires_grad_()
    served = loraspan.attach(serving.Tower(), space, train=True)
    compiled = torch.compile(served, fullgraph=True, backend="aot_eager")
    found = []
    for call in (served, compiled):
        with torch.enable_grad():
            call(x, task_ids=space.ids(["task 0", "task 3"])).square().sum().backward()
        found.append([x.grad, *[leaf.grad for leaf in served.loadings().values()]])
        x.grad = None
        for leaf in served.loadings().values():
            leaf.grad = None
    # the same sums, in the same order but for the base model's
    for eager, graph in zip(*found, strict=True):
        assert torch.allclose(eager, graph, rtol=200 * 2.0**-24, atol=200 * 2.0**-24 * float(eager.abs().max()))


def test_a_graph_whose_rows_are_not_told_is_refused_whole_and_served_in_pieces():
    space, x = serving.team(), serving.batch(2)
    served = loraspan.attach(serving.Tower(), space)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"with task_ids=space.ids"):
        torch.compile(served, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    compiled = torch.compile(served, backend="eager")
    for names in (["task 0", "task 1"], ["task 3", None], None):
        with served.tasks(names):
            assert oracles.same_bits(compiled(x), served(x))
    assert oracles.same_bits(compiled(x), served(x))


class Counting(Served):
    """Any layer: it asks for its rows where it needs them."""

    def forward(self, x):
        y, rows = self.base(x), self.rows()
        return y if rows is None else y + rows.ids[:, None, None]


def test_any_layer_may_ask_for_its_rows_in_and_between_graphs():
    space, x = serving.team(), serving.batch(2)
    served = loraspan.attach(serving.Tower(), space)
    layer = served.model.layers[0].back = Counting(served.model.layers[0].back, "layers.0.back")
    layer.board = served._board
    compiled = torch.compile(served, backend="eager")
    for names in (["task 0", "task 2"], None):
        with served.tasks(names):
            assert oracles.same_bits(compiled(x), served(x))
    assert oracles.same_bits(compiled(x, task_ids=torch.tensor([3, 1])), served(x, task_ids=torch.tensor([3, 1])))


class Broken(serving.Tower):
    def forward(self, x):
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        return self.layers[1](x)


def test_tensors_and_a_graph_that_breaks_do_not_go_together():
    """Between two graphs another thread could run, and what is kept for the trace would be seen by both."""
    space = serving.team()
    served = loraspan.attach(Broken(), space)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(served, backend="eager")(serving.batch(1), task_ids=space.ids("task 0"))
    assert served._board.traced is None
    torch._dynamo.reset()
    with served.tasks("task 0"):
        assert oracles.same_bits(torch.compile(served, backend="eager")(serving.batch(1)), served(serving.batch(1)))


def test_packed_tables_are_served_between_graphs_and_refused_within():
    space = loraspan.compress(REST[:3], rank=6, dtype="int8")
    served, x = loraspan.attach(serving.Tower(), space), serving.batch(1)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="not for compiled graphs"):
        torch.compile(served, fullgraph=True, backend="eager")(x, task_ids=space.ids("task 0"))
    torch._dynamo.reset()
    with served.tasks("task 0"):
        assert oracles.same_bits(torch.compile(served, backend="eager")(x), served(x))


def test_what_was_exported_refuses_tasks_that_left():
    """An exported program has the tables as they were, in its own hands."""
    space, x = serving.team(), serving.batch(2)
    served = loraspan.attach(serving.Tower(), space)
    ids = space.ids(["task 0", "task 1"])
    program = torch.export.export(served, (x,), {"task_ids": ids}).module()
    assert torch.equal(program(x, task_ids=ids), served(x, task_ids=ids))
    space.remove("task 1")
    with pytest.raises(ArgumentError, match="tasks are -1"):
        program(x, task_ids=ids)
    space.refit(rank=5)
    with pytest.raises(ArgumentError, match="tasks are -1"):
        program(x, task_ids=space.ids(["task 0", None]))


@pytest.mark.parametrize("how", ["detached", "cannot follow"])
def test_a_graph_of_a_model_that_stopped_serves_nobody(how, monkeypatch):
    space, x = serving.team(), serving.batch(2)
    served = loraspan.attach(serving.Tower(), space)
    compiled, ids = torch.compile(served, fullgraph=True, backend="eager"), space.ids(["task 0", "task 2"])
    program = torch.export.export(served, (x,), {"task_ids": ids}).module()
    compiled(x, task_ids=ids)
    if how == "detached":
        served.detach()
        message = "is detached: attach again"
    else:
        monkeypatch.setattr(type(served._layers), "follow", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError):
            space.remove("task 0")
        message = "could not follow"
    with pytest.raises((ArgumentError, torch._dynamo.exc.Unsupported), match=message):
        compiled(x, task_ids=ids)
    with pytest.raises(ArgumentError, match="tasks are -1"):
        program(x, task_ids=ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_graph_takes_other_tasks_and_gives_nan_for_one_that_left():
    device = torch.device("cuda")
    space, x = serving.team(), serving.batch(2).to(device)
    served = loraspan.attach(serving.Tower().to(device), space)
    ids = space.ids(["task 0", None]).to(device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            served(x, task_ids=ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = served(x, task_ids=ids)

    def gives_for(names):
        ids.copy_(space.ids(names))
        graph.replay()
        serving.close(y, serving.expected(space, x.cpu(), names))

    gives_for(["task 0", None])
    gives_for(["task 3", "task 1"])
    gone = space.ids("task 1")
    space.remove("task 1")
    gives_for(["task 2", "task 3"])
    for adapter in REST[4:]:
        # the tables are outgrown on the way
        space.add(adapter, max_error=0.01)
    gives_for(["task 2", "task 3"])
    ids.copy_(torch.tensor([gone.item(), -1]))
    graph.replay()
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
    ids.copy_(space.ids(["task 8", "task 0"]))
    graph.replay()
    assert y[0].isnan().all()
    space.refit(rank=5)
    ids.copy_(space.ids(["task 0", "task 2"]))
    graph.replay()
    assert y.isnan().all()
