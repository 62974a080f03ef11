"""Make a space from adapters, or open one from a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loraspan import store
from loraspan._default_device import cpu_by_default
from loraspan.adapters import check_together, read_all
from loraspan.adapters.base import Adapter
from loraspan.collection.changes import Change
from loraspan.collection.fit import Goal, fit_with_plans
from loraspan.collection.layout import parse_bytes
from loraspan.collection.project import Projection
from loraspan.collection.rows import width_named
from loraspan.collection.summary import Report, summarized
from loraspan.errors import ArgumentError, NotFiniteError
from loraspan.many import Aside, compress_in_groups, nobody_left, read_or_set_aside, set_not_finite_aside
from loraspan.ops.places import find_device
from loraspan.space import Subspace
from loraspan.store import Finding, verify
from loraspan.store.publish import standing

__all__ = ["Aside", "Change", "Finding", "Projection", "Report", "Subspace", "compress", "open", "verify"]

Progress = Callable[[str, int, int], None]
DEFAULT_MEMORY = "1GB"


@cpu_by_default
def compress(
    sources: Any,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    max_bytes: int | str | None = None,
    dtype: torch.dtype | str | None = None,
    refine: int = 2,
    seed: int = 0,
    device: str | torch.device | None = None,
    memory: int | str | None = None,
    executor: Executor | None = None,
    on_error: str = "stop",
    out: str | Path | None = None,
    overwrite: bool = False,
    hash_files: bool = False,
    progress: Progress | None = None,
) -> Subspace:
    """Put adapters of one base model into a shared subspace. Give one of rank, energy, max_error and max_bytes.

    All at once in memory; or, with ``memory`` or ``executor``, group after group: then there may be any number of them,
    their bytes are read twice, and peak anonymous memory above that after the import, of this process and those that
    the executor starts here, apart from their interpreters, is at most ``48 MiB + 6 KiB * adapters + 5 * group``, where
    groups are cut so that this is ``memory``. Such a run is written to ``out``. What is finished of it is kept in a
    folder ``<out>.progress`` beside it: interrupted, the same call goes on from there and ends with the same bits.

    Args:
        sources: adapter folders, globs, ``.safetensors`` files, Hub ids or :class:`Adapter` objects, one or a list; or
            a dict that names them. In groups they are files.
        rank: width of every shared basis; every task is then a few coefficients.
        energy: share of the collection's energy to keep in shared bases, in every slot. In groups bases may come out
            wider than those of all at once.
        max_error: relative error on ``dW`` that no task exceeds: shared columns where they pay, private ones for the
            rest. Any value can be met on any adapters, down to the rounding of ``dtype``.
        max_bytes: all bytes on disk, a number or text such as "200MB": the worst task's error is made as small as they
            allow. Not in groups.
        dtype: of what is stored: float32, bfloat16, float16, or ``"int8"`` and ``"int4"``, integers in blocks of 64
            with a scale, or ``"coded"``, few bytes on disk and 8 or 16 bits in memory where an end of a column is
            private, and else 8 bits. Reported errors include its rounding. None takes float32 for a rank or an
            energy, and in groups; for the other goals the widths of bases, loadings and private columns that take the
            fewest bytes.
        refine: iterations that fit both sides of a slot jointly, in groups on a sample.
        seed: of the random sketches.
        device: ``"cuda"`` or ``"mps"``: factors are sent there in chunks of columns, two at a time of 128 MB each,
            for every product with them, and small problems are solved on the CPU. ``None`` takes where they lie, the
            CPU for files. Metal has no float64, in which Grams and bases are summed: ``"mps"`` takes the rest. Not in
            groups.
        memory: work in groups within so many bytes, a number or text such as "1GB" in powers of ten. Which adapters
            form a group follows from it, and the last bits. None takes 1 GB where there is an ``executor``.
        executor: work in groups on any executor of ``concurrent.futures`` that sees the files under the same paths. The
            result is the same whichever it is. Processes are to be spawned, not forked.
        on_error: ``"stop"`` at the first adapter that cannot be taken, or ``"skip"``: it is set aside, and
            :attr:`Subspace.aside` says why. Those are: what cannot be read; another base model or other shapes than
            most have; a name for the second time; a NaN or an infinity.
        out: the store's folder, by custom ``name.span``: the space is written there, and every later change of it.
        overwrite: whether a store that is there gets a new generation.
        hash_files: keep a sha256 of every whole source file (its header's is always kept).
        progress: called with a stage, how much of it is done, and how much there is.

    Returns:
        A space: new, in the CPU's memory, which :meth:`Subspace.save` writes; with ``out``, as :func:`open` gives it.

    Raises:
        ArgumentError: if not exactly one goal is given, a value is out of range, there is no such device, arguments do
            not go together, or ``memory`` is too small; says what would do.
        FormatError: if a file is damaged; names file and tensor.
        UnsupportedError: if an adapter uses what would come out wrong.
        MismatchError: if adapters are of different base models, clash in shape, or share a name.
        NotFiniteError: if a factor holds a NaN or an infinity.
        StoreError: if ``out`` may not be written; in groups also if another run is at work on it, or one is unfinished
            that was begun with other arguments or sources; says which.

    Example:
        >>> import tempfile
        >>> from loraspan.adapters import Adapter, Slot, peft
        >>> folder = Path(tempfile.mkdtemp())
        >>> for i in range(3):
        ...     slot = Slot((i + 1) * torch.eye(2, 8), torch.eye(6, 2), 1.0)
        ...     peft.write(Adapter(f"task-{i}", {"q": slot}), folder / "in" / f"task-{i}")
        >>> compress(folder / "in", max_error=0.01).tasks
        ['task-0', 'task-1', 'task-2']
        >>> space = compress(folder / "in", max_error=0.01, memory="100MB", out=folder / "team.span")
        >>> space.tasks, space.path.name
        (['task-0', 'task-1', 'task-2'], 'team.span')

    Source:
        Share, arXiv 2602.06043; joint diagonalisation, arXiv 2407.00066.
    """
    width = None if dtype is None else width_named("compress", dtype)
    goal = Goal(rank, energy, max_error, refine, width, seed, parse_bytes("compress", max_bytes))
    if on_error not in ("stop", "skip"):
        raise ArgumentError(f"compress: on_error is 'stop' or 'skip'; got {on_error!r}")
    if overwrite and out is None:
        raise ArgumentError("compress: overwrite= is for the store in out=, and there is no out=")
    skip, folder = on_error == "skip", None if out is None else Path(out)
    if memory is None and executor is None:
        place = find_device("compress", device)
        if folder is not None:
            # refuse before the work what saving would refuse after it
            standing(folder, overwrite)
        space = _at_once(sources, goal, place, skip, hash_files, progress)
        if folder is not None:
            space.save(folder, overwrite=overwrite)
        return space
    folder = _check_groups(goal, device, folder)
    done = compress_in_groups(
        sources,
        folder,
        replace(goal, dtype=torch.float32 if goal.dtype is None else goal.dtype),
        memory=DEFAULT_MEMORY if memory is None else memory,
        executor=executor,
        skip=skip,
        hash_files=hash_files,
        overwrite=overwrite,
        progress=progress,
    )
    opened = store.open_at(folder, done.generation)
    return Subspace(opened.collection, opened, aside=done.aside)


def open(path: str | Path, *, check: bool = False) -> Subspace:
    """Open a store. Tensors are mapped and read when they are needed; each change is written to it at once.

    Args:
        path: the folder.
        check: whether to read every file whole and compare its sha256 with the one that was written. Otherwise a bit
            that a disk has changed is found where opening reads it (the manifest, headers, names) or what is coded
            is unpacked, and in plain bases and columns by :func:`loraspan.store.verify` alone.

    Raises:
        StoreError: if there is no store.
        FormatError: if a file of it is damaged; names it.
    """
    opened = store.open_at(Path(path), check=check)
    return Subspace(opened.collection, opened)


def _at_once(
    sources: Any, goal: Goal, place: torch.device | None, skip: bool, hash_files: bool, progress: Progress | None
) -> Subspace:
    aside: list[Aside] = []
    adapters: Sequence[Adapter]
    if skip:
        adapters, aside = read_or_set_aside(sources, hash_file=hash_files)
    else:
        adapters = read_all(sources, hash_file=hash_files)
    check_together(adapters)
    try:
        collection, plans = fit_with_plans(adapters, goal, progress, place)
    except NotFiniteError:
        if not skip:
            raise
        adapters, more = set_not_finite_aside(adapters)
        aside += more
        if not adapters:
            raise nobody_left(aside) from None
        collection, plans = fit_with_plans(adapters, goal, progress, place)
    # their files are unmapped beside what follows
    del adapters
    collection, nbytes = summarized(collection)
    return Subspace(replace(collection, fitted=nbytes), plans=plans, aside=aside)


def _check_groups(goal: Goal, device: str | torch.device | None, folder: Path | None) -> Path:
    """Refuse what work in groups does not know, and give its folder."""
    if goal.max_bytes is not None:
        raise ArgumentError(
            "compress: max_bytes= does not go with memory= or executor=: what groups take is known when the last is "
            "done. Give max_error= and look at nbytes, or leave memory= and executor= out"
        )
    if device is not None:
        raise ArgumentError(
            f"compress: device={str(device)!r} does not go with memory= or executor=: groups are worked on by CPUs. "
            "Leave device= out, or memory= and executor="
        )
    if folder is None:
        raise ArgumentError(
            "compress: with memory= or executor= the space is written to a folder, and an interrupted run goes on from "
            "what it keeps beside it: name the folder with out=, such as out='team.span'"
        )
    return folder
