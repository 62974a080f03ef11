"""The gradients of `shared_lora` with respect to the columns of its tasks, task after task in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.ops.cores import Cores
from loraspan.ops.shared_lora_reference import wide_of


class ColumnGradients(NamedTuple):
    """Gradients like the tensors of :class:`Cores` of these names, and of ``shares [T, m]``."""

    weights: Tensor
    left: Tensor
    left_private: Tensor
    right: Tensor
    right_private: Tensor
    shares: Tensor


class _Rows(NamedTuple):
    """The rows of one task: gradients and inputs, whole and on the bases, and ``share [E, 1]``, the scale in it."""

    grad: Tensor
    x: Tensor
    q: Tensor
    z: Tensor
    share: Tensor


@torch.no_grad()
def column_gradients(
    grad: Tensor, x: Tensor, v: Tensor, u: Tensor, cores: Cores, tasks: Tensor, shares: Tensor | None, scale: float
) -> ColumnGradients:
    """Give them for ``grad [T, n]``, the gradient of what `shared_lora` gave.

    Of column ``c``, whose right end meets a row as ``a = right_c . x`` and whose left end meets its gradient as
    ``b = left_c . grad``, the weight gets ``share a b``, the left end ``share weight a grad`` and the right end
    ``share weight b x``, both on the bases where they are shared. Sums over rows are kept in float32 (float64 where a
    tensor is float64), in the order of the rows.

    Args:
        grad: ``[T, n]``.
        x: ``[T, d]``.
        v: ``[d, k_in]``.
        u: ``[n, k_out]``.
        cores: the columns of all tasks.
        tasks: ``[T, m]``, as checked.
        shares: ``[T, m]`` or None.
        scale: of all of it.
    """
    wide = wide_of(grad, x, v, u, cores.left)
    grad, x, v, u = (t.to(wide) for t in (grad, x, v, u))
    tables = (cores.weights, cores.left, cores.left_private, cores.right, cores.right_private, tasks)
    found = ColumnGradients._make(torch.zeros_like(t, dtype=wide) for t in tables)
    z, q = x @ v, grad @ u
    flat = tasks.reshape(-1)
    weight = torch.ones_like(flat, dtype=wide) if shares is None else shares.reshape(-1).to(wide)
    ids, counts = torch.unique(flat, return_counts=True)
    entries = torch.split(flat.argsort(stable=True), counts.tolist())
    for task, at in zip(ids.tolist(), entries, strict=True):
        if task < 0:
            continue
        row = at // tasks.shape[1]
        rows = _Rows(grad[row], x[row], q[row], z[row], (weight[at] * scale)[:, None])
        per_entry = _add_task(found, cores, cores.index[task].tolist(), rows)
        found.shares.view(-1)[at] = per_entry * scale
    return found


def _add_task(found: ColumnGradients, cores: Cores, fields: list[int], rows: _Rows) -> Tensor:
    """Add what the rows of one task give its columns; give ``sum_c weight_c a_c b_c`` of each row."""
    column, left, left_private, right, right_private, ss, sp, ps, pp, dense = fields
    kept = 0 if dense else ss
    spans = (
        slice(left, left + ss + sp),
        slice(left_private, left_private + ps + pp),
        slice(right, right + kept + ps),
        slice(right_private, right_private + sp + pp),
    )
    tables = (cores.left, cores.left_private, cores.right, cores.right_private)
    left_ends, left_own, right_ends, right_own = (t[s].to(rows.z.dtype) for t, s in zip(tables, spans, strict=True))
    on_v, on_x = rows.z @ right_ends.T, rows.x @ right_own.T
    on_u, on_grad = rows.q @ left_ends.T, rows.grad @ left_own.T
    first = rows.z[:, :ss] if dense else on_v[:, :ss]
    a = torch.cat([first, on_x[:, :sp], on_v[:, kept:], on_x[:, sp:]], dim=1)
    b = torch.cat([on_u, on_grad], dim=1)
    weights = cores.weights[column : column + ss + sp + ps + pp].to(a.dtype)
    both = a * b
    found.weights[column : column + len(weights)] += (rows.share * both).sum(dim=0)
    a, b = rows.share * weights * a, rows.share * weights * b
    found.left[spans[0]] += a[:, : ss + sp].T @ rows.q
    found.left_private[spans[1]] += a[:, ss + sp :].T @ rows.grad
    found.right[spans[2]] += torch.cat([b[:, :kept], b[:, ss + sp : ss + sp + ps]], dim=1).T @ rows.z
    found.right_private[spans[3]] += torch.cat([b[:, ss : ss + sp], b[:, ss + sp + ps :]], dim=1).T @ rows.x
    return both @ weights
