"""Put any number of adapters into a store, in bounded memory."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from loraspan.adapters.sources import Sources
from loraspan.collection.collection import Collection
from loraspan.collection.fit import Goal
from loraspan.collection.layout import collection_bytes, parse_bytes
from loraspan.collection.rows import width_named
from loraspan.collection.summary import summarize
from loraspan.errors import ArgumentError, LoraspanError, StoreError
from loraspan.many.census import Aside, Census, find_each, take_census
from loraspan.many.ledger import DONE, Ledger
from loraspan.many.publish import PUBLISH, gather, publish
from loraspan.many.run import Progress, Run
from loraspan.store.publish import standing

CENSUS = "census.json"


@dataclass(frozen=True)
class ManyReport:
    """What came of a run.

    Attributes:
        path: the store.
        tasks: how many it holds.
        aside: the adapters that were left out, and why.
        worst: the name of the task with the largest error.
        max_error: that error, relative, on ``dW``, measured on what is stored.
        mean_error: of all tasks.
        nbytes: of all files of the generation.
        source_nbytes: of the factors of the tasks, in their own dtypes.
        summary: one sentence on how much is shared and which form was chosen.
    """

    path: str
    tasks: int
    aside: tuple[Aside, ...]
    worst: str
    max_error: float
    mean_error: float
    nbytes: int
    source_nbytes: int
    summary: str

    def as_dict(self) -> dict[str, Any]:
        """Give plain values, for JSON."""
        return {**asdict(self), "aside": [one._asdict() for one in self.aside]}

    def __str__(self) -> str:
        lines = [self.summary, f"Largest error: {self.max_error:.3g}, of task {self.worst!r}."]
        lines += [f"Left out: {one.source}: {one.reason}" for one in self.aside]
        return "\n".join(lines)


def compress_many(
    sources: Sources,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    dtype: torch.dtype | str = torch.float32,
    refine: int = 2,
    seed: int = 0,
    memory: int | str = "1GB",
    executor: Executor | None = None,
    on_error: str = "stop",
    hash_files: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ManyReport:
    r"""Put any number of adapters into a store, group after group, in bounded memory, to be continued if interrupted.

    Every source is opened once to see what it is. Then the bytes are read twice, group by group: to summarize each slot
    by its leading directions, whose summaries merge into those of all; and to express every task on the bases that come
    of them. Time is linear in bytes. What is finished is kept in a folder ``<out>.progress`` beside ``out``. A run
    that was interrupted, however, goes on from there when it is called again with the same arguments, and ends with
    the same bits; ``executor`` and ``on_error`` may be others. When all is done the store appears as one generation,
    and the folder goes.

    Peak anonymous memory above that after the import, of this process and those that an executor starts here, apart
    from their interpreters:

    .. math:: 48\,MiB + 6\,KiB \cdot N + 5 \, group,

    where a group is as many adapters as keep its own cost (:mod:`loraspan.many.groups`) within what ``memory`` leaves
    for it; four groups are in work or waiting at a time. Without an executor it is one, and less memory is taken. A
    source is a mapped file while its group is in work: its pages are not anonymous, and no descriptor stays open.

    Args:
        sources: as for :func:`loraspan.compress`, :class:`Adapter` objects excepted: they are in memory already.
        out: the store's folder.
        rank: width of every shared basis.
        energy: share of the energy that every slot keeps. Each side gets directions that lose at most half of the
            rest, as their summaries prove, so bases may come out wider than a fit of all at once would make them.
        max_error: relative error on ``dW`` that no task exceeds. The form of each slot is chosen on a sample of tasks
            spread over all; private columns carry what shared ones do not, so the bound holds for every task.
        dtype: of what is stored: float32, bfloat16, float16, int8, or ``"int4"``.
        refine: iterations that fit both sides of a slot jointly, on the sample; none for ``energy``.
        seed: of the sketches.
        memory: bytes, or text such as ``"1GB"``, in powers of ten. Which adapters form a group follows from it, and the
            last bits.
        executor: any of ``concurrent.futures``; it has to see the files under the same paths. The result is the same
            whichever it is. Processes are to be spawned, not forked. None does the work here.
        on_error: ``"stop"`` at the first adapter that cannot be taken, or ``"skip"``: it is set aside, and the reason
            is in the report. Those are: what cannot be read; another base model or other shapes than most have; a
            name for the second time; a NaN or an infinity.
        hash_files: keep a sha256 of every whole source file.
        overwrite: whether a store that is there gets a new generation.
        progress: called with a stage (``"read"`` in sources, ``"summarize"`` and ``"express"`` in bytes of factors),
            how much of it is done, and how much there is.

    Raises:
        ArgumentError: if an argument is out of range, or ``memory`` too small; says what would do.
        StoreError: if ``out`` may not be written, another run is at work on it, or one is unfinished that was begun
            with other arguments or sources; says which.
        LoraspanError: with ``"stop"``, as :func:`loraspan.compress`.

    Example:
        >>> import tempfile, torch
        >>> from loraspan.adapters import Adapter, Slot, peft
        >>> folder = Path(tempfile.mkdtemp())
        >>> for i in range(3):
        ...     slot = Slot((i + 1) * torch.eye(2, 8), torch.eye(6, 2), 1.0)
        ...     peft.write(Adapter(f"task-{i}", {"q": slot}), folder / f"task-{i}")
        >>> report = compress_many(folder, folder / "team.span", rank=2, memory="100MB")
        >>> report.tasks, report.max_error < 1e-6
        (3, True)

    Source:
        Merging summaries: see :func:`loraspan.collection.merge_ranges.merge`.
    """
    goal = Goal(rank, energy, max_error, refine, width_named("compress", dtype), seed)
    if on_error not in ("stop", "skip"):
        raise ArgumentError(f"compress: on_error is 'stop' or 'skip'; got {on_error!r}")
    size = parse_bytes("compress with memory=", memory)
    if size is None:
        raise ArgumentError("compress: memory is a number of bytes, or text such as '1GB'; got None")
    folder = Path(out)
    ledger = Ledger(folder.with_name(f"{folder.name}.progress"))
    report = progress or (lambda _stage, _done, _total: None)
    skip = on_error == "skip"
    arguments = _arguments(goal, size, hash_files, overwrite)
    with ledger.held():
        made = _finished(ledger, arguments, sources, skip)
        if made is not None:
            ledger.drop()
            return made
        if ledger.is_barren():
            ledger.clear()
        try:
            ledger.claim(arguments)
            if not ledger.has(PUBLISH):
                # refuse before the work what saving would refuse after it
                standing(folder, overwrite)
            census = _census(ledger, sources, skip, report)
            run = Run(ledger, census, goal, skip, hash_files, size, executor, report)
            collection, aside = gather(ledger, run.segments(), census, goal.widths, skip)
        except LoraspanError:
            # nothing to go on with: the next run may be a different one
            if ledger.is_barren():
                ledger.drop()
            raise
        nbytes = collection_bytes(collection)
        collection = replace(collection, summary=summarize(collection, nbytes), fitted=nbytes)
        publish(ledger, collection, folder, overwrite)
        made = _report(folder, collection, (*census.aside, *aside))
        ledger.write_json(DONE, {"arguments": arguments, "report": made.as_dict(), "census": census.as_dict()})
        ledger.drop()
    return made


def _finished(ledger: Ledger, arguments: dict[str, Any], sources: Sources, skip: bool) -> ManyReport | None:
    """Give the report of a run that was cut short when all was done, if it was this one; another's is cleared away."""
    if not ledger.has(DONE):
        return None
    done = ledger.read_json(DONE)
    if done["arguments"] == arguments and _changed(done["census"], sources, skip) is None:
        table = done["report"]
        return ManyReport(**{**table, "aside": tuple(Aside(**one) for one in table["aside"])})
    ledger.clear()
    return None


