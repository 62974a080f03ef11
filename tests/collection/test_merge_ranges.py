"""Merged summaries hold what a decomposition of all rows at once holds, and what they lack is what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loraspan.collection.merge_ranges import Summary, basis_of, merge, summarize
from loraspan.collection.stack import Stack
from loraspan.collection.vectors import FactorRows

COLUMNS = 70


def rows(count, shared=20, noise=0.02, seed=0, decay=0.85):
    """Rows in a few planted directions of decaying size, and noise in all."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((COLUMNS, shared)))[0] * decay ** np.arange(shared)
    made = rng.standard_normal((count, shared)) @ directions.T + noise * rng.standard_normal((count, COLUMNS))
    return torch.from_numpy(made)


def of(block, width, precision="f64"):
    """The summary of rows given as factors of three, each group of three with a mixing of its own."""
    rng = np.random.default_rng(len(block))
    factors, weights = [], []
    for at in range(0, len(block), 3):
        part = block[at : at + 3]
        mixing = torch.from_numpy(rng.standard_normal((len(part), len(part))) + 2 * np.eye(len(part)))
        factors.append(torch.linalg.solve(mixing, part))
        weights.append(torch.nn.functional.pad(mixing, (0, 3 - len(part), 0, 3 - len(part))))
    total = float(block.square().sum())
    return summarize(Stack(FactorRows(factors, 3), torch.stack(weights)), width, total, precision=precision, seed=3)


def held(summary, z, rank):
    """The energy of ``z`` in the leading directions of a summary, computed from the stored basis by definition."""
    turn = torch.eye(len(summary.energies), rank, dtype=torch.float64)
    v = np.linalg.qr(basis_of(summary, turn, torch.float32).v.double().numpy())[0]
    return np.square(z.numpy() @ v).sum()


def best(z, rank):
    return np.square(np.linalg.svd(z.numpy(), compute_uv=False)[:rank]).sum()


@pytest.mark.parametrize("sizes", [[200], [67, 66, 67], [7] * 28 + [4], [190, 1, 9]], ids=str)
@pytest.mark.parametrize(("width", "rank"), [(40, 20), (40, 8), (24, 20)])
def test_merged_directions_hold_what_all_at_once_hold(sizes, width, rank):
    z = rows(200)
    merged = merge([of(part, width) for part in z.split(sizes)], width, precision="f64")
    assert best(z, rank) - held(merged, z, rank) <= merged.discarded + 1e-6 * merged.total
    # past twice the rank lies only noise here, and it hides nothing
    if width == 2 * rank:
        assert held(merged, z, rank) >= (1 - 1e-6) * best(z, rank)


@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_what_is_held_and_what_is_discarded_is_all(precision):
    z = rows(120)
    merged = merge([of(part, 16, precision) for part in z.split(40)], 16, precision=precision)
    total = float(z.square().sum())
    assert merged.total == pytest.approx(total, rel=1e-12)
    assert merged.discarded == pytest.approx(total - float(merged.energies.sum()), rel=1e-9)
    # Y^T Y <= Z^T Z: the rows' own energy is never more than what their directions hold of all rows;
    # float32 rows are rounded by 2^-24 of their size
    for rank in (1, 4, 16):
        assert float(merged.energies[:rank].sum()) <= held(merged, z, rank) * (1 + 1e-6)
    assert torch.allclose(merged.rows.double().square().sum(1), merged.energies, rtol=1e-6)
    gram = merged.rows.double() @ merged.rows.double().T
    assert (gram - torch.diag(gram.diagonal())).abs().max() <= 1e-5 * gram.diagonal().max()


def test_any_grouping_of_merges_gives_the_same_within_what_is_discarded():
    z = rows(240, shared=40, noise=0.2, decay=0.95)
    parts = [of(part, 24) for part in z.split(30)]
    at_once = merge(parts, 24, precision="f64")
    in_turn = parts[0]
    for part in parts[1:]:
        in_turn = merge([in_turn, part], 24, precision="f64")
    halves = merge([merge(parts[:4], 24, precision="f64"), merge(parts[4:], 24, precision="f64")], 24, precision="f64")
    assert at_once.total == pytest.approx(in_turn.total, rel=1e-12)
    for one in (in_turn, halves):
        worst = max(at_once.discarded, one.discarded)
        assert abs(held(one, z, 12) - held(at_once, z, 12)) <= worst
        # and much nearer in truth: what is cut off lies past twice the rank
        assert held(one, z, 12) == pytest.approx(held(at_once, z, 12), rel=2e-3)


def test_a_part_without_energy_changes_nothing():
    z = rows(30)
    nothing = Summary(torch.empty(0, COLUMNS), torch.empty(0, dtype=torch.float64), 0.0)
    one = of(z, 12)
    both = merge([nothing, one], 12, precision="f64")
    assert torch.allclose(both.energies, one.energies, rtol=1e-6)
    assert merge([nothing, nothing], 12, precision="f64").total == 0


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2), (torch.float16, 2e-3)])
def test_bases_are_orthonormal_as_stored(dtype, bound):
    merged = merge([of(part, 32) for part in rows(90).split(45)], 32, precision="f32")
    turn = torch.linalg.qr(torch.randn(32, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    v = basis_of(merged, turn, dtype).v
    assert v.dtype == dtype
    assert v.shape == (COLUMNS, 10)
    assert (v.double().T @ v.double() - torch.eye(10)).abs().max() <= bound
