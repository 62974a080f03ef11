"""The very last sync of a change fails: the new generation is there, the error says so, and the object is at it too."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from torch import nn

import loraspan
from adapters.folders import adapter
from loraspan import store
from loraspan.errors import StoreError
from loraspan.store import files
from loraspan.store.reader import current
from many_runs import run, write

SAYS = r"generation {} is the current one, and may not outlast a loss of power"


@pytest.fixture
def unsynced(monkeypatch):
    """Let the sync of a folder fail once another generation is the current one; gives what mends that."""
    honest = files.sync_folder

    def from_here(folder, seen):
        def sync(path):
            if Path(path) == folder and current(folder) != seen:
                raise OSError(errno.EIO, "Input/output error")
            honest(path)

        monkeypatch.setattr(files, "sync_folder", sync)
        return lambda: monkeypatch.setattr(files, "sync_folder", honest)

    return from_here


def given(*names):
    return [adapter(name, base="base", path=f"layers.{i}.q") for i, name in enumerate(names)]


CHANGES = {
    "add": lambda space: space.add(given("new"), max_error=0.3),
    "absorb": lambda space: space.absorb(given("new")),
    "remove": lambda space: space.remove("sql"),
    "rename": lambda space: space.rename("sql", "new"),
    "replace": lambda space: space.replace(given("sql")),
    "refit": lambda space: space.refit(rank=1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_an_open_space_is_at_the_generation_that_the_disk_is_at(change, tmp_path, unsynced):
    folder = tmp_path / "team.span"
    space = loraspan.compress(given("sql", "legal"), max_error=0.3, out=folder)
    layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(5, 3)}) for _ in range(2))
    model = loraspan.attach(nn.ModuleDict({"layers": layers}), space)
    mend = unsynced(folder, 1)
    with pytest.raises(StoreError, match=SAYS.format(2)):
        change(space)
    mend()
    opened = loraspan.open(folder)
    assert (space.generation, space.tasks, space.errors) == (opened.generation, opened.tasks, opened.errors)
    assert (space.generation, space.nbytes) == (2, opened.nbytes)
    # attached models have followed
    assert space.ids(space.tasks[-1]).item() >= 0
    with model.tasks(space.tasks[-1]):
        pass
    space.remove(space.tasks[0])
    assert loraspan.open(folder).tasks == space.tasks
    assert store.verify(folder) == []


def test_a_space_that_was_saved_so_is_at_its_store(tmp_path, unsynced):
    folder = tmp_path / "team.span"
    space = loraspan.compress(given("sql", "legal"), max_error=0.3)
    mend = unsynced(folder, None)
    with pytest.raises(StoreError, match=SAYS.format(1)):
        space.save(folder)
    mend()
    assert (space.path, space.generation) == (folder, 1)
    space.remove("sql")
    assert loraspan.open(folder).tasks == ["legal"]


def test_a_run_in_groups_that_ended_so_is_done_when_it_is_called_again(tmp_path, unsynced):
    write(tmp_path / "in", count=3, slots=1)
    mend = unsynced(tmp_path / "out", None)
    with pytest.raises(StoreError, match=SAYS.format(1)):
        run(tmp_path / "in", tmp_path / "out")
    mend()
    space = run(tmp_path / "in", tmp_path / "out")
    assert (space.generation, len(space.tasks)) == (1, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
