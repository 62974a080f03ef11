"""``loraspan export``: what comes back, under which names, and what it refuses."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import loraspan.subspace
from cli.calls import fails, run, write_adapter
from loraspan.adapters import peft


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
