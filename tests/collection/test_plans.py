"""Budgets of error and of bytes: met, never worse than each adapter's own SVD, and told."""

from __future__ import annotations

import math
from types import SimpleNamespace

import planted
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import loraspan
from loraspan.collection import plans, plans_in_bytes
from loraspan.collection.columns import FORMS
from loraspan.collection.fit import Goal, fit, fit_with_plans
from loraspan.collection.layout import collection_bytes, columns_bytes
from loraspan.collection.prices import column_bytes
from loraspan.collection.refit import refit
from loraspan.collection.rows import Widths, row_bytes, store_rows, values_of
from loraspan.collection.summary import summarized
from loraspan.errors import ArgumentError

SHAPE = (96, 128)
CASES = {
    "shared": {},
    "input": {"shared_out": 0},
    "none": {"shared_out": 0, "shared_in": 0},
    "mixed ranks": {"ranks": (2, 5, 8)},
}


def adapters(case, count=8):
    return planted.adapters(**{"count": count, "shape": SHAPE, "ranks": (6,), **CASES[case]})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("error", [0.4, 0.1, 0.01, 1e-4])
def test_an_error_is_met_in_the_fewest_bytes(case, error):
    """No fixed width that meets the error takes fewer bytes, but for what planning leaves to measuring."""
    held = adapters(case)
    chosen = fit(held, Goal(max_error=error, dtype=None))
    assert max(task.error for task in chosen.tasks) <= error * (1 + 1e-9)
    sizes = []
    for width in (torch.float32, torch.float16, 8, 4):
        try:
            sizes.append(collection_bytes(fit(held, Goal(max_error=error, dtype=width))))
        except ArgumentError:
            continue
    assert collection_bytes(chosen) <= 1.1 * min(sizes)


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_met_and_used(case):
    held = adapters(case)
    least = collection_bytes(fit(held, Goal(max_error=0.9, dtype=None)))
    most = collection_bytes(fit(held, Goal(max_error=1e-3, dtype=None)))
    worst = []
    for share in (0.1, 0.4, 0.8):
        limit = int(least + share * (most - least))
        made = fit(held, Goal(max_bytes=limit, dtype=None))
        assert collection_bytes(made) <= limit
        worst.append(max(task.error for task in made.tasks))
    assert worst == sorted(worst, reverse=True)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("width", [torch.float16, 8, 4], ids=str)
def test_never_worse_than_every_adapters_own_svd(case, width):
    """In the bytes of their singular vectors in any width, and what names and headers take."""
    held = adapters(case)
    overhead = collection_bytes(fit(held, Goal(max_error=0.9, dtype=None)))
    for rank in (2, 4):
        nbytes, worst = own_svds(held, rank, width)
        made = fit(held, Goal(max_bytes=nbytes + overhead, dtype=None))
        assert max(task.error for task in made.tasks) <= worst * (1 + 1e-6)


def own_svds(held, rank, width):
    nbytes, worst = 0, 0.0
    for adapter in held:
        lost = whole = 0.0
        for slot in adapter.slots.values():
            u, s, vh = torch.linalg.svd(torch.from_numpy(planted.delta(slot)), full_matrices=False)
            root = s[:rank].sqrt()[:, None]
            left, right = (store_rows(root * side[:rank], width) for side in (u.T, vh))
            kept = values_of(left).double().T @ values_of(right).double()
            lost += float((torch.from_numpy(planted.delta(slot)) - kept).square().sum())
            whole += float(s.square().sum())
            nbytes += rank * sum(row_bytes(length, width) for length in slot.shape)
        worst = max(worst, math.sqrt(lost / whole))
    return nbytes, worst


def test_too_few_bytes_are_refused_with_what_would_do():
    held = adapters("shared")
    with pytest.raises(ArgumentError, match=r"max_bytes=900 cannot be met: 8 adapters take [0-9,]+ bytes at the least"):
        fit(held, Goal(max_bytes=900, dtype=None))


