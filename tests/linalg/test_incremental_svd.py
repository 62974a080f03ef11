"""The singular vectors of a stream are nearly the best ones, stay orthonormal, and err by no more than is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import streams
from loraspan.linalg import IncrementalSVD
from loraspan.linalg.incremental_rows import capacity
from oracles import UNIT_ROUNDOFF, same_bits, to_numpy

BLOCKS = (1, 8, 64, 256)
RANK = 32


def follow(x, rank, block=64, **options):
    svd = IncrementalSVD(rank, **options)
    for rows in torch.as_tensor(x).split(block):
        svd.update(rows)
    return svd


def rounding(svd, x):
    """What compressing may add to the root of the energy outside: Higham, section 3.5.

    Each time, sums of R products in float32 are off by at most (R + 2) u |W| |X|, of norm at most sqrt(m) |X|_F.
    """
    kept = svd.rank + svd.buffer
    times = len(x) / (capacity(kept) - 1 - kept) + 1
    return times * (capacity(kept) + 2) * np.sqrt(kept) * UNIT_ROUNDOFF[svd.basis.dtype] * np.linalg.norm(x)


def assert_orthonormal(basis):
    """STYLE of an SVD here: |V^T V - I|_2 <= 8 k u."""
    v = to_numpy(basis)
    k = v.shape[1]
    assert np.linalg.norm(v.T @ v - np.eye(k), 2) <= 8 * k * UNIT_ROUNDOFF[basis.dtype]


def assert_nearly_best(svd, x, excess):
    outside, least = streams.energy_outside(x, to_numpy(svd.basis)), streams.least_outside(x, svd.rank)
    slack = rounding(svd, x)
    assert np.sqrt(outside) <= np.sqrt(svd.discarded) + slack
    assert np.sqrt(outside) <= (1 + excess) * np.sqrt(least) + slack
    # nothing is claimed that is not there: the energies add up
    assert float(svd.s.square().sum()) + svd.discarded == pytest.approx((x**2).sum(), rel=2 * slack / np.linalg.norm(x))


@pytest.fixture(scope="module")
def shared():
    return streams.shared().astype(np.float32)


@pytest.mark.parametrize("center", [False, True], ids=["raw", "centred"])
def test_nearly_the_best_basis_for_blocks_of_any_size(shared, center):
    x = streams.weighted(shared.astype(np.float64), center=center)
    first = follow(shared, RANK, BLOCKS[0], center=center)
    outside, least = streams.energy_outside(x, to_numpy(first.basis)), streams.least_outside(x, RANK)
    assert outside <= (1 + 1e-3) * least
    assert outside <= first.discarded * (1 + 1e-6)
    assert_orthonormal(first.basis)
    for block in BLOCKS[1:]:
        again = follow(shared, RANK, block, center=center)
        assert same_bits(first.basis, again.basis)
        assert same_bits(first.s, again.s)
        assert first.discarded == again.discarded


@pytest.mark.parametrize("center", [False, True], ids=["raw", "centred"])
@pytest.mark.parametrize("name", streams.ADVERSARIES)
def test_nearly_the_best_basis_of_an_adversary(name, center):
    rows = streams.ADVERSARIES[name](streams.shared(rows=400, columns=600, seed=2)).astype(np.float32)
    svd = follow(rows, RANK, 7, center=center)
    assert_nearly_best(svd, streams.weighted(rows.astype(np.float64), center=center), excess=1e-3)
    assert_orthonormal(svd.basis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_holds_on_a_flat_spectrum(dtype):
    """Where every cut takes much away, the bound is all there is."""
    rows = torch.from_numpy(np.random.default_rng(3).standard_normal((900, 200))).to(dtype)
    x = to_numpy(rows)
    svd = follow(rows, 4, buffer=4)
    assert svd.discarded < 0.999 * (x**2).sum()
    assert_nearly_best(svd, x, excess=0.1)


@pytest.mark.parametrize(("columns", "rank"), [(60, 8), (100, 32)])
def test_orthonormal_after_ten_thousand_single_rows(columns, rank):
    rng = np.random.default_rng(4)
    rows = torch.from_numpy(rng.standard_normal((10_000, columns)) * np.arange(1, columns + 1) ** -0.5).float()
    svd = follow(rows, rank, 1)
    assert svd.seen == 10_000
    assert_orthonormal(svd.basis)
    v = to_numpy(svd.basis)
    assert np.abs(v.T @ v - np.eye(rank)).max() <= 1e-5
    # and neither have the held rows grown or shrunk
    assert float(svd.s.square().sum()) + svd.discarded == pytest.approx((to_numpy(rows) ** 2).sum(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("center", [False, True], ids=["raw", "centred"])
@pytest.mark.parametrize(
    ("rows", "columns", "rank"),
    [
        pytest.param(1, 1, 1, id="scalar"),
        pytest.param(3, 40, 8, id="fewer-rows-than-rank"),
        pytest.param(500, 6, 6, id="full-rank"),
        pytest.param(500, 5, 9, id="rank-past-the-columns"),
        pytest.param(70, 90, 20, id="one-memory"),
    ],
)
def test_is_numpys_svd_where_nothing_is_cut(rows, columns, rank, dtype, center):
    x = torch.from_numpy(np.random.default_rng(5).standard_normal((rows, columns)) + 0.3).to(dtype)
    svd = follow(x, rank, 13, center=center)
    exact = streams.weighted(to_numpy(x), center=center)
    _, s, vh = np.linalg.svd(exact, full_matrices=False)
    there = min(rank, int((s > 1e-12 * max(s[0], 1e-300)).sum()))
    # as in every decomposition here, singular values are good to 1e-6 and 1e-12 of the largest
    near = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype] * s[0]
    assert svd.s.shape == (there,)
    assert np.abs(to_numpy(svd.s) - s[:there]).max(initial=0) <= near
    assert_orthonormal(svd.basis)
    assert svd.discarded == pytest.approx((s[there:] ** 2).sum(), rel=1e-5, abs=near**2 + 1e-13 * s[0] ** 2)
    if there == len(s) or s[there - 1] - s[there] > 0.01 * s[0]:
        projector = vh[:there].T @ vh[:there]
        v = to_numpy(svd.basis)
        assert np.abs(v @ v.T - projector).max(initial=0) <= 100 * near / s[0] if s[0] else True


def test_small_singular_values_are_resolved_below_the_floor_of_a_gram():
    """In float64, and through compressions: a Gram alone would lose what is below 1e-8."""
    rng = np.random.default_rng(6)
    s = np.geomspace(1, 1e-12, 13)
    x = streams.directions(rng, 400, 13).T * s @ streams.directions(rng, 30, 13)
    svd = follow(x, 13, 7)
    assert svd.seen > 3 * capacity(svd.rank + svd.buffer)
    assert np.abs(to_numpy(svd.s) - s).max() <= 1e-14
    # relative to themselves, as far as x itself says them
    assert np.abs(to_numpy(svd.s) / s - 1)[:10].max() <= 1e-4


def test_what_is_cut_below_the_floor_of_a_gram_is_counted():
    """The energy of the tail is 1e-12 of the first, of which a Gram would say less than three digits."""
    rng = np.random.default_rng(13)
    x = rng.standard_normal((600, 40)) * np.where(np.arange(40) < 4, 1.0, 1e-6)
    svd = follow(x, 4, buffer=2)
    outside = streams.energy_outside(x, to_numpy(svd.basis))
    assert outside <= svd.discarded * (1 + 1e-6)
    assert svd.discarded <= 1.1 * outside


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_orthonormal_over_all_decades_of_float64(offset):
    """Rows that fade leave vectors of all sizes, the last of them hardly more than rounding of the first."""
    rows = streams.shared(rows=300, columns=200, seed=2) + offset
    svd = follow(rows, 150, forget=0.9)
    assert svd.basis.shape == (200, 150)
    assert_orthonormal(svd.basis)
    assert_nearly_best(svd, streams.weighted(rows, 0.9), excess=1e-3)


def test_a_spectrum_of_seven_decades_behind_a_large_basis():
    """Many combinations, most of them small, of few directions: their root is not found by every iteration."""
    x = np.random.default_rng(14).standard_normal((900, 300)) * np.geomspace(1, 1e-7, 300)
    svd = follow(x, 100)
    s = np.linalg.svd(x, compute_uv=False)
    assert np.abs(to_numpy(svd.s) - s[:100]).max() <= 1e-12 * s[0]
    assert_nearly_best(svd, x, excess=1e-3)
    assert_orthonormal(svd.basis)


def test_signs_are_fixed():
    svd = follow(torch.from_numpy(np.random.default_rng(7).standard_normal((300, 40))), 6)
    assert (svd.basis.gather(0, svd.basis.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("center", [False, True], ids=["raw", "centred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rank_past_the_streams_gives_what_exists(dtype, center):
    rng = np.random.default_rng(8)
    rows = torch.from_numpy(rng.standard_normal((3000, 5)) @ rng.standard_normal((5, 70))).to(dtype)
    svd = follow(rows, 8, center=center)
    assert svd.basis.shape == (70, 5)
    assert svd.s.shape == (5,)
    assert svd.transform(rows[:3]).shape == (3, 5)
    assert svd.discarded <= 1e-10 * float(rows.double().square().sum())
    assert_orthonormal(svd.basis)


@pytest.mark.parametrize("center", [False, True], ids=["raw", "centred"])
def test_zero_rows_alone(center):
    svd = follow(torch.zeros(500, 9), 3, center=center)
    assert svd.basis.shape == (9, 0)
    assert (svd.discarded, svd.s.tolist(), svd.seen) == (0.0, [], 500)
    svd.update(torch.eye(9)[:1])
    assert svd.basis.shape == (9, 1)


@pytest.mark.parametrize("block", [1, 64, 1000])
def test_a_mean_far_larger_than_the_spread_does_not_cancel(block):
    rng = np.random.default_rng(9)
    spread = rng.standard_normal((1000, 30)) * np.linspace(3, 0.3, 30)
    rows = torch.from_numpy(spread + 1e4 * rng.standard_normal(30)).float()
    exact = to_numpy(rows)
    svd = follow(rows, 30, block, center=True)
    s = np.linalg.svd(streams.weighted(exact, center=True), compute_uv=False)
    # what is centred is exact in float32, so this is as good as if there were no mean
    assert np.abs(to_numpy(svd.s) - s).max() <= 1e-6 * s[0]
    # float32 sums of up to 193 differences of the size of the spread
    near = 2.0**-24 * 195 * np.abs(exact - exact.mean(axis=0)).max()
    assert np.abs(to_numpy(svd.mean) - exact.mean(axis=0)).max() <= near


def test_an_outlier_is_forgotten():
    """The first row is what the first block is shifted by."""
    rng = np.random.default_rng(10)
    rows = torch.from_numpy(rng.standard_normal((2000, 12)) * np.linspace(2, 1, 12)).float()
    rows[0] = 1e6
    svd = follow(rows, 4, buffer=20, center=True, forget=0.9)
    x = streams.weighted(to_numpy(rows), 0.9, center=True)
    assert np.abs(to_numpy(svd.s) - np.linalg.svd(x, compute_uv=False)[:4]).max() <= 1e-5 * to_numpy(svd.s)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_any_dtype_are_those_that_they_round_to(dtype):
    rows = torch.from_numpy(np.random.default_rng(11).standard_normal((300, 33))).to(dtype)
    svd, same = IncrementalSVD(4, center=True), IncrementalSVD(4, center=True)
    for state, kind in ((svd, dtype), (same, torch.float32)):
        state.update(rows[:1].float())
        state.update(rows[1:].to(kind))
    # float64 is centred before it is rounded
    near = 0 if dtype != torch.float64 else 1e-6
    assert svd.basis.dtype == torch.float32
    assert (svd.s - same.s).abs().max() <= near * same.s[0]
    assert near or same_bits(svd.basis, same.basis)


def test_first_rows_decide_the_precision():
    rows = torch.eye(3, dtype=torch.float64)
    svd = follow(rows, 2)
    assert svd.basis.dtype == torch.float64
    svd.update(rows.half())
    assert svd.basis.dtype == torch.float64


def test_strides_do_not_matter():
    rows = torch.from_numpy(np.random.default_rng(12).standard_normal((300, 66))).float()
    strided = torch.full((601, 132), float("nan"))[1::2, ::2]
    strided.copy_(rows)
    assert same_bits(follow(rows, 5).basis, follow(strided, 5).basis)
    assert same_bits(follow(rows, 5).basis, follow(rows.T.contiguous().T, 5).basis)


def test_a_buffer_is_what_makes_it_accurate(shared):
    """The figures of the class docstring."""
    x = shared.astype(np.float64)
    least = streams.least_outside(x, RANK)
    excess = {}
    for buffer in (0, RANK):
        outside = streams.energy_outside(x, to_numpy(follow(shared, RANK, buffer=buffer).basis))
        excess[buffer] = np.sqrt(outside / least) - 1
    assert excess[32] <= 1e-4
    assert 1e-4 < excess[0] <= 2e-2
