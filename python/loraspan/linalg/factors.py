"""Orthonormal bases for the rows of many matrices of one size: Cholesky QR, in as many passes as each needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from loraspan.linalg.roots import gram_root
from loraspan.ops.blocks import CPU, RowBlocks
from loraspan.ops.combine import combine_many
from loraspan.ops.dense import Root, eigh
from loraspan.ops.gram import gram, gram_many
from loraspan.ops.places import backend_at
from loraspan.ops.reconstruct import Piece, reconstruct, reconstruct_many

# N matrices [R, d]: one tensor, or a list of row blocks.
Rows: TypeAlias = "Tensor | list[RowBlocks]"

UNIT = 2.0**-53
# The second pass restores what the first one lost. Rows that depend on each other up to rounding come out of it as
# noise; the third makes that orthogonal to the others, of which it then says nothing.
_PASSES = 3


class Part(NamedTuple):
    """Some ``members`` of a batch: their ``rows^T inverse`` are orthonormal, with zero columns where rank lacks."""

    members: list[int]
    rows: Rows
    inverse: Tensor


class Factors(NamedTuple):
    """``X^T = Q r`` for N matrices ``X [R, d]``: ``r [N, R, R]``, the norms ``[N, R]`` of rows, and ``Q`` in parts."""

    r: Tensor
    norms: Tensor
    parts: list[Part]

    def vectors(self, coefficients: Tensor, dtype: torch.dtype, backend: str | None) -> Tensor:
        """Give the columns of ``Q @ coefficients [N, R, k]`` as rows ``[N, k, d]``, rounded once to ``dtype``."""
        formed = []
        for members, rows, inverse in self.parts:
            mine = coefficients if len(self.parts) == 1 else coefficients[members]
            formed.append(form(rows, reconstruct(inverse, mine, backend=backend_at(CPU, backend)), dtype, backend))
        if len(formed) == 1:
            return formed[0]
        out = formed[0].new_empty(coefficients.shape[0], *formed[0].shape[1:])
        for part, vectors in zip(self.parts, formed, strict=True):
            out[part.members] = vectors
        return out


def rounding_share(rows: int) -> float:
    """Say what share of ``sum |weight_j| |left_j| |right_j|`` rounding in float64 may add to a singular value."""
    return 8 * rows * UNIT


def grams(rows: Rows, backend: str | None) -> Tensor:
    """Give ``X X^T [N, R, R]`` of every matrix, summed in float64."""
    if isinstance(rows, Tensor):
        return gram(rows, precision="f64", backend=backend_at(rows.device, backend))
    return torch.stack(gram_many(rows, precision="f64", backend=backend))


def form(rows: Rows, weights: Tensor, dtype: torch.dtype, backend: str | None) -> Tensor:
    """Give ``weights^T X [N, k, d]`` for ``weights [N, R, k]``, summed in float64 and rounded once to ``dtype``."""
    if isinstance(rows, Tensor):
        here = backend_at(rows.device, backend)
        return reconstruct(weights.mT.to(rows.device), rows, dtype=dtype, backend=here)
    device = rows[0].device
    out = torch.empty(len(rows), weights.shape[-1], rows[0].columns, dtype=dtype, device=device)
    if len(rows[0].blocks) == 1 and rows[0].target is None:
        places = zip(weights.mT.to(device), rows, out, strict=True)
        pieces = [Piece(w, x.blocks[0], place) for w, x, place in places]
        reconstruct_many(pieces, backend=backend_at(device, backend))
        return out
    pairs = list(zip(rows, weights, strict=True))
    sums = combine_many(pairs, dtype=dtype, precision="f64", products=False, backend=backend)
    for place, combined in zip(out, sums, strict=True):
        place.copy_(combined.v.mT)
    return out


def orthonormal_factors(rows: Rows, gram_: Tensor, limit: float, backend: str | None) -> Factors:
    """Give orthonormal bases and roots of matrices whose Grams ``[N, R, R]`` are known.

    A Gram squares the condition number: where the root that it gives is spread wider than ``limit``, the rows are
    multiplied by its inverse, in float64, and their own Gram corrects it. That leaves errors of the size of those of
    Householder QR, whatever the condition.

    Source:
        Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, *Roundoff error analysis of the CholeskyQR2 algorithm*, 2015. By
        eigenvectors: Stathopoulos, Wu, *A block orthogonalization procedure with constant synchronization
        requirements*, 2002 (SVQB), which sets small eigenvalues to their rounding too.
    """
    norms = gram_.diagonal(dim1=-2, dim2=-1).sqrt()
    small = backend_at(CPU, backend)
    found, parts = torch.empty_like(gram_), []
    which, before = list(range(gram_.shape[0])), None
    for turn in range(_PASSES):
        r, inverse, spread = _root(gram_, backend)
        hard = [j for j, wide in enumerate(spread) if wide > limit and turn < _PASSES - 1]
        easy = [j for j in range(len(which)) if j not in set(hard)]
        if easy:
            members = [which[j] for j in easy]
            parts.append(Part(members, _pick(rows, easy), inverse[easy]))
            found[members] = r[easy] if before is None else reconstruct(r[easy], before[easy], backend=small)
        if not hard:
            break
        r, inverse = _graded_root(gram_[hard], backend)
        before = r if before is None else reconstruct(r, before[hard], backend=small)
        which, rows = [which[j] for j in hard], _multiplied(_pick(rows, hard), inverse, backend)
        gram_ = grams(rows, backend)
    return Factors(found, norms, parts)


def _multiplied(rows: Rows, inverse: Tensor, backend: str | None) -> Rows:
    """Give ``inverse^T X`` in float64, to be computed with where ``X`` was."""
    formed = form(rows, inverse, torch.float64, backend)
    target = None if isinstance(rows, Tensor) else rows[0].target
    return formed if target is None else [RowBlocks([x]).on(target) for x in formed]


def _pick(rows: Rows, members: Sequence[int]) -> Rows:
    """Give some of the matrices, without a copy."""
    if len(members) == len(rows):
        return rows
    return [RowBlocks([rows[j]]) if isinstance(rows, Tensor) else rows[j] for j in members]


def _root(gram_: Tensor, backend: str | None) -> tuple[Tensor, Tensor, list[float]]:
    """Give roots and inverses of Grams ``[N, R, R]``, and the largest squared entry of each inverse, once scaled.

    That is infinite where a direction was taken for absent.
    """
    r, inverse = gram_root(gram_, backend=backend)
    diagonal = gram_.diagonal(dim1=-2, dim2=-1)
    # r @ inverse projects on what was found
    lost = (r * inverse.mT).sum((-2, -1)).round() < (diagonal > 0).sum(-1)
    spread = (inverse.square() * diagonal.unsqueeze(-1)).amax((-2, -1))
    return r, inverse, spread.masked_fill(lost, math.inf).tolist()


def _graded_root(gram_: Tensor, backend: str | None) -> Root:
    """Give roots by eigenvectors that keep every direction, those below the rounding of the Gram as if they were at it.

    Multiplying rows by such an inverse, and that by the root, loses no digits, which holds for no triangular root: its
    inverse mixes large entries that cancel.
    """
    scale = gram_.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1)
    safe = torch.where(scale > 0, scale, 1)
    values, vectors = eigh(gram_ / safe / safe.mT, backend=backend)
    root = values.maximum(gram_.shape[-1] * 2 * UNIT * values[:, :1]).sqrt().unsqueeze(-2)
    return Root(root.mT * vectors.mT * scale.mT, vectors / root / safe)
