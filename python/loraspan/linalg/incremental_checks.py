"""What :class:`loraspan.linalg.IncrementalSVD` takes: its options, rows, and states that come back from a file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from loraspan.errors import ArgumentError, FormatError, MismatchError, NotFiniteError, ShapeError
from loraspan.ops.places import off_metal

_ROW_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Larger entries could overflow once squared and summed (float64), or once many rows are held as few (float32).
_LARGEST = {torch.float32: 2.0**110, torch.float64: 2.0**480}


def check_options(rank: int, buffer: int, forget: float, center: bool) -> None:
    """Refuse what an IncrementalSVD cannot be made with.

    Raises:
        ArgumentError: if ``rank`` is below 1, ``buffer`` below 0, or ``forget`` not in ``(0, 1]``.

    Example:
        >>> check_options(1, 8, 1.0, False)
    """
    for name, value, least in (("rank", rank, 1), ("buffer", buffer, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"IncrementalSVD: {name} is a whole number, at least {least}; got {value!r}")
    if isinstance(forget, bool) or not isinstance(forget, (int, float)) or not 0 < forget <= 1:
        raise ArgumentError(
            f"IncrementalSVD: forget is in (0, 1], the weight that a row keeps for each newer row; got {forget!r}"
        )
    if not isinstance(center, bool):
        raise ArgumentError(f"IncrementalSVD: center is True or False; got {center!r}")


def check_rows(method: str, rows: Tensor, like: Tensor | None, place: torch.device | None = None) -> Tensor:
    """Give ``rows`` without their graph, or refuse them.

    Args:
        method: named in the message.
        rows: what a caller hands over.
        like: the rows in memory, whose columns and device ``rows`` have to fit; None before the first ones.
        place: where rows are held, wherever they come from; None for where the first ones lie.

    Raises:
        ShapeError: if they are no dense real floating-point matrix, or columns or device differ.
        NotFiniteError: if they hold a NaN or an infinity.
        ArgumentError: if an entry is so large that sums of squares could overflow, or ``place`` cannot hold the dtype.

    Example:
        >>> check_rows("update", torch.ones(1, 3), None).shape
        torch.Size([1, 3])
    """
    if not isinstance(rows, Tensor) or rows.layout != torch.strided:
        kind = type(rows).__name__ if not isinstance(rows, Tensor) else f"a {rows.layout} tensor"
        raise ShapeError(
            f"IncrementalSVD.{method}: rows are a dense torch tensor; got {kind}: use torch.as_tensor or .to_dense()"
        )
    if rows.ndim != 2 or rows.shape[1] == 0 or rows.dtype not in _ROW_DTYPES:
        one = ": for a single row, pass row.unsqueeze(0)" if rows.ndim == 1 else ""
        raise ShapeError(
            f"IncrementalSVD.{method}: rows are [n, D] of float16, bfloat16, float32 or float64, D at least 1; "
            f"got {list(rows.shape)} of {rows.dtype}{one}"
        )
    if like is not None and rows.shape[1] != like.shape[1]:
        raise ShapeError(f"IncrementalSVD.{method}: rows so far have {like.shape[1]} columns; got {rows.shape[1]}")
    if like is not None and place is None and rows.device != like.device:
        raise ShapeError(f"IncrementalSVD.{method}: rows so far are on {like.device}; got rows on {rows.device}")
    if like is None:
        check_place(method, held_dtype(rows), place)
    if rows.requires_grad:
        rows = rows.detach()
    if rows.shape[0]:
        _check_size(method, rows, held_dtype(rows) if like is None else like.dtype)
    return rows


def check_place(method: str, dtype: torch.dtype, place: torch.device | None) -> None:
    """Refuse to hold rows of a dtype that a device lacks.

    Raises:
        ArgumentError: if that is so.

    Example:
        >>> check_place("update", torch.float64, torch.device("cpu"))
    """
    if place is not None and place.type == "mps" and dtype == torch.float64:
        raise ArgumentError(
            f"IncrementalSVD.{method}: float64 rows are held in float64, which device 'mps' has not: "
            f"pass float32 rows, or leave device out"
        )


def held_dtype(rows: Tensor) -> torch.dtype:
    """Give the dtype in which a state is held whose first rows these are.

    Example:
        >>> held_dtype(torch.ones(1, 3, dtype=torch.bfloat16))
        torch.float32
    """
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _check_size(method: str, rows: Tensor, held: torch.dtype) -> None:
    rows = off_metal(rows)
    low, high = torch.aminmax(rows)
    # a NaN makes both a NaN, which is below nothing
    if -_LARGEST[held] <= float(low) and float(high) <= _LARGEST[held]:
        return
    finite = rows.isfinite().all(1)
    if not finite.all():
        raise NotFiniteError(
            f"IncrementalSVD.{method}: rows are finite; row {int((~finite).nonzero()[0, 0])} of {len(rows)} has a NaN "
            f"or an infinity: leave it out or repair it; the state is as it was"
        )
    raise ArgumentError(
        f"IncrementalSVD.{method}: entries held in {held} are at most {_LARGEST[held]:.3g} in size, so that sums of "
        f"squares stay finite; got {max(-float(low), float(high)):.3g}: scale the rows"
    )


def check_basis(old_basis: Tensor, components: Tensor) -> Tensor:
    """Give ``old_basis [D, k_old]`` without its graph, or refuse it.

    Raises:
        ShapeError: if it is no dense real floating-point matrix with the length and device of ``components [k, D]``.
        NotFiniteError: if it holds a NaN or an infinity.

    Example:
        >>> check_basis(torch.ones(3, 1), torch.ones(2, 3)).shape
        torch.Size([3, 1])
    """
    dense = isinstance(old_basis, Tensor) and old_basis.layout == torch.strided and old_basis.dtype in _ROW_DTYPES
    if not dense or old_basis.ndim != 2 or old_basis.shape[0] != components.shape[1]:
        got = f"{list(old_basis.shape)} of {old_basis.dtype}" if isinstance(old_basis, Tensor) else type(old_basis)
        raise ShapeError(
            f"IncrementalSVD.rotation: old_basis is a dense floating-point [{components.shape[1]}, k_old]; got {got}"
        )
    if old_basis.device != components.device:
        raise ShapeError(
            f"IncrementalSVD.rotation: old_basis goes on {components.device}; got one on {old_basis.device}"
        )
    if not off_metal(old_basis).isfinite().all():
        raise NotFiniteError("IncrementalSVD.rotation: old_basis has a NaN or an infinity")
    return old_basis.detach()


def check_state(
    state: Mapping[str, Tensor], options: Mapping[str, float], capacity: int, place: torch.device | None = None
) -> None:
    """Refuse a state that is not of an IncrementalSVD with these options, or not whole.

    Args:
        state: as ``IncrementalSVD.state_dict`` gives it.
        options: ``rank``, ``buffer``, ``forget`` and ``center``.
        capacity: how many rows fit into memory.
        place: where they are to be held, if that was said.

    Raises:
        MismatchError: if an option differs.
        FormatError: if an entry is missing, or has a shape, dtype or value that it cannot have.
        NotFiniteError: if a tensor holds a NaN or an infinity.
        ArgumentError: if ``place`` cannot hold the dtype of the rows.

    Example:
        >>> check_state({"rank": torch.tensor(2)}, {"rank": 3}, 9)
        Traceback (most recent call last):
        loraspan.errors.MismatchError: IncrementalSVD.load_state_dict: the state has rank 2, and this object 3: ...
    """
    where = "IncrementalSVD.load_state_dict"
    for name, value in options.items():
        if name not in state:
            raise FormatError(f"{where}: the state has no {name!r}; it has {sorted(state)}")
        if state[name].item() != value:
            raise MismatchError(
                f"{where}: the state has {name} {state[name].item()}, and this object {value}: make one with the "
                f"options of the state"
            )
    if "seen" not in state:
        raise FormatError(f"{where}: the state has no 'seen'; it has {sorted(state)}")
    if not state["seen"].item():
        return
    missing = {"rows", "held", "weight", "discarded", *(["mean"] if options["center"] else [])} - set(state)
    if missing:
        raise FormatError(f"{where}: the state has no {sorted(missing)}; it has {sorted(state)}")
    rows, held = state["rows"], state["held"].item()
    if rows.ndim != 2 or rows.dtype not in _LARGEST or not 0 <= held <= len(rows) < capacity:
        raise FormatError(
            f"{where}: rows are [n, D] of float32 or float64, {held} <= n < {capacity}; got {list(rows.shape)} of "
            f"{rows.dtype}"
        )
    check_place("load_state_dict", rows.dtype, place)
    if options["center"] and (state["mean"].shape != rows.shape[1:] or state["mean"].dtype != torch.float64):
        raise FormatError(f"{where}: mean is [{rows.shape[1]}] of float64; got {list(state['mean'].shape)}")
    for name in {"rows", "mean", "weight", "discarded"} & set(state):
        if not off_metal(state[name]).isfinite().all():
            raise NotFiniteError(f"{where}: {name} has a NaN or an infinity")
