"""``device=`` of compress and linalg: the answers of the CPU, where they lie, what runs where; refusals.

On a machine with a GPU the GPU is used; elsewhere shadows stand in for it (tests/shadow.py, tests/lazy_cuda.py).
"""

import importlib

import numpy as np
import planted
import pytest
import torch
from click.testing import CliRunner

import lazy_cuda
import loraspan
import oracles
from lazy_cuda import REAL
from loraspan import _core, _device
from loraspan.cli import main
from loraspan.collection import fit as fitting
from loraspan.errors import ArgumentError, BackendError
from loraspan.linalg import IncrementalSVD, factored_svd, merged_svd, randomized_svd
from loraspan.ops import RowBlocks
from loraspan.ops.places import find_device
from matrices import normal
from oracles import F32

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch):
    with lazy_cuda.cuda(monkeypatch) as found:
        yield found


@pytest.mark.usefixtures("cuda")
def test_compress_sends_factors_and_keeps_the_collection_here():
    for case in ({}, {"shared_out": 0}, {"count": 40, "ranks": (7, 8), "shape": (150, 170), "slots": 1}):
        adapters = planted.adapters(**case)
        for goal in ({"rank": 6}, {"max_error": 0.01}):
            here, there = loraspan.compress(adapters, **goal), loraspan.compress(adapters, device="cuda", **goal)
            for name, error in here.errors.items():
                assert there.errors[name] == pytest.approx(error, rel=1e-3, abs=1e-6)
            held = [t for c in there.collection.segments[0].columns.values() for t in c.tensors().values()]
            held += [t for slot in there.collection.slots.values() for t in (slot.u, slot.v)]
            assert {t.device for t in held} == {CPU}


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("device", [None, "cuda"])
def test_bases_are_turned_where_the_rounding_of_sums_is_known(monkeypatch, device):
    """By the compiled kernels alone: what else sums in float32 has not been asked by how much it may be off."""
    made, make_basis = [], fitting.make_basis
    monkeypatch.setattr(fitting, "make_basis", lambda *args: made.append(args) or make_basis(*args))
    loraspan.compress(
        planted.adapters(count=240, shape=(72, 96), ranks=(4,), slots=1, noise=0.3), rank=6, device=device
    )
    assert len(made) == (0 if device is None else 2)


@pytest.mark.parametrize("shape", [(40, 700), (700, 40), (400, 450)])
def test_randomized_svd_there_and_from_there(cuda, shape):
    x = normal(4, *shape, dtype=F32)
    here, sent, there = randomized_svd(x, 9), randomized_svd(x, 9, device="cuda"), randomized_svd(cuda.put(x), 9)
    assert {part.device for part in sent} == {CPU}
    assert {part.device for part in there[:3]} == {cuda.place}
    for found in (sent, there):
        assert float((found.s.cpu() - here.s).abs().max()) <= 4e-6 * float(here.s[0])
        assert float(found.discarded) == pytest.approx(float(here.discarded), rel=1e-5)


def test_from_a_device_to_the_cpu(cuda):
    x = normal(5, 30, 600)
    found = randomized_svd(cuda.put(x), 4, device="cpu")
    assert found.u.device == cuda.place
    assert torch.allclose(found.s.cpu(), randomized_svd(x, 4).s, rtol=1e-12)


@pytest.mark.parametrize("size", [(40, 6, 50), (5, 9, 70)], ids=["low-rank", "formed"])
@pytest.mark.parametrize("condition", [1.0, 1e9])
@pytest.mark.usefixtures("cuda")
def test_products_there(size, condition):
    """Ill-conditioned sides are read again: that is sent too."""
    n, r, d = size
    scale = torch.from_numpy(np.geomspace(1, condition, r))
    b, a = normal(6, 3, n, r) * scale, normal(7, 3, r, d) / scale[:, None]
    for here, there in (
        (factored_svd(b, a), factored_svd(b, a, device="cuda")),
        (factored_svd(list(b), list(a))[1], factored_svd(list(b), list(a), device="cuda")[1]),
        (merged_svd(list(b), list(a)), merged_svd(list(b), list(a), device="cuda")),
    ):
        assert {part.device for part in there} == {CPU}
        # both are right to the rounding of a product whose factors are this large
        floor = 8 * 3 * r * 2.0**-53 * float((b.norm(dim=-2) * a.norm(dim=-1)).sum())
        assert float((here.s - there.s).abs().max()) <= 4 * floor + 1e-12 * float(here.s.max())


@pytest.mark.parametrize("center", [True, False])
def test_a_stream_is_held_there(cuda, center):
    x = normal(8, 300, 60, dtype=F32)
    here, there = IncrementalSVD(4, center=center), IncrementalSVD(4, center=center, device="cuda")
    here.update(x)
    for piece in x.split(33):
        there.update(piece)
    assert there.basis.device == cuda.place
    assert torch.allclose(there.s, here.s, rtol=1e-5)
    assert torch.allclose(there.transform(x[:3]), here.transform(x[:3]), atol=1e-3)


