"""The manifest of a generation: which slots it has and which files it consists of."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from loraspan.adapters.base import KINDS
from loraspan.collection.headers import DTYPE_NAMES
from loraspan.collection.rows import CODED
from loraspan.errors import UnsupportedError
from loraspan.store.format import BASIS, DATA_FILE, SCHEMA, TASKS, DamagedError, data_name, parse_json, take, take_size
from loraspan.store.sizes import slot_problem

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# the last key of a manifest: the sha256 of all bytes before this
_SEAL = b',\n  "checksum": '
_LONGEST_CHANGE = 10_000
_NUMBER = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)
_BY_NAME = {DTYPE_NAMES[dtype]: dtype for dtype in FLOATS}


@dataclass(frozen=True)
class SlotShape:
    """What the manifest says of a slot; the letters are those of :class:`loraspan.collection.collection.SlotSpace`."""

    name: str
    n: int
    d: int
    k_out: int
    k_in: int
    kind: str
    kernel: tuple[int, int, int] | None


# what most slots are, and their tables leave out
_USUAL: Mapping[str, object] = {"k_out": 0, "k_in": 0, "kind": "linear", "kernel": None}


@dataclass(frozen=True)
class DataFile:
    """A file of tensors that a generation consists of.

    Attributes:
        file: its name.
        sha256: of its bytes.
        size: their number.
        tasks: that are in it; 0 for the bases.
        removed: those of them that this generation no longer has, ascending.
        renamed: those that have another name in this generation, ascending, and that name.
    """

    file: str
    sha256: str
    size: int
    tasks: int = 0
    removed: tuple[int, ...] = ()
    renamed: tuple[tuple[int, str], ...] = ()

    @property
    def living(self) -> int:
        """The number of tasks that were not removed."""
        return self.tasks - len(self.removed)


@dataclass(frozen=True)
class Change:
    """The names of tasks that a generation has and its parent has not, and the other way round."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    def unless_long(self) -> Change | None:
        """Give this, or None where a manifest would grow by more than 10,000 characters."""
        names = [*self.added, *self.removed, *(name for pair in self.renamed for name in pair)]
        return self if sum(map(len, names)) + 6 * len(names) <= _LONGEST_CHANGE else None


@dataclass(frozen=True)
class Manifest:
    """A generation; see ``docs/store.md``. ``change`` is None where it was not kept, or is too long to keep."""

    generation: int
    parent: int | None
    dtype: torch.dtype
    base_model: str | None
    summary: str
    slots: tuple[SlotShape, ...]
    basis: DataFile
    segments: tuple[DataFile, ...]
    time: str | None = None
    note: str = ""
    change: Change | None = None
    fitted: int = 0
    bits: tuple[int, int, int] = (0, 0, 0)

    @property
    def tasks(self) -> int:
        """The number of tasks in all segments."""
        return sum(segment.living for segment in self.segments)

    @property
    def files(self) -> tuple[DataFile, ...]:
        """The bases and the segments."""
        return (self.basis, *self.segments)


