"""Every defect that the fuzzer has found, as the smallest input that shows it."""

import os
import threading
from pathlib import Path

import pytest

from adapters.folders import write
from loraspan import store
from loraspan.adapters import peft
from loraspan.errors import FormatError, LoraspanError, StoreError
from store.samples import saved

pytestmark = pytest.mark.skipif(os.name == "nt", reason="modes and pipes of POSIX")


def in_time(function, *args):
    """Call it on a thread of its own: a call that waits for ever fails rather than waiting."""
    result = []

    def call():
        try:
            result.append(function(*args))
        except LoraspanError as error:
            result.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(20)
    assert result, "it does not return"
    return result[0]


@pytest.mark.parametrize("kind", ["fifo", "folder", "endless"])
@pytest.mark.parametrize("pattern", ["CURRENT", "manifest-*", "basis-*", "tasks-*"])
def test_a_part_of_a_store_that_is_no_file(tmp_path, pattern, kind):
    path = saved(tmp_path)
    victim = next(path.glob(pattern))
    replace(victim, kind)

    error = in_time(store.open, path)

    assert isinstance(error, StoreError)
    assert str(error) == f"{victim}: cannot be read: it is no regular file"
    assert victim.name in str(in_time(outcome, store.verify, path))


@pytest.mark.parametrize("kind", ["fifo", "folder", "endless"])
@pytest.mark.parametrize("name", [peft.CONFIG_NAME, peft.WEIGHTS_NAME, "README.md"])
def test_a_part_of_an_adapter_that_is_no_file(tmp_path, name, kind):
    folder = write(tmp_path / "a")
    replace(folder / name, kind)

    result = in_time(peft.read, folder)

    if name == "README.md":
        assert result.source.licence is None
    else:
        assert isinstance(result, FormatError)
        assert name in str(result)
        assert "regular file" in str(result)


def replace(path, kind):
    path.unlink(missing_ok=True)
    {"fifo": os.mkfifo, "folder": Path.mkdir, "endless": lambda p: p.symlink_to("/dev/zero")}[kind](path)


def outcome(look, path):
    try:
        return [str(finding) for finding in look(path)]
    except LoraspanError as error:
        return error
