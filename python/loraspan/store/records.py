"""What a store keeps of each task beside its columns and extras, by column rather than by task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray
from torch import Tensor

from loraspan.adapters.base import Source
from loraspan.adapters.strict_json import parse_object
from loraspan.collection.collection import Task
from loraspan.collection.deflated import inflate
from loraspan.errors import ArgumentError, FormatError
from loraspan.store.format import DamagedError, parse_json, take

# origin codes: 0 for a slot that a task lacks, otherwise 1 + the index of its (scale, rank)
Codes = Mapping[str, NDArray[Any] | None]

_T = TypeVar("_T")
_WHAT = "tensor 'records'"


class PerSlot(Mapping[str, _T], Generic[_T]):
    """One number for each slot of one task, looked up when asked for."""

    def __init__(self, codes: Codes, task: int, values: Sequence[_T]) -> None:
        self._codes, self._task, self._values = codes, task, values

    def _code(self, slot: str) -> int:
        column = self._codes[slot]
        return 1 if column is None else int(column[self._task])

    def __getitem__(self, slot: str) -> _T:
        code = self._code(slot)
        if not code:
            raise KeyError(slot)
        return self._values[code - 1]

    def __iter__(self) -> Iterator[str]:
        return (slot for slot in self._codes if self._code(slot))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def check(tasks: Sequence[Task], slots: Sequence[str]) -> None:
    """Refuse tasks of which a file could not keep everything, whatever their numbers are.

    Raises:
        ArgumentError: if there are such.
    """
    for task in tasks:
        _check(task, slots)
    for text in {_config(task) for task in tasks}:
        _check_nested(text)


def opened(data: bytes, file: str) -> tuple[dict[str, Any], bytes]:
    """Give the table of records, and the bytes behind it.

    Raises:
        FormatError: if the records are not what they have to be.
    """
    try:
        text, behind = inflate(data)
    except FormatError as error:
        raise DamagedError(file, _WHAT, str(error)) from None
    return parse_json(text, file, _WHAT), behind


def decode(
    table: Mapping[str, Any], count: int, codes: Codes, extras: Mapping[int, Mapping[str, Tensor]], file: str
) -> list[Task]:
    """Give the tasks of a segment, in order.

    Args:
        table: that :func:`opened` gave.
        count: tasks that the manifest promises.
        codes: the origin codes of every slot; None where all are 1.
        extras: of each task that has any.
        file: to name in an error.

    Raises:
        FormatError: if the records are not what they have to be.
    """
    names, kinds = _column(table, "names", count, str, file), _column(table, "error_kinds", count, str, file)
    errors, norms = _column(table, "errors", count, float, file), _column(table, "norms", count, float, file)
    forgotten = _column(table, "forgotten", count, float, file)
    sizes = _column(table, "factor_bytes", count, int, file)
    dtypes = _column(table, "factor_dtypes", count, str, file)
    sources = [_source(entry, file) for entry in _column(table, "sources", count, list, file)]
    config_table = take(table, "config_table", list, file, _WHAT)
    configs = [_at(config_table, i, "configs", file) for i in _column(table, "configs", count, int, file)]
    scales, ranks = _origins(table, codes, count, file)
    return [
        Task(
            name=names[i],
            error=errors[i],
            error_kind=kinds[i],
            norm=norms[i],
            scales=PerSlot(codes, i, scales),
            lora_ranks=PerSlot(codes, i, ranks),
            config=configs[i],
            source=sources[i],
            factor_bytes=sizes[i],
            factor_dtype=dtypes[i],
            extras=extras.get(i, {}),
            forgotten=forgotten[i],
        )
        for i in range(count)
    ]


def _check(task: Task, slots: Sequence[str]) -> None:
    if task.scales.keys() != task.lora_ranks.keys():
        raise ArgumentError(f"save: task {task.name!r} has scales and lora_ranks for different slots")
    strangers = task.scales.keys() - set(slots)
    if strangers:
        stranger = next(iter(strangers))
        raise ArgumentError(
            f"save: task {task.name!r} has a scale for {stranger!r}, which is no slot of the collection"
        )


def _config(task: Task) -> str:
    try:
        return json.dumps(dict(task.config), separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"save: the config of task {task.name!r} has to be plain JSON: {error}") from None


def _check_nested(text: str) -> None:
    try:
        parse_object(f'{{"config_table":[{text}]}}'.encode(), "config")
    except FormatError as error:
        raise ArgumentError(f"save: the config of a task could not be read again: {error}") from None


def _column(table: Any, key: str, count: int, kind: type[Any], file: str) -> list[Any]:
    column = take(table, key, list, file, _WHAT)
    if len(column) != count:
        raise DamagedError(file, _WHAT, f"{key!r} has to have {count} entries, one a task; it has {len(column)}")
    for i, value in enumerate(column):
        if type(value) is not kind:
            raise DamagedError(
                file, _WHAT, f"{key!r} of task {i} has to be {kind.__name__}; it is {type(value).__name__}"
            )
    return column


def _source(entry: list[Any], file: str) -> Source:
    optional = (False, False, True, True, True)
    if len(entry) != 5 or not all(type(v) is str or (o and v is None) for v, o in zip(entry, optional, strict=True)):
        raise DamagedError(file, _WHAT, f"a source has to be five strings, the last three or null; it is {entry!r}")
    return Source(*entry)


def _at(table: list[Any], i: int, key: str, file: str) -> Any:
    if not 0 <= i < len(table) or type(table[i]) is not dict:
        raise DamagedError(file, _WHAT, f"{key!r} names entry {i}, which is not there")
    return table[i]


def _origins(table: Any, codes: Codes, count: int, file: str) -> tuple[list[float], list[int]]:
    pairs = take(table, "origin_table", list, file, _WHAT)
    for pair in pairs:
        if type(pair) is not list or [type(value) for value in pair] != [float, int]:
            raise DamagedError(file, _WHAT, f"an origin has to be a scale and a rank; it is {pair!r}")
    for slot, column in codes.items():
        largest = (1 if count else 0) if column is None else int(column.max(initial=0))
        if largest > len(pairs) or (column is not None and column.min(initial=0) < 0):
            raise DamagedError(
                file, f"tensor 'origin.{slot}'", f"it names an origin past the {len(pairs)} that there are"
            )
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]
