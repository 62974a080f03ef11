"""Columns with one end on a basis and the other private: adapters of one seed share what their inputs are seen by."""

from __future__ import annotations

import torch
from torch import Tensor

from loraspan.collection.assemble import Part
from loraspan.collection.bases import Basis, unit
from loraspan.collection.formed import Stored, form_ends, split_rows, stored_ends
from loraspan.collection.prices import column_bytes, one_sided_counts, one_sided_ends, product_spectrum
from loraspan.collection.private import Residual, best_weights
from loraspan.collection.rows import CODED, Rows, Widths, flip_rows, rounding_of, store_rows, values_of
from loraspan.collection.sides import Side, coefficients
from loraspan.collection.steps import Curve, whole_steps
from loraspan.collection.weights import rounded
from loraspan.linalg.roots import gram_root
from loraspan.ops.dense import svd

# Coded columns that are to do without private ones beside them: how often a step is tried, and how far below what may
# be left each next try aims.
_TRIES, _AIM = 6, 0.99


class OneSided:
    """The part of every ``dW_i`` of a slot that lies on a basis of one side, as columns.

    All come with the private end, that of ``far``, on the left.

    Args:
        form: "ps" for a basis of the input side, "sp" for one of the output side.
        basis: as stored.
        near: the side of the basis.
        far: the other side.
        shape: ``(n, d)`` of the slot.
        s: ``[T, c]``, canonical singular values.
    """

    def __init__(self, form: str, basis: Basis, near: Side, far: Side, shape: tuple[int, int], s: Tensor) -> None:
        self._form, self._basis, self._near, self._far, self._shape, self._canonical = form, basis, near, far, shape, s
        # [T, c, k]: what the basis sees of the canonical factor
        self._seen = near.transform.mT @ basis.products
        root = gram_root(basis.gram)
        self._bare = far.bare_frame()
        far_root = gram_root(self._bare.gram)
        u, self._s, v = svd(far_root.r @ (self._seen @ root.inverse))
        self._ends, self._loadings = far_root.inverse @ u, unit(root.inverse @ v)
        inside = self._seen @ root.inverse @ root.inverse.T @ self._seen.mT
        self._rest = product_spectrum(self._bare.gram, near.bare_frame().gram - inside)

    def within(self, allowed: Tensor, widths: Widths) -> tuple[Part, Residual]:
        """Give the columns that the cheapest plan has for ``allowed [T]``, and what they leave of every task."""
        if widths.private == CODED:
            return self._coded(allowed, widths)
        price = [column_bytes(kind, self._shape, (self._basis.rank,) * 2, widths) for kind in (self._form, "pp")]
        counts, _ = one_sided_counts(self._s, self._rest, allowed, *price)
        kept = torch.arange(self._s.shape[1]) < counts[:, None]
        loadings = store_rows(self._loadings.mT[kept], widths.loadings)
        ends = stored_ends(self._bare, self._ends, counts, widths.private)
        return self._weighed(ends, loadings, kept)

    def _coded(self, allowed: Tensor, widths: Widths) -> tuple[Part, Residual]:
        """The same in whole steps; those of tasks that need no private columns by their plan are shortened until so."""
        inside, outside = one_sided_ends(self._form, self._shape, (self._s, self._rest), self._basis.rank, widths)
        packed = (rounding_of(widths.basis) + rounding_of(widths.loadings)) * self._canonical.square().sum(-1)
        steps = Curve([inside, outside]).steps_at((allowed - packed).clamp(min=0))
        alone = ~outside.costs(steps)[2].any(-1)
        beyond = self._rest.square().sum(-1)
        # shorter steps that are tried may keep more
        most = inside.costs(steps / 2)[2]
        formed = form_ends(self._bare, self._ends, most.sum(-1))
        for i in range(_TRIES):
            kept, of_ends = inside.costs(steps)[2] & most, steps[:, None] / self._s.clamp(min=1e-300)
            ends, loadings = formed.coded(of_ends, kept), self._loadings.mT[kept]
            if widths.loadings == CODED:
                rows: Rows = whole_steps(loadings, of_ends[kept])
            else:
                rows = store_rows(loadings, widths.loadings)
            part, residual = self._weighed(ends, rows, kept, allowed)
            remains = residual.squares()
            over = alone & (remains > allowed)
            if not over.any() or i == _TRIES - 1:
                break
            ratio = ((_AIM * allowed - beyond) / (remains - beyond).clamp(min=1e-300)).clamp(0.25, 0.98).sqrt()
            steps = torch.where(over, steps * ratio, steps)
        return part, residual

    def _weighed(
        self, stored: Stored, loadings: Rows, kept: Tensor, allowed: Tensor | None = None
    ) -> tuple[Part, Residual]:
        """Give columns of such ends with their best weights, and what they leave.

        Weights beside coded ends are rounded as far as what may be ``allowed`` lets them.
        """
        ends, ends_seen, ends_gram = stored
        counts = kept.sum(-1)
        y = torch.zeros_like(self._loadings).mT
        y[kept] = values_of(loadings).double()
        inner = ends_gram * (y @ self._basis.gram @ y.mT)
        weights = best_weights(inner, (ends_seen * (self._seen @ y.mT)).sum(-2), kept)
        signed = flip_rows(loadings, torch.where(weights[kept] < 0, -1, 1))
        if allowed is not None:
            weights = rounded(weights, allowed, ends.shape[1])
        part = Part(self._form, counts, weights[kept].abs(), ends, signed)
        left = self._far.frame(split_rows(values_of(ends), counts), ends_seen, ends_gram)
        z = coefficients(self._canonical, -(weights.float().double().unsqueeze(-1) * y))
        return part, Residual(left, self._near.basis_frame(self._basis), z)
