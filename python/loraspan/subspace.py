"""Make a space from adapters, or open one from a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loraspan import store
from loraspan.adapters import check_together, read_all
from loraspan.adapters.base import Adapter
from loraspan.collection.changes import Change
from loraspan.collection.fit import Goal, fit_with_plans
from loraspan.collection.layout import collection_bytes, parse_bytes
from loraspan.collection.project import Projection
from loraspan.collection.rows import width_named
from loraspan.collection.summary import Report, summarize
from loraspan.ops.places import find_device
from loraspan.space import Subspace
from loraspan.store import Finding, verify

__all__ = ["Change", "Finding", "Projection", "Report", "Subspace", "compress", "open", "verify"]


def compress(
    sources: Any,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    max_bytes: int | str | None = None,
    dtype: torch.dtype | str | None = None,
    refine: int = 2,
    seed: int = 0,
    device: str | torch.device | None = None,
    hash_files: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Subspace:
    """Put adapters of one base model into a shared subspace. Give one of rank, energy, max_error and max_bytes.

    Args:
        sources: adapter folders, globs, ``.safetensors`` files, Hub ids or :class:`Adapter` objects, one or a list; or
            a dict that names them.
        rank: width of every shared basis; every task is then a few coefficients.
        energy: share of the collection's energy to keep in shared bases, in every slot.
        max_error: relative error on ``dW`` that no task exceeds: shared columns where they pay, private ones for the
            rest. Any value can be met on any adapters, down to the rounding of ``dtype``.
        max_bytes: all bytes on disk, a number or text such as "200MB": the worst task's error is made as small as they
            allow.
        dtype: of what is stored: float32, bfloat16, float16, or ``"int8"`` and ``"int4"``, integers in blocks of 64
            with a scale. Reported errors include its rounding. None takes float32 for a rank or an energy; for the
            other goals the widths of bases, loadings and private columns that take the fewest bytes.
        refine: iterations that fit both sides of a slot jointly.
        seed: of the random sketches.
        device: ``"cuda"`` or ``"mps"``: factors are sent there in chunks of columns, two at a time of 128 MB each,
            for every product with them, and small problems are solved on the CPU. ``None`` takes where they lie, the
            CPU for files. Metal has no float64, in which Grams and bases are summed: ``"mps"`` takes the rest.
        hash_files: keep a sha256 of every whole source file (its header's is always kept).
        progress: called with a stage, how much of it is done, and how much there is.

    Returns:
        A new space, in the CPU's memory; :meth:`Subspace.save` writes it.

    Raises:
        ArgumentError: if not exactly one goal is given, one is out of range, or there is no such device.
        FormatError: if a file is damaged; names file and tensor.
        UnsupportedError: if an adapter uses what would come out wrong.
        MismatchError: if adapters are of different base models, clash in shape, or share a name.
        NotFiniteError: if a factor holds a NaN or an infinity.

    Source:
        Share, arXiv 2602.06043; joint diagonalisation, arXiv 2407.00066.
    """
    width = None if dtype is None else width_named("compress", dtype)
    goal = Goal(rank, energy, max_error, refine, width, seed, parse_bytes("compress", max_bytes))
    place = find_device("compress", device)
    adapters: Sequence[Adapter] = read_all(sources, hash_file=hash_files)
    check_together(adapters)
    collection, plans = fit_with_plans(adapters, goal, progress, place)
    nbytes = collection_bytes(collection)
    return Subspace(replace(collection, summary=summarize(collection, nbytes), fitted=nbytes), plans=plans)


def open(path: str | Path) -> Subspace:
    """Open a store. Tensors are mapped and read when they are needed; each change is written to it at once.

    Args:
        path: the folder.

    Raises:
        StoreError: if there is no store.
        FormatError: if a file of it is damaged.
    """
    opened = store.open_at(Path(path))
    return Subspace(opened.collection, opened)
