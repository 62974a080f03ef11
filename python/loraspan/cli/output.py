"""How every command speaks: data on stdout, remarks and bars on stderr, names as data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

Report = Callable[[str, int, int], None]

# wide enough for every table where there is no terminal whose width could limit it
_WIDTH = 240
# seconds of work before a bar appears
_PATIENCE = 1.0
_STAGES = {
    "read": "reading adapters",
    "fit": "fitting slots",
    "add": "expressing slots",
    "project": "projecting adapters",
    "summarize": "finding what is shared",
    "express": "storing tasks",
    "export": "writing adapters",
}
# stages that count bytes; groups of adapters may take minutes each, so their speed is that since the beginning
_IN_BYTES = {"summarize", "express"}
_SPEED_SECONDS = 24 * 3600.0


def shown(name: str) -> str:
    """Give a name with what a terminal would obey spelled out: names are data."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def one_line(message: str) -> str:
    """Give a message on one line that a terminal can show."""
    return shown(" ".join(message.split()))


def size(count: int) -> str:
    """Give a number of bytes as a person reads it, in powers of ten.

    Example:
        >>> size(999), size(1_234_567)
        ('999 B', '1.23 MB')
    """
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"


def put(table: Table | str) -> None:
    """Write a table or a line to stdout."""
    if isinstance(table, str):
        click.echo(table)
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    console.print(table)


def put_json(document: object) -> None:
    """Write the one JSON document of ``--json``; a float that is not finite would not be JSON."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def remark(text: str) -> None:
    """Say something beside the data, on stderr."""
    click.echo(text, err=True)


def table(*columns: str, title: str | None = None) -> Table:
    """Give an empty table; a column named ``>bytes`` is aligned to the right."""
    heading = None if title is None else Text(title, style="bold")
    made = Table(box=box.SIMPLE_HEAD, title=heading, title_justify="left", pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        made.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return made


def add_row(to: Table, *cells: str, style: str | None = None) -> None:
    """Add a row whose cells are plain text, never markup."""
    to.add_row(*(Text(shown(cell)) for cell in cells), style=style)


class _Done(ProgressColumn):
    """How much is done of how much, in what the stage counts."""

    def render(self, task: Task) -> Text:
        done, total = int(task.completed), int(task.total or 0)
        return Text(f"{size(done)} of {size(total)}" if task.fields["in_bytes"] else f"{done}/{total}")


@contextmanager
def bars() -> Iterator[Report]:
    """Give a function that takes a stage, how much of it is done and how much there is, and draws that on stderr.

    Nothing is drawn in the first second, nor where stderr is no terminal.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), _Done(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, speed_estimate_period=_SPEED_SECONDS)
    stages: dict[str, TaskID] = {}
    start = time.monotonic()

    def report(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            # what was done before, in a run that goes on, is no part of the speed
            in_bytes = stage in _IN_BYTES
            stages[stage] = progress.add_task(_STAGES.get(stage, stage), total=total, completed=done, in_bytes=in_bytes)
        progress.update(stages[stage], completed=done, total=total)
        if console.is_terminal and not progress.live.is_started and time.monotonic() - start > _PATIENCE:
            progress.start()

    try:
        yield report
    finally:
        # stopping what never started would write an empty line
        if progress.live.is_started:
            progress.stop()
