"""One side of a slot: the factors of all its tasks under each other, with the small matrices that weigh them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraspan.ops import RowBlocks


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
    """Factors of ``T`` tasks as ``X [R, d]``, and the weights ``D`` that make them rows of ``w_i dW_i``.

    With ``X_i = A_i`` and ``D_i = w_i s_i R_B`` (``R_B^T R_B = B_i^T B_i``) the rows ``D_i X_i`` have the Gram
    ``w_i^2 dW_i^T dW_i``: rank, alpha and gauge of the factors drop out. The output side has ``B_i^T`` and ``R_A``.

    Attributes:
        x: the factors, ``[R, d]`` in blocks of ``r_i`` rows, to be computed with at ``place`` if one is given.
        weights: ``D``, ``[T, r, r]``, float64, ``r`` the largest rank; zeros around the smaller.
    """

    def __init__(self, factors: Sequence[Tensor], weights: Tensor, place: torch.device | None = None) -> None:
        self.x = RowBlocks(factors).on(place)
        self.weights = weights
        ranks = torch.tensor(self.x.rows)
        self._rank = weights.shape[-1]
        self._mask = None if bool((ranks == self._rank).all()) else torch.arange(self._rank) < ranks[:, None]

    @property
    def count(self) -> int:
        """The number of tasks, ``T``."""
        return len(self.x.rows)

    def pad(self, flat: Tensor) -> Tensor:
        """Give ``[R, l]`` as ``[T, r, l]``, zeros below the smaller ranks."""
        if self._mask is None:
            return flat.view(self.count, self._rank, flat.shape[1])
        padded = flat.new_zeros(self.count, self._rank, flat.shape[1])
        padded[self._mask] = flat
        return padded

    def flat(self, padded: Tensor) -> Tensor:
        """Undo :meth:`pad`."""
        return padded.reshape(self.x.shape[0], padded.shape[2]) if self._mask is None else padded[self._mask]

    def weigh(self, flat: Tensor) -> Tensor:
        """Give ``D y`` for ``y [R, l]``."""
        return self.flat(self.weights @ self.pad(flat))

    def weigh_transposed(self, flat: Tensor) -> Tensor:
        """Give ``D^T y`` for ``y [R, l]``."""
        return self.flat(self.weights.mT @ self.pad(flat))
