"""The tensor names of a PEFT file: which are factors, of which module, and which are kept as they are."""

from __future__ import annotations

import functools
from typing import NamedTuple

from loraspan.errors import FormatError, UnsupportedError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
# of `lora_B`: PEFT scales it as it does the factors
BIAS = ".lora_B.bias"
MAGNITUDE = ".lora_magnitude_vector"
# PEFT wrote the adapter's name into its keys before version 0.3
_OLD_NAME = "default"
_FACTORS = {
    "lora_A": ("down", "linear"),
    "lora_B": ("up", "linear"),
    "lora_embedding_A": ("down", "embedding"),
    "lora_embedding_B": ("up", "embedding"),
}


class Pair(NamedTuple):
    """The names of the two factors of one module in the file."""

    kind: str
    down: str
    up: str


def factor_keys(path: str, kind: str) -> Pair:
    """Give the names under which PEFT stores the factors of a module.

    Example:
        >>> factor_keys("layers.0.q_proj", "linear").up
        'base_model.model.layers.0.q_proj.lora_B.weight'
    """
    if kind == "embedding":
        return Pair(kind, f"{PREFIX}{path}.lora_embedding_A", f"{PREFIX}{path}.lora_embedding_B")
    return Pair(kind, f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight")


class Sorted(NamedTuple):
    """Factor pairs by module path, and extras by the name that PEFT gives them now: the names in the file."""

    pairs: dict[str, Pair]
    extras: dict[str, str]


@functools.lru_cache(maxsize=8)
def sort_keys(names: tuple[str, ...]) -> Sorted:
    """Sort the tensor names of a file.

    Args:
        names: all of them.

    Returns:
        Pairs and extras in the order of ``names``. Equal names may give the same object: do not change it.

    Raises:
        FormatError: if a factor lacks its partner, or two names mean one tensor.
        UnsupportedError: if a name belongs to a LoRA variant that is not known here.
    """
    found: dict[str, dict[str, str]] = {}
    kinds: dict[str, str] = {}
    extras: dict[str, str] = {}
    for name in names:
        path, role, kind = _parse(name)
        if role is None:
            if path in extras:
                raise FormatError(f"tensors {name!r} and {extras[path]!r} are two names of one tensor")
            extras[path] = name
            continue
        roles = found.setdefault(path, {})
        if role in roles or kinds.setdefault(path, kind) != kind:
            raise FormatError(f"tensor {name!r} is a second factor for module {path!r}")
        roles[role] = name
    return Sorted({path: _pair(path, roles, kinds[path]) for path, roles in found.items()}, extras)


def _pair(path: str, roles: dict[str, str], kind: str) -> Pair:
    if len(roles) != 2:
        (role,) = roles.values()
        raise FormatError(f"module {path!r} needs both factors A and B; there is only {role!r}")
    return Pair(kind, roles["down"], roles["up"])


def _parse(name: str) -> tuple[str, str | None, str]:
    """Give (module path, role, kind) of a factor, or (present key, None, "") of an extra."""
    if not name.startswith(PREFIX):
        raise FormatError(f"needs tensor names that begin with {PREFIX!r}, as PEFT writes them; got {name!r}")
    if ".lora_" not in name:
        _check_path(name, name)
        return name, None, ""
    path, _, rest = name[len(PREFIX) :].rpartition(".lora_")
    parts = f"lora_{rest}".split(".")
    if _OLD_NAME in parts[1:2]:
        del parts[1]
    factor = _FACTORS.get(parts[0])
    if factor is not None and parts[1:] == ([] if factor[1] == "embedding" else ["weight"]):
        _check_path(path, name)
        return path, *factor
    if parts in (["lora_B", "bias"], ["lora_magnitude_vector"]):
        _check_path(path, name)
        return f"{PREFIX}{path}.{'.'.join(parts)}", None, ""
    raise UnsupportedError(f"tensor {name!r} belongs to a variant of LoRA that is not known here")


def _check_path(path: str, name: str) -> None:
    if not path or ".." in path or path[0] == "." or path[-1] == ".":
        raise FormatError(f"tensor {name!r} needs a module path without empty parts")
