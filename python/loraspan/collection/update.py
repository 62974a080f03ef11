"""Change a collection task by task: each change is a new collection that shares all it can with the old one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Names
from dataclasses import replace
from numbers import Real

import torch

from loraspan.adapters.base import Adapter
from loraspan.collection.collection import Collection, Segment
from loraspan.collection.express import express
from loraspan.errors import ArgumentError, MismatchError


def add(
    collection: Collection,
    adapters: Sequence[Adapter],
    *,
    max_error: float,
    place: torch.device | None = None,
    leaving: Names[str] = (),
    report: Callable[[str, int, int], None] | None = None,
) -> Collection:
    """Give the collection with more tasks. The bases and all other tasks are the very same objects.

    Args:
        collection: to add to.
        adapters: at least one; their names are new.
        max_error: relative error on ``dW`` that none of them exceeds, between 0 and 1.
        place: the device to compute with the factors.
        leaving: names that may be taken, since their tasks are about to leave.
        report: called with "add", slots done and slots in all.

    Raises:
        ArgumentError: if there is no adapter, or ``max_error`` is not between 0 and 1 or below what rounding allows.
        MismatchError: if a name is taken or given twice, or an adapter disagrees with the bases on a slot.
        NotFiniteError: if a factor holds a NaN or an infinity.
    """
    check_goal("add", max_error)
    check_names("add", [adapter.name for adapter in adapters], collection.places.keys() - set(leaving))
    made = express(collection.slots, adapters, max_error=max_error, dtype=collection.widths, place=place, report=report)
    slots = collection.slots if len(made.slots) == len(collection.slots) else made.slots
    base = collection.base_model or next((a.source.base_model for a in adapters if a.source.base_model), None)
    return replace(collection, slots=slots, segments=(*collection.segments, made.segment), base_model=base)


def remove(collection: Collection, names: Iterable[str]) -> Collection:
    """Give the collection without some tasks. Bases and columns are the very same objects.

    Raises:
        UnknownTaskError: if there is no task of a name.
    """
    gone: dict[int, set[int]] = {}
    for name in names:
        collection.find(name)
        i, j = collection.places[name]
        gone.setdefault(i, set()).add(j)
    segments = [_without(segment, gone[i]) if i in gone else segment for i, segment in enumerate(collection.segments)]
    return replace(collection, segments=tuple(segment for segment in segments if segment.living))


def rename(collection: Collection, new_names: Mapping[str, str]) -> Collection:
    """Give the collection with new names for some tasks, by their old ones.

    Raises:
        UnknownTaskError: if there is no task of an old name.
        MismatchError: if a new name is that of another task that stays, or is given twice.
    """
    for old in new_names:
        collection.find(old)
    check_names("rename", list(new_names.values()), collection.places.keys() - new_names.keys())
    changed: dict[int, dict[int, str]] = {}
    for old, new in new_names.items():
        i, j = collection.places[old]
        changed.setdefault(i, {})[j] = new
    segments = list(collection.segments)
    for i, of_segment in changed.items():
        tasks = list(segments[i].tasks)
        for j, name in of_segment.items():
            task = tasks[j]
            assert task is not None
            tasks[j] = replace(task, name=name)
        segments[i] = Segment(tuple(tasks), segments[i].columns)
    return replace(collection, segments=tuple(segments))


def replace_tasks(
    collection: Collection,
    adapters: Sequence[Adapter],
    *,
    max_error: float,
    place: torch.device | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> Collection:
    """Give the collection with other adapters for tasks of the same names, which move to the end.

    Raises:
        UnknownTaskError: if there is no task of an adapter's name.
        ArgumentError, MismatchError, NotFiniteError: as :func:`add`.
    """
    names = [adapter.name for adapter in adapters]
    for name in names:
        collection.find(name)
    added = add(collection, adapters, max_error=max_error, place=place, leaving=names, report=report)
    kept = remove(collection, names)
    return replace(added, segments=(*kept.segments, added.segments[-1]))


def check_goal(operator: str, max_error: float) -> None:
    """Refuse what is no relative error."""
    if not isinstance(max_error, Real) or not 0 < max_error < 1:
        raise ArgumentError(f"{operator}: max_error is between 0 and 1; got {max_error!r}")


def check_names(operator: str, names: Sequence[str], taken: Names[str]) -> None:
    """Refuse names that would not be distinct."""
    if not names:
        raise ArgumentError(f"{operator}: there is no {'name' if operator == 'rename' else 'adapter'}")
    seen: set[str] = set()
    for name in names:
        if name in taken:
            raise MismatchError(
                f"{operator}: there is a task {name!r} already; remove or replace that one, or give another name"
            )
        if name in seen:
            raise MismatchError(f"{operator}: two tasks would be named {name!r}; give each a name of its own")
        seen.add(name)


def _without(segment: Segment, gone: set[int]) -> Segment:
    tasks = tuple(None if j in gone else task for j, task in enumerate(segment.tasks))
    return Segment(tasks, segment.columns)
