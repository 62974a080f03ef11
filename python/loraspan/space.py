"""A collection of adapters as a user holds it: looked at, changed, saved and given back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraspan import store
from loraspan.adapters import check_together, read_all
from loraspan.adapters.base import Adapter
from loraspan.collection.absorb import absorb
from loraspan.collection.changes import Change, compare
from loraspan.collection.collection import Collection
from loraspan.collection.fit import Progress
from loraspan.collection.layout import (
    basis_file_bytes,
    collection_bytes,
    manifest_bytes,
    parse_bytes,
    segment_bytes,
)
from loraspan.collection.plans import PlanLine
from loraspan.collection.project import Projection, project
from loraspan.collection.rebuild import rebuild
from loraspan.collection.refit import refit
from loraspan.collection.summary import Report, make_report, summarize
from loraspan.collection.update import add, remove, rename, replace_tasks
from loraspan.errors import ArgumentError, MismatchError
from loraspan.serve.batches import ids_of_names
from loraspan.serve.export import export
from loraspan.serve.peft import as_peft
from loraspan.serve.peft_swap import swap_peft
from loraspan.serve.roster import Roster

if TYPE_CHECKING:
    from peft import PeftModel

# names of tasks that a note tells one by one
_NAMED = 3
# and so much of each: a name may be longer than a note
_SHOWN = 200


class Subspace:
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

    def __init__(
        self, collection: Collection, opened: store.Opened | None = None, plans: tuple[PlanLine, ...] = ()
    ) -> None:
        self._collection, self._opened, self._plans = collection, opened, plans
        self._roster: Roster | None = None

    @property
    def collection(self) -> Collection:
        """Bases and tasks, which no call changes: each change makes another collection."""
        return self._collection

    @property
    def path(self) -> Path | None:
        """The folder that changes are written to, None for a space that was not saved yet."""
        return None if self._opened is None else self._opened.folder

    @property
    def generation(self) -> int | None:
        """The generation of the store that this space is at, None for one that was not saved yet."""
        return None if self._opened is None else self._opened.generation

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the order in which they came."""
        return [task.name for task in self.collection.tasks]

    @property
    def roster(self) -> Roster:
        """The numbers of the tasks, and the models that are attached to this space."""
        if self._roster is None:
            self._roster = Roster(self._collection)
        return self._roster

    def ids(self, names: str | Sequence[str | None] | Sequence[Sequence[str | None]] | None) -> Tensor:
        """Give the numbers of tasks, as an attached model takes them.

        A task keeps its number as long as it is in this object, also when it is renamed or refitted. No other task gets
        it, ever: what comes in its place, even under its name, has a number of its own.

        Args:
            names: of one task; or of one per row; or, per token, a list for each row, of one length. None is no task,
                which is -1.

        Returns:
            int64 on the CPU: ``[1]``, ``[B]`` or ``[B, T]``.

        Raises:
            UnknownTaskError: if there is no such task.
            ArgumentError: if ``names`` has another form.

        Example:
            >>> import torch
            >>> from loraspan import compress
            >>> from loraspan.adapters import Adapter, Slot
            >>> space = compress([Adapter("sql", {"q": Slot(torch.eye(1, 2), torch.eye(2, 1), 1.0)})], rank=1)
            >>> space.ids([None, "sql"])
            tensor([-1,  0])
        """
        return ids_of_names(names, self.roster.number)

    @property
    def errors(self) -> dict[str, float]:
        """Every task's relative Frobenius error on ``dW`` over all its slots, rounding of what is stored included."""
        return {task.name: task.error for task in self.collection.tasks}

    @property
    def nbytes(self) -> int:
        """Bytes of all files of a generation that holds this collection: bases, columns, extras and records."""
        return self._bytes_of(self.collection)

    @property
    def source_nbytes(self) -> int:
        """Bytes of the factors of the original adapters, in their own dtypes."""
        return sum(task.factor_bytes for task in self.collection.tasks)

    @property
    def summary(self) -> str:
        """One sentence: how much the tasks share, which form was chosen, what it costs and loses."""
        return self.collection.summary

    def report(self) -> Report:
        """Give every task's error and bytes, every slot's form, and the plans that a compression counted.

        ``str()`` of it is a table.
        """
        return replace(make_report(self.collection, self.nbytes), plans=self._plans)

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

    def project(self, adapter: Any, *, max_error: float = 0.05) -> Projection:
        """Say what the bases carry of an adapter, and what adding it would cost. Nothing changes.

        Args:
            adapter: as a source of :func:`loraspan.compress`; it names one adapter.
            max_error: the relative error for which the cost is counted.

        Returns:
            Its error with shared ends alone, in all and for each slot, the worst slots first; the share of its energy
            outside the subspace; its loadings; and the bytes and private columns that adding it would take.

        Raises:
            ArgumentError: if not one adapter is named, or ``max_error`` is out of range.
            FormatError, UnsupportedError, MismatchError, NotFiniteError: as :func:`loraspan.compress`.
        """
        adapters = self._read(adapter)
        if len(adapters) != 1:
            raise ArgumentError(f"project: takes one adapter; got {len(adapters)}")
        return project(self.collection, adapters[0], max_error=max_error)

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

    def _read(self, sources: Any) -> Sequence[Adapter]:
        """Read adapters that are to join, and refuse those of another base model."""
        adapters: Sequence[Adapter] = read_all(sources)
        check_together(adapters)
        mine = (self.collection.base_model or "").rstrip("/")
        for adapter in adapters:
            theirs = (adapter.source.base_model or "").rstrip("/")
            if mine and theirs and mine != theirs:
                raise MismatchError(
                    f"adapter {adapter.name!r} is for base model {theirs!r}, this space for {mine!r}: "
                    f"it belongs in a space of its own"
                )
        return adapters

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

    def _bytes_of(self, collection: Collection) -> int:
        """Count what is not there yet; what is there has a size."""
        if self._opened is None:
            return collection_bytes(collection)
        if collection is self._opened.collection:
            return store.nbytes(self._opened)
        known = {
            id(held.columns): data.size
            for held, data in zip(self._opened.collection.segments, self._opened.segments, strict=True)
        }
        same = all(self._opened.collection.slots.get(path) is space for path, space in collection.slots.items())
        total = self._opened.basis.size if same else basis_file_bytes(collection)
        for segment in collection.segments:
            total += known.get(id(segment.columns)) or segment_bytes(segment)
        return total + manifest_bytes(collection)

    def reconstruct(self, name: str, *, dtype: torch.dtype = torch.float32) -> Adapter:
        """Give a task back as an adapter: balanced factors, scale 1, extras as they came.

        Args:
            name: of the task.
            dtype: of the factors: float32, bfloat16 or float16.

        Raises:
            UnknownTaskError: if there is no such task.
            ArgumentError: if ``dtype`` is none of those.
            NotFiniteError: if a factor overflows ``dtype``.
        """
        return rebuild(self.collection, name, dtype=dtype)

    def export(
        self,
        names: str | Sequence[str] | None,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        rank_multiple: int | None = None,
        ranks: Sequence[int] | None = None,
        engine: str | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Path]:
        """Write tasks as PEFT adapters, and give the folder of each: see :func:`loraspan.serve.export.export`.

        Args:
            names: of one task, whose folder is ``folder``; or of several, or None for all: folders in ``folder``, with
                names that are safe whatever the tasks are called, and an index.
            folder: to be made.
            dtype: of the factors; ``None`` takes that of the original's factors.
            rank_multiple: pad all factors of a task to one rank, a multiple of this.
            ranks: pad them to one of these ranks.
            engine: ``"vllm"`` pads as vLLM needs it, and refuses what it cannot take.
            progress: called with a stage, how much of it is done, and how much there is.

        Raises:
            UnknownTaskError: if there is no such task.
            ArgumentError, UnsupportedError, NotFiniteError, StoreError: as that function.
        """
        return export(
            self.collection,
            names,
            folder,
            dtype=dtype,
            rank_multiple=rank_multiple,
            ranks=ranks,
            engine=engine,
            progress=progress,
        )

    def as_peft(
        self, model: nn.Module, tasks: str | Sequence[str] | Mapping[str, str], *, rank: int | None = None
    ) -> PeftModel:
        """Give a ``PeftModel`` with tasks as its adapters, no file written: see :func:`loraspan.serve.peft.as_peft`.

        Args:
            model: the base model, whose layers PEFT wraps.
            tasks: a name, for the adapter ``"default"``; several, for adapters of their names; or a dict from names of
                adapters to those of tasks.
            rank: make room for tasks of this rank, for :meth:`swap_peft`.

        Raises:
            UnknownTaskError: if there is no such task.
            ArgumentError, MismatchError, UnsupportedError, BackendError: as that function.
        """
        return as_peft(self.collection, model, tasks, rank=rank)

    def swap_peft(self, model: nn.Module, task: str, *, adapter_name: str = "default") -> None:
        """Put a task in the place of an adapter of a live PEFT model: see :func:`loraspan.serve.peft_swap.swap_peft`.

        Args:
            model: of :meth:`as_peft`, or PEFT's own; compiled or not.
            task: its name.
            adapter_name: of the adapter that it replaces.

        Raises:
            UnknownTaskError: if there is no such task.
            ArgumentError, MismatchError, ShapeError, UnsupportedError, BackendError: as that function.
        """
        swap_peft(self.collection, model, task, adapter_name=adapter_name)

    def __repr__(self) -> str:
        return f"Subspace({len(self.tasks)} tasks, {len(self.collection.slots)} slots, {self.nbytes:,} bytes)"
