"""Ways to spoil one of the adapters that :func:`many_runs.write` has written, with who it is and what is said of it."""

from __future__ import annotations

import json
import shutil

import planted
from safetensors.torch import load_file, save_file

from loraspan.adapters import peft
from loraspan.errors import FormatError, MismatchError, NotFiniteError, UnsupportedError


def damaged(root):
    path = root / "003" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def nan(root):
    path = root / "005" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, path)


def shape(root):
    shutil.rmtree(root / "000")
    peft.write(planted.adapters(count=1, shape=(40, 57))[0], root / "000")


def base(root):
    for folder in sorted(root.iterdir()):
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "other" if folder.name == "000" else "usual"
        (folder / "adapter_config.json").write_text(json.dumps(config))


def kind(root):
    config = json.loads((root / "011" / "adapter_config.json").read_text())
    (root / "011" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))


SPOILT = {
    "damaged": (damaged, "003", FormatError, "truncated"),
    "nan": (nan, "005", NotFiniteError, "NaN"),
    "shape": (shape, "000", MismatchError, r"in most it is linear \[40, 56\]"),
    "base": (base, "000", MismatchError, "base model 'other', most are for 'usual'"),
    "kind": (kind, "011", UnsupportedError, "IA3"),
}
