"""Put any number of adapters into a store, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from loraspan.adapters.sources import Sources
from loraspan.collection.fit import Goal
from loraspan.collection.layout import parse_bytes
from loraspan.collection.summary import summarized
from loraspan.errors import ArgumentError, LoraspanError, StoreError
from loraspan.many.aside import Aside, find_each
from loraspan.many.census import Census, take_census
from loraspan.many.groups import standing as standing_bytes
from loraspan.many.ledger import DONE, Ledger
from loraspan.many.publish import PUBLISH, gather, publish
from loraspan.many.run import Progress, Run
from loraspan.store.publish import standing

CENSUS = "census.json"


class Done(NamedTuple):
    """What came of a run: the generation that it wrote, None if an earlier call did, and whom it has set aside."""

    generation: int | None
    aside: tuple[Aside, ...]


def compress_in_groups(
    sources: Sources,
    folder: Path,
    goal: Goal,
    *,
    memory: int | str,
    executor: Executor | None = None,
    skip: bool = False,
    hash_files: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Done:
    r"""Put any number of adapters into a store, group after group, in bounded memory, to be continued if interrupted.

    Every source is opened once to see what it is. Then the bytes are read twice, group by group: to summarize each slot
    by its leading directions, whose summaries merge into those of all; and to express every task on the bases that come
    of them. What is finished is kept in a folder ``<folder>.progress``. A run that was interrupted, however, goes on
    from there when it is called again with the same arguments, and ends with the same bits; ``executor`` and ``skip``
    may be others. When all is done the store appears as one generation, and the folder goes.

    Peak anonymous memory above that after the import is :math:`48\,MiB + 6\,KiB \cdot N + 5 \, group`, where a group is
    as many adapters as keep its own cost (:mod:`loraspan.many.groups`) within what ``memory`` leaves for it; four
    groups are in work or waiting at a time. Without an executor it is one, and less is taken.

    Args:
        sources: as for :func:`loraspan.compress`, :class:`Adapter` objects excepted: they are in memory already.
        folder: of the store.
        goal: what to meet, without ``max_bytes``. With ``energy``, each side gets directions that lose at most half of
            the rest, as their summaries prove.
        memory: bytes, or text such as ``"1GB"``. Which adapters form a group follows from it, and the last bits.
        executor: any of ``concurrent.futures``; the result is the same whichever it is. None does the work here.
        skip: whether adapters that cannot be taken are set aside.
        hash_files: keep a sha256 of every whole source file.
        overwrite: whether a store that is there gets a new generation.
        progress: called with a stage (``"read"`` in sources, ``"summarize"`` and ``"express"`` in bytes of factors),
            how much of it is done, and how much there is.

    Raises:
        ArgumentError: if ``memory`` is too small; says what would do.
        StoreError: if the folder may not be written, another run is at work on it, or one is unfinished that was begun
            with other arguments or sources; says which.
        LoraspanError: without ``skip``, whatever is wrong with an adapter.

    Source:
        Merging summaries: see :func:`loraspan.collection.merge_ranges.merge`.
    """
    ledger = Ledger(_beside(folder))
    report = progress or (lambda _stage, _done, _total: None)
    size = parse_bytes("compress with memory=", memory) or 0
    arguments = _arguments(goal, size, hash_files, overwrite)
    if isinstance(sources, Iterator):
        # they are looked through more than once
        sources = list(sources)
    with ledger.held():
        done = _finished(ledger, arguments, sources, skip)
        if done is not None:
            ledger.drop()
            return done
        if ledger.is_barren():
            ledger.clear()
        try:
            ledger.claim(arguments)
            if not ledger.has(PUBLISH):
                # refuse before the work what saving would refuse after it
                standing(folder, overwrite)
            census = _census(ledger, sources, skip, report)
            run = Run(ledger, census, goal, skip, hash_files, size, executor, report)
            collection, more = gather(ledger, run.segments(), census, goal.widths, skip)
        except LoraspanError:
            # nothing to go on with: the next run may be a different one
            if ledger.is_barren():
                ledger.drop()
            raise
        collection, nbytes = summarized(collection)
        collection = replace(collection, fitted=nbytes)
        room = size - standing_bytes(len(census.members))
        generation = publish(ledger, collection, folder, overwrite, room)
        aside = (*census.aside, *more)
        ledger.write_json(DONE, {"arguments": arguments, "aside": aside, "census": census.as_dict()})
        ledger.drop()
    return Done(generation, aside)


def _beside(folder: Path) -> Path:
    """Give the folder of the ledger."""
    place = folder if folder.name.strip(".") else folder.resolve()
    if not place.name:
        raise ArgumentError(f"compress: out= names a folder to be made in another; got {str(folder)!r}")
    return place.with_name(f"{place.name}.progress")


def _finished(ledger: Ledger, arguments: dict[str, Any], sources: Sources, skip: bool) -> Done | None:
    """Say what came of a run that was cut short when all was done, if it was this one; another's is cleared away."""
    if not ledger.has(DONE):
        return None
    done = ledger.read_json(DONE)
    if done["arguments"] == arguments and _changed(done["census"], sources, skip) is None:
        return Done(None, tuple(Aside(*one) for one in done["aside"]))
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