def _arguments(goal: Goal, memory: int, hash_files: bool, overwrite: bool) -> dict[str, Any]:
    """Give what decides the bits of the result, and who may read what is kept."""
    return {
        **asdict(goal),
        "dtype": str(goal.widths),
        "memory": memory,
        "hash_files": hash_files,
        "overwrite": overwrite,
        "loraspan": _version(),
    }


def _version() -> str:
    try:
        return version("loraspan")
    except PackageNotFoundError:
        return "unknown"


def _census(ledger: Ledger, sources: Sources, skip: bool, report: Progress) -> Census:
    """Take the census, or see that the sources are those of the one that was taken."""
    if not ledger.has(CENSUS):
        census = take_census(sources, skip, lambda done, total: report("read", done, total))
        ledger.write_json(CENSUS, census.as_dict())
        return census
    table = ledger.read_json(CENSUS)
    if (changed := _changed(table, sources, skip)) is not None:
        raise StoreError(
            f"{ledger.path}: a run is not finished here, and since it began {changed}. Remove this folder to begin anew"
        )
    return Census.from_dict(table)


def _changed(table: dict[str, Any], sources: Sources, skip: bool) -> str | None:
    """Say what is not as it was when a census was taken."""
    census = Census.from_dict(table)
    if census.aside and not skip:
        return f"{census.aside[0].source} was set aside, which on_error='stop' does not allow"
    return census.changed(find_each(sources, skip, []))


def _report(folder: Path, collection: Collection, aside: tuple[Aside, ...]) -> ManyReport:
    errors = {task.name: task.error for task in collection.tasks}
    worst = max(errors, key=errors.__getitem__)
    return ManyReport(
        path=str(folder),
        tasks=len(errors),
        aside=aside,
        worst=worst,
        max_error=errors[worst],
        mean_error=sum(errors.values()) / len(errors),
        nbytes=collection_bytes(collection),
        source_nbytes=sum(task.factor_bytes for task in collection.tasks),
        summary=collection.summary,
    )
