"""What the shared columns of a slot leave of each task, and the private columns that carry it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraspan.collection.assemble import Part, join_parts
from loraspan.collection.formed import Frame, Stored, form_ends, split_rows, stored_ends
from loraspan.collection.in_turns import coded_in_turns, worth_turns
from loraspan.collection.rows import CODED, Width, flip_rows, values_of
from loraspan.collection.steps import Curve, Ends
from loraspan.collection.weights import rounded
from loraspan.linalg.roots import gram_root
from loraspan.ops.dense import svd

# How often what packed columns leave is packed in more columns, where widths were not chosen for the goal: for tasks
# that come later, and in a refit.
CORRECTIONS = 2
# Coded columns: how often a step is tried, what may be left of the budget, how far below it the next try aims, how near
# a step that is too long is not worth a try between, and by what share the first try after one is shorter at least.
_TRIES, _CLOSE, _AIM, _NEAR, _SHORTER = 8, 0.985, 0.996, 1.004, 0.005


@dataclass(frozen=True)
class Residual:
    """``E_i = F_left,i Z_i F_right,i^T`` for every task of a slot."""

    left: Frame
    right: Frame
    z: Tensor

    def squares(self) -> Tensor:
        """``|E_i|_F^2``, ``[T]``."""
        return (self.z * (self.left.gram @ self.z @ self.right.gram)).sum((-1, -2)).clamp(min=0)

    def svd(self) -> Triplets:
        """Give left coordinates ``[T, ., q]``, singular values ``[T, q]``, right coordinates; unit vectors in space."""
        left, right = gram_root(self.left.gram), gram_root(self.right.gram)
        u, s, v = svd(left.r @ self.z @ right.r.mT)
        return left.inverse @ u, s, right.inverse @ v


def columns_within(s: Tensor, allowed: Tensor) -> Tensor:
    """Give how many leading columns must be kept so that the squares of the rest sum to at most ``allowed``.

    Args:
        s: ``[T, q]``, descending.
        allowed: ``[T]``.

    Example:
        >>> import torch
        >>> columns_within(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([4.9]))
        tensor([2])
    """
    tails = s.square().flip(-1).cumsum(-1).flip(-1)
    return (tails > allowed[:, None]).sum(-1)


Triplets = tuple[Tensor, Tensor, Tensor]
"""Coordinates of left vectors ``[T, ., q]``, singular values ``[T, q]`` and coordinates of right vectors."""


def private_columns(residual: Residual, allowed: Tensor, width: Width, corrections: int = 0) -> tuple[Part, Tensor]:
    """Give the private columns that bring every task's residual down to ``allowed``, and what is left after them.

    Rounding the columns adds to what is left, so it is measured and columns are added until it fits or none are left.
    With ``corrections``, what packing all of them leaves is carried by more columns: 4 bits leave a tenth of a vector,
    and a tenth of that when they hold the difference too.

    Args:
        residual: of all tasks of the slot.
        allowed: ``[T]``: squared Frobenius norm that may remain.
        width: of the private ends.
        corrections: how often what packed columns leave may be packed in more columns.

    Returns:
        Columns of form pp, and ``[T]`` the squared norms that remain, measured for the stored entries.
    """
    part, remains, rest = _carry(residual, allowed, width)
    for _ in range(corrections if isinstance(width, int) else 0):
        short = remains > allowed
        if not short.any():
            break
        more, remains, rest = _carry(rest(short), allowed, width)
        part = join_parts(part, more)
    return part, remains


def _carry(residual: Residual, allowed: Tensor, width: Width) -> tuple[Part, Tensor, Callable[[Tensor], Residual]]:
    """Give columns as :func:`private_columns`, and what gives the residual that they leave, for some of the tasks."""
    left, s, right = residual.svd()
    if width == CODED:
        return _carry_coded(residual, (left, s, right), allowed)
    counts = columns_within(s, allowed)
    while True:
        part, remains, rest = _store(residual, left, right, counts, width)
        short = (remains > allowed) & (counts < s.shape[1])
        if not short.any():
            return part, remains, rest
        # rounding took part of the budget: what may be dropped is what rounding leaves of it
        dropped = _tail(s, counts)
        tighter = columns_within(s, (allowed - (remains - dropped)).clamp(min=0))
        counts = torch.where(short, torch.maximum(tighter, counts + 1), counts)


def _carry_coded(
    residual: Residual, triplets: Triplets, allowed: Tensor
) -> tuple[Part, Tensor, Callable[[Tensor], Residual]]:
    """Look for every task's longest step that leaves ``allowed``: from that of a model, by what is left of it."""
    left, s, right = triplets
    ends = Ends(s, [side.vectors.x.shape[1] for side in (residual.left, residual.right)])
    steps = Curve([ends]).steps_at(allowed)
    # shorter steps that are tried may keep more
    most = ends.costs(steps / 2)[2].sum(-1)
    formed = form_ends(residual.left, left, most), form_ends(residual.right, right, most)
    turns = worth_turns(formed)
    good, bad = torch.zeros_like(steps), torch.full_like(steps, math.inf)
    for i in range(_TRIES):
        kept = ends.costs(steps)[2] & (torch.arange(s.shape[1]) < most[:, None])
        if turns:
            sides = coded_in_turns(formed, s, steps, kept)
        else:
            sides = [side.coded(steps[:, None] / s.clamp(min=1e-300), kept) for side in formed]
        part, remains, rest = _weighed(residual, sides[0], sides[1], kept.sum(-1), allowed)
        fits = remains <= allowed
        good, bad = (
            torch.where(fits, torch.maximum(good, steps), good),
            torch.where(fits, bad, torch.minimum(bad, steps)),
        )
        settled = fits & ((remains >= _CLOSE * allowed) | ~kept.any(-1) | (steps * _NEAR >= bad))
        if settled.all() or i == _TRIES - 1:
            break
        ratio = (_AIM * allowed / remains.clamp(min=1e-300)).sqrt().clamp(0.25, 2.0)
        steps = torch.where(settled, steps, _between(steps * ratio, good, bad, i))
        if i == _TRIES - 2:
            steps = torch.where(good > 0, good, steps)
    return part, remains, rest


