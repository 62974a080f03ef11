"""Factors of products to decompose, and what a decomposition has to meet; nothing here imports loraspan."""

import numpy as np
import torch

from oracles import F32, F64, UNIT_ROUNDOFF, to_numpy

SPECTRA = {
    "fast": lambda r: 0.5 ** np.arange(r),
    "slow": lambda r: 1 / (1 + np.arange(r)),
    "step": lambda r: np.where(np.arange(r) < r // 2, 1.0, 1e-3),
    "flat": np.ones,
    "exact-rank": lambda r: np.where(np.arange(r) < r // 2, 3.0 + np.arange(r), 0.0),
}


def orthonormal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def gauge(rng, rank, condition):
    """A matrix ``[rank, rank]`` of that condition number, and its inverse."""
    left, right, s = orthonormal(rng, rank, rank), orthonormal(rng, rank, rank), np.geomspace(1, condition, rank)
    return (left * s) @ right.T, (right / s) @ left.T


def exact(bs, as_, weights):
    """The weighted sum of products, in numpy's widest floating point, as it and in float64."""
    wide = [w * (to_numpy(b).astype(np.longdouble) @ to_numpy(a)) for b, a, w in zip(bs, as_, weights, strict=True)]
    total = sum(wide)
    return total, total.astype(np.float64)


def rounding_floor(bs, as_, weights):
    """``8 r 2^-53 sum_j |weight| |b_j| |a_j|``: what rounding in float64 may add to a singular value."""
    rank = sum(b.shape[1] for b in bs)
    sizes = [
        abs(w) * (np.linalg.norm(to_numpy(b), axis=0) * np.linalg.norm(to_numpy(a), axis=1)).sum()
        for b, a, w in zip(bs, as_, weights, strict=True)
    ]
    return 8 * rank * UNIT_ROUNDOFF[F64] * sum(sizes)


def judge(found, bs, as_, weights, rank=None):
    """Fail unless ``found`` is the decomposition of the sum, within the bounds that the docstring states."""
    wide, product = exact(bs, as_, weights)
    n, d = product.shape
    total = sum(b.shape[1] for b in bs)
    dtype = F64 if F64 in [x.dtype for x in (*bs, *as_)] else F32
    assert {x.dtype for x in found[:3]} == {dtype}
    assert found.discarded.dtype == F64
    u, s, vh = (to_numpy(x) for x in found[:3])
    k = s.shape[0]
    assert (u.shape, vh.shape, found.discarded.shape) == ((n, k), (k, d), ())
    assert k <= min(n, d, total, total if rank is None else rank)
    truth = np.linalg.svd(product, compute_uv=False)
    truth = np.append(truth, 0.0)
    unit, floor = UNIT_ROUNDOFF[dtype], rounding_floor(bs, as_, weights)
    # an eighth more where numpy has nothing wider than float64, and what its own decomposition rounds
    slack = 9 / 8 * floor + max(n, d) * UNIT_ROUNDOFF[F64] * truth[0]
    assert (s > 0).all()
    assert (np.diff(s) <= 0).all()
    assert (np.abs(s - truth[:k]) <= unit * truth[:k] + slack).all()
    if rank is None or k < rank:
        assert truth[k] <= slack, f"a triplet of {truth[k]:.3g} is missing"
    for vectors in (u, vh.T):
        assert np.linalg.norm(vectors.T @ vectors - np.eye(k), 2) <= 8 * total * unit if k else True
    rest = (wide - ((u * s) @ vh).astype(np.longdouble)).astype(np.float64)
    assert np.linalg.norm(rest, 2) <= truth[k] + slack + 8 * total * unit * truth[0]
    energy = (truth[k:] ** 2).sum()
    # each of at most r values, off by the slack
    assert 0 <= float(found.discarded) <= energy + 2 * slack * truth[k:].sum() + total * slack**2
    assert float(found.discarded) >= energy - 2 * slack * truth[k:].sum() - total * slack**2
    if k:
        assert (np.take_along_axis(u, np.abs(u).argmax(0)[None], 0) > 0).all()


def same_triplets(found, other):
    """Tell whether two results are equal to the last bit."""
    return all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.contiguous(), y.contiguous())
        for x, y in zip(found, other, strict=True)
    )
