"""Every operator on Metal, with its real numbers: within the bounds of any backend, and nothing it may not do there.

Matrices lie on the device, or lie on the CPU and are sent there. What asks for float64 is the CPU's.
"""

import pytest
import torch

import oracles
import task_cores
from loraspan.ops import (
    Piece,
    RowBlocks,
    combine,
    combine_many,
    gram,
    gram_many,
    power,
    reconstruct,
    reconstruct_many,
    shared_lora_,
    sketch,
    squares,
    stream,
)
from matrices import LAYOUTS, blocks, normal, stored
from oracles import BF16, F16, F32, F64

KINDS = ("f16", "bf16", "f32")
CPU = torch.device("cpu")


@pytest.fixture(params=["lies there", "is sent there", "is sent in chunks"])
def place(request, mps, monkeypatch):
    """How matrices come to the device: blocks to what the operators take."""
    if request.param != "is sent there":
        # two chunks of 40 columns of 32 rows of f32; those that lie there go to the CPU so, for float64
        monkeypatch.setattr(stream, "DEVICE_BYTES", 2 * 40 * 32 * 4)
    if request.param == "lies there":
        return lambda x: [mps.put(block) for block in x]
    return lambda x: RowBlocks(x).on(mps.place)


@pytest.fixture(params=["f32", "f64"])
def precision(request, mps):
    """Either precision; afterwards, whether the device multiplied anything."""
    yield request.param
    assert ("mm" in mps.rules.names) == (request.param == "f32")


def matrix(kind="f32", layout="row-major"):
    x = blocks(1, [3, 17, 0, 12], 261, kind, layout)
    return x, oracles.stack(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram(place, precision, kind, layout):
    x, exact = matrix(kind, layout)
    g = gram(place(x), precision=precision)
    assert (g.device, g.dtype) == (CPU, F64)
    assert torch.equal(g, g.T)
    oracles.assert_within(g, oracles.gram(exact), oracles.gram_bound(exact, precision))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_combine(place, precision, kind, dtype):
    x, exact = matrix(kind)
    w = normal(2, 9, 32).T
    given = place(x)
    for products in (True, False):
        v, xv, vtv = combine(given, w, dtype=dtype, precision=precision, products=products)
        assert (v.device, v.dtype) == (RowBlocks.of(given).device, dtype)
        weights = oracles.to_numpy(w)
        bound = oracles.combine_v_bound(exact, weights, dtype, precision)
        oracles.assert_within(v.cpu(), oracles.combine_v(exact, weights), bound)
        narrow = oracles.to_numpy(v.cpu())
        if products:
            oracles.assert_within(xv, exact @ narrow, oracles.product_bound(exact, narrow, precision))
        oracles.assert_within(vtv, oracles.gram(narrow.T), oracles.gram_bound(narrow.T, precision))
        assert torch.equal(vtv, vtv.T)


def test_combine_writes_to_places_of_any_strides(place, mps):
    x, exact = matrix()
    w, given = normal(3, 32, 4), place(x)
    home = RowBlocks.of(given).device
    out = [
        torch.zeros(261, 4, device=home),
        torch.zeros(4, 261, device=home).T,
        torch.zeros(261, 9, device=home)[:, ::2][:, :4],
    ]
    for v in out:
        assert combine_many([(given, w)], out=[v])[0].v is v
        weights = oracles.to_numpy(w)
        oracles.assert_within(v.cpu(), exact.T @ weights, oracles.combine_v_bound(exact, weights, F32, "f32"))
    assert "mm" in mps.rules.names


def test_a_float64_basis_lies_on_the_cpu(place, mps):
    x, exact = matrix()
    w = normal(4, 32, 4)
    weights = oracles.to_numpy(w)
    for precision in ("f32", "f64"):
        v = combine(place(x), w, dtype=F64, precision=precision).v
        assert v.device == CPU
        bound = oracles.combine_v_bound(exact, weights, F64, precision)
        oracles.assert_within(v, oracles.combine_v(exact, weights), bound)
    assert "mm" not in mps.rules.names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 130])
