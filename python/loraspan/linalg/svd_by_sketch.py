"""Leading left vectors of a matrix with many rows, from a few random projections of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loraspan.linalg.roots import orthonormalize
from loraspan.linalg.svd import SVD
from loraspan.linalg.svd_by_gram import FAST_FLOOR
from loraspan.linalg.svd_range import Job, Range, check_total, nothing, power_of_two, project, suits_float32
from loraspan.ops import Piece, power, reconstruct, reconstruct_many, sketch, squares
from loraspan.ops.blocks import CPU
from loraspan.ops.dense import eigh
from loraspan.ops.places import backend_at, carried

# What a search for an error starts with, and doubles.
_FIRST_WIDTH = 32
# How often what a Gram took for dependent is looked through: each time six decades or so.
_ROUNDS = 3


def svd_by_sketch(job: Job, oversample: int, power_iterations: int, seed: int, backend: str | None) -> SVD:
    """Give the truncated decomposition; the projection widens until the goal is met.

    Sums in float32, and once more in float64 where the result shows that those do not carry far enough.
    """
    total = float(squares(job.x, backend=backend).sum())
    check_total(job, total)
    if total == 0 or job.goal.rank == 0:
        return nothing(job, total)
    precision = "f32" if suits_float32(job, total) else "f64"
    limit = min(job.x.shape)
    width = min(limit, (_FIRST_WIDTH if job.goal.rank is None else job.goal.rank) + oversample)
    while True:
        w = _range_of(job, width, precision, total, power_iterations, seed, backend)
        found = project([job], [Range(w, precision, power_of_two(total), total)], backend)[0]
        left = float(found.discarded)
        if precision == "f32" and _is_beyond_float32(found.s.cpu(), left, total, len(found.s) == limit):
            precision = "f64"
        elif job.goal.rank is None and left > job.goal.loss * total and width < limit:
            width = min(limit, 2 * width)
        else:
            return found


def _is_beyond_float32(s: Tensor, left: float, total: float, is_full: bool) -> bool:
    present = s[s > 0]
    small = len(present) > 0 and float(present[-1]) < math.sqrt(FAST_FLOOR) * float(present[0])
    return small or (left < FAST_FLOOR * total and not is_full)


def _range_of(
    job: Job, width: int, precision: str, total: float, power_iterations: int, seed: int, backend: str | None
) -> Tensor:
    """Give orthonormal columns that hold nearly all that ``width`` columns can."""
    rows, columns = job.x.shape
    scale = power_of_two(total)
    if width >= rows:
        return torch.eye(rows, dtype=torch.float64)
    if width >= columns:
        x = torch.cat([carried(block, CPU, torch.float64) for block in job.x.blocks])
        return _present(orthonormalize(x * scale, backend=backend))
    place = job.x.target or job.x.device
    # blocks as tall as X stay where products with X are taken; Metal has no float64
    here = place if place is not None and place.type == "cuda" else CPU
    # in place, here and below: blocks of this size are mostly the cost of new memory
    y = sketch(job.x, width, seed=seed, precision=precision, backend=backend).to(here).mul_(scale)
    for _ in range(power_iterations):
        # scaled on both sides, so that float32 holds whatever lies between
        q = orthonormalize(y, backend=backend).mul_(scale)
        y = power(job.x, q, precision=precision, backend=backend).to(here).mul_(scale)
    if power_iterations:
        y = _along_vectors(q, y, backend)
    w = _present(orthonormalize(y, backend=backend))
    return _with_the_small(job, w, width, scale, seed, backend) if job.is_double else w


def _with_the_small(job: Job, w: Tensor, width: int, scale: float, seed: int, backend: str | None) -> Tensor:
    """Add to ``w [R, l]``, where ``l < width``, what a Gram took for dependent and float64 tells apart.

    Each round sketches what is outside of ``w``, and so reaches further down by as much as a Gram does.
    """
    here = backend_at(w.device, backend)
    for _ in range(_ROUNDS):
        if w.shape[1] >= width:
            break
        y = sketch(job.x, width, seed=seed, precision="f64", backend=backend).to(w.device).mul_(scale)
        floor = float(y.norm()) * job.smallest
        y = _outside(w, _outside(w, y, here), here)
        if float(y.norm()) <= floor:
            break
        more = _outside(w, _present(orthonormalize(y, backend=backend)), here)
        w = torch.cat([w, _present(orthonormalize(more, backend=backend))], 1)
    return w


def _outside(w: Tensor, y: Tensor, backend: str | None) -> Tensor:
    return y - reconstruct(w, reconstruct(w.T, y, backend=backend), backend=backend)


def _present(w: Tensor) -> Tensor:
    """Leave out the zero columns that stand for dependent ones."""
    there = (w != 0).any(0)
    return w if bool(there.all()) else w[:, there]


def _along_vectors(q: Tensor, y: Tensor, backend: str | None) -> Tensor:
    """Turn ``y``, a multiple of ``X X^T q``, so that its columns lie near the singular vectors of ``X``, largest first.

    Their lengths then are graded, and orthonormalizing them loses no small one among large ones.
    """
    backend = backend_at(q.device, backend)
    cross = reconstruct(q.T, y, backend=backend).cpu()
    vectors = eigh((cross + cross.T) / 2, backend=backend_at(CPU, backend)).vectors
    reconstruct_many([Piece(y, vectors.to(y.device), y)], backend=backend)
    return y
