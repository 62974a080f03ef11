"""Rows to stream, and what NumPy says of them in float64. Nothing here imports loraspan."""

import numpy as np


def weighted(x, forget=1.0, center=False):
    """The rows as an IncrementalSVD sees them at the end: less their weighted mean, each times its weight."""
    w = forget ** np.arange(len(x) - 1, -1, -1.0)
    return (x - mean(x, forget) if center else x) * w[:, None]


def mean(x, forget=1.0):
    w2 = forget ** (2 * np.arange(len(x) - 1, -1, -1.0))
    return (w2[:, None] * (x - x[0])).sum(axis=0) / w2.sum() + x[0]


def energy_outside(x, basis):
    """``|x - x V V^T|_F^2`` by the rest itself: as a difference of energies it would cancel."""
    basis = np.asarray(basis, dtype=np.float64)
    return np.linalg.norm(x - (x @ basis) @ basis.T) ** 2


def least_outside(x, rank):
    """The least that any ``rank`` vectors can leave outside: Eckart and Young 1936. Good to 1e-15 of all energy."""
    small = x @ x.T if len(x) <= x.shape[1] else x.T @ x
    return np.linalg.eigvalsh(small)[: max(0, len(small) - rank)].clip(min=0).sum()


def directions(rng, columns, count):
    """Orthonormal rows."""
    block = rng.standard_normal((columns, count))
    for _ in range(2):
        block = np.linalg.solve(np.linalg.cholesky(block.T @ block), block.T).T
    return block.T


def shared(rows=512, columns=8000, seed=0):
    """20 directions that all rows share, a power-law tail of 200 more, and noise."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((rows, 20)) * np.linspace(3, 1, 20) @ directions(rng, columns, 20)
    tail = rng.standard_normal((rows, 200)) * np.arange(1, 201.0) ** -0.7 @ directions(rng, columns, 200)
    return common + tail + rng.standard_normal((rows, columns)) * (0.1 / np.sqrt(columns))


def _duplicates(x):
    return np.repeat(x[: len(x) // 4], 4, axis=0)


def _zero_rows(x):
    out = x.copy()
    out[::3] = 0
    return out


def _in_the_span(x):
    """After a quarter, nothing but combinations of what came."""
    rng = np.random.default_rng(1)
    quarter = len(x) // 4
    return np.concatenate([x[:quarter], rng.standard_normal((len(x) - quarter, quarter)) @ x[:quarter] / quarter])


def _by_angle(x):
    """Sorted by the angle in the plane of the two leading directions, so that these come one after the other."""
    plane = x @ np.linalg.svd(x, full_matrices=False)[2][:2].T
    return x[np.argsort(np.arctan2(plane[:, 1], plane[:, 0]))]


def _smallest_first(x):
    return x[np.argsort((x**2).sum(axis=1))]


def _drifting(x):
    """The first half lives in other directions than the second."""
    half = len(x) // 2
    return np.concatenate([x[:half], np.roll(x[half:], x.shape[1] // 2, axis=1)])


ADVERSARIES = {
    "duplicates": _duplicates,
    "zero-rows": _zero_rows,
    "in-the-span": _in_the_span,
    "by-angle": _by_angle,
    "smallest-first": _smallest_first,
    "largest-first": lambda x: _smallest_first(x)[::-1].copy(),
    "drifting": _drifting,
    "tiny": lambda x: x * 1e-30,
    "huge": lambda x: x * 1e30,
}
