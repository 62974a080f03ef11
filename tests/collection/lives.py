"""Collections with a past: fitted, added to, with tasks that left and slots that came later."""

from __future__ import annotations

from dataclasses import dataclass

import planted
import torch
from hypothesis import strategies as st

from loraspan.adapters.base import Adapter, Slot
from loraspan.collection.fit import Goal, fit
from loraspan.collection.rows import CODED
from loraspan.collection.update import add, remove
from loraspan.ops.packed import Packed

# how the factors of adapters relate, as `planted.adapters` takes it
STRUCTURES = {
    "both-shared": {},
    "nearly-all-shared": {"noise": 0.001},
    "input-shared": {"shared_out": 0},
    "output-shared": {"shared_in": 0},
    "none-shared": {"shared_out": 0, "shared_in": 0},
    "rank-past-the-width": {"shape": (12, 17), "ranks": (20, 3)},
    "rank-one": {"ranks": (1,)},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# those, packed in 8 and 4 bits, and with coded private ends
WIDTHS = (*DTYPES, 8, 4, CODED)
# the error within which a task is surely stored in that width: both ends of a column have unit length, rounded once
ROOMY = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05, 8: 0.05, 4: 0.4, CODED: 0.05}
# the unit in the last place of an entry as large as the largest of its block
STEP = {**{dtype: torch.finfo(dtype).eps for dtype in DTYPES}, 8: 1 / 127, 4: 1 / 7, CODED: 1 / 127}
# A relative error is the root of a difference of numbers near 1 that are summed in float64: below the root of a few
# units of 1.1e-16 it is rounding. Two hundred of them (a rank, the slots) give this.
FLOOR = 2e-7


def some(count, *, seed=0, **structure):
    """Adapters, among them one of zeros, one without the first slot and one with a slot of its own."""
    made = planted.adapters(count=count, seed=seed, **structure)
    first, last = list(made[0].slots)
    odd = {
        1: lambda a: Adapter(a.name, {p: Slot(s.down, torch.zeros_like(s.up), s.scale) for p, s in a.slots.items()}),
        2: lambda a: Adapter(a.name, {last: a.slots[last]}),
        count - 2: lambda a: Adapter(a.name, {**a.slots, "layers.9.new": turned(a.slots[first])}),
        count - 1: lambda a: Adapter(a.name, {"layers.9.new": turned(a.slots[last])}),
    }
    return [odd.get(i, lambda a: a)(adapter) for i, adapter in enumerate(made)]


def turned(slot):
    """The transposed map: other ends on either side, in another shape."""
    return Slot(slot.up.T, slot.down.T, slot.scale)


def lived(goal, adapters, *, max_error=0.05):
    """Fit the first half, add a quarter and then the rest, and take two tasks out; the originals by name."""
    half = len(adapters) // 2
    collection = fit(adapters[:half], goal)
    collection = add(collection, adapters[half:-3], max_error=max_error)
    collection = add(collection, adapters[-3:], max_error=min(4 * max_error, 0.5))
    gone = (adapters[0].name, adapters[-3].name)
    return remove(collection, gone), {a.name: a for a in adapters if a.name not in gone}


def errors(collection, originals):
    """Every task's error against its original by the definition of its columns, in float64, by name."""
    return {
        name: planted.relative_error(adapter, lambda path, name=name: planted.stored_delta(collection, path, name))
        if any(slot.up.any() for slot in adapter.slots.values())
        else max(float(abs(planted.stored_delta(collection, path, name)).max()) for path in adapter.slots)
        for name, adapter in originals.items()
    }


def reported(collection):
    """Every task's error as the collection says it, by name."""
    return {task.name: task.error for task in collection.tasks}


def bits(collection):
    """Every byte of a collection, by what it belongs to."""
    found = {}
    for path, space in collection.slots.items():
        found |= {(path, "u"): raw(space.u), (path, "v"): raw(space.v)}
    for i, segment in enumerate(collection.segments):
        for path, columns in segment.columns.items():
            arrays = {"tasks": columns.tasks, "counts": columns.counts, "dense": columns.dense}
            found |= {(i, path, name): array.tobytes() for name, array in arrays.items()}
            found |= {(i, path, name): raw(tensor) for name, tensor in columns.tensors().items()}
        found[i, "tasks"] = repr(segment.tasks).encode()
    return found


def raw(rows):
    if isinstance(rows, Packed):
        return raw(rows.codes) + raw(rows.scales)
    return rows.contiguous().view(torch.uint8).numpy().tobytes() if rows.numel() else b""


@dataclass(frozen=True)
class Life:
    """What a collection is made by; small, for a property test to print."""

    structure: str
    dtype: torch.dtype | int
    goal: dict[str, float]
    adapters: int
    seed: int

    def made(self):
        """The collection that :func:`lived`, and the originals of its tasks."""
        adapters = some(self.adapters, seed=self.seed, **STRUCTURES[self.structure])
        return lived(Goal(**self.goal, dtype=self.dtype), adapters, max_error=ROOMY[self.dtype])


@st.composite
def drawn(draw):
    """A life in some structure, dtype and goal; a rank near those of the adapters gives dense cores."""
    dtype = draw(st.sampled_from(WIDTHS))
    goal = draw(st.sampled_from([{"max_error": ROOMY[dtype]}, {"rank": 5}, {"rank": 30}]))
    return Life(
        draw(st.sampled_from(sorted(STRUCTURES))), dtype, goal, draw(st.integers(7, 14)), draw(st.integers(0, 99))
    )
