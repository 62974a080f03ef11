"""Fit every slot within an error budget: shared columns where they pay, private ones for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loraspan.collection.assemble import Part, assemble
from loraspan.collection.bases import Basis, empty_basis, make_basis, shared_cores, unit
from loraspan.collection.budget import Plan, Planner, allotments, column_bytes, one_sided_counts, product_spectrum
from loraspan.collection.collection import SlotSpace
from loraspan.collection.columns import Columns
from loraspan.collection.core_space import refine_jointly
from loraspan.collection.factors import Canonical, SlotFactors
from loraspan.collection.private import (
    Frame,
    Residual,
    best_weights,
    make_frame,
    private_columns,
    split_rows,
    stored_ends,
)
from loraspan.collection.ranges import Range, find_range
from loraspan.collection.stack import Stack
from loraspan.linalg.roots import gram_root
from loraspan.ops.dense import svd

_FIRST_WIDTH = 64
# Above this budget float32 ranges lose nothing that counts; the stored columns are measured in float64 all the same.
_COARSE_ERROR = 1e-2


def fit_within(
    slots: Sequence[SlotFactors],
    squares: Tensor,
    max_error: float,
    dtype: torch.dtype,
    seed: int,
    refine: int,
    report: Callable[[str, int, int], None],
) -> list[tuple[SlotSpace, Columns, Tensor]]:
    """Give every slot's bases and columns so that no task exceeds ``max_error`` in all, and what its tasks lost there.

    Args:
        slots: the factors.
        squares: ``[N]``: every task's ``|dW|_F^2`` over all slots.
        max_error: relative, between 0 and 1.
        dtype: of what is stored.
        seed: of the sketches.
        refine: iterations of joint refinement.
        report: called with "fit", slots done and slots in all.
    """
    canonicals = [slot.canonical() for slot in slots]
    shares = allotments([(s.members, c.s) for s, c in zip(slots, canonicals, strict=True)], len(squares), max_error)
    weights = torch.where(squares > 0, squares.rsqrt(), 0.0)
    coarse = max_error > _COARSE_ERROR
    unspent = torch.zeros_like(squares)
    fitted = []
    for i, (slot, canonical, share) in enumerate(zip(slots, canonicals, shares, strict=True)):
        report("fit", i, len(slots))
        members = torch.tensor(slot.members)
        allowed = (share + unspent[members]).clamp(min=0)
        fitter = _SlotFitter(slot, canonical, weights[members], allowed, dtype, refine)
        space, columns, lost = fitter.fit("f32" if coarse and not slot.is_double else "f64", seed)
        unspent[members] += share - lost
        fitted.append((space, columns, lost))
    return fitted


class _Side:
    """One side of a slot: its factors, and the same in canonical coordinates."""

    def __init__(self, stack: Stack, length: int, gram: Tensor, transform: Tensor) -> None:
        self.stack, self.length, self.gram, self.transform = stack, length, gram, transform

    def frame(self, extra: Sequence[Tensor], edge: Tensor, extra_gram: Tensor) -> Frame:
        x = self.stack.x
        return make_frame(x.blocks, self.transform, self.gram, extra, edge, extra_gram, x.target)

    def bare_frame(self) -> Frame:
        blocks = self.stack.x.blocks
        edge = self.transform.new_zeros(len(blocks), self.transform.shape[2], 0)
        return self.frame([block[:0] for block in blocks], edge, edge.new_zeros(0, 0))

    def basis_frame(self, basis: Basis) -> Frame:
        edge = self.transform.mT @ basis.products
        return self.frame([basis.v.T] * self.stack.count, edge, basis.gram)


class _SlotFitter:
    """Fits one slot: chooses the cheapest form, builds it, and measures what is lost."""

    def __init__(
        self,
        slot: SlotFactors,
        canonical: Canonical,
        weights: Tensor,
        allowed: Tensor,
        dtype: torch.dtype,
        refine: int,
    ) -> None:
        self._slot, self._canonical, self._weights = slot, canonical, weights
        self._allowed, self._dtype, self._refine = allowed, dtype, refine
        up, down = slot.stacks(weights)
        n, d = slot.shape
        self._sides = (
            _Side(up, n, slot.gram_up, canonical.x),
            _Side(down, d, slot.gram_down, canonical.y),
        )

    def fit(self, precision: str, seed: int) -> tuple[SlotSpace, Columns, Tensor]:
        """Give the slot's bases and columns, and ``[T]`` squared losses."""
        plan, ranges = self._choose(precision, seed)
        bases, parts, lost = self._build(plan, ranges)
        ranks = (bases[0].v.shape[1], bases[1].v.shape[1])
        columns = assemble(self._slot.members, parts, self._slot.shape, ranks, self._dtype)
        first = self._slot.slots[0]
        return SlotSpace(bases[0].v, bases[1].v, first.kind, first.kernel), columns, lost

    def _choose(self, precision: str, seed: int) -> tuple[Plan, tuple[Range, Range]]:
        """Widen the ranges while the cheapest form uses all of their width."""
        width = _FIRST_WIDTH
        while True:
            out, inn = (
                find_range(side.stack, width, precision=precision, seed=seed + i) for i, side in enumerate(self._sides)
            )
            seen = [side.stack.pad(found.xv) for side, found in zip(self._sides, (out, inn), strict=True)]
            planner = Planner(self._slot.shape, self._canonical, seen[0], seen[1], self._allowed, self._dtype)
            plan = min(planner.plans(), key=lambda p: p.nbytes)
            if max(plan.rank_out, plan.rank_in) < width:
                return plan, (out, inn)
            width *= 2

    def _build(self, plan: Plan, ranges: tuple[Range, Range]) -> tuple[tuple[Basis, Basis], list[Part], Tensor]:
        if plan.form == "ss":
            return self._build_shared(plan, ranges)
        empty = tuple(empty_basis(side.stack, side.length, self._dtype) for side in self._sides)
        if plan.form == "pp":
            z = torch.diag_embed((self._canonical.s > 0).double())
            residual = Residual(self._sides[0].bare_frame(), self._sides[1].bare_frame(), z)
            part, lost = private_columns(residual, self._allowed, self._dtype)
            return (empty[0], empty[1]), [part], lost
        at = 1 if plan.form == "ps" else 0
        rank = max(plan.rank_out, plan.rank_in)
        basis = make_basis(self._sides[at].stack, ranges[at].w[:, :rank], self._dtype)
        parts, lost = self._build_one_sided(plan, basis, self._sides[at], self._sides[1 - at])
        if at == 1:
            return (empty[0], basis), parts, lost
        return (basis, empty[1]), [_mirrored(part) for part in parts], lost

    def _build_shared(self, plan: Plan, ranges: tuple[Range, Range]) -> tuple[tuple[Basis, Basis], list[Part], Tensor]:
        out, inn = (side.stack.pad(found.xv) for side, found in zip(self._sides, ranges, strict=True))
        cores = out.mT @ inn * (self._slot.scales * self._weights)[:, None, None]
        turns = refine_jointly(cores, plan.rank_out, plan.rank_in, self._refine)
        bases = tuple(
            make_basis(side.stack, found.w @ turn, self._dtype)
            for side, found, turn in zip(self._sides, ranges, turns, strict=True)
        )
        shared = shared_cores(bases[0], bases[1], self._slot.scales, self._slot.squares, self._dtype)
        left, right = (side.basis_frame(basis) for side, basis in zip(self._sides, bases, strict=True))
        residual = Residual(left, right, _coefficients(self._canonical.s, -shared.cores))
        part, lost = private_columns(residual, self._allowed, self._dtype)
        return (bases[0], bases[1]), [shared.part, part], lost

    def _build_one_sided(self, plan: Plan, basis: Basis, near: _Side, far: _Side) -> tuple[list[Part], Tensor]:
        """Columns with one end on ``basis`` (of side ``near``) and the other private, then private ones for the rest.

        Both parts come with the private end of ``far`` on the left.
        """
        seen = near.transform.mT @ basis.products  # [T, c, k]: what the basis sees of the canonical factor
        root = gram_root(basis.gram)
        bare = far.bare_frame()
        far_root = gram_root(bare.gram)
        u, s, v = svd(far_root.r @ (seen @ root.inverse))
        inside = seen @ root.inverse @ root.inverse.T @ seen.mT
        rest = product_spectrum(bare.gram, near.bare_frame().gram - inside)
        price = [column_bytes(form, self._slot.shape, basis.v.shape[1], self._dtype) for form in (plan.form, "pp")]
        counts, _ = one_sided_counts(s, rest, self._allowed, *price)
        ends, ends_seen, ends_gram = stored_ends(bare, far_root.inverse @ u, counts, self._dtype)
        loadings = unit(root.inverse @ v).to(self._dtype)  # [T, k, q]
        kept = torch.arange(s.shape[1]) < counts[:, None]
        y = loadings.double() * kept.unsqueeze(-2)
        weights = best_weights(ends_gram * (y.mT @ basis.gram @ y), (ends_seen * (seen @ y)).sum(-2), kept)
        signs = torch.where(weights < 0, -1.0, 1.0)
        signed = loadings.mT * signs.unsqueeze(-1).to(self._dtype)
        part = Part(plan.form, counts, weights[kept].abs(), ends, signed[kept])
        left = far.frame(split_rows(ends, counts), ends_seen, ends_gram)
        z = _coefficients(self._canonical.s, -(weights.float().double().unsqueeze(-1) * y.mT))
        private, lost = private_columns(Residual(left, near.basis_frame(basis), z), self._allowed, self._dtype)
        return [part, private], lost


def _coefficients(s: Tensor, corner: Tensor) -> Tensor:
    """``[[I, 0], [0, corner]]`` per task: the canonical ``dW`` and what is taken from it."""
    eye = torch.diag_embed((s > 0).double())
    top = torch.cat([eye, eye.new_zeros(*eye.shape[:2], corner.shape[2])], dim=2)
    bottom = torch.cat([corner.new_zeros(*corner.shape[:2], eye.shape[2]), corner], dim=2)
    return torch.cat([top, bottom], dim=1)


def _mirrored(part: Part) -> Part:
    """Exchange the ends."""
    assert part.right is not None
    return part._replace(left=part.right, right=part.left)
