"""How wide the bases of many tasks have to be, decided on a sample of them: before the directions are known, and after.

A sample stands for all tasks: bytes of columns count as often as there are tasks for one of the sample, bytes of bases
once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.collection.budget import Plan, Planner
from loraspan.collection.collection import SlotSpace
from loraspan.collection.core_space import refine_jointly
from loraspan.collection.express import standing_bases
from loraspan.collection.factors import Canonical, SlotFactors
from loraspan.collection.fit import Goal
from loraspan.collection.layout import basis_bytes
from loraspan.collection.merge_ranges import Summary, directions_of
from loraspan.collection.ranges import find_range
from loraspan.collection.shares import allotments
from loraspan.errors import ArgumentError

_FIRST_WIDTH = 64
# Directions are summarized to at least this much more than the bases are expected to take: what a merge cuts off is
# then of the size of what lies past twice the rank, and no basis is made of it.
_MARGIN, _VECTOR = 32, 16
# Rows of a sample for each direction from which on turning the directions to it is good for all.
_ROWS_TO_REFINE = 8
# As in a fit of all at once: finer goals need ranges in float64.
_FINE_ENERGY, _COARSE_ERROR = 1 - 1e-4, 1e-2


class Turns(NamedTuple):
    """The bases of a slot in terms of its summaries' directions: ``out [l_out, k_out]``, ``inn [l_in, k_in]``."""

    out: Tensor
    inn: Tensor


class TooNarrowError(ArgumentError):
    """Summaries of these slots hold too little for the goal, and wider ones would hold more: a run widens them."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__(paths)
        self.paths = tuple(paths)


def precision_of(slot: SlotFactors, goal: Goal) -> str:
    """Give the precision that ranges of a slot are found in."""
    energy = goal.energy is not None and goal.energy > _FINE_ENERGY
    error = goal.max_error is not None and goal.max_error <= _COARSE_ERROR
    return "f64" if slot.is_double or energy or error else "f32"


def weights_of(slot: SlotFactors, squares: Tensor, goal: Goal) -> Tensor:
    """Give the weight of every task of a slot: for its relative error, or 1 where the energy of all counts; ``[T]``."""
    of_slot = squares[torch.tensor(slot.members)]
    return torch.ones_like(of_slot) if goal.energy is not None else torch.where(of_slot > 0, of_slot.rsqrt(), 0.0)


def rank_unseen(goal: Goal) -> int:
    """Give the rank to expect in a slot that nobody in a sample has."""
    return goal.rank or (0 if goal.energy is None else _FIRST_WIDTH)


def widths_for(ranks: Mapping[str, int]) -> dict[str, int]:
    """Give the widths of summaries for bases of such ranks: half as wide again or twice, and whole vectors.

    Example:
        >>> widths_for({"q": 64, "v": 5, "o": 0})
        {'q': 128, 'v': 48, 'o': 0}
    """
    return {
        path: math.ceil((rank + max(rank, _MARGIN)) / _VECTOR) * _VECTOR if rank else 0 for path, rank in ranks.items()
    }


def scout(slots: Sequence[SlotFactors], squares: Tensor, goal: Goal, stands_for: Mapping[str, float]) -> dict[str, int]:
    """Guess the ranks of bases from a sample alone, before all tasks have been seen.

    A sample shows directions that more than a few of its tasks share, and overrates those that it finds. So a slot
    where sharing does not even pay in the sample, at the price of a basis for all, gets none: rank 0.

    Args:
        slots: of the sample.
        squares: ``[S]``: every task's ``|dW|_F^2`` over all slots.
        goal: what the run is to meet.
        stands_for: by slot, how many tasks there are for one in the sample.
    """
    if goal.rank is not None:
        return {slot.path: goal.rank for slot in slots}
    if goal.energy is not None:
        return {slot.path: _rank_for_energy(slot, squares, goal) for slot in slots}
    allowed = _allowed(slots, squares, goal)
    return {
        slot.path: _rank_for_error(slot, squares, share, goal, stands_for[slot.path])
        for slot, share in zip(slots, allowed, strict=True)
    }


def turns_for(
    slots: Sequence[SlotFactors],
    squares: Tensor,
    goal: Goal,
    summaries: Mapping[str, tuple[Summary, Summary]],
    widths: Mapping[str, int],
    stands_for: Mapping[str, float],
) -> dict[str, Turns]:
    """Choose every slot's bases among the directions that summarize all tasks.

    Args:
        slots: of the sample.
        squares: as for :func:`scout`.
        goal: what the run is to meet.
        summaries: by slot, of the output and the input side, of all tasks.
        widths: that the summaries were allowed.
        stands_for: as for :func:`scout`.

    Returns:
        By slot, for those in ``summaries``.

    Raises:
        TooNarrowError: if summaries hold less energy than is asked for; names all such slots.
    """
    if goal.energy is not None:
        return _turns_for_energy(summaries, widths, goal.energy)
    allowed = [None] * len(slots) if goal.max_error is None else _allowed(slots, squares, goal)
    # a slot that nobody in the sample has takes the leading directions as they are
    found = {path: Turns(*(_leading(side, goal.rank or 0) for side in both)) for path, both in summaries.items()}
    for slot, share in zip(slots, allowed, strict=True):
        if slot.path not in summaries:
            continue
        both = summaries[slot.path]
        weights = weights_of(slot, squares, goal)
        out, inn = _seen(slot, both)
        rank_out, rank_in = goal.rank or 0, goal.rank or 0
        if share is not None:
            plan = _cheapest(slot, slot.canonical(), (out, inn), share, goal, stands_for[slot.path])
            rank_out, rank_in = plan.rank_out, plan.rank_in
        rank_out, rank_in = min(rank_out, out.shape[2]), min(rank_in, inn.shape[2])
        if not rank_out or not rank_in:
            found[slot.path] = Turns(_leading(both[0], rank_out), _leading(both[1], rank_in))
            continue
        cores = out.mT @ inn * (slot.scales * weights)[:, None, None]
        everyone = stands_for[slot.path] == 1
        refine = goal.refine if everyone or slot.up.total >= _ROWS_TO_REFINE * max(cores.shape[1:]) else 0
        found[slot.path] = Turns(*refine_jointly(cores, rank_out, rank_in, refine))
    return found


def _allowed(slots: Sequence[SlotFactors], squares: Tensor, goal: Goal) -> list[Tensor]:
    assert goal.max_error is not None
    if not slots:
        return []
    return allotments([(slot.members, slot.canonical().s) for slot in slots], len(squares), goal.max_error)


def _turns_for_energy(
    summaries: Mapping[str, tuple[Summary, Summary]], widths: Mapping[str, int], energy: float
) -> dict[str, Turns]:
    """Take each side's leading directions: they say what they hold of all tasks, which a refinement would not."""
    ranks = {path: [_energy_rank(side, energy, widths[path]) for side in both] for path, both in summaries.items()}
    narrow = [path for path, of_slot in ranks.items() if None in of_slot]
    if narrow:
        raise TooNarrowError(narrow)
    return {
        path: Turns(*(_leading(side, rank or 0) for side, rank in zip(both, ranks[path], strict=True)))
        for path, both in summaries.items()
    }


