"""What both ways to a truncated SVD share: the matrix and the goal, the range they find, and the projection on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan import _native
from loraspan.errors import ArgumentError, NotFiniteError
from loraspan.linalg.roots import gram_root
from loraspan.linalg.svd import SVD, column_signs
from loraspan.ops import Piece, RowBlocks, combine_many, gram, reconstruct, reconstruct_many
from loraspan.ops.blocks import CPU
from loraspan.ops.dense import Root, svd
from loraspan.ops.places import backend_at, carried, off_metal


@dataclass(frozen=True)
class Goal:
    """How many triplets: ``rank`` of them, or as few as leave at most the share ``loss`` of the energy out."""

    rank: int | None
    loss: float = 0.0

    def counts(self, energies: Tensor, totals: Tensor) -> list[int]:
        """Say how many of ``energies [b, l]``, descending, each of ``b`` matrices wants: all if they do not suffice."""
        count, most = energies.shape
        if self.rank is not None:
            return [min(self.rank, most)] * count
        left = totals.unsqueeze(1) - torch.cat([energies.new_zeros(count, 1), energies.cumsum(1)], 1)
        short = (left > self.loss * totals.unsqueeze(1)).to(torch.int64).cumprod(1)
        found: list[int] = short.sum(1).clamp(max=most).tolist()
        return found


@dataclass(frozen=True)
class Job:
    """One matrix ``X [R, d]``, what is wanted of it, and the places of its vectors where those are settled."""

    name: str
    x: RowBlocks
    goal: Goal
    flipped: bool = False  # X is the transpose of what the caller gave
    places: tuple[Tensor, Tensor] | None = None  # of u [R, k] and v [d, k]

    @cached_property
    def is_double(self) -> bool:
        """Whether a block is float64: then so are results and sums."""
        return any(b.dtype == torch.float64 for b in self.x.blocks)

    @cached_property
    def smallest(self) -> float:
        """The share of the largest singular value up to which one is rounding and counts as absent."""
        return 4 * math.sqrt(min(self.x.shape)) * 2.0**-53 if self.is_double else 4 * 2.0**-24


# Where the inverse root of columns made unit ones has a larger entry than this, they are orthonormalized twice.
_MOST_SPREAD = 1.5


class Range(NamedTuple):
    """Orthonormal ``w [R, l]`` that the matrix is projected on.

    ``left`` is the energy outside of ``w`` where that is known better than as a difference from ``total``; ``scale`` is
    a power of two that takes the matrix to a norm near 1. ``s [l]``, if there, says that the columns of ``w`` are left
    singular vectors, all of them wanted, and ``s`` their values, as far as float32 tells.
    """

    w: Tensor
    precision: str
    scale: float
    total: float
    left: float | None = None
    s: Tensor | None = None


def check_total(job: Job, total: float) -> None:
    """Refuse a matrix whose energy is not finite."""
    if math.isfinite(total):
        return
    if all(bool(off_metal(b).isfinite().all()) for b in job.x.blocks):
        raise ArgumentError(f"{job.name} has entries whose squares pass float64; divide it by a power of two first")
    raise NotFiniteError(f"{job.name} holds a NaN or an infinity; it needs finite entries")


def suits_float32(job: Job, total: float) -> bool:
    """Say whether float32 holds the squares of the entries: not where they are float64, or huge or tiny."""
    low, high = float32_range(job.x.shape)
    return not job.is_double and low <= total <= high


def float32_range(shape: Sequence[int]) -> tuple[float, float]:
    """Give the least and the largest energy of a matrix the squares of whose entries float32 holds."""
    entries = math.prod(shape)
    return 1e-24 * entries, 1e30 * entries


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
    grams = torch.stack([image.vtv for image in images])
    bases, root = _orthonormal([image.v for image in images], grams, precision, backend)
    inner = svd(root.r.mT, backend=backend)
    # stacked, but for one tall block, which a copy would double
    w = torch.stack([r.w for r in ranges]) if len(ranges) > 1 else ranges[0].w.unsqueeze(0)
    left = reconstruct(w, inner.u.to(w.device), backend=backend_at(w.device, backend))
    right = reconstruct(root.inverse, inner.v, backend=backend_at(CPU, backend))
    signs = column_signs(left).unsqueeze(-2)
    left, right = left.mul_(signs), (right * signs.to(right.device)).to(dtype)
    s = inner.s / torch.tensor([r.scale for r in ranges], dtype=torch.float64).unsqueeze(1)
    writes, found = _Writes(), []
    for i, (job, keep, rest) in enumerate(zip(jobs, *_kept(jobs, ranges, s), strict=True)):
        u, v = places = job.places or _new_places(job, keep)
        loadings = right[i, :, :keep]
        if dtype == torch.float64:
            loadings = _nearer_orthonormal(grams[i], loadings, backend)
        writes.add(left[i, :, :keep], None, u[:, :keep])
        writes.add(bases[i], loadings, v[:, :keep])
        found.append(_result(s[i, :keep], places, rest))
    writes.run(backend)
    return [_turned(job, svd_) for job, svd_ in zip(jobs, found, strict=True)]


def _nearer_orthonormal(gram_: Tensor, loadings: Tensor, backend: str | None) -> Tensor:
    """Take a Newton step that makes ``B loadings`` orthonormal, where ``gram_`` is ``B^T B``.

    Rotations add their roundings up in the lengths of what they turn: by as many as there are columns, not as are kept.
    """
    here = backend_at(CPU, backend)
    off = -reconstruct(loadings.mT, reconstruct(gram_, loadings, backend=here), backend=here)
    off.diagonal().add_(1)
    return loadings + reconstruct(loadings, off, scale=0.5, backend=here)


class _Writes:
    """Products taken where their bases lie, in one call to a device, and put where they belong."""

    def __init__(self) -> None:
        self._pieces: dict[torch.device, list[Piece]] = {}
        self._moves: list[tuple[Tensor, Tensor]] = []

    def add(self, basis: Tensor, loadings: Tensor | None, out: Tensor) -> None:
        """Ask for ``basis @ loadings``, or ``basis`` itself, in ``out``."""
        device = basis.device
        if out.device != device:
            self._moves.append((out, torch.empty(out.shape, dtype=out.dtype, device=device)))
            out = self._moves[-1][1]
        if loadings is not None and loadings.device != device:
            loadings = loadings.to(device)
        self._pieces.setdefault(device, []).append(Piece(basis, loadings, out))

    def run(self, backend: str | None) -> None:
        """Do all of it."""
        for device, pieces in self._pieces.items():
            reconstruct_many(pieces, backend=backend_at(device, backend))
        for out, found in self._moves:
            out.copy_(found.to(out.device))


def _kept(jobs: Sequence[Job], ranges: Sequence[Range], s: Tensor) -> tuple[list[int], Tensor]:
    """Say how many of ``s [b, l]`` each matrix keeps, and the energy that this leaves out."""
    energies = s.square()
    totals = torch.tensor([r.total for r in ranges], dtype=torch.float64)
    smallest = torch.tensor([job.smallest for job in jobs], dtype=torch.float64)
    present = (s > (smallest * s[:, 0]).unsqueeze(1)).sum(1).tolist()
    # the goal is one for all jobs of a call
    keep = [min(pair) for pair in zip(jobs[0].goal.counts(energies, totals), present, strict=True)]
    kept = torch.arange(s.shape[1]) < torch.tensor(keep).unsqueeze(1)
    known = torch.tensor([math.nan if r.left is None else r.left for r in ranges], dtype=torch.float64)
    as_difference = totals - (energies * kept).sum(1)
    rest = torch.where(known.isnan(), as_difference, known + (energies * ~kept).sum(1))
    return keep, rest.clamp(min=0)


def _orthonormal(blocks: list[Tensor], grams: Tensor, precision: str, backend: str | None) -> tuple[list[Tensor], Root]:
    """Give ``blocks`` and the roots with which ``block @ inverse`` is orthonormal to roundoff, ``r`` that of the Grams.

    A Gram loses the square of the condition number of its columns made unit ones. Where that is too much, the block is
    made nearly orthonormal with the root, measured again, and the two roots are multiplied: CholeskyQR2. ``blocks`` and
    ``grams`` are then the new ones.
    """
    root = gram_root(grams, backend=backend)
    lengths = torch.linalg.vector_norm(root.r, dim=-2).unsqueeze(-1)
    spread = (lengths * root.inverse).abs().amax((-2, -1))
    for i in (spread > _MOST_SPREAD).nonzero().flatten().tolist():
        here = backend_at(blocks[i].device, backend)
        inverse = carried(root.inverse[i], blocks[i].device, blocks[i].dtype)
        blocks[i] = reconstruct(blocks[i], inverse, backend=here)
        grams[i] = gram([blocks[i].T], precision=precision, backend=here)
        again = gram_root(grams[i], backend=backend)
        root.r[i] = reconstruct(again.r, root.r[i], backend=backend_at(CPU, backend))
        root.inverse[i] = again.inverse
    return blocks, root


# Gram entries of unit vectors off by less are theirs to 8 units of roundoff: vectors as orthonormal as they need to be.
_ORTHONORMAL = 8 * 2.0**-24


def are_settled(grams: Tensor, s: Tensor) -> Tensor:
    """Say which vectors, of Grams ``[b, k, k]``, are orthonormal enough, and have their values ``[b, k]`` in order."""
    off = (grams - torch.eye(s.shape[1], dtype=torch.float64)).abs().amax((-2, -1))
    # rounding may have put neighbours in the wrong order
    return (off <= _ORTHONORMAL) & (s.diff(dim=1) <= 0).all(1)


def project_vectors(jobs: Sequence[Job], ranges: Sequence[Range], backend: str | None) -> list[SVD]:
    """Do :func:`project` where ``w`` are singular vectors already: ``v = X^T W / s`` goes straight to its place.

    Its Gram is measured. Where that shows that float32 did not tell vectors apart well enough, they are turned.
    """
    s = torch.stack([r.s for r in ranges if r.s is not None])
    w = torch.stack([r.w for r in ranges])
    w = w * column_signs(w).unsqueeze(-2)
    places = [job.places or _new_places(job, r.w.shape[1]) for job, r in zip(jobs, ranges, strict=True)]
    count = s.shape[1]
    pairs = [(job.x, weights) for job, weights in zip(jobs, w / s.unsqueeze(-2), strict=True)]
    out = [v[:, :count] for _, v in places]
    images = combine_many(pairs, precision="f32", products=False, out=out, backend=backend)
    grams = torch.stack([image.vtv for image in images])
    s = s * grams.diagonal(dim1=-2, dim2=-1).sqrt()
    fine = are_settled(grams, s).tolist()
    found = []
    for i, (job, r, (u, v)) in enumerate(zip(jobs, ranges, places, strict=True)):
        if fine[i]:
            u[:, :count] = w[i] if u.is_cpu else carried(w[i], u.device, u.dtype)
            assert r.left is not None, "a Gram says what it leaves"
            found.append(_turned(job, _result(s[i], (u, v), torch.tensor(r.left, dtype=torch.float64))))
        else:
            found.append(project([replace(job, places=(u, v))], [r], backend)[0])
    return found


def nothing(job: Job, total: float) -> SVD:
    """Give the result of a matrix of which nothing is kept."""
    u, v = job.places or _new_places(job, 0)
    return _turned(job, _result(torch.zeros(0, dtype=torch.float64), (u, v), torch.tensor(total, dtype=torch.float64)))


def _new_places(job: Job, keep: int) -> tuple[Tensor, Tensor]:
    rows, columns = job.x.shape
    dtype = torch.float64 if job.is_double else torch.float32
    # the long side column after column, as it is made
    return (
        torch.empty(rows, keep, dtype=dtype, device=job.x.device),
        _native.in_huge_pages(torch.empty(keep, columns, dtype=dtype, device=job.x.device)).T,
    )


def _result(s: Tensor, places: tuple[Tensor, Tensor], discarded: Tensor) -> SVD:
    """Put the parts together; what a place has beyond ``s`` is zero."""
    u, v = places
    keep, places_held = s.shape[0], u.shape[1]
    if keep < places_held:
        u[:, keep:] = 0
        v[:, keep:] = 0
        s = torch.cat([s, s.new_zeros(places_held - keep)])
    return SVD(u, s.to(u.dtype) if u.is_cpu else carried(s, u.device, u.dtype), v.mT, discarded)


def _turned(job: Job, found: SVD) -> SVD:
    """Give the decomposition of what the caller gave, its signs settled by ``u``."""
    if not job.flipped:
        return found
    u, v = found.vh.mT, found.u
    signs = column_signs(u)
    u *= signs
    v *= signs
    return SVD(u, found.s, v.mT, found.discarded)
