"""A collection of adapters as a user holds it: looked at, changed, saved and given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraspan import store
from loraspan._default_device import cpu_by_default
from loraspan.collection.absorb import absorb
from loraspan.collection.changes import Change, compare
from loraspan.collection.collection import Collection
from loraspan.collection.fit import Progress
from loraspan.collection.layout import collection_bytes, parse_bytes
from loraspan.collection.refit import refit
from loraspan.collection.started import start
from loraspan.collection.summary import summarize
from loraspan.collection.trained import keep
from loraspan.collection.update import add, remove, rename, replace_tasks
from loraspan.errors import ArgumentError
from loraspan.serve.attached import Attached
from loraspan.space import writing
from loraspan.space.held import Held


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

    @cpu_by_default
    def save(self, path: str | Path, *, overwrite: bool = False, note: str = "save") -> None:
        """Write the collection to a folder, as a new store or, with ``overwrite``, a new generation of one.

        From then on each change is written there at once.

        Args:
            path: the folder, by custom ``name.span``.
            overwrite: whether a store that is there may get a new generation.
            note: kept with the generation, for :func:`loraspan.store.log`.

        Raises:
            StoreError: if the folder is there and may not be written, or another writer was faster; nothing changes. Or
                if the last step may not outlast a loss of power: it says so, and the space is the one of the folder.
        """
        opened, fault = writing.save(self.collection, Path(path), overwrite=overwrite, note=note)
        self._opened, self._collection = opened, opened.collection
        if self._roster is not None:
            # the same bits, from other pages
            self._roster.become(replace(self._roster.state, collection=self._collection))
        if fault is not None:
            raise fault

    @cpu_by_default
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
            StoreError: if the store cannot be written, or another writer was faster. Nothing is changed then; but if
                only the last step may not outlast a loss of power, it says so, and the change is made.
        """
        read = self._read(adapters)
        added = add(self.collection, read, max_error=max_error, report=progress)
        return self._become(added, "add", [adapter.name for adapter in read], dry_run)

    @cpu_by_default
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

    @cpu_by_default
    def rename(self, old: str, new: str, *, dry_run: bool = False) -> Change:
        """Give a task another name.

        Args:
            old: of a task.
            new: that no task has.
            dry_run: change nothing, and say what would change.

        Raises:
            UnknownTaskError: if there is no such task.
            MismatchError: if the new name is taken.
            StoreError: as :meth:`add`.
        """
        renamed = rename(self.collection, {old: new})
        return self._become(renamed, "rename", [old, "to", new], dry_run, renamed={old: new})

    @cpu_by_default
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

    @cpu_by_default
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
        then on: a task's error before, and what it lost since. With ``max_forgetting`` alone, bases that would take
        more bytes than those that are there are not taken: then nothing is lost, and ``refitted`` of the change is
        false.

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

    @cpu_by_default
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

    @cpu_by_default
    def start(
        self, name: str, *, like: str | None = None, lora_rank: int | None = None, seed: int = 0, dry_run: bool = False
    ) -> Change:
        """Start a task that is to be trained, like another or from nothing: see :meth:`keep`.

        There is no adapter that it could differ from, so its error is 0, of the kind ``"trained"``.

        Args:
            name: of the task.
            like: the task whose columns, extras and configuration it begins with, bit for bit.
            lora_rank: the columns that it begins with in every slot that has both bases and is no expert's, at most
                their width: left ends zeros, so that it gives nothing yet, right ends random. Others stay the model's.
            seed: of these.
            dry_run: change nothing, and say what would change.

        Raises:
            MismatchError: if the name is taken.
            UnknownTaskError: if there is no task ``like``.
            ArgumentError: unless one of ``like`` and ``lora_rank`` is given; or if no slot has both bases.
            StoreError: as :meth:`add`.
        """
        started = start(self.collection, name, like=like, lora_rank=lora_rank, seed=seed)
        return self._become(started, "start", [name], dry_run)

    @cpu_by_default
    def keep(self, served: Attached, names: str | Sequence[str] | None, *, dry_run: bool = False) -> Change:
        """Put loadings that were trained in the place of those of their tasks, which move to the end.

        Bases, other tasks and private columns stay as they are, bit for bit; so do tasks whose loadings did not change.
        A task keeps its number, and the model goes on training. The task has no original adapter any more: its error is
        that of what is stored against what was trained, on these bases, and of the kind ``"trained"``; what refits take
        from it counts anew.

        Args:
            served: a model that is attached to this space with ``train=True``.
            names: of a task, or of several; None for all.
            dry_run: change nothing, and say what would change.

        Raises:
            UnknownTaskError: if there is no such task.
            ArgumentError: if the model is detached, attached to another space or without ``train=True``, or another one
                is being trained; if ``names`` has another form, such as that of a mixture; or if nothing was trained.
            UnsupportedError: if the model does not serve a task.
            NotFiniteError: if a loading is NaN or infinite.
            StoreError: as :meth:`add`. Nothing is changed then.

        Example:
            >>> import torch, loraspan
            >>> from loraspan.adapters import Adapter, Slot
            >>> space = loraspan.compress([Adapter("one", {"0": Slot(torch.eye(1, 2), torch.eye(2, 1), 3.0)})], rank=1)
            >>> _ = space.start("two", lora_rank=1)
            >>> served = loraspan.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), space, train=True)
            >>> optimizer = torch.optim.SGD(served.loadings().values(), lr=0.1)
            >>> with served.tasks("two"):
            ...     served(torch.ones(1, 2)).sum().backward()
            >>> optimizer.step()
            >>> space.keep(served, "two").added
            {'two': 0.0}
        """
        if not isinstance(served, Attached) or served.roster is not self.roster:
            other = "one of another space" if isinstance(served, Attached) else type(served).__name__
            raise ArgumentError(f"keep: needs a model that trains on the bases of this very space; got {other}")
        kept = keep(self.collection, served.trained(names))
        changed = [task.name for task in kept.segments[-1].tasks if task is not None]
        return self._become(kept, "keep", changed, dry_run, trainer=served)

    def _become(
        self,
        collection: Collection,
        verb: str,
        names: Sequence[str],
        dry_run: bool,
        renamed: Mapping[str, str] | None = None,
        trainer: Attached | None = None,
    ) -> Change:
        """Take the place of what is held: on disk first, where there is a store; then attached models are told."""
        before = self._collection
        collection = replace(collection, summary=summarize(collection, self._bytes_of(collection)))
        what = writing.note_of(verb, names)
        change = compare(what, before, collection, (self.nbytes, self._bytes_of(collection)), dry_run=dry_run)
        if dry_run:
            # segments may be joined, or written anew without the removed tasks
            planned = None if self._opened is None else store.forecast(self._opened, collection)
            return replace(change, nbytes=(change.nbytes[0], planned or change.nbytes[1]))
        roster = self.roster
        roster.may_change(verb, by=trainer)
        state = roster.planned(before, collection, renamed or {}, () if trainer is None else names)
        self._opened, fault = writing.commit(self._opened, collection, note=what)
        self._collection = collection if self._opened is None else self._opened.collection
        roster.become(replace(state, collection=self._collection))
        if fault is not None:
            raise fault
        # segments may have been joined on the way
        return replace(change, nbytes=(change.nbytes[0], self.nbytes))
