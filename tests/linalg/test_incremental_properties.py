"""What holds for every stream: blocks, pauses, copies, threads and merges change nothing that they need not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import streams
from loraspan.linalg import IncrementalSVD
from loraspan.linalg.incremental_rows import capacity
from loraspan.ops import Piece, reconstruct, reconstruct_many
from oracles import same_bits as same_matrix_bits
from oracles import to_numpy

seeds = st.integers(0, 2**32 - 1)
ranks = st.integers(1, 6)
buffers = st.integers(0, 5)
counts = st.integers(1, 400)
columns = st.integers(1, 40)
forgets = st.sampled_from([1.0, 0.99, 0.7])
dtypes = st.sampled_from([torch.float32, torch.float64])
# a float64 Gram of some hundred rows says an energy to 1e-15 of all, and compressions add up
NOISE = 1e-13


def same_bits(a, b):
    return same_matrix_bits(torch.atleast_1d(a), torch.atleast_1d(b))


def draw(seed, rows, columns, dtype=torch.float64):
    """Rows about a mean of their own, of a decaying spectrum."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * np.arange(1, columns + 1) ** -0.8 + rng.standard_normal(columns)
    return torch.from_numpy(x).to(dtype)


def follow(rows, block, rank, **options):
    svd = IncrementalSVD(rank, **options)
    for piece in rows.split(block):
        svd.update(piece)
    return svd


def assert_same(one, two):
    left, right = one.state_dict(), two.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert same_bits(value, right[name]), name


def assert_bounded(svd, x):
    """``x``: all rows, weighted and centred."""
    energy = (x**2).sum()
    outside, least = streams.energy_outside(x, to_numpy(svd.basis)), streams.least_outside(x, svd.rank)
    noise = NOISE * energy
    assert outside <= svd.discarded + noise
    assert svd.discarded <= energy + noise
    assert float(svd.s.square().sum()) + svd.discarded == pytest.approx(energy, rel=1e-12)
    # what was cut is all that the basis may miss
    held = svd.state_dict()["discarded"].item()
    assert outside <= least + max(held, svd.discarded - least) + noise
    s = np.linalg.svd(x, compute_uv=False)[: len(svd.s)]
    assert (to_numpy(svd.s) <= s + 1e-9 * np.sqrt(energy)).all()


@given(rows=counts, d=columns, rank=ranks, buffer=buffers, center=st.booleans(), forget=forgets, seed=seeds)
def test_bound_and_energy_hold_for_weighted_rows(rows, d, rank, buffer, center, forget, seed):
    x = draw(seed, rows, d)
    svd = follow(x, 1 + seed % 90, rank, buffer=buffer, center=center, forget=forget)
    weight = forget ** (2 * np.arange(rows))
    assert svd.weight == pytest.approx(weight.sum(), rel=1e-12)
    assert_bounded(svd, streams.weighted(to_numpy(x), forget, center))
    if center:
        exact = streams.mean(to_numpy(x), forget)
        assert np.abs(to_numpy(svd.mean) - exact).max() <= 1e-13 * (1 + np.abs(to_numpy(x)).max())


@given(rows=counts, d=st.integers(1, 8), center=st.booleans(), forget=forgets, seed=seeds)
def test_forgetting_is_weighting(rows, d, center, forget, seed):
    """Nothing is cut here, so it is so to the last digits."""
    x = draw(seed, rows, d)
    svd = follow(x, 1 + seed % 90, 8, center=center, forget=forget)
    s = np.linalg.svd(streams.weighted(to_numpy(x), forget, center), compute_uv=False)
    assert np.abs(to_numpy(svd.s) - s[: len(svd.s)]).max(initial=0) <= 1e-12 * s[0]
    assert (s[len(svd.s) :] <= 1e-12 * s[0]).all()


@given(rows=counts, d=columns, rank=ranks, center=st.booleans(), dtype=dtypes, seed=seeds)
def test_blocks_and_reading_change_no_bit(rows, d, rank, center, dtype, seed):
    forget = 0.99
    x = draw(seed, rows, d, dtype)
    whole = follow(x, rows, rank, center=center, forget=forget)
    pieces = IncrementalSVD(rank, center=center, forget=forget)
    cuts = np.sort(np.random.default_rng(seed).integers(0, rows + 1, size=5))
    for piece in x.tensor_split(cuts.tolist()):
        pieces.update(piece)
        if pieces.seen:
            _ = pieces.basis, pieces.transform(x[:1])
    assert pieces.seen == whole.seen == rows
    assert_same(pieces, whole)
    assert same_bits(pieces.basis, whole.basis)


