"""What the commands that change a store refuse, in one line and with the store as it was."""

import pytest
from safetensors.torch import load_file, save_file

import loraspan
from cli.calls import fails, run
from cli.living import COMMANDS, IN, PREFIX, commands, contents, newcomers, six, write_adapter
from loraspan.store import files


@pytest.fixture
def store(tmp_path):
    return six(tmp_path)


@pytest.fixture
def new(tmp_path):
    return newcomers(tmp_path)


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
