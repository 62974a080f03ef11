"""Write a collection: as a store of its own, or as what follows on a generation that was opened."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from loraspan._default_device import cpu_by_default
from loraspan.collection.collection import Collection, Segment, SlotSpace
from loraspan.collection.segments import merge
from loraspan.errors import StoreError
from loraspan.store import segment
from loraspan.store.checks import check
from loraspan.store.compaction import MEMORY
from loraspan.store.drafts import Drafts, Named
from loraspan.store.format import BASIS, TASKS, DamagedError
from loraspan.store.manifest import Manifest
from loraspan.store.mapped import TensorFile
from loraspan.store.opened import Opened
from loraspan.store.plan import Plan, all_new, plan
from loraspan.store.publish import AGAIN, UnsyncedError, check_files, check_note, now, publish, standing
from loraspan.store.reader import current, read_sealed


@cpu_by_default
def save(
    collection: Collection,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    parent: int | None = None,
    timeout: float = 30.0,
    note: str = "",
    memory: int = MEMORY,
) -> int:
    """Write a collection to a folder, as a new store or as the next generation of one.

    Whatever happens on the way, the folder holds the old generation or the new one, and whoever has the old one open
    keeps it.

    Args:
        collection: to write. One file is written for the bases and one for the tasks.
        path: the folder. It is made if it is missing; one that holds anything else is refused.
        overwrite: needed where the folder holds a store: this writes its next generation.
        parent: the generation that the new one follows. If the store is at another one, nothing is written. None takes
            the one that the store is at when the call begins.
        timeout: seconds to wait for another writer.
        note: what made this generation, for :func:`log`.
        memory: bytes that joining small segments to one may take, of which two are written at a time.

    Returns:
        The number of the new generation; the first is 1.

    Raises:
        StoreError: if the folder is something else, ``overwrite`` was needed, another writer was faster or holds the
            lock, or the files cannot be written.
        ShapeError: if parts of the collection do not fit together.
        ArgumentError: if a name occurs twice, or something cannot be written as it is.

    Example:
        >>> import tempfile
        >>> from loraspan.store import save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [save(Collection({}), folder, overwrite=again) for again in (False, True)]
        [1, 2]
    """
    return save_and_open(
        collection, path, overwrite=overwrite, parent=parent, timeout=timeout, note=note, memory=memory
    ).generation


def save_and_open(
    collection: Collection,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    parent: int | None = None,
    timeout: float = 30.0,
    note: str = "",
    memory: int = MEMORY,
) -> Opened:
    """Do what :func:`save` does, and give the new generation as :func:`commit` does."""
    folder = Path(path)
    check_note("save", note)
    check(collection)
    seen = standing(folder, overwrite)
    if parent is not None and parent != seen:
        raise StoreError(f"{folder}: at generation {seen}, not {parent}: open it again and repeat the change")
    return _write(folder, seen, collection, all_new(collection, memory), note, timeout)


@cpu_by_default
def commit(opened: Opened, collection: Collection, *, note: str = "", timeout: float = 30.0) -> Opened:
    """Write the generation that follows on an opened one, and of it only what is not there yet.

    What was opened is recognised, not compared. The bases stand if every slot has the very tensors that were opened;
    a new slot whose bases are empty needs none. A segment stands if it has the very mapping ``columns`` that was
    opened: tasks of it that are gone (None) or have another name, and are otherwise the same down to each attribute,
    are noted in the manifest. All else is written, a file for each new segment. Where segments have piled up, some are
    joined: over many calls a task's bytes are written again about once for each eightfold growth of the store (see
    ``docs/store.md``). A segment of which more than half was removed is written anew without that.

    Time and bytes are those of the change, not of the collection.

    Args:
        opened: what :func:`open_at` or an earlier call gave.
        collection: made from ``opened.collection``.
        note: what made this generation, for :func:`log`: "add sql".
        timeout: seconds to wait for another writer.

    Returns:
        The new generation, as :func:`open_at` would give it: what was written is mapped from its files, all else is
        what ``opened`` holds. Go on from its ``collection``, of which the next call knows the parts.

    Raises:
        StoreError: if the store is no longer at the generation that was opened, lacks one of its files, another writer
            holds the lock, or the files cannot be written.
        UnsyncedError: the new generation, its ``opened``, is the current one, but may not outlast a loss of power.
        ShapeError: if parts of the collection do not fit together.
        ArgumentError: if a name occurs twice, or something cannot be written as it is.

    Example:
        >>> import tempfile
        >>> from dataclasses import replace
        >>> from loraspan.store import commit, open_at, save
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     number = save(Collection({}), folder)
        ...     opened = open_at(folder)
        ...     commit(opened, replace(opened.collection, base_model="base"), note="name the base").generation
        2
    """
    check_note("commit", note)
    # before anything is joined, and again with the store locked
    _check_generation(opened)
    made = plan(opened, collection)
    return _write(opened.folder, opened.generation, collection, made, note, timeout, opened)


def _write(
    folder: Path,
    seen: int | None,
    collection: Collection,
    made: Plan,
    note: str,
    timeout: float,
    opened: Opened | None = None,
) -> Opened:
    planned = _planned(collection, made)
    written: list[Opened] = []

    def make(drafts: Drafts) -> Manifest:
        if opened is not None:
            _check_files(opened, made)
        files = iter(drafts.write_all(planned))
        basis = made.basis or next(files)
        segments = (part.data or replace(next(files), tasks=part.living) for part in made.parts)
        manifest = Manifest(
            generation=(seen or 0) + 1,
            parent=seen,
            dtype=collection.dtype,
            base_model=collection.base_model,
            summary=collection.summary,
            fitted=collection.fitted,
            bits=collection.bits,
            slots=segment.slot_shapes(collection),
            basis=basis,
            segments=tuple(segments),
            time=now(),
            note=note,
            change=made.change,
        )
        written.append(_mapped(folder, manifest, collection, made))
        return manifest

    try:
        data = publish(folder, seen, timeout, make)
    except DamagedError as error:
        raise error.within(folder) from None
    except UnsyncedError as error:
        error.opened = replace(written[0], sha256=hashlib.sha256(error.data).hexdigest())
        raise
    return replace(written[0], sha256=hashlib.sha256(data).hexdigest())


def _planned(collection: Collection, made: Plan) -> list[tuple[str, Callable[[], Named]]]:
    """Give what has to be written. What cannot be written as it is says so here, before anything is touched."""
    planned: list[tuple[str, Callable[[], Named]]] = []
    if made.basis is None:
        planned.append((BASIS, partial(segment.basis_tensors, collection)))
    for part in made.parts:
        if part.data is not None:
            continue
        if len(part.segments) == 1 and part.living == len(part.segments[0].tasks):
            planned.append((TASKS, partial(list, segment.task_tensors(part.segments[0]))))
            continue
        segment.check_records(part.segments)
        # joined only when its turn comes: a copy in memory
        planned.append((TASKS, partial(_merged_tensors, part.segments)))
    return planned


def _merged_tensors(segments: Sequence[Segment]) -> Named:
    return segment.task_tensors(merge(segments))


def _mapped(folder: Path, manifest: Manifest, collection: Collection, made: Plan) -> Opened:
    """Give the generation with what was just written as views of its files: that it can be read is part of writing."""
    slots = collection.slots
    if made.basis is None:
        bases = segment.read_basis(TensorFile(folder, manifest.basis), manifest)
        slots = {slot.name: SlotSpace(*bases[slot.name], slot.kind, slot.kernel) for slot in manifest.slots}
    segments = tuple(
        segment.read_tasks(TensorFile(folder, data), manifest, data) if part.data is None else part.segments[0]
        for part, data in zip(made.parts, manifest.segments, strict=True)
    )
    held = replace(collection, slots=slots, segments=segments)
    return Opened(folder, manifest.generation, held, manifest.basis, manifest.segments, made.names, "")


def _check_generation(opened: Opened) -> None:
    if (now := current(opened.folder)) != opened.generation:
        raise StoreError(
            f"{opened.folder}: another writer was faster: it is at generation {now} and was at {opened.generation} "
            f"when it was opened; {AGAIN}"
        )


def _check_files(opened: Opened, made: Plan) -> None:
    """See that the store is the one that was opened, not another one of that number, and still has what stands."""
    folder = opened.folder
    if hashlib.sha256(read_sealed(folder, opened.generation)).hexdigest() != opened.sha256:
        raise StoreError(f"{folder}: generation {opened.generation} is not the one that was opened; {AGAIN}")
    stands = [made.basis, *(part.data for part in made.parts)]
    check_files(folder, [data for data in stands if data is not None])