@given(rows=counts, at=st.integers(0, 400), d=columns, rank=ranks, center=st.booleans(), dtype=dtypes, seed=seeds)
def test_a_state_goes_on_with_the_same_bits(rows, at, d, rank, center, dtype, seed):
    x = draw(seed, rows, d, dtype)
    options = {"center": center, "forget": 0.98, "buffer": 3}
    svd = follow(x[:at], 50, rank, **options) if at else IncrementalSVD(rank, **options)
    again = IncrementalSVD(rank, **options)
    again.load_state_dict(svd.state_dict())
    assert_same(svd, again)
    for state in (svd, again):
        state.update(x[at:])
    assert_same(svd, again)
    assert again.seen == rows
    if rows:
        assert same_bits(svd.basis, again.basis)
        assert svd.discarded == again.discarded


def test_a_state_goes_through_a_file(tmp_path):
    x = draw(1, 300, 20, torch.float32)
    for svd in (follow(x, 7, 4, center=True, forget=0.9), IncrementalSVD(4, center=True, forget=0.9)):
        save_file(svd.state_dict(), tmp_path / "state.safetensors")
        again = IncrementalSVD(4, center=True, forget=0.9)
        again.load_state_dict(load_file(tmp_path / "state.safetensors"))
        assert_same(svd, again)


def test_a_state_is_a_copy():
    x = draw(2, 300, 20)
    svd = follow(x, 50, 4, center=True)
    state = svd.state_dict()
    before = copy.deepcopy(state)
    twin = IncrementalSVD(4, center=True)
    twin.load_state_dict(state)
    svd.update(x)
    twin.update(-x)
    assert all(same_bits(state[name], before[name]) for name in before)


@given(sizes=st.tuples(counts, counts), d=columns, rank=ranks, center=st.booleans(), forget=forgets, seed=seeds)
def test_merging_is_updating_within_the_bound(sizes, d, rank, center, forget, seed):
    x = draw(seed, sum(sizes), d)
    older, newer = x.split(sizes)
    options = {"center": center, "forget": forget}
    one, two = follow(older, 64, rank, **options), follow(newer + 0.5, 64, rank, **options)
    before = copy.deepcopy(two)
    one.merge(two)
    assert_same(two, before)
    everything = np.concatenate([to_numpy(older), to_numpy(newer) + 0.5])
    assert one.seen == sum(sizes)
    assert one.weight == pytest.approx((forget ** (2 * np.arange(sum(sizes)))).sum(), rel=1e-12)
    assert_bounded(one, streams.weighted(everything, forget, center))
    if center:
        exact = streams.mean(everything, forget)
        assert np.abs(to_numpy(one.mean) - exact).max() <= 1e-13 * (1 + np.abs(everything).max())
    # and it goes on from there
    one.update(x)
    assert_bounded(one, streams.weighted(np.concatenate([everything, to_numpy(x)]), forget, center))


@given(sizes=st.tuples(counts, counts, counts), d=st.integers(1, 20), center=st.booleans(), forget=forgets, seed=seeds)
def test_merging_is_associative_within_the_bound(sizes, d, center, forget, seed):
    x = draw(seed, sum(sizes), d)
    exact = streams.weighted(to_numpy(x), forget, center)

    def parts():
        return [follow(piece, 64, 5, center=center, forget=forget) for piece in x.split(sizes)]

    left, b, c = parts()
    left.merge(b)
    left.merge(c)
    right, b, c = parts()
    b.merge(c)
    right.merge(b)
    for svd in (left, right):
        assert_bounded(svd, exact)
    if d <= 13:
        # all 13 directions are held, so nothing is cut
        assert np.abs(to_numpy(left.s) - to_numpy(right.s)).max(initial=0) <= 1e-12 * np.linalg.norm(exact)


