r"""Bases turned out of what the last pass of a range has formed, where a float64 pass of their own would tell no more.

A sketched range ends with ``Y = X^T W`` and ``P = X Y``, in float32. The basis wanted is ``V = Y t`` for a small ``t``,
and its products are ``X V = P t``: nothing as long as the data has to be read again. What float32 costs is estimated
with rounding errors that are independent and of mean zero, ``u = 2^-24``:

- Column l of ``Y`` has an error of about ``3 u c_l``, ``c_l^2 = sum_i W_il^2 |x_i|^2``: runs of 128 rows are summed
  from zero. So column j of ``V`` is off by ``u sqrt(sum_l t_lj^2 (9 c_l^2 + |y_l|^2))``, and a task's ``U C V^T`` by
  that of each direction times what ``C`` has along it.
- Entry (i, l) of ``P`` is a sum of float32 sums over 128 columns, each of whose additions rounds what it has come to:
  ``E = 0.42 u`` of that in the mean. A term is in 64 of them; where all have one sign, their squares come to a third
  of 128 times that of the whole. So it is off by about ``E sqrt(64 f_l |x_i|^2 |y_l|^2 + 43 p_l P_il^2)``, ``f_l`` the
  sum of the fourth powers of ``y_l / |y_l|`` and ``p_l`` its largest share in 128 columns: 3 / d and 128 / d where all
  columns are alike, 1 and 1 where one outgrows them. These errors are in ``C``, and to first order in the error of a
  task, ``|dW|^2 + |C|^2 - 2 <C, U^T dW V>``.

Both are small for factors that are about as long as they must be for their product, as trained ones are. A gauge that
makes them longer makes both larger. Where a task's ``U C V^T`` may be off by more than 5e-7 of ``|dW|``, or its error,
as measured on the stored bases, by 1e-6 at five standard deviations, there are no turned bases, and the caller takes
the pass. So it does where little is lost, whose error is a small difference.

Source:
    Independent rounding errors: Higham and Mary, *A new approach to probabilistic rounding error analysis*, 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.collection.bases import ORTHOGONALITY, Basis, SharedCores, shared_cores
from loraspan.collection.factors import SlotFactors
from loraspan.collection.ranges import Formed, Range
from loraspan.collection.rows import Widths
from loraspan.collection.stack import Stack
from loraspan.ops import gram, reconstruct
from loraspan.ops.places import fetched
from loraspan.ops.product import inner, product

_UNIT = 2.0**-24
# As above: errors of Y and of one addition, the columns that float32 sums of P run over, and what either may come to.
_OF_BASIS, _OF_ADDITION, _SUMMED = 3.0, 0.42, 128
_OFF, _ERROR_OFF, _DEVIATIONS = 5e-7, 1e-6, 5.0


class _Turned(NamedTuple):
    """A basis, and the variances of its columns, ``[k]``, and of the entries of its products, ``[T, r, k]``."""

    basis: Basis
    off: Tensor
    products_off: Tensor


def turned_cores(
    slot: SlotFactors,
    squares: Tensor,
    sides: Sequence[Stack],
    ranges: Sequence[Range],
    turns: Sequence[Tensor],
    widths: Widths,
) -> tuple[Basis, Basis, SharedCores] | None:
    """Give float32 bases ``range @ turn`` of both sides and every task's core on them, without a pass.

    Args:
        slot: the factors.
        squares: ``|dW|_F^2`` of its tasks over all their slots, ``[T]``.
        sides: of its output and its input, vectors of the factors themselves.
        ranges: of both.
        turns: ``[l, k]`` each, orthonormal.
        widths: to store with.

    Returns:
        None where a range has formed nothing, the bases are not float32, or a pass would do better (see above).
    """
    if widths.basis != torch.float32:
        return None
    made = []
    for side, found, turn, own in zip(sides, ranges, turns, (slot.gram_up, slot.gram_down), strict=True):
        if found.formed is None or not turn.shape[1]:
            return None
        lengths = side.vectors.pack(own.diagonal(dim1=1, dim2=2).unsqueeze(2))
        made.append(_turn(side, found.formed, turn, lengths))
    if any((one.basis.gram - torch.eye(one.basis.rank)).abs().max() > ORTHOGONALITY[torch.float32] for one in made):
        return None
    out, inn = made
    shared = shared_cores(out.basis, inn.basis, slot.scales, slot.squares, widths.loadings)
    return (out.basis, inn.basis, shared) if _carries(slot, squares, out, inn, shared) else None


def _turn(side: Stack, formed: Formed, turn: Tensor, squares: Tensor) -> _Turned:
    """Turn one side; ``squares [R, 1]`` are those of the lengths of its rows."""
    # rounded first: the basis and its products are turned by the same numbers
    narrow = (formed.turn @ turn).float()
    v = fetched(reconstruct(formed.v, narrow.to(formed.v.device)))
    wide = narrow.double()
    basis = Basis(v, side.pad(product(formed.xv, wide)), gram([v.T], precision="f64"))
    energies, turned = formed.lengths.square(), wide.square()
    rounded = energies + _OF_BASIS**2 * inner(squares, formed.w.square())
    fourth, peak = _concentration(fetched(formed.v), formed.lengths)
    unit = (_UNIT * _OF_ADDITION) ** 2
    products_off = product(formed.xv.square(), (unit * _SUMMED / 3 * peak)[:, None] * turned)
    products_off.addr_(squares[:, 0], unit * _SUMMED / 2 * (fourth * energies) @ turned)
    return _Turned(basis, _UNIT**2 * (rounded @ turned)[0], side.pad(products_off))


def _concentration(y: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Give ``f`` and ``p`` of the columns of ``y [d, m]``: see above."""
    shares = (y * torch.where(lengths > 0, 1 / lengths, 0.0).float()).square_()
    blocks = len(shares) // _SUMMED
    whole, rest = shares[: blocks * _SUMMED], shares[blocks * _SUMMED :]
    peaks = torch.cat([whole.view(blocks, _SUMMED, shares.shape[1]).sum(1), rest.sum(0, keepdim=True)]).amax(0)
    return shares.square_().sum(0).double(), peaks.double()


def _carries(slot: SlotFactors, squares: Tensor, out: _Turned, inn: _Turned, shared: SharedCores) -> bool:
    """Say whether float32 is good enough for every task."""
    left, right = shared.left, shared.right
    b, a = out.basis.products, inn.basis.products
    scales = slot.scales.square()
    # the derivatives of half the error by the products of either side
    by_b = product(a if right is None else product(a, right.mT), left)
    by_a = product(b, left.mT) if right is None else product(product(b, left.mT), right)
    noise = scales * (by_b.square_().mul_(out.products_off) + by_a.square_().mul_(inn.products_off)).sum((1, 2))
    # what a core has along each direction: its left rows are orthogonal, its right ones orthonormal
    along = left.square()
    sizes = along.sum(2, keepdim=True)
    off = along.sum(1) @ out.off
    off += (sizes.squeeze(2) if right is None else right.square().mul_(sizes).sum(1)) @ inn.off
    off += scales * (out.products_off.sum(2) * a.square().sum(2) + inn.products_off.sum(2) * b.square().sum(2)).sum(1)
    fine = off <= _OFF**2 * slot.squares
    # with sums over slots on both sides it is what is said above, of a task
    fine &= _DEVIATIONS * noise.sqrt() <= _ERROR_OFF * (shared.squares * squares).sqrt()
    return bool(fine[slot.squares > 0].all())
