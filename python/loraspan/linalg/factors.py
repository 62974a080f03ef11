"""Orthonormal bases of the rows of many matrices that lie in blocks: Cholesky QR, in as many passes as each needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.ops.blocks import RowBlocks
from loraspan.ops.combine import combine_many
from loraspan.ops.dense import gram_root
from loraspan.ops.gram import gram_many
from loraspan.ops.reconstruct import Piece, reconstruct, reconstruct_many

UNIT = 2.0**-53
# The second pass restores what the first one lost; a third is for rows that depend on each other up to rounding.
_PASSES = 3
# As a share of the diagonal and times n^2: lifts every direction of a scaled Gram above the rank floor of gram_root.
_SHIFT = 4e-15


class Factor(NamedTuple):
    """``X^T = (rows^T inverse) r``, ``rows^T inverse`` orthonormal (zero where rank lacks); ``norms`` of X's rows."""

    rows: RowBlocks
    r: Tensor
    inverse: Tensor
    norms: Tensor


def alike(keys: Sequence[object]) -> list[list[int]]:
    """Give the places of each value, in order."""
    places: dict[object, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    return list(places.values())


def rounding_share(rows: int) -> float:
    """Say what share of ``sum |weight_j| |left_j| |right_j|`` rounding in float64 may add to a singular value."""
    return 8 * rows * UNIT


def orthonormal_factors(
    rows: Sequence[RowBlocks], grams: Sequence[Tensor], limits: Sequence[float], backend: str | None
) -> list[Factor]:
    """Give an orthonormal basis and a root for every matrix, by Cholesky QR in as many passes as it needs.

    A Gram squares the condition number: where the root that it gives is spread wider than ``limits``, the rows are
    multiplied by its inverse, in float64, and their own Gram corrects it. That leaves errors of the size of those of
    Householder QR, whatever the condition.

    Source:
        Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, *Roundoff error analysis of the CholeskyQR2 algorithm*, 2015. The
        shift: Fukaya, Kannan, Nakatsukasa, Yamamoto, Yanagisawa, *Shifted Cholesky QR*, 2020.
    """
    found: dict[int, Factor] = {}
    now, todo = list(rows), list(range(len(rows)))
    for turn in range(_PASSES):
        again: list[int] = []
        for places in alike([g.shape[0] for g in grams]):
            before = [found[todo[p]] for p in places] if turn else []
            r, inverse, norms, spread = _root(torch.stack([grams[p] for p in places]), before, backend)
            for j, p in enumerate(places):
                found[todo[p]] = Factor(now[todo[p]], r[j], inverse[j], norms[j])
                if spread[j] > limits[todo[p]]:
                    again.append(todo[p])
        if not again or turn == _PASSES - 1:
            break
        todo = sorted(again)
        jobs = [(now[i], found[i].inverse, None) for i in todo]
        for i, q in zip(todo, form(jobs, torch.float64, backend), strict=True):
            now[i] = RowBlocks([q])
        grams = gram_many([now[i] for i in todo], precision="f64", backend=backend)
    return [found[i] for i in range(len(rows))]


def _root(gram: Tensor, before: Sequence[Factor], backend: str | None) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """Take the roots of Grams ``[N, R, R]``; ``before`` are the factors whose inverses made the rows of these Grams.

    Gives ``r`` with what was found before in it, ``inverse``, the norms of the first rows, and the largest squared
    entry of each inverse, once scaled.
    """
    size = gram.shape[-1]
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    if before:
        earlier, norms = torch.stack([f.r for f in before]), torch.stack([f.norms for f in before])
        # a row that carries no more of the first rows, scaled to one, than their rounding is noise
        share = (earlier / torch.where(norms > 0, norms, 1).unsqueeze(-2)).square().sum(-1)
        noise = gram.diagonal(dim1=-2, dim2=-1) * share <= rounding_share(size) ** 2
        gram = gram.masked_fill(noise.unsqueeze(-1) | noise.unsqueeze(-2), 0)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    root = gram_root(gram, backend=backend)
    # r @ inverse projects on what was found: where that is not every row that is not zero, a direction was lost
    lost = (root.r * root.inverse.mT).sum((-2, -1)).round() < (diagonal > 0).sum(-1)
    if bool(lost.any()):
        shifted = gram[lost] + torch.diag_embed(_SHIFT * size**2 * diagonal[lost])
        root.r[lost], root.inverse[lost] = gram_root(shifted, backend=backend)
    r = reconstruct(root.r, earlier, backend=backend) if before else root.r
    return r, root.inverse, norms, (root.inverse.square() * diagonal.unsqueeze(-1)).amax((-2, -1)).tolist()


def form(
    jobs: Sequence[tuple[RowBlocks, Tensor, Tensor | None]], dtype: torch.dtype, backend: str | None
) -> list[Tensor]:
    """Give ``w^T X [k, d]`` for every ``X [R, d]``, ``w [R, k]``, in float64; written where the third says, if any."""
    out, pieces, stacked = [], [], []
    for x, w, place in jobs:
        target = torch.empty(w.shape[1], x.columns, dtype=dtype, device=x.device) if place is None else place
        out.append(target)
        if len(x.blocks) == 1:
            pieces.append(Piece(w.mT.to(target.device), x.blocks[0], target))
        else:
            stacked.append((x, w, target))
    reconstruct_many(pieces, backend=backend)
    pairs = [(x, w) for x, w, _ in stacked]
    sums = combine_many(pairs, dtype=dtype, precision="f64", products=False, backend=backend)
    for (_, _, target), combined in zip(stacked, sums, strict=True):
        target.copy_(combined.v.mT)
    return out
