"""A store of six adapters that share directions, others that come, and the commands that change it."""

import json

import torch
from safetensors.torch import save_file

from cli.calls import run

PREFIX = "base_model.model.layer"
OUT, IN, RANK = 24, 32, 3
NAMES = ("chat", "code", "legal", "math", "poems", "sql")
COMMANDS = ("add", "absorb", "remove", "rename", "replace", "refit")


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


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def document(done):
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return json.loads(done.stdout)


def six(tmp_path, dtype="int8"):
    """The store of them: in 8 bits each on its own, in 16 on bases that they share."""
    for i, name in enumerate(NAMES):
        write_adapter(tmp_path / "in" / name, i)
    goal = ("--max-error", 0.05, "--dtype", dtype)
    assert run("compress", tmp_path / "in", "-o", tmp_path / "team.span", *goal).exit_code == 0
    return tmp_path / "team.span"


def newcomers(tmp_path):
    """Folders of adapters that are not in the store: of its directions, and of others."""
    return [write_adapter(tmp_path / "new" / f"near-{i}", 50 + i) for i in range(2)] + [
        write_adapter(tmp_path / "new" / "far", 60, basis=7)
    ]


def commands(store, new):
    """Each command that changes something, with the tasks that there are after it."""
    again = write_adapter(new[0].parent / "again" / "sql", 99)
    return {
        "add": (["add", store, *new[:2]], [*NAMES, "near-0", "near-1"]),
        "absorb": (["absorb", store, *new], [*NAMES, "near-0", "near-1", "far"]),
        "remove": (["remove", store, "sql", "chat"], ["code", "legal", "math", "poems"]),
        "rename": (["rename", store, "sql", "queries"], [*(n for n in NAMES if n != "sql"), "queries"]),
        "replace": (["replace", store, again], [*NAMES]),
        "refit": (["refit", store, "--max-forgetting", "0.02"], [*NAMES]),
    }
