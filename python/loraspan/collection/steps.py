"""Ends of columns in whole steps of one length: what a step costs in bytes and in error, and the step for a budget.

With the ends of a column times its singular value, ``s u`` and ``s v``, and the other end of length 1, what rounding
takes from ``dW`` is what it takes from the entries of both. Bits are then spent best where one step serves all entries
of all columns, and a column of little energy costs little, without ranks or widths to choose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.collection.coding import LARGEST, ROUNDED, trellis
from loraspan.collection.rates import LEAST, TO_A_STEP, rates
from loraspan.ops.packed import Packed
from loraspan.ops.packed_reference import BLOCK

# Numbers that are rounded, or squared, in one go.
_AT_ONCE = 1 << 18
# Bits beside those of the numbers: of a column (its weight) and of a row (what that does not tell of its size).
_COLUMN_BITS, _ROW_BITS = 5, 0.5
# What models that learn take above the entropy, about.
_LEARNING = 1.01
# Steps for which costs are known before one is looked for: so many an octave (few for the many forms that are counted,
# more for the step that all slots share), from so much below what the largest column can use (small columns can), to
# what keeps nothing of it.
_COARSE, _FINE, _FINER, _KEEPS_NONE = 2, 8, 16, 8
# Singular values are at least so large where something is divided by them: squares of these are numbers still.
_TINY = 1e-150
# What a bit buys with entropy-coded steps of length t: dD/dR = -2 ln 2 D, D = t^2 / 12.
_SLOPE = math.log(2) / 6


def whole_steps(rows: Tensor, steps: Tensor) -> Packed:
    """Round unit vectors to whole numbers by a trellis, as near as with ``steps``, or to these where bits need it.

    Args:
        rows: ``[R, L]``.
        steps: ``[R]``, positive; a row whose largest entry would be above 32512 of them takes a longer one.

    Returns:
        In 8 bits, or in 16 where a number needs them, the scales of a row all those of :func:`scales_of`: the direction
        counts, not the length.
    """
    numbers = torch.empty(rows.shape, dtype=torch.int16)
    some = max(_AT_ONCE // max(rows.shape[1], 1), 1)
    for i in range(0, len(rows) if rows.numel() else 0, some):
        numbers[i : i + some] = _whole(rows[i : i + some], steps[i : i + some].to(rows.dtype))
    if not numbers.numel() or max(map(abs, torch.stack(numbers.aminmax()).tolist())) <= LARGEST[8]:
        return packed_numbers(numbers.to(torch.int8))
    return packed_numbers(numbers)


def _whole(rows: Tensor, steps: Tensor) -> Tensor:
    reach = rows.abs().amax(dim=1)
    # an infinite step, where a column is worth nothing, leaves zeros
    steps = torch.maximum(steps, reach / LARGEST[16]).clamp(min=1e-30)
    units = steps / TO_A_STEP
    # no path fits, or none fits the 8 bits that single numbers do
    alone = (reach > ROUNDED[16] * units) | ((reach > ROUNDED[8] * units) & (reach <= LARGEST[8] * steps))
    numbers = torch.empty(rows.shape, dtype=torch.int16)
    numbers[alone] = (rows[alone] / steps[alone, None]).round().to(torch.int16)
    numbers[~alone] = trellis(rows[~alone] / units[~alone, None])
    return numbers


def packed_numbers(numbers: Tensor) -> Packed:
    """Give rows of int8 or int16 as they are in memory, with the scales of :func:`scales_of`."""
    return Packed(numbers.view(torch.uint8), scales_of(numbers), numbers.shape[1], 8 * numbers.itemsize)


def scales_of(numbers: Tensor) -> Tensor:
    """Give the scales ``[R, ceil(L / 64)]`` with which rows of whole numbers have about length 1: functions of them.

    They are ``128 / sqrt(sum of squares)``, in float64 and then rounded to float16, in all blocks of a row; 0 for 0.

    Example:
        >>> scales_of(torch.tensor([[3, 0, -4], [0, 0, 0]], dtype=torch.int8))
        tensor([[25.5938],
                [ 0.0000]], dtype=torch.float16)
    """
    some = max(_AT_ONCE // max(numbers.shape[1], 1), 1)
    parts = [numbers[i : i + some].to(torch.int32).square().sum(1) for i in range(0, max(len(numbers), 1), some)]
    lengths = torch.cat(parts).double().sqrt()
    scales = torch.where(lengths > 0, 128 / lengths.clamp(min=1), 0.0).half()
    return scales[:, None].expand(-1, -(-numbers.shape[1] // BLOCK)).contiguous()


class Ends(NamedTuple):
    """Columns whose ends are to be rounded to whole steps.

    Attributes:
        s: ``[T, q]`` singular values, descending.
        lengths: of the private ends of a column: one or two.
        nbytes: of the other end, if that is shared and not coded.
    """

    s: Tensor
    lengths: Sequence[int]
    nbytes: int = 0

    def costs(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give, for steps ``[..., T]``, bits and lost energy ``[..., T]`` and which columns to keep ``[..., T, q]``.

        A column is kept where what it holds is worth its bits at the price of a bit elsewhere.
        """
        steps = steps.unsqueeze(-1)
        bits = torch.full_like(self.s, _COLUMN_BITS + 8 * self.nbytes).expand(*steps.shape[:-2], *self.s.shape)
        held = torch.ones_like(bits)
        for length in self.lengths:
            rate, lost = rates(steps * math.sqrt(length) / self.s.clamp(min=_TINY))
            bits, held = bits + _LEARNING * length * rate + _ROW_BITS, held * (1 - lost)
        squares = self.s.square()
        kept = held * squares > _SLOPE * steps.square() * bits
        # ranks, not holes
        kept = kept.cummin(-1).values
        left = torch.where(kept, 1 - held, 1.0) * squares
        return (bits * kept).sum(-1), left.sum(-1), kept


