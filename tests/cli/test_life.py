"""The commands that change a store: what each does, says and leaves alone."""

import json
import sys

import pytest
from safetensors.torch import load_file

import loraspan
from cli.calls import fails, run
from cli.living import (
    COMMANDS,
    NAMES,
    PREFIX,
    commands,
    contents,
    document,
    newcomers,
    six,
    write_adapter,
)


@pytest.fixture
def store(tmp_path):
    return six(tmp_path)


@pytest.fixture
def new(tmp_path):
    return newcomers(tmp_path)


KEYS = {
    *("store", "generation", "what", "tasks", "nbytes", "worst_error"),
    *("added", "removed", "refitted", "forgotten", "dry_run"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_dry_run_says_what_would_come_and_writes_nothing(store, new, command):
    args, tasks = commands(store, new)[command]
    before = contents(store)

    dry = document(run(*args, "--dry-run", "--json"))
    text = run(*args, "--dry-run")

    assert contents(store) == before
    assert text.exit_code == 0
    assert "would change" in text.stdout
    assert f"{store}: still at generation 1." in text.stdout
    done = document(run(*args, "--json"))
    assert dry.keys() == done.keys() == KEYS
    assert (dry["dry_run"], done["dry_run"]) == (True, False)
    assert (dry["generation"], done["generation"]) == (1, 2)
    for key in KEYS - {"dry_run", "generation", "nbytes"}:
        assert dry[key] == done[key]
    # a number in the records may take a digit more or less than was counted on
    assert dry["nbytes"] == pytest.approx(done["nbytes"], abs=600)
    opened = loraspan.open(store)
    assert opened.tasks == tasks
    assert done["tasks"] == [len(NAMES), len(tasks)]
    assert done["worst_error"][1] == max(opened.errors.values())
    assert done["nbytes"][1] == opened.nbytes
    assert run("verify", store).exit_code == 0


def test_add_keeps_the_error_and_all_other_files(store, new):
    before = contents(store)
    done = run("add", store, *new, "--max-error", 0.2)
    assert done.exit_code == 0, done.output
    assert "add near-0 near-1 far: changed tasks 6 to 9" in done.stdout
    assert "Largest error of what came: " in done.stdout
    assert f"{store}: at generation 2." in done.stdout
    after = contents(store)
    assert {name: after[name] for name in before if name != "CURRENT"} == {
        name: data for name, data in before.items() if name != "CURRENT"
    }
    assert len(after) == len(before) + 2
    errors = loraspan.open(store).errors
    assert all(errors[folder.name] <= 0.2 for folder in new)
    strict = document(run("add", store, write_adapter(new[0].parent / "strict", 3), "--max-error", "1e-4", "--json"))
    assert strict["added"].keys() == {"strict"}
    assert strict["added"]["strict"] <= 1e-4


def test_what_was_added_comes_back(tmp_path, store, new):
    assert run("add", store, new[2], "--max-error", 1e-5).exit_code == 0
    assert run("export", store, "far", "-o", tmp_path / "out").exit_code == 0
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (new[2], tmp_path / "out" / "far"))
    config = json.loads((tmp_path / "out" / "far" / "adapter_config.json").read_text())
    for name in ("q_proj", "v_proj"):
        first, second = (
            scale * tensors[f"{PREFIX}.{name}.lora_B.weight"] @ tensors[f"{PREFIX}.{name}.lora_A.weight"]
            for tensors, scale in ((one, 2), (two, config["lora_alpha"] / config["r"]))
        )
        assert (first - second).norm() <= 2e-5 * first.norm()


def test_absorb_fits_new_bases_when_bytes_demand_it(tmp_path, store):
    many = [write_adapter(tmp_path / "many" / f"far-{i}", 200 + i, basis=7) for i in range(25)]
    assert run("add", store, *many[:-1]).exit_code == 0
    limit = int(loraspan.open(store).nbytes * 0.92)
    fails(run("absorb", store, many[-1], "--max-bytes", "1kB"), 1, "absorb: max_bytes=1,000 cannot be met")
    done = run("absorb", store, many[-1], "--max-bytes", limit, "--max-forgetting", 0.04)
    assert done.exit_code == 0, done.output
    assert "New bases: no task loses more than 0.0" in done.stdout
    opened = loraspan.open(store)
    assert opened.nbytes <= limit
    assert max(opened.errors.values()) <= 0.05 + 0.04
    listed = json.loads(run("info", store, "--json").stdout)
    assert {task["error_kind"] for task in listed["tasks"]} == {"bound"}


def test_refit_by_rank_and_by_forgetting(store):
    by_rank = document(run("refit", store, "--rank", 4, "--json"))
    assert by_rank["refitted"]
    assert by_rank["forgotten"] > 0.1
    assert {slot.ranks for slot in loraspan.open(store).collection.slots.values()} == {(4, 4)}
    assert run("rollback", store, 1).exit_code == 0
    both = document(run("refit", store, "--rank", 4, "--max-forgetting", 0.02, "--json"))
    assert both["forgotten"] <= 0.02
    assert loraspan.open(store).nbytes > 8500
    small = document(run("refit", store, "--max-bytes", "8.5kB", "--json"))
    assert small["nbytes"][1] <= 8500
    before = contents(store)
    for goal in (("--max-forgetting", 0.5), ()):
        fails(
            run("refit", store, *goal, "--max-bytes", "2 kB"), 1, "max_bytes=2,000 cannot be met", "nothing was changed"
        )
    assert contents(store) == before


def test_rename_says_so_in_the_log(store):
    renamed = document(run("rename", store, "sql", "sql 2", "--json"))
    assert (renamed["added"].keys(), renamed["removed"]) == ({"sql 2"}, ["sql"])
    assert loraspan.open(store).tasks == [*NAMES[:-1], "sql 2"]
    assert "rename sql to sql 2" in run("log", store).stdout
    text = run("rename", store, "sql 2", "sql")
    assert "at generation 3." in text.stdout


def test_replace_is_one_step(store, new):
    again = write_adapter(new[0].parent / "again" / "legal", 99)
    done = document(run("replace", store, again, "--max-error", 0.01, "--json"))
    assert (done["tasks"], done["generation"]) == ([6, 6], 2)
    assert (done["added"], done["removed"]) == ({"legal": loraspan.open(store).errors["legal"]}, ["legal"])
    assert loraspan.open(store).errors["legal"] <= 0.01


def test_project_tells_one_adapter_by_modules_and_several_by_lines(tmp_path, new):
    store = six(tmp_path / "shared", "f16")
    before = contents(store)
    one = run("project", store, new[0], "--max-error", 0.1)
    several = run("project", store, *new)
    found = document(run("project", store, *new, "--max-error", 0.1, "--json"))

    assert contents(store) == before
    assert "layer.q_proj" in one.stdout
    assert one.stdout.startswith("near-0: the bases carry all but ")
    assert all(folder.name in several.stdout for folder in new)
    near, _, far = found["adapters"]
    assert (near["name"], far["name"], near["max_error"]) == ("near-0", "far", 0.1)
    assert {slot["path"] for slot in near["slots"]} == {"layer.q_proj", "layer.v_proj"}
    assert all(slot["known"] for slot in near["slots"])
    assert near["nbytes"] < far["nbytes"]
    assert far["slots"][0]["outside_in"] > 0.5 > near["slots"][0]["outside_in"]
    assert found["store"] == str(store)


def test_names_cannot_drive_the_terminal(tmp_path, store):
    odd = write_adapter(tmp_path / "odd" / "\x1b[31m[red]x", 1)
    outputs = [run("project", store, odd), run("add", store, odd), run("rename", store, odd.name, "\x1b[2Jy")]
    assert all(done.exit_code == 0 for done in outputs)
    assert "\x1b" not in "".join(done.output for done in outputs)
    assert "\\x1b[31m[red]x" in outputs[1].stdout


def test_a_bar_counts_slots_where_there_is_a_terminal(store, new, monkeypatch):
    """The command hands the bar to the call: every stage that is told has a name there."""
    told = []

    class Bars:
        def __enter__(self):
            return lambda stage, done, total: told.append((stage, done, total))

        def __exit__(self, *_):
            return None

    for name in ("add", "absorb", "replace", "refit", "project"):
        monkeypatch.setattr(sys.modules[f"loraspan.cli.{name}"], "bars", Bars)
    args = commands(store, new)
    for command, stage in (("add", "add"), ("absorb", "add"), ("replace", "add"), ("refit", "fit")):
        told.clear()
        assert run(*args[command][0], "--dry-run").exit_code == 0
        assert (stage, 0, 2) in told
        assert (stage, 2, 2) in told
    told.clear()
    assert run("project", store, *new).exit_code == 0
    assert told == [("project", i, 3) for i in range(3)]
