"""The manifest of a generation: which slots it has and which files it consists of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from loraspan.adapters.base import KINDS
from loraspan.collection.layout import DTYPE_NAMES
from loraspan.errors import UnsupportedError
from loraspan.store.format import BASIS, DATA_FILE, SCHEMA, TASKS, DamagedError, data_name, parse_json, take, take_size

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# the last key of a manifest: the sha256 of all bytes before this
_SEAL = b',\n  "checksum": '
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


@dataclass(frozen=True)
class DataFile:
    """A file of tensors that a generation consists of; ``tasks`` is 0 for the bases."""

    file: str
    sha256: str
    size: int
    tasks: int = 0


@dataclass(frozen=True)
class Manifest:
    """A generation; see ``docs/store.md``."""

    generation: int
    parent: int | None
    dtype: torch.dtype
    base_model: str | None
    summary: str
    slots: tuple[SlotShape, ...]
    basis: DataFile
    segments: tuple[DataFile, ...]

    @property
    def tasks(self) -> int:
        """The number of tasks in all segments."""
        return sum(segment.tasks for segment in self.segments)

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
        "dtype": DTYPE_NAMES[manifest.dtype],
        "base_model": manifest.base_model,
        "summary": manifest.summary,
        "basis": _file_table(manifest.basis),
    }
    lines = [f'  "{key}": {json.dumps(value)}' for key, value in head.items()]
    lines.append(_lines("segments", [{**_file_table(s), "tasks": s.tasks} for s in manifest.segments]))
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
            f"this is loraspan {_version()}, which reads schema {SCHEMA}: upgrade loraspan"
        )
    if schema != SCHEMA:
        raise DamagedError(file, "manifest", f"'schema' has to be {SCHEMA}; it is {schema}")
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
    )


def _slot(entry: Any, i: int, file: str) -> SlotShape:
    name = take(entry, "name", str, file, f"slot {i}")
    what = f"slot {name!r}"
    kind = take(entry, "kind", str, file, what)
    if kind not in KINDS:
        raise DamagedError(file, what, f"'kind' has to be one of {', '.join(KINDS)}; it is {kind!r}")
    kernel = entry.get("kernel")
    if kernel is not None and not (
        type(kernel) is list and len(kernel) == 3 and all(type(axis) is int and axis >= 0 for axis in kernel)
    ):
        raise DamagedError(file, what, f"'kernel' has to be null or three sizes; it is {kernel!r}")
    n, d, k_out, k_in = (take_size(entry, key, file, what) for key in ("n", "d", "k_out", "k_in"))
    return SlotShape(name, n, d, k_out, k_in, kind, None if kernel is None else tuple(kernel))


def _data_file(entry: Any, kind: str, what: str, file: str) -> DataFile:
    name = take(entry, "file", str, file, what)
    sha256 = take(entry, "sha256", str, file, what)
    # the pattern first: a name that passes it cannot be a path
    if not DATA_FILE.fullmatch(name) or name != data_name(kind, sha256):
        raise DamagedError(file, what, f"'file' has to be {data_name(kind, sha256[:64])!r}; it is {name!r}")
    tasks = take_size(entry, "tasks", file, what) if kind == TASKS else 0
    return DataFile(name, sha256, take_size(entry, "bytes", file, what, largest=2**62), tasks)


def _file_table(data: DataFile) -> dict[str, object]:
    return {"file": data.file, "sha256": data.sha256, "bytes": data.size}


def _slot_table(slot: SlotShape) -> dict[str, object]:
    table: dict[str, object] = {key: getattr(slot, key) for key in ("name", "n", "d", "k_out", "k_in", "kind")}
    return table if slot.kernel is None else {**table, "kernel": list(slot.kernel)}


def _lines(key: str, tables: list[Mapping[str, object]] | list[dict[str, object]]) -> str:
    body = ",\n    ".join(json.dumps(table) for table in tables)
    return f'  "{key}": [\n    {body}\n  ]' if body else f'  "{key}": []'


def _version() -> str:
    try:
        return version("loraspan")
    except PackageNotFoundError:
        return "unknown"
