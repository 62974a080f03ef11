"""Say in a sentence how much a collection shares, and in a table what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from loraspan.collection.coded import coded_bytes
from loraspan.collection.collection import Collection, Segment, SlotSpace
from loraspan.collection.columns import Columns
from loraspan.collection.layout import collection_bytes, columns_bytes, manifest_bytes
from loraspan.collection.plans import PlanLine
from loraspan.collection.rows import Widths

# From which share of the energy held by the bases on adapters count as sharing most, or part, of their directions.
_MOST, _PART = 0.9, 0.5


@dataclass(frozen=True)
class TaskLine:
    """One task of a :class:`Report`. ``nbytes`` counts its columns, ``factor_nbytes`` its original factors.

    Where private columns are coded it counts their part of the file, by their numbers' share of all that lie together.
    """

    name: str
    error: float
    error_kind: str
    columns: int
    private_columns: int
    nbytes: int
    factor_nbytes: int


@dataclass(frozen=True)
class SlotLine:
    """One slot of a :class:`Report`: shape ``(n, d)``, widths of its bases, number of tasks, and its form."""

    path: str
    shape: tuple[int, int]
    ranks: tuple[int, int]
    tasks: int
    form: str


@dataclass(frozen=True)
class Report:
    """What a collection holds; ``str(report)`` is a table, ``report.as_dict()`` plain values."""

    summary: str
    nbytes: int
    source_nbytes: int
    basis_nbytes: int
    dtype: str
    tasks: tuple[TaskLine, ...]
    slots: tuple[SlotLine, ...]
    plans: tuple[PlanLine, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Give plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            self.summary,
            "",
            f"{'task':<32} {'error':>10} {'kind':>9} {'columns':>8} {'bytes':>12} {'before':>12}",
        ]
        for t in self.tasks:
            size = f"{t.nbytes:>12,} {t.factor_nbytes:>12,}"
            lines.append(f"{t.name[:32]:<32} {t.error:>10.3g} {t.error_kind:>9} {t.columns:>8} {size}")
        lines += ["", f"{'slot':<48} {'shape':>13} {'ranks':>9} {'tasks':>6}  form"]
        for s in self.slots:
            shape, ranks = "x".join(map(str, s.shape)), "/".join(map(str, s.ranks))
            lines.append(f"{s.path[-48:]:<48} {shape:>13} {ranks:>9} {s.tasks:>6}  {s.form}")
        if self.plans:
            lines += ["", f"{'plan':<48} {'form':<20} {'budget':>8} {'bytes':>14}"]
        for p in self.plans:
            nbytes = "rounding too coarse" if p.nbytes is None else f"{p.nbytes:,}"
            chosen = "  chosen" if p.chosen else ""
            lines.append(f"{p.widths:<48} {p.forms:<20} {p.max_error:>8.3g} {nbytes:>14}{chosen}")
        return "\n".join(lines)


def make_report(collection: Collection, nbytes: int) -> Report:
    """Give the report of a collection that takes ``nbytes`` on disk."""
    tasks = tuple(line for segment in collection.segments for line in _task_lines(segment, collection))
    slots = tuple(
        SlotLine(path, s.shape, s.ranks, _tasks_of(collection, path), form_of(s))
        for path, s in collection.slots.items()
    )
    source = sum(task.factor_bytes for task in collection.tasks)
    basis = sum(s.u.nbytes + s.v.nbytes for s in collection.slots.values())
    return Report(collection.summary, nbytes, source, basis, str(collection.widths), tasks, slots)


def _task_lines(segment: Segment, collection: Collection) -> list[TaskLine]:
    columns, private, size = (np.zeros(len(segment.tasks), dtype=np.int64) for _ in range(3))
    for path, table in segment.columns.items():
        columns[table.tasks] += table.counts.sum(axis=1)
        private[table.tasks] += table.counts[:, 1:].sum(axis=1)
        size[table.tasks] += task_bytes(collection.slots[path], table, collection.widths) - coded_bytes(table)
    return [
        TaskLine(t.name, t.error, t.error_kind, int(columns[i]), int(private[i]), int(size[i]), t.factor_bytes)
        for i, t in enumerate(segment.tasks)
        if t is not None
    ]


def _tasks_of(collection: Collection, path: str) -> int:
    """Count the tasks that have a slot."""
    return sum(
        sum(segment.tasks[task] is not None for task in columns.tasks)
        for segment, columns in collection.columns_of(path)
    )


def task_bytes(space: SlotSpace, table: Columns, widths: Widths) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Give the bytes of the columns of every task that a segment has in a slot, ``[T]``."""
    (n, d), (k_out, k_in) = space.shape, space.ranks
    return columns_bytes(table.counts, n=n, d=d, k_out=k_out, k_in=k_in, dtype=widths, dense=table.dense)


def form_of(space: SlotSpace) -> str:
    """Say which ends of a slot are shared."""
    return {
        (True, True): "both sides shared",
        (False, True): "input side shared",
        (True, False): "output side shared",
        (False, False): "every task on its own",
    }[space.ranks[0] > 0, space.ranks[1] > 0]


def summarize(collection: Collection, nbytes: int) -> str:
    """Say how much the tasks share, which form was chosen, and what it costs and loses."""
    if not collection.tasks:
        return f"There is no task; bases and records take {nbytes:,} bytes."
    errors = [task.error for task in collection.tasks]
    source = sum(task.factor_bytes for task in collection.tasks)
    held = 1 - float(np.mean(np.square(errors)))
    forms = Counter(form_of(space) for space in collection.slots.values())
    private = sum(int(c.counts[:, 1:].sum()) for segment in collection.segments for c in segment.columns.values())
    return (
        f"{_sharing(collection, held, private, forms)} {_plural(len(errors), 'task')} in {nbytes:,} bytes, "
        f"{nbytes / max(source, 1):.3g} of the {source:,} of the original factors; "
        f"worst error on dW {max(errors):.3g}, mean {float(np.mean(errors)):.3g}."
    )


def summarized(collection: Collection) -> tuple[Collection, int]:
    """Give it with a summary of its own, which counts its own bytes too, and the bytes that it takes then."""
    nbytes = collection_bytes(collection)
    # a manifest has it, and nothing else takes longer for it
    rest = nbytes - manifest_bytes(collection)
    told = replace(collection, summary=summarize(collection, nbytes))
    told = replace(told, summary=summarize(told, rest + manifest_bytes(told)))
    return told, rest + manifest_bytes(told)


def _sharing(collection: Collection, held: float, private: int, forms: Mapping[str, int]) -> str:
    slots = len(collection.slots)
    if forms.get("every task on its own", 0) == slots:
        return "Sharing does not pay here: every task is stored on its own, as its own truncated SVD."
    widths = [max(s.ranks) for s in collection.slots.values()]
    width = str(max(widths)) if min(widths) == max(widths) else f"{min(widths)} to {max(widths)}"
    if not private:
        how = "most" if held >= _MOST else "part" if held >= _PART else "little"
        return f"The tasks share {how} of their directions: bases of width {width} hold {held:.1%} of their energy."
    chosen = ", ".join(f"{form} in {count} of {_plural(slots, 'slot')}" for form, count in sorted(forms.items()))
    return f"The tasks share part of their directions ({chosen}; bases of width {width}), and the rest is private."


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
