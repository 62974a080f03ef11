"""PEFT saves adapters, a collection keeps them, PEFT loads what comes back: the outputs are those of the original."""

import pytest
import torch

import loraspan
import oracles
from adapters import models
from adapters.test_peft_models import CASES


@pytest.mark.parametrize("case", CASES)
def test_outputs_survive_a_collection(case, tmp_path):
    name, config = CASES[case]
    error = 1e-6
    expected = {
        seed: models.save_adapter(name, tmp_path / "in" / f"task {seed}", seed=seed, **config) for seed in (5, 6)
    }

    loraspan.compress(tmp_path / "in", max_error=error).save(tmp_path / "team.span")
    space = loraspan.open(tmp_path / "team.span")
    assert max(space.errors.values()) <= error

    base = models.outputs(models.build(name))
    for seed, before in expected.items():
        space.export(f"task {seed}", tmp_path / "out" / str(seed))
        after = models.load_outputs(name, tmp_path / "out" / str(seed))
        effect = (before - base).norm()
        assert effect > 0.05 * base.norm(), "the adapter has to matter, or nothing is tested"
        # a few layers pass the error of dW on; two float32 runs differ by about a hundred roundings
        slack = 12 * error * effect + 100 * oracles.UNIT_ROUNDOFF[torch.float32] * before.norm()
        assert (after - before).norm() <= slack, f"{(after - before).norm() / slack:.2f} times the bound"
