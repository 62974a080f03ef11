"""Calls of `shared_lora` on columns of every form, judged against dW in float64."""

import pytest

import oracles
from devices import shared_lora
from loraspan.errors import BackendError
from task_cores import expected

# never a power of two: that would hide a scale applied twice, or a rounding before it
SCALE = 0.3
# columns of each form (ss, sp, ps, pp) of six tasks: shared, none, ragged, each form alone, all of them
COUNTS = [(5, 0, 0, 0), (0, 0, 0, 0), (2, 1, 3, 2), (0, 4, 0, 0), (1, 0, 2, 0), (0, 0, 0, 3)]


def run(y, x, v, u, cores, tasks, **options):
    """Call it, or skip where a GPU's kernels have no such dtype."""
    try:
        return shared_lora(y, x, v, u, cores, tasks, **options)
    except BackendError as refusal:
        if "float64" in str(refusal):
            pytest.skip(str(refusal))
        raise


def assert_right(y, x, v, u, cores, tasks, *, shares=None, backend=None):
    out = run(y, x, v, u, cores, tasks, shares=shares, scale=SCALE, backend=backend)
    assert out.dtype == y.dtype
    assert out is not y
    oracles.assert_within(out, *expected(y, x, v, u, cores, tasks, shares, SCALE))
    return out
