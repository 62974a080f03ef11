"""The collections of ``benches/fidelity.py``: from all shared to nothing shared, and really trained ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from loraspan.adapters import Adapter, peft, read_all
from loraspan.adapters.base import Slot

_SHAPE, _SLOTS, _RANK, _SCALE = (256, 192), 3, 8, 1.7
_SHARED, _DECAY = 12, 0.85
SAMPLES = Path(__file__).parents[1] / "examples" / "adapters"


def cases(count: int) -> dict[str, list[Adapter]]:
    """Give every case: ``count`` adapters of 3 slots of 256 x 192, rank 8 unless said; and the sample adapters.

    ``shared``: 12 directions on each side hold nearly all. ``nothing shared``: Gaussian factors. ``own seeds``: an A of
    its own and a B whose columns fall off, as trained ones have. ``one seed``: the same with one A for all. ``mixed
    ranks``: as shared, ranks 2 to 16. ``dominant``: as shared, one adapter 30 times the others. ``combinations``:
    linear combinations of the factors of four adapters, as checkpoints of one run would be.
    """
    made = {
        "shared": _adapters(count, 1, shared=True),
        "nothing shared": _adapters(count, 2, shared=False, decay=1.0),
        "own seeds": _adapters(count, 3, shared=False),
        "one seed": _adapters(count, 4, shared=False, one_seed=True),
        "mixed ranks": _adapters(count, 5, shared=True, ranks=(2, 4, 8, 16)),
        "dominant": _adapters(count, 6, shared=True, strong=30.0),
        "combinations": _combinations(count, 7),
    }
    for family in ("shared-seed", "own-seed"):
        found = list(read_all(str(SAMPLES / f"{family}-*")))
        made[f"trained, {family}"] = found
    return made


def write_all(adapters: list[Adapter], folder: Path) -> None:
    """Write PEFT folders, float32, for those who read files."""
    for adapter in adapters:
        slots = {p: Slot(s.down.float(), s.up.float(), s.scale, s.kind, s.kernel) for p, s in adapter.slots.items()}
        peft.write(Adapter(adapter.name, slots, {}, adapter.config), folder / adapter.name)


def _adapters(
    count: int,
    seed: int,
    *,
    shared: bool,
    decay: float = _DECAY,
    one_seed: bool = False,
    ranks: tuple[int, ...] = (_RANK,),
    strong: float = 1.0,
) -> list[Adapter]:
    draw = torch.Generator().manual_seed(seed)
    n, d = _SHAPE
    bases = [(_orthonormal(n, _SHARED, draw), _orthonormal(d, _SHARED, draw)) for _ in range(_SLOTS)]
    first = [torch.randn(max(ranks), d, generator=draw) for _ in range(_SLOTS)]
    made = []
    for i in range(count):
        slots, r = {}, ranks[i % len(ranks)]
        for j, (u, v) in enumerate(bases):
            if shared:
                up = u @ torch.randn(_SHARED, r, generator=draw) + 0.004 * torch.randn(n, r, generator=draw)
                down = torch.randn(r, _SHARED, generator=draw) @ v.T + 0.004 * torch.randn(r, d, generator=draw)
            else:
                up = torch.randn(n, r, generator=draw) * decay ** torch.arange(r)
                own = torch.randn(r, d, generator=draw)
                down = first[j][:r] + 0.02 * own if one_seed else own
            slots[f"layers.{j}.q_proj"] = Slot(down, up * (strong if i == 0 else 1.0), _SCALE)
        made.append(Adapter(f"task-{i:03d}", slots))
    return made


def _combinations(count: int, seed: int) -> list[Adapter]:
    roots = _adapters(4, seed, shared=False)
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
    return made


def _orthonormal(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=draw))[0]
