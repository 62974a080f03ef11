"""Fixtures of all tests: poisoned memory, the backends, threads put back; hypothesis without a clock or a memory."""

import functools

import hypothesis
import pytest
import torch

from devices import gram, interpreting
from kernels.emulation import pytest_addoption, pytest_configure  # noqa: F401  --emulate-cuda
from loraspan.errors import BackendError

BACKENDS = ("cpu", "cpu:baseline", "cpu:avx2", "cpu:avx512", "cpu:avx512bf16", "cuda", "triton", "reference")

# the same examples in every run, whatever the machine's speed; fewer where each runs for seconds
EXAMPLES = 3 if interpreting() else 20
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, max_examples=EXAMPLES
)
hypothesis.settings.load_profile("repeatable")


def _poisoned(honest):
    @functools.wraps(honest)
    def allocate(*args, **options):
        out = honest(*args, **options)
        if out.is_floating_point() and not out.is_meta:
            # some are leaves that require a gradient
            with torch.no_grad():
                out.fill_(float("nan"))
        return out

    return allocate


@pytest.fixture(autouse=True, scope="session")
def poisoned_empty():
    """Fill new memory with NaN, so that an entry a kernel forgets to write is seen."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _or_skip(name):
    # what the processor lacks is refused for every call; any other refusal fails the test that meets it
    try:
        gram(torch.ones(1, 1), backend=name)
    except BackendError as refusal:
        pytest.skip(str(refusal))
    return name


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request):
    """Each backend by name; one that refuses skips and says why (tests/ops/test_backends.py: which must run)."""
    return _or_skip(request.param)


@pytest.fixture(scope="session", params=[name for name in BACKENDS if name.startswith("cpu:")])
def compiled(request):
    """Each set of compiled kernels, which promise bits; ``cpu`` is one of them (tests/ops/test_backends.py)."""
    return _or_skip(request.param)


@pytest.fixture(scope="session")
def on_threads():
    """Run a function on so many of torch's threads, and put the number back."""

    def run(count, function):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return function()
        finally:
            torch.set_num_threads(before)

    return run
