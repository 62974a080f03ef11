"""``loraspan rollback``: back to an older generation of a store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from loraspan import store
from loraspan.cli.log import told
from loraspan.cli.output import one_line, put, put_json, shown


@click.command()
@click.argument("space", metavar="SPACE", type=click.Path(path_type=Path))
@click.argument("generation", metavar="GENERATION", type=click.IntRange(min=1))
@click.option("--note", default="", help="Why, for `loraspan log`.")
@click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def rollback(space: Path, generation: int, note: str, dry_run: bool, as_json: bool) -> None:
    """Make a store what it was at GENERATION.

    This writes a new generation with the old content: nothing is lost, and the way back is another rollback.

    \b
    Examples:
      loraspan log team.span
      loraspan rollback team.span 7 --dry-run
      loraspan rollback team.span 7
    """
    made = store.rollback(space, generation, note=note, dry_run=dry_run)
    if as_json:
        put_json({"store": str(space), "dry_run": dry_run, "from": generation, **asdict(made)})
        return
    verb = "would be" if dry_run else "is"
    change = told(made.change)
    put(
        f"{shown(str(space))}: generation {made.generation} {verb} what {generation} was: {made.tasks} tasks"
        + (f"; {one_line(change)}" if change else "")
    )
