"""One side of a slot: the factors of all its tasks under each other, with the small matrices that weigh them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from loraspan.collection.vectors import Vectors
from loraspan.linalg.roots import gram_root
from loraspan.ops import RowBlocks
from loraspan.ops.product import product


def pad_square(matrices: Sequence[Tensor]) -> Tensor:
    """Stack ``[r_i, r_i]`` matrices as ``[T, r, r]``, ``r`` the largest ``r_i``, with zeros around the smaller."""
    size = max((m.shape[0] for m in matrices), default=0)
    if all(m.shape[0] == size for m in matrices):
        return torch.stack(list(matrices)) if matrices else torch.zeros(0, 0, 0, dtype=torch.float64)
    out = torch.zeros(len(matrices), size, size, dtype=torch.float64)
    for i, m in enumerate(matrices):
        out[i, : m.shape[0], : m.shape[0]] = m
    return out


class Stack:
    """Vectors of ``T`` tasks, and the weights ``D`` that make them rows of ``w_i dW_i``.

    With vectors ``X_i = A_i`` and ``D_i = w_i s_i R_B`` (``R_B^T R_B = B_i^T B_i``) the rows ``D_i X_i`` have the Gram
    ``w_i^2 dW_i^T dW_i``: rank, alpha and gauge of the factors drop out. The output side has ``B_i^T`` and ``R_A``.

    Attributes:
        vectors: of every task.
        weights: ``D``, ``[T, r, r]``, float64, ``r`` the largest rank; zeros around the smaller.
        moments: ``D^T D``, likewise: all that inner products between weighted rows need. One is made from the other
            when it is first asked for.
    """

    def __init__(self, vectors: Vectors, weights: Tensor) -> None:
        self.vectors = vectors
        self.weights = weights

    @classmethod
    def of_moments(cls, vectors: Vectors, moments: Tensor) -> Stack:
        """Take ``D^T D`` of any ``D``."""
        made = cls.__new__(cls)
        made.vectors, made.moments = vectors, moments
        return made

    @cached_property
    def weights(self) -> Tensor:
        """See above."""
        return gram_root(self.moments).r

    @cached_property
    def moments(self) -> Tensor:
        """See above."""
        return product(self.weights.mT, self.weights)

    @property
    def x(self) -> RowBlocks:
        """The rows that the vectors are made of, ``[R, d]``."""
        return self.vectors.x

    @property
    def count(self) -> int:
        """The number of tasks, ``T``."""
        return self.vectors.count

    def pad(self, flat: Tensor) -> Tensor:
        """Give what each task's vectors have, ``[T, r, l]``, from what the rows have, ``[R, l]``."""
        return self.vectors.pad(flat)

    def weigh(self, flat: Tensor) -> Tensor:
        """Give ``D y``, a row for each vector, for what the rows have, ``y [R, l]``."""
        return self.vectors.pack(product(self.weights, self.pad(flat)))

    def weigh_transposed(self, packed: Tensor) -> Tensor:
        """Give the adjoint of :meth:`weigh`, ``[R, l]``."""
        return self.vectors.spread(product(self.weights.mT, self.vectors.unpack(packed)))

    def weigh_twice(self, flat: Tensor) -> Tensor:
        """Give ``D^T D y``, ``[R, l]``, without ``D``."""
        return self.vectors.spread(product(self.moments, self.pad(flat)))
