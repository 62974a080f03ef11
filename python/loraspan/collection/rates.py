"""What rounding to whole steps takes in bits and loses in energy, entries being normal."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# Steps over the standard deviation of entries for which rates are known, and how many. Below the least, the largest of
# thousands of normal entries would be above 32512 steps: such rows take a longer step of their own. Below `_SHORT`
# what is rounded is normal again, with the variance of the rounding on top.
LEAST, _MOST, _COUNT, _SHORT = 1 / 4096, 64.0, 260, 1 / 16
# Of the whole numbers of a trellis to a step that loses as much, and the bits an entry that it saves, but of few bits a
# share at the most. From a ratio on it loses as much as a step that is shorter, but not below the last. All of this is
# measured on normal entries.
TO_A_STEP, _SAVES, _SAVES_OF = 1.716, 0.221, 0.205
_LONG, _SHORTER_BY, _SHORTEST = 1.89, 0.068, 0.9
# Between these ratios most rows are rounded each by itself: so they still fit 8 bits, and by a trellis no longer.
_ALONE = 1 / 32, 1 / 14


def rates(ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Give bits an entry, and the share of energy lost, of normal entries for steps over their standard deviation."""
    rate, lost = _rounded(ratios * (1 - _SHORTER_BY * (ratios - _LONG)).clamp(_SHORTEST, 1))
    alone = (ratios > _ALONE[0]) & (ratios < _ALONE[1])
    return rate - torch.where(alone, 0.0, (_SAVES_OF * rate).clamp(max=_SAVES)), lost


def _rounded(ratios: Tensor) -> tuple[Tensor, Tensor]:
    """Give the same of entries that are rounded each by itself."""
    table = _table()
    place = (ratios.clamp(LEAST, _MOST) / LEAST).log() * ((_COUNT - 1) / math.log(_MOST / LEAST))
    low = place.floor().clamp(max=_COUNT - 2)
    share = (place - low).unsqueeze(-1)
    at = low.long()
    found = (1 - share) * table[at] + share * table[at + 1]
    return found[..., 0], found[..., 1]


@cache
def _table() -> Tensor:
    """``[_COUNT, 2]``: entropy in bits, and lost energy, of a unit normal rounded to steps and weighed at its best."""
    steps = torch.logspace(math.log10(LEAST), math.log10(_MOST), _COUNT, dtype=torch.float64)
    short, lost = steps[steps < _SHORT], steps[steps < _SHORT].square() / 12
    known = torch.stack([(2 * math.pi * math.e * (1 + lost)).log2() / 2 - short.log2(), lost / (1 + lost)], dim=-1)
    steps = steps[len(short) :, None]
    # eight standard deviations, in the shortest steps
    k = torch.arange(8 / _SHORT + 1, dtype=torch.float64)
    low, high = (k - 0.5).clamp(min=0) * steps, (k + 0.5) * steps
    shares = (torch.erfc(low / math.sqrt(2)) - torch.erfc(high / math.sqrt(2))) / 2
    density = [torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) for x in (low, high)]
    each = torch.where(k == 0, 2.0, 1.0) * shares
    entropy = -(torch.where(k == 0, 1.0, 2.0) * each * each.clamp(min=1e-300).log2()).sum(-1)
    seen = 2 * (k * (density[0] - density[1])).sum(-1)
    squares = 2 * (k.square() * shares).sum(-1)
    lost = 1 - torch.where(squares > 1e-9, seen.square() / squares.clamp(min=1e-300), 0.0)
    return torch.cat([known, torch.stack([entropy, lost], dim=-1)])