def _leading(side: Summary, rank: int) -> Tensor:
    return torch.eye(len(side.energies), min(rank, len(side.energies)), dtype=torch.float64)


def _energy_rank(side: Summary, energy: float, width: int) -> int | None:
    """Say how many directions lose at most half of what may be lost; both sides together then keep the rest.

    None if wider summaries are needed to tell.
    """
    wanted = (1 - (1 - energy) / 2) * side.total * (1 - 1e-12)
    enough = (side.energies.cumsum(0) >= wanted).nonzero()
    if len(enough):
        return int(enough[0]) + 1
    # fewer than were allowed: all that is above rounding is there
    return len(side.energies) if len(side.energies) < width else None


def _rank_for_energy(slot: SlotFactors, squares: Tensor, goal: Goal) -> int:
    assert goal.energy is not None
    total = float(slot.squares.sum())
    ranks = []
    for i, side in enumerate(slot.stacks(weights_of(slot, squares, goal))):
        width, rank = _FIRST_WIDTH, None
        while rank is None:
            found = find_range(side, width, precision=precision_of(slot, goal), seed=goal.seed + i)
            rank = _energy_rank(Summary(found.xv, found.energies, total), goal.energy, width)
            width *= 2
        ranks.append(rank)
    return max(ranks)


def _rank_for_error(slot: SlotFactors, squares: Tensor, allowed: Tensor, goal: Goal, stands_for: float) -> int:
    """Widen the ranges while the cheapest form uses all of their width."""
    canonical = slot.canonical()
    sides = slot.stacks(weights_of(slot, squares, goal))
    width = _FIRST_WIDTH
    while True:
        found = [
            find_range(side, width, precision=precision_of(slot, goal), seed=goal.seed + i)
            for i, side in enumerate(sides)
        ]
        out, inn = (side.vectors.pad(one.xv) for side, one in zip(sides, found, strict=True))
        plan = _cheapest(slot, canonical, (out, inn), allowed, goal, stands_for)
        rank = max(plan.rank_out, plan.rank_in)
        if rank < width:
            return rank
        width *= 2


def _cheapest(
    slot: SlotFactors,
    canonical: Canonical,
    seen: tuple[Tensor, Tensor],
    allowed: Tensor,
    goal: Goal,
    stands_for: float,
) -> Plan:
    """Give the form that takes the fewest bytes for all tasks."""

    def nbytes(plan: Plan) -> float:
        bases = basis_bytes(*slot.shape, plan.rank_out, plan.rank_in, goal.widths.basis)
        return (plan.nbytes - bases) * stands_for + bases

    return min(Planner(slot.shape, canonical, *seen, allowed, goal.widths).plans(), key=nbytes)


def _seen(slot: SlotFactors, both: tuple[Summary, Summary]) -> tuple[Tensor, Tensor]:
    """Give every task's factors times the directions of both sides: twice ``[T, r, l]``, float64."""
    u, v = (directions_of(side).T for side in both)
    out, inn = standing_bases([slot], [SlotSpace(u, v)])[0]
    return out.products, inn.products
