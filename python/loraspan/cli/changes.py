"""What the commands that change a store have in common: options, names that are guessed, how a change is told."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import click

from loraspan.cli.compress import DEFAULT_MAX_ERROR
from loraspan.cli.output import put, put_json, shown
from loraspan.errors import UnknownTaskError
from loraspan.subspace import Change, Subspace

space_argument = click.argument("space", metavar="SPACE", type=click.Path(path_type=Path))
sources_argument = click.argument("sources", metavar="SRC...", nargs=-1, required=True)
max_error_option = click.option(
    "--max-error",
    type=float,
    metavar="X",
    default=DEFAULT_MAX_ERROR,
    show_default=True,
    help="Largest relative error of an adapter.",
)
max_bytes_option = click.option(
    "--max-bytes", metavar="SIZE", help="What the store's new generation may take, such as 200MB."
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would change, and change nothing.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def check_known(space: Path, chosen: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a name that no task of a store has, with the one that may be meant."""
    there = set(known)
    for name in chosen:
        if name not in there:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"see loraspan info {space} --tasks"
            raise UnknownTaskError(f"{space}: no task {name!r} among its {len(known)}; {hint}")


def put_change(space: Path, opened: Subspace, change: Change, as_json: bool) -> None:
    """Say what changed, or would, and at which generation the store is now."""
    if as_json:
        put_json({"store": str(space), "generation": opened.generation, **change.as_dict()})
        return
    for line in str(change).splitlines():
        put(shown(line))
    if change.added:
        worst = max(change.added, key=change.added.__getitem__)
        put(f"Largest error of what came: {change.added[worst]:.3g}, of task {shown(worst)}.")
    put(f"{shown(str(space))}: {'still ' if change.dry_run else ''}at generation {opened.generation}.")
