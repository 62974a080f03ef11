"""Take adapters in, and fit new bases when that pays or a budget of bytes demands it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from loraspan.adapters.base import Adapter
from loraspan.collection.collection import Collection
from loraspan.collection.layout import CHANGE_BYTES, collection_bytes
from loraspan.collection.refit import refit
from loraspan.collection.segments import merge
from loraspan.collection.summary import summarized
from loraspan.collection.update import add
from loraspan.errors import ArgumentError

# A refit is tried whenever the collection has grown by this factor since the last one: over any number of adapters
# the tries then cost a constant factor of the last. It is taken where it saves a tenth.
_GROWTH, _GAIN = 1.5, 0.9
# What one of them may take of what is left of the budget of forgetting, so that another can follow.
_SPEND = 0.5
# Of a name that is told, beside its letters.
_NAME = 8


def absorb(
    collection: Collection,
    adapters: Sequence[Adapter],
    *,
    max_error: float,
    max_forgetting: float,
    max_bytes: int | None = None,
    place: torch.device | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> Collection:
    """Give the collection with more tasks, on new bases where those take fewer bytes.

    A refit is tried once the collection has grown by half since its bases were last fitted, and taken where it saves a
    tenth of the bytes; or where the collection is past ``max_bytes``. No task loses more than ``max_forgetting`` over
    its life, so its error stays at most ``max_error + max_forgetting``; one refit takes at most half of what is left,
    unless ``max_bytes`` demands the rest.

    Args:
        collection: to add to.
        adapters: at least one; their names are new.
        max_error: relative error of each of them when it comes.
        max_forgetting: what any task may lose in all refits of its life, relative to its ``dW``.
        max_bytes: what the collection may take on disk.
        place: the device to compute with the factors.
        report: called with "add" and, while bases are fitted, "fit", slots done and slots in all.

    Raises:
        ArgumentError: if ``max_forgetting`` is not between 0 and 1, or ``max_bytes`` cannot be met; says what can be.
        ArgumentError, MismatchError, NotFiniteError: as :func:`loraspan.collection.update.add`.
    """
    if not 0 < max_forgetting < 1:
        raise ArgumentError(f"absorb: max_forgetting is between 0 and 1; got {max_forgetting}")
    added = add(collection, adapters, max_error=max_error, place=place, report=report)
    # what a store writes of a change: the names, in a note too
    told = CHANGE_BYTES + sum(2 * len(adapter.name) + _NAME for adapter in adapters)
    nbytes = collection_bytes(added)
    over = max_bytes is not None and summarized(added)[1] + told > max_bytes
    if not over and nbytes <= _GROWTH * (collection.fitted or collection_bytes(collection)):
        return added if collection.fitted else replace(added, fitted=collection_bytes(collection))
    # joining segments saves bytes too, and a store does that by itself: nobody has to forget anything for it
    alone = least = collection_bytes(replace(added, segments=(merge(added.segments),)))
    for spend in (_SPEND, 1.0) if over else (_SPEND,):
        try:
            fitted = refit(added, max_forgetting=max_forgetting, spend=spend, report=report)
        except ArgumentError:
            # what is left of the budget is below rounding: the bases stay
            break
        size = summarized(fitted)[1] + (told if over else 0)
        if (max_bytes is not None and over and size <= max_bytes) or (not over and size <= _GAIN * alone):
            return replace(fitted, fitted=collection_bytes(fitted))
        least = min(least, size)
    if over:
        raise ArgumentError(
            f"absorb: max_bytes={max_bytes:,} cannot be met: the collection would take {least:,} bytes with "
            f"max_error={max_error:g} and max_forgetting={max_forgetting:g}; nothing was changed: allow more of one"
        )
    return replace(added, fitted=nbytes)
