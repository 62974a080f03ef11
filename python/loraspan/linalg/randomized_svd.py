"""The leading singular triplets of matrices of any size, one at a time or many at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from loraspan import _native
from loraspan._default_device import cpu_by_default
from loraspan.errors import ArgumentError, ShapeError
from loraspan.linalg.svd import SVD
from loraspan.linalg.svd_of_batch import svd_of_batch
from loraspan.linalg.svd_range import Goal, Job
from loraspan.linalg.svd_ways import Solver
from loraspan.ops import RowBlocks
from loraspan.ops.blocks import CPU
from loraspan.ops.places import carried, find_device, off_metal

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
@cpu_by_default
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
        units of roundoff, but for the length of vectors whose entries are nearly all of one size, which is off by what
        a sum of so many equal squares rounds. ``discarded = |x|_F^2 - sum s^2`` is the squared error.
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
    for name, value in (("oversample", oversample), ("power_iterations", power_iterations), ("seed", seed)):
        _check_whole(name, value)
    if seed >= 2**63:
        raise ArgumentError(f"randomized_svd: seed lies below 2^63; got {seed}")
    solve = Solver(oversample, power_iterations, seed, backend)
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
        _check_whole("rank", rank)
        return Goal(rank)
    if energy is not None:
        if not 0 < energy <= 1:
            raise ArgumentError(f"randomized_svd: energy is a share in (0, 1]; got {energy}")
        return Goal(None, 1 - energy)
    assert tolerance is not None
    if not 0 <= tolerance < 1:
        raise ArgumentError(f"randomized_svd: tolerance is a share of |x|_F in [0, 1); got {tolerance}")
    return Goal(None, tolerance**2)


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ArgumentError(f"randomized_svd: {name} is a whole number of at least 0; got {value!r}")


def _job(name: str, x: Matrix, goal: Goal, center: bool, place: torch.device | None) -> Job:
    if isinstance(x, RowBlocks):
        return Job(name, (RowBlocks(_centered(x.blocks), x.columns) if center else x).on(place), goal)
    _check(name, x)
    if x.ndim > 2:
        raise ShapeError(f"{name} is one matrix of a list; got {list(x.shape)}: pass a stack by itself")
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
    if x.is_neg():
        raise ShapeError(f"{name} needs memory that says its values; got a negative view: use .resolve_neg()")


def _centered(blocks: Sequence[Tensor]) -> list[Tensor]:
    """Take the mean of all rows off, summed and subtracted in float64."""
    mean = sum(off_metal(b).sum(0, dtype=torch.float64) for b in blocks) / max(1, sum(len(b) for b in blocks))
    dtypes = [torch.float64 if b.dtype == torch.float64 else torch.float32 for b in blocks]
    return [carried(off_metal(b) - mean, b.device, dtype) for b, dtype in zip(blocks, dtypes, strict=True)]


def _batched(x: Tensor, goal: Goal, center: bool, place: torch.device | None, solve: Solver) -> SVD:
    """Decompose a stack of matrices; of a rank known beforehand, straight into the stacked result."""
    _check("randomized_svd: x", x)
    *batch, m, n = x.shape
    members = x.reshape(math.prod(batch), m, n)

    def jobs(which: Iterable[int]) -> list[Job]:
        return [_job(f"randomized_svd: x[{i}]", members[i], goal, center, place) for i in which]

    if goal.rank is None:
        found = solve(jobs(range(len(members))))
        rank = max((f.s.shape[0] for f in found), default=0)
        u, v = _stack([f.u for f in found], m, rank, x), _stack([f.vh.mT for f in found], n, rank, x)
        s = _stack([f.s.unsqueeze(0) for f in found], 1, rank, x)[:, 0]
        discarded = torch.tensor([float(f.discarded) for f in found], dtype=torch.float64)
    else:
        rank = min(goal.rank, m, n)
        small, s, large, discarded = _places(x, len(members), rank)
        u, v = (large, small) if m > n else (small, large)
        left: Iterable[int] = range(len(members))
        if not center and _is_for_batch(members, goal, place, solve):
            done = svd_of_batch(members.mT if m > n else members, small, large, m > n, solve.backend)
            s.copy_(done.s)
            discarded.copy_(done.discarded)
            left = (~done.done).nonzero().flatten().tolist()
        some = [replace(job, places=(small[i], large[i])) for i, job in zip(left, jobs(left), strict=True)]
        for i, one in zip(left, solve(some), strict=True):
            s[i], discarded[i] = one.s, one.discarded
    vh = v.mT.reshape(*batch, rank, n)
    return SVD(u.reshape(*batch, m, rank), s.view(*batch, rank), vh, discarded.view(batch))


def _places(x: Tensor, count: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make room for vectors of the shorter side, values, vectors of the longer side and what is left out."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    short, long = sorted(x.shape[-2:])
    small, s, large = (
        _native.in_huge_pages(torch.empty(count, *shape, dtype=dtype, device=x.device))
        for shape in ((short, rank), (rank,), (rank, long))
    )
    return small, s, large.mT, torch.empty(count, dtype=torch.float64)


def _is_for_batch(members: Tensor, goal: Goal, place: torch.device | None, solve: Solver) -> bool:
    """Say whether matrices of one size go the way of few rows together; by the matrix, never by its company."""
    short, long = sorted(members.shape[1:])
    return (
        members.numel() > 0
        and goal.rank != 0
        and members.dtype != torch.float64
        and members.is_cpu
        and place in (None, CPU)
        and (solve.backend or "cpu").startswith("cpu")
        and solve.takes_gram((short, long), goal)
    )


def _stack(parts: Sequence[Tensor], size: int, rank: int, like: Tensor) -> Tensor:
    """Put matrices ``[size, k_i]`` together as ``[count, size, rank]``, zeros where one has fewer columns."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    out = torch.zeros(len(parts), size, rank, dtype=dtype, device=like.device)
    for place, part in zip(out, parts, strict=True):
        place[:, : part.shape[1]] = part
    return out
