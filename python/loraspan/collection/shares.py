"""Shares of an error budget: what of a task's error each of its slots may have."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from loraspan.collection.prices import column_bytes
from loraspan.collection.rows import CODED, Widths, rounding_of
from loraspan.collection.steps import CommonSteps, Ends

# Share of the squared budget that no truncation takes, beside what rounding is expected to: so that what is measured
# in the end need not be compared with a sum that is equal to the last bit.
_SLACK = 1e-6
# What rounding may take above its expected share.
_CAUTION = 1.1


class Shares:
    """Shares every task's squared budget out over its slots, for columns of given widths.

    Coded ends have one step in all slots of a task; for others see :func:`allotments`.

    Args:
        spectra: per slot, its tasks and their singular values ``[T, r]``, descending.
        shapes: ``(n, d)`` of every slot.
        squares: ``[N]``: every task's ``|dW|_F^2`` over all slots.
    """

    def __init__(
        self, spectra: Sequence[tuple[Sequence[int], Tensor]], shapes: Sequence[tuple[int, int]], squares: Tensor
    ) -> None:
        self._spectra, self._shapes, self._squares = spectra, shapes, squares

    @cached_property
    def _steps(self) -> CommonSteps:
        pairs = zip(self._spectra, self._shapes, strict=True)
        return CommonSteps([(tasks, Ends(s.double(), shape)) for (tasks, s), shape in pairs], len(self._squares))

    def within(self, max_error: float | Tensor, widths: Widths) -> list[Tensor]:
        """Give squared Frobenius norms, per slot ``[T]``, for a relative error of every task or ``[N]``."""
        if not self._spectra:
            return []
        if widths.private == CODED:
            return self._steps.shares((1 - _SLACK) * max_error**2 * self._squares)
        prices = [column_bytes("pp", shape, (0, 0), widths) for shape in self._shapes]
        rounding = 2 * rounding_of(widths.private)
        return allotments(self._spectra, len(self._squares), max_error, prices=prices, rounding=rounding)


def allotments(
    spectra: Sequence[tuple[Sequence[int], Tensor]],
    count: int,
    max_error: float | Tensor,
    *,
    prices: Sequence[int] | None = None,
    rounding: float = 0.0,
) -> list[Tensor]:
    r"""Share every task's squared budget out over its slots.

    A share is what rounding takes there, what the cheapest all-private form would drop (the squared singular values of
    the task, over all its slots, that cost the least per byte and fit the budget), and a part of the rest in proportion
    to the slot's energy.

    Args:
        spectra: per slot, its tasks and their singular values ``[T, r]``.
        count: the number of tasks.
        max_error: relative, for every task or ``[N]``.
        prices: bytes of a private column in each slot; one price for all if left out.
        rounding: share of the energy of what is stored that rounding takes.

    Returns:
        Per slot ``[T]``: squared Frobenius norms; those of a task sum to ``max_error^2 |dW|^2``.

    Example:
        >>> import torch
        >>> one, two = allotments([([0], torch.tensor([[3.0]])), ([0], torch.tensor([[1.0]]))], 1, 0.5)
        >>> round(float(one + two), 6)
        2.5
    """
    if not spectra:
        return []
    members = [torch.tensor(tasks) for tasks, _ in spectra]
    squares = [s.double().square() for _, s in spectra]
    energies = [value.sum(-1) for value in squares]
    totals = _per_task(members, energies, count)
    budgets = max_error**2 * totals
    expected = _CAUTION * rounding
    prices = prices or [1] * len(spectra)
    dropped = _cheapest_within(members, squares, ((1 - _SLACK) * budgets - expected * totals).clamp(min=0), prices)
    shares = [drop + expected * energy for drop, energy in zip(dropped, energies, strict=True)]
    rest = (budgets - _per_task(members, shares, count)) / torch.where(totals > 0, totals, 1.0)
    return [share + rest[tasks] * energy for tasks, share, energy in zip(members, shares, energies, strict=True)]


def _per_task(members: Sequence[Tensor], values: Sequence[Tensor], count: int) -> Tensor:
    """Sum values ``[T]`` of every slot by task."""
    totals = torch.zeros(count, dtype=torch.float64)
    for tasks, value in zip(members, values, strict=True):
        totals.index_add_(0, tasks, value)
    return totals


def _cheapest_within(
    members: Sequence[Tensor], squares: Sequence[Tensor], budgets: Tensor, prices: Sequence[int]
) -> list[Tensor]:
    """Per slot ``[T]``: the sum of the values that drop the most bytes for a task's budget, over all its slots."""
    values = torch.cat([value.flatten() for value in squares])
    per_byte = torch.cat([value.flatten() / price for value, price in zip(squares, prices, strict=True)])
    owners = torch.cat([t.repeat_interleave(v.shape[1]) for t, v in zip(members, squares, strict=True)])
    order = torch.argsort(per_byte, stable=True)
    order = order[torch.argsort(owners[order], stable=True)]
    owner, running = owners[order], values[order].cumsum(0)
    starts = torch.searchsorted(owner, torch.arange(len(budgets)))
    before = torch.cat([running.new_zeros(1), running])[starts]
    dropped = torch.zeros_like(values)
    dropped[order] = torch.where(running - before[owner] <= budgets[owner], values[order], 0.0)
    shares, start = [], 0
    for value in squares:
        shares.append(dropped[start : start + value.numel()].view_as(value).sum(-1))
        start += value.numel()
    return shares
