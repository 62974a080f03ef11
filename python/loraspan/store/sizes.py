"""How large slots may be: their sizes are numbers in a manifest, which cost nothing to write."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from loraspan.collection.columns import Columns

if TYPE_CHECKING:
    from loraspan.store.manifest import SlotShape

# of a side: 64 times the largest vocabulary
LONGEST = 2**24
# of all sides together for which no basis and no column was paid with bytes, and which an export fills with zeros: more
# than the largest mixture of experts has
MOST_BARE = 2**30


def slot_problem(slot: SlotShape) -> str | None:
    """Say what about the sizes of a slot cannot be, if anything."""
    for length, width in ((slot.n, slot.k_out), (slot.d, slot.k_in)):
        # where the length is 0 there are no bytes that a hostile width would have to be paid with
        if width > length:
            return f"a basis of {width} vectors of length {length} cannot be orthonormal"
    if max(slot.n, slot.d) > LONGEST:
        return f"a side has at most {LONGEST} entries; it is {slot.n} x {slot.d}"
    if (slot.kind == "conv2d") != (slot.kernel is not None) or (slot.kernel and math.prod(slot.kernel) != slot.d):
        return f"a convolution, and nothing else, has a kernel, of {slot.d} entries; it is {slot.kind}, {slot.kernel}"
    return None


def bare_problem(columns: Mapping[str, Columns], slots: Iterable[SlotShape]) -> str | None:
    """Say that slots in which no task has a column, and which have no bases, are larger than those of any model."""
    bare = [slot for slot in slots if len(columns[slot.name].tasks) and not columns[slot.name].counts.any()]
    size = sum((0 if slot.k_out else slot.n) + (0 if slot.k_in else slot.d) for slot in bare)
    if size <= MOST_BARE:
        return None
    return f"{len(bare)} slots that no column fills have sides of {size} entries without a basis; at most {MOST_BARE}"
