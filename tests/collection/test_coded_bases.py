"""Coded bases and loadings: steps that go with what tasks have along a vector, errors as measured, a life on them."""

from __future__ import annotations

import math

import planted
import pytest
import torch

import loraspan
import loraspan.adapters.peft
from loraspan import store
from loraspan.collection.budget import NEVER, Planner
from loraspan.collection.coded import Coded, basis_tensors, column_tensors
from loraspan.collection.coding import encode
from loraspan.collection.factors import read_factors
from loraspan.collection.fit import Goal, fit, total_squares
from loraspan.collection.layout import basis_file_bytes, collection_bytes
from loraspan.collection.rates import rates
from loraspan.collection.rows import CODED, Widths
from loraspan.collection.steps import CodedBasis, whole_steps
from loraspan.collection.within import SlotFitter
from loraspan.errors import FormatError
from loraspan.ops.packed import Packed, unpacked
from store.samples import current_bytes, edit_tensors

SIDES = {"input": {"shared_out": 0}, "output": {"shared_in": 0}}
SHAPE = (96, 128)


def one_sided(side, count=12, **options):
    """Adapters of one side, whose other factors are their own."""
    options = {"shape": SHAPE, "ranks": (4, 6), "noise": 0.002, "cond": 2.0, **SIDES[side], **options}
    return planted.adapters(count=count, **options)


def bases(held):
    """The packed bases of all slots."""
    return [side for slot in held.slots.values() for side in (slot.u, slot.v) if isinstance(side, Packed)]


def whole_error(adapter, back):
    return planted.relative_error(adapter, lambda path: planted.delta(back.slots[path]))


@pytest.mark.parametrize("error", [0.3, 0.1, 0.03, 0.01])
@pytest.mark.parametrize("side", SIDES)
def test_an_error_is_met_and_told(side, error):
    adapters = one_sided(side)
    held = fit(adapters, Goal(max_error=error, dtype=CODED))
    assert len(bases(held)) == 2
    for adapter in adapters:
        seen = planted.relative_error(adapter, lambda path, name=adapter.name: planted.stored_delta(held, path, name))
        assert held.task(adapter.name).error == pytest.approx(seen, abs=1e-6)
        assert 0.8 * error < seen <= error * (1 + 1e-9)


@pytest.mark.parametrize("side", SIDES)
def test_bases_take_8_bits_or_16(side):
    """In memory; longer rows of finer steps have them."""
    found = [bases(fit(one_sided(side), Goal(max_error=error, dtype=CODED)))[0].bits for error in (0.1, 0.01)]
    assert found == [8, 16]


def test_it_takes_less_than_private_columns_and_than_packed_bases():
    adapters = one_sided("input", count=24)
    held = fit(adapters, Goal(max_error=0.1, dtype=None))
    assert held.widths == Widths.of(CODED)
    alone = fit(one_sided("input", count=24, shared_in=0), Goal(max_error=0.1, dtype=CODED))
    assert not bases(alone)
    assert collection_bytes(held) < 0.75 * collection_bytes(alone)
    for widths in (Widths.of(8), Widths.of(torch.float16)):
        assert collection_bytes(held) < 0.75 * collection_bytes(fit(adapters, Goal(max_error=0.1, dtype=widths.basis)))


@pytest.mark.parametrize("tau", [0.001, 0.005, 0.02])
def test_a_basis_loses_what_it_is_said_to(tau):
    """Random cores on an orthonormal basis, whose vectors are rounded: the energy that leaves their span."""
    draw = torch.Generator().manual_seed(3)
    v = torch.linalg.qr(torch.randn(4000, 6, generator=draw, dtype=torch.float64))[0]
    cores = torch.randn(40, 3, 6, generator=draw, dtype=torch.float64) * torch.tensor([8.0, 4, 3, 2, 1, 0.5])
    held, weights = cores.square().sum(1), cores.square().sum((1, 2)).rsqrt()
    basis = CodedBasis(held, weights, 4000)
    steps = tau / weights
    common = basis.common(steps)
    rows = unpacked(whole_steps(v.T.float(), common)).double()
    outside = v - rows @ torch.linalg.lstsq(rows, v).solution
    lost = (cores @ outside.T).square().sum((1, 2))
    assert float(lost.sum()) == pytest.approx(float(basis.lost(steps).sum()), rel=0.08)
    stream = len(encode([whole_steps(v.T.float(), common).numbers.numpy()]))
    assert basis.nbytes(common) == pytest.approx(stream, rel=0.05)


