"""What a collection has to be before it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from loraspan.adapters.base import KINDS
from loraspan.adapters.header import MAX_NAME_CHARS
from loraspan.collection.collection import Collection, Segment, SlotSpace
from loraspan.collection.headers import DTYPE_NAMES
from loraspan.errors import ArgumentError, ShapeError
from loraspan.ops.packed import Packed
from loraspan.store.format import LARGEST
from loraspan.store.manifest import FLOATS
from loraspan.store.segment import problem_of, slot_shape
from loraspan.store.sizes import bare_problem, slot_problem

_LONGEST_NAME = MAX_NAME_CHARS - 32


def check(collection: Collection) -> None:
    """Refuse a collection whose parts do not fit together, or that a file cannot hold.

    Raises:
        ShapeError: if shapes or dtypes do not fit.
        ArgumentError: if a name occurs twice or is not text, or a tensor has a dtype that files do not know.
    """
    _check_slots(collection, {})
    _check_segments(collection, collection.segments)
    seen: set[str] = set()
    for task in collection.tasks:
        if task.name in seen:
            raise ArgumentError(f"save: two tasks are named {task.name!r}: rename one")
        seen.add(task.name)


def check_change(collection: Collection, parent: Collection, fresh: Sequence[Segment]) -> None:
    """Check what of a collection is not in ``parent``: its slots, and the segments that are ``fresh``.

    Names are left to whoever knows those of the parent. The other segments are checked too where a slot of the parent
    is gone or of another shape.

    Raises:
        ShapeError: if shapes or dtypes do not fit.
        ArgumentError: if a slot's name is not text, or a tensor has a dtype that files do not know.
    """
    _check_slots(collection, parent.slots)
    stands = collection.dtype == parent.dtype and all(
        name in collection.slots and slot_shape(name, collection.slots[name]) == slot_shape(name, slot)
        for name, slot in parent.slots.items()
        if collection.slots.get(name) is not slot
    )
    _check_segments(collection, fresh if stands else collection.segments)


def _check_slots(collection: Collection, known: Mapping[str, SlotSpace]) -> None:
    if collection.dtype not in FLOATS:
        names = ", ".join(map(str, FLOATS))
        raise ArgumentError(f"save: dtype of a collection is one of {names}; got {collection.dtype}")
    for name, slot in collection.slots.items():
        if known.get(name) is not slot:
            _check_text(name, "slot")
            _check_slot(name, slot, collection)


def _check_segments(collection: Collection, segments: Sequence[Segment]) -> None:
    for segment in segments:
        _check_segment(segment, collection)
        for task in filter(None, segment.tasks):
            for key, extra in task.extras.items():
                _check_text(key, f"extra of task {task.name!r}")
                _check_extra(task.name, key, extra)


def _check_slot(name: str, slot: SlotSpace, collection: Collection) -> None:
    if slot.kind not in KINDS:
        raise ArgumentError(f"save: the kind of slot {name!r} is one of {', '.join(KINDS)}; got {slot.kind!r}")
    for side, basis in (("u", slot.u), ("v", slot.v)):
        if isinstance(basis, Packed):
            continue
        if basis.ndim != 2 or max(basis.shape) > LARGEST or basis.dtype != collection.dtype:
            raise ShapeError(
                f"save: {side} of slot {name!r} has to be a matrix of {collection.dtype}; "
                f"got {list(basis.shape)} of {basis.dtype}"
            )
    if (problem := slot_problem(slot_shape(name, slot))) is not None:
        raise ShapeError(f"save: slot {name!r}: {problem}")


def _check_segment(segment: Segment, collection: Collection) -> None:
    for name, columns in segment.columns.items():
        if name not in collection.slots:
            raise ShapeError(f"save: there are columns for {name!r}, which is no slot of the collection")
        shape = slot_shape(name, collection.slots[name])
        problem = problem_of(columns, shape, collection.dtype, len(segment.tasks))
        if problem is not None:
            raise ShapeError(f"save: {problem[0]} of slot {name!r}: {problem[1]}")
    shapes = [slot_shape(name, collection.slots[name]) for name in segment.columns]
    if (too_many := bare_problem(segment.columns, shapes)) is not None:
        raise ShapeError(f"save: {too_many}")


def _check_extra(task: str, key: str, extra: Tensor) -> None:
    if extra.dtype not in DTYPE_NAMES:
        raise ArgumentError(f"save: extra {key!r} of task {task!r} is {extra.dtype}, which safetensors cannot hold")


def _check_text(name: str, what: str) -> None:
    # these become names of tensors, beside a prefix
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ArgumentError(
            f"save: the name of {what} has to be at most {_LONGEST_NAME} printable characters; got {name[:80]!r}"
        )
