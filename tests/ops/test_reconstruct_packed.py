"""reconstruct from packed rows: the bits of unpacking first, from every set; and products with packed rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from loraspan.errors import ArgumentError, BackendError, ShapeError
from loraspan.ops import Packed, Piece, gram, pack, packed_products, reconstruct_many, unpack
from matrices import LAYOUTS, normal, packed, stored
from oracles import DTYPES, F32, F64

SCALE = 0.3
seeds = st.integers(0, 2**32 - 1)
bit_widths = pytest.mark.parametrize("bits", [16, 8, 4])
# bits of what stands beside rows of so many
OTHERS = {16: 8, 8: 4, 4: 16}
# m, k, n: single, at and past a tile and a block, longer than what is unpacked at once, nothing
SIZES = [
    pytest.param(1, 1, 1, id="scalar"),
    pytest.param(64, 16, 128, id="a-block"),
    pytest.param(65, 17, 129, id="past-a-block"),
    pytest.param(1031, 5, 3, id="tall"),
    pytest.param(2050, 3, 18, id="many-tiles"),
    pytest.param(5, 257, 7, id="long-sums"),
    pytest.param(7, 0, 3, id="rank-0"),
    pytest.param(0, 2, 3, id="no-rows"),
    pytest.param(3, 2, 0, id="no-columns"),
]


def columns(matrix):
    """What packed rows stand for: their transpose, unpacked."""
    return unpack(matrix).T if isinstance(matrix, Packed) else matrix


def poison(m, n, dtype, layout="row-major"):
    return stored(torch.full((m, n), float("nan"), dtype=dtype), layout)


def assert_as_unpacked(pieces, backend):
    """All pieces at once give what the same pieces give unpacked."""
    again = [p._replace(basis=columns(p.basis), out=torch.empty_like(p.out)) for p in pieces]
    again = [p._replace(loadings=None if p.loadings is None else columns(p.loadings)) for p in again]
    reconstruct_many(pieces, backend=backend)
    reconstruct_many(again, backend=backend)
    for ours, theirs in zip(pieces, again, strict=True):
        assert oracles.same_bits(ours.out, theirs.out)


@bit_widths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_basis_loadings_or_both(backend, bits, m, k, n, dtype):
    if backend in ("cuda", "triton"):
        pytest.skip("kernels for a GPU read no packed rows")
    basis, loadings = packed(normal(1, k, m), bits), packed(normal(2, n, k), OTHERS[bits])
    plain = normal(3, m, k, dtype=dtype), normal(4, k, n, dtype=dtype)
    pieces = [
        Piece(basis, plain[1], poison(m, n, dtype), SCALE),
        Piece(plain[0], loadings, poison(m, n, dtype), SCALE),
        Piece(basis, loadings, poison(m, n, dtype), SCALE),
        # private ends
        Piece(basis, None, poison(m, k, dtype), SCALE),
    ]
    for piece in pieces:
        assert_as_unpacked([piece], backend)
    assert_as_unpacked(pieces, backend)


@bit_widths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_the_bound_of_what_is_packed(backend, bits, dtype):
    """Against float64, so that unpacking wrongly in both ways would be seen."""
    if backend in ("cuda", "triton"):
        pytest.skip("kernels for a GPU read no packed rows")
    basis, loadings = packed(normal(5, 9, 130), bits), normal(6, 9, 21, dtype=dtype)
    out = poison(130, 21, dtype)
    reconstruct_many([Piece(basis, loadings, out, SCALE)], backend=backend)
    b, l = oracles.to_numpy(unpack(basis, dtype=F64, backend="reference")).T, oracles.to_numpy(loadings)
    bound = oracles.reconstruct_bound(b, l, SCALE, dtype, F64 if dtype == F64 else F32)
    oracles.assert_within(out, oracles.reconstruct(b, l, SCALE), bound)


@given(
    shapes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 20), st.integers(0, 40)), min_size=1, max_size=6),
    seed=seeds,
)
def test_company_threads_and_storage_change_no_bit(compiled, on_threads, shapes, seed):
    """Packed and plain pieces, some with one basis, in all dtypes and storages of what is written."""
    pieces = []
    for i, (m, k, n) in enumerate(shapes):
        basis, out = packed(normal(seed + i, k, m), (16, 8, 4)[i % 3]), DTYPES[i % 4]
        loadings = pack(normal(seed + i + 77, n, k), (4, 8)[i // 2 % 2])
        pieces.append(Piece(basis, loadings, poison(m, n, out, LAYOUTS[i % 5]), SCALE + i))
        pieces.append(Piece(basis, unpack(loadings).T, poison(m, n, F32), SCALE))
        pieces.append(Piece(basis, None, poison(m, k, out, LAYOUTS[(i + 1) % 5])))
    for threads in (1, 3):
        on_threads(threads, lambda: assert_as_unpacked(pieces, compiled))


def test_codes_with_other_scales_are_another_basis(compiled):
    """Pieces of one basis share the work on it; these have only the codes in common."""
    basis = pack(normal(7, 6, 70), 8)
    other = Packed(basis.codes, basis.scales * 2, basis.length, basis.bits)
    outs = torch.empty(2, 70, 6)
    reconstruct_many([Piece(basis, None, outs[0]), Piece(other, None, outs[1])], backend=compiled)
    assert torch.equal(outs[1], 2 * outs[0])


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_kernels_for_a_gpu_refuse_packed_rows(name):
    packed, plain = pack(torch.ones(2, 4), 8), torch.ones(4, 2)
    for piece in (
        Piece(packed, None, torch.empty(4, 2)),
        Piece(plain, pack(torch.ones(3, 2), 4), torch.empty(4, 3)),
    ):
        with pytest.raises(BackendError, match=rf"^reconstruct: backend '{name}' .* it reads no packed rows$"):
            reconstruct_many([piece], backend=name)


def test_what_does_not_fit_is_refused():
    packed = pack(torch.ones(3, 4), 8)
    with pytest.raises(ShapeError, match=r"basis has 3 vectors of length 4; got loadings \[2, 5\] and out \[4, 5\]"):
        reconstruct_many([Piece(packed, torch.ones(2, 5), torch.zeros(4, 5))])
    with pytest.raises(ShapeError, match=r"basis has 3 vectors of length 4; got loadings \[4, 3\]"):
        reconstruct_many([Piece(packed, packed, torch.zeros(4, 3))])
    with pytest.raises(ShapeError, match=r"on one device; got torch.float32 on meta beside packed rows on cpu"):
        reconstruct_many([Piece(packed, pack(torch.ones(2, 3), 4).to("meta"), torch.zeros(4, 2))])


@bit_widths
@given(
    rows=st.lists(st.integers(0, 90), max_size=5),
    k=st.integers(0, 20),
    length=st.sampled_from([0, 1, 65, 4096, 4100, 8200]),
    precision=st.sampled_from(["f32", "f64"]),
    seed=seeds,
)
def test_products_are_those_of_the_unpacked_basis(bits, rows, k, length, precision, seed):
    x = [normal(seed + i, r, length, dtype=DTYPES[i % 4]) for i, r in enumerate(rows)]
    basis = packed(normal(seed + 99, k, length) / 7, bits)
    found = packed_products(x, basis, precision=precision)
    b = oracles.to_numpy(unpack(basis, dtype=F64, backend="reference"))
    exact = oracles.stack([*x, unpack(basis, dtype=F64)])
    bound = oracles.gram_bound(exact, precision)[:, len(exact) - k :]
    assert found.rows.shape == (sum(rows), k)
    oracles.assert_within(found.rows, exact[: sum(rows)] @ b.T, bound[: sum(rows)])
    oracles.assert_within(found.basis, b @ b.T, bound[sum(rows) :])
    assert torch.equal(found.basis, found.basis.T)


def test_products_of_one_chunk_are_a_gram():
    x, basis = normal(8, 60, 640, dtype=F32), pack(normal(9, 5, 640), 4)
    whole = gram([unpack(basis), x])
    found = packed_products([x], basis)
    assert torch.equal(found.basis, whole[:5, :5])
    assert torch.equal(found.rows, whole[5:, :5])


def test_products_refuse_rows_of_another_length():
    with pytest.raises(ShapeError, match=r"^packed_products: rows are as long as the basis vectors, 64; got 65"):
        packed_products([torch.ones(2, 65)], pack(torch.ones(1, 64), 8))
    with pytest.raises(ArgumentError, match=r"^Packed.columns: start is a multiple of 64; got 3"):
        pack(torch.ones(1, 64), 8).columns(3, 5)
