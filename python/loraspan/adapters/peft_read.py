"""Open a PEFT adapter: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from loraspan.adapters import experts
from loraspan.adapters.base import Adapter, Slot, Source
from loraspan.adapters.config import Config, read_config
from loraspan.adapters.fold import check_factor_dtype
from loraspan.adapters.keys import BIAS, CONFIG_NAME, MAGNITUDE, PREFIX, WEIGHTS_NAME, Pair, sort_keys
from loraspan.adapters.licence import licence_of
from loraspan.adapters.mapped import file_sha256, map_tensors
from loraspan.adapters.scales import Rule, Scales
from loraspan.errors import FormatError, UnsupportedError

_PICKLED = "adapter_model.bin"
# ranks up to the first are always taken, and beyond it up to so many times the map's own largest
_ANY_RANK, _PAST_FULL = 1024, 8


def read(path: Path | str, *, name: str | None = None, hash_file: bool = False) -> Adapter:
    """Open one PEFT adapter; only its configuration and the header of its tensor file are read.

    Args:
        path: a folder, or a ``.safetensors`` file with ``adapter_config.json`` beside it.
        name: the task's name; by default that of the folder, or of the file if it is not called
            ``adapter_model.safetensors``.
        hash_file: also hash the whole tensor file, which reads it.

    Returns:
        The adapter. Its tensors are views of a private mapping of the file, in their own dtypes: factors
        ``down [r, d]`` and ``up [n, r]`` by module path without ``base_model.model.``, with a convolution seen as
        matrices and the stacked factors of experts split into one slot per expert. Every other tensor (heads, biases,
        magnitudes, embeddings) is among the extras, under the name that PEFT's present version gives it.

    Raises:
        FormatError: if a file is missing, truncated or corrupt, or ranks and factors contradict the configuration.
        UnsupportedError: if it is not plain LoRA on an unchanged base model, with the remedy where there is one.

    Example:
        >>> import json, safetensors.torch, tempfile, torch
        >>> folder = Path(tempfile.mkdtemp(), "sql")
        >>> folder.mkdir()
        >>> _ = (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
        >>> factors = {"q.lora_A.weight": torch.ones(2, 5), "q.lora_B.weight": torch.ones(3, 2)}
        >>> file = folder / "adapter_model.safetensors"
        >>> safetensors.torch.save_file({f"base_model.model.{key}": t for key, t in factors.items()}, file)
        >>> adapter = read(folder)
        >>> adapter.name, adapter.slots["q"].scale, adapter.slots["q"].shape
        ('sql', 3.0, (3, 5))
    """
    file = _weights_file(os.fspath(path))
    folder = os.path.dirname(file)  # noqa: PTH120
    config = read_config(os.path.join(folder, CONFIG_NAME))  # noqa: PTH118
    mapped = map_tensors(file)
    try:
        pairs, extras = sort_keys(tuple(mapped.tensors))
        slots = _slots(pairs, mapped.tensors, config)
        _check_magnitudes(slots, extras, config)
        for key, found in extras.items():
            if key.endswith(BIAS):
                check_factor_dtype(mapped.tensors[found], found)
    except (FormatError, UnsupportedError) as error:
        raise type(error)(f"{file}: {error}") from None
    source = Source(
        path=os.fspath(path),
        header_sha256=mapped.header_sha256,
        sha256=file_sha256(file) if hash_file else None,
        base_model=config.fields.get("base_model_name_or_path"),
        licence=licence_of(folder, config.fields, mapped.header.metadata),
    )
    return Adapter(
        name=_name_of(file) if name is None else name,
        slots=slots,
        extras={key: mapped.tensors[found] for key, found in extras.items()},
        config=config.fields,
        source=source,
    )


def _weights_file(path: str) -> str:
    if path.endswith(".safetensors"):
        return path
    file = os.path.join(path, WEIGHTS_NAME)  # noqa: PTH118
    if os.path.exists(file):  # noqa: PTH110
        return file
    if path.endswith((".bin", ".pt", ".pth")) or os.path.exists(os.path.join(path, _PICKLED)):  # noqa: PTH110, PTH118
        raise UnsupportedError(
            f"{path}: needs {WEIGHTS_NAME}; it is a pickle, which can run code when loaded. Convert it where you "
            "trust it: safetensors.torch.save_file(torch.load(file, weights_only=True), 'adapter_model.safetensors')"
        )
    raise FormatError(f"{path}: needs a PEFT folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or a .safetensors file")


def _name_of(file: str) -> str:
    folder, base = os.path.split(os.path.abspath(file))  # noqa: PTH100
    return os.path.basename(folder) if base == WEIGHTS_NAME else base.removesuffix(".safetensors")  # noqa: PTH119


def _slots(pairs: Mapping[str, Pair], tensors: Mapping[str, Tensor], config: Config) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    has_experts = bool(config.fields.get("target_parameters"))
    for path, pair in pairs.items():
        stored_down, stored_up = tensors[pair.down], tensors[pair.up]
        down, up = _matrix(stored_down, pair.down), _matrix(stored_up, pair.up)
        if down.shape[0] != up.shape[1] or not (down.numel() and up.numel()) or stored_down.ndim != stored_up.ndim:
            raise FormatError(
                f"{pair.down!r} and {pair.up!r} need [r, d] and [n, r] with r at least 1, n and d too, "
                f"or both a kernel; got {list(stored_down.shape)} and {list(stored_up.shape)}"
            )
        candidates = _expert_parameters(path, config.fields) if has_experts else []
        if candidates:
            slots.update(_experts(path, candidates, down, up, config.scales))
        elif ".base_layer" in path:
            raise UnsupportedError(f"module {path!r} is inside a wrapped one, as PEFT does it for MultiheadAttention")
        else:
            slots[path] = _slot(path, pair, down, up, stored_down, config.scales)
    if not slots:
        raise FormatError("needs at least one pair of LoRA factors; there is none")
    for path, slot in slots.items():
        _check_rank(path, slot)
    return slots


def _check_magnitudes(slots: Iterable[str], extras: Iterable[str], config: Config) -> None:
    """Refuse a module of a DoRA that has no magnitude: PEFT would take that of the base model's weight."""
    if not config.fields.get("use_dora"):
        return
    found = {key.removeprefix(PREFIX).removesuffix(MAGNITUDE) for key in extras if key.endswith(MAGNITUDE)}
    for path in slots:
        if path not in found:
            raise FormatError(
                f"needs '{path}{MAGNITUDE}', as {CONFIG_NAME} says use_dora; there is none: save the adapter again, or "
                f"set use_dora to false if it is a plain LoRA"
            )


def _check_rank(path: str, slot: Slot) -> None:
    # work in r x r is never much more than the factors themselves, unless r is far above what the map can have
    if slot.lora_rank > max(_ANY_RANK, _PAST_FULL * min(slot.shape)):
        raise UnsupportedError(
            f"module {path!r}: rank {slot.lora_rank} is far past the {min(slot.shape)} that a map of shape "
            f"{list(slot.shape)} can have; cut the factors down to that, by a QR of each"
        )


def _matrix(factor: Tensor, key: str) -> Tensor:
    """See a factor as a matrix: ``[r, cin, kh, kw]`` as ``[r, d]``, ``[cout, r, 1, 1]`` as ``[n, r]``."""
    check_factor_dtype(factor, key)
    if factor.ndim == 2:
        return factor
    if factor.ndim == 4:
        return factor.flatten(1)
    raise UnsupportedError(f"{key!r} needs a matrix or the four axes of a Conv2d; got {list(factor.shape)}")


def _slot(path: str, pair: Pair, down: Tensor, up: Tensor, stored: Tensor, scales: Scales) -> Slot:
    lora_rank = down.shape[0]
    scale = _scale(path, scales, scales.rule(path), lora_rank)
    if stored.ndim == 2:
        return Slot(down, up, scale, pair.kind)
    _, channels, height, width = stored.shape
    return Slot(down, up, scale, "conv2d", (channels, height, width))


def _scale(path: str, scales: Scales, rule: Rule, lora_rank: int) -> float:
    if rule.lora_rank not in (None, lora_rank):
        raise FormatError(
            f"module {path!r}: the configuration gives rank {rule.lora_rank} (r and rank_pattern), the factors have "
            f"{lora_rank}; with two ranks the scale alpha / r is unknown. Correct r or rank_pattern"
        )
    return scales.scale(rule, lora_rank)


def _expert_parameters(path: str, config: Mapping[str, Any]) -> list[str]:
    targets = config["target_parameters"]
    candidates = experts.parameters_of(path, targets)
    modules = config.get("target_modules") or []
    if isinstance(modules, list) and any(path == module or path.endswith(f".{module}") for module in modules):
        return []
    if candidates and isinstance(modules, str) and any("." not in target for target in targets):
        raise UnsupportedError(
            f"module {path!r}: target_modules is a pattern and target_parameters names no module, so it is not plain "
            "which of them made it. Write them as lists of full names in adapter_config.json"
        )
    return candidates


def _experts(path: str, candidates: Sequence[str], down: Tensor, up: Tensor, scales: Scales) -> dict[str, Slot]:
    rule = scales.agreed(candidates)
    if rule is None or rule.lora_rank is None:
        raise UnsupportedError(
            f"module {path!r}: its factors may belong to any of {', '.join(candidates)}, and the configuration gives "
            "these different ranks or alphas, or no rank at all. Give them one rank and alpha"
        )
    lora_rank = rule.lora_rank
    if down.shape[0] % lora_rank:
        raise FormatError(
            f"module {path!r}: needs a multiple of the configuration's rank {lora_rank} as rows of A, one block for "
            f"each expert; got {down.shape[0]}"
        )
    stem = experts.stem_of(path, candidates)
    return experts.split(stem, down, up, lora_rank, scales.scale(rule, lora_rank))
