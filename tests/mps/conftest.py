"""A machine with MPS, as far as the code can tell."""

import pytest

import shadow


@pytest.fixture
def mps(monkeypatch):
    with shadow.machine("mps", monkeypatch) as found:
        yield found
