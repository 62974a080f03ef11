"""Groups of adapters that fit in memory, and the memory that work on one of them takes.

Everything here counts, from shapes alone, so that the groups, and with them every bit of the result, follow from the
adapters and from ``memory=`` and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from loraspan.collection.fit import Goal
from loraspan.collection.rows import CODED
from loraspan.errors import ArgumentError
from loraspan.many.members import Map, Member

# groups that are in work or waiting to be written at one time
IN_FLIGHT = 4
# matrices of that size which the steps hold at one time, counted in the code and rounded up; float64 each
_BLOCKS, _BLOCKS_OF_ALL, _PANELS, _GRAMS, _FRAMES, _PRODUCTS, _CORES = 12, 2, 8, 4, 24, 10, 5
# find_range takes the Gram of all rows up to this many rows for each direction
_GRAM_ROWS = 13
# summaries or columns at one time: as made, as a file's bytes, and as another process sends those
_COPIES = 3
# tables of private ends that looking for their step holds at one time: float32, and whole numbers of 16 bits. What they
# are coded into takes no more than these, and leaves them behind
_STEPS, _NUMBER = 8, 2
# what Python keeps of an adapter in the list of all, and the rest of the process's own
_MEMBER, _OWN = 6 << 10, 48 << 20
_DOUBLE, _SINGLE = 8, 4


@dataclass
class Tally:
    """What a group has so far: by slot its members, rows, and the sum of the squares of its ranks."""

    tasks: int = 0
    members: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)

    def add(self, maps: Sequence[Map]) -> None:
        """Count one more adapter."""
        self.tasks += 1
        for each in maps:
            self.members[each.path] = self.members.get(each.path, 0) + 1
            self.rows[each.path] = self.rows.get(each.path, 0) + each.lora_rank
            self.blocks[each.path] = self.blocks.get(each.path, 0) + each.lora_rank**2


Cost = Callable[[Tally], int]


def summary_cost(slots: Mapping[str, Map], widths: Mapping[str, int]) -> Cost:
    r"""Give the bytes it takes to summarize a group.

    .. math:: \sum_s 16 \sum r^2 + \max_s (96 \sum r^2 + 64 R l + 32 \min(R, 13 l)^2) + 12 \sum_s l (n + d)

    with ``R`` the rows of a slot ``s`` in the group and ``l`` the width of its summaries.
    """
    kept = _COPIES * _SINGLE * sum(width * (slots[path].n + slots[path].d) for path, width in widths.items())

    def cost(tally: Tally) -> int:
        peak = 0
        for path, rows in tally.rows.items():
            width = widths.get(path, 0)
            inner = _GRAMS * min(rows, _GRAM_ROWS * width) ** 2
            peak = max(peak, _BLOCKS * tally.blocks[path] + _PANELS * rows * width + inner)
        return kept + _DOUBLE * (peak + _BLOCKS_OF_ALL * sum(tally.blocks.values()))

    return cost


def sample_cost(slots: Mapping[str, Map], widths: Mapping[str, int] | None = None) -> Cost:
    """Give the bytes it takes to decide on a sample: among directions of such widths, or whatever widths it comes to.

    Before widths are known there are no more than rows; after that, every task has a core of them.
    """

    def cost(tally: Tally) -> int:
        peak = 0
        for path, rows in tally.rows.items():
            found = min(rows, max(slots[path].n, slots[path].d))
            width, cores = (found, 0) if widths is None else (widths.get(path, 0), tally.members[path])
            own = _BLOCKS * tally.blocks[path] + _GRAMS * rows**2
            peak = max(peak, own + _PANELS * rows * width + _CORES * cores * width**2)
        return _DOUBLE * (peak + _BLOCKS_OF_ALL * sum(tally.blocks.values()))

    return cost


def express_cost(slots: Mapping[str, Map], ranks: Mapping[str, int], goal: Goal) -> Cost:
    r"""Give the bytes it takes to express a group on bases that stand.

    At worst every column is private, as large as the factors, in the stored dtype. Ends that are to be coded are formed
    in float32, and are whole numbers from then on.
    """
    coded = goal.widths.private == CODED
    item = _NUMBER if coded else goal.floats.itemsize
    all_shared = goal.max_error is None

    def cost(tally: Tally) -> int:
        peak, products, stored = 0, 0, 0
        for path, rows in tally.rows.items():
            rank, one = ranks.get(path, 0), slots[path]
            frames = tally.blocks[path] + 2 * rows * rank + tally.members[path] * rank**2
            entries = rows * (2 * rank if all_shared else one.n + one.d)
            formed = _STEPS * _SINGLE * entries // _DOUBLE if coded and not all_shared else 0
            peak = max(peak, _FRAMES * frames + formed)
            products += _PRODUCTS * rows * rank
            stored += item * entries
        return _COPIES * stored + _DOUBLE * (peak + products + _BLOCKS_OF_ALL * sum(tally.blocks.values()))

    return cost


def merge_arity(slots: Mapping[str, Map], widths: Mapping[str, int], limit: int) -> int:
    """Give how many summaries to merge at one time: few levels lose less, as far as memory goes."""
    width = max(widths.values(), default=0)
    kept = _COPIES * _SINGLE * sum(each * (slots[path].n + slots[path].d) for path, each in widths.items())
    return next((arity for arity in (8, 4) if kept + _DOUBLE * _GRAMS * (arity * width) ** 2 <= limit), 2)


def cut(members: Sequence[Member], cost: Cost, limit: int) -> list[range]:
    """Cut the members, in order, into groups that cost at most ``limit`` bytes each; one adapter is always a group."""
    groups: list[range] = []
    start, tally = 0, Tally()
    for i, member in enumerate(members):
        tally.add(member.maps)
        if i > start and cost(tally) > limit:
            groups.append(range(start, i))
            start, tally = i, Tally()
            tally.add(member.maps)
    groups.append(range(start, len(members)))
    return groups


def sample(members: Sequence[Member], slots: Mapping[str, Map], cost: Cost, limit: int) -> list[int]:
    """Choose members spread evenly over all, as many as cost at most ``limit`` bytes, and one for every slot."""
    count = 1
    while count < len(members) and _cost_of([members[i] for i in _spread(len(members), 2 * count)], cost) <= limit:
        count *= 2
    chosen = _spread(len(members), min(count, len(members)))
    missing = slots.keys() - {each.path for i in chosen for each in members[i].maps}
    for i, member in enumerate(members):
        if not missing:
            break
        if any(each.path in missing for each in member.maps):
            chosen.append(i)
            missing -= {each.path for each in member.maps}
    return sorted(set(chosen))


def _spread(among: int, count: int) -> list[int]:
    """Give the middles of ``count`` equal spans.

    Example:
        >>> _spread(10, 2), _spread(3, 4)
        ([2, 7], [0, 1, 2])
    """
    count = min(count, among)
    return [(2 * i + 1) * among // (2 * count) for i in range(count)]


def _cost_of(members: Sequence[Member], cost: Cost) -> int:
    tally = Tally()
    for member in members:
        tally.add(member.maps)
    return cost(tally)


def standing(count: int) -> int:
    """Give the bytes that a run over ``count`` adapters holds all the time."""
    return _OWN + _MEMBER * count


def limit_of(memory: int, members: Sequence[Member], costs: Sequence[Cost]) -> int:
    """Give the bytes that one group may take: all but what is held all the time, by those in flight and one merge.

    Raises:
        ArgumentError: if ``memory`` does not do even for one adapter at a time; says what would.
    """
    largest = {member.maps: member for member in members}.values()
    one = max((_cost_of([member], cost) for member in largest for cost in costs), default=0)
    least = standing(len(members)) + (IN_FLIGHT + 1) * one
    if memory < least:
        raise ArgumentError(
            f"compress: memory={memory:,} bytes is too little for {len(members)} adapters of this kind: the least is "
            f"{least:,}"
        )
    return (memory - standing(len(members))) // (IN_FLIGHT + 1)
