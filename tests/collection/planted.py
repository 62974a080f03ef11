"""Adapters with known structure, and what a collection says of them, in float64."""

from __future__ import annotations

import numpy as np
import torch

from loraspan.adapters.base import Adapter, Slot
from loraspan.collection.rows import values_of
from loraspan.ops.packed import unpacked


def orthonormal(rows, columns, rng):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def adapters(
    count=9,
    shape=(40, 56),
    ranks=(3, 4, 5),
    shared_out=6,
    shared_in=6,
    noise=0.02,
    slots=2,
    seed=0,
    dtype=torch.float32,
    cond=10.0,
):
    """Adapters whose factors are mixed from shared directions (0: from none), plus noise, each in a gauge of its own.

    Scales are no powers of two and norms differ by an order of magnitude.
    """
    rng = np.random.default_rng(seed)
    n, d = shape
    made = []
    bases = [(orthonormal(n, shared_out or 1, rng), orthonormal(d, shared_in or 1, rng)) for _ in range(slots)]
    for i in range(count):
        parts = {}
        for j, (u, v) in enumerate(bases):
            r = ranks[i % len(ranks)]
            up = u @ rng.standard_normal((u.shape[1], r)) if shared_out else rng.standard_normal((n, r))
            down = rng.standard_normal((r, v.shape[1])) @ v.T if shared_in else rng.standard_normal((r, d))
            up, down = up + noise * rng.standard_normal((n, r)), down + noise * rng.standard_normal((r, d))
            gauge = orthonormal(r, r, rng) * np.geomspace(1, cond, r)
            up, down = up @ gauge, np.linalg.solve(gauge, down)
            parts[f"layers.{j}.q_proj"] = Slot(
                torch.from_numpy(down).to(dtype), torch.from_numpy(up).to(dtype), 0.3 * (1 + i)
            )
        made.append(Adapter(f"task {i}", parts))
    return made


def delta(slot):
    """``dW`` in float64."""
    return slot.scale * slot.up.double().numpy() @ slot.down.double().numpy()


def stored_delta(collection, path, task):
    """``dW`` of a task as a slot's columns define it, read off the definition column by column."""
    name = task if isinstance(task, str) else collection.tasks[task].name
    space, (segment, place) = collection.slots[path], collection.find(name)
    columns = segment.columns[path]
    row = int(np.flatnonzero(columns.tasks == place)[0])
    ss, sp, ps, pp = columns.counts[row]
    starts, stops = columns.offsets()[row], columns.offsets()[row + 1]
    weights, left, left_own, right, right_own = (
        values_of(rows).double().numpy()[a:b]
        for rows, a, b in zip(columns.tensors().values(), starts, stops, strict=True)
    )
    u, v = (unpacked(side).double().numpy() for side in (space.u, space.v))
    shared_right = list(range(v.shape[1])) if columns.dense[row] else None
    total = np.zeros((len(u), len(v)))
    for c in range(ss + sp + ps + pp):
        end_left = u @ left[c] if c < ss + sp else left_own[c - ss - sp]
        if c < ss:
            end_right = v[:, shared_right[c]] if shared_right is not None else v @ right[c]
        elif c < ss + sp:
            end_right = right_own[c - ss]
        elif c < ss + sp + ps:
            end_right = v @ right[(0 if shared_right is not None else ss) + c - ss - sp]
        else:
            end_right = right_own[sp + c - ss - sp - ps]
        total += weights[c] * np.outer(end_left, end_right)
    return total


def relative_error(adapter, given):
    """Relative Frobenius error over all slots; ``given`` maps a path to a matrix."""
    lost = sum(np.square(delta(slot) - given(path)).sum() for path, slot in adapter.slots.items())
    return np.sqrt(lost / sum(np.square(delta(slot)).sum() for slot in adapter.slots.values()))
