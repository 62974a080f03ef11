"""Inner products of rows with packed basis vectors, a chunk of entries at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan._default_device import cpu_by_default
from loraspan.errors import ShapeError
from loraspan.ops.blocks import RowBlocks
from loraspan.ops.gram import gram_many
from loraspan.ops.packed import Packed, unpack

# Entries of each vector that are unpacked at once: whole blocks, and whole float32 sums of `gram`.
_CHUNK = 4096
# Rows that enter a Gram beside the basis, if it has fewer vectors: what is not wanted of it is then not most of it.
_BESIDE = 64


class PackedProducts(NamedTuple):
    """What :func:`packed_products` gives: ``rows [R, k]`` and ``basis [k, k]``, float64."""

    rows: Tensor
    basis: Tensor


@cpu_by_default
def packed_products(
    x: RowBlocks | Sequence[Tensor], basis: Packed, *, precision: str = "f32", backend: str | None = None
) -> PackedProducts:
    r"""Give ``X B^T`` and ``B B^T`` for packed basis vectors ``B``, of which 4096 entries each are unpacked at a time.

    With these a row is projected on what is really stored: its loadings are ``(B B^T)^{-1}`` times its products.

    Args:
        x: ``X [R, L]`` as row blocks, read where they lie; see :class:`loraspan.ops.RowBlocks`.
        basis: ``[k, L]``, on the device of ``x``.
        precision: as for :func:`loraspan.ops.gram`, of each chunk.
        backend: as for :func:`loraspan.ops.gram`.

    Returns:
        Both in float64. Errors are those of :func:`loraspan.ops.gram` of ``X`` over the unpacked ``B``: chunks are
        added in float64, in order.

    Raises:
        ShapeError: if rows are not as long as the basis vectors.
        ArgumentError: if ``precision`` is neither ``"f32"`` nor ``"f64"``.
        BackendError: if the named backend cannot run this call.

    Example:
        >>> import torch
        >>> from loraspan.ops import pack
        >>> products = packed_products([torch.ones(1, 2)], pack(127 * torch.eye(2), 8))
        >>> products.rows, products.basis[0, 1].item()
        (tensor([[127., 127.]], dtype=torch.float64), 0.0)
    """
    k, length = basis.shape
    matrix = RowBlocks.of(x) if isinstance(x, RowBlocks) or x else RowBlocks([], length)
    if matrix.columns != length:
        raise ShapeError(f"packed_products: rows are as long as the basis vectors, {length}; got {matrix.columns}")
    groups = list(_groups(matrix, max(k, _BESIDE)))
    rows = torch.zeros(matrix.shape[0], k, dtype=torch.float64)
    square = torch.zeros(k, k, dtype=torch.float64)
    for start in range(0, length, _CHUNK):
        piece = slice(start, min(length, start + _CHUNK))
        vectors = unpack(basis.columns(piece.start, piece.stop))
        found = gram_many(
            [[vectors, *(b[:, piece] for b in group)] for group in groups or [[]]],
            precision=precision,
            backend=backend,
        )
        square += found[0][:k, :k]
        if groups:
            rows += torch.cat([g[k:, :k] for g in found])
    return PackedProducts(rows, square)


def _groups(x: RowBlocks, most: int) -> Iterator[list[Tensor]]:
    """Give the rows in order, at most ``most`` of them at a time."""
    group: list[Tensor] = []
    room = most
    for block in x.blocks:
        at = 0
        while at < block.shape[0]:
            part = block[at : at + room]
            group.append(part)
            at += part.shape[0]
            room -= part.shape[0]
            if not room:
                yield group
                group, room = [], most
    if group:
        yield group
