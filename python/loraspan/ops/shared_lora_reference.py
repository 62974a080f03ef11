"""`shared_lora` in plain torch, either way round: gathers and products, on whatever device the tensors are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.ops.cores import Cores
from loraspan.ops.rounding import narrow

# entries of the tables gathered at once for a chunk of rows
_GATHERED = 1 << 22


@torch.no_grad()
def reference(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    u: Tensor,
    cores: Cores,
    tasks: Tensor,
    shares: Tensor | None,
    scale: float,
    *,
    transposed: bool = False,
) -> None:
    """Add to ``y`` what the tasks of its rows make of ``x``; a row with a task out of range gets NaN.

    ``transposed`` takes ``dW^T``: ``v`` is then the basis that left ends are on, and ``u`` that of right ends.
    """
    wide = wide_of(y, x, v, u, cores.left)
    if not cores.tasks:
        y.copy_(torch.where((tasks != -1).any(dim=1, keepdim=True), torch.nan, y))
        return
    v, u_rows = v.to(wide).contiguous(), u.to(wide).T.contiguous()
    longest = max(1, *v.shape, *u.shape) if cores.most[1] + cores.most[2] + cores.most[3] else max(1, v.shape[1])
    step = max(1, _GATHERED // (longest * max(1, sum(cores.most) * tasks.shape[1])))
    for start in range(0, x.shape[0], step):
        at = slice(start, start + step)
        rows, ids = x[at].to(wide).contiguous(), tasks[at]
        there = (ids >= 0) & (ids < cores.tasks)
        known = cores.index[ids.clamp(0, cores.tasks - 1)]
        weights = None if shares is None else shares[at].to(wide) * scale
        batch = _Batch(rows, rows @ v, cores, there, known, weights, scale, transposed)
        added = _sums(batch, u_rows)
        sums = narrow(y[at].to(wide) + added, y.dtype)
        beyond = ((ids >= cores.tasks) | (ids < -1)).any(dim=1, keepdim=True)
        y[at] = torch.where(beyond, torch.nan, torch.where(there.any(dim=1, keepdim=True), sums, y[at]))


def wide_of(*tensors: Tensor) -> torch.dtype:
    """Give the dtype that sums are kept in: float64 where a tensor is, else float32."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


class _Batch(NamedTuple):
    """A chunk of rows: ``x [T, d]``, ``z = x v``, and of their tasks if they are ``there [T, m]``, and their index."""

    x: Tensor
    z: Tensor
    cores: Cores
    there: Tensor
    known: Tensor
    shares: Tensor | None
    scale: float
    transposed: bool


class _End(NamedTuple):
    """Where one end of the columns of a form lies: in which table, from which row on, or on the axes if dense."""

    own: bool
    table: Tensor
    start: Tensor
    axes: bool


def _ends(batch: _Batch, form: int) -> tuple[_End, _End]:
    """Give the ends that meet ``x`` and those that make ``y``."""
    cores, known = batch.cores, batch.known
    ss, sp, ps, dense = known[..., 5], known[..., 6], known[..., 7], known[..., 9] > 0
    kept = torch.where(dense, 0, ss)
    left = (
        _End(False, cores.left, known[..., 1], False),
        _End(False, cores.left, known[..., 1] + ss, False),
        _End(True, cores.left_private, known[..., 2], False),
        _End(True, cores.left_private, known[..., 2] + ps, False),
    )[form]
    right = (
        _End(False, cores.right, known[..., 3], True),
        _End(True, cores.right_private, known[..., 4], False),
        _End(False, cores.right, known[..., 3] + kept, False),
        _End(True, cores.right_private, known[..., 4] + sp, False),
    )[form]
    return (left, right) if batch.transposed else (right, left)


def _sums(batch: _Batch, u_rows: Tensor) -> Tensor:
    """Give what all columns make of the rows: ``[T, n]``."""
    cores, wide = batch.cores, batch.z.dtype
    shared = batch.z.new_zeros(batch.z.shape[0], u_rows.shape[0])
    own: Tensor | None = None
    before = torch.zeros_like(batch.known[..., 5])
    for form, most in enumerate(cores.most):
        count = batch.known[..., 5 + form]
        if most:
            place = torch.arange(most, device=batch.x.device).expand(*count.shape, -1)
            mask = (place < count[..., None]) & batch.there[..., None]
            source, target = _ends(batch, form)
            weight = _rows(cores.weights[:, None], batch.known[..., 0] + before, place, mask, wide)[..., 0]
            weight = weight * (batch.scale if batch.shares is None else batch.shares[..., None])
            loads = torch.where(mask, weight * _products(batch, source, place, mask), 0.0)
            if target.own:
                total = _combined(target, loads, place, mask)
                own = total if own is None else own + total
            else:
                shared = shared + _on_basis(batch, target, loads, place, mask)
        before = before + count
    added = shared @ u_rows
    return added if own is None else added + own


def _dense(batch: _Batch) -> Tensor:
    return batch.known[..., 9, None] > 0


def _products(batch: _Batch, end: _End, place: Tensor, mask: Tensor) -> Tensor:
    """Give the ends that meet ``x`` times the rows: ``[T, m, most]``."""
    target = batch.x if end.own else batch.z
    rows = _rows(end.table, end.start, place, mask & ~_dense(batch) if end.axes else mask, batch.z.dtype)
    flat = rows.flatten(1, 2)
    products = torch.bmm(flat, target[..., None].contiguous()).reshape(mask.shape)
    if end.axes and target.shape[1]:
        # the right ends of a dense core are the columns of v themselves
        axes = target[:, None].expand(-1, mask.shape[1], -1).gather(2, place.clamp(max=target.shape[1] - 1))
        products = torch.where(_dense(batch), axes, products)
    return products


def _combined(end: _End, loads: Tensor, place: Tensor, mask: Tensor) -> Tensor:
    """Give the sums of the rows of a table by ``loads [T, m, most]``: ``[T, .]``."""
    rows = _rows(end.table, end.start, place, mask, loads.dtype)
    flat = rows.flatten(1, 2)
    return torch.bmm(loads.flatten(1)[:, None], flat)[:, 0]


def _on_basis(batch: _Batch, end: _End, loads: Tensor, place: Tensor, mask: Tensor) -> Tensor:
    """Give the coefficients ``[T, k]`` that loads make on the basis of ``y``."""
    if not end.axes:
        return _combined(end, loads, place, mask)
    dense = _dense(batch)
    total = _combined(end, torch.where(dense, 0.0, loads), place, mask & ~dense)
    # a dense core, transposed: load j is the coefficient of axis j
    axes = torch.where(dense, loads, 0.0).sum(dim=1)[:, : total.shape[1]]
    return total + torch.nn.functional.pad(axes, (0, total.shape[1] - axes.shape[1]))


def _rows(table: Tensor, start: Tensor, place: Tensor, mask: Tensor, wide: torch.dtype) -> Tensor:
    """Give rows ``start + place`` of a table, zeros where ``mask`` is off: ``[T, m, most, .]``."""
    if not table.shape[0]:
        return torch.zeros(*mask.shape, table.shape[1], dtype=wide, device=table.device)
    at = torch.where(mask, start[..., None] + place, 0)
    return torch.where(mask[..., None], table[at].to(wide), 0.0)
