"""``loraspan verify``: is a store whole."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from loraspan import subspace
from loraspan.cli.output import one_line, put, put_json, shown


@click.command()
@click.argument("space", metavar="SPACE", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def verify(ctx: click.Context, space: Path, as_json: bool) -> None:
    """Check a store: checksums, shapes, finite numbers, orthonormal bases.

    Exits with 1 and one line for each thing that is wrong.

    \b
    Examples:
      loraspan verify team.span
      loraspan verify team.span --json
    """
    findings = subspace.verify(space)
    if as_json:
        put_json({"store": str(space), "ok": not findings, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            put(one_line(str(finding)))
        if not findings:
            put(f"{shown(str(space))}: ok")
    ctx.exit(1 if findings else 0)
