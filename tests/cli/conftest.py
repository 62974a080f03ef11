"""Three adapters, and the store of them."""

import pytest

from cli.calls import run, write_adapter


@pytest.fixture
def adapters(tmp_path):
    """A folder of three adapters, and their ``dW``."""
    return {name: write_adapter(tmp_path / "in" / name, i) for i, name in enumerate(("chat", "legal", "sql"))}


@pytest.fixture
def store(tmp_path, adapters):  # noqa: ARG001 (its files are what is compressed)
    done = run("compress", tmp_path / "in", "-o", tmp_path / "team.span", "--max-error", "1e-5")
    assert done.exit_code == 0, done.output
    return tmp_path / "team.span"
