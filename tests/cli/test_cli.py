"""The command line as a user meets it: what it prints where, how it ends, what it says when it cannot."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import loraspan.subspace
from cli.calls import fails, run, write_adapter
from loraspan.cli import main


@pytest.mark.usefixtures("adapters")
def test_compress_says_what_it_did(tmp_path):
    done = run("compress", tmp_path / "in", "-o", tmp_path / "x.span")

    assert done.exit_code == 0
    assert "3 tasks" in done.stdout
    assert "x.span" in done.stdout
    assert "--max-error 0.05" in done.stderr


@pytest.mark.parametrize("goal", [("--rank", 2), ("--energy", 0.9), ("--max-error", 0.2)])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_json_is_one_document(tmp_path, adapters, goal, dtype):
    done = run("compress", tmp_path / "in", "-o", tmp_path / "x.span", *goal, "--dtype", dtype, "--json")

    document = json.loads(done.stdout)
    assert [task["name"] for task in document["tasks"]] == list(adapters)
    assert document["nbytes"] == json.loads(run("info", tmp_path / "x.span", "--json").stdout)["nbytes"]
    files = [path for path in (tmp_path / "x.span").iterdir() if path.name != "CURRENT"]
    # a number in the records may take a digit more or less than was counted on
    assert document["nbytes"] == pytest.approx(sum(path.stat().st_size for path in files), abs=8)
    if goal[0] == "--max-error":
        assert all(task["error"] <= 0.2 for task in document["tasks"])


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize("options", [(), ("--memory", "1GB")], ids=["at-once", "in-groups"])
def test_the_sentence_counts_the_bytes_that_the_report_does(tmp_path, options):
    document = json.loads(run("compress", tmp_path / "in", "-o", tmp_path / "x.span", *options, "--json").stdout)
    stated = re.search(r"tasks in ([\d,]+) bytes", document["summary"])
    # before writing, digits of numbers are counted at their most
    assert 0 <= int(stated[1].replace(",", "")) - document["nbytes"] <= 64


def test_overwrite_writes_the_next_generation(tmp_path, store):
    before = (store / "CURRENT").read_text()
    fails(run("compress", tmp_path / "in", "-o", store, "--rank", 2), 1, store, "--overwrite")
    assert (store / "CURRENT").read_text() == before
    assert run("compress", tmp_path / "in" / "sql", "-o", store, "--rank", 2, "--overwrite").exit_code == 0
    assert run("info", store, "--json").exit_code == 0
    assert [task["name"] for task in json.loads(run("info", store, "--json").stdout)["tasks"]] == ["sql"]


@pytest.mark.parametrize(
    "args",
    [
        ("compress",),
        ("compress", "in"),
        ("compress", "in", "-o", "x", "--rank", "2", "--energy", "0.5"),
        ("compress", "in", "-o", "x", "--rank", "0"),
        ("compress", "in", "-o", "x", "--dtype", "f8"),
        ("export", "x", "-o", "out"),
        ("export", "x", "sql", "--all", "-o", "out"),
        ("export", "x", "sql"),
        ("info",),
        ("no-such-command",),
    ],
)
def test_wrong_usage_exits_with_2(args):
    fails(run(*args), 2)


def test_a_missing_path_is_named(tmp_path):
    fails(run("compress", tmp_path / "nowhere", "-o", tmp_path / "x"), 1, tmp_path / "nowhere")
    for command in ("info", "verify"):
        fails(run(command, tmp_path / "nowhere"), 1, tmp_path / "nowhere")
    fails(run("export", tmp_path / "nowhere", "sql", "-o", tmp_path / "x"), 1, tmp_path / "nowhere")


def test_what_is_no_adapter_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    fails(run("compress", tmp_path / "empty", "-o", tmp_path / "x"), 1, "empty", "adapter_config.json")
    (tmp_path / "note.txt").write_text("hello")
    fails(run("compress", tmp_path / "note.txt", "-o", tmp_path / "x"), 1, "note.txt")
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("adapters")
def test_what_is_no_store_is_refused(tmp_path):
    for command in ("info", "verify"):
        fails(run(command, tmp_path / "in"), 1, tmp_path / "in")
    fails(run("compress", tmp_path / "in", "-o", tmp_path / "in"), 1, "choose another path")
    (tmp_path / "file").write_text("")
    fails(run("compress", tmp_path / "in", "-o", tmp_path / "file", "--rank", 2), 1, "file", "choose another path")


@pytest.mark.usefixtures("adapters")
def test_one_name_twice_and_two_base_models_are_refused(tmp_path):
    write_adapter(tmp_path / "other" / "sql", 7)
    fails(run("compress", tmp_path / "in", tmp_path / "other", "-o", tmp_path / "x", "--rank", 2), 1, "'sql'")
    write_adapter(tmp_path / "foreign" / "code", 7, base="another")
    fails(run("compress", tmp_path / "in", tmp_path / "foreign", "-o", tmp_path / "x", "--rank", 2), 1, "another")


@pytest.mark.usefixtures("adapters")
def test_a_truncated_adapter_is_named(tmp_path):
    file = tmp_path / "in" / "sql" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    fails(run("compress", tmp_path / "in", "-o", tmp_path / "x", "--rank", 2), 1, file)


def test_names_cannot_drive_the_terminal(tmp_path):
    folder = tmp_path / "in" / "\x1b[31m[red]x"
    write_adapter(folder, 0)
    done = run("compress", tmp_path / "in", "-o", tmp_path / "x.span", "--rank", 2)
    listed = run("info", tmp_path / "x.span", "--tasks")
    assert "\x1b" not in done.output + listed.output
    assert "\\x1b[31m[red]x" in listed.stdout


def test_info_shows_tasks_when_asked(store, adapters):
    plain, listed = run("info", store), run("info", store, "--tasks")
    assert plain.exit_code == listed.exit_code == 0
    assert "legal" not in plain.stdout
    assert all(name in listed.stdout for name in adapters)
    assert "6x8" in plain.stdout


def test_verify_exits_with_1_and_names_the_file(store):
    done = run("verify", store)
    assert (done.exit_code, done.stdout) == (0, f"{store}: ok\n")
    assert json.loads(run("verify", store, "--json").stdout)["ok"] is True

    basis = next(store.glob("tasks-*"))
    data = bytearray(basis.read_bytes())
    data[-1] ^= 1
    basis.write_bytes(data)

    done = run("verify", store)
    assert done.exit_code == 1
    assert basis.name in done.stdout
    found = json.loads(run("verify", store, "--json").stdout)
    assert (found["ok"], found["findings"][0]["file"]) == (False, basis.name)


def test_every_command_has_help_with_examples():
    for command in main.commands:
        done = run(command, "--help")
        assert done.exit_code == 0
        assert f"loraspan {command}" in done.output.split("Examples:")[1]


def test_a_reader_that_leaves_ends_it_quietly(tmp_path):
    names = {f"task-{i:03d}": i for i in range(300)}
    for name, seed in names.items():
        write_adapter(tmp_path / "in" / name, seed, rank=1)
    assert run("compress", tmp_path / "in", "-o", tmp_path / "x.span", "--rank", 1).exit_code == 0
    command = [sys.executable, "-m", "loraspan.cli", "info", str(tmp_path / "x.span"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.usefixtures("adapters")
def test_ctrl_c_ends_it_quietly(tmp_path):
    code = (
        "import signal, sys, time, loraspan.subspace as s\n"
        # as in a terminal: whoever runs the tests in the background has it ignored, and children inherit that
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def slow(*args, **options):\n    print('started', file=sys.stderr, flush=True)\n    time.sleep(60)\n"
        "s.compress = slow\n"
        "from loraspan.cli import main\n"
        f"main(['compress', {str(tmp_path / 'in')!r}, '-o', {str(tmp_path / 'x')!r}, '--rank', '2'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == "started\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().strip() in {"", "Aborted!"}
    assert process.returncode == 130
    assert not (tmp_path / "x").exists()


def test_python_m_gives_the_version():
    done = subprocess.run(
        [sys.executable, "-m", "loraspan.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("loraspan, version ")


@pytest.mark.usefixtures("adapters")
def test_an_error_of_ours_in_the_middle_is_one_line(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device", "x.span")

    monkeypatch.setattr(loraspan.subspace.Subspace, "save", full)
    fails(run("compress", tmp_path / "in", "-o", tmp_path / "x", "--rank", 2), 1, "No space left on device", "x.span")
