"""Write an adapter as a folder that PEFT loads."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraspan.adapters import experts
from loraspan.adapters.base import Adapter, Slot
from loraspan.adapters.config import check_fields
from loraspan.adapters.fold import check_factor_dtype, fold, scaled
from loraspan.adapters.keys import BIAS, CONFIG_NAME, PREFIX, WEIGHTS_NAME, factor_keys
from loraspan.adapters.mapped import map_tensors
from loraspan.adapters.publish import publishing, write_tensors, write_text
from loraspan.adapters.scales import Patterns, Scales
from loraspan.errors import ArgumentError, FormatError, LoraspanError

# by this a folder is known as one that may be replaced
_WRITER = {"writer": "loraspan"}
# what an exported configuration takes from the original one; everything else is PEFT's default or said below
_KEPT = {
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "revision": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_dora": False,
}


def write(adapter: Adapter, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
    """Write a PEFT folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

    The scale goes into the factors: ``lora_alpha = r``, ``use_rslora = false``. Where ranks differ, ``r`` is the
    commonest and ``rank_pattern`` and ``alpha_pattern`` give the others. Extras are written byte for byte, except a
    bias of ``lora_B``, which PEFT scales as well and which therefore takes the scale of the original configuration.

    Args:
        adapter: its ``config`` says what the model needs beside the factors (heads, DoRA, ...).
        folder: appears whole or not at all. One that exists may be empty or an earlier export, and is then replaced.
        dtype: of the factors; None keeps that of each.

    Raises:
        ArgumentError: if ``folder`` holds something else, or slots of experts do not fit together.
        UnsupportedError: if a factor with its scale leaves the range of its dtype.
        NotFiniteError: if a factor holds a NaN or an infinity.
        StoreError: if the folder cannot be written; what was there before is as it was.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp(), "out")
        >>> write(Adapter("sql", {"q": Slot(torch.ones(2, 5), torch.ones(3, 2), 0.25)}), folder)
        >>> from loraspan.adapters.peft_read import read
        >>> read(folder).slots["q"].scale
        1.0
    """
    target = Path(folder)
    _check_target(target)
    config, tensors = contents(adapter, dtype)
    metadata = {"format": "pt", **_WRITER}
    if adapter.source.licence:
        metadata["license"] = adapter.source.licence
    with publishing(target) as draft:
        write_tensors(draft / WEIGHTS_NAME, tensors, metadata)
        write_text(draft / CONFIG_NAME, json.dumps(dict(sorted(config.items())), indent=2) + "\n")


def _check_target(target: Path) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise ArgumentError(f"{target}: needs the name of a folder to write; there is something else of that name")
    names = {child.name for child in target.iterdir()}
    if names and not (names <= {CONFIG_NAME, WEIGHTS_NAME} and _is_export(target / WEIGHTS_NAME)):
        raise ArgumentError(
            f"{target}: needs a new or empty folder, or an earlier export to replace; it holds "
            f"{', '.join(sorted(names)[:5])}. Choose another folder or delete it"
        )


def _is_export(file: Path) -> bool:
    try:
        return map_tensors(str(file)).header.metadata.items() >= _WRITER.items()
    except LoraspanError:
        return False


def contents(adapter: Adapter, dtype: torch.dtype | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give the configuration and the tensors of an adapter's folder, as :func:`write` writes them."""
    if not adapter.slots:
        raise ArgumentError(f"adapter {adapter.name!r}: needs at least one slot to be written")
    check_fields(adapter.config)
    plain = {path: slot for path, slot in adapter.slots.items() if slot.kind != "expert"}
    groups = experts.gather({path: slot for path, slot in adapter.slots.items() if slot.kind == "expert"})
    config = {name: adapter.config.get(name, default) for name, default in _KEPT.items()}
    config["base_model_name_or_path"] = config["base_model_name_or_path"] or adapter.source.base_model
    targets = config["target_parameters"] or []
    if bool(groups) != bool(targets):
        raise ArgumentError(
            f"adapter {adapter.name!r}: slots of kind expert need target_parameters in the config, and only they do; "
            f"got {len(groups)} groups of experts and target_parameters {targets}"
        )

    expert_rank = max((slot.lora_rank for group in groups.values() for slot in group), default=0)
    ranks = {path: slot.lora_rank for path, slot in plain.items()} | dict.fromkeys(targets, expert_rank)
    config |= _rank_fields(ranks) | {
        "peft_type": "LORA",
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "target_modules": list(plain),
    }
    tensors = _extras(adapter)
    for path, slot in plain.items():
        _put(tensors, _plain_factors(path, slot, dtype))
    for stem, group in groups.items():
        pairs = [fold(f"{stem}[{e}]", slot, dtype) for e, slot in enumerate(group)]
        names = factor_keys(experts.file_path_of(stem, targets), "expert")
        _put(tensors, dict(zip((names.down, names.up), experts.join(pairs, expert_rank), strict=True)))
    return config, tensors


def _put(tensors: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Put factors among the tensors of a file, none in place of another."""
    for key, factor in more.items():
        if key in tensors:
            raise FormatError(f"extra {key!r}: it has the name of a factor, and a file has room for one of them")
        tensors[key] = factor


def _plain_factors(path: str, slot: Slot, dtype: torch.dtype | None) -> dict[str, Tensor]:
    names = factor_keys(path, slot.kind)
    down, up = fold(path, slot, dtype)
    if slot.kind == "conv2d":
        if slot.kernel is None:
            raise FormatError(f"slot {path!r}: needs the kernel (cin, kh, kw) of a convolution; it has none")
        down, up = down.reshape(-1, *slot.kernel), up[:, :, None, None]
    return {names.down: down, names.up: up}


def _rank_fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Give ``r`` and the patterns that give each path its rank, as scale 1 needs both rank and alpha."""
    counts = Counter(ranks.values())
    common = max(counts, key=lambda lora_rank: (counts[lora_rank], -lora_rank))
    patterns = {_key(path, ranks): lora_rank for path, lora_rank in ranks.items() if lora_rank != common}
    return {"r": common, "lora_alpha": common, "rank_pattern": patterns, "alpha_pattern": dict(patterns)}


def _key(path: str, paths: Iterable[str]) -> str:
    """Give the key of one path: the path, but anchored where PEFT would also match it to the end of another one.

    Plain paths are what PEFT writes itself and what its older versions know; an order of the keys would not do, since
    PEFT sorts them when it saves.
    """
    alone = Patterns({path: True}, "rank_pattern")
    return path if sum(alone.first(other) is not None for other in paths) == 1 else f"^{re.escape(path)}"


def _extras(adapter: Adapter) -> dict[str, Tensor]:
    extras = dict(adapter.extras)
    for key in [key for key in extras if key.endswith(BIAS)]:
        check_factor_dtype(extras[key], key)
        path = key.removeprefix(PREFIX).removesuffix(BIAS)
        extras[key] = scaled(extras[key], original_scale(adapter, path), None, f"extra {key!r}")
    return extras


def original_scale(adapter: Adapter, path: str) -> float:
    """Give the scale that belongs to the bias: that of the original configuration, whatever the factors are now."""
    slot = adapter.slots.get(path)
    if "lora_alpha" not in adapter.config and slot is not None:
        return slot.scale
    scales = Scales(adapter.config)
    rule = scales.rule(path)
    lora_rank = rule.lora_rank or (slot.lora_rank if slot is not None else 0)
    if not lora_rank:
        raise FormatError(f"adapter {adapter.name!r}: the bias of module {path!r} needs its rank in the configuration")
    return scales.scale(rule, lora_rank)
