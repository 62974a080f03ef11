"""Small dense matrices: eigenvectors, singular vectors and roots, judged by what is determined and against LAPACK."""

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraspan.errors import ShapeError
from loraspan.ops import dense
from matrices import normal
from oracles import F32, F64, UNIT_ROUNDOFF, to_numpy

U = UNIT_ROUNDOFF[F64]
SIZES = (1, 2, 3, 7, 8, 9, 16, 17, 24, 25, 33, 64, 100)


def spread(n, count, decades, seed):
    """Symmetric matrices with eigenvalues of both signs over so many decades."""
    q, _ = torch.linalg.qr(normal(seed, count, n, n))
    signs = torch.where(torch.arange(n) % 3 == 1, -1.0, 1.0)
    values = signs * torch.logspace(0, -decades, n, dtype=F64)
    a = (q * values) @ q.mT
    return (a + a.mT) / 2


SYMMETRIC = {
    "spread": lambda n: spread(n, 3, 3, 1),
    "graded": lambda n: spread(n, 2, 30, 2),
    "repeated": lambda n: 3.0 * torch.eye(n, dtype=F64).expand(2, n, n),
    "rank one": lambda n: torch.ones(2, n, n, dtype=F64),
    "zero": lambda n: torch.zeros(2, n, n, dtype=F64),
    "huge": lambda n: 1e300 * spread(n, 2, 2, 3) / n,
    "tiny": lambda n: 1e-300 * spread(n, 2, 2, 4),
    "tridiagonal": lambda n: torch.diag(torch.ones(n - 1, dtype=F64), 1) + torch.diag(torch.ones(n - 1, dtype=F64), -1),
    "graded diagonal": lambda n: torch.diag(torch.logspace(-40, 0, n, dtype=F64)),
}


def assert_orthonormal(v, units):
    """``||V^T V - I||`` of float64 columns, in units of roundoff times their count."""
    n = v.shape[-1]
    off = np.abs(np.swapaxes(v, -1, -2) @ v - np.eye(n)).max(initial=0)
    assert off <= units * max(n, 8) * U, off / (max(n, 8) * U)


@pytest.mark.parametrize("kind", SYMMETRIC)
@pytest.mark.parametrize("n", SIZES)
def test_eigenvectors(backend, n, kind):
    a = SYMMETRIC[kind](n)

    values, vectors = (to_numpy(t) for t in dense.eigh(a, backend=backend))

    wide = to_numpy(a)
    size = np.abs(np.linalg.eigvalsh(wide)).max() or 1
    # the bound of the docstring, for each of the two sides of the comparison
    allowed = 16 * max(n, 8) * U
    assert (np.abs(values - np.linalg.eigvalsh(wide)[..., ::-1]) <= allowed * size).all()
    assert (np.diff(values) <= 0).all()
    assert_orthonormal(vectors, 8)
    assert (np.abs(wide / size @ vectors - vectors * (values / size)[..., None, :]) <= allowed).all()


def matrix(kind, m, n):
    x = normal(5, 2, m, n)
    if kind == "graded":
        return x * torch.logspace(0, -30, n, dtype=F64)
    if kind == "rank-deficient":
        return x[..., : n // 2 + 1] @ normal(6, n // 2 + 1, n)
    if kind == "equal columns":
        return x[..., :1].expand(2, m, n)
    return x * {"zero": 0.0, "huge": 1e300 / (m * n), "tiny": 1e-300, "plain": 1.0}[kind]


@pytest.mark.parametrize("kind", ["plain", "graded", "rank-deficient", "equal columns", "zero", "huge", "tiny"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 1), (5, 5), (17, 16), (24, 24), (33, 25), (100, 40), (64, 64)])
def test_singular_vectors(backend, m, n, kind):
    a = matrix(kind, m, n)

    u, s, v = (to_numpy(t) for t in dense.svd(a, backend=backend))

    wide = to_numpy(a)
    expected = np.linalg.svd(wide, compute_uv=False)
    size = expected.max() or 1
    allowed = 16 * max(m, 8) * U
    assert (np.abs(s - expected) <= allowed * size).all()
    assert (np.diff(s) <= 0).all()
    assert (s >= 0).all()
    assert_orthonormal(v, 8)
    present = (s > 16 * m * U * size).all(0)
    assert_orthonormal(u[..., present], 8 * m / present.sum() if present.any() else 8)
    assert (np.abs(u * (s / size)[..., None, :] @ np.swapaxes(v, -1, -2) - wide / size) <= allowed).all()


@pytest.mark.parametrize("n", [1, 5, 16, 30])
def test_small_singular_values_keep_their_digits(compiled, n):
    """Columns of very different sizes: one-sided Jacobi finds each value to its own accuracy, LAPACK does not."""
    q, _ = torch.linalg.qr(normal(7, 40, n))
    scales = torch.logspace(0, -100, n, dtype=F64)

    s = dense.svd(q * scales, backend=compiled).s if n <= 24 else dense.svd((q * scales)[:, :24], backend=compiled).s

    want = scales[: len(s)]
    assert ((s - want).abs() <= 40 * 8 * U * want).all()


