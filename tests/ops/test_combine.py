"""combine: V rounded once, and the products of V as rounded, never of V as it was before."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from devices import RowBlocks, combine, combine_many
from loraspan.errors import ArgumentError, ShapeError
from matrices import KINDS, LAYOUTS, blocks, normal, stored, swallowing
from oracles import BF16, DTYPES, F16, F32, F64

PRECISIONS = ("f32", "f64")
seeds = st.integers(0, 2**32 - 1)
heights = st.lists(st.integers(0, 19), min_size=1, max_size=4)
columns = st.integers(0, 300)
widths = st.integers(0, 20)
kinds = st.sampled_from([*KINDS])
dtypes = st.sampled_from(DTYPES)
leans = st.booleans()

# rows of the blocks, columns, k
SIZES = [
    pytest.param([1], 1, 1, id="scalar"),
    pytest.param([15], 127, 7, id="below-a-tile"),
    pytest.param([16], 128, 16, id="a-tile"),
    pytest.param([17], 129, 49, id="past-a-tile"),
    pytest.param([3, 0, 11, 5], 257, 3, id="ragged"),
    pytest.param([2, 1], 1031, 5, id="long"),
    pytest.param([4, 4], 1, 8, id="one-column"),
    pytest.param([0], 5, 3, id="no-rows"),
    pytest.param([3, 2], 0, 4, id="no-columns"),
    pytest.param([3, 2], 5, 0, id="no-vectors"),
]


def weights(seed, rows, k):
    return normal(seed + 77, rows, k) * 0.3


def check(backend, x, w, dtype):
    stacked, weight = oracles.stack(x), oracles.to_numpy(w)
    for precision, products in itertools.product(PRECISIONS, (True, False)):
        v, xv, vtv = combine(x, w, dtype=dtype, precision=precision, products=products, backend=backend)
        assert (v.dtype, xv.dtype, vtv.dtype) == (dtype, F64, F64)
        assert torch.equal(vtv, vtv.T)
        bound = oracles.combine_v_bound(stacked, weight, dtype, precision)
        oracles.assert_within(v, oracles.combine_v(stacked, weight), bound)
        as_stored = oracles.to_numpy(v)
        if products:
            oracles.assert_within(xv, stacked @ as_stored, oracles.product_bound(stacked, as_stored, precision))
        else:
            assert xv.shape == (0, w.shape[1])
        oracles.assert_within(vtv, oracles.gram(as_stored.T), oracles.gram_bound(as_stored.T, precision))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "d", "k"), SIZES)
def test_matches_float64(backend, rows, d, k, dtype):
    check(backend, blocks(1, rows, d, "mixed"), weights(1, sum(rows), k), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_reads_any_dtype_and_storage(backend, kind, layout):
    check(backend, blocks(2, [3, 17, 9], 131, kind, layout), weights(2, 29, 6), F32)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_past_every_tile(backend, kind):
    check(backend, blocks(3, [130, 17], 391, kind), weights(3, 147, 65), F32)


def test_long_rows(backend):
    check(backend, blocks(4, [5, 4], 4099, "f16"), weights(4, 9, 17), BF16)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_float32_sums_end_in_time(backend, dtype):
    check(backend, [swallowing(4099, dtype)], torch.eye(2, dtype=F64), dtype)


@pytest.mark.parametrize(("dtype", "step"), [(F16, 2.0**-10), (BF16, 2.0**-7)], ids=["f16", "bf16"])
def test_v_is_rounded_once(backend, dtype, step):
    """Just past a tie: by way of float32 it would fall on the tie, and then down."""
    past = 1 + step / 2 + 2.0**-40
    w = torch.tensor([[past, -past, 1 + step / 2 - 2.0**-40, 3 * past]], dtype=F64)
    x = torch.tensor([[1.0, 0.5]], dtype=F32)
    v = combine(x, w, dtype=dtype, precision="f64", backend=backend).v
    want = oracles.rounded(oracles.combine_v(oracles.to_numpy(x), w.numpy()), dtype)
    np.testing.assert_array_equal(oracles.to_numpy(v), want)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["f16", "bf16"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_v_rounds_ties_subnormals_and_overflow_like_the_format(backend, dtype, precision):
    step, tiny, largest = float(torch.finfo(dtype).eps), float(torch.finfo(dtype).tiny), float(torch.finfo(dtype).max)
    w = [1 + step / 2, 1 + 3 * step / 2, -1 - step / 2, tiny / 3, tiny * step / 2, tiny * step * 0.75, largest, -0.0]
    w = torch.tensor([[*w, largest * (1 + step)]], dtype=F32).to(F64)
    v = combine(torch.ones(1, 3), w, dtype=dtype, precision=precision, backend=backend).v
    np.testing.assert_array_equal(oracles.to_numpy(v), np.repeat(oracles.rounded(w.numpy(), dtype), 3, axis=0))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_are_of_v_as_stored(backend, precision):
    """Half precision moves V by far more than the bound of its products: V before its rounding would be seen."""
    x, w = blocks(5, [6], 37, "f32"), weights(5, 6, 4)
    v, xv, vtv = combine(x, w, dtype=F16, precision=precision, backend=backend)
    stacked, as_stored = oracles.stack(x), oracles.to_numpy(v)
    before = oracles.combine_v(stacked, w.numpy())
    bound_xv = oracles.product_bound(stacked, as_stored, precision)
    bound_vtv = oracles.gram_bound(as_stored.T, precision)
    # the case is sharp enough to tell
    assert (np.abs(stacked @ before - stacked @ as_stored) > 2 * bound_xv).any()
    assert (np.abs(before.T @ before - as_stored.T @ as_stored) > 2 * bound_vtv).any()
    oracles.assert_within(xv, stacked @ as_stored, bound_xv)
    oracles.assert_within(vtv, as_stored.T @ as_stored, bound_vtv)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_stays_in_its_column_of_v(backend, layout):
    """Rows that fill no vector, beside columns of W that fill none: what lies next in memory is not theirs."""
    x, w = blocks(6, [3, 8], 37, "f32", layout), weights(6, 11, 35)
    w[0] = float("nan")
    w[:, :34] = weights(7, 11, 34)
    for products in (True, False):
        v, _, vtv = combine(x, w, dtype=F32, precision="f32", products=products, backend=backend)
        assert v[:, :34].isfinite().all()
        assert vtv[:34, :34].isfinite().all()
        assert v[:, 34].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row_of_v(backend, kind, special):
    x, w = blocks(6, [5, 13], 150, kind), weights(6, 18, 5)
    x[1][2, 140] = special
    v, xv, vtv = combine(x, w, backend=backend)
    stacked = oracles.stack(x)
    oracles.assert_same_special(v, oracles.combine_v(stacked, w.numpy()))
    assert not torch.isfinite(xv).any()
    assert not torch.isfinite(vtv.diagonal()).any()
    clean = np.delete(stacked, 140, axis=1)
    bound = oracles.combine_v_bound(clean, w.numpy(), F32, "f32")
    oracles.assert_within(v[torch.arange(150) != 140], oracles.combine_v(clean, w.numpy()), bound)


@given(rows=heights, d=st.integers(0, 9001), k=st.integers(0, 6), kind=kinds, dtype=dtypes, lean=leans, seed=seeds)
def test_threads_change_no_bit(compiled, on_threads, rows, d, k, kind, dtype, lean, seed):
    x, w = blocks(seed, rows, d, kind), weights(seed, sum(rows), k)
    one, two, three = (
        on_threads(count, lambda: combine(x, w, dtype=dtype, products=not lean, backend=compiled))
        for count in (1, 2, 3)
    )
    assert all(map(oracles.same_bits, one, two))
    assert all(map(oracles.same_bits, one, three))


@given(
    members=st.lists(st.tuples(heights, columns, widths), min_size=1, max_size=5),
    dtype=dtypes,
    lean=st.booleans(),
    seed=seeds,
)
def test_a_batch_is_its_members(backend, members, dtype, lean, seed):
    batch = [
        (blocks(seed + i, rows, d, [*KINDS][i]), weights(seed + i, sum(rows), k))
        for i, (rows, d, k) in enumerate(members)
    ]
    together = combine_many(batch, dtype=dtype, products=not lean, backend=backend)
    for member, (x, w) in zip(together, batch, strict=True):
        alone = combine(x, w, dtype=dtype, products=not lean, backend=backend)
        assert all(map(oracles.same_bits, member, alone))


@given(
    rows=st.integers(1, 70),
    d=columns,
    k=widths,
    kind=kinds,
    dtype=dtypes,
    lean=st.booleans(),
    seed=seeds,
    data=st.data(),
)
def test_blocks_are_only_a_way_to_write_it(compiled, rows, d, k, kind, dtype, lean, seed, data):
    """Cut a matrix anywhere: the compiled kernels give the same bits."""
    [x], w = blocks(seed, [rows], d, kind), weights(seed, rows, k)
    cut = data.draw(st.integers(0, rows), label="cut")
    parted = combine([x[:cut], x[cut:]], w, dtype=dtype, products=not lean, backend=compiled)
    assert all(map(oracles.same_bits, parted, combine(x, w, dtype=dtype, products=not lean, backend=compiled)))


@given(rows=heights, d=columns, k=widths, kind=kinds, layout=st.sampled_from(LAYOUTS[1:5]), lean=leans, seed=seeds)
def test_storage_changes_no_bit(compiled, rows, d, k, kind, layout, lean, seed):
    x, w = blocks(seed, rows, d, kind), weights(seed, sum(rows), k)
    elsewhere = combine([stored(b, layout) for b in x], stored(w, layout), products=not lean, backend=compiled)
    assert all(map(oracles.same_bits, elsewhere, combine(x, w, products=not lean, backend=compiled)))


@given(rows=heights, d=columns, k=widths, kind=kinds, seed=seeds, data=st.data())
def test_permuting_vectors_permutes_the_answer(compiled, rows, d, k, kind, seed, data):
    x, w = blocks(seed, rows, d, kind), weights(seed, sum(rows), k)
    order = data.draw(st.permutations(range(k)), label="order")
    v, xv, vtv = combine(x, w, backend=compiled)
    permuted = combine(x, w[:, order], backend=compiled)
    assert torch.equal(permuted.v, v[:, order])
    assert torch.equal(permuted.xv, xv[:, order])
    assert torch.equal(permuted.vtv, vtv[order][:, order])


@given(rows=heights, d=columns, k=widths, kind=kinds, power=st.integers(-6, 6), seed=seeds)
def test_a_power_of_two_scales_exactly(backend, rows, d, k, kind, power, seed):
    x, w, factor = blocks(seed, rows, d, kind), weights(seed, sum(rows), k), 2.0**power
    scaled, plain = combine(x, w * factor, backend=backend), combine(x, w, backend=backend)
    assert torch.equal(scaled.v, plain.v * factor)
    assert torch.equal(scaled.xv, plain.xv * factor)
    assert torch.equal(scaled.vtv, plain.vtv * factor**2)


def test_no_blocks_and_no_matrices(backend):
    v, xv, vtv = combine(RowBlocks([], columns=5), torch.empty(0, 2, dtype=F64), backend=backend)
    assert torch.equal(v, torch.zeros(5, 2))
    assert xv.shape == (0, 2)
    assert torch.equal(vtv, torch.zeros(2, 2, dtype=F64))
    assert combine_many([], backend=backend) == []


@pytest.mark.parametrize(
    ("w", "options", "error", "message"),
    [
        (
            torch.ones(3, 1),
            {},
            ShapeError,
            r"w needs .* each of the 3 rows .* got \[3, 1\] of .*float32",
        ),
        (
            torch.ones(2, 1, dtype=F64),
            {},
            ShapeError,
            r"w needs .* each of the 3 rows .* got \[2, 1\]",
        ),
        (torch.ones(3, dtype=F64), {}, ShapeError, r"w needs one float64 row .* got \[3\]"),
        (torch.ones(3, 1, dtype=F64), {"dtype": torch.int8}, ArgumentError, "dtype is .*; got torch.int8"),
        (torch.ones(3, 1, dtype=F64), {"precision": "bf16"}, ArgumentError, "precision is 'f32' or 'f64'; got 'bf16'"),
    ],
)
def test_what_does_not_fit_is_refused(w, options, error, message):
    with pytest.raises(error, match=f"^combine: {message}"):
        combine(torch.ones(3, 4), w, **options)


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("layout", ["row-major", "column-major", "strided"])
def test_writes_a_basis_where_it_is_told(backend, layout, products):
    x, w = blocks(23, [20, 11], 700, "mixed"), weights(23, 31, 9)
    place = stored(torch.zeros(700, 9), layout)

    [found, made] = combine_many([(x, w), (x, w)], products=products, out=[place, None], backend=backend)

    assert found.v.data_ptr() == place.data_ptr()
    assert oracles.same_bits(place, made.v)
    assert oracles.same_bits(found.vtv, made.vtv)


@pytest.mark.parametrize(
    ("place", "got"),
    [
        (torch.zeros(4, 2), r"\[4, 2\] of torch.float32 on cpu"),
        (torch.zeros(4, 1, dtype=F64), r"\[4, 1\] of torch.float64 on cpu"),
        (torch.zeros(4, 1, device="meta"), r"\[4, 1\] of torch.float32 on meta"),
    ],
)
def test_a_place_that_does_not_fit_is_refused(place, got):
    with pytest.raises(ShapeError, match=rf"out needs to be \[4, 1\] of torch.float32 on cpu; got {got}"):
        combine_many([(torch.ones(2, 4), torch.ones(2, 1).double())], out=[place])
