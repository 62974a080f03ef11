"""Which segments to join, so that a store never consists of many small files."""

from __future__ import annotations

from collections.abc import Sequence

# so many segments of a size class may lie side by side, and a class is so many times larger than the one below
_MOST = 8
_UNIT = 1 << 12
# larger ones are left as they are
_LARGEST = 1 << 26
# what is joined is in memory: 8 of the largest, as many of each class below, and one more
MEMORY = 3 << 28


def groups(
    sizes: Sequence[int], standing: int = 0, *, taking: Sequence[int] | None = None, memory: int = MEMORY
) -> list[range]:
    """Give which segments become one: ranges of places, one after another, most of them of one segment.

    Segments are taken to come one after another. Only what came last is joined, so tasks keep their order. Let ``S(c)``
    be the longest tail of segments of size class ``c`` at most; a class is eight times the one below. A tail with more
    than 8 segments for each class in it is joined, the smallest such tail first. So there are at most 8 segments for
    each class, ``8 log8(bytes / 4096)`` in all; those above 64 MiB are left alone, and each may have such a tail before
    it. A tail that is joined has at least 8 segments that the next smaller tail has not: what is written again moves up
    a class. Tasks of one size are written at most once on each class, ``1 + log8(bytes of all / bytes of one)`` times;
    no order of sizes that was searched for comes above that with the smallest for the one.

    A tail that would take more than ``memory`` is joined as far as that goes. Of files that are in memory as they are
    on disk these rules never make a tail of 768 MiB: it comes from a store that others have written.

    Args:
        sizes: bytes of the segments, in order.
        standing: how many of them are there already, and were joined where that was due.
        taking: bytes of memory that joining each of them takes, where that is not its size.
        memory: bytes that joining some may take.

    Example:
        >>> groups([9000] * 3, 2), groups([100_000] + [9000] * 9, 9), groups([9000] * 3 + [100_000], 3)[-1]
        ([range(0, 1), range(1, 2), range(2, 3)], [range(0, 1), range(1, 10)], range(3, 4))

    Source:
        O'Neil et al., *The log-structured merge-tree*, Acta Informatica 33 (1996), in its tiered form.
    """
    taking = sizes if taking is None else taking
    held = [(range(i, i + 1), size) for i, size in enumerate(sizes[:standing])]
    _join(held, taking, memory)
    for i, size in enumerate(sizes[standing:], standing):
        held.append((range(i, i + 1), size))
        _join(held, taking, memory)
    return [places for places, _ in held]


def _join(held: list[tuple[range, int]], taking: Sequence[int], memory: int) -> None:
    while (first := _excess([_class_of(size) for _, size in held])) is not None:
        stop = held[-1][0].stop
        while first < len(held) and sum(taking[held[first][0].start : stop]) > memory:
            first += 1
        if len(held) - first < 2:
            return
        held[first:] = [(range(held[first][0].start, held[-1][0].stop), sum(size for _, size in held[first:]))]


def _excess(classes: Sequence[int]) -> int | None:
    for largest in sorted(set(classes)):
        first = len(classes)
        while first and 0 <= classes[first - 1] <= largest:
            first -= 1
        if len(classes) - first > _MOST * len(set(classes[first:])):
            return first
    return None


def _class_of(size: int) -> int:
    """Give the size class: -1 for what is never joined."""
    return -1 if size > _LARGEST else ((size // _UNIT).bit_length() + 2) // 3
