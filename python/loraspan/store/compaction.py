"""Which segments to join, so that a store never consists of many small files."""

from __future__ import annotations

from collections.abc import Sequence

# so many segments of a size class may lie side by side, and a class is so many times larger than the one below
_MOST = 8
_UNIT = 1 << 12
# larger ones are left as they are, so that what is joined takes about 1.2 GB of memory at most
_LARGEST = 1 << 27


def first_to_join(sizes: Sequence[int]) -> int:
    """Give the place from which on all segments become one; the number of segments if they stay as they are.

    Only what came last is joined, so tasks keep their order. Let ``S(c)`` be the longest tail of segments of size
    class ``c`` at most; a class is eight times the one below. A tail with more than 8 segments for each class in it is
    joined, the smallest such tail first. So there are at most 8 segments for each class, ``8 log8(bytes / 4096)`` in
    all; those above 128 MiB are left alone, and each may have such a tail before it. A tail that is joined has at least
    8 segments that the next smaller tail has not: what is written again moves up a class. Tasks of one size are written
    at most once on each class, ``1 + log8(bytes of all / bytes of one)`` times; no order of sizes that was searched for
    comes above that with the smallest for the one.

    Args:
        sizes: bytes of the segments, in order.

    Example:
        >>> first_to_join([9000] * 8), first_to_join([100_000] + [9000] * 9), first_to_join([9000] * 3 + [100_000])
        (8, 1, 4)

    Source:
        O'Neil et al., *The log-structured merge-tree*, Acta Informatica 33 (1996), in its tiered form.
    """
    sizes = list(sizes)
    count = first = len(sizes)
    while (found := _excess([_class_of(size) for size in sizes])) is not None:
        first = found
        sizes[first:] = [sum(sizes[first:])]
    return first if first < count else count


def _excess(classes: Sequence[int]) -> int | None:
    for largest in sorted(set(classes)):
        first = len(classes)
        while first and classes[first - 1] <= largest and classes[first - 1] >= 0:
            first -= 1
        if len(classes) - first > _MOST * len(set(classes[first:])):
            return first
    return None


def _class_of(size: int) -> int:
    """Give the size class: -1 for what is never joined."""
    return -1 if size > _LARGEST else ((size // _UNIT).bit_length() + 2) // 3
