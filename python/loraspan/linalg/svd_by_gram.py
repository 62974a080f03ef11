"""Leading left vectors of matrices with few rows, from their Grams: exact, in one pass over the entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.linalg.roots import orthonormalize
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
    stacked = torch.stack(grams)
    totals = stacked.diagonal(dim1=1, dim2=2).sum(1).tolist()
    values, vectors = eigh(stacked, backend=backend)
    values = values.clamp(min=0)
    spectra = _spectra([jobs[i] for i in places], values)
    for i, total, value, vector, spectrum in zip(places, totals, values, vectors, spectra, strict=True):
        if precision == "f64":
            check_total(jobs[i], total)
            found[i] = _double_range(jobs[i], vector, spectrum, total, backend)
        elif suits_float32(jobs[i], total) and spectrum.carries_float32(total, len(vector)):
            s = value[: spectrum.wanted].sqrt()
            found[i] = Range(vector[:, : spectrum.wanted], "f32", power_of_two(total), total, spectrum.left, s)
    return found


class _Spectrum(NamedTuple):
    """What decides: how many are wanted, how many of those exist, the first and the last of them, and what is left."""

    wanted: int
    present: int
    first: float
    last: float
    left: float
    left_of_present: float

    def carries_float32(self, total: float, count: int) -> bool:
        """Say whether the error of a float32 Gram is far below all that matters here."""
        return self.last >= FAST_FLOOR * self.first and (self.wanted == count or self.left >= FAST_FLOOR * total)


def _spectra(jobs: Sequence[Job], values: Tensor) -> list[_Spectrum]:
    """Read the eigenvalues ``[b, R]``, descending, of all matrices at once."""
    # from the smallest up, so that a small rest is not a difference of large sums
    rests = torch.cat([values.flip(1).cumsum(1).flip(1), values.new_zeros(len(values), 1)], 1)
    most = [min(job.x.shape) for job in jobs]
    wanted = [min(pair) for pair in zip(jobs[0].goal.counts(values, rests[:, 0]), most, strict=True)]
    floors = torch.tensor([job.smallest**2 for job in jobs], dtype=torch.float64) * values[:, 0]
    present = (values > floors.unsqueeze(1)).sum(1).tolist()
    present = [min(pair) for pair in zip(wanted, present, strict=True)]
    rows = torch.arange(len(values))
    last = values[rows, torch.tensor(wanted).clamp(min=1) - 1].tolist()
    left, left_of_present = (rests[rows, torch.tensor(counts)].tolist() for counts in (wanted, present))
    return [
        _Spectrum(*parts)
        for parts in zip(wanted, present, values[:, 0].tolist(), last, left, left_of_present, strict=True)
    ]


def _double_range(job: Job, vectors: Tensor, spectrum: _Spectrum, total: float, backend: str | None) -> Range:
    scale = power_of_two(total)
    left = spectrum.left_of_present
    if job.is_double and spectrum.wanted and spectrum.last < GRADED_FLOOR * spectrum.first:
        left = 0.0
    else:
        vectors = vectors[:, : spectrum.present]
    # eigenvectors are orthonormal to some tens of units, which would all show in the singular values
    return Range(orthonormalize(vectors, backend=backend), "f64", scale, total, left)
