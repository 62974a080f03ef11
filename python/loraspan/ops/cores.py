"""The columns of many tasks in one slot, as `shared_lora` reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from loraspan.errors import ShapeError
from loraspan.ops.packed import Packed

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PackedEnds = tuple[Packed | None, Packed | None, Packed | None, Packed | None]
PLAIN: _PackedEnds = (None, None, None, None)


@dataclass(frozen=True, eq=False)
class Cores:
    """Columns of ``R`` tasks, one ragged table each for weights and ends: ``dW = sum_c weight_c left_c right_c^T``.

    Each end of a column is shared (coefficients on the slot's basis ``u`` or ``v``) or private (an explicit vector). A
    task's columns come in four forms, in this order: ss, both ends shared; sp, left shared and right private; ps, left
    private and right shared; pp, both private. A task may instead hold a dense core: then the right end of its ss
    column ``c`` is column ``c`` of ``v`` itself, it has as many of them as ``v`` has columns, and no rows of ``right``
    for them. :meth:`of` builds and checks one; adding a task within the capacity is a write into these tensors.

    Attributes:
        index: ``[R, 10]`` int64, per task: its first row in each of ``weights``, ``left``, ``left_private``, ``right``
            and ``right_private``; its number of columns of each form; whether its core is dense.
        weights: ``[C]`` float32 (float64 beside float64 ends).
        left: ``[., k_out]``, shared left ends of forms ss, sp, task after task.
        left_private: ``[., n]``, private left ends of forms ps, pp.
        right: ``[., k_in]``, shared right ends of forms ss (unless dense), ps.
        right_private: ``[., d]``, private right ends of forms sp, pp.
        most: at least the largest number of columns of each form of any task. Compiled graphs keep it, so a capacity
            is better than a count.
        packed: of ``left``, ``left_private``, ``right`` and ``right_private``, the packed rows of which that attribute
            has the codes; None where it holds the ends themselves.
        tables: the weights and the four tables of ends, in this order: what is trained where columns are.
        known: what the compiled kernels were last told of these tensors; not part of what the object is.
    """

    index: Tensor
    weights: Tensor
    left: Tensor
    left_private: Tensor
    right: Tensor
    right_private: Tensor
    most: tuple[int, int, int, int]
    packed: _PackedEnds = PLAIN
    tables: tuple[Tensor, ...] = field(init=False, repr=False)
    known: list[Any] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        tables = (self.weights, self.left, self.left_private, self.right, self.right_private)
        object.__setattr__(self, "tables", tables)

    @classmethod
    def of(
        cls,
        counts: ArrayLike,
        weights: Tensor,
        left: Tensor | Packed,
        left_private: Tensor | Packed,
        right: Tensor | Packed,
        right_private: Tensor | Packed,
        *,
        dense: ArrayLike | None = None,
    ) -> Cores:
        """Build the table of tasks whose columns follow each other without gaps.

        Args:
            counts: ``[R, 4]``, columns of each task of forms ss, sp, ps, pp.
            weights: ``[C]``, of all columns of all tasks in order.
            left: ``[., k_out]``.
            left_private: ``[., n]``.
            right: ``[., k_in]``.
            right_private: ``[., d]``; the four of one dtype and device, contiguous; each may be packed instead.
            dense: ``[R]``, which tasks hold a dense core; none if left out.

        Raises:
            ShapeError: if the tensors do not have the rows that ``counts`` asks for, or differ in dtype or device.

        Example:
            >>> import torch
            >>> none = torch.empty(0, 5)
            >>> cores = Cores.of([[1, 0, 0, 0]], torch.ones(1), torch.ones(1, 2), none, torch.ones(1, 3), none)
            >>> cores.tasks, cores.most
            (1, (1, 0, 0, 0))
        """
        table = np.asarray(counts, dtype=np.int64).reshape(-1, 4)
        full = np.zeros(len(table), dtype=np.bool_) if dense is None else np.asarray(dense, dtype=np.bool_)
        ss, sp, ps, pp = table.T
        lengths = np.stack([ss + sp + ps + pp, ss + sp, ps + pp, np.where(full, 0, ss) + ps, sp + pp], axis=1)
        ends = lengths.cumsum(axis=0)
        tensors: dict[str, Tensor | Packed] = {"weights": weights, "left": left, "left_private": left_private}
        tensors["right"] = right
        tensors["right_private"] = right_private
        plain = next((t for t in (left, left_private, right, right_private) if isinstance(t, Tensor)), None)
        for (name, tensor), wanted in zip(tensors.items(), lengths.sum(axis=0), strict=True):
            _check(name, tensor, int(wanted), left, plain)
        if full.any() and (ss[full] != right.shape[1]).any():
            raise ShapeError(
                f"Cores: a dense core has as many ss columns as right has, {right.shape[1]}; "
                f"got counts of {sorted(set(ss[full].tolist()))}"
            )
        index = torch.from_numpy(np.concatenate([ends - lengths, table, full[:, None]], axis=1, dtype=np.int64))
        most = tuple(int(count) for count in table.max(axis=0, initial=0))
        wide = torch.float64 if plain is not None and plain.dtype == torch.float64 else torch.float32
        ends_of = (left, left_private, right, right_private)
        held = [t.codes if isinstance(t, Packed) else t for t in ends_of]
        packed = [t if isinstance(t, Packed) else None for t in ends_of]
        columns = (most[0], most[1], most[2], most[3])
        return cls(
            index.to(left.device), weights.to(wide), held[0], held[1], held[2], held[3], columns,
            (packed[0], packed[1], packed[2], packed[3]),
        )  # fmt: skip

    def fields(self) -> tuple[Tensor | list[int], ...]:
        """Give the attributes in order, as a torch operator takes them."""
        return (self.index, *self.tables, list(self.most))

    @property
    def ends(self) -> tuple[Tensor | Packed, ...]:
        """The four tables of ends, packed ones as such."""
        held = (self.left, self.left_private, self.right, self.right_private)
        return tuple(packed or plain for packed, plain in zip(self.packed, held, strict=True))

    @property
    def is_packed(self) -> bool:
        """Whether any of the four tables of ends is."""
        return self.packed != PLAIN

    @property
    def tasks(self) -> int:
        """How many tasks the table has room for, ``R``."""
        return self.index.shape[0]


def _check(name: str, tensor: Tensor | Packed, rows: int, like: Tensor | Packed, plain: Tensor | None) -> None:
    if isinstance(tensor, Packed):
        if tensor.shape[0] != rows or tensor.device != like.device:
            raise ShapeError(
                f"Cores: by counts, {name} is [{rows}, .], on the device of left, {like.device}; got packed rows "
                f"{list(tensor.shape)} on {tensor.device}"
            )
        return
    axes = 1 if name == "weights" else 2
    if tensor.ndim != axes or tensor.shape[0] != rows:
        shape = f"[{rows}]" if axes == 1 else f"[{rows}, .]"
        raise ShapeError(f"Cores: by counts, {name} is {shape}; got {list(tensor.shape)}")
    wanted = tensor.dtype if axes == 1 or plain is None else plain.dtype
    right_dtype = tensor.dtype == wanted and wanted in _DTYPES
    if not right_dtype or tensor.device != like.device:
        raise ShapeError(
            f"Cores: the four tables of ends have one dtype (float16, bfloat16, float32 or float64) and one device, "
            f"and weights are floats there; {name} is {tensor.dtype} on {tensor.device}, left "
            f"{'packed' if isinstance(like, Packed) else like.dtype} on {like.device}"
        )
    if not tensor.is_contiguous():
        raise ShapeError(f"Cores: {name} needs to be contiguous; got strides {tensor.stride()}: use .contiguous()")
