"""What the tensors beside the factors are: which module's, which parameter of it, and which cannot be served."""

from __future__ import annotations

import functools
from typing import NamedTuple

from loraspan.adapters.keys import BIAS, PREFIX

# the name that a bias of lora_B has among the parameters of its module
LORA_BIAS = BIAS.removeprefix(".")
_REFUSED = {
    ".lora_magnitude_vector": "it is a DoRA, whose magnitude is not served: export it, or bake it into a model",
    ".token_adapter.": "it has trained tokens, whose rows are not served: export it, or bake it into a model",
}
# PEFT's copy of what the module was before (with bias="all"); a model with the adapter does not use it
_UNUSED = ".original_module."
# wrappers of PEFT around a module, which are not in the model; within the second, PEFT leaves an adapter's name
_BASE, _SAVED = ".base_layer.", ".modules_to_save."


class Key(NamedTuple):
    """A tensor of a task.

    Attributes:
        name: in the file.
        in_base: whether PEFT loads it into the base model itself, and so into all modules that share it.
    """

    name: str
    in_base: bool


class Parts(NamedTuple):
    """The extras of a task by module and parameter, each under all the names that it has; or why it is refused."""

    modules: dict[str, dict[str, list[Key]]]
    refused: str | None


@functools.lru_cache(maxsize=64)
def parts_of(names: tuple[str, ...]) -> Parts:
    """Sort the names of a task's extras. Equal names may give the same object: do not change it.

    Example:
        >>> parts = parts_of((f"{PREFIX}score.weight", f"{PREFIX}q.base_layer.bias"))
        >>> {path: list(parameters) for path, parameters in parts.modules.items()}
        {'score': ['weight'], 'q': ['bias']}
    """
    modules: dict[str, dict[str, list[Key]]] = {}
    for name in names:
        for mark, reason in _REFUSED.items():
            if mark in name:
                return Parts({}, f"{reason} (tensor {name!r})")
        if _UNUSED in name:
            continue
        rest = name.removeprefix(PREFIX)
        if rest.endswith(BIAS):
            path, parameter = rest.removesuffix(BIAS), LORA_BIAS
        else:
            path, _, parameter = _unwrapped(rest, names).rpartition(".")
        key = Key(name, _BASE in name)
        modules.setdefault(path, {}).setdefault(parameter, []).append(key)
    return Parts(modules, None)


def _unwrapped(rest: str, names: tuple[str, ...]) -> str:
    """Give the name of a parameter in the model: another name of one that is there too, if that can be."""
    rest = rest.replace(_BASE, ".")
    if _SAVED not in rest:
        return rest
    outer, _, inner = rest.partition(_SAVED)
    plain, named = f"{outer}.{inner}", f"{outer}.{inner.partition('.')[2]}"
    return named if PREFIX + named in names and PREFIX + plain not in names else plain


def lora_path(key: Key) -> str:
    """Give the slot that a bias of ``lora_B`` belongs to."""
    return key.name.removeprefix(PREFIX).removesuffix(BIAS)
