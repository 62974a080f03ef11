"""The leading singular triplets of matrices of any size, one at a time or many at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from loraspan import _native
from loraspan.errors import ArgumentError, ShapeError
from loraspan.linalg.svd import SVD
from loraspan.linalg.svd_by_gram import gram_ranges
from loraspan.linalg.svd_by_sketch import svd_by_sketch
from loraspan.linalg.svd_range import Goal, Job, nothing, project, project_vectors
from loraspan.ops import RowBlocks, squares, stream
from loraspan.ops.places import carried, find_device, off_metal
from loraspan.ops.stream import held

# Up to so many rows the Gram is taken whatever the counts say: it is exact, and small work costs more in calls.
_GRAM_ROWS = 256
# An eigendecomposition of R rows takes as long as this many operations of a pass, times R^3.
_EIGH_COST = 60
# Matrices are taken in groups of about so many bytes, which share the cost of the calls and bound their memory. On a
# GPU calls cost more; what is sent to one goes once if it is no more than a chunk.
_GROUP_BYTES = 64 << 20
_GROUP_BYTES_ON_GPU = 1 << 30

Matrix = Tensor | RowBlocks


@overload
def randomized_svd(
    x: Matrix,
    rank: int | None = None,
    *,
    energy: float | None = None,
    tolerance: float | None = None,
    oversample: int | None = None,
    power_iterations: int = 1,
    seed: int = 0,
    center: bool = False,
    device: str | torch.device | None = None,
    backend: str | None = None,
) -> SVD: ...


@overload
def randomized_svd(
    x: Sequence[Matrix],
    rank: int | None = None,
    *,
    energy: float | None = None,
    tolerance: float | None = None,
    oversample: int | None = None,
    power_iterations: int = 1,
    seed: int = 0,
    center: bool = False,
    device: str | torch.device | None = None,
    backend: str | None = None,
) -> list[SVD]: ...


@torch.no_grad()
def randomized_svd(
    x: Matrix | Sequence[Matrix],
    rank: int | None = None,
    *,
    energy: float | None = None,
    tolerance: float | None = None,
    oversample: int | None = None,
    power_iterations: int = 1,
    seed: int = 0,
    center: bool = False,
    device: str | torch.device | None = None,
    backend: str | None = None,
) -> SVD | list[SVD]:
    r"""Give the leading singular triplets: ``x ~ u diag(s) vh``.

    Matrices whose shorter side is short are decomposed exactly, through the Gram of that side; the others through a
    random projection refined by power iterations. Entries are read where they lie, in a few passes: nothing of
    the size of ``x`` is allocated, so a memory-mapped matrix may be larger than memory.

    Args:
        x: ``[..., m, n]``, float16, bfloat16, float32 or float64 with any strides; or :class:`~loraspan.ops.RowBlocks`;
            or a list of matrices, each with its own shape and dtype.
        rank: how many triplets, at most. Exactly one of ``rank``, ``energy`` and ``tolerance`` is given.
        energy: as few triplets as hold this share of ``|x|_F^2``, in (0, 1].
        tolerance: as few triplets as leave ``|x - u diag(s) vh|_F <= tolerance |x|_F``, in [0, 1).
        oversample: columns of the projection beyond ``rank``; 32 or half of ``rank``, if that is more, by default.
        power_iterations: products with ``x x^T`` that refine it; more for spectra that decay slowly.
        seed: of the projection, in ``[0, 2^63)``.
        center: take the mean of the rows off first (principal components). This forms ``x - mean``.
        device: ``"cuda"`` or ``"mps"`` for what lies elsewhere: it is sent there in chunks of columns, two at a time of
            128 MB each. ``None`` takes where ``x`` lies. Metal has no float64: float64 sums are then the CPU's.
        backend: as for the operators, such as ``"cpu:avx2"``, ``"triton"`` or ``"reference"``.

    Returns:
        :class:`SVD` with ``u [..., m, k]``, ``s [..., k]``, ``vh [..., k, n]`` and ``discarded [...]``; a list of them
        for a list. float64 for float64 input, else float32. ``k`` is ``rank``, or fewer where a matrix has fewer: a
        singular value below ``4 2^-24`` of the largest counts as absent (``4 sqrt(min(m, n)) 2^-53`` for float64).
        ``.rank`` says how many there are; matrices of one tensor share ``k``, and what one of them lacks is zero.
        All lie where ``x`` does, but for ``discarded`` and for what float64 Metal cannot hold, on the CPU.
        The entry of largest magnitude of each column of ``u`` is positive. ``u`` and ``v`` are orthonormal to ``8 k``
        units of roundoff. ``discarded = |x|_F^2 - sum s^2`` is the squared error.
        The compiled kernels give the same bits for any number of threads, any batch and any order of it, where the
        shorter side has at most 512 rows or the projection at most 512 columns; beyond, LAPACK's threads may show.

    Raises:
        ArgumentError: if not exactly one goal is given, an argument is out of range, or there is no such device.
        ShapeError: if ``x`` is not a matrix of one of these dtypes.
        NotFiniteError: if a matrix holds a NaN or an infinity.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> u, s, vh, discarded = randomized_svd(torch.diag(torch.tensor([3.0, 4.0, 0.5])), rank=2)
        >>> s, discarded
        (tensor([4., 3.]), tensor(0.2500, dtype=torch.float64))
        >>> randomized_svd(torch.diag(torch.tensor([3.0, 4.0, 0.5])), tolerance=0.2).rank
        2

    Source:
        Halko, Martinsson, Tropp, *Finding structure with randomness*, 2011: algorithm 4.4 and theorem 9.3, corollary
        10.10 for the error. Random signs: section 4.6 there.
    """
    goal = _goal(rank, energy, tolerance)
    place = find_device("randomized_svd", device)
    if oversample is None:
        oversample = max(32, (rank or 0) // 2)
    if oversample < 0 or power_iterations < 0 or not 0 <= seed < 2**63:
        raise ArgumentError(
            f"randomized_svd: oversample and power_iterations are at least 0 and seed lies in [0, 2^63); "
            f"got {oversample}, {power_iterations} and {seed}"
        )
    solve = _Solver(oversample, power_iterations, seed, backend)
    if isinstance(x, Tensor) and x.ndim > 2:
        return _batched(x, goal, center, place, solve)
    if isinstance(x, (Tensor, RowBlocks)):
        return solve([_job("randomized_svd: x", x, goal, center, place)])[0]
    return solve([_job(f"randomized_svd: x[{i}]", member, goal, center, place) for i, member in enumerate(x)])


def _goal(rank: int | None, energy: float | None, tolerance: float | None) -> Goal:
    if sum(wish is not None for wish in (rank, energy, tolerance)) != 1:
        raise ArgumentError(
            f"randomized_svd: give exactly one of rank, energy and tolerance; got {rank}, {energy} and {tolerance}"
        )
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ArgumentError(f"randomized_svd: rank is a whole number of at least 0; got {rank!r}")
        return Goal(rank)
    if energy is not None:
        if not 0 < energy <= 1:
            raise ArgumentError(f"randomized_svd: energy is a share in (0, 1]; got {energy}")
        return Goal(None, 1 - energy)
    assert tolerance is not None
    if not 0 <= tolerance < 1:
        raise ArgumentError(f"randomized_svd: tolerance is a share of |x|_F in [0, 1); got {tolerance}")
    return Goal(None, tolerance**2)


def _job(name: str, x: Matrix, goal: Goal, center: bool, place: torch.device | None) -> Job:
    if isinstance(x, RowBlocks):
        return Job(name, (RowBlocks(_centered(x.blocks), x.columns) if center else x).on(place), goal)
    _check(name, x)
    if center:
        [x] = _centered([x])
    flipped = x.shape[0] > x.shape[1]
    return Job(name, RowBlocks([x.T if flipped else x]).on(place), goal, flipped)


def _check(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.ndim < 2 or x.layout != torch.strided or x.dtype not in _native.DTYPE_CODES:
        got = f"{x.layout} {list(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ShapeError(
            f"{name} needs to be a dense tensor [..., m, n] of float16, bfloat16, float32 or float64 (of a complex "
            f"one, decompose the real and imaginary parts under each other); got {got}"
        )


def _centered(blocks: Sequence[Tensor]) -> list[Tensor]:
    """Take the mean of all rows off, summed and subtracted in float64."""
    mean = sum(off_metal(b).sum(0, dtype=torch.float64) for b in blocks) / max(1, sum(len(b) for b in blocks))
    dtypes = [torch.float64 if b.dtype == torch.float64 else torch.float32 for b in blocks]
    return [carried(off_metal(b) - mean, b.device, dtype) for b, dtype in zip(blocks, dtypes, strict=True)]


def _batched(x: Tensor, goal: Goal, center: bool, place: torch.device | None, solve: _Solver) -> SVD:
    """Decompose a stack of matrices; of a rank known beforehand, straight into the stacked result."""
    _check("randomized_svd: x", x)
    *batch, m, n = x.shape
    count = math.prod(batch)
    members = x.reshape(count, m, n)
    jobs = [_job(f"randomized_svd: x[{i}]", member, goal, center, place) for i, member in enumerate(members)]
    if goal.rank is not None:
        rank = min(goal.rank, m, n)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        short, long = sorted((m, n))
        small = torch.empty(count, short, rank, dtype=dtype, device=x.device)
        large = torch.empty(count, rank, long, dtype=dtype, device=x.device).mT
        jobs = [replace(job, places=(small[i], large[i])) for i, job in enumerate(jobs)]
        found = solve(jobs)
        u, v = (large, small) if m > n else (small, large)
    else:
        found = solve(jobs)
        rank = max((f.s.shape[0] for f in found), default=0)
        u, v = _stack([f.u for f in found], m, rank, x), _stack([f.vh.mT for f in found], n, rank, x)
    s = _stack([f.s.unsqueeze(0) for f in found], 1, rank, x)[:, 0]
    discarded = torch.tensor([float(f.discarded) for f in found], dtype=torch.float64)
    vh = v.mT.reshape(*batch, rank, n)
    return SVD(u.reshape(*batch, m, rank), s.view(*batch, rank), vh, discarded.view(batch))


def _stack(parts: Sequence[Tensor], size: int, rank: int, like: Tensor) -> Tensor:
    """Put matrices ``[size, k_i]`` together as ``[count, size, rank]``, zeros where one has fewer columns."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    out = torch.zeros(len(parts), size, rank, dtype=dtype, device=like.device)
    for place, part in zip(out, parts, strict=True):
        place[:, : part.shape[1]] = part
    return out


