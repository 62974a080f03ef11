"""Shares of an error budget, and which form of a slot meets its share in the fewest bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan.collection.columns import FORMS
from loraspan.collection.factors import Canonical
from loraspan.collection.layout import basis_bytes, columns_bytes
from loraspan.collection.private import columns_within
from loraspan.collection.rows import Width, Widths
from loraspan.linalg.roots import gram_root
from loraspan.ops.dense import eigh

# Share of the squared budget set aside for what rounding the stored numbers adds.
_SLACK = 0.1


class Plan(NamedTuple):
    """One way to store a slot: the form of its shared columns, the widths of its bases, and the bytes it would take.

    ``form`` is "ss" (both bases), "ps" (input basis only, private left ends), "sp" (output basis only) or "pp"
    (no basis).
    """

    form: str
    rank_out: int
    rank_in: int
    nbytes: int


def allotments(spectra: Sequence[tuple[Sequence[int], Tensor]], count: int, max_error: float | Tensor) -> list[Tensor]:
    r"""Share every task's squared budget out over its slots.

    A share is what the cheapest all-private form would drop there (the smallest squared singular values of the
    task, over all its slots, that fit the budget), plus a part of the rest in proportion to the slot's energy.

    Args:
        spectra: per slot, its tasks and their singular values ``[T, r]``.
        count: the number of tasks.
        max_error: relative, for every task or ``[N]``.

    Returns:
        Per slot ``[T]``: squared Frobenius norms; those of a task sum to ``max_error^2 |dW|^2``.

    Example:
        >>> import torch
        >>> one, two = allotments([([0], torch.tensor([[3.0]])), ([0], torch.tensor([[1.0]]))], 1, 0.5)
        >>> round(float(one + two), 6)
        2.5
    """
    members = [torch.tensor(tasks) for tasks, _ in spectra]
    squares = [s.double().square() for _, s in spectra]
    totals = _per_task(members, [value.sum(-1) for value in squares], count)
    budgets = max_error**2 * totals
    shares = _smallest_within(members, squares, (1 - _SLACK) * budgets)
    rest = (budgets - _per_task(members, shares, count)) / torch.where(totals > 0, totals, 1.0)
    return [share + rest[tasks] * value.sum(-1) for tasks, share, value in zip(members, shares, squares, strict=True)]


def _per_task(members: Sequence[Tensor], values: Sequence[Tensor], count: int) -> Tensor:
    """Sum values ``[T]`` of every slot by task."""
    totals = torch.zeros(count, dtype=torch.float64)
    for tasks, value in zip(members, values, strict=True):
        totals.index_add_(0, tasks, value)
    return totals


def _smallest_within(members: Sequence[Tensor], squares: Sequence[Tensor], budgets: Tensor) -> list[Tensor]:
    """Per slot ``[T]``: the sum of those values that are among a task's smallest over all slots and fit its budget."""
    values = torch.cat([value.flatten() for value in squares])
    owners = torch.cat([t.repeat_interleave(v.shape[1]) for t, v in zip(members, squares, strict=True)])
    order = torch.argsort(values, stable=True)
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


