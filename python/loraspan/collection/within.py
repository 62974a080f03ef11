"""Fit every slot within an error budget: shared columns where they pay, private ones for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loraspan.collection.assemble import Part, assemble
from loraspan.collection.bases import Basis, empty_basis, make_basis
from loraspan.collection.budget import Plan, Planner
from loraspan.collection.build import SlotBuilder
from loraspan.collection.collection import SlotSpace
from loraspan.collection.columns import Columns
from loraspan.collection.core_space import refine_jointly
from loraspan.collection.factors import SlotFactors
from loraspan.collection.ranges import Range, find_range
from loraspan.collection.rows import Widths
from loraspan.collection.shares import Shares

Fitted = tuple[SlotSpace, Columns, Tensor]

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
    corrections: int = 0,
) -> list[Fitted]:
    """Give every slot's bases and columns so that no task exceeds ``max_error`` in all, and what its tasks lost there.

    Args:
        slots: the factors.
        squares: ``[N]``: every task's ``|dW|_F^2`` over all slots.
        max_error: relative, between 0 and 1, for every task or ``[N]``.
        widths: of what is stored.
        seed: of the sketches.
        refine: iterations of joint refinement.
        report: called with "fit", slots done and slots in all.
        corrections: of packed private columns; see :func:`loraspan.collection.private.private_columns`.
    """
    fitters = Fitters(slots, squares, coarse=is_coarse(max_error), seed=seed, refine=refine, corrections=corrections)
    return fitters.build(max_error, widths, report)


def is_coarse(max_error: float | Tensor) -> bool:
    """Say whether float32 ranges will do."""
    return float(torch.as_tensor(max_error).min()) > _COARSE_ERROR


class Fitters:
    """All slots of a fit: their plans can be counted for many budgets before one of them is built."""

    def __init__(
        self,
        slots: Sequence[SlotFactors],
        squares: Tensor,
        *,
        coarse: bool,
        seed: int,
        refine: int,
        corrections: int = 0,
    ) -> None:
        weights = torch.where(squares > 0, squares.rsqrt(), 0.0)
        self._squares = squares
        self.slots = [
            SlotFitter(
                slot,
                weights[torch.tensor(slot.members)],
                coarse=coarse,
                seed=seed,
                refine=refine,
                corrections=corrections,
            )
            for slot in slots
        ]
        spectra = [(fitter.slot.members, fitter.canonical.s) for fitter in self.slots]
        self._shares = Shares(spectra, [fitter.slot.shape for fitter in self.slots], squares)

    def shares(self, max_error: float | Tensor, widths: Widths) -> list[Tensor]:
        """Share the budgets out over the slots, per slot ``[T]``."""
        return self._shares.within(max_error, widths)

    def plan(self, max_error: float | Tensor, widths: Widths) -> list[Plan]:
        """Give the cheapest plan of every slot."""
        shares = self.shares(max_error, widths)
        return [fitter.plan(share, widths) for fitter, share in zip(self.slots, shares, strict=True)]

    def build(self, max_error: float | Tensor, widths: Widths, report: Callable[[str, int, int], None]) -> list[Fitted]:
        """Build slot after slot; what a task does not spend of its share in one is left for the next."""
        unspent = torch.zeros_like(self._squares)
        fitted = []
        for i, (fitter, share) in enumerate(zip(self.slots, self.shares(max_error, widths), strict=True)):
            report("fit", i, len(self.slots))
            members = torch.tensor(fitter.slot.members)
            allowed = (share + unspent[members]).clamp(min=0)
            space, columns, lost = fitter.build(fitter.plan(allowed, widths), allowed, widths)
            unspent[members] += share - lost
            fitted.append((space, columns, lost))
        return fitted


class SlotFitter:
    """One slot: chooses its cheapest form, builds it, and measures what is lost.

    Args:
        slot: the factors.
        weights: ``[T]``: of the tasks.
        coarse: whether ranges of float32 will do.
        seed: of the sketches.
        refine: iterations of joint refinement.
        corrections: of packed private columns; see :func:`loraspan.collection.private.private_columns`.
    """

    def __init__(
        self, slot: SlotFactors, weights: Tensor, *, coarse: bool, seed: int, refine: int, corrections: int
    ) -> None:
        self.slot, self.canonical = slot, slot.canonical()
        self._weights, self._seed, self._refine, self._corrections = weights, seed, refine, corrections
        self._precision = "f32" if coarse and not slot.is_double else "f64"
        self._sides = slot.stacks(weights)
        self._width = 0
        self._ranges: tuple[Range, Range] | None = None
        self._planner: Planner | None = None

    def plan(self, allowed: Tensor, widths: Widths) -> Plan:
        """Give the cheapest plan; the ranges are widened while it uses all of their width."""
        while True:
            if self._planner is None:
                self._widen(allowed, widths)
            assert self._planner is not None
            plan = self._planner.at(allowed, widths).cheapest()
            if max(plan.rank_out, plan.rank_in) < self._width:
                return plan
            self._planner = None

    def bytes_by_form(self, allowed: Tensor, widths: Widths) -> dict[str, int]:
        """Give the bytes of the cheapest plan of each form."""
        self.plan(allowed, widths)
        assert self._planner is not None
        found: dict[str, int] = {}
        for plan in self._planner.at(allowed, widths).plans():
            found[plan.form] = min(plan.nbytes, found.get(plan.form, plan.nbytes))
        return found

    def build(self, plan: Plan, allowed: Tensor, widths: Widths) -> Fitted:
        """Give the slot's bases and columns by a plan of the same budget, and ``[T]`` squared losses."""
        assert self._ranges is not None
        builder = SlotBuilder(self.slot, self.canonical, self._weights, allowed, widths, self._corrections)
        bases, parts, lost = self._build(builder, plan, self._ranges)
        return self._finish(builder, bases, parts, lost)

    def build_joint(self, rank: int, allowed: Tensor, widths: Widths) -> Fitted:
        """Give the same with two bases of ``rank``."""
        builder = SlotBuilder(self.slot, self.canonical, self._weights, allowed, widths, self._corrections)
        out, inn = self._find(rank + _OVERSAMPLE, "f64")
        ranks = min(rank, len(out.energies)), min(rank, len(inn.energies))
        bases = self._joint_bases(builder, ranks, (out, inn))
        return self._finish(builder, bases, *builder.shared(bases))

    def _find(self, width: int, precision: str) -> tuple[Range, Range]:
        out, inn = (
            find_range(side, width, precision=precision, seed=self._seed + i) for i, side in enumerate(self._sides)
        )
        return out, inn

    def _widen(self, allowed: Tensor, widths: Widths) -> None:
        self._width = self._width * 2 or _FIRST_WIDTH
        self._ranges = self._find(self._width, self._precision)
        seen = [side.pad(found.xv) for side, found in zip(self._sides, self._ranges, strict=True)]
        self._planner = Planner(self.slot.shape, self.canonical, seen[0], seen[1], allowed, widths, self._weights)

    def _finish(self, builder: SlotBuilder, bases: tuple[Basis, Basis], parts: list[Part], lost: Tensor) -> Fitted:
        slot = self.slot
        ranks = (bases[0].rank, bases[1].rank)
        columns = assemble(slot.members, parts, slot.shape, ranks, builder.widths.dtype)
        return SlotSpace(bases[0].v, bases[1].v, slot.kind, slot.kernel), columns, lost

    def _build(
        self, b: SlotBuilder, plan: Plan, ranges: tuple[Range, Range]
    ) -> tuple[tuple[Basis, Basis], list[Part], Tensor]:
        out, inn = (empty_basis(side.stack, side.length, b.widths.dtype) for side in b.sides)
        if plan.form == "pp":
            return (out, inn), *b.private()
        if plan.form == "ss":
            bases = self._joint_bases(b, (plan.rank_out, plan.rank_in), ranges)
            return bases, *b.shared(bases)
        at = 1 if plan.form == "ps" else 0
        rank = max(plan.rank_out, plan.rank_in)
        assert self._planner is not None
        steps = self._planner.at(b.allowed, b.widths).basis_steps(plan.form, rank)
        basis = make_basis(self._sides[at], ranges[at].w[:, :rank], b.widths.basis, steps)
        return (out, basis) if at else (basis, inn), *b.one_sided(plan.form, basis)

    def _joint_bases(self, b: SlotBuilder, ranks: tuple[int, int], ranges: tuple[Range, Range]) -> tuple[Basis, Basis]:
        seen_out, seen_in = (side.pad(found.xv) for side, found in zip(self._sides, ranges, strict=True))
        cores = seen_out.mT @ seen_in * (self.slot.scales * self._weights)[:, None, None]
        turns = refine_jointly(cores, *ranks, self._refine)
        out, inn = (
            make_basis(side, found.w @ turn, b.widths.basis)
            for side, found, turn in zip(self._sides, ranges, turns, strict=True)
        )
        return out, inn
