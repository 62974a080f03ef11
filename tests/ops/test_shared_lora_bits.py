"""shared_lora: the same bits for any company and threads, and nothing kept from call to call for too long."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from devices import shared_lora, shared_lora_
from loraspan.errors import ArgumentError, ShapeError
from matrices import normal
from oracles import BF16, DTYPES, F32
from shared_lora_runs import COUNTS, SCALE, assert_right
from task_cores import batch, planted, random_tasks

seeds = st.integers(0, 2**32 - 1)


@given(rows=st.integers(1, 70), mixture=st.integers(1, 2), dtype=st.sampled_from(DTYPES), seed=seeds)
def test_company_and_threads_change_no_bit(compiled, on_threads, rows, mixture, dtype, seed):
    """Each row of a batch alone, or all together on any number of threads; no task has rows enough to go alone."""
    cores = planted(seed, COUNTS, 130, 700, 20, 17, dtype=dtype, dense=[4])
    y, x, v, u = batch(seed, rows, 130, 700, 20, 17, dtype)
    tasks = random_tasks(seed, rows, mixture, 6)

    def together():
        return shared_lora(y, x, v, u, cores, tasks, scale=SCALE, backend=compiled)

    one, two, three = (on_threads(count, together) for count in (1, 2, 3))
    assert oracles.same_bits(one, two)
    assert oracles.same_bits(one, three)
    for row in range(0, rows, 7):
        at = slice(row, row + 1)
        alone = shared_lora(y[at], x[at], v, u, cores, tasks[at], scale=SCALE, backend=compiled)
        assert oracles.same_bits(alone, one[at])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_threads_change_no_bit_of_a_large_batch(compiled, on_threads, dtype):
    cores = planted(29, [(16, 1, 1, 1), (8, 0, 0, 0), (4, 0, 0, 2)], 700, 1100, 64, 64, dtype=dtype, dense=[1])
    data, tasks = batch(30, 900, 700, 1100, 64, 64, dtype), torch.arange(900) % 3
    one, two, three = (
        on_threads(count, lambda: shared_lora(*data, cores, tasks, backend=compiled)) for count in (1, 2, 3)
    )
    assert oracles.same_bits(one, two)
    assert oracles.same_bits(one, three)


def test_a_run_gives_the_same_bits_again(backend):
    cores, data, tasks = planted(31, COUNTS, 60, 700, 9, 9), batch(32, 30, 60, 700, 9, 9), random_tasks(33, 30, 2, 6)
    first, again = (shared_lora(*data, cores, tasks, backend=backend) for _ in range(2))
    assert oracles.same_bits(first, again)


def change_between_calls(backend):
    """Turn, move, fill or replace bases and tables between two calls; give the arguments of the last."""
    cores, (y, x, v, u) = planted(46, COUNTS, 12, 12, 3, 3), batch(47, 6, 12, 12, 3, 3)
    tasks = torch.tensor([0, 2, 3, 4, 5, -1])

    def changed(change):
        shared_lora(y, x, v, u, cores, tasks, backend=backend)
        change()
        assert_right(y, x, v, u, cores, tasks, backend=backend)

    square = v[:3].clone()
    u.data, v.data = normal(48, 12, 3, dtype=F32), normal(49, 12, 3, dtype=F32)
    changed(lambda: None)
    changed(lambda: setattr(v, "data", normal(50, 12, 3, dtype=F32)))
    changed(lambda: u.copy_(normal(51, 12, 3, dtype=F32)))
    changed(lambda: cores.left.mul_(2))
    changed(lambda: setattr(cores.right, "data", normal(52, *cores.right.shape, dtype=F32)))
    changed(lambda: setattr(v, "data", normal(53, 3, 12, dtype=F32).T))
    changed(lambda: setattr(v, "data", v.data.to(BF16)))
    small, short = planted(54, [(2, 0, 0, 0)], 12, 3, 3, 3), x[:, :3].contiguous()
    shared_lora(y, short, square, u, small, tasks.clamp(max=0), backend=backend)
    square.t_()
    assert_right(y, short, square, u, small, tasks.clamp(max=0), backend=backend)
    with pytest.raises(ShapeError, match="have to fit"):
        shared_lora(y, x, square, u, small, tasks, backend=backend)
    return y, short, square, u, small, tasks


def test_what_a_backend_keeps_from_call_to_call_is_not_kept_too_long(backend):
    change_between_calls(backend)


def test_what_is_kept_from_call_to_call_is_not_kept_too_long():
    call = change_between_calls(None)
    with pytest.raises(ArgumentError, match=r"row 1 has \[2\]"):
        shared_lora(*call)


def test_the_functional_form_leaves_y_alone():
    cores, (y, x, v, u) = planted(34, COUNTS, 9, 8, 3, 3), batch(35, 4, 9, 8, 3, 3)
    before = y.clone()
    out = shared_lora(y, x, v, u, cores, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(y, before)
    assert torch.equal(out, shared_lora_(y, x, v, u, cores, torch.tensor([0, 1, 2, 3])))
