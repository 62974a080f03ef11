"""Round float64 to a narrower dtype in one step."""

from __future__ import annotations

import torch
from torch import Tensor


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Give ``values`` rounded once to ``dtype``, to nearest, ties to even.

    torch takes float64 to half precision by way of float32, which rounds twice and may land one unit off. Here the
    first rounding is to odd, so that the second does what one would have done (Boldo and Melquiond 2008, theorem 3).

    Args:
        values: any shape and floating dtype.
        dtype: float16, bfloat16, float32 or float64.

    Returns:
        A tensor of the shape of ``values``.

    Example:
        >>> import torch
        >>> just_past_a_tie = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
        >>> just_past_a_tie.to(torch.bfloat16), narrow(just_past_a_tie, torch.bfloat16)
        (tensor([1.], dtype=torch.bfloat16), tensor([1.0078], dtype=torch.bfloat16))
    """
    if values.dtype != torch.float64 or dtype not in (torch.float16, torch.bfloat16):
        return values.to(dtype)
    nearest = values.to(torch.float32)
    wide = nearest.to(torch.float64)
    bits = nearest.view(torch.int32)
    # where the nearest float32 is even and not exact, its neighbour on the other side of the value is odd
    moves = (wide != values) & ~wide.isnan() & (bits & 1 == 0)
    step = torch.where(wide.abs() > values.abs(), -1, 1).to(torch.int32)
    return torch.where(moves, bits + step, bits).view(torch.float32).to(dtype)
