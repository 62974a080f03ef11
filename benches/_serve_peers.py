"""The others of ``benches/serve.py``: PEFT's mixed batch and vlora's wrapper, on the same tasks and weights."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from _serve_space import Drawn, Sizes, names

# where benches/compress.py keeps the peers; their packages come after ours, so that torch stays the same
KEPT = Path.home() / ".cache" / "loraspan-bench" / "venv"
PACKAGES = {"PEFT": "peft", "vlora": "vlora"}


def missing(peer: str) -> str | None:
    """Say why a peer is left out, None if it is there."""
    for folder in KEPT.glob("lib/python*/site-packages"):
        if folder.name and f"python{sys.version_info[0]}.{sys.version_info[1]}" == folder.parent.name:
            sys.path.extend([str(folder)] * (str(folder) not in sys.path))
    try:
        importlib.import_module(PACKAGES[peer])
    except Exception as error:
        # a half of a package, or one for another torch: the figures of the others are wanted all the same
        return told(error)
    return None


def told(error: Exception) -> str:
    """Give an error in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def peft_model(model: nn.Module, drawn: Mapping[str, Drawn], tasks: Sequence[int], sizes: Sizes) -> Any:
    """Wrap a model with an adapter for each task, in its own dtype."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=sizes.lora_rank, lora_alpha=sizes.lora_rank, target_modules=list(drawn))
    known = names(max(tasks) + 1)
    wrapped = get_peft_model(model, config, adapter_name=known[tasks[0]], autocast_adapter_dtype=False)
    for i in tasks[1:]:
        # in its own dtype, as the first: by default these would be widened to float32
        wrapped.add_adapter(known[i], config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for path, slot in drawn.items():
            layer = wrapped.base_model.model.get_submodule(path)
            for i, a, b in zip(tasks, *slot.factors(tasks, sizes.lora_rank), strict=True):
                layer.lora_A[known[i]].weight.copy_(a)
                layer.lora_B[known[i]].weight.copy_(b)
    return wrapped.eval()


def vlora_model(model: nn.Module, drawn: Mapping[str, Drawn], tasks: Sequence[int], sizes: Sizes, like: Tensor) -> Any:
    """Wrap a model with vlora's subspace of the tasks: whole flattened factors are its components, one for each."""
    from vlora import SharedSubspace, TaskProjection, VLoRAModel

    sides: list[dict[str, Tensor]] = [{}, {}]
    for path, slot in drawn.items():
        for side, factor in zip(sides, slot.factors(tasks, sizes.lora_rank), strict=True):
            side[path] = factor.flatten(1).to(like)
    paths, loadings = list(drawn), torch.eye(len(tasks)).to(like)
    known = names(max(tasks) + 1)
    projections = {
        known[i]: TaskProjection(known[i], *(dict.fromkeys(paths, loadings[j]) for _ in range(2)))
        for j, i in enumerate(tasks)
    }
    values = [dict.fromkeys(paths, like.new_ones(len(tasks))) for _ in range(2)]
    means = [{path: torch.zeros_like(rows[0]) for path, rows in side.items()} for side in sides]
    rank, count = sizes.lora_rank, len(tasks)
    shapes = [{p: (rank, len(s.v)) for p, s in drawn.items()}, {p: (len(s.u), rank) for p, s in drawn.items()}]
    subspace = SharedSubspace(paths, *sides, *values, *means, projections, rank, count, *shapes)
    return VLoRAModel(model, subspace)