def test_sketch(place, precision, kind, width):
    x, exact = matrix(kind)
    y = sketch(place(x), width, seed=2**40 + 5, precision=precision)
    oracles.assert_within(
        y, exact @ oracles.omega(261, width, 2**40 + 5), oracles.sketch_bound(exact, width, precision)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_power(place, precision, kind):
    x, exact = matrix(kind)
    q = normal(5, 7, 32).T
    weights = oracles.to_numpy(q)
    y = power(place(x), q, precision=precision)
    oracles.assert_within(y, oracles.power(exact, weights), oracles.power_bound(exact, weights, precision))


@pytest.mark.parametrize("kind", KINDS)
def test_squares(place, mps, kind):
    x, exact = matrix(kind)
    found = squares(place(x))
    oracles.assert_within(found, (exact**2).sum(1), oracles.gram_bound(exact, "f64").diagonal())
    assert not mps.rules.names & {"mul", "square", "sum"}


def test_float64_blocks_are_rounded_on_the_way(mps, precision):
    """They can only come from the CPU, and float32 sums round them first in any case."""
    x, exact = matrix("f64")
    sent = RowBlocks(x).on(mps.place)
    oracles.assert_within(gram(sent, precision=precision), exact @ exact.T, oracles.gram_bound(exact, precision))
    assert gram(sent, precision=precision).device == CPU


@pytest.mark.parametrize("basis", [F16, BF16, F32])
@pytest.mark.parametrize("loadings", [F16, F32])
@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_reconstruct(mps, basis, loadings, layout):
    b, l = stored(normal(6, 37, 9, dtype=basis), layout), stored(normal(7, 9, 21, dtype=loadings), layout)
    exact = oracles.to_numpy(b), oracles.to_numpy(l)
    for dtype in (F16, F32):
        out = reconstruct(mps.put(b), mps.put(l), scale=0.3, dtype=dtype)
        assert out.device == mps.place
        bound = oracles.reconstruct_bound(*exact, 0.3, dtype, F32)
        oracles.assert_within(out.cpu(), oracles.reconstruct(*exact, 0.3), bound)


def test_reconstruct_many_in_place_and_batched(mps):
    rows, weights = normal(8, 6, 40, dtype=F32), normal(9, 2, 6, dtype=F32)
    there = mps.put(rows)
    reconstruct_many([Piece(there.T, mps.put(weights).T, there[:2].T)])
    exact = oracles.to_numpy(rows).T, oracles.to_numpy(weights).T
    bound = oracles.reconstruct_bound(*exact, 1.0, F32, F32)
    oracles.assert_within(there[:2].T.cpu(), oracles.reconstruct(*exact, 1.0), bound)
    assert torch.equal(there[2:].cpu(), rows[2:])
    batch = reconstruct(mps.put(rows.view(3, 2, 40)), mps.put(normal(10, 3, 40, 5, dtype=F32)))
    assert batch.shape == (3, 2, 5)
    assert "mm" in mps.rules.names


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize("mixture", [1, 3])
def test_shared_lora(mps, dtype, mixture):
    counts = [(5, 0, 0, 0), (0, 0, 0, 0), (2, 1, 3, 2), (0, 4, 0, 0), (1, 0, 2, 0), (0, 0, 0, 3)]
    cores = task_cores.planted(1, counts, 37, 130, 9, 5, dtype=dtype, dense=[4])
    y, x, v, u = task_cores.batch(2, 21, 37, 130, 9, 5, dtype)
    tasks, shares = task_cores.random_tasks(3, 21, mixture, 6), normal(4, 21, mixture, dtype=F32)
    tasks[3] = -1
    tables = (cores.index, cores.weights, cores.left, cores.left_private, cores.right, cores.right_private)
    there = type(cores)(*map(mps.put, tables), cores.most)
    moves = len(mps.rules.moves)
    out = shared_lora_(*map(mps.put, (y, x, v, u)), there, mps.put(tasks), shares=mps.put(shares), scale=0.3)
    assert len(mps.rules.moves) == moves, "nothing is brought to the CPU"
    oracles.assert_within(out.cpu(), *task_cores.expected(y, x, v, u, cores, tasks, shares, 0.3))
    assert oracles.same_bits(out.cpu()[3], y[3])


def test_many_matrices_come_back_in_few_copies(mps):
    """Small ones travel together, and so do their sums."""
    batch = [RowBlocks([normal(i, 1 + i % 5, 300, dtype=F32)]).on(mps.place) for i in range(40)]
    found = gram_many(batch)
    for x, g in zip(batch, found, strict=True):
        exact = oracles.stack(x.blocks)
        oracles.assert_within(g, oracles.gram(exact), oracles.gram_bound(exact, "f32"))
    assert [direction for direction, *_ in mps.rules.moves] == ["to", "from"]


def test_sums_that_wait_on_the_device_are_bounded(mps, monkeypatch):
    from loraspan.ops import places

    monkeypatch.setattr(places, "_WAITING_BYTES", 4 * 32 * 32 * 4)
    x, exact = matrix()
    x = [b.repeat(1, 8) for b in x]
    exact = oracles.stack(x)
    g = gram([mps.put(b) for b in x])
    oracles.assert_within(g, exact @ exact.T, oracles.gram_bound(exact, "f32"))
    brought = [size for direction, size, _ in mps.rules.moves if direction == "from"]
    assert len(brought) > 1
    assert max(brought) <= 5 * 32 * 32 * 4
