"""joint_gram: against NumPy in wider sums, in any order in memory, and the same bits for any number of threads."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from loraspan.errors import ShapeError
from loraspan.ops.joint_gram import joint_gram
from matrices import normal
from oracles import F32, F64, UNIT_ROUNDOFF, to_numpy

U = UNIT_ROUNDOFF[F64]
sizes = st.integers(0, 20)


def wide(near, far, g):
    near, far, g = (to_numpy(x).astype(np.longdouble) for x in (near, far, g))
    seen = far @ g
    return sum((n.T @ s @ s.T @ n for n, s in zip(near, seen, strict=True)), np.zeros((near.shape[2],) * 2))


def check(near, far, g, backend=None):
    got = joint_gram(near, far, g, backend=backend)
    assert torch.equal(got, got.T)
    # plain sums in the reference; two factors of far g
    steps = 2 * far.shape[2] + g.shape[1] + near.shape[1] + near.shape[0] * near.shape[1] + 8
    bound = steps * U * wide(near.abs(), far.abs(), g.abs())
    oracles.assert_within(got, wide(near, far, g).astype(np.float64), bound.astype(np.float64) + 1e-300)


@pytest.mark.parametrize(
    ("t", "r", "width", "d", "k"),
    [
        (1, 1, 1, 1, 1),
        (100, 16, 48, 48, 32),
        (3, 5, 9, 7, 2),
        (130, 1, 8, 4, 8),
        (9, 17, 24, 25, 33),
        (300, 4, 3, 5, 2),
    ],
)
def test_matches_wider_sums(backend, t, r, width, d, k):
    check(normal(1, t, r, width), normal(2, t, r, d), normal(3, d, k), backend)


@given(t=sizes, r=sizes, width=sizes, d=sizes, k=sizes, turned=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_any_size(t, r, width, d, k, turned, seed):
    near, far, g = normal(seed, t, r, width), normal(seed + 1, t, r, d), normal(seed + 2, d, k)
    if turned:
        near, far, g = near.mT.contiguous().mT, normal(seed + 3, t, r, 2 * d)[..., ::2], g.T.contiguous().T
    check(near, far, g)


def test_it_is_what_cores_give(backend):
    near, far, g = normal(1, 20, 3, 7), normal(2, 20, 3, 6), normal(3, 6, 2)
    cores = near.mT @ far
    wanted = torch.einsum("tij,jk,tlk->il", cores, g, cores @ g)
    torch.testing.assert_close(joint_gram(near, far, g, backend=backend), wanted)


@pytest.mark.parametrize("t", [5, 70, 700])
def test_threads_change_no_bit(compiled, on_threads, t):
    near, far, g = normal(4, t, 16, 33), normal(5, t, 16, 20), normal(6, 20, 12)

    results = [on_threads(count, lambda: joint_gram(near, far, g, backend=compiled)) for count in (1, 2, 5)]

    assert all(torch.equal(results[0], other) for other in results)


def test_what_is_not_finite_shows(backend):
    far = normal(7, 40, 4, 6)
    far[33, 2, 1] = float("nan")
    assert joint_gram(normal(8, 40, 4, 5), far, normal(9, 6, 3), backend=backend).isnan().all()


def test_what_torch_negates_lazily(backend):
    near, far, g = normal(1, 3, 2, 4), normal(2, 3, 2, 5), normal(3, 5, 2)
    lazily = [torch._neg_view(-x) for x in (near, far, g)]
    torch.testing.assert_close(joint_gram(*lazily, backend=backend), joint_gram(near, far, g, backend=backend))


T = torch.ones(2, 3, 4, dtype=F64)
G = torch.ones(4, 1, dtype=F64)


@pytest.mark.parametrize(
    ("near", "far", "g"),
    [(T[0], T, G), (T, T[0], G), (T, T, T), (T[:1], T, G), (T[:, :2], T, G), (T, T, G[:3]), (T.to(F32), T, G)],
)
def test_what_does_not_fit_is_refused(near, far, g):
    with pytest.raises(ShapeError, match=r"^joint_gram: near, far and g are float64 of \[T, r, l\], .* and \[d, k\];"):
        joint_gram(near, far, g)
