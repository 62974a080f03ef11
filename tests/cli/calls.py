"""Calls of the command line in this process, and small adapters for them."""

import json

import torch
from click.testing import CliRunner
from safetensors.torch import save_file

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


def fails(done, code, *words):
    """It ended with ``code`` and one line on stderr that says all of ``words``, and nothing on stdout."""
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert str(word) in done.stderr
    if code == 1:
        assert done.stderr.count("\n") == 1
