"""``loraspan export``: tasks back as adapters that other engines load."""

from __future__ import annotations

from pathlib import Path

import click

from loraspan import subspace
from loraspan.cli.changes import check_known, json_option
from loraspan.cli.compress import DTYPES
from loraspan.cli.output import bars, put, put_json, shown
from loraspan.errors import ArgumentError
from loraspan.serve.export import ENGINES, VLLM_RANKS
from loraspan.serve.names import INDEX, folder_names

__all__ = ["export", "folder_names"]


def _numbers(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Read whole numbers with commas between."""
    try:
        return None if value is None else tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"needs whole numbers with commas between; got {value!r}") from None


@click.command()
@click.argument("space", metavar="SPACE", type=click.Path(path_type=Path))
@click.argument("tasks", metavar="TASK...", nargs=-1)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder to hold the adapters.")
@click.option("--all", "everything", is_flag=True, help="Export every task.")
@click.option(
    "--format", "form", type=click.Choice(["peft"]), default="peft", show_default=True, help="Of the folders."
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Of the factors. [default: that of the original]")
@click.option(
    "--rank-multiple", type=click.IntRange(min=1), metavar="N", help="Pad all factors of a task to a multiple of N."
)
@click.option(
    "--ranks",
    metavar="N,N,...",
    callback=_numbers,
    help=f"Pad them to one of these, such as {','.join(map(str, VLLM_RANKS[:4]))}.",
)
@click.option("--engine", type=click.Choice(ENGINES), help="Pad as it needs it, and refuse what it cannot take.")
@click.option("--overwrite", is_flag=True, help="Replace adapters that are there.")
@json_option
def export(
    space: Path,
    tasks: tuple[str, ...],
    out: Path,
    everything: bool,
    form: str,
    dtype: str | None,
    rank_multiple: int | None,
    ranks: tuple[int, ...] | None,
    engine: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write tasks as PEFT adapters, each in a folder of OUT.

    A plain name of a task is its folder's name; any other is shortened and ends in a hash. tasks.json in OUT says which
    folder is whose. The paths written are printed, one a line.

    \b
    Examples:
      loraspan export team.span sql -o restored/
      loraspan export team.span sql legal -o restored/ --dtype bf16
      loraspan export team.span --all -o adapters/ --engine vllm
      loraspan export team.span --all -o adapters/ --rank-multiple 8 --json
    """
    if everything == bool(tasks):
        raise click.UsageError("give names of tasks, or --all and no names")
    if rank_multiple is not None and ranks is not None:
        raise click.UsageError("give --rank-multiple or --ranks")
    opened = subspace.open(space)
    chosen = opened.tasks if everything else list(dict.fromkeys(tasks))
    check_known(space, chosen, opened.tasks)
    for name, below in folder_names(chosen).items():
        folder = out / below
        if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ArgumentError(
                f"export: {folder}, for task {name!r}, is there already: pass --overwrite, or another -o"
            )
    with bars() as report:
        folders = opened.export(
            chosen,
            out,
            dtype=None if dtype is None else DTYPES[dtype],
            rank_multiple=rank_multiple,
            ranks=ranks,
            engine=engine,
            progress=report,
        )
    if as_json:
        exported = [{"name": name, "folder": str(folder)} for name, folder in folders.items()]
        document = {"store": str(space), "generation": opened.generation, "format": form, "index": str(out / INDEX)}
        put_json({**document, "tasks": exported})
        return
    for folder in folders.values():
        put(shown(str(folder)))
