"""What a collection has to be before it is written."""

from __future__ import annotations

from torch import Tensor

from loraspan.adapters.base import KINDS
from loraspan.adapters.header import MAX_NAME_CHARS
from loraspan.collection.collection import Collection, Segment, SlotSpace
from loraspan.collection.layout import DTYPE_NAMES
from loraspan.errors import ArgumentError, ShapeError
from loraspan.store.format import LARGEST
from loraspan.store.manifest import FLOATS
from loraspan.store.segment import problem_of, slot_shape

_LONGEST_NAME = MAX_NAME_CHARS - 32


def check(collection: Collection) -> None:
    """Refuse a collection whose parts do not fit together, or that a file cannot hold.

    Raises:
        ShapeError: if shapes or dtypes do not fit.
        ArgumentError: if a name occurs twice or is not text, or a tensor has a dtype that files do not know.
    """
    if collection.dtype not in FLOATS:
        known = ", ".join(map(str, FLOATS))
        raise ArgumentError(f"save: dtype of a collection is one of {known}; got {collection.dtype}")
    for name, slot in collection.slots.items():
        _check_text(name, "slot")
        _check_slot(name, slot, collection)
    for segment in collection.segments:
        _check_segment(segment, collection)
    seen: set[str] = set()
    for task in collection.tasks:
        if task.name in seen:
            raise ArgumentError(f"save: two tasks are named {task.name!r}: rename one")
        seen.add(task.name)
        for key, extra in task.extras.items():
            _check_text(key, f"extra of task {task.name!r}")
            _check_extra(task.name, key, extra)


def _check_slot(name: str, slot: SlotSpace, collection: Collection) -> None:
    if slot.kind not in KINDS:
        raise ArgumentError(f"save: the kind of slot {name!r} is one of {', '.join(KINDS)}; got {slot.kind!r}")
    for side, basis in (("u", slot.u), ("v", slot.v)):
        if basis.ndim != 2 or max(basis.shape) > LARGEST or basis.dtype != collection.dtype:
            raise ShapeError(
                f"save: {side} of slot {name!r} has to be a matrix of {collection.dtype}; "
                f"got {list(basis.shape)} of {basis.dtype}"
            )


def _check_segment(segment: Segment, collection: Collection) -> None:
    for name, columns in segment.columns.items():
        if name not in collection.slots:
            raise ShapeError(f"save: there are columns for {name!r}, which is no slot of the collection")
        shape = slot_shape(name, collection.slots[name])
        problem = problem_of(columns, shape, collection.dtype, len(segment.tasks))
        if problem is not None:
            raise ShapeError(f"save: {problem[0]} of slot {name!r}: {problem[1]}")


def _check_extra(task: str, key: str, extra: Tensor) -> None:
    if extra.dtype not in DTYPE_NAMES:
        raise ArgumentError(f"save: extra {key!r} of task {task!r} is {extra.dtype}, which safetensors cannot hold")


def _check_text(name: str, what: str) -> None:
    # these become names of tensors, beside a prefix
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ArgumentError(
            f"save: the name of {what} has to be at most {_LONGEST_NAME} printable characters; got {name[:80]!r}"
        )
