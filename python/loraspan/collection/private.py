"""What the shared columns of a slot leave of each task, and the private columns that carry it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraspan.collection.assemble import Part, join_parts
from loraspan.collection.rows import Rows, Width, flip_rows, store_rows, values_of
from loraspan.collection.vectors import Vectors
from loraspan.linalg.roots import gram_root
from loraspan.ops import RowBlocks, combine_many, gram_many
from loraspan.ops.dense import svd

# How often what packed columns leave is packed in more columns, where widths were not chosen for the goal: for tasks
# that come later, and in a refit.
CORRECTIONS = 2


@dataclass(frozen=True)
class Frame:
    """One side of the residuals of a slot: per task, the vectors ``F_i`` that its residual is made of.

    Attributes:
        vectors: of the tasks (columns of ``B_i`` or rows of ``A_i``).
        transform: ``[T, r, c]``: canonical coordinates of the factor vectors.
        extra: per task, more vectors as rows, at most ``e``, ``[., m]`` (a basis, or the private ends it already has).
        gram: ``[T, c + e, c + e]``, float64: ``F_i^T F_i`` of ``F_i = [factors_i^T transform_i, extra_i^T]``.
    """

    vectors: Vectors
    transform: Tensor
    extra: Sequence[Tensor]
    gram: Tensor

    @property
    def size(self) -> int:
        """The number of factor coordinates, ``c``."""
        return int(self.transform.shape[2])


def make_frame(
    vectors: Vectors,
    transform: Tensor,
    factor_gram: Tensor,
    extra: Sequence[Tensor],
    edge: Tensor,
    extra_gram: Tensor,
) -> Frame:
    """Build a frame from what the passes gave.

    Args:
        vectors: as :class:`Frame`.
        transform: as :class:`Frame`.
        factor_gram: ``[T, r, r]`` of the vectors.
        extra: as :class:`Frame`.
        edge: ``[T, c, e]``: products of the canonical vectors with the extra ones.
        extra_gram: ``[T, e, e]`` or ``[e, e]``.
    """
    corner = transform.mT @ factor_gram @ transform
    extra_gram = extra_gram.expand(edge.shape[0], edge.shape[2], edge.shape[2])
    top = torch.cat([corner, edge], dim=2)
    gram = torch.cat([top, torch.cat([edge.mT, extra_gram], dim=2)], dim=1)
    return Frame(vectors, transform, extra, gram)


@dataclass(frozen=True)
class Residual:
    """``E_i = F_left,i Z_i F_right,i^T`` for every task of a slot."""

    left: Frame
    right: Frame
    z: Tensor

    def squares(self) -> Tensor:
        """``|E_i|_F^2``, ``[T]``."""
        return (self.z * (self.left.gram @ self.z @ self.right.gram)).sum((-1, -2)).clamp(min=0)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give left coordinates ``[T, ., q]``, singular values ``[T, q]``, right coordinates; unit vectors in space."""
        left, right = gram_root(self.left.gram), gram_root(self.right.gram)
        u, s, v = svd(left.r @ self.z @ right.r.mT)
        return left.inverse @ u, s, right.inverse @ v


def columns_within(s: Tensor, allowed: Tensor) -> Tensor:
    """Give how many leading columns must be kept so that the squares of the rest sum to at most ``allowed``.

    Args:
        s: ``[T, q]``, descending.
        allowed: ``[T]``.

    Example:
        >>> import torch
        >>> columns_within(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([4.9]))
        tensor([2])
    """
    tails = s.square().flip(-1).cumsum(-1).flip(-1)
    return (tails > allowed[:, None]).sum(-1)


def private_columns(residual: Residual, allowed: Tensor, width: Width, corrections: int = 0) -> tuple[Part, Tensor]:
    """Give the private columns that bring every task's residual down to ``allowed``, and what is left after them.

    Rounding the columns adds to what is left, so it is measured and columns are added until it fits or none are left.
    With ``corrections``, what packing all of them leaves is carried by more columns: 4 bits leave a tenth of a vector,
    and a tenth of that when they hold the difference too.

    Args:
        residual: of all tasks of the slot.
        allowed: ``[T]``: squared Frobenius norm that may remain.
        width: of the private ends.
        corrections: how often what packed columns leave may be packed in more columns.

    Returns:
        Columns of form pp, and ``[T]`` the squared norms that remain, measured for the stored entries.
    """
    part, remains, rest = _carry(residual, allowed, width)
    for _ in range(corrections if isinstance(width, int) else 0):
        short = remains > allowed
        if not short.any():
            break
        more, remains, rest = _carry(rest(short), allowed, width)
        part = join_parts(part, more)
    return part, remains


def _carry(residual: Residual, allowed: Tensor, width: Width) -> tuple[Part, Tensor, Callable[[Tensor], Residual]]:
    """Give columns as :func:`private_columns`, and what gives the residual that they leave, for some of the tasks."""
    left, s, right = residual.svd()
    counts = columns_within(s, allowed)
    while True:
        part, remains, rest = _store(residual, left, s, right, counts, width)
        short = (remains > allowed) & (counts < s.shape[1])
        if not short.any():
            return part, remains, rest
        # rounding took part of the budget: what may be dropped is what rounding leaves of it
        dropped = _tail(s, counts)
        tighter = columns_within(s, (allowed - (remains - dropped)).clamp(min=0))
        counts = torch.where(short, torch.maximum(tighter, counts + 1), counts)


def _tail(s: Tensor, counts: Tensor) -> Tensor:
    return (s.square() * (torch.arange(s.shape[1]) >= counts[:, None])).sum(-1)


