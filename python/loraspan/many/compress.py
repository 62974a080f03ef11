"""Put any number of adapters into a store, in bounded memory."""

from __future__ import annotations

import re
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from loraspan.adapters.sources import Sources
from loraspan.collection.collection import Collection
from loraspan.collection.fit import Goal
from loraspan.collection.layout import collection_bytes
from loraspan.collection.summary import summarize
from loraspan.errors import ArgumentError, LoraspanError, StoreError
from loraspan.many.census import Aside, Census, find_each, take_census
from loraspan.many.ledger import Ledger
from loraspan.many.publish import PUBLISH, gather, publish
from loraspan.many.run import BASES, FIRST_WIDTHS, Progress, Run

CENSUS = "census.json"
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?\s*", re.ASCII | re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


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


def parse_size(value: int | str) -> int:
    """Give a number of bytes from one, or from text such as ``"1GB"`` or ``"512 MiB"``.

    Raises:
        ArgumentError: if it is neither.

    Example:
        >>> parse_size("1.5GB"), parse_size("1 KiB"), parse_size(7)
        (1500000000, 1024, 7)
    """
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is not None:
        prefix = (match[2] or "").lower()
        return int(float(match[1]) * (1024 if prefix.endswith("i") else 1000) ** _POWERS[prefix.removesuffix("i")])
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ArgumentError(f"compress: memory is a number of bytes, or text such as '1GB' or '512MiB'; got {value!r}")


def compress_many(
    sources: Sources,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    dtype: torch.dtype = torch.float32,
    refine: int = 2,
    seed: int = 0,
    memory: int | str = "1GB",
    executor: Executor | None = None,
    on_error: str = "stop",
    hash_files: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ManyReport:
    """Put any number of adapters into a store."""
    goal = Goal(rank, energy, max_error, refine, dtype, seed)
    if on_error not in ("stop", "skip"):
        raise ArgumentError(f"compress: on_error is 'stop' or 'skip'; got {on_error!r}")
    size = parse_size(memory)
    folder = Path(out)
    ledger = Ledger(folder.with_name(f"{folder.name}.progress"))
    report = progress or (lambda _stage, _done, _total: None)
    skip = on_error == "skip"
    if not ledger.has(PUBLISH):
        _check_free(folder, overwrite)
    with ledger.held():
        try:
            resumed = ledger.claim(_arguments(goal, size, hash_files, overwrite))
            census = _census(ledger, sources, skip, resumed, report)
            run = Run(ledger, census, goal, skip, hash_files, size, executor, report)
            collection, aside = gather(ledger, run.segments(), census, goal.dtype, skip)
        except LoraspanError:
            # nothing to go on with: the next run may be a different one
            if not ledger.has_any((FIRST_WIDTHS, BASES)):
                ledger.drop()
            raise
        nbytes = collection_bytes(collection)
        collection = replace(collection, summary=summarize(collection, nbytes))
        publish(ledger, collection, folder, overwrite)
        made = _report(folder, collection, nbytes, (*census.aside, *aside))
        ledger.drop()
    return made


def _check_free(folder: Path, overwrite: bool) -> None:
    """Refuse before the work what saving would refuse after it."""
    if overwrite or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if (folder / "CURRENT").exists():
        raise StoreError(f"{folder}: a store already: pass overwrite=True to write its next generation")
    raise StoreError(f"{folder}: is there already and is no store: choose another path")


def _arguments(goal: Goal, memory: int, hash_files: bool, overwrite: bool) -> dict[str, Any]:
    """Give what decides the bits of the result, and who may read what is kept."""
    return {
        **asdict(goal),
        "dtype": str(goal.dtype),
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


def _census(ledger: Ledger, sources: Sources, skip: bool, resumed: bool, report: Progress) -> Census:
    """Take the census, or see that the sources are those of the one that was taken."""
    if not resumed or not ledger.has(CENSUS):
        census = take_census(sources, skip, lambda done, total: report("read", done, total))
        ledger.write_json(CENSUS, census.as_dict())
        return census
    census = Census.from_dict(ledger.read_json(CENSUS))
    changed = census.changed(find_each(sources, skip, []))
    if changed is None and census.aside and not skip:
        changed = f"{census.aside[0].source} was set aside, which on_error='stop' does not allow"
    if changed is not None:
        raise StoreError(
            f"{ledger.path}: a run is not finished here, and since it began {changed}. Remove this folder to begin anew"
        )
    return census


def _report(folder: Path, collection: Collection, nbytes: int, aside: tuple[Aside, ...]) -> ManyReport:
    errors = {task.name: task.error for task in collection.tasks}
    worst = max(errors, key=errors.__getitem__)
    return ManyReport(
        path=str(folder),
        tasks=len(errors),
        aside=aside,
        worst=worst,
        max_error=errors[worst],
        mean_error=sum(errors.values()) / len(errors),
        nbytes=nbytes,
        source_nbytes=sum(task.factor_bytes for task in collection.tasks),
        summary=collection.summary,
    )
