"""Fit every slot within an error budget: shared columns where they pay, private ones for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loraspan.collection.assemble import Part, assemble
from loraspan.collection.bases import Basis, empty_basis, make_basis
from loraspan.collection.budget import Plan, Planner, allotments
from loraspan.collection.build import SlotBuilder
from loraspan.collection.collection import SlotSpace
from loraspan.collection.columns import Columns
from loraspan.collection.core_space import refine_jointly
from loraspan.collection.factors import SlotFactors
from loraspan.collection.ranges import Range, find_range
from loraspan.collection.rows import Widths

_FIRST_WIDTH, _OVERSAMPLE = 64, 8
# Above this budget float32 ranges lose nothing that counts; the stored columns are measured in float64 all the same.
_COARSE_ERROR = 1e-2


def fit_within(
    slots: Sequence[SlotFactors],
    squares: Tensor,
    max_error: float | Tensor,
    widths: Widths,
    seed: int,
    refine: int,
    report: Callable[[str, int, int], None],
) -> list[tuple[SlotSpace, Columns, Tensor]]:
    """Give every slot's bases and columns so that no task exceeds ``max_error`` in all, and what its tasks lost there.

    Args:
        slots: the factors.
        squares: ``[N]``: every task's ``|dW|_F^2`` over all slots.
        max_error: relative, between 0 and 1, for every task or ``[N]``.
        widths: of what is stored.
        seed: of the sketches.
        refine: iterations of joint refinement.
        report: called with "fit", slots done and slots in all.
    """
    canonicals = [slot.canonical() for slot in slots]
    shares = allotments([(s.members, c.s) for s, c in zip(slots, canonicals, strict=True)], len(squares), max_error)
    weights = torch.where(squares > 0, squares.rsqrt(), 0.0)
    coarse = float(torch.as_tensor(max_error).min()) > _COARSE_ERROR
    unspent = torch.zeros_like(squares)
    fitted = []
    for i, (slot, canonical, share) in enumerate(zip(slots, canonicals, shares, strict=True)):
        report("fit", i, len(slots))
        members = torch.tensor(slot.members)
        allowed = (share + unspent[members]).clamp(min=0)
        fitter = _SlotFitter(SlotBuilder(slot, canonical, weights[members], allowed, widths), refine)
        space, columns, lost = fitter.fit("f32" if coarse and not slot.is_double else "f64", seed)
        unspent[members] += share - lost
        fitted.append((space, columns, lost))
    return fitted


def fit_joint(builder: SlotBuilder, rank: int, refine: int, seed: int) -> tuple[SlotSpace, Columns, Tensor]:
    """Give a slot on two bases of ``rank``, with private columns for what goes beyond the losses allowed."""
    return _SlotFitter(builder, refine).fit_joint(rank, seed)


class _SlotFitter:
    """Fits one slot: chooses the cheapest form, builds it, and measures what is lost."""

    def __init__(self, builder: SlotBuilder, refine: int) -> None:
        self._builder, self._refine = builder, refine

    def fit(self, precision: str, seed: int) -> tuple[SlotSpace, Columns, Tensor]:
        """Give the slot's bases and columns, and ``[T]`` squared losses."""
        plan, ranges = self._choose(precision, seed)
        return self._finish(*self._build(plan, ranges))

    def fit_joint(self, rank: int, seed: int) -> tuple[SlotSpace, Columns, Tensor]:
        """Give the same for two bases of ``rank``."""
        out, inn = (
            find_range(side.stack, rank + _OVERSAMPLE, precision="f64", seed=seed + i)
            for i, side in enumerate(self._builder.sides)
        )
        widths = min(rank, len(out.energies)), min(rank, len(inn.energies))
        bases = self._joint_bases(Plan("ss", *widths, 0), (out, inn))
        return self._finish(bases, *self._builder.shared(bases))

    def _finish(self, bases: tuple[Basis, Basis], parts: list[Part], lost: Tensor) -> tuple[SlotSpace, Columns, Tensor]:
        slot, widths = self._builder.slot, self._builder.widths
        columns = assemble(slot.members, parts, slot.shape, (bases[0].rank, bases[1].rank), widths.dtype)
        return SlotSpace(bases[0].v, bases[1].v, slot.kind, slot.kernel), columns, lost

    def _choose(self, precision: str, seed: int) -> tuple[Plan, tuple[Range, Range]]:
        """Widen the ranges while the cheapest form uses all of their width."""
        b, width = self._builder, _FIRST_WIDTH
        while True:
            out, inn = (
                find_range(side.stack, width, precision=precision, seed=seed + i) for i, side in enumerate(b.sides)
            )
            seen = [side.stack.pad(found.xv) for side, found in zip(b.sides, (out, inn), strict=True)]
            planner = Planner(b.slot.shape, b.canonical, seen[0], seen[1], b.allowed, b.widths)
            plan = min(planner.plans(), key=lambda p: p.nbytes)
            if max(plan.rank_out, plan.rank_in) < width:
                return plan, (out, inn)
            width *= 2

    def _build(self, plan: Plan, ranges: tuple[Range, Range]) -> tuple[tuple[Basis, Basis], list[Part], Tensor]:
        b = self._builder
        out, inn = (empty_basis(side.stack, side.length, b.widths.dtype) for side in b.sides)
        if plan.form == "pp":
            return (out, inn), *b.private()
        if plan.form == "ss":
            bases = self._joint_bases(plan, ranges)
            return bases, *b.shared(bases)
        at = 1 if plan.form == "ps" else 0
        basis = make_basis(b.sides[at].stack, ranges[at].w[:, : max(plan.rank_out, plan.rank_in)], b.widths.basis)
        return (out, basis) if at else (basis, inn), *b.one_sided(plan.form, basis)

    def _joint_bases(self, plan: Plan, ranges: tuple[Range, Range]) -> tuple[Basis, Basis]:
        b = self._builder
        seen_out, seen_in = (side.stack.pad(found.xv) for side, found in zip(b.sides, ranges, strict=True))
        cores = seen_out.mT @ seen_in * (b.slot.scales * b.weights)[:, None, None]
        turns = refine_jointly(cores, plan.rank_out, plan.rank_in, self._refine)
        out, inn = (
            make_basis(side.stack, found.w @ turn, b.widths.basis)
            for side, found, turn in zip(b.sides, ranges, turns, strict=True)
        )
        return out, inn
