"""Ranges of weighted rows, cores that are never formed, and the products that both are found by."""

import numpy as np
import pytest
import torch

from loraspan.collection import ranges
from loraspan.collection.core_space import refine_jointly, refine_products
from loraspan.collection.ranges import find_range
from loraspan.collection.stack import Stack
from loraspan.collection.vectors import FactorRows
from loraspan.ops.product import inner
from matrices import normal
from oracles import F64, UNIT_ROUNDOFF

U = UNIT_ROUNDOFF[F64]
TASKS, RANK, WIDTH = 60, 8, 16


def stack_of(decay=0.8, cond=3.0, alike=False):
    """Factors from shared directions under a decaying spectrum, weighted, each in a gauge of such a condition."""
    rng = np.random.default_rng(7)
    v = np.linalg.qr(rng.standard_normal((300, 40)))[0] * decay ** np.arange(40)
    rows, weights = [], []
    for i in range(TASKS):
        x = rng.standard_normal((RANK, 40)) @ v.T + 1e-4 * rng.standard_normal((RANK, 300)) * (not alike)
        turn = np.linalg.qr(rng.standard_normal((RANK, RANK)))[0]
        gauge = turn * np.geomspace(1, cond, RANK) @ turn.T
        rows.append(torch.from_numpy(np.linalg.solve(gauge, x)).float())
        weights.append(torch.from_numpy((1 + i % 3) * gauge))
    return Stack(FactorRows(rows, RANK), torch.stack(weights))


def exact(stack):
    """The weighted rows in float64."""
    return np.concatenate([w.numpy() @ x.double().numpy() for w, x in zip(stack.weights, stack.x.blocks, strict=True)])


def energy_held(stack, found):
    """By a float64 projection on the directions ``X^T w``."""
    x = np.concatenate([block.double().numpy() for block in stack.x.blocks])
    q = np.linalg.qr(x.T @ found.w.numpy())[0]
    return (np.square(exact(stack) @ q)).sum()


