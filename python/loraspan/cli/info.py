"""``loraspan info``: what a store holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median

import click

from loraspan import subspace
from loraspan.cli.output import add_row, put, put_json, shown, size, table
from loraspan.subspace import Report


@click.command()
@click.argument("space", metavar="SPACE", type=click.Path(path_type=Path))
@click.option("--tasks", is_flag=True, help="List every task.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, tasks and slots included.")
def info(space: Path, tasks: bool, as_json: bool) -> None:
    """Say what a store holds: tasks, bytes, errors, and what its bases share.

    \b
    Examples:
      loraspan info team.span
      loraspan info team.span --tasks
      loraspan info team.span --json | jq -r '.tasks[].name'
    """
    opened = subspace.open(space)
    report = opened.report()
    if as_json:
        put_json({"store": str(space), "base_model": opened.collection.base_model, **report.as_dict()})
        return
    put(report.summary)
    put("")
    _put_overview(space, opened.collection.base_model, report)
    _put_slots(report)
    if tasks:
        _put_tasks(report)


def _put_overview(space: Path, base_model: str | None, report: Report) -> None:
    errors = [task.error for task in report.tasks]
    share = f"{report.nbytes / report.source_nbytes:.3g} of " if report.source_nbytes else ""
    lines = {
        "store": shown(str(space)),
        "base model": shown(base_model or "not stated by the adapters"),
        "tasks": str(len(report.tasks)),
        "bytes": f"{size(report.nbytes)}, {share}the {size(report.source_nbytes)} of the original factors; all counted",
        "bases": f"{size(report.basis_nbytes)}, {report.dtype}",
    }
    if errors:
        lines["error"] = f"worst {max(errors):.3g}, median {median(errors):.3g}, best {min(errors):.3g}"
        kinds = Counter(task.error_kind for task in report.tasks)
        lines["error"] += " (" + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) + ")"
    for name, text in lines.items():
        put(f"{name + ':':<12}{text}")


def _put_slots(report: Report) -> None:
    slots = table(">slots", "shape", ">out basis", ">in basis", ">tasks", "form")
    groups = Counter((s.shape, s.ranks, s.tasks, s.form) for s in report.slots)
    for (shape, ranks, count, form), number in groups.items():
        add_row(slots, str(number), "x".join(map(str, shape)), str(ranks[0]), str(ranks[1]), str(count), form)
    put(slots)


def _put_tasks(report: Report) -> None:
    tasks = table("task", ">error", "kind", ">columns", ">private", ">bytes", ">before")
    for t in report.tasks:
        numbers = (str(t.columns), str(t.private_columns), f"{t.nbytes:,}", f"{t.factor_nbytes:,}")
        add_row(tasks, t.name, f"{t.error:.3g}", t.error_kind, *numbers)
    put(tasks)
