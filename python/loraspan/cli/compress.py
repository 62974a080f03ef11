"""``loraspan compress``: adapters in, one folder out."""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch

from loraspan import subspace
from loraspan.cli.output import bars, put, put_json, remark, shown, size
from loraspan.errors import StoreError

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
DEFAULT_MAX_ERROR = 0.05


@click.command()
@click.argument("sources", metavar="SRC...", nargs=-1, required=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The store to write, a folder.")
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Width of every shared basis.")
@click.option("--energy", type=float, metavar="X", help="Share of the energy to keep in shared bases, such as 0.95.")
@click.option(
    "--max-error", type=float, metavar="X", help=f"Largest relative error of a task. [default: {DEFAULT_MAX_ERROR}]"
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="f32", show_default=True, help="Of what is stored.")
@click.option("--refine", type=click.IntRange(min=0), default=2, show_default=True, help="Joint refinement iterations.")
@click.option("--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:N or mps. [default: cpu]")
@click.option("--hash-files", is_flag=True, help="Keep a sha256 of every whole source file.")
@click.option("--overwrite", is_flag=True, help="If OUT is a store, write its next generation.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def compress(
    sources: tuple[str, ...],
    out: Path,
    rank: int | None,
    energy: float | None,
    max_error: float | None,
    dtype: str,
    refine: int,
    device: str | None,
    hash_files: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Put adapters of one base model into one store.

    SRC is an adapter's folder, a folder of such folders, a quoted glob, a .safetensors file or a Hub id owner/name.

    Give one of --rank, --energy and --max-error. With --max-error no task is further than that from its original, as
    |dW - dW'| / |dW| over all its modules: what the tasks share goes into shared bases, the rest stays private.
    --rank and --energy keep shared bases alone, and the errors are what they are.

    \b
    Examples:
      loraspan compress adapters/ -o team.span
      loraspan compress 'adapters/*' -o team.span --max-error 0.01
      loraspan compress sql/ legal/ chat/ -o team.span --rank 32 --dtype f16
      loraspan compress adapters/ -o team.span --overwrite --json > report.json
    """
    if sum(goal is not None for goal in (rank, energy, max_error)) > 1:
        raise click.UsageError("give one of --rank, --energy and --max-error")
    by_default = rank is None and energy is None and max_error is None
    if by_default:
        max_error = DEFAULT_MAX_ERROR
    _check_free(out, overwrite)
    start = time.perf_counter()
    with bars() as progress:
        space = subspace.compress(
            list(sources),
            rank=rank,
            energy=energy,
            max_error=max_error,
            dtype=DTYPES[dtype],
            refine=refine,
            device=device,
            hash_files=hash_files,
            progress=progress,
        )
    space.save(out, overwrite=overwrite)
    seconds = time.perf_counter() - start
    if by_default:
        remark(f"no --rank, --energy or --max-error given: took --max-error {max_error}")
    if as_json:
        put_json({"store": str(out), "seconds": round(seconds, 3), **space.report().as_dict()})
        return
    worst = max(space.errors, key=space.errors.__getitem__)
    put(space.summary)
    put(f"Largest error: {space.errors[worst]:.3g}, of task {shown(worst)}.")
    put(f"Wrote {shown(str(out))}: {size(space.nbytes)} in {seconds:.2g} s.")


def _check_free(out: Path, overwrite: bool) -> None:
    """Refuse before the work what saving would refuse after it."""
    if overwrite or not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if (out / "CURRENT").exists():
        raise StoreError(f"{out}: a store already: pass --overwrite to write its next generation, or choose another -o")
    raise StoreError(f"{out}: is there already and is no store: choose another -o")