@pytest.mark.skipif(REAL, reason="on a GPU its kernels are tested")
@pytest.mark.usefixtures("cuda")
def test_a_backend_of_the_device_leaves_small_problems_to_the_cpu(monkeypatch):
    """Named, it takes the large products and is asked for no other."""
    asked = []

    def find(name, operator, verb, _form):
        references = importlib.import_module(f"loraspan.ops.{ {'power': 'sketch'}.get(operator, operator) }")
        if verb == "refuses":
            return lambda *_: None
        asked.append((name, operator))
        return {"power": references.__dict__.get("reference_power")}.get(operator) or references.reference

    monkeypatch.setattr(_device, "_find", find)
    for x in (normal(9, 40, 300, dtype=F32), normal(10, 300, 400, dtype=F32)):
        found = randomized_svd(x, 5, device="cuda", backend="triton")
        assert float((found.s - randomized_svd(x, 5).s).abs().max()) <= 4e-6 * float(found.s[0])
    assert set(asked) == {("triton", op) for op in ("gram", "combine", "sketch", "power", "reconstruct")}
    factored_svd(normal(11, 30, 4), normal(12, 4, 50), device="cuda", backend="triton")
    with pytest.raises(BackendError, match="reads CPU memory, and the blocks are on cuda:0"):
        randomized_svd(normal(9, 40, 300), 5, device="cuda", backend="cpu")


@pytest.mark.skipif(REAL, reason="on a GPU its kernels are tested")
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("goal", [{"rank": 6}, {"max_error": 0.01}], ids=str)
def test_nothing_as_long_as_a_factor_is_multiplied_here(monkeypatch, goal):
    n, d = 211, 307

    def watched(name):
        honest = getattr(_core, name)

        def call(table, *rest):
            jobs = rest[0] if name != "reconstruct" else table
            if name == "gram" and (jobs[:, 1] == 1).all() and table[:, 1].max() <= 16:
                # of one factor at a time, before the fit: few rows, which are multiplied sooner than sent
                return honest(table, *rest)
            assert not {n, d} & set(jobs[:, -3:].flatten().tolist() if name == "reconstruct" else jobs[:, 2].tolist())
            return honest(table, *rest)

        return call

    for name in ("gram", "combine", "sketch", "power", "reconstruct"):
        monkeypatch.setattr(_core, name, watched(name))
    loraspan.compress(planted.adapters(shape=(n, d), count=5), device="cuda", **goal)
    # columns that nearly depend on each other are read in several passes
    b, a = normal(14, 2, n, 1) + 1e-6 * normal(15, 2, n, 4), normal(16, 2, 4, d)
    factored_svd(b, a, device="cuda")


CALLS = {
    "compress": lambda device: loraspan.compress(["/nowhere/at/all"], rank=2, device=device),
    "randomized_svd": lambda device: randomized_svd(torch.full((2, 2), float("nan")), 1, device=device),
    "factored_svd": lambda device: factored_svd(torch.full((2, 2), float("nan")), torch.ones(2, 2), device=device),
    "merged_svd": lambda device: merged_svd([torch.full((2, 2), float("nan"))], [torch.ones(2, 2)], device=device),
    "IncrementalSVD": lambda device: IncrementalSVD(2, device=device),
}


@pytest.mark.parametrize("caller", CALLS)
@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:x", 1.5, ""])
def test_an_unknown_device_is_refused_before_anything_is_read(caller, device):
    with pytest.raises(ArgumentError, match=rf"^{caller}: device is None, 'cpu', 'cuda', 'cuda:N' or 'mps'; got "):
        CALLS[caller](device)


@pytest.mark.parametrize("caller", CALLS)
def test_an_absent_device_is_refused_before_anything_is_read(caller, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "cuda:0", "mps", torch.device("cuda")):
        with pytest.raises(ArgumentError, match=rf"^{caller}: device '{device}' cannot be used: .* finds none here"):
            CALLS[caller](device)


def test_a_device_beyond_those_there_are_is_refused(cuda):
    with pytest.raises(ArgumentError, match=r"^x: device 'cuda:99' cannot be used: found \d"):
        find_device("x", "cuda:99")
    assert find_device("x", "cuda") == cuda.place
    assert find_device("x", "cpu:0") == CPU


def test_the_command_line_says_it_in_a_line():
    done = CliRunner().invoke(main, ["compress", "/nowhere", "-o", "/nowhere/out", "--device", "abacus"])
    assert done.exit_code == 1
    assert "compress: device is None, 'cpu', 'cuda', 'cuda:N' or 'mps'; got 'abacus'" in done.output


def test_none_and_the_cpu_are_one():
    adapters = planted.adapters()
    one, other = (loraspan.compress(adapters, rank=4, device=device) for device in (None, "cpu"))
    assert one.errors == other.errors
    x = normal(13, 30, 400, dtype=F32)
    for a, b in zip(randomized_svd(x, 3), randomized_svd(x, 3, device="cpu"), strict=True):
        assert oracles.same_bits(a.flatten(), b.flatten())
    assert RowBlocks([x]).on(CPU).plain
