"""factored_svd: the SVD of a product to the last digits, on any gauge, dtype, size and storage, without the product."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import loraspan.linalg.factors
from loraspan.errors import NotFiniteError
from loraspan.linalg import SVD, factored_svd
from matrices import LAYOUTS, normal, stored
from oracles import BF16, DTYPES, F16, F32, F64, UNIT_ROUNDOFF, to_numpy
from triplets import SPECTRA, exact, gauge, judge, orthonormal, same_triplets

SCALE = 0.3
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 40)
ranks = st.integers(1, 12)
# n, r, d: single, r below, at and past the sides, past a tile, prime
SIZES = [(1, 1, 1), (5, 3, 7), (16, 16, 16), (65, 17, 129), (4, 9, 30), (30, 9, 4), (3, 8, 2), (1, 6, 50), (47, 2, 1)]


def factors(seed, n, r, d, dtype=F64, other=None):
    return normal(seed, n, r, dtype=dtype), normal(seed + 1, r, d, dtype=other or dtype)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtypes", [*((x, x) for x in DTYPES), (BF16, F32), (F64, F16)], ids=str)
def test_is_the_svd_of_the_product(backend, size, dtypes):
    b, a = factors(7, *size, *dtypes)
    judge(factored_svd(b, a, scale=SCALE, backend=backend), [b], [a], [SCALE])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
def test_every_spectrum(spectrum, dtype):
    rng = np.random.default_rng(3)
    s, (g, inverse) = spectrum(12), gauge(rng, 12, 30.0)
    b = torch.from_numpy((orthonormal(rng, 90, 12) * s) @ g).to(dtype)
    a = torch.from_numpy(inverse @ orthonormal(rng, 70, 12).T).to(dtype)
    judge(factored_svd(b, a, scale=-SCALE), [b], [a], [-SCALE])


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8, 1e12])
def test_any_gauge(dtype, condition):
    """``b`` and ``a`` grow as ill-conditioned as the gauge; the product does not."""
    rng = np.random.default_rng(5)
    g, inverse = gauge(rng, 16, condition)
    b = torch.from_numpy(rng.standard_normal((300, 16)) @ g).to(dtype)
    a = torch.from_numpy(inverse @ rng.standard_normal((16, 200))).to(dtype)
    found = factored_svd(b, a)
    judge(found, [b], [a], [1.0])
    if condition <= 1e4 and dtype == F32:
        _, product = exact([b], [a], [1.0])
        truth = np.linalg.svd(product, compute_uv=False)
        u, s, vh = (to_numpy(x) for x in found[:3])
        assert np.abs(s - truth[:16]).max() <= 1e-6 * truth[0]
        assert np.linalg.norm(product - (u * s) @ vh, 2) <= 1e-6 * truth[0]


@given(n=sizes, r=ranks, d=sizes, seed=seeds, power=st.floats(0, 4))
def test_the_gauge_does_not_matter(n, r, d, seed, power):
    b, a = factors(seed, n, r, d)
    g, inverse = (torch.from_numpy(x) for x in gauge(np.random.default_rng(seed), r, 10**power))
    plain, changed = factored_svd(b, a), factored_svd(b @ g, inverse @ a)
    assert plain.rank == changed.rank
    # the gauge is applied, and the product summed, with errors of r u on entries that may cancel, over n d of them
    slack = 8 * r * UNIT_ROUNDOFF[F64] * 10**power * b.norm() * a.norm() * (r + 1)
    assert (plain.s - changed.s).abs().max() <= slack
    assert ((plain.u * plain.s) @ plain.vh - (changed.u * changed.s) @ changed.vh).norm() <= (1 + r) * slack


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_rank_that_there_is(dtype):
    b, a = factors(11, 50, 8, 40, dtype)
    b[:, 5] = b[:, 2]
    b[:, 6] = 0
    a[7] = -a[1]
    b[:, 7] = b[:, 1]
    found = factored_svd(b, a)
    # 1 and 7 cancel, 2 and 5 are one, 6 is nothing
    assert found.rank == found.s.shape[0] == 4
    judge(found, [b], [a], [1.0])


@pytest.mark.parametrize("turned", [False, True])
def test_a_repeated_column_costs_no_digits(turned):
    """What depends on others up to rounding alone must not be resolved, nor be dropped at the cost of the others."""
    b, a = factors(13, 300, 16, 200)
    b[:, 5] = b[:, 3]
    b[:, 9] = b[:, 3] * (1 + 1e-9) + 1e-12 * b[:, 1]
    if turned:
        b, a = a.T.contiguous(), b.T.contiguous()
    judge(factored_svd(b, a), [b], [a], [1.0])


@given(n=sizes, r=ranks, d=sizes, lost=st.integers(0, 12), seed=seeds, dtype=st.sampled_from([F32, F64]))
def test_rank_deficient_factors(n, r, d, lost, seed, dtype):
    b, a = factors(seed, n, r, d, dtype)
    rank = max(0, r - lost)
    # whole numbers, so that the columns repeat without rounding
    mix = torch.randint(-2, 3, (rank, r), generator=torch.Generator().manual_seed(seed)).to(dtype)
    b = (b[:, :rank] * 8).round() @ mix
    found = factored_svd(b, a)
    assert found.rank <= min(rank, n, d)
    judge(found, [b], [a], [1.0])


def test_nothing_has_rank_0():
    zero, a = torch.zeros(5, 3), torch.ones(3, 7)
    for found in (factored_svd(zero, a), *factored_svd([zero, zero], [a, a.half()]), factored_svd(zero[:, :0], a[:0])):
        assert [tuple(x.shape) for x in found] == [(5, 0), (0,), (0, 7), ()]
        assert (found.rank, float(found.discarded)) == (0, 0.0)
    assert factored_svd(torch.zeros(0, 3), a).u.shape == (0, 0)
    assert factored_svd(torch.ones(5, 3), a, scale=0.0).rank == 0


def test_a_batch_shares_its_width():
    b, a = factors(2, 20, 4, 30, F32)
    b, a = torch.stack([b, 0 * b, b]), torch.stack([a, a, a])
    b[2, :, 1] = b[2, :, 0]
    found = factored_svd(b, a)
    assert found.rank.tolist() == [4, 0, 3]
    assert [tuple(x.shape) for x in found] == [(3, 20, 4), (3, 4), (3, 4, 30), (3,)]
    for absent in (found.u[1], found.vh[1], found.u[2, :, 3], found.vh[2, 3]):
        assert not absent.any()
    assert factored_svd(b, a, 2).u.shape == (3, 20, 2)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("size", [(5, 3, 7), (2, 9, 7), (0, 3, 7)], ids=str)
def test_an_empty_batch(shape, size):
    n, r, d = size
    found = factored_svd(torch.ones(*shape, n, r, dtype=F16), torch.ones(*shape, r, d), rank=4)
    k = min(4, *size)
    assert [tuple(x.shape) for x in found] == [(*shape, n, k), (*shape, k), (*shape, k, d), shape]
    assert factored_svd([], []) == []


@given(n=sizes, r=ranks, d=sizes, seed=seeds, dtype=st.sampled_from(DTYPES))
def test_a_batch_is_its_members(n, r, d, seed, dtype):
    """In tensors and in lists, well and ill conditioned members side by side, to the last bit."""
    b, a = normal(seed, 2, 3, n, r, dtype=dtype), normal(seed + 1, 2, 3, r, d, dtype=dtype)
    b[0, 0] = 0
    b[0, 1, :, 0] *= 1e-3
    # this one takes one pass more than the others
    b[1, 1, :, -1] = b[1, 1, :, 0] * 0.7 + b[1, 1, :, 1 % r] * 0.3
    together = factored_svd(b, a, scale=SCALE)
    listed = factored_svd([*b.flatten(0, 1), b[0, 0]], [*a.flatten(0, 1), a[0, 0]], scale=SCALE)
    for i in range(6):
        alone = factored_svd(b[i // 3, i % 3], a[i // 3, i % 3], scale=SCALE)
        member = SVD(*(x[i // 3, i % 3] for x in together))
        k = alone.rank
        assert same_triplets(alone, SVD(member.u[:, :k], member.s[:k], member.vh[:k], member.discarded))
        assert not member.s[k:].any()
        assert same_triplets(alone, listed[i])
    assert same_triplets(listed[0], listed[6])


def test_members_take_as_many_passes_as_they_need():
    """Those that need none, two and three more than the first, in turns."""
    rng = np.random.default_rng(8)
    gauges = [gauge(rng, 12, condition) for condition in (1e4, 1e13, 1.0, 1e4, 1e13)]
    b = torch.from_numpy(np.stack([rng.standard_normal((90, 12)) @ g for g, _ in gauges]))
    a = torch.from_numpy(np.stack([inverse @ rng.standard_normal((12, 70)) for _, inverse in gauges]))
    for found, x, y in zip(factored_svd(list(b), list(a)), b, a, strict=True):
        judge(found, [x], [y], [1.0])
        assert same_triplets(found, factored_svd(x, y))


def test_a_ragged_list_is_its_members():
    pairs = [factors(i, *size, dtype) for i, (size, dtype) in enumerate(zip(SIZES, 3 * DTYPES, strict=False))]
    scales = [0.1 * (i + 1) for i in range(len(pairs))]
    listed = factored_svd(*map(list, zip(*pairs, strict=True)), scale=scales)
    for (b, a), scale, found in zip(pairs, scales, listed, strict=True):
        assert same_triplets(found, factored_svd(b, a, scale=scale))
        judge(found, [b], [a], [scale])


@pytest.mark.parametrize("dtype", [F16, F64], ids=str)
def test_any_number_of_threads(on_threads, compiled, dtype):
    b, a = normal(1, 5, 3001, 7, dtype=dtype), normal(2, 5, 7, 2003, dtype=dtype)
    one, three = (on_threads(count, lambda: factored_svd(b, a, backend=compiled)) for count in (1, 3))
    assert same_triplets(one, three)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_storage(layout):
    b, a = (stored(x, layout) for x in factors(4, 33, 6, 21, BF16))
    assert same_triplets(factored_svd(b, a), factored_svd(b.clone().contiguous(), a.clone().contiguous()))
    judge(factored_svd(b, a), [b], [a], [1.0])
    batch = b.expand(2, 3, -1, -1), a.expand(2, 3, -1, -1)
    assert torch.equal(factored_svd(*batch).s[1, 2], factored_svd(b.expand(1, -1, -1), a.expand(1, -1, -1)).s[0])


@given(n=sizes, r=ranks, d=sizes, seed=seeds, rank=st.integers(0, 14), dtype=st.sampled_from([F32, F64]))
def test_a_cut_is_the_leading_part(n, r, d, seed, rank, dtype):
    b, a = factors(seed, n, r, d, dtype)
    whole, cut = factored_svd(b, a), factored_svd(b, a, rank)
    k = min(rank, whole.rank)
    assert same_triplets(cut[:3], (whole.u[:, :k], whole.s[:k], whole.vh[:k]))
    judge(cut, [b], [a], [1.0], rank)


@given(n=sizes, r=ranks, d=sizes, seed=seeds, factor=st.floats(0.01, 100.0), dtype=st.sampled_from([F32, F64]))
def test_scale_and_transposition(n, r, d, seed, factor, dtype):
    """A factor changes ``s`` alone, its sign ``vh`` alone; the transposed product turns its vectors round."""
    b, a = factors(seed, n, r, d, dtype)
    found, scaled, turned = factored_svd(b, a), factored_svd(b, a, scale=-factor), factored_svd(a.mT, b.mT)
    slack = 8 * r * UNIT_ROUNDOFF[dtype] * float(found.s[0])
    assert (scaled.s - factor * found.s).abs().max() <= factor * slack
    assert (turned.s - found.s).abs().max() <= slack
    product = (found.u * found.s) @ found.vh
    assert torch.linalg.matrix_norm((scaled.u * scaled.s) @ scaled.vh + factor * product) <= 4 * r * factor * slack
    assert torch.linalg.matrix_norm(((turned.u * turned.s) @ turned.vh).mT - product) <= 4 * r * slack


@pytest.mark.parametrize(("dtype", "size"), [(F32, 1e-30), (F32, 1e30), (F64, 1e-140), (F64, 1e140)], ids=str)
def test_any_size_of_the_entries(dtype, size):
    b, a = factors(9, 30, 5, 20)
    b = (b * size).to(dtype)
    a = a.to(dtype)
    judge(factored_svd(b, a, scale=SCALE), [b], [a], [SCALE])


def test_what_the_dtype_cannot_hold():
    b, a = factors(9, 30, 5, 20, F32)
    with pytest.raises(NotFiniteError, match=r"factored_svd: singular values exceed torch.float32; pass float64"):
        factored_svd(b * 1e30, a * 1e30)
    tiny = factored_svd((b * 1e-30)[None], (a * 1e-30)[None])
    assert tiny.rank.tolist() == [0]
    assert not tiny.u.any()
    # what float32 cannot hold is counted all the same
    _, product = exact([b * 1e-30], [a * 1e-30], [1.0])
    assert abs(float(tiny.discarded) / (product**2).sum() - 1) <= 1e-12
    with pytest.raises(NotFiniteError, match="factored_svd: entries of b, a have squares beyond float64"):
        factored_svd(b.double() * 1e200, a)


def test_a_second_pass_only_where_it_is_needed(monkeypatch):
    formed = []
    honest = loraspan.linalg.factors.form

    def spy(rows, *rest):
        formed.append(len(rows))
        return honest(rows, *rest)

    monkeypatch.setattr(loraspan.linalg.factors, "form", spy)
    b, a = normal(1, 5, 60, 4, dtype=F32), normal(2, 5, 4, 50, dtype=F32)
    factored_svd(b, a)
    assert formed == [5, 5]
    formed.clear()
    b[3, :, 1] = b[3, :, 0] + 1e-5 * b[3, :, 1]
    factored_svd(b, a)
    # the third member's b once more, and its vectors apart from the others'
    assert sorted(formed) == [1, 1, 4, 5]


def test_is_not_tracked_by_autograd():
    b, a = (x.requires_grad_() for x in factors(1, 6, 2, 5, F32))
    assert not any(x.requires_grad for x in factored_svd(b, a))
