"""Which form of a slot meets its share of an error budget in the fewest bytes."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan.collection.factors import Canonical
from loraspan.collection.layout import basis_bytes
from loraspan.collection.prices import column_bytes, one_sided_counts, one_sided_ends, product_spectrum
from loraspan.collection.private import columns_within
from loraspan.collection.rows import CODED, Width, Widths, rounding_of, unstepped
from loraspan.collection.steps import CodedBasis, Curve, Ends

# What a header takes for a side with a basis, about: the names of the basis, of the loadings, and of their scales.
_NAMES = 200
# The same where both are coded: numbers of streams have no names.
_CODED_NAMES = 32
# Share of the bytes of coded private columns below which a basis is worth it, and how often energy counts in choosing
# it that it does not hold. It lies in a few directions, which a task has learned for itself, what rounding loses in
# all: at the same error and bytes tasks do better with rounding.
_WORTH, _BEYOND = 0.9, 4.0
# More than any plan takes: of forms that rounding rules out.
NEVER = 1 << 60


class Plan(NamedTuple):
    """One way to store a slot: the form of its shared columns, the widths of its bases, and the bytes it would take.

    ``form`` is "ss" (both bases), "ps" (input basis only, private left ends), "sp" (output basis only) or "pp"
    (no basis).
    """

    form: str
    rank_out: int
    rank_in: int
    nbytes: int


class Planner:
    """Counts the bytes of every form of one slot that brings each task within its allotment.

    Args:
        shape: ``(n, d)``.
        canonical: the slot's tasks in canonical coordinates.
        out: ``[T, r, l]``: raw output factors times the directions of the output side.
        inn: ``[T, r, l]``: raw input factors times the directions of the input side.
        allowed: ``[T]``: squared norms that may be lost.
        widths: of what is stored.
        weights: ``[T]``: of the tasks, where the bases are yet to be stored; None for bases that stand.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        canonical: Canonical,
        out: Tensor,
        inn: Tensor,
        allowed: Tensor,
        widths: Widths | Width,
        weights: Tensor | None = None,
    ) -> None:
        self._shape, self._weights = shape, weights
        self._s = canonical.s
        self._out = canonical.x.mT @ out
        self._in = canonical.y.mT @ inn
        self._allowed = allowed
        self._widths = Widths.of(widths)
        self._energy = self._s.square().sum(-1)
        self._zero = (self._s == 0).all(-1)
        self._spectra: dict[tuple[str, int, int], tuple[Tensor, ...]] = {}
        self._curves: dict[tuple[object, ...], Curve] = {}

    def at(self, allowed: Tensor, widths: Widths) -> Planner:
        """Give the planner of the same slot for other allotments and widths; spectra are shared."""
        other = copy.copy(self)
        other._allowed, other._widths = allowed, widths
        return other

    def bytes_by_form(self) -> dict[str, NDArray[np.int64]]:
        """Give the bytes that every task's columns take in each form that the whole bases permit, ``[T]``."""
        rank_out, rank_in = self._out.shape[2], self._in.shape[2]
        found = {"pp": self._alone()}
        if rank_out:
            found["sp"] = self._one_sided("sp", rank_out)
        if rank_in:
            found["ps"] = self._one_sided("ps", rank_in)
        if rank_out and rank_in:
            found["ss"] = np.minimum(*self._both(rank_out, rank_in))
        return found

    def plans(self) -> list[Plan]:
        """Every form, at widths that grow by a half or a third up to those of the ranges; the all-private one first."""
        return [self._plan("pp", 0, 0), *(self._plan(*shared) for shared in self._shared())]

    def cheapest(self) -> Plan:
        """Give the plan of the fewest bytes; what would take more for its bases alone is not counted."""
        best = alone = self._plan("pp", 0, 0)
        worth = _WORTH if self._widths.private == CODED else 1.0
        for form, rank_out, rank_in in self._shared():
            if self._is_stepped(form) or self._basis_bytes(rank_out, rank_in) < best.nbytes:
                best = min(best, self._plan(form, rank_out, rank_in), key=lambda plan: plan.nbytes)
        return best if best.nbytes < worth * alone.nbytes else alone

    def _shared(self) -> list[tuple[str, int, int]]:
        """Forms with bases, and the ranks of those."""
        most_out, most_in = self._out.shape[2], self._in.shape[2]
        widest = max(most_out, most_in)
        steps = (step << i for i in range(widest.bit_length()) for step in (4, 6))
        widths = sorted({step for step in steps if step < widest} | {widest}) if widest else []
        pairs = [(min(width, most_out), min(width, most_in)) for width in widths]
        return [shared for out, inn in pairs for shared in (("ss", out, inn), ("ps", 0, inn), ("sp", out, 0))]

    def _plan(self, form: str, rank_out: int, rank_in: int) -> Plan:
        if form == "pp":
            columns = self._alone()
        elif form == "ss":
            columns = min(self._both(rank_out, rank_in), key=lambda each: int(each.sum()))
        else:
            columns = self._one_sided(form, rank_out or rank_in)
        # one task that has no such form is enough
        total = NEVER if (columns >= NEVER // max(len(columns), 1)).any() else int(columns.sum())
        if self._is_stepped(form):
            rank = rank_in if form == "ps" else rank_out
            steps = self.basis_steps(form, rank)
            assert steps is not None
            nbytes = self._basis(form, rank).nbytes(steps) + _CODED_NAMES
        else:
            nbytes = self._basis_bytes(rank_out, rank_in)
        return Plan(form, rank_out, rank_in, total + nbytes)

    def _basis_bytes(self, rank_out: int, rank_in: int) -> int:
        sides = (rank_out > 0) + (rank_in > 0)
        return basis_bytes(*self._shape, rank_out, rank_in, self._widths) + _NAMES * sides

    def _is_stepped(self, form: str) -> bool:
        """Say whether bases of a form are yet to be rounded to whole steps."""
        return self._weights is not None and self._widths.basis == CODED and form in ("ps", "sp")

    def _basis(self, form: str, rank: int) -> CodedBasis:
        assert self._weights is not None
        seen = (self._in if form == "ps" else self._out)[..., :rank]
        # |dW v|^2: the columns of the other canonical factor are orthogonal, of squared lengths s
        held = (self._s.unsqueeze(-1) * seen.square()).sum(1)
        return CodedBasis(held, self._weights, self._shape[1 if form == "ps" else 0])

    def basis_steps(self, form: str, rank: int) -> Tensor | None:
        """Give the steps ``[rank]`` that a basis of one side is to be rounded by; None if it is not."""
        if not self._is_stepped(form):
            return None
        curve, (allowed, _) = self._one_sided_curve(form, rank)
        return self._basis(form, rank).common(curve.steps_at(allowed))

    def _alone(self) -> NDArray[np.int64]:
        if self._widths.private == CODED:
            return self._coded(self._curve("pp", (0, 0), [Ends(self._s, self._shape)]), self._left_by_rounding(0))
        allowed, possible = self._left_by_rounding(2 * rounding_of(self._widths.private))
        return self._columns(0, 0, {"pp": columns_within(self._s, allowed)}, possible)

    def _left_by_rounding(self, share: float) -> tuple[Tensor, Tensor]:
        """Give what may be truncated where rounding takes a share of the energy, and whether it leaves anything."""
        allowed = self._allowed - share * self._energy
        # a zero task needs nothing
        return allowed.clamp(min=0), (allowed > 0) | self._zero

    def _columns(
        self, rank_out: int, rank_in: int, counts: dict[str, Tensor], possible: Tensor, dense: bool = False
    ) -> NDArray[np.int64]:
        total = torch.zeros(len(self._s), dtype=torch.int64)
        for form, count in counts.items():
            total += count * column_bytes(form, self._shape, (rank_out, rank_in), self._widths, dense=dense)
        return torch.where(possible, total, NEVER // max(len(self._s), 1)).numpy()

    def _both(self, rank_out: int, rank_in: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """With factored and with dense cores."""
        if ("ss", rank_out, rank_in) not in self._spectra:
            self._spectra["ss", rank_out, rank_in] = (self._rest_of_both(rank_out, rank_in),)
        (spectrum,) = self._spectra["ss", rank_out, rank_in]
        share = 2 * rounding_of(unstepped(self._widths.basis)) + 2 * rounding_of(unstepped(self._widths.loadings))
        allowed, possible = self._left_by_rounding(share)
        ranks, core = (rank_out, rank_in), (self._s > 0).sum(-1).clamp(max=min(rank_out, rank_in))
        whole, counts, coded = torch.full_like(core, rank_in), {}, np.zeros(len(core), dtype=np.int64)
        if self._widths.private == CODED:
            coded = self._coded(self._curve("ss", ranks, [Ends(spectrum, self._shape)]), (allowed, possible))
        else:
            counts["pp"] = columns_within(spectrum, allowed)
        factored = self._columns(*ranks, {"ss": core, **counts}, possible)
        return factored + coded, self._columns(*ranks, {"ss": whole, **counts}, possible, dense=True) + coded

    def _rest_of_both(self, rank_out: int, rank_in: int) -> Tensor:
        b, a = self._out[..., :rank_out], self._in[..., :rank_in]
        # dW = B' A', B' = U b^T + B_rest, A' = a V^T + A_rest: what is left is U b^T A_rest + B_rest A'
        diagonal = torch.diag_embed(self._s)
        seen_out, rest_in = b @ b.mT, diagonal - a @ a.mT
        rest_out, zero = diagonal - seen_out, torch.zeros_like(diagonal)
        left = torch.cat([torch.cat([seen_out, zero], 2), torch.cat([zero, rest_out], 2)], 1)
        right = torch.cat([torch.cat([rest_in, rest_in], 2), torch.cat([rest_in, diagonal], 2)], 1)
        return product_spectrum(left, right)

    def _one_sided(self, form: str, rank: int) -> NDArray[np.int64]:
        if self._widths.private == CODED:
            return self._coded(*self._one_sided_curve(form, rank))
        shared, private = self._one_sided_spectra(form, rank)
        ranks = (0, rank) if form == "ps" else (rank, 0)
        prices = [column_bytes(kind, self._shape, ranks, self._widths) for kind in (form, "pp")]
        share = sum(map(rounding_of, self._widths[1:]))
        allowed, possible = self._left_by_rounding(share)
        counts = one_sided_counts(shared, private, allowed, *prices)
        return self._columns(*ranks, {form: counts[0], "pp": counts[1]}, possible)

    def _one_sided_spectra(self, form: str, rank: int) -> tuple[Tensor, ...]:
        """Of the part with one end on a basis, and of the rest."""
        if (form, rank, 0) not in self._spectra:
            seen = (self._in if form == "ps" else self._out)[..., :rank]
            inside, other = seen @ seen.mT, torch.diag_embed(self._s)
            # the other factor's columns are orthogonal, of squared lengths s; the two parts are orthogonal too
            self._spectra[form, rank, 0] = (product_spectrum(other, inside), product_spectrum(other, other - inside))
        return self._spectra[form, rank, 0]

    def _one_sided_curve(self, form: str, rank: int) -> tuple[Curve, tuple[Tensor, Tensor]]:
        """Of coded ends, and what rounding of the rest leaves."""
        shared, private = self._one_sided_spectra(form, rank)
        ends = one_sided_ends(form, self._shape, (shared, math.sqrt(_BEYOND) * private), rank, self._widths)
        basis = self._basis(form, rank) if self._is_stepped(form) else None
        left = self._left_by_rounding(rounding_of(self._widths.basis) + rounding_of(self._widths.loadings))
        return self._curve(form, (rank, 0), ends, basis), left

    def _curve(self, form: str, ranks: tuple[int, int], ends: Sequence[Ends], basis: CodedBasis | None = None) -> Curve:
        # the same whatever bases are stored in, but for the loadings beside an end and steps of the bases
        place = form, ranks, tuple((*part.lengths, part.nbytes) for part in ends), basis is None
        found = self._curves.get(place)
        if found is None:
            found = self._curves[place] = Curve(ends, basis)
        return found

    def _coded(self, curve: Curve, left: tuple[Tensor, Tensor]) -> NDArray[np.int64]:
        """Give the bytes of coded ends within what rounding of the rest leaves, ``left``."""
        nbytes, within = curve.bytes_at(left[0])
        possible = (within & left[1]) | self._zero
        return torch.where(possible, nbytes, NEVER // max(len(nbytes), 1)).numpy()
