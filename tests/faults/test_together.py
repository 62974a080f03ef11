"""Real processes at work on one store at the same time, and clocks that go backwards."""

import os
import time

import pytest

from faults.commands import opened, strangers_in_store, team
from faults.together import CONTEXT, PATIENCE, read, started, write
from loraspan import store

ROUNDS, CHANGES = 25, 200


def names_in(folder):
    return [task.name for task in store.open(folder / "team.span").tasks]


def test_two_writers_at_once(tmp_path):
    """In every round one of them wins and the other is told; what was won is there, and nothing else."""
    names = ("sql", "legal")
    team(tmp_path)
    gate, results = CONTEXT.Barrier(len(names)), CONTEXT.Queue()
    processes = [started(write, tmp_path, name, ROUNDS, gate, results) for name in names]
    told = [results.get(timeout=PATIENCE) for _ in range(ROUNDS * len(names))]
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0

    wins = [[name for name, at, how in told if at == turn and how == "won"] for turn in range(ROUNDS)]
    assert [len(winners) for winners in wins] == [1] * ROUNDS
    losers = [how for *_, how in told if how != "won"]
    assert len(losers) == ROUNDS
    assert all("another writer was faster" in how and "repeat the change" in how for how in losers), losers
    last = {name: max((turn for turn in range(ROUNDS) if wins[turn] == [name]), default=None) for name in names}
    expected = {name if turn is None else f"{name} {turn}" for name, turn in last.items()}
    assert set(names_in(tmp_path)) == {*expected, "chat"}
    assert store.open_at(tmp_path / "team.span").generation == 1 + ROUNDS
    assert store.verify(tmp_path / "team.span") == []
    assert strangers_in_store(tmp_path) == []
    print({name: sum(won == [name] for won in wins) for name in names}, "rounds won")  # noqa: T201


def test_readers_during_writes(tmp_path):
    team(tmp_path)
    space = opened(tmp_path)
    gate, stop, results = CONTEXT.Barrier(3), CONTEXT.Event(), CONTEXT.Queue()
    processes = [started(read, tmp_path, gate, stop, results) for _ in range(2)]
    gate.wait(PATIENCE)
    for i in range(CHANGES):
        space.rename(space.tasks[0], f"{i}")
    stop.set()
    told = [results.get(timeout=PATIENCE) for _ in processes]
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0

    print(told, "opens and generations seen by each reader during", CHANGES, "writes")  # noqa: T201
    for opens, different in told:
        assert opens >= 5
        assert different >= 2
    assert store.open_at(tmp_path / "team.span").generation == 1 + CHANGES


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes back a day whenever it is looked at."""
    now = [2_000_000_000.0]

    def tick():
        now[0] -= 86_400
        return now[0]

    monkeypatch.setattr(time, "time", tick)
    return tick


@pytest.mark.usefixtures("clock")
def test_nothing_depends_on_the_clock(tmp_path, monkeypatch):
    """Manifests say a time, files have one; order comes from numbers alone."""
    times = iter(f"20{99 - i}-01-01T00:00:00+00:00" for i in range(90))
    monkeypatch.setattr("loraspan.store.transaction.now", lambda: next(times))
    monkeypatch.setattr("loraspan.store.history.now", lambda: next(times))
    team(tmp_path)
    path = tmp_path / "team.span"
    for i in range(6):
        space = opened(tmp_path)
        space.rename(space.tasks[0], f"{i}")
        for age, file in enumerate(sorted(path.iterdir())):
            os.utime(file, (1e9 - 1e6 * (i + age), 1e9 - 1e6 * (i + age)))
    store.rollback(path, 3)

    log = store.log(path)
    assert [entry.generation for entry in log] == list(range(8, 0, -1))
    assert [entry.time for entry in log] == sorted(entry.time for entry in log)
    assert [task.name for task in store.open(path, generation=3).tasks] == names_in(tmp_path)
    assert store.verify(path) == []


@pytest.mark.parametrize("future", [False, True], ids=["clock went back", "files from the future"])
def test_garbage_collection_keeps_what_it_is_not_sure_of(tmp_path, monkeypatch, future):
    """Where times make no sense, nothing goes; where they do again, it does."""
    team(tmp_path, generations=5)
    path = tmp_path / "team.span"
    before = sorted(entry.name for entry in path.iterdir())
    honest = time.time
    with monkeypatch.context() as patch:
        if future:
            for file in path.iterdir():
                os.utime(file, (honest() + 1e8, honest() + 1e8))
        else:
            patch.setattr(time, "time", lambda: honest() - 1e8)
        assert store.gc(path, keep=0, grace=0).files == ()
        assert sorted(entry.name for entry in path.iterdir() if entry.name != ".pins") == before
    for file in path.iterdir():
        os.utime(file, (honest() - 1e8, honest() - 1e8))
    assert store.gc(path, keep=0, grace=3600).generations == (1, 2, 3, 4)
    assert store.verify(path) == []
    assert opened(tmp_path).tasks
