"""Leading left vectors of matrices with few rows, from their Grams: exact, in one pass over the entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraspan.linalg.svd_range import Job, Range, check_total, power_of_two, suits_float32
from loraspan.ops import gram_many
from loraspan.ops.dense import eigh

# A float32 Gram, off by some 1e-7 of its largest eigenvalue, serves while the last wanted one and the energy left out
# are above this share of the largest and of all: singular values are then off by less than 1e-6 of the largest.
FAST_FLOOR = 1e-4
# A float64 Gram serves float64 data down to here. Below, all directions are kept: the Gram of X^T U has columns of
# graded lengths, which its root resolves each to its own precision.
GRADED_FLOOR = 1e-8


def gram_ranges(jobs: Sequence[Job], backend: str | None) -> list[Range]:
    """Give what to project each matrix on; all have equally many rows.

    Sums in float32 where those carry far enough, else in float64. The energy left out is the sum of the eigenvalues
    that are not wanted, so small differences of large numbers do not enter.
    """
    found = _attempt(jobs, [not job.is_double for job in jobs], "f32", backend)
    again = _attempt(jobs, [r is None for r in found], "f64", backend)
    return [r for pair in zip(found, again, strict=True) for r in pair if r is not None]


def _attempt(jobs: Sequence[Job], chosen: Sequence[bool], precision: str, backend: str | None) -> list[Range | None]:
    """Find the ranges of the chosen jobs; None for the others, and where the precision does not suffice."""
    places = [i for i, wanted in enumerate(chosen) if wanted]
    found: list[Range | None] = [None] * len(jobs)
    if not places:
        return found
    grams = gram_many([jobs[i].x for i in places], precision=precision, backend=backend)
    values, vectors = eigh(torch.stack(grams))
    for i, gram, value, vector in zip(places, grams, values.clamp(min=0), vectors, strict=True):
        total = float(gram.diagonal().sum())
        if precision == "f64":
            check_total(jobs[i], total)
            found[i] = _double_range(jobs[i], value, vector, total)
        elif suits_float32(jobs[i], total):
            found[i] = _fast_range(jobs[i], value, vector, total)
    return found


def _wanted(job: Job, values: Tensor) -> int:
    return min(job.goal.count(values, float(values.sum())), *job.x.shape)


def _fast_range(job: Job, values: Tensor, vectors: Tensor, total: float) -> Range | None:
    wanted = _wanted(job, values)
    left = float(values[wanted:].sum())
    if wanted and float(values[wanted - 1]) < FAST_FLOOR * float(values[0]):
        return None
    if wanted < len(values) and left < FAST_FLOOR * total:
        return None
    return Range(vectors[:, :wanted], "f32", power_of_two(total), total, left)


def _double_range(job: Job, values: Tensor, vectors: Tensor, total: float) -> Range:
    wanted = _wanted(job, values)
    scale = power_of_two(total)
    if job.is_double and wanted and float(values[wanted - 1]) < GRADED_FLOOR * float(values[0]):
        return Range(vectors, "f64", scale, total, 0.0)
    present = int((values[:wanted] > job.smallest**2 * values[:1]).sum())
    return Range(vectors[:, :present], "f64", scale, total, float(values[present:].sum()))
