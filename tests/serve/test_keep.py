"""Loadings that were trained, back in the space: what is served, stored and exported is what was trained."""

import math

import numpy as np
import planted
import pytest
import torch

import loraspan
import serving
from loraspan.collection.rows import same_rows, values_of
from loraspan.collection.trained import parts_of
from loraspan.errors import ArgumentError, MismatchError, NotFiniteError, UnknownTaskError
from oracles import BF16, F32

PATHS = ["layers.0.q_proj", "layers.1.q_proj"]
# a core, private columns, from nothing, and like the one with private columns
TRAINED = ["task 0", "task 2", "new", "copy"]
LIKE = "task 2"


def space_of(dtype=F32):
    """A space with columns of all forms, and two tasks that are to be trained."""
    made = serving.adapters(noise=0.1)
    space = loraspan.compress(made[:2], rank=6, dtype=dtype)
    space.add(made[2:4], max_error={"int4": 0.3, "int8": 0.05, BF16: 0.05}.get(dtype, 0.01))
    space.start("new", lora_rank=3, seed=5)
    space.start("copy", like=LIKE)
    return space


def train(served, space, names=TRAINED, steps=12, lr=0.02, seed=8):
    """Train the tasks on numbers drawn at random; the losses."""
    weight = next(served.model.parameters())
    x = serving.batch(len(names), weight.dtype)
    wanted = serving.batch(len(names), weight.dtype, seed=seed)
    optimizer = torch.optim.Adam(served.loadings().values(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = (served(x, task_ids=space.ids(names)) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def deltas_of(space, name):
    """``dW`` by slot as it is stored, in float64."""
    return [planted.stored_delta(space.collection, path, name) for path in PATHS]


def trained_of(served, space):
    """The same as it was trained, of every task."""
    with torch.no_grad():
        found = [serving.trained_deltas(served, path, len(space.tasks)) for path in PATHS]
    numbers = {name: int(space.ids(name)) for name in space.tasks}
    return {name: [of_slot[number].numpy() for of_slot in found] for name, number in numbers.items()}


def bits_of(space, name):
    return [rows for part in parts_of(space.collection, name).values() for rows in part.columns.tensors().values()]


# what a unit row of six entries loses at most to rounding, each entry half a step of the largest
ROUNDING = {F32: 2.0**-24, BF16: 2.0**-8, "int8": math.sqrt(6) / 254, "int4": math.sqrt(6) / 14}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_what_is_stored_is_what_was_trained_within_the_error_that_is_said(dtype):
    space = space_of(dtype)
    others = {name: bits_of(space, name) for name in ("task 1", "task 3")}
    tasks, slots = {task.name: task for task in space.collection.tasks}, space.collection.slots
    private = [values_of(rows).abs() for rows in bits_of(space, "task 2")]
    model = serving.Tower().to(BF16 if dtype == BF16 else F32).requires_grad_(False)
    served = loraspan.attach(model, space, train=True)
    assert {leaf.dtype for leaf in served.loadings().values()} == {F32}
    losses = train(served, space)
    assert losses[-1] < losses[0]

    wanted = trained_of(served, space)
    change = space.keep(served, TRAINED)

    assert set(change.added) == set(TRAINED) == set(change.removed)
    assert not change.refitted
    for name in TRAINED:
        task, deltas = space.collection.task(name), wanted[name]
        off = sum(np.square(a - b).sum() for a, b in zip(deltas, deltas_of(space, name), strict=True))
        size = sum(np.square(a).sum() for a in deltas)
        assert task.norm == pytest.approx(math.sqrt(size), rel=1e-9)
        assert task.error == pytest.approx(math.sqrt(off / size), rel=1e-5, abs=1e-13)
        assert (task.error_kind, task.forgotten) == ("trained", 0.0)
        assert task.source.path.startswith("trained in a space, from ")
        assert change.added[name] == task.error
    # orthonormal columns: the two ends of each, rounded, and its weight in float32
    assert space.errors["new"] <= 2 * ROUNDING[dtype] + ROUNDING[dtype] ** 2 + 2.0**-24
    for name, bits in others.items():
        assert space.collection.task(name) is tasks[name]
        assert all(same_rows(a, b) for a, b in zip(bits, bits_of(space, name), strict=True))
    assert all(space.collection.slots[path] is slot for path, slot in slots.items())
    for i, rows in enumerate(bits_of(space, "task 2")):
        assert i % 5 not in (2, 4) or torch.equal(values_of(rows).abs(), private[i])


def test_served_exported_and_stored_agree(tmp_path):
    peft = pytest.importorskip("peft", reason="what is exported is loaded by it")
    space = space_of()
    space.save(tmp_path / "team.span")
    watching = loraspan.attach(serving.Tower().requires_grad_(False), space)
    served = loraspan.attach(serving.Tower().requires_grad_(False), space, train=True)
    ids, x, before = space.ids(TRAINED), serving.batch(4), space.generation
    with torch.no_grad():
        untrained = watching(x, task_ids=ids)
    train(served, space)
    space.keep(served, TRAINED)

    assert torch.equal(space.ids(TRAINED), ids)
    assert space.generation == before + 1
    opened = loraspan.open(tmp_path / "team.span")
    expected = serving.expected(opened, x, TRAINED)
    with torch.no_grad():
        trained = served(x, task_ids=ids)
        # rounding to float32 once more is far within the sums
        serving.close(trained, expected)
        serving.close(watching(x, task_ids=ids), expected)
        assert (untrained - trained).norm() > 0.1 * trained.norm()
        for i, name in enumerate(TRAINED):
            opened.export(name, tmp_path / name)
            loaded = peft.PeftModel.from_pretrained(serving.Tower(), tmp_path / name)
            serving.close(loaded(x[i : i + 1]), expected[i : i + 1])
    for name in TRAINED:
        assert all(same_rows(a, b) for a, b in zip(bits_of(space, name), bits_of(opened, name), strict=True))
        assert opened.collection.task(name) == space.collection.task(name)
    assert "trained" in str(opened.report())


def test_training_goes_on_after_it_was_kept_and_a_refit_makes_bounds_of_its_errors():
    space = space_of()
    model = serving.Tower().requires_grad_(False)
    served = loraspan.attach(model, space, train=True)
    leaves = served.loadings()
    train(served, space)
    space.keep(served, "new")
    assert all(leaf is leaves[name] for name, leaf in served.loadings().items())
    first = deltas_of(space, "new")
    kept = space.collection.task("task 0")
    assert kept.error_kind == "measured"

    losses = train(served, space, seed=9)
    assert losses[-1] < losses[0]
    trained = trained_of(served, space)
    # all of them: task 1 and task 3 were in no batch, and stay
    change = space.keep(served, None)
    assert set(change.added) == set(TRAINED)
    for name in TRAINED:
        for slot, deltas in enumerate(zip(trained[name], deltas_of(space, name), strict=True)):
            # of orthonormal columns both ends and the weight are rounded; private ones add theirs, up to 8 in all
            assert np.linalg.norm(deltas[0] - deltas[1]) <= 3 * 8 * 2.0**-24 * np.linalg.norm(deltas[0]), (name, slot)
    assert np.linalg.norm(first[0] - deltas_of(space, "new")[0]) > 0.01 * np.linalg.norm(first[0])

    assert served.detach() is model
    space.refit(rank=4)
    task = space.collection.task("new")
    assert (task.error_kind, task.source.path) == ("bound", "trained in a space, from zero")
    assert space.collection.task("copy").source.path == "trained in a space, from 'task 2'"


def test_a_copy_begins_as_what_it_is_like_and_a_task_from_nothing_gives_nothing():
    space = space_of()
    for a, b in zip(bits_of(space, "copy"), bits_of(space, LIKE), strict=True):
        assert same_rows(a, b)
    like, copy = space.collection.task(LIKE), space.collection.task("copy")
    assert (copy.error, copy.error_kind, copy.norm) == (0.0, "trained", pytest.approx(like.norm, rel=0.01))
    assert (copy.scales, copy.lora_ranks) == (like.scales, like.lora_ranks)
    x = serving.batch(1)
    with torch.no_grad():
        plain = serving.Tower()(x)
        served = loraspan.attach(serving.Tower().requires_grad_(False), space, train=True)
        assert torch.equal(served(x, task_ids=space.ids("new")), plain)
    served(x, task_ids=space.ids("new")).sum().backward()
    for name, leaf in served.loadings().items():
        assert (leaf.grad.abs().max() > 0) == name.endswith(".left"), name
    assert space.collection.task("new").norm == 0.0
    assert space.reconstruct("new").slots[PATHS[0]].lora_rank == 3


def test_a_task_is_started_like_another_or_from_nothing():
    space = space_of()
    before = (space.tasks, space.collection)
    for wrong in ({}, {"like": LIKE, "lora_rank": 2}, {"lora_rank": 0}):
        with pytest.raises(ArgumentError, match="start: needs one of like"):
            space.start("another", **wrong)
    with pytest.raises(MismatchError, match="start: there is a task 'new' already"):
        space.start("new", lora_rank=2)
    with pytest.raises(UnknownTaskError, match="'nobody'"):
        space.start("another", like="nobody")
    assert space.start("another", lora_rank=99, dry_run=True).added == {"another": 0.0}
    assert (space.tasks, space.collection) == before
    alone = loraspan.compress(serving.adapters(noise=0.1, shared_out=0, shared_in=0)[:2], max_error=0.01)
    assert "on its own" in alone.summary
    with pytest.raises(ArgumentError, match="bases on both sides"):
        alone.start("another", lora_rank=2)


def of_another_space(space, served):
    train(served, space)
    space_of().keep(served, "new")


def removed(space, served):
    space.keep(served, ["new", "nobody"])


def detached_and_refitted(space, served):
    train(served, space)
    served.detach()
    space.refit(rank=4)
    space.keep(served, "new")


def diverged(space, served):
    train(served, space)
    with torch.no_grad():
        served.loadings()["layers.1.q_proj.left"].fill_(torch.nan)
    space.keep(served, ["task 0", "new"])


def while_another_trains(space, served):
    other = loraspan.attach(serving.Tower(), space, train=True)
    train(served, space)
    assert other.loadings()
    space.keep(served, "new")


REFUSED = {
    "a mixture": (lambda space, served: space.keep(served, {"new": 0.5, "copy": 0.5}), ArgumentError, "A mixture has"),
    "nobody's rows": (lambda space, served: space.keep(served, ["new", None]), ArgumentError, "needs the name"),
    "no name": (lambda space, served: space.keep(served, []), ArgumentError, "needs the name"),
    "no such task": (removed, UnknownTaskError, "'nobody'"),
    "no training": (lambda space, served: space.keep(served, "new"), ArgumentError, "those of 'new' are as the space"),
    "another space": (of_another_space, ArgumentError, "of this very space; got one of another space"),
    "no model": (lambda space, served: space.keep(served.model, "new"), ArgumentError, "very space; got Tower"),
    "other coordinates": (detached_and_refitted, ArgumentError, "is detached"),
    "no numbers": (diverged, NotFiniteError, "task 'task 0', slot 'layers.1.q_proj', left, has a NaN"),
    "another trains": (while_another_trains, ArgumentError, "keep: a model is attached to this space with train=True"),
}


@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_kept_is_refused_and_changes_nothing(change, error, message):
    space = space_of()
    before = [task for task in space.collection.tasks if message != "is detached"]
    served = loraspan.attach(serving.Tower().requires_grad_(False), space, train=True)
    with pytest.raises(error, match=message):
        change(space, served)
    assert [task for task in space.collection.tasks if message != "is detached"] == before


def test_without_training_nothing_is_kept_and_a_dry_run_changes_nothing():
    space = space_of()
    with pytest.raises(ArgumentError, match="attached without train=True"):
        space.keep(loraspan.attach(serving.Tower(), space), "new")
    served = loraspan.attach(serving.Tower().requires_grad_(False), space, train=True)
    train(served, space)
    before = space.collection
    would = space.keep(served, "new", dry_run=True)
    assert space.collection is before
    assert space.keep(served, "new").added == would.added
