"""shared_lora: what does not fit is refused, and nothing written."""

import dataclasses

import pytest
import torch

from devices import shared_lora, shared_lora_
from loraspan.errors import ArgumentError, BackendError, ShapeError
from loraspan.ops import Cores
from oracles import F16, F64
from shared_lora_runs import COUNTS
from task_cores import batch, planted


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("task", [6, -2, 2**40])
def test_a_task_out_of_range_is_refused_and_nothing_written(name, task):
    cores, (y, x, v, u) = planted(36, COUNTS, 9, 8, 3, 3), batch(37, 5, 9, 8, 3, 3)
    before, tasks = y.clone(), torch.tensor([0, 1, 2, task, 3])
    with pytest.raises(ArgumentError, match=rf"^shared_lora: tasks are .* below 6, .* row 3 has \[{task}\]$"):
        shared_lora_(y, x, v, u, cores, tasks, backend=name)
    assert torch.equal(y, before)


@pytest.mark.parametrize("field", range(10))
def test_a_table_that_points_past_its_tensors_is_refused(compiled, field):
    cores, (y, x, v, u) = planted(38, COUNTS, 9, 8, 3, 3, dense=[4]), batch(39, 2, 9, 8, 3, 3)
    before = y.clone()
    # task 3 has no ps columns, so any start of its right rows is one past none; task 4 is dense
    row = 4 if field == 9 else 2
    for wrong in (2**62, -1, 30) if field < 9 else (0,):
        index = cores.index.clone()
        index[row, field] = wrong
        if field == 9:
            index[row, 3] = 10
        with pytest.raises(ArgumentError, match=r"whose columns lie in its tables; row 1 has"):
            shared_lora_(y, x, v, u, dataclasses.replace(cores, index=index), torch.tensor([0, row]), backend=compiled)
    assert torch.equal(y, before)


def valid():
    return {
        **dict(zip("yxvu", batch(40, 4, 9, 8, 3, 2), strict=True)),
        "cores": planted(41, COUNTS, 9, 8, 3, 2),
        "tasks": torch.tensor([0, 1, 2, 3]),
        "shares": None,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.ones(4, 8)}, r"have to fit; got \[4, 8\], \[4, 8\], \[8, 2\], \[9, 3\]"),
        ({"x": torch.ones(5, 8)}, r"got \[4, 9\], \[5, 8\]"),
        ({"x": torch.ones(4, 8, 1)}, r"got \[4, 9\], \[4, 8, 1\]"),
        ({"tasks": torch.tensor(3)}, r"\[9, 3\], \[\] and None"),
        ({"tasks": torch.ones(4, 1, 1, dtype=torch.int64)}, r"\[4, 1, 1\]"),
        ({"shares": torch.ones(4, 2)}, r"\[4\] and \[4, 2\]"),
        ({"v": torch.ones(8, 5)}, r"cores.right has 2 columns and needs 5"),
        ({"u": torch.ones(9, 2)}, r"cores.left has 3 columns and needs 2"),
        ({"cores": planted(41, COUNTS, 7, 8, 3, 2)}, r"cores.left_private has 7 columns and needs 9"),
        ({"cores": planted(41, COUNTS, 9, 7, 3, 2)}, r"cores.right_private has 7 columns and needs 8"),
        ({"x": torch.ones(4, 8).int()}, r"x is torch.int32 on cpu"),
        ({"v": torch.ones(8, 2, dtype=torch.complex64)}, r"v is torch.complex64 on cpu"),
        ({"u": torch.ones(9, 3, device="meta")}, r"u is torch.float32 on meta"),
        ({"tasks": torch.ones(4, dtype=torch.int32)}, r"tasks are int64 .* got torch.int32"),
        ({"shares": torch.ones(4, dtype=F64)}, r"shares float32; got torch.int64 and torch.float64"),
        ({"tasks": torch.ones(4, dtype=torch.int64, device="meta")}, r"tasks are on meta"),
        ({"y": torch.ones(1, 9).expand(4, 9)}, r"rows of y share memory"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {**valid(), **change}
    shares = arguments.pop("shares")
    before = arguments["y"].clone()
    with pytest.raises(ShapeError, match=f"^shared_lora: .*{message}"):
        shared_lora_(*arguments.values(), shares=shares)
    assert torch.equal(arguments["y"], before)


def test_an_unknown_backend_is_refused():
    arguments = valid()
    del arguments["shares"]
    with pytest.raises(BackendError, match=r"^shared_lora: no backend 'tpu'; it has 'cpu', .*'triton', .*'reference'$"):
        shared_lora(*arguments.values(), backend="tpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.ones(3)}, r"weights is \[4\]; got \[3\]"),
        ({"left": torch.ones(1, 3)}, r"left is \[2, \.\]; got \[1, 3\]"),
        ({"left_private": torch.ones(3, 9)}, r"left_private is \[2, \.\]"),
        ({"right": torch.ones(2)}, r"right is \[2, \.\]; got \[2\]"),
        ({"right": torch.ones(2, 2, dtype=F16)}, r"right is torch.float16 on cpu, left torch.float32"),
        ({"left": torch.ones(2, 3).int()}, r"left is torch.int32"),
        ({"right_private": torch.ones(8, 2).T}, r"right_private needs to be contiguous"),
        ({"dense": [True]}, r"as many ss columns as right has, 2; got counts of \[1\]"),
    ],
)
def test_columns_that_do_not_fit_are_refused(change, message):
    fields = {
        "counts": [(1, 1, 1, 1)],
        "weights": torch.ones(4),
        "left": torch.ones(2, 3),
        "left_private": torch.ones(2, 9),
        "right": torch.ones(1 if "dense" in change else 2, 2),
        "right_private": torch.ones(2, 8),
    }
    with pytest.raises(ShapeError, match=rf"^Cores: .*{message}"):
        Cores.of(**{**fields, **change})
