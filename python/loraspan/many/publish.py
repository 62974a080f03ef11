"""From the pieces of a finished run to a store: one generation, which is there in full or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loraspan import store
from loraspan.collection.collection import Collection, Segment
from loraspan.collection.rows import CODED, Widths, same_rows
from loraspan.errors import ArgumentError, MismatchError, StoreError
from loraspan.many.aside import Aside
from loraspan.many.census import Census
from loraspan.many.ledger import Ledger
from loraspan.many.pieces import read_bases, read_segment
from loraspan.many.run import BASES
from loraspan.store.publish import UnsyncedError
from loraspan.store.reader import current

PUBLISH = "publish.json"
# Files that are joined at one time are two, and there is something beside them.
_SHARE = 3


def gather(
    ledger: Ledger, names: Sequence[str], census: Census, widths: Widths, skip: bool
) -> tuple[Collection, list[Aside]]:
    """Map the pieces of a run as one collection, a segment for each group, and list whom its work has set aside.

    Raises:
        ArgumentError: if nobody is left.
        MismatchError: without ``skip``, if an adapter was set aside when the run was begun with it.
    """
    spaces = read_bases(ledger.path / BASES, census.slots, widths.dtype)
    segments: list[Segment] = []
    aside: list[Aside] = []
    for name in names:
        segment, left_out = read_segment(ledger.path / name, spaces, widths.dtype)
        aside += left_out
        segments += [segment] if segment.tasks else []
    if aside and not skip:
        raise MismatchError(f"{aside[0].reason} (it was set aside by on_error='skip' when the run began)")
    if not segments:
        raise ArgumentError(f"compress: there is no adapter to compress; the first of {len(aside)}: {aside[0].reason}")
    used = {path for segment in segments for path in segment.columns}
    kept = {path: space for path, space in spaces.items() if path in used}
    return Collection(kept, tuple(segments), widths.dtype, census.base_model, bits=widths.bits), aside


def publish(ledger: Ledger, collection: Collection, folder: Path, overwrite: bool, memory: int) -> int:
    """Write the store, or see that it was written when the run was cut short right after that; give its generation.

    Small pieces are joined as far as ``memory`` goes; the rest is left to later changes of the store.

    Raises:
        StoreError: if it cannot be written, or another writer was faster.
    """
    now = current(folder) if folder.is_dir() else None
    if not ledger.has(PUBLISH):
        ledger.write_json(PUBLISH, {"parent": now})
    parent = ledger.read_json(PUBLISH)["parent"]
    if now == parent:
        try:
            # what joining unpacks of coded ends would stay in memory, piece after piece
            room = 0 if collection.widths.private == CODED else memory // _SHARE
            return store.save(collection, folder, overwrite=overwrite, parent=parent, note="save", memory=room)
        except UnsyncedError:
            # it was written: the next call sees that
            raise
        except StoreError:
            # nothing was written: what stands there the next time is another matter
            ledger.remove([PUBLISH])
            raise
    if now is None or not _same(collection, store.open(folder)):
        raise StoreError(
            f"{folder}: another writer was faster: it was at generation {parent} and is at {now}; {ledger.path} holds "
            "all of this run: run the same again with another out"
        )
    return now


def _same(one: Collection, other: Collection) -> bool:
    """Say whether two collections have the same tasks on the same bases."""
    return (
        [(task.name, task.error) for task in one.tasks] == [(task.name, task.error) for task in other.tasks]
        and one.slots.keys() == other.slots.keys()
        and all(
            same_rows(space.u, other.slots[path].u) and same_rows(space.v, other.slots[path].v)
            for path, space in one.slots.items()
        )
    )
