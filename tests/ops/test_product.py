"""product: small and tall float64 matrices against NumPy, in any order in memory."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from loraspan.errors import ShapeError
from loraspan.ops.product import inner, product
from matrices import normal
from oracles import F32, F64, UNIT_ROUNDOFF, to_numpy

U = UNIT_ROUNDOFF[F64]
sizes = st.integers(0, 40)


def check(a, b, backend=None):
    got = product(a, b, backend=backend)
    wide_a, wide_b = to_numpy(a).astype(np.longdouble), to_numpy(b).astype(np.longdouble)
    # plain sums in the reference
    steps = a.shape[-1] + 2
    bound = steps * U * (np.abs(wide_a) @ np.abs(wide_b))
    oracles.assert_within(got, (wide_a @ wide_b).astype(np.float64), bound.astype(np.float64) + 1e-300)


@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (16, 16, 48), (48, 1600, 48), (130, 129, 7), (3, 257, 25), (9, 8, 8)]
)
@pytest.mark.parametrize("members", [(), (1,), (5,)])
def test_matches_wider_sums(backend, members, m, k, n, turned):
    a, b = normal(1, *members, m, k), normal(2, *members, k, n)
    a, b = (x.mT.contiguous().mT if flag else x for x, flag in zip((a, b), turned, strict=True))
    check(a, b, backend)


@given(t=sizes, m=sizes, k=sizes, n=sizes, shared=st.booleans(), apart=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_any_size(t, m, k, n, shared, apart, seed):
    a = normal(seed, t, m, 2 * k)[..., ::2] if apart else normal(seed, t, m, k)
    check(a, normal(seed + 1, *(() if shared else (t,)), k, n))


def test_sums_are_short(compiled):
    """Within the bound for 128 terms, where one long float64 sum is not."""
    a = torch.full((1, 128 * 1024), 0.1, dtype=F64)
    b = torch.ones(a.shape[1], 1, dtype=F64)
    exact = float(np.longdouble(0.1) * a.shape[1])
    allowed = (128 + a.shape[1] / 128 + 1) * U * exact
    assert abs(product(a, b, backend=compiled).item() - exact) <= allowed


def test_neither_threads_nor_company_change_a_bit(compiled, on_threads):
    a, b = normal(3, 9, 130, 200).mT, normal(4, 9, 130, 30)

    results = [on_threads(count, lambda: product(a, b, backend=compiled)) for count in (1, 2, 5)]

    assert all(torch.equal(results[0], other) for other in results)
    assert all(torch.equal(product(a[i], b[i], backend=compiled), results[0][i]) for i in range(9))


def test_inner_is_the_product_with_the_transpose():
    a, b = normal(5, 300, 7), normal(6, 300, 9)
    assert torch.equal(inner(a, b), product(a.T, b))


def test_what_is_not_finite_shows(backend):
    a = torch.ones(9, 9, dtype=F64)
    a[3, 4] = float("nan")
    assert product(a, torch.ones(9, 5, dtype=F64), backend=backend).isfinite().all(1).tolist() == [
        i != 3 for i in range(9)
    ]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2, 3, dtype=F64), torch.zeros(2, 3, dtype=F64)),
        (torch.zeros(3, dtype=F64), torch.zeros(3, 1, dtype=F64)),
        (torch.zeros(2, 3), torch.zeros(3, 1, dtype=F64)),
        (torch.zeros(2, 3, dtype=F64), torch.zeros(3, 1, dtype=F32)),
        (torch.zeros(2, 2, 3, dtype=F64), torch.zeros(3, 3, 1, dtype=F64)),
        (torch.zeros(2, 3, dtype=F64), torch.zeros(2, 3, 1, dtype=F64)),
        (torch.zeros(1, 2, 2, 3, dtype=F64), torch.zeros(3, 1, dtype=F64)),
    ],
)
def test_what_does_not_fit_is_refused(a, b):
    with pytest.raises(ShapeError, match=r"product: a and b are float64 of \[m, k\] and \[k, n\], or T of them; got"):
        product(a, b)
