"""``loraspan add``: more tasks, on the bases that are there."""

from __future__ import annotations

from pathlib import Path

import click

from loraspan import subspace
from loraspan.cli.changes import (
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
def add(space: Path, sources: tuple[str, ...], max_error: float, dry_run: bool, as_json: bool) -> None:
    """Add adapters to a store; its bases and all other tasks stay as they are.

    What the bases carry of an adapter becomes a few coefficients, the rest private columns of its task. Only the new
    tasks and a manifest are written, as one generation. SRC is as for `loraspan compress`.

    \b
    Examples:
      loraspan add team.span new/sql
      loraspan add team.span 'new/*' --max-error 0.01
      loraspan add team.span new/sql --dry-run
    """
    opened = subspace.open(space)
    with bars() as progress:
        change = opened.add(list(sources), max_error=max_error, progress=progress, dry_run=dry_run)
    put_change(space, opened, change, as_json)
