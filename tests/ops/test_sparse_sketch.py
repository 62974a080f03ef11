"""sparse_sketch: one Omega for all backends, sums within their bound, and the same bits whatever the processor."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from loraspan.errors import ArgumentError
from loraspan.ops import sparse_sketch
from matrices import KINDS, LAYOUTS, blocks, normal, swallowing
from oracles import BF16, F32

SEED = 2**62 + 20261123
# rows of the blocks, columns, width
SIZES = [
    pytest.param([1], 1, 4, id="scalar"),
    pytest.param([15], 127, 8, id="below-a-panel"),
    pytest.param([17], 129, 4, id="past-a-panel"),
    pytest.param([3, 0, 11, 5], 257, 60, id="ragged"),
    pytest.param([16, 16], 4 * 96 * 2, 384, id="whole-packs"),
    pytest.param([5], 128 * 8 + 3, 8, id="past-a-sum"),
    pytest.param([2], 3, 400, id="wide"),
    pytest.param([0], 5, 4, id="no-rows"),
    pytest.param([3, 2], 0, 8, id="no-columns"),
]


def check(backend, x, width, seed=SEED):
    stacked = oracles.stack(x)
    y = sparse_sketch(x, width, seed=seed, backend=backend)
    assert y.dtype == F32
    signs = oracles.sparse_omega(stacked.shape[1], width, seed)
    oracles.assert_within(y, stacked @ signs, oracles.sparse_sketch_bound(stacked, signs))


@pytest.mark.parametrize("kind", ["f16", "mixed"])
@pytest.mark.parametrize(("rows", "d", "width"), SIZES)
def test_matches_float64(backend, rows, d, width, kind):
    check(backend, blocks(1, rows, d, kind), width)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_reads_any_dtype_and_storage(backend, kind, layout):
    check(backend, blocks(3, [3, 17, 9], 131, kind, layout), 24)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_float32_sums_end_in_time(backend, dtype):
    x = swallowing(4099, dtype)
    # so that no sign takes away what another added: with m = 1 every column is in every sum
    signs = torch.from_numpy(oracles.sparse_omega(4099, 4, SEED)[:, 0]).to(dtype)
    check(backend, [x * signs], 4)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1])
@pytest.mark.parametrize("width", [4, 20, 132])
def test_every_backend_draws_the_same_signs(backend, seed, width):
    """The identity gives Omega back, over several packs of columns."""
    y = sparse_sketch(torch.eye(150), width, seed=seed, backend=backend)
    np.testing.assert_array_equal(y.numpy(), oracles.sparse_omega(150, width, seed))


@given(m=st.integers(1, 40), blocks_of=st.integers(1, 5), seed=st.integers(0, 2**63 - 1))
def test_rows_of_a_block_never_meet(m, blocks_of, seed):
    y = sparse_sketch(torch.eye(m * blocks_of), 4 * m, seed=seed).view(blocks_of, m, 4, m)
    assert torch.equal(y.abs().sum(1), torch.ones(blocks_of, 4, m))
    assert torch.equal(y.abs().sum(3), torch.ones(blocks_of, m, 4))


def test_it_tells_the_gram_on_average():
    x = normal(5, 3, 200, dtype=F32)
    exact = (x.double() @ x.double().T).numpy()
    width, draws = 16, 400

    found = np.zeros((draws, 3, 3))
    for seed in range(draws):
        y = sparse_sketch(x, width, seed=seed).double()
        found[seed] = (y @ y.T / 4).numpy()

    # of one draw: 2 |x_i|^2 |x_k|^2 / width at most, as for independent places
    sizes = np.outer(exact.diagonal(), exact.diagonal()) ** 0.5
    deviation = sizes * (2 / width) ** 0.5
    assert (np.abs(found.mean(0) - exact) <= 5 * deviation / draws**0.5).all()
    assert (found.std(0) <= 1.2 * deviation).all()


def test_neither_threads_nor_processor_change_a_bit(compiled, on_threads):
    x = [normal(12, 70, 1333), normal(13, 1333, 50, dtype=F32).T]

    results = [on_threads(count, lambda: sparse_sketch(x, 52, backend=compiled)) for count in (1, 2, 5)]

    assert all(torch.equal(sparse_sketch(x, 52), other) for other in results)


def test_what_is_not_finite_shows_where_it_is_added(backend):
    x = torch.ones(3, 21)
    x[1, 0] = float("nan")
    x[2, 20] = float("-inf")

    y = sparse_sketch(x, 16, seed=SEED, backend=backend)

    if backend == "reference":
        assert y.isfinite().all(1).tolist() == [True, False, False]
    else:
        signs = oracles.sparse_omega(21, 16, SEED)
        expected = np.stack([np.zeros(16), signs[0], signs[20]]) != 0
        np.testing.assert_array_equal(~y.isfinite().numpy(), expected)


@pytest.mark.parametrize(("width", "seed"), [(0, 0), (-4, 0), (6, 0), (8, -1), (8, 2**63)])
def test_bad_arguments_are_named(width, seed):
    with pytest.raises(ArgumentError, match=rf"sparse_sketch: width .* got width={width}, seed={seed}"):
        sparse_sketch(torch.ones(2, 3), width, seed=seed)
