"""Orthonormal bases for the rows of many matrices of one size: Cholesky QR, in as many passes as each needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from loraspan.ops.blocks import RowBlocks
from loraspan.ops.combine import combine_many
from loraspan.ops.dense import gram_root
from loraspan.ops.gram import gram, gram_many
from loraspan.ops.reconstruct import Piece, reconstruct, reconstruct_many

# N matrices [R, d]: one tensor, or a list of row blocks.
Rows: TypeAlias = "Tensor | list[RowBlocks]"

UNIT = 2.0**-53
# The second pass restores what the first one lost. Rows that depend on each other up to rounding come out of it as
# noise; the third makes that orthogonal to the others, of which it then says nothing.
_PASSES = 3
# As a share of the diagonal and times R^2: lifts every direction of a scaled Gram above the rank floor of gram_root.
_SHIFT = 4e-15


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
            formed.append(form(rows, reconstruct(inverse, mine, backend=backend), dtype, backend))
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
        return gram(rows, precision="f64", backend=backend)
    return torch.stack(gram_many(rows, precision="f64", backend=backend))


def form(rows: Rows, weights: Tensor, dtype: torch.dtype, backend: str | None) -> Tensor:
    """Give ``weights^T X [N, k, d]`` for ``weights [N, R, k]``, summed in float64 and rounded once to ``dtype``."""
    if isinstance(rows, Tensor):
        return reconstruct(weights.mT.to(rows.device), rows, dtype=dtype, backend=backend)
    device = rows[0].device
    out = torch.empty(len(rows), weights.shape[-1], rows[0].columns, dtype=dtype, device=device)
    if len(rows[0].blocks) == 1:
        places = zip(weights.mT.to(device), rows, out, strict=True)
        reconstruct_many([Piece(w, x.blocks[0], place) for w, x, place in places], backend=backend)
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
        Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, *Roundoff error analysis of the CholeskyQR2 algorithm*, 2015. The
        shift: Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, *Shifted Cholesky QR*, 2020.
    """
    norms = gram_.diagonal(dim1=-2, dim2=-1).sqrt()
    which = list(range(gram_.shape[0]))
    r, inverse, spread = _root(gram_, backend)
    found, parts = r, []
    for turn in range(_PASSES):
        hard = [j for j, wide in enumerate(spread) if wide > limit and turn < _PASSES - 1]
        easy = [j for j in range(len(which)) if j not in set(hard)]
        if easy:
            parts.append(Part([which[j] for j in easy], _pick(rows, easy), inverse[easy]))
        if not hard:
            break
        which = [which[j] for j in hard]
        rows = form(_pick(rows, hard), inverse[hard], torch.float64, backend)
        r, inverse, spread = _root(grams(rows, backend), backend)
        found[which] = reconstruct(r, found[which], backend=backend)
    return Factors(found, norms, parts)


def _pick(rows: Rows, members: Sequence[int]) -> Rows:
    """Give some of the matrices, without a copy."""
    if len(members) == len(rows):
        return rows
    return [RowBlocks([rows[j]]) if isinstance(rows, Tensor) else rows[j] for j in members]


def _root(gram_: Tensor, backend: str | None) -> tuple[Tensor, Tensor, list[float]]:
    """Give roots and inverses of Grams ``[N, R, R]``, and the largest squared entry of each inverse, once scaled."""
    r, inverse = gram_root(gram_, backend=backend)
    diagonal = gram_.diagonal(dim1=-2, dim2=-1)
    # r @ inverse projects on what was found: where that is not every row that is not zero, a direction was lost
    lost = (r * inverse.mT).sum((-2, -1)).round() < (diagonal > 0).sum(-1)
    if bool(lost.any()):
        shifted = gram_[lost] + torch.diag_embed(_SHIFT * gram_.shape[-1] ** 2 * diagonal[lost])
        r[lost], inverse[lost] = gram_root(shifted, backend=backend)
    return r, inverse, (inverse.square() * diagonal.unsqueeze(-1)).amax((-2, -1)).tolist()
