"""Matrices with singular values known beforehand, and how far a truncated decomposition of one may be off."""

import math

import numpy as np
import torch

from matrices import normal
from oracles import F64, UNIT_ROUNDOFF, to_numpy

# the shapes of spectra: how many values, and how many of them matter
SPECTRA = {
    "fast": lambda count, _: 0.7 ** torch.arange(count, dtype=F64).clamp(max=200),
    "slow": lambda count, _: 1 / (1 + torch.arange(count, dtype=F64)),
    "flat": lambda count, _: torch.ones(count, dtype=F64),
    "step": lambda count, rank: torch.where(torch.arange(count) < rank, 1.0, 1e-3).to(F64),
    "exact": lambda count, rank: (2 - torch.arange(count, dtype=F64) / rank) * (torch.arange(count) < rank),
    "six decades": lambda count, _: torch.logspace(0, -6, count, dtype=F64),
}


def with_values(m, n, s, seed):
    """``m x n`` with the singular values ``s``, in float64."""
    u, _ = torch.linalg.qr(normal(seed, m, len(s)))
    v, _ = torch.linalg.qr(normal(seed + 1, n, len(s)))
    return (u * s) @ v.T


def expected_range_error(s, rank, oversample, power_iterations):
    """Bound on ``E ||(I - Q Q^T) A||_2`` for the true singular values ``s`` (Halko et al. 2011, corollary 10.10)."""
    tail = s[rank:] ** (2 * power_iterations + 1)
    if not tail.size:
        return 0.0
    head = (1 + math.sqrt(rank / (oversample - 1))) * tail[0]
    rest = math.e * math.sqrt(rank + oversample) / oversample * math.sqrt((tail**2).sum())
    return (head + rest) ** (1 / (2 * power_iterations + 1))


def assert_decomposes(x, found, rank, range_error, dtype):
    """Judge what is determined: orthonormal, descending, never above the true values, and close enough to ``x``."""
    wide, u = to_numpy(x), UNIT_ROUNDOFF[dtype]
    left, s, right = to_numpy(found.u), to_numpy(found.s), to_numpy(found.vh)
    true = np.linalg.svd(wide, compute_uv=False)
    top, size = true[:1].max(initial=0), max(wide.shape)
    count = len(s)
    assert count <= rank
    for name, gram in (("u", left.T @ left), ("v", right @ right.T)):
        off = np.linalg.norm(gram - np.eye(count), 2) if count else 0
        assert off <= 8 * max(count, 1) * u, f"{name} is off by {off / u:.1f} units, {count} columns"
    assert (np.diff(s) <= 0).all()
    assert (s > 0).all()
    assert (s - true[:count] <= 2 * math.sqrt(size) * u * top).all()
    following = true[rank] if rank < len(true) else 0.0
    error = np.linalg.norm(wide - (left * s) @ right, 2)
    assert error <= following + range_error + 8 * math.sqrt(size) * u * top, f"{error:.3g} for {following:.3g}"
    return left, s, right, true
