"""``loraspan remove``: tasks leave a store."""

from __future__ import annotations

from pathlib import Path

import click

from loraspan import subspace
from loraspan.cli.changes import check_known, dry_run_option, json_option, put_change, space_argument


@click.command()
@space_argument
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True)
@dry_run_option
@json_option
def remove(space: Path, tasks: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Remove tasks from a store; its bases and all other tasks stay as they are.

    Older generations keep them, and so do their bytes on disk, until `loraspan gc`.

    \b
    Examples:
      loraspan remove team.span sql
      loraspan remove team.span sql legal --dry-run
    """
    opened = subspace.open(space)
    check_known(space, tasks, opened.tasks)
    put_change(space, opened, opened.remove(*tasks, dry_run=dry_run), as_json)
