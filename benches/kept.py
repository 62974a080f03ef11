"""Measure what the sample adapters keep of their accuracy near 8 % of the bytes of their factors in float32.

    python benches/kept.py [--json FILE]        # two minutes, one core

Which images of a few thousand go wrong at an error on ``dW`` of 0.15 is chance: a budget of 0.1 % more moves the
accuracy by up to half a per cent to either side. So there are many budgets, and all test images: ``line`` is what a
straight line through the points says at 8 %, ``spread`` the standard deviation of the points around it. Both families
are measured by themselves, and together in one space. Heads are kept apart, as in ``fidelity.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import loraspan
from _bench import machine, table
from loraspan.cli.demo_compare import Family
from loraspan.cli.demo_data import FAMILIES

GOAL = 0.08
SHARES = tuple(round(0.075 + 0.0005 * i, 4) for i in range(11))
ALL_IMAGES = 10**6


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a line for each figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    families = {name: Family(name, images=ALL_IMAGES) for name in FAMILIES}
    records: list[dict[str, object]] = []
    for names in (*((name,) for name in FAMILIES), FAMILIES):
        kept = [keep([families[name] for name in names], share) for share in SHARES]
        slope, at_goal = np.polyfit(np.array(SHARES) - GOAL, [one[0] for one in kept], 1)
        around = np.array([one[0] for one in kept]) - (at_goal + slope * (np.array(SHARES) - GOAL))
        found = {f"{share:.2%}": one[0] for share, one in zip(SHARES, kept, strict=True)}
        records.append({"family": " and ".join(names), **found, "line": float(at_goal), "spread": float(around.std())})
        records[-1]["error at 8 %"] = kept[-1][1]
    print(table(records, list(records[0])))
    if options.json:
        about = {"bench": "kept", "machine": machine()}
        with options.json.open("a") as file:
            file.write("".join(f"{json.dumps({**about, **record})}\n" for record in records))


def keep(families: Sequence[Family], share: float) -> tuple[float, float]:
    """Give the share of the accuracy that is kept, and the worst error on ``dW``, at a share of the factors' bytes."""
    adapters = [replace(adapter, extras={}) for family in families for adapter in family.adapters.values()]
    factors = sum(4 * (s.up.numel() + s.down.numel()) for adapter in adapters for s in adapter.slots.values())
    space = loraspan.compress(adapters, max_bytes=int(share * factors))
    kept = []
    for family in families:
        slots = [space.reconstruct(adapter.name).slots for adapter in family.adapters.values()]
        deltas = [{path: s.scale * s.up.float() @ s.down.float() for path, s in of.items()} for of in slots]
        kept.append(family.measure("", [0.0] * len(deltas), deltas).accuracy / family.original().accuracy)
    return sum(kept) / len(kept), max(space.errors.values())


if __name__ == "__main__":
    main()
