"""Tasks that come, leave, are renamed and refitted while a model serves them."""

import dataclasses
import gc
import itertools

import numpy as np
import pytest
import torch

import loraspan
import oracles
import serving
from loraspan.errors import ArgumentError, UnknownTaskError, UnsupportedError
from loraspan.ops import Cores, shared_lora

REST = serving.adapters(noise=0.1)


def attached(count=4, **options):
    space = serving.team(count)
    return space, loraspan.attach(serving.Tower(), space, **options)


def tables_of(served, layer=0):
    return served.model.layers[layer].q_proj.tables


def check(space, served):
    """Every task of the space is served, and rows without one have the base model's bits."""
    names = [*space.tasks, None]
    x = serving.batch(len(names))
    y = served(x, task_ids=space.ids(names))
    serving.close(y, serving.expected(space, x, names))
    assert oracles.same_bits(y[-1], served(x)[-1])


def test_tasks_that_come_are_written_into_spare_room():
    space, served = attached()
    # no other has columns of its form, sp
    space.add(REST[4], max_error=0.3)
    before = tables_of(served).now
    space.add(REST[5], max_error=0.3)
    assert tables_of(served).now is before
    check(space, served)


def test_a_task_with_more_columns_than_any_has_the_tables_and_an_index_of_its_own():
    """Whoever was told of fewer columns, as a captured graph was, is not to meet it."""
    space, served = attached()
    before = tables_of(served).now
    assert before.cores.most[1] == 0
    space.add(REST[4], max_error=0.3)
    now = tables_of(served).now
    assert now.cores.most[1] > 0
    assert now.cores.left_private.data_ptr() == before.cores.left_private.data_ptr()
    x, y = torch.randn(1, serving.D), torch.zeros(1, serving.N)
    with pytest.raises(ArgumentError, match="tasks are -1"):
        shared_lora(y, x, *before, space.ids("task 4"))
    space.remove("task 0")
    with pytest.raises(ArgumentError, match="tasks are -1"):
        shared_lora(y, x, *before, torch.tensor([0]))
    check(space, served)


def test_tables_that_are_full_make_way_for_larger_ones_that_the_old_ones_outlive():
    space, served = attached(3)
    old = [tables_of(served).now]
    for adapter in REST[3:]:
        space.add(adapter, max_error=0.01)
        if tables_of(served).now is not old[-1]:
            old.append(tables_of(served).now)
    check(space, served)
    assert len(old) in (2, 3, 4)
    sizes = [triple.cores.left_private.shape[0] for triple in old]
    assert sizes == sorted(sizes)
    assert all(b >= 2 * a or b == a for a, b in itertools.pairwise(sizes))
    # what reads the old ones still has the tasks that they knew, and loses those that leave
    x, y = torch.randn(1, serving.D), torch.zeros(1, serving.N)
    first, kept, gone = old[0], space.ids("task 0"), space.ids("task 1")
    new = tables_of(served).now
    assert oracles.same_bits(shared_lora(y, x, *first, kept), shared_lora(y, x, *new, kept))
    space.remove("task 1")
    for triple in (first, new):
        shared_lora(y, x, *triple, kept)
        with pytest.raises(ArgumentError, match="tasks are -1"):
            shared_lora(y, x, *triple, gone)
    with pytest.raises(ArgumentError, match="tasks are -1"):
        shared_lora(y, x, *first, space.ids("task 8"))
    check(space, served)


def test_a_task_that_left_is_refused_and_its_number_never_used_again():
    space, served = attached()
    gone = space.ids("task 1")
    with served.tasks("task 1"):
        served(serving.batch(1))
        space.remove("task 1")
        with pytest.raises(ArgumentError, match=r"layers.0.q_proj: a task of the batch has left the space"):
            served(serving.batch(1))
    with pytest.raises(ArgumentError, match=r"served has 1 \(was 'task 1'\)"):
        served(serving.batch(1), task_ids=gone)
    with pytest.raises(UnknownTaskError), served.tasks("task 1"):
        pass
    space.add(REST[1], max_error=0.1)
    assert space.ids("task 1").item() == 4
    with pytest.raises(ArgumentError, match="served has 1"):
        served(serving.batch(1), task_ids=gone)
    check(space, served)


