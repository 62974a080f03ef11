"""shared_lora in compiled graphs: in place where nobody wants a gradient, and y as it was for whoever needs it."""

import pytest
import torch

import oracles
from loraspan.ops import shared_lora
from matrices import normal
from oracles import F32
from task_cores import batch, planted


@pytest.fixture
def problem():
    torch._dynamo.reset()
    cores = planted(60, [(2, 1, 0, 1), (3, 0, 1, 1)], 12, 10, 4, 4)
    return cores, batch(61, 5, 12, 10, 4, 4), torch.tensor([0, 1, -1, 1, 0])


def operators(function, *args):
    """Give those of ours in the graph of a function, and its result."""
    found = []

    def noted(graph, _):
        found.extend(node.target for node in graph.graph.nodes if "loraspan" in str(node.target))
        return graph.forward

    out = torch.compile(function, fullgraph=True, backend=noted)(*args)
    return [str(target).removesuffix(".default").rpartition(".")[2] for target in found], out


@pytest.mark.parametrize("wants", [None, "y", "x", "weights", "left", "shares"])
def test_the_form_with_a_gradient_is_called_where_one_is_wanted(problem, wants):
    cores, (y, x, v, u), tasks = problem
    tasks, shares = tasks[:, None], normal(62, 5, 1, dtype=F32)
    given = {"y": y, "x": x, "weights": cores.weights, "left": cores.left, "shares": shares}

    def function(y, x, tasks, shares):
        return shared_lora(y, x, v, u, cores, tasks, shares=shares)

    if wants:
        given[wants].requires_grad_()
        names, out = operators(function, y, x, tasks, shares)
        assert names == ["shared_lora"]
        assert out.requires_grad
    with torch.no_grad():
        names, out = operators(function, y, x, tasks, shares)
        assert names == ["shared_lora_"]
        assert oracles.same_bits(out, function(y, x, tasks, shares))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_y_is_as_it_was(problem, backend):
    """Given by the caller, made in the graph and used again, or made for this alone."""
    cores, (y, x, v, u), tasks = problem

    def function(y, x, tasks):
        twice = y * 2
        first = shared_lora(y, x, v, u, cores, tasks)
        second = shared_lora(twice, x, v, u, cores, tasks)
        return first, second, twice + second, shared_lora(x @ v @ u.T, x, v, u, cores, tasks)

    before = y.clone()
    with torch.no_grad():
        made = torch.compile(function, fullgraph=True, backend=backend)(y, x, tasks)
        assert oracles.same_bits(y, before)
        for one, wanted in zip(made, function(y, x, tasks), strict=True):
            torch.testing.assert_close(one, wanted)