@pytest.mark.parametrize("cond", [3.0, 1e3, 1e6])
@pytest.mark.parametrize("decay", [0.97, 0.8, 0.3])
def test_a_sketched_range_is_orthonormal_and_holds_what_it_says(decay, cond):
    stack = stack_of(decay, cond)

    found = find_range(stack, WIDTH, precision="f32", seed=3)

    v = np.concatenate([x.double().numpy() for x in stack.x.blocks]).T @ found.w.numpy()
    # a direction is told from float32 passes, whose rounding of the weighted rows grows with the gauge
    u32 = 2.0**-24 * cond
    spread = float((found.energies[0] / found.energies).max()) ** 0.5
    assert np.abs(v.T @ v - np.eye(v.shape[1])).max() <= 300 * u32 * spread
    held = energy_held(stack, found)
    # the directions come out of one more product than their energies
    assert held >= (1 - 300 * u32) * float(found.energies.sum())
    if decay < 0.9:
        # four applications of X X^T's root: what lies past the width is damped by 0.8^(2 * 16 * 3) and more
        best = np.square(np.linalg.svd(exact(stack), compute_uv=False)[: WIDTH // 2]).sum()
        assert held >= (1 - 1e-4 - 300 * u32) * best


@pytest.mark.parametrize("spectrum", ["root", "inverse", "geometric"])
@pytest.mark.parametrize("spiky", [False, True])
def test_a_wide_sketch_is_nearly_as_good_as_the_best(monkeypatch, spectrum, spiky):
    """Also where few columns hold all that there is."""
    count, d, width = 1000, 1500, 48
    i = np.arange(1.0, count + 1)
    values = {"root": i**-0.5, "inverse": 1 / i, "geometric": 0.95**i + 1e-4}[spectrum]
    rng = np.random.default_rng(3)
    v = np.eye(d)[:, rng.permutation(d)[:count]] + (1e-3 if spiky else 1) * rng.standard_normal((d, count))
    x = values[:, None] * np.linalg.qr(v)[0].T
    stack = Stack(
        FactorRows(list(torch.from_numpy(x).float().split(RANK)), RANK),
        torch.eye(RANK, dtype=F64).expand(count // RANK, RANK, RANK).contiguous(),
    )

    def lost(k):
        found = find_range(stack, width, precision="f32", seed=3)
        q = np.linalg.qr(x.T @ found.w.numpy())[0]
        return np.square(values).sum() - np.square(np.linalg.svd(x @ q, compute_uv=False)[:k]).sum()

    best = np.square(values[32:]).sum()
    assert best * (1 - 1e-6) <= lost(32) <= best * 1.03
    # and what it saves is a pass and a half for at most as much again
    monkeypatch.setattr(ranges, "_WIDER", d)
    assert lost(32) <= best * 1.02


def test_one_round_and_two_find_the_same_range(monkeypatch):
    """The metric of the weighted rows serves as well as the rows themselves, where it is used."""
    stack = stack_of()
    one = find_range(stack, WIDTH, precision="f32", seed=3)
    rows_weighed = []
    weigh = Stack.weigh
    monkeypatch.setattr(Stack, "weigh", lambda self, y: rows_weighed.append(y) or weigh(self, y))
    find_range(stack, WIDTH, precision="f32", seed=3)
    assert not rows_weighed
    monkeypatch.setattr(ranges, "_DEFECT", -1.0)
    two = find_range(stack, WIDTH, precision="f32", seed=3)
    assert len(rows_weighed) == 1 + len(ranges._STEPS)
    # what is left of orthonormality in one round, for each
    torch.testing.assert_close(one.energies, two.energies, rtol=2e-7, atol=0)


@pytest.mark.parametrize("case", ["dependent", "gauge", "zero"])
def test_what_one_round_does_not_carry_takes_two(monkeypatch, case):
    stack = {"dependent": stack_of(decay=0.01, alike=True), "gauge": stack_of(cond=1e7), "zero": None}[case]
    if stack is None:
        stack = Stack(FactorRows([torch.zeros(RANK, 300)] * TASKS, RANK), torch.ones(TASKS, RANK, RANK, dtype=F64))
    rows_weighed = []
    weigh = Stack.weigh
    monkeypatch.setattr(Stack, "weigh", lambda self, y: rows_weighed.append(y) or weigh(self, y))
    found = find_range(stack, WIDTH, precision="f32", seed=3)
    assert rows_weighed
    assert found.w.isfinite().all()
    assert case != "zero" or not len(found.energies)


def test_a_block_may_lie_in_memory_as_it_likes():
    """Some backends give columns one after another."""
    stack = stack_of()
    block = normal(7, TASKS * RANK, 5)
    found = ranges._orthonormal(stack, block.T.contiguous().T, "f32")
    assert torch.equal(found, ranges._orthonormal(stack, block.clone(), "f32"))


def test_moments_and_weights_make_each_other():
    stack = stack_of()
    other = Stack.of_moments(stack.vectors, stack.moments)
    y = normal(5, TASKS * RANK, 3)
    twice = stack.weigh_transposed(stack.weigh(y))
    for found in (stack.weigh_twice(y), other.weigh_twice(y), other.weigh_transposed(other.weigh(y))):
        torch.testing.assert_close(found, twice, rtol=0, atol=1e4 * U * float(twice.abs().max()))


@pytest.mark.parametrize("r", [2, 6, 7])
@pytest.mark.parametrize("ranks", [(5, 5), (3, 9)])
def test_products_are_refined_as_their_cores(r, ranks):
    left, right = normal(1, 20, r, 12), normal(2, 20, r, 10)

    of_products = refine_products(left, right, *ranks, 2)
    of_cores = refine_jointly(left.mT @ right, *ranks, 2)

    for one, other in zip(of_products, of_cores, strict=True):
        # as subspaces: neighbouring directions of nearly one energy may mix
        np.testing.assert_allclose(one @ one.T, other @ other.T, atol=1e-9)


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 255, 256, 257, 1601])
def test_inner_products_do_not_depend_on_threads(on_threads, rows):
    a, b = normal(1, rows, 48), normal(2, rows, 33)

    found = [on_threads(count, lambda: inner(a, b)) for count in (1, 2, 3)]

    assert all(torch.equal(found[0], other) for other in found[1:])
    bound = (rows + 2) * U * (a.abs().T @ b.abs())
    assert ((found[0] - a.T @ b).abs() <= 2 * bound).all()
