"""The collections of ``benches/fidelity.py``: from all shared to nothing shared, and really trained ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from loraspan.adapters import Adapter
from loraspan.adapters.base import Slot
from loraspan.cli.demo_compare import Family

_SHAPE, _SLOTS, _RANK, _SCALE = (1024, 768), 2, 8, 1.7
_SHARED, _DECAY = 12, 0.85
# length of what lies outside the shared directions, beside sqrt(12) inside
_NOISE = 0.07

Factors = dict[str, tuple[Tensor, Tensor]]
"""``dW`` of a task by slot: ``left [n, q]`` and ``right [q, d]``."""


@dataclass(frozen=True)
class Case:
    """A collection.

    Attributes:
        adapters: without heads; those are kept apart by everyone.
        accuracy: gives the mean accuracy over the tasks for what came back of each, where there are tasks.
    """

    adapters: Sequence[Adapter]
    accuracy: Callable[[Sequence[Factors]], float] | None = None


def cases(count: int) -> dict[str, Callable[[], Case]]:
    """Give every case: ``count`` adapters of 2 slots of 1024 x 768, rank 8 unless said; and the sample adapters.

    ``shared``: 12 directions on each side hold nearly all. ``nothing shared``: Gaussian factors. ``own seeds``: an A of
    its own and a B whose columns fall off, as trained ones have. ``one seed``: the same with one A for all. ``mixed
    ranks``: as shared, ranks 2 to 16. ``dominant``: as shared, one adapter 30 times the others. ``combinations``:
    linear combinations of the factors of four adapters, as checkpoints of one run would be.
    """
    return {
        "shared": partial(_adapters, count, 1, shared=True),
        "nothing shared": partial(_adapters, count, 2, shared=False, decay=1.0),
        "own seeds": partial(_adapters, count, 3, shared=False),
        "one seed": partial(_adapters, count, 4, shared=False, one_seed=True),
        "mixed ranks": partial(_adapters, count, 5, shared=True, ranks=(2, 4, 8, 16)),
        "dominant": partial(_adapters, count, 6, shared=True, strong=30.0),
        "combinations": partial(_combinations, count, 7),
        "trained, shared-seed": partial(_trained, "shared-seed"),
        "trained, own-seed": partial(_trained, "own-seed"),
    }


def _adapters(
    count: int,
    seed: int,
    *,
    shared: bool,
    decay: float = _DECAY,
    one_seed: bool = False,
    ranks: tuple[int, ...] = (_RANK,),
    strong: float = 1.0,
) -> Case:
    draw = torch.Generator().manual_seed(seed)
    n, d = _SHAPE
    bases = [(_orthonormal(n, _SHARED, draw), _orthonormal(d, _SHARED, draw)) for _ in range(_SLOTS)]
    first = [torch.randn(max(ranks), d, generator=draw) for _ in range(_SLOTS)]
    made = []
    for i in range(count):
        slots, r = {}, ranks[i % len(ranks)]
        for j, (u, v) in enumerate(bases):
            if shared:
                rough_up, rough_down = (_NOISE / m**0.5 * torch.randn(m, r, generator=draw) for m in _SHAPE)
                up = u @ torch.randn(_SHARED, r, generator=draw) + rough_up
                down = (v @ torch.randn(_SHARED, r, generator=draw) + rough_down).T
            else:
                up = torch.randn(n, r, generator=draw) * decay ** torch.arange(r)
                own = torch.randn(r, d, generator=draw)
                down = first[j][:r] + 0.02 * own if one_seed else own
            slots[f"layers.{j}.q_proj"] = Slot(down, up * (strong if i == 0 else 1.0), _SCALE)
        made.append(Adapter(f"task-{i:03d}", slots))
    return Case(made)


def _combinations(count: int, seed: int) -> Case:
    roots = _adapters(4, seed, shared=False).adapters
    draw = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        weights = torch.randn(4, generator=draw)
        slots = {
            path: Slot(
                sum(w * root.slots[path].down for w, root in zip(weights, roots, strict=True)),
                sum(w * root.slots[path].up for w, root in zip(weights, roots, strict=True)),
                _SCALE,
            )
            for path in roots[0].slots
        }
        made.append(Adapter(f"task-{i:03d}", slots))
    return Case(made)


def _trained(name: str) -> Case:
    family = Family(name)

    def accuracy(rebuilt: Sequence[Factors]) -> float:
        deltas = [{path: (left @ right).float() for path, (left, right) in of.items()} for of in rebuilt]
        return family.measure(name, [0.0] * len(deltas), deltas).accuracy

    # in the order of the tests that the family holds
    return Case([replace(adapter, extras={}) for adapter in family.adapters.values()], accuracy)


def _orthonormal(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=draw))[0]
