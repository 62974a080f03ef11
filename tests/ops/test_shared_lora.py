"""shared_lora: every form of column against dW in float64, rows without a task, mixtures."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from devices import shared_lora, shared_lora_
from loraspan.ops.shared_lora_run import TRANSPOSED
from matrices import LAYOUTS, normal, stored
from oracles import BF16, DTYPES, F16, F32, F64
from shared_lora_runs import COUNTS, SCALE, assert_right, run
from task_cores import batch, delta, expected, planted, random_tasks

# rows, n, d, k_out, k_in: one row, below, at and past a tile, prime, one basis missing, nothing
SIZES = [
    pytest.param(1, 1, 1, 1, 1, id="scalars"),
    pytest.param(1, 300, 700, 64, 64, id="one-row"),
    pytest.param(7, 95, 127, 15, 17, id="below-a-tile"),
    pytest.param(8, 96, 512, 16, 32, id="a-tile"),
    pytest.param(65, 97, 513, 33, 49, id="past-a-tile"),
    pytest.param(13, 31, 1031, 7, 3, id="prime"),
    pytest.param(6, 40, 50, 0, 4, id="no-output-basis"),
    pytest.param(6, 40, 50, 4, 0, id="no-input-basis"),
    pytest.param(6, 40, 0, 4, 4, id="no-inputs"),
    pytest.param(6, 0, 40, 4, 4, id="no-outputs"),
    pytest.param(0, 9, 9, 3, 3, id="no-rows"),
]
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "n", "d", "k_out", "k_in"), SIZES)
def test_matches_float64(backend, rows, n, d, k_out, k_in, dtype):
    cores = planted(1, COUNTS, n, d, k_out, k_in, dtype=dtype, dense=[4] if k_in else [])
    assert_right(*batch(2, rows, n, d, k_out, k_in, dtype), cores, random_tasks(3, rows, 1, 6)[:, 0], backend=backend)


@pytest.mark.parametrize("mixture", [2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixes_tasks_by_their_shares(backend, dtype, mixture):
    cores = planted(4, COUNTS, 37, 130, 9, 5, dtype=dtype, dense=[0, 4])
    data, tasks = batch(5, 21, 37, 130, 9, 5, dtype), random_tasks(6, 21, mixture, 6)
    tasks[3], shares = -1, normal(7, 21, mixture, dtype=F32)
    out = assert_right(*data, cores, tasks, shares=shares, backend=backend)
    assert oracles.same_bits(out[3], data[0][3])
    assert_right(*data, cores, tasks, backend=backend)


@pytest.mark.parametrize("form", range(4), ids=["ss", "sp", "ps", "pp"])
def test_each_form_alone(backend, form):
    counts = [[3 * (i == form) for i in range(4)]] * 2
    cores = planted(8, counts, 50, 70, 6, 11)
    assert_right(*batch(9, 5, 50, 70, 6, 11), cores, torch.tensor([0, 1, 1, 0, -1]), backend=backend)


@pytest.mark.parametrize("ends", DTYPES, ids=str)
@pytest.mark.parametrize("bases", DTYPES, ids=str)
@pytest.mark.parametrize(("y", "x"), [(F16, F32), (F32, BF16), (BF16, BF16), (F32, F64), (F64, F32)])
def test_dtypes_may_differ(backend, y, x, bases, ends):
    cores = planted(10, COUNTS, 33, 65, 5, 6, dtype=ends, dense=[2])
    first, second, v, u = batch(11, 9, 33, 65, 5, 6, F64)
    assert_right(
        first.to(y), second.to(x), v.to(bases), u.to(bases), cores, random_tasks(12, 9, 1, 6)[:, 0], backend=backend
    )


@pytest.mark.parametrize("layout", LAYOUTS[:5])
@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
def test_reads_and_writes_any_storage(backend, dtype, layout):
    cores = planted(13, COUNTS, 35, 530, 9, 18, dtype=dtype, dense=[0])
    y, x, v, u = (stored(t, layout) for t in batch(14, 11, 35, 530, 9, 18, dtype))
    assert_right(y, x, v, u, cores, random_tasks(15, 11, 1, 6)[:, 0], backend=backend)


def test_what_lies_beside_y_is_not_touched(backend):
    memory = torch.full((13, 41), 5.0)
    y = memory[1:12, 3:40]
    _, x, v, u = batch(16, 11, 37, 60, 5, 5)
    cores, tasks = planted(17, COUNTS, 37, 60, 5, 5), torch.tensor([0, 1, 2, 3, 4, 5, 0, 2, -1, 3, 2])
    wanted, bound = expected(y, x, v, u, cores, tasks)
    assert shared_lora_(y, x, v, u, cores, tasks, backend=backend) is y
    oracles.assert_within(y, wanted, bound)
    y.fill_(5)
    assert (memory == 5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_without_a_task_keeps_every_bit(backend, dtype):
    """Zeros keep their sign and NaN its payload: nothing is added, not even 0."""
    y, x, v, u = batch(18, 20, 40, 30, 4, 4, dtype)
    y[3], y[7, ::2], y[7, 1::2] = -0.0, float("nan"), -0.0
    x[3], x[7] = float("inf"), float("nan")
    tasks = torch.full((20, 1), 2)
    tasks[[3, 7, 19]] = -1
    out = run(y, x, v, u, planted(19, COUNTS, 40, 30, 4, 4, dtype=dtype), tasks, backend=backend)
    for row in (3, 7, 19):
        assert oracles.same_bits(out[row], y[row])
    assert not torch.equal(out[0], y[0])


def test_nan_stays_in_its_row_and_task(backend):
    y, x, v, u = batch(20, 16, 40, 530, 6, 6)
    cores = planted(21, [(3, 1, 1, 1)] * 4, 40, 530, 6, 6)
    tasks = torch.arange(16) % 4
    clean = shared_lora(y, x, v, u, cores, tasks, backend=backend)
    x[5, 17] = float("nan")
    cores.left[cores.index[2, 1]] = cores.right_private[cores.index[2, 4]] = float("inf")
    out = shared_lora(y, x, v, u, cores, tasks, backend=backend)
    bad = (tasks == 2) | (torch.arange(16) == 5)
    assert not torch.isfinite(out[bad]).all(dim=1).any()
    oracles.assert_within(out[~bad], *(part[~bad.numpy()] for part in expected(y, x, v, u, cores, tasks)))
    assert torch.isfinite(clean).all()


def test_ten_thousand_tasks(backend):
    cores = planted(22, [(1, 0, 0, 0)] * 10_000, 20, 30, 4, 4)
    tasks = torch.tensor([0, 9_999, 5_000, -1, 9_999])
    assert_right(*batch(23, 5, 20, 30, 4, 4), cores, tasks, backend=backend)


@pytest.mark.parametrize("distinct", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows_of_few_tasks(backend, dtype, distinct):
    """So many rows of a task that its own factors may be rebuilt, beside rows of another that are too few for that."""
    counts = [(2, 1, 1, 1), (3, 0, 0, 0), (0, 0, 2, 2), (0, 2, 0, 0), (1, 1, 1, 1), (1, 0, 0, 0)]
    cores = planted(24, counts, 250, 600, 40, 48, dtype=dtype, dense=[4])
    tasks = torch.arange(331) % distinct
    tasks[[5, 77]], tasks[200] = -1, 5
    shares = normal(25, 331, dtype=F32)
    assert_right(*batch(26, 331, 250, 600, 40, 48, dtype), cores, tasks, shares=shares, backend=backend)


def test_a_table_without_tasks(backend):
    cores = planted(27, [], 5, 6, 2, 2)
    y, x, v, u = batch(28, 3, 5, 6, 2, 2)
    assert oracles.same_bits(shared_lora(y, x, v, u, cores, torch.full((3,), -1), backend=backend), y)


def test_no_tasks_to_a_row(backend):
    cores, data = planted(27, COUNTS, 5, 6, 2, 2), batch(28, 3, 5, 6, 2, 2)
    out = shared_lora(*data, cores, torch.empty(3, 0, dtype=torch.int64), backend=backend)
    assert oracles.same_bits(out, data[0])


@given(rows=st.integers(0, 40), mixture=st.integers(1, 3), n=st.integers(0, 60), d=st.integers(0, 60), seed=seeds)
def test_any_sizes(backend, rows, mixture, n, d, seed):
    draw = torch.Generator().manual_seed(seed)
    k_out, k_in = torch.randint(0, 20, (2,), generator=draw).tolist()
    counts = torch.randint(0, 5, (7, 4), generator=draw)
    cores = planted(seed, counts, n, d, k_out, k_in, dense=[3])
    tasks, shares = random_tasks(seed, rows, mixture, 7), normal(seed + 5, rows, mixture, dtype=F32)
    assert_right(*batch(seed, rows, n, d, k_out, k_in), cores, tasks, shares=shares, backend=backend)


@pytest.mark.parametrize("name", ["cpu", "cpu:baseline", "reference"])
@pytest.mark.parametrize("rows", [9, 300])
def test_transposed_kernels_take_dw_transposed(name, rows):
    """What gives x its gradient: few rows of a task, and enough of them that its factors are rebuilt."""
    cores = planted(42, COUNTS, 70, 90, 30, 28, dtype=F64, dense=[0])
    y, x, v, u = batch(43, rows, 70, 90, 30, 28, F64)
    tasks, shares = random_tasks(44, rows, 1, 6), normal(45, rows, 1, dtype=F32)
    out = x.clone()
    chosen = next(b for b in TRANSPOSED if b.name == name)
    chosen.run(out, y, u, v, cores, tasks, shares, SCALE)
    deltas = [delta(cores, v, u, task) for task in range(6)]
    for row in range(rows):
        task = int(tasks[row])
        wanted = x[row].numpy() + (SCALE * float(shares[row]) * (y[row].numpy() @ deltas[task]) if task >= 0 else 0.0)
        # sums of at most 70 + 30 + 28 + 8 + 8 products of numbers below 1e3
        np.testing.assert_allclose(out[row].numpy(), wanted, rtol=0, atol=144 * 2.0**-53 * 1e3)
