"""The tensors of a collection as a store names them, both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan.collection.coded import column_tensors
from loraspan.collection.collection import Collection, Segment, SlotSpace, Task
from loraspan.collection.columns import FIELDS, Columns
from loraspan.collection.layout import narrow
from loraspan.collection.rows import Rows, tensors_of
from loraspan.ops.packed import Packed
from loraspan.ops.packed_reference import BLOCK
from loraspan.store import records
from loraspan.store.coded_ends import WEIGHTS, coded_ends, coded_weights
from loraspan.store.format import LARGEST, DamagedError
from loraspan.store.manifest import DataFile, Manifest, SlotShape
from loraspan.store.mapped import TensorFile
from loraspan.store.sizes import bare_problem

_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
# bits of packed rows, by the dtype of their codes
_PACKED = {torch.int8: 8, torch.int16: 16, torch.uint8: 4}


def basis_tensors(collection: Collection) -> list[tuple[str, Tensor]]:
    """Give the tensors of the file of the bases; one without an element is left out."""
    sides = [(side, name, m) for name, s in collection.slots.items() for side, m in (("u", s.u), ("v", s.v))]
    named = [pair for side, name, m in sides for pair in tensors_of(side, name, m)]
    return [(name, tensor) for name, tensor in named if tensor.numel()]


def task_tensors(segment: Segment) -> list[tuple[str, Tensor]]:
    """Give the tensors of the file of a segment whose tasks all live; one without an element is left out."""
    tasks = [task for task in segment.tasks if task is not None]
    assert len(tasks) == len(segment.tasks)
    text, codes = records.encode(tasks, list(segment.columns))
    named = column_tensors(segment.columns)
    for name, columns in segment.columns.items():
        named.append((f"counts.{name}", _integers(columns.counts)))
        if 0 < len(columns.tasks) < len(tasks):
            named.append((f"rows.{name}", _integers(columns.tasks)))
        if columns.dense.any():
            named.append((f"dense.{name}", torch.from_numpy(np.ascontiguousarray(columns.dense))))
    largest = max((int(column.max(initial=0)) for column in codes.values()), default=0)
    named += [(f"origin.{name}", _integers(column, largest)) for name, column in codes.items()]
    named = [(name, tensor) for name, tensor in named if tensor.numel()]
    # an extra is kept even without an element: that it was there is part of it
    named += [(f"extra.{i}.{key}", extra) for i, task in enumerate(tasks) for key, extra in task.extras.items()]
    named.append(("records", torch.frombuffer(bytearray(text), dtype=torch.uint8)))
    return named


def check_records(segments: Sequence[Segment]) -> None:
    """Refuse tasks of which a file could not keep everything.

    Raises:
        ArgumentError: if there are such.
    """
    for segment in segments:
        records.encode([task for task in segment.tasks if task is not None], list(segment.columns))


def read_basis(file: TensorFile, manifest: Manifest) -> dict[str, tuple[Rows, Rows]]:
    """Give ``(u, v)`` of every slot, as views.

    Raises:
        FormatError: if the file's tensors are not those of the manifest.
    """
    known = {f"{side}{scales}.{slot.name}" for slot in manifest.slots for side in "uv" for scales in ("", "_scales")}
    file.refuse_strangers(known)
    said = "the manifest says"
    return {
        slot.name: (
            _ends(file, "u", slot.name, manifest.dtype, (slot.n, slot.k_out), said, standing=True),
            _ends(file, "v", slot.name, manifest.dtype, (slot.d, slot.k_in), said, standing=True),
        )
        for slot in manifest.slots
    }


def read_tasks(file: TensorFile, manifest: Manifest, data: DataFile) -> Segment:
    """Give the tasks of a segment, with the names that the manifest says and without those it lacks, and all columns.

    Raises:
        FormatError: if the file's tensors do not fit the manifest or each other.
    """
    kinds = (*FIELDS, *(f"{field}_scales" for field in FIELDS[1:]), "counts", "rows", "dense", "origin", "coded")
    count = data.tasks
    extras = _extras(file, count)
    present = set(file.names())
    slots = [slot for slot in manifest.slots if f"counts.{slot.name}" in present]
    known = {f"{kind}.{slot.name}" for slot in slots for kind in kinds} | {"records", WEIGHTS}
    file.refuse_strangers(known | {name for name in present if name.startswith("extra.")})
    codes = {slot.name: _codes(file, slot.name, count) for slot in slots}
    text = file.tensor("records", torch.uint8)
    if text is None or text.ndim != 1:
        raise DamagedError(file.name, "tensor 'records'", "it has to be there, with one dimension")
    tasks: list[Task | None] = [*records.decode(text.numpy().tobytes(), count, codes, extras, file.name)]
    for i, name in data.renamed:
        of = tasks[i]
        tasks[i] = None if of is None else replace(of, name=name)
    for i in data.removed:
        tasks[i] = None
    columns = _columns_of(file, slots, manifest.dtype, count)
    if (problem := bare_problem(columns, slots)) is not None:
        raise DamagedError(file.name, "counts", problem)
    return Segment(tuple(tasks), columns)


def slot_shape(name: str, slot: SlotSpace) -> SlotShape:
    """Give what the manifest says of a slot."""
    (n, d), (k_out, k_in) = slot.shape, slot.ranks
    return SlotShape(name, n, d, k_out, k_in, slot.kind, slot.kernel)


def slot_shapes(collection: Collection) -> tuple[SlotShape, ...]:
    """Give what the manifest says of all slots."""
    return tuple(slot_shape(name, slot) for name, slot in collection.slots.items())


def problem_of(columns: Columns, slot: SlotShape, dtype: torch.dtype, tasks: int) -> tuple[str, str] | None:
    """Say which part of the columns of a slot does not fit, and how, if any."""
    problem = _index_problem(columns.tasks, columns.counts, columns.dense, slot, tasks)
    if problem is not None:
        return problem
    shapes = _shapes(columns.offsets()[-1], slot)
    for (field, tensor), shape in zip(columns.tensors().items(), shapes, strict=True):
        if tuple(tensor.shape) != shape:
            return field, f"the counts ask for shape {list(shape)}; it is {list(tensor.shape)}"
        wanted = torch.float32 if field == "weights" else dtype
        if isinstance(tensor, Tensor) and tensor.dtype != wanted:
            return field, f"it has to be {wanted}; it is {tensor.dtype}"
    return None


def _index_problem(
    rows: NDArray[np.int64], counts: NDArray[np.int64], dense: NDArray[np.bool_], slot: SlotShape, tasks: int
) -> tuple[str, str] | None:
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


@dataclass(frozen=True)
class _Index:
    """What says how many rows the tensors of a slot have: of each task, and the shapes of FIELDS."""

    rows: NDArray[np.int64]
    counts: NDArray[np.int64]
    flags: NDArray[np.bool_]
    shapes: Mapping[str, tuple[int, ...]]


def _columns_of(file: TensorFile, slots: Sequence[SlotShape], dtype: torch.dtype, count: int) -> dict[str, Columns]:
    indices = {slot.name: _index(file, slot, count) for slot in slots}
    coded = coded_ends(file, {name: index.shapes for name, index in indices.items()})
    weights = coded_weights(file, {name: indices[name].counts for name in coded})
    found: dict[str, dict[str, Rows]] = {name: {**ends} for name, ends in coded.items()}
    for name, of_slot in weights.items():
        found[name]["weights"] = of_slot
    return {name: _columns(file, name, dtype, index, found.get(name, {})) for name, index in indices.items()}


def _index(file: TensorFile, slot: SlotShape, count: int) -> _Index:
    counts = _ints(file, f"counts.{slot.name}")
    assert counts is not None
    rows = _ints(file, f"rows.{slot.name}")
    if rows is None:
        rows = np.arange(count, dtype=np.int64)
    flags = _flags(file, slot.name)
    if flags is None:
        flags = np.zeros(rows.shape, dtype=np.bool_)
    problem = _index_problem(rows, counts, flags, slot, count)
    if problem is not None:
        raise DamagedError(file.name, f"tensor '{problem[0]}.{slot.name}'", problem[1])
    totals = Columns(rows, counts, flags, *[torch.empty(0)] * 5).offsets()[-1]
    return _Index(rows, counts, flags, dict(zip(FIELDS, _shapes(totals, slot), strict=True)))


def _columns(file: TensorFile, slot: str, dtype: torch.dtype, index: _Index, coded: Mapping[str, Rows]) -> Columns:
    shapes, asked = index.shapes, "the counts ask for"
    found = dict(coded)
    if "weights" not in found:
        found["weights"] = _float(file, f"weights.{slot}", torch.float32, shapes["weights"], asked)
    for name in FIELDS[1:]:
        if name not in found:
            found[name] = _ends(file, name, slot, dtype, (shapes[name][0], shapes[name][1]), asked)
    return Columns.made(index.rows, index.counts, index.flags, found)


def _shapes(totals: NDArray[np.int64], slot: SlotShape) -> list[tuple[int, ...]]:
    """Give the shapes of FIELDS, of so many rows each."""
    widths = ((), (slot.k_out,), (slot.n,), (slot.k_in,), (slot.d,))
    return [(int(rows), *width) for rows, width in zip(totals, widths, strict=True)]


def _integers(values: NDArray[np.int64], largest: int | None = None) -> Tensor:
    top = int(values.max(initial=0)) if largest is None else largest
    return torch.from_numpy(np.ascontiguousarray(values)).to(narrow(top))


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


def _float(file: TensorFile, name: str, dtype: torch.dtype, shape: tuple[int, ...], why: str) -> Tensor:
    tensor = file.tensor(name, dtype)
    if tensor is None and 0 in shape:
        return torch.empty(shape, dtype=dtype)
    if tensor is None or tuple(tensor.shape) != shape:
        got = "it is missing" if tensor is None else f"it is {list(tensor.shape)}"
        raise DamagedError(file.name, f"tensor {name!r}", f"{why} shape {list(shape)}; {got}")
    return tensor


def _ends(
    file: TensorFile,
    field: str,
    slot: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    why: str,
    *,
    standing: bool = False,
) -> Rows:
    """Give rows of floats or packed ones; ``standing``: where they are floats, the vectors are columns."""
    name = f"{field}.{slot}"
    codes = file.tensor(name)
    if codes is None or codes.dtype not in _PACKED:
        if file.tensor(f"{field}_scales.{slot}") is not None:
            raise DamagedError(file.name, f"tensor '{field}_scales.{slot}'", f"{name!r} is not packed")
        return _float(file, name, dtype, shape, why)
    bits = _PACKED[codes.dtype]
    rows, length = shape[::-1] if standing else shape
    if tuple(codes.shape) != (rows, -(-length * bits // (8 * codes.itemsize))):
        raise DamagedError(
            file.name,
            f"tensor {name!r}",
            f"{why} {rows} rows of {length} entries in {bits} bits; it is {list(codes.shape)}",
        )
    scales = _float(file, f"{field}_scales.{slot}", torch.float16, (rows, -(-length // BLOCK)), why)
    return Packed(codes.view(torch.uint8), scales, length, bits)


def _extras(file: TensorFile, count: int) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for name in file.names():
        if not name.startswith("extra."):
            continue
        _, number, key = (*name.split(".", 2), "", "")[:3]
        if not (number.isascii() and number.isdigit() and str(int(number[:10])) == number and int(number) < count):
            raise DamagedError(file.name, f"tensor {name!r}", f"its number has to be that of one of {count} tasks")
        tensor = file.tensor(name)
        assert tensor is not None
        found.setdefault(int(number), {})[key] = tensor
    return found
