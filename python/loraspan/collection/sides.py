"""The two sides of a slot, as columns are built on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraspan.collection.bases import Basis
from loraspan.collection.formed import Frame, make_frame
from loraspan.collection.stack import Stack


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


def coefficients(s: Tensor, corner: Tensor) -> Tensor:
    """``[[I, 0], [0, corner]]`` per task: the canonical ``dW`` and what is taken from it."""
    eye = torch.diag_embed((s > 0).double())
    top = torch.cat([eye, eye.new_zeros(*eye.shape[:2], corner.shape[2])], dim=2)
    bottom = torch.cat([corner.new_zeros(*corner.shape[:2], eye.shape[2]), corner], dim=2)
    return torch.cat([top, bottom], dim=1)
