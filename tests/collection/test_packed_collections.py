"""Collections in 8 and 4 bits: what is reported is what is stored, through every step of their life."""

from __future__ import annotations

import itertools

import numpy as np
import planted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loraspan
from loraspan import store
from loraspan.collection import one_sided, private
from loraspan.collection.fit import Goal, fit
from loraspan.collection.rebuild import rebuild
from loraspan.collection.refit import refit
from loraspan.collection.rows import CODED, Packed, Widths, flip_rows, rounding_of, row_bytes, store_rows, values_of
from loraspan.collection.update import add, remove
from loraspan.errors import ArgumentError, FormatError

SHAPE = (90, 130)
CASES = {
    "shared": {},
    "input": {"shared_out": 0},
    "output": {"shared_in": 0},
    "none": {"shared_out": 0, "shared_in": 0},
}


def measured(adapter, collection):
    """The error of what comes back, in float64."""
    back = rebuild(collection, adapter.name)
    return planted.relative_error(adapter, lambda path: planted.delta(back.slots[path]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bits", [8, 4, CODED])
def test_the_reported_error_is_that_of_what_comes_back(case, bits):
    """To float32's rounding of the factors that come back, over a life with additions, removals and a refit."""
    adapters = planted.adapters(count=9, shape=SHAPE, **CASES[case])
    held = remove(add(fit(adapters[:6], Goal(max_error=0.3, dtype=bits)), adapters[6:], max_error=0.3), ["task 1"])
    for adapter in adapters[:1] + adapters[2:]:
        error = held.task(adapter.name).error
        assert error == pytest.approx(measured(adapter, held), abs=1e-6)
        assert error <= 0.3 * (1 + 1e-9)
    later = refit(held, max_forgetting=0.25)
    for adapter in adapters[:1] + adapters[2:]:
        assert measured(adapter, later) <= later.task(adapter.name).error + 1e-6
        assert later.task(adapter.name).forgotten <= 0.25


@pytest.mark.parametrize("goal", [{"rank": 6}, {"energy": 0.99}], ids=str)
def test_shared_bases_alone_may_be_packed(goal):
    adapters = planted.adapters(count=6, shape=SHAPE)
    held = fit(adapters, Goal(**goal, dtype=8))
    assert all(isinstance(side, Packed) for space in held.slots.values() for side in (space.u, space.v))
    for adapter in adapters:
        assert held.task(adapter.name).error == pytest.approx(measured(adapter, held), abs=1e-6)
    again = refit(held, rank=4)
    assert all(isinstance(side, Packed) for space in again.slots.values() for side in (space.u, space.v))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_store_keeps_the_packed_bytes(tmp_path, bits):
    """Files hold the codes, not floats; what is opened is mapped from them, bit for bit; verify finds nothing."""
    adapters = planted.adapters(count=6, shape=SHAPE, ranks=(8,))
    space = loraspan.compress(adapters, max_error=0.3, dtype=f"int{bits}")
    space.save(tmp_path / "a")
    opened = loraspan.open(tmp_path / "a")
    assert store.verify(tmp_path / "a") == []
    assert opened.collection.bits == (bits, bits, bits)
    for mine, theirs in zip(space.collection.segments, opened.collection.segments, strict=True):
        for path, columns in mine.columns.items():
            for name, rows in columns.tensors().items():
                assert torch.equal(values_of(rows), values_of(theirs.columns[path].tensors()[name]))
    on_disk = sum(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors"))
    wide = loraspan.compress(adapters, max_error=0.3, dtype=torch.float32)
    wide.save(tmp_path / "b")
    assert on_disk < sum(path.stat().st_size for path in (tmp_path / "b").glob("*.safetensors")) / 2


def test_packed_rows_that_do_not_fit_are_refused(tmp_path):
    from store.samples import edit_tensors

    space = loraspan.compress(planted.adapters(count=4, shape=SHAPE), rank=4, dtype="int8")
    space.save(tmp_path / "a")
    path = "layers.0.q_proj"

    def shorten(tensors):
        tensors[f"u.{path}"] = tensors[f"u.{path}"][:, :-1].contiguous()

    def scales_alone(tensors):
        del tensors[f"u_scales.{path}"]

    for spoil in (shorten, scales_alone):
        space.save(tmp_path / spoil.__name__)
        edit_tensors(tmp_path / spoil.__name__, "basis", spoil)
        with pytest.raises(FormatError, match=f"u.*{path}"):
            store.open(tmp_path / spoil.__name__)
        assert store.verify(tmp_path / spoil.__name__)


def test_a_scale_that_is_not_finite_is_found(tmp_path):
    from store.samples import edit_tensors

    loraspan.compress(planted.adapters(count=4, shape=SHAPE), rank=4, dtype="int4").save(tmp_path / "a")
    name = "left_loadings_scales.layers.0.q_proj"
    edit_tensors(tmp_path / "a", "tasks", lambda tensors: tensors[name][0].fill_(float("nan")))
    (found,) = store.verify(tmp_path / "a")
    assert "has to be finite" in found.problem


@settings(max_examples=30)
@given(length=st.integers(1, 200), rows=st.integers(0, 5), bits=st.sampled_from([4, 8]), seed=st.integers(0, 2**32 - 1))
def test_rows_take_what_is_said_and_lose_about_what_is_expected(length, rows, bits, seed):
    held = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))
    stored = store_rows(held, bits)
    assert sum(t.nbytes for t in (stored.codes, stored.scales)) == rows * row_bytes(length, bits)
    lost = float((values_of(stored) - held).square().sum()) if rows else 0.0
    # blocks of few entries scatter: three times what is expected of many
    assert lost <= 3 * rounding_of(bits) * float(held.square().sum())


@pytest.mark.parametrize("width", [torch.float16, 8, 4], ids=str)
def test_a_sign_is_turned_exactly(width):
    held = store_rows(torch.randn(3, 130, generator=torch.Generator().manual_seed(0)), width)
    turned = values_of(flip_rows(held, torch.tensor([1, -1, -1])))
    assert torch.equal(turned, values_of(held) * torch.tensor([[1.0], [-1.0], [-1.0]]))


@pytest.mark.parametrize("case", ["input", "output", "none", "shared"])
@pytest.mark.parametrize("width", [torch.float32, 8], ids=str)
def test_a_weight_that_would_be_negative_turns_an_end(monkeypatch, case, width):
    """Every other set of private ends comes the other way round: weights stay positive, and nothing else changes."""
    honest, calls = private.stored_ends, itertools.count()

    def turned(*args):
        ends, seen, inner = honest(*args)
        if next(calls) % 2:
            return ends, seen, inner
        return flip_rows(ends, torch.full((ends.shape[0],), -1)), -seen, inner

    monkeypatch.setattr(private, "stored_ends", turned)
    monkeypatch.setattr(one_sided, "stored_ends", turned)
    adapters = planted.adapters(count=5, shape=SHAPE, noise=0.1, **CASES[case])
    held = fit(adapters, Goal(max_error=0.05, dtype=width))
    for columns in held.segments[0].columns.values():
        assert (columns.weights >= 0).all()
        assert columns.counts[:, 1:].any()
    for adapter in adapters:
        assert held.task(adapter.name).error == pytest.approx(measured(adapter, held), abs=1e-6)
    assert next(calls)


def test_names_of_widths():
    assert str(Widths.of(4)) == "int4"
    assert str(Widths.of(CODED)) == "coded"
    assert Widths.from_bits(torch.float32, Widths.of(CODED).bits) == Widths.of(CODED)
    assert str(Widths(torch.float32, 8, 8, 4)) == "int8 bases, int8 loadings, int4 private ends"
    with pytest.raises(ArgumentError, match=r"dtype is float32, bfloat16, float16, int8, 'int4'.* or 'coded'"):
        loraspan.compress(planted.adapters(count=2), rank=2, dtype=torch.int16)


def test_removing_from_packed_columns_keeps_the_others_bits():
    adapters = planted.adapters(count=5, shape=SHAPE, shared_out=0, shared_in=0)
    held = fit(adapters, Goal(max_error=0.3, dtype=4))
    from loraspan.collection.segments import merge

    kept = merge(remove(held, ["task 2"]).segments)
    path = "layers.0.q_proj"
    before, after = held.segments[0].columns[path], kept.columns[path]
    for old, new in ((0, 0), (1, 1), (3, 2), (4, 3)):
        for name, rows in before.of_row(old).items():
            assert np.array_equal(values_of(rows).numpy(), values_of(after.of_row(new)[name]).numpy())
