"""Loadings of any signs and lengths in the place of those that a task had: every form of column, dense cores, zeros."""

import numpy as np
import planted
import pytest
import torch

from loraspan.collection.rows import flip_rows, same_rows
from loraspan.collection.trained import Loadings, keep, parts_of
from loraspan.errors import ArgumentError, NotFiniteError
from loraspan.ops import Cores
from store.samples import collection
from task_cores import delta

U32 = 2.0**-24


def drawn(part, rng):
    """Loadings for the columns of a slot, one of them a row of zeros where there are several."""
    weights, left, right = (torch.randn(t.shape, generator=rng) for t in part.loadings)
    if len(left) > 2:
        left[1] = 0
    return Loadings(3 * weights, left, 2 * right)


def delta_of(part, loadings):
    """``dW`` in float64, by the oracle of the operator that trained them."""
    own = part.columns.left_private, part.columns.right_private
    tables = (loadings.left, own[0], loadings.right, own[1])
    cores = Cores.of(part.columns.counts, loadings.weights, *tables, dense=part.columns.dense)
    return delta(cores, part.space.v, part.space.u, 0)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_kept_is_what_was_trained(seed):
    held, rng = collection(seed, slots=4), torch.Generator().manual_seed(seed)
    names = [task.name for task in held.tasks]
    parts = {name: parts_of(held, name) for name in names}
    trained = {
        name: {path: drawn(part, rng) for path, part in parts[name].items()} for name in names[:3] if parts[name]
    }
    wanted = {
        name: {path: delta_of(parts[name][path], new) for path, new in of_slots.items()}
        for name, of_slots in trained.items()
    }
    given = {name: {path: [t.clone() for t in new] for path, new in of.items()} for name, of in trained.items()}

    kept = keep(held, trained)

    assert kept.slots is held.slots
    assert {task.name for task in kept.tasks} == set(names)
    for name, deltas in wanted.items():
        task, off, size = kept.task(name), 0.0, 0.0
        for path, exact in deltas.items():
            found = planted.stored_delta(kept, path, name)
            off, size = off + np.square(found - exact).sum(), size + np.square(exact).sum()
            columns = parts_of(kept, name)[path].columns
            assert (columns.weights >= 0).all()
            for ends in (columns.left_loadings, columns.right_loadings):
                # of a few entries that are rounded once each
                lengths = ends.norm(dim=1)
                assert ((lengths - 1).abs() <= 4 * U32).logical_or(lengths == 0).all()
            for old, new in zip(_own(parts[name][path]), _own(parts_of(kept, name)[path]), strict=True):
                signs = torch.where((old == new).all(dim=1), 1.0, -1.0)
                assert same_rows(flip_rows(old, signs), new)
            assert all(map(torch.equal, trained[name][path], given[name][path]))
        assert task.norm == pytest.approx(np.sqrt(size), rel=1e-9)
        assert task.error == pytest.approx(np.sqrt(off / size) if size else 0.0, rel=1e-5, abs=1e-13)
        # both ends and the weight of each of at most 14 columns of the longest dW, were none to cancel another
        assert task.error <= 3 * 14 * U32
    for name in names:
        if name not in wanted:
            assert kept.task(name) is held.task(name)


def _own(part):
    return part.columns.left_private, part.columns.right_private


def test_tasks_that_did_not_change_stay_and_there_has_to_be_one_that_did():
    held = collection(3, slots=4)
    same = {task.name: {p: part.loadings for p, part in parts_of(held, task.name).items()} for task in held.tasks}
    with pytest.raises(ArgumentError, match="needs loadings that were trained"):
        keep(held, same)
    name, path = next((name, next(iter(of_slots))) for name, of_slots in same.items() if of_slots)
    changed = same[name][path]
    changed = changed._replace(weights=changed.weights * 2)
    kept = keep(held, {**same, name: {**same[name], path: changed}})
    assert [task.name for task in kept.segments[-1].tasks] == [name]
    stays = [task for task in held.tasks if task.name != name]
    assert all(kept.task(task.name) is task for task in stays)
    # in its other slots too
    before, after = parts_of(held, name), parts_of(kept, name)
    for other in before.keys() - {path}:
        pairs = zip(before[other].columns.tensors().values(), after[other].columns.tensors().values(), strict=True)
        assert all(same_rows(a, b) for a, b in pairs)


def test_columns_that_float32_cannot_hold_are_refused():
    held = collection(3, slots=4)
    name = next(
        task.name for task in held.tasks if any(len(p.loadings.left) for p in parts_of(held, task.name).values())
    )
    huge = {
        path: part.loadings._replace(left=part.loadings.left * 1e30, weights=part.loadings.weights + 1e30)
        for path, part in parts_of(held, name).items()
    }
    with pytest.raises(NotFiniteError, match="too long for float32"):
        keep(held, {name: huge})
