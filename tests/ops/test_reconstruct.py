"""reconstruct: the bound for every mix of dtypes and storage, private columns, places to write, one rounding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from devices import Piece, reconstruct, reconstruct_many
from loraspan.errors import BackendError, ShapeError
from matrices import LAYOUTS, normal, stored
from oracles import BF16, DTYPES, F16, F32, F64

# never a power of two: that would hide a scale applied twice, or a rounding before it
SCALE = 0.3
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(0, 70)
dtypes = st.sampled_from(DTYPES)

# m, k, n: single, below, at and past a tile, prime, private columns' shapes, nothing
SIZES = [
    pytest.param(1, 1, 1, id="scalar"),
    pytest.param(7, 15, 127, id="below-a-tile"),
    pytest.param(48, 16, 128, id="a-tile"),
    pytest.param(49, 17, 129, id="past-a-tile"),
    pytest.param(1031, 5, 3, id="tall"),
    pytest.param(3, 5, 1031, id="wide"),
    pytest.param(5, 257, 7, id="long-sums"),
    pytest.param(9, 8, 1, id="one-column"),
    pytest.param(7, 0, 3, id="rank-0"),
    pytest.param(0, 2, 3, id="no-rows"),
    pytest.param(3, 2, 0, id="no-columns"),
]


def wide(*tensors):
    return F64 if F64 in [t.dtype for t in tensors if t is not None] else F32


def assert_rebuilt(out, basis, loadings, scale=SCALE):
    b, l = oracles.to_numpy(basis), None if loadings is None else oracles.to_numpy(loadings)
    bound = oracles.reconstruct_bound(b, l, scale, out.dtype, wide(basis, loadings, out))
    oracles.assert_within(out, oracles.reconstruct(b, l, scale), bound)


def factors(seed, m, k, n, dtype=F32, other=None):
    return normal(seed, m, k, dtype=dtype), normal(seed + 77, k, n, dtype=other or dtype)


def pieces(seed, shapes):
    """Pieces of all kinds from ``(m, k, n, with loadings)``, all dtypes and storages in turn."""
    made = []
    for i, (m, k, n, shared) in enumerate(shapes):
        layout = LAYOUTS[i % 5]
        basis = stored(normal(seed + i, m, k, dtype=DTYPES[i % 4]), layout)
        loadings = stored(normal(seed + i + 77, k, n, dtype=DTYPES[(i // 2) % 4]), layout) if shared else None
        out = stored(torch.full((m, n if shared else k), float("nan"), dtype=DTYPES[(i // 3) % 4]), layout)
        made.append(Piece(basis, loadings, out, SCALE + i))
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_matches_float64(backend, m, k, n, dtype):
    basis, loadings = factors(1, m, k, n, dtype)
    out = reconstruct(basis, loadings, scale=SCALE, backend=backend)
    assert out.dtype == dtype
    assert_rebuilt(out, basis, loadings)


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixes_dtypes(backend, dtype, other, out):
    basis, loadings = factors(2, 33, 6, 19, dtype, other)
    rebuilt = reconstruct(basis, loadings, scale=SCALE, dtype=out, backend=backend)
    assert rebuilt.dtype == out
    assert_rebuilt(rebuilt, basis, loadings)


@pytest.mark.parametrize("batch", [(2, 3), (1,), (0,), (3, 0)], ids=str)
def test_leading_dimensions_are_a_batch(backend, batch):
    basis, loadings = normal(3, *batch, 37, 5, dtype=F32), normal(4, *batch, 5, 11, dtype=F32)
    out = reconstruct(basis, loadings, scale=SCALE, backend=backend)
    assert out.shape == (*batch, 37, 11)
    assert_rebuilt(out, basis, loadings)


@pytest.mark.parametrize("out_layout", LAYOUTS[:5])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
def test_reads_and_writes_any_storage(backend, dtype, layout, out_layout):
    basis, loadings = (stored(t, layout) for t in factors(5, 35, 9, 18, dtype))
    out = stored(torch.full((35, 18), float("nan"), dtype=dtype), out_layout)
    reconstruct_many([Piece(basis, loadings, out, SCALE)], backend=backend)
    assert_rebuilt(out, basis, loadings)


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_private_columns_are_scaled_and_converted(backend, dtype, out):
    basis = normal(6, 35, 18, dtype=dtype)
    place = torch.empty(35, 18, dtype=out)
    reconstruct_many([Piece(basis, None, place, SCALE)], backend=backend)
    assert_rebuilt(place, basis, None)
    reconstruct_many([Piece(basis, None, place)], backend=backend)
    np.testing.assert_array_equal(oracles.to_numpy(place), oracles.rounded(oracles.to_numpy(basis), out))


@pytest.mark.parametrize(
    "frame",
    [torch.zeros(73, 22), torch.zeros(22, 73).T, torch.zeros(146, 66)[::2, ::3]],
    ids=["row-major", "column-major", "strided"],
)
def test_pieces_fill_one_matrix_and_nothing_beside_it(backend, frame):
    """Shared and private columns side by side, in the middle of memory that is not to be touched."""
    memory = frame.fill_(5) if frame._base is None else frame._base.fill_(5)
    basis, loadings = factors(7, 69, 6, 17)
    private = normal(8, 69, 3, dtype=F16)
    shared, own = frame[1:70, 1:18], frame[1:70, 18:21]
    reconstruct_many([Piece(basis, loadings, shared, SCALE), Piece(private, None, own, 0.7)], backend=backend)
    assert_rebuilt(shared, basis, loadings)
    assert_rebuilt(own, private, None, 0.7)
    frame[1:70, 1:21] = 5
    assert (memory == 5).all()


@pytest.mark.parametrize(("dtype", "step"), [(F16, 2.0**-10), (BF16, 2.0**-7)], ids=["f16", "bf16"])
@pytest.mark.parametrize("private", [False, True], ids=["rebuilt", "private"])
def test_rounds_once(backend, dtype, step, private):
    """Just past a tie: by way of float32 it would fall on the tie, and then down."""
    past = 1 + step / 2 + 2.0**-40
    basis = torch.tensor([[past, -past], [3 * past, 1 + step / 2 - 2.0**-40]], dtype=F64)
    out = torch.empty(2, 2, dtype=dtype)
    reconstruct_many([Piece(basis, None if private else torch.eye(2), out)], backend=backend)
    np.testing.assert_array_equal(oracles.to_numpy(out), oracles.rounded(basis.numpy(), dtype))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["f16", "bf16"])
def test_no_entry_is_rounded_before_the_scale(backend, dtype):
    """A product rounded to half precision, then scaled and rounded again, is off by more than one rounding allows."""
    basis, loadings = factors(9, 60, 8, 60, dtype)
    b, l = oracles.to_numpy(basis), oracles.to_numpy(loadings)
    twice = oracles.rounded(SCALE * oracles.rounded(b @ l, dtype), dtype)
    bound = oracles.reconstruct_bound(b, l, SCALE, dtype, F32)
    # the case is sharp enough to tell
    assert (np.abs(twice - SCALE * (b @ l)) > bound).any()
    oracles.assert_within(reconstruct(basis, loadings, scale=SCALE, backend=backend), SCALE * (b @ l), bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_row_and_column(backend, dtype, special):
    basis, loadings = factors(10, 37, 9, 21, dtype)
    clean = reconstruct(basis, loadings, scale=SCALE, backend=backend)
    basis[33, 4], loadings[2, 19] = special, special
    out = reconstruct(basis, loadings, scale=SCALE, backend=backend)
    rows, cols = torch.arange(37) != 33, torch.arange(21) != 19
    assert not torch.isfinite(out[33]).any()
    assert not torch.isfinite(out[:, 19]).any()
    assert torch.equal(out[rows][:, cols], clean[rows][:, cols])


@given(m=sizes, k=st.integers(0, 20), n=sizes, batch=st.integers(0, 4), dtype=dtypes, seed=seeds)
def test_a_batch_is_its_members(backend, m, k, n, batch, dtype, seed):
    basis, loadings = normal(seed, batch, m, k, dtype=dtype), normal(seed + 77, batch, k, n, dtype=dtype)
    together = reconstruct(basis, loadings, scale=SCALE, backend=backend)
    for out, b, l in zip(together, basis, loadings, strict=True):
        assert oracles.same_bits(out, reconstruct(b, l, scale=SCALE, backend=backend))


@given(shapes=st.lists(st.tuples(sizes, st.integers(0, 20), sizes, st.booleans()), max_size=9), seed=seeds)
def test_company_and_threads_change_no_bit(compiled, on_threads, shapes, seed):
    """Pieces of all sizes, dtypes and storages, together on any number of threads or each alone."""
    alone = pieces(seed, shapes)
    for piece in alone:
        reconstruct_many([piece], backend=compiled)
        assert_rebuilt(piece.out, piece.basis, piece.loadings, piece.scale)
    for count in (1, 2, 3):
        together = pieces(seed, shapes)
        on_threads(count, lambda together=together: reconstruct_many(together, backend=compiled))
        for a, b in zip(alone, together, strict=True):
            assert oracles.same_bits(a.out, b.out)


@given(m=st.integers(500, 1500), k=st.integers(1, 9), n=st.integers(1, 40), dtype=dtypes, seed=seeds)
def test_threads_change_no_bit_of_a_large_piece(compiled, on_threads, m, k, n, dtype, seed):
    basis, loadings = factors(seed, m, k, n, dtype)
    one, two, three = (
        on_threads(count, lambda: reconstruct(basis, loadings, scale=SCALE, backend=compiled)) for count in (1, 2, 3)
    )
    assert oracles.same_bits(one, two)
    assert oracles.same_bits(one, three)


def test_what_goes_past_the_caches_has_the_same_bits(compiled):
    # every dtype in every storage, and beside them more than 128 MiB
    shapes = [(49 + i, 5, 16, True) for i in range(60)]
    near, far = pieces(11, shapes), pieces(11, shapes)
    large = Piece(torch.tensor([[7.0]]).expand(2**20 + 3, 16), None, torch.empty(2**20 + 3, 16, dtype=F64), SCALE)
    reconstruct_many(near, backend=compiled)
    reconstruct_many([*far, large], backend=compiled)
    for one, other in zip(near, far, strict=True):
        assert oracles.same_bits(one.out, other.out)
    assert (large.out == SCALE * 7.0).all()


@given(m=sizes, k=st.integers(0, 20), n=sizes, dtype=dtypes, layout=st.sampled_from(LAYOUTS[1:5]), seed=seeds)
def test_storage_changes_no_bit(compiled, m, k, n, dtype, layout, seed):
    basis, loadings = factors(seed, m, k, n, dtype)
    out = stored(torch.full((m, n), float("nan"), dtype=dtype), layout)
    reconstruct_many([Piece(stored(basis, layout), stored(loadings, layout), out, SCALE)], backend=compiled)
    assert oracles.same_bits(out, reconstruct(basis, loadings, scale=SCALE, backend=compiled))


@given(m=sizes, k=st.integers(0, 20), n=sizes, dtype=dtypes, seed=seeds)
def test_permuting_rows_permutes_the_answer(compiled, m, k, n, dtype, seed):
    basis, loadings = factors(seed, m, k, n, dtype)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    rebuilt = reconstruct(basis, loadings, scale=SCALE, backend=compiled)
    assert oracles.same_bits(reconstruct(basis[order], loadings, scale=SCALE, backend=compiled), rebuilt[order])


@given(m=sizes, k=st.integers(0, 20), n=sizes, dtype=st.sampled_from([F32, F64]), power=st.integers(-6, 6), seed=seeds)
def test_a_power_of_two_scales_exactly(backend, m, k, n, dtype, power, seed):
    basis, loadings = factors(seed, m, k, n, dtype)
    plain = reconstruct(basis, loadings, scale=SCALE, backend=backend)
    assert torch.equal(reconstruct(basis, loadings, scale=SCALE * 2.0**power, backend=backend), plain * 2.0**power)


@given(m=st.integers(1, 40), n=sizes, seed=seeds, data=st.data())
def test_undoes_projection(backend, m, n, seed, data):
    """On its own span an orthonormal basis loses nothing: reconstruct(B, Bt A) is A."""
    k = data.draw(st.integers(1, m), label="k")
    basis, _ = torch.linalg.qr(normal(seed, m, k))
    inside = basis @ normal(seed + 77, k, n)

    rebuilt = reconstruct(basis, basis.T @ inside, backend=backend)

    # two products of length at most m and a basis orthonormal to about m u: 4 m u is ample
    slack = 4 * m * oracles.UNIT_ROUNDOFF[F64] * inside.norm()
    assert (rebuilt - inside).norm() <= slack


def test_no_pieces(backend):
    reconstruct_many([], backend=backend)


@pytest.mark.parametrize(
    ("basis", "loadings", "options", "message"),
    [
        (torch.ones(3), torch.ones(3, 2), {}, r"basis \[..., m, k\] and loadings .* got \[3\] and \[3, 2\]"),
        (torch.ones(2, 3, 2), torch.ones(3, 2, 2), {}, r"the same batch; got \[2, 3, 2\] and \[3, 2, 2\]"),
        (torch.ones(4, 3), torch.ones(2, 5), {}, r"basis has 3 vectors of length 4; got loadings \[2, 5\]"),
        (torch.ones(0, 4, 3), torch.ones(0, 2, 5), {}, r"basis has 3 vectors of length 4; got loadings \[2, 5\]"),
        (torch.ones(4, 3).int(), torch.ones(3, 5), {}, "tensors are float16, .* got torch.int32 on cpu"),
        (torch.ones(4, 3), torch.ones(3, 5).int(), {}, "tensors are float16, .* got torch.int32 on cpu"),
        (torch.ones(4, 3), torch.ones(3, 5), {"dtype": torch.int8}, "tensors are float16, .* got torch.int8 on cpu"),
        (torch.ones(4, 3), torch.ones(3, 5, device="meta"), {}, "on one device; got torch.float32 on meta"),
    ],
)
def test_what_does_not_fit_is_refused(basis, loadings, options, message):
    with pytest.raises(ShapeError, match=f"^reconstruct: .*{message}"):
        reconstruct(basis, loadings, **options)


@pytest.mark.parametrize(
    "wrong",
    [
        Piece(torch.ones(4, 3), torch.ones(3, 5), torch.zeros(4, 4)),
        Piece(torch.ones(4, 3), None, torch.zeros(4, 4)),
        Piece(torch.ones(4, 3), torch.ones(3, 5), torch.zeros(20)),
        Piece(torch.ones(4, 3), torch.ones(2, 5), torch.zeros(4, 5)),
    ],
)
def test_nothing_is_written_where_one_piece_is_refused(wrong):
    out = torch.full((4, 5), 5.0)
    right = Piece(torch.ones(4, 3), torch.ones(3, 5), out)
    with pytest.raises(ShapeError, match=r"^reconstruct: .* got"):
        reconstruct_many([right, wrong])
    with pytest.raises(BackendError, match="no backend 'tpu'"):
        reconstruct_many([right], backend="tpu")
    assert (out == 5).all()