def _between(steps: Tensor, good: Tensor, bad: Tensor, tries: int) -> Tensor:
    """Keep steps between one that is good, if there is any, and one that is bad; shorter with every try until then."""
    inside = (steps > good) & (steps < bad)
    halfway = torch.where(bad < math.inf, (good * bad).sqrt(), steps)
    found = torch.minimum(steps, bad * (1 - _SHORTER * 2**tries))
    return torch.where(good > 0, torch.where(inside, steps, halfway), found)


def _tail(s: Tensor, counts: Tensor) -> Tensor:
    return (s.square() * (torch.arange(s.shape[1]) >= counts[:, None])).sum(-1)


def _store(
    residual: Residual, left: Tensor, right: Tensor, counts: Tensor, width: Width
) -> tuple[Part, Tensor, Callable[[Tensor], Residual]]:
    sides = stored_ends(residual.left, left, counts, width), stored_ends(residual.right, right, counts, width)
    return _weighed(residual, *sides, counts)


def _weighed(
    residual: Residual, left: Stored, right: Stored, counts: Tensor, allowed: Tensor | None = None
) -> tuple[Part, Tensor, Callable[[Tensor], Residual]]:
    """Give the columns of ends that are stored with their best weights, what they leave, and what gives that.

    Weights are rounded as far as ``allowed`` allows, where that is given.
    """
    (p, p_seen, p_gram), (q, q_seen, q_gram) = left, right
    kept = torch.arange(p_seen.shape[2]) < counts[:, None]
    seen = torch.einsum("tac,tab,tbc->tc", p_seen, residual.z, q_seen)
    weights = best_weights(p_gram * q_gram, seen, kept)
    stored = weights.float().double() if allowed is None else rounded(weights, allowed, p.shape[1] + q.shape[1])
    fitted = ((p_gram * q_gram) @ stored.unsqueeze(-1)).squeeze(-1) - 2 * seen
    remains = residual.squares() + (stored * fitted).sum(-1)
    # a weight is not negative: its sign goes to the left end
    signs = torch.where(weights[kept] < 0, -1, 1)
    part = Part("pp", counts, stored[kept].abs(), flip_rows(p, signs), q)

    def rest(short: Tensor) -> Residual:
        pad = nn.functional.pad
        corner = torch.diag_embed(-stored)
        z = torch.cat([pad(residual.z, (0, corner.shape[2])), pad(corner, (residual.z.shape[2], 0))], dim=1)
        left = _extended(residual.left, split_rows(values_of(p), counts), p_seen, p_gram, short)
        return Residual(left, _extended(residual.right, split_rows(values_of(q), counts), q_seen, q_gram, short), z)

    return part, remains.clamp(min=0), rest


def _extended(frame: Frame, ends: Sequence[Tensor], seen: Tensor, gram: Tensor, some: Tensor) -> Frame:
    """Give a frame with ends that are stored as further vectors, of those tasks that are to have more columns."""
    width = frame.gram.shape[1] - frame.size
    extra = [
        torch.cat([nn.functional.pad(known.float(), (0, 0, 0, width - len(known))), own]) if wanted else known
        for known, own, wanted in zip(frame.extra, ends, some.tolist(), strict=True)
    ]
    top = torch.cat([frame.gram, seen], dim=2)
    return Frame(frame.vectors, frame.transform, extra, torch.cat([top, torch.cat([seen.mT, gram], dim=2)], dim=1))


def best_weights(products: Tensor, seen: Tensor, kept: Tensor) -> Tensor:
    """Give the least-squares weights of rank-one columns whose ends are given as rounded.

    Args:
        products: ``[T, q, q]``: inner products of the columns with each other.
        seen: ``[T, q]``: inner products of the columns with what they are to carry.
        kept: ``[T, q]`` bool: which columns there are; the weights of others are 0.
    """
    root = gram_root(products * (kept.unsqueeze(-1) & kept.unsqueeze(-2)))
    return (root.inverse @ (root.inverse.mT @ (seen * kept).unsqueeze(-1))).squeeze(-1)
