"""gram: the bound on every dtype, size and storage; symmetry; bits that depend on nothing they should not."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from devices import RowBlocks, gram, gram_many
from loraspan.errors import ArgumentError, ShapeError
from loraspan.ops.gram import gram_blocks
from matrices import KINDS, LAYOUTS, blocks, normal, stored, swallowing

PRECISIONS = ("f32", "f64")
seeds = st.integers(0, 2**32 - 1)
heights = st.lists(st.integers(0, 19), min_size=1, max_size=4)
columns = st.integers(0, 300)

# rows of the blocks and columns: single, below, at and past a tile or a float32 sum, prime, ragged, nothing
SIZES = [
    pytest.param([1], 1, id="scalar"),
    pytest.param([1], 4099, id="one-row"),
    pytest.param([15], 127, id="below-a-tile"),
    pytest.param([16], 128, id="a-tile"),
    pytest.param([17], 129, id="past-a-tile"),
    pytest.param([48], 16, id="a-wide-tile"),
    pytest.param([7, 49, 1], 33, id="past-a-wide-tile"),
    pytest.param([3, 0, 11, 5, 2], 257, id="ragged"),
    pytest.param([4, 4], 1, id="one-column"),
    pytest.param([0], 5, id="no-rows"),
    pytest.param([3, 2], 0, id="no-columns"),
]


def check(backend, x):
    stacked = oracles.stack(x)
    for precision in PRECISIONS:
        g = gram(x, precision=precision, backend=backend)
        assert g.dtype == torch.float64
        assert torch.equal(g, g.T)
        oracles.assert_within(g, oracles.gram(stacked), oracles.gram_bound(stacked, precision))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "d"), SIZES)
def test_matches_float64(backend, rows, d, kind):
    check(backend, blocks(20261122, rows, d, kind))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_reads_any_storage(backend, kind, layout):
    check(backend, blocks(1, [3, 17, 9], 131, kind, layout))


# columns that lie along memory, of a tile's rows or two: below, at and past a sum, and past a slab
@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("d", [1, 127, 128, 130, 8209])
@pytest.mark.parametrize("rows", [4, 8, 12, 16, 32])
def test_few_rows_in_columns(backend, rows, d, kind):
    check(backend, blocks(4, [rows], d, kind, "column-major"))


@pytest.mark.parametrize("kind", ["f16", "mixed"])
def test_past_every_tile(backend, kind):
    check(backend, blocks(2, [130, 17], 515, kind))


# two slabs of columns and a bit, entries of one sign: sums only grow, so do their errors
@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_long_sums_keep_seven_digits(backend, kind):
    x = [b.abs() for b in blocks(3, [5, 4], 8209, kind)]
    g = gram(x, backend=backend)
    exact = oracles.gram(oracles.stack(x))
    size = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    oracles.assert_within(g, exact, 3e-7 * size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_float32_sums_end_in_time(backend, dtype):
    check(backend, [swallowing(8209, dtype)])


# an instruction set may have products of bfloat16 numbers that take subnormal ones for zero
@pytest.mark.parametrize("heights", [[3, 5], [150, 130]], ids=str)
@pytest.mark.parametrize("layout", ["row-major", "column-major"])
def test_subnormal_entries_count(compiled, heights, layout):
    small, large = blocks(6, heights, 77, "bf16", layout)
    # the last column alone, or all of a row
    small[0, :76], small[1, :76] = 0, 2.0**-126
    small[:, 76] *= 2.0**-130
    large *= 2.0**60
    check(compiled, [small, large])
    batch = [[large], [small, large], [small], [large.float()], [large]]
    for together, x in zip(gram_many(batch, backend=compiled), batch, strict=True):
        assert oracles.same_bits(together, gram(x, backend=compiled))


def test_products_of_half_precision_numbers_are_exact(backend):
    # 11 bits times 11 bits fit float32's 24: sums of two such numbers with small exponents have no error at all
    x = torch.tensor([[1 + 2.0**-10, 1 - 2.0**-11], [2 - 2.0**-10, 1 + 2.0**-9]], dtype=torch.float16)
    assert torch.equal(gram(x, backend=backend), torch.from_numpy(oracles.gram(oracles.to_numpy(x))))


def test_f64_rounds_nothing_to_float32(backend):
    x = torch.tensor([[1.0 + 2.0**-30]], dtype=torch.float64)
    assert gram(x, precision="f64", backend=backend).item() == (1 + 2.0**-30) ** 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_row(backend, kind, special):
    x = blocks(4, [5, 13], 150, kind)
    x[1][2, 140] = special
    g = gram(x, backend=backend)
    stacked = oracles.stack(x)
    oracles.assert_same_special(g, oracles.gram(stacked))
    keep = np.arange(18) != 7
    clean = stacked[keep]
    oracles.assert_within(g[keep][:, keep], oracles.gram(clean), oracles.gram_bound(clean, "f32"))


@given(rows=heights, d=columns, seed=seeds, precision=st.sampled_from(PRECISIONS))
def test_is_a_gram_matrix(backend, rows, d, seed, precision):
    """Symmetric to the bit, a diagonal that is not negative, and Cauchy-Schwarz within the bound."""
    x = blocks(seed, rows, d, "mixed")
    g = gram(x, precision=precision, backend=backend).numpy()
    assert (g == g.T).all()
    assert (g.diagonal() >= 0).all()
    slack = oracles.gram_bound(oracles.stack(x), precision)
    size = np.sqrt(np.outer(g.diagonal() + slack.diagonal(), g.diagonal() + slack.diagonal()))
    assert (np.abs(g) <= size * (1 + 1e-15) + slack).all()


@given(rows=heights, d=st.integers(1, 9001), kind=st.sampled_from([*KINDS]), seed=seeds)
def test_threads_change_no_bit(compiled, on_threads, rows, d, kind, seed):
    x = blocks(seed, rows, d, kind)
    one, two, three = (on_threads(count, lambda: gram(x, backend=compiled)) for count in (1, 2, 3))
    assert oracles.same_bits(one, two)
    assert oracles.same_bits(one, three)


@given(members=st.lists(st.tuples(heights, columns), min_size=1, max_size=5), seed=seeds)
def test_a_batch_is_its_members(backend, members, seed):
    batch = [blocks(seed + i, rows, d, [*KINDS][i]) for i, (rows, d) in enumerate(members)]
    for together, x in zip(gram_many(batch, backend=backend), batch, strict=True):
        assert oracles.same_bits(together, gram(x, backend=backend))


@given(rows=st.integers(1, 70), d=columns, kind=st.sampled_from([*KINDS]), seed=seeds, data=st.data())
def test_blocks_are_only_a_way_to_write_it(compiled, rows, d, kind, seed, data):
    """Cut a matrix anywhere: the compiled kernels give the same bits."""
    [x] = blocks(seed, [rows], d, kind)
    cut = data.draw(st.integers(0, rows), label="cut")
    assert oracles.same_bits(gram([x[:cut], x[cut:]], backend=compiled), gram(x, backend=compiled))


@given(rows=st.integers(1, 70), d=columns, kind=st.sampled_from([*KINDS]), seed=seeds)
def test_permuting_rows_permutes_the_answer(compiled, rows, d, kind, seed):
    [x] = blocks(seed, [rows], d, kind)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert oracles.same_bits(gram(x[order], backend=compiled), gram(x, backend=compiled)[order][:, order])


@given(rows=heights, d=columns, kind=st.sampled_from([*KINDS]), layout=st.sampled_from(LAYOUTS[1:5]), seed=seeds)
def test_storage_changes_no_bit(compiled, rows, d, kind, layout, seed):
    x = blocks(seed, rows, d, kind)
    assert oracles.same_bits(gram([stored(b, layout) for b in x], backend=compiled), gram(x, backend=compiled))


@given(rows=heights, d=columns, kind=st.sampled_from([*KINDS]), power=st.integers(1, 6), seed=seeds)
def test_a_power_of_two_scales_exactly(backend, rows, d, kind, power, seed):
    x = blocks(seed, rows, d, kind)
    bigger = gram([b * 2.0**power for b in x], backend=backend)
    assert torch.equal(bigger, gram(x, backend=backend) * 4.0**power)


def test_the_matrix_may_be_given_in_any_form(backend):
    x = normal(5, 6, 40, dtype=torch.float32)
    want = gram(x, backend=backend)
    for form in ([x], (x,), RowBlocks([x])):
        assert oracles.same_bits(gram(form, backend=backend), want)


def test_no_blocks_and_no_matrices(backend):
    assert gram(RowBlocks([], columns=5), backend=backend).shape == (0, 0)
    assert gram_many([], backend=backend) == []


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(2, 3), {"precision": "f16"}, ArgumentError, "gram: precision is 'f32' or 'f64'; got 'f16'"),
        ([torch.ones(2, 3), torch.ones(2, 4)], {}, ShapeError, r"blocks are \[rows, 3\] matrices; block 1 is \[2, 4\]"),
        (
            torch.ones(2, 3, dtype=torch.int8),
            {},
            ShapeError,
            "float16, bfloat16, float32 or float64; block 0 is .*int8",
        ),
    ],
)
def test_what_does_not_fit_is_refused(x, options, error, message):
    with pytest.raises(error, match=message):
        gram(x, **options)


@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x.mT, lambda x: x[:, 1:, 2:, ::3], lambda x: x[::2].expand(3, 3, 5, 70)]
)
def test_a_batched_tensor_is_its_members(backend, view):
    """By one description of the whole batch, bit for bit what each matrix gives alone."""
    batch = view(normal(0, 2, 3, 5, 70, dtype=oracles.F16))
    together = gram(batch, precision="f64", backend=backend)
    assert together.shape == (*batch.shape[:-1], batch.shape[-2])
    for i in range(batch.shape[0]):
        for j in range(batch.shape[1]):
            assert torch.equal(together[i, j], gram(batch[i, j], precision="f64", backend=backend))


def test_an_empty_batched_tensor(backend):
    assert gram(torch.ones(0, 3, 4), backend=backend).shape == (0, 3, 3)
    with pytest.raises(ShapeError, match="blocks are float16"):
        gram(torch.ones(0, 3, 4, dtype=torch.int64), backend=backend)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_blocks_alone_have_the_bits_of_matrices(precision):
    matrices = [
        RowBlocks(blocks(3, [4, 4, 4], 131, "mixed")),
        RowBlocks(blocks(4, [3, 0, 17], 260, "f16")),
        RowBlocks([], 5),
        RowBlocks(blocks(5, [2], 0, "f32")),
    ]

    found = gram_blocks(matrices, precision=precision)

    assert [isinstance(grams, torch.Tensor) for grams in found] == [True, False, False, True]
    for x, grams in zip(matrices, found, strict=True):
        alone = gram_many([[block] for block in x.blocks], precision=precision)
        assert len(grams) == len(alone)
        assert all(torch.equal(one, other) for one, other in zip(grams, alone, strict=True))
    with pytest.raises(ArgumentError, match="precision is 'f32' or 'f64'"):
        gram_blocks(matrices, precision="f16")