def test_steps_of_a_basis_go_with_what_tasks_have_along_it():
    """Each vector times the root of its energy is rounded by one step; tasks count by their weights."""
    held = torch.tensor([[4.0, 1.0], [40.0, 100.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.1], dtype=torch.float64)
    found = CodedBasis(held, weights, 50).common(torch.tensor([0.1, 1.0], dtype=torch.float64))
    energy = torch.tensor([4.4, 2.0], dtype=torch.float64)
    assert (found * energy.sqrt()).tolist() == pytest.approx([0.1 * float(found[0] * energy[0].sqrt() / 0.1)] * 2)
    assert float(found[0]) / float(found[1]) == pytest.approx(math.sqrt(2.0 / 4.4))
    # nobody has anything along them
    assert CodedBasis(0 * held, weights, 50).common(held[:, 0]).tolist() == [1.0, 1.0]
    assert float(rates(found * math.sqrt(50))[0].min()) > 0


@pytest.mark.parametrize("side", SIDES)
def test_a_plan_takes_about_what_it_says(side):
    """Bytes of columns and bases of one slot, names apart."""
    adapters = one_sided(side, slots=1, shape=(384, 512))
    (slot,) = read_factors(adapters)
    squares = total_squares([slot], len(adapters))
    fitter = SlotFitter(slot, squares.rsqrt(), coarse=False, seed=0, refine=2, corrections=0)
    allowed, widths = 0.1**2 * squares, Widths.of(CODED)
    plan = fitter.plan(allowed, widths)
    space, columns, _ = fitter.build(plan, allowed, widths)
    tables = [getattr(columns, field) for field in ("left_private", "right_private")]
    tables += [columns.left_loadings, columns.right_loadings, *(b for b in (space.u, space.v) if isinstance(b, Packed))]
    taken = len(encode([rows.numbers.numpy() for rows in tables if isinstance(rows, Packed)]))
    taken += 2 * len(columns.weights)
    assert plan.form == {"input": "ps", "output": "sp"}[side]
    assert plan.nbytes == pytest.approx(taken, rel=0.03)


@pytest.mark.parametrize("side", SIDES)
def test_a_basis_holds_what_tasks_have_of_their_own(side):
    """Where that is within the error, however little: it counts four times. At coarser errors it is not worth it."""
    at = {"input": 1, "output": 0}[side]
    for error, own in ((0.1, False), (0.01, True)):
        held = fit(one_sided(side), Goal(max_error=error, dtype=CODED))
        assert [slot.ranks[at] > 6 for slot in held.slots.values()] == [own, own]


@pytest.mark.parametrize("error", [0.2, 0.1, 0.05])
@pytest.mark.parametrize("side", SIDES)
def test_no_private_column_makes_up_for_a_step(side, error):
    """Tasks that lie on a basis have columns on it alone, however near their error comes to what is allowed."""
    held = fit(one_sided(side), Goal(max_error=error, dtype=CODED))
    form = {"input": 2, "output": 1}[side]
    for columns in held.segments[0].columns.values():
        assert columns.counts[:, form].all()
        assert not columns.counts[:, 3].any()


def test_a_form_that_one_task_cannot_take_is_no_plan():
    """Its bytes are those of no plan, not a number with seventeen digits."""
    adapters = one_sided("input", count=3)
    space = loraspan.compress(adapters, max_error=3e-4)
    assert all(line.nbytes is None or line.nbytes < 10**9 for line in space.report().plans)
    assert any(line.nbytes is None for line in space.report().plans)
    slot = read_factors(adapters)[0]
    canonical = slot.canonical()
    allowed = torch.full((3,), 1e-2, dtype=torch.float64) * slot.squares
    allowed[1] = 1e-12 * slot.squares[1]
    none = torch.zeros(3, 6, 0, dtype=torch.float64)
    (plan,) = Planner(slot.shape, canonical, none, none, allowed, Widths.of(8)).plans()
    assert plan.nbytes >= NEVER


@pytest.mark.parametrize("side", SIDES)
def test_what_is_opened_is_what_was_saved(tmp_path, side):
    space = loraspan.compress(one_sided(side), max_error=0.1, dtype="coded")
    space.save(tmp_path / "a")
    opened = loraspan.open(tmp_path / "a")
    assert (opened.nbytes, opened.errors) == (current_bytes(tmp_path / "a"), space.errors)
    # nothing is unpacked until it is looked at
    rows = bases(opened.collection)
    assert all(isinstance(each, Coded) and "codes" not in vars(each) for each in rows)
    opened.save(tmp_path / "b")
    assert not any("tables" in vars(each.stream) for each in rows)
    for kind in ("basis", "tasks"):
        (one,), (other,) = ([*(tmp_path / name).glob(f"{kind}-*")] for name in "ab")
        assert one.read_bytes() == other.read_bytes()
    (segment,) = space.collection.segments
    assert {name for name, _ in column_tensors(segment.columns)} >= {"weights", "coded.layers.1.q_proj"}
    for field in ("left_loadings", "right_loadings", "left_private", "right_private"):
        assert not any(name.startswith(field) and t.numel() for name, t in column_tensors(segment.columns))
    for now, was in zip(rows, bases(space.collection), strict=True):
        assert torch.equal(now.codes, was.codes)
        assert torch.equal(now.scales, was.scales)
    for path, columns in space.collection.segments[0].columns.items():
        other = opened.collection.segments[0].columns[path]
        for field in ("left_loadings", "right_loadings"):
            assert torch.equal(unpacked(getattr(other, field)), unpacked(getattr(columns, field)))


def test_bytes_of_bases_are_those_of_their_file(tmp_path):
    space = loraspan.compress(one_sided("input"), max_error=0.1, dtype="coded")
    space.save(tmp_path / "a")
    (file,) = (tmp_path / "a").glob("basis-*")
    assert basis_file_bytes(space.collection) == file.stat().st_size
    slots = space.collection.slots
    named = basis_tensors({name: (slot.u, slot.v) for name, slot in slots.items()})
    # one stream for both small slots, and nothing beside it but the bases that have no vectors
    assert [name for name, tensor in named if tensor.numel()] == ["coded.layers.1.q_proj"]


@pytest.mark.parametrize("error", [0.1, 0.01])
@pytest.mark.parametrize("side", SIDES)
def test_a_life_on_coded_bases(tmp_path, side, error):
    adapters = one_sided(side, count=16)
    loraspan.compress(adapters[:12], max_error=error, dtype="coded").save(tmp_path / "s")
    space = loraspan.open(tmp_path / "s")
    before = bases(space.collection)
    space.add(adapters[12:14], max_error=error)
    space.absorb(adapters[14], max_error=error)
    space.remove("task 3")
    space.rename("task 4", "four")
    assert all(torch.equal(now.codes, was.codes) for now, was in zip(bases(space.collection), before, strict=True))
    loss = 0.05
    space.refit(max_forgetting=loss)
    space.add(adapters[15], max_error=error)
    assert store.verify(tmp_path / "s") == []
    again = loraspan.open(tmp_path / "s")
    assert again.collection.widths == Widths.of(CODED)
    for adapter in (*adapters[:3], *adapters[4:]):
        name = "four" if adapter.name == "task 4" else adapter.name
        seen = whole_error(adapter, again.reconstruct(name))
        assert seen <= again.errors[name] + 1e-6
        assert again.errors[name] <= (error + (loss if name != "task 15" else 0)) * (1 + 1e-6)


@pytest.mark.parametrize("error", [0.1, 0.01])
@pytest.mark.parametrize("side", SIDES)
def test_served_as_reconstructed(tmp_path, side, error):
    adapters = one_sided(side, slots=1)
    loraspan.compress(adapters, max_error=error, dtype="coded").save(tmp_path / "s")
    space = loraspan.open(tmp_path / "s")
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict()])})
    model.layers[0]["q_proj"] = torch.nn.Linear(SHAPE[1], SHAPE[0])
    x = torch.randn(3, SHAPE[1], generator=torch.Generator().manual_seed(0))
    served = loraspan.attach(model, space)
    with torch.no_grad():
        base = model.layers[0]["q_proj"](x)
        with served.tasks(["task 1", None, "task 7"]):
            seen = model.layers[0]["q_proj"](x)
    for row, name in ((0, "task 1"), (2, "task 7")):
        delta = torch.from_numpy(planted.delta(space.reconstruct(name).slots["layers.0.q_proj"]))
        wanted = base[row].double() + delta @ x[row].double()
        torch.testing.assert_close(seen[row].double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert torch.equal(seen[1], base[1])


def test_in_groups(tmp_path):
    for adapter in one_sided("input", count=8):
        loraspan.adapters.peft.write(adapter, tmp_path / "in" / adapter.name)
    goal = {"max_error": 0.1, "dtype": "coded", "memory": "1GB"}
    space = loraspan.compress(str(tmp_path / "in" / "*"), **goal, out=tmp_path / "s")
    assert {line.form for line in space.report().slots} == {"input side shared"}
    assert max(space.errors.values()) <= 0.1 * (1 + 1e-9)
    assert store.verify(tmp_path / "s") == []


def test_with_a_rank_what_is_shared_is_packed():
    adapters = planted.adapters(count=8, shape=SHAPE, ranks=(4,))
    held = fit(adapters, Goal(rank=6, dtype=CODED))
    assert [side.bits for side in bases(held)] == [8] * 4
    plain = fit(adapters, Goal(rank=6))
    assert [task.error for task in held.tasks] == pytest.approx([task.error for task in plain.tasks], rel=0.01)


def _shorter(tensors):
    tensors["coded.layers.1.q_proj"] = tensors["coded.layers.1.q_proj"][:12].clone()


def _spoilt(tensors):
    tensors["coded.layers.1.q_proj"][40] ^= 1


DAMAGE = {"numbers need a byte for 90 of them": _shorter, "needs to end with the checksum": _spoilt}


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_damaged_stream_of_bases_is_refused(tmp_path, problem):
    loraspan.compress(one_sided("input"), max_error=0.1, dtype="coded").save(tmp_path / "s")
    name = edit_tensors(tmp_path / "s", "basis", DAMAGE[problem])
    with pytest.raises(FormatError, match=rf"{name}: tensor 'coded.layers.1.q_proj': .*{problem}"):
        loraspan.open(tmp_path / "s").reconstruct("task 0")
    (finding,) = store.verify(tmp_path / "s")
    assert (finding.file, finding.what) == (name, "tensor 'coded.layers.1.q_proj'")


def test_bases_that_nobody_coded_are_missing(tmp_path):
    loraspan.compress(one_sided("input"), max_error=0.1, dtype="coded").save(tmp_path / "s")
    edit_tensors(tmp_path / "s", "basis", lambda tensors: tensors.pop("coded.layers.1.q_proj"))
    with pytest.raises(FormatError, match=r"tensor 'v.layers.0.q_proj': the manifest says shape .* it is missing"):
        loraspan.open(tmp_path / "s")
