"""Put a slot's scale into its factors, in the dtype of a file."""

from __future__ import annotations

import torch
from torch import Tensor

from loraspan.adapters.base import Slot
from loraspan.errors import NotFiniteError, UnsupportedError

# a rounding to nearest is off by half of torch's eps, unless an entry leaves the range where that holds
_ALLOWED = 2.0
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fold(path: str, slot: Slot, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Give factors whose product is ``dW`` itself, with scale 1.

    Args:
        path: names the slot in errors.
        slot: any; where its scale is 1 and ``dtype`` is None its factors come back as they are.
        dtype: of both factors; None keeps that of each.

    Returns:
        ``down [r, d]`` and ``up [n, r]``. The scale goes into ``up``, with one rounding for each entry.

    Raises:
        UnsupportedError: if a factor leaves the range of its dtype.
        NotFiniteError: if a factor holds a NaN or an infinity.

    Example:
        >>> down, up = fold("q", Slot(torch.ones(2, 5), torch.ones(3, 2), 0.25), None)
        >>> (up @ down)[0, 0]
        tensor(0.5000)
    """
    return (
        scaled(slot.down, 1.0, dtype, f"slot {path!r}, factor down"),
        scaled(slot.up, slot.scale, dtype, f"slot {path!r}, factor up"),
    )


def check_factor_dtype(tensor: Tensor, key: str) -> None:
    """Refuse a tensor that takes no scale.

    Raises:
        UnsupportedError: naming it.
    """
    if tensor.dtype not in _DTYPES:
        raise UnsupportedError(f"{key!r} needs float16, bfloat16, float32 or float64; got {tensor.dtype}")


def scaled(factor: Tensor, scale: float, dtype: torch.dtype | None, what: str) -> Tensor:
    """Give ``scale * factor``, each entry rounded once to ``dtype`` (None: its own)."""
    dtype = factor.dtype if dtype is None else dtype
    if scale == 1.0 and dtype == factor.dtype:
        return factor
    exact = factor.to(torch.float64) * scale
    rounded = exact.to(dtype)
    lost = float(torch.linalg.vector_norm(rounded - exact))
    size = float(torch.linalg.vector_norm(exact))
    if not lost <= _ALLOWED * torch.finfo(dtype).eps * size:
        if not bool(torch.isfinite(factor).all()):
            raise NotFiniteError(f"{what}: needs finite entries; it holds a NaN or an infinity")
        raise UnsupportedError(
            f"{what}: {dtype} cannot hold it with the scale {scale:g} in it (the largest entry is "
            f"{float(exact.abs().max()):g}); write it with dtype=torch.float32"
        )
    return rounded
