"""Run a module whose rows have parameters of several tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from loraspan.errors import ArgumentError, UnsupportedError
from loraspan.serve.extras_modules import gather_of, twin
from loraspan.serve.extras_tables import GONE, NONE, Held
from loraspan.serve.rows import Rows

if TYPE_CHECKING:
    from loraspan.serve.extras_layer import ServedExtras


class Call(NamedTuple):
    """How a module is called, and with which tasks."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: Rows

    @property
    def is_plain(self) -> bool:
        """Whether it has one tensor and nothing else."""
        return len(self.args) == 1 and not self.kwargs and isinstance(self.args[0], Tensor)

    def of(self, base: nn.Module) -> torch.Size:
        """Give the leading axes of the first tensor that tasks are named for."""
        x = self.first
        if self.rows.per == "row":
            return x.shape[:1]
        return x.shape if isinstance(base, nn.Embedding) else x.shape[:-1]

    @property
    def first(self) -> Tensor:
        """The first tensor of the arguments."""
        return next(value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor))


class _Batch(NamedTuple):
    """The rows of a call.

    Attributes:
        ids: ``[N]``, or ``[N, m]`` with shares.
        shares: of a mixture, or None.
        places: like ``ids``, where their parameters are.
    """

    ids: Tensor
    shares: Tensor | None
    places: Tensor


def task_by_task(layer: ServedExtras, held: Held, call: Call) -> Any:
    """Run the module once for each task of the batch, on its rows. For eager code."""
    base = layer.base
    known = gather_of(base) is not None and call.is_plain
    if call.rows.per == "token" and not known:
        raise ArgumentError(f"{layer.path}: a {type(base).__name__} takes tasks per row, not per token")
    x, lead = call.first, call.of(base)
    ids, shares = call.rows.of(lead, x.device)
    batch = _Batch(ids, shares, held.places(ids))
    present = sorted(set(batch.places.flatten().tolist()))
    if GONE in present:
        layer.refuse_gone(batch.places, ids)
    if present == [NONE]:
        return base(*call.args, **call.kwargs)
    if len(lead) > 1:
        call = call._replace(args=(x.reshape(-1, *x.shape[len(lead) :]),))
    single = _single(batch)
    if single is not None:
        out = _overwritten(layer, held, batch._replace(places=single), call)
    elif known:
        out = _mixed(layer, held, batch, call.args[0])
    else:
        raise ArgumentError(
            f"{layer.path}: a mixture of tasks that bring parameters of their own for a {type(base).__name__}, which "
            f"is not linear in them, is not defined: {layer.names_at(held, present)}"
        )
    return out.reshape(*lead, *out.shape[1:]) if len(lead) > 1 else out


def _single(batch: _Batch) -> Tensor | None:
    """Give one place for each row, ``[N]``; None where a row is a mixture."""
    if batch.shares is None:
        return batch.places
    there = batch.ids != -1
    if bool(((there.sum(1) > 1) | (there & (batch.shares != 1)).any(1)).any()):
        return None
    return torch.where(there, batch.places, NONE).amax(1)


def _overwritten(layer: ServedExtras, held: Held, batch: _Batch, call: Call) -> Any:
    """Give each row what the module makes of it with the parameters of its place."""
    (args, kwargs, _), places, base = call, batch.places, layer.base
    present = sorted(set(places.tolist()))
    if present == [NONE]:
        return base(*args, **kwargs)
    if len(present) == 1:
        return twin(base, held.at(present[0]))(*args, **kwargs)
    found: dict[int, tuple[Tensor, Any]] = {}
    for place in present:
        if place != NONE:
            rows = (places == place).nonzero()[:, 0]
            some = [_some(layer, value, rows, len(places)) for value in args]
            named = {name: _some(layer, value, rows, len(places)) for name, value in kwargs.items()}
            with layer.for_rows(batch.ids[rows], None if batch.shares is None else batch.shares[rows]):
                found[place] = rows, twin(base, held.at(place))(*some, **named)
    # in whole, whoever needs it, so that these rows have the bits of the model without tasks
    out = base(*args, **kwargs) if NONE in present else None
    outputs = {place: part for place, (_, part) in found.items()}
    _check_together(layer, held, outputs if out is None else outputs | {NONE: out})
    first = next(iter(outputs.values()))
    out = first.new_empty(len(places), *first.shape[1:]) if out is None else out.clone()
    for rows, part in found.values():
        out[rows] = part
    return out


