import json

import pytest
import torch
from click.testing import CliRunner

from loraspan import store, subspace
from loraspan.adapters import Adapter, Slot
from loraspan.cli import main
from store.samples import collection, renamed, without


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def space(tmp_path):
    """A store with three generations: four tasks, without one of them, and another with another name."""
    path = tmp_path / "team.span"
    store.save(collection(2, names=["sql", "chat", "a\x1b[31m", "legal"]), path, note="begin")
    opened = store.commit(store.open_at(path), without(store.open(path), "chat"), note="wrong: not recognised")
    opened = store.commit(opened, without(opened.collection, "legal"), note="remove legal")
    store.commit(opened, renamed(opened.collection, sql="queries"), note="rename\nsql")
    return path


def test_generations_are_listed_newest_first(space):
    done = run("log", space)
    lines = [line for line in done.stdout.splitlines() if line.strip()]

    assert done.exit_code == 0
    assert [line.split()[:2] for line in lines[-4:]] == [["*", "4"]] + [
        [str(n), store.log(space)[4 - n].time] for n in (3, 2, 1)
    ]
    assert "sql -> queries" in lines[-4]
    assert "rename\\nsql" in lines[-4]
    assert "-legal" in lines[-3]
    assert "begin" in lines[-1]


def test_what_cannot_be_opened_says_so(space):
    (space / "manifest-000002.json").write_text("{")
    (space / store.open_at(space, 1).segments[0].file).unlink()

    lines = run("log", space).stdout.splitlines()

    assert sum("cannot be opened: manifest-000002.json" in line for line in lines) == 1
    assert sum("it is missing" in line for line in lines) == 1


def test_the_log_is_one_document(space):
    document = json.loads(run("log", space, "--json").stdout)

    assert [entry["generation"] for entry in document["generations"]] == [4, 3, 2, 1]
    assert document["generations"][0]["change"] == {"added": [], "removed": [], "renamed": [["sql", "queries"]]}
    assert document["generations"][1] | {"time": None, "nbytes": None} == {
        "generation": 3,
        "current": False,
        "parent": 2,
        "time": None,
        "note": "remove legal",
        "tasks": 2,
        "nbytes": None,
        "change": {"added": [], "removed": ["legal"], "renamed": []},
        "problem": None,
    }


def test_no_store_has_no_log(tmp_path):
    done = run("log", tmp_path)

    assert (done.exit_code, done.stdout) == (1, "")
    assert "not a loraspan store" in done.stderr


def test_a_name_may_be_longer_than_a_note(tmp_path):
    rng = torch.Generator().manual_seed(0)
    slot = Slot(torch.randn(2, 8, generator=rng), torch.randn(6, 2, generator=rng), scale=0.5)
    subspace.compress([Adapter("a", {"q": slot})], max_error=0.05).save(tmp_path / "team.span")
    space = subspace.open(tmp_path / "team.span")

    space.add(Adapter("x" * 100_000, {"q": slot}))

    entry = json.loads(run("log", tmp_path / "team.span", "--json").stdout)["generations"][0]
    assert entry["note"] == "add " + "x" * 200
    assert (entry["change"], entry["tasks"]) == (None, 2)


def test_rolling_back(space):
    before = (space / "CURRENT").read_text()

    dry = run("rollback", space, 2, "--dry-run")
    unchanged = (space / "CURRENT").read_text()
    done = run("rollback", space, 2, "--note", "a mistake", "--json")

    assert (dry.exit_code, done.exit_code, unchanged) == (0, 0, before)
    assert dry.stdout.endswith("generation 5 would be what 2 was: 3 tasks; +legal, +sql; -queries\n")
    document = json.loads(done.stdout)
    assert (document["generation"], document["from"], document["note"]) == (5, 2, "a mistake")
    assert [task.name for task in store.open(space).tasks] == ["sql", "a\x1b[31m", "legal"]
    assert run("rollback", space, 4).stdout.startswith(f"{space}: generation 6 is what 4 was: 2 tasks")


@pytest.mark.parametrize(("generation", "code"), [("4", 1), ("9", 1), ("0", 2), ("x", 2)])
def test_there_is_no_way_back_to_what_is_not(space, generation, code):
    done = run("rollback", space, generation)

    assert (done.exit_code, done.stdout) == (code, "")
    assert (space / "CURRENT").read_text() == "4\n"


def test_collecting_garbage(space):
    young = run("gc", space, "--keep", 0)
    dry = run("gc", space, "--keep", 0, "--grace", "0s", "--dry-run")
    there = {path.name for path in space.iterdir()}
    done = run("gc", space, "--keep", 0, "--grace", "0s")

    assert young.stdout == ""
    assert [line for line in young.stderr.splitlines() if "stays: in its grace period" in line].__len__() == 3
    assert dry.stdout == done.stdout
    assert "would remove 3 generations, 4 files" in dry.stderr
    assert there - {path.name for path in space.iterdir()} == set(done.stdout.split())
    assert store.verify(space) == []


def test_garbage_is_one_document(space):
    document = json.loads(run("gc", space, "--grace", "0s", "--json").stdout)

    assert document["generations"] == [1, 2]
    assert document["dry_run"] is False
    assert document["bytes"] > 0
    assert document["files"][:2] == ["manifest-000001.json", "manifest-000002.json"]
    assert document["kept"] == {}


@pytest.mark.parametrize("grace", ["7", "d", "-1d", "1e9s", "1 d", "٣d", "inf"])
def test_a_grace_is_a_number_and_a_unit(space, grace):
    done = run("gc", space, "--grace", grace)

    assert (done.exit_code, done.stdout) == (2, "")
    assert (space / "manifest-000001.json").exists()


@pytest.mark.parametrize(
    ("grace", "seconds"), [("90s", 90), ("1.5h", 5400), ("2m", 120), ("7d", 604_800), ("1w", 604_800)]
)
def test_units_of_a_grace(space, monkeypatch, grace, seconds):
    seen = []
    honest = store.gc
    monkeypatch.setattr(store, "gc", lambda *args, **options: seen.append(options) or honest(*args, **options))

    assert run("gc", space, "--grace", grace).exit_code == 0
    assert seen[0]["grace"] == seconds