def test_numbers_stay_through_renames_refits_and_saves_and_change_with_what_they_stand_for(tmp_path):
    space, served = attached()
    numbers = dict(zip(space.tasks, space.ids(space.tasks).tolist(), strict=True))
    with served.tasks("task 2"):
        pass
    space.rename("task 2", "other")
    space.save(tmp_path / "team.span")
    space.refit(rank=8)
    space.add(REST[5], max_error=0.1)
    numbers["other"] = numbers.pop("task 2")
    assert {name: space.ids(name).item() for name in numbers} == numbers
    check(space, served)
    changed = serving.adapters(noise=0.1, seed=7)[0]
    space.replace(changed, max_error=0.1)
    assert space.ids("task 0").item() == 5
    check(space, served)
    with pytest.raises(UnknownTaskError), served.tasks("task 2"):
        pass
    space.absorb(REST[6], max_forgetting=0.3)
    assert space.ids(["task 6", "task 5", None]).tolist() == [6, 4, -1]
    check(space, served)


def test_after_a_refit_the_old_tables_refuse_everyone():
    space, served = attached()
    old, x, y = tables_of(served).now, torch.randn(1, serving.D), torch.zeros(1, serving.N)
    space.refit(rank=5)
    check(space, served)
    for number in range(4):
        with pytest.raises(ArgumentError, match="tasks are -1"):
            shared_lora(y, x, *old, torch.tensor([number]))
    assert oracles.same_bits(shared_lora(y, x, *old, torch.tensor([-1])), y)


def test_a_dry_run_and_a_change_that_fails_tell_nobody():
    space, served = attached()
    before, state = tables_of(served).now, space.roster.state
    space.add(REST[4], max_error=0.01, dry_run=True)
    with pytest.raises(UnknownTaskError):
        space.remove("nobody")
    assert tables_of(served).now is before
    assert space.roster.state is state


def test_a_slot_that_comes_with_a_task_is_served_where_the_model_has_it_and_the_task_refused_elsewhere():
    made = serving.adapters(noise=0.1)
    only = [type(a)(a.name, {"layers.0.q_proj": a.slots["layers.0.q_proj"]}) for a in made[:3]]
    space = loraspan.compress(only, rank=6)
    model, plain = serving.Tower(), serving.Tower()
    served = loraspan.attach(model, space)
    module = model.layers[1].q_proj
    space.add(made[4], max_error=0.05)
    assert model.layers[1].q_proj.base is module
    check(space, served)
    slots = {"layers.9.q_proj": made[5].slots["layers.0.q_proj"]}
    space.add(type(made[5])("elsewhere", slots), max_error=0.05)
    with pytest.raises(UnsupportedError, match=r"'elsewhere': it adapts 'layers.9.q_proj', and the model has no such"):
        served.tasks("elsewhere").__enter__()
    with pytest.raises(ArgumentError, match="served has 4"):
        served(serving.batch(1), task_ids=space.ids("elsewhere"))
    space.remove("task 4")
    with pytest.raises(UnknownTaskError):
        served.tasks("task 4").__enter__()
    served.detach()
    assert model.layers[1].q_proj is module
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_task_for_a_module_that_cannot_be_served_is_refused_and_the_others_served(kind):
    """A routed expert of a list, or a slot of another kind than its module."""
    space, model = serving.team(), serving.Tower()
    model.experts = torch.nn.ModuleList([torch.nn.Linear(serving.D, serving.N)])
    served, module = loraspan.attach(model, space), model.experts[0]
    x = serving.batch(1)
    wanted = serving.expected(space, x, ["task 0"])
    slot = REST[4].slots["layers.0.q_proj"]
    slots = {"experts.0": dataclasses.replace(slot, kind=kind), "layers.1.q_proj": REST[4].slots["layers.1.q_proj"]}
    space.add(type(REST[4])("odd", slots), max_error=0.05)
    for more in REST[5:7]:
        with pytest.raises(UnsupportedError, match=r"'odd': it adapts 'experts.0', and module 'experts.0' is "):
            served.tasks("odd").__enter__()
        with pytest.raises(ArgumentError, match="served has 4"):
            served(serving.batch(1), task_ids=space.ids("odd"))
        assert model.experts[0] is module
        serving.close(served(x, task_ids=space.ids("task 0")), wanted)
        space.add(more, max_error=0.05)
    space.remove("odd")
    space.refit(rank=8)
    check(space, served)