def test_a_refit_to_a_number_of_bytes():
    """It takes no more, loses as little as that allows, and is refused where nothing does."""
    held = fit(adapters("shared"), Goal(max_error=0.01, dtype=torch.float32))
    size = collection_bytes(held)
    made = refit(held, max_bytes=size // 2)
    assert collection_bytes(made) <= size // 2
    assert max(task.forgotten for task in made.tasks) < 0.6
    with pytest.raises(ArgumentError, match="refit: max_bytes=100 cannot be met"):
        refit(held, max_bytes=100)
    with pytest.raises(ArgumentError, match="max_bytes=2,000 cannot be met with rank=None and max_forgetting=1e-05"):
        refit(held, max_bytes=2000, max_forgetting=1e-5)


def test_plans_are_told():
    """Each width with each form; the one that was built says so, and its count is near what was built."""
    held = adapters("shared")
    collection, counted = fit_with_plans(held, Goal(max_error=0.1, dtype=None))
    assert len(counted) == 8 * 5
    (chosen,) = [plan for plan in counted if plan.chosen]
    assert chosen.widths == str(collection.widths)
    assert chosen.forms == "mixed"
    assert all(plan.nbytes is None or plan.nbytes >= chosen.nbytes for plan in counted if plan.widths == chosen.widths)
    four = [plan for plan in counted if plan.widths == "int4"]
    assert four[0].nbytes is None
    report = loraspan.compress(held, max_error=0.1).report()
    assert len(report.plans) == len(counted)
    assert "rounding too coarse" in str(report)
    assert "chosen" in str(report)


class Coarse:
    """Fits in which a task loses a tenth more than it was allowed, as where rounding takes more than is expected."""

    def __init__(self, slots):
        self.slots = slots
        self.aims = []

    def build(self, aim, _widths, _report):
        self.aims.append(aim)
        return [(None, None, torch.tensor([(1.1 * aim) ** 2]))]


def test_rounding_that_takes_more_than_expected_is_made_up_for():
    fitters = Coarse([SimpleNamespace(slot=SimpleNamespace(members=[0]))])
    worst, _ = plans._build_within(fitters, torch.ones(1), 0.1, None, None)
    assert worst <= 0.1
    assert len(fitters.aims) == 2


@given(
    counts=st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=3),
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    ranks=st.tuples(st.integers(0, 80), st.integers(0, 80)),
    widths=st.sampled_from([Widths.of(torch.float32), Widths.of(4), Widths(torch.float32, 8, 8, 4)]),
    dense=st.booleans(),
)
def test_prices_are_what_columns_take(counts, shape, ranks, widths, dense):
    (n, d), (k_out, k_in) = shape, ranks
    taken = columns_bytes(counts, n=n, d=d, k_out=k_out, k_in=k_in, dtype=widths, dense=dense)
    for row, total in zip(counts, taken, strict=True):
        prices = [column_bytes(form, shape, ranks, widths, dense=dense) for form in FORMS]
        assert sum(count * price for count, price in zip(row, prices, strict=True)) == total


def test_floats_that_are_asked_for_are_kept():
    space = loraspan.compress(adapters("none"), max_error=0.3, dtype=torch.float16)
    assert space.collection.bits == (0, 0, 0)
    assert space.report().dtype == "float16"


def test_widths_that_took_too_many_bytes_are_tried_again_once_something_fits():
    """Of noisy adapters coded columns take a few per cent more than their plans say, three times over."""
    noisy = planted.adapters(24, (60, 80), (6,), shared_out=5, shared_in=5, noise=0.3, slots=3)
    worst = [loraspan.compress(noisy, max_bytes=16_000, dtype=dtype).errors for dtype in (None, "coded")]
    assert max(worst[0].values()) <= 1.01 * max(worst[1].values())


@pytest.mark.parametrize("size", ["20kB", "0.02 MB", 20_000])
def test_bytes_may_be_text(size):
    space = loraspan.compress(adapters("none"), max_bytes=size)
    assert space.nbytes <= 20_000


@pytest.mark.parametrize("size", ["much", "-5MB", 0, -3, 2.5, "1e9"])
def test_what_is_no_number_of_bytes_is_refused(size):
    with pytest.raises(ArgumentError, match="compress: a number of bytes is positive"):
        loraspan.compress(adapters("none"), max_bytes=size)


@pytest.mark.parametrize(("coarse", "bend"), [(1, 1.0), (40, 1.0), (1, 0.7), (1, 1.3)])
def test_what_fits_comes_close_to_what_does_not(coarse, bend):
    """Bytes over errors straight or bent, told exactly or in jumps: nearly all are used, and never more."""
    limit, asked = 10_000, []

    def built(error):
        way = math.log(error / 0.5) / math.log(0.3 / 0.5)
        return plans_in_bytes._Built(error, error, round((9700 + 900 * way**bend) / coarse) * coarse, [])

    def build(error):
        asked.append(error)
        return built(error)

    fits, other = built(0.5), built(0.3)
    assert fits.nbytes < 0.99 * limit < limit < other.nbytes
    found = plans_in_bytes._closer(fits, other, limit, build)
    assert 0.995 * limit <= found.nbytes <= limit
    assert found.error < fits.error
    assert len(asked) <= 3
    # nothing is built where enough is used, or where nobody knows what takes too many
    assert plans_in_bytes._closer(found, other, limit, build) is found
    assert plans_in_bytes._closer(fits, None, limit, build) is fits
    assert len(asked) <= 3


def test_a_summary_says_what_bytes_it_makes():
    collection = fit(planted.adapters(), Goal(rank=3))
    told, nbytes = summarized(collection)
    assert nbytes == collection_bytes(told) > collection_bytes(collection)
    assert f"{nbytes:,} bytes" in told.summary
