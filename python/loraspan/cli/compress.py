"""``loraspan compress``: adapters in, one folder out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import click
import torch

from loraspan import subspace
from loraspan.cli.output import bars, one_line, put, put_json, remark, shown, size
from loraspan.collection.rows import WIDTHS
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
@click.option("--max-bytes", metavar="SIZE", help="All bytes of the store, such as 200MB.")
@click.option(
    "--dtype",
    type=click.Choice(list(WIDTHS)),
    help="Of what is stored. [default: chosen for --max-error and --max-bytes; f32 otherwise, and with --memory]",
)
@click.option("--refine", type=click.IntRange(min=0), default=2, show_default=True, help="Joint refinement iterations.")
@click.option("--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:N or mps. [default: cpu]")
@click.option("--hash-files", is_flag=True, help="Keep a sha256 of every whole source file.")
@click.option("--overwrite", is_flag=True, help="If OUT is a store, write its next generation.")
@click.option("--memory", metavar="SIZE", help="Work in groups within SIZE, such as 1GB; goes on if interrupted.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Processes that work on groups. [default: 1]")
@click.option(
    "--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True, help="At a bad adapter."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def compress(
    sources: tuple[str, ...],
    out: Path,
    rank: int | None,
    energy: float | None,
    max_error: float | None,
    max_bytes: str | None,
    dtype: str | None,
    refine: int,
    device: str | None,
    hash_files: bool,
    overwrite: bool,
    memory: str | None,
    jobs: int | None,
    on_error: str,
    as_json: bool,
) -> None:
    """Put adapters of one base model into one store.

    SRC is an adapter's folder, a folder of such folders, a quoted glob, a .safetensors file or a Hub id owner/name.

    Give one of --rank, --energy, --max-error and --max-bytes. With --max-error no task is further than that from its
    original, as |dW - dW'| / |dW| over all its modules: what the tasks share goes into shared bases, the rest stays
    private, in as few bits as the error allows. --max-bytes makes the largest error as small as the bytes allow.
    --rank and --energy keep shared bases alone, and the errors are what they are.

    With --memory or --jobs, adapters go through in groups that fit the memory (1GB if it is not said), however many
    they are, and --dtype is f32 unless given. What is done is kept in OUT.progress: after an interruption the same
    command goes on from there, and ends with the same bytes. --on-error skip sets aside what cannot be read or does not
    belong with most of the others, and says why.

    \b
    Examples:
      loraspan compress adapters/ -o team.span
      loraspan compress 'adapters/*' -o team.span --max-error 0.01
      loraspan compress sql/ legal/ chat/ -o team.span --rank 32 --dtype f16
      loraspan compress adapters/ -o team.span --max-bytes 200MB
      loraspan compress adapters/ -o team.span --overwrite --json > report.json
      loraspan compress adapters/ -o all.span --memory 1GB --jobs 4 --on-error skip
    """
    goals = sum(goal is not None for goal in (rank, energy, max_error, max_bytes))
    if goals > 1:
        raise click.UsageError("give one of --rank, --energy, --max-error and --max-bytes")
    by_default = not goals
    if by_default:
        max_error = DEFAULT_MAX_ERROR
    in_groups = memory is not None or jobs is not None
    for name, value in (("--device", device), ("--max-bytes", max_bytes)):
        if in_groups and value is not None:
            raise click.UsageError(f"{name} does not go with --memory or --jobs")
    start = time.perf_counter()
    if in_groups:
        memory = subspace.DEFAULT_MEMORY if memory is None else memory
    else:
        _check_free(out, overwrite)
    with bars() as progress, _processes(jobs or 1) as executor:
        space = subspace.compress(
            list(sources),
            rank=rank,
            energy=energy,
            max_error=max_error,
            max_bytes=max_bytes,
            dtype=dtype,
            refine=refine,
            device=device,
            memory=memory,
            executor=executor,
            on_error=on_error,
            out=out,
            overwrite=overwrite,
            hash_files=hash_files,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    if by_default:
        remark(f"no --rank, --energy, --max-error or --max-bytes given: took --max-error {DEFAULT_MAX_ERROR}")
    for one in space.aside:
        remark(f"set aside {shown(one.source)}: {one_line(one.reason)}")
    if as_json:
        aside = [one._asdict() for one in space.aside]
        put_json({"store": str(out), "seconds": round(seconds, 3), **space.report().as_dict(), "aside": aside})
        return
    worst = max(space.errors, key=space.errors.__getitem__)
    put(space.summary)
    put(f"Largest error: {space.errors[worst]:.3g}, of task {shown(worst)}.")
    if space.aside:
        count = len(space.aside)
        put(f"Set aside {count} of {count + len(space.tasks)} adapters; the reasons are above.")
    put(f"Wrote {shown(str(out))}: {size(space.nbytes)} in {seconds:.2g} s.")


@contextmanager
def _processes(jobs: int) -> Iterator[Executor | None]:
    """Give an executor of so many processes, and none for one."""
    if jobs == 1:
        yield None
        return
    # spawned: a fork would copy a process whose threads are at work
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        yield pool


def _check_free(out: Path, overwrite: bool) -> None:
    """Refuse in the words of the command line what writing would refuse; a run in groups may be done already."""
    if not overwrite and (out / "CURRENT").exists():
        raise StoreError(f"{out}: a store already: pass --overwrite to write its next generation, or choose another -o")
