"""Build the columns of one slot on given bases: shared ends where a form has them, private columns for the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraspan.collection.assemble import Part
from loraspan.collection.bases import Basis, shared_cores, unit
from loraspan.collection.budget import column_bytes, one_sided_counts, one_sided_ends, product_spectrum
from loraspan.collection.factors import Canonical, SlotFactors
from loraspan.collection.formed import Frame, Stored, form_ends, make_frame, split_rows, stored_ends
from loraspan.collection.private import Residual, best_weights, private_columns
from loraspan.collection.rows import CODED, Widths, flip_rows, rounding_of, store_rows, values_of
from loraspan.collection.stack import Stack
from loraspan.collection.steps import Curve
from loraspan.collection.weights import rounded
from loraspan.linalg.roots import gram_root
from loraspan.ops.dense import svd


class Side:
    """One side of a slot: its vectors, and the same in canonical coordinates."""

    def __init__(self, stack: Stack, length: int, gram: Tensor, transform: Tensor) -> None:
        self.stack, self.length, self.gram, self.transform = stack, length, gram, transform

    def frame(self, extra: Sequence[Tensor], edge: Tensor, extra_gram: Tensor) -> Frame:
        """Give the frame of the tasks' vectors and ``extra`` ones; see :func:`make_frame`."""
        return make_frame(self.stack.vectors, self.transform, self.gram, extra, edge, extra_gram)

    def bare_frame(self) -> Frame:
        """Give the frame of the tasks' vectors alone."""
        edge = self.transform.new_zeros(self.stack.count, self.transform.shape[2], 0)
        return self.frame([torch.empty(0, self.length)] * self.stack.count, edge, edge.new_zeros(0, 0))

    def basis_frame(self, basis: Basis) -> Frame:
        """Give the frame of the tasks' vectors and a basis."""
        edge = self.transform.mT @ basis.products
        return self.frame([basis.rows] * self.stack.count, edge, basis.gram)


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
        residual = Residual(left, right, _coefficients(self.canonical.s, -shared.cores))
        part, lost = self._private(residual)
        return [shared.part, part], lost

    def one_sided(self, form: str, basis: Basis) -> tuple[list[Part], Tensor]:
        """Columns with one end on a basis, of the input side for "ps" and of the output side for "sp"."""
        at = 1 if form == "ps" else 0
        parts, lost = self._one_sided(form, basis, self.sides[at], self.sides[1 - at])
        return parts if at == 1 else [_mirrored(part) for part in parts], lost

    def _private(self, residual: Residual) -> tuple[Part, Tensor]:
        return private_columns(residual, self.allowed, self.widths.private, self._corrections)

    def _one_sided(self, form: str, basis: Basis, near: Side, far: Side) -> tuple[list[Part], Tensor]:
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
        counts, (ends, ends_seen, ends_gram) = self._far_ends(form, basis, bare, (far_root.inverse @ u, s, rest))
        kept = torch.arange(s.shape[1]) < counts[:, None]
        loadings = store_rows(unit(root.inverse @ v).mT[kept], self.widths.loadings)
        y = torch.zeros_like(v).mT
        y[kept] = values_of(loadings).double()
        y = y.mT
        weights = best_weights(ends_gram * (y.mT @ basis.gram @ y), (ends_seen * (seen @ y)).sum(-2), kept)
        signed = flip_rows(loadings, torch.where(weights[kept] < 0, -1, 1))
        if self.widths.private == CODED:
            weights = rounded(weights, self.allowed, ends.shape[1])
        part = Part(form, counts, weights[kept].abs(), ends, signed)
        left = far.frame(split_rows(values_of(ends), counts), ends_seen, ends_gram)
        z = _coefficients(self.canonical.s, -(weights.float().double().unsqueeze(-1) * y.mT))
        private, lost = self._private(Residual(left, near.basis_frame(basis), z))
        return [part, private], lost

    def _far_ends(
        self, form: str, basis: Basis, bare: Frame, found: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Stored]:
        """Give how many columns have their other end on a basis, and their private ends."""
        coordinates, s, rest = found
        widths, shape = self.widths, self.slot.shape
        if widths.private != CODED:
            price = [column_bytes(kind, shape, (basis.rank, basis.rank), widths) for kind in (form, "pp")]
            counts, _ = one_sided_counts(s, rest, self.allowed, *price)
            return counts, stored_ends(bare, coordinates, counts, widths.private)
        ends = one_sided_ends(form, shape, (s, rest), basis.rank, widths)
        rounded = (rounding_of(widths.basis) + rounding_of(widths.loadings)) * self.canonical.s.square().sum(-1)
        steps = Curve(ends).steps_at((self.allowed - rounded).clamp(min=0))
        kept = ends[0].costs(steps)[2]
        counts = kept.sum(-1)
        return counts, form_ends(bare, coordinates, counts).coded(steps[:, None] / s.clamp(min=1e-300), kept)


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
