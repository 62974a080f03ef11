"""``loraspan refit``: new bases for the tasks that a store holds."""

from __future__ import annotations

from pathlib import Path

import click

from loraspan import subspace
from loraspan.cli.changes import dry_run_option, json_option, max_bytes_option, put_change, space_argument
from loraspan.cli.output import bars


@click.command()
@space_argument
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Width of every basis. [default: what is least]")
@click.option("--max-forgetting", type=float, metavar="X", help="What any task may lose in all refits of its life.")
@max_bytes_option
@dry_run_option
@json_option
def refit(
    space: Path, rank: int | None, max_forgetting: float | None, max_bytes: str | None, dry_run: bool, as_json: bool
) -> None:
    """Fit new bases to the tasks of a store: what became common among them is shared.

    No original adapter is read. With --max-forgetting private columns keep what a task may not lose; with --rank alone
    there are none, and the losses are what they are; with --max-bytes alone they are as small as that allows. What
    every task loses is known before anything is written, and from then on its error is a bound: what it was, and what
    was lost since.

    \b
    Examples:
      loraspan refit team.span --max-forgetting 0.01
      loraspan refit team.span --rank 64 --dry-run
      loraspan refit team.span --max-bytes 200MB
    """
    if rank is None and max_forgetting is None and max_bytes is None:
        raise click.UsageError("give --max-forgetting, --rank, --max-bytes or several of them")
    opened = subspace.open(space)
    with bars() as progress:
        change = opened.refit(
            rank=rank, max_forgetting=max_forgetting, max_bytes=max_bytes, progress=progress, dry_run=dry_run
        )
    put_change(space, opened, change, as_json)
