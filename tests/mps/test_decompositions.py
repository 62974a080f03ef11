"""randomized_svd and factored_svd on Metal: the guarantees of the CPU, results where the data lie."""

import math

import numpy as np
import pytest
import torch
from spectra import SPECTRA, assert_decomposes, expected_range_error, with_values

from loraspan.errors import NotFiniteError
from loraspan.linalg import SVD, factored_svd, merged_svd, orthonormalize, randomized_svd
from loraspan.ops import RowBlocks, stream
from matrices import normal
from oracles import BF16, F16, F32, F64
from triplets import judge

CPU = torch.device("cpu")


@pytest.fixture(params=["lies there", "is sent there", "is sent in chunks"])
def decompose(request, mps, monkeypatch):
    """Decompose a matrix of the CPU on the device, and give where it lay and the result on the CPU."""
    if request.param == "is sent in chunks":
        monkeypatch.setattr(stream, "DEVICE_BYTES", 1 << 19)

    def run(x, *args, **options):
        if request.param == "lies there":
            found = randomized_svd(mps.put(x), *args, **options)
        else:
            found = randomized_svd(x, *args, device="mps", **options)
        home = mps.place if request.param == "lies there" else CPU
        assert (found.u.device, found.s.device, found.vh.device, found.discarded.device) == (home, home, home, CPU)
        return SVD(*(part.cpu() for part in found))

    return run


@pytest.mark.parametrize("past", [-4, 0, 5])
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("m", "n"), [(200, 120), (60, 900)])
def test_short_sides_are_exact(decompose, m, n, kind, past):
    x = with_values(m, n, SPECTRA[kind](min(m, n), 10), 1).to(F32)
    _, s, _, true = assert_decomposes(x, decompose(x, 10 + past), 10 + past, 0.0, F32)
    assert np.abs(s - true[: len(s)]).max() <= 1e-6 * true[0]


@pytest.mark.parametrize("kind", ["fast", "slow", "flat"])
@pytest.mark.parametrize(("m", "n", "power_iterations"), [(500, 420, 1), (420, 500, 0)])
def test_long_sides_are_within_the_bound_of_their_projection(decompose, mps, m, n, power_iterations, kind):
    """Without power iterations what is projected is far from orthogonal, and is made so there."""
    x = with_values(m, n, SPECTRA[kind](min(m, n), 10), 2).to(F32)
    found = decompose(x, 10, oversample=8, power_iterations=power_iterations, seed=4)
    true = np.linalg.svd(x.double().numpy(), compute_uv=False)
    # Markov: 5 times the expectation fails less than once in five, and the seed is fixed
    assert_decomposes(x, found, 10, 5 * expected_range_error(true, 10, 8, power_iterations), F32)
    assert "mm" in mps.rules.names


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_half_precision(decompose, dtype):
    x = with_values(90, 400, SPECTRA["slow"](90, 10), 3).to(dtype)
    assert_decomposes(x, decompose(x, 6), 6, 0.0, F32)


@pytest.mark.parametrize("shape", [(80, 300), (400, 500)])
def test_every_goal_gives_what_the_cpu_gives(decompose, shape):
    """To the accuracy of float32 sums: on spectra without gaps the vectors themselves are not determined."""
    x = normal(4, *shape, dtype=F32)
    for goal in ({"rank": 12}, {"energy": 0.4}, {"tolerance": 0.9}, {"rank": 5, "center": True}):
        here, there = randomized_svd(x, **goal), decompose(x, **goal)
        assert len(here.s) == len(there.s)
        assert float((here.s - there.s).abs().max()) <= 4e-6 * float(here.s[0])
        assert float(there.discarded) == pytest.approx(float(here.discarded), rel=1e-5)


def test_signs_are_settled_on_either_side(decompose):
    for shape in ((40, 300), (300, 40)):
        u = decompose(normal(5, *shape, dtype=F32), 7).u
        assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("goal", [{"rank": 4}, {"tolerance": 0.5}])
