"""``squares`` against NumPy in float64, for every dtype, storage and raggedness."""

import numpy as np
import pytest
import torch

import oracles
from loraspan.ops import squares
from matrices import KINDS, LAYOUTS, blocks, normal
from oracles import F16, F64, UNIT_ROUNDOFF


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("rows", "columns"), [([1], 1), ([3, 0, 5], 7), ([16, 17], 33), ([40, 1], 100), ([], 5), ([2], 0)]
)
def test_matches_float64(backend, kind, layout, rows, columns):
    x = blocks(11, rows, columns, kind, layout) or [torch.empty(0, columns)]

    got = squares(x, backend=backend)

    expected = np.square(oracles.stack(x)).sum(1)
    # both sums are of positive numbers: each may be off by so many roundings
    bound = 2 * (columns + 1) * UNIT_ROUNDOFF[F64] * expected + np.finfo(np.float64).tiny
    oracles.assert_within(got, expected, bound)


def test_the_threads_change_no_bit(compiled, on_threads):
    x = [normal(12, 70, 333), normal(13, 333, 50, dtype=F16).T]

    results = [on_threads(count, lambda: squares(x, backend=compiled)) for count in (1, 2, 5)]

    assert all(torch.equal(results[0], other) for other in results)


def test_what_is_not_finite_shows(backend):
    x = torch.ones(3, 20)
    x[1, 3] = float("nan")
    x[2, 19] = float("-inf")

    assert squares(x, backend=backend).isfinite().tolist() == [True, False, False]
