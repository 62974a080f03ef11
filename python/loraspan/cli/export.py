"""``loraspan export``: tasks back as PEFT adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from loraspan import subspace
from loraspan.cli.changes import check_known
from loraspan.cli.compress import DTYPES
from loraspan.cli.output import put, shown
from loraspan.errors import ArgumentError

_LONGEST = 120
# names that Windows keeps for devices, whatever follows a dot
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}


@click.command()
@click.argument("space", metavar="SPACE", type=click.Path(path_type=Path))
@click.argument("tasks", metavar="TASK...", nargs=-1)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to hold the adapters.")
@click.option("--all", "everything", is_flag=True, help="Export every task.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the factors. [default: that of the original]")
@click.option("--overwrite", is_flag=True, help="Replace adapters that are there.")
def export(
    space: Path, tasks: tuple[str, ...], out: Path, everything: bool, dtype: str | None, overwrite: bool
) -> None:
    """Write tasks as PEFT adapters, each in a folder of OUT named after its task.

    Characters that a folder cannot safely have become "_"; two tasks that would share a folder are refused. The paths
    written are printed, one a line.

    \b
    Examples:
      loraspan export team.span sql -o restored/
      loraspan export team.span sql legal -o restored/ --dtype bf16
      loraspan export team.span --all -o restored/
    """
    if everything == bool(tasks):
        raise click.UsageError("give names of tasks, or --all and no names")
    opened = subspace.open(space)
    chosen = opened.tasks if everything else list(dict.fromkeys(tasks))
    check_known(space, chosen, opened.tasks)
    folders = {name: out / folder for name, folder in folder_names(chosen).items()}
    for name, folder in folders.items():
        if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ArgumentError(
                f"export: {folder}, for task {name!r}, is there already: pass --overwrite, or another -o"
            )
    for name, folder in folders.items():
        opened.export(name, folder, dtype=None if dtype is None else DTYPES[dtype])
        put(shown(str(folder)))


def folder_names(tasks: Sequence[str]) -> dict[str, str]:
    """Give each task the name of one folder, which never leads out of the folder it lies in.

    Raises:
        ArgumentError: if two tasks would share a folder, also where upper and lower case are one.

    Example:
        >>> folder_names(["sql", "team/legal", "../../etc"])
        {'sql': 'sql', 'team/legal': 'team_legal', '../../etc': '_.._.._etc'}
    """
    taken: dict[str, str] = {}
    names: dict[str, str] = {}
    for task in tasks:
        name = _folder_name(task)
        other = taken.setdefault(name.casefold(), task)
        if other != task:
            raise ArgumentError(
                f"export: tasks {other!r} and {task!r} would both be written to a folder {name!r}; "
                "export them with different -o"
            )
        names[task] = name
    return names


def _folder_name(task: str) -> str:
    name = "".join(c if c.isalnum() or c in "-_.+=@ " else "_" for c in task)[:_LONGEST]
    # neither hidden nor "..", and no end that Windows drops
    name = ("_" if name[:1] in (".", "", " ") else "") + name
    name = name[:-1] + "_" if name[-1] in ". " else name
    return f"_{name}" if name.split(".")[0].casefold() in _RESERVED else name
