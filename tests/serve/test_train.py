"""Gradients: to what goes in always, to weights and shared loadings where they are asked for."""

import numpy as np
import pytest
import torch

import loraspan
import serving
from loraspan.errors import ArgumentError, UnsupportedError

# shares are float32, and these have no rounding
NAMES = ["task 0", None, {"task 1": 0.75, "task 3": -0.375}, "task 3"]


def shares_of(names):
    return names if isinstance(names, dict) else {} if names is None else {names: 1.0}


def test_gradients_reach_weights_and_loadings_as_through_dense_dw(device):
    # wide enough that cores are factored, and columns of all four ends there
    space = loraspan.compress(serving.adapters(noise=0.1)[:3], rank=12)
    space.add(serving.adapters(noise=0.1)[3], max_error=0.01)
    x = serving.batch(4, torch.float64).to(device).requires_grad_()
    served = loraspan.attach(serving.Tower().double().to(device), space, train=True)
    leaves = served.loadings()
    assert {name.rpartition(".")[2] for name in leaves} == {"weights", "left", "right"}
    assert len(leaves) == 6
    assert all(leaf.is_leaf and leaf.requires_grad and leaf.dtype == torch.float64 for leaf in leaves.values())
    with served.tasks(NAMES):
        y = served(x)
    y.square().sum().backward()
    found = [x.grad, *[leaf.grad for leaf in leaves.values()]]
    x.grad = None
    for leaf in leaves.values():
        leaf.grad = None

    out = x
    for i, layer in enumerate(served.model.layers):
        changes = dict(zip(space.tasks, serving.trained_deltas(served, f"layers.{i}.q_proj"), strict=True))
        none = torch.zeros(serving.TOKENS, serving.N, dtype=x.dtype, device=device)
        added = [
            sum((share * row @ changes[name].T for name, share in shares_of(names).items()), none)
            for row, names in zip(out, NAMES, strict=True)
        ]
        out = out + layer.back(torch.tanh(layer.q_proj.base(out) + torch.stack(added)))
    out.square().sum().backward()
    wanted = [x.grad, *[leaf.grad for leaf in leaves.values()]]
    # two layers of sums of at most 56 + 24 products and 12 rows, forward and back
    steps = 4 * (serving.D + 24 + 8 + 12)
    for a, b in zip(found, wanted, strict=True):
        size = float(b.abs().max())
        assert size > 0
        np.testing.assert_allclose(a.cpu().numpy(), b.cpu().numpy(), rtol=0, atol=steps * 2.0**-53 * 2**4 * size)


def test_a_step_on_the_loadings_changes_what_is_served_and_the_space_not_at_all():
    space, x = serving.team(), serving.batch(2)
    served = loraspan.attach(serving.Tower().requires_grad_(False), space, train=True)
    before = serving.expected(space, x, ["task 0", "task 1"])
    optimizer = torch.optim.SGD(served.loadings().values(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = served(x, task_ids=space.ids(["task 0", "task 1"])).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]
    assert torch.equal(serving.expected(space, x, ["task 0", "task 1"]), before)


def test_without_being_asked_nothing_of_ours_wants_a_gradient_and_inputs_get_theirs():
    space, x = serving.team(), serving.batch(2).requires_grad_()
    served = loraspan.attach(serving.Tower().requires_grad_(False), space)
    assert served.loadings() == {}
    with served.tasks(["task 0", None]):
        y = served(x)
    y.sum().backward()
    assert (x.grad != 0).any()
    with torch.no_grad():
        assert not served(x, task_ids=space.ids("task 0")).requires_grad


def test_a_space_does_not_change_under_what_is_trained():
    space = serving.team()
    served = loraspan.attach(serving.Tower(), space, train=True)
    made = serving.adapters(noise=0.1)
    for change in (lambda: space.add(made[4]), lambda: space.remove("task 0"), lambda: space.refit(rank=4)):
        with pytest.raises(ArgumentError, match="with train=True"):
            change()
    assert space.tasks == ["task 0", "task 1", "task 2", "task 3"]
    space.add(made[4], dry_run=True)
    with pytest.raises(UnsupportedError, match="optimizer"):
        served.double()
    served.detach()
    space.remove("task 0")