def test_batches(decompose, goal):
    x = normal(6, 5, 30, 200, dtype=F32)
    x[2] = 0
    here, there = randomized_svd(x, **goal), decompose(x, **goal)
    assert here.u.shape == there.u.shape
    assert here.rank.tolist() == there.rank.tolist()
    assert float((here.s - there.s).abs().max()) <= 4e-6 * float(here.s.max())
    whole = (there.u * there.s.unsqueeze(1)) @ there.vh
    assert float((whole - (here.u * here.s.unsqueeze(1)) @ here.vh).abs().max()) <= 1e-4


def test_lists_of_all_shapes(mps):
    x = [normal(i, *shape, dtype=F32) for i, shape in enumerate([(20, 300), (300, 20), (1, 5), (7, 7), (400, 450)])]
    blocks = RowBlocks([normal(9, 3, 100, dtype=F32), normal(10, 4, 100, dtype=F16)])
    sent = randomized_svd([*x, blocks], rank=3, device="mps")
    there = randomized_svd([mps.put(member) for member in x], rank=3)
    for here, one, other in zip(randomized_svd([*x, blocks], rank=3), sent, [*there, None], strict=True):
        assert float((here.s - one.s).abs().max()) <= 4e-6 * float(here.s[0])
        assert other is None or float((here.s - other.s.cpu()).abs().max()) <= 4e-6 * float(here.s[0])


def test_float64_is_the_cpus(mps):
    x = normal(7, 60, 500)
    here, there = randomized_svd(x, rank=5), randomized_svd(x, rank=5, device="mps")
    assert torch.equal(here.s, there.s)
    assert there.u.dtype == F64
    assert not mps.rules.calls


def test_what_float32_sums_do_not_tell_apart_is_summed_on_the_cpu(mps):
    """Six decades: the Gram needs float64, and only its vectors are formed on the device, from where it lies."""
    x = with_values(60, 800, torch.logspace(0, -6, 60, dtype=F64), 8).to(F32)
    found = randomized_svd(mps.put(x), rank=50)
    assert found.u.device == mps.place
    assert_decomposes(x, SVD(*(part.cpu() for part in found)), 50, 0.0, F32)


def test_not_finite_is_named(mps):
    x = torch.ones(4, 9)
    x[1, 2] = float("nan")
    for call in (lambda: randomized_svd(mps.put(x), rank=1), lambda: randomized_svd(x, rank=1, device="mps")):
        with pytest.raises(NotFiniteError, match="randomized_svd: x holds a NaN"):
            call()
    with pytest.raises(NotFiniteError, match="factored_svd: a holds a NaN"):
        factored_svd(mps.put(torch.ones(3, 4)), mps.put(x))


@pytest.mark.parametrize("form", ["one", "batch", "list", "merged"])
def test_products_are_the_cpus_and_come_back(mps, form):
    """All of it is float64; of factors that lie there, the triplets go back."""
    b, a = normal(11, 3, 40, 6, dtype=F32), normal(12, 3, 6, 50, dtype=F16)
    call = {
        "one": lambda b, a, **o: [factored_svd(b[0], a[0], scale=0.3, **o)],
        "batch": lambda b, a, **o: [SVD(*parts) for parts in zip(*factored_svd(b, a, scale=0.3, **o), strict=True)],
        "list": lambda b, a, **o: factored_svd(list(b), list(a), scale=0.3, **o),
        "merged": lambda b, a, **o: [merged_svd(list(b), list(a), [0.3] * 3, **o)],
    }[form]
    here, sent, there = call(b, a), call(b, a, device="mps"), call(mps.put(b), mps.put(a))
    for one, two, three in zip(here, sent, there, strict=True):
        assert {part.device for part in three[:3]} == {mps.place}
        for x, y, z in zip(one, two, three, strict=True):
            assert torch.equal(x, y)
            assert torch.equal(x, z.cpu())
    pairs = (list(b), list(a), [0.3] * 3) if form == "merged" else ([b[0]], [a[0]], [0.3])
    judge(SVD(*(part.cpu() for part in there[0])), *pairs)
    assert "mm" not in mps.rules.names


def test_small_blocks_stay_on_the_cpu(mps):
    q = orthonormalize(normal(13, 50, 4))
    assert math.isclose(float((q.T @ q).trace()), 4, rel_tol=1e-12)
    assert not mps.rules.calls
