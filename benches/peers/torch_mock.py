"""The sketch path in plain torch: what a good torch user would write for the same job in an afternoon.

Per slot: map the files, stack the factors (widened to float32 where they are half), weigh them by r x r Grams so that
gauge, scale and size drop out, find each side's range by a random sketch and two fused iterations ``X (X^T Q)``, cut to
the top k by a small SVD, and take every task's loadings on the bases. The weights are applied on the narrow side of
each product (``X Omega = W (A Omega)``), so the stacked rows are read and never rewritten.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from job import Clock, Factors, main
from safetensors.torch import load_file, save_file
from torch import Tensor

OVERSAMPLE = 8
ITERATIONS = 2
PREFIX = "base_model.model."


def compress(folders: list[Path], rank: int, out: Path, clock: Clock) -> None:
    with clock("load"):
        files = [load_file(folder / "adapter_model.safetensors") for folder in folders]
        configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    with clock("fit"):
        scales = torch.tensor([config["lora_alpha"] / config["r"] for config in configs])
        tensors = fit(files, scales, rank)
    with clock("save"):
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / "span.safetensors")
        names = [folder.name for folder in folders]
        (out / "tasks.json").write_text(json.dumps({"names": names, "configs": configs}))


def fit(files: list[dict[str, Tensor]], scales: Tensor, rank: int) -> dict[str, Tensor]:
    """Give, per slot, ``V [d, k]``, ``U [n, k]`` and the loadings ``[tasks, k, r]`` of both sides."""
    paths = [key[len(PREFIX) : -len(".lora_A.weight")] for key in files[0] if key.endswith(".lora_A.weight")]
    grams = {path: _grams(files, path) for path in paths}
    # ||dW||^2 over all slots, [tasks]: each task counts by its relative error
    norms = sum(scales**2 * (down * up).sum(dim=(1, 2)) for down, up in grams.values()).sqrt()
    weights = (scales / norms).float()

    tensors = {}
    for path in paths:
        down, up = _stack(files, path)  # [tasks r, d] and [n, tasks r]
        gram_down, gram_up = grams[path]
        # R with R^T R the other side's Gram: the rows of R A have the Gram A^T B^T B A
        root_down, root_up = (torch.linalg.cholesky(gram).mT.float() for gram in (gram_down, gram_up))
        v = _range(down, weights[:, None, None] * root_up, rank)
        u = _range(up.T, weights[:, None, None] * root_down, rank)
        tasks = len(files)
        tensors[f"{path}.v"] = v
        tensors[f"{path}.u"] = u
        tensors[f"{path}.in"] = (down @ v).reshape(tasks, -1, rank).mT.contiguous()
        tensors[f"{path}.out"] = (up.T @ u).reshape(tasks, -1, rank).mT * scales[:, None, None]
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def _stack(files: list[dict[str, Tensor]], path: str) -> tuple[Tensor, Tensor]:
    down = torch.cat([file[f"{PREFIX}{path}.lora_A.weight"] for file in files])
    up = torch.cat([file[f"{PREFIX}{path}.lora_B.weight"] for file in files], dim=1)
    return down.float(), up.float()


def _grams(files: list[dict[str, Tensor]], path: str) -> tuple[Tensor, Tensor]:
    """Give ``A A^T`` and ``B^T B`` of each task, ``[tasks, r, r]`` float64."""
    down = torch.stack([file[f"{PREFIX}{path}.lora_A.weight"] for file in files]).float()
    up = torch.stack([file[f"{PREFIX}{path}.lora_B.weight"] for file in files]).float()
    return (down @ down.mT).double(), (up.mT @ up).double()


def _range(rows: Tensor, weights: Tensor, rank: int) -> Tensor:
    """Give the top ``rank`` right singular vectors, ``[d, rank]``, of ``blockdiag(weights) rows``."""
    tasks, r, _ = weights.shape
    width = rank + OVERSAMPLE
    omega = torch.randint(0, 2, (rows.shape[1], width), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0

    def weigh(block: Tensor, weights: Tensor) -> Tensor:
        return (weights @ block.reshape(tasks, r, -1)).reshape(tasks * r, -1)

    q = torch.linalg.qr(weigh(rows @ omega, weights))[0]
    for _ in range(ITERATIONS):
        q = torch.linalg.qr(weigh(rows @ (rows.T @ weigh(q, weights.mT)), weights))[0]
    projected = rows.T @ weigh(q, weights.mT)  # X^T Q, [d, width]
    return torch.linalg.svd(projected, full_matrices=False)[0][:, :rank]


def rebuild(out: Path, _folders: list[Path]) -> Iterator[tuple[str, dict[str, Factors]]]:
    tensors, names = load_file(out / "span.safetensors"), json.loads((out / "tasks.json").read_text())["names"]
    paths = [key.removesuffix(".v") for key in tensors if key.endswith(".v")]
    for i, name in enumerate(names):
        yield (
            name,
            {
                path: (
                    (tensors[f"{path}.v"] @ tensors[f"{path}.in"][i]).T,
                    tensors[f"{path}.u"] @ tensors[f"{path}.out"][i],
                    1.0,
                )
                for path in paths
            },
        )


if __name__ == "__main__":
    main(compress, rebuild)
