"""What the next generation has in common with the one it is made from, and what has to be written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest

import numpy as np

from loraspan._default_device import cpu_by_default
from loraspan.collection.coded import CODED_FIELDS, Coded
from loraspan.collection.collection import Collection, Segment, Task
from loraspan.collection.layout import basis_file_bytes, manifest_bytes, segment_bytes
from loraspan.collection.rows import Rows
from loraspan.collection.segments import merge
from loraspan.errors import ArgumentError
from loraspan.store.checks import check_change
from loraspan.store.compaction import MEMORY, groups
from loraspan.store.manifest import Change, DataFile
from loraspan.store.opened import Opened

# of a tensor beside its data, and of a task beside its tensors, about
_HEADER, _RECORD = 100, 300
# Times that coded ends are in memory where they are joined: as they were, joined, and twice that while they are coded.
_UNPACKED = 4
_KEPT = [each.name for each in fields(Task) if each.name != "name"]


@dataclass(frozen=True)
class Part:
    """A segment of the next generation: of a file that stands, or, with None, the living of ``segments``, to write."""

    segments: tuple[Segment, ...]
    data: DataFile | None

    @property
    def living(self) -> int:
        """The number of its tasks."""
        return self.data.living if self.data is not None else sum(segment.living for segment in self.segments)


@dataclass(frozen=True)
class Plan:
    """The next generation: ``basis`` is None where the bases have to be written."""

    basis: DataFile | None
    parts: tuple[Part, ...]
    names: frozenset[str]
    change: Change | None


def plan(opened: Opened, collection: Collection) -> Plan:
    """Find what stands of ``collection``, check the rest, and say which segments are to be joined.

    Raises:
        ShapeError: if parts of the collection do not fit together.
        ArgumentError: if a name occurs twice, or something cannot be written as it is.
    """
    parts, names = _compare(opened, collection)
    check_change(collection, opened.collection, [part.segments[0] for part in parts if part.data is None])
    after = names.after(opened.names)
    parts = [_without_dead(part) for part in parts if part.living]
    standing = next((i for i, part in enumerate(parts) if part.data is None), len(parts))
    parts = _joined(parts, standing, MEMORY)
    basis = opened.basis if _bases_stand(opened.collection, collection) else None
    return Plan(basis, tuple(parts), after, names.change())


@cpu_by_default
def forecast(opened: Opened, collection: Collection) -> int:
    """Give the bytes of the files of the generation that ``commit`` would write, as ``layout`` counts them.

    What would be written anew without removed tasks, or joined, is put together for it, a file at a time.

    Raises:
        ShapeError, ArgumentError: as :func:`plan`.
    """
    made = plan(opened, collection)
    total = made.basis.size if made.basis is not None else basis_file_bytes(collection)
    for part in made.parts:
        total += part.data.size if part.data is not None else segment_bytes(merge(part.segments))
    segments = tuple(part.segments[0] for part in made.parts)
    return total + manifest_bytes(replace(collection, segments=segments))


def all_new(collection: Collection, memory: int = MEMORY) -> Plan:
    """Write everything: a file a segment, or less where there are many, each joined within ``memory``."""
    parts = [Part((segment,), None) for segment in collection.segments]
    names = frozenset(task.name for task in collection.tasks)
    return Plan(None, tuple(_joined(parts, 0, memory)), names, None)


def _joined(parts: list[Part], standing: int, memory: int) -> list[Part]:
    sizes, joined = [_size(part) for part in parts], []
    taking = [size + _unpacked(part) for size, part in zip(sizes, parts, strict=True)]
    for places in groups(sizes, standing, taking=taking, memory=memory):
        some = parts[places.start : places.stop]
        joined.append(some[0] if len(some) == 1 else Part(tuple(s for part in some for s in part.segments), None))
    return joined


@dataclass(frozen=True)
class _Names:
    """The names that go and come, and the pairs among them that one task has."""

    gone: list[str] = field(default_factory=list)
    came: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)

    def note(self, was: Sequence[Task | None], now: Sequence[Task | None]) -> None:
        """Compare the tasks of a segment, place by place."""
        for old, new in zip_longest(was, now):
            if old is new:
                continue
            if old is not None:
                self.gone.append(old.name)
            if new is not None:
                self.came.append(new.name)
            if old is not None and new is not None and old.name != new.name:
                self.renamed.append((old.name, new.name))

    def after(self, before: frozenset[str]) -> frozenset[str]:
        """Give all names of the next generation; refuse one that comes twice."""
        names = set(before.difference(self.gone))
        for name in self.came:
            if name in names:
                raise ArgumentError(f"commit: two tasks are named {name!r}: rename one")
            names.add(name)
        return frozenset(names)

    def change(self) -> Change | None:
        """Give what the manifest tells of this, None if that is too long."""
        came, gone = Counter(self.came), Counter(self.gone)
        came.subtract(new for _, new in self.renamed)
        gone.subtract(old for old, _ in self.renamed)
        added, removed = tuple(came - gone), tuple(gone - came)
        return Change(added, removed, tuple(self.renamed)).unless_long()


def _compare(opened: Opened, collection: Collection) -> tuple[list[Part], _Names]:
    before = zip(opened.collection.segments, opened.segments, strict=True)
    standing = {id(segment.columns): (segment, data) for segment, data in before}
    parts, names = [], _Names()
    for segment in collection.segments:
        was = standing.pop(id(segment.columns), None)
        if was is None:
            names.note((), segment.tasks)
            parts.append(Part((segment,), None))
            continue
        if was[0].tasks is not segment.tasks:
            names.note(was[0].tasks, segment.tasks)
        parts.append(Part((segment,), _patched(*was, segment.tasks)))
    for old, _ in standing.values():
        names.note(old.tasks, ())
    return parts, names


def _patched(was: Segment, data: DataFile, tasks: Sequence[Task | None]) -> DataFile | None:
    """Give the same file with other ``tasks``, None if it cannot hold them."""
    if was.tasks is tasks:
        return data
    if len(was.tasks) != len(tasks):
        return None
    removed, renamed = set(data.removed), dict(data.renamed)
    for i, (old, new) in enumerate(zip(was.tasks, tasks, strict=True)):
        if old is new:
            continue
        if old is None or (new is not None and any(getattr(old, key) is not getattr(new, key) for key in _KEPT)):
            return None
        if new is None:
            removed.add(i)
            renamed.pop(i, None)
        else:
            renamed[i] = new.name
    return replace(data, removed=tuple(sorted(removed)), renamed=tuple(sorted(renamed.items())))


def _without_dead(part: Part) -> Part:
    """Write a segment anew where removed tasks take more than half of its columns."""
    if part.data is None or not part.data.removed:
        return part
    (segment,) = part.segments
    alive = np.array([task is not None for task in segment.tasks], dtype=np.bool_)
    total = living = 0.0
    for columns in segment.columns.values():
        lengths = np.diff(columns.offsets(), axis=0)
        sizes = np.array([tensor.nbytes for tensor in columns.tensors().values()])
        total += float(sizes.sum())
        living += float((sizes * lengths[alive[columns.tasks]].sum(axis=0) / np.maximum(lengths.sum(axis=0), 1)).sum())
    # extras of the dead are not in memory, and taken to be in proportion
    return Part(part.segments, None) if living < total / 2 else part


def _size(part: Part) -> int:
    """Give the bytes of its file; about those where it is not written yet."""
    if part.data is not None:
        return part.data.size
    size = 0
    for segment in part.segments:
        tensors: list[Rows] = [rows for columns in segment.columns.values() for rows in columns.tensors().values()]
        tensors += [extra for task in segment.tasks if task is not None for extra in task.extras.values()]
        size += sum(tensor.nbytes + _HEADER for tensor in tensors) + _RECORD * segment.living
    return size


def _unpacked(part: Part) -> int:
    """Give the bytes that joining it takes beside those of its file."""
    ends = [getattr(columns, field) for s in part.segments for columns in s.columns.values() for field in CODED_FIELDS]
    return _UNPACKED * sum(rows.nbytes for rows in ends if isinstance(rows, Coded))


def _bases_stand(opened: Collection, collection: Collection) -> bool:
    """Say whether the file of the bases serves ``collection``: it may have more slots, without bases."""
    if (opened.dtype, opened.bits) != (collection.dtype, collection.bits):
        return False
    for name, slot in collection.slots.items():
        was = opened.slots.get(name)
        for side in ("u", "v"):
            now = getattr(slot, side)
            if (was is None or getattr(was, side) is not now) and (now.nbytes or (was and getattr(was, side).nbytes)):
                return False
    gone = opened.slots.keys() - collection.slots.keys()
    return not any(opened.slots[name].u.nbytes or opened.slots[name].v.nbytes for name in gone)