@pytest.mark.parametrize("n", SIZES)
def test_root_of_a_gram(backend, n):
    b = normal(8, 2, n + 5, n) * torch.logspace(0, -100, n, dtype=F64)
    gram = b.mT @ b

    r, inverse = dense.gram_root(gram, backend=backend)

    scale = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    scaled = (r.mT @ r - gram) / scale.unsqueeze(-1) / scale.unsqueeze(-2)
    assert scaled.abs().max() <= 4 * (n + 8) * U
    assert_orthonormal(to_numpy(b @ inverse), 1e4)  # the scaled matrix has a condition number below 1e3


@pytest.mark.parametrize("n", [2, 9, 33])
def test_root_of_a_deficient_gram(backend, n):
    b = normal(9, 2, n + 5, n)
    b[..., n // 2] = 0
    b[..., -1] = b[..., 0]
    gram = b.mT @ b

    r, inverse = dense.gram_root(gram, backend=backend)

    assert ((r.mT @ r - gram).abs() <= 16 * n * U * gram.abs().amax()).all()
    q = b @ inverse
    # orthonormal columns, and zero ones for what is absent
    assert (q.mT @ q - torch.diag_embed((q.abs().amax(-2) > 0.01).to(F64))).abs().max() <= 1e6 * n * U
    assert (q @ (q.mT @ b) - b).abs().max() <= 1e6 * n * U


def test_a_wide_matrix_is_its_transpose(backend):
    a = normal(11, 2, 5, 9)
    u, s, v = dense.svd(a, backend=backend)
    assert [tuple(t.shape) for t in (u, s, v)] == [(2, 5, 5), (2, 5), (2, 9, 5)]
    for ours, theirs in zip((v, s, u), dense.svd(a.mT, backend=backend), strict=True):
        assert torch.equal(ours, theirs)


@given(n=st.integers(1, 40), count=st.integers(1, 5), threads=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_a_batch_is_its_members(on_threads, n, count, threads, seed):
    a = normal(seed, count, n, n)
    gram = a.mT @ a
    calls = {dense.eigh: gram, dense.svd: a, dense.gram_root: gram}
    for call, x in calls.items():
        together = on_threads(threads, lambda call=call, x=x: call(x))
        for i in range(count):
            alone = call(x[i].clone())
            assert all(torch.equal(t[i], one) for t, one in zip(together, alone, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_member(compiled, value):
    a = torch.eye(30, dtype=F64).repeat(3, 1, 1)
    a[1, 3, 2] = value

    for call in (dense.eigh, dense.svd, dense.gram_root):
        for out in call(a, backend=compiled):
            assert out[1].isnan().all()
            assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("call", [dense.eigh, dense.svd, dense.gram_root])
def test_sizes_of_nothing_and_strides(backend, call):
    assert all(t.shape[:2] == (0, 3) for t in call(torch.zeros(0, 3, 4, 4, dtype=F64), backend=backend))
    assert all(t.shape[0] == 2 and t.shape[-1] == 0 for t in call(torch.zeros(2, 0, 0, dtype=F64), backend=backend))
    square = normal(10, 3, 7, 7)
    gram = (square @ square.mT).mT
    for strided, plain in zip(call(gram[::2], backend=backend), call(gram[::2].clone(), backend=backend), strict=True):
        assert torch.equal(strided, plain)


def test_refusals():
    with pytest.raises(ShapeError, match=r"eigh: a is \[..., n, n\] of float64; got \[2, 3\] of torch.float64"):
        dense.eigh(torch.zeros(2, 3, dtype=F64))
    with pytest.raises(ShapeError, match=r"svd: a is \[..., m, n\] of float64; got \[3\]"):
        dense.svd(torch.zeros(3, dtype=F64))
    with pytest.raises(ShapeError, match=r"gram_root: gram is .* of torch.float32"):
        dense.gram_root(torch.zeros(2, 2, dtype=F32))


@pytest.mark.parametrize(("call", "kernel"), [(dense.eigh, "eigh"), (dense.svd, "svd")])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_an_iteration_that_does_not_end_goes_to_lapack(monkeypatch, call, kernel, batch):
    a = normal(12, *batch, 6, 6)
    a = a @ a.mT
    honest = getattr(dense._core, kernel)

    # where each result begins, and how many numbers of it a member has
    places = {"eigh": ((1, 6), (2, 36)), "svd": ((2, 36), (3, 6), (4, 36))}[kernel]

    def fails_on_the_last(address, count, *rest):
        honest(address, count, *rest)
        for place, width in places:
            numbers = (ctypes.c_double * (width * count)).from_address(rest[place])
            numbers[-width:] = [float("nan")] * width

    expected = call(a)
    monkeypatch.setattr(dense._core, kernel, fails_on_the_last)

    for got, want in zip(call(a), expected, strict=True):
        assert torch.allclose(got.abs(), want.abs(), atol=1e-10)


@pytest.mark.parametrize("call", [dense.eigh, dense.svd, dense.gram_root])
def test_a_named_backend_hands_large_matrices_to_lapack(backend, call):
    a = normal(13, 520, 513)
    a = a if call is dense.svd else a.T @ a
    for got, want in zip(call(a, backend=backend), call(a, backend="reference"), strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)
