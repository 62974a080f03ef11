"""Which generations there are and what made them, and back to one of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loraspan.errors import ArgumentError, FormatError, LoraspanError, StoreError
from loraspan.store.drafts import Drafts
from loraspan.store.format import MANIFEST_FILE, DamagedError, manifest_name
from loraspan.store.manifest import Change, Manifest, dump
from loraspan.store.opened import open_at
from loraspan.store.publish import check_files, check_note, now, publish
from loraspan.store.reader import read_manifest, wanted


@dataclass(frozen=True)
class Entry:
    """A generation of a store.

    Attributes:
        generation: its number.
        current: whether it is the one that opens.
        parent: the generation that it was made from, None for the first.
        time: when, in UTC as ISO 8601, by the clock of the machine that wrote it; nothing depends on it.
        note: what made it, as its writer says.
        tasks: how many it has.
        nbytes: of all its files, and its manifest. Generations share files.
        change: names of tasks that came, went and changed; None where the manifest does not tell.
        problem: why it cannot be opened, None if it can as far as manifests and sizes tell. Where the manifest cannot
            be read, all but the first two attributes are None or empty.
    """

    generation: int
    current: bool
    parent: int | None = None
    time: str | None = None
    note: str = ""
    tasks: int | None = None
    nbytes: int | None = None
    change: Change | None = None
    problem: str | None = None


def log(path: str | os.PathLike[str]) -> list[Entry]:
    """Give the generations of a store, the newest first.

    Reads the manifests and the sizes of files, nothing else.

    Args:
        path: the folder.

    Returns:
        One entry for each generation that has a manifest, and for each that lacks one though the current one or a
        later one names it.

    Raises:
        StoreError: if the folder is no store.
        FormatError: if it does not say which generation is the current one.

    Example:
        >>> import tempfile
        >>> from loraspan.collection.collection import Collection
        >>> from loraspan.store import log, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     number = save(Collection({}), folder, note="begin")
        ...     [(entry.generation, entry.note, entry.tasks) for entry in log(folder)]
        [(1, 'begin', 0)]
    """
    folder = Path(path)
    newest = _wanted(folder, None)
    with os.scandir(folder) as entries:
        sizes = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
    numbers = [int(match[1]) for name in sizes if (match := MANIFEST_FILE.fullmatch(name))]
    found = {n: _entry(folder, n, newest, sizes) for n in numbers if 1 <= n <= newest}
    parents = {entry.parent for entry in found.values() if entry.parent is not None}
    lost = {n for n in parents - found.keys() if n > min(found)} | ({newest} - found.keys())
    found.update({n: Entry(n, n == newest, problem="its manifest is missing") for n in lost})
    return [found[n] for n in sorted(found, reverse=True)]


def rollback(
    path: str | os.PathLike[str], generation: int, *, note: str = "", timeout: float = 30.0, dry_run: bool = False
) -> Entry:
    """Write a new generation that is what an older one was. Nothing is rewritten, and history only grows.

    Args:
        path: the folder.
        generation: the one to go back to. All its files have to be there.
        note: for :func:`log`; "roll back to 3" if it is empty.
        timeout: seconds to wait for another writer.
        dry_run: change nothing.

    Returns:
        The entry of the new generation, or, with ``dry_run``, what it would be.

    Raises:
        StoreError: if the folder is no store, a file of that generation is missing, or the store cannot be written.
        FormatError: if that generation is damaged, as far as opening it tells.
        ArgumentError: if there is no such generation, or it is the current one.

    Example:
        >>> import tempfile
        >>> from loraspan.collection.collection import Collection
        >>> from loraspan.store import rollback, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     numbers = [save(Collection({}, base_model=x), folder, overwrite=True) for x in ("good", "bad")]
        ...     rollback(folder, 1).note
        'roll back to 1'
    """
    folder = Path(path)
    check_note("rollback", note)
    seen = _wanted(folder, None)
    if _wanted(folder, generation) == seen:
        raise ArgumentError(f"{folder}: generation {generation} is the current one: there is nothing to go back from")
    # sizes, headers and records are looked at here: a generation that does not open does not come back
    names = open_at(folder, generation).names
    manifest = replace(
        read_manifest(folder, generation),
        generation=seen + 1,
        parent=seen,
        time=now(),
        note=note or f"roll back to {generation}",
        change=_change(folder, seen, names),
    )

    def make(_: Drafts) -> Manifest:
        check_files(folder, manifest.files)
        return manifest

    if not dry_run:
        publish(folder, seen, timeout, make)
    nbytes = sum(data.size for data in manifest.files) + len(dump(manifest))
    return _told(manifest, current=not dry_run, nbytes=nbytes, problem=None)


def _wanted(folder: Path, generation: int | None) -> int:
    try:
        return wanted(folder, generation)
    except DamagedError as error:
        raise error.within(folder) from None


def _change(folder: Path, seen: int, names: frozenset[str]) -> Change | None:
    try:
        before = open_at(folder, seen).names
    except LoraspanError:
        return None  # whatever is wrong with the current one may be why it is left
    return Change(tuple(sorted(names - before)), tuple(sorted(before - names))).unless_long()


def _entry(folder: Path, number: int, newest: int, sizes: Mapping[str, int]) -> Entry:
    try:
        manifest = read_manifest(folder, number)
    except (FormatError, StoreError, ArgumentError) as error:
        return Entry(number, number == newest, problem=str(error))
    problem = None
    for data in manifest.files:
        if sizes.get(data.file) != data.size:
            got = f"it has {sizes[data.file]}" if data.file in sizes else "it is missing"
            problem = f"{data.file}: needs {data.size} bytes; {got}"
            break
    nbytes = sum(data.size for data in manifest.files) + sizes[manifest_name(number)]
    return _told(manifest, current=number == newest, nbytes=nbytes, problem=problem)


def _told(manifest: Manifest, *, current: bool, nbytes: int, problem: str | None) -> Entry:
    return Entry(
        generation=manifest.generation,
        current=current,
        parent=manifest.parent,
        time=manifest.time,
        note=manifest.note,
        tasks=manifest.tasks,
        nbytes=nbytes,
        change=manifest.change,
        problem=problem,
    )
