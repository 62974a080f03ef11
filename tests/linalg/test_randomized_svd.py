"""randomized_svd on known spectra, against NumPy's full decomposition and scikit-learn's randomized one."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.utils.extmath import randomized_svd as scikit_learns
from spectra import SPECTRA, assert_decomposes, expected_range_error, with_values

from loraspan.linalg import randomized_svd
from loraspan.linalg.svd_by_sketch import svd_by_sketch
from loraspan.linalg.svd_range import Goal, Job
from loraspan.ops import RowBlocks
from matrices import normal, stored
from oracles import BF16, F16, F32, F64, UNIT_ROUNDOFF, to_numpy

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
# sizes whose shorter side goes through its Gram, and sizes that are sketched
BY_GRAM = [(200, 120), (60, 900)]
BY_SKETCH = [(600, 700), (1100, 520)]


def sketched(x, rank, **options):
    """The sketch on a matrix of any size."""
    options = {"oversample": 8, "power_iterations": 1, "seed": 3, "backend": None} | options
    return svd_by_sketch(Job("x", RowBlocks([x]), Goal(rank)), **options)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("past", [-4, 0, 5])
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("m", "n"), BY_GRAM)
def test_short_sides_are_exact(m, n, kind, past, dtype):
    x = with_values(m, n, SPECTRA[kind](min(m, n), 10), 1).to(dtype)
    rank = 10 + past

    found = randomized_svd(x, rank)

    left, s, right, true = assert_decomposes(x, found, rank, 0.0, dtype)
    assert np.abs(s - true[: len(s)]).max() <= {F32: 1e-6, F64: 1e-12}[dtype] * true[0]
    error = np.linalg.norm(to_numpy(x) - (left * s) @ right)
    # rounding of the vectors, of the rank and of the values
    rounding = 8 * math.sqrt(max(m, n)) * UNIT_ROUNDOFF[dtype] * np.linalg.norm(true)
    assert error <= np.linalg.norm(true[rank:]) * (1 + 1e-6) + rounding
    energy = np.linalg.norm(true) ** 2
    assert abs(float(found.discarded) - np.linalg.norm(true[len(s) :]) ** 2) <= {F32: 1e-6, F64: 1e-13}[dtype] * energy


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("past", [-4, 0, 5])
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("m", "n"), BY_SKETCH)
def test_long_sides_are_within_the_bound_of_their_projection(m, n, kind, past, dtype):
    x = with_values(m, n, SPECTRA[kind](min(m, n), 10), 2).to(dtype)
    rank = 10 + past

    found = randomized_svd(x, rank, oversample=8, power_iterations=1, seed=4)

    true = np.linalg.svd(to_numpy(x), compute_uv=False)
    left, s, right, _ = assert_decomposes(x, found, rank, expected_range_error(true, rank, 8, 1), dtype)
    error = np.linalg.norm(to_numpy(x) - (left * s) @ right) ** 2
    energy = np.linalg.norm(true) ** 2
    # |x|^2 - sum s^2 is a difference of numbers that are each off by some roundings
    assert abs(float(found.discarded) - error) <= {F32: 1e-6, F64: 1e-13}[dtype] * energy


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("power_iterations", [0, 1, 2])
def test_the_sketch_itself_on_every_spectrum(kind, power_iterations, dtype):
    x = with_values(200, 120, SPECTRA[kind](120, 10), 5).to(dtype)

    found = sketched(x, 10, power_iterations=power_iterations)

    true = np.linalg.svd(to_numpy(x), compute_uv=False)
    assert_decomposes(x, found, 10, expected_range_error(true, 10, 8, power_iterations), dtype)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("m", "n"), BY_GRAM + BY_SKETCH)
def test_no_larger_an_error_than_scikit_learns(m, n, kind):
    x = with_values(m, n, SPECTRA[kind](min(m, n), 16), 6).to(F32)
    for rank in (9, 16, 23):
        u, s, vh, _ = (to_numpy(t) for t in randomized_svd(x, rank))
        a, b, c = scikit_learns(x.numpy(), rank, random_state=0)
        wide = to_numpy(x)
        ours, theirs = np.linalg.norm(wide - (u * s) @ vh), np.linalg.norm(wide - (a.astype(np.float64) * b) @ c)
        assert ours <= 1.02 * theirs + 1e-6 * np.linalg.norm(wide)


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("layout", ["row-major", "column-major", "strided", "odd-offset"])
@pytest.mark.parametrize(("m", "n"), [(40, 300), (300, 40), (520, 530)])
def test_reads_any_dtype_and_storage(m, n, layout, dtype):
    x = stored(normal(7, m, 12).matmul(normal(8, 12, n)).div(10).to(dtype), layout)

    found = randomized_svd(x, 12)

    true = np.linalg.svd(to_numpy(x), compute_uv=False)
    out = F64 if dtype == F64 else F32
    assert (found.u.dtype, found.s.dtype, found.vh.dtype) == (out, out, out)
    assert_decomposes(x, found, 12, 1.02 * true[12], out)


@pytest.mark.parametrize(("m", "n"), [*BY_GRAM, *BY_SKETCH, (5, 5), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scales(m, n, scale):
    x = (normal(9, m, n) * scale).to(F32)
    rank = min(m, n, 6)

    plain, scaled = randomized_svd((x / scale).to(F32), rank), randomized_svd(x, rank)

    assert torch.allclose(scaled.s / scale, plain.s, rtol=1e-5, atol=0)
    assert scaled.rank == rank
    assert float(scaled.discarded) == pytest.approx(float(plain.discarded) * scale**2, rel=1e-4, abs=1e-6 * scale**2)


@pytest.mark.parametrize(("m", "n"), [(30, 50), (600, 610)])
def test_a_zero_matrix_has_nothing(m, n):
    found = randomized_svd(torch.zeros(m, n), 4)

    assert [tuple(t.shape) for t in found] == [(m, 0), (0,), (0, n), ()]
    assert found.rank == 0
    assert float(found.discarded) == 0


@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (0, 0)])
def test_a_matrix_without_entries(m, n):
    found = randomized_svd(torch.zeros(m, n), 4)

    assert [tuple(t.shape) for t in found] == [(m, 0), (0,), (0, n), ()]


@pytest.mark.parametrize("dtype", [F16, F32, F64])
@pytest.mark.parametrize(("m", "n"), [(50, 400), (400, 50), (560, 600)])
def test_a_rank_past_the_numerical_rank_gives_what_exists(m, n, dtype):
    x = torch.zeros(m, n, dtype=dtype)
    # repeated rows and columns: whole numbers, so that the rank is exact in every dtype
    x[:] = (torch.arange(m) % 3).unsqueeze(1) * (torch.arange(n) % 2).unsqueeze(0)
    x[: m // 2] += torch.arange(n) % 5

    found = randomized_svd(x, 20)

    true = np.linalg.svd(to_numpy(x), compute_uv=False)
    exist = int((true > 1e-9 * true[0]).sum())
    assert found.rank == exist == found.u.shape[1] == found.vh.shape[0]
    assert float(found.discarded) <= 1e-12 * np.linalg.norm(true) ** 2


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("m", "n"), [(90, 300), (520, 600)])
@pytest.mark.parametrize("tolerance", [0.5, 0.05, 1e-3, 1e-5])
def test_tolerance_takes_the_fewest_that_meet_it(m, n, tolerance, dtype):
    x = with_values(m, n, 0.8 ** torch.arange(min(m, n), dtype=F64).clamp(max=100), 10).to(dtype)
    true = np.linalg.svd(to_numpy(x), compute_uv=False)
    left = np.sqrt(np.append(np.cumsum(true[::-1] ** 2)[::-1], 0)) / np.linalg.norm(true)
    fewest = int(np.argmax(left <= tolerance))

    by_tolerance = randomized_svd(x, tolerance=tolerance)
    by_energy = randomized_svd(x, energy=1 - tolerance**2)

    wide, u, s, vh = (to_numpy(t) for t in (x, *by_tolerance[:3]))
    error = np.linalg.norm(wide - (u * s) @ vh) / np.linalg.norm(wide)
    assert error <= tolerance * (1 + 1e-4) + 1e-7
    assert by_tolerance.rank in (fewest, fewest + 1)
    assert abs(by_energy.rank - by_tolerance.rank) <= 1


def test_all_of_the_energy_and_none_of_the_loss():
    x = with_values(40, 60, torch.tensor([3.0, 2.0, 1.0], dtype=F64), 11)
    assert randomized_svd(x, tolerance=1e-12).rank == 3
    assert randomized_svd(x, energy=1.0).rank == 3
    assert randomized_svd(x, tolerance=0.999).rank == 1
    assert randomized_svd(x, 0).u.shape == (40, 0)


@pytest.mark.parametrize(("m", "n"), [(80, 300), (300, 80), (530, 600)])
def test_center_takes_the_mean_of_the_rows_off(m, n):
    # a mean that is 1e4 times the spread: it must not drown it
    spread = with_values(m, n, 30 * 0.6 ** torch.arange(12, dtype=F64), 12)
    x = (spread + 1e4 * normal(13, 1, n)).to(F32)

    found = randomized_svd(x, 5, center=True)

    wide = to_numpy(x)
    true = np.linalg.svd(wide - wide.mean(0), compute_uv=False)
    # entries near 1e4, rounded to float32, leave noise of 1e4 u sqrt(m n) that no method can tell from spread
    noise = 1e4 * UNIT_ROUNDOFF[F32] * math.sqrt(m * n)
    assert np.abs(to_numpy(found.s) - true[:5]).max() <= 1e-5 * true[0] + 0.01 * noise
    assert np.abs(to_numpy(found.u).sum(0)).max() <= 1e-3
    blocks = RowBlocks([x[: m // 2], x[m // 2 :]])
    assert torch.allclose(randomized_svd(blocks, 5, center=True).s, found.s, rtol=1e-4)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("family", ["own-seed", "shared-seed"])
@pytest.mark.parametrize("rank", [4, 16, 60, 200])
def test_stacks_of_trained_adapters(family, rank, dtype):
    """All factors of a layer under each other, as a compression sees them; ranks to past the numerical one."""
    stacks = {}
    for path in sorted(ADAPTERS.glob(f"*{family}*/adapter_model.safetensors")):
        for name, tensor in load_file(path).items():
            if ".lora_A." in name:
                stacks.setdefault(name, []).append(tensor.to(dtype))
    assert len(stacks) >= 2
    found = randomized_svd([RowBlocks(blocks) for blocks in stacks.values()], rank)
    for blocks, one in zip(stacks.values(), found, strict=True):
        x = torch.cat(blocks)
        left, s, right, true = assert_decomposes(x, one, rank, 0.0, dtype)
        assert np.abs(s - true[: len(s)]).max() <= {F32: 1e-6, F64: 1e-12}[dtype] * true[0]
        a, b, c = scikit_learns(x.numpy(), min(rank, *x.shape), random_state=0)
        ours = np.linalg.norm(to_numpy(x) - (left * s) @ right)
        assert ours <= 1.02 * np.linalg.norm(to_numpy(x) - (a * b) @ c) + 1e-6 * np.linalg.norm(true)


def test_vectors_that_a_float32_gram_cannot_tell_apart_are_told_apart():
    """Many close values behind one that is 70 times larger: the error of the Gram is a part of theirs."""
    values = torch.cat([torch.ones(1, dtype=F64), torch.linspace(0.016, 0.0125, 90, dtype=F64)])
    x = with_values(91, 3000, values, 22).to(F32)

    found = randomized_svd(x, 45)

    _, s, _, true = assert_decomposes(x, found, 45, 0.0, F32)
    assert np.abs(s - true[:45]).max() <= 1e-6


@pytest.mark.parametrize("rank", [20, 40, 55])
def test_graded_values_keep_their_digits_and_so_does_the_rest(rank):
    x = with_values(60, 500, torch.logspace(0, -10, 60, dtype=F64), 23)

    found = randomized_svd(x, rank)

    _, s, _, true = assert_decomposes(x, found, rank, 0.0, F64)
    assert found.rank == rank
    assert np.abs(s - true[:rank]).max() <= 1e-14
    # a sum of what is left out, not a difference to the whole
    assert float(found.discarded) == pytest.approx(np.square(true[rank:]).sum(), rel=1e-4, abs=0)


@pytest.mark.parametrize(("m", "n"), [(256, 900), (400, 900)])
def test_all_of_a_low_rank_is_there_over_ten_decades(m, n):
    count = 150 if m < 300 else 180
    x = with_values(m, n, torch.logspace(0, -10, count, dtype=F64), count)

    found = randomized_svd(x, 256)

    true = np.linalg.svd(to_numpy(x), compute_uv=False)
    assert found.rank == (true > 1e-11).sum()
    assert np.abs(to_numpy(found.s) - true[: found.rank]).max() <= 1e-12
    assert torch.linalg.matrix_norm(x - (found.u * found.s) @ found.vh) <= 1e-12
    assert float(found.discarded) <= 1e-20


@pytest.mark.parametrize("power_iterations", [0, 1])
@pytest.mark.parametrize("rank", [95, 160])
@pytest.mark.parametrize("decades", [7, 10])
@pytest.mark.parametrize(("m", "n"), [(500, 700), (700, 500)])
def test_a_projection_loses_no_small_value_of_float64(m, n, decades, rank, power_iterations):
    """A Gram of the projection, from which it is made orthonormal, tells six or seven decades apart."""
    x = with_values(m, n, torch.logspace(0, -decades, 100, dtype=F64), 27)

    found = randomized_svd(x, rank, oversample=60, power_iterations=power_iterations)

    true = np.linalg.svd(to_numpy(x), compute_uv=False)
    bound = expected_range_error(true, rank, 60, power_iterations)
    _, s, _, _ = assert_decomposes(x, found, rank, bound, F64)
    assert len(s) == min(rank, 100)
    assert np.abs(s - true[: len(s)]).max() <= 1e-12
    a, b, c = scikit_learns(x.numpy(), rank, random_state=0)
    ours, theirs = (np.linalg.norm(x.numpy() - y) for y in ((to_numpy(found.u) * s) @ to_numpy(found.vh), (a * b) @ c))
    assert ours <= 1.02 * theirs + 1e-15 * math.sqrt(max(m, n))


def off_in_units(columns):
    """``|V^T V - I|_2`` in units of roundoff of float64, summed past it."""
    v = to_numpy(columns).astype(np.longdouble)
    return np.linalg.norm((v.T @ v - np.eye(v.shape[1])).astype(np.float64), 2) / UNIT_ROUNDOFF[F64]


@pytest.mark.parametrize(("m", "n"), [(45, 115), (200, 900), (257, 322), (520, 600)])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("large", [1.0, 1e8])
def test_few_vectors_are_as_orthonormal_as_few_can_be(m, n, rank, large):
    """They come out of the rotations of many columns, which are off by more."""
    x = normal(25, m, n)
    x[0] *= large

    found = randomized_svd(x, rank)

    assert off_in_units(found.u) <= 8 * rank
    assert off_in_units(found.vh.T) <= 8 * rank
