"""Remove generations that nobody needs any more, and their files."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraspan.errors import ArgumentError, FormatError, StoreError
from loraspan.store import files
from loraspan.store.drafts import tidy
from loraspan.store.format import DATA_FILE, MANIFEST_FILE, PINS, TEMPORARY, UNFINISHED, DamagedError, manifest_name
from loraspan.store.lock import locked
from loraspan.store.pins import pinned
from loraspan.store.reader import read_manifest, wanted

WEEK = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Garbage:
    """What :func:`gc` removed, or would remove.

    Attributes:
        generations: their numbers, ascending.
        files: the names of all files, their manifests among them.
        nbytes: of these.
        kept: generations that are due and stay, and why.
    """

    generations: tuple[int, ...]
    files: tuple[str, ...]
    nbytes: int
    kept: Mapping[int, str]


@dataclass(frozen=True)
class _Listing:
    """The files of a folder by name, and the time before which a file is old enough to go."""

    stats: Mapping[str, os.stat_result]
    before: float

    def old(self, name: str) -> bool:
        # a time to come, as after a clock was put back, is not old either
        return self.stats[name].st_mtime <= self.before


def gc(
    path: str | os.PathLike[str], *, keep: int = 1, grace: float = WEEK, dry_run: bool = False, timeout: float = 30.0
) -> Garbage:
    """Remove old generations, and the files that no other generation names.

    The current generation always stays. Of the older ones stay the newest ``keep``; those that somebody has pinned;
    and those that were the current one less than ``grace`` ago, since somebody who opened one then may still be
    mapping its files. That time is told by the modification times of its manifest and of the next one, and a file is
    only removed if its own is as old; times in the future keep everything. What is mapped already stays readable
    where the operating system allows it (on Windows such a file cannot be removed, and stays for the next call).

    Manifests go first, and the folder is synced before any other file goes: a call that is cut short leaves no
    generation without its files, and the next writer removes what is left over.

    Args:
        path: the folder.
        keep: how many generations before the current one stay in any case.
        grace: seconds.
        dry_run: change nothing.
        timeout: seconds to wait for a writer.

    Returns:
        What was removed; with ``dry_run``, what would be.

    Raises:
        StoreError: if the folder is no store, a writer holds the lock, files cannot be removed, or a generation that
            stays cannot be read, so that nobody knows which files it needs. Then nothing is removed.
        ArgumentError: if ``keep`` or ``grace`` is negative.

    Example:
        >>> import tempfile
        >>> from loraspan.collection.collection import Collection
        >>> from loraspan.store import gc, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     numbers = [save(Collection({}), folder, overwrite=True) for _ in range(5)]
        ...     gc(folder, grace=0).generations
        (1, 2, 3)
    """
    if type(keep) is not int or keep < 0 or not grace >= 0:
        raise ArgumentError(f"gc: keep is a number and grace seconds, none of them negative; got {keep} and {grace}")
    folder = Path(path)
    try:
        newest = wanted(folder, None)
        # a dry run leaves no file behind, not even a lock
        with contextlib.nullcontext() if dry_run else locked(folder, timeout), _pins_held(folder, timeout, dry_run):
            newest = wanted(folder, None)
            if not dry_run:
                tidy(folder, newest)
            held = pinned(folder, clean=not dry_run)
            found = _find(folder, newest, keep, grace, held)
            if found.files and not dry_run:
                _remove(folder, found)
            return found
    except DamagedError as error:
        raise error.within(folder) from None
    except StoreError:
        raise
    except OSError as error:
        what = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise StoreError(f"{folder}: cannot be collected: {what}; every generation that is left is whole") from error


def _find(folder: Path, newest: int, keep: int, grace: float, held: set[int]) -> Garbage:
    listing = _list(folder, time.time() - grace)
    numbers = sorted(int(match[1]) for name in listing.stats if (match := MANIFEST_FILE.fullmatch(name)))
    older = [number for number in numbers if number < newest]
    due = older[: max(0, len(older) - keep)]
    kept: dict[int, str] = {}
    for number, following in zip(due, [*older[1:], newest], strict=False):
        if number in held:
            kept[number] = "pinned"
        elif not (listing.old(manifest_name(number)) and _old(listing, following)):
            kept[number] = "in its grace period"
    gone = [number for number in due if number not in kept]
    named = _named(folder, [newest, *(number for number in older if number not in gone)])
    files_gone = [manifest_name(number) for number in gone]
    # what no generation names at all, drafts among it, is left over from a writer
    files_gone += [
        name
        for name in sorted(listing.stats)
        if (DATA_FILE.fullmatch(name) or name.startswith(TEMPORARY)) and name not in named and listing.old(name)
    ]
    nbytes = sum(listing.stats[name].st_size for name in files_gone)
    return Garbage(tuple(gone), tuple(files_gone), nbytes, kept)


def _list(folder: Path, before: float) -> _Listing:
    with os.scandir(folder) as entries:
        return _Listing({entry.name: entry.stat(follow_symlinks=False) for entry in entries}, before)


def _old(listing: _Listing, number: int) -> bool:
    name = manifest_name(number)
    # a current generation without a manifest is found out when it is read
    return name not in listing.stats or listing.old(name)


def _named(folder: Path, generations: list[int]) -> set[str]:
    named: set[str] = set()
    for number in generations:
        try:
            named.update(data.file for data in read_manifest(folder, number).files)
        except (FormatError, StoreError, ArgumentError) as error:
            raise StoreError(
                f"{folder}: generation {number} stays and cannot be read, so that nobody knows which files it needs: "
                f"{error}; nothing was removed"
            ) from error
    return named


def _remove(folder: Path, found: Garbage) -> None:
    mark = folder / UNFINISHED
    with contextlib.suppress(FileExistsError):
        files.close(files.create(mark))
    manifests = [name for name in found.files if MANIFEST_FILE.fullmatch(name)]
    for name in manifests:
        files.remove(folder / name)
    # no name of a generation may come back after its files have gone
    files.sync_folder(folder)
    for name in found.files[len(manifests) :]:
        files.remove(folder / name)
    files.sync_folder(folder)
    files.remove(mark)


def _pins_held(folder: Path, timeout: float, dry_run: bool) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if dry_run else locked(folder, timeout, PINS)
