"""Bases turned out of a range's last pass: as good as a pass of their own, or left alone."""

import numpy as np
import planted
import pytest
import torch

from loraspan.adapters.base import Adapter, Slot
from loraspan.collection import fit as fitting
from loraspan.collection.fit import Goal, fit

PATH = "layers.0.q_proj"
GOAL = Goal(rank=6)


@pytest.fixture
def passes(monkeypatch):
    """The bases that a pass of their own has made."""
    made = []
    make_basis = fitting.make_basis
    monkeypatch.setattr(fitting, "make_basis", lambda *args: made.append(args) or make_basis(*args))
    return made


def many(cond=1.0, **options):
    """Enough rows for a sketch, in gauges of such a condition."""
    defaults = {"count": 240, "shape": (72, 96), "ranks": (4,), "slots": 1, "noise": 0.3}
    return planted.adapters(**defaults | options, cond=cond)


def sheared(adapters, steps):
    """The same ``dW``, exactly, with longer and longer factors: whole numbers of columns added to others."""
    rng = np.random.default_rng(3)
    made = []
    for adapter in adapters:
        slot = adapter.slots[PATH]
        up, down = (whole(side.double()) for side in (slot.up, slot.down))
        for _ in range(steps):
            a, b = rng.permutation(down.shape[0])[:2]
            sign = rng.choice([-1.0, 1.0])
            up[:, b] += sign * up[:, a]
            down[a] -= sign * down[b]
        assert torch.equal(up.float().double(), up)
        assert torch.equal(down.float().double(), down)
        made.append(Adapter(adapter.name, {PATH: Slot(down.float(), up.float(), slot.scale)}))
    return made


def whole(factor):
    """Multiples of one power of two, of eight bits, so that sums of some of them are exact in float32."""
    unit = 2.0 ** (np.ceil(np.log2(float(factor.abs().max()))) - 8)
    return (factor / unit).round() * unit


def off_report(collection, adapters):
    truth = [
        planted.relative_error(adapter, lambda path, i=i: planted.stored_delta(collection, path, i))
        for i, adapter in enumerate(adapters)
    ]
    return np.abs(np.subtract([task.error for task in collection.tasks], truth)).max()


def apart(one, other, adapters):
    """By how much the worst task differs, of its ``|dW|``."""
    worst = 0.0
    for i, adapter in enumerate(adapters):
        a, b = (planted.stored_delta(collection, PATH, i) for collection in (one, other))
        worst = max(worst, np.linalg.norm(a - b) / np.linalg.norm(planted.delta(adapter.slots[PATH])))
    return worst


@pytest.mark.parametrize("goal", [GOAL, Goal(energy=0.6)], ids=["rank", "energy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turned_bases_are_those_of_a_pass(passes, monkeypatch, goal, dtype):
    adapters = many(dtype=dtype)
    turned = fit(adapters, goal)
    assert not passes
    assert off_report(turned, adapters) <= 1e-6
    monkeypatch.setattr(fitting, "turned_cores", lambda *_: None)
    passed = fit(adapters, goal)
    assert len(passes) == 2
    assert apart(turned, passed, adapters) <= 1e-6
    for side in "uv":
        basis = getattr(turned.slots[PATH], side).double()
        assert basis.shape == getattr(passed.slots[PATH], side).shape
        # float32 entries, and a range that float32 passes found
        assert (basis.T @ basis - torch.eye(basis.shape[1])).abs().max() <= 1e-6


@pytest.mark.parametrize("noise", [0.3, 2.0], ids=["some-lost", "much-lost"])
@pytest.mark.parametrize("steps", [0, 2, 5, 8, 12])
def test_no_gauge_is_told_wrong(passes, steps, noise):
    """Both sides of where a pass is taken: long factors that cancel make float32 products worth less and less."""
    plain, adapters = (sheared(many(count=160, noise=noise), count) for count in (0, steps))
    collection = fit(adapters, GOAL)
    assert len(passes) == (2 if steps >= 12 else 0) or 2 < steps < 12
    assert off_report(collection, adapters) <= 1e-6
    if not passes:
        # two fits, each off by some 5e-7 at most
        assert apart(collection, fit(plain, GOAL), plain) <= 1e-6


@pytest.mark.parametrize(
    ("adapters", "goal"),
    [
        (many(), Goal(rank=6, dtype=torch.bfloat16)),
        (many(), Goal(rank=6, dtype=8)),
        (many(dtype=torch.float64), GOAL),
        (many(noise=1e-5), GOAL),
        (many(count=12), GOAL),
    ],
    ids=["half-bases", "packed-bases", "double-factors", "little-lost", "few-rows"],
)
def test_a_pass_is_taken_where_it_tells_more(passes, adapters, goal):
    collection = fit(adapters, goal)
    assert len(passes) == 2
    assert off_report(collection, adapters) <= 1e-6


def test_turned_bases_do_not_depend_on_threads(on_threads, passes):
    adapters = many()
    found = [on_threads(count, lambda: fit(adapters, GOAL)) for count in (1, 2, 3)]
    assert not passes
    for other in found[1:]:
        for side in "uv":
            assert torch.equal(getattr(found[0].slots[PATH], side), getattr(other.slots[PATH], side))
        assert [task.error for task in found[0].tasks] == [task.error for task in other.tasks]


def one_sided(up, down):
    """Terms of one sign: what float32 sums come to grows with every addition."""
    return up + 3, down + 3


def outgrown(up, down):
    """One column that is most of every sum, and rounded by all additions behind it."""
    up[3] *= 15
    down[:, 5] *= 15
    return up, down


@pytest.mark.parametrize("shape", [one_sided, outgrown])
def test_entries_that_round_worse_than_normal_ones_are_told_right(passes, shape):
    generator = torch.Generator().manual_seed(1)
    adapters = []
    for i in range(200):
        up, down = shape(torch.randn(64, 4, generator=generator), torch.randn(4, 128, generator=generator))
        adapters.append(Adapter(f"task {i}", {PATH: Slot(down, up, 1.0)}))
    collection = fit(adapters, Goal(rank=2))
    assert len(passes) == 2
    assert off_report(collection, adapters) <= 1e-6
