"""What both ways to a truncated SVD share: the matrix and the goal, the range they find, and the projection on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.errors import ArgumentError, NotFiniteError
from loraspan.linalg.svd import SVD, column_signs
from loraspan.ops import Piece, RowBlocks, combine_many, gram, reconstruct, reconstruct_many
from loraspan.ops.dense import Root, gram_root, svd


@dataclass(frozen=True)
class Goal:
    """How many triplets: ``rank`` of them, or as few as leave at most the share ``loss`` of the energy out."""

    rank: int | None
    loss: float = 0.0

    def count(self, energies: Tensor, total: float) -> int:
        """Say how many of ``energies``, descending, are wanted: all of them if they do not suffice."""
        if self.rank is not None:
            return min(self.rank, len(energies))
        left = total - torch.cat([energies.new_zeros(1), energies.cumsum(0)])
        enough = (left <= self.loss * total).nonzero()
        return int(enough[0]) if len(enough) else len(energies)


@dataclass(frozen=True)
class Job:
    """One matrix ``X [R, d]``, what is wanted of it, and the places of its vectors where those are settled."""

    name: str
    x: RowBlocks
    goal: Goal
    flipped: bool = False  # X is the transpose of what the caller gave
    places: tuple[Tensor, Tensor] | None = None  # of u [R, k] and v [d, k]

    @property
    def is_double(self) -> bool:
        """Whether a block is float64: then so are results and sums."""
        return any(b.dtype == torch.float64 for b in self.x.blocks)

    @property
    def smallest(self) -> float:
        """The share of the largest singular value up to which one is rounding and counts as absent."""
        return 4 * math.sqrt(min(self.x.shape)) * 2.0**-53 if self.is_double else 4 * 2.0**-24


# Where the inverse root of columns made unit ones has a larger entry than this, they are orthonormalized twice.
_MOST_SPREAD = 1.5


class Range(NamedTuple):
    """Orthonormal ``w [R, l]`` that the matrix is projected on.

    ``left`` is the energy outside of ``w`` where that is known better than as a difference from ``total``; ``scale`` is
    a power of two that takes the matrix to a norm near 1.
    """

    w: Tensor
    precision: str
    scale: float
    total: float
    left: float | None = None


def check_total(job: Job, total: float) -> None:
    """Refuse a matrix whose energy is not finite."""
    if math.isfinite(total):
        return
    if all(bool(b.isfinite().all()) for b in job.x.blocks):
        raise ArgumentError(f"{job.name} has entries whose squares pass float64; divide it by a power of two first")
    raise NotFiniteError(f"{job.name} holds a NaN or an infinity; it needs finite entries")


def suits_float32(job: Job, total: float) -> bool:
    """Say whether float32 holds the squares of the entries: not where they are float64, or huge or tiny."""
    rows, columns = job.x.shape
    return not job.is_double and 1e-24 * rows * columns <= total <= 1e30 * rows * columns


def power_of_two(energy: float) -> float:
    """Give a power of two near ``1 / sqrt(energy)``; 1 where there is none."""
    return 2.0 ** -math.frexp(math.sqrt(energy))[1] if energy > 0 else 1.0


def project(jobs: Sequence[Job], ranges: Sequence[Range], backend: str | None) -> list[SVD]:
    r"""Give the singular value decomposition of ``W W^T X``, cut to what is wanted, for ranges of one width.

    ``X^T W`` is formed once and its Gram measured as stored: with ``G = R^T R`` and ``R^T = a diag(s) b^T``, the
    vectors are ``W a`` and ``X^T W R^-1 b``.
    """
    precision = ranges[0].precision
    dtype = torch.float64 if precision == "f64" else torch.float32
    pairs = [(job.x, r.w * r.scale) for job, r in zip(jobs, ranges, strict=True)]
    images = combine_many(pairs, dtype=dtype, precision=precision, products=False, backend=backend)
    bases, root = _orthonormal([image.v for image in images], torch.stack([image.vtv for image in images]), precision)
    inner = svd(root.r.mT)
    left = reconstruct(torch.stack([r.w for r in ranges]), inner.u)
    right = reconstruct(root.inverse, inner.v)
    found, pieces = [], []
    for i, (job, r) in enumerate(zip(jobs, ranges, strict=True)):
        s = inner.s[i] / r.scale
        keep = min(job.goal.count(s.square(), r.total), int((s > job.smallest * s[:1]).sum()))
        u, v = places = job.places or _new_places(job, keep)
        signs = column_signs(left[i, :, :keep])
        pieces.append(Piece(left[i, :, :keep] * signs, None, u[:, :keep]))
        pieces.append(Piece(bases[i], (right[i, :, :keep] * signs).to(dtype), v[:, :keep]))
        kept = s[:keep].square().sum()
        rest = r.total - kept if r.left is None else r.left + s[keep:].square().sum()
        found.append(_result(s[:keep], places, rest.clamp(min=0)))
    reconstruct_many(pieces)
    return [_turned(job, svd_) for job, svd_ in zip(jobs, found, strict=True)]


def _orthonormal(blocks: list[Tensor], grams: Tensor, precision: str) -> tuple[list[Tensor], Root]:
    """Give ``blocks`` and the roots with which ``block @ inverse`` is orthonormal to roundoff, ``r`` that of the Grams.

    A Gram loses the square of the condition number of its columns made unit ones. Where that is too much, the block is
    made nearly orthonormal with the root, measured again, and the two roots are multiplied: CholeskyQR2.
    """
    root = gram_root(grams)
    lengths = torch.linalg.vector_norm(root.r, dim=-2).unsqueeze(-1)
    spread = (lengths * root.inverse).abs().amax((-2, -1))
    for i in (spread > _MOST_SPREAD).nonzero().flatten().tolist():
        blocks[i] = reconstruct(blocks[i], root.inverse[i].to(blocks[i].dtype))
        again = gram_root(gram([blocks[i].T], precision=precision))
        root.r[i] = reconstruct(again.r, root.r[i])
        root.inverse[i] = again.inverse
    return blocks, root


def nothing(job: Job, total: float) -> SVD:
    """Give the result of a matrix of which nothing is kept."""
    u, v = job.places or _new_places(job, 0)
    return _turned(job, _result(torch.zeros(0, dtype=torch.float64), (u, v), torch.tensor(total, dtype=torch.float64)))


def _new_places(job: Job, keep: int) -> tuple[Tensor, Tensor]:
    rows, columns = job.x.shape
    dtype = torch.float64 if job.is_double else torch.float32
    return torch.empty(rows, keep, dtype=dtype), torch.empty(columns, keep, dtype=dtype)


def _result(s: Tensor, places: tuple[Tensor, Tensor], discarded: Tensor) -> SVD:
    """Put the parts together; what a place has beyond ``s`` is zero."""
    u, v = places
    u[:, len(s) :] = 0
    v[:, len(s) :] = 0
    padded = torch.zeros(u.shape[1], dtype=u.dtype)
    padded[: len(s)] = s
    return SVD(u, padded, v.mT, discarded)


def _turned(job: Job, found: SVD) -> SVD:
    """Give the decomposition of what the caller gave, its signs settled by ``u``."""
    if not job.flipped:
        return found
    u, v = found.vh.mT, found.u
    signs = column_signs(u)
    u *= signs
    v *= signs
    return SVD(u, found.s, v.mT, found.discarded)
