"""The leading eigenpairs agree with LAPACK's, by the full way and by the block iteration."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraspan.linalg.eig import top_eigenpairs

SPECTRA = {
    "fast": lambda n: 0.7 ** np.arange(n),
    "slow": lambda n: 1 / (1 + np.arange(n)),
    "step": lambda n: np.where(np.arange(n) < 12, 1.0, 1e-3),
    "flat": np.ones,
    "exact-rank": lambda n: np.where(np.arange(n) < 7, 3.0 + np.arange(n), 0.0),
}


@pytest.mark.parametrize("n", [1, 40, 600], ids=["one", "full", "iterated"])
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA.keys())
def test_values_and_space_are_lapacks(n, spectrum):
    rng = np.random.default_rng(7)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    s = spectrum(n)
    gram = (q * s) @ q.T
    values, vectors = top_eigenpairs(torch.from_numpy((gram + gram.T) / 2), 10)
    values, vectors = values.numpy(), vectors.numpy()
    k = min(10, n)
    truth = np.sort(s)[::-1][:k]
    assert values.shape == (k,)
    assert np.abs(values - truth).max() <= 1e-9 * truth[0]
    # a direction without any energy may come out as zero
    there = vectors[:, truth > 0]
    assert np.abs(there.T @ there - np.eye(there.shape[1])).max() <= 1e-12 * n
    # the vectors are judged by what they hold, not by themselves: repeated values leave them free
    assert np.linalg.norm(gram @ vectors - vectors * values) <= 1e-5 * truth[0]


def test_largest_entry_is_positive():
    _, vectors = top_eigenpairs(torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)), 2)
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()
