"""The commands that change a store: what each does, says and leaves alone."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import loraspan
from loraspan.cli import main
from loraspan.store import files

PREFIX = "base_model.model.layer"
OUT, IN, RANK = 24, 32, 3


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def write_adapter(folder, seed, *, basis=0, base="tiny", inputs=IN, noise=0.01):
    """An adapter of two modules whose inputs lie near eight directions drawn from ``basis``."""
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for i, name in enumerate(("q_proj", "v_proj")):
        shared = torch.randn(8, inputs, generator=torch.Generator().manual_seed(1000 + 10 * basis + i))
        down = torch.randn(RANK, 8, generator=rng) @ shared + noise * torch.randn(RANK, inputs, generator=rng)
        tensors[f"{PREFIX}.{name}.lora_A.weight"] = down
        tensors[f"{PREFIX}.{name}.lora_B.weight"] = torch.randn(OUT, RANK, generator=rng)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


NAMES = ("chat", "code", "legal", "math", "poems", "sql")


@pytest.fixture
def store(tmp_path):
    for i, name in enumerate(NAMES):
        write_adapter(tmp_path / "in" / name, i)
    assert run("compress", tmp_path / "in", "-o", tmp_path / "team.span", "--max-error", 0.05).exit_code == 0
    return tmp_path / "team.span"


@pytest.fixture
def new(tmp_path):
    """Folders of adapters that are not in the store: of its directions, and of others."""
    return [write_adapter(tmp_path / "new" / f"near-{i}", 50 + i) for i in range(2)] + [
        write_adapter(tmp_path / "new" / "far", 60, basis=7)
    ]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def document(done):
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return json.loads(done.stdout)


def fails(done, code, *words):
    """It ended with ``code`` and one line on stderr that says all of ``words``, and nothing on stdout."""
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert all(str(word) in done.stderr for word in words), done.stderr
    if code == 1:
        assert done.stderr.count("\n") == 1


def commands(store, new):
    """Each command that changes something, with the tasks that there are after it."""
    again = write_adapter(new[0].parent / "again" / "sql", 99)
    return {
        "add": (["add", store, *new[:2]], [*NAMES, "near-0", "near-1"]),
        "absorb": (["absorb", store, *new], [*NAMES, "near-0", "near-1", "far"]),
        "remove": (["remove", store, "sql", "chat"], ["code", "legal", "math", "poems"]),
        "replace": (["replace", store, again], [*NAMES]),
        "refit": (["refit", store, "--max-forgetting", "0.02"], [*NAMES]),
    }


COMMANDS = ("add", "absorb", "remove", "replace", "refit")
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
    assert loraspan.open(store).nbytes > 9000
    small = document(run("refit", store, "--max-bytes", "9kB", "--json"))
    assert small["nbytes"][1] <= 9000
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


def test_project_tells_one_adapter_by_modules_and_several_by_lines(store, new):
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


@pytest.mark.parametrize(("command", "args"), [("remove", ()), ("rename", ("x",)), ("replace", None)])
def test_an_unknown_task_is_refused_with_a_guess(tmp_path, store, command, args):
    args = [write_adapter(tmp_path / "other" / "sqll", 1)] if args is None else ["sqll", *args]
    before = contents(store)
    fails(run(command, store, *args), 1, store, "no task 'sqll'", "did you mean 'sql'")
    assert contents(store) == before


def test_one_unknown_task_keeps_all(store):
    before = contents(store)
    fails(run("remove", store, "sql", "nothing-like-it"), 1, "no task 'nothing-like-it'", "loraspan info")
    assert contents(store) == before


@pytest.mark.parametrize("command", ["add", "absorb", "project"])
def test_adapters_that_do_not_fit_are_named(tmp_path, store, command):
    before = contents(store)
    fails(run(command, store, write_adapter(tmp_path / "a" / "odd", 1, base="another")), 1, "'odd'", "another", "tiny")
    fails(run(command, store, write_adapter(tmp_path / "b" / "wide", 1, inputs=IN + 1)), 1, "'wide'", "layer.q_proj")
    spoiled = write_adapter(tmp_path / "c" / "spoiled", 1)
    tensors = load_file(spoiled / "adapter_model.safetensors")
    tensors[f"{PREFIX}.v_proj.lora_B.weight"][1, 1] = float("nan")
    save_file(tensors, spoiled / "adapter_model.safetensors")
    fails(run(command, store, spoiled), 1, "'spoiled'", "lora_B", "layer.v_proj")
    fails(run(command, store, tmp_path / "nowhere"), 1, tmp_path / "nowhere")
    fails(run(command, store, spoiled, "--max-error", 2), 1, "max_error is between 0 and 1; got 2")
    assert contents(store) == before


def test_a_taken_name_is_refused(tmp_path, store):
    before = contents(store)
    again = write_adapter(tmp_path / "other" / "sql", 9)
    for command in ("add", "absorb"):
        fails(run(command, store, again), 1, "'sql'", "already")
    fails(run("rename", store, "chat", "sql"), 1, "'sql'", "already")
    assert contents(store) == before


@pytest.mark.parametrize(
    "args",
    [
        ("add", "x"),
        ("absorb",),
        ("remove", "x"),
        ("rename", "x", "old"),
        ("replace", "x"),
        ("refit", "x"),
        ("refit", "x", "--rank", "0"),
        ("add", "x", "y", "--max-error", "much"),
        ("project", "x"),
    ],
)
def test_wrong_usage_exits_with_2(args):
    fails(run(*args), 2)


@pytest.mark.parametrize("size", ["0", "-1MB", "many", "1 XB"])
def test_a_size_that_is_none_is_refused(store, new, size):
    for args in (("absorb", store, new[0]), ("refit", store, "--rank", 2)):
        fails(run(*args, "--max-bytes", size), 1, "a number of bytes is positive", size)


def test_a_missing_store_is_named(tmp_path, new):
    rest = {
        **dict.fromkeys(("add", "absorb", "replace", "project"), (new[0],)),
        "remove": ("sql",),
        "rename": ("a", "b"),
        "refit": ("--rank", 2),
    }
    for command, args in rest.items():
        fails(run(command, tmp_path / "nowhere.span", *args), 1, tmp_path / "nowhere.span")
    assert not (tmp_path / "nowhere.span").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_the_store(store, new, command, monkeypatch):
    args, _ = commands(store, new)[command]
    before = contents(store)

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    fails(run(*args), 1, store, "No space left on device")
    monkeypatch.undo()
    assert {name: data for name, data in contents(store).items() if name in before} == before
    assert loraspan.open(store).generation == 1
    assert run(*args).exit_code == 0


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
