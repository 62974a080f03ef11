"""Give a task of a collection back as an adapter, each factor written once."""

from __future__ import annotations

import torch
from torch import Tensor

from loraspan.adapters.base import Adapter, Slot
from loraspan.collection.collection import Collection, SlotSpace, Task
from loraspan.collection.columns import Columns
from loraspan.collection.rows import Rows, some_rows, values_of
from loraspan.errors import ArgumentError, NotFiniteError
from loraspan.ops import Piece, reconstruct_many
from loraspan.ops.packed import Packed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Singular values of a dense core below this share of its largest are rounding of its stored entries.
_RANK_FLOOR = 1e-6


def rebuild(collection: Collection, name: str, *, dtype: torch.dtype = torch.float32) -> Adapter:
    """Give a task as an adapter: balanced factors with scale 1, extras and configuration as they came.

    Args:
        collection: what holds it.
        name: of the task.
        dtype: of the factors: float32, bfloat16 or float16. Sums are kept in float32 and rounded once.

    Raises:
        UnknownTaskError: if there is no such task.
        ArgumentError: if ``dtype`` is none of those.
        NotFiniteError: if a factor overflows ``dtype``, or what is stored is not finite.
    """
    if dtype not in _DTYPES:
        raise ArgumentError(f"reconstruct: dtype is float32, bfloat16 or float16; got {dtype}")
    segment, index = collection.find(name)
    task = collection.task(name)
    slots: dict[str, Slot] = {}
    pieces: list[Piece] = []
    for path, space in collection.slots.items():
        columns = segment.columns.get(path)
        row = None if columns is None else columns.row_of(index)
        if columns is not None and row is not None:
            slots[path], wanted = _slot_pieces(space, columns, row, dtype, f"task {name!r}: slot {path!r}")
            pieces += wanted
    reconstruct_many(pieces)
    if dtype == torch.float16:
        _check_finite(task, slots)
    return Adapter(task.name, slots, task.extras, task.config, task.source)


def _slot_pieces(
    space: SlotSpace, columns: Columns, row: int, dtype: torch.dtype, what: str
) -> tuple[Slot, list[Piece]]:
    """Give a slot with factors yet to be written, and the products that write them."""
    ss, sp, ps, pp = (int(count) for count in columns.counts[row])
    weights, left, left_own, right, right_own = columns.of_row(row).values()
    assert isinstance(weights, Tensor)
    root = weights.sqrt()
    if columns.dense[row]:
        ss, left, right, root = _factor_dense(values_of(left), values_of(right), weights, ss, sp, what)
    total = ss + sp + ps + pp
    up = torch.empty(space.shape[0], total, dtype=dtype)
    down = torch.empty(total, space.shape[1], dtype=dtype)
    ends = [
        (space.u, left, up, slice(0, ss + sp)),
        (None, left_own, up, slice(ss + sp, total)),
        (space.v, some_rows(right, 0, ss), down.T, slice(0, ss)),
        (None, some_rows(right_own, 0, sp), down.T, slice(ss, ss + sp)),
        (space.v, some_rows(right, ss, ss + ps), down.T, slice(ss + sp, ss + sp + ps)),
        (None, some_rows(right_own, sp, sp + pp), down.T, slice(ss + sp + ps, total)),
    ]
    pieces = [_piece(basis, rows, root[at], out[:, at]) for basis, rows, out, at in ends if at.stop > at.start]
    return Slot(down, up, 1.0, space.kind, space.kernel), pieces


def _piece(basis: Rows | None, rows: Rows, root: Tensor, out: Tensor) -> Piece:
    """Ends given as rows: coefficients on a basis, or private vectors themselves."""
    if basis is None:
        return Piece(rows if isinstance(rows, Packed) else rows.T, torch.diag(root), out)
    return Piece(basis, (values_of(rows).float() * root[:, None]).T, out)


def _factor_dense(
    left: Tensor, right: Tensor, weights: Tensor, ss: int, sp: int, what: str
) -> tuple[int, Tensor, Tensor, Tensor]:
    """Factor a dense core ``[k_out, k_in]`` into as many columns as it has rank, balanced."""
    core = left[:ss].double().T * weights[:ss].double()
    if not core.isfinite().all():
        raise NotFiniteError(f"{what} has a NaN or an infinity in its core: take another generation, or its original")
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    rank = int((s > _RANK_FLOOR * s[:1]).sum())
    root = torch.cat([s[:rank].sqrt(), weights[ss:].double().sqrt()]).float()
    loadings = torch.cat([u[:, :rank].T, left[ss : ss + sp].double()])
    return rank, loadings.float(), torch.cat([vh[:rank], right.double()]).float(), root


def _check_finite(task: Task, slots: dict[str, Slot]) -> None:
    for path, slot in slots.items():
        if not (slot.up.isfinite().all() and slot.down.isfinite().all()):
            raise NotFiniteError(
                f"task {task.name!r}: slot {path!r} overflows float16; ask for dtype bfloat16 or float32"
            )
