"""The tensors of the file of a segment, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan.collection.coded import CODED_KIND, column_tensors
from loraspan.collection.deflated import deflate
from loraspan.collection.headers import narrow
from loraspan.collection.origins import Origins
from loraspan.errors import ArgumentError

if TYPE_CHECKING:
    from loraspan.collection.collection import Segment, Task
    from loraspan.collection.columns import Columns

# The planes of a segment's whole numbers: counts of four forms, origins, and how a task has a slot.
PLANES = 6
ABSENT, PRESENT, DENSE = range(3)
# what the table of records calls the names of their slots
SLOTS = "slots"


def file_tensors(segment: Segment) -> list[tuple[str, Tensor]]:
    """Give the tensors of the file of a segment whose tasks all live; one without an element is left out.

    With tasks that are gone they are more than those of any file. Beside coded ends, the whole numbers of all slots lie
    behind the records of tasks.
    """
    tasks = [task for task in segment.tasks if task is not None]
    origins = Origins.of(tasks, list(segment.columns))
    named = column_tensors(segment.columns)
    behind: tuple[list[str], bytes] | None = None
    if any(name.startswith(CODED_KIND) for name, _ in named):
        behind = planes(segment, origins)
    else:
        named += _index_tensors(segment.columns, origins, len(tasks))
    named = [(name, tensor) for name, tensor in named if tensor.numel()]
    # an extra is kept even without an element: that it was there is part of it
    named += [(f"extra.{i}.{key}", extra) for i, task in enumerate(tasks) for key, extra in task.extras.items()]
    named.append(("records", torch.frombuffer(bytearray(records(tasks, origins, behind)), dtype=torch.uint8)))
    return named


def planes(segment: Segment, origins: Origins) -> tuple[list[str], bytes]:
    """Give the slots that tasks of a segment have, and of these ``[6, slots, tasks]`` whole numbers as bytes."""
    columns, alive = segment.columns, [i for i, task in enumerate(segment.tasks) if task is not None]
    slots = [slot for slot, of_slot in columns.items() if len(of_slot.tasks)]
    largest = max((int(of_slot.counts.max(initial=0)) for of_slot in columns.values()), default=0)
    dtype = narrow(max(largest, len(origins.table), DENSE))
    cells = torch.zeros(PLANES, len(slots), len(segment.tasks), dtype=dtype).numpy()
    cells[4] = 1
    for j, slot in enumerate(slots):
        of_slot = columns[slot]
        cells[:4, j, of_slot.tasks] = of_slot.counts.T
        if slot in origins.codes:
            cells[4, j, alive] = origins.codes[slot]
        cells[5, j, of_slot.tasks] = np.where(of_slot.dense, DENSE, PRESENT)
    return slots, cells.tobytes()


def planes_in(data: bytes, slots: int, tasks: int) -> NDArray[np.integer] | None:
    """Give the numbers of :func:`planes`, or None if there are not so many of any width."""
    cells = PLANES * slots * tasks
    widths = {cells * width: f"<{kind}{width}" for kind, width in (("i", 8), ("i", 4), ("i", 2), ("u", 1))}
    if not cells or len(data) not in widths:
        return None
    return np.frombuffer(data, dtype=widths[len(data)]).reshape(PLANES, slots, tasks)


def _index_tensors(columns: Mapping[str, Columns], origins: Origins, tasks: int) -> list[tuple[str, Tensor]]:
    named = []
    for slot, of_slot in columns.items():
        named.append((f"counts.{slot}", _integers(of_slot.counts)))
        if 0 < len(of_slot.tasks) < tasks:
            named.append((f"rows.{slot}", _integers(of_slot.tasks)))
        if of_slot.dense.any():
            named.append((f"dense.{slot}", torch.from_numpy(np.ascontiguousarray(of_slot.dense))))
    largest = max((int(codes.max(initial=0)) for codes in origins.codes.values()), default=0)
    return named + [(f"origin.{slot}", _integers(codes, largest)) for slot, codes in origins.codes.items()]


def _integers(values: NDArray[np.int64], largest: int | None = None) -> Tensor:
    top = int(values.max(initial=0)) if largest is None else largest
    return torch.from_numpy(np.ascontiguousarray(values)).to(narrow(top))


def records(tasks: Sequence[Task], origins: Origins, behind: tuple[list[str], bytes] | None = None) -> bytes:
    """Give what a file has of tasks beside columns and extras, with the slots and bytes of :func:`planes`, if any.

    Raises:
        ArgumentError: if a number is not finite.
    """
    configs: dict[str, int] = {}
    places = [configs.setdefault(_dumps(_plain(task.config)), len(configs)) for task in tasks]
    table = {
        "names": [task.name for task in tasks],
        "errors": [float(task.error) for task in tasks],
        "error_kinds": [task.error_kind for task in tasks],
        "norms": [float(task.norm) for task in tasks],
        "forgotten": [float(task.forgotten) for task in tasks],
        "factor_bytes": [int(task.factor_bytes) for task in tasks],
        "factor_dtypes": [task.factor_dtype for task in tasks],
        # as dataclasses.astuple gives them, which copies what lies in them one by one
        "sources": [tuple(vars(task.source).values()) for task in tasks],
        "configs": places,
    }
    try:
        text = f'{_dumps(table)[:-1]},"config_table":[{",".join(configs)}],"origin_table":{_dumps(origins.table)}'
    except ValueError as error:
        raise ArgumentError(f"save: errors, norms and scales have to be finite numbers: {error}") from None
    if behind is None:
        return deflate(f"{text}}}".encode())
    slots, numbers = behind
    return deflate(f'{text},"{SLOTS}":{_dumps(slots)}}}'.encode(), numbers)


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value


def _dumps(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False, default=str)
