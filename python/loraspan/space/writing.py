"""Write what a space has become, and say in a note what was done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loraspan import store
from loraspan.collection.collection import Collection
from loraspan.store.publish import UnsyncedError
from loraspan.store.transaction import save_and_open

# names of tasks that a note tells one by one
_NAMED = 3
# and so much of each: a name may be longer than a note
_SHOWN = 200


def save(
    collection: Collection, folder: Path, *, overwrite: bool, note: str
) -> tuple[store.Opened, UnsyncedError | None]:
    """Write a collection; give what is on disk then and, where that may not last, the error that is to be told."""
    try:
        return save_and_open(collection, folder, overwrite=overwrite, note=note), None
    except UnsyncedError as error:
        if error.opened is None:
            raise
        return error.opened, error


def commit(
    opened: store.Opened | None, collection: Collection, *, note: str
) -> tuple[store.Opened | None, UnsyncedError | None]:
    """Write what follows on what was opened, if there is a store, and give what :func:`save` does."""
    try:
        return None if opened is None else store.commit(opened, collection, note=note), None
    except UnsyncedError as error:
        return error.opened, error


def note_of(verb: str, names: Sequence[str]) -> str:
    """Give the note of a change.

    Example:
        >>> note_of("add", ["sql", "legal", "chat", "code"])
        'add sql legal chat and 1 more'
    """
    note = " ".join([verb, *(str(name)[:_SHOWN] for name in names[:_NAMED])])
    return note + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
