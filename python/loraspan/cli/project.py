"""``loraspan project``: what a store's bases carry of adapters that are not in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from loraspan import subspace
from loraspan.adapters import read_all
from loraspan.cli.changes import json_option, max_error_option, sources_argument, space_argument
from loraspan.cli.output import add_row, bars, put, put_json, shown, table
from loraspan.subspace import Projection


@click.command()
@space_argument
@sources_argument
@max_error_option
@json_option
def project(space: Path, sources: tuple[str, ...], max_error: float, as_json: bool) -> None:
    """Say what the bases of a store carry of adapters, and what adding each would take. Nothing changes.

    For one adapter a table of its modules, those that the bases carry worst first; for several a line each. --max-error
    is what the cost is for.

    \b
    Examples:
      loraspan project team.span new/sql
      loraspan project team.span 'new/*' --max-error 0.01
      loraspan project team.span new/sql --json | jq '.adapters[0].slots[0]'
    """
    opened = subspace.open(space)
    adapters = read_all(list(sources))
    found = []
    with bars() as progress:
        for i, adapter in enumerate(adapters):
            progress("project", i, len(adapters))
            found.append(opened.project(adapter, max_error=max_error))
    if as_json:
        put_json({"store": str(space), "adapters": [projection.as_dict() for projection in found]})
    elif len(found) == 1:
        for line in str(found[0]).splitlines():
            put(shown(line))
    else:
        _put_lines(found)


def _put_lines(found: Sequence[Projection]) -> None:
    rows = table("adapter", ">error", ">outside", ">bytes", ">columns", ">private", "worst module")
    for p in found:
        counts = (f"{p.nbytes:,}", str(p.columns_if_added), str(p.private_if_added))
        add_row(rows, p.name, f"{p.error:.3g}", f"{p.outside:.3g}", *counts, p.slots[0].path if p.slots else "")
    put(rows)