def test_merging_with_nothing_and_with_itself():
    x = draw(3, 200, 12)
    svd, empty = follow(x, 64, 3, center=True), IncrementalSVD(3, center=True)
    before = copy.deepcopy(svd)
    svd.merge(empty)
    assert_same(svd, before)
    empty.merge(svd)
    assert_same(svd, empty)
    empty.update(x)
    assert_same(svd, before)
    svd.merge(svd)
    assert svd.seen == 400
    assert_bounded(svd, streams.weighted(np.concatenate([to_numpy(x)] * 2), center=True))


@given(at=st.integers(1, 300), d=columns, rank=ranks, dtype=dtypes, seed=seeds)
def test_rotation_says_what_old_loadings_become(at, d, rank, dtype, seed):
    x = draw(seed, 300, d, dtype)
    svd = follow(x[:at], 64, rank)
    old = svd.basis
    same = svd.rotation(old)
    u = torch.finfo(dtype).eps
    assert np.abs(to_numpy(same.matrix) - np.eye(old.shape[1])).max(initial=0) <= 8 * rank * u
    assert same.error <= 8 * rank * u
    svd.update(x.flip(1))
    matrix, error = svd.rotation(old)
    v, w = to_numpy(svd.basis), to_numpy(old)
    # the products are in float64, of what is stored
    assert np.abs(to_numpy(matrix) - v.T @ w).max(initial=0) <= 1e-13
    exact = np.linalg.norm(w - v @ (v.T @ w), 2) if w.shape[1] else 0.0
    # a Gram says the norm to the root of 1e-16 of the largest, which it is
    assert error == pytest.approx(exact, rel=1e-9, abs=1e-15)
    loading = np.random.default_rng(seed).standard_normal(w.shape[1])
    lost = (loading**2).sum() - ((to_numpy(matrix) @ loading) ** 2).sum()
    assert lost <= (error**2 + 32 * rank * u) * (loading**2).sum()


@given(n=st.integers(0, 150), d=columns, rank=ranks, center=st.booleans(), dtype=dtypes, seed=seeds)
def test_transform_gives_loadings(n, d, rank, center, dtype, seed):
    x = draw(seed, 150, d, dtype)
    svd = follow(x, 64, rank, center=center)
    loadings = svd.transform(x[:n])
    assert loadings.dtype == dtype
    mean = to_numpy(svd.mean) if center else 0.0
    v = to_numpy(svd.basis)
    exact = (to_numpy(x[:n]) - mean) @ v
    assert loadings.shape == exact.shape
    size = (
        np.abs(to_numpy(x[:n])) @ np.abs(v) + np.abs(mean) @ np.abs(v)
        if center
        else np.abs(to_numpy(x[:n])) @ np.abs(v)
    )
    assert (np.abs(to_numpy(loadings) - exact) <= torch.finfo(dtype).eps * np.abs(exact) + 1e-14 * (1 + size)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_change_no_bit(dtype, on_threads):
    x = draw(4, 700, 5000, dtype)

    def run():
        svd, other = (follow(x, 100, 20, center=True, forget=0.999) for _ in range(2))
        svd.merge(other)
        results = {"basis": svd.basis, "loadings": svd.transform(x[:5]), "rotation": svd.rotation(x[:3].T).matrix}
        return svd.state_dict() | results

    one, two = on_threads(1, run), on_threads(2, run)
    for name, value in one.items():
        assert same_bits(value, two[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 97, 5000])
def test_rows_may_be_combined_in_place(dtype, columns, backend):
    """Compression relies on this promise of the operator."""
    rows, weights = draw(5, 193, columns, dtype), draw(6, 65, 193, dtype)
    apart = reconstruct(rows.T, weights.T, backend=backend)
    reconstruct_many([Piece(rows.T, weights.T, rows[:65].T)], backend=backend)
    assert same_bits(rows[:65].T, apart)


def test_memory_is_bounded():
    svd = follow(draw(7, 1000, 30), 300, 4, buffer=2)
    rows = [svd.state_dict()["rows"].shape[0]]
    for row in draw(8, 200, 30).split(1):
        svd.update(row)
        rows.append(svd.state_dict()["rows"].shape[0])
    assert max(rows) < capacity(6)
    assert min(rows) == 6
