"""How randomized_svd is called: batches, lists, mapped files, threads; and what it refuses."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spectra import with_values

from loraspan import _core, _native
from loraspan.errors import ArgumentError, BackendError, NotFiniteError, ShapeError
from loraspan.linalg import randomized_svd
from loraspan.ops import RowBlocks
from matrices import normal
from oracles import BF16, F16, F32, F64


def test_signs_are_settled_by_the_largest_entry_of_u():
    for m, n in ((30, 200), (200, 30), (600, 520)):
        u = randomized_svd(normal(14, m, n), 5).u
        assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", [F16, BF16, F32])
@pytest.mark.parametrize(("m", "n"), [(5, 400), (400, 5), (64, 3000)])
def test_a_stack_has_the_bits_of_its_members(on_threads, m, n, dtype):
    x = normal(16, 9, m, n, dtype=F32) * torch.logspace(-4, 4, 9).view(9, 1, 1)
    x[2, 2:, 3:] = 0  # of rank three or so
    x[5] *= 1e25  # past what float32 sums hold
    x[7] = x[7, :, :1] * x[7, :1]
    x = x.to(dtype).nan_to_num(posinf=6e4, neginf=-6e4)

    alone = [randomized_svd(member, 4) for member in x]

    for threads in (1, 2):
        found = on_threads(threads, lambda: randomized_svd(x, 4))
        for i, one in enumerate(alone):
            k = one.rank
            assert torch.equal(found.s[i, :k], one.s)
            assert torch.equal(found.u[i, :, :k], one.u)
            assert torch.equal(found.vh[i, :k], one.vh)
            assert torch.equal(found.discarded[i], one.discarded)
            assert not found.s[i, k:].any()


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

    with AnonymousPeak() as peak:
        found = randomized_svd(x, 2)

    assert found.rank == 1
    # sums in float64: the image of one column, 8 MiB, v in float32, 4 MiB, and room for the allocator
    assert 0 < peak.above <= 64 << 20


class AnonymousPeak:
    """The most anonymous memory that this process holds within the block, above what it held before; every 0.5 ms."""

    def __enter__(self):
        self.before, self.above, self.done = self.held(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.0005):
            self.above = max(self.above, self.held() - self.before)

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    @staticmethod
    def held():
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
        ({"rank": 1, "oversample": -1}, ArgumentError, "oversample is a whole number of at least 0; got -1"),
        ({"rank": 1, "oversample": 1.5}, ArgumentError, "oversample is a whole number of at least 0; got 1.5"),
        ({"rank": 1, "power_iterations": 0.5}, ArgumentError, "power_iterations is a whole number .*; got 0.5"),
        ({"rank": 1, "seed": -1}, ArgumentError, "seed is a whole number .*; got -1"),
        ({"rank": 1, "seed": 1.5}, ArgumentError, "seed is a whole number .*; got 1.5"),
        ({"rank": 1, "seed": 2**63}, ArgumentError, "seed lies below 2.63"),
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
        ([torch.ones(3, 4), torch.ones(2, 3, 4)], r"x\[1\] is one matrix of a list; got \[2, 3, 4\]"),
        (torch.ones(3, 4, dtype=torch.complex64).conj().imag, r"randomized_svd: x needs .*resolve_neg\(\)"),
        (torch.ones(2, 3, 4, dtype=torch.complex64).conj().imag, r"randomized_svd: x needs .*resolve_neg\(\)"),
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
    for rank in (2, 0):
        with pytest.raises(NotFiniteError, match="randomized_svd: x holds"):
            randomized_svd(x[1], rank)
    with pytest.raises(ArgumentError, match="squares pass float64"):
        randomized_svd(torch.full((m, n), 1e200, dtype=F64), 2)


def test_gradients_are_not_followed():
    x = torch.ones(3, 4, requires_grad=True)
    assert not any(t.requires_grad for t in randomized_svd(x, 2))


@pytest.mark.parametrize(("m", "n"), [(40, 300), (540, 600)])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_named_backend_does_all_of_the_work(backend, monkeypatch, m, n, dtype):
    used = set()
    for name in ("gram", "combine", "sketch", "power", "reconstruct", "squares", "eigh", "svd", "root"):
        honest = getattr(_core, name)
        monkeypatch.setattr(_core, name, lambda *args, honest=honest: (used.add(args[-1]), honest(*args))[1])

    found = randomized_svd(with_values(m, n, torch.linspace(3, 1, 20, dtype=F64), 24).to(dtype), 5, backend=backend)

    assert found.rank == 5
    assert used == (set() if backend == "reference" else {_native.BEST if backend == "cpu" else backend[4:]})
