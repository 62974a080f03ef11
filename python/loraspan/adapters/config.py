"""PEFT's ``adapter_config.json``: read strictly, and refused where a guess would give a wrong adapter."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from loraspan.adapters.regular import open_regular
from loraspan.adapters.scales import Scales
from loraspan.adapters.strict_json import parse_object
from loraspan.errors import FormatError, UnsupportedError

MAX_CONFIG_BYTES = 4_000_000
# room for the most would be asked for, and given back, for every file
_USUAL_BYTES = 1 << 16

_NUMBER = (int, float)
# what each field that is understood may hold, where it is not null
_TYPES: dict[str, tuple[type, ...]] = {
    "alpha_pattern": (dict,),
    "base_model_name_or_path": (str,),
    "bias": (str,),
    "corda_config": (dict,),
    "eva_config": (dict,),
    "exclude_modules": (list, str),
    "fan_in_fan_out": (bool,),
    "inference_mode": (bool,),
    "init_lora_weights": (bool, str),
    "layers_pattern": (list, str),
    "layers_to_transform": (list, int),
    "license": (str,),
    "loftq_config": (dict,),
    "lora_alpha": _NUMBER,
    "lora_bias": (bool,),
    "lora_dropout": _NUMBER,
    "lora_ga_config": (dict,),
    "modules_to_save": (list,),
    "peft_type": (str,),
    "peft_version": (str,),
    "qalora_group_size": (int,),
    "r": (int,),
    "rank_pattern": (dict,),
    "revision": (str,),
    "runtime_config": (dict,),
    "target_modules": (list, str),
    "target_parameters": (list,),
    "task_type": (str,),
    "trainable_token_indices": (list, dict),
    "use_dora": (bool,),
    "use_rslora": (bool,),
}
# these name code for a loader to import; nothing here runs them, and they are never written again
_DROPPED = ("auto_mapping", "megatron_core")
# each changes what the factors mean, or which model they fit
_REFUSED = {
    "alora_invocation_tokens": "it acts on some tokens only (aLoRA)",
    "arrow_config": "it routes between adapters (Arrow)",
    "ensure_weight_tying": "its tied layers share factors, and would come apart",
    "kasa_config": "it changes the base weights and has a diagonal between the factors (KaSA)",
    "layer_replication": "it belongs to a base model with repeated layers",
    "megatron_config": "it belongs to Megatron's parallel layers",
    "monteclora_config": "its factors are sampled (MonteCLoRA)",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "use_qalora": "its inputs are pooled in groups (QALoRA)",
    "velora_config": "it is trained with compressed activations (VeLoRA), which is not checked here",
}
# PEFT writes the rest of the decomposition into the base weights (peft/tuners/lora/layer.py, <name>_init)
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")


class Config(NamedTuple):
    """A checked configuration.

    Attributes:
        fields: as plain JSON values, without those that name code to import. Nested values may be shared between
            adapters: treat them as constants.
        scales: the ranks and scales that it gives.
    """

    fields: dict[str, Any]
    scales: Scales


def read_config(path: str) -> Config:
    """Read and check an ``adapter_config.json``.

    Raises:
        FormatError: if it is missing, too large, not strict JSON, or a field has the wrong type.
        UnsupportedError: if it describes something else than LoRA on an unchanged base model.
    """
    try:
        with open_regular(path) as file:
            raw = file.read(_USUAL_BYTES)
            if len(raw) == _USUAL_BYTES:
                raw += file.read(MAX_CONFIG_BYTES + 1 - _USUAL_BYTES)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: a PEFT adapter needs its adapter_config.json; it cannot be read: {error}") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise FormatError(f"{path}: needs a configuration of at most {MAX_CONFIG_BYTES} bytes; it is longer")
    try:
        fields, scales = _parsed(raw)
    except (FormatError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from None
    return Config(dict(fields), scales)


# the adapters of one training recipe have one configuration, byte for byte
@functools.lru_cache(maxsize=8)
def _parsed(raw: bytes) -> Config:
    fields = parse_object(raw, "the configuration")
    check_supported(fields)
    kept = {name: value for name, value in fields.items() if name not in _DROPPED}
    return Config(kept, Scales(kept))


def check_supported(fields: Mapping[str, Any]) -> None:
    """Refuse a configuration that is not plain LoRA on an unchanged base model, or has a field nobody here knows.

    Raises:
        UnsupportedError: saying which field and why.
        FormatError: if a field has the wrong type.

    Example:
        >>> check_supported({"peft_type": "LORA", "r": 8, "lora_alpha": 16})
    """
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"needs peft_type LORA; got {kind!r}. Other methods have no factors A and B")
    for name, value in fields.items():
        if name in _TYPES:
            _check_type(name, value)
        elif value and name not in _DROPPED:
            reason = _REFUSED.get(name, "its meaning is not known here")
            raise UnsupportedError(f"{name} is set, and an adapter with it is refused: {reason}; got {str(value)[:80]}")
    if fields.get("megatron_core") not in (None, "megatron.core"):
        raise UnsupportedError("megatron_core names a module to import, and an adapter with it is refused")
    _check_init(fields.get("init_lora_weights"))
    _check_lists(fields)
    _check_numbers(fields)


def check_fields(fields: Mapping[str, Any]) -> None:
    """Check the fields that are understood, whoever gave them, and let the others pass.

    Raises:
        FormatError: if one has the wrong type, or a number that no adapter has.

    Example:
        >>> check_fields({"lora_alpha": 16, "my_own": 1})
    """
    for name, value in fields.items():
        if name in _TYPES:
            _check_type(name, value)
    _check_lists(fields)
    _check_numbers(fields)


def _check_type(name: str, value: Any) -> None:
    types = _TYPES[name]
    # JSON's true is an int to Python
    fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
    if value is not None and not fits:
        wanted = " or ".join(sorted({kind.__name__ for kind in types}))
        raise FormatError(f"{name} needs {wanted} or null; got {str(value)[:80]!r}")


def _check_init(init: bool | str | None) -> None:
    if init is None or isinstance(init, bool) or init in _KEEPS_BASE:
        return
    if init.startswith(_CHANGES_BASE):
        raise UnsupportedError(
            f"init_lora_weights {init!r} moved a part of the base weights into the adapter, so it belongs to a changed "
            "base model. Save it again with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), "
            "which makes it a LoRA of the original base"
        )
    raise UnsupportedError(f"init_lora_weights {init[:80]!r} is not known here: does it change the base weights?")


def _check_lists(fields: Mapping[str, Any]) -> None:
    for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        value = fields.get(name)
        if isinstance(value, list) and not all(isinstance(item, str) for item in value):
            raise FormatError(f"{name} needs a list of names; got {str(value)[:80]}")
    # these become names of slots, which have to be text, as names of tensors are
    for item in fields.get("target_parameters") or ():
        if not item.isprintable():
            raise FormatError(f"target_parameters needs names of printable characters; got {item[:80]!r}")
    if fields.get("bias") not in (None, "none", "all", "lora_only"):
        raise FormatError(f"bias needs none, all or lora_only; got {fields['bias']!r}")


def _check_numbers(fields: Mapping[str, Any]) -> None:
    if fields.get("r") is not None and fields["r"] < 1:
        raise FormatError(f"r needs a rank of at least 1; got {fields['r']}")
    for name in ("lora_alpha", "lora_dropout"):
        if not _is_finite(fields.get(name) or 0):
            raise FormatError(f"{name} needs a finite number; got {str(fields[name])[:80]}")
    for name, what in (("rank_pattern", "positive whole number"), ("alpha_pattern", "positive number")):
        for key, value in (fields.get(name) or {}).items():
            fits = type(value) in _NUMBER and value > 0 and _is_finite(value)
            if not fits or (name == "rank_pattern" and value != int(value)):
                raise FormatError(f"{name} needs a {what} for each key; got {str(value)[:80]!r} for {key[:80]!r}")


def _is_finite(value: float) -> bool:
    # an int of JSON may be past all floats, and then math.isfinite raises
    return abs(value) <= sys.float_info.max
