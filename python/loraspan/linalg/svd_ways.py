"""The choice of a way to a truncated SVD, and of what goes it together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loraspan.linalg.svd import SVD
from loraspan.linalg.svd_by_gram import gram_ranges
from loraspan.linalg.svd_by_sketch import svd_by_sketch
from loraspan.linalg.svd_range import Goal, Job, check_total, nothing, project, project_vectors
from loraspan.ops import squares, stream
from loraspan.ops.stream import held

# Up to so many rows the Gram is taken whatever the counts say: it is exact, and small work costs more in calls.
_GRAM_ROWS = 256
# An eigendecomposition of R rows takes as long as this many operations of a pass, times R^3.
_EIGH_COST = 60
# Matrices are taken in groups of about so many bytes, which share the cost of the calls and bound their memory. On a
# GPU calls cost more; what is sent to one goes once if it is no more than a chunk.
_GROUP_BYTES = 64 << 20
_GROUP_BYTES_ON_GPU = 1 << 30


class Solver:
    """Decompose jobs, each by the way its shape asks for, together where that is faster."""

    def __init__(self, oversample: int, power_iterations: int, seed: int, backend: str | None) -> None:
        self.oversample = oversample
        self.power_iterations = power_iterations
        self.seed = seed
        self.backend = backend

    def __call__(self, jobs: Sequence[Job]) -> list[SVD]:
        """Decompose all of them."""
        found: dict[int, SVD] = {}
        by_rows: dict[int, list[int]] = {}
        for i, job in enumerate(jobs):
            if 0 in job.x.shape or job.goal.rank == 0:
                total = float(squares(job.x, backend=self.backend).sum())
                check_total(job, total)
                found[i] = nothing(job, total)
            elif self.takes_gram(job.x.shape, job.goal):
                by_rows.setdefault(job.x.shape[0], []).append(i)
            else:
                with held([job.x]):
                    found[i] = svd_by_sketch(job, self.oversample, self.power_iterations, self.seed, self.backend)
        for members in by_rows.values():
            for group in _groups(jobs, members):
                found.update(zip(group, self._by_gram([jobs[i] for i in group]), strict=True))
        return [found[i] for i in range(len(jobs))]

    def takes_gram(self, shape: tuple[int, int], goal: Goal) -> bool:
        """Count the operations of both ways; by the matrix and the goal alone, never by its company."""
        rows, columns = shape
        if rows <= _GRAM_ROWS:
            return True
        wanted = 32 if goal.rank is None else goal.rank
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
