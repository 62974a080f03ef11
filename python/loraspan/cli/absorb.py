"""``loraspan absorb``: more tasks, and new bases when those pay."""

from __future__ import annotations

from pathlib import Path

import click

from loraspan import subspace
from loraspan.cli.changes import (
    dry_run_option,
    json_option,
    max_bytes_option,
    max_error_option,
    put_change,
    sources_argument,
    space_argument,
)
from loraspan.cli.output import bars

DEFAULT_MAX_FORGETTING = 0.05


@click.command()
@space_argument
@sources_argument
@max_error_option
@click.option(
    "--max-forgetting",
    type=float,
    metavar="X",
    default=DEFAULT_MAX_FORGETTING,
    show_default=True,
    help="What any task may lose in all refits of its life.",
)
@max_bytes_option
@dry_run_option
@json_option
def absorb(
    space: Path,
    sources: tuple[str, ...],
    max_error: float,
    max_forgetting: float,
    max_bytes: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Add adapters to a store, and fit new bases when that pays or --max-bytes demands it.

    New bases are tried once the store has grown by half since the last ones, and taken where they save a tenth of its
    bytes. No task's error ever passes --max-error and --max-forgetting together.

    \b
    Examples:
      loraspan absorb team.span new/sql
      loraspan absorb team.span 'new/*' --max-bytes 200MB
      loraspan absorb team.span new/sql --max-forgetting 0.01 --dry-run
    """
    opened = subspace.open(space)
    with bars() as progress:
        change = opened.absorb(
            list(sources),
            max_error=max_error,
            max_forgetting=max_forgetting,
            max_bytes=max_bytes,
            progress=progress,
            dry_run=dry_run,
        )
    put_change(space, opened, change, as_json)
