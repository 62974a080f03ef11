"""The command line as a user meets it: what it prints where, how it ends, what it says when it cannot."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import loraspan.subspace
from loraspan.adapters import peft
from loraspan.cli import main


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def write_adapter(folder, seed, *, rank=2, base="tiny", shape=(6, 8)):
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(seed)
    prefix = "base_model.model.layer.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(rank, shape[1], generator=rng),
        f"{prefix}.lora_B.weight": torch.randn(shape[0], rank, generator=rng),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3 * rank, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return 3 * tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]


@pytest.fixture
def adapters(tmp_path):
    """A folder of three adapters, and their ``dW``."""
    return {name: write_adapter(tmp_path / "in" / name, i) for i, name in enumerate(("chat", "legal", "sql"))}


@pytest.fixture
def store(tmp_path, adapters):  # noqa: ARG001 (its files are what is compressed)
    done = run("compress", tmp_path / "in", "-o", tmp_path / "team.span", "--max-error", "1e-5")
    assert done.exit_code == 0, done.output
    return tmp_path / "team.span"


def fails(done, code, *words):
    """It ended with ``code`` and one line on stderr that says all of ``words``, and nothing on stdout."""
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert str(word) in done.stderr
    if code == 1:
        assert done.stderr.count("\n") == 1


def test_there_and_back(tmp_path, adapters, store):
    done = run("export", store, "--all", "-o", tmp_path / "out")

    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [str(tmp_path / "out" / name) for name in adapters]
    for name, delta in adapters.items():
        tensors = load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        config = json.loads((tmp_path / "out" / name / "adapter_config.json").read_text())
        down, up = (tensors[key] for key in sorted(tensors))
        rebuilt = config["lora_alpha"] / config["r"] * up @ down
        assert (rebuilt - delta).norm() <= 2e-5 * delta.norm()


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


def test_an_unknown_task_is_refused_with_a_guess(tmp_path, store):
    fails(run("export", store, "sqll", "-o", tmp_path / "out"), 1, "'sqll'", "did you mean 'sql'")
    assert not (tmp_path / "out").exists()


def test_an_export_replaces_only_when_told(tmp_path, store):
    assert run("export", store, "sql", "-o", tmp_path / "out").exit_code == 0
    kept = (tmp_path / "out" / "sql" / "adapter_config.json").stat().st_mtime_ns
    fails(run("export", store, "legal", "sql", "-o", tmp_path / "out"), 1, "'sql'", "--overwrite")
    assert not (tmp_path / "out" / "legal").exists()
    assert (tmp_path / "out" / "sql" / "adapter_config.json").stat().st_mtime_ns == kept
    assert run("export", store, "sql", "-o", tmp_path / "out", "--overwrite", "--dtype", "bf16").exit_code == 0
    tensors = load_file(tmp_path / "out" / "sql" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_names_of_any_kind_are_exported_and_listed(tmp_path):
    names = ["SQL", "sql", "../up", "", "\x1b[31m", "x" * 5000]
    for i in range(len(names)):
        write_adapter(tmp_path / str(i), i)
    read = [peft.read(tmp_path / str(i), name=name) for i, name in enumerate(names)]
    space = loraspan.subspace.compress(read, rank=2)
    space.save(tmp_path / "odd.span")

    done = run("export", tmp_path / "odd.span", "--all", "-o", tmp_path / "out", "--rank-multiple", 4, "--json")

    document = json.loads(done.stdout)
    index = json.loads((tmp_path / "out" / "tasks.json").read_text())["tasks"]
    assert document["index"] == str(tmp_path / "out" / "tasks.json")
    assert [task["name"] for task in document["tasks"]] == list(index) == names
    for task in document["tasks"]:
        folder = Path(task["folder"])
        assert folder.parent == tmp_path / "out"
        assert folder.name == index[task["name"]]["folder"]
        assert index[task["name"]]["rank"] == 4
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    assert len({path.name.lower() for path in (tmp_path / "out").iterdir()}) == len(names) + 1


def test_an_export_for_vllm_is_padded_or_refused(tmp_path, store):
    assert run("export", store, "sql", "-o", tmp_path / "out", "--engine", "vllm", "--dtype", "bf16").exit_code == 0
    config = json.loads((tmp_path / "out" / "sql" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 8, {})
    assert run("export", store, "legal", "-o", tmp_path / "out", "--ranks", "3,5").exit_code == 0
    assert json.loads((tmp_path / "out" / "legal" / "adapter_config.json").read_text())["r"] == 3
    fails(run("export", store, "chat", "-o", tmp_path / "out", "--ranks", "1"), 1, "'chat'", "2 columns", "at most 1")
    fails(run("export", store, "chat", "-o", tmp_path / "out", "--ranks", "1,x"), 2, "1,x")
    fails(run("export", store, "chat", "-o", tmp_path / "out", "--ranks", "8", "--rank-multiple", "8"), 2)
    assert not (tmp_path / "out" / "chat").exists()


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
