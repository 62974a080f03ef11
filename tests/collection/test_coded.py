"""Coded ends: one step for a task, errors as measured, bytes near what numbers hold, and one each in memory."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import planted
import pytest
import torch

import loraspan
import loraspan.adapters.peft
from loraspan import store
from loraspan.collection import coded, in_turns, private
from loraspan.collection.coded import Coded, column_tensors
from loraspan.collection.coding import LARGEST, encode, trellis
from loraspan.collection.fit import Goal, fit
from loraspan.collection.layout import collection_bytes, segment_bytes
from loraspan.collection.rates import TO_A_STEP, rates
from loraspan.collection.rows import CODED, Packed, cat_rows, flip_rows, same_rows, values_of
from loraspan.collection.steps import _LEARNING, CommonSteps, Curve, Ends, scales_of, whole_steps
from loraspan.collection.update import add
from store.samples import current_bytes

SHAPE = (96, 128)
ALONE = {"shared_out": 0, "shared_in": 0}


def alone(count=8, **options):
    return planted.adapters(**{"count": count, "shape": SHAPE, "ranks": (6,), **ALONE, **options})


def privates(held):
    for segment in held.segments:
        for columns in segment.columns.values():
            yield from (columns.left_private, columns.right_private)


def test_rows_are_whole_steps():
    rows = torch.nn.functional.normalize(torch.randn(5, 130, generator=torch.Generator().manual_seed(0)), dim=1)
    steps = torch.tensor([0.0005, 0.05, 0.2, 1e-9, math.inf])
    made = whole_steps(rows, steps)
    assert (made.bits, whole_steps(rows[1:3], steps[1:3]).bits) == (16, 8)
    codes = made.numbers
    for i in (0, 1, 2):
        assert torch.equal(codes[i], trellis(rows[i : i + 1] / (steps[i] / TO_A_STEP))[0])
    # too short a step for sixteen bits becomes one that the largest entry fits
    assert codes[3].abs().max() == LARGEST[16]
    whole = rows[3].abs().max() / LARGEST[16]
    torch.testing.assert_close(codes[3] * whole, rows[3], atol=0.51 * float(whole), rtol=0)
    assert not codes[4].any()
    assert not made.scales[4].any()
    lengths = values_of(made).double().norm(dim=1)
    # a scale is rounded to float16
    assert ((lengths[:4] - 1).abs() <= 2**-11).all()
    assert torch.equal(made.scales, scales_of(codes))


def test_rows_of_the_shortest_steps_are_never_on_a_path():
    """Whose numbers would not fit: whichever way the largest entry over the shortest step rounds."""
    rows = torch.nn.functional.normalize(torch.randn(5000, 40, generator=torch.Generator().manual_seed(4)), dim=1)
    made = whole_steps(rows, torch.full((5000,), 1e-12))
    reach = rows.abs().amax(dim=1, keepdim=True)
    whole = reach / LARGEST[16]
    assert (reach > LARGEST[16] * whole).any()
    torch.testing.assert_close(made.numbers * whole, rows, atol=0.51 * float(whole.max()), rtol=0)


def test_a_row_that_eight_bits_cannot_hold_by_a_trellis_is_rounded_without():
    row = torch.nn.functional.normalize(torch.tensor([[100.0, *[1.0] * 5000]]), dim=1)
    step = float(row[0, 1]) * 0.9
    made = whole_steps(row, torch.tensor([step]))
    assert made.bits == 8
    assert torch.equal(made.numbers, (row / step).round().to(torch.int8))


def test_a_row_that_turns_takes_as_much():
    rows = torch.nn.functional.normalize(torch.randn(20, 500, generator=torch.Generator().manual_seed(0)), dim=1)
    made = whole_steps(rows, torch.full((20,), 0.05))
    turned = flip_rows(made, torch.tensor([1, -1] * 10))
    assert len(encode([turned.numbers.numpy()])) <= len(encode([made.numbers.numpy()])) + 4


@pytest.mark.parametrize("ratio", [0.01, 0.04, 0.12, 0.13, 0.3, 0.5, 1.0, 2.0, 3.0])
def test_rates_are_those_of_rounded_normal_entries(ratio):
    """Of four million drawn ones: bits of their stream to 1 per cent, lost energy to 3."""
    unit = torch.nn.functional.normalize(torch.randn(1000, 4000, generator=torch.Generator().manual_seed(1)), dim=1)
    made = whole_steps(unit, torch.full((1000,), ratio / math.sqrt(4000)))
    rate, lost = rates(torch.tensor([ratio], dtype=torch.float64))
    codes = made.numbers
    bits = 8 * len(encode([codes.numpy()])) / codes.numel()
    assert _LEARNING * float(rate) == pytest.approx(bits, rel=0.01, abs=0.025)
    seen, squares = float((unit.double() * codes).sum()), float(codes.double().square().sum())
    assert float(lost) == pytest.approx(1 - seen**2 / squares / len(unit), rel=0.03)


def test_a_curve_gives_the_step_of_an_error():
    """The loss at the step for a budget is the budget, to what interpolation over half an octave leaves.

    Larger budgets may be between what a column loses and what its absence does: those are for measuring to meet.
    """
    ends = Ends(torch.tensor([[3.0, 2, 1, 0.5], [1, 0.9, 0.2, 0.01]], dtype=torch.float64), (96, 128))
    curve = Curve([ends])
    energy = ends.s.square().sum(-1)
    before = None
    for error in (0.02, 0.05, 0.1):
        allowed = error**2 * energy
        assert ends.costs(curve.steps_at(allowed))[1].tolist() == pytest.approx(allowed.tolist(), rel=0.15)
        nbytes, possible = curve.bytes_at(allowed)
        assert possible.all()
        assert before is None or (nbytes < before).all()
        before = nbytes
    assert not curve.bytes_at(1e-9 * energy)[1].any()
    assert not curve.bytes_at(energy)[0].any()


@pytest.mark.parametrize("scale", [1e-36, 1e36])
def test_steps_go_with_the_size_of_what_is_stored(scale):
    """As float32 allows: all else being equal, the errors and the bytes of columns are those of others."""
    adapters = alone(count=3)
    held = fit(adapters, Goal(max_error=0.2, dtype=CODED))
    other = [
        replace(a, slots={path: replace(slot, up=slot.up * scale) for path, slot in a.slots.items()}) for a in adapters
    ]
    found = fit(other, Goal(max_error=0.2, dtype=CODED))
    # factors and weights are rounded anew: a number may fall on the other side
    assert [task.error for task in found.tasks] == pytest.approx([task.error for task in held.tasks], rel=0.02)
    assert collection_bytes(found) == pytest.approx(collection_bytes(held), rel=0.02)


def test_slots_share_a_step():
    """A budget goes to slots as one step in all of them loses, and is used up."""
    big, small = (torch.tensor([[s]], dtype=torch.float64) for s in (4.0, 1.0))
    spectra = [([0], Ends(big, (64, 64))), ([0], Ends(small, (64, 64)))]
    budgets = torch.tensor([0.002 * 17], dtype=torch.float64)
    one, two = CommonSteps(spectra, 1).shares(budgets)
    assert float(one + two) == pytest.approx(float(budgets), rel=1e-9)
    # the same loss in both, a sixteenth of the share of the energy in the one that holds more
    assert float(one) == pytest.approx(float(two), rel=0.1)


@pytest.mark.parametrize("error", [0.5, 0.2, 0.05, 0.02])
@pytest.mark.parametrize("case", [ALONE, {"shared_out": 0}, {}], ids=["none", "input", "shared"])
def test_an_error_is_met_and_used(error, case):
    """Every task is within 2 per cent of its budget from below, but where rows of 127 steps leave less."""
    held = fit(alone(**case), Goal(max_error=error, dtype=CODED))
    errors = [task.error for task in held.tasks]
    assert max(errors) <= error * (1 + 1e-9)
    if case is ALONE and error < 0.5:
        assert min(errors) >= 0.98 * error
        assert all(isinstance(rows, Packed) for rows in privates(held))


def test_ends_that_are_solved_for_in_turns_take_less(monkeypatch):
    """Of the same errors, which are what is stored; any number of tasks at once gives the same bits."""
    goal = Goal(max_error=0.2, dtype=CODED)
    adapters = alone()
    held = fit(adapters, goal)
    for adapter, task in zip(adapters, held.tasks, strict=True):
        error = planted.relative_error(adapter, lambda path, name=task.name: planted.stored_delta(held, path, name))
        assert error == pytest.approx(task.error, rel=1e-6)
    monkeypatch.setattr(in_turns, "_AT_ONCE", 1)
    assert all(map(same_rows, privates(held), privates(fit(adapters, goal))))
    monkeypatch.setattr(private, "worth_turns", lambda _: False)
    assert collection_bytes(held) < 0.995 * collection_bytes(fit(adapters, goal))


def test_an_error_below_what_sixteen_bits_allow_is_refused():
    with pytest.raises(loraspan.errors.ArgumentError, match=r"below what rounding to .*coded"):
        fit(alone(), Goal(max_error=2e-5, dtype=CODED))


@pytest.mark.parametrize("max_error", [1e-2, 1e-3, 3e-4])
def test_fine_errors_are_met_and_read_back(tmp_path, max_error):
    """In 16 bits, with weights in float32; the same numbers come back from a file, and are written again."""
    adapters = alone(count=4)
    space = loraspan.compress(adapters, max_error=max_error, dtype="coded")
    assert {rows.bits for rows in privates(space.collection)} == {16}
    found = [
        planted.relative_error(a, lambda path, i=i: planted.stored_delta(space.collection, path, i))
        for i, a in enumerate(adapters)
    ]
    assert found == pytest.approx(list(space.errors.values()), abs=1e-6)
    assert max(found) <= max_error
    floats = loraspan.compress(adapters, max_error=max_error, dtype=torch.float16)
    assert space.nbytes < 0.9 * floats.nbytes
    made = list(privates(space.collection))
    space.save(tmp_path / "a")
    opened = loraspan.open(tmp_path / "a")
    for mine, read in zip(made, privates(opened.collection), strict=True):
        assert isinstance(read, Coded)
        assert (read.bits, read.nbytes) == (16, mine.nbytes)
        assert torch.equal(read.numbers, mine.numbers)
        assert torch.equal(read.scales, mine.scales)
    opened.save(tmp_path / "b")
    files = [{p.name for p in (tmp_path / one).glob("*.safetensors")} for one in "ab"]
    assert files[0] == files[1]


def test_rows_of_eight_and_sixteen_bits_are_joined_exactly():
    rows = torch.nn.functional.normalize(torch.randn(5, 130, generator=torch.Generator().manual_seed(0)), dim=1)
    narrow, wide = (whole_steps(rows, torch.full((5,), step)) for step in (0.02, 1e-4))
    joined = cat_rows([narrow, wide, narrow])
    assert joined.bits == 16
    assert torch.equal(values_of(joined), torch.cat([values_of(narrow), values_of(wide), values_of(narrow)]))
    assert torch.equal(joined.scales, scales_of(joined.numbers))


def test_it_takes_less_than_blocks_at_their_own_errors():
    """On columns of equal energy, where ranks buy nothing: than 4 bits at the error of 4 bits, and of 8 at 0.02."""
    adapters = planted.adapters(count=4, shape=(512, 384), ranks=(6,), noise=0.0, cond=1.0, **ALONE)
    four = fit(adapters, Goal(max_error=0.13, dtype=4))
    worst = max(task.error for task in four.tasks)
    assert worst > 0.1
    assert collection_bytes(fit(adapters, Goal(max_error=worst, dtype=CODED))) < 0.95 * collection_bytes(four)
    eight = fit(adapters, Goal(max_error=0.02, dtype=8))
    assert collection_bytes(fit(adapters, Goal(max_error=0.02, dtype=CODED))) < 0.9 * collection_bytes(eight)


def test_file_and_memory_are_what_they_are_said_to_be(tmp_path):
    """Files: less than the entropy of the numbers; memory: a byte a number and scales, once it is looked at."""
    adapters = planted.adapters(count=6, shape=(300, 500), ranks=(8,), **ALONE)
    loraspan.compress(adapters, max_error=0.15, dtype="coded").save(tmp_path / "s")
    opened = loraspan.open(tmp_path / "s")
    rows = list(privates(opened.collection))
    assert all(isinstance(each, Coded) for each in rows)
    assert not any("codes" in vars(each) for each in rows)

    numbers = sum(each.shape[0] * each.length for each in rows)
    scales = sum(2 * each.shape[0] * -(-each.length // 64) for each in rows)
    assert sum(each.nbytes for each in rows) == numbers + scales
    assert sum(each.codes.nbytes + each.scales.nbytes for each in rows) == numbers + scales

    entropy = sum(_entropy(row) for each in rows for row in each.numbers.numpy())
    stream = sum(t.nbytes for name, t in column_tensors(opened.collection.segments[0].columns) if name[:6] == "coded.")
    # of one number in two the trellis says whether it is odd
    assert 0.7 * entropy < stream < 0.85 * entropy
    assert stream < current_bytes(tmp_path / "s") < stream + 9000
    assert opened.nbytes == current_bytes(tmp_path / "s")
    assert numbers > 2.2 * stream


def _entropy(row):
    shares = np.unique(row, return_counts=True)[1] / len(row)
    return -(shares * np.log2(shares)).sum() * len(row) / 8


def test_what_is_opened_is_what_was_saved(tmp_path):
    """Of slots that do not come in the order of their names, too."""
    adapters = [replace(adapter, slots=dict(reversed(adapter.slots.items()))) for adapter in alone(slots=3)]
    space = loraspan.compress(adapters, max_error=0.2, dtype="coded")
    assert list(space.collection.slots) != sorted(space.collection.slots)
    space.save(tmp_path / "s")
    opened = loraspan.open(tmp_path / "s")
    assert (opened.collection.bits, opened.errors) == ((CODED, CODED, CODED), space.errors)
    for path, columns in space.collection.segments[0].columns.items():
        other = opened.collection.segments[0].columns[path]
        assert torch.equal(other.weights, columns.weights)
        for field in ("left_private", "right_private"):
            now, was = getattr(other, field), getattr(columns, field)
            assert torch.equal(now.codes, was.codes)
            assert torch.equal(now.scales, was.scales)


def test_tasks_come_and_go_and_are_joined(tmp_path, monkeypatch):
    """One by one, in streams of one slot and of several, until segments are joined; each stays what it was."""
    monkeypatch.setattr(coded, "GROUP", 3000)
    adapters = alone(count=13, slots=3)
    loraspan.compress(adapters[:2], max_error=0.2, dtype="coded").save(tmp_path / "s")
    for adapter in adapters[2:]:
        loraspan.open(tmp_path / "s").add(adapter, max_error=0.25)
    space = loraspan.open(tmp_path / "s")
    space.remove("task 3")
    space.rename("task 4", "four")
    assert len(space.collection.segments) < 12
    assert loraspan.store.verify(tmp_path / "s") == []
    again = loraspan.open(tmp_path / "s")
    for adapter in adapters[:3] + adapters[4:]:
        name = "four" if adapter.name == "task 4" else adapter.name
        back = again.reconstruct(name)
        error = planted.relative_error(adapter, lambda path, of=back: planted.delta(of.slots[path]))
        assert error == pytest.approx(again.errors[name], abs=1e-6)
        assert error <= 0.25 * (1 + 1e-6)


def test_tasks_that_are_gone_still_count(tmp_path):
    """In memory and opened, nothing is unpacked to count what is left: as much as before, nearly."""
    space = loraspan.compress(alone(count=4), max_error=0.2, dtype="coded")
    space.save(tmp_path / "s")
    for held in (space, loraspan.open(tmp_path / "s")):
        segment = held.collection.segments[0]
        fewer = replace(segment, tasks=(None, *segment.tasks[1:]))
        assert 0.95 * segment_bytes(segment) < segment_bytes(fewer) <= segment_bytes(segment)
    assert not any("codes" in vars(rows) for rows in privates(held.collection))


def test_a_sign_that_turns_keeps_rows_coded():
    rows = whole_steps(torch.eye(3, 70), torch.full((3,), 0.1))
    turned = flip_rows(rows, torch.tensor([1, -1, -1]))
    assert torch.equal(turned.scales, scales_of(turned.numbers))
    assert torch.equal(values_of(turned)[1:], -values_of(rows)[1:])


def test_numbers_that_no_stream_has_are_kept_as_they_are():
    """-128, which no rounding gives and another hand may: not coded, which would make another number of it."""
    codes = torch.tensor([[-128, 1, 2]], dtype=torch.int8)
    assert coded._is_coded(Packed((codes + 1).view(torch.uint8), scales_of(codes + 1), 3, 8))
    assert not coded._is_coded(Packed(codes.view(torch.uint8), scales_of(codes), 3, 8))


def test_what_was_opened_can_be_pickled(tmp_path):
    """As other collections, before and after it is unpacked."""
    loraspan.compress(alone(count=2), max_error=0.2, dtype="coded").save(tmp_path / "s")
    opened = loraspan.open(tmp_path / "s").collection
    other = pickle.loads(pickle.dumps(opened))
    assert not any("codes" in vars(each) for each in privates(opened))
    again = [each.codes for each in privates(pickle.loads(pickle.dumps(other)))]
    for now, was in zip(again, privates(opened), strict=True):
        assert torch.equal(now, was.codes)
    for now, was in zip(privates(pickle.loads(pickle.dumps(opened))), again, strict=True):
        assert torch.equal(now.codes, was)


def test_an_adapter_on_coded_columns_is_measured_and_others_stay():
    adapters = alone(count=5)
    held = fit(adapters[:4], Goal(max_error=0.1, dtype=CODED))
    more = add(held, adapters[4:], max_error=0.05)
    assert more.segments[0] is held.segments[0]
    assert more.tasks[-1].error <= 0.05 * (1 + 1e-9)
    assert more.tasks[-1].error >= 0.97 * 0.05


def test_in_groups(tmp_path):
    """Runs over more than memory holds take the same width."""
    for adapter in alone(count=6):
        loraspan.adapters.peft.write(adapter, tmp_path / "in" / adapter.name)
    goal = {"max_error": 0.2, "dtype": "coded", "memory": "1GB"}
    space = loraspan.compress(str(tmp_path / "in" / "*"), **goal, out=tmp_path / "s")
    assert space.collection.bits == (CODED, CODED, CODED)
    assert max(space.errors.values()) <= 0.2 * (1 + 1e-9)
    assert loraspan.store.verify(tmp_path / "s") == []


@pytest.mark.parametrize("max_error", [0.3, 1e-3])
def test_a_report_counts_what_tasks_take_in_files(tmp_path, max_error):
    """All tasks together, what they have beside others in ends and weights; before a store is written and after."""
    space = loraspan.compress(alone(count=5, slots=3), max_error=max_error, dtype="coded")
    before = [line.nbytes for line in space.report().tasks]
    space.save(tmp_path / "a")
    opened = loraspan.open(tmp_path / "a")
    after = [line.nbytes for line in opened.report().tasks]
    assert not any("tables" in vars(rows.stream) for rows in privates(opened.collection))
    (segment,) = opened.collection.segments
    kept = sum(tensor.nbytes for name, tensor in column_tensors(segment.columns))
    assert sum(after) == pytest.approx(kept, abs=8 * len(after))
    # tables this small take a few per cent more on their own
    assert before == pytest.approx(after, rel=0.1)


def test_streams_that_nobody_changed_go_into_other_files_as_they_are(tmp_path):
    """Nothing is unpacked by another store, by more tasks or by counting bytes; those of fewer tasks are coded anew."""
    adapters = alone(count=6, slots=2)
    loraspan.compress(adapters[:4], max_error=0.2, dtype="coded").save(tmp_path / "a")

    space = loraspan.open(tmp_path / "a")
    # what is saved is opened anew: these are the rows that were there
    streams = {id(rows.stream): rows.stream for rows in privates(space.collection)}
    space.save(tmp_path / "b")
    assert streams
    assert not any("tables" in vars(stream) for stream in streams.values())
    assert [p.read_bytes() for p in sorted((tmp_path / "a").glob("*.safetensors"))] == [
        p.read_bytes() for p in sorted((tmp_path / "b").glob("*.safetensors"))
    ]
    streams = {id(rows.stream): rows.stream for rows in privates(space.collection)}
    space.add(adapters[4:5], max_error=0.2)
    assert not any("tables" in vars(stream) for stream in streams.values())
    space.remove("task 1")
    space.save(tmp_path / "c")
    assert loraspan.open(tmp_path / "c").tasks == ["task 0", "task 2", "task 3", "task 4"]
    assert not store.verify(tmp_path / "c")
