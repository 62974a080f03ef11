"""Weights of columns beside coded ends: rounded as far as an error allows, and coded by how they fall."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraspan.collection import coding
from loraspan.collection.columns import Columns
from loraspan.errors import FormatError

# A weight may lose up to so many times what each number of its column's ends does: about what they lose, in the mean.
# Numbers that are as likely at every scale lose so much of their squares when they keep no bit behind the first, and a
# quarter of that with each one.
_TIMES, _LOST = 2, 1 / 22
# of a float32: bits behind the first, and the exponent of 1
_BITS, _ONE = 23, 127
_INFINITE = (2 * _ONE + 1) << _BITS


class Falls(NamedTuple):
    """Weights of a slot as whole numbers, their bits as float32 without the last ones.

    Attributes:
        head: bits behind the first, the exponent of the first weight less that of 1, and what weights of a task fall
            by from column to column.
        rest: ``[C]``: for the first column of a task, what it is above that of the task before, or above the power of
            2 in ``head``; for others, how much more they fall than that.
    """

    head: tuple[int, int, int]
    rest: NDArray[np.int64]


def rounded(weights: Tensor, allowed: Tensor, numbers: int) -> Tensor:
    """Round weights ``[T, q]`` to as few bits as the task needs that needs most of them.

    Args:
        weights: float64.
        allowed: ``[T]``: squared norms that may be lost in all.
        numbers: of the coded ends of a column, which lose most of it.

    Returns:
        The values, all of float32, in float64.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[3.0, 1.7]], dtype=torch.float64)
        >>> rounded(weights, torch.tensor([0.1]), 200), rounded(weights, torch.tensor([1e-4]), 200)[0, 1]
        (tensor([[3.0000, 1.6875]], dtype=torch.float64), tensor(1.7002, dtype=torch.float64))
    """
    if not weights.numel():
        return weights
    times = _LOST * weights.square().sum(-1) * numbers / (_TIMES * allowed.double()).clamp(min=1e-300)
    low = _BITS - math.ceil(math.log2(float(times.amax().clamp(1, 4.0**_BITS))) / 2)
    whole = weights.float().view(torch.int32)
    return ((whole + (1 << low >> 1)) >> low << low).view(torch.float32).double()


def falls_of(columns: Columns) -> Falls | None:
    """Give the weights of a slot as :class:`Falls`, or None if there are none, or a number would not fit 16 bits."""
    whole = columns.weights.numpy().view(np.int32).astype(np.int64)
    if not len(whole) or whole.min() < 0 or whole.max() >= _INFINITE:
        return None
    low = _trailing(int(np.bitwise_or.reduce(whole)))
    codes, bits = whole >> low, _BITS - low
    starts, _ = _spans(columns.counts)
    exponent = int(codes[0]) >> bits
    rest = np.diff(codes, prepend=0)
    first = np.diff(codes[starts], prepend=exponent << bits)
    inner = np.ones(len(rest), dtype=np.bool_)
    inner[starts] = False
    fall = int(np.median(-rest[inner])) if inner.any() else 0
    rest = -rest - fall
    rest[starts] = first
    head = (bits, exponent - _ONE, fall)
    fits = max(abs(fall), int(np.abs(rest).max())) <= coding.LARGEST[16]
    return Falls(head, rest) if fits else None


def encode(slots: Sequence[Falls]) -> bytes:
    """Give the weights of some slots as one stream: their heads, and then what follows them as one row."""
    heads = np.diff(np.array([slot.head for slot in slots]).T, axis=1, prepend=0)
    return coding.encode([_narrow(heads), _narrow(np.concatenate([slot.rest for slot in slots])[None])])


def decode(stream: bytes, counts: Mapping[str, NDArray[np.int64]]) -> dict[str, Tensor]:
    """Give the weights of :func:`encode`.

    Args:
        stream: of these slots, in this order.
        counts: of their columns, ``[T, 4]``, some of them not 0.

    Raises:
        FormatError: if it is not one of such columns.
    """
    sizes = [int(each.sum()) for each in counts.values()]
    heads, rest = coding.decode(stream, [(3, len(sizes)), (1, sum(sizes))])
    whole = np.cumsum(heads.astype(np.int64), axis=1).T.tolist()
    parts = np.split(rest[0].astype(np.int64), np.cumsum(sizes[:-1]))
    return {
        slot: _weights_of(Falls(tuple(head), part), counts[slot])
        for slot, head, part in zip(counts, whole, parts, strict=True)
    }


def _weights_of(slot: Falls, counts: NDArray[np.int64]) -> Tensor:
    bits, exponent, fall = slot.head
    if not (0 <= bits <= _BITS and -_ONE <= exponent <= _ONE):
        raise FormatError(f"needs weights of 0 to {_BITS} bits and an exponent of up to {_ONE}; got {bits}, {exponent}")
    starts, lengths = _spans(counts)
    first = np.cumsum(slot.rest[starts]) + (exponent + _ONE << bits)
    fallen = slot.rest + fall
    fallen[starts] = 0
    fallen = np.cumsum(fallen)
    codes = np.repeat(first + fallen[starts], lengths) - fallen
    low = _BITS - bits
    if codes.min() < 0 or codes.max() >= _INFINITE >> low:
        raise FormatError("needs weights that are finite and not negative")
    return torch.from_numpy((codes << low).astype(np.int32).view(np.float32))


def _spans(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give where the columns of every task start that has any, and how many it has."""
    each = counts.sum(axis=1)
    lengths = each[each > 0]
    return np.cumsum(lengths) - lengths, lengths


def _trailing(value: int) -> int:
    """Give how many of the bits behind the first are 0 in all weights whose bits are in ``value``."""
    return min((value & -value).bit_length() - 1, _BITS) if value else _BITS


def _narrow(table: NDArray[np.int64]) -> coding.Codes:
    return table.astype(np.int8 if np.abs(table).max() <= coding.LARGEST[8] else np.int16)