def _some(layer: ServedExtras, value: Any, rows: Tensor, count: int) -> Any:
    """Give the rows of one argument."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == count:
        return value[rows]
    told = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise UnsupportedError(
        f"{layer.path}: rows of several tasks with parameters of their own need arguments of {count} rows, to be taken "
        f"apart; got {told}. Serve one task at a time"
    )


def _check_together(layer: ServedExtras, held: Held, outputs: dict[int, Any]) -> None:
    """Refuse outputs that are not the rows of one tensor."""
    shapes = {place: list(part.shape[1:]) if isinstance(part, Tensor) else None for place, part in outputs.items()}
    if None in shapes.values():
        kinds = sorted({type(part).__name__ for part in outputs.values()})
        raise UnsupportedError(
            f"{layer.path}: gives a {', '.join(kinds)}, which cannot be put together of rows of several tasks: serve "
            f"one task at a time"
        )
    if len({tuple(shape or ()) for shape in shapes.values()}) > 1:
        told = "; ".join(f"{layer.names_at(held, [place])} {shape}" for place, shape in shapes.items())
        raise ArgumentError(
            f"{layer.path}: one batch needs outputs of one size, and its tasks have heads of several: {told}. Serve "
            f"them in batches of their own"
        )


def _mixed(layer: ServedExtras, held: Held, batch: _Batch, x: Tensor) -> Tensor:
    """Give ``base(x)``, and for each task of a row its share of what it changes in that."""
    y = layer.base(x)
    wide = wide_of(y)
    assert batch.shares is not None
    out = y.to(wide, copy=True)
    for place in sorted(set(batch.places.flatten().tolist())):
        if place != NONE:
            here = batch.places == place
            rows = here.any(1).nonzero()[:, 0]
            part = twin(layer.base, held.at(place))(x[rows])
            _check_together(layer, held, {NONE: y, place: part})
            share = (batch.shares * here).sum(1)[rows].to(wide)
            out[rows] += share.reshape(-1, *[1] * (y.ndim - 1)) * (part.to(wide) - y[rows].to(wide))
    changed = (batch.places >= 0).any(1).reshape(-1, *[1] * (y.ndim - 1))
    return torch.where(changed, out.to(y.dtype), y)


def all_at_once(layer: ServedExtras, held: Held, call: Call, y: Tensor) -> Tensor:
    """Run the module with the parameters that each row needs, gathered: no shape depends on the tasks.

    Args:
        layer: which module.
        held: its parameters.
        call: of the module.
        y: what the module itself gives.

    Returns:
        Like ``y``; or with as many outputs as the heads have, if those differ from the module's, and then NaN for rows
        without one. Rows whose task is gone are NaN.
    """
    base = layer.base
    run = gather_of(base)
    if run is None or not call.is_plain:
        raise UnsupportedError(
            f"{layer.path}: a {type(base).__name__} with parameters of several tasks runs in eager code, once for each "
            f"task: leave it out of the graph (torch.compiler.disable)"
        )
    if len(held.stacks) != 1:
        raise UnsupportedError(f"{layer.path}: tasks have heads of {len(held.stacks)} shapes, which takes eager code")
    (stack,), x = held.stacks, call.first
    ids, shares = call.rows.of(call.of(base), x.device)
    places = held.places(ids)
    count = places.shape[0]
    x = x.reshape(count, -1) if isinstance(base, nn.Embedding) else x.reshape(count, -1, x.shape[-1])
    shown = y.reshape(count, -1, y.shape[-1])
    out = shown
    for column in range(1 if places.ndim == 1 else places.shape[1]):
        place = places if places.ndim == 1 else places[:, column]
        here = (place >= 0)[:, None, None]
        part = run(base, {name: held_rows[place.clamp(min=0)] for name, held_rows in stack.items()}, x)
        if part.shape != shown.shape:
            out = torch.where(here, part, torch.nan)
        elif shares is None:
            out = torch.where(here, part, out)
        else:
            wide = wide_of(y)
            change = shares[:, column, None, None].to(wide) * (part.to(wide) - shown.to(wide))
            out = torch.where(here, out.to(wide) + change, out.to(wide))
    if shares is not None and out.shape == shown.shape:
        out = torch.where((places >= 0).any(1)[:, None, None], out.to(y.dtype), shown)
    gone = (places == GONE).reshape(count, -1).any(1)[:, None, None]
    return torch.where(gone, torch.nan, out).reshape(*y.shape[:-1], out.shape[-1])


def wide_of(y: Tensor) -> torch.dtype:
    """Give the dtype of sums."""
    return torch.float64 if y.dtype == torch.float64 else torch.float32
