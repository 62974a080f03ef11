"""Turn a model into one that serves every task of a space, row by row, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loraspan.errors import ArgumentError, UnsupportedError
from loraspan.serve.batches import Names, key_of, plain_numbers, rows_of_names, rows_of_numbers
from loraspan.serve.layer import DTYPES, Served
from loraspan.serve.layers import Layers
from loraspan.serve.roster import Roster
from loraspan.serve.rows import Board, Rows, check_ids, rows_of_ids
from loraspan.serve.tables import State

# batches of names that are remembered
_REMEMBERED = 1024


class Space(Protocol):
    """What is attached: a :class:`loraspan.Subspace`."""

    @property
    def roster(self) -> Roster:
        """Numbers of tasks, and who is told of them."""


def attach(
    model: nn.Module,
    space: Space,
    *,
    paths: Callable[[str], str | None] | None = None,
    dtype: torch.dtype | None = None,
    train: bool = False,
) -> Attached:
    """Let a model serve every task of a space: each row of a batch has its own.

    Modules that the tasks adapt are replaced, in the model, by layers that run them and add what the row's task makes
    of their input. The modules themselves are not touched, nor copied: they may be of any dtype, quantized, on several
    devices. Where PEFT has put a LoRA layer, it is the base of that layer which is replaced, and PEFT's own adapters go
    on working, as part of what is the base model here. Tasks that come to the space, leave it or are refitted are
    followed. It takes the memory of the coefficients of all tasks, and no more.

    Args:
        model: any module whose modules lie where the adapters' did: with the same paths, or paths that end alike, as in
            a model that something wraps or one without its head.
        space: the tasks.
        paths: gives the model's path of a module for an adapter's, where they differ otherwise; None for its own way.
        dtype: of bases and coefficients: float16, bfloat16, float32 or float64. None takes that of each module's weight
            where it is one of these, else what is stored; on the CPU, what is packed in 8 or 4 bits stays so (compiled
            graphs take no packed tables: name a dtype there).
        train: make weights and shared loadings of all tasks leaves that require gradients, listed by
            :meth:`Attached.loadings`; bases stay frozen. The space may not change then.

    Returns:
        The model in a wrapper, see :class:`Attached`.

    Raises:
        ArgumentError: if the model is attached already, or ``dtype`` is none of those.
        MismatchError: if a slot matches no module, several, or one of another shape; all are listed.
        UnsupportedError: if a module is of a kind that cannot be served; names it.
        In each case the model is as it was.

    Example:
        >>> from loraspan import compress
        >>> from loraspan.adapters import Adapter, Slot
        >>> one = Adapter("one", {"0": Slot(torch.eye(1, 2), torch.eye(2, 1), scale=3.0)})
        >>> space = compress([one], rank=1)
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False)).requires_grad_(False)
        >>> _ = model[0].weight.copy_(torch.eye(2))
        >>> served = attach(model, space)
        >>> with served.tasks(["one", None]):
        ...     served(torch.ones(2, 2))
        tensor([[4., 1.],
                [1., 1.]])
        >>> served.detach() is model
        True

    Source:
        Serving from a shared basis: Gabrielsson et al., *Compress then Serve*, 2024, section 4.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"attach: dtype is float16, bfloat16, float32, float64 or None; got {dtype!r}")
    if any(isinstance(module, (Served, Attached)) for module in model.modules()):
        raise ArgumentError(
            "attach: the model is attached already: detach it first, or attach the other space to a copy"
        )
    return Attached(model, space.roster, paths=paths, dtype=dtype, train=train)


class Attached(nn.Module):
    """A model that serves tasks; made by :func:`attach`. What it lacks itself, such as ``generate``, is the model's.

    Which tasks the rows of a batch have is said by a context, for eager code::

        with served.tasks(["sql", None, {"legal": 0.7, "sql": 0.3}]):
            served.generate(**batch)

    or by tensors, for graphs and for servers::

        served(**batch, task_ids=space.ids(["sql", None]))

    Without either the output is the base model's, bit for bit, as it is for rows without a task.

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
        if task_ids is None and task_shares is None:
            self._board.check()
            return self.model(*args, **kwargs)
        task_ids = check_ids("attach", task_ids, task_shares)
        rows = rows_of_ids(task_ids, task_shares, lasting=False)
        if torch.compiler.is_dynamo_compiling():
            return self._traced(rows, args, kwargs)
        self._board.check()
        self._check_numbers(task_ids)
        token = self._board.context.set(rows)
        try:
            return self.model(*args, **kwargs)
        finally:
            self._board.context.reset(token)

    @contextlib.contextmanager
    def tasks(self, names: Names | Tensor, *, per: str = "row") -> Iterator[Attached]:
        """Say which tasks rows have, for the eager code inside, in this thread or coroutine alone.

        Contexts nest, and the innermost counts. A batch of names that came before is remembered.

        Args:
            names: of one task for all rows, or None for the base model; or a list with one per row, each a name, None,
                or a mixture, a dict from names to weights.
            per: ``"row"``; or ``"token"``, for packed batches: then a list of such lists, of one length.

        Raises:
            UnknownTaskError: if there is no such task.
            UnsupportedError: if this model cannot serve a task; says why.
            ArgumentError: if ``names`` has another form.

        Example:
            See :func:`loraspan.attach`.
        """
        self._board.check()
        token = self._board.context.set(self._rows_of(names, per))
        try:
            yield self
        finally:
            self._board.context.reset(token)

    def loadings(self) -> dict[str, Tensor]:
        """Give the tensors that are trained, of a model attached with ``train=True``, by slot and name."""
        return {
            f"{tables.path}.{name}": leaf
            for tables in self._layers.tables()
            if tables.form.train
            for name, leaf in tables.loadings.items()
        }

    @property
    def table_bytes(self) -> int:
        """Bytes of the bases and tables of all slots, spare room included."""
        return sum(tables.nbytes for tables in self._layers.tables())

    def detach(self) -> nn.Module:
        """Put the very modules back, and give the model. What is attached serves nothing from then on."""
        self._layers.undo()
        self._roster.leave(self)
        self._board.stopped = "is detached: attach again"
        return self.model

    def may_change(self, operator: str) -> None:
        """Raise if the space may not change now: its loadings are being trained."""
        if self._train and self._board.stopped is None:
            raise ArgumentError(
                f"{operator}: a model is attached to this space with train=True, whose loadings would not follow: "
                f"detach it first"
            )

    def follow(self, state: State) -> None:
        """Serve the space as it is now. Called by the space, after each change of it."""
        try:
            self._layers.follow(state)
        except BaseException as error:
            self._board.stopped = f"could not follow a change of the space ({error}): detach, and attach again"
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
        wrong = self._layers.state.strangers(ids.numpy())
        if wrong:
            raise ArgumentError(
                f"attach: task_ids are numbers of tasks in the space, as space.ids gives, or -1; no task that is "
                f"served has {self._roster.told(wrong)}"
            )
