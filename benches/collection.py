"""Make a collection of PEFT adapters whose shared part is known, for the benches.

    python benches/collection.py OUT --adapters 100 --dtype f32

The recipe, per slot (q, k and v of 4 blocks; 4096 inputs, 4096 or 1024 outputs):

1. The slot has 48 shared directions on each side: orthonormal ``V [d, 48]`` and ``U [n, 48]``, drawn from the seed.
2. Adapter i mixes them with normal weights under a decaying spectrum ``s_j = 0.9^j``: ``A0 = M S V^T [r, d]`` and
   ``B0 = U S M' [n, r]``, r = 16. The first 32 directions carry 99.9 % of that part's energy on each side.
3. White noise of 6 % of each factor's Frobenius norm is added: it is the adapter's own, and no shared basis holds it.
4. A gauge of its own, ``R = Q diag(e^u) Q'`` with u uniform in [-1, 1] (condition number at most e^2), hides the
   factors: the file holds ``A = R^-1 A0`` and ``B = B0 R``. ``dW = alpha / r B A`` is the same whatever R is.
5. alpha = 24, so that the scale is 1.5 and a scale that is lost shows.

Adapter i depends on the seed and on i alone: a collection of 50 is the first half of one of 100, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LORA_RANK = 16
LORA_ALPHA = 24
INPUTS = 4096
OUTPUTS = {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}
BLOCKS = 4
SHARED = 48
DECAY = 0.9
NOISE = 0.06
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def make_collection(out: Path, adapters: int, dtype: str = "f32", seed: int = 20261122) -> list[Path]:
    """Write the folders that are missing under ``out`` and give the first ``adapters`` of them, in order."""
    recipe = {"dtype": dtype, "seed": seed, "noise": NOISE, "decay": DECAY, "shared": SHARED, "alpha": LORA_ALPHA}
    stamp = out / "recipe.json"
    if stamp.exists() and json.loads(stamp.read_text()) != recipe:
        raise SystemExit(f"collection: {out} holds another collection ({stamp.read_text()}); name another folder")
    out.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(recipe))

    folders = [out / f"task-{i:04d}" for i in range(adapters)]
    missing = [i for i, folder in enumerate(folders) if not (folder / "adapter_config.json").exists()]
    if missing:
        directions = _directions(torch.Generator().manual_seed(seed))
        for i in missing:
            generator = torch.Generator().manual_seed(seed + 1 + i)
            _write(folders[i], _factors(directions, generator), DTYPES[dtype])
    return folders


def slots() -> dict[str, int]:
    """Give the number of outputs of each adapted module, by its path in the model."""
    return {
        f"model.layers.{block}.self_attn.{name}": outputs
        for block in range(BLOCKS)
        for name, outputs in sorted(OUTPUTS.items())
    }


def _directions(generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """Draw ``U S [n, 48]`` and ``S V^T [48, d]`` for each slot."""
    spectrum = DECAY ** torch.arange(SHARED, dtype=torch.float32)

    def orthonormal(length: int) -> Tensor:
        return torch.linalg.qr(torch.randn(length, SHARED, generator=generator))[0]

    return {
        path: (orthonormal(outputs) * spectrum, (orthonormal(INPUTS) * spectrum).T.contiguous())
        for path, outputs in slots().items()
    }


def _factors(directions: dict[str, tuple[Tensor, Tensor]], generator: torch.Generator) -> dict[str, Tensor]:
    """Draw one adapter: its factors by their keys in a PEFT file."""
    tensors = {}
    for path, (left, right) in directions.items():
        down = _with_noise(torch.randn(LORA_RANK, SHARED, generator=generator) @ right, generator)
        up = _with_noise(left @ torch.randn(SHARED, LORA_RANK, generator=generator), generator)
        gauge, inverse = _gauge(generator)
        # entries of a few hundredths, as trained factors have: nothing near the ends of float16
        tensors[f"base_model.model.{path}.lora_A.weight"] = 0.5 * (inverse @ down)
        tensors[f"base_model.model.{path}.lora_B.weight"] = 0.1 * (up @ gauge)
    return tensors


def _with_noise(factor: Tensor, generator: torch.Generator) -> Tensor:
    size = NOISE * float(factor.norm()) / math.sqrt(factor.numel())
    return factor.add_(torch.randn(factor.shape, generator=generator), alpha=size)


def _gauge(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw ``R`` and ``R^-1``, ``[r, r]``."""
    left, right = (torch.linalg.qr(torch.randn(LORA_RANK, LORA_RANK, generator=generator))[0] for _ in range(2))
    stretch = torch.exp(2 * torch.rand(LORA_RANK, generator=generator) - 1)
    return left * stretch @ right.T, right / stretch @ left.T


def _write(folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    folder.mkdir(exist_ok=True)
    cast = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
    save_file(cast, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # last: a folder with a config is a whole one
    (folder / "adapter_config.json").write_text(json.dumps(_CONFIG, indent=2, sort_keys=True))


# what PEFT 0.21 writes for a plain LoRA of these modules
_CONFIG = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "example/llama-7b-gqa",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": LORA_ALPHA,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": LORA_RANK,
    "rank_pattern": {},
    "revision": None,
    "target_modules": sorted(OUTPUTS),
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a collection of PEFT adapters with a known shared part.")
    parser.add_argument("out", type=Path, help="the folder that will hold one folder per adapter")
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="f32")
    parser.add_argument("--seed", type=int, default=20261122)
    options = parser.parse_args()
    folders = make_collection(options.out, options.adapters, options.dtype, options.seed)
    total = sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)
    print(f"{len(folders)} adapters, {total / 1e6:.0f} MB, in {options.out}")


if __name__ == "__main__":
    main()
