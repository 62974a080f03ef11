"""Which tasks of a segment have a slot, in how many columns: of tensors of every slot, or behind the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loraspan.collection.columns import FIELDS, Columns
from loraspan.collection.filed import DENSE, SLOTS, planes_in
from loraspan.store.format import LARGEST, DamagedError, take
from loraspan.store.manifest import SlotShape
from loraspan.store.mapped import TensorFile

# the tensors of a slot that are read here
KINDS = ("counts", "rows", "dense", "origin")
_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
_WHAT = "tensor 'records'"


_Rows = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]


@dataclass(frozen=True)
class Index:
    """What says how many rows the tensors of a slot have: of each task, and the shapes of FIELDS; and its origins."""

    rows: NDArray[np.int64]
    counts: NDArray[np.int64]
    flags: NDArray[np.bool_]
    codes: NDArray[Any] | None
    shapes: Mapping[str, tuple[int, ...]]


def read(
    file: TensorFile, slots: Sequence[SlotShape], count: int, table: Mapping[str, Any], behind: bytes
) -> dict[str, Index]:
    """Give the whole numbers of the slots that tasks of a file have.

    Args:
        file: of a segment.
        slots: of the manifest.
        count: tasks of the file.
        table: of its records.
        behind: the bytes behind them.

    Raises:
        FormatError: if they do not fit the slots or each other.
    """
    if SLOTS in table:
        return _behind(file.name, slots, count, take(table, SLOTS, list, file.name, _WHAT), behind)
    if behind:
        raise DamagedError(file.name, _WHAT, f"bytes behind them need {SLOTS!r}")
    present = set(file.names())
    return {slot.name: _of_tensors(file, slot, count) for slot in slots if f"counts.{slot.name}" in present}


def _behind(file: str, slots: Sequence[SlotShape], count: int, names: list[Any], data: bytes) -> dict[str, Index]:
    cells = planes_in(data, len(names), count)
    known = {slot.name: slot for slot in slots}
    if cells is None or not all(type(name) is str and name in known for name in names) or len({*names}) != len(names):
        problem = f"needs slots of the manifest, each once, and numbers of {count} tasks in each behind the table"
        raise DamagedError(file, _WHAT, f"{problem}; got {len(names)} slots and {len(data)} bytes")
    found: dict[str, Index] = {}
    for j, name in enumerate(names):
        rows = np.flatnonzero(cells[5, j])
        of_slot = rows, cells[:4, j, rows].T.astype(np.int64), cells[5, j, rows] == DENSE
        wrong = index_problem(*of_slot, known[name], count)
        if wrong is not None:
            raise DamagedError(file, f"{wrong[0]} of slot {name!r}", wrong[1])
        found[name] = _index(known[name], of_slot, cells[4, j])
    # in the order of a manifest, as from tensors
    return {slot.name: found[slot.name] for slot in slots if slot.name in found}


def _of_tensors(file: TensorFile, slot: SlotShape, count: int) -> Index:
    counts = _ints(file, f"counts.{slot.name}")
    assert counts is not None
    rows = _ints(file, f"rows.{slot.name}")
    if rows is None:
        rows = np.arange(count, dtype=np.int64)
    flags = _flags(file, slot.name)
    if flags is None:
        flags = np.zeros(rows.shape, dtype=np.bool_)
    problem = index_problem(rows, counts, flags, slot, count)
    if problem is not None:
        raise DamagedError(file.name, f"tensor '{problem[0]}.{slot.name}'", problem[1])
    return _index(slot, (rows, counts, flags), _codes(file, slot.name, count))


def _index(slot: SlotShape, found: _Rows, codes: NDArray[Any] | None) -> Index:
    totals = Columns(*found, *[torch.empty(0)] * 5).offsets()[-1]
    return Index(*found, codes, dict(zip(FIELDS, shapes_of(totals, slot), strict=True)))


def index_problem(
    rows: NDArray[np.int64], counts: NDArray[np.int64], dense: NDArray[np.bool_], slot: SlotShape, tasks: int
) -> tuple[str, str] | None:
    """Say which of the whole numbers of a slot does not fit, and how, if any."""
    if rows.ndim != 1 or counts.shape != (*rows.shape, 4) or dense.shape != rows.shape:
        return "counts", f"rows, counts and dense are [T], [T, 4], [T]; got {rows.shape}, {counts.shape}, {dense.shape}"
    if len(rows) and not (rows[0] >= 0 and rows[-1] < tasks and (rows[1:] > rows[:-1]).all()):
        return "rows", f"they have to ascend within the {tasks} tasks"
    if len(rows) and not (counts.min() >= 0 and counts.max() <= LARGEST):
        return "counts", f"they have to be from 0 to {LARGEST}"
    for side, width, forms in (("left", slot.k_out, [0, 1]), ("right", slot.k_in, [0, 2])):
        if not width and counts[:, forms].any():
            return "counts", f"a column whose {side} end is shared needs a basis, and here that has no vectors"
    if (counts[dense, 0] != slot.k_in).any():
        return "dense", f"a dense core has {slot.k_in} columns with both ends shared"
    return None


def shapes_of(totals: NDArray[np.int64], slot: SlotShape) -> list[tuple[int, ...]]:
    """Give the shapes of FIELDS, of so many rows each."""
    widths = ((), (slot.k_out,), (slot.n,), (slot.k_in,), (slot.d,))
    return [(int(rows), *width) for rows, width in zip(totals, widths, strict=True)]


def _ints(file: TensorFile, name: str) -> NDArray[np.int64] | None:
    tensor = file.tensor(name, *_INTEGERS)
    return None if tensor is None else tensor.numpy().astype(np.int64)


def _flags(file: TensorFile, slot: str) -> NDArray[np.bool_] | None:
    raw = file.tensor(f"dense.{slot}", torch.bool)
    # as bytes: a bool that is neither 0 nor 1 must not reach a branch
    return None if raw is None else np.asarray(raw.reshape(-1).view(torch.uint8).numpy() != 0)


def _codes(file: TensorFile, slot: str, count: int) -> NDArray[Any] | None:
    tensor = file.tensor(f"origin.{slot}", *_INTEGERS)
    if tensor is None:
        return None
    if tuple(tensor.shape) != (count,):
        raise DamagedError(file.name, f"tensor 'origin.{slot}'", f"it has to be [{count}]; it is {list(tensor.shape)}")
    return tensor.numpy()
