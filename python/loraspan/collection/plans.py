"""Choose how a whole collection is stored: complete plans are counted, the best is built and measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.collection.budget import NEVER, Plan
from loraspan.collection.factors import SlotFactors
from loraspan.collection.rows import CODED, Widths
from loraspan.collection.within import Fitted, Fitters, is_coarse

_F32 = torch.float32
# What plans choose from: the same width for all, and private ends narrower than what all tasks share, or coded.
CANDIDATES = (
    Widths.of(_F32),
    Widths.of(torch.float16),
    Widths.of(8),
    Widths(_F32, 8, 8, 4),
    Widths(_F32, 8, 4, 4),
    Widths.of(4),
    Widths.of(CODED),
    Widths(torch.float16, torch.float16, torch.float16, CODED),
)
# A plan whose rounding took more than was expected is built again for a budget smaller by what was missing.
_TRIES = 3
_TIGHTER = 0.998

Report = Callable[[str, int, int], None]


class Options(NamedTuple):
    """How fits that choose go: ``candidates`` to choose from, ``seed`` of the sketches, ``refine`` iterations of joint
    refinement, and ``report``, called with "fit", slots done and slots in all.
    """

    candidates: Sequence[Widths]
    seed: int
    refine: int
    report: Report


@dataclass(frozen=True)
class PlanLine:
    """A complete plan that was counted.

    Attributes:
        widths: how bases, loadings and private ends would be stored.
        forms: which ends would be shared: "private", "input side shared", "output side shared", "both sides shared",
            or "mixed", the cheapest in each slot.
        max_error: the budget that it was counted for.
        nbytes: of bases and columns, as counted; None if rounding rules the plan out.
        chosen: whether it was built.
    """

    widths: str
    forms: str
    max_error: float
    nbytes: int | None
    chosen: bool


_FORMS = {"pp": "private", "ps": "input side shared", "sp": "output side shared", "ss": "both sides shared"}


@dataclass(frozen=True)
class Outcome:
    """What a fit that chose gives: every slot, the widths, the budget, and the plans that were counted."""

    fitted: list[Fitted]
    widths: Widths
    max_error: float
    plans: tuple[PlanLine, ...]


def fit_smallest(
    slots: Sequence[SlotFactors],
    squares: Tensor,
    max_error: float,
    options: Options,
) -> Outcome:
    """Give the fit of the fewest bytes in which no task exceeds ``max_error``.

    Args:
        slots: the factors.
        squares: ``[N]``: every task's ``|dW|_F^2``.
        max_error: relative, between 0 and 1.
        options: see :class:`Options`.

    Returns:
        The fit. Where rounding keeps every candidate from the budget it is that of the smallest error.
    """
    candidates, seed, refine, report = options
    fitters = Fitters(slots, squares, coarse=is_coarse(max_error), seed=seed, refine=refine)
    counted = {widths: bytes_of(fitters.plan(max_error, widths)) for widths in candidates}
    order = sorted(candidates, key=lambda widths: counted[widths])
    built: list[tuple[float, Widths, list[Fitted]]] = []
    for widths in order:
        if counted[widths] >= NEVER and built:
            break
        error, fitted = _build_within(fitters, squares, max_error, widths, report)
        built.append((error, widths, fitted))
        if error <= max_error * (1 + 1e-9):
            break
    met = [one for one in built if one[0] <= max_error * (1 + 1e-9)]
    _, widths, fitted = met[0] if met else min(built, key=lambda one: one[0])
    return Outcome(fitted, widths, max_error, lines_of(fitters, candidates, max_error, widths))


def _build_within(
    fitters: Fitters, squares: Tensor, max_error: float, widths: Widths, report: Report
) -> tuple[float, list[Fitted]]:
    aim = max_error
    for _ in range(_TRIES):
        fitted = fitters.build(aim, widths, report)
        worst = worst_of([fitter.slot for fitter in fitters.slots], squares, fitted)
        if worst <= max_error * (1 + 1e-9):
            break
        aim *= _TIGHTER * max_error / worst
    return worst, fitted


def worst_of(slots: Sequence[SlotFactors], squares: Tensor, fitted: Sequence[Fitted]) -> float:
    """Give the largest relative error of a task."""
    lost = torch.zeros_like(squares)
    for slot, (_, _, of_slot) in zip(slots, fitted, strict=True):
        lost.index_add_(0, torch.tensor(slot.members), of_slot)
    return math.sqrt(float(torch.where(squares > 0, lost / squares, 0.0).max())) if len(squares) else 0.0


def bytes_of(plans: Sequence[Plan]) -> int:
    """Give the bytes of plans of all slots, NEVER where one is not possible."""
    return min(sum(plan.nbytes for plan in plans), NEVER)


def lines_of(fitters: Fitters, candidates: Sequence[Widths], max_error: float, chosen: Widths) -> tuple[PlanLine, ...]:
    """Count the complete plans: each form in all slots, and the cheapest of each slot."""
    lines = []
    for widths in candidates:
        shares = fitters.shares(max_error, widths)
        totals: Counter[str] = Counter()
        for fitter, share in zip(fitters.slots, shares, strict=True):
            by_form = fitter.bytes_by_form(share, widths)
            for form, name in _FORMS.items():
                totals[name] += min(by_form.get(form, NEVER), NEVER)
            totals["mixed"] += min(by_form.values())
        for name, nbytes in totals.items():
            possible = None if nbytes >= NEVER else nbytes
            lines.append(PlanLine(str(widths), name, max_error, possible, widths == chosen and name == "mixed"))
    return tuple(lines)
