"""IncrementalSVD on Metal: rows held and combined there, Grams and the mean on the CPU, the numbers of the CPU."""

import pytest
import torch

import streams
from loraspan.errors import ArgumentError, FormatError, NotFiniteError, ShapeError
from loraspan.linalg import IncrementalSVD
from matrices import normal
from oracles import BF16, F16, F32, F64, to_numpy

OPTIONS = [{}, {"center": True}, {"forget": 0.97}, {"center": True, "forget": 0.97}]
ROWS, COLUMNS, RANK = 300, 120, 5


def rows(dtype=F32):
    basis = normal(1, RANK + 4, COLUMNS)
    return (normal(2, ROWS, RANK + 4) @ basis + 0.1 * normal(3, ROWS, COLUMNS) + 2).to(dtype)


@pytest.fixture(params=["lie there", "are sent there"])
def follow(request, mps):
    """Follow rows on the device, by blocks of 70."""

    def run(x, **options):
        device = None if request.param == "lie there" else "mps"
        svd = IncrementalSVD(RANK, device=device, **options)
        for block in x.split(70):
            svd.update(mps.put(block) if device is None else block)
        return svd

    run.send = mps.put if request.param == "lie there" else lambda x: x
    return run


def here(x, **options):
    svd = IncrementalSVD(RANK, **options)
    svd.update(x)
    return svd


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_is_what_the_cpu_finds(follow, mps, options, dtype):
    x = rows(dtype)
    svd, twin = follow(x, **options), here(x, **options)
    assert svd.basis.device == mps.place
    exact = streams.weighted(to_numpy(x), options.get("forget", 1.0), options.get("center", False))
    energy = (exact**2).sum()
    # each compression rounds the rows it holds by some units of float32; there are three
    assert float((svd.s - twin.s).abs().max()) <= 1e-6 * float(twin.s[0])
    outside = streams.energy_outside(exact, to_numpy(svd.basis.cpu()))
    assert outside <= svd.discarded + 1e-6 * energy
    assert svd.discarded == pytest.approx(twin.discarded, abs=1e-6 * energy)
    if svd.center:
        assert svd.mean.device.type == "cpu"
        assert torch.allclose(svd.mean, twin.mean, atol=1e-6)
    assert "mm" in mps.rules.names


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loadings_lie_where_their_rows_do(follow, options):
    x = rows()
    svd, twin = follow(x, **options), here(x, **options)
    given = follow.send(x[:9])
    loadings = svd.transform(given)
    assert (loadings.device, loadings.dtype) == (given.device, F32)
    size = float(twin.transform(x[:9]).abs().max())
    assert float((loadings.cpu() - twin.transform(x[:9])).abs().max()) <= 1e-4 * size
    matrix, error = svd.rotation(svd.basis)
    assert torch.allclose(matrix, torch.eye(RANK, dtype=F64), atol=1e-6)
    assert error <= 1e-6


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_states_merge_and_go_on(follow, options):
    x = rows()
    one, two = follow(x[:160], **options), follow(x[160:], **options)
    one.merge(two)
    twin, other = here(x[:160], **options), here(x[160:], **options)
    twin.merge(other)
    assert float((one.s - twin.s).abs().max()) <= 1e-6 * float(twin.s[0])
    again = IncrementalSVD(RANK, device=one.device, **options)
    again.load_state_dict(one.state_dict())
    assert torch.equal(again.s, one.s)
    assert torch.equal(again.basis.cpu(), one.basis.cpu())
    again.update(follow.send(x[:3]))
    assert again.seen == ROWS + 3


def test_a_state_moves_between_devices(mps):
    x = rows()
    svd = here(x, center=True)
    there = IncrementalSVD(RANK, center=True, device="mps")
    there.load_state_dict(svd.state_dict())
    assert there.basis.device == mps.place
    assert torch.allclose(there.s, svd.s, rtol=1e-6)
    back = IncrementalSVD(RANK, center=True, device="cpu")
    back.load_state_dict(there.state_dict())
    assert torch.equal(back.s, svd.s)


def test_what_cannot_be_held_is_refused(mps):
    svd = IncrementalSVD(2, device="mps")
    with pytest.raises(ArgumentError, match=r"IncrementalSVD.update: float64 rows are held in float64, which device"):
        svd.update(normal(4, 3, 5))
    assert svd.seen == 0
    double = IncrementalSVD(2)
    double.update(normal(4, 3, 5))
    with pytest.raises(ArgumentError, match=r"IncrementalSVD.load_state_dict: float64 rows"):
        svd.load_state_dict(double.state_dict())
    assert svd.seen == 0
    svd.update(torch.ones(2, 5))
    svd.update(normal(5, 2, 5))  # later ones are rounded
    bad = torch.ones(2, 5)
    bad[1, 3] = float("nan")
    for given in (bad, mps.put(bad)):
        with pytest.raises(NotFiniteError, match="row 1 of 2 has a NaN"):
            svd.update(given)
    plain = IncrementalSVD(2)
    plain.update(torch.ones(2, 5))
    with pytest.raises(ShapeError, match="rows so far are on cpu; got rows on mps:0"):
        plain.update(mps.put(bad))
    broken = svd.state_dict() | {"rows": bad.new_full((2, 5), float("nan"))}
    with pytest.raises((NotFiniteError, FormatError)):
        IncrementalSVD(2, device="mps").load_state_dict(broken)
    assert svd.seen == 4
