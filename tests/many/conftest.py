"""Adapters that all runs may read."""

import pytest

from many_runs import write


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder of adapters, and the adapters."""
    root = tmp_path_factory.mktemp("adapters")
    return root, write(root)
