"""What a gradient of shared_lora keeps between the call and the way back, and what it refuses to go back through."""

import dataclasses
import gc
import weakref

import pytest
import torch
import torch.utils.checkpoint

from loraspan.ops import shared_lora
from matrices import normal
from oracles import F32, F64
from task_cores import batch, planted, random_tasks

COUNTS = [(2, 1, 0, 1), (3, 0, 1, 1), (0, 0, 0, 0), (1, 1, 1, 1)]
either = pytest.mark.parametrize("trains", [True, False], ids=["columns", "rows"])


@pytest.fixture
def call(trains):
    """The arguments of a call, by name: rows have a gradient, and columns where they train."""
    cores = planted(1, COUNTS, 6, 7, 3, 2, dtype=F64, dense=[1])
    if trains:
        leaves = {name: getattr(cores, name).clone().requires_grad_() for name in ("weights", "left")}
        cores = dataclasses.replace(cores, **leaves)
    y, x, v, u = batch(2, 9, 6, 7, 3, 2, F64)
    tasks, shares = random_tasks(3, 9, 2, 4), normal(4, 9, 2, dtype=F32)
    return {"y": y, "x": x.requires_grad_(), "v": v, "u": u, "cores": cores, "tasks": tasks, "shares": shares}


def refused_once_changed(call, tensor):
    out = shared_lora(**call)
    with torch.no_grad():
        tensor.mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@either
@pytest.mark.parametrize("name", ["v", "u", "tasks", "shares"])
def test_what_changed_on_the_way_back_is_refused(call, name):
    refused_once_changed(call, call[name])


@pytest.mark.parametrize("trains", [True])
@pytest.mark.parametrize("name", ["weights", "left", "left_private", "right", "right_private", "index"])
def test_columns_that_changed_on_the_way_back_are_refused(call, name):
    """As where an optimizer stepped between the two."""
    refused_once_changed(call, getattr(call["cores"], name))


@pytest.mark.parametrize("trains", [True])
def test_rows_that_changed_on_the_way_back_are_refused(call):
    refused_once_changed(call, call["x"])


@either
def test_a_call_that_kernels_remember_refuses_as_the_first_does(call):
    call["shares"] = None
    shared_lora(**call)
    refused_once_changed(call, call["u"])


@either
def test_as_much_is_saved_at_every_call(call):
    """What checkpoints compare when they compute a call again: the kernels know its tensors by then."""

    def step(x):
        return shared_lora(**call | {"x": x})

    torch.utils.checkpoint.checkpoint(step, call["x"], use_reentrant=False).square().sum().backward()
    found = call["x"].grad
    call["x"].grad = None
    step(call["x"]).square().sum().backward()
    assert torch.equal(found, call["x"].grad)


@either
def test_rows_are_saved_as_torch_saves(call, trains):
    """Hooks see them, which offload them; where no column trains, none are kept."""
    seen = []

    def note(tensor):
        seen.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        shared_lora(**call).sum().backward()
    assert (call["x"].data_ptr() in seen) == trains
    assert call["tasks"].data_ptr() in seen


@either
def test_a_call_frees_what_it_held_with_its_result(call):
    """Without the help of a collection: nothing of it is in a circle."""
    weights = 2 * call["cores"].weights
    call |= {"x": 2 * call["x"], "cores": dataclasses.replace(call["cores"], weights=weights)}
    gc.disable()
    try:
        out = shared_lora(**call)
        held = [weakref.ref(tensor) for tensor in (out, call["x"], weights)]
        call.clear()
        del out, weights
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()
