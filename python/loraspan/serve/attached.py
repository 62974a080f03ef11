"""A model that serves the tasks of a space, row by row."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraspan.collection.trained import Loadings
from loraspan.errors import ArgumentError, UnsupportedError
from loraspan.serve.batches import Names, key_of, plain_numbers, rows_of_names, rows_of_numbers
from loraspan.serve.layers import Layers
from loraspan.serve.roster import Roster
from loraspan.serve.rows import Board, Rows, check_ids, rows_of_ids
from loraspan.serve.tables import State
from loraspan.serve.trained import trained_of

# batches of names that are remembered
_REMEMBERED = 1024


class Attached(nn.Module):
    """A model that serves tasks; made by :func:`attach`. What it lacks itself, such as ``generate``, is the model's.

    Which tasks the rows of a batch have is said by a context, for eager code::

        with served.tasks(["sql", None, {"legal": 0.7, "sql": 0.3}]):
            served.generate(**batch)

    or by tensors, for graphs and for servers::

        served(**batch, task_ids=space.ids(["sql", None]))

    Without either the output is the base model's, bit for bit, as it is for rows without a task (where rows do not meet
    before: how many of them an expert takes may change how the base rounds).

    A compiled graph takes the tensors and is compiled once, whatever the tasks are. What the model is called with may
    have more rows than were named, a multiple: the beams of a search. The batch has to be the first axis of every
    activation that meets an adapted module, or its rows be laid one after another. A call with tensors waits for no GPU
    and reads nothing back; on a GPU a row whose task has left gets NaN, where the CPU raises an error.

    Attributes:
        model: the very model, with served layers in it.
    """

    def __init__(
        self,
        model: nn.Module,
        roster: Roster,
        *,
        paths: Callable[[str], str | None] | None,
        dtype: torch.dtype | None,
        train: bool,
    ) -> None:
        super().__init__()
        self.training = model.training
        self._board, self._roster = Board(), roster
        self._train = train
        self._remembered: dict[Any, Rows | None] = {}
        self._layers = Layers(model, roster.state, self._board, paths, dtype, train)
        self.model = model
        roster.join(self)
        # a model whose wrapper nobody has could be asked for no task, nor be detached
        self._undo = weakref.finalize(self, self._layers.undo)
        self._undo.atexit = False

    def forward(
        self, *args: Any, task_ids: Tensor | None = None, task_shares: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Run the model.

        Args:
            *args: the model's own.
            task_ids: int64 ``[B]``, numbers of :meth:`Subspace.ids`, -1 for none; ``[B, T]`` for a task per token.
                ``None`` leaves it to the context.
            task_shares: float32, for mixtures: both tensors then have the members of a row's or token's mixture as
                another, last axis.
            **kwargs: the model's own.

        Raises:
            ShapeError: if the tensors have another form, or an activation's rows are no multiple of theirs.
            ArgumentError: if a number is of no task, on the CPU.
        """
        self._board.check()
        if task_ids is None and task_shares is None:
            return self.model(*args, **kwargs)
        task_ids = check_ids("attach", task_ids, task_shares)
        rows = rows_of_ids(task_ids, task_shares, lasting=False)
        if torch.compiler.is_dynamo_compiling():
            return self._traced(rows, args, kwargs)
        self._check_numbers(task_ids)
        token = self._board.context.set(rows)
        try:
            return self.model(*args, **kwargs)
        finally:
            self._board.context.reset(token)

    @contextlib.contextmanager
    def tasks(self, names: Names | Tensor, *, per: str = "row") -> Iterator[Attached]:
        """Say which tasks rows have, for the eager code inside, in this thread or coroutine alone.

        Contexts nest, and the innermost counts. A batch of names that came before is remembered. A thread that is begun
        inside has no tasks; a generator that yields inside has those of whoever asks for its next step, which is told
        at its end at the latest. Open the context around what runs the model, or give ``task_ids``.

        Args:
            names: of one task for all rows, or None for the base model; or a list with one per row, each a name, None,
                or a mixture, a dict from names to weights.
            per: ``"row"``; or ``"token"``, for packed batches: then a list of such lists, of one length.

        Raises:
            UnknownTaskError: if there is no such task.
            UnsupportedError: if this model cannot serve a task; says why.
            ArgumentError: if ``names`` has another form, or the block is left elsewhere than it was entered.

        Example:
            See :func:`loraspan.attach`.
        """
        self._board.check()
        rows = self._rows_of(names, per)
        token = self._board.context.set(rows)
        try:
            yield self
        finally:
            self._board.leave(token, rows)

    def loadings(self) -> dict[str, Tensor]:
        """Give the tensors that are trained, of a model attached with ``train=True``, by slot and name.

        Each holds all tasks. Gradients are 0 where a task is not in the batch, but decay of weights is not.
        """
        return {
            f"{tables.path}.{name}": leaf
            for tables in self._layers.tables()
            if tables.form.train
            for name, leaf in tables.loadings.items()
        }

    def trained(self, names: str | Sequence[str] | None) -> dict[str, dict[str, Loadings]]:
        """Give copies of what was trained, by task and slot: what :meth:`loraspan.Subspace.keep` puts into the space.

        Args:
            names: of a task, or of several; None for all.

        Raises:
            UnknownTaskError: if there is no such task.
            UnsupportedError: if this model does not serve a task; says why.
            ArgumentError: if nothing is trained here, or ``names`` has another form, such as that of a mixture.
        """
        self._board.check()
        if not self._train:
            raise ArgumentError("keep: the model is attached without train=True, so that nothing is trained in it")
        return trained_of(self._layers, names)

    @property
    def roster(self) -> Roster:
        """Of the space that it is attached to."""
        return self._roster

    @property
    def table_bytes(self) -> int:
        """Bytes of the bases and tables of all slots, spare room included."""
        return sum(tables.nbytes for tables in self._layers.tables())

    def detach(self) -> nn.Module:
        """Put the very modules back, and give the model. What is attached serves nothing from then on."""
        self._undo()
        self._roster.leave(self)
        self._board.stopped = "is detached: attach again"
        return self.model

    def may_change(self, operator: str) -> None:
        """Raise if the space may not change now: its loadings are being trained."""
        if self._train and self._board.stopped is None:
            raise ArgumentError(
                f"{operator}: a model is attached to this space with train=True, whose loadings would not follow: "
                f"keep what it trained, and detach it first"
            )

    def follow(self, state: State) -> None:
        """Serve the space as it is now. Called by the space, after each change of it."""
        try:
            self._layers.follow(state)
        except BaseException as error:
            self._board.stopped = f"could not follow a change of the space ({error}): detach, and attach again"
            self._layers.stop()
            raise
        finally:
            self._remembered = {}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Give that of the model."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load one of the model."""
        return self.model.load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(super().__getattr__("model"), name)

    def _traced(self, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run within a graph that is being compiled, which has to be whole: between two of them threads could meet."""
        from loraspan.serve.outside import whole

        self._board.traced = rows
        try:
            with whole():
                return self.model(*args, **kwargs)
        finally:
            self._board.traced = None

    def _rows_of(self, names: Names | Tensor, per: str) -> Rows | None:
        if isinstance(names, Tensor):
            check_ids("tasks", names, None)
            self._check_numbers(names)
            return rows_of_ids(names, None, lasting=True)
        # taken before the state is looked at: a change of the space puts a new one in its place
        remembered = self._remembered
        numbers = plain_numbers(names, self._layers.state.numbers) if per == "row" else None
        key = numbers or key_of(names, per)
        if key not in remembered:
            # to be remembered where there are gradients too
            with torch.inference_mode(False):
                rows = rows_of_numbers(numbers) if numbers else rows_of_names(names, per, self._number)
            if len(remembered) >= _REMEMBERED:
                remembered.clear()
            remembered[key] = rows
            return rows
        return remembered[key]

    def _number(self, name: str | None) -> int:
        if name is not None and (reason := self._layers.refused.get(name)) is not None:
            raise UnsupportedError(f"tasks: this model does not serve task {name!r}: {reason}")
        return self._roster.number(name)

    def _check_numbers(self, ids: Tensor) -> None:
        if not ids.is_cpu or torch.compiler.is_compiling():
            return
        wrong = self._layers.state.strangers(ids)
        if wrong:
            raise ArgumentError(
                f"attach: task_ids are numbers of tasks in the space, as space.ids gives, or -1; no task that is "
                f"served has {self._roster.told(wrong)}"
            )
