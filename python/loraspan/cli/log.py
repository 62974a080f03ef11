"""``loraspan log``: the generations of a store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from loraspan import store
from loraspan.cli.output import add_row, put, put_json, size, table
from loraspan.store import Change, Entry

# so many names of a change are shown
_NAMES = 3


@click.command()
@click.argument("space", metavar="SPACE", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, with all names.")
def log(space: Path, as_json: bool) -> None:
    """List the generations of a store, the newest first: what made each, and what came and went.

    \b
    Examples:
      loraspan log team.span
      loraspan log team.span --json | jq '.generations[] | select(.problem)'
    """
    entries = store.log(space)
    if as_json:
        put_json({"store": str(space), "generations": [asdict(entry) for entry in entries]})
        return
    rows = table(">generation", "time", ">tasks", ">bytes", "note", "change")
    for entry in entries:
        add_row(rows, *_cells(entry), style="bold" if entry.current else None)
    put(rows)


def _cells(entry: Entry) -> list[str]:
    number = f"* {entry.generation}" if entry.current else str(entry.generation)
    if entry.tasks is None:
        return [number, "", "", "", "", f"cannot be opened: {entry.problem}"]
    what = told(entry.change) if entry.problem is None else f"cannot be opened: {entry.problem}"
    return [number, entry.time or "", str(entry.tasks), size(entry.nbytes or 0), entry.note, what]


def told(change: Change | None) -> str:
    """Say in a line which tasks came, went and changed their names."""
    if change is None:
        return ""
    parts = [_some("+", change.added), _some("-", change.removed)]
    parts.append(_some("", tuple(f"{old} -> {new}" for old, new in change.renamed)))
    return "; ".join(part for part in parts if part)


def _some(sign: str, names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(f"{sign}{name}" for name in names[:_NAMES]) + more