class _Solver:
    """Decompose jobs, each by the way its shape asks for, together where that is faster."""

    def __init__(self, oversample: int, power_iterations: int, seed: int, backend: str | None) -> None:
        self.oversample = oversample
        self.power_iterations = power_iterations
        self.seed = seed
        self.backend = backend

    def __call__(self, jobs: Sequence[Job]) -> list[SVD]:
        found: dict[int, SVD] = {}
        by_rows: dict[int, list[int]] = {}
        for i, job in enumerate(jobs):
            if 0 in job.x.shape or job.goal.rank == 0:
                found[i] = nothing(job, float(squares(job.x, backend=self.backend).sum()))
            elif self._takes_gram(job):
                by_rows.setdefault(job.x.shape[0], []).append(i)
            else:
                with held([job.x]):
                    found[i] = svd_by_sketch(job, self.oversample, self.power_iterations, self.seed, self.backend)
        for members in by_rows.values():
            for group in _groups(jobs, members):
                found.update(zip(group, self._by_gram([jobs[i] for i in group]), strict=True))
        return [found[i] for i in range(len(jobs))]

    def _takes_gram(self, job: Job) -> bool:
        """Count the operations of both ways; by the matrix and the goal alone, never by its company."""
        rows, columns = job.x.shape
        if rows <= _GRAM_ROWS:
            return True
        wanted = 32 if job.goal.rank is None else job.goal.rank
        width = min(rows, columns, wanted + self.oversample)
        by_gram = rows**2 * columns + 2 * rows * columns * wanted + _EIGH_COST * rows**3
        by_sketch = 2 * rows * columns * width * (2 + 2 * self.power_iterations) + _EIGH_COST * width**3
        return by_gram < by_sketch

    def _by_gram(self, jobs: Sequence[Job]) -> list[SVD]:
        with held([job.x for job in jobs]):
            return self._by_gram_there(jobs)

    def _by_gram_there(self, jobs: Sequence[Job]) -> list[SVD]:
        ranges = gram_ranges(jobs, self.backend)
        found: list[SVD | None] = [None] * len(jobs)
        alike: dict[tuple[int, str, bool], list[int]] = {}
        for i, (job, range_) in enumerate(zip(jobs, ranges, strict=True)):
            if range_.w.shape[1]:
                alike.setdefault((range_.w.shape[1], range_.precision, range_.s is None), []).append(i)
            else:
                found[i] = nothing(job, range_.total)
        for members in alike.values():
            way = project if ranges[members[0]].s is None else project_vectors
            results = way([jobs[i] for i in members], [ranges[i] for i in members], self.backend)
            for i, result in zip(members, results, strict=True):
                found[i] = result
        return [f for f in found if f is not None]


def _groups(jobs: Sequence[Job], members: Sequence[int]) -> Iterator[list[int]]:
    """Cut ``members`` into runs of about as many bytes as suits where they are computed with, at least one in each."""
    group: list[int] = []
    bytes_of_group = 0
    for i in members:
        x = jobs[i].x
        place = x.target or x.device
        limit = _GROUP_BYTES
        if place is not None and place.type == "cuda":
            limit = _GROUP_BYTES_ON_GPU if x.target is None else stream.DEVICE_BYTES // 2
        if group and bytes_of_group + x.nbytes > limit:
            yield group
            group, bytes_of_group = [], 0
        group.append(i)
        bytes_of_group += x.nbytes
    if group:
        yield group