class Planner:
    """Counts the bytes of every form of one slot that brings each task within its allotment.

    Args:
        shape: ``(n, d)``.
        canonical: the slot's tasks in canonical coordinates.
        out: ``[T, r, l]``: raw output factors times the directions of the output side.
        inn: ``[T, r, l]``: raw input factors times the directions of the input side.
        allowed: ``[T]``: squared norms that may be lost.
        widths: of what is stored.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        canonical: Canonical,
        out: Tensor,
        inn: Tensor,
        allowed: Tensor,
        widths: Widths | Width,
    ) -> None:
        self._shape = shape
        self._s = canonical.s
        self._out = canonical.x.mT @ out
        self._in = canonical.y.mT @ inn
        self._allowed = allowed
        self._widths = Widths.of(widths)

    def bytes_by_form(self) -> dict[str, NDArray[np.int64]]:
        """Give the bytes that every task's columns take in each form that the whole bases permit, ``[T]``."""
        rank_out, rank_in = self._out.shape[2], self._in.shape[2]
        found = {"pp": self._columns(0, 0, {"pp": columns_within(self._s, self._allowed)})}
        if rank_out:
            found["sp"] = self._columns(rank_out, 0, self._one_sided_counts("sp", rank_out))
        if rank_in:
            found["ps"] = self._columns(0, rank_in, self._one_sided_counts("ps", rank_in))
        if rank_out and rank_in:
            found["ss"] = np.minimum(*self._both_columns(rank_out, rank_in))
        return found

    def plans(self) -> list[Plan]:
        """Every form, at widths that double up to those of the ranges; the all-private one first."""
        widest = max(self._out.shape[2], self._in.shape[2])
        widths = sorted({2**i for i in range(2, widest.bit_length()) if 2**i < widest} | {widest}) if widest else []
        alone = {"pp": columns_within(self._s, self._allowed)}
        found = [self._plan("pp", 0, 0, self._columns(0, 0, alone))]
        for width in widths:
            rank_out, rank_in = min(width, self._out.shape[2]), min(width, self._in.shape[2])
            found += [self._both(rank_out, rank_in), self._one_sided("ps", rank_in), self._one_sided("sp", rank_out)]
        return found

    def _plan(self, form: str, rank_out: int, rank_in: int, columns: NDArray[np.int64]) -> Plan:
        n, d = self._shape
        return Plan(form, rank_out, rank_in, int(columns.sum()) + basis_bytes(n, d, rank_out, rank_in, self._widths))

    def _columns(
        self, rank_out: int, rank_in: int, counts: dict[str, Tensor], dense: bool = False
    ) -> NDArray[np.int64]:
        n, d = self._shape
        table = torch.stack([counts.get(form, torch.zeros(len(self._s), dtype=torch.int64)) for form in FORMS], dim=-1)
        return columns_bytes(table.numpy(), n=n, d=d, k_out=rank_out, k_in=rank_in, dtype=self._widths, dense=dense)

    def _both(self, rank_out: int, rank_in: int) -> Plan:
        found = [self._plan("ss", rank_out, rank_in, columns) for columns in self._both_columns(rank_out, rank_in)]
        return min(found, key=lambda plan: plan.nbytes)

    def _both_columns(self, rank_out: int, rank_in: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """With factored and with dense cores."""
        b, a = self._out[..., :rank_out], self._in[..., :rank_in]
        # dW = B' A', B' = U b^T + B_rest, A' = a V^T + A_rest: what is left is U b^T A_rest + B_rest A'
        diagonal = torch.diag_embed(self._s)
        seen_out, rest_in = b @ b.mT, diagonal - a @ a.mT
        rest_out, zero = diagonal - seen_out, torch.zeros_like(diagonal)
        left = torch.cat([torch.cat([seen_out, zero], 2), torch.cat([zero, rest_out], 2)], 1)
        right = torch.cat([torch.cat([rest_in, rest_in], 2), torch.cat([rest_in, diagonal], 2)], 1)
        private = columns_within(product_spectrum(left, right), self._allowed)
        core = (self._s > 0).sum(-1).clamp(max=min(rank_out, rank_in))
        ranks, whole = (rank_out, rank_in), torch.full_like(core, rank_in)
        factored = self._columns(*ranks, {"ss": core, "pp": private})
        return factored, self._columns(*ranks, {"ss": whole, "pp": private}, dense=True)

    def _one_sided(self, form: str, rank: int) -> Plan:
        ranks = (0, rank) if form == "ps" else (rank, 0)
        return self._plan(form, *ranks, self._columns(*ranks, self._one_sided_counts(form, rank)))

    def _one_sided_counts(self, form: str, rank: int) -> dict[str, Tensor]:
        seen = (self._in if form == "ps" else self._out)[..., :rank]
        inside, other = seen @ seen.mT, torch.diag_embed(self._s)
        # the other factor's columns are orthogonal, of squared lengths s; the two parts are orthogonal to each other
        shared, private = (product_spectrum(other, part) for part in (inside, other - inside))
        prices = [column_bytes(kind, self._shape, rank, self._widths) for kind in (form, "pp")]
        counts = one_sided_counts(shared, private, self._allowed, *prices)
        return {form: counts[0], "pp": counts[1]}


def column_bytes(form: str, shape: tuple[int, int], rank: int, widths: Widths) -> int:
    """Give the bytes of one column of a form in a slot of ``shape`` ``(n, d)`` whose basis has ``rank`` vectors."""
    counts = [int(form == other) for other in FORMS]
    return int(columns_bytes(counts, n=shape[0], d=shape[1], k_out=rank, k_in=rank, dtype=widths))


def one_sided_counts(
    shared: Tensor, private: Tensor, allowed: Tensor, shared_bytes: int, private_bytes: int
) -> tuple[Tensor, Tensor]:
    """Give how many columns of two orthogonal spectra to keep, the largest per byte first, to drop at most ``allowed``.

    Args:
        shared: ``[T, a]`` singular values, descending, of the part with one shared end.
        private: ``[T, b]`` of the part with none.
        allowed: ``[T]`` squared norms.
        shared_bytes: of one column of the first kind.
        private_bytes: of one of the second.

    Example:
        >>> import torch
        >>> shared, private = torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 0.5]])
        >>> one_sided_counts(shared, private, torch.tensor([1.25]), 10, 10)
        (tensor([1]), tensor([1]))
    """
    squares = torch.cat([shared, private], dim=1).square()
    price = torch.cat([torch.full_like(shared, shared_bytes), torch.full_like(private, private_bytes)], dim=1)
    order = torch.argsort(squares / price, dim=1, descending=True, stable=True)
    tails = squares.gather(1, order).flip(1).cumsum(1).flip(1)
    kept = tails > allowed[:, None]
    first = order < shared.shape[1]
    return (kept & first).sum(1), (kept & ~first).sum(1)


def product_spectrum(left: Tensor, right: Tensor) -> Tensor:
    """Give the singular values of ``F_left F_right^T`` from the Grams of its factors, ``[T, q]``, descending."""
    root = gram_root(left).r
    inner = root @ right @ root.mT
    return eigh((inner + inner.mT) / 2).values.clamp(min=0).sqrt()
