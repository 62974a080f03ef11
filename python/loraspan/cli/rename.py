"""``loraspan rename``: another name for a task."""

from __future__ import annotations

from pathlib import Path

import click

from loraspan import subspace
from loraspan.cli.changes import check_known, dry_run_option, json_option, put_change, space_argument


@click.command()
@space_argument
@click.argument("old", metavar="OLD")
@click.argument("new", metavar="NEW")
@dry_run_option
@json_option
def rename(space: Path, old: str, new: str, dry_run: bool, as_json: bool) -> None:
    """Give task OLD of a store the name NEW.

    \b
    Examples:
      loraspan rename team.span sql sql-2024
      loraspan rename team.span sql sql-2024 --dry-run
    """
    opened = subspace.open(space)
    check_known(space, [old], opened.tasks)
    put_change(space, opened, opened.rename(old, new, dry_run=dry_run), as_json)
