"""The pieces of work of a run: pure functions of paths and small arguments, each giving the bytes of one file.

They know nothing of the run, the ledger or each other, and give the same bits wherever they run and however often.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from loraspan._default_device import cpu_by_default
from loraspan.adapters.base import Adapter
from loraspan.collection.collection import Segment, SlotSpace
from loraspan.collection.express import express
from loraspan.collection.factors import SlotFactors, read_factors
from loraspan.collection.fit import Goal, total_squares
from loraspan.collection.merge_ranges import Summary, basis_of, merge, summarize
from loraspan.collection.widths import precision_of, scout, turns_for, weights_of
from loraspan.errors import NotFiniteError
from loraspan.many.aside import Aside, set_not_finite_aside
from loraspan.many.ledger import Pieces, encode, read_piece
from loraspan.many.members import Map, Origin, open_origin
from loraspan.many.pieces import encode_bases, encode_segment, read_bases

_SIDES = ("out", "in")


class Work(NamedTuple):
    """What every piece of work on adapters is given: whom, for which goal, and what to do with who is not finite."""

    origins: tuple[Origin, ...]
    goal: Goal
    skip: bool


class Group(NamedTuple):
    """Adapters by slot, and every task's ``|dW|_F^2``; without those that are not finite."""

    slots: list[SlotFactors]
    squares: Tensor


def read_group(work: Work) -> Group:
    """Open the adapters, which maps their files and closes them, and take the Grams of their factors."""
    adapters = [open_origin(origin) for origin in work.origins]
    try:
        slots = read_factors(adapters)
    except NotFiniteError:
        if not work.skip:
            raise
        adapters, _ = set_not_finite_aside(adapters)
        slots = read_factors(adapters)
    return Group(slots, total_squares(slots, len(adapters)))


@cpu_by_default
def scout_sample(work: Work, stands_for: Mapping[str, float]) -> dict[str, int]:
    """Guess the ranks of bases from a sample; see :func:`loraspan.collection.widths.scout`."""
    group = read_group(work)
    return scout(group.slots, group.squares, work.goal, stands_for)


@cpu_by_default
def summarize_group(work: Work, widths: Mapping[str, int]) -> Pieces:
    """Give the summaries of both sides of every slot that has a width."""
    group = read_group(work)
    named: list[tuple[str, Tensor]] = []
    totals: dict[str, float] = {}
    precisions: dict[str, str] = {}
    for slot in group.slots:
        width = widths.get(slot.path, 0)
        if not width:
            continue
        weights = weights_of(slot, group.squares, work.goal)
        totals[slot.path] = float((weights.square() * slot.squares).sum())
        precision = precisions[slot.path] = precision_of(slot, work.goal)
        for i, (side, stack) in enumerate(zip(_SIDES, slot.stacks(weights), strict=True)):
            made = summarize(stack, width, totals[slot.path], precision=precision, seed=work.goal.seed + i)
            named += _named(side, slot.path, made)
    return encode(named, {"totals": totals, "precision": precisions})


@cpu_by_default
def merge_summaries(paths: Sequence[str], widths: Mapping[str, int]) -> Pieces:
    """Give the summaries of several groups as those of one, the older first."""
    pieces = [read_piece(path) for path in paths]
    named: list[tuple[str, Tensor]] = []
    totals: dict[str, float] = {}
    precisions: dict[str, str] = {}
    for _, notes in pieces:
        for path, precision in notes["precision"].items():
            precisions[path] = max(precision, precisions.get(path, precision))
    for path, precision in precisions.items():
        present = [(tensors, notes["totals"][path]) for tensors, notes in pieces if path in notes["totals"]]
        totals[path] = sum(total for _, total in present)
        for side in _SIDES:
            parts = [_summary(tensors, side, path, total) for tensors, total in present]
            full = [part for part in parts if part is not None]
            if full:
                named += _named(side, path, merge(full, widths[path], precision=precision))
    return encode(named, {"totals": totals, "precision": precisions})


@cpu_by_default
def choose_bases(
    work: Work, widths: Mapping[str, int], stands_for: Mapping[str, float], slots: Mapping[str, Map], path: str | None
) -> Pieces:
    """Give the bases of all slots as they will be stored, decided on a sample, from the summaries of all tasks.

    Without a ``path`` to summaries no slot has any.

    Raises:
        TooNarrowError: if the summaries do not hold what the goal asks for.
    """
    tensors, notes = ({}, {"totals": {}}) if path is None else read_piece(path)
    summaries = {}
    for key, total in notes["totals"].items():
        out, inn = (_summary(tensors, side, key, total) for side in _SIDES)
        if out is not None and inn is not None:
            summaries[key] = (out, inn)
    group = read_group(work)
    turns = turns_for(group.slots, group.squares, work.goal, summaries, widths, stands_for)
    spaces = {}
    for key, turn in turns.items():
        u, v = (basis_of(side, one, work.goal.widths.basis).v for side, one in zip(summaries[key], turn, strict=True))
        spaces[key] = SlotSpace(u, v, slots[key].kind, slots[key].kernel)
    return encode_bases(spaces)


@cpu_by_default
def express_group(work: Work, hash_files: bool, slots: Mapping[str, Map], bases: str) -> Pieces:
    """Give the tasks of a group on the bases, as a segment of the store.

    Raises:
        ArgumentError: if the goal's ``max_error`` is below what rounding to its dtype allows.
    """
    adapters = [open_origin(origin, hash_file=hash_files) for origin in work.origins]
    spaces = read_bases(Path(bases), slots, work.goal.floats)
    aside: Sequence[Aside] = ()
    try:
        made = _express(spaces, adapters, work.goal)
    except NotFiniteError:
        if not work.skip:
            raise
        adapters, aside = set_not_finite_aside(adapters)
        made = _express(spaces, adapters, work.goal)
    return encode_segment(made, aside)


def _express(spaces: Mapping[str, SlotSpace], adapters: Sequence[Adapter], goal: Goal) -> Segment:
    if not adapters:
        return Segment((), {})
    return express(spaces, adapters, max_error=goal.max_error, dtype=goal.widths, operator="compress").segment


def _named(side: str, path: str, made: Summary) -> list[tuple[str, Tensor]]:
    if not len(made.rows):
        return []
    return [(f"{side}.{path}", made.rows), (f"{side}_energies.{path}", made.energies)]


def _summary(tensors: Mapping[str, Tensor], side: str, path: str, total: float) -> Summary | None:
    """Give a summary back; None if it has no direction."""
    if f"{side}.{path}" not in tensors:
        return None
    return Summary(tensors[f"{side}.{path}"], tensors[f"{side}_energies.{path}"], total)
