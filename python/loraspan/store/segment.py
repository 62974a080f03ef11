"""The tensors of a collection as a store names them, both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loraspan.collection import coded
from loraspan.collection.beside import Beside
from loraspan.collection.coded import BASES, CODED_FIELDS, WEIGHTS
from loraspan.collection.collection import Collection, Segment, SlotSpace, Task
from loraspan.collection.columns import FIELDS, Columns
from loraspan.collection.filed import SLOTS, file_tensors
from loraspan.collection.filed import records as filed_records
from loraspan.collection.origins import Origins
from loraspan.collection.rows import Rows
from loraspan.ops.packed import Packed
from loraspan.ops.packed_reference import BLOCK
from loraspan.store import index, records
from loraspan.store.coded_ends import coded_rows, coded_weights
from loraspan.store.format import DamagedError
from loraspan.store.index import Index, index_problem, shapes_of
from loraspan.store.manifest import DataFile, Manifest, SlotShape
from loraspan.store.mapped import TensorFile
from loraspan.store.sizes import bare_problem

# what a slot may have in the file of a segment, beside whole numbers
_KINDS = (*FIELDS, *(f"{field}_scales" for field in FIELDS[1:]), "coded")
# who says how many rows the tensors of a slot have
_ASKED = "the counts ask for"
# bits of packed rows, by the dtype of their codes
_PACKED = {torch.int8: 8, torch.int16: 16, torch.uint8: 4}


def basis_tensors(collection: Collection) -> list[tuple[str, Tensor]]:
    """Give the tensors of the file of the bases; one without an element is left out."""
    named = coded.basis_tensors({name: (slot.u, slot.v) for name, slot in collection.slots.items()})
    return [(name, tensor) for name, tensor in named if tensor.numel()]


def task_tensors(segment: Segment) -> list[tuple[str, Tensor]]:
    """Give the tensors of the file of a segment whose tasks all live; one without an element is left out."""
    tasks = [task for task in segment.tasks if task is not None]
    assert len(tasks) == len(segment.tasks)
    records.check(tasks, list(segment.columns))
    return file_tensors(segment)


def check_records(segments: Sequence[Segment]) -> None:
    """Refuse tasks of which a file could not keep everything.

    Raises:
        ArgumentError: if there are such.
    """
    for segment in segments:
        tasks, slots = [task for task in segment.tasks if task is not None], list(segment.columns)
        records.check(tasks, slots)
        filed_records(tasks, Origins.of(tasks, slots))


def read_basis(file: TensorFile, manifest: Manifest) -> dict[str, tuple[Rows, Rows]]:
    """Give ``(u, v)`` of every slot, as views.

    Raises:
        FormatError: if the file's tensors are not those of the manifest.
    """
    kinds = (*BASES, *(f"{side}_scales" for side in BASES), "coded")
    file.refuse_strangers({f"{kind}.{slot.name}" for slot in manifest.slots for kind in kinds})
    shapes = {slot.name: {"u": (slot.k_out, slot.n), "v": (slot.k_in, slot.d)} for slot in manifest.slots}
    found = coded_rows(file, shapes, BASES, {})

    def side(name: str, side: str) -> Rows:
        if (known := found.get(name, {}).get(side)) is not None:
            return known
        return _ends(file, side, name, manifest.dtype, shapes[name][side][::-1], "the manifest says", standing=True)

    return {name: (side(name, "u"), side(name, "v")) for name in shapes}


def read_tasks(file: TensorFile, manifest: Manifest, data: DataFile) -> Segment:
    """Give the tasks of a segment, with the names that the manifest says and without those it lacks, and all columns.

    Raises:
        FormatError: if the file's tensors do not fit the manifest or each other.
    """
    count = data.tasks
    extras = _extras(file, count)
    text = file.tensor("records", torch.uint8)
    if text is None or text.ndim != 1:
        raise DamagedError(file.name, "tensor 'records'", "it has to be there, with one dimension")
    table, behind = records.opened(text.numpy().tobytes(), file.name)
    indices = index.read(file, manifest.slots, count, table, behind)
    kinds = _KINDS if SLOTS in table else (*_KINDS, *index.KINDS)
    known = {f"{kind}.{slot}" for slot in indices for kind in kinds} | {"records", WEIGHTS}
    file.refuse_strangers(known | {name for name in file.names() if name.startswith("extra.")})
    codes = {slot: of_slot.codes for slot, of_slot in indices.items()}
    tasks: list[Task | None] = [*records.decode(table, count, codes, extras, file.name)]
    for i, name in data.renamed:
        of = tasks[i]
        tasks[i] = None if of is None else replace(of, name=name)
    for i in data.removed:
        tasks[i] = None
    columns = _columns_of(file, indices, manifest.dtype)
    if (problem := bare_problem(columns, [slot for slot in manifest.slots if slot.name in indices])) is not None:
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
    problem = index_problem(columns.tasks, columns.counts, columns.dense, slot, tasks)
    if problem is not None:
        return problem
    shapes = shapes_of(columns.offsets()[-1], slot)
    for (field, tensor), shape in zip(columns.tensors().items(), shapes, strict=True):
        if tuple(tensor.shape) != shape:
            return field, f"the counts ask for shape {list(shape)}; it is {list(tensor.shape)}"
        wanted = torch.float32 if field == "weights" else dtype
        if isinstance(tensor, Tensor) and tensor.dtype != wanted:
            return field, f"it has to be {wanted}; it is {tensor.dtype}"
    return None


def _columns_of(file: TensorFile, indices: Mapping[str, Index], dtype: torch.dtype) -> dict[str, Columns]:
    beside: dict[str, Beside] = {}
    ends = coded_rows(file, {name: own.shapes for name, own in indices.items()}, CODED_FIELDS, beside)
    weights = coded_weights(file, {name: indices[name].counts for name in ends})
    for name, own in indices.items():
        if name not in weights:
            weights[name] = _float(file, f"weights.{name}", torch.float32, own.shapes["weights"], _ASKED)
        beside[name] = Beside(weights[name], own.rows, own.counts, own.flags)
    return {
        name: _columns(file, name, dtype, own, {"weights": weights[name], **ends.get(name, {})})
        for name, own in indices.items()
    }


def _columns(file: TensorFile, slot: str, dtype: torch.dtype, index: Index, found: dict[str, Rows]) -> Columns:
    shapes = index.shapes
    for name in FIELDS[1:]:
        if name not in found:
            found[name] = _ends(file, name, slot, dtype, (shapes[name][0], shapes[name][1]), _ASKED)
    return Columns.made(index.rows, index.counts, index.flags, found)


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
