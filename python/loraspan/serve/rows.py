"""Which tasks the rows of a batch have, and how a layer gets to know."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from contextvars import ContextVar, Token

import torch
from torch import Tensor

from loraspan.errors import ArgumentError, ShapeError

# what a Rows keeps of its answers: a prompt, then tokens one at a time, on a few devices
_KEPT = 16


class Rows:
    """The tasks of a batch, row by row or token by token.

    Attributes:
        ids: int64, numbers of tasks, -1 for none: ``[R]``, or ``[R, m]`` with shares; per token ``[R, T]`` or
            ``[R, T, m]``. One row stands for any number of them.
        shares: float32 like ``ids``, the weight of each task in its row or token; None for ones.
        per: ``"row"`` or ``"token"``.
        lasting: whether it is asked again after the call that it was made for.
    """

    __slots__ = ("_lasting", "_seen", "ids", "per", "shares")

    def __init__(self, ids: Tensor, shares: Tensor | None = None, per: str = "row", *, lasting: bool = True) -> None:
        self.ids, self.shares, self.per, self._lasting = ids, shares, per, lasting
        self._seen: dict[object, tuple[Tensor, Tensor | None]] = {}

    def of(self, lead: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Give tasks and shares of an activation ``[*lead, .]`` whose rows lie one after another.

        A row's task is that of all its tokens; where there are more rows than were named, each of ours stands for as
        many in a row: the beams of a search.

        Args:
            lead: all axes but the last; the first, or all as one, counts rows.
            device: where to give them.

        Returns:
            ``[N]``, or ``[N, m]`` with shares, and the shares or None, ``N`` the product of ``lead``.

        Raises:
            ShapeError: if the activation has no multiple of the rows, or other tokens than were named.

        Example:
            >>> Rows(torch.tensor([5, -1])).of((4, 1), torch.device("cpu"))[0]
            tensor([ 5,  5, -1, -1])
        """
        if torch.compiler.is_compiling():
            return self._made(lead, device)
        key = (tuple(lead), device)
        found = self._seen.get(key)
        if found is None:
            # what is kept may be asked for again where there are gradients
            with torch.inference_mode(False):
                found = self._made(lead, device)
            if len(self._seen) >= _KEPT:
                self._seen.clear()
            # what a capture gives has no values until the graph runs, and is for that graph alone
            if not (self._lasting and device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                self._seen[key] = found
        return found

    def _made(self, lead: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
        rows, tokens = self.ids.shape[0], self.ids.shape[1] if self.per == "token" else 1
        count = math.prod(lead)
        whole = lead[0] % rows == 0 if lead else rows == 1
        if self.per == "token" and whole:
            whole = count % (rows * tokens) == 0 and (len(lead) == 1 or math.prod(lead[1:]) == tokens)
        if not whole:
            named = f"{rows} rows" if self.per == "row" else f"{rows} rows of {tokens} tokens"
            raise ShapeError(
                f"tasks: an activation of leading axes {list(lead)} needs tasks for rows that divide its first axis"
                f"{' and for its tokens' if self.per == 'token' else ''}; they were named for {named}"
            )
        times = count // (rows * tokens)
        ids = _repeated(self.ids, times, self.per, device)
        return ids, None if self.shares is None else _repeated(self.shares, times, self.per, device)


def _repeated(tensor: Tensor, times: int, per: str, device: torch.device) -> Tensor:
    """Give ``[R, ...]`` with every row ``times`` times, tokens flat."""
    tensor = tensor.to(device, non_blocking=True)
    if times != 1:
        rows, *rest = tensor.shape
        tensor = tensor[:, None].expand(rows, times, *rest).reshape(rows * times, *rest)
    return tensor.flatten(0, 1) if per == "token" else tensor


class Board:
    """What the layers of one attached model are to serve now.

    Eager code keeps it in a context variable, so that threads and coroutines have their own. A graph that is being
    compiled cannot read one: there it is an attribute, set and put back within the trace, which no running code reads.
    """

    def __init__(self) -> None:
        self.context: ContextVar[Rows | None] = ContextVar("loraspan tasks", default=None)
        self.traced: Rows | None = None
        # why nothing is served any more
        self.stopped: str | None = None

    def current(self) -> Rows | None:
        """Give the tasks of the rows, None for the base model's own output. For eager code."""
        self.check()
        return self.context.get()

    def leave(self, token: Token[Rows | None], rows: Rows | None) -> None:
        """Go back to what was served before a block, whose tasks were ``rows``.

        Raises:
            ArgumentError: if the block was not around what ran last, as where a generator yields inside it.
        """
        inside = self.context.get() is rows
        with contextlib.suppress(ValueError):
            self.context.reset(token)
            if inside:
                return
        raise ArgumentError(
            "tasks: a block was left elsewhere than it was entered (in another thread, coroutine or order, as where a "
            "generator yields inside it), so that what ran meanwhile may have had other tasks, or none: name them "
            "around each step, or give task_ids"
        )

    def check(self) -> None:
        """Refuse to serve what has stopped.

        Raises:
            ArgumentError: says why.
        """
        if self.stopped is not None:
            raise ArgumentError(f"the attached model {self.stopped}")


def check_ids(operator: str, ids: object, shares: object) -> Tensor:
    """Give ``ids``, if they and ``shares`` are tensors of numbers of tasks and of weights.

    Raises:
        ShapeError: names what it needs and got.
    """
    if isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.ndim and ids.shape[0]:
        if shares is None and ids.ndim <= 2:
            return ids
        alike = isinstance(shares, Tensor) and shares.dtype == torch.float32 and shares.shape == ids.shape
        if alike and 2 <= ids.ndim <= 3:
            return ids
    raise ShapeError(
        f"{operator}: task_ids is an int64 tensor [B], or [B, T] per token, as space.ids gives; with task_shares, "
        f"a float32 tensor of the same shape, both have the mixture as another, last axis; got {_told(ids)} and "
        f"{_told(shares)}"
    )


def _told(given: object) -> str:
    return f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__


def rows_of_ids(ids: Tensor, shares: Tensor | None, *, lasting: bool) -> Rows:
    """Give the rows that checked tensors name."""
    axes = ids.ndim - (shares is not None)
    return Rows(ids, shares, "token" if axes == 2 else "row", lasting=lasting)
