"""Roots of Grams and orthonormal blocks: exact where there is rank, zero where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraspan.linalg.eig import top_eigenpairs
from loraspan.linalg.roots import gram_root, orthonormalize


@given(m=st.integers(1, 40), n=st.integers(1, 12), lost=st.integers(0, 4), seed=st.integers(0, 2**32 - 1))
def test_root_gives_the_gram_back_and_orthonormal_vectors(m, n, lost, seed):
    rng = np.random.default_rng(seed)
    rank = max(0, min(m, n) - lost)
    block = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n)) * np.geomspace(1, 1e5, n)
    gram = torch.from_numpy(block.T @ block)
    r, inverse = gram_root(gram)
    scale = np.sqrt(np.outer(np.diag(gram), np.diag(gram))) + 1e-300
    # a direction below sqrt(n 1e-15) of its vectors may be taken for absent
    assert (np.abs(r.numpy().T @ r.numpy() - gram.numpy()) / scale).max() <= 1e-13 * n
    q = torch.from_numpy(block) @ inverse
    values = torch.linalg.eigvalsh(q.T @ q)
    # eigenvalues of the projector on what is there: 0 or 1
    near = torch.minimum(values.abs(), (values - 1).abs())
    assert near.max() <= 1e-3
    if rank == n:
        assert (values > 0.5).sum() == rank


def test_zero_vectors_stay_zero_in_place():
    """Rows below a smaller rank are cut by position, so zeros have to stay where they are."""
    block = torch.zeros(5, 4, dtype=torch.float64)
    block[:, :2] = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 2)))
    r, inverse = gram_root(block.T @ block)
    assert not r[2:].any()
    assert not inverse[2:].any()
    assert not inverse[:, 2:].any()


def test_a_batch_is_its_members():
    rng = np.random.default_rng(3)
    blocks = rng.standard_normal((6, 9, 4))
    blocks[2, :, 3] = blocks[2, :, 0]
    grams = torch.from_numpy(blocks.transpose(0, 2, 1) @ blocks)
    together = gram_root(grams)
    for i, gram in enumerate(grams):
        alone = gram_root(gram)
        torch.testing.assert_close(together.r[i], alone.r, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(400, 200), (500, 300)])
def test_a_root_of_many_rows_that_depend_and_differ_in_length(m, n):
    """Half of what is left of their Gram, scaled, is rounding, which an iteration may stir without an end."""
    x = np.random.default_rng(4).standard_normal((m, n)) * np.geomspace(1, 1e-7, n)
    rows = torch.from_numpy(np.linalg.eigh(x @ x.T).eigenvectors[:, ::-1].T @ x)
    gram = rows @ rows.T
    scale = gram.diagonal().sqrt()

    alone, together = gram_root(gram), gram_root(torch.stack([torch.eye(m, dtype=gram.dtype), gram]))

    assert torch.equal(together.r[1], alone.r)
    assert torch.equal(together.inverse[1], alone.inverse)
    assert torch.equal(together.r[0], torch.eye(m, dtype=gram.dtype))
    assert ((alone.r.T @ alone.r - gram) / scale / scale.unsqueeze(1)).abs().max() <= 1e-13 * m
    assert float((alone.r * alone.inverse.T).sum()) == pytest.approx(np.linalg.matrix_rank(x), abs=1e-6)


@pytest.mark.parametrize("cond", [1.0, 1e4, 1e6])
def test_orthonormal_for_ill_conditioned_blocks(cond):
    rng = np.random.default_rng(1)
    u, _, vh = np.linalg.svd(rng.standard_normal((300, 20)), full_matrices=False)
    q = orthonormalize(torch.from_numpy(u * np.geomspace(1, 1 / cond, 20) @ vh)).numpy()
    assert np.abs(q.T @ q - np.eye(20)).max() <= 1e-14 * 20
    assert np.linalg.norm(q - u @ (u.T @ q)) <= 1e-15 * cond * 20 + 1e-13


def test_dependent_columns_come_out_as_zeros_and_the_rest_spans():
    rng = np.random.default_rng(2)
    block = rng.standard_normal((50, 3))
    q = orthonormalize(torch.from_numpy(np.hstack([block, block @ rng.standard_normal((3, 2))]))).numpy()
    assert np.linalg.matrix_rank(q, tol=1e-6) == 3
    assert np.linalg.norm(block - q @ (q.T @ block)) <= 1e-10


def test_what_trains_is_read_without_a_graph():
    """A gradient through one of the steps alone would be a wrong one."""
    block = torch.nn.Parameter(torch.eye(5, 3, dtype=torch.float64) + 0.1)
    assert not orthonormalize(block).requires_grad
    assert not top_eigenpairs(torch.nn.Parameter(torch.eye(40, dtype=torch.float64)), 2)[1].requires_grad
