"""The tensor names of a PEFT file: which are factors, of which module, and which are kept as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from loraspan.errors import FormatError, UnsupportedError

PREFIX = "base_model.model."
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


def sort_keys(names: Iterable[str], where: str) -> tuple[dict[str, Pair], dict[str, str]]:
    """Sort the tensor names of a file.

    Args:
        names: all of them.
        where: names the file in errors.

    Returns:
        The factor pairs by module path, in the file's order, and the extras: PEFT's present key -> the file's name.

    Raises:
        FormatError: if a factor lacks its partner, or two names mean one tensor.
        UnsupportedError: if a name belongs to a LoRA variant that is not known here.
    """
    found: dict[str, dict[str, str]] = {}
    kinds: dict[str, str] = {}
    extras: dict[str, str] = {}
    for name in names:
        path, role, kind = _parse(name, where)
        if role is None:
            if path in extras:
                raise FormatError(f"{where}: {name!r} and {extras[path]!r} are two names of one tensor")
            extras[path] = name
            continue
        roles = found.setdefault(path, {})
        if role in roles or kinds.setdefault(path, kind) != kind:
            raise FormatError(f"{where}: {name!r} is a second factor for module {path!r}")
        roles[role] = name
    return {path: _pair(path, roles, kinds[path], where) for path, roles in found.items()}, extras


def _pair(path: str, roles: dict[str, str], kind: str, where: str) -> Pair:
    if len(roles) != 2:
        (role,) = roles.values()
        raise FormatError(f"{where}: module {path!r} needs both factors A and B; there is only {role!r}")
    return Pair(kind, roles["down"], roles["up"])


def _parse(name: str, where: str) -> tuple[str, str | None, str]:
    """Give (module path, role, kind) of a factor, or (present key, None, "") of an extra."""
    if not name.startswith(PREFIX):
        raise FormatError(f"{where}: needs tensor names that begin with {PREFIX!r}, as PEFT writes them; got {name!r}")
    if ".lora_" not in name:
        _check_path(name, name, where)
        return name, None, ""
    path, _, rest = name[len(PREFIX) :].rpartition(".lora_")
    parts = f"lora_{rest}".split(".")
    if _OLD_NAME in parts[1:2]:
        del parts[1]
    factor = _FACTORS.get(parts[0])
    if factor is not None and parts[1:] == ([] if factor[1] == "embedding" else ["weight"]):
        _check_path(path, name, where)
        return path, *factor
    if parts in (["lora_B", "bias"], ["lora_magnitude_vector"]):
        _check_path(path, name, where)
        return f"{PREFIX}{path}.{'.'.join(parts)}", None, ""
    raise UnsupportedError(f"{where}: tensor {name!r} belongs to a variant of LoRA that is not known here")


def _check_path(path: str, name: str, where: str) -> None:
    if not path or ".." in path or path[0] == "." or path[-1] == ".":
        raise FormatError(f"{where}: tensor {name!r} needs a module path without empty parts")
