"""Build the columns of one slot on given bases: shared ends where a form has them, private columns for the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from loraspan.collection.assemble import Part
from loraspan.collection.bases import Basis, shared_cores
from loraspan.collection.factors import Canonical, SlotFactors
from loraspan.collection.one_sided import OneSided
from loraspan.collection.private import Residual, private_columns
from loraspan.collection.rows import Widths
from loraspan.collection.sides import Side, coefficients


class SlotBuilder:
    """Builds the columns of a slot in any form on given bases, within what each task may lose, and measures the loss.

    Args:
        slot: the factors.
        canonical: of the slot.
        weights: ``[T]``: of the tasks in a fit.
        allowed: ``[T]``: squared norms that may be lost.
        widths: of what is stored.
        corrections: of packed private columns; see :func:`loraspan.collection.private.private_columns`.
    """

    def __init__(
        self,
        slot: SlotFactors,
        canonical: Canonical,
        weights: Tensor,
        allowed: Tensor,
        widths: Widths,
        corrections: int = 0,
    ) -> None:
        self.slot, self.canonical, self.weights = slot, canonical, weights
        self.allowed, self.widths, self._corrections = allowed, widths, corrections
        up, down = slot.stacks(weights)
        n, d = slot.shape
        self.sides = (Side(up, n, slot.gram_up, canonical.x), Side(down, d, slot.gram_down, canonical.y))

    def private(self) -> tuple[list[Part], Tensor]:
        """Private columns alone."""
        z = torch.diag_embed((self.canonical.s > 0).double())
        residual = Residual(self.sides[0].bare_frame(), self.sides[1].bare_frame(), z)
        part, lost = self._private(residual)
        return [part], lost

    def shared(self, bases: tuple[Basis, Basis]) -> tuple[list[Part], Tensor]:
        """Cores on two bases, and private columns for the rest."""
        shared = shared_cores(bases[0], bases[1], self.slot.scales, self.slot.squares, self.widths.loadings)
        left, right = (side.basis_frame(basis) for side, basis in zip(self.sides, bases, strict=True))
        residual = Residual(left, right, coefficients(self.canonical.s, -shared.cores))
        part, lost = self._private(residual)
        return [shared.part, part], lost

    def one_sided(self, form: str, basis: Basis) -> tuple[list[Part], Tensor]:
        """Columns with one end on a basis, of the input side for "ps" and of the output side for "sp"."""
        at = 1 if form == "ps" else 0
        columns = OneSided(form, basis, self.sides[at], self.sides[1 - at], self.slot.shape, self.canonical.s)
        part, residual = columns.within(self.allowed, self.widths)
        private, lost = self._private(residual)
        parts = [part, private]
        return parts if at == 1 else [_mirrored(each) for each in parts], lost

    def _private(self, residual: Residual) -> tuple[Part, Tensor]:
        return private_columns(residual, self.allowed, self.widths.private, self._corrections)


def _mirrored(part: Part) -> Part:
    """Exchange the ends."""
    assert part.right is not None
    return part._replace(left=part.right, right=part.left)
