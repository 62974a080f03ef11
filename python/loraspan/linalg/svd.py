"""What every singular value decomposition of the package gives, and the signs of its vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SVD(NamedTuple):
    """``x [..., m, n]`` as ``u [..., m, k] diag(s [..., k]) vh [..., k, n]``, and what that leaves out.

    ``s`` is descending and not negative. ``discarded [...]``, float64, is the energy ``|x|_F^2 - sum s^2`` left out,
    never negative. A triplet that does not exist, which only a batch has, is ``s = 0`` with zero vectors.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    discarded: Tensor

    @property
    def rank(self) -> int | Tensor:
        """How many ``s`` are not zero: a number for one matrix, an int64 tensor ``[...]`` for a batch."""
        present = self.s.count_nonzero(-1)
        return int(present) if self.s.ndim == 1 else present


def fix_signs(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Turn pairs of vectors so that the entry of largest magnitude of each column of ``u`` is positive.

    Args:
        u: ``[..., m, k]``, floating point.
        v: ``[..., n, k]``; its columns turn with those of ``u``.

    Returns:
        ``u`` and ``v`` with some columns negated. Of several largest entries the first decides; a zero column stays.

    Example:
        >>> import torch
        >>> fix_signs(torch.tensor([[-2.0], [2.0], [1.0]]), torch.tensor([[0.0], [3.0]]))
        (tensor([[ 2.], [-2.], [-1.]]), tensor([[-0.], [-3.]]))
    """
    sign = column_signs(u).unsqueeze(-2)
    return u * sign, v * sign.to(v.dtype)


def column_signs(u: Tensor) -> Tensor:
    """Give 1 or -1 per column of ``u [..., m, k]``: the sign of its first entry of largest magnitude.

    Example:
        >>> import torch
        >>> column_signs(torch.tensor([[1.0, -3.0], [-2.0, 3.0]]))
        tensor([-1., -1.])
    """
    if not u.numel():
        return u.new_ones(*u.shape[:-2], u.shape[-1])
    if u.is_mps:
        # which of several equal ones an extreme is, no GPU promises
        return column_signs(u.cpu()).to(u.device)
    # each is torch's fastest in its layout
    low, high = (u.amin(-2), u.amax(-2)) if u.stride(-2) == 1 else torch.aminmax(u, dim=-2)
    sign = torch.where(-low > high, -1.0, 1.0).to(u.dtype)
    tied = (-low == high) & (high > 0)
    if tied.any():
        columns = u.mT[tied]
        first = columns.gather(-1, columns.abs().argmax(-1, keepdim=True)).squeeze(-1)
        sign[tied] = torch.where(first < 0, -1.0, 1.0).to(u.dtype)
    return sign
