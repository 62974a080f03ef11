"""Short summaries of one side of a slot: a few weighted directions that stand for many rows, and how they merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraspan.collection.bases import Basis, make_basis
from loraspan.collection.ranges import find_range
from loraspan.collection.rows import Width
from loraspan.collection.stack import Stack
from loraspan.collection.vectors import FactorRows
from loraspan.ops import combine


@dataclass(frozen=True)
class Summary:
    r"""The leading directions of weighted rows ``Z [R, d]`` that are no longer at hand.

    Its own rows ``Y`` have ``Y^T Y <= Z^T Z`` in the order of positive semidefinite matrices, so directions hold at
    least as much of ``Z`` as they hold of ``Y``, and at most :attr:`discarded` more.

    Attributes:
        rows: ``[l, d]``, float32: ``sqrt(energy_j) v_j^T`` with orthonormal ``v_j``, ordered by energy.
        energies: ``[l]``, float64, descending.
        total: ``|Z|_F^2``.
    """

    rows: Tensor
    energies: Tensor
    total: float

    @property
    def discarded(self) -> float:
        """The energy that the rows do not hold."""
        return max(self.total - float(self.energies.sum()), 0.0)


def summarize(stack: Stack, width: int, total: float, *, precision: str, seed: int) -> Summary:
    """Give the summary of one stack of weighted rows.

    Args:
        stack: factors and weights, ``[R, d]``.
        width: directions to keep at most; fewer where the rest is below the rounding of ``precision``.
        total: the sum of the squares of the weighted rows.
        precision: of the operators, ``"f32"`` or ``"f64"``.
        seed: of the sketch.
    """
    found = find_range(stack, width, precision=precision, seed=seed)
    weights = found.w * found.energies.sqrt()
    directions = combine(stack.x, weights, dtype=torch.float32, precision=precision, products=False).v
    return Summary(directions.T.contiguous().cpu(), found.energies, total)


def merge(summaries: Sequence[Summary], width: int, *, precision: str) -> Summary:
    r"""Give the summary of the rows of several, the older first.

    Each merge takes away a positive semidefinite part, the sum of which has the trace :attr:`Summary.discarded`. So
    whatever the order and the grouping of merges, for the leading ``k`` directions ``V`` of the result

    .. math:: \|Z - Z V V^T\|_F^2 \le \min_{rank\ k} \|Z - Z_k\|_F^2 + discarded,

    and two ways of merging differ by no more than that in what they hold.

    Args:
        summaries: at least one, of rows of one length.
        width: directions to keep at most.
        precision: as for :func:`summarize`.

    Example:
        >>> one = Summary(torch.tensor([[2.0, 0.0]]), torch.tensor([4.0]).double(), 4.0)
        >>> two = Summary(torch.tensor([[0.0, 1.0]]), torch.tensor([1.0]).double(), 1.0)
        >>> both = merge([one, two], 1, precision="f64")
        >>> both.rows, both.discarded
        (tensor([[2., 0.]]), 1.0)

    Source:
        Ghashami, Liberty, Phillips, Woodruff, *Frequent directions*, 2015, section 3; Brand, *Fast low-rank
        modifications of the thin singular value decomposition*, 2006.
    """
    total = sum(one.total for one in summaries)
    present = [one.rows for one in summaries if len(one.rows)]
    if not present:
        return Summary(summaries[0].rows, summaries[0].energies, total)
    return summarize(_plain_stack(present), width, total, precision=precision, seed=0)


def directions_of(summary: Summary) -> Tensor:
    """Give its directions as unit rows ``[l, d]``, float32."""
    return summary.rows * summary.energies.rsqrt()[:, None].float()


def basis_of(summary: Summary, turn: Tensor, width: Width) -> Basis:
    """Form a basis as it will be stored, orthonormal within the rounding of ``width``.

    Args:
        summary: whose directions it is made of.
        turn: ``[l, k]``, float64, orthonormal: the basis in terms of them.
        width: of the basis: a dtype, or bits.
    """
    stack = _plain_stack([summary.rows])
    return make_basis(stack, summary.energies.rsqrt()[:, None] * turn, width)


def _plain_stack(rows: Sequence[Tensor]) -> Stack:
    """Rows as they are."""
    largest = max(len(block) for block in rows)
    return Stack(FactorRows(rows, largest), torch.eye(largest, dtype=torch.float64).expand(len(rows), -1, -1))
