"""whiten_: orthonormal in the metric that made the image, in place; or untouched and said so."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraspan.errors import ShapeError
from loraspan.ops import whiten
from loraspan.ops.whiten import whiten_
from matrices import normal
from oracles import F32, F64, UNIT_ROUNDOFF, to_numpy

U = UNIT_ROUNDOFF[F64]
LIMIT = 1e-8


def metric(m, seed, decades=1.0):
    """``D`` with singular values over so many decades, and ``D^T D``."""
    q, _ = torch.linalg.qr(normal(seed, m, m))
    d = q * torch.logspace(0, -decades, m, dtype=F64)
    return d, d.T @ d


def defect(d, found):
    """How far ``Q``, with ``found = D^T Q``, is from orthonormal."""
    q = np.linalg.solve(to_numpy(d.T), to_numpy(found))
    return float(np.abs(q.T @ q - np.eye(q.shape[1])).max(initial=0))


@pytest.mark.parametrize(("m", "k"), [(1, 1), (9, 3), (40, 16), (150, 48), (33, 33), (300, 25)])
def test_makes_it_orthonormal_where_it_lies(backend, m, k):
    d, square = metric(m, 1)
    block = normal(2, m, k)
    image, place = square @ block, block.data_ptr()
    before = block.clone()

    assert whiten_(block, image, LIMIT, backend=backend) is True

    assert block.data_ptr() == place
    # rounding of products, and the condition numbers of the metric, 100, and of what is solved for here, another 10
    assert defect(d, block) <= 1e4 * m * k * U
    # the same span, in the order of the columns: an upper triangular matrix turns one into the other
    turn = np.linalg.lstsq(to_numpy(square @ before), to_numpy(block), rcond=None)[0]
    assert np.abs(np.tril(turn, -1)).max(initial=0) <= 1e-9 * np.abs(turn).max()
    assert (np.diag(turn) > 0).all()


@given(
    m=st.integers(1, 120),
    k=st.integers(1, 12),
    decades=st.floats(0, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_called_good_is_good(m, k, decades, seed):
    """By a bound: entries of the rounding of the Gram, and k of them in each sum with the inverse root, twice."""
    k = min(m, k)
    block = normal(seed, m, k) @ normal(seed + 1, k, k) * torch.logspace(0, -decades, k, dtype=F64)
    block += normal(seed + 2, m, 1)
    found = block.clone()
    # D = I: the image is the block itself
    if whiten_(found, block.clone(), LIMIT):
        gram = to_numpy(found).T @ to_numpy(found)
        # directions that are none beside rounding come out as zeros
        present = np.diag(np.diag(gram) > 0.5)
        assert np.abs(gram - present).max() <= 4 * k**2 * LIMIT
    else:
        assert torch.equal(found, block)


def columns(case):
    block = normal(1, 50, 6)
    if case == "nearly dependent":
        block[:, 3] = block[:, 1] + 1e-6 * normal(2, 50)
    elif case == "zero":
        block[:, 2] = 0
    else:
        block[7, 5] = float(case)
    return block


@pytest.mark.parametrize("case", ["nearly dependent", "zero", "nan", "inf"])
def test_the_rest_is_left_as_it_was(backend, case):
    block = columns(case)
    before = block.clone()

    assert whiten_(block, block.clone(), LIMIT, backend=backend) is False

    assert torch.equal(block.nan_to_num(1.5), before.nan_to_num(1.5))


def test_columns_that_depend_on_others_come_out_as_zeros(backend):
    block = normal(1, 50, 6)
    block[:, 3] = block[:, 1] - block[:, 0]
    found = block.clone()

    assert whiten_(found, block, LIMIT, backend=backend)

    lengths = found.square().sum(0)
    assert sorted(lengths.round().tolist()) == [0, 1, 1, 1, 1, 1]
    # it spans what the block spans
    torch.testing.assert_close(found @ (found.T @ block), block)


def test_a_negative_metric_is_none(backend):
    block = normal(1, 50, 6)
    before = block.clone()
    assert not whiten_(block, -block, LIMIT, backend=backend)
    assert torch.equal(block, before)


def test_what_is_asymmetric_is_not_good(backend):
    """An image that no metric gives: the difference of the Gram from its transpose is taken for rounding."""
    block = normal(1, 50, 6)
    assert whiten_(block.clone(), block.clone(), LIMIT, backend=backend)
    image = block.clone()
    image[:, 0] += 1e-5 * block[:, 4]
    image[:, 4] -= 1e-5 * block[:, 0]
    assert not whiten_(block.clone(), image, LIMIT, backend=backend)
    assert whiten_(block.clone(), image, 1e-3, backend=backend)


def test_no_limit_is_below_what_rounding_does(backend):
    block = torch.eye(9, 3, dtype=F64)
    assert whiten_(block.clone(), block, U, backend=backend)
    assert not whiten_(block.clone(), block, U / 2, backend=backend)
    assert not whiten_(block.clone(), block, -1.0, backend=backend)


@pytest.mark.parametrize("shape", [(5, 0), (0, 0)])
def test_nothing_is_good(backend, shape):
    assert whiten_(torch.empty(shape, dtype=F64), torch.empty(shape, dtype=F64), LIMIT, backend=backend)


def test_rows_without_an_entry_are_zero_columns(backend):
    assert not whiten_(torch.empty(0, 3, dtype=F64), torch.empty(0, 3, dtype=F64), LIMIT, backend=backend)


def test_threads_change_no_bit(compiled, on_threads):
    block = normal(3, 1700, 48)

    def run():
        found = block.clone()
        assert whiten_(found, 2 * block, LIMIT, backend=compiled)
        return found

    results = [on_threads(count, run) for count in (1, 2, 5)]

    assert all(torch.equal(results[0], other) for other in results)


def test_wide_ones_are_lapacks(compiled, monkeypatch):
    block, seen = normal(4, 20, 6), []
    honest = whiten.reference
    monkeypatch.setattr(whiten, "LARGEST", 5)
    monkeypatch.setattr(whiten, "reference", lambda *arguments: seen.append(arguments) or honest(*arguments))
    assert whiten_(block, block.clone(), LIMIT, backend=compiled)
    assert len(seen) == 1
    torch.testing.assert_close(block.T @ block, torch.eye(6, dtype=F64))


def test_an_image_that_torch_negates_lazily(backend):
    block = normal(5, 20, 3)
    lazily = torch._neg_view(-block)
    assert lazily.is_neg()
    assert whiten_(block, lazily, LIMIT, backend=backend)
    torch.testing.assert_close(block.T @ block, torch.eye(3, dtype=F64))


def test_one_block_is_not_both(backend):
    block = normal(6, 20, 3)
    before = block.clone()
    with pytest.raises(ShapeError, match=r"^whiten: block and image are the same memory"):
        whiten_(block, block, LIMIT, backend=backend)
    assert torch.equal(block, before)


ONES = torch.ones(4, 3, dtype=F64)


@pytest.mark.parametrize(
    ("block", "image"),
    [
        (ONES.clone(), torch.ones(4, 2, dtype=F64)),
        (torch.ones(4, 3, dtype=F32), ONES),
        (ONES.clone(), torch.ones(4, 3, dtype=F32)),
        (torch.ones(4, dtype=F64), torch.ones(4, dtype=F64)),
        (torch.ones(3, 4, dtype=F64).T, ONES),
        (ONES.clone(), torch.ones(3, 4, dtype=F64).T),
        (torch._neg_view(ONES.clone()), ONES),
    ],
)
def test_what_does_not_fit_is_refused(block, image):
    with pytest.raises(ShapeError, match=r"^whiten: block and image are contiguous float64 of \[m, k\]; got"):
        whiten_(block, image, LIMIT)
