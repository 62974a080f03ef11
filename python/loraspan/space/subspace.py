"""A collection of adapters as a user holds it: looked at, changed, saved and given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraspan import store
from loraspan.collection.absorb import absorb
from loraspan.collection.changes import Change, compare
from loraspan.collection.collection import Collection
from loraspan.collection.fit import Progress
from loraspan.collection.layout import collection_bytes, parse_bytes
from loraspan.collection.refit import refit
from loraspan.collection.summary import summarize
from loraspan.collection.update import add, remove, rename, replace_tasks
from loraspan.space.held import Held

# names of tasks that a note tells one by one
_NAMED = 3
# and so much of each: a name may be longer than a note
_SHOWN = 200


class Subspace(Held):
    """A collection of adapters in one shared subspace per slot.

    Made by :func:`loraspan.compress` or :func:`loraspan.open`. A space that was opened or saved writes each change to
    its folder at once, as a new generation; a change that fails leaves it, and the folder, as they were.

    Example:
        >>> import torch
        >>> from loraspan.adapters import Adapter, Slot
        >>> one = Adapter("one", {"q": Slot(torch.eye(2, 8), torch.eye(6, 2), scale=0.5)})
        >>> two = Adapter("two", {"q": Slot(2 * torch.eye(2, 8), torch.eye(6, 2), scale=0.5)})
        >>> from loraspan import compress
        >>> space = compress([one, two], rank=2)
        >>> space.tasks, max(space.errors.values()) < 1e-6
        (['one', 'two'], True)
        >>> slot = space.reconstruct("two").slots["q"]
        >>> (slot.scale * slot.up @ slot.down)[0, 0].item()
        1.0
    """

    def save(self, path: str | Path, *, overwrite: bool = False, note: str = "save") -> None:
        """Write the collection to a folder, as a new store or, with ``overwrite``, a new generation of one.

        From then on each change is written there at once.

        Args:
            path: the folder, by custom ``name.span``.
            overwrite: whether a store that is there may get a new generation.
            note: kept with the generation, for :func:`loraspan.store.log`.

        Raises:
            StoreError: if the folder is there and may not be written, or another writer was faster; nothing changes.
        """
        generation = store.save(self.collection, Path(path), overwrite=overwrite, note=note)
        self._opened = store.open_at(Path(path), generation)
        self._collection = self._opened.collection
        if self._roster is not None:
            # the same bits, from other pages
            self._roster.become(replace(self._roster.state, collection=self._collection))

    def add(
        self, adapters: Any, *, max_error: float = 0.05, progress: Progress | None = None, dry_run: bool = False
    ) -> Change:
        """Add tasks: shared columns for what the bases carry of them, private ones for the rest.

        Bases and other tasks stay as they are, bit for bit. In a store, the bytes of the new tasks and a manifest are
        written, as one generation.

        Args:
            adapters: sources as for :func:`loraspan.compress`.
            max_error: relative error on ``dW`` that none of them exceeds.
            progress: called with a stage, how much of it is done, and how much there is.
            dry_run: change nothing, and say what would change.

        Raises:
            ArgumentError: if ``max_error`` is out of range, or below what rounding allows.
            MismatchError: if a name is taken, or an adapter is for another base model or disagrees on a slot.
            FormatError, UnsupportedError, NotFiniteError: as :func:`loraspan.compress`.
            StoreError: if the store cannot be written, or another writer was faster. Nothing is changed then.
        """
        read = self._read(adapters)
        added = add(self.collection, read, max_error=max_error, report=progress)
        return self._become(added, "add", [adapter.name for adapter in read], dry_run)

    def remove(self, *names: str, dry_run: bool = False) -> Change:
        """Remove tasks at once. Bases and other tasks stay as they are.

        Args:
            names: of tasks.
            dry_run: change nothing, and say what would change.

        Raises:
            UnknownTaskError: if there is no such task; nothing is changed then.
            StoreError: as :meth:`add`.
        """
        return self._become(remove(self.collection, names), "remove", names, dry_run)

    def rename(self, old: str, new: str) -> Change:
        """Give a task another name.

        Raises:
            UnknownTaskError: if there is no such task.
            MismatchError: if the new name is taken.
            StoreError: as :meth:`add`.
        """
        renamed = rename(self.collection, {old: new})
        return self._become(renamed, "rename", [old, "to", new], dry_run=False, renamed={old: new})

    def replace(
        self, adapters: Any, *, max_error: float = 0.05, progress: Progress | None = None, dry_run: bool = False
    ) -> Change:
        """Put other adapters in the place of tasks of the same names, as one change; they move to the end.

        Args:
            adapters: sources as for :func:`loraspan.compress`; each has the name of a task.
            max_error: as :meth:`add`.
            progress: as :meth:`add`.
            dry_run: change nothing, and say what would change.

        Raises:
            UnknownTaskError: if there is no task of an adapter's name.
            ArgumentError, MismatchError, FormatError, UnsupportedError, NotFiniteError, StoreError: as :meth:`add`.
        """
        read = self._read(adapters)
        replaced = replace_tasks(self.collection, read, max_error=max_error, report=progress)
        return self._become(replaced, "replace", [adapter.name for adapter in read], dry_run)

    def refit(
        self,
        *,
        rank: int | None = None,
        max_forgetting: float | None = None,
        max_bytes: int | str | None = None,
        progress: Progress | None = None,
        dry_run: bool = False,
    ) -> Change:
        """Fit new bases to the tasks as they are stored: what became common among them is shared.

        No original adapter is read. What each task loses is known before anything is written. Errors are bounds from
        then on: a task's error before, and what it lost since.

        Args:
            rank: width of every basis; without it, what takes the fewest bytes.
            max_forgetting: what a task may lose in all refits of its life, relative to its ``dW``; private columns keep
                the rest. With a rank alone, shared columns are all that is kept, and the losses are what they are.
            max_bytes: what the new generation may take on disk, a number or text such as "200MB". Alone, the worst loss
                is as small as that allows.
            progress: called with a stage, how much of it is done, and how much there is.
            dry_run: change nothing, and say what would change.

        Raises:
            ArgumentError: if no goal is given, or the goals cannot be met together; nothing is changed then.
            StoreError: as :meth:`add`.
        """
        limit = parse_bytes("refit", max_bytes)
        fitted = refit(self.collection, rank=rank, max_forgetting=max_forgetting, max_bytes=limit, report=progress)
        size = collection_bytes(fitted)
        return self._become(replace(fitted, fitted=size), "refit", [], dry_run)

    def absorb(
        self,
        adapters: Any,
        *,
        max_error: float = 0.05,
        max_forgetting: float = 0.05,
        max_bytes: int | str | None = None,
        progress: Progress | None = None,
        dry_run: bool = False,
    ) -> Change:
        """Add tasks, and fit new bases when that pays or ``max_bytes`` demands it.

        Args:
            adapters: sources as for :func:`loraspan.compress`.
            max_error: relative error of each of them when it comes.
            max_forgetting: what any task may lose in all refits of its life, so that its error stays at most
                ``max_error + max_forgetting``.
            max_bytes: what the space may take on disk, a number or text such as "200MB".
            progress: called with a stage, how much of it is done, and how much there is.
            dry_run: change nothing, and say what would change.

        Raises:
            ArgumentError: if a value is out of range, or ``max_bytes`` cannot be met; nothing is changed then.
            MismatchError, FormatError, UnsupportedError, NotFiniteError, StoreError: as :meth:`add`.
        """
        read = self._read(adapters)
        absorbed = absorb(
            self.collection,
            read,
            max_error=max_error,
            max_forgetting=max_forgetting,
            max_bytes=parse_bytes("absorb", max_bytes),
            report=progress,
        )
        return self._become(absorbed, "absorb", [adapter.name for adapter in read], dry_run)

    def _become(
        self,
        collection: Collection,
        verb: str,
        names: Sequence[str],
        dry_run: bool,
        renamed: Mapping[str, str] | None = None,
    ) -> Change:
        """Take the place of what is held: on disk first, where there is a store; then attached models are told."""
        before = self._collection
        collection = replace(collection, summary=summarize(collection, self._bytes_of(collection)))
        what = " ".join([verb, *(str(name)[:_SHOWN] for name in names[:_NAMED])])
        what += f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        change = compare(what, before, collection, (self.nbytes, self._bytes_of(collection)), dry_run=dry_run)
        if dry_run:
            # segments may be joined, or written anew without the removed tasks
            planned = None if self._opened is None else store.forecast(self._opened, collection)
            return replace(change, nbytes=(change.nbytes[0], planned or change.nbytes[1]))
        roster = self.roster
        roster.may_change(verb)
        state = roster.planned(before, collection, renamed or {})
        if self._opened is not None:
            self._opened = store.commit(self._opened, collection, note=what)
            collection = self._opened.collection
        self._collection = collection
        roster.become(replace(state, collection=collection))
        # segments may have been joined on the way
        return replace(change, nbytes=(change.nbytes[0], self.nbytes))
