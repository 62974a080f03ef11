"""Private ends of the tasks of a slot: formed from the bytes that they are made of, rounded, and measured as stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.collection.rows import Rows, Width, store_rows, values_of
from loraspan.collection.steps import whole_steps
from loraspan.collection.vectors import Vectors
from loraspan.ops import RowBlocks, combine_many, gram_many


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


class Stored(NamedTuple):
    """Ends as stored ``[C, m]``, their products with the frame ``[T, c + e, q]``, and with each other ``[T, q, q]``."""

    rows: Rows
    seen: Tensor
    inner: Tensor


def stored_ends(frame: Frame, coordinates: Tensor, counts: Tensor, width: Width) -> Stored:
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
    dtype = torch.float32 if isinstance(width, int) else width
    formed = form_ends(frame, coordinates, counts, dtype)
    if not isinstance(width, int) or not len(formed.rows):
        return Stored(formed.rows, *formed.placed(formed.products, counts))
    packed = store_rows(formed.rows, width)
    return Stored(packed, *formed.measure(packed, counts))


class Formed:
    """Private ends before they are rounded, task after task, and how to measure them as rounded.

    Args:
        frame: what they are made of.
        width: of the coordinates, ``q``.
        jobs: per task, the rows that its ends are made of, and how.
        dtype: of the ends.
    """

    def __init__(self, frame: Frame, width: int, jobs: Sequence[tuple[RowBlocks, Tensor]], dtype: torch.dtype) -> None:
        self._frame, self._width, self._jobs = frame, width, jobs
        ends = combine_many(jobs, dtype=dtype, precision="f64")
        self.rows = torch.cat([end.v.T for end in ends]).cpu() if ends else torch.empty(0, 0, dtype=dtype)
        self.products = [(end.xv, end.vtv) for end in ends]
        self.counts = torch.tensor([w.shape[1] for _, w in jobs], dtype=torch.int64)

    def padded(self, part: slice) -> Tensor:
        """Give the ends of some tasks beside each other, ``[t, most of a task, m]``, and zeros."""
        places = torch.arange(int(self.counts.max())) < self.counts[part, None]
        first = int(self.counts[: part.start].sum())
        ends = self.rows.new_zeros(*places.shape, self.rows.shape[1])
        ends[places] = self.rows[first : first + int(places.sum())]
        return ends

    def coded(self, steps: Tensor, kept: Tensor) -> Stored:
        """Round to whole ``steps [T, q]`` those that are ``kept [T, q]``, leading ones of those that were formed."""
        places = torch.arange(self._width) < self.counts[:, None]
        if not self.rows.shape[1]:
            return Stored(self.rows[kept[places]], *self.placed(self.products, kept.sum(-1)))
        rows = whole_steps(self.rows[kept[places]], steps[kept])
        return Stored(rows, *self.measure(rows, kept.sum(-1)))

    def measure(self, stored: Rows, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Give the products of ends as stored, ``counts [T]`` of them, with the frame and with each other."""
        pairs = zip(self._jobs, split_rows(values_of(stored), counts), strict=True)
        grams = gram_many(
            [RowBlocks([*x.blocks, own.to(x.blocks[0].device)]).on(x.target) for (x, _), own in pairs], precision="f64"
        )
        sizes = [x.shape[0] for x, _ in self._jobs]
        found = zip(grams, sizes, strict=True)
        return self.placed([(gram[:size, size:], gram[size:, size:]) for gram, size in found], counts)

    def placed(self, products: Sequence[tuple[Tensor, Tensor]], counts: Tensor) -> tuple[Tensor, Tensor]:
        """Give products of tasks as the frame has them: ``[T, c + e, q]`` and ``[T, q, q]``."""
        frame, size = self._frame, self._frame.size
        seen = frame.gram.new_zeros(*frame.gram.shape[:2], self._width)
        inner = seen.new_zeros(len(seen), self._width, self._width)
        for i, (xv, vtv) in enumerate(products):
            own, kept = xv.shape[0] - frame.extra[i].shape[0], int(counts[i])
            seen[i, :size, :kept] = frame.transform[i].T @ frame.vectors.pad_of(i, xv[:own, :kept])
            seen[i, size : size + xv.shape[0] - own, :kept] = xv[own:, :kept]
            inner[i, :kept, :kept] = vtv[:kept, :kept]
        return seen, inner


def form_ends(frame: Frame, coordinates: Tensor, counts: Tensor, dtype: torch.dtype = torch.float32) -> Formed:
    """Form private ends from the bytes of the factors; see :func:`stored_ends`."""
    size, vectors = frame.size, frame.vectors
    jobs = []
    for i, extra in enumerate(frame.extra):
        wanted = coordinates[i, :, : int(counts[i])]
        made_of = vectors.spread_of(i, frame.transform[i] @ wanted[:size])
        home = vectors.x.blocks[0].device
        made = RowBlocks([*vectors.rows_of(i), extra.to(home)]).on(vectors.x.target)
        jobs.append((made, torch.cat([made_of, wanted[size : size + extra.shape[0]]])))
    return Formed(frame, coordinates.shape[2], jobs, dtype)


def split_rows(rows: Tensor, counts: Tensor) -> list[Tensor]:
    """Give the rows of each task, ``counts [T]`` of them."""
    stops = counts.cumsum(0).tolist()
    return [rows[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]
