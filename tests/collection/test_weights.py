"""Weights beside coded ends: rounded as far as an error allows, and back from few bits exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loraspan.collection import coding, weights
from loraspan.collection.columns import Columns
from loraspan.errors import FormatError

NONE = [torch.empty(0)] * 4


def columns(each, values):
    """Columns of two private ends, so many of each task."""
    counts = np.zeros((len(each), 4), dtype=np.int64)
    counts[:, 3] = each
    values = torch.as_tensor(values, dtype=torch.float32)
    return Columns(np.arange(len(each)), counts, np.zeros(len(each), dtype=np.bool_), values, *NONE)


def falling(seed, tasks=40, slots=3):
    rng = np.random.default_rng(seed)
    for _ in range(slots):
        each = rng.integers(0, 9, tasks)
        fall = np.exp(-np.cumsum(rng.exponential(0.3, each.sum() + 1)[1:]).clip(0, 20))
        yield each, fall * 10.0 ** rng.integers(-3, 3)


@given(seed=st.integers(0, 2**32 - 1), error=st.floats(0.005, 0.9))
def test_weights_come_back(seed, error):
    """To the bit, of tasks without a column too, whatever the rounding left."""
    made = {}
    for slot, (each, values) in enumerate(falling(seed)):
        task = torch.from_numpy(values)[None]
        rounded = weights.rounded(task, error**2 * task.square().sum(-1), 200)[0]
        if len(values):
            made[str(slot)] = columns(each, rounded)
    falls = [weights.falls_of(each) for each in made.values()]
    if None in falls or not falls:
        return
    back = weights.decode(weights.encode(falls), {slot: each.counts for slot, each in made.items()})
    assert all(torch.equal(back[slot], each.weights) for slot, each in made.items())


@pytest.mark.parametrize("error", [0.5, 0.18, 0.01, 1e-4])
def test_rounding_takes_a_share_of_the_error(error):
    """At most a 100th of it beside ends of 200 numbers, and more than that with a bit less; less beside longer ones."""
    values = torch.rand(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp2() * 3.0
    allowed = error**2 * values.square().sum(-1)
    rounded = weights.rounded(values, allowed, 200)
    lost = (rounded - values).square().sum(-1)
    assert 0.01 / 8 < float((lost / allowed).mean()) < 0.01
    longer = weights.rounded(values, allowed, 200 * 4**2)
    assert float((longer - values).abs().max()) <= float((rounded - values).abs().max()) / 3
    # one task that may lose little decides for all
    finer = weights.rounded(values, torch.cat([allowed[:1] / 4**3, allowed[1:]]), 200)
    assert float((finer - values).abs().max()) <= float((rounded - values).abs().max()) / 6
    assert torch.equal(weights.rounded(values, 0 * allowed, 200), values.float().double())
    assert weights.rounded(values[:, :0], allowed, 200).shape == (50, 0)


def test_few_bits_a_weight():
    """In the place of sixteen: of weights that fall as those of adapters do, in 4 bits behind the first."""
    each = [7] * 100
    fall = np.random.default_rng(0).exponential(0.3, (100, 7))
    values = torch.from_numpy(10 * np.exp(-np.cumsum(fall, axis=1)))
    slot = columns(each, weights.rounded(values, 0.18**2 * values.square().sum(-1), 200).flatten())
    assert 8 * len(weights.encode([weights.falls_of(slot)])) < 5.5 * 700


ODD = {
    "negative": [1.0, -0.5],
    "minus nought": [1.0, -0.0],
    "infinite": [float("inf"), 1.0],
    "none": [float("nan"), 1.0],
    "of all bits": [1.0, 0.7],
    "nothing": [],
}


@pytest.mark.parametrize("values", ODD.values(), ids=ODD)
def test_weights_that_stay_as_they_are(values):
    assert weights.falls_of(columns([len(values)], values)) is None


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 0.0], [2.0**-126, 2.0**-149 * 2**22], [1.5e38, 1e38]])
def test_weights_at_the_ends(values):
    """Nought, numbers below what is normal, and the largest."""
    slot = columns([1, 1], weights.rounded(torch.tensor([values], dtype=torch.float64), torch.tensor([1e76]), 200)[0])
    falls = weights.falls_of(slot)
    back = weights.decode(weights.encode([falls]), {"x": slot.counts})
    assert torch.equal(back["x"], slot.weights)


HOSTILE = {
    "more bits than float32 has": weights.Falls((24, 0, 0), np.array([0, 0])),
    "fewer than none": weights.Falls((-1, 0, 0), np.array([0, 0])),
    "an exponent past the last": weights.Falls((4, 128, 0), np.array([0, 0])),
    "below nought": weights.Falls((4, -127, 5), np.array([0, 0])),
    "infinite": weights.Falls((0, 127, 0), np.array([1, 0])),
}


@pytest.mark.parametrize("made", HOSTILE.values(), ids=HOSTILE)
def test_streams_of_no_weights_are_refused(made):
    counts = np.array([[0, 0, 0, 2]])
    with pytest.raises(FormatError, match="needs weights"):
        weights.decode(weights.encode([made]), {"x": counts})
    # and no stream holds more than its bytes can
    with pytest.raises(FormatError, match=f"a byte for {coding.MOST} numbers"):
        weights.decode(weights.encode([made]), {"x": counts * 10**9})