def _store(
    residual: Residual, left: Tensor, s: Tensor, right: Tensor, counts: Tensor, width: Width
) -> tuple[Part, Tensor, Callable[[Tensor], Residual]]:
    p, p_seen, p_gram = stored_ends(residual.left, left, counts, width)
    q, q_seen, q_gram = stored_ends(residual.right, right, counts, width)
    kept = torch.arange(s.shape[1]) < counts[:, None]
    seen = torch.einsum("tac,tab,tbc->tc", p_seen, residual.z, q_seen)
    weights = best_weights(p_gram * q_gram, seen, kept)
    stored = weights.float().double()
    fitted = ((p_gram * q_gram) @ stored.unsqueeze(-1)).squeeze(-1) - 2 * seen
    remains = residual.squares() + (stored * fitted).sum(-1)
    # a weight is not negative: its sign goes to the left end
    signs = torch.where(weights[kept] < 0, -1, 1)
    part = Part("pp", counts, weights[kept].abs(), flip_rows(p, signs), q)

    def rest(short: Tensor) -> Residual:
        pad = nn.functional.pad
        corner = torch.diag_embed(-stored)
        z = torch.cat([pad(residual.z, (0, corner.shape[2])), pad(corner, (residual.z.shape[2], 0))], dim=1)
        left = _extended(residual.left, split_rows(values_of(p), counts), p_seen, p_gram, short)
        return Residual(left, _extended(residual.right, split_rows(values_of(q), counts), q_seen, q_gram, short), z)

    return part, remains.clamp(min=0), rest


def _extended(frame: Frame, ends: Sequence[Tensor], seen: Tensor, gram: Tensor, some: Tensor) -> Frame:
    """Give a frame with ends that are stored as further vectors, of those tasks that are to have more columns."""
    width = frame.gram.shape[1] - frame.size
    extra = [
        torch.cat([nn.functional.pad(known.float(), (0, 0, 0, width - len(known))), own]) if wanted else known
        for known, own, wanted in zip(frame.extra, ends, some.tolist(), strict=True)
    ]
    top = torch.cat([frame.gram, seen], dim=2)
    return Frame(frame.vectors, frame.transform, extra, torch.cat([top, torch.cat([seen.mT, gram], dim=2)], dim=1))


def best_weights(products: Tensor, seen: Tensor, kept: Tensor) -> Tensor:
    """Give the least-squares weights of rank-one columns whose ends are given as rounded.

    Args:
        products: ``[T, q, q]``: inner products of the columns with each other.
        seen: ``[T, q]``: inner products of the columns with what they are to carry.
        kept: ``[T, q]`` bool: which columns there are; the weights of others are 0.
    """
    root = gram_root(products * (kept.unsqueeze(-1) & kept.unsqueeze(-2)))
    return (root.inverse @ (root.inverse.mT @ (seen * kept).unsqueeze(-1))).squeeze(-1)


def stored_ends(frame: Frame, coordinates: Tensor, counts: Tensor, width: Width) -> tuple[Rows, Tensor, Tensor]:
    """Form private ends from the bytes of the factors and measure them as rounded.

    Args:
        frame: what they are made of.
        coordinates: ``[T, c + e, q]``: unit vectors.
        counts: ``[T]``: how many leading ones each task keeps.
        width: of the ends.

    Returns:
        ends ``[C, m]``, task after task; their products with the frame ``[T, c + e, q]``, and with each other
        ``[T, q, q]``, zeros where not kept.
    """
    size = frame.size
    jobs = []
    vectors = frame.vectors
    for i, extra in enumerate(frame.extra):
        wanted = coordinates[i, :, : int(counts[i])]
        made_of = vectors.spread_of(i, frame.transform[i] @ wanted[:size])
        home = vectors.x.blocks[0].device
        made = RowBlocks([*vectors.rows_of(i), extra.to(home)]).on(vectors.x.target)
        jobs.append((made, torch.cat([made_of, wanted[size : size + extra.shape[0]]])))
    rows, products = _formed(jobs, width)
    seen = torch.zeros_like(coordinates)
    inner = coordinates.new_zeros(coordinates.shape[0], coordinates.shape[2], coordinates.shape[2])
    for i, (xv, vtv) in enumerate(products):
        own, kept = xv.shape[0] - frame.extra[i].shape[0], vtv.shape[0]
        seen[i, :size, :kept] = frame.transform[i].T @ vectors.pad_of(i, xv[:own])
        seen[i, size : size + xv.shape[0] - own, :kept] = xv[own:]
        inner[i, :kept, :kept] = vtv
    return rows, seen, inner


def _formed(jobs: Sequence[tuple[RowBlocks, Tensor]], width: Width) -> tuple[Rows, list[tuple[Tensor, Tensor]]]:
    """Form the ends as stored, and give their products with the rows that they are made of and with each other."""
    dtype = torch.float32 if isinstance(width, int) else width
    ends = combine_many(jobs, dtype=dtype, precision="f64")
    rows = torch.cat([end.v.T for end in ends]).cpu() if ends else torch.empty(0, 0, dtype=dtype)
    if not isinstance(width, int) or not len(rows):
        return rows, [(end.xv, end.vtv) for end in ends]
    packed = store_rows(rows, width)
    counts = torch.tensor([w.shape[1] for _, w in jobs])
    pairs = zip(jobs, split_rows(values_of(packed), counts), strict=True)
    grams = gram_many(
        [RowBlocks([*x.blocks, own.to(x.blocks[0].device)]).on(x.target) for (x, _), own in pairs], precision="f64"
    )
    sizes = [x.shape[0] for x, _ in jobs]
    return packed, [(gram[:size, size:], gram[size:, size:]) for gram, size in zip(grams, sizes, strict=True)]


def split_rows(rows: Tensor, counts: Tensor) -> list[Tensor]:
    """Give the rows of each task, ``counts [T]`` of them."""
    stops = counts.cumsum(0).tolist()
    return [rows[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
