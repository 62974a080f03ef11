"""sketch and power: one Omega for all backends and widths, whatever the matrix; products within their bounds."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from devices import RowBlocks, power, power_many, sketch, sketch_many
from loraspan.errors import ArgumentError, ShapeError
from matrices import KINDS, LAYOUTS, blocks, normal, stored, swallowing
from oracles import BF16, F32, F64

PRECISIONS = ("f32", "f64")
SEED = 2**62 + 20261122
seeds = st.integers(0, 2**32 - 1)
heights = st.lists(st.integers(0, 19), min_size=1, max_size=4)
columns = st.integers(0, 300)
widths = st.integers(0, 20)
kinds = st.sampled_from([*KINDS])

# rows of the blocks, columns, width
SIZES = [
    pytest.param([1], 1, 1, id="scalar"),
    pytest.param([15], 127, 7, id="below-a-tile"),
    pytest.param([16], 128, 16, id="a-tile"),
    pytest.param([17], 129, 49, id="past-a-tile"),
    pytest.param([3, 0, 11, 5], 257, 3, id="ragged"),
    pytest.param([2, 3], 20, 129, id="past-a-philox-block"),
    pytest.param([4, 4], 1, 8, id="one-column"),
    pytest.param([0], 5, 3, id="no-rows"),
    pytest.param([3, 2], 0, 4, id="no-columns"),
    pytest.param([3, 2], 5, 0, id="no-width"),
]


def start(seed, rows, width):
    """The other factor of a power step."""
    return normal(seed + 77, rows, width) * 0.3


def check_sketch(backend, x, width, seed=SEED):
    stacked = oracles.stack(x)
    want = stacked @ oracles.omega(stacked.shape[1], width, seed)
    for precision in PRECISIONS:
        y = sketch(x, width, seed=seed, precision=precision, backend=backend)
        assert y.dtype == F64
        oracles.assert_within(y, want, oracles.sketch_bound(stacked, width, precision))


def check_power(backend, x, q):
    stacked, factor = oracles.stack(x), oracles.to_numpy(q)
    for precision in PRECISIONS:
        y = power(x, q, precision=precision, backend=backend)
        assert y.dtype == F64
        oracles.assert_within(y, oracles.power(stacked, factor), oracles.power_bound(stacked, factor, precision))


@pytest.mark.parametrize("kind", ["f16", "mixed"])
@pytest.mark.parametrize(("rows", "d", "width"), SIZES)
def test_sketch_matches_float64(backend, rows, d, width, kind):
    check_sketch(backend, blocks(1, rows, d, kind), width)


@pytest.mark.parametrize("kind", ["f16", "mixed"])
@pytest.mark.parametrize(("rows", "d", "width"), SIZES)
def test_power_matches_float64(backend, rows, d, width, kind):
    check_power(backend, blocks(2, rows, d, kind), start(2, sum(rows), width))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_reads_any_dtype_and_storage(backend, kind, layout):
    x = blocks(3, [3, 17, 9], 131, kind, layout)
    check_sketch(backend, x, 6)
    check_power(backend, x, stored(start(3, 29, 6), layout))


@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_past_every_tile(backend, kind):
    x = blocks(4, [130, 17], 391, kind)
    check_sketch(backend, x, 43)
    check_power(backend, x, start(4, 147, 43))


def test_long_rows(backend):
    x = blocks(5, [5, 4], 4099, "f16")
    check_sketch(backend, x, 17)
    check_power(backend, x, start(5, 9, 17))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_float32_sums_end_in_time(backend, dtype):
    x = swallowing(4099, dtype)
    check_power(backend, [x], torch.eye(2, dtype=F64))
    # so that no sign takes away what another added
    same_sign = torch.from_numpy(oracles.omega(4099, 1, SEED)[:, 0]).to(dtype)
    check_sketch(backend, [x * same_sign], 1)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_backend_draws_the_same_signs(backend, seed, precision):
    """The identity gives Omega back, past one Philox block and past several float32 sums."""
    y = sketch(torch.eye(150), 131, seed=seed, precision=precision, backend=backend)
    np.testing.assert_array_equal(y.numpy(), oracles.omega(150, 131, seed))


@given(d=st.integers(1, 9000), width=st.integers(0, 140), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_a_sign_depends_on_its_row_alone(backend, d, width, seed, data):
    """A one in column j alone picks row j of Omega, wherever j lies."""
    j = data.draw(st.integers(0, d - 1), label="j")
    x = torch.zeros(1, d)
    x[0, j] = 1
    y = sketch(x, width, seed=seed, backend=backend)
    for c in range(0, width, 9):
        word = oracles.philox4x32((j, 0, c // 128, 0), (seed % 2**32, seed >> 32))[c % 128 // 32]
        assert y[0, c].item() == (-1 if word >> c % 32 & 1 else 1)


@given(rows=heights, d=columns, width=st.integers(0, 140), kind=kinds, seed=seeds, data=st.data())
def test_a_wider_sketch_begins_with_the_narrower(compiled, rows, d, width, kind, seed, data):
    x = blocks(seed, rows, d, kind)
    narrow = data.draw(st.integers(0, width), label="narrow")
    wide = sketch(x, width, seed=seed, backend=compiled)
    assert torch.equal(wide[:, :narrow], sketch(x, narrow, seed=seed, backend=compiled))


def test_signs_are_balanced_and_uncorrelated(backend):
    """Within five standard deviations: mean, correlations of columns and of rows, and those of two seeds."""
    n, width = 300, 130
    y, other = (sketch(torch.eye(n), width, seed=seed, backend=backend).numpy() for seed in (SEED, SEED + 1))
    assert abs(y.sum()) <= 5 * np.sqrt(n * width)
    for products, terms in ((y.T @ y, n), (y @ y.T, width), (y.T @ other, n)):
        apart = products[~np.eye(len(products), dtype=bool)]
        # no more than one in a million of a normal distribution is as far out as five
        assert np.mean(np.abs(apart) > 5 * np.sqrt(terms)) <= 1e-4
        assert abs(np.mean(apart**2) / terms - 1) <= 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row_of_a_sketch(backend, kind, special):
    x = blocks(6, [5, 13], 150, kind)
    x[1][2, 140] = special
    y = sketch(x, 9, seed=SEED, backend=backend)
    stacked = oracles.stack(x)
    oracles.assert_same_special(y, stacked @ oracles.omega(150, 9, SEED))
    clean = np.delete(stacked, 7, axis=0)
    bound = oracles.sketch_bound(clean, 9, "f32")
    oracles.assert_within(y[torch.arange(18) != 7], clean @ oracles.omega(150, 9, SEED), bound)
    # every row meets the special column of X^T Q
    assert not torch.isfinite(power(x, start(6, 18, 3), backend=backend)).any()


@given(rows=heights, d=st.integers(0, 9001), width=st.integers(0, 6), kind=kinds, seed=seeds)
def test_threads_change_no_bit(compiled, on_threads, rows, d, width, kind, seed):
    x, q = blocks(seed, rows, d, kind), start(seed, sum(rows), width)
    for run in (lambda: sketch(x, width, seed=seed, backend=compiled), lambda: power(x, q, backend=compiled)):
        one, two, three = (on_threads(count, run) for count in (1, 2, 3))
        assert oracles.same_bits(one, two)
        assert oracles.same_bits(one, three)


@given(rows=st.integers(1, 70), d=columns, width=widths, kind=kinds, seed=seeds, data=st.data())
def test_blocks_are_only_a_way_to_write_it(compiled, rows, d, width, kind, seed, data):
    """Cut a matrix anywhere: the compiled kernels give the same bits."""
    [x], q = blocks(seed, [rows], d, kind), start(seed, rows, 7)
    cut = data.draw(st.integers(0, rows), label="cut")
    parted = [x[:cut], x[cut:]]
    assert oracles.same_bits(sketch(parted, width, backend=compiled), sketch(x, width, backend=compiled))
    assert oracles.same_bits(power(parted, q, backend=compiled), power(x, q, backend=compiled))


@given(rows=st.integers(1, 70), d=columns, width=widths, kind=kinds, seed=seeds)
def test_permuting_rows_permutes_the_sketch(compiled, rows, d, width, kind, seed):
    [x] = blocks(seed, [rows], d, kind)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert oracles.same_bits(sketch(x[order], width, backend=compiled), sketch(x, width, backend=compiled)[order])


@given(rows=heights, d=columns, width=widths, kind=kinds, layout=st.sampled_from(LAYOUTS[1:5]), seed=seeds)
def test_storage_changes_no_bit(compiled, rows, d, width, kind, layout, seed):
    x, q = blocks(seed, rows, d, kind), start(seed, sum(rows), 7)
    elsewhere = [stored(b, layout) for b in x]
    assert oracles.same_bits(sketch(elsewhere, width, backend=compiled), sketch(x, width, backend=compiled))
    assert oracles.same_bits(power(elsewhere, stored(q, layout), backend=compiled), power(x, q, backend=compiled))


@given(rows=heights, d=columns, width=widths, kind=kinds, exponent=st.integers(1, 6), seed=seeds)
def test_a_power_of_two_scales_exactly(backend, rows, d, width, kind, exponent, seed):
    x, q, factor = blocks(seed, rows, d, kind), start(seed, sum(rows), 7), 2.0**exponent
    bigger = [b * factor for b in x]
    assert torch.equal(sketch(bigger, width, backend=backend), factor * sketch(x, width, backend=backend))
    assert torch.equal(power(bigger, q, backend=backend), factor**2 * power(x, q, backend=backend))


def test_no_blocks(backend):
    x = RowBlocks([], columns=5)
    assert sketch(x, 3, backend=backend).shape == (0, 3)
    assert power(x, torch.empty(0, 2, dtype=F64), backend=backend).shape == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": -1}, r"width is at least 0 and seed in \[0, 2\^63\); got width=-1, seed=0"),
        ({"width": 2, "seed": -1}, "width is .*; got width=2, seed=-1"),
        ({"width": 2, "seed": 2**63}, f"width is .*; got width=2, seed={2**63}"),
        ({"width": 2, "precision": "f16"}, "precision is 'f32' or 'f64'; got 'f16'"),
    ],
)
def test_a_sketch_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ArgumentError, match=f"^sketch: {message}"):
        sketch(torch.ones(3, 4), **arguments)


@pytest.mark.parametrize(
    ("q", "options", "error", "message"),
    [
        (torch.ones(3, 1, dtype=F32), {}, ShapeError, r"q needs one float64 row for each of the 3 rows .*float32"),
        (
            torch.ones(2, 1, dtype=F64),
            {},
            ShapeError,
            r"q needs one float64 row for each of the 3 rows .* got \[2, 1\]",
        ),
        (torch.ones(3, dtype=F64), {}, ShapeError, r"q needs one float64 row .* got \[3\]"),
        (torch.ones(3, 1, dtype=F64), {"precision": "f16"}, ArgumentError, "precision is 'f32' or 'f64'; got 'f16'"),
    ],
)
def test_a_power_step_that_cannot_be_is_refused(q, options, error, message):
    with pytest.raises(error, match=f"^power: {message}"):
        power(torch.ones(3, 4), q, **options)


def test_a_batch_is_its_members(backend):
    batch = [blocks(31, [5, 2], 700, "mixed"), blocks(32, [1], 33, "f16"), blocks(33, [40], 1500, "f32")]
    qs = [normal(34, sum(len(b) for b in x), 3 + i) for i, x in enumerate(batch)]
    widths = [4, 0, 130]

    sketches = sketch_many(list(zip(batch, widths, strict=True)), seed=5, backend=backend)
    powers = power_many(list(zip(batch, qs, strict=True)), backend=backend)

    for x, q, width, y, z in zip(batch, qs, widths, sketches, powers, strict=True):
        assert torch.equal(y, sketch(x, width, seed=5, backend=backend))
        assert torch.equal(z, power(x, q, backend=backend))
