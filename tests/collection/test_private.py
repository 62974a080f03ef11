"""Private columns: as many as the budget asks for, rounding of what is stored included."""

from __future__ import annotations

import numpy as np
import planted
import pytest
import torch

from loraspan.collection.factors import read_factors
from loraspan.collection.formed import make_frame
from loraspan.collection.private import Residual, columns_within, private_columns


def whole_residual(adapters):
    """Everything a slot's tasks have, as a residual; and their singular values."""
    slot = read_factors(adapters)[0]
    canonical = slot.canonical()
    none = canonical.x.new_zeros(len(slot.members), canonical.x.shape[2], 0)
    sides = [
        make_frame(vectors, transform, gram, [torch.empty(0, length)] * vectors.count, none, none.new_zeros(0, 0))
        for vectors, transform, gram, length in (
            (slot.up, canonical.x, slot.gram_up, slot.shape[0]),
            (slot.down, canonical.y, slot.gram_down, slot.shape[1]),
        )
    ]
    return Residual(*sides, torch.diag_embed((canonical.s > 0).double())), canonical.s


@pytest.mark.parametrize(("dtype", "more"), [(torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 1)], ids=str)
def test_what_remains_is_measured_and_within_the_budget(dtype, more):
    adapters = planted.adapters(count=4, slots=1, ranks=(5,), noise=0.5)
    residual, s = whole_residual(adapters)
    # the tail behind two columns and 1e-12 of it: rounding those two to half precision goes past it, to float32 not
    allowed = s[:, 2:].square().sum(-1) * (1 + 1e-12)
    part, remains = private_columns(residual, allowed, dtype)
    counts = part.counts.tolist()
    assert columns_within(s, allowed).tolist() == [2] * 4
    assert counts == [2 + more] * 4
    assert (remains <= allowed).all()
    starts = np.cumsum([0, *counts])
    for i, adapter in enumerate(adapters):
        at = slice(starts[i], starts[i + 1])
        left, right = part.left[at].double().numpy(), part.right[at].double().numpy()
        stored = (left.T * part.weights[at].float().double().numpy()) @ right
        truth = np.square(planted.delta(adapter.slots["layers.0.q_proj"]) - stored).sum()
        assert float(remains[i]) == pytest.approx(truth, rel=1e-6)
