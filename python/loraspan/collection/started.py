"""Start a task that is to be trained: like another task, or from nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from loraspan.adapters.base import Source
from loraspan.collection.collection import Collection, Segment, SlotSpace, Task
from loraspan.collection.columns import FIELDS, Columns
from loraspan.collection.rows import no_rows, store_rows
from loraspan.collection.trained import KIND, Part, as_trained, parts_of, unit_rows
from loraspan.collection.update import check_names
from loraspan.errors import ArgumentError


def start(collection: Collection, name: str, *, like: str | None, lora_rank: int | None, seed: int) -> Collection:
    """Give the collection with one more task, to be trained. The bases and all other tasks are the very same objects.

    Args:
        collection: to add to.
        name: of the task.
        like: a task whose columns, extras and configuration it gets, bit for bit.
        lora_rank: of columns that give nothing yet, in every slot that has both bases, at most their width: left ends
            of zeros and right ends of random directions, so that gradients reach the left ones at once.
        seed: of these directions.

    Raises:
        MismatchError: if the name is taken.
        UnknownTaskError: if there is no task ``like``.
        ArgumentError: unless one of ``like`` and ``lora_rank`` is given, a rank of 1 at least; or if no slot has both
            bases, experts apart, whose configuration only another task can give.

    Source:
        Coefficients alone, bases frozen: Share, arXiv 2602.06043, phase 2.
    """
    if (like is None) == (lora_rank is None) or (lora_rank is not None and lora_rank < 1):
        raise ArgumentError(
            f"start: needs one of like, the name of a task, and lora_rank, 1 at least; got {like!r} and {lora_rank!r}"
        )
    check_names("start", [name], collection.places.keys())
    if like is not None:
        task, parts = _like(collection, like)
    else:
        assert lora_rank is not None
        task, parts = _from_zero(collection, lora_rank, seed)
    columns = {path: part.columns for path, part in parts.items()}
    segment = Segment((replace(task, name=name),), columns)
    return replace(collection, segments=(*collection.segments, segment))


def _like(collection: Collection, like: str) -> tuple[Task, dict[str, Part]]:
    task, parts = collection.task(like), parts_of(collection, like)
    norm = math.sqrt(sum(next(part.squares(part.core(part.loadings))) for part in parts.values()))
    # it never was a file
    return replace(as_trained(task, norm, 0.0, repr(like)), factor_bytes=0), parts


def _from_zero(collection: Collection, lora_rank: int, seed: int) -> tuple[Task, dict[str, Part]]:
    rng, parts = torch.Generator().manual_seed(seed), {}
    for path, space in collection.slots.items():
        rank = min(lora_rank, *space.ranks)
        if rank and space.kind != "expert":
            parts[path] = Part(space, _nothing_yet(collection, space, rank, rng))
    if not parts:
        raise ArgumentError(
            "start: needs a slot with bases on both sides, of no expert, for the coefficients to lie in; this space "
            "has none: start like another task, or compress with a rank"
        )
    ranks = {path: int(part.columns.counts.sum()) for path, part in parts.items()}
    scales = dict.fromkeys(ranks, 1.0)
    source = Source(base_model=collection.base_model)
    return as_trained(Task("", 0.0, KIND, 0.0, scales, ranks, source=source), 0.0, 0.0, "zero"), parts


def _nothing_yet(collection: Collection, space: SlotSpace, rank: int, rng: torch.Generator) -> Columns:
    (n, d), (k_out, k_in), width = space.shape, space.ranks, collection.widths.loadings
    left = store_rows(torch.zeros(rank, k_out, dtype=torch.float64), width)
    right = store_rows(unit_rows(torch.randn(rank, k_in, generator=rng, dtype=torch.float64))[0], width)
    none = [no_rows(length, collection.dtype) for length in (n, d)]
    rows = dict(zip(FIELDS, (torch.ones(rank), left, none[0], right, none[1]), strict=True))
    counts = np.array([[rank, 0, 0, 0]], dtype=np.int64)
    return Columns.made(np.zeros(1, dtype=np.int64), counts, np.zeros(1, dtype=np.bool_), rows)
