"""randomized_svd on known spectra, against NumPy's full decomposition and scikit-learn's randomized one."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.utils.extmath import randomized_svd as scikit_learns
from spectra import SPECTRA, assert_decomposes, expected_range_error, with_values

from loraspan.errors import ArgumentError, BackendError, NotFiniteError, ShapeError
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


def test_signs_are_settled_by_the_largest_entry_of_u():
    for m, n in ((30, 200), (200, 30), (600, 520)):
        u = randomized_svd(normal(14, m, n), 5).u
        assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("m", [40, 540])
def test_batches(m):
    x = normal(15, 2, 3, m, 600, dtype=F32)
    x[1, 2] = 0
    x[0, 1, :, 1:] = 0

    found = randomized_svd(x, 6)

    assert [tuple(t.shape) for t in found] == [(2, 3, m, 6), (2, 3, 6), (2, 3, 6, 600), (2, 3)]
    assert found.rank.tolist() == [[6, 1, 6], [6, 6, 0]]
    assert not found.u[1, 2].any()
    assert not found.vh[0, 1, 1:].any()
    for i in range(2):
        for j in range(3):
            alone = randomized_svd(x[i, j], 6)
            for part, one in zip(found, alone, strict=True):
                held = part[i, j]
                if held.ndim:
                    held = held[tuple(slice(0, size) for size in one.shape)]
                assert torch.equal(held, one)


def test_a_batch_by_tolerance_shares_the_largest_rank():
    x = torch.stack([with_values(30, 40, torch.ones(r, dtype=F64), r) for r in (2, 5)])
    found = randomized_svd(x, tolerance=1e-6)
    assert found.rank.tolist() == [2, 5]
    assert found.u.shape == (2, 30, 5)
    assert randomized_svd(torch.zeros(0, 3, 4), tolerance=0.5).u.shape == (0, 3, 0)
    assert randomized_svd(torch.zeros(0, 3, 4), 2).vh.shape == (0, 2, 4)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 300)), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from([F16, BF16, F32, F64]), min_size=6, max_size=6),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_company_order_and_threads_change_no_bit(on_threads, sizes, dtypes, threads, seed, data):
    matrices = [normal(seed + i, m, n, dtype=dtypes[i]) for i, (m, n) in enumerate(sizes)]
    order = data.draw(st.permutations(range(len(matrices))))

    together = on_threads(threads, lambda: randomized_svd([matrices[i] for i in order], 3))

    for place, i in enumerate(order):
        alone = on_threads(1, lambda i=i: randomized_svd([matrices[i]], 3)[0])
        assert all(torch.equal(a, b) for a, b in zip(together[place], alone, strict=True))


@pytest.mark.parametrize("dtype", [F16, F64])
def test_threads_change_no_bit_of_a_sketch(on_threads, dtype):
    x = normal(16, 600, 900, dtype=dtype)
    results = [on_threads(count, lambda: randomized_svd(x, 7, seed=9)) for count in (1, 2, 3)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_seed_decides_the_sketch_and_nothing_else_does():
    x = normal(17, 600, 700, dtype=F32)
    first, again, other = (randomized_svd(x, 5, seed=seed, power_iterations=0) for seed in (1, 1, 2))
    assert torch.equal(first.u, again.u)
    assert not torch.equal(first.u, other.u)


@given(m=st.integers(1, 30), n=st.integers(1, 200), seed=st.integers(0, 2**32 - 1), exponent=st.integers(-20, 20))
def test_a_power_of_two_scales_the_values_alone(m, n, seed, exponent):
    x = normal(seed, m, n, dtype=F32)
    plain, scaled = randomized_svd(x, 4), randomized_svd(x * 2.0**exponent, 4)
    assert torch.equal(plain.s * 2.0**exponent, scaled.s)
    assert torch.equal(plain.u, scaled.u)
    assert torch.equal(plain.vh, scaled.vh)


@given(m=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_the_transpose_has_the_same_values(m, n, seed):
    x = normal(seed, m, n)
    rank = min(m, n)
    assert torch.allclose(randomized_svd(x, rank).s, randomized_svd(x.T, rank).s, rtol=0, atol=1e-12 * float(x.norm()))


def test_row_blocks_are_one_matrix():
    parts = [normal(18, 20, 300, dtype=F32), normal(19, 300, 15, dtype=F16).T]
    whole = torch.cat([p.to(F32) for p in parts])
    blocks, plain = randomized_svd(RowBlocks(parts), 6), randomized_svd(whole, 6)
    assert all(torch.equal(a, b) for a, b in zip(blocks, plain, strict=True))
    tall = randomized_svd(RowBlocks([normal(20, 400, 9), normal(21, 200, 9)]), 9)
    assert tall.rank == 9
    assert float(tall.discarded) <= 1e-12 * float(tall.s.square().sum())


def test_a_mapped_file_is_read_and_not_held(tmp_path):
    """240 MB in half precision: what is allocated meanwhile stays far below."""
    path = tmp_path / "x.bin"
    rows, columns = 120, 1 << 20
    written = np.memmap(path, dtype=np.float16, mode="w+", shape=(rows, columns))
    for i in range(rows):
        written[i] = i % 7
    del written
    x = torch.from_file(str(path), shared=False, size=rows * columns, dtype=F16).view(rows, columns)
    randomized_svd(x[:, :4096], 2)
    before = anonymous_peak()

    found = randomized_svd(x, 2)

    assert found.rank == 1
    # v in float32 and the image it is turned from, 8 MiB each, and room for the allocator
    assert anonymous_peak() - before <= 64 << 20


def anonymous_peak():
    """Bytes of anonymous memory of this process now; what is freed to the system no longer counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ArgumentError, "exactly one of rank, energy and tolerance"),
        ({"rank": 2, "energy": 0.5}, ArgumentError, "exactly one of rank, energy and tolerance; got 2, 0.5 and None"),
        ({"rank": -1}, ArgumentError, "rank is a whole number of at least 0; got -1"),
        ({"rank": 0.9}, ArgumentError, "rank is a whole number of at least 0; got 0.9"),
        ({"energy": 1.5}, ArgumentError, r"energy is a share in \(0, 1\]; got 1.5"),
        ({"tolerance": 1.0}, ArgumentError, r"tolerance is a share of \|x\|_F in \[0, 1\); got 1.0"),
        ({"rank": 1, "oversample": -1}, ArgumentError, "oversample and power_iterations are at least 0"),
        ({"rank": 1, "seed": -1}, ArgumentError, "seed lies in"),
        ({"rank": 1, "backend": "gpu"}, BackendError, "no backend 'gpu'"),
    ],
)
def test_arguments_that_cannot_be_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        randomized_svd(torch.ones(3, 4), **options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.ones(3, 4, dtype=torch.complex64),
            r"x needs .*complex.*; got torch.strided \[3, 4\] of torch.c",
        ),
        (torch.ones(2, 3, 4, dtype=torch.complex64), "of torch.complex64"),
        (torch.ones(3, 4, dtype=torch.int64), "of torch.int64"),
        (torch.ones(4), r"\[..., m, n\].*got torch.strided \[4\]"),
        (torch.ones(3, 4).to_sparse(), "torch.sparse_coo"),
        ([torch.ones(3, 4), np.ones((3, 4))], r"x\[1\] needs to be a dense tensor.*got ndarray"),
    ],
)
def test_matrices_that_cannot_be_are_refused(x, message):
    with pytest.raises(ShapeError, match=message):
        randomized_svd(x, 2)


@pytest.mark.parametrize(("m", "n"), [(20, 30), (600, 610)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(m, n, value):
    x = torch.ones(2, m, n)
    x[1, 3, 2] = value
    with pytest.raises(NotFiniteError, match=r"randomized_svd: x\[1\] holds a NaN or an infinity"):
        randomized_svd(x, 2)
    with pytest.raises(NotFiniteError, match="randomized_svd: x holds"):
        randomized_svd(x[1], 2)
    with pytest.raises(ArgumentError, match="squares pass float64"):
        randomized_svd(torch.full((m, n), 1e200, dtype=F64), 2)


def test_gradients_are_not_followed():
    x = torch.ones(3, 4, requires_grad=True)
    assert not any(t.requires_grad for t in randomized_svd(x, 2))


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