def test_a_dora_task_is_refused_by_name_and_the_others_served():
    made = serving.adapters(noise=0.1)[:2]
    key = "base_model.model.layers.0.q_proj.lora_magnitude_vector"
    dora = type(made[0])("dora", made[1].slots, {key: torch.ones(serving.N)}, {"use_dora": True})
    space = loraspan.compress([made[0], dora], rank=6)
    served = loraspan.attach(serving.Tower(), space)
    with pytest.raises(UnsupportedError, match="dora"):
        served.tasks(["task 0", "dora"]).__enter__()
    with pytest.raises(ArgumentError, match="served has 1"):
        served(serving.batch(1), task_ids=space.ids("dora"))
    x = serving.batch(1)
    with served.tasks("task 0"):
        serving.close(served(x), serving.expected(space, x, ["task 0"]))


def test_a_model_that_cannot_follow_serves_nothing_more(monkeypatch):
    space, served = attached()
    other = loraspan.attach(serving.Tower(), space)
    monkeypatch.setattr(tables_of(served, 1), "follow", lambda _: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError, match="full"):
        space.remove("task 1")
    assert space.tasks == ["task 0", "task 2", "task 3"]
    for model in (served, served.model):
        with pytest.raises(ArgumentError, match=r"could not follow a change of the space \(full\)"):
            model(serving.batch(1))
    check(space, other)
    served.detach()


def test_models_that_nobody_holds_are_forgotten():
    space, served = attached()
    assert len(space.roster._followers) == 1
    del served
    gc.collect()
    assert not space.roster._followers


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_packed_tables_stay_packed_on_the_cpu(bits):
    space = loraspan.compress(REST[:4], rank=6, dtype=bits)
    served = loraspan.attach(serving.Tower(), space)
    now = tables_of(served).now
    assert isinstance(now.v, loraspan.ops.Packed)
    assert now.cores.is_packed
    check(space, served)
    # more columns come packed, or as they are carried
    space.add(REST[4], max_error=0.2)
    check(space, served)
    space.remove("task 0")
    space.add(REST[5:], max_error=0.2)
    check(space, served)
    x = serving.batch(1).requires_grad_()
    with served.tasks("task 1"):
        served(x).square().sum().backward()
    assert x.grad.abs().sum() > 0
    full = loraspan.attach(served.detach(), space, dtype=torch.float32)
    now = tables_of(full).now
    assert not now.cores.is_packed
    # rows in runs, as kernels read them fastest
    assert now.v.is_contiguous()
    assert now.u.is_contiguous()
    check(space, full)


def test_a_number_without_a_task_spoils_its_row_where_nobody_looks():
    """On a GPU nothing is read back: there a refused row has to be NaN by its columns, in every backend."""
    from loraspan.serve.room import Form, Tables, refuse
    from loraspan.serve.state import State

    class Elsewhere:
        type = "elsewhere"

    for k in (0, 3):
        space = serving.team() if k else loraspan.compress(REST[:2], max_error=0.01)
        state = State(space.collection, space.roster.state.numbers, len(space.tasks))
        parts = list(state.columns_of("layers.0.q_proj", state.alive))
        bases = space.collection.slots["layers.0.q_proj"]
        v, u = (bases.v, bases.u) if k else (bases.v[:, :0], bases.u[:, :0])
        if not k:
            parts = []
        widths = (u.shape[1], serving.N, v.shape[1], serving.D)
        tables = Tables(Form(torch.device("cpu"), torch.float32), widths, parts, state.rows, None)
        tables.form = tables.form._replace(device=Elsewhere())
        tables.refusal, most = tables._refuse_by(u.shape[1], tables.cores.most)
        index = tables.cores.index
        tables.form = tables.form._replace(device=torch.device("cpu"))
        tables.write(parts, np.flatnonzero(state.alive))
        refuse(index, tables.refusal, np.array([1]))
        cores = tables.cores
        cores = Cores(index, cores.weights, cores.left, cores.left_private, cores.right, cores.right_private, most)
        x, y = torch.randn(3, serving.D), torch.randn(3, serving.N)
        for backend in ("reference", "cpu"):
            out = shared_lora(y, x, v, u, cores, torch.tensor([0, 1, -1]), backend=backend)
            assert out[1].isnan().all()
            assert out[0].isfinite().all()
            assert oracles.same_bits(out[2], y[2])