def dump(manifest: Manifest) -> bytes:
    """Write a manifest as JSON, one slot or file a line."""
    head = {
        "format": "loraspan",
        "schema": SCHEMA,
        "writer": f"loraspan {_version()}",
        "generation": manifest.generation,
        "parent": manifest.parent,
        "time": manifest.time,
        "note": manifest.note,
        **_change_table(manifest.change),
        "dtype": DTYPE_NAMES[manifest.dtype],
        "base_model": manifest.base_model,
        "summary": manifest.summary,
        "bits": list(manifest.bits),
        "fitted": manifest.fitted,
        "basis": _file_table(manifest.basis),
    }
    lines = [f'  "{key}": {_dumps(value)}' for key, value in head.items()]
    lines.append(_lines("segments", [_segment_table(data) for data in manifest.segments]))
    lines.append(_lines("slots", [_slot_table(slot) for slot in manifest.slots]))
    body = ("{\n" + ",\n".join(lines)).encode()
    return body + _SEAL + f'"{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def parse(data: bytes, file: str) -> Manifest:
    """Read a manifest, believing nothing.

    Raises:
        FormatError: if it is not a manifest of this format.
        UnsupportedError: if a newer version wrote it.
    """
    table = parse_json(data, file, "manifest")
    if take(table, "format", str, file, "manifest") != "loraspan":
        raise DamagedError(file, "manifest", f"'format' has to be 'loraspan'; it is {table['format']!r}")
    schema = take(table, "schema", int, file, "manifest")
    if schema > SCHEMA:
        raise UnsupportedError(
            f"{file}: store schema {schema}, written by {table.get('writer')!r}; "
            f"this is loraspan {_version()}, which reads schemas up to {SCHEMA}: upgrade loraspan"
        )
    if schema < 1:
        raise DamagedError(file, "manifest", f"'schema' has to be from 1 to {SCHEMA}; it is {schema}")
    if hashlib.sha256(data.rpartition(_SEAL)[0]).hexdigest() != take(table, "checksum", str, file, "manifest"):
        raise DamagedError(file, "checksum", "it is not that of the manifest, which has been changed or damaged")
    name = take(table, "dtype", str, file, "manifest")
    if name not in _BY_NAME:
        raise DamagedError(file, "manifest", f"'dtype' has to be one of {', '.join(_BY_NAME)}; it is {name!r}")
    slots = tuple(_slot(entry, i, file) for i, entry in enumerate(take(table, "slots", list, file, "manifest")))
    if len({slot.name for slot in slots}) != len(slots):
        raise DamagedError(file, "slots", "two slots have one name")
    segments = take(table, "segments", list, file, "manifest")
    return Manifest(
        generation=take_size(table, "generation", file, "manifest"),
        parent=None if table.get("parent") is None else take_size(table, "parent", file, "manifest"),
        dtype=_BY_NAME[name],
        base_model=None if table.get("base_model") is None else take(table, "base_model", str, file, "manifest"),
        summary=take(table, "summary", str, file, "manifest"),
        slots=slots,
        basis=_data_file(take(table, "basis", dict, file, "manifest"), BASIS, "basis", file),
        segments=tuple(_data_file(entry, TASKS, f"segment {i}", file) for i, entry in enumerate(segments)),
        time=None if table.get("time") is None else take(table, "time", str, file, "manifest"),
        note=take(table, "note", str, file, "manifest") if "note" in table else "",
        change=_change(table["change"], file) if "change" in table else None,
        bits=_bits(table, file),
        fitted=take_size(table, "fitted", file, "manifest", largest=2**62) if "fitted" in table else 0,
    )


def _slot(entry: Any, i: int, file: str) -> SlotShape:
    name = take(entry, "name", str, file, f"slot {i}")
    what = f"slot {name!r}"
    entry = {**_USUAL, **entry}
    kind = take(entry, "kind", str, file, what)
    if kind not in KINDS:
        raise DamagedError(file, what, f"'kind' has to be one of {', '.join(KINDS)}; it is {kind!r}")
    kernel = entry.get("kernel")
    if kernel is not None and not (
        type(kernel) is list and len(kernel) == 3 and all(type(axis) is int and axis >= 0 for axis in kernel)
    ):
        raise DamagedError(file, what, f"'kernel' has to be null or three sizes; it is {kernel!r}")
    n, d, k_out, k_in = (take_size(entry, key, file, what) for key in ("n", "d", "k_out", "k_in"))
    shape = SlotShape(name, n, d, k_out, k_in, kind, None if kernel is None else tuple(kernel))
    if (problem := slot_problem(shape)) is not None:
        raise DamagedError(file, what, problem)
    return shape


