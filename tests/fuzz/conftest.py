"""A time limit for what must not hang."""

import contextlib
import time

import pytest


@pytest.fixture
def deadline():
    """Fail if the body took longer than so many seconds: far more than it needs, far less than the defect took."""

    @contextlib.contextmanager
    def within(seconds):
        begun = time.perf_counter()
        yield
        took = time.perf_counter() - begun
        assert took < seconds, f"it took {took:.1f} s"

    return within
