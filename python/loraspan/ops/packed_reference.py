"""Packing and unpacking rows in plain torch, on whatever device they are; the bits are those of the compiled kernels.

Levels times scales are exact in float32, and so are the points between them that a level is chosen by; an error is
rounded once; its square is exact in float64, and squares are added in one order.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from loraspan.ops.rounding import narrow

# Entries that share a scale.
BLOCK = 64
# What a float16 scale can still make of level 127.
LARGEST = 64992.0
# The levels of 4 bits: chosen for the least squared error of normal entries in blocks of 64 whose scale is searched.
LEVELS = (-116, -89, -69, -53, -38, -25, -12, 0, 10, 21, 32, 45, 59, 75, 95, 127)
# Scales tried in 4 bits, of what takes the largest entry to the largest level, and steps of least squares after them.
_RATIOS = (1.0, 0.84, 0.92, 1.08)
_STEPS = 2
_LARGEST_SCALE = 65504.0
# Blocks that are worked on at once.
_AT_ONCE = 1 << 14


def pack_rows(rows: Tensor, bits: int, codes: Tensor, scales: Tensor) -> int:
    """Fill ``codes`` and ``scales``; give -1, or the first row with an entry that cannot be packed."""
    count, length = rows.shape
    blocks = scales.shape[1]
    step = max(1, _AT_ONCE // max(1, blocks))
    for start in range(0, count if blocks else 0, step):
        x = torch.nn.functional.pad(rows[start : start + step].to(torch.float32), (0, blocks * BLOCK - length))
        x = x.reshape(-1, BLOCK)
        wrong = (~(x.abs() <= LARGEST)).any(dim=1).nonzero()
        if len(wrong):
            return start + int(wrong[0]) // blocks
        levels, found = (_eight if bits == 8 else _four)(x)
        scales[start : start + step] = found.reshape(-1, blocks)
        wide = levels.reshape(-1, blocks * BLOCK)
        if bits == 4:
            wide = wide[:, 0::2] | wide[:, 1::2] << 4
        codes[start : start + step] = wide[:, : codes.shape[1]]
    return -1


def unpack_rows(codes: Tensor, scales: Tensor, length: int, bits: int) -> Tensor:
    """Give the entries ``[rows, length]`` in float32."""
    if bits > 4:
        levels = codes.view(torch.int8 if bits == 8 else torch.int16).to(torch.float32)
    else:
        both = torch.stack([codes & 15, codes >> 4], dim=2).reshape(codes.shape[0], 2 * codes.shape[1])
        levels = torch.tensor(LEVELS, dtype=torch.float32, device=codes.device)[both[:, :length].long()]
    # a scale times 2^-7 is exact
    steps = (scales.to(torch.float32) * 2.0**-7).repeat_interleave(BLOCK, dim=1)
    return levels * steps[:, :length]


def _scale(values: Tensor) -> Tensor:
    return narrow(values.clamp(max=_LARGEST_SCALE), torch.float16).to(torch.float32)


def _eight(x: Tensor) -> tuple[Tensor, Tensor]:
    """Give codes ``[N, 64]`` and float16 scales ``[N]`` of blocks ``[N, 64]``."""
    scale = _scale(x.abs().amax(dim=1).double() * 128 / 127)
    ratio = x / (scale * 2.0**-7)[:, None]
    levels = torch.where(scale[:, None] > 0, ratio.round().clamp(-127, 127), 0.0)
    return levels.to(torch.int8).view(torch.uint8), scale.to(torch.float16)


class _Choice(NamedTuple):
    """A choice of scale for each of ``N`` blocks: levels by index ``[N, 64]``, squared errors, scales, and turns."""

    levels: Tensor
    error: Tensor
    scale: Tensor
    flipped: Tensor

    def better(self, other: _Choice, where: Tensor) -> _Choice:
        """Give ``other`` where that is told, else this one."""
        masks = (where[:, None], where, where, where)
        return _Choice(*(torch.where(m, b, a) for a, b, m in zip(self, other, masks, strict=True)))


def _four(x: Tensor) -> tuple[Tensor, Tensor]:
    whole = x.abs().amax(dim=1).double() * 128.0 / 127.0
    none = torch.zeros_like(whole)
    flat = torch.full_like(x, LEVELS.index(0), dtype=torch.uint8)
    best = _Choice(flat, none + torch.inf, none.float(), none.bool())
    for ratio in _RATIOS:
        for flipped in (False, True):
            choice = _choose(x, _scale(whole * ratio), torch.full_like(best.flipped, flipped))
            best = best.better(choice, (choice.scale > 0) & (choice.error < best.error))
    best = _fit(x, best)
    # where the largest entry has no scale, nothing is tried
    nothing = _scale(whole) == 0
    best = best.better(_Choice(flat, none, none.float(), none.bool()), nothing)
    return best.levels, torch.where(best.flipped, -best.scale, best.scale).to(torch.float16)


def _fit(x: Tensor, best: _Choice) -> _Choice:
    """Take the scale of least squares for the levels at hand, as long as that helps."""
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=x.device)
    going = torch.ones_like(best.flipped)
    for _ in range(_STEPS):
        chosen = levels[best.levels.long()]
        squares, product = _ordered_dot(chosen, chosen), _ordered_dot(x, chosen)
        fitted = torch.where(best.flipped, -product, product) * 128.0 / squares
        going = going & (squares > 0) & (fitted > 0)
        scale = _scale(torch.where(going, fitted, 1.0))
        going = going & (scale > 0) & (scale != best.scale)
        choice = _choose(x, scale, best.flipped)
        going = going & (choice.error < best.error)
        best = best.better(choice, going)
    return best


def _choose(x: Tensor, scale: Tensor, flipped: Tensor) -> _Choice:
    """Give the nearest level of every entry, and the error that they leave."""
    entries = torch.where(flipped[:, None], -x, x)
    index = torch.zeros_like(x, dtype=torch.uint8)
    for low, high in pairwise(LEVELS):
        index += entries > (scale * ((low + high) * 2.0**-8))[:, None]
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=x.device)
    errors = entries - levels[index.long()] * (scale * 2.0**-7)[:, None]
    return _Choice(index, _ordered_dot(errors, errors), scale, flipped)


def _ordered_dot(a: Tensor, b: Tensor) -> Tensor:
    """Add products, exact in float64, eight apart and then in pairs."""
    products = (a.double() * b.double()).reshape(-1, BLOCK // 8, 8)
    sums = products[:, 0]
    for i in range(1, BLOCK // 8):
        sums = sums + products[:, i]
    s = sums.unbind(1)
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))