class CodedBasis(NamedTuple):
    """A basis whose vectors are to be rounded to whole steps, each times what the tasks have along it.

    So its bits are spent as those of columns are: a direction that many tasks use a lot is told finely.

    Attributes:
        held: ``[T, k]``: the energy of every task along each vector.
        weights: ``[T]``: of the tasks; steps times these are of one size.
        length: of the vectors.
    """

    held: Tensor
    weights: Tensor
    length: int

    def lost(self, steps: Tensor) -> Tensor:
        """Give what the tasks lose ``[..., T]`` where the steps ``[..., T]`` of their columns round the basis."""
        _, share = rates(self._ratios((steps * self.weights).unsqueeze(-1)))
        return (share * self.held).sum(-1)

    def common(self, steps: Tensor) -> Tensor:
        """Give the steps ``[k]`` of unit vectors that go with steps ``[T]`` of the tasks' columns."""
        used = steps[self.held.sum(-1) > 0] * self.weights[self.held.sum(-1) > 0]
        if not len(used):
            return self.held.new_ones(self.held.shape[-1])
        return self._ratios(used.square().mean().sqrt()) / math.sqrt(self.length)

    def nbytes(self, steps: Tensor) -> int:
        """Give about the bytes of unit vectors in steps ``[k]``."""
        rate, _ = rates(steps * math.sqrt(self.length))
        return math.ceil(float((_LEARNING * self.length * rate + _ROW_BITS).sum()) / 8)

    def _ratios(self, steps: Tensor) -> Tensor:
        """Steps over the standard deviation of the entries."""
        energy = (self.held * self.weights.square().unsqueeze(-1)).sum(0)
        return steps * math.sqrt(self.length) / energy.clamp(min=_TINY).sqrt()


