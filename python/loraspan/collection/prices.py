"""What columns of each form take, and how many of each a budget asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from loraspan.collection.rows import CODED, Widths, row_bytes
from loraspan.collection.steps import Ends
from loraspan.linalg.roots import gram_root
from loraspan.ops.dense import eigh


def one_sided_ends(
    form: str, shape: tuple[int, int], spectra: tuple[Tensor, Tensor], rank: int, widths: Widths
) -> list[Ends]:
    """Give the coded ends of columns with one end on a basis of ``rank``, and of those with none; of both spectra."""
    far, rest = 0 if form == "ps" else 1, Ends(spectra[1], shape)
    if widths.loadings == CODED:
        return [Ends(spectra[0], [shape[far], rank]), rest]
    return [Ends(spectra[0], [shape[far]], row_bytes(rank, widths.loadings)), rest]


def column_bytes(
    form: str, shape: tuple[int, int], ranks: tuple[int, int], widths: Widths, *, dense: bool = False
) -> int:
    """Give the bytes of one column of a form in a slot of ``shape`` ``(n, d)`` with bases of ``ranks``.

    Example:
        >>> column_bytes("ps", (64, 32), (8, 8), Widths.of(torch.float16))
        148
    """
    left = row_bytes(ranks[0], widths.loadings) if form[0] == "s" else row_bytes(shape[0], widths.private)
    right = row_bytes(ranks[1], widths.loadings) if form[1] == "s" else row_bytes(shape[1], widths.private)
    # a dense core's right ends are the basis itself
    return torch.float32.itemsize + left + (0 if dense and form == "ss" else right)


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
