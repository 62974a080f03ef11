"""``loraspan gc``: remove generations that nobody needs."""

from __future__ import annotations

import re
from pathlib import Path

import click

from loraspan import store
from loraspan.cli.output import put, put_json, remark, shown, size

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def _seconds(_ctx: click.Context, _parameter: click.Parameter, value: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])", value, re.ASCII)
    if match is None:
        raise click.BadParameter(f"{value!r} is no time: it takes a number and s, m, h, d or w, as in 36h")
    return float(match[1]) * _UNITS[match[2]]


@click.command()
@click.argument("space", metavar="SPACE", type=click.Path(path_type=Path))
@click.option("--keep", default=1, show_default=True, type=click.IntRange(min=0), help="Older generations that stay.")
@click.option(
    "--grace", default="7d", show_default=True, callback=_seconds, help="How long a generation outlives its end."
)
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def gc(space: Path, keep: int, grace: float, dry_run: bool, as_json: bool) -> None:
    """Remove old generations of a store, and the files that no other generation needs.

    The current generation stays, the newest --keep before it, those that were the current one less than --grace ago,
    and those that somebody has pinned.

    \b
    Examples:
      loraspan gc team.span --dry-run
      loraspan gc team.span --keep 0 --grace 1h
    """
    found = store.gc(space, keep=keep, grace=grace, dry_run=dry_run)
    if as_json:
        put_json(
            {
                "store": str(space),
                "dry_run": dry_run,
                "generations": list(found.generations),
                "files": list(found.files),
                "bytes": found.nbytes,
                "kept": {str(number): reason for number, reason in found.kept.items()},
            }
        )
        return
    for name in found.files:
        put(name)
    for number, reason in found.kept.items():
        remark(f"generation {number} stays: {reason}")
    done = "would remove" if dry_run else "removed"
    counts = f"{len(found.generations)} generations, {len(found.files)} files, {size(found.nbytes)}"
    remark(f"{shown(str(space))}: {done} {counts}")
