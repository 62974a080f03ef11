"""``loraspan replace``: other adapters for tasks of the same names."""

from __future__ import annotations

from pathlib import Path

import click

from loraspan import subspace
from loraspan.adapters import read_all
from loraspan.cli.changes import (
    check_known,
    dry_run_option,
    json_option,
    max_error_option,
    put_change,
    sources_argument,
    space_argument,
)
from loraspan.cli.output import bars


@click.command()
@space_argument
@sources_argument
@max_error_option
@dry_run_option
@json_option
def replace(space: Path, sources: tuple[str, ...], max_error: float, dry_run: bool, as_json: bool) -> None:
    """Put adapters in the place of the tasks of their names, in one step; they move to the end.

    \b
    Examples:
      loraspan replace team.span retrained/sql
      loraspan replace team.span 'retrained/*' --max-error 0.01 --dry-run
    """
    opened = subspace.open(space)
    adapters = read_all(list(sources))
    check_known(space, [adapter.name for adapter in adapters], opened.tasks)
    with bars() as progress:
        change = opened.replace(adapters, max_error=max_error, progress=progress, dry_run=dry_run)
    put_change(space, opened, change, as_json)
