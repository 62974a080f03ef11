"""What an IncrementalSVD does not take, it refuses by name, and stays as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraspan.errors import ArgumentError, FormatError, LoraspanError, MismatchError, NotFiniteError, ShapeError
from loraspan.linalg import IncrementalSVD
from loraspan.linalg.incremental_rows import capacity

COLUMNS = 6


def rows(count, columns=COLUMNS, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(count).standard_normal((count, columns))).to(dtype)


def with_entry(value, dtype=torch.float32):
    """Bad only in the last row of many, long after the first compression."""
    block = rows(500, dtype=dtype)
    block[-1, 2] = value
    return block


BAD_ROWS = {
    "list": ([[1.0] * COLUMNS], ShapeError, "torch.as_tensor"),
    "one-row": (torch.ones(COLUMNS), ShapeError, r"unsqueeze\(0\)"),
    "batch": (torch.ones(2, 2, COLUMNS), ShapeError, r"rows are \[n, D\]"),
    "no-columns": (torch.ones(2, 0), ShapeError, "D at least 1"),
    "columns": (torch.ones(2, COLUMNS + 1), ShapeError, "6 columns; got 7"),
    "integer": (torch.ones(2, COLUMNS, dtype=torch.int64), ShapeError, "int64"),
    "complex": (torch.ones(2, COLUMNS, dtype=torch.complex64), ShapeError, "complex64"),
    "bool": (torch.ones(2, COLUMNS, dtype=torch.bool), ShapeError, "bool"),
    "sparse": (torch.ones(2, COLUMNS).to_sparse(), ShapeError, "to_dense"),
    "device": (torch.ones(2, COLUMNS, device="meta"), ShapeError, "on cpu; got rows on meta"),
    "nan": (with_entry(float("nan")), NotFiniteError, "row 499 of 500"),
    "inf": (with_entry(float("inf")), NotFiniteError, "row 499 of 500"),
    "minus-inf": (with_entry(float("-inf")), NotFiniteError, "row 499 of 500"),
    "half-inf": (with_entry(float("inf"), torch.float16), NotFiniteError, "row 499 of 500"),
    "huge": (with_entry(1e38), ArgumentError, "1e.38: scale the rows"),
    "minus-huge": (with_entry(-1e38), ArgumentError, "1e.38: scale the rows"),
    "wide": (with_entry(1e200, torch.float64), ArgumentError, "held in torch.float32"),
}


@pytest.fixture(params=[False, True], ids=["raw", "centred"])
def svd(request):
    svd = IncrementalSVD(2, center=request.param)
    svd.update(rows(100))
    return svd


def assert_untouched(svd, act, error, message):
    before = svd.state_dict()
    with pytest.raises(error, match=message) as caught:
        act()
    assert str(caught.value).startswith("IncrementalSVD")
    after = svd.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", ["update", "transform"])
@pytest.mark.parametrize(("bad", "error", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_bad_rows_are_refused(svd, method, bad, error, message):
    assert_untouched(svd, lambda: getattr(svd, method)(bad), error, message)


@pytest.mark.parametrize("name", [name for name in BAD_ROWS if name not in ("columns", "device", "wide", "half-inf")])
def test_bad_first_rows_leave_nothing_behind(name):
    bad, error, message = BAD_ROWS[name]
    svd = IncrementalSVD(2, center=True)
    assert_untouched(svd, lambda: svd.update(bad), error, message)
    svd.update(rows(3, 4))
    assert svd.basis.shape == (4, 2)


def test_large_rows_are_taken_up_to_the_limit():
    svd = IncrementalSVD(2)
    svd.update(rows(300) * 1e32)
    assert svd.s.isfinite().all()
    assert svd.basis.isfinite().all()
    wide = IncrementalSVD(2)
    wide.update(rows(300, dtype=torch.float64) * 1e140)
    assert np.isfinite(wide.discarded)
    with pytest.raises(ArgumentError, match=r"held in torch\.float64"):
        wide.update(rows(1, dtype=torch.float64) * 1e150)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is a whole number, at least 1; got 0"),
        ({"rank": 2.5}, "rank is .* got 2.5"),
        ({"rank": True}, "rank"),
        ({"rank": 2, "buffer": -1}, "buffer is .* at least 0; got -1"),
        ({"rank": 2, "buffer": 1.0}, "buffer"),
        ({"rank": 2, "forget": 0.0}, "forget is in"),
        ({"rank": 2, "forget": 1.1}, "forget is in"),
        ({"rank": 2, "forget": float("nan")}, "forget is in"),
        ({"rank": 2, "forget": "slowly"}, "forget is in"),
        ({"rank": 2, "center": 1}, "center is True or False"),
    ],
)
def test_bad_options_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        IncrementalSVD(**arguments)


@pytest.mark.parametrize("name", ["basis", "s", "discarded", "mean", "weight"])
def test_nothing_is_shown_before_the_first_row(name):
    with pytest.raises(ArgumentError, match=f"IncrementalSVD.{name}: no row has been seen"):
        getattr(IncrementalSVD(2, center=True), name)
    svd = IncrementalSVD(2)
    svd.update(torch.empty(0, 5))
    assert svd.seen == 0
    with pytest.raises(ArgumentError, match="transform: no row"):
        svd.transform(torch.ones(1, 5))


def test_a_mean_needs_centring():
    svd = IncrementalSVD(2)
    svd.update(rows(3))
    with pytest.raises(ArgumentError, match="center=True"):
        _ = svd.mean


def test_rows_with_a_gradient_leave_it_behind():
    block = rows(5).requires_grad_()
    for center in (False, True):
        svd = IncrementalSVD(2, center=center)
        svd.update(block)
        assert not svd.basis.requires_grad
        assert not svd.transform(block).requires_grad


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (IncrementalSVD(3), "'rank': 3"),
        (IncrementalSVD(2, buffer=9), "'buffer': 9"),
        (IncrementalSVD(2, forget=0.5), "'forget': 0.5"),
        (IncrementalSVD(2, center=True), "'center': True"),
        ("nothing", "got str"),
    ],
)
def test_merging_needs_the_same_options(other, message):
    svd = IncrementalSVD(2)
    svd.update(rows(100))
    assert_untouched(svd, lambda: svd.merge(other), MismatchError, message)


@pytest.mark.parametrize("block", [rows(9, COLUMNS + 1), rows(9, dtype=torch.float64)], ids=["columns", "dtype"])
def test_merging_needs_rows_of_the_same_kind(svd, block):
    other = IncrementalSVD(2, center=svd.center)
    other.update(block)
    assert_untouched(svd, lambda: svd.merge(other), MismatchError, "same columns, dtype and device")


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.ones(COLUMNS), ShapeError, r"\[6, k_old\]; got \[6\]"),
        (torch.ones(COLUMNS + 1, 2), ShapeError, r"got \[7, 2\]"),
        (torch.ones(COLUMNS, 2, dtype=torch.int32), ShapeError, "int32"),
        (torch.ones(COLUMNS, 2, device="meta"), ShapeError, "meta"),
        ([1.0], ShapeError, "list"),
        (torch.full((COLUMNS, 2), float("nan")), NotFiniteError, "NaN"),
    ],
)
def test_bad_old_bases_are_refused(svd, bad, error, message):
    assert_untouched(svd, lambda: svd.rotation(bad), error, message)


def test_bad_states_are_refused(svd):
    state = svd.state_dict()
    width = capacity(svd.rank + svd.buffer)
    cases = [
        ({"rank": torch.tensor(3)}, MismatchError, "rank 3, and this object 2"),
        ({"forget": torch.tensor(0.5, dtype=torch.float64)}, MismatchError, "forget"),
        ({"rank": None}, FormatError, "no 'rank'"),
        ({"seen": None}, FormatError, "no 'seen'"),
        ({"held": None}, FormatError, r"no \['held'\]"),
        ({"rows": None}, FormatError, r"no \['rows'\]"),
        ({"rows": state["rows"].half()}, FormatError, "float16"),
        ({"rows": torch.ones(width, COLUMNS)}, FormatError, f"n < {width}"),
        ({"held": torch.tensor(99)}, FormatError, "99 <= n"),
        ({"rows": state["rows"] * float("nan")}, NotFiniteError, "rows"),
        ({"weight": torch.tensor(float("inf"), dtype=torch.float64)}, NotFiniteError, "weight"),
    ]
    if svd.center:
        cases += [
            ({"mean": None}, FormatError, r"no \['mean'\]"),
            ({"mean": state["mean"][:-1]}, FormatError, r"mean is \[6\] of float64; got \[5\]"),
        ]
    for change, error, message in cases:
        bad = {name: value for name, value in (state | change).items() if value is not None}
        assert_untouched(svd, lambda bad=bad: svd.load_state_dict(bad), error, message)


def test_every_refusal_is_one_of_ours():
    """A caller who catches LoraspanError or ValueError catches all of the above."""
    for kind in {error for _, error, _ in BAD_ROWS.values()} | {MismatchError, FormatError}:
        assert issubclass(kind, LoraspanError)
        assert issubclass(kind, ValueError)
