"""The tasks of a collection, as a fit sees them: every product is that of the columns written out."""

from __future__ import annotations

import lives
import numpy as np
import planted
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraspan.collection.fit import Goal, fit
from loraspan.collection.stored import stored_slots
from loraspan.collection.update import add, remove
from store import samples

# float64 sums over at most a hundred terms, and two products one after the other
ROUNDING = 1e-12


def dense(side):
    """The vectors of every task written out, ``[T, c, d]``."""
    return side.pad(torch.cat([block.double() for block in side.x.blocks]))


def near(one, two):
    """Whether two tensors agree to rounding, relative to the larger entries of both."""
    scale = max(float(x.abs().max()) for x in (one, two, torch.ones(1))) if one.numel() else 1.0
    return one.shape == two.shape and (not one.numel() or float((one - two).abs().max()) <= ROUNDING * scale)


@given(life=lives.drawn(), seed=st.integers(0, 99))
def test_vectors_are_those_of_the_columns(life, seed):
    collection, _ = life.made()
    check_slots(collection, seed)


@given(seed=st.integers(0, 10_000))
def test_any_mixture_of_forms_is_read(seed):
    """Also those that no fit makes: dense cores beside columns with one shared end."""
    check_slots(samples.collection(seed, tasks=7), seed)


def check_slots(collection, seed):
    """Every slot's vectors, Grams and maps."""
    rng = torch.Generator().manual_seed(seed)
    places = [task.name for task in collection.tasks]
    slots = stored_slots(collection)
    assert [slot.path for slot in slots] == [
        path
        for path in collection.slots
        if any(s.tasks[t] is not None for s, columns in collection.columns_of(path) for t in columns.tasks)
    ]
    for slot in slots:
        ups, downs = dense(slot.up), dense(slot.down)
        for j, member in enumerate(slot.members):
            wanted = torch.from_numpy(planted.stored_delta(collection, slot.path, places[member]))
            assert near(ups[j].T @ downs[j], wanted)
            assert near(slot.squares[j], wanted.square().sum())
        for side, vectors, gram in ((slot.up, ups, slot.gram_up), (slot.down, downs, slot.gram_down)):
            assert near(gram, vectors @ vectors.mT)
            of_vectors = torch.randn(*vectors.shape[:2], 3, generator=rng, dtype=torch.float64)
            check_maps(side, vectors, of_vectors)


def check_maps(side, vectors, of_vectors):
    """``spread`` is the adjoint of ``pad``, for all tasks and for one; ``pack`` drops what pads."""
    rows = torch.cat([block.double() for block in side.x.blocks])
    assert near(side.spread(of_vectors).T @ rows, torch.einsum("tcq,tcd->qd", of_vectors, vectors))
    for task in range(side.count):
        own = torch.cat([block.double() for block in side.rows_of(task)])
        assert near(side.pad_of(task, own), vectors[task])
        assert near(side.spread_of(task, of_vectors[task]).T @ own, of_vectors[task].T @ vectors[task])
    assert side.pack(vectors).shape == (side.total, vectors.shape[2])
    assert torch.equal(side.unpack(side.pack(vectors)), vectors)


def test_every_form_is_met():
    """What the property above is drawn from has columns of all four forms, and dense cores, in several segments."""
    counts, dense_rows, segments = np.zeros(4, dtype=np.int64), 0, 0
    for structure in lives.STRUCTURES.values():
        for goal in (Goal(max_error=0.02), Goal(rank=5)):
            held, _ = lives.lived(goal, lives.some(12, **structure))
            tables = [columns for segment in held.segments for columns in segment.columns.values()]
            counts += sum(columns.counts.sum(axis=0) for columns in tables)
            dense_rows += sum(int(columns.dense.sum()) for columns in tables)
            segments = max(segments, len(held.segments))
    assert counts.min() > 0
    assert dense_rows > 0
    assert segments == 3


def test_no_row_is_copied():
    """Bases and private ends enter where they lie."""
    held, _ = lives.lived(Goal(max_error=0.02), lives.some(12))
    known = {t.data_ptr() for s in held.slots.values() for t in (s.u, s.v)}
    known |= {
        t.data_ptr() for s in held.segments for c in s.columns.values() for t in (c.left_private, c.right_private)
    }
    for slot in stored_slots(held):
        assert {block.data_ptr() for side in (slot.up, slot.down) for block in side.x.blocks} <= known


@pytest.mark.parametrize("dtype", lives.DTYPES, ids=str)
def test_a_removed_task_is_not_seen(dtype):
    adapters = planted.adapters(count=8)
    held = fit(adapters[:6], Goal(max_error=0.1, dtype=dtype))
    without = remove(add(held, adapters[6:], max_error=0.1), ["task 1", "task 7"])
    for slot in stored_slots(without):
        assert slot.members == list(range(6))
        assert slot.up.count == slot.down.count == len(slot.squares) == 6


def test_a_slot_without_tasks_is_left_out():
    held = fit(lives.some(8), Goal(max_error=0.1))
    assert [slot.path for slot in stored_slots(remove(held, ["task 6", "task 7"]))] == list(held.slots)[:2]