class Curve:
    """Bytes and lost energy of columns over the step that all of a task's share.

    Args:
        parts: of the same tasks.
        basis: that their shared ends are on, if it is yet to be rounded.
    """

    def __init__(self, parts: Sequence[Ends], basis: CodedBasis | None = None) -> None:
        self.steps = _grid(parts)
        costs = [part.costs(self.steps) for part in parts]
        self._bits = torch.stack([bits for bits, _, _ in costs]).sum(0)
        lost = torch.stack([lost for _, lost, _ in costs]).sum(0)
        self._lost = _ascending(lost if basis is None else lost + basis.lost(self.steps))

    def bytes_at(self, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Give the bytes ``[T]`` of what loses at most ``allowed [T]``, and whether anything does."""
        return self._at(self._bits / 8, allowed).ceil().long(), allowed >= self._lost[0]

    def steps_at(self, allowed: Tensor) -> Tensor:
        """Give the longest steps ``[T]`` that lose at most ``allowed [T]``, or the shortest."""
        return self._at(self.steps.log(), allowed).exp()

    def _at(self, values: Tensor, allowed: Tensor) -> Tensor:
        return _between(values, *_places(self._lost, allowed))


class CommonSteps:
    """What every slot of a task loses over the step that is common to all of them.

    Args:
        spectra: per slot, its tasks and their columns.
        count: the number of tasks.
    """

    def __init__(self, spectra: Sequence[tuple[Sequence[int], Ends]], count: int) -> None:
        largest = torch.zeros(count, dtype=torch.float64)
        for tasks, part in spectra:
            at = torch.tensor(tasks)
            largest[at] = torch.maximum(largest[at], _largest([part]))
        steps = _ratios([part for _, part in spectra], _FINE)[:, None] * largest.clamp(min=_TINY)
        self._members = [torch.tensor(tasks) for tasks, _ in spectra]
        self._lost = [part.costs(steps[:, at])[1] for at, (_, part) in zip(self._members, spectra, strict=True)]
        total = torch.zeros_like(steps)
        for at, lost in zip(self._members, self._lost, strict=True):
            total.index_add_(1, at, lost)
        self._total = _ascending(total)

    def shares(self, budgets: Tensor) -> list[Tensor]:
        """Share squared budgets ``[N]`` out over the slots: per slot ``[T]``, those of a task sum to its budget."""
        after, share = _places(self._total, budgets)
        found = [_between(lost, after[at], share[at]) for at, lost in zip(self._members, self._lost, strict=True)]
        total = torch.zeros_like(budgets)
        for at, lost in zip(self._members, found, strict=True):
            total.index_add_(0, at, lost)
        scale = torch.where(total > 0, budgets / total.clamp(min=1e-300), 1.0)
        return [lost * scale[at] for at, lost in zip(self._members, found, strict=True)]


def _largest(parts: Sequence[Ends]) -> Tensor:
    """Give the largest singular value of every task."""
    return torch.stack([p.s.amax(-1) if p.s.shape[1] else p.s.new_zeros(len(p.s)) for p in parts]).amax(0)


def _ratios(parts: Sequence[Ends], per_octave: int) -> Tensor:
    """Give steps for a largest singular value of 1, ascending: from what gains nothing to what keeps nothing."""
    lengths = [max(length, 1) for part in parts for length in part.lengths]
    low, high = LEAST / _FINER / math.sqrt(max(lengths)), _KEEPS_NONE / math.sqrt(min(lengths))
    count = 2 + round(per_octave * math.log2(high / low))
    return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64)


def _grid(parts: Sequence[Ends]) -> Tensor:
    return _ratios(parts, _COARSE)[:, None] * _largest(parts).clamp(min=_TINY)


def _ascending(lost: Tensor) -> Tensor:
    """Energy lost over ascending steps, but for what interpolated rates leave."""
    return lost.cummax(0).values


def _places(lost: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Give where ``allowed [T]`` lies in ``lost [G, T]``: the place after, and the share of the way, by logarithms."""
    after = (lost <= allowed).sum(0).clamp(1, len(lost) - 1)
    ends = [lost.gather(0, at[None])[0].clamp(min=1e-300).log() for at in (after - 1, after)]
    share = (allowed.clamp(min=1e-300).log() - ends[0]) / (ends[1] - ends[0]).clamp(min=1e-12)
    return after, share.clamp(0, 1)


def _between(values: Tensor, after: Tensor, share: Tensor) -> Tensor:
    """Interpolate ``values [G, T]`` there."""
    before, behind = (values.gather(0, at[None])[0] for at in (after - 1, after))
    return (1 - share) * before + share * behind