def _data_file(entry: Any, kind: str, what: str, file: str) -> DataFile:
    sha256 = take(entry, "sha256", str, file, what)
    name = data_name(kind, sha256)
    # what passes the pattern cannot be a path; up to schema 2 it was told beside its checksum
    if not DATA_FILE.fullmatch(name) or entry.get("file", name) != name:
        said = entry.get("file", sha256[:64])
        raise DamagedError(file, what, f"'sha256' has to be 64 digits, and 'file' as they say, if any; got {said!r}")
    size = take_size(entry, "bytes", file, what, largest=2**62)
    if kind == BASIS:
        return DataFile(name, sha256, size)
    tasks = take_size(entry, "tasks", file, what)
    removed = _removed(entry, tasks, what, file)
    return DataFile(name, sha256, size, tasks, removed, _renamed(entry, tasks, set(removed), what, file))


def _removed(entry: Any, tasks: int, what: str, file: str) -> tuple[int, ...]:
    numbers = take(entry, "removed", list, file, what) if "removed" in entry else []
    before = -1
    for number in numbers:
        if type(number) is not int or not before < number < tasks:
            problem = f"'removed' has to ascend from 0 to below the {tasks} tasks; {str(number)[:40]} follows {before}"
            raise DamagedError(file, what, problem)
        before = number
    return tuple(numbers)


def _renamed(entry: Any, tasks: int, removed: set[int], what: str, file: str) -> tuple[tuple[int, str], ...]:
    names = take(entry, "renamed", dict, file, what) if "renamed" in entry else {}
    pairs = []
    for key, name in names.items():
        if not _NUMBER.fullmatch(key) or int(key) >= tasks or int(key) in removed or type(name) is not str:
            what_for = f"'renamed' has to give names to some of the {tasks} tasks that were not removed"
            raise DamagedError(file, what, f"{what_for}, not to {key[:40]!r}")
        pairs.append((int(key), name))
    return tuple(sorted(pairs))


def _change(table: Any, file: str) -> Change:
    added, removed = (take(table, key, list, file, "change") for key in ("added", "removed"))
    renamed = take(table, "renamed", list, file, "change")
    pairs = [tuple(pair) for pair in renamed if type(pair) is list and len(pair) == 2]
    if len(pairs) < len(renamed) or not all(type(name) is str for names in (added, removed, *pairs) for name in names):
        raise DamagedError(file, "change", "it has to hold names of tasks, and pairs of them under 'renamed'")
    return Change(tuple(added), tuple(removed), tuple(pairs))


def _bits(table: Any, file: str) -> tuple[int, int, int]:
    bits = take(table, "bits", list, file, "manifest") if "bits" in table else [0, 0, 0]
    if len(bits) != 3 or any(type(b) is not int or b not in (0, CODED, 4, 8) for b in bits):
        raise DamagedError(
            file, "manifest", f"'bits' has to be three of 0, 4 and 8, or {CODED} if coded; it is {bits!r}"
        )
    return bits[0], bits[1], bits[2]


def _file_table(data: DataFile) -> dict[str, object]:
    return {"sha256": data.sha256, "bytes": data.size}


def _segment_table(data: DataFile) -> dict[str, object]:
    table = {**_file_table(data), "tasks": data.tasks}
    if data.removed:
        table["removed"] = list(data.removed)
    if data.renamed:
        table["renamed"] = {str(number): name for number, name in data.renamed}
    return table


def _change_table(change: Change | None) -> dict[str, object]:
    return {} if change is None else {"change": asdict(change)}


def _slot_table(slot: SlotShape) -> dict[str, object]:
    table = asdict(slot)
    return {key: value for key, value in table.items() if key not in _USUAL or value != _USUAL[key]}


def _lines(key: str, tables: list[Mapping[str, object]] | list[dict[str, object]]) -> str:
    body = ",\n    ".join(map(_dumps, tables))
    return f'  "{key}": [\n    {body}\n  ]' if body else f'  "{key}": []'


def _dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


@functools.cache
def _version() -> str:
    try:
        return version("loraspan")
    except PackageNotFoundError:
        return "unknown"
