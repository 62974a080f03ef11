"""What a space holds, and what it gives: numbers, reports, adapters, files and models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraspan import store
from loraspan._default_device import cpu_by_default
from loraspan.adapters import check_together, read_all
from loraspan.adapters.base import Adapter
from loraspan.collection.collection import Collection
from loraspan.collection.fit import Progress
from loraspan.collection.layout import basis_file_bytes, collection_bytes, manifest_bytes, segment_bytes
from loraspan.collection.plans import PlanLine
from loraspan.collection.project import Projection, project
from loraspan.collection.rebuild import rebuild
from loraspan.collection.summary import Report, make_report
from loraspan.errors import ArgumentError, MismatchError
from loraspan.many import Aside
from loraspan.serve.batches import ids_of_names, plain_numbers
from loraspan.serve.export import export
from loraspan.serve.peft import as_peft
from loraspan.serve.peft_swap import swap_peft
from loraspan.serve.roster import Roster

if TYPE_CHECKING:
    from peft import PeftModel


class Held:
    """A collection, where it is stored, and all that can be asked of it without a change.

    Args:
        collection: bases and tasks.
        opened: the generation of a store that holds it, if one does.
        plans: those that a compression counted.
        aside: the adapters that a compression left out.
    """

    def __init__(
        self,
        collection: Collection,
        opened: store.Opened | None = None,
        plans: tuple[PlanLine, ...] = (),
        aside: Sequence[Aside] = (),
    ) -> None:
        self._collection, self._opened, self._plans, self._aside = collection, opened, plans, tuple(aside)
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
        numbers = plain_numbers(names, self.roster.state.numbers)
        return torch.tensor(numbers, device="cpu") if numbers else ids_of_names(names, self.roster.number)

    @property
    def errors(self) -> dict[str, float]:
        """Every task's relative Frobenius error on ``dW`` over all its slots, rounding of what is stored included."""
        return {task.name: task.error for task in self.collection.tasks}

    @property
    @cpu_by_default
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

    @property
    def aside(self) -> tuple[Aside, ...]:
        """The adapters that :func:`loraspan.compress` left out with ``on_error="skip"``: source, name and reason.

        What made this object is told, not the store: one that is opened has none.
        """
        return self._aside

    @cpu_by_default
    def report(self) -> Report:
        """Give every task's error and bytes, every slot's form, and the plans that a compression counted.

        ``str()`` of it is a table.
        """
        return replace(make_report(self.collection, self.nbytes), plans=self._plans)

    @cpu_by_default
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

    @cpu_by_default
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

    def __repr__(self) -> str:
        return f"Subspace({len(self.tasks)} tasks, {len(self.collection.slots)} slots, {self.nbytes:,} bytes)"
